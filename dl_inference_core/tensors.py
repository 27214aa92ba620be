"""The values that move between wire, handler and backend: requests and responses with numpy arrays in them.

A tensor is a `numpy.ndarray` of shape and dtype as on the wire. Strings are arrays of dtype `object` that hold `bytes`;
bfloat16 is `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

Tensor: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Tensors: TypeAlias = Mapping[str, Tensor]
Json: TypeAlias = "dict[str, Any] | list[Any] | str | float | int | bool | None"
Payload: TypeAlias = "Tensors | Tensor | bytes | str | Json"


_MOST_DIMENSIONS = 32
_JSON_NAMES = {type(None): "null", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}


DEFAULT_SIGNATURE = "serving_default"
"""The signature that a request asks for which names none."""


class Form(enum.Enum):
    """How a payload stood on the wire; an answer takes the form of its request where it can."""

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


class Method(enum.Enum):
    """What a request asks of a signature; the values are TensorFlow's `method_name`s."""

    PREDICT = "tensorflow/serving/predict"
    CLASSIFY = "tensorflow/serving/classify"
    REGRESS = "tensorflow/serving/regress"


# Not frozen: to make a frozen one takes three times as long, 1.7 µs.
@dataclass(slots=True, kw_only=True)
class Request:
    """One inference request, decoded. Nobody changes it.

    Attributes:
        payload: what to infer on; its type follows from `form`.
        form: how the payload stood on the wire.
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
        template: the same in requests to one version of a model that are known to differ in the values of their tensors
            alone; None if it is not known of this one.
    """

    payload: Payload
    form: Form
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
    template: Any = field(default=None, repr=False, compare=False)


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
    """`value` (array, scalar, nested list, str or bytes) as a tensor; text becomes UTF-8 bytes of dtype object.

    Raises:
        TypeError: what no numeric, boolean or string array can hold (ragged lists, None, dicts).
    """
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OUS":
        return value
    if isinstance(value, bytes | str):
        array = np.empty((), dtype=object)
        array[()] = value
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"no tensor can hold this value: {error}") from error
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


def as_tensors(payload: Payload) -> dict[str, Tensor]:
    """`payload` as named tensors: a mapping keeps its names, anything else becomes the one tensor "output".

    Raises:
        TypeError: as `as_tensor`.
    """
    if isinstance(payload, Mapping):
        return {str(name): as_tensor(value) for name, value in payload.items()}
    return {"output": as_tensor(payload)}


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


def from_json(value: Any) -> Tensor:
    """A JSON value, in which there may be bytes too, as a tensor: bool, int64 (uint64 where one is above it), float64
    or strings. An empty one is float64.

    Raises:
        TypeError: what no tensor holds: null, objects, lists of several lengths, values of several kinds, integers
            beyond 64 bits, or beyond what a float64 holds beside floats.
    """
    shape: list[int] = []
    items: list[Any] = [value]
    while list in (kinds := set(map(type, items))):
        lengths = {len(item) for item in items} if len(kinds) == 1 else set()
        if len(lengths) != 1:
            raise TypeError(f"the items at level {len(shape)} of nested lists differ in length or depth")
        if len(shape) == _MOST_DIMENSIONS:
            raise TypeError(f"expected at most {_MOST_DIMENSIONS} levels of nested lists")
        shape += lengths
        items = list(chain.from_iterable(items))
    return _gathered(items, kinds).reshape(shape)


def _gathered(items: list[Any], kinds: set[type]) -> Tensor:
    """`items`, which are of those types, as a tensor of one dimension."""
    if kinds == {bool}:
        return np.array(items, np.bool_)
    if kinds == {int}:
        try:
            return np.array(items, np.int64 if max(items) < 2**63 else np.uint64)
        except OverflowError:
            raise TypeError("an integer is out of the range of 64 bits") from None
    if kinds <= {int, float}:
        if int in kinds and any(abs(item) > 2**53 for item in items if type(item) is int):
            raise TypeError("a list holds floats, and an integer that no float64 holds")
        return np.array(items, np.float64)
    if kinds <= {str, bytes}:
        return _strings(items)
    found = ", ".join(sorted(_JSON_NAMES.get(kind, kind.__name__) for kind in kinds))
    raise TypeError(f"expected numbers, or booleans, or strings; got {found}")


def _strings(items: list[Any]) -> Tensor:
    strings = np.empty(len(items), dtype=object)
    try:
        strings[:] = [item if isinstance(item, bytes) else item.encode() for item in items]
    except UnicodeEncodeError as error:
        raise TypeError(f"a string is no Unicode: {error.reason}") from None
    return strings


def as_json(value: Any) -> Json:
    """`value` with each tensor as nested lists (strings decoded as UTF-8) and each numpy scalar as a Python one."""
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value  # type: ignore[no-any-return]
