"""What MLServer serves; it batches by itself, as its model-settings.json says."""

from __future__ import annotations

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from bench.model_servers.models import OUTPUT
from bench.model_servers.serving.served import Served


class Runtime(MLModel):
    async def load(self) -> bool:
        self._served = Served()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        scores = self._served(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output(OUTPUT, scores)])
