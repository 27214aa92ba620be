"""Routes that lead back to their own gateway, and gateways one behind another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dl_inference_core.errors import Code
from dl_inference_core.gateway.forwarding import HOPS
from dl_inference_core.gateway.sharing import Share
from dl_inference_core.testing.loopback import free_port

Lab = Any  # tests/conftest.py

LOOP = "leads back to this gateway"
PATIENT = "timeout_ms = 3000\nattempts = 5\n"
BY_TCP = '[gateway.health]\nprobe = "tcp"\n'
"""By its own health a gateway is not ready before its node is, which here is the gateway."""


def attempts(gateway: Any, outcome: str | None = None) -> float:
    """At nodes, so far."""
    return sum(
        sample.value
        for metric in gateway.app.metrics._registry.collect()
        for sample in metric.samples
        if sample.name == "dl_inference_attempts_total" and outcome in (None, sample.labels["outcome"])
    )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2", "0.0.0.0"])
async def test_a_route_to_its_own_gateway_ends_at_the_first_return(lab: Lab, host: str) -> None:
    port = free_port()
    gateway = await lab.gateway(BY_TCP + lab.route(f"{host}:{port}", more=PATIENT), listen=f"0.0.0.0:{port}")
    code, message = await gateway.refusal()
    assert code is Code.FAILED_PRECONDITION
    assert message.startswith(f"route m {LOOP}: expected nodes that run models")
    assert attempts(gateway) == 1
    assert attempts(gateway, "failure") == 0, "no node is blamed"


async def test_two_gateways_that_lead_to_each_other_end_it_too(lab: Lab) -> None:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    near, far = await asyncio.gather(
        *(
            lab.gateway(BY_TCP + lab.route(other, more=PATIENT), listen=own)
            for own, other in (addresses, reversed(addresses))
        )
    )
    for gateway in (near, far):
        code, message = await gateway.refusal()
        assert code is Code.FAILED_PRECONDITION
        assert LOOP in message
    assert attempts(near) == attempts(far) == 2


async def test_two_tiers_of_gateways_forward_and_tell_the_node_the_way(lab: Lab) -> None:
    node = await lab.node()
    inner = await lab.front(node)
    outer = await lab.front(inner.address)
    assert await outer.call(metadata=(("x-own", "1"),)) == "a"
    told = dict(node.calls[-1].metadata)
    assert told["x-own"] == "1"
    ids = told[HOPS].split(",")
    assert len(ids) == len(set(ids)) == 2


async def test_the_processes_of_one_gateway_have_one_id(lab: Lab, tmp_path: Any) -> None:
    node = await lab.node()
    for index in range(2):
        gateway = await lab.gateway(lab.route(node), share=Share(tmp_path, index))
        await gateway.call()
    alone = await lab.front(node)
    await alone.call()
    one, other, third = (dict(call.metadata)[HOPS] for call in node.calls)
    assert one == other != third


async def test_more_gateways_than_anybody_has_on_purpose_are_a_loop(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.front(node)
    through = ",".join(f"g{number}" for number in range(7))
    assert await gateway.call(metadata=((HOPS, through),)) == "a"
    code, message = await gateway.refusal(metadata=((HOPS, f"{through},g7"),))
    assert (code, message) == (Code.FAILED_PRECONDITION, "the request has been through 8 gateways; expected at most 8")
    assert node.count == 1
