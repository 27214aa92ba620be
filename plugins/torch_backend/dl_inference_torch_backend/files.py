"""Model files → what is in them, running nothing that the operator has not allowed.

A pickle can run any code when it is loaded, and `.pt2` archives may hold pickles too. So a file is read once, judged
and loaded from those same bytes.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import threading
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive import constants as pt2

from dl_inference_core.errors import ModelError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_lock = threading.Lock()  # the environment is the process's


def is_torchscript(content: bytes) -> bool:
    """Whether `content` is a TorchScript archive, which torch.jit.load runs no Python of."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def load_scripted(content: bytes, device: torch.device) -> torch.jit.ScriptModule:
    """The module in a TorchScript archive, on `device`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(content), map_location=device)  # type: ignore[no-untyped-call]
        return module


def load_safetensors(content: bytes) -> dict[str, Any]:
    """The tensors in a safetensors file; the format holds no code."""
    return safetensors.torch.load(content)


def load_exported(path: Path, allowed: Sequence[str]) -> torch.export.ExportedProgram:
    """The program in a `.pt2` archive.

    Raises:
        ModelError: it holds pickled objects or compiled code, and its digest is not among `allowed`.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() in allowed:
        return torch.export.load(io.BytesIO(content))
    unsafe = _unsafe_record(content)
    if unsafe is not None:
        raise ModelError(f"{path} holds {unsafe}, which could run any code; {_how_to_allow(content)}")
    with _no_code():
        return torch.export.load(io.BytesIO(content))


def _unsafe_record(content: bytes) -> str | None:
    """What in the archive is more than a graph and plain tensors; read with the reader that will load it."""
    reader = PT2ArchiveReader(io.BytesIO(content))
    for name in reader.get_file_names():
        if name.startswith(pt2.AOTINDUCTOR_DIR):
            return f"compiled code ({name})"
        if name.startswith((pt2.WEIGHTS_DIR, pt2.CONSTANTS_DIR)) and name.endswith(".json"):
            for entry in json.loads(reader.read_string(name))["config"].values():
                if entry["use_pickle"] or entry["path_name"].startswith(
                    (pt2.OPAQUE_OBJ_FILENAME_PREFIX, pt2.CUSTOM_OBJ_FILENAME_PREFIX)
                ):
                    return f"a pickled object ({entry['path_name']})"
    return None


@contextmanager
def _no_code() -> Iterator[None]:
    """torch.load unpickles nothing but tensors, whatever its caller asks: torch.export.load asks for more when the
    example inputs kept in an archive are no plain tensors."""
    with _lock:
        before = os.environ.get(_FORCE)
        os.environ[_FORCE] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_FORCE]
            else:
                os.environ[_FORCE] = before


def unpickle(path: Path, content: bytes, allowed: Sequence[str], classes: Sequence[str]) -> Any:
    """What `torch.save` wrote. Tensors and plain containers of them always; more only as the operator allowed it.

    Args:
        path: for messages.
        allowed: digests of files that are unpickled whatever they hold.
        classes: classes that may be in it.

    Raises:
        ModelError: it holds more; names what, and says how to allow it.
    """
    if hashlib.sha256(content).hexdigest() in allowed:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    try:
        with torch.serialization.safe_globals([_class(path, name) for name in classes]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ModelError(
            f"{path} is a whole pickle, which could run any code, and is refused: {_first_refused(content, classes)}; "
            f"{_how_to_allow(content)}"
        ) from error


def _class(path: Path, name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f'{path}: allow_classes names "{name}", which cannot be imported') from error


def _first_refused(content: bytes, classes: Sequence[str]) -> str:
    try:
        held = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except Exception:  # a file damaged on purpose may fail in any way
        return "it is no file that torch.save writes today"
    refused = sorted(set(held) - set(classes))
    return f"it holds {', '.join(refused)}" if refused else "it does more than make objects of the allowed classes"


def _how_to_allow(content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    return (
        f'to load it all the same, trust it and put `sha256 = ["{digest}"]` under [options] in model.toml; '
        'or, of a pickle, only the classes you trust: `allow_classes = ["module.Class"]`'
    )
