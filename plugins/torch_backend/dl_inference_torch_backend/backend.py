"""The backend "torch": which file in a version's folder is the model, and how it becomes one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Backend, Model
from dl_inference_core.node.sources import imports_from, load_module

if TYPE_CHECKING:
    import torch

_SUFFIXES = (".pt2", ".pt", ".safetensors", ".pth")


class TorchBackend(Backend):
    """Loads `.pt2` (torch.export), TorchScript, state dicts and safetensors with a factory, and whole pickles."""

    name = "torch"

    class Options(PluginOptions):
        """Attributes:
        intra_op_threads: threads that one operator may use; torch's own default, a thread per core, if left out.
        inter_op_threads: threads that run independent operators of TorchScript; likewise.
        """

        intra_op_threads: int | None = Field(default=None, ge=1)
        inter_op_threads: int | None = Field(default=None, ge=1)

    class ModelOptions(PluginOptions):
        """Attributes:
        file: the model's file; needed only where the folder holds several that could be.
        factory: "module:function" beside the model that makes the `nn.Module` of a state dict.
        sha256: digests of files that may be unpickled whole, which runs whatever code is in them.
        allow_classes: classes, as "module.Class", that a whole pickle may hold; nothing else of it is run.
        """

        file: str | None = Field(default=None, pattern=r"^[^/\\]+$")
        factory: str = Field(default="model:create_model", pattern=r"^\w+:\w+$")
        sha256: tuple[str, ...] = ()
        allow_classes: tuple[str, ...] = ()

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
        import torch

        from dl_inference_torch_backend import files, modules

        self._set_threads()
        place = _device(device)
        path = _file(directory, options)
        try:
            if path.suffix == ".pt2":
                return modules.ExportedModel(files.load_exported(path, options.sha256), place)
            with imports_from(directory):
                content = path.read_bytes()
                if files.is_torchscript(content):
                    return modules.ScriptedModel(files.load_scripted(content, place), place)
                if path.suffix == ".safetensors":
                    module = _from_state(directory, options, files.load_safetensors(content))
                else:
                    module = files.unpickle(path, content, options.sha256, options.allow_classes)
                    if isinstance(module, dict):
                        module = _from_state(directory, options, module)
            if not isinstance(module, torch.nn.Module):
                raise ModelError(f"{path} holds a {type(module).__qualname__}; expected an nn.Module or a state dict")
            return modules.EagerModel(module, place)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{path} cannot be loaded") from error

    def _set_threads(self) -> None:
        """Once per process, before torch does any work in parallel: later it refuses."""
        import torch

        with self._lock:
            if not self._threads_set:
                self._threads_set = True
                if self.options.intra_op_threads is not None:
                    torch.set_num_threads(self.options.intra_op_threads)
                if self.options.inter_op_threads is not None:
                    torch.set_num_interop_threads(self.options.inter_op_threads)


def _candidates(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.suffix in _SUFFIXES and entry.is_file())


def _file(directory: Path, options: TorchBackend.ModelOptions) -> Path:
    names = _candidates(directory)
    if options.file is not None:
        if options.file not in names:
            raise ModelError(f"{directory} has no model file {options.file}; it has {', '.join(names) or 'none'}")
        return directory / options.file
    if len(names) != 1:
        raise ModelError(
            f"{directory} has {', '.join(names) or 'no model file'}: expected one file that ends in "
            f'{", ".join(_SUFFIXES)}, or `file = "…"` under [options] in model.toml'
        )
    return directory / names[0]


def _from_state(directory: Path, options: TorchBackend.ModelOptions, state: dict[str, Any]) -> torch.nn.Module:
    """What the factory makes, with the weights in `state`."""
    module_name, _, function = options.factory.partition(":")
    source = directory / f"{module_name}.py"
    if not source.is_file():
        raise ModelError(
            f"{directory} holds weights alone; expected {source.name} with a function {function}() that makes the "
            'nn.Module for them, or `factory = "module:function"` under [options] in model.toml'
        )
    factory = getattr(load_module(source), function, None)
    if not callable(factory):
        raise ModelError(f"{source} has no function {function}")
    module: torch.nn.Module = factory()
    module.load_state_dict(state)
    return module


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f'there is no device "{name}"; expected cpu, cuda, cuda:N or auto') from error
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= there):
        has = ", ".join(["cpu", *(f"cuda:{index}" for index in range(there))])
        raise ModelError(f'device "{name}" is not available; this machine has {has}')
    return device
