"""The folder of models: what lies there, which versions are loaded, when one takes another's place.

`NAME/VERSION/…` with integers as versions, or the original's flat `NAME/` as version 1; a `model.toml` in either.
Models that lie elsewhere are named one by one. A change counts once two looks in a row have found the same (path, size,
time of change) of every file, so that nothing is loaded while it is being copied; the very first look counts at once.
What has failed is tried again when its files change. What is loaded stays until something that takes its place is.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from dl_inference_core.config import NamedModel, validated
from dl_inference_core.errors import ConfigError, InferenceError, ModelError
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.answering import LoadedVersion, ServedModel, State, VersionStatus
from dl_inference_core.node.backend import Backend
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.load import LoadMeter
from dl_inference_core.node.loading import CONFIG_FILE, MODELS_OWN, Loader, ModelConfig, in_words, read_config

Fingerprint: TypeAlias = tuple[tuple[str, int, int], ...]
"""(path, size, time of change in ns) of each file, in order."""

_UNREADABLE: Fingerprint = (("", -1, 0),)
_TOO_LARGE: Fingerprint = (("", -2, 0),)

_MOST_ENTRIES = 10_000
"""Files and folders that one version may consist of."""

_VERSION = re.compile(r"[0-9]{1,19}")
_LARGEST_VERSION = 2**63 - 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sight:
    """One model's folder, as one look found it.

    Attributes:
        named: where it lies, and what is said of it there.
        own: of the files that all versions share, `model.toml` and sources.
        config: what `model.toml` says; the default where it cannot be read.
        problem: why it cannot; "" if it can.
        versions: each version's folder, and of its files, the sources that all share, and what `model.toml` says of it.
        doubles: folders that are left out, for another has the same number.
    """

    named: NamedModel
    own: Fingerprint
    config: ModelConfig
    problem: str
    versions: Mapping[int, tuple[Path, Fingerprint]]
    doubles: tuple[str, ...] = ()


def _look(
    directory: Path | None,
    named: Mapping[str, NamedModel],
    defaults: Mapping[str, Any],
    before: Mapping[str, _Sight],
) -> dict[str, _Sight]:
    """Every model under `directory`, and those in `named`. Cheap where nothing has changed since `before`.

    Raises:
        OSError, ValueError: `directory` cannot be read, or is no path.
    """
    there = {
        path.name: NamedModel(path=path)
        for path in (sorted(directory.iterdir()) if directory is not None else ())
        if _counts(path.name) and path.is_dir()
    }
    sights = {}
    for name, model in {**there, **named}.items():
        known = before.get(name)
        try:
            sights[name] = _look_at(model, defaults, known)
        except (OSError, ValueError, ModelError) as error:
            if name not in named and isinstance(error, FileNotFoundError):  # it went away between two lines
                continue
            sights[name] = _Sight(
                named=model,
                own=_UNREADABLE,
                config=ModelConfig(),
                problem=str(error),
                versions=known.versions if known is not None else {},
            )
    return sights


def _look_at(named: NamedModel, defaults: Mapping[str, Any], before: _Sight | None) -> _Sight:
    folder = named.path
    entries = _children(folder)
    own = _fingerprint(entry for entry in entries if entry.name == CONFIG_FILE or entry.name.endswith(".py"))
    if before is not None and before.own == own and before.named == named:
        config, problem = before.config, before.problem
    else:
        config, problem = ModelConfig(), ""
        try:
            config = read_config(folder, settings=named.settings, defaults=defaults)
        except InferenceError as error:
            problem = in_words(error)
    shared = own
    if not problem:  # what `model.toml` says, not that it changed: a version need not be loaded again for a new label
        said = json.dumps(config.model_dump(exclude=set(MODELS_OWN)), sort_keys=True, default=str)
        shared = (*(file for file in own if file[0] != CONFIG_FILE), (said, int(named.sources), 0))
    folders, doubles = _versions(entries)
    versions = {number: (Path(entry.path), shared + _fingerprint([entry])) for number, entry in folders.items()}
    if not versions and named.flat and any(entry.name != CONFIG_FILE for entry in entries):
        versions = {1: (folder, shared + _fingerprint(entry for entry in entries if entry.name != CONFIG_FILE))}
    if doubles and (before is None or before.doubles != doubles):
        _log.warning("%s: left out, another folder has the same number: %s", folder, ", ".join(doubles))
    return _Sight(named=named, own=own, config=config, problem=problem, versions=versions, doubles=doubles)


def _versions(entries: Iterable[os.DirEntry[str]]) -> tuple[dict[int, os.DirEntry[str]], tuple[str, ...]]:
    """The folders that are versions, by number; and those that could be, but for another's being written shorter."""
    folders: dict[int, os.DirEntry[str]] = {}
    doubles = []
    for entry in sorted(entries, key=lambda entry: len(entry.name)):
        if not _VERSION.fullmatch(entry.name) or not entry.is_dir():
            continue
        number = int(entry.name)
        if number > _LARGEST_VERSION:
            continue
        if number in folders:
            doubles.append(entry.name)
        else:
            folders[number] = entry
    return folders, tuple(doubles)


def _children(folder: Path | str) -> list[os.DirEntry[str]]:
    """What lies in `folder`, by name.

    Raises:
        ModelError: it is more than a version may hold.
        OSError, ValueError: the folder cannot be read, or is no path.
    """
    with os.scandir(folder) as entries:
        found = [entry for entry in itertools.islice(entries, _MOST_ENTRIES + 1) if _counts(entry.name)]
    if len(found) > _MOST_ENTRIES:
        raise _too_large(folder)
    return sorted(found, key=lambda entry: entry.name)


def _counts(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _fingerprint(entries: Iterable[os.DirEntry[str]]) -> Fingerprint:
    """Of every file in and below `entries`; a link counts as what it leads to, a folder only where it is met first.
    `_TOO_LARGE` if they are over `_MOST_ENTRIES`."""
    files: list[tuple[str, int, int]] = []
    visited: set[tuple[int, int]] = set()
    left = [("", entry) for entry in entries]
    met = 0
    while left:
        prefix, entry = left.pop()
        met += 1
        if met + len(left) > _MOST_ENTRIES:
            return _TOO_LARGE
        name = prefix + entry.name
        try:
            stat = entry.stat()
            if not entry.is_dir():
                files.append((name, stat.st_size, stat.st_mtime_ns))
            elif (folder := (stat.st_dev, stat.st_ino)) not in visited:
                visited.add(folder)
                left += [(f"{name}/", child) for child in _children(entry.path)]
        except OSError:
            files.append((name, -1, 0))
        except ModelError:
            return _TOO_LARGE
    return tuple(sorted(files))


def _too_large(folder: Path | str) -> ModelError:
    return ModelError(
        f"{folder}: it holds over {_MOST_ENTRIES} files and folders; expected no more than a model consists of"
    )


@dataclass(slots=True, kw_only=True, eq=False)
class _Version:
    """What is known of one version's folder.

    Attributes:
        content: of its files, once two looks agreed; None if two looks have not found them.
        tried: the content that `error`, or else `loaded`, came of; None if neither is there.
        loaded: what requests are answered with; may be of an older content.
    """

    folder: Path
    content: Fingerprint | None
    tried: Fingerprint | None = None
    error: str = ""
    loading: bool = False
    loaded: LoadedVersion | None = None

    @property
    def due(self) -> bool:
        """Whether there are files that nobody has tried to load."""
        return self.content is not None and self.tried != self.content and not self.loading

    def status(self, refusal: str) -> VersionStatus | None:
        """What there is to say of it, if anything; `refusal` is why nothing of its model may be loaded now."""
        error = refusal if refusal and self.due else self.error
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
        labels: the version that each label leads to; as `config` says, once that has loaded.
        loads: what is being loaded.
        unloading: how many copies of a version are finishing what they were asked.
    """

    served: ServedModel
    named: NamedModel
    config: ModelConfig = field(default_factory=ModelConfig)
    refusal: str = ""
    labels: dict[str, int] = field(default_factory=dict)
    versions: dict[int, _Version] = field(default_factory=dict)
    loads: set[asyncio.Task[None]] = field(default_factory=set)
    unloading: Counter[int] = field(default_factory=Counter)

    def wanted(self) -> dict[int, _Version]:
        """The versions that are there and that the policy has, newest first. Of "newest" that is all of them."""
        policy = self.config.versions
        return {
            number: version
            for number, version in sorted(self.versions.items(), reverse=True)
            if version.content is not None and (not isinstance(policy, tuple) or number in policy)
        }


class Repository:
    """The models of one directory, and others by name, loaded and kept up to date. Belongs to the event loop that it is
    started on."""

    def __init__(
        self,
        directory: Path | None,
        *,
        named: Mapping[str, NamedModel] = MappingProxyType({}),
        backends: Mapping[str, Backend],
        handlers: Mapping[str, type[Handler]],
        defaults: Mapping[str, Any] = MappingProxyType({}),
        poll_interval_s: float = 1.0,
        loads_at_once: int = 2,
        meter: LoadMeter | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Args:
        directory: the folder of models, if there is one.
        named: models that lie elsewhere, by their names; they come before those of the folder.
        backends: the backends there are, by name.
        handlers: the installed handlers by name.
        defaults: keys of `model.toml`, for models that say nothing else.
        poll_interval_s: seconds between two looks for changes; 0 never looks again.
        loads_at_once: how many versions may be loading at the same time.
        meter: measures what the models do, and reports it with answers; by default nothing is reported.
        metrics: are told how full batches are.

        Raises:
            ConfigError: `defaults` are none.
        """
        validated(ModelConfig, {**defaults}, "models.defaults")
        self._directory = directory
        self._named = named
        self._defaults = defaults
        self._loader = Loader(backends=backends, handlers=handlers, defaults=defaults)
        self._poll_interval_s = poll_interval_s
        self._may_load = asyncio.Semaphore(loads_at_once)
        self._meter = meter or LoadMeter()
        self._metrics = metrics
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
            self._before = await asyncio.to_thread(_look, self._directory, self._named, self._defaults, {})
        except (OSError, ValueError) as error:
            raise ConfigError(f"the models' directory cannot be read: {error}") from error
        self._take(self._before, self._before)
        await self.settle()
        if self._poll_interval_s:
            self._poll = asyncio.create_task(self._keep_looking(), name="repository")

    async def replace_named(self, named: Mapping[str, NamedModel]) -> None:
        """Replace the models that lie elsewhere, and begin what is to be done. Those that stay keep what they have
        loaded.

        Raises:
            OSError, ValueError: as `look`.
        """
        async with self._looking:
            self._named = named
            await self._look()
            await self._look()

    async def look(self) -> None:
        """Look at the directory once, and begin what is to be done. Two looks make a change count.

        Raises:
            OSError, ValueError: the directory cannot be read; everything stays as it is.
        """
        async with self._looking:
            await self._look()

    async def _look(self) -> None:
        now = await asyncio.to_thread(_look, self._directory, self._named, self._defaults, self._before)
        before, self._before = self._before, now
        self._take(before, now)

    async def loaded(self, names: Iterable[str]) -> None:
        """Wait until nothing of the models of these names is being loaded; of what is unloaded it waits for nothing."""
        for name in names:
            while name in self._known and (loads := self._known[name].loads):
                await asyncio.wait(loads)

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
            except (OSError, ValueError) as error:
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
                self._known[name] = _Model(served=ServedModel(name, self._meter), named=now[name].named)
            self._take_versions(self._known[name], before[name].versions, now[name].versions)
        unchanged = [
            name for name in seen_twice if before[name].own == now[name].own and before[name].named == now[name].named
        ]
        self._take_configs({name: now[name] for name in unchanged})
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
            model.versions[number].content = None
        for number in before.keys() & now.keys():
            folder, content = now[number]
            if before[number] != now[number]:
                continue
            version = model.versions.setdefault(number, _Version(folder=folder, content=content))
            if version.folder != folder:  # files of the same name, size and time may be others there
                version.tried = None
            version.folder, version.content = folder, content

    def _take_configs(self, sights: Mapping[str, _Sight]) -> None:
        """Who has a task id keeps it; of several new ones, the first by name gets it."""
        holders = {model.config.task_id: name for name, model in self._known.items()}
        for name, sight in sights.items():
            model, task_id = self._known[name], sight.config.task_id
            model.named = sight.named
            refusal = sight.problem
            if not refusal and task_id is not None and holders.setdefault(task_id, name) != name:
                refusal = f'task id {task_id} of model "{name}" is taken by model "{holders[task_id]}"'
            if refusal and refusal != model.refusal:
                _log.warning('model "%s" in %s cannot be taken as it is: %s', name, model.named.path, refusal)
            model.refusal = refusal
            if not refusal:
                model.config = sight.config

    def _advance(self, model: _Model) -> None:
        """Begin the loads that are due, unload what has been replaced, publish the outcome."""
        keep = model.config.keep_versions if model.config.versions == "newest" else sys.maxsize
        wanted = model.wanted()
        available = coming = 0
        for number, version in wanted.items():
            if version.due and not model.refusal and coming < keep:
                self._begin_load(model, number, version)
            if available == keep and (version.loaded is not None or version.error):
                version.error = ""
                self._retire(model, number, version)
            available += version.loaded is not None
            coming += version.loading or version.loaded is not None
        for number in [number for number in model.versions if number not in wanted]:
            version = model.versions[number]
            if version.loaded is None or not self._stays(model, number, version, wanted):
                version.error = ""
                self._retire(model, number, version)
                if version.content is None:
                    del model.versions[number]
        self._publish(model)

    def _stays(self, model: _Model, number: int, version: _Version, wanted: Mapping[int, _Version]) -> bool:
        """Whether a loaded version that is not wanted has no successor yet. It waits for none that has failed if its
        own files are gone."""
        coming = {n for n, other in wanted.items() if other.loaded is None and (other.due or other.loading)}
        if any(
            model.labels.get(label) == number and target in coming
            for label, target in model.config.version_labels.items()
        ):
            return True
        if any(other.loaded is not None for other in wanted.values()):
            return False
        gone = version.content is None and model.named.path in (version.folder, version.folder.parent)
        return bool(coming) or bool(wanted and not gone)

    def _begin_load(self, model: _Model, number: int, version: _Version) -> None:
        version.loading = True
        version.error = ""
        task = self._spawn(self._load(model, number, version))
        for loads in (self._loads, model.loads):
            loads.add(task)
            task.add_done_callback(loads.discard)

    async def _load(self, model: _Model, number: int, version: _Version) -> None:
        name = model.served.name
        try:
            async with self._may_load:
                version.tried, folder, began = version.content, version.folder, time.monotonic()
                fresh = LoadedVersion(name, number, self._meter, self._metrics)
                spare: LoadedVersion | None = fresh
                try:
                    if version.tried is not None and _TOO_LARGE[0] in version.tried:
                        raise _too_large(folder)
                    await fresh.load(partial(self._loader.load, model.named, folder))
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
        if self._metrics is not None:
            self._metrics.model_gone(name)

    def _publish(self, model: _Model) -> None:
        versions = {
            number: VersionStatus(state=State.UNLOADING) for number, copies in model.unloading.items() if copies
        }
        for number, version in model.versions.items():
            if (status := version.status(model.refusal)) is not None:
                versions[number] = status
        loaded = {number: version.loaded for number, version in model.versions.items() if version.loaded is not None}
        model.labels = {
            label: number if number in loaded or (old := model.labels.get(label)) not in loaded else old
            for label, number in model.config.version_labels.items()
        }
        model.served.publish(
            task_id=model.config.task_id,
            loaded=loaded,
            versions=versions,
            labels=model.labels,
            refusal=model.refusal,
        )

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
