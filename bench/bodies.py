"""Requests that differ as those of real clients do: in their values and, where the protocol has them, their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dl_inference_core.client import build

COUNT = 64
"""Bodies of one load. A cache of whole messages gains nothing from them."""
MOST_ROWS = 4
_ID_BYTES = 16
"""Of an id, as of a UUID."""


def one_row(protocol: str, model: str, name: str, shape: tuple[int, ...]) -> tuple[bytes, ...]:
    """`COUNT` requests of one row each.

    Args:
        protocol: "openinference"; or "seldon", whose one tensor has no name; or "tfserving", whose requests have no
            ids.
        name: of the model's one input, float32.
        shape: of one row of it.
    """
    return _requests(protocol, model, name, rows(shape))


def one_to_four_rows(protocol: str, model: str, name: str, shape: tuple[int, ...]) -> tuple[bytes, ...]:
    """`COUNT` requests of one to four rows each, as many of each number. The arguments are those of `one_row`."""
    return _requests(protocol, model, name, rows(shape, most_rows=MOST_ROWS))


def of_bytes(protocol: str, model: str, message_bytes: int) -> tuple[bytes, ...]:
    """`COUNT` requests of exactly `message_bytes` bytes: random ones, as the one row of a uint8 tensor."""
    random = np.random.default_rng(1)

    def request(content: int) -> bytes:
        values = random.integers(0, 256, (1, content), np.uint8)
        return build(model, {"x": values}, protocol=protocol, id=random.bytes(_ID_BYTES).hex())[1]

    content = message_bytes
    while len(message := request(content)) > message_bytes:
        content -= len(message) - message_bytes
    return tuple(request(content) for _ in range(COUNT))


def rows(shape: tuple[int, ...], *, most_rows: int = 1) -> list[npt.NDArray[np.float32]]:
    """What the requests hold: float32 arrays of one row each, [1, …], or of 1, 2, … `most_rows` in turn."""
    random = np.random.default_rng(1)
    return [random.random((1 + number % most_rows, *shape), dtype=np.float32) for number in range(COUNT)]


def _requests(protocol: str, model: str, name: str, arrays: Sequence[npt.NDArray[np.float32]]) -> tuple[bytes, ...]:
    random = np.random.default_rng(2)

    def request(array: npt.NDArray[np.float32]) -> bytes:
        payload: Any = array if protocol == "seldon" else {name: array}
        return build(model, payload, protocol=protocol, id=random.bytes(_ID_BYTES).hex())[1]

    return tuple(request(array) for array in arrays)
