"""A node that makes itself known to gateways, by `protos/registry.proto`, for as long as it can be asked."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from dl_inference_core.config import JoinConfig, read_token
from dl_inference_core.errors import BadRequest, InferenceError, NodeFailed
from dl_inference_core.transport import Connection
from dl_inference_core.wire import messages

_log = logging.getLogger(__name__)

_CALL_S = 1.0
_LOOK_S = 0.1
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0

Models = Callable[[], Mapping[str, int | None]]
"""The task id of each model that can be asked for now, by its name."""


class Joining:
    """Keeps this process registered with every gateway of a `JoinConfig`. Event loop only."""

    def __init__(self, config: JoinConfig, connect: Callable[[str], Connection], models: Models) -> None:
        """Args:
        connect: makes the connection to a gateway's address.

        Raises:
            ConfigError: the token's file cannot be used.
        """
        token = read_token(config.token_file)
        self._config = config
        self._connect = connect
        self._models = models
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._instance = uuid.uuid4().hex
        self._gateways: list[_Gateway] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, address: str) -> None:
        """Register, now and for as long as `leave` is not called.

        Args:
            address: where gateways reach this process.
        """
        for gateway in self._config.gateways:
            joined = _Gateway(gateway, self._connect(gateway), self._metadata)
            self._gateways.append(joined)
            self._tasks.append(asyncio.create_task(self._keep(joined, address), name=f"stay with {gateway}"))

    async def leave(self) -> None:
        """Have every gateway send no more requests; for a second at most."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        left = await asyncio.gather(*(gateway.leave() for gateway in self._gateways), return_exceptions=True)
        for error in left:
            if isinstance(error, Exception):
                _log.error("to leave a gateway failed", exc_info=error)
        self._gateways.clear()

    async def _keep(self, gateway: _Gateway, address: str) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                models = self._models()
                lease_s = await gateway.register(self._request(address, models))
                if lease_s is not None:
                    pause_s = _FIRST_PAUSE_S
                    await self._until_changed(models, lease_s / 3 * _jitter())
                    continue
            except Exception as error:
                gateway.complain(logging.ERROR, "to register this node failed, and will be tried again", error)
            await asyncio.sleep(pause_s * _jitter())
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _request(self, address: str, models: Mapping[str, int | None]) -> Any:
        return messages.RegisterRequest(
            address=address,
            instance=self._instance,
            weight=self._config.weight,
            models=[{"name": name, "task_id": task} for name, task in models.items()],
            lease_ms=self._config.lease_ms,
        )

    async def _until_changed(self, models: Mapping[str, int | None], within_s: float) -> None:
        """Wait until the models are others than `models`, or `within_s` seconds have passed."""
        end = time.monotonic() + within_s
        while (left_s := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, _LOOK_S))
            if self._models() != models:
                return


class _Gateway:
    """One gateway, and what this process has told it."""

    def __init__(self, address: str, connection: Connection, metadata: tuple[tuple[str, str], ...]) -> None:
        self._address = address
        self._connection = connection
        self._metadata = metadata
        self._registered: Any = None
        self._complained = logging.NOTSET

    async def register(self, request: Any) -> float | None:
        """The seconds of the lease, None if there is none."""
        try:
            self._registered = request
            answer = await self._call("Register", request)
            lease_ms = messages.parse(messages.RegisterResponse, answer).lease_ms
            if lease_ms <= 0:
                raise NodeFailed("the answer gives no lease")
        except BadRequest as error:
            self.complain(logging.ERROR, f"this node gets no requests from it, which refuses to register it: {error}")
            return None
        except InferenceError as error:
            why = f"{error.code.name}: {error}"
            self.complain(logging.WARNING, f"this node cannot register, and will try again: {why}")
            return None
        if self._complained:
            self._complained = logging.NOTSET
            _log.warning("gateway %s: this node is registered now", self._address)
        return float(lease_ms / 1000)

    def complain(self, level: int, message: str, error: Exception | None = None) -> None:
        """Log why this process is not registered; of several times in a row the first, and the first that is worse."""
        if level > self._complained:
            self._complained = level
            _log.log(level, "gateway %s: %s", self._address, message, exc_info=error)

    async def leave(self) -> None:
        """Say that this process goes, if the gateway may think it there, and close the connection."""
        registered = self._registered
        if registered is not None:
            request = messages.DeregisterRequest(address=registered.address, instance=registered.instance)
            try:
                await self._call("Deregister", request)
            except InferenceError as error:
                why = f"{error.code.name}: {error}"
                _log.warning("gateway %s: this node goes, and cannot say so: %s", self._address, why)
        await self._connection.close()

    async def _call(self, method: str, request: Any) -> Any:
        path = f"{messages.REGISTRY}/{method}"
        body = request.SerializeToString()
        return (await self._connection.call(path, body, metadata=self._metadata, timeout_s=_CALL_S)).message


def _jitter() -> float:
    return random.uniform(0.75, 1)  # noqa: S311 - jitter
