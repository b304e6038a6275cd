"""A stand-in for CuPy on a machine without a GPU: strict arrays that refuse what CuPy refuses.

An array of it is not a NumPy array, does not turn into one by itself, and does not mix with one.  Its module has the
functions that are named here and no others; each name was looked up in CuPy 14.2.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

FUNCTIONS = [
    "abs",
    "arange",
    "asarray",
    "ascontiguousarray",
    "broadcast_to",
    "empty",
    "exp",
    "full",
    "greater_equal",
    "isneginf",
    "log",
    "may_share_memory",
    "maximum",
    "repeat",
    "shares_memory",
    "tanh",
    "unique",
    "where",
]
CONSTANTS = ["bool_", "inf", "uint32", "uint64"]
ATTRIBUTES = ["dtype", "flags", "itemsize", "ndim", "shape", "size", "strides"]
METHODS = ["any", "astype", "item", "max", "ravel", "reshape", "sum", "swapaxes"]


class Array(NDArrayOperatorsMixin):
    """Stands in for cupy.ndarray."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    device = "stand-in device 0"

    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return _call(getattr(ufunc, method), *inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return getattr(self.memory, name)
        if name in METHODS:
            method = getattr(self.memory, name)
            return lambda *args, **kwargs: _call(method, *args, **kwargs)
        raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return _wrap(self.memory[_unwrap(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.memory[_unwrap(index)] = _unwrap(value)


def make_module() -> types.ModuleType:
    """A module to be put into sys.modules as cupy."""
    module = types.ModuleType("cupy")
    module.ndarray = Array  # type: ignore[attr-defined]
    for name in CONSTANTS:
        setattr(module, name, getattr(np, name))
    for name in FUNCTIONS:
        setattr(module, name, _function(getattr(np, name)))
    return module


def _function(function: Any) -> Any:
    return lambda *args, **kwargs: _call(function, *args, **kwargs)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return _wrap(function(*map(_unwrap, args), **{name: _unwrap(value) for name, value in kwargs.items()}))


def _unwrap(value: Any) -> Any:
    if isinstance(value, Array):
        return value.memory
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, tuple):
        return tuple(map(_unwrap, value))
    return value


def _wrap(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_wrap, value))
    return Array(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value
