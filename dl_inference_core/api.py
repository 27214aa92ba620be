"""An API: what one family of clients calls, beside what the core itself answers. Plugins bring APIs; every installed
one is answered.

This module imports nothing of a node: a gateway forwards the methods of an API, too.
"""

from __future__ import annotations

import logging
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import PluginError
from dl_inference_core.plugins import Kind, Plugins

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from dl_inference_core.config import Config, NamedModel
    from dl_inference_core.coroutines import UnaryHandler
    from dl_inference_core.dispatcher import Dispatcher
    from dl_inference_core.node.repository import Repository
    from dl_inference_core.rest.answering import Local, RestApi
    from dl_inference_core.tensors import Request
    from dl_inference_core.wire.protocol import Protocol

_log = logging.getLogger(__name__)


class Api:
    """One API. A process makes one object of each class. Its methods are called on the event loop, unless they say
    otherwise; each has a default, which does nothing.

    Attributes:
        name: the name by which a config gives its options: `[apis.NAME]`.
        protocols: the protocols of its methods that infer, by method path. A gateway forwards these methods; on a node
            a model answers them.
    """

    name: ClassVar[str]
    Options: ClassVar[type[PluginOptions]] = PluginOptions
    protocols: ClassVar[Mapping[str, Protocol]] = MappingProxyType({})

    def __init__(self, options: PluginOptions) -> None:
        """Must have no side effects."""
        self.options = options

    @property
    def brings_models(self) -> bool:
        """Whether models come by this API. The process is a node then, even if the config names no models."""
        return False

    @property
    def awaits_models(self) -> bool:
        """Whether clients have yet to say which models to serve. Until then the process is ready without a model."""
        return False

    def name_models(self, named: Mapping[str, NamedModel], config: Config) -> Mapping[str, NamedModel]:
        """The models to serve by name at the start, instead of `named`. Called once, on a node only.

        Raises:
            ConfigError: the API cannot be answered with this config.
        """
        return named

    def recorded_requests(self, folder: Path) -> Iterable[tuple[str, Request]]:
        """The requests that the version in `folder` must answer before it is ready. With each request goes its place,
        for error messages. Runs on the thread that loads the version.

        Raises:
            ModelError: a request cannot be read.
        """
        return ()

    def methods(self) -> Mapping[str, UnaryHandler]:
        """The coroutines that answer further methods, by method path. Called once, after `name_models`."""
        return MappingProxyType({})

    def rest(self, local: Local, dispatcher: Dispatcher, *, cors: bool) -> RestApi | None:
        """The REST side of this API; None if it has none.

        Args:
            local: the models of this process.
            dispatcher: the dispatcher of this process.
            cors: as of `RestApi`.
        """
        return None

    def start(self, repository: Repository) -> None:
        """Called once, on a node only, when `repository` has begun to load the models."""

    async def reload(self) -> None:
        """Look at once for changes. Called at SIGHUP, after `start`. Logs what fails, and raises nothing."""

    async def close(self) -> None:
        """End all background work. Called once, before the repository is closed; also where `start` was not called."""


def make_apis(plugins: Plugins, config: Config, folder: Path) -> tuple[Api, ...]:
    """An object of each installed API, with its options. A broken API that `config` does not name is logged and left
    out.

    Args:
        folder: the folder that relative paths in the options are relative to.

    Raises:
        ConfigError, PluginError: `config` names an API that is not installed, or that cannot be made.
    """
    apis: list[Api] = []
    for name in dict.fromkeys((*plugins.classes(Kind.APIS), *config.apis)):
        try:
            apis.append(plugins.make(Kind.APIS, name, config.apis.get(name, {}), f"[apis.{name}]", folder))
        except PluginError as error:
            if name in config.apis:
                raise
            _log.error("the API %s is not answered: %s", name, error)
    return tuple(apis)
