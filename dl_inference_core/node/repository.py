"""The folder of models: what lies there, which versions are loaded, when one takes another's place.

`NAME/VERSION/…` with positive integers as versions, or the original's flat `NAME/` as version 1; a `model.toml` in
either. A change counts once two looks in a row have found the same (path, size, time of change) of every file, so that
nothing is loaded while it is being copied; the very first look counts at once. What has failed is tried again when its
files change.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from dl_inference_core.errors import ConfigError, InferenceError
from dl_inference_core.node.answering import LoadedVersion, ServedModel, State, VersionStatus
from dl_inference_core.node.backend import Backend
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.loading import CONFIG_FILE, Loader, ModelConfig, in_words, read_config

Fingerprint: TypeAlias = tuple[tuple[str, int, int], ...]
"""(path, size, time of change in ns) of each file, in order."""

_UNREADABLE: Fingerprint = (("", -1, 0),)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sight:
    """One model's folder, as one look found it.

    Attributes:
        own: of the files that all versions share, `model.toml` and sources.
        config: what `model.toml` says; the default where it cannot be read.
        problem: why it cannot; "" if it can.
        versions: each version's folder, and of its files.
    """

    own: Fingerprint
    config: ModelConfig
    problem: str
    versions: Mapping[int, tuple[Path, Fingerprint]]


def _look(directory: Path, before: Mapping[str, _Sight]) -> dict[str, _Sight]:
    """Every model under `directory`. Cheap where nothing has changed since `before`.

    Raises:
        OSError: `directory` cannot be read.
    """
    sights = {}
    for path in sorted(directory.iterdir()):
        if not (_counts(path.name) and path.is_dir()):
            continue
        known = before.get(path.name)
        try:
            sights[path.name] = _look_at(path, known)
        except FileNotFoundError:  # it went away between two lines
            continue
        except OSError as error:
            sights[path.name] = _Sight(
                own=_UNREADABLE,
                config=ModelConfig(),
                problem=str(error),
                versions=known.versions if known is not None else {},
            )
    return sights


def _look_at(folder: Path, before: _Sight | None) -> _Sight:
    entries = _children(folder)
    own = _fingerprint(entry for entry in entries if entry.name == CONFIG_FILE or entry.name.endswith(".py"))
    if before is not None and before.own == own:
        config, problem = before.config, before.problem
    else:
        config, problem = ModelConfig(), ""
        try:
            config = read_config(folder)
        except InferenceError as error:
            problem = in_words(error)
    versions = {
        int(entry.name): (Path(entry.path), own + _fingerprint([entry]))
        for entry in entries
        if entry.name.isascii() and entry.name.isdigit() and entry.name[0] != "0" and entry.is_dir()
    }
    if not versions and any(entry.name != CONFIG_FILE for entry in entries):
        versions = {1: (folder, _fingerprint(entries))}
    return _Sight(own=own, config=config, problem=problem, versions=versions)


def _children(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if _counts(entry.name)]


def _counts(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _fingerprint(entries: Iterable[os.DirEntry[str]], prefix: str = "", depth: int = 0) -> Fingerprint:
    """Of every file in and below `entries`; a link counts as what it leads to. Deep down can only be a link that leads
    back up, and the search ends."""
    files: list[tuple[str, int, int]] = []
    for entry in entries:
        name = prefix + entry.name
        try:
            if not entry.is_dir():
                stat = entry.stat()
                files.append((name, stat.st_size, stat.st_mtime_ns))
            elif depth < 16:
                files += _fingerprint(_children(entry.path), f"{name}/", depth + 1)
        except OSError:
            files.append((name, -1, 0))
    return tuple(sorted(files))


@dataclass(slots=True, kw_only=True, eq=False)
class _Version:
    """What is known of one version's folder.

    Attributes:
        content: of its files, once two looks agreed.
        tried: the content that `error`, or else `loaded`, came of; None if neither is there.
        loaded: what requests are answered with; may be of an older content.
    """

    folder: Path
    content: Fingerprint
    tried: Fingerprint | None = None
    error: str = ""
    loading: bool = False
    loaded: LoadedVersion | None = None

    def status(self, refusal: str) -> VersionStatus | None:
        """What there is to say of it, if anything; `refusal` is why nothing of its model may be loaded now."""
        error = refusal if refusal and self.tried != self.content else self.error
        if self.loaded is not None:
            return VersionStatus(state=State.AVAILABLE, error=error)
        if self.loading:
            return VersionStatus(state=State.LOADING)
        return VersionStatus(state=State.FAILED, error=error) if error else None


@dataclass(slots=True, kw_only=True, eq=False)
class _Model:
    """What is known of one model's folder.

    Attributes:
        config: the last `model.toml` that could be taken.
        refusal: why the present one cannot, or the model not at all; nothing is loaded until this is mended.
        unloading: how many copies of a version are finishing what they were asked.
    """

    served: ServedModel
    folder: Path
    config: ModelConfig = field(default_factory=ModelConfig)
    refusal: str = ""
    versions: dict[int, _Version] = field(default_factory=dict)
    unloading: Counter[int] = field(default_factory=Counter)


class Repository:
    """The models of one directory, loaded and kept up to date. Belongs to the event loop it is started on."""

    def __init__(
        self,
        directory: Path,
        *,
        backends: Mapping[str, Backend],
        handlers: Mapping[str, type[Handler]],
        poll_interval_s: float = 1.0,
        loads_at_once: int = 2,
    ) -> None:
        """Args:
        directory: the folder of models.
        backends: the backends there are, by name.
        handlers: the installed handlers by name.
        poll_interval_s: seconds between two looks for changes.
        loads_at_once: how many versions may be loading at the same time.
        """
        self._directory = directory
        self._loader = Loader(backends=backends, handlers=handlers)
        self._poll_interval_s = poll_interval_s
        self._may_load = asyncio.Semaphore(loads_at_once)
        self._looking = asyncio.Lock()
        self._before: Mapping[str, _Sight] = {}
        self._known: dict[str, _Model] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loads: set[asyncio.Task[None]] = set()
        self._poll: asyncio.Task[None] | None = None
        self._index()

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """Every model by name, ready or not; a snapshot, replaced as a whole."""
        return self._models

    @property
    def tasks(self) -> Mapping[int, ServedModel]:
        """Every model that has a task id, by that; a snapshot, replaced as a whole."""
        return self._by_task

    async def start(self) -> None:
        """Load what lies there, return when every model has loaded or failed, and keep looking from then on.

        Whatever comes of it, cancellation included, `close` must follow.

        Raises:
            ConfigError: the directory cannot be read. A model that cannot be loaded is no error: its
                `ServedModel.versions` tell.
        """
        try:
            self._before = await asyncio.to_thread(_look, self._directory, {})
        except OSError as error:
            raise ConfigError(f"the models' directory cannot be read: {error}") from error
        self._take(self._before, self._before)
        await self.settle()
        self._poll = asyncio.create_task(self._keep_looking(), name="repository")

    async def look(self) -> None:
        """Look at the directory once, and begin what is to be done. Two looks make a change count.

        Raises:
            OSError: the directory cannot be read; everything stays as it is.
        """
        async with self._looking:
            now = await asyncio.to_thread(_look, self._directory, self._before)
            before, self._before = self._before, now
            self._take(before, now)

    async def settle(self) -> None:
        """Wait until nothing is being loaded or unloaded."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop looking, give up what is being loaded, and unload everything. Calls still running after `grace_s`
        seconds are left to end with the process."""
        begun = set(self._loads)
        if self._poll is not None:
            begun.add(self._poll)
        for task in begun:
            task.cancel()
        if begun:
            await asyncio.wait(begun)
        for name in list(self._known):
            self._remove(name)
        self._index()
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=grace_s)
            if left:
                _log.warning("%d model versions are still busy after %g s; leaving them", len(left), grace_s)
            for task in left:
                task.cancel()

    async def _keep_looking(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(self._poll_interval_s)
            try:
                await self.look()
                said = ""
            except OSError as error:
                if said != (said := str(error)):
                    _log.warning("the models' directory cannot be read, all stays as it is: %s", error)
            except Exception:
                _log.exception("looking at the models' directory failed")

    def _take(self, before: Mapping[str, _Sight], now: Mapping[str, _Sight]) -> None:
        """Take over what both looks agree on, then load and unload accordingly."""
        for name in self._known.keys() - before.keys() - now.keys():
            self._remove(name)
        seen_twice = sorted(before.keys() & now.keys())
        for name in seen_twice:
            if name not in self._known:
                self._known[name] = _Model(served=ServedModel(name), folder=self._directory / name)
            self._take_versions(self._known[name], before[name].versions, now[name].versions)
        self._take_configs({name: now[name] for name in seen_twice if before[name].own == now[name].own})
        for model in self._known.values():
            self._advance(model)
        self._index()

    def _take_versions(
        self,
        model: _Model,
        before: Mapping[int, tuple[Path, Fingerprint]],
        now: Mapping[int, tuple[Path, Fingerprint]],
    ) -> None:
        for number in model.versions.keys() - before.keys() - now.keys():
            self._retire(model, number, model.versions.pop(number))
        for number in before.keys() & now.keys():
            folder, content = now[number]
            if before[number] != now[number]:
                continue
            if number not in model.versions:
                model.versions[number] = _Version(folder=folder, content=content)
            model.versions[number].folder = folder
            model.versions[number].content = content

    def _take_configs(self, sights: Mapping[str, _Sight]) -> None:
        """Who has a task id keeps it; of several new ones, the first by name gets it."""
        holders = {model.config.task_id: name for name, model in self._known.items()}
        for name, sight in sights.items():
            model, task_id = self._known[name], sight.config.task_id
            refusal = sight.problem
            if not refusal and task_id is not None and holders.setdefault(task_id, name) != name:
                refusal = f'task id {task_id} of model "{name}" is taken by model "{holders[task_id]}"'
            if refusal and refusal != model.refusal:
                _log.warning('model "%s" in %s cannot be taken as it is: %s', name, model.folder, refusal)
            model.refusal = refusal
            if not refusal:
                model.config = sight.config

    def _advance(self, model: _Model) -> None:
        """Begin the loads that are due, unload what is no longer among the newest, publish the outcome."""
        keep = model.config.keep_versions
        available = coming = 0
        for number in sorted(model.versions, reverse=True):
            version = model.versions[number]
            due = version.tried != version.content and not version.loading
            if due and not model.refusal and coming < keep:
                self._begin_load(model, number, version)
            if version.loaded is not None and available == keep:
                self._retire(model, number, version)
            available += version.loaded is not None
            coming += version.loading or version.loaded is not None
        self._publish(model)

    def _begin_load(self, model: _Model, number: int, version: _Version) -> None:
        version.loading = True
        version.error = ""
        task = self._spawn(self._load(model, number, version))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def _load(self, model: _Model, number: int, version: _Version) -> None:
        name = model.served.name
        try:
            async with self._may_load:
                version.tried, folder, began = version.content, version.folder, time.monotonic()
                fresh = LoadedVersion(name, number)
                spare: LoadedVersion | None = fresh
                try:
                    await fresh.load(partial(self._loader.load, model.folder, folder))
                    spare, version.loaded = version.loaded, fresh
                    _log.info('model "%s" version %d loaded in %.1f s', name, number, time.monotonic() - began)
                except InferenceError as error:
                    version.error = in_words(error)
                    _log.warning('model "%s" version %d in %s: %s', name, number, folder, version.error)
                finally:
                    if spare is not None:
                        self._unload(model, number, spare)
        finally:
            version.loading = False
        if model.versions.get(number) is not version:
            self._retire(model, number, version)
        self._advance(model)

    def _retire(self, model: _Model, number: int, version: _Version) -> None:
        loaded, version.loaded, version.tried = version.loaded, None, None
        if loaded is not None:
            self._unload(model, number, loaded)

    def _unload(self, model: _Model, number: int, loaded: LoadedVersion) -> None:
        """Close `loaded` once it has answered what it was asked. The caller publishes the model without it before its
        next await: the closing begins after that."""

        async def unload() -> None:
            await loaded.close()
            model.unloading[number] -= 1
            self._publish(model)

        model.unloading[number] += 1
        self._spawn(unload())

    def _remove(self, name: str) -> None:
        model = self._known.pop(name)
        for number in list(model.versions):
            self._retire(model, number, model.versions.pop(number))
        self._publish(model)

    def _publish(self, model: _Model) -> None:
        versions = {
            number: VersionStatus(state=State.UNLOADING) for number, copies in model.unloading.items() if copies
        }
        for number, version in model.versions.items():
            if (status := version.status(model.refusal)) is not None:
                versions[number] = status
        loaded = {number: version.loaded for number, version in model.versions.items() if version.loaded is not None}
        model.served.publish(task_id=model.config.task_id, loaded=loaded, versions=versions)

    def _index(self) -> None:
        self._models = MappingProxyType({name: model.served for name, model in self._known.items()})
        self._by_task = MappingProxyType(
            {model.config.task_id: model.served for model in self._known.values() if model.config.task_id is not None}
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
