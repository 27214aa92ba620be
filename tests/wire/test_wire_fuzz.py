"""Whatever the bytes, a decoder answers or says BadRequest."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.errors import BadRequest, NodeFailed
from dl_inference_core.tensors import Form, Request, Response
from dl_inference_core.wire import openinference, seldon, tfserving
from dl_inference_core.wire.protocol import PROTOCOLS, well_formed

TENSORS = {"x": np.arange(4, dtype=np.float32).reshape(2, 2), "s": np.array([b"ab", b""], object), "i": np.arange(3)}
TAGS = {"taskId": 69.0, "deep": {"a": [1, None, "b"]}}


def seeds() -> Any:
    for form in (Form.TENSORS, Form.TENSORS_RAW):
        named = Request(payload=TENSORS, form=form, model="m", version=1, outputs=("y",), parameters={"a": 1}, id="i")
        yield openinference.encode_request(named)
        yield openinference.encode_response(Response(payload=TENSORS, version=1), named)
    yield tfserving.encode_request(named)
    yield tfserving.encode_response(Response(payload=TENSORS, version=1), named)
    for payload, form in (
        (TENSORS["x"], Form.TENSOR),
        (TENSORS["x"], Form.NDARRAY),
        (TENSORS["s"], Form.NDARRAY),
        (TENSORS["x"], Form.TFTENSOR),
        (b"bytes", Form.BYTES),
        ("text", Form.TEXT),
        ({"a": [1, {"b": None}]}, Form.JSON),
    ):
        yield seldon.encode_request(Request(payload=payload, form=form, tags=TAGS, names=("a",), id="p"))


SEEDS = list(seeds())


@st.composite
def mutated(draw: Any) -> Any:
    body = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        match draw(st.sampled_from(["set", "insert", "delete", "double"])):
            case "set" if at < len(body):
                body[at] = draw(st.integers(0, 255))
            case "insert":
                body[at:at] = draw(st.binary(max_size=6))
            case "delete":
                del body[at : at + draw(st.integers(1, 9))]
            case "double":
                body[at:at] = body[at : at + draw(st.integers(1, 40))]
    return bytes(body)


@pytest.mark.parametrize(
    "codec", [tfserving, openinference, seldon], ids=lambda codec: codec.__name__.rpartition(".")[2]
)
@settings(max_examples=600, deadline=None)
@given(body=st.one_of(st.binary(max_size=60), mutated()))
def test_decoders_answer_or_say_bad_request(codec: Any, body: Any) -> None:
    try:
        request = codec.decode_request(body)
    except BadRequest:
        pass
    else:
        again = codec.decode_request(codec.encode_request(request))
        assert (again.form, again.model, again.id) == (request.form, request.model, request.id)
    with suppress(BadRequest, NodeFailed):  # NodeFailed: Seldon's own status, FAILURE
        codec.decode_response(body)
    with suppress(BadRequest):
        PROTOCOLS[codec.__name__.rpartition(".")[2]].read_key(body)
    well_formed(body)
