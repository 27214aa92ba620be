"""TensorFlow Serving's JSON: instances, inputs and examples in; predictions, outputs and results out."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from dl_inference_core.errors import BadRequest
from dl_inference_core.rest.documents import checked_object, from_base64, parsed
from dl_inference_core.tensors import (
    Form,
    Json,
    Layout,
    Payload,
    Request,
    Response,
    Tensor,
    Tensors,
    as_tensor,
    as_tensors,
    by_name,
    json_kind,
)
from dl_inference_core.wire.arrays import BFLOAT16, STRING, from_strings, native
from dl_inference_core.wire.routing_keys import RoutingKey
from dl_inference_tfserving.examples import CLASSIFY, REGRESS, ExamplesCodec, encode_example

_FEW = 64
"""As many floats are written one by one in the time that arrays take to set out, 0.1 ms."""
_TENS = np.array([10.0**power for power in range(23)])
"""The powers of ten that a double holds exactly."""
_WHOLE = range(2**24, 2**53)
"""Where every float32 is a whole number, and every whole number a double."""


@dataclass(frozen=True, slots=True)
class PredictCodec:
    """Of `:predict`, as `protocol.Codec` has it for a server.

    A request's payload is `Form.JSON`, with bytes where base64 stood: one value, or values by the inputs' names; of
    instances the lists of their values.
    """

    key: RoutingKey

    def decode_request(self, body: bytes) -> Request:
        document = checked_object(parsed(body, _unwrapped))
        rows = "instances" in document
        if rows and "inputs" in document:
            raise BadRequest("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
        if not rows and "inputs" not in document:
            raise BadRequest("Missing 'inputs' or 'instances' key")
        return Request(
            payload=_columns(document["instances"]) if rows else document["inputs"],
            form=Form.JSON,
            layout=Layout.ROWS if rows else Layout.COLUMNS,
            **_spec(self.key, document),
        )

    def encode_response(self, response: Response, request: Request) -> bytes:
        """Arrays, or arrays by name, are outputs as TensorFlow Serving writes them: one alone without its name.

        Python's own values, or a mapping in which there is one, are written as they are, so that the form of an answer
        does not depend on the values in it. For rows they are a list, or lists by name, which become a list of objects.

        Raises:
            BadRequest: outputs that cannot be listed in rows, or that JSON cannot hold.
            TypeError: Python's own values that JSON cannot hold, or that are not a value for each row.
        """
        outputs = _outputs(response.payload)
        if request.layout is Layout.ROWS:
            values = _plain_rows(response.payload) if outputs is None else _rows(outputs)
            return _dumped({"predictions": values})
        return _dumped({"outputs": _plain(response.payload) if outputs is None else _joined(_written(outputs))})


@dataclass(frozen=True, slots=True)
class ResultsCodec:
    """Of `:classify` and `:regress`; a request's payload is its examples, serialized.

    Attributes:
        codec: what gRPC speaks for the same method.
        results: of its result message what is written for each example.
    """

    codec: ExamplesCodec
    results: Callable[[Any], list[Any]]
    key: RoutingKey

    def decode_request(self, body: bytes) -> Request:
        document = checked_object(parsed(body, _unwrapped))
        if "examples" not in document:
            raise BadRequest("When method is classify, key 'examples' is expected and was not found")
        examples = document["examples"]
        if not isinstance(examples, list):
            raise BadRequest("Expecting 'examples' value to be an list/array")
        if not examples:
            raise BadRequest("'examples' value is an empty array")
        # Messages that stand behind one another are one message, merged.
        context = _example(document["context"], "the context") if "context" in document else b""
        serialized = [context + _example(example, f"example {index}") for index, example in enumerate(examples)]
        return Request(
            payload=from_strings(serialized, len(serialized)),
            form=Form.EXAMPLES,
            method=self.codec.method,
            **_spec(self.key, document),
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


CODECS: Mapping[str, Callable[[RoutingKey], PredictCodec | ResultsCodec]] = MappingProxyType(
    {
        "predict": PredictCodec,
        "classify": partial(ResultsCodec, CLASSIFY, _classes),
        "regress": partial(ResultsCodec, REGRESS, lambda result: _floats(result.regressions, "value")),
    }
)
"""By the verb at the URL's end."""


def _unwrapped(found: dict[str, Any]) -> Any:
    """The bytes that an object stands for, if it is `{"b64": "..."}`; padding and white space are optional."""
    if len(found) != 1 or not isinstance(text := found.get("b64"), str):
        return found
    return from_base64(text, 'the value of "b64"')


def _spec(key: RoutingKey, document: Mapping[str, Any]) -> dict[str, Any]:
    """What URL and document say beside the payload, as the fields of a `Request`."""
    signature = document.get("signature_name", "")
    if not isinstance(signature, str):
        raise BadRequest("not formatted correctly. 'signature_name' key must be a string value.")
    return {
        "model": key.model,
        "version": key.version,
        "label": key.label,
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
            wanted, got = ("object", "list") if named else ("value/list", "object")
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
        raise BadRequest(f"Example must be JSON object but got JSON {json_kind(features)}; it is {what}")
    try:
        serialized: bytes = encode_example(features).SerializeToString()
    except (TypeError, ValueError) as error:
        raise BadRequest(f"{error}; it is in {what}") from None
    return serialized


def _outputs(payload: Payload) -> dict[str, Tensor] | None:
    """`payload` as outputs by name, if it is made of numpy's values alone; None if it is, or holds, Python's own.

    Raises:
        TypeError: an array of objects that are not strings.
    """
    if isinstance(payload, np.ndarray | np.generic):
        return as_tensors(payload)
    if not isinstance(payload, Mapping) or not payload:
        return None
    numpy_alone = all(isinstance(value, np.ndarray | np.generic) for value in payload.values())
    return as_tensors(payload) if numpy_alone else None


def _rows(tensors: Tensors) -> list[Any]:
    """For each index of the first axis the outputs' values.

    Raises:
        BadRequest: the outputs do not have a first axis of one size.
    """
    for name, tensor in tensors.items():
        if not tensor.ndim:
            raise BadRequest(f"Tensor name: {name} has no shape information; ask for it with 'inputs'")
    _check_sizes(tensors)
    columns = _written(tensors)
    return _joined(columns) if len(columns) < 2 else _transposed(columns)


def _check_sizes(columns: Mapping[str, Any]) -> None:
    """Raises:
    BadRequest: they are not equally long.
    """
    expected = len(next(iter(columns.values())))
    for name, column in columns.items():
        if len(column) != expected:
            raise BadRequest(
                f"Tensor name: {name} has inconsistent batch size: {len(column)} expecting: {expected}; "
                "ask for it with 'inputs'"
            )


def _transposed(columns: Mapping[str, Any]) -> list[Any]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _joined(values: dict[str, Any]) -> Any:
    """The only value of one, or all of them by name."""
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
            f'output "{name}" is not UTF-8 ({error.reason} at {error.start}): '
            'JSON holds it only under a name that ends in "_bytes"; gRPC does under any'
        ) from None


def shortest(values: Tensor) -> Tensor:
    """float32 `values` as the float64 of the fewest decimal digits that are still those float32: 0.1 for what is
    0.10000000149011612. Whole numbers, ids and times among them, keep all digits for as long as a float64 has them:
    123456792 for what numpy writes as 123456790."""
    given = values.ravel()
    if given.size <= _FEW:
        return np.array([_short(value) for value in given.tolist()]).reshape(values.shape)
    with np.errstate(invalid="ignore"):  # signalling NaN
        exact = given.astype(np.float64)
    short = exact.copy()
    whole = (np.abs(exact) >= _WHOLE.start) & (np.abs(exact) < _WHOLE.stop)
    near = (np.abs(exact) > 1e-12) & (np.abs(exact) < 1e26) & ~whole
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
    for index in (*left, *np.flatnonzero(~near & ~whole & np.isfinite(exact) & (exact != 0))):
        short[index] = _short(exact[index])
    return short.reshape(values.shape)


def _short(value: float) -> float:
    return value if _WHOLE.start <= abs(value) < _WHOLE.stop else float(str(np.float32(value)))


def _plain(value: Any, name: str = "") -> Any:
    """Python's own values as they are, and numpy's values in them as outputs are written; `name` is the nearest key."""
    if isinstance(value, Mapping):
        return {key: _plain(item, key) for key, item in by_name(value, lambda item: item).items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _nested(name, native(as_tensor(value)))
    if isinstance(value, bytes):
        return _base64(value) if name.endswith("_bytes") else _text(name, value)
    return value


def _plain_rows(payload: Any) -> list[Any]:
    """Raises:
    BadRequest: lists by name that are not equally long.
    TypeError: it is neither a list nor lists by name.
    """
    if isinstance(payload, list | tuple):
        return _plain(payload)  # type: ignore[no-any-return]
    if not isinstance(payload, Mapping) or not payload or not all(map(_is_list, payload.values())):
        raise TypeError(
            f"expected tensors or a list, a value for each instance, or lists by name; got {type(payload).__name__}"
        )
    _check_sizes(payload)
    return _transposed(_plain(payload))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _dumped(content: Json) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()
