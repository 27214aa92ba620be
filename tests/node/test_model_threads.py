"""The threads of one version, without a model: who takes what, and what a thread that was given up leaves alone."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest

from dl_inference_core.node.admission import QueueLimits
from dl_inference_core.node.batcher import BatchCost
from dl_inference_core.node.model_threads import ModelThread, ModelThreads
from dl_inference_core.node.queue import QueuedRequest, RequestQueue, Task
from dl_inference_core.testing.memory import MemoryExchange
from dl_inference_core.wire.protocol import PROTOCOLS, Protocol

SEVERAL = replace(PROTOCOLS["openinference"], several=True)


class Rig:
    """Threads that work on each request until `let`, and take together what waits then. The model works on the batch
    whose first request is `stays` until `let` once more."""

    def __init__(self, threads: int = 1, *, holds: bool = False) -> None:
        self.queue = RequestQueue("m/1", BatchCost(), lambda request, error: None)
        self.queue.configure(QueueLimits(), 8, holds=holds)
        self.done: list[bytes] = []
        self.began: list[bytes] = []
        self.stays: bytes | None = None
        self._gates: dict[bytes, threading.Event] = {}
        self.threads = ModelThreads("m/1", self.queue, self._run)
        self.threads.grow(threads)

    def put(self, name: bytes, protocol: Protocol = PROTOCOLS["openinference"]) -> weakref.ref[QueuedRequest]:
        self._gates[name] = threading.Event()
        request = QueuedRequest(MemoryExchange("/m", name), protocol, time.monotonic())
        assert self.queue.put_all((request,))
        return weakref.ref(request)

    def gate(self, name: bytes) -> threading.Event:
        """What a request waits for."""
        return self._gates[name]

    def let(self, *names: bytes) -> None:
        for name in names:
            self._gates[name].set()

    def _run(self, first: QueuedRequest, thread: ModelThread) -> int:
        requests = [first]
        batch = []
        while requests:
            name = bytes(requests[0].exchange.message)
            self.began.append(name)
            assert self._gates[name].wait(20)
            batch.append(name)
            requests = thread.take(1)
        thread.begin_model(len(batch), len(batch))
        if batch[0] == self.stays:
            self._gates[batch[0]].clear()
            assert self._gates[batch[0]].wait(20)
        self.done += batch
        return len(batch)

    async def replace(self, number: int = 0) -> ModelThread:
        """As the watchdog does."""
        thread = list(self.threads)[number]
        thread.reported = thread.spent[1]
        assert self.threads.replace(thread)
        return thread


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)


async def test_a_thread_that_was_given_up_takes_nothing_when_it_comes_back() -> None:
    rig = Rig(holds=True)
    kept = rig.put(b"stuck")
    await until(lambda: rig.began == [b"stuck"])
    old = await rig.replace()
    rig.put(b"busy")
    await until(lambda: rig.began[1:] == [b"busy"])
    rig.put(b"waiting")
    closing = asyncio.create_task(rig.threads.close(lambda: None))
    await asyncio.sleep(0)
    rig.let(b"stuck")
    await until(lambda: not old.runs)
    assert rig.done == [b"stuck"]
    assert rig.queue.waiting() == 1
    assert kept() is None, "the message of a request that is answered"
    rig.let(b"busy", b"waiting")
    async with asyncio.timeout(20):
        await closing
    assert rig.done == [b"stuck", b"busy", b"waiting"]


async def test_threads_that_were_given_up_and_have_ended_are_forgotten() -> None:
    rig = Rig()
    for name in (b"a", b"b"):
        rig.put(name)
        await until(lambda name=name: rig.began[-1:] == [name])  # type: ignore[misc]
        old = await rig.replace()
        rig.let(name)
        await until(lambda old=old: not old.runs)  # type: ignore[misc]
    assert rig.threads.given_up == [old]
    await rig.threads.close(lambda: None)


async def test_what_shares_no_batch_keeps_no_other_thread_from_gathering() -> None:
    rig = Rig(2, holds=True)
    rig.put(b"several signatures", SEVERAL)
    await until(lambda: rig.began == [b"several signatures"])
    rig.put(b"other")
    rig.let(b"other")
    await until(lambda: rig.done == [b"other"])
    rig.let(b"several signatures")
    await rig.threads.close(lambda: None)


@pytest.mark.parametrize("holds", [False, True])
async def test_what_shares_no_batch_goes_to_the_next_thread_that_is_free(holds: bool) -> None:
    """Not to one that comes across it while it gathers a batch, and then works on that."""
    rig = Rig(2)
    rig.put(b"first")
    await until(lambda: rig.began == [b"first"])
    rig.put(b"second")
    await until(lambda: rig.began == [b"first", b"second"])
    rig.queue.holds = holds
    rig.stays = b"first"
    ran = threading.Event()
    rig.queue.put_task(Task(ran.set))
    rig.put(b"several signatures", SEVERAL)
    rig.let(b"several signatures")
    rig.let(b"first")
    await until(lambda: not rig.gate(b"first").is_set())
    rig.let(b"second")
    await until(lambda: ran.is_set() and b"several signatures" in rig.done)
    assert rig.done == [b"second", b"several signatures"]
    rig.let(b"first")
    await rig.threads.close(lambda: None)


async def test_a_task_is_run_beside_a_batch_that_is_held() -> None:
    rig = Rig(2, holds=True)
    rig.put(b"held")
    await until(lambda: rig.began == [b"held"])
    ran = threading.Event()
    rig.queue.put_task(Task(ran.set))
    await until(ran.is_set)
    rig.put(b"mate")
    rig.let(b"held", b"mate")
    await until(lambda: rig.done == [b"held", b"mate"])
    await rig.threads.close(lambda: None)


async def test_requests_that_a_thread_puts_back_are_worked_on_by_another() -> None:
    rig = Rig(2)
    rig.put(b"first")
    await until(lambda: rig.began == [b"first"])
    rig.put(b"second")
    await until(lambda: rig.began == [b"first", b"second"])
    busy, _ = rig.threads
    rig.put(b"third")
    rig.put(b"fourth")
    rig.let(b"third", b"fourth")
    taken = busy.take(5)
    assert [request.exchange.message for request in taken] == [b"third", b"fourth"]
    busy.put_back(taken[1:])
    assert [request.exchange.message for request in busy.requests] == [b"first", b"third"]
    rig.let(b"second")
    await until(lambda: rig.done == [b"second", b"fourth"])
    rig.let(b"first")
    await rig.threads.close(lambda: None)
