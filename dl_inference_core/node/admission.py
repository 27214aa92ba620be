"""Which requests a version takes in: the limits of its queue, and the time until an answer would be there.

Threads: the queue asks under its lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field, model_validator

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest
from dl_inference_core.node.batcher import BatchCost

if TYPE_CHECKING:
    from dl_inference_core.node.queue import QueuedRequest
    from dl_inference_core.transport import Exchange

_KEPT = 0.9
"""The weight of the known mean with each new measurement: about the last ten count."""
_MARGIN = 1.1
"""Factor on the expected time of a request: an answer that comes a little late is worth nothing."""


class QueueLimits(PluginOptions):
    """How many requests may wait for a version. A request over a limit is refused with RESOURCE_EXHAUSTED at once, and
    so is a request that could not be answered before its deadline, judged by how long recent requests took: otherwise,
    under overload, the model would work for requests whose clients have given up."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    max_requests: int = Field(default=4096, ge=1)
    """largest number of requests that wait"""
    max_mb: int = Field(default=256, ge=1)
    """largest size in MiB of all requests that wait; a single request may be larger"""
    max_wait_ms: int = Field(default=0, ge=0)
    """longest expected wait in milliseconds; 0 means no limit"""
    priorities: int = Field(default=1, ge=1, le=16)
    """how many priorities there are: 1 is served first; in a full queue a request takes the place of one that would be
    served later"""
    default_priority: int | None = Field(default=None, ge=1)
    """priority of a request that names none; the last one if left out"""
    priority_metadata: str = Field(default="x-priority", pattern=r"^[a-z0-9_.-]+$")
    """the gRPC metadata that names the priority; it counts before the parameter `priority` of an Open Inference
    request"""

    @model_validator(mode="after")
    def _priorities(self) -> QueueLimits:
        if (self.default_priority or 1) > self.priorities:
            raise ValueError(f"default_priority is {self.default_priority}, and priorities {self.priorities}")
        return self

    def priority(self, exchange: Exchange, asked: int = 0) -> int:
        """The priority of `exchange`, from 0.

        Args:
            asked: what the request itself asks for, from 1; 0, or more than there are priorities, is the default, as
                in Triton.

        Raises:
            BadRequest: its metadata names a priority that does not exist.
        """
        for key, value in exchange.metadata:
            if key == self.priority_metadata:
                text = value if isinstance(value, str) else value.decode(errors="replace")
                # Python refuses to read a number of thousands of digits.
                if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= self.priorities):
                    raise BadRequest(f"metadata {key}: expected 1 to {self.priorities}; got {text[:20]!r}")
                return int(text) - 1
        return (asked if 1 <= asked <= self.priorities else self.default_priority or self.priorities) - 1

    def why_full(self, waiting: int, size: int, more: int) -> str:
        """Which limit leaves no room for a request of `more` bytes beside `waiting` others, which have `size` bytes."""
        if waiting >= self.max_requests:
            return f"{waiting} requests wait (max_requests)"
        return f"requests of {size} bytes wait, and this one has {more} (max_mb is {self.max_mb})"


class Admission:
    """What model threads work on, and whether one more request would be answered in time.

    Attributes:
        threads: how many model threads there are.
        ample_s: a request with more seconds than that to its deadline is in time, behind however many others; infinity
            where that is not known. It holds until a thread begins or ends a batch.
    """

    def __init__(self, cost: BatchCost, delay_s: Callable[[], float]) -> None:
        """Args:
        cost: what batches cost lately; written by `end`.
        delay_s: for how many seconds threads of this process lately waited for the interpreter.
        """
        self._cost = cost
        self._delay_s = delay_s
        self._max_wait_s = inf
        self._max_requests = 0
        self._max_rows = 1
        self._rows_each = 1.0  # mean rows of recent requests
        self._begun: dict[int, tuple[float, int]] = {}
        """By the number of a busy thread, when it began what it works on, by `time.monotonic`, and how many requests
        that is."""
        self.threads = 1
        # What is the same for all requests until a thread begins or ends a batch, found out for the first of them:
        self.ample_s = inf
        self._foreseen = False
        self._first_free_at = 0.0  # when the first thread should be free, where all are busy
        self._worthwhile = 1  # requests that make good use of a call
        self._batch_s = 0.0  # what these take

    def configure(self, limits: QueueLimits, max_rows: int) -> None:
        """Args:
        max_rows: the most rows that one batch may have.
        """
        self._max_wait_s = limits.max_wait_ms / 1000 or inf
        self._max_requests = limits.max_requests
        self._max_rows = max_rows

    def begin(self, thread: int, requests: int, rows: int = 0) -> None:
        """The thread of that number works on so many requests; `rows` are all their rows, 0 if that is not known."""
        if requests and rows:
            self._rows_each += (1 - _KEPT) * (max(rows / requests, 1.0) - self._rows_each)
        self._begun[thread] = time.monotonic(), requests
        self._foreseen, self.ample_s = False, inf

    def end(self, thread: int, requests: int, seconds: float) -> None:
        """The thread of that number is free again.

        Args:
            requests: how many came to the model; of 0 nothing is learned.
            seconds: how long the thread worked on these.
        """
        del self._begun[thread]
        if requests:
            self._cost.learn(requests, seconds)
        self._foreseen, self.ample_s = False, inf

    def _foresee(self, now: float) -> None:
        self._foreseen = True
        self._first_free_at = 0.0
        if len(self._begun) >= self.threads:
            self._first_free_at = min([at + self._cost.seconds(requests) for at, requests in self._begun.values()])
        self._worthwhile = max(1, min(self._cost.worthwhile, int(self._max_rows / self._rows_each)))
        self._batch_s = self._cost.seconds(self._worthwhile)
        batches = self._max_requests // self._worthwhile // self.threads
        longest_wait_s = max(self._first_free_at - now, 0.0) + self._batch_s * batches
        if longest_wait_s <= self._max_wait_s:
            self.ample_s = _MARGIN * (longest_wait_s + self._batch_s + self._delay_s())

    @property
    def busy(self) -> bool:
        """Whether a request would not be taken up at once."""
        return len(self._begun) >= self.threads or self._delay_s() > 0

    def why_late(self, request: QueuedRequest, before: int) -> str:
        """Why there is no time for `request`, which has just come, behind `before` others; "" if there is.

        Under overload a batch has as many requests as make good use of a call: those that have waited for long leave no
        time for more. While fewer wait, it has all of them.
        """
        if not self._foreseen:
            self._foresee(request.queued_at)
        came_at, free_at, batch_s, delay_s = request.queued_at, self._first_free_at, self._batch_s, self._delay_s
        wait_s = free_at - came_at if free_at > came_at else 0.0
        if before < self._worthwhile:
            fixed_s, each_s = self._cost.line
            batch_s = fixed_s + each_s * (before + 1)
        else:
            wait_s += batch_s * (before // self._worthwhile // self.threads)
        takes_s = wait_s + batch_s + delay_s()
        if came_at + _MARGIN * takes_s > request.answer_by:
            return f"to be answered would take {takes_s * 1000:.0f} ms, beyond its deadline"
        if wait_s > self._max_wait_s:
            limit_ms = self._max_wait_s * 1000
            return f"it would have to wait for {wait_s * 1000:.0f} ms (max_wait_ms is {limit_ms:.0f})"
        return ""
