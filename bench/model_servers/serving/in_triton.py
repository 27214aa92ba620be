"""What Triton's Python backend runs: it gets a batch as a list of requests, and concatenates and splits it itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from bench.model_servers.models import OUTPUT
from bench.model_servers.serving.served import Served


class TritonPythonModel:
    def initialize(self, arguments: Any) -> None:
        self._served = Served()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        name = self._served.model.input
        rows = [triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
        scores = self._served(rows[0] if len(rows) == 1 else np.concatenate(rows))
        answers, first = [], 0
        for each in rows:
            part = scores[first : first + len(each)]
            answers.append(triton.InferenceResponse([triton.Tensor(OUTPUT, part)]))
            first += len(each)
        return answers
