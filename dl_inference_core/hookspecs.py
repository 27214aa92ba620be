"""Every extension point. A plugin is a module with some of these hooks, named by an entry point of the group
"dl_inference_core".

Each hook is called at most once per process, on its main thread, when a class of its kind is first wanted: at start, or
by `dl-inference-core plugins` and `check`. No hook is called on the request path. Each returns a list of classes, not
of objects; `dl_inference_register_commands` alone returns commands. A class defines a `name` of its own, by which a
config chooses it, and `Options`, a `PluginOptions` of what the config may say to it. A class that is abstract, has no
name, or has a name that is taken is refused; the plugin's other classes stay. The core's names cannot be taken. A hook
that raises is reported with its error. All of this stops the process only if the config names something that is missing
then.

A backend is made when the first model needs it, a handler for each copy of a model, a balancer for each route.

Keep the module light: import torch or tensorflow inside the methods that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    import click

    from dl_inference_core.api import Api
    from dl_inference_core.gateway.balancing import Balancer
    from dl_inference_core.node.backend import Backend
    from dl_inference_core.node.handling import Handler
    from dl_inference_core.transport import Transport
    from dl_inference_core.wire.codecs import Codecs

GROUP = "dl_inference_core"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def dl_inference_register_backends() -> Sequence[type[Backend]]:  # type: ignore[empty-body]
    """Backends: what loads and runs a framework's models."""


@hookspec
def dl_inference_register_handlers() -> Sequence[type[Handler]]:  # type: ignore[empty-body]
    """Handlers: what a business model does before, around and after the model call."""


@hookspec
def dl_inference_register_balancers() -> Sequence[type[Balancer]]:  # type: ignore[empty-body]
    """Balancers: how a route chooses among its nodes."""


@hookspec
def dl_inference_register_transports() -> Sequence[type[Transport]]:  # type: ignore[empty-body]
    """Transports: how bytes come in and go out."""


@hookspec
def dl_inference_register_codecs() -> Sequence[type[Codecs]]:  # type: ignore[empty-body]
    """Codecs: what takes the messages of requests apart, and writes those of answers."""


@hookspec
def dl_inference_register_apis() -> Sequence[type[Api]]:  # type: ignore[empty-body]
    """APIs: method paths, REST URLs and sources of models beyond the core's. A server answers all installed APIs that
    its config does not switch off; it does not start if two of them take the same method or URL."""


@hookspec
def dl_inference_register_commands() -> Sequence[click.Command]:  # type: ignore[empty-body]
    """Commands of the program `dl-inference-core`. Called for `--help`, for `dl-inference-core plugins`, and for a
    command that the core does not have.

    The module with the commands imports nothing that takes long: a command imports what it needs when it runs. What
    several commands share is in `dl_inference_core.cli_options`."""
