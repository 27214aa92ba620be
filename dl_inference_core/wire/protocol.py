"""Which protocol a method path speaks, where its routing key stands, and which codec reads the rest.

A gateway needs no more than this module: the key and the bytes. It imports neither numpy nor a codec.
"""

from __future__ import annotations

import importlib
import typing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from dl_inference_core.errors import BadRequest
from dl_inference_core.wire import messages

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dl_inference_core.tensors import Request, Response

    class Codec(typing.Protocol):
        """What every codec module offers. Arrays that come out of it may be read-only."""

        def decode_request(self, body: bytes) -> Request:
            """Raises:
            BadRequest: `body` is malformed, or asks for what is not served.
            """

        def encode_response(self, response: Response, request: Request) -> bytes:
            """The answer to `request`, in its form where that can hold it.

            Raises:
                TypeError: the protocol cannot hold the payload.
            """

        def encode_request(self, request: Request) -> bytes:
            """Raises:
            TypeError: the protocol cannot hold the payload.
            """

        def decode_response(self, body: bytes) -> Response:
            """Raises:
            BadRequest: `body` is malformed.
            """


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One wire protocol.

    Attributes:
        name: as in config and metrics.
        node_method: the method path at which nodes are called.
        read_key: the routing key of a request's bytes: a model's name, or a task id if Seldon's `taskId` is a
            number. Reads nothing else. Raises BadRequest: the bytes are malformed; the key is missing, empty, or of
            another kind.
        codec_at: where in `dl_inference_core.wire` its codec is, "module" or "module:attribute"; "" for a question
            about a model, which one that is served here answers in its own way.
    """

    name: str
    node_method: str
    read_key: Callable[[bytes], str | int]
    codec_at: str = ""

    @property
    def codec(self) -> Codec:
        """What decodes and encodes tensors; imported, and numpy with it, when first asked for."""
        module, _, attribute = self.codec_at.partition(":")
        found: Any = importlib.import_module(f"dl_inference_core.wire.{module}")
        return cast("Codec", getattr(found, attribute) if attribute else found)


# Where stepping over fields in Python overtakes protobuf's own parser, which copies unknown ones: parsing the key's
# envelope takes 1 µs at 600 B, 2 µs at 24 KB and 23 µs at 600 KB; `messages.fields` and then the envelope take 2 µs
# throughout.
_LARGE = 32_768


def _parse_key(envelope: Any, body: bytes, number: int, whole: Any) -> Any:
    if len(body) >= _LARGE and (fields := messages.fields(body, number)) is not None:
        return messages.parse(envelope, fields, whole)
    return messages.parse(envelope, body, whole)


def _read_tfserving_key(body: bytes) -> str:
    name: str = _parse_key(messages.PredictKey, body, 1, messages.PredictRequest).model_spec.name
    if not name:
        raise BadRequest("model_spec.name is missing or empty; expected the name of a model")
    return name


def _read_multi_inference_key(body: bytes) -> str:
    tasks = _parse_key(messages.MultiInferenceKey, body, 1, messages.MultiInferenceRequest).tasks
    names = {task.model_spec.name for task in tasks}
    if len(names) > 1:
        raise BadRequest("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
    name: str = names.pop() if names else ""
    if not name:
        raise BadRequest("tasks[0].model_spec.name is missing or empty; expected the name of a model")
    return name


def _read_openinference_key(body: bytes) -> str:
    name: str = _parse_key(messages.ModelInferKey, body, 1, messages.ModelInferRequest).model_name
    if not name:
        raise BadRequest("model_name is missing or empty; expected the name of a model")
    return name


def _read_seldon_key(body: bytes) -> str | int:
    tags = _parse_key(messages.SeldonKey, body, 2, messages.SeldonMessage).meta.tags
    if "taskId" not in tags:
        raise BadRequest('meta.tags["taskId"] is missing; expected a task id or the name of a model')
    return read_task(tags["taskId"])


def read_task(value: Any) -> str | int:
    """The task that a `taskId` (a google.protobuf.Value) names: an id if it is a number, or a string as it is.

    Raises:
        BadRequest: an empty string; a number that is not whole, or above 2**53, where doubles skip some; another
            kind.
    """
    kind = value.WhichOneof("kind")
    if kind == "string_value" and value.string_value:
        return cast("str", value.string_value)
    if kind == "number_value":
        number: float = value.number_value
        if number.is_integer() and abs(number) <= 2**53:
            return int(number)
        given = f"the number {number!r}"
    else:
        given = {
            None: "empty",
            "string_value": "an empty string",
            "null_value": "null",
            "bool_value": "a bool",
            "struct_value": "an object",
            "list_value": "a list",
        }[kind]
    raise BadRequest(f'meta.tags["taskId"] is {given}; expected a whole number or a non-empty string')


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

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                name="tfserving",
                node_method=f"{_TENSORFLOW}/Predict",
                read_key=_read_tfserving_key,
                codec_at="tfserving",
            ),
            Protocol(
                name="tfserving_classify",
                node_method=f"{_TENSORFLOW}/Classify",
                read_key=_read_tfserving_key,
                codec_at="tfserving_examples:CLASSIFY",
            ),
            Protocol(
                name="tfserving_regress",
                node_method=f"{_TENSORFLOW}/Regress",
                read_key=_read_tfserving_key,
                codec_at="tfserving_examples:REGRESS",
            ),
            Protocol(
                name="seldon",
                node_method="/seldon.protos.Model/Predict",
                read_key=_read_seldon_key,
                codec_at="seldon",
            ),
            Protocol(
                name="openinference",
                node_method=f"{_OPEN_INFERENCE}/ModelInfer",
                read_key=_read_openinference_key,
                codec_at="openinference",
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

METHODS: Mapping[str, Protocol] = MappingProxyType(
    {
        f"{_WPAI}/Predict": PROTOCOLS["tfserving"],
        f"{_WPAI}/PytorchPredict": PROTOCOLS["seldon"],
        f"{_WPAI}/CaffePredict": PROTOCOLS["seldon"],
        f"{_WPAI}/TisPredict": PROTOCOLS["openinference"],
        **{protocol.node_method: protocol for protocol in PROTOCOLS.values()},
        "/seldon.protos.Seldon/Predict": PROTOCOLS["seldon"],
        MULTI_INFERENCE.node_method: MULTI_INFERENCE,
    }
)
"""By the path of each method that infers."""

METADATA = Protocol(
    name="openinference_metadata",
    node_method=f"{_OPEN_INFERENCE}/ModelMetadata",
    read_key=_read_openinference_key,
)
"""`ModelMetadataRequest` has the model's name where `ModelInferRequest` has it."""

SIGNATURES = Protocol(
    name="tfserving_metadata",
    node_method=f"{_TENSORFLOW}/GetModelMetadata",
    read_key=_read_tfserving_key,
)

VERSIONS = Protocol(
    name="tfserving_status",
    node_method="/tensorflow.serving.ModelService/GetModelStatus",
    read_key=_read_tfserving_key,
)

QUESTIONS: tuple[Protocol, ...] = (METADATA, SIGNATURES, VERSIONS)
"""About one model: answered where it is."""
