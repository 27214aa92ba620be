"""JSON values of TensorFlow Serving's REST API → a model's inputs, by TensorFlow Serving's rules.

They differ from the rules for other untyped numbers (Seldon's) in three things. A value must be of the kind that the
input's dtype has: `1.0` is not an integer, and `1` is not a boolean. A floating-point input rounds any number. And in
the columns form, names that the model does not take are ignored beside all of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dl_inference_core.errors import BadRequest
from dl_inference_core.node.backend import Signature, TensorSpec
from dl_inference_core.tensors import Layout, Misfit, Tensor, from_json


def bind_rest(signature: Signature, payload: Any, layout: Layout) -> dict[str, Tensor]:
    """The values of a request as tensors by input name, checked against `signature`.

    Args:
        payload: the value of the only input, or values by the inputs' names; of rows the lists of each row's values.

    Raises:
        BadRequest: a name or value that the model does not take, or a missing input; names it, and says what is
            expected. The first words of each are TensorFlow Serving's.
    """
    if not signature.inputs and not signature.exact:
        values = payload if isinstance(payload, Mapping) else {"input": payload}
        return signature.bind({name: _tensor(TensorSpec(name=name), value, layout) for name, value in values.items()})
    specs = {spec.name: spec for spec in signature.inputs}
    values = payload if isinstance(payload, Mapping) else {_only_name(signature, layout): payload}
    missing = [spec.name for spec in signature.inputs if spec.name not in values and not spec.optional]
    expected = f"the model takes {', '.join(map(str, signature.inputs)) or 'no inputs'}"
    unknown = [name[:100] for name in values if name not in specs]
    if layout is Layout.COLUMNS:
        if missing:
            raise BadRequest(f"Missing named input: {missing[0]} in 'inputs' object; {expected}")
        if unknown and not specs.keys() <= values.keys():  # it may be an optional input's name, misspelt
            raise BadRequest(f"JSON object: does not have named input: {unknown[0]}; {expected}")
    else:
        if unknown:
            words = f"JSON object: does not have named input: {unknown[0]}; {expected}"
            raise _row_error(0, words, unknown[0])
        if missing:
            raise BadRequest(
                "Failed to process element: 0 of 'instances' list. JSON object: keys must be equal to: "
                f"{','.join(specs)}; {missing[0]} is missing; {expected}"
            )
    named = isinstance(payload, Mapping)
    return signature.bind(
        {name: _tensor(specs[name], value, layout, named=named) for name, value in values.items() if name in specs}
    )


def _only_name(signature: Signature, layout: Layout) -> str:
    """The name of the input for which a value without a name stands."""
    spec = signature.unnamed
    if spec is None:
        words = {
            Layout.ROWS: "instances is a plain list, but expecting list of objects",
            Layout.COLUMNS: "inputs is a plain value/list, but expecting an object",
        }[layout]
        raise BadRequest(
            f"{words}: the model has {len(signature.inputs)} inputs, {', '.join(map(str, signature.inputs)) or 'none'}"
        )
    return spec.name


def _tensor(spec: TensorSpec, value: Any, layout: Layout, *, named: bool = True) -> Tensor:
    try:
        return from_json(value, spec.dtype, number_dtype=spec.number_dtype)
    except TypeError as error:
        if layout is Layout.ROWS and isinstance(error, Misfit) and error.row is not None:
            raise _row_misfit(spec, value, error.row, named) from error
        raise BadRequest(f"{error}; the input is {spec}") from error


def _row_misfit(spec: TensorSpec, rows: Sequence[Any], row: int, named: bool) -> BadRequest:
    """Why `rows` make no tensor, where one `row` is at fault: it makes none itself, or one of another shape than the
    first row's."""
    shapes: list[tuple[int, ...]] = []
    for index in (0, row):
        try:
            shapes.append(from_json(rows[index], spec.dtype, number_dtype=spec.number_dtype).shape)
        except TypeError as error:
            return _row_error(index, f"{error}; the input is {spec}", spec.name if named else "")
    first, given = shapes
    said = f"Expecting tensor size: {math.prod(first)} but got: {math.prod(given)}"
    if math.prod(first) == math.prod(given):
        said = f"Expecting shape {_listed(first)} but got: {_listed(given)}"
    return _row_error(row, f"{said}; the input is {spec}", spec.name if named else "")


def _row_error(row: int, said: str, name: str) -> BadRequest:
    key = f" key: {name}" if name else ""
    return BadRequest(f"Failed to process element: {row}{key} of 'instances' list. Error: INVALID_ARGUMENT: {said}")


def _listed(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"
