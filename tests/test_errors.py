"""What a node's status stands for."""

from __future__ import annotations

import pytest

from dl_inference_core.errors import Blame, Code, MessageTooLarge, NodeOverloaded, from_status


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
