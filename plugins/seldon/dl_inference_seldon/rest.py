"""Seldon's REST API: its URLs, the ways in which a request's JSON may come, and what is asked about server and models.
Values are `rest_codec`'s."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from dl_inference_core.errors import BadRequest, Code, InferenceError, ModelNotReady
from dl_inference_core.http_exchange import HttpExchange, Refused
from dl_inference_core.introspection import Readiness
from dl_inference_core.rest.answering import Local, RestApi, decoded
from dl_inference_core.rest.documents import checked_object, form_fields, multipart_fields, parsed
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import METADATA, PROTOCOLS, TRANSFORMS, Protocol
from dl_inference_core.wire.routing_keys import RoutingKey, task_of

if TYPE_CHECKING:
    from dl_inference_core.dispatcher import Dispatcher
    from dl_inference_core.transport import Message, Metadata
    from dl_inference_core.wire.codecs import Codec

# What seldon-core's own server answers at its root, and an ingress behind the name of a deployment.
_BOTH, _POST, _GET = ("GET", "POST"), ("POST",), ("GET", "HEAD")
_METHODS = MappingProxyType(
    {
        "/predict": _BOTH,
        "/api/v0.1/predictions": _POST,
        "/api/v1.0/predictions": _POST,
        "/transform-input": _BOTH,
        "/transform-output": _BOTH,
        "/metadata": _GET,
        "/api/v1.0/metadata": _GET,
        "/health/status": _GET,
        "/api/v1.0/health/status": _GET,
    }
)
"""By the end of a path the HTTP methods that it takes."""
_PATH = re.compile(rf"(?:/seldon(?:/[^/]+)?/(?P<deployment>[^/]+))?(?P<end>{'|'.join(map(re.escape, _METHODS))})")

_LARGE = 64 * 1024
"""Bytes of a body from which on another thread reads it than the transport's: of so many 1.2 ms."""

_PAYLOADS = ("data", "binData", "strData", "jsonData", "customData")
_MOST_SHOWN = 100
_REASONS = {
    Code.INVALID_ARGUMENT: "MICROSERVICE_BAD_DATA",
    Code.INTERNAL: "MICROSERVICE_INTERNAL_ERROR",
    Code.UNKNOWN: "MICROSERVICE_INTERNAL_ERROR",
}
"""seldon-core's words for its own errors; the others have the name of their gRPC status."""


@dataclass(slots=True)
class Document:
    """The JSON of a request, which is read once: when its key is asked for.

    Attributes:
        content: the JSON object; empty before that.
        key: its `taskId`; None if it has none.
    """

    _exchange: HttpExchange
    content: dict[str, Any] = field(default_factory=dict)
    key: str | int | None = None

    def read_key(self, body: Message) -> RoutingKey:
        """As `Protocol.read_key`; refuses a document without a payload or with several.

        Raises:
            BadRequest: the body has no JSON object, or none of a message of Seldon's.
        """
        self.content = self._read(body)
        given = self.payloads
        if len(given) != 1:
            what = f"several payloads, {', '.join(given)}" if given else "no payload"
            raise BadRequest(f"the message has {what}; expected one of data, binData, strData and jsonData")
        if "taskId" in self.tags:
            self.key = task_of(self.tags["taskId"])
        return RoutingKey(self.key)

    @property
    def payloads(self) -> list[str]:
        """The payloads in it, by their names; null is none, unless it is the only `jsonData`."""
        given = [name for name in _PAYLOADS if self.content.get(name) is not None]
        return given or [name for name in ("jsonData",) if name in self.content]

    @property
    def meta(self) -> dict[str, Any]:
        """Its `meta`; empty if it has none."""
        return object_in(self.content, "meta", "meta")

    @property
    def tags(self) -> dict[str, Any]:
        """Its `meta.tags`; empty if it has none."""
        return object_in(self.meta, "tags", "meta.tags")

    def _read(self, body: bytes) -> dict[str, Any]:
        """The message in a multipart form, in the form's or the URL's field `json`, or in the body itself: seldon-core
        looks for it in this order."""
        content_type = self._exchange.headers.get("content-type", "")
        kind = content_type.partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return dict(_in_form(name, value) for name, value in multipart_fields(body, content_type))
        # A client that says nothing of its body, as curl -d does not, calls it a form.
        is_form = kind == "application/x-www-form-urlencoded" and not body.lstrip().startswith(b"{")
        given = form_fields(body).get("json", "") if is_form else ""
        given = given or form_fields(self._exchange.query.encode("latin-1")).get("json", "")
        return checked_object(_parsed(given.encode() if given else body))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prediction(Protocol):
    """One request of the API, as listener and model take it."""

    document: Document

    @property
    def codec(self) -> Codec:
        from dl_inference_seldon.rest_codec import DocumentCodec  # numpy with it

        return cast("Codec", DocumentCodec(self.document))


def pages(readiness: Readiness) -> tuple[Route, ...]:
    """What seldon-core's server answers to those who watch it."""

    async def ping(_: Request) -> Response:
        return PlainTextResponse("pong")

    async def live(_: Request) -> Response:
        return PlainTextResponse("live")

    async def ready(_: Request) -> Response:
        return PlainTextResponse("ready") if readiness.ready else PlainTextResponse("not ready", 503)

    return Route("/health/ping", ping), Route("/live", live), Route("/ready", ready)


class SeldonRest(RestApi):
    """Answers the requests for models, and about them: what seldon-core's server for one model answers, and the same
    below `/seldon/NAME` and `/seldon/NAMESPACE/NAME`."""

    paths = ("/seldon/", "/api/", *(path for path in _METHODS if not path.startswith("/api/")))

    def __init__(self, local: Local, dispatcher: Dispatcher, *, cors: bool = False) -> None:
        super().__init__(local, dispatcher, cors=cors)
        self._readiness = local.readiness
        # One thread: several would only take the interpreter from each other.
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="read JSON")
        self._begin: dict[str, Callable[[HttpExchange, Metadata], None]] = {
            "predict": self._predict,
            "predictions": self._predict,
            "transform-input": self._transform,
            "transform-output": self._transform,
            "metadata": self._metadata,
            "status": self._health,
        }

    def begin(self, exchange: HttpExchange) -> None:
        path, verb = exchange.path, exchange.verb
        found = _PATH.fullmatch(path)
        if found is None:
            raise Refused(
                f"nothing is answered at {path[:200]}; expected /seldon/NAMESPACE/NAME, /seldon/NAME or nothing, and "
                f"one of {', '.join(_METHODS)}",
                404,
            )
        if verb not in (taken := _METHODS[found["end"]]):
            raise Refused(f"{verb} {path[:200]}: expected {' or '.join(taken)}", 405)
        deployment = decoded(found["deployment"] or "", "deployment name")
        metadata = ((PROTOCOLS["seldon"].key_metadata, deployment),) if deployment else ()
        begin = self._begin[found["end"].rpartition("/")[2]]
        if len(exchange.body) > _LARGE:
            self._reading.submit(self.attempt, exchange, lambda _: begin(exchange, metadata))
        else:
            begin(exchange, metadata)

    def describe(self, error: InferenceError, status: int) -> Any:
        """A message of Seldon's that says FAILURE."""
        reason = _REASONS.get(error.code, error.code.name)
        return {"status": {"code": status, "info": str(error), "reason": reason, "status": "FAILURE"}}

    def _predict(self, exchange: HttpExchange, metadata: Metadata) -> None:
        document = Document(exchange)
        seldon = PROTOCOLS["seldon"]
        prediction = _Prediction(
            name="rest_seldon",
            node_method="",
            read_key=document.read_key,
            codec_at="rest",
            key_metadata=seldon.key_metadata,
            key_expected=seldon.key_expected,
            document=document,
        )
        self.infer(exchange, prediction, metadata)

    def _transform(self, exchange: HttpExchange, metadata: Metadata) -> None:
        """The message itself, as by gRPC."""
        document = Document(exchange)
        which = "input" if exchange.path.endswith("input") else "output"
        transform = next(each for each in TRANSFORMS if each.name == f"seldon_transform_{which}")

        def write(_: Message) -> bytes:
            try:
                return json.dumps(document.content).encode()
            except RecursionError:  # writing takes more of Python's stack than reading
                raise _too_deep() from None

        self.infer(exchange, replace(transform, read_key=document.read_key), metadata, write)

    def _metadata(self, exchange: HttpExchange, metadata: Metadata) -> None:
        question = replace(
            METADATA,
            read_key=lambda _: RoutingKey(None),
            key_metadata=PROTOCOLS["seldon"].key_metadata,
            key_expected="the name of a model in the URL, /seldon/NAME/metadata",
        )
        self.ask(exchange, question, b"", _described, metadata)

    def _health(self, exchange: HttpExchange, metadata: Metadata) -> None:
        """seldon-core's answer for a model that defines none.

        Raises:
            ModelNotReady: requests would fail.
        """
        if not self._readiness.ready:
            raise ModelNotReady("no model is ready")
        self.answer(exchange, json.dumps({"meta": {}, "strData": "healthy"}).encode())


def object_in(content: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    """The object of that name in `content`; an empty one for null and where there is none.

    Raises:
        BadRequest: it is of another kind; `what` names it.
    """
    found = content.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise expected(what, found, "an object")
    return found


def expected(what: str, found: Any, kind: str) -> BadRequest:
    """The error that `what` is `found`, which is JSON of another kind."""
    shown = json.dumps(found)
    return BadRequest(f"{what} is {shown if len(shown) <= _MOST_SHOWN else f'{shown[:_MOST_SHOWN]}…'}; expected {kind}")


def _in_form(name: str, value: bytes) -> tuple[str, Any]:
    """A field of a multipart form as the member of a message: text and bytes as they are, anything else as JSON.

    Raises:
        BadRequest: it is not UTF-8, or not JSON.
    """
    if name == "binData":
        return name, base64.b64encode(value).decode("ascii")
    if name == "strData":
        try:
            return name, value.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"strData is not UTF-8: {error.reason} at {error.start}") from None
    return name, _parsed(value)


def _parsed(text: bytes) -> Any:
    """As `documents.parsed`.

    Raises:
        BadRequest: a string has half of a surrogate pair, which JSON's escapes can write and UTF-8 cannot.
    """
    content = parsed(text)
    if b"\\u" in text:
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadRequest(f"a string is not Unicode: {error.reason}") from None
        except RecursionError:
            raise _too_deep() from None
    return content


def _too_deep() -> BadRequest:
    return BadRequest("JSON Parse error: the document is nested too deeply")


def _described(message: Message) -> bytes:
    answer = messages.parse_answer(messages.ModelMetadataResponse, message)
    described = {
        "name": answer.name,
        "versions": list(answer.versions),
        "platform": answer.platform,
        "inputs": [_tensor(each) for each in answer.inputs],
        "outputs": [_tensor(each) for each in answer.outputs],
    }
    return json.dumps(described).encode()


def _tensor(described: Any) -> dict[str, Any]:
    return {"name": described.name, "datatype": described.datatype, "shape": list(described.shape)}
