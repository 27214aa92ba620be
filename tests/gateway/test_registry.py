"""Nodes that register themselves, and gateways that take their word for as long as they keep giving it."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from click.testing import CliRunner
from google.protobuf.message import Message

from dl_inference_core import config as configs
from dl_inference_core.app import App
from dl_inference_core.cli import main
from dl_inference_core.config import Config, JoinConfig, RegistryConfig, validated
from dl_inference_core.errors import Code, ConfigError
from dl_inference_core.gateway.registry import Registry
from dl_inference_core.gateway.sharing import Share
from dl_inference_core.plugins import Plugins
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.loopback import free_port
from dl_inference_core.testing.memory import MemoryExchange
from dl_inference_core.wire import messages

Lab = Any  # tests/conftest.py

TOKEN = "a-token"
CHECK = "/grpc.health.v1.Health/Check"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


def registry(lab: Lab, more: str = "") -> str:
    """The config of a gateway with a registry."""
    (lab.folder / "token").write_text(f"{TOKEN}\n")
    return f'[gateway]\npoll_interval_ms = 10\n[gateway.registry]\ntoken_file = "token"\n{more}\n'


def registration(*nodes: Any, models: Mapping[str, int | None] | None = None, **values: Any) -> Any:
    (address,) = [node if isinstance(node, str) else node.address for node in nodes]
    of_models = [{"name": name, "task_id": task} for name, task in ({"m": None} if models is None else models).items()]
    return messages.RegisterRequest(address=address, models=of_models, **values)


async def tell(gateway: Any, request: Message | bytes, token: str = TOKEN, method: str = "") -> int:
    """Register or deregister; the milliseconds of the lease."""
    name = method or type(request).__name__.removesuffix("Request")
    body = request if isinstance(request, bytes) else request.SerializeToString()
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    answer = await gateway.start_call(method=f"{messages.REGISTRY}/{name}", body=body, metadata=metadata)
    return int(messages.RegisterResponse.FromString(answer).lease_ms)


async def refusal(*told: Any, **how: Any) -> tuple[Code, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tell(*told, **how)
    return Code(caught.value.code().value[0]), caught.value.details() or ""


async def served(gateway: Any, count: int = 12, model: str = "m") -> set[str]:
    return {await gateway.call(model) for _ in range(count)}


def warnings(caplog: pytest.LogCaptureFixture, logger: str = "gateway.reloading") -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == f"dl_inference_core.{logger}"]


async def test_a_node_that_registers_gets_requests_until_its_lease_ends(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    gateway = await lab.gateway(registry(lab, "lease_ms = 60000\nroute = { timeout_ms = 5000, attempts = 3 }"))
    assert (await gateway.refusal("m"))[0] is Code.NOT_FOUND
    assert await tell(gateway, registration(a, models={"m": 69}, weight=3)) == 60_000
    assert await served(gateway) == await served(gateway, model="x-69") == {"a"}
    assert (gateway.forwarder().config.timeout_ms, gateway.forwarder().config.attempts) == (5000, 3)
    node = gateway.node(a)
    assert node.weight == 3
    connection = node.endpoint.connection

    assert await tell(gateway, registration(b, models={"m": 69})) == 60_000
    assert await served(gateway) == {"a", "b"}
    assert await tell(gateway, registration(b, models={"m": 69}, lease_ms=200)) == 200
    await lab.until(lambda: len(gateway.forwarder().pool.nodes) == 1)
    assert await served(gateway) == {"a"}
    assert gateway.node(a) is node
    assert node.endpoint.connection is connection
    assert await tell(gateway, registration(a, models={"m": 69}, weight=5)) == 60_000
    assert gateway.node(a) is node
    assert node.weight == 5


async def test_a_lease_that_is_renewed_lasts(lab: Lab) -> None:
    a = await lab.node()
    gateway = await lab.gateway(registry(lab))
    await tell(gateway, registration(a, lease_ms=1000))
    forwarder, node = gateway.forwarder(), gateway.node(a)
    assert await tell(gateway, registration(a, lease_ms=9000)) == 9000
    await asyncio.sleep(1.2)  # the first lease would have ended
    assert gateway.forwarder() is forwarder
    assert gateway.node(a) is node
    assert await tell(gateway, registration(a, lease_ms=1)) == 100
    await lab.until(lambda: "m" not in gateway.app.gateway.models)
    assert (await gateway.refusal("m"))[0] is Code.NOT_FOUND


async def test_registered_nodes_stand_beside_those_of_the_config_whatever_that_becomes(lab: Lab) -> None:
    a, b, c = await lab.nodes("abc")
    gateway = await lab.gateway(registry(lab) + lab.route(a))
    node = gateway.node(a)
    await tell(gateway, registration(b))
    await tell(gateway, registration(a, instance="0", weight=9))  # its weight is the operator's
    assert await served(gateway) == {"a", "b"}
    assert gateway.node(a) is node
    assert node.weight == 1
    registered = gateway.node(b)
    gateway.file.write_text(gateway.file.read_text().replace(lab.route(a), lab.route(c)))
    await lab.until(lambda: c.address in {node.address for node in gateway.forwarder().pool.nodes})
    assert gateway.node(b) is registered
    assert await served(gateway) == {"a", "b", "c"}
    await tell(gateway, messages.DeregisterRequest(address=b.address))
    assert await served(gateway) == {"a", "c"}


async def test_a_model_is_found_by_the_routes_of_its_name_and_of_its_task_id(lab: Lab, caplog: Any) -> None:
    a, b, c = await lab.nodes("abc")
    gateway = await lab.gateway(registry(lab) + lab.route(a, name="", task=7) + lab.route(a, name="named", task=8))
    await tell(gateway, registration(b, models={"x": 7, "y": 8, "named": None, "z": 9}))
    assert await served(gateway, model="7") == {"a", "b"}
    assert await served(gateway, model="x") == {"b"}
    assert await served(gateway, model="8") == await served(gateway, model="named") == {"a", "b"}
    assert await served(gateway, model="y") == {"b"}  # but 8 is another's
    assert await served(gateway, model="9") == {"b"}
    await tell(gateway, registration(c, models={"zz": 9}))
    assert await served(gateway, model="9") == {"b"}
    assert await served(gateway, model="zz") == {"c"}
    said = "registered task ids that other routes have already, ignored: "
    assert warnings(caplog) == [f"{said}8 of y", f"{said}8 of y, 9 of zz"]
    await tell(gateway, registration(b, models={"z": 10}))
    assert await served(gateway, model="10") == {"b"}
    assert await served(gateway, model="9") == {"c"}
    assert await served(gateway, model="7") == {"a"}
    assert (await gateway.refusal("x"))[0] is Code.NOT_FOUND


async def test_requests_in_flight_on_a_node_that_goes_are_finished(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    a.hangs = True
    gateway = await lab.gateway(registry(lab))
    await tell(gateway, registration(a))
    call = asyncio.ensure_future(gateway.call())
    await lab.until(lambda: a.count == 1)
    await tell(gateway, registration(b))
    await tell(gateway, messages.DeregisterRequest(address=a.address))
    assert await served(gateway) == {"b"}
    a.release.set()
    assert await call == "a"


async def test_processes_of_one_node_have_a_lease_each(lab: Lab) -> None:
    a = await lab.node()
    gateway = await lab.gateway(registry(lab))
    await tell(gateway, registration(a, instance="0", models={"m": None, "n": None}))
    node = gateway.node(a)
    await tell(gateway, registration(a, instance="1", models={"m": None, "o": None}))
    # Whichever of them a request reaches, it has "m".
    assert set(gateway.app.gateway.models) == {"m"}
    await tell(gateway, messages.DeregisterRequest(address=a.address, instance="0"))
    assert set(gateway.app.gateway.models) == {"m", "o"}
    assert gateway.node(a) is node
    await tell(gateway, messages.DeregisterRequest(address=a.address, instance="0"))  # once more changes nothing
    assert await served(gateway) == {"a"}
    await tell(gateway, messages.DeregisterRequest(address=a.address, instance="1"))
    assert set(gateway.app.gateway.models) == set()


async def test_the_weight_at_an_address_is_that_of_a_process_that_is_there(lab: Lab) -> None:
    a = await lab.node()
    gateway = await lab.gateway(registry(lab))
    for instance, weight in (("0", 2), ("1", 7)):
        await tell(gateway, registration(a, instance=instance, weight=weight))
    assert gateway.node(a).weight == 7
    await tell(gateway, messages.DeregisterRequest(address=a.address, instance="1"))
    assert gateway.node(a).weight == 2


async def test_an_address_may_be_written_otherwise_when_it_goes(lab: Lab) -> None:
    gateway = await lab.gateway(registry(lab))
    await tell(gateway, registration("10.0.0.1:80"))
    assert addresses(gateway) == {"10.0.0.1:80"}
    await tell(gateway, messages.DeregisterRequest(address="10.0.0.1:00080"))
    assert addresses(gateway) == set()
    code, said = await refusal(gateway, messages.DeregisterRequest(address="nowhere"))
    assert (code, said) == (
        Code.INVALID_ARGUMENT,
        'address: "nowhere" is not an address: expected host:port, with an IPv6 address in brackets, [::1]:8500',
    )


async def test_a_gateway_refuses_its_own_address(lab: Lab) -> None:
    gateway = await lab.gateway(registry(lab))
    code, said = await refusal(gateway, registration(gateway.address))
    assert (code, said) == (Code.INVALID_ARGUMENT, f"address: {gateway.address} is this gateway's own")


async def test_what_was_counted_of_a_route_goes_with_it(lab: Lab) -> None:
    a = await lab.node()
    gateway = await lab.gateway(registry(lab))
    await tell(gateway, registration(a, models={"passing": None, "stays": None}))
    assert await served(gateway, model="passing") == await served(gateway, model="stays") == {"a"}

    def counted() -> str:
        return str(gateway.app.metrics.render("")[0].decode())

    assert counted().count("passing") > 10
    await tell(gateway, registration(a, models={"stays": None}))
    await lab.until(lambda: "passing" not in counted())
    assert 'upstream="stays"' in counted()


async def test_who_has_no_token_changes_nothing(lab: Lab) -> None:
    a = await lab.node()
    gateway = await lab.gateway(registry(lab))
    await tell(gateway, registration(a))
    leave = messages.DeregisterRequest(address=a.address)
    for token in ("", "another", f"{TOKEN}x", TOKEN[:-1], f"{TOKEN} "):
        for request in (registration(a, models={}), leave):
            code, said = await refusal(gateway, request, token=token)
            assert code is Code.UNAUTHENTICATED
            assert TOKEN not in said
    assert await served(gateway) == {"a"}


async def test_without_a_registry_there_is_no_such_method(lab: Lab) -> None:
    gateway = await lab.front(await lab.node())
    assert (await refusal(gateway, registration("10.0.0.1:1")))[0] is Code.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (b"\xff", "malformed"),
        (registration("nowhere"), "is not an address"),
        (registration("unix:/run/docker.sock"), "is not an address"),
        (registration("dns:///nodes:1"), "is not an address"),
        (registration("10.0.0.1:1@7"), "is not an address"),
        (registration("10.0.0.1:70000"), "port 70000"),
        (registration("10.0.0.1:1\n"), "is not an address"),
        (registration("10.0.0.1:1", weight=10_001), "weight: 10001"),
        (registration("10.0.0.1:1", lease_ms=-1), "lease_ms: -1"),
        (registration("10.0.0.1:1", instance="a b"), "instance: "),
        (registration("10.0.0.1:1", instance="a" * 65), "instance: "),
        (registration("10.0.0.1:1", models={"": None}), "models: "),
        (registration("10.0.0.1:1", models={"a\nb": None}), "models: "),
        (registration("10.0.0.1:1", models={"a/b": None}), "models: "),
        (registration("10.0.0.1:1", models={"a" * 256: None}), "models: "),
        (registration("10.0.0.1:1", models={"a": -1}), "task id -1"),
        (registration("10.0.0.1:1").SerializeToString() * 2, "each once"),
        (registration("10.0.0.1:1", models={f"{i:0>200}": None for i in range(100)}), "20000 at most"),
    ],
)
async def test_what_is_no_registration_is_refused(lab: Lab, request_: Any, said: str) -> None:
    gateway = await lab.gateway(registry(lab))
    code, message = await refusal(gateway, request_, method="Register")
    assert code is Code.INVALID_ARGUMENT
    assert said in message
    assert set(gateway.app.gateway.models) == set()


async def test_what_many_nodes_say_at_once_is_taken_over_at_once(lab: Lab) -> None:
    gateway = (await lab.gateway(registry(lab))).app.gateway
    taken = []
    take_over = gateway._take_over
    gateway._take_over = lambda: taken.append(take_over())
    for index in range(50):
        request = registration("10.0.0.1:1", instance=str(index), models={"m": None}, weight=index)
        body = base64.b64encode(request.SerializeToString()).decode()
        gateway.registry._heard({"request": body, "lease_ms": 60_000})
    await lab.until(lambda: gateway.models)
    assert len(taken) == 1


async def test_there_are_limits_to_how_many_register(lab: Lab) -> None:
    gateway = await lab.gateway(registry(lab, "max_nodes = 2\nmax_models = 3"))
    await tell(gateway, registration("10.0.0.1:1", models={"a": 1, "b": 2}))
    code, said = await refusal(gateway, registration("10.0.0.2:1", models={"a": 1, "b": 2}))
    assert (code, said) == (
        Code.RESOURCE_EXHAUSTED,
        "gateway.registry.max_models is 3; with this registration there would be 4",
    )
    await tell(gateway, registration("10.0.0.2:1", models={"a": 1}))
    code, said = await refusal(gateway, registration("10.0.0.2:1", models={}, instance="1"))
    assert (code, said.partition(";")[0]) == (Code.RESOURCE_EXHAUSTED, "gateway.registry.max_nodes is 2")
    await tell(gateway, registration("10.0.0.1:1", models={"a": 1, "c": 2}))  # a renewal takes no room
    await tell(gateway, messages.DeregisterRequest(address="10.0.0.1:1"))
    await tell(gateway, registration("10.0.0.3:1", models={"a": 1, "b": 2}))


async def test_a_gateway_without_a_route_listens_and_is_ready_when_a_node_has_come(lab: Lab) -> None:
    a = await lab.node()
    gateway = await lab.gateway(registry(lab))
    assert await gateway.start_call(method=CHECK, body=b"") == NOT_SERVING
    await tell(gateway, registration(a))
    await lab.until(lambda: gateway.app._readiness.serving)
    assert await gateway.start_call(method=CHECK, body=b"") == SERVING


@pytest.mark.parametrize(
    ("token", "more", "said"),
    [
        (None, "", "No such file"),
        ("", "", "is no token"),
        ("two words", "", "is no token"),
        (TOKEN, "route = { name = 'm' }", 'unknown key "gateway.registry.route.name"'),
        (TOKEN, "route = { balancer = 'none' }", r"route \[gateway.registry.route\]: balancer names"),
    ],
)
async def test_a_registry_that_cannot_be_ends_the_start(lab: Lab, token: str | None, more: str, said: str) -> None:
    config = registry(lab, more)
    (lab.folder / "token").unlink()
    if token is not None:
        (lab.folder / "token").write_text(token)
    with pytest.raises(Exception, match=said):
        await lab.gateway(config)


# Several processes of the gateway


class Worker:
    """One process's registry, which hears what the others do.

    Attributes:
        changed: set when it knows something else.
    """

    def __init__(self, folder: Path, index: int) -> None:
        (folder / "token").write_text(TOKEN)
        (folder / "share").mkdir(exist_ok=True)
        self.changed = asyncio.Event()
        config = RegistryConfig(token_file=folder / "token")
        self.registry = Registry(config, self.changed.set, lambda *_: None)
        self._share = Share(folder / "share", index)
        self.registry.share(self._share)

    async def start(self) -> Worker:
        self._share.start()
        await self.registry.learn()
        return self

    async def hears(self, request: Any) -> None:
        name = type(request).__name__.removesuffix("Request")
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        exchange = MemoryExchange(name, request.SerializeToString(), metadata)
        await self.registry.methods()[f"{messages.REGISTRY}/{name}"](exchange)

    @property
    def known(self) -> dict[str, list[str]]:
        return {route.name: [node.address for node in route.nodes] for route in self.registry.onto({}).values()}

    async def knows(self, nodes: dict[str, list[str]]) -> None:
        async with asyncio.timeout(5):
            while self.known != nodes:
                self.changed.clear()
                await self.changed.wait()

    def close(self) -> None:
        self.registry.close()
        self._share.close()


async def test_what_one_process_hears_the_others_know_and_one_that_comes_later_too(tmp_path: Path) -> None:
    one, two = [await Worker(tmp_path, index).start() for index in range(2)]
    many = {f"m{i:0>150}": i for i in range(100)}
    await one.hears(registration("10.0.0.1:1", models=many))
    await two.hears(registration("10.0.0.2:1", models={"n": 7}, weight=2))
    both = {**{name: ["10.0.0.1:1"] for name in many}, "n": ["10.0.0.2:1"]}
    await one.knows(both)
    await two.knows(both)
    assert one.registry.onto({})["n"].nodes[0].weight == 2

    two.close()
    successor = await Worker(tmp_path, 1).start()
    assert successor.known == both
    left = {name: ["10.0.0.1:1"] for name in many}
    await one.hears(registration("10.0.0.2:1", models={"n": 7}, weight=2, lease_ms=100))
    await successor.knows(left)
    await one.knows(left)
    await successor.hears(messages.DeregisterRequest(address="10.0.0.1:1"))
    await one.knows({})
    for worker in (one, successor):
        worker.close()


async def test_a_process_takes_no_nonsense_from_another(tmp_path: Path) -> None:
    worker = Worker(tmp_path, 0)
    request = base64.b64encode(registration("nowhere").SerializeToString()).decode()
    for payload in ({"request": request, "lease_ms": 1}, {"request": "?", "lease_ms": 1}, {"lease_ms": 1}):
        with pytest.raises((ValueError, KeyError)):
            worker.registry._heard(payload)
    worker.registry._heard({"request": base64.b64encode(registration("h:1").SerializeToString()), "lease_ms": 0})
    assert worker.known == {}
    worker.close()


async def test_what_a_process_learns_at_its_start_is_one_change(tmp_path: Path) -> None:
    one = await Worker(tmp_path, 0).start()
    for index in range(100):
        await one.hears(registration(f"10.0.0.1:{index + 1}"))
    two = Worker(tmp_path, 1)
    changes = []
    two.registry._changed = lambda: changes.append(two.known)
    await two.start()
    assert changes == [one.known]
    for worker in (one, two):
        worker.close()


async def test_who_does_not_know_all_yet_tells_nobody_that_it_is_all(tmp_path: Path) -> None:
    one = await Worker(tmp_path, 0).start()
    one.registry._told.clear()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as silent:
        silent.bind(str(tmp_path / "share" / "1"))
        two = await Worker(tmp_path, 2).start()
        assert not two.registry._told.is_set()
        one.registry._told.set()
        three = await Worker(tmp_path, 3).start()
        assert three.registry._told.is_set()
    for worker in (one, two, three):
        worker.close()


async def test_processes_that_start_together_do_not_wait_for_each_other(tmp_path: Path) -> None:
    one, two = Worker(tmp_path, 0), Worker(tmp_path, 1)
    one._share.start()
    two._share.start()
    while one._share.others == 0:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.001)
    await asyncio.gather(one.registry.learn(), two.registry.learn())
    assert one.registry._told.is_set()
    assert two.registry._told.is_set()
    for worker in (one, two):
        worker.close()


async def test_a_process_that_is_alone_waits_for_nobody(tmp_path: Path) -> None:
    worker = await Worker(tmp_path, 0).start()
    with pytest.raises(StopIteration):  # without having awaited anything
        worker.registry.learn().send(None)
    worker.close()


# Nodes


class NodeProcess:
    """A node in this process, with models that give back what they are given."""

    def __init__(self, lab: Lab, *gateways: Any, name: str = "node", token: str = TOKEN, **join: Any) -> None:
        self.models = lab.folder / name
        FakeBackend.write(self.models / "m" / "1")
        (lab.folder / f"{name}.token").write_text(token)
        addresses = [gateway if isinstance(gateway, str) else gateway.address for gateway in gateways]
        values = {
            "transport": lab.transport_name,
            "models": {"directory": self.models, "poll_interval_ms": 20},
            "join": {"gateways": addresses, "token_file": lab.folder / f"{name}.token", **join},
        }
        self.app = App(validated(Config, values, "node"), lab.fakes)
        self.address = ""
        lab._closing.append(self.app.close)

    async def start(self) -> NodeProcess:
        (port,) = await self.app.serve("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        return self


def addresses(gateway: Any, route: str = "m") -> set[str]:
    forwarder = gateway.app.gateway.models.get(route)
    return set() if forwarder is None else {node.address for node in forwarder.pool.nodes}


def asking(model: str = "m") -> bytes:
    x = {"name": "x", "datatype": "FP32", "shape": [1], "contents": {"fp32_contents": [1.5]}}
    body: bytes = messages.ModelInferRequest(model_name=model, id="q", inputs=[x]).SerializeToString()
    return body


async def test_a_node_joins_every_gateway_and_leaves_them_before_it_ends(lab: Lab) -> None:
    gateways = [await lab.gateway(registry(lab)) for _ in range(2)]
    node = await NodeProcess(lab, *gateways, weight=4).start()
    for gateway in gateways:
        await lab.until(lambda gateway=gateway: addresses(gateway) == {node.address})
        assert gateway.forwarder().pool.nodes[0].weight == 4
        assert await gateway.call(body=asking()) == "q"
    listening = []

    def left(drain: Any) -> Any:
        async def drained(grace_s: float) -> None:
            listening.append([addresses(gateway) for gateway in gateways])
            await drain(grace_s)

        return drained

    node.app._server.drain = left(node.app._server.drain)  # type: ignore[union-attr,method-assign]
    await node.app.close()
    assert listening == [[set(), set()]]


async def test_nodes_that_come_and_go_under_load_cost_no_request(lab: Lab) -> None:
    gateway = await lab.gateway(registry(lab))
    stays = await NodeProcess(lab, gateway, name="stays").start()
    await lab.until(lambda: addresses(gateway) == {stays.address})
    answers: Counter[str] = Counter()
    stopping = False

    async def send() -> None:
        while not stopping:
            answers[await gateway.call(body=asking())] += 1

    senders = [asyncio.ensure_future(send()) for _ in range(8)]
    for name in ("one", "two", "three"):
        node = await NodeProcess(lab, gateway, name=name).start()
        await lab.until(lambda node=node: addresses(gateway) == {stays.address, node.address})
        before = answers.total()
        await lab.until(lambda before=before: answers.total() > before + 20)
        await node.app.close()
        assert addresses(gateway) == {stays.address}
    stopping = True
    await asyncio.gather(*senders)
    assert set(answers) == {"q"}
    await lab.until(lambda: not gateway.app.gateway._retiring)
    counted = [line for line in gateway.app.metrics.render("")[0].decode().splitlines() if "{node=" in line]
    assert stays.address in "".join(counted)
    assert node.address not in "".join(counted)


async def test_a_node_says_which_models_it_has_by_now(lab: Lab) -> None:
    gateway = await lab.gateway(registry(lab))
    node = await NodeProcess(lab, gateway).start()
    await lab.until(lambda: addresses(gateway) == {node.address})
    FakeBackend.write(node.models / "n" / "1")
    (node.models / "n" / "model.toml").write_text("task_id = 70\n")
    await lab.until(lambda: addresses(gateway, "n") == {node.address})
    assert await gateway.call(body=asking("70")) == await gateway.call(body=asking("n")) == "q"
    (node.models / "m" / "1" / "fake.json").unlink()
    (node.models / "m" / "1").rmdir()
    (node.models / "m").rmdir()
    await lab.until(lambda: addresses(gateway, "m") == set())
    assert await gateway.call(body=asking("n")) == "q"


async def test_a_gateway_that_has_forgotten_everything_knows_its_nodes_again(lab: Lab, caplog: Any) -> None:
    port = free_port()

    async def serve() -> App:
        config = lab.folder / "gateway.toml"
        config.write_text(f'transport = "{lab.transport_name}"\n{registry(lab, "lease_ms = 600")}')
        app = App(configs.load(config), lab.plugins, config_file=config)
        lab._closing.append(app.close)
        await app.serve(f"127.0.0.1:{port}")
        return app

    first = await serve()
    node = await NodeProcess(lab, f"127.0.0.1:{port}").start()
    await lab.until(lambda: first.gateway is not None and "m" in first.gateway.models)
    await first.close()
    joining = "joining"
    await lab.until(lambda: warnings(caplog, joining))
    again = await serve()
    await lab.until(lambda: again.gateway is not None and "m" in again.gateway.models)
    assert again.gateway is not None
    assert [each.address for each in again.gateway.models["m"].pool.nodes] == [node.address]
    await lab.until(lambda: len(warnings(caplog, joining)) == 2)
    failed, joined = warnings(caplog, joining)
    assert failed.startswith(f"gateway 127.0.0.1:{port}: this node cannot register, and will try again: UNAVAILABLE: ")
    assert joined == f"gateway 127.0.0.1:{port}: this node is registered now"


def counting(node: NodeProcess) -> list[str]:
    """The methods of the node's calls to its gateway from now on."""
    assert node.app._joining is not None
    connection = node.app._joining._gateways[0]._connection
    tried: list[str] = []
    call = connection.call

    async def counted(method: str, message: bytes, **how: Any) -> Any:
        tried.append(method)
        return await call(method, message, **how)

    connection.call = counted  # type: ignore[assignment,method-assign]
    return tried


async def test_a_node_with_another_token_serves_all_the_same_and_says_so_once(lab: Lab, caplog: Any) -> None:
    gateway = await lab.gateway(registry(lab))
    caplog.set_level(logging.DEBUG)
    node = await NodeProcess(lab, gateway, token="another-token").start()
    tried = counting(node)
    await lab.until(lambda: len(tried) == 3)
    (warning,) = warnings(caplog, "joining")
    assert "UNAUTHENTICATED" in warning
    assert "another-token" not in caplog.text
    assert addresses(gateway) == set()
    connection = node.app.transport.connect(node.address, node.app._limits)
    infer = "/inference.GRPCInferenceService/ModelInfer"
    answer, _ = await connection.call(infer, asking())
    assert messages.ModelInferResponse.FromString(bytes(answer)).id == "q"
    await connection.close()


async def test_a_node_that_is_refused_says_so_as_an_error_once(lab: Lab, caplog: Any) -> None:
    gateway = await lab.gateway(registry(lab))
    node = await NodeProcess(lab, gateway, advertise=gateway.address).start()
    tried = counting(node)
    await lab.until(lambda: len(tried) == 3)
    (record,) = [record for record in caplog.records if record.name == "dl_inference_core.joining"]
    assert record.levelname == "ERROR"
    said = "this node gets no requests from it, which refuses to register it: address: "
    assert record.getMessage() == f"gateway {gateway.address}: {said}{gateway.address} is this gateway's own"


async def test_an_error_nobody_foresaw_ends_neither_a_registration_nor_the_drain(lab: Lab, caplog: Any) -> None:
    gateway = await lab.gateway(registry(lab))
    node = NodeProcess(lab, gateway)
    joining, drained = node.app._joining, []
    assert joining is not None
    models = joining._models

    def raises(*_: Any) -> Any:
        raise RuntimeError("as told")

    joining._models = raises
    await node.start()
    await lab.until(lambda: warnings(caplog, "joining"))
    joining._models = models
    await lab.until(lambda: len(warnings(caplog, "joining")) > 1)
    assert addresses(gateway) == {node.address}
    failed, registered = warnings(caplog, "joining")
    assert failed == f"gateway {gateway.address}: to register this node failed, and will be tried again"
    assert registered == f"gateway {gateway.address}: this node is registered now"
    joining._gateways[0]._connection.call = raises  # type: ignore[assignment,method-assign]
    drain = node.app._server.drain  # type: ignore[union-attr]

    async def drains(grace_s: float) -> None:
        drained.append(grace_s)
        await drain(grace_s)

    node.app._server.drain = drains  # type: ignore[union-attr,method-assign]
    await node.app.close()
    assert drained
    assert warnings(caplog, "joining")[-1] == "to leave a gateway failed"


async def test_a_node_says_another_address_if_told_to(lab: Lab) -> None:
    gateway = await lab.gateway(registry(lab))
    await NodeProcess(lab, gateway, advertise="10.0.0.9:8500").start()
    await lab.until(lambda: addresses(gateway) == {"10.0.0.9:8500"})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"host": "0.0.0.0", "models": True}, "with host 0.0.0.0 gateways must be told where"),
        (
            {"models": True},
            "gateway h:1 cannot reach this node at host 127.0.0.1: give a host that it can, or advertise",
        ),
        ({"host": "[::1]", "models": True}, r"gateway h:1 cannot reach this node at host \[::1\]"),
        ({"host": "localhost", "models": True}, "gateway h:1 cannot reach this node at host localhost"),
        ({"host": "[::]", "models": True}, r"with host \[::\] gateways must be told where"),
        ({"routes": [{"name": "m", "nodes": ["127.0.0.1:1"]}]}, "there are no models to register"),
    ],
)
def test_what_cannot_join_ends_the_start(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    (tmp_path / "token").write_text(TOKEN)
    values = {**config, "join": {"gateways": ["127.0.0.1:1", "h:1"], "token_file": tmp_path / "token"}}
    if values.pop("models", False):
        values["models"] = {"directory": tmp_path}
    with pytest.raises(ConfigError, match=said):
        App(validated(Config, values, "node"), Plugins())


@pytest.mark.parametrize("address", ["h", "dns:///h:1", "unix:/s", "h:1@2", "h:0", ""])
def test_gateways_and_nodes_are_plain_addresses(tmp_path: Path, address: str) -> None:
    for values in ({"gateways": [address]}, {"gateways": ["h:1"], "advertise": address}):
        with pytest.raises(ConfigError):
            validated(JoinConfig, {**values, "token_file": tmp_path}, "join")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--join", "h:1"], "--join: token_file: Field required"),
        (["--join-token-file", "t"], "--join: gateways: Field required"),
        (
            ["--join", "h:1,h", "--join-token-file", "t"],
            '--join: "h" is not an address: expected host:port, with an IPv6 address in brackets, [::1]:8500',
        ),
        (["--join", "127.0.0.1:1", "--join-token-file", "/no/such/file"], "/no/such/file: No such file or directory"),
    ],
)
def test_a_command_line_that_cannot_join_is_an_error(tmp_path: Path, options: list[str], said: str) -> None:
    (tmp_path / "server.toml").write_text('transport = "grpcio"\n')
    result = CliRunner().invoke(main, ["serve", "--config", str(tmp_path / "server.toml"), *options, str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr == f"error: {said}\n"
