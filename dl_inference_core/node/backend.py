"""What runs a model: the interface of backends, and the signature that says what a model takes and gives."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Method, Tensor, Tensors

ANY = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: its name.
        dtype: its numpy dtype; None where the model does not say.
        shape: its sizes, None for a free one; None in place of the tuple where even the rank is unknown.
        native_name: what the framework calls it, where that is another name.
    """

    name: str
    dtype: np.dtype[Any] | None = ANY
    shape: tuple[int | None, ...] | None = ANY
    native_name: str = ""

    def __str__(self) -> str:
        dtype = "any dtype" if self.dtype is None else self.dtype.name
        shape = (
            "any shape" if self.shape is None else f"[{', '.join('?' if n is None else str(n) for n in self.shape)}]"
        )
        return f'"{self.name}" ({dtype}, {shape})'


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        inputs: none means that the model does not say, and anything passes; or, if it is `exact`, that it takes none.
        method: a `tensors.Method`'s value, or a framework's own word.
    """

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    method: str = Method.PREDICT.value
    exact: bool = False

    def bind(self, tensors: Tensors, *, cast: bool = False) -> dict[str, Tensor]:
        """`tensors` checked against the inputs. With `cast`, numbers are converted where no value changes kind:
        any number to a floating-point dtype, whole numbers to an integer one; what is empty is of any dtype.

        Raises:
            BadRequest: a name, dtype or shape that does not fit; names what was expected.
        """
        if not self.inputs and not self.exact:
            return dict(tensors)
        if len(tensors) != len(self.inputs) or any(spec.name not in tensors for spec in self.inputs):
            given = ", ".join(f'"{name}"' for name in sorted(tensors)) or "none"
            expected = f"the inputs {', '.join(map(str, self.inputs))}" if self.inputs else "no inputs"
            raise BadRequest(f"input size does not match signature: expected {expected}; got {given}")
        return {spec.name: _fit(spec, tensors[spec.name], cast) for spec in self.inputs}

    def bind_one(self, tensor: Tensor, *, cast: bool) -> dict[str, Tensor]:
        """A tensor without a name, as the model's only input.

        Raises:
            BadRequest: as `bind`; or the model has several inputs.
        """
        if not self.inputs and not self.exact:
            return {"input": tensor}
        if len(self.inputs) != 1:
            raise BadRequest(
                f"the model has {len(self.inputs)} inputs, {', '.join(map(str, self.inputs)) or 'none'}: "
                "one tensor without a name cannot stand for them"
            )
        return self.bind({self.inputs[0].name: tensor}, cast=cast)


def _fit(spec: TensorSpec, tensor: Tensor, cast: bool) -> Tensor:
    if spec.dtype is not None and tensor.dtype != spec.dtype:
        if not cast or (tensor.size and (tensor.dtype.kind not in "biuf" or spec.dtype.kind == "O")):
            raise BadRequest(f"input {spec} does not take dtype {tensor.dtype.name}")
        tensor = _convert(tensor, spec, spec.dtype)
    shape = spec.shape
    # Nearly always the rows alone are free.
    if shape is None or (tensor.ndim and shape[:1] == (None,) and shape[1:] == tensor.shape[1:]):
        return tensor
    if len(shape) != tensor.ndim or any(
        size not in (None, given) for size, given in zip(shape, tensor.shape, strict=True)
    ):
        raise BadRequest(f"input {spec} does not take shape {list(tensor.shape)}")
    return tensor


def _convert(tensor: Tensor, spec: TensorSpec, dtype: np.dtype[Any]) -> Tensor:
    """`tensor`, of numbers or empty, as `dtype`, by which floats may lose digits.

    Raises:
        BadRequest: a value would change more than that.
    """
    with np.errstate(all="ignore"):
        converted = tensor.astype(dtype)
    if not tensor.size:
        return converted
    if dtype.kind in "biu":
        kept = converted == tensor
    else:
        kept = np.isfinite(converted) == np.isfinite(tensor)
        if tensor.dtype.kind in "iu" and dtype.itemsize >= 4:
            most = 2 ** (np.finfo(dtype).nmant + 1)
            kept &= (tensor <= most) & (tensor >= -most)
    if not kept.all():
        raise BadRequest(f"input {spec} does not take the value {tensor[~kept][0]}")
    return converted


class Model(ABC):
    """One loaded version of a model.

    Every method runs on one of the version's own threads (`threads` in its `model.toml`, one by default), and every one
    but `close` inside `session()`; `close` runs after the last call has ended.
    """

    signature: Signature = Signature()
    """The default one."""

    @property
    def signatures(self) -> Mapping[str, Signature]:
        """Every signature by its name."""
        return {DEFAULT_SIGNATURE: self.signature}

    @property
    @abstractmethod
    def native(self) -> Any:
        """The framework's own callable, for handlers that go around `__call__`: an `nn.Module`, say."""

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        """Run on named inputs (numpy arrays or the framework's tensors), which are known to fit the signature if they
        came through `Signature.bind`. Returns every output by name, as numpy arrays.

        Args:
            signature: one of `signatures`.

        Raises:
            BadRequest: the framework says that it is the inputs' fault.
            Exception: whatever the framework raises; the client sees INTERNAL with a request id.
        """

    @abstractmethod
    def to_native(self, value: Any) -> Any:
        """`value` with each numpy array in it, in dicts, lists and tuples too, as the framework's tensor on the model's
        device."""

    @abstractmethod
    def to_numpy(self, value: Any) -> Any:
        """The reverse of `to_native`."""

    def join(self, parts: Sequence[Any]) -> Any:
        """Arrays, or the framework's tensors, one after the other along their first dimension."""
        return np.concatenate(parts)

    def session(self) -> AbstractContextManager[Any]:
        """Entered around each request's preprocess, run_model and postprocess: inference mode, current device."""
        return nullcontext()

    def close(self) -> None:
        """Release what garbage collection would not."""


class Backend(ABC):
    """A framework that loads models. One object per process, made with what `[backends.NAME]` says in the config.

    `Options` are that table; `ModelOptions` are the table `[options]` of a model's own `model.toml`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[PluginOptions]] = PluginOptions
    ModelOptions: ClassVar[type[PluginOptions]] = PluginOptions

    def __init__(self, options: PluginOptions) -> None:
        self.options = options
        self.cores = 0
        """This process's share of the cores, where several processes serve the same: what a backend whose options do
        not say otherwise has work at once on one operation; 0 is all. Set before the first `load`."""

    @staticmethod
    def imported() -> None:
        """Call it once the framework is imported, before its first model is loaded: what is there by then stays, and no
        garbage collection looks at it again. With TensorFlow's objects a full one takes 0.3 s, in which nothing is
        answered."""
        gc.collect()
        gc.freeze()

    @classmethod
    @abstractmethod
    def recognises(cls, directory: Path) -> bool:
        """Whether `directory` holds a model of this backend, by file names alone. Must not import the framework."""

    @abstractmethod
    def load(self, directory: Path, options: PluginOptions, device: str) -> Model:
        """Load the version in `directory`. Runs on one of the threads that will run it; may take long.

        Args:
            directory: the version's folder.
            options: a `ModelOptions`.
            device: "cpu", "auto", or a name of the framework's own ("cuda", "cuda:1").

        Raises:
            ModelError: what is wrong with the model, and what would help.
        """
