"""TensorFlow Serving's `model_config_file`, and what becomes of the models that it or a client names."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from dl_inference_tfserving import model_config
from dl_inference_tfserving.named_models import NamedModels
from dl_inference_tfserving.options import TfServingOptions
from google.protobuf import text_format
from tensorflow_serving.apis import model_management_pb2
from tensorflow_serving.config import model_server_config_pb2

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import BadRequest, Code, ConfigError, InferenceError, PermissionDenied, ReloadFailed
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.processor import Processor
from dl_inference_core.node.repository import Repository
from dl_inference_core.testing import FakeBackend, FakeModel
from dl_inference_core.testing.memory import MemoryExchange
from dl_inference_core.wire import messages

FILE = Path("/etc/tf/models.config")
NEWEST = {"versions": "newest", "keep_versions": 1}


def parse(text: str) -> dict[str, NamedModel] | None:
    return model_config.parse(text.encode(), FILE)


def config(*models: str) -> str:
    return "model_config_list {\n" + "".join(f"  config {{ {model} }}\n" for model in models) + "}\n"


# What the file says


def test_the_documentations_own_example_is_read() -> None:
    text = """
    model_config_list: {
      config: {  # the first
        name: "first",
        base_path: "/tmp/first/",
        model_platform: "tensorflow",
        model_version_policy: { specific: { versions: 42 versions: 43 } }
        version_labels { key: 'stable' value: 42 }
        version_labels { key: 'canary' value: 43 }
      },
      config { name: "second" base_path: "models/second" }
    }
    """
    assert parse(text) == {
        "first": NamedModel(
            path=Path("/tmp/first"),
            settings={"versions": (42, 43), "version_labels": {"stable": 42, "canary": 43}, "backend": "tensorflow"},
            flat=False,
        ),
        "second": NamedModel(path=FILE.parent / "models/second", settings=NEWEST, flat=False),
    }


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("", NEWEST),
        ("model_version_policy {}", NEWEST),
        ("model_version_policy { latest {} }", NEWEST),
        ("model_version_policy { latest { num_versions: 0 } }", NEWEST),
        ("model_version_policy { latest { num_versions: 3 } }", {"versions": "newest", "keep_versions": 3}),
        ("model_version_policy { all {} }", {"versions": "all"}),
        ("model_version_policy { specific { versions: 7 versions: 0 } }", {"versions": (7, 0)}),
        ('version_labels { key: "first" value: 0 }', {**NEWEST, "version_labels": {"first": 0}}),
        ('model_platform: "torch"', {**NEWEST, "backend": "torch"}),
        ("model_type: TENSORFLOW", {**NEWEST, "backend": "tensorflow"}),
    ],
)
def test_policies_and_platforms_become_settings(policy: str, settings: dict[str, Any]) -> None:
    models = parse(config(f'name: "m" base_path: "/m" {policy}'))
    assert models is not None
    assert models["m"].settings == settings


def test_what_the_official_messages_write_is_read() -> None:
    official = model_server_config_pb2.ModelServerConfig()
    model = official.model_config_list.config.add(name="m", base_path="/m", model_platform="tensorflow")
    model.model_version_policy.latest.num_versions = 2
    model.version_labels["stable"] = 1
    model.logging_config.sampling_config.sampling_rate = 0.1
    model.logging_config.log_collector_config.filename_prefix = "/tmp/log"
    named = parse(text_format.MessageToString(official))
    expected = {"versions": "newest", "keep_versions": 2, "version_labels": {"stable": 1}, "backend": "tensorflow"}
    assert named == {"m": NamedModel(path=Path("/m"), settings=expected, flat=False)}


def test_no_list_is_none_and_an_empty_one_is_empty() -> None:
    assert parse("") is None
    assert parse("# nothing yet\n") is None
    assert parse("model_config_list {}") == {}


WRONG = {
    "no text form": ("{", "Error parsing text-format tensorflow.serving.ModelServerConfig: 1:1: "),
    "half of it": (
        'model_config_list {\n  config {\n    name: "m"\n',
        'Error parsing text-format tensorflow.serving.ModelServerConfig: 3:.*: Expected "}"',
    ),
    "an unknown field": (config('nme: "m"'), ': 2:.*no field named "nme". It has: name, base_path'),
    "a wrong type": (config('name: "m"', "name: 7"), ": 3:.*Expected string but found: '7'"),
    "a custom config": ("custom_model_config {}", "custom_model_config is not supported; expected model_config_list"),
    "no name": (config('base_path: "/m"'), r'config\[0\] \(""\): the name is missing or empty'),
    "a name with a slash": (config('name: "a/b" base_path: "/m"'), r'config\[0\] \("a/b"\): .*without "/"'),
    "a name twice": (
        config(*['name: "m" base_path: "/m"'] * 2),
        r'config\[1\] \("m"\): Illegal to list model m multiple times in config list',
    ),
    "no path": (config('name: "m"'), r'config\[0\] \("m"\): base_path is missing or empty'),
    "a path elsewhere": (config('name: "m" base_path: "gs://b/m"'), "base_path is gs://b/m; expected a folder of this"),
    "a path that is none": (config(r'name: "m" base_path: "/m\000"'), r"base_path is '/m\\x00'; expected printable"),
    "no specific version": (
        config('name: "m" base_path: "/m" model_version_policy { specific {} }'),
        "specific names no versions; expected one or more",
    ),
    "a negative version": (
        config('name: "m" base_path: "/m" model_version_policy { specific { versions: -1 } }'),
        "-1 is no version; expected 0 or more",
    ),
    "a label of no version": (
        config('name: "m" base_path: "/m" version_labels { key: "stable" value: -1 }'),
        'version_labels "stable": -1 is no version',
    ),
    "an empty label": (
        config('name: "m" base_path: "/m" version_labels { key: "" value: 1 }'),
        "a key of version_labels is empty",
    ),
    "two policies": (
        config('name: "m" base_path: "/m" model_version_policy { all {} latest {} }'),
        ': 2:.*"latest" is specified along with field "all"',
    ),
    "type and platform": (
        config('name: "m" base_path: "/m" model_type: TENSORFLOW model_platform: "tensorflow"'),
        "Illegal setting both ModelServerConfig::model_type",
    ),
    "another type": (config('name: "m" base_path: "/m" model_type: OTHER'), 'expected model_platform: "tensorflow"'),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_names_the_file_and_the_place_and_what_was_expected(case: str) -> None:
    text, *said = WRONG[case]
    for words in said:
        with pytest.raises(ConfigError, match=f"^{FILE}: .*{words}") as caught:
            parse(text)
        assert "\n" not in str(caught.value)


def test_a_file_that_is_no_utf_8_is_a_config_error() -> None:
    with pytest.raises(
        ConfigError,
        match=f"^{FILE}: Error parsing text-format tensorflow.serving.ModelServerConfig: line 1 is not UTF-8",
    ):
        model_config.parse(b"\xff", FILE)


def test_a_file_may_begin_with_a_byte_order_mark() -> None:
    text = config('name: "m" base_path: "/m"')
    assert model_config.parse(b"\xef\xbb\xbf" + text.encode(), FILE) == parse(text)


def test_what_has_no_effect_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = 'base_path: "/m" logging_config { sampling_config { sampling_rate: 1 } }'
    parse(config(f'name: "a" {model}', f'name: "b" {model} model_type: TENSORFLOW'))
    deprecated, ignored = (record.getMessage() for record in caplog.records)
    assert 'model_type is deprecated; model_platform: "tensorflow" says the same' in deprecated
    assert ignored == f"{FILE}: requests are not logged here: logging_config of a, b is ignored"


# What a client says


@asynccontextmanager
async def serving(named: NamedModels, backend: FakeBackend | None = None) -> AsyncIterator[Repository]:
    repository = Repository(
        None,
        named=named.models,
        backends={"fake": backend or FakeBackend()},
        handlers={"default": Handler, "processor": Processor},
        poll_interval_s=0,
    )
    try:
        await repository.start()
        named.start(repository)
        yield repository
    finally:
        await named.close()
        await repository.close()


def reloadable(named: Mapping[str, NamedModel] = MappingProxyType({})) -> NamedModels:
    return NamedModels(named, TfServingOptions(allow_remote_reload=True))


def request(*models: tuple[str, Path | str], **more: Any) -> MemoryExchange:
    """What the official client would send."""
    message = model_management_pb2.ReloadConfigRequest()
    message.config.model_config_list.SetInParent()
    for name, path in models:
        message.config.model_config_list.config.add(name=name, base_path=str(path), **more)
    return MemoryExchange("/tensorflow.serving.ModelService/HandleReloadConfigRequest", message.SerializeToString())


async def refusal(named: NamedModels, call: MemoryExchange) -> InferenceError:
    with pytest.raises(InferenceError) as caught:
        await named.reload(call)
    return caught.value


async def test_a_client_replaces_the_models_and_those_that_stay_keep_what_they_have_loaded(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        FakeBackend.write(tmp_path / name / "1")
    named = reloadable({name: NamedModel(path=tmp_path / name) for name in ("a", "b")})
    async with serving(named) as repository:
        assert set(repository.models) == {"a", "b"}
        kept = repository.models["b"].loaded[1]
        body = await named.reload(request(("b", tmp_path / "b"), ("c", tmp_path / "c")))
        response = model_management_pb2.ReloadConfigResponse.FromString(body)
        assert (response.status.error_code, response.status.error_message) == (0, "")
        assert set(repository.models) == set(named.models) == {"b", "c"}
        assert repository.models["b"].loaded[1] is kept
        assert repository.models["c"].ready
        await named.reload(request())
        assert set(repository.models) == set()


async def test_a_client_may_not_without_leave(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "a" / "1")
    named = NamedModels({"a": NamedModel(path=tmp_path / "a")}, TfServingOptions())
    async with serving(named) as repository:
        error = await refusal(named, request())
        assert isinstance(error, PermissionDenied)
        assert "allow_remote_reload = true" in str(error)
        assert set(repository.models) == {"a"}


async def test_what_cannot_be_changes_nothing(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "a" / "1")
    named = reloadable({"a": NamedModel(path=tmp_path / "a")})
    nothing = messages.ReloadConfigRequest().SerializeToString()
    custom = messages.ReloadConfigRequest(config={"custom_model_config": {}}).SerializeToString()
    async with serving(named) as repository:
        for call, said in (
            (request(("b", "relative")), "Expected model to have an absolute path or URI; got base_path()=relative"),
            (request(("b", tmp_path), ("b", tmp_path)), "Illegal to list model b multiple times in config list"),
            (MemoryExchange("", nothing), "Only ModelConfigList is currently supported"),
            (MemoryExchange("", custom), "Only ModelConfigList is currently supported"),
            (MemoryExchange("", b"\xff"), "the bytes are malformed"),
        ):
            error = await refusal(named, call)
            assert isinstance(error, BadRequest)
            assert said in str(error)
        assert set(repository.models) == {"a"}


async def test_the_answer_tells_of_each_model_that_failed_and_the_others_are_served(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "good" / "1")
    FakeBackend.write(tmp_path / "bad" / "3", fail_load="broken on purpose")
    named = reloadable()
    async with serving(named) as repository:
        (tmp_path / "empty").mkdir()
        models = [(name, tmp_path / name) for name in ("good", "bad", "none", "empty")]
        error = await refusal(named, request(*models))
        assert isinstance(error, ReloadFailed)
        assert error.code is Code.UNKNOWN
        assert str(error).startswith("3 servable(s) did not become available: {{{name: bad version: 3} due to error: ")
        assert "broken on purpose" in str(error)
        assert "{name: none due to error: [Errno 2] No such file or directory: " in str(error)
        assert f"{{name: empty due to error: there is no version in {tmp_path / 'empty'}}}" in str(error)
        assert repository.models["good"].ready


async def test_versions_and_labels_that_are_named_have_to_be_there(tmp_path: Path) -> None:
    for version in (1, 2):
        FakeBackend.write(tmp_path / "m" / str(version))
    FakeBackend.write(tmp_path / "m" / "3", fail_load="broken on purpose")
    named = reloadable()
    async with serving(named) as repository:
        policy: dict[str, Any] = {"model_version_policy": {"specific": {"versions": [1, 2]}}}
        labels: dict[str, Any] = {"version_labels": {"stable": 1}}
        await named.reload(request(("m", tmp_path / "m"), **policy, **labels))
        assert set(repository.models["m"].loaded) == {1, 2}
        error = await refusal(named, request(("m", tmp_path / "m"), **policy, version_labels={"canary": 3}))
        assert error.code is Code.FAILED_PRECONDITION
        assert "Request to assign label to version 3 of model m, which is not currently available" in str(error)
        policy["model_version_policy"]["specific"]["versions"] = [2, 3, 4]
        error = await refusal(named, request(("m", tmp_path / "m"), **policy))
        assert "broken on purpose" in str(error)
        assert f"{{name: m version: 4}} due to error: it is not in {tmp_path / 'm'}" in str(error)
        assert set(repository.models["m"].loaded) == {2}


async def test_a_model_elsewhere_is_another_even_if_its_files_look_the_same(tmp_path: Path) -> None:
    for factor in (2, 3):
        file = FakeBackend.write(tmp_path / f"x{factor}" / "1", factor=factor) / "fake.json"
        os.utime(file, ns=(0, 0))
    named = reloadable({"m": NamedModel(path=tmp_path / "x2")})
    async with serving(named) as repository:
        assert repository.models["m"].loaded[1].loaded.model.native.factor == 2
        await named.reload(request(("m", tmp_path / "x3")))
        assert repository.models["m"].loaded[1].loaded.model.native.factor == 3


async def test_a_client_that_leaves_does_not_undo_it(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "a" / "1")
    named = reloadable()
    async with serving(named) as repository:
        leaving = asyncio.create_task(named.reload(request(("a", tmp_path / "a"))))
        await asyncio.sleep(0)
        leaving.cancel()
        await until(lambda: "a" in repository.models and repository.models["a"].ready)
        assert leaving.cancelled()


async def test_what_older_files_answer_is_not_what_was_asked_for(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    FakeBackend.write(good / "1")
    FakeBackend.write(bad / "1", fail_load="broken on purpose")
    flat = FakeBackend.write(tmp_path / "flat")
    named = reloadable()
    async with serving(named) as repository:
        await named.reload(request(("m", good)))
        kept = repository.models["m"].loaded[1]
        specific: dict[str, Any] = {"model_version_policy": {"specific": {"versions": [1]}}}
        for call, said in (
            (request(("m", tmp_path / "none")), "name: m due to error: [Errno 2] No such file or directory: "),
            (request(("m", bad)), "{name: m version: 1} due to error: "),
            (request(("m", bad), **specific), "{name: m version: 1} due to error: "),
        ):
            error = await refusal(named, call)
            assert isinstance(error, ReloadFailed)
            assert f"1 servable(s) did not become available: {{{{{said}" in str(error)
            assert repository.models["m"].loaded[1] is kept
        error = await refusal(named, request(("m", flat)))
        assert f"there is no version in {flat}" in str(error), "a folder of files is no version"


async def test_a_platform_that_no_backend_has_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "a" / "1")
    named = reloadable()
    async with serving(named) as repository:
        await named.reload(request(("a", tmp_path / "a"), model_platform="fake"))
        error = await refusal(named, request(("b", tmp_path / "a"), model_platform="caffe"))
        assert isinstance(error, BadRequest)
        assert str(error) == "Model b requests unsupported platform caffe; the platforms are fake"
        assert set(repository.models) == {"a"}


async def test_a_request_that_hangs_holds_up_no_reload(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "a" / "1")
    FakeBackend.write(tmp_path / "b" / "1")
    file = tmp_path / "models.config"
    file.write_text(config(f'name: "a" base_path: "{tmp_path / "a"}"'))
    named = watched(file, allow_remote_reload=True)
    go, running = threading.Event(), threading.Event()

    def hang() -> None:
        running.set()
        assert go.wait(10)

    async with serving(named) as repository:
        hanging = asyncio.create_task(repository.models["a"].loaded[1]._threads.run(hang))
        try:
            await until(running.is_set)
            async with asyncio.timeout(5):
                await named.reload(request(("b", tmp_path / "b")))
                await named.reload(request(("c", tmp_path / "b")))
                file.write_text(config(f'name: "d" base_path: "{tmp_path / "b"}"'))
                await until(lambda: set(repository.models) == {"d"} and repository.models["d"].ready)
            assert not hanging.done()
        finally:
            go.set()
        await hanging


class Late(FakeBackend):
    """Its loads wait for `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def load(self, *arguments: Any) -> FakeModel:
        assert self.go.wait(10)
        return super().load(*arguments)


async def test_a_load_that_takes_long_holds_up_only_the_reload_that_names_it(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "a" / "1")
    named = reloadable()
    backend = Late()
    async with serving(named, backend) as repository:
        try:
            waiting = asyncio.create_task(named.reload(request(("a", tmp_path / "a"))))
            await until(lambda: "a" in repository.models)
            async with asyncio.timeout(5):
                await named.reload(request())
            assert not waiting.done()
        finally:
            backend.go.set()
        with pytest.raises(ReloadFailed, match="name: a due to error: another config has taken its place"):
            await waiting


@pytest.mark.parametrize("by", ["client", "file"])
@pytest.mark.parametrize("change", ["version", "path", "label"])
async def test_the_old_version_answers_until_the_new_one_has_loaded(tmp_path: Path, by: str, change: str) -> None:
    for name, number in (("m", 1), ("m", 2), ("elsewhere", 3)):
        FakeBackend.write(tmp_path / name / str(number))
    old: dict[str, Any] = {"model_version_policy": {"specific": {"versions": [1]}}, "version_labels": {"stable": 1}}
    path, versions, new = {"version": ("m", [2], 2), "path": ("elsewhere", [3], 3), "label": ("m", [1, 2], 2)}[change]
    then = {"model_version_policy": {"specific": {"versions": versions}}, "version_labels": {"stable": new}}
    file = tmp_path / "models.config"

    def say(folder: str, **more: Any) -> None:
        message = model_server_config_pb2.ModelServerConfig()
        message.model_config_list.config.add(name="m", base_path=str(tmp_path / folder), **more)
        file.write_text(text_format.MessageToString(message))

    say("m", **old)
    named = watched(file, allow_remote_reload=True)
    backend = Late()
    backend.go.set()
    async with serving(named, backend) as repository:
        model = repository.models["m"]
        assert model.labels["stable"] == 1
        backend.go.clear()
        try:
            if by == "client":
                reloading = asyncio.create_task(named.reload(request(("m", tmp_path / path), **then)))
            else:
                say(path, **then)
            await until(lambda: new in model.versions)
            assert model.labels["stable"] == max(model.loaded) == 1
        finally:
            backend.go.set()
        await until(lambda: new in model.loaded)
        assert model.labels["stable"] == max(model.loaded) == new
        if by == "client":
            await reloading
        assert set(model.loaded) == set(versions)


async def test_no_source_is_run_from_a_folder_that_only_a_client_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran = tmp_path / "ran"
    for name in ("ours", "theirs"):
        for file in ("handler.py", "processor.py"):
            (FakeBackend.write(tmp_path / name / "1") / file).write_text(
                f"import pathlib\npathlib.Path({str(ran)!r}).touch()"
            )
    handler = FakeBackend.write(tmp_path / "ours" / "2") / "handler.py"
    handler.write_text("from dl_inference_core.node.handling import Handler\nclass Mine(Handler): pass")
    ours = NamedModel(path=tmp_path / "ours")
    named = reloadable({"m": ours})
    async with serving(named) as repository:
        assert ran.exists(), "an operator's sources are run"
        ran.unlink()
        await named.reload(request(("m", tmp_path / "ours"), ("n", tmp_path / "theirs")))
        assert not ran.exists()
        assert type(repository.models["m"].loaded[2].loaded.instances[0].handler).__name__ == "Mine"
        assert type(repository.models["n"].loaded[1].loaded.instances[0].handler) is Handler
    assert f"{tmp_path / 'theirs' / '1' / 'handler.py'} is not run" in caplog.text


# What becomes of the file


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


def watched(file: Path, named: Mapping[str, NamedModel] = MappingProxyType({}), **more: Any) -> NamedModels:
    options = TfServingOptions(model_config_file=file, model_config_poll_interval_ms=10, **more)
    return NamedModels(named, options)


async def test_the_file_is_followed_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    file = tmp_path / "models.config"
    models = {name: f'name: "{name}" base_path: "{FakeBackend.write(tmp_path / name / "1").parent}"' for name in "ab"}
    file.write_text(config(models["a"]))
    named = watched(file)
    async with serving(named) as repository:
        kept = repository.models["a"].loaded[1]
        whole = config(*models.values())
        file.write_text(whole[:-10])
        await until(lambda: caplog.records)
        file.write_text("")
        await asyncio.sleep(0.05)
        assert set(repository.models) == {"a"}
        file.unlink()
        await until(lambda: len(caplog.records) == 2)
        await asyncio.sleep(0.05)
        file.write_text(whole)
        await until(lambda: "b" in repository.models and repository.models["b"].ready)
        assert repository.models["a"].loaded[1] is kept
        half, gone = (record.getMessage() for record in caplog.records)
        assert half.startswith(f"keeping the current models: {file}: Error parsing text-format ")
        assert gone.startswith("keeping the current models: ")
        assert str(file) in gone


async def test_what_a_client_said_stands_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "models.config"
    models = {name: f'name: "{name}" base_path: "{FakeBackend.write(tmp_path / name / "1").parent}"' for name in "abc"}
    file.write_text(config(models["a"]))
    named = watched(file, allow_remote_reload=True)
    async with serving(named) as repository:
        await named.reload(request(("b", tmp_path / "b")))
        await asyncio.sleep(0.05)
        assert set(repository.models) == {"b"}
        file.write_text(config(models["c"]))
        await until(lambda: set(repository.models) == {"c"})


async def test_the_models_of_our_own_config_stay_beside_those_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "models.config"
    models = {name: f'name: "{name}" base_path: "{FakeBackend.write(tmp_path / name / "1").parent}"' for name in "abc"}
    file.write_text(config(models["a"]))
    ours = {"b": NamedModel(path=tmp_path / "b")}
    async with serving(watched(file, ours)) as repository:
        assert set(repository.models) == {"a", "b"}
        file.write_text(config(models["b"]))
        await until(lambda: caplog.records)
        assert caplog.messages == [f"keeping the current models: {file}: our own config names the model b, too"]
        assert set(repository.models) == {"a", "b"}
        file.write_text(config(models["c"]))
        await until(lambda: set(repository.models) == {"b", "c"})


def test_a_file_that_is_missing_or_broken_at_the_start_is_a_config_error(tmp_path: Path) -> None:
    file = tmp_path / "models.config"
    with pytest.raises(ConfigError, match=f"^{file}: No such file"):
        watched(file)
    file.write_text("model_config_list {")
    with pytest.raises(
        ConfigError, match=f"^{file}: Error parsing text-format tensorflow.serving.ModelServerConfig: 1:"
    ):
        watched(file)


async def test_what_nobody_foresaw_is_logged_once_and_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "models.config"
    FakeBackend.write(tmp_path / "m" / "1")
    file.write_text(config())
    named = watched(file)

    def fail(*_: Any) -> None:
        raise KeyError("nobody foresaw it")

    async with serving(named) as repository:
        with monkeypatch.context() as patch:
            patch.setattr(model_config, "parse", fail)
            file.write_text(config('name: "m" base_path: "m"'))
            await until(lambda: caplog.records)
            await asyncio.sleep(0.05)
        await until(lambda: "m" in repository.models and repository.models["m"].ready)
    (record,) = caplog.records
    assert record.getMessage() == f"following {file} failed"
    assert record.exc_info is not None
