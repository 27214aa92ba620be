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
from dl_inference_core.node.handling import Handler, bind, check_function
from dl_inference_core.tensors import Form, Payload, Request, by_name


class Processor(Handler):
    """Runs the functions of a `processor.py`. Where one is missing: arrays become the framework's tensors, the
    framework's own model is called on them, and its tensors become arrays again, in dicts and lists too. A model that
    names its inputs is given, without `preprocess` and `run_model`, what fits them, as by the default handler.
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
            ModelError: it defines none of the three functions; or one of the names is not a plain function, or does not
                take its arguments.
        """
        super().__init__(options)
        self._preprocess = _function(module, "preprocess", "x")
        self._run_model = _function(module, "run_model", "model", "x")
        self._postprocess = _function(module, "postprocess", "x")
        if not (self._preprocess or self._run_model or self._postprocess):
            raise ModelError(f"{module.__file__}: defines none of preprocess, run_model and postprocess")

    def prepare(self, model: Model, directory: Path) -> None:
        self._model = model
        super().prepare(model, directory)

    @property
    def makes_inputs(self) -> bool:
        return self._preprocess is not None

    @property
    def calls_signatures(self) -> bool:
        return self._run_model is None

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
        """What the model itself takes: `x`, or what becomes of it where the model names its inputs."""
        if isinstance(x, bytes | str):
            raise BadRequest(f"this model takes tensors, not {request.form.value}: its processor.py has no preprocess")
        signature = self.signature_for(request)
        if not signature.inputs:
            return x
        bound = bind(signature, request)
        spec = signature.unnamed
        return bound[spec.name] if spec is not None and bound.keys() == {spec.name} else bound

    def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
        if self._run_model is not None:
            return self._run_model(model.native, inputs, **_kwargs(request))
        inputs = model.to_native(inputs)
        if not self.signature.inputs and isinstance(inputs, Mapping) and inputs.keys() == {"input"}:
            (inputs,) = inputs.values()  # a value without a name, for a model without names
        arguments = {name: request.tags[name] for name in self.options.model_arguments if name in request.tags}
        try:
            if isinstance(inputs, Mapping) and self._are_named(inputs):
                return model.native(**{**arguments, **inputs})
            return model.native(inputs, **arguments)
        except Exception as error:
            explained = model.explain(error)
            if self.makes_inputs or explained is error:
                raise
            raise explained from error

    def _are_named(self, inputs: Mapping[str, Any]) -> bool:
        """Whether `inputs` are the model's, by its own names, rather than one input that is a dict."""
        specs = self.signature.inputs
        required = {spec.name for spec in specs if not spec.optional}
        return bool(inputs) and required <= inputs.keys() <= {spec.name for spec in specs}

    def postprocess(self, outputs: Any, request: Request) -> Payload:
        if self._postprocess is not None:
            outputs = self._postprocess(outputs, **_kwargs(request))
        return _payload(self._model.to_numpy(outputs))  # type: ignore[no-any-return]


def _function(module: ModuleType, name: str, *arguments: str) -> Callable[..., Any] | None:
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is not None:
        check_function(f"{module.__file__}: {name}", function, *arguments, meta=None)
    return function


def _kwargs(request: Request) -> dict[str, Any]:
    return {"meta": {"tags": dict(request.tags)}}


def _payload(value: Any) -> Any:
    """`value` with names for keys, and numpy's scalars as arrays.

    Lists stay lists: whether they could be arrays depends on what is in them, and the form of an answer must not.

    Raises:
        TypeError: as `by_name`.
    """
    if isinstance(value, Mapping):
        return by_name(value, _payload)
    return np.asarray(value) if isinstance(value, np.generic) else value
