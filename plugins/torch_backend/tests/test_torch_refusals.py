"""What a hostile or unknown file may do when it is loaded: nothing, unless the operator allowed it."""

from __future__ import annotations

import pickle
import re
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dl_inference_torch_backend.backend import TorchBackend
from dl_inference_torch_backend.testing import Evil, exported, load, refusal, saved, sha256, zipped

from dl_inference_core.node.sources import imports_from

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x)
"""


@pytest.fixture
def whole(folder: Path) -> Path:
    """A whole pickle, with its source beside it."""
    (folder / "net.py").write_text(NET)
    with imports_from(folder):
        net = __import__("net")
        net.Net.__module__ = "net"  # as in the script that a model is saved by
        torch.save(net.Net(), folder / "model.pth")
    return folder / "model.pth"


# Whole pickles


def test_a_whole_pickle_is_refused_and_the_line_in_the_message_allows_it(whole):
    message = refusal(whole.parent)
    assert str(whole) in message
    assert "net.Net, torch.nn.modules.linear.Linear" in message
    line = re.search(r"`(sha256 = .*?)`", message)
    assert line is not None
    options = tomllib.loads(line[1])
    assert options == {"sha256": [sha256(whole)]}
    model = load(whole.parent, **options)
    with model.session():
        assert model({"x": np.zeros((1, 3), np.float32)})["output"].shape == (1, 2)


def test_allowed_classes_are_loaded_and_no_others(whole):
    load(whole.parent, allow_classes=["net.Net", "torch.nn.modules.linear.Linear"])
    message = refusal(whole.parent, allow_classes=["net.Net"])
    assert "holds torch.nn.modules.linear.Linear;" in message
    assert "holds net.Net;" in refusal(whole.parent, allow_classes=["torch.nn.modules.linear.Linear"])
    assert 'allow_classes names "net.Other"' in refusal(whole.parent, allow_classes=["net.Other"])
    assert 'allow_classes names "nowhere.Net"' in refusal(whole.parent, allow_classes=["nowhere.Net"])
    assert refusal(whole.parent), "what one load allows, the next does not"


def test_a_digest_that_does_not_fit_refuses_any_kind_of_file(whole, folder):
    wrong = "0" * 64
    assert f'`sha256 = ["{sha256(whole)}"]`' in _only(refusal(folder, sha256=[wrong]), wrong)
    allow = ["net.Net", "torch.nn.modules.linear.Linear"]
    assert sha256(whole) in refusal(folder, sha256=[wrong], allow_classes=allow)
    load(folder, sha256=[wrong, sha256(whole)], allow_classes=allow)
    whole.unlink()
    program = folder / "model.pt2"
    program.write_bytes(exported())
    assert sha256(program) in refusal(folder, sha256=[wrong])
    load(folder, sha256=[sha256(program)])


def _only(message: str, absent: str) -> str:
    assert absent not in message
    return message


def test_what_is_loaded_are_the_bytes_that_were_hashed(whole, trace, monkeypatch):
    digest = sha256(whole)
    read = Path.read_bytes

    def read_and_swap(path: Path) -> bytes:
        content = read(path)
        if path == whole:
            path.write_bytes(saved(Evil(trace)))
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_swap)
    load(whole.parent, sha256=[digest])
    assert not trace.exists()


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "torch.save": lambda trace: saved(Evil(trace)),
    "torch.save, before 1.6": lambda trace: saved(Evil(trace), _use_new_zipfile_serialization=False),
    "in a state dict": lambda trace: saved({"weight": torch.ones(1), "bias": Evil(trace)}),
    "pickle 2": lambda trace: pickle.dumps(Evil(trace), protocol=2),
    "pickle 5": lambda trace: pickle.dumps(Evil(trace), protocol=5),
    "dressed as TorchScript": lambda trace: zipped(
        {"constants.pkl": pickle.dumps(Evil(trace), 2), "data.pkl": pickle.dumps(Evil(trace), 2), "version": b"3\n"},
        root="archive/",
    ),
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pt2", ".safetensors"])
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_nothing_of_a_hostile_pickle_runs_whatever_it_is_called(folder, trace, make, suffix):
    (folder / f"model{suffix}").write_bytes(make(trace))
    refusal(folder)
    if suffix in (".pth", ".pt"):
        refusal(folder, allow_classes=["torch.nn.modules.linear.Linear"])
    assert not trace.exists()


def test_a_hostile_pickle_runs_once_it_is_trusted(folder, trace):
    (folder / "model.pth").write_bytes(saved(Evil(trace)))
    refusal(folder, sha256=[sha256(folder / "model.pth")])
    assert trace.exists(), "or the tests above prove nothing"


class Writes(torch.nn.Module):
    def __init__(self, trace: str) -> None:
        super().__init__()
        self.trace = trace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.trace)
        return x


class WritesAtLoad(Writes):
    @torch.jit.export  # type: ignore[untyped-decorator]
    def __getstate__(self) -> tuple[str, bool]:
        return (self.trace, self.training)

    @torch.jit.export  # type: ignore[untyped-decorator]
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.trace, self.training = state[0], state[1]
        torch.save(torch.ones(1), state[0])


@pytest.mark.parametrize("cls", [Writes, WritesAtLoad])
def test_torchscript_can_write_files_when_it_is_loaded_or_called_as_the_readme_says(folder, trace, cls):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(cls(str(trace))), folder / "model.pt")
    trace.unlink(missing_ok=True)
    model = load(folder)
    assert trace.exists() == (cls is WritesAtLoad)
    with model.session():
        model({"x": np.ones(1)})
    assert trace.exists()


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"sha256": ["abc"]},
        {"sha256": ["A" * 64]},
        {"allow_classes": ["Net"]},
        {"factory": "model"},
        {"file": "../model.pt"},
        {"state": "weights.pth"},
    ],
)
def test_options_that_cannot_be_meant_are_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TorchBackend.ModelOptions(**options)
