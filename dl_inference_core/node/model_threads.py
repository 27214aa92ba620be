"""The model threads of one version: each takes what waits, and has it run, one batch or task after another.

Threads: a `ModelThread` belongs to its own thread. The watchdog, on the event loop, reads `spent` and `requests`, and
gives a thread up under that thread's lock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from dl_inference_core import children
from dl_inference_core.coroutines import call_soon
from dl_inference_core.failures import as_inference_error
from dl_inference_core.node.queue import QueuedRequest, RequestQueue, Task

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

RunBatch: TypeAlias = "Callable[[QueuedRequest, ModelThread], int]"
"""Answers a request, and others that it takes from the thread; returns how many of them came to the model: to refuse a
request takes no time that tells of the next."""

_log = logging.getLogger(__name__)

_LONGEST_SLEEP_S = 0.005
"""After which a thread that waits for more requests looks at those that have come: some may need no model."""


class ModelThread:
    """One thread that runs the model.

    Attributes:
        number: from 0.
        spent: the seconds on batches and tasks that have ended, and since when it works on the current one (infinity
            where it waits). Only the thread writes, both at once.
        requests: that it has taken for the current batch.
        reported: `spent[1]` of the batch that the watchdog has reported as stuck; the watchdog writes it.
    """

    def __init__(self, number: int, queue: RequestQueue, run: RunBatch) -> None:
        """Args:
        run: must not raise.
        """
        self.number = number
        self.spent = (0.0, math.inf)
        self.requests: list[QueuedRequest] = []
        self.reported = math.nan
        self._queue = queue
        self._run = run
        self._gathers = False
        self._given_up = False
        self._released = 0
        self._lock = threading.Lock()
        """Held to take requests and to give the thread up: a thread that was given up takes none."""
        self._thread: threading.Thread | None = None

    def start(self, name: str, ended: Callable[[], None], may_begin: Callable[[], bool]) -> None:
        """Take items until the queue ends.

        Args:
            ended: called at the end on this thread, unless the thread was given up.
            may_begin: called first, on this thread; where it returns False, the thread ends at once.

        Raises:
            RuntimeError: the system starts no more threads.
        """

        def work() -> None:
            if may_begin() and self._work():
                ended()

        # A daemon: a stuck model cannot keep the process.
        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()

    def take(self, most: int) -> list[QueuedRequest]:
        """Up to `most` of the requests that wait, for the current batch."""
        with self._lock:
            taken = [] if self._given_up else self._queue.take_more(most)
            self.requests += taken
            return taken

    def others_wait(self) -> bool:
        """Whether any request waits that the current batch might take."""
        return self._queue.waiting() > 0

    def put_back(self, requests: Sequence[QueuedRequest]) -> None:
        """Leave `requests`, the last ones that were taken, to the next batch: nothing was done for them."""
        if not requests:
            return
        with self._lock:
            if not self._given_up:
                del self.requests[-len(requests) :]
                self._queue.put_back(requests)

    def wait_for_more(self, until: float, enough: int) -> bool:
        """Wait until `until`, by `time.monotonic`, or for `enough` requests. Returns whether it is worth to look for
        another request: False if the batch is not to be held any longer."""
        since = time.monotonic()
        seconds, began = self.spent
        with self._lock:
            if self._given_up or since >= until:
                return False
            self.spent = seconds + since - began, math.inf  # waiting is not work
        more = self._queue.wait_for_more(min(until, since + _LONGEST_SLEEP_S), enough)
        self.spent = seconds, began + time.monotonic() - since
        return more

    def release(self, requests: int) -> None:
        """So many requests of the current batch are about to be answered: their clients may send the next ones before
        the batch ends."""
        if self._queue.holds:
            with self._lock:
                if not self._given_up:
                    self._released += requests
                    self._queue.release(requests)

    def begin_model(self, requests: int, rows: int) -> None:
        """The batch is complete: so many requests with so many rows come to the model. Another thread may gather."""
        with self._lock:
            if not self._given_up:
                self._queue.begin_batch(self.number, requests, rows)
                self._stop_gathering()

    def _work(self) -> bool:
        """Returns whether it came to the end of the queue; False where it was given up."""
        seconds = 0.0
        while (item := self._next()) is not None:
            self.spent = seconds, time.monotonic()
            if isinstance(item, Task):
                item.run()
                requests = 0
            else:
                self.requests = [item]
                requests = self._run(item, self)
            children.end_child()
            del item  # or its request would live until the next one
            took_s = time.monotonic() - self.spent[1]
            seconds += took_s
            with self._lock:
                taken, self.requests, self._released = len(self.requests) - self._released, [], 0
                if self._given_up:
                    return False
                self.spent = seconds, math.inf
                self._stop_gathering()
                self._queue.end_batch(self.number, taken, requests, took_s)
        return True

    def _next(self) -> QueuedRequest | Task | None:
        """What to work on; None if there will be nothing more."""
        try:
            item = self._queue.take(self.number)
        except StopIteration:
            return None
        self._gathers = self._queue.holds and isinstance(item, QueuedRequest) and item.shares_batches
        return item

    def _stop_gathering(self) -> None:
        """With the lock."""
        if self._gathers:
            self._gathers = False
            self._queue.stop_gathering()

    @property
    def runs(self) -> bool:
        """Whether the thread has not ended. Any thread."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def stuck(self) -> bool:
        """Whether the watchdog has reported the batch that it works on. Any thread."""
        return self.reported == self.spent[1]

    @property
    def gathers(self) -> bool:
        """Whether it keeps other threads from gathering batches. Any thread."""
        return self._gathers

    def stack(self) -> str:
        """Where the thread is, as Python prints a traceback; "" if it has ended. Any thread."""
        frame = None if self._thread is None else sys._current_frames().get(self._thread.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def give_up(self) -> bool:
        """Leave the thread to end with what it runs. Any other thread.

        Returns whether it did: False if the batch has ended in the meantime.
        """
        with self._lock:
            if self.stuck:
                self._given_up = True
                self._stop_gathering()
                self._queue.end_batch(self.number, len(self.requests) - self._released)
            return self._given_up


class ModelThreads:
    """The model threads of one version; one at first."""

    def __init__(
        self,
        name: str,
        queue: RequestQueue,
        run: RunBatch,
    ) -> None:
        """Args:
        name: "model/version", for the threads' names.
        run: as of `ModelThread`.
        """
        self._name = name
        self._queue = queue
        self._run_batch = run
        self._lock = threading.Lock()
        """Of `_left`, and of who has worked for how long."""
        self._threads: list[ModelThread] = []
        self._left = 0
        self._worked_given_up_s = 0.0
        self._at_end: Callable[[], None]
        self.given_up: list[ModelThread] = []
        """Threads that were replaced while they ran the model; they may still run it."""
        self.grow(1)

    def grow(self, threads: int) -> None:
        """Have that many threads; fewer than there are changes nothing."""
        for number in range(len(self._threads), threads):
            with self._lock:
                self._left += 1
            self._threads.append(ModelThread(number, self._queue, self._run_batch))
            self._start(self._threads[number])
            self._queue.set_threads(len(self._threads))

    def _start(self, thread: ModelThread, may_begin: Callable[[], bool] = lambda: True) -> None:
        thread.start(f"{self._name}#{thread.number}", self._ended, may_begin)

    def __iter__(self) -> Iterator[ModelThread]:
        return iter(tuple(self._threads))

    def replace(self, thread: ModelThread) -> bool:
        """Have another thread take the place of `thread`, which the watchdog has reported. Event loop only.

        Returns whether it did: False if the batch has ended in the meantime.

        Raises:
            RuntimeError: the system starts no more threads; nothing has changed.
        """
        fresh = ModelThread(thread.number, self._queue, self._run_batch)
        gave_up: Future[bool] = Future()
        self._start(fresh, gave_up.result)
        if did := thread.give_up():
            seconds, since = thread.spent
            with self._lock:
                self._worked_given_up_s += seconds + time.monotonic() - since
                self._threads[thread.number] = fresh
            self.given_up = [*(each for each in self.given_up if each.runs), thread]
        gave_up.set_result(did)
        return did

    async def run(self, function: Callable[[], T]) -> T:
        """The result of `function` on one of the threads. If the caller is cancelled before its turn, it never runs.

        Raises:
            InferenceError: what `function` raised; HandlerFailed for other exceptions.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                settle(partial(future.set_result, function()))
            except BaseException as error:
                settle(partial(future.set_exception, as_inference_error(error)))

        def settle(how: Callable[[], None]) -> None:
            call_soon(loop, lambda: None if future.done() else how())

        self._queue.put_task(Task(run))
        return await future

    async def close(self, at_end: Callable[[], None]) -> None:
        """Wait until everything that waits is done; the last thread calls `at_end`. Call it once, and `run` no more."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def end() -> None:
            try:
                at_end()
            except BaseException:  # a model may raise anything when it is closed, and `close` must return
                _log.exception("closing %s failed", self._name)
            call_soon(loop, lambda: None if ended.done() else ended.set_result(None))

        self._at_end = end
        self._queue.close()
        # Cancelling the caller must not cancel what the last thread does.
        await asyncio.shield(ended)

    def worked(self) -> float:
        """The seconds that all threads together have spent on batches and tasks, the current ones included. Any
        thread."""
        with self._lock:
            now = time.monotonic()
            spent = [thread.spent for thread in self._threads]
            given_up_s = self._worked_given_up_s
        return given_up_s + sum(seconds + max(now - since, 0.0) for seconds, since in spent)

    def _ended(self) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._at_end()
            del self._at_end  # it leads to the version, and the version leads here
