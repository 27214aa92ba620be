"""Requests that differ as those of real clients do: in their values and, where the protocol has them, their ids."""

from __future__ import annotations

import numpy as np

from dl_inference_core.client import build

COUNT = 64
"""Bodies of one load. A cache of whole messages gains nothing from them."""
MOST_ROWS = 4
_ID_BYTES = 16
"""Of an id, as of a UUID."""


def one_row(protocol: str, model: str, name: str, shape: tuple[int, ...]) -> tuple[bytes, ...]:
    """`COUNT` requests of one row each.

    Args:
        protocol: "openinference"; or "tfserving", whose requests have no ids.
        name: of the model's one input, float32.
        shape: of one row of it.
    """
    return _requests(protocol, model, name, shape, most_rows=1)


def one_to_four_rows(protocol: str, model: str, name: str, shape: tuple[int, ...]) -> tuple[bytes, ...]:
    """`COUNT` requests of one to four rows each, as many of each number. The arguments are those of `one_row`."""
    return _requests(protocol, model, name, shape, most_rows=MOST_ROWS)


def _requests(protocol: str, model: str, name: str, shape: tuple[int, ...], most_rows: int) -> tuple[bytes, ...]:
    random = np.random.default_rng(1)
    requests = []
    for number in range(COUNT):
        rows = random.random((1 + number % most_rows, *shape), dtype=np.float32)
        requests.append(build(model, {name: rows}, protocol=protocol, id=random.bytes(_ID_BYTES).hex())[1])
    return tuple(requests)
