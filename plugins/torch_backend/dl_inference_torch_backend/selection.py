"""Which file in a version's folder is the model."""

from __future__ import annotations

import re
from pathlib import Path

from dl_inference_core.errors import ModelError
from dl_inference_core.node.model_files import is_ignored

SUFFIXES = (".pt2", ".safetensors", ".pt", ".pth")
INDEX_SUFFIX = ".index.json"
_PARTED = r"\.(safetensors|bin|pt|pth)"  # .bin: what Hugging Face names state dicts
_INDEX = re.compile(rf".+{_PARTED}{re.escape(INDEX_SUFFIX)}")
_PART = re.compile(rf"(?P<stem>.+)-\d+-of-\d+(?P<suffix>{_PARTED})")


def candidates(directory: Path) -> list[str]:
    """The names of the files in `directory` that could be the model: those that end in one of `SUFFIXES`, and indexes
    of weights in parts, which stand for their parts. Empty if the folder cannot be read."""
    try:
        names = {entry.name for entry in directory.iterdir() if not is_ignored(entry.name) and entry.is_file()}
    except OSError:
        return []
    return sorted(name for name in names if _could_be_model(name) and _index_of(name) not in names)


def model_file(directory: Path, name: str | None) -> Path:
    """Args:
        name: the file that the options name, if any.

    Raises:
        ModelError: there is no such file, or none at all, or several of which none is named.
    """
    names = candidates(directory)
    if name is not None:
        if name not in names:
            raise ModelError(f"{directory} has no model file {name}; it has {', '.join(names) or 'none'}")
        return directory / name
    if not names:
        raise ModelError(f"{directory} has no file that ends in one of {', '.join(SUFFIXES)}")
    indexes = {_index_of(name) for name in names}
    if len(indexes) == 1 and (index := indexes.pop()) is not None:
        raise ModelError(
            f"{directory} has weights in parts, {', '.join(names)}; expected {index} beside them, which says which "
            "part holds which weight"
        )
    if len(names) > 1:
        raise ModelError(
            f"{directory} has several files that could be the model, {', '.join(names)}: say which with "
            f'`file = "{names[0]}"` under [options] in model.toml'
        )
    return directory / names[0]


def _could_be_model(name: str) -> bool:
    return name.endswith(SUFFIXES) or _INDEX.fullmatch(name) is not None


def _index_of(name: str) -> str | None:
    """The name of the index of weights that the file is a part of, going by its own name."""
    part = _PART.fullmatch(name)
    return f"{part['stem']}{part['suffix']}{INDEX_SUFFIX}" if part is not None else None
