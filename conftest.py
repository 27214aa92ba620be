"""What the tests of every folder need: the order of imports, and a fixture.

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
