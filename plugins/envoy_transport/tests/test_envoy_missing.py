"""Where the transport cannot run it says what is missing, in one line."""

from __future__ import annotations

import importlib.util
import platform
import sys
from typing import Any

import find_libpython
import pytest
from dl_inference_envoy_transport.transport import EnvoyTransport


def test_nothing_is_missing_here() -> None:
    assert EnvoyTransport.missing() == ""


def test_musl_is_told_from_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert EnvoyTransport.missing() == "Envoy needs glibc, which this system has not"


@pytest.mark.parametrize("package", ["pyvoy", "envoy"])
def test_a_package_that_has_no_wheel_here_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *arguments: Any) -> Any:
        return None if name == package else find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert EnvoyTransport.missing().startswith("pyvoy is not installed")


def test_a_python_without_a_shared_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_libpython, "candidate_paths", lambda: iter(["/nowhere/libpython3.so", "/usr/bin/env"]))
    assert EnvoyTransport.missing() == f"{sys.executable} was built without a shared libpython (--enable-shared)"
