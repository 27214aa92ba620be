"""Ways to run a model that need a compiler. Imported by `execution` when one of them is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._inductor import aoti_compile_and_package
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from dl_inference_core.errors import ModelError
from dl_inference_torch_backend.execution import Flat, ModelOptions, Trial, free_places, in_words
from dl_inference_torch_backend.forwards import ScriptedModel
from dl_inference_torch_backend.modules import CompiledRun, TorchModel, flat_graph
from dl_inference_torch_backend.pt2 import load_compiled

# torch.compile logs a traceback for inputs of a shape that the model does not take, which the client is told of.
logging.getLogger("torch._subclasses.fake_tensor").addFilter(
    lambda record: not record.getMessage().startswith("failed while attempting to run meta")
)


def compile_now(model: TorchModel, flat: Flat, trials: Sequence[Trial], options: ModelOptions) -> Callable[..., Any]:
    # torch.compile itself would look the sources of a module up by name, long after `imports_from` has ended, and take
    # those of another version for them. A graph has none.
    graph = flat_graph(_exported(model, flat, trials, options).module(), {})
    compiled: Callable[..., Any] = torch.compile(graph, mode=options.compile_mode)
    tensors = model.arguments(model.tensors(trials[0].inputs))
    for tensor, places in zip(tensors, free_places(model, tensors), strict=True):
        for place in places:
            torch._dynamo.maybe_mark_dynamic(tensor, place)
    compiled(*tensors)
    return compiled


def compile_ahead(model: TorchModel, flat: Flat, trials: Sequence[Trial], options: ModelOptions) -> Callable[..., Any]:
    program = _exported(model, flat, trials, options)
    # It would take 2 rows or more only, as if it had been written for no fewer.
    settings = {"aot_inductor.check_lowerbound": False}
    with TemporaryDirectory() as folder:
        package = str(Path(folder, "model.pt2"))
        path = aoti_compile_and_package(program, package_path=package, inductor_configs=settings)
        run = CompiledRun(load_compiled(Path(path).read_bytes(), model.device.place))
    model.require(trials[0].inputs)
    return run


def _exported(
    model: TorchModel, flat: Flat, trials: Sequence[Trial], options: ModelOptions
) -> torch.export.ExportedProgram:
    """`flat` as a graph, with the sizes free that may change.

    Raises:
        ModelError: there is no C++ compiler for it; it is TorchScript.
    """
    if isinstance(model, ScriptedModel):
        raise ModelError(
            f'TorchScript cannot be run with {in_words(options)}; expected "eager" or "frozen", or another kind of file'
        )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ModelError(
            f"{in_words(options)} needs a C++ compiler and there is none: install g++, or name one in the "
            "environment variable CXX"
        ) from error
    tensors = model.arguments(model.tensors(trials[0].inputs))
    free = tuple(dict.fromkeys(places, torch.export.Dim.AUTO) for places in free_places(model, tensors))
    with torch.inference_mode(False), torch.no_grad():
        # What was made in inference mode cannot be exported.
        inputs = tuple([tensor.clone() for tensor in tensors])
        return torch.export.export(flat, inputs, dynamic_shapes=(free,))
