"""How each model server, ours and peers, is started with one model."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import bare
from bench.model_servers import environments
from bench.model_servers.environments import Environment
from bench.model_servers.models import OUTPUT, Model
from bench.model_servers.serving.names import FILE, MODEL, SETTING
from bench.own import serving
from bench.processes import Server, free_address, listening

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to set a system up.

    Attributes:
        name: as tables have it.
        values: for the system itself; None stands for the model's `batch`.
    """

    name: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def model_toml(model: Model, setting: Setting) -> str:
    """What our own node is told of a model: TorchScript does not say whether its rows are free."""
    return f"[batching]\nmax_rows = {model.batch}\nmax_delay_us = {setting.values['delay_us']}\n"


@contextmanager
def ours(transport: str, model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    """Our node, with its metrics, and a folder of its own: a node that runs takes up a `model.toml` that changes."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(folder, place, copy_function=os.link, dirs_exist_ok=True)
        (Path(place) / model.name / "model.toml").write_text(model_toml(model, setting), encoding="utf-8")
        config = f"http_port = 0\n[models]\ndirectory = {place!r}\n"
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
def seldon_core(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    address = free_address()
    here = environments.SELDON_CORE
    command = [here.program("seldon-core-microservice"), f"{_inside('in_seldon_core')}.Predictor"]
    command += ("--service-type", "MODEL", "--workers", "1", "--grpc-workers", "1", "--log-level", "ERROR")
    command += ("--grpc-threads", str(setting.values["threads"]), "--grpc-port", _port(address))
    command += ("--http-port", _port(free_address()), "--metrics-port", _port(free_address()))
    with _peer(here, address, *command, variables=_environment(model, folder, setting), ends=False) as server:
        yield server


@contextmanager
def mlserver(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
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
def triton(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
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
def pytriton(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    address = free_address()
    here = environments.TRITON
    command = [here.python, "-m", _inside("in_pytriton"), *map(_port, (address, free_address(), free_address()))]
    with _peer(here, address, *command, variables=_environment(model, folder, setting)) as server:
        yield server


@contextmanager
def litserve(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
    address = free_address()
    here = environments.LITSERVE
    command = [here.python, "-m", _inside("in_litserve"), _port(address)]
    with _peer(here, address, *command, variables=_environment(model, folder, setting), ends=False) as server:
        yield server


@contextmanager
def bentoml(model: Model, folder: Path, setting: Setting) -> Iterator[Server]:
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
