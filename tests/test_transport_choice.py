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


class Envoy(GrpcioTransport):
    name = "envoy"


class EnvoyOnMusl(Envoy):
    @classmethod
    def missing(cls) -> str:
        return "it needs glibc"


def test_auto_takes_envoy_where_it_can_run() -> None:
    assert plugins(Envoy).choose_transport("auto") == ("envoy", "it is installed, and can run here")


def test_auto_falls_back_to_grpcio_and_says_why() -> None:
    assert plugins(EnvoyOnMusl).choose_transport("auto") == ("grpcio", "envoy cannot run here: it needs glibc")
    name, why = plugins().choose_transport("auto")
    assert name == "grpcio"
    assert "pip install dl-inference-envoy-transport" in why


@pytest.mark.parametrize("name", ["envoy", "grpcio"])
def test_the_one_that_is_named_is_taken(name: str) -> None:
    assert plugins(Envoy).choose_transport(name) == (name, "as configured")


def test_one_that_is_named_and_cannot_run_is_an_error_that_says_why() -> None:
    with pytest.raises(PluginError, match='the transport "envoy" cannot run here: it needs glibc'):
        plugins(EnvoyOnMusl).choose_transport("envoy")
    with pytest.raises(PluginError, match="pip install dl-inference-envoy-transport"):
        plugins().choose_transport("envoy")
