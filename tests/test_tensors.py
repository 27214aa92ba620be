"""Python's and JSON's own values as tensors: no value changes, whatever stands beside it."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dl_inference_core.tensors import Form, Misfit, Request, Response, as_json, as_tensor, as_tensors, from_json
from dl_inference_core.wire import messages, openinference, tfserving

BIG = 2**53 + 1


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (True, np.bool_),
        (3, np.int64),
        (0.5, np.float64),
        ([True, False], np.bool_),
        ([1, -(2**63)], np.int64),
        ([0, 2**64 - 1], np.uint64),
        ([BIG], np.int64),
        ([1, 0.5], np.float64),
        ([2**53, 0.5], np.float64),
        ([[1.5], [2]], np.float64),
        (((1, 2), [3, 4]), np.int64),
        ([], np.float64),
        ([[], []], np.float64),
        (np.float32(0.5), np.float32),
        ([np.float32(0.5), np.float32(1)], np.float32),
        ([np.int32(1), np.int32(2)], np.int32),
        ([np.array([1, 2], np.uint8), np.array([3, 4], np.uint8)], np.uint8),
        ([np.array([1, 2], np.uint8), [3, 4]], np.int64),
        ([np.True_, True], np.bool_),
        ([np.int64(3), 0.5], np.float64),
    ],
)
def test_a_value_becomes_a_tensor_of_the_dtype_that_holds_it(value: Any, dtype: Any) -> None:
    tensor = as_tensor(value)
    assert tensor.dtype == dtype
    assert tensor.tolist() == as_json(value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([True, 3], "got a boolean, a number"),
        ([[True], [0.5]], "got a boolean, a number"),
        ([True, "a"], "got a boolean, a string"),
        ([1, "a"], "got a number, a string"),
        ([1, None], "got a number, null"),
        ([BIG, 0.5], "an integer that no float64 holds"),
        ([2**63, -1], "out of the range of 64 bits"),
        ([2**64], "out of the range of 64 bits"),
        ([[1, 2], [3]], "differ in length or depth"),
        ([[1], 2], "differ in length or depth"),
        ([np.True_, np.int64(3)], "got a boolean, a number"),
        ([np.int64(BIG), np.float64(0.5)], "an integer that no float64 holds"),
        ([np.array([BIG]), np.array([0.5])], "an integer that no float64 holds"),
        ([np.uint64(2**64 - 1), np.int64(-1)], "an integer that no float64 holds"),
        ([np.array([1, 2]), np.array([1])], "no tensor can hold this value"),
        ({"a": 1}, "no tensor can hold a value of type dict"),
        (None, "no tensor can hold a value of type NoneType"),
    ],
)
def test_what_no_tensor_holds_unchanged_is_a_type_error(value: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        as_tensor(value)
    with pytest.raises(TypeError, match=said):
        as_tensors({"y": value})


@pytest.mark.parametrize("convert", [as_tensors, as_json, lambda value: as_json([{"deep": value}])])
def test_values_of_one_name_are_a_type_error(convert: Any) -> None:
    with pytest.raises(TypeError, match=r"two values would have the same name; .* got 0, '0', 1"):
        convert({0: np.ones(1), "0": np.zeros(1), 1: 2})


@pytest.mark.parametrize("value", [[True, 3], [BIG, 0.5], [2**63, -1]], ids=repr)
@pytest.mark.parametrize("codec", [tfserving, openinference])
def test_typed_protocols_refuse_what_no_tensor_holds_unchanged(codec: Any, value: Any) -> None:
    with pytest.raises(TypeError):
        codec.encode_response(Response(payload={"y": value}), Request(payload={}, form=Form.TENSORS))


def test_typed_protocols_send_every_bit_of_integers() -> None:
    request = Request(payload={}, form=Form.TENSORS)
    answer = tfserving.encode_response(Response(payload={"y": [BIG, 2**63 - 1]}), request)
    assert list(messages.PredictResponse.FromString(answer).outputs["y"].int64_val) == [BIG, 2**63 - 1]
    decoded: Any = openinference.decode_response(openinference.encode_response(Response(payload={"y": [BIG]}), request))
    assert decoded.payload["y"].tolist() == [BIG]


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        ([1, 0.5], np.float32, [1.0, 0.5]),
        ([2**24 + 1], np.float32, [2.0**24]),
        ([BIG, 0.5], np.float64, [2.0**53, 0.5]),
        ([2**70], np.float64, [2.0**70]),
        ([1e39, -1e39], np.float32, [math.inf, -math.inf]),
        ([10**300], np.float32, [math.inf]),
        ([70000], np.float16, [math.inf]),
        ([257], ml_dtypes.bfloat16, [256.0]),
        ([-128, 127], np.int8, [-128, 127]),
        ([2**64 - 1], np.uint64, [2**64 - 1]),
        ([[True], [False]], np.bool_, [[True], [False]]),
        (["ä", b"\xff"], object, ["ä".encode(), b"\xff"]),
        ([], np.int8, []),
        ([[], []], object, [[], []]),
        (7, np.int32, 7),
    ],
)
def test_json_takes_a_dtype_as_by_tensorflow_serving(value: Any, dtype: Any, expected: Any) -> None:
    tensor = from_json(value, np.dtype(dtype))
    assert (tensor.dtype, tensor.tolist()) == (np.dtype(dtype), expected)


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        ([True], np.float32, "JSON Value: true Type: True is not of expected type: float"),
        ([1, "1"], np.float64, 'JSON Value: "1" Type: String is not of expected type: double'),
        ([None], np.float16, "JSON Value: null Type: Null is not of expected type: half"),
        ([1.0], np.int32, "JSON Value: 1.0 Type: Number is not of expected type: int32"),
        ([False], np.int32, "JSON Value: false Type: False is not of expected type: int32"),
        ([127, 128], np.int8, "JSON Value: 128 Type: Number is not of expected type: int8"),
        ([-1], np.uint64, "JSON Value: -1 Type: Number is not of expected type: uint64"),
        ([1], np.bool_, "JSON Value: 1 Type: Number is not of expected type: bool"),
        ([1], object, "JSON Value: 1 Type: Number is not of expected type: string"),
        ([{"a": [b"\xff"]}], np.int64, "Type: Object is not of expected type: int64"),
        ([10**400], np.float32, "too big to be stored in double"),
        ([["x" * 5000]], np.int64, f'JSON Value: "{"x" * 255} Type: String'),
    ],
)
def test_json_of_another_kind_than_the_dtypes_is_a_type_error(value: Any, dtype: Any, said: str) -> None:
    with pytest.raises(TypeError) as caught:
        from_json(value, np.dtype(dtype))
    assert said in str(caught.value)


def test_a_dtype_for_numbers_is_for_numbers_alone() -> None:
    float32 = np.dtype(np.float32)
    assert from_json([1, 2**24 + 1], number_dtype=float32).dtype == np.float32
    assert from_json([], number_dtype=float32).dtype == np.float32
    assert from_json([True], number_dtype=float32).dtype == np.bool_
    assert from_json(["a"], number_dtype=float32).dtype == object
    assert from_json([1], np.dtype(np.int8), number_dtype=float32).dtype == np.int8


_MANY = 50_001
"""More values than one piece of a large list has, and no multiple of a piece."""


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        ([index / 8 for index in range(_MANY)], None, np.arange(_MANY) / 8),
        ([[index, index + 1] for index in range(_MANY)], None, np.arange(_MANY)[:, None] + np.array([0, 1])),
        ([*range(_MANY), 2**63], None, np.array([*range(_MANY), 2**63], np.uint64)),
        ([*range(_MANY), 0.5], None, np.array([*range(_MANY), 0.5])),
        ([[True, False] * _MANY], None, np.array([[True, False] * _MANY])),
        ([*range(_MANY), 1e300], np.dtype(np.float32), np.array([*range(_MANY), np.inf], np.float32)),
        ([index % 7 for index in range(_MANY)], np.dtype(np.int8), np.arange(_MANY) % 7),
    ],
    ids=["floats", "rows", "above int64", "mixed", "booleans", "float32", "int8"],
)
def test_a_large_json_list_is_the_tensor_that_a_small_one_would_be(value: Any, dtype: Any, expected: Any) -> None:
    made = from_json(value, dtype)
    assert made.dtype == (expected.dtype if dtype is None else dtype)
    np.testing.assert_array_equal(made, expected)


def test_the_misfit_of_a_large_json_list_is_found_at_its_row() -> None:
    rows = [[1, 2]] * _MANY + [[3, 300]] + [[4, 5]] * 3
    with pytest.raises(Misfit, match="not of expected type: int8") as error:
        from_json(rows, np.dtype(np.int8))
    assert error.value.row == _MANY
