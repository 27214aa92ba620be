"""The models that all servers serve, as they are asked; `bench.model_servers.nets` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Rows at once, in which the bare model is tried."""
OUTPUT = "scores"
"""The one output of each, float32 [n, m]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A TorchScript module with one float32 input and the output `OUTPUT`.

    Attributes:
        shape: of one row of its input.
        outputs: how many scores it gives for a row.
        threads: that one of torch's operators may use, in every server.
        in_flight: how many requests of one row each are under way.
        rounds_of: of a round's seconds, how many times as long its rounds are: few requests tell little.
        varied: whether requests of one to four rows are measured too.
        batch: rows that any server may put together: here torch gets through as many of them as in larger batches, or
            more.
    """

    name: str
    title: str
    input: str
    shape: tuple[int, ...]
    outputs: int
    threads: int
    in_flight: tuple[int, ...]
    batch: int
    rounds_of: float = 1.0
    varied: bool = True

    def row(self) -> Floats:
        """The first request's input, [1, …]; the same every time."""
        return np.random.default_rng(1).random((1, *self.shape), dtype=np.float32)


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        model.name: model
        for model in (
            Model(
                name="mmoe",
                title="ranking net (MMoE), 62 features",
                input="features",
                shape=(62,),
                outputs=2,
                threads=1,
                in_flight=(1, 8, 32, 128),
                batch=64,
            ),
            Model(
                name="digits",
                title="digits CNN, 1x8x8",
                input="image",
                shape=(1, 8, 8),
                outputs=10,
                threads=1,
                in_flight=(1, 8, 32, 128),
                batch=64,
            ),
            Model(
                name="resnet50",
                title="ResNet-50, 3x224x224",
                input="image",
                shape=(3, 224, 224),
                outputs=1000,
                threads=2,
                in_flight=(1, 8, 32),
                batch=8,
                rounds_of=1.5,
                varied=False,
            ),
        )
    }
)
