"""Which transport serves: the one that is named, or the best that can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

from dl_inference_core.errors import PluginError
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.plugins import Kind, Plugins

Installed: TypeAlias = Callable[..., Plugins]


class Fast(GrpcioTransport):
    name = "fast"
    priority = 10


class FastOnMusl(Fast):
    name = "fast"

    @classmethod
    def missing(cls) -> str:
        return "it needs glibc"


class Slow(GrpcioTransport):
    name = "slow"
    priority = -1


def test_auto_takes_the_highest_priority_that_can_run_here(installed: Installed) -> None:
    why = "the installed transport with the highest priority"
    assert installed(Kind.TRANSPORTS, Slow, Fast).choose_transport("auto") == ("fast", why)
    assert installed(Kind.TRANSPORTS, Slow).choose_transport("auto") == ("grpcio", why)


def test_auto_says_which_transport_it_passed_over_and_why(installed: Installed) -> None:
    assert installed(Kind.TRANSPORTS, FastOnMusl).choose_transport("auto") == (
        "grpcio",
        "fast cannot run here: it needs glibc",
    )


@pytest.mark.parametrize("name", ["fast", "grpcio"])
def test_a_named_transport_is_taken(installed: Installed, name: str) -> None:
    assert installed(Kind.TRANSPORTS, Fast).choose_transport(name) == (name, "as configured")


def test_a_named_transport_that_cannot_run_is_an_error_that_says_why(installed: Installed) -> None:
    with pytest.raises(PluginError, match='the transport "fast" cannot run here: it needs glibc'):
        installed(Kind.TRANSPORTS, FastOnMusl).choose_transport("fast")
    with pytest.raises(PluginError, match='"fast"'):
        installed(Kind.TRANSPORTS).choose_transport("fast")
