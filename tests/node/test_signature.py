"""What a signature takes: names, optional inputs, dtypes and numbers without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dl_inference_core.errors import BadRequest
from dl_inference_core.node.backend import Signature, TensorSpec

X = np.ones((2, 3), np.float32)
MASK = np.ones((2, 3), np.bool_)
OPTIONAL = Signature(inputs=(TensorSpec(name="x"), TensorSpec(name="mask", optional=True)))


def test_an_optional_input_may_be_given_or_left_out() -> None:
    assert OPTIONAL.bind({"x": X}) == {"x": X}
    both = OPTIONAL.bind({"mask": MASK, "x": X})
    assert list(both) == ["x", "mask"]
    assert both["mask"] is MASK


def test_one_tensor_without_a_name_is_the_required_input() -> None:
    assert OPTIONAL.bind_one(X, cast=False)["x"] is X


A, B = TensorSpec(name="a"), TensorSpec(name="b")
MAYBE_A, MAYBE_B = TensorSpec(name="a", optional=True), TensorSpec(name="b", optional=True)


@pytest.mark.parametrize(
    ("inputs", "name", "in_order"),
    [
        ((), None, None),
        ((A,), "a", "a"),
        ((MAYBE_A,), "a", "a"),
        ((A, B), None, None),
        ((MAYBE_A, B), "b", "b"),
        ((MAYBE_A, MAYBE_B), None, "a"),
    ],
)
def test_the_input_for_which_a_tensor_without_a_name_stands(
    inputs: tuple[TensorSpec, ...], name: str | None, in_order: str | None
) -> None:
    for positional, expected in ((False, name), (True, in_order)):
        signature = Signature(inputs=inputs, positional=positional, exact=True)
        assert getattr(signature.unnamed, "name", None) == expected
        if expected is not None:
            assert signature.bind_one(X, cast=False) == {expected: X}
        else:
            with pytest.raises(BadRequest, match="one tensor without a name cannot stand for them"):
                signature.bind_one(X, cast=False)


def test_what_is_missing_and_what_is_too_much_is_said_in_tensorflow_servings_words() -> None:
    with pytest.raises(BadRequest, match=r"\. Sent extra: \{y,z\}\. Missing but required: \{x\}\.$"):
        OPTIONAL.bind({"z": X, "y": X, "mask": MASK})


def test_a_missing_required_input_and_an_unknown_name_are_refused() -> None:
    for tensors in ({"mask": MASK}, {"x": X, "other": X}, {"other": X}):
        with pytest.raises(BadRequest, match=r'expected the inputs "x" .*"mask" .*optional'):
            OPTIONAL.bind(tensors)


def test_numbers_without_a_dtype_become_the_assumed_one_and_typed_tensors_stay() -> None:
    signature = Signature(inputs=(TensorSpec(name="x", number_dtype=np.dtype(np.float32)),))
    assert signature.bind({"x": np.array([[1, 2]])}, cast=True)["x"].dtype == np.float32
    assert signature.bind({"x": np.array([[1, 2]])})["x"].dtype == np.int64


def test_an_optional_input_that_is_left_out_gets_its_default_in_the_signatures_order() -> None:
    default = np.array(2, np.float32)
    signature = Signature(
        inputs=(
            TensorSpec(name="factor", dtype=np.dtype(np.float32), shape=(), optional=True, default=default),
            TensorSpec(name="mask", optional=True),
            TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(None, 3)),
        )
    )
    bound = signature.bind({"x": X})
    assert list(bound) == ["factor", "x"]
    assert (bound["factor"] is default, bound["x"] is X) == (True, True)
    given = signature.bind({"x": X, "factor": np.array(5, np.float32)})
    assert list(given) == ["factor", "x"]
    assert given["factor"] == 5
    assert list(signature.bind_one(X, cast=True)) == ["factor", "x"]
    with pytest.raises(BadRequest, match=r'"factor" \(float32, \[\], optional\) does not take dtype int64'):
        signature.bind({"x": X, "factor": np.array(5)})


@pytest.mark.parametrize(
    ("shape", "fitting", "others"),
    [
        ((None, 3), [(1, 3), (0, 3)], [(3,), (), (1, 4), (1, 3, 1)]),
        ((), [()], [(1,)]),
        ((2, None), [(2, 5)], [(1, 5), (2,)]),
        (None, [(), (4,), (1, 2, 3)], []),
    ],
)
def test_shapes_are_checked_unless_they_are_left_to_the_model(shape: Any, fitting: Any, others: Any) -> None:
    spec = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=shape)
    checked, unchecked = Signature(inputs=(spec,)), Signature(inputs=(spec,), checks_shapes=False)
    for each in fitting:
        tensor = np.zeros(each, np.float32)
        assert checked.bind({"x": tensor})["x"] is tensor
        assert unchecked.fits_shapes({"x": tensor})
    for each in others:
        tensor = np.zeros(each, np.float32)
        with pytest.raises(BadRequest, match="does not take shape"):
            checked.bind({"x": tensor})
        assert unchecked.bind({"x": tensor})["x"] is tensor
        assert not unchecked.fits_shapes({"x": tensor})
        with pytest.raises(BadRequest, match="does not take dtype"):
            unchecked.bind({"x": np.zeros(each)})
