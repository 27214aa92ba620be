"""A supervisor of processes that do as they are told: shell scripts in the place of workers."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dl_inference_core import supervisor
from dl_inference_core.config import Config, bracketed, validated
from dl_inference_core.errors import ConfigError
from dl_inference_core.supervisor import Supervisor

# Waits for its place, says that it serves, and ends when its standard input does.
WORKER = 'read place; echo $$ "$place" >> pids; {beside} echo "serving on 127.0.0.1:1"; cat > /dev/null'


class Scripts(Supervisor):
    """Starts a shell script in `folder` for each worker.

    Attributes:
        failing: whether the system has no room for another process.
        failed: how often that was so.
    """

    def __init__(self, folder: Path, config: Config, beside: str) -> None:
        script = f'cd "{folder}"; echo $$ >> started; {WORKER.format(beside=beside)}'
        super().__init__(config, ("/bin/sh", "-c", script), "", keeps_spare=not config.models.any)
        self.failing = False
        self.failed = 0

    async def _start(self) -> Any:
        if self.failing:
            self.failed += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return await super()._start()


class Rig:
    """A supervisor under test, and what it has started so far.

    Attributes:
        running: its `run`, which comes to an exit status.
    """

    def __init__(self, folder: Path, beside: str = "", **config: Any) -> None:
        self.folder = folder
        self.running: asyncio.Task[None] | None = None
        routes = [{"name": "m", "nodes": ["127.0.0.1:1"]}]
        whole = validated(Config, {"port": 0, "workers": 2, "routes": routes, **config}, "test")
        self.supervisor = Scripts(folder, whole, beside)

    def served(self) -> list[int]:
        """The process id of each worker that has had a place, the first one first."""
        return self.pids("pids")

    def started(self) -> list[int]:
        """The same of those that wait for one, too."""
        return self.pids("started")

    def pids(self, name: str) -> list[int]:
        path = self.folder / name
        return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []

    async def until(self, what: Callable[[], Any], within_s: float = 60.0) -> None:
        """Wait for `what`, while the supervisor runs."""
        end = time.monotonic() + within_s
        while not what():
            if self.running is not None and self.running.done():
                raise AssertionError(f"the supervisor has ended with {self.running.result()}")
            assert time.monotonic() < end, (self.served(), self.started())
            await asyncio.sleep(0.01)


def run(rig: Rig, test: Callable[[], Awaitable[None]]) -> None:
    """Run `test` beside the supervisor once all its workers serve, then end it by SIGTERM."""

    async def both() -> None:
        rig.running = asyncio.create_task(rig.supervisor.run())
        try:
            await rig.until(lambda: all(event.is_set() for event in rig.supervisor._ready))
            await test()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(rig.running, 20)
        finally:
            for pid in [*rig.started(), *rig.pids("grandchildren")]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    asyncio.run(both())


def test_a_worker_whose_child_holds_its_output_is_replaced_at_once_and_sigterm_ends_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, beside="sleep 1000 & echo $! >> grandchildren;")

    async def test() -> None:
        os.kill(rig.served()[0], signal.SIGKILL)
        await rig.until(lambda: len(rig.served()) == 3)
        await rig.until(lambda: len(rig.pids("grandchildren")) == 3)
        for pid in rig.pids("grandchildren"):
            os.kill(pid, 0)  # both live, and have had the output of their worker all the while

    run(rig, test)


def test_a_worker_that_cannot_be_started_again_is_tried_again_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path)
    scripts = rig.supervisor

    async def test() -> None:
        await rig.until(lambda: len(rig.started()) == 3)
        first, second = rig.served()
        (spare,) = set(rig.started()) - {first, second}
        scripts.failing = True
        for pid in (spare, first):
            os.kill(pid, signal.SIGKILL)
        await rig.until(lambda: "could not be started: Too many open files; it is started again in" in caplog.text)
        os.kill(second, 0)
        scripts.failing = False
        await rig.until(lambda: len(rig.served()) == 3)
        os.kill(second, 0)

    run(rig, test)


def test_a_spare_that_could_not_be_started_is_started_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LONGEST_PAUSE_S", 0.05)
    rig = Rig(tmp_path)
    scripts = rig.supervisor

    async def test() -> None:
        await rig.until(lambda: len(rig.started()) == 3)
        scripts.failing = True
        os.kill(rig.served()[0], signal.SIGKILL)  # the spare takes its place, and there is no other
        await rig.until(lambda: scripts.failed >= 2)
        assert len(rig.started()) == 3
        scripts.failing = False
        await rig.until(lambda: len(rig.started()) == 4)

    run(rig, test)


def test_a_spare_that_hangs_in_its_new_place_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LONGEST_TAKEOVER_S", 0.2)
    rig = Rig(tmp_path, hang_s=0.2)

    async def test() -> None:
        await rig.until(lambda: len(rig.started()) == 3)
        first, second = rig.served()
        (spare,) = set(rig.started()) - {first, second}
        os.kill(spare, signal.SIGSTOP)
        os.kill(first, signal.SIGKILL)
        await rig.until(lambda: len(rig.served()) == 3)
        assert spare not in rig.served()

    run(rig, test)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_port_with_connections_in_time_wait_is_taken_at_once(tmp_path: Path, host: str) -> None:
    """Those of a server that did not share its port, which closed its connections first."""
    family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.create_server(address, family=family) as before:
        port = before.getsockname()[1]
        with socket.create_connection((host, port)) as client:
            accepted, _ = before.accept()
            accepted.close()
            assert client.recv(1) == b""
    rig = Rig(tmp_path, host=host, port=port)

    async def test() -> None:
        places = (tmp_path / "pids").read_text().splitlines()
        assert {int(line.split()[1].split(":")[1]) for line in places} == {port}

    run(rig, test)


def test_a_host_that_is_not_this_machines_is_said(tmp_path: Path) -> None:
    async def test() -> None:
        raise AssertionError("it serves")

    for host in ("192.0.2.1", "2001:db8::1", "no.such.host.invalid"):
        rig = Rig(tmp_path, host=host, port=8500)
        with pytest.raises(ConfigError, match=f"cannot listen on {re.escape(bracketed(host))}:8500: "):
            run(rig, test)


def test_where_no_worker_can_be_started_that_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(tmp_path)
    rig.supervisor.failing = True

    async def test() -> None:
        raise AssertionError("it serves")

    with pytest.raises(ConfigError, match="worker 0 could not be started: Too many open files"):
        run(rig, test)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"], "nobody looked at a task's exception"
