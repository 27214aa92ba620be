"""What BentoML serves: JSON with rows as nested lists in, scores likewise out; it batches by itself."""

from __future__ import annotations

import json
import os

import bentoml
import numpy as np

from bench.model_servers.serving.names import SETTING
from bench.model_servers.serving.served import Served


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Service:
    def __init__(self) -> None:
        self._served = Served()

    @bentoml.api(**json.loads(os.environ[SETTING]))
    def predict(self, rows: np.ndarray) -> np.ndarray:
        return self._served(rows.astype(np.float32))
