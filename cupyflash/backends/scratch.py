"""Work arrays of the tiled backend, and what is copied into them."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

__all__ = ["Scratch", "widen"]

# Work arrays of so many shapes are remembered.
_MOST_SHAPES = 64


class Scratch:
    """Named work arrays that a thread keeps from job to job.  Nested calls get arrays of their own."""

    _idle = threading.local()

    def __init__(self) -> None:
        self._memory: dict[tuple[str, Any], np.ndarray] = {}
        self._arrays: dict[tuple[str, tuple[int, ...], Any], np.ndarray] = {}

    @classmethod
    def borrow(cls) -> Scratch:
        """A scratch that nobody else on this thread is using."""
        idle = cls._idle.__dict__.get("scratches")
        return idle.pop() if idle else cls()

    def give_back(self) -> None:
        self._idle.__dict__.setdefault("scratches", []).append(self)

    def __call__(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """An uninitialised array, the same for the same name whenever it is large enough."""
        array = self._arrays.get((name, shape, dtype))
        if array is None:
            size = math.prod(shape)
            memory = self._memory.get((name, dtype))
            if memory is None or memory.size < size:
                memory = self._memory[name, dtype] = np.empty(size, dtype)
                self._arrays.clear()  # views of the memory that was replaced
            elif len(self._arrays) >= _MOST_SHAPES:
                self._arrays.clear()
            array = self._arrays[name, shape, dtype] = memory[:size].reshape(shape)
        return array


def widen(source: Any, target: Any) -> None:
    """Copy into the accumulation dtype.

    NumPy converts float16 element by element (1.8 ns); moving the bits with integer instructions and scaling by 2^112,
    which also makes subnormals right, takes 0.3 ns.  inf and NaN, whose exponent it would misread, go NumPy's way.
    """
    if source.dtype != np.float16:
        np.copyto(target, source)
        return
    bits = source.view(np.int16)
    if np.bitwise_and(bits, np.int16(0x7FFF)).max(initial=0) >= 0x7C00:
        np.copyto(target, source)
        return
    wide = target.view(np.int32)
    np.copyto(wide, bits)
    np.left_shift(wide, 13, out=wide)
    np.bitwise_and(wide, np.int32(-0x70002000), out=wide)  # drop the sign bits that were carried into the exponent
    np.multiply(target, np.float32(2.0**112), out=target)
