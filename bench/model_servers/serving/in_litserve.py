"""What LitServe serves: JSON with the base64 of a row's floats in, and of its scores out.
`python -m … PORT` serves."""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any

import litserve
import numpy as np

from bench.model_servers.models import OUTPUT, Floats
from bench.model_servers.serving.names import SETTING
from bench.model_servers.serving.served import Served


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._served = Served()

    def decode_request(self, request: dict[str, str]) -> Floats:
        row = np.frombuffer(base64.b64decode(request[self._served.model.input]), np.float32)
        return row.reshape(self._served.model.shape)

    def batch(self, inputs: list[Floats]) -> Floats:
        return np.stack(inputs)

    def predict(self, rows: Floats) -> Floats:
        return self._served(rows)

    def unbatch(self, output: Floats) -> list[Floats]:
        return list(output)

    def encode_response(self, output: Floats) -> dict[str, str]:
        return {OUTPUT: base64.b64encode(output.tobytes()).decode()}


def main(port: int) -> None:
    setting: dict[str, Any] = json.loads(os.environ[SETTING])
    fast_queue = setting.pop("fast_queue")
    server = litserve.LitServer(
        Api(**setting), accelerator="cpu", workers_per_device=1, timeout=60, fast_queue=fast_queue
    )
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="error", generate_client_file=False)


if __name__ == "__main__":
    main(int(sys.argv[1]))
