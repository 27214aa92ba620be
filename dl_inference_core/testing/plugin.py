"""What plugins of every kind must keep, and how their suites compare."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import ValidationError

from dl_inference_core.config import PluginOptions


class PluginConformance:
    """What holds for the classes of every kind."""

    options: ClassVar[Mapping[str, Any]] = {}
    """What the config says to it."""

    @staticmethod
    def _check_class(cls: type[Any], interface: type[Any], plain: Sequence[str]) -> None:
        assert issubclass(cls, interface)
        assert not inspect.isabstract(cls), f"abstract: {sorted(cls.__abstractmethods__)}"
        name = vars(cls).get("name")
        assert isinstance(name, str), "expected a `name` of the class's own: an inherited name is another class's"
        assert name, "a class without a name cannot be named in a config"
        for method in plain:
            assert not inspect.iscoroutinefunction(getattr(cls, method)), f"{method} must be a plain function"

    @staticmethod
    def _check_options(model: type[PluginOptions], values: Mapping[str, Any]) -> None:
        assert issubclass(model, PluginOptions)
        model(**values)
        with pytest.raises(ValidationError, match="no_such_option"):
            model.model_validate({**values, "no_such_option": 1})


def assert_equal(given: Any, expected: Any, tolerance: float) -> None:
    """Payloads, or tensors: the same kinds, names, shapes and values, floating point within `tolerance`."""
    if isinstance(expected, np.ndarray):
        assert isinstance(given, np.ndarray)
        assert given.shape == expected.shape
        if expected.dtype.kind in "fcV":
            np.testing.assert_allclose(
                given.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance
            )
        else:
            np.testing.assert_array_equal(given, expected)
    elif isinstance(expected, Mapping):
        assert isinstance(given, Mapping)
        assert given.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(given[name], value, tolerance)
    elif isinstance(expected, list | tuple):
        assert isinstance(given, list | tuple)
        assert len(given) == len(expected)
        for one, other in zip(given, expected, strict=True):
            assert_equal(one, other, tolerance)
    elif isinstance(expected, float):
        assert given == pytest.approx(expected, rel=tolerance, abs=tolerance)
    else:
        assert type(given) is type(expected)
        assert given == expected
