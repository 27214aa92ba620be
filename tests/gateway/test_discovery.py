"""Nodes by name: looked up again and again, whatever name servers do."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dl_inference_core.app
from dl_inference_core.cli import main
from dl_inference_core.config import NodeConfig, RouteConfig
from dl_inference_core.errors import Code, ConfigError
from dl_inference_core.gateway import discovery
from dl_inference_core.gateway.discovery import Names
from dl_inference_core.gateway.reloading import Gateway
from dl_inference_core.testing.loopback import CoroutineService
from dl_inference_core.testing.transport_tls import Authority
from dl_inference_core.transport import Limits
from dl_inference_core.wire.protocol import PROTOCOLS

Lab = Any  # tests/conftest.py

QUICK = "[gateway]\npoll_interval_ms = 10\nresolve_interval_ms = 20\n"
NAME = "dns:///nodes.test:8500"
INFER = PROTOCOLS["openinference"].node_method


class Zone:
    """Names, and what they stand for: addresses of nodes, an error, or None for a name server that never answers."""

    def __init__(self) -> None:
        self.names: dict[str, Sequence[str] | Exception | None] = {}
        self.asked: Counter[str] = Counter()
        self.asking = self.most_at_once = 0

    def set(self, *nodes: Any, name: str = "nodes.test") -> None:
        self.names[name] = [node if isinstance(node, str) else node.address for node in nodes]

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        assert port == 8500
        self.asked[name] += 1
        self.asking += 1
        self.most_at_once = max(self.most_at_once, self.asking)
        try:
            await asyncio.sleep(0)
            found = self.names[name]
            if found is None:
                await asyncio.Event().wait()
            if isinstance(found, Exception):
                raise found
            assert found is not None
            return found
        finally:
            self.asking -= 1


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Zone:
    """What gateways ask."""
    zone = Zone()
    monkeypatch.setattr(dl_inference_core.app, "Gateway", functools.partial(Gateway, resolve=zone))
    return zone


def addresses(gateway: Any, route: str | int = "m") -> list[str]:
    return [node.address for node in gateway.forwarder(route).pool.nodes]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dl_inference_core.gateway.reloading"]


async def served(gateway: Any, count: int = 12, model: str = "m") -> set[str]:
    return {await gateway.call(model) for _ in range(count)}


async def test_a_name_stands_for_each_of_its_addresses_and_those_that_stay_keep_what_is_known(
    lab: Lab, zone: Zone
) -> None:
    a, b, c = await lab.nodes("abc")
    zone.set(a, b)
    gateway = await lab.front(f"{NAME}@3", top=QUICK, more='balancer = "round_robin"')
    assert await served(gateway) == {"a", "b"}
    node, balancer = gateway.node(a), gateway.forwarder().balancer
    connection, endpoint = node.endpoint.connection, node.endpoint
    assert [node.weight for node in gateway.forwarder().pool.nodes] == [3, 3]

    zone.set(c, a)
    await lab.until(lambda: set(addresses(gateway)) == {a.address, c.address})
    assert gateway.node(a) is node
    assert node.endpoint is endpoint
    assert endpoint.connection is connection
    assert gateway.forwarder().balancer is balancer
    assert gateway.node(c).weight == 3
    assert await served(gateway) == {"a", "c"}


async def test_requests_in_flight_on_an_address_that_goes_are_finished(lab: Lab, zone: Zone) -> None:
    a, b = await lab.nodes("ab")
    a.hangs = True
    zone.set(a)
    gateway = await lab.front(NAME, top=QUICK)
    call = asyncio.ensure_future(gateway.call())
    await lab.until(lambda: a.count == 1)
    zone.set(b)
    await lab.until(lambda: addresses(gateway) == [b.address])
    assert await served(gateway) == {"b"}
    a.release.set()
    assert await call == "a"


async def test_a_name_may_stand_beside_its_own_addresses_and_in_a_node_file(lab: Lab, zone: Zone) -> None:
    a, b = await lab.nodes("ab")
    zone.set(a, b)
    (lab.folder / "nodefile.txt").write_text(f"5=1000,{NAME}@2\n")
    top = f'{QUICK}nodefile = "nodefile.txt"\n'
    gateway = await lab.gateway(top + lab.route(f"{a.address}@7", NAME))
    nodes = {node.address: node.weight for node in gateway.forwarder().pool.nodes}
    assert nodes == {a.address: 7, b.address: 1}
    assert {node.address: node.weight for node in gateway.forwarder(5).pool.nodes} == {a.address: 2, b.address: 2}
    assert zone.most_at_once == 1  # the same name
    assert gateway.node(b).endpoint is gateway.node(b, 5).endpoint
    assert await served(gateway, model="5") == {"a", "b"}


@pytest.mark.parametrize("error", [OSError(-2, "Name or service not known"), ValueError("label too long"), []])
async def test_a_name_that_cannot_be_looked_up_keeps_its_addresses_and_one_warning_says_so(
    lab: Lab, zone: Zone, caplog: Any, error: Any
) -> None:
    a, b = await lab.nodes("ab")
    zone.set(a)
    gateway = await lab.front(NAME, top=QUICK)
    zone.names["nodes.test"] = error
    asked = zone.asked["nodes.test"]
    await lab.until(lambda: zone.asked["nodes.test"] > asked + 3)
    assert await served(gateway) == {"a"}
    (warning,) = warnings(caplog)
    why = {OSError: "Name or service not known", ValueError: "label too long", list: "it has no addresses"}[type(error)]
    assert warning == f"{NAME} cannot be looked up: {why}; its last addresses stay"
    zone.set(b)
    await lab.until(lambda: addresses(gateway) == [b.address])
    assert await served(gateway) == {"b"}


async def test_a_name_that_was_never_looked_up_has_no_nodes_until_it_is(lab: Lab, zone: Zone, caplog: Any) -> None:
    a, b = await lab.nodes("ab")
    zone.names["nodes.test"] = OSError(-3, "Temporary failure in name resolution")
    gateway = await lab.gateway(QUICK + lab.route(a) + lab.route(NAME, name="n", task=70))
    assert await gateway.refusal("n") == (Code.UNAVAILABLE, "route n has no nodes")
    assert await served(gateway, model="m") == {"a"}
    (warning,) = warnings(caplog)
    assert warning.endswith("it stands for no node until it can")
    zone.set(b)
    await lab.until(lambda: addresses(gateway, "n"))
    assert await served(gateway, model="n") == {"b"}


async def test_name_servers_that_never_answer_hold_up_neither_the_start_nor_the_end(lab: Lab, zone: Zone) -> None:
    a = await lab.node()
    zone.names["nodes.test"] = None
    gateway = await lab.gateway(QUICK + lab.route(a) + lab.route(NAME, name="n", task=70))
    assert (await gateway.refusal("n"))[0] is Code.UNAVAILABLE
    assert await served(gateway, model="m") == {"a"}


async def test_while_an_address_does_not_answer_its_name_is_looked_up_sooner(lab: Lab, zone: Zone) -> None:
    a, b = await lab.nodes("ab")
    zone.set(a)
    gateway = await lab.front(NAME, top="[gateway]\nresolve_interval_ms = 3600000\n")
    assert await served(gateway, 1) == {"a"}
    assert zone.asked["nodes.test"] == 1
    await a.stop()
    zone.set(b)
    assert (await gateway.refusal())[0] is Code.UNAVAILABLE
    await lab.until(lambda: addresses(gateway) == [b.address])
    assert await served(gateway) == {"b"}


async def test_a_name_that_could_not_be_looked_up_is_looked_up_sooner(lab: Lab, zone: Zone) -> None:
    a = await lab.node()
    zone.names["nodes.test"] = OSError(-3, "Temporary failure in name resolution")
    top = "[gateway]\nresolve_interval_ms = 3600000\n"
    gateway = await lab.gateway(top + lab.route(a) + lab.route(NAME, name="n", task=70))
    zone.set(a)
    await lab.until(lambda: addresses(gateway, "n") == [a.address])


async def test_a_route_that_names_another_name_forgets_the_first(lab: Lab, zone: Zone, caplog: Any) -> None:
    a, b = await lab.nodes("ab")
    zone.set(a)
    zone.set(b, name="others.test")
    gateway = await lab.front(NAME, top=QUICK)
    gateway.file.write_text(gateway.file.read_text().replace("nodes.test", "others.test"))
    await lab.until(lambda: addresses(gateway) == [b.address])
    zone.names.clear()
    zone.set(b, name="others.test")
    asked = zone.asked["others.test"]
    await lab.until(lambda: zone.asked["others.test"] > asked + 3)
    assert warnings(caplog) == []


async def test_a_config_that_cannot_be_used_changes_nothing_of_the_names(lab: Lab, zone: Zone, caplog: Any) -> None:
    a, b = await lab.nodes("ab")
    zone.set(a)
    zone.set(b, name="others.test")
    gateway = await lab.front(NAME, top=QUICK)
    good = gateway.file.read_text()
    gateway.file.write_text(good.replace("nodes.test", "others.test") + 'balancer = "none"\n')
    await lab.until(lambda: warnings(caplog))
    zone.set(b)
    await lab.until(lambda: addresses(gateway) == [b.address])
    assert await served(gateway) == {"b"}


async def test_the_system_is_asked(lab: Lab) -> None:
    a = await lab.node()
    port = a.address.rpartition(":")[2]
    gateway = await lab.front(f"dns:///localhost:{port}", top=QUICK)
    assert a.address in addresses(gateway)
    assert set(addresses(gateway)) <= {a.address, f"[::1]:{port}"}
    assert await served(gateway, 4) == {"a"}


async def test_by_tls_a_node_must_prove_the_name_that_stands_for_it(lab: Lab, zone: Zone, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    answer = b"\x0a\x01m"
    service = CoroutineService({INFER: functools.partial(answers, answer)})
    tls = authority.issue("nodes.test").server()
    server = await lab.make_transport().serve(service, ("127.0.0.1:0",), Limits(), tls=tls)
    try:
        for name in ("nodes.test", "others.test"):
            zone.set(f"127.0.0.1:{server.ports[0]}", name=name)
        top = f'{QUICK}[gateway.tls]\nca = "{authority.file}"\n'
        others = lab.route("dns:///others.test:8500", name="n", task=70)
        gateway = await lab.gateway(top + lab.route(NAME) + others)
        assert addresses(gateway, "m") == addresses(gateway, "n")
        assert await gateway.start_call("m") == answer
        assert (await gateway.refusal("n"))[0] is Code.UNAVAILABLE
        assert await gateway.start_call("m") == answer
        authority.file.rename(authority.file.with_suffix(".away"))  # what was read at the start stays in use
        zone.set(f"127.0.0.1:{server.ports[0]}", name="late.test")
        gateway.file.write_text(gateway.file.read_text().replace("others.test", "late.test"))
        await lab.until(
            lambda: any(node.endpoint.target.endswith("late.test") for node in gateway.forwarder("n").pool.nodes)
        )
    finally:
        await server.drain(0)


async def test_an_authority_that_is_missing_ends_the_start_even_without_nodes(lab: Lab, zone: Zone) -> None:
    zone.names["nodes.test"] = OSError(-3, "Temporary failure in name resolution")
    with pytest.raises(ConfigError, match=r"none\.pem: No such file"):
        await lab.front(NAME, top=f'{QUICK}[gateway.tls]\nca = "none.pem"\n')


async def answers(body: bytes, _: Any) -> bytes:
    return body


def test_check_says_which_route_has_no_nodes(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text('[[routes]]\nname = "m"\nnodes = ["dns:///no.such.name.invalid:1"]\n')
    result = CliRunner().invoke(main, ["check", "--config", str(config)])
    assert result.exit_code == 2
    assert result.stdout.split(maxsplit=3) == [
        *("route", "m", "FAILED", "none of its names could be looked up, so it has no nodes\n")
    ]


def route(*nodes: str) -> RouteConfig:
    return RouteConfig(name="m", nodes=tuple(map(NodeConfig.parse, nodes)))


async def test_few_names_are_looked_up_at_once() -> None:
    zone = Zone()
    names = Names(zone, 60, verified=False, usable=lambda _: True, changed=lambda: None, complain=lambda *_: None)
    for index in range(20):
        zone.set(f"10.0.0.{index}:8500", name=f"n{index}.test")
    routes = [route(f"dns:///n{index}.test:8500") for index in range(20)]
    await names.start(routes)
    assert [names.expand(each).nodes[0].address for each in routes] == [f"10.0.0.{index}:8500" for index in range(20)]
    assert zone.most_at_once == 2
    await names.close()


def test_a_look_up_under_way_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, released = threading.Event(), threading.Event()

    def blocks(*_: Any, **__: Any) -> Any:
        asked.set()
        assert released.wait(20)
        return []

    async def ask() -> None:
        asking = asyncio.create_task(discovery.resolve("nodes.test", 1))
        assert await asyncio.to_thread(asked.wait, 10)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    monkeypatch.setattr(socket, "getaddrinfo", blocks)
    asyncio.run(asyncio.wait_for(ask(), 10))
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "look up nodes.test"]
    assert thread.daemon
    released.set()
    thread.join(20)


async def test_addresses_are_written_as_nodes_are() -> None:
    assert await discovery.resolve("127.0.0.1", 80) == ["127.0.0.1:80"]
    assert await discovery.resolve("::1", 80) == ["[::1]:80"]
    with pytest.raises(OSError):
        await discovery.resolve("no.such.name.invalid", 80)


@pytest.mark.parametrize(
    ("text", "address", "weight"),
    [("dns:///nodes:8500", "dns:///nodes:8500", 1), ("dns:///a.b-c.test:1@0", "dns:///a.b-c.test:1", 0)],
)
def test_a_name_is_written_as_grpc_has_it(text: str, address: str, weight: int) -> None:
    assert NodeConfig.parse(text) == NodeConfig(address=address, weight=weight)


@pytest.mark.parametrize(
    "text", ["dns:nodes:1", "dns://8.8.8.8/nodes:1", "dns:///nodes", "dns:///[::1]:1", "dns:///:1"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a node"):
        NodeConfig.parse(text)
