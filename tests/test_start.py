"""What a node answers while its models load, and when it counts as ready."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from dl_inference_core.app import App
from dl_inference_core.config import Config, validated
from dl_inference_core.testing import FakeBackend
from dl_inference_core.wire import messages

Lab = Any  # tests/conftest.py

HEALTH = "/grpc.health.v1.Health"
OIP = "/inference.GRPCInferenceService"
STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class StartingNode:
    """A node in this process. Its model "quick" loads at once, its model "slow" once the file `gate` is there."""

    def __init__(self, lab: Lab, gate: Path, **config: Any) -> None:
        self.lab = lab
        self.models = lab.folder / "models"
        FakeBackend.write(self.models / "quick" / "1")
        FakeBackend.write(self.models / "slow" / "1")
        (self.models / "slow" / "handler.py").write_text(
            "import os, time\nfrom dl_inference_core.node.handling import Handler\n"
            "class Slow(Handler):\n    def load(self, model, directory):\n"
            f"        while not os.path.exists({str(gate)!r}):\n            time.sleep(0.005)\n"
        )
        models = {"directory": self.models, "poll_interval_ms": 20, **config.pop("models", {})}
        values = {"transport": lab.transport_name, "http_port": 0, "models": models, **config}
        self.app = App(validated(Config, values, "node"), lab.fakes)
        lab._closing.append(self.close)

    async def start(self) -> StartingNode:
        """Returns when it listens and its model "quick" has loaded."""
        self.starting = asyncio.create_task(self.app.serve("127.0.0.1:0"))
        await self.lab.until(lambda: self.starting.done() or self.app._server is not None, 20)
        assert self.app._server is not None, self.starting.result()
        self.address = f"127.0.0.1:{self.app._server.ports[0]}"
        self.channel = grpc.aio.insecure_channel(self.address, options=OPTIONS)
        await self.lab.until(lambda: self.loaded("quick"), 20)
        return self

    async def close(self) -> None:
        self.starting.cancel()
        await asyncio.gather(self.starting, return_exceptions=True)
        await self.channel.close()
        await self.app.close()

    def loaded(self, name: str) -> bool:
        assert self.app.repository is not None
        return self.app.repository.models[name].ready

    async def ask(self, method: str, request: Any, answer: Any) -> Any:
        return answer.FromString(await self.channel.unary_unary(method)(request.SerializeToString(), timeout=10))

    async def health(self, service: str = "") -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await self.ask(f"{HEALTH}/Check", request, health_pb2.HealthCheckResponse)
        return int(answer.status)

    async def ready(self, model: str = "") -> bool:
        if not model:
            return bool((await self.ask(f"{OIP}/ServerReady", empty(), messages.ServerReadyResponse)).ready)
        request = messages.ModelReadyRequest(name=model)
        return bool((await self.ask(f"{OIP}/ModelReady", request, messages.ModelReadyResponse)).ready)

    async def state(self, model: str) -> tuple[str, str]:
        """As GetModelStatus tells it, and the error's words."""
        request = messages.GetModelStatusRequest(model_spec={"name": model})
        (found,) = (await self.ask(STATUS, request, messages.GetModelStatusResponse)).model_version_status
        return found.State.Name(found.state), found.status.error_message

    async def infer(self, model: str) -> Any:
        x = {"name": "x", "datatype": "FP32", "shape": [1], "contents": {"fp32_contents": [1.5]}}
        request = messages.ModelInferRequest(model_name=model, inputs=[x])
        return await self.ask(f"{OIP}/ModelInfer", request, messages.ModelInferResponse)

    async def get(self, path: str) -> tuple[int, str]:
        def send() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.app.http_port}{path}", timeout=10) as response:
                    return response.status, response.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        return await asyncio.to_thread(send)


def empty() -> Any:
    return messages.ServerLiveRequest()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    gate = tmp_path / "gate"
    yield gate
    gate.touch()


async def refusal(calling: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await calling
    return caught.value.code(), caught.value.details() or ""


async def test_while_a_model_loads_the_port_is_open_others_are_served_and_the_server_is_live_but_not_ready(
    lab: Lab, gate: Path
) -> None:
    node = await StartingNode(lab, gate).start()
    watch = node.channel.unary_stream(f"{HEALTH}/Watch")(b"")
    assert await watch.read() == health_pb2.HealthCheckResponse(status=NOT_SERVING).SerializeToString()
    assert (await node.ask(f"{OIP}/ServerLive", empty(), messages.ServerLiveResponse)).live
    assert (await node.ready(), await node.ready("quick"), await node.ready("slow")) == (False, True, False)
    assert [await node.health(service) for service in ("", "quick", "slow")] == [NOT_SERVING, SERVING, NOT_SERVING]
    assert (await node.infer("quick")).outputs[0].name == "x"
    code, words = await refusal(node.infer("slow"))
    assert code is grpc.StatusCode.UNAVAILABLE  # so that a gateway asks another node
    assert words == 'model "slow" is still loading: version 1 is loading'
    assert (await refusal(node.infer("unknown")))[0] is grpc.StatusCode.NOT_FOUND
    assert (await node.state("quick"), await node.state("slow")) == (("AVAILABLE", ""), ("LOADING", ""))
    assert (await node.get("/healthz"))[0] == 200
    status, text = await node.get("/readyz")
    assert (status, text.partition(":")[0]) == (503, "starting")
    for name, state in (("quick", "AVAILABLE"), ("slow", "LOADING")):
        status, text = await node.get(f"/v1/models/{name}")
        assert (status, json.loads(text)["model_version_status"][0]["state"]) == (200, state)
    assert (await node.get("/v1/models/slow/metadata"))[0] == 503
    assert (await node.get("/v1/models/unknown"))[0] == 404
    assert not node.starting.done()

    await asyncio.to_thread(gate.touch)
    await node.starting
    assert await watch.read() == health_pb2.HealthCheckResponse(status=SERVING).SerializeToString()
    assert (await node.ready(), await node.ready("slow")) == (True, True)
    assert [await node.health(service) for service in ("", "slow")] == [SERVING, SERVING]
    assert (await node.infer("slow")).outputs[0].name == "x"
    assert (await node.get("/readyz"))[0] == 200
    watch.cancel()


async def test_a_model_that_passes_its_load_timeout_leaves_the_server_ready_and_says_so_itself(
    lab: Lab, gate: Path
) -> None:
    node = await StartingNode(lab, gate, models={"load_timeout_s": 1}).start()
    await node.starting
    assert (await node.ready(), await node.ready("quick"), await node.ready("slow")) == (True, True, False)
    assert [await node.health(service) for service in ("", "quick", "slow")] == [SERVING, SERVING, NOT_SERVING]
    state, words = await node.state("slow")
    assert (state, words.partition(" (")[0]) == ("END", "the load took longer than 1 s")
    assert (await node.get("/readyz"))[0] == 200
    code, words = await refusal(node.infer("slow"))
    assert (code, words) == (grpc.StatusCode.UNAVAILABLE, 'model "slow" is not ready: version 1 is failed')


async def test_a_server_none_of_whose_models_loads_is_live_says_why_and_serves_once_one_does(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FakeBackend.write(tmp_path / "models" / "m" / "1", fail_load="it is broken")
    models = {"directory": tmp_path / "models", "poll_interval_ms": 20}
    values = {"transport": lab.transport_name, "http_port": 0, "models": models}
    app = App(validated(Config, values, "node"), lab.fakes)
    lab._closing.append(app.close)
    starting = asyncio.create_task(app.serve("127.0.0.1:0"))
    said = "not serving yet: no model could be loaded, and a model is tried again only when its files change"
    await lab.until(lambda: said in caplog.messages, 20)
    assert app._server is not None
    assert not starting.done()
    address = f"127.0.0.1:{app._server.ports[0]}"
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        health = channel.unary_unary(f"{HEALTH}/Check")
        assert await health(b"", timeout=10) == b"\x08\x02"
        FakeBackend.write(tmp_path / "models" / "m" / "2")
        await starting
        assert await health(b"", timeout=10) == b"\x08\x01"


async def test_a_gateway_sends_nothing_to_a_node_that_starts_before_it_is_ready(lab: Lab, gate: Path) -> None:
    node = await StartingNode(lab, gate).start()
    other = await lab.node("other")
    gateway = await lab.gateway(lab.route(node.address, other, name="quick"))
    starts = next(each for each in gateway.forwarder("quick").pool.nodes if each.address == node.address)
    assert starts.endpoint.health.reason.value == "not_serving"
    assert {await gateway.call("quick") for _ in range(10)} == {"other"}
    await asyncio.to_thread(gate.touch)
    await lab.until(lambda: starts.endpoint.health.usable, 20)


async def test_a_node_registers_with_a_gateway_when_it_is_ready(lab: Lab, gate: Path) -> None:
    (lab.folder / "token").write_text("a-token\n")
    gateway = await lab.gateway(f'[gateway.registry]\ntoken_file = "{lab.folder / "token"}"\n')
    join = {"gateways": [gateway.address], "token_file": lab.folder / "token"}
    node = await StartingNode(lab, gate, join=join).start()
    assert node.app._joining is not None
    assert node.app._joining._tasks == []
    await asyncio.to_thread(gate.touch)
    await lab.until(lambda: {"quick", "slow"} <= gateway.app.gateway.models.keys(), 20)
