"""A real Seldon node behind a gateway of ours."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    import grpc

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
