"""What a node's status stands for."""

from __future__ import annotations

from typing import Any

import pytest

from dl_inference_core.errors import (
    AnswerMalformed,
    AttemptTimedOut,
    Blame,
    Code,
    InferenceError,
    MessageTooLarge,
    NodeFailed,
    NodeOverloaded,
    causes,
    from_status,
    text_of,
)

FAILURES = (Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS)
CLIENTS = frozenset(
    {
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.ALREADY_EXISTS,
        Code.FAILED_PRECONDITION,
        Code.OUT_OF_RANGE,
        Code.ABORTED,
        Code.UNIMPLEMENTED,
        Code.PERMISSION_DENIED,
        Code.UNAUTHENTICATED,
    }
)


@pytest.mark.parametrize("code", Code)
def test_each_status_of_a_node_says_whose_fault_it_is_and_is_never_ok(code: Code) -> None:
    error = from_status(code, "said")
    expected = {
        Code.OK: (Code.INTERNAL, Blame.NODE, True),  # an error that says OK
        Code.UNAVAILABLE: (code, Blame.NODE, True),
        Code.RESOURCE_EXHAUSTED: (code, Blame.NODE_SOFTLY, True),
        Code.CANCELLED: (code, Blame.NODE_SOFTLY, True),  # by the node: a client's own comes as no status
        Code.DEADLINE_EXCEEDED: (code, Blame.NOBODY, False),  # the client's, until the gateway knows better
        **{failure: (failure, Blame.NODE, True) for failure in FAILURES},
        **{client: (client, Blame.CLIENT, False) for client in CLIENTS},
    }
    assert (error.code, error.blame, error.another_node) == expected[code]
    assert str(error) == "said"
    assert error.code is not Code.OK


def test_whether_a_failure_is_tried_again_may_be_configured_but_not_an_answer_that_is_none() -> None:
    configurable = [code for code in Code if type(from_status(code, "")) is NodeFailed]
    assert configurable == sorted(FAILURES)
    none: InferenceError
    for none in (AnswerMalformed(""), from_status(Code.OK, ""), AttemptTimedOut("")):
        assert (none.blame, none.another_node) == (Blame.NODE, True)
        assert type(none) is not NodeFailed


@pytest.mark.parametrize(
    "said",
    [
        "Received message larger than max (11 vs. 10)",
        "CLIENT: Sent message larger than max (11 vs. 10)",
        "received metadata size exceeds soft limit (9000 vs. 8192), rejecting requests with some random probability",
        "received metadata size exceeds hard limit (20000 vs. 16384)",
    ],
)
def test_what_is_too_large_is_the_clients_fault(said: str) -> None:
    error = from_status(Code.RESOURCE_EXHAUSTED, said)
    assert isinstance(error, MessageTooLarge)
    assert (error.blame, error.another_node) == (Blame.CLIENT, False)


def test_any_other_exhaustion_is_an_overloaded_node() -> None:
    error = from_status(Code.RESOURCE_EXHAUSTED, "the queue is full")
    assert isinstance(error, NodeOverloaded)
    assert (error.blame, error.another_node) == (Blame.NODE_SOFTLY, True)


@pytest.mark.parametrize("code", [Code.OK, 3, "INVALID_ARGUMENT"])
def test_an_error_class_has_a_code_that_a_failure_can_have(code: Any) -> None:
    with pytest.raises(TypeError, match=r"expected an errors\.Code other than OK"):
        type("Mine", (InferenceError,), {"code": code})


def test_the_text_of_an_error_that_cannot_say_what_it_is() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise SystemExit

    assert text_of(Mute()) == ""
    assert text_of(ValueError("a word")) == "a word"


def test_each_cause_of_an_error_comes_once() -> None:
    inner, outer = ValueError("inner"), ValueError("outer")
    outer.__cause__ = inner
    assert list(causes(outer)) == [outer, inner]
    inner.__cause__ = outer
    assert list(causes(outer)) == [outer, inner]
    assert list(causes(None)) == []
