"""Processes that a handler starts, in each way that there is, in services of their own."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_inference_core import children
from dl_inference_core.children import OwnSockets
from dl_inference_core.client import Client
from dl_inference_core.errors import InferenceError
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.loopback import free_port

HANDLER = '''
import atexit, json, multiprocessing, os, pty, select, signal, socket, subprocess, sys, time
from pathlib import Path

import numpy as np

from dl_inference_core.node.handling import Handler

FOLDER = Path({folder!r})
# What a child finds: handlers of signals, the descriptor that they write to, and its TCP and Unix-domain sockets.
LOOK = """
import json, os, signal, socket
def look():
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            name = os.readlink(f"/proc/self/fd/{{number}}")
            if not name.startswith("socket:"):
                continue
            each = socket.socket(fileno=number)
        except OSError:
            continue
        found.append(str(each.getsockname()))
        each.detach()
    return {{
        "signals": [repr(signal.getsignal(each)) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "blocked": [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "wakes": signal.set_wakeup_fd(-1),
        "sockets": found,
    }}
def report():
    print(json.dumps(look()), flush=True)
"""
exec(LOOK)


def tell(end):
    os.write(end, json.dumps(look()).encode())


def read(end):
    text = b""
    while True:
        try:
            chunk = os.read(end, 65536)
        except OSError:  # a terminal whose other end is closed
            break
        if not chunk:
            break
        text += chunk
    os.close(end)
    return text.decode()


def by_fork():
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        tell(writing)
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    return read(reading)


def by_forkpty():
    pid, terminal = pty.fork()
    if not pid:
        report()
        os._exit(0)
    text = read(terminal)
    os.waitpid(pid, 0)
    return text


def by_multiprocessing(method):
    receiving, sending = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context(method).Process(target=send, args=(sending,))
    child.start()
    child.join()
    return receiving.recv()


def send(sending):
    sending.send(json.dumps(look()))


def by_program(**how):
    return subprocess.run([sys.executable, "-c", LOOK + "report()"], capture_output=True, text=True, **how).stdout


def by_posix_spawn():
    reading, writing = os.pipe()
    move = [(os.POSIX_SPAWN_DUP2, writing, 1)]
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", LOOK + "report()"], os.environ, file_actions=move)
    os.close(writing)
    os.waitpid(pid, 0)
    return read(reading)


def own_sockets():
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as one:
        accepted, _ = listening.accept()
        with accepted:
            names = [str(each.getsockname()) for each in (listening, one, accepted)]
            return json.dumps({{"own": names, **json.loads(by_fork())}})


def ended_at_once():
    """How many of 50 children that are told to end before they can have begun do so by the signal."""
    ended = 0
    for _ in range(50):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(20)
        ended += child.exitcode == -signal.SIGTERM
        child.kill()
    return str(ended)


def pool():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return str(pool.map(abs, [-1, -2, -3]))


def raised():
    raise ValueError("in the child")


def ended(leave):
    """The exit status of a child that leaves by `leave`."""
    pid = os.fork()
    if not pid:
        atexit.register((FOLDER / "exit handlers").touch)
        leave()
        return "came back"
    return str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def staying():
    """A child that stays for a minute, whatever becomes of its parent."""
    pid = os.fork()
    if not pid:
        os.setsid()
        for number in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        time.sleep(60)
        os._exit(0)
    return str(pid)


WAYS = {{
    "fork": by_fork,
    "forkpty": by_forkpty,
    "multiprocessing fork": lambda: by_multiprocessing("fork"),
    "multiprocessing forkserver": lambda: by_multiprocessing("forkserver"),
    "multiprocessing spawn": lambda: by_multiprocessing("spawn"),
    "subprocess": by_program,
    "subprocess, descriptors open": lambda: by_program(close_fds=False),
    "subprocess, a function before": lambda: by_program(close_fds=False, preexec_fn=os.setsid),
    "posix_spawn": by_posix_spawn,
    "own sockets": own_sockets,
    "ended at once": ended_at_once,
    "pool": pool,
    "_exit(3)": lambda: ended(lambda: os._exit(3)),
    "exit(4)": lambda: ended(lambda: sys.exit(4)),
    "exit()": lambda: ended(sys.exit),
    "exit(text)": lambda: ended(lambda: sys.exit("text")),
    "return": lambda: ended(lambda: None),
    "raise": lambda: ended(raised),
    "staying": staying,
    "pid": lambda: str(os.getpid()),
}}


class Forks(Handler):
    def preprocess(self, request):
        self.said = WAYS[request.payload]()
        return {{"x": np.zeros((1, 1), np.float32)}}

    def load(self, model, directory):
        self.pid = os.getpid()

    def run_model(self, model, inputs, request):
        if os.getpid() != self.pid:
            (FOLDER / "model ran in a child").touch()
        return super().run_model(model, inputs, request)

    def postprocess(self, outputs, request):
        return self.said
'''


class Service:
    """A `serve` of its own, and what it has said."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], port: int, http_port: int) -> None:
        self.folder = folder
        self.process = process
        self.port = port
        self.http_port = http_port
        self.socket_path = folder / "socket"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ask(self, way: str, timeout_s: float = 40) -> Any:
        """What the handler answers."""
        with Client(self.address, timeout_s=timeout_s) as client:
            return client.predict("m", way).payload

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


@contextmanager
def served(folder: Path, site: Path, *, workers: int = 1, ports: tuple[int, int] | None = None) -> Iterator[Service]:
    """A node with the handler, on a port, an HTTP port and a socket."""
    (FakeBackend.write(folder / "models" / "m" / "1") / "handler.py").write_text(HANDLER.format(folder=str(folder)))
    port, http_port = ports or (free_port(), free_port())
    file = folder / "server.toml"
    file.write_text(
        f'port = {port}\nhttp_port = {http_port}\nsocket_path = "socket"\ntransport = "grpcio"\nworkers = {workers}\n'
        '[models]\ndirectory = "models"\n'
    )
    with running(folder, site, "serve", "--config", file) as process:
        yield Service(folder, process, port, http_port)


@contextmanager
def running(folder: Path, site: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the command line that serves; its output is in `folder`/log."""
    log = folder / "log"
    command = [sys.executable, "-m", "dl_inference_core.cli", *map(str, arguments)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(site), "PYTHONUNBUFFERED": "1"},
        )
    try:
        wait_for(lambda: re.search(r"^serving on", log.read_text(), re.MULTILINE) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(what: Callable[[], Any], within_s: float = 180) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "worker"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("node")
    site = folder / "site"
    about = site / "fakes-1.dist-info"
    about.mkdir(parents=True)
    (site / "fakes.py").write_text(
        "from dl_inference_core.hookspecs import hookimpl\nfrom dl_inference_core.testing import FakeBackend\n"
        "@hookimpl\ndef dl_inference_register_backends():\n    return [FakeBackend]\n"
    )
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fakes\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[dl_inference_core]\nfakes = fakes\n")
    with served(folder, site, workers=request.param) as service:
        pid = service.ask("pid")
        yield service
        assert service.ask("pid") == pid or request.param == 2
        assert "exit status" not in service.log, "a worker has ended"
        assert service.end() == 0


@pytest.mark.parametrize(
    "way",
    [
        "fork",
        "forkpty",
        "multiprocessing fork",
        "multiprocessing forkserver",
        "multiprocessing spawn",
        "subprocess",
        "subprocess, descriptors open",
        "subprocess, a function before",
        "posix_spawn",
    ],
)
def test_a_child_has_default_signal_handlers_and_none_of_the_services_sockets(node: Service, way: str) -> None:
    with (
        socket.create_connection(("127.0.0.1", node.http_port)),
        Client(f"unix:{node.socket_path}{'-0' if len(workers_of(node)) else ''}") as beside,
    ):
        assert beside.predict("m", "pid").payload
        found = json.loads(node.ask(way))
    assert found["signals"][0] == found["signals"][2] == "<Handlers.SIG_DFL: 0>"
    # "forkserver" and "spawn" have children that begin as Python itself does.
    assert found["signals"][1] == "<built-in function default_int_handler>"
    assert found["blocked"] == []
    assert found["wakes"] == -1
    assert [name for name in found["sockets"] if name != "" and "AF_UNIX" not in name] == []


def workers_of(node: Service) -> list[int]:
    pid = node.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_handlers_own_sockets_stay_open_in_its_children(node: Service) -> None:
    found = json.loads(node.ask("own sockets"))
    assert set(found["own"]) <= set(found["sockets"])


def test_a_signal_to_a_child_ends_the_child_alone_however_early_it_comes(node: Service) -> None:
    assert node.ask("ended at once") == "50"
    assert node.ask("pool") == "[1, 2, 3]"
    assert node.ask("pid")


@pytest.mark.parametrize(
    ("way", "status", "said"),
    [
        ("_exit(3)", "3", ""),
        ("exit(4)", "4", ""),
        ("exit()", "0", ""),
        ("exit(text)", "1", "text"),
        (
            "return",
            "1",
            "forked by a handler or plugin, came back from it and is ended; expected it to call os._exit",
        ),
        ("raise", "1", "ValueError: in the child"),
    ],
)
def test_a_child_that_leaves_the_handler_ends_and_takes_nothing_down(
    node: Service, way: str, status: str, said: str
) -> None:
    before = len(node.log)
    assert node.ask(way) == status
    assert said in node.log[before:]
    assert not (node.folder / "exit handlers").exists()
    assert not (node.folder / "model ran in a child").exists()
    assert list(node.folder.glob("socket*"))
    assert node.ask("pid")


def test_a_child_that_outlives_the_service_holds_neither_port_nor_connections(
    tmp_path: Path, site_with_fakes: Path
) -> None:
    children = []
    try:
        with served(tmp_path, site_with_fakes, workers=2) as service:
            client = socket.create_connection(("127.0.0.1", service.http_port))
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok\n"):
                answer += client.recv(1000)
            children += {int(service.ask("staying")) for _ in range(6)}
            pids = [service.process.pid, *workers_of(service)]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            assert select.select([client], [], [], 10)[0], "nobody has closed the connection"
            assert client.recv(1000) == b""
            client.close()
            ports = service.port, service.http_port
        for child in children:
            os.kill(child, 0)
        with served(tmp_path, site_with_fakes, workers=2, ports=ports) as service:
            assert service.ask("pid")
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


BALANCER = """
import os, sys, time
from dl_inference_core.gateway.balancing import RoundRobin
from dl_inference_core.hookspecs import hookimpl

class Forks(RoundRobin):
    name = "forks"

    def choose(self, nodes, call):
        pid = os.fork()
        if not pid and call.method.endswith("ModelInfer"):
            sys.exit(5)
        if pid and call.method.endswith("ModelInfer"):
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print("the child's status:", status, file=sys.stderr, flush=True)
        return super().choose(nodes, call)

@hookimpl
def dl_inference_register_balancers():
    return [Forks]
"""


def test_a_balancer_that_forks_does_not_take_down_the_gateway(tmp_path: Path, site_with_fakes: Path) -> None:
    (site_with_fakes / "forks.py").write_text(BALANCER)
    about = site_with_fakes / "forks-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: forks\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[dl_inference_core]\nforks = forks\n")
    (tmp_path / "node").mkdir()
    (tmp_path / "gateway").mkdir()
    with served(tmp_path / "node", site_with_fakes) as service:
        file = tmp_path / "gateway" / "server.toml"
        port = free_port()
        file.write_text(
            f'port = {port}\nsocket_path = "socket"\ntransport = "grpcio"\n'
            f'[[routes]]\nname = "m"\nnodes = ["{service.address}"]\ntimeout_ms = 20000\nbalancer = "forks"\n'
        )
        with (
            running(tmp_path / "gateway", site_with_fakes, "serve", "--config", file) as gateway,
            Client(f"unix:{tmp_path / 'gateway' / 'socket'}", timeout_s=20) as client,
        ):
            for _ in range(3):
                assert client.predict("m", "pid").payload  # by Seldon: the child returns
                with pytest.raises(InferenceError):
                    client.predict("m", {"x": np.zeros(1)})  # by Open Inference: the child exits
            log = tmp_path / "gateway" / "log"
            assert log.read_text().count("the child's status: 5") == 3
            wait_for(lambda: log.read_text().count("came back from it and is ended") == 3)
            gateway.send_signal(signal.SIGTERM)
            assert gateway.wait(20) == 0


COLLECTING = """
import asyncio, gc, os

collects = []
os.register_at_fork(after_in_child=lambda: collects.append(gc.isenabled()))  # of an earlier import: it runs first

from dl_inference_core.children import OwnSockets, isolate_children


async def main():
    isolate_children(lambda: OwnSockets(ports=()))
    child = os.fork()
    if not child:
        os._exit(0 if collects == [False] and gc.isenabled() and gc.get_freeze_count() else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child"
    assert gc.isenabled() and not gc.get_freeze_count(), "the parent"


asyncio.run(main())
"""


def test_no_collection_in_a_child_finds_what_its_parent_left() -> None:
    """gRPC's objects wait for their threads as they are freed, and a child has none of these threads."""
    done = subprocess.run([sys.executable, "-c", COLLECTING], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr


def test_a_service_knows_which_sockets_are_its_own(tmp_path: Path) -> None:
    with ExitStack() as opened:

        def kept(each: socket.socket) -> socket.socket:
            return opened.enter_context(each)

        listening = kept(socket.create_server(("127.0.0.1", 0)))
        other = kept(socket.create_server(("127.0.0.1", 0)))
        port = listening.getsockname()[1]
        client = kept(socket.create_connection(("127.0.0.1", port)))
        accepted = kept(listening.accept()[0])
        unconnected = kept(socket.socket())
        (tmp_path / "own").mkdir()
        at_path, beside = (kept(socket.socket(socket.AF_UNIX)) for _ in range(2))
        at_path.bind(str(tmp_path / "own" / "socket"))
        beside.bind(str(tmp_path / "beside"))
        pair = tuple(map(kept, socket.socketpair()))

        everything = (listening, other, client, accepted, unconnected, at_path, beside, *pair)

        def found(own: OwnSockets) -> list[socket.socket]:
            return [each for each in everything if own.has(each)]

        assert found(OwnSockets(ports=[port])) == [listening, accepted]
        assert found(OwnSockets(ports=(), peer_ports=[port])) == [client]
        assert found(OwnSockets(ports=(), paths=[tmp_path / "own"])) == [at_path]
        assert found(OwnSockets(ports=(), paths=[tmp_path / "beside"])) == [beside]
        assert found(OwnSockets(ports=())) == []


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (None, 1, "forked by a handler or plugin"),
        (ValueError("broken"), 1, "forked by a handler or plugin"),
        (SystemExit(), 0, ""),
        (SystemExit(3), 3, ""),
        (SystemExit(0x103), 3, ""),
        (SystemExit("it has words"), 1, "it has words"),
    ],
)
def test_a_child_ends_with_the_status_that_its_code_gave(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    error: BaseException | None,
    status: int,
    says: str,
) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    is_child = threading.Event()
    monkeypatch.setattr(children, "_is_child", is_child)
    monkeypatch.setattr(os, "_exit", end)
    children.end_child(error)  # this process was not forked from one that serves
    is_child.set()
    with pytest.raises(Ended) as ended:
        children.end_child(error)
    assert ended.value.args == (status,)
    said = caplog.text + capsys.readouterr().err
    assert says in said
    assert says or not said
