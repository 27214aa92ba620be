"""Large PredictRequests are read where they stand, and as protobuf itself reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import Form, Request
from dl_inference_core.wire import messages, tfserving


def message(**tensors: Any) -> Any:
    request = Request(payload=tensors, form=Form.TENSORS, model="m", version=3, signature="s", outputs=("a", "b"))
    return messages.PredictRequest.FromString(tfserving.encode_request(request))


@pytest.fixture
def always_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfserving, "LARGE", 0)


@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_a_picture_is_not_copied(kind: Any) -> None:
    picture = np.arange(224 * 224 * 3, dtype=np.float32).reshape(1, 224, 224, 3)
    body = kind(message(image=picture).SerializeToString())
    decoded = tfserving.decode_request(body)
    np.testing.assert_array_equal(decoded.payload["image"], picture)
    assert np.shares_memory(decoded.payload["image"], np.frombuffer(body, np.uint8))
    assert (decoded.model, decoded.version, decoded.signature, decoded.outputs) == ("m", 3, "s", ("a", "b"))


TENSORS = st.builds(
    lambda dtype, shape, listed, name: (dtype, shape, listed, name),
    st.sampled_from(["float32", "int64", "bool", "complex64", "object", "float16"]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.booleans(),
    st.text(max_size=4),
)


@given(st.lists(TENSORS, max_size=4), st.randoms(use_true_random=False), st.booleans())
def test_what_is_taken_apart_is_what_protobuf_reads(tensors: Any, random: Any, shuffle: bool) -> None:
    request = messages.PredictRequest()
    request.model_spec.name = "m"
    for dtype, shape, listed, name in tensors:
        values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        array = values.astype(dtype) if dtype != "object" else np.array([b"x"] * values.size, object).reshape(shape)
        tfserving.encode_tensor(array, messages.TensorProto(), as_bytes=not listed)
        request.inputs[name].Clear()
        tfserving.encode_tensor(array, request.inputs[name], as_bytes=not listed)
    body = request.SerializeToString()
    if shuffle:  # fields of a message may come in any order, and more than once
        pieces = [body[first:end] for _, first, _, end in messages.spans(body, 0, len(body)) or ()]
        pieces += random.sample(pieces, random.randint(0, len(pieces)))
        random.shuffle(pieces)
        body = b"".join(pieces)
    whole = tfserving.decode_request(body)
    rest, contents = tfserving._apart(body)
    assert rest == body or contents
    apart = messages.PredictRequest.FromString(bytes(rest))
    decoded = tfserving._decode_tensors(apart.inputs, "input", contents)
    assert decoded.keys() == whole.payload.keys()
    for name, array in whole.payload.items():
        assert decoded[name].dtype == array.dtype
        np.testing.assert_array_equal(decoded[name], array)


@pytest.mark.usefixtures("always_large")
@pytest.mark.parametrize("at", range(60))
def test_a_damaged_message_is_the_clients_fault(at: int) -> None:
    body = bytearray(message(x=np.arange(4, dtype=np.float32), y=np.array([b"a"], object)).SerializeToString())
    for value in (0, 255, body[at % len(body)] ^ 1):
        damaged = bytes(body[: at % len(body)]) + bytes([value]) + bytes(body[at % len(body) + 1 :])
        outcomes = []
        for large in (0, 1 << 30):
            tfserving.LARGE, before = large, tfserving.LARGE
            try:
                outcomes.append({k: v.tolist() for k, v in tfserving.decode_request(damaged).payload.items()})
            except BadRequest:
                outcomes.append("refused")
            finally:
                tfserving.LARGE = before
        assert outcomes[0] == outcomes[1]


@pytest.mark.usefixtures("always_large")
def test_a_name_that_is_no_text_and_bytes_of_the_wrong_length_are_refused() -> None:
    body = message(xyzzy=np.arange(4, dtype=np.float32)).SerializeToString()
    with pytest.raises(BadRequest, match="malformed"):
        tfserving.decode_request(body.replace(b"xyzzy", b"xy\xffzy"))
    short = message(x=np.arange(4, dtype=np.float32))
    short.inputs["x"].tensor_content = b"123"
    with pytest.raises(BadRequest, match="16 bytes of tensor_content"):
        tfserving.decode_request(short.SerializeToString())
