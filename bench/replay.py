"""Load by `bench/load_generator`, which replays many gRPC messages and looks at every answer; and what came of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.load import LONGEST_S, Load, LoadError, Run

_CRATE = Path(__file__).parent / "load_generator"
_TARGET = Path(__file__).parent / "out" / "load_generator"
"""`make load-generator` builds there too."""
_CONNECTIONS = 16
"""As many clients as there are processes of a service that calls a model, say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What is sent, and where.

    Attributes:
        path: of the method.
        messages: sent in turn.
        answers: the expected answer to each of the messages, byte by byte; none are expected without.
        headers: metadata, as "name: value".
        ca: a PEM file of the authority of the server's certificate; without, plaintext is spoken.
    """

    path: str
    messages: Sequence[bytes]
    answers: Sequence[bytes] = ()
    headers: tuple[str, ...] = ()
    ca: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasting:
    """A load that lasts for so many seconds, with so many requests in flight on up to 16 connections."""

    seconds: float
    in_flight: int

    @property
    def clients(self) -> int:
        """Connections; the requests in flight must be a multiple of them."""
        return min(self.in_flight, _CONNECTIONS)

    @property
    def streams(self) -> int:
        """Requests in flight on each."""
        return self.in_flight // self.clients


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay(Run):
    """What one run saw. Its rate and latency are those of the answers in `ok`.

    Attributes:
        p999_ms: the 99.9th percentile.
        ok: answers with the status OK and, where they are expected, the expected bytes.
        statuses: all answers by the names of their gRPC statuses.
        transport_errors: requests without a well-formed answer.
        mismatched: answers with the status OK and other than the expected bytes.
        first_error: about the first request that is not in `ok`; "" if there is none.
        cpu_us_per_request: CPU of the load generator itself.
    """

    p90_ms: float
    p999_ms: float
    max_ms: float
    seconds: float
    ok: int
    statuses: Mapping[str, int]
    transport_errors: int
    mismatched: int
    first_error: str
    cpu_us_per_request: float


def run(address: str, traffic: Traffic, load: Load, *, rate: float | None = None) -> Replay:
    """Send `load.requests` requests, as `count`.

    Raises:
        LoadError: as `count`, or not every request has a good answer.
    """
    replay = count(address, traffic, load, rate=rate)
    if replay.ok != load.requests:
        raise LoadError(_failures(address, replay, f" to {load.requests} requests"))
    return replay


def last(address: str, traffic: Traffic, load: Lasting) -> Replay:
    """Send requests for `load.seconds`; the answers to all of them are awaited.

    Raises:
        LoadError: as `count`, or a request has no good answer.
    """
    replay = count(address, traffic, load)
    if not 0 < replay.ok == sum(replay.statuses.values()) + replay.transport_errors:
        raise LoadError(_failures(address, replay))
    return replay


def count(address: str, traffic: Traffic, load: Load | Lasting, *, rate: float | None = None) -> Replay:
    """Send `load.requests` requests, or requests for `load.seconds`, whatever comes back.

    Args:
        rate: requests per second, due evenly; a latency starts when its request is due. By default a request is sent
            when one of those in flight has been answered.

    Raises:
        LoadError: cargo is missing or cannot build the load generator; it cannot connect; no answer comes for half a
            minute; or it takes more than two minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [str(binary()), "--address", address, "--path", traffic.path]
        command += ["--bodies", messages := _file(Path(folder) / "bodies", traffic.messages)]
        if traffic.answers:
            same = traffic.answers is traffic.messages  # 38 MB of large ones
            command += ["--answers", messages if same else _file(Path(folder) / "answers", traffic.answers)]
        if traffic.ca:
            command += ["--ca", str(traffic.ca)]
        for header in traffic.headers:
            command += ["--header", header]
        much = ("--seconds", load.seconds) if isinstance(load, Lasting) else ("--requests", load.requests)
        command += [*map(str, much), "--in-flight", str(load.clients * load.streams)]
        command += ["--connections", str(load.clients), *(() if rate is None else ("--rate", str(rate)))]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
        except subprocess.SubprocessError as error:
            raise LoadError(f"{address}: {error}") from error
    if ended.returncode != 0:
        raise LoadError(f"{address}: load-generator: {ended.stderr.strip().removeprefix('error: ')}")
    return _read(json.loads(ended.stdout))


@cache
def binary() -> Path:
    """The load generator, built if it is not up to date, which takes a minute or two of two cores.

    Raises:
        LoadError: cargo is missing, or cannot build it.
    """
    cargo = shutil.which("cargo")
    if cargo is None:
        raise LoadError("cargo is not installed, which builds bench/load_generator: https://rustup.rs")
    command = [cargo, "build", "--quiet", "--release", "--locked"]
    command += ["--manifest-path", str(_CRATE / "Cargo.toml"), "--target-dir", str(_TARGET)]
    built = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if built.returncode != 0:
        raise LoadError(f"cargo cannot build bench/load_generator: {built.stderr.strip()}")
    return _TARGET / "release" / "load-generator"


def echo() -> Path:
    """The node of `bench/load_generator` that answers with what it is sent. Built as `binary` is."""
    return binary().with_name("echo")


def _failures(address: str, replay: Replay, of: str = "") -> str:
    return (
        f"{address}: {replay.ok} good answers{of}, {replay.mismatched} mismatched, {replay.transport_errors} transport "
        f"errors, by status {dict(replay.statuses)}; {replay.first_error}"
    )


def _file(path: Path, messages: Sequence[bytes]) -> str:
    """Write `messages` as the load generator reads them."""
    path.write_bytes(b"".join(len(message).to_bytes(4, "big") + message for message in messages))
    return str(path)


def _read(told: Mapping[str, Any]) -> Replay:
    """What the load generator prints."""
    latency_ms = {name: value / 1000 for name, value in told["latency_us"].items()}
    return Replay(
        requests_per_s=told["requests_per_s"],
        mean_ms=latency_ms["mean"],
        p50_ms=latency_ms["p50"],
        p90_ms=latency_ms["p90"],
        p99_ms=latency_ms["p99"],
        p999_ms=latency_ms["p99.9"],
        max_ms=latency_ms["max"],
        seconds=told["seconds"],
        ok=told["ok"],
        statuses=told["statuses"],
        transport_errors=told["transport_errors"],
        mismatched=told["mismatched"],
        first_error=told["first_error"] or "",
        cpu_us_per_request=told["cpu_us_per_request"],
    )
