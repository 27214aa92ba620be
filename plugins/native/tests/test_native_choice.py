"""What a process that uses the native plugins has of them: codecs, and the interpreter's switch interval."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from dl_inference_tfserving.protocols import CLASSIFY

from dl_inference_core.app import App
from dl_inference_core.config import Config, PluginOptions
from dl_inference_core.plugins import Plugins
from dl_inference_core.testing.loopback import serving
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
    before = CLASSIFY.codec
    codecs.use(native.NativeCodecs(PluginOptions()))
    assert CLASSIFY.codec is before


@pytest.mark.parametrize(("given", "left"), [(0.005, 0.0005), (0.0001, 0.0001)])
async def test_serving_lowers_the_switch_interval_and_leaves_a_shorter_one(given: float, left: float) -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(given)
        async with serving(native.NativeTransport(native.NativeTransport.Options())):
            assert sys.getswitchinterval() == pytest.approx(left)
    finally:
        sys.setswitchinterval(before)
