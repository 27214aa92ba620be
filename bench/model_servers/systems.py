"""The model servers, ours and peers: how each is started with one model, asked, and what it can be told."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import bare, bodies, load
from bench.load import LoadError, Post
from bench.model_servers import environments
from bench.model_servers.environments import Environment
from bench.model_servers.models import MODELS, OUTPUT, Floats, Model
from bench.model_servers.serving.names import FILE, MODEL, SETTING
from bench.own import serving
from bench.processes import Server, free_address, listening
from bench.replay import Traffic
from dl_inference_core.wire.protocol import PROTOCOLS

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
_READY_S = 120.0
_DELAYS_US = (0, 100, 1000, 2000)
"""For which a batch may be held, of those who can be told."""
_OUR_DELAYS_US = (0, 100, 1000)
# For all that speak gRPC: a deadline is part of the work.
_DEADLINE = ("grpc-timeout: 60S",)
_SERVER_LIVE = "/inference.GRPCInferenceService/ServerLive"
_LIVE = b"\x08\x01"
"""ServerLiveResponse{live: true}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to set a system up.

    Attributes:
        name: as tables have it.
        values: for the system itself; None stands for the model's `batch`.
    """

    name: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


Start = Callable[[Model, Path, Setting], AbstractContextManager[Server]]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A model server.

    Attributes:
        how: what the page says of it.
        start: serves the model in a folder (`NAME/1/model.pt`) until the block ends.
        ask: what is sent, by the model and the most rows of a request: 64 different messages of gRPC, or one body of
            HTTP/1.1.
        read: the scores of an answer; None of an RPC that computes nothing.
        settings: the best of which is chosen in each run, for each model and number in flight.
        environment: None for ours.
        needs: a distribution without which ours cannot run.
        models: it is measured with; all without.
        polls: it takes CPU without a request, which the others would lack: it is stopped while it is not its turn.
    """

    name: str
    how: str
    start: Start
    ask: Callable[[Model, int], Traffic | Post]
    read: Callable[[bytes], Floats] | None
    settings: tuple[Setting, ...] = (Setting(),)
    environment: Environment | None = None
    needs: str = ""
    models: tuple[str, ...] = ()
    polls: bool = False

    @property
    def speaks_http1(self) -> bool:
        """Whether h2load sends what it is asked."""
        return isinstance(self.ask(next(iter(MODELS.values())), 1), Post)

    @contextmanager
    def running(self, model: Model, folder: Path, setting: Setting, expected: Floats) -> Iterator[Server]:
        """It serves `model`, and has answered with what is expected.

        Raises:
            LoadError: it does not answer within two minutes, or not as the bare model does.
        """
        with self.start(model, folder, setting) as server:
            self._await(server, model)
            self.check(server, model, expected)
            yield server

    def _await(self, server: Server, model: Model) -> None:
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                load.ask(server.address, self._first(model))
            except LoadError:
                if time.monotonic() > deadline:
                    raise
            else:
                return
            time.sleep(0.1)

    def check(self, server: Server, model: Model, expected: Floats) -> None:
        """With as many requests in flight as may share a batch, of HTTP/1.1 with one.

        Args:
            expected: the scores of the first `model.batch` requests.

        Raises:
            LoadError: it does not answer as the bare model does.
        """
        asked = self.ask(model, 1)
        if isinstance(asked, Post):
            answers = [load.ask(server.address, asked)]
        else:
            answers = load.ask_together(server.address, asked.path, asked.messages[: model.batch])
        for answer, scores in zip(answers, expected, strict=False):
            if self.read is None:
                if answer != _LIVE:
                    raise LoadError(f"{self.name} is not live: {answer!r}")
                continue
            found = self.read(answer)
            if found.shape != (1, *scores.shape) or not np.allclose(found[0], scores, rtol=0, atol=TOLERANCE):
                raise LoadError(f"{self.name} does not answer as the bare model does: {found} for {scores}")

    def _first(self, model: Model) -> Post:
        asked = self.ask(model, 1)
        return asked if isinstance(asked, Post) else Post(path=asked.path, message=asked.messages[0])


@cache
def _grpc(protocol: str, model: Model, most_rows: int) -> Traffic:
    make = bodies.one_row if most_rows == 1 else bodies.one_to_four_rows
    messages = make(protocol, model.name, model.input, model.shape)
    return Traffic(path=PROTOCOLS[protocol].node_method, messages=messages, headers=_DEADLINE)


def _ask_server_live(_: Model, __: int) -> Traffic:
    return Traffic(path=_SERVER_LIVE, messages=(b"",), headers=_DEADLINE)


def _read_open_inference(answer: bytes) -> Floats:
    payload: Any = PROTOCOLS["openinference"].codec.decode_response(answer).payload
    (scores,) = payload.values()
    return np.asarray(scores, np.float32)


def _read_seldon(answer: bytes) -> Floats:
    return np.asarray(PROTOCOLS["seldon"].codec.decode_response(answer).payload, np.float32)


_ASK_OPEN_INFERENCE, _ASK_SELDON = partial(_grpc, "openinference"), partial(_grpc, "seldon")


def _json_post(path: str, content: Any) -> Post:
    return Post(path=path, message=json.dumps(content).encode(), media_type="application/json")


def _ask_litserve(model: Model, _: int) -> Post:
    return _json_post("/predict", {model.input: base64.b64encode(model.row().tobytes()).decode()})


def _read_litserve(answer: bytes) -> Floats:
    return np.frombuffer(base64.b64decode(json.loads(answer)[OUTPUT]), np.float32)[None]


def _ask_bentoml(model: Model, _: int) -> Post:
    # Digits that a float32 has.
    return _json_post("/predict", {"rows": np.vectorize(lambda value: float(f"{value:.9g}"))(model.row()).tolist()})


def _read_bentoml(answer: bytes) -> Floats:
    return np.asarray(json.loads(answer), np.float32)


def model_toml(model: Model, setting: Setting) -> str:
    """What our own node is told of a model: TorchScript does not say whether its rows are free."""
    return f"[batching]\nmax_rows = {model.batch}\nmax_delay_us = {setting.values['delay_us']}\n"


@contextmanager
def _ours(transport: str, model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    (folder / model.name / "model.toml").write_text(model_toml(model, setting), encoding="utf-8")
    config = f"http_port = 0\n[models]\ndirectory = {str(folder)!r}\n"
    config += f"[backends.torch]\nintra_op_threads = {model.threads}\n"
    with serving(transport, config) as server:
        yield server


def _values(model: Model, setting: Setting) -> dict[str, Any]:
    """What a peer is told."""
    return {name: model.batch if value is None else value for name, value in setting.values.items()}


def _environment(model: Model, folder: Path, setting: Setting) -> dict[str, str]:
    """Variables for what `bench.model_servers.serving` has inside a peer."""
    return {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(model.threads),
        MODEL: model.name,
        FILE: str(model_file(model, folder)),
        SETTING: json.dumps(_values(model, setting)),
    }


def model_file(model: Model, folder: Path) -> Path:
    return folder / model.name / "1" / "model.pt"


@contextmanager
def _peer(
    environment: Environment,
    address: str,
    *command: str,
    variables: Mapping[str, str],
    ends: bool = True,
) -> Iterator[Server]:
    """A peer on `address`; what it prints goes to a file beside its environment.

    Args:
        ends: whether it does when it is told to; what does not is killed.
    """
    with (
        environment.folder.with_suffix(".log").open("a", encoding="utf-8") as log,
        listening(address, *command, environment=variables, log=log) as server,
    ):
        try:
            yield server
        finally:
            if not ends:
                server.kill()


def _port(address: str) -> str:
    return address.rpartition(":")[2]


@contextmanager
def _seldon_core(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    address = free_address()
    here = environments.SELDON_CORE
    command = [here.program("seldon-core-microservice"), f"{_inside('in_seldon_core')}.Predictor"]
    command += ("--service-type", "MODEL", "--workers", "1", "--grpc-workers", "1", "--log-level", "ERROR")
    command += ("--grpc-threads", str(setting.values["threads"]), "--grpc-port", _port(address))
    command += ("--http-port", _port(free_address()), "--metrics-port", _port(free_address()))
    with _peer(here, address, *command, variables=_environment(model, folder, setting), ends=False) as server:
        yield server


@contextmanager
def _mlserver(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    address = free_address()
    here = environments.MLSERVER
    with tempfile.TemporaryDirectory() as place:
        settings = {
            "debug": False,
            "parallel_workers": 0,
            "host": "127.0.0.1",
            "grpc_port": int(_port(address)),
            "http_port": int(_port(free_address())),
            "metrics_port": int(_port(free_address())),
        }
        (Path(place) / "settings.json").write_text(json.dumps(settings))
        served = {"name": model.name, "implementation": f"{_inside('in_mlserver')}.Runtime", **_values(model, setting)}
        (Path(place) / "model-settings.json").write_text(json.dumps(served))
        variables = _environment(model, folder, setting)
        with _peer(here, address, here.program("mlserver"), "start", place, variables=variables) as server:
            yield server


_TRITON_CONFIG = """\
name: "{model.name}"
backend: "python"
max_batch_size: {batch}
input [{{ name: "{model.input}" data_type: TYPE_FP32 dims: {dims} }}]
output [{{ name: "{output}" data_type: TYPE_FP32 dims: [{model.outputs}] }}]
instance_group [{{ kind: KIND_CPU count: 1 }}]
dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}
"""


@contextmanager
def _triton(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    address = free_address()
    here = environments.TRITON
    with tempfile.TemporaryDirectory() as place:
        package = here.site_packages / "pytriton" / "tritonserver"
        backend = Path(place) / "backends" / "python"
        shutil.copytree(package / "backends" / "python", backend)
        release = here.site_packages.parent.name.removeprefix("python")
        stub = package / "python_backend_stubs" / release / "triton_python_backend_stub"
        shutil.copy(stub, backend)
        version = Path(place) / "models" / model.name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(f"from {_inside('in_triton')} import TritonPythonModel\n")
        config = _TRITON_CONFIG.format(
            model=model, batch=model.batch, dims=list(model.shape), output=OUTPUT, delay_us=setting.values["delay_us"]
        )
        (version.parent / "config.pbtxt").write_text(config)
        variables = _environment(model, folder, setting)
        variables["LD_LIBRARY_PATH"] = str(here.site_packages / "nvidia_pytriton.libs")
        variables["PATH"] = f"{here.folder / 'bin'}:{os.environ.get('PATH', os.defpath)}"
        variables["PYTHONPATH"] += f":{here.site_packages}"
        command = [str(package / "bin" / "tritonserver"), "--model-repository", str(version.parents[1])]
        command += ("--backend-directory", str(backend.parent), "--allow-http", "false", "--grpc-address", "127.0.0.1")
        command += ("--grpc-port", _port(address), "--metrics-address", "127.0.0.1")
        command += ("--metrics-port", _port(free_address()), "--log-info", "false")
        with _peer(here, address, *command, variables=variables) as server:
            yield server


@contextmanager
def _pytriton(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    address = free_address()
    here = environments.TRITON
    command = [here.python, "-m", _inside("in_pytriton"), *map(_port, (address, free_address(), free_address()))]
    with _peer(here, address, *command, variables=_environment(model, folder, setting)) as server:
        yield server


@contextmanager
def _litserve(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    address = free_address()
    here = environments.LITSERVE
    command = [here.python, "-m", _inside("in_litserve"), _port(address)]
    with _peer(here, address, *command, variables=_environment(model, folder, setting), ends=False) as server:
        yield server


@contextmanager
def _bentoml(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    address = free_address()
    here = environments.BENTOML
    variables = {**_environment(model, folder, setting), "BENTOML_DO_NOT_TRACK": "True"}
    with tempfile.TemporaryDirectory() as home:
        variables["BENTOML_HOME"] = home
        command = [here.program("bentoml"), "serve", f"{_inside('in_bentoml')}:Service"]
        command += ("--host", "127.0.0.1", "--port", _port(address))
        with _peer(here, address, *command, variables=variables) as server:
            yield server


def _inside(module: str) -> str:
    return f"bench.model_servers.serving.{module}"


@contextmanager
def bare_model(model: Model, folder: Path) -> Iterator[bare.BareCalls]:
    """The model alone, in a Python process that has torch imported: call it "1", "2", …, by the size of a batch."""
    command = (sys.executable, "-m", "bench.model_servers.alone", model.name, str(model_file(model, folder)))
    with bare.calling(*command) as server:
        yield server


def _our(transport: str, needs: str) -> System:
    return System(
        name=f"ours-{transport}",
        how=f"`dl-inference-core serve`, transport {transport}, Open Inference over gRPC, metrics on, dynamic batching",
        start=partial(_ours, transport),
        ask=_ASK_OPEN_INFERENCE,
        read=_read_open_inference,
        settings=tuple(Setting(name=f"delay {delay} µs", values={"delay_us": delay}) for delay in _OUR_DELAYS_US),
        needs=needs,
    )


OURS = (_our("native", "dl-inference-native"), _our("grpcio", "grpcio"))
PEERS = (
    System(
        name="triton",
        how="Open Inference over gRPC, its Python backend, dynamic batching",
        start=_triton,
        ask=_ASK_OPEN_INFERENCE,
        read=_read_open_inference,
        settings=tuple(Setting(name=f"delay {delay} µs", values={"delay_us": delay}) for delay in _DELAYS_US),
        environment=environments.TRITON,
    ),
    System(
        name="pytriton",
        how="Triton as PyTriton sets it up: the model in a process of its own behind the Python backend",
        start=_pytriton,
        ask=_ASK_OPEN_INFERENCE,
        read=_read_open_inference,
        settings=tuple(Setting(name=f"delay {delay} µs", values={"delay_us": delay}) for delay in (0, 100)),
        environment=environments.TRITON,
    ),
    System(
        name="mlserver",
        how="Open Inference over gRPC, in one process (`parallel_workers` 0)",
        start=_mlserver,
        ask=_ASK_OPEN_INFERENCE,
        read=_read_open_inference,
        settings=(
            Setting(name="no batching"),
            *(
                Setting(
                    name=f"batches within {time_s * 1000:g} ms",
                    values={"max_batch_size": None, "max_batch_time": time_s},
                )
                for time_s in (0.001, 0.01)
            ),
        ),
        environment=environments.MLSERVER,
    ),
    System(
        name="seldon-core",
        how="SeldonMessage over gRPC, one worker; it has no batching",
        start=_seldon_core,
        ask=_ASK_SELDON,
        read=_read_seldon,
        settings=tuple(Setting(name=f"threads {threads}", values={"threads": threads}) for threads in (1, 4)),
        environment=environments.SELDON_CORE,
    ),
    System(
        name="litserve",
        how="JSON with base64 over HTTP/1.1",
        start=_litserve,
        ask=_ask_litserve,
        read=_read_litserve,
        settings=tuple(
            Setting(
                name=f"batches within {time_s * 1000:g} ms{', fast queue' if fast else ''}",
                values={"max_batch_size": None, "batch_timeout": time_s, "fast_queue": fast},
            )
            for time_s, fast in ((0.0, False), (0.001, False), (0.001, True))
        ),
        environment=environments.LITSERVE,
        polls=True,
    ),
    System(
        name="bentoml",
        how="JSON over HTTP/1.1",
        start=_bentoml,
        ask=_ask_bentoml,
        read=_read_bentoml,
        settings=(
            Setting(name="no batching", values={"batchable": False}),
            Setting(
                name="adaptive batching",
                values={"batchable": True, "max_batch_size": None, "max_latency_ms": 60_000},
            ),
        ),
        environment=environments.BENTOML,
    ),
)
TRITON_EMPTY = System(
    name="triton-empty",
    how="`ServerLive`, which computes nothing: what an RPC costs Triton at the least, whatever its backend",
    start=_triton,
    ask=_ask_server_live,
    read=None,
    settings=(Setting(values={"delay_us": 0}),),
    environment=environments.TRITON,
    models=("mmoe",),
)
EVERY = (*OURS, *PEERS, TRITON_EMPTY)
BARE = "bare"
NAMES = (BARE, *(system.name for system in EVERY))
