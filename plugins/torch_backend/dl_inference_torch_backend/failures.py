"""What an error of torch's says, and whose fault it is."""

from __future__ import annotations

import dis
import os
import re
from pathlib import Path
from types import TracebackType

import torch

from dl_inference_core.errors import BadRequest, InferenceError, text_of

_INTERPRETER = "The following operation failed in the TorchScript interpreter."
_RAISED = re.compile(r"^(?:builtins\.)?([A-Za-z_][\w.]*): (.*)$", re.MULTILINE)
"""The line of TorchScript's message that says what was wrong: it follows the lines of a traceback, and begins with the
class of the error."""
_FAKE = re.compile(r"got (\w+)\((['\"])(.*?)\2\)$", re.MULTILINE)
"""The same in a message of torch.compile."""
_KERNEL = re.compile(r"^kernel, \S+:\d+, ")
"""How an error of a compiled kernel begins: with a file that the compiler has written."""
_NOT_THE_INPUTS = (
    "out of memory",
    "can't allocate memory",
    "CUDA error",
    "CUDA driver",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "cuDNN error",
    "cuFFT error",
    "NCCL",
    "INTERNAL ASSERT FAILED",
    "Expected all tensors to be on the same device",
    "Inference tensor",
    "Could not run",
)
"""Words of errors of the machine, or of the model, that torch's operators raise."""
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_RAISE = dis.opmap["RAISE_VARARGS"]
_LONGEST = 500


def explain(error: BaseException) -> BaseException:
    """The error to report in place of `error`, which a model raised when it was called: BadRequest where the inputs are
    at fault, else an error whose first line says what was wrong.

    The inputs are at fault where an operator of torch's refuses its operands, or the model refuses values by
    `ValueError` or `assert`. A model whose own code raises anything else is at fault itself; so is the machine where
    memory or a device fails.
    """
    if isinstance(error, InferenceError):
        return error
    name, words = _said(error)
    if _refuses_inputs(error, name, words):
        return BadRequest(f"{name}: {words}"[:_LONGEST])
    if text_of(error).startswith(_INTERPRETER):
        return RuntimeError(words if name == "RuntimeError" else f"{name}: {words}")
    return error


def _said(error: BaseException) -> tuple[str, str]:
    """The class of the error that was raised first, and the first line of its message."""
    text = text_of(error).strip()
    if text.startswith(_INTERPRETER) and (raised := _RAISED.search(text, len(_INTERPRETER))) is not None:
        name, words = raised[1], raised[2]
        inner = _RAISED.match(words)
        return (inner[1], inner[2]) if inner is not None and inner[1] == "AssertionError" else (name, words)
    if (fake := _FAKE.search(text)) is not None:
        return fake[1], fake[3]
    return type(error).__name__, _KERNEL.sub("", text.partition("\n")[0])


def _refuses_inputs(error: BaseException, name: str, words: str) -> bool:
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | RecursionError):
        return False
    if any(part in words for part in _NOT_THE_INPUTS):
        return False
    if name in ("ValueError", "AssertionError"):
        return True
    if isinstance(error, torch.jit.Error):  # raised by a `raise` of the model's own
        return False
    if isinstance(error, NotImplementedError):
        return "not implemented for" in words  # a dtype
    return isinstance(error, RuntimeError | IndexError) and not _raised_by_model(error.__traceback__)


def _raised_by_model(traceback: TracebackType | None) -> bool:
    """Whether a `raise` in Python code that is not torch's own raised the error, rather than an operator."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    return code.co_code[traceback.tb_lasti] == _RAISE and not code.co_filename.startswith(_TORCH)
