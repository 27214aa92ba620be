"""Seldon's REST API over real HTTP: every URL, every way for a message to come, every payload, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from dl_inference_seldon import rest as seldon
from dl_inference_seldon.rest_codec import DocumentCodec
from dl_inference_tfserving.rest import TfServingRest
from google.protobuf import json_format
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dl_inference_core import admin, asgi
from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import BadRequest
from dl_inference_core.http_server import HttpServer
from dl_inference_core.introspection import Readiness
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.repository import Repository
from dl_inference_core.rest.answering import Local, Rest
from dl_inference_core.routing import Routes
from dl_inference_core.tensors import Payload, Request
from dl_inference_core.testing import FakeBackend
from dl_inference_core.transport import Http
from dl_inference_core.wire import messages
from dl_inference_core.wire import seldon as wire

LIMIT = 100_000
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


class Gives(Handler):
    """Answers with what the test puts here, whatever was asked."""

    name = "gives"

    @staticmethod
    def what(request: Request) -> Payload:
        raise AssertionError("the test puts something here")

    def preprocess(self, request: Request) -> Any:
        return request

    def run_model(self, model: Any, inputs: Any, request: Request) -> Any:
        return type(self).what(request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A node's HTTP port on the loopback interface."""

    port: int
    metrics: Metrics
    readiness: Readiness

    async def ask(
        self, path: str, body: Any = None, method: str | None = None, kind: str = JSON, **headers: str
    ) -> tuple[int, Any]:
        """The status, and the JSON or text of the answer. A `body` that is neither text nor bytes is sent as JSON."""
        sent = body if isinstance(body, str | bytes | None) else json.dumps(body)

        def send() -> tuple[int, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            with contextlib.closing(connection):
                connection.request(
                    method or ("GET" if sent is None else "POST"),
                    path,
                    sent.encode() if isinstance(sent, str) else sent,
                    {"content-type": kind, **headers},
                )
                response = connection.getresponse()
                content = response.read()
                is_json = response.getheader("content-type") == JSON and content
                return response.status, json.loads(content) if is_json else content.decode()

        return await asyncio.to_thread(send)

    async def predict(self, message: Any, path: str = "/predict", **how: Any) -> Any:
        """The message that answers."""
        status, answer = await self.ask(path, message, **how)
        assert status == 200, answer
        return answer

    async def refusal(self, message: Any, path: str = "/predict", *, status: int = 400, **how: Any) -> str:
        """What a failure says, which has Seldon's form."""
        found, answer = await self.ask(path, message, **how)
        assert (found, list(answer)) == (status, ["status"]), answer
        told = answer["status"]
        assert (told.keys(), told["code"], told["status"]) == ({"code", "info", "reason", "status"}, status, "FAILURE")
        return str(told["info"])


@contextlib.asynccontextmanager
async def serving(
    folder: Path, *, elsewhere: Any = None, start: bool = True, cors: bool = False
) -> AsyncIterator[Served]:
    repository = Repository(folder, backends={"fake": FakeBackend()}, handlers={"gives": Gives})
    if start:
        await repository.start()
    readiness, metrics = Readiness(serving=start), Metrics()
    dispatcher = Dispatcher(Routes(repository), metrics)
    local = Local(repository, elsewhere, readiness)
    apis = TfServingRest(local, dispatcher), seldon.SeldonRest(local, dispatcher, cors=cors)
    rest = Rest(*apis, body_bytes=LIMIT, timeout_s=20)
    pages = admin.app(metrics, readiness, *seldon.pages(readiness))
    server = await HttpServer.start(asgi.with_exchanges(Http(service=rest, app=pages)), "127.0.0.1", 0)
    try:
        yield Served(port=server.port, metrics=metrics, readiness=readiness)
    finally:
        await server.close()
        await repository.close()


def write(folder: Path, name: str, toml: str = "", **content: Any) -> None:
    FakeBackend.write(folder / name / "1", **content)
    if toml:
        (folder / name / "model.toml").write_text(toml, encoding="utf-8")


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """One model, "double": twice what it is given."""
    write(tmp_path, "double", inputs={"x": ["float64", None]}, factor=2)
    return tmp_path


@pytest.fixture
def several(one: Path) -> Path:
    """ "double", task 7; "triple"; "space /é", which is times 5."""
    (one / "double/model.toml").write_text("task_id = 7\n")
    write(one, "triple", inputs={"x": ["float64", None]}, factor=3)
    write(one, "space é", inputs={"x": ["float64", None]}, factor=5)
    return one


@pytest.fixture
def gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(what): a folder with one model, which answers what that function makes of a request."""
    write(tmp_path, "gives", 'handler = "gives"')

    def gives(what: Any) -> Path:
        monkeypatch.setattr(Gives, "what", staticmethod(what))
        return tmp_path

    return gives


def ndarray(*values: Any, **more: Any) -> dict[str, Any]:
    return {"data": {"ndarray": list(values)}, **more}


def answered(*values: Any, **meta: Any) -> dict[str, Any]:
    return {"data": {"names": [], "ndarray": list(values)}, "meta": meta}


# URLs, and which model


@pytest.mark.parametrize("end", ["/predict", "/api/v1.0/predictions", "/api/v0.1/predictions"])
@pytest.mark.parametrize("start", ["", "/seldon/any", "/seldon/space/any", "/seldon/api/any"])
async def test_each_url_reaches_the_only_model(one: Path, start: str, end: str) -> None:
    async with serving(one) as served:
        assert await served.predict(ndarray(1, 2.5), start + end) == answered(2.0, 5.0)


@pytest.mark.parametrize(
    ("path", "tags", "factor"),
    [
        ("/predict", {"taskId": "triple"}, 3),
        ("/predict", {"taskId": 7}, 2),
        ("/predict", {"taskId": 7.0}, 2),
        ("/predict", {"taskId": "any-7"}, 2),
        ("/seldon/triple/api/v1.0/predictions", {}, 3),
        ("/seldon/space/triple/api/v1.0/predictions", {}, 3),
        ("/seldon/triple/predict", {"taskId": "double"}, 2),
        (f"/seldon/{quote('space é')}/api/v0.1/predictions", {"who": "we"}, 5),
    ],
)
async def test_the_task_id_comes_before_the_deployment(
    several: Path, path: str, tags: dict[str, Any], factor: int
) -> None:
    async with serving(several) as served:
        answer = await served.predict(ndarray(1, meta={"tags": tags}), path)
        assert answer == answered(factor, **({"tags": tags} if tags else {}))


async def test_without_a_name_that_a_model_has_the_error_says_what_to_send(several: Path) -> None:
    async with serving(several) as served:
        said = await served.refusal(ndarray(1))
        assert said.startswith("the request does not name a model; this server has several")
        assert 'meta.tags["taskId"]' in said
        assert "/seldon/NAME/api/v1.0/predictions" in said
        said = await served.refusal(ndarray(1), "/seldon/nope/api/v1.0/predictions")
        assert 'does not name a model, and no model is named "nope"' in said
        said = await served.refusal(ndarray(1, meta={"tags": {"taskId": "nope"}}), status=404)
        assert 'no model or task is named "nope"' in said


@pytest.mark.parametrize("task", ["", True, None, 1.5, 2**53 + 1, 10**30, [7], {"id": 7}])
async def test_a_task_id_of_another_kind(several: Path, task: Any) -> None:
    async with serving(several) as served:
        said = await served.refusal(ndarray(1, meta={"tags": {"taskId": task}}))
        assert said.startswith('meta.tags["taskId"] is ')
        assert said.endswith("expected a whole number or a non-empty string")


class Elsewhere:
    """A table with a route to other nodes."""

    models = MappingProxyType({"away": object()})
    tasks: Any = MappingProxyType({})


async def test_a_route_to_other_nodes_is_never_taken_for_the_only_model(one: Path, tmp_path: Path) -> None:
    async with serving(one, elsewhere=Elsewhere()) as served:
        said = await served.refusal(ndarray(1), "/seldon/away/predict", status=404)
        assert '"away" is a route to other nodes' in said
        assert await served.predict(ndarray(1)) == answered(2.0)
    (tmp_path / "empty").mkdir()
    async with serving(tmp_path / "empty", elsewhere=Elsewhere()) as served:
        assert "routes to other nodes alone" in await served.refusal(ndarray(1), status=404)


async def test_before_the_models_are_there_and_after_the_end(one: Path) -> None:
    async with serving(one, start=False) as served:
        assert "it is starting" in await served.refusal(ndarray(1), status=503)
        assert "the server is starting" in await served.refusal(ndarray(1), "/seldon/double/predict", status=503)
    async with serving(one) as served:
        served.readiness.ending.set()
        assert "shutting down" in await served.refusal(ndarray(1), status=503)


async def test_paths_and_methods_that_mean_nothing(one: Path) -> None:
    async with serving(one) as served:
        for path in ("/api/", "/api/v2.0/predictions", "/seldon/a", "/seldon/a/b/c/predict", "/seldon//predict"):
            assert (await served.refusal(ndarray(1), path, status=404)).startswith(f"nothing is answered at {path};")
        for path in ("/api/v1.0/predictions", "/seldon/double/api/v0.1/predictions"):
            assert "expected POST" in await served.refusal(None, path, status=405)
        assert "expected GET or HEAD" in await served.refusal("{}", "/metadata", status=405)
        assert (await served.ask("/aggregate", "{}"))[0] == 404


# The ways for a message to come


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--limit\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


MULTIPART = "multipart/form-data; boundary=limit"


async def test_forms_and_queries(gives: Any) -> None:
    def what(request: Request) -> Payload:
        return {"payload": str(request.payload), "tags": dict(request.tags)}

    text = json.dumps({"strData": "grüße + 1&2", "meta": {"tags": {"a": "ß"}}}, ensure_ascii=False)
    expected = {"payload": "grüße + 1&2", "tags": {"a": "ß"}}
    encoded = urlencode({"other": "1", "json": text})
    parts = (
        part("strData", "grüße + 1&2".encode(), "\r\nContent-Type: text/plain")
        + part("meta", '{"tags": {"a": "ß"}}'.encode())
        + b"--limit--\r\n"
    )
    async with serving(gives(what)) as served:
        for answer in (
            await served.predict(text),
            await served.predict(text, kind=FORM),  # as curl -d says
            await served.predict(text, kind="text/plain"),
            await served.predict(encoded, kind=FORM),
            await served.predict(f"json={text.replace('+', '%2B').replace('&', '%26')}", kind=f"{FORM}; charset=utf-8"),
            await served.predict(None, f"/predict?{encoded}"),
            await served.predict(b"", f"/api/v1.0/predictions?{encoded}"),
            await served.predict(b"preamble\r\n" + parts, kind=MULTIPART),
        ):
            assert answer["jsonData"] == expected


async def test_bytes_in_a_multipart_form(gives: Any) -> None:
    given = bytes(range(256)) + b"\r\n--limi\n"
    async with serving(gives(lambda request: request.payload[::-1])) as served:
        body = part("binData", given, '; filename="a.bin"\r\nContent-Type: application/octet-stream') + b"--limit--"
        answer = await served.predict(body, kind=MULTIPART)
        assert base64.b64decode(answer["binData"]) == given[::-1]


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("", JSON, "The document is empty"),
        ("[1]", JSON, "Is not object"),
        ("{", JSON, "JSON Parse error"),
        (b'{"strData": "\xff"}', JSON, "not UTF-8"),
        ('{"strData": "\\ud800"}', JSON, "a string is not Unicode"),
        ('{"data": {"ndarray": [1e400]}}', JSON, "Number too big"),
        ("json=%7B", FORM, "JSON Parse error"),
        ("json=%FF", FORM, "the form cannot be read"),
        ("a=1&" * 101, FORM, "the form cannot be read"),
        ("other=1", FORM, "JSON Parse error"),
        (part("strData", b"a"), MULTIPART, "expected at most 100 fields and its end"),
        (part("strData", b"a") * 101 + b"--limit--", MULTIPART, "expected at most 100 fields and its end"),
        (b"--limit\r\n\r\na\r\n--limit--", MULTIPART, "a field has no name"),
        (b"--limit--", "multipart/form-data", "names no boundary"),
        (part("strData", b"\xff") + b"--limit--", MULTIPART, "strData is not UTF-8"),
        (part("data", b"{") + b"--limit--", MULTIPART, "JSON Parse error"),
        (b"--limit--", MULTIPART, "the message has no payload"),
    ],
)
async def test_what_is_no_message(one: Path, body: Any, kind: str, said: str) -> None:
    async with serving(one) as served:
        assert said in await served.refusal(body, kind=kind)


# Payloads


async def test_an_answer_has_the_form_of_its_request(one: Path) -> None:
    async with serving(one) as served:
        for data, expected in (
            ({"ndarray": [[1, 2.5], [3, True]]}, {"ndarray": [[2.0, 5.0], [6.0, 2.0]]}),
            ({"ndarray": []}, {"ndarray": []}),
            (
                {"tensor": {"shape": [2, 1], "values": [1, 2.5]}, "names": ["a"]},
                {"tensor": {"shape": [2, 1], "values": [2.0, 5.0]}},
            ),
            ({"tensor": {"shape": [1], "values": [4]}, "ndarray": None}, {"tensor": {"shape": [1], "values": [8.0]}}),
            ({"tensor": {"shape": [0, 2]}}, {"tensor": {"shape": [0, 2], "values": []}}),
            (
                {"tftensor": {"dtype": "DT_DOUBLE", "tensorShape": {"dim": [{"size": 2}]}, "doubleVal": [1, 2.5]}},
                {"tftensor": {"dtype": "DT_DOUBLE", "tensorShape": {"dim": [{"size": "2"}]}, "doubleVal": [2.0, 5.0]}},
            ),
        ):
            answer = await served.predict({"data": data, "strData": None, "meta": None})
            assert answer == {"data": {"names": [], **expected}, "meta": {}}


async def test_other_payloads_tags_and_ids(gives: Any) -> None:
    meta = {"puid": "the-puid", "tags": {"who": ["we", 1, {"deep": None}], "number": 2**60 + 1}, "routing": {"a": 1}}
    encoded = base64.b64encode(bytes(range(256))).decode()
    async with serving(gives(lambda request: request.payload)) as served:
        for name, value in (
            ("strData", "grüße\n"),
            ("strData", ""),
            ("binData", encoded),
            ("binData", ""),
            ("jsonData", {"deep": [1, {"er": None}], "on": True, "text": "ß"}),
            ("jsonData", "text"),
        ):
            answer = await served.predict({name: value, "meta": meta})
            kind = "strData" if value == "text" else name
            expected = {name: meta[name] for name in ("puid", "tags")}
            assert answer == {kind: value, "meta": expected}
        url_safe = encoded.replace("+", "-").replace("/", "_").rstrip("=")
        assert (await served.predict({"binData": url_safe}))["binData"] == encoded
    async with serving(gives(lambda request: {"was": request.payload})) as served:
        assert (await served.predict({"jsonData": None}))["jsonData"] == {"was": None}


async def test_values_that_are_not_finite(one: Path) -> None:
    async with serving(one) as served:
        words = ["NaN", "Infinity", "-Infinity", 1.0]
        answer = await served.predict({"data": {"tensor": {"shape": [4], "values": words}}})
        assert answer["data"]["tensor"]["values"] == [*words[:3], 2.0]
        answer = await served.predict('{"data": {"ndarray": [NaN, Infinity, -Infinity]}}')
        nan, *infinities = answer["data"]["ndarray"]
        assert math.isnan(nan)
        assert infinities == [math.inf, -math.inf]


async def test_integers_keep_their_form_and_are_never_rounded(gives: Any) -> None:
    async with serving(gives(lambda _: np.array([1, 2**53]))) as served:
        status, answer = await served.ask("/predict", ndarray(0))
        assert (status, json.dumps(answer["data"]["ndarray"])) == (200, "[1, 9007199254740992]")
    for large in (np.array([2**53 + 1]), [2**53 + 1, "text"], {"a": {"b": 2**53 + 1}}):
        async with serving(gives(lambda _, large=large: large)) as served:
            assert "the answer holds the integer 9007199254740993" in await served.refusal(ndarray(0))
    async with serving(gives(lambda request: str(request.payload))) as served:
        for data in (
            {"ndarray": [1.5, 2**53 + 1]},
            {"tensor": {"shape": [2], "values": ["NaN", 2**53 + 1]}},
        ):
            said = await served.refusal({"data": data})
            assert "holds the integer 9007199254740993: Seldon's numbers are doubles" in said
        for beyond in (2**1024 - 1, 10**400):
            assert f"holds the integer {str(beyond)[:9]}" in await served.refusal(ndarray(beyond))
        assert (await served.predict({"jsonData": [2**53 + 1]}))["strData"] == "[9007199254740993]"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({}, "the message has no payload; expected one of data, binData, strData and jsonData"),
        ({"data": None}, "no payload"),
        ({"strData": "a", "jsonData": {}}, "the message has several payloads, strData, jsonData"),
        ({"customData": {"a": 1}}, "customData is not served"),
        ({"strData": 1}, "strData is 1; expected a string"),
        ({"binData": ["a"]}, 'binData is ["a"]; expected a string'),
        ({"binData": "?"}, "Unable to base64 decode binData"),
        ({"data": [1]}, "data is [1]; expected an object"),
        ({"data": {}}, "data is empty; expected one of data.tensor, data.ndarray and data.tftensor"),
        ({"data": {"ndarray": [], "tensor": {}}}, "data holds tensor, ndarray; expected one of"),
        ({"data": {"ndarray": 1}}, "data.ndarray is 1; expected a list"),
        (ndarray([1], [2, 3]), "lists of unequal length"),
        (ndarray([1, None]), "an object or null"),
        ({"data": {"names": "ab", "ndarray": []}}, 'names is "ab"; expected a list of strings'),
        ({"data": {"names": [1], "ndarray": []}}, "names is [1]; expected a list of strings"),
        (
            {"data": {"tensor": {"shape": [2], "values": [1]}}},
            "data.tensor: float64 of shape [2] takes 2 values; got 1",
        ),
        ({"data": {"tensor": {"shape": [-1], "values": [1]}}}, "negative size"),
        ({"data": {"tensor": {"shape": [1.5], "values": [1]}}}, "shape is [1.5]; expected a list of whole numbers"),
        ({"data": {"tensor": {"shape": [1], "values": 1}}}, "data.tensor.values is 1; expected a list"),
        (
            {"data": {"tensor": {"shape": [1], "values": ["1"]}}},
            'a value in data.tensor.values is "1"; expected a number',
        ),
        ({"data": {"tensor": {"shape": [1], "values": [True]}}}, "a value in data.tensor.values is true"),
        ({"data": {"tftensor": {"dtype": "DT_NOPE"}}}, "data.tftensor: "),
        ({"data": {"tftensor": {"doubleVal": "a"}}}, "data.tftensor: "),
        ({"data": {"tftensor": []}}, "data.tftensor is []; expected an object"),
        (ndarray(1, meta=[]), "meta is []; expected an object"),
        (ndarray(1, meta={"tags": "a"}), 'meta.tags is "a"; expected an object'),
        (ndarray(1, meta={"puid": 1}), "meta.puid is 1; expected a string"),
        ({"strData": "text"}, "takes tensors, not text"),
    ],
)
async def test_each_malformed_message_is_told_what_is_wrong(one: Path, message: Any, said: str) -> None:
    async with serving(one) as served:
        assert said in await served.refusal(message)


async def test_what_a_model_raises_is_an_error_of_the_service(tmp_path: Path) -> None:
    write(tmp_path, "m", inputs={"x": ["float64", None]}, fail="it is broken")
    async with serving(tmp_path) as served:
        status, answer = await served.ask("/predict", ndarray(1))
        assert status == 500
        assert answer["status"]["reason"] == "MICROSERVICE_INTERNAL_ERROR"
        assert "request id" in answer["status"]["info"]
        lines = served.metrics.render("")[0].decode().splitlines()
        assert any('protocol="rest_seldon"' in line and 'code="INTERNAL"' in line for line in lines)


async def test_a_body_over_the_limit(one: Path) -> None:
    async with serving(one) as served:
        assert "too large" in await served.refusal({"strData": "x" * LIMIT}, status=413)


# The same values as by gRPC


class Asked:
    """What a document looks at beside the body."""

    headers: Any = MappingProxyType({})
    query = ""


def by_rest(values: list[Any]) -> Request:
    document = seldon.Document(Asked())  # type: ignore[arg-type]
    body = json.dumps(ndarray(*values)).encode()
    document.read_key(body)
    return DocumentCodec(document).decode_request(body)


def by_grpc(values: list[Any]) -> Request:
    tree = messages.Value()
    json_format.ParseDict(values, tree)
    return wire.decode_request(messages.SeldonMessage(data={"ndarray": tree.list_value}).SerializeToString())


def taken(by: Callable[[list[Any]], Request], values: list[Any]) -> Any:
    """What a handler gets, or the error."""
    try:
        array = by(values).payload
    except BadRequest as error:
        return str(error)
    assert isinstance(array, np.ndarray)
    return array.dtype, array.shape, array.tolist()


leaves = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text(max_size=4))
lists = st.recursive(st.lists(leaves, max_size=4), lambda inner: st.lists(inner, max_size=3), max_leaves=8)


@settings(deadline=None, max_examples=200)
@given(lists)
def test_a_list_gives_a_handler_the_array_that_it_gives_by_grpc(values: list[Any]) -> None:
    assert taken(by_rest, values) == taken(by_grpc, values)


names = st.sampled_from(
    [*seldon._PAYLOADS, "meta", "tags", "taskId", "puid", "names", "tensor", "ndarray", "tftensor", "shape", "values"]
    + [field.json_name for field in messages.TensorProto.DESCRIPTOR.fields]
)
words = st.sampled_from(["NaN", "DT_FLOAT", "AAAA", "DT_STRING", "-1", "", "\ud800"])
trees = st.recursive(
    st.one_of(st.none(), leaves, st.integers(), words),
    lambda inner: st.one_of(st.dictionaries(names, inner, max_size=4), st.lists(inner, max_size=3)),
    max_leaves=12,
)


@settings(deadline=None, max_examples=500)
@given(
    st.one_of(
        st.dictionaries(names, trees, max_size=3),
        st.dictionaries(st.sampled_from(["shape", "values"]), trees).map(lambda tensor: {"data": {"tensor": tensor}}),
        st.dictionaries(names, trees, max_size=4).map(lambda tensor: {"data": {"tftensor": tensor}}),
        trees.map(lambda tree: {"strData": "a", "meta": tree}),
    )
)
@example({"data": {"tensor": {"shape": [0, 10**30], "values": []}}})
@example({"data": {"tftensor": {"dtype": "DT_FLOAT", "tensorShape": {"dim": [{"size": "1000000000000"}]}}}})
def test_any_document_is_a_message_or_a_bad_one(content: dict[str, Any]) -> None:
    document = seldon.Document(Asked())  # type: ignore[arg-type]
    with contextlib.suppress(BadRequest):
        document.read_key(json.dumps(content).encode())
        DocumentCodec(document).decode_request(b"")


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([part("strData", b"a"), b"--limit", b"\r\n", b"--", b"\r\n\r\n", b"name=", b"\xff"])))
def test_any_multipart_form_is_a_message_or_a_bad_one(pieces: list[bytes]) -> None:
    class Sent(Asked):
        headers = MappingProxyType({"content-type": MULTIPART})

    document = seldon.Document(Sent())  # type: ignore[arg-type]
    with contextlib.suppress(BadRequest):
        document.read_key(b"".join(pieces))


async def test_values_that_are_nested_deeply(gives: Any) -> None:
    async with serving(gives(lambda request: request.payload)) as served:
        for depth in (29, 30, 31, 32, 40, 100, 900, 5000):
            deep = "[" * depth + "1" + "]" * depth
            for message in ('{"jsonData": {"a": DEEP}}', '{"strData": "a", "meta": {"tags": {"a": DEEP}}}'):
                body = message.replace("DEEP", deep)
                if depth < 30:
                    assert await served.predict(body) == {"meta": {}, **json.loads(body)}
                else:
                    assert "nested" in await served.refusal(body)
            if depth > 32:
                said = await served.refusal('{"data": {"ndarray": DEEP}}'.replace("DEEP", deep))
                assert "dimensions; expected 32" in said or "nested too deeply" in said


# About server and models


async def test_metadata(several: Path) -> None:
    async with serving(several) as served:
        for path in ("/seldon/triple/metadata", "/seldon/space/triple/api/v1.0/metadata"):
            assert await served.ask(path) == (
                200,
                {
                    "name": "triple",
                    "versions": ["1"],
                    "platform": "fake",
                    "inputs": [{"name": "x", "datatype": "FP64", "shape": []}],
                    "outputs": [{"name": "x", "datatype": "FP64", "shape": []}],
                },
            )
        assert "/seldon/NAME/metadata" in await served.refusal(None, "/metadata")


async def test_metadata_of_the_only_model(one: Path) -> None:
    async with serving(one) as served:
        for path in ("/metadata", "/api/v1.0/metadata", "/seldon/any/metadata"):
            status, answer = await served.ask(path)
            assert (status, answer["name"]) == (200, "double")


async def test_health(one: Path) -> None:
    async with serving(one) as served:
        assert await served.ask("/health/ping") == (200, "pong")
        for path in ("/health/status", "/api/v1.0/health/status", "/seldon/any/health/status"):
            assert await served.ask(path) == (200, {"meta": {}, "strData": "healthy"})
        assert [(await served.ask(path))[0] for path in ("/live", "/ready")] == [200, 200]
        served.readiness.upstreams = lambda: False
        assert "no model is ready" in await served.refusal(None, "/health/status", status=503)
        assert [(await served.ask(path))[0] for path in ("/live", "/ready", "/health/ping")] == [200, 503, 200]


@pytest.mark.parametrize("which", ["input", "output"])
async def test_a_transformation_is_the_message_itself(several: Path, which: str) -> None:
    message = {"jsonData": {"a": 2**60 + 1}, "meta": {"tags": {"taskId": "triple"}, "puid": "p"}}
    async with serving(several) as served:
        path = f"/transform-{which}"
        assert await served.predict(message, path) == message
        assert await served.predict(urlencode({"json": json.dumps(message)}), path, kind=FORM) == message
        assert "does not name a model" in await served.refusal({"strData": "a"}, path)
        assert "no payload" in await served.refusal({}, path)


@pytest.mark.parametrize("cors", [False, True])
async def test_pages_of_other_origins_may_ask_where_cors_is_enabled(one: Path, cors: bool) -> None:
    async with serving(one, cors=cors) as served:

        def headers(method: str, path: str, body: str | None) -> tuple[int, str | None]:
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
            with contextlib.closing(connection):
                connection.request(method, path, body, {"origin": "https://page.example"})
                response = connection.getresponse()
                response.read()
                return response.status, response.getheader("access-control-allow-origin")

        for method, path, body, status in (
            ("OPTIONS", "/api/v1.0/predictions", None, 200),
            ("POST", "/predict", '{"data": {"ndarray": [1]}}', 200),
            ("POST", "/seldon/any/predict", "{}", 400),
        ):
            assert await asyncio.to_thread(headers, method, path, body) == (status, "*" if cors else None)


def test_the_documents_name_each_path() -> None:
    text = (Path(__file__).parents[1] / "docs/seldon.md").read_text(encoding="utf-8")
    assert [path for path in seldon._METHODS if path not in text] == []


@pytest.mark.parametrize("text", ["", "\\u0041"])
async def test_a_document_that_is_nested_too_deeply_is_the_clients_fault(one: Path, text: str) -> None:
    """About as deeply as Python recurses, where it can still be read, but not be written."""
    async with serving(one) as served:
        for depth in range(900, 1000, 2):
            message = f'{{"jsonData":{"[" * depth}"{text}"{"]" * depth}}}'
            status, answer = await served.ask("/transform-input", message)
            assert status in (200, 400), answer
