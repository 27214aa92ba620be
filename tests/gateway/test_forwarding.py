"""Requests through a gateway, over real sockets and each installed transport: outcomes, attempts, deadlines."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import pytest
from dl_inference_tfserving.protocols import MULTI_INFERENCE

from dl_inference_core.config import HealthConfig, NodeConfig, RouteConfig
from dl_inference_core.errors import Code, NodeFailed, NodeUnreachable
from dl_inference_core.gateway.balancing import Balancer, Outcome, RoundRobin
from dl_inference_core.gateway.forwarding import HOPS, Forwarder
from dl_inference_core.gateway.pool import Endpoints, Pool, Snapshot
from dl_inference_core.metrics import Metrics
from dl_inference_core.testing.memory import LoopClock
from dl_inference_core.transport import Answer, Connection, Message
from dl_inference_core.wire import messages, orca
from dl_inference_core.wire.protocol import PROTOCOLS
from tests.methods import METHODS

Lab = Any  # tests/conftest.py

CLIENTS_FAULT = (
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.ALREADY_EXISTS,
    Code.FAILED_PRECONDITION,
    Code.OUT_OF_RANGE,
    Code.ABORTED,
    Code.UNIMPLEMENTED,
    Code.PERMISSION_DENIED,
    Code.UNAUTHENTICATED,
)
NODES_FAULT = (Code.UNAVAILABLE, Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS)
DYNAMIC = 'balancer = "dynamic_weighted_round_robin"'
ROUND_ROBIN = 'balancer = "round_robin"'


# Bytes, metadata, trailers


@pytest.mark.parametrize("path", METHODS)
async def test_each_method_forwards_the_very_bytes_to_the_protocols_own_path(lab: Lab, path: str) -> None:
    protocol = METHODS[path]
    unknown = b"\xfa\x7f\x03abc\xf8\x7f\x01"  # fields that no message has
    key = {
        "tfserving": messages.PredictRequest(model_spec={"name": "m"}),
        "tfserving_classify": messages.ClassificationRequest(model_spec={"name": "m"}),
        "tfserving_regress": messages.RegressionRequest(model_spec={"name": "x-69"}),
        "tfserving_multi_inference": messages.MultiInferenceRequest(tasks=[{"model_spec": {"name": "m"}}] * 2),
        "seldon": messages.SeldonMessage(meta={"tags": {"taskId": messages.Value(number_value=69)}}),
        "seldon_transform_input": messages.SeldonMessage(strData="m"),
        "seldon_transform_output": messages.SeldonMessage(strData="m"),
        "openinference": messages.ModelInferRequest(model_name="m"),
    }[protocol.name].SerializeToString()
    for padding in (b"", b"\xea\x7f\x80\x80\x20" + b"x" * (512 * 1024)):
        node = await lab.node(answer=unknown + padding)
        gateway = await lab.front(node)
        body = unknown + key + padding + unknown
        assert await gateway.start_call(body=body, method=path) == node.answer
        (call,) = node.calls
        assert call.method == protocol.node_method
        assert call.message == body


async def test_tasks_of_several_models_are_refused_and_no_node_called(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.gateway(lab.route(node) + lab.route(node, name="n", task=70))
    for names, said in (
        ("mn", "All ModelSpecs in a MultiInferenceRequest must access the same model name."),
        ("", "ModelSpec has no name specified."),
    ):
        body = messages.MultiInferenceRequest(tasks=[{"model_spec": {"name": name}} for name in names])
        code, message = await gateway.refusal(body=body.SerializeToString(), method=MULTI_INFERENCE.node_method)
        assert code is Code.INVALID_ARGUMENT
        assert said in message
    assert node.count == 0


async def test_metadata_go_on_and_nothing_of_the_protocol_with_them(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.front(node)
    given = (
        ("x-request-id", "r-1"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("authorization", "Bearer x"),
        ("x-twice", "1"),
        ("x-twice", "2"),
        ("trace-bin", bytes(range(256))),
        ("x-empty", ""),
    )
    assert await gateway.call(metadata=given) == "a"
    sent_on = [pair for pair in node.calls[0].metadata if pair[0] != HOPS]
    assert sorted(sent_on, key=str) == sorted(given, key=str)


async def test_trailers_come_back_with_answers_and_with_errors(lab: Lab) -> None:
    trailers = [("x-cost", "5"), ("detail-bin", b"\0\xff"), ("grpc-status-details-bin", b"\x08\x03")]
    node = await lab.node(trailers=trailers)
    gateway = await lab.front(node)
    call = gateway.start_call()
    await call
    assert set(trailers) <= {(key, value) for key, value in await call.trailing_metadata()}
    node.status = lab.error(Code.INVALID_ARGUMENT)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.start_call()
    assert set(trailers) <= {(key, value) for key, value in caught.value.trailing_metadata()}


async def test_trailers_are_those_of_the_last_attempt_alone(lab: Lab) -> None:
    bad = await lab.node("bad", trailers=[("x-from", "bad")], status=lab.error(Code.UNAVAILABLE))
    good = await lab.node("good", trailers=[("x-from", "good")])
    gateway = await lab.front(bad, good)
    for _ in range(4):
        call = gateway.start_call()
        await call
        assert [value for key, value in await call.trailing_metadata() if key == "x-from"] == ["good"]
    assert bad.count >= 1


# The table of outcomes


@pytest.mark.parametrize("code", CLIENTS_FAULT)
async def test_what_is_the_clients_fault_goes_through_and_changes_nothing(lab: Lab, code: Code) -> None:
    nodes = await lab.nodes("ab")
    # A probe comes of suspicion alone: on a busy machine the calls take longer than the second after which each node is
    # probed that has answered nothing.
    gateway = await lab.front(*nodes, more=DYNAMIC, top="[gateway.health]\ninterval_ms = 600_000\n")
    assert {await gateway.call() for _ in range(4)} == {"a", "b"}
    weights = [gateway.weight(node) for node in nodes]
    for node in nodes:
        node.status = lab.error(code, "grüße; 100%")
        node.calls.clear()
    checks = [node.checks for node in nodes]
    for _ in range(20):
        assert await gateway.refusal() == (code, "grüße; 100%")
    assert [node.count for node in nodes] == [10, 10]  # each request once, in turn
    assert [gateway.weight(node) for node in nodes] == weights
    assert [gateway.usable(node) for node in nodes] == [True, True]
    assert [node.checks for node in nodes] == checks


@pytest.mark.parametrize("code", [*NODES_FAULT, Code.RESOURCE_EXHAUSTED, Code.CANCELLED])
async def test_what_is_the_nodes_fault_is_tried_on_another(lab: Lab, code: Code) -> None:
    bad = await lab.node("bad", status=lab.error(code))
    good = await lab.node("good")
    gateway = await lab.front(bad, good, more='balancer = "round_robin"')
    assert [await gateway.call() for _ in range(6)] == ["good"] * 6
    assert bad.count >= 1
    assert good.count == 6
    await lab.until(lambda: gateway.usable(bad))  # at once, or as soon as a probe has passed


@pytest.mark.parametrize("code", [*NODES_FAULT, Code.RESOURCE_EXHAUSTED])
async def test_what_all_nodes_fail_with_is_what_the_client_gets_with_the_node_named(lab: Lab, code: Code) -> None:
    nodes = await lab.nodes("abc", status=lab.error(code, "no luck"))
    gateway = await lab.front(*nodes)
    given, message = await gateway.refusal()
    assert given is code
    assert message.startswith("route m: node 127.0.0.1:")
    assert message.endswith(": no luck")
    assert sum(node.count for node in nodes) == 2
    assert max(node.count for node in nodes) == 1


@pytest.mark.parametrize("code", [*NODES_FAULT, Code.RESOURCE_EXHAUSTED, Code.CANCELLED])
async def test_a_failure_lowers_the_weight_and_success_brings_it_back(lab: Lab, code: Code) -> None:
    bad, good = await lab.nodes("ab")
    gateway = await lab.front(bad, good, more=DYNAMIC)
    assert {await gateway.call() for _ in range(4)} == {"a", "b"}
    assert gateway.weight(bad) == 100
    bad.status = lab.error(code)
    bad.calls.clear()
    await lab_rounds(gateway, lambda: bad.count == 1)
    assert gateway.weight(bad) == 50
    assert gateway.weight(good) == 100
    bad.status = None
    await lab.until(lambda: gateway.usable(bad))
    await lab_rounds(gateway, lambda: gateway.weight(bad) == 100)


async def lab_rounds(gateway: Any, until: Any, most: int = 400) -> None:
    for _ in range(most):
        if until():
            return
        await gateway.call()
    pytest.fail(f"{most} requests were not enough")


@pytest.mark.parametrize("answer", [b"", b"\xff\xff\xff", b"\x0a\x05abc", b"<html></html>", b"\x0a"])
async def test_no_answer_and_garbage_are_failures_of_the_node(lab: Lab, answer: bytes) -> None:
    bad = await lab.node("bad", answer=answer)
    gateway = await lab.front(bad, more=f"attempts = 1\n{DYNAMIC}")
    code, message = await gateway.refusal()
    assert code is Code.INTERNAL
    assert bad.address in message
    assert "the answer is not a protobuf message" in message
    assert gateway.weight(bad) == 50
    good = await lab.node("good")
    gateway = await lab.front(bad, good)
    assert [await gateway.call() for _ in range(4)] == ["good"] * 4


async def test_an_answer_over_the_size_limit_blames_nobody(lab: Lab) -> None:
    nodes = await lab.nodes("ab", answer=b"\x0a\x80\x80\x04" + b"x" * 65536)
    gateway = await lab.front(*nodes, more=DYNAMIC, top="message_bytes = 60000\n")
    code, _ = await gateway.refusal()
    assert code is Code.RESOURCE_EXHAUSTED
    assert sum(node.count for node in nodes) == 1
    assert {gateway.weight(node) for node in nodes if node.count} == {100}


async def test_a_request_over_the_size_limit_calls_no_node(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.front(node, top="message_bytes = 60000\n")
    code, _ = await gateway.refusal(body=messages.ModelInferRequest(model_name="m" * 70000).SerializeToString())
    assert code is Code.RESOURCE_EXHAUSTED
    assert node.count == 0


# Attempts


async def test_one_attempt_opts_out(lab: Lab) -> None:
    nodes = await lab.nodes("ab", status=lab.error(Code.UNAVAILABLE))
    gateway = await lab.front(*nodes, more="attempts = 1")
    await gateway.refusal()
    assert sum(node.count for node in nodes) == 1


@pytest.mark.parametrize("code", NODES_FAULT)
async def test_retry_failed_false_stops_at_failures_but_not_at_unreachable_nodes(lab: Lab, code: Code) -> None:
    nodes = await lab.nodes("ab", status=lab.error(code))
    gateway = await lab.front(*nodes, more="retry_failed = false")
    assert (await gateway.refusal())[0] is code
    assert sum(node.count for node in nodes) == (2 if code is Code.UNAVAILABLE else 1)


async def test_no_node_is_tried_twice_while_another_is_there(lab: Lab) -> None:
    nodes = await lab.nodes("abc", status=lab.error(Code.INTERNAL))
    gateway = await lab.front(*nodes, more="attempts = 3")
    for turn in range(1, 6):
        await gateway.refusal()
        assert [node.count for node in nodes] == [turn] * 3


async def test_no_node_is_tried_twice_even_if_attempts_are_left(lab: Lab) -> None:
    nodes = await lab.nodes("ab", status=lab.error(Code.INTERNAL))
    gateway = await lab.front(*nodes, more="attempts = 5")
    await gateway.refusal()
    assert [node.count for node in nodes] == [1, 1]


async def test_a_node_left_out_is_tried_before_one_that_failed_just_now(lab: Lab) -> None:
    out, failing = await lab.nodes("ab")
    out.health = lab.error(Code.UNAVAILABLE)
    gateway = await lab.front(out, failing)
    assert not gateway.usable(out)
    failing.status = lab.error(Code.INTERNAL)
    assert await gateway.call() == "a"


# Deadlines


async def test_the_deadline_of_an_attempt_is_the_routes_timeout(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.front(node, more="timeout_ms = 700")
    start = time.monotonic()
    await gateway.call(timeout=20)
    (call,) = node.calls
    assert call.deadline is not None
    assert start < call.deadline <= start + 0.8


async def test_the_clients_own_deadline_is_passed_on_if_it_is_nearer(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.front(node, more="timeout_ms = 5000")
    start = time.monotonic()
    await gateway.call(timeout=0.6)
    assert node.calls[0].deadline is not None
    assert node.calls[0].deadline <= start + 0.7  # the wire's own rounding, and the way


async def test_an_attempt_that_times_out_is_followed_by_one_elsewhere(lab: Lab) -> None:
    slow = await lab.node("slow", hangs=True)
    fast = await lab.node("fast")
    gateway = await lab.front(slow, fast, more=f"timeout_ms = 150\n{DYNAMIC}")
    while not slow.count:
        start = time.monotonic()
        assert await gateway.call() == "fast"
    assert 0.14 < time.monotonic() - start < 2
    assert gateway.weight(slow) == 50
    await lab.until(lambda: slow.cancelled)


async def test_the_whole_call_takes_no_more_than_timeout_times_attempts(lab: Lab) -> None:
    nodes = await lab.nodes("abc", hangs=True)
    gateway = await lab.front(*nodes, more="timeout_ms = 100\nattempts = 2")
    start = time.monotonic()
    code, message = await gateway.refusal()
    assert code is Code.DEADLINE_EXCEEDED
    assert message.startswith("route m: node 127.0.0.1:")
    assert message.endswith("did not answer within 100 ms")
    assert 0.19 < time.monotonic() - start < 2
    assert sum(node.count for node in nodes) == 2


async def test_the_clients_deadline_blames_no_node_and_starts_nothing_after_it(lab: Lab) -> None:
    nodes = await lab.nodes("ab", hangs=True)
    gateway = await lab.front(*nodes, more=f"timeout_ms = 5000\n{DYNAMIC}")
    for _ in range(7):
        start = time.monotonic()
        assert (await gateway.refusal(timeout=0.05))[0] is Code.DEADLINE_EXCEEDED
        assert time.monotonic() - start < 2
    await lab.until(lambda: sum(len(node.cancelled) for node in nodes) == 7)
    assert sum(node.count for node in nodes) == 7
    assert [gateway.weight(node) for node in nodes] == [100, 100]
    assert all(gateway.usable(node) for node in nodes)
    await lab.until(lambda: [gateway.node(node).in_flight for node in nodes] == [0, 0])


@pytest.mark.parametrize("within_s", [4, 30])
async def test_a_deadline_of_the_nodes_own_is_its_failure_and_tried_on_another(lab: Lab, within_s: float) -> None:
    nodes = await lab.nodes("ab", status=lab.error(Code.DEADLINE_EXCEEDED, "my own backend is slow"))
    gateway = await lab.front(*nodes, more=f"timeout_ms = 5000\n{DYNAMIC}")
    code, message = await gateway.refusal(timeout=within_s)
    assert code is Code.DEADLINE_EXCEEDED
    assert message.startswith("route m: node 127.0.0.1:")
    assert message.endswith(": my own backend is slow")
    assert [node.count for node in nodes] == [1, 1]
    assert [gateway.weight(node) for node in nodes] == [50, 50]
    nodes[0].status = None
    assert [await gateway.call(timeout=within_s) for _ in range(4)] == ["a"] * 4


async def test_without_a_retry_to_spend_no_request_is_sent_to_a_node_on_trial(lab: Lab) -> None:
    bad, good = await lab.node("bad"), await lab.node("good")
    top = "[gateway.health]\nfailures = 1\n"
    gateway = await lab.front(bad, good, more=f"retry_budget = 0\nretry_reserve = 0\n{ROUND_ROBIN}", top=top)
    forwarder, node = gateway.forwarder(), gateway.node(bad)
    node.endpoint.health.failed(NodeFailed("bad"))
    await node.endpoint.probes.settled()
    assert node.endpoint.health.on_trial
    node.endpoint.health.trial_at = 0
    forwarder.pool.usable()
    assert forwarder.pool.due() == (node,)
    forwarder.pool._until_trial = 0
    forwarder.balancer.choose = lambda nodes, call: gateway.node(good)
    assert [await gateway.call() for _ in range(20)] == ["good"] * 20
    forwarder.retries.tokens = 1
    assert await gateway.call() == "bad"


# The client leaves


async def test_a_client_that_leaves_ends_the_nodes_work_and_changes_nothing(lab: Lab) -> None:
    nodes = await lab.nodes("ab", hangs=True)
    gateway = await lab.front(*nodes, more=f"timeout_ms = 5000\n{DYNAMIC}")
    delays = []
    for _ in range(12):
        calls = sum(node.count for node in nodes)
        call = gateway.start_call()
        sending = asyncio.ensure_future(call.wait_for_connection())
        await lab.until(lambda calls=calls: sum(node.count for node in nodes) > calls)
        assert sum(gateway.node(node).in_flight for node in nodes) == 1
        cancelled = sum(len(node.cancelled) for node in nodes)
        left = time.monotonic()
        call.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await lab.until(lambda cancelled=cancelled: sum(len(node.cancelled) for node in nodes) > cancelled)
        delays.append(max(max(node.cancelled, default=0) for node in nodes) - left)
        await lab.until(lambda: sum(gateway.node(node).in_flight for node in nodes) == 0)
    assert sorted(delays)[-2] < 0.05  # one may meet a busy machine
    assert [node.count for node in nodes] == [6, 6]
    assert [gateway.weight(node) for node in nodes] == [100, 100]
    assert all(gateway.usable(node) for node in nodes)


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    gateway = await lab.front(node, more=f"timeout_ms = 60000\n{DYNAMIC}")
    await gateway.channel.channel_ready()
    for turn in range(300):
        call = gateway.start_call()
        await asyncio.sleep(turn % 20 * 0.0002)
        call.cancel()
    await lab.until(lambda: gateway.node(node).in_flight == 0)
    assert node.count <= 300
    assert gateway.weight(node) == 100
    assert gateway.usable(node)


# Nobody there


async def test_all_nodes_dead_is_unavailable_at_once(lab: Lab) -> None:
    nodes = await lab.nodes("abc")
    gateway = await lab.front(*nodes, more="timeout_ms = 5000")
    await gateway.call()
    for node in nodes:
        await node.stop()
    seconds = []
    for _ in range(100):
        start = time.monotonic()
        code, message = await gateway.refusal()
        seconds.append(time.monotonic() - start)
        assert code is Code.UNAVAILABLE
        assert message.startswith("route m: node 127.0.0.1:")
    assert sorted(seconds)[98] < 0.05
    await nodes[1].start()
    assert await lab.until(lambda: gateway.usable(nodes[1])) < 1.5
    assert await gateway.call() == "b"


@pytest.mark.parametrize(
    "body",
    [
        b"\x0a\x02-1",
        b"\x0a\x01\x30",
        b"\x0a\x0a2147483648",
        b"\x0a\x1499999999999999999999",
        b"\x0a\x0369-",
        b"\x0a\x03x-7",
        b"\x0a\x0370 ",
        b"\x0a\x03-69",
    ],
)
async def test_a_route_that_is_not_there_is_not_found(lab: Lab, body: bytes) -> None:
    node = await lab.node()
    gateway = await lab.front(node)
    code, message = await gateway.refusal(body=body)
    assert code is Code.NOT_FOUND
    assert "no model or task is named" in message
    assert node.count == 0


async def test_a_name_of_a_megabyte_is_answered_soon_and_in_short(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.front(node)
    await gateway.call()
    for name in ("x" * 1_000_000, "9" * 1_000_000, "a-" + "9" * 1_000_000):
        start = time.monotonic()
        code, message = await gateway.refusal(name)
        assert code is Code.NOT_FOUND
        assert len(message) < 300
        assert time.monotonic() - start < 2
    assert node.count == 1


@pytest.mark.parametrize("task", [-1, 2**31, 100.9, float("nan"), float("inf"), 1e300, True, None, "", "seven", "-69"])
async def test_a_task_that_is_none_is_refused_and_no_node_called(lab: Lab, task: Any) -> None:
    node = await lab.node()
    gateway = await lab.front(node)
    kind = {bool: "bool_value", str: "string_value", int: "number_value", float: "number_value"}.get(type(task))
    value = messages.Value(**{kind: task} if kind else {"null_value": 0})
    body = messages.SeldonMessage(meta={"tags": {"taskId": value}}).SerializeToString()
    code, _ = await gateway.refusal(body=body, method=PROTOCOLS["seldon"].node_method)
    whole = isinstance(task, int) and not isinstance(task, bool)
    assert code is (Code.NOT_FOUND if whole or (isinstance(task, str) and task) else Code.INVALID_ARGUMENT)
    assert node.count == 0


@pytest.mark.parametrize(("name", "there"), [("m", True), ("69", True), ("any-69", True), ("a-b-0069", True)])
async def test_a_route_is_found_by_its_name_and_by_its_task(lab: Lab, name: str, there: bool) -> None:
    gateway = await lab.front(await lab.node())
    assert (await gateway.call(name) == "a") is there


@pytest.mark.parametrize("body", [b"", b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe"])
@pytest.mark.parametrize("path", sorted({protocol.node_method for protocol in METHODS.values()}))
async def test_malformed_bytes_are_the_clients_fault(lab: Lab, path: str, body: bytes) -> None:
    node = await lab.node()
    gateway = await lab.gateway(lab.route(node) + lab.route(node, name="n", task=70))
    code, _ = await gateway.refusal(body=body, method=path)
    assert code is Code.INVALID_ARGUMENT
    assert node.count == 0


# An empty message has no fields; the other has a malformed `status`, which a gateway does not read.
@pytest.mark.parametrize("body", [b"", b"\x0a\x02\xff\xfe"])
async def test_a_seldon_message_without_a_key_goes_to_the_only_route_whatever_else_is_in_it(
    lab: Lab, body: bytes
) -> None:
    node = await lab.node()
    gateway = await lab.front(node)
    await gateway.start_call(body=body, method=PROTOCOLS["seldon"].node_method)
    (call,) = node.calls
    assert call.message == body
    assert ("seldon", "m") in call.metadata


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"\0" * 10_000,
    ],
    ids=["HTTP/1.1", "TLS", "garbage after the preface", "no request", "zeros"],
)
async def test_a_peer_that_speaks_no_grpc_hurts_nobody(lab: Lab, sent: bytes) -> None:
    node = await lab.node()
    gateway = await lab.front(node)
    host, _, port = gateway.address.rpartition(":")
    peers = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
    for _, writer in peers:
        writer.write(sent)
    assert [await gateway.call() for _ in range(10)] == ["a"] * 10
    for _, writer in peers:
        writer.close()
    assert [await gateway.call() for _ in range(10)] == ["a"] * 10
    assert node.count == 20


# A node dies


class Load:
    """Requests from several clients at once, without a pause, until told to stop."""

    def __init__(self, gateway: Any, clients: int = 8) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._gateway = gateway
        self._stopping = False
        self._tasks = [asyncio.ensure_future(self._send()) for _ in range(clients)]

    async def _send(self) -> None:
        while not self._stopping:
            try:
                self.answers[await self._gateway.call(timeout=5)] += 1
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{error.code()}: {error.details()}")

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)


async def test_a_node_that_is_stopped_under_load_costs_no_request(lab: Lab) -> None:
    nodes = await lab.nodes("abcd", latency_s=0.005)
    gateway = await lab.front(*nodes)
    load = Load(gateway)
    await lab.until(lambda: load.answers["a"] > 20)
    await nodes[0].stop()
    await lab.until(lambda: not gateway.usable(nodes[0]))
    counts = nodes[0].count
    served = load.answers.total()
    await lab.until(lambda: load.answers.total() > served + 200)
    assert nodes[0].count == counts
    await nodes[0].start()
    back = time.monotonic()
    await lab.until(lambda: nodes[0].count > counts + 20)
    assert time.monotonic() - back < 1.5
    await load.stop()
    assert load.failures == []
    await lab.until(lambda: [gateway.node(node).in_flight for node in nodes] == [0] * 4)


NODE = """
import asyncio, sys
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.testing.loopback import CoroutineService
from dl_inference_core.transport import Limits

async def answer(exchange):
    await asyncio.sleep(0.005)
    return bytes.fromhex(sys.argv[2])

async def check(exchange):
    return b"\\x08\\x01"

async def main():
    transport = Plugins().make(Kind.TRANSPORTS, sys.argv[1], {}, "test")
    service = CoroutineService({sys.argv[3]: answer, "/grpc.health.v1.Health/Check": check})
    server = await transport.serve(service, (sys.argv[4],), Limits())
    print(server.ports[0], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def start_node(name: str, address: str = "127.0.0.1:0") -> tuple[Any, str]:
    """A node in a process of its own, on the one transport that any process can serve with."""
    body = messages.ModelInferResponse(model_name="m", id=name).SerializeToString()
    command = [sys.executable, "-c", NODE, "grpcio", body.hex(), PROTOCOLS["openinference"].node_method, address]
    process: Any = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, f"127.0.0.1:{process.stdout.readline().strip()}"


async def test_a_node_that_is_killed_under_load_costs_no_request(lab: Lab) -> None:
    victim, address = await asyncio.to_thread(start_node, "victim")
    try:
        nodes = await lab.nodes("abc", latency_s=0.005)
        gateway = await lab.front(address, *nodes)
        load = Load(gateway, clients=16)
        await lab.until(lambda: load.answers["victim"] > 50)
        victim.kill()
        served = load.answers.total()
        await lab.until(lambda: load.answers.total() > served + 500)
        victim.wait(10)
        victim.stdout.close()
        victim, _ = await asyncio.to_thread(start_node, "victim", address)
        before = load.answers["victim"]
        assert await lab.until(lambda: load.answers["victim"] > before + 10) < 1.5
        await load.stop()
        assert load.failures == []
    finally:
        victim.kill()
        victim.wait(10)
        victim.stdout.close()


async def test_a_node_that_is_stopped_by_a_signal_costs_no_request(lab: Lab) -> None:
    """Its connection stands, its kernel takes what is sent, and nothing answers."""
    process, address = await asyncio.to_thread(start_node, "victim")
    try:
        gateway = await lab.front(address, *await lab.nodes("abc", latency_s=0.005), more="timeout_ms = 300")
        (health,) = (node.endpoint.health for node in gateway.forwarder().pool.nodes if node.address == address)
        load = Load(gateway, clients=16)
        await lab.until(lambda: load.answers["victim"] > 50)
        process.send_signal(signal.SIGSTOP)
        assert await lab.until(lambda: not health.usable) < 2
        before = load.answers["victim"]
        served = load.answers.total()
        await lab.until(lambda: load.answers.total() > served + 500)
        assert load.answers["victim"] <= before + 1
        process.send_signal(signal.SIGCONT)
        assert await lab.until(lambda: load.answers["victim"] > before + 10) < 1.5
        await load.stop()
        assert load.failures == []
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


# Strategies that misbehave


class Stubborn(Balancer):
    """Chooses and records as a test says."""

    name = "stubborn"
    chosen: Any = None
    raises: Exception | None = None
    recorded: list[Outcome]

    def choose(self, nodes: Any, call: Any) -> Any:
        if self.raises is not None:
            raise self.raises
        return self.chosen

    def record(self, node: Any, outcome: Outcome, seconds: float) -> None:
        raise ValueError("record")

    def forget(self, node: Any) -> None:
        raise ValueError("forget")


def balancer_failures(gateway: Any, balancer: str) -> float:
    labels = {"balancer": balancer, "route": "m"}
    value = gateway.app.metrics._registry.get_sample_value("dl_inference_balancer_failures_total", labels)
    return float(value or 0)


async def test_a_node_that_a_strategy_was_not_given_is_not_asked(lab: Lab) -> None:
    """It was tried already, or is left out."""
    nodes = await lab.nodes("abc", status=lab.error(Code.INTERNAL))
    nodes[2].health = lab.error(Code.UNAVAILABLE)
    nodes[2].status = None
    gateway = await lab.front(*nodes)
    assert not gateway.usable(nodes[2])
    balancer = Stubborn(Stubborn.Options())
    gateway.forwarder().configure(gateway.forwarder().config, balancer)
    balancer.chosen = gateway.node(nodes[0])
    assert (await gateway.refusal())[0] is Code.INTERNAL
    assert [node.count for node in nodes] == [1, 1, 0]
    balancer.chosen = gateway.node(nodes[2])
    assert (await gateway.refusal())[0] is Code.INTERNAL
    assert [node.count for node in nodes] == [2, 2, 0]


class Sleepy(Balancer):
    """Holds up the event loop with each choice."""

    name = "sleepy"
    asked = 0

    def choose(self, nodes: Any, call: Any) -> Any:
        self.asked += 1
        time.sleep(0.06)
        return nodes[0]


async def test_a_strategy_that_blocks_again_and_again_is_not_asked_any_more(lab: Lab, caplog: Any) -> None:
    nodes = await lab.nodes("ab")
    gateway = await lab.front(*nodes)
    balancer = Sleepy(Sleepy.Options())
    gateway.forwarder().configure(gateway.forwarder().config, balancer)
    caplog.clear()
    assert [await gateway.call() for _ in range(5)] == ["a"] * 5
    assert Counter([await gateway.call() for _ in range(10)]) == {"a": 5, "b": 5}
    assert balancer.asked == 5
    assert balancer_failures(gateway, "sleepy") == 5
    (logged,) = (record.getMessage() for record in caplog.records if "balancer" in record.getMessage())
    assert logged == (
        'balancer "sleepy" took over 0.05 s to choose, 5 times within a minute, on route m; round robin chooses from '
        "now on, until the config names another"
    )


class Reported(RoundRobin):
    """Keeps what it is told."""

    name = "reported"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.told: list[Any] = []

    def report(self, node: Any, load: Any) -> None:
        self.told.append((node.address, load))

    def record(self, node: Any, outcome: Outcome, seconds: float) -> None:
        self.told.append((node.address, outcome))


async def test_a_nodes_load_reaches_the_strategy_before_the_outcome_and_no_client(lab: Lab) -> None:
    load = orca.Load(utilization=0.5, qps=20.0, eps=1.0)
    node = await lab.node(trailers=[*orca.trailers(orca.encode(load)), ("x-cost", "5")])
    gateway = await lab.front(node)
    balancer = Reported(Reported.Options())
    gateway.forwarder().configure(gateway.forwarder().config, balancer)
    call = gateway.start_call()
    await call
    await lab.until(lambda: len(balancer.told) >= 2)
    assert balancer.told == [(node.address, load), (node.address, Outcome.SUCCESS)]
    trailers = {(key, value) for key, value in await call.trailing_metadata()}
    assert ("x-cost", "5") in trailers
    assert not any("load-metrics" in key for key, _ in trailers)


@pytest.mark.parametrize("case", ["raises", "none", "a stranger", "a node that left"])
async def test_round_robin_takes_over_from_a_strategy_that_fails(lab: Lab, case: str, caplog: Any) -> None:
    nodes = await lab.nodes("abc")
    gateway = await lab.front(*nodes, top="[gateway]\npoll_interval_ms = 10\n")
    forwarder = gateway.forwarder()
    balancer = Stubborn(Stubborn.Options())
    gone = gateway.node(nodes[2])
    gateway.file.write_text(lab.route(*nodes[:2]))
    await lab.until(lambda: len(forwarder.pool.nodes) == 2)
    forwarder.configure(forwarder.config, balancer)
    balancer.raises = ZeroDivisionError("x") if case == "raises" else None
    balancer.chosen = {"none": None, "a stranger": object(), "a node that left": gone}.get(case)
    caplog.clear()
    assert Counter([await gateway.call() for _ in range(10)]) == {"a": 5, "b": 5}
    assert balancer_failures(gateway, "stubborn") >= 10  # choosing, and recording
    logged = [record for record in caplog.records if "balancer" in record.getMessage()]
    assert len(logged) == 1
    assert logged[0].exc_info is not None
    assert 'balancer "stubborn" failed on route m' in logged[0].getMessage()


async def test_a_strategy_whose_record_and_forget_raise_hurts_nobody(lab: Lab, caplog: Any) -> None:
    nodes = await lab.nodes("ab")
    gateway = await lab.front(*nodes, top="[gateway]\npoll_interval_ms = 10\n")
    forwarder = gateway.forwarder()
    balancer = Stubborn(Stubborn.Options())
    forwarder.configure(forwarder.config, balancer)
    balancer.chosen = gateway.node(nodes[0])
    caplog.clear()
    assert await gateway.call() == "a"
    gateway.file.write_text(lab.route(nodes[0]))
    await lab.until(lambda: len(forwarder.pool.nodes) == 1)
    assert await gateway.call() == "a"
    assert len([record for record in caplog.records if "balancer" in record.getMessage()]) == 1


# Between routes


async def test_two_routes_share_an_endpoint_and_what_is_known_of_it(lab: Lab) -> None:
    node, other = await lab.nodes("ab")
    gateway = await lab.gateway(lab.route(node, other) + lab.route(node, name="n", task=70))
    assert gateway.node(node).endpoint is gateway.node(node, "n").endpoint
    assert gateway.node(node) is not gateway.node(node, "n")
    await node.stop()
    assert (await gateway.refusal("n"))[0] is Code.UNAVAILABLE
    assert not gateway.usable(node, "m")
    assert [await gateway.call() for _ in range(6)] == ["b"] * 6


async def test_metrics_count_each_attempt_by_its_outcome(lab: Lab) -> None:
    bad = await lab.node("bad", status=lab.error(Code.INTERNAL))
    good = await lab.node("good")
    gateway = await lab.front(bad, good, more='balancer = "round_robin"')
    for _ in range(4):
        await gateway.call()
    good.status = lab.error(Code.NOT_FOUND)
    bad.status = lab.error(Code.NOT_FOUND)
    await gateway.refusal()
    registry = gateway.app.metrics._registry
    counted = {
        outcome: sum(
            registry.get_sample_value(
                "dl_inference_attempts_total", {"route": "m", "node": node.address, "outcome": outcome}
            )
            or 0
            for node in (bad, good)
        )
        for outcome in ("success", "failure", "neutral")
    }
    assert counted == {"success": 4, "failure": bad.count + good.count - 5, "neutral": 1}


# Threads


async def test_connections_are_made_before_the_lock_is_taken() -> None:
    """Requests wait for the lock."""
    forwarders: list[Forwarder] = []
    free: list[bool] = []

    def acquire() -> bool:
        lock = forwarders[0].lock
        return lock.acquire(timeout=5) and (lock.release() or True)

    class Connected(Connection):
        def __init__(self) -> None:
            if forwarders:
                with ThreadPoolExecutor(1) as other:
                    free.append(other.submit(acquire).result())

        async def call(self, method: str, message: Message, **_: Any) -> Answer:
            return Answer(b"\x08\x01", ())

        async def close(self) -> None: ...

    clock, metrics = LoopClock(asyncio.get_running_loop()), Metrics()
    endpoints = Endpoints(lambda _: Connected(), HealthConfig(interval_ms=0), metrics, clock)
    nodes = tuple(NodeConfig(address=f"10.0.0.{number}:8500") for number in range(3))
    balancer = RoundRobin(RoundRobin.Options())
    route = RouteConfig(name="m", nodes=nodes[:1])
    forwarders.append(Forwarder(route, Pool(endpoints), balancer, metrics, clock, "gateway"))
    kept = forwarders[0].pool.nodes[0]
    assert forwarders[0].configure(route.model_copy(update={"nodes": nodes}), balancer) == []
    assert free == [True, True]
    assert forwarders[0].pool.nodes[0] is kept
    assert [node.address for node in forwarders[0].pool.usable()] == [node.address for node in nodes]
    await endpoints.probed()
    await forwarders[0].close()


async def test_health_may_change_on_any_thread_even_under_the_lock_of_a_route(lab: Lab) -> None:
    nodes = await lab.nodes("ab")
    top = "[gateway.health]\nfailures = 1\ninterval_ms = 20\n"
    gateway = await lab.gateway(top + lab.route(*nodes) + lab.route(*nodes, name="n", task=70))
    forwarders = [gateway.forwarder(name) for name in "mn"]

    def change(number: int) -> None:
        own = forwarders[number % 2]
        for _ in range(200):
            health = gateway.node(nodes[number // 2]).endpoint.health
            health.failed(NodeUnreachable("as another thread found"))
            health.succeeded()
            with own.lock:
                assert set(own.pool.usable()) <= set(own.pool.nodes)
                own.pool.due()
                health.failed(NodeFailed("bad"))
                health.succeeded()  # which tells the strategies of both routes, where the node was half-open

    async with asyncio.timeout(120):
        calls = [gateway.call(name) for name in "mn" * 50]
        threads = [asyncio.to_thread(change, number) for number in range(4)]
        answers = await asyncio.gather(*threads, *calls)
    assert set(answers[4:]) <= {"a", "b"}

    def well() -> bool:
        for node in forwarders[0].pool.nodes:
            node.endpoint.health.succeeded()
        return all(forwarder.pool.snapshot() == Snapshot(forwarder.pool.nodes) for forwarder in forwarders)

    await lab.until(well)
    assert {await gateway.call(name) for name in "mn" * 10} == {"a", "b"}


async def test_threads_that_hold_the_locks_of_two_routes_do_not_wait_for_each_other(lab: Lab) -> None:
    """Each tells of a half-open node that is well, which the strategies of both routes must hear."""
    nodes = await lab.nodes("ab")
    top = "[gateway.health]\nfailures = 1\ninterval_ms = 0\n"
    gateway = await lab.gateway(top + lab.route(*nodes) + lab.route(*nodes, name="n", task=70))
    forwarders = [gateway.forwarder(name) for name in "mn"]
    told: list[tuple[str, Any]] = []
    for forwarder in forwarders:
        forwarder.balancer.returned = lambda node, name=forwarder.name: told.append((name, node))
    endpoints = [gateway.node(node).endpoint for node in nodes]
    for endpoint in endpoints:
        endpoint.health.failed(NodeFailed("bad"))
        await endpoint.probes.settled()
        assert endpoint.health.on_trial
    barrier = threading.Barrier(2)

    def answered(number: int) -> None:
        with forwarders[number].lock:
            barrier.wait(60)
            endpoints[number].health.succeeded()

    threads = [threading.Thread(target=answered, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    await lab.until(lambda: not any(thread.is_alive() for thread in threads), 20)
    await lab.until(lambda: len(told) == 4, 20)
    assert set(told) == {(forwarder.name, node) for forwarder in forwarders for node in forwarder.pool.nodes}
