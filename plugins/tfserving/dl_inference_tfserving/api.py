"""TensorFlow Serving's API beyond Predict, model status and metadata, which the core answers.

A gateway imports this module. What only a node needs is imported there.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from dl_inference_core.api import Api
from dl_inference_core.errors import ConfigError
from dl_inference_tfserving.options import TfServingOptions
from dl_inference_tfserving.protocols import CLASSIFY, MULTI_INFERENCE, REGRESS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from dl_inference_core.config import Config, NamedModel, PluginOptions
    from dl_inference_core.coroutines import UnaryHandler
    from dl_inference_core.dispatcher import Dispatcher
    from dl_inference_core.node.repository import Repository
    from dl_inference_core.rest.answering import Local
    from dl_inference_core.tensors import Request
    from dl_inference_core.wire.protocol import Protocol
    from dl_inference_tfserving.named_models import NamedModels
    from dl_inference_tfserving.rest import TfServingRest

RELOAD = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"


class TfServingApi(Api):
    """TensorFlow Serving's Classify, Regress, MultiInference, REST API, model_config_file, reload by clients, and
    recorded requests."""

    name = "tfserving"
    Options: ClassVar[type[PluginOptions]] = TfServingOptions
    protocols: ClassVar[Mapping[str, Protocol]] = MappingProxyType(
        {protocol.node_method: protocol for protocol in (CLASSIFY, REGRESS, MULTI_INFERENCE)}
    )
    options: TfServingOptions

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._models: NamedModels | None = None

    @property
    def brings_models(self) -> bool:
        return self.options.model_config_file is not None

    @property
    def awaits_models(self) -> bool:
        return self._models is not None and self.options.allow_remote_reload and not self._models.models

    def name_models(self, named: Mapping[str, NamedModel], config: Config) -> Mapping[str, NamedModel]:
        if self.options.allow_remote_reload and config.workers > 1:
            raise ConfigError(
                "[apis.tfserving]: allow_remote_reload needs workers = 1: a client's request reaches only one worker"
            )
        from dl_inference_tfserving.named_models import NamedModels

        self._models = NamedModels(named, self.options)
        return self._models.models

    def recorded_requests(self, folder: Path) -> Iterable[tuple[str, Request]]:
        from dl_inference_tfserving.recorded import recorded_requests

        return recorded_requests(folder)

    def methods(self) -> Mapping[str, UnaryHandler]:
        return {} if self._models is None else {RELOAD: self._models.reload}

    def rest(self, local: Local, dispatcher: Dispatcher, *, cors: bool) -> TfServingRest:
        from dl_inference_tfserving.rest import TfServingRest

        return TfServingRest(local, dispatcher, cors=cors)

    def start(self, repository: Repository) -> None:
        assert self._models is not None
        self._models.start(repository)

    async def reload(self) -> None:
        if self._models is not None:
            await self._models.look()

    async def close(self) -> None:
        if self._models is not None:
            await self._models.close()
