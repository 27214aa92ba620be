"""Finds batches that do not end: reports them, and after a while lets a fresh thread take over."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import HandlerFailed, InferenceError

if TYPE_CHECKING:
    from dl_inference_core.metrics import Metrics
    from dl_inference_core.node.model_threads import ModelThread, ModelThreads
    from dl_inference_core.node.queue import QueuedRequest

_log = logging.getLogger(__name__)

_LOOKS = 10
"""Looks within the shorter limit: a stuck batch is noticed at most a tenth too late."""
_LONGEST_PAUSE_S = 5.0


class WatchdogConfig(PluginOptions):
    """What happens when a batch does not end, because the handler or the model hangs or takes very long."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    stuck_after_s: float = Field(default=20.0, ge=0)
    """seconds after which a running batch counts as stuck: the log shows where its thread is, and the version is not
    ready while all its threads are stuck; 0 means never. Raise it for a model that takes longer for honest requests"""
    replace_after_s: float = Field(default=300.0, ge=0)
    """seconds after which the requests of a stuck batch fail with INTERNAL, and a fresh thread takes over; the stuck
    thread ends when its call returns; 0 means never"""


class Watchdog:
    """Watches the model threads of one version. Event loop only, but for `stuck`."""

    def __init__(
        self,
        model: str,
        number: int,
        threads: ModelThreads,
        fail: Callable[[QueuedRequest, InferenceError], None],
        metrics: Metrics | None,
    ) -> None:
        self._model = model
        self._where = f'model "{model}" version {number}'
        self._threads = threads
        self._fail = fail
        self._metrics = metrics
        self._timer: asyncio.TimerHandle | None = None

    def start(self, config: WatchdogConfig) -> None:
        """Look from now on, until `stop`."""
        self._config = config
        limits = [limit for limit in (config.stuck_after_s, config.replace_after_s) if limit]
        if limits:
            self._pause_s = min(min(limits) / _LOOKS, _LONGEST_PAUSE_S)
            self._look_later()

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def stuck(self) -> bool:
        """Whether no thread can answer requests. Any thread."""
        # While one thread gathers a batch, no other can begin one.
        return all(each.stuck for each in self._threads) or any(each.stuck and each.gathers for each in self._threads)

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._look)

    def _look(self) -> None:
        self._look_later()  # whatever comes of this look
        now = time.monotonic()
        for thread in self._threads:
            since = thread.spent[1]
            if not thread.requests or since == math.inf:
                continue
            self._judge(thread, since, now - since)

    def _judge(self, thread: ModelThread, since: float, running_s: float) -> None:
        config = self._config
        first = min(limit for limit in (config.stuck_after_s, config.replace_after_s) if limit)
        if running_s >= first and not thread.stuck:
            thread.reported = since
            if self._metrics is not None:
                self._metrics.stuck_batch(self._model)
            _log.error(
                "%s: a batch of %d requests has run for %.0f s on thread %d (stuck_after_s); the thread is here:\n%s",
                self._where,
                len(thread.requests),
                running_s,
                thread.number,
                thread.stack(),
            )
        if config.replace_after_s and running_s >= config.replace_after_s and self._replace(thread, running_s):
            _log.error(
                "%s: thread %d has not returned for %.0f s (replace_after_s); a fresh thread takes over",
                self._where,
                thread.number,
                running_s,
            )
            for request in thread.requests:
                self._fail(request, HandlerFailed(f"{self._where}: the model did not return within {running_s:.0f} s"))

    def _replace(self, thread: ModelThread, running_s: float) -> bool:
        """As `ModelThreads.replace`; where no thread can be started, the next look tries again."""
        try:
            return self._threads.replace(thread)
        except RuntimeError as error:
            _log.error(
                "%s: thread %d has not returned for %.0f s (replace_after_s), and no other can take over: %s",
                self._where,
                thread.number,
                running_s,
                error,
            )
            return False
