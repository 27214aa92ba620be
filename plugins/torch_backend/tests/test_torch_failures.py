"""What a client is told when a model fails, and whose fault that is."""

from __future__ import annotations

import asyncio
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dl_inference_torch_backend.backend import TorchBackend
from dl_inference_torch_backend.failures import explain
from dl_inference_torch_backend.testing import load
from torch import nn

from dl_inference_core.errors import BadRequest, HandlerFailed, InferenceError
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.processor import Processor
from dl_inference_core.node.repository import Repository
from dl_inference_core.node.sources import imports_from
from dl_inference_core.tensors import Form, Request
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire.protocol import PROTOCOLS

OIP = PROTOCOLS["openinference"]
SHAPES = r"RuntimeError: mat1 and mat2 shapes cannot be multiplied \(1x3 and 4x2\)"
SOURCE = """
import torch

class create_model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        {first}
        return self.linear(x)
"""


def write(directory: Path, kind: str, first: str = "pass") -> Path:
    """A model of that kind, whose forward has `first` for its first line."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.py").write_text(SOURCE.format(first=first))
    with imports_from(directory):
        module: nn.Module = __import__("model").create_model()
        if kind == "eager":
            torch.save(module.state_dict(), directory / "weights.pth")
        elif kind == "TorchScript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.jit.save(torch.jit.script(module), directory / "model.pt")  # type: ignore[no-untyped-call]
    return directory


def failure(model: Model, value: Any) -> Exception:
    with model.session(), pytest.raises(Exception) as caught:
        model({"x": value})
    return caught.value


every_kind = pytest.mark.parametrize("kind", ["eager", "TorchScript"])


@every_kind
@pytest.mark.parametrize(
    ("first", "value", "said"),
    [
        ("pass", np.ones((1, 3), np.float32), SHAPES),
        ("pass", np.ones((1, 4)), "must have the same dtype, but got Double and Float"),
        ("x = self.embedding(x)", np.array([77]), "index out of range in self"),
        ("x = self.embedding(x)", np.ones(1, np.float32), "Expected tensor for argument #1 'indices'"),
        ("assert x.dim() == 3, 'three, please'", np.ones((1, 4), np.float32), "AssertionError: three, please"),
        ("if x.dim() < 3: raise ValueError('more, please')", np.ones((1, 4), np.float32), "ValueError: more, please"),
    ],
)
def test_what_the_model_refuses_is_the_clients_fault(
    tmp_path: Path, kind: str, first: str, value: Any, said: str
) -> None:
    error = failure(load(write(tmp_path, kind, first)), value)
    assert isinstance(error, BadRequest)
    with pytest.raises(BadRequest, match=said):
        raise error
    assert "\n" not in str(error)


@every_kind
@pytest.mark.parametrize(
    ("first", "name", "said"),
    [
        ("if x.dim() < 3: raise RuntimeError('a table is missing')", "RuntimeError", "a table is missing"),
        ("x = torch.empty([1 << 50])", "RuntimeError", "can't allocate memory"),
    ],
)
def test_what_is_wrong_with_the_model_or_the_machine_is_not(
    tmp_path: Path, kind: str, first: str, name: str, said: str
) -> None:
    error = failure(load(write(tmp_path, kind, first)), np.ones((1, 4), np.float32))
    assert not isinstance(error, InferenceError)
    assert type(error).__name__ == name
    assert said in str(error).partition("\n")[0]


@pytest.mark.parametrize(
    ("first", "error"),
    [
        ("x.nothing", AttributeError),
        ("1 / 0", ZeroDivisionError),
        ("undefined", NameError),
        ("raise NotImplementedError('later')", NotImplementedError),
        ("(f := lambda n: f(n))(0)", RecursionError),
    ],
)
def test_a_fault_in_the_code_of_a_module_is_the_modules(tmp_path: Path, first: str, error: type[Exception]) -> None:
    assert type(failure(load(write(tmp_path, "eager", first)), np.ones((1, 4), np.float32))) is error


def test_a_program_says_what_was_wrong(tmp_path: Path) -> None:
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(nn.Embedding(10, 4), (torch.zeros(4, 3, dtype=torch.int64),), dynamic_shapes=(rows,))
    torch.export.save(program, tmp_path / "model.pt2")
    model = load(tmp_path)
    with model.session():
        with pytest.raises(BadRequest, match=r"^IndexError: index out of range in self$"):
            model({"input": np.full((1, 3), 77)})
        with pytest.raises(BadRequest, match="only takes inputs with"):
            model({"input": np.zeros((1, 2), np.int64)})


def test_a_frozen_model_says_what_was_wrong(tmp_path: Path) -> None:
    np.savez(write(tmp_path, "eager") / "sample.npz", x=np.ones((2, 4), np.float32))
    with pytest.raises(BadRequest, match=SHAPES):
        raise failure(load(tmp_path, execution="frozen"), np.ones((1, 3), np.float32))


@pytest.mark.parametrize("execution", ["compile", "aoti"])
def test_a_compiled_model_says_what_was_wrong(
    tmp_path: Path, execution: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    np.savez(write(tmp_path, "eager", "x = self.embedding(x).sum(1)") / "sample.npz", x=np.ones((2, 3), np.int64))
    model = load(tmp_path, execution=execution)
    caplog.clear()
    error = failure(model, np.full((2, 3), 77))
    assert isinstance(error, BadRequest)
    assert str(error).startswith("RuntimeError: index out of bounds: 0 <= ")
    error = failure(model, np.ones((2, 3), np.float32))
    assert isinstance(error, BadRequest)
    assert ("Expected tensor for argument #1 'indices'" if execution == "compile" else "unmatched dtype") in str(error)
    if execution == "compile":
        assert "must have same reduction dim" in str(failure(model, np.ones(2, np.int64)))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# As a service


async def ask(folder: Path, value: Any, **handlers: type[Handler]) -> InferenceError:
    """How the model "m" in `folder` fails for an input."""
    backend = TorchBackend(TorchBackend.Options())
    repository = Repository(folder, backends={"torch": backend}, handlers={"default": Handler, **handlers})
    await repository.start()
    assert repository.models["m"].ready, repository.models["m"].versions
    try:
        body = OIP.codec.encode_request(Request(payload={"x": value}, form=Form.TENSORS, model="m"))
        with pytest.raises(InferenceError) as caught:
            await answered(repository.models["m"], OIP, body)
        return caught.value
    finally:
        await repository.close()


@every_kind
@pytest.mark.parametrize("processor", ["", "def postprocess(x, **kwargs): return {'output': x}"])
def test_a_client_is_told_what_was_wrong_with_its_input(tmp_path: Path, kind: str, processor: str) -> None:
    write(tmp_path / "m", kind)
    if processor:
        (tmp_path / "m" / "processor.py").write_text(processor)
    error = asyncio.run(ask(tmp_path, np.ones((1, 3), np.float32), processor=Processor))
    assert type(error) is BadRequest
    with pytest.raises(BadRequest, match=f"^{SHAPES}$"):
        raise error


@every_kind
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def preprocess(x, **kwargs): return x[:, :3]", "run_model failed: "),
        ("def run_model(model, x, **kwargs): return model(x[:, :3])", "run_model failed: "),
        (
            "from dl_inference_core.node.handling import Handler\n"
            "class Cuts(Handler):\n"
            "    def preprocess(self, request): return {'x': request.payload['x'][:, :3]}",
            "it refuses what preprocess returned: ",
        ),
        (
            "from dl_inference_core.node.handling import Handler\n"
            "class Cuts(Handler):\n"
            "    def run_model(self, model, inputs, request):\n"
            "        return model.native(model.to_native(inputs['x'][:, :3]))",
            "run_model failed: ",
        ),
    ],
)
def test_what_a_handler_made_is_the_handlers_fault(tmp_path: Path, kind: str, source: str, said: str) -> None:
    file = "handler.py" if "Handler" in source else "processor.py"
    (write(tmp_path / "m", kind) / file).write_text(source)
    error = asyncio.run(ask(tmp_path, np.ones((1, 4), np.float32), processor=Processor))
    assert type(error) is HandlerFailed
    with pytest.raises(HandlerFailed, match=rf'^model "m" version 1: {said}{SHAPES} \(request id \w+\)$'):
        raise error


def test_outputs_of_one_name_are_the_models_fault(tmp_path: Path) -> None:
    write(tmp_path / "m", "eager", "return {'a': {'b': x}, 'a_b': x}")
    error = asyncio.run(ask(tmp_path, np.ones((1, 4), np.float32)))
    assert type(error) is HandlerFailed
    assert 'two outputs have the name "a_b"' in str(error)


def test_an_error_that_cannot_say_what_it_is_stays_as_it_is():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    error = Mute()
    assert explain(error) is error


@pytest.mark.parametrize(
    ("file", "is_torchs"), [("torch/nn/functional.py", True), ("torchvision/ops.py", False), ("model.py", False)]
)
def test_only_what_torchs_own_code_raises_is_the_inputs_fault(file, is_torchs):
    """A library beside torch, whose name begins like torch's, is the model's own code."""
    code = compile("raise RuntimeError('expected a batch')", str(Path(torch.__file__).parents[1] / file), "exec")
    with pytest.raises(RuntimeError) as caught:
        exec(code)
    assert isinstance(explain(caught.value), BadRequest) == is_torchs
