"""A node that joins a gateway of two processes by its command line, and leaves it at SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dl_inference_core.client import Client
from dl_inference_core.errors import ModelNotFound
from dl_inference_core.testing import FakeBackend

X = np.array([[1, 2, 3]], np.float32)
COMMAND = Path(sys.executable).with_name("dl-inference-core")


@pytest.fixture
def environment(site_with_fakes: Path) -> dict[str, str]:
    """Of a process in which a plugin with `FakeBackend` is installed."""
    return {**os.environ, "PYTHONPATH": str(site_with_fakes)}


def test_every_process_of_a_gateway_knows_a_node_that_joins_until_it_leaves(
    start: Any, transport: str, wait_for: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("a-token\n")
    (tmp_path / "gateway.toml").write_text(
        f'port = 0\nworkers = 2\ntransport = "{transport}"\n[gateway.registry]\ntoken_file = "token"\n'
    )
    (tmp_path / "node.toml").write_text(f'port = 0\ntransport = "{transport}"\n')
    FakeBackend.write(tmp_path / "models/double/1", factor=2)
    gateway = start(COMMAND, "serve", "--config", tmp_path / "gateway.toml")
    workers = [gateway.written(f"worker {index}: serving on ").split()[-1] for index in (0, 1)]
    shared = wait_for("the shared port", lambda: re.search(r"^serving on (\S+)\n", gateway.text(), re.MULTILINE))[1]
    node = start(
        *(COMMAND, "serve", "--config", tmp_path / "node.toml"),
        *("--join", shared, "--join-token-file", tmp_path / "token", "--", tmp_path / "models"),
        env=environment,
    )

    def answers(address: str) -> Any:
        with Client(address) as client:
            return client.predict("double", {"x": X}, protocol="openinference").payload["x"]

    def known(address: str) -> bool:
        try:
            answers(address)
        except ModelNotFound:  # and nothing else
            return False
        return True

    for address in workers:
        wait_for("the node to be known", lambda address=address: known(address))
        np.testing.assert_array_equal(answers(address), 2 * X)

    pid = gateway.popen.pid
    victim = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    os.kill(victim, signal.SIGKILL)
    wait_for("a successor", lambda: gateway.text().count(": serving on ") == 3)
    for address in workers:  # the successor has learned it before it listened
        np.testing.assert_array_equal(answers(address), 2 * X)

    node.popen.send_signal(signal.SIGTERM)
    assert node.popen.wait(20) == 0
    for address in workers:
        wait_for("the node to be forgotten", lambda address=address: not known(address), 5)
    with grpc.insecure_channel(shared) as channel:
        health = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert health(b"", timeout=10) == b"\x08\x02"
