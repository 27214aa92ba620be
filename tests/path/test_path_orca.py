"""Nodes that report their load, and who goes by it: gRPC's own weighted round robin, Envoy's, and ours."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from bench import peers
from dl_inference_core.errors import Code
from dl_inference_core.hookspecs import GROUP, hookimpl
from dl_inference_core.plugins import Plugins
from dl_inference_core.testing import FakeBackend
from dl_inference_core.wire import messages, orca
from dl_inference_core.wire.protocol import PROTOCOLS

INFER = PROTOCOLS["openinference"].node_method
ENVOYS = "client_side_weighted_round_robin"
FAST, SLOW = 1, 2
SLEEP_S = {FAST: 0.001, SLOW: 0.01}


class Fakes:
    """A plugin."""

    @staticmethod
    @hookimpl
    def dl_inference_register_backends() -> list[type[FakeBackend]]:
        return [FakeBackend]


async def node(lab: Any, factor: int, more: str = "", **content: Any) -> Any:
    """A node whose model "m" multiplies by `factor`, and takes its time.

    Args:
        more: what `[models]` says beside that.
        content: what the model does beside that.
    """
    fakes = EntryPoint(name="fakes", value=f"{__name__}:{Fakes.__name__}", group=GROUP)
    lab.plugins = Plugins([*sorted(entry_points(group=GROUP)), fakes])
    folder = lab.folder / f"models-{factor}"
    FakeBackend.write(folder / "m" / "1", **({"factor": factor, "sleep_s": SLEEP_S[factor]} | content))
    return await lab.gateway(f'[models]\ndirectory = "{folder}"\n{more}')


async def pair(lab: Any, more: str = "") -> list[str]:
    """The addresses of a fast node and of a slow one."""
    return [(await node(lab, factor, more)).address for factor in (FAST, SLOW)]


def ask(channel: grpc.aio.Channel) -> Any:
    """A call under way of the model "m", with a 1."""
    x = {"name": "x", "datatype": "FP32", "shape": [1]}
    request = messages.ModelInferRequest(model_name="m", inputs=[x], raw_input_contents=[np.ones(1, "<f4").tobytes()])
    return channel.unary_unary(INFER)(request.SerializeToString(), timeout=10)


def factor_of(answer: bytes) -> int:
    """Of the node that gave `answer`."""
    return int(np.frombuffer(messages.ModelInferResponse.FromString(answer).raw_output_contents[0], "<f4")[0])


class Calls:
    """Calls without a pause, four at a time.

    Attributes:
        count: how many have been answered.
        last: by whom the last hundred were answered.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self.count = 0
        self.last: deque[int] = deque(maxlen=100)

    async def keep_on(self) -> None:
        while True:
            self.last.append(factor_of(await ask(self._channel)))
            self.count += 1

    @property
    def by_the_slow(self) -> int:
        """How many of the last hundred."""
        return Counter(self.last)[SLOW]


@asynccontextmanager
async def calling(channel: grpc.aio.Channel) -> AsyncIterator[Calls]:
    calls = Calls(channel)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(calls.keep_on()) for _ in range(4)]
        yield calls
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def through_grpc(addresses: list[str]) -> AsyncIterator[grpc.aio.Channel]:
    """A client of gRPC's C core that balances by itself."""
    policy = {"blackoutPeriod": "0.1s", "weightUpdatePeriod": "0.1s", "enableOobLoadReport": False}
    service_config = json.dumps({"loadBalancingConfig": [{"weighted_round_robin": policy}]})
    options = [("grpc.service_config", service_config), ("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(f"ipv4:{','.join(addresses)}", options=options) as channel:
        yield channel


@asynccontextmanager
async def through_envoy(addresses: list[str]) -> AsyncIterator[grpc.aio.Channel]:
    """A client of a plain Envoy that balances."""
    types = f"type.googleapis.com/envoy.extensions.load_balancing_policies.{ENVOYS}.v3"
    policy = {
        "@type": f"{types}.ClientSideWeightedRoundRobin",
        "blackout_period": "0.1s",
        "weight_update_period": "0.1s",
    }
    config = {"name": f"envoy.load_balancing_policies.{ENVOYS}", "typed_config": policy}
    cluster = {"load_balancing_policy": {"policies": [{"typed_extension_config": config}]}}
    with ExitStack() as stack:
        server = await asyncio.to_thread(stack.enter_context, peers.envoy(addresses, cluster=cluster))
        async with grpc.aio.insecure_channel(server.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            yield channel


CLIENTS = pytest.mark.parametrize("through", [through_grpc, through_envoy], ids=["grpc", "envoy"])


@CLIENTS
async def test_shares_follow_the_load_that_nodes_report(lab: Any, through: Any) -> None:
    async with through(await pair(lab)) as channel, calling(channel) as calls:
        await lab.until(lambda: calls.count > 100 and calls.by_the_slow <= 25)


async def test_without_reports_shares_are_equal(lab: Any) -> None:
    async with through_grpc(await pair(lab, "load_reports_per_s = 0")) as channel, calling(channel) as calls:
        await lab.until(lambda: calls.count > 200)
        assert 40 <= calls.by_the_slow <= 60


async def test_an_answer_tells_of_the_node(lab: Any) -> None:
    slow = await node(lab, SLOW, "load_reports_per_s = 1000")
    async with calling(slow.channel) as calls:
        await lab.until(lambda: calls.count > 50)
        call = ask(slow.channel)
        await call
        load = orca.read(list(await call.trailing_metadata()))
    assert load is not None
    assert 0.5 < load.utilization <= 1.1
    assert 5 < load.qps < 1 / SLEEP_S[SLOW]
    assert load.eps == 0


async def test_a_failure_tells_too(lab: Any) -> None:
    failing = await node(lab, FAST, fail="as told")

    async def told() -> list[Any]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(failing.channel)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        return list(caught.value.trailing_metadata())

    async with asyncio.timeout(5):
        while (load := orca.read(await told())) is None:
            pass
    assert load.qps == load.eps > 0


@pytest.mark.parametrize("fails", [False, True], ids=["answer", "failure"])
async def test_a_gateway_keeps_its_nodes_reports_to_itself(lab: Any, fails: bool) -> None:
    report = orca.encode(orca.Load(utilization=0.5, qps=10, eps=0))
    node = await lab.node(trailers=[("a", "1"), *orca.trailers(report)])
    if fails:
        node.status = lab.error(Code.INTERNAL)
    front = await lab.front(node, more="attempts = 1")
    call = front.start_call()
    if fails:
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    else:
        await call
    trailers = list(await call.trailing_metadata())
    assert ("a", "1") in trailers
    assert not {key for key, _ in trailers} & orca.TRAILERS


async def test_shares_of_a_gateway_follow_the_load_that_nodes_report(lab: Any) -> None:
    options = "{ blackout_s = 0.1, update_s = 0.1 }"
    front = await lab.front(
        *await pair(lab), more=f'balancer = "orca_weighted_round_robin"\nbalancer_options = {options}'
    )
    async with calling(front.channel) as calls:
        await lab.until(lambda: calls.count > 100 and calls.by_the_slow <= 25)
