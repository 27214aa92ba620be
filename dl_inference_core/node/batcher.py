"""Which requests one call of the model takes together, and how long a batch is held for more of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, TypeAlias

from dl_inference_core.node.batching import Batching, Part

if TYPE_CHECKING:
    from dl_inference_core.node.model_threads import ModelThread
    from dl_inference_core.node.queue import QueuedRequest

_KEPT = 0.9
"""The weight of the known sums with each new batch: about the last ten count."""
_OVERHEAD = 0.125
"""A batch is large enough when its fixed cost is an eighth of the cost of its requests: more requests save less."""
_UNBOUNDED = 1 << 20
"""The worthwhile number of requests where a request costs next to nothing beside the call."""
_LEAST_VARIANCE = 1e-3
"""Of the numbers of requests, over the mean of their squares: with less, a slope would be noise."""
_AT_ONCE = 16
"""Requests that a thread takes at once: one alone costs 1.2 µs, of 16 each 0.2 µs."""
_WINDOW_S = 1.0
"""Concurrency is remembered for one to two windows: longer than the pauses of a steady client, shorter than a lull."""


_Fit: TypeAlias = "tuple[tuple[float, float, float, float, float], tuple[float, float], int]"


class BatchCost:
    """What a batch of n requests costs in seconds: a + b·n, fitted by exponentially weighted least squares. While all
    batches had the same size, any size is expected to cost the same: then larger batches are tried, which tell b.

    The fit is worked out when it is asked for: batches of one request end more often than anybody asks.
    """

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._fit: _Fit = self._sums, (0.0, 0.0), 1
        """Of the sums that are its first item."""

    def learn(self, requests: int, seconds: float) -> None:
        """A batch of `requests` took `seconds`. One thread at a time."""
        weight, n, s, nn, ns = self._sums
        self._sums = (
            _KEPT * weight + 1,
            _KEPT * n + requests,
            _KEPT * s + seconds,
            _KEPT * nn + requests * requests,
            _KEPT * ns + requests * seconds,
        )

    def _fitted(self) -> _Fit:
        fit, sums = self._fit, self._sums
        if fit[0] is sums:
            return fit
        weight, n, s, nn, ns = sums
        mean, mean_s, square, product = n / weight, s / weight, nn / weight, ns / weight
        variance = square - mean * mean
        slope = (product - mean * mean_s) / variance if variance > _LEAST_VARIANCE * square else 0.0
        slope = min(max(slope, 0.0), mean_s / mean)
        fixed = mean_s - slope * mean
        many = slope <= _OVERHEAD * fixed / _UNBOUNDED
        worthwhile = _UNBOUNDED if many else max(1, math.ceil(fixed / (_OVERHEAD * slope)))
        self._fit = fit = sums, (fixed, slope), worthwhile
        return fit

    @property
    def line(self) -> tuple[float, float]:
        """a and b. Any thread."""
        return self._fitted()[1]

    @property
    def worthwhile(self) -> int:
        """The number of requests from which on a larger batch saves hardly any time per request. Any thread."""
        return self._fitted()[2]

    def seconds(self, requests: float) -> float:
        """The expected cost; 0 before anything is known. Any thread."""
        fixed, each = self.line
        return fixed + each * requests

    def requests_within(self, seconds: float) -> float:
        """How many requests a batch has at most that takes so many seconds. Any thread."""
        fixed, each = self.line
        if each:
            return (seconds - fixed) // each
        return inf if fixed <= seconds else 0.0


class RecentConcurrency:
    """The largest number of requests that were here at one time during the last one to two seconds in which any came.
    Infinity before anything is known."""

    def __init__(self) -> None:
        self._before = inf
        self._now = 0.0
        self._window_ends = 0.0

    def observe(self, count: int, now: float) -> None:
        """`count` requests are here at `now`, by `time.monotonic`."""
        if now >= self._window_ends:
            if self._window_ends:
                self._before, self._now = self._now, 0.0
            self._window_ends = now + _WINDOW_S
        self._now = max(self._now, count)

    @property
    def most(self) -> float:
        return max(self._before, self._now)


class Batcher:
    """Gathers the requests that one call of the model takes. Model threads, several at the same time."""

    def __init__(self, batching: Batching, cost: BatchCost, *, at_once: bool) -> None:
        """Args:
        cost: what batches cost lately.
        at_once: whether to take several requests out of the queue at once. Not where a request may take long before the
            model: another thread that becomes free meanwhile could begin the others.
        """
        self.batching = batching
        self._cost = cost
        self._at_once = _AT_ONCE if at_once else 1

    def gather(
        self, first: QueuedRequest, thread: ModelThread, prepare: Callable[[QueuedRequest, float], Part | None]
    ) -> list[Part]:
        """What `first`, and the requests that `thread` then takes until the batch is complete, bring to the model.

        Args:
            prepare: what a request brings, at a time by `time.monotonic`; None if it is answered already.
        """
        max_rows, holds, cost = self.batching.max_rows, self.batching.delay_s > 0, self._cost
        if self._at_once > 1 and not holds and not thread.others_wait():
            part = prepare(first, time.monotonic())
            return [] if part is None else [part]
        parts: list[Part] = []
        rows = answered = 0  # rows of all parts; requests that did not need the model
        hold_until = first.queued_at + self.batching.delay_s
        soonest = most = inf  # the first deadline that can be met, and how many requests the model answers by then
        taken: Sequence[QueuedRequest] = (first,)
        now = time.monotonic()
        while True:
            for number, request in enumerate(taken, 1):
                part = prepare(request, now)
                if self._at_once == 1:
                    now = time.monotonic()  # it may have taken long
                alone = False
                if part is None:
                    answered += 1
                else:
                    parts.append(part)
                    rows += part.rows
                    alone = not part.rows
                    deadline = request.answer_by
                    if (holds or deadline < soonest) and now + cost.seconds(1) <= deadline:
                        if holds:
                            hold_until = min(hold_until, request.hold_until)
                        if deadline < soonest:
                            soonest, most = deadline, cost.requests_within(deadline - now)
                if alone or rows + answered >= max_rows or len(parts) >= most:
                    thread.put_back(taken[number:])
                    return parts
            now = time.monotonic()
            if soonest < inf and len(parts) >= (most := cost.requests_within(soonest - now)):
                return parts
            taken = thread.take(min(self._at_once, max_rows - rows - answered))
            if not taken and not (holds and self._wait_for_more(thread, parts, rows, hold_until)):
                return parts

    def _wait_for_more(self, thread: ModelThread, parts: Sequence[Part], rows: int, until: float) -> bool:
        """Returns whether to look for another request: False if the batch is not held any longer."""
        if rows in self.batching.preferred:
            return False
        missing = self.batching.next_size(rows) - rows
        rows_each = max(rows / len(parts), 1.0) if parts else 1.0
        return thread.wait_for_more(until, math.ceil(missing / rows_each))
