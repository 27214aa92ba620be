"""The native codecs write answers as the core's codecs do, byte for byte where protobuf itself is deterministic."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import Form, Request, Response
from dl_inference_core.wire import messages, openinference, seldon, tfserving
from dl_inference_core.wire.arrays import BFLOAT16

native = pytest.importorskip("dl_inference_native._native", reason="the extension is not built")

CORE: dict[str, Any] = {
    "openinference": openinference,
    "openinference:AS_REQUESTED": openinference.AS_REQUESTED,
    "tfserving": tfserving,
    "seldon": seldon,
}
CODECS = {name: native.Codec(name, core) for name, core in CORE.items()}
ANSWERS = {
    "openinference": messages.ModelInferResponse,
    "openinference:AS_REQUESTED": messages.ModelInferResponse,
    "tfserving": messages.PredictResponse,
    "seldon": messages.SeldonMessage,
}
STRING = np.dtype(object)
DTYPES = [*map(np.dtype, "?bBhHiIqQefdFD"), BFLOAT16]


def numbers(dtype: Any, shape: Any, content: bytes) -> Any:
    """An array of any bytes."""
    size = int(np.prod(shape, dtype=int))
    array = np.frombuffer((content * (size * dtype.itemsize))[: size * dtype.itemsize], dtype)
    return (array.view(np.uint8) & 1).astype(np.bool_).reshape(shape) if dtype.kind == "b" else array.reshape(shape)


def arranged(array: Any, how: str) -> Any:
    """The same values laid out in another way in memory."""
    match how:
        case "sliced" if array.ndim:
            return np.repeat(array, 2, axis=-1)[..., ::2]
        case "turned":
            return np.asfortranarray(array)
        case "swapped" if array.dtype != BFLOAT16:
            return array.astype(array.dtype.newbyteorder(">"))
        case "string":
            return np.array([b"s"] * array.size, object).reshape(array.shape)
        case "list":
            return array.tolist()
        case "subclass":
            return np.ma.asarray(array)
    return array


ARRAYS = st.builds(
    arranged,
    st.builds(
        numbers,
        st.sampled_from(DTYPES),
        st.lists(st.sampled_from([0, 1, 1, 2, 3, 200]), max_size=2).map(tuple),
        st.binary(min_size=1, max_size=40),
    ),
    st.sampled_from([*["plain"] * 8, "sliced", "turned", "swapped", "string", "list", "subclass"]),
)
TAGS = st.dictionaries(
    st.sampled_from(["taskId", "a", "ü", ""]),
    st.one_of(
        st.text(max_size=3),
        st.floats(),
        st.integers(-(2**53) - 2, 2**53 + 2),
        st.booleans(),
        st.none(),
        st.sampled_from([np.float32(1.5), np.int64(3), {"x": 1}, [1], "\ud800", 2**70]),
    ),
    max_size=2,
)
REQUESTS = st.builds(
    Request,
    payload=st.just({}),
    form=st.sampled_from(Form),
    model=st.one_of(st.text(max_size=3), st.integers(0, 99)),
    signature=st.sampled_from(["", "s"]),
    id=st.text(max_size=4),
    tags=TAGS,
)
RESPONSES = st.builds(
    Response,
    payload=st.one_of(
        st.dictionaries(st.one_of(st.text(max_size=3), st.just("\ud800"), st.integers(0, 1)), ARRAYS, max_size=3),
        st.builds(lambda array: {"y": array}, ARRAYS),
        ARRAYS,
        st.sampled_from(["text", b"bytes", None, [[1.0, 2.0]], {"a": {"b": 1}}]),
    ),
    model=st.sampled_from(["", "m", "münchen"]),
    version=st.sampled_from([None, 0, 1, -1, 2**40, 2**63, True, np.int64(3)]),
    id=st.sampled_from(["", "", "own"]),
    tags=st.one_of(st.just({}), TAGS),
    names=st.lists(st.text(max_size=2), max_size=2).map(tuple),
)


def outcome(encode: Any, response: Any, request: Any) -> Any:
    try:
        return encode(response, request)
    except (BadRequest, TypeError, ValueError) as error:  # ValueError: of protobuf
        return type(error), str(error)


def ordered(name: str, answer: Any) -> Any:
    """An answer with the entries of its maps in an order of their own."""
    if isinstance(answer, tuple):
        return answer
    return ANSWERS[name].FromString(answer).SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", CORE)
@settings(max_examples=500, deadline=None)
@given(response=RESPONSES, request_=REQUESTS)
def test_answers_are_encoded_as_by_the_core(name: str, response: Any, request_: Any) -> None:
    theirs = outcome(CORE[name].encode_response, response, request_)
    ours = outcome(CODECS[name].encode_response, response, request_)
    plain = CODECS[name].encode_plain(response, request_)
    assert ordered(name, ours) == ordered(name, theirs)
    if plain is not None:
        assert plain == ours
        if name.startswith("openinference"):  # a message without maps
            assert plain == theirs


def plain_dtypes(name: str) -> Any:
    """The dtypes that the protocol has; of Seldon's those that are real numbers and no halves."""
    for dtype in DTYPES:
        half = dtype.itemsize == 2 and dtype.kind not in "iu"
        if (dtype.kind != "c" or name == "tfserving") and (name != "seldon" or (dtype.kind != "b" and not half)):
            yield pytest.param(name, dtype, id=f"{name}-{dtype.name}")


@pytest.mark.parametrize("shape", [(), (0,), (1, 2), (64, 3), (0, 4)], ids=str)
@pytest.mark.parametrize(("name", "dtype"), [each for name in CORE for each in plain_dtypes(name)])
def test_plain_answers_of_every_dtype_are_encoded_natively(name: str, dtype: Any, shape: Any) -> None:
    small = name == "seldon" and dtype.itemsize == 8 and dtype.kind in "iu"
    array = (
        np.arange(np.prod(shape)).astype(dtype).reshape(shape) if small else numbers(dtype, shape, bytes(range(256)))
    )
    form = Form.TENSOR if name == "seldon" else Form.TENSORS
    request = Request(payload={}, form=form, model="m", id="i", tags={"taskId": 69.0})
    for payload in ({"y": array}, array):
        response = Response(payload=payload, model="m", version=1)
        plain = CODECS[name].encode_plain(response, request)
        if name == "openinference:AS_REQUESTED" and not array.size and (dtype.kind in "biuf" and dtype != np.float16):
            assert plain is None  # the core's codec decides how empty contents are written
        else:
            assert plain == CORE[name].encode_response(response, request)


def test_bools_that_are_neither_0_nor_1_are_left_to_the_core() -> None:
    odd = np.array([0, 1, 2, 255], np.uint8).view(np.bool_)
    response, request = Response(payload={"y": odd}), Request(payload={}, form=Form.TENSORS, model="m")
    for name in ("tfserving", "openinference:AS_REQUESTED"):
        assert CODECS[name].encode_plain(response, request) is None


def test_integers_that_no_double_holds_are_refused_as_by_the_core() -> None:
    request = Request(payload={}, form=Form.TENSOR)
    for array in (np.array([2**53 + 1]), np.array([2**64 - 1], np.uint64), np.array([-(2**53) - 1])):
        with pytest.raises(BadRequest, match="doubles"):
            CODECS["seldon"].encode_response(Response(payload=array), request)
    exact = Response(payload=np.array([2**53, -(2**53)]))
    assert CODECS["seldon"].encode_plain(exact, request) == seldon.encode_response(exact, request)


@pytest.mark.parametrize("name", CORE)
def test_what_else_a_codec_does_is_the_cores(name: str) -> None:
    assert CODECS[name].encode_request == CORE[name].encode_request
    assert CODECS[name].decode_response == CORE[name].decode_response


def test_there_is_no_codec_for_another_protocol() -> None:
    with pytest.raises(ValueError, match="no native codec for example:CODEC"):
        native.Codec("example:CODEC", ModuleType("codec"))
