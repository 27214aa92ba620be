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

_MOST_FIELDS = 100
"""Of a form; more are an attack: Seldon's messages have eight."""


def parsed(body: bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The JSON value that `body` is.

    Args:
        object_hook: what each object in it becomes, as `json.loads` has it.

    Raises:
        BadRequest: it is not JSON; a number that no double holds; what `object_hook` raises.
    """
    try:
        return json.loads(bytes(body).decode("utf-8-sig"), object_hook=object_hook, parse_float=_float)
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


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadRequest(f"JSON Parse error: Number too big to be stored in double: {text[:100]}")
    return value
