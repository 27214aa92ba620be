"""Samples that a model is tried with: read from its folder, or made from its signature."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Signature, TensorSpec
from dl_inference_core.node.samples import FREE_SIZE, of_rows, read_samples, rows_of, samples


def spec(name: str, dtype: str | None, *shape: int | None) -> TensorSpec:
    return TensorSpec(name=name, dtype=None if dtype is None else np.dtype(dtype), shape=shape)


def made(*specs: TensorSpec, rows: int = 3, seed: int = 0):
    return samples(Signature(inputs=specs), rows, np.random.default_rng(seed))


def test_samples_fit_the_signature_that_they_are_made_from():
    specs = [
        spec(kind, kind, None, 4, None) for kind in ("float32", "float16", "bfloat16", "complex64", "int8", "bool")
    ]
    signature = Signature(inputs=(*specs, spec("fixed", "float64", 5), spec("scalar", "int64")))
    for rows in (0, 1, 3):
        inputs = samples(signature, rows, np.random.default_rng(0))
        assert inputs is not None
        signature.bind(inputs)
        assert inputs["float32"].shape == (rows, 4, FREE_SIZE)
        assert inputs["fixed"].shape == (5,)
        assert inputs["scalar"].shape == ()


def test_floats_are_normal_and_whole_numbers_are_0_and_1():
    inputs = made(spec("x", "float32", None, 1000), spec("i", "uint16", None, 1000), spec("b", "bfloat16", None, 1000))
    assert inputs is not None
    assert abs(inputs["x"].mean()) < 0.1
    assert abs(inputs["x"].std() - 1) < 0.1
    assert abs(inputs["b"].astype(np.float32).std() - 1) < 0.1
    assert set(inputs["i"].ravel().tolist()) == {0, 1}


def test_a_seed_gives_the_same_samples_each_time():
    x = spec("x", "float32", None, 4)
    np.testing.assert_equal(made(x), made(x))
    assert not np.array_equal(made(x)["x"], made(x, seed=1)["x"])


def test_an_optional_input_for_which_none_can_be_made_is_left_out():
    x, text = spec("x", "float32", None, 2), replace(spec("text", "object"), optional=True)
    inputs = made(x, text, replace(spec("scale", "float32"), optional=True))
    assert inputs is not None
    assert list(inputs) == ["x", "scale"]
    assert made(text) is None


@pytest.mark.parametrize(
    "unknown",
    [
        spec("x", None, 3),
        TensorSpec(name="x", dtype=np.dtype("float32")),
        spec("x", "object", None),
        spec("x", "M8[s]"),
    ],
)
def test_a_signature_that_does_not_say_enough_gives_none(unknown):
    assert made(spec("y", "float32", None), unknown) is None
    assert made() is None


def test_samples_are_read_from_the_folder(tmp_path):
    assert read_samples(tmp_path) == []
    x = np.arange(6, dtype=ml_dtypes.bfloat16).astype(np.float32).reshape(2, 3)
    np.savez(tmp_path / "sample.npz", x=x, words=np.array(["a", "ö"]))
    np.savez(tmp_path / "warm_up.npz", x=x + 1)
    first, second = read_samples(tmp_path)
    np.testing.assert_array_equal(first["x"], x + 1)
    np.testing.assert_array_equal(second["x"], x)
    assert second["words"].tolist() == [b"a", "ö".encode()]


def test_a_sample_that_cannot_be_read_is_a_model_error_that_names_it(tmp_path):
    path = tmp_path / "sample.npz"
    np.savez(path, x=np.ones(3))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:50], b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"sample\.npz cannot be read"):
            read_samples(tmp_path)
    np.savez(path, x=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ModelError, match=r"sample\.npz cannot be read"):
        read_samples(tmp_path)
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ModelError, match=r"sample\.npz cannot be read"):
        read_samples(tmp_path)
    for arrays in ({}, {"x": np.ones((0, 3))}):
        np.savez(path, **arrays)
        with pytest.raises(ModelError, match="holds no rows"):
            read_samples(tmp_path)


def test_rows_are_repeated_and_left_out_but_not_where_the_size_is_fixed():
    signature = Signature(inputs=(spec("x", "int64", None), spec("fixed", "int64", 2), spec("scalar", "int64")))
    sample = {"x": np.array([1, 2]), "fixed": np.array([3, 4]), "scalar": np.array(5)}
    five = of_rows(sample, 5, signature)
    assert {name: array.tolist() for name, array in five.items()} == {
        "x": [1, 2, 1, 2, 1],
        "fixed": [3, 4],
        "scalar": 5,
    }
    assert of_rows(sample, 1, signature)["x"].tolist() == [1]
    assert of_rows(sample, 0, Signature())["fixed"].tolist() == []
    assert (rows_of(sample), rows_of(five), rows_of({"scalar": np.array(5)})) == (2, 5, 1)
