"""A Python client for nodes and gateways: numpy arrays, bytes, text or JSON in and out, over any of the protocols."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from dl_inference_core import certificates
from dl_inference_core.config import ClientTls
from dl_inference_core.errors import BadRequest, Code, from_status
from dl_inference_core.grpcio_transport import GrpcioTransport, channel_credentials, name_options, size_options
from dl_inference_core.tensors import Form, Payload, Request, Response
from dl_inference_core.transport import Limits, Metadata
from dl_inference_core.wire.protocol import PROTOCOLS, Protocol

_FORMS = {
    "openinference": Form.TENSORS_RAW,
    "tfserving": Form.TENSORS,
}


def build(
    model: str | int,
    payload: Payload,
    *,
    protocol: str | None = None,
    form: Form | None = None,
    version: int | None = None,
    label: str = "",
    signature: str = "",
    outputs: Sequence[str] = (),
    names: Sequence[str] = (),
    tags: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    id: str = "",  # noqa: A002 - the protocols' own name
) -> tuple[Protocol, bytes]:
    """The request that `Client.predict` would send: its protocol and bytes.

    Raises:
        BadRequest: the protocol is none of ours, or cannot hold the payload.
    """
    named = isinstance(payload, Mapping) and all(isinstance(value, np.ndarray) for value in payload.values())
    name = protocol or ("openinference" if named else "seldon")
    known = PROTOCOLS if name in PROTOCOLS else _all_protocols()
    if name not in known:
        raise BadRequest(f'no installed plugin has the protocol "{name}"; expected one of {", ".join(known)}')
    request = Request(
        payload=payload,
        form=form or _FORMS.get(name) or _unnamed(payload),
        model=model,
        version=version,
        label=label,
        signature=signature,
        outputs=tuple(outputs),
        names=tuple(names),
        tags=tags or {},
        parameters=parameters or {},
        id=id,
    )
    try:
        return known[name], known[name].codec.encode_request(request)
    except TypeError as error:
        raise BadRequest(f"{name} cannot hold the payload: {error}") from error


@functools.cache
def _all_protocols() -> Mapping[str, Protocol]:
    """The protocols that a request can be written in, by name: the core's, and those of installed APIs."""
    from dl_inference_core.plugins import Kind, Plugins  # a client of the core's own protocols needs no plugin

    apis = Plugins().classes(Kind.APIS).values()
    further: Iterable[Protocol] = (each for api in apis for each in api.protocols.values() if not each.several)
    return {**PROTOCOLS, **{protocol.name: protocol for protocol in further}}


def _unnamed(payload: Payload) -> Form:
    if isinstance(payload, np.ndarray):
        return Form.NDARRAY if payload.dtype.kind in "OUS" else Form.TENSOR
    if isinstance(payload, bytes):
        return Form.BYTES
    return Form.TEXT if isinstance(payload, str) else Form.JSON


class Client:
    """A blocking client of one server; safe to use from several threads. Use it as a context manager, or `close` it.

    >>> with Client("127.0.0.1:8500") as client:
    ...     response = client.predict("mmoe", {"features": features})
    ...     response.payload["ctr"]
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 10.0,
        message_bytes: int = Limits().message_bytes,
        tls: ClientTls | None = None,
    ) -> None:
        """Args:
        address: "host:port" or "unix:/path".
        timeout_s: how long a call may take unless it says otherwise.
        message_bytes: largest message, in either direction.
        tls: whom to trust, and what to show; plaintext without.

        Raises:
            ConfigError: a file that `tls` names cannot be used.
        """
        self._timeout_s = timeout_s
        options: list[tuple[str, Any]] = [
            *size_options(Limits(message_bytes=message_bytes)),
            ("grpc.enable_http_proxy", 0),
        ]
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            credentials = channel_credentials(certificates.read(tls))
            self._channel = grpc.secure_channel(address, credentials, options=[*options, *name_options(tls, address)])

    def predict(
        self,
        model: str | int,
        payload: Payload,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **request: Any,
    ) -> Response:
        """Ask `model` (a name, or a task id) for its answer to `payload`.

        Args:
            payload: named tensors (a dict of arrays), one array, bytes, text, or JSON values; for
                "tfserving_classify" and "tfserving_regress", which the plugin dl-inference-tfserving brings, a list of
                examples, each a dict of features or serialized.
            timeout_s: the deadline of this call.
            metadata: goes along; "x-request-id" names the request in the server's log.
            request: `protocol` ("openinference" or "tfserving" for named tensors, "tfserving_classify" or
                "tfserving_regress" for examples, "seldon" for everything else), `form`, `version`, `label`,
                `signature`, `outputs`, `names`, `tags`, `parameters`, `id`, as in `tensors.Request`.

        Raises:
            InferenceError: by the status that came back: BadRequest, ModelNotFound, DeadlineExceeded, ….
        """
        protocol, body = build(model, payload, **request)
        method = self._channel.unary_unary(protocol.node_method)
        try:
            answer = method(body, timeout=self._timeout_s if timeout_s is None else timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise from_status(Code(error.code().value[0]), error.details() or "") from None
        return protocol.codec.decode_response(answer)

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """The same on an asyncio event loop, any number of calls at once."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 10.0,
        message_bytes: int = Limits().message_bytes,
        tls: ClientTls | None = None,
    ) -> None:
        """As `Client`; on the event loop that will use it."""
        self._timeout_s = timeout_s
        transport = GrpcioTransport(GrpcioTransport.Options())
        self._connection = transport.connect(address, Limits(message_bytes=message_bytes), tls)

    async def predict(
        self,
        model: str | int,
        payload: Payload,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **request: Any,
    ) -> Response:
        """As `Client.predict`. Cancelling it cancels the call at the server."""
        protocol, body = build(model, payload, **request)
        answer = await self._connection.call(
            protocol.node_method,
            body,
            metadata=metadata,
            timeout_s=self._timeout_s if timeout_s is None else timeout_s,
        )
        return protocol.codec.decode_response(bytes(answer.message))

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
