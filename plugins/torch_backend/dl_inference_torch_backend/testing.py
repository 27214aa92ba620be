"""Loads, refusals, and files with chosen or hostile content, for tests."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Model
from dl_inference_torch_backend.backend import TorchBackend


def load(directory: Path, device: str = "cpu", **options: Any) -> Model:
    """The model in `directory`, with these options of `model.toml`, from a backend of its own."""
    return TorchBackend(TorchBackend.Options()).load(directory, TorchBackend.ModelOptions(**options), device)


def refusal(directory: Path, **options: Any) -> str:
    """The message of the ModelError that `load` raises.

    Raises:
        AssertionError: `load` does not raise one.
    """
    try:
        load(directory, **options)
    except ModelError as error:
        return str(error)
    raise AssertionError(f"{directory} was loaded")


def sha256(path: Path) -> str:
    """The digest of a file, as the option `sha256` takes it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(value: Any, **options: Any) -> bytes:
    """The file that `torch.save` writes for `value`."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(records: Mapping[str, bytes], root: str = "") -> bytes:
    """A zip archive of these records, below the folder `root`, which ends in a slash."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in records.items():
            archive.writestr(root + name, content)
    return buffer.getvalue()


def exported() -> bytes:
    """A `.pt2` file: a linear layer from `input`, float32 of shape [batch, 3], to two outputs."""
    buffer = io.BytesIO()
    batch = {"input": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.ones(4, 3),), dynamic_shapes=batch), buffer)
    return buffer.getvalue()


class Evil:
    """Makes the file `trace` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.command = f"touch '{trace}'"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)
