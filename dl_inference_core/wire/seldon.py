"""Seldon's Predict: one message for requests and answers.

An answer takes the shape that seldon-core's `construct_response` gives it: bytes are binData, a str is strData; an
array or list of numbers takes the form of its request (tensor where that was not `data`), of anything else it is an
ndarray; an object is jsonData. Tags and puid come back. NaN and the infinities pass as they are, in both directions
and in every form: the wire's doubles hold them, and a model that answers NaN has answered; only a `taskId` cannot be
one. What another form or protocol could carry, but this one only changed, is refused: an integer that no double holds,
and bytes that are not UTF-8 where text is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dl_inference_core.errors import BadRequest, NodeFailed
from dl_inference_core.tensors import Form, Json, Payload, Request, Response, Tensor, as_json, as_tensor
from dl_inference_core.wire import messages, tfserving
from dl_inference_core.wire.arrays import (
    BFLOAT16,
    check_dimensions,
    count_of,
    field,
    from_strings,
    mismatch,
    native,
    reshape,
    take,
    varint,
)
from dl_inference_core.wire.ndarrays import read_numbers, take_numbers, write_numbers
from dl_inference_core.wire.routing_keys import read_task

# Field numbers of what is written straight to bytes: SeldonMessage, DefaultData, Tensor.
_DATA = 3
_TENSOR, _NDARRAY, _TFTENSOR = 2, 3, 4
_SHAPE, _VALUES = 1, 2

MOST_DEPTH = 30
"""Of JSON values in each other: protobuf reads messages up to 100 deep, and an object in an object takes three."""

LARGE = 4096
"""Bytes of a message from which on it pays to read the numbers of an ndarray where they stand in it."""

_EXACT = 2**53
"""A double holds every integer up to this magnitude; beyond it, it skips some."""

_FORMS = {"binData": Form.BYTES, "strData": Form.TEXT, "jsonData": Form.JSON}


class Changed(TypeError):
    """A value that would go out as another one."""


def decode_request(body: bytes) -> Request:
    rest, numbers = take_numbers(body) if len(body) >= LARGE else (body, None)
    message = messages.parse(messages.SeldonMessage, rest)
    payload, form = _decode_payload(message) if numbers is None else (numbers, Form.NDARRAY)
    tags = message.meta.tags
    return Request(
        payload=payload,
        form=form,
        model=read_task(tags["taskId"]) if "taskId" in tags else "",
        names=tuple(message.data.names),
        tags={name: _to_json(value) for name, value in tags.items()},
        id=message.meta.puid,
    )


def encode_response(response: Response, request: Request) -> bytes:
    """Raises:
    BadRequest: the answer holds a value that this form would change, and another form or protocol would not.
    TypeError: Seldon's messages cannot hold the answer.
    """
    payload, form = answer_form(response.payload, request.form)
    tags = {**request.tags, **response.tags}
    try:
        return _encode(payload, form, response.names, tags, response.id or request.id)
    except Changed as error:
        raise BadRequest(str(error)) from None


def encode_request(request: Request) -> bytes:
    tags = dict(request.tags)
    if request.model != "":
        tags.setdefault("taskId", request.model)
    return _encode(request.payload, request.form, request.names, tags, request.id)


def decode_response(body: bytes) -> Response:
    """Raises:
    NodeFailed: an answer whose status says FAILURE.
    """
    message = messages.parse_answer(messages.SeldonMessage, body)
    if message.status.status == messages.Status.FAILURE:
        raise NodeFailed(f"status FAILURE {message.status.code}: {message.status.reason} {message.status.info}")
    try:
        payload, _ = _decode_payload(message)
    except BadRequest:
        if message.data.WhichOneof("data_oneof") != "ndarray":
            raise
        payload = [_to_json(value) for value in message.data.ndarray.values]  # no array can hold it: JSON can
    return Response(
        payload=payload,
        names=tuple(message.data.names),
        tags={name: _to_json(value) for name, value in message.meta.tags.items()},
        id=message.meta.puid,
    )


def _decode_payload(message: Any) -> tuple[Payload, Form]:
    match message.WhichOneof("data_oneof"):
        case "data":
            return _decode_data(message.data)
        case "jsonData":
            return _to_json(message.jsonData), Form.JSON
        case "binData" | "strData" as name:
            return getattr(message, name), _FORMS[name]
        case "customData":
            raise BadRequest("customData is not served; expected data, binData, strData or jsonData")
        case _:
            raise BadRequest("no payload; expected data, binData, strData or jsonData")


def _decode_data(data: Any) -> tuple[Tensor, Form]:
    match data.WhichOneof("data_oneof"):
        case "tensor":
            what = "data.tensor"
            check_dimensions(len(data.tensor.shape), what)
            shape = tuple(data.tensor.shape)
            count = count_of(shape, what)
            if len(data.tensor.values) != count:
                raise mismatch(what, "float64", shape, f"{count} values", str(len(data.tensor.values)))
            return reshape(take(data.tensor, "values", np.dtype(np.float64)), shape, what), Form.TENSOR
        case "ndarray":
            return _decode_ndarray(data.ndarray), Form.NDARRAY
        case "tftensor":
            return tfserving.decode_tensor(data.tftensor, "data.tftensor", tfserving.Room()), Form.TFTENSOR
        case _:
            raise BadRequest("data is empty; expected data.tensor, data.ndarray or data.tftensor")


def _decode_ndarray(values: Any) -> Tensor:
    """A google.protobuf.ListValue of numbers, bools or strings, nested evenly."""
    numbers = read_numbers(np.frombuffer(values.SerializeToString(), np.uint8)) if len(values.values) else None
    if numbers is not None:
        return numbers
    return nested_as_tensor([_to_json(value) for value in values.values])


def nested_as_tensor(values: list[Any]) -> Tensor:
    """The list of a `data.ndarray`, as Python has JSON, as bools, float64 or strings.

    As numpy has it, bools among numbers are numbers, and anything among strings is a string.

    Raises:
        BadRequest: it is not nested evenly; it holds an object, null, or an integer that no double holds.
    """
    try:
        array = np.array(values, dtype=object)
    except ValueError as error:
        raise BadRequest(f"data.ndarray: {error}; expected lists of equal length") from error
    items = reshape(array, array.shape, "data.ndarray").ravel().tolist()
    kinds = {type(item) for item in items}
    if kinds - {float, int, bool, str}:
        given = "lists of unequal length" if list in kinds else "an object or null"
        raise BadRequest(f"data.ndarray holds {given}; expected numbers, bools or strings, nested evenly")
    if str in kinds:
        return from_strings((str(item).encode() for item in items), len(items)).reshape(array.shape)
    if kinds == {bool}:
        return array.astype(np.bool_)
    return (doubles(items, "data.ndarray") if int in kinds else array.astype(np.float64)).reshape(array.shape)


def doubles(numbers: Sequence[float], what: str) -> Tensor:
    """`numbers`, in which there may be bools, as float64.

    Raises:
        BadRequest: an integer that no double holds; `what` names where it stands.
    """
    try:
        array = np.array(numbers, np.float64)
    except OverflowError:
        array = np.array([np.inf])
    if not (np.abs(array) < _EXACT).all():  # a NaN is not, either
        for number in numbers:
            if type(number) is int and not _is_double(number):
                raise BadRequest(
                    f"{what} holds the integer {number!r:.100}: Seldon's numbers are doubles, and no double is equal "
                    "to it; data.tftensor has integers, and so have the other protocols"
                )
    return array


def _is_double(number: int) -> bool:
    try:
        return int(float(number)) == number
    except OverflowError:
        return False


def answer_form(payload: Payload, asked: Form) -> tuple[Payload, Form]:
    """What of an answer goes out, and in which form."""
    if isinstance(payload, Mapping) and len(payload) == 1:
        (only,) = payload.values()
        if isinstance(only, np.ndarray):
            payload = only
    if isinstance(payload, np.ndarray | list | tuple):
        array = _as_array(payload)
        if array is None or not _is_number(array.dtype):
            return payload, Form.NDARRAY
        return array, asked if asked in (Form.TENSOR, Form.NDARRAY, Form.TFTENSOR) else Form.TENSOR
    if isinstance(payload, bytes | bytearray):
        return bytes(payload), Form.BYTES
    if isinstance(payload, str):
        return payload, Form.TEXT
    return payload, Form.JSON


def _as_array(value: Any) -> Tensor | None:
    """An array as it is, lists of numbers as an array; None for what is neither, or would change as an array."""
    if isinstance(value, np.ndarray):
        return native(value)
    try:
        array = as_tensor(value)
    except TypeError:
        return None
    return array if _is_number(array.dtype) else None


def _check_doubles(array: Tensor) -> None:
    """Raises:
    Changed: an integer that no double holds.
    """
    large = array.dtype.kind in "iu" and array.dtype.itemsize == 8 and array.size
    if large and (int(array.max()) > _EXACT or int(array.min()) < -_EXACT):
        for number in array.ravel().tolist():
            _as_double(number)


def _as_double(number: float) -> float:
    """Raises:
    Changed: an integer that no double holds.
    TypeError: an integer beyond a double's range.
    """
    try:
        double = float(number)
    except OverflowError as error:
        raise TypeError("no JSON number can hold an int this large") from error
    if isinstance(number, int) and int(double) != number:
        raise Changed(
            f"the answer holds the integer {number}: Seldon's numbers are doubles, and the nearest is {double:.0f}; "
            "data.tftensor has integers, and so have the other protocols; a handler can answer it as a string"
        )
    return double


def _as_text(value: Any) -> Json:
    """`value` as JSON.

    Raises:
        Changed: bytes in it are not UTF-8.
    """
    try:
        return as_json(value, errors="strict")
    except UnicodeDecodeError as error:
        raise Changed(
            f"the answer holds bytes that are not UTF-8 ({error.reason} at {error.start}), where Seldon sends text; "
            "data.tftensor has bytes, and so have the other protocols; a handler can answer with bytes alone (binData)"
        ) from None


def _is_number(dtype: np.dtype[Any]) -> bool:
    """Whether numpy calls it a number: bools are none."""
    return dtype.kind in "iufc" or dtype == BFLOAT16


def _encode(payload: Payload, form: Form, names: Iterable[str], tags: Mapping[str, Any], puid: str) -> bytes:
    """Raises:
    TypeError: `form` cannot hold `payload`.
    """
    message = messages.SeldonMessage()
    message.meta.puid = puid
    for name, tag in tags.items():
        _from_json(_as_text(tag), message.meta.tags[name])
    data = b""
    if form is Form.BYTES and isinstance(payload, bytes):
        message.binData = payload
    elif form is Form.TEXT and isinstance(payload, str):
        message.strData = payload
    elif form is Form.JSON:
        _from_json(_as_text(payload), message.jsonData)
    elif form in (Form.TENSOR, Form.NDARRAY, Form.TFTENSOR):
        data = messages.DefaultData(names=names).SerializeToString() + _encode_data(payload, form)
        data = field(_DATA, data)
    else:
        raise TypeError(f"Seldon's {form.value} cannot hold a {type(payload).__name__}")
    return message.SerializeToString() + data  # type: ignore[no-any-return]


def _encode_data(payload: Payload, form: Form) -> bytes:
    if form is Form.TFTENSOR:
        return field(_TFTENSOR, as_tftensor(payload).SerializeToString())
    values = numbers_or_list(payload, form)
    if isinstance(values, list):
        message = messages.Value()
        _from_json(values, message)
        return field(_NDARRAY, message.list_value.SerializeToString())
    with np.errstate(invalid="ignore"):  # a signalling NaN of float32 becomes a quiet one
        array = values.astype(np.float64, copy=False)
    if form is Form.NDARRAY:
        return field(_NDARRAY, write_numbers(array))
    shape = b"".join(varint(size) for size in array.shape)
    return field(_TENSOR, field(_SHAPE, shape) + field(_VALUES, array.tobytes()))


def as_tftensor(payload: Payload) -> Any:
    """A TensorProto.

    Raises:
        TypeError: no tensor holds `payload`.
    """
    tensor = messages.TensorProto()
    tfserving.encode_tensor(as_tensor(payload), tensor)
    return tensor


def numbers_or_list(payload: Payload, form: Form) -> Tensor | list[Any]:
    """What `data.tensor` or `data.ndarray`, as `form` says, is to hold: real numbers that doubles hold, as an array of
    any such dtype; or, in an ndarray, anything else as lists of JSON. An ndarray has a dimension at least.

    Raises:
        Changed: an integer that no double holds; bytes that are not UTF-8.
        TypeError: `form` cannot hold `payload`.
    """
    array = _as_array(payload)
    if array is not None and _is_number(array.dtype) and array.dtype.kind != "c":
        _check_doubles(array)
        return np.atleast_1d(array) if form is Form.NDARRAY else array
    if form is Form.TENSOR:
        raise TypeError("Seldon's data.tensor holds real numbers only")
    values = _as_text(np.atleast_1d(payload) if isinstance(payload, np.ndarray) else payload)
    if not isinstance(values, list):
        raise TypeError(f"Seldon's data.ndarray takes an array or a list, not a {type(payload).__name__}")
    return values


def checked_json(value: Any) -> Json:
    """`value` as JSON, if a google.protobuf.Value holds it unchanged.

    Raises:
        Changed: an integer that no double holds; bytes that are not UTF-8.
        TypeError: something in it is not JSON, or lies deeper than readers accept.
    """
    json = _as_text(value)
    _from_json(json, messages.Value())
    return json


def _to_json(value: Any) -> Json:
    """A google.protobuf.Value as Python has it: every number a float. One that is not set is None."""
    match value.WhichOneof("kind"):
        case "struct_value":
            return {name: _to_json(item) for name, item in value.struct_value.fields.items()}
        case "list_value":
            return [_to_json(item) for item in value.list_value.values]
        case "null_value" | None:
            return None
        case kind:
            return getattr(value, kind)  # type: ignore[no-any-return]


def _from_json(item: Any, value: Any, depth: int = 0) -> None:
    """Write `item` into the empty google.protobuf.Value `value`.

    Raises:
        Changed: an integer that no double holds.
        TypeError: something in it is not JSON, or lies deeper than readers accept.
    """
    if depth > MOST_DEPTH:
        raise TypeError(f"JSON values nested deeper than {MOST_DEPTH} cannot be sent")
    match item:
        case None:
            value.null_value = 0
        case bool():
            value.bool_value = item
        case int() | float():
            value.number_value = _as_double(item)
        case str():
            value.string_value = item
        case dict():
            value.struct_value.SetInParent()
            for name, child in item.items():
                _from_json(child, value.struct_value.fields[name], depth + 1)
        case list():
            value.list_value.SetInParent()
            for child in item:
                _from_json(child, value.list_value.values.add(), depth + 1)
        case _:
            raise TypeError(f"JSON has no {type(item).__name__}")
