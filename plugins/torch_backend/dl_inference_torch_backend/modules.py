"""Loaded PyTorch models: signatures, calls, and tensors to and from numpy."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Tensor, mapped

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_GUARD = "Guard failed: "  # how the AssertionError of a program's own guards begins


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
        return mapped(value, np.ndarray, self._from_numpy)

    def to_numpy(self, value: Any) -> Any:
        return mapped(value, torch.Tensor, _to_numpy)

    def close(self) -> None:
        self._native = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _inputs(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """`inputs` as tensors on the model's device, whatever device those that are tensors were on."""
        return {
            name: value.to(self._device) if isinstance(value, torch.Tensor) else self._from_numpy(value)
            for name, value in inputs.items()
        }

    def _from_numpy(self, array: Tensor) -> torch.Tensor:
        bfloat16 = array.dtype == _BFLOAT16
        if bfloat16:
            array = array.view(np.int16)
        # Writeable: a model that works in place would write into the bytes that came from the wire. Copying 600 KB of
        # them takes 40 µs.
        array = np.require(array, array.dtype.newbyteorder("="), ["C", "A", "W"])
        try:
            tensor = torch.from_numpy(array)
        except TypeError as error:
            dtype = "string" if array.dtype.kind in "OSU" else array.dtype.name
            raise BadRequest(f"torch models take no {dtype} tensors") from error
        return (tensor.view(torch.bfloat16) if bfloat16 else tensor).to(self._device)


class EagerModel(TorchModel):
    """An `nn.Module`; its inputs are the parameters of `forward` that have no default."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        super().__init__(module.to(device).eval(), device)
        parameters = inspect.signature(module.forward).parameters.values()
        required: list[inspect.Parameter] = []
        if not any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
            required = [parameter for parameter in parameters if parameter.default is parameter.empty]
        self.signature = Signature(inputs=tuple(TensorSpec(name=parameter.name) for parameter in required))
        self._keywords = {parameter.name for parameter in required if parameter.kind is parameter.KEYWORD_ONLY}

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        tensors = self._inputs(inputs)
        # Without a signature the names are the client's own, which must not become keyword arguments.
        names = [spec.name for spec in self.signature.inputs] or list(tensors)
        if not self.signature.inputs and len(tensors) != 1:
            raise BadRequest(f"the model does not name its inputs and takes one tensor, not {len(tensors)}")
        args = [tensors[name] for name in names if name not in self._keywords]
        return _outputs(self._native(*args, **{name: tensors[name] for name in self._keywords}))


class ScriptedModel(TorchModel):
    """A TorchScript module; its inputs are those of its schema that have no default."""

    def __init__(self, module: torch.jit.ScriptModule, device: torch.device) -> None:
        super().__init__(module.eval(), device)
        arguments: Any = module.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        self.signature = Signature(
            inputs=tuple(TensorSpec(name=argument.name) for argument in arguments if not argument.has_default_value())
        )

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        return _outputs(self._native(**self._inputs(inputs)))


class ExportedModel(TorchModel):
    """A torch.export program; names, dtypes, shapes and their limits are those it was exported with."""

    def __init__(self, program: torch.export.ExportedProgram, device: torch.device) -> None:
        """Raises:
        ModelError: it takes anything but tensors and constants.
        """
        program = move_to_device_pass(program, device)
        super().__init__(program.module(), device)
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        arguments = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
        names = _input_names(program, [argument.name for argument in arguments])
        specs: list[TensorSpec] = []
        self._flat: list[str | ConstantArgument] = []
        for name, argument in zip(names, arguments, strict=True):
            if isinstance(argument, ConstantArgument):
                self._flat.append(argument)
            elif isinstance(argument, TensorArgument):
                self._flat.append(name)
                specs.append(_spec(name, values[argument.name]))
            else:
                raise ModelError(f'the program takes "{name}" as a number; export it with tensors only')
        self._in_spec = program.call_spec.in_spec
        self.signature = Signature(inputs=tuple(specs), outputs=_output_specs(program, values))

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        tensors = self._inputs(inputs)
        flat = [tensors[item] if isinstance(item, str) else item.value for item in self._flat]
        args, kwargs = pytree.tree_unflatten(flat, self._in_spec)
        try:
            # Not `__call__`: its check that the inputs have this very structure takes 50 µs.
            return _outputs(self._native.forward(*args, **kwargs))
        except AssertionError as error:
            if not str(error).startswith(_GUARD):
                raise
            given = ", ".join(f'"{name}" {list(tensor.shape)}' for name, tensor in tensors.items())
            condition = str(error).removeprefix(_GUARD)
            raise BadRequest(f"the model only takes inputs with {condition}; got the shapes {given}") from error


def _input_names(program: torch.export.ExportedProgram, graph_names: list[str]) -> list[str]:
    """The parameters of `forward` if each is one value, else the graph's names for what they hold."""
    signature = program.module_call_graph[0].signature
    names = (signature.forward_arg_names if signature is not None else None) or []
    return list(names) if len(names) == len(graph_names) else graph_names


def _output_specs(program: torch.export.ExportedProgram, values: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    arguments = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    out_spec = program.call_spec.out_spec
    if out_spec is None or out_spec.num_leaves != len(arguments):
        return ()
    leaves = [arg.value if isinstance(arg, ConstantArgument) else values.get(arg.name) for arg in arguments]
    named = _named(pytree.tree_unflatten(leaves, out_spec))
    return tuple(_spec(name, value) for name, value in named if value is not None)


def _spec(name: str, value: Any) -> TensorSpec:
    if not isinstance(value, torch.Tensor):
        return TensorSpec(name=name)
    return TensorSpec(
        name=name,
        dtype=_numpy_dtype(value.dtype),
        shape=tuple(size if isinstance(size, int) else None for size in value.shape),
    )


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    try:
        return _to_numpy(torch.empty(0, dtype=dtype)).dtype
    except TypeError:
        return None


def _outputs(result: Any) -> dict[str, Tensor]:
    """What a model returned, by name, as arrays; None is left out.

    Raises:
        TypeError: something that is no tensor and no number.
    """
    outputs: dict[str, Tensor] = {}
    for name, value in _named(result):
        if isinstance(value, torch.Tensor):
            outputs[name] = _to_numpy(value)
        elif isinstance(value, bool | int | float | complex):
            outputs[name] = np.asarray(value)
        elif value is not None:
            raise TypeError(f'output "{name}" is a {type(value).__qualname__}, no tensor: only a handler can answer it')
    return outputs


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a model returned, by name: a dict's own keys, "output" for one value, "output_0", … for several; what lies
    deeper has its place appended, as in "boxes_0"."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{name}_{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        fields = getattr(value, "_fields", None)
        for index, item in enumerate(value):
            place = fields[index] if fields else f"{'' if name else 'output_'}{index}"
            yield from _named(item, f"{name}_{place}" if name else place)
    else:
        yield name or "output", value


def _to_numpy(tensor: torch.Tensor) -> Tensor:
    array: Tensor
    if tensor.dtype == torch.bfloat16:
        array = tensor.detach().resolve_neg().view(torch.int16).numpy(force=True)
        return array.view(_BFLOAT16)
    array = tensor.numpy(force=True)
    return array
