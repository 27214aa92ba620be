"""Load by h2load, which sends one request again and again, of gRPC or of HTTP/1.1; and what came of it.

Benchmarks send gRPC by `bench.replay`; h2load is what it is compared with, and what sends HTTP/1.1.
"""

from __future__ import annotations

import http.client
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

LONGEST_S = 120
_ANSWER_S = 30
"""For all answers to several requests; 64 of a large model take 5 seconds."""
_GRPC = "application/grpc"
# A gRPC answer may name itself, in more characters or fewer.
_SHORTER = 0.9


class LoadError(Exception):
    """The load could not be made, or not every request was answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much, and how many at once."""

    requests: int
    clients: int
    streams: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """What is sent, and where: a message of gRPC in plain HTTP/2, or any other body in HTTP/1.1.

    Attributes:
        headers: beside those that say what it is, as "name: value"; of gRPC, its metadata.
    """

    path: str
    message: bytes
    media_type: str = _GRPC
    headers: tuple[str, ...] = ()

    @property
    def grpc(self) -> bool:
        return self.media_type == _GRPC

    @property
    def body(self) -> bytes:
        """The message, in a frame if it is one of gRPC."""
        return b"\0" + len(self.message).to_bytes(4, "big") + self.message if self.grpc else self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of h2load saw."""

    requests_per_s: float
    mean_ms: float
    p50_ms: float
    p99_ms: float


def require_h2load() -> None:
    """Raises:
    LoadError: it is not installed.
    """
    if shutil.which("h2load") is None:
        raise LoadError("h2load is not installed: apt-get install nghttp2-client")


def ask(address: str, post: Post) -> bytes:
    """Ask once with a real client, as h2load looks neither at gRPC's status nor at an answer's content.

    Raises:
        LoadError: there is no answer, or it is an error.
    """
    return _ask_grpc(address, post) if post.grpc else _ask_http(address, post)


def ask_together(address: str, path: str, messages: Sequence[bytes]) -> list[bytes]:
    """The answers of gRPC to `messages`, which are all in flight at one time.

    Raises:
        LoadError: there is no answer, or it is an error.
    """
    size = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=size) as channel:
        call = channel.unary_unary(path)
        futures = [call.future(message, timeout=_ANSWER_S) for message in messages]
        try:
            return [future.result() for future in futures]
        except grpc.RpcError as error:
            raise LoadError(f"{address}: {error.code().name}: {error.details()}") from error


def _ask_grpc(address: str, post: Post) -> bytes:
    (answer,) = ask_together(address, post.path, (post.message,))
    return answer


def _ask_http(address: str, post: Post) -> bytes:
    connection = http.client.HTTPConnection(address, timeout=10)
    headers = {"content-type": post.media_type, **dict(header.split(": ", 1) for header in post.headers)}
    try:
        connection.request("POST", post.path, post.body, headers)
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise LoadError(f"{address}: {error!r}") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise LoadError(f"{address}: {response.status}: {answer.decode(errors='replace')}")
    return answer


def run(address: str, post: Post, answer_bytes: int, load: Load) -> Run:
    """Send `post` `load.requests` times; HTTP/1.1 has one request under way on a connection.

    Args:
        answer_bytes: the length of each answer, or nearly so.

    Raises:
        LoadError: as `read`, or it took more than two minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        body.write_bytes(post.body)
        command = ["h2load", "-n", str(load.requests), "-c", str(load.clients), "-m", str(load.streams)]
        command += ["-t", "1", "-d", str(body), "--log-file", str(log)]
        for header in (f"content-type: {post.media_type}", *(("te: trailers",) if post.grpc else ()), *post.headers):
            command += ["-H", header]
        command += [*(() if post.grpc else ("--h1",)), f"http://{address}{post.path}"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=True).stdout
        except subprocess.SubprocessError as error:
            raise LoadError(f"{address}: {error}") from error
        return read(output, log.read_text(), load.requests, answer_bytes)


def read(output: str, log: str, requests: int, answer_bytes: int) -> Run:
    """What h2load says of a run in its output and its log.

    Raises:
        LoadError: some of the requests failed, or their answers were too short.
    """
    succeeded = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", output)
    rate = re.search(r"finished in [^,]+, ([\d.]+) req/s", output)
    received = re.search(r"\((\d+)\) data", output)
    if not (succeeded and rate and received):
        raise LoadError(f"h2load's output is not understood: {output}")
    if [int(count) for count in succeeded.groups()] != [requests, 0, 0]:
        raise LoadError(f"{succeeded[0]} of {requests}")
    # A gRPC error is an HTTP success without data.
    if int(received[1]) < requests * answer_bytes * _SHORTER:
        raise LoadError(f"{received[1]} bytes came back for {requests} answers of {answer_bytes}")
    ms = [int(line.split("\t")[2]) / 1000 for line in log.splitlines()]
    cuts = statistics.quantiles(ms, n=100)
    return Run(requests_per_s=float(rate[1]), mean_ms=statistics.fmean(ms), p50_ms=cuts[49], p99_ms=cuts[98])
