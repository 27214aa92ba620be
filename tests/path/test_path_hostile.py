"""Hostile clients: who behaves is answered meanwhile, memory is bounded, no node is blamed, and the log stays empty."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from bench.faults import attacks
from dl_inference_core.client import build

PREDICT = "/tensorflow.serving.PredictionService/Predict"
CALL = build("linear", {"x": np.array([[1, 2, 3]], np.float32)}, protocol="tfserving")[1]
REQUESTS = {
    PREDICT: CALL,
    "/inference.GRPCInferenceService/ModelInfer": build("linear", {"x": np.array([[1, 2, 3]], np.float32)})[1],
    "/seldon.protos.Model/Predict": build(7, np.array([[1.0, 2.0, 3.0]]))[1],
}
LIMIT = 4 * 1024 * 1024
MB = 1_000_000


@pytest.fixture(scope="module")
def front(serve: Any, routes: Any, node: Any) -> Iterator[Any]:
    """A gateway that nobody else looks at, and that lets slow clients stay for longer than any test takes. On a busy
    machine the attacker, too, may answer the pings of a server late: those that ask whether it lives, and those that
    measure how much gRPC may be sent at once. The node may answer probes late."""
    patient = "transport_options = { headers_timeout_s = 300, keepalive_s = 300, keepalive_timeout_s = 300 }"
    probes = "[gateway.health]\ntimeout_ms = 30_000"
    front = serve(f"message_bytes = {LIMIT}\n{patient}\n{probes}\n{routes({'linear': 7}, node)}")
    front.call(PREDICT, CALL)
    yield front
    front.end()


def channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    )


@asynccontextmanager
async def unharmed(front: Any, attack: Any, more_bytes: int) -> AsyncIterator[tuple[attacks.Tally, Any]]:
    """While `attack` goes on, calls on a connection that was there and on new ones are answered, memory grows by less
    than `more_bytes`, nothing is logged, and the node is blamed for nothing."""
    log, attempts, memory = front.text(), front.attempts(), front.resident()
    async with channel(front.address) as before:
        call = before.unary_unary(PREDICT)
        await call(CALL, timeout=20)
        async with attack as tally:
            yield tally, call
            for _ in range(10):
                async with channel(front.address) as new:
                    await new.unary_unary(PREDICT)(CALL, timeout=20)
                await asyncio.gather(*(call(CALL, timeout=20) for _ in range(10)))
            assert front.resident() - memory < more_bytes
        await call(CALL, timeout=20)
    assert front.text() == log
    blamed = {outcome for outcome, count in front.attempts().items() if count > attempts.get(outcome, 0)}
    assert blamed <= {"success", "neutral"}


@pytest.mark.parametrize("kind", ["silent", "headers", "body", "window"])
async def test_p4_slow_connections(front: Any, kind: attacks.Slow) -> None:
    slow = attacks.slow_connections(front.address, 500, kind, method=PREDICT, message=CALL)
    async with unharmed(front, slow, 50 * MB) as (tally, _):
        assert tally.connections == 500
    assert tally.closed == 0


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(lambda address: attacks.rapid_reset(address, 500, method=PREDICT, message=CALL), id="of Predict"),
        pytest.param(lambda address: attacks.rapid_reset(address, 500), id="of Check"),
        pytest.param(attacks.ping_flood, id="pings"),
        pytest.param(attacks.settings_flood, id="settings"),
        pytest.param(attacks.endless_headers, id="headers"),
    ],
)
async def test_p5_floods(front: Any, flood: Callable[[str], Any]) -> None:
    async with unharmed(front, flood(front.address), 50 * MB) as (tally, call):
        end = time.monotonic() + 20
        while tally.sent < 1000 and tally.closed < 3:
            assert time.monotonic() < end
            await call(CALL, timeout=20)


def damaged(random: Random, content: bytes, begin: int = 0) -> bytes:
    """`content` with one to four changes after `begin`."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(begin, len(changed) + 1)
        changed[at : at + random.choice((0, 1, 1, 9))] = random.randbytes(random.choice((0, 1, 1, 4)))
    return bytes(changed)


@asynccontextmanager
async def nothing() -> AsyncIterator[attacks.Tally]:
    yield attacks.Tally()


async def test_p3_damaged_messages(front: Any) -> None:
    """What the gateway passes on of them, since it reads the key alone, the node refuses, and is not blamed for it."""
    random = Random(1)
    codes: Counter[str] = Counter()
    async with unharmed(front, nothing(), 50 * MB), channel(front.address) as client:

        async def send(method: str, request: bytes) -> None:
            body = damaged(random, request)
            codes[(await client.unary_unary(method)(body, timeout=20).code()).name] += 1

        for _ in range(50):
            await asyncio.gather(*(send(*item) for item in REQUESTS.items() for _ in range(20)))
    assert codes.keys() <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}
    assert codes["INVALID_ARGUMENT"] > 1000


async def test_p3_damaged_connections(front: Any, transport: str) -> None:
    """A path that is no UTF-8 ends grpcio's server: ours starts it again, and a call that crosses with it is lost."""
    random = Random(2)
    whole = attacks.session(PREDICT, CALL)
    loop = asyncio.get_running_loop()
    host, _, port = front.address.rpartition(":")
    log, memory = front.text(), front.resident()

    async def connect() -> None:
        with socket.socket() as client, suppress(OSError):
            client.setblocking(False)
            await loop.sock_connect(client, (host, int(port)))
            await loop.sock_sendall(client, damaged(random, whole, random.choice((0, 24, 24, 24))))
            client.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(client, 65536):
                pass

    async def answered(client: grpc.aio.Channel) -> None:
        end = loop.time() + (10 if transport == "grpcio" else 0)
        while True:
            try:
                await client.unary_unary(PREDICT)(CALL, timeout=20)
            except grpc.aio.AioRpcError:
                if loop.time() > end:
                    raise
                await asyncio.sleep(0.02)
            else:
                return

    async with channel(front.address) as client:
        for _ in range(20):
            await asyncio.gather(*(connect() for _ in range(50)))
            await answered(client)
        assert front.resident() - memory < 50 * MB
    assert front.attempts().keys() <= {"success", "neutral"}
    if transport != "grpcio":
        assert front.text() == log


@pytest.mark.parametrize("kind", ["announced", "sent", "bomb"])
async def test_p2_messages_that_are_too_large(front: Any, kind: attacks.Large) -> None:
    oversized = attacks.oversized(front.address, kind, method=PREDICT, message_bytes=60 * MB, at_once=2)
    async with unharmed(front, oversized, 2 * 2 * LIMIT + 10 * MB) as (tally, call):
        end = time.monotonic() + 20
        while tally.sent < 10:
            assert time.monotonic() < end
            await call(CALL, timeout=20)
    assert tally.statuses == Counter({"8": tally.sent})  # RESOURCE_EXHAUSTED


FILES = 128


@pytest.fixture(scope="module")
def narrow(serve: Any, routes: Any, node: Any) -> Iterator[Any]:
    """A gateway that may have only FILES files open."""
    few = (FILES, FILES)
    narrow = serve(routes({"linear": 7}, node), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few))
    narrow.call(PREDICT, CALL)
    yield narrow
    narrow.end()


async def answered_in_s(address: str) -> float:
    """How long a call on a new connection takes."""
    began = time.monotonic()
    async with channel(address) as new:
        await new.unary_unary(PREDICT)(CALL, timeout=20, wait_for_ready=True)
    return time.monotonic() - began


async def test_r1_no_more_connections_are_taken_than_there_are_files_for(narrow: Any, transport: str) -> None:
    assert (
        "the limit on open files (ulimit -n) leaves room for 64 connections of clients, 16 of them to http_port, "
        "not 11000"
    ) in narrow.text()
    async with channel(narrow.address) as client:
        call = client.unary_unary(PREDICT)
        await call(CALL, timeout=20)
        async with attacks.slow_connections(narrow.address, 2 * FILES, "headers"):
            for _ in range(20):
                await call(CALL, timeout=20)
            async with channel(narrow.address) as new:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await new.unary_unary(PREDICT)(CALL, timeout=10)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await answered_in_s(narrow.address) < 5
        await call(CALL, timeout=20)
    refused = narrow.counts("dl_inference_refusals_total").get('{port="grpc",reason="connections"}')
    if transport == "native":
        assert refused is not None
        assert refused >= 2 * FILES - 64
    else:
        assert refused is None, "grpcio does not say"


@pytest.mark.parametrize("kind", ["silent", "headers"])
async def test_r1_slow_connections_to_http_take_no_files_from_grpc(narrow: Any, kind: Any) -> None:
    async with attacks.slow_connections(narrow.metrics.split("/")[2], 2 * FILES, kind):
        for _ in range(5):
            assert await answered_in_s(narrow.address) < 5
        refused = narrow.counts("dl_inference_refusals_total")
        assert refused['{port="http",reason="connections"}'] >= FILES // 2


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux can change the limits of a running process")
@pytest.mark.parametrize("where", ["gRPC", "HTTP"])
async def test_r1_who_is_connected_is_answered_when_no_file_is_left(front: Any, where: str) -> None:
    """When there are files again, so is whoever connects: at once, or with grpcio within the second that it waits."""
    address = front.address if where == "gRPC" else front.metrics.split("/")[2]
    async with channel(front.address) as client:
        call = client.unary_unary(PREDICT)
        await call(CALL, timeout=20)
        with front.files(FILES):
            async with attacks.slow_connections(address, 2 * FILES, "silent"):
                for _ in range(20):
                    await call(CALL, timeout=20)
                async with channel(front.address) as new:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await new.unary_unary(PREDICT)(CALL, timeout=0.5)
            assert await answered_in_s(front.address) < 5
        await call(CALL, timeout=20)
