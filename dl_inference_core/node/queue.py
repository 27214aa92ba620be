"""The queue of one version: what waits for its model threads, by priority, and what is refused at the door.

Threads: the transport's threads put, model threads `take`; one lock guards the queue, and nobody calls a plugin, a
transport or an exchange while holding it. A thread is woken only if it sleeps.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, TypeAlias

from dl_inference_core.errors import BadRequest, DeadlineExceeded, InferenceError, Overloaded
from dl_inference_core.failures import request_id_of
from dl_inference_core.node.admission import Admission, QueueLimits
from dl_inference_core.node.batcher import BatchCost, RecentConcurrency
from dl_inference_core.tensors import CallSnapshot
from dl_inference_core.wire.protocol import NO_QUEUEING, Protocol, Queueing

if TYPE_CHECKING:
    from dl_inference_core.transport import Exchange, Metadata

_LONGEST_TIMER_S = 1.0
"""A timer outlives its request by no more: 5,000 requests a second with a timeout of an hour would leave 18 million."""
_LOOKED_AT = 64
"""Requests that wait for each one without room: to find those that ended takes 4 µs among 64, 250 µs among 4,096."""


class QueuedRequest:
    """One exchange that waits for a model thread, or that a model thread works on. Its `tensors.Call`.

    Attributes:
        message: the exchange's, and `protocol` that of the message.
        shares_batches: whether it can share a call of the model. MultiInference cannot: it has one for each signature.
        queued_at: when it came, by `time.monotonic`.
        answer_by: the exchange's deadline, by `time.monotonic`; infinity if it has none.
        asked_priority: the priority that the request asks for, from 1; 0 is the default.
        priority: its place among the queue's priorities, from 0; set by `RequestQueue.put_all`.
        expires_at: when it has waited in the queue for too long, by `time.monotonic`.
        size: of the message, in bytes.
        taken: whether a model thread has taken it out of the queue.
        ended: whether it is answered or refused, or its client has left: nobody needs its answer any more.
    """

    __slots__ = (
        "__weakref__",
        "answer_by",
        "asked_priority",
        "ended",
        "exchange",
        "expires_at",
        "message",
        "priority",
        "protocol",
        "queued_at",
        "shares_batches",
        "size",
        "taken",
    )

    def __init__(self, exchange: Exchange, protocol: Protocol, queued_at: float, asked: Queueing = NO_QUEUEING) -> None:
        self.exchange = exchange
        self.protocol = protocol
        self.message = message = exchange.message
        self.shares_batches = not protocol.several
        self.queued_at = queued_at
        deadline = exchange.deadline
        self.answer_by = inf if deadline is None else deadline
        self.asked_priority = asked.priority
        self.priority = 0
        self.expires_at = queued_at + asked.timeout_s if asked.timeout_s else inf
        self.size = len(message)
        self.taken = False
        self.ended = False

    def end(self) -> None:
        """Nobody needs the answer any more. Any thread."""
        self.ended = True

    @property
    def hold_until(self) -> float:
        """When a batch must not wait for others any longer: half the time to `answer_by`, or to `expires_at`."""
        return (self.queued_at + min(self.answer_by, self.expires_at)) / 2

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
        return self.ended or time.monotonic() >= self.answer_by

    def __reduce__(self) -> tuple[type[CallSnapshot], tuple[float | None, Metadata, str]]:
        """A copy of a request, here or in another process, keeps the facts of its call but not the call."""
        return CallSnapshot, (self.deadline, self.metadata, self.request_id)


@dataclass(frozen=True, slots=True)
class Task:
    """A function that a model thread runs between batches: a load, a rehearsal. It must not raise."""

    run: Callable[[], None]


_Refused: TypeAlias = "tuple[QueuedRequest, InferenceError]"


class RequestQueue:
    """What waits for the model threads of one version.

    Attributes:
        holds: whether batches wait for more requests.
        gathering: whether a thread gathers a batch, where batches wait for more requests. Then no other thread begins
            one: each would hold a part of the requests.
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
            cost: what batches cost lately; written under the lock.
            refuse: ends a request that waited with an error. Called on any thread, without the lock.
            delay_s: how long, in seconds, threads of this process lately waited for the interpreter.
        """
        self._name = name
        self._refuse = refuse
        self._loop = asyncio.get_running_loop()
        self._admission = Admission(cost, delay_s)
        self._lock = threading.Lock()
        self._tasks: deque[Task] = deque()
        self._waiting = 0  # requests, and
        self._bytes = 0  # their size
        self._sleeping: deque[threading.Lock] = deque()
        """What threads without work sleep on: to release one wakes its thread, and takes less than a condition does."""
        self._idle = 0  # threads without work: those that sleep, and those that were woken and do not run yet
        self._in_hand = 0  # requests that threads work on and did not release
        self._overflows = 0  # requests without room or time, since all that wait were looked at
        self._concurrency = RecentConcurrency()
        self._closed = False
        self.gathering = False
        self._enough_came = threading.Condition(self._lock)
        """Where the thread sleeps that holds its batch, until so many requests wait or one must not be held so long."""
        self._sleeps_for = inf
        self._sleeps_until = -inf
        self.configure(QueueLimits())

    def configure(self, limits: QueueLimits, max_rows: int = 1, *, holds: bool = False) -> None:
        """Before the first request.

        Args:
            max_rows: the most rows that one batch may have.
            holds: as the attribute.
        """
        # To read an attribute of a pydantic model takes longer, and these are read for each request.
        self._limits = limits
        self._max_requests = limits.max_requests
        self._max_bytes = limits.max_mb << 20
        self._lowest = limits.priorities - 1
        self._admission.configure(limits, max_rows)
        self.holds = holds
        self._requests: list[deque[QueuedRequest]] = [deque() for _ in range(limits.priorities)]
        """By priority."""

    # In

    def put_task(self, task: Task) -> None:
        """Have a thread run `task` before any request. Limits do not hold for it. Any thread."""
        with self._lock:
            self._tasks.append(task)
            if self._idle:
                self._wake()
            else:
                self._enough_came.notify()

    def put_all(self, requests: Sequence[QueuedRequest]) -> bool:
        """Queue `requests`. Any thread.

        Returns False if the queue was closed before: then it has taken and refused none. It refuses a request with:

        - DeadlineExceeded: the deadline passed before the request came.
        - Overloaded: there is no room, or not enough time, for it.
        - BadRequest: its metadata names a priority that does not exist.
        """
        refused: list[_Refused] = []
        timed: list[QueuedRequest] = []
        if self._lowest:
            requests = [request for request in requests if self._set_priority(request, refused)]
        with self._lock:
            if self._closed:
                for request in requests:  # another version may have other priorities
                    request.priority = 0
                return False
            admission = self._admission
            for request in requests:
                ample = request.answer_by - request.queued_at > admission.ample_s
                has_room = self._waiting < self._max_requests and self._bytes + request.size <= self._max_bytes
                if not (ample and has_room) and (self._waiting or admission.busy) and not self._admit(request, refused):
                    continue
                self._requests[request.priority].append(request)
                self._waiting += 1
                self._bytes += request.size
                if self.holds:
                    self._concurrency.observe(self._waiting + self._in_hand, request.queued_at)
                if self.gathering or self._sleeping:
                    self._wake_for(request)
                if request.expires_at < inf:
                    timed.append(request)
        for request in timed:
            self._loop.call_soon_threadsafe(self._expire_in_time, weakref.ref(request))
        for request, error in refused:
            self._refuse(request, error)
        return True

    def _set_priority(self, request: QueuedRequest, refused: list[_Refused]) -> bool:
        try:
            request.priority = self._limits.priority(request.exchange, request.asked_priority)
        except BadRequest as error:
            refused.append((request, error.with_traceback(None)))  # it would lead to `refused`
            return False
        return True

    def _wake_for(self, request: QueuedRequest) -> None:
        """Wake the thread that can do something about `request`, which has come. With the lock."""
        shares = request.shares_batches
        if self.gathering and (shares or not self._idle):
            if not shares or self._waiting >= self._sleeps_for or request.hold_until < self._sleeps_until:
                self._enough_came.notify()
        else:
            self._wake()

    def _wake(self) -> None:
        """Wake a thread that sleeps without work, if there is one. With the lock."""
        if self._sleeping:
            self._sleeping.popleft().release()

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

    def _admit(self, request: QueuedRequest, refused: list[_Refused]) -> bool:
        """Whether there is room and time for `request`. Adds to `refused` what is refused: `request` itself, or one of
        a lower priority, whose place it takes. With the lock."""
        fits = self._bytes + request.size <= self._max_bytes or not self._waiting
        has_room = fits and self._waiting < self._max_requests
        left_s = request.answer_by - request.queued_at
        if has_room and left_s > self._admission.ample_s:
            return True
        if left_s <= 0:
            late = f"the deadline passed before the request came to the queue of model {self._name}"
            refused.append((request, DeadlineExceeded(late)))
            return False
        before = self._waiting
        if request.priority < self._lowest:
            before = sum(map(len, self._requests[: request.priority + 1]))
        why = self._admission.why_late(request, before)
        if has_room and not why:
            return True
        if self._drop_ended():
            return self._admit(request, refused)
        ousted = None if why else self._oust(request)
        if ousted is not None:
            refused.append((ousted, self._full("a request of a higher priority has taken its place")))
            return True
        why = why or self._limits.why_full(self._waiting, self._bytes, request.size)
        refused.append((request, self._full(why)))
        return False

    def _drop_ended(self) -> bool:
        """Let go of the requests that nobody waits for, unless all were looked at a moment ago. Returns whether there
        were any."""
        self._overflows += 1
        if self._overflows * _LOOKED_AT < self._waiting:
            return False
        self._overflows, before = 0, self._waiting
        self._requests = [deque(request for request in requests if not request.ended) for requests in self._requests]
        self._waiting = sum(map(len, self._requests))
        self._bytes = sum(request.size for requests in self._requests for request in requests)
        return self._waiting < before

    def _oust(self, request: QueuedRequest) -> QueuedRequest | None:
        """The request that would be served last, if `request` is served before it and finds room in its place."""
        for requests in self._requests[: request.priority : -1]:
            if requests and self._bytes - requests[-1].size + request.size <= self._max_bytes:
                ousted = requests.pop()
                self._waiting -= 1
                self._bytes -= ousted.size
                return ousted
        return None

    def _full(self, why: str) -> Overloaded:
        return Overloaded(f"model {self._name} takes no more requests for now: {why}")

    # Out

    def take(self, thread: int) -> QueuedRequest | Task:
        """The next item, on which the thread of that number works from now on. Sleeps until there is one.

        Raises:
            StopIteration: this thread shall end.
        """
        slept = False
        while True:
            with self._lock:
                self._idle -= slept
                if (item := self._pop()) is not None:
                    self._admission.begin(thread, 1)
                    return item
                if self._closed:
                    raise StopIteration
                woken = threading.Lock()
                woken.acquire()
                self._sleeping.append(woken)
                self._idle += 1
            slept = woken.acquire()

    def _pop(self) -> QueuedRequest | Task | None:
        if self._tasks:
            return self._tasks.popleft()
        requests = self._first()
        if not requests:
            return None
        if requests[0].shares_batches:
            if self.gathering:
                return None
            self.gathering = self.holds
        request = requests.popleft()
        self._hand_over([request])
        return request

    def take_more(self, most: int) -> list[QueuedRequest]:
        """Up to `most` requests for a batch that has begun. A request that shares no batch stays for the next thread,
        and those that would be served after it stay behind it."""
        taken: list[QueuedRequest] = []
        if not self._waiting:
            return taken
        with self._lock:
            while len(taken) < most and not self._awaits_thread() and (requests := self._first()):
                for _ in range(min(most - len(taken), len(requests))):
                    if not requests[0].shares_batches:
                        break
                    taken.append(requests.popleft())
            self._hand_over(taken)
        return taken

    def put_back(self, requests: Sequence[QueuedRequest]) -> None:
        """Have `requests`, which were taken and not begun, wait again in their places. Any thread."""
        with self._lock:
            self._hand_over(requests, -1)
            for request in reversed(requests):
                self._requests[request.priority].appendleft(request)
                self._wake_for(request)
        for request in requests:
            if request.expires_at < inf:  # its timer may have found it taken
                self._loop.call_soon_threadsafe(self._expire_in_time, weakref.ref(request))

    def _first(self) -> deque[QueuedRequest]:
        """The requests that are served first; empty if none wait. With the lock."""
        for requests in self._requests:
            if requests:
                return requests
        return self._requests[0]

    def _hand_over(self, requests: Sequence[QueuedRequest], sign: int = 1) -> None:
        """A thread takes `requests`; with `sign` -1 it gives them back. With the lock."""
        size = 0
        for request in requests:
            request.taken = sign > 0
            size += request.size
        self._bytes -= sign * size
        self._waiting -= sign * len(requests)
        self._in_hand += sign * len(requests)

    def _awaits_thread(self) -> bool:
        """Whether a task waits for which no thread is free, or the first request shares no batch. With the lock."""
        requests = self._first()
        return len(self._tasks) > self._idle or (bool(requests) and not requests[0].shares_batches)

    def wait_for_more(self, until: float, enough: int) -> bool:
        """Sleep until `until`, by `time.monotonic`, but no longer than until `enough` requests wait, or one that cannot
        be held so long, or what shares no batch. A thread that woke for each request would compete with the event loop.

        Returns whether it is worth to look for more: False if as many requests are here as lately were here at one
        time, because clients that wait for answers send no more; and if the thread has something else to do.
        """
        left_s = until - time.monotonic()
        with self._lock:
            if self._awaits_thread() or (self._closed and not self._waiting):
                return False
            expected = self._concurrency.most - self._in_hand
            if not self._waiting and expected <= 0:
                return False
            if left_s <= 0 or self._waiting >= min(enough, expected):
                return True
            if any(request.hold_until < until for requests in self._requests for request in requests):
                return True
            self._sleeps_until, self._sleeps_for = until, min(enough, expected)
            self._enough_came.wait(left_s)
            self._sleeps_until, self._sleeps_for = -inf, inf
        return True

    def stop_gathering(self) -> None:
        """The thread that gathered a batch gathers no longer. Any thread."""
        with self._lock:
            self.gathering = False
            if self._waiting:
                self._wake()

    def close(self) -> None:
        """Take no more requests, and end the threads once the queue is empty. Any thread."""
        with self._lock:
            self._closed = True
            while self._sleeping:
                self._wake()
            self._enough_came.notify()

    # What threads work on

    def begin_batch(self, thread: int, requests: int, rows: int) -> None:
        """As `Admission.begin`."""
        with self._lock:
            self._admission.begin(thread, requests, rows)

    def release(self, requests: int) -> None:
        """A thread is about to answer so many of the requests that it has taken: they do not count any longer among
        those that are here at one time."""
        with self._lock:
            self._in_hand -= requests

    def end_batch(self, thread: int, taken: int, requests: int = 0, seconds: float = 0.0) -> None:
        """As `Admission.end`.

        Args:
            taken: how many requests the thread had taken and did not release.
        """
        with self._lock:
            self._in_hand -= taken
            self._admission.end(thread, requests, seconds)

    def set_threads(self, threads: int) -> None:
        """So many model threads take from it."""
        self._admission.threads = threads

    def waiting(self) -> int:
        """How many requests wait. Any thread."""
        return self._waiting
