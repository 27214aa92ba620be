"""A gateway that speaks TLS, in front of a node that does, each with authorities of its own and as config files say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dl_inference_core.client import Client
from dl_inference_core.config import ServerTls
from dl_inference_core.errors import NodeUnreachable
from dl_inference_core.testing.transport_tls import Authority
from dl_inference_core.wire.protocol import PROTOCOLS

X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom clients and the gateway trust in each other."""
    return Authority(tmp_path_factory.mktemp("tls") / "outside")


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom the gateway and nodes trust in each other."""
    return Authority(tmp_path_factory.mktemp("tls") / "inside")


def tables(**sections: Any) -> str:
    """The sections as TOML."""
    return "".join(
        f"[{name}]\n" + "".join(f'{key} = "{value}"\n' for key, value in section if value is not None)
        for name, section in sections.items()
    )


@pytest.fixture(scope="module")
def node(serve: Callable[[str], Any], models: Path, inside: Authority) -> Any:
    return serve(tables(tls=inside.issue().server(clients=inside), models=[("directory", models)]))


@pytest.fixture(scope="module")
def gateway(
    serve: Callable[[str], Any], node: Any, routes: Callable[..., str], outside: Authority, inside: Authority
) -> Any:
    served: ServerTls = outside.issue().server(clients=outside)
    to_nodes = {"gateway.tls": inside.client(inside.issue("gateway"))}
    return serve(tables(tls=served, **to_nodes) + routes({"linear": 7}, node))


@pytest.mark.parametrize("protocol", ["openinference", "tfserving"])
def test_a_client_with_a_certificate_is_answered(gateway: Any, outside: Authority, make: Any, protocol: str) -> None:
    with Client(gateway.address, tls=outside.client(outside.issue("client"))) as client:
        answer = client.predict("linear", {"x": X}, protocol=protocol)
    np.testing.assert_array_equal(answer.payload["y"], make.answer(X, 10))


def test_predict_speaks_tls(gateway: Any, outside: Authority, make: Any) -> None:
    shown = outside.issue("client")
    command = [Path(sys.executable).with_name("dl-inference-core"), "predict", "linear"]
    command += ["--data", json.dumps({"x": X.tolist()}), "--address", gateway.address]
    command += ["--ca", outside.file, "--certificate", shown.certificate, "--key", shown.key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(json.loads(done.stdout)["answer"]["y"], make.answer(X, 10))


def test_whoever_shows_none_or_another_authoritys_or_speaks_plaintext_is_not(
    gateway: Any, node: Any, outside: Authority, inside: Authority
) -> None:
    for peer, tls in (
        (gateway, outside.client()),
        (gateway, outside.client(inside.issue("client"))),
        (gateway, inside.client(outside.issue("client"))),
        (node, inside.client(outside.issue("client"))),
    ):
        with Client(peer.address, tls=tls) as client, pytest.raises(NodeUnreachable):
            client.predict("linear", {"x": X})
    for peer in (gateway, node):
        assert peer.refusal(PROTOCOLS["openinference"].node_method, b"")[0] is grpc.StatusCode.UNAVAILABLE
