"""One version of a model in memory: its queue, its model threads, and its life from load to close."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dl_inference_core.node.admission import QueueLimits
from dl_inference_core.node.batcher import BatchCost
from dl_inference_core.node.execution import Execution, fail_request
from dl_inference_core.node.model_threads import ModelThread, ModelThreads
from dl_inference_core.node.queue import QueuedRequest, RequestQueue
from dl_inference_core.node.reclaiming import Remains
from dl_inference_core.node.rehearsal import rehearse
from dl_inference_core.node.sources import Sources
from dl_inference_core.node.watchdog import Watchdog, WatchdogConfig

if TYPE_CHECKING:
    from dl_inference_core.metrics import Metrics
    from dl_inference_core.node.backend import Model
    from dl_inference_core.node.batching import Batching
    from dl_inference_core.node.handling import Handler
    from dl_inference_core.node.load import LoadMeter, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One copy of a version's model, with its handler."""

    model: Model
    handler: Handler


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What one version's folder gave.

    Attributes:
        instances: at least one; all of the same files.
        platform: the backend's name.
        threads: how many threads may run each instance.
        batching: None is one request at a time.
        folder: the version's.
        sources: the modules that were imported for it.
    """

    instances: tuple[Instance, ...]
    platform: str
    threads: int = 1
    batching: Batching | None = None
    queue: QueueLimits = field(default_factory=QueueLimits)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    folder: Path = Path()
    sources: Sources = field(default_factory=Sources)

    @property
    def model(self) -> Model:
        """The first instance's."""
        return self.instances[0].model


def unload(instances: list[Instance], sources: Sources, leads: list[object] | None = None) -> None:
    """Close each model, whatever becomes of another, forget the sources, and free the memory of all. Runs on a thread
    of the version.

    Args:
        instances: emptied; the caller must hold nothing of them elsewhere.
        leads: further objects that may lead to parts of the models; emptied as well.
    """
    leads = leads if leads is not None else []
    kinds = {type(instance.model) for instance in instances}
    remains = Remains(*instances, *leads)
    leads.clear()
    try:
        _close(instances, sources)
    finally:
        instances.clear()
        remains.reclaim()
        for kind in kinds:
            kind.return_memory()


def _close(instances: Sequence[Instance], sources: Sources) -> None:
    with ExitStack() as stack:  # each, whatever becomes of another
        stack.callback(sources.close)
        for instance in instances:
            stack.callback(instance.model.close)


class LoadedVersion:
    """One version of a model in memory, with threads of its own, on which all of it happens, `Model.close` too.

    Attributes:
        submit_all: `RequestQueue.put_all`: queues requests, which are answered or failed in their turn. False says that
            the version was closed before. Any thread.
    """

    def __init__(self, model_name: str, number: int, meter: LoadMeter, metrics: Metrics | None = None) -> None:
        """On the event loop.

        Args:
            meter: is told how much the threads work, and of every answer.
            metrics: counts the sizes of batches, and the stuck ones.
        """
        self.number = number
        self._model_name = model_name
        self._meter = meter
        self._metrics = metrics
        name = f"{model_name}/{number}"
        fail = partial(fail_request, meter)
        self._cost = BatchCost()
        self._queue = RequestQueue(name, self._cost, fail, meter.delay_s)
        self.submit_all = self._queue.put_all
        self._threads = ModelThreads(name, self._queue, self._run)
        self._watchdog = Watchdog(model_name, number, self._threads, fail, metrics)
        self._work: Work
        self._loaded: Loaded | None = None
        self._execution: Execution | None = None

    async def load(self, load: Callable[[], Loaded]) -> None:
        """Fill this version with what `load` gives. Whatever comes of that, cancellation too, `close` must follow.

        Raises:
            InferenceError: what `load` raised; HandlerFailed for other exceptions.
        """

        def job() -> None:
            self._loaded = loaded = load()
            batching = loaded.batching
            if batching is None:
                self._queue.configure(loaded.queue)
            else:
                self._queue.configure(loaded.queue, batching.max_rows, holds=batching.delay_s > 0)
            self._execution = Execution(
                self._model_name,
                self.number,
                loaded.instances,
                batching,
                cost=self._cost,
                meter=self._meter,
                metrics=self._metrics,
            )
            self._work = self._meter.watch(self._threads.worked, len(loaded.instances) * loaded.threads)

        await self._threads.run(job)
        self._threads.grow(len(self.loaded.instances) * self.loaded.threads)
        self._watchdog.start(self.loaded.watchdog)

    @property
    def loaded(self) -> Loaded:
        """What was loaded; not before `load` has ended."""
        assert self._loaded is not None
        return self._loaded

    @property
    def stuck(self) -> bool:
        """Whether none of the threads can answer requests. Any thread."""
        return self._watchdog.stuck

    def _run(self, request: QueuedRequest, thread: ModelThread) -> int:
        assert self._execution is not None
        return self._execution.run(request, thread)

    async def rehearse(self) -> str:
        """As `rehearsal.rehearse`, on one of the threads, for the first instance.

        Raises:
            InferenceError: the handler cannot answer.
        """

        def job() -> str:
            instance = self.loaded.instances[0]
            with instance.model.session():
                return rehearse(self.loaded.folder, instance.model, instance.handler)

        return await self._threads.run(job)

    def waiting(self) -> int:
        """How many requests wait for one of the threads. Any thread."""
        return self._queue.waiting()

    async def close(self) -> None:
        """Finish what was asked for, then close the model and free its memory. A model that is still run by a thread
        which was given up is not closed; its memory stays until that thread ends."""
        try:
            await self._threads.close(self._release)
        finally:
            self._watchdog.stop()

    def _release(self) -> None:
        loaded, self._loaded, self._execution = self._loaded, None, None
        if loaded is None:
            return
        self._meter.forget(self._work)
        instances, sources = list(loaded.instances), loaded.sources
        del loaded  # or the models would outlive `unload`
        if any(thread.runs for thread in self._threads.given_up):
            instances.clear()
        unload(instances, sources)
