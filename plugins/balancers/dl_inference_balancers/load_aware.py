"""Strategies that compare what nodes have to do, and how fast they do it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import Field

from dl_inference_balancers.candidates import NEUTRAL, SUCCESS, State, Trusting
from dl_inference_core.config import PluginOptions
from dl_inference_core.gateway.balancing import Node, Outcome
from dl_inference_core.transport import Exchange

_DRAWS = 5


class LoadAware(Trusting[State]):
    """What the strategies of this module share: who is compared. A subclass says who of those is the best."""

    def __init__(self, options: PluginOptions, *, draws: int, without_chance: int) -> None:
        """Args:
        draws: how many nodes are drawn by chance to be compared.
        without_chance: up to how many nodes all are compared.
        """
        super().__init__(options, compared=max(draws, without_chance))
        self._draws = draws
        self._without_chance = without_chance

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        if nodes is not self._given:
            self._take(nodes)
        candidates = self._eligible
        if len(candidates) > self._without_chance:
            candidates = self._drawn_and_trusted() if self.doubted else self._drawn()
        elif self.doubted:
            candidates = self._trusted(candidates) or self._most_trusted(candidates)
        return self._best(candidates) if len(candidates) > 1 else candidates[0]

    @abstractmethod
    def _best(self, candidates: Sequence[Node]) -> Node:
        """One of two or more."""

    def _drawn_and_trusted(self) -> Sequence[Node]:
        for _ in range(_DRAWS):
            drawn = self._drawn()
            if trusted := self._trusted(drawn):
                return trusted
        return self._most_trusted(drawn)

    def _drawn(self) -> Sequence[Node]:
        """`draws` different eligible nodes, of which there are more, in an order by chance."""
        nodes, draws, chance = self._eligible, self._draws, self.random.random
        count = len(nodes)
        if draws == 2:
            first = int(chance() * count)
            second = int(chance() * (count - 1))
            return nodes[first], nodes[second + (second >= first)]
        places: dict[int, None] = {}
        while len(places) < draws:
            places[int(chance() * count)] = None
        return [nodes[place] for place in places]


_FEW = 8


class LeastRequest(LoadAware[float]):
    """The node with the fewest requests in flight, and less for one that fails, however idle it looks.

    Where all weights are equal, the one with the fewest of `choices` nodes drawn by chance, of all where they are 8 or
    fewer; ties by chance. Where weights differ, smooth weighted round robin on w / (in flight + 1)^`bias`: over all
    where they are 8 or fewer, else over `choices` nodes drawn in proportion to w, which counts no second time then.

    Cost of a choice: O(`choices`), O(`choices` * log n) where weights differ.

    Source: Envoy's weighted least request, whose formula this is; Envoy holds nothing against a node that fails.
    """

    name = "least_request"

    class Options(PluginOptions):
        """Attributes:
        choices: how many nodes are compared where there are more than 8.
        bias: how much requests in flight count where weights differ; 0 is weighted round robin.
        """

        choices: int = Field(default=2, ge=2, le=8)
        bias: float = Field(default=1.0, ge=0, le=10)

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        assert isinstance(options, self.Options)
        super().__init__(options, draws=options.choices, without_chance=_FEW)

    def forget(self, node: Node) -> None:
        super().forget(node)
        self._known = dict.fromkeys(self._known, 0.0)

    def _first(self, node: Node) -> float:
        return 0.0

    def _best(self, candidates: Sequence[Node]) -> Node:
        if self._bounds is not None:
            return self._by_turns(candidates)
        counts = [node.in_flight for node in candidates]
        fewest = min(counts)
        if counts.count(fewest) == 1:
            return candidates[counts.index(fewest)]
        ties = [node for node, count in zip(candidates, counts, strict=True) if count == fewest]
        return ties[int(self.random.random() * len(ties))]

    def _by_turns(self, candidates: Sequence[Node]) -> Node:
        known, bias = self._known, self.options.bias
        drawn_by_weight = len(self._eligible) > _FEW
        total = 0.0
        highest = -math.inf
        for node in candidates:
            weight = (1 if drawn_by_weight else node.weight) / (node.in_flight + 1) ** bias
            total += weight
            known[node] = current = known[node] + weight
            if current > highest:
                highest, best = current, node
        known[best] -= total
        return best

    def _drawn(self) -> Sequence[Node]:
        if self._bounds is None:
            return super()._drawn()
        return list(dict.fromkeys([self._draw() for _ in range(self._draws)]))


@dataclass(slots=True)
class _Average:
    """Of a node's latency, in seconds, as of the last sample."""

    seconds: float
    at: float
    measured: bool = False


class PeakEwma(LoadAware[_Average]):
    """The node that would be done soonest: the least latency * (requests in flight + 1) / weight.

    It is the least of `choices` nodes drawn by chance. The latency is an average that a slower answer replaces at once,
    and that a faster one lowers by how long the last sample is ago: it keeps e^(-Δt / `decay_s`) of itself. It is read
    as if it went on to fall like that, so that a node that was slow is tried again. An attempt that failed counts with
    the time that it took, where that is more than the average, and never lowers it.

    Cost of a choice: O(`choices`).

    Source: Finagle's PeakEwma (finagle-core, com.twitter.finagle.loadbalancer).
    """

    name = "peak_ewma"

    class Options(PluginOptions):
        """Attributes:
        choices: how many nodes are compared.
        decay_s: in what time the average falls to 1/e where answers are faster, or none come.
        start_s: the latency that a node counts with before its first answer.
        """

        choices: int = Field(default=2, ge=2, le=8)
        decay_s: float = Field(default=10.0, gt=0, le=3600)
        start_s: float = Field(default=0.01, gt=0, le=60)

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        assert isinstance(options, self.Options)
        super().__init__(options, draws=options.choices, without_chance=options.choices)

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        super().record(node, outcome, seconds)
        average = self._known.get(node)
        if average is None or outcome is NEUTRAL:
            return
        now = self.clock()
        if seconds > average.seconds or (outcome is SUCCESS and not average.measured):
            average.seconds = seconds
        elif outcome is SUCCESS:
            kept = math.exp((average.at - now) / self.options.decay_s)
            average.seconds = average.seconds * kept + seconds * (1 - kept)
        else:
            return
        average.at = now
        average.measured = True

    def learned(self, node: Node) -> float | None:
        """Its average latency, in seconds."""
        average = self._known.get(node)
        return average.seconds if average is not None and average.measured else None

    def learn(self, node: Node, value: float) -> None:
        if node in self._known:
            self._known[node] = _Average(value, self.clock(), measured=True)

    def _first(self, node: Node) -> _Average:
        return _Average(self.options.start_s, self.clock())

    def _best(self, candidates: Sequence[Node]) -> Node:
        known, decay_s, now = self._known, self.options.decay_s, self.clock()
        least = math.inf
        best = candidates[0]
        for node in candidates:
            average = known[node]
            latency = average.seconds * math.exp((average.at - now) / decay_s)
            cost = latency * (node.in_flight + 1) / (node.weight or 1)
            if cost < least:
                least, best = cost, node
        return best


_LAST = 5
_WINDOW = 128
_EVERY = 16


@dataclass(slots=True)
class _Answers:
    """The last ones that a node gave with about the same number of others in flight; the latency is in seconds."""

    last: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST))
    median: float = 0.0
    at: float = 0.0


@dataclass(slots=True)
class _Latencies:
    """By the number of bits of the number in flight: 0, 1, 2 to 3, 4 to 7, …

    Attributes:
        latest: those that the last answer belongs to.
    """

    by_load: dict[int, _Answers] = field(default_factory=dict)
    latest: _Answers | None = None

    def add(self, in_flight: int, seconds: float, now: float) -> None:
        load = in_flight.bit_length()
        answers = self.by_load.get(load)
        if answers is None:
            answers = self.by_load[load] = _Answers()
        last = answers.last
        last.append(seconds)
        answers.median = sorted(last)[len(last) // 2]
        answers.at = now
        self.latest = answers

    def at(self, in_flight: int, now: float, age_s: float) -> float:
        """What the next one would take; 0 if nothing is known."""
        latest = self.latest
        if latest is None:
            return 0.0
        answers = self.by_load.get(in_flight.bit_length(), latest)
        if latest.at - answers.at > age_s:
            answers = latest
        silent = now - latest.at
        return answers.median if silent <= age_s else answers.median * 0.5 ** (silent / age_s - 1)


class Prequal(LoadAware[_Latencies]):
    """Of the nodes that are not among the busiest, the one that answers fastest at what it now has to do.

    Compared are `pool` nodes drawn by chance, all where there are no more. A node is hot if it has more requests in
    flight than the `hot_quantile` of what nodes lately had when they were compared. The cold node of the least latency
    is chosen; if all are hot, the one with the fewest in flight. The latency is the median of the node's last 5 answers
    at about its number of requests in flight; where those are older by `age_s` than others of the node, of the others.
    What a node that has not answered for `age_s` is remembered with halves every `age_s` from then on, so that it is
    tried again; one of which nothing is known comes first, several by chance. Failed attempts say nothing of latency.
    Of weights only 0 has a meaning. Nodes that are alike get uneven parts while there is little to do: the one that was
    lately fastest gets all until it is hot.

    Cost of a choice: O(`pool`), and every 16 choices 128 numbers are sorted.

    Source: Wydrowski, Kleinberg, Rumble and Archer, "Load is not what you should balance: Introducing Prequal" (NSDI
    2024). There clients probe; here the gateway knows what it has in flight, and each answer tells a latency.
    """

    name = "prequal"

    class Options(PluginOptions):
        """Attributes:
        hot_quantile: 0 goes by requests in flight alone, 1 by latency alone.
        pool: how many nodes are compared.
        age_s: how long a latency is good for.
        """

        hot_quantile: float = Field(default=0.84, ge=0, le=1)
        pool: int = Field(default=16, ge=2, le=64)
        age_s: float = Field(default=1.0, gt=0, le=60)

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        assert isinstance(options, self.Options)
        super().__init__(options, draws=options.pool, without_chance=options.pool)
        self._seen: deque[int] = deque(maxlen=_WINDOW)
        self._choices = 0
        self._hot_above = 0

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        super().record(node, outcome, seconds)
        if outcome is SUCCESS and (latencies := self._known.get(node)) is not None:
            latencies.add(node.in_flight, seconds, self.clock())

    def _first(self, node: Node) -> _Latencies:
        return _Latencies()

    def _best(self, candidates: Sequence[Node]) -> Node:
        counts = [node.in_flight for node in candidates]
        self._seen.extend(counts)
        if self._choices % _EVERY == 0:
            seen = sorted(self._seen)
            self._hot_above = seen[max(0, math.ceil(self.options.hot_quantile * len(seen)) - 1)]
        self._choices += 1
        known, hot_above, age_s, now = self._known, self._hot_above, self.options.age_s, self.clock()
        least = math.inf
        best, ties = None, 0
        for node, count in zip(candidates, counts, strict=True):
            if count <= hot_above:
                latency = known[node].at(count, now, age_s)
                if latency < least:
                    least, best, ties = latency, node, 1
                elif latency == least:
                    ties += 1
                    if self.random.random() * ties < 1:
                        best = node
        return best if best is not None else candidates[counts.index(min(counts))]
