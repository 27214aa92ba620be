"""Who waits, who is refused, and who comes next, when every node of a route has all it may have."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import grpc.aio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dl_inference_core.errors import Code, Overloaded
from dl_inference_core.gateway.admission import Admission
from dl_inference_core.gateway.retries import Recent
from dl_inference_core.metrics import Metrics
from dl_inference_core.wire import messages

Lab = Any  # tests/conftest.py

ROUND_ROBIN = 'balancer = "round_robin"'


def rejections(gateway: Any, reason: str, route: str = "m") -> float:
    labels = {"route": route, "reason": reason}
    return float(gateway.app.metrics._registry.get_sample_value("dl_inference_rejections_total", labels) or 0)


def sampled(gateway: Any, name: str) -> float:
    return float(gateway.app.metrics._registry.get_sample_value(f"dl_inference_{name}", {"route": "m"}))


async def queued(lab: Lab, gateway: Any, count: int, **how: Any) -> list[asyncio.Future[bytes]]:
    """So many calls that wait, begun one after another; each has its number for an id."""
    calls = []
    for number in range(count):
        body = messages.ModelInferRequest(model_name="m", id=str(number)).SerializeToString()
        calls.append(asyncio.ensure_future(wait_for(gateway.start_call(body=body, **how))))
        await lab.until(lambda number=number: gateway.forwarder().queued == number + 1)
    return calls


async def wait_for(call: Any) -> bytes:
    return bytes(await call)


async def occupied(lab: Lab, gateway: Any, *nodes: Any, each: int = 1) -> list[asyncio.Future[bytes]]:
    """Calls that hang, as many as `nodes` take."""
    calls = [asyncio.ensure_future(wait_for(gateway.start_call())) for _ in range(each * len(nodes))]
    await lab.until(lambda: [node.count for node in nodes] == [each] * len(nodes))
    return calls


# With real nodes


async def test_a_node_has_no_more_than_its_limit_and_the_rest_waits(lab: Lab) -> None:
    nodes = await lab.nodes("ab", hangs=True)
    gateway = await lab.front(*nodes, more="node_in_flight = 2\ntimeout_ms = 9000")
    calls = [asyncio.ensure_future(wait_for(gateway.start_call())) for _ in range(10)]
    await lab.until(lambda: gateway.forwarder().queued == 6)
    await lab.until(lambda: [node.count for node in nodes] == [2, 2])
    assert (sampled(gateway, "queued"), sampled(gateway, "attempts_in_flight")) == (6, 4)
    for node in nodes:
        node.release.set()
    assert len(await asyncio.gather(*calls)) == 10
    assert sum(node.count for node in nodes) == 10
    await lab.until(lambda: (sampled(gateway, "queued"), sampled(gateway, "attempts_in_flight")) == (0, 0))


async def test_a_full_node_is_passed_over(lab: Lab) -> None:
    full, free = await lab.node("full", hangs=True), await lab.node("free")
    gateway = await lab.front(full, free, more=f"node_in_flight = 1\ntimeout_ms = 9000\n{ROUND_ROBIN}")
    calls: list[Any] = []
    while not full.count:
        calls.append(asyncio.ensure_future(wait_for(gateway.start_call())))
        await lab.until(lambda: full.count or calls[-1].done())
    free.calls.clear()
    assert [await gateway.call() for _ in range(10)] == ["free"] * 10
    assert (full.count, free.count) == (1, 10)
    full.release.set()
    await asyncio.gather(*calls)


async def test_first_come_first_served(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    gateway = await lab.front(node, more="node_in_flight = 1\ntimeout_ms = 9000")
    first = await occupied(lab, gateway, node)
    waiting = await queued(lab, gateway, 8)
    node.release.set()
    await asyncio.gather(*first, *waiting)
    ids = [messages.ModelInferRequest.FromString(bytes(call.message)).id for call in node.calls]
    assert ids == ["", *map(str, range(8))]


async def test_with_a_full_queue_the_next_is_refused_at_once(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    gateway = await lab.front(node, more="node_in_flight = 1\nqueue = 3\ntimeout_ms = 9000")
    first = await occupied(lab, gateway, node)
    waiting = await queued(lab, gateway, 3)
    seconds = []
    for _ in range(20):
        start = time.monotonic()
        code, message = await gateway.refusal()
        seconds.append(time.monotonic() - start)
        assert code is Code.RESOURCE_EXHAUSTED
        assert message == "route m: every node has its 1 requests, and 3 requests wait already"
    assert sorted(seconds)[10] < 0.5
    assert rejections(gateway, "queue_full") == 20
    node.release.set()
    await asyncio.gather(*first, *waiting)
    assert node.count == 4


async def test_who_could_not_be_answered_in_time_is_refused_at_once_and_no_node_asked(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    gateway = await lab.front(node, more="node_in_flight = 1\ntimeout_ms = 9000")
    first = await occupied(lab, gateway, node)
    gateway.forwarder().recent.typical_s = 2.0
    waiting = await queued(lab, gateway, 3)  # after 0, 2 and 4 seconds, and then 2 more
    for timeout in (1.5, 7.0):
        code, message = await gateway.refusal(timeout=timeout)
        assert code is Code.RESOURCE_EXHAUSTED
        assert message.endswith("with 3 requests before it this one would not be answered in time")
    assert rejections(gateway, "no_time") == 2
    node.release.set()
    await asyncio.gather(*first, *waiting)
    assert node.count == 4


async def test_a_wait_ends_while_there_is_still_time_to_say_so(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    gateway = await lab.front(node, more="node_in_flight = 1\ntimeout_ms = 9000")
    first = await occupied(lab, gateway, node)
    gateway.forwarder().recent.typical_s = 3.9
    code, message = await gateway.refusal(timeout=4)
    assert code is Code.RESOURCE_EXHAUSTED
    assert message == "route m: every node has its 1 requests, and none had room in time"
    assert gateway.forwarder().queued == 0
    node.release.set()
    await asyncio.gather(*first)
    assert node.count == 1


async def test_waiting_clients_that_leave_leave_nothing_behind(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    gateway = await lab.front(node, more="node_in_flight = 1\ntimeout_ms = 9000")
    first = await occupied(lab, gateway, node)
    leaving = [gateway.start_call() for _ in range(50)]
    sending = [asyncio.ensure_future(call.wait_for_connection()) for call in leaving]
    await lab.until(lambda: gateway.forwarder().queued == 50)
    staying = asyncio.ensure_future(wait_for(gateway.start_call()))
    await lab.until(lambda: gateway.forwarder().queued == 51)
    for call in leaving:
        call.cancel()
    await asyncio.gather(*sending, return_exceptions=True)
    await lab.until(lambda: gateway.forwarder().queued == 1)
    assert node.count == 1
    node.release.set()
    await asyncio.gather(*first, staying)
    assert node.count == 2
    await lab.until(lambda: (gateway.forwarder().queued, gateway.node(node).in_flight) == (0, 0))


async def test_a_node_that_is_back_takes_those_that_wait(lab: Lab) -> None:
    full, out = await lab.node("full", hangs=True), await lab.node("out", health=lab.error(Code.UNAVAILABLE))
    gateway = await lab.front(full, out, more="node_in_flight = 1\ntimeout_ms = 9000")
    assert not gateway.usable(out)
    first = await occupied(lab, gateway, full)
    waiting = await queued(lab, gateway, 3)
    out.health = b"\x08\x01"
    await asyncio.gather(*waiting)
    assert (full.count, out.count) == (1, 3)
    full.release.set()
    await asyncio.gather(*first)


@pytest.mark.parametrize("change", ["another node", "a higher limit", "no limit"])
async def test_a_reload_that_makes_room_lets_those_that_wait_in(lab: Lab, change: str) -> None:
    node, other = await lab.node(hangs=True), await lab.node("other", hangs=True)
    gateway = await lab.front(
        node, more="node_in_flight = 1\ntimeout_ms = 9000", top="[gateway]\npoll_interval_ms = 10\n"
    )
    first = await occupied(lab, gateway, node)
    waiting = await queued(lab, gateway, 3)
    limit = {"another node": 1, "a higher limit": 2, "no limit": 0}[change]
    nodes = (node, other) if change == "another node" else (node,)
    gateway.file.write_text(lab.route(*nodes, more=f"node_in_flight = {limit}\ntimeout_ms = 9000"))
    await lab.until(lambda: gateway.forwarder().queued == (0 if limit == 0 else 2))
    await lab.until(lambda: node.count + other.count == (4 if limit == 0 else 2))
    for each in (node, other):
        each.release.set()
    await asyncio.gather(*first, *waiting)


async def test_a_retry_waits_for_a_node_that_was_not_tried(lab: Lab) -> None:
    busy, bad = await lab.node("busy", hangs=True), await lab.node("bad", status=lab.error(Code.INTERNAL))
    gateway = await lab.front(busy, bad, more=f"node_in_flight = 1\ntimeout_ms = 9000\n{ROUND_ROBIN}")
    calls = [asyncio.ensure_future(gateway.call()) for _ in range(2)]  # one waits at the one, one has met the other
    await lab.until(lambda: (busy.count, gateway.forwarder().queued) == (1, 1))
    assert bad.count == 1
    busy.release.set()
    assert await asyncio.gather(*calls) == ["busy", "busy"]
    assert (busy.count, bad.count) == (2, 1)


async def test_who_waits_for_one_node_holds_up_nobody_who_can_do_with_another(lab: Lab) -> None:
    busy, other = await lab.node("busy", hangs=True), await lab.node("other", status=lab.error(Code.INTERNAL))
    gateway = await lab.front(busy, other, more=f"node_in_flight = 1\ntimeout_ms = 9000\n{ROUND_ROBIN}")
    calls = [asyncio.ensure_future(gateway.call()) for _ in range(2)]
    await lab.until(lambda: (busy.count, gateway.forwarder().queued) == (1, 1))
    other.status = None
    assert [await gateway.call() for _ in range(5)] == ["other"] * 5
    busy.release.set()
    await asyncio.gather(*calls)


async def test_a_retry_for_which_there_is_no_room_is_the_first_error(lab: Lab) -> None:
    busy, bad = await lab.node("busy", hangs=True), await lab.node("bad", status=lab.error(Code.INTERNAL, "bad luck"))
    gateway = await lab.front(busy, bad, more=f"node_in_flight = 1\nqueue = 0\ntimeout_ms = 9000\n{ROUND_ROBIN}")
    calls = [asyncio.ensure_future(wait_for(gateway.start_call())) for _ in range(2)]
    await lab.until(lambda: busy.count == 1 and any(call.done() for call in calls))
    (failed,) = (call for call in calls if call.done())
    error = failed.exception()
    assert isinstance(error, grpc.aio.AioRpcError)
    assert (error.details() or "").endswith("bad luck")
    busy.release.set()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_retry_that_waits_for_a_node_left_out_holds_up_nobody_and_has_its_turn(lab: Lab) -> None:
    good = await lab.node("good", status=lab.error(Code.INTERNAL))
    out = await lab.node("out", hangs=True, health=lab.error(Code.INTERNAL))
    gateway = await lab.front(good, out, more="node_in_flight = 1\nqueue = 1\ntimeout_ms = 9000")
    assert not gateway.usable(out)
    calls = [asyncio.ensure_future(gateway.call())]
    await lab.until(lambda: out.count == 1)
    calls.append(asyncio.ensure_future(gateway.call()))
    await lab.until(lambda: gateway.forwarder().queued == 1)
    good.status = None
    assert [await gateway.call() for _ in range(5)] == ["good"] * 5
    assert gateway.forwarder().queued == 1
    out.release.set()
    assert await asyncio.gather(*calls) == ["out", "out"]
    assert rejections(gateway, "queue_full") == 0


async def test_who_was_given_little_time_by_the_queue_blames_no_node(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    more = 'node_in_flight = 1\ntimeout_ms = 400\nattempts = 1\nbalancer = "dynamic_weighted_round_robin"'
    gateway = await lab.front(node, more=more)
    (first,) = await occupied(lab, gateway, node)
    await asyncio.sleep(0.2)
    (second,) = await queued(lab, gateway, 1)
    errors = [str(error) for error in await asyncio.gather(first, second, return_exceptions=True)]
    assert "did not answer within 400 ms" in errors[0]
    assert "ms, all that was left of the time for this request" in errors[1]
    assert "within 400 ms" not in errors[1]
    assert gateway.weight(node) == 50
    outcomes = {
        outcome: gateway.app.metrics._registry.get_sample_value(
            "dl_inference_attempts_total", {"route": "m", "node": node.address, "outcome": outcome}
        )
        for outcome in ("failure", "neutral")
    }
    assert outcomes == {"failure": 1, "neutral": 1}


async def test_a_hedge_takes_no_place_that_is_taken(lab: Lab) -> None:
    nodes = await lab.nodes("ab", hangs=True)
    gateway = await lab.front(*nodes, more="node_in_flight = 1\ntimeout_ms = 9000\nhedge = true\nhedge_budget = 1")
    gateway.forwarder().recent.late_s = 0.01
    calls = await occupied(lab, gateway, *nodes)
    await asyncio.sleep(0.05)  # for what must not happen
    assert [gateway.node(node).in_flight for node in nodes] == [1, 1]
    assert [node.count for node in nodes] == [1, 1]
    for node in nodes:
        node.release.set()
    await asyncio.gather(*calls)


async def test_of_a_burst_that_may_be_hedged_each_has_a_place_of_its_own(lab: Lab) -> None:
    nodes = await lab.nodes("ab", hangs=True)
    gateway = await lab.front(*nodes, more="node_in_flight = 1\ntimeout_ms = 9000\nhedge = true")
    forwarder = gateway.forwarder()
    forwarder.recent.late_s = 5.0
    body = messages.ModelInferRequest(model_name="m").SerializeToString()
    answers = [asyncio.ensure_future(wait_for(gateway.start_call(body=body))) for _ in range(10)]
    await lab.until(lambda: (forwarder.queued, forwarder.in_flight) == (8, 2))
    for node in nodes:
        node.release.set()
    assert len(await asyncio.gather(*answers)) == 10
    await lab.until(lambda: forwarder.in_flight == 0)


# The whole process


async def test_over_its_limit_a_process_refuses_at_once_but_still_says_how_it_is(lab: Lab) -> None:
    node, other = await lab.node(hangs=True), await lab.node("other")
    config = "in_flight = 2\n" + lab.route(node, more="timeout_ms = 9000") + lab.route(other, name="n", task=70)
    gateway = await lab.gateway(config)
    calls = [asyncio.ensure_future(wait_for(gateway.start_call())) for _ in range(2)]
    await lab.until(lambda: node.count == 2)
    for model in "mn":
        assert await gateway.refusal(model) == (Code.RESOURCE_EXHAUSTED, "this server answers 2 requests already")
    assert rejections(gateway, "in_flight", route="") == 2
    assert await gateway.start_call(body=b"", method="/grpc.health.v1.Health/Check") == b"\x08\x01"
    ready = messages.ModelReadyRequest(name="n").SerializeToString()
    assert await gateway.start_call(body=ready, method="/inference.GRPCInferenceService/ModelReady") == b"\x08\x01"
    node.release.set()
    await asyncio.gather(*calls)
    assert await gateway.call("n") == "other"
    for _ in range(5):  # who leaves gives back its place
        call = gateway.start_call()
        await call
    node.release.clear()
    left = [gateway.start_call() for _ in range(2)]
    sending = [asyncio.ensure_future(call.wait_for_connection()) for call in left]
    await lab.until(lambda: node.count == 9)
    for call in left:
        call.cancel()
    await asyncio.gather(*sending, return_exceptions=True)
    await lab.until(lambda: len(node.cancelled) == 2)
    assert await gateway.call("n") == "other"


# By the numbers alone


class Node:
    def __init__(self) -> None:
        self.in_flight = 0


class Still:
    """A clock that stands still."""

    def now(self) -> float:
        return 0.0

    def call_later(self, seconds: float, function: Any) -> Any:
        return self

    def cancel(self) -> None: ...


class Request:
    """One of a crowd, which takes the node that its number names of those that it is given."""

    def __init__(self, crowd: Crowd, number: int, tried: tuple[Any, ...]) -> None:
        self.crowd, self.number, self.tried = crowd, number, list(tried)

    def waits(self) -> None:
        self.crowd.waiting.append(self.number)

    def admitted(self, nodes: Any) -> None:
        crowd, number = self.crowd, self.number
        if not nodes:
            del crowd.there[number]
            return
        node = crowd.on[number] = nodes[number % len(nodes)]
        crowd.admitted.append(number)
        node.in_flight += 1
        if node.in_flight >= crowd.per_node:
            crowd.admission.filled()

    def refused(self, error: Overloaded) -> None:
        raise AssertionError("the clock stands still")


class Crowd:
    """Requests that come, end and leave in any order, against a slow reference: a list."""

    def __init__(self, nodes: int, per_node: int, queue: int) -> None:
        self.nodes: tuple[Any, ...] = tuple(Node() for _ in range(nodes))
        self.left_out: set[Any] = set()
        self.usable = self.nodes
        self.per_node, self.queue = per_node, queue
        self.admission = Admission(self.eligible, Recent(), Metrics(), Still(), lambda action: action())
        self.admission.configure("m", per_node, queue)
        self.waiting: list[int] = []
        self.there: dict[int, Request] = {}
        self.admitted: list[int] = []
        self.on: dict[int, Any] = {}

    def eligible(self, tried: Any) -> Any:
        """As `Forwarder` has it."""
        if not tried:
            return self.usable
        return [node for node in self.usable if node not in tried] or [n for n in self.nodes if n not in tried]

    def room(self, tried: Any) -> Any:
        return [node for node in self.eligible(tried) if node.in_flight < self.per_node]

    def turn(self, node: Any) -> None:
        """It is left out, or back."""
        self.left_out ^= {node}
        self.usable = tuple([node for node in self.nodes if node not in self.left_out]) or self.nodes
        self.admission.admit_waiting()

    def come(self, number: int, tried: tuple[Any, ...] = ()) -> None:
        request = self.there[number] = Request(self, number, tried)
        full = self.eligible(tried) and not self.room(tried)
        if full and len(self.waiting) == self.queue:
            with pytest.raises(Overloaded):
                self.admission.admit(request, math.inf)
            del self.there[number]
            return
        self.admission.admit(request, math.inf)
        if full:
            assert number not in self.on
        else:
            assert number in self.on or not self.eligible(tried)

    def end(self, number: int) -> None:
        """Its attempt ends, or its client leaves; who waits can but leave."""
        request = self.there.pop(number)
        if number in self.on:
            node = self.on.pop(number)
            node.in_flight -= 1
            self.admission.ended(node)
        else:
            self.admission.leave(request)

    def check(self) -> None:
        now = [number for number in self.waiting if number in self.there and number not in self.on]
        entered = [number for number in self.waiting if number in self.there and number in self.on]
        for number in now:
            mine = self.eligible(self.there[number].tried)
            assert mine
            assert all(node.in_flight == self.per_node for node in mine)
            assert not any(later > number and self.on[later] in mine for later in entered)
        firsts = [number for number in entered if not self.there[number].tried]
        assert [number for number in self.admitted if number in firsts] == firsts
        self.waiting = now
        assert self.admission.queued == len(now)
        assert all(0 <= node.in_flight <= self.per_node for node in self.nodes)


# Retries that wait for a node left out: those who come later have the others, and it has its turn.
@example(nodes=2, per_node=1, queue=1, steps=[("turn", 0), ("retry", 1), ("retry", 1), ("come", 0)])
@example(nodes=2, per_node=1, queue=2, steps=[("turn", 0), ("retry", 1), ("retry", 1), ("end", 0)])
# Two nodes have room at once, one of which is all that a retry may have: who comes after it has the other.
@example(
    nodes=2,
    per_node=1,
    queue=3,
    steps=[*[("come", 0)] * 4, ("retry", 0), ("end", 0), ("end", 0), ("come", 0), ("come", 0), ("several", 206)],
)
@settings(max_examples=150, deadline=None)
@given(
    nodes=st.integers(1, 3),
    per_node=st.integers(1, 3),
    queue=st.integers(0, 6),
    steps=st.lists(
        st.tuples(st.sampled_from(["come", "come", "retry", "retry", "end", "several", "turn"]), st.integers(0, 1000)),
        max_size=40,
    ),
)
def test_no_order_of_events_breaks_a_limit_loses_a_turn_or_leaks_a_place(
    nodes: int, per_node: int, queue: int, steps: list[tuple[str, int]]
) -> None:
    crowd = Crowd(nodes, per_node, queue)
    for number, (step, which) in enumerate(steps):
        there = sorted(crowd.there)
        if step == "turn":
            crowd.turn(crowd.nodes[which % nodes])
        elif step == "retry":
            crowd.come(number, (crowd.nodes * 2)[which % nodes :][: 1 + which // 10 % nodes])
        elif step == "come" or not there:
            crowd.come(number)
        elif step == "several":
            for each in there[: which % (len(there) + 1)]:
                crowd.end(each)
        else:
            crowd.end(there[which % len(there)])
        crowd.check()
    for number in sorted(crowd.there):
        crowd.end(number)
    crowd.check()
    assert (crowd.admission.queued, [node.in_flight for node in crowd.nodes]) == (0, [0] * nodes)
