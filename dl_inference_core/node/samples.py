"""Inputs to try a model with, before any client's: read from its folder, or made from its signature."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Signature, TensorSpec
from dl_inference_core.tensors import Tensor, Tensors, as_tensor

FILES = ("warm_up.npz", "sample.npz")
FREE_SIZE = 32
"""What a free size that is not the first is taken to be: small, but enough for the kernels of most models."""


def samples(signature: Signature, rows: int, generator: np.random.Generator) -> dict[str, Tensor] | None:
    """Inputs that fit `signature`, with `rows` where the first size is free: whole numbers of 0 and 1, which are places
    in any vocabulary, normally distributed floats. An optional input for which none can be made is left out. None: the
    signature does not say enough, or requires strings."""
    if not signature.inputs:
        return None
    made: dict[str, Tensor] = {}
    for spec in signature.inputs:
        tensor = _sample(spec, rows, generator)
        if tensor is not None:
            made[spec.name] = tensor
        elif not spec.optional:
            return None
    return made or None


def _sample(spec: TensorSpec, rows: int, generator: np.random.Generator) -> Tensor | None:
    if spec.dtype is None or spec.shape is None:
        return None
    sizes = [size if size is not None else FREE_SIZE if place else rows for place, size in enumerate(spec.shape)]
    if spec.dtype.kind in "biu":
        return generator.integers(0, 2, sizes).astype(spec.dtype)
    if spec.dtype.kind == "c":
        return (generator.standard_normal(sizes) + 1j * generator.standard_normal(sizes)).astype(spec.dtype)
    if np.can_cast(np.bool_, spec.dtype) and spec.dtype.kind in "fV":  # "V": bfloat16 and its like
        return generator.standard_normal(sizes).astype(spec.dtype)
    return None


def read_samples(directory: Path) -> list[dict[str, Tensor]]:
    """The samples in a version's folder: of each of `FILES` that is there, its arrays by input name.

    Raises:
        ModelError: a file is damaged, holds no rows, or holds what no tensor can hold.
    """
    return [_read(path) for name in FILES if (path := directory / name).is_file()]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: as_tensor(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} cannot be read; expected what numpy.savez writes: an array for each input") from error
    if not found or any(array.shape[:1] == (0,) for array in found.values()):
        raise ModelError(f"{path} holds no rows; expected an array for each input, with one row or more")
    return found


def of_rows(sample: Tensors, rows: int, signature: Signature) -> dict[str, Tensor]:
    """`sample` with its rows repeated or left out until there are `rows` of them. An array without rows, or whose first
    size `signature` fixes, stays as it is."""
    fixed = {spec.name for spec in signature.inputs if spec.shape is not None and spec.shape[:1] != (None,)}
    return {
        name: array if name in fixed or not array.shape[:1] else _take(array, rows) for name, array in sample.items()
    }


def _take(array: Tensor, rows: int) -> Tensor:
    return array if len(array) == rows else np.take(array, np.arange(rows) % len(array), axis=0)


def rows_of(sample: Mapping[str, Any]) -> int:
    """The rows of `sample`: the first size of its first array that has one; 1 if none has."""
    return next((len(array) for array in sample.values() if array.shape), 1)
