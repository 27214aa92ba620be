"""`dl-inference-core check` runs handlers on samples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.rehearsal import rehearse
from dl_inference_core.tensors import Form, Payload, Request
from dl_inference_core.testing import FakeModel

TOKENS = TensorSpec(name="tokens", dtype=np.dtype(np.int64), shape=(None, 16))


class _Text(Handler):
    """Takes texts alone, and makes `size` tokens of one."""

    name = "text"
    size = 16

    def preprocess(self, request: Request) -> Any:
        return {"tokens": [[ord(letter) for letter in request.payload.ljust(self.size)[: self.size]]]}  # type: ignore


class _Strict(_Text):
    def preprocess(self, request: Request) -> Any:
        if request.form is not Form.TEXT or request.payload != "the only text":
            raise BadRequest("expected the only text")
        return super().preprocess(request)


class _Short(_Text):
    size = 8


class _Nothing(_Text):
    def preprocess(self, request: Request) -> Any:
        return None


class _Misspelt(_Text):
    def preprocess(self, request: Request) -> Any:
        return tokenise(request)  # type: ignore[name-defined]  # noqa: F821


class _Exits(_Text):
    def preprocess(self, request: Request) -> Any:
        raise SystemExit(3)


class _Forgetful(_Text):
    def postprocess(self, outputs: Any, request: Request) -> Payload:
        pass


class _Unencodable(_Text):
    def postprocess(self, outputs: Any, request: Request) -> Payload:
        return object()  # type: ignore[return-value]


class _RefusesLate(_Text):
    def postprocess(self, outputs: Any, request: Request) -> Payload:
        raise BadRequest("the text says nothing")


class _RunsItself(_Text):
    def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
        raise RuntimeError("no vocabulary")


class _OnlyAfter(_Text):
    """Its preprocess takes tensors by mistake, and texts as it should."""

    def preprocess(self, request: Request) -> Any:
        return {"tokens": [[1]]} if request.form is Form.TENSORS else super().preprocess(request)


def run(cls: type[Handler], folder: Path, *specs: TensorSpec) -> str:
    model = FakeModel(1, Signature(inputs=specs or (TOKENS,)))
    handler = cls(PluginOptions())
    handler.prepare(model, folder)
    return rehearse(folder, model, handler)


@pytest.mark.parametrize("cls", [Handler, _Text, _OnlyAfter])
def test_a_handler_that_answers_one_of_the_samples_is_well(tmp_path: Path, cls: type[Handler]) -> None:
    assert run(cls, tmp_path) == ""


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (_Short, r'preprocess returned "tokens" of shape \[1, 8\]'),
        (_Nothing, "preprocess returned None"),
        (_Misspelt, "name 'tokenise' is not defined"),
        (_Exits, "3"),
        (_Forgetful, "postprocess returned None"),
        (_Unencodable, "object"),
        (_RunsItself, "no vocabulary"),
    ],
)
def test_a_handler_that_answers_none_of_the_samples_that_it_takes_fails(
    tmp_path: Path, cls: type[Handler], why: str
) -> None:
    with pytest.raises(ModelError, match=r"handler class _\w+ fails for a sample of") as caught:
        run(cls, tmp_path)
    assert re.search(why, str(caught.value.__cause__))


@pytest.mark.parametrize(("cls", "why"), [(_Strict, "expected the only text"), (_RefusesLate, "the text says nothing")])
def test_of_a_handler_that_takes_no_sample_it_is_said_that_it_was_not_tried(
    tmp_path: Path, cls: type[Handler], why: str
) -> None:
    note = run(cls, tmp_path)
    assert "was not tried, it takes none of the samples" in note
    assert why in note or "AttributeError" in note


def test_the_sample_beside_the_model_is_what_is_sent(tmp_path: Path) -> None:
    sent = []

    class Own(Handler):
        def preprocess(self, request: Request) -> Any:
            sent.append(request.payload)
            return super().preprocess(request)

    np.savez(tmp_path / "sample.npz", any=np.arange(3))
    assert run(Own, tmp_path, TensorSpec(name="any")) == ""
    assert sent[0]["any"].tolist() == [0, 1, 2]  # type: ignore[index, call-overload]
