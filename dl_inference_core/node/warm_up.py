"""TensorFlow Serving's warm-up: recorded requests that lie beside a model are answered before any client's."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from dl_inference_core.errors import InferenceError, ModelError
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handling import Handler
from dl_inference_core.tensors import Request
from dl_inference_core.wire import messages, tfserving_examples
from dl_inference_core.wire.protocol import PROTOCOLS

FILE = Path("assets.extra", "tf_serving_warmup_requests")
MOST_RECORDS = 1000

# A record of a TFRecord file: its length and a checksum of that, its bytes and a checksum of those.
_HEAD = struct.Struct("<QI")
_CHECKSUM = 4


def warm_up(directory: Path, model: Model, handler: Handler) -> None:
    """Answer the requests in `directory / FILE`, if it is there. Within the model's session.

    Raises:
        ModelError: the file is damaged or has over `MOST_RECORDS`, or a request cannot be answered; says which.
    """
    try:
        content = (directory / FILE).read_bytes()
    except FileNotFoundError:
        return
    for number, record in enumerate(_records(content), start=1):
        where = f"warm-up request {number} in {directory / FILE}"
        if number > MOST_RECORDS:
            raise ModelError(f"{directory / FILE} has over {MOST_RECORDS} records")
        try:
            for request in _requests(record):
                inputs = handler.preprocess(request)
                handler.postprocess(handler.run_model(model, inputs, request), request)
        except Exception as error:
            raise ModelError(f"{where} cannot be answered") from error


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file. Their checksums are not looked at: what is no request will not be parsed."""
    position = 0
    while position < len(content):
        if position + _HEAD.size > len(content):
            raise ModelError(f"{FILE} ends within a record's head; expected a TFRecord file")
        size, _ = _HEAD.unpack_from(content, position)
        position += _HEAD.size
        if position + size + _CHECKSUM > len(content):
            raise ModelError(f"{FILE} ends within a record of {size} bytes; expected a TFRecord file")
        yield content[position : position + size]
        position += size + _CHECKSUM


def _requests(record: bytes) -> list[Request]:
    log = messages.parse(messages.PredictionLog, record)
    kind = log.WhichOneof("log_type")
    if kind is None:
        raise InferenceError("it is no Predict, Classify, Regress or MultiInference")
    body = getattr(log, kind).request.SerializeToString()
    if kind == "multi_inference_log":
        return tfserving_examples.decode_multi_inference(body)
    protocol = {"predict_log": "tfserving", "classify_log": "tfserving_classify", "regress_log": "tfserving_regress"}[
        kind
    ]
    return [PROTOCOLS[protocol].codec.decode_request(body)]
