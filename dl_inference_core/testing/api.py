"""The suite for APIs."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import subprocess
import sys
from typing import Any, ClassVar

import pytest

from dl_inference_core.api import Api
from dl_inference_core.errors import InferenceError
from dl_inference_core.testing.plugin import PluginConformance
from dl_inference_core.wire.protocol import Protocol

_PATH = re.compile(r"/[\w.]+/\w+")

# What a gateway does with an API before the first request.
_ON_A_GATEWAY = """
import asyncio, sys
from {module} import {name}
from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.introspection import Readiness
from dl_inference_core.metrics import Metrics
from dl_inference_core.rest.answering import Local
from dl_inference_core.routing import Routes
api = {name}({name}.Options.model_validate_json({options!r}))
api.brings_models, api.awaits_models
for protocol in api.protocols.values():
    try:
        protocol.read_key(bytes([255]))
    except Exception:
        pass
api.methods()
readiness = Readiness()
api.pages(readiness)

async def rest():
    api.rest(Local(None, None, readiness), Dispatcher(Routes(), Metrics()), cors=False)

asyncio.run(rest())
print([name for name in ("numpy", "torch", "tensorflow") if name in sys.modules])
"""


class ApiConformance(PluginConformance):
    """What every API must keep::

    class TestLoud(ApiConformance):
        api_class = Loud
    """

    api_class: ClassVar[type[Api]]

    @pytest.fixture
    def api(self) -> Api:
        return self.api_class(self.api_class.Options(**self.options))

    def test_class_is_complete(self) -> None:
        plain = ("name_models", "recorded_requests", "methods", "rest", "pages", "start")
        self._check_class(self.api_class, Api, plain)
        for name in ("reload", "close"):
            assert inspect.iscoroutinefunction(getattr(self.api_class, name)), f"{name} must be a coroutine function"

    def test_options_are_strict(self) -> None:
        self._check_options(self.api_class.Options, self.options)

    def test_paths_are_those_of_grpc(self, api: Api) -> None:
        protocols: dict[str, Protocol] = dict(api.protocols)
        paths = [*protocols, *(protocol.node_method for protocol in protocols.values()), *api.methods()]
        wrong = [path for path in paths if not _PATH.fullmatch(path)]
        assert not wrong, "expected /package.Service/Method"

    def test_every_protocol_has_its_codec(self, api: Api) -> None:
        for path, protocol in api.protocols.items():
            assert protocol.codec_at, f"{path}: without a codec no model can answer"
            codec: Any = protocol.codec
            wanted = ("decode_requests", "encode_response", "join")
            for name in wanted if protocol.several else ("decode_request", "encode_response"):
                assert callable(getattr(codec, name, None)), f"{path}: its codec has no {name}"

    def test_malformed_bytes_have_no_key(self, api: Api) -> None:
        for path, protocol in api.protocols.items():
            try:
                key = protocol.read_key(b"\xff")
            except InferenceError:
                continue
            pytest.fail(f"{path}: malformed bytes have the key {key}")

    def test_a_gateway_imports_no_framework(self) -> None:
        """On a gateway an API forwards bytes: numpy would take 20 MB of each process."""
        code = _ON_A_GATEWAY.format(
            module=self.api_class.__module__,
            name=self.api_class.__name__,
            options=json.dumps(self.options, default=str),
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)  # noqa: S603 - its own
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"

    def test_it_may_be_closed_before_it_has_started(self, api: Api) -> None:
        asyncio.run(api.close())
