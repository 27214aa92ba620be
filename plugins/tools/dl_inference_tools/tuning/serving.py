"""A real server for each of the settings, on this machine, and the load on it."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomlkit

from dl_inference_core.errors import NodeFailed
from dl_inference_tools.load_testing.processes import Processes, started
from dl_inference_tools.load_testing.request import Message, Question, Target
from dl_inference_tools.load_testing.results import Load, Row
from dl_inference_tools.tuning.model_file import TunedModel
from dl_inference_tools.tuning.search import Candidate, Settings, Turns, reaches

ROUNDS = 5
_CANDIDATES = 14
"""That a round of the search measures, about."""
_SEARCH = 0.8
"""The part of the budget that it may take."""
_SHORTEST_S, _LONGEST_S = 0.5, 3.0
_WARM_UP = 0.2
_ATTEMPTS = 3
"""At a load that nothing answers: a model that takes longer than the load answers nothing each time."""
_START_S = 120.0
_LOOK_S = 0.02
_END_S = 10.0
_SERVING = "serving on "
_NOT_LOADED = " WARNING dl_inference_core.node.repository: model "
"""A server waits for its models, as their files may change yet."""


@dataclass(kw_only=True)
class Measuring:
    """Measures the model by settings.

    Attributes:
        p99_ms: the limit.
        ask: makes the message, of what the first server says that the model takes.
        in_flight: numbers in flight, the least first.
        budget_s: for all that is measured.
        tell: is called now and then with what is being done.
        message: once there is one.
        start_s: what the slowest start has taken, connections included.
        seconds: of each load, after a fifth of it to warm up: so that the budget is enough for a round of the search.
    """

    model: TunedModel
    p99_ms: float
    ask: Callable[[Question], Message]
    protocol: str
    in_flight: tuple[int, ...]
    budget_s: float
    processes: int = 1
    tell: Callable[[str], None] = lambda _: None
    message: Message | None = None
    start_s: float = field(default=0.0, init=False)
    seconds: float = field(default=0.0, init=False)

    def measure(self, settings: Settings) -> list[Row]:
        """A row for each number in flight; at more than one at which half of the requests are over the limit they would
        only wait longer. A load that only the slowest requests take over the limit is measured again, and the better
        of the two counts, as the cause may have been others on this machine.

        Raises:
            InferenceError: the model cannot be served so.
        """
        rows: list[Row] = []
        with self.serving(settings) as processes:
            for number in self.in_flight:
                what = f"{settings}: {number} in flight"
                row = self._run(processes, number, what)
                median_ms = row.latency_ms.get("p50", math.inf)
                if not reaches(row, self.p99_ms) and median_ms <= self.p99_ms / 2:
                    again = self._run(processes, number, what)
                    row = min(row, again, key=lambda each: each.latency_ms.get("p99", math.inf))
                rows.append(row)
                if median_ms > self.p99_ms:
                    break
        return rows

    def compare(self, best: Candidate, before: Candidate) -> Turns:
        """Both served at once and loaded in turns, each at the number in flight that it is best at.

        Raises:
            InferenceError: as `measure`.
        """
        rows: dict[Settings, list[Row]] = {best.settings: [], before.settings: []}
        with ExitStack() as stack:
            both = []
            for candidate in (best, before):
                row = candidate.at(self.p99_ms)
                number = (row.load.in_flight if row is not None else None) or self.in_flight[0]
                both.append((candidate.settings, number, stack.enter_context(self.serving(candidate.settings))))
            for turn in range(ROUNDS):
                for settings, number, processes in both if turn % 2 else both[::-1]:
                    rows[settings].append(self._run(processes, number, f"in turns: {settings}"))
        return Turns(settings=best.settings, best=tuple(rows[best.settings]), before=tuple(rows[before.settings]))

    def turns_s(self) -> float:
        """What `compare` takes, as far as one can tell."""
        return 2 * self.start_s + 2 * ROUNDS * self.seconds * (1 + _WARM_UP)

    @contextmanager
    def serving(self, settings: Settings) -> Iterator[Processes]:
        """The processes that load a server with these settings; both are gone after it.

        Raises:
            InferenceError: it cannot serve the model.
        """
        began = time.monotonic()
        with served(self.model.served(settings), partial(self.tell, f"{settings}: starts")) as address:
            target = Target(address=address)
            if self.message is None:
                self.message = self.ask(Question(target=target, model=self.model.name, protocol=self.protocol))
            self.message.try_once(target)
            with started(
                target, self.message, processes=self.processes, connections=self.processes, open_loop=False
            ) as processes:
                self.start_s = max(self.start_s, time.monotonic() - began)
                self.seconds = self.seconds or self._seconds()
                yield processes

    def _seconds(self) -> float:
        loads_s = _SEARCH * self.budget_s / _CANDIDATES - self.start_s
        return min(max(loads_s / len(self.in_flight) / (1 + _WARM_UP), _SHORTEST_S), _LONGEST_S)

    def _run(self, processes: Processes, in_flight: int, what: str) -> Row:
        """A load during which no answer came, though no request failed, measured a pause of this machine and not the
        settings: it is measured again."""
        load = Load(in_flight=in_flight, duration_s=self.seconds, warm_up_s=self.seconds * _WARM_UP)
        for _ in range(_ATTEMPTS):
            row = processes.run(load, lambda _: self.tell(what))
            if row.answered or not row.good:
                break
        return row


@contextmanager
def served(config: Mapping[str, Any], tell: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The address of a server with that config, in a process of its own that is gone after it.

    Raises:
        NodeFailed: it does not start, or cannot load the model; says what it has written.
    """
    with TemporaryDirectory(prefix="dl-inference-tune-") as folder:
        file, log = Path(folder, "server.toml"), Path(folder, "log")
        file.write_text(tomlkit.dumps(config), encoding="utf-8")
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "dl_inference_core.cli", "serve", "--config", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for this process, which ends it
            )
        try:
            yield _address(process, log, tell)
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], log: Path, tell: Callable[[], None]) -> str:
    end = time.monotonic() + _START_S
    while True:
        tell()
        ended = process.poll() is not None
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for line in lines:
            if line.startswith(_SERVING) and line.endswith("\n"):
                return line.removeprefix(_SERVING).strip()
            if _NOT_LOADED in line and line.endswith("\n"):
                raise NodeFailed(f"model {line.partition(_NOT_LOADED)[2].strip()}")
        if ended or time.monotonic() > end:
            said = lines[-1].strip() if lines else "it has said nothing"
            raise NodeFailed(f"the server {'has ended' if ended else f'is not there after {_START_S:g} s'}: {said}")
        time.sleep(_LOOK_S)
