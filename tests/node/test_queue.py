"""The queue of one version, without a model: what comes out, and what is refused at the door."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest

from dl_inference_core.errors import BadRequest, DeadlineExceeded, InferenceError, Overloaded
from dl_inference_core.node import load
from dl_inference_core.node.admission import QueueLimits
from dl_inference_core.node.batcher import BatchCost
from dl_inference_core.node.load import LoadMeter
from dl_inference_core.node.queue import QueuedRequest, RequestQueue, Task
from dl_inference_core.testing.memory import MemoryExchange
from dl_inference_core.wire.protocol import PROTOCOLS, Queueing

OIP = PROTOCOLS["openinference"]
SEVERAL = replace(OIP, several=True)


def queued(message: bytes = b"", deadline_s: float | None = None, **asked: Any) -> QueuedRequest:
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    exchange = MemoryExchange("/m", message, deadline=deadline)
    return QueuedRequest(exchange, OIP, time.monotonic(), Queueing(**asked))


class Rig:
    """A queue, and what it has refused."""

    def __init__(self, delay_s: float = 0.0, **limits: Any) -> None:
        self.refused: list[tuple[QueuedRequest, InferenceError]] = []
        self.cost = BatchCost()
        self.queue = RequestQueue("m/1", self.cost, lambda *refused: self.refused.append(refused), lambda: delay_s)
        self.queue.configure(QueueLimits(**limits))

    def put(self, request: QueuedRequest) -> bool:
        """Whether the queue was open.

        Raises:
            InferenceError: `request` was refused.
        """
        was_open = self.queue.put_all((request,))
        for number, (each, error) in enumerate(self.refused):
            if each is request:
                del self.refused[number]
                raise error
        return was_open

    def take_all(self) -> list[QueuedRequest]:
        """Every request that waits."""
        return self.queue.take_more(sys.maxsize)


async def test_tasks_come_first_and_requests_in_order() -> None:
    rig = Rig()
    requests = [queued() for _ in range(3)]
    task = Task(lambda: None)
    for request in requests[:2]:
        assert rig.put(request)
    rig.queue.put_task(task)
    assert rig.put(requests[2])
    assert rig.queue.waiting() == 3
    assert rig.queue.take(0) is task
    assert [rig.queue.take(0), *rig.take_all()] == requests
    assert rig.queue.waiting() == 0
    assert all(request.taken for request in requests)


async def test_a_closed_queue_takes_no_request_and_ends_its_threads_after_what_waits() -> None:
    rig = Rig()
    request = queued()
    rig.put(request)
    rig.queue.close()
    assert not rig.put(queued())
    assert rig.queue.take(0) is request
    for thread in range(2):
        with pytest.raises(StopIteration):
            rig.queue.take(thread)


async def test_what_was_put_before_the_queue_was_closed_comes_out_whatever_the_threads_do() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(100):
            rig = Rig()
            put: list[QueuedRequest] = []

            def putting(rig: Rig = rig, put: list[QueuedRequest] = put) -> None:
                while len(put) < 1000 and rig.put(request := queued()):
                    put.append(request)

            threads = [threading.Thread(target=putting) for _ in range(2)]
            for thread in threads:
                thread.start()
            while len(put) < 20:  # noqa: ASYNC110 - threads put
                await asyncio.sleep(0)
            rig.queue.close()
            taken = []
            with contextlib.suppress(StopIteration):
                while True:
                    taken.append(rig.queue.take(0))
            for thread in threads:
                thread.join()
            assert len(taken) == len(put)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(("deadline_s", "refused"), [(None, False), (0.3, True), (30.0, False)])
async def test_the_delay_of_the_interpreter_counts(deadline_s: float | None, refused: bool) -> None:
    """Where a handler holds the GIL for half a second at a time."""
    rig = Rig(delay_s=0.5)
    if refused:
        with pytest.raises(Overloaded, match="would take 500 ms, beyond its deadline"):
            rig.put(queued(deadline_s=deadline_s))
    else:
        assert rig.put(queued(deadline_s=deadline_s))


async def test_a_deadline_that_has_passed_is_that_and_no_want_of_room() -> None:
    rig = Rig(max_requests=1)
    rig.put(queued())
    with pytest.raises(DeadlineExceeded):
        rig.put(queued(deadline_s=-1.0))


async def test_of_requests_that_come_together_each_is_judged_behind_those_before_it() -> None:
    rig = Rig(max_requests=4, priorities=2)
    waits = queued(priority=2)
    rig.put(waits)
    late = queued(deadline_s=-1.0)
    unknown = QueuedRequest(MemoryExchange("/m", b"", (("x-priority", "3"),)), OIP, time.monotonic())
    fit = [queued(priority=2) for _ in range(3)]
    over, high = queued(priority=2), queued(priority=1)
    assert rig.queue.put_all([late, *fit[:2], unknown, fit[2], over, high])
    why = {id(request): error for request, error in rig.refused}
    assert why.keys() == {id(request) for request in (late, unknown, over, fit[2])}
    assert isinstance(why[id(late)], DeadlineExceeded)
    assert isinstance(why[id(unknown)], BadRequest)
    assert "4 requests wait" in str(why[id(over)])
    assert "higher priority has taken its place" in str(why[id(fit[2])])
    assert rig.take_all() == [high, waits, *fit[:2]]


async def test_a_closed_queue_refuses_none_of_those_that_come_together() -> None:
    """Another version may take them."""
    rig = Rig()
    rig.queue.close()
    assert not rig.queue.put_all([queued(), queued(deadline_s=-1.0)])
    assert rig.refused == []


async def test_a_refused_request_gets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(max_requests=1)
    loop, timers = asyncio.get_running_loop(), []
    with monkeypatch.context() as patched:
        patched.setattr(loop, "call_soon_threadsafe", lambda *timer: timers.append(timer))
        rig.queue.put_all([queued(timeout_s=1.0) for _ in range(3)])
    assert len(rig.refused) == 2
    assert len(timers) == 1


@pytest.mark.parametrize("case", ["its client has left", "the queue is closed"])
async def test_a_request_of_an_unknown_priority_is_kept_by_nothing(no_collector: None, case: str) -> None:
    rig = Rig(priorities=2)
    request = QueuedRequest(MemoryExchange("/m", b"", (("x-priority", "3"),)), OIP, time.monotonic())
    if case == "the queue is closed":
        rig.queue.close()
    else:
        request.end()
    rig.queue.put_all([request])
    gone = weakref.ref(request)
    rig.refused.clear()
    del request
    assert gone() is None


async def test_a_request_that_a_closed_queue_did_not_take_has_no_priority_left_of_it() -> None:
    """The next version may have fewer."""
    rig, other = Rig(priorities=3), Rig()
    requests = [queued(priority=1), queued(priority=3)]
    rig.queue.close()
    assert not rig.queue.put_all(requests)
    assert other.queue.put_all(requests)
    assert other.take_all() == requests


async def test_as_many_threads_wake_as_there_are_requests_that_come_together() -> None:
    rig = Rig()
    taken: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def take(thread: int) -> None:
        item = rig.queue.take(thread)
        loop.call_soon_threadsafe(taken.put_nowait, item)

    threads = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(10):
        while len(rig.queue._sleeping) < 3:  # noqa: ASYNC110 - threads have no event
            await asyncio.sleep(0.001)
    requests = [queued(), queued()]
    rig.queue.put_all(requests)
    async with asyncio.timeout(10):
        assert {id(await taken.get()), id(await taken.get())} == set(map(id, requests))
    assert len(rig.queue._sleeping) == 1
    rig.queue.put_all([queued()])
    async with asyncio.timeout(10):
        await taken.get()
    for thread in threads:
        thread.join(10)


async def test_requests_whose_clients_have_left_make_room() -> None:
    rig = Rig(max_requests=2)
    first, second, third = queued(), queued(), queued()
    rig.put(first)
    rig.put(second)
    with pytest.raises(Overloaded, match="2 requests wait"):
        rig.put(third)
    first.end()
    assert rig.put(third)
    assert rig.take_all() == [second, third]


async def test_places_of_clients_that_have_left_a_long_queue_are_found() -> None:
    """By one of the next refusals: to look at a long queue for each would cost more than the requests."""
    rig = Rig(max_requests=1000)
    waiting = [queued() for _ in range(1000)]
    for request in waiting:
        rig.put(request)
    for request in waiting[:-1]:
        request.end()
    for _ in range(1000 // 64):
        with pytest.raises(Overloaded):
            rig.put(queued())
    last = queued()
    assert rig.put(last)
    assert rig.take_all() == [waiting[-1], last]


async def test_places_of_clients_that_have_left_are_given_away_before_that_of_one_that_waits() -> None:
    """To a request of a higher priority, which finds the queue full."""
    rig = Rig(max_requests=2, priorities=2)
    left, waits, high = queued(), queued(), queued(priority=1)
    rig.put(left)
    rig.put(waits)
    left.end()
    assert rig.put(high)
    assert rig.refused == []
    assert rig.take_all() == [high, waits]


async def test_a_batch_takes_nothing_from_behind_what_shares_none() -> None:
    rig = Rig()
    first, last = queued(), queued()
    several = QueuedRequest(MemoryExchange("/m", b""), SEVERAL, time.monotonic())
    for request in (first, several, last):
        rig.put(request)
    assert rig.queue.take(0) is first
    assert rig.take_all() == []
    assert rig.queue.take(1) is several
    assert rig.take_all() == [last]
    rig.put(queued())
    rig.queue.put_task(Task(lambda: None))
    assert rig.take_all() == []


async def test_a_batch_takes_no_more_than_it_asks_for_whatever_their_priorities() -> None:
    rig = Rig(priorities=2)
    low, high = [queued() for _ in range(3)], [queued(priority=1) for _ in range(2)]
    for request in (*low, *high):
        rig.put(request)
    assert rig.queue.take_more(1) == high[:1]
    assert rig.queue.take_more(2) == [high[1], low[0]]
    assert rig.queue.waiting() == 2
    assert rig.take_all() == low[1:]


async def test_what_is_put_back_waits_in_its_place() -> None:
    rig = Rig(priorities=2, max_requests=4)
    high, low = [queued(priority=1) for _ in range(3)], queued()
    for request in (*high[:2], low):
        rig.put(request)
    taken = rig.take_all()
    assert taken == [*high[:2], low]
    rig.queue.put_back(taken[1:])
    assert not any(request.taken for request in taken[1:])
    assert rig.queue.waiting() == 2
    rig.put(high[2])
    rig.put(queued())
    with pytest.raises(Overloaded, match="4 requests wait"):
        rig.put(queued())
    assert rig.take_all()[:3] == [high[1], high[2], low]


async def test_what_is_put_back_waits_no_longer_than_it_may() -> None:
    """Though its time passed while it was taken."""
    rig = Rig()
    late = queued(timeout_s=0.02)
    rig.put(late)
    taken = rig.take_all()
    await asyncio.sleep(0.05)
    assert rig.refused == []
    rig.queue.put_back(taken)
    async with asyncio.timeout(10):
        while not rig.refused:  # noqa: ASYNC110 - a timer
            await asyncio.sleep(0.005)
    assert rig.refused[0][0] is late


async def test_a_request_that_waits_too_long_is_refused_and_its_message_is_not_kept_for_that() -> None:
    rig = Rig()
    late = queued(timeout_s=0.02)
    rig.put(late)
    async with asyncio.timeout(10):
        while not rig.refused:  # noqa: ASYNC110 - a timer
            await asyncio.sleep(0.005)
    ((request, error),) = rig.refused
    assert request is late
    assert str(error).startswith("Request timeout expired: ")
    taken = queued(b"message", timeout_s=1000)
    rig.put(taken)
    await asyncio.sleep(0)
    rig.take_all()
    gone = weakref.ref(taken)
    del taken, request, late, rig
    gc.collect()
    assert gone() is None


async def test_a_timer_does_not_outlive_its_request_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the request may wait."""
    loop, delays = asyncio.get_running_loop(), []
    rig = Rig()
    request = queued(timeout_s=3600)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "call_later", lambda delay_s, *_: delays.append(delay_s))
        rig.put(request)
        await asyncio.sleep(0)
    assert delays == [1.0]


async def test_a_request_is_refused_in_time_after_several_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dl_inference_core.node.queue._LONGEST_TIMER_S", 0.01)
    rig = Rig()
    request = queued(timeout_s=0.1)
    rig.put(request)
    async with asyncio.timeout(10):
        while not rig.refused:  # noqa: ASYNC110 - a timer
            await asyncio.sleep(0.005)
    assert time.monotonic() >= request.expires_at


async def test_a_node_measures_how_late_its_event_loop_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_DELAY_PERIOD_S", 0.01)
    meter = LoadMeter()
    meter.start()
    try:
        for _ in range(20):
            await asyncio.sleep(0.011)
            time.sleep(0.2)  # noqa: ASYNC251 - as a handler does that holds the GIL
        assert 0.03 < meter.delay_s() < 2
    finally:
        meter.stop()
