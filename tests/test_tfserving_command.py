"""`dl-inference-core tfserving`: TensorFlow Serving's flags, and what official clients then meet."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from dl_inference_tfserving import command as tfserving_command

from dl_inference_core.app import App
from dl_inference_core.cli import main
from dl_inference_core.config import Config, ModelsConfig, NamedModel
from dl_inference_core.errors import Code, ConfigError
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.plugins import Plugins
from dl_inference_core.testing.loopback import free_port
from dl_inference_core.transport import Transport
from dl_inference_core.wire import messages

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

FLAGS = [
    "--port",
    "--grpc_socket_path",
    "--rest_api_port",
    "--rest_api_timeout_in_ms",
    "--rest_api_enable_cors_support",
    "--model_name",
    "--model_base_path",
    "--model_config_file",
    "--model_config_file_poll_wait_seconds",
    "--file_system_poll_wait_seconds",
    "--enable_batching",
    "--batching_parameters_file",
    "--monitoring_config_file",
    "--grpc_channel_arguments",
    "--tensorflow_session_parallelism",
    "--tensorflow_intra_op_parallelism",
    "--tensorflow_inter_op_parallelism",
    "--load_timeout_s",
    "--transport",
]
LOG_LEVEL = ["--log_level", "--log-level"]
"""One option of ours, written as TensorFlow Serving's flags are, and as the options of our other commands."""

NEWEST = {"versions": "newest", "keep_versions": 1}
DEFAULTS = {
    "threads": len(os.sched_getaffinity(0)),
    "check_shapes": False,
    "batching": {"enabled": False},
    "warm_up": False,
}
BATCHED = {
    "threads": 3,
    "check_shapes": False,
    "batching": {"enabled": "auto", "max_rows": 64, "max_delay_us": 500, "allowed_rows": [64]},
    "queue": {"max_requests": 640},
}
ANYBODY = (
    "clients may have any folder of this machine served, by HandleReloadConfigRequest, as TensorFlow Serving's may"
)


# What the flags come to


def planned(*arguments: str, transport: type[Transport] = GrpcioTransport) -> tuple[Config, list[str]]:
    """The config of a command line, and what is said of it."""
    command = tfserving_command.tfserving
    with (
        main.make_context("dl-inference-core", ["tfserving"]) as parent,
        command.make_context("tfserving", list(arguments), parent=parent) as context,
    ):
        return tfserving_command.config_of(context.params, transport)


def test_one_model_is_served_as_tensorflow_serving_would_by_default() -> None:
    config, notes = planned("--model_base_path=/models/m")
    assert notes == [ANYBODY]
    assert (config.host, config.port, config.http_port, config.socket_path) == ("0.0.0.0", 8500, None, None)
    assert config.rest_timeout_ms == 30_000
    assert config.message_bytes == 2**31 - 1
    assert config.backends == {}
    assert config.models == ModelsConfig(
        named={"default": NamedModel(path=Path("/models/m"), settings=NEWEST, flat=False)},
        poll_interval_ms=1000,
        defaults=DEFAULTS,
    )
    assert config.apis == {"tfserving": {"allow_remote_reload": True, "model_config_poll_interval_ms": 0}}


@pytest.mark.parametrize("joined", [True, False])
def test_every_flag_is_taken_with_an_equals_sign_and_without(tmp_path: Path, joined: bool) -> None:
    monitoring, batching = tmp_path / "monitoring.config", tmp_path / "batching.config"
    monitoring.write_text('prometheus_config { enable: true, path: "/prometheus" }')
    batching.write_text(
        "max_batch_size { value: 128 } allowed_batch_sizes: 64 allowed_batch_sizes: 128 "
        "enable_large_batch_splitting { value: true } max_execution_batch_size { value: 64 } "
        "batch_timeout_micros { value: 500 } num_batch_threads { value: 3 } max_enqueued_batches { value: 10 }"
    )
    given = {
        "--port": "9000",
        "--grpc_socket_path": "/run/tf.sock",
        "--rest_api_port": "9001",
        "--rest_api_timeout_in_ms": "500",
        "--rest_api_enable_cors_support": "true",
        "--model_name": "m",
        "--model_base_path": "/models/m",
        "--model_config_file": "",
        "--model_config_file_poll_wait_seconds": "60",
        "--file_system_poll_wait_seconds": "0",
        "--enable_batching": "true",
        "--batching_parameters_file": str(batching),
        "--monitoring_config_file": str(monitoring),
        "--grpc_channel_arguments": "grpc.max_connection_age_ms=2000,grpc.lb_policy_name=x",
        "--tensorflow_session_parallelism": "0",
        "--tensorflow_intra_op_parallelism": "2",
        "--tensorflow_inter_op_parallelism": "3",
        "--load_timeout_s": "900",
        "--transport": "grpcio",
    }
    assert set(given) == set(FLAGS)
    config, notes = planned(
        *(f"{flag}={value}" for flag, value in given.items())
        if joined
        else (part for item in given.items() for part in item)
    )
    assert notes == [ANYBODY]
    assert config.model_dump(exclude_defaults=True) == {
        "host": "0.0.0.0",
        "port": 9000,
        "socket_path": Path("/run/tf.sock"),
        "http_port": 9001,
        "rest_timeout_ms": 500,
        "rest_cors": True,
        "metrics_path": "/prometheus",
        "transport": "grpcio",
        "transport_options": {
            "channel_arguments": {"grpc.max_connection_age_ms": 2000, "grpc.lb_policy_name": "x"},
        },
        "message_bytes": 2**31 - 1,
        "rest_bytes": 64 * 1024 * 1024,
        "models": {
            "named": {"m": {"path": Path("/models/m"), "settings": NEWEST, "flat": False}},
            "poll_interval_ms": 0,
            "load_timeout_s": 900.0,
            "defaults": BATCHED,
        },
        "backends": {"tensorflow": {"intra_op_threads": 2, "inter_op_threads": 3}},
        "apis": {"tfserving": {"allow_remote_reload": True, "model_config_poll_interval_ms": 60_000}},
    }


@pytest.mark.parametrize(
    ("arguments", "on"),
    [
        (["--enable_batching"], True),
        (["--enable_batching", "--port=1"], True),
        (["--enable_batching=true"], True),
        (["--enable_batching", "true"], True),
        (["--enable_batching=false"], False),
        ([], False),
    ],
)
def test_a_boolean_needs_no_value(arguments: list[str], on: bool) -> None:
    config, _ = planned(*arguments, "--model_base_path=/m")
    assert ("batching" not in config.models.defaults) == on
    assert config.models.defaults.get("batching", {"enabled": False}) == {"enabled": False}


@pytest.mark.parametrize("flag", ["--rest_api_enable_cors_support", "--enable_cors_support"])
def test_cors_is_enabled_by_its_flag_alone(flag: str) -> None:
    assert not planned("--model_base_path=/m")[0].rest_cors
    assert planned("--model_base_path=/m", flag)[0].rest_cors
    assert not planned("--model_base_path=/m", f"{flag}=false")[0].rest_cors


def test_what_batching_parameters_have_that_is_not_served_is_said(tmp_path: Path) -> None:
    file = tmp_path / "batching.config"
    file.write_text("pad_variable_length_inputs: true")
    flags = ("--enable_batching", f"--batching_parameters_file={file}", "--model_base_path=/m")
    config, (_, note) = planned(*flags)
    assert "pad_variable_length_inputs has no effect" in note
    assert config.models.defaults["batching"] == {"enabled": "auto", "max_rows": 1000}
    file.write_text("max_batch_size { value: 8 } allowed_batch_sizes: 4")
    with pytest.raises(ConfigError, match="allowed_rows: the largest is 4, and max_rows 8"):
        planned(*flags)


def test_a_model_config_file_comes_before_a_model_of_the_command_line() -> None:
    config, notes = planned("--model_base_path=/m", "--model_name=m", "--model_config_file=/models.config")
    assert config.models.named == {}
    assert config.apis["tfserving"]["model_config_file"] == "/models.config"
    assert notes == ["--model_config_file is given: --model_name and --model_base_path are ignored", ANYBODY]
    assert config.models.defaults == DEFAULTS


def test_one_number_of_threads_stands_for_both() -> None:
    config, _ = planned("--model_base_path=/m", "--tensorflow_session_parallelism=4")
    assert config.backends == {"tensorflow": {"intra_op_threads": 4, "inter_op_threads": 4}}
    config, _ = planned("--model_base_path=/m", "--tensorflow_intra_op_parallelism=4")
    assert config.backends == {"tensorflow": {"intra_op_threads": 4}}


class Plain(GrpcioTransport):
    """A transport that does not know gRPC's channel arguments."""

    name = "plain"
    of_channel_arguments = classmethod(Transport.of_channel_arguments.__func__)  # type: ignore[attr-defined]


def test_channel_arguments_that_a_transport_does_not_know_are_told_to_be_ignored() -> None:
    given = "grpc.max_concurrent_streams=100,grpc.so_reuseport=0,grpc.keepalive_timeout_ms=x"
    config, notes = planned("--model_base_path=/m", f"--grpc_channel_arguments={given}", transport=Plain)
    assert config.transport_options == {}
    assert config.streams == 100
    assert notes == [
        "the transport plain has nothing like grpc.keepalive_timeout_ms, grpc.so_reuseport: ignored",
        ANYBODY,
    ]


def test_a_rest_port_that_is_the_grpc_port_and_metrics_without_a_port_are_told(tmp_path: Path) -> None:
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text("prometheus_config { enable: true }")
    config, notes = planned("--model_base_path=/m", "--rest_api_port=8500", f"--monitoring_config_file={monitoring}")
    assert config.http_port is None
    assert config.metrics_path == "/monitoring/prometheus/metrics"
    assert notes == [
        "--rest_api_port is --port, 8500: there is no port for REST alone",
        "--monitoring_config_file has no effect without --rest_api_port",
        ANYBODY,
    ]
    monitoring.write_text("prometheus_config { enable: false }")
    config, notes = planned("--model_base_path=/m", f"--monitoring_config_file={monitoring}")
    assert (config.metrics_path, notes) == ("/metrics", [ANYBODY])


WRONG = {
    "nothing to serve": ([], "nothing to serve: give --model_base_path=PATH or --model_config_file=FILE"),
    "no name": (["--model_base_path=/m", "--model_name="], "--model_name: the name is missing or empty"),
    "a name with a slash": (["--model_base_path=/m", "--model_name=a/b"], 'printable characters without "/"'),
    "a name that cannot be printed": (["--model_base_path=/m", "--model_name=a\n"], "no model can have that name"),
    "a path that cannot be printed": (["--model_base_path=/m\x01"], r"base_path is '/m\\x01'; expected printable"),
    "a folder elsewhere": (["--model_base_path=s3://m"], "expected a folder of this machine"),
    "batching parameters alone": (
        ["--model_base_path=/m", "--batching_parameters_file=FILE"],
        "--batching_parameters_file takes --enable_batching, too",
    ),
    "bad batching parameters": (
        ["--model_base_path=/m", "--enable_batching", "--batching_parameters_file=FILE"],
        'FILE: Error parsing text-format .*BatchingParameters: 1:1: .*no field named "nonsense". It has: max_batch',
    ),
    "a bad monitoring config": (
        ["--model_base_path=/m", "--monitoring_config_file=FILE"],
        "FILE: Error parsing text-format tensorflow.serving.MonitoringConfig: 1:1: ",
    ),
    "a missing file": (["--model_base_path=/m", "--monitoring_config_file=FILE.none"], "FILE.none: No such file"),
    "a channel argument without a value": (
        ["--model_base_path=/m", "--grpc_channel_arguments=grpc.x=1,grpc.y"],
        'has "grpc.y"; expected KEY=VALUE',
    ),
    "no streams": (
        ["--model_base_path=/m", "--grpc_channel_arguments=grpc.max_concurrent_streams=0"],
        "grpc.max_concurrent_streams=0; expected a number of 1 or more",
    ),
    "threads twice": (
        ["--model_base_path=/m", "--tensorflow_session_parallelism=1", "--tensorflow_intra_op_parallelism=1"],
        "give it or them",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_line_and_exit_status_2(tmp_path: Path, case: str) -> None:
    file = tmp_path / "FILE"
    file.write_text("nonsense: 1")
    arguments, said = WRONG[case]
    arguments = [argument.replace("=FILE", f"={file}") for argument in arguments]
    result = CliRunner().invoke(main, ["tfserving", "--transport=grpcio", *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.search(f"^error: .*{said}", line), line
    with pytest.raises(ConfigError, match=said):
        planned(*arguments)


def test_a_path_of_metrics_that_is_none_is_a_config_error(tmp_path: Path) -> None:
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text('prometheus_config { enable: true path: "metrics" }')
    with pytest.raises(ConfigError, match=f'^{monitoring}: prometheus_config.path is "metrics"; expected a path'):
        planned("--model_base_path=/m", f"--monitoring_config_file={monitoring}")


def test_an_unknown_flag_is_an_error_that_lists_those_it_knows() -> None:
    for flag in ("--rest_api_num_threads=4", "--worker_count", "--model-name=m"):
        result = CliRunner().invoke(main, ["tfserving", "--model_base_path=/m", flag])
        assert result.exit_code == 2
        assert (
            f"unknown flag {flag.partition('=')[0]}; known are: {' '.join([*FLAGS, LOG_LEVEL[0]])} --help"
            in result.stderr
        )


def test_help_tells_of_every_flag() -> None:
    result = CliRunner().invoke(main, ["tfserving", "-h"])
    assert result.exit_code == 0, result.output
    for flag in FLAGS:
        assert re.search(f"  {flag}[ ,]", result.output), flag
    assert f"  {', '.join(LOG_LEVEL)} " in result.output
    assert "--worker " not in result.output
    assert "0 runs a request's operations one after another on its own thread" in " ".join(result.output.split())


# What clients may say


async def test_a_server_that_begins_with_no_models_serves_at_once_and_takes_a_config(lab: Any) -> None:
    (lab.folder / "models.config").write_text("model_config_list {}")
    server = await lab.gateway('[apis.tfserving]\nmodel_config_file = "models.config"\nallow_remote_reload = true\n')
    method = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"
    request = messages.ReloadConfigRequest(config={"model_config_list": {}})
    answer = await server.start_call(method=method, body=request.SerializeToString())
    assert messages.ReloadConfigResponse.FromString(answer).status.error_code == 0
    request.config.model_config_list.config.add(name="m", base_path=str(lab.folder / "none"))
    code, said = await server.refusal(method=method, body=request.SerializeToString())
    assert code is Code.UNKNOWN
    assert said.startswith("1 servable(s) did not become available: {{name: m due to error: [Errno 2] No such file")


async def test_clients_may_not_change_the_models_without_leave(lab: Any) -> None:
    (lab.folder / "models").mkdir()
    config = lab.route(await lab.node()) + '[models]\ndirectory = "models"\n'
    server = await lab.gateway(config)
    request = messages.ReloadConfigRequest(config={"model_config_list": {}})
    method = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"
    code, said = await server.refusal(method=method, body=request.SerializeToString())
    assert code is Code.PERMISSION_DENIED
    assert "set allow_remote_reload = true under [apis.tfserving]" in said


def test_several_workers_take_no_config_of_clients(tmp_path: Path) -> None:
    config = Config(
        models=ModelsConfig(directory=tmp_path), workers=2, apis={"tfserving": {"allow_remote_reload": True}}
    )
    with pytest.raises(ConfigError, match=r"\[apis\.tfserving\]: allow_remote_reload needs workers = 1"):
        App(config, Plugins())


# A process that has them


def write_model(folder: Path, factor: float) -> None:
    """A SavedModel: y = factor · x, float32 of shape [?]."""
    import tensorflow as tf

    class Times(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.factor = tf.Variable(float(factor))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            return {"y": x * self.factor}

    module = Times()
    tf.saved_model.save(module, str(folder), signatures=module.__call__)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SavedModels by what they multiply with: "2", "3", "5"."""
    pytest.importorskip("dl_inference_tf_backend")
    root = tmp_path_factory.mktemp("saved")
    for factor in (2, 3, 5):
        write_model(root / str(factor), factor)
    return root


class Process:
    """`dl-inference-core tfserving`, and official clients of it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "dl_inference_core.cli", "tfserving", "--port=0", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text()

    def written(self, pattern: str, within_s: float = 240) -> str:
        """The group of the first line that fits."""
        found: list[str] = []

        def look() -> bool:
            assert self.popen.poll() is None, self.text()
            found[:] = re.findall(pattern, self.text(), re.MULTILINE)
            return bool(found)

        wait_for(look, within_s)
        return found[0]

    def end(self) -> int:
        """SIGTERM; returns the exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(20)


def wait_for(look: Callable[[], object], within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def predicted(channel: grpc.Channel, model: str, *, version: int | None = None, label: str = "") -> tuple[Any, int]:
    """What the model makes of [1, 10], and the version that answered."""
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    if version is not None:
        request.model_spec.version.value = version
    if label:
        request.model_spec.version_label = label
    request.inputs["x"].dtype = 1
    request.inputs["x"].tensor_shape.dim.add(size=2)
    request.inputs["x"].float_val[:] = [1, 10]
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=60)
    return list(response.outputs["y"].float_val), response.model_spec.version.value


def reload(channel: grpc.Channel, **models: Path) -> Any:
    from tensorflow_serving.apis import model_management_pb2, model_service_pb2_grpc

    request = model_management_pb2.ReloadConfigRequest()
    for name, path in models.items():
        request.config.model_config_list.config.add(name=name, base_path=str(path), model_platform="tensorflow")
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    return stub.HandleReloadConfigRequest(request, timeout=30).status


def states(channel: grpc.Channel, model: str) -> dict[int, str]:
    from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc

    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = model
    statuses = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(request, timeout=60)
    return {
        status.version: get_model_status_pb2.ModelVersionStatus.State.Name(status.state)
        for status in statuses.model_version_status
    }


def link(saved: Path, factor: int, folder: Path) -> Path:
    """`folder` becomes a version; returns the model's folder."""
    folder.parent.mkdir(exist_ok=True, parents=True)
    folder.symlink_to(saved / str(factor))
    return folder.parent


@pytest.fixture
def start(tmp_path: Path, transport: str) -> Iterator[Callable[..., Process]]:
    """Starts the command with flags beside `--port=0` and `--transport`."""
    processes: list[Process] = []

    def start(*flags: str) -> Process:
        processes.append(Process(tmp_path, f"--transport={transport}", *flags))
        return processes[-1]

    yield start
    for process in processes:
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait(10)


def test_one_model_is_served_to_official_clients_by_its_newest_version(
    start: Callable[..., Process], saved: Path, tmp_path: Path
) -> None:
    model = link(saved, 2, tmp_path / "m" / "1")
    with tempfile.TemporaryDirectory(prefix="dl-", dir="/tmp") as folder:
        socket_path = Path(folder) / "tf.sock"
        process = start(
            f"--model_base_path={model}",
            "--rest_api_port=0",
            f"--grpc_socket_path={socket_path}",
            "--tensorflow_intra_op_parallelism=1",
            "--grpc_channel_arguments=grpc.max_connection_age_ms=2000",
        )
        port = process.written(r"^serving on 0\.0\.0\.0:(\d+)$")
        assert re.search(r"^model  default/1 +ok +tensorflow, inputs: ", process.text(), re.MULTILINE)
        assert f"socket {socket_path}\n" in process.text()
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            grpc.insecure_channel(f"unix:{socket_path}") as unix,
        ):
            assert predicted(channel, "default") == predicted(unix, "default") == ([2, 20], 1)
            link(saved, 3, model / "2")
            wait_for(lambda: predicted(channel, "default") == ([3, 30], 2))
            wait_for(lambda: states(channel, "default").get(1) in (None, "END"))
            with pytest.raises(grpc.RpcError) as caught:
                predicted(channel, "none")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with grpc.insecure_channel(f"127.0.0.1:{port}") as ageing:
            left: list[grpc.ChannelConnectivity] = []
            ageing.subscribe(left.append, try_to_connect=True)
            ready, idle = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.IDLE
            wait_for(lambda: ready in left and idle in left[left.index(ready) :], 10)
        assert process.end() == 0
        assert not socket_path.exists()


def test_models_of_a_file_are_served_and_replaced_by_it_and_by_clients(
    start: Callable[..., Process], saved: Path, tmp_path: Path
) -> None:
    two = link(saved, 2, tmp_path / "two" / "1")
    link(saved, 3, tmp_path / "two" / "2")
    five = link(saved, 5, tmp_path / "five" / "1")
    broken = tmp_path / "broken"
    (broken / "7").mkdir(parents=True)
    (broken / "7" / "saved_model.pb").write_bytes(b"no model")
    first = (
        f'config {{ name: "two" base_path: "{two}" model_platform: "tensorflow" model_version_policy {{ all {{}} }} '
        'version_labels { key: "old" value: 1 } }'
    )
    file, monitoring = tmp_path / "models.config", tmp_path / "monitoring.config"
    file.write_text(f"model_config_list {{ {first} }}")
    monitoring.write_text("prometheus_config { enable: true }")
    rest = free_port()
    process = start(
        f"--model_config_file={file}",
        "--model_config_file_poll_wait_seconds=1",
        f"--rest_api_port={rest}",
        f"--monitoring_config_file={monitoring}",
    )
    port = process.written(r"^serving on 0\.0\.0\.0:(\d+)$")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert predicted(channel, "two") == ([3, 30], 2)
        assert predicted(channel, "two", version=1) == predicted(channel, "two", label="old") == ([2, 20], 1)
        with urllib.request.urlopen(f"http://127.0.0.1:{rest}/monitoring/prometheus/metrics", timeout=10) as answer:
            assert 'dl_inference_requests_total{code="OK"' in answer.read().decode()
        with urllib.request.urlopen(f"http://127.0.0.1:{rest}/v1/models/two", timeout=10) as answer:
            assert b"AVAILABLE" in answer.read()

        second = f'config {{ name: "five" base_path: "{five}" }}'
        file.write_text(f"model_config_list {{ {first} {second}")  # half of it
        wait_for(lambda: "keeping the current models" in process.text())
        assert predicted(channel, "two") == ([3, 30], 2)
        file.write_text(f"model_config_list {{ {first} {second} }}")
        wait_for(lambda: served(channel, "five"))
        assert predicted(channel, "five") == ([5, 50], 1)

        status = reload(channel, five=five, again=two)
        assert (status.error_code, status.error_message) == (0, "")
        assert predicted(channel, "again") == ([3, 30], 2)
        assert not served(channel, "two")
        with pytest.raises(grpc.RpcError) as caught:
            reload(channel, five=five, broken=broken)
        assert caught.value.code() is grpc.StatusCode.UNKNOWN
        assert "1 servable(s) did not become available: {{{name: broken version: 7} due to error: " in (
            caught.value.details() or ""
        )
        assert states(channel, "broken") == {7: "END"}
        assert predicted(channel, "five") == ([5, 50], 1)
    assert process.end() == 0


def served(channel: grpc.Channel, model: str) -> bool:
    try:
        predicted(channel, model)
    except grpc.RpcError as error:
        if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE):
            raise
        return False
    return True
