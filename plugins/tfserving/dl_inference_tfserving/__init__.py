"""The command `tfserving`, which takes TensorFlow Serving's flags. It needs no TensorFlow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def dl_inference_register_commands() -> list[click.Command]:
    from dl_inference_tfserving.command import tfserving

    return [tfserving]
