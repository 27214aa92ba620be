"""A loaded SavedModel: its signatures, calls, and tensors to and from numpy.

It runs in a `tf.compat.v1.Session`, as in TensorFlow Serving, TensorFlow 2's models too: initialisers, tables and
assets come by the same way for both, and the thread that calls is the thread that computes. A prepared callable of a
session takes 15 to 20 µs for a small network; `Session.run` takes 100 to 165, a `ConcreteFunction` 300.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from dl_inference_core.errors import BadRequest, ModelError, Overloaded
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Tensor, as_tensor, mapped
from dl_inference_core.wire.tfserving import dtype_of

_log = logging.getLogger(__name__)

# What TensorFlow 2 writes beside a model's own signatures.
_NOT_FOR_CLIENTS = frozenset({"__saved_model_init_op", "__saved_model_train_op"})
# How the lines begin that TensorFlow puts before what is wrong.
_SAYS_NOTHING = ("Graph execution error:", "Detected at node", "<stack traces unavailable>")
# Its loader's own note that it is deprecated, for ten years now.
logging.getLogger("tensorflow").addFilter(lambda record: "deprecated" not in record.getMessage())


class SavedModel(Model):
    """One SavedModel in a session of its own. May be called on several threads at once."""

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
            self._take(loaded.signature_def)
        except Exception as error:
            self.tf_session.close()
            raise ModelError(
                f"the SavedModel in {directory} cannot be loaded: {_first_line(error)}; it is damaged, has no graph "
                f"with the tags {', '.join(tags)}, or needs operations that TensorFlow {tf.__version__} lacks "
                "(see `custom_op_libraries`)"
            ) from error

    def _take(self, definitions: Mapping[str, Any]) -> None:
        self._signatures: dict[str, Signature] = {}
        self._calls: dict[str, _Call] = {}
        for name, definition in definitions.items():
            if name in _NOT_FOR_CLIENTS:
                continue
            inputs, outputs = _specs(definition.inputs), _specs(definition.outputs)
            if inputs is None or outputs is None:
                _log.warning('signature "%s" takes or gives tensors that are not dense; it is not served', name)
                continue
            try:
                # The one way to a prepared callable with feeds: `make_callable` falls back on `Session.run` with them.
                call = self.tf_session._make_callable_from_options(
                    config_pb2.CallableOptions(
                        feed=[spec.native_name for spec in inputs], fetch=[spec.native_name for spec in outputs]
                    )
                )
            except tf.errors.InvalidArgumentError as error:
                _log.warning('signature "%s" cannot be run, it is not served: %s', name, _first_line(error))
                continue
            self._signatures[name] = Signature(
                inputs=inputs, outputs=outputs, method=definition.method_name, exact=True
            )
            self._calls[name] = _Call(inputs=inputs, outputs=[spec.name for spec in outputs], run=call)
        self.signature = self._signatures.get(DEFAULT_SIGNATURE, Signature())

    @property
    def signatures(self) -> Mapping[str, Signature]:
        return self._signatures

    @property
    def native(self) -> Native:
        return Native(self)

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        call = self._calls[signature]
        # An array of TensorFlow's on the CPU becomes one of numpy's without a copy.
        arrays = [np.asarray(inputs[spec.name]) for spec in call.inputs]
        for spec, array in zip(call.inputs, arrays, strict=True):
            if array.dtype != spec.dtype and spec.dtype is not None:
                raise TypeError(f"the model was called with dtype {array.dtype.name} for its input {spec}")
        try:
            values = call.run(*arrays)
        except tf.errors.InvalidArgumentError as error:
            raise BadRequest(_first_line(error)) from error
        except tf.errors.ResourceExhaustedError as error:
            raise Overloaded(_first_line(error)) from error
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


class Native:
    """The default signature as a function, and the session that it runs in: `native(x)`, where there is one input, or
    `native(name=x, …)`; arrays or TensorFlow's tensors in, a tensor of TensorFlow's for each output by its name out."""

    def __init__(self, model: SavedModel) -> None:
        self._model = model

    @property
    def session(self) -> Any:
        """The `tf.compat.v1.Session`; its `graph` has the operations."""
        return self._model.tf_session

    def __call__(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        names = [spec.name for spec in self._model.signature.inputs if spec.name not in named]
        if len(inputs) > 1 or (inputs and len(names) != 1):
            raise TypeError(f"expected the inputs {', '.join(names)} by name; got {len(inputs)} without one")
        outputs = self._model({**named, **dict(zip(names, inputs, strict=False))})
        return {name: _to_tensorflow(output) for name, output in outputs.items()}


def _specs(tensors: Mapping[str, Any]) -> tuple[TensorSpec, ...] | None:
    """By name; None where one is not dense."""
    specs = []
    for name, info in sorted(tensors.items()):
        if info.WhichOneof("encoding") != "name":
            return None
        shape = info.tensor_shape
        sizes = None if shape.unknown_rank else tuple(None if dim.size < 0 else dim.size for dim in shape.dim)
        specs.append(TensorSpec(name=name, dtype=dtype_of(info.dtype), shape=sizes, native_name=info.name))
    return tuple(specs)


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
