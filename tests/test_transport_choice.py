"""Which transport serves: the one that is named, or the best that can run."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from dl_inference_core import builtins
from dl_inference_core.errors import PluginError
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.hookspecs import hookimpl
from dl_inference_core.plugins import Plugins


class Found(EntryPoint):
    """An entry point that is loaded already."""

    def load(self) -> Any:
        return vars(self)["module"]


def plugins(*transports: type[GrpcioTransport]) -> Plugins:
    module = ModuleType("installed")

    @hookimpl
    def dl_inference_register_transports() -> list[type[GrpcioTransport]]:
        return list(transports)

    module.dl_inference_register_transports = dl_inference_register_transports  # type: ignore[attr-defined]
    found = []
    for name, loaded in (("core", builtins), ("installed", module)):
        entry = Found(name, loaded.__name__, "dl_inference_core")
        vars(entry)["module"] = loaded
        found.append(entry)
    return Plugins(found)


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


def test_auto_takes_the_highest_priority_that_can_run_here() -> None:
    why = "the installed transport with the highest priority"
    assert plugins(Slow, Fast).choose_transport("auto") == ("fast", why)
    assert plugins(Slow).choose_transport("auto") == ("grpcio", why)


def test_auto_says_which_transport_it_passed_over_and_why() -> None:
    assert plugins(FastOnMusl).choose_transport("auto") == ("grpcio", "fast cannot run here: it needs glibc")


@pytest.mark.parametrize("name", ["fast", "grpcio"])
def test_a_named_transport_is_taken(name: str) -> None:
    assert plugins(Fast).choose_transport(name) == (name, "as configured")


def test_a_named_transport_that_cannot_run_is_an_error_that_says_why() -> None:
    with pytest.raises(PluginError, match='the transport "fast" cannot run here: it needs glibc'):
        plugins(FastOnMusl).choose_transport("fast")
    with pytest.raises(PluginError, match='"fast"'):
        plugins().choose_transport("fast")
