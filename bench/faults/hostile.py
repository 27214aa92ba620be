"""What clients do to a gateway that they should not, and what is done to its own processes."""

from __future__ import annotations

import asyncio
import math
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.contract import HEALTH, SERVING
from bench.faults import attacks, course, figures, sockets
from bench.faults.attacks import Tally
from bench.faults.client import NAME, OPTIONS
from bench.faults.course import INTERNAL, LOADS, Course, Pace
from bench.faults.experiments import Findings, finding
from bench.faults.gateways import System
from bench.faults.goals import judged, worst
from bench.faults.node import Behaviour
from bench.faults.stage import Stage, call, set_up, until
from dl_inference_core.client import build
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS

_LOAD = "40 %"
_OK, _CANCELLED, _INVALID_ARGUMENT, _NOT_FOUND = 0, 1, 3, 5
_INFER = PROTOCOLS["openinference"].node_method
_SELDON = PROTOCOLS["seldon"].node_method
_TLS_HELLO = bytes.fromhex("160301003101000100") + bytes(40)
_HTTP1 = b"POST /inference.GRPCInferenceService/ModelInfer HTTP/1.1\r\nhost: a\r\ncontent-type: text/plain\r\n\r\n"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
_TRUNCATED = _PREFACE + bytes.fromhex("0000ff010400000001") + b"\x82"
_SLOW: tuple[attacks.Slow, ...] = ("silent", "headers", "body", "window")
_LARGE: tuple[attacks.Large, ...] = ("announced", "sent", "bomb")
_CONNECTIONS = 500
_FILES_LEFT = 40
_SAMPLE_S = 0.1
_CANCEL_MS = 100.0
_DEADLINE_MS = 200.0
_GRACE_S = 3.0


@contextmanager
def _attacking(attack: Callable[[], AbstractAsyncContextManager[Tally]]) -> Iterator[Tally]:
    """An attack that goes on until the block ends, on a thread and an event loop of its own."""
    entered = threading.Event()
    found: list[Tally] = []
    loop = asyncio.new_event_loop()
    leaving = asyncio.Event()

    async def hold() -> None:
        try:
            async with attack() as tally:
                found.append(tally)
                entered.set()
                await leaving.wait()
        finally:
            entered.set()

    failed: list[BaseException] = []

    def work() -> None:
        try:
            loop.run_until_complete(hold())
        except BaseException as error:
            failed.append(error)
        finally:
            loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    entered.wait()
    try:
        if not found:
            raise RuntimeError(f"the attack did not begin: {failed}")
        yield found[0]
    finally:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(leaving.set)
        thread.join()
    if failed:
        raise RuntimeError(f"the attack ended: {failed[0]!r}")


def _most_while(seconds: float, measure: Callable[[], float]) -> float:
    """The most that `measure` came to, looked at again and again for so long."""
    most, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        most = max(most, measure())
        time.sleep(_SAMPLE_S)
    return most


def _attacked(
    run: Course, row: str, attack: Callable[[], AbstractAsyncContextManager[Tally]], pace: Pace
) -> tuple[course.Mark, Tally, float]:
    """An attack under load: when it was, what it came to, and by how many megabytes the gateway grew."""
    before = run.stage.gateway.server.memory_mb()
    with run.fault(row, after_s=1.0) as mark, _attacking(attack) as tally:
        most = _most_while(pace.fault_s, run.stage.gateway.server.memory_mb)
        mark.healed = time.monotonic()
    return mark, tally, most - before


def _strays(run: Course) -> int:
    """Attempts that came to nodes beyond what the well-behaved client sent."""
    return max(0, sum(len(node.arrived()) for node in run.attempts) - len(run.requests))


def odd_tasks(system: System, pace: Pace, seed: int) -> Findings:
    """Requests for tasks that there are not and cannot be, one after the other. There are two routes: a request that
    names no task goes to the only route there is."""
    kinds = [*_odd_requests()]
    with (
        set_up(system.having(nodefile=True)) as stage,
        grpc.insecure_channel(stage.gateway.server.address, options=OPTIONS) as channel,
    ):
        call(channel, *kinds[0])
        times, codes = [], []
        end = time.monotonic() + pace.fault_s
        while time.monotonic() < end:
            for method, body in kinds:
                begun = time.monotonic()
                codes.append(call(channel, method, body, timeout_s=2.0)[0])
                times.append(time.monotonic() - begun)
        came = sum(len(node.arrived()) for node in stage.attempts())
    unanswered = sum(code not in (_INVALID_ARGUMENT, _NOT_FOUND) for code in codes)
    values = {
        "requests": len(codes),
        "failed": unanswered,
        "unanswered": unanswered,
        "node_calls": came,
        "p99_ms": float(np.percentile(times, 99)) * 1000,
    }
    return Findings(of=[judged("P1", finding(system, "one at a time", values))])


def _odd_requests() -> Iterator[tuple[str, bytes]]:
    for task in ({"number_value": 999}, {"number_value": -1}, {"number_value": 2.0**31}, {"number_value": 1.5}):
        yield _SELDON, messages.SeldonMessage(meta={"tags": {"taskId": task}}).SerializeToString()
    yield _SELDON, messages.SeldonMessage(meta={"tags": {"taskId": {"string_value": "x 1"}}}).SerializeToString()
    yield _SELDON, messages.SeldonMessage(meta={"puid": "1"}).SerializeToString()
    yield _INFER, messages.ModelInferRequest(model_name="m" * 1_000_000).SerializeToString()


def large_messages(system: System, pace: Pace, seed: int) -> Findings:
    """Messages that are too large, said to be, or only once they are unpacked."""
    limit_mb = 10.0
    ratios, grown, sent, wrong, shares, failed = [], [], [], 0, [], 0
    with course.run(system, LOADS[_LOAD], seed) as run:
        run.warm(pace.warm_s)
        address = run.stage.gateway.server.address
        marks = []
        for kind in _LARGE:
            mark, tally, growth = _attacked(
                run,
                "P2",
                partial(
                    attacks.oversized,
                    address,
                    kind,
                    method=_INFER,
                    message_bytes=int(2 * limit_mb * 2**20),
                    at_once=1,
                ),
                pace,
            )
            marks.append(mark)
            grown.append(growth)
            sent.append(tally.sent)
            wrong += sum(count for status, count in tally.statuses.items() if status != "8")
    for mark in marks:
        ratios.append(run.p99_ratio(mark.began, mark.healed))
        shares.append(run.fair_shares(mark.began, mark.healed)[0])
        failed += len(run.requests.failed.ended_within(mark.began, mark.until))
    values = run.plain() | {
        "failed": failed,
        "oversized": min(sent),
        "not_resource_exhausted": wrong,
        "memory_of_limit": max(0.0, *grown) / limit_mb,
        "p99_ratio": worst(ratios),
        "least_share_of_fair": min(shares),
    }
    return Findings(of=[judged("P2", finding(system, _LOAD, values))])


def malformed(system: System, pace: Pace, seed: int) -> Findings:
    """Bytes that are no message, no frame, no HTTP/2 and no plaintext, beside requests that are well."""
    wrong, sent = 0, 0
    with course.run(system, LOADS[_LOAD], seed) as run:
        run.warm(pace.warm_s)
        address = run.stage.gateway.server.address
        with (
            run.fault("P3", after_s=1.0) as mark,
            grpc.insecure_channel(address, options=OPTIONS) as channel,
        ):
            while time.monotonic() < mark.began + pace.fault_s:
                for size in (1, 7, 100):
                    code, _ = call(channel, _INFER, b"\xff" * size)
                    wrong += code != _INVALID_ARGUMENT
                for raw in (_HTTP1, _TLS_HELLO, _TRUNCATED, os.urandom(64)):
                    _send_raw(address, raw)
                sent += 7
                time.sleep(0.01)
            mark.healed = time.monotonic()
    values = run.plain() | {
        "malformed": sent,
        "not_invalid_argument": wrong,
        "node_calls": _strays(run),
        "p99_ratio": run.p99_ratio(mark.began, mark.healed),
    }
    return Findings(of=[judged("P3", finding(system, _LOAD, values))])


def _send_raw(address: str, content: bytes) -> None:
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=1) as connection:
        connection.sendall(content)
        connection.settimeout(0.01)
        connection.recv(4096)


def slow_clients(system: System, pace: Pace, seed: int) -> Findings:
    """500 connections that take their time, of each kind in turn."""
    with course.run(system, LOADS[_LOAD], seed) as run:
        run.warm(pace.warm_s)
        address = run.stage.gateway.server.address
        _, body = build(NAME, {"x": np.zeros(64, np.uint8)}, protocol="openinference")
        marks, grown, tallies = [], [], []
        for kind in _SLOW:
            mark, tally, growth = _attacked(
                run,
                "P4",
                partial(
                    attacks.slow_connections,
                    address,
                    _CONNECTIONS,
                    kind,
                    method=HEALTH if kind == "window" else _INFER,
                    message=b"" if kind == "window" else body,
                ),
                pace,
            )
            marks.append(mark)
            grown.append(growth)
            tallies.append(tally)
    values = run.plain() | {
        "connections": min(tally.connections for tally in tallies),
        "closed_by_gateway": max(tally.closed for tally in tallies),
        "p99_ratio": worst([run.p99_ratio(mark.began, mark.healed) for mark in marks]),
        "memory_mb": max(grown),
    }
    return Findings(of=[judged("P4", finding(system, _LOAD, values))])


def floods(system: System, pace: Pace, seed: int) -> Findings:
    """Calls that are cancelled as they are sent, and pings, by the thousand."""
    with course.run(system, LOADS[_LOAD], seed) as run:
        run.warm(pace.warm_s)
        address = run.stage.gateway.server.address
        _, body = build(NAME, {"x": np.zeros(64, np.uint8)}, protocol="openinference")
        floods: tuple[Callable[[], AbstractAsyncContextManager[Tally]], ...] = (
            lambda: attacks.rapid_reset(address, method=_INFER, message=body),
            lambda: attacks.ping_flood(address),
        )
        attacked = [_attacked(run, "P5", flood, pace) for flood in floods]
    reset, ping = (run.p99_ratio(mark.began, mark.healed) for mark, _, _ in attacked)
    sent_reset, sent_ping = (tally.sent for _, tally, _ in attacked)
    values = run.plain() | {
        "sent_reset": sent_reset,
        "sent_ping": sent_ping,
        "p99_ratio": worst([reset, ping]),
        "p99_ratio_reset": reset,
        "p99_ratio_ping": ping,
    }
    return Findings(of=[judged("P5", finding(system, _LOAD, values))])


def cancels(system: System, pace: Pace, seed: int) -> Findings:
    """Clients that cancel what nodes have begun."""
    with course.run(system, 20.0, seed, load={"even": True, "deadline_ms": 5000.0}) as run:
        run.warm(pace.warm_s / 2)
        at_rest = _tasks(run.stage)
        run.sending.change(cancel_ms=_CANCEL_MS)
        run.wait(1.0)  # what was sent before is answered
        with run.fault("L1", after_s=0.0):
            for node in run.stage.nodes:
                node.tell(latency_ms=1000.0, at_once=1000)
            run.wait(pace.fault_s)
            for node in run.stage.nodes:
                node.tell(latency_ms=Behaviour().latency_ms, at_once=Behaviour().at_once)
        run.wait(1.5)
        run.sending.change(cancel_ms=0.0, rate=100.0)
        after = time.monotonic()
        run.wait(pace.after_s)
        run.sending.change(rate=0.01)
        run.wait(0.5)
        left = _tasks(run.stage) - at_rest
        ended = time.monotonic()
    cancelled = np.sort(run.requests.among(run.requests.code == _CANCELLED).sent)
    seen = np.sort(np.concatenate([node.cancelled().at for node in run.attempts]))
    alike = len(cancelled) == len(seen) > 0
    values = run.plain() | {
        "failed": int((~np.isin(run.requests.code, (_OK, _CANCELLED))).sum()),
        "cancelled": len(cancelled),
        "cancels_missed": max(0, len(cancelled) - len(seen)),
        "seen_after_ms": float(np.percentile(seen - cancelled, 99)) * 1000 if alike else math.nan,
        "retries": _strays(run),
        "least_share_of_fair": run.fair_shares(after, ended)[0],
        "tasks_left": left,
    }
    return Findings(of=[judged("L1", finding(system, "20/s", values))])


def _tasks(stage: Stage) -> float:
    for line in stage.metrics().splitlines():
        if line.startswith("dl_inference_asyncio_tasks "):
            return float(line.rpartition(" ")[2])
    return math.nan


def deadlines(system: System, pace: Pace, seed: int) -> Findings:
    """Clients that wait for less than a node takes."""
    behaviour = {"latency_ms": 450.0, "at_once": 1000}
    load = {"deadline_ms": _DEADLINE_MS}
    with course.run(system, 40.0, seed, behaviour=behaviour, load=load) as run:
        run.wait(pace.fault_s)
    left = np.concatenate([node.arrived().left for node in run.attempts])
    values = run.plain() | {
        "failed": int((run.requests.code != 4).sum()),
        "passed_on_beyond_ms": float(left.max()) * 1000 - _DEADLINE_MS if len(left) else math.nan,
        "worked_after": sum(len(node.answered()) for node in run.attempts),
    }
    return Findings(of=[judged("L2", finding(system, "40/s", values))])


def ended(system: System, pace: Pace, seed: int) -> Findings:
    """SIGTERM, with clients that stop when health says so."""
    delay_s = 0.5
    ending = system.having(server={**system.server, "drain_s": _GRACE_S, "drain_delay_s": delay_s})
    with course.run(ending, LOADS["67 %"], seed, load={"until_not_serving": True}) as run:
        run.warm(pace.warm_s)
        server = run.stage.gateway.server
        pid = server.processes()[0]
        with grpc.insecure_channel(server.address, options=OPTIONS) as channel:
            call(channel, HEALTH, b"")
            told = time.monotonic()
            server.send_signal(signal.SIGTERM)
            said = _until_said(channel, told + _GRACE_S + delay_s + 10.0)
        status, over = _exit_of(pid, told + _GRACE_S + delay_s + 10.0)
    values = run.plain() | {
        "exit_status": status,
        "said_not_serving_first": float(said),
        "ended_beyond_grace_s": max(0.0, over - told - _GRACE_S - delay_s),
        "ended_s": over - told,
    }
    return Findings(of=[judged("L3", finding(system, "67 %", values))])


def _until_said(channel: Any, deadline: float) -> bool:
    """Whether health said that it does not serve, before it said nothing any more and before `deadline`."""
    while time.monotonic() < deadline:
        code, body = call(channel, HEALTH, b"")
        if code or body != SERVING:
            return not code
        time.sleep(0.005)
    return False


def _exit_of(pid: int, deadline: float) -> tuple[float, float]:
    """A child's exit status, negative for a signal, and when it ended; NaN if it has not."""
    while time.monotonic() < deadline:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None:
            status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            return float(status), time.monotonic()
        time.sleep(0.01)
    return math.nan, math.inf


def worker_killed(system: System, pace: Pace, seed: int) -> Findings:
    """One of two gateway processes is killed, while a node is sick that only attempts can tell."""
    two = system.having(workers=2)
    with course.run(two, LOADS["67 %"], seed, load={"connections": 8}) as run:
        run.warm(pace.warm_s)
        run.stage.nodes[0].tell(status=INTERNAL)
        run.wait(pace.fault_s)
        server = run.stage.gateway.server
        port = int(server.address.rpartition(":")[2])
        listening = sockets.listening(port)
        victim, its = sockets.listener(server.processes()[1:], port)
        taken = sockets.accepted(victim, port)
        ports = run.sending.ports
        with run.fault("L4", after_s=0.0) as mark:
            os.kill(victim, signal.SIGKILL)
            until(lambda: its not in sockets.listening(port), 5.0, "the killed worker still listens")
            try:
                respawned = until(lambda: len(sockets.listening(port)) >= len(listening), 15.0, "no new worker")
            except RuntimeError:
                respawned = math.inf
            mark.healed = time.monotonic()
            run.wait(pace.after_s)
            sick = (mark.healed, time.monotonic())
    requests = run.requests
    victims = [number for number, own in enumerate(ports) if own in taken]
    its_requests = requests.by_connections(victims, len(ports))
    in_flight = its_requests.among((its_requests.sent < mark.began + 0.02) & (its_requests.ended >= mark.began))
    before = requests.failed.ended_within(0.0, mark.began)
    values = run.plain() | {
        "failed": len(requests.failed),
        "failed_before": len(before),
        "victims_connections": len(victims),
        "victims_in_flight": len(in_flight),
        "failed_beyond_in_flight": max(0, len(requests.failed) - len(before) - len(in_flight)),
        "failed_later": len(requests.failed.among(requests.failed.sent >= mark.began + 0.02)),
        "respawned_s": respawned,
        "share_of_sick_node": figures.share_of_fair(run.attempts, (0,), *sick),
    }
    return Findings(of=[judged("L4", finding(two, "67 %", values))], series=[])


def descriptors(system: System, pace: Pace, seed: int) -> Findings:
    """More connections than the gateway may have files open; then they go."""
    with course.run(system, LOADS[_LOAD], seed) as run:
        run.warm(pace.warm_s)
        stage = run.stage
        before = {pid: _open_files(pid) for pid in stage.gateway.server.processes()}
        for pid, count in before.items():
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (count + _FILES_LEFT, hard))
        address = stage.gateway.server.address
        with run.fault("R1", after_s=1.0) as mark:
            with _attacking(lambda: attacks.slow_connections(address, 200, "silent")):
                held = _most_while(pace.fault_s, lambda: max(_open_files(pid) - count for pid, count in before.items()))
            mark.healed = time.monotonic()
            try:
                again = until(lambda: stage.ask(NAME) == 0, 10.0, "it does not answer new connections")
            except RuntimeError:
                again = math.inf
        alive = bool(stage.gateway.server.processes()) and stage.ask(NAME) == 0
    during = run.requests.due_within(mark.began, mark.healed)
    values = run.plain() | {
        "alive": float(alive),
        "connections_held": held,
        "normal_again_s": again,
        "failed_on_open_connections": len(during.failed),
    }
    return Findings(of=[judged("R1", finding(system, _LOAD, values))])


def _open_files(pid: int) -> int:
    """0 once it has ended."""
    with suppress(OSError):
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return 0
