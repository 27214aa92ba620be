"""TensorFlow Serving's REST API over real HTTP: documented examples, every kind of value, and every way to go wrong."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import http.client
import json
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from dl_inference_tfserving import rest
from dl_inference_tfserving.rest import TfServingRest
from dl_inference_tfserving.rest_codec import PredictCodec, shortest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core import admin, asgi
from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import BadRequest, Code, from_status
from dl_inference_core.http_server import HttpServer
from dl_inference_core.introspection import Readiness
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.repository import Repository
from dl_inference_core.rest.answering import Local, Rest
from dl_inference_core.routing import Routes
from dl_inference_core.tensors import Payload, Request, Response, as_tensor, from_json
from dl_inference_core.testing import FakeBackend
from dl_inference_core.transport import Http
from dl_inference_core.wire import messages
from dl_inference_core.wire.arrays import from_strings
from dl_inference_core.wire.routing_keys import RoutingKey

LIMIT = 100_000
ADDRESSED = RoutingKey("m")


class Features(Handler):
    """Answers Classify and Regress by the features "x" (a number) and "name" (bytes) of each example."""

    name = "features"

    def preprocess(self, request: Request) -> Any:
        assert isinstance(request.payload, np.ndarray)
        examples = [messages.Example.FromString(example).features.feature for example in request.payload]
        return {
            "x": np.array([[*each["x"].float_list.value, *each["x"].int64_list.value][0] for each in examples]),
            "names": [each["name"].bytes_list.value[0] if "name" in each else b"" for each in examples],
        }

    def run_model(self, model: Any, inputs: Any, request: Request) -> Any:
        x = inputs["x"].astype(np.float32)
        names = inputs["names"]
        scores = np.stack([x / 2 + 2, x], axis=1)
        labels = [label for name in names for label in (name, b"b\xc3\xa4r")]
        return {
            "outputs": x / 2 + 3,
            "scores": scores,
            "classes": from_strings(labels, len(labels)).reshape(scores.shape),
        }


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


class Held(Handler):
    """Holds each request until `open` is set."""

    name = "held"
    open: ClassVar[threading.Event]
    entered: ClassVar[threading.Event]

    def preprocess(self, request: Request) -> Any:
        self.entered.set()
        assert self.open.wait(20)
        return super().preprocess(request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def error(self) -> str:
        assert self.status >= 400
        assert list(self.json) == ["error"]
        return str(self.json["error"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A node's REST API on a port of the loopback interface."""

    port: int
    metrics: Metrics
    readiness: Readiness
    repository: Repository

    async def ask(
        self, path: str, body: bytes | str | None = None, method: str | None = None, **headers: str
    ) -> Answer:
        """`path` after "/v1/models/", or the whole of one that begins with "/"."""

        def send() -> Answer:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            with contextlib.closing(connection):
                encoded = body.encode() if isinstance(body, str) else body
                url = path if path.startswith("/") else f"/v1/models/{path}"
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                connection.request(method or ("GET" if body is None else "POST"), url, encoded, named)
                response = connection.getresponse()
                found = {name.lower(): value for name, value in response.getheaders()}
                return Answer(status=response.status, headers=found, body=response.read())

        return await asyncio.to_thread(send)

    async def predict(self, model: str, **document: Any) -> Any:
        """The JSON that answers `:predict`."""
        answer = await self.ask(f"{model}:predict", json.dumps(document))
        assert answer.status == 200, answer.body
        return answer.json

    async def predict_text(self, model: str, document: str) -> Any:
        """The JSON that answers `:predict` for a document as it is written."""
        answer = await self.ask(f"{model}:predict", document)
        assert answer.status == 200, answer.body
        return answer.json

    def counted(self, protocol: str) -> dict[tuple[str, str], float]:
        """How many requests of `protocol` were answered, by upstream and code."""
        lines = self.metrics.render("")[0].decode().splitlines()
        found = {}
        for line in lines:
            name, _, count = line.rpartition(" ")
            if name.startswith("dl_inference_requests_total{") and f'protocol="{protocol}"' in name:
                labels = dict(
                    part.split("=") for part in name.partition("{")[2].rstrip("}").replace('"', "").split(",")
                )
                found[labels["upstream"], labels["code"]] = float(count)
        return found


@contextlib.asynccontextmanager
async def serving(
    folder: Path, *, elsewhere: Any = None, timeout_s: float | None = 20.0, start: bool = True, cors: bool = False
) -> AsyncIterator[Served]:
    repository = Repository(
        folder,
        backends={"fake": FakeBackend()},
        handlers={each.name: each for each in (Features, Gives, Held)},
    )
    if start:
        await repository.start()
    readiness, metrics = Readiness(serving=start), Metrics()
    dispatcher = Dispatcher(Routes(repository), metrics)
    api = TfServingRest(Local(repository, elsewhere, readiness), dispatcher, cors=cors)
    rest = Rest(api, body_bytes=LIMIT, timeout_s=timeout_s)
    app = asgi.with_exchanges(Http(service=rest, app=admin.app(metrics, readiness)))
    server = await HttpServer.start(app, "127.0.0.1", 0)
    try:
        yield Served(port=server.port, metrics=metrics, readiness=readiness, repository=repository)
    finally:
        await server.close()
        await repository.close()


def write(folder: Path, name: str = "m", toml: str = "", version: int = 1, **content: Any) -> None:
    FakeBackend.write(folder / name / str(version), **content)
    if toml:
        (folder / name / "model.toml").write_text(toml, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models that give back what they are given: "float", "int", "text", "any" and "three", times a factor."""
    write(tmp_path, "float", inputs={"x": ["float32", [None]]}, factor=2)
    write(tmp_path, "matrix", inputs={"x": ["float32", [None, 1, 2]]})
    write(tmp_path, "double", inputs={"x": ["float64", None]})
    write(tmp_path, "int", inputs={"x": ["int64", None]})
    write(tmp_path, "uint8", inputs={"x": ["uint8", None]})
    write(tmp_path, "bool", inputs={"x": ["bool", None]})
    write(tmp_path, "text", inputs={"x": ["object", None]})
    write(tmp_path, "bytes", inputs={"x_bytes": ["object", None]})
    write(tmp_path, "any")
    write(
        tmp_path,
        "three",
        inputs={"tag": ["object", [None]], "signal": ["int32", [None, 5]], "sensor": ["float64", [None, 2, 2]]},
    )
    write(tmp_path, "features", 'handler = "features"')
    write(tmp_path, "gives", 'handler = "gives"')
    write(tmp_path, "broken", fail="it is broken")
    return tmp_path


# Predict: the documented examples


async def test_rows_of_one_input(folder: Path) -> None:
    async with serving(folder) as served:
        assert await served.predict("text", instances=["foo", "bar", "baz"]) == {"predictions": ["foo", "bar", "baz"]}
        assert await served.predict("matrix", instances=[[[1, 2]], [[3, 4]]]) == {
            "predictions": [[[1.0, 2.0]], [[3.0, 4.0]]]
        }
        assert await served.predict("float", instances=[1.0, 2.0, 5.0]) == {"predictions": [2.0, 4.0, 10.0]}
        assert await served.predict("float", instances=[{"x": 1.5}, {"x": 2}]) == {"predictions": [3.0, 4.0]}


INSTANCES = [
    {"tag": "foo", "signal": [1, 2, 3, 4, 5], "sensor": [[1, 2], [3, 4]]},
    {"tag": "bar", "signal": [3, 4, 1, 2, 5], "sensor": [[4, 5], [6, 8]]},
]
COLUMNS = {name: [instance[name] for instance in INSTANCES] for name in INSTANCES[0]}


async def test_rows_and_columns_of_several_inputs(folder: Path) -> None:
    async with serving(folder) as served:
        assert await served.predict("three", instances=INSTANCES) == {"predictions": INSTANCES}
        assert await served.predict("three", inputs=COLUMNS) == {"outputs": COLUMNS}


async def test_columns_of_one_input_with_and_without_its_name(folder: Path) -> None:
    async with serving(folder) as served:
        assert await served.predict("float", inputs=[1.0, 2.0]) == {"outputs": [2.0, 4.0]}
        assert await served.predict("float", inputs={"x": [1.0]}) == {"outputs": [2.0]}
        assert await served.predict("int", inputs=7) == {"outputs": 7}
        assert await served.predict("any", inputs={"a": [[1, 2]], "b": True}) == {"outputs": {"a": [[1, 2]], "b": True}}


async def test_the_signature_may_be_named_and_unknown_keys_are_passed_over_as_by_tensorflow_serving(
    folder: Path,
) -> None:
    async with serving(folder) as served:
        answer = await served.predict("float", signature_name="serving_default", instances=[1], more="ignored")
        assert answer == {"predictions": [2.0]}
        answer = await served.ask("float:predict", '{"signature_name": "nope", "instances": [1]}')
        assert answer.status == 400
        assert 'Serving signature name: "nope" not found in signature def' in answer.error


async def test_versions_and_labels(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write(tmp_path, "m", 'keep_versions = 3\n[version_labels]\nstable = 1\n"a/b:c" = 2\n', number, factor=number)
    async with serving(tmp_path) as served:
        for where, factor in (
            ("m", 3),
            ("m/versions/1", 1),
            ("m/versions/002", 2),
            ("m/labels/stable", 1),
            ("m/labels/a%2Fb%3Ac", 2),
        ):
            assert await served.predict(where, inputs={"x": 1}) == {"outputs": factor}, where
        answer = await served.ask("m/versions/9:predict", '{"inputs": 1}')
        assert (answer.status, "Specific(m, 9)" in answer.error) == (404, True)
        answer = await served.ask("m/labels/canary:predict", '{"inputs": 1}')
        assert (answer.status, "Unrecognized servable version label: canary" in answer.error) == (400, True)
        answer = await served.ask(f"m/versions/{2**63}:predict", '{"inputs": 1}')
        assert (answer.status, answer.error) == (400, f"Failed to convert version: {2**63} to numeric.")


async def test_a_name_may_be_anything_once_percent_encoded(tmp_path: Path) -> None:
    write(tmp_path, "Größe 1:x")
    async with serving(tmp_path) as served:
        assert await served.predict("Gr%C3%B6%C3%9Fe%201%3Ax", inputs=1) == {"outputs": 1}
        answer = await served.ask("Gr%F6:predict", '{"inputs": 1}')
        assert (answer.status, "UTF-8" in answer.error) == (400, True)


# Predict: values


async def test_binary_values(folder: Path) -> None:
    raw = [b"image bytes", b"\xff\x00\xfe\x00", b"", b"awesome"]
    coded = [{"b64": base64.b64encode(each).decode()} for each in raw]
    async with serving(folder) as served:
        assert await served.predict("bytes", instances=coded) == {"predictions": coded}
        assert await served.predict("bytes", instances=[{"x_bytes": each} for each in coded]) == {"predictions": coded}
        assert await served.predict("bytes", inputs=[coded[:2], coded[2:]]) == {"outputs": [coded[:2], coded[2:]]}
        assert await served.predict("bytes", inputs=coded[0]) == {"outputs": coded[0]}
        # A name without the suffix is text; padding is optional.
        answer = await served.predict("text", inputs=[{"b64": "aGk"}, "hä\x00"])
        assert answer == {"outputs": ["hi", "hä\x00"]}
        answer = await served.ask("text:predict", json.dumps({"inputs": coded}))
        assert answer.status == 400
        assert 'output "x" is not UTF-8' in answer.error
        assert "_bytes" in answer.error


async def test_integers_keep_every_bit(folder: Path) -> None:
    values = [2**63 - 1, -(2**63), 2**53 + 1, 0]
    async with serving(folder) as served:
        assert (await served.predict("int", instances=values))["predictions"] == values
        assert (await served.predict("any", inputs=[2**64 - 1, 1]))["outputs"] == [2**64 - 1, 1]


async def test_floats_are_written_with_the_digits_that_they_need(folder: Path) -> None:
    async with serving(folder) as served:
        answer = await served.ask("matrix:predict", '{"inputs": [[[0.1, 16777216]], [[1e-7, 3]]]}')
        assert answer.body == b'{"outputs": [[[0.1, 16777216.0]], [[1e-07, 3.0]]]}'
        answer = await served.ask("matrix:predict", '{"inputs": [[[NaN, -Infinity]], [[Infinity, -0.0]]]}')
        assert answer.body == b'{"outputs": [[[NaN, -Infinity]], [[Infinity, -0.0]]]}'


async def test_what_is_empty_is_of_the_models_dtype(folder: Path) -> None:
    async with serving(folder) as served:
        for model in ("float", "int", "text", "bool"):
            assert await served.predict(model, inputs=[]) == {"outputs": []}, model
        assert await served.predict("int", instances=[[], []]) == {"predictions": [[], []]}


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int8, np.uint64, np.bool_]
)
async def test_every_dtype_is_written(folder: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gives, "what", lambda _: {"y": np.array([[0, 1], [1, 0]], dtype)})
    async with serving(folder) as served:
        assert (await served.predict("gives", instances=[1]))["predictions"] == [[0, 1], [1, 0]]


async def test_what_json_cannot_hold_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gives, "what", lambda _: {"y": np.array([1j], np.complex64)})
    async with serving(folder) as served:
        answer = await served.ask("gives:predict", '{"inputs": 1}')
        assert (answer.status, answer.error) == (400, 'output "y": JSON holds no complex64; gRPC does')


async def test_a_handler_sees_plain_json_and_may_answer_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Payload] = []

    def what(request: Request) -> Payload:
        seen.append(request.payload)
        return [{"label": "a", "tokens": [1, 2]}, {"label": "b", "tokens": []}]

    monkeypatch.setattr(Gives, "what", what)
    async with serving(folder) as served:
        answer = await served.predict("gives", instances=[{"x": {"text": "t"}}, {"x": {"b64": "aGk="}}])
        assert answer["predictions"] == [{"label": "a", "tokens": [1, 2]}, {"label": "b", "tokens": []}]
        assert (await served.predict("gives", inputs=None))["outputs"] == answer["predictions"]
    assert seen == [{"x": [{"text": "t"}, b"hi"]}, None]


PLAIN = {
    "an empty list": {"found": []},
    "objects": {"found": [{"label": "cat"}]},
    "even lists": {"found": [[1, 2], [3, 4]]},
    "uneven lists": {"found": [[1, 2], [3]]},
    "numbers": {"found": [1, 2]},
    "an integer beside a float": {"found": [9007199254740993, 0.5]},
    "a boolean beside a number": {"found": [True, 3]},
    "null": {"found": [None]},
    "strings": {"found": ["ä", "b"]},
    "integers beyond 64 bits": {"found": [2**70]},
    "nothing": {},
}


@pytest.mark.parametrize("case", PLAIN)
async def test_what_a_handler_answers_in_pythons_values_has_the_same_form_whatever_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    found = PLAIN[case]
    monkeypatch.setattr(Gives, "what", lambda _: found)
    async with serving(folder) as served:
        assert (await served.ask("gives:predict", '{"inputs": 1}')).body == json.dumps(
            {"outputs": found}, ensure_ascii=False
        ).encode()
        if found:
            rows = [{"found": each} for each in found["found"]]
            assert await served.predict("gives", instances=[1]) == {"predictions": rows}
            monkeypatch.setattr(Gives, "what", lambda _: found["found"])
            assert await served.predict("gives", inputs=1) == {"outputs": found["found"]}


async def test_numpys_values_among_pythons_are_written_as_outputs_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(folder) as served:
        values = {"score": np.float32(0.1), "x_bytes": [b"\xff"], "deep": [{"y": np.array([0.1], np.float32)}], "n": 1}
        monkeypatch.setattr(Gives, "what", lambda _: values)
        expected = {"score": 0.1, "x_bytes": [{"b64": "/w=="}], "deep": [{"y": [0.1]}], "n": 1}
        assert await served.predict("gives", inputs=1) == {"outputs": expected}
        monkeypatch.setattr(Gives, "what", lambda _: {"x": [b"\xff"], "n": 1})
        answer = await served.ask("gives:predict", '{"inputs": 1}')
        assert (answer.status, 'output "x" is not UTF-8' in answer.error) == (400, True)
        monkeypatch.setattr(Gives, "what", lambda _: {"y": np.array([1, 2]), "label": ["a"]})
        answer = await served.ask("gives:predict", '{"instances": [1, 2]}')
        assert (answer.status, "label has inconsistent batch size: 1 expecting: 2" in answer.error) == (400, True)
        monkeypatch.setattr(Gives, "what", lambda _: {"y": np.array([1, 2]), "label": ["a", "b"]})
        rows = [{"y": 1, "label": "a"}, {"y": 2, "label": "b"}]
        assert await served.predict("gives", instances=[1, 2]) == {"predictions": rows}


async def test_rows_need_a_first_axis_of_one_size_in_each_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(folder) as served:
        monkeypatch.setattr(Gives, "what", lambda _: {"y": np.float32(1)})
        answer = await served.ask("gives:predict", '{"instances": [1]}')
        assert (answer.status, "Tensor name: y has no shape information" in answer.error) == (400, True)
        assert (await served.predict("gives", inputs=[1])) == {"outputs": 1.0}
        monkeypatch.setattr(Gives, "what", lambda _: {"y": np.zeros(2), "z": np.zeros(3)})
        answer = await served.ask("gives:predict", '{"instances": [1, 2]}')
        assert answer.status == 400
        assert "Tensor name: z has inconsistent batch size: 3 expecting: 2" in answer.error
        monkeypatch.setattr(Gives, "what", lambda _: {})
        assert (await served.ask("gives:predict", '{"instances": [1, 2]}')).status == 500
        monkeypatch.setattr(Gives, "what", lambda _: {"y": "no list", "z": None})
        answer = await served.ask("gives:predict", '{"instances": [1, 2]}')
        assert (answer.status, "expected tensors or a list" in answer.error) == (500, True)


# Predict: what is refused


WRONG = {
    "": "JSON Parse error: The document is empty",
    "  \n": "JSON Parse error: The document is empty",
    "instances = [1, 2]": "JSON Parse error: ",
    '{"instances": [1, 2]': "JSON Parse error: ",
    '{"instances": [1, 2]} x': "JSON Parse error: ",
    '{"instances": [1e999]}': "Number too big to be stored in double: 1e999",
    '{"instances": [-1e999]}': "Number too big to be stored in double: -1e999",
    '{"instances": [' + "1" * 5000 + "]}": "JSON Parse error: ",
    '{"instances": ' + "[" * 40000: "JSON Parse error: the document is nested too deeply",
    "[1, 2]": "Is not object",
    "5": "Is not object",
    "null": "Is not object",
    '{"b64": "aGk="}': "Is not object",
    "{}": "Missing 'inputs' or 'instances' key",
    '{"instance": [1]}': "Missing 'inputs' or 'instances' key",
    '{"instances": [1], "inputs": [1]}': "expecting only one of 'inputs' or 'instances' keys",
    '{"instances": []}': "No values in 'instances' array",
    '{"instances": 1}': "Expecting 'instances' to be an list/array",
    '{"instances": null}': "Expecting 'instances' to be an list/array",
    '{"instances": {"x": 1}}': "Expecting 'instances' to be an list/array",
    '{"signature_name": 100, "instances": [1]}': "'signature_name' key must be a string value.",
    '{"signature_name": null, "instances": [1]}': "'signature_name' key must be a string value.",
    '{"instances": [{"x": 1}, 2]}': "Expecting object but got list at item 1 of input list",
    '{"instances": [1, {"x": 2}]}': "Expecting value/list but got object at item 1 of input list",
    '{"instances": [{"x": 1}, {"y": 2}]}': "Failed to process element: 1 of 'instances' list",
    '{"instances": [{"x": 1}, {"x": 2, "y": 2}]}': "keys must be equal to: x; got x,y",
    '{"instances": [{"y": 1}]}': "JSON object: does not have named input: y; the model takes",
    '{"instances": [{"x": 1, "y": 1}]}': "JSON object: does not have named input: y; the model takes",
    '{"instances": [{}]}': "JSON object: keys must be equal to: x; x is missing",
    '{"inputs": {"y": [1]}}': "Missing named input: x in 'inputs' object",
    '{"inputs": {}}': "Missing named input: x in 'inputs' object",
    '{"inputs": null}': "JSON Value: null Type: Null is not of expected type: float",
    '{"inputs": [1, null]}': "JSON Value: null Type: Null is not of expected type: float",
    '{"inputs": [true, 1]}': "JSON Value: true Type: True is not of expected type: float",
    '{"inputs": ["a", 1]}': 'JSON Value: "a" Type: String is not of expected type: float',
    '{"inputs": {"x": [{"y": 1}]}}': 'JSON Value: {"y": 1} Type: Object is not of expected type: float',
    '{"inputs": {"x": [{"y": {"b64": "/w=="}}]}}': "Type: Object is not of expected type: float",
    '{"inputs": [[1], 2]}': "JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2",
    '{"inputs": [1, [2]]}': "Encountered list at unexpected level: 1 expected < 1",
    '{"inputs": [[[1], [2]], [[1], [1, 2]]]}': "Encountered list at unexpected size: 2 at level: 2 expected size: 1",
    '{"inputs": ["1", "2"]}': 'is not of expected type: float; the input is "x" (float32, [?])',
    '{"inputs": [{"b64": "aGk="}]}': 'JSON Value: {"b64": "aGk="} Type: Object is not of expected type: float',
    '{"inputs": [[1, 2]]}': "does not take shape [1, 2]",
    '{"inputs": [1' + "0" * 400 + "]}": "Number too big to be stored in double",
    '{"inputs": [{"b64": "a"}]}': "Unable to base64 decode",
    '{"inputs": [{"b64": "a*bc"}]}': "Unable to base64 decode",
    '{"inputs": [{"b64": "\\ud800"}]}': "Unable to base64 decode",
    '{"inputs": [{"b64": 5}]}': 'JSON Value: {"b64": 5} Type: Object is not of expected type: float',
    '{"inputs": ' + "[" * 40 + "1" + "]" * 40 + "}": "at most 32 levels",
}


async def test_each_malformed_request_is_told_what_is_wrong(folder: Path) -> None:
    async with serving(folder) as served:
        for body, said in WRONG.items():
            answer = await served.ask("float:predict", body)
            assert (answer.status, said in answer.error) == (400, True), (body[:80], answer.error)
        assert served.counted("rest_predict") == {("float", "INVALID_ARGUMENT"): len(WRONG)}


@pytest.mark.parametrize(
    ("model", "rows", "said"),
    [
        ("float", '[1, "a"]', '1{}: JSON Value: "a" Type: String is not of expected type: float'),
        ("float", '["a", [1]]', '0{}: JSON Value: "a" Type: String is not of expected type: float'),
        ("float", "[1, [2]]", "1{}: Expecting shape [] but got: [1]"),
        ("float", "[[1], 2]", "1{}: Expecting shape [1] but got: []"),
        ("float", "[[1], [2, 3]]", "1{}: Expecting tensor size: 1 but got: 2"),
        ("matrix", "[[[1, 2]], [[1], [2]]]", "1{}: Expecting shape [1,2] but got: [2,1]"),
        ("matrix", "[[[1, 2], [3]]]", "0{}: Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
        ("matrix", "[[1, 2], [3, [4]]]", "1{}: Encountered list at unexpected level: 1 expected < 1"),
        (
            "matrix",
            "[[[1], 2]]",
            "0{}: JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2",
        ),
        ("matrix", "[[[1, 2]], [[3, null]]]", "1{}: JSON Value: null Type: Null is not of expected type: float"),
        ("uint8", "[0, 255, 256]", "2{}: JSON Value: 256 Type: Number is not of expected type: uint8"),
        ("text", '["a", "b", 3]', "2{}: JSON Value: 3 Type: Number is not of expected type: string"),
    ],
)
async def test_a_wrong_row_is_told_by_its_index(folder: Path, model: str, rows: str, said: str) -> None:
    index, words = said.split("{}: ")
    async with serving(folder) as served:
        for key, body in (
            ("", f'{{"instances": {rows}}}'),
            (" key: x", json.dumps({"instances": [{"x": row} for row in json.loads(rows)]})),
        ):
            answer = await served.ask(f"{model}:predict", body)
            expected = f"Failed to process element: {index}{key} of 'instances' list. Error: INVALID_ARGUMENT: {words}"
            assert (answer.status, answer.error[: len(expected)]) == (400, expected)


async def test_bytes_that_are_no_text(folder: Path) -> None:
    async with serving(folder) as served:
        for body in (b"\xff\xfe{}", b'{"inputs": "\xe4"}', b'{"inputs": "\xed\xa0\x80"}'):
            answer = await served.ask("text:predict", body)
            assert (answer.status, "the document is not UTF-8" in answer.error) == (400, True)
        assert (await served.ask("text:predict", b'\xef\xbb\xbf{"inputs": "x"}')).json == {"outputs": "x"}


@pytest.mark.parametrize(
    ("model", "values", "said"),
    [
        ("int", "[1.5]", "JSON Value: 1.5 Type: Number is not of expected type: int64"),
        ("int", "[2, 1.0]", "JSON Value: 1.0 Type: Number is not of expected type: int64"),
        ("int", "[NaN]", "JSON Value: NaN Type: Number is not of expected type: int64"),
        ("int", "[true]", "JSON Value: true Type: True is not of expected type: int64"),
        ("int", "[9223372036854775808]", "JSON Value: 9223372036854775808 Type: Number is not of expected type: int64"),
        ("int", '["1"]', 'JSON Value: "1" Type: String is not of expected type: int64'),
        ("uint8", "[255, 256]", "JSON Value: 256 Type: Number is not of expected type: uint8"),
        ("uint8", "[-1]", "JSON Value: -1 Type: Number is not of expected type: uint8"),
        ("bool", "[2]", "JSON Value: 2 Type: Number is not of expected type: bool"),
        ("bool", "[true, 1]", "JSON Value: 1 Type: Number is not of expected type: bool"),
        ("bool", "[0.0]", "JSON Value: 0.0 Type: Number is not of expected type: bool"),
        ("float", "[false]", "JSON Value: false Type: False is not of expected type: float"),
        ("double", "[true]", "JSON Value: true Type: True is not of expected type: double"),
        ("text", "[1]", "JSON Value: 1 Type: Number is not of expected type: string"),
        ("text", '["\\ud800"]', "a string is not Unicode"),
        ("three", "[1]", "inputs is a plain value/list, but expecting an object"),
        ("any", "[18446744073709551616]", "an integer is out of the range of 64 bits"),
        ("any", "[-1, 9223372036854775808]", "an integer is out of the range of 64 bits"),
        ("any", "[0.5, 9007199254740993]", "an integer that no float64 holds"),
        ("any", "[true, 1]", "got a boolean, a number"),
        ("any", "[1, null]", "got a number, null"),
        ("any", '["a", 1]', "got a number, a string"),
    ],
)
async def test_values_that_the_models_dtype_does_not_hold(folder: Path, model: str, values: str, said: str) -> None:
    async with serving(folder) as served:
        answer = await served.ask(f"{model}:predict", f'{{"inputs": {values}}}')
        assert (answer.status, said in answer.error) == (400, True), answer.error


async def test_floating_point_inputs_round_as_by_tensorflow_serving(folder: Path) -> None:
    async with serving(folder) as served:
        for model, value, got in (
            ("double", "16777217", 16777217.0),
            ("double", "9007199254740993", 9007199254740992.0),
            ("double", "100000000000000000000", 1e20),
            ("matrix", "16777217", 16777216.0),
            ("matrix", "-16777217", -16777216.0),
            ("matrix", "1700000000123", 1700000038912.0),
            ("matrix", "18446744073709551616", 18446744073709552000.0),
            ("matrix", "1e39", math.inf),
            ("matrix", "-1e39", -math.inf),
            ("matrix", "1" + "0" * 300, math.inf),
        ):
            answer = await served.predict_text(model, f'{{"inputs": [[[{value}, 0.5]]]}}')
            assert answer["outputs"][0][0][1] == 0.5
            answered = answer["outputs"][0][0][0]
            assert (answered == got) if abs(got) < 2**53 else np.float32(answered) == np.float32(got), (model, value)
            if model == "double":
                assert answered == got
        answer = await served.predict_text("matrix", '{"instances": [[[16777217, 2]]]}')
        assert np.float32(answer["predictions"][0][0][0]) == 16777216.0


async def test_names_that_the_model_does_not_take_are_ignored_in_columns_alone(folder: Path) -> None:
    async with serving(folder) as served:
        assert await served.predict("float", inputs={"x": [1], "y": {"any": "thing"}}) == {"outputs": [2.0]}
        assert await served.predict("three", inputs={**COLUMNS, "more": None}) == {"outputs": COLUMNS}
        answer = await served.ask("three:predict", json.dumps({"instances": [{**INSTANCES[0], "more": 1}]}))
        assert (answer.status, "does not have named input: more" in answer.error) == (400, True)
        answer = await served.ask("three:predict", json.dumps({"instances": [[1]]}))
        assert answer.status == 400
        assert "instances is a plain list, but expecting list of objects" in answer.error


# Classify and Regress


async def test_classify(folder: Path) -> None:
    async with serving(folder) as served:
        document = {
            "signature_name": "classify_objects",
            "examples": [{"x": 2.0, "name": {"b64": "aW1hZ2U="}}, {"x": [0.2], "name": ["seaside"]}],
        }
        answer = await served.ask("features:classify", json.dumps(document))
        assert answer.json == {"results": [[["image", 3.0], ["bär", 2.0]], [["seaside", 2.1], ["bär", 0.2]]]}
        assert served.counted("rest_classify") == {("features", "OK"): 1}


async def test_regress(folder: Path) -> None:
    async with serving(folder) as served:
        answer = await served.ask("features:regress", '{"examples": [{"x": 1.0}, {"x": 2}]}')
        assert answer.body == b'{"results": [3.5, 4.0]}'
        answer = await served.ask("features:regress", '{"examples": [{"x": 1e39}]}')
        assert answer.body == b'{"results": [Infinity]}'


async def test_a_context_belongs_to_each_example(folder: Path) -> None:
    async with serving(folder) as served:
        document = {"context": {"name": "all"}, "examples": [{"x": 1}, {"x": 2}]}
        answer = await served.ask("features:classify", json.dumps(document))
        assert [[label for label, _ in row] for row in answer.json["results"]] == [["all", "bär"]] * 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{}", "key 'examples' is expected and was not found"),
        ('{"instances": [{"x": 1}]}', "key 'examples' is expected and was not found"),
        ('{"examples": {"x": 1}}', "Expecting 'examples' value to be an list/array"),
        ('{"examples": []}', "'examples' value is an empty array"),
        ('{"examples": [{"x": 1}, 5]}', "Example must be JSON object but got JSON Number; it is example 1"),
        (
            '{"examples": [{"x": 1}], "context": [1]}',
            "Example must be JSON object but got JSON Array; it is the context",
        ),
        (
            '{"examples": [{"x": null}]}',
            "Feature: x has element with unexpected JSON type: Null; expected numbers or strings",
        ),
        ('{"examples": [{"x": [[1]]}]}', "Feature: x has element with unexpected JSON type: Array"),
        ('{"examples": [{"x": {"y": 1}}]}', "Feature: x has element with unexpected JSON type: Object"),
        ('{"examples": [{"x": ["a", 1]}]}', "Unexpected element type in feature: x; it mixes strings and integers"),
        ('{"examples": [{"x": [1, 2.5]}]}', "Unexpected element type in feature: x; it mixes floats and integers"),
        ('{"examples": [{"x": 9223372036854775808}]}', "Feature: x has uint64_t element. Only int64_t is supported"),
        ('{"examples": [{"x": "\\ud800"}]}', "; it is in example 0"),
        ('{"examples": [{"\\ud800": 1}]}', "; it is in example 0"),
        ('{"signature_name": 5, "examples": [{"x": 1}]}', "'signature_name' key must be a string value."),
        ("nope", "JSON Parse error: "),
    ],
)
async def test_malformed_examples(folder: Path, body: str, said: str) -> None:
    async with serving(folder) as served:
        for verb in ("classify", "regress"):
            answer = await served.ask(f"features:{verb}", body)
            assert (answer.status, said in answer.error) == (400, True), answer.error


async def test_a_signature_for_predict_does_not_classify(folder: Path) -> None:
    async with serving(folder) as served:
        answer = await served.ask("float:classify", '{"examples": [{"x": 1}]}')
        assert answer.status == 400
        assert "No classification inputs found in SignatureDef" in answer.error
        answer = await served.ask("float:regress", '{"signature_name": "nope", "examples": [{"x": 1}]}')
        assert (answer.status, "No signature was found with the name: nope" in answer.error) == (400, True)


# Status and metadata


def status_of(version: str, state: str, code: str = "OK", message: str = "") -> dict[str, Any]:
    return {"version": version, "state": state, "status": {"error_code": code, "error_message": message}}


async def test_status(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, "m", "keep_versions = 3\n[version_labels]\nstable = 1\n", number)
    write(tmp_path, "m", "", 3, fail_load="it is broken")
    async with serving(tmp_path) as served:
        answer = (await served.ask("m")).json
        (broken, *others) = answer["model_version_status"]
        assert others == [status_of("2", "AVAILABLE"), status_of("1", "AVAILABLE")]
        assert (broken["version"], broken["state"], broken["status"]["error_code"]) == ("3", "END", "UNKNOWN")
        assert "it is broken" in broken["status"]["error_message"]
        assert (await served.ask("m/versions/2")).json == {"model_version_status": [status_of("2", "AVAILABLE")]}
        assert (await served.ask("m/labels/stable")).json == answer
        assert (await served.ask("m", method="HEAD")).status == 200
        answer = await served.ask("m/versions/9")
        assert (answer.status, "version 9 of model m" in answer.error) == (404, True)
        answer = await served.ask("nope")
        assert (answer.status, answer.error.partition(";")[0]) == (404, "Could not find any versions of model nope")


async def test_metadata(folder: Path) -> None:
    async with serving(folder) as served:
        answer = await served.ask("three/metadata")
        assert answer.status == 200
        assert answer.json["model_spec"] == {"name": "three", "version": "1", "signature_name": ""}
        (signature,) = answer.json["metadata"]["signature_def"]["signature_def"].items()
        assert signature[0] == "serving_default"
        assert signature[1]["method_name"] == "tensorflow/serving/predict"
        assert signature[1]["inputs"]["signal"] == {
            "name": "signal",
            "dtype": "DT_INT32",
            "tensor_shape": {"dim": [{"size": "-1", "name": ""}, {"size": "5", "name": ""}], "unknown_rank": False},
        }
        assert signature[1]["outputs"]["tag"]["dtype"] == "DT_STRING"
        unknown = (await served.ask("int/versions/1/metadata")).json["metadata"]["signature_def"]["signature_def"]
        assert unknown["serving_default"]["inputs"]["x"]["tensor_shape"] == {"dim": [], "unknown_rank": True}
        assert (await served.ask("int/versions/2/metadata")).status == 404
        assert (await served.ask("int/labels/x/metadata")).status == 400


# URLs and methods


@pytest.mark.parametrize(
    "path",
    [
        "/v1/foo",
        "/v1/",
        "/v1/models/",
        "/v1/models/debug/model_name",
        "/v1/models/float/",
        "/v1/models/float/version/50:predict",
        "/v1/models/float/versions/:predict",
        "/v1/models/float/versions/HELLO:predict",
        "/v1/models/float/versions/-1:predict",
        "/v1/models/float/versions/%D9%A3:predict",
        "/v1/models/float/label/x:predict",
        "/v1/models/float/versions/1/labels/x:predict",
        "/v1/models/float:guess",
        "/v1/models/float:predict/",
        "/v1/models/float:metadata",
    ],
)
async def test_paths_that_mean_nothing(folder: Path, path: str) -> None:
    async with serving(folder) as served:
        for body in (None, '{"inputs": [1]}'):
            answer = await served.ask(path, body)
            assert (answer.status, answer.error.startswith("Malformed request: ")) == (400, True)


async def test_paths_without_a_model(folder: Path) -> None:
    async with serving(folder) as served:
        for path in ("/v1/models", "/v1/models/versions/3"):
            answer = await served.ask(path)
            assert (answer.status, answer.error) == (400, "Missing model name in request.")
        answer = await served.ask("/v1/models", "{}")
        assert (answer.status, answer.error.startswith("Malformed request: POST /v1/models;")) == (400, True)
        assert (await served.ask("/v2/models/float")).status == 404
        assert (await served.ask("/healthz")).body == b"ok\n"


async def test_a_host_that_is_none_does_not_matter(folder: Path) -> None:
    async with serving(folder) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        body = b'{"inputs": [1]}'
        head = b"POST /v1/models/float:predict?x=%%zz HTTP/1.1\r\nHost: [\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_other_methods_are_malformed_requests_as_by_tensorflow_serving(folder: Path) -> None:
    async with serving(folder) as served:
        for path, methods in (
            ("float:predict", ("GET", "PUT", "DELETE", "PATCH")),
            ("float", ("POST", "PUT", "DELETE")),
            ("float/metadata", ("POST", "PUT")),
        ):
            for method in methods:
                answer = await served.ask(path, "{}", method)
                assert (answer.status, "allow" in answer.headers) == (400, False), (path, method)
                assert answer.error.startswith(f"Malformed request: {method} /v1/models/{path}; expected POST and ")


@pytest.mark.parametrize("cors", [False, True])
async def test_pages_of_other_origins_may_ask_where_cors_is_enabled(folder: Path, cors: bool) -> None:
    headers = {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "POST, GET",
        "access-control-allow-headers": "Content-Type",
    }
    async with serving(folder, cors=cors) as served:
        for answer, status in (
            (await served.ask("float:predict", method="OPTIONS", origin="https://page.example"), 200),
            (await served.ask("/v1/anything", method="OPTIONS", origin="http://page.example:8080"), 200),
            (await served.ask("float:predict", method="OPTIONS"), 400),
            (await served.ask("float:predict", method="OPTIONS", origin="null"), 400),
            (await served.ask("float:predict", '{"inputs": [1]}', origin="https://page.example"), 200),
            (await served.ask("float:predict", '{"inputs": ["a"]}'), 400),
            (await served.ask("float/metadata"), 200),
            (await served.ask("nope"), 404),
        ):
            assert answer.status == status
            sent = {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}
            assert sent == (headers if cors else {})
        refused = await served.ask("float", method="OPTIONS")
        assert refused.error.startswith("Origin header is missing in CORS preflight")
        assert (await served.ask("float", method="OPTIONS", origin="https://page.example")).body == b""


# Bodies


async def test_a_body_over_the_limit_is_refused_before_it_is_read(folder: Path) -> None:
    async with serving(folder) as served:
        fits = b'{"inputs": []}'.ljust(LIMIT)
        assert (await served.ask("float:predict", fits)).status == 200
        answer = await served.ask("float:predict", fits + b" ")
        assert (answer.status, answer.error) == (
            413,
            f"the request's body is too large; expected at most {LIMIT} bytes",
        )
        assert served.counted("rest_predict") == {("float", "OK"): 1}
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"POST /v1/models/float:predict HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        writer.close()


async def test_a_client_that_asks_first_sends_nothing_of_a_body_over_the_limit(folder: Path) -> None:
    async with serving(folder) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        head = b"POST /v1/models/float:predict HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: "
        writer.write(head + b"%d\r\n\r\n" % (LIMIT + 1))
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        writer.close()


async def test_a_body_that_says_no_length_is_read_until_the_limit(folder: Path) -> None:
    async with serving(folder) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        head = b"POST /v1/models/float:predict HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b'5\r\n{"inp\r\n' + b'b\r\nuts": [1.5]\r\n1\r\n}\r\n0\r\n\r\n')
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        length = 0
        while (line := await reader.readline()).strip():
            length = int(line.split(b":")[1]) if line.lower().startswith(b"content-length:") else length
        assert json.loads(await reader.readexactly(length)) == {"outputs": [3.0]}
        writer.write(head)
        with contextlib.suppress(ConnectionError):
            for _ in range(LIMIT // 1000 + 2):
                writer.write(b"3e8\r\n" + b" " * 1000 + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        writer.close()


async def test_gzip(folder: Path) -> None:
    async with serving(folder) as served:
        body = gzip.compress(b'{"inputs": [1]}')
        answer = await served.ask("float:predict", body, content_encoding="gzip")
        assert answer.json == {"outputs": [2.0]}
        answer = await served.ask("float:predict", gzip.compress(b" " * (LIMIT + 1)), content_encoding="gzip")
        assert answer.status == 413
        for wrong in (b'{"inputs": [1]}', body[:-5], body + b"x", b""):
            answer = await served.ask("float:predict", wrong, content_encoding="gzip")
            assert (answer.status, "the body is not gzip" in answer.error) == (400, True)
        answer = await served.ask("float:predict", body, content_encoding="br")
        assert (answer.status, "expected gzip" in answer.error) == (415, True)


# Failures


async def test_what_a_model_raises_has_a_request_id(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(folder) as served:
        answer = await served.ask("broken:predict", '{"inputs": [1]}', x_request_id="id-7")
        assert answer.status == 500
        assert answer.error.endswith("run_model failed: RuntimeError: it is broken (request id id-7)")
        assert served.counted("rest_predict") == {("broken", "INTERNAL"): 1}
    assert "request id-7 failed" in caplog.messages


async def test_an_error_that_a_handler_raises_again_and_again_keeps_no_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = BadRequest("not today")

    def refuse(request: Request) -> Payload:
        raise error

    monkeypatch.setattr(Gives, "what", refuse)
    async with serving(folder) as served:
        for _ in range(2):
            answer = await served.ask("gives:predict", '{"inputs": [1]}')
            assert (answer.status, answer.error) == (400, "not today")
            assert error.__traceback__ is None


CODES = {
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNKNOWN: 500,
    Code.DATA_LOSS: 500,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
    Code.CANCELLED: 499,
}


async def test_each_code_has_its_http_status(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(folder) as served:
        for code, status in CODES.items():

            def what(_: Request, code: Code = code) -> Payload:
                raise from_status(code, f"it is {code.name}")

            monkeypatch.setattr(Gives, "what", what)
            answer = await served.ask("gives:predict", '{"inputs": 1}')
            assert (answer.status, answer.error) == (status, f"it is {code.name}")


async def test_what_nobody_foresaw_is_logged_and_told_as_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(folder) as served:
        monkeypatch.setattr(rest, "_spec", lambda _: 1 / 0)
        answer = await served.ask("float")
        assert (answer.status, answer.error) == (500, "unexpected ZeroDivisionError")
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None


class OtherNodes:
    """A gateway's table."""

    class Upstream:
        name, ready = "far", True

        async def answer(self, *_: Any) -> bytes:
            raise AssertionError("REST does not forward")

    models: ClassVar[Mapping[str, Any]] = {"far": Upstream()}
    tasks: ClassVar[Mapping[int, Any]] = {69: Upstream()}


async def test_a_route_to_other_nodes_is_not_answered_and_the_error_says_so(folder: Path) -> None:
    async with serving(folder, elsewhere=OtherNodes()) as served:
        for name in ("far", "textcnn-69"):
            for answer in (await served.ask(f"{name}:predict", "{}"), await served.ask(name)):
                assert answer.status == 404
                assert f'"{name}" is a route to other nodes' in answer.error
        answer = await served.ask("near:predict", "{}")
        assert (answer.status, "other nodes" in answer.error) == (404, False)
        assert await served.predict("float", instances=[1]) == {"predictions": [2.0]}


async def test_before_the_models_are_there_and_after_the_end(folder: Path) -> None:
    async with serving(folder, start=False) as served:
        for answer in (await served.ask("float"), await served.ask("float:predict", '{"inputs": [1]}')):
            assert (answer.status, "starting" in answer.error) == (503, True)
        await served.repository.start()
        assert (await served.ask("float:predict", '{"inputs": [1]}')).status == 200
        served.readiness.serving = True
        assert (await served.ask("nope")).status == 404
        served.readiness.serving = False
        served.readiness.ending.set()
        for answer in (await served.ask("float"), await served.ask("float:predict", '{"inputs": [1]}')):
            assert (answer.status, "shutting down" in answer.error) == (503, True)


async def test_a_model_of_which_no_version_loads(tmp_path: Path) -> None:
    write(tmp_path, "m", fail_load="it is broken")
    async with serving(tmp_path) as served:
        answer = await served.ask("m:predict", '{"inputs": [1]}')
        assert (answer.status, "not ready" in answer.error) == (503, True)
        assert (await served.ask("m")).json["model_version_status"][0]["state"] == "END"
        assert (await served.ask("m/metadata")).status == 503


# Time and clients that leave


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path, "held", 'handler = "held"')
    monkeypatch.setattr(Held, "open", threading.Event(), raising=False)
    monkeypatch.setattr(Held, "entered", threading.Event(), raising=False)
    return tmp_path


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


async def test_a_request_takes_no_longer_than_its_timeout(held: Path) -> None:
    async with serving(held, timeout_s=0.2) as served:
        try:
            start = time.monotonic()
            answer = await served.ask("held:predict", '{"inputs": [1]}')
            assert (answer.status, answer.error) == (504, "the request took longer than 0.2 s")
            assert 0.2 <= time.monotonic() - start < 5
            # A body that does not come is no different.
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(b"POST /v1/models/held:predict HTTP/1.1\r\nHost: h\r\nContent-Length: 50\r\n\r\n{")
            assert (await reader.readline()).startswith(b"HTTP/1.1 504 ")
            writer.close()
        finally:
            Held.open.set()


async def test_no_timeout_is_no_limit(held: Path) -> None:
    async with serving(held, timeout_s=None) as served:
        asking = asyncio.ensure_future(served.ask("held:predict", '{"inputs": [1]}'))
        await until(Held.entered.is_set)
        await asyncio.sleep(0.1)
        assert not asking.done()
        Held.open.set()
        assert (await asking).json == {"outputs": [1]}


async def test_a_client_that_leaves_takes_its_request_out_of_the_queue(held: Path) -> None:
    async with serving(held) as served:
        body = b'{"inputs": [1]}'
        request = (
            b"POST /v1/models/held:predict HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"%d\r\n\r\n" % len(body) + body
        )
        first = asyncio.ensure_future(served.ask("held:predict", body))
        await until(Held.entered.is_set)
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request)
        await asyncio.sleep(0.1)
        writer.close()
        await until(lambda: ("held", "CANCELLED") in served.counted("rest_predict"))
        Held.entered.clear()
        Held.open.set()
        assert (await first).status == 200
        assert not Held.entered.is_set()
        assert served.counted("rest_predict") == {("held", "CANCELLED"): 1, ("held", "OK"): 1}


async def test_half_a_body_is_no_request(folder: Path) -> None:
    async with serving(folder) as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"POST /v1/models/float:predict HTTP/1.1\r\nHost: h\r\nContent-Length: 50\r\n\r\n{")
        await writer.drain()
        writer.close()
        assert await served.predict("float", instances=[1]) == {"predictions": [2.0]}
        assert served.counted("rest_predict") == {("float", "OK"): 1}


async def test_requests_side_by_side_keep_their_answers(folder: Path) -> None:
    async with serving(folder) as served:
        answers = await asyncio.gather(*(served.predict("float", instances=[float(n)]) for n in range(40)))
        assert answers == [{"predictions": [2.0 * n]} for n in range(40)]


# Values, there and back


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Rectangular lists of `leaves`, up to three levels deep."""
    shapes = st.lists(st.integers(1, 3), max_size=3)

    def build(shape: list[int]) -> st.SearchStrategy[Any]:
        if not shape:
            return leaves
        return st.lists(build(shape[1:]), min_size=shape[0], max_size=shape[0])

    return shapes.flatmap(build)


LEAVES = {
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(),
    "bool": st.booleans(),
    "text": st.text(st.characters(exclude_categories=["Cs"])),
    "bytes": st.binary(),
}


def coded(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    return [coded(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("value", [np.ones(1), [1]], ids=["arrays", "lists"])
@pytest.mark.parametrize("key", ["inputs", "instances"])
def test_outputs_of_one_name_are_a_type_error(key: str, value: Any) -> None:
    codec = PredictCodec(ADDRESSED)
    request = codec.decode_request(json.dumps({key: [1]}).encode())
    with pytest.raises(TypeError, match="two values would have the same name"):
        codec.encode_response(Response(payload={0: value, "0": value}), request)  # type: ignore[dict-item]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(LEAVES)).flatmap(lambda kind: nested(LEAVES[kind])))
def test_values_come_back_as_they_were_sent(value: Any) -> None:
    codec = PredictCodec(ADDRESSED)
    for key, answered, sent in (("inputs", "outputs", value), ("instances", "predictions", [value, value])):
        body = json.dumps({key: {"x_bytes": coded(sent)} if key == "inputs" else coded(sent)}).encode()
        request = codec.decode_request(body)
        given_back = request.payload["x_bytes"] if key == "inputs" else request.payload  # type: ignore[call-overload,index]
        tensor = from_json(given_back)
        name = "y_bytes" if b'{"b64"' in body else "y"  # the escape of a character may read "b64", too
        answer = json.loads(codec.encode_response(Response(payload={name: tensor}), request))
        assert repr(answer) == repr({answered: coded(sent)})


def test_strings_that_a_handler_gives_keep_their_last_nul_and_no_number_becomes_one() -> None:
    assert as_tensor([[b"a\0", "b\0"]]).tolist() == [[b"a\0", b"b\0"]]
    with pytest.raises(TypeError, match="got a number, a string"):
        as_tensor(["a", 1])


@settings(max_examples=500, deadline=None)
@given(st.lists(st.floats(width=32), max_size=20), st.sampled_from([0, 100]))
def test_a_float32_is_written_in_few_digits_and_a_whole_number_in_all_of_them(values: list[float], more: int) -> None:
    array = np.array(values + [0.1] * more, np.float32)
    short = shortest(array)
    np.testing.assert_array_equal(short.astype(np.float32), array)
    for written, value in zip(short.tolist(), array, strict=True):
        whole = 2**24 <= abs(float(value)) < 2**53
        assert math.isnan(written) or written == (float(value) if whole else float(str(value)))
        assert math.isnan(written) or math.copysign(1, written) == math.copysign(1, value)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["instances", "inputs", "b64", "signature_name", "x"]), inner, max_size=3)
        ),
        max_leaves=15,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_document_is_a_request_or_a_bad_one(body: bytes) -> None:
    from dl_inference_core.errors import BadRequest
    from dl_inference_core.node.backend import Signature
    from dl_inference_core.node.handling import bind

    with contextlib.suppress(BadRequest):
        bound = bind(Signature(), PredictCodec(ADDRESSED).decode_request(body))
        assert all(isinstance(tensor, np.ndarray) for tensor in bound.values())
