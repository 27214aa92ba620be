from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from click.testing import CliRunner, Result
from grpc_health.v1 import health_pb2, health_pb2_grpc

import dl_inference_core
from dl_inference_core.cli import main
from dl_inference_core.errors import Code
from dl_inference_core.testing.loopback import free_port
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS

Lab = Any  # tests/conftest.py

INFER = PROTOCOLS["openinference"].node_method
BODY = messages.ModelInferRequest(model_name="m").SerializeToString()


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# Without a server


@pytest.mark.parametrize(
    "command", [[], ["serve"], ["tfserving"], ["plugins"], ["check"], ["predict"], ["bench"], ["tune"]]
)
def test_help_is_given(command: list[str]) -> None:
    for option in ("--help", "-h"):
        result = run(*command, option)
        assert result.exit_code == 0
        assert result.output.startswith("Usage: ")
        assert "--worker " not in result.output
        assert max(map(len, result.output.splitlines())) <= 120


def test_the_version_is_told() -> None:
    assert run("--version").output.strip().endswith(dl_inference_core.__version__)


def test_plugins_are_listed_for_people_and_for_scripts() -> None:
    result = run("plugins")
    assert result.exit_code == 0
    assert f"core  (dl-inference-core {dl_inference_core.__version__})\n" in result.output
    assert "  balancer  round_robin\n              Cyclic over the usable nodes, " in result.output
    assert "              options: choices = 2, bias = 1.0\n" in result.output
    assert max(map(len, result.output.splitlines())) <= 120
    rows = json.loads(run("plugins", "--json").output)
    core = next(row for row in rows if row["name"] == "core")
    assert core["provides"]["transports"] == ["grpcio"]
    assert core["error"] == ""
    assert set(core) == {"name", "distribution", "version", "provides", "described", "error"}
    described = next(row for row in rows if row["name"] == "balancers")["described"]["balancers"]
    assert described["dynamic_weighted_round_robin"]["options"] == {"scale": 100}
    assert all(each["purpose"] for each in described.values())


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


ROUTE = '[[routes]]\nname = "m"\nnodes = ["127.0.0.1:1"]\n'

WRONG = {
    "no TOML": ("port = ", "server.toml: "),
    "an unknown key": ("prot = 1\n" + ROUTE, 'unknown key "prot"'),
    "a wrong value": ("port = 70000\n" + ROUTE, "port: "),
    "nothing to serve": ("", "nothing to serve"),
    "a missing node file": ('[gateway]\nnodefile = "none.txt"\n', "none.txt: No such file"),
    "a node file without a good line": ('[gateway]\nnodefile = "server.toml"\n', "server.toml: line 1: "),
    "a missing folder": ('[models]\ndirectory = "none"\n', "none"),
    "a folder that is a file": ('[models]\ndirectory = "server.toml"\n', "server.toml"),
    "an unknown balancer": (ROUTE + 'balancer = "none"\n', 'route m: balancer names the balancer "none"'),
    "unknown balancer options": (ROUTE + 'balancer = "round_robin"\nbalancer_options = {x=1}\n', 'unknown key "x"'),
    "an unknown transport": ('transport = "none"\n' + ROUTE, 'transport names the transport "none"'),
    "unknown transport options": ("transport_options = {x=1}\n" + ROUTE, 'unknown key "x"'),
    "an unknown host": ('host = "no.such.host.invalid"\n' + ROUTE, "cannot listen on no.such.host.invalid:8500"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path, case: str) -> None:
    text, said = WRONG[case]
    file = tmp_path / "server.toml"
    file.write_text(text if "transport" in text else f'transport = "grpcio"\n{text}')
    result = run("serve", "--config", file)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_port_in_use_is_a_config_error_with_one_process_and_with_several(tmp_path: Path, busy_port: int) -> None:
    file = tmp_path / "nodefile.txt"
    file.write_text("1=5,127.0.0.1:1\n")
    for workers in ("1", "2"):
        result = run("serve", "--nodes", file, "--port", str(busy_port), "--workers", workers)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: cannot listen on 127.0.0.1:{busy_port}: ")
        assert result.stdout == ""


def test_an_http_port_in_use_is_a_config_error(tmp_path: Path, busy_port: int) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'transport = "grpcio"\n{ROUTE}')
    result = run("serve", "--config", file, "--port", "0", "--http-port", str(busy_port))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: http_port {busy_port}: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--port", "70000"],
        ["serve", "--port", "many"],
        ["serve", "--workers", "0"],
        ["serve", "--no-such-option"],
        ["serve", "one", "two"],
        ["predict"],
        ["predict", "m"],
        ["predict", "m", "--text", "a", "--data", "[1]"],
        ["predict", "m", "--data", "{"],
        ["predict", "m", "--data", "[1]", "--dtype", "none"],
        ["predict", "m", "--data", '["a"]'],
        ["predict", "m", "--file", "/no/such/file"],
        ["none"],
    ],
)
def test_a_wrong_command_line_says_so_with_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output


def test_check_says_what_is_right_and_wrong_without_serving(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(ROUTE)
    result = run("check", "--config", file)
    assert result.exit_code == 2
    assert re.fullmatch(r"node +127\.0\.0\.1:1 +FAILED +route m: does not answer\n", result.output)
    (row,) = json.loads(run("check", "--config", file, "--json").stdout)
    assert row == {"kind": "node", "name": "127.0.0.1:1", "ok": False, "detail": "route m: does not answer"}
    file.write_text("prot = 1")
    result = run("check", "--config", file)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {file}: unknown key")


def test_predict_says_why_nobody_answered() -> None:
    result = run("predict", "m", "--text", "a", "--address", "127.0.0.1:1", "--timeout", "5")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: UNAVAILABLE: ")


def test_predict_says_which_certificate_cannot_be_used(tmp_path: Path) -> None:
    for options, said in (
        (["--ca", tmp_path / "none"], f"{tmp_path / 'none'}: No such file or directory"),
        (["--tls", "--certificate", "c.pem"], "TLS: certificate and key go together"),
    ):
        result = run("predict", "m", "--text", "a", *options)
        assert result.exit_code == 2
        assert result.stderr == f"error: {said}\n"


# With one


class Served:
    """A `dl-inference-core serve` of its own, in a session of its own."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.lines: list[str] = []
        self.address = ""
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    async def said(self, pattern: str, within_s: float = 20) -> str:
        """The next line on stdout that fits."""
        assert self.process.stdout is not None
        async with asyncio.timeout(within_s):
            async for raw in self.process.stdout:
                self.lines.append(raw.decode().rstrip())
                if re.fullmatch(pattern, self.lines[-1]):
                    return self.lines[-1]
        raise AssertionError(f"it ended, having said {self.lines} and {self.log}")

    async def ready(self) -> None:
        self.address = (await self.said(r"serving on \S+:\d+")).split()[-1]

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    async def end(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> int:
        assert self.process.stdout is not None
        async with asyncio.timeout(20):
            async for raw in self.process.stdout:
                self.lines.append(raw.decode().rstrip())
            return await self.process.wait()

    async def call(self) -> str:
        """The name of the node that answered a request on a connection of its own."""
        return await call(self.address)


async def call(address: str) -> str:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        answer = await channel.unary_unary(INFER)(BODY, timeout=10)
    return str(messages.ModelInferResponse.FromString(answer).id)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextlib.asynccontextmanager
async def serving(folder: Path, *arguments: str | Path) -> AsyncIterator[Served]:
    log = folder / "stderr"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "dl_inference_core.cli", "serve"),
            *map(str, arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield Served(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


def config(lab: Lab, *nodes: Any, more: str = "") -> Path:
    path: Path = lab.folder / "server.toml"
    path.write_text(
        f'port = 0\ntransport = "{lab.transport_name}"\n{more}' + lab.route(*nodes, more="timeout_ms = 5000")
    )
    return path


async def test_it_says_where_it_serves_once_and_ends_on_sigterm(lab: Lab) -> None:
    node = await lab.node()
    nodefile = lab.folder / "nodefile.txt"
    nodefile.write_text(f"m=1000,{node.address}\n")
    async with serving(lab.folder, "--nodes", nodefile, "--port", "0", "--http-port", "0") as served:
        await served.ready()
        assert served.address.startswith("127.0.0.1:")
        assert await served.call() == "a"
        assert await served.end() == 0
        assert [line.split()[0] for line in served.lines] == ["http", "transport", "serving"]
        assert served.lines[1] == "transport envoy: it is installed, and can run here"
        assert served.log == ""


async def test_it_says_so_only_when_requests_would_succeed(lab: Lab) -> None:
    node = await lab.node()
    await node.stop()
    async with serving(lab.folder, "--config", config(lab, node)) as served, asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(served.ready())
        await lab.until(lambda: "not serving yet: no model has loaded" in served.log, 20)
        assert not reading.done()
        await node.start()
        await reading
        assert await served.call() == "a"
        assert await served.end() == 0


async def test_it_ends_on_sigterm_before_it_serves(lab: Lab) -> None:
    node = await lab.node()
    await node.stop()
    async with serving(lab.folder, "--config", config(lab, node)) as served:
        await lab.until(lambda: "not serving yet" in served.log, 20)
        assert await served.end() == 0
        assert served.lines == []


async def test_sigterm_under_load_finishes_what_is_in_flight(lab: Lab) -> None:
    nodes = await lab.nodes("ab", hangs=True)
    async with serving(lab.folder, "--config", config(lab, *nodes)) as served:
        await served.ready()
        calls = [asyncio.ensure_future(served.call()) for _ in range(30)]
        await lab.until(lambda: sum(node.count for node in nodes) == 30)
        served.process.send_signal(signal.SIGTERM)
        await refused(served.address)
        for node in nodes:
            node.release.set()
        assert set(await asyncio.gather(*calls)) == {"a", "b"}
        assert await served.ended() == 0
        assert served.log == ""


async def refused(address: str) -> None:
    """Returns once nobody listens there any more."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                return
            writer.close()
            await asyncio.sleep(0.01)


async def test_what_outlasts_the_drain_is_cut_off(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    async with serving(lab.folder, "--config", config(lab, node, more="drain_s = 0.2\n")) as served:
        await served.ready()
        call = asyncio.ensure_future(served.call())
        await lab.until(lambda: node.count == 1)
        start = time.monotonic()
        assert await served.end() == 0
        assert time.monotonic() - start < 5  # where `drain_s` is not set, 10
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert Code(caught.value.code().value[0]) in (Code.UNAVAILABLE, Code.CANCELLED)
        await lab.until(lambda: node.cancelled)


async def test_ctrl_c_ends_it_too(lab: Lab) -> None:
    async with serving(lab.folder, "--config", config(lab, await lab.node())) as served:
        await served.ready()
        served.process.send_signal(signal.SIGINT)
        assert await served.ended() == 0
        assert served.log == ""


async def test_for_a_while_it_says_that_it_is_ending_and_takes_requests(lab: Lab) -> None:
    node = await lab.node()
    for workers_ in ("1", "2"):
        arguments = ("--config", config(lab, node, more="drain_delay_s = 2.0\n"), "--workers", workers_)
        async with serving(lab.folder, *arguments) as served:
            await served.ready()
            assert await health(served.address) == "SERVING"
            served.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            while await health(served.address) == "SERVING":
                assert time.monotonic() - start < 2.0
            assert await served.call() == "a"
            assert await served.ended() == 0
            assert time.monotonic() - start >= 1.9
            assert served.log == ""


async def health(address: str) -> str:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


# Workers


@contextlib.asynccontextmanager
async def workers(lab: Lab, *nodes: Any, count: int = 2, more: str = "") -> AsyncIterator[tuple[Served, list[str]]]:
    """Workers that serve, and the address of each, in the order of `Served.children`, of which the last is a spare."""
    async with serving(lab.folder, "--config", config(lab, *nodes, more=more), "--workers", str(count)) as served:
        await served.ready()
        said = sorted(line for line in served.lines if re.fullmatch(r"worker \d+: serving on \S+:\d+", line))
        own = [line.split()[-1] for line in said]
        assert len(own) == count
        await lab.until(lambda: len(served.children()) == count + 1)
        yield served, own


async def test_workers_share_the_port_and_have_addresses_of_their_own(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    async with workers(lab, node) as (served, own):
        assert len({*own, served.address}) == 3
        assert [line for line in served.lines if line.startswith("serving on")] == [f"serving on {served.address}"]
        pids = served.children()
        calls = [asyncio.ensure_future(served.call()) for _ in range(10)]
        calls += [asyncio.ensure_future(call(address)) for address in own]
        await lab.until(lambda: node.count == 12)
        node.release.set()
        assert set(await asyncio.gather(*calls)) == {"a"}
        assert await served.end() == 0
        assert not any(alive(pid) for pid in pids)


async def test_each_worker_has_an_http_port_of_its_own(lab: Lab) -> None:
    first = two_free_ports()
    path = config(lab, await lab.node(), more=f"http_port = {first}\n")
    async with serving(lab.folder, "--config", path, "--workers", "2") as served:
        await served.ready()
        said = [line for line in served.lines if " http on " in line]
        assert sorted(said) == [f"worker {index}: http on http://127.0.0.1:{first + index}" for index in (0, 1)]
        assert await served.end() == 0
        assert served.log == ""


async def test_each_worker_has_a_socket_of_its_own(lab: Lab) -> None:
    with tempfile.TemporaryDirectory(prefix="dl-", dir="/tmp") as folder:
        path = config(lab, await lab.node(), more=f'socket_path = "{folder}/s"\n')
        for count, names in ((2, ["s-0", "s-1"]), (1, ["s"])):
            async with serving(lab.folder, "--config", path, "--workers", str(count)) as served:
                await served.ready()
                assert sorted(os.listdir(folder)) == names  # noqa: PTH208
                assert [await call(f"unix:{folder}/{name}") for name in names] == ["a"] * count
                said = sorted(line for line in served.lines if "socket " in line)
                assert [line.split()[-1] for line in said] == [f"{folder}/{name}" for name in names]
                assert await served.end() == 0
            assert os.listdir(folder) == []  # noqa: PTH208


def two_free_ports() -> int:
    """The first of two that follow each other."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port


async def test_a_worker_that_is_killed_is_started_again_with_its_address(lab: Lab) -> None:
    async with workers(lab, await lab.node()) as (served, own):
        victim, other, spare = served.children()
        os.kill(victim, signal.SIGKILL)
        said = await served.said(r"worker \d: serving on \S+")
        assert said.split()[-1] in own
        assert [await call(address) for address in own] == ["a", "a"]
        await lab.until(lambda: len(served.children()) == 3)
        assert served.children()[:2] == [other, spare]
        assert re.search(r"worker \d ended with exit status -9; it is started again in 0\.1 s", served.log)
        assert [await served.call() for _ in range(8)] == ["a"] * 8
        assert await served.end() == 0


async def test_a_worker_that_hangs_is_killed_and_started_again(lab: Lab) -> None:
    async with workers(lab, await lab.node(), more="hang_s = 2.0\n") as (served, own):
        victim, other, spare = served.children()
        os.kill(victim, signal.SIGSTOP)
        said = await served.said(r"worker \d: serving on \S+")
        assert said.split()[-1] in own
        hangs = rf"worker 0 \(process {victim}\) hangs: no sign of life .* for \d+\.\d s; it is killed\n"
        assert re.search(
            rf"{hangs}.*worker 0 ended with exit status -9; it is started again in 0\.1 s", served.log, re.DOTALL
        )
        assert not alive(victim)
        assert served.children()[:2] == [other, spare]
        assert [await call(address) for address in own] == ["a", "a"]
        assert await served.end() == 0


async def test_a_worker_is_replaced_even_if_the_spare_has_died_too(lab: Lab) -> None:
    async with workers(lab, await lab.node()) as (served, own):
        victim, other, spare = served.children()
        for pid in (spare, victim):
            os.kill(pid, signal.SIGKILL)
        said = await served.said(r"worker \d: serving on \S+")
        assert said.split()[-1] in own
        assert served.children()[0] == other
        assert [await call(address) for address in own] == ["a", "a"]
        assert await served.end() == 0


async def test_workers_are_not_taken_to_hang_after_all_stood_still(lab: Lab) -> None:
    async with workers(lab, await lab.node(), more="hang_s = 1.0\n") as (served, _):
        pids = [served.process.pid, *served.children()]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
            await asyncio.sleep(1.5)
        assert served.log == ""
        assert served.children() == pids[1:]
        assert await served.end() == 0


async def test_what_a_worker_learned_of_a_node_survives_it(lab: Lab) -> None:
    a, b = await lab.nodes("ab", hangs=True)
    a.hangs = False
    health = "[gateway.health]\ninterval_ms = 0\n"  # what requests meet is all that is known
    async with workers(lab, a, b, more=health) as (served, own):
        b.health = b.status = lab.error(Code.UNAVAILABLE)
        b.hangs = False
        for _ in range(20):
            assert await call(own[0]) == "a"
        count = b.count
        assert count
        os.kill(served.children()[0], signal.SIGKILL)
        assert await call(own[1]) == "a"
        await served.said(r"worker \d: serving on \S+")
        for address in own * 5:
            assert await call(address) == "a"
        assert b.count == count
        assert await served.end() == 0


async def test_workers_end_when_their_supervisor_is_killed(lab: Lab) -> None:
    async with workers(lab, await lab.node()) as (served, own):
        pids = served.children()
        served.process.kill()
        await served.process.wait()
        await lab.until(lambda: not any(alive(pid) for pid in pids), 10)
        for address in own:
            await refused(address)


async def test_sigterm_finishes_what_workers_have_in_flight(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    async with workers(lab, node) as (served, _):
        pids = served.children()
        calls = [asyncio.ensure_future(served.call()) for _ in range(12)]
        await lab.until(lambda: node.count == 12)
        served.process.send_signal(signal.SIGTERM)
        await refused(served.address)
        node.release.set()
        assert await asyncio.gather(*calls) == ["a"] * 12
        assert await served.ended() == 0
        assert not any(alive(pid) for pid in pids)


async def test_sigterm_before_workers_serve_ends_them_all(lab: Lab) -> None:
    node = await lab.node()
    await node.stop()
    async with serving(lab.folder, "--config", config(lab, node), "--workers", "2") as served:
        await lab.until(lambda: served.log.count("not serving yet") == 2, 20)
        pids = served.children()
        assert await served.end() == 0
        assert len(pids) == 2
        assert not any(alive(pid) for pid in pids)


async def test_workers_that_cannot_start_end_it_with_exit_code_2(lab: Lab) -> None:
    path = config(lab, await lab.node())
    path.write_text(path.read_text() + 'balancer = "none"\n')
    async with serving(lab.folder, "--config", path, "--workers", "2") as served:
        assert await served.ended() == 2
        assert served.lines == []
        *_, last = served.log.splitlines()
        assert re.fullmatch(r"error: worker \d could not start \(exit status 2\)", last)
        assert 'error: route m: balancer names the balancer "none"' in served.log
