"""A backend that is made when the first model needs it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, get_origin, get_type_hints

import pytest

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Backend, Model, on_demand


class Real(Backend):
    class Options(PluginOptions):
        pass

    class ModelOptions(PluginOptions):
        pass

    name = "real"
    refuses_shapes = True
    loads: ClassVar[list[Path]] = []

    @classmethod
    def recognises(cls, directory: Path) -> bool:
        return directory.name == "1"

    def load(self, directory: Path, options: PluginOptions, device: str) -> Model:
        self.loads.append(directory)
        raise ModelError("loaded by the real one")


def test_it_has_every_class_attribute_of_the_one_that_it_stands_for() -> None:
    standing = on_demand(Real, lambda: Real(PluginOptions()))
    names = [name for name, hint in get_type_hints(Backend).items() if get_origin(hint) is ClassVar]
    assert {"name", "Options", "ModelOptions", "refuses_shapes"} <= set(names)
    for name in names:
        assert getattr(standing, name) is getattr(Real, name), name
    assert standing.recognises(Path("m/1"))
    assert not standing.recognises(Path("m/2"))


def test_it_is_made_once_and_a_failed_attempt_is_tried_again() -> None:
    made: list[Real] = []
    errors = [ModelError("its library is missing")]

    def make() -> Real:
        if errors:
            raise errors.pop()
        made.append(Real(PluginOptions()))
        return made[-1]

    standing = on_demand(Real, make)
    with pytest.raises(ModelError, match="its library is missing"):
        standing.load(Path("1"), PluginOptions(), "cpu")
    for _ in range(2):
        with pytest.raises(ModelError, match="loaded by the real one"):
            standing.load(Path("1"), PluginOptions(), "cpu")
    assert len(made) == 1
    assert Real.loads == [Path("1")] * 2
