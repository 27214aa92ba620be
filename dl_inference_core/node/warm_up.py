"""Before a version is ready: whether its requests may share batches, and what is run so that no client waits for what
only happens once.

A model answers the requests that were recorded for it and is run on samples (`samples.py`) in every size of batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Model, Signature
from dl_inference_core.node.batching import Batching, BatchingConfig
from dl_inference_core.node.handler_inputs import inputs_of, kind_of
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.samples import of_rows, read_samples, rows_of
from dl_inference_core.node.samples import samples as made_samples
from dl_inference_core.tensors import Form, Request, Tensor

FindRecorded: TypeAlias = "Callable[[Path], Iterable[tuple[str, Request]]]"
"""`Api.recorded_requests`."""

_ROWS = 3
"""Of the samples by which rows alone and together are compared."""
_LONGEST_RUN_S = 1.0
"""After a call that takes longer than this no larger batches are tried."""
_MOST_BYTES = 64 << 20
"""Of the samples of one call."""

_log = logging.getLogger(__name__)


def warm_up(
    directory: Path,
    model: Model,
    handler: Handler,
    config: BatchingConfig,
    recorded: Sequence[FindRecorded] = (),
    *,
    samples: bool = True,
) -> Batching | None:
    """Run the model on what lies beside it and on samples in every size of batch. Outside its session.

    Args:
        recorded: functions that find the recorded requests of a version in its folder.
        samples: if not, only recorded requests are answered, and what batches must be told to.

    Returns:
        how its requests share calls, None if they do not.

    Raises:
        ModelError: recorded requests cannot be read or answered; says which. The model fails for the samples beside it.
            What `config` asks for cannot be: the handler takes one request at a time,
            or a row's answer is not the same alone and among others.
    """
    beside = _Samples(directory)
    with model.session():
        _answer_recorded(recorded, directory, model, handler)
        batching = _batching(beside if samples else None, model, handler, config)
        if not samples or not handler.takes_batches:
            return batching
        names = model.signatures if batching is None or batching.signatures is None else batching.signatures
        sizes = batching.sizes if batching is not None else (1,)
        runs = [_run_sizes(beside, model, handler, name, sizes) for name in names]
    if batching is None:
        return None
    run = min(runs, key=lambda run: run.largest)
    if run.failure is None or (run.largest == 0 and config.enabled is True):  # those that are made may fit no model
        return batching
    if config.enabled is True:
        raise ModelError(
            f"[batching]: the model takes {run.largest} rows, but not the next of {sizes}"
        ) from run.failure
    if not run.largest:
        return None
    fewer = tuple(size for size in config.allowed_rows if size <= run.largest)
    limited = config.model_copy(update={"max_rows": run.largest, "allowed_rows": fewer})
    return Batching(limited, model.join, batching.signatures, _unchecked(handler))


def _batching(samples: _Samples | None, model: Model, handler: Handler, config: BatchingConfig) -> Batching | None:
    if config.enabled is False:
        return None
    batching = Batching(config, model.join, unchecked=_unchecked(handler))
    if config.enabled is True:
        if not handler.takes_batches:
            raise ModelError(
                f"[batching]: {handler.described()} takes one request at a time: its run_model is its own. Give it "
                "a run_batch, too, or say enabled = false"
            )
        for name in model.signatures:
            if samples is not None and (why := _differs(model, handler, batching, name, samples)):
                raise ModelError(f'[batching]: signature "{name}": {why}')
        return batching
    if not handler.takes_batches_untold or samples is None:
        return None
    may = []
    for name in [name for name, signature in model.signatures.items() if _is_rowwise(signature)]:
        why = _differs(model, handler, batching, name, samples)
        if why == "":
            may.append(name)
        elif why:
            _log.warning('%s: requests for signature "%s" do not share batches: %s', samples.directory, name, why)
    return Batching(config, model.join, may, _unchecked(handler)) if may else None


def _unchecked(handler: Handler) -> dict[str, Signature]:
    """By name, the signatures that leave shapes to the model."""
    return {name: signature for name, signature in handler.signatures.items() if not signature.checks_shapes}


def _is_rowwise(signature: Signature) -> bool:
    """Whether every input and output is known to have a free first dimension."""
    specs = (*signature.inputs, *signature.outputs)
    return bool(signature.inputs and signature.outputs) and all(spec.shape and spec.shape[0] is None for spec in specs)


def _differs(model: Model, handler: Handler, batching: Batching, name: str, samples: _Samples) -> str | None:
    """How the answers to some rows together differ from those to the same rows alone; "" if they do not, None if that
    cannot be told: there are no samples, or the model fails for them."""
    rows = samples.of(model.signatures[name], _ROWS)
    if rows is None:
        return None
    request = Request(payload=rows, form=Form.TENSORS, signature=name)

    def run(inputs: Mapping[str, Any]) -> Any:
        part = batching.part(None, request, inputs)
        return batching.run([part], lambda inputs: handler.run_batch(model, inputs, [request]))[0]

    count = rows_of(rows)
    try:
        alone = [run({key: value[row : row + 1] for key, value in rows.items()}) for row in range(count)]
    except Exception as error:
        _log.info("%s: the model fails for samples: %r", samples.directory, error)
        return None
    try:
        together = run(rows)
    except Exception as error:
        return f"rows together fail: {error}"
    return _difference(model.to_numpy(alone), model.to_numpy(together), batching.tolerance)


def _difference(alone: Sequence[Mapping[str, Tensor]], together: Mapping[str, Tensor], tolerance: float) -> str:
    if not isinstance(together, Mapping):
        return f"run_batch returned {kind_of(together)}; expected tensors by name"
    for name, value in together.items():
        if not np.ndim(value) or len(value) != len(alone):
            return f'output "{name}" has the shape {list(np.shape(value))} for {len(alone)} rows'
        for row, answer in enumerate(alone):
            expected, got = np.asarray(answer[name][0]), np.asarray(value[row])
            if expected.dtype.kind == "V":  # bfloat16 and its like
                expected, got = expected.astype(np.float32), got.astype(np.float32)
            if expected.dtype.kind not in "fc":
                same = np.array_equal(expected, got)
            else:
                scale = float(np.max(np.abs(expected), initial=0, where=np.isfinite(expected)))
                same = np.allclose(expected, got, rtol=0, atol=tolerance * scale, equal_nan=True)
            if not same:
                return f'output "{name}" of a row is another alone than among others'
    return ""


class _Samples:
    """Inputs to run a model with: what lies beside it, or made from a signature. A single row, whose copies tell less
    than rows that differ, comes last. None are made of scalars alone: who takes those may count them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def stored(self) -> Sequence[dict[str, Tensor]]:
        """What lies beside the model, that with the most rows last; read when it is first asked for."""
        return sorted(read_samples(self.directory), key=rows_of)

    def of(self, signature: Signature, rows: int) -> dict[str, Tensor] | None:
        """So many rows; None if there are none to be had."""
        if self.stored and rows_of(self.stored[-1]) > 1:
            return of_rows(self.stored[-1], rows, signature)
        of_arrays = any(spec.shape for spec in signature.inputs)
        made = made_samples(signature, rows, np.random.default_rng(0)) if of_arrays else None
        return of_rows(self.stored[-1], rows, signature) if made is None and self.stored else made


@dataclass(frozen=True, slots=True)
class _Run:
    """What came of running a model in several sizes.

    Attributes:
        largest: the largest size that it has answered; 0 is none.
        failure: why it has not answered the next.
    """

    largest: int
    failure: Exception | None = None


def _run_sizes(samples: _Samples, model: Model, handler: Handler, name: str, sizes: Sequence[int]) -> _Run:
    """Run a signature on samples of these sizes, until one takes long or much memory.

    Raises:
        ModelError: it fails for a single one of the samples that lie beside it.
    """
    signature = model.signatures[name]
    largest = 0
    for size in sizes:
        inputs = samples.of(signature, size)
        if inputs is None:
            break
        began = time.monotonic()
        try:
            handler.run_batch(model, inputs, [Request(payload=inputs, form=Form.TENSORS, signature=name)])
        except Exception as error:
            if not largest and samples.stored:
                raise ModelError("the model fails for the samples beside it") from error
            _log.info('%s: signature "%s" fails for %d rows of samples: %r', samples.directory, name, size, error)
            return _Run(largest, error)
        largest = size
        taken = sum(array.nbytes for array in inputs.values())
        if time.monotonic() - began > _LONGEST_RUN_S or 2 * taken > _MOST_BYTES:
            break
    return _Run(max(sizes))


def _answer_recorded(recorded: Sequence[FindRecorded], directory: Path, model: Model, handler: Handler) -> None:
    for find in recorded:
        for where, request in find(directory):
            try:
                inputs = inputs_of(handler, request)
                handler.postprocess(handler.run_model(model, inputs, request), request)
            except Exception as error:
                raise ModelError(f"{where} cannot be answered") from error
