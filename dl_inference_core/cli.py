"""Arguments → Config → App."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import click

import dl_inference_core
from dl_inference_core import config as configs
from dl_inference_core.cli_options import (
    CONFIG_EXIT,
    client_tls,
    fail,
    log_level_option,
    seconds,
    tls_options,
    told_failures,
    worker_option,
)
from dl_inference_core.config import Config
from dl_inference_core.errors import ConfigError, PluginError
from dl_inference_core.plugins import Kind, Plugins, Provided
from dl_inference_core.serving import Serving, in_a_line, run_coroutine

_JOIN = {"join": "gateways", "join_token_file": "token_file", "advertise": "advertise"}


class _Commands(click.Group):
    """The core's commands, and those of plugins, which are loaded when one of them is wanted. A broken plugin breaks
    no other command: `dl-inference-core plugins` says what is wrong with it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._of_plugins})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or self._of_plugins.get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError("; ".join((error.message, *self._plugins.hints(args[0]))), ctx) from None

    @cached_property
    def _plugins(self) -> Plugins:
        _prepare()
        with contextlib.redirect_stdout(sys.stderr):  # what plugins print is not the command's output
            return Plugins()

    @cached_property
    def _of_plugins(self) -> Mapping[str, click.Command]:
        with contextlib.redirect_stdout(sys.stderr):
            return self._plugins.commands(self.commands)


def _prepare() -> None:
    """What comes before the first plugin is imported."""
    # gRPC's hooks of a fork stop its threads for that time if they are idle, and then the child often dies by SIGSEGV.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dl_inference_core.__version__)
def main() -> None:
    """Serve deep learning models, and balance requests over many nodes that do, on one gRPC port.

    \b
    A node:      dl-inference-core serve models/
    A gateway:   dl-inference-core serve --nodes nodefile.txt
    From a file: dl-inference-core serve --config server.toml
    """
    _prepare()


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
@click.option("--http-port", type=click.IntRange(0, 65535), metavar="P", help="Metrics, health and REST by HTTP.")
@click.option(
    "--workers", type=click.IntRange(1, 256), metavar="N", help="Processes that share the port.  [default: 1]"
)
@click.option("--join", metavar="HOST:PORT[,…]", help="Register the models with these gateways, and stay registered.")
@click.option(
    "--join-token-file", type=click.Path(path_type=Path), metavar="FILE", help="The gateways' token is its first line."
)
@click.option("--advertise", metavar="HOST:PORT", help="Where gateways reach this node.  [default: where it listens]")
@log_level_option("--log-level")
@worker_option
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
        fail(error)
    config = config.model_copy(update={"transport": name})
    given = {"config": config_file, "nodes": nodes, "log_level": log_level, **flags}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    again = ["serve", *options, *(["--", str(models)] if models is not None else [])]
    Serving(config, config_file, plugins, f"transport {name}: {why}").start(worker, again)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def plugins(as_json: bool) -> None:
    """List the installed plugins: from where, which version, what they provide and what for, the options with their
    defaults, and what is broken and why."""
    with contextlib.redirect_stdout(sys.stderr):  # what plugins print is not part of the list
        installed = Plugins()
        installed.commands(main.commands)
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
                "commands": plugin.commands,
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
        for name in plugin.commands:
            click.echo(f"  {'command':<10}{name}")
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
@log_level_option("--log-level")
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
        run_coroutine(load())
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        for row in rows:
            click.echo(in_a_line(row))
    if not all(row["ok"] for row in rows):
        sys.exit(CONFIG_EXIT)


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
    type=seconds,
    default="10s",
    show_default=True,
    metavar="TIME",
    help="How long to wait for the answer.",
)
@tls_options
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
    with told_failures(), Client(address, timeout_s=timeout, tls=client_tls(certificates)) as client:
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


def _config(models: Path | None, config_file: Path | None, nodes: Path | None, flags: dict[str, Any]) -> Config:
    try:
        config = configs.load(config_file) if config_file is not None else Config()
    except ConfigError as error:
        fail(error)
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
            fail(error)
    if models is not None:
        update["models"] = config.models.model_copy(update={"directory": models})
    if nodes is not None:
        update["gateway"] = config.gateway.model_copy(update={"nodefile": nodes})
    return config.model_copy(update=update)


if __name__ == "__main__":
    main()
