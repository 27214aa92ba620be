"""The queue of one version: what waits for its model threads, by priority, and what is refused at the door.

Threads: the transport's threads `put`, model threads `take`; one lock guards the queue, and nobody calls a plugin, a
transport or an exchange while holding it.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field, model_validator

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest, DeadlineExceeded, InferenceError, Overloaded
from dl_inference_core.failures import request_id_of
from dl_inference_core.node.batcher import BatchCost, RecentConcurrency
from dl_inference_core.tensors import CallSnapshot

if TYPE_CHECKING:
    from dl_inference_core.transport import Exchange, Metadata
    from dl_inference_core.wire.protocol import Protocol

_KEPT = 0.9
"""The weight of the known mean with each new measurement: about the last ten count."""
_MARGIN = 1.1
"""Factor on the expected time of a request: an answer that comes a little late is worth nothing."""
_LONGEST_TIMER_S = 1.0
"""A timer outlives its request by no more: 5,000 requests a second with a timeout of an hour would leave 18 million."""
_LOOKED_AT = 64
"""Requests that wait for each one refused: to look at all 4,096 for those that ended took 250 µs, at 64 takes 4 µs."""


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


class QueuedRequest:
    """One exchange that waits for a model thread, or that a model thread works on. Its `tensors.Call`.

    Attributes:
        protocol: of the exchange's message.
        queued_at: when it came, by `time.monotonic`.
        asked_priority: the priority that the request asks for, from 1; 0 is the default.
        expires_at: when it has waited in the queue for too long, by `time.monotonic`.
        hold_until: when a batch must not wait for more requests any longer, by `time.monotonic`: half the time to the
            deadline or to `expires_at`.
        size: of its message, in bytes.
        taken: whether a model thread has taken it out of the queue.
        ended: whether it is answered or refused, or its client has left: nobody needs its answer any more.
    """

    __slots__ = (
        "__weakref__",
        "asked_priority",
        "ended",
        "exchange",
        "expires_at",
        "hold_until",
        "protocol",
        "queued_at",
        "size",
        "taken",
    )

    def __init__(
        self, exchange: Exchange, protocol: Protocol, *, asked_priority: int = 0, expires_at: float = math.inf
    ) -> None:
        self.exchange = exchange
        self.protocol = protocol
        self.queued_at = time.monotonic()
        self.asked_priority = asked_priority
        self.expires_at = expires_at
        self.size = len(exchange.message)
        first = expires_at if exchange.deadline is None else min(exchange.deadline, expires_at)
        self.hold_until = (self.queued_at + first) / 2
        self.taken = False
        self.ended = False

    def end(self) -> None:
        """Nobody needs the answer any more. Any thread."""
        self.ended = True

    @property
    def deadline(self) -> float | None:
        return self.exchange.deadline

    @property
    def metadata(self) -> Metadata:
        return self.exchange.metadata

    @property
    def request_id(self) -> str:
        return request_id_of(self.exchange)

    def cancelled(self) -> bool:
        deadline = self.exchange.deadline
        return self.ended or (deadline is not None and time.monotonic() >= deadline)

    def __reduce__(self) -> tuple[type[CallSnapshot], tuple[float | None, Metadata, str]]:
        """A copy of a request, here or in another process, keeps the facts of its call but not the call."""
        return CallSnapshot, (self.deadline, self.metadata, self.request_id)


class Task:
    """A function that a model thread runs between batches: a load, a rehearsal."""

    def __init__(self, run: Callable[[], None]) -> None:
        """Args:
        run: must not raise.
        """
        self.run = run


class RequestQueue:
    """What waits for the model threads of one version.

    A token for each waiting item, and for each thread that shall end, stands in a queue that threads wait at; an item
    that was taken away leaves its token behind.

    Attributes:
        threads: how many model threads take from it.
        holds: whether batches wait for more requests.
        gathering: held by the one thread that gathers a batch where batches wait for more requests: otherwise each
            thread would hold a part of them.
    """

    def __init__(
        self,
        name: str,
        cost: BatchCost,
        refuse: Callable[[QueuedRequest, InferenceError], None],
        delay_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """On the event loop that keeps the timers of requests.

        Args:
            name: "model/version", for messages.
            cost: what batches cost lately; written here, under the lock.
            refuse: ends a request that waited with an error. Called on any thread, without the lock.
            delay_s: how long, in seconds, threads of this process lately waited for the interpreter.
        """
        self._name = name
        self._cost = cost
        self._refuse = refuse
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._limits = QueueLimits()
        self._max_rows = 1
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._tasks: deque[Task] = deque()
        self._requests: list[deque[QueuedRequest]] = [deque()]
        """By priority."""
        self._bytes = 0
        self._free_at: dict[int, float] = {}
        """By the number of a busy thread, when it should have done what it works on, by `time.monotonic`."""
        self._rows_each = 1.0  # mean rows of recent requests
        self._in_hand = 0  # requests that threads work on
        self._refused = 0  # requests, since all that wait were looked at
        self._concurrency = RecentConcurrency()
        self._closed = False
        self.threads = 1
        self.holds = False
        self.gathering = threading.Lock()
        # The one thread that waits for more requests sleeps on `_alarm`, which is held except for the moment between
        # the end of that sleep and its waking.
        self._sleeps = False
        self._sleeps_until = math.inf
        self._sleeps_for = 0.0
        self._alarm = threading.Lock()
        self._alarm.acquire()

    def configure(self, limits: QueueLimits, max_rows: int = 1, *, holds: bool = False) -> None:
        """Before the first request.

        Args:
            max_rows: the most rows that one batch may have.
            holds: as the attribute.
        """
        self._limits = limits
        self._max_rows = max_rows
        self.holds = holds
        self._requests = [deque() for _ in range(limits.priorities)]

    # In

    def put_task(self, task: Task) -> None:
        """Have a thread run `task` before any request. Limits do not hold for it. Any thread."""
        with self._lock:
            self._tasks.append(task)
            self._wake()
        self._tokens.put(True)

    def put(self, request: QueuedRequest) -> bool:
        """Queue `request`. False says that the queue was closed before. Any thread.

        Raises:
            DeadlineExceeded: its deadline passed before it came.
            Overloaded: there is no room, or not enough time, for it.
            BadRequest: its metadata names a priority that does not exist.
        """
        limits = self._limits
        priority = limits.priority(request.exchange, request.asked_priority) if limits.priorities > 1 else 0
        ousted = None
        with self._lock:
            if self._closed:
                return False
            if len(self._free_at) >= self.threads or any(self._requests) or self._delay_s():
                try:
                    ousted = self._admit(request, priority)
                except Overloaded:
                    self._refused += 1
                    if self._refused * _LOOKED_AT < self.waiting() or not self._drop_ended():
                        raise
                    ousted = self._admit(request, priority)
            self._requests[priority].append(request)
            self._bytes += request.size
            if self.holds:
                self._concurrency.observe(self.waiting() + self._in_hand, request.queued_at)
            if self._sleeps and (self.waiting() >= self._sleeps_for or request.hold_until < self._sleeps_until):
                self._wake()
        self._tokens.put(True)
        if request.expires_at < math.inf:
            self._loop.call_soon_threadsafe(self._expire_in_time, weakref.ref(request))
        if ousted is not None:
            self._refuse(ousted, self._full("a request of a higher priority has taken its place"))
        return True

    def _expire_in_time(self, reference: weakref.ref[QueuedRequest]) -> None:
        request = reference()
        if request is None or request.taken or request.ended:
            return
        # Not `call_at`: uvloop's clock is not `time.monotonic`.
        left_s = request.expires_at - time.monotonic()
        if left_s > 0:
            self._loop.call_later(min(left_s, _LONGEST_TIMER_S), self._expire_in_time, reference)
            return
        waited_ms = (time.monotonic() - request.queued_at) * 1000
        # The first words are Triton's.
        late = f"Request timeout expired: the request waited {waited_ms:.0f} ms in the queue, as long as it may"
        self._refuse(request, Overloaded(late))

    # Admission

    def _drop_ended(self) -> bool:
        """Let go of the requests that nobody waits for. Returns whether there were any."""
        self._refused = 0
        before = self._bytes, self.waiting()
        self._requests = [deque(request for request in requests if not request.ended) for requests in self._requests]
        self._bytes = sum(request.size for requests in self._requests for request in requests)
        return before != (self._bytes, self.waiting())

    def _admit(self, request: QueuedRequest, priority: int) -> QueuedRequest | None:
        """Returns the request of a lower priority whose place it takes.

        Raises:
            DeadlineExceeded: the deadline passed before the request came.
            Overloaded: there is no room or time for it.
        """
        limits = self._limits
        deadline = request.exchange.deadline
        if deadline is not None and request.queued_at >= deadline:
            raise DeadlineExceeded(f"the deadline passed before the request came to the queue of model {self._name}")
        before = sum(map(len, self._requests[: priority + 1]))
        wait_s, together = self._expected_wait(before)
        takes_s = wait_s + self._cost.seconds(together) + self._delay_s()
        if deadline is not None and request.queued_at + _MARGIN * takes_s > deadline:
            raise self._full(f"to be answered would take {takes_s * 1000:.0f} ms, beyond its deadline")
        if limits.max_wait_ms and wait_s * 1000 > limits.max_wait_ms:
            raise self._full(f"it would have to wait for {wait_s * 1000:.0f} ms (max_wait_ms is {limits.max_wait_ms})")
        count = self.waiting()
        if not count or (count < limits.max_requests and self._bytes + request.size <= limits.max_mb << 20):
            return None
        for requests in self._requests[:priority:-1]:
            if requests and self._bytes - requests[-1].size + request.size <= limits.max_mb << 20:
                ousted = requests.pop()
                self._bytes -= ousted.size
                return ousted
        if count >= limits.max_requests:
            raise self._full(f"{count} requests wait (max_requests)")
        raise self._full(
            f"requests of {self._bytes} bytes wait, and this one has {request.size} (max_mb is {limits.max_mb})"
        )

    def _expected_wait(self, before: int) -> tuple[float, int]:
        """How many seconds pass until a thread takes up a request behind `before` others, and how many requests that
        batch then has: while few wait, all of them; under overload as many as make good use of a call, because requests
        that have waited for long leave no time for more."""
        worthwhile = max(1, min(self._cost.worthwhile, int(self._max_rows / self._rows_each)))
        rounds, rest = divmod(before, worthwhile)
        free_s = min(self._free_at.values()) - time.monotonic() if len(self._free_at) >= self.threads else 0.0
        wait_s = max(free_s, 0.0) + self._cost.seconds(worthwhile) * (rounds // self.threads)
        return wait_s, worthwhile if rounds else rest + 1

    def _full(self, why: str) -> Overloaded:
        return Overloaded(f"model {self._name} takes no more requests for now: {why}")

    # Out

    def take(self, *, wait: bool) -> QueuedRequest | Task | None:
        """The next item. None if there is none, and the caller does not wait for one.

        Raises:
            StopIteration: this thread shall end.
        """
        while True:
            try:
                goes_on = self._tokens.get(wait)
            except queue.Empty:
                return None
            item = self._pop()
            if item is not None:
                if not goes_on:  # who has put the item has not put its token yet
                    self._tokens.put(False)
                return item
            if not goes_on:
                raise StopIteration

    def _pop(self) -> QueuedRequest | Task | None:
        with self._lock:
            if self._tasks:
                return self._tasks.popleft()
            for requests in self._requests:
                if requests:
                    request = requests.popleft()
                    request.taken = True
                    self._bytes -= request.size
                    self._in_hand += 1
                    return request
        return None

    def wait_for_more(self, until: float, enough: int) -> bool:
        """Sleep until `until`, by `time.monotonic`, but no longer than until `enough` requests wait, or one that cannot
        be held so long, or a task. A thread that woke for each request would compete with the event loop.

        Returns whether it is worth to look for more: False if as many requests are here as lately were here at one
        time, because clients that wait for answers send no more.
        """
        left_s = until - time.monotonic()
        with self._lock:
            waiting = self.waiting()
            expected = self._concurrency.most - self._in_hand
            if not waiting and expected <= 0 and not self._tasks and not self._closed:
                return False
            if left_s <= 0 or self._tasks or self._closed or waiting >= min(enough, expected):
                return True
            if any(request.hold_until < until for requests in self._requests for request in requests):
                return True
            self._sleeps, self._sleeps_until, self._sleeps_for = True, until, min(enough, expected)
        if not self._alarm.acquire(timeout=left_s):
            with self._lock:
                if self._sleeps:
                    self._sleeps = False
                else:
                    self._alarm.acquire(blocking=False)  # woken just now
        return True

    def _wake(self) -> None:
        """With the lock."""
        if self._sleeps:
            self._sleeps = False
            self._alarm.release()

    def close(self, threads: int) -> None:
        """Take no more requests, and end `threads` threads once the queue is empty. Any thread."""
        with self._lock:
            self._closed = True
            self._wake()
        for _ in range(threads):
            self._tokens.put(False)

    # What threads work on

    def begin_batch(self, thread: int, requests: int, rows: int = 0) -> None:
        """The thread of that number works on so many requests; `rows` are all their rows, 0 if that is not known."""
        with self._lock:
            if requests and rows:
                self._rows_each += (1 - _KEPT) * (max(rows / requests, 1.0) - self._rows_each)
            self._free_at[thread] = time.monotonic() + self._cost.seconds(requests)

    def end_batch(self, thread: int, taken: int, requests: int = 0, seconds: float = 0.0) -> None:
        """The thread of that number is free again.

        Args:
            taken: how many requests it had taken.
            requests: how many of them came to the model; of 0 nothing is learned.
            seconds: how long it worked on these.
        """
        with self._lock:
            del self._free_at[thread]
            self._in_hand -= taken
            if requests:
                self._cost.learn(requests, seconds)

    def waiting(self) -> int:
        """How many requests wait. Any thread."""
        return sum(map(len, self._requests))
