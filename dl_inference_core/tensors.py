"""The values that move between wire, handler and backend: requests and responses with numpy arrays in them.

A tensor is a `numpy.ndarray` of shape and dtype as on the wire. Strings are arrays of dtype `object` that hold `bytes`;
bfloat16 is `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import base64
import enum
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from typing import Protocol as Interface

import numpy as np

if TYPE_CHECKING:
    from dl_inference_core.transport import Metadata

Tensor: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Tensors: TypeAlias = Mapping[str, Tensor]
Json: TypeAlias = "dict[str, Any] | list[Any] | str | float | int | bool | None"
Payload: TypeAlias = "Tensors | Tensor | bytes | str | Json"
T = TypeVar("T")


_MOST_DIMENSIONS = 32
_EXACT = 2**53
"""A float64 holds every integer up to this magnitude; beyond it, it skips some."""
_PIECE = 1 << 14
"""Values of a list that one call of C looks at, in about 1 ms. Other threads run between two calls."""
_JSON_NAMES = {
    type(None): "null",
    dict: "an object",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    bytes: "bytes",
}
_NUMBERS: frozenset[type] = frozenset({int, float})
_TAKEN: Mapping[str, frozenset[type]] = MappingProxyType(
    {"b": frozenset({bool}), "i": frozenset({int}), "u": frozenset({int}), "O": frozenset({str, bytes})}
)
"""By a dtype's kind what it takes of JSON; any other kind takes numbers."""

# TensorFlow's words for kinds of JSON values and for dtypes, which TensorFlow Serving's REST errors repeat.
_TENSORFLOW_KINDS = {type(None): "Null", list: "Array", str: "String", int: "Number", float: "Number"}
_TENSORFLOW_DTYPES = {"object": "string", "float16": "half", "float32": "float", "float64": "double"}


DEFAULT_SIGNATURE = "serving_default"
"""The signature that a request asks for which names none."""


class Form(enum.Enum):
    """How a payload stood on the wire; a Seldon answer takes the form of its request where it can."""

    TENSORS = "tensors"  # named, typed tensors (TF Serving, Open Inference Protocol): Mapping[str, Tensor]
    TENSORS_RAW = "raw tensors"  # the same, as Open Inference raw contents
    TENSOR = "tensor"  # one float64 tensor without a name (Seldon data.tensor): Tensor
    NDARRAY = "ndarray"  # one nested list of numbers or strings (Seldon data.ndarray): Tensor
    TFTENSOR = "tftensor"  # one typed tensor without a name (Seldon data.tftensor): Tensor
    BYTES = "bytes"  # Seldon binData: bytes
    TEXT = "text"  # Seldon strData: str
    JSON = "json"  # Seldon jsonData, TF Serving's REST (with bytes where base64 stood): Json
    EXAMPLES = "examples"  # serialized tf.Examples (TF Serving's Classify and Regress): Tensor of strings

    @property
    def typed(self) -> bool:
        """Whether the client stated a dtype: then it must be the model's; otherwise values are cast."""
        return self in (Form.TENSORS, Form.TENSORS_RAW, Form.TFTENSOR, Form.EXAMPLES)


class Layout(enum.Enum):
    """How a request of TensorFlow Serving's REST API lists its values; the answer is listed in the same way."""

    ROWS = "instances"  # one value, or one object of values by the inputs' names, for each row
    COLUMNS = "inputs"  # the whole tensor, or whole tensors by the inputs' names


class Method(enum.Enum):
    """What a request asks of a signature; the values are TensorFlow's `method_name`s."""

    PREDICT = "tensorflow/serving/predict"
    CLASSIFY = "tensorflow/serving/classify"
    REGRESS = "tensorflow/serving/regress"


class Call(Interface):
    """The call that brought a request. Any thread."""

    @property
    def deadline(self) -> float | None:
        """When the client no longer waits, in seconds on the clock of `time.monotonic`; None if it waits for ever."""

    @property
    def metadata(self) -> Metadata:
        """The gRPC metadata of the call: pairs of a lower-case key and a value."""

    @property
    def request_id(self) -> str:
        """What logs and error messages call the request: the client's `x-request-id`, or one made here."""

    def cancelled(self) -> bool:
        """Whether the client no longer waits for the answer: it has left, or the deadline has passed."""


@dataclass(frozen=True, slots=True)
class CallSnapshot:
    """A `Call` by its facts: of a request that a handler copied, and of one that no call brought."""

    deadline: float | None = None
    metadata: Metadata = ()
    request_id: str = ""

    def cancelled(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


_NO_CALL = CallSnapshot()


# Not frozen: to make a frozen one takes three times as long, 1.7 µs.
@dataclass(slots=True, kw_only=True)
class Request:
    """One inference request, decoded. Nobody changes it.

    Attributes:
        payload: what to infer on; its type follows from `form`.
        form: how the payload stood on the wire.
        layout: how TensorFlow Serving's REST listed the values; None for a request of any other protocol.
        model: the routing key: a model's name, or a task id.
        version: the version asked for; None is the newest.
        label: the label of the version asked for, where `version` is None; "" is none.
        method: what is asked of the signature.
        signature: TF Serving's signature name; "" is the default one.
        outputs: the outputs asked for; empty is all.
        names: column names of an unnamed tensor (Seldon `data.names`).
        tags: Seldon's `meta.tags`, as Python values.
        parameters: the Open Inference Protocol's request parameters.
        id: the client's own id of the request (Open Inference `id`, Seldon `meta.puid`), to be echoed.
        call: the call that brought the request; its facts are properties of the request too.
    """

    payload: Payload
    form: Form
    layout: Layout | None = None
    model: str | int = ""
    version: int | None = None
    label: str = ""
    method: Method = Method.PREDICT
    signature: str = ""
    outputs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    tags: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    call: Call = field(default=_NO_CALL, repr=False, compare=False)

    @property
    def deadline(self) -> float | None:
        """When the client no longer waits, in seconds on the clock of `time.monotonic`; None if it waits for ever."""
        return self.call.deadline

    @property
    def metadata(self) -> Metadata:
        """The gRPC metadata of the call: pairs of a lower-case key and a value. Of REST, `x-request-id` alone."""
        return self.call.metadata

    @property
    def request_id(self) -> str:
        """What logs and error messages call the request: the client's `x-request-id`, or one made here."""
        return self.call.request_id

    def cancelled(self) -> bool:
        """Whether the client no longer waits: it has left, or its deadline has passed. A handler that works for long
        asks now and then, and stops."""
        return self.call.cancelled()


@dataclass(slots=True, kw_only=True)
class Response:
    """One answer: the payload in any form, and which model and version it is from. `tags` and `id` as in `Request`."""

    payload: Payload
    model: str = ""
    version: int | None = None
    names: tuple[str, ...] = ()
    tags: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


def as_tensor(value: Any) -> Tensor:
    """`value` (array, scalar, nested list or tuple, str, bytes) as a tensor; text becomes UTF-8 bytes of dtype object.

    Python's own values become bool, int64 (uint64 where one is above it), float64 or strings; empty lists become
    float64. No value changes: integers beside floats must be integers that a float64 holds.

    Raises:
        TypeError: what no numeric, boolean or string array can hold (ragged lists, None, dicts), or only by changing it
            (booleans beside numbers, integers beyond 2**53 beside floats).
    """
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OUS":
        return value
    if isinstance(value, list | tuple):
        leaves = _leaves(value)
        kinds = set(map(type, leaves))
        if kinds <= _JSON_NAMES.keys():
            return from_json(value)
        array = _joined(value, leaves)
    elif isinstance(value, bytes | str):
        array = np.empty((), dtype=object)
        array[()] = value
    else:
        array = np.asarray(value)
    if array.dtype.kind not in "OUS":
        return array
    if array.dtype.kind != "O":  # numpy's own text ends at its last character that is not NUL, and numbers become text
        array = np.array(value, dtype=object)
    strings = np.empty(array.size, dtype=object)
    for index, item in enumerate(array.ravel()):
        if isinstance(item, str):
            strings[index] = item.encode()
        elif isinstance(item, bytes):
            strings[index] = bytes(item)
        else:
            raise TypeError(f"no tensor can hold a value of type {type(item).__name__}")
    return strings.reshape(array.shape)


def _leaves(value: Any) -> list[Any]:
    """Everything in nested lists and tuples that is not a list or tuple itself.

    Raises:
        TypeError: they are nested deeper than a tensor has dimensions.
    """
    items = [value]
    for _ in range(_MOST_DIMENSIONS + 1):
        kinds = set(map(type, items))
        if not any(issubclass(kind, list | tuple) for kind in kinds):
            return items
        items = [leaf for item in items for leaf in (item if isinstance(item, list | tuple) else (item,))]
    raise TypeError(f"expected at most {_MOST_DIMENSIONS} levels of nested lists")


def _joined(value: Any, leaves: list[Any]) -> Tensor:
    """Nested lists in which there are arrays or numpy's scalars, the `leaves`, as one array.

    Raises:
        TypeError: no array holds them, or only by changing one of them.
    """
    try:
        array: Tensor = np.asarray(value)
    except ValueError as error:
        raise TypeError(f"no tensor can hold this value: {error}") from error
    if array.dtype.kind in "iufc":
        parts = [np.asarray(leaf) for leaf in leaves]
        if any(part.dtype.kind == "b" for part in parts):
            raise TypeError("expected numbers, or booleans, or strings; got a boolean, a number")
        whole = [part for part in parts if part.dtype.kind in "iu" and part.size] if array.dtype.kind in "fc" else []
        if any(int(part.max()) > _EXACT or int(part.min()) < -_EXACT for part in whole):
            raise TypeError("a list holds floats, and an integer that no float64 holds")
    return array


def as_tensors(payload: Payload) -> dict[str, Tensor]:
    """`payload` as named tensors: a mapping keeps its names, anything else becomes the one tensor "output".

    Raises:
        TypeError: as `as_tensor` and `by_name`.
    """
    return by_name(payload, as_tensor) if isinstance(payload, Mapping) else {"output": as_tensor(payload)}


def by_name(values: Mapping[Any, Any], convert: Callable[[Any], T]) -> dict[str, T]:
    """`values` with text for keys, each value converted.

    Raises:
        TypeError: two keys are the same as text, such as 0 and "0", so that one value would be lost.
    """
    named = {str(key): convert(value) for key, value in values.items()}
    if len(named) != len(values):
        keys = ", ".join(map(repr, values))
        raise TypeError(f"two values would have the same name; expected keys that differ as text, got {keys[:200]}")
    return named


def mapped(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """`value` with everything of that `kind` in it converted, in dicts, lists and tuples too."""
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        return {key: mapped(item, kind, convert) for key, item in value.items()}
    if isinstance(value, list):
        return [mapped(item, kind, convert) for item in value]
    if isinstance(value, tuple):
        items = [mapped(item, kind, convert) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def from_json(value: Any, dtype: np.dtype[Any] | None = None, *, number_dtype: np.dtype[Any] | None = None) -> Tensor:
    """A JSON value, in which there may be bytes and tuples too, as a tensor.

    Args:
        dtype: what to make of it, by the rules of TensorFlow Serving's REST: a floating-point dtype takes any number
            and rounds it, beyond its range to an infinity; an integer dtype takes integers in its range; bool takes
            booleans; object takes strings. None makes it bool, int64 (uint64 where one is above it), float64 or
            strings, and changes no value; an empty one is float64 then.
        number_dtype: `dtype` for what holds nothing but numbers, where `dtype` is None.

    Raises:
        TypeError: what no tensor holds: null, objects, lists of several lengths, values of several kinds, integers
            beyond 64 bits, or beyond what a float64 holds beside floats; with a dtype, what it does not take. Misfit
            where one item of the outermost list is at fault.
    """
    shape: list[int] = []
    items: list[Any] = [value]
    while not (kinds := _types(items)).isdisjoint((list, tuple)):
        lengths = {len(item) for item in items} if kinds <= {list, tuple} else set()
        if len(lengths) != 1:
            raise _uneven(items, shape)
        if len(shape) == _MOST_DIMENSIONS:
            raise TypeError(f"expected at most {_MOST_DIMENSIONS} levels of nested lists")
        shape += lengths
        items = _flattened(items)
    if dtype is None and kinds <= {int, float}:
        dtype = number_dtype
    return (_gathered(items, kinds) if dtype is None else _typed(items, kinds, dtype, shape)).reshape(shape)


def _pieces(items: list[Any]) -> Iterator[list[Any]]:
    return (items[start : start + _PIECE] for start in range(0, len(items), _PIECE))


def _types(items: list[Any]) -> set[type]:
    found: set[type] = set()
    for piece in _pieces(items):
        found.update(map(type, piece))
    return found


def _flattened(lists: list[Any]) -> list[Any]:
    items: list[Any] = []
    following = chain.from_iterable(lists)
    while piece := list(islice(following, _PIECE)):
        items += piece
    return items


def _numbers(items: list[Any], dtype: np.dtype[Any] | type[np.generic]) -> Tensor:
    """`items` as a tensor of one dimension.

    Raises:
        OverflowError: `dtype` cannot hold one of them.
    """
    array: Tensor = np.empty(len(items), dtype)
    for index, piece in enumerate(_pieces(items)):
        array[index * _PIECE : index * _PIECE + len(piece)] = piece
    return array


class Misfit(TypeError):
    """A JSON value that no tensor holds, or none of the dtype asked for; in TensorFlow Serving's words.

    Attributes:
        row: the index of the item of the outermost list that is at fault; None where the value is not a list.
    """

    def __init__(self, message: str, items: Sequence[Any], index: int, shape: Sequence[int]) -> None:
        """Args:
        items, index: what stands below the lists of this `shape`, and which of it is at fault.
        """
        super().__init__(message)
        self.row = index // (len(items) // shape[0]) if shape else None


def _uneven(items: list[Any], shape: Sequence[int]) -> Misfit:
    """Why `items`, which stand below the lists of this `shape`, are of no shape together."""
    level, first = len(shape), items[0]
    lists = [len(item) if isinstance(item, list | tuple) else None for item in items]
    odd = next(index for index, length in enumerate(lists) if length != lists[0])
    if lists[0] is None:
        words = f"Encountered list at unexpected level: {level} expected < {level}"
    elif lists[odd] is not None:
        words = f"Encountered list at unexpected size: {lists[odd]} at level: {level} expected size: {lists[0]}"
    else:
        rank = level
        while isinstance(first, list | tuple):
            rank, first = rank + 1, first[0] if first else None
        words = (
            f"JSON Value: {_shown(items[odd])} found at incorrect level: {level + 1} in the JSON DOM. "
            f"Expected at level: {rank}"
        )
    return Misfit(f"{words}; nested lists differ in length or depth", items, odd, shape)


def _typed(items: list[Any], kinds: set[type], dtype: np.dtype[Any], shape: Sequence[int]) -> Tensor:
    """`items`, which are of those types and stand below the lists of this `shape`, as a tensor of one dimension and
    that dtype.

    Raises:
        TypeError: one of them is not a value that this dtype takes.
    """
    taken = _TAKEN.get(dtype.kind, _NUMBERS)
    if not kinds <= taken:
        wrong = next(index for index, item in enumerate(items) if type(item) not in taken)
        raise Misfit(_not_of_type(items[wrong], dtype), items, wrong, shape)
    if dtype.kind == "O":
        return _strings(items)
    try:
        if dtype.kind in "biu":
            return _numbers(items, dtype)
        with np.errstate(over="ignore"):
            return _numbers(items, np.float64).astype(dtype)
    except OverflowError:
        if dtype.kind not in "iu":
            raise TypeError("Number too big to be stored in double: an integer") from None
        limits = np.iinfo(dtype)
        wrong = next(index for index, item in enumerate(items) if not limits.min <= item <= limits.max)
        raise Misfit(_not_of_type(items[wrong], dtype), items, wrong, shape) from None


def _not_of_type(item: Any, dtype: np.dtype[Any]) -> str:
    expected = _TENSORFLOW_DTYPES.get(dtype.name, dtype.name)
    return f"JSON Value: {_shown(item)} Type: {json_kind(item)} is not of expected type: {expected}"


def json_kind(item: Any) -> str:
    """TensorFlow Serving's word for the kind of a JSON value; bytes, from base64, stood in an object."""
    return str(item) if isinstance(item, bool) else _TENSORFLOW_KINDS.get(type(item), "Object")


def _shown(item: Any) -> str:
    """The beginning of a JSON value, in which there may be bytes from base64."""
    return json.dumps(item, default=lambda found: {"b64": base64.b64encode(found).decode("ascii")})[:256]


def _gathered(items: list[Any], kinds: set[type]) -> Tensor:
    """`items`, which are of those types, as a tensor of one dimension."""
    if kinds == {bool}:
        return _numbers(items, np.bool_)
    if kinds == {int}:
        try:
            return _numbers(items, np.int64 if max(map(max, _pieces(items))) < 2**63 else np.uint64)
        except OverflowError:
            raise TypeError("an integer is out of the range of 64 bits") from None
    if kinds <= {int, float}:
        if int in kinds and any(abs(item) > _EXACT for item in items if type(item) is int):
            raise TypeError("a list holds floats, and an integer that no float64 holds")
        return _numbers(items, np.float64)
    if kinds <= {str, bytes}:
        return _strings(items)
    found = ", ".join(sorted({_JSON_NAMES.get(kind, kind.__name__) for kind in kinds}))
    raise TypeError(f"expected numbers, or booleans, or strings; got {found}")


def _strings(items: list[Any]) -> Tensor:
    strings = np.empty(len(items), dtype=object)
    try:
        strings[:] = [item if isinstance(item, bytes) else item.encode() for item in items]
    except UnicodeEncodeError as error:
        raise TypeError(f"a string is not Unicode: {error.reason}") from None
    return strings


def as_json(value: Any, errors: str = "backslashreplace") -> Json:
    """`value` with each tensor as nested lists (strings decoded as UTF-8) and each numpy scalar as a Python one.

    Args:
        errors: what becomes of bytes that are not UTF-8, as `bytes.decode` has it.

    Raises:
        TypeError: as `by_name`.
        UnicodeDecodeError: there are such bytes, and `errors` is "strict".
    """
    if isinstance(value, Mapping):
        return by_name(value, partial(as_json, errors=errors))
    if isinstance(value, list | tuple):
        return [as_json(item, errors) for item in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist(), errors)
    if isinstance(value, np.generic):
        return as_json(value.item(), errors)
    if isinstance(value, bytes):
        return value.decode(errors=errors)
    return value  # type: ignore[no-any-return]
