"""What seldon-core serves: one row at a time, as it has no batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.model_servers.models import Floats
from bench.model_servers.serving.served import Served


class Predictor:
    def __init__(self) -> None:
        self._served: Served | None = None

    def load(self) -> None:
        """Called in the process that answers."""
        self._served = Served()

    def predict(self, rows: Floats, names: Sequence[str], meta: Any = None) -> Floats:
        if self._served is None:
            self.load()
        assert self._served is not None
        return self._served(rows.reshape(-1, *self._served.model.shape))
