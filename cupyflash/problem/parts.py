"""What `merge_attention` is given: attention over disjoint sets of keys, checked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .checks import check_library, library_of, plain_array
from .dtypes import DTYPES, DType

__all__ = ["Parts", "check_parts"]


class Parts(NamedTuple):
    """Outputs and log-sum-exps of the same queries over disjoint sets of keys; at least one of each."""

    library: str  # "numpy" or "cupy"
    element: DType
    outs: tuple[Any, ...]  # each (…, L, Ev)
    lses: tuple[Any, ...]  # each (…, L) in the accumulation dtype

    @property
    def namespace(self) -> Any:
        """The module whose functions take the arrays: see `Problem.namespace`."""
        return np if self.library == "numpy" else sys.modules[self.library]

    def __str__(self) -> str:
        return f"{len(self.outs)} {self.library} parts {self.element.name} {self.outs[0].shape}"


def check_parts(outs: Sequence[Any], lses: Sequence[Any]) -> Parts:
    """Return what `merge_attention` was given, or raise a TypeError or ValueError that names the part."""
    outs, lses = _check_sequence("outs", outs), _check_sequence("lses", lses)
    if len(outs) != len(lses):
        raise ValueError(f"lses must have as many parts as outs ({len(outs)}), but had {len(lses)}")
    library = library_of("outs[0]", outs[0])
    element = DTYPES.get(outs[0].dtype)
    if element is None:
        raise TypeError(f"outs[0] must be float16, bfloat16, float32 or float64, but was {outs[0].dtype}")
    shape = outs[0].shape
    if len(shape) < 2:
        raise ValueError(f"outs[0] must have at least 2 dimensions (length, head dim), but had shape {shape}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_part(f"outs[{i}]", out, library, element.storage, shape)
        _check_part(f"lses[{i}]", lse, library, element.accumulator, shape[:-1])
    if library == "cupy":
        for name, arrays in (("outs", outs), ("lses", lses)):
            for i, array in enumerate(arrays):
                if array.device != outs[0].device:
                    raise ValueError(
                        f"{name}[{i}] must be on outs[0]'s device {outs[0].device}, but was on {array.device}"
                    )
    return Parts(library, element, tuple(map(plain_array, outs)), tuple(map(plain_array, lses)))


def _check_sequence(name: str, parts: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(parts, (tuple, list)):
        raise TypeError(f"{name} must be a tuple or list of arrays, but was of type {type(parts).__name__}")
    if not parts:
        raise ValueError(f"{name} must have at least one part, but was empty")
    return tuple(parts)


def _check_part(name: str, array: Any, library: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    check_library(name, array, library, "outs[0]")
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, but was {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, but had shape {array.shape}")
