"""What runs a model: the interface of backends, and the signature that says what a model takes and gives."""

from __future__ import annotations

import gc
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
        optional: whether a request may leave this input out; the model then uses its own default value.
        default: the value of an optional input that is left out, read-only; None where only the model knows it.
        number_dtype: the dtype to which numbers without a dtype of their own (JSON, Seldon's lists) are converted where
            `dtype` is None; None leaves them as they were decoded.
    """

    name: str
    dtype: np.dtype[Any] | None = ANY
    shape: tuple[int | None, ...] | None = ANY
    native_name: str = ""
    optional: bool = False
    default: Tensor | None = field(default=None, repr=False, compare=False)
    number_dtype: np.dtype[Any] | None = None

    def takes_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape fits."""
        sizes = self.shape
        # Usually only the first size is free.
        if sizes is None or (shape and sizes[:1] == (None,) and sizes[1:] == shape[1:]):
            return True
        return len(sizes) == len(shape) and all(size in (None, given) for size, given in zip(sizes, shape, strict=True))

    def __str__(self) -> str:
        dtype = "any dtype" if self.dtype is None else _named(self.dtype)
        shape = (
            "any shape" if self.shape is None else f"[{', '.join('?' if n is None else str(n) for n in self.shape)}]"
        )
        return f'"{self.name}" ({dtype}, {shape}{", optional" if self.optional else ""})'


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        inputs: none means that the model does not say, and anything passes; or, if it is `exact`, that it takes none.
        method: a `tensors.Method`'s value, or a framework's own word.
        checks_shapes: whether `bind` refuses a tensor of another shape than its input's; if not, the model decides.
        positional: whether `inputs` are in the order in which the model takes them, so that the first one stands for a
            tensor without a name where the model requires none.
    """

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    method: str = Method.PREDICT.value
    exact: bool = False
    checks_shapes: bool = True
    positional: bool = False

    @property
    def unnamed(self) -> TensorSpec | None:
        """The input for which a tensor without a name stands: the only one that the model requires; if it requires
        none, its only one, or the first of a `positional` signature. None: there is no such input."""
        required = [spec for spec in self.inputs if not spec.optional]
        if not required and self.positional:
            return self.inputs[0] if self.inputs else None
        among = required or self.inputs
        return among[0] if len(among) == 1 else None

    def bind(self, tensors: Tensors, *, cast: bool = False) -> dict[str, Tensor]:
        """`tensors` checked against the inputs, in the order of the signature. An optional input that is missing gets
        its default, or stays missing where only the model knows that. With `cast`, numbers are converted where no value
        changes kind: any number to a floating-point dtype, whole numbers to an integer one; an empty tensor is
        converted to any dtype.

        Raises:
            BadRequest: a name, dtype or shape that does not fit; names what was expected.
        """
        if not self.inputs and not self.exact:
            return dict(tensors)
        specs = [spec for spec in self.inputs if spec.name in tensors or not spec.optional]
        if len(tensors) != len(specs) or any(spec.name not in tensors for spec in specs):
            given = ", ".join(f'"{name}"' for name in sorted(tensors)) or "none"
            expected = f"the inputs {', '.join(map(str, self.inputs))}" if self.inputs else "no inputs"
            # What was sent in excess and what is missing is said in TensorFlow Serving's words.
            extra = ",".join(sorted(tensors.keys() - {spec.name for spec in specs}))
            missing = ",".join(sorted({spec.name for spec in specs} - tensors.keys()))
            raise BadRequest(
                f"input size does not match signature: expected {expected}; got {given}. Sent extra: {{{extra}}}. "
                f"Missing but required: {{{missing}}}."
            )
        bound = {spec.name: _fit(spec, tensors[spec.name], cast, self.checks_shapes) for spec in specs}
        if len(specs) == len(self.inputs):
            return bound
        defaults = {spec.name: spec.default for spec in self.inputs if spec.default is not None}
        bound = {**defaults, **bound}
        return {spec.name: bound[spec.name] for spec in self.inputs if spec.name in bound}

    def bind_one(self, tensor: Tensor, *, cast: bool) -> dict[str, Tensor]:
        """A tensor without a name, as the input `unnamed`.

        Raises:
            BadRequest: as `bind`; or the model has no such input.
        """
        if not self.inputs and not self.exact:
            return {"input": tensor}
        spec = self.unnamed
        if spec is None:
            raise BadRequest(
                f"the model has {len(self.inputs)} inputs, {', '.join(map(str, self.inputs)) or 'none'}: "
                "one tensor without a name cannot stand for them"
            )
        return self.bind({spec.name: tensor}, cast=cast)

    def fits_shapes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether each of `inputs`, arrays or the framework's tensors, has a shape that its input takes; what has no
        shape does not."""
        for spec in self.inputs:
            if spec.name in inputs:
                shape = getattr(inputs[spec.name], "shape", None)
                if shape is None or not spec.takes_shape(tuple(shape)):
                    return False
        return True


def _named(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind == "O" else dtype.name


def _fit(spec: TensorSpec, tensor: Tensor, cast: bool, check_shape: bool) -> Tensor:
    dtype = spec.number_dtype if cast and spec.dtype is None else spec.dtype
    if dtype is not None and tensor.dtype != dtype:
        if not cast or (tensor.size and (tensor.dtype.kind not in "biuf" or dtype.kind == "O")):
            raise BadRequest(f"input {spec} does not take dtype {_named(tensor.dtype)}")
        tensor = _convert(tensor, spec, dtype)
    if check_shape and not spec.takes_shape(tensor.shape):
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

    platform: str = ""
    """The platform in the Open Inference Protocol's metadata: framework_format, by Triton's name where Triton has one
    ("tensorflow_savedmodel"); "" is the backend's name."""

    @property
    def signatures(self) -> Mapping[str, Signature]:
        """Every signature that requests can ask for, by its name."""
        return {DEFAULT_SIGNATURE: self.signature}

    @property
    def unserved(self) -> Mapping[str, str]:
        """By name, why a signature that the model's files have is not among `signatures`."""
        return {}

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

    def explain(self, error: BaseException) -> BaseException:
        """The error to report in place of `error`, which a call of `native` raised: BadRequest where the framework says
        that it is the inputs' fault, or an error whose first line says what was wrong. By default `error` itself."""
        return error

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

    @classmethod
    def return_memory(cls) -> None:
        """Give free memory that the framework keeps back to the system, a device's included. Called on any thread, once
        a model of this class has been closed and its objects have been freed."""


class Backend(ABC):
    """A framework that loads models. One object per process, made with what `[backends.NAME]` says in the config.

    `Options` are that table; `ModelOptions` are the table `[options]` of a model's own `model.toml`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[PluginOptions]] = PluginOptions
    ModelOptions: ClassVar[type[PluginOptions]] = PluginOptions
    refuses_shapes: ClassVar[bool] = False
    """Whether a model itself refuses inputs of a shape that it cannot take, by BadRequest. Only then can
    `check_shapes = false` leave shapes to it."""

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


def on_demand(cls: type[Backend], make: Callable[[], Backend]) -> Backend:
    """A backend that stands for one of class `cls` and calls `make` for it when the first model is loaded, once per
    process: a backend that cannot be made stops only the models that need it. Any thread.

    What `make` raises is raised by that `load`; the next `load` tries again.
    """

    class OnDemand(Backend):
        name = cls.name
        Options = cls.Options
        ModelOptions = cls.ModelOptions
        refuses_shapes = cls.refuses_shapes

        def __init__(self) -> None:
            super().__init__(PluginOptions())
            self._lock = threading.Lock()
            self._made: Backend | None = None

        @classmethod
        def recognises(cls_, directory: Path) -> bool:  # noqa: N804 - `cls` is the class that this one stands for
            return cls.recognises(directory)

        def load(self, directory: Path, options: PluginOptions, device: str) -> Model:
            with self._lock:
                made = self._made = self._made or make()
            return made.load(directory, options, device)

    return OnDemand()
