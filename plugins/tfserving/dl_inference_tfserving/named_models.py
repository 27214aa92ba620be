"""The models that lie outside the folder of models: named in our config, in a `model_config_file`, or by a client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import BadRequest, Code, ConfigError, PermissionDenied, ReloadFailed
from dl_inference_core.files import FileWatcher
from dl_inference_core.node.model import ServedModel, State
from dl_inference_core.node.repository import Repository
from dl_inference_core.transport import Exchange
from dl_inference_core.wire import messages
from dl_inference_tfserving import model_config
from dl_inference_tfserving.options import TfServingOptions

_log = logging.getLogger(__name__)


class NamedModels:
    """Which models a repository has by name, kept as the file or the last client says. Event loop only."""

    def __init__(self, named: Mapping[str, NamedModel], options: TfServingOptions) -> None:
        """Args:
        named: the models that our own config names.

        Raises:
            ConfigError: the `model_config_file` cannot be used, or names one of `named`.
        """
        self._named = named
        self._options = options
        self._file: FileWatcher | None = None
        self._pending: bytes | None = None
        """What the file said at the last look, if it could not be taken."""
        self._complaint = ""
        """Why the last look failed."""
        self._looking = asyncio.Lock()  # SIGHUP may ask for a look while the one of the interval goes on
        self._repository: Repository
        self._tasks: set[asyncio.Task[None]] = set()
        self._ours = named
        if options.model_config_file is not None:
            # A change counts at the first look, as in TensorFlow Serving: looks may be minutes apart.
            self._file = FileWatcher(options.model_config_file, patience=0)
            self._ours = self._with_ours(model_config.parse(self._file.read(), options.model_config_file) or {})
        self.models = self._ours
        """By name, as of now."""

    def start(self, repository: Repository) -> None:
        """From now on have `repository`, which was made with `models`, follow."""
        self._repository = repository
        if self._file is not None and self._options.model_config_poll_interval_ms:
            self._spawn(asyncio.create_task(self._watch(), name="watch the model_config_file"))

    async def close(self) -> None:
        """Follow nothing any more. Before the repository is closed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def reload(self, exchange: Exchange) -> bytes:
        """TensorFlow Serving's HandleReloadConfigRequest: the models that it names take the place of all those named
        before, and the answer comes when each has loaded or failed. A client that leaves does not undo it. Sources in
        a folder that only a client names are not run.

        Raises:
            PermissionDenied: clients may not.
            BadRequest: the request names what cannot be; nothing has changed.
            ReloadFailed: it has been done, but a model, a version or a label that it names is not there.
        """
        if not self._options.allow_remote_reload:
            raise PermissionDenied(
                "this server takes no config from clients; to allow it, set allow_remote_reload = true under "
                "[apis.tfserving]"
            )
        config = messages.parse(messages.ReloadConfigRequest, exchange.message).config
        if config.WhichOneof("config") != "model_config_list":
            raise BadRequest(
                "ServerModelConfig type not supported by HandleReloadConfigRequest."
                " Only ModelConfigList is currently supported"
            )
        try:
            models = model_config.named_models(config, "ReloadConfigRequest")
        except ConfigError as error:
            raise BadRequest(str(error)) from error
        for name, model in models.items():
            platform = model.settings.get("backend")
            if platform is not None and platform not in self._repository.backends:
                known = ", ".join(sorted(self._repository.backends)) or "none"
                raise BadRequest(
                    f"Model {name} requests unsupported platform {platform[:100]}; the platforms are {known}"
                )
        trusted = {model.path for model in self._ours.values() if model.sources}
        models = {name: model.model_copy(update={"sources": model.path in trusted}) for name, model in models.items()}
        _log.info("a client has replaced the models: %s", ", ".join(models) or "none")
        await asyncio.shield(self._spawn(asyncio.create_task(self._replace_and_wait(models))))
        _check(models, self._repository.models)
        response = messages.ReloadConfigResponse(status={"error_code": Code.OK})
        return response.SerializeToString()  # type: ignore[no-any-return]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._options.model_config_poll_interval_ms / 1000)
            await self.look()

    async def look(self) -> None:
        """Look at the `model_config_file`, if there is one, and take over what has changed. What goes wrong is logged,
        once, and changes nothing."""
        if self._file is not None:
            async with self._looking:
                await self._look(self._file)

    async def _look(self, file: FileWatcher) -> None:
        before, self._complaint = self._complaint, ""
        try:
            content = await asyncio.to_thread(file.look)
            if file.complaint:
                raise ConfigError(file.complaint)
            self._pending = self._pending if content is None else content
            models = model_config.parse(self._pending, file.path) if self._pending is not None else None
            if models is not None:  # a file without any list is being written
                self._ours = self._with_ours(models)
                await self._replace(self._ours)
            self._pending = None
        except (ConfigError, OSError) as error:
            self._complaint = str(error)
            if self._complaint != before:
                _log.warning("keeping the current models: %s", error)
        except Exception as error:
            self._complaint = repr(error)
            if self._complaint != before:
                _log.exception("following %s failed", file.path)

    def _with_ours(self, models: Mapping[str, NamedModel]) -> Mapping[str, NamedModel]:
        if both := sorted(models.keys() & self._named.keys()):
            raise ConfigError(f"{self._options.model_config_file}: our own config names the model {both[0]}, too")
        return {**self._named, **models}

    async def _replace(self, models: Mapping[str, NamedModel]) -> None:
        self.models = models
        await self._repository.replace_named(models)

    async def _replace_and_wait(self, models: Mapping[str, NamedModel]) -> None:
        await self._replace(models)
        await self._repository.loaded(models)

    def _spawn(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _check(named: Mapping[str, NamedModel], served: Mapping[str, ServedModel]) -> None:
    """Raises:
    ReloadFailed: in TensorFlow Serving's words, if something of `named` is not there.
    """
    missing = [problem for name, model in named.items() for problem in _missing(name, model, served.get(name))]
    if missing:
        listed = "".join(f"{{{problem}}}, " for problem in missing)
        raise ReloadFailed(f"{len(missing)} servable(s) did not become available: {{{listed}}}")
    for name, model in named.items():
        for version in model.settings.get("version_labels", {}).values():
            if version not in _available(served[name]):
                raise ReloadFailed(
                    f"Request to assign label to version {version} of model {name}, which is not currently available "
                    "for inference",
                    Code.FAILED_PRECONDITION,
                )


def _missing(name: str, model: NamedModel, served: ServedModel | None) -> Iterator[str]:
    """What of the model `name` is not there as it was asked for, and why; what older files answer is not."""
    if served is None:
        yield f"name: {name} due to error: another config has taken its place"
    elif served.refusal:
        yield f"name: {name} due to error: {served.refusal}"
    else:
        asked = model.settings["versions"]
        statuses = served.versions
        wanted = asked if isinstance(asked, tuple) else sorted(n for n, status in statuses.items() if status.error)
        if not wanted and not served.ready:
            yield f"name: {name} due to error: there is no version in {model.path}"
        for version in wanted:
            status = statuses.get(version)
            if status is None:
                yield f"{{name: {name} version: {version}}} due to error: it is not in {model.path}"
            elif status.error or status.state is not State.AVAILABLE:
                yield f"{{name: {name} version: {version}}} due to error: {status.error or status.state.value}"


def _available(served: ServedModel) -> set[int]:
    return {version for version, status in served.versions.items() if status.state is State.AVAILABLE}
