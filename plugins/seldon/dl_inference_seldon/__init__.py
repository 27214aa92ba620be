"""Seldon's REST API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from dl_inference_core.api import Api


@hookimpl
def dl_inference_register_apis() -> list[type[Api]]:
    from dl_inference_seldon.api import SeldonApi

    return [SeldonApi]
