"""Processes with I/O threads: how they end, and what those that they fork have of them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytest.importorskip("dl_inference_native", exc_type=ImportError)

UNDER_LOAD = """
import asyncio, os, signal, sys, threading, time
from dl_inference_core.testing.loopback import ECHO
from dl_inference_core.transport import Limits, Method
from dl_inference_native import NativeTransport


class Service:  # it asks nothing of the event loop, which ends before the I/O threads
    methods = {ECHO: Method()}
    private_trailers = frozenset()

    def __init__(self, begin):
        self.begin = begin

    def begin_all(self, exchanges):
        for exchange in exchanges:
            self.begin(exchange)

    def ended_all(self, ended):
        pass


async def call(connection):
    while True:
        await connection.call(ECHO, b"hello")


async def main(end, **content):
    transport = NativeTransport(NativeTransport.Options(threads=3))
    service = Service(lambda exchange: exchange.reply(exchange.message))
    server = await transport.serve(service, ("127.0.0.1:0",), Limits())
    connections = [transport.connect(f"127.0.0.1:{server.ports[0]}", Limits()) for _ in range(3)]
    calls = [asyncio.ensure_future(call(each)) for each in connections * 4]
    for _ in range(50):
        transport.call_later(0.01, lambda: None)
    for each in connections:
        await each.call(ECHO, b"")
    await end(server, calls)
"""

ENDS = {
    "by a signal": """
async def end(server, calls):
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("serving", flush=True)
    await ended.wait()

asyncio.run(main(end))
""",
    "by sys.exit in a callback": """
async def end(server, calls):
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: sys.exit(0))
    print("serving", flush=True)
    await asyncio.sleep(60)

asyncio.run(main(end))
""",
    "drained": """
async def end(server, calls):
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("serving", flush=True)
    await ended.wait()
    await server.drain(1)
    await asyncio.gather(*calls, return_exceptions=True)

asyncio.run(main(end))
""",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_process_under_load_ends_ordinarily(end: str) -> None:
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", UNDER_LOAD + end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "serving\n"
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")


FORKS = """
import json, socket

def sockets():
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                each = socket.socket(fileno=number)
                if each.family == socket.AF_INET:
                    found.append(each.getsockname())
                each.detach()
        except OSError:
            continue
    return found


async def end(server, calls):
    assert len(sockets()) >= 7, "one that listens, and both ends of three connections"
    for _ in range(20):
        child = os.fork()
        if not child:
            os._exit(0 if sockets() == [] else 1)
        status = await asyncio.to_thread(os.waitpid, child, 0)
        assert status[1] == 0, "a child has sockets of its parent"
    done = [each for each in calls if each.done()]
    assert not done, done
    print("serving", flush=True)
    for each in calls:
        each.cancel()
    await asyncio.wait(calls)
    await server.drain(0)

asyncio.run(main(end))
"""


def test_a_child_has_no_sockets_and_its_parent_serves_on() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNDER_LOAD + FORKS], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "serving\n", "")


FORKS_IN_A_SERVICE = """
async def run():
    transport = NativeTransport(NativeTransport.Options())

    def begin(exchange):
        child = os.fork()
        if child:
            exchange.reply(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        elif exchange.message == b"exits":
            sys.exit(5)
        else:
            exchange.reply(b"the child's")

    server = await transport.serve(Service(begin), ("127.0.0.1:0",), Limits())
    connection = transport.connect(f"127.0.0.1:{server.ports[0]}", Limits())
    for message in (b"exits", b"returns", b"returns"):
        print((await connection.call(ECHO, message)).message)
    await server.drain(0)
    await connection.close()

asyncio.run(run())
"""


def test_a_child_that_a_service_forks_never_serves() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNDER_LOAD + FORKS_IN_A_SERVICE],
        capture_output=True,
        text=True,
        timeout=60,
    )
    # Where nobody has told `dl_inference_core.children` that the process serves, a child's own status is not minded.
    assert (result.returncode, result.stdout, result.stderr) == (0, "b'1'\nb'1'\nb'1'\n", "")
