"""Loads that take long or hang: what the log says, when they are given up, and which other loads go on."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ModelNotReady
from dl_inference_core.node import loading
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.model import ServedModel, State
from dl_inference_core.node.repository import Repository
from dl_inference_core.node.sources import load_module
from dl_inference_core.testing import FakeBackend, FakeModel
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import METADATA

TIMEOUT_S = 2.0
GIVEN_UP = "the load took longer than 2 s (load_timeout_s), so it was given up; "


class HangingBackend(FakeBackend):
    """Its loads hang until `go` is set where the folder holds a file `hang`."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def load(self, directory: Path, options: PluginOptions, device: str) -> Any:
        if (directory / "hang").exists():
            assert self.go.wait(30)
        return super().load(directory, options, device)


@pytest.fixture
def backend() -> Iterator[HangingBackend]:
    backend = HangingBackend()
    yield backend
    backend.go.set()
    wait_for_threads()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that sources wait for, see `waiting`; it comes at the end of the test at the latest."""
    gate = tmp_path / "gate"
    yield gate
    gate.touch()
    wait_for_threads()


def wait_for_threads() -> None:
    """Wait until the threads of loads that were given up have ended: what they import is there until then."""
    for thread in threading.enumerate():
        if thread.name.endswith(("/1#0", "/2#0")):
            thread.join(20)


def waiting(gate: Path) -> str:
    """A source that hangs until `gate` is there."""
    return f"import os, time\nwhile not os.path.exists({str(gate)!r}):\n    time.sleep(0.005)\n"


def hanging(folder: Path) -> Path:
    FakeBackend.write(folder)
    (folder / "hang").touch()
    return folder


@asynccontextmanager
async def serving(directory: Path, backend: FakeBackend, timeout_s: float = TIMEOUT_S) -> AsyncIterator[Repository]:
    repository = Repository(
        directory,
        backends={"fake": backend},
        handlers={"default": Handler},
        poll_interval_s=0.01,
        load_timeout_s=timeout_s,
    )
    try:
        await repository.begin()
        yield repository
    finally:
        await repository.close(grace_s=0.05)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


def status(model: ServedModel, number: int = 1) -> tuple[State, str]:
    found = model.versions[number]
    return found.state, found.error


async def test_loads_that_hang_fail_at_their_timeout_and_others_take_their_places(
    tmp_path: Path, backend: HangingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):  # as many as may load at once
        hanging(tmp_path / name / "1")
    FakeBackend.write(tmp_path / "c" / "1")
    async with serving(tmp_path, backend) as repository:
        for name in "abc":
            assert status(repository.models[name]) == (State.LOADING, "")
            with pytest.raises(ModelNotReady, match=f'^model "{name}" is still loading: version 1 is loading$'):
                await answered(
                    repository.models[name], METADATA, messages.ModelMetadataRequest(name=name).SerializeToString()
                )
        await repository.loaded()
        assert repository.models["c"].ready
        for name in "ab":
            state, error = status(repository.models[name])
            assert state is State.FAILED
            assert error.startswith(GIVEN_UP)
        failed = sorted(record.getMessage() for record in caplog.records if GIVEN_UP in record.getMessage())
        assert [text.partition(" in ")[0] for text in failed] == ['model "a" version 1', 'model "b" version 1']
        FakeBackend.write(tmp_path / "d" / "1")  # and so do reloads
        await until(lambda: "d" in repository.models and repository.models["d"].ready)


async def test_what_a_load_gives_after_its_timeout_is_closed_and_never_serves(
    tmp_path: Path, backend: HangingBackend
) -> None:
    hanging(tmp_path / "m" / "1")
    made: list[FakeModel] = []
    load = backend.load
    backend.load = lambda *how: made.append(load(*how)) or made[-1]  # type: ignore[method-assign, func-returns-value]
    async with serving(tmp_path, backend) as repository:
        await repository.loaded()
        backend.go.set()
        await until(lambda: made and made[0].closed)
        await repository.settle()
        assert status(repository.models["m"])[0] is State.FAILED
        assert not repository.models["m"].ready


async def test_a_new_version_that_hangs_leaves_the_old_one_in_service_and_new_files_are_loaded(
    tmp_path: Path, backend: HangingBackend
) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    async with serving(tmp_path, backend) as repository:
        await repository.loaded()
        model = repository.models["m"]
        folder = hanging(tmp_path / "m" / "2")
        await until(lambda: 2 in model.versions and model.versions[2].error)
        assert status(model, 2)[0] is State.FAILED
        assert sorted(model.loaded) == [1]
        (folder / "hang").unlink()
        await until(lambda: sorted(model.loaded) == [1, 2])
        assert status(model, 2) == (State.AVAILABLE, "")


async def test_the_log_says_again_and_again_which_model_still_loads(
    tmp_path: Path, backend: HangingBackend, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_FIRST_WARNING_S", 0.01)
    hanging(tmp_path / "m" / "1")
    FakeBackend.write(tmp_path / "quick" / "1")
    async with serving(tmp_path, backend, timeout_s=600) as repository:
        await until(lambda: len([text for text in said(caplog) if '"m"' in text]) >= 3)
        backend.go.set()
        await repository.loaded()
        assert repository.models["m"].ready
    limit = "; it is given up after 600 s (load_timeout_s)"
    assert [text for text in said(caplog) if '"m"' in text][:3] == [
        f'still loading model "m" version 1 after {seconds} s{limit}' for seconds in ("0.01", "0.02", "0.04")
    ]
    assert {record.levelname for record in caplog.records if record.name.endswith(".loading")} == {"WARNING"}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("still loading ")]


async def test_without_a_timeout_a_load_may_take_as_long_as_it_takes(
    tmp_path: Path, backend: HangingBackend, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_FIRST_WARNING_S", 0.01)
    hanging(tmp_path / "m" / "1")
    async with serving(tmp_path, backend, timeout_s=0) as repository:
        await until(lambda: said(caplog))
        assert said(caplog)[0] == 'still loading model "m" version 1 after 0.01 s'
        backend.go.set()
        await repository.loaded()
        assert repository.models["m"].ready


HANDLER = "import net\nfrom dl_inference_core.node.handling import Handler\nclass Own(Handler):\n    who = net.who\n"


def with_sources(folder: Path, who: str, first: str = "") -> None:
    FakeBackend.write(folder / "1")
    (folder / "net.py").write_text(f"{first}who = {who!r}\n")
    (folder / "handler.py").write_text(HANDLER)


async def test_a_model_whose_import_hangs_does_not_keep_others_from_importing(
    tmp_path: Path, gate: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_FIRST_WARNING_S", 0.01)
    path, modules = list(sys.path), set(sys.modules)
    models = tmp_path / "models"
    begun = tmp_path / "begun"
    with_sources(models / "a", "a", f"open({str(begun)!r}, 'w').close()\n{waiting(gate)}import late\n")
    (models / "a" / "late.py").write_text("")
    async with serving(models, FakeBackend()) as repository:
        await until(begun.exists)
        with_sources(models / "b", "b")
        await until(lambda: "b" in repository.models)
        await repository.loaded()
        # The time for which b waited for the import of a does not count: both timeouts are the same.
        assert status(repository.models["a"])[0] is State.FAILED
        assert status(repository.models["b"]) == (State.AVAILABLE, "")
        assert repository.models["b"].loaded[1].loaded.instances[0].handler.who == "b"  # type: ignore[attr-defined]
        assert any(
            '"b"' in text and ", because it waits for the imports of another model; " in text for text in said(caplog)
        )
        assert sys.path == path
        await asyncio.to_thread(gate.touch)  # what the import does when it goes on changes nothing for others
        await repository.settle()
        assert sys.path == path
        assert "net" not in sys.modules
        assert not any(name.endswith(".late") for name in set(sys.modules) - modules)


async def test_a_repository_that_closes_during_an_import_that_hangs_leaves_imports_to_others(
    tmp_path: Path, gate: Path
) -> None:
    path = list(sys.path)
    begun = tmp_path / "begun"
    with_sources(tmp_path / "models" / "a", "a", f"open({str(begun)!r}, 'w').close()\n{waiting(gate)}")
    async with serving(tmp_path / "models", FakeBackend(), timeout_s=0):
        await until(begun.exists)
    with_sources(tmp_path / "other", "other")
    module = await asyncio.to_thread(load_module, tmp_path / "other" / "net.py")
    assert module.who == "other"
    assert sys.path == path
