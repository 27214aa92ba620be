"""What a plugin is given, without the real thing: nodes, models, a backend."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Backend, Model, Signature, TensorSpec
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Tensor
from dl_inference_core.testing.memory import MemoryExchange

EXCHANGE = MemoryExchange("/inference.GRPCInferenceService/ModelInfer")
"""An exchange for balancers, where nothing depends on which."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class FakeNode:
    """A node for balancers; its fields may be set at will."""

    address: str = "127.0.0.1:8500"
    weight: int = 1
    in_flight: int = 0


class FakeModel(Model):
    """Gives back each numeric input times `factor`, under the same name and dtype; strings as they came.

    Attributes:
        calls: what it was called with, in order.
        closed: whether `close` was called.
        device: the device that it was loaded for.
    """

    def __init__(
        self,
        factor: float = 1,
        signature: Signature | None = None,
        *,
        sleep_s: float = 0.0,
        fail: str = "",
        device: str = "cpu",
    ) -> None:
        """Args:
        factor: a whole number keeps integer tensors exact.
        signature: by default the model does not say what it takes.
        sleep_s: seconds that each call takes, holding its thread.
        fail: the message of the RuntimeError that each call raises; "" is none.
        """
        self.factor = factor
        self.signature = signature or Signature()
        self.sleep_s = sleep_s
        self.fail = fail
        self.device = device
        self.calls: list[dict[str, Any]] = []
        self.closed = False

    @property
    def native(self) -> FakeModel:
        return self

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        self.calls.append(dict(inputs))
        names = {spec.name for spec in self.signature.inputs}
        if names and (unknown := sorted(inputs.keys() - names)):
            raise BadRequest(f'the model has no input "{unknown[0]}"; it takes {", ".join(sorted(names))}')
        if self.sleep_s:
            time.sleep(self.sleep_s)
        if self.fail:
            raise RuntimeError(self.fail)
        return {
            name: value.copy() if value.dtype.kind == "O" else (value * self.factor).astype(value.dtype)
            for name, value in inputs.items()
        }

    def to_native(self, value: Any) -> Any:
        return value

    def to_numpy(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        self.closed = True


class FakeBackend(Backend):
    """A backend without a framework, for tests of what loads and runs models.

    Its models are folders with a `fake.json`::

        {"factor": 2, "inputs": {"x": ["float32", [null, 3]]}, "sleep_s": 0.01, "fail": "…", "fail_load": "…"}

    Every key may be left out; but for `fail_load`, the message of a ModelError at load, they are `FakeModel`'s
    arguments.

    Attributes:
        models: what it has loaded, in order.
    """

    name = "fake"

    class ModelOptions(PluginOptions):
        """Attributes:
        factor: takes precedence over the file's.
        """

        factor: float | None = None

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options or self.Options())
        self.models: list[FakeModel] = []

    @classmethod
    def recognises(cls, directory: Path) -> bool:
        return (directory / "fake.json").is_file()

    def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
        assert isinstance(options, FakeBackend.ModelOptions)
        file = directory / "fake.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            specs = tuple(
                TensorSpec(name=name, dtype=np.dtype(dtype), shape=tuple(shape) if shape is not None else None)
                for name, (dtype, shape) in content.pop("inputs", {}).items()
            )
            failure = content.pop("fail_load", "")
            model = FakeModel(
                **({"factor": 1} | content | options.model_dump(exclude_none=True)),
                signature=Signature(inputs=specs, outputs=specs),
                device=device,
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{file}: {error}") from error
        if failure:
            raise ModelError(f"{file}: {failure}")
        self.models.append(model)
        return model

    @staticmethod
    def write(directory: Path, **content: Any) -> Path:
        """Makes `directory` a model with that `fake.json`, which no reader ever sees half written."""
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / "fake.json.part"
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(directory / "fake.json")
        return directory
