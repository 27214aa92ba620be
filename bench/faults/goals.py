"""The scorecard's rows: the fault, and what its figures should be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

LEAST_REQUESTS = 15_000
"""Of which none may fail, where none may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What one figure should be: `least` at the least, `most` at the most."""

    figure: str
    most: float = math.inf
    least: float = -math.inf

    def met(self, value: float) -> bool:
        """NaN meets nothing."""
        return self.least <= value <= self.most

    def __str__(self) -> str:
        if self.most == self.least:
            return f"{self.figure} = {self.most:g}"
        if self.most < math.inf:
            return f"{self.figure} ≤ {self.most:g}"
        return f"{self.figure} ≥ {self.least:g}"


def at_most(figure: str, most: float) -> Goal:
    return Goal(figure=figure, most=most)


def at_least(figure: str, least: float) -> Goal:
    return Goal(figure=figure, least=least)


def exactly(figure: str, value: float) -> Goal:
    return Goal(figure=figure, most=value, least=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fault of the scorecard.

    Attributes:
        id: "F1".
        hard: the goals that no run may miss, however short it is and whatever else the machine does.
        goals: the others, which take a quiet machine, and requests enough.
        tests: where it is proven beside the rig, or instead: a test's file and name.
        command: what measures it instead, and how.
        page: the page which that writes.
    """

    id: str
    fault: str
    hard: tuple[Goal, ...] = ()
    goals: tuple[Goal, ...] = ()
    tests: tuple[str, ...] = ()
    command: str = ""
    page: str = ""

    @property
    def goal(self) -> str:
        """All of its goals, for people: where a figure has two, the one that is not hard."""
        soft = {goal.figure for goal in self.goals}
        return "; ".join(map(str, (*(goal for goal in self.hard if goal.figure not in soft), *self.goals)))


_ENOUGH = at_least("requests", LEAST_REQUESTS)
_NONE_FAILED = exactly("failed", 0)

ROWS = (
    Row(
        id="F1",
        fault="SIGKILL one of four nodes",
        hard=(_NONE_FAILED,),
        goals=(_ENOUGH, exactly("routed_after_1s", 0), at_most("attempts_per_request", 1.01)),
    ),
    Row(
        id="F1b",
        fault="three of four at once, then the fourth",
        hard=(at_most("failed_beyond_in_flight", 0), exactly("timeouts_without_nodes", 0)),
        goals=(
            exactly("failed_after_200ms", 0),
            at_most("unavailable_p99_ms", 50),
            at_most("first_success_s", 1),
        ),
    ),
    Row(
        id="F2",
        fault="SIGSTOP one of four",
        hard=(_NONE_FAILED,),
        goals=(_ENOUGH, exactly("share_after_2s", 0), at_most("p99_ratio", 1.2)),
    ),
    Row(
        id="F3",
        fault="black-holed connection to one of four",
        hard=(_NONE_FAILED,),
        goals=(
            _ENOUGH,
            exactly("share_after_2s", 0),
            at_most("p99_ratio", 1.2),
            at_most("recovered_s", 1.5),
        ),
    ),
    Row(
        id="F4",
        fault="one of four ten times slower",
        goals=(_NONE_FAILED, at_most("p99_ratio", 1.5)),
    ),
    Row(
        id="F4-eleven",
        fault="one of eleven takes 2 s for half the time; clients wait 1 s",
        goals=(at_least("success_percent", 99.95),),
    ),
    Row(
        id="F5",
        fault="a node that fails at once, and says so to health checks",
        hard=(_NONE_FAILED, at_most("share_of_fair", 1.0)),
        goals=(at_most("share_of_fair_after_1s", 0.1),),
    ),
    Row(
        id="F5-lies",
        fault="a node that fails at once, and tells health checks that it is well",
        hard=(at_most("share_of_fair", 1.05),),
        goals=(_NONE_FAILED, at_most("share_of_fair_after_1s", 0.1)),
    ),
    Row(
        id="F5b",
        fault="client-fault codes from a node; a storm of cancels by clients",
        hard=(exactly("retries", 0), exactly("ejections", 0), exactly("starved_seconds", 0)),
        goals=(at_least("least_share_of_fair", 0.9), at_most("most_share_of_fair", 1.1)),
    ),
    Row(
        id="F6",
        fault="a node flaps, 1 s up and 1 s down; half of another's answers are errors",
        goals=(at_most("failed_percent", 0.05), at_most("attempts_per_request", 1.1)),
    ),
    Row(
        id="F7",
        fault="recovery after F1 to F3",
        goals=(_NONE_FAILED, at_most("recovered_s", 1.5)),
    ),
    Row(
        id="F8",
        fault="overload, up to 1.74 times capacity",
        hard=(exactly("neither_answered_nor_rejected", 0),),
        goals=(
            at_least("goodput_of_capacity", 0.9),
            at_most("accepted_p99_ratio", 3),
            at_most("rejection_p99_ms", 20),
        ),
    ),
    Row(
        id="F9",
        fault="every node fails",
        hard=(at_most("attempts_per_request", 1.25),),
        goals=(at_most("attempts_per_request", 1.2), at_most("attempts_after_10s", 1.005), exactly("failed_after", 0)),
    ),
    Row(
        id="F10",
        fault="F1 to F6 at 67 %",
        goals=(at_most("worse_than_without_ejection", 0), exactly("healthy_ejected", 0)),
    ),
    Row(
        id="F11",
        fault="one node's connections delayed, reset, half closed, trickling, corrupted, in turn",
        goals=(_NONE_FAILED,),
    ),
    Row(
        id="C1",
        fault="node file: NUL bytes, UTF-16, CRLF, 10 MB, `100=`, port 70000, duplicates, empty list",
        hard=(_NONE_FAILED, exactly("good_lines_not_applied", 0)),
        goals=(exactly("damages_without_one_warning", 0),),
    ),
    Row(
        id="C2",
        fault="node file written byte by byte, missing for 1 s, unreadable, a directory, a symlink swap",
        hard=(_NONE_FAILED, exactly("prefixes_taken", 0)),
        goals=(at_most("reload_afterwards_s", 1),),
    ),
    Row(
        id="C3",
        fault="node added, removed, reordered; task removed",
        hard=(_NONE_FAILED,),
        goals=(at_most("applied_s", 1), exactly("channels_rebuilt", 0), exactly("not_found_after_1s", 1)),
    ),
    Row(
        id="C4",
        fault="fuzzed node file",
        tests=("tests/test_nodefile.py::test_any_bytes_are_read_without_a_crash",),
    ),
    Row(
        id="P1",
        fault="unknown, negative, 2³¹, fractional, non-numeric, missing task; 1 MB model name",
        hard=(exactly("unanswered", 0), exactly("node_calls", 0)),
        goals=(at_most("p99_ms", 10),),
    ),
    Row(
        id="P2",
        fault="message over the limit, 2 GiB length prefix, compressed bomb",
        hard=(at_least("oversized", 1), exactly("not_resource_exhausted", 0), exactly("failed", 0)),
        goals=(at_most("memory_of_limit", 2), at_most("p99_ratio", 1.2), at_least("least_share_of_fair", 0.9)),
    ),
    Row(
        id="P3",
        fault="malformed protobuf, truncated frame, wrong content type, HTTP/1.1, TLS hello",
        hard=(exactly("failed", 0), exactly("not_invalid_argument", 0), exactly("node_calls", 0)),
        tests=(
            "tests/wire/test_wire_fuzz.py",
            "tests/path/test_path_raw_http2.py::test_p3_another_protocol_ends_its_own_connection_only",
        ),
    ),
    Row(
        id="P4",
        fault="500 slow connections: no preface, trickled headers, a trickled message, no window",
        hard=(at_least("connections", 500), exactly("failed", 0)),
        goals=(at_most("p99_ratio", 1.2), at_most("memory_mb", 50)),
    ),
    Row(
        id="P5",
        fault="rapid reset, ping flood",
        hard=(at_least("sent_reset", 1000), at_least("sent_ping", 1000), exactly("failed", 0)),
        goals=(at_most("p99_ratio", 1.5),),
    ),
    Row(
        id="L1",
        fault="clients cancel",
        hard=(_NONE_FAILED, at_least("cancelled", 1), exactly("retries", 0), exactly("cancels_missed", 0)),
        goals=(
            at_most("seen_after_ms", 50),
            at_least("least_share_of_fair", 0.9),
            at_most("tasks_left", 2),
        ),
    ),
    Row(
        id="L2",
        fault="a client's deadline shorter than the task's",
        hard=(at_most("passed_on_beyond_ms", 5), exactly("worked_after", 0)),
    ),
    Row(
        id="L3",
        fault="SIGTERM under load",
        hard=(exactly("failed", 0), exactly("exit_status", 0)),
        goals=(exactly("said_not_serving_first", 1), at_most("ended_beyond_grace_s", 1)),
    ),
    Row(
        id="L4",
        fault="SIGKILL one of two gateway processes",
        hard=(at_least("victims_connections", 1), exactly("failed_later", 0)),
        goals=(at_most("failed_beyond_in_flight", 0), at_most("respawned_s", 1), at_most("share_of_sick_node", 0.1)),
    ),
    Row(
        id="L5",
        fault="rolling restart of nodes every 10 s",
        hard=(_NONE_FAILED,),
        goals=(_ENOUGH,),
    ),
    Row(
        id="R1",
        fault="file descriptors exhausted",
        hard=(at_least("connections_held", 40), exactly("alive", 1)),
        goals=(at_most("normal_again_s", 1),),
    ),
    Row(
        id="R2",
        fault="soak with reloads and flapping",
        command="`make soak`: ten minutes of requests of all kinds while routes are written anew and nodes come and "
        "go, and what of memory, descriptors, threads and tasks stays behind",
        page="docs/soak.md",
    ),
    Row(
        id="R4",
        fault="a plugin's strategy raises, blocks, or returns a removed node",
        tests=(
            "tests/gateway/test_forwarding.py::test_round_robin_takes_over_from_a_strategy_that_fails",
            "tests/gateway/test_forwarding.py::test_a_strategy_that_blocks_again_and_again_is_not_asked_any_more",
            "tests/gateway/test_forwarding.py::test_a_node_that_a_strategy_was_not_given_is_not_asked",
        ),
    ),
    Row(
        id="S1",
        fault="TLS: expired, wrong CA, wrong name, missing file, rotation, no client certificate",
        tests=(
            "dl_inference_core/testing/transport_tls.py::test_a_node_with_a_wrong_certificate_is_unreachable",
            "tests/test_certificates.py::test_a_certificate_out_of_its_time_is_said_with_the_time",
            "tests/test_certificates.py::test_a_file_that_cannot_be_read_is_said",
            "tests/test_certificates.py::test_files_that_change_are_taken_up_once_they_fit",
            "tests/path/test_path_tls.py::test_whoever_shows_none_or_another_authoritys_or_speaks_plaintext_is_not",
        ),
    ),
    Row(
        id="S2",
        fault="path traversal in model, task and version names",
        tests=(
            "tests/hostile/test_hostile_paths.py",
            "tests/path/test_path_bad_input.py::test_names_that_would_be_paths",
            "tests/node/test_repository.py::test_only_folders_with_plain_names_count",
        ),
    ),
    Row(
        id="S3",
        fault="malicious `model.pth`",
        tests=(
            "plugins/torch_backend/tests/test_torch_refusals.py"
            "::test_nothing_of_a_hostile_pickle_runs_whatever_it_is_called",
            "tests/path/test_path_bad_input.py::test_hole_7_a_pickle_is_not_loaded_and_nothing_of_it_runs",
        ),
    ),
    Row(
        id="S4",
        fault="reserved tags and metadata from clients",
        tests=("tests/path/test_path_bad_input.py::test_s4_tags_become_no_arguments_of_the_model",),
    ),
)
BY_ID: Mapping[str, Row] = {row.id: row for row in ROWS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What came of one row with one system at one load.

    Attributes:
        row: its id.
        load: as a person calls it.
        figures: NaN where one could not be had.
        goals: what they should be.
        hard: how many of the goals, from the first, no run may miss.
        why: why it was not measured; "" if it was.
        measured: when it was, in UTC, to the minute; "" if it was not.
    """

    row: str
    system: str
    transport: str = ""
    strategy: str = ""
    load: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()
    hard: int = 0
    why: str = ""
    measured: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Findings that have it alike are of the same thing."""
        return self.row, self.system, self.load

    @property
    def ours(self) -> bool:
        """Whether it is of our gateway, not of a baseline."""
        return bool(self.transport)

    @property
    def missed(self) -> tuple[Goal, ...]:
        return tuple(goal for goal in self.goals if not goal.met(self.figures.get(goal.figure, math.nan)))

    @property
    def met(self) -> bool:
        """Never where nothing was measured."""
        return not self.why and bool(self.goals) and not self.missed

    @property
    def hard_met(self) -> bool:
        return not self.why and not set(self.missed) & set(self.goals[: self.hard])

    def values(self) -> dict[str, Any]:
        """As faults.json has it; what is no number there is null, and named in "never" if it is infinite."""
        return {
            "id": self.row,
            "system": self.system,
            "transport": self.transport,
            "strategy": self.strategy,
            "load": self.load,
            "requests": self.figures.get("requests", 0),
            "failed": self.figures.get("failed", 0),
            "figures": {name: value if math.isfinite(value) else None for name, value in self.figures.items()},
            "goal": "; ".join(map(str, self.goals)),
            "missed": [str(goal) for goal in self.missed],
            "met": self.met,
            "hard_met": self.hard_met,
            "measured": self.measured or None,
            "why": self.why,
            "never": [name for name, value in self.figures.items() if math.isinf(value)],
        }


def judged(row: str, finding: Finding, *, enough: bool = True) -> Finding:
    """`finding` with the goals of `row`.

    Args:
        enough: whether it had requests enough for the goals that take many.
    """
    found = BY_ID[row]

    def counts(goal: Goal) -> bool:
        if goal is _ENOUGH:
            return enough
        # What a baseline does not tell is not held against it.
        return finding.ours or not math.isnan(finding.figures.get(goal.figure, 0.0))

    hard, soft = (tuple(filter(counts, goals)) for goals in (found.hard, found.goals))
    return replace(finding, row=row, goals=(*hard, *soft), hard=len(hard))


def restored(values: Mapping[str, Any], written: str) -> Finding:
    """A finding as faults.json has it, with the goals that its row has now.

    Args:
        written: when the file was: when a finding was measured that does not say when itself.
    """
    # Files without "never" do not tell what is infinite from what is not known; seconds are never the latter.
    never = values.get("never", [name for name in values["figures"] if name.endswith("_s")])
    measured = values.get("measured")
    finding = Finding(
        row="",
        figures={
            name: value if value is not None else math.inf if name in never else math.nan
            for name, value in values["figures"].items()
        },
        measured="" if values["why"] else measured if isinstance(measured, str) else written,
        **{name: values[name] for name in ("system", "transport", "strategy", "load", "why")},
    )
    return judged(values["id"], finding)


def worst(values: Sequence[float]) -> float:
    """The largest; NaN if any is."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)
