"""Which runs there are: each system, load and row that the scorecard asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from bench.faults import experiments, files, gateways, hostile
from bench.faults.course import BRIEF, FAULTS, FULL, ONCE, SHORT, Pace
from bench.faults.experiments import Experiment, Findings, seconds_of
from bench.faults.gateways import BASELINES, DEFAULT_STRATEGY, System
from bench.faults.goals import Finding

SEED = 1
_SINGLE = ("F1", "F2", "F3")
_SEVERAL = ("F1", "F2", "F3", "F4", "F5", "F5-lies")
# Of those that say it, the faults are done to each strategy; of the others, only that which makes the rules.
_EVERYWHERE = ("dynamic_weighted_round_robin", "round_robin", "least_request", "peak_ewma", "prequal")
_SHORT_STRATEGIES = (DEFAULT_STRATEGY, "least_request")


def full(transports: Sequence[str], measured: Sequence[Finding]) -> Iterator[Experiment]:
    """Everything, in the order in which it is run.

    Args:
        transports: that our gateway is to stand on, the first of which every strategy is run on.
        measured: grows while the runs are made.
    """
    for transport in transports:
        system = System(transport=transport, strategy=DEFAULT_STRATEGY)
        for load in ("40 %", "67 %"):
            for row in _SINGLE:
                yield _single(row, system, load, FULL)
    for strategy in gateways.strategies():
        system = System(transport=transports[0], strategy=strategy)
        rows = _SEVERAL if strategy in _EVERYWHERE else ("F5", "F5-lies")
        yield _several(rows, system, "67 %", BRIEF)
        if strategy in _EVERYWHERE:
            yield _experiment("F4-eleven", ("F4-eleven",), system, "300/s", 40, experiments.eleven, FULL)
    hedging = System(transport=transports[0], strategy=DEFAULT_STRATEGY, route={"hedge": True}, note="hedged")
    yield _several(("F4",), hedging, "67 %", BRIEF)
    yield _experiment("F4-eleven", ("F4-eleven",), hedging, "300/s", 40, experiments.eleven, FULL)
    for transport in transports[1:]:
        system = System(transport=transport, strategy=DEFAULT_STRATEGY)
        yield _several(_SEVERAL[3:], system, "67 %", BRIEF)
    for name in BASELINES:
        yield _several(_SEVERAL, System(name=name), "67 %", BRIEF)
    for number, transport in enumerate(transports):
        system = System(transport=transport, strategy=DEFAULT_STRATEGY)
        yield from _once(system, ONCE)
        if number == 0:
            yield _experiment(
                "F10",
                ("F10",),
                system,
                "67 %",
                seconds_of(BRIEF, len(_SEVERAL)),
                partial(experiments.without_ejection, _SEVERAL, measured=measured, load="67 %"),
                BRIEF,
                isolated=True,
            )


def short(transports: Sequence[str], _: Sequence[Finding]) -> Iterator[Experiment]:
    """A couple of minutes of it: what no run may miss, the default strategy on each transport in turn."""
    for number, transport in enumerate(transports):
        system = System(transport=transport, strategy=DEFAULT_STRATEGY)
        yield _several(("F1", "F2", "F5"), system, "67 %", SHORT)
        if number == 0:
            for strategy in _SHORT_STRATEGIES[1:]:
                yield _several(("F5",), System(transport=transport, strategy=strategy), "67 %", SHORT)
    yield from _once(
        System(transport=transports[0], strategy=DEFAULT_STRATEGY), SHORT, ("F1b", "F5b", "F9", "C3", "L1", "L3")
    )


def _once(system: System, pace: Pace, rows: Collection[str] = ()) -> Iterator[Experiment]:
    """What is run with one strategy only.

    Args:
        rows: those that are wanted; by default all.
    """
    runs: tuple[tuple[str, str, Callable[..., Findings], float], ...] = (
        ("F1b", "67 % of one", experiments.cascade, seconds_of(pace)),
        ("F5b", "67 %", partial(experiments.client_faults, load="67 %"), seconds_of(pace, 2)),
        ("F6", "67 %", partial(experiments.flapping, load="67 %"), seconds_of(pace, 2)),
        ("F8", "174 %", experiments.overload, seconds_of(pace, 2)),
        ("F9", "67 %", partial(experiments.all_fail, load="67 %"), seconds_of(pace) + 6),
        ("F11", "67 %", partial(experiments.broken_connections, load="67 %"), seconds_of(pace, 3)),
        ("C1", "40 %", files.damaged, seconds_of(pace, 2)),
        ("C2", "40 %", files.half_written, seconds_of(pace, 2)),
        ("C3", "40 %", files.changed, seconds_of(pace, 1)),
        ("P1", "one at a time", hostile.odd_tasks, seconds_of(pace, 1)),
        ("P2", "40 %", hostile.large_messages, seconds_of(pace, 3)),
        ("P3", "40 %", hostile.malformed, seconds_of(pace, 1)),
        ("P4", "40 %", hostile.slow_clients, seconds_of(pace, 4)),
        ("P5", "40 %", hostile.floods, seconds_of(pace, 2)),
        ("L1", "20/s", hostile.cancels, seconds_of(pace, 1)),
        ("L2", "40/s", hostile.deadlines, seconds_of(pace, 1)),
        ("L3", "67 %", hostile.ended, seconds_of(pace, 1)),
        ("L4", "67 %", hostile.worker_killed, seconds_of(pace, 2)),
        ("L5", "67 %", partial(experiments.rolling, load="67 %"), seconds_of(pace, 0, enough_at="67 %")),
        ("R1", "40 %", hostile.descriptors, seconds_of(pace, 1)),
    )
    for row, load, run, seconds in runs:
        if not rows or row in rows:
            yield _experiment(row, (row,), system, load, seconds, run, pace)


def _single(row: str, system: System, load: str, pace: Pace) -> Experiment:
    rows = (row, "F7") if FAULTS[row].recovery else (row,)
    return _experiment(
        row,
        rows,
        system,
        load,
        seconds_of(pace, enough_at=load),
        partial(experiments.single, row, load=load),
        pace,
        isolated=FAULTS[row].isolated,
    )


def _several(rows: Sequence[str], system: System, load: str, pace: Pace) -> Experiment:
    recoveries = ("F7",) if any(FAULTS[row].recovery for row in rows) else ()
    return _experiment(
        " ".join(rows),
        (*rows, *recoveries),
        system,
        load,
        seconds_of(pace, len(rows)),
        partial(experiments.several, rows, load=load),
        pace,
        isolated=any(FAULTS[row].isolated for row in rows),
    )


def _experiment(
    name: str,
    rows: tuple[str, ...],
    system: System,
    load: str,
    seconds: float,
    run: Callable[..., Findings],
    pace: Pace,
    *,
    isolated: bool = False,
) -> Experiment:
    return Experiment(
        name=name,
        rows=rows,
        system=system,
        load=load,
        seconds=seconds,
        run=partial(run, system=system, pace=pace, seed=SEED),
        isolated=isolated,
    )
