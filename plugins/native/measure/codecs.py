"""python measure/codecs.py: CPU per request of the core's codecs and the native ones, as a table in Markdown.

64 bodies with values and ids of their own take turns. Each figure is the least of many rounds, in which both kinds of
codecs take turns, so that a busy machine changes it little.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from time import thread_time
from typing import Any

import numpy as np
from dl_inference_native._native import Codec, KeyReader

from dl_inference_core.tensors import Form, Request, Response
from dl_inference_core.wire import messages, openinference, seldon, tfserving
from dl_inference_core.wire.protocol import PROTOCOLS

BODIES, WIDTH = 64, 128
ROUNDS, TURNS = 60, 8
"""Rounds, and how often each goes through the bodies: 5 ms for 10 µs each, well above what the clock can tell apart."""

CASES = (
    ("Open Inference, raw", "openinference", openinference, Form.TENSORS_RAW),
    ("Open Inference, typed", "openinference", openinference, Form.TENSORS),
    ("TensorFlow Serving, bytes", "tfserving", tfserving, Form.TENSORS),
    ("TensorFlow Serving, typed", "tfserving", tfserving, Form.TENSORS),
    ("Seldon, tensor", "seldon", seldon, Form.TENSOR),
)


def body(case: str, core: Any, form: Form, rows: int, number: int) -> bytes:
    array = np.random.default_rng(number).random((rows, WIDTH), np.float32)
    if form is Form.TENSOR:
        tags = {"taskId": 69.0}
        return bytes(core.encode_request(Request(payload=array, form=form, tags=tags, id=f"request-{number}")))
    if case == "TensorFlow Serving, typed":
        message = messages.PredictRequest(model_spec={"name": "mmoe"})
        tfserving.encode_tensor(array, message.inputs["x"])
        return bytes(message.SerializeToString())
    request = Request(payload={"x": array}, form=form, model="mmoe", id=f"request-{number}")
    return bytes(core.encode_request(request))


def answered(codec: Any, form: Form, rows: int) -> Callable[[Request], object]:
    """Makes the answer to a request of two outputs for each row, as the node does."""
    scores = np.random.default_rng(0).random((rows, 2), np.float32)
    payload: Any = scores if form is Form.TENSOR else {"scores": scores}

    def answer(request: Request) -> object:
        response = Response(payload=payload, model="mmoe", version=1, tags=request.tags, id=request.id)
        return codec.encode_response(response, request)

    return answer


def least(functions: Sequence[tuple[Callable[[Any], object], Sequence[Any]]]) -> list[float]:
    """µs that each function takes for one of its arguments."""
    took = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for index, (function, arguments) in enumerate(functions):
            start = thread_time()
            for _ in range(TURNS):
                for argument in arguments:
                    function(argument)
            took[index] = min(took[index], (thread_time() - start) / TURNS / len(arguments) * 1e6)
    return took


def main() -> None:
    gc.disable()
    print("| µs per request: the core's → native | rows, bytes | key | decode | answer | decode + answer |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case, name, core, form in CASES:
        for rows in (1, 4):
            bodies = [body(case, core, form, rows, number) for number in range(BODIES)]
            native, protocol = Codec(name, core), PROTOCOLS[name]
            requests = [core.decode_request(each) for each in bodies]
            assert native.decode_plain(bodies[0]) is not None
            assert protocol.key_fields is not None
            figures = least(
                [
                    (protocol.read_key, bodies),
                    (KeyReader(protocol.key_fields).find, bodies),
                    (core.decode_request, bodies),
                    (native.decode_request, bodies),
                    (answered(core, form, rows), requests),
                    (answered(native, form, rows), requests),
                ]
            )
            pairs = [*zip(figures[::2], figures[1::2], strict=True)]
            pairs.append((sum(before for before, _ in pairs[1:]), sum(after for _, after in pairs[1:])))
            cells = " | ".join(f"{before:.1f} → {after:.2f}" for before, after in pairs)
            print(f"| {case} | {rows}, {len(bodies[0])} | {cells} |")


if __name__ == "__main__":
    main()
