"""From a version's folder to a model and its handler: `model.toml`, which backend, which handler."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field

from dl_inference_core.config import NamedModel, PluginOptions, validated
from dl_inference_core.errors import ModelError
from dl_inference_core.node.answering import Instance, Loaded
from dl_inference_core.node.backend import Backend
from dl_inference_core.node.batching import BatchingConfig
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.processor import Processor
from dl_inference_core.node.scheduling import QueueLimits
from dl_inference_core.node.sources import load_module
from dl_inference_core.node.warm_up import warm_up

CONFIG_FILE = "model.toml"

T = TypeVar("T")

_log = logging.getLogger(__name__)


class ModelConfig(PluginOptions):
    """What `model.toml` says, in a model's folder or in a version's, whose keys take the place of the model's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    task_id: int | None = Field(default=None, ge=0, lt=2**63)
    """the number that `textcnn-69` and `taskId: 69` mean; in the model's folder only"""
    keep_versions: int = Field(default=2, ge=1)
    """how many versions are served: the newest that load; those before them answer requests that name them; in the
    model's folder only"""
    versions: Literal["newest", "all"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = (
        "newest"
    )
    """which versions are served: "newest" is as many as `keep_versions` says; "all"; or a list of numbers; in the
    model's folder only"""
    version_labels: dict[str, int] = Field(default={})
    """names for versions, as `{stable = 3}`, by which TensorFlow Serving's clients may ask for them; in the model's
    folder only"""
    backend: str | None = None
    """the backend; if left out, the one that recognises the version's files"""
    handler: str | None = None
    """the handler; if left out, the class in `handler.py` if there is one, else the functions of `processor.py`, else
    "default"; both files are looked for in the version's folder, then in the model's"""
    device: str = "cpu"
    """"cpu", "auto", or a name of the backend's own, such as "cuda:1\""""
    devices: tuple[str, ...] = Field(default=(), strict=False)
    """several of them, in the place of `device`: the model is loaded once for each"""
    instances: int = Field(default=1, ge=1, le=256)
    """how often the model is loaded for each device; every copy has threads and a handler of its own"""
    threads: int = Field(default=1, ge=1, le=1024)
    """how many requests, or batches, each copy works on at a time"""
    warm_up: bool = True
    """whether the model is run on samples before it is ready; false for one that counts its calls, which then batches
    only if it is told to"""
    batching: BatchingConfig = BatchingConfig(enabled="auto")
    """how requests share a call of the model"""
    queue: QueueLimits = QueueLimits()
    """how many requests may wait"""
    options: dict[str, Any] = Field(default={})
    """the backend's own options for a model"""
    handler_options: dict[str, Any] = Field(default={})
    """the handler's own options"""


MODELS_OWN = frozenset({"task_id", "keep_versions", "versions", "version_labels"})
"""Keys of a `ModelConfig` that hold for the model, not for one version of it."""


def read_config(
    *folders: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> ModelConfig:
    """What the `model.toml` of these folders say together, the later one first in line; any may be missing.

    Args:
        settings: what comes before all of them.
        defaults: what holds where nobody says anything else.

    Raises:
        ModelError: one of them is no TOML, or says what no `model.toml` says; so do `settings`.
    """
    values = dict(defaults)
    for folder in folders:
        file = folder / CONFIG_FILE
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ModelError(f"{file}: {error}") from error
        if folder is not folders[0] and (misplaced := MODELS_OWN & table.keys()):
            raise ModelError(f"{file}: {min(misplaced)} belongs in the model's folder, {folders[0] / CONFIG_FILE}")
        validated(ModelConfig, table, str(file))
        values |= table
    return validated(ModelConfig, {**values, **settings}, "settings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Attributes:
    backends: every backend there is, made.
    handlers: every installed handler.
    defaults: as of `read_config`.
    """

    backends: Mapping[str, Backend]
    handlers: Mapping[str, type[Handler]]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def load(self, named: NamedModel, folder: Path) -> Loaded:
        """The version of `named` in `folder`, which may be the model's own. Blocks; call it on a thread that will run
        it.

        Raises:
            InferenceError: why it cannot be loaded; a ModelError unless a plugin had other words for it.
        """
        folders = tuple(dict.fromkeys((named.path, folder)))
        config = read_config(*folders, settings=named.settings, defaults=self.defaults)
        backend = self._backend(config, folder)
        options = validated(backend.ModelOptions, config.options, f"options of backend {backend.name}")
        instances: list[Instance] = []
        try:
            for device in (config.devices or (config.device,)) * config.instances:
                handler = self._handler(config, folders[::-1], runs_sources=named.sources)
                instances.append(Instance(model=backend.load(folder, options, device), handler=handler))
                with instances[-1].model.session():
                    handler.load(instances[-1].model, folder)
            batchings = [
                warm_up(folder, instance.model, instance.handler, config.batching, samples=config.warm_up)
                for instance in instances
            ]
        except BaseException:
            for instance in instances:
                instance.model.close()
            raise
        return Loaded(
            instances=tuple(instances),
            platform=backend.name,
            threads=config.threads,
            batching=min(batchings, key=lambda batching: batching.max_rows if batching is not None else 0),
            queue=config.queue,
        )

    def _backend(self, config: ModelConfig, folder: Path) -> Backend:
        if config.backend is not None:
            return _named(self.backends, config.backend, "backend")
        fitting = [backend for backend in self.backends.values() if backend.recognises(folder)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = ", ".join(backend.name for backend in fitting)
            raise ModelError(
                f"{folder}: several backends recognise it ({names}); say which with `backend` in {CONFIG_FILE}"
            )
        files = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ModelError(f"{folder}: no backend recognises it ({_names(self.backends)}); it holds {files}")

    def _handler(self, config: ModelConfig, folders: tuple[Path, ...], *, runs_sources: bool) -> Handler:
        handler_file = _find("handler.py", folders)
        processor_file = _find("processor.py", folders)
        if not runs_sources and (handler_file or processor_file):
            _log.warning("%s is not run: the model may have no sources", handler_file or processor_file)
            handler_file = processor_file = None
        cls: type[Handler]
        if config.handler is not None:
            cls = _named(self.handlers, config.handler, "handler")
        elif handler_file is not None:
            cls = _handler_class(handler_file)
        elif processor_file is not None:
            cls = Processor
        else:
            cls = Handler
        options = validated(cls.Options, config.handler_options, f"handler_options of handler {cls.name}")
        if not issubclass(cls, Processor):
            return cls(options)
        if processor_file is None:
            raise ModelError(
                f'handler "{cls.name}" needs a processor.py in {" or ".join(map(str, folders))}; there is none'
            )
        return cls(options, load_module(processor_file))


def _find(name: str, folders: tuple[Path, ...]) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _handler_class(file: Path) -> type[Handler]:
    module = load_module(file)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Handler) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(cls.__name__ for cls in found) or "none"
        raise ModelError(f"{file}: expected exactly one subclass of Handler defined there, found {names}")
    return found[0]


def _named(there: Mapping[str, T], name: str, kind: str) -> T:
    try:
        return there[name]
    except KeyError:
        raise ModelError(f'no {kind} has the name "{name}" ({_names(there)})') from None


def _names(there: Mapping[str, Any]) -> str:
    return f"there is {', '.join(sorted(there))}" if there else "none is installed"


def in_words(error: BaseException) -> str:
    """`error` and every cause of it, outermost first; the type is named where it is none of ours."""
    words: list[str] = []
    link: BaseException | None = error
    while link is not None:
        text = str(link)
        known = type(link).__module__ == ModelError.__module__
        said = text if known and text else f"{type(link).__name__}: {text}" if text else type(link).__name__
        if not any(text and text in before for before in words):
            words.append(said)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "; because of ".join(words)
