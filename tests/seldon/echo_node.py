"""What a `seldon-core-microservice` serves in the tests: `echo_node.Echo`. Runs in `.venv-seldon`."""

import numpy as np


class Echo:
    """Answers with the type that it was given, changed so that nobody mistakes the request for the answer."""

    def predict(self, x, names, meta=None):
        if isinstance(x, bytes):
            return x[::-1]
        if isinstance(x, str):
            if x == "fail":
                raise RuntimeError("asked to fail")
            return x.upper()
        if isinstance(x, np.ndarray):
            return x * 2 if np.issubdtype(x.dtype, np.number) else x[::-1]
        return {"given": x}
