"""A process with models uses the native codecs where they are installed, unless its config says otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dl_inference_core.app import App
from dl_inference_core.config import Config, PluginOptions
from dl_inference_core.plugins import Plugins
from dl_inference_core.wire import codecs
from dl_inference_core.wire.protocol import OPENINFERENCE_AS_REQUESTED, PROTOCOLS

native = pytest.importorskip("dl_inference_native", reason="the extension is not built")

PLAIN = {name: PROTOCOLS[name] for name in ("openinference", "tfserving", "seldon")}


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    """Puts the process's codecs back."""
    before = codecs._Chosen.codecs
    yield
    codecs.use(before)


async def make_app(folder: Path, codec: str) -> str:
    entries = [("core", "dl_inference_core.builtins"), ("native", "dl_inference_native")]
    plugins = Plugins([EntryPoint(name, module, "dl_inference_core") for name, module in entries])
    # The app belongs to the loop that it is made on.
    app = App(Config.model_validate({"models": {"directory": folder}, "codec": codec}), plugins)
    await app.close()
    return app.codecs[0]


@pytest.mark.parametrize("codec", ["auto", "native"])
def test_the_native_codecs_are_used(tmp_path: Path, codec: str) -> None:
    assert asyncio.run(make_app(tmp_path, codec)) == "native"
    for protocol in (*PLAIN.values(), OPENINFERENCE_AS_REQUESTED):
        assert type(protocol.codec).__module__ == "dl_inference_native"
        assert protocol.codec is protocol.codec


def test_a_config_can_say_that_they_are_not(tmp_path: Path) -> None:
    assert asyncio.run(make_app(tmp_path, "python")) == "python"
    for protocol in PLAIN.values():
        assert type(protocol.codec).__name__ == "module"


def test_protocols_without_a_native_codec_keep_the_cores() -> None:
    before = PROTOCOLS["tfserving_classify"].codec
    codecs.use(native.NativeCodecs(PluginOptions()))
    assert PROTOCOLS["tfserving_classify"].codec is before
