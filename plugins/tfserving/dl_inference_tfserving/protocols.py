"""The protocols of TensorFlow Serving's methods that take examples. Imports no codec: a gateway forwards them, too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dl_inference_core.errors import BadRequest
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS, Protocol
from dl_inference_core.wire.routing_keys import NO_NAME, RoutingKey, key_of, parse_key

if TYPE_CHECKING:
    from dl_inference_core.transport import Message

_SERVICE = "/tensorflow.serving.PredictionService"
_EXAMPLES = "dl_inference_tfserving.examples"


def read_multi_inference_key(body: Message) -> RoutingKey:
    """The key of the first task, which says the version for all tasks.

    Raises:
        BadRequest: the bytes are malformed; there is no task; a task names no model, or another than the first.
    """
    tasks = parse_key(messages.MultiInferenceKey, body, messages.MultiInferenceRequest, 1).tasks
    names = {task.model_spec.name for task in tasks}
    if len(names) > 1 and "" in names:
        raise BadRequest("Found ModelSpec with an empty model name.")
    if len(names) > 1:
        raise BadRequest("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
    if not names or "" in names:
        raise BadRequest(NO_NAME)
    return key_of(tasks[0].model_spec)


# The messages have the `model_spec` where PredictRequest has it.
CLASSIFY = replace(
    PROTOCOLS["tfserving"],
    name="tfserving_classify",
    node_method=f"{_SERVICE}/Classify",
    codec_at=f"{_EXAMPLES}:CLASSIFY",
)
REGRESS = replace(
    PROTOCOLS["tfserving"],
    name="tfserving_regress",
    node_method=f"{_SERVICE}/Regress",
    codec_at=f"{_EXAMPLES}:REGRESS",
)
MULTI_INFERENCE = Protocol(
    name="tfserving_multi_inference",
    node_method=f"{_SERVICE}/MultiInference",
    read_key=read_multi_inference_key,
    codec_at=f"{_EXAMPLES}:MULTI_INFERENCE",
    several=True,
)
"""Several of a model's signatures asked at once."""
