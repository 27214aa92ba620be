"""The native readers find the keys that the core's readers find, and judge answers as the core does."""

from __future__ import annotations

from typing import Any

import pytest
from dl_inference_tfserving.api import TfServingApi
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.errors import BadRequest, ModelNotFound
from dl_inference_core.wire import limits, messages
from dl_inference_core.wire.protocol import METHODS, QUESTIONS
from dl_inference_core.wire.protocol import well_formed as core_well_formed
from dl_inference_core.wire.routing_keys import RoutingKey

native = pytest.importorskip("dl_inference_native._native", reason="the extension is not built")

READERS = {
    protocol.name: (protocol, native.KeyReader(protocol.key_fields))
    for protocol in (*METHODS.values(), *TfServingApi.protocols.values(), *QUESTIONS)
    if protocol.key_fields is not None
}


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def wire(number: int, kind: int, payload: bytes) -> bytes:
    return varint(number << 3 | kind) + payload


def text(number: int, payload: bytes) -> bytes:
    return wire(number, 2, varint(len(payload)) + payload)


PADDING = text(15, b"p" * 5000)
"""Makes a message so large that what it costs is counted."""
TAGS = st.builds(
    lambda key, value: text(2, text(1, key) + text(2, value)),
    st.sampled_from([b"taskId", b"x", b"\xff", b""]),
    st.one_of(
        st.floats().map(lambda number: messages.Value(number_value=number).SerializeToString()),
        st.integers(-(2**54), 2**54).map(lambda number: messages.Value(number_value=number).SerializeToString()),
        st.sampled_from(
            [b"\x1a\x01a", b"\x1a\x00", b"\x20\x01", b"\x08\x00", b"\x1a\x01\xff", b"\x32\x00", b"\x11", b""]
        ),
    ),
)
NAMES = st.one_of(st.text(max_size=5).map(str.encode), st.binary(max_size=5))
SPECS = st.one_of(
    st.builds(text, st.integers(1, 5), NAMES),
    st.integers(-(2**63), 2**63 - 1).map(lambda number: text(2, wire(1, 0, varint(number % 2**64)))),
    st.sampled_from([b"", b"\x08", b"\x08\x01\x08\x02", b"\x10\x01"]).map(lambda value: text(2, value)),
)
FIELDS = st.one_of(
    st.builds(text, st.integers(1, 4), NAMES),
    st.lists(SPECS, max_size=3).map(lambda parts: text(1, b"".join(parts))),
    st.lists(TAGS, max_size=3).map(lambda parts: text(2, b"".join(parts))),
    st.builds(lambda number, value: wire(number, 0, varint(value)), st.integers(0, 20), st.integers(0, 2**64)),
    st.builds(lambda number, value: wire(number, 1, value), st.integers(1, 20), st.binary(min_size=8, max_size=8)),
    st.builds(lambda number, value: wire(number, 5, value), st.integers(1, 20), st.binary(min_size=4, max_size=4)),
    st.builds(
        lambda number, inner, end: wire(number, 3, inner + wire(end, 4, b"")),
        st.integers(1, 3),
        st.sampled_from([b"", b"\x08\x01", b"\x00\x00", b"\x13\x14", b"\x13\x1c", b"\x0a\x01", b"\x0e"]),
        st.integers(1, 3),
    ),
    st.builds(wire, st.integers(0, 2**29 + 1), st.integers(0, 7), st.binary(max_size=12)),
    st.sampled_from(
        [
            b"\x8a\x00\x01a",
            b"\x0a\x81\x00a",
            b"\x0a\x81\x80\x80\x80\x00a",
            b"\x0a\x81\x80\x80\x80\x80\x00a",
            b"\x0a\xff\xff\xff\xff\x07",
            b"\x8a\x80\x80\x80\x00\x01a",
            b"\x8a\x80\x80\x80\x80\x00\x01a",
            b"\x88\x80\x80\x80\x10\x01",
            b"\x88\x80\x80\x80\x70\x01",
            b"\x08" + b"\x80" * 9 + b"\x01",
            b"\x08" + b"\xff" * 9 + b"\x7f",
            b"\x08" + b"\xff" * 10,
            PADDING,
        ]
    ),
    st.binary(max_size=6),
)


@st.composite
def bodies(draw: Any) -> bytes:
    body = b"".join(draw(st.lists(FIELDS, max_size=8)))
    return body[: len(body) - draw(st.sampled_from([0, 0, 0, 1, 2]))]


def key_of(protocol: Any, body: bytes) -> Any:
    try:
        return protocol.read_key(body)
    except (BadRequest, ModelNotFound):
        return None


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=500, deadline=None)
@given(body=bodies())
def test_a_key_that_is_found_is_the_cores(name: str, body: bytes) -> None:
    protocol, reader = READERS[name]
    found = reader.find(body)
    if found is not None:
        key = key_of(protocol, body)
        assert found == key
        assert [type(part) for part in found] == [type(part) for part in key]


@pytest.mark.parametrize("padding", [b"", PADDING])
def test_keys_of_plain_requests_are_found(padding: bytes) -> None:
    spec = {"name": "m", "signature_name": "s"}
    plain = [
        ("openinference", messages.ModelInferRequest(model_name="m", id="i"), ("m", "", "")),
        ("openinference", messages.ModelInferRequest(model_name="m", model_version="03"), ("m", "03", "")),
        (
            "openinference",
            messages.ModelInferRequest(model_name="m", parameters={"timeout": {"int64_param": 1}}),
            ("m", "", "", True),
        ),
        ("openinference_ready", messages.ModelReadyRequest(name="m", version="3"), ("m", "3", "")),
        ("tfserving", messages.PredictRequest(model_spec=spec), ("m", None, "")),
        ("tfserving", messages.PredictRequest(model_spec={**spec, "version": {"value": 0}}), ("m", 0, "")),
        ("tfserving", messages.PredictRequest(model_spec={**spec, "version": {"value": -1}}), ("m", -1, "")),
        (
            "tfserving_classify",
            messages.ClassificationRequest(model_spec={**spec, "version_label": "l"}),
            ("m", None, "l"),
        ),
        ("tfserving_status", messages.GetModelStatusRequest(model_spec=spec), ("m", None, "")),
        ("seldon", seldon(taskId=69.0, other=True), (69, None, "")),
        ("seldon", seldon(taskId="textcnn", other=None), ("textcnn", None, "")),
    ]
    for name, message, key in plain:
        protocol, reader = READERS[name]
        body = padding + message.SerializeToString() + padding
        assert reader.find(body) == RoutingKey(*key) == protocol.read_key(body)


def seldon(**tags: Any) -> Any:
    message = messages.SeldonMessage()
    for name, tag in tags.items():
        kind = {bool: "bool_value", float: "number_value", str: "string_value"}.get(type(tag), "null_value")
        setattr(message.meta.tags[name], kind, tag or 0 if tag is None else tag)
    return message


def test_what_costs_too_much_to_decode_has_no_key_of_its_own() -> None:
    """The core's reader refuses such a message, or has to count it."""
    protocol, reader = READERS["tfserving"]
    many = messages.PredictRequest(model_spec={"name": "m"}).SerializeToString() + b"\x12\x00" * 100_000
    with pytest.raises(BadRequest, match="too many values"):
        protocol.read_key(many)
    assert reader.find(many) is None
    wide = text(1, text(1, b"m") + b"\x50\x01" * limits.SMALL)
    assert reader.find(wide) is None


@settings(max_examples=1500, deadline=None)
@given(body=bodies())
def test_answers_are_judged_as_the_core_judges_them(body: bytes) -> None:
    assert native.well_formed(body) == core_well_formed(body)


@pytest.mark.parametrize("depth", range(95, 106))
@pytest.mark.parametrize("padding", [b"", PADDING])
def test_groups_in_each_other_are_judged_as_protobuf_judges_them(depth: int, padding: bytes) -> None:
    body = padding + wire(1, 3, b"") * depth + wire(1, 4, b"") * depth
    assert native.well_formed(body) == core_well_formed(body)


@pytest.mark.parametrize("count", [10, 33, 400_000, 624_999, 625_000, 625_001, 700_000])
def test_answers_of_many_fields_are_judged_as_the_core_judges_them(count: int) -> None:
    for part in (b"\x08\x01", b"\x0a\x00"):
        assert native.well_formed(part * count) == core_well_formed(part * count)
