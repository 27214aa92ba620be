"""The backend "torch": which file in a version's folder is the model, and how it becomes one."""

from __future__ import annotations

import hashlib
import os
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Backend, Model
from dl_inference_core.node.samples import read_samples
from dl_inference_core.node.sources import imports_from, load_module
from dl_inference_torch_backend.selection import INDEX_SUFFIX, candidates, model_file

if TYPE_CHECKING:
    import torch

    from dl_inference_torch_backend.devices import Device
    from dl_inference_torch_backend.modules import TorchModel
    from dl_inference_torch_backend.weights import Weights


class TorchBackend(Backend):
    """Loads `.pt2` (torch.export), TorchScript, state dicts and safetensors with a factory, and whole pickles.

    The one file that ends in one of `selection.SUFFIXES`, or an index of weights in parts, is the model; where there
    are several, `file` says which. What a `.pt` or `.pth` is follows from what is in it.
    """

    name = "torch"

    class Options(PluginOptions):
        """Attributes:
        intra_op_threads: threads that one operator may use; if left out, OMP_NUM_THREADS of the environment, else a
            thread for each core of this worker's share; a CPU quota counts as so many cores, rounded up. Where one
            worker has all cores and no quota, torch's own default.
        inter_op_threads: threads that run independent operators of TorchScript; if left out, likewise, without
            OMP_NUM_THREADS.
        """

        intra_op_threads: int | None = Field(default=None, ge=1)
        inter_op_threads: int | None = Field(default=None, ge=1)

    class ModelOptions(PluginOptions):
        """Attributes:
        file: the model's file; needed only where the folder holds several that could be.
        factory: "module:function" beside the model that makes the `nn.Module` of a state dict.
        ignore_weights: names of weights, with `*` and `?`, that the file may lack and the module may not know, such as
            "*.position_ids"; what the file lacks is as the factory made it.
        sha256: digests in hex; with any, only files that have one of them are loaded, and those are unpickled whole,
            which runs whatever code is in them, unless there are `allow_classes`.
        allow_classes: classes, as "module.Class", that a whole pickle may hold; nothing else of it is run.
        execution: "auto" is as loaded; "eager" likewise, but takes the program of a package that holds compiled code
            as well; "frozen" is TorchScript with its weights as constants; "compile" is torch.compile; "aoti" is
            AOTInductor, loaded where the file is such a package and compiled at load where it is none.
        compile_mode: the mode of torch.compile.
        dtype: of the weights and of the floating-point inputs, which are converted; outputs are converted back.
        channels_last: whether images lie in memory with their channels last.
        cuda_graphs: numbers of rows for which a CUDA graph is recorded at load; without a CUDA device it has no effect.
        tolerance: how far, relative and absolute, the answers may be from those of the model as loaded; by default
            1e-4, with float16 1e-2, with bfloat16 5e-2.
        """

        file: str | None = Field(default=None, pattern=r"^[^/\\]+$")
        factory: str = Field(default="model:create_model", pattern=r"^\w+:\w+$")
        ignore_weights: tuple[str, ...] = ()
        sha256: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
        allow_classes: tuple[Annotated[str, Field(pattern=r"^\w+(\.\w+)+$")], ...] = ()
        execution: Literal["auto", "eager", "frozen", "compile", "aoti"] = "auto"
        compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
        dtype: Literal["float32", "bfloat16", "float16"] | None = None
        channels_last: bool = False
        cuda_graphs: tuple[Annotated[int, Field(ge=1)], ...] = ()
        tolerance: float | None = Field(default=None, ge=0)

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._threads_set = False
        self._lock = threading.Lock()

    @classmethod
    def recognises(cls, directory: Path) -> bool:
        return bool(candidates(directory))

    def load(self, directory: Path, options: PluginOptions, device: str) -> Model:
        assert isinstance(options, self.ModelOptions)
        self._set_threads()
        place = _device(device)
        path = model_file(directory, options.file)
        try:
            with imports_from(directory):
                return _run_as_said(_model(path, options, place), directory, options)
        except ModelError:
            raise
        except (Exception, SystemExit) as error:
            import torch

            raise ModelError(
                f"{path} cannot be loaded: it is damaged, or torch {torch.__version__} or the sources beside it "
                "are not those that it was saved with"
            ) from error

    def _set_threads(self) -> None:
        """Once per process; torch takes the number of inter-op threads only before its first parallel work.

        Raises:
            ModelError: it is too late for that.
        """
        # Large tensors in huge pages: a tensor of 200 MB is given back to the system in 1 ms in the place of 17 ms, in
        # which all threads wait. PyTorch reads this at its first allocation.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        import torch

        with self._lock:
            if self._threads_set:
                return
            share = 0 if "OMP_NUM_THREADS" in os.environ else self.cores
            intra, inter = self.options.intra_op_threads or share, self.options.inter_op_threads or self.cores
            if inter and inter != torch.get_num_interop_threads():
                try:
                    torch.set_num_interop_threads(inter)
                except RuntimeError as error:
                    if self.options.inter_op_threads is not None:
                        raise ModelError(
                            f"inter_op_threads is {torch.get_num_interop_threads()} in this process and cannot become "
                            f"{inter} any more: restart it"
                        ) from error
            if intra:
                torch.set_num_threads(intra)
            self.imported()
            self._threads_set = True


def _read(path: Path, options: TorchBackend.ModelOptions) -> bytes:
    """Raises:
    ModelError: the file is not of the format that its name says, or has another digest.
    """
    from dl_inference_torch_backend.files import refuse_foreign

    content = path.read_bytes()
    if not path.name.endswith(INDEX_SUFFIX):
        refuse_foreign(path, content)
    _check_digest(path, content, options)
    return content


def _check_digest(path: Path, content: bytes, options: TorchBackend.ModelOptions) -> None:
    if options.sha256 and (digest := hashlib.sha256(content).hexdigest()) not in options.sha256:
        raise ModelError(
            f"{path} has the SHA-256 {digest}, which is not in `sha256` under [options] in model.toml; "
            f'if you trust the file, put `sha256 = ["{digest}"]` there'
        )


def _model(path: Path, options: TorchBackend.ModelOptions, place: torch.device) -> TorchModel:
    import torch

    from dl_inference_torch_backend import files, forwards, modules, weights
    from dl_inference_torch_backend.devices import device_for

    content = _read(path, options)
    trusted = bool(options.sha256) and not options.allow_classes
    device = device_for(place)
    if path.suffix == ".pt2":
        from dl_inference_torch_backend import pt2

        if options.execution in ("auto", "aoti") and pt2.is_compiled(content):
            pt2.refuse_unsafe(path, content, trusted=trusted)
            return _compiled(path, content, device)
        return modules.ExportedModel(pt2.load_exported(path, content, trusted=trusted), device)
    unpickle = partial(files.unpickle, classes=options.allow_classes, trusted=trusted)
    if path.name.endswith(INDEX_SUFFIX):
        read = partial(_read, options=options)
        return forwards.EagerModel(
            _from_weights(path, options, weights.read_parts(path, content, read, unpickle)), device
        )
    if path.suffix == ".safetensors":
        return forwards.EagerModel(_from_weights(path, options, weights.read_weights(path, content, unpickle)), device)
    if files.is_torchscript(content):
        return forwards.ScriptedModel(files.load_scripted(content, place), device)
    held = unpickle(path, content)
    if isinstance(held, dict):
        held = _from_weights(path, options, weights.Weights(held))
    if not isinstance(held, torch.nn.Module):
        raise ModelError(f"{path} holds a {type(held).__qualname__}; expected an nn.Module or a state dict")
    return forwards.EagerModel(held, device)


def _compiled(path: Path, content: bytes, device: Device) -> TorchModel:
    from dl_inference_torch_backend import modules, pt2

    samples = read_samples(path.parent)
    if not samples:
        raise ModelError(
            f"{path} holds compiled code, which does not say what it takes; expected a sample.npz beside it, as "
            "numpy.savez writes it, with an array for each input in their order"
        )
    model = modules.CompiledModel(pt2.load_compiled(content, device.place), device, samples[0])
    for sample in samples:
        try:
            with model.session():
                model(model.signature.bind(sample))
        except Exception as error:
            raise ModelError(f"{path} does not take the samples that lie beside it") from error
    return model


def _run_as_said(model: TorchModel, directory: Path, options: TorchBackend.ModelOptions) -> TorchModel:
    """`model`, which from now on runs as `options` say; closed if it cannot."""
    from dl_inference_torch_backend.forwards import ForwardModel
    from dl_inference_torch_backend.modules import CompiledModel

    model.device.settle()
    try:
        if isinstance(model, ForwardModel) and not model.cannot_answer:
            model.state_numbers({name: array for sample in read_samples(directory) for name, array in sample.items()})
        if isinstance(model, CompiledModel):
            if options.dtype or options.channels_last or options.cuda_graphs:
                raise ModelError(
                    "an AOTInductor package runs as it was compiled; expected no dtype, channels_last or cuda_graphs"
                )
        elif (
            options.execution not in ("auto", "eager") or options.dtype or options.channels_last or options.cuda_graphs
        ):
            from dl_inference_torch_backend import execution

            execution.prepare(model, options, directory)
    except BaseException:
        model.close()
        raise
    return model


def _from_weights(path: Path, options: TorchBackend.ModelOptions, weights: Weights) -> torch.nn.Module:
    """What the factory makes, with `weights`."""
    import torch

    from dl_inference_torch_backend.weights import fill

    module_name, _, function = options.factory.partition(":")
    source = path.with_name(f"{module_name}.py")
    if not source.is_file():
        raise ModelError(
            f"{path} holds weights alone; expected {source.name} beside it with a function {function}() that makes "
            'the nn.Module for them, or `factory = "module:function"` under [options] in model.toml'
        )
    factory = getattr(load_module(source), function, None)
    if not callable(factory):
        raise ModelError(f"{source} has no function {function}")
    try:
        module = factory()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{function}() in {source} failed") from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{function}() in {source} gave a {type(module).__qualname__}; expected an nn.Module")
    try:
        fill(module, weights, options.ignore_weights)
    except Exception as error:
        raise ModelError(f"the weights in {path} do not fit the module that {function}() in {source} makes") from error
    return module


def _device(name: str) -> torch.device:
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f'there is no device "{name}"; expected cpu, cuda, cuda:N or auto') from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda" or (device.index or 0) >= there:
        has = ", ".join(["cpu", *(f"cuda:{index}" for index in range(there))])
        raise ModelError(f'device "{name}" is not available; this machine has {has}')
    return device
