"""What the command lines of the core and of plugins share: options, and how an error ends a command."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from dl_inference_core import config as configs
from dl_inference_core.errors import ConfigError, InferenceError

CONFIG_EXIT = 2
"""The exit status where arguments or files cannot be used."""


_LOG_LEVELS = ("debug", "info", "warning", "error")
_LIBRARIES = ("absl", "asyncio", "grpc", "tensorflow", "torch", "uvicorn")
"""Loggers that say nothing below WARNING, whatever --log-level is: at INFO and DEBUG they tell of their own insides, a
line for each step of a compilation or a connection."""


def log_level_option(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
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


worker_option = click.option(
    "--worker", is_flag=True, hidden=True, help="A supervisor says the rest on standard input."
)
"""Of a command that serves: `serving.Serving.start` is given it."""


def tls_options(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments that say how a client speaks TLS; `client_tls` reads them."""
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


def client_tls(given: dict[str, Any]) -> configs.ClientTls | None:
    """Raises:
    ConfigError: certificate and key do not go together.
    """
    stated = {name: value for name, value in given.items() if name != "tls" and value is not None}
    return configs.validated(configs.ClientTls, stated, "TLS") if given["tls"] or stated else None


def seconds(text: str) -> float:
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


def numbers(kind: type[int] | type[float]) -> Callable[[str], tuple[float, ...]]:
    """What reads numbers above zero with commas between them."""

    def read(text: str) -> tuple[float, ...]:
        try:
            found = tuple(kind(part) for part in text.split(","))
        except ValueError:
            found = ()
        if not found or not all(0 < number < float("inf") for number in found):
            raise click.BadParameter(f'"{text}" is not a list of numbers above 0; expected one like 1,8,32')
        return found

    return read


@contextlib.contextmanager
def told_failures() -> Iterator[None]:
    """Ends with 2 for what cannot be used, and with 1 for a server's error, in a line each."""
    try:
        yield
    except ConfigError as error:
        fail(error)
    except InferenceError as error:
        click.echo(f"error: {error.code.name}: {error}", err=True)
        sys.exit(1)


def fail(error: InferenceError) -> NoReturn:
    """End the command with the status of what cannot be used."""
    click.echo(f"error: {error}", err=True)
    sys.exit(CONFIG_EXIT)
