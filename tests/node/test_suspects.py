"""Clients whose requests keep failing share no batch with others."""

from __future__ import annotations

import pytest

from dl_inference_core.node.suspects import Suspects, client_of


@pytest.mark.parametrize("key", ["authorization", "x-api-key", "x-client-id"])
def test_a_client_is_told_by_its_metadata(key: str) -> None:
    one, other = (client_of((("x-other", "a"), (key, name))) for name in ("a", "b"))
    assert one is not None
    assert one != other
    assert client_of((("x-other", "a"),)) is None


def test_a_client_is_isolated_from_its_third_failure_until_it_has_succeeded_as_often() -> None:
    suspects = Suspects()
    for _ in range(2):
        suspects.failed(1)
    assert not suspects.isolates(1)
    suspects.failed(1)
    assert suspects.isolates(1)
    assert not suspects.isolates(2)
    assert not suspects.isolates(None)
    suspects.succeeded(1)
    assert not suspects.isolates(1)
    for _ in range(2):
        assert suspects.any
        suspects.succeeded(1)
    assert not suspects.any
    for _ in range(100):
        suspects.failed(1)
    for _ in range(8):
        suspects.succeeded(1)
    assert not suspects.any


def test_a_request_without_a_client_is_nobodys() -> None:
    suspects = Suspects()
    for _ in range(5):
        suspects.failed(None)
    suspects.succeeded(None)
    assert not suspects.any


def test_only_so_many_clients_are_kept() -> None:
    suspects = Suspects()
    for client in range(3000):
        for _ in range(3):
            suspects.failed(client)
    assert sum(suspects.isolates(client) for client in range(3000)) == 1024
    assert suspects.isolates(2999)
