"""The course of a soak: busy until it is warm, with a rest in between, busy, at rest; and a sample every second."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from bench.soak import verdict
from bench.soak.stage import Stage
from bench.soak.traffic import KINDS, NORMAL, Traffic, http_get
from bench.soak.verdict import Finding

_TASKS = re.compile(r"^dl_inference_asyncio_tasks (\S+)$", re.MULTILINE)
_SAMPLE_S = 1.0
# The part of the warm-up that comes after the first rest, in which everything is connected anew.
_WARM_AGAIN = 0.25
# Two looks at the files, and some more.
_TAKEN_S = 1.5
_CONNECTING = 200
_QUIET_S = 3.0
_QUIET_SAMPLES, _QUIET_SAMPLE_S = 5, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Attributes:
    busy_s: seconds of load once it is warm.
    warm_up_s: and before.
    reload_s: seconds between two changes of the routes.
    restart_s: seconds between two ends of a node.
    """

    busy_s: float
    warm_up_s: float
    reload_s: float
    restart_s: float

    @property
    def total_s(self) -> float:
        """Seconds that the whole of it takes, about."""
        return self.warm_up_s + self.busy_s + 2 * (3 * _TAKEN_S + _QUIET_S + _QUIET_SAMPLES * _QUIET_SAMPLE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The gateway at one time.

    Attributes:
        phase: "warm-up", "busy" or "rest".
        ended: requests so far, by outcome.
        failed: requests so far that ended as they should not have.
    """

    at_s: float
    phase: str
    memory_mb: float
    descriptors: int
    threads: int
    tasks: int
    in_flight: int
    ended: dict[str, int]
    failed: int


class Soak:
    """One soak. Event loop only.

    Attributes:
        samples: one a second.
        rests: the lowest of several, after the warm-up and at the end.
        reloads: changes of the routes so far.
        restarts: ends of a node so far.
    """

    def __init__(self, stage: Stage, traffic: Traffic, pace: Pace, sampled: Callable[[Soak], None]) -> None:
        """Args:
        sampled: called after each sample.
        """
        self._stage = stage
        self.traffic = traffic
        self._pace = pace
        self._sampled = sampled
        self._phase = "warm-up"
        self._begun = asyncio.get_running_loop().time()
        self.samples: list[Sample] = []
        self.rests: list[Sample] = []
        self.reloads = 0
        self.restarts = 0

    async def run(self) -> None:
        """Raises:
        RuntimeError: a node could not be started again.
        """
        again_s = self._pace.warm_up_s * _WARM_AGAIN
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(self._keep_sampling())
            await self._busy("warm-up", self._pace.warm_up_s - again_s)
            await self._rest()
            await self._busy("warm-up", again_s)
            await self._busy("busy", self._pace.busy_s)
            await self._rest()
            sampling.cancel()

    async def _busy(self, phase: str, seconds: float) -> None:
        self._phase = phase
        ending = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_reloading(ending))
            group.create_task(self._keep_restarting(ending))
            await self.traffic.run(seconds)
            ending.set()

    async def _keep_reloading(self, ending: asyncio.Event) -> None:
        while not await _set_within(ending, self._pace.reload_s):
            self._stage.shuffle()
            self.reloads += 1

    async def _keep_restarting(self, ending: asyncio.Event) -> None:
        """Each node in turn: let it end one time, kill it the next."""
        while not await _set_within(ending, self._pace.restart_s):
            turn, which = divmod(self.restarts, len(self._stage.nodes))
            node = self._stage.nodes[which]
            await asyncio.to_thread(node.end, at_once=(turn + which) % 2 == 1)
            await asyncio.to_thread(node.start)
            self.restarts += 1

    async def _rest(self) -> None:
        """Look at the gateway with nothing to do: the lowest that each figure comes to."""
        self._phase = "rest"
        for _ in self._stage.settle():
            await asyncio.sleep(_TAKEN_S)
        await self.traffic.send(NORMAL, _CONNECTING)  # so that each connection is there again
        await asyncio.sleep(_QUIET_S)
        quiet = []
        for _ in range(_QUIET_SAMPLES):
            quiet.append(await self._sample())
            await asyncio.sleep(_QUIET_SAMPLE_S)
        lowest = {name: min(getattr(sample, name) for sample in quiet) for name in verdict.ALLOWED}
        self.rests.append(replace(quiet[-1], **lowest))

    async def _keep_sampling(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _SAMPLE_S
            self.samples.append(await self._sample())
            self._sampled(self)
            await asyncio.sleep(due - loop.time())

    async def _sample(self) -> Sample:
        usage = await asyncio.to_thread(self._stage.gateway.usage)
        _, metrics = await http_get(self._stage.http_address, "/metrics")
        found = _TASKS.search(metrics)
        assert found is not None
        ended: dict[str, int] = {}
        for outcomes in self.traffic.ended.values():
            for outcome, count in outcomes.items():
                ended[outcome] = ended.get(outcome, 0) + count
        return Sample(
            at_s=round(asyncio.get_running_loop().time() - self._begun, 2),
            phase=self._phase,
            memory_mb=round(usage.memory_mb, 2),
            descriptors=usage.descriptors,
            threads=usage.threads,
            tasks=round(float(found[1])),
            in_flight=self.traffic.in_flight,
            ended=ended,
            failed=self.traffic.failed,
        )

    def findings(self) -> list[Finding]:
        """What came of each rule."""
        busy = [sample for sample in self.samples if sample.phase == "busy"]
        before, after = self.rests
        return [
            verdict.answered(self.traffic.sent, self.traffic.ended, {kind.name: kind.expected for kind in KINDS}),
            verdict.memory(growth(busy)),
            *(verdict.level(name, getattr(before, name), getattr(after, name)) for name in verdict.ALLOWED),
        ]


def growth(samples: Sequence[Sample]) -> verdict.Slope:
    """Of memory."""
    return verdict.slope([sample.at_s for sample in samples], [sample.memory_mb for sample in samples])


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()
