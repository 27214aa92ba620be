"""`.pt2` archives, of torch.export and AOTInductor → what is in them, as `files`. What loads them takes 70 MB more of
torch, which other files do without.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from pathlib import Path

import torch
from torch.export.pt2_archive import PT2ArchiveReader, constants

# torch.export.load wraps it, but falls back to an older, pickled format and swallows the error.
from torch.export.pt2_archive._package import AOTICompiledModel, load_pt2

from dl_inference_core.errors import ModelError
from dl_inference_torch_backend.files import pin


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
            return any(name.partition("/")[2].startswith(constants.AOTINDUCTOR_DIR) for name in archive.namelist())
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
        if name.startswith(constants.AOTINDUCTOR_DIR):
            return f"compiled code ({name})"
        if name.startswith((constants.WEIGHTS_DIR, constants.CONSTANTS_DIR)) and name.endswith(".json"):
            for entry in json.loads(reader.read_string(name))["config"].values():
                plain = (constants.WEIGHT_FILENAME_PREFIX, constants.TENSOR_CONSTANT_FILENAME_PREFIX)
                if entry["use_pickle"] or not entry["path_name"].startswith(plain):
                    return f"a pickled object ({entry['path_name']})"
        elif name.endswith(".pt"):
            try:
                torch.load(io.BytesIO(reader.read_bytes(name)), weights_only=True)
            except Exception:  # torch.export would unpickle it whole, then
                return f"a pickled object ({name})"
    return None
