"""Model files → what is in them, running nothing of a pickle that the operator has not allowed.

Everything is loaded from the bytes that were hashed and judged, never from the path again. Call all of it inside
`imports_from`, one thread at a time: torch's deserializer, the classes it is allowed and the filters of warnings are
the process's.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive import constants as pt2

# torch.export.load wraps it, but falls back to an older, pickled format and swallows the error.
from torch.export.pt2_archive._package import AOTICompiledModel, load_pt2

from dl_inference_core.errors import ModelError


def is_torchscript(content: bytes) -> bool:
    """Whether `content` is a TorchScript archive, whose loader runs no Python."""
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


def load_exported(path: Path, content: bytes, *, trusted: bool) -> torch.export.ExportedProgram:
    """The program in a `.pt2` archive. A hostile one can run code even if it holds no pickle: torch evaluates the
    expressions of symbolic sizes and the guards in it as Python.

    Raises:
        ModelError: it holds pickled objects or compiled code and is not `trusted`, or it holds no program.
    """
    refuse_unsafe(path, content, trusted=trusted)
    programs = load_pt2(io.BytesIO(content)).exported_programs
    if len(programs) != 1:
        raise ModelError(f"{path} holds {len(programs)} exported programs; expected one")
    return next(iter(programs.values()))


def is_compiled(content: bytes) -> bool:
    """Whether a `.pt2` archive holds code that AOTInductor compiled; False for what is no archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(name.partition("/")[2].startswith(pt2.AOTINDUCTOR_DIR) for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def load_compiled(content: bytes, device: torch.device) -> AOTICompiledModel:
    """The compiled code in a `.pt2` archive that is trusted, for `device`.

    Raises:
        ModelError: it was compiled for another kind of device, or holds several models.
    """
    # Machine code reads what it is given as what it was compiled for. This has it check, and must be set before the
    # first call of it.
    os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        index = -1 if device.index is None else device.index
        packages = load_pt2(io.BytesIO(content), device_index=index).aoti_runners
    if len(packages) != 1:
        raise ModelError(f"the package holds {len(packages)} compiled models; expected one")
    package = next(iter(packages.values()))
    kind = package.get_metadata()["AOTI_DEVICE_KEY"]
    if kind != device.type:
        raise ModelError(f'the package was compiled for {kind}; expected `device = "{kind}"` in model.toml')
    return package


def refuse_unsafe(path: Path, content: bytes, *, trusted: bool) -> None:
    """Raises:
    ModelError: a `.pt2` archive holds pickled objects or compiled code and is not `trusted`.
    """
    if not trusted and (record := _unsafe_record(content)) is not None:
        raise ModelError(f"{path} is refused: it holds {record}, which could run any code; {pin(content)}")


def _unsafe_record(content: bytes) -> str | None:
    """What in the archive is no graph and no plain tensor, seen by the reader that will load it."""
    reader = PT2ArchiveReader(io.BytesIO(content))
    for name in reader.get_file_names():
        if name.startswith(pt2.AOTINDUCTOR_DIR):
            return f"compiled code ({name})"
        if name.startswith((pt2.WEIGHTS_DIR, pt2.CONSTANTS_DIR)) and name.endswith(".json"):
            for entry in json.loads(reader.read_string(name))["config"].values():
                plain = (pt2.WEIGHT_FILENAME_PREFIX, pt2.TENSOR_CONSTANT_FILENAME_PREFIX)
                if entry["use_pickle"] or not entry["path_name"].startswith(plain):
                    return f"a pickled object ({entry['path_name']})"
        elif name.endswith(".pt"):
            try:
                torch.load(io.BytesIO(reader.read_bytes(name)), weights_only=True)
            except Exception:  # torch.export would unpickle it whole, then
                return f"a pickled object ({name})"
    return None


def unpickle(path: Path, content: bytes, classes: Sequence[str], *, trusted: bool) -> Any:
    """What `torch.save` wrote. Tensors and plain containers of them always; more only as the operator allowed it.

    Args:
        path: for messages.
        content: the file's bytes.
        classes: classes that may be in it.
        trusted: whether it may be unpickled whatever it holds.

    Raises:
        ModelError: it holds more; names what, and says how to allow it.
    """
    if trusted:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    with torch.serialization.safe_globals([_class(name) for name in classes]):
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            names = _refused(content)
            held = names or "more than tensors and objects of the allowed classes"
            # torch's own words advise `weights_only=False`: they are of use only where ours say too little.
            raise ModelError(
                f"{path} is a whole pickle, which could run any code, and is refused: it holds {held}; "
                f"{pin(content)}, or only the classes that you trust in `allow_classes`"
            ) from (None if names else error)


def _class(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise ModelError(f'allow_classes names "{name}", which cannot be imported') from error


def _refused(content: bytes) -> str:
    """The classes and functions at which `torch.load` stops; "" if it is something else that stops it."""
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))))
    except Exception:  # no file that torch.save writes today
        return ""


def pin(content: bytes) -> str:
    """How an operator says that a file is trusted."""
    digest = hashlib.sha256(content).hexdigest()
    return f'if you trust the file, put `sha256 = ["{digest}"]` under [options] in model.toml'
