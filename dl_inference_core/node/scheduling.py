"""What waits for the threads of one version: first come, first served within a priority; what would wait for too long
is refused at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, model_validator

from dl_inference_core import children
from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import (
    BadRequest,
    DeadlineExceeded,
    HandlerFailed,
    InferenceError,
    Overloaded,
    text_of,
)
from dl_inference_core.transport import Exchange

T = TypeVar("T")

_log = logging.getLogger(__name__)

_KEPT = 0.9
"""Of what was known, with each new measurement."""
_MARGIN = 1.1
"""Of the time that a request is expected to take: an answer that comes a little too late was worth nothing."""
_REST_S = 0.005
"""After which a thread that waits for company looks at what has come: some of it may need no model."""
_OVERHEAD = 0.125
"""What a call may take besides its requests, over what these take, for more of them not to be worth it."""
_MANY = 1 << 20
_CROWD_S = 1.0
_LEAST_VARIANCE = 1e-3
"""Of the numbers of requests, over the mean of their squares, for a slope to be known."""


class QueueLimits(PluginOptions):
    """How many requests may wait for a version. What is over that is refused with RESOURCE_EXHAUSTED at once, and so is
    a request that could not be answered before its deadline, by how long recent ones took: else, under too much load,
    all the work would be done for requests that have given up."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    max_requests: int = Field(default=4096, ge=1)
    """how many"""
    max_mb: int = Field(default=256, ge=1)
    """how many MiB they may have together; one alone may have more"""
    max_wait_ms: int = Field(default=0, ge=0)
    """how long one may be expected to wait; 0 means no limit"""
    priorities: int = Field(default=1, ge=1, le=16)
    """how many priorities there are: 1 is served first; in a full queue a request takes the place of one that would be
    served later"""
    default_priority: int | None = Field(default=None, ge=1)
    """of a request that names none; the last one if left out"""
    priority_metadata: str = Field(default="x-priority", pattern=r"^[a-z0-9_.-]+$")
    """the gRPC metadata that names it; it counts before the parameter `priority` of an Open Inference request"""

    @model_validator(mode="after")
    def _priorities(self) -> QueueLimits:
        if (self.default_priority or 1) > self.priorities:
            raise ValueError(f"default_priority is {self.default_priority}, and priorities {self.priorities}")
        return self

    def priority(self, exchange: Exchange, asked: int = 0) -> int:
        """The priority of `call`, from 0.

        Args:
            asked: what the request itself asks for, from 1; 0, or more than there are priorities, is the default one,
                as in Triton.

        Raises:
            BadRequest: its metadata names none that there is.
        """
        for key, value in exchange.metadata:
            if key == self.priority_metadata:
                text = value if isinstance(value, str) else value.decode(errors="replace")
                if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= self.priorities:
                    raise BadRequest(f"metadata {key}: expected 1 to {self.priorities}; got {text[:20]!r}")
                return int(text) - 1
        return (asked if 1 <= asked <= self.priorities else self.default_priority or self.priorities) - 1


class Job(ABC):
    """Something to be done on one of a version's threads, and the future of who waits for it.

    Attributes:
        since: when it came, by `time.monotonic`.
    """

    __slots__ = ("future", "since")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self.future = future
        self.since = time.monotonic()

    @abstractmethod
    def run(self, worker: Worker) -> int:
        """Do it and settle the future; it may have `worker` take others, and do them too. Returns how many requests
        came as far as the model: to refuse one takes no time that tells of the next."""


class _FunctionJob(Job):
    __slots__ = ("_function",)

    def __init__(self, function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        super().__init__(future)
        self._function = function

    def run(self, worker: Worker) -> int:
        if self.future.cancelled():
            return 0
        outbox = Outbox()
        try:
            outbox.put(self.future, self._function())
        except BaseException as error:
            outbox.put(self.future, None, as_failure(error))
        outbox.send()
        return 0


class CallJob(Job):
    """A call's request to be answered.

    Attributes:
        priority: what the request asks for, from 1; 0 is the default.
        expires: when it has waited for too long in the queue, by `time.monotonic`.
        taken: whether a thread has taken it out of the queue.
        size: of its message, in bytes.
        held_until: when it is to be worked on, by `time.monotonic`, whoever may come: half the time to its deadline, or
            to `expires`.
    """

    __slots__ = ("exchange", "expires", "held_until", "priority", "size", "taken")

    def __init__(
        self, exchange: Exchange, future: asyncio.Future[Any], *, priority: int = 0, expires: float = math.inf
    ) -> None:
        super().__init__(future)
        self.exchange = exchange
        self.priority = priority
        self.expires = expires
        self.taken = False
        self.size = len(exchange.message)
        first = expires if exchange.deadline is None else min(exchange.deadline, expires)
        self.held_until = (self.since + first) / 2

    def expire(self) -> None:
        """Refuse the request if it still waits. Event loop only."""
        if not self.taken and not self.future.done():
            waited_ms = (time.monotonic() - self.since) * 1000
            # The first words are Triton's.
            late = f"Request timeout expired: the request waited {waited_ms:.0f} ms in the queue, as long as it may"
            self.future.set_exception(Overloaded(late))


class Outbox:
    """What has become of jobs of one event loop, until it is sent to those who wait. One thread's."""

    def __init__(self) -> None:
        self._settled: list[tuple[asyncio.Future[Any], Any, InferenceError | None]] = []

    def put(self, future: asyncio.Future[Any], result: Any, error: InferenceError | None = None) -> None:
        self._settled.append((future, result, error))

    def send(self) -> None:
        """Settle the futures, in one go; those that are done stay."""
        settled, self._settled = self._settled, []

        def settle() -> None:
            for future, result, error in settled:
                if future.done():
                    continue
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        if settled:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                settled[0][0].get_loop().call_soon_threadsafe(settle)


def as_failure(error: BaseException, what: str = "") -> InferenceError:
    """`error` as the client sees it: its own words where they are ours, even a handler's SystemExit else."""
    children.end_child(error)
    if isinstance(error, InferenceError):
        return error
    failure = HandlerFailed(f"{what}{in_short(error)}")
    failure.__cause__ = error
    return failure


def in_short(error: BaseException) -> str:
    """The type and the first line of `error`, for a status message."""
    text = text_of(error).strip().partition("\n")[0]
    if len(text) > 200:
        text = f"{text[:199]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Effort:
    """How long a thread works on so many requests at once: `a + b * requests`, fitted to what it took by least squares
    with weights that fade. As long as all were equally many it is taken to be the same for any number: that lets more
    come at once, by which the rest is learned. One thread at a time writes."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5
        self._line = (0.0, 0.0)
        self.worthwhile = 1
        """How many are worth to be taken at once: of more, each takes hardly less time."""

    def learn(self, requests: int, seconds: float) -> None:
        new = (1, requests, seconds, requests * requests, requests * seconds)
        self._sums = [_KEPT * old + each for old, each in zip(self._sums, new, strict=True)]
        weight, *sums = self._sums
        mean, mean_s, square, product = (each / weight for each in sums)
        variance = square - mean * mean
        slope = (product - mean * mean_s) / variance if variance > _LEAST_VARIANCE * square else 0.0
        slope = min(max(slope, 0.0), mean_s / mean)
        fixed = mean_s - slope * mean
        self._line = fixed, slope
        self.worthwhile = max(1, math.ceil(fixed / (_OVERHEAD * slope))) if slope > _OVERHEAD * fixed / _MANY else _MANY

    def seconds(self, requests: float) -> float:
        """0 as long as nothing is known. Any thread."""
        fixed, each = self._line
        return fixed + each * requests


class _Crowd:
    """How many calls were here at once, within the last second or two in which any came. Nobody knows at first."""

    def __init__(self) -> None:
        self._before = math.inf
        self._now = 0.0
        self._turns = 0.0

    def seen(self, count: int, now: float) -> None:
        """So many are here."""
        if now >= self._turns:
            if self._turns:
                self._before, self._now = self._now, 0.0
            self._turns = now + _CROWD_S
        self._now = max(self._now, count)

    @property
    def most(self) -> float:
        return max(self._before, self._now)


class _Queue:
    """Jobs that wait. A token for each, and for each thread that shall end, stands in a queue that threads can wait at;
    a job that was taken away leaves its token behind."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._limits = QueueLimits()
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._own: deque[Job] = deque()
        """What is no request: no limit holds for it."""
        self._calls: list[deque[CallJob]] = [deque()]
        """By priority."""
        self._bytes = 0
        self._free_at: dict[int, float] = {}
        """By number of a worker that is busy, when it should have done what it has in hand, by `time.monotonic`."""
        self._ending = False
        self.threads = 1
        self.at_once = 1
        """How many rows a thread takes at once at most."""
        self._rows_each = 1.0
        """How many a request had lately."""
        self.effort = Effort()
        self.holds = False
        """Whether threads wait for company, of which one at a time gathers: else each would hold a part of it."""
        self.gathering = threading.Lock()
        self._taken = 0
        """Calls that workers have in hand."""
        self._crowd = _Crowd()
        self._rests = False
        self._until = math.inf
        self._enough = 0.0
        self._alarm = threading.Lock()
        """Held, but for the moment between the end of a rest and who rested."""
        self._alarm.acquire()

    def configure(self, limits: QueueLimits, at_once: int, *, holds: bool) -> None:
        """Before the first request."""
        self._limits = limits
        self.at_once = at_once
        self.holds = holds
        self._calls = [deque() for _ in range(limits.priorities)]

    def put(self, job: Job) -> None:
        with self._lock:
            self._own.append(job)
            self._wake()
        self._tokens.put(True)

    def put_call(self, job: CallJob) -> None:
        """Raises:
        DeadlineExceeded: its deadline passed before it came.
        Overloaded: there is no room for it.
        BadRequest: it names a priority that is none.
        """
        limits = self._limits
        priority = limits.priority(job.exchange, job.priority) if limits.priorities > 1 else 0
        ousted = None
        with self._lock:
            if len(self._free_at) >= self.threads or any(self._calls):
                try:
                    ousted = self._make_room(job, priority)
                except Overloaded:
                    if not self._drop_cancelled():
                        raise
                    ousted = self._make_room(job, priority)
            self._calls[priority].append(job)
            self._bytes += job.size
            if self.holds:
                self._crowd.seen(self.waiting() + self._taken, job.since)
            if self._rests and (self.waiting() >= self._enough or job.held_until < self._until):
                self._wake()
        self._tokens.put(True)
        if job.expires < math.inf:
            # Not `call_at`: uvloop's clock is not `time.monotonic`.
            timer = job.future.get_loop().call_later(job.expires - time.monotonic(), job.expire)
            job.future.add_done_callback(lambda _: timer.cancel())
        if ousted is not None and not ousted.future.done():
            ousted.future.set_exception(self._full("a request of a higher priority has taken its place"))

    def _drop_cancelled(self) -> bool:
        """Let go of those that nobody waits for. Returns whether there were any; event loop only."""
        before = self._bytes, self.waiting()
        self._calls = [deque(job for job in calls if not job.future.done()) for calls in self._calls]
        self._bytes = sum(job.size for calls in self._calls for job in calls)
        return before != (self._bytes, self.waiting())

    def _make_room(self, job: CallJob, priority: int) -> CallJob | None:
        """Returns whose place it takes.

        Raises:
            DeadlineExceeded: the deadline passed before the request came.
            Overloaded: there is none.
        """
        limits = self._limits
        deadline = job.exchange.deadline
        if deadline is not None and job.since >= deadline:
            raise DeadlineExceeded(f"the deadline passed before the request came to the queue of model {self._name}")
        before = sum(map(len, self._calls[: priority + 1]))
        wait_s, together = self._wait(before)
        takes_s = wait_s + self.effort.seconds(together)
        if deadline is not None and job.since + _MARGIN * takes_s > deadline:
            raise self._full(f"to be answered would take {takes_s * 1000:.0f} ms, beyond its deadline")
        if limits.max_wait_ms and wait_s * 1000 > limits.max_wait_ms:
            raise self._full(f"it would have to wait for {wait_s * 1000:.0f} ms (max_wait_ms is {limits.max_wait_ms})")
        count = self.waiting()
        if not count or (count < limits.max_requests and self._bytes + job.size <= limits.max_mb << 20):
            return None
        for calls in self._calls[:priority:-1]:
            if calls and self._bytes - calls[-1].size + job.size <= limits.max_mb << 20:
                ousted = calls.pop()
                self._bytes -= ousted.size
                return ousted
        if count >= limits.max_requests:
            raise self._full(f"{count} requests wait (max_requests)")
        raise self._full(
            f"requests of {self._bytes} bytes wait, and this one has {job.size} (max_mb is {limits.max_mb})"
        )

    def _wait(self, before: int) -> tuple[float, int]:
        """How long until a thread takes up a request behind so many, and how many it then takes: while few wait, all of
        them; else as many as make good use of it, since those that have waited for long leave no time for more."""
        worthwhile = max(1, min(self.effort.worthwhile, int(self.at_once / self._rows_each)))
        rounds, rest = divmod(before, worthwhile)
        free_s = min(self._free_at.values()) - time.monotonic() if len(self._free_at) >= self.threads else 0.0
        wait_s = max(free_s, 0.0) + self.effort.seconds(worthwhile) * (rounds // self.threads)
        return wait_s, worthwhile if rounds else rest + 1

    def _full(self, why: str) -> Overloaded:
        return Overloaded(f"model {self._name} takes no more requests for now: {why}")

    def take(self, *, wait: bool) -> Job | None:
        """The next job. None if there is none, and it is not to wait for one.

        Raises:
            StopIteration: this thread shall end.
        """
        while True:
            try:
                goes_on = self._tokens.get(wait)
            except queue.Empty:
                return None
            if not goes_on:
                raise StopIteration
            with self._lock:
                if self._own:
                    return self._own.popleft()
                for calls in self._calls:
                    if calls:
                        job = calls.popleft()
                        job.taken = True
                        self._bytes -= job.size
                        self._taken += 1
                        return job

    def rest(self, until: float, enough: int) -> bool:
        """Wait until then, by `time.monotonic`, but not if so many calls wait, or one that cannot for so long, or
        anything else. A thread that woke for each of them would do so between two steps of the event loop. Returns
        whether it is worth to look for more: False if as many are here as lately were at once, so that those who ask
        wait for answers themselves."""
        left_s = until - time.monotonic()
        with self._lock:
            waiting = self.waiting()
            expected = self._crowd.most - self._taken
            if not waiting and expected <= 0 and not self._own and not self._ending:
                return False
            if left_s <= 0 or self._own or self._ending or waiting >= min(enough, expected):
                return True
            if any(job.held_until < until for calls in self._calls for job in calls):
                return True
            self._rests, self._until, self._enough = True, until, min(enough, expected)
        if not self._alarm.acquire(timeout=left_s):
            with self._lock:
                if self._rests:
                    self._rests = False
                else:
                    self._alarm.acquire(blocking=False)  # woken just now
        return True

    def _wake(self) -> None:
        """With the lock."""
        if self._rests:
            self._rests = False
            self._alarm.release()

    def end(self, threads: int) -> None:
        with self._lock:
            self._ending = True
            self._wake()
        for _ in range(threads):
            self._tokens.put(False)

    def has(self, worker: int, requests: int, rows: int = 0) -> None:
        """A worker is busy with so many, which have so many rows, if that is known. Any thread."""
        with self._lock:
            if requests and rows:
                self._rows_each += (1 - _KEPT) * (max(rows / requests, 1.0) - self._rows_each)
            self._free_at[worker] = time.monotonic() + self.effort.seconds(requests)

    def done(self, worker: int, taken: int, requests: int, seconds: float) -> None:
        """It is busy no more, has done so many calls, and has worked on so many requests for so long. Any thread."""
        with self._lock:
            del self._free_at[worker]
            self._taken -= taken
            if requests:
                self.effort.learn(requests, seconds)

    def waiting(self) -> int:
        return sum(map(len, self._calls))


class Worker:
    """One thread of a version.

    Attributes:
        number: from 0.
        spent: the seconds on jobs before, and since when it does the one of now. Only the thread writes, both at once.
    """

    def __init__(self, number: int, jobs: _Queue) -> None:
        self.number = number
        self.spent = (0.0, math.inf)
        self._jobs = jobs
        self._next: Job | None = None
        self._ends = False
        self._gathers = False
        self._taken = 0

    def take(self, kind: type[T], until: float, enough: int = 1) -> T | None:
        """Another job of that kind to be done with the one of now. If there is none, waits until then, by
        `time.monotonic`, or for so many. One of another kind is done after it, and ends what can be taken."""
        if self._ends or self._next is not None:
            return None
        try:
            job = self._jobs.take(wait=False)
            while job is None and until > (since := time.monotonic()):
                if not self._jobs.rest(min(until, since + _REST_S), enough):
                    break
                seconds, began = self.spent
                self.spent = seconds, began + time.monotonic() - since  # to wait for others is no work
                job = self._jobs.take(wait=False)
        except StopIteration:
            self._ends = True
            return None
        if job is None or isinstance(job, kind):
            self._taken += job is not None
            return job
        self._next = job
        return None

    def takes_s(self, requests: int) -> float:
        """How long this thread would work on so many requests together."""
        return self._jobs.effort.seconds(requests)

    def closed(self, requests: int, rows: int) -> None:
        """It takes no more for now than so many, with so many rows: another may begin to."""
        self._jobs.has(self.number, requests, rows)
        self._let_gather()

    def _let_gather(self) -> None:
        if self._gathers:
            self._gathers = False
            self._jobs.gathering.release()

    def work(self) -> None:
        """Do jobs until the end."""
        seconds = 0.0
        while (job := self._following()) is not None:
            self._taken = int(isinstance(job, CallJob))
            self._jobs.has(self.number, 1)
            self.spent = seconds, time.monotonic()
            requests = job.run(self)
            children.end_child()
            del job  # or its request would live until the next one
            self._let_gather()
            took_s = time.monotonic() - self.spent[1]
            seconds += took_s
            self.spent = seconds, math.inf
            self._jobs.done(self.number, self._taken, requests, took_s)

    def _following(self) -> Job | None:
        job, self._next = self._next, None
        if job is not None:
            return job
        if self._ends:
            return None
        if self._jobs.holds:
            self._jobs.gathering.acquire()
            self._gathers = True
        try:
            return self._jobs.take(wait=True)
        except StopIteration:
            self._let_gather()
            return None


class Workers:
    """The threads of one version and their queue; one thread at first. Daemons: a stuck model cannot keep the
    process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs = _Queue(name)
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._left = 0
        self._at_end: Callable[[], None]
        self.grow(1)

    def grow(self, threads: int) -> None:
        """Have that many threads; fewer than there are changes nothing."""
        for number in range(len(self._workers), threads):
            worker = Worker(number, self._jobs)
            self._workers.append(worker)
            self._left += 1
            self._jobs.threads = len(self._workers)
            threading.Thread(target=self._work, args=(worker,), name=f"{self._name}#{number}", daemon=True).start()

    def configure(self, limits: QueueLimits, at_once: int = 1, *, holds: bool = False) -> None:
        """Before the first `submit`, on the one thread that there is.

        Args:
            at_once: how many rows one thread takes together at most.
            holds: whether it waits for them to come.
        """
        self._jobs.configure(limits, at_once, holds=holds)

    async def run(self, function: Callable[[], T]) -> T:
        """The result of `function` on one of the threads. If the caller is cancelled before its turn, it never runs.

        Raises:
            InferenceError: what `function` raised; HandlerFailed for what is none.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put(_FunctionJob(function, future))
        return await future

    def submit(self, job: CallJob) -> None:
        """Have `job` done in its turn. Event loop only.

        Raises:
            Overloaded: too much waits before it.
            BadRequest: the call names a priority that is none.
        """
        self._jobs.put_call(job)

    async def close(self, at_end: Callable[[], None]) -> None:
        """Wait for everything that was asked for; the last thread calls `at_end`. Call it once, and `run` and `submit`
        no more."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._at_end = partial(self._end, at_end, ended)
        self._jobs.end(len(self._workers))
        # Cancelling one who waits must not cancel what the last thread does.
        await asyncio.shield(ended)

    def worked(self) -> float:
        """The seconds that all threads together have spent on jobs, those of now included. Any thread."""
        now = time.monotonic()
        return sum(seconds + max(now - since, 0.0) for seconds, since in [worker.spent for worker in self._workers])

    def waiting(self) -> int:
        """How many requests wait. Any thread."""
        return self._jobs.waiting()

    def _work(self, worker: Worker) -> None:
        worker.work()
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._at_end()
            del self._at_end  # it leads to the version, and the version leads here

    def _end(self, at_end: Callable[[], None], ended: asyncio.Future[None]) -> None:
        try:
            at_end()
        except BaseException:  # a model may raise anything when it is closed, and `close` must return
            _log.exception("closing %s failed", self._name)
        outbox = Outbox()
        outbox.put(ended, None)
        outbox.send()
