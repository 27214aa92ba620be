"""One event loop for the whole process, and how often Envoy may wake it.

pyvoy asks asyncio for a new event loop, and runs it on a thread of its own, for each listener that has its filter. Here
the first one asked for is a uvloop loop, on which everything happens; each later one stands for the first.

A second thread of pyvoy's, one for each filter, hands events of Envoy over to the loop: a call that came, a body, an
answer. To wake two threads and then Envoy's for each event costs more than all of our code (measured: 240 µs of CPU
per forwarded call, 140 with the pauses below, at 128 in flight). So that thread pauses before it takes up work: what
comes meanwhile is handed over in one go, as a network card moderates its interrupts. A pause that gathers much makes
the next one longer, up to a time that grows with the calls in flight; one that gathers little makes it shorter, down
to none. So a call alone is not held up, however many others are open and wait.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from time import perf_counter, sleep
from typing import Any, Generic, Protocol, TypeVar

import uvloop

_FEWEST = 8
_PAUSE_PER_CALL_S = 16e-6
_STILL_BUSY_S = 20e-6
# A pause of so long is worth an event more than the two without which it is none.
_WORTH_S = 200e-6
_FIRST_S = 50e-6
_TRY_EVERY = 32
_TICK_S = 0.005


class Pace:
    """How much is under way, and how long Envoy's events may wait for company.

    Attributes:
        in_flight: calls that have come and are not answered yet.
        longest_s: seconds of the longest pause; 0 never pauses.
    """

    __slots__ = ("in_flight", "longest_s")

    def __init__(self) -> None:
        self.in_flight = 0
        self.longest_s = 0.0


class _Filter:
    """What pyvoy takes for the event loop of one filter."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pace: Pace, *, first: bool) -> None:
        self.create_future = loop.create_future
        self.create_task = loop.create_task
        self.call_soon_threadsafe = _moderated(loop.call_soon_threadsafe, pace)
        self._loop = loop
        self._first = first
        self._stopped = threading.Event()

    def run_forever(self) -> None:
        if self._first:
            asyncio.set_event_loop(self._loop)
            self._loop.run_forever()
        else:
            self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()
        if self._first:
            self._loop.stop()

    # What pyvoy calls once `run_forever` is over: a listener has gone and the loop goes on, or the process ends.

    def shutdown_asyncgens(self) -> None: ...

    def shutdown_default_executor(self, timeout: float) -> None: ...

    def run_until_complete(self, future: None) -> None: ...

    def close(self) -> None: ...


def _moderated(call_soon: Callable[..., object], pace: Pace) -> Callable[..., None]:
    worked_until = 0.0
    pause_s = 0.0
    gathered = 0
    batches = 0

    def call_soon_threadsafe(callback: Callable[..., object], *args: Any) -> None:
        nonlocal worked_until, pause_s, gathered, batches
        if pace.in_flight >= _FEWEST and perf_counter() - worked_until > _STILL_BUSY_S:
            batches += 1
            if gathered >= 2 + pause_s / _WORTH_S:
                pause_s = min(2 * pause_s + _FIRST_S, pace.in_flight * _PAUSE_PER_CALL_S, pace.longest_s)
            elif pause_s > _FIRST_S:
                pause_s /= 2
            else:
                pause_s = 0.0 if batches % _TRY_EVERY else min(_FIRST_S, pace.longest_s)
            gathered = 0
            if pause_s:
                sleep(pause_s)
        gathered += 1
        call_soon(callback, *args)
        worked_until = perf_counter()

    return call_soon_threadsafe


class OneLoop(asyncio.DefaultEventLoopPolicy):
    """The policy that gives every filter of pyvoy's the same loop."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace
        self._loop: asyncio.AbstractEventLoop | None = None

    def new_event_loop(self) -> Any:
        if not isinstance(threading.current_thread(), threading._DummyThread):
            return super().new_event_loop()  # a thread that Python made: some handler's, not pyvoy's
        first = self._loop is None
        if self._loop is None:
            self._loop = uvloop.new_event_loop()
        return _Filter(self._loop, self._pace, first=first)

    def set_event_loop(self, loop: Any) -> None:
        if not isinstance(loop, _Filter):
            super().set_event_loop(loop)


class Ticked(Protocol):
    """What is looked at on each tick."""

    def tick(self, now: float) -> None:
        """`now` is on the clock of `time.monotonic`."""


TickedT = TypeVar("TickedT", bound=Ticked)


class Ticker(Generic[TickedT]):
    """Looks at all its members two hundred times a second, while there are any. Event loop only.

    One timer for all costs less than one for each: a call that ends in time never touches the loop's timers.
    """

    def __init__(self) -> None:
        self.members: set[TickedT] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, member: TickedT) -> None:
        self.members.add(member)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        for member in tuple(self.members):
            member.tick(now)
        self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick) if self.members else None
