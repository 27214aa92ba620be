"""Weights: read from one file or from parts, and put into a module."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from dl_inference_core.errors import ModelError
from dl_inference_torch_backend.files import load_safetensors

_MOST_NAMED = 10
"""How many weights an error names; a module has thousands."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Attributes:
    state: the weights by name.
    tied: names that were left out, since they are the same weight as another: by name, the other.
    """

    state: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def read_weights(path: Path, content: bytes, unpickle: Callable[[Path, bytes], Any]) -> Weights:
    """Args:
        content: the bytes of the file at `path`, a safetensors file or what `unpickle` reads.
        unpickle: reads what torch.save wrote.

    Raises:
        ModelError: `unpickle` gives something else than weights, or raises it.
    """
    if path.suffix == ".safetensors":
        return Weights(*load_safetensors(content))
    state = unpickle(path, content)
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__qualname__}; expected weights by name")
    return Weights(state)


def read_parts(
    index: Path, content: bytes, read: Callable[[Path], bytes], unpickle: Callable[[Path, bytes], Any]
) -> Weights:
    """The weights in the parts that an index names, as `save_pretrained` of Hugging Face's libraries writes them.

    Args:
        content: the bytes of the file at `index`.
        read: reads a part, one at a time.
        unpickle: as of `read_weights`.

    Raises:
        ModelError: it is not an index, or a part or a weight that it names is missing.
    """
    places = _places(index, content)
    names = sorted(set(places.values()))
    if missing := [name for name in names if not index.with_name(name).is_file()]:
        raise ModelError(f"{index} names parts that are missing beside it: {', '.join(missing)}")
    weights = Weights()
    for name in names:
        path = index.with_name(name)
        part = read_weights(path, read(path), unpickle)
        if lacking := [key for key, place in places.items() if place == name and key not in part.state]:
            raise ModelError(f"{path} lacks weights that {index.name} says it holds: {_listed(lacking)}")
        weights.state.update(part.state)
        weights.tied.update(part.tied)
    return weights


def _places(index: Path, content: bytes) -> dict[str, str]:
    """By the name of each weight, the name of the file that holds it."""
    try:
        places = json.loads(content)["weight_map"]
        files = [re.fullmatch(r"[^/\\]+", name) is not None and name not in (".", "..") for name in places.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f'{index} is not an index: expected JSON with a "weight_map" from weights to files') from error
    if not files or not all(files):
        raise ModelError(f'{index}: expected a "weight_map" from weights to names of files beside it')
    checked: dict[str, str] = places
    return checked


def fill(module: torch.nn.Module, weights: Weights, ignored: Sequence[str]) -> None:
    """Put `weights` into `module`.

    Args:
        ignored: patterns of names that `weights` may lack, and that the module may not know.

    Raises:
        ModelError: a name is missing or unknown, or a weight does not fit; the message begins in the middle of a
            sentence about them.
    """
    own = module.state_dict()
    state = copy.copy(weights.state)  # with the versions of the module's parts, an attribute of what torch writes
    for name, kept in weights.tied.items():
        if name in own and name not in state and kept in state and state[kept].shape == own[name].shape:
            state[name] = state[kept]
    try:
        missing, unknown = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelError("; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)) from error
    left = {
        "missing in the file": [name for name in missing if not _shares(own, name, state)],
        "unknown to the module": unknown,
    }
    said = [
        f"{what}: {_listed(names)}"
        for what, all_names in left.items()
        if (names := [name for name in all_names if not any(fnmatchcase(name, pattern) for pattern in ignored)])
    ]
    if said:
        raise ModelError(f"{'; '.join(said)}; name those that do not matter in `ignore_weights` under [options]")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shares(own: Mapping[str, Any], name: str, state: Mapping[str, Any]) -> bool:
    """Whether the module's weight of that name lies in the memory of one that `state` has."""
    place = _memory(own[name]) if name in own else None
    if place is None:
        return False
    filled = (_memory(own[other]) for other in state if other in own)
    return any(other is not None and other.start <= place.start and place.stop <= other.stop for other in filled)


def _memory(value: Any) -> range | None:
    """The addresses of a tensor's elements; None if it has none of its own, or leaves gaps between them."""
    if not isinstance(value, torch.Tensor) or not value.numel() or not value.data_ptr():
        return None
    size = 1 + sum((length - 1) * stride for length, stride in zip(value.shape, value.stride(), strict=True))
    if size != value.numel():
        return None
    return range(value.data_ptr(), value.data_ptr() + size * value.element_size())
