"""TensorFlow Serving's JSON: instances, inputs and examples in; predictions, outputs and results out."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from dl_inference_core.errors import BadRequest
from dl_inference_core.rest.tfserving import Addressed
from dl_inference_core.tensors import Form, Json, Payload, Request, Response, Tensor, Tensors, as_json, as_tensors
from dl_inference_core.wire.arrays import BFLOAT16, STRING, from_strings, native
from dl_inference_core.wire.tfserving_examples import CLASSIFY, REGRESS, ExamplesCodec, encode_example

_LARGEST = float(np.finfo(np.float32).max)
_FEW = 64
"""As many floats are written one by one in the time that arrays take to set out, 0.1 ms."""
_TENS = np.array([10.0**power for power in range(23)])
"""The powers of ten that a double holds exactly."""


@dataclass(slots=True, kw_only=True)
class PredictRequest(Request):
    """Attributes:
    rows: whether it came as `instances`, a value for each, and is to be answered so; else as `inputs`, whole tensors.
    """

    rows: bool


@dataclass(frozen=True, slots=True)
class PredictCodec:
    """Of `:predict`, as `protocol.Codec` has it for a server.

    A request's payload is `Form.JSON`, with bytes where base64 stood: one value, or values by the inputs' names; of
    instances the lists of their values.
    """

    addressed: Addressed

    def decode_request(self, body: bytes) -> PredictRequest:
        document = _parsed(body)
        rows = "instances" in document
        if rows and "inputs" in document:
            raise BadRequest("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
        if not rows and "inputs" not in document:
            raise BadRequest("Missing 'inputs' or 'instances' key")
        return PredictRequest(
            payload=_columns(document["instances"]) if rows else document["inputs"],
            form=Form.JSON,
            rows=rows,
            **_spec(self.addressed, document),
        )

    def encode_response(self, response: Response, request: PredictRequest) -> bytes:
        """A handler may answer what no tensor holds: then that is written as it is."""
        try:
            tensors = as_tensors(response.payload)
        except TypeError:
            values = _other(response.payload, request.rows)
        else:
            values = _rows(tensors) if request.rows else _joined(_written(tensors))
        return _dumped({"predictions" if request.rows else "outputs": values})


@dataclass(frozen=True, slots=True)
class ResultsCodec:
    """Of `:classify` and `:regress`; a request's payload is its examples, serialized.

    Attributes:
        codec: what gRPC speaks for the same method.
        results: of its result message what is written for each example.
    """

    codec: ExamplesCodec
    results: Callable[[Any], list[Any]]
    addressed: Addressed

    def decode_request(self, body: bytes) -> Request:
        document = _parsed(body)
        if "examples" not in document:
            raise BadRequest("key 'examples' is expected and was not found")
        examples = document["examples"]
        if not isinstance(examples, list):
            raise BadRequest("Expecting 'examples' value to be an list/array")
        if not examples:
            raise BadRequest("'examples' value is an empty array")
        # Messages that stand behind one another are one message, merged.
        context = _example(document["context"], "context") if "context" in document else b""
        serialized = [context + _example(example, f"example {index}") for index, example in enumerate(examples)]
        return Request(
            payload=from_strings(serialized, len(serialized)),
            form=Form.EXAMPLES,
            method=self.codec.method,
            **_spec(self.addressed, document),
        )

    def encode_response(self, response: Response, request: Request) -> bytes:
        return _dumped({"results": self.results(self.codec.answer(response, request).result)})


def _classes(result: Any) -> list[Any]:
    return [
        [[each.label, score] for each, score in zip(row.classes, _floats(row.classes, "score"), strict=True)]
        for row in result.classifications
    ]


def _floats(messages: Any, name: str) -> list[float]:
    return shortest(np.array([getattr(each, name) for each in messages], np.float32)).tolist()  # type: ignore[no-any-return]


CODECS: Mapping[str, Callable[[Addressed], PredictCodec | ResultsCodec]] = MappingProxyType(
    {
        "predict": PredictCodec,
        "classify": partial(ResultsCodec, CLASSIFY, _classes),
        "regress": partial(ResultsCodec, REGRESS, lambda result: _floats(result.regressions, "value")),
    }
)
"""By the verb at the URL's end."""


def _parsed(body: bytes) -> dict[str, Any]:
    """Raises:
    BadRequest: it is no JSON object; a number that no double holds; malformed base64.
    """
    try:
        document = json.loads(bytes(body).decode("utf-8-sig"), object_hook=_unwrapped, parse_float=_float)
    except UnicodeDecodeError as error:
        raise BadRequest(f"JSON Parse error: the document is no UTF-8: {error.reason} at {error.start}") from None
    except RecursionError:
        raise BadRequest("JSON Parse error: the document is nested too deeply") from None
    except ValueError as error:
        what = "The document is empty" if not body.strip() else str(error)
        raise BadRequest(f"JSON Parse error: {what}") from None
    if not isinstance(document, dict):
        raise BadRequest("JSON Value: Is not object; expected an object at the top")
    return document


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadRequest(f"JSON Parse error: Number too big to be stored in double: {text[:100]}")
    return value


def _unwrapped(found: dict[str, Any]) -> Any:
    """The bytes that an object stands for, if it is `{"b64": "..."}`; padding and white space are optional."""
    if len(found) != 1 or not isinstance(text := found.get("b64"), str):
        return found
    text = "".join(text.split())
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise BadRequest(f'Unable to base64 decode the value of "b64": {error}') from None


def _spec(addressed: Addressed, document: Mapping[str, Any]) -> dict[str, Any]:
    """What URL and document say beside the payload, as the fields of a `Request`."""
    signature = document.get("signature_name", "")
    if not isinstance(signature, str):
        raise BadRequest("not formatted correctly. 'signature_name' key must be a string value.")
    return {
        "model": addressed.model,
        "version": addressed.version,
        "label": addressed.label,
        "signature": signature,
    }


def _columns(instances: Any) -> Json:
    """The list of values as it is; of objects the list of each key's values."""
    if not isinstance(instances, list):
        raise BadRequest("Expecting 'instances' to be an list/array")
    if not instances:
        raise BadRequest("No values in 'instances' array")
    first = instances[0]
    named = isinstance(first, dict)
    for index, instance in enumerate(instances):
        if isinstance(instance, dict) is not named:
            wanted, got = ("object", "value/list") if named else ("value/list", "object")
            raise BadRequest(f"Expecting {wanted} but got {got} at item {index} of input list")
        if named and instance.keys() != first.keys():
            raise BadRequest(
                f"Failed to process element: {index} of 'instances' list. JSON object: keys must be equal to: "
                f"{','.join(first)}; got {','.join(instance)}"
            )
    return {name: [instance[name] for instance in instances] for name in first} if named else instances


def _example(features: Any, what: str) -> bytes:
    """A `tf.Example`, serialized."""
    if not isinstance(features, dict):
        raise BadRequest(f"{what}: Example must be JSON object; got {type(features).__name__}")
    for name, value in features.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and _LARGEST < abs(item) < math.inf:
                raise BadRequest(
                    f'{what}: feature "{name}": Cannot convert JSON value: {item} to float without loss of precision.'
                )
    try:
        serialized: bytes = encode_example(features).SerializeToString()
    except (TypeError, ValueError) as error:
        raise BadRequest(f"{what}: {error}") from None
    return serialized


def _rows(tensors: Tensors) -> list[Any]:
    """For each index of the first axis the outputs' values.

    Raises:
        BadRequest: the outputs do not have a first axis of one size.
    """
    size = None
    for name, tensor in tensors.items():
        if not tensor.ndim:
            raise BadRequest(f"Tensor name: {name} has no shape information; ask for it with 'inputs'")
        if size not in (None, len(tensor)):
            raise BadRequest(
                f"Tensor name: {name} has inconsistent batch size: {len(tensor)} expecting: {size}; "
                "ask for it with 'inputs'"
            )
        size = len(tensor)
    columns = _written(tensors)
    if len(columns) < 2:
        return _joined(columns)  # type: ignore[no-any-return]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _joined(values: dict[str, Any]) -> Any:
    """The only value of one, or all of them by name.

    Raises:
        TypeError: there are none.
    """
    if not values:
        raise TypeError("the model gave no outputs")
    return values if len(values) > 1 else next(iter(values.values()))


def _written(tensors: Tensors) -> dict[str, Any]:
    return {name: _nested(name, native(tensor)) for name, tensor in tensors.items()}


def _nested(name: str, tensor: Tensor) -> Any:
    """`tensor` as nested lists of what `json` writes."""
    if tensor.dtype == STRING:
        write = _base64 if name.endswith("_bytes") else partial(_text, name)
        strings = np.empty(tensor.size, dtype=object)
        strings[:] = [write(item) for item in tensor.ravel().tolist()]
        return strings.reshape(tensor.shape).tolist()
    if tensor.dtype == BFLOAT16 or (tensor.dtype.kind == "f" and tensor.dtype.itemsize <= 4):
        return shortest(tensor.astype(np.float32)).tolist()
    if tensor.dtype.kind not in "biuf":
        raise BadRequest(f'output "{name}": JSON holds no {tensor.dtype.name}; gRPC does')
    return tensor.tolist()


def _base64(value: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(value).decode("ascii")}


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(
            f'output "{name}" is no UTF-8 ({error.reason} at {error.start}): '
            'JSON holds it only under a name that ends in "_bytes"; gRPC does under any'
        ) from None


def shortest(values: Tensor) -> Tensor:
    """float32 `values` as the float64 of the fewest decimal digits that are still those float32: 0.1 for what is
    0.10000000149011612."""
    given = values.ravel()
    if given.size <= _FEW:
        return np.array([float(str(value)) for value in given]).reshape(values.shape)
    with np.errstate(invalid="ignore"):  # signalling NaN
        exact = given.astype(np.float64)
    short = exact.copy()
    near = (np.abs(exact) > 1e-12) & (np.abs(exact) < 1e26)
    left = np.flatnonzero(near)
    for digits in range(6, 10):
        value = exact[left]
        shift = digits - 1 - np.floor(np.log10(np.abs(value))).astype(np.int64)
        power = _TENS[np.abs(shift)]
        # One rounding, of integers that are exact: the double nearest to those digits.
        tried = np.where(shift < 0, np.rint(value / power) * power, np.rint(value * power) / power)
        fits = tried.astype(np.float32) == given[left]
        short[left[fits]] = tried[fits]
        left = left[~fits]
    for index in (*left, *np.flatnonzero(~near & np.isfinite(exact) & (exact != 0))):
        short[index] = float(str(given[index]))
    return short.reshape(values.shape)


def _other(payload: Payload, rows: bool) -> Json:
    """Raises:
    TypeError: a value for each instance was asked for, and this is no list.
    """
    if rows and not isinstance(payload, list):
        raise TypeError(f"expected tensors or a list, a value for each instance; got {type(payload).__name__}")
    return as_json(payload)


def _dumped(content: Json) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()
