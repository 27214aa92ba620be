"""The model without a server: `python -m bench.model_servers.alone NAME FILE`, asked as `bench.calls` has it."""

from __future__ import annotations

import os
import sys
from functools import cache, partial

import numpy as np

from bench import calls
from bench.model_servers.models import BATCHES, MODELS
from bench.model_servers.serving.names import FILE, MODEL
from bench.model_servers.serving.served import Served

if __name__ == "__main__":
    os.environ |= dict(zip((MODEL, FILE), sys.argv[1:], strict=True))
    served = Served()
    row = MODELS[sys.argv[1]].row()
    # Made when first asked for: until then the process holds the model alone.
    rows = cache(lambda size: np.repeat(row, size, axis=0))
    calls.answer({str(size): partial(lambda size: served(rows(size)), size) for size in BATCHES})
