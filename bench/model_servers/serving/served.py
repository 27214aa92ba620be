"""The model that a peer serves, as its environment says."""

from __future__ import annotations

import os

import numpy as np
import torch

from bench.model_servers.models import MODELS, OUTPUT, Floats
from bench.model_servers.serving.names import FILE, MODEL


class Served:
    """Call it with rows [n, …]; it gives their scores, [n, m]. Sets torch's threads for the whole process."""

    def __init__(self) -> None:
        self.model = MODELS[os.environ[MODEL]]
        torch.set_num_threads(self.model.threads)
        self._module = torch.jit.load(os.environ[FILE]).eval()  # type: ignore[no-untyped-call]

    def __call__(self, rows: Floats) -> Floats:
        with torch.inference_mode():
            # Writeable, as torch warns of what is not.
            scores = self._module(torch.from_numpy(np.require(rows, np.float32, ["C", "W"])))[OUTPUT]
        found: Floats = scores.numpy()
        return found
