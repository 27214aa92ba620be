"""The whole path over real sockets: nodes and gateways as processes of their own, and what calls them."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

T = TypeVar("T")

PATIENCE_S = 240.0
_SHOWN = 5000


def _wait_for(what: str, look: Callable[[], T], within_s: float = PATIENCE_S) -> T:
    """The first truth that `look` tells."""
    end = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < end, f"waited {within_s} s for {what}"
        time.sleep(0.01)
    return found


@dataclass(kw_only=True, eq=False)
class Process:
    """A process in a session of its own, so that all that comes of it can be found again and ended."""

    popen: subprocess.Popen[bytes]
    log: Path
    address: str = ""
    metrics: str = ""
    channel: grpc.Channel = field(init=False)

    def text(self) -> str:
        """What it has written until now, to stdout and stderr."""
        return self.log.read_text(errors="replace")

    def written(self, *words: str, within_s: float = PATIENCE_S) -> str:
        """The first whole line that has all of `words` in it."""

        def look() -> str:
            lines = self.text().splitlines(keepends=True)
            found = next((line for line in lines if line.endswith("\n") and all(word in line for word in words)), "")
            assert found or self.popen.poll() is None, f"{self.popen.args!r} ended:\n{self.text()}"
            return found

        return _wait_for(f"{words} in\n{self.log}", look, within_s)

    def connect(self, address: str) -> None:
        self.address = address
        self.channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.enable_http_proxy", 0),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )

    def call(self, method: str, body: bytes, *, timeout: float = 20.0, metadata: Any = ()) -> bytes:
        """The answer's bytes; raises grpc.RpcError."""
        answer: bytes = self.channel.unary_unary(method)(body, timeout=timeout, metadata=metadata)
        return answer

    def start_call(self, method: str, body: bytes, *, timeout: float = 20.0, metadata: Any = ()) -> Any:
        """A call under way: a grpc.Future."""
        return self.channel.unary_unary(method).future(body, timeout=timeout, metadata=metadata)

    def refusal(self, method: str, body: bytes, **how: Any) -> tuple[grpc.StatusCode, str]:
        """The status and message of a call that must fail."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, body, **how)
        return caught.value.code(), caught.value.details() or ""

    def counts(self, name: str) -> dict[str, float]:
        """The samples of a metric, by their labels as they are written."""
        with urllib.request.urlopen(self.metrics, timeout=10) as response:
            lines = response.read().decode().splitlines()
        samples = (line.removeprefix(name).rpartition(" ") for line in lines if line.startswith(f"{name}{{"))
        return {labels: float(value) for labels, _, value in samples}

    def attempts(self) -> dict[str, float]:
        """How many attempts at nodes ended with which outcome. A transport may count an attempt after its client has
        the answer, so they are read until they stay, or for a second."""
        end = time.monotonic() + 1
        counts, now = None, self._attempts()
        while counts != now and time.monotonic() < end:
            time.sleep(0.05)
            counts, now = now, self._attempts()
        return now

    def _attempts(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for labels, count in self.counts("dl_inference_attempts_total").items():
            outcome = labels.partition('outcome="')[2].partition('"')[0]
            totals[outcome] = totals.get(outcome, 0) + count
        return totals

    def resident(self) -> int:
        """Bytes of memory that it and all that it has started have at present."""
        pages = 0
        for pid in self._alive():
            try:
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:
                continue
        return pages * os.sysconf("SC_PAGE_SIZE")

    @contextmanager
    def files(self, count: int) -> Iterator[None]:
        """Meanwhile each of its processes may have that many files open, and no more. On Linux."""
        before = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in self._alive()}
        try:
            for pid, (_, most) in before.items():
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, most))
            yield
        finally:
            for pid, limits in before.items():
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)

    def end(self) -> None:
        """SIGTERM to each process of its session, and SIGKILL to those that are left after 10 s."""
        if self.address:
            self.channel.close()
        self._signal(signal.SIGTERM)
        try:
            _wait_for("processes to end", lambda: not self._alive(), 10)
        except AssertionError:
            self._signal(signal.SIGKILL)
            _wait_for("processes to be gone", lambda: not self._alive(), 10)
        self.popen.wait(10)

    def _signal(self, number: int) -> None:
        for pid in self._alive():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _alive(self) -> list[int]:
        self.popen.poll()
        return [pid for pid in _pids() if _session(pid) == self.popen.pid]


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]  # noqa: PTH208


def _session(pid: int) -> int:
    """The session of a process; 0 if it has ended."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return 0
    return 0 if state in "ZX" else int(session)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """What the processes of a test that failed have written stands in its report."""
    report: Any = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Process):
                report.sections.append((f"{name} {value.address} wrote", value.text()[-_SHOWN:]))
    return report


class Processes:
    """Starts processes, and ends them."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._started: list[Process] = []

    def start(self, *command: str | Path, **options: Any) -> Process:
        """Start a command, with options of Popen."""
        log = self._folders.mktemp("process") / "log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        self._started.append(Process(popen=popen, log=log))
        return self._started[-1]

    def serve(self, transport: str, config: str, **options: Any) -> Process:
        """Start `dl-inference-core serve`, and return when it says that it serves."""
        file = self._folders.mktemp("config") / "server.toml"
        file.write_text(f'port = 0\nhttp_port = 0\ntransport = "{transport}"\n{config}')
        process = self.start(Path(sys.executable).with_name("dl-inference-core"), "serve", "--config", file, **options)
        process.connect(process.written("serving on ").split()[-1])
        process.metrics = process.written("http on ").split()[-1] + "/metrics"
        return process

    def end(self) -> None:
        """End whatever is left of them."""
        for process in reversed(self._started):
            process.end()


Start = Callable[..., Process]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """As `Processes.start`; whatever is left is ended with the tests of the file."""
    processes = Processes(tmp_path_factory)
    yield processes.start
    processes.end()


Serve = Callable[..., Process]


@pytest.fixture(scope="module")
def serve(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """(config, **options of Popen): as `Processes.serve`. It ends with the file's tests on this transport."""
    processes = Processes(tmp_path_factory)
    yield partial(processes.serve, transport)
    processes.end()


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """(what, look, within_s): polls until `look` tells a truth."""
    return _wait_for


@pytest.fixture(scope="session")
def seldon_python() -> Path:
    """The interpreter of the environment that holds seldon-core."""
    python = Path(__file__).parents[2] / ".venv-seldon/bin/python"
    if not python.with_name("seldon-core-microservice").exists():
        pytest.fail("seldon-core is not installed where the tests look for it: run `make .venv-seldon/ready`")
    return python


NET = '''
import torch


class Net(torch.nn.Module):
    """Doubles; by its optional arguments it could do as a client pleases."""

    def forward(self, x, scale=2.0, **more):
        return x * scale + sum(more.values())
'''

ECHO = """
import numpy as np


def preprocess(x, **kwargs):
    if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
        return x
    if isinstance(x, (bytes, np.ndarray)):
        return {"as it is": x[::-1]}
    return {"as it is": x.upper() if isinstance(x, str) else {"given": x}}


def run_model(model, x, **kwargs):
    if isinstance(x, dict):
        return x["as it is"]
    import torch

    return model(torch.as_tensor(np.array(x, dtype=np.float64)))


def postprocess(x, **kwargs):
    return x
"""

WORDS = '''
import numpy as np

from dl_inference_core.errors import BadRequest
from dl_inference_core.node.handling import Handler


class Words(Handler):
    """Takes strings in any form and gives each in capitals, and its length by the model."""

    def preprocess(self, request):
        x = request.payload
        if isinstance(x, dict):
            x = x["words"]
        if isinstance(x, (str, bytes)):
            x = np.array([x if isinstance(x, bytes) else x.encode()], dtype=object)
        if not isinstance(x, np.ndarray) or x.dtype != object:
            raise BadRequest("expected words")
        return x

    def run_model(self, model, words, request):
        lengths = np.array([[len(word), 0, 0] for word in words.ravel()], np.float32)
        return {
            "capitals": np.array([word.upper() for word in words.ravel()], dtype=object).reshape(words.shape),
            "lengths": model({"x": lengths})["y"][:, :1] - 0.5,
            "tags": np.array([str(sorted(request.tags.items())).encode()], dtype=object),
            "parameters": np.array([str(sorted(request.parameters.items())).encode()], dtype=object),
        }
'''

TROUBLE = '''
import os
import pathlib
import time

import numpy as np

from dl_inference_core.node.handling import Handler


class Trouble(Handler):
    """Does what a text says: "raise STAGE WORD", "give KIND", "await FILE", "count"."""

    ran = 0

    def preprocess(self, request):
        verb, _, rest = request.payload.partition(" ")
        self.fail("preprocess", verb, rest)
        return verb, rest

    def run_model(self, model, inputs, request):
        verb, rest = inputs
        self.fail("run_model", verb, rest)
        if verb == "await":
            self.ran += 1
            pathlib.Path(rest + ".begun").touch()
            end = time.monotonic() + 30
            while not os.path.exists(rest) and time.monotonic() < end:
                time.sleep(0.005)
        return inputs

    def postprocess(self, inputs, request):
        verb, rest = inputs
        self.fail("postprocess", verb, rest)
        if verb == "give":
            return {
                "object": object(),
                "set": {1, 2},
                "objects": {"y": np.array([object()], dtype=object)},
                "dates": {"y": np.array(["2026-01-01"], dtype="datetime64[D]")},
                "nothing": None,
                "large": b"x" * (11 * 1024 * 1024),
            }[rest]
        return f"{self.ran}" if verb == "count" else f"done {rest}"

    def fail(self, stage, verb, rest):
        where, _, word = rest.partition(" ")
        if verb == "raise" and where == stage:
            word += "\\ud83d" if word.startswith("half") else ""  # of a surrogate pair
            raise SystemExit(word) if word.startswith("exit") else RuntimeError(word)
'''

SCORES = '''
import numpy as np

from dl_inference_core.node.handling import Handler
from dl_inference_core.tensors import Form, Method
from dl_inference_core.wire import messages


class Scores(Handler):
    """Examples with the feature "x", three numbers, in; the model's two outputs as scores, or their sum, out."""

    def preprocess(self, request):
        if request.form is not Form.EXAMPLES:
            return super().preprocess(request)
        features = [messages.Example.FromString(body).features.feature for body in request.payload]
        return {"x": np.array([feature["x"].float_list.value for feature in features], np.float32)}

    def run_model(self, model, inputs, request):
        return model(inputs)

    def postprocess(self, outputs, request):
        y = outputs["y"]
        if request.method is Method.CLASSIFY:
            return {"scores": y, "classes": np.array([["first", "zweitens"]] * len(y))}
        return {"outputs": y.sum(axis=1)} if request.method is Method.REGRESS else outputs
'''

WEIGHTS = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]


def _export(folder: Path, module: Any, *inputs: Any) -> None:
    """`module` as `model.pt2`, with a free first axis."""
    import torch

    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.part"
    with part.open("wb") as file:
        torch.export.save(program, file)
    part.rename(folder / "model.pt2")


class ModelMaker:
    """Makes the models that the nodes of these tests serve, with real torch."""

    def linear(self, folder: Path, factor: float) -> None:
        """y = factor · (x @ WEIGHTS + 0.5), float32, x of shape [?, 3]."""
        import torch

        class Linear(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weights = torch.nn.Parameter(torch.tensor(WEIGHTS) * factor)

            def forward(self, x: Any) -> Any:
                return {"y": x @ self.weights + 0.5 * factor}

        _export(folder, Linear(), torch.zeros(2, 3))

    def answer(self, x: Any, factor: float = 1.0) -> Any:
        """What `linear` answers."""
        import numpy as np

        return factor * (np.asarray(x, np.float32) @ np.array(WEIGHTS, np.float32) + np.float32(0.5))

    def branches(self, folder: Path) -> None:
        """Two inputs and two outputs."""
        import torch

        class Branches(torch.nn.Module):
            def forward(self, a: Any, b: Any) -> Any:
                return {"sum": a + b, "difference": a - b}

        _export(folder, Branches(), torch.zeros(2, 2), torch.zeros(2, 2))

    def dtypes(self, folder: Path) -> None:
        """Gives back an input of each dtype, under the same name."""
        import torch

        class Same(torch.nn.Module):
            def forward(
                self, bool_: Any, uint8: Any, int8: Any, int16: Any, int32: Any, int64: Any,
                float16: Any, bfloat16: Any, float32: Any, float64: Any,
            ) -> Any:  # fmt: skip
                given = locals()
                return {name: value.clone() for name, value in given.items() if name != "self"}

        names = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
        _export(folder, Same(), *(torch.zeros(2, 2, dtype=getattr(torch, name)) for name in names))

    def pickled(self, folder: Path, source: str = NET) -> str:
        """The original's `model.pth` with its source beside it; returns its digest."""
        import torch

        folder.mkdir(parents=True)
        (folder / "net.py").write_text(source)
        module = types.ModuleType("net")
        exec(source, module.__dict__)
        sys.modules["net"] = module
        try:
            torch.save(module.Net(), folder / "model.pth")
        finally:
            del sys.modules["net"]
        return hashlib.sha256((folder / "model.pth").read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def make() -> ModelMaker:
    return ModelMaker()


TASKS = {
    "linear": 7, "branches": 8, "dtypes": 9, "echo": 69, "words": 11, "trouble": 12, "tags": 13, "one-tag": 14,
    "scores": 15, "half": 16, "elsewhere": 17,
}  # fmt: skip


@pytest.fixture(scope="session")
def tasks() -> dict[str, int]:
    """The task id of each model of `node`."""
    return TASKS


@pytest.fixture(scope="session")
def models(make: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of models that `node` serves, but for the one that lies elsewhere."""
    root = tmp_path_factory.mktemp("models")
    toml = {name: f"task_id = {task}\n" for name, task in TASKS.items() if name != "elsewhere"}
    toml["linear"] += "version_labels = { stable = 1, canary = 2, gone = 9 }\n"
    make.linear(root / "linear/1", 1)
    make.linear(root / "linear/2", 10)
    make.branches(root / "branches/1")
    make.dtypes(root / "dtypes/1")
    make.linear(root / "half/1", 1)
    (root / "half/2").mkdir()
    (root / "half/2/model.pt2").write_bytes(b"this is no model")
    for name, source in (("words", WORDS), ("trouble", TROUBLE), ("scores", SCORES)):
        shutil.copytree(root / "linear/1", root / name / "1")
        (root / name / "handler.py").write_text(source)
    toml["echo"] += f'[options]\nsha256 = ["{make.pickled(root / "echo")}"]\n'
    (root / "echo/processor.py").write_text(ECHO)
    allowed = f'[options]\nsha256 = ["{make.pickled(root / "tags")}"]\n'
    toml["tags"] += allowed
    shutil.copytree(root / "tags", root / "one-tag")
    toml["one-tag"] += f'{allowed}[handler_options]\nmodel_arguments = ["scale"]\n'
    for name in ("tags", "one-tag"):
        (root / name / "processor.py").write_text("def postprocess(x, **kwargs):\n    return x\n")
    for name, text in toml.items():
        (root / name / "model.toml").write_text(text)
    return root


@pytest.fixture(scope="session")
def elsewhere(make: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that lies outside `models`."""
    folder = tmp_path_factory.mktemp("far") / "away"
    for version, factor in ((1, 1), (2, 10), (3, 100)):
        make.linear(folder / str(version), factor)
    return folder


@dataclass(frozen=True, kw_only=True)
class Peers:
    """A node, and a gateway in front of it."""

    node: Process
    gateway: Process


@pytest.fixture(scope="session")
def peers(models: Path, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Peers]]:
    """(transport): those that all files share, since a node takes some seconds of CPU to start. The node serves
    `models`, and `elsewhere` under that name; the gateway has a route for each of them, and one for a model that the
    node has not."""
    processes = Processes(tmp_path_factory)

    @cache
    def serving(transport: str) -> Peers:
        node = processes.serve(
            transport,
            f"""
[models]
directory = "{models}"
poll_interval_ms = 50
[models.named.elsewhere]
path = "{elsewhere}"
settings = {{ task_id = {TASKS["elsewhere"]}, versions = [1, 3], version_labels = {{ old = 1 }} }}
[backends.torch]
intra_op_threads = 1
""",
        )
        return Peers(node=node, gateway=processes.serve(transport, _routes({**TASKS, "ghost": 404}, node)))

    yield serving
    processes.end()


@pytest.fixture(scope="module")
def node(peers: Callable[[str], Peers], transport: str) -> Process:
    """The node of `peers`."""
    return peers(transport).node


@pytest.fixture(scope="module")
def gateway(peers: Callable[[str], Peers], transport: str) -> Process:
    """The gateway of `peers`."""
    return peers(transport).gateway


def _routes(tasks: Mapping[str, int], *nodes: Process, more: str = "") -> str:
    addresses = [node.address for node in nodes]
    return "\n".join(
        f'[[routes]]\nname = "{name}"\ntask_id = {task}\ntimeout_ms = 20000\nnodes = {addresses}\n{more}'
        for name, task in tasks.items()
    )


@pytest.fixture(scope="session")
def routes() -> Callable[..., str]:
    """(tasks, *nodes, more): a config with a route for each of `tasks` to all of the nodes."""
    return _routes


@pytest.fixture(scope="module", params=["node", "gateway"])
def peer(request: pytest.FixtureRequest, node: Process, gateway: Process) -> Process:
    """The node, called directly, and the gateway in front of it."""
    return node if request.param == "node" else gateway
