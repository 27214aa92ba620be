"""The backend "torch": which file in a version's folder is the model, and how it becomes one."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Backend, Model
from dl_inference_core.node.samples import read_samples
from dl_inference_core.node.sources import imports_from, load_module

if TYPE_CHECKING:
    import torch

    from dl_inference_torch_backend.devices import Device
    from dl_inference_torch_backend.modules import TorchModel

SUFFIXES = (".pt2", ".safetensors", ".pt", ".pth")


class TorchBackend(Backend):
    """Loads `.pt2` (torch.export), TorchScript, state dicts and safetensors with a factory, and whole pickles.

    The one file that ends in one of `SUFFIXES` is the model; where there are several, `file` says which. What a `.pt`
    or `.pth` is follows from what is in it.
    """

    name = "torch"

    class Options(PluginOptions):
        """Attributes:
        intra_op_threads: threads that one operator may use; if left out, a thread for each core of this worker's share,
            which is torch's own default where there is one worker.
        inter_op_threads: threads that run independent operators of TorchScript; likewise.
        """

        intra_op_threads: int | None = Field(default=None, ge=1)
        inter_op_threads: int | None = Field(default=None, ge=1)

    class ModelOptions(PluginOptions):
        """Attributes:
        file: the model's file; needed only where the folder holds several that could be.
        factory: "module:function" beside the model that makes the `nn.Module` of a state dict.
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
        return bool(_candidates(directory))

    def load(self, directory: Path, options: PluginOptions, device: str) -> Model:
        assert isinstance(options, self.ModelOptions)
        self._set_threads()
        place = _device(device)
        path = _file(directory, options)
        try:
            content = path.read_bytes()
            _check_digest(path, content, options)
            with imports_from(directory):
                return _run_as_said(_model(path, content, options, place), directory, options)
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
        import torch

        with self._lock:
            if self._threads_set:
                return
            intra, inter = self.options.intra_op_threads or self.cores, self.options.inter_op_threads
            if inter is not None and inter != torch.get_num_interop_threads():
                try:
                    torch.set_num_interop_threads(inter)
                except RuntimeError as error:
                    raise ModelError(
                        f"inter_op_threads is {torch.get_num_interop_threads()} in this process and cannot become "
                        f"{inter} any more: restart it"
                    ) from error
            if intra:
                torch.set_num_threads(intra)
            self.imported()
            self._threads_set = True


def _candidates(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir() if entry.suffix in SUFFIXES and entry.is_file())
    except OSError:
        return []


def _file(directory: Path, options: TorchBackend.ModelOptions) -> Path:
    names = _candidates(directory)
    if options.file is not None:
        if options.file not in names:
            raise ModelError(f"{directory} has no model file {options.file}; it has {', '.join(names) or 'none'}")
        return directory / options.file
    if not names:
        raise ModelError(f"{directory} has no file that ends in one of {', '.join(SUFFIXES)}")
    if len(names) > 1:
        raise ModelError(
            f"{directory} has several files that could be the model, {', '.join(names)}: say which with "
            f'`file = "{names[0]}"` under [options] in model.toml'
        )
    return directory / names[0]


def _check_digest(path: Path, content: bytes, options: TorchBackend.ModelOptions) -> None:
    if options.sha256 and (digest := hashlib.sha256(content).hexdigest()) not in options.sha256:
        raise ModelError(
            f"{path} has the SHA-256 {digest}, which is not in `sha256` under [options] in model.toml; "
            f'if you trust the file, put `sha256 = ["{digest}"]` there'
        )


def _model(path: Path, content: bytes, options: TorchBackend.ModelOptions, place: torch.device) -> TorchModel:
    import torch

    from dl_inference_torch_backend import files, modules
    from dl_inference_torch_backend.devices import device_for

    trusted = bool(options.sha256) and not options.allow_classes
    device = device_for(place)
    if path.suffix == ".pt2":
        from dl_inference_torch_backend import pt2

        if options.execution in ("auto", "aoti") and pt2.is_compiled(content):
            pt2.refuse_unsafe(path, content, trusted=trusted)
            return _compiled(path, content, device)
        return modules.ExportedModel(pt2.load_exported(path, content, trusted=trusted), device)
    if path.suffix == ".safetensors":
        return modules.EagerModel(_from_state(path, options, files.load_safetensors(content)), device)
    if files.is_torchscript(content):
        return modules.ScriptedModel(files.load_scripted(content, place), device)
    held = files.unpickle(path, content, options.allow_classes, trusted=trusted)
    if isinstance(held, dict):
        held = _from_state(path, options, held)
    if not isinstance(held, torch.nn.Module):
        raise ModelError(f"{path} holds a {type(held).__qualname__}; expected an nn.Module or a state dict")
    return modules.EagerModel(held, device)


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
    from dl_inference_torch_backend.modules import CompiledModel

    model.device.settle()
    try:
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


def _from_state(path: Path, options: TorchBackend.ModelOptions, state: dict[str, Any]) -> torch.nn.Module:
    """What the factory makes, with the weights in `state`."""
    import torch

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
        module.load_state_dict(state)
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
