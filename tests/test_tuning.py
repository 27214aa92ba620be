"""`dl-inference-core tune`: what is tried and chosen, what is written, and all of it with real servers."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner
from dl_inference_tools.load_testing.report import console
from dl_inference_tools.load_testing.results import Load, Row, encoded, histogram
from dl_inference_tools.tuning import model_file, report, search, serving
from dl_inference_tools.tuning.model_file import TunedModel
from dl_inference_tools.tuning.report import Tuning
from dl_inference_tools.tuning.search import Budget, Candidate, Settings, Space, Turns, choose, reaches
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.cli import main
from dl_inference_core.config import Config
from dl_inference_core.cpus import cores
from dl_inference_core.errors import ConfigError, ModelError
from dl_inference_core.testing.fakes import FakeBackend

BEFORE = Settings()
SPACE = Space(max_rows=(1, 8, 64), max_delay_us=(0, 500), placements=((1, None), (1, 1), (2, 1)))
EVERY = st.builds(
    Settings,
    max_rows=st.sampled_from(SPACE.max_rows),
    max_delay_us=st.sampled_from(SPACE.max_delay_us),
)
FIGURES = st.tuples(st.sampled_from([1, 90, 100, 2000]), st.sampled_from([1, 49, 51, 1000]))
"""Requests per second, and the p99 in ms."""


@cache
def row(rate: int, p99_ms: float, *, in_flight: int = 8, failed: int = 0) -> Row:
    times = histogram()
    times.record_value(round(p99_ms * 1000), 100)
    return Row(
        load=Load(in_flight=in_flight),
        seconds=1.0,
        answered=rate,
        failed={"INTERNAL": failed} if failed else {},
        said={},
        unsent=0,
        busy=0.1,
        latency=encoded(times),
        behind=encoded(histogram()),
    )


class Model:
    """Figures by settings, made up as they are asked for; each measurement takes time on a clock of its own."""

    def __init__(self, figures: Sequence[tuple[int, int]], cost_s: Sequence[float] = (1.0,)) -> None:
        self.now = 0.0
        self.began: list[float] = []
        self.asked: list[Settings] = []
        self._figures = figures
        self._cost_s = cost_s

    def measure(self, asked: Settings) -> list[Row]:
        number = len(self.asked)
        self.asked.append(asked)
        self.began.append(self.now)
        self.now += self._cost_s[number % len(self._cost_s)]
        return [row(*self._figures[number % len(self._figures)])]

    def search(self, before: Settings = BEFORE, *, p99_ms: float = 50.0, budget_s: float = 1e9, keep_s: float = 0.0):
        budget = Budget(budget_s, lambda: self.now)
        return search.search(before, SPACE, self.measure, p99_ms=p99_ms, budget=budget, keep_s=lambda: keep_s)


def in_turns(best: Candidate, before: Candidate) -> Turns:
    """What both did, again."""
    return Turns(settings=best.settings, best=best.rows * 3, before=before.rows * 3)


@settings(deadline=None, max_examples=50)
@given(EVERY, st.lists(FIGURES, min_size=1, max_size=12))
def test_the_best_of_what_was_tried_is_chosen_and_only_if_it_reaches_the_p99(
    before: Settings, figures: list[tuple[int, int]]
) -> None:
    model = Model(figures)
    tried, complete = model.search(before)
    assert complete
    assert tried[0].settings == before
    assert len({candidate.settings for candidate in tried}) == len(tried) == len(model.asked)
    best, turns = choose(tried, in_turns, p99_ms=50.0, fits=lambda: True)
    within = [candidate.rows[0].requests_per_s for candidate in tried if reaches(candidate.rows[0], 50.0)]
    if not within:
        assert turns is None
        assert best.rows[0].latency_ms["p99"] == min(each.rows[0].latency_ms["p99"] for each in tried)
        return
    assert reaches(best.rows[0], 50.0)
    assert best.rows[0].requests_per_s == max(within)
    assert (turns is None) == (best.settings == before)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(FIGURES, min_size=1, max_size=12),
    st.lists(st.floats(0.5, 2.0), min_size=1, max_size=9),
    st.floats(0, 20),
    st.floats(0, 5),
)
def test_no_candidate_is_begun_that_the_budget_has_no_room_for(
    figures: list[tuple[int, int]], cost_s: list[float], budget_s: float, keep_s: float
) -> None:
    model = Model(figures, cost_s)
    tried, complete = model.search(budget_s=budget_s, keep_s=keep_s)
    costs = [after - began for began, after in zip(model.began, [*model.began[1:], model.now], strict=True)]
    for number, began in enumerate(model.began[1:], start=1):
        assert began + max(costs[:number]) + keep_s <= budget_s + 1e-6
    if not complete:
        assert model.now + max(costs) + keep_s > budget_s - 1e-6
    assert model.now <= max(costs[0], budget_s - keep_s + max(costs) - min(costs) + 1e-6)
    assert len(tried) == len(costs)


def test_the_search_goes_where_it_gets_better() -> None:
    rates = {1: 100, 8: 400, 64: 900}

    def measure(asked: Settings) -> list[Row]:
        rate = rates[asked.max_rows] * asked.instances + (50 if asked.max_delay_us else 0)
        return [row(rate, 5)]

    tried, _ = search.search(Settings(max_rows=1), SPACE, measure, p99_ms=50.0, budget=Budget(1e9))
    best, _ = choose(tried, in_turns, p99_ms=50.0, fits=lambda: True)
    assert best.settings == Settings(max_rows=64, max_delay_us=500, instances=2, intra_op_threads=1)
    assert not any(candidate.settings.max_rows == 1 and candidate.settings.max_delay_us for candidate in tried)
    assert len(tried) < 3 * 2 * 3


def test_what_cannot_be_served_is_passed_over_but_not_what_the_model_has() -> None:
    def measure(asked: Settings) -> list[Row]:
        if asked.max_rows != 64:
            raise ModelError("it takes 64 rows")
        return [row(100 * asked.instances, 5)]

    tried, complete = search.search(BEFORE, SPACE, measure, p99_ms=50.0, budget=Budget(1e9))
    assert complete
    assert {each.settings.max_rows for each in tried if each.failed == "it takes 64 rows"} == {1, 8}
    assert choose(tried, in_turns, p99_ms=50.0, fits=lambda: True)[0].settings.instances == 2
    with pytest.raises(ModelError):
        search.search(Settings(max_rows=1), SPACE, measure, p99_ms=50.0, budget=Budget(1e9))


def test_a_load_with_failures_reaches_nothing() -> None:
    fast, slow = row(900, 5, failed=1), row(100, 5, in_flight=1)
    assert Candidate(settings=BEFORE, rows=(fast, slow)).at(50.0) == slow
    only = Candidate(settings=BEFORE, rows=(fast,))
    assert only.score(50.0) < Candidate(settings=BEFORE, rows=(row(1, 99),)).score(50.0)


def test_of_several_loads_the_one_with_most_throughput_within_the_limit_counts() -> None:
    rows = (row(100, 2, in_flight=1), row(500, 9, in_flight=8), row(900, 60, in_flight=64))
    candidate = Candidate(settings=BEFORE, rows=rows)
    assert candidate.at(50.0) == rows[1]
    assert candidate.at(1.0) == rows[0]


def test_one_that_was_within_the_limit_by_luck_gives_way_to_the_next() -> None:
    tried = [
        Candidate(settings=Settings(max_rows=size), rows=(row(rate, 10),))
        for size, rate in ((1, 100), (8, 200), (64, 300))
    ]

    def compare(best: Candidate, before: Candidate) -> Turns:
        p99_ms = 90 if best.settings.max_rows == 64 else 10
        return Turns(settings=best.settings, best=(row(200, p99_ms),) * 3, before=before.rows * 3)

    best, turns = choose(tried, compare, p99_ms=50.0, fits=lambda: True)
    assert best is tried[1]
    assert turns is not None
    assert turns.better(50.0)
    best, turns = choose(tried, compare, p99_ms=50.0, fits=lambda: False)
    assert best is tried[2]
    assert turns is not None
    assert not turns.better(50.0)


@pytest.mark.parametrize(
    ("best", "before", "p99_before_ms", "better"),
    [
        ((130, 131, 129), (100, 100, 100), 5, True),
        ((101, 90, 112), (100, 100, 100), 5, False),
        ((130, 260, 390), (100, 200, 300), 5, True),  # the machine drifts, the ratio stays
        ((90, 91, 92), (100, 100, 100), 5, False),
        ((90, 91, 92), (100, 100, 100), 80, True),  # before does not reach the p99
        ((2000, 300, 6000), (100, 100, 100), 5, True),  # pauses of the machine are factors
        ((2000, 2000, 2000), (100, 0, 100), 5, False),  # a round without any answer has no ratio
    ],
)
def test_a_gain_counts_if_it_is_more_than_the_rounds_differ(
    best: tuple[int, ...], before: tuple[int, ...], p99_before_ms: int, better: bool
) -> None:
    turns = Turns(
        settings=BEFORE,
        best=tuple(row(rate, 5) for rate in best),
        before=tuple(row(rate, p99_before_ms) for rate in before),
    )
    assert turns.better(50.0) is better


def test_placements_never_have_more_threads_than_cores() -> None:
    assert search.placements(2, 1) == ((1, 1), (1, 2), (2, 1))
    assert search.placements(2, 2) == ((1, 1),)
    assert search.placements(4, 1, (None,)) == ((1, None), (2, None), (4, None))
    assert all(instances * 3 * (threads or 1) <= 12 for instances, threads in search.placements(12, 3))


CHOSEN = Settings(max_rows=128, max_delay_us=500, instances=2)
FILES = {
    "": {"instances": 2, "batching": {"enabled": "auto", "max_rows": 128, "max_delay_us": 500}},
    "# ours\ntask_id = 7  # as in the node file\n\n[queue] # short\nmax_requests = 9\n": {
        "task_id": 7,
        "instances": 2,
        "queue": {"max_requests": 9},
        "batching": {"enabled": "auto", "max_rows": 128, "max_delay_us": 500},
    },
    "[batching]\nmax_rows = 8 # since March\n# exact\ntolerance = 0\n\n[batching.buckets.x]\nto = [8, 16]\n": {
        "instances": 2,
        "batching": {"max_rows": 128, "max_delay_us": 500, "tolerance": 0, "buckets": {"x": {"to": [8, 16]}}},
    },
    "batching = { max_rows = 8 }  # inline\r\n": {"instances": 2, "batching": {"max_rows": 128, "max_delay_us": 500}},
    'batching.enabled = "auto"\nthreads = 1\n# end': {
        "instances": 2,
        "threads": 1,
        "batching": {"enabled": "auto", "max_rows": 128, "max_delay_us": 500},
    },
}


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_only_chosen_keys_are_written_and_comments_stay(tmp_path: Path, text: str) -> None:
    FakeBackend.write(tmp_path / "m/1")
    file = tmp_path / "m/model.toml"
    file.write_bytes(text.encode())
    model = TunedModel.find(tmp_path / "m", Config())
    assert model.file == file
    model.write(CHOSEN)
    written = file.read_bytes().decode()
    assert tomllib.loads(written) == FILES[text]
    for line in text.splitlines():
        assert not line.strip() or line.partition("#")[2] in written
    after = TunedModel.find(tmp_path / "m", Config())
    assert after.before() == CHOSEN
    after.write(CHOSEN)
    assert file.read_bytes().decode() == written


def test_the_keys_that_stay_as_they_were_are_not_added(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m/1")
    model = TunedModel.find(tmp_path / "m", Config())
    model.write(Settings(instances=2))
    assert model.file.read_text() == "instances = 2\n"


def test_a_versions_own_file_is_written_where_it_says_something_of_it(tmp_path: Path) -> None:
    for version in ("1", "2", "10"):
        FakeBackend.write(tmp_path / "m" / version)
    (tmp_path / "m/model.toml").write_text("task_id = 3\n[batching]\ntolerance = 0.1\n")
    (tmp_path / "m/2/model.toml").write_text("threads = 2\n")
    newest = TunedModel.find(tmp_path / "m", Config())
    assert (newest.version, newest.file) == (10, tmp_path / "m/model.toml")
    second = TunedModel.find(tmp_path / "m/2", Config())
    assert (second.version, second.name, second.file) == (2, "m", tmp_path / "m/2/model.toml")
    second.write(CHOSEN)
    # Its table takes the place of the model's, so that has all of it.
    assert tomllib.loads(second.file.read_text()) == {
        "threads": 2,
        "instances": 2,
        "batching": {"tolerance": 0.1, "max_rows": 128, "max_delay_us": 500},
    }
    (tmp_path / "m/model.toml").write_text("versions = [1, 2, 7]\n")
    assert TunedModel.find(tmp_path / "m", Config()).file == tmp_path / "m/2/model.toml"


def test_a_flat_model_is_its_own_version(tmp_path: Path) -> None:
    model = TunedModel.find(FakeBackend.write(tmp_path / "m"), Config())
    assert (model.name, model.version, model.file) == ("m", 1, tmp_path / "m/model.toml")


@pytest.mark.parametrize(
    ("text", "rows", "delays"),
    [
        ("", (1, 8, 16, 32, 64, 128), (0, 100, 500)),
        ("batching = { preferred_rows = [20] }", (32, 64, 128), (0, 100, 500)),
        ("batching = { max_rows = 48, allowed_rows = [16, 48] }", (48,), (0, 100, 500)),
        ("batching = { enabled = false }", (64,), (0,)),
    ],
)
def test_what_is_tried_goes_with_what_the_model_says(
    tmp_path: Path, text: str, rows: tuple[int, ...], delays: tuple[int, ...]
) -> None:
    FakeBackend.write(tmp_path / "m")
    (tmp_path / "m/model.toml").write_text(text)
    space = TunedModel.find(tmp_path / "m", Config()).space(p99_ms=2.0)
    assert (space.max_rows, space.max_delay_us) == (rows, delays)


def test_threads_of_an_operator_are_the_servers_to_say(tmp_path: Path) -> None:
    pytest.importorskip("dl_inference_torch_backend")
    (tmp_path / "m/1").mkdir(parents=True)
    (tmp_path / "m/1/model.pt2").touch()
    model = TunedModel.find(tmp_path / "m", Config(backends={"torch": {"inter_op_threads": 1}}))
    found = Settings(intra_op_threads=1)
    assert found in [Settings(instances=copies, intra_op_threads=n) for copies, n in model.space(20).placements]
    assert model.served(found)["backends"] == {"torch": {"inter_op_threads": 1, "intra_op_threads": 1}}
    assert model.keys(found) == {}
    assert model.server_line(found) == "[backends.torch] intra_op_threads = 1"
    assert model.server_line(model.before()) == ""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no folder"),
        ({"1/fake.json": "{}", "model.toml": "max_row = 1"}, 'unknown key "max_row"'),
        ({"1/fake.json": "{}", "model.toml": "max"}, "model.toml: "),
    ],
)
def test_a_model_that_cannot_be_used_is_said(tmp_path: Path, files: Mapping[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        TunedModel.find(tmp_path / "m", Config())


class Pausing:
    """Processes of a load, on a machine that pauses: no answer comes during the first loads."""

    def __init__(self, pauses: int, *, failed: int = 0) -> None:
        self.runs = 0
        self._pauses, self._failed = pauses, failed

    def run(self, load: Load, progress: object) -> Row:
        del load, progress
        self.runs += 1
        return row(0 if self.runs <= self._pauses else 100, 5, failed=self._failed)


@pytest.mark.parametrize(
    ("pauses", "failed", "runs", "rate"), [(0, 0, 1, 100), (2, 0, 3, 100), (9, 0, 3, 0), (9, 1, 2, 0)]
)
def test_a_load_without_answers_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: int, failed: int, runs: int, rate: int
) -> None:
    processes = Pausing(pauses, failed=failed)

    @contextmanager
    def serving_it(_self: serving.Measuring, _settings: Settings) -> Iterator[Pausing]:
        yield processes

    monkeypatch.setattr(serving.Measuring, "serving", serving_it)
    model = TunedModel.find(FakeBackend.write(tmp_path / "m"), Config())
    measuring = serving.Measuring(
        model=model, p99_ms=50.0, ask=pytest.fail, protocol="v2", in_flight=(8,), budget_s=9.0
    )
    (measured,) = measuring.measure(BEFORE)
    assert (processes.runs, measured.answered) == (runs, rate)


@pytest.fixture
def slow_model(tmp_path: Path, site_with_fakes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """10 ms for a call of any size, and room for one request in each; served by a backend that is installed for it."""
    monkeypatch.setenv("PYTHONPATH", ":".join([str(site_with_fakes), *filter(None, sys.path)]))
    monkeypatch.syspath_prepend(site_with_fakes)
    monkeypatch.setattr(model_file, "ROWS", (1, 64))
    monkeypatch.setattr(model_file, "DELAYS_US", (0,))
    monkeypatch.setattr(serving, "ROUNDS", 3)
    model = FakeBackend.write(tmp_path / "m/1", sleep_s=0.01, inputs={"x": ["float32", [None, 3]]}).parent
    (model / "model.toml").write_text(f"# mine\nthreads = {cores()}\n[batching]\nmax_rows = 1 # for now\n")
    return model


def test_a_real_model_is_tuned_and_its_file_written(
    slow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    where = ("--json", str(out), "--plot", str(picture))
    how = ("--p99", "2s", "--in-flight", "64", "--transport", "grpcio")
    # What a budget leaves room for the machine says; here all that is tried are two, in loads of 1 s.
    # In half of that a busy machine may leave a load without an answer.
    monkeypatch.setattr(serving, "_LONGEST_S", 1.0)
    result = CliRunner().invoke(main, ["tune", str(slow_model), *how, *where])
    assert result.exit_code == 0, result.output
    tuning = Tuning.model_validate_json(out.read_bytes())
    before, best = tuning.candidates
    assert (before.settings.max_rows, best.settings.max_rows) == (1, 64)
    assert tuning.best == best.settings
    assert tuning.complete
    assert tuning.better
    assert tuning.turns is not None
    assert len(tuning.turns.best) == len(tuning.turns.before) == 3
    file = slow_model / "model.toml"
    assert tuning.written == file
    assert file.read_text() == f"# mine\nthreads = {cores()}\n[batching]\nmax_rows = 64 # for now\n"
    assert "written to" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_where_nothing_reaches_the_p99_the_nearest_is_said_and_nothing_written(
    slow_model: Path, tmp_path: Path
) -> None:
    file = slow_model / "model.toml"
    content, modified = file.read_bytes(), file.stat().st_mtime_ns
    how = ("--p99", "2ms", "--in-flight", "1,2", "--budget", "1s", "--transport", "grpcio", "--json", "-")
    result = CliRunner().invoke(main, ["tune", str(slow_model), *how])
    assert result.exit_code == 1, result.output
    assert "nothing that was tried reaches a p99 of 2 ms; the nearest has" in result.stderr
    assert "the budget ended the search" in result.stderr
    told = json.loads(result.stdout)
    assert (told["best"], told["written"], told["complete"]) == (None, None, False)
    assert [each["load"]["in_flight"] for each in told["candidates"][0]["rows"]] == [1]  # two would only wait longer
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (content, modified)


def test_a_model_that_cannot_be_served_is_said(slow_model: Path) -> None:
    FakeBackend.write(slow_model / "1", fail_load="no memory")
    how = ("--p99", "20ms", "--budget", "1s", "--transport", "grpcio")
    result = CliRunner().invoke(main, ["tune", str(slow_model), *how])
    assert result.exit_code == 1
    assert "no memory" in result.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--p99", "0s"), "above 0"),
        (("--p99", "20ms", "--rows", "2", "--input", __file__), "--rows"),
        (("--p99", "20ms", "--in-flight", "1", "--processes", "2"), "--processes"),
        (("--p99", "20ms", "--plot", "/nowhere/a.png"), "there is no folder"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path: Path, given: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, ["tune", str(FakeBackend.write(tmp_path / "m")), *given])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("within", [True, False])
def test_the_table_marks_best_and_before(within: bool, capsys: pytest.CaptureFixture[str]) -> None:
    best = Settings(max_rows=8)
    tuning = Tuning(
        version="0",
        date="2026-01-01",
        model="m",
        model_version=1,
        backend="fake",
        p99_ms=50.0,
        contents="x float32 [1]",
        request_bytes=9,
        cpus=2,
        candidates=(
            Candidate(settings=BEFORE, rows=(row(100, 60),)),
            Candidate(settings=best, rows=(row(321, 20 if within else 59),)),
            Candidate(settings=Settings(max_rows=1), failed="it takes 8 rows"),
        ),
        complete=True,
        best=best if within else None,
        turns=Turns(settings=best, best=(row(300, 21),) * 3, before=(row(100, 60),) * 3) if within else None,
        written=None,
    )
    report.show(tuning, console())
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if " 321 " in line]
    assert ("best" in first) is within
    assert ("over 50 ms" in first) is not within
    assert any(" 100 " in line and "before, over 50 ms" in line for line in lines)
    assert any("it takes 8 rows" in line for line in lines)
    said = "300 requests/s, p99 21." if within else "the nearest has 59."
    assert any(said in line for line in lines)
