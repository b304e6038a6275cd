"""One block of rows over all its keys: FlashAttention-2's forward pass (Dao 2023, Algorithm 1) on BLAS.

The rows of the query heads that share a key head are folded into one matrix.  It walks over the keys in tiles and
keeps, per row, a shift m, the sum l and the output so far::

            keys  →                         per tile     S = Q Kᵀ  (+ mods, bias)
          ┌──────┬──────┬──────┐                         P = keep · exp(S − m)
    rows  │ tile │ tile │ tile │                         l += P·1,    O += P V
          └──────┴──────┴──────┘            at the end   O / l,       lse = m + log l

Any shift gives the same quotient as long as no exponential leaves the range of the type, and the row maximum, which the
textbook takes afresh on every tile, is only the safest choice.  So the *fast pass* is frugal: it starts without a shift
where norms bound all scores, else with the maximum of the first tile, and takes a fresh maximum only where a tile's
sums say that the old one was too small.  Removed scores are multiplied by zero, or -inf is added to them where a
maximum is taken.  The result is its own certificate: every row's sum is about 1 or more, or exactly 0 if no key was
seen, and nothing is inf or NaN.  A block that fails it (NaN or inf behind a mask, or anywhere else) runs again as the
*exact pass*: removed scores are set to -inf whatever they were, and every tile takes its maximum.

What a tile costs, in ns per score at E = Ev = 64 on one AVX-512 core: products 2.8, exp 0.46 (exp2 0.22), maximum 0.13,
multiply by a mask 0.19, row sum as a product with ones 0.05 (by `sum` 0.19), `where=` writes 3.8 (exact pass only).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..problem.masks import Band
from ..problem.mods import Coordinates, add_alibi, apply_mask_mod, apply_score_mod, cap_scores
from ..problem.philox import keep_tile
from ..problem.problem import Buffers, Problem
from .scratch import Scratch, widen
from .slices import Slice

__all__ = ["FEW_ROWS", "Block", "Tiling"]

_LOG2_E = math.log2(math.e)
# A tile with a larger sum makes the fast pass take a new maximum: scores are then at most 14 above the old one, and
# subtracting it costs no more accuracy than the scores have.
_SUM_TOO_LARGE = 2.0**20
# Scores within ±20 need no shift: their exponentials lie between 2^-29 and 2^29.
_SCORE_BOUND = 20.0
# The least sum of a row with keys, when the shift is its maximum (rounded) and when it is 0.
_LEAST_SUM, _LEAST_BOUNDED_SUM = 0.5, 2.0**-30
_LEAST = {np.dtype(dtype): np.finfo(dtype).min for dtype in (np.float32, np.float64)}
# Blocks with no more rows are bound by reading keys and values.
FEW_ROWS = 32
# Blocks with fewer scores than this don't gain from looking at norms.
_SCORES_WORTH_NORMS = 2**16
# np.exp2 beats np.exp where NumPy has it in AVX-512, except on denormal results, which bounded scores don't have.
_HAS_FAST_EXP2 = bool(np._core._multiarray_umath.__cpu_features__.get("AVX512_SKX"))  # type: ignore[attr-defined]


class Tiling(NamedTuple):
    """How a call is cut."""

    units: int  # of a job
    rows: int  # of each query head in a job
    keys: int  # of a tile
    batch_keys: int  # of the tiles that are multiplied in one batch
    threads: int
    guards_blas: bool  # there are threads, or products large enough for BLAS to start its own
    longest_first: bool  # later rows see more keys


class _Tile(NamedTuple):
    """Keys [start, stop) as `runs` runs of equal length that are multiplied in one batch."""

    start: int
    stop: int
    runs: int


class Block:
    """The rows [first_row, first_row + tiling.rows) of the units [first_unit, first_unit + tiling.units) of a slice.

    Tiles of scores have the shape (units, runs, G·rows, keys), or (units, runs, G, rows, keys) where coordinates
    matter.
    """

    def __init__(
        self,
        problem: Problem,
        buffers: Buffers,
        tiling: Tiling,
        part: Slice,
        outer: tuple[int, ...],
        first_unit: int,
        first_row: int,
    ) -> None:
        self.problem, self.buffers, self.tiling = problem, buffers, tiling
        self.row_start, self.row_stop = first_row, min(first_row + tiling.rows, problem.seqlen_q)
        units, rows = slice(first_unit, first_unit + tiling.units), slice(self.row_start, self.row_stop)
        self.query = part.query[(*outer, units, slice(None), rows)]
        self.key, self.value = part.key[(*outer, units)], part.value[(*outer, units)]
        self.packs_key, self.packs_value = part.packs_key, part.packs_value
        self.key_norms, self.units_id = part.key_norms, (*outer, first_unit)
        self.out = part.out[(*outer, units, slice(None), rows)]
        self.lse = None if part.lse is None else part.lse[(*outer, units, slice(None), rows)]
        self.weights: Any = None if part.weights is None else part.weights[(*outer, units, slice(None), rows)]
        self.float_mask = _mask_block(part.float_mask, outer, units, rows)
        self.bool_mask = _mask_block(part.bool_mask, outer, units, rows)

        self.dtype = problem.element.accumulator
        self.units, self.group, self.rows, _ = self.query.shape
        self.folded = self.group * self.rows
        self.looks_at_norms = (
            not problem.changes_scores
            and self.folded > FEW_ROWS
            and self.units * self.folded * problem.seqlen_k >= _SCORES_WORTH_NORMS
        )
        self.heads: Any = None  # b·Hq + h, (units, G)
        if problem.needs_heads:
            unit = np.arange(first_unit, first_unit + self.units)
            for axis, index in enumerate(outer):
                unit += index * math.prod(part.lead_shape[axis + 1 :])
            self.heads = unit[:, None] * part.period + part.first_head + np.arange(self.group)

    def run(self, passed: Callable[[int], None] | None = None) -> None:
        """Fill the block's part of out, lse and weights; call `passed` with the key behind each tile."""
        stage = self.problem.weights_stage
        self.passed = passed
        self.scratch = Scratch.borrow()
        try:
            if stage in (None, "softmax", "dropout") and not self._attend(exact=False):
                self._attend(exact=True)
            if stage is not None:
                self._write_weights(stage)
        finally:
            self.scratch.give_back()

    # --- the walk --------------------------------------------------------------------------------------------------

    def _attend(self, exact: bool) -> bool:
        """Walk over the keys and write out and lse; or return False, if the fast pass has no certificate."""
        column = (self.units, self.folded, 1)
        shift, row_sum = self.scratch("shift", column, self.dtype), self.scratch("row_sum", column, self.dtype)
        output = self.scratch("output", (self.units, self.folded, self.value.shape[-1]), self.dtype)
        start, stop = self.problem.band.key_range(self.row_start, self.row_stop, self.problem.seqlen_k)

        bounded = began_bounded = self.looks_at_norms and not exact
        unit = _LOG2_E if bounded and _HAS_FAST_EXP2 else 1.0
        query, exp = self._scaled_query(unit), np.exp if unit == 1 else np.exp2
        if bounded:
            query_norm = _largest_norm(query) / unit
            shift.fill(0)

        is_first = True
        sums_are_sure = not self.problem.changes_scores  # as the exact pass would have them
        for tile, keeps in self._tiles(start, stop):
            key, value = self._packed("key", self.key, tile), self._packed("value", self.value, tile)
            if bounded and not query_norm * self._key_norm(key, tile) <= _SCORE_BOUND:
                bounded, query, exp = False, self._scaled_query(1.0), np.exp
            takes_maximum = exact or (is_first and not bounded)
            sums_are_sure = sums_are_sure and takes_maximum and not keeps
            while True:
                scores = self._scores(query, key, tile, keeps if exact else None)
                removals = () if exact else keeps
                if takes_maximum:
                    for keep in removals:
                        by_head = self._by_head(scores)
                        by_head += _bias(keep, self.dtype)
                    self._raise_shift(scores, shift, row_sum, None if exact else output, is_first)
                    removals = ()
                if not bounded:
                    scores -= shift[:, None]
                exp(scores, out=scores)
                for keep in removals:
                    by_head = self._by_head(scores)
                    by_head *= keep
                sums = self._row_sums(scores)
                if bounded or takes_maximum or sums.max() < _SUM_TOO_LARGE:
                    break
                takes_maximum = True
            if exact:
                self._normalize(scores, sums, row_sum, output, is_first)
            if self.problem.dropout_p:
                self._drop(scores, tile)
            self._accumulate(scores, sums, value, row_sum, output, is_first)
            is_first = False

        if is_first:  # no key takes part
            row_sum.fill(0)
            output.fill(0)
        elif not exact:
            least_sum = _LEAST_BOUNDED_SUM if began_bounded else _LEAST_SUM
            if not (sums_are_sure or np.minimum.reduce(row_sum, axis=None) >= least_sum):
                is_empty = (row_sum == 0) & (bounded | (shift == _LEAST[self.dtype]))
                if not np.all(is_empty | (row_sum >= least_sum)):
                    return False
            if not _is_finite(output):
                return False
        self._finish(shift, row_sum, output, is_normalized=exact)
        return True

    def _raise_shift(self, scores: Any, shift: Any, row_sum: Any, output: Any | None, is_first: bool) -> None:
        """Raise each row's shift to the maximum of the tile, and rescale what was summed with the old one."""
        # A row of -inf gets the least finite number: exp(-inf - m) must stay 0.
        least = _LEAST[self.dtype]
        if is_first:
            np.maximum.reduce(scores, axis=(1, 3), out=shift[..., 0], initial=least)
            return
        largest = np.maximum.reduce(scores, axis=(1, 3), initial=least)[..., None]
        np.maximum(largest, shift, out=largest)
        rescale = np.exp(shift - largest)
        row_sum *= rescale
        if output is not None:
            output *= rescale
        shift[...] = largest

    def _normalize(self, weights: Any, sums: Any, row_sum: Any, output: Any, is_first: bool) -> None:
        """Make `weights` and `output` shares of the row's sum so far.

        The exact pass keeps the output normalised, as a running mean of V, so that it can't overflow where V is near
        the largest number of its type.
        """
        total = sums if is_first else row_sum + sums
        divisor = np.where(total == 0, 1, total)
        weights /= divisor[:, None]
        if not is_first:
            output *= row_sum / divisor

    def _row_sums(self, scores: Any) -> Any:
        units, runs, folded, keys = scores.shape
        if folded <= FEW_ROWS:
            return np.add.reduce(scores, axis=(1, 3))[..., None]
        sums = self.scratch("sums", (units, runs, folded, 1), self.dtype)
        np.matmul(scores, _ones(keys, self.dtype), out=sums)
        return sums[:, 0] if runs == 1 else sums.sum(axis=1)

    def _accumulate(self, weights: Any, sums: Any, value: Any, row_sum: Any, output: Any, is_first: bool) -> None:
        units, runs, folded, _ = weights.shape
        if is_first and runs == 1:
            row_sum[...] = sums
            np.matmul(weights, value, out=output[:, None])
            return
        product = self.scratch("product", (units, runs, folded, value.shape[-1]), self.dtype)
        np.matmul(weights, value, out=product)
        product = product[:, 0] if runs == 1 else product.sum(axis=1)
        if is_first:
            row_sum[...], output[...] = sums, product
        else:
            row_sum += sums
            output += product

    def _finish(self, shift: Any, row_sum: Any, output: Any, is_normalized: bool) -> None:
        """Write the output and the log-sum-exp, the sinks counted."""
        problem = self.problem
        has_empty = not np.minimum.reduce(row_sum, axis=None) > 0  # or NaN
        if has_empty:
            empty = row_sum == 0
            shift[empty] = _LEAST[self.dtype]
        if self.buffers.sinks is not None:
            sinks = self.buffers.sinks[self.heads % problem.num_heads_q].astype(self.dtype)
            sinks = np.repeat(sinks.reshape(self.units, self.group), self.rows, axis=1)[..., None]
            largest = np.maximum(shift, sinks)
            rescale = np.exp(shift - largest)
            with_sinks = row_sum * rescale + np.exp(sinks - largest)
            output *= row_sum * rescale / with_sinks if is_normalized else rescale
            row_sum[...], shift[...] = with_sinks, largest
        if self.lse is not None:
            self.lse[...] = (shift + np.log(row_sum)).reshape(self.lse.shape)
        if 0 < problem.dropout_p < 1:
            row_sum *= 1 - problem.dropout_p
        if has_empty:
            row_sum[row_sum == 0] = 1
            output[empty[..., 0]] = 0
        divisor: Any = row_sum.reshape(self.units, self.group, self.rows, 1)
        if is_normalized:
            divisor = self.dtype.type(1 - problem.dropout_p if problem.dropout_p < 1 else 1)
        np.divide(output.reshape(self.out.shape), divisor, out=self.out, casting="unsafe")
        if self.weights is not None:
            self.shift, self.divisor = shift[:, None], row_sum[:, None]

    def _write_weights(self, stage: str) -> None:
        """Compute the scores once more, tile by tile, and write them as they are after `stage`."""
        problem = self.problem
        query = self._scaled_query(1.0)
        start, stop = 0, problem.seqlen_k
        if stage in ("biased", "softmax", "dropout"):
            start, stop = problem.band.key_range(self.row_start, self.row_stop, stop)
        for tile, keeps in self._tiles(start, stop, stage):
            scores = self._scores(query, self._packed("key", self.key, tile), tile, keeps, stage)
            if stage in ("softmax", "dropout"):
                scores -= self.shift
                np.exp(scores, out=scores)
                scores /= self.divisor
            if stage == "dropout" and problem.dropout_p:
                self._drop(scores, tile)
            target = self.weights[..., tile.start : tile.stop]
            target = target.reshape(*target.shape[:3], tile.runs, -1).transpose(0, 3, 1, 2, 4)
            np.copyto(target, self._by_head(scores), casting="unsafe")

    # --- one tile --------------------------------------------------------------------------------------------------

    def _tiles(self, start: int, stop: int, stage: str = "biased") -> Iterator[tuple[_Tile, tuple[Any, ...]]]:
        """The tiles of keys [start, stop) of which something is kept, each with what its masks keep."""
        keys, batch_keys = self.tiling.keys, self.tiling.batch_keys
        is_masked = stage not in ("raw", "modded", "capped")
        for first in range(start, stop, batch_keys):
            last = min(first + batch_keys, stop)
            whole = first + (last - first) // keys * keys
            for begin, end in ((first, whole), (whole, last)):
                if begin < end:
                    tile = _Tile(begin, end, max(1, (end - begin) // keys))
                    keeps = self._keeps(tile) if is_masked else ()
                    if keeps is not None:
                        yield tile, keeps
                    if self.passed is not None:
                        self.passed(end)

    def _keeps(self, tile: _Tile) -> tuple[Any, ...] | None:
        """Bool arrays that broadcast to the tile, all of which must keep a score; None if nothing is kept."""
        keeps = []
        length = (tile.stop - tile.start) // tile.runs
        band = self.problem.band
        if not band.keeps_tile(self.row_start, self.row_stop, tile.start, tile.stop):
            keeps.append(_band_tile(band, self.rows, tile.start - self.row_start, tile.runs, length))
        if self.bool_mask is not None:
            keep = _mask_tile(self.bool_mask, tile)
            if not keep.all():
                if not keep.any():
                    return None
                keeps.append(keep)
        if self.buffers.mask_mod is not None:
            shape = (self.units, tile.runs, self.group, self.rows, length)
            keep = apply_mask_mod(self.buffers.mask_mod, self._coordinates(tile), shape, np)
            if not keep.all():
                if not keep.any():
                    return None
                keeps.append(keep)
        return tuple(keeps)

    def _scores(self, query: Any, key: Any, tile: _Tile, keeps: tuple[Any, ...] | None, stage: str = "biased") -> Any:
        """Scores of a tile after `stage`.  With `keeps`, removed ones are -inf whatever they were; None leaves them."""
        problem, buffers = self.problem, self.buffers
        scores = self.scratch("scores", (self.units, tile.runs, self.folded, key.shape[2]), self.dtype)
        np.matmul(query[:, None], key.swapaxes(2, 3), out=scores)
        if problem.changes_scores and stage != "raw":
            by_head, at = self._by_head(scores), self._coordinates(tile)
            if buffers.score_mod is not None:
                apply_score_mod(buffers.score_mod, by_head, at, np)
            if problem.softcap and stage != "modded":
                cap_scores(by_head, problem.softcap, np)
            if stage not in ("modded", "capped"):
                removed = self._add_bias(by_head, at, tile, exact=keeps is not None)
                if removed is not None:
                    np.copyto(by_head, -math.inf, where=removed)
        for keep in keeps or ():
            np.copyto(self._by_head(scores), -math.inf, where=~keep)
        return scores

    def _add_bias(self, scores: Any, at: Coordinates, tile: _Tile, exact: bool) -> Any:
        """Add float mask and ALiBi.  If `exact`, return where a mask of -inf, or a score that was, removes a score."""
        buffers, removed = self.buffers, None
        if self.float_mask is not None:
            bias = _mask_tile(self.float_mask, tile)
            if exact:
                removed = np.isneginf(scores) | np.isneginf(bias)
            np.add(scores, bias, out=scores)
        if buffers.alibi_slopes is not None:
            slopes = buffers.alibi_slopes
            slopes = slopes[at.b if slopes.shape[0] > 1 else 0, at.h]
            problem = self.problem
            add_alibi(scores, slopes, at.q_idx, at.kv_idx, problem.shift, problem.last_position, np)
        return removed

    def _drop(self, weights: Any, tile: _Tile) -> None:
        problem = self.problem
        kept = keep_tile(
            self.buffers.seed, problem.dropout_p, self.heads, (self.row_start, self.row_stop), (tile.start, tile.stop)
        )
        kept = kept.reshape(*kept.shape[:3], tile.runs, -1).transpose(0, 3, 1, 2, 4)
        by_head = self._by_head(weights)
        np.multiply(by_head, kept, out=by_head)

    def _by_head(self, scores: Any) -> Any:
        units, runs, _, keys = scores.shape
        return scores.reshape(units, runs, self.group, self.rows, keys)

    def _coordinates(self, tile: _Tile) -> Coordinates:
        b, h = np.divmod(self.heads, self.problem.num_heads_q) if self.heads is not None else (np.zeros(1, int),) * 2
        by_unit = (-1, 1, h.shape[-1], 1, 1)
        return Coordinates(
            b=b.reshape(by_unit),
            h=h.reshape(by_unit),
            q_idx=np.arange(self.row_start, self.row_stop)[:, None],
            kv_idx=np.arange(tile.start, tile.stop).reshape(tile.runs, 1, 1, -1),
        )

    # --- operands --------------------------------------------------------------------------------------------------

    def _scaled_query(self, factor: float) -> Any:
        """(units, G·rows, E) in the accumulation dtype, times scale · factor."""
        query = self.scratch("query", (self.units, self.folded, self.query.shape[-1]), self.dtype)
        by_head = query.reshape(self.query.shape)
        if self.query.dtype == self.dtype:
            np.multiply(self.query, self.dtype.type(self.problem.scale * factor), out=by_head)
        else:
            widen(self.query, by_head)
            np.multiply(query, self.dtype.type(self.problem.scale * factor), out=query)
        return query

    def _key_norm(self, key: Any, tile: _Tile) -> float:
        if tile.start % self.tiling.batch_keys:
            return _largest_norm(key)  # tiles that start with a window are other tiles in every block
        place = (*self.units_id, tile)
        norm = self.key_norms.get(place)
        if norm is None:
            norm = self.key_norms[place] = _largest_norm(key)
        return norm

    def _packed(self, name: str, operand: Any, tile: _Tile) -> Any:
        """A tile of K or V, (units, runs, keys, E), as BLAS takes it: accumulation dtype, contiguous rows."""
        rows = operand[:, tile.start : tile.stop]
        if self.packs_key if name == "key" else self.packs_value:
            packed = self.scratch(name, rows.shape, self.dtype)
            widen(rows, packed)
            rows = packed
        return rows.reshape(rows.shape[0], tile.runs, rows.shape[1] // tile.runs, rows.shape[2])


def _bias(keep: Any, dtype: Any) -> Any:
    """0 where `keep` is True and -inf elsewhere, without a branch; np.where takes several times as long."""
    bias = keep.astype(dtype)
    bias -= 1
    bias *= -_LEAST[dtype]
    bias *= 2
    return bias


def _mask_block(mask: Any, outer: tuple[int, ...], units: slice, rows: slice) -> Any:
    """The part of a mask for some units and rows: (units, G, rows, S), axes of length 1 where it broadcasts."""
    if mask is None:
        return None
    for index in outer:
        mask = mask[index if mask.shape[0] > 1 else 0]
    if mask.shape[0] > 1:
        mask = mask[units]
    return mask[:, :, rows] if mask.shape[2] > 1 else mask


def _mask_tile(mask: Any, tile: _Tile) -> Any:
    """The keys of a tile of a mask block: (units, runs, G, rows, keys), axes of length 1 where it broadcasts."""
    if mask.shape[-1] == 1:
        return mask[:, None]
    mask = mask[..., tile.start : tile.stop]
    if tile.runs == 1:
        return mask[:, None]
    return mask.reshape(*mask.shape[:3], tile.runs, -1).transpose(0, 3, 1, 2, 4)


@lru_cache(maxsize=8)
def _band_tile(band: Band, rows: int, offset: int, runs: int, keys: int) -> Any:
    """The band on a tile whose first key lies `offset` after its first row: bool (runs, 1, rows, keys)."""
    kv_idx = np.arange(offset, offset + runs * keys).reshape(runs, 1, 1, keys)
    keep = band.materialize(np.arange(rows)[:, None], kv_idx)
    keep.flags.writeable = False
    return keep


def _largest_norm(rows: Any) -> float:
    """The largest Euclidean norm of the vectors along the last axis; NaN if there is one."""
    return math.sqrt(np.vecdot(rows, rows).max())


def _is_finite(array: Any) -> bool:
    """False if anything is inf or NaN (or larger than the root of the type's range, which costs an exact pass)."""
    return math.isfinite(np.vdot(array, array))


@lru_cache(maxsize=4)
def _ones(rows: int, dtype: Any) -> Any:
    return np.ones((rows, 1), dtype)
