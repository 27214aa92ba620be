"""Which codecs decode requests: those that are named, or the best that can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from dl_inference_core.app import App
from dl_inference_core.checking import check
from dl_inference_core.config import Config
from dl_inference_core.errors import PluginError
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.wire import codecs, openinference
from dl_inference_core.wire.codecs import Codec, Codecs
from dl_inference_core.wire.protocol import PROTOCOLS

Installed: TypeAlias = Callable[..., Plugins]


class Marked:
    """The core's codec under another identity."""

    def __init__(self, core: Codec) -> None:
        self.decode_request, self.encode_response = core.decode_request, core.encode_response
        self.encode_request, self.decode_response = core.encode_request, core.decode_response


class Fast(Codecs):
    name = "fast"
    priority = 10

    def codec(self, at: str, core: Codec) -> Codec:
        return Marked(core) if at == "openinference" else core


class FastOnMusl(Fast):
    name = "fast"

    @classmethod
    def missing(cls) -> str:
        return "it needs glibc"


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    """Puts the process's codecs back."""
    before = codecs._Chosen.codecs
    yield
    codecs.use(before)


def test_auto_takes_the_highest_priority_that_can_run_here(installed: Installed) -> None:
    assert installed(Kind.CODECS, Fast).choose_codecs("auto")[0] == "fast"
    assert installed(Kind.CODECS).choose_codecs("auto")[0] == "python"
    assert installed(Kind.CODECS, FastOnMusl).choose_codecs("auto") == (
        "python",
        "fast cannot run here: it needs glibc",
    )


@pytest.mark.parametrize("name", ["fast", "python"])
def test_named_codecs_are_taken(installed: Installed, name: str) -> None:
    assert installed(Kind.CODECS, Fast).choose_codecs(name) == (name, "as configured")


def test_named_codecs_that_cannot_run_are_an_error_that_says_why(installed: Installed) -> None:
    with pytest.raises(PluginError, match='the codec "fast" cannot run here: it needs glibc'):
        installed(Kind.CODECS, FastOnMusl).choose_codecs("fast")
    with pytest.raises(PluginError, match='names the codec "fast", which no installed plugin provides'):
        installed(Kind.CODECS).choose_codecs("fast")


@pytest.mark.parametrize(("name", "used"), [("auto", "fast"), ("fast", "fast"), ("python", "python")])
async def test_a_process_with_models_uses_the_codecs_of_its_config_and_check_says_which(
    installed: Installed, tmp_path: Path, name: str, used: str
) -> None:
    config = Config.model_validate({"models": {"directory": tmp_path}, "codec": name, "transport": "grpcio"})
    app = App(config, installed(Kind.CODECS, Fast))
    try:
        rows = await check(app, config)
    finally:
        await app.close()
    assert [row["name"] for row in rows if row["kind"] == "codec"] == [used]
    codec = PROTOCOLS["openinference"].codec
    assert isinstance(codec, Marked) if used == "fast" else codec is openinference
    assert not isinstance(PROTOCOLS["seldon"].codec, Marked)
