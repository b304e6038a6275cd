"""A kernel that only applies mods, at every coordinate: for the tests of traced functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupyflash.backends.emulator import Module, guarded_array, guarded_copy
from cupyflash.build.functor import pack_mods, render_mods
from cupyflash.build.source import KernelSource
from cupyflash.problem.expression import Expression
from cupyflash.problem.trace import Trace, trace_mask_mod, trace_score_mod
from tests.kernels.harness import source_of

# Grid: the tiles of a padded L × S plane, then b·H + h. Every thread takes one score, and those beyond the ends of the
# sequences, at coordinates that are, are computed too, as in the tiles of an attention kernel.
_KERNEL = """
struct Shape { int b, h, q_idx, kv_idx; };

extern "C" __global__ void apply_mods(const __grid_constant__ ModArgs args, const __grid_constant__ Shape shape,
                                      const void* scores, void* results, u32* kept) {
  const int row = isa::block_index_x();
  const int column = 32 * isa::block_index_y() + isa::thread_index();
  const Coord at = {isa::block_index_z() / shape.h, isa::block_index_z() % shape.h, row, column};
  const bool inside = row < shape.q_idx && column < shape.kv_idx;
  const long long place = (static_cast<long long>(isa::block_index_z()) * shape.q_idx + row) * shape.kv_idx + column;
  const Real* source = static_cast<const Real*>(scores) + place;
  Real score = 0;
  if constexpr (sizeof(Real) == 4) {
    if (inside) score = isa::bits_float(isa::ldg_4(source));
  } else {
    if (inside) score = isa::bits_double(isa::ldg_8(source));
  }
  const Real result = ScoreMod::apply(score, at, args);
  const bool keep = MaskMod::apply(at, args);
  if (inside) {
    if constexpr (sizeof(Real) == 4) {
      isa::stg_4(static_cast<Real*>(results) + place, isa::float_bits(result));
    } else {
      isa::stg_8(static_cast<Real*>(results) + place, isa::double_bits(result));
    }
    isa::stg_4(kept + place, static_cast<u32>(keep));
  }
}
"""

_SHAPE = np.dtype([(name, np.int32) for name in ("b", "h", "q_idx", "kv_idx")])


def source_with(score: Expression | None, mask: Expression | None, real: str = "float") -> KernelSource:
    text = f'#include "mods.cuh"\nusing Real = {real};\n{render_mods(score, mask)}\n{_KERNEL}'
    return source_of(text, "mods.cu")


@functools.lru_cache(maxsize=1024)
def _module(score: Expression | None, mask: Expression | None, real: str) -> Module:
    return Module(source_with(score, mask, real))


def apply(score: Trace | None, mask: Trace | None, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The modded scores and the mask, from the kernel under the emulator; `scores` is (B, H, L, S)."""
    real = {"float32": "float", "float64": "double"}[scores.dtype.name]
    # An access beyond an array is reported: the arrays end where memory does.
    copies: dict[int, np.ndarray] = {}

    def address(array: np.ndarray) -> int:
        return copies.setdefault(id(array), guarded(array)).ctypes.data

    packed = pack_mods(score, mask, scores.shape, address)
    module = _module(score and score.expression, mask and mask.expression, real)
    source = guarded_copy(scores, "scores")
    results, kept = guarded_array(scores.shape, scores.dtype, "results"), guarded_array(scores.shape, np.uint32, "kept")
    shape = np.array(scores.shape, np.int32).view(_SHAPE)[0]
    b, h, rows, columns = scores.shape
    grid = (rows + 3, columns // 32 + 1, b * h)
    module.get_function("apply_mods")(grid, (32,), (packed.args, shape, source, results, kept))
    return np.array(results), np.array(kept).astype(bool)


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy with the same strides, its last element at the end of the memory if its strides are not negative."""
    if array.size == 0 or any(stride <= 0 for stride in array.strides) or not array.flags.aligned:
        return array
    extent = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) + array.itemsize
    memory = guarded_array(extent, np.uint8, "looked up", alignment=array.itemsize)
    copy = np.ndarray(array.shape, array.dtype, memory, 0, array.strides)
    copy[...] = array
    return copy


def coordinates(shape: Sequence[int]) -> list[np.ndarray]:
    """b, h, q_idx and kv_idx as the backends pass them: integers of rank up to 4 that broadcast to `shape`."""
    axes = [np.arange(n) for n in shape]
    return [axis.reshape((-1,) + (1,) * (3 - i)) for i, axis in enumerate(axes)]


def traced_scores(function: Callable[..., Any], scores: np.ndarray) -> np.ndarray:
    return apply(trace_score_mod(function, scores.dtype), None, scores)[0]


def traced_mask(function: Callable[..., Any], shape: Sequence[int]) -> np.ndarray:
    return apply(None, trace_mask_mod(function), np.zeros(shape, np.float32))[1]


def called_mask(function: Callable[..., Any], shape: Sequence[int]) -> np.ndarray:
    return np.broadcast_to(function(*coordinates(shape)), shape)
