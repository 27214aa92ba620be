"""From a version's folder to a model and its handler."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from dl_inference_core import children
from dl_inference_core.config import NamedModel, PluginOptions
from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Model, Signature
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.loading import Loader, in_words
from dl_inference_core.tensors import Form, Request
from dl_inference_core.testing import FakeBackend, FakeModel


class Unsigned(FakeModel):
    """A model of whose signatures none, or one, can be served."""

    served: ClassVar[Mapping[str, Signature]] = {}

    @property
    def signatures(self) -> Mapping[str, Signature]:
        return self.served

    @property
    def unserved(self) -> Mapping[str, str]:
        return {"first": "its input is sparse", "second": "its output is ragged"}


class PartlySigned(Unsigned):
    served: ClassVar[Mapping[str, Signature]] = {"third": Signature()}


class UnsignedBackend(FakeBackend):
    model_class: ClassVar[type[Unsigned]] = Unsigned

    def load(self, directory: Path, options: PluginOptions, device: str) -> Any:
        model = self.model_class()
        self.models.append(model)
        return model


class PartlySignedBackend(UnsignedBackend):
    model_class = PartlySigned


class RunsItself(Handler):
    name = "runs itself"

    def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
        return inputs


def load(folder: Path, backend: FakeBackend, toml: str = "", **inputs: Any) -> Any:
    """The version in `folder` by `backend`; of the inputs name → (dtype, shape)."""
    FakeBackend.write(folder, inputs=inputs)
    (folder / "model.toml").write_text(toml, encoding="utf-8")
    handlers = {"default": Handler, "runs itself": RunsItself}
    return Loader(backends={"fake": backend}, handlers=handlers).load(NamedModel(path=folder), folder)


def test_a_model_without_a_signature_that_can_be_served_does_not_load(tmp_path: Path) -> None:
    backend = UnsignedBackend()
    with pytest.raises(ModelError) as error:
        load(tmp_path, backend)
    assert str(tmp_path) in str(error.value)
    assert '("first": its input is sparse; "second": its output is ragged)' in str(error.value)
    assert [model.closed for model in backend.models] == [True]
    load(tmp_path, backend, 'handler = "runs itself"')


def test_a_signature_that_is_not_served_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(tmp_path, PartlySignedBackend())
    assert [record.getMessage() for record in caplog.records] == [
        f'{tmp_path}: signature "first" is not served: its input is sparse',
        f'{tmp_path}: signature "second" is not served: its output is ragged',
    ]


class RefusingBackend(FakeBackend):
    refuses_shapes = True


@pytest.mark.parametrize(
    ("backend", "toml", "checks"),
    [
        (RefusingBackend, "", True),
        (RefusingBackend, "check_shapes = true", True),
        (RefusingBackend, "check_shapes = false", False),
        (FakeBackend, "check_shapes = false", True),
    ],
)
def test_shapes_are_left_to_models_that_can_refuse_them_if_the_config_says_so(
    tmp_path: Path, backend: type[FakeBackend], toml: str, checks: bool
) -> None:
    loaded = load(tmp_path, backend(), toml, x=["float32", [None, 1]])
    handler = loaded.instances[0].handler
    assert (handler.signature.checks_shapes, handler.signatures["serving_default"].checks_shapes) == (checks, checks)
    x = np.ones(3, np.float32)
    request = Request(payload={"x": x}, form=Form.TENSORS)
    if checks:
        with pytest.raises(BadRequest, match="does not take shape"):
            handler.preprocess(request)
    else:
        assert handler.preprocess(request)["x"] is x
    with pytest.raises(BadRequest, match="does not take dtype"):
        handler.preprocess(Request(payload={"x": np.ones((1, 1))}, form=Form.TENSORS))


def test_a_backend_that_exits_while_it_looks_at_files_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Exits(FakeBackend):
        @classmethod
        def recognises(cls, directory: Path) -> bool:
            raise SystemExit(3)

    FakeBackend.write(tmp_path)
    backends = {"exits": Exits(), "fake": FakeBackend()}
    loaded = Loader(backends=backends, handlers={}).load(NamedModel(path=tmp_path), tmp_path)
    assert loaded.platform == "fake"
    assert "cannot tell whether it is one of its models: SystemExit(3)" in caplog.text


class Fails(Handler):
    def load(self, model: Model, directory: Path) -> None:
        raise KeyError("m")


class Prepares(Handler):
    def prepare(self, model: Model, directory: Path) -> None:
        pass


class TakesNothing(Handler):
    def preprocess(self) -> Any:  # type: ignore[override]
        return None


class HasNone(Handler):
    postprocess = None  # type: ignore[assignment]


class LoadsLate(Handler):
    def load(self, model: Model, directory: Path) -> Any:  # looks like a plain function
        async def load() -> None: ...

        return load()


class CannotBeMade(Handler):
    def __init__(self, options: PluginOptions) -> None:
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Fails, "handler class Fails: its load failed; because of KeyError: 'm'"),
        (Prepares, "handler class Prepares: prepare is a method of the service's own; give yours another name"),
        (TakesNothing, "handler class TakesNothing: preprocess does not take its arguments, request"),
        (HasNone, "handler class HasNone: postprocess is None; expected a function"),
        (LoadsLate, "handler class LoadsLate: its load returned a coroutine; it must be a plain function, not async"),
        (CannotBeMade, "handler class CannotBeMade cannot be made; because of SystemExit: 3"),
    ],
)
def test_a_handler_that_cannot_answer_does_not_load(tmp_path: Path, cls: type[Handler], said: str) -> None:
    FakeBackend.write(tmp_path)
    (tmp_path / "model.toml").write_text('handler = "it"', encoding="utf-8")
    backend = FakeBackend()
    with pytest.raises(ModelError) as error:
        Loader(backends={"fake": backend}, handlers={"it": cls}).load(NamedModel(path=tmp_path), tmp_path)
    assert in_words(error.value) == said
    assert all(model.closed for model in backend.models)


def test_a_child_that_leaves_the_load_of_a_handler_is_ended_before_it_closes_its_parents_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def end_child(error: BaseException | None = None) -> None:
        assert isinstance(error, ModelError)
        assert isinstance(error.__cause__, KeyError)
        raise Ended

    monkeypatch.setattr(children, "end_child", end_child)
    FakeBackend.write(tmp_path)
    (tmp_path / "model.toml").write_text('handler = "it"', encoding="utf-8")
    backend = FakeBackend()
    with pytest.raises(Ended):
        Loader(backends={"fake": backend}, handlers={"it": Fails}).load(NamedModel(path=tmp_path), tmp_path)
    assert not any(model.closed for model in backend.models)


class Decorated(Handler):
    """Its methods are plain functions, whatever they wrap."""

    @staticmethod
    def preprocess(request: Request) -> Any:  # type: ignore[override]
        return request.payload

    def _run(function: Any) -> Any:  # type: ignore[misc]  # noqa: N805
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            return asyncio.run(function(*args))

        return run

    @_run  # type: ignore[arg-type]
    async def postprocess(self, outputs: Any, request: Request) -> Any:
        return outputs


def test_a_plain_function_around_an_asynchronous_one_is_taken(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path)
    (tmp_path / "model.toml").write_text('handler = "it"', encoding="utf-8")
    Loader(backends={"fake": FakeBackend()}, handlers={"it": Decorated}).load(NamedModel(path=tmp_path), tmp_path)


def test_an_error_that_cannot_say_what_it_is_has_its_type_in_words() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    error = ModelError("handler.py cannot be imported")
    error.__cause__ = Mute()
    assert in_words(error) == "handler.py cannot be imported; because of Mute"


def test_an_error_that_is_its_own_cause_has_words() -> None:
    """As `raise error from error` makes it."""
    error = ModelError("handler.py cannot be imported")
    error.__cause__ = error
    assert in_words(error) == "handler.py cannot be imported"
