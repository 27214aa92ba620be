"""What a request may cost beyond one attempt: budgets, time that is left, hedges."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import pytest

from dl_inference_core.config import RouteSettings
from dl_inference_core.errors import AnswerMalformed, BadRequest, Code, HandlerFailed, InferenceError, NodeFailed
from dl_inference_core.gateway.retries import Budget, Recent
from dl_inference_core.testing.memory import MemoryExchange
from dl_inference_core.transport import Answer, Message
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS
from dl_inference_core.wire.routing_keys import RoutingKey

Lab = Any  # tests/conftest.py

ROUND_ROBIN = 'balancer = "round_robin"'
DYNAMIC = 'balancer = "dynamic_weighted_round_robin"'


def counted(gateway: Any, name: str) -> float:
    """The value of a counter of route "m"."""
    value = gateway.app.metrics._registry.get_sample_value(f"dl_inference_{name}_total", {"route": "m"})
    return float(value or 0)


ANY_KEY = RoutingKey("m")

# The bucket


class Requests:
    """Requests against nodes that all answer or all fail, by the numbers alone."""

    def __init__(self, in_flight: int = 0) -> None:
        self.in_flight = in_flight
        self.budget = Budget(0.2, 20, lambda: self.in_flight, full=True)

    def attempts(self, requests: int, *, fail: bool) -> int:
        made = 0
        for _ in range(requests):
            made += 1
            if fail:
                made += self.budget.take()
            else:
                self.budget.earn()
        return made


@pytest.mark.parametrize("in_flight", [0, 4, 200])
def test_an_outage_of_every_node_costs_few_attempts_and_a_good_one_none(in_flight: int) -> None:
    requests = Requests(in_flight)
    assert requests.attempts(4000, fail=False) == 4000  # 10 seconds at 400 a second
    assert requests.attempts(4800, fail=True) == 4800 + 20 + in_flight + 1
    assert requests.attempts(4000, fail=False) == 4000


def test_in_the_long_run_a_fifth_of_the_successes_is_tried_again() -> None:
    requests = Requests()
    requests.attempts(100, fail=True)
    made = sum(requests.attempts(8, fail=False) + requests.attempts(2, fail=True) for _ in range(1000))
    assert 11_500 < made <= 11_600  # 8 times 0.2 is 1.6 for the two that fail


def test_as_many_as_are_in_flight_may_fail_at_once() -> None:
    budget = Budget(0.2, 0, lambda: 199, full=True)
    assert sum(budget.take() for _ in range(300)) == 200


def test_without_a_share_there_is_the_reserve_and_no_more() -> None:
    for reserve in (0, 3):
        budget = Budget(0, reserve, lambda: 100, full=True)
        for _ in range(1000):
            budget.earn()
        assert sum(budget.take() for _ in range(100)) == reserve


def test_an_empty_bucket_gives_only_what_was_earned() -> None:
    budget = Budget(0.0625, 10, lambda: 0, full=False)
    given = 0
    for requests in range(1, 1601):
        budget.earn()
        given += budget.take()
        assert given <= 0.0625 * requests
    assert given == 100


def test_quantiles_are_of_the_last_256_and_unknown_before_there_are_32() -> None:
    recent = Recent()
    for _ in range(31):
        recent.add(1.0)
    recent.look()
    assert (recent.least_s, recent.typical_s, recent.late_s) == (0, 0, None)
    recent.add(1.0)
    recent.look()
    assert (recent.least_s, recent.typical_s, recent.late_s) == (1, 1, 1)
    for number in range(3 * 128):
        recent.add(number % 128 / 1000)
    recent.look()
    assert recent.least_s == 0
    assert recent.typical_s == pytest.approx(0.064)
    assert recent.late_s == pytest.approx(0.121, abs=0.001)


# With real nodes


async def test_when_every_node_fails_the_budget_ends_the_retries(lab: Lab) -> None:
    nodes = await lab.nodes("abcd")
    gateway = await lab.front(*nodes, more=f"retry_reserve = 5\n{ROUND_ROBIN}")
    for _ in range(100):
        await gateway.call()
    assert sum(node.count for node in nodes) == 100
    for node in nodes:
        node.status = lab.error(Code.INTERNAL, "down")
    for _ in range(60):
        assert (await gateway.refusal())[0] is Code.INTERNAL
    assert sum(node.count for node in nodes) == 100 + 60 + 6
    assert counted(gateway, "retries_denied") == 54
    for node in nodes:
        node.status = None
    for _ in range(30):
        await gateway.call()
    assert sum(node.count for node in nodes) == 100 + 66 + 30
    for node in nodes:
        node.status = lab.error(Code.INTERNAL, "down")
    for _ in range(20):
        await gateway.refusal()
    assert sum(node.count for node in nodes) in (196 + 20 + 5, 196 + 20 + 6)  # 30 successes have earned 6, or just not


async def test_a_budget_of_nothing_never_tries_again(lab: Lab) -> None:
    nodes = await lab.nodes("ab", status=lab.error(Code.UNAVAILABLE))
    gateway = await lab.front(*nodes, more="retry_budget = 0\nretry_reserve = 0")
    await gateway.refusal()
    assert sum(node.count for node in nodes) == 1


async def test_a_changed_budget_holds_at_once(lab: Lab) -> None:
    nodes = await lab.nodes("ab", status=lab.error(Code.INTERNAL))
    gateway = await lab.front(*nodes, top="[gateway]\npoll_interval_ms = 10\n")
    await gateway.refusal()
    assert sum(node.count for node in nodes) == 2
    gateway.file.write_text(lab.route(*nodes, more="retry_budget = 0\nretry_reserve = 0"))
    await lab.until(lambda: not gateway.forwarder().config.retry_budget)
    await gateway.refusal()
    assert sum(node.count for node in nodes) == 3


async def test_of_two_hundred_requests_in_flight_those_on_a_node_that_stops_are_all_answered(lab: Lab) -> None:
    nodes = await lab.nodes("abcd")
    gateway = await lab.front(*nodes, more=f"timeout_ms = 20000\n{ROUND_ROBIN}")
    await gateway.call()
    for node in nodes:
        node.hangs = True
        node.calls.clear()
    calls = [gateway.start_call(timeout=20) for _ in range(200)]
    answers = asyncio.gather(*calls)
    await lab.until(lambda: [node.count for node in nodes] == [50] * 4)
    await nodes[0].stop()
    await lab.until(lambda: sum(node.count for node in nodes[1:]) == 200)
    for node in nodes:
        node.release.set()
    assert len(await answers) == 200
    assert counted(gateway, "retries_denied") == 0
    await lab.until(lambda: gateway.forwarder().in_flight == 0)


# Time that is left


async def test_no_attempt_is_begun_that_could_not_end_in_time(lab: Lab) -> None:
    nodes = await lab.nodes("ab", status=lab.error(Code.INTERNAL))
    gateway = await lab.front(*nodes, more="timeout_ms = 20000")
    gateway.forwarder().recent.least_s = 5.0
    assert (await gateway.refusal(timeout=4))[0] is Code.INTERNAL
    assert sum(node.count for node in nodes) == 1
    await gateway.refusal(timeout=15)
    assert sum(node.count for node in nodes) == 3


async def test_what_is_left_of_the_clients_time_is_what_the_second_node_is_told(lab: Lab) -> None:
    slow = await lab.node("slow", hangs=True)
    fast = await lab.node("fast")
    gateway = await lab.front(slow, fast, more=f"timeout_ms = 800\n{ROUND_ROBIN}")
    while not slow.count:
        fast.calls.clear()
        start = time.monotonic()
        assert await gateway.call(timeout=1.2) == "fast"
    (call,) = fast.calls
    assert call.deadline is not None
    assert call.deadline <= start + 1.5  # rather than 0.8 s after the first 0.8; the wire's own rounding, and the way


async def test_an_answer_that_is_none_is_tried_elsewhere_whatever_is_said_of_failures(lab: Lab) -> None:
    bad = await lab.node("bad", answer=b"\xff\xff\xff")
    good = await lab.node("good")
    gateway = await lab.front(bad, good, more=f"retry_failed = false\n{ROUND_ROBIN}")
    assert [await gateway.call() for _ in range(4)] == ["good"] * 4
    assert bad.count >= 1


# Hedges


def test_a_hedge_takes_a_second_attempt() -> None:
    assert RouteSettings(hedge=True).hedge_budget == 0.05
    with pytest.raises(ValueError, match="it takes attempts of 2 or more"):
        RouteSettings(hedge=True, attempts=1)


async def hedging(lab: Lab, *nodes: Any, late_s: float = 0.02, budget: float = 1) -> Any:
    """A gateway that takes attempts for late after `late_s`, and that chooses the first of `nodes` that it may."""
    gateway = await lab.front(*nodes, more=f"timeout_ms = 5000\nhedge = true\nhedge_budget = {budget}\n{DYNAMIC}")
    gateway.forwarder().recent.late_s = late_s
    order = [node.address for node in nodes]
    balancer = gateway.forwarder().balancer
    choose = balancer.choose

    def choose_first(given: Any, call: Any) -> Any:
        choose(given, call)
        return min(given, key=lambda node: order.index(node.address))

    balancer.choose = choose_first
    return gateway


def untouched(gateway: Any, *nodes: Any) -> bool:
    return all(
        gateway.node(node).in_flight == 0 and gateway.weight(node) == 100 and gateway.usable(node) for node in nodes
    )


async def test_a_late_attempt_has_another_beside_it_and_the_loser_changes_nothing(lab: Lab) -> None:
    slow, fast = await lab.node("slow", hangs=True), await lab.node("fast")
    gateway = await hedging(lab, slow, fast)
    for turn in range(1, 8):
        assert await gateway.call() == "fast"
        await lab.until(lambda turn=turn: len(slow.cancelled) == turn)
        await lab.until(lambda: untouched(gateway, slow, fast))
    assert [slow.count, fast.count] == [7, 7]
    assert counted(gateway, "hedges") == 7
    assert slow.checks <= 2  # none for what it was cancelled in


async def test_the_attempt_after_one_that_failed_is_hedged_by_its_own_time(lab: Lab) -> None:
    bad = await lab.node("bad", latency_s=0.2, status=lab.error(Code.UNAVAILABLE))
    slow, spare = await lab.node("slow", latency_s=0.2), await lab.node("spare")
    gateway = await hedging(lab, bad, slow, spare, late_s=0.3)
    assert await gateway.call() == "slow"  # 0.2 s after it was asked, and 0.4 s after the first one
    assert [node.count for node in (bad, slow, spare)] == [1, 1, 0]
    assert counted(gateway, "hedges") == 0


async def test_the_first_attempt_may_still_win(lab: Lab) -> None:
    first, second = await lab.node("first", latency_s=0.2), await lab.node("second", hangs=True)
    gateway = await hedging(lab, first, second)
    assert await gateway.call() == "first"
    await lab.until(lambda: len(second.cancelled) == 1)
    await lab.until(lambda: untouched(gateway, first, second))
    assert [first.count, second.count] == [1, 1]


async def test_an_attempt_that_is_not_late_stays_alone(lab: Lab) -> None:
    nodes = await lab.nodes("ab")
    gateway = await hedging(lab, *nodes, late_s=3.0)
    for _ in range(20):
        assert await gateway.call() == "a"
    assert nodes[1].count == 0


async def test_one_that_fails_is_forgiven_while_the_other_runs(lab: Lab) -> None:
    bad = await lab.node("bad", latency_s=0.1, status=lab.error(Code.INTERNAL))
    good = await lab.node("good", latency_s=0.25)
    for nodes in ((bad, good), (good, bad)):
        bad.latency_s, good.latency_s = (0.1, 0.25) if nodes[0] is bad else (0.05, 0.25)
        gateway = await hedging(lab, *nodes)
        assert await gateway.call() == "good"
    assert [bad.count, good.count] == [2, 2]


async def test_when_both_fail_the_client_gets_an_error_and_no_third_is_asked(lab: Lab) -> None:
    nodes = await lab.nodes("abc", latency_s=0.1, status=lab.error(Code.UNAVAILABLE, "no luck"))
    gateway = await hedging(lab, *nodes)
    code, message = await gateway.refusal()
    assert code is Code.UNAVAILABLE
    assert message.endswith("no luck")
    assert [node.count for node in nodes] == [1, 1, 0]


async def test_the_clients_own_fault_ends_the_race(lab: Lab) -> None:
    says_no = await lab.node("a", latency_s=0.1, status=lab.error(Code.INVALID_ARGUMENT, "no"))
    hangs = await lab.node("b", hangs=True)
    gateway = await hedging(lab, says_no, hangs)
    assert await gateway.refusal() == (Code.INVALID_ARGUMENT, "no")
    await lab.until(lambda: len(hangs.cancelled) == 1)
    await lab.until(lambda: untouched(gateway, says_no, hangs))


async def test_one_that_fails_before_it_is_late_is_tried_again_as_ever(lab: Lab) -> None:
    bad, good = await lab.node("bad", status=lab.error(Code.INTERNAL)), await lab.node("good")
    gateway = await hedging(lab, bad, good, late_s=3.0)
    assert await gateway.call() == "good"
    assert [bad.count, good.count] == [1, 1]
    assert counted(gateway, "hedges") == 0


@pytest.mark.parametrize("second", [False, True])
async def test_of_two_errors_at_once_the_one_that_may_not_go_elsewhere_counts(lab: Lab, second: bool) -> None:
    nodes = await lab.nodes("ab")
    gateway = await hedging(lab, *nodes, late_s=0.001)
    forwarder, protocol = gateway.forwarder(), PROTOCOLS["openinference"]
    errors: list[InferenceError] = [NodeFailed("bad"), BadRequest("no")]
    together = asyncio.Event()
    waiting = []

    class Failing:
        def __init__(self, real: Any, error: InferenceError) -> None:
            self.real, self.error = real, error

        async def call(self, method: str, message: Message, **_: Any) -> Answer:
            waiting.append(self)
            await together.wait()
            raise self.error

        async def close(self) -> None:
            await self.real.close()

    for node, error in zip(forwarder.pool.nodes, reversed(errors) if second else errors, strict=True):
        node.endpoint.connection = Failing(node.endpoint.connection, error)
    exchange = MemoryExchange(protocol.node_method)
    forwarder.begin_all((exchange,), protocol, ANY_KEY)
    answer = asyncio.ensure_future(exchange.outcome())
    await lab.until(lambda: len(waiting) == 2)
    together.set()
    with pytest.raises(BadRequest, match="no"):
        await answer
    assert forwarder.in_flight == 0


async def test_trailers_are_those_of_the_attempt_that_won(lab: Lab) -> None:
    slow = await lab.node("slow", latency_s=0.3, trailers=[("x-from", "slow")])
    fast = await lab.node("fast", trailers=[("x-from", "fast")])
    gateway = await hedging(lab, slow, fast)
    call = gateway.start_call()
    await call
    assert [value for key, value in await call.trailing_metadata() if key == "x-from"] == ["fast"]


async def test_a_client_that_leaves_ends_both(lab: Lab) -> None:
    nodes = await lab.nodes("ab", hangs=True)
    gateway = await hedging(lab, *nodes)
    call = gateway.start_call()
    waiting = asyncio.ensure_future(call.wait_for_connection())
    await lab.until(lambda: [node.count for node in nodes] == [1, 1])
    call.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await lab.until(lambda: [len(node.cancelled) for node in nodes] == [1, 1])
    await lab.until(lambda: untouched(gateway, *nodes))
    assert [node.count for node in nodes] == [1, 1]


class AlwaysLate(Recent):
    """Of attempts each of which takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.late_s = 0.0001

    def look(self) -> None: ...


async def test_no_more_than_the_budget_is_hedged(lab: Lab) -> None:
    nodes = await lab.nodes("ab", latency_s=0.01)
    gateway = await hedging(lab, *nodes, budget=0.0625)
    gateway.forwarder().recent = AlwaysLate()
    await asyncio.gather(*(gateway.call() for _ in range(320)))
    assert counted(gateway, "hedges") == 20
    assert sum(node.count for node in nodes) <= 340


async def test_two_attempts_may_end_at_once(lab: Lab) -> None:
    """On a transport that is a matter of luck, so it is not left to one."""
    nodes = await lab.nodes("abc")
    gateway = await hedging(lab, *nodes, late_s=0.001)
    together = asyncio.Event()
    forwarder = gateway.forwarder()
    for node in forwarder.pool.nodes:
        real = node.endpoint.connection

        class Late:
            async def call(self, method: str, message: Message, real: Any = real, **how: Any) -> Answer:
                answer: Answer = await real.call(method, message, **how)
                await together.wait()
                return answer

            async def close(self, real: Any = real) -> None:
                await real.close()

        node.endpoint.connection = Late()

    async def release() -> None:
        await lab.until(lambda: [node.count for node in nodes] == [1, 1, 0])
        await lab.until(lambda: forwarder.in_flight == 2)
        together.set()

    protocol = PROTOCOLS["openinference"]
    exchange = MemoryExchange(protocol.node_method)
    forwarder.begin_all((exchange,), protocol, ANY_KEY)
    answer, _ = await asyncio.gather(exchange.outcome(), release())
    assert messages.ModelInferResponse.FromString(bytes(answer)).id in "ab"
    await lab.until(lambda: untouched(gateway, *nodes))


@pytest.mark.parametrize("late_s", [None, 3.0, 0.001])
async def test_what_fails_leaves_no_garbage(lab: Lab, late_s: float | None) -> None:
    """Of the gateway's own: grpcio's server leaves some. Without hedging, with it, and with hedges."""
    nodes = await lab.nodes("ab", answer=b"\xff\xff\xff", latency_s=0.03)
    gateway = await (hedging(lab, *nodes, late_s=late_s) if late_s else lab.front(*nodes, more=DYNAMIC))
    forwarder, protocol = gateway.forwarder(), PROTOCOLS["openinference"]
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            exchange = MemoryExchange(protocol.node_method)
            forwarder.begin_all((exchange,), protocol, ANY_KEY)
            with pytest.raises(AnswerMalformed):
                await exchange.outcome()
        assert counted(gateway, "hedges") == (4 if late_s == 0.001 else 0)
        await lab.until(lambda: sum(type(thing) is AnswerMalformed for thing in gc.get_objects()) == 0)
    finally:
        gc.enable()


class Unforwardable(MemoryExchange):
    """The transport refuses to send it to a node."""

    __slots__ = ()

    def forward(self, *_: Any, **__: Any) -> Any:
        raise TypeError("streams are not forwarded")


@pytest.mark.parametrize("hedge", [False, True])
async def test_a_request_that_cannot_be_sent_fails_and_is_not_counted_as_in_flight(lab: Lab, hedge: bool) -> None:
    nodes = await lab.nodes("ab")
    gateway = await (hedging(lab, *nodes) if hedge else lab.front(*nodes, more=DYNAMIC))
    protocol = PROTOCOLS["openinference"]
    exchange = Unforwardable(protocol.node_method)
    gateway.forwarder().begin_all((exchange,), protocol, ANY_KEY)
    with pytest.raises(HandlerFailed, match="TypeError"):
        await asyncio.wait_for(exchange.outcome(), 5)
    assert untouched(gateway, *nodes)
