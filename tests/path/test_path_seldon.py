"""A real Seldon node behind a gateway of ours, a real SeldonClient in front of ours, and every payload form."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dl_inference_core.client import build
from dl_inference_core.tensors import Form
from dl_inference_core.wire import messages, seldon

SOURCES = Path(__file__).parents[1] / "seldon"
TASK = 404
ENTRANCES = (
    "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService/PytorchPredict",
    "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService/CaffePredict",
    "/seldon.protos.Model/Predict",
    "/seldon.protos.Seldon/Predict",
)

NUMBERS = np.array([[1.5, -2.0, 3.25], [0.0, 1e300, -0.125]])
PAYLOADS: dict[str, tuple[Any, Form]] = {
    "tensor": (NUMBERS, Form.TENSOR),
    "ndarray": (NUMBERS, Form.NDARRAY),
    "ndarray of strings": (np.array([b"one", "zwölf".encode()], dtype=object), Form.NDARRAY),
    "binData": (bytes(range(256)), Form.BYTES),
    "strData": ("grüße\n", Form.TEXT),
    "jsonData": ({"deep": [1, {"er": None}], "on": True, "text": "ß"}, Form.JSON),
}


@pytest.fixture(scope="module")
def foreign(start: Any, seldon_python: Path, wait_for: Callable[..., Any]) -> Iterator[Any]:
    """A `seldon-core-microservice`."""
    # It takes no other addresses than ports, and reports the one that it got.
    ports = {f"PREDICTIVE_UNIT_{kind}_PORT": "0" for kind in ("GRPC_SERVICE", "HTTP_SERVICE", "METRICS_SERVICE")}
    process = start(
        seldon_python.with_name("seldon-core-microservice"),
        "echo_node.Echo",
        "--service-type",
        "MODEL",
        "--workers",
        "1",
        cwd=SOURCES,
        env={**os.environ, **ports, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    bound = process.written("GRPC Server Binding to 0.0.0.0:").partition("0.0.0.0:")[2]
    process.connect(f"127.0.0.1:{bound.split()[0]}")
    _, body = build(TASK, "ready?")
    wait_for("the Seldon node", lambda: _answers(process, body))
    yield process
    process.end()


def _answers(process: Any, body: bytes) -> bool:
    try:
        process.call(ENTRANCES[2], body, timeout=1)
    except grpc.RpcError:
        return False
    return True


@pytest.fixture(scope="module")
def front(serve: Any, foreign: Any) -> Iterator[Any]:
    """A gateway in front of it."""
    gateway = serve(f'[[routes]]\nname = "echo"\ntask_id = {TASK}\ntimeout_ms = 10000\nnodes = ["{foreign.address}"]')
    yield gateway
    gateway.end()


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("form", PAYLOADS)
def test_a_seldon_node_answers_through_the_gateway_as_it_does_directly(
    foreign: Any, front: Any, entrance: str, form: str
) -> None:
    payload, kind = PAYLOADS[form]
    _, body = build(TASK, payload, form=kind, tags={"puid": "no", "who": "we"}, id="the-puid")
    through = front.call(entrance, body)
    assert through == foreign.call(ENTRANCES[2], body)
    answer = seldon.decode_response(through)
    assert answer.id == "the-puid"
    assert messages.SeldonMessage.FromString(through).WhichOneof("data_oneof") == (
        "data" if kind in (Form.TENSOR, Form.NDARRAY) else form
    )
    expected: Any = {
        "tensor": NUMBERS * 2,
        "ndarray": NUMBERS * 2,
        "ndarray of strings": payload[::-1] if form == "ndarray of strings" else None,
        "binData": bytes(range(256))[::-1],
        "strData": "GRÜSSE\n",
        "jsonData": {"given": payload},
    }[form]
    np.testing.assert_equal(answer.payload, expected)


def test_a_seldon_node_that_fails_is_never_ok(foreign: Any, front: Any) -> None:
    _, body = build(TASK, "fail")
    direct, through = (process.refusal(ENTRANCES[2], body) for process in (foreign, front))
    assert through[0] is direct[0] is grpc.StatusCode.UNKNOWN
    assert direct[1] in through[1]


def test_a_message_too_large_for_the_seldon_node(foreign: Any, front: Any) -> None:
    before = front.attempts()
    _, body = build(TASK, b"x" * (5 * 1024 * 1024))
    code, message = front.refusal(ENTRANCES[0], body)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in message
    after = front.attempts()
    assert {outcome: after[outcome] - before.get(outcome, 0) for outcome in after if outcome != "neutral"} == {
        outcome: 0 for outcome in after if outcome != "neutral"
    }
    assert after["neutral"] == before.get("neutral", 0) + 1


# What SeldonClient sends in each form; it leaves out the tags with json_data, but not those in raw_data.
SENT: dict[str, dict[str, Any]] = {
    "tensor": {"data": NUMBERS.tolist(), "payload_type": "tensor", "names": ["a", "b", "c"]},
    "ndarray": {"data": NUMBERS.tolist(), "payload_type": "ndarray"},
    "one number": {"data": [2.5], "payload_type": "tensor"},
    "ndarray of strings": {"data": [["one", "two"], ["three", "zwölf"]], "payload_type": "ndarray"},
    "binData": {"bin_data": "bytes"},
    "strData": {"str_data": "grüße\n"},
    "strData, empty": {"str_data": ""},
    "jsonData": {"raw_data": {"jsonData": {"deep": [1, {"er": None}], "on": True}}},
    "jsonData, a list": {"raw_data": {"jsonData": [1, "two", None]}},
    "raw tensor": {"raw_data": {"data": {"tensor": {"shape": [2], "values": [1, 2]}}, "meta": {"puid": "the-puid"}}},
}


@pytest.fixture(scope="module")
def ask(seldon_python: Path) -> Iterator[Callable[..., Any]]:
    """Makes a call with a real SeldonClient, in its own environment."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    with subprocess.Popen(
        [seldon_python, "echo_client.py"],
        cwd=SOURCES,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(address: str, arguments: dict[str, Any], method: str = "predict", **client: Any) -> Any:
            call = {"address": address, "method": method, "arguments": arguments, "client": client}
            print(json.dumps(call), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()
        process.wait(20)


def tagged(arguments: dict[str, Any], task: Any) -> dict[str, Any]:
    tags = {"taskId": task, "who": ["we", 1]}
    if (raw := arguments.get("raw_data")) is not None:
        return {"raw_data": {**raw, "meta": {**raw.get("meta", {}), "tags": tags}}}
    return {**arguments, "meta": tags}


@pytest.mark.parametrize("form", SENT)
def test_seldon_client_gets_from_us_what_a_seldon_node_answers(
    ask: Callable[..., Any], foreign: Any, peer: Any, form: str
) -> None:
    """Our node has the same functions, in the original's processor.py."""
    arguments = tagged(SENT[form], 69)
    theirs, ours = (ask(address, arguments) for address in (foreign.address, peer.address))
    assert theirs["success"], theirs
    assert ours["success"], ours
    theirs["answer"]["meta"].pop("requestPath", None)  # which image a Seldon node was started from
    # A Seldon node makes up names for columns: t:0, t:1, ….
    theirs["answer"].get("data", {}).pop("names", None)
    assert ours["answer"] == theirs["answer"]
    assert ours["answer"]["meta"]["tags"] == {"taskId": 69, "who": ["we", 1]}


@pytest.mark.parametrize("form", SENT)
def test_seldon_client_reaches_a_seldon_node_through_the_gateway(
    ask: Callable[..., Any], foreign: Any, front: Any, form: str
) -> None:
    arguments = tagged(SENT[form], "echo")
    theirs, ours = (ask(address, arguments) for address in (foreign.address, front.address))
    assert theirs["success"], theirs
    assert ours == theirs


@pytest.mark.parametrize(
    ("method", "arguments"), [("predict", {"json_data": {"a": 1}}), ("microservice", {"str_data": "text"})]
)
def test_seldon_client_without_tags_is_told_what_is_missing(
    ask: Callable[..., Any], peer: Any, method: str, arguments: dict[str, Any]
) -> None:
    outcome = ask(peer.address, arguments, method)
    assert not outcome["success"]
    assert "INVALID_ARGUMENT" in outcome["message"]
    assert "taskId" in outcome["message"]


# Without tags, as SeldonClient sends by every transport and to every kind of server that it knows.
PLAIN: dict[str, dict[str, Any]] = {
    **{form: SENT[form] for form in ("tensor", "ndarray", "one number", "ndarray of strings", "binData", "strData")},
    "ndarray with names": {"data": NUMBERS.tolist(), "payload_type": "ndarray", "names": ["a", "b", "c"]},
    "jsonData": {"json_data": {"deep": [1, {"er": None}], "on": True, "text": "ß"}},
}
RAW = {form: SENT[form] for form in ("jsonData, a list", "raw tensor")}
GATEWAYS: dict[str, dict[str, Any]] = {
    "istio": {"gateway": "istio", "namespace": "space"},
    "ambassador": {"gateway": "ambassador"},
    "seldon": {"gateway": "seldon"},
}
TRANSPORTS = ("rest", "grpc")


@pytest.fixture(scope="module")
def alone(serve: Any, models: Path) -> Iterator[Any]:
    """A node whose only model is "echo"."""
    process = serve(f'[models.named.echo]\npath = "{models}/echo"\n')
    yield process
    process.end()


@pytest.fixture(scope="module")
def theirs(ask: Callable[..., Any], foreign: Any) -> Callable[..., Any]:
    """(form, kind of call, …): what a real Seldon node answers to the real client, asked once for each."""

    @functools.cache
    def theirs(form: str, kind: str, **more: str) -> Any:
        return told(ask(foreign.address, {**PLAIN, **RAW}[form] | more, kind, gateway="seldon"))

    return theirs


def endpoint(process: Any, by: str) -> str:
    http: str = process.metrics.removeprefix("http://").partition("/")[0]
    return http if by == "rest" else process.address


def told(outcome: Any) -> Any:
    """The answer, without what only a Seldon node has: its image, and names that it makes up for columns."""
    assert outcome["success"], outcome
    answer = outcome["answer"]
    answer.get("meta", {}).pop("requestPath", None)
    answer.get("data", {}).pop("names", None)
    return {name: value for name, value in answer.items() if value}


@pytest.mark.parametrize("by", TRANSPORTS)
@pytest.mark.parametrize("gateway", GATEWAYS)
@pytest.mark.parametrize("form", [*PLAIN, *RAW])
def test_seldon_client_of_a_gateway_without_a_task_id(
    ask: Callable[..., Any], theirs: Any, alone: Any, by: str, gateway: str, form: str
) -> None:
    arguments = {**PLAIN, **RAW}[form]
    ours = ask(endpoint(alone, by), arguments, transport=by, **GATEWAYS[gateway])
    assert told(ours) == theirs(form, "predict")


@pytest.mark.parametrize("by", TRANSPORTS)
@pytest.mark.parametrize("form", PLAIN)
def test_seldon_client_of_a_microservice_without_a_task_id(
    ask: Callable[..., Any], theirs: Any, alone: Any, by: str, form: str
) -> None:
    ours = ask(endpoint(alone, by), PLAIN[form], "microservice", transport=by)
    assert told(ours) == theirs(form, "microservice")


@pytest.mark.parametrize("by", TRANSPORTS)
@pytest.mark.parametrize("method", ["transform-input", "transform-output"])
@pytest.mark.parametrize("form", ["tensor", "ndarray", "binData", "strData", "jsonData"])
def test_a_transformation_changes_nothing(
    ask: Callable[..., Any], theirs: Any, alone: Any, by: str, method: str, form: str
) -> None:
    arguments = {**PLAIN[form], "method": method}
    ours = ask(endpoint(alone, by), arguments, "microservice", transport=by)
    assert told(ours) == theirs(form, "microservice", method=method)


@pytest.mark.parametrize("by", TRANSPORTS)
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_seldon_client_gets_a_tftensor_for_a_tftensor(
    ask: Callable[..., Any], alone: Any, by: str, gateway: str
) -> None:
    tensor = {"dtype": "DT_DOUBLE", "tensorShape": {"dim": [{"size": "2"}]}, "doubleVal": [1.0, 2.5]}
    arguments = {"raw_data": {"data": {"tftensor": tensor}}}
    ours = ask(endpoint(alone, by), arguments, transport=by, **GATEWAYS[gateway])
    assert told(ours) == {"data": {"tftensor": {**tensor, "doubleVal": [2.0, 5.0]}}}


@pytest.mark.parametrize("by", TRANSPORTS)
def test_the_deployment_names_one_of_several_models(ask: Callable[..., Any], node: Any, by: str) -> None:
    address = endpoint(node, by)
    echo, words, nope = (
        ask(address, {"str_data": "x"}, transport=by, deployment_name=name) for name in ("echo", "words", "nope")
    )
    assert told(echo) == {"strData": "X"}
    assert told(words)["jsonData"]["capitals"] == ["X"]
    assert not nope["success"]
    said = nope["message"] if by == "grpc" else nope["answer"]["status"]["info"]
    assert 'no model is named "nope"' in said
    assert "taskId" in said


def test_an_error_by_rest_is_a_seldon_message_that_says_failure(ask: Callable[..., Any], alone: Any) -> None:
    arguments = {"raw_data": {"data": {"tensor": {"shape": [3], "values": [1, 2]}}}}
    outcome = ask(endpoint(alone, "rest"), arguments, transport="rest")
    assert not outcome["success"]
    assert outcome["message"] == "400:Bad Request"
    assert outcome["answer"]["status"] == {
        "code": 400,
        "info": "data.tensor: float64 of shape [3] takes 3 values; got 2",
        "reason": "MICROSERVICE_BAD_DATA",
        "status": "FAILURE",
    }


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("task", [69, "69", "echo", "anything-69", 69.0])
def test_ways_to_name_a_task(peer: Any, entrance: str, task: Any) -> None:
    _, body = build(task, "text")
    assert seldon.decode_response(peer.call(entrance, body)).payload == "TEXT"


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("form", [Form.TENSOR, Form.NDARRAY, Form.TFTENSOR])
def test_an_exported_model_answers_numbers_in_the_form_of_the_request(
    peer: Any, make: Any, entrance: str, form: Form
) -> None:
    x = np.array([[1, 2, 3], [4, 5, 6.5]], np.float32)
    _, body = build(7, x, form=form, tags={"who": "we"}, id="the-puid")
    message = messages.SeldonMessage.FromString(peer.call(entrance, body))
    answer = seldon.decode_response(message.SerializeToString())
    np.testing.assert_array_equal(answer.payload, make.answer(x, 10))
    assert message.data.WhichOneof("data_oneof") == form.value
    assert answer.id == "the-puid"
    assert answer.tags == {"taskId": 7, "who": "we"}
    if form is Form.TFTENSOR:
        assert answer.payload.dtype == np.float32


def test_json_names_the_inputs_of_a_model_with_several(peer: Any) -> None:
    _, body = build(8, {"a": [[1, 2]], "b": [[10, 20]]})
    answer = seldon.decode_response(peer.call(ENTRANCES[0], body))
    assert answer.payload == {"sum": [[11, 22]], "difference": [[-9, -18]]}


def test_one_tensor_cannot_stand_for_two(peer: Any) -> None:
    _, body = build(8, NUMBERS)
    code, message = peer.refusal(ENTRANCES[0], body)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert '"a" (float32, [?, 2]), "b" (float32, [?, 2])' in message


@pytest.mark.parametrize("payload", ["text", b"bytes"])
def test_text_and_bytes_to_a_model_without_a_handler(peer: Any, payload: Any) -> None:
    _, body = build(7, payload)
    code, message = peer.refusal(ENTRANCES[0], body)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "takes tensors" in message


@pytest.mark.parametrize(
    ("payload", "form"),
    [
        (np.array([b"one", "zwölf".encode()], dtype=object), Form.NDARRAY),
        (np.array([b"one", "zwölf".encode()], dtype=object), Form.TFTENSOR),
        ("zwölf", Form.TEXT),
        (b"bytes", Form.BYTES),
    ],
    ids=["ndarray", "tftensor", "text", "bytes"],
)
def test_a_handler_takes_strings_in_any_form(peer: Any, payload: Any, form: Form) -> None:
    _, body = build("words", payload, form=form, tags={"who": "we"})
    answer = seldon.decode_response(peer.call(ENTRANCES[0], body)).payload
    words = payload if isinstance(payload, np.ndarray) else [payload.encode() if form is Form.TEXT else payload]
    assert answer["capitals"] == [word.upper().decode() for word in words]
    assert [int(length) for (length,) in answer["lengths"]] == [len(word) for word in words]
    assert answer["tags"] == ["[('taskId', 'words'), ('who', 'we')]"]
