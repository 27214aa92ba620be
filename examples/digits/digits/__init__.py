"""A handler plugin for one business model: the picture of a handwritten digit in, the digit and a confidence out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from dl_inference_core.node.handling import Handler


@hookimpl
def dl_inference_register_handlers() -> list[type[Handler]]:
    from digits.handler import Digits

    return [Digits]
