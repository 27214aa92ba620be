"""The requests that TensorFlow Serving has recorded for a model, in a TFRecord file of PredictionLogs beside it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from dl_inference_core.errors import InferenceError, ModelError
from dl_inference_core.tensors import Request
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS
from dl_inference_tfserving.examples import CLASSIFY, MULTI_INFERENCE, REGRESS

FILE = Path("assets.extra", "tf_serving_warmup_requests")
MOST_RECORDS = 1000
"""TensorFlow Serving's own limit."""

# A record of a TFRecord file: its length and a checksum of that, its bytes and a checksum of those.
_HEAD = struct.Struct("<QI")
_CHECKSUM = 4


def recorded_requests(folder: Path) -> Iterator[tuple[str, Request]]:
    """As `Api.recorded_requests`.

    Raises:
        ModelError: the file is damaged, has more than `MOST_RECORDS` records, or a record is not a request.
    """
    try:
        content = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return
    for number, record in enumerate(_records(content), start=1):
        if number > MOST_RECORDS:
            raise ModelError(f"{folder / FILE} has over {MOST_RECORDS} records")
        where = f"warm-up request {number} in {folder / FILE}"
        try:
            requests = _requests(record)
        except Exception as error:
            raise ModelError(f"{where} cannot be answered") from error
        for request in requests:
            yield where, request


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file. Their checksums are not looked at: bytes that are not a request cannot be
    parsed."""
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
    match kind:
        case "multi_inference_log":
            return MULTI_INFERENCE.decode_requests(body)
        case "classify_log":
            return [CLASSIFY.decode_request(body)]
        case "regress_log":
            return [REGRESS.decode_request(body)]
        case _:
            return [PROTOCOLS["tfserving"].codec.decode_request(body)]
