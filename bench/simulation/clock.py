"""Time that passes only while everybody waits: an event loop which goes from one timer to the next at once."""

from __future__ import annotations

import asyncio
import random
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

Result = TypeVar("Result")

_RESOLUTION_S = 1e-9


class _Waiting(selectors.SelectSelector):
    """Does not wait for files, of which there are none: it lets the time pass."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everybody waits, and nobody for a timer: nothing would ever happen again")
        self.now += max(timeout, 0.0)
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, waiting: _Waiting) -> None:
        super().__init__(waiting)
        self._waiting = waiting
        self._clock_resolution = _RESOLUTION_S  # else the machine's, and what is due together would depend on it

    def time(self) -> float:
        return self._waiting.now


def run(main: Coroutine[Any, Any, Result], seed: int) -> Result:
    """What `main` returns, run in virtual time, which begins at 0 s.

    Until then `time.monotonic` is that time in the whole process, `time.process_time` stands still, and the chance of
    the module `random` is that of `seed`.

    Raises:
        RuntimeError: nothing would ever happen again.
    """
    waiting = _Waiting()

    def now() -> float:
        return waiting.now

    chance = random.getstate()
    with (
        mock.patch.object(time, "monotonic", now),
        mock.patch.object(time, "process_time", return_value=0.0),
        asyncio.Runner(loop_factory=lambda: _Loop(waiting)) as runner,
    ):
        random.seed(seed)
        try:
            return runner.run(main)
        finally:
            random.setstate(chance)
