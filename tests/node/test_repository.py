"""What lies in the models' directory, and which versions answer."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_inference_core.config import NamedModel, PluginOptions
from dl_inference_core.errors import ConfigError, ModelNotFound, ModelNotReady
from dl_inference_core.node.backend import Backend, Model
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.loading import ModelConfig
from dl_inference_core.node.model import ServedModel, State
from dl_inference_core.node.processor import Processor
from dl_inference_core.node.repository import Repository
from dl_inference_core.tensors import Form, Request
from dl_inference_core.testing import FakeBackend, FakeModel
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire.protocol import PROTOCOLS

OIP = PROTOCOLS["openinference"]


class LateBackend(FakeBackend):
    """Its loads wait until `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()
        self.asked = threading.Event()

    def load(self, directory: Path, options: PluginOptions, device: str) -> Any:
        self.asked.set()
        assert self.go.wait(10)
        return super().load(directory, options, device)


@asynccontextmanager
async def serving(
    directory: Path,
    backend: Backend | None = None,
    handlers: Mapping[str, type[Handler]] | None = None,
    poll_interval_s: float = 3600,
) -> AsyncIterator[Repository]:
    backend = backend or FakeBackend()
    repository = Repository(
        directory,
        backends={backend.name: backend},
        handlers=handlers or {"default": Handler, "processor": Processor},
        poll_interval_s=poll_interval_s,
    )
    try:
        await repository.start()
        yield repository
    finally:
        await repository.close()


async def look_twice(repository: Repository) -> None:
    await repository.look()
    await repository.look()
    await repository.settle()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)


async def ask(model: ServedModel, *, version: int | None = None) -> tuple[int | None, float]:
    """Which version answered, and its factor."""
    request = Request(payload={"x": np.ones(1, np.float32)}, form=Form.TENSORS, model=model.name, version=version)
    response = OIP.codec.decode_response(await answered(model, OIP, OIP.codec.encode_request(request)))
    assert isinstance(response.payload, Mapping)
    return response.version, float(response.payload["x"][0])


def toml(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(text, encoding="utf-8")


def states(model: ServedModel) -> dict[int, State]:
    return {number: status.state for number, status in model.versions.items()}


def test_newest_version_answers_unless_one_is_named(tmp_path: Path) -> None:
    for number in (2, 10):
        FakeBackend.write(tmp_path / "m" / str(number), factor=number)

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            assert model.ready
            assert await ask(model) == (10, 10.0)
            assert await ask(model, version=2) == (2, 2.0)
            with pytest.raises(ModelNotFound, match='model "m" has no version 3; it has 2, 10'):
                await ask(model, version=3)

    asyncio.run(main())


def test_keeps_as_many_versions_as_asked_for_of_those_that_load(tmp_path: Path) -> None:
    for number in (1, 2, 3, 5):
        FakeBackend.write(tmp_path / "m" / str(number), factor=number)
    FakeBackend.write(tmp_path / "m" / "4", fail_load="it is broken")
    toml(tmp_path / "one", "keep_versions = 1")
    for number in (1, 2):
        FakeBackend.write(tmp_path / "one" / str(number))

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            assert states(model) == {5: State.AVAILABLE, 4: State.FAILED, 3: State.AVAILABLE}
            assert states(repository.models["one"]) == {2: State.AVAILABLE}
            shutil.rmtree(tmp_path / "m" / "5")
            await look_twice(repository)
            assert states(model) == {4: State.FAILED, 3: State.AVAILABLE, 2: State.AVAILABLE}

    asyncio.run(main())


def test_switch_under_load_loses_and_mixes_nothing(tmp_path: Path) -> None:
    toml(tmp_path / "m", "keep_versions = 1\nthreads = 2")
    FakeBackend.write(tmp_path / "m" / "1", factor=1)
    backend = FakeBackend()

    async def main() -> None:
        async with serving(tmp_path, backend, poll_interval_s=0.01) as repository:
            model = repository.models["m"]
            seen: set[int | None] = set()

            async def client() -> None:
                while 4 not in seen:
                    version, factor = await ask(model)
                    assert version == factor
                    seen.add(version)

            async def operator() -> None:
                for number in (2, 3, 4):
                    FakeBackend.write(tmp_path / "m" / str(number), factor=number)
                    await until(partial(seen.__contains__, number))

            async with asyncio.timeout(20):
                await asyncio.gather(operator(), *(client() for _ in range(16)))
            await repository.settle()
            assert seen == {1, 2, 3, 4}
            assert [loaded.closed for loaded in backend.models] == [True, True, True, False]
            assert states(model) == {4: State.AVAILABLE}

    asyncio.run(main())


def test_old_version_answers_while_the_new_one_loads(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1", factor=1)
    backend = LateBackend()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            model = repository.models["m"]
            backend.go.clear()
            FakeBackend.write(tmp_path / "m" / "2", factor=2)
            await repository.look()
            await repository.look()
            assert states(model) == {1: State.AVAILABLE, 2: State.LOADING}
            assert await ask(model) == (1, 1.0)
            with pytest.raises(ModelNotReady, match='version 2 of model "m" is not ready: it is loading'):
                await ask(model, version=2)
            backend.go.set()
            await repository.settle()
            assert await ask(model) == (2, 2.0)

    asyncio.run(main())


def test_broken_version_disturbs_nothing_and_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FakeBackend.write(tmp_path / "m" / "1", factor=1)
    FakeBackend.write(tmp_path / "other" / "1")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            FakeBackend.write(tmp_path / "m" / "2", factor=2, fail_load="weights are missing")
            for _ in range(3):
                await look_twice(repository)
            assert states(model) == {1: State.AVAILABLE, 2: State.FAILED}
            assert "weights are missing" in model.versions[2].error
            assert str(tmp_path / "m" / "2") in model.versions[2].error
            assert await ask(model) == (1, 1.0)
            with pytest.raises(ModelNotReady, match="it is failed"):
                await ask(model, version=2)
            assert repository.models["other"].ready
            FakeBackend.write(tmp_path / "m" / "2", factor=2)
            await look_twice(repository)
            assert await ask(model) == (2, 2.0)
            assert model.versions[2].error == ""

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert [record.getMessage().count("weights are missing") for record in caplog.records] == [1]


def test_error_tells_every_cause(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    (tmp_path / "m" / "handler.py").write_text("def broken(:", encoding="utf-8")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            error = repository.models["m"].versions[1].error
            assert "handler.py" in error
            assert "SyntaxError" in error

    asyncio.run(main())


def test_half_copied_version_is_not_loaded(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1", factor=1)
    backend = FakeBackend()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            model = repository.models["m"]
            FakeBackend.write(tmp_path / "m" / "2", factor=2)
            weights = tmp_path / "m" / "2" / "variables" / "weights"
            weights.parent.mkdir()
            for size in range(4):
                weights.write_bytes(b"w" * size)
                await repository.look()
                await repository.settle()
                assert 2 not in model.versions
                assert len(backend.models) == 1
            await repository.look()
            await repository.settle()
            assert await ask(model) == (2, 2.0)

    asyncio.run(main())


def test_version_changed_in_place_is_swapped(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1", factor=1)
    backend = FakeBackend()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            model = repository.models["m"]
            FakeBackend.write(tmp_path / "m" / "1", factor=12)
            await look_twice(repository)
            assert await ask(model) == (1, 12.0)
            assert [loaded.closed for loaded in backend.models] == [True, False]
            FakeBackend.write(tmp_path / "m" / "1", fail_load="worse than before")
            await look_twice(repository)
            assert await ask(model) == (1, 12.0)
            assert model.versions[1].state is State.AVAILABLE
            assert "worse than before" in model.versions[1].error

    asyncio.run(main())


def of_constant_time(folder: Path, factor: int) -> Path:
    """A version whose files have the same sizes and times of modification whatever the factor, of one digit, is."""
    os.utime(FakeBackend.write(folder, factor=factor) / "fake.json", (1, 1))
    return folder


def turn(link: Path, target: Path) -> None:
    """Has `link` lead to `target`, with no moment at which it leads nowhere."""
    other = link.with_name(".other")
    other.symlink_to(target)
    other.replace(link)


def replace_file(models: Path, store: Path) -> None:
    other = shutil.copy2(store / "new" / "1" / "fake.json", models / ".other")
    Path(other).replace(models / "m" / "1" / "fake.json")


def write_file_again(models: Path, store: Path) -> None:
    shutil.copy2(store / "new" / "1" / "fake.json", models / "m" / "1" / "fake.json")


def turn_the_models_link(models: Path, store: Path) -> None:
    turn(models / "m", store / "new")


def turn_the_versions_link(models: Path, store: Path) -> None:
    turn(models / "m" / "1", store / "new" / "1")


def turn_the_files_link(models: Path, store: Path) -> None:
    turn(models / "m" / "1" / "fake.json", store / "new" / "1" / "fake.json")


CHANGES = [replace_file, write_file_again, turn_the_models_link, turn_the_versions_link, turn_the_files_link]


@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_of_the_same_size_and_time_are_loaded(tmp_path: Path, change: Callable[[Path, Path], None]) -> None:
    store, models = tmp_path / "store", tmp_path / "models"
    old, new = (of_constant_time(store / name / "1", factor) for name, factor in (("old", 1), ("new", 2)))
    assert (old / "fake.json").stat().st_size == (new / "fake.json").stat().st_size
    models.mkdir()
    if change is turn_the_models_link:
        (models / "m").symlink_to(old.parent)
    elif change is turn_the_versions_link:
        (models / "m").mkdir()
        (models / "m" / "1").symlink_to(old)
    elif change is turn_the_files_link:
        (models / "m" / "1").mkdir(parents=True)
        (models / "m" / "1" / "fake.json").symlink_to(old / "fake.json")
    else:
        shutil.copytree(old, models / "m" / "1")

    async def main() -> None:
        async with serving(models) as repository:
            assert await ask(repository.models["m"]) == (1, 1.0)
            change(models, store)
            await look_twice(repository)
            assert await ask(repository.models["m"]) == (1, 2.0)

    asyncio.run(main())


def test_a_models_config_of_the_same_size_and_time_is_taken(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1")

    def configure(task_id: int) -> None:
        toml(tmp_path / "m", f"task_id = {task_id}\n")
        os.utime(tmp_path / "m" / "model.toml", (1, 1))

    async def main() -> None:
        configure(1)
        async with serving(tmp_path) as repository:
            assert set(repository.tasks) == {1}
            configure(2)
            await look_twice(repository)
            assert set(repository.tasks) == {2}

    asyncio.run(main())


def test_a_models_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    toml(tmp_path / "m", "\ufefftask_id = 5\n")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            assert set(repository.tasks) == {5}

    asyncio.run(main())


def test_removed_version_and_removed_model(tmp_path: Path) -> None:
    for number in (1, 2):
        FakeBackend.write(tmp_path / "m" / str(number), factor=number)
    toml(tmp_path / "m", "task_id = 7")
    backend = FakeBackend()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            model = repository.models["m"]
            assert repository.tasks == {7: model}
            shutil.rmtree(tmp_path / "m" / "2")
            await repository.look()
            assert await ask(model) == (2, 2.0), "one look may be mistaken"
            await repository.look()
            await repository.settle()
            assert await ask(model) == (1, 1.0)
            with pytest.raises(ModelNotFound):
                await ask(model, version=2)
            shutil.rmtree(tmp_path / "m")
            await look_twice(repository)
            assert not repository.models
            assert not repository.tasks
            assert not model.ready
            with pytest.raises(ModelNotReady):
                await ask(model)
            assert all(loaded.closed for loaded in backend.models)

    asyncio.run(main())


def test_unloaded_model_is_released(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    backend = FakeBackend()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            await ask(repository.models["m"])
            model = weakref.ref(backend.models.pop())
            FakeBackend.write(tmp_path / "m" / "1", factor=3)
            await look_twice(repository)
            gc.collect()
            assert model() is None

    asyncio.run(main())


def test_task_id_stays_with_who_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b", "c"):
        toml(tmp_path / name, "task_id = 69")
        FakeBackend.write(tmp_path / name / "1")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            assert repository.tasks == {69: repository.models["b"]}
            assert states(repository.models["c"]) == {1: State.FAILED}
            assert repository.models["c"].versions[1].error == 'task id 69 of model "c" is taken by model "b"'
            toml(tmp_path / "a", "task_id = 69")
            FakeBackend.write(tmp_path / "a" / "1")
            await look_twice(repository)
            assert repository.tasks == {69: repository.models["b"]}
            assert states(repository.models["a"]) == {1: State.FAILED}
            shutil.rmtree(tmp_path / "b")
            await look_twice(repository)
            assert repository.tasks == {69: repository.models["a"]}
            assert repository.models["a"].ready
            assert not repository.models["c"].ready

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert len(caplog.records) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('divice = "cuda"', 'unknown key "divice"'),
        ('threads = "2"', "threads: "),
        ("threads = 0", "threads: "),
        ("task_id = 1.5", "task_id: "),
        ("threads = ", "model.toml"),
        ('backend = "caffe"', 'no backend has the name "caffe" (there is fake)'),
        ('handler = "digits"', 'no handler has the name "digits" (there is default, processor)'),
        ('handler = "processor"', 'handler "processor" needs a processor.py'),
        ("[options]\nfacto = 2", 'unknown key "facto"'),
        ("[handler_options]\nlongest = 2", 'unknown key "longest"'),
    ],
)
def test_bad_model_toml_fails_the_model_and_says_where(tmp_path: Path, text: str, said: str) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    FakeBackend.write(tmp_path / "well" / "1")
    toml(tmp_path / "m", text)

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            assert model.versions[1].state is State.FAILED
            assert said in model.versions[1].error
            with pytest.raises(ModelNotReady, match="version 1 is failed"):
                await ask(model)
            assert repository.models["well"].ready
            (tmp_path / "m" / "model.toml").unlink()
            await look_twice(repository)
            assert model.ready

    asyncio.run(main())


def test_spoilt_model_toml_leaves_what_is_served(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1", factor=5)
    toml(tmp_path / "m", "task_id = 5")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            toml(tmp_path / "m", "task_id = ")
            await look_twice(repository)
            assert await ask(model) == (1, 5.0)
            assert repository.tasks == {5: model}
            assert "model.toml" in model.versions[1].error
            toml(tmp_path / "m", "task_id = 6")
            await look_twice(repository)
            assert repository.tasks == {6: model}
            assert model.versions[1].error == ""

    asyncio.run(main())


def test_versions_own_toml_takes_precedence(tmp_path: Path) -> None:
    toml(tmp_path / "m", 'device = "cuda:1"\n[options]\nfactor = 3')
    for number in (1, 2, 3):
        FakeBackend.write(tmp_path / "m" / str(number))
    toml(tmp_path / "m" / "2", "[options]\nfactor = 4")
    toml(tmp_path / "m" / "3", "task_id = 4")
    backend = FakeBackend()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            model = repository.models["m"]
            assert await ask(model, version=1) == (1, 3.0)
            assert await ask(model, version=2) == (2, 4.0)
            assert "task_id belongs in the model's folder" in model.versions[3].error
            assert {loaded.device for loaded in backend.models} == {"cuda:1"}

    asyncio.run(main())


def test_flat_folder_is_version_1(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "flat", factor=6)
    (tmp_path / "flat" / "__pycache__").mkdir()
    toml(tmp_path / "flat", "task_id = 6")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "model.onnx").touch()
    (tmp_path / "empty").mkdir()

    async def main() -> None:
        async with serving(tmp_path) as repository:
            assert await ask(repository.models["flat"]) == (1, 6.0)
            assert await ask(repository.tasks[6], version=1) == (1, 6.0)
            error = repository.models["strange"].versions[1].error
            assert "no backend recognises it (there is fake); it holds model.onnx" in error
            with pytest.raises(ModelNotReady, match='model "empty" is not ready: it has no versions'):
                await ask(repository.models["empty"])
            (tmp_path / "flat" / "__pycache__" / "m.pyc").touch()
            await look_twice(repository)
            assert await ask(repository.models["flat"]) == (1, 6.0)

    asyncio.run(main())


def test_only_folders_with_plain_names_count(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "store" / "abc")
    models = tmp_path / "models"
    FakeBackend.write(models / ".git" / "1")
    FakeBackend.write(models / "__pycache__" / "1")
    FakeBackend.write(models / "m" / "1")
    for name in ("-1", "1.5", "v2", "٣", ".3", "9" * 19):
        FakeBackend.write(models / "m" / name)
    (models / "README").touch()
    (models / "linked").mkdir()
    (models / "linked" / "7").symlink_to(tmp_path / "store" / "abc")
    (models / "whole").symlink_to(models / "m")
    (models / "loop").mkdir()
    FakeBackend.write(models / "loop" / "1")
    (models / "loop" / "1" / "again").symlink_to(models / "loop")

    async def main() -> None:
        async with serving(models) as repository:
            assert sorted(repository.models) == ["linked", "loop", "m", "whole"]
            assert states(repository.models["m"]) == {1: State.AVAILABLE}
            assert states(repository.models["linked"]) == {7: State.AVAILABLE}
            assert repository.models["loop"].ready
            assert repository.models["whole"].ready
            assert "../m" not in repository.models

    asyncio.run(main())


def test_any_digits_are_a_version_and_of_two_folders_of_a_number_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("0", "00000123", "00007", "7", str(2**63 - 1), str(2**63)):
        FakeBackend.write(tmp_path / "m" / name, factor=len(name))
    toml(tmp_path / "m", 'versions = "all"\nversion_labels = {first = 0}')

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            assert sorted(states(model)) == [0, 7, 123, 2**63 - 1]
            assert await ask(model, version=0) == (0, 1.0)
            assert await ask(model, version=7) == (7, 1.0)
            assert await ask(model, version=123) == (123, 8.0)
            assert model.labels["first"] == 0
            await look_twice(repository)
            shutil.rmtree(tmp_path / "m" / "7")
            await look_twice(repository)
            assert await ask(model, version=7) == (7, 5.0)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert caplog.messages == [f"{tmp_path / 'm'}: left out, another folder has the same number: 00007"]


def test_a_folder_that_is_too_large_for_a_version_is_refused_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dl_inference_core.node.scanning._MOST_ENTRIES", 50)
    FakeBackend.write(tmp_path / "m" / "1")
    for number in range(5):
        for file in range(12):
            path = tmp_path / "m" / "2" / str(number) / str(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    for file in range(60):
        path = tmp_path / "wide" / str(file)
        path.parent.mkdir(exist_ok=True)
        path.touch()

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            assert states(model) == {1: State.AVAILABLE, 2: State.FAILED}
            assert "it holds over 50 files and folders; expected no more" in model.versions[2].error
            assert str(tmp_path / "m" / "2") in model.versions[2].error
            assert "it holds over 50 files and folders" in repository.models["wide"].refusal
            FakeBackend.write(tmp_path / "m" / "2", factor=2)
            for number in range(2):
                shutil.rmtree(tmp_path / "m" / "2" / str(number))
            await look_twice(repository)
            assert await ask(model) == (2, 2.0)

    asyncio.run(main())


def test_links_that_lead_back_are_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    for number in range(4):
        (tmp_path / "m" / "1" / f"again{number}").symlink_to(tmp_path / "m")
    scandir, walked = os.scandir, []

    def count(path: Any) -> Any:
        walked.append(path)
        assert len(walked) < 100
        return scandir(path)

    monkeypatch.setattr(os, "scandir", count)

    async def main() -> None:
        async with serving(tmp_path) as repository:
            assert await ask(repository.models["m"]) == (1, 1.0)
            assert len(walked) == 3, "the model's folder, the version's, and the model's by a link"

    asyncio.run(main())


def test_a_path_that_is_none_fails_its_model_and_no_other(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            await repository.replace_named({"none": NamedModel(path=Path("/a\0b"))})
            assert "embedded null byte" in repository.models["none"].refusal
            FakeBackend.write(tmp_path / "m" / "2", factor=2)
            await look_twice(repository)
            assert await ask(repository.models["m"]) == (2, 2.0)
        with pytest.raises(ConfigError, match="directory cannot be read: embedded null byte"):
            await Repository(Path("/a\0b"), backends={}, handlers={}).start()

    asyncio.run(main())


def test_defaults_hold_where_neither_settings_nor_a_toml_say_otherwise(tmp_path: Path) -> None:
    for name in ("plain", "told", "set"):
        FakeBackend.write(tmp_path / name / "1")
    toml(tmp_path / "told", "threads = 3")
    named = {"set": NamedModel(path=tmp_path / "set", settings={"threads": 4})}

    async def main() -> None:
        repository = Repository(
            tmp_path,
            named=named,
            backends={"fake": FakeBackend()},
            handlers={},
            defaults={"threads": 2, "options": {"factor": 5}},
        )
        try:
            await repository.start()
            models = repository.models
            threads = {name: model.loaded[1].loaded.threads for name, model in models.items()}
            assert threads == {"plain": 2, "told": 3, "set": 4}
            assert await ask(models["plain"]) == (1, 5.0)
        finally:
            await repository.close()
        with pytest.raises(ConfigError, match=r"^models\.defaults: threads: "):
            Repository(tmp_path, backends={}, handlers={}, defaults={"threads": 0})

    asyncio.run(main())


def test_two_backends_that_recognise_a_model_are_an_error_until_one_is_named(tmp_path: Path) -> None:
    class Twin(FakeBackend):
        name = "twin"

    FakeBackend.write(tmp_path / "m" / "1")
    FakeBackend.write(tmp_path / "named" / "1")
    toml(tmp_path / "named", 'backend = "twin"')

    async def main() -> None:
        repository = Repository(tmp_path, backends={"fake": FakeBackend(), "twin": Twin()}, handlers={})
        await repository.start()
        error = repository.models["m"].versions[1].error
        assert "several backends recognise it (fake, twin); say which with `backend`" in error
        assert repository.models["named"].platform() == "twin"
        await repository.close()

    asyncio.run(main())


HANDLER = """
from dl_inference_core.node.handling import Handler

class Shifted(Handler):
    def postprocess(self, outputs, request):
        return {name: value + SHIFT for name, value in outputs.items()}
"""


def test_handler_file_of_the_version_before_that_of_the_model(tmp_path: Path) -> None:
    for number in (1, 2):
        FakeBackend.write(tmp_path / "m" / str(number), factor=number)
    (tmp_path / "m" / "handler.py").write_text(f"SHIFT = 10\n{HANDLER}", encoding="utf-8")
    (tmp_path / "m" / "2" / "handler.py").write_text(f"SHIFT = 20\n{HANDLER}", encoding="utf-8")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            assert await ask(model, version=1) == (1, 11.0)
            assert await ask(model, version=2) == (2, 22.0)
            (tmp_path / "m" / "handler.py").write_text(f"SHIFT = 100\n{HANDLER}", encoding="utf-8")
            await look_twice(repository)
            assert await ask(model, version=1) == (1, 101.0)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from dl_inference_core.node.handling import Handler", "found none"),
        (f"{HANDLER}\nclass Second(Shifted): ...", "found Shifted, Second"),
    ],
)
def test_handler_file_defines_exactly_one_handler(tmp_path: Path, source: str, found: str) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    (tmp_path / "m" / "handler.py").write_text(source, encoding="utf-8")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            assert found in repository.models["m"].versions[1].error

    asyncio.run(main())


def test_handler_that_cannot_load_closes_the_model(tmp_path: Path) -> None:
    class Needy(Handler):
        name = "needy"

        def load(self, model: Model, directory: Path) -> None:
            raise LookupError(f"no vocabulary in {directory}")

    FakeBackend.write(tmp_path / "m" / "1")
    toml(tmp_path / "m", 'handler = "needy"')
    backend = FakeBackend()

    async def main() -> None:
        async with serving(tmp_path, backend, {"needy": Needy}) as repository:
            assert f"LookupError: no vocabulary in {tmp_path / 'm' / '1'}" in repository.models["m"].versions[1].error
            assert backend.models[0].closed

    asyncio.run(main())


def test_directory_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = tmp_path / "models"

    async def main() -> None:
        with pytest.raises(ConfigError, match="models"):
            async with serving(models):
                pass
        FakeBackend.write(models / "m" / "1")
        async with serving(models, poll_interval_s=0.005) as repository:
            models.rename(tmp_path / "away")
            await until(lambda: "keeping the current models" in caplog.text)
            assert repository.models["m"].ready
            FakeBackend.write(tmp_path / "away" / "m" / "2")
            (tmp_path / "away").rename(models)
            await until(lambda: 2 in repository.models["m"].versions)

    asyncio.run(main())


def test_model_folder_that_cannot_be_read_leaves_what_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("m", "well"):
        FakeBackend.write(tmp_path / name / "1")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "m":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    async def main() -> None:
        async with serving(tmp_path) as repository:
            with monkeypatch.context() as patch:
                patch.setattr(os, "scandir", refuse)
                FakeBackend.write(tmp_path / "well" / "2", factor=2)
                await look_twice(repository)
                assert await ask(repository.models["well"]) == (2, 2.0)
                assert await ask(repository.models["m"]) == (1, 1.0)
            FakeBackend.write(tmp_path / "m" / "2", factor=2)
            await look_twice(repository)
            assert await ask(repository.models["m"]) == (2, 2.0)

    asyncio.run(main())


@pytest.mark.parametrize("error", [OSError("busy"), SystemExit(3)])
def test_model_that_cannot_close_is_logged_and_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def fail(self: FakeModel) -> None:
        raise error

    monkeypatch.setattr(FakeModel, "close", fail)
    FakeBackend.write(tmp_path / "m" / "1")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            await repository.close(grace_s=60)
            assert model.versions == {}

    asyncio.run(main())
    assert "closing m/1 failed" in caplog.text
    assert "still busy" not in caplog.text


def test_new_model_is_found_by_itself(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, poll_interval_s=0.005) as repository:
            assert not repository.models
            FakeBackend.write(tmp_path / "m" / "1")
            await until(lambda: "m" in repository.models and repository.models["m"].ready)

    asyncio.run(main())


def test_close_waits_for_no_load_and_leaves_nothing_open(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    backend = LateBackend()
    backend.go.clear()

    async def main() -> None:
        repository = Repository(tmp_path, backends={"fake": backend}, handlers={})
        starting = asyncio.create_task(repository.start())
        await until(backend.asked.is_set)
        starting.cancel()
        async with asyncio.timeout(5):
            await repository.close(grace_s=0.05)
        assert not repository.models
        backend.go.set()
        await until(lambda: bool(backend.models) and backend.models[0].closed)

    asyncio.run(main())


def test_every_setting_of_a_model_is_described() -> None:
    assert all(field.description for field in ModelConfig.model_fields.values())


# Folders


def a_version(root: Path) -> Path:
    return FakeBackend.write(root / "models" / "digits" / "1")


def a_flat_model(root: Path) -> Path:
    return FakeBackend.write(root / "models" / "digits")


def a_version_with_folders(root: Path) -> Path:
    folder = FakeBackend.write(root / "models" / "digits" / "1")
    (folder / "variables").mkdir()
    (folder / "variables" / "data").write_text("…")
    return folder


def a_model(root: Path) -> Path:
    return a_version(root).parent


def a_model_with_sources(root: Path) -> Path:
    folder = a_version(root).parent
    (folder / "vocabulary").mkdir()
    (folder / "vocabulary" / "words.txt").write_text("…")
    return folder


def empty(root: Path) -> Path:
    (root / "models" / ".hidden").mkdir(parents=True)
    return root / "models"


EXPECTED = "; expected a folder of models, which holds NAME/VERSION/files"
OF_A_VERSION = f"it holds the files of one version of a model{EXPECTED}: give {{models}}"
OF_A_MODEL = (
    f'it looks like the folder of one model, because names in it are version numbers ("1"){EXPECTED}: give {{models}} '
    "(a model whose name is a number needs a task_id in its model.toml)"
)
MISPLACED = {
    a_version: OF_A_VERSION,
    a_version_with_folders: OF_A_VERSION,
    a_flat_model: OF_A_VERSION,
    a_model: OF_A_MODEL,
    a_model_with_sources: OF_A_MODEL,
    empty: f"it holds no models{EXPECTED}",
}


@pytest.mark.parametrize("make", MISPLACED)
def test_a_folder_that_is_not_one_of_models_is_named_and_what_to_give_instead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], Path]
) -> None:
    directory = make(tmp_path)

    async def main() -> None:
        async with serving(directory) as repository:
            assert repository.misplaced == MISPLACED[make].format(models=tmp_path / "models")
            await repository.look()
            said = f"the models' directory {directory}: {repository.misplaced}"
            assert [message for message in caplog.messages if "directory" in message] == [said]
            FakeBackend.write(directory / "other" / "1")
            await repository.look()
            assert repository.misplaced == ""

    asyncio.run(main())


def test_a_backend_that_cannot_read_a_folder_is_asked_again_only_once_something_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(FakeBackend):
        @classmethod
        def recognises(cls, directory: Path) -> bool:
            raise OSError("cannot read")

    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.bin").write_bytes(b"model")

    def warnings() -> int:
        return sum("cannot tell whether" in message for message in caplog.messages)

    async def main() -> None:
        async with serving(tmp_path, Fails()) as repository:
            before = warnings()
            assert before
            await look_twice(repository)
            assert warnings() == before
            (tmp_path / "n" / "1").mkdir(parents=True)
            (tmp_path / "n" / "1" / "model.bin").write_bytes(b"model")
            await repository.look()
            assert warnings() > before

    asyncio.run(main())


def a_flat_model_named_by_a_number(models: Path) -> None:
    FakeBackend.write(models / "69")
    (models / "69" / "model.toml").write_text("task_id = 69\n")


def a_numbered_model_with_versions(models: Path) -> None:
    FakeBackend.write(models / "69" / "1")


def a_stray_file(models: Path) -> None:
    FakeBackend.write(models)
    FakeBackend.write(models / "m")


@pytest.mark.parametrize("make", [a_flat_model_named_by_a_number, a_numbered_model_with_versions, a_stray_file])
def test_a_folder_of_models_is_not_taken_for_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], None]
) -> None:
    make(tmp_path)

    async def main() -> None:
        async with serving(tmp_path) as repository:
            assert repository.misplaced == ""
            assert caplog.messages == []

    asyncio.run(main())


@pytest.mark.parametrize("versions", [[], [1]])
def test_a_version_whose_files_are_yet_to_come_is_no_version_and_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, versions: list[int]
) -> None:
    (tmp_path / "m").mkdir()
    for number in versions:
        FakeBackend.write(tmp_path / "m" / str(number), factor=number)
    (tmp_path / "m" / "2" / "variables").mkdir(parents=True)

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            for _ in range(3):
                await look_twice(repository)
                assert list(model.versions) == versions
            FakeBackend.write(tmp_path / "m" / "2", factor=2)
            await look_twice(repository)
            assert await ask(model) == (2, 2.0)

    asyncio.run(main())
    assert caplog.messages == []
