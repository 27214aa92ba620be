"""The client, against a server that answers with what it was sent."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dl_inference_tfserving.protocols import CLASSIFY, REGRESS

from dl_inference_core.client import AsyncClient, Client, build
from dl_inference_core.config import ClientTls, ServerTls
from dl_inference_core.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    InferenceError,
    ModelNotFound,
    NodeUnreachable,
    Overloaded,
)
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.tensors import Form, Response
from dl_inference_core.testing.loopback import CoroutineService
from dl_inference_core.testing.transport_tls import Authority
from dl_inference_core.transport import Exchange, Limits, Server
from dl_inference_core.wire.protocol import PROTOCOLS

TENSORS = {"x": np.arange(6, dtype=np.int64).reshape(2, 3), "y": np.array([True, False])}
KNOWN = {**PROTOCOLS, CLASSIFY.name: CLASSIFY, REGRESS.name: REGRESS}
PAYLOADS: list[tuple[str, Any]] = [
    ("openinference", TENSORS),
    ("tfserving", TENSORS),
    ("seldon", np.array([[1.5, 2.5]])),
    ("seldon", np.array([[b"a", b"b"]], dtype=object)),
    ("seldon", b"\x00\xff"),
    ("seldon", "text"),
    ("seldon", {"a": [1.0, None], "b": {"c": True}}),
]


class Echo:
    """Answers in each protocol with the request's payload, examples by how many bytes they have; `raises` or `waits`
    instead, where set."""

    def __init__(self) -> None:
        self.raises: InferenceError | None = None
        self.waits = False
        self.calls: list[Exchange] = []

    def service(self) -> CoroutineService:
        def handler(codec: Any) -> Any:
            async def answer(exchange: Exchange) -> bytes:
                self.calls.append(exchange)
                if self.raises is not None:
                    raise self.raises
                if self.waits:
                    await asyncio.Event().wait()
                request = codec.decode_request(exchange.message)
                payload = request.payload
                if request.form is Form.EXAMPLES:
                    sizes = np.array([len(example) for example in payload], np.float32)
                    payload = {"outputs": sizes, "scores": sizes[:, None]}
                return codec.encode_response(Response(payload=payload, tags=request.tags), request)

            return answer

        return CoroutineService({protocol.node_method: handler(protocol.codec) for protocol in KNOWN.values()})

    async def serve(self, tls: ServerTls | None = None) -> tuple[Server, str]:
        transport = GrpcioTransport(GrpcioTransport.Options())
        server = await transport.serve(self.service(), ("127.0.0.1:0",), Limits(), tls=tls)
        return server, f"127.0.0.1:{server.ports[0]}"


@pytest.mark.parametrize(("protocol", "payload"), PAYLOADS)
@pytest.mark.parametrize("blocking", [True, False])
async def test_what_goes_out_comes_back(protocol: str, payload: Any, blocking: bool) -> None:
    server, address = await Echo().serve()
    if blocking:
        with Client(address) as client:
            response = await asyncio.to_thread(client.predict, "m", payload, protocol=protocol)
    else:
        async with AsyncClient(address) as async_client:
            response = await async_client.predict("m", payload, protocol=protocol)
    np.testing.assert_equal(response.payload, payload)
    await server.drain(1)


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (
            "tfserving_classify",
            {"classes": np.array([[b""], [b""]], object), "scores": np.array([[17], [9]], np.float32)},
        ),
        ("tfserving_regress", {"outputs": np.array([17, 9], np.float32)}),
    ],
)
async def test_examples_go_out_as_features_or_serialized(protocol: str, expected: dict[str, Any]) -> None:
    echo = Echo()
    server, address = await echo.serve()
    examples: Any = [{"x": 1.5}, b"\x0a\x05\x0a\x03\x0a\x01a"]
    with Client(address) as client:
        asking = asyncio.to_thread(client.predict, "m", examples, protocol=protocol, label="stable", signature="s")
        np.testing.assert_equal((await asking).payload, expected)
    async with AsyncClient(address) as async_client:
        np.testing.assert_equal((await async_client.predict("m", examples, protocol=protocol)).payload, expected)
    request = KNOWN[protocol].codec.decode_request(echo.calls[0].message)
    assert (request.label, request.signature) == ("stable", "s")
    await server.drain(1)


def test_a_label_goes_along() -> None:
    for protocol in ("tfserving", "tfserving_regress"):
        payload: Any = TENSORS if protocol == "tfserving" else [{}]
        built, body = build("m", payload, protocol=protocol, label="stable")
        request = built.codec.decode_request(body)
        assert (request.label, request.version) == ("stable", None)


async def test_tags_metadata_and_the_task_go_along() -> None:
    echo = Echo()
    server, address = await echo.serve()
    async with AsyncClient(address) as client:
        response = await client.predict(69, b"x", tags={"user": "u"}, metadata=(("x-request-id", "7"),))
    assert response.tags == {"user": "u", "taskId": 69.0}
    assert ("x-request-id", "7") in echo.calls[0].metadata
    await server.drain(1)


@pytest.mark.parametrize("error", [BadRequest("no"), ModelNotFound("none"), Overloaded("full")])
async def test_a_status_becomes_an_exception(error: InferenceError) -> None:
    echo = Echo()
    echo.raises = error
    server, address = await echo.serve()
    with Client(address) as client, pytest.raises(InferenceError, match=str(error)) as caught:
        await asyncio.to_thread(client.predict, "m", b"x")
    assert caught.value.code is error.code
    async with AsyncClient(address) as async_client:
        with pytest.raises(type(caught.value), match=str(error)):
            await async_client.predict("m", b"x")
    await server.drain(1)


async def test_a_deadline_is_kept_and_passed_on() -> None:
    echo = Echo()
    echo.waits = True
    server, address = await echo.serve()
    with Client(address, timeout_s=0.2) as client, pytest.raises(DeadlineExceeded):
        await asyncio.to_thread(client.predict, "m", b"x")
    async with AsyncClient(address) as async_client:
        with pytest.raises(DeadlineExceeded):
            await async_client.predict("m", b"x", timeout_s=0.2)
    assert all(call.deadline is not None for call in echo.calls)
    await server.drain(1)


async def test_nobody_there_is_an_exception_too() -> None:
    server, address = await Echo().serve()
    await server.drain(0)
    with Client(address) as client, pytest.raises(NodeUnreachable):
        await asyncio.to_thread(client.predict, "m", b"x")


async def test_tls_is_spoken_with_whom_it_says(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    server, address = await Echo().serve(ours.issue("node.test").server(clients=other))
    right = ours.client(other.issue("client"), server_name="node.test")
    for wrong in (None, ours.client(server_name="node.test"), right.model_copy(update={"server_name": None})):
        with Client(address, tls=wrong) as client, pytest.raises(NodeUnreachable):
            await asyncio.to_thread(client.predict, "m", b"x")
        async with AsyncClient(address, tls=wrong) as async_client:
            with pytest.raises(NodeUnreachable):
                await async_client.predict("m", b"x")
    with Client(address, tls=right) as client:
        assert (await asyncio.to_thread(client.predict, "m", b"x")).payload == b"x"
    async with AsyncClient(address, tls=right) as async_client:
        assert (await async_client.predict("m", b"x")).payload == b"x"
    await server.drain(1)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_a_file_that_cannot_be_used_is_said_before_anything_is_sent(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: No such file"):
        kind("127.0.0.1:1", tls=ClientTls(ca=tmp_path / "none"))


def test_what_a_protocol_cannot_hold_is_said_before_anything_is_sent() -> None:
    with pytest.raises(BadRequest, match="no installed plugin has the protocol"):
        build("m", b"x", protocol="rest")
    with pytest.raises(BadRequest, match="tfserving cannot hold"):
        build("m", {"x": [1, None]}, protocol="tfserving")
    for payload in (TENSORS, np.ones(3), [{"x": None}], [{"x": 2**70}], b"x"):
        with pytest.raises(BadRequest, match="tfserving_classify cannot hold"):
            build("m", payload, protocol="tfserving_classify")
