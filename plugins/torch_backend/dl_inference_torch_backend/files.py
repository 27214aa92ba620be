"""Model files → what is in them, running nothing of a pickle that the operator has not allowed.

Everything is loaded from the bytes that were hashed and judged, never from the path again. Call all of it inside
`imports_from`, one thread at a time: torch's deserializer, the classes it is allowed and the filters of warnings are
the process's.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch

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
