"""Which protocol a method path speaks, and which functions and codec read its messages.

A gateway needs no more than this module: the key and the bytes. It imports neither numpy nor a codec.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

from dl_inference_core.errors import BadRequest
from dl_inference_core.wire import codecs, limits, messages
from dl_inference_core.wire.routing_keys import (
    OPENINFERENCE_FIELDS,
    SELDON_FIELDS,
    TFSERVING_FIELDS,
    KeyFields,
    RoutingKey,
    read_openinference_key,
    read_seldon_key,
    read_status_key,
    read_tfserving_key,
    read_transform_key,
)

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dl_inference_core.transport import Message
    from dl_inference_core.wire.codecs import Codec


@dataclass(frozen=True, slots=True)
class Queueing:
    """What a request says about its place in a model's queue.

    Attributes:
        priority: 1 is served first; 0 is the queue's default.
        timeout_s: the longest time in seconds that the request may wait in the queue; 0.0 means no limit.
    """

    priority: int = 0
    timeout_s: float = 0.0


NO_QUEUEING = Queueing()
"""What a request says that says nothing about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One wire protocol.

    Attributes:
        name: as in config and metrics.
        node_method: the method path at which nodes are called.
        read_key: the routing key of a request's bytes. Reads nothing else. Raises BadRequest: the bytes are malformed;
            the model is empty, of another kind, or missing where the protocol requires it. Raises ModelNotFound:
            GetModelStatus asks for the empty name.
        key_fields: where the key stands, for transports that read it themselves; None where only `read_key` can.
        codec_at: where its codec is, "module" or "module:attribute"; a module without a dot is one of
            `dl_inference_core.wire`. "" for a question about a model, which one that is served here answers in its own
            way.
        several: whether one call asks several of a model's signatures. Its codec is a `codecs.SeveralCodec` then.
        key_metadata: the metadata that may name the model of a request whose bytes hold no key; "" if the bytes always
            hold one.
        key_expected: how a client names a model, for the error message of a request that names none.
        allow_empty: whether an empty message is an answer: one whose fields all have their default values.
        read_queueing: what a request's bytes say about its place in a model's queue, where its key has `queueing`; None
            if the protocol has no words for that. Raises BadRequest: the bytes are malformed, or a value is of another
            kind or range.
    """

    name: str
    node_method: str
    read_key: Callable[[Message], RoutingKey]
    key_fields: KeyFields | None = None
    codec_at: str = ""
    several: bool = False
    key_metadata: str = ""
    key_expected: str = ""
    allow_empty: bool = False
    read_queueing: Callable[[bytes | memoryview], Queueing] | None = None

    @property
    def codec(self) -> Codec:
        """What decodes and encodes tensors; imported, and numpy with it, when first asked for."""
        return codecs.find(self.codec_at)


_PARAMETERS = 4
"""The field of a ModelInferRequest that holds its parameters."""


def _read_openinference_queueing(body: bytes | memoryview) -> Queueing:
    """The parameters `priority` and `timeout` (microseconds), of the types and ranges that Triton's gRPC server
    takes."""
    fields = messages.fields(body, _PARAMETERS)
    parameters = messages.parse(messages.ModelInferRequest, body if fields is None else fields).parameters
    priority = timeout_us = 0
    if "priority" in parameters:
        priority = _read_parameter(parameters["priority"], "priority", ("int64_param", "uint64_param"))
    if "timeout" in parameters:
        timeout_us = _read_parameter(parameters["timeout"], "timeout", ("int64_param",))
    return Queueing(priority, timeout_us / 1_000_000)


def _read_parameter(parameter: Any, name: str, kinds: tuple[str, ...]) -> int:
    kind = parameter.WhichOneof("parameter_choice")
    value: Any = None if kind is None else getattr(parameter, kind)
    if kind in kinds and value >= 0:
        return cast("int", value)
    given = "no value" if kind is None else f"{kind} {str(value)[:40]}"
    raise BadRequest(f'parameter "{name}" is {given}; expected a whole number of 0 or more in {" or ".join(kinds)}')


def well_formed(body: bytes) -> bool:
    """Whether `body` is a sequence of protobuf fields, and not an empty one. Looks at the top level only."""
    if not body:
        return False
    if len(body) >= limits.SMALL and messages.fields(body, 0) is not None:
        return True
    try:
        messages.parse(messages.Nothing, body)
    except BadRequest:
        return False
    return True


_TENSORFLOW = "/tensorflow.serving.PredictionService"
_OPEN_INFERENCE = "/inference.GRPCInferenceService"
_DEPLOYMENT = "seldon"
"""The metadata by which seldon-core's client tells an ingress the name of a deployment."""
_SELDON_EXPECTED = (
    'a task id or the name of a model in meta.tags["taskId"], or the name of a model in the gRPC metadata "seldon" '
    "(by REST: in the URL, /seldon/NAME/api/v1.0/predictions)"
)

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                name="tfserving",
                node_method=f"{_TENSORFLOW}/Predict",
                read_key=read_tfserving_key,
                key_fields=TFSERVING_FIELDS,
                codec_at="tfserving",
            ),
            Protocol(
                name="seldon",
                node_method="/seldon.protos.Model/Predict",
                read_key=read_seldon_key,
                key_fields=SELDON_FIELDS,
                codec_at="seldon",
                key_metadata=_DEPLOYMENT,
                key_expected=_SELDON_EXPECTED,
            ),
            Protocol(
                name="openinference",
                node_method=f"{_OPEN_INFERENCE}/ModelInfer",
                read_key=read_openinference_key,
                key_fields=OPENINFERENCE_FIELDS,
                codec_at="openinference",
                read_queueing=_read_openinference_queueing,
            ),
        )
    }
)
"""Those that infer, by name."""

_WPAI = "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService"

TRANSFORMS: tuple[Protocol, ...] = tuple(
    Protocol(
        name=f"seldon_transform_{which}",
        node_method=f"/seldon.protos.Generic/Transform{which.capitalize()}",
        read_key=read_transform_key,
        key_metadata=_DEPLOYMENT,
        key_expected=_SELDON_EXPECTED,
    )
    for which in ("input", "output")
)
"""What Seldon asks of transformers. A model's answer is the message itself: seldon-core's own server answers so for a
model that defines no transformation."""

TIS_PREDICT = f"{_WPAI}/TisPredict"

METHODS: Mapping[str, Protocol] = MappingProxyType(
    {
        f"{_WPAI}/Predict": PROTOCOLS["tfserving"],
        f"{_WPAI}/PytorchPredict": PROTOCOLS["seldon"],
        f"{_WPAI}/CaffePredict": PROTOCOLS["seldon"],
        TIS_PREDICT: PROTOCOLS["openinference"],
        **{protocol.node_method: protocol for protocol in PROTOCOLS.values()},
        "/seldon.protos.Seldon/Predict": PROTOCOLS["seldon"],
        **{transform.node_method: transform for transform in TRANSFORMS},
    }
)
"""The core's own, by the path of each method that infers or transforms."""

OPENINFERENCE_AS_REQUESTED = replace(PROTOCOLS["openinference"], codec_at="openinference:AS_REQUESTED")
"""ModelInfer, answered typed where the request was typed. TisPredict is always answered raw: its clients read nothing
else."""

RAW_OUTPUTS = ("x-dl-inference-outputs", "raw")
"""Metadata that goes on with a TisPredict call, which a gateway sends to nodes as ModelInfer: answer raw."""

METADATA = Protocol(
    name="openinference_metadata",
    node_method=f"{_OPEN_INFERENCE}/ModelMetadata",
    read_key=read_openinference_key,
    key_fields=OPENINFERENCE_FIELDS,
)
"""`ModelMetadataRequest` has the model's name where `ModelInferRequest` has it."""

SIGNATURES = Protocol(
    name="tfserving_metadata",
    node_method=f"{_TENSORFLOW}/GetModelMetadata",
    read_key=read_tfserving_key,
    key_fields=TFSERVING_FIELDS,
)

VERSIONS = Protocol(
    name="tfserving_status",
    node_method="/tensorflow.serving.ModelService/GetModelStatus",
    read_key=read_status_key,
    key_fields=TFSERVING_FIELDS,
)

READY = Protocol(
    name="openinference_ready",
    node_method=f"{_OPEN_INFERENCE}/ModelReady",
    read_key=read_openinference_key,
    key_fields=OPENINFERENCE_FIELDS,
    allow_empty=True,
)
"""`ModelReadyRequest` has the model's name and version where `ModelInferRequest` has them."""

QUESTIONS: tuple[Protocol, ...] = (METADATA, SIGNATURES, VERSIONS, READY)
"""About one model: answered where it is."""
