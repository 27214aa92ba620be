"""TensorFlow Serving's Predict.

Tensors come as bytes (`tensor_content`) or as a typed list, which repeats its last value where it is shorter than the
shape; an empty one stands for zeros. Answers go out as typed lists: clients read `float_val` and its like. Requests
that this side sends carry bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Form, Request, Response, Tensor, as_tensor, as_tensors
from dl_inference_core.wire import messages
from dl_inference_core.wire.arrays import (
    BFLOAT16,
    STRING,
    check_dimensions,
    count_of,
    field,
    from_bytes,
    from_strings,
    mismatch,
    narrow,
    native,
    put,
    reshape,
    take,
)

MOST_REPEATED_BYTES = 8 * 10 * 1024 * 1024
"""What one message may claim in memory by repeated values: eight times the default limit of a message."""

LARGE = 32_768
"""Bytes of a message from which on it pays to read tensors where they stand in it."""
_NOTHING: Mapping[str, memoryview] = MappingProxyType({})

# Numbers of fields: of a PredictRequest, of an entry of its map, and of a TensorProto.
_INPUTS, _KEY, _VALUE, _TENSOR_CONTENT = 2, 1, 2, 4

# By numbers of tensorflow.DataType; and the list in which each travels, with the dtype of that list's numbers.
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.float64),
    3: np.dtype(np.int32),
    4: np.dtype(np.uint8),
    5: np.dtype(np.int16),
    6: np.dtype(np.int8),
    7: STRING,
    8: np.dtype(np.complex64),
    9: np.dtype(np.int64),
    10: np.dtype(np.bool_),
    14: BFLOAT16,
    17: np.dtype(np.uint16),
    18: np.dtype(np.complex128),
    19: np.dtype(np.float16),
    22: np.dtype(np.uint32),
    23: np.dtype(np.uint64),
}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
_LISTS: dict[np.dtype[Any], tuple[str, np.dtype[Any]]] = {
    np.dtype(np.float32): ("float_val", np.dtype(np.float32)),
    np.dtype(np.float64): ("double_val", np.dtype(np.float64)),
    np.dtype(np.int32): ("int_val", np.dtype(np.int32)),
    np.dtype(np.uint8): ("int_val", np.dtype(np.int32)),
    np.dtype(np.int16): ("int_val", np.dtype(np.int32)),
    np.dtype(np.int8): ("int_val", np.dtype(np.int32)),
    np.dtype(np.complex64): ("scomplex_val", np.dtype(np.float32)),
    np.dtype(np.int64): ("int64_val", np.dtype(np.int64)),
    np.dtype(np.bool_): ("bool_val", np.dtype(np.bool_)),
    BFLOAT16: ("half_val", np.dtype(np.int32)),
    np.dtype(np.uint16): ("int_val", np.dtype(np.int32)),
    np.dtype(np.complex128): ("dcomplex_val", np.dtype(np.float64)),
    np.dtype(np.float16): ("half_val", np.dtype(np.int32)),
    np.dtype(np.uint32): ("uint32_val", np.dtype(np.uint32)),
    np.dtype(np.uint64): ("uint64_val", np.dtype(np.uint64)),
}


class Room:
    """The memory that one message may still claim by repeated values."""

    def __init__(self) -> None:
        self.left = MOST_REPEATED_BYTES

    def claim(self, size: int, what: str) -> None:
        """Raises:
        BadRequest: too much.
        """
        if size > self.left:
            raise BadRequest(
                f"{what}: repeating its last value to fill its shape would take {size} bytes; "
                f"expected at most {MOST_REPEATED_BYTES} for all tensors of a message"
            )
        self.left -= size


def decode_request(body: bytes | memoryview) -> Request:
    """Raises:
    BadRequest: as `protocol.Codec`; or an output is asked for twice.
    """
    rest, contents = _apart(body) if len(body) >= LARGE else (body, {})
    message = messages.parse(messages.PredictRequest, rest)
    outputs = tuple(message.output_filter)
    if len(set(outputs)) < len(outputs):
        seen: set[str] = set()
        twice = next(name for name in outputs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadRequest(f"duplicate output tensor alias: {twice[:100]}")
    return Request(
        payload=_decode_tensors(message.inputs, "input", contents),
        form=Form.TENSORS,
        outputs=outputs,
        **decode_spec(message.model_spec),
    )


def decode_spec(spec: Any) -> dict[str, Any]:
    """What a `ModelSpec` says, as the fields of a `Request`."""
    return {
        "model": spec.name,
        "version": spec.version.value if spec.HasField("version") else None,
        "label": spec.version_label,
        "signature": spec.signature_name,
    }


def encode_response(response: Response, request: Request) -> bytes:
    message = messages.PredictResponse()
    encode_spec(message.model_spec, response, request)
    for name, array in as_tensors(response.payload).items():
        encode_tensor(array, message.outputs[name])
    return message.SerializeToString()  # type: ignore[no-any-return]


def encode_asked(spec: Any, request: Request) -> None:
    """What is asked, in the `ModelSpec` of a request."""
    spec.name = str(request.model)
    spec.signature_name = request.signature
    if request.version is not None:
        spec.version.value = request.version
    elif request.label:
        spec.version_label = request.label


def encode_spec(spec: Any, response: Response, request: Request) -> None:
    """What answered, in the `ModelSpec` of an answer."""
    spec.name = response.model or str(request.model)
    spec.signature_name = request.signature or DEFAULT_SIGNATURE
    if response.version is not None:
        spec.version.value = response.version


def encode_request(request: Request) -> bytes:
    if not isinstance(request.payload, Mapping):
        raise TypeError("TensorFlow Serving takes named tensors")
    message = messages.PredictRequest()
    encode_asked(message.model_spec, request)
    message.output_filter.extend(request.outputs)
    for name, value in request.payload.items():
        encode_tensor(as_tensor(value), message.inputs[name], as_bytes=True)
    return message.SerializeToString()  # type: ignore[no-any-return]


def decode_response(body: bytes) -> Response:
    message = messages.parse_answer(messages.PredictResponse, body)
    spec = message.model_spec
    return Response(
        payload=_decode_tensors(message.outputs, "output"),
        model=spec.name,
        version=spec.version.value if spec.HasField("version") else None,
    )


def _apart(body: bytes | memoryview) -> tuple[bytes | memoryview, dict[str, memoryview]]:
    """A PredictRequest without the bytes in its inputs, and those by the inputs' names, where they stand in `body`.

    protobuf would copy them twice. What is written in another way than usual is left to it: nothing is taken out then.
    """
    view = memoryview(body)
    parts: list[bytes | memoryview] = []
    contents: dict[str, memoryview] = {}
    for number, first, payload, end in messages.spans(body, 0, len(body)) or ():
        if number != _INPUTS:
            parts.append(view[first:end])
            continue
        entry = messages.spans(body, payload, end) or []
        tensor = messages.spans(body, *entry[1][2:]) if [each[0] for each in entry] == [_KEY, _VALUE] else None
        held = [span for span in tensor or () if span[0] == _TENSOR_CONTENT]
        delimited = all(view[span[1]] & 7 == 2 for span in (*entry, *held))
        if tensor is None or view[first] & 7 != 2 or not delimited or len(held) > 1:
            return body, {}
        key = bytes(view[slice(*entry[0][2:])])
        rest = b"".join([view[begin:after] for each, begin, _, after in tensor if each != _TENSOR_CONTENT])
        parts.append(field(_INPUTS, field(_KEY, key) + field(_VALUE, rest)))
        name = key.decode(errors="replace")  # protobuf refuses what is no UTF-8
        contents.pop(name, None)  # of two of the same name the last one counts
        if held:
            contents[name] = view[slice(*held[0][2:])]
    return (b"".join(parts), contents) if contents else (body, {})


def _decode_tensors(tensors: Any, noun: str, contents: Mapping[str, memoryview] = _NOTHING) -> dict[str, Tensor]:
    room = Room()
    return {
        name: decode_tensor(tensor, f'{noun} "{name}"', room, contents.get(name)) for name, tensor in tensors.items()
    }


def decode_tensor(tensor: Any, what: str, room: Room, content: memoryview | None = None) -> Tensor:
    """A `tensorflow.TensorProto` as an array; `what` names it in errors.

    Args:
        content: its `tensor_content`, where that was taken out of it. The array is a view of it.

    Raises:
        BadRequest: a dtype that is not served; a shape that is unknown, or does not fit the values; more repeated
            values than `room` allows.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise BadRequest(f"{what}: dtype {_dtype_name(tensor.dtype)} is not served")
    if tensor.tensor_shape.unknown_rank:
        raise BadRequest(f"{what}: its rank is unknown; expected a known shape")
    check_dimensions(len(tensor.tensor_shape.dim), what)
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    count = count_of(shape, what)
    if content is None:
        content = tensor.tensor_content
    if content and dtype is STRING:
        values = from_strings(_split(bytes(content), count, what), count)
    elif content:
        if len(content) != count * dtype.itemsize:
            expected = f"{count * dtype.itemsize} bytes of tensor_content"
            raise mismatch(what, _dtype_name(tensor.dtype), shape, expected, str(len(content)))
        values = from_bytes(content, dtype)
    else:
        values = _listed(tensor, dtype, what)
        if values.size > count:
            raise mismatch(what, _dtype_name(tensor.dtype), shape, f"at most {count} values", str(values.size))
        if values.size < count:
            room.claim(count * dtype.itemsize, what)
            filled = np.empty(count, dtype)
            filled[: values.size] = values
            filled[values.size :] = values[-1] if values.size else (b"" if dtype is STRING else 0)
            values = filled
    return reshape(values, shape, what)


def _listed(tensor: Any, dtype: np.dtype[Any], what: str) -> Tensor:
    """The values of the typed list that belongs to `dtype`."""
    if dtype is STRING:
        return from_strings(tensor.string_val, len(tensor.string_val))
    name, listed = _LISTS[dtype]
    values = take(tensor, name, listed)
    if dtype.kind == "c":
        if values.size % 2:
            raise BadRequest(f"{what}: {name} holds {values.size} numbers; expected pairs, real and imaginary")
        return values.view(dtype)
    if name == "half_val":
        return narrow(values, np.dtype(np.uint16), what).view(dtype)
    return narrow(values, dtype, what)


def _split(content: bytes, count: int, what: str) -> list[bytes]:
    """The strings in a `tensor_content`: first all their lengths, as varints, then all their bytes."""
    lengths: list[int] = []
    position = 0
    if count <= len(content):
        while len(lengths) < count and position < len(content):
            length = shift = 0
            while position < len(content) and shift < 35:
                byte = content[position]
                position += 1
                length |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    lengths.append(length)
                    break
            else:
                break
    if len(lengths) != count or position + sum(lengths) != len(content):
        raise BadRequest(
            f"{what}: tensor_content does not hold {count} strings; expected their lengths, then their bytes"
        )
    strings = []
    for length in lengths:
        strings.append(content[position : position + length])
        position += length
    return strings


def encode_tensor(array: Tensor, tensor: Any, *, as_bytes: bool = False) -> None:
    """Write `array` into the empty `tensorflow.TensorProto` `tensor`: as a typed list or, but for strings, as bytes.

    Raises:
        TypeError: TensorFlow has no such dtype.
    """
    array = native(array)
    number = _NUMBERS.get(array.dtype)
    if number is None:
        raise TypeError(f"TensorFlow has no dtype {array.dtype.name}")
    tensor.dtype = number
    tensor.tensor_shape.SetInParent()
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    if array.dtype == STRING:
        tensor.string_val.extend(array.ravel().tolist())
    elif as_bytes:
        tensor.tensor_content = array.tobytes()
    else:
        name, listed = _LISTS[array.dtype]
        if array.dtype.kind == "c":
            array = np.ascontiguousarray(array).view(listed)
        elif name == "half_val":
            array = np.ascontiguousarray(array).view(np.uint16)
        put(tensor, name, array)


def dtype_number(dtype: np.dtype[Any] | None) -> int:
    """The `tensorflow.DataType` of a dtype; DT_INVALID for one that is unknown, or that TensorFlow lacks."""
    return 0 if dtype is None else _NUMBERS.get(dtype, 0)


def dtype_of(number: int) -> np.dtype[Any] | None:
    """The dtype of a `tensorflow.DataType`; None where it is not served."""
    return _DTYPES.get(number)


def _dtype_name(number: int) -> str:
    values = messages.TensorProto.DESCRIPTOR.fields_by_name["dtype"].enum_type.values_by_number
    return values[number].name if number in values else str(number)
