"""Arguments → Config → App."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import dl_inference_core
from dl_inference_core import children, sockets, tfserving_command
from dl_inference_core import config as configs
from dl_inference_core.config import Config
from dl_inference_core.errors import ConfigError, InferenceError, PluginError
from dl_inference_core.plugins import Kind, Plugins, Provided
from dl_inference_core.supervisor import RELOAD, Heartbeat, Place, Supervisor

if TYPE_CHECKING:
    from dl_inference_core.app import App

_CONFIG_EXIT = 2
_JOIN = {"join": "gateways", "join_token_file": "token_file", "advertise": "advertise"}

_LOG_LEVELS = ("debug", "info", "warning", "error")
_LIBRARIES = ("absl", "asyncio", "grpc", "tensorflow", "torch", "uvicorn")
"""Loggers that say nothing below WARNING, whatever --log-level is: at INFO and DEBUG they tell of their own insides, a
line for each step of a compilation or a connection."""

_YOUNG = 5_000
"""Objects that are made, and not freed, from one garbage collection to the next."""
new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with contextlib.suppress(ImportError):
    from uvloop import new_event_loop


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dl_inference_core.__version__)
def main() -> None:
    """Serve deep learning models, and balance requests over many nodes that do, on one gRPC port.

    \b
    A node:      dl-inference-core serve models/
    A gateway:   dl-inference-core serve --nodes nodefile.txt
    From a file: dl-inference-core serve --config server.toml
    """
    # gRPC's hooks of a fork stop its threads for that time if they are idle, and then the child often dies by SIGSEGV.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def _log_level(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option that says from which level on log lines are written to standard error. Worker processes are given it,
    too."""

    def take(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
        if value is not None:
            logging.getLogger().setLevel(value.upper())
            for library in _LIBRARIES:
                logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger().level))
        return value

    return click.option(
        *names,
        type=click.Choice(_LOG_LEVELS, case_sensitive=False),
        callback=take,
        help="Write log lines of this level and above, those of handlers included, to standard error; info says which "
        "version of a model has loaded.  [default: warning]",
    )


def _sources(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments that say what is served."""
    for decorate in (
        click.option(
            "--nodes",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Forward to the nodes in FILE, lines of taskid=timeout_ms,host:port,…; re-read while running.",
        ),
        click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A TOML file; its routes are re-read while running. See docs/configuration.md.",
        ),
        click.argument("models", type=click.Path(path_type=Path), required=False),
    ):
        command = decorate(command)
    return command


@main.command()
@_sources
@click.option("--host", metavar="H", help="Listen on this address only.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), metavar="P", help="0 is any free one.  [default: 8500]")
@click.option("--http-port", type=click.IntRange(0, 65535), metavar="P", help="REST, metrics and health by HTTP.")
@click.option(
    "--workers", type=click.IntRange(1, 256), metavar="N", help="Processes that share the port.  [default: 1]"
)
@click.option("--join", metavar="HOST:PORT[,…]", help="Register the models with these gateways, and stay registered.")
@click.option(
    "--join-token-file", type=click.Path(path_type=Path), metavar="FILE", help="The gateways' token is its first line."
)
@click.option("--advertise", metavar="HOST:PORT", help="Where gateways reach this node.  [default: where it listens]")
@_log_level("--log-level")
@click.option("--worker", is_flag=True, hidden=True, help="A supervisor says the rest on standard input.")
def serve(
    models: Path | None,
    config_file: Path | None,
    nodes: Path | None,
    log_level: str | None,
    worker: bool,
    **flags: Any,
) -> None:
    """Serve the models in the folder MODELS, the routes of a config, or both.

    MODELS holds a folder for each model, and that a folder for each version: MODELS/NAME/1/model.pt2. New
    versions are picked up while running.

    Listens at once. Prints "serving on HOST:PORT" when every model has loaded, failed or passed its load timeout,
    and requests would succeed. On SIGTERM or Ctrl-C it finishes what is in flight, then ends. On SIGHUP it looks for
    changes at once: new versions, routes, nodes.
    """
    config = _config(models, config_file, nodes, flags)
    plugins = Plugins()
    try:
        name, why = plugins.choose_transport(config.transport)
    except (ConfigError, PluginError) as error:
        _fail(error)
    config = config.model_copy(update={"transport": name})
    given = {"config": config_file, "nodes": nodes, "log_level": log_level, **flags}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    again = ["serve", *options, *(["--", str(models)] if models is not None else [])]
    _serve(Serving(config, config_file, plugins, f"transport {name}: {why}"), worker, again)


@main.command(cls=tfserving_command.TfServingCommand)
@tfserving_command.flags
@_log_level("--log_level", "--log-level")
@click.option("--worker", is_flag=True, hidden=True, help="A supervisor says the rest on standard input.")
def tfserving(log_level: str | None, worker: bool, **flags: Any) -> None:
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
        name, why = plugins.choose_transport(flags["transport"])
        config, notes = tfserving_command.config_of(flags, plugins.get(Kind.TRANSPORTS, name, "--transport"))
    except (ConfigError, PluginError) as error:
        _fail(error)
    for note in notes if not worker else ():
        click.echo(f"note: {note}", err=True)
    again = ["tfserving", *(f"--{name}={value}" for name, value in flags.items())]
    if log_level is not None:
        again.append(f"--log_level={log_level}")
    _serve(Serving(config, None, plugins, f"transport {name}: {why}", describes=True), worker, again)


def _serve(serving: Serving, worker: bool, again: list[str]) -> None:
    """Serve in this process, or have others do it.

    Args:
        worker: whether a supervisor has started this process.
        again: the command line that says the same.
    """
    # A service manager may send it at any time. There is nothing to reload before the start is over.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    config = serving.config
    if worker:
        _run(serving.as_worker())
    elif config.workers > 1:
        try:  # once, rather than in each worker
            serving.plugins.make(Kind.TRANSPORTS, config.transport, config.transport_options, "transport")
        except (ConfigError, PluginError) as error:
            _fail(error)
        command, *rest = again
        program = (sys.executable, "-m", "dl_inference_core.cli", command, "--worker", *rest)
        # uvloop makes no process groups.
        _run(Supervisor(config, program, serving.transport).run(), asyncio.new_event_loop)
    else:
        _run(serving.run())


@dataclass(frozen=True, slots=True)
class Serving:
    """One process that serves.

    Attributes:
        transport: which one serves, and why.
        describes: whether it prints each model and node.
    """

    config: Config
    config_file: Path | None
    plugins: Plugins
    transport: str
    describes: bool = False

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; reload at SIGHUP."""
        ending, reloading = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ending.set)
        loop.add_signal_handler(signal.SIGHUP, reloading.set)
        await self._until(asyncio.create_task(ending.wait()), reloading, self.config, None)

    async def as_worker(self) -> None:
        """Wait to be told the place, then serve until standard input ends: on the port of all workers, and on this
        worker's own port, by which it is known. Reload when the supervisor says so, or at SIGHUP."""
        importlib.import_module("dl_inference_core.app")  # what takes longest, before the place is known
        stdin = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
        told = await stdin.readline()
        if not told.endswith(b"\n"):
            return
        place = Place.parse(told.decode().rstrip("\n"))
        config = self.config
        if config.http_port:
            config = config.model_copy(update={"http_port": config.http_port + place.index})
        if config.socket_path is not None:
            path = config.socket_path.with_name(f"{config.socket_path.name}-{place.index}")
            config = config.model_copy(update={"socket_path": path})
        reloading = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloading.set)

        async def obey() -> None:
            """Until standard input ends: it is closed to end this worker, or the supervisor has ended."""
            while await stdin.readline() == RELOAD:
                reloading.set()

        ending = asyncio.create_task(obey())
        try:
            await self._until(
                ending, reloading, config, place, *(f"{config.host}:{port}" for port in (place.own, place.port))
            )
        finally:
            sockets.remove_left(place.folder)  # if the supervisor was killed

    async def _until(
        self,
        ending: asyncio.Task[Any],
        reloading: asyncio.Event,
        config: Config,
        place: Place | None,
        *addresses: str,
    ) -> None:
        from dl_inference_core.app import App
        from dl_inference_core.gateway.sharing import Share

        share = Share(place.folder, place.index) if place is not None else None
        app = App(config, self.plugins, config_file=self.config_file, share=share)
        children.isolate_children(lambda: app.own_sockets(*((place.folder,) if place is not None else ())))
        following = asyncio.create_task(_reload(app, reloading), name="reload at SIGHUP")
        # What holds up the event loop until here are imports.
        heart = Heartbeat(place.folder, config.hang_s) if place is not None and config.hang_s else None
        try:
            vacated = place is not None and place.vacated
            starting = asyncio.create_task(
                app.serve(*addresses, share_port=bool(addresses), listen_when_loaded=vacated)
            )
            await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            port = starting.result()[0]
            for row in app.describe() if self.describes else ():
                click.echo(_in_a_line(row))
            if app.http_port is not None:
                click.echo(f"http on http://{config.host}:{app.http_port}")
            if config.socket_path is not None:
                click.echo(f"socket {config.socket_path}")
            if place is None:  # else the supervisor says it once
                click.echo(self.transport)
            _settle()
            click.echo(f"serving on {config.host}:{port}")
            await ending
        finally:
            following.cancel()
            await app.close()
            if heart is not None:
                heart.close()


async def _reload(app: App, asked: asyncio.Event) -> None:
    """Reload whenever `asked` is set; once for all that ask meanwhile."""
    while True:
        await asked.wait()
        asked.clear()
        await app.reload()


def _settle() -> None:
    """What is there once everything has started stays: the garbage collector passes over it, and comes so seldom that
    requests have ended before. By Python's own settings it looks at each of them several times, which takes a tenth of
    a busy server's time. A model frees its memory all the same when it is unloaded (`node/reclaiming.py`)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def plugins(as_json: bool) -> None:
    """List the installed plugins: from where, which version, what they provide and what for, the options with their
    defaults, and what is broken and why."""
    with contextlib.redirect_stdout(sys.stderr):  # what plugins print is not part of the list
        installed = Plugins()
        found = installed.describe()
        provided = {
            (kind, name): installed.provided(kind, name)
            for plugin in found
            for kind, names in plugin.provides.items()
            for name in names
        }
    if as_json:
        rows = [
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "provides": {kind.name.lower(): names for kind, names in plugin.provides.items()},
                "described": {
                    kind.name.lower(): {name: asdict(provided[kind, name]) for name in names}
                    for kind, names in plugin.provides.items()
                },
                "error": plugin.error,
            }
            for plugin in found
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    for plugin in found:
        click.echo(f"{plugin.name}  ({plugin.distribution} {plugin.version})")
        for kind in Kind:
            for name in plugin.provides.get(kind, ()):
                click.echo(f"  {kind.value:<10}{name}")
                for line in _lines(provided[kind, name]):
                    click.echo(click.wrap_text(line, 120, " " * 14, " " * 14))
        if plugin.error:
            click.echo(f"  broken    {plugin.error}")
    transport, codec = installed.choose_transport("auto")[0], installed.choose_codecs("auto")[0]
    click.echo(f'"auto" in a config is the transport {transport} and the codec {codec} here')


def _lines(provided: Provided) -> Iterator[str]:
    if provided.purpose:
        yield provided.purpose
    if provided.options:
        given = {name: "" if value is None else f" = {json.dumps(value)}" for name, value in provided.options.items()}
        yield "options: " + ", ".join(f"{name}{value}" for name, value in given.items())


@main.command()
@_sources
@_log_level("--log-level")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def check(
    models: Path | None,
    config_file: Path | None,
    nodes: Path | None,
    log_level: str | None,  # taken by its callback
    as_json: bool,
) -> None:
    """Load everything that `serve` would, without serving, and say what is right and wrong with it: models, nodes, the
    files of TLS. A handler is run on sample requests.

    Exits with 0 if all of it can be served, else with 2.
    """
    config = configs.resolved(_config(models, config_file, nodes, {}))
    rows: list[dict[str, Any]] = []

    async def load() -> None:
        from dl_inference_core.app import App
        from dl_inference_core.checking import check

        plugins = Plugins()
        update = {"transport": plugins.choose_transport(config.transport)[0]}
        app = App(config.model_copy(update=update), plugins, config_file=config_file)
        try:
            rows.extend(await check(app, config))
        finally:
            await app.close()

    with contextlib.redirect_stdout(sys.stderr):  # what plugins, models and handlers print is not part of the list
        _run(load())
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        for row in rows:
            click.echo(_in_a_line(row))
    if not all(row["ok"] for row in rows):
        sys.exit(_CONFIG_EXIT)


def _in_a_line(row: dict[str, Any]) -> str:
    """What `App.describe` says of one model or node."""
    return f"{row['kind']:<7}{row['name']:<30}{'ok' if row['ok'] else 'FAILED':<8}{row['detail']}"


def _tls(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments that say how a client speaks TLS; `_secured` reads them."""
    path = click.Path(path_type=Path)
    for decorate in (
        click.option(
            "--server-name", metavar="NAME", help="What the server's certificate must say.  [default: its host]"
        ),
        click.option("--key", type=path, help="The certificate's private key."),
        click.option("--certificate", type=path, help="Show this certificate; with --key."),
        click.option("--ca", type=path, help="Trust these authorities.  [default: the system's]"),
        click.option("--tls", is_flag=True, help="Speak TLS. Each of the options below says so, too."),
    ):
        command = decorate(command)
    return command


def _secured(given: dict[str, Any]) -> configs.ClientTls | None:
    """Raises:
    ConfigError: certificate and key do not go together.
    """
    stated = {name: value for name, value in given.items() if name != "tls" and value is not None}
    return configs.validated(configs.ClientTls, stated, "TLS") if given["tls"] or stated else None


def _seconds(text: str) -> float:
    """The seconds in a duration such as "10s", "500ms", "2m" or "1h". A number without a unit is refused: in a command
    that reports milliseconds "20" would be read either way."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if found is None:
        if re.fullmatch(r"\d+(?:\.\d+)?", text):
            raise click.BadParameter(f'"{text}" has no unit; write {text}ms, {text}s, {text}m (minutes) or {text}h')
        raise click.BadParameter(
            f'"{text}" is not a duration; expected a number with the unit ms, s, m (minutes) or h, such as 500ms or 10s'
        )
    return float(found[1]) * {"ms": 1e-3, "s": 1, "m": 60, "h": 3600}[found[2]]


@main.command()
@click.argument("model")
@click.option("--address", default="127.0.0.1:8500", show_default=True, metavar="HOST:PORT")
@click.option("--data", metavar="JSON", help='Tensors: {"x": [[1, 2]]}, or [[1, 2]] for one without a name.')
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Send its bytes.")
@click.option("--text", help="Send text.")
@click.option("--dtype", default="float32", show_default=True, help="numpy's name of the tensors' dtype.")
@click.option(
    "--protocol",
    type=click.Choice(["openinference", "tfserving", "seldon"]),
    help="[default: openinference for named tensors, else seldon]",
)
@click.option("--version", type=int, default=None, metavar="N", help="The model's version.  [default: the newest]")
@click.option(
    "--timeout",
    type=_seconds,
    default="10s",
    show_default=True,
    metavar="TIME",
    help="How long to wait for the answer.",
)
@_tls
def predict(
    model: str,
    address: str,
    data: str | None,
    file: Path | None,
    text: str | None,
    dtype: str,
    protocol: str | None,
    version: int | None,
    timeout: float,
    **certificates: Any,
) -> None:
    """Send one request to MODEL, a name or a task id, and print the answer as JSON.

    \b
    dl-inference-core predict digits --file seven.png
    dl-inference-core predict mmoe --data '{"features": [[0.1, 0.2]]}'
    """
    from dl_inference_core.client import Client
    from dl_inference_core.tensors import as_json

    if sum(given is not None for given in (data, file, text)) != 1:
        raise click.UsageError("give one of --data, --file and --text")
    payload = _tensors(data, dtype) if data is not None else file.read_bytes() if file is not None else text
    with _told_failures(), Client(address, timeout_s=timeout, tls=_secured(certificates)) as client:
        response = client.predict(model, payload, protocol=protocol, version=version)
    answer = {"model": response.model, "version": response.version, "answer": as_json(response.payload)}
    click.echo(json.dumps(answer))


def _tensors(data: str, dtype: str) -> Any:
    import numpy as np

    try:
        value = json.loads(data)
        if isinstance(value, dict):
            return {name: np.asarray(item, dtype=dtype) for name, item in value.items()}
        return np.asarray(value, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"--data is no JSON of tensors of dtype {dtype}: {error}") from error


def _numbers(kind: type[int] | type[float]) -> Callable[[str], tuple[float, ...]]:
    """What reads numbers above zero with commas between them."""

    def read(text: str) -> tuple[float, ...]:
        try:
            numbers = tuple(kind(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            raise click.BadParameter(f'"{text}" is no list of numbers above 0; expected one like 1,8,32')
        return numbers

    return read


@main.command(short_help="Load a server and measure its throughput and latency.")
@click.argument("address", metavar="HOST:PORT")
@click.option("--model", metavar="NAME", help="A model's name, or a task id.")
@click.option(
    "--protocol",
    type=click.Choice(["openinference", "tfserving", "seldon"]),
    default="openinference",
    show_default=True,
)
@click.option("--version", type=int, metavar="N", help="The model's version.  [default: the newest]")
@click.option(
    "--input",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Send the tensors in FILE: .npz, or .json as in {"x": [[1, 2]]}. With seldon any other file as bytes.',
)
@click.option("--dtype", help="Of the tensors in JSON, by numpy's name.  [default: the model's, else float32]")
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Of the tensors that are made.  [default: 1]")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Send FILE as it is, a serialized message; with --method.",
)
@click.option("--method", metavar="/PKG.SERVICE/METHOD", help="What to call with --data.")
@click.option("--in-flight", type=_numbers(int), metavar="N[,…]", help="Closed loop: requests at once.  [default: 1]")
@click.option("--rate", type=_numbers(float), metavar="R[,…]", help="Open loop: requests per second.")
@click.option("--poisson", is_flag=True, help="With --rate: due at random, as from many users, not evenly.")
@click.option("--duration", type=_seconds, default="10s", show_default=True, metavar="TIME", help="Of each load.")
@click.option("--requests", type=click.IntRange(1), metavar="N", help="Send so many, in place of --duration.")
@click.option("--warm-up", type=_seconds, default="1s", show_default=True, metavar="TIME", help="Before each load.")
@click.option("--timeout", type=_seconds, default="10s", show_default=True, metavar="TIME", help="Of one request.")
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="That share the load.")
@click.option("--connections", type=click.IntRange(1), metavar="N", help="Of all together.  [default: one a process]")
@click.option("--json", "json_file", metavar="FILE", help='Write all figures; "-" is standard output.')
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw latencies.")
@click.option(
    "--compare",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show the ratio to the figures that --json wrote to this file.",
)
@_tls
def bench(address: str, **given: Any) -> None:
    """Load the server at HOST:PORT (or unix:/path), and print throughput and latency as a table.

    \b
    As fast as 1, 8 and 32 clients can, each of whom waits for its answer:
      dl-inference-core bench 127.0.0.1:8500 --model ranking --in-flight 1,8,32
    500 and then 1000 requests a second, as from many users who do not wait for each other:
      dl-inference-core bench 127.0.0.1:8500 --model ranking --rate 500,1000 --poisson
    The request is made from the model's signature, with 64 rows; or it is what you give:
      dl-inference-core bench 127.0.0.1:8500 --model ranking --rows 64
      dl-inference-core bench 127.0.0.1:8500 --model ranking --protocol tfserving --input features.json
      dl-inference-core bench 127.0.0.1:8500 --model digits --protocol seldon --input seven.png
      dl-inference-core bench 127.0.0.1:8500 --data request.bin --method /package.Service/Method
    Before and after a change:
      dl-inference-core bench 127.0.0.1:8500 --model ranking --json before.json
      dl-inference-core bench 127.0.0.1:8500 --model ranking --compare before.json --plot both.png

    With --rate latency counts from when a request was due, so that a server that stalls is seen by all the requests
    that would have come meanwhile. The table says so when the client was slower than asked for; more --processes help.

    Exits with 0 if every request was answered well; 1 if any failed or was not sent, or the first one did; 2 if
    arguments or files cannot be used. docs/bench.md has more.
    """
    with _extra("bench", given["plot"]):
        from dl_inference_core.load_testing import command
    wanted = {name: given.pop(name) for name in ("tls", "ca", "certificate", "key", "server_name")}
    with _told_failures():
        good = command.run(address, _secured(wanted), **given)
    if not good:
        sys.exit(1)


@main.command(short_help="Find the settings at which a model answers most within a p99.")
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--p99", type=_seconds, required=True, metavar="TIME", help="Within that 99 % of requests are answered.")
@click.option("--budget", type=_seconds, default="2m", show_default=True, metavar="TIME", help="For all of it.")
@click.option(
    "--in-flight",
    type=_numbers(int),
    default="1,8,32,128",
    show_default=True,
    metavar="N[,…]",
    help="Requests at once, that each setting is loaded with.",
)
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Of the tensors that are made.  [default: 1]")
@click.option(
    "--input",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Send the tensors in FILE: .npz, or .json as in {"x": [[1, 2]]}. With seldon any other file as bytes.',
)
@click.option(
    "--protocol",
    type=click.Choice(["openinference", "tfserving", "seldon"]),
    default="openinference",
    show_default=True,
)
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="That share the load.")
@click.option("--transport", metavar="NAME", help="The network stack.  [default: the config's, else auto]")
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The server's: backends, models.defaults, transport and message_bytes hold here, too.",
)
@click.option("--dry-run", is_flag=True, help="Leave model.toml as it is.")
@click.option("--json", "json_file", metavar="FILE", help='Write all figures; "-" is standard output.')
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw all of them.")
def tune(model: Path, **given: Any) -> None:
    """Find the settings at which the model in the folder MODEL answers the most requests a second, 99 % of them within
    --p99, and write them into its model.toml.

    MODEL is a model's folder, whose newest version is tuned, or a version's. It is served on this machine, once for
    each of the settings: batching.max_rows, batching.max_delay_us, instances, and the backend's intra_op_threads, which
    belong to the server's config, so that they are said and not written.

    \b
    Most requests of one row:
      dl-inference-core tune models/ranking --p99 20ms
    Of 16 rows, looked at for ten minutes; draw what was tried, and write nothing:
      dl-inference-core tune models/ranking --p99 20ms --rows 16 --budget 10m --plot tried.png --dry-run
    With a request of your own, and your server's config:
      dl-inference-core tune models/digits --p99 50ms --protocol seldon --input seven.png --config server.toml

    The best and what the model had are then measured in turns; model.toml is written only if the gain is more than what
    the turns differ by, comments and all other keys in it stay. A server that has the model takes it up by itself.

    Exits with 0 if any of the settings reach the p99, whether or not they are better; 1 if none do, or the model cannot
    be served; 2 if arguments or files cannot be used. docs/tuning.md has more.
    """
    with _extra("tune", given["plot"]):
        from dl_inference_core.tuning import command
    with _told_failures():
        reached = command.run(model, **given)
    if not reached:
        sys.exit(1)


@contextlib.contextmanager
def _extra(command: str, plot: Path | None) -> Iterator[None]:
    """While a command's own packages are imported; and what draws, if there is something to be drawn."""
    try:
        yield
        if plot is not None:
            importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        _fail(ConfigError(f"{command} needs the package {error.name}: pip install 'dl-inference-core[bench]'"))


@contextlib.contextmanager
def _told_failures() -> Iterator[None]:
    """Ends with 2 for what cannot be used, and with 1 for a server's error, in a line each."""
    try:
        yield
    except ConfigError as error:
        _fail(error)
    except InferenceError as error:
        click.echo(f"error: {error.code.name}: {error}", err=True)
        sys.exit(1)


def _config(models: Path | None, config_file: Path | None, nodes: Path | None, flags: dict[str, Any]) -> Config:
    try:
        config = configs.load(config_file) if config_file is not None else Config()
    except ConfigError as error:
        _fail(error)
    update = {name: value for name, value in flags.items() if value is not None}
    if "host" in update:
        update["host"] = configs.bracketed(update["host"])
    join = {key: update.pop(flag) for flag, key in _JOIN.items() if flag in update}
    if join:
        if "gateways" in join:
            join["gateways"] = join["gateways"].split(",")
        known = config.join.model_dump() if config.join is not None else {}
        try:
            update["join"] = configs.validated(configs.JoinConfig, {**known, **join}, "--join")
        except ConfigError as error:
            _fail(error)
    if models is not None:
        update["models"] = config.models.model_copy(update={"directory": models})
    if nodes is not None:
        update["gateway"] = config.gateway.model_copy(update={"nodefile": nodes})
    return config.model_copy(update=update)


def _run(work: Coroutine[Any, Any, None], new_loop: Callable[[], asyncio.AbstractEventLoop] = new_event_loop) -> None:
    """Run `work` on an event loop of its own."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        try:
            runner.run(_failing(work))
        except BaseException as error:
            # Before the runner has a child go through the parent's clean-up: a plugin forked on the event loop.
            children.end_child(error)
            raise


async def _failing(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except (ConfigError, PluginError) as error:
        _fail(error)


def _fail(error: InferenceError) -> Any:
    click.echo(f"error: {error}", err=True)
    sys.exit(_CONFIG_EXIT)


if __name__ == "__main__":
    main()
