"""Objects of models that are unloaded are freed, those in circles and frozen ones too; objects in use stay."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ModelError
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.reclaiming import Remains
from dl_inference_core.node.repository import Repository
from dl_inference_core.testing import FakeBackend, FakeModel

pytestmark = pytest.mark.usefixtures("no_collector")


class Node:
    """Refers to itself."""

    def __init__(self, *others: object) -> None:
        self.me = self
        self.others = others


def test_objects_in_circles_are_freed_even_if_they_are_frozen() -> None:
    inner = Node()
    outer = Node({"inner": [inner]})
    known = [weakref.ref(inner), weakref.ref(outer)]
    gc.freeze()
    remains = Remains(outer)
    del inner, outer
    assert all(each() is not None for each in known)
    remains.reclaim()
    assert all(each() is None for each in known)


def test_an_object_that_is_in_use_stays_with_all_that_it_leads_to() -> None:
    used = Node([1, Node()])
    user = [used]
    owner = Node(used)
    known = weakref.ref(owner)
    remains = Remains(owner)
    del owner, used
    remains.reclaim()
    assert known() is None
    assert user[0].me is user[0]
    assert isinstance(user[0].others[0], list)


def test_the_collector_stays_as_it_was() -> None:
    Remains(Node()).reclaim()
    assert not gc.isenabled()
    gc.enable()
    Remains(Node()).reclaim()
    assert gc.isenabled()


def test_several_threads_may_reclaim_at_once() -> None:
    known: list[weakref.ref[Node]] = []

    def work() -> None:
        for _ in range(20):
            node = Node([Node() for _ in range(50)])
            known.append(weakref.ref(node))
            remains = Remains(node)
            del node
            remains.reclaim()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(known) == 80
    assert all(each() is None for each in known)
    assert not gc.isenabled()


# Models


class CircularModel(FakeModel):
    """Its weights refer to it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.weights = Node(self)

    def close(self) -> None:
        super().close()
        del self.weights  # as the backends do: after that the model does not lead to the weights any more


class CircularBackend(FakeBackend):
    """Attributes:
    known: the weights of each model that it has made.
    fail: whether a load fails once the model has been made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: list[weakref.ref[Node]] = []
        self.fail = False

    def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
        model = CircularModel(factor=1)
        self.known.append(weakref.ref(model.weights))
        if self.fail:
            try:
                raise KeyError("layer.0")
            except KeyError as error:
                raise ModelError("a weight is missing") from error
        return model


class CircularHandler(Handler):
    """Refers to itself, and fails to load where a class attribute says so."""

    known: list[weakref.ref[CircularHandler]] = []  # noqa: RUF012 - of the class
    fails = False

    def load(self, model: Any, directory: Path) -> None:
        super().load(model, directory)
        self.me = self
        self.known.append(weakref.ref(self))
        if self.fails:
            raise RuntimeError("no vocabulary")


@asynccontextmanager
async def serving(
    directory: Path, handler: str | None = "circular"
) -> AsyncIterator[tuple[Repository, CircularBackend]]:
    CircularHandler.known.clear()
    backend = CircularBackend()
    repository = Repository(
        directory,
        backends={"fake": backend},
        handlers={"circular": CircularHandler},
        defaults={"handler": handler},
        poll_interval_s=3600,
    )
    try:
        await repository.start()
        gc.freeze()  # as at the end of a start
        yield repository, backend
    finally:
        await repository.close()


async def look_twice(repository: Repository) -> None:
    await repository.look()
    await repository.look()
    await repository.settle()


def alive(known: list[Any]) -> list[bool]:
    return [each() is not None for each in known]


def replaced(models: Path) -> None:
    FakeBackend.write(models / "m" / "1", factor=22)


def followed(models: Path) -> None:
    (models / "m" / "model.toml").write_text("keep_versions = 1\n")
    FakeBackend.write(models / "m" / "2")


def removed(models: Path) -> None:
    (models / "m" / "1" / "fake.json").unlink()
    (models / "m" / "1").rmdir()
    (models / "m" / "model.toml").unlink(missing_ok=True)
    (models / "m").rmdir()


@pytest.mark.parametrize("change", [replaced, followed, removed])
async def test_a_version_that_is_unloaded_frees_model_and_handler(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    async with serving(tmp_path) as (repository, backend):
        assert alive(backend.known) == alive(CircularHandler.known) == [True]
        change(tmp_path)
        await look_twice(repository)
        left = [False] if change is removed else [False, True]
        assert alive(backend.known) == alive(CircularHandler.known) == left


async def test_a_load_that_fails_in_the_backend_frees_what_it_has_made(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    async with serving(tmp_path) as (repository, backend):
        backend.fail = True
        FakeBackend.write(tmp_path / "m" / "2")
        await look_twice(repository)
        assert "a weight is missing" in repository.models["m"].versions[2].error
        assert alive(backend.known) == [True, False]


async def test_a_load_that_fails_in_the_handler_frees_model_and_handler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    async with serving(tmp_path) as (repository, backend):
        monkeypatch.setattr(CircularHandler, "fails", True)
        FakeBackend.write(tmp_path / "m" / "2")
        await look_twice(repository)
        assert "no vocabulary" in repository.models["m"].versions[2].error
        assert alive(backend.known) == alive(CircularHandler.known) == [True, False]


async def test_a_handler_file_frees_what_its_variables_hold(tmp_path: Path) -> None:
    """The functions of a module and its variables refer to each other."""
    FakeBackend.write(tmp_path / "m" / "1")
    (tmp_path / "m" / "handler.py").write_text(
        "from dl_inference_core.node.handling import Handler\n"
        "class Table:\n"
        "    pass\n"
        "TABLE = Table()\n"
        "class Mine(Handler):\n"
        "    def load(self, model, directory):\n"
        "        super().load(model, directory)\n"
        "        self.table = TABLE\n"
    )
    async with serving(tmp_path, handler=None) as (repository, _):
        handler: Any = repository.models["m"].loaded[1].loaded.instances[0].handler
        known = [weakref.ref(handler.table), weakref.ref(type(handler))]
        del handler
        gc.freeze()
        (tmp_path / "m" / "handler.py").unlink()
        removed(tmp_path)
        await look_twice(repository)
        assert alive(known) == [False, False]


def test_what_a_model_shares_with_others_is_untouched() -> None:
    shared = SimpleNamespace(table=[Node()])
    for _ in range(2):
        remains = Remains(Node(shared))
        remains.reclaim()
    assert isinstance(shared.table[0].me, Node)
