"""A model gets new versions while it is served, under load, through a gateway."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dl_inference_core.client import Client
from dl_inference_core.errors import InferenceError

NAMES = ("steady", "broken", "withdrawn")
X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


class Load:
    """Requests from several clients at once, each checked: what it asked for, and which version answered."""

    def __init__(self, address: str, name: str, make: Any, factors: dict[int, float]) -> None:
        self.answered: Counter[tuple[int | None, int | None]] = Counter()
        self.wrong: list[str] = []
        self._address = address
        self._name = name
        self._expected = {version: make.answer(X, factor) for version, factor in factors.items()}
        self._ended = threading.Event()

    @contextmanager
    def running(self, *asked: int | None) -> Iterator[Load]:
        threads = [threading.Thread(target=self._work, args=(version,)) for version in asked]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(30)

    def _work(self, asked: int | None) -> None:
        with Client(self._address) as client:
            while not self._ended.is_set():
                for protocol in ("tfserving", "openinference"):
                    try:
                        response = client.predict(self._name, {"x": X}, protocol=protocol, version=asked)
                    except InferenceError as error:
                        self.wrong.append(f"{asked}: {error.code.name} {error}")
                        continue
                    expected = self._expected.get(response.version)
                    if expected is None or not np.array_equal(response.payload["y"], expected):
                        self.wrong.append(f"{asked}: {response}")
                    self.answered[asked, response.version] += 1


@pytest.fixture(scope="module")
def root(make: Any, transport: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models for each transport, since the tests add versions to it."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make.linear(root / name / "1", 1)
    return root


@pytest.fixture(scope="module")
def node(serve: Any, root: Path) -> Iterator[Any]:
    """A node that looks for new versions often."""
    node = serve(f'[models]\ndirectory = "{root}"\npoll_interval_ms = 20\n[backends.torch]\nintra_op_threads = 1')
    yield node
    node.end()


@pytest.fixture(scope="module")
def gateway(serve: Any, routes: Any, node: Any) -> Iterator[Any]:
    gateway = serve(routes({name: 7 + number for number, name in enumerate(NAMES)}, node))
    yield gateway
    gateway.end()


def test_versions_come_and_go_under_load(
    node: Any, gateway: Any, root: Path, make: Any, wait_for: Callable[..., Any]
) -> None:
    folder = root / "steady"
    load = Load(gateway.address, "steady", make, {1: 1, 2: 10, 4: 100})

    def seen(asked: int | None, version: int, more: int = 50) -> None:
        target = load.answered[asked, version] + more
        wait_for(f"answers of version {version}", lambda: load.wrong or load.answered[asked, version] >= target)

    with load.running(None, None, 1):
        seen(None, 1)
        seen(1, 1)
        # A second version appears: requests that name none are answered by it from then on, those that name 1 by 1.
        make.linear(folder / "2", 10)
        seen(None, 2)
        before = load.answered[None, 1]
        seen(None, 2, 200)
        assert load.answered[None, 1] == before
        assert load.answered[1, 2] == 0
        # A third is broken: it says why, and nobody notices.
        (folder / "3").mkdir()
        (folder / "3/model.pt2").write_bytes(b"this is no model")
        node.written('"steady" version 3', "model.pt2")
        seen(None, 2, 100)
        seen(1, 1, 50)
        with Client(gateway.address) as client:
            with pytest.raises(InferenceError) as caught:
                client.predict("steady", {"x": X}, version=3)
            assert caught.value.code.value == grpc.StatusCode.UNAVAILABLE.value[0]
            assert "failed" in str(caught.value)
    assert not load.wrong, load.wrong[:5]
    assert load.answered.keys() == {(None, 1), (None, 2), (1, 1)}


def test_a_broken_version_is_replaced_by_a_good_one_and_the_oldest_leaves_without_a_loss(
    node: Any, gateway: Any, root: Path, make: Any, wait_for: Callable[..., Any]
) -> None:
    folder = root / "broken"
    load = Load(gateway.address, "broken", make, {1: 1, 2: 10, 3: 100})
    with load.running(None, None):
        (folder / "3").mkdir()
        (folder / "3/model.pt2").write_bytes(b"this is no model")
        node.written('"broken" version 3', "model.pt2")
        make.linear(folder / "2", 10)
        wait_for("version 2", lambda: load.wrong or load.answered[None, 2] > 20)
        make.linear(folder / "3", 100)
        wait_for("version 3", lambda: load.wrong or load.answered[None, 3] > 20)
        # Two versions are kept: the first is gone, the second is still there.
        with Client(gateway.address) as client:

            def is_gone() -> bool:
                try:
                    client.predict("broken", {"x": X}, version=1)
                except InferenceError as error:
                    return error.code.value == grpc.StatusCode.NOT_FOUND.value[0]
                return False

            wait_for("version 1 to go", is_gone)
            assert client.predict("broken", {"x": X}, version=2).version == 2
    assert not load.wrong, load.wrong[:5]


def test_a_version_that_is_withdrawn_hands_over_to_the_one_before(
    gateway: Any, root: Path, tmp_path: Path, make: Any, wait_for: Callable[..., Any]
) -> None:
    folder = root / "withdrawn"
    make.linear(folder / "2", 10)
    load = Load(gateway.address, "withdrawn", make, {1: 1, 2: 10})
    with load.running(None, None):
        wait_for("version 2", lambda: load.wrong or load.answered[None, 2] > 20)
        (folder / "2").rename(tmp_path / "2")
        before = time.monotonic()
        first = load.answered[None, 1]
        wait_for("version 1 again", lambda: load.wrong or load.answered[None, 1] > first + 20)
        assert time.monotonic() - before < 10
    assert not load.wrong, load.wrong[:5]
