"""Bad input gets a clear status, and nothing else is lost by it; the original's holes, one by one."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dl_inference_core.client import build
from dl_inference_core.tensors import Form
from dl_inference_core.wire import messages, seldon
from tests.methods import METHODS

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
INTERNAL, EXHAUSTED = grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED
SELDON = "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService/PytorchPredict"
TFSERVING = "/tensorflow.serving.PredictionService/Predict"
OPENINFERENCE = "/inference.GRPCInferenceService/ModelInfer"
HEALTH = "/grpc.health.v1.Health/Check"
X = np.array([[1, 2, 3]], np.float32)


def say(text: str, **more: Any) -> bytes:
    """A request to the model "trouble"."""
    return build(12, text, **more)[1]


def predict(name: str, **more: Any) -> bytes:
    return build(name, {"x": X}, protocol="tfserving", **more)[1]


def is_well(peer: Any) -> None:
    answer = seldon.decode_response(peer.call(SELDON, say("hello")))
    assert answer.payload == "done "


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("body", [b"\xff", b"\x0a\xff", b"\x00", b"GET / HTTP/1.1", b"\x0a\x05ab"])
def test_malformed_bytes(peer: Any, method: str, body: bytes) -> None:
    code, message = peer.refusal(method, body)
    assert code is INVALID
    assert "malformed" in message
    assert "expected a " in message


def test_bytes_that_are_malformed_behind_the_key(peer: Any, gateway: Any) -> None:
    """The gateway reads no further than the key: the node tells, and is not blamed."""
    failures = gateway.attempts().get("failure", 0)
    for method, body in (
        (TFSERVING, predict("linear") + b"\x12\x03\x0a\xff\xff"),
        (OPENINFERENCE, build("linear", {"x": X})[1] + b"\x2a\x02\x0a\xff"),
        (SELDON, say("hello")[:-1] + b"\xff\x1a\x02\x12\xff"),
    ):
        code, message = peer.refusal(method, body)
        assert code is INVALID, message
        assert "malformed" in message
    assert gateway.attempts().get("failure", 0) == failures
    is_well(peer)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_message_lacks_its_key(peer: Any, method: str) -> None:
    code, message = peer.refusal(method, b"")
    assert code is INVALID
    # A Seldon message may lack its key where the server has one model; then the empty message lacks its payload.
    seldon = method.startswith("/seldon.") or method.endswith(("/PytorchPredict", "/CaffePredict"))
    expected = ("does not name a model", "has no payload") if seldon else ("is missing",)
    assert any(words in message for words in expected)


def value(**kind: Any) -> Any:
    return messages.Value(**kind)


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (value(number_value=100.9), INVALID),
        (value(number_value=float("nan")), INVALID),
        (value(number_value=float("inf")), INVALID),
        (value(number_value=1e300), INVALID),
        (value(bool_value=True), INVALID),
        (value(null_value=0), INVALID),
        (value(string_value=""), INVALID),
        (value(), INVALID),
        (value(list_value={"values": [{"number_value": 7}]}), INVALID),
        (value(struct_value={"fields": {"a": {"number_value": 7}}}), INVALID),
        (value(number_value=-7), NOT_FOUND),
        (value(number_value=2**31), NOT_FOUND),
        (value(number_value=2**53), NOT_FOUND),
        (value(number_value=99999), NOT_FOUND),
        (value(string_value="-7"), NOT_FOUND),
        (value(string_value="7.0"), NOT_FOUND),
        (value(string_value="seven"), NOT_FOUND),
        (value(string_value="linear-"), NOT_FOUND),
        (value(string_value="-"), NOT_FOUND),
        (value(string_value=str(2**31)), NOT_FOUND),
        (value(string_value="9" * 10_000), NOT_FOUND),
        (value(string_value="x" * 1_000_000), NOT_FOUND),
        (value(string_value="\uff17"), NOT_FOUND),
    ],
    ids=lambda given: str(given)[:40].replace("\n", " "),
)
def test_task_keys(peer: Any, gateway: Any, key: Any, code: grpc.StatusCode) -> None:
    before = gateway.attempts()
    request = messages.SeldonMessage(strData="text")
    request.meta.tags["taskId"].CopyFrom(key)
    status, message = peer.refusal(SELDON, request.SerializeToString())
    assert status is code
    assert ("taskId" if code is INVALID else "no model or task") in message
    assert len(message) < 300
    assert gateway.attempts() == before
    is_well(peer)


def test_p1_a_name_of_a_megabyte_is_not_found_and_no_node_is_asked(peer: Any, gateway: Any) -> None:
    before = gateway.attempts()
    for letter in ("x", "7", "\U0001f600", "../"):
        name = (letter * 1_000_000)[:1_000_000]
        for method, body in (
            (TFSERVING, predict(name)),
            (OPENINFERENCE, build(name, {"x": X})[1]),
            (SELDON, build(name, "text")[1]),
        ):
            code, message = peer.refusal(method, body)
            assert code is NOT_FOUND
            assert len(message) < 300
    assert gateway.attempts() == before
    is_well(peer)


@pytest.mark.parametrize("key", [404, "ghost"])
def test_a_model_that_only_the_gateway_knows(gateway: Any, key: Any) -> None:
    before = gateway.attempts()
    code, message = gateway.refusal(SELDON, build(key, "text")[1])
    assert code is NOT_FOUND
    assert str(key) in message
    after = gateway.attempts()
    assert after.get("neutral", 0) == before.get("neutral", 0) + 1
    assert after.get("failure", 0) == before.get("failure", 0)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "/", "../linear", "./linear", "linear/1", "linear/../linear", "/etc/passwd", "linear\0", "\0",
     "linear\n", "..-12345", "%2e%2e", "..\\linear", "linear/", " linear", "LINEAR", "__pycache__"],
)  # fmt: skip
def test_names_that_would_be_paths(peer: Any, name: str) -> None:
    for method, body in (
        (TFSERVING, predict(name)),
        (OPENINFERENCE, build(name, {"x": X})[1]),
        (SELDON, build(name, "text")[1]),
    ):
        code, _ = peer.refusal(method, body)
        assert code is NOT_FOUND


@pytest.mark.parametrize("letter", ["x", "é", "\U0001f600", "\n", "\0"])
def test_names_too_long_to_repeat_are_the_clients_fault(peer: Any, gateway: Any, letter: str) -> None:
    """gRPC allows 8 KiB for a status message: more, and the client sees quite another error."""
    before = gateway.attempts()
    name = letter * 50_000
    for method, body in (
        (TFSERVING, build("linear", {name: X}, protocol="tfserving")[1]),
        (TFSERVING, build("linear", {"x": X}, protocol="tfserving", outputs=[name])[1]),
        (OPENINFERENCE, build("linear", {name: X})[1]),
        (OPENINFERENCE, build("linear", {f"{letter}{number}": X for number in range(5000)})[1]),
    ):
        code, message = peer.refusal(method, body)
        assert code is INVALID, message
    after = gateway.attempts()
    assert {outcome for outcome in after if after[outcome] != before.get(outcome, 0)} <= {"neutral"}


def test_a_name_that_is_no_text(peer: Any) -> None:
    for method, body in ((TFSERVING, b"\x0a\x03\x0a\x01\xff"), (OPENINFERENCE, b"\x0a\x01\xff")):
        code, message = peer.refusal(method, body)
        assert code is INVALID
        assert "malformed" in message


def test_an_oversize_request_blames_no_node(peer: Any, gateway: Any) -> None:
    before = gateway.attempts()
    code, message = peer.refusal(SELDON, say("x" * (10 * 1024 * 1024)))
    assert code is EXHAUSTED
    assert "larger than max" in message
    assert gateway.attempts() == before
    is_well(peer)


@pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False)])
def test_the_largest_request_there_may_be(peer: Any, more: int, fits: bool) -> None:
    limit = 10 * 1024 * 1024
    overhead = len(say("x" * 9_000_000)) - 9_000_000
    body = say("x" * (limit - overhead + more))
    assert len(body) == limit + more
    if fits:
        assert peer.call(SELDON, body)
    else:
        assert peer.refusal(SELDON, body)[0] is EXHAUSTED


def test_an_oversize_answer_blames_no_node(peer: Any, gateway: Any) -> None:
    before = gateway.attempts()
    code, message = peer.refusal(SELDON, say("give large"))
    assert code is EXHAUSTED, message
    after = gateway.attempts()
    for outcome in ("failure", "overload"):
        assert after.get(outcome, 0) == before.get(outcome, 0)
    is_well(peer)


def test_a_compressed_bomb(peer: Any, gateway: Any) -> None:
    failures = gateway.attempts().get("failure", 0)
    with grpc.insecure_channel(
        peer.address,
        options=[("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)],
        compression=grpc.Compression.Gzip,
    ) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(SELDON)(say("x" * (64 * 1024 * 1024)), timeout=20)
        assert caught.value.code() is EXHAUSTED
    assert gateway.attempts().get("failure", 0) == failures
    is_well(peer)


@pytest.mark.parametrize("stage", ["preprocess", "run_model", "postprocess"])
@pytest.mark.parametrize("word", ["boom", "exit"])
def test_a_handler_that_raises(peer: Any, node: Any, wait_for: Callable[..., Any], stage: str, word: str) -> None:
    word = f"{word}{time.monotonic_ns()}"
    request_id = f"id-{word}"
    code, message = peer.refusal(SELDON, say(f"raise {stage} {word}"), metadata=(("x-request-id", request_id),))
    assert code is INTERNAL
    assert request_id in message
    assert word in message
    assert stage in message
    assert "Traceback" not in message
    kind = "SystemExit" if word.startswith("exit") else "RuntimeError"
    node.written(f"{kind}: {word}")
    lines = node.text().splitlines()
    assert sum(f"request {request_id} failed" in line for line in lines) == 1
    assert sum(line == f"{kind}: {word}" for line in lines) == 1
    is_well(peer)


def test_a_handlers_words_that_no_header_can_hold(peer: Any) -> None:
    code, message = peer.refusal(SELDON, say("raise run_model half"))
    assert code is INTERNAL
    assert "RuntimeError: half\\ud83d" in message
    is_well(peer)


def test_a_request_gets_an_id_where_it_has_none(peer: Any, node: Any) -> None:
    word = f"boom{time.monotonic_ns()}"
    _, message = peer.refusal(SELDON, say(f"raise run_model {word}"))
    request_id = message.rpartition("request id ")[2].strip(" )")
    assert len(request_id) == 32
    node.written(request_id)
    is_well(peer)


@pytest.mark.parametrize("kind", ["object", "set", "objects", "dates", "nothing"])
@pytest.mark.parametrize("form", [Form.TEXT])
def test_an_answer_that_no_message_can_hold(peer: Any, kind: str, form: Form) -> None:
    code, message = peer.refusal(SELDON, say(f"give {kind}"))
    assert code is INTERNAL
    assert "encoding the answer" in message
    assert "request id" in message
    is_well(peer)


def begun(wait_for: Callable[..., Any], file: Path) -> None:
    wait_for("the model to have begun", file.with_name(f"{file.name}.begun").exists)


def test_a_client_that_leaves(peer: Any, node: Any, gateway: Any, tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    """The model's queue is emptied of those who left; who stays is answered."""

    def gone() -> float:
        samples = node.counts("dl_inference_requests_total")
        return sum(
            n for labels, n in samples.items() if 'upstream="trouble"' in labels and 'code="CANCELLED"' in labels
        )

    ran = int(seldon.decode_response(peer.call(SELDON, say("count"))).payload)
    before, failures = gone(), gateway.attempts().get("failure", 0)
    gate = tmp_path / "gate"
    running = peer.start_call(SELDON, say(f"await {gate}"))
    begun(wait_for, gate)
    leaving = [peer.start_call(SELDON, say(f"await {gate}")) for _ in range(20)]
    hurried = [peer.start_call(SELDON, say(f"await {gate}"), timeout=1) for _ in range(20)]
    patient = peer.start_call(SELDON, say("hello"))
    # Another model goes on meanwhile; and its answer says that what was sent before has arrived.
    peer.call(TFSERVING, predict("linear"))
    for call in leaving:
        call.cancel()
    for call in hurried:
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for("the node to know that they left", lambda: gone() >= before + 40, 10)
    gate.touch()
    assert seldon.decode_response(running.result(20)).payload == f"done {gate}"
    assert seldon.decode_response(patient.result(20)).payload == "done "
    assert int(seldon.decode_response(peer.call(SELDON, say("count"))).payload) == ran + 1
    assert gateway.attempts().get("failure", 0) == failures


def test_a_client_that_leaves_while_its_request_runs(peer: Any, tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    gate = tmp_path / "gate"
    call = peer.start_call(SELDON, say(f"await {gate}"))
    begun(wait_for, gate)
    call.cancel()
    gate.touch()
    is_well(peer)


def test_s4_tags_become_no_arguments_of_the_model(peer: Any) -> None:
    """Not even where there is no run_model, as the original had it; but for those that the model's config names."""
    tags = {"scale": 100.0, "x": [9.0], "self": 1.0, "more": 5.0, "puid": "p", "model": "m"}
    x = np.array([1.5, 2.5])
    for name, expected in (("tags", x * 2), ("one-tag", x * 100)):
        _, body = build(name, x, tags=tags)
        answer = seldon.decode_response(peer.call(SELDON, body))
        assert answer.payload.tolist() == expected.tolist()
        assert answer.tags == {**tags, "taskId": name}
    metadata = (("scale", "100"), ("model", "other"), ("taskid", "7"), ("meta-bin", b"\xff"))
    answer = seldon.decode_response(peer.call(SELDON, build("tags", x)[1], metadata=metadata))
    assert answer.payload.tolist() == [3.0, 5.0]


def test_s4_inputs_become_no_arguments_that_the_model_does_not_name(peer: Any) -> None:
    _, body = build("tags", {"x": X, "scale": np.float32(100)}, protocol="openinference")
    code, _ = peer.refusal(OPENINFERENCE, body)
    assert code in (INVALID, INTERNAL)
    answer = build("tags", {"x": X}, protocol="openinference")[1]
    assert peer.call(OPENINFERENCE, answer)


# What follows is `wire-contract.md` section 5, "What the original does wrong", in its order; its number 5, about node
# files, has tests of its own.


@pytest.fixture(scope="module")
def relays(serve: Any, routes: Any, node: Any, tasks: dict[str, int]) -> Iterator[list[Any]]:
    """Two nodes that answer as `node` does: gateways in front of it, each with attempts of its own to count."""
    relays = [serve(routes(tasks, node, more="attempts = 1")) for _ in range(2)]
    yield relays
    for relay in relays:
        relay.end()


@pytest.fixture
def front(serve: Any, routes: Any, relays: list[Any], tasks: dict[str, int]) -> Iterator[Any]:
    """A gateway in front of both."""
    front = serve(routes(tasks, *relays))
    yield front
    front.end()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where every connection is refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def wrong_node() -> Iterator[Any]:
    """A node that answers by the function that the test gives it."""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        answer: Callable[[bytes], bytes] = staticmethod(lambda body: body)
        asked = 0

        def service(self, details: Any) -> Any:
            if details.method.endswith(("/Check", "/ServerReady", "/GetModelStatus")):
                return None

            def answer(body: bytes, _: Any) -> bytes:
                self.asked += 1
                return self.answer(body)

            return grpc.unary_unary_rpc_method_handler(answer)

    handler = Handler()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    handler.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
    server.start()
    yield handler
    server.stop(0).wait(10)


def asked(relay: Any) -> int:
    return int(sum(relay.attempts().values()))


def test_hole_1_every_node_gets_its_share_and_failover_happens(
    front: Any, relays: list[Any], start: Any, serve: Any, routes: Any, node: Any, nobody: str
) -> None:
    before = [asked(relay) for relay in relays]
    for _ in range(40):
        front.call(TFSERVING, predict("linear"))
    shares = [asked(relay) - count for relay, count in zip(relays, before, strict=True)]
    assert sum(shares) == 40
    assert min(shares) >= 10
    gateway = serve(f'[[routes]]\nname = "linear"\nnodes = ["{nobody}", "{node.address}"]')
    for _ in range(20):
        gateway.call(TFSERVING, predict("linear"))
    gateway.end()


def test_hole_1_a_node_that_dies_costs_no_request(serve: Any, routes: Any, node: Any, tasks: Any) -> None:
    first, second = (serve(routes(tasks, node)) for _ in range(2))
    front = serve(routes(tasks, first, second))
    failed: list[grpc.RpcError] = []
    done = threading.Event()
    count = [0] * 4

    def load(number: int) -> None:
        while not done.is_set():
            try:
                front.call(TFSERVING, predict("linear"))
                count[number] += 1
            except grpc.RpcError as error:
                failed.append(error)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        target = 200
        while sum(count) < target and not failed:
            time.sleep(0.01)
        os.kill(first.popen.pid, signal.SIGKILL)
        target = sum(count) + 400
        while sum(count) < target and not failed:
            time.sleep(0.01)
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
        for process in (front, second, first):
            process.end()
    assert not failed


@pytest.mark.parametrize(
    ("method", "body"),
    [(TFSERVING, predict("linear")), (OPENINFERENCE, build("linear", {"x": X})[1]), (SELDON, say("hello"))],
    ids=["tfserving", "openinference", "seldon"],
)
def test_hole_2_every_protocol_is_retried_on_another_node(
    serve: Any, tasks: Any, relays: list[Any], nobody: str, method: str, body: bytes
) -> None:
    names = ('name = "linear"', f'name = "trouble"\ntask_id = {tasks["trouble"]}')
    gateway = serve("\n".join(f'[[routes]]\n{name}\nnodes = ["{nobody}", "{relays[0].address}"]' for name in names))
    for _ in range(10):
        gateway.call(method, body)
    gateway.end()


def test_hole_2_never_on_the_node_that_failed(front: Any, relays: list[Any]) -> None:
    before = [asked(relay) for relay in relays]
    for _ in range(4):
        code, _ = front.refusal(SELDON, say("raise run_model boom"))
        assert code is INTERNAL
    assert [asked(relay) - count for relay, count in zip(relays, before, strict=True)] == [4, 4]


def test_hole_2_nor_on_the_only_node_when_that_has_failed(gateway: Any, node: Any) -> None:
    word = f"boom{time.monotonic_ns()}"
    before = asked(gateway)
    gateway.refusal(SELDON, say(f"raise run_model {word}"))
    assert asked(gateway) - before == 1


@pytest.mark.parametrize("answer", [b"", b"\xff\xff", b"<html>"], ids=["empty", "garbage", "html"])
@pytest.mark.parametrize(("method", "body"), [(TFSERVING, predict("any")), (SELDON, build("any", "text")[1])])
def test_hole_3_what_is_no_answer_is_a_failure(
    serve: Any, wrong_node: Any, method: str, body: bytes, answer: bytes
) -> None:
    wrong_node.answer = lambda _: answer
    gateway = serve(f'[[routes]]\nname = "any"\nnodes = ["{wrong_node.address}"]')
    code, message = gateway.refusal(method, body)
    assert code is INTERNAL
    assert wrong_node.address in message
    assert gateway.attempts().get("success", 0) == 0
    gateway.end()


def test_hole_3_no_answer_is_a_timeout_not_a_hang(serve: Any, wrong_node: Any) -> None:
    ended = threading.Event()

    def never(_: bytes) -> bytes:
        ended.wait(30)
        return b""

    wrong_node.answer = never
    gateway = serve(f'[[routes]]\nname = "any"\nattempts = 1\ntimeout_ms = 300\nnodes = ["{wrong_node.address}"]')
    began = time.monotonic()
    code, message = gateway.refusal(TFSERVING, predict("any"), timeout=20)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "300 ms" in message
    assert time.monotonic() - began < 5
    assert gateway.attempts() == {"failure": 1}
    ended.set()
    gateway.end()


def test_hole_3_no_node_at_all_is_told_at_once(serve: Any, node: Any, nobody: str) -> None:
    gateway = serve(
        f'[[routes]]\nname = "any"\ntimeout_ms = 20000\nnodes = ["{nobody}"]\n'
        f'[[routes]]\nname = "linear"\nnodes = ["{node.address}"]'
    )
    began = time.monotonic()
    code, _ = gateway.refusal(TFSERVING, predict("any"))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began < 5
    gateway.call(TFSERVING, predict("linear"))
    gateway.end()


def test_hole_4_the_clients_faults_and_its_leaving_demote_nobody_and_are_not_retried(
    front: Any, relays: list[Any], tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    before = [asked(relay) for relay in relays]
    faults = 0
    for body in (predict("linear", version=77), build("linear", {"y": X}, protocol="tfserving")[1]):
        for _ in range(10):
            front.refusal(TFSERVING, body)
            faults += 1
    gate = tmp_path / "gate"
    leaving = [front.start_call(SELDON, say(f"await {gate}")) for _ in range(10)]
    begun(wait_for, gate)
    for call in leaving:
        call.cancel()

    def counts() -> tuple[float, int, int]:
        requests = sum(front.counts("dl_inference_requests_total").values())
        return requests, asked(front), sum(asked(relay) - count for relay, count in zip(relays, before, strict=True))

    def one_attempt_each() -> bool:
        requests, attempts, arrived = counts()
        return faults < requests == attempts >= arrived

    try:  # the gate stays closed: a request whose cancellation is on its way would succeed
        wait_for("an attempt for each request", one_attempt_each, 10)
        assert front.attempts().keys() == {"neutral"}, counts()
    finally:
        gate.touch()
    # Nobody was demoted: both go on in equal parts.
    before = [asked(relay) for relay in relays]
    for _ in range(40):
        front.call(TFSERVING, predict("linear"))
    assert min(asked(relay) - count for relay, count in zip(relays, before, strict=True)) >= 15


def test_hole_6_shutting_down_cuts_no_request(
    serve: Any, models: Path, tmp_path: Path, wait_for: Callable[..., Any], tasks: Any, routes: Any
) -> None:
    own = tmp_path / "models"
    own.mkdir()
    (own / "trouble").symlink_to(models / "trouble")
    node = serve(f'[models]\ndirectory = "{own}"\n')
    gateway = serve(routes({"trouble": 12}, node))
    for process in (gateway, node):
        gate = tmp_path / f"gate-{process.popen.pid}"
        call = process.start_call(SELDON, say(f"await {gate}"))
        begun(wait_for, gate)
        process.popen.send_signal(signal.SIGTERM)
        wait_for("new requests to be refused", lambda process=process: _refused(process.address))
        assert process.popen.poll() is None
        gate.touch()
        assert seldon.decode_response(call.result(20)).payload == f"done {gate}"
        assert process.popen.wait(20) == 0
        process.end()


def _refused(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return True
    return False


def test_hole_7_a_pickle_is_not_loaded_and_nothing_of_it_runs(
    serve: Any, make: Any, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    """S3. The failures of handlers have their own tests: `test_a_handler_that_raises`."""
    mark = tmp_path / "mark"
    bomb = f"""
import os
import torch


class Bomb:
    def __reduce__(self):
        return os.mkdir, ({str(mark)!r},)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bomb = Bomb()
"""
    models = tmp_path / "models"
    digest = make.pickled(models / "bomb", bomb)
    make.linear(models / "linear/1", 1)
    node = serve(f'[models]\ndirectory = "{models}"\npoll_interval_ms = 20\n')
    code, message = node.refusal(SELDON, build("bomb", "text")[1])
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "failed" in message
    line = node.written("bomb", "sha256")
    assert digest in line
    node.call(TFSERVING, predict("linear"))
    assert not mark.exists()
    (models / "bomb/model.toml").write_text(f'[options]\nsha256 = ["{digest}"]\n')
    wait_for("the model that is now trusted", mark.exists)
    node.end()


def test_hole_8_health(peer: Any, tasks: dict[str, int]) -> None:
    serving = b"\x08\x01"
    services = ("", *tasks, "anything-7", "tensorflow.serving.PredictionService", "inference.GRPCInferenceService")
    for service in services:
        name = service.encode()
        assert peer.call(HEALTH, b"\x0a" + bytes([len(name)]) + name if name else b"") == serving, service
    assert peer.refusal(HEALTH, b"\x0a\x04none")[0] is NOT_FOUND


def test_hole_8_metrics(peer: Any, wait_for: Callable[..., Any]) -> None:
    def total() -> float:
        samples = peer.counts("dl_inference_requests_total")
        return sum(n for labels, n in samples.items() if 'upstream="linear"' in labels and 'code="OK"' in labels)

    before = total()
    for _ in range(5):
        peer.call(TFSERVING, predict("linear"))
    # A transport may count a request after its client has the answer.
    wait_for("the requests to be counted", lambda: total() >= before + 5)
    assert total() == before + 5


def test_hole_8_no_line_in_the_log_for_a_request(peer: Any, node: Any, gateway: Any) -> None:
    before = node.text(), gateway.text()
    for _ in range(20):
        peer.call(TFSERVING, predict("linear"))
        peer.refusal(TFSERVING, predict("nobody"))
        peer.refusal(TFSERVING, b"\xff")
    assert (node.text(), gateway.text()) == before


def test_an_unknown_method(peer: Any) -> None:
    for method in ("/tensorflow.serving.PredictionService/Unknown", "/a.B/C", "/seldon.protos.Model/SendFeedback"):
        assert peer.refusal(method, b"")[0] is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("depth", [10, 31, 32, 33, 40, 47])
@pytest.mark.parametrize("leaf", [value(string_value="x"), value(number_value=1)], ids=["text", "number"])
def test_lists_that_are_deep(peer: Any, depth: int, leaf: Any) -> None:
    for where in ("jsonData", "ndarray"):
        request = messages.SeldonMessage()
        request.meta.tags["taskId"].number_value = 7
        inner = request.jsonData if where == "jsonData" else request.data.ndarray.values.add()
        for _ in range(depth - 1):
            inner = inner.list_value.values.add()
        inner.CopyFrom(leaf)
        code, message = peer.refusal(SELDON, request.SerializeToString())
        assert code is INVALID, message
