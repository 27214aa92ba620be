"""A loaded SavedModel: its signatures, calls, and tensors to and from numpy.

It runs in a `tf.compat.v1.Session`, as in TensorFlow Serving, TensorFlow 2's models too: initialisers, tables and
assets come by the same way for both, and the thread that calls is the thread that computes. A prepared callable of a
session takes 15 to 20 µs for a small network; `Session.run` takes 100 to 165, a `ConcreteFunction` 300.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import config_pb2

from dl_inference_core.errors import BadRequest, ModelError, Overloaded
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Tensor, as_tensor, mapped
from dl_inference_core.wire.tfserving import dtype_of

_REFERENCE = 100
"""TensorFlow adds it to a dtype's number where a tensor is a reference to a variable."""
# What TensorFlow 2 writes beside a model's own signatures.
_NOT_FOR_CLIENTS = frozenset({"__saved_model_init_op", "__saved_model_train_op"})
# How the lines begin that TensorFlow puts before what is wrong.
_SAYS_NOTHING = ("Graph execution error:", "Detected at node", "<stack traces unavailable>")
# Its loader's own note that it is deprecated, for ten years now.
logging.getLogger("tensorflow").addFilter(lambda record: "deprecated" not in record.getMessage())


class SavedModel(Model):
    """One SavedModel in a session of its own. May be called on several threads at once."""

    platform = "tensorflow_savedmodel"

    def __init__(self, directory: Path, tags: Sequence[str], config: Any, device: str | None) -> None:
        """Args:
            config: a `tf.compat.v1.ConfigProto`.
            device: where operations go that name none.

        Raises:
            ModelError: it cannot be loaded; says what would help.
        """
        graph = tf.Graph()
        self.tf_session = tf.compat.v1.Session(graph=graph, config=config)
        try:
            with graph.as_default(), graph.device(device) if device is not None else nullcontext():
                loaded = tf.compat.v1.saved_model.loader.load(self.tf_session, list(tags), str(directory))
            self._prepare(loaded.signature_def)
        except Exception as error:
            self.tf_session.close()
            raise ModelError(
                f"the SavedModel in {directory} cannot be loaded: {_first_line(error)}; it is damaged, has no graph "
                f"with the tags {', '.join(tags)}, or needs operations that TensorFlow {tf.__version__} lacks "
                "(see `custom_op_libraries`)"
            ) from error

    def _prepare(self, definitions: Mapping[str, Any]) -> None:
        """Prepare a call for each signature that can be served; the others go to `unserved`."""
        self._signatures: dict[str, Signature] = {}
        self._calls: dict[str, _Call] = {}
        self._unserved: dict[str, str] = {}
        for name, definition in definitions.items():
            if name in _NOT_FOR_CLIENTS:
                continue
            try:
                inputs = _specs(definition.inputs, definition.defaults)
                outputs = _specs(definition.outputs, {})
                # The one way to a prepared callable with feeds: `make_callable` falls back on `Session.run` with them.
                run = self.tf_session._make_callable_from_options(
                    config_pb2.CallableOptions(
                        feed=[spec.native_name for spec in inputs], fetch=[spec.native_name for spec in outputs]
                    )
                )
                self._check_dtypes(inputs)
            except (_NotServed, tf.errors.OpError) as error:
                self._unserved[name] = _first_line(error)
                continue
            self._signatures[name] = Signature(
                inputs=inputs, outputs=outputs, method=definition.method_name, exact=True
            )
            self._calls[name] = _Call(
                inputs=inputs,
                outputs=[spec.name for spec in outputs],
                run=run,
                names=frozenset(spec.name for spec in inputs),
            )
        self.signature = self._signatures.get(DEFAULT_SIGNATURE, Signature())

    def _check_dtypes(self, inputs: Sequence[TensorSpec]) -> None:
        """Raises:
        _NotServed: an input has another dtype in the graph than in the signature, so that no request fits both.
        """
        for spec in inputs:
            tensor = spec.native_name if ":" in spec.native_name else f"{spec.native_name}:0"
            dtype = self.tf_session.graph.get_tensor_by_name(tensor).dtype.base_dtype
            if spec.dtype not in (None, dtype_of(dtype.as_datatype_enum)):
                raise _NotServed(f"the input {spec} has the dtype {dtype.name} in the graph")

    @property
    def signatures(self) -> Mapping[str, Signature]:
        return self._signatures

    @property
    def unserved(self) -> Mapping[str, str]:
        return self._unserved

    @property
    def native(self) -> Native:
        return Native(self)

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        call = self._calls[signature]
        if not call.names.issuperset(inputs):
            unknown = next(name for name in inputs if name not in call.names)
            expected = ", ".join(map(str, call.inputs)) or "no inputs"
            raise BadRequest(f'the model has no input "{unknown}"; it takes {expected}')
        # An array of TensorFlow's on the CPU becomes one of numpy's without a copy.
        arrays = [
            np.asarray(inputs[spec.name] if spec.default is None else inputs.get(spec.name, spec.default))
            for spec in call.inputs
        ]
        for spec, array in zip(call.inputs, arrays, strict=True):
            if array.dtype != spec.dtype and spec.dtype is not None:
                raise TypeError(f"the model was called with dtype {array.dtype.name} for its input {spec}")
        try:
            values = call.run(*arrays)
        except tf.errors.InvalidArgumentError as error:
            raise BadRequest(_first_line(error)) from error
        except tf.errors.ResourceExhaustedError as error:
            raise Overloaded(_first_line(error)) from error
        except tf.errors.OpError as error:
            # Operations refuse shapes by other errors too, such as UnimplementedError.
            if all(spec.takes_shape(array.shape) for spec, array in zip(call.inputs, arrays, strict=True)):
                raise
            raise BadRequest(_first_line(error)) from error
        return {name: as_tensor(value) for name, value in zip(call.outputs, values, strict=True)}

    def to_native(self, value: Any) -> Any:
        return mapped(value, np.ndarray, _to_tensorflow)

    def to_numpy(self, value: Any) -> Any:
        return mapped(value, tf.Tensor, _to_numpy)

    def close(self) -> None:
        self._calls.clear()
        self.tf_session.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A signature, prepared: `run` takes arrays and gives them, in these orders."""

    inputs: tuple[TensorSpec, ...]
    outputs: list[str]
    run: Callable[..., Any]
    names: frozenset[str]
    """Of the inputs."""


class Native:
    """The default signature as a function, and the session that it runs in: `native(x)`, where one input is required,
    or `native(name=x, …)`. It takes arrays or TensorFlow's tensors and returns TensorFlow's tensors by output name."""

    def __init__(self, model: SavedModel) -> None:
        self._model = model

    @property
    def session(self) -> Any:
        """The `tf.compat.v1.Session`; its `graph` has the operations."""
        return self._model.tf_session

    def __call__(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        left = [spec for spec in self._model.signature.inputs if spec.name not in named]
        names = [spec.name for spec in left if not spec.optional] or [spec.name for spec in left]
        if len(inputs) > 1 or (inputs and len(names) != 1):
            raise TypeError(f"expected the inputs {', '.join(names)} by name; got {len(inputs)} without one")
        outputs = self._model({**named, **dict(zip(names, inputs, strict=False))})
        return {name: _to_tensorflow(output) for name, output in outputs.items()}


class _NotServed(Exception):
    """Why a signature cannot be served."""


def _specs(tensors: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """By name.

    Args:
        tensors: `TensorInfo`s by name.
        defaults: the `TensorProto` of each input that a request may leave out.

    Raises:
        _NotServed: a tensor is not dense, or a default cannot be fed.
    """
    return tuple(_spec(name, info, defaults.get(name)) for name, info in sorted(tensors.items()))


def _spec(name: str, info: Any, default: Any) -> TensorSpec:
    encoding = info.WhichOneof("encoding")
    if encoding != "name" or not info.name:
        kinds = {"coo_sparse": "is sparse", "composite_tensor": "is composite, as ragged tensors are"}
        raise _NotServed(f'"{name}" {kinds.get(encoding, "names no tensor")}; expected a dense tensor')
    number = info.dtype - _REFERENCE if info.dtype > _REFERENCE else info.dtype
    if number in (types_pb2.DT_RESOURCE, types_pb2.DT_VARIANT):
        kind = types_pb2.DataType.Name(number)
        raise _NotServed(f'"{name}" is a {kind}; expected a dense tensor of numbers or strings')
    shape = info.tensor_shape
    known = info.HasField("tensor_shape") and not shape.unknown_rank
    spec = TensorSpec(
        name=name,
        dtype=dtype_of(number),
        shape=tuple(None if dim.size < 0 else dim.size for dim in shape.dim) if known else None,
        native_name=info.name,
    )
    if default is None:
        return spec
    value = tf.make_ndarray(default)
    if value.dtype != spec.dtype:
        raise _NotServed(f"the default of the input {spec} has the dtype {value.dtype.name}")
    value.setflags(write=False)
    return replace(spec, optional=True, default=value)


def _to_tensorflow(array: Tensor) -> Any:
    with tf.device("/CPU:0"):
        return tf.constant(array)


def _to_numpy(tensor: Any) -> Tensor:
    return as_tensor(tensor.numpy())


def _first_line(error: BaseException) -> str:
    """The first line of its message that says something."""
    text = str(getattr(error, "message", None) or error)
    lines = (line.strip() for line in text.splitlines())
    said = next((line for line in lines if line and not line.startswith(_SAYS_NOTHING)), type(error).__name__)
    return said[:500]
