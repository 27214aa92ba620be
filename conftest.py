"""What the tests of every folder need: the order of imports and of files, and a garbage collector that stays out of
their way.

Triton ends the process by a segmentation fault if it is imported after TensorFlow. Some tests import TensorFlow
themselves, without the backend that minds the order.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Iterator

import pytest

with contextlib.suppress(ImportError):
    importlib.import_module("triton")


LONG = {
    "test_bench",
    "test_children",
    "test_cli",
    "test_demo",
    "test_demo_tf",
    "test_replay",
    "test_soak",
    "test_start",
}
"""Files that take long for the number of their tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first: else one of them runs alone at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """What pytest holds of some thousand tests is nobody's garbage: else the collector looks through it for longer than
    the deadlines of requests are, while gateways, nodes and clients in this process wait."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _short_pauses() -> Iterator[None]:
    """Likewise what the tests of a file leave behind."""
    yield
    pytest_collection_finish()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The garbage collector does not run by itself: nothing is freed by a collection that comes by chance."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        pytest_collection_finish()
