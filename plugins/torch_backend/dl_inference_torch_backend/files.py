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
import pickletools
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch

from dl_inference_core.errors import ModelError
from dl_inference_core.node.model_files import describe_foreign

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
"""How a pickle of protocol 2 and later begins; torch has not written an older one since 0.4."""
_EXPECTED = {
    ".pt2": "an archive, as torch.export.save writes",
    ".safetensors": "safetensors",
}


def refuse_foreign(path: Path, content: bytes) -> None:
    """Args:
        path: for messages, and for its suffix.
        content: the file's bytes.

    Raises:
        ModelError: the file is not of the format that its name says; says what it is instead.
    """
    if content.startswith(_ZIP) and path.suffix != ".safetensors":
        _refuse_archive(path, content)
    elif not _begins_well(path.suffix, content):
        if (foreign := describe_foreign(content)) is not None:
            raise ModelError(f"{path} is not a model: it is {foreign}")
        expected = _EXPECTED.get(path.suffix, "an archive or a pickle, as torch.save writes")
        raise ModelError(f"{path} is not a model: its first bytes are {content[:8].hex(' ')}; expected {expected}")


def _begins_well(suffix: str, content: bytes) -> bool:
    if suffix == ".safetensors":  # eight bytes of the header's size, then JSON
        return content[8:9] == b"{"
    return suffix != ".pt2" and content.startswith(_PICKLE) and _is_pickle(content)


def _refuse_archive(path: Path, content: bytes) -> None:
    """Raises:
    ModelError: the zip archive is damaged, or holds no pickle of torch's.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ModelError(
            f"{path} is not a model: it is a zip archive whose end is missing or damaged: download the file again"
        ) from error
    if path.suffix != ".pt2" and not any(name.endswith("/data.pkl") for name in names):
        held = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise ModelError(
            f"{path} is not a model: it is a zip archive that neither torch.save nor torch.jit.save wrote; it holds "
            f"{held or 'nothing'}"
        )


def _is_pickle(content: bytes) -> bool:
    """Whether `content` begins with a whole pickle; runs nothing of it."""
    try:
        for _ in pickletools.genops(content):
            pass
    except Exception:  # pickletools raises whatever its parts do: ValueError, UnicodeDecodeError, OverflowError, …
        return False
    return True


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


def load_safetensors(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors in a safetensors file, and its metadata; the format holds no code."""
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    return safetensors.torch.load(content), metadata


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
    allowed: list[Any] = []
    for name in classes:
        cls = _class(name)
        # By its own name, and by that in the file: a source beside the model is imported under another.
        allowed += (cls, (cls, name))
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            names = _refused(content)
            if not names and content.startswith(_ZIP) and not _is_pickle(_record(content)):
                raise ModelError(f"{path} is damaged: its data.pkl is not a pickle") from error
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


def _record(content: bytes) -> bytes:
    """The pickle in an archive."""
    record: bytes = torch._C.PyTorchFileReader(io.BytesIO(content)).get_record("data.pkl")
    return record


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
