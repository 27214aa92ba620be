"""Between repeated protobuf fields and numpy arrays, without an object per number where the wire allows it."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from dl_inference_core.errors import BadRequest
from dl_inference_core.wire import messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dl_inference_core.tensors import Tensor

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
STRING: np.dtype[Any] = np.dtype(object)

_MOST_ROWS, _WIDEST = 1024, 65_536
"""The first size of a tensor that holds no values, and its other sizes, at most. A row that costs no bytes to send
still costs work: 60 bytes with the shape [10000000, 0] would be ten million rows. Real requests without values, such as
empty texts or no rows at all of a wide model, stay below."""
MOST_DIMENSIONS = 32
"""Where numpy's iterators end."""

_PIECE = 65_536
"""Values that become Python objects in one call, which no other thread can interrupt: 5 ms."""


def varint(number: int) -> bytes:
    """`number`, which is not negative, as protobuf writes lengths and tags."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field: bytes, a message, or packed values."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def take(message: Any, name: str, dtype: np.dtype[Any]) -> Tensor:
    """The repeated numbers `message.name`, which `dtype` holds, as an array of one dimension.

    Floats and bools are read in place from the packed form; it is the varints that protobuf must unpack.
    """
    values = getattr(message, name)
    count = len(values)
    if dtype.kind in "fb":
        number = message.DESCRIPTOR.fields_by_name[name].number
        size = count * dtype.itemsize
        header = len(varint(number << 3 | 2) + varint(size))
        packed = messages.fields(message.SerializeToString(), number)
        if packed is not None and len(packed) == header + size:  # else another field has that number too
            return np.frombuffer(packed, dtype, count, header)
    array = np.empty(count, dtype)
    unpacked = iter(values)
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        array[start:stop] = np.fromiter(unpacked, dtype, stop - start)
    return array


def put(message: Any, name: str, array: Tensor) -> None:
    """Append `array`, of the field's own dtype, to the empty repeated field `message.name`."""
    if array.dtype.kind in "fb":
        number = message.DESCRIPTOR.fields_by_name[name].number
        message.MergeFromString(field(number, array.tobytes()))
    else:
        getattr(message, name).extend(array.ravel().tolist())


def narrow(values: Tensor, dtype: np.dtype[Any], what: str) -> Tensor:
    """Integers as the narrower `dtype` that travels in their field.

    Raises:
        BadRequest: one does not fit.
    """
    if values.dtype == dtype:
        return values
    limits = np.iinfo(dtype)
    if values.size and not (limits.min <= values.min() and values.max() <= limits.max):
        raise BadRequest(f"{what}: a value is out of the range of {dtype.name}, {limits.min} to {limits.max}")
    return values.astype(dtype)


def from_bytes(content: bytes, dtype: np.dtype[Any]) -> Tensor:
    """The little-endian bytes of an array, a whole number of items, as an array of one dimension."""
    if dtype.kind == "b":
        return np.frombuffer(content, np.uint8).astype(np.bool_)
    return np.frombuffer(content, dtype)


def from_strings(strings: Iterable[bytes], count: int) -> Tensor:
    """`count` strings as an array of one dimension."""
    array = np.empty(count, dtype=object)
    iterator = iter(strings)
    for start in range(0, count, _PIECE):
        array[start : start + _PIECE] = list(islice(iterator, _PIECE))
    return array


def check_dimensions(count: int, what: str) -> None:
    """To be called before sizes are read: a message can have a million of them.

    Raises:
        BadRequest: above 32 dimensions.
    """
    if count > MOST_DIMENSIONS:
        raise BadRequest(f"{what}: its shape is not possible: it has {count} dimensions; expected {MOST_DIMENSIONS}")


def count_of(shape: Sequence[int], what: str) -> int:
    """How many values `shape` holds.

    Raises:
        BadRequest: a negative size.
    """
    if any(size < 0 for size in shape):
        raise BadRequest(f"{what}: shape {_shown(shape)} has a negative size; expected known sizes")
    return math.prod(shape)


def reshape(values: Tensor, shape: Sequence[int], what: str) -> Tensor:
    """`values`, as many as `shape` holds, in that shape.

    Raises:
        BadRequest: above 32 dimensions; or no values and more than 1,024 rows.
    """
    if not values.size and (shape[0] > _MOST_ROWS or max(shape) > _WIDEST):
        raise BadRequest(
            f"{what}: shape {_shown(shape)} holds no values; expected at most {_MOST_ROWS} rows, and other sizes of at "
            f"most {_WIDEST}"
        )
    check_dimensions(len(shape), what)
    try:
        return values.reshape(tuple(shape))
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"{what}: shape {_shown(shape)} is not possible: {error}") from error


def mismatch(what: str, dtype: str, shape: Sequence[int], expected: str, given: str) -> BadRequest:
    """The error that values and shape do not fit each other."""
    return BadRequest(f"{what}: {dtype} of shape {_shown(shape)} takes {expected}; got {given}")


def native(array: Tensor) -> Tensor:
    """`array` in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _shown(shape: Sequence[int]) -> str:
    more = ", …" if len(shape) > 8 else ""
    return f"[{', '.join(map(str, shape[:8]))}{more}]"
