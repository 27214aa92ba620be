"""python load.py: CPU per request of each transport: as an echo server, as the least gateway before a native echo
server, and as the project's own gateway there.

Relative only: it runs with the lowest priority, the load generator beside it.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IDLE = ["chrt", "-i", "0", "nice", "-n", "19"]
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


def cpu_ns(pid):
    return sum(int(each.read_text().split()[0]) for each in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def load(port, body, clients, streams, n):
    command = [*IDLE, "h2load", "-n", str(n), "-c", str(clients), "-m", str(streams), "-d", body]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers", URL.format(port)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{n} succeeded" in out, out
    return float(re.search(r"([\d.]+) req/s", out)[1])


def serve(*words):
    process = subprocess.Popen([*IDLE, sys.executable, HERE / "serve.py", *words], stdin=subprocess.PIPE)
    time.sleep(4)
    return process


def main():
    with tempfile.TemporaryDirectory() as folder:
        for size in (600, 600_000):
            message = MODEL + b"\x3a" + varint(size - 10) + bytes(size - 10)
            (Path(folder) / str(size)).write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        node = serve("native", "echo", "25000", "25000")
        ports = {("native", "echo"): 25000, ("grpcio", "echo"): 25001, ("native", "gateway"): 25002}
        ports["grpcio", "gateway"] = 25003
        processes = {key: serve(*key, str(port), "25000") for key, port in ports.items() if port != 25000}
        processes["native", "echo"] = node
        for port, name in ((25004, "native"), (25005, "grpcio")):
            ports[name, "app"] = port
            config = Path(folder) / f"{name}.toml"
            config.write_text(CONFIG.format(name))
            command = [*IDLE, str(Path(sys.executable).with_name("dl-inference-core")), "serve", "--config", config, "--port", str(port)]
            processes[name, "app"] = subprocess.Popen(command, stdin=subprocess.PIPE)
        time.sleep(6)
        try:
            for size, shapes in ((600, ((1, 1), (8, 1), (16, 8))), (600_000, ((4, 2),))) if not sys.argv[1:] else ((600, ((16, 8),)),):
                body = f"{folder}/{size}"
                for clients, streams in shapes:
                    for key in ports:
                        rate = load(ports[key], body, clients, streams, 20 * clients * streams)
                        for _ in range(2):
                            n = max(50, int(rate * 1.5))
                            before = cpu_ns(processes[key].pid)
                            rate = load(ports[key], body, clients, streams, n)
                            used = (cpu_ns(processes[key].pid) - before) / n / 1000
                            print(f"{size} B, {clients * streams} in flight, {key}: {used:.1f} us, {rate:.0f} req/s", flush=True)
        finally:
            for process in processes.values():
                process.stdin.close()
                if "serve.py" not in str(process.args):
                    process.terminate()
                process.wait(20)


def varint(number):
    out = b""
    while number >= 128:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


main()
