"""TensorFlow Serving's surface: its API beyond the core's, and the command `tfserving`, which takes its flags. It needs
no TensorFlow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

    from dl_inference_core.api import Api


@hookimpl
def dl_inference_register_apis() -> list[type[Api]]:
    from dl_inference_tfserving.api import TfServingApi

    return [TfServingApi]


@hookimpl
def dl_inference_register_commands() -> list[click.Command]:
    from dl_inference_tfserving.command import tfserving

    return [tfserving]
