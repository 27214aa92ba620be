"""The import of TensorFlow in a process that may use torch as well."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from typing import Any


def import_tensorflow() -> Any:
    """The module `tensorflow`, imported after triton.

    torch's compiler imports triton, and a process in which triton is imported after TensorFlow ends by a segmentation
    fault (seen with triton 3.7 and TensorFlow 2.21). Code that imports TensorFlow before torch calls this function in
    the place of `import tensorflow`. TensorFlow logs errors only, unless TF_CPP_MIN_LOG_LEVEL is set.
    """
    # TensorFlow reads this variable while it is imported; it has no other setting for the lines of its import.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with suppress(ImportError):
        importlib.import_module("triton")
    return importlib.import_module("tensorflow")
