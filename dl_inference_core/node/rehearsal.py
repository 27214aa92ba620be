"""A handler is run on sample requests, before any client's: `dl-inference-core check` does so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dl_inference_core.errors import BadRequest, ModelError, text_of
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handler_inputs import check_answer, check_inputs, refused_by
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.samples import read_samples, samples
from dl_inference_core.tensors import Form, Request, as_json, as_tensors

# Faults of a handler's code, whatever the request is.
_FAULTS = (NameError, ImportError, SyntaxError)


def rehearse(folder: Path, model: Model, handler: Handler) -> str:
    """Answer sample requests: the tensors that lie beside the model or else are made from its signature, a text, and
    bytes. On a thread of the model's and in its session.

    A handler does not say which requests it takes, so it may refuse all but one of the samples: by any error of its
    `preprocess`, or by BadRequest.

    Returns:
        a note where the handler takes none of the samples; "" if one is answered, or the handler is the default one,
        whose model was run when it was loaded.

    Raises:
        ModelError: the handler takes samples, but none can be answered; the cause is attached.
    """
    if not handler.makes_inputs and type(handler).postprocess is Handler.postprocess and handler.calls_signatures:
        return ""
    refused = ""
    failures: list[tuple[str, BaseException]] = []
    for request in _requests(folder, model):
        taken = False
        try:
            returned = handler.preprocess(request)
            taken = True
            inputs = check_inputs(handler, request, returned)
            _encode(model, handler.postprocess(handler.run_model(model, inputs, request), request))
        except BaseException as error:
            by_handler = isinstance(error, BadRequest) and not refused_by(model, error)
            if isinstance(error, _FAULTS) or not isinstance(error, Exception) or (taken and not by_handler):
                failures.append((request.form.value, error))
            else:
                refused = refused or f"{request.form.value}: {type(error).__name__}: {text_of(error)}"
        else:
            return ""
    if failures:
        form, cause = failures[0]
        raise ModelError(f"{handler.described()} fails for a sample of {form}") from cause
    return f"{handler.described()} was not tried, it takes none of the samples ({refused})"


def _requests(folder: Path, model: Model) -> Iterator[Request]:
    stored = read_samples(folder)
    tensors = stored[0] if stored else samples(model.signature, 1, np.random.default_rng(0))
    if tensors is not None:
        yield Request(payload=tensors, form=Form.TENSORS)
    yield Request(payload="a sample", form=Form.TEXT)
    yield Request(payload=b"a sample", form=Form.BYTES)


def _encode(model: Model, payload: Any) -> None:
    """Raises:
    TypeError: no protocol can hold it.
    """
    payload = check_answer(model.to_numpy(payload))
    try:
        as_tensors(payload)
    except TypeError:
        json.dumps(as_json(payload))
