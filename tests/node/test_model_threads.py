"""The threads of one version, without a model: who takes what, and what a thread that was given up leaves alone."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable

from dl_inference_core.local_exchange import LocalExchange
from dl_inference_core.node.admission import QueueLimits
from dl_inference_core.node.batcher import BatchCost
from dl_inference_core.node.model_threads import ModelThread, ModelThreads
from dl_inference_core.node.queue import QueuedRequest, RequestQueue
from dl_inference_core.wire.protocol import MULTI_INFERENCE, PROTOCOLS, Protocol


class Rig:
    """Threads that work on each request until `let`, and take together what waits then."""

    def __init__(self, threads: int = 1, *, holds: bool = False) -> None:
        self.queue = RequestQueue("m/1", BatchCost(), lambda request, error: None)
        self.queue.configure(QueueLimits(), 8, holds=holds)
        self.done: list[bytes] = []
        self.began: list[bytes] = []
        self._gates: dict[bytes, threading.Event] = {}
        self.threads = ModelThreads("m/1", self.queue, self._run)
        self.threads.grow(threads)

    def put(self, name: bytes, protocol: Protocol = PROTOCOLS["openinference"]) -> weakref.ref[QueuedRequest]:
        self._gates[name] = threading.Event()
        request = QueuedRequest(LocalExchange("/m", name), protocol)
        assert self.queue.put(request)
        return weakref.ref(request)

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
    rig.put(b"several signatures", MULTI_INFERENCE)
    await until(lambda: rig.began == [b"several signatures"])
    rig.put(b"other")
    rig.let(b"other")
    await until(lambda: rig.done == [b"other"])
    rig.let(b"several signatures")
    await rig.threads.close(lambda: None)
