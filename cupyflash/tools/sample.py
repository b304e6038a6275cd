"""Small calls to look at: random queries, keys and values, and masks of the forms that models use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import mods
from ..problem.dtypes import dtype_named

__all__ = ["LARGEST", "MASKS", "MASK_MODS", "sample_call"]

#: Scores of a call, all heads together: a page holds every one that is computed.
LARGEST = 2**20

Array = np.ndarray[Any, Any]
_MEMORY = 0.9  # how much of a token its neighbour keeps
_SHARED = 0.12  # how much queries and keys of one position have in common
_BLOCK = 64  # of a random mask: tiles of most kernels


def sample_call(
    shape: Sequence[int],
    *,
    gqa: int = 1,
    mask: str | None = None,
    mask_mod: str | None = None,
    dtype: str = "float16",
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """The arguments of a call of `attention`.

    Every number is normal, but tokens that follow one another are alike, and so are query and key of one position:
    scores then have a pattern, as a text's have.

    Parameters
    ----------
    shape : (B, H, L, S, E)
        Batch, query heads, queries, keys, head dim.
    gqa : int
        Query heads that share a head of keys and values.
    mask : {"padding", "document", "random"}, optional
        A bool mask.  padding: entries of the batch end early, the first by a quarter of the keys.  document: a token
        sees its own document, of three.  random: of blocks of 64 × 64 some are kept, some removed, some mixed.
    mask_mod : {"document", "prefix", "dilated"}, optional
        A function of `cupyflash.mods`.
    **more
        Further arguments of `attention`.

    Raises
    ------
    ValueError
        A size is not positive, the heads can't be shared like that, or there are more than `LARGEST` scores.
    """
    batch, heads, seqlen_q, seqlen_k, head_dim = shape
    if min(shape) < 1:
        raise ValueError(f"shape must hold sizes of at least 1, but was {','.join(map(str, shape))}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, but was {seed}")
    if heads % gqa:
        raise ValueError(f"gqa must divide the {heads} query heads, but was {gqa}")
    scores = batch * heads * seqlen_q * seqlen_k
    if scores > LARGEST:
        raise ValueError(
            f"shape must have B·H·L·S up to {LARGEST:,}, for all these scores are kept, but was "
            f"{','.join(map(str, shape))}: {scores:,} scores"
        )
    rng = np.random.default_rng(seed)
    storage = dtype_named(dtype).storage
    key_heads = heads // gqa
    common = _tokens(rng, (batch, key_heads, max(seqlen_q, seqlen_k), head_dim))

    def mixed(length: int, times: int) -> Array:
        own = _tokens(rng, (batch, key_heads * times, length, head_dim))
        of_position = np.repeat(common[:, :, :length], times, axis=1)
        return (np.sqrt(_SHARED) * of_position + np.sqrt(1 - _SHARED) * own).astype(storage)

    value = rng.standard_normal((batch, key_heads, seqlen_k, head_dim)).astype(storage)
    call = {"query": mixed(seqlen_q, gqa), "key": mixed(seqlen_k, 1), "value": value, "enable_gqa": gqa > 1, **more}
    if mask is not None:
        call["attn_mask"] = MASKS[mask](rng, batch, seqlen_q, seqlen_k)
    if mask_mod is not None:
        call["mask_mod"] = MASK_MODS[mask_mod](seqlen_q, seqlen_k)
    return call


def _tokens(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Normal numbers, of which each row keeps a part of the row before."""
    noise = rng.standard_normal(shape)
    for row in range(1, shape[-2]):
        noise[..., row, :] = _MEMORY * noise[..., row - 1, :] + np.sqrt(1 - _MEMORY**2) * noise[..., row, :]
    return noise


def _document(length: int) -> Array:
    """The document of each token: three, of unequal lengths."""
    return np.searchsorted([0.35, 0.55], np.arange(length) / length, side="right")


def _padding(rng: np.random.Generator, batch: int, seqlen_q: int, seqlen_k: int) -> Array:
    lengths = np.maximum(1, seqlen_k * (3 + np.arange(batch)[:, None, None, None] % 2) // 4)
    return np.arange(seqlen_k) < lengths


def _documents(rng: np.random.Generator, batch: int, seqlen_q: int, seqlen_k: int) -> Array:
    return _document(seqlen_q)[:, None] == _document(seqlen_k)


def _random(rng: np.random.Generator, batch: int, seqlen_q: int, seqlen_k: int) -> Array:
    kept = rng.choice([0.0, 0.5, 1.0], (-(-seqlen_q // _BLOCK), -(-seqlen_k // _BLOCK)))
    chance = np.kron(kept, np.ones((_BLOCK, _BLOCK)))[:seqlen_q, :seqlen_k]
    return rng.random((seqlen_q, seqlen_k)) < chance


MASKS: dict[str, Callable[[np.random.Generator, int, int, int], Array]] = {
    "padding": _padding,
    "document": _documents,
    "random": _random,
}
MASK_MODS: dict[str, Callable[[int, int], Any]] = {
    "document": lambda seqlen_q, seqlen_k: mods.document_mask(_document(max(seqlen_q, seqlen_k))),
    "prefix": lambda seqlen_q, seqlen_k: mods.prefix_lm(seqlen_k // 4),
    "dilated": lambda seqlen_q, seqlen_k: mods.dilated_window(8, 8),
}
