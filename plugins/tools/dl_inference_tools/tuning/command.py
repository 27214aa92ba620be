"""From the arguments of `dl-inference-core tune` to settings that are tried, and to a `model.toml`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dl_inference_core
from dl_inference_core import config as configs
from dl_inference_core.config import Config
from dl_inference_core.cpus import cores
from dl_inference_core.errors import ConfigError
from dl_inference_tools.load_testing.command import check_outputs, write
from dl_inference_tools.load_testing.report import console
from dl_inference_tools.load_testing.request import Message, Question
from dl_inference_tools.tuning import report
from dl_inference_tools.tuning.model_file import TunedModel
from dl_inference_tools.tuning.report import Tuning
from dl_inference_tools.tuning.search import Budget, choose, reaches, search
from dl_inference_tools.tuning.serving import Measuring


def run(
    path: Path,
    *,
    p99: float,
    budget: float,
    in_flight: tuple[int, ...],
    protocol: str,
    file: Path | None,
    rows: int | None,
    processes: int,
    transport: str | None,
    config_file: Path | None,
    dry_run: bool,
    json_file: str | None,
    plot: Path | None,
) -> bool:
    """Arguments as the command has them, times in seconds. Returns whether any settings reach the p99.

    Raises:
        ConfigError: arguments do not go together; a file cannot be used.
        InferenceError: the model cannot be served as it is.
    """
    if not p99 or not budget:
        raise ConfigError("--p99 and --budget are times above 0")
    if file is not None and rows is not None:
        raise ConfigError("--rows is for tensors that are made; an --input has its own")
    if max(in_flight) < processes:
        raise ConfigError(f"--in-flight {max(in_flight)} is below --processes {processes}; each needs one")
    check_outputs(json_file, plot)
    server = configs.load(config_file) if config_file is not None else Config()
    if transport is not None:
        server = server.model_copy(update={"transport": transport})
    model = TunedModel.find(path, server)

    def ask(question: Question) -> Message:
        return question.from_file(file) if file is not None else question.from_signature(rows)

    measuring = Measuring(
        model=model,
        p99_ms=p99 * 1000,
        ask=ask,
        protocol=protocol,
        in_flight=tuple(sorted(set(in_flight))),
        budget_s=budget,
        processes=processes,
    )
    tuning = _tuned(model, measuring)
    if tuning.best is not None and tuning.better and not dry_run and model.keys(tuning.best):
        model.write(tuning.best)
        tuning = tuning.model_copy(update={"written": model.file})
    if json_file is not None:
        write(json_file, tuning.model_dump_json(indent=2) + "\n")
    if plot is not None:
        try:
            report.plot(tuning, plot)
        except OSError as error:
            raise ConfigError(f"{plot}: {error.strerror}") from error
    to = console(stderr=json_file == "-")
    report.show(tuning, to)
    for line in _told(model, tuning):
        to.print(line, soft_wrap=True, markup=False)
    return tuning.best is not None


def _tuned(model: TunedModel, measuring: Measuring) -> Tuning:
    p99_ms = measuring.p99_ms
    date = datetime.now(UTC).isoformat(timespec="seconds")
    budget = Budget(measuring.budget_s)

    with report.progress(measuring.budget_s) as measuring.tell, _ended_in_order():
        tried, complete = search(
            model.before(),
            model.space(p99_ms),
            measuring.measure,
            p99_ms=p99_ms,
            budget=budget,
            keep_s=measuring.turns_s,
        )
        best, turns = choose(
            tried, measuring.compare, p99_ms=p99_ms, fits=lambda: measuring.turns_s() <= budget.left_s()
        )
    row = best.at(p99_ms)
    assert measuring.message is not None
    return Tuning(
        version=dl_inference_core.__version__,
        date=date,
        model=model.name,
        model_version=model.version,
        backend=model.backend,
        p99_ms=p99_ms,
        contents=measuring.message.contents,
        request_bytes=len(measuring.message.body),
        cpus=cores(),
        candidates=tuple(tried),
        complete=complete,
        best=best.settings if row is not None and reaches(row, p99_ms) else None,
        turns=turns,
        written=None,
    )


def _told(model: TunedModel, tuning: Tuning) -> Iterator[str]:
    """What has been written, and what is left for people to write."""
    if tuning.best is None or not tuning.better:
        return
    keys = ", ".join(f"{key} = {value}" for key, value in model.keys(tuning.best).items())
    if tuning.written is not None:
        yield f"written to {tuning.written}: {keys}"
    elif keys:
        yield f"not written, as it is a dry run, to {model.file}: {keys}"
    if line := model.server_line(tuning.best):
        yield f"for the server's config, which is not written, but was part of what was measured: {line}"


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Meanwhile SIGTERM ends what was started, too."""

    def end(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
