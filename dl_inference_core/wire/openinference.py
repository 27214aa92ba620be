"""The Open Inference Protocol's ModelInfer (KServe v2, Triton).

Tensors are raw (one bytes field for each) or typed (`contents`), never both in one message. Answers are raw, as
Triton's are: Triton's clients read numbers from nowhere else. `AS_REQUESTED` answers a typed request typed, as MLServer
does, unless an output is FP16 or BF16, which only exist raw.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import Form, Request, Response, Tensor, as_tensor, as_tensors, by_name
from dl_inference_core.wire import messages
from dl_inference_core.wire.arrays import (
    BFLOAT16,
    STRING,
    check_dimensions,
    count_of,
    from_bytes,
    from_strings,
    mismatch,
    narrow,
    native,
    put,
    reshape,
    take,
)

Described: TypeAlias = tuple[str, np.dtype[Any] | None, tuple[int | None, ...] | None]
"""A tensor's name, dtype and shape, as far as they are known."""

# Each datatype, and the list in which it travels with the dtype of that list's numbers.
_DATATYPES: dict[str, tuple[np.dtype[Any], str, np.dtype[Any]]] = {
    "BOOL": (np.dtype(np.bool_), "bool_contents", np.dtype(np.bool_)),
    "UINT8": (np.dtype(np.uint8), "uint_contents", np.dtype(np.uint32)),
    "UINT16": (np.dtype(np.uint16), "uint_contents", np.dtype(np.uint32)),
    "UINT32": (np.dtype(np.uint32), "uint_contents", np.dtype(np.uint32)),
    "UINT64": (np.dtype(np.uint64), "uint64_contents", np.dtype(np.uint64)),
    "INT8": (np.dtype(np.int8), "int_contents", np.dtype(np.int32)),
    "INT16": (np.dtype(np.int16), "int_contents", np.dtype(np.int32)),
    "INT32": (np.dtype(np.int32), "int_contents", np.dtype(np.int32)),
    "INT64": (np.dtype(np.int64), "int64_contents", np.dtype(np.int64)),
    "FP16": (np.dtype(np.float16), "", np.dtype(np.float16)),
    "BF16": (BFLOAT16, "", BFLOAT16),
    "FP32": (np.dtype(np.float32), "fp32_contents", np.dtype(np.float32)),
    "FP64": (np.dtype(np.float64), "fp64_contents", np.dtype(np.float64)),
    "BYTES": (STRING, "bytes_contents", STRING),
}
_NAMES = {dtype: name for name, (dtype, _, _) in _DATATYPES.items()}

# What a tensor's own parameters may ask for that is not served, and that must not be passed over in silence.
_NOT_SERVED = frozenset({"shared_memory_region", "classification"})
_BYTES = "BYTES"


def decode_request(body: bytes) -> Request:
    """The request; its form is raw if it has no inputs."""
    message = messages.parse(messages.ModelInferRequest, body)
    for noun, tensors in (("input", message.inputs), ("output", message.outputs)):
        for tensor in tensors:
            if tensor.parameters and (refused := _NOT_SERVED.intersection(tensor.parameters)):
                raise BadRequest(f'{noun} "{tensor.name}": the parameter "{min(refused)}" is not served')
    raw = bool(message.raw_input_contents) or not message.inputs
    return Request(
        payload=_decode_tensors(message.inputs, message.raw_input_contents, "input"),
        form=Form.TENSORS_RAW if raw else Form.TENSORS,
        model=message.model_name,
        version=decode_version(message.model_version),
        outputs=tuple(output.name for output in message.outputs),
        parameters={name: _decode_parameter(value) for name, value in message.parameters.items()},
        id=message.id,
    )


def encode_response(response: Response, request: Request, *, raw: bool = True) -> bytes:
    """The answer to `request`.

    Args:
        raw: whether its tensors are raw. Outputs that only exist raw make all of them raw.

    Raises:
        TypeError: the protocol does not have the dtype of an output.
    """
    message = messages.ModelInferResponse(
        model_name=response.model or str(request.model),
        model_version="" if response.version is None else str(response.version),
        id=response.id or request.id,
    )
    _encode_tensors(as_tensors(response.payload), message.outputs, message.raw_output_contents, raw=raw)
    return message.SerializeToString()  # type: ignore[no-any-return]


class _AsRequested:
    """This module as a codec that answers a typed request typed."""

    def decode_request(self, body: bytes) -> Request:
        return decode_request(body)

    def encode_response(self, response: Response, request: Request) -> bytes:
        return encode_response(response, request, raw=request.form is not Form.TENSORS)

    def encode_request(self, request: Request) -> bytes:
        return encode_request(request)

    def decode_response(self, body: bytes) -> Response:
        return decode_response(body)


AS_REQUESTED = _AsRequested()
"""Takes the form of an answer from its request."""


def encode_request(request: Request) -> bytes:
    if not isinstance(request.payload, Mapping):
        raise TypeError("the Open Inference Protocol takes named tensors")
    message = messages.ModelInferRequest(
        model_name=str(request.model),
        model_version="" if request.version is None else str(request.version),
        id=request.id,
    )
    for name in request.outputs:
        message.outputs.add(name=name)
    for name, value in request.parameters.items():
        _encode_parameter(value, message.parameters[name])
    tensors = by_name(request.payload, as_tensor)
    raw = request.form is Form.TENSORS_RAW
    _encode_tensors(tensors, message.inputs, message.raw_input_contents, raw=raw)
    return message.SerializeToString()  # type: ignore[no-any-return]


def encode_metadata(
    name: str, versions: Iterable[int], platform: str, *, inputs: Iterable[Described], outputs: Iterable[Described]
) -> bytes:
    """A ModelMetadataResponse; "" is a datatype that is unknown or that the protocol lacks, -1 a free size."""
    message = messages.ModelMetadataResponse(name=name, versions=map(str, versions), platform=platform)
    for described, tensors in ((inputs, message.inputs), (outputs, message.outputs)):
        for tensor, dtype, sizes in described:
            shape = (-1 if size is None else size for size in sizes or ())
            tensors.add(name=tensor, datatype="" if dtype is None else _NAMES.get(dtype, ""), shape=shape)
    return message.SerializeToString()  # type: ignore[no-any-return]


def decode_metadata(body: bytes) -> list[Described]:
    """The inputs that a ModelMetadataResponse tells of; a shape without sizes may be one that is not known.

    Raises:
        BadRequest: the answer is malformed.
    """
    message = messages.parse_answer(messages.ModelMetadataResponse, body)
    return [
        (
            tensor.name,
            _DATATYPES[tensor.datatype][0] if tensor.datatype in _DATATYPES else None,
            tuple(None if size < 0 else size for size in tensor.shape),
        )
        for tensor in message.inputs
    ]


def decode_response(body: bytes) -> Response:
    message = messages.parse_answer(messages.ModelInferResponse, body)
    return Response(
        payload=_decode_tensors(message.outputs, message.raw_output_contents, "output"),
        model=message.model_name,
        version=decode_version(message.model_version),
        id=message.id,
    )


def decode_version(version: str) -> int | None:
    """The number of a version, from the text that the protocol has for it; None is the newest.

    Raises:
        BadRequest: it is not a whole number.
    """
    if not version:
        return None
    if not re.fullmatch(r"-?[0-9]{1,19}", version):
        raise BadRequest(f'model_version is "{version[:64]}"; expected a whole number, or "" for the newest')
    return int(version)


def _decode_parameter(parameter: Any) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)


def _encode_parameter(value: Any, parameter: Any) -> None:
    match value:
        case bool():
            parameter.bool_param = value
        case int() if -(2**63) <= value < 2**63:
            parameter.int64_param = value
        case int() if 2**63 <= value < 2**64:
            parameter.uint64_param = value
        case float():
            parameter.double_param = value
        case str():
            parameter.string_param = value
        case None:
            parameter.SetInParent()
        case _:
            raise TypeError(f"no parameter can hold {value!r}; expected a bool, an int of 64 bits, a float or a str")


def _decode_tensors(tensors: Sequence[Any], raws: Sequence[bytes], noun: str) -> dict[str, Tensor]:
    if raws and len(raws) != len(tensors):
        names = ", ".join(f'"{tensor.name}"' for tensor in tensors[:8]) or "none"
        raise BadRequest(f"{len(raws)} raw contents for {len(tensors)} {noun}s ({names}); expected one for each")
    decoded: dict[str, Tensor] = {}
    for index, tensor in enumerate(tensors):
        what = f'{noun} "{tensor.name}"'
        if tensor.name in decoded:
            raise BadRequest(f"{what} is there twice")
        if tensor.datatype not in _DATATYPES:
            raise BadRequest(
                f'{what}: unknown datatype "{tensor.datatype[:64]}"; expected one of {", ".join(_DATATYPES)}'
            )
        check_dimensions(len(tensor.shape), what)
        shape = tuple(tensor.shape)
        count = count_of(shape, what)
        if raws:
            if tensor.HasField("contents") and tensor.contents.ListFields():  # MLServer sends empty ones
                raise BadRequest(f"{what} has typed contents beside raw ones; expected one or the other in a message")
            values = _decode_raw(raws[index], tensor.datatype, shape, count, what)
        else:
            values = _decode_typed(tensor.contents, tensor.datatype, shape, count, what)
        decoded[tensor.name] = reshape(values, shape, what)
    return decoded


def _decode_raw(content: bytes, datatype: str, shape: tuple[int, ...], count: int, what: str) -> Tensor:
    dtype = _DATATYPES[datatype][0]
    if dtype is STRING:
        return from_strings(_split(content, count, what), count)
    if len(content) != count * dtype.itemsize:
        raise mismatch(what, datatype, shape, f"{count * dtype.itemsize} raw bytes", str(len(content)))
    return from_bytes(content, dtype)


def _split(content: bytes, count: int, what: str) -> list[bytes]:
    """The strings in raw BYTES: each its length, four bytes little-endian, and then itself."""
    strings = []
    position = 0
    while position + 4 <= len(content):
        (length,) = struct.unpack_from("<I", content, position)
        position += 4
        if position + length > len(content):
            raise BadRequest(f"{what}: a string of {length} bytes runs past the end of its raw contents")
        strings.append(content[position : position + length])
        position += length
    if position != len(content):
        raise BadRequest(f"{what}: {len(content) - position} bytes are left over after its last string")
    if len(strings) != count:
        raise BadRequest(f"{what}: its shape takes {count} strings; got {len(strings)}")
    return strings


def _decode_typed(contents: Any, datatype: str, shape: tuple[int, ...], count: int, what: str) -> Tensor:
    dtype, name, listed = _DATATYPES[datatype]
    if not name:
        raise BadRequest(f"{what}: {datatype} exists only as raw contents")
    for given, _ in contents.ListFields():
        if given.name != name:
            raise BadRequest(f"{what}: {datatype} stands in {name}; got values in {given.name}")
    values = getattr(contents, name)
    if len(values) != count:
        raise mismatch(what, datatype, shape, f"{count} values in {name}", str(len(values)))
    if dtype is STRING:
        return from_strings(values, count)
    return narrow(take(contents, name, listed), dtype, what)


def _encode_tensors(tensors: Mapping[str, Tensor], messages_: Any, raws: Any, *, raw: bool) -> None:
    """Write `tensors` into the repeated fields for tensors and raw contents; raw if a datatype exists only so.

    Raises:
        TypeError: the protocol has no such dtype.
    """
    described = []
    for name, array in tensors.items():
        array = native(array)
        datatype = _NAMES.get(array.dtype)
        if datatype is None:
            raise TypeError(f'"{name}": the Open Inference Protocol has no dtype {array.dtype.name}')
        raw = raw or not _DATATYPES[datatype][1]
        described.append((name, array, datatype))
    for name, array, datatype in described:
        message = messages_.add(name=name, datatype=datatype, shape=array.shape)
        if datatype == _BYTES:
            strings = array.ravel().tolist()
            if raw:
                raws.append(b"".join(struct.pack("<I", len(string)) + string for string in strings))
            else:
                message.contents.bytes_contents.extend(strings)
        elif raw:
            raws.append(array.tobytes())
        else:
            put(message.contents, _DATATYPES[datatype][1], array)
