"""The native codecs decode what they decode as the core's codecs do, to the bit, and leave the rest to them."""

from __future__ import annotations

import sys
from dataclasses import fields
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import Form, Request
from dl_inference_core.wire import limits, messages, openinference, seldon, tfserving
from dl_inference_core.wire.arrays import BFLOAT16

native = pytest.importorskip("dl_inference_native._native", reason="the extension is not built")

CORE: dict[str, ModuleType] = {"openinference": openinference, "tfserving": tfserving, "seldon": seldon}
CODECS = {name: native.Codec(name, core) for name, core in CORE.items()}
MESSAGES = {
    "openinference": messages.ModelInferRequest,
    "tfserving": messages.PredictRequest,
    "seldon": messages.SeldonMessage,
}
# Numbers of the fields that hold messages, in each other.
TREES: dict[str, Any] = {
    "openinference": {4: {2: {}}, 5: {4: {2: {}}, 5: {}}, 6: {2: {}}},
    "tfserving": {1: {2: {}}, 2: {2: {2: {2: {}}}}},
    "seldon": {1: {}, 2: {2: {2: {}}, 5: {}}, 3: {2: {}, 3: {1: {}}, 4: {2: {2: {}}}}},
}
STRING = np.dtype(object)
DTYPES = [*map(np.dtype, "?bBhHiIqQefdFD"), BFLOAT16, STRING]


def bits(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return repr(value)
    return value.dtype, value.shape, value.tolist() if value.dtype.kind == "O" else value.tobytes()


def described(request: Any) -> dict[str, Any]:
    """A request, in which values are equal only if they are the same to the last bit."""
    facts = {field.name: getattr(request, field.name) for field in fields(Request)}
    payload = facts.pop("payload")
    tensors = {name: bits(value) for name, value in (payload if type(payload) is dict else {None: payload}).items()}
    assert type(facts["tags"]) is type(facts["parameters"]) is dict
    for name in ("tags", "parameters"):
        facts[name] = {key: repr(value) for key, value in facts[name].items()}
    return {**{name: (type(value), value) for name, value in facts.items()}, "payload": tensors}


def same(ours: Any, theirs: Any) -> bool:
    return described(ours) == described(theirs)


def outcome(decode: Any, body: Any) -> Any:
    try:
        return decode(body)
    except BadRequest as error:
        return str(error)


def check(name: str, body: Any) -> bool:
    """Holds the native codec against the core's; whether it decoded `body` itself."""
    theirs = outcome(CORE[name].decode_request, bytes(body))
    plain = CODECS[name].decode_plain(body)
    if plain is not None:
        assert not isinstance(theirs, str), theirs
        assert same(plain, theirs)
    else:
        ours = outcome(CODECS[name].decode_request, body)
        assert ours == theirs if isinstance(theirs, str) else same(ours, theirs)
    return plain is not None


# Plain requests


def numbers(dtype: Any, shape: Any, content: bytes) -> Any:
    """An array of any bytes."""
    size = int(np.prod(shape, dtype=int))
    if dtype == STRING:
        return np.array([content[:index] for index in range(size)], object).reshape(shape)
    whole = (content * (size * dtype.itemsize // max(len(content), 1) + 1))[: size * dtype.itemsize]
    array = np.frombuffer(whole or bytes(size * dtype.itemsize), dtype, size)
    return (array.view(np.uint8) & 1).astype(np.bool_).reshape(shape) if dtype.kind == "b" else array.reshape(shape)


ARRAYS = st.builds(
    numbers,
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), max_size=3).map(tuple),
    st.binary(min_size=1, max_size=40),
)
NUMBERS = ARRAYS.filter(lambda array: array.dtype != STRING)
TAGS = st.dictionaries(
    st.sampled_from(["taskId", "a", "ü", ""]),
    st.one_of(
        st.text(max_size=3),
        st.floats(),
        st.integers(-(2**54), 2**54).map(float),
        st.booleans(),
        st.none(),
        st.just({"x": [1.0]}),
    ),
    max_size=3,
)


@st.composite
def requests(draw: Any, name: str) -> Any:
    """A message of the protocol, most of them plain."""
    given: dict[str, Any] = {
        "model": draw(st.text(max_size=4)),
        "version": draw(st.sampled_from([None, None, 0, 3, -1, 2**62])),
        "id": draw(st.text(max_size=5)),
        "outputs": tuple(draw(st.lists(st.text(max_size=2), max_size=2, unique=True))),
    }
    if name == "seldon":
        form = draw(st.sampled_from([Form.TENSOR] * 4 + [Form.NDARRAY, Form.TFTENSOR]))
        array = draw(NUMBERS.filter(lambda array: array.dtype.kind in "fiu" and array.dtype.itemsize < 8))
        names = tuple(draw(st.lists(st.text(max_size=3), max_size=3)))
        body = seldon.encode_request(
            Request(payload=array, form=form, tags=draw(TAGS), names=names, id=given["id"], model=given["model"])
        )
        return messages.SeldonMessage.FromString(body)
    tensors = draw(st.dictionaries(st.text(max_size=3), draw(st.sampled_from([NUMBERS, ARRAYS])), max_size=3))
    if name == "tfserving":
        given["signature"] = draw(st.sampled_from(["", "s"]))
        given["label"] = draw(st.sampled_from(["", "stable"]))
        message = messages.PredictRequest.FromString(
            tfserving.encode_request(Request(payload={}, form=Form.TENSORS, **given))
        )
        for key, array in tensors.items():
            message.inputs[key].SetInParent()
            tfserving.encode_tensor(array, message.inputs[key], as_bytes=draw(st.booleans()))
        return message
    form = draw(st.sampled_from([Form.TENSORS, Form.TENSORS_RAW]))
    tensors = {key: array for key, array in tensors.items() if array.dtype.kind != "c"}
    parameters = draw(st.sampled_from([{}, {}, {}, {"a": 1}]))
    body = openinference.encode_request(Request(payload=tensors, form=form, parameters=parameters, **given))
    return messages.ModelInferRequest.FromString(body)


# What can happen to their bytes


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def delimited(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


UNUSUAL = st.one_of(
    st.sampled_from([19, 30, 2000, 2048]).map(lambda number: delimited(number, b"unknown")),
    st.builds(lambda number, value: varint(number << 3) + varint(value), st.integers(1, 20), st.integers(0, 2**64 - 1)),
    st.builds(
        lambda number, value: varint(number << 3 | 1) + value, st.integers(1, 20), st.binary(min_size=8, max_size=8)
    ),
    st.builds(
        lambda number, value: varint(number << 3 | 5) + value, st.integers(1, 20), st.binary(min_size=4, max_size=4)
    ),
    st.builds(delimited, st.integers(1, 17), st.binary(max_size=9)),
    st.sampled_from([b"\xfb\x01\xfc\x01", b"\x0b\x08\x01\x0c", b"\x07", b"\x00\x00"]),
)


def packed_apart(payload: bytes) -> list[bytes]:
    """The varints in `payload`, each as a field of its own."""
    values, start = [], 0
    for end, byte in enumerate(payload, 1):
        if byte < 128:
            values.append(payload[start:end])
            start = end
    return values


def disturbed(draw: Any, message: bytes, tree: Any) -> bytes:
    """The message with one unusual thing in it, or in a message in it."""
    spans = messages.spans(message, 0, len(message), 1000)
    assert spans is not None
    parts = [message[first:end] for _, first, _, end in spans]
    inner = [index for index, (number, *_) in enumerate(spans) if number in tree]
    if inner and draw(st.booleans()):
        index = draw(st.sampled_from(inner))
        number, _, start, end = spans[index]
        parts[index] = delimited(number, disturbed(draw, message[start:end], tree[number]))
        return b"".join(parts)
    kind = draw(st.sampled_from(["shuffle", "drop", "double", "insert", "replace", "unpack", "split", "overlong"]))
    at = draw(st.integers(0, max(len(parts) - 1, 0)))
    if kind == "insert" or not parts:
        parts.insert(at, draw(UNUSUAL))
        return b"".join(parts)
    number, first, start, end = spans[at]
    payload = message[start:end]
    if kind == "shuffle":
        parts = draw(st.permutations(parts))
    elif kind == "drop":
        del parts[at]
    elif kind == "double":
        parts.append(parts[at])
    elif kind == "replace":
        parts[at] = delimited(number, draw(st.binary(max_size=12)))
    elif message[first] & 7 != 2:
        pass
    elif kind == "unpack":
        parts[at] = b"".join(varint(number << 3) + value for value in packed_apart(payload))
    elif kind == "split":
        middle = len(payload) // 2
        parts[at : at + 1] = [delimited(number, payload[:middle]), delimited(number, payload[middle:])]
    else:
        size = len(payload)
        parts[at] = varint(number << 3 | 2) + bytes([size & 127 | 128, size >> 7 | 128, 0]) + payload
    return b"".join(parts)


@pytest.mark.parametrize("name", CORE)
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_requests_are_decoded_as_by_the_core(name: str, data: Any) -> None:
    body = data.draw(requests(name)).SerializeToString()
    for _ in range(data.draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        if messages.spans(body, 0, len(body), 1000) is not None:
            try:
                body = disturbed(data.draw, body, TREES[name])
            except AssertionError:  # an earlier change has made the message malformed
                break
    check(name, body)


@pytest.mark.parametrize("name", CORE)
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_damaged_requests_are_decoded_as_by_the_core(name: str, data: Any) -> None:
    body = bytearray(data.draw(requests(name)).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body)))
        removed = data.draw(st.sampled_from([0, 0, 1, 1, 2, 9]))
        body[at : at + removed] = data.draw(st.binary(max_size=removed + 1))
    del body[len(body) - data.draw(st.sampled_from([0, 0, 1, 5])) :]
    check(name, bytes(body))


def plain(name: str, array: Any, *, typed: bool = False) -> bytes:
    """A request as clients send it."""
    if name == "seldon":
        tags = {"taskId": 69.0, "who": "you", "flag": True, "none": None}
        given = Request(payload=array, form=Form.TENSOR, tags=tags, names=("a", "b"), id="p")
    else:
        form = Form.TENSORS if typed else Form.TENSORS_RAW
        given = Request(payload={"x": array}, form=form, model="m", version=3, signature="s" * (name[0] == "t"), id="i")
        if name == "tfserving" and typed:
            message = messages.PredictRequest(model_spec={"name": "m", "version_label": "l"}, output_filter=["y"])
            tfserving.encode_tensor(array, message.inputs["x"])
            return bytes(message.SerializeToString())
    return bytes(CORE[name].encode_request(given))


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (1, 128), (2, 3, 4), (1,) * 8], ids=str)
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "raw"])
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=lambda dtype: dtype.name)
def test_plain_requests_of_every_dtype_are_decoded_natively(dtype: Any, typed: bool, shape: Any) -> None:
    for name in CORE:
        array = numbers(dtype, shape, bytes(range(256)) * 3)
        if name == "seldon":
            array = np.arange(array.size, dtype=np.float64).reshape(shape) * np.nan
        if name == "openinference" and (
            array.dtype.kind == "c" or (typed and array.dtype.itemsize == 2 and array.dtype.kind not in "iu")
        ):
            continue
        body = plain(name, array, typed=typed)
        for offset in range(9):
            view = memoryview(bytes(offset) + body)[offset:]
            assert check(name, view), name
        assert check(name, body)


@pytest.mark.parametrize("count", [12, 100_000])
@pytest.mark.parametrize("name", CORE)
def test_a_tensor_that_is_aligned_is_not_copied_and_any_other_is(name: str, count: int) -> None:
    array = np.arange(count, dtype=np.float64 if name == "seldon" else np.float32).reshape(1, -1)
    body, views = plain(name, array), 0
    for offset in range(8):
        message = memoryview(bytes(offset) + body)[offset:]
        payload = CODECS[name].decode_plain(message).payload
        decoded = payload if name == "seldon" else payload["x"]
        assert decoded.flags.aligned
        if np.shares_memory(decoded, np.frombuffer(message, np.uint8)):
            views += 1
            assert not decoded.flags.writeable
        del message
        np.testing.assert_array_equal(decoded, array)
    assert views == 8 // array.itemsize


def test_a_large_list_is_decoded_beside_other_threads() -> None:
    array = np.arange(1 << 18).reshape(2, -1)
    for name in ("openinference", "tfserving"):
        assert check(name, plain(name, array, typed=True))


@pytest.mark.parametrize("name", CORE)
def test_nothing_is_kept_of_a_request_that_is_gone(name: str) -> None:
    """References are counted by hand where arrays are made."""
    array = np.arange(12.0).reshape(3, 4)
    plain_body, copied = plain(name, array), plain(name, array if name == "seldon" else array > 3, typed=True)
    too_large = messages.ModelInferRequest()
    too_large.inputs.add(name="x", datatype="INT8", shape=[1]).contents.int_contents.append(300)
    bodies = [plain_body, memoryview(plain_body), copied, too_large.SerializeToString()]
    held = [*bodies, array.dtype, np.dtype(np.bool_), np.dtype(np.int8), Form.TENSORS, Form.TENSOR, None]
    CODECS[name].decode_plain(plain_body)
    before = [sys.getrefcount(each) for each in held]
    for _ in range(1000):
        for body in bodies:
            CODECS[name].decode_plain(body)
    kept = [sys.getrefcount(each) - count for each, count in zip(held, before, strict=True)]
    assert all(abs(count) < 100 for count in kept), kept


def test_a_view_of_more_than_bytes_and_what_is_no_buffer_are_the_cores_business() -> None:
    body = plain("openinference", np.zeros((2, 2)))
    spread = memoryview(bytes(byte for each in body for byte in (each, 0)))[::2]
    assert CODECS["openinference"].decode_plain(spread) is None
    assert same(CODECS["openinference"].decode_request(spread), openinference.decode_request(body))
    with pytest.raises(TypeError):
        CODECS["openinference"].decode_request(7)


# What a message may cost


@pytest.mark.parametrize("count", [100, 600, 2_000, 4_000, 20_000, 100_000])
def test_what_costs_too_much_to_decode_is_refused_as_by_the_core(count: int) -> None:
    infer = messages.ModelInferRequest()
    infer.inputs.add(name="x", datatype="FP32", shape=[0])
    head = infer.SerializeToString()
    refused = {
        "openinference": [head + b"\x32\x00" * count, head + b"\x80\x01\x00" * count],
        "tfserving": [delimited(1, b"") + b"\x98\x01\x00" * count],
        "seldon": [delimited(3, b"\x0a\x00" * count + delimited(2, b"\x0a\x01\x00"))],
    }
    for name, bodies in refused.items():
        for body in bodies:
            check(name, body)
    big = delimited(
        2, delimited(1, b"x") + delimited(2, b"\x08\x01\x12\x05\x12\x03\x08\xe8\x07" + delimited(4, bytes(4000)))
    )
    check("tfserving", big + b"\x98\x01\x00" * count)


@pytest.mark.parametrize("count", [10_000, 500_000, 1_200_000])
def test_many_packed_varints_are_refused_as_by_the_core(count: int) -> None:
    array = np.ones(count, np.int64)
    for name in ("openinference", "tfserving"):
        check(name, plain(name, array, typed=True))


def test_no_field_costs_more_than_the_native_codecs_assume() -> None:
    """`MOST_PER_FIELD` of the Rust crate."""
    for message in MESSAGES.values():
        pending, known = [limits._described(message.DESCRIPTOR)[0]], set()
        while pending:
            kind = pending.pop()
            known.add(kind.name)
            for each, first, inner, _ in kind.fields.values():
                assert each + first <= 416
                if inner is not None and inner.name not in known:
                    pending.append(inner)
