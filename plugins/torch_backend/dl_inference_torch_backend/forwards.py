"""Modules that are called by the names of their forward's arguments: Python's own, and TorchScript's."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from dl_inference_core.node.backend import Signature, TensorSpec
from dl_inference_core.tensors import Tensor
from dl_inference_torch_backend import integer_inputs
from dl_inference_torch_backend.devices import Device
from dl_inference_torch_backend.modules import TorchModel, numpy_dtype

_ANYTHING = frozenset({"", "Any", "object", "<class 'object'>"})
"""Annotations that do not tell whether an argument is a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """An argument of a forward.

    Attributes:
        name: its name.
        is_input: whether clients may give it. A flag or a number with a default is for handlers alone: by it a client
            would choose what the model does.
        optional: whether a call may leave it out.
        needs_none: whether a call that leaves it out must give None.
        by_place: whether a call must give it by position, as Python's positional-only arguments.
        is_list: whether it is a list of tensors.
        dtype: the kind of numbers that it holds, where its annotation says so: torch.int64, or torch.float32 for any
            floating-point dtype.
    """

    name: str
    is_input: bool
    optional: bool = False
    needs_none: bool = False
    by_place: bool = False
    is_list: bool = False
    dtype: torch.dtype | None = None


class Forward(torch.nn.Module):
    """Calls a module by its arguments' names; as a module itself, it takes the tensors of `order` and no names."""

    def __init__(self, module: torch.nn.Module, arguments: Sequence[Argument], order: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._call: Any = module.__call__  # a look-up of `module` goes through `__getattr__`, which takes 1 µs
        self.arguments = tuple(arguments)
        self.order = tuple(order)
        self.names = frozenset(argument.name for argument in arguments)
        self._by_place = tuple(argument.name for argument in arguments if argument.by_place)
        self._nones = {argument.name: None for argument in arguments if argument.needs_none}
        self._lists = frozenset(argument.name for argument in arguments if argument.is_list)

    @property
    def in_order(self) -> bool:
        """Whether the tensors of `order` are the first arguments of the module."""
        first = tuple(argument.name for argument in self.arguments[: len(self.order)])
        return self.order == first and not self._nones and self._lists.isdisjoint(first)

    def around(self, module: torch.nn.Module) -> Forward:
        """A Forward with the same arguments that calls `module`."""
        return Forward(module, self.arguments, self.order)

    def by_name(self, values: Mapping[str, Any]) -> Any:
        """Args:
        values: tensors, or for a list of tensors either a list or one tensor, whose rows are its items.
        """
        if self._nones or self._lists or self._by_place:
            named: dict[str, Any] = {**self._nones, **values}
            for name in self._lists & named.keys():
                if isinstance(named[name], torch.Tensor):
                    named[name] = list(named[name].unbind())
            given = takewhile(named.__contains__, self._by_place)
            return self._call(*[named.pop(name) for name in given], **named)
        return self._call(**values)

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.by_name(dict(zip(self.order, tensors, strict=True))) if self.order else self.module(*tensors)


class ForwardModel(TorchModel):
    """A module that is called by the names of its arguments. One without names takes one tensor, of any name."""

    def __init__(self, module: torch.nn.Module, arguments: Sequence[Argument], device: Device) -> None:
        inputs = [argument for argument in arguments if argument.is_input]
        self.order = tuple(argument.name for argument in inputs)
        self.signature = Signature(
            inputs=tuple(TensorSpec(name=argument.name, optional=argument.optional) for argument in inputs),
            positional=True,
        )
        super().__init__(module, Forward(module, arguments, self.order), device)

    def result(self, tensors: Mapping[str, Any]) -> Any:
        forward: Forward | None = self.core
        if forward is None or not forward.names:
            return super().result(tensors)
        if not forward.names.issuperset(tensors):
            raise self.mismatch(tensors, forward.names)
        try:
            return forward.by_name(tensors)
        except TypeError as error:
            if any(not spec.optional and spec.name not in tensors for spec in self.signature.inputs):
                raise self.mismatch(tensors, forward.names) from error
            raise

    def take_only(self, names: Sequence[str]) -> None:
        super().take_only(names)
        self.core = Forward(self.core.module, self.core.arguments, self.order)

    def state_numbers(self, sample: Mapping[str, Tensor]) -> None:
        """State for each input the dtype of numbers that have none of their own: that of the array in `sample`; else
        int64 where the annotation or the use of the input in the forward says that it holds integers; else the
        floating-point dtype of the weights. A model without such weights takes numbers as they are decoded."""
        weight = next((tensor for tensor in self.weights() if tensor.is_floating_point()), None)
        floating = None if weight is None else numpy_dtype(weight.dtype)
        stated = {argument.name: argument.dtype for argument in self.core.arguments}
        unknown = [name for name in self.order if name not in sample and stated[name] is None]
        integers = self.find_integers(unknown) if unknown else ()
        specs: list[TensorSpec] = []
        for spec in self.signature.inputs:
            if spec.name in sample:
                dtype: np.dtype[Any] | None = sample[spec.name].dtype
            elif spec.name in integers or stated[spec.name] == torch.int64:
                dtype = np.dtype(np.int64)
            else:
                dtype = floating
            specs.append(replace(spec, number_dtype=dtype))
        self.signature = replace(self.signature, inputs=tuple(specs))

    def weights(self) -> Iterator[torch.Tensor]:
        yield from self.core.module.parameters()
        yield from self.core.module.buffers()

    @abstractmethod
    def find_integers(self, names: Collection[str]) -> Collection[str]:
        """Those of the inputs `names` that hold integers."""


class EagerModel(ForwardModel):
    """An `nn.Module`; its inputs are the parameters of its forward that have no default, or that may be a tensor."""

    platform = "pytorch_eager"

    def __init__(self, module: torch.nn.Module, device: Device) -> None:
        module = module.to(device.place).eval()
        if getattr(module.forward, "__func__", None) is torch.nn.Module.forward:
            self.cannot_answer = f"{type(module).__qualname__} has no forward of its own"
        elif inspect.iscoroutinefunction(module.forward) or inspect.isasyncgenfunction(module.forward):
            self.cannot_answer = f"forward of {type(module).__qualname__} is async"
        parameters = inspect.signature(module.forward).parameters.values()
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        arguments = [_argument(parameter) for parameter in parameters if parameter.kind not in variable]
        super().__init__(module, arguments, device)

    def find_integers(self, names: Collection[str]) -> Collection[str]:
        required = [argument.name for argument in self.core.arguments if not argument.optional]
        return integer_inputs.of_module(self.core.module, {*names, *required}) & set(names)


def _argument(parameter: inspect.Parameter) -> Argument:
    """What the parameter of a forward takes, by its annotation as text, which need not be one that can be evaluated."""
    optional = parameter.default is not parameter.empty
    annotation = "" if parameter.annotation is parameter.empty else str(parameter.annotation).replace("typing.", "")
    is_list = annotation.removeprefix("Optional[").lower().startswith("list[")
    if annotation in _ANYTHING:
        may_be_tensor = parameter.default is None or isinstance(parameter.default, torch.Tensor)
    else:
        may_be_tensor = "Tensor" in annotation and not ("dict[" in annotation.lower() or "tuple[" in annotation.lower())
    integers = "LongTensor" in annotation or "IntTensor" in annotation
    return Argument(
        name=parameter.name,
        is_input=not optional or may_be_tensor,
        optional=optional,
        by_place=parameter.kind is parameter.POSITIONAL_ONLY,
        is_list=is_list and may_be_tensor,
        dtype=torch.int64 if integers else torch.float32 if "FloatTensor" in annotation else None,
    )


class ScriptedModel(ForwardModel):
    """A TorchScript module; its inputs are the arguments in its schema that have no default, or are tensors or lists of
    tensors. A client gives a list of tensors as one tensor, whose rows are the items."""

    platform = "pytorch_libtorch"  # Triton's name

    def __init__(self, module: torch.jit.ScriptModule, device: Device) -> None:
        arguments: Any = ()
        if hasattr(module, "forward"):
            arguments = module.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        else:
            self.cannot_answer = "the TorchScript module has no forward"
        super().__init__(module.eval(), [_scripted_argument(argument) for argument in arguments], device)

    def weights(self) -> Iterator[torch.Tensor]:
        yield from super().weights()
        yield from integer_inputs.constants(self.core.module)  # of a frozen module

    def find_integers(self, names: Collection[str]) -> Collection[str]:
        return integer_inputs.of_scripted(self.core.module)


def _scripted_argument(argument: Any) -> Argument:
    kind = argument.type
    may_be_none = isinstance(kind, torch.OptionalType)
    if may_be_none:
        kind = kind.getElementType()
    is_list = isinstance(kind, torch.ListType) and isinstance(kind.getElementType(), torch.TensorType)
    has_default = argument.has_default_value()
    return Argument(
        name=argument.name,
        is_input=is_list or isinstance(kind, torch.TensorType) or not (has_default or may_be_none),
        optional=has_default or may_be_none,
        needs_none=may_be_none and not has_default,
        is_list=is_list,
    )
