"""Operator's tools for dl-inference-core: commands that load a server, and that tune a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def dl_inference_register_commands() -> list[click.Command]:
    from dl_inference_tools.commands import bench, tune

    return [bench, tune]
