"""Routing key → upstream: what answers the requests for one model, here or on other nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol as Interface

from dl_inference_core.errors import BadRequest, ModelNotFound
from dl_inference_core.transport import Exchange
from dl_inference_core.wire.protocol import Protocol
from dl_inference_core.wire.routing_keys import RoutingKey


class Upstream(Interface):
    """What answers the requests for one model or task."""

    @property
    def name(self) -> str:
        """What metrics and messages call it."""

    @property
    def ready(self) -> bool:
        """Whether a request would now be answered."""

    def begin_all(self, exchanges: Sequence[Exchange], protocol: Protocol, key: RoutingKey) -> None:
        """Answer or fail each of `exchanges`, now or later. Any thread.

        Args:
            protocol: of the messages, which may be questions about the model.
            key: what `protocol.read_key` gave for each of the messages.
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

    def find_for(self, exchange: Exchange, protocol: Protocol) -> tuple[Upstream, RoutingKey]:
        """The upstream for `exchange`: by the key in its bytes; else by the metadata that may name a model; else the
        only upstream there is. And the key.

        The metadata counts only if an upstream has that name. Seldon's clients put the name of a deployment there, for
        an ingress that has already used it; the model behind the ingress may be called otherwise.

        A call that goes to the only upstream gets the upstream's name in that metadata, so that the node which a
        gateway forwards the call to finds the same model. A name that a header cannot hold stays away.

        Raises:
            BadRequest: the key is malformed; or the call names no model, and there are several.
            ModelNotFound: there is no such upstream, or none at all.
        """
        key = exchange.key or protocol.read_key(exchange.message)
        model = key.model
        return self._find_unkeyed(exchange, protocol) if model is None else self.find(model), key

    def _find_unkeyed(self, exchange: Exchange, protocol: Protocol) -> Upstream:
        label = protocol.key_metadata
        given = exchange.find_metadata(label) if label else None
        named = given if isinstance(given, str) else ""
        upstream = self._find_or_none(named) if named else None
        if upstream is not None:
            return upstream
        upstreams = self.upstreams(2)
        if not upstreams:
            raise ModelNotFound("Servable not found for request: this server has no models and no routes")
        if len(upstreams) > 1:
            unknown = f', and no model is named "{named[:100]}", the name of its deployment' if named else ""
            raise BadRequest(
                f"the request does not name a model{unknown}; this server has several, so the request must: "
                f"expected {protocol.key_expected}"
            )
        (only,) = upstreams
        exchange.metadata = tuple(pair for pair in exchange.metadata if pair[0] != label)
        if only.name.isascii() and only.name.isprintable() and only.name == only.name.strip():
            exchange.metadata += ((label, only.name),)
        return only

    def _find_or_none(self, name: str) -> Upstream | None:
        try:
            return self.find(name)
        except ModelNotFound:
            return None

    def upstreams(self, most: int) -> list[Upstream]:
        """Different upstreams that `find` can give, up to that many, whether they are ready or not."""
        found: list[Upstream] = []
        seen: set[str | int] = set()
        for table in self._tables:
            for upstreams in (table.models, table.tasks):
                for key, upstream in upstreams.items():
                    if key not in seen and not any(upstream is other for other in found):
                        found.append(upstream)
                        if len(found) == most:
                            return found
                    seen.add(key)
        return found

    def find(self, key: str | int) -> Upstream:
        """The upstream for the model of a routing key: a name is looked up whole; if no route has it, the digits after
        its last "-" (all of it, if there is none) are the task id.

        Raises:
            ModelNotFound: there is no such route.
        """
        if isinstance(key, str):
            for table in self._tables:
                found = table.models.get(key)
                if found is not None:
                    return found
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
