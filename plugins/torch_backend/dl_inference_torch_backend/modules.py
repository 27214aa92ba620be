"""Loaded PyTorch models: signatures, calls, and tensors to and from numpy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from dl_inference_core.errors import BadRequest
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.tensors import Tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class TorchModel(Model):
    """What all PyTorch models share: the device, inference mode, and conversions."""

    def __init__(self, native: Any, device: torch.device) -> None:
        self._native = native
        self._device = device

    @property
    def native(self) -> Any:
        return self._native

    def session(self) -> AbstractContextManager[Any]:
        if self._device.type == "cpu":
            return torch.inference_mode()
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.cuda.device(self._device))
        return stack

    def to_native(self, value: Any) -> Any:
        return _mapped(value, np.ndarray, self._from_numpy)

    def to_numpy(self, value: Any) -> Any:
        return _mapped(value, torch.Tensor, _to_numpy)

    def _from_numpy(self, array: Tensor) -> torch.Tensor:
        if array.dtype.kind not in "biufc" and array.dtype != _BFLOAT16:
            raise BadRequest(f"torch models take no tensors of dtype {array.dtype.name}")
        bfloat16 = array.dtype == _BFLOAT16
        if bfloat16:
            array = array.view(np.int16)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        # torch would let a model write into the request's own bytes: those are copied.
        array = np.ascontiguousarray(array) if array.flags.writeable else np.array(array, order="C")
        tensor = torch.from_numpy(array)
        if bfloat16:
            tensor = tensor.view(torch.bfloat16)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)

    def _outputs(self, result: Any) -> dict[str, Tensor]:
        return {name: _to_numpy(tensor) for name, tensor in _named(result)}


class EagerModel(TorchModel):
    """An `nn.Module`; its inputs are the parameters of `forward` that have no default."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        super().__init__(module.to(device).eval(), device)
        parameters = inspect.signature(module.forward).parameters.values()
        if all(parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
            names = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
            self.signature = Signature(inputs=tuple(TensorSpec(name=name) for name in names))

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = self.to_native(dict(inputs))
        if self.signature.inputs:
            return self._outputs(self._native(**tensors))
        # Names from a client never become keyword arguments.
        if len(tensors) != 1:
            raise BadRequest(f"the model does not name its inputs and takes one tensor, not {len(tensors)}")
        return self._outputs(self._native(*tensors.values()))


class ScriptedModel(TorchModel):
    """A TorchScript module; its inputs are those of its schema that have no default."""

    def __init__(self, module: torch.jit.ScriptModule, device: torch.device) -> None:
        super().__init__(module.eval(), device)
        arguments: Any = module.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        self.signature = Signature(
            inputs=tuple(TensorSpec(name=argument.name) for argument in arguments if not argument.has_default_value())
        )

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._outputs(self._native(**self.to_native(dict(inputs))))


class ExportedModel(TorchModel):
    """A torch.export program; names, dtypes, shapes and ranges are those it was exported with."""

    def __init__(self, program: torch.export.ExportedProgram, device: torch.device) -> None:
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        super().__init__(program.module(), device)
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        self._flat = tuple(
            _constant_or_name(spec.arg) for spec in program.graph_signature.input_specs if _is_user(spec)
        )
        names = [name for name, is_name in self._flat if is_name]
        shown = dict(zip(names, _shown_names(program, names), strict=True))
        self._inputs = tuple((shown[value] if is_name else value, is_name) for value, is_name in self._flat)
        self._in_spec = program.call_spec.in_spec
        outputs = [values.get(name) for name in program.graph_signature.user_outputs if isinstance(name, str)]
        self.signature = Signature(
            inputs=tuple(_spec(shown[name], values[name]) for name in names),
            outputs=_output_specs(program, outputs),
        )
        self._ranges = tuple(_ranges(program, {shown[name]: values[name] for name in names}))

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = self.to_native(dict(inputs))
        self._check_sizes(tensors)
        flat = [tensors[value] if is_name else value for value, is_name in self._inputs]
        args, kwargs = pytree.tree_unflatten(flat, self._in_spec)
        return self._outputs(self._native(*args, **kwargs))

    def _check_sizes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for name, axis, symbol, least, most in self._ranges:
            size = tensors[name].shape[axis]
            where = f'axis {axis} of input "{name}"'
            if size < least or (most is not None and size > most):
                raise BadRequest(f"{where} has size {size}; the model takes {least} to {most or 'any'}")
            other, there = sizes.setdefault(symbol, (size, where))
            if other != size:
                raise BadRequest(f"{where} has size {size}, {there} has {other}; the model takes the same size in both")


def _is_user(spec: Any) -> bool:
    return spec.kind is torch.export.graph_signature.InputKind.USER_INPUT


def _constant_or_name(argument: Any) -> tuple[Any, bool]:
    """What stands in one place of the flat inputs: a constant of the export, or a tensor's name in the graph."""
    return (argument.value, False) if isinstance(argument, ConstantArgument) else (argument.name, True)


def _shown_names(program: torch.export.ExportedProgram, names: list[str]) -> list[str]:
    """The parameters of `forward` where each is one tensor, else the graph's names for what they hold."""
    signature = program.module_call_graph[0].signature
    given = (signature.forward_arg_names if signature is not None else None) or []
    return list(given) if len(given) == len(names) else names


def _spec(name: str, value: Any) -> TensorSpec:
    if not isinstance(value, torch.Tensor):
        return TensorSpec(name=name)
    return TensorSpec(
        name=name,
        dtype=_numpy_dtype(value.dtype),
        shape=tuple(size if isinstance(size, int) else None for size in value.shape),
    )


def _output_specs(program: torch.export.ExportedProgram, values: list[Any]) -> tuple[TensorSpec, ...]:
    out_spec = program.call_spec.out_spec
    if out_spec is None or out_spec.num_leaves != len(values):
        return ()
    return tuple(_spec(name, value) for name, value in _named(pytree.tree_unflatten(values, out_spec)))


def _ranges(
    program: torch.export.ExportedProgram, inputs: Mapping[str, Any]
) -> Iterator[tuple[str, int, str, int, int | None]]:
    """(input, axis, symbol, least, most) of every free size."""
    for name, value in inputs.items():
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            symbol = None if isinstance(size, int) else size.node.expr
            limits = program.range_constraints.get(symbol)
            if limits is not None:
                # 2 is where torch.export begins when nothing is said; the program takes 0 and 1 all the same.
                least = 0 if limits.lower <= 2 else int(limits.lower)
                most = int(limits.upper) if limits.upper < 1 << 62 else None
                yield name, axis, str(symbol), least, most


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    if dtype == torch.bfloat16:
        return _BFLOAT16
    try:
        return np.dtype(torch.empty(0, dtype=dtype).numpy().dtype)
    except TypeError:
        return None


def _to_numpy(tensor: torch.Tensor) -> Tensor:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    array: Tensor = tensor.numpy()
    return array


def _named(result: Any) -> Iterator[tuple[str, Any]]:
    """What a model returned, by name: a dict's own keys, "output" for one value, "output_0", … for several."""
    if isinstance(result, Mapping):
        yield from ((str(name), value) for name, value in result.items())
    elif isinstance(result, list | tuple):
        names = getattr(result, "_fields", None) or [f"output_{index}" for index in range(len(result))]
        yield from zip(names, result, strict=True)
    else:
        yield "output", result


def _mapped(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        return {key: _mapped(item, kind, convert) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, kind, convert) for item in value]
    if isinstance(value, tuple):
        items = [_mapped(item, kind, convert) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
