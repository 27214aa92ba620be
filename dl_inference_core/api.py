"""The interface of an API, and the APIs of one process.

An API is a set of methods and URLs for one family of clients. Plugins bring APIs, and a server answers every installed
one that its config does not switch off. This module imports nothing of a node: a gateway forwards the methods of an
API, too.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ConfigError, PluginError, text_of
from dl_inference_core.http_exchange import is_among
from dl_inference_core.plugins import Kind, Plugins

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from starlette.routing import Route

    from dl_inference_core.config import Config, NamedModel
    from dl_inference_core.coroutines import UnaryHandler
    from dl_inference_core.dispatcher import Dispatcher
    from dl_inference_core.introspection import Readiness
    from dl_inference_core.node.repository import Repository
    from dl_inference_core.node.warm_up import FindRecorded
    from dl_inference_core.rest.answering import Local, RestApi
    from dl_inference_core.tensors import Request
    from dl_inference_core.wire.protocol import Protocol

_log = logging.getLogger(__name__)

_METHOD = re.compile(r"/[\w.]+/\w+")


class Api:
    """One API. A process makes one object of each class. Its methods are called in the order in which they stand here,
    on the main thread where they say nothing else. A gateway without models calls neither `name_models` nor
    `recorded_requests` nor `start`. Each method has a default, which does nothing.

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
        """Whether this API names models. The process is a node then, even if the config names none."""
        return False

    @property
    def awaits_models(self) -> bool:
        """Whether clients have yet to say which models to serve. Until then a node is ready without a model. Any
        thread."""
        return False

    def name_models(self, named: Mapping[str, NamedModel], config: Config) -> Mapping[str, NamedModel]:
        """The models to serve by name at the start, instead of `named`. Return `named` itself to change nothing. Must
        start nothing that would have to be closed.

        Raises:
            ConfigError: the API cannot be answered with this config.
        """
        return named

    def recorded_requests(self, folder: Path) -> Iterable[tuple[str, Request]]:
        """The requests that the version in `folder` must answer before it is ready. With each request goes its place,
        for error messages. Runs on the threads that load versions, several at the same time.

        Raises:
            ModelError: a request cannot be read.
        """
        return ()

    def methods(self) -> Mapping[str, UnaryHandler]:
        """The coroutines that answer further methods, by method path."""
        return MappingProxyType({})

    def pages(self, readiness: Readiness) -> Sequence[Route]:
        """Further pages of the HTTP application, which answers metrics and health."""
        return ()

    def rest(self, local: Local, dispatcher: Dispatcher, *, cors: bool) -> RestApi | None:
        """The REST side of this API; None if it has none. It may be asked before `start`.

        Args:
            local: the models of this process.
            dispatcher: the dispatcher of this process.
            cors: as of `RestApi`.
        """
        return None

    def start(self, repository: Repository) -> None:
        """Called when `repository` has begun to load the models."""

    async def reload(self) -> None:
        """Look at once for changes. Called at each SIGHUP."""

    async def close(self) -> None:
        """End all background work. Called before the repository is closed; also where `start` was not called."""


class Apis:
    """The APIs of one process. An error of an API's own code names the API."""

    def __init__(self, plugins: Plugins, config: Config, folder: Path) -> None:
        """Make each installed API that `config` does not switch off. A broken one that `config` does not name is logged
        and left out.

        Args:
            folder: the folder that relative paths in the options are relative to.

        Raises:
            ConfigError, PluginError: `config` names an API that is not installed, or that cannot be made.
        """
        self._config = config
        self._apis: list[Api] = []
        self._pages: dict[str, str] = {}
        """The owner of each page, by its path: the core's, and once they are known those of the APIs."""
        installed = plugins.classes(Kind.APIS)
        for name in dict.fromkeys((*installed, *config.apis)):
            options = config.apis.get(name, {})
            if options is False:
                if name not in installed:
                    _log.warning("[apis] %s = false: no installed plugin provides that API", name)
                continue
            try:
                self._apis.append(plugins.make(Kind.APIS, name, options, f"[apis.{name}]", folder))
            except (ConfigError, PluginError) as error:
                if name in config.apis:
                    raise
                _log.error("API %s is left out: %s", name, error)

    @property
    def serves_models(self) -> bool:
        """Whether this process serves models itself."""
        return self._config.models.any or any(_is(api, "brings_models") for api in self._apis)

    @property
    def awaits_models(self) -> bool:
        """Whether clients have yet to say which models to serve. Any thread."""
        return any(_is(api, "awaits_models") for api in self._apis)

    @property
    def recorded(self) -> list[FindRecorded]:
        """The functions that find recorded requests, one for each API."""
        return [api.recorded_requests for api in self._apis]

    def name_models(self) -> Mapping[str, NamedModel]:
        """The models to serve by name at the start.

        Raises:
            ConfigError, PluginError: an API fails; or several name models, of which each would replace the others'.
        """
        named = self._config.models.named
        given: dict[str, Mapping[str, NamedModel]] = {}
        for api in self._apis:
            with _naming(api, "name_models"):
                theirs = api.name_models(named, self._config)
            if theirs is not named:
                given[api.name] = theirs
        if len(given) > 1:
            raise PluginError(f"the APIs {' and '.join(given)} name models; expected at most one that does")
        return next(iter(given.values()), named)

    def methods(self, taken: Iterable[str]) -> tuple[dict[str, Protocol], dict[str, UnaryHandler]]:
        """The protocols of all methods that infer, and the coroutines that answer others, by method path.

        Args:
            taken: the method paths of the core.

        Raises:
            PluginError: an API fails; a method is taken, or its path is not one of gRPC's.
        """
        protocols: dict[str, Protocol] = {}
        handlers: dict[str, UnaryHandler] = {}
        owners = dict.fromkeys(taken, "the core")
        for api in self._apis:
            with _naming(api, "methods"):
                further = api.methods()
                for path in (*api.protocols, *further):
                    if not _METHOD.fullmatch(path):
                        raise PluginError(f"API {api.name}: {path!r} is not a method; expected /package.Service/Method")
                    if path in owners:
                        raise PluginError(f"API {api.name}: the method {path} is taken by {owners[path]}")
                    owners[path] = f"API {api.name}"
                protocols |= api.protocols
                handlers |= further
        return protocols, handlers

    def pages(self, readiness: Readiness, taken: Iterable[str]) -> list[Route]:
        """The pages of all APIs. Before `rest`.

        Args:
            taken: the paths of the core's pages.

        Raises:
            PluginError: an API fails, or a path is taken.
        """
        found: list[Route] = []
        self._pages = dict.fromkeys(taken, "the core")
        for api in self._apis:
            with _naming(api, "pages"):
                for page in api.pages(readiness):
                    if page.path in self._pages:
                        raise PluginError(f"API {api.name}: the page {page.path} is taken by {self._pages[page.path]}")
                    self._pages[page.path] = f"API {api.name}"
                    found.append(page)
        return found

    def rest(self, local: Local, dispatcher: Dispatcher, *, cors: bool) -> list[RestApi]:
        """The REST sides of all APIs.

        Raises:
            PluginError: an API fails; a path is that of a page, or lies above one; or it is, contains or lies below a
                path of another API.
        """
        found: list[RestApi] = []
        owners: dict[str, str] = {}
        for api in self._apis:
            with _naming(api, "rest"):
                made = api.rest(local, dispatcher, cors=cors)
                if made is None:
                    continue
                for path in made.paths:
                    below = [item for item in (*self._pages.items(), *owners.items()) if is_among(item[0], (path,))]
                    above = [item for item in owners.items() if is_among(path, (item[0],))]
                    for other, owner in (*below, *above):
                        raise PluginError(f"API {api.name}: the path {path} is taken by {owner}, which has {other}")
                owners |= dict.fromkeys(made.paths, f"API {api.name}")
                found.append(made)
        return found

    def start(self, repository: Repository) -> None:
        """Start all APIs.

        Raises:
            PluginError: an API fails.
        """
        for api in self._apis:
            with _naming(api, "start"):
                api.start(repository)

    async def reload(self) -> None:
        """Have all APIs look for changes. Errors are logged."""
        for api in self._apis:
            await _logging_errors(api, "reload")

    async def close(self) -> None:
        """Close all APIs. Errors are logged."""
        for api in self._apis:
            await _logging_errors(api, "close")


@contextmanager
def _naming(api: Api, what: str) -> Iterator[None]:
    """Turns errors of the API's own code into a PluginError that names the API."""
    try:
        yield
    except (ConfigError, PluginError):
        raise
    except Exception as error:
        raise PluginError(f"API {api.name}: {what} failed: {type(error).__name__}: {text_of(error)}") from error


def _is(api: Api, what: str) -> bool:
    with _naming(api, what):
        return bool(getattr(api, what))


async def _logging_errors(api: Api, what: str) -> None:
    error: BaseException | None
    try:
        # Not awaited here: where the API's own tasks have been cancelled, it raises CancelledError, too.
        (error,) = await asyncio.gather(getattr(api, what)(), return_exceptions=True)
    except Exception as raised:  # it is not a coroutine function
        error = raised
    if error is not None:
        _log.error("API %s: %s failed", api.name, what, exc_info=error)
