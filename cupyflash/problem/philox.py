"""Dropout's random bits: Philox4x32-10, and which word of it decides about which score.

The mask is a pure function of (seed, b, h, i, j), so that every backend, every tiling and the backward pass
see the same one.

Philox (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11) has no state: it
turns a counter of four 32-bit words and a key of two into four random words.  One of its ten rounds is::

    c0, c1, c2, c3  ←  hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0)
    k0, k1          ←  k0 + W0,  k1 + W1

where hi and lo are the halves of the 64-bit product.  The score of query i and key j in batch b, head h
belongs to::

    key      the seed, low word first
    counter  (j >> 1,  ((i >> 4) << 3) | (i & 7),  low word of b·Hq + h,  high word of b·Hq + h)
    word     2·((i >> 3) & 1) + (j & 1)

and is kept iff that word ≥ floor(p·2³²).  So one call serves 2×2 scores, the accumulators that one lane of a
tensor core instruction owns::

                         j even    j odd
    i with bit 3 clear   word 0    word 1
    i + 8                word 2    word 3
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from numbers import Integral, Real
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..interop import read_seed
from .shapes import check_shape, is_int

__all__ = [
    "check_dropout_p",
    "check_seed",
    "dropout_mask",
    "dropout_threshold",
    "keep_tile",
    "philox4x32",
]

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)

# Calls that are made together.  Each takes four uint64 words: 0.5 MiB, which stay in a core's L2 cache.  A
# GPU wants few long launches instead: 128 MiB.
_CALLS_PER_BLOCK = 1 << 14
_CALLS_PER_BLOCK_ON_DEVICE = 1 << 22


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any], xp: ModuleType = np) -> tuple[Any, ...]:
    """Philox4x32-10: four random 32-bit words for each counter.

    Parameters
    ----------
    counter : four uint32 arrays, or ints below 2³², that broadcast against each other
    key : (k0, k1), ints below 2³² or 0-d uint32 arrays
    xp : the namespace of the arrays, numpy or cupy

    Returns
    -------
    Four uint32 arrays of the counters' common shape.

    >>> [hex(word) for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    words = [xp.asarray(word).astype(xp.uint64) for word in counter]
    round_key = [xp.uint64(word) if isinstance(word, Integral) else word.astype(xp.uint64) for word in key]
    shape = np.broadcast_shapes(*(word.shape for word in words))
    _philox(words, round_key, memory := xp.empty((4, *shape), dtype=xp.uint64))
    return tuple(memory.astype(xp.uint32))


def keep_tile(seed: Any, dropout_p: float, heads: Any, rows: Any, columns: Any, xp: ModuleType = np) -> Any:
    """The dropout mask of one tile of the scores, True = kept.

    Parameters
    ----------
    seed : int in [0, 2⁶⁴), or a uint64 array of one element
    dropout_p : in [0, 1], the probability that a score is dropped
    heads : b·Hq + h, an integer or an integer array of any shape
    rows, columns : the queries i and the keys j, each a tuple (start, stop) or a 1-D integer array of indices
        in any order.  Tuples are quicker, and need not start at a multiple of anything.
    xp : the namespace of the arrays and of the result, numpy or cupy

    Returns
    -------
    A C-contiguous bool array (*heads.shape, number of rows, number of columns).

    >>> keep_tile(42, 0.5, 0, (6, 9), (100, 108)).astype(int)
    array([[1, 1, 1, 0, 1, 0, 0, 0],
           [1, 0, 1, 0, 1, 1, 0, 0],
           [1, 0, 0, 0, 0, 0, 0, 1]])
    """
    heads = xp.asarray(heads).astype(xp.uint64)
    row_words, pick_rows = _row_words(rows, xp)
    column_words, pick_columns = _column_words(columns, xp)
    num_groups, num_lanes = row_words.shape
    # In the order of the scores: heads, 16 rows, their halves (i >> 3), i & 7, j >> 1, j & 1.
    kept = xp.empty((heads.size, num_groups, 2, num_lanes, column_words.size, 2), dtype=xp.bool_)

    key = _key(seed, xp)
    threshold = xp.uint64(dropout_threshold(dropout_p))
    calls_per_block = _CALLS_PER_BLOCK if xp is np else _CALLS_PER_BLOCK_ON_DEVICE
    memory = xp.empty((4, min(kept.size // 4, calls_per_block)), dtype=xp.uint64)
    for head, group, column in _blocks(heads.size, num_groups, num_lanes, column_words.size, calls_per_block):
        head_word = heads.reshape(-1, 1, 1, 1)[head]
        counter = [
            column_words[column],
            row_words[group, :, None],
            head_word & _LOW_WORD,
            head_word >> _WORD_BITS,
        ]
        shape = np.broadcast_shapes(*(word.shape for word in counter))
        words = _philox(counter, key, memory[:, : math.prod(shape)].reshape(4, *shape))
        for index, word in enumerate(words):
            xp.greater_equal(word, threshold, out=kept[head, group, index >> 1, :, column, index & 1])

    kept = kept.reshape(heads.size, 2 * row_words.size, 2 * column_words.size)
    kept = xp.ascontiguousarray(kept[:, pick_rows][:, :, pick_columns])
    return kept.reshape(*heads.shape, *kept.shape[1:])


def dropout_mask(shape: tuple[int, ...], dropout_p: float, seed: Any) -> npt.NDArray[np.bool_]:
    """The mask that `attention(..., dropout_p=dropout_p, seed=seed)` applies to its weights.

    Whether weight (b, h, i, j) is kept depends on a Philox4x32-10 word (Salmon et al., SC'11) of (seed, b·Hq
    + h, i, j) alone, not on the backend, the device or the tiles.  Kept weights are then divided by 1 −
    dropout_p.

    Parameters
    ----------
    shape : the shape of the scores, (..., [Hq,] L, S).  Axis −3, where there is one, is the head; everything
        before it, flattened in C order, is the batch.
    dropout_p : in [0, 1], the probability that a weight is dropped: 0 keeps all of them, 1 none
    seed : int in [0, 2⁶⁴), or a uint64 array of one element, of any library that `attention` takes

    Returns
    -------
    A NumPy bool array of that shape, True = kept.

    Raises
    ------
    TypeError
        shape is not a tuple of ints, dropout_p not a number, seed neither an int nor a uint64 array.
    ValueError
        shape has less than two dims or a negative one, dropout_p is NaN or outside [0, 1], seed is outside
        [0, 2⁶⁴) or an array whose size is not 1.

    >>> dropout_mask((2, 8), dropout_p=0.25, seed=2024).astype(int)
    array([[1, 1, 1, 1, 1, 0, 1, 1],
           [1, 0, 1, 1, 0, 1, 1, 1]])
    """
    shape = check_shape("shape", shape)
    dropout_p = check_dropout_p(dropout_p)
    seed = check_seed(read_seed(seed))
    if not isinstance(seed, int):
        seed = seed.item()  # the mask is made on the host, wherever the seed lives
    *batch, seqlen_q, seqlen_k = shape
    heads = np.arange(math.prod(batch), dtype=np.uint64).reshape(batch)
    return keep_tile(seed, dropout_p, heads, (0, seqlen_q), (0, seqlen_k))


def dropout_threshold(dropout_p: float) -> int:
    """floor(p·2³²), exact since a power of two only moves the exponent.  For p = 1 it is above every word."""
    return math.floor(math.ldexp(dropout_p, 32))


def check_dropout_p(dropout_p: Any) -> float:
    """Return `dropout_p` as a float; TypeError if it is not a number, ValueError if it is not in [0, 1]."""
    if type(dropout_p) is not float and (isinstance(dropout_p, (bool, np.bool_)) or not isinstance(dropout_p, Real)):
        raise TypeError(f"dropout_p must be a number in [0, 1], but was {_described(dropout_p)}")
    probability = float(dropout_p)
    if not 0 <= probability <= 1:  # NaN comes here too
        raise ValueError(f"dropout_p must be in [0, 1], but was {probability}")
    return probability


def check_seed(seed: Any) -> Any:
    """Return `seed` as an int, or the array that it was.

    The value of an array is not looked at: it may live on a device and change from run to run.

    Raises
    ------
    TypeError
        seed is neither an int nor a uint64 array.
    ValueError
        seed is outside [0, 2⁶⁴), or an array whose size is not 1.
    """
    if is_int(seed):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), but was {seed}")
        return int(seed)
    if getattr(seed, "dtype", None) != np.uint64:
        raise TypeError(f"seed must be an int or a uint64 array of one element, but was {_described(seed)}")
    if seed.size != 1:
        raise ValueError(f"seed must be an int or a uint64 array of one element, but had shape {seed.shape}")
    return seed


def _philox(counter: list[Any], key: Any, memory: Any) -> Any:
    """The ten rounds on uint64 arrays that hold 32-bit words.

    The counter's arrays broadcast and are not written.  The words are made in `memory`: (4, *their common
    shape).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # The words of a tile's counter depend on the column, on the row and on the head, one array each.  As long
    # as they are not broadcast, two rounds cost next to nothing; after them, nearly all words depend on
    # everything.
    for _ in range(2):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1 = (product_1 >> _WORD_BITS) ^ (c1 ^ k0), product_1 & _LOW_WORD
        c2, c3 = (product_0 >> _WORD_BITS) ^ (c3 ^ k1), product_0 & _LOW_WORD
        k0, k1 = (k0 + _WEYL_0) & _LOW_WORD, (k1 + _WEYL_1) & _LOW_WORD
    for index, word in enumerate((c0, c1, c2, c3)):
        memory[index] = word

    c0, c1, c2, c3 = (memory[index, ...] for index in range(4))
    for _ in range(8):
        c0 *= _MULTIPLIER_0
        c2 *= _MULTIPLIER_1
        _add_high_word(c1, c2, k0)
        _add_high_word(c3, c0, k1)
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _WEYL_0) & _LOW_WORD, (k1 + _WEYL_1) & _LOW_WORD
    c1 &= _LOW_WORD
    c3 &= _LOW_WORD
    return memory  # eight times, each word moved up one array: all are back in their places


def _add_high_word(word: Any, product: Any, round_key: Any) -> None:
    """lo(word) ^ hi(product) ^ round_key, in place.

    `word` is a product of the round before.  Moving its low word up, over the high word of `product`, also
    drops its own high word, so that no product needs masking.
    """
    word <<= _WORD_BITS
    word ^= product
    word >>= _WORD_BITS
    word ^= round_key


def _key(seed: Any, xp: ModuleType) -> tuple[Any, Any]:
    seed = xp.uint64(seed) if isinstance(seed, int) else seed.reshape(())
    return seed & _LOW_WORD, seed >> _WORD_BITS


def _row_words(rows: Any, xp: ModuleType) -> tuple[Any, Any]:
    """The counter words of the rows, (groups, lanes), and where each row is among (groups, 2, lanes) rows."""
    if isinstance(rows, tuple):
        start, stop = rows
        if stop - start >= 16:
            first = start >> 4
            words = xp.arange(first << 3, (stop + 15) >> 4 << 3, dtype=xp.uint64).reshape(-1, 8)
            return words, slice(start - (first << 4), stop - (first << 4))
        rows = xp.arange(start, stop)  # a step of decoding has one row; do not compute sixteen
    words, group = xp.unique((rows >> 4 << 3) | (rows & 7), return_inverse=True)
    return words.astype(xp.uint64).reshape(-1, 1), 2 * group + (rows >> 3 & 1)


def _column_words(columns: Any, xp: ModuleType) -> tuple[Any, Any]:
    """The counter words of the columns, (words,), and where each column is among (words, 2) columns."""
    if isinstance(columns, tuple):
        start, stop = columns
        first = start >> 1
        words = xp.arange(first, (stop + 1) >> 1, dtype=xp.uint64)
        return words, slice(start - (first << 1), stop - (first << 1))
    words, pair = xp.unique(columns >> 1, return_inverse=True)
    return words.astype(xp.uint64), 2 * pair + (columns & 1)


def _blocks(heads: int, groups: int, lanes: int, columns: int, calls: int) -> Iterator[tuple[slice, ...]]:
    """Cut heads × groups × columns, with `lanes` calls in each, into slices of at most `calls` calls."""
    column_step = max(1, min(columns, calls // lanes))
    group_step = max(1, min(groups, calls // (lanes * column_step)))
    head_step = max(1, calls // (lanes * column_step * group_step))
    axes = ((heads, head_step), (groups, group_step), (columns, column_step))
    return itertools.product(*([slice(at, at + step) for at in range(0, length, step)] for length, step in axes))


def _described(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return repr(value) if dtype is None else f"an array of {dtype}"
