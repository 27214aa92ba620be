"""Routing key → upstream: what answers the requests for one model, here or on other nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol as Interface

from dl_inference_core.errors import ModelNotFound
from dl_inference_core.transport import Call
from dl_inference_core.wire.protocol import Protocol


class Upstream(Interface):
    """What answers the requests for one model or task."""

    @property
    def name(self) -> str:
        """What metrics and messages call it."""

    @property
    def ready(self) -> bool:
        """Whether a request would now be answered."""

    async def answer(self, call: Call, protocol: Protocol) -> bytes:
        """The answer to `call`, whose request is one of `protocol`, which may be a question about the model.

        Raises:
            InferenceError: any failure, of whatever class says best whose fault it is.
        """


class Table(Interface):
    """Upstreams from one source. Both mappings may be replaced by others while running."""

    @property
    def models(self) -> Mapping[str, Upstream]:
        """By name."""

    @property
    def tasks(self) -> Mapping[int, Upstream]:
        """By task id."""


class Routes:
    """Every upstream; what this process serves itself comes before what other nodes serve."""

    def __init__(self, *tables: Table) -> None:
        """Args:
        tables: looked up in this order.
        """
        self._tables = tables

    def find(self, key: str | int) -> Upstream:
        """The upstream for a routing key: a name is looked up whole; if no route has it, the digits after its last "-"
        (all of it, if there is none) are the task id.

        Raises:
            ModelNotFound: there is no such route.
        """
        if isinstance(key, str):
            for table in self._tables:
                if key in table.models:
                    return table.models[key]
            head, dash, digits = key.rpartition("-")
            # 19 digits hold every task id; int() of many more would be slow.
            if (dash and not head) or not (len(digits) <= 19 and digits.isascii() and digits.isdecimal()):
                raise _not_found(key)
            task = int(digits)
        else:
            task = key
        for table in self._tables:
            if task in table.tasks:
                return table.tasks[task]
        raise _not_found(str(key))

    @property
    def ready(self) -> bool:
        """Whether any upstream is."""
        return any(
            upstream.ready
            for table in self._tables
            for upstreams in (table.models, table.tasks)
            for upstream in upstreams.values()
        )


def _not_found(key: str) -> ModelNotFound:
    name = key if len(key) <= 100 else f"{key[:100]}…"
    # The first words are TensorFlow Serving's, whose clients look for them.
    return ModelNotFound(f'Servable not found for request: Latest({name}); no model or task is named "{name}"')
