"""python load.py [SECONDS]: CPU per request of each transport, as an echo server, as the least gateway before a native
echo server, and as the project's own gateway there. Needs h2load.

Relative only: everything runs with the lowest priority, the load generator beside it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

IDLE = ("chrt", "-i", "0", "nice", "-n", "19")
HERE = Path(__file__).parent
URL = "http://127.0.0.1:{}/inference.GRPCInferenceService/ModelInfer"
MODEL = b"\x0a\x04mmoe"
CONFIG = """
transport = "{}"
[gateway.health]
probe = "tcp"
[[routes]]
name = "mmoe"
nodes = ["127.0.0.1:25000"]
"""
LOADS = ((600, 1, 1), (600, 8, 1), (600, 16, 8), (600_000, 4, 2))
"""Bytes of a message, clients, and calls that each has in flight."""


def cpu_ns(pid: int) -> int:
    return sum(int(each.read_text().split()[0]) for each in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def load(port: int, body: Path, clients: int, streams: int, count: int) -> float:
    """Requests per second, all answered."""
    sent = ("-n", str(count), "-c", str(clients), "-m", str(streams), "-d", str(body))
    headers = ("-H", "content-type: application/grpc", "-H", "te: trailers")
    command = [*IDLE, "h2load", *sent, *headers, URL.format(port)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"([\d.]+) req/s", out)
    if f"{count} succeeded" not in out or rate is None:
        raise RuntimeError(out)
    return float(rate[1])


@contextmanager
def running(*command: str | Path) -> Iterator[int]:
    """A process that ends with its standard input, or is ended."""
    process = subprocess.Popen([*IDLE, *command], stdin=subprocess.PIPE)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


def varint(number: int) -> bytes:
    out = b""
    while number >= 128:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def write_bodies(folder: Path) -> None:
    for size in {size for size, _, _ in LOADS}:
        message = MODEL + b"\x3a" + varint(size - 10) + bytes(size - 10)
        (folder / str(size)).write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)


def start(stack: ExitStack, folder: Path) -> dict[str, tuple[int, int]]:
    """The port and the process of each that is measured."""
    started = {}
    for number, (role, name) in enumerate(
        (role, name) for role in ("echo", "gateway") for name in ("native", "grpcio")
    ):
        port = 25000 + number
        pid = stack.enter_context(running(sys.executable, HERE / "serve.py", name, role, str(port), "25000"))
        started[f"{role}, {name}"] = port, pid
    for number, name in enumerate(("native", "grpcio")):
        config = folder / f"{name}.toml"
        config.write_text(CONFIG.format(name))
        program = Path(sys.executable).with_name("dl-inference-core")
        command = (sys.executable, program, "serve", "--config", config, "--port", str(25010 + number))
        started[f"serve --config, {name}"] = 25010 + number, stack.enter_context(running(*command))
    time.sleep(15)
    return started


def main(seconds: float = 1.5) -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_bodies(folder)
        started = start(stack, folder)
        for size, clients, streams in LOADS:
            for what, (port, pid) in started.items():
                rate = load(port, folder / str(size), clients, streams, 20 * clients * streams)
                for _ in range(2):
                    count = max(50, int(rate * seconds))
                    before = cpu_ns(pid)
                    rate = load(port, folder / str(size), clients, streams, count)
                    used = (cpu_ns(pid) - before) / count / 1000
                    print(f"{size} B, {clients * streams} in flight, {what}: {used:.1f} us, {rate:.0f}/s", flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
