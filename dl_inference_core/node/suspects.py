"""Clients whose requests keep failing in the model: their requests share no batch with other clients' requests."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dl_inference_core.transport import Metadata

_CLIENT_KEYS = frozenset({"authorization", "x-api-key", "x-client-id"})
"""Metadata that names a client, also behind a gateway."""
_ISOLATED_AT, _HIGHEST = 3, 8
"""Scores: each failure adds one, each success takes one. A client with three failures more than successes is isolated.
Because no score is above eight, a client that has mended its requests shares batches again after eight successes."""
_MOST_CLIENTS = 1024


def client_of(metadata: Metadata) -> int | None:
    """What stands for the client that sent a request; None if the request does not name its client. Never an address:
    that would be a gateway's."""
    for key, value in metadata:
        if key in _CLIENT_KEYS:
            return hash((key, value))
    return None


class Suspects:
    """The score of each client that lately failed. Any thread.

    Attributes:
        any: whether there are any.
    """

    def __init__(self) -> None:
        self._scores: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self.any = False

    def failed(self, client: int | None) -> None:
        """A request of `client` failed alone in the model."""
        if client is None:
            return
        with self._lock:
            self._scores[client] = min(self._scores.pop(client, 0) + 1, _HIGHEST)
            if len(self._scores) > _MOST_CLIENTS:
                self._scores.popitem(last=False)
            self.any = True

    def succeeded(self, client: int | None) -> None:
        """The model answered a request of `client`."""
        if client is None or client not in self._scores:
            return
        with self._lock:
            score = self._scores.pop(client, 0) - 1
            if score > 0:
                self._scores[client] = score
            self.any = bool(self._scores)

    def isolates(self, client: int | None) -> bool:
        """Whether requests of `client` are kept apart."""
        return client is not None and self._scores.get(client, 0) >= _ISOLATED_AT
