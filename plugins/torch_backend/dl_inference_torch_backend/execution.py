"""Ways to run a model other than as it was loaded, each compared with that before it answers anybody.

Call it inside `imports_from`, one thread at a time, as `files`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Signature
from dl_inference_core.node.samples import of_rows, read_samples, rows_of, samples
from dl_inference_core.tensors import Tensor
from dl_inference_torch_backend.backend import TorchBackend
from dl_inference_torch_backend.forwards import ScriptedModel
from dl_inference_torch_backend.modules import ExportedModel, TorchModel

ModelOptions: TypeAlias = TorchBackend.ModelOptions

_ROWS = (2, 1, 7, 32)
_TOLERANCE = {None: 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True, slots=True)
class Trial:
    """Inputs in the model's order, and what it gave for them as it was loaded."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    raw: Sequence[tuple[str, Any]]
    """The same as torch's tensors and Python's numbers."""

    @property
    def rows(self) -> int:
        return rows_of(self.inputs)


def prepare(model: TorchModel, options: ModelOptions, directory: Path) -> None:
    """Have `model` run as `options` say, once it was seen to answer as it did before: on the samples in `directory`, or
    on those that its signature gives, at several numbers of rows.

    Raises:
        ModelError: there are no samples; the model cannot be run so; its answers differ by more than the tolerance.
    """
    if options.execution == "aoti" and options.cuda_graphs:
        raise ModelError('execution = "aoti" and cuda_graphs exclude each other; expected one of them')
    with model.session(), warnings.catch_warnings():
        # torch deprecates TorchScript at each step, and warns of what a trace leaves out: that is what is checked here.
        warnings.simplefilter("ignore")
        trials = _trials(model, directory, options.cuda_graphs)
        if model.order:
            model.take_only(tuple(trials[0].inputs))
        try:
            _change(model, options, trials)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"the model cannot be run with {in_words(options)}") from error
        _compare(model, options, trials)


def _trials(model: TorchModel, directory: Path, wanted: Sequence[int]) -> list[Trial]:
    """The first has more than one row, where the model takes that: of one, tracers and compilers make a constant."""
    trials: dict[Any, Trial] = {}
    failure: Exception | None = None
    for inputs, required in _inputs(model.signature, directory, wanted):
        shapes = tuple((name, array.shape) for name, array in inputs.items())
        if shapes in trials:
            continue
        try:
            bound = model.signature.bind(inputs)
            result = model.result(model.tensors(bound))
            raw = [(name, value) for name, value in model.named(result) if value is not None]
            trials[shapes] = Trial(bound, model.outputs(raw), raw)
        except Exception as error:
            failure = error
            if required:
                break
    else:
        if len({tuple(trial.inputs) for trial in trials.values()}) > 1:
            raise ModelError(f"the samples in {directory} have different inputs; expected the same in all of them")
        if trials and {trial.rows for trial in trials.values()}.issuperset(wanted):
            return list(trials.values())
    raise ModelError(
        f"the model as it was loaded fails on samples, or has no batches of the sizes in cuda_graphs; expected a "
        f"sample.npz in {directory} that it takes, as numpy.savez writes it"
    ) from failure


def _inputs(
    signature: Signature, directory: Path, wanted: Sequence[int]
) -> Iterator[tuple[Mapping[str, Tensor], bool]]:
    """Samples of several numbers of rows, and whether the model must take them."""
    found = read_samples(directory)
    for sample in found:
        own = rows_of(sample)
        for rows in dict.fromkeys((own, *_ROWS, *wanted) if own > 1 else (*_ROWS, *wanted)):
            yield of_rows(sample, rows, signature), rows == own or rows in wanted
    if found:
        return
    generator = np.random.default_rng(0)
    for rows in dict.fromkeys((*_ROWS, *wanted)):
        made = samples(signature, rows, generator)
        if made is None:
            raise ModelError(
                f"what the options change is compared on samples; expected a sample.npz in {directory}, as numpy.savez "
                "writes it, with an array for each input, since the model does not say what it takes"
            )
        yield made, rows in wanted


class Flat(torch.nn.Module):
    """A model on tensors in order, which returns tensors alone, of the dtypes that they had when it was loaded."""

    def __init__(self, core: torch.nn.Module, trial: Trial, options: ModelOptions) -> None:
        super().__init__()
        self.core = core
        self._dtypes = [value.dtype for _, value in trial.raw if isinstance(value, torch.Tensor)]
        self._dtype: torch.dtype | None = getattr(torch, options.dtype) if options.dtype else None
        self._channels_last = options.channels_last

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = _gathered(self.core(*[self._fit(tensor) for tensor in tensors]))
        if self._dtype is not None:
            outputs = [tensor.to(dtype) for tensor, dtype in zip(outputs, self._dtypes, strict=True)]
        return tuple(outputs)

    def _fit(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        if self._channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def _gathered(value: Any) -> list[torch.Tensor]:
    """The tensors in `value`, in the order of `modules.named`."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _gathered(item)]


def _change(model: TorchModel, options: ModelOptions, trials: Sequence[Trial]) -> None:
    first = trials[0]
    numbers = {name: value for name, value in first.raw if not isinstance(value, torch.Tensor)}
    if numbers and not isinstance(model, ExportedModel):  # whose numbers are constants
        raise ModelError(
            f'with {in_words(options)} a model gives tensors only, but output "{min(numbers)}" is a number'
        )
    core = model.core
    if options.dtype:
        core.to(getattr(torch, options.dtype))
    if options.channels_last:
        core.to(memory_format=torch.channels_last)
    flat = Flat(core, first, options)
    run = _way(options.execution)(model, flat.eval(), trials, options)
    model.device.settle()
    if options.cuda_graphs:
        recorded = [trial for trial in trials if trial.rows in options.cuda_graphs]
        run = model.device.graphed(run, [model.arguments(model.tensors(trial.inputs)) for trial in recorded])
    names = [name for name, value in first.raw if isinstance(value, torch.Tensor)]
    model.run_as(run, names, numbers)


def _run_eager(model: TorchModel, flat: Flat, trials: Sequence[Trial], options: ModelOptions) -> Callable[..., Any]:
    return flat.forward


def _freeze(model: TorchModel, flat: Flat, trials: Sequence[Trial], options: ModelOptions) -> Callable[..., Any]:
    """TorchScript is frozen as it is, an exported program as TorchScript of its graph; a module is traced, conversions
    and all."""
    if isinstance(model, ExportedModel | ScriptedModel):
        frozen: torch.nn.Module
        if isinstance(model, ExportedModel):
            frozen = _frozen(torch.jit.script(_scriptable(model.core)))
        else:
            frozen = _frozen(model.core.module)
            frozen = frozen if model.core.in_order else model.core.around(frozen)
        if options.dtype or options.channels_last:
            flat.core = frozen
            return flat.forward
        forward: Callable[..., Any] = frozen.forward
        return lambda *tensors: _gathered(forward(*tensors))
    inputs = tuple(model.arguments(model.tensors(trials[0].inputs)))
    traced: Any = torch.jit.trace(flat, inputs, check_trace=False)  # type: ignore[no-untyped-call]
    return _frozen(traced)


def _frozen(module: Any) -> torch.jit.ScriptModule:
    frozen: torch.jit.ScriptModule = torch.jit.optimize_for_inference(torch.jit.freeze(module.eval()))
    return frozen


def _scriptable(core: torch.nn.Module) -> torch.fx.GraphModule:
    """The graph of an exported program in the words that TorchScript knows: operators without their overloads."""
    assert isinstance(core, torch.fx.GraphModule)
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(core.graph, {}))
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.target = torch.ops.aten.size
        elif isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
    return torch.fx.GraphModule(core, graph)


def _way(execution: str) -> Callable[[TorchModel, Flat, Sequence[Trial], ModelOptions], Callable[..., Any]]:
    if execution in ("compile", "aoti"):
        from dl_inference_torch_backend import compiling  # and 70 MB of compilers

        return compiling.compile_now if execution == "compile" else compiling.compile_ahead
    return _freeze if execution == "frozen" else _run_eager


def in_words(options: ModelOptions) -> str:
    """What of `options` changes how a model runs, as it stands in a `model.toml`."""
    words = [] if options.execution in ("auto", "eager") else [f'execution = "{options.execution}"']
    words += [f'dtype = "{options.dtype}"'] if options.dtype else []
    words += ["channels_last = true"] if options.channels_last else []
    return ", ".join(words or [f"cuda_graphs = {list(options.cuda_graphs)}"])


def free_places(model: TorchModel, tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """The places of the sizes of each input that may change: those that the signature leaves free, or the first."""
    shapes = {spec.name: spec.shape for spec in model.signature.inputs}
    free: list[list[int]] = []
    for name, tensor in zip(model.order or ("",), tensors, strict=True):
        shape = shapes.get(name)
        if shape is None:
            free.append([0] if tensor.dim() else [])
        else:
            free.append([place for place, size in enumerate(shape) if size is None])
    return free


def _compare(model: TorchModel, options: ModelOptions, trials: Sequence[Trial]) -> None:
    tolerance = _TOLERANCE[options.dtype] if options.tolerance is None else options.tolerance
    for trial in trials:
        try:
            outputs = model(model.signature.bind(trial.inputs))
        except Exception as error:
            raise ModelError(
                f"with {in_words(options)} the model fails on {trial.rows} rows, which it takes as it was loaded"
            ) from error
        for name, expected in trial.outputs.items():
            if (words := _difference(outputs[name], expected, tolerance)) is not None:
                raise ModelError(
                    f'with {in_words(options)} the model answers otherwise than as it was loaded: output "{name}" of '
                    f"{trial.rows} rows {words}; the tolerance, relative and absolute, is {tolerance:g}: if that is "
                    "close enough, set a larger `tolerance` under [options] in model.toml"
                )


def _difference(given: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """Where `given` is farthest from `expected`, beyond `tolerance` * (1 + |expected|); None: nowhere. NaN is NaN."""
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return f"is {given.dtype} {list(given.shape)} and was {expected.dtype} {list(expected.shape)}"
    if not given.size:
        return None
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    new, old = np.atleast_1d(given.astype(wide)), np.atleast_1d(expected.astype(wide))
    same = (new == old) | (np.isnan(new) & np.isnan(old))
    with np.errstate(invalid="ignore"):
        beyond = np.where(same, -math.inf, np.abs(new - old) - tolerance * (1 + np.abs(old)))
    beyond[np.isnan(beyond)] = math.inf  # a NaN on one side, or infinities of two signs
    if not (beyond > 0).any():
        return None
    place = np.unravel_index(np.argmax(beyond), beyond.shape)
    with np.errstate(invalid="ignore"):
        distance = abs(new[place] - old[place])
    where = [int(index) for index in place] if given.ndim else []
    return f"is {new[place]:.6g} and was {old[place]:.6g} at {where}, a difference of {distance:.3g}"
