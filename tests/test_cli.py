from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import grpc
import grpc.aio
import pytest
import trustme
from click.testing import CliRunner, Result
from grpc_health.v1 import health_pb2, health_pb2_grpc

import dl_inference_core
from dl_inference_core.cli import main
from dl_inference_core.errors import Code
from dl_inference_core.testing import FakeBackend
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
    assert re.search(r'\n"auto" in a config is the transport \w+ and the codec \w+ here\n$', result.output)
    rows = json.loads(run("plugins", "--json").output)
    core = next(row for row in rows if row["name"] == "core")
    assert core["provides"]["transports"] == ["grpcio"]
    assert core["error"] == ""
    assert set(core) == {"name", "distribution", "version", "provides", "described", "commands", "error"}
    assert "\n  command   bench\n  command   tune\n" in result.output
    assert next(row for row in rows if row["name"] == "tools")["commands"] == ["bench", "tune"]
    described = next(row for row in rows if row["name"] == "balancers")["described"]["balancers"]
    assert described["dynamic_weighted_round_robin"]["options"] == {"scale": 100}
    assert all(each["purpose"] for each in described.values())


@pytest.mark.parametrize(
    "source",
    [
        "raise OSError('libfoo.so is missing')",
        "from dl_inference_core.hookspecs import hookimpl\n"
        "print('hello')\n@hookimpl\ndef dl_inference_register_commands(): raise OSError('libfoo.so is missing')",
    ],
    ids=["its module", "its hook"],
)
def test_a_broken_plugin_breaks_no_command_but_its_own(tmp_path: Path, source: str) -> None:
    about = tmp_path / "broken-1.dist-info"
    about.mkdir()
    (tmp_path / "broken.py").write_text(source)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[dl_inference_core]\nbroken = broken\n")

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dl_inference_core.cli", *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    help_ = ask("--help")
    assert help_.returncode == 0
    assert help_.stdout.startswith("Usage: ")
    assert "  bench " in help_.stdout
    assert "  serve " in help_.stdout
    assert ask("bench", "--help").returncode == 0
    unknown = ask("unknown")
    assert unknown.returncode == 2
    assert "No such command 'unknown'" in unknown.stderr
    assert "OSError: libfoo.so is missing" in unknown.stderr
    assert "OSError: libfoo.so is missing" in ask("plugins").stdout


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
    "an unknown codec": ('codec = "none"\n' + ROUTE, 'codec names the codec "none"'),
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


@pytest.mark.parametrize(
    "command",
    [
        ["tune", ".", "--p99"],
        ["tune", ".", "--p99", "1s", "--budget"],
        ["bench", "127.0.0.1:1", "--duration"],
        ["bench", "127.0.0.1:1", "--warm-up"],
        ["bench", "127.0.0.1:1", "--timeout"],
        ["predict", "m", "--timeout"],
    ],
)
@pytest.mark.parametrize(
    ("duration", "said"),
    [
        ("20", '"20" has no unit; write 20ms, 20s, 20m (minutes) or 20h'),
        ("1.5", '"1.5" has no unit; write 1.5ms'),
        ("20 s", '"20 s" is not a duration; expected a number with the unit ms, s, m (minutes) or h'),
        ("2d", '"2d" is not a duration'),
    ],
)
def test_a_duration_takes_a_unit(command: list[str], duration: str, said: str) -> None:
    result = run(*command, duration)
    assert result.exit_code == 2
    assert said in re.sub(r"\s*\n\s*", " ", result.stderr)


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


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('[tls]\ncertificate = "none.pem"\nkey = "none.key"\n', "[tls]"),
        ('[gateway.tls]\nca = "none.pem"\n', "none.pem"),
        ('[join]\ngateways = ["127.0.0.1:1"]\ntoken_file = "token"\n[join.tls]\nca = "none.pem"\n', "[join.tls]"),
        ('[join]\ngateways = ["127.0.0.1:1"]\ntoken_file = "none.pem"\n', "none.pem"),
        ('[gateway.registry]\ntoken_file = "none.pem"\n', "none.pem"),
    ],
)
def test_check_reads_the_files_of_tls_and_of_tokens(tmp_path: Path, table: str, said: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "token").write_text("secret")
    (tmp_path / "server.toml").write_text(f'transport = "grpcio"\n[models]\ndirectory = "models"\n{table}')
    result = run("check", "--config", tmp_path / "server.toml")
    assert result.exit_code == 2
    assert said in result.output
    assert f"{tmp_path / 'none.pem'}: No such file or directory" in result.output


def test_check_says_that_the_files_of_tls_can_be_used(tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("localhost")
    (tmp_path / "models").mkdir()
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    (tmp_path / "server.toml").write_text(
        'transport = "grpcio"\n[models]\ndirectory = "models"\n[tls]\ncertificate = "cert.pem"\nkey = "key.pem"\n'
    )
    result = run("check", "--config", tmp_path / "server.toml", "--json")
    row = next(row for row in json.loads(result.stdout) if row["kind"] == "tls")
    assert row == {"kind": "tls", "name": "[tls]", "ok": True, "detail": "its files can be used"}


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("empty", "it holds no models"),
        ("models/digits", "it looks like the folder of one model"),
        ("models/digits/1", "it holds the files of one version of a model"),
    ],
)
@pytest.mark.usefixtures("fakes")
def test_check_says_that_a_folder_is_not_one_of_models(tmp_path: Path, folder: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    FakeBackend.write(tmp_path / "models" / "digits" / "1")
    result = run("check", tmp_path / folder, "--json")
    assert result.exit_code == 2
    row = next(row for row in json.loads(result.stdout) if row["kind"] == "folder")
    assert (row["name"], row["ok"]) == (str(tmp_path / folder), False)
    assert row["detail"].startswith(said)


@pytest.mark.usefixtures("fakes")
def test_check_says_that_a_label_leads_nowhere(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "models" / "m" / "1")
    (tmp_path / "models" / "m" / "model.toml").write_text("version_labels = {stable = 1, canary = 2}\n")
    result = run("check", tmp_path / "models", "--json")
    assert result.exit_code == 2
    good, bad = (row for row in json.loads(result.stdout) if row["kind"] == "model")
    assert (good["name"], good["ok"]) == ("m/1", True)
    assert (bad["name"], bad["ok"]) == ("m", False)
    assert bad["detail"].startswith('version_labels: "canary" is version 2; expected versions that are loaded')


def test_predict_says_why_nobody_answered() -> None:
    result = run("predict", "m", "--text", "a", "--address", "127.0.0.1:1", "--timeout", "5s")
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


class Process:
    """A process in a session of its own.

    `subprocess` starts it by vfork: asyncio on uvloop forks, and runs Python's hooks in the child.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], stderr: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.kill = self._process.kill
        self.send_signal = self._process.send_signal

    async def read_line(self) -> bytes:
        """The next line of stdout; b"" at its end."""
        assert self._process.stdout is not None
        return await asyncio.to_thread(self._process.stdout.readline)

    async def wait(self) -> int:
        return await asyncio.to_thread(self._process.wait)

    async def close(self) -> None:
        """Call it once the process and its children were killed."""
        await asyncio.to_thread(self._process.communicate)


class Served:
    """A `dl-inference-core serve` of its own."""

    def __init__(self, process: Process, log: Path) -> None:
        self.process = process
        self.lines: list[str] = []
        self.address = ""
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    async def said(self, pattern: str, within_s: float = 120) -> str:
        """The next line on stdout that fits."""
        async with asyncio.timeout(within_s):
            while raw := await self.process.read_line():
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
        async with asyncio.timeout(60):
            while raw := await self.process.read_line():
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
async def serving(
    folder: Path, *arguments: str | Path, command: str = "serve", **environment: str
) -> AsyncIterator[Served]:
    log = folder / "stderr"
    with log.open("wb") as file:
        process = Process(
            [sys.executable, "-m", "dl_inference_core.cli", command, *map(str, arguments)],
            {**os.environ, **environment},
            file,
        )
    try:
        yield Served(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.close()


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
        name, _ = lab.plugins.choose_transport("auto")
        assert served.lines[1] == f"transport {name}: the installed transport with the highest priority"
        assert served.log == ""


@pytest.mark.parametrize("host", ["::1", "[::1]"])
@pytest.mark.parametrize("workers_", [1, 2])
async def test_an_ipv6_host_is_taken_with_and_without_brackets(lab: Lab, host: str, workers_: int) -> None:
    arguments = ("--config", config(lab, await lab.node()), "--host", host, "--workers", str(workers_))
    async with serving(lab.folder, *arguments, "--http-port", str(two_free_ports("::1"))) as served:
        await served.ready()
        assert re.fullmatch(r"\[::1\]:\d+", served.address)
        assert await served.call() == "a"
        said = next(line for line in served.lines if "http on " in line)
        port = re.fullmatch(r"(worker [01]: )?http on http://\[::1\]:(\d+)", said)
        assert port is not None
        _, writer = await asyncio.open_connection("::1", int(port[2]))
        writer.close()
        assert await served.end() == 0
        assert served.log == ""


async def test_it_says_so_only_when_requests_would_succeed(lab: Lab) -> None:
    node = await lab.node()
    await node.stop()
    async with serving(lab.folder, "--config", config(lab, node)) as served, asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(served.ready())
        await lab.until(lambda: "not serving yet: no node of any route answers" in served.log, 60)
        assert not reading.done()
        await node.start()
        await reading
        assert await served.call() == "a"
        assert await served.end() == 0


async def test_it_ends_on_sigterm_before_it_serves(lab: Lab) -> None:
    node = await lab.node()
    await node.stop()
    async with serving(lab.folder, "--config", config(lab, node)) as served:
        await lab.until(lambda: "not serving yet" in served.log, 60)
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
    async with asyncio.timeout(60):
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


@pytest.mark.parametrize("named_by", ["our config", "a model_config_file"])
async def test_workers_that_serve_models_have_no_spare(tmp_path: Path, site_with_fakes: Path, named_by: str) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    named = f'config {{ name: "m" base_path: "{tmp_path / "m"}" }}'
    (tmp_path / "models.config").write_text(f"model_config_list {{ {named} }}")
    ours, theirs = '[models.named.m]\npath = "m"\n', '[apis.tfserving]\nmodel_config_file = "models.config"\n'
    file = tmp_path / "server.toml"
    file.write_text(f'port = 0\ntransport = "grpcio"\n{ours if named_by == "our config" else theirs}')
    async with serving(tmp_path, "--config", str(file), "--workers", "2", PYTHONPATH=str(site_with_fakes)) as served:
        await served.ready()
        await asyncio.sleep(0.5)  # a spare is started as soon as all workers serve
        assert len(served.children()) == 2
        assert await served.end() == 0


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


def two_free_ports(host: str = "127.0.0.1") -> int:
    """The first of two that follow each other."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = free_port()
        with (
            contextlib.suppress(OSError),
            socket.create_server((host, port), family=family),
            socket.create_server((host, port + 1), family=family),
        ):
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
        await lab.until(lambda: served.log.count("not serving yet") == 2, 60)
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


SAID = ("the handler speaks", "the handler mumbles", 'model "m" version 1 loaded')
SAYS = """
import logging
from dl_inference_core.node.handling import Handler

class Says(Handler):
    def load(self, model, directory):
        logging.info("the handler speaks")
        logging.debug("the handler mumbles")
        logging.getLogger("torch").info("a library speaks")
"""


@pytest.mark.parametrize(
    ("command", "level", "expected"),
    [
        (["check", "MODELS"], None, set()),
        (["check", "MODELS"], "error", set()),
        (["check", "MODELS"], "DEBUG", set(SAID)),
        (["serve", "--config", "CONFIG"], "info", {SAID[0], SAID[2]}),
        (["serve", "--config", "CONFIG", "--workers", "2"], "info", {SAID[0], SAID[2]}),
        (
            ["tfserving", "--model_base_path=MODELS/m", "--model_name=m", "--port=0", "--transport=grpcio"],
            "info",
            {SAID[0], SAID[2]},
        ),
    ],
)
async def test_a_handlers_log_lines_are_written_from_the_level_that_is_asked_for(
    tmp_path: Path, site_with_fakes: Path, command: list[str], level: str | None, expected: set[str]
) -> None:
    models, file = tmp_path / "models", tmp_path / "server.toml"
    (FakeBackend.write(models / "m" / "1", factor=1) / "handler.py").write_text(SAYS)
    file.write_text(f'port = 0\ntransport = "grpcio"\n[models]\ndirectory = "{models}"\n')
    words = [word.replace("MODELS", str(models)).replace("CONFIG", str(file)) for word in command]
    words += [] if level is None else ["--log-level", level]
    async with serving(tmp_path, *words[1:], command=words[0], PYTHONPATH=str(site_with_fakes)) as served:
        if words[0] == "check":
            assert await served.ended() == 0
        else:
            await served.ready()
        assert {line for line in SAID if line in served.log} == expected, served.log
        assert "a library speaks" not in served.log


BAD_BACKENDS = """
from pydantic import Field
from dl_inference_core.config import PluginOptions
from dl_inference_core.hookspecs import hookimpl
from dl_inference_core.testing import FakeBackend

class Raises(FakeBackend):
    name = "raises"
    class Options(PluginOptions):
        size: int = Field(default_factory=lambda: print("which is not part of the list") or 1, ge=1)
    def __init__(self, options):
        raise OSError("no such device")
    @classmethod
    def recognises(cls, directory):
        raise ValueError("cannot look")

class Abstract(FakeBackend.__base__):
    name = "abstract"

class Nameless(FakeBackend):
    pass

@hookimpl
def dl_inference_register_backends():
    return [Raises, Abstract, Nameless]
"""


@pytest.fixture
def fakes(site_with_fakes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plugin with `FakeBackend`."""
    monkeypatch.syspath_prepend(str(site_with_fakes))
    yield
    sys.modules.pop("fakes", None)


@pytest.fixture
def bad_backends(site_with_fakes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Beside the plugin with `FakeBackend`, one with `BAD_BACKENDS` that is found before it."""
    about = site_with_fakes / "a_bad-1.dist-info"
    about.mkdir()
    (site_with_fakes / "a_bad.py").write_text(BAD_BACKENDS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: a-bad\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[dl_inference_core]\na_bad = a_bad\n")
    monkeypatch.syspath_prepend(str(site_with_fakes))
    yield
    for name in ("fakes", "a_bad"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("bad_backends")
def test_a_backend_that_cannot_be_made_stops_only_the_models_that_need_it(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "models" / "good" / "1", factor=1)
    for name in ("raises", "abstract"):
        FakeBackend.write(tmp_path / "models" / name / "1", factor=1)
        (tmp_path / "models" / name / "model.toml").write_text(f'backend = "{name}"\n')
    result = run("check", tmp_path / "models", "--json")
    assert result.exit_code == 2
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["good/1"]["ok"], rows
    made = 'plugin "a_bad" of a-bad 1 cannot make the backend "raises": OSError: no such device'
    assert made in rows["raises/1"]["detail"]
    assert 'no backend has the name "abstract"' in rows["abstract/1"]["detail"]


@pytest.mark.usefixtures("bad_backends")
@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            "[backends.raises]\nsize = 0\n",
            "[backends.raises]: options of backend raises: size: Input should be greater",
        ),
        ("[backends.raises]\nsice = 1\n", '[backends.raises]: options of backend raises: unknown key "sice"'),
        ("[backends.abstract]\n", 'names the backend "abstract", which no installed plugin provides'),
    ],
)
def test_the_options_of_a_backend_are_refused_at_the_start_though_no_model_needs_it(
    tmp_path: Path, table: str, said: str
) -> None:
    FakeBackend.write(tmp_path / "models" / "good" / "1", factor=1)
    (tmp_path / "server.toml").write_text(f'transport = "grpcio"\n[models]\ndirectory = "models"\n{table}')
    result = run("serve", "--config", tmp_path / "server.toml")
    assert result.exit_code == 2
    assert said in result.stderr


HANDLER = """
from dl_inference_core.node.handling import Handler

class Own(Handler):
    def preprocess(self, request):
        {body}
"""


@pytest.mark.usefixtures("bad_backends")
def test_check_runs_handlers_on_samples(tmp_path: Path) -> None:
    bodies = {
        "short": 'return {"tokens": [[1] * 8]}',
        "strict": 'raise ValueError("expected a picture")',
        "well": 'print("which is not part of the list"); return {"tokens": [[1] * 16]}',
    }
    for name, body in bodies.items():
        folder = FakeBackend.write(tmp_path / "models" / name / "1", inputs={"tokens": ["int64", [None, 16]]})
        (folder / "handler.py").write_text(HANDLER.format(body=body))
    result = run("check", tmp_path / "models", "--json")
    assert result.exit_code == 2
    rows = {row["name"]: (row["ok"], row["detail"]) for row in json.loads(result.stdout)}
    ok, detail = rows["short/1"]
    assert not ok
    assert "handler class Own fails for a sample of tensors; because of ValueError: preprocess returned" in detail
    ok, detail = rows["strict/1"]
    assert ok
    assert "handler class Own was not tried, it takes none of the samples (tensors: ValueError: expected a" in detail
    assert rows["well/1"] == (True, 'fake, inputs: "tokens" (int64, [?, 16])')


@pytest.mark.usefixtures("bad_backends")
def test_plugins_lists_what_cannot_be_used_and_why() -> None:
    result = run("plugins")
    assert result.exit_code == 0
    assert "backend class Abstract is abstract: it does not define load, recognises" in result.stdout
    assert 'backend class Nameless has no `name` of its own (it inherits "fake")' in result.stdout
    assert "  backend   raises" in result.stdout
    assert "which is not part of the list" not in result.stdout
    (row,) = [row for row in json.loads(run("plugins", "--json").stdout) if row["name"] == "a_bad"]
    assert row["described"]["backends"]["raises"]["options"] == {"size": 1}


# SIGHUP


@pytest.mark.parametrize("workers", [1, 2])
async def test_sighup_has_a_node_look_for_new_versions_where_nothing_is_polled(
    tmp_path: Path, site_with_fakes: Path, workers: int
) -> None:
    file, models = tmp_path / "server.toml", tmp_path / "models"
    content = f'port = 0\ntransport = "grpcio"\n[models]\ndirectory = "{models}"\npoll_interval_ms = 0\n'
    file.write_text(content)
    FakeBackend.write(models / "m" / "1")
    arguments = ("--config", file, "--workers", workers, "--log-level", "info")
    async with serving(tmp_path, *arguments, PYTHONPATH=str(site_with_fakes)) as served:
        await served.ready()
        file.write_text(f"{content}load_reports_per_s = 7\n")
        for version in (2, 3):
            FakeBackend.write(models / "m" / str(version))
            served.process.send_signal(signal.SIGHUP)
            await until(lambda: served.log.count(f'model "m" version {version} loaded') == workers)  # noqa: B023
        assert f"{file}: models.load_reports_per_s: changes take effect at the next start" in served.log
        for worker in served.children() if workers > 1 else ():
            os.kill(worker, signal.SIGHUP)
        FakeBackend.write(models / "m" / "4")
        served.process.send_signal(signal.SIGHUP)
        await until(lambda: served.log.count('model "m" version 4 loaded') == workers)
        assert "exit status" not in served.log
        assert await served.end() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_sighup_has_a_gateway_look_at_its_files(lab: Lab, workers: int) -> None:
    nodes = await lab.nodes("ab")
    path = config(lab, nodes[0])
    path.write_text(f"{path.read_text()}\n[gateway]\npoll_interval_ms = 3600000\n")
    async with serving(lab.folder, "--config", path, "--workers", str(workers)) as served:
        await served.ready()
        assert await served.call() == "a"
        path.write_text(path.read_text().replace(nodes[0].address, nodes[1].address))
        served.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(60):
            while {await served.call() for _ in range(8)} != {"b"}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await served.end() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_sighup_before_it_serves_does_not_end_it(lab: Lab, workers: int) -> None:
    node = await lab.node()
    await node.stop()
    async with serving(lab.folder, "--config", config(lab, node), "--workers", str(workers)) as served:
        await lab.until(lambda: served.log.count("not serving yet") == workers, 60)
        for _ in range(3):
            served.process.send_signal(signal.SIGHUP)
        await node.start()
        await served.ready()
        assert await served.call() == "a"
        assert "exit status" not in served.log
        assert await served.end() == 0


async def test_sighup_has_tfserving_look_for_models_and_versions(tmp_path: Path, site_with_fakes: Path) -> None:
    file = tmp_path / "models.config"

    def write(*names: str) -> None:
        listed = " ".join(f'config {{ name: "{name}" base_path: "{tmp_path / name}" }}' for name in names)
        file.write_text(f"model_config_list {{ {listed} }}")

    FakeBackend.write(tmp_path / "one" / "1")
    FakeBackend.write(tmp_path / "two" / "1")
    write("one")
    arguments = ("--port=0", "--transport=grpcio", f"--model_config_file={file}", "--file_system_poll_wait_seconds=0")
    async with serving(
        tmp_path, *arguments, "--log_level=info", command="tfserving", PYTHONPATH=str(site_with_fakes)
    ) as served:
        await served.ready()
        write("one", "two")
        FakeBackend.write(tmp_path / "one" / "2")
        served.process.send_signal(signal.SIGHUP)
        await until(lambda: 'model "two" version 1 loaded' in served.log)
        await until(lambda: 'model "one" version 2 loaded' in served.log)
        assert await served.end() == 0


async def until(what: Callable[[], Any], within_s: float = 60) -> None:
    async with asyncio.timeout(within_s):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
