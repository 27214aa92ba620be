"""Which file in a folder is the model, what files that are not models are called, weights in one file or in parts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from dl_inference_torch_backend.backend import TorchBackend
from dl_inference_torch_backend.testing import load, refusal, saved, sha256, zipped

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.loading import Loader

MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 3, bias=False)
        self.second = torch.nn.Linear(3, 3, bias=False)
        {more}

    def forward(self, x):
        return self.second(self.first(x))

def create_model():
    return Net()
"""
TIED = "self.second.weight = self.first.weight"
POSITIONS = 'self.register_buffer("position_ids", torch.arange(3))'
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def reason(directory: Path, **options: Any) -> str:
    """Of weights that do not fit."""
    with pytest.raises(ModelError, match="do not fit the module that create_model") as error:
        load(directory, **options)
    return str(error.value.__cause__)


def output(model: Model) -> Any:
    with model.session():
        return model({"x": X})["output"]


def net(directory: Path, more: str = "") -> torch.nn.Module:
    """A module with random weights, whose source is put into `directory`."""
    source = MODEL.format(more=more)
    (directory / "model.py").write_text(source)
    scope: dict[str, Any] = {"__name__": "model"}
    exec(source, scope)
    module: torch.nn.Module = scope["create_model"]()
    return module


def answers_as(model: Model, module: torch.nn.Module) -> bool:
    return bool(np.allclose(output(model), module(torch.from_numpy(X)).detach().numpy(), atol=1e-6))


# Files that are not models

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4096\n"
FOREIGN = {
    "a Git LFS pointer": (POINTER, "a Git LFS pointer, which stands for the model: run `git lfs pull`"),
    "a web page": (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "a web page (HTML)"),
    "an error in JSON": (b'{"error": "no such file"}\n', 'text that begins with "{"error": "no such file"}"'),
    "text that is cut in a character": ("é".encode() * 300, "text that begins with"),
    "a pickle of protocol 0": (b"cos\nsystem\n(S'true'\ntR.", 'text that begins with "cos"'),
    "nothing": (b"", "it is empty"),
    "gzip data": (b"\x1f\x8b\x08" + bytes(20), "gzip data: unpack it first"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
    "noise": (bytes(range(7, 200)), "its first bytes are 07 08 09 0a 0b 0c 0d 0e; expected"),
    "noise like a pickle": (b"\x80\x02" + bytes(range(7, 200)), "its first bytes are 80 02 07 08"),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pt2", ".safetensors"])
@pytest.mark.parametrize(("content", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_not_a_model_is_called_what_it_is_without_advice_to_trust_it(tmp_path, content, words, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    for options in ({}, {"sha256": ["0" * 64]}, {"sha256": [sha256(path)]}):
        message = refusal(tmp_path, **options)
        assert f"{path} is not a model: " in message
        assert words in message
        assert "sha256" not in message
        assert "trust" not in message


DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "cut": (".pt", saved({"x": torch.ones(1000)})[:2000], "a zip archive whose end is missing or damaged"),
    "cut, of torch.export": (".pt2", zipped({"a/b": bytes(100)})[:80], "a zip archive whose end is missing"),
    "another zip": (
        ".pt",
        zipped({"x.npy": b"1", "y.npy": b"2"}),
        "neither torch.save nor torch.jit.save wrote; it holds",
    ),
    "no pickle": (
        ".pth",
        zipped({"archive/data.pkl": b"\x07\x08", "archive/version": b"3\n"}),
        "data.pkl is not a pickle",
    ),
    "a zip archive, no safetensors": (".safetensors", saved({}), "its first bytes are 50 4b 03 04"),
    "a pickle, no archive": (".pt2", saved({}, _use_new_zipfile_serialization=False), "its first bytes are 80 02"),
}


@pytest.mark.parametrize(("suffix", "content", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_called_damaged_without_advice_to_trust_it(tmp_path, suffix, content, words):
    (tmp_path / f"model{suffix}").write_bytes(content)
    message = refusal(tmp_path)
    assert words in message
    assert "sha256" not in message


def test_state_dicts_of_every_age_of_torch_are_still_read(tmp_path):
    module = net(tmp_path)
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        (tmp_path / "model.pt").write_bytes(saved(module.state_dict(), **options))
        assert answers_as(load(tmp_path), module)


def test_a_safetensors_file_that_begins_like_gzip_data_is_read(tmp_path):
    """Its first bytes are the size of its header, which may be any number."""
    module = net(tmp_path)
    content = safetensors.torch.save(module.state_dict())
    size = int.from_bytes(content[:8], "little")
    padded = content[8 : 8 + size].ljust(0x088B1F)
    (tmp_path / "model.safetensors").write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + size :])
    assert answers_as(load(tmp_path), module)


def test_modules_are_told_the_version_of_their_weights(tmp_path):
    """By which they convert what an older torch wrote; that of batch norm forgives a missing count."""
    module = net(tmp_path, "self.norm = torch.nn.BatchNorm1d(3)")
    state = module.state_dict()
    del state["norm.num_batches_tracked"]
    (tmp_path / "model.pt").write_bytes(saved(state))
    assert "missing in the file: norm.num_batches_tracked;" in reason(tmp_path)
    del state._metadata  # type: ignore[attr-defined]
    (tmp_path / "model.pt").write_bytes(saved(state))
    load(tmp_path)


# Hidden files


def test_hidden_files_are_not_models(tmp_path):
    module = net(tmp_path)
    (tmp_path / "model.pt").write_bytes(saved(module.state_dict()))
    for name in ("._model.pt", ".model.pt.swp", ".DS_Store", ".cached.safetensors", "._model.py"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    assert answers_as(load(tmp_path), module)
    (tmp_path / "model.pt").unlink()
    assert not TorchBackend.recognises(tmp_path)
    assert "no file that ends in one of" in refusal(tmp_path)


# Weights


@pytest.mark.parametrize("more", [TIED, ""], ids=["tied", "tied only where they were saved"])
def test_tied_weights_as_save_model_writes_them(tmp_path, more):
    module = net(tmp_path, TIED)
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_model(module, str(file))
    assert len(safetensors.torch.load_file(file)) == 1, "or this test shows nothing"
    net(tmp_path, more)
    assert answers_as(load(tmp_path), module)


def test_tied_weights_without_a_word_of_them_in_the_file(tmp_path):
    """As Hugging Face's `save_pretrained` writes them: the module alone knows that they are tied."""
    module = net(tmp_path, TIED)
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"second.weight": module.state_dict()["second.weight"]}, file)
    assert answers_as(load(tmp_path), module)
    net(tmp_path)
    assert "missing in the file: first.weight;" in reason(tmp_path)


def test_a_weight_that_holds_only_a_part_of_another_does_not_stand_for_it(tmp_path):
    module = net(tmp_path, "self.register_buffer('part', self.second.weight.detach()[:2])")
    state = {name: weight.clone() for name, weight in module.state_dict().items()}
    write_safetensors(tmp_path / "model.safetensors", {name: state[name] for name in ("first.weight", "part")})
    assert "missing in the file: second.weight;" in reason(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {name: state[name] for name in ("first.weight", "second.weight")})
    assert answers_as(load(tmp_path), module)


def test_weights_that_do_not_fit_are_named(tmp_path):
    module = net(tmp_path)
    state = module.state_dict()
    del state["first.weight"]
    state |= {"epoch": torch.ones(1), "third.weight": torch.ones(1)}
    (tmp_path / "model.pt").write_bytes(saved(state))
    assert reason(tmp_path) == (
        "missing in the file: first.weight; unknown to the module: epoch, third.weight; "
        "name those that do not matter in `ignore_weights` under [options]"
    )
    (tmp_path / "model.pt").write_bytes(saved({**module.state_dict(), "first.weight": torch.ones(2, 2)}))
    assert reason(tmp_path).startswith("size mismatch for first.weight: copying a param with shape torch.Size([2, 2])")
    (tmp_path / "model.pt").write_bytes(saved({f"layer{place}": torch.ones(1) for place in range(30)}))
    assert "layer9 and 20 more" in reason(tmp_path)


def test_weights_that_do_not_matter_are_named_in_the_options(tmp_path):
    module = net(tmp_path)
    (tmp_path / "model.pt").write_bytes(saved({**module.state_dict(), "a.b.position_ids": torch.arange(9)}))
    assert "unknown to the module: a.b.position_ids;" in reason(tmp_path)
    assert "unknown to the module: a.b.position_ids;" in reason(tmp_path, ignore_weights=["position_ids", "*.ids"])
    assert answers_as(load(tmp_path, ignore_weights=["*.position_ids"]), module)
    (tmp_path / "model.pt").write_bytes(saved(module.state_dict()))
    net(tmp_path, POSITIONS)
    assert "missing in the file: position_ids;" in reason(tmp_path)
    assert answers_as(load(tmp_path, ignore_weights=["position_ids"]), module)


# Weights in parts


def write_safetensors(path: Path, state: dict[str, Any]) -> None:
    safetensors.torch.save_file(state, path)


def write_pickle(path: Path, state: dict[str, Any]) -> None:
    path.write_bytes(saved(state))


PARTS: dict[str, tuple[str, str, Callable[[Path, dict[str, Any]], None]]] = {
    "safetensors": ("model", "safetensors", write_safetensors),
    "bin": ("pytorch_model", "bin", write_pickle),
    "pt": ("weights", "pt", write_pickle),
}
every_part = pytest.mark.parametrize(("stem", "suffix", "write"), PARTS.values(), ids=PARTS)


def write_parts(directory: Path, stem: str, suffix: str, write: Callable[[Path, dict[str, Any]], None]) -> Any:
    """A module, and the path of the index of its weights in two parts."""
    module = net(directory)
    places = {}
    for number, (name, weight) in enumerate(module.state_dict().items(), 1):
        places[name] = f"{stem}-{number:05}-of-00002.{suffix}"
        write(directory / places[name], {name: weight})
    index = directory / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": places}))
    return module, index


@every_part
def test_weights_in_parts_are_read_by_their_index(tmp_path, stem, suffix, write):
    module, _ = write_parts(tmp_path, stem, suffix, write)
    assert TorchBackend.recognises(tmp_path)
    assert answers_as(load(tmp_path), module)


@every_part
def test_parts_that_are_missing_are_named(tmp_path, stem, suffix, write):
    _, index = write_parts(tmp_path, stem, suffix, write)
    second = tmp_path / f"{stem}-00002-of-00002.{suffix}"
    write(second, {"other": torch.ones(1)})
    assert refusal(tmp_path) == f"{second} lacks weights that {index.name} says it holds: second.weight"
    second.unlink()
    assert refusal(tmp_path) == f"{index} names parts that are missing beside it: {second.name}"
    (tmp_path / f"{stem}-00001-of-00002.{suffix}").write_bytes(POINTER)
    second.write_bytes(POINTER)
    assert "is not a model: it is a Git LFS pointer" in refusal(tmp_path)


@pytest.mark.parametrize("places", ["7", "{}", '{"a": "../b.safetensors"}', '{"a": ".."}', '{"a": 7}', "[", '["a"]'])
def test_an_index_that_is_not_one_is_refused(tmp_path, places):
    net(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {places}}}')
    assert f"{index}" in refusal(tmp_path)
    assert '"weight_map" from weights to' in refusal(tmp_path)


def test_parts_without_an_index_are_refused_as_such(tmp_path):
    _, index = write_parts(tmp_path, *PARTS["safetensors"])
    index.unlink()
    message = refusal(tmp_path)
    assert "weights in parts, model-00001-of-00002.safetensors, model-00002-of-00002.safetensors;" in message
    assert "expected model.safetensors.index.json beside them" in message


def test_of_parts_each_file_is_pinned(tmp_path):
    module, _ = write_parts(tmp_path, *PARTS["bin"])
    digests = {path.name: sha256(path) for path in tmp_path.iterdir()}
    assert answers_as(load(tmp_path, sha256=list(digests.values())), module)
    part = "pytorch_model-00002-of-00002.bin"
    others = [digest for name, digest in digests.items() if name != part]
    assert f"{part} has the SHA-256 {digests[part]}, which is not in" in refusal(tmp_path, sha256=others)


# Models that cannot answer


def loaded(directory: Path, cls: type[Handler] = Handler) -> Any:
    """As a version of a model, which the core checks, with a handler of this class."""
    loader = Loader(backends={"torch": TorchBackend(TorchBackend.Options())}, handlers={"default": cls})
    (directory / "model.toml").write_text('handler = "default"')
    return loader.load(NamedModel(path=directory), directory)


class Runs(Handler):
    def run_model(self, model: Any, inputs: Any, request: Any) -> Any:
        return {"output": model.native.predict(torch.from_numpy(X))}


class Predicts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    @torch.jit.export  # type: ignore[untyped-decorator]
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def script(directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Predicts()), directory / "model.pt")  # type: ignore[no-untyped-call]


def weights_of(returned: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "model.pt").write_bytes(saved({}))
        (directory / "model.py").write_text(
            f"import torch\nclass Net(torch.nn.Module):\n {returned}\ncreate_model = Net"
        )

    return write


UNANSWERING = {
    "a module": (weights_of("pass"), "Net has no forward of its own"),
    "a coroutine": (weights_of("async def forward(self, x): return x"), "forward of Net is async"),
    "TorchScript": (script, "the TorchScript module has no forward"),
}


@pytest.mark.parametrize(("write", "words"), UNANSWERING.values(), ids=UNANSWERING)
def test_a_version_without_a_forward_fails_to_load(tmp_path, write, words):
    write(tmp_path)
    with pytest.raises(ModelError) as error:
        loaded(tmp_path)
    assert "has no signature that can be served" in str(error.value)
    assert words in str(error.value)


def test_a_handler_of_its_own_may_run_a_model_without_a_forward(tmp_path):
    script(tmp_path)
    version = loaded(tmp_path, Runs)
    assert version.instances[0].model.signatures == {}
