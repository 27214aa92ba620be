"""A supervisor of processes that do as they are told: shell scripts in the place of workers."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from dl_inference_core import supervisor
from dl_inference_core.config import Config, validated
from dl_inference_core.errors import ConfigError
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.supervisor import Supervisor
from dl_inference_core.transport import Program

# Waits for its place, says that it serves, and ends when its standard input does.
WORKER = 'read place; echo $$ "$place" >> pids; {beside} echo "serving on 127.0.0.1:1"; cat > /dev/null'


class Scripts(GrpcioTransport):
    """Starts a script in `folder` for each worker.

    Attributes:
        failing: whether the system has no room for another process.
        failed: how often that was so.
    """

    def __init__(self, folder: Path, beside: str = "") -> None:
        super().__init__(self.Options())
        self.failing = False
        self.failed = 0
        self._command = ("/bin/sh", "-c", f'cd "{folder}"; echo $$ >> started; {WORKER.format(beside=beside)}')

    @contextmanager
    def program(self, arguments: Sequence[str]) -> Iterator[Program]:
        if self.failing:
            self.failed += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        yield Program(command=self._command)


class Rig:
    """A supervisor under test, and what it has started so far.

    Attributes:
        running: its `run`, which comes to an exit status.
    """

    def __init__(self, folder: Path, scripts: Scripts, **config: Any) -> None:
        self.folder = folder
        self.running: asyncio.Task[Any] | None = None
        routes = [{"name": "m", "nodes": ["127.0.0.1:1"]}]
        self.supervisor = Supervisor(
            validated(Config, {"port": 0, "routes": routes, **config}, "test"), scripts, ["serve"], ""
        )

    def served(self) -> list[int]:
        """The process id of each worker that has had a place, the first one first."""
        return self.pids("pids")

    def started(self) -> list[int]:
        """The same of those that wait for one, too."""
        return self.pids("started")

    def pids(self, name: str) -> list[int]:
        path = self.folder / name
        return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []

    async def until(self, what: Callable[[], Any], within_s: float = 20.0) -> None:
        """Wait for `what`, while the supervisor runs."""
        end = time.monotonic() + within_s
        while not what():
            if self.running is not None and self.running.done():
                raise AssertionError(f"the supervisor has ended with {self.running.result()}")
            assert time.monotonic() < end, (self.served(), self.started())
            await asyncio.sleep(0.01)


def run(rig: Rig, test: Callable[[], Awaitable[None]]) -> None:
    """Run `test` beside the supervisor once all its workers serve, then end it by SIGTERM."""

    async def status() -> Any:
        try:
            await rig.supervisor.run()
        except SystemExit as end:
            return end.code

    async def both() -> None:
        rig.running = asyncio.create_task(status())
        try:
            await rig.until(lambda: all(event.is_set() for event in rig.supervisor._ready))
            await test()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await asyncio.wait_for(rig.running, 20) == 0
        finally:
            for pid in [*rig.started(), *rig.pids("grandchildren")]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    asyncio.run(both())


def test_a_worker_whose_child_holds_its_output_is_replaced_at_once_and_sigterm_ends_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Scripts(tmp_path, beside="sleep 1000 & echo $! >> grandchildren;"))

    async def test() -> None:
        os.kill(rig.served()[0], signal.SIGKILL)
        await rig.until(lambda: len(rig.served()) == 2)
        await rig.until(lambda: len(rig.pids("grandchildren")) == 2)
        for pid in rig.pids("grandchildren"):
            os.kill(pid, 0)  # both live, and have had the output of their worker all the while

    run(rig, test)


def test_a_worker_that_cannot_be_started_again_is_tried_again_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scripts = Scripts(tmp_path)
    rig = Rig(tmp_path, scripts, workers=2)

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
    scripts = Scripts(tmp_path)
    rig = Rig(tmp_path, scripts, workers=2)

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
    rig = Rig(tmp_path, Scripts(tmp_path), workers=2, hang_s=0.2)

    async def test() -> None:
        await rig.until(lambda: len(rig.started()) == 3)
        first, second = rig.served()
        (spare,) = set(rig.started()) - {first, second}
        os.kill(spare, signal.SIGSTOP)
        os.kill(first, signal.SIGKILL)
        await rig.until(lambda: len(rig.served()) == 3)
        assert spare not in rig.served()

    run(rig, test)


def test_where_no_worker_can_be_started_that_is_said(tmp_path: Path) -> None:
    scripts = Scripts(tmp_path)
    scripts.failing = True

    async def test() -> None:
        raise AssertionError("it serves")

    with pytest.raises(ConfigError, match="worker 0 could not be started: Too many open files"):
        run(Rig(tmp_path, scripts), test)
