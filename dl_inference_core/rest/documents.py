"""JSON documents and forms of requests, as any REST API reads them."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any
from urllib.parse import parse_qsl

from dl_inference_core.errors import BadRequest

_MOST_VALUES = 100_000
"""Lists and objects of a document, each of which takes up to 250 bytes and, with the garbage collections that they
cause, 200 ns, while no other thread runs. Two strings or names count as one, and eight literals, such as null."""
_MOST_NUMBERS = 200_000
"""Of a document whose integers are read in one go, 80 ns for each. Floats let other threads run in between, at twice
the time; beyond this number integers do so, too."""
_PIECE = 1 << 18
_SHORT = 200_000
"""Bytes of a document in which there are never too many of either."""

_MOST_FIELDS = 100
"""Of a form; more are an attack: Seldon's messages have eight."""


def parsed(body: bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The JSON value that `body` is.

    Args:
        object_hook: what each object in it becomes, as `json.loads` has it.

    Raises:
        BadRequest: it is not JSON; a number that no double holds; more than 100,000 lists, objects and pairs of
            strings; what `object_hook` raises.
    """
    try:
        parse_int = int if len(body) <= _SHORT or _count_numbers(body) <= _MOST_NUMBERS else _int
        text = bytes(body).decode("utf-8-sig")
        return json.loads(text, object_hook=object_hook, parse_float=_float, parse_int=parse_int)
    except UnicodeDecodeError as error:
        raise BadRequest(f"JSON Parse error: the document is not UTF-8: {error.reason} at {error.start}") from None
    except RecursionError:
        raise BadRequest("JSON Parse error: the document is nested too deeply") from None
    except ValueError as error:
        what = "The document is empty" if not body.strip() else str(error)
        raise BadRequest(f"JSON Parse error: {what}") from None


def checked_object(value: Any) -> dict[str, Any]:
    """Raises:
    BadRequest: `value`, a whole document, is not a JSON object.
    """
    if not isinstance(value, dict):
        raise BadRequest("JSON Value: Is not object; expected an object at the top")
    return value


def from_base64(text: str, what: str) -> bytes:
    """The bytes that `text` stands for; padding and white space are optional.

    Raises:
        BadRequest: it is not base64; `what` names it.
    """
    text = "".join(text.split())
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise BadRequest(f"Unable to base64 decode {what}: {error}") from None


def form_fields(form: bytes) -> dict[str, str]:
    """The fields of a URL-encoded form, or of a URL's query; the last of each name.

    Raises:
        BadRequest: it is not a form in UTF-8, or has more than 100 fields.
    """
    try:
        return dict(parse_qsl(form.decode(), errors="strict", max_num_fields=_MOST_FIELDS))
    except ValueError as error:
        raise BadRequest(f"the form cannot be read: {error}") from None


def multipart_fields(body: bytes, content_type: str) -> Iterator[tuple[str, bytes]]:
    """The name and the value of each field of a multipart/form-data form, files too.

    Args:
        content_type: the header, which says what stands between the fields.

    Raises:
        BadRequest: it is not such a form, or has more than 100 fields.
    """
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not boundary:
        raise BadRequest("the multipart form cannot be read: its content type names no boundary")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"), _MOST_FIELDS + 1)
    if not parts or not parts.pop().startswith(b"--"):
        raise BadRequest(f"the multipart form cannot be read: expected at most {_MOST_FIELDS} fields and its end")
    for part in parts:
        head, _, value = part.partition(b"\r\n\r\n")
        name = BytesHeaderParser().parsebytes(head.lstrip()).get_param("name", header="content-disposition")
        if not isinstance(name, str):
            raise BadRequest("the multipart form cannot be read: a field has no name in its Content-Disposition")
        yield name, value


def _count_numbers(body: bytes) -> int:
    """How many numbers `body` holds at most.

    Raises:
        BadRequest: more than 100,000 lists, objects and pairs of strings.
    """
    values = commas = 0
    for start in range(0, len(body), _PIECE):  # in pieces, between which other threads run
        piece = body[start : start + _PIECE]
        literals = piece.count(b"null") + piece.count(b"true") + piece.count(b"false")
        values += piece.count(b"[") + piece.count(b"{") + piece.count(b'"') // 4 + literals // 8
        commas += piece.count(b",")
        if values > _MOST_VALUES:
            raise BadRequest(
                f"JSON Parse error: the document has more than {_MOST_VALUES} lists, objects and pairs of strings in "
                f"its first {start + len(piece)} bytes; expected at most {_MOST_VALUES} (numbers do not count)"
            )
    return commas + 1


def _int(text: str) -> int:
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadRequest(f"JSON Parse error: Number too big to be stored in double: {text[:100]}")
    return value
