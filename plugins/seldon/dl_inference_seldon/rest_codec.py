"""Seldon's messages as JSON. What they mean, and how an answer looks, is `wire.seldon`'s.

A request gives a handler the same values as the same message by gRPC, with one exception: integers in `jsonData` and in
tags stay integers. In answers, integers are written without a decimal point, as seldon-core writes them.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from google.protobuf import json_format

from dl_inference_core.errors import BadRequest
from dl_inference_core.rest.documents import from_base64
from dl_inference_core.tensors import Form, Payload, Request, Response, Tensor, as_json
from dl_inference_core.wire import messages, tfserving
from dl_inference_core.wire.arrays import count_of, mismatch, reshape
from dl_inference_core.wire.seldon import (
    MOST_DEPTH,
    Changed,
    answer_form,
    as_tftensor,
    checked_json,
    doubles,
    nested_as_tensor,
    numbers_or_list,
)
from dl_inference_seldon.rest import Document, expected, object_in

_NOT_FINITE = MappingProxyType({"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf})
"""protobuf's words for doubles that JSON lacks. seldon-core's client reads and writes tensors by them."""


@dataclass(frozen=True, slots=True)
class DocumentCodec:
    """Of one request, whose key has been read; as `protocol.Codec` has it for a server."""

    document: Document

    def decode_request(self, body: bytes) -> Request:
        payload, form, names = self._payload()
        puid, tags = self.document.meta.get("puid"), self.document.tags
        _check_depth(tags, "meta.tags")
        if not isinstance(puid, str | None):
            raise expected("meta.puid", puid, "a string")
        return Request(
            payload=payload,
            form=form,
            model="" if self.document.key is None else self.document.key,
            names=names,
            tags=dict(tags),
            id=puid or "",
        )

    def encode_response(self, response: Response, request: Request) -> bytes:
        """Raises:
        BadRequest: the answer holds a value that this form would change, and another form or protocol would not.
        TypeError: Seldon's messages cannot hold the answer.
        """
        meta: dict[str, Any] = {}
        if puid := response.id or request.id:
            meta["puid"] = puid
        if tags := {**request.tags, **response.tags}:
            meta["tags"] = as_json(tags)
        payload, form = answer_form(response.payload, request.form)
        try:
            content = _encoded(payload, form, response.names)
        except Changed as error:
            raise BadRequest(str(error)) from None
        return json.dumps({**content, "meta": meta}).encode()

    def _payload(self) -> tuple[Payload, Form, tuple[str, ...]]:
        """With the names of columns."""
        content = self.document.content
        (kind,) = self.document.payloads
        if kind == "data":
            return _decode_data(object_in(content, "data", "data"))
        value = content[kind]
        if kind == "jsonData":
            _check_depth(value, kind)
            return value, Form.JSON, ()
        if kind == "customData":
            raise BadRequest("customData is not served; expected data, binData, strData or jsonData")
        if not isinstance(value, str):
            raise expected(kind, value, "a string")
        if kind == "strData":
            return value, Form.TEXT, ()
        # protobuf's JSON takes either alphabet.
        return from_base64(value.translate(str.maketrans("-_", "+/")), "binData"), Form.BYTES, ()


def _check_depth(value: Any, what: str) -> None:
    """Raises:
    BadRequest: `value` is nested deeper than a message of Seldon's can be; `what` names it.
    """
    items = [value]
    for _ in range(MOST_DEPTH + 1):
        items = [
            child
            for item in items
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not items:
            return
    raise BadRequest(f"{what} is nested deeper than {MOST_DEPTH}; expected JSON that a message of Seldon's holds")


def _decode_data(data: dict[str, Any]) -> tuple[Tensor, Form, tuple[str, ...]]:
    names = _list_of(data, "names", str, "strings")
    given = [name for name in ("tensor", "ndarray", "tftensor") if data.get(name) is not None]
    if len(given) != 1:
        what = f"holds {', '.join(given)}" if given else "is empty"
        raise BadRequest(f"data {what}; expected one of data.tensor, data.ndarray and data.tftensor")
    if given == ["ndarray"]:
        if not isinstance(data["ndarray"], list):
            raise expected("data.ndarray", data["ndarray"], "a list")
        return nested_as_tensor(data["ndarray"]), Form.NDARRAY, names
    value = object_in(data, given[0], f"data.{given[0]}")
    if given == ["tensor"]:
        return _decode_tensor(value), Form.TENSOR, names
    try:
        message = json_format.ParseDict(value, messages.TensorProto())
    except (json_format.ParseError, AttributeError, TypeError, ValueError) as error:
        raise BadRequest(f"data.tftensor: {error}") from None
    return tfserving.decode_tensor(message, "data.tftensor", tfserving.Room()), Form.TFTENSOR, names


def _decode_tensor(tensor: dict[str, Any]) -> Tensor:
    shape = _list_of(tensor, "shape", int, "whole numbers")
    count = count_of(shape, "data.tensor")
    values = tensor.get("values") or []
    if not isinstance(values, list):
        raise expected("data.tensor.values", values, "a list")
    if str in (kinds := set(map(type, values))):
        values = [_NOT_FINITE.get(value, value) if isinstance(value, str) else value for value in values]
        kinds = set(map(type, values))
    if not kinds <= {int, float}:
        wrong = next(value for value in values if type(value) not in (int, float))
        raise expected("a value in data.tensor.values", wrong, "a number")
    if len(values) != count:
        raise mismatch("data.tensor", "float64", shape, f"{count} values", str(len(values)))
    return reshape(doubles(values, "data.tensor"), shape, "data.tensor")


def _list_of(content: dict[str, Any], name: str, kind: type, kinds: str) -> tuple[Any, ...]:
    """Raises:
    BadRequest: it is not a list, or holds anything of another kind; null is an empty list.
    """
    found = content.get(name)
    if found is None:
        return ()
    if not isinstance(found, list) or any(type(item) is not kind for item in found):
        raise expected(name, found, f"a list of {kinds}")
    return tuple(found)


def _encoded(payload: Payload, form: Form, names: tuple[str, ...]) -> dict[str, Any]:
    """Raises:
    Changed, TypeError: as `DocumentCodec.encode_response`.
    """
    match form:
        case Form.BYTES if isinstance(payload, bytes):
            return {"binData": base64.b64encode(payload).decode("ascii")}
        case Form.TEXT:
            return {"strData": payload}
        case Form.JSON:
            return {"jsonData": checked_json(payload)}
        case Form.TFTENSOR:
            return {"data": {"names": list(names), "tftensor": json_format.MessageToDict(as_tftensor(payload))}}
    values = numbers_or_list(payload, form)
    if isinstance(values, list):
        return {"data": {"names": list(names), "ndarray": checked_json(values)}}
    if values.dtype.kind not in "iu":
        values = values.astype(np.float64)
    if form is Form.NDARRAY:
        return {"data": {"names": list(names), "ndarray": values.tolist()}}
    return {"data": {"names": list(names), "tensor": {"shape": list(values.shape), "values": _finite(values)}}}


def _finite(values: Tensor) -> list[Any]:
    """The values in order, with protobuf's words for what is not finite."""
    flat = values.ravel()
    numbers: list[Any] = flat.tolist()
    for index in np.flatnonzero(~np.isfinite(flat)).tolist():
        number = numbers[index]
        numbers[index] = "NaN" if np.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    return numbers
