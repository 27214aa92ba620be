"""Which codecs this process uses: the core's own or a plugin's. Imports neither numpy nor a codec."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Protocol, cast

from dl_inference_core.choosable import Choosable
from dl_inference_core.config import PluginOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dl_inference_core.tensors import Request, Response


class Codec(Protocol):
    """What every codec offers. Arrays that come out of it may be read-only."""

    def decode_request(self, body: bytes) -> Request:
        """Raises:
        BadRequest: `body` is malformed, or asks for what is not served.
        """

    def encode_response(self, response: Response, request: Request) -> bytes:
        """The answer to `request`, in its form where that can hold it. The caller fills `response` in anew for the next
        answer, so a codec must not keep it.

        Raises:
            BadRequest: this form of the protocol would change a value that another form or protocol can hold.
            TypeError: the protocol cannot hold the payload.
        """

    def encode_request(self, request: Request) -> bytes:
        """Raises:
        TypeError: the protocol cannot hold the payload.
        """

    def decode_response(self, body: bytes) -> Response:
        """Raises:
        BadRequest: `body` is malformed.
        """


class SeveralCodec(Protocol):
    """The codec of a call that asks several of a model's signatures."""

    def decode_requests(self, body: bytes) -> Sequence[Request]:
        """The requests of one call, at least one.

        Raises:
            InferenceError: as `Codec.decode_request`.
        """

    def encode_response(self, response: Response, request: Request) -> bytes:
        """As `Codec.encode_response`."""

    def join(self, requests: Sequence[Request], answers: Sequence[bytes]) -> bytes:
        """The answer to the call. `answers` are those of `encode_response`, one for each of `requests`."""


class Codecs(Choosable):
    """A set of codecs. Any thread may use them, several at the same time."""

    @abstractmethod
    def codec(self, at: str, core: Codec) -> Codec:
        """The codec to use in place of the core's codec: one with the same results and the same errors.

        Args:
            at: `Protocol.codec_at`, which says what protocol the codec is for.
            core: the core's codec, which is to be returned where the set has none for that protocol.
        """


class CoreCodecs(Codecs):
    """The core's own codecs, in Python."""

    name = "python"

    def codec(self, at: str, core: Codec) -> Codec:
        return core


class _Chosen:
    """The set that this process uses. Wire protocols are constants of the process, so their codecs are too."""

    codecs: Codecs = CoreCodecs(PluginOptions())


def use(codecs: Codecs) -> None:
    """Use this set from now on. To be called at start, on the main thread: requests keep the codecs they have."""
    _Chosen.codecs = codecs


def find(at: str) -> Codec:
    """The codec that `Protocol.codec_at` names: of the core's codecs that of the set in use, an API's own as it is.
    Imports it, and numpy with it."""
    module, _, attribute = at.partition(":")
    found: Any = importlib.import_module(module if "." in module else f"dl_inference_core.wire.{module}")
    codec = cast("Codec", getattr(found, attribute) if attribute else found)
    return codec if "." in module else _Chosen.codecs.codec(at, codec)
