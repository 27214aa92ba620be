"""REST on every transport: on gRPC's own port where it can, else on the one beside it."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_inference_core.plugins import Kind, Plugins


@pytest.fixture(scope="module")
def rest_address(transport: str) -> Callable[[Any], tuple[str, int]]:
    """(process): where it answers REST."""
    one_port = Plugins().classes(Kind.TRANSPORTS)[transport].http_on_same_port

    def address(process: Any) -> tuple[str, int]:
        where = process.address if one_port else process.metrics.removeprefix("http://").removesuffix("/metrics")
        host, _, port = where.rpartition(":")
        return host, int(port)

    return address


Ask = Callable[..., tuple[int, Any]]


@pytest.fixture
def ask(rest_address: Callable[[Any], tuple[str, int]], node: Any) -> Ask:
    """(path, document, method, process): the status and the JSON of an answer."""

    def ask(path: str, document: Any = None, method: str = "", process: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(*rest_address(process or node), timeout=20)
        body = document if isinstance(document, bytes | None) else json.dumps(document).encode()
        connection.request(method or ("GET" if body is None else "POST"), f"/v1/models/{path}", body)
        answer = connection.getresponse()
        assert answer.getheader("content-type") == "application/json"
        found = json.loads(answer.read())
        connection.close()
        return answer.status, found

    return ask


def test_predict(ask: Ask, make: Any) -> None:
    x = [[0.1, 0.2, 0.3], [1, 2, 3]]
    for path, factor in (("linear", 10), ("linear/versions/1", 1)):
        status, answer = ask(f"{path}:predict", {"instances": x})
        assert status == 200
        np.testing.assert_allclose(answer["predictions"], make.answer(x, factor), rtol=1e-6)
    status, answer = ask("branches:predict", {"inputs": {"a": [[1, 2]], "b": [[3, 4]]}})
    assert (status, answer) == (200, {"outputs": {"sum": [[4, 6]], "difference": [[-2, -2]]}})
    rows = [{"a": [1, 2], "b": [3, 4]}, {"a": [0, 0], "b": [0, 1]}]
    status, answer = ask("branches:predict", {"instances": rows})
    assert (status, answer["predictions"][1]) == (200, {"sum": [0, 1], "difference": [0, -1]})


def test_every_dtype(ask: Ask) -> None:
    sent: dict[str, Any] = {
        name: [[0, 1], [1, 0]] for name in ("uint8", "int8", "int16", "int32", "float16", "bfloat16", "float64")
    }
    sent |= {"bool_": [[True, False]] * 2, "int64": [[2**63 - 1, -(2**63)]] * 2, "float32": [[0.1, 1e-7]] * 2}
    assert ask("dtypes:predict", {"inputs": sent}) == (200, {"outputs": sent})


def test_a_handler(ask: Ask) -> None:
    words = ["ab", {"b64": base64.b64encode(b"xyz").decode()}]
    status, answer = ask("words:predict", {"inputs": {"words": words}})
    assert status == 400, answer  # this handler takes tensors of strings, and JSON is none
    assert ask("echo:predict", {"inputs": "hello"}) == (200, {"outputs": "HELLO"})


def test_status_and_metadata(ask: Ask) -> None:
    status, answer = ask("linear/versions/2")
    assert (status, answer["model_version_status"][0]["state"]) == (200, "AVAILABLE")
    status, answer = ask("linear/metadata")
    signature = answer["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert (status, signature["inputs"]["x"]["dtype"]) == (200, "DT_FLOAT")


def test_what_is_wrong(ask: Ask) -> None:
    for path, document, method, status in (
        ("nope:predict", {"instances": [1]}, "", 404),
        ("linear/versions/9:predict", {"instances": [1]}, "", 404),
        ("linear:predict", b"nope", "", 400),
        ("linear:predict", b"", "", 400),
        ("linear:predict", {"instances": [[1, 2]]}, "", 400),
        ("linear:guess", {"instances": [[1, 2]]}, "", 400),
        ("linear:predict", None, "GET", 400),
        ("linear", b"{}", "PUT", 400),
        ("linear/metadata", b"{}", "POST", 400),
        ("linear:predict", None, "OPTIONS", 400),
        ("linear:predict", {"instances": [[1, 2, True]]}, "", 400),
        ("linear:predict", {"signature_name": "x", "instances": [[1, 2, 3]]}, "", 400),
        ("linear:predict", b" " * (11 * 1024 * 1024), "", 413),
        ("trouble:predict", {"inputs": "raise run_model boom"}, "", 500),
    ):
        got, answer = ask(path, document, method)
        assert (got, list(answer)) == (status, ["error"]), (path, got, answer)


def test_a_large_body_and_a_large_answer(ask: Ask) -> None:
    x = [[float(n), 0.1, 0.2] for n in range(4096)]
    status, answer = ask("linear:predict", {"instances": x * 1})
    assert (status, len(answer["predictions"])) == (200, 4096)
    text = "é" * 2_000_000
    status, answer = ask("echo:predict", json.dumps({"inputs": text}, ensure_ascii=False).encode())
    assert (status, answer["outputs"] == text.upper()) == (200, True)


def test_a_gateway_says_that_it_does_not_forward_rest(ask: Ask, gateway: Any) -> None:
    status, answer = ask("linear:predict", {"instances": [[1, 2, 3]]}, process=gateway)
    assert (status, "is a route to other nodes" in answer["error"]) == (404, True)


def test_a_client_that_leaves_takes_its_request_out_of_the_queue(
    ask: Ask, node: Any, rest_address: Any, tmp_path: Path, wait_for: Any
) -> None:
    def send(document: Any) -> socket.socket:
        body = json.dumps(document).encode()
        connection = socket.create_connection(rest_address(node), 10)
        head = f"POST /v1/models/trouble:predict HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def cancelled() -> float:
        labels = '{code="CANCELLED",protocol="rest_predict",upstream="trouble"}'
        return node.counts("dl_inference_requests_total").get(labels, 0)

    before, (_, ran) = cancelled(), ask("trouble:predict", {"inputs": "count"})
    with send({"inputs": f"await {tmp_path / 'go'}"}) as holding:
        wait_for("the first request to begin", (tmp_path / "go.begun").exists, 10)
        leaving = send({"inputs": f"await {tmp_path / 'never'}"})
        time.sleep(0.2)
        assert cancelled() == before
        leaving.close()
        wait_for("the second request to be cancelled", lambda: cancelled() == before + 1, 10)
        (tmp_path / "go").touch()
        assert b"200" in holding.recv(100)
    _, now = ask("trouble:predict", {"inputs": "count"})
    assert int(now["outputs"]) == int(ran["outputs"]) + 1
    assert not (tmp_path / "never.begun").exists()


def test_requests_one_after_the_other_on_one_connection(node: Any, rest_address: Any) -> None:
    connection = http.client.HTTPConnection(*rest_address(node), timeout=20)
    for n in range(50):
        body = json.dumps({"instances": [[n, 0, 0]]}) if n % 5 else "nope"
        connection.request("POST", "/v1/models/linear/versions/1:predict", body)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        if n % 5:
            assert content == {"predictions": [[n + 0.5, 0.5]]}
        else:
            assert (answer.status, list(content)) == (400, ["error"])
    connection.close()
