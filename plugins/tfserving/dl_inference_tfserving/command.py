"""The command `tfserving`: TensorFlow Serving's command line → our config → a process that serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from dl_inference_core.cli_options import fail, log_level_option, worker_option
from dl_inference_core.config import Config, ModelsConfig, NamedModel, validated
from dl_inference_core.cpus import cores
from dl_inference_core.errors import ConfigError, PluginError
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.serving import Serving
from dl_inference_core.transport import Limits, Transport
from dl_inference_core.wire import messages
from dl_inference_tfserving import model_config, text
from dl_inference_tfserving.api import TfServingApi

_METRICS_PATH = "/monitoring/prometheus/metrics"
_LARGEST_MESSAGE = 2**31 - 1
_LONGEST_REST_MS = 3_600_000
_LARGEST_REST_BODY = 64 * 1024 * 1024
_INT32 = range(-(2**31), 2**31)
_MOST_THREADS = 1024
_TENSORFLOWS_BATCH = 1000
"""Rows of a batch at most, where its parameters do not say."""
_STREAMS = "grpc.max_concurrent_streams"


class TfServingCommand(click.Command):
    """A command that answers an unknown flag with the flags that it knows."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = " ".join(parameter.opts[0] for parameter in self.params if not _hidden(parameter))
            raise click.UsageError(f"unknown flag {error.option_name}; known are: {known} --help", ctx) from None


def _hidden(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Option) and parameter.hidden


def _flag(*names: str, kind: Any, default: Any, metavar: str, words: str, **more: Any) -> Any:
    told = f"  [default: {default}]" if default != "" else ""
    return click.option(*names, type=kind, default=default, metavar=metavar, help=f"{words}{told}", **more)


def _switch(*names: str, words: str) -> Any:
    return _flag(
        *names, kind=bool, default="false", metavar="[true|false]", words=words, is_flag=False, flag_value="true"
    )


def _port(name: str, default: int, words: str) -> Any:
    return _flag(name, kind=click.IntRange(0, 65535), default=default, metavar="P", words=words)


def _number(name: str, default: int, words: str) -> Any:
    return _flag(name, kind=click.IntRange(0), default=default, metavar="N", words=words)


def _text(name: str, words: str, *, metavar: str = "PATH", default: str = "") -> Any:
    return _flag(name, kind=str, default=default, metavar=metavar, words=words)


_FLAGS = (
    _port("--port", 8500, "Listen for gRPC here, on every interface; 0 is any free port."),
    _text("--grpc_socket_path", "Listen for gRPC on this Unix-domain socket, too."),
    _port("--rest_api_port", 0, "Answer REST here, on every interface; 0 answers none on a port of its own."),
    _number("--rest_api_timeout_in_ms", 30000, "Milliseconds that a REST call may take."),
    _switch(
        "--rest_api_enable_cors_support",
        "--enable_cors_support",  # the option's name in TensorFlow Serving's code, by which some know it
        words="Send the headers by which browsers let web pages of any origin call REST (CORS).",
    ),
    _text("--model_name", "The name that clients ask for.", metavar="NAME", default="default"),
    _text("--model_base_path", "The folder of the one model, which holds a folder for each version: PATH/1, PATH/2."),
    _text(
        "--model_config_file",
        "Serve the models in this file, a ModelServerConfig in protobuf's text form; --model_name and "
        "--model_base_path are ignored then.",
        metavar="FILE",
    ),
    _number(
        "--model_config_file_poll_wait_seconds", 0, "Seconds between two looks at that file; 0 reads it once only."
    ),
    _number(
        "--file_system_poll_wait_seconds", 1, "Seconds between two looks for new versions; 0 looks at the start only."
    ),
    _switch(
        "--enable_batching",
        words="Have requests share calls of the models whose rows are independent of each other.",
    ),
    _text("--batching_parameters_file", "BatchingParameters in text form; with --enable_batching.", metavar="FILE"),
    _text(
        "--monitoring_config_file",
        f"A MonitoringConfig in text form: whether Prometheus gets metrics on the REST port at another path than "
        f"/metrics; {_METRICS_PATH}, if it says none.",
        metavar="FILE",
    ),
    _text(
        "--grpc_channel_arguments",
        "Settings of the gRPC server by gRPC's names, such as grpc.max_connection_age_ms=60000. It says which the "
        "transport has nothing like.",
        metavar="KEY=VALUE,...",
    ),
    _number("--tensorflow_session_parallelism", 0, "Both numbers of threads of TensorFlow's, in one; 0 says neither."),
    _number(
        "--tensorflow_intra_op_parallelism",
        0,
        "Threads for one operation of TensorFlow's; 0 is one for each CPU, or as many as a CPU quota allows.",
    ),
    _number(
        "--tensorflow_inter_op_parallelism",
        0,
        "Threads for operations of one request that need not wait for each other; 0 runs a request's operations one "
        "after another on its own thread.",
    ),
    _number(
        "--load_timeout_s",
        int(ModelsConfig().load_timeout_s),
        "Not TensorFlow Serving's: seconds that the load of a version may take, its warm-up included, before it "
        "counts as failed; 0 means no limit.",
    ),
    _text(
        "--transport",
        "Not TensorFlow Serving's: the network stack, by the name of an installed transport; auto takes the one with "
        "the highest priority.",
        metavar="NAME",
        default="auto",
    ),
)


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """The flags, as options of `command`."""
    for decorate in reversed(_FLAGS):
        command = decorate(command)
    return command


def config_of(given: Mapping[str, Any], transport: type[Transport]) -> tuple[Config, list[str]]:
    """What `flags` come to, and, a line each, what of it has no effect or should be known.

    Args:
        given: the flags' values, by their names; "" is as if left out.
        transport: what will serve.

    Raises:
        ConfigError: they say what cannot be.
    """
    notes: list[str] = []
    arguments = _channel_arguments(given["grpc_channel_arguments"])
    streams = _streams(arguments)
    options, ignored = transport.of_channel_arguments(arguments)
    if ignored:
        notes.append(f"the transport {transport.name} has nothing like {', '.join(sorted(ignored))}: ignored")
    http_port = given["rest_api_port"] or None
    if http_port is not None and http_port == given["port"]:
        notes.append(f"--rest_api_port is --port, {http_port}: there is no port for REST alone")
        http_port = None
    threads = _threads(given)
    config = Config(
        host="0.0.0.0",  # noqa: S104 - as TensorFlow Serving, for which this stands in
        port=given["port"],
        socket_path=Path(given["grpc_socket_path"]) if given["grpc_socket_path"] else None,
        http_port=http_port,
        rest_timeout_ms=min(given["rest_api_timeout_in_ms"], _LONGEST_REST_MS),
        rest_bytes=_LARGEST_REST_BODY,
        rest_cors=given["rest_api_enable_cors_support"],
        metrics_path=_metrics_path(given, transport, http_port, notes),
        transport=transport.name,
        transport_options=options,
        message_bytes=_LARGEST_MESSAGE,
        streams=streams,
        models=_models(given, notes),
        backends={"tensorflow": threads} if threads else {},
        apis={TfServingApi.name: _api(given)},
    )
    return config, notes


def _models(given: Mapping[str, Any], notes: list[str]) -> ModelsConfig:
    file, base_path, name = given["model_config_file"], given["model_base_path"], given["model_name"]
    named: dict[str, NamedModel] = {}
    if file:
        if base_path:
            notes.append("--model_config_file is given: --model_name and --model_base_path are ignored")
    elif base_path:
        named[model_config.checked_name(name, "--model_name")] = NamedModel(
            path=model_config.checked_path(base_path, "--model_base_path", Path()),
            settings={"versions": "newest", "keep_versions": 1},
            flat=False,
        )
    else:
        raise ConfigError("nothing to serve: give --model_base_path=PATH or --model_config_file=FILE")
    notes.append(
        "clients may have any folder of this machine served, by HandleReloadConfigRequest, as TensorFlow Serving's may"
    )
    return ModelsConfig(
        defaults={"threads": min(cores(), _MOST_THREADS), "check_shapes": False, **_batching(given, notes)},
        named=named,
        poll_interval_ms=1000 * given["file_system_poll_wait_seconds"],
        load_timeout_s=given["load_timeout_s"],
    )


def _api(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the API "tfserving"."""
    options: dict[str, Any] = {
        "model_config_poll_interval_ms": 1000 * given["model_config_file_poll_wait_seconds"],
        "allow_remote_reload": True,
    }
    if given["model_config_file"]:
        options["model_config_file"] = given["model_config_file"]
    return options


def _batching(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Keys of `model.toml`: how requests share calls, how many may wait, on how many threads."""
    if not given["enable_batching"]:
        if given["batching_parameters_file"]:
            raise ConfigError("--batching_parameters_file takes --enable_batching, too")
        return {"batching": {"enabled": False}, "warm_up": False}
    if not given["batching_parameters_file"]:
        return {}
    from dl_inference_core.node.batching import BatchingConfig  # a gateway's command line loads nothing of a node's

    file = Path(given["batching_parameters_file"])
    parameters = text.read(file, messages.BatchingParameters)
    rows = parameters.max_batch_size.value or _TENSORFLOWS_BATCH
    if parameters.HasField("max_execution_batch_size"):
        rows = min(rows, parameters.max_execution_batch_size.value)
    batching: dict[str, Any] = {"enabled": "auto", "max_rows": rows}
    if parameters.HasField("batch_timeout_micros"):
        batching["max_delay_us"] = parameters.batch_timeout_micros.value
    if parameters.allowed_batch_sizes:
        batching["allowed_rows"] = [size for size in parameters.allowed_batch_sizes if size <= rows]
    validated(BatchingConfig, batching, str(file))
    if parameters.pad_variable_length_inputs:
        notes.append(f"{file}: pad_variable_length_inputs has no effect: say the lengths under [batching.buckets]")
    settings: dict[str, Any] = {"batching": batching}
    if parameters.HasField("num_batch_threads"):
        settings["threads"] = max(1, min(parameters.num_batch_threads.value, _MOST_THREADS))
    if parameters.HasField("max_enqueued_batches"):
        settings["queue"] = {"max_requests": max(1, parameters.max_enqueued_batches.value) * rows}
    return settings


def _metrics_path(given: Mapping[str, Any], transport: type[Transport], port: int | None, notes: list[str]) -> str:
    if not given["monitoring_config_file"]:
        return "/metrics"
    file = Path(given["monitoring_config_file"])
    prometheus = text.read(file, messages.MonitoringConfig).prometheus_config
    if not prometheus.enable:
        return "/metrics"
    if port is None and not transport.http_on_same_port:
        notes.append("--monitoring_config_file has no effect without --rest_api_port")
    path: str = prometheus.path or _METRICS_PATH
    if not path.startswith("/") or set(path) & set("{}"):
        raise ConfigError(f'{file}: prometheus_config.path is "{path}"; expected a path that begins with "/"')
    return path


def _threads(given: Mapping[str, Any]) -> dict[str, int]:
    """Options of the backend "tensorflow"."""
    both, intra, inter = (given[f"tensorflow_{kind}_parallelism"] for kind in ("session", "intra_op", "inter_op"))
    if both and (intra or inter):
        raise ConfigError(
            "--tensorflow_session_parallelism stands for --tensorflow_intra_op_parallelism and "
            "--tensorflow_inter_op_parallelism; give it or them"
        )
    threads = {"intra_op_threads": intra or both, "inter_op_threads": inter or both}
    return {option: number for option, number in threads.items() if number}


def _streams(arguments: dict[str, int | str]) -> int:
    """What they say of our key `streams`; it is taken out of them.

    Raises:
        ConfigError: that is no number of streams.
    """
    streams = arguments.pop(_STREAMS, Limits().streams)
    if not isinstance(streams, int) or streams < 1:
        raise ConfigError(f"--grpc_channel_arguments has {_STREAMS}={streams}; expected a number of 1 or more")
    return streams


def _channel_arguments(written: str) -> dict[str, int | str]:
    """By name; what is a number of 32 bits is one, as in TensorFlow Serving.

    Raises:
        ConfigError: one is not written KEY=VALUE.
    """
    arguments: dict[str, int | str] = {}
    for argument in filter(None, written.split(",")):
        name, equals, value = argument.partition("=")
        if not (name and equals):
            raise ConfigError(f'--grpc_channel_arguments has "{argument}"; expected KEY=VALUE,KEY=VALUE')
        try:
            number = int(value)
        except ValueError:
            arguments[name] = value
        else:
            arguments[name] = number if number in _INT32 else value
    return arguments


@click.command(cls=TfServingCommand)
@flags
@log_level_option("--log_level", "--log-level")
@worker_option
def tfserving(log_level: str | None, worker: bool, **given: Any) -> None:
    """Serve as TensorFlow Serving would with the same flags.

    \b
    One model:   dl-inference-core tfserving --model_name=digits --model_base_path=/models/digits
    Several:     dl-inference-core tfserving --model_config_file=/models/models.config --rest_api_port=8501

    TensorFlow's models take the plugin dl-inference-tf-backend; models of any other backend are served alike. The
    newest version of a model is served, if its config says nothing else, and its predecessor until that has loaded.

    Listens at once. Prints what it serves, then "serving on HOST:PORT", when every model has loaded, failed or passed
    its load timeout, and requests would succeed. On SIGTERM or Ctrl-C it finishes what is in flight, then ends. On
    SIGHUP it looks for new versions and a changed --model_config_file at once.
    """
    plugins = Plugins()
    try:
        name, why = plugins.choose_transport(given["transport"])
        config, notes = config_of(given, plugins.get(Kind.TRANSPORTS, name, "--transport"))
    except (ConfigError, PluginError) as error:
        fail(error)
    for note in notes if not worker else ():
        click.echo(f"note: {note}", err=True)
    again = ["tfserving", *(f"--{name}={value}" for name, value in given.items())]
    if log_level is not None:
        again.append(f"--log_level={log_level}")
    Serving(config, None, plugins, f"transport {name}: {why}", describes=True).start(worker, again)
