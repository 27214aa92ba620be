"""Load by h2load, which replays one framed gRPC request; and what came of it."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import grpc


class LoadError(Exception):
    """The load could not be made, or not every request was answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much, and how many at once."""

    requests: int
    clients: int
    streams: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of h2load saw."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float


def require_h2load() -> None:
    """Raises:
    LoadError: it is not installed.
    """
    if shutil.which("h2load") is None:
        raise LoadError("h2load is not installed: apt-get install nghttp2-client")


def check(address: str, method: str, message: bytes) -> None:
    """Ask once with a real gRPC client, as h2load does not look at gRPC's status.

    Raises:
        LoadError: the answer is not the request's own bytes.
    """
    size = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=size) as channel:
        if channel.unary_unary(method)(message, timeout=10) != message:
            raise LoadError(f"{address} does not answer with what it was sent")


def run(address: str, method: str, message: bytes, load: Load) -> Run:
    """Send `message` `load.requests` times.

    Raises:
        LoadError: some requests failed, or their answers were too short to hold the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        command = ["h2load", "-n", str(load.requests), "-c", str(load.clients), "-m", str(load.streams)]
        command += ["-t", "1", "-d", str(body), "--log-file", str(log)]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{address}{method}"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
        latencies = [int(line.split("\t")[2]) for line in log.read_text().splitlines()]
    succeeded = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", output)
    rate = re.search(r"finished in [^,]+, ([\d.]+) req/s", output)
    received = re.search(r"\((\d+)\) data", output)
    if not (succeeded and rate and received):
        raise LoadError(f"h2load's output is not understood: {output}")
    if [int(count) for count in succeeded.groups()] != [load.requests, 0, 0]:
        raise LoadError(f"{address}: {succeeded[0]} of {load.requests}")
    # A gRPC error is an HTTP success without data.
    if int(received[1]) < load.requests * len(message):
        raise LoadError(f"{address}: {received[1]} bytes came back for {load.requests} requests of {len(message)}")
    cuts = statistics.quantiles(latencies, n=100)
    return Run(requests_per_s=float(rate[1]), p50_ms=cuts[49] / 1000, p99_ms=cuts[98] / 1000)
