"""Loaded PyTorch models: signatures, calls, and tensors to and from numpy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Tensor, mapped
from dl_inference_torch_backend import failures
from dl_inference_torch_backend.devices import Device

if TYPE_CHECKING:
    from torch.export.pt2_archive._package import AOTICompiledModel

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_GUARD = "Guard failed: "  # how the AssertionError of a program's own guards begins
_MOST_SHAPES = 4096


class TorchModel(Model):
    """What all PyTorch models share: the device, inference mode, conversions, and the place for another way to run."""

    order: tuple[str, ...] = ()
    """The inputs, in the order in which `core` takes them; none: one, of any name."""
    cannot_answer: str = ""
    """Why the model cannot answer a request by itself, a handler with a `run_model` of its own apart; "" if it can."""

    def __init__(self, native: Any, core: Any, device: Device, run: Callable[..., Any] | None = None) -> None:
        """Args:
        native: the framework's own callable.
        core: a module that takes the tensors of `order`.
        run: a faster way to call it.
        """
        self._native = native
        self.core = core
        self._run: Any = run or core
        self.device = device
        self._output_names: Sequence[str | None] | None = None
        """The names of what `_run` returns, if that is a flat sequence; None is left out."""
        self._constants: Sequence[tuple[str, Any]] = ()
        """Outputs that `_run` does not return."""

    @property
    def signatures(self) -> Mapping[str, Signature]:
        return {} if self.cannot_answer else super().signatures

    @property
    def unserved(self) -> Mapping[str, str]:
        return {DEFAULT_SIGNATURE: self.cannot_answer} if self.cannot_answer else {}

    @property
    def native(self) -> Any:
        return self._native

    def session(self) -> AbstractContextManager[Any]:
        return self.device.session()

    def to_native(self, value: Any) -> Any:
        return self._from_numpy(value) if isinstance(value, np.ndarray) else mapped(value, np.ndarray, self._from_numpy)

    def to_numpy(self, value: Any) -> Any:
        return mapped(value, torch.Tensor, self._to_numpy)

    def join(self, parts: Sequence[Any]) -> Any:
        return torch.cat(list(parts)) if isinstance(parts[0], torch.Tensor) else super().join(parts)

    def close(self) -> None:
        self._native = self.core = self._run = None

    @classmethod
    def return_memory(cls) -> None:
        torch.cuda.empty_cache()  # nothing where CUDA is not in use

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        tensors = self.tensors(inputs)
        try:
            result = self.result(tensors)
        except Exception as error:
            explained = self.explain(error)
            if explained is error:
                raise
            raise explained from error
        return self.outputs(self.named(result))

    def explain(self, error: BaseException) -> BaseException:
        return failures.explain(error)

    def run_as(self, run: Callable[..., Any], output_names: Sequence[str], constants: Mapping[str, Any]) -> None:
        """From now on have `run` give those outputs, from the tensors of `order`; `constants` are given beside them."""
        self._native = self._run = run
        self.core = None
        self._output_names = output_names
        self._constants = tuple(constants.items())

    def require(self, sample: Mapping[str, Tensor]) -> None:
        """From now on take nothing but the names, dtypes and numbers of dimensions of `sample`, which is in order, and
        what the signature says besides."""
        said = {spec.name: spec for spec in self.signature.inputs}
        specs: list[TensorSpec] = []
        for name, array in sample.items():
            shape = said[name].shape if name in said else None
            free = (None,) * array.ndim if shape is None else shape
            specs.append(TensorSpec(name=name, dtype=array.dtype, shape=free))
        self.order = tuple(sample)
        self.signature = replace(self.signature, inputs=tuple(specs))

    def take_only(self, names: Sequence[str]) -> None:
        """From now on take the inputs `names` and no others, in this order; all are required."""
        specs = {spec.name: replace(spec, optional=False) for spec in self.signature.inputs}
        self.order = tuple(names)
        self.signature = replace(self.signature, inputs=tuple(specs[name] for name in names))

    def tensors(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`inputs` with arrays and tensors, in lists and dicts too, as tensors on the model's device."""
        return {
            name: self._from_numpy(value) if isinstance(value, np.ndarray) else self._placed(value)
            for name, value in inputs.items()
        }

    def arguments(self, tensors: Mapping[str, Any]) -> list[Any]:
        """`tensors` in the order of `core`.

        Raises:
            BadRequest: the model does not take them.
        """
        if self.order or self.signature.exact:
            if len(tensors) != len(self.order) or not tensors.keys() >= set(self.order):
                raise self.mismatch(tensors, self.order)
            return [tensors[name] for name in self.order]
        if len(tensors) != 1:
            raise BadRequest(f"the model does not name its inputs and takes one tensor, not {len(tensors)}")
        return list(tensors.values())

    def mismatch(self, given: Iterable[str], names: Collection[str]) -> BadRequest:
        """What to raise for inputs of the names `given`, where the model takes `names`: one is unknown, or missing."""
        takes = f"it takes {', '.join(map(str, self.signature.inputs)) or 'no inputs'}"
        if unknown := [name for name in given if name not in names]:
            return BadRequest(f'the model has no input "{unknown[0]}"; {takes}')
        missing = [spec.name for spec in self.signature.inputs if not spec.optional and spec.name not in given]
        return BadRequest(f'the input "{missing[0]}" is missing; {takes}')

    def result(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What the model returns for `tensors`."""
        return self._run(*self.arguments(tensors))

    def named(self, result: Any) -> list[tuple[str, Any]]:
        """What the model returned, by name."""
        if self._output_names is not None:
            pairs = zip(self._output_names, result, strict=True)
            return [*[(name, value) for name, value in pairs if name is not None], *self._constants]
        if isinstance(result, torch.Tensor):
            return [("output", result)]
        return list(named(result))

    def outputs(self, named: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
        """As arrays; None is left out.

        Raises:
            TypeError: an output is neither a tensor nor a number, or two outputs have the same name.
        """
        tensors = iter(self.device.download([value for _, value in named if isinstance(value, torch.Tensor)]))
        outputs: dict[str, Tensor] = {}
        for name, value in named:
            if name in outputs:
                raise TypeError(_meet(name))
            if isinstance(value, torch.Tensor):
                outputs[name] = _array(next(tensors))
            elif isinstance(value, bool | int | float | complex):
                outputs[name] = np.asarray(value)
            elif value is not None:
                kind = type(value).__qualname__
                raise TypeError(
                    f'output "{name}" has the type {kind}; expected a tensor or a number: a handler can convert it'
                )
        return outputs

    def _from_numpy(self, array: Tensor) -> torch.Tensor:
        bfloat16 = array.dtype == _BFLOAT16
        try:
            tensor = self.device.upload(array.view(np.int16) if bfloat16 else array)
        except TypeError as error:
            dtype = "string" if array.dtype.kind in "OSU" else array.dtype.name
            raise BadRequest(f"torch models take no {dtype} tensors") from error
        return tensor.view(torch.bfloat16) if bfloat16 else tensor

    def _placed(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.device.place_tensor(value)
        return mapped(self.to_native(value), torch.Tensor, self.device.place_tensor)

    def _to_numpy(self, tensor: torch.Tensor) -> Tensor:
        return _array(self.device.download([tensor])[0])


class ExportedModel(TorchModel):
    """A torch.export program; names, dtypes, shapes and their limits are those it was exported with."""

    platform = "pytorch_exported"

    def __init__(self, program: torch.export.ExportedProgram, device: Device) -> None:
        """Raises:
        ModelError: it takes anything but tensors and constants, or the names of two inputs or outputs are the same.
        """
        program = move_to_device_pass(program, device.place)
        module: Any = program.module()
        _take_names(module, program)
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        arguments = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
        names = _input_names(program, [argument.name for argument in arguments])
        specs: list[TensorSpec] = []
        self._given: list[int | ConstantArgument] = []
        """What the guards take: places in `order`, and constants."""
        for name, argument in zip(names, arguments, strict=True):
            if isinstance(argument, ConstantArgument):
                self._given.append(argument)
            elif isinstance(argument, TensorArgument):
                self._given.append(len(specs))
                specs.append(_spec(name, values[argument.name]))
            else:
                raise ModelError(f'the program takes "{name}" as a number; export it with tensors only')
        self.order = tuple(spec.name for spec in specs)
        if len(set(self.order)) < len(specs):
            raise ModelError(f"two inputs of the program have the same name; it takes {', '.join(self.order)}")
        constants = {index: item.value for index, item in enumerate(self._given) if isinstance(item, ConstantArgument)}
        self._guards: Callable[..., Any] | None = getattr(module, "_guards_fn", None)
        self._admitted: set[tuple[torch.Size, ...]] = set()
        # Its own forward flattens and unflattens Python's containers, which takes 50 µs, and runs the guards, 25 µs.
        graph = flat_graph(module, constants)
        super().__init__(module, graph, device, graph.forward)
        self.signature = Signature(inputs=tuple(specs), outputs=_output_specs(program, values), exact=True)
        self._output_names = _output_names(program)

    def arguments(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        arguments = super().arguments(tensors)
        if self._guards is not None:
            shapes = tuple(tensor.shape for tensor in arguments)
            if shapes not in self._admitted:
                self._admit(
                    tensors, [item.value if not isinstance(item, int) else arguments[item] for item in self._given]
                )
                if len(self._admitted) >= _MOST_SHAPES:
                    self._admitted.clear()
                self._admitted.add(shapes)
        return arguments

    def _admit(self, tensors: Mapping[str, torch.Tensor], given: Sequence[Any]) -> None:
        """Raises:
        BadRequest: shapes that the program was not exported for.
        """
        assert self._guards is not None
        try:
            self._guards(*given)
        except AssertionError as error:
            if not str(error).startswith(_GUARD):
                raise
            shapes = ", ".join(f'"{name}" {list(tensor.shape)}' for name, tensor in tensors.items())
            condition = str(error).removeprefix(_GUARD)
            raise BadRequest(f"the model only takes inputs with {condition}; got the shapes {shapes}") from error

    def close(self) -> None:
        super().close()
        self._guards = None


class CompiledModel(TorchModel):
    """An AOTInductor package, which is machine code. It does not say what it takes, so a sample does: names, dtypes and
    numbers of dimensions."""

    platform = "torch_aoti"  # Triton's name

    def __init__(self, package: AOTICompiledModel, device: Device, sample: Mapping[str, Tensor]) -> None:
        """Args:
        sample: its arrays in the order of the inputs, those given by keyword under their names.

        Raises:
            ModelError: the package takes others.
        """
        in_spec, out_spec = (pytree.treespec_loads(spec) for spec in package.loader.get_call_spec())
        _, kwargs = pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
        keywords = [name for name, _ in named(kwargs)]
        positional = in_spec.num_leaves - len(keywords)
        if len(sample) != in_spec.num_leaves or list(sample)[positional:] != keywords:
            names = ", ".join([*["any"] * positional, *keywords])
            raise ModelError(f"the package takes the inputs {names}; sample.npz has {', '.join(sample)}")
        super().__init__(package, None, device, CompiledRun(package))
        self.require(sample)
        self._output_names = _names_of(out_spec)


class CompiledRun:
    """Runs what an AOTInductor package holds, on flat inputs. It checks sizes and dtypes, but no number of dimensions:
    a tensor that has another makes it read what is not there."""

    def __init__(self, package: AOTICompiledModel) -> None:
        self._boxed_run = package.loader.boxed_run  # the package's own call reads its specs anew each time
        # Without it torch 2.13 deadlocks: who waits for the one runner keeps the GIL, which the runner wants back.
        self._lock = threading.Lock()

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """Raises:
        BadRequest: a dtype or shape that it was not compiled for.
        """
        try:
            with self._lock:
                outputs: list[torch.Tensor] = self._boxed_run([_dense(tensor) for tensor in tensors])
        except RuntimeError as error:
            if not str(error).startswith("input_handles["):  # its own check
                raise
            words = str(error).strip().partition("\n")[0].removeprefix("input_handles")
            raise BadRequest(f"the model was compiled for other inputs: input {words}") from error
        return outputs


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with the strides that compiled code looks for, also where a size of 0 or 1 leaves them open."""
    tensor = tensor.contiguous()
    shape = tensor.shape
    return tensor.reshape(-1).view(shape) if 0 in shape or 1 in shape else tensor


def flat_graph(module: Any, constants: Mapping[int, Any]) -> torch.fx.GraphModule:
    """The graph of a `program.module()` without guards, on flat tensors, returning a flat tuple; it shares the weights.

    Args:
        constants: the values of inputs that are none, by their place.
    """
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, Any] = {}
    places = iter(range(len(module.graph.nodes)))
    for node in module.graph.nodes:
        if node.op == "placeholder" and (place := next(places)) in constants:
            copies[node] = constants[place]
        elif node.op == "output":
            graph.output(torch.fx.node.map_arg(node.args[0], copies.__getitem__))
        elif not (node.op == "call_module" and node.target == "_guards_fn"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.set_codegen(CodeGen())
    return torch.fx.GraphModule(module, graph)


def _take_names(module: torch.nn.Module, program: torch.export.ExportedProgram) -> None:
    """Let handlers give `module`, a `program.module()`, each argument by position or by name, as they can an eager
    module. By itself it takes an argument only in the way in which it was exported."""
    in_spec = program.call_spec.in_spec
    signature = program.module_call_graph[0].signature
    if in_spec is None or signature is None or signature.forward_arg_names is None:
        return
    names = tuple(signature.forward_arg_names)
    exported, _ = pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
    positional = names[: len(exported)]

    def arrange(
        _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if len(args) > len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            return None  # the module itself says what is wrong
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return tuple([given.pop(name) for name in positional if name in given]), given

    module.register_forward_pre_hook(arrange, prepend=True, with_kwargs=True)


def _input_names(program: torch.export.ExportedProgram, graph_names: list[str]) -> list[str]:
    """The name of each flat input: the parameter of `forward`, and what `named` appends for what it holds; the graph's
    own name where the program does not say."""
    in_spec = program.call_spec.in_spec
    signature = program.module_call_graph[0].signature
    names = list(graph_names)
    if in_spec is not None and signature is not None:
        args, kwargs = pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
        parameters = [*zip(signature.forward_arg_names or (), args, strict=False), *kwargs.items()]
        for parameter, value in parameters:
            for name, place in named(value, parameter):
                if isinstance(place, int):  # a container of a kind that `named` does not know, otherwise
                    names[place] = name
    return names


def _output_names(program: torch.export.ExportedProgram) -> list[str | None]:
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    return _names_of(out_spec)


def _names_of(out_spec: pytree.TreeSpec) -> list[str | None]:
    """The name of each flat output.

    Raises:
        ModelError: two outputs have the same name.
    """
    names: list[str | None] = [None] * out_spec.num_leaves
    for name, place in named(pytree.tree_unflatten(list(range(out_spec.num_leaves)), out_spec)):
        if isinstance(place, int):  # a container of a kind that `named` does not know, otherwise
            if name in names:
                raise ModelError(_meet(name))
            names[place] = name
    return names


def _meet(name: str) -> str:
    return f'two outputs have the name "{name}" once nested keys are joined by "_"; give one of them another key'


def _output_specs(program: torch.export.ExportedProgram, values: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    arguments = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    leaves = [arg.value if isinstance(arg, ConstantArgument) else values.get(arg.name) for arg in arguments]
    named = zip(_output_names(program), leaves, strict=True)
    return tuple(_spec(name, value) for name, value in named if name is not None and value is not None)


def _spec(name: str, value: Any) -> TensorSpec:
    if not isinstance(value, torch.Tensor):
        return TensorSpec(name=name)
    return TensorSpec(
        name=name,
        dtype=numpy_dtype(value.dtype),
        shape=tuple(size if isinstance(size, int) else None for size in value.shape),
    )


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    """numpy's name for a dtype of torch's; None if it has none."""
    try:
        return _array(torch.empty(0, dtype=dtype)).dtype
    except TypeError:
        return None


def named(value: Any, name: str = "", word: str = "output") -> Iterator[tuple[str, Any]]:
    """What a model returned, by name: a dict's own keys, `word` for one value, "output_0", … for several; what lies
    deeper has its place appended, as in "boxes_0"."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from named(item, f"{name}_{key}" if name else str(key), word)
    elif isinstance(value, list | tuple):
        fields = getattr(value, "_fields", None)
        for index, item in enumerate(value):
            place = fields[index] if fields else f"{'' if name else f'{word}_'}{index}"
            yield from named(item, f"{name}_{place}" if name else place, word)
    else:
        yield name or word, value


def _array(tensor: torch.Tensor) -> Tensor:
    """A tensor in the host's memory as an array."""
    array: Tensor
    if tensor.dtype == torch.bfloat16:
        array = tensor.detach().resolve_neg().view(torch.int16).numpy(force=True)
        return array.view(_BFLOAT16)
    array = tensor.numpy(force=True)
    return array
