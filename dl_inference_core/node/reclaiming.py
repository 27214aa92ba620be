"""Frees the memory of models that are unloaded.

Most objects of a model end when nothing refers to them any more. Objects that refer to each other in a circle end only
when Python's garbage collector looks at them. The collector looks at young objects often, at old ones seldom, and
never at frozen ones (`gc.freeze`), as all models that are there at the start are. A collection of all objects takes
0.9 s with TensorFlow and PyTorch imported, and no request is answered meanwhile. So this module makes the objects of
one model young again and collects young objects only: 10 ms for the 16,000 objects of an exported program with twelve
transformer layers. The collector alone decides what is garbage, so an object that is still in use stays.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import operator
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType, ModuleType, TracebackType
from typing import Any

from dl_inference_core.node import sources
from dl_inference_core.node.backend import Backend

_MOST_OBJECTS = 50_000
"""A collection of so many takes 20 to 50 ms. Objects are found in the order of their distance from the model, so those
that hold weights come first."""

_SLICE_S, _PAUSE_S = 0.001, 0.000_5
"""What is in no hurry pauses after so long, for so long, so that other threads run."""

_UNINTERRUPTED = 1000
"""So many objects are made young before other threads may run: some 0.5 ms."""

_SHARED = (Backend, logging.Logger, threading.Thread, FrameType, TracebackType)
"""What a model may refer to, but is not a part of it."""

_collecting = threading.Lock()  # the garbage collector is the process's


class Remains:
    """The objects that models, their handlers and the like lead to, held until `reclaim`."""

    def __init__(self, *roots: object) -> None:
        """Find the objects. Takes some ten ms, and lets other threads run meanwhile. Call it while the roots still lead
        to all that they hold, so before they are closed."""
        self._inner, self._leaves = _reachable(roots)

    def reclaim(self) -> None:
        """Let go of the objects, and free those that nothing else holds. The caller must hold none of them. Any thread.

        All threads wait for the collection: less than 1 µs for each object that refers to others. Objects that refer to
        none, tensors above all, are freed after it, a few at a time: to give 200 MB of 4 MB tensors back to the system
        takes 15 ms.
        """
        with _collecting:
            enabled = gc.isenabled()
            gc.disable()  # an automatic collection now would find the objects in use, and make them old
            try:
                _make_young(self._inner)
                self._inner.clear()
                gc.collect(0)
            finally:
                if enabled:
                    gc.enable()
        began = time.monotonic()
        while self._leaves:
            del self._leaves[-1]
            if time.monotonic() - began > _SLICE_S:
                time.sleep(_PAUSE_S)
                began = time.monotonic()
        _return_to_system()


def take_variables(error: BaseException) -> list[object]:
    """What the functions that ended by `error`, or by a cause of it, had in their variables, which are emptied: for as
    long as the error is known it would keep the parts of a model in them."""
    values: list[object] = []
    left: list[BaseException | None] = [error]
    known: set[int] = set()
    while left:
        link = left.pop()
        if link is None or id(link) in known:
            continue
        known.add(id(link))
        left += [link.__cause__, link.__context__]
        for frame, _ in traceback.walk_tb(link.__traceback__):
            with suppress(RuntimeError):  # it has not ended
                found = gc.get_referents(frame)
                frame.clear()
                values += found
    return values


def _reachable(roots: Iterable[object]) -> tuple[list[object], list[object]]:
    """The objects that `roots` lead to, themselves included, the nearest first: those that refer to others of them, and
    those that refer to none. Left out are those that the process shares, and all that only they lead to."""
    shared = {
        id(vars(module))
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and not sources.is_model_source(name)
    }
    objects: list[object] = []
    found: set[int] = set()
    inner: list[object] = []
    leaves: list[object] = []

    def add(values: Iterable[object]) -> None:
        for value in values:
            if id(value) not in found and len(found) < _MOST_OBJECTS:
                found.add(id(value))
                objects.append(value)

    def belonging(values: Iterable[object]) -> list[object]:
        return [value for value in values if id(value) not in shared and _may_belong_to_model(value)]

    add(belonging(roots))
    began = time.monotonic()
    for value in objects:  # it grows
        referents = belonging(gc.get_referents(value))
        (inner if referents else leaves).append(value)
        add(referents)
        if time.monotonic() - began > _SLICE_S:
            time.sleep(_PAUSE_S)
            began = time.monotonic()
    return inner, leaves


def _may_belong_to_model(value: object) -> bool:
    if not gc.is_tracked(value):  # it refers to nothing, so it is in no circle
        return False
    kind = type(value)  # `isinstance` would ask the object itself, and some run code of theirs then
    if issubclass(kind, type | ModuleType):
        name = vars(value).get("__module__" if issubclass(kind, type) else "__name__")
        return isinstance(name, str) and sources.is_model_source(name)
    return not issubclass(kind, _SHARED)


def _make_young(objects: list[object]) -> None:
    """Have the next collection of the youngest generation look at `objects`, wherever they are now.

    No other thread may run between the two calls for an object: a thread that changed a dict there would track it,
    and the process ends if an object is tracked twice. So the calls are made by one expression that runs no bytecode.
    """
    untrack, track = _of_python("PyObject_GC_UnTrack"), _of_python("PyObject_GC_Track")
    for begin in range(0, len(objects), _UNINTERRUPTED):
        # The collector may have seen since they were found that some need not be tracked.
        tracked, again = itertools.tee(filter(gc.is_tracked, objects[begin : begin + _UNINTERRUPTED]))
        twice = itertools.chain.from_iterable(zip(tracked, again, strict=True))
        deque(map(operator.call, itertools.cycle((untrack, track)), twice), maxlen=0)


def _of_python(name: str) -> Any:
    """A function of Python's stable C API that takes an object and returns nothing."""
    return ctypes.PYFUNCTYPE(None, ctypes.py_object)((name, ctypes.pythonapi))


def _return_to_system() -> None:
    """Give the system the free memory that the C library keeps: glibc keeps blocks of up to 32 MB once such blocks have
    been freed. Other threads run meanwhile."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
