"""The Seldon codec. The real seldon-core is met in tests/seldon, in an environment of its own."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dl_inference_core.errors import BadRequest, NodeFailed
from dl_inference_core.tensors import Form, Request, Response
from dl_inference_core.wire import messages, ndarrays, seldon
from dl_inference_core.wire.arrays import field

MATRIX = np.arange(6.0).reshape(2, 3) / 7


def message(json: Any) -> Any:
    return json_format.ParseDict(json, messages.SeldonMessage()).SerializeToString()


def decode(json: Any) -> Any:
    return seldon.decode_request(message(json))


def answer(payload: Any, form: Any = Form.TENSOR, **more: Any) -> Any:
    body = seldon.encode_response(Response(payload=payload, **more), Request(payload=b"", form=form))
    return messages.SeldonMessage.FromString(body)


def round_trip(payload: Any, form: Any) -> Any:
    return seldon.decode_request(seldon.encode_request(Request(payload=payload, form=form)))


@pytest.mark.parametrize(
    ("json", "form", "payload"),
    [
        ({"data": {"tensor": {"shape": [2, 2], "values": [1, 2, 3, 4.5]}}}, Form.TENSOR, [[1, 2], [3, 4.5]]),
        ({"data": {"tensor": {"values": [7]}}}, Form.TENSOR, 7.0),
        ({"data": {"tensor": {"shape": [0, 3]}}}, Form.TENSOR, []),
        ({"data": {"ndarray": [[1, 2], [3, 4.5]]}}, Form.NDARRAY, [[1, 2], [3, 4.5]]),
        ({"data": {"ndarray": [1, True]}}, Form.NDARRAY, [1, 1]),
        ({"data": {"ndarray": [[True], [False]]}}, Form.NDARRAY, [[True], [False]]),
        ({"data": {"ndarray": ["a", "€"]}}, Form.NDARRAY, [b"a", "€".encode()]),
        ({"data": {"ndarray": [[1.5, "male"]]}}, Form.NDARRAY, [[b"1.5", b"male"]]),
        ({"data": {"ndarray": []}}, Form.NDARRAY, []),
        ({"data": {"ndarray": [[], []]}}, Form.NDARRAY, [[], []]),
        (
            {"data": {"tftensor": {"dtype": "DT_INT64", "tensorShape": {"dim": [{"size": 2}]}, "int64Val": [1, 2]}}},
            Form.TFTENSOR,
            [1, 2],
        ),
        ({"binData": "AP8="}, Form.BYTES, b"\x00\xff"),
        ({"binData": ""}, Form.BYTES, b""),
        ({"strData": "hello €"}, Form.TEXT, "hello €"),
        ({"jsonData": {"a": [1, "b", None, True, {}]}}, Form.JSON, {"a": [1, "b", None, True, {}]}),
        ({"jsonData": None}, Form.JSON, None),
    ],
)
def test_every_payload_is_read(json: Any, form: Any, payload: Any) -> None:
    request = decode(json)
    assert request.form is form
    assert (request.payload.tolist() if isinstance(request.payload, np.ndarray) else request.payload) == payload


def test_meta_and_names_are_read() -> None:
    request = decode(
        {
            "meta": {"puid": "p", "tags": {"taskId": 100, "s": "t", "n": 2, "deep": {"list": [None, False]}}},
            "data": {"names": ["a", "b"], "ndarray": [[1, 2]]},
        }
    )
    assert (request.model, request.id, request.names) == (100, "p", ("a", "b"))
    assert type(request.model) is int
    assert request.tags == {"taskId": 100, "s": "t", "n": 2, "deep": {"list": [None, False]}}
    assert type(request.tags["n"]) is float
    assert decode({"meta": {"tags": {"taskId": "textcnn"}}, "strData": ""}).model == "textcnn"
    assert decode({"strData": ""}).model == ""


@pytest.mark.parametrize(
    ("json", "match"),
    [
        ({}, "no payload; expected data"),
        ({"data": {}}, "data is empty"),
        ({"data": {"names": ["a"]}}, "data is empty"),
        ({"data": {"tensor": {"shape": [2], "values": [1]}}}, r"shape \[2\] takes 2 values; got 1"),
        ({"data": {"tensor": {"shape": [-1], "values": [1]}}}, "negative size"),
        ({"data": {"tensor": {"shape": [2**31 - 1] * 4, "values": [1]}}}, "got 1"),
        ({"data": {"tensor": {"shape": [1] * 65, "values": [1]}}}, "not possible"),
        ({"data": {"tensor": {"shape": [0] + [2**31 - 1] * 6}}}, "holds no values"),
        ({"data": {"tensor": {"shape": [1025, 0]}}}, "holds no values"),
        ({"data": {"ndarray": eval("[" * 33 + "1" + "]" * 33)}}, "33 dimensions; expected 32"),
        ({"data": {"ndarray": eval("[" * 33 + "True" + "]" * 33)}}, "33 dimensions; expected 32"),
        ({"data": {"ndarray": [[1], [1, 2]]}}, "unequal length"),
        ({"data": {"ndarray": [[1], 1]}}, "unequal length"),
        ({"data": {"ndarray": [[[1]], [1]]}}, "length"),
        ({"data": {"ndarray": [None]}}, "an object or null"),
        ({"data": {"ndarray": [{"a": 1}, "b"]}}, "an object or null"),
        ({"data": {"tftensor": {"dtype": "DT_FLOAT", "tensorShape": {"dim": [{"size": 10**12}]}}}}, "data.tftensor: "),
        ({"meta": {"tags": {"taskId": 100.9}}, "strData": ""}, r"is the number 100\.9"),
        ({"meta": {"tags": {"taskId": [1]}}, "strData": ""}, "is a list"),
    ],
)
def test_what_cannot_be_served_is_a_bad_request(json: Any, match: Any) -> None:
    with pytest.raises(BadRequest, match=match):
        decode(json)


def test_custom_data_is_not_served() -> None:
    with pytest.raises(BadRequest, match="customData is not served; expected data"):
        seldon.decode_request(field(7, field(1, b"type.googleapis.com/x")))


def test_one_long_string_does_not_widen_the_others() -> None:
    strings = ["x" * 1_000_000] + ["y"] * 5_000  # as a numpy str array: 20 GB
    request = decode({"data": {"ndarray": strings}})
    assert request.payload.shape == (5_001,)


@pytest.mark.parametrize("depth", [10, 30, 45, 60, 1_000, 100_000])
def test_deep_nesting_is_read_or_refused(depth: Any) -> None:
    body = b""
    for _ in range(min(depth, 2_000)):
        body = field(1, field(6, body))
    for wrapped in (field(3, field(3, body)), field(6, field(6, body))):
        try:
            seldon.decode_request(wrapped)
        except BadRequest:
            assert depth > 10 or wrapped[0] == 0x1A


def test_deep_answers_are_a_type_error_and_others_can_be_read() -> None:
    deep: Any = 1.0
    for _ in range(30):
        deep = {"a": deep}
    assert seldon.decode_response(answer(deep).SerializeToString()).payload == deep
    with pytest.raises(TypeError, match="nested deeper"):
        answer({"a": deep})
    for wrong in ({"a": object()}, {"a": 10**400}, 1j, np.array([1j])):
        with pytest.raises(TypeError):
            answer(wrong)


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        (Form.TENSOR, "tensor"),
        (Form.NDARRAY, "ndarray"),
        (Form.TFTENSOR, "tftensor"),
        (Form.BYTES, "tensor"),
        (Form.TEXT, "tensor"),
        (Form.JSON, "tensor"),
    ],
)
@pytest.mark.parametrize(
    "payload",
    [MATRIX, {"y": MATRIX}, MATRIX.tolist(), list(MATRIX), MATRIX.astype(">f8"), MATRIX[::-1][::-1]],
    ids=["array", "mapping", "lists", "arrays", "big-endian", "strided"],
)
def test_numbers_take_the_form_of_their_request(payload: Any, asked: Any, got: Any) -> None:
    message = answer(payload, asked, names=("a", "b", "c"))
    assert message.data.WhichOneof("data_oneof") == got
    assert list(message.data.names) == ["a", "b", "c"]
    assert not message.HasField("status")
    decoded: Any = seldon.decode_response(message.SerializeToString())
    assert decoded.payload.tolist() == MATRIX.tolist()
    assert decoded.names == ("a", "b", "c")
    if got == "ndarray":
        assert json_format.MessageToDict(message.data.ndarray) == MATRIX.tolist()


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, np.float16, ml_dtypes.bfloat16])
def test_integers_and_narrow_floats_become_doubles(dtype: Any) -> None:
    array = np.array([[1, 2], [3, 100]], dtype)
    assert list(answer(array).data.tensor.values) == [1, 2, 3, 100]
    assert json_format.MessageToDict(answer(array, Form.NDARRAY).data.ndarray) == [[1, 2], [3, 100]]
    decoded: Any = seldon.decode_response(answer(array, Form.TFTENSOR).SerializeToString()).payload
    assert decoded.dtype == array.dtype


BIG = 2**53 + 1


@pytest.mark.parametrize(
    "payload",
    [
        np.array([[1, BIG]]),
        np.array([-BIG]),
        np.array([BIG], np.uint64),
        np.array([2**63 - 1]),
        np.array([2**64 - 1], np.uint64),
        {"ids": np.array([BIG])},
        {"ids": np.array([BIG]), "scores": np.ones(1)},
        {"ids": [BIG]},
        {"id": np.int64(BIG)},
        [BIG, 0.5],
        [{"id": BIG}],
        np.uint64(BIG),
        BIG,
    ],
    ids=repr,
)
@pytest.mark.parametrize("form", [Form.TENSOR, Form.NDARRAY, Form.JSON])
def test_an_integer_that_no_double_holds_is_refused(payload: Any, form: Any) -> None:
    with pytest.raises(BadRequest, match=r"the answer holds the integer -?\d+: Seldon's numbers are doubles"):
        answer(payload, form)


def test_integers_that_a_double_holds_go_out_as_they_are_and_tftensors_hold_them_all() -> None:
    for number in (2**53, -(2**53), 2**53 + 2, 2**62, -(2**63)):
        for form in (Form.TENSOR, Form.NDARRAY):
            decoded: Any = seldon.decode_response(answer(np.array([number]), form).SerializeToString()).payload
            assert decoded.tolist() == [number]
        assert answer({"id": number}).jsonData.struct_value.fields["id"].number_value == number
    assert list(answer(np.array([BIG]), Form.TFTENSOR).data.tftensor.int64_val) == [BIG]
    with pytest.raises(BadRequest, match=f"the integer {BIG}"):
        answer(MATRIX, tags={"id": BIG})


def test_bytes_that_are_not_text_are_refused_where_text_is_sent() -> None:
    for payload in (np.array([b"\xff"], object), {"a": b"\xff"}, [{"a": b"\xff"}], {"a": np.array([b"\xff"], object)}):
        with pytest.raises(BadRequest, match=r"bytes that are not UTF-8 \(invalid start byte at 0\)"):
            answer(payload)


@pytest.mark.parametrize(
    ("payload", "json"),
    [
        ([True, 3], [True, 3.0]),
        ([1, "a"], [1.0, "a"]),
        ([np.True_, np.int64(3)], [True, 3.0]),
        ([[True], [0.5]], [[True], [0.5]]),
    ],
)
@pytest.mark.parametrize("form", [Form.TENSOR, Form.NDARRAY, Form.TFTENSOR])
def test_values_of_several_kinds_stay_what_they_are(payload: Any, json: Any, form: Any) -> None:
    assert repr(json_format.MessageToDict(answer(payload, form).data.ndarray)) == repr(json)


@pytest.mark.parametrize(
    ("payload", "kind", "json"),
    [
        (b"\x00\xff", "binData", None),
        (bytearray(b"x"), "binData", None),
        ("text", "strData", None),
        ({"label": "cat", "scores": [1, 2]}, "jsonData", {"label": "cat", "scores": [1, 2]}),
        ({"a": np.ones(2), "b": np.array([b"x"], object)}, "jsonData", {"a": [1, 1], "b": ["x"]}),
        ({"score": np.float32(0.5)}, "jsonData", {"score": 0.5}),
        ({}, "jsonData", {}),
        (None, "jsonData", None),
        (0.5, "jsonData", 0.5),
        (np.int64(3), "jsonData", 3),
        (np.array([True, False]), "ndarray", [True, False]),
        (np.array([["a"], ["b"]]), "ndarray", [["a"], ["b"]]),
        (np.array([b"a"], object), "ndarray", ["a"]),
        (["cat", "dog"], "ndarray", ["cat", "dog"]),
        ([{"label": "cat"}], "ndarray", [{"label": "cat"}]),
        ([[1], [2, 3]], "ndarray", [[1], [2, 3]]),
        (np.array(True), "ndarray", [True]),
    ],
)
@pytest.mark.parametrize("form", [Form.TENSOR, Form.TFTENSOR, Form.JSON])
def test_everything_else_has_one_form(payload: Any, kind: Any, json: Any, form: Any) -> None:
    message = answer(payload, form)
    if kind == "ndarray":
        assert json_format.MessageToDict(message.data.ndarray) == json
    elif kind == "jsonData":
        assert json_format.MessageToDict(message.jsonData) == json
    else:
        assert getattr(message, kind) == payload


def test_puid_and_tags_come_back() -> None:
    request = Request(payload=b"", form=Form.BYTES, tags={"taskId": 100.0, "trace": {"a": [1]}}, id="p")
    body = seldon.encode_response(Response(payload=MATRIX, tags={"trace": "new", "took": np.float32(2)}), request)
    meta = messages.SeldonMessage.FromString(body).meta
    assert meta.puid == "p"
    assert {name: json_format.MessageToDict(tag) for name, tag in meta.tags.items()} == {
        "taskId": 100,
        "trace": "new",
        "took": 2,
    }
    decoded: Any = seldon.decode_response(body)
    assert (decoded.id, decoded.tags["trace"]) == ("p", "new")


@pytest.mark.parametrize(
    ("payload", "form"),
    [
        (MATRIX, Form.TENSOR),
        (MATRIX, Form.NDARRAY),
        (np.array([[b"a"], [b"b"]], object), Form.NDARRAY),
        (np.array([True, False]), Form.NDARRAY),
        (np.array([[1], [2]], np.int32), Form.TFTENSOR),
        (np.array([b"a"], object), Form.TFTENSOR),
        (np.array([True]), Form.TFTENSOR),
        (b"\x00", Form.BYTES),
        ("€", Form.TEXT),
        ([1, {"a": None}], Form.JSON),
        (np.zeros((0, 3)), Form.TENSOR),
        (np.array(2.5), Form.TENSOR),
    ],
)
def test_what_clients_send_is_what_nodes_read(payload: Any, form: Any) -> None:
    decoded = round_trip(payload, form)
    assert decoded.form is form
    if isinstance(payload, np.ndarray):
        assert (decoded.payload.shape, decoded.payload.dtype) == (payload.shape, payload.dtype)
        assert decoded.payload.tolist() == payload.tolist()
    else:
        assert decoded.payload == payload


def test_clients_name_their_task() -> None:
    for model in (100, "textcnn-69"):
        request = Request(payload="x", form=Form.TEXT, model=model, tags={"a": 1.0}, id="p", names=("n",))
        decoded: Any = seldon.decode_request(seldon.encode_request(request))
        assert (decoded.model, decoded.tags, decoded.id) == (model, {"a": 1.0, "taskId": model}, "p")


@pytest.mark.parametrize(
    ("payload", "form"),
    [
        ({"x": MATRIX}, Form.TENSORS),
        ("text", Form.BYTES),
        (b"bytes", Form.TEXT),
        (np.array([b"a"], object), Form.TENSOR),
        ({"a": 1}, Form.NDARRAY),
    ],
)
def test_what_a_form_cannot_hold_is_a_type_error(payload: Any, form: Any) -> None:
    with pytest.raises(TypeError):
        seldon.encode_request(Request(payload=payload, form=form))


@pytest.mark.parametrize("form", [Form.TENSOR, Form.NDARRAY, Form.TFTENSOR])
def test_not_a_number_passes(form: Any) -> None:
    array = np.array([[math.nan, math.inf, -math.inf]])
    assert np.array_equal(round_trip(array, form).payload, array, equal_nan=True)
    decoded = round_trip({"a": math.nan}, Form.JSON).payload
    assert math.isnan(decoded["a"])


def test_a_failure_is_no_answer() -> None:
    failed = message({"status": {"code": 500, "info": "boom", "reason": "MICROSERVICE", "status": "FAILURE"}})
    with pytest.raises(NodeFailed, match="500: MICROSERVICE boom"):
        seldon.decode_response(failed)


NESTED = st.recursive(
    st.one_of(st.floats(allow_nan=False), st.booleans(), st.text(max_size=9), st.none()),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(NESTED, max_size=4))
def test_the_short_way_for_numbers_only_takes_what_is_one(nested: Any) -> None:
    values = json_format.ParseDict(nested, messages.Value()).list_value
    numbers = ndarrays.read_numbers(np.frombuffer(values.SerializeToString(), np.uint8)) if nested else None
    if numbers is not None:
        assert numbers.tolist() == nested
        leaves = nested
        while isinstance(leaves[0], list):
            leaves = [leaf for inner in leaves for leaf in inner]
        assert {type(leaf) for leaf in leaves} == {float}


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float64, hnp.array_shapes(max_dims=4, min_side=0, max_side=20)))
def test_the_short_way_for_numbers_is_the_way_of_protobuf(array: Any) -> None:
    body = ndarrays.write_numbers(array)
    expected = messages.Value()
    seldon._from_json(array.tolist(), expected)
    assert body == expected.list_value.SerializeToString()
    if array.size:
        numbers = ndarrays.read_numbers(np.frombuffer(body, np.uint8))
        assert numbers is not None
        assert numbers.tobytes() == array.tobytes()


def test_a_list_of_objects_in_an_answer_is_read_as_json():
    request = Request(payload={}, form=Form.JSON)
    body = seldon.encode_response(Response(payload=[{"label": "cat"}, {"label": "dog"}]), request)
    assert seldon.decode_response(body).payload == [{"label": "cat"}, {"label": "dog"}]
