"""Server processes on loopback: started, asked what they and their descendants have used, ended by their ids."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6
_START_S, _END_S = 60.0, 15.0
_PROCESS_CLOCK = 2
"""CPUCLOCK_SCHED of Linux: the clock of a process is `~pid << 3 | 2`, as clock_getcpuclockid(3) gives it."""
# In the environment of a server and of all that it starts.
_MARK = "DL_INFERENCE_BENCH_SERVER"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stat:
    """What /proc/PID/stat says of one process; `children_cpu_s` is of its children that have ended."""

    parent: int
    children_cpu_s: float
    memory_mb: float
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the processes of a server hold now.

    Attributes:
        memory_mb: resident; pages that two of the processes share count twice.
        descriptors: open files and sockets.
    """

    memory_mb: float
    descriptors: int
    threads: int


class Server:
    """One server process and its descendants, their threads included."""

    def __init__(self, pid: int, address: str) -> None:
        self._pid = pid
        self.address = address

    def cpu_s(self) -> float:
        """Seconds of CPU, user and system, used so far."""
        return sum(stat.children_cpu_s + _cpu_s(pid) for pid, stat in _family(self._pid).items())

    def memory_mb(self) -> float:
        """Resident memory now; pages that two of the processes share count twice."""
        return sum(stat.memory_mb for stat in _family(self._pid).values())

    def usage(self) -> Usage:
        """What it holds now.

        Raises:
            OSError: one of its processes is ending.
        """
        family = _family(self._pid)
        return Usage(
            memory_mb=sum(stat.memory_mb for stat in family.values()),
            descriptors=sum(1 for pid in family for _ in Path(f"/proc/{pid}/fd").iterdir()),
            threads=sum(stat.threads for stat in family.values()),
        )

    def processes(self) -> list[int]:
        """The ids of its processes, its own first."""
        return list(_family(self._pid))

    def send_signal(self, number: int) -> None:
        """To its own process, not to those that it has started.

        Raises:
            ProcessLookupError: it has ended.
        """
        os.kill(self._pid, number)

    def kill(self) -> None:
        """End all its processes at once, as a crash would."""
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Have all its processes do nothing until `resume`, or until it is ended."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in _family(self._pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def announcing(
    *command: str,
    environment: Mapping[str, str] | None = None,
    ends_with_input: bool = False,
    log: IO[str] | None = None,
) -> Iterator[Server]:
    """Run `command` until the block ends; it must print "serving on HOST:PORT".

    Args:
        environment: what the process has beside the environment of this one.
        ends_with_input: it ends by itself once its standard input does, and is not told otherwise.
        log: takes its standard error; by default that of this process.

    Raises:
        RuntimeError: it ended instead, or was ended as it had not done so within a minute.
    """
    with _process(command, environment or {}, subprocess.PIPE, ends_with_input, log) as process:
        assert process.stdout is not None
        too_late = threading.Timer(_START_S, _end, (process,))
        too_late.start()
        lines = (line for line in process.stdout if line.startswith("serving on "))
        address = next(lines, "").rpartition(" ")[2].strip()
        too_late.cancel()
        if not address:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.wait()}")
        yield Server(process.pid, address)


@contextmanager
def listening(
    address: str, *command: str, environment: Mapping[str, str] | None = None, log: IO[str] | None = None
) -> Iterator[Server]:
    """Run `command` until the block ends; it must take connections on `address`, "host:port".

    Args:
        environment: what the process has beside the environment of this one.
        log: takes what it prints; by default its standard error goes to that of this process, the rest nowhere.

    Raises:
        RuntimeError: it ended instead, or did not within a minute.
    """
    host, _, port = address.rpartition(":")
    with _process(command, environment or {}, log or subprocess.DEVNULL, log=log) as process:
        deadline = time.monotonic() + _START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not listen on {address}; status {process.returncode}")
            with suppress(OSError), socket.create_connection((host, int(port))):
                break
            time.sleep(0.02)
        yield Server(process.pid, address)


@contextmanager
def piped(*command: str, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run `command`, with its standard input and output as pipes, until the block ends; it ends with its input."""
    with _process(command, environment or {}, subprocess.PIPE, ends_with_input=True) as process:
        yield process


def free_address(host: str = "127.0.0.1") -> str:
    """An address on `host`, a loopback one, that nothing listened on just now."""
    with socket.create_server((host, 0)) as taken:
        return f"{host}:{taken.getsockname()[1]}"


@contextmanager
def _process(
    command: tuple[str, ...],
    environment: Mapping[str, str],
    stdout: int | IO[str],
    ends_with_input: bool = False,
    log: IO[str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """`command`, running, with a standard input that ends when this process does, however it does."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, **environment, _MARK: mark}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=stdout, stderr=log, text=True
    ) as process:
        try:
            yield process
        finally:
            _end(process, ends_with_input)
            _kill_marked(mark)


def _end(process: subprocess.Popen[str], ends_with_input: bool = False) -> None:
    """Tell it to end, and return when it and its descendants are gone; what takes too long is killed.

    A server that was left over would take a share of the next one's requests, where they share a port.
    """
    members = []
    for pid in _family(process.pid):
        with suppress(ProcessLookupError):
            members.append(os.pidfd_open(pid))
    assert process.stdin is not None
    process.stdin.close()
    if not ends_with_input:
        process.terminate()
    deadline = time.monotonic() + _END_S
    for member in members:
        if not select.select([member], [], [], max(0.0, deadline - time.monotonic()))[0]:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(member, signal.SIGKILL)
            select.select([member], [], [])
        os.close(member)
    process.wait()


def _kill_marked(mark: str) -> None:
    """Kill what a server has left behind, whoever its parent is now."""
    entry = f"{_MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if entry in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def _cpu_s(pid: int) -> float:
    """Seconds of CPU of a process and its threads, by its clock: /proc counts in ticks of 10 ms, which is 5 % of what a
    proxy takes in a second with one request in flight. 0 if it has ended."""
    try:
        return time.clock_gettime(~pid << 3 | _PROCESS_CLOCK)
    except OSError:
        return 0.0


def _family(pid: int) -> dict[int, _Stat]:
    """The process `pid` and its descendants that are still there."""
    everyone: dict[int, _Stat] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            everyone[int(path.parent.name)] = _Stat(
                parent=int(fields[1]),
                children_cpu_s=sum(map(int, fields[13:15])) * _TICK_S,
                memory_mb=int(fields[21]) * _PAGE_MB,
                threads=int(fields[17]),
            )
    family = [pid] if pid in everyone else []
    for member in family:
        family += [other for other, stat in everyone.items() if stat.parent == member]
    return {member: everyone[member] for member in family}
