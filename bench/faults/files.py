"""What may happen to a node file while requests go by it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.faults import course, figures
from bench.faults.client import NAME
from bench.faults.course import LOADS, Pace
from bench.faults.experiments import Findings, finding
from bench.faults.gateways import NODEFILE, TIMEOUT_MS, System, lines_of
from bench.faults.goals import judged
from bench.faults.stage import Stage, until

_LOAD = "40 %"
_NOT_FOUND = 5
# Two looks at the file, and some more.
_LOOKED_S = 1.0
# A file whose last line has no end is looked at for longer.
_PATIENT_S = 3.5
_APPLIED_WITHIN_S = 5.0
_LARGE = 10 * 1024 * 1024
_BYTE_S = 0.01


def damaged(system: System, pace: Pace, seed: int) -> Findings:
    """One damage after the other to the line of a task that is in use, beside a good line for a new task."""
    late, unsaid = 0, 0
    with course.run(system.having(nodefile=True), LOADS[_LOAD], seed) as run:
        run.warm(pace.warm_s)
        stage = run.stage
        addresses = [node.address for node in stage.nodes]
        whole = lines_of(addresses).encode()
        for number, (content, says) in enumerate(_damages(whole)):
            name = f"new{number}"
            said = len(_complaints(stage))
            good = lines_of(addresses, (name,)).encode()
            if content.startswith(b"\xff\xfe"):
                good = good.decode().encode("utf-16-le")
            _replace(stage, content + good)
            if content.startswith(b"\xff\xfe"):  # nothing of it can be read
                time.sleep(_PATIENT_S)
            else:
                try:
                    until(lambda name=name: stage.ask(name) == 0, _APPLIED_WITHIN_S, "")
                except RuntimeError:
                    late += 1
            new = _complaints(stage)[said:]
            if len(new) != bool(says) or not all(says in line for line in new):
                unsaid += 1
            _replace(stage, whole)
            time.sleep(_LOOKED_S)
    values = run.plain() | {"good_lines_not_applied": late, "damages_without_one_warning": unsaid}
    return Findings(of=[judged("C1", finding(system, _LOAD, values))])


def _damages(whole: bytes) -> Iterator[tuple[bytes, str]]:
    """Node files, each of which lacks the line end of nothing, and what the one warning of it must say; "" is none."""
    first, rest = whole.split(b"\n", 1)
    name = NAME.encode()
    yield first.replace(b",", b",\0", 1) + b"\n" + rest, "line 1"
    yield b"\xff\xfe" + whole.decode().encode("utf-16-le"), "UTF-16"
    yield whole.replace(b"\n", b"\r\n"), ""
    yield b"# padding\n" * (_LARGE // 10) + whole, ""
    yield name + b"=100=\n" + rest, "line 1"
    yield first + b",127.0.0.1:70000\n" + rest, "line 1"
    yield whole + name + b"=500,127.0.0.1:1\n", "line 3"
    yield name + f"={TIMEOUT_MS}\n".encode() + rest, "line 1"


def half_written(system: System, pace: Pace, seed: int) -> Findings:
    """The file is written byte by byte, goes missing, cannot be read, is a folder, is swapped by a link."""
    with course.run(system.having(nodefile=True), LOADS[_LOAD], seed) as run:
        run.warm(pace.warm_s)
        stage = run.stage
        file = stage.folder / NODEFILE
        addresses = [node.address for node in stage.nodes]
        began = time.monotonic()
        with file.open("wb", buffering=0) as writing:
            for byte in lines_of(addresses[::-1]).encode():
                writing.write(bytes([byte]))
                time.sleep(_BYTE_S)
        time.sleep(_LOOKED_S)
        aside = file.with_suffix(".aside")
        file.rename(aside)
        time.sleep(_LOOKED_S)
        file.mkdir()
        time.sleep(_LOOKED_S)
        file.rmdir()
        aside.rename(file)
        file.chmod(0)  # which root reads nevertheless
        time.sleep(_LOOKED_S)
        file.chmod(0o600)
        for turn in range(2):
            target = stage.folder / f"swapped{turn}.txt"
            target.write_text(lines_of(addresses[turn:] + addresses[:turn]), encoding="utf-8")
            link = stage.folder / "link"
            link.symlink_to(target)
            link.rename(file)
            time.sleep(_LOOKED_S)
        ended = time.monotonic()
        _replace(stage, (lines_of(addresses) + lines_of(addresses, ("afterwards",))).encode())
        afterwards = _seconds_until(stage, "afterwards", 0)
        strange = set(stage.routed() or {}) - set(addresses)
    values = run.plain() | {
        "prefixes_taken": len(strange) + figures.starved_seconds(run.attempts, range(len(addresses)), began, ended),
        "reload_afterwards_s": afterwards,
    }
    return Findings(of=[judged("C2", finding(system, _LOAD, values))])


def changed(system: System, pace: Pace, seed: int) -> Findings:
    """A node goes, comes again, the nodes' order changes, and a task goes."""
    with course.run(system.having(nodefile=True), LOADS[_LOAD], seed) as run:
        run.warm(pace.warm_s)
        stage = run.stage
        addresses = [node.address for node in stage.nodes]
        passing = lines_of(addresses, ("passing",))
        writes = []
        for some in (addresses[:-1], addresses, addresses[::-1]):
            writes.append(time.monotonic())
            _replace(stage, (lines_of(some) + passing).encode())
            time.sleep(2 * _LOOKED_S)
        there = stage.ask("passing") == 0
        _replace(stage, lines_of(addresses).encode())
        gone = _seconds_until(stage, "passing", _NOT_FOUND)
    removed, added, _ = writes
    last = run.attempts[-1].arrived(removed, added).at
    first = run.attempts[-1].arrived(added).at
    rebuilt = 0
    for node in run.attempts[:-1]:
        ports = [np.unique(node.arrived(*when).port) for when in ((run.began, removed), (added, run.ended))]
        rebuilt += len(np.setdiff1d(ports[1], ports[0]))
    values = run.plain() | {
        "applied_s": max(
            last.max() - removed if len(last) else 0.0, first.min() - added if len(first) else math.inf, gone
        ),
        "channels_rebuilt": rebuilt,
        "not_found_after_1s": float(there and gone <= 1.0),
    }
    return Findings(of=[judged("C3", finding(system, _LOAD, values))])


def _seconds_until(stage: Stage, task: str, code: int) -> float:
    """Until a request for `task` is answered with `code`; inf for never."""
    try:
        return until(lambda: stage.ask(task) == code, _APPLIED_WITHIN_S, "")
    except RuntimeError:
        return math.inf


def _complaints(stage: Stage) -> list[str]:
    return [line for line in stage.complaints() if NODEFILE in line]


def _replace(stage: Stage, content: bytes) -> None:
    new = Path(stage.folder / "new")
    new.write_bytes(content)
    new.rename(stage.folder / NODEFILE)
