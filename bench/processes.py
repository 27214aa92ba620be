"""Server processes on loopback: started, asked what they have used, ended by their id."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


class Server:
    """One server process, its threads included."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self._proc = Path("/proc") / str(process.pid)
        self.address = address

    def cpu_s(self) -> float:
        """Seconds of CPU, user and system, used so far."""
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    def memory_mb(self) -> float:
        """Resident memory now."""
        return int((self._proc / "statm").read_text().split()[1]) * _PAGE_MB


@contextmanager
def server(*command: str) -> Iterator[Server]:
    """Run `command` under this Python until the block ends; it must print "serving on HOST:PORT".

    Raises:
        RuntimeError: it ended instead.
    """
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving on "):
                yield Server(process, line.split()[-1])
                return
        raise RuntimeError(f"{' '.join(command)} ended with status {process.wait()}")
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
