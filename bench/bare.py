"""The process of `bench.calls`, from outside."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from bench import processes
from bench.load import LoadError, Run
from bench.processes import Server


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What a number of calls, one after another, came to."""

    cpu_us: float
    run: Run


class BareCalls(Server):
    """A process that calls when asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(process.pid, "")
        assert process.stdin is not None
        assert process.stdout is not None
        self._asking: IO[str] = process.stdin
        self._told: IO[str] = process.stdout

    def call(self, name: str, count: int) -> Calls:
        """Raises:
        LoadError: the process has ended.
        """
        print(name, count, file=self._asking, flush=True)
        line = self._told.readline()
        if not line:
            raise LoadError("the process that calls without a server has ended")
        told = json.loads(line)
        return Calls(cpu_us=told.pop("cpu_us"), run=Run(**told))


@contextmanager
def calling(*command: str, environment: Mapping[str, str] | None = None) -> Iterator[BareCalls]:
    """`command`, which ends in `bench.calls.answer`, until the block ends."""
    with processes.piped(*command, environment=environment) as process:
        yield BareCalls(process)
