"""SavedModels for the tests, and nodes that serve them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dl_inference_tf_backend.testing import SavedModelMaker

from dl_inference_core.app import App
from dl_inference_core.config import Config
from dl_inference_core.plugins import Plugins

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(scope="session")
def make_saved() -> SavedModelMaker:
    return SavedModelMaker()


@pytest.fixture(scope="session")
def saved(make_saved: SavedModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a SavedModel by the name of the maker's method; made once."""
    root = tmp_path_factory.mktemp("saved")

    def folder(kind: str) -> Path:
        path = root / kind / "1"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            getattr(make_saved, kind)(path)
        return path

    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node in this process, and its ports on 127.0.0.1."""

    grpc_port: int
    http_port: int

    def ask(self, path: str, document: Any = None) -> tuple[int, Any]:
        """The status and the JSON of the answer to a REST request; `document` may also be the body itself."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=30)) as connection:
            body = document if isinstance(document, str | None) else json.dumps(document)
            connection.request("GET" if body is None else "POST", f"/v1/models/{path}", body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())


@contextlib.contextmanager
def serving(config: Config) -> Iterator[Node]:
    """A node of that config, whose `http_port` is set, on a thread of its own."""
    started, ending = threading.Event(), asyncio.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        app = App(config, Plugins())
        try:
            (found["grpc_port"],) = await app.serve(f"127.0.0.1:{config.port}")
            found.update(http_port=app.http_port, loop=asyncio.get_running_loop())
        finally:
            started.set()
        await ending.wait()
        await app.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(120)
    try:
        yield Node(grpc_port=found["grpc_port"], http_port=found["http_port"])
    finally:
        found["loop"].call_soon_threadsafe(ending.set)
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve_node() -> Callable[[Config], contextlib.AbstractContextManager[Node]]:
    return serving
