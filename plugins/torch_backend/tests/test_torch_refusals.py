"""What a hostile or unknown file may do when it is loaded: nothing, unless the operator allowed it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import tomllib
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dl_inference_torch_backend.backend import TorchBackend
from torch._export.serde.schema import SCHEMA_VERSION
from torch.export.pt2_archive import PT2ArchiveWriter

from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Model
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


def load(directory: Path, **options: Any) -> Model:
    return TorchBackend(TorchBackend.Options()).load(directory, TorchBackend.ModelOptions(**options), "cpu")


def refusal(directory: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as error:
        load(directory, **options)
    return str(error.value)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that hostile code would make."""
    return tmp_path / "was here"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def whole(folder: Path) -> Path:
    """A whole pickle, with its source beside it."""
    (folder / "net.py").write_text(NET)
    with imports_from(folder):
        torch.save(__import__("net").Net(), folder / "model.pth")
    return folder / "model.pth"


class Evil:
    def __init__(self, trace: Path) -> None:
        self.command = f"touch '{trace}'"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


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
        {"constants.pkl": pickle.dumps(Evil(trace), 2), "data.pkl": pickle.dumps(Evil(trace), 2), "version": b"3\n"}
    ),
}


def zipped(records: dict[str, bytes], root: str = "archive/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in records.items():
            archive.writestr(root + name, content)
    return buffer.getvalue()


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


# .pt2 archives


def exported() -> bytes:
    buffer = io.BytesIO()
    batch = {"input": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.ones(4, 3),), dynamic_shapes=batch), buffer)
    return buffer.getvalue()


def altered(change: Callable[[dict[str, bytes]], Any]) -> bytes:
    """A program whose records were changed."""
    with zipfile.ZipFile(io.BytesIO(exported())) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, content in records.items():
            if not name.startswith(".data") and name != "byteorder":
                writer.write_bytes(name, content)
    return buffer.getvalue()


def edited(content: bytes, change: Callable[[Any], Any]) -> bytes:
    value = json.loads(content)
    change(value)
    return json.dumps(value).encode()


def pickled_weight(records: dict[str, bytes], trace: Path) -> None:
    name = "data/weights/model_weights_config.json"
    records["data/weights/weight_0"] = saved(Evil(trace))
    records[name] = edited(records[name], lambda value: value["config"]["weight"].update(use_pickle=True))


def opaque_constant(records: dict[str, bytes], trace: Path) -> None:
    constant = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    name = "data/constants/model_constants_config.json"
    records["data/constants/opaque_obj_0"] = pickle.dumps(Evil(trace))
    records[name] = edited(records[name], lambda value: value["config"].update(c=constant))


HOSTILE_RECORDS: dict[str, tuple[Callable[[dict[str, bytes], Path], Any], str]] = {
    "example inputs": (
        lambda records, trace: records.update({"data/sample_inputs/model.pt": saved((Evil(trace),))}),
        "data/sample_inputs/model.pt",
    ),
    "weights of an older format": (
        lambda records, trace: records.update({"data/weights/model.pt": saved({"weight": Evil(trace)})}),
        "data/weights/model.pt",
    ),
    "a pickled weight": (pickled_weight, "weight_0"),
    "an opaque constant": (opaque_constant, "opaque_obj_0"),
    "compiled code": (
        lambda records, trace: records.update({"data/aotinductor/model/x.so": b"\x7fELF"}),
        "data/aotinductor/model/x.so",
    ),
}


@pytest.mark.parametrize(("change", "named"), HOSTILE_RECORDS.values(), ids=HOSTILE_RECORDS)
def test_a_program_with_a_pickle_or_compiled_code_in_it_is_refused(folder, trace, change, named):
    path = folder / "model.pt2"
    path.write_bytes(altered(lambda records: change(records, trace)))
    message = refusal(folder)
    assert named in message
    assert f'`sha256 = ["{sha256(path)}"]`' in message
    assert not trace.exists()


def test_an_archive_of_torch_2_7_is_not_loaded_since_it_is_all_pickles(folder, trace):
    """Nor where it is appended to a new one that fails: torch.export.load would go on with it."""
    program: list[bytes] = []

    def change(records: dict[str, bytes]) -> None:
        program.append(records["models/model.json"])
        del records["data/sample_inputs/model.pt"]

    new = io.BytesIO(altered(change))
    old = {
        "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
        "serialized_exported_program.json": program[0],
        "serialized_state_dict.pt": saved({}),
        "serialized_constants.pt": saved({}),
        "serialized_example_inputs.pt": saved((Evil(trace),)),
    }
    with zipfile.ZipFile(new, "a") as archive:
        for name, content in old.items():
            archive.writestr(name, content)
    for content in (zipped(old, root=""), new.getvalue()):
        (folder / "model.pt2").write_bytes(content)
        assert "model.pt2" in refusal(folder)
        assert not trace.exists()


def test_a_hostile_graph_runs_code_all_the_same_as_the_readme_says(folder, trace):
    """Should this fail with a newer torch, the README can promise more."""

    def change(records: dict[str, bytes]) -> None:
        name = "models/model.json"
        code = f"__import__('os').system('touch \\\"{trace}\\\"') or Symbol('s77', positive=True, integer=True)"
        text = re.sub(r'"expr_str": "[^"]*"', lambda _: f'"expr_str": {json.dumps(code)}', records[name].decode())
        records[name] = text.encode()

    (folder / "model.pt2").write_bytes(altered(change))
    with suppress(ModelError):
        load(folder)
    assert trace.exists()
    readme = Path(__file__).parents[1] / "README.md"
    assert "A hostile `.pt2` can run any code" in " ".join(readme.read_text(encoding="utf-8").split())


class Writes(torch.nn.Module):
    def __init__(self, trace: str) -> None:
        super().__init__()
        self.trace = trace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.trace)
        return x


def test_torchscript_can_write_files_when_it_is_called_as_the_readme_says(folder, trace):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Writes(str(trace))), folder / "model.pt")  # type: ignore[no-untyped-call]
    model = load(folder)
    assert not trace.exists()
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
