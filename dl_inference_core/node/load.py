"""How much of what it can do a node does, and the ORCA reports that tell its clients.

Utilization is the part of their time that the threads of the busiest version work. Unlike the processor's it tells of
models, too, that wait for an accelerator or the network. Requests per second over utilization, the weight that gRFC A58
gives a node, are then what it could answer.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dl_inference_core.cpus import available_cpus
from dl_inference_core.errors import Blame, InferenceError
from dl_inference_core.transport import Trailers
from dl_inference_core.wire import orca

_WINDOW_S = 2.0
_FRESH_S = 0.1
_DELAY_PERIOD_S = 0.1
_DELAY_WEIGHT = 0.2
"""Of each new measurement: the last half second counts most."""
_NORMAL_DELAY_S = 0.02
"""Four of CPython's switch intervals: a mean above that is the work of code that holds the GIL."""
_ERRORS = frozenset({Blame.NODE, Blame.NODE_SOFTLY, Blame.SERVER})


class Work:
    """What the threads of one version do."""

    def __init__(self, worked: Callable[[], float], threads: int) -> None:
        self.threads = threads
        self._worked = worked
        self._before = worked()

    def seconds(self) -> float:
        """For how long all threads together have worked since this was made."""
        return self._worked() - self._before


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    answered: int
    failed: int
    cpu: float
    work: Mapping[Work, float]


class LoadMeter:
    """The load of one process over the last two seconds. Any thread, but for `start` and `stop`."""

    def __init__(self, reports_per_s: int = 0) -> None:
        """Args:
        reports_per_s: how many answers a second carry a report; 0 is none.
        """
        self._pause = 1 / reports_per_s if reports_per_s else math.inf
        self._report_at = time.monotonic() + _FRESH_S if reports_per_s else math.inf
        self._answered = 0
        self._failed = 0
        self._work: set[Work] = set()
        self._cpus = available_cpus()
        self._samples = deque([self._sample()])
        self._trailers: tuple[tuple[str, bytes], ...] = ()
        self._lock = threading.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._delay_s = 0.0

    def start(self) -> None:
        """Measure from now on how late timers of the event loop are, until `stop`. On the event loop."""
        self._due = time.monotonic() + _DELAY_PERIOD_S
        self._timer = asyncio.get_running_loop().call_later(_DELAY_PERIOD_S, self._measure_delay)

    def stop(self) -> None:
        """Measure it no more. On the event loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _measure_delay(self) -> None:
        late_s = max(time.monotonic() - self._due, 0.0)
        self._delay_s += _DELAY_WEIGHT * (late_s - self._delay_s)
        self.start()

    def delay_s(self) -> float:
        """For how many seconds threads of this process lately waited for the interpreter, measured by how late timers
        of the event loop were. It is long where a handler holds the GIL. It is 0 where it is as short as on any busy
        machine."""
        return self._delay_s if self._delay_s > _NORMAL_DELAY_S else 0.0

    def watch(self, worked: Callable[[], float], threads: int) -> Work:
        """Take a version into account from now on, until `forget`. Any thread.

        Args:
            worked: for how many seconds all its threads together have worked; called on any thread.
            threads: how many it has.
        """
        work = Work(worked, threads)
        self._work.add(work)
        return work

    def forget(self, work: Work) -> None:
        """A version will not work any more. Any thread."""
        self._work.discard(work)

    def answered(self, error: InferenceError | None = None, *, count: int = 1) -> Trailers:
        """`count` requests were answered, or failed with `error`; returns the trailers to go with one of them: a
        report, if it is time for one.

        Failures that are not the node's own do not count: they take next to no time, and would be taken for speed.
        """
        failed = error is not None and error.blame in _ERRORS
        with self._lock:
            if error is None or failed:
                self._answered += count
                self._failed += failed * count
            now = time.monotonic()
            if now < self._report_at:
                return ()
            self._report_at = now + self._pause
            if now - self._samples[-1].at >= _FRESH_S:
                self._trailers = orca.trailers(self._report())
            return self._trailers

    def _report(self) -> bytes:
        now = self._sample()
        while len(self._samples) > 1 and self._samples[0].at < now.at - _WINDOW_S:
            self._samples.popleft()
        since = self._samples[0]
        self._samples.append(now)
        seconds = now.at - since.at
        return orca.encode(
            orca.Load(
                utilization=max(
                    ((done - since.work.get(work, 0.0)) / (seconds * work.threads) for work, done in now.work.items()),
                    default=0.0,
                ),
                qps=(now.answered - since.answered) / seconds,
                eps=(now.failed - since.failed) / seconds,
            ),
            cpu=(now.cpu - since.cpu) / (seconds * self._cpus),
        )

    def _sample(self) -> _Sample:
        work = {each: each.seconds() for each in tuple(self._work)}
        return _Sample(time.monotonic(), self._answered, self._failed, time.process_time(), work)
