"""`dl-inference-core bench` against real servers, and the arithmetic of what it measures."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from click.testing import CliRunner, Result
from dl_inference_tools.load_testing import processes, report
from dl_inference_tools.load_testing.request import Message, Question, Target
from dl_inference_tools.load_testing.results import Load, Results, Row, encoded, histogram
from dl_inference_tools.load_testing.sending import Part, _Sender
from hdrh.histogram import HdrHistogram

from dl_inference_core.cli import main
from dl_inference_core.client import build
from dl_inference_core.errors import NodeOverloaded
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.tensors import Response
from dl_inference_core.testing.loopback import CoroutineService, free_port
from dl_inference_core.testing.transport_tls import Authority
from dl_inference_core.transport import Exchange, Limits
from dl_inference_core.wire import messages, openinference
from dl_inference_core.wire.protocol import METADATA, PROTOCOLS

TIMES = "\N{MULTIPLICATION SIGN}"
BRIEF = ("--requests", "40", "--warm-up", "50ms")
INFER = PROTOCOLS["openinference"].node_method
INPUTS = [
    ("x", np.dtype(np.float32), (None, 3)),
    ("ids", np.dtype(np.int64), (None, None)),
    ("name", np.dtype(object), (2,)),
]


class Node:
    """Answers in each protocol with the request's payload, and keeps the requests. `before` is awaited first."""

    def __init__(self, before: Callable[[int], Any] = lambda _: None) -> None:
        self.requests: list[Any] = []
        self.inputs: list[openinference.Described] = INPUTS
        self._before = before

    def service(self) -> CoroutineService:
        def handler(codec: Any) -> Any:
            async def answer(exchange: Exchange) -> bytes:
                request = codec.decode_request(exchange.message)
                self.requests.append(request)
                self._before(len(self.requests))
                return codec.encode_response(Response(payload=request.payload, tags=request.tags), request)

            return answer

        async def metadata(_: Exchange) -> bytes:
            return openinference.encode_metadata("m", [1], "fake", inputs=self.inputs, outputs=())

        inferring = {PROTOCOLS[name].node_method: handler(PROTOCOLS[name].codec) for name in ("tfserving", "seldon")}
        return CoroutineService({**inferring, INFER: handler(openinference), METADATA.node_method: metadata})

    @asynccontextmanager
    async def serving(self, service: CoroutineService | None = None, **how: Any) -> AsyncIterator[str]:
        transport = GrpcioTransport(GrpcioTransport.Options())
        server = await transport.serve(service or self.service(), ("127.0.0.1:0",), Limits(), **how)
        try:
            yield f"127.0.0.1:{server.ports[0]}"
        finally:
            await server.drain(0)


async def bench(*arguments: str | Path) -> Result:
    """What the command does, on another thread: the server is on this one."""
    return await asyncio.to_thread(CliRunner().invoke, main, ["bench", *map(str, arguments)])


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    file = tmp_path / "x.json"
    file.write_text('{"x": [[1, 2, 3]]}')
    return file


@pytest.mark.parametrize("protocol", ["openinference", "tfserving", "seldon"])
async def test_every_protocol_is_spoken(protocol: str, tensors: Path, tmp_path: Path) -> None:
    node = Node()
    async with node.serving() as address:
        out = tmp_path / "out.json"
        how = ("--model", "m", "--protocol", protocol, "--input", tensors, "--in-flight", "1,4")
        result = await bench(address, *how, *BRIEF, "--json", out)
    assert result.exit_code == 0, result.output
    results = Results.read(out)
    assert [row.load.name for row in results.rows] == ["1 in flight", "4 in flight"]
    for row in results.rows:
        assert row.good
        assert HdrHistogram.decode(row.latency).get_total_count() == 40
        assert row.answered >= 40 - 4
        assert 0 < row.latency_ms["p50"] <= row.latency_ms["p99"] <= row.latency_ms["max"]
        assert row.requests_per_s > 0
        assert f"{row.latency_ms['p99']:.2f}" in result.output
    assert "4 in flight" in result.output
    request = node.requests[0]
    payload = request.payload if protocol == "seldon" else request.payload["x"]
    np.testing.assert_array_equal(payload, [[1, 2, 3]])
    assert protocol == "seldon" or payload.dtype == np.float32
    assert request.tags.get("taskId", request.model) == "m"


async def test_a_request_is_made_from_the_signature() -> None:
    node = Node()
    async with node.serving() as address:
        result = await bench(address, "--model", "m", "--rows", "5", *BRIEF)
    assert result.exit_code == 0, result.output
    assert "x float32 [5, 3], ids int64 [5, 1], name strings [2]" in result.output
    payload = node.requests[-1].payload
    assert {name: (array.dtype, array.shape) for name, array in payload.items()} == {
        "x": (np.float32, (5, 3)),
        "ids": (np.int64, (5, 1)),
        "name": (object, (2,)),
    }
    assert payload["x"].std() > 0
    assert 0 <= payload["x"].min() <= payload["x"].max() < 1


async def test_the_servers_word_on_a_dtype_holds_for_json(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('\ufeff{"ids": [[1, 2]], "name": ["a", "b"], "other": [1]}')  # as some editors do
    async with Node().serving() as address:
        question = Question(target=Target(address=address), model="m")
        message = await asyncio.to_thread(question.from_file, tmp_path / "in.json")
        stated = await asyncio.to_thread(question.from_file, tmp_path / "in.json", "int16")
    assert dtypes(message) == {"ids": "int64", "name": "object", "other": "float32"}
    assert dtypes(stated) == {"ids": "int16", "name": "object", "other": "int16"}


def test_npz_has_its_own_dtypes(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.ones((2, 3), np.float64), name=np.array(["a", "b"]))
    message = Question(target=Target(address="nowhere"), model="m").from_file(tmp_path / "in.npz")
    assert dtypes(message) == {"x": "float64", "name": "object"}
    assert openinference.decode_request(message.body).payload["name"].tolist() == [b"a", b"b"]


def dtypes(message: Message) -> dict[str, str]:
    return {name: str(array.dtype) for name, array in openinference.decode_request(message.body).payload.items()}


def test_seldon_takes_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "seven.png").write_bytes(b"\x89PNG")
    message = Question(target=Target(address="nowhere"), model="69", protocol="seldon").from_file(
        tmp_path / "seven.png"
    )
    assert message.method == PROTOCOLS["seldon"].node_method
    assert PROTOCOLS["seldon"].codec.decode_request(message.body).payload == b"\x89PNG"


async def test_a_message_is_sent_as_it_is(tmp_path: Path) -> None:
    node = Node()
    (tmp_path / "body.bin").write_bytes(build("m", {"x": np.ones(2)})[1])
    async with node.serving() as address:
        sent = await bench(address, "--data", tmp_path / "body.bin", "--method", INFER, *BRIEF)
    assert sent.exit_code == 0, sent.output
    np.testing.assert_array_equal(node.requests[-1].payload["x"], [1, 1])


async def test_failures_are_counted_by_code_and_never_measured(tensors: Path, tmp_path: Path) -> None:
    def fail(number: int) -> None:
        if number % 10 == 0:
            time.sleep(0.05)
            raise NodeOverloaded("too much of it")

    out = tmp_path / "out.json"
    async with Node(fail).serving() as address:
        how = ("--model", "m", "--input", tensors, "--requests", "100", "--warm-up", "0s", "--processes", "2")
        result = await bench(address, *how, "--in-flight", "2", "--json", out)
    assert result.exit_code == 1
    (row,) = Results.read(out).rows
    assert row.failed == {"RESOURCE_EXHAUSTED": 10}
    assert HdrHistogram.decode(row.latency).get_total_count() == row.answered == 90
    assert "2 in flight: 10 failed: RESOURCE_EXHAUSTED: too much of it" in result.output


async def test_json_alone_goes_to_standard_output_and_a_picture_to_its_file(tensors: Path, tmp_path: Path) -> None:
    async with Node().serving() as address:
        how = ("--model", "m", "--input", tensors, "--rate", "200", "--poisson", "--json", "-", "--processes", "2")
        result = await bench(address, *how, *BRIEF, "--plot", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    figures = json.loads(result.stdout)
    assert figures["rows"][0]["load"]["rate"] == 200
    assert set(figures["rows"][0]["latency_ms"]) == {"mean", "p50", "p90", "p99", "p99.9", "max"}
    assert figures["rows"][0]["behind_ms"]["max"] > 0
    assert "200/s Poisson" in result.stderr
    assert "\x1b" not in result.stderr, "a progress bar where there is no terminal"


async def test_a_server_that_stalls_once_is_seen_by_all_that_were_due_meanwhile(tensors: Path, tmp_path: Path) -> None:
    stall_s = 0.3

    def stall(number: int) -> None:
        if number == 60:
            time.sleep(stall_s)  # the whole server, as it has one event loop

    out = tmp_path / "out.json"
    async with Node(stall).serving() as address:
        how = ("--model", "m", "--input", tensors, "--rate", "200", "--requests", "200", "--warm-up", "0s")
        result = await bench(address, *how, "--json", out)
    assert result.exit_code == 0, result.output
    (row,) = Results.read(out).rows
    # Of 200 requests 60 are due while it stalls; those of the first two thirds of it wait for 0.1 s or more.
    assert row.latency_ms["max"] >= 290
    assert row.latency_ms["p90"] >= 90


async def test_a_comparison_has_the_ratio_beside_each_figure(tensors: Path, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text(results(row(1000, 2000)).model_dump_json())
    async with Node().serving() as address:
        how = ("--model", "m", "--input", tensors, "--in-flight", "1,2", "--compare", before)
        result = await bench(address, *how, *BRIEF)
    assert result.exit_code == 0, result.output
    lines = {line.split("│")[1].strip(): line for line in result.output.splitlines() if "in flight │" in line}
    assert lines["1 in flight"].count(TIMES) == 6
    assert TIMES not in lines["2 in flight"]
    assert "had no load of 2 in flight" in result.output


async def test_tls_is_spoken(tensors: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ours")
    client = authority.client(server_name="node.test")
    async with Node().serving(tls=authority.issue("node.test").server()) as address:
        how = ("--ca", client.ca or "", "--server-name", "node.test")
        result = await bench(address, "--model", "m", "--input", tensors, *how, *BRIEF)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model is missing"),
        (("--model", "m", "--in-flight", "1", "--rate", "5"), "give one of them"),
        (("--model", "m", "--in-flight", "0"), "expected one like 1,8,32"),
        (("--model", "m", "--rate", "nan"), "expected one like 1,8,32"),
        (("--model", "m", "--duration", "soon"), "such as 500ms or 10s"),
        (("--model", "m", "--duration", "10"), "has no unit; write 10ms, 10s, 10m (minutes) or 10h"),
        (("--model", "m", "--duration", "0s"), "expected more"),
        (("--model", "m", "--poisson"), "--rate"),
        (("--model", "m", "--processes", "3", "--connections", "2"), "each needs one"),
        (("--model", "m", "--processes", "3", "--in-flight", "2"), "each needs one"),
        (("--model", "m", "--dtype", "int8"), "--input"),
        (("--model", "m", "--rows", "2", "--input", "FILE"), "--rows is for tensors that are made"),
        (("--model", "m", "--input", "FILE"), "expected .json or .npz"),
        (("--model", "m", "--input", "FILE.json"), "openinference cannot hold the payload"),
        (("--model", "m", "--input", "FILE.npz"), "file.npz: "),
        (("--data", "FILE"), "go together"),
        (("--data", "FILE", "--method", "Predict"), "expected /package.Service/Method"),
        (("--model", "m", "--compare", "FILE"), "is nothing that --json wrote"),
        (("--model", "m", "--plot", "FILE/none/a.png"), "there is no folder"),
    ],
)
def test_what_cannot_be_used_is_said(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for suffix, text in (("", "{}"), (".json", "[[1, 2]]"), (".npz", "PK none")):
        file.with_suffix(suffix).write_text(text)
    given = [part.replace("FILE", str(file)) for part in arguments]
    result = CliRunner().invoke(main, ["bench", f"127.0.0.1:{free_port()}", *given])
    assert result.exit_code == 2, result.output
    assert message in result.output


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ([], (), "give --input"),
        ([("x", None, (3,))], (), "does not say of which dtype"),
        ([("x", np.dtype(np.int8), (3,))], ("--rows", "2"), "--rows cannot be used"),
        ([("x", np.dtype(np.int8), (2**30,))], (), "values"),
    ],
)
async def test_a_signature_that_does_not_do_is_said(inputs: Any, arguments: tuple[str, ...], message: str) -> None:
    node = Node()
    node.inputs = inputs
    async with node.serving() as address:
        result = await bench(address, "--model", "m", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output


async def test_a_first_request_that_fails_ends_it(tensors: Path) -> None:
    result = await bench(f"127.0.0.1:{free_port()}", "--model", "m", "--input", tensors)
    assert result.exit_code == 1
    assert result.output.startswith("error: UNAVAILABLE: ")
    failure = messages.SeldonMessage(status={"status": 1, "reason": "no model"}).SerializeToString()

    async def fail(_: Exchange) -> bytes:
        return failure

    async with Node().serving(CoroutineService({PROTOCOLS["seldon"].node_method: fail})) as address:
        result = await bench(address, "--model", "m", "--protocol", "seldon", "--input", tensors)
    assert result.exit_code == 1
    assert "no model" in result.output


def test_what_serves_does_not_import_it() -> None:
    code = (
        "import sys, dl_inference_core.cli, dl_inference_core.app\n"
        "from dl_inference_core.plugins import Plugins\n"
        "Plugins().choose_transport('auto')\n"
        "heavy = 'hdrh', 'rich', 'matplotlib', 'dl_inference_tools.commands'\n"
        "print([name for name in sys.modules if name in heavy])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# One process's part, on this event loop


async def answered(
    part: Part,
    node: Node | None = None,
    body: bytes | None = None,
    method: str = INFER,
    tell: Callable[[int], None] = lambda _: None,
) -> Row:
    async with (node or Node()).serving() as address, Target(address=address).channel(grpc.aio) as channel:
        message = Message(method=method, body=body or build("m", {"x": np.ones(1)})[1], contents="")
        await channel.channel_ready()
        return await _Sender(part, message, [channel.unary_unary(method)], 10.0).run(tell)


def part(load: Load, late_s: float = 0.0) -> Part:
    return Part(load=load, first=0, step=1, start_ns=time.monotonic_ns() - round(late_s * 1e9))


async def test_in_an_open_loop_latency_counts_from_when_a_request_was_due() -> None:
    row = await answered(part(Load(rate=100, requests=10, warm_up_s=0), late_s=1.0))
    assert row.good
    # The last was due 0.09 s after the first, all long before anything was sent.
    times = HdrHistogram.decode(row.latency)
    assert times.get_total_count() == 10
    assert times.get_min_value() >= 900_000
    assert row.behind_ms["p50"] >= 900
    assert any("late by" in note for note in row.notes())


async def test_what_was_due_and_not_sent_is_said_and_no_success() -> None:
    row = await answered(part(Load(rate=100, duration_s=0.5, warm_up_s=0.1), late_s=1.0))
    assert row.unsent == 50
    assert not row.good
    assert (row.answered, row.latency_ms) == (0, {})
    assert "the client was the limit: 50 requests were due but not sent" in row.notes()[0]


async def test_the_warm_up_counts_nowhere() -> None:
    def fail(number: int) -> None:
        if number <= 20:
            raise NodeOverloaded("cold")

    node = Node(fail)
    row = await answered(part(Load(rate=100, requests=5, warm_up_s=0.2)), node)
    assert len(node.requests) == 25
    assert row.good
    assert HdrHistogram.decode(row.latency).get_total_count() == 5


async def test_a_failure_in_a_seldon_message_is_one() -> None:
    class Failing(Node):
        def service(self) -> CoroutineService:
            answers = itertools.cycle([{"status": {"status": 1}}, {"status": {"status": 0}, "strData": "x"}])

            async def answer(_: Exchange) -> bytes:
                body: bytes = messages.SeldonMessage(**next(answers)).SerializeToString()
                return body

            return CoroutineService({PROTOCOLS["seldon"].node_method: answer})

    seldon, body = build("m", "x")
    row = await answered(part(Load(in_flight=1, requests=10, warm_up_s=0)), Failing(), body, seldon.node_method)
    assert row.failed == {"FAILURE": 5}
    assert row.answered == 5


@pytest.mark.parametrize("load", [Load(in_flight=2, duration_s=60), Load(rate=100, duration_s=60)])
async def test_a_load_ends_when_nobody_hears_of_it_any_more(load: Load) -> None:
    def gone(_: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        await answered(part(load), tell=gone)


def test_requests_are_due_evenly_or_at_random_at_the_rate_asked_for() -> None:
    def due(load: Load, index: int, of: int) -> list[int]:
        mine = Part(load=load.part(index, of), first=index, step=of, start_ns=1000)
        return list(itertools.islice(_Sender(mine, Message(method="/a/B", body=b"", contents=""), [], 1)._due(), 2000))

    even = [due(Load(rate=1000), index, 2) for index in (0, 1)]
    assert sorted(even[0] + even[1]) == [1000 + number * 1_000_000 for number in range(4000)]
    random = due(Load(rate=1000, poisson=True), 0, 2)
    gaps = np.diff(random)
    # 500 a second: exponential gaps have a standard deviation equal to their mean; of 2,000, within 10 % by far.
    assert gaps.mean() == pytest.approx(2e6, rel=0.1)
    assert gaps.std() == pytest.approx(2e6, rel=0.15)
    assert random != due(Load(rate=1000, poisson=True), 1, 2)


def test_a_load_is_shared_out_whole() -> None:
    parts = [Load(in_flight=8, requests=100).part(index, 3) for index in range(3)]
    assert [each.in_flight for each in parts] == [3, 3, 2]
    assert sum(each.requests or 0 for each in parts) == 100


# What is told of it


def row(*times_us: int, **more: Any) -> Row:
    latency = histogram()
    for time_us in times_us:
        latency.record_value(time_us)
    figures = {"seconds": 2.0, "answered": len(times_us), "failed": {}, "said": {}, "unsent": 0, "busy": 0.1}
    return Row(load=Load(in_flight=1), latency=encoded(latency), behind=encoded(histogram()), **{**figures, **more})


def results(*rows: Row) -> Results:
    return Results(
        version="0",
        date="2026-01-01T00:00:00+00:00",
        address="a:1",
        model="m",
        method="/a/B",
        contents="x",
        request_bytes=1,
        processes=1,
        connections=1,
        cpus=1,
        rows=rows,
    )


def test_processes_are_merged_into_one_histogram() -> None:
    parts = [row(1000, 1000, failed={"UNAVAILABLE": 1}), row(3000, 9000, failed={"UNAVAILABLE": 2}, busy=0.95)]
    merged = Row.merged(Load(in_flight=2), parts)
    assert merged.failed == {"UNAVAILABLE": 3}
    assert merged.requests_per_s == 2
    assert merged.latency_ms["mean"] == pytest.approx(3.5, rel=0.001)
    assert merged.latency_ms["p50"] == pytest.approx(1, rel=0.001)
    assert merged.latency_ms["max"] == pytest.approx(9, rel=0.001)
    assert any("busy 95%" in note for note in merged.notes())


def test_json_round_trips() -> None:
    before = results(row(1000, 5000), row(failed={"INTERNAL": 3}))
    text = before.model_dump_json()
    assert Results.model_validate_json(text) == before
    assert json.loads(text)["rows"][0]["latency_ms"]["max"] == pytest.approx(5, rel=0.001)
    assert Results.model_validate_json(text).rows[1].latency_ms == {}


def test_a_load_that_nobody_answered_is_drawn_and_told(tmp_path: Path) -> None:
    none = results(row(failed={"INTERNAL": 3}), row(1000, 2000))
    with (console := report.console()).capture() as told:
        report.show(none, results(row(1000)), console)
    assert "3 failed: INTERNAL" in told.get()
    for drawn in (none, results(none.rows[0]), results(row(1000))):
        report.plot(drawn, none, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


async def test_a_process_that_cannot_connect_is_an_error_and_none_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    import multiprocessing

    target = Target(address=f"127.0.0.1:{free_port()}", timeout_s=0.2)
    message = Message(method=INFER, body=b"", contents="")
    with (
        pytest.raises(processes.NodeFailed, match="has ended"),
        processes.started(target, message, processes=1, connections=1, open_loop=False),
    ):
        raise AssertionError("it stands")
    assert not multiprocessing.active_children()
    assert "TimeoutError" in capfd.readouterr().err
