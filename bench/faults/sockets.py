"""TCP sockets of processes of this machine, as /proc has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ESTABLISHED, _LISTENING = "01", "0A"


@dataclass(frozen=True, slots=True)
class _Socket:
    """One of this network namespace; `link` is what the /proc/PID/fd of its processes say of it."""

    port: int
    peer: int
    state: str
    link: str


def _all() -> Iterator[_Socket]:
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            port, peer = (int(field.rpartition(":")[2], 16) for field in fields[1:3])
            yield _Socket(port, peer, fields[3], f"socket:[{fields[9]}]")


def _links(pid: int) -> set[str]:
    """Of the files that a process has open; none once it has ended."""
    links = set()
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                links.add(str(file.readlink()))
    return links


def listening(port: int) -> set[str]:
    """The sockets that listen on a port, each process's own."""
    return {each.link for each in _all() if each.state == _LISTENING and each.port == port}


def accepted(pid: int, port: int) -> set[int]:
    """The peers' ports of the connections that a process has taken on `port`."""
    mine = _links(pid)
    return {each.peer for each in _all() if each.state == _ESTABLISHED and each.port == port and each.link in mine}


def opened(pid: int, port: int) -> set[int]:
    """A process's own ports of its connections to `port`."""
    mine = _links(pid)
    return {each.port for each in _all() if each.state == _ESTABLISHED and each.peer == port and each.link in mine}


def listener(processes: Iterable[int], port: int) -> tuple[int, str]:
    """Of the processes that listen on `port` the one with the most connections, and its socket.

    Raises:
        RuntimeError: there is none.
    """
    there = listening(port)
    found = [(len(accepted(pid, port)), pid, link) for pid in processes for link in _links(pid) & there]
    if not found:
        raise RuntimeError(f"no process of the gateway listens on port {port}")
    _, pid, link = max(found)
    return pid, link
