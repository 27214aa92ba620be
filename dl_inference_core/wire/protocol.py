"""Which protocol a method path speaks, where its routing key stands, and which codec reads the rest.

A gateway needs no more than this module: the key and the bytes. It imports neither numpy nor a codec.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

from dl_inference_core.errors import BadRequest, ModelNotFound
from dl_inference_core.wire import codecs, limits, messages

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dl_inference_core.transport import Message
    from dl_inference_core.wire.codecs import Codec


class RoutingKey(typing.NamedTuple):
    """Which model a request is for, as the request says it.

    Attributes:
        model: the name of a model; a task id if the request gives a number; None if the request names no model and its
            protocol allows that.
        version: the version asked for: a number, or Open Inference's text; None or "" is the newest version.
        label: the label of the version asked for, where `version` is None; "" if the request gives no label.
    """

    model: str | int | None
    version: int | str | None = None
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFields:
    """Where a routing key stands in a request, as paths of field numbers: for a reader that is not in Python.

    Attributes:
        model: of a string; where `map_key` is set, of a `map<string, google.protobuf.Value>`.
        version: of a string or a google.protobuf.Int64Value; () if the requests have no version.
        version_is_text: whether the version is a string.
        label: of a string, in a oneof with the version; () if the requests have no label.
        map_key: the key under which the map names the model by a string or a whole number.
    """

    model: tuple[int, ...]
    version: tuple[int, ...] = ()
    version_is_text: bool = False
    label: tuple[int, ...] = ()
    map_key: str = ""


_MODEL_SPEC = KeyFields(model=(1, 1), version=(1, 2), label=(1, 4))
_MODEL_NAME = KeyFields(model=(1,), version=(2,), version_is_text=True)
_TASK_ID = KeyFields(model=(2, 2), map_key="taskId")


@dataclass(frozen=True, slots=True)
class Queueing:
    """What a request says about its place in a model's queue.

    Attributes:
        priority: 1 is served first; 0 is the queue's default.
        timeout_s: the longest time in seconds that the request may wait in the queue; 0.0 means no limit.
    """

    priority: int = 0
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One wire protocol.

    Attributes:
        name: as in config and metrics.
        node_method: the method path at which nodes are called.
        read_key: the routing key of a request's bytes. Reads nothing else. Raises BadRequest: the bytes are malformed;
            the model is empty, of another kind, or missing where the protocol requires it. Raises ModelNotFound:
            GetModelStatus asks for the empty name.
        key_fields: where the key stands. Another reader may find it there, but only `read_key` says that it is wrong or
            missing. None: only `read_key` can read it.
        codec_at: where in `dl_inference_core.wire` its codec is, "module" or "module:attribute"; "" for a question
            about a model, which one that is served here answers in its own way.
        key_metadata: the metadata that may name the model of a request whose bytes hold no key; "" if the bytes always
            hold one.
        key_expected: how a client names a model, for the error message of a request that names none.
        allow_empty: whether an empty message is an answer: one whose fields all have their default values.
        read_queueing: what a request's bytes say about its place in a model's queue; None if the protocol has no words
            for that. Raises BadRequest: the bytes are malformed, or a value is of another kind or range.
    """

    name: str
    node_method: str
    read_key: Callable[[Message], RoutingKey]
    key_fields: KeyFields | None = None
    codec_at: str = ""
    key_metadata: str = ""
    key_expected: str = ""
    allow_empty: bool = False
    read_queueing: Callable[[bytes | memoryview], Queueing] | None = None

    @property
    def codec(self) -> Codec:
        """What decodes and encodes tensors; imported, and numpy with it, when first asked for."""
        return codecs.find(self.codec_at)


# From here on protobuf is given the field of the key alone, so that `messages.parse` has little to count. Parsing the
# envelope takes 1 µs at 600 B and 23 µs at 600 KB; `messages.fields` and then the envelope take 2 µs throughout.
_LARGE = limits.SMALL


# The first words are TensorFlow Serving's.
_NO_SPEC = "Missing ModelSpec: model_spec is missing; expected the name of a model in model_spec.name"
_NO_NAME = "ModelSpec has no name specified. model_spec.name is missing or empty; expected the name of a model"


def _parse_key(envelope: Any, body: Message, whole: Any, *numbers: int) -> Any:
    if len(body) >= _LARGE and (fields := messages.fields(body, *numbers)) is not None:
        return messages.parse(envelope, fields, whole)
    return messages.parse(envelope, body, whole)


def _read_tfserving_key(body: Message) -> RoutingKey:
    key = _parse_key(messages.PredictKey, body, messages.PredictRequest, 1)
    if not key.model_spec.name:
        raise BadRequest(_NO_NAME if key.HasField("model_spec") else _NO_SPEC)
    return _key_of(key.model_spec)


def _key_of(spec: Any) -> RoutingKey:
    return RoutingKey(spec.name, spec.version.value if spec.HasField("version") else None, spec.version_label)


def _read_status_key(body: Message) -> RoutingKey:
    """Raises:
    ModelNotFound: the name is empty: TensorFlow Serving looks even that one up.
    """
    key = messages.parse(messages.PredictKey, body, messages.GetModelStatusRequest)
    if not key.HasField("model_spec"):
        raise BadRequest(_NO_SPEC)
    if not key.model_spec.name:
        raise ModelNotFound("Could not find any versions of model ; model_spec.name is empty")
    return _key_of(key.model_spec)


def _read_multi_inference_key(body: Message) -> RoutingKey:
    """The key of the first task, which says the version for all tasks."""
    tasks = _parse_key(messages.MultiInferenceKey, body, messages.MultiInferenceRequest, 1).tasks
    names = {task.model_spec.name for task in tasks}
    if len(names) > 1 and "" in names:
        raise BadRequest("Found ModelSpec with an empty model name.")
    if len(names) > 1:
        raise BadRequest("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
    if not names or "" in names:
        raise BadRequest(_NO_NAME)
    return _key_of(tasks[0].model_spec)


def _read_openinference_key(body: Message) -> RoutingKey:
    key = _parse_key(messages.ModelInferKey, body, messages.ModelInferRequest, 1, 2)
    if not key.model_name:
        raise BadRequest("model_name is missing or empty; expected the name of a model")
    return RoutingKey(key.model_name, key.model_version)


_NO_QUEUEING = Queueing()
_SEARCHED = 1024
_PARAMETERS = 4
"""The field of a ModelInferRequest that holds its parameters."""


def _read_openinference_queueing(body: bytes | memoryview) -> Queueing:
    """The parameters `priority` and `timeout` (microseconds), of the types and ranges that Triton's gRPC server takes.

    Most requests have neither. A small one is searched for the two words, which takes 1 µs at 400 B and 20 µs at 24 KB;
    the fields of a larger one are stepped over, which takes 2 µs whatever its size.
    """
    if len(body) < _SEARCHED:
        body = bytes(body)
        if b"priority" not in body and b"timeout" not in body:
            return _NO_QUEUEING
    fields = messages.fields(body, _PARAMETERS)
    if not fields and fields is not None:
        return _NO_QUEUEING
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


def _read_seldon_key(body: Message) -> RoutingKey:
    tags = _parse_key(messages.SeldonKey, body, messages.SeldonMessage, 2).meta.tags
    return RoutingKey(read_task(tags["taskId"]) if "taskId" in tags else None)


def _read_transform_key(body: Message) -> RoutingKey:
    """As `_read_seldon_key`; refuses a message without a payload, which is not an answer either."""
    if messages.parse(messages.SeldonMessage, body).WhichOneof("data_oneof") is None:
        raise BadRequest("the message has no payload; expected data, binData, strData, jsonData or customData")
    return _read_seldon_key(body)


def read_task(value: Any) -> str | int:
    """The task that a `taskId` (a google.protobuf.Value) names: an id if it is a number, or a string as it is.

    Raises:
        BadRequest: as `task_of`; or nothing is set in it.
    """
    match value.WhichOneof("kind"):
        case "string_value":
            return task_of(value.string_value)
        case "number_value":
            return task_of(value.number_value)
        case "bool_value":
            return task_of(value.bool_value)
        case "null_value":
            return task_of(None)
        case "struct_value":
            return task_of({})
        case "list_value":
            return task_of([])
        case _:
            raise _no_task("empty")


def task_of(value: Any) -> str | int:
    """The task that a `taskId`, as Python has JSON, names.

    Raises:
        BadRequest: an empty string; a number that is not whole, or above 2**53, where doubles skip some; another
            kind.
    """
    match value:
        case str() if value:
            return value
        case bool():
            given = "a bool"
        case int() | float():
            if abs(value) <= 2**53 and value == int(value):
                return int(value)
            given = f"the number {value!r:.100}"
        case str():
            given = "an empty string"
        case None:
            given = "null"
        case list():
            given = "a list"
        case _:
            given = "an object"
    raise _no_task(given)


def _no_task(given: str) -> BadRequest:
    return BadRequest(f'meta.tags["taskId"] is {given}; expected a whole number or a non-empty string')


def well_formed(body: bytes) -> bool:
    """Whether `body` is a sequence of protobuf fields, and not an empty one. Looks at the top level only."""
    if not body:
        return False
    if len(body) >= _LARGE and messages.fields(body, 0) is not None:
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
                read_key=_read_tfserving_key,
                key_fields=_MODEL_SPEC,
                codec_at="tfserving",
            ),
            Protocol(
                name="tfserving_classify",
                node_method=f"{_TENSORFLOW}/Classify",
                read_key=_read_tfserving_key,
                key_fields=_MODEL_SPEC,
                codec_at="tfserving_examples:CLASSIFY",
            ),
            Protocol(
                name="tfserving_regress",
                node_method=f"{_TENSORFLOW}/Regress",
                read_key=_read_tfserving_key,
                key_fields=_MODEL_SPEC,
                codec_at="tfserving_examples:REGRESS",
            ),
            Protocol(
                name="seldon",
                node_method="/seldon.protos.Model/Predict",
                read_key=_read_seldon_key,
                key_fields=_TASK_ID,
                codec_at="seldon",
                key_metadata=_DEPLOYMENT,
                key_expected=_SELDON_EXPECTED,
            ),
            Protocol(
                name="openinference",
                node_method=f"{_OPEN_INFERENCE}/ModelInfer",
                read_key=_read_openinference_key,
                key_fields=_MODEL_NAME,
                codec_at="openinference",
                read_queueing=_read_openinference_queueing,
            ),
        )
    }
)
"""Those that infer, by name."""

_WPAI = "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService"

MULTI_INFERENCE = Protocol(
    name="tfserving_multi_inference",
    node_method=f"{_TENSORFLOW}/MultiInference",
    read_key=_read_multi_inference_key,
)
"""Several of a model's signatures asked at once."""

TRANSFORMS: tuple[Protocol, ...] = tuple(
    Protocol(
        name=f"seldon_transform_{which}",
        node_method=f"/seldon.protos.Generic/Transform{which.capitalize()}",
        read_key=_read_transform_key,
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
        MULTI_INFERENCE.node_method: MULTI_INFERENCE,
        **{transform.node_method: transform for transform in TRANSFORMS},
    }
)
"""By the path of each method that infers or transforms."""

OPENINFERENCE_AS_REQUESTED = replace(PROTOCOLS["openinference"], codec_at="openinference:AS_REQUESTED")
"""ModelInfer, answered typed where the request was typed. TisPredict is always answered raw: its clients read nothing
else."""

RAW_OUTPUTS = ("x-dl-inference-outputs", "raw")
"""Metadata that goes on with a TisPredict call, which a gateway sends to nodes as ModelInfer: answer raw."""

METADATA = Protocol(
    name="openinference_metadata",
    node_method=f"{_OPEN_INFERENCE}/ModelMetadata",
    read_key=_read_openinference_key,
    key_fields=_MODEL_NAME,
)
"""`ModelMetadataRequest` has the model's name where `ModelInferRequest` has it."""

SIGNATURES = Protocol(
    name="tfserving_metadata",
    node_method=f"{_TENSORFLOW}/GetModelMetadata",
    read_key=_read_tfserving_key,
    key_fields=_MODEL_SPEC,
)

VERSIONS = Protocol(
    name="tfserving_status",
    node_method="/tensorflow.serving.ModelService/GetModelStatus",
    read_key=_read_status_key,
    key_fields=_MODEL_SPEC,
)

READY = Protocol(
    name="openinference_ready",
    node_method=f"{_OPEN_INFERENCE}/ModelReady",
    read_key=_read_openinference_key,
    key_fields=_MODEL_NAME,
    allow_empty=True,
)
"""`ModelReadyRequest` has the model's name and version where `ModelInferRequest` has them."""

QUESTIONS: tuple[Protocol, ...] = (METADATA, SIGNATURES, VERSIONS, READY)
"""About one model: answered where it is."""
