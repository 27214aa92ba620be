"""The comparison with other model servers: what it says of figures, and what runs on ours; no peer is started here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench import bare, outputs
from bench.figures import Figures, Sample
from bench.goals import Outcome
from bench.load import LoadError, Post
from bench.model_servers import __main__ as command
from bench.model_servers import chart, environments, goals, measuring, starting, systems
from bench.model_servers.__main__ import main
from bench.model_servers.environments import Environment, NotInstalled
from bench.model_servers.measuring import Bare, Measured
from bench.model_servers.models import MODELS, Floats
from bench.model_servers.report import Report
from bench.replay import Traffic


def figures(requests_per_s: float, memory_mb: float = 100.0) -> Figures:
    sample = Sample(
        cpu_us_per_request=1e6 / requests_per_s,
        requests_per_s=requests_per_s,
        p50_ms=1000 / requests_per_s,
        p99_ms=2000 / requests_per_s,
    )
    return Figures(rounds=[sample, sample], memory_mb=memory_mb)


MEASURED = {
    "mmoe": Measured(
        rows={
            1: {"ours-native": figures(3000), "triton": figures(1000)},
            128: {
                "bare": figures(90_000, memory_mb=100),
                "ours-native": figures(20_000, memory_mb=130),
                "triton": figures(5000),
                "triton-empty": figures(25_000),
            },
        },
        varied={128: {"ours-native": figures(9000), "triton": figures(4000)}},
        bare=Bare(batch=64, memory_mb=100),
        settings={"ours-native": {1: "", 128: ""}, "triton": {1: "delay 0 µs", 128: "delay 100 µs"}},
        failed={"litserve": "it does not listen"},
    ),
    "digits": Measured(
        rows={8: {"ours-native": figures(2000), "triton": figures(1000), "mlserver": figures(4000)}},
        varied={},
        bare=Bare(batch=64, memory_mb=100),
        settings={"ours-native": {8: ""}, "triton": {8: "delay 0 µs"}},
        failed={},
    ),
}
REPORT = Report(
    machine={
        "date": "D",
        "cpu": "C",
        "cores": 2,
        "python": "3",
        "h2load": " 1",
        "command": "c",
        "rounds": 3,
        "seconds": 4.0,
        "pinned": False,
        "load_before": 0.75,
    },
    made_of={"ours-native": "dl-inference-core 0.1.0", "triton": "nvidia-pytriton 0.7.0, Python 3.11.2"},
    measured=MEASURED,
    absent={"bentoml": "no matching distribution"},
)


def by_goal(outcomes: list[Outcome]) -> dict[tuple[str, str, str, str], tuple[float, bool]]:
    return {
        (each.goal.load, each.goal.figure, each.goal.kind, each.than): (round(each.ratio, 2), each.met)
        for each in outcomes
    }


def test_goals_are_ratios_of_what_was_measured() -> None:
    assert by_goal(REPORT.outcomes) == {
        ("mmoe@128", "requests_per_s", "required", "triton"): (4.0, True),
        ("mmoe@128", "requests_per_s", "aim", "triton"): (4.0, False),
        ("mmoe@128", "cpu_us_per_request", "aim", "triton"): (0.25, False),
        ("mmoe@128", "cpu_us_per_request", "aim", "triton-empty"): (1.25, False),
        ("mmoe@1", "p50_ms", "aim", "triton"): (0.33, True),
        ("digits@8", "requests_per_s", "aim", "triton"): (2.0, False),
        ("mmoe@128", "memory_mb", "aim", "bare"): (1.3, False),
    }


def test_being_ahead_of_the_best_is_being_ahead_of_all() -> None:
    rows = {"resnet50@8": {"ours-native": figures(12), "triton": figures(10), "mlserver": figures(9)}}
    assert by_goal(goals.outcomes(rows)) == {("resnet50@8", "requests_per_s", "aim", "triton"): (1.2, True)}


def test_requests_of_several_rows_have_no_goal() -> None:
    rows = {"mmoe, 1 to 4 rows@128": {"ours-native": figures(1), "triton": figures(10)}}
    assert goals.outcomes(rows) == []


def test_every_goal_is_about_what_is_measured() -> None:
    loads = {f"{model.name}@{in_flight}" for model in MODELS.values() for in_flight in model.in_flight}
    for goal in goals.GOALS:
        assert goal.load in loads
        assert {goal.system, *goal.than} <= set(systems.NAMES)


def test_the_section_has_every_figure_setting_and_goal() -> None:
    section = REPORT.section()
    assert (
        "| node, mmoe@128, requests/s: ours-native / triton | required | 4.00 | 4.00 to 4.00 | at least 3 | reached |"
        in section
    )
    assert "## ranking net (MMoE), 62 features: 128 in flight, 1 to 4 rows" in section
    assert "| triton | 5000 | " not in section
    assert "| triton | 200 | 200 to 200 | 5000 | 5000 to 5000 | 0.20 | 0.20 to 0.20 | 0.4 | 100 |  |" in section
    assert "1: delay 0 µs; 128: delay 100 µs | delay 0 µs |" in section
    note = "Triton 2.51, Python backend: its C++ backends cannot be installed here and may be faster."
    assert section.count(note) == section.count("\n## ")
    assert "No process is pinned to a core. The machine is shared" in section
    assert "bentoml is left out, as it cannot be had here: no matching distribution" in section
    assert "litserve failed with mmoe, and is left out from there on: it does not listen" in section


def test_each_benchmark_leaves_what_the_other_wrote(tmp_path: Path) -> None:
    page, file = tmp_path / "performance.md", tmp_path / "bench.json"
    for _ in range(2):
        outputs.put_page("# Performance\n", of_model_servers=False, file=page)
        outputs.put_page(REPORT.section(), of_model_servers=True, file=page)
        outputs.put_figures({"gateway": {"600B@1": 1}, "goals": []}, of_model_servers=False, file=file)
        outputs.put_figures(REPORT.values(), of_model_servers=True, file=file)
    outputs.put_page("# Performance, again\n", of_model_servers=False, file=page)
    outputs.put_figures({"gateway": {"600KB@8": 2}}, of_model_servers=False, file=file)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Performance, again\n\n<!--")
    assert text.endswith("\n\n" + REPORT.section())
    assert text.count("# Performance") == text.count("\n# Model servers") == 1
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found) == {"gateway", "node", "model_servers"}
    assert found["gateway"] == {"600KB@8": 2}
    assert set(found["node"]) == {"mmoe@1", "mmoe@128", "mmoe, 1 to 4 rows@128", "digits@8"}
    assert found["node"]["mmoe@128"]["triton"]["requests_per_s"] == 5000
    assert len(found["node"]["mmoe@128"]["triton"]["rounds"]) == 2


def test_the_same_figures_give_the_same_chart(tmp_path: Path) -> None:
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        chart.svg(MEASURED, file)
    one, two = (file.read_text(encoding="utf-8") for file in files)
    assert one == two
    assert all(name in one for name in ("ours-native", "mlserver", "p99, ms"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "triton,vllm"], "there is no vllm"), (["--models", "bert"], "there is no bert")],
)
def test_what_there_is_not_is_refused_by_name(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_peer_that_cannot_be_had_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    with pytest.raises(NotInstalled, match="none of its interpreters"):
        Environment(package="p", release="1", pythons=("/no/python",)).install()


@pytest.mark.parametrize("system", systems.EVERY, ids=lambda system: system.name)
def test_each_is_asked_for_rows_that_differ(system: systems.System) -> None:
    model = MODELS["mmoe"]
    asked = system.ask(model, 1)
    assert asked.path.startswith("/")
    if isinstance(asked, Post):
        assert not asked.grpc
        assert len(asked.message) > 248  # 62 floats, in any form
    elif system.read is not None:
        assert len(set(asked.messages)) == 64
        assert min(map(len, asked.messages)) > 248
        several = system.ask(model, 4)
        assert isinstance(several, Traffic)
        assert max(map(len, several.messages)) > 4 * 248
    else:
        assert asked.messages == (b"",)


def test_each_number_in_flight_has_the_best_of_the_settings() -> None:
    def sample(requests_per_s: float, p50_ms: float) -> Sample:
        return Sample(cpu_us_per_request=1, requests_per_s=requests_per_s, p50_ms=p50_ms, p99_ms=1)

    tried = {
        "a": {1: sample(10, 1), 8: sample(20, 9), 128: sample(30, 9)},
        "b": {1: sample(20, 2), 8: sample(25, 9), 128: sample(20, 1)},
    }
    assert {in_flight: measuring.best_of(tried, in_flight) for in_flight in (1, 8, 128)} == {1: "a", 8: "b", 128: "a"}


def test_what_ours_needs_and_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "dl-inference-native":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(command.metadata, "version", version)
    made_of, absent = command.installed(systems.OURS, Console(quiet=True))
    assert set(made_of) == {"ours-grpcio"}
    assert absent == {"ours-native": "dl-inference-native is not installed: make setup"}


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[Path, Floats]]:
    """A small model, and its scores."""
    pytest.importorskip("torch")
    with measuring.made(MODELS["mmoe"]) as made:
        yield made


def test_our_node_answers_as_the_bare_model_does(made: tuple[Path, Floats]) -> None:
    folder, scores = made
    model, ours = MODELS["mmoe"], systems.OURS[1]
    assert scores.shape == (model.batch, model.outputs)
    with ours.running(model, folder, ours.settings[0], scores) as server:
        with pytest.raises(LoadError, match="not answer as the bare model"):
            ours.check(server, model, scores + np.float32(1e-3))
        assert server.memory_mb() > 0


def test_the_bare_model_is_timed_by_the_batch(made: tuple[Path, Floats]) -> None:
    with starting.bare_model(MODELS["mmoe"], made[0]) as alone:
        one, many = alone.call("1", 20), alone.call("64", 20)
    assert one.run.requests_per_s > 0
    assert one.run.p50_ms <= one.run.p99_ms
    assert 64 * many.run.requests_per_s > one.run.requests_per_s


def test_a_process_that_calls_says_when_it_has_ended() -> None:
    with bare.calling(sys.executable, "-c", "") as alone, pytest.raises(LoadError, match="has ended"):
        alone.call("1", 1)


def test_resnet_50_has_the_parameters_that_it_is_known_for() -> None:
    pytest.importorskip("torch")
    from bench.model_servers.nets import ResNet50

    assert sum(parameter.numel() for parameter in ResNet50().parameters()) == 25_557_032
