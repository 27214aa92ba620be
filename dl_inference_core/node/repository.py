"""The folder of models: what lies there, which versions are loaded, when one takes another's place.

`NAME/VERSION/…` with integers as versions, or the original's flat `NAME/` as version 1; a `model.toml` in either.
Models that lie elsewhere are named one by one. A change counts once two looks in a row have found the same path
and the same stamp (`files.stamp`) of every file, so that nothing is loaded while it is being copied; the very first
look counts at once.
What has failed is tried again when its files change. What is loaded stays until something that takes its place is.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dl_inference_core.config import NamedModel, validated
from dl_inference_core.errors import ConfigError, InferenceError
from dl_inference_core.files import Stamp, stamp
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.backend import Backend
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.load import LoadMeter
from dl_inference_core.node.loading import Loader, ModelConfig, in_words, load_in_time
from dl_inference_core.node.model import Published, ServedModel, State, VersionStatus
from dl_inference_core.node.model_state import ModelState, VersionState
from dl_inference_core.node.scanning import TOO_LARGE, Fingerprint, Sight, misplacement, scan, too_large
from dl_inference_core.node.sources import Sources
from dl_inference_core.node.version import LoadedVersion
from dl_inference_core.node.warm_up import FindRecorded

_RELOAD_PAUSE_S = 1.0
"""Between the two looks of a reload: a file that is being copied grows within it."""

_log = logging.getLogger(__name__)


class Repository:
    """The models of one directory, and others by name, loaded and kept up to date. Belongs to the event loop that it is
    started on.

    Attributes:
        models: every model by name, ready or not; a snapshot, replaced as a whole.
        tasks: every model that has a task id, by that; a snapshot, replaced as a whole.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        named: Mapping[str, NamedModel] = MappingProxyType({}),
        backends: Mapping[str, Backend],
        handlers: Mapping[str, type[Handler]],
        defaults: Mapping[str, Any] = MappingProxyType({}),
        recorded: Sequence[FindRecorded] = (),
        poll_interval_s: float = 1.0,
        loads_at_once: int = 2,
        load_timeout_s: float = 0,
        meter: LoadMeter | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Args:
        directory: the folder of models, if there is one.
        named: models that lie elsewhere, by their names; they come before those of the folder.
        backends: the backends there are, by name.
        handlers: the installed handlers by name.
        defaults: keys of `model.toml`, for models that say nothing else.
        recorded: functions that find the recorded requests of a version in its folder.
        poll_interval_s: seconds between two looks for changes; 0 never looks again.
        loads_at_once: how many versions may be loading at the same time.
        load_timeout_s: seconds that the load of a version may take before it counts as failed; 0 means no limit.
        meter: measures what the models do, and reports it with answers; by default nothing is reported.
        metrics: are told how full batches are.

        Raises:
            ConfigError: `defaults` are none.
        """
        validated(ModelConfig, {**defaults}, "models.defaults")
        self._directory = directory
        self._named = named
        self._defaults = defaults
        self._loader = Loader(backends=backends, handlers=handlers, defaults=defaults, recorded=recorded)
        self._poll_interval_s = poll_interval_s
        self._may_load = asyncio.Semaphore(loads_at_once)
        self._load_timeout_s = load_timeout_s
        self._meter = meter or LoadMeter()
        self._metrics = metrics
        self._looking = asyncio.Lock()
        self._before: Mapping[str, Sight] = {}
        self._known: dict[str, ModelState] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loads: set[asyncio.Task[None]] = set()
        self._poll: asyncio.Task[None] | None = None
        self._complaint = ""
        """Why the last look failed."""
        self.misplaced = ""
        """Why the directory does not look like a folder of models; "" if it does. What is in it is served anyway."""
        self._judged: tuple[Mapping[str, Sight], Stamp] | None = None
        """The content of the directory of which `misplaced` tells."""
        self._index()

    @property
    def backends(self) -> Collection[str]:
        """The names of the backends."""
        return self._loader.backends.keys()

    async def start(self) -> None:
        """`begin`, and return when every model has loaded, failed or passed its load timeout. A model that cannot be
        loaded is not an error: its `ServedModel.versions` tell.

        Raises:
            ConfigError: as `begin`.
        """
        await self.begin()
        await self.loaded()

    async def begin(self) -> None:
        """Find the models, begin to load them, and look for changes from now on.

        Whatever comes of it, cancellation included, `close` must follow.

        Raises:
            ConfigError: the directory cannot be read.
        """
        try:
            self._before = await self._scan({})
        except (OSError, ValueError) as error:
            raise ConfigError(f"the models' directory cannot be read: {error}") from error
        self._take(self._before, self._before)
        self._meter.start()
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

    async def reload(self) -> None:
        """Look for changes at once, and again a second later, when they count: even where the directory is not looked
        at again and again. What goes wrong is logged, and changes nothing."""
        await self._look_or_complain()
        await asyncio.sleep(_RELOAD_PAUSE_S)
        await self._look_or_complain()

    async def _look(self) -> None:
        now = await self._scan(self._before)
        before, self._before = self._before, now
        self._take(before, now)

    async def _scan(self, before: Mapping[str, Sight]) -> Mapping[str, Sight]:
        """Raises:
        OSError, ValueError: as `look`.
        """

        def work() -> tuple[Mapping[str, Sight], str]:
            sights = scan(self._directory, self._named, self._defaults, before)
            if self._directory is None:
                return sights, ""
            content = sights, stamp(self._directory)
            if content == self._judged:  # backends read folders, and log what they cannot read
                return sights, self.misplaced
            misplaced = misplacement(self._directory, sights, self._loader.recognises)
            self._judged = content
            return sights, misplaced

        sights, misplaced = await asyncio.to_thread(work)
        if misplaced and misplaced != self.misplaced:
            _log.warning("the models' directory %s: %s", self._directory, misplaced)
        self.misplaced = misplaced
        return sights

    async def loaded(self, names: Iterable[str] | None = None) -> None:
        """Wait until nothing of the models of these names, by default all that there are, is being loaded; of what is
        unloaded it waits for nothing."""
        for name in tuple(self._known) if names is None else names:
            while name in self._known and (loads := self._known[name].loads):
                await asyncio.wait(loads)

    async def settle(self) -> None:
        """Wait until nothing is being loaded or unloaded."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop looking, give up what is being loaded, and unload everything. Calls still running after `grace_s`
        seconds are left to end with the process."""
        self._meter.stop()
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
        while True:
            await asyncio.sleep(self._poll_interval_s)
            await self._look_or_complain()

    async def _look_or_complain(self) -> None:
        before, self._complaint = self._complaint, ""
        try:
            await self.look()
        except (OSError, ValueError) as error:
            self._complaint = str(error)
            if self._complaint != before:
                _log.warning("the models' directory cannot be read, keeping the current models: %s", error)
        except Exception:
            _log.exception("looking at the models' directory failed")

    def _take(self, before: Mapping[str, Sight], now: Mapping[str, Sight]) -> None:
        """Take over what both looks agree on, then load and unload accordingly."""
        for name in self._known.keys() - before.keys() - now.keys():
            self._remove(name)
        seen_twice = sorted(before.keys() & now.keys())
        for name in seen_twice:
            if name not in self._known:
                self._known[name] = ModelState(served=ServedModel(name, self._meter), named=now[name].named)
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
        model: ModelState,
        before: Mapping[int, tuple[Path, Fingerprint]],
        now: Mapping[int, tuple[Path, Fingerprint]],
    ) -> None:
        for number in model.versions.keys() - before.keys() - now.keys():
            model.versions[number].content = None
        for number in before.keys() & now.keys():
            folder, content = now[number]
            if before[number] != now[number]:
                continue
            version = model.versions.setdefault(number, VersionState(folder=folder, content=content))
            if version.folder != folder:  # a handler may open files of its folder at any time
                version.tried = None
            version.folder, version.content = folder, content

    def _take_configs(self, sights: Mapping[str, Sight]) -> None:
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

    def _advance(self, model: ModelState) -> None:
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
        if not any(version.loading for version in model.versions.values()):
            self._report_labels(model)

    def _report_labels(self, model: ModelState) -> None:
        """Say, once, which labels lead to versions that are not there."""
        if model.reported == (labels := model.served.unserved_labels):
            return
        model.reported = labels
        if labels:
            _log.warning('model "%s" in %s: %s', model.served.name, model.named.path, model.served.describe_labels())

    def _stays(self, model: ModelState, number: int, version: VersionState, wanted: Mapping[int, VersionState]) -> bool:
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

    def _begin_load(self, model: ModelState, number: int, version: VersionState) -> None:
        version.loading = True
        version.error = ""
        task = self._spawn(self._load(model, number, version))
        for loads in (self._loads, model.loads):
            loads.add(task)
            task.add_done_callback(loads.discard)

    async def _load(self, model: ModelState, number: int, version: VersionState) -> None:
        name = model.served.name
        try:
            async with self._may_load:
                version.tried, folder, began = version.content, version.folder, time.monotonic()
                fresh = LoadedVersion(name, number, self._meter, self._metrics)
                spare: LoadedVersion | None = fresh
                try:
                    if version.tried is not None and TOO_LARGE[0] in version.tried:
                        raise too_large(folder)
                    sources = Sources()
                    loading = fresh.load(partial(self._loader.load, model.named, folder, sources))
                    await load_in_time(loading, sources, f'model "{name}" version {number}', self._load_timeout_s)
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

    def _retire(self, model: ModelState, number: int, version: VersionState) -> None:
        loaded, version.loaded, version.tried = version.loaded, None, None
        if loaded is not None:
            self._unload(model, number, loaded)

    def _unload(self, model: ModelState, number: int, loaded: LoadedVersion) -> None:
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

    def _publish(self, model: ModelState) -> None:
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
            Published(
                task_id=model.config.task_id,
                loaded=MappingProxyType(loaded),
                versions=MappingProxyType(versions),
                labels=MappingProxyType(dict(model.labels)),
                unserved_labels=MappingProxyType(
                    {label: number for label, number in model.config.version_labels.items() if number not in loaded}
                ),
                refusal=model.refusal,
            )
        )

    def _index(self) -> None:
        self.models: Mapping[str, ServedModel] = MappingProxyType(
            {name: model.served for name, model in self._known.items()}
        )
        self.tasks: Mapping[int, ServedModel] = MappingProxyType(
            {model.config.task_id: model.served for model in self._known.values() if model.config.task_id is not None}
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
