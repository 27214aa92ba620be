"""From what a handler's own `preprocess` returned to what the model takes; and what `postprocess` may return."""

from __future__ import annotations

from collections.abc import Mapping
from traceback import walk_tb
from typing import Any

import numpy as np

from dl_inference_core.errors import BadRequest
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.node.handling import Handler, bind, is_awaitable
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Form, Request, as_tensor

_PLAIN = (bool, int, float, complex, str, bytes, np.generic)


def inputs_of(handler: Handler, request: Request) -> Any:
    """What `handler.run_model` takes for `request`: what `preprocess` returns, as `check_inputs` gives it.

    Raises:
        TypeError, ValueError: as `check_inputs`.
        Exception: what `preprocess` raised; BadRequest if the client is to blame.
    """
    return check_inputs(handler, request, handler.preprocess(request))


def check_inputs(handler: Handler, request: Request, returned: Any) -> Any:
    """What `handler.run_model` takes, from what `preprocess` returned.

    Where the handler's `preprocess` is its own and the model is called by its signatures, whatever numpy reads becomes
    an array: numbers, text, lists, images, tables. It gets the dtype that its input states; a number without a dtype of
    its own gets the input's `number_dtype` where the input states none. The framework's tensors stay as they are. One
    value without a name is the model's only input; optional inputs that are left out, or None, get their defaults. A
    `run_model` of the handler's own is given what `preprocess` returned.

    Raises:
        TypeError, ValueError: `preprocess` returned what the model cannot take; says what, and what was expected.
        BadRequest: `preprocess` passed on the client's own tensors, which the model cannot take.
    """
    if not handler.makes_inputs:
        return returned
    if is_awaitable(returned):
        raise TypeError(f"preprocess returned {kind_of(returned)}; it must be a plain function, not async")
    if not handler.calls_signatures:
        return returned
    signature = handler.signatures.get(request.signature or DEFAULT_SIGNATURE)
    if signature is None:
        return returned
    if request.form not in (Form.TEXT, Form.BYTES) and (
        returned is request.payload or unchanged(returned, request.payload)
    ):
        return bind(signature, request)
    return _bind(signature, returned)


def unchanged(inputs: Any, payload: Any) -> tuple[str, ...]:
    """The names of `inputs`, if they are the values of `payload` by the same names; else none."""
    if not isinstance(inputs, Mapping) or not isinstance(payload, Mapping) or len(inputs) != len(payload):
        return ()
    same = all(name in payload and payload[name] is value for name, value in inputs.items())
    return tuple(inputs) if same else ()


def _bind(signature: Signature, returned: Any) -> dict[str, Any]:
    specs = {spec.name: spec for spec in signature.inputs}
    if not isinstance(returned, Mapping):
        returned = _read(returned)
        returned = {_only_name(signature, returned): returned}
    left_out = {spec.name for spec in signature.inputs if spec.optional and returned.get(spec.name) is None}
    inputs = {name: _tensor(name, value, specs.get(name)) for name, value in returned.items() if name not in left_out}
    if not specs and not signature.exact:
        return inputs
    if unknown := [name for name in inputs if name not in specs]:
        raise ValueError(f'preprocess returned an input "{unknown[0]}"; {_expected(signature)}')
    for spec in signature.inputs:
        value = inputs.get(spec.name)
        if value is None:
            if spec.default is not None:
                inputs[spec.name] = spec.default
            elif not spec.optional:
                raise ValueError(f'preprocess did not return the input "{spec.name}"; {_expected(signature)}')
        elif signature.checks_shapes and (shape := _shape(value)) is not None and not spec.takes_shape(shape):
            raise ValueError(f'preprocess returned "{spec.name}" of shape {list(shape)}; {_expected(signature)}')
    return inputs


def _only_name(signature: Signature, returned: Any) -> str:
    if not (_shape(returned) is not None or isinstance(returned, (*_PLAIN, list, tuple))):
        raise TypeError(f"preprocess returned {kind_of(returned)}; {_expected(signature)}")
    if not signature.inputs:
        return "input"
    spec = signature.unnamed
    if spec is None:
        raise ValueError(f"preprocess returned {kind_of(returned)} without a name; {_expected(signature)}")
    return spec.name


def _tensor(name: str, value: Any, spec: TensorSpec | None) -> Any:
    value = _read(value)
    if isinstance(value, np.ndarray):
        if spec is None or spec.dtype is None or spec.dtype == value.dtype:
            return value
        if value.dtype.kind == "O":  # as of a table whose columns differ in dtype
            value = value.tolist()
    elif _shape(value) is not None and not isinstance(value, np.generic):
        return value  # the framework's tensor
    if not isinstance(value, (*_PLAIN, list, tuple, np.ndarray)):
        raise TypeError(
            f'preprocess returned {kind_of(value)} for the input "{name}"; expected an array, a number, text, or a list'
        )
    if isinstance(value, list | tuple) and any(_shape(item) is not None for item in value) and not _says(spec):
        return value  # a list of tensors, which some models take
    try:
        array = as_tensor(value)
        one = Signature(inputs=(spec,), checks_shapes=False) if spec is not None else Signature()
        return one.bind({name: array}, cast=True)[name]
    except (TypeError, BadRequest) as error:
        raise TypeError(f'preprocess returned {kind_of(value)} for the input "{name}": {error}') from error


def _read(value: Any) -> Any:
    """`value` as an array where numpy reads it as numbers or text: an image, a table, a range, a buffer. Python's plain
    values, lists, and the framework's tensors stay as they are, and so does what numpy cannot read."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, (*_PLAIN, list, tuple, np.ndarray)) or not isinstance(dtype, np.dtype | None):
        return value
    try:
        array = np.asarray(value)
    except Exception:  # whatever its own conversion raises
        return value
    return value if array.dtype.kind == "O" and dtype is None else array


def _says(spec: TensorSpec | None) -> bool:
    """Whether an input is known to be one tensor."""
    return spec is not None and (spec.dtype is not None or spec.shape is not None)


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of an array or a framework's tensor; None of what is neither."""
    shape = getattr(value, "shape", None)
    try:
        return None if shape is None or not hasattr(value, "dtype") else tuple(shape)
    except (TypeError, ValueError):  # TensorFlow's, of unknown rank
        return None


def refused_by(model: Model, error: BaseException) -> bool:
    """Whether a call of `model` raised `error`, and not the handler around that call."""
    code = getattr(type(model).__call__, "__code__", None)
    return any(frame.f_code is code for frame, _ in walk_tb(error.__traceback__))


def check_answer(returned: Any) -> Any:
    """The payload of an answer, from what `postprocess` returned.

    Raises:
        TypeError: it is None, as where a `return` was forgotten.
    """
    if returned is None:
        raise TypeError("postprocess returned None; expected tensors by name, one tensor, bytes, text, or JSON values")
    return returned


def kind_of(value: Any) -> str:
    """What a value is, as messages name it: "None", "a list", "an int"."""
    name = type(value).__qualname__
    return "None" if value is None else f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


def _expected(signature: Signature) -> str:
    inputs = ", ".join(map(str, signature.inputs))
    return f"expected by name the inputs {inputs}" if inputs else "expected arrays by input name"
