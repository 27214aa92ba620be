"""Routes that change while requests run."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dl_inference_core.errors import Code, ConfigError, PluginError

Lab = Any  # tests/conftest.py

QUICK = "[gateway]\npoll_interval_ms = 10\n"
DYNAMIC = 'balancer = "dynamic_weighted_round_robin"'


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dl_inference_core.gateway.reloading"]


def rewrite(gateway: Any, *routes: str, top: str = "") -> None:
    """The gateway's file, replaced in one step."""
    transport = gateway.file.read_text().partition("\n")[0]
    part = gateway.file.with_suffix(".part")
    part.write_text("\n".join([transport, top, QUICK, *routes]))
    part.replace(gateway.file)


async def served(gateway: Any, count: int = 12, model: str = "m") -> set[str]:
    return {await gateway.call(model) for _ in range(count)}


async def test_nodes_come_and_go_and_those_that_stay_keep_what_is_known_of_them(lab: Lab) -> None:
    a, b, c = await lab.nodes("abc")
    gateway = await lab.front(a, b, more=DYNAMIC, top=QUICK)
    assert await served(gateway) == {"a", "b"}
    a.status = lab.error(Code.INTERNAL)
    while gateway.weight(a) == 100:
        await gateway.call()
    weight, node = gateway.weight(a), gateway.node(a)
    endpoint, balancer, forwarder = node.endpoint, gateway.forwarder().balancer, gateway.forwarder()

    rewrite(gateway, lab.route(c, b, a, more=DYNAMIC))  # one more, in another order
    await lab.until(lambda: len(gateway.forwarder().pool.nodes) == 3)
    assert gateway.forwarder() is forwarder
    assert forwarder.balancer is balancer
    assert gateway.node(a) is node
    assert node.endpoint is endpoint
    assert gateway.weight(a) == weight
    assert "c" in await served(gateway)

    rewrite(gateway, lab.route(f"{a.address}@3", c, more=f"{DYNAMIC}\ntimeout_ms = 5000"))  # b leaves
    await lab.until(lambda: len(gateway.forwarder().pool.nodes) == 2)
    assert gateway.node(a) is node
    assert node.weight == 3
    assert node.endpoint is endpoint
    assert gateway.forwarder().config.timeout_ms == 5000
    assert await served(gateway) == {"c"}


async def test_a_route_that_goes_is_not_found_and_one_that_comes_answers(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    gateway = await lab.front(a, top=QUICK)
    assert await served(gateway) == {"a"}
    rewrite(gateway, lab.route(b, name="n", task=70))
    await lab.until(lambda: "n" in gateway.app.gateway.models)
    assert (await gateway.refusal("m"))[0] is Code.NOT_FOUND
    assert (await gateway.refusal("x-69"))[0] is Code.NOT_FOUND
    assert await served(gateway, model="n") == {"b"}
    assert await served(gateway, model="70") == {"b"}


async def test_requests_in_flight_on_what_leaves_are_finished(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    a.hangs = True
    gateway = await lab.gateway(QUICK + lab.route(a) + lab.route(a, name="n", task=70))
    on_node = asyncio.ensure_future(gateway.call("m"))
    on_route = asyncio.ensure_future(gateway.call("n"))
    await lab.until(lambda: a.count == 2)
    connection = gateway.node(a).endpoint.connection
    rewrite(gateway, lab.route(b))  # the node leaves one route, and the other is gone
    await lab.until(lambda: "n" not in gateway.app.gateway.models)
    assert await served(gateway) == {"b"}
    a.release.set()
    assert [await on_node, await on_route] == ["a", "a"]
    await lab.until(lambda: not gateway.app.gateway._retiring)
    assert a.address not in gateway.app.gateway._endpoints._by_target
    rewrite(gateway, lab.route(a))
    await lab.until(lambda: [node.address for node in gateway.forwarder().pool.nodes] == [a.address])
    assert gateway.node(a).endpoint.connection is not connection
    assert await served(gateway) == {"a"}


async def test_a_node_may_come_back_while_its_last_requests_run(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    a.hangs = True
    gateway = await lab.front(a, top=QUICK)
    first = asyncio.ensure_future(gateway.call())
    await lab.until(lambda: a.count == 1)
    endpoint = gateway.node(a).endpoint
    rewrite(gateway, lab.route(b))
    await lab.until(lambda: gateway.forwarder().pool.nodes[0].address == b.address)
    rewrite(gateway, lab.route(a))
    await lab.until(lambda: gateway.forwarder().pool.nodes[0].address == a.address)
    assert gateway.node(a).endpoint is endpoint
    a.release.set()
    assert await first == "a"
    await lab.until(lambda: not gateway.app.gateway._retiring)
    assert await served(gateway) == {"a"}


async def test_reloads_under_load_cost_no_request(lab: Lab) -> None:
    nodes = await lab.nodes("abcd", latency_s=0.002)
    gateway = await lab.front(*nodes, top=QUICK)
    answers: Counter[str] = Counter()
    stopping = False

    async def send() -> None:
        while not stopping:
            answers[await gateway.call()] += 1

    senders = [asyncio.ensure_future(send()) for _ in range(8)]
    for turn in range(12):
        left = nodes[: 1 + turn % 4] if turn % 2 else nodes[turn % 4 :]
        weights = [f"{node.address}@{turn + 1}" for node in left]
        rewrite(gateway, lab.route(*weights, more=f'balancer = "{["round_robin", "weighted_round_robin"][turn % 2]}"'))
        await lab.until(
            lambda left=left, turn=turn: (
                [(node.address, node.weight) for node in gateway.forwarder().pool.nodes]
                == [(node.address, turn + 1) for node in left]
            )
        )
    stopping = True
    await asyncio.gather(*senders)
    assert set(answers) == set("abcd")
    await lab.until(lambda: not gateway.app.gateway._retiring)
    await lab.until(lambda: all(node.in_flight == 0 for node in gateway.forwarder().pool.nodes))


async def test_another_strategy_takes_over_and_the_same_one_keeps_what_it_learned(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    gateway = await lab.front(a, b, more='balancer = "weighted_round_robin"', top=QUICK)
    first = gateway.forwarder().balancer
    rewrite(gateway, lab.route(a, b, more='balancer = "weighted_round_robin"\nattempts = 1'))
    await lab.until(lambda: gateway.forwarder().config.attempts == 1)
    assert gateway.forwarder().balancer is first
    node = gateway.node(a)
    rewrite(gateway, lab.route(a, b, more='balancer = "round_robin"'))
    await lab.until(lambda: gateway.forwarder().balancer.name == "round_robin")
    assert gateway.node(a) is node
    assert await served(gateway) == {"a", "b"}


async def test_a_route_that_gains_or_changes_its_name_or_task_stays_itself(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    gateway = await lab.gateway(QUICK + lab.route(a, name="", task=69))
    forwarder = gateway.forwarder(69)
    node = gateway.node(a, 69)
    rewrite(gateway, lab.route(a, b, name="m", task=69))
    await lab.until(lambda: "m" in gateway.app.gateway.models)
    assert gateway.forwarder("m") is gateway.forwarder(69) is forwarder
    assert gateway.node(a) is node
    assert forwarder.name == "m"
    rewrite(gateway, lab.route(a, b, name="m", task=70))
    await lab.until(lambda: 70 in gateway.app.gateway.tasks)
    assert gateway.forwarder("m") is gateway.forwarder(70) is forwarder
    assert 69 not in gateway.app.gateway.tasks
    # Its old id to another, while it keeps its name.
    rewrite(gateway, lab.route(b, name="n", task=70), lab.route(a, name="m", task=71))
    await lab.until(lambda: 71 in gateway.app.gateway.tasks)
    assert gateway.forwarder("m") is gateway.forwarder(71) is forwarder
    assert gateway.forwarder("n") is gateway.forwarder(70) is not forwarder
    assert await served(gateway, model="n") == {"b"}
    assert await served(gateway, model="m") == {"a"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("[[routes]\n", "reload failed, the routes stay as they are: "),
        ("[[routes]]\nname = 'm'\nnodes = []\n", "routes.0.nodes: "),
        ("[[routes]]\nname = 'm'\nnodes = ['h:70000']\n", "port 70000"),
        ("[[routes]]\nname = 'm'\nnodes = ['h:1']\nbalancer = 'none'\n", 'route m: balancer names the balancer "none"'),
        (
            "[[routes]]\nname = 'm'\nnodes = ['h:1']\nbalancer = 'round_robin'\nbalancer_options = { x = 1 }\n",
            'unknown key "x"',
        ),
    ],
)
async def test_a_bad_config_changes_nothing_and_says_so_once(lab: Lab, caplog: Any, bad: str, said: str) -> None:
    a, b = await lab.nodes("ab")
    gateway = await lab.front(a, top=QUICK)
    rewrite(gateway, bad)
    await lab.until(lambda: messages(caplog))
    await asyncio.sleep(0.1)
    assert await served(gateway) == {"a"}
    (message,) = messages(caplog)
    assert message.startswith("reload failed, the routes stay as they are: ")
    assert said in message
    assert "\n" not in message
    rewrite(gateway, lab.route(b))
    await lab.until(lambda: gateway.forwarder().pool.nodes[0].address == b.address)
    assert await served(gateway) == {"b"}


async def test_settings_that_need_a_restart_are_named_once(lab: Lab, caplog: Any) -> None:
    a, b = await lab.nodes("ab")
    gateway = await lab.front(a, top=QUICK)
    top = 'port = 1\nmessage_bytes = 2048\n[tls]\ncertificate = "server.pem"\nkey = "server.key"'
    rewrite(gateway, lab.route(b), top=top)
    await lab.until(lambda: gateway.forwarder().pool.nodes[0].address == b.address)
    rewrite(gateway, lab.route(a), top=top)
    await lab.until(lambda: gateway.forwarder().pool.nodes[0].address == a.address)
    assert messages(caplog) == [f"{gateway.file}: port, message_bytes, tls: changes take effect at the next start"]


async def test_comments_and_spaces_change_nothing(lab: Lab, caplog: Any) -> None:
    a = await lab.node()
    gateway = await lab.front(a, top=QUICK)
    config = gateway.forwarder().config
    rewrite(gateway, "# a comment", lab.route(a))
    watched = gateway.app.gateway._config_file
    await lab.until(lambda: watched._taken == gateway.file.read_bytes())
    assert gateway.forwarder().config is config
    assert messages(caplog) == []


# The node file


class NodeFile:
    """A gateway from a node file."""

    def __init__(self, path: Path, gateway: Any) -> None:
        self.path = path
        self.gateway = gateway

    def write(self, text: str | bytes) -> None:
        self.path.write_bytes(text.encode() if isinstance(text, str) else text)


async def from_nodefile(lab: Lab, text: str, config: str = "", *, poll_ms: int = 10) -> NodeFile:
    path = lab.folder / "nodefile.txt"
    path.write_text(text)
    return NodeFile(
        path, await lab.gateway(f'[gateway]\nnodefile = "nodefile.txt"\npoll_interval_ms = {poll_ms}\n{config}')
    )


async def test_a_line_at_a_time_changes_and_last_good_is_kept_per_task(lab: Lab, caplog: Any) -> None:
    a, b = await lab.nodes("ab")
    file = await from_nodefile(lab, f"1=500,{a.address}\n2=500,{a.address}\n3=500,{a.address}\n")
    node = file.gateway.node(a, 1)
    file.write(f"1=500,{a.address}\n2=,{b.address}\n3=500,{b.address}\n4=500,{b.address}@7\n")
    await lab.until(lambda: 4 in file.gateway.app.gateway.tasks)
    assert file.gateway.node(a, 1) is node
    assert [await served(file.gateway, model=task) for task in "1234"] == [{"a"}, {"a"}, {"b"}, {"b"}]
    assert messages(caplog) == [f'{file.path}: line 2: task 2: "" is no timeout in milliseconds']
    file.write(f"1=500,{a.address}\n")
    await lab.until(lambda: set(file.gateway.app.gateway.tasks) == {1})
    assert (await file.gateway.refusal("2"))[0] is Code.NOT_FOUND


@pytest.mark.parametrize("garbage", [b"\0" * 100 + b"\n", "1=1,x:1\n".encode("utf-16") + b"\n"])
async def test_garbage_keeps_every_task_and_warns_once(lab: Lab, caplog: Any, garbage: bytes) -> None:
    a, b = await lab.nodes("ab")
    file = await from_nodefile(lab, f"1=500,{a.address}\n")
    file.write(garbage)
    await lab.until(lambda: messages(caplog))
    assert await served(file.gateway, model="1") == {"a"}
    assert len(messages(caplog)) == 1
    file.write(f"1=500,{b.address}\n")
    await lab.until(lambda: file.gateway.forwarder(1).pool.nodes[0].address == b.address)


async def test_a_file_written_byte_by_byte_under_load_fails_no_request(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    # A byte comes in less than an interval, also on a busy machine; or it would be right to take the file for whole.
    file = await from_nodefile(lab, f"1=500,{a.address}\n2=500,{a.address}\n", poll_ms=1000)
    seen: set[frozenset[int]] = set()
    content = f"# rewritten\n1=500,{b.address}\n2=500,{b.address}\n3=500,{b.address}\n".encode()
    with file.path.open("wb", buffering=0) as target:
        for byte in content:
            target.write(bytes([byte]))
            await asyncio.sleep(0.03)
            seen.add(frozenset(file.gateway.app.gateway.tasks))
            await file.gateway.call("2")
    await lab.until(lambda: 3 in file.gateway.app.gateway.tasks)
    assert seen <= {frozenset({1, 2}), frozenset({1, 2, 3})}
    assert await served(file.gateway, model="2") == {"b"}


def gone(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def restore(path: Path, text: str) -> None:
    """By a symlink swap, as configuration managers do it."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    real = path.with_name("real.txt")
    real.write_text(text)
    link = path.with_name("link")
    link.symlink_to(real)
    link.replace(path)


@pytest.mark.parametrize("break_it", [gone, a_folder, dangling])
async def test_a_file_that_is_away_for_a_while_changes_nothing_and_is_read_again(
    lab: Lab, caplog: Any, break_it: Callable[[Path], None]
) -> None:
    a, b = await lab.nodes("ab")
    file = await from_nodefile(lab, f"1=500,{a.address}\n")
    break_it(file.path)
    await lab.until(lambda: messages(caplog))
    await asyncio.sleep(0.1)
    assert await served(file.gateway, model="1") == {"a"}
    (message,) = messages(caplog)
    assert str(file.path) in message
    assert message.endswith("; the routes stay as they are")
    restore(file.path, f"1=500,{b.address}\n")
    await lab.until(lambda: file.gateway.forwarder(1).pool.nodes[0].address == b.address)
    assert await served(file.gateway, model="1") == {"b"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
async def test_an_unreadable_file_changes_nothing(lab: Lab, caplog: Any) -> None:
    a = await lab.node()
    file = await from_nodefile(lab, f"1=500,{a.address}\n")
    file.path.chmod(0)
    await lab.until(lambda: messages(caplog))
    assert await served(file.gateway, model="1") == {"a"}
    file.path.chmod(0o600)


async def test_the_config_counts_where_both_have_a_task(lab: Lab, caplog: Any) -> None:
    a, b = await lab.nodes("ab")
    text = f"69=500,{b.address}\nm=500,{b.address}\n5=500,{b.address}\n"
    file = await from_nodefile(lab, text, lab.route(a))
    gateway = file.gateway
    assert await served(gateway, model="m") == await served(gateway, model="69") == {"a"}
    assert await served(gateway, model="5") == {"b"}
    assert messages(caplog) == ["the config and the node file both have 69, m; the config counts"]
    quick = gateway.file.read_text().replace(lab.route(a), "")
    gateway.file.write_text(quick)  # the config gives it up
    await lab.until(lambda: await_none(gateway, b))
    assert await served(gateway, model="m") == await served(gateway, model="69") == {"b"}


def await_none(gateway: Any, node: Any) -> bool:
    routes = (gateway.app.gateway.models.get("m"), gateway.app.gateway.tasks.get(69))
    return all(route is not None and route.pool.nodes[0].address == node.address for route in routes)


async def test_a_bad_config_does_not_hold_up_the_node_file(lab: Lab, caplog: Any) -> None:
    a, b = await lab.nodes("ab")
    file = await from_nodefile(lab, f"5=500,{a.address}\n", lab.route(a))
    file.gateway.file.write_text(file.gateway.file.read_text() + "balancer = 'none'\n")
    file.write(f"5=500,{b.address}\n")
    await lab.until(lambda: messages(caplog))
    await lab.until(lambda: file.gateway.forwarder(5).pool.nodes[0].address == b.address)
    assert await served(file.gateway, model="m") == {"a"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('[gateway]\nnodefile = "none.txt"', r"none\.txt: No such file"),
        ('[gateway]\nnodefile = "bad.txt"', r"bad\.txt: line 1: task 1 has no nodes"),
        ("[[routes]]\nname = 'a'\nnodes = ['h:1']\nbalancer = 'none'", "route a: balancer names"),
        ("[[routes]]\nname = 'a'\nnodes = ['h:1']\nbalancer = 'round_robin'\nbalancer_options = {x=1}", "unknown key"),
        ("", "nothing to serve"),
    ],
)
async def test_what_cannot_be_served_ends_the_start(lab: Lab, config: str, said: str) -> None:
    (lab.folder / "bad.txt").write_text("1=5\n")
    with pytest.raises((ConfigError, PluginError), match=said):
        await lab.gateway(config)
