"""The routing key of a request: where it stands in the message, and the functions that read it.

A transport may read keys itself, by `KeyFields`. The functions here are the reference. They alone say what is wrong
with a message.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from dl_inference_core.errors import BadRequest, ModelNotFound
from dl_inference_core.wire import limits, messages

if typing.TYPE_CHECKING:
    from dl_inference_core.transport import Message


class RoutingKey(typing.NamedTuple):
    """Which model a request is for, as the request says it.

    Attributes:
        model: the name of a model; a task id if the request gives a number; None if the request names no model and its
            protocol allows that.
        version: the version asked for: a number, or Open Inference's text; None or "" is the newest version.
        label: the label of the version asked for, where `version` is None; "" if the request gives no label.
        queueing: whether the request may say something of its place in a queue, which `Protocol.read_queueing` reads.
    """

    model: str | int | None
    version: int | str | None = None
    label: str = ""
    queueing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFields:
    """Where the routing key stands in the messages of one protocol, for transports that read it without Python.

    A path is the numbers of fields from the outermost message inwards. All of them but the last are submessages.

    Attributes:
        model: the path of the model's name, a string; () where the model stands in `tags`.
        version: the path of the version, a string or an int64; () where the protocol has none.
        label: the path of the version's label, a string; likewise.
        tags: the path of a map of strings to google.protobuf.Value; () where the model stands in `model`.
        task: the key in that map of the task.
        queueing: the number of a top-level field of submessages. `RoutingKey.queueing` says whether the request has
            that field. 0: the protocol has none.
    """

    model: tuple[int, ...] = ()
    version: tuple[int, ...] = ()
    label: tuple[int, ...] = ()
    tags: tuple[int, ...] = ()
    task: str = ""
    queueing: int = 0


TFSERVING_FIELDS = KeyFields(model=(1, 1), version=(1, 2, 1), label=(1, 4))
_PARAMETERS, _DELIMITED = 4, 2
OPENINFERENCE_FIELDS = KeyFields(model=(1,), version=(2,), queueing=_PARAMETERS)
SELDON_FIELDS = KeyFields(tags=(2, 2), task="taskId")


# From here on protobuf is given the field of the key alone, so that `messages.parse` has little to count. Parsing the
# envelope takes 1 µs at 600 B and 23 µs at 600 KB; `messages.fields` and then the envelope take 2 µs throughout.
_LARGE = limits.SMALL


# The first words are TensorFlow Serving's.
_NO_SPEC = "Missing ModelSpec: model_spec is missing; expected the name of a model in model_spec.name"
NO_NAME = "ModelSpec has no name specified. model_spec.name is missing or empty; expected the name of a model"


def parse_key(envelope: Any, body: Message, whole: Any, *numbers: int) -> Any:
    """The key's part of `body`, a message of the class `whole`, as a message of the class `envelope`.

    Args:
        numbers: the top-level fields that `envelope` declares.

    Raises:
        BadRequest: as `messages.parse`.
    """
    if len(body) >= _LARGE and (fields := messages.fields(body, *numbers)) is not None:
        return messages.parse(envelope, fields, whole)
    return messages.parse(envelope, body, whole)


def read_tfserving_key(body: Message) -> RoutingKey:
    key = parse_key(messages.PredictKey, body, messages.PredictRequest, 1)
    spec = key.model_spec  # each look takes 0.15 µs
    if not spec.name:
        raise BadRequest(NO_NAME if key.HasField("model_spec") else _NO_SPEC)
    return key_of(spec)


def key_of(spec: Any) -> RoutingKey:
    """The key in a `tensorflow.serving.ModelSpec`."""
    return RoutingKey(spec.name, spec.version.value if spec.HasField("version") else None, spec.version_label)


def read_status_key(body: Message) -> RoutingKey:
    """Raises:
    ModelNotFound: the name is empty: TensorFlow Serving looks even that one up.
    """
    key = messages.parse(messages.PredictKey, body, messages.GetModelStatusRequest)
    if not key.HasField("model_spec"):
        raise BadRequest(_NO_SPEC)
    if not key.model_spec.name:
        raise ModelNotFound("Could not find any versions of model ; model_spec.name is empty")
    return key_of(key.model_spec)


def read_openinference_key(body: Message) -> RoutingKey:
    """`queueing` says whether there are parameters, which are not read."""
    spans = messages.spans(body, 0, len(body)) if len(body) >= _LARGE else None
    key: Any
    if spans is None:
        key = messages.parse(messages.ModelInferKey, body, messages.ModelInferRequest)
        queueing = len(key.parameters) > 0
    else:
        key = messages.parse(messages.ModelInferKey, messages.joined(body, spans, 1, 2), messages.ModelInferRequest)
        queueing = any(number == _PARAMETERS and body[first] & 7 == _DELIMITED for number, first, *_ in spans)
    if not key.model_name:
        raise BadRequest("model_name is missing or empty; expected the name of a model")
    return RoutingKey(key.model_name, key.model_version, queueing=queueing)


def read_seldon_key(body: Message) -> RoutingKey:
    tags = parse_key(messages.SeldonKey, body, messages.SeldonMessage, 2).meta.tags
    return RoutingKey(read_task(tags["taskId"]) if "taskId" in tags else None)


def read_transform_key(body: Message) -> RoutingKey:
    """As `read_seldon_key`; refuses a message without a payload, which is not an answer either."""
    if messages.parse(messages.SeldonMessage, body).WhichOneof("data_oneof") is None:
        raise BadRequest("the message has no payload; expected data, binData, strData, jsonData or customData")
    return read_seldon_key(body)


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
