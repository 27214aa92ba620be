"""Which versions are served, and models that lie outside the folder of models: changed while running, with no version
loaded again that stays."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import BadRequest, ModelNotFound, ModelNotReady
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.model import ServedModel, State
from dl_inference_core.node.repository import Repository
from dl_inference_core.tensors import Form, Request
from dl_inference_core.testing import FakeBackend, FakeModel
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire.protocol import PROTOCOLS

PREDICT = PROTOCOLS["tfserving"]


@asynccontextmanager
async def serving(
    directory: Path | None, backend: FakeBackend | None = None, poll_interval_s: float = 3600, **named: NamedModel
) -> AsyncIterator[Repository]:
    repository = Repository(
        directory,
        named=named,
        backends={"fake": backend or FakeBackend()},
        handlers={"default": Handler},
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


async def replace(repository: Repository, named: Mapping[str, NamedModel]) -> None:
    await repository.replace_named(named)
    await repository.settle()


async def ask(model: ServedModel, version: int | None = None, label: str = "") -> tuple[int | None, float]:
    """Which version answered, and its factor."""
    payload = {"x": np.ones(1, np.float32)}
    request = Request(payload=payload, form=Form.TENSORS, model=model.name, version=version, label=label)
    response = PREDICT.codec.decode_response(await answered(model, PREDICT, PREDICT.codec.encode_request(request)))
    assert isinstance(response.payload, Mapping)
    return response.version, float(response.payload["x"][0])


def write(folder: Path, *versions: int, factor: float = 1, **content: Any) -> Path:
    """A model whose versions have that many times their number as a factor."""
    for number in versions:
        FakeBackend.write(folder / str(number), factor=number * factor, **content)
    return folder


def toml(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(text, encoding="utf-8")


def available(model: ServedModel) -> list[int]:
    return sorted(number for number, status in model.versions.items() if status.state is State.AVAILABLE)


# Policies


def test_policies_change_while_running_and_no_version_that_stays_is_loaded_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", 1, 2, 3, 4, 5)
    backend = FakeBackend()
    expected = [
        ("", [4, 5]),
        ("keep_versions = 3", [3, 4, 5]),
        ('versions = "all"', [1, 2, 3, 4, 5]),
        ("versions = [2, 4]", [2, 4]),
        ("versions = [4, 3, 9]", [3, 4]),
        ('versions = "newest"\nkeep_versions = 1', [5]),
        ('versions = "all"\nkeep_versions = 1', [1, 2, 3, 4, 5]),
        ("versions = []", []),
        ("versions = [1]", [1]),
        ("", [4, 5]),
    ]

    async def main() -> None:
        toml(folder, expected[0][0])
        async with serving(tmp_path, backend) as repository:
            model = repository.models["m"]
            before: set[int] = set()
            for text, versions in expected:
                toml(folder, text)
                loads = len(backend.models)
                await look_twice(repository)
                assert available(model) == versions, text
                assert [status for status in model.versions.values() if status.error] == []
                assert len(backend.models) - loads == len(set(versions) - before if before else []), text
                before = set(versions) or {0}
                for number in {1, 2, 3, 4, 5} if versions else ():
                    if number in versions:
                        assert await ask(model, number) == (number, number)
                    else:
                        with pytest.raises(ModelNotFound, match=rf"Specific\(m, {number}\)"):
                            await ask(model, number)
                if versions:
                    assert await ask(model) == (max(versions), max(versions))
                else:
                    with pytest.raises(ModelNotReady, match="it has no versions"):
                        await ask(model)
            assert sum(not loaded.closed for loaded in backend.models) == 2

    asyncio.run(main())


def test_new_versions_come_as_the_policy_has_it(tmp_path: Path) -> None:
    for name, text in {"all": 'versions = "all"', "some": "versions = [1, 4]", "newest": "keep_versions = 1"}.items():
        toml(write(tmp_path / name, 1, 2, 3), text)

    async def main() -> None:
        async with serving(tmp_path) as repository:
            models = repository.models
            assert {name: available(models[name]) for name in models} == {
                "all": [1, 2, 3],
                "some": [1],
                "newest": [3],
            }
            for name in models:
                write(tmp_path / name, 4, 5)
            await look_twice(repository)
            assert {name: available(models[name]) for name in models} == {
                "all": [1, 2, 3, 4, 5],
                "some": [1, 4],
                "newest": [5],
            }
            assert await ask(models["some"]) == (4, 4.0)

    asyncio.run(main())


@pytest.mark.parametrize("text", ['versions = "all"', "versions = [1, 2, 3]"])
def test_a_version_that_cannot_load_does_not_block_the_others(tmp_path: Path, text: str) -> None:
    toml(write(tmp_path / "m", 1, 3), text)
    write(tmp_path / "m", 2, fail_load="no weights")

    async def main() -> None:
        async with serving(tmp_path) as repository:
            model = repository.models["m"]
            assert available(model) == [1, 3]
            assert "no weights" in model.versions[2].error
            toml(tmp_path / "m", "versions = [1]")
            await look_twice(repository)
            assert list(model.versions) == [1], "what is not to be served has no error to show"
            toml(tmp_path / "m", 'versions = "all"')
            await look_twice(repository)
            assert "no weights" in model.versions[2].error
            assert available(model) == [1, 3]

    asyncio.run(main())


@pytest.mark.parametrize("key", ["keep_versions = 3", 'versions = "all"', "version_labels = {a = 1}", "task_id = 3"])
def test_what_holds_for_a_model_cannot_stand_in_a_version(tmp_path: Path, key: str) -> None:
    toml(write(tmp_path / "m", 1) / "1", key)

    async def main() -> None:
        async with serving(tmp_path) as repository:
            error = repository.models["m"].versions[1].error
            assert f"{key.split()[0]} belongs in the model's folder" in error

    asyncio.run(main())


def test_a_policy_that_is_none_leaves_what_is_served_and_says_why(tmp_path: Path) -> None:
    toml(write(tmp_path / "m", 1, 2), 'versions = "all"\nversion_labels = {stable = 1}')
    backend = FakeBackend()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            model = repository.models["m"]
            toml(tmp_path / "m", 'versions = "oldest"\nversion_labels = {stable = 2}')
            await look_twice(repository)
            assert available(model) == [1, 2]
            assert await ask(model, label="stable") == (1, 1.0)
            assert "versions: Input should be 'newest' or 'all'" in model.versions[1].error
            toml(tmp_path / "m", "versions = [2]")
            await look_twice(repository)
            assert available(model) == [2]
            assert not model.versions[2].error
            with pytest.raises(BadRequest):
                await ask(model, label="stable")
            assert len(backend.models) == 2

    asyncio.run(main())


def test_what_is_said_of_each_version_loads_it_again_when_it_changes(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", 1)
    FakeBackend.write(tmp_path / "flat", factor=1)
    backend = FakeBackend()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            for name, model in repository.models.items():
                toml(tmp_path / name, "[options]\nfactor = 7")
                await look_twice(repository)
                assert await ask(model) == (1, 7.0)
                toml(tmp_path / name, "task_id = 7\n# a comment\n[options]\nfactor = 7\n")
                await look_twice(repository)
                assert repository.tasks == {7: model}
                toml(tmp_path / name, "")
                await look_twice(repository)
                assert await ask(model) == (1, 1.0)
            assert len(backend.models) == 2 + 2 * 2
            (folder / "helpers.py").write_text("")
            await look_twice(repository)
            assert len(backend.models) == 7, "sources are any version's"

    asyncio.run(main())


# A successor that has not loaded


class Late(FakeBackend):
    """Its loads wait for `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()

    def load(self, *arguments: Any) -> FakeModel:
        assert self.go.wait(10)
        return super().load(*arguments)


SWITCHES = {
    "a policy": ("versions = [1]", "versions = [2]"),
    "a policy and a label": (
        "versions = [1]\nversion_labels = {stable = 1}",
        "versions = [2]\nversion_labels = {stable = 2}",
    ),
    "a label to one beside another that has loaded": (
        "versions = [1, 3]\nversion_labels = {stable = 1}",
        "versions = [2, 3]\nversion_labels = {stable = 2}",
    ),
    "down": ('versions = "newest"\nkeep_versions = 1', "versions = [2]"),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_old_version_answers_until_the_new_one_has_loaded(tmp_path: Path, switch: str, fails: bool) -> None:
    first, then = SWITCHES[switch]
    folder = write(tmp_path / "m", 1, 3)
    write(folder, 2, **({"fail_load": "broken on purpose"} if fails else {}))
    toml(folder, first)
    label = "stable" if "stable" in first else ""
    backend = Late()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            model = repository.models["m"]
            old = await ask(model, label=label)
            backend.go.clear()
            try:
                toml(folder, then)
                await repository.look()
                await repository.look()
                assert model.versions[2].state is State.LOADING
                assert await ask(model, label=label) == old
            finally:
                backend.go.set()
            await repository.settle()
            if not fails:
                assert await ask(model, label=label) == (2, 2.0) if label else (max(available(model)), 2.0)
                assert set(available(model)) == {"[2]": {2}, "[2, 3]": {2, 3}}[then.partition("\n")[0][11:]]
            elif "3]" not in then:
                assert await ask(model, label=label) == old, "nothing has taken its place"
                assert "broken on purpose" in model.versions[2].error
                write(folder, 2, factor=10)
                await look_twice(repository)
                assert await ask(model, label=label) == (2, 20.0)
                assert available(model) == [2]
            else:
                with pytest.raises(ModelNotReady, match=r"version 2 .* is failed"):
                    await ask(model, label=label)
                assert available(model) == [3]

    asyncio.run(main())


def test_of_a_version_whose_files_are_gone_nothing_stays_once_its_successor_has_failed(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", 2)
    toml(folder, "version_labels = {stable = 2}")
    backend = Late()

    async def main() -> None:
        async with serving(tmp_path, backend) as repository:
            model = repository.models["m"]
            backend.go.clear()
            try:
                write(folder, 1, fail_load="broken on purpose")
                shutil.rmtree(folder / "2")
                toml(folder, "version_labels = {stable = 1}")
                await repository.look()
                await repository.look()
                assert await ask(model) == await ask(model, label="stable") == (2, 2.0)
            finally:
                backend.go.set()
            await repository.settle()
            assert list(model.versions) == [1]
            with pytest.raises(ModelNotReady, match='version 1 of model "m" is not ready: it is failed'):
                await ask(model, label="stable")
            assert [loaded.closed for loaded in backend.models] == [True]

    asyncio.run(main())


def test_a_model_that_moves_keeps_what_it_has_until_something_there_has_loaded(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old", 5), write(tmp_path / "new", 3, fail_load="broken on purpose")
    backend = Late()

    async def main() -> None:
        async with serving(None, backend, m=NamedModel(path=old)) as repository:
            model = repository.models["m"]
            await replace(repository, {"m": NamedModel(path=new)})
            assert await ask(model) == (5, 5.0)
            assert "broken on purpose" in model.versions[3].error
            write(new, 3)
            backend.go.clear()
            try:
                await repository.look()
                await repository.look()
                assert await ask(model) == (5, 5.0)
            finally:
                backend.go.set()
            await repository.settle()
            assert await ask(model) == (3, 3.0)
            assert list(model.versions) == [3]

    asyncio.run(main())


# Models by name


def test_models_by_name_alone_and_beside_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "models" / "m", 1)
    far = NamedModel(path=write(tmp_path / "far" / "away", 3, 4, factor=10))
    flat = NamedModel(path=FakeBackend.write(tmp_path / "flat", factor=5))

    async def main() -> None:
        async with serving(tmp_path / "models", ranking=far, **{"a-7": flat}) as repository:
            assert sorted(repository.models) == ["a-7", "m", "ranking"]
            assert await ask(repository.models["ranking"]) == (4, 40.0)
            assert await ask(repository.models["ranking"], 3) == (3, 30.0)
            assert await ask(repository.models["a-7"]) == (1, 5.0)
            write(tmp_path / "far" / "away", 5, factor=10)
            await look_twice(repository)
            assert await ask(repository.models["ranking"]) == (5, 50.0)
        async with serving(None, ranking=far) as repository:
            assert list(repository.models) == ["ranking"]
            assert await ask(repository.models["ranking"]) == (5, 50.0)

    asyncio.run(main())


def test_settings_come_before_the_models_own_toml_and_before_a_versions(tmp_path: Path) -> None:
    folder = write(tmp_path / "far", 1, 2, 3)
    toml(folder, 'task_id = 5\nkeep_versions = 1\ndevice = "cuda:1"\n[options]\nfactor = 7')
    toml(folder / "1", 'device = "cuda:2"\n[options]\nfactor = 8')
    backend = FakeBackend()
    settings = {"versions": [1, 3], "version_labels": {"stable": 1}, "options": {"factor": 9.0}, "task_id": 6}

    async def main() -> None:
        async with serving(None, backend, m=NamedModel(path=folder, settings=settings)) as repository:
            model = repository.models["m"]
            assert repository.tasks == {6: model}
            assert available(model) == [1, 3]
            assert await ask(model, label="stable") == (1, 9.0)
            assert await ask(model) == (3, 9.0)
            assert sorted(loaded.device for loaded in backend.models) == ["cuda:1", "cuda:2"]
            await replace(repository, {"m": NamedModel(path=folder)})
            assert repository.tasks == {5: model}
            assert available(model) == [3]
            assert await ask(model) == (3, 7.0)

    asyncio.run(main())


@pytest.mark.parametrize("flat", [False, True])
def test_settings_that_change_load_again_only_what_they_change(tmp_path: Path, flat: bool) -> None:
    folder = FakeBackend.write(tmp_path / "m", factor=1) if flat else write(tmp_path / "m", 1)
    backend = FakeBackend()

    async def main() -> None:
        async with serving(None, backend, m=NamedModel(path=folder)) as repository:
            model = repository.models["m"]
            settings: dict[str, Any] = {"versions": "all", "version_labels": {"stable": 1}, "task_id": 3}
            await replace(repository, {"m": NamedModel(path=folder, settings=settings)})
            assert len(backend.models) == 1
            assert await ask(model, label="stable") == (1, 1.0)
            settings = {**settings, "options": {"factor": 2.0}}
            await replace(repository, {"m": NamedModel(path=folder, settings=settings)})
            assert len(backend.models) == 2
            assert await ask(model) == (1, 2.0)
            assert [loaded.closed for loaded in backend.models] == [True, False]

    asyncio.run(main())


def test_sources_that_may_be_run_from_now_on_load_it_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", 1)
    (folder / "handler.py").write_text(
        "from dl_inference_core.node.handling import Handler\nclass Mine(Handler): pass", encoding="utf-8"
    )

    async def main() -> None:
        async with serving(None, m=NamedModel(path=folder, sources=False)) as repository:
            model = repository.models["m"]
            assert type(model.loaded[1].loaded.instances[0].handler) is Handler
            await replace(repository, {"m": NamedModel(path=folder)})
            assert type(model.loaded[1].loaded.instances[0].handler).__name__ == "Mine"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"divice": "cpu"}, 'unknown key "divice"'),
        ({"versions": "oldest"}, "versions: Input should be"),
        ({"threads": "2"}, "threads: "),
        ({"backend": "caffe"}, 'no backend has the name "caffe"'),
        ({"handler": "none"}, 'no handler has the name "none"'),
    ],
)
def test_settings_that_are_wrong_fail_the_model_and_no_other(
    tmp_path: Path, settings: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    well = NamedModel(path=write(tmp_path / "well", 1))
    bad = NamedModel(path=write(tmp_path / "bad", 1), settings=settings)

    async def main() -> None:
        async with serving(None, m=bad, well=well) as repository:
            assert said in repository.models["m"].versions[1].error
            with pytest.raises(ModelNotReady):
                await ask(repository.models["m"])
            assert await ask(repository.models["well"]) == (1, 1.0)
            await replace(repository, {"m": NamedModel(path=bad.path), "well": well})
            assert await ask(repository.models["m"]) == (1, 1.0)
            await replace(repository, {"m": bad, "well": well})
            assert await ask(repository.models["m"]) == (1, 1.0), "what was served stays"
            assert said in repository.models["m"].versions[1].error

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert said in caplog.text


def test_models_are_added_and_removed_and_the_others_stay_loaded(tmp_path: Path) -> None:
    one, two, three = (
        NamedModel(path=write(tmp_path / name, 1, factor=f)) for name, f in (("a", 1), ("b", 2), ("c", 3))
    )
    backend = FakeBackend()

    async def main() -> None:
        async with serving(None, backend, one=one, two=two) as repository:
            kept, gone = repository.models["one"], repository.models["two"]
            await replace(repository, {"one": one, "three": three})
            assert sorted(repository.models) == ["one", "three"]
            assert repository.models["one"] is kept
            assert await ask(repository.models["three"]) == (1, 3.0)
            with pytest.raises(ModelNotReady):
                await ask(gone)
            assert sorted((loaded.factor, loaded.closed) for loaded in backend.models) == [
                (1, False),
                (2, True),
                (3, False),
            ]
            await replace(repository, {})
            assert not repository.models
            assert all(loaded.closed for loaded in backend.models)

    asyncio.run(main())


def test_a_model_that_moves_is_loaded_from_there_while_the_old_one_answers(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old", 1, 2), write(tmp_path / "new", 2, 3, factor=5)
    backend = FakeBackend()

    async def main() -> None:
        async with serving(None, backend, m=NamedModel(path=old)) as repository:
            model = repository.models["m"]
            answered = []

            async def keep_asking() -> None:
                while True:
                    answered.append(await ask(model))
                    await asyncio.sleep(0)

            asking = asyncio.create_task(keep_asking())
            await replace(repository, {"m": NamedModel(path=new)})
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert repository.models["m"] is model
            assert await ask(model) == (3, 15.0)
            assert await ask(model, 2) == (2, 10.0)
            with pytest.raises(ModelNotFound):
                await ask(model, 1)
            assert set(answered) <= {(2, 2.0), (2, 10.0), (3, 15.0)}
            assert (2, 2.0) in answered

    asyncio.run(main())


def test_files_of_the_same_name_size_and_time_elsewhere_are_others(tmp_path: Path) -> None:
    """As of images and archives that set every time to the same."""
    old, new = write(tmp_path / "old", 1, factor=3), write(tmp_path / "new", 1, factor=4)
    for folder in (old, new):
        os.utime(folder / "1" / "fake.json", ns=(10**18, 10**18))
    assert (old / "1" / "fake.json").stat().st_size == (new / "1" / "fake.json").stat().st_size

    async def main() -> None:
        async with serving(None, m=NamedModel(path=old)) as repository:
            assert await ask(repository.models["m"]) == (1, 3.0)
            await replace(repository, {"m": NamedModel(path=new)})
            assert await ask(repository.models["m"]) == (1, 4.0)

    asyncio.run(main())


def test_a_folder_that_is_missing_is_waited_for_and_disturbs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = NamedModel(path=write(tmp_path / "there", 1))
    missing = NamedModel(path=tmp_path / "missing")

    async def main() -> None:
        async with serving(None, there=there, m=missing) as repository:
            assert await ask(repository.models["there"]) == (1, 1.0)
            model = repository.models["m"]
            with pytest.raises(ModelNotReady, match="it has no versions"):
                await ask(model)
            write(missing.path, 2)
            await look_twice(repository)
            assert await ask(model) == (2, 2.0)
            shutil.rmtree(missing.path)
            await look_twice(repository)
            assert await ask(model) == (2, 2.0), "a folder that cannot be read changes nothing"
            write(missing.path, 3)
            await look_twice(repository)
            assert await ask(model) == (3, 3.0)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert 'model "m"' in caplog.text
    assert str(missing.path) in caplog.text


def test_a_name_takes_the_place_of_the_folders_model_and_gives_it_back(tmp_path: Path) -> None:
    models = tmp_path / "models"
    write(models / "m", 1, 2)
    write(models / "other", 1)
    far = NamedModel(path=write(tmp_path / "far", 1, factor=100))
    backend = FakeBackend()

    async def main() -> None:
        async with serving(models, backend, m=far) as repository:
            model = repository.models["m"]
            assert sorted(repository.models) == ["m", "other"]
            assert await ask(model) == (1, 100.0)
            assert len(backend.models) == 2, "the folder's is not loaded"
            await replace(repository, {})
            assert repository.models["m"] is model
            assert await ask(model) == (2, 2.0)
            assert await ask(model, 1) == (1, 1.0)
            await replace(repository, {"m": far})
            assert await ask(model) == (1, 100.0)
            with pytest.raises(ModelNotFound):
                await ask(model, 2)

    asyncio.run(main())


def test_a_model_by_name_has_a_task_id_only_if_nobody_else_has(tmp_path: Path) -> None:
    write(tmp_path / "models" / "m", 1)
    toml(tmp_path / "models" / "m", "task_id = 7")
    far = NamedModel(path=write(tmp_path / "far", 1), settings={"task_id": 7})

    async def main() -> None:
        async with serving(tmp_path / "models") as repository:
            await replace(repository, {"n": far})
            assert repository.tasks == {7: repository.models["m"]}
            assert 'task id 7 of model "n" is taken by model "m"' in repository.models["n"].versions[1].error
            shutil.rmtree(tmp_path / "models" / "m")
            await look_twice(repository)
            assert repository.tasks == {7: repository.models["n"]}
            assert await ask(repository.models["n"]) == (1, 1.0)

    asyncio.run(main())


def test_without_polling_nothing_is_looked_for_until_a_name_is_given(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", 1)

    async def main() -> None:
        async with serving(None, poll_interval_s=0, m=NamedModel(path=folder)) as repository:
            model = repository.models["m"]
            write(folder, 2)
            await asyncio.sleep(0.1)
            assert available(model) == [1]
            await replace(repository, {"m": NamedModel(path=folder, settings={"versions": "all"})})
            assert available(model) == [1, 2]

    asyncio.run(main())


def test_names_that_follow_one_another_quickly_end_with_the_last(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(number), 1, factor=number) for number in range(1, 6)]
    backend = FakeBackend()

    async def main() -> None:
        async with serving(None, backend) as repository:
            await asyncio.gather(*(repository.replace_named({"m": NamedModel(path=folder)}) for folder in folders))
            await repository.settle()
            assert await ask(repository.models["m"]) == (1, 5.0)
            assert sum(not loaded.closed for loaded in backend.models) == 1

    asyncio.run(main())


async def test_a_label_of_a_version_that_is_not_loaded_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toml(write(tmp_path / "m", 1, 2, 3), "keep_versions = 2\nversion_labels = {old = 1, none = 7, stable = 3}")
    async with serving(tmp_path) as repository:
        model = repository.models["m"]
        said = (
            'version_labels: "none" is version 7, "old" is version 1; expected versions that are loaded, which are 2, 3'
        )
        assert model.unserved_labels == {"none": 7, "old": 1}
        assert model.describe_labels() == said
        for _ in range(2):
            await look_twice(repository)
            assert caplog.messages == [f'model "m" in {tmp_path / "m"}: {said}']
        toml(tmp_path / "m", "keep_versions = 2\nversion_labels = {stable = 3}")
        await look_twice(repository)
        assert (model.unserved_labels, model.describe_labels()) == ({}, "")
        assert len(caplog.messages) == 1
