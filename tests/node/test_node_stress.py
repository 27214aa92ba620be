"""A node among clients that leave, hurry, poison and hang it while its model is reloaded: what is left of that."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from dl_inference_tfserving.protocols import MULTI_INFERENCE

from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import BadRequest, Code, InferenceError
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.load import LoadMeter
from dl_inference_core.node.queue import RequestQueue
from dl_inference_core.node.repository import Repository
from dl_inference_core.node.version import LoadedVersion
from dl_inference_core.routing import Routes
from dl_inference_core.tensors import Form, Request
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.loopback import official
from dl_inference_core.testing.memory import MemoryExchange
from dl_inference_core.transport import Exchange, Limits, Metadata
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS

OIP = PROTOCOLS["openinference"]
SECONDS = 2.0
CLIENTS = 64
ANSWERED_WITHIN_S = 15.0
"""However busy the machine is: no request takes longer than some hangs, each until the watchdog's limit."""

SLOW, WRONG, BROKEN, HANGS, POISON, STALLS = -1, -2, -3, -4, -5, -6
"""Numbers by which a request asks for trouble: the first four in `preprocess`, the others in the model."""
WEIGHTS = {SLOW: 4, WRONG: 4, BROKEN: 4, HANGS: 0.05, POISON: 4, STALLS: 0.05}
"""In per cent of the requests."""
TOML = """
handler = "it"
threads = 2
{batching}
[queue]
max_requests = 40
priorities = 2
[watchdog]
stuck_after_s = 0.05
replace_after_s = 0.1
"""
BATCHINGS = {
    "alone": "[batching]\nenabled = false",
    "together": "[batching]\nmax_rows = 8",
    "held": "[batching]\nmax_rows = 8\nmax_delay_us = 3_000",
}


class Troubled(Handler):
    shares_calls = True

    def preprocess(self, request: Request) -> Any:
        inputs = super().preprocess(request)
        match int(inputs["x"][0, 0]):
            case n if n == SLOW:
                time.sleep(0.005)
            case n if n == WRONG:
                raise BadRequest("as asked for")
            case n if n == BROKEN:
                raise ValueError("as asked for")
            case n if n == HANGS:
                time.sleep(0.3)
        return inputs

    def run_batch(self, model: Model, inputs: Any, requests: Sequence[Request]) -> Any:
        if (inputs["x"] == POISON).any():
            raise ValueError("as asked for")
        time.sleep(0.3 if (inputs["x"] == STALLS).any() else 0.001)
        outputs = super().run_batch(model, inputs, requests)
        model.calls.clear()  # type: ignore[attr-defined]
        return outputs


class Counting:
    """A service that knows which of its exchanges have not ended."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.methods = dispatcher.methods
        self.private_trailers = dispatcher.private_trailers
        self.open: set[Exchange] = set()
        self.codes: Counter[Code] = Counter()
        self._lock = threading.Lock()

    def begin_all(self, exchanges: Sequence[Exchange]) -> None:
        with self._lock:
            self.open.update(exchanges)
        self._dispatcher.begin_all(exchanges)

    def ended_all(self, ended: Sequence[tuple[Exchange, Code]]) -> None:
        with self._lock:
            for exchange, code in ended:
                self.open.remove(exchange)  # KeyError: it has ended twice
                self.codes[code] += 1
        self._dispatcher.ended_all(ended)


Call = Callable[[str, bytes, Metadata, float | None], Awaitable[bytes]]
"""The answer to a message; raises InferenceError or grpc.RpcError."""


@asynccontextmanager
async def in_memory(service: Counting) -> AsyncIterator[Call]:
    async def call(method: str, message: bytes, metadata: Metadata, timeout_s: float | None) -> bytes:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        exchange = MemoryExchange(method, message, metadata, deadline, service=service)
        service.begin_all((exchange,))
        return bytes(await exchange.outcome())

    yield call


@asynccontextmanager
async def by_grpcio(service: Counting) -> AsyncIterator[Call]:
    server = await GrpcioTransport(GrpcioTransport.Options()).serve(service, ("127.0.0.1:0",), Limits())
    try:
        async with official(f"127.0.0.1:{server.ports[0]}") as channel:

            async def call(method: str, message: bytes, metadata: Metadata, timeout_s: float | None) -> bytes:
                answer: bytes = await channel.unary_unary(method)(message, timeout=timeout_s, metadata=metadata)
                return answer

            yield call
    finally:
        await server.drain(1)


def a_request(dice: random.Random) -> tuple[str, bytes, int]:
    """A method, a message, and the number in it; 0 where no answer is expected."""
    match dice.random():
        case luck if luck < 0.02:
            return OIP.node_method, b"\x0a\x01m\xff", 0
        case luck if luck < 0.04:
            tasks = [{"model_spec": {"name": "m"}, "method_name": "tensorflow/serving/regress"}]
            body = messages.MultiInferenceRequest(tasks=tasks).SerializeToString()
            return MULTI_INFERENCE.node_method, body, 0
    number = dice.choices([*WEIGHTS, dice.randrange(1, 1000)], [*WEIGHTS.values(), 100 - sum(WEIGHTS.values())])[0]
    payload = {"x": np.full((dice.choice((1, 1, 1, 2, 20)), 1), number, np.float32)}
    body = OIP.codec.encode_request(Request(payload=payload, form=Form.TENSORS, model="m"))
    if dice.random() < 0.3:
        message = messages.ModelInferRequest.FromString(body)
        message.parameters["timeout"].int64_param = dice.choice((1_000, 20_000, 60_000_000))
        body = message.SerializeToString()
    return OIP.node_method, body, number


async def client(call: Call, dice: random.Random, until: float, outcomes: Counter[str]) -> None:
    while time.monotonic() < until:
        method, message, number = a_request(dice)
        timeout_s = dice.choice((None, dice.uniform(0.001, 0.05), 30.0))
        names = (("x-client-id", f"c{dice.randrange(8)}"), ("x-priority", dice.choice("12")))
        asking = asyncio.ensure_future(call(method, message, names, timeout_s))
        leaves_after_s = dice.uniform(0, 0.05) if dice.random() < 0.2 else ANSWERED_WITHIN_S
        await asyncio.wait((asking,), timeout=leaves_after_s)
        assert asking.done() or leaves_after_s < ANSWERED_WITHIN_S, f"no answer to {number}"
        asking.cancel()
        try:
            answer: Any = OIP.codec.decode_response(await asking)
        except asyncio.CancelledError:
            outcomes["left"] += 1
        except InferenceError as error:
            outcomes[error.code.name] += 1
        except grpc.RpcError as error:
            outcomes[error.code().name] += 1
        else:
            outcomes["answered"] += 1
            assert set(answer.payload["x"].ravel().tolist()) == {2.0 * number}


class Node:
    """A node of one model, and what has been of that model's versions."""

    def __init__(self, folder: Path, batching: str) -> None:
        self._folder = folder
        self._write(0)
        (folder / "m" / "model.toml").write_text(TOML.format(batching=BATCHINGS[batching]), encoding="utf-8")
        self._backend = FakeBackend()
        self.meter, self.metrics = LoadMeter(reports_per_s=1000), Metrics()
        self.repository = Repository(
            folder,
            backends={"fake": self._backend},
            handlers={"it": Troubled},
            poll_interval_s=0,
            meter=self.meter,
            metrics=self.metrics,
        )
        self.service = Counting(Dispatcher(Routes(self.repository), self.metrics))
        self.versions: list[LoadedVersion] = []

    def _write(self, edition: int) -> None:
        FakeBackend.write(self._folder / "m" / "1", factor=2, inputs={"x": ["float32", [None, 1]]}, fail_load="")
        (self._folder / "m" / "1" / "edition").write_text("x" * edition, encoding="utf-8")

    async def keep_reloading(self) -> None:
        for edition in range(1, 1000):
            self.versions.append(self.repository.models["m"].loaded[1])
            self._backend.models.clear()
            await asyncio.sleep(0.4)
            self._write(edition)
            await self.repository.look()
            await self.repository.look()
            await self.repository.loaded()

    def queues(self) -> list[RequestQueue]:
        return [version._queue for version in self.versions]


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(what)


async def stress(
    folder: Path, batching: str, way: Any, outcomes: Counter[str], seconds: float = SECONDS
) -> list[weakref.ref[Any]]:
    """Returns the versions that there were, and their queues.

    Args:
        outcomes: counts how many requests ended in which way.
    """
    node, seed = Node(folder, batching), random.randrange(1 << 30)
    await node.repository.start()
    async with way(node.service) as call:
        reloading = asyncio.create_task(node.keep_reloading())
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(call, random.Random(seed + n), end, outcomes) for n in range(CLIENTS)))
        reloading.cancel()
        await asyncio.wait((reloading,))
    await node.repository.close(grace_s=10)
    assert reloading.cancelled()
    await until(lambda: not node.service.open, "exchanges that have not ended")
    await until(
        lambda: not any(thread.name.startswith("m/1#") for thread in threading.enumerate()),
        "model threads that have not ended",
    )
    for queue in node.queues():
        assert (queue.waiting(), queue._in_hand, queue._admission._begun) == (0, 0, {})
        assert not queue.gathering
    assert not node.meter._work
    assert len(asyncio.all_tasks()) == 1
    return [weakref.ref(each) for each in (*node.versions, *node.queues())]


@pytest.mark.parametrize(
    ("way", "batching"),
    [*((in_memory, batching) for batching in BATCHINGS), (by_grpcio, "together"), (by_grpcio, "held")],
)
async def test_nothing_is_left_of_clients_that_misbehave(
    tmp_path: Path, way: Any, batching: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    outcomes = Counter[str]()
    left = await stress(tmp_path, batching, way, outcomes)
    assert outcomes["answered"] > CLIENTS, outcomes
    await asyncio.sleep(1.2)  # as long as a queue's timer lasts
    gc.collect()
    assert not [each() for each in left if each() is not None], "a timer or a thread leads there"
