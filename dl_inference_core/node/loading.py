"""From a version's folder to a model and its handler: `model.toml`, which backend, which handler."""

from __future__ import annotations

import asyncio
import logging
import time
import tomllib
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field

from dl_inference_core import children
from dl_inference_core.config import NamedModel, PluginOptions, validated
from dl_inference_core.errors import InferenceError, ModelError, causes, text_of
from dl_inference_core.files import decode
from dl_inference_core.node.admission import QueueLimits
from dl_inference_core.node.backend import Backend
from dl_inference_core.node.batching import BatchingConfig
from dl_inference_core.node.handling import Handler, check_function
from dl_inference_core.node.model_files import is_ignored
from dl_inference_core.node.processor import Processor
from dl_inference_core.node.reclaiming import take_variables
from dl_inference_core.node.sources import Sources, load_module
from dl_inference_core.node.version import Instance, Loaded, unload
from dl_inference_core.node.warm_up import FindRecorded, warm_up
from dl_inference_core.node.watchdog import WatchdogConfig

CONFIG_FILE = "model.toml"

_METHODS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "load": ("model", "directory"),
        "preprocess": ("request",),
        "run_model": ("model", "inputs", "request"),
        "run_batch": ("model", "inputs", "requests"),
        "postprocess": ("outputs", "request"),
    }
)
"""Those of a handler that the service calls, with the arguments that each is given."""

_FIRST_WARNING_S = 30.0
"""Seconds after which a load counts as slow: most take less, the import of a framework included."""

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
    folder only. A label of a version that is not loaded stays where it was; a warning and `check` name it"""
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
    check_shapes: bool = True
    """whether a request is refused if an input has another rank or size than the signature's; false, which the command
    `tfserving` sets, gives such a request to the model alone, in no batch, and the model answers or refuses it; only
    TensorFlow's models can refuse it, so for other backends shapes are always checked"""
    batching: BatchingConfig = BatchingConfig(enabled="auto")
    """how requests share a call of the model"""
    queue: QueueLimits = QueueLimits()
    """how many requests may wait"""
    watchdog: WatchdogConfig = WatchdogConfig()
    """what happens when a batch does not end"""
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
            table = tomllib.loads(decode(file.read_bytes()))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: {error}") from error
        if folder is not folders[0] and (misplaced := MODELS_OWN & table.keys()):
            raise ModelError(f"{file}: {min(misplaced)} belongs in the model's folder, {folders[0] / CONFIG_FILE}")
        validated(ModelConfig, table, str(file))
        values |= table
    return validated(ModelConfig, {**values, **settings}, "settings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Attributes:
    backends: every installed backend.
    handlers: every installed handler.
    defaults: as of `read_config`.
    recorded: as of `warm_up`.
    """

    backends: Mapping[str, Backend]
    handlers: Mapping[str, type[Handler]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    recorded: Sequence[FindRecorded] = ()

    def load(self, named: NamedModel, folder: Path, sources: Sources | None = None) -> Loaded:
        """The version of `named` in `folder`, which may be the model's own. Blocks; call it on a thread that will run
        it.

        Args:
            sources: takes the modules that the load imports; new ones by default.

        Raises:
            InferenceError: why it cannot be loaded; a ModelError unless a plugin had other words for it.
        """
        folders = tuple(dict.fromkeys((named.path, folder)))
        config = read_config(*folders, settings=named.settings, defaults=self.defaults)
        backend = self._backend(config, folder)
        options = validated(backend.ModelOptions, config.options, f"options of backend {backend.name}")
        instances: list[Instance] = []
        sources = sources or Sources()

        def add_instance(device: str) -> None:
            handler = self._handler(config, folders[::-1], runs_sources=named.sources)
            instance = Instance(model=backend.load(folder, options, device), handler=handler)
            instances.append(instance)
            _check_signatures(folder, instance)
            with instance.model.session(), _naming(f"{handler.described()}: its load failed"):
                handler.prepare(instance.model, folder)
            if backend.refuses_shapes and not config.check_shapes:
                _leave_shapes_to_model(handler)

        try:
            with sources:
                for device in (config.devices or (config.device,)) * config.instances:
                    add_instance(device)
                batchings = [
                    warm_up(folder, each.model, each.handler, config.batching, self.recorded, samples=config.warm_up)
                    for each in instances
                ]
        except BaseException as error:
            children.end_child(error)  # which has none of the threads and devices that closing a model may need
            unload(instances, sources, take_variables(error))
            raise
        return Loaded(
            instances=tuple(instances),
            platform=backend.name,
            threads=config.threads,
            batching=min(batchings, key=lambda batching: batching.max_rows if batching is not None else 0),
            queue=config.queue,
            watchdog=config.watchdog,
            folder=folder,
            sources=sources,
        )

    def _backend(self, config: ModelConfig, folder: Path) -> Backend:
        if config.backend is not None:
            return _named(self.backends, config.backend, "backend")
        fitting = self._fitting(folder)
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = ", ".join(backend.name for backend in fitting)
            raise ModelError(
                f"{folder}: several backends recognise it ({names}); say which with `backend` in {CONFIG_FILE}"
            )
        files = ", ".join(sorted(path.name for path in folder.iterdir() if not is_ignored(path.name))) or "nothing"
        raise ModelError(f"{folder}: no backend recognises it ({_names(self.backends)}); it holds {files}")

    def recognises(self, folder: Path) -> bool:
        """Whether any backend recognises the files in `folder`."""
        return bool(self._fitting(folder))

    def _fitting(self, folder: Path) -> list[Backend]:
        return [backend for backend in self.backends.values() if _recognises(backend, folder)]

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
        _check_class(cls)
        options = validated(cls.Options, config.handler_options, f"handler_options of {cls.described()}")
        if not issubclass(cls, Processor):
            arguments: tuple[Any, ...] = (options,)
        elif processor_file is not None:
            arguments = (options, load_module(processor_file))
        else:
            raise ModelError(
                f"{cls.described()} needs a processor.py in {' or '.join(map(str, folders))}; there is none"
            )
        with _naming(f"{cls.described()} cannot be made"):
            handler = cls(*arguments)
        _check_methods(handler)
        return handler


async def load_in_time(loading: Awaitable[None], sources: Sources, what: str, timeout_s: float) -> None:
    """Wait for `loading`; log that it takes long after 30 s, 60 s, 120 s and so on. If it takes too long, or the caller
    is cancelled, `loading` is cancelled, and other loads may import although a thread of this one goes on.

    Args:
        sources: those that the load imports into. The time for which it waits for other loads' imports does not count.
        what: the model and its version, for messages.
        timeout_s: seconds that it may take; 0 means no limit.

    Raises:
        ModelError: it took longer than `timeout_s`.
        InferenceError: as `loading`.
    """
    task = asyncio.ensure_future(loading)
    began, warning_s = time.monotonic(), _FIRST_WARNING_S
    limit = f"; it is given up after {timeout_s:g} s (load_timeout_s)" if timeout_s else ""
    try:
        while True:
            took_s = time.monotonic() - began
            left_s = timeout_s + sources.waited_s() - took_s if timeout_s else warning_s
            if left_s <= 0:
                raise ModelError(
                    f"the load took longer than {timeout_s:g} s (load_timeout_s), so it was given up; "
                    "it is not tried again before its files change or the server starts again"
                )
            if took_s >= warning_s:
                waits = ", because it waits for the imports of another model" if sources.waits else ""
                _log.warning("still loading %s after %g s%s%s", what, warning_s, waits, limit)
                warning_s *= 2
            done, _ = await asyncio.wait((task,), timeout=min(left_s, warning_s - took_s))
            if done:
                return task.result()
    finally:
        if not task.done():
            sources.give_up()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _check_signatures(folder: Path, instance: Instance) -> None:
    """Warn of each signature that is not served.

    Raises:
        ModelError: none is, and the handler needs one.
    """
    for name, reason in instance.model.unserved.items():
        _log.warning('%s: signature "%s" is not served: %s', folder, name, reason)
    if instance.model.signatures or not instance.handler.calls_signatures:
        return
    reasons = "; ".join(f'"{name}": {reason}' for name, reason in sorted(instance.model.unserved.items()))
    raise ModelError(
        f"{folder}: the model has no signature that can be served ({reasons or 'it was saved without any'}), so it "
        "could not answer a request; save it with a signature, or give it a handler with a run_model of its own"
    )


def _leave_shapes_to_model(handler: Handler) -> None:
    handler.signature = replace(handler.signature, checks_shapes=False)
    handler.signatures = {
        name: replace(signature, checks_shapes=False) for name, signature in handler.signatures.items()
    }


def _recognises(backend: Backend, folder: Path) -> bool:
    """Whether `backend` recognises the files in `folder`; a backend that fails at that must not stop the others."""
    try:
        return backend.recognises(folder)
    except BaseException as error:
        _log.warning('%s: backend "%s" cannot tell whether it is one of its models: %r', folder, backend.name, error)
        return False


def _check_class(cls: type[Handler]) -> None:
    """Raises:
    ModelError: its options cannot be validated, or it replaces a method of the service's own.
    """
    options: Any = cls.Options
    if not (isinstance(options, type) and issubclass(options, PluginOptions)):
        raise ModelError(
            f"{cls.described()}: its Options is {options!r}; expected a subclass of "
            "dl_inference_core.config.PluginOptions"
        )
    if cls.prepare not in (Handler.prepare, Processor.prepare):
        raise ModelError(f"{cls.described()}: prepare is a method of the service's own; give yours another name")


def _check_methods(handler: Handler) -> None:
    """Raises:
    ModelError: a method is not a plain function, or does not take its arguments.
    """
    for name, arguments in _METHODS.items():
        check_function(f"{handler.described()}: {name}", getattr(handler, name), *arguments)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Says what failed where a handler's own code raises.

    Raises:
        ModelError: `what`; the cause is attached.
    """
    try:
        yield
    except InferenceError:
        raise
    except BaseException as error:
        raise ModelError(what) from error


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
        raise ModelError(
            f'no {kind} has the name "{name}" ({_names(there)}); `dl-inference-core plugins` tells what is broken'
        ) from None


def _names(there: Mapping[str, Any]) -> str:
    return f"there is {', '.join(sorted(there))}" if there else "none is installed"


def in_words(error: BaseException) -> str:
    """`error` and every cause of it, outermost first; the type is named where it is none of ours."""
    words: list[str] = []
    for link in causes(error, implied=True):
        text = text_of(link)
        known = type(link).__module__ == ModelError.__module__
        said = text if known and text else f"{type(link).__name__}: {text}" if text else type(link).__name__
        if not any(said in before for before in words):
            words.append(said)
    return "; because of ".join(words)
