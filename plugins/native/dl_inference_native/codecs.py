"""The set of codecs that the core can choose."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dl_inference_core.wire.codecs import Codec, Codecs
from dl_inference_native._native import Codec as NativeCodec

if TYPE_CHECKING:
    from dl_inference_core.config import PluginOptions

_NATIVE = frozenset({"openinference", "openinference:AS_REQUESTED", "tfserving", "seldon"})


class NativeCodecs(Codecs):
    """Codecs in Rust: plain messages are read and written there, all others by the core's codecs."""

    name: ClassVar[str] = "native"
    priority: ClassVar[int] = 10

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._made: dict[str, Codec] = {}

    def codec(self, at: str, core: Codec) -> Codec:
        if at not in _NATIVE:
            return core
        if at not in self._made:
            self._made[at] = NativeCodec(at, core)
        return self._made[at]
