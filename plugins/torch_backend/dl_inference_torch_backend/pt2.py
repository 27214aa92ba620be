"""`.pt2` archives, of torch.export and AOTInductor → what is in them, as `files`. What loads them takes 70 MB more of
torch, which other files do without.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch._export.serde import schema
from torch.export.pt2_archive import PT2ArchiveReader, constants

# torch.export.load wraps it, but falls back to an older, pickled format and swallows the error.
from torch.export.pt2_archive._package import AOTICompiledModel, load_pt2

from dl_inference_core.errors import ModelError
from dl_inference_torch_backend.files import pin
from dl_inference_torch_backend.program_check import UnsafeProgramError, check_examples, check_program


def load_exported(path: Path, content: bytes, *, trusted: bool) -> torch.export.ExportedProgram:
    """The program in a `.pt2` archive.

    Raises:
        ModelError: it holds what could run code and is not `trusted`, or it holds no program.
    """
    refuse_unsafe(path, content, trusted=trusted)
    programs = load_pt2(io.BytesIO(content)).exported_programs
    if len(programs) != 1:
        raise ModelError(f"{path} holds {len(programs)} exported programs; expected one")
    return next(iter(programs.values()))


def is_compiled(content: bytes) -> bool:
    """Whether a `.pt2` archive holds code that AOTInductor compiled; False if it is not an archive."""
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
    ModelError: a `.pt2` archive that is not `trusted` holds pickled objects, compiled code, or a graph with anything
        that torch.export does not write.
    """
    if trusted:
        return
    try:
        _check_records(PT2ArchiveReader(io.BytesIO(content)))
    except UnsafeProgramError as error:
        raise ModelError(f"{path} is refused: it holds {error}, which could run any code; {pin(content)}") from None


def _check_records(reader: PT2ArchiveReader) -> None:
    """Check each record in the archive that torch evaluates, seen by the reader that will load it.

    Raises:
        UnsafeProgramError: as of `refuse_unsafe`.
    """
    names = reader.get_file_names()
    # The reader lists no more than 511 bytes of a name, but finds a record by its whole name, in whatever case: without
    # this check, torch could load a record that is listed, and checked, under another name.
    has_record: Callable[[str], bool] = reader.archive_file.has_record  # type: ignore[attr-defined]
    if len({name.lower() for name in names}) < len(names) or not all(map(has_record, names)):
        raise UnsafeProgramError("records whose names are too long or not unique")
    for name in names:
        kind = name.lower()  # torch finds records in capitals, too
        if kind.startswith(constants.AOTINDUCTOR_DIR):
            raise UnsafeProgramError(f"compiled code ({name})")
        if kind.startswith(constants.MODELS_DIR):
            check_program(schema.ExportedProgram, json.loads(reader.read_string(name)))
        elif kind.startswith((constants.WEIGHTS_DIR, constants.CONSTANTS_DIR)) and kind.endswith(".json"):
            payload = json.loads(reader.read_string(name))
            for entry in payload["config"].values():
                plain = (constants.WEIGHT_FILENAME_PREFIX, constants.TENSOR_CONSTANT_FILENAME_PREFIX)
                if entry["use_pickle"] or not entry["path_name"].startswith(plain):
                    raise UnsafeProgramError(f"a pickled object ({entry['path_name']})")
            check_program(schema.PayloadConfig, payload)
        elif kind.endswith(".pt"):
            try:
                value = torch.load(io.BytesIO(reader.read_bytes(name)), weights_only=True)
            except Exception as error:  # torch.export would unpickle it whole, then
                raise UnsafeProgramError(f"a pickled object ({name})") from error
            if kind.startswith(constants.SAMPLE_INPUTS_DIR):
                check_examples(value)
