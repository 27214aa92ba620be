"""A node whose model hangs while it loads, by its command line: one process, and several."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dl_inference_core.client import Client
from dl_inference_core.errors import InferenceError
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.loopback import free_port

X = np.array([[1, 2, 3]], np.float32)
HEALTH = "/grpc.health.v1.Health/Check"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file; without it the model "slow" hangs while it loads."""
    gate = tmp_path / "gate"
    yield gate
    gate.touch()


@pytest.fixture
def node(
    start: Any, transport: str, site_with_fakes: Path, tmp_path: Path, gate: Path
) -> Callable[[int], tuple[Any, str]]:
    """(workers): a node that starts, with the models "quick" and "slow", and its address."""
    for name in ("quick", "slow"):
        FakeBackend.write(tmp_path / "models" / name / "1", factor=2)
    (tmp_path / "models" / "slow" / "handler.py").write_text(
        "import os, time\nfrom dl_inference_core.node.handling import Handler\n"
        "class Slow(Handler):\n    def load(self, model, directory):\n"
        f"        open(f'{tmp_path}/loads-{{os.getpid()}}', 'w').close()\n"
        f"        while not os.path.exists({str(gate)!r}):\n            time.sleep(0.005)\n"
    )

    def start_node(workers: int) -> tuple[Any, str]:
        port = free_port()
        config = tmp_path / "server.toml"
        config.write_text(
            f'port = {port}\nworkers = {workers}\ntransport = "{transport}"\n[models]\ndirectory = "models"\n'
        )
        command = (Path(sys.executable).with_name("dl-inference-core"), "serve", "--config", config)
        environment = {**os.environ, "PYTHONPATH": str(site_with_fakes)}
        return start(*command, env=environment), f"127.0.0.1:{port}"

    return start_node


def ask(address: str, model: str) -> Any:
    """The model's answer, on a connection of its own."""
    with Client(address, timeout_s=10) as client:
        payload: Any = client.predict(model, {"x": X}, protocol="openinference").payload
        return payload["x"]


def answers(address: str, model: str) -> bool:
    try:
        ask(address, model)
    except InferenceError:
        return False
    return True


def health(address: str) -> bytes:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        found: bytes = channel.unary_unary(HEALTH)(b"", timeout=10)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_a_node_one_of_whose_models_hangs_answers_for_the_others_and_ends_on_sigterm(
    node: Callable[[int], tuple[Any, str]], wait_for: Any, workers: int
) -> None:
    process, address = node(workers)
    for _ in range(workers * 3):  # connections go to any of the workers
        wait_for("an answer", lambda: answers(address, "quick"))
        assert health(address) == NOT_SERVING
    assert "serving on " not in process.text()
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(20) == 0
    assert "Traceback" not in process.text()


def test_a_worker_that_takes_a_dead_ones_place_gets_no_requests_while_its_models_load(
    node: Callable[[int], tuple[Any, str]], wait_for: Any, gate: Path
) -> None:
    gate.touch()
    process, address = node(2)
    wait_for("all workers", lambda: f"\nserving on {address}\n" in process.text())
    gate.unlink()
    pid = process.popen.pid
    victim = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    os.kill(victim, signal.SIGKILL)
    wait_for("a successor that loads its models", lambda: len(list(gate.parent.glob("loads-*"))) == 3)
    for _ in range(30):
        np.testing.assert_array_equal(ask(address, "slow"), 2 * X)
        assert health(address) == SERVING
    assert process.text().count(": serving on ") == 2
    gate.touch()
    wait_for("the successor", lambda: process.text().count(": serving on ") == 3)
