"""The original's `processor.py`: a model's business end as plain functions, found by name.

Any subset of these; `kwargs["meta"]["tags"]` holds the request's tags::

    def preprocess(x, **kwargs): ...        # x: str, bytes, numpy array, a dict of them by name, or JSON values
    def run_model(model, x, **kwargs): ...  # model: the framework's own; x: what preprocess returned
    def postprocess(x, **kwargs): ...       # x: what the model returned; gives list, str, bytes, dict, array or tensor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handling import Handler, bind
from dl_inference_core.tensors import Form, Payload, Request


class Processor(Handler):
    """Runs the functions of a `processor.py`. Where one is missing: arrays become the framework's tensors, the
    framework's own model is called on them, and its tensors become arrays again, in dicts and lists too. A model that
    states its inputs' dtypes is given, without `preprocess` and `run_model`, what fits them, as by the default handler.
    """

    name = "processor"

    class Options(PluginOptions):
        """Attributes:
        model_arguments: the tags that are passed to the model as keyword arguments, where a request has them, if
            there is no `run_model`. No other tag is: a client would choose what the model does.
        """

        model_arguments: tuple[str, ...] = ()

    options: Options

    def __init__(self, options: PluginOptions, module: ModuleType) -> None:
        """Args:
            module: the loaded `processor.py`.

        Raises:
            ModelError: it defines none of the three functions, or one of the names is no function.
        """
        super().__init__(options)
        self._preprocess = _function(module, "preprocess")
        self._run_model = _function(module, "run_model")
        self._postprocess = _function(module, "postprocess")
        if not (self._preprocess or self._run_model or self._postprocess):
            raise ModelError(f"{module.__file__}: defines none of preprocess, run_model and postprocess")

    def load(self, model: Model, directory: Path) -> None:
        super().load(model, directory)
        self._model = model

    def preprocess(self, request: Request) -> Any:
        x: Any = request.payload
        if request.form in (Form.TENSORS, Form.TENSORS_RAW) and len(x) == 1:
            (x,) = x.values()
        if self._preprocess is not None:
            return self._preprocess(x, **_kwargs(request))
        if self._run_model is None:
            x = self._fit(x, request)
        return self._model.to_native(x)

    def _fit(self, x: Any, request: Request) -> Any:
        """What the model itself takes: `x`, or what becomes of it where the model states its inputs' dtypes."""
        if isinstance(x, bytes | str):
            raise BadRequest(f"this model takes tensors, not {request.form.value}: its processor.py has no preprocess")
        signature = self.signature_for(request)
        inputs = signature.inputs
        if request.form in (Form.TENSORS, Form.TENSORS_RAW) and isinstance(x, Mapping):
            signature.bind(x)
        if not inputs or any(spec.dtype is None for spec in inputs):
            return x
        bound = bind(signature, request)
        return bound if len(bound) > 1 else bound[inputs[0].name]

    def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
        if self._run_model is not None:
            return self._run_model(model.native, inputs, **_kwargs(request))
        inputs = model.to_native(inputs)
        arguments = {name: request.tags[name] for name in self.options.model_arguments if name in request.tags}
        if isinstance(inputs, Mapping) and inputs.keys() == {spec.name for spec in self.signature.inputs}:
            return model.native(**{**arguments, **inputs})
        return model.native(inputs, **arguments)

    def postprocess(self, outputs: Any, request: Request) -> Payload:
        if self._postprocess is not None:
            outputs = self._postprocess(outputs, **_kwargs(request))
        return _payload(self._model.to_numpy(outputs))  # type: ignore[no-any-return]


def _function(module: ModuleType, name: str) -> Callable[..., Any] | None:
    function = getattr(module, name, None)
    if function is not None and not callable(function):
        raise ModelError(f"{module.__file__}: {name} is no function but a {type(function).__name__}")
    return function


def _kwargs(request: Request) -> dict[str, Any]:
    return {"meta": {"tags": dict(request.tags)}}


def _payload(value: Any) -> Any:
    """`value` with each list of numbers, however deep, as an array, if it is rectangular."""
    if isinstance(value, Mapping):
        return {str(name): _payload(item) for name, item in value.items()}
    if isinstance(value, np.generic):
        return np.asarray(value)
    if isinstance(value, list | tuple) and value:
        try:
            array = np.asarray(value)
        except (ValueError, TypeError):
            return list(value)
        # A list of numbers and text would become text throughout; one of objects, who knows what.
        return array if array.dtype.kind in "biuf" else list(value)
    return value
