"""From the arguments of `dl-inference-core bench` to loads, one after the other, and to what is told of them."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import dl_inference_core
from dl_inference_core.config import ClientTls
from dl_inference_core.cpus import cores
from dl_inference_core.errors import ConfigError
from dl_inference_tools.load_testing import report
from dl_inference_tools.load_testing.processes import started
from dl_inference_tools.load_testing.request import Message, Question, Target, raw
from dl_inference_tools.load_testing.results import Load, Results


def run(
    address: str,
    tls: ClientTls | None,
    *,
    model: str | None,
    protocol: str,
    version: int | None,
    file: Path | None,
    dtype: str | None,
    rows: int | None,
    data: Path | None,
    method: str | None,
    in_flight: tuple[int, ...] | None,
    rate: tuple[float, ...] | None,
    poisson: bool,
    duration: float,
    requests: int | None,
    warm_up: float,
    timeout: float,
    processes: int,
    connections: int | None,
    json_file: str | None,
    plot: Path | None,
    compare: Path | None,
) -> bool:
    """Arguments as the command has them, times in seconds. Returns whether every request was sent and answered well.

    Raises:
        ConfigError: arguments do not go together; a file cannot be used.
        InferenceError: the first request failed.
    """
    target = Target(address=address, tls=tls, timeout_s=timeout)
    loads = _loads(in_flight, rate, poisson, duration, requests, warm_up)
    connections = connections or processes
    if connections < processes:
        raise ConfigError(f"--connections {connections} is below --processes {processes}; each needs one")
    if in_flight and max(in_flight) < processes:
        raise ConfigError(f"--in-flight {max(in_flight)} is below --processes {processes}; each needs one")
    check_outputs(json_file, plot)
    before = Results.read(compare) if compare is not None else None
    if (data is None) != (method is None) or (data is not None and (file is not None or rows is not None)):
        raise ConfigError("--data and --method go together, and stand alone for what is sent")
    if data is not None and method is not None:
        message = raw(data, method)
    else:
        message = _message(target, model, version, protocol, file, dtype, rows)
    message.try_once(target)

    date = datetime.now(UTC).isoformat(timespec="seconds")
    with (
        started(target, message, processes=processes, connections=connections, open_loop=rate is not None) as together,
        report.running(loads) as with_bar,
    ):
        measured = tuple(with_bar(together, load) for load in loads)
    results = Results(
        version=dl_inference_core.__version__,
        date=date,
        address=address,
        model=model,
        method=message.method,
        contents=message.contents,
        request_bytes=len(message.body),
        processes=processes,
        connections=connections,
        cpus=cores(),
        rows=measured,
    )
    if json_file is not None:
        write(json_file, results.model_dump_json(indent=2) + "\n")
    if plot is not None:
        _drawn(results, before, plot)
    report.show(results, before, report.console(stderr=json_file == "-"))
    return results.good


def _loads(
    in_flight: tuple[int, ...] | None,
    rate: tuple[float, ...] | None,
    poisson: bool,
    duration: float,
    requests: int | None,
    warm_up: float,
) -> tuple[Load, ...]:
    if in_flight is not None and rate is not None:
        raise ConfigError("--in-flight is a closed loop, --rate an open one; give one of them")
    if poisson and rate is None:
        raise ConfigError("--poisson says when requests of a --rate are due; give one")
    if not duration:
        raise ConfigError("--duration is 0; expected more")

    def load(in_flight: int | None, rate: float | None) -> Load:
        return Load(
            in_flight=in_flight,
            rate=rate,
            poisson=poisson,
            duration_s=duration,
            requests=requests,
            warm_up_s=warm_up,
        )

    if rate is not None:
        return tuple(load(None, each) for each in rate)
    return tuple(load(each, None) for each in in_flight or (1,))


def _message(
    target: Target,
    model: str | None,
    version: int | None,
    protocol: str,
    file: Path | None,
    dtype: str | None,
    rows: int | None,
) -> Message:
    if model is None:
        raise ConfigError("--model is missing; only --data goes without it")
    question = Question(target=target, model=model, version=version, protocol=protocol)
    if file is None:
        if dtype is not None:
            raise ConfigError("--dtype says what the numbers of an --input are; give one")
        return question.from_signature(rows)
    if rows is not None:
        raise ConfigError("--rows is for tensors that are made; an --input has its own")
    return question.from_file(file, dtype)


def check_outputs(json_file: str | None, plot: Path | None) -> None:
    """Before anything is measured.

    Raises:
        ConfigError: a file that is to be written has no folder.
    """
    for written in (Path(json_file) if json_file is not None and json_file != "-" else None, plot):
        if written is not None and not written.parent.is_dir():
            raise ConfigError(f"{written}: there is no folder {written.parent}")


def write(file: str, text: str) -> None:
    """Put `text` into a file; "-" is standard output.

    Raises:
        ConfigError: it cannot be written.
    """
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error


def _drawn(results: Results, before: Results | None, file: Path) -> None:
    try:
        report.plot(results, before, file)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
