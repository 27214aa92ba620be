"""What PyTriton binds to Triton: a function of this process, which Triton's Python backend calls through shared memory.
`python -m … GRPC_PORT HTTP_PORT METRICS_PORT` serves."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from bench.model_servers.models import OUTPUT, Floats
from bench.model_servers.serving.names import SETTING
from bench.model_servers.serving.served import Served


def main(grpc_port: int, http_port: int, metrics_port: int) -> None:
    served = Served()
    model = served.model

    @batch
    def infer(**inputs: Floats) -> dict[str, Floats]:
        return {OUTPUT: served(inputs[model.input])}

    here = "127.0.0.1"
    config = TritonConfig(
        grpc_address=here,
        grpc_port=grpc_port,
        http_address=here,
        http_port=http_port,
        metrics_address=here,
        metrics_port=metrics_port,
    )
    batcher = DynamicBatcher(max_queue_delay_microseconds=json.loads(os.environ[SETTING])["delay_us"])
    with Triton(config=config) as triton:
        triton.bind(
            model_name=model.name,
            infer_func=infer,
            inputs=[Tensor(name=model.input, dtype=np.float32, shape=model.shape)],
            outputs=[Tensor(name=OUTPUT, dtype=np.float32, shape=(model.outputs,))],
            config=ModelConfig(max_batch_size=model.batch, batcher=batcher),
        )
        triton.serve()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
