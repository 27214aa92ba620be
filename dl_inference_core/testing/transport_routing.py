"""What a transport may read of a request for the service: routing keys, entries of the metadata, hashes."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, ClassVar

import pytest

from dl_inference_core.errors import InferenceError
from dl_inference_core.testing.loopback import ECHO, DirectService, LoopbackConformance, asynchronous, connected
from dl_inference_core.transport import Exchange, Limits, Transport
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS, VERSIONS, Protocol
from dl_inference_core.wire.routing_keys import RoutingKey

_PADDING = b"\x7a\xff\xff\x03" + bytes(65_535)
"""Field 15, which no message has: makes a message large."""


def _predict(**spec: Any) -> bytes:
    body: bytes = messages.PredictRequest(model_spec=spec).SerializeToString()
    return body


def _seldon(**task: Any) -> bytes:
    message = messages.SeldonMessage(strData="x")
    message.meta.tags["other"].string_value = "y"
    for kind, value in task.items():
        setattr(message.meta.tags["taskId"], kind, value)
    body: bytes = message.SerializeToString()
    return body


_TFSERVING, _OPENINFERENCE, _SELDON = (PROTOCOLS[name] for name in ("tfserving", "openinference", "seldon"))
_INFER = messages.ModelInferRequest(model_name="m-69", id="i").SerializeToString()
_ASKING = messages.ModelInferRequest(model_name="m", parameters={"timeout": {"int64_param": 7}}).SerializeToString()
_INFER_VERSION = messages.ModelInferRequest(model_name="m", model_version="3").SerializeToString()

PLAIN: dict[str, tuple[Protocol, bytes, RoutingKey]] = {
    "tfserving": (_TFSERVING, _predict(name="m"), RoutingKey("m")),
    "tfserving version": (_TFSERVING, _predict(name="é-69", version={"value": 2**40}), RoutingKey("é-69", 2**40)),
    "tfserving version 0": (_TFSERVING, _predict(name="m", version={}), RoutingKey("m", 0)),
    "tfserving label": (_TFSERVING, _predict(name="m", version_label="stable"), RoutingKey("m", None, "stable")),
    "tfserving large": (_TFSERVING, _predict(name="m") + _PADDING, RoutingKey("m")),
    "tfserving status": (VERSIONS, _predict(name="m"), RoutingKey("m")),
    "openinference": (_OPENINFERENCE, _INFER, RoutingKey("m-69", "")),
    "openinference version": (_OPENINFERENCE, _INFER_VERSION + _PADDING, RoutingKey("m", "3")),
    "openinference parameters": (_OPENINFERENCE, _ASKING, RoutingKey("m", "", queueing=True)),
    "openinference large parameters": (_OPENINFERENCE, _ASKING + _PADDING, RoutingKey("m", "", queueing=True)),
    "seldon name": (_SELDON, _seldon(string_value="m"), RoutingKey("m")),
    "seldon number": (_SELDON, _seldon(number_value=69), RoutingKey(69)),
}
"""Messages of whose kind nearly all are, and their keys."""

UNUSUAL: dict[str, tuple[Protocol, bytes]] = {
    "tfserving empty": (_TFSERVING, b""),
    "tfserving no name": (_TFSERVING, _predict(signature_name="s")),
    "tfserving twice": (_TFSERVING, _predict(name="a") + _predict(name="b")),
    "tfserving merged": (_TFSERVING, _predict(name="a") + _predict(version={"value": 1})),
    "tfserving version and label": (_TFSERVING, _predict(version={"value": 1}) + _predict(name="m", version_label="l")),
    "tfserving cut": (_TFSERVING, _predict(name="model")[:-2]),
    "tfserving no UTF-8": (_TFSERVING, b"\x0a\x04\x0a\x02\xff\xff"),
    "tfserving wrong type": (_TFSERVING, b"\x0a\x02\x08\x01"),
    "tfserving no protobuf at the end": (_TFSERVING, _predict(name="m") + b"\xff"),
    "tfserving large and cut": (_TFSERVING, _predict(name="m") + _PADDING[:-1]),
    "status without a name": (VERSIONS, _predict(signature_name="s")),
    "openinference empty": (_OPENINFERENCE, messages.ModelInferRequest(id="i").SerializeToString()),
    "openinference twice": (_OPENINFERENCE, _INFER + _INFER_VERSION),
    "seldon no task": (_SELDON, _seldon()),
    "seldon empty name": (_SELDON, _seldon(string_value="")),
    "seldon half": (_SELDON, _seldon(number_value=0.5)),
    "seldon huge": (_SELDON, _seldon(number_value=2.0**60)),
    "seldon bool": (_SELDON, _seldon(bool_value=True)),
    "seldon twice": (_SELDON, _seldon(number_value=1) + _seldon(number_value=2)),
    "seldon merged": (_SELDON, _seldon(number_value=1) + _seldon()),
}
"""Messages that a transport may leave to the service."""


async def _received(transport: Transport, message: bytes, protocol: Protocol | None, **how: Any) -> Exchange:
    """The exchange of a client's call, whose method has the key of `protocol`."""
    seen: list[Exchange] = []

    def begin(exchange: Exchange) -> None:
        seen.append(exchange)
        exchange.reply(b"\x08\x01")

    await _call(transport, DirectService(begin, key=None if protocol is None else protocol.key_fields), message, **how)
    (exchange,) = seen
    return exchange


async def _call(transport: Transport, service: DirectService, message: bytes, **how: Any) -> None:
    """Have `service` served, and called once."""
    server = await transport.serve(service, ("127.0.0.1:0",), Limits())
    try:
        async with connected(transport, f"127.0.0.1:{server.ports[0]}") as connection:
            await connection.call(ECHO, message, timeout_s=10, **how)
    finally:
        await server.drain(0)


class RoutingConformance(LoopbackConformance):
    """The transport's readings agree with those of the core."""

    reads_keys: ClassVar[bool] = False
    """Whether the transport reads routing keys."""

    @pytest.mark.parametrize("name", PLAIN)
    @asynchronous
    async def test_a_routing_key_that_is_read_is_the_protocols(self, transport: Transport, name: str) -> None:
        protocol, message, expected = PLAIN[name]
        assert protocol.read_key(message) == expected
        exchange = await _received(transport, message, protocol)
        assert exchange.message == message
        assert exchange.key == (expected if self.reads_keys else None)

    @pytest.mark.parametrize("name", UNUSUAL)
    @asynchronous
    async def test_a_key_that_the_protocol_refuses_is_not_read(self, transport: Transport, name: str) -> None:
        protocol, message = UNUSUAL[name]
        try:
            expected = protocol.read_key(message)
        except InferenceError:
            expected = None
        exchange = await _received(transport, message, protocol)
        assert exchange.key in (None, expected)

    @asynchronous
    async def test_no_key_is_read_where_the_method_has_none(self, transport: Transport) -> None:
        assert (await _received(transport, _INFER, None)).key is None

    @asynchronous
    async def test_an_entry_of_the_metadata_is_found(self, transport: Transport) -> None:
        sent = (("x-one", "1"), ("x-two", "2"), ("x-one", "3"), ("bytes-bin", b"\xff\0"))
        exchange = await _received(transport, b"", None, metadata=sent)
        found = [exchange.find_metadata(key) for key in ("x-one", "x-two", "bytes-bin", "user-agent", "x-three")]
        assert found == ["1", "2", b"\xff\0", None, None]

    @asynchronous
    async def test_what_the_service_sets_as_metadata_is_found(self, transport: Transport) -> None:
        found: list[str | bytes | None] = []

        def begin(exchange: Exchange) -> None:
            exchange.metadata = (*exchange.metadata, ("x-set", "s"))
            found.append(exchange.find_metadata("x-set"))
            exchange.reply(b"\x08\x01")

        await _call(transport, DirectService(begin), b"")
        assert found == ["s"]

    @pytest.mark.parametrize("message", [b"", b"some bytes", bytes(range(256)) * 1000], ids=["empty", "short", "long"])
    @asynchronous
    async def test_a_messages_hash_is_blake2b(self, transport: Transport, message: bytes) -> None:
        exchange = await _received(transport, message, None)
        assert exchange.hash_message() == blake2b(message, digest_size=16).digest()
