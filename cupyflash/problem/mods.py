"""What is done to a score between q·kᵀ and softmax, besides masks: the user's functions, softcap and ALiBi.

Every function takes a tile of scores (or its coordinates) and works in any array namespace, so that the materialising
and the tiled backend share one definition of each step.  The order of the steps is fixed:

    s = scale · q·kᵀ  →  score_mod  →  softcap · tanh(s / softcap)  →  + float mask, + ALiBi  →  removal  →  softmax
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Coordinates", "MaskMod", "ScoreMod", "add_alibi", "apply_mask_mod", "apply_score_mod", "cap_scores"]

#: score_mod(score, b, h, q_idx, kv_idx) -> scores
ScoreMod = Callable[[Any, Any, Any, Any, Any], Any]
#: mask_mod(b, h, q_idx, kv_idx) -> bool, True keeps
MaskMod = Callable[[Any, Any, Any, Any], Any]


class Coordinates(NamedTuple):
    """Where a tile of scores lies: integer arrays that broadcast against the tile and each other."""

    b: Any  # index into the flattened batch
    h: Any  # query head
    q_idx: Any  # query row, never shifted by `align`
    kv_idx: Any  # key


def apply_score_mod(function: ScoreMod, scores: Any, at: Coordinates, xp: Any) -> None:
    """Overwrite `scores` with function(scores, b, h, q_idx, kv_idx).

    Raises TypeError if the result is not real-valued, ValueError if it does not broadcast to the scores.
    """
    result = xp.asarray(function(scores, *at))
    if result.dtype.kind not in "fiub" and result.dtype.name != "bfloat16":
        raise TypeError(f"score_mod must return real scores, but returned dtype {result.dtype}")
    _check_broadcasts("score_mod", result.shape, scores.shape)
    scores[...] = result


def apply_mask_mod(function: MaskMod, at: Coordinates, tile_shape: tuple[int, ...], xp: Any) -> Any:
    """The bool array function(b, h, q_idx, kv_idx), True where the key takes part; broadcasts to the tile.

    Raises TypeError if the result is not bool, ValueError if it does not broadcast to the tile.
    """
    keep = xp.asarray(function(*at))
    if keep.dtype != bool:
        raise TypeError(f"mask_mod must return a bool array, but returned dtype {keep.dtype}")
    _check_broadcasts("mask_mod", keep.shape, tile_shape)
    return keep


def _check_broadcasts(name: str, shape: tuple[int, ...], tile_shape: tuple[int, ...]) -> None:
    fits = len(shape) <= len(tile_shape) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(tile_shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must return an array that broadcasts to {tile_shape}, but returned shape {shape}")


def cap_scores(scores: Any, softcap: float, xp: Any) -> None:
    """Overwrite `scores` with softcap · tanh(scores / softcap) (Gemma 2).

    A score of -inf is a removal and stays one; tanh alone would turn it into -softcap.
    """
    removed = xp.isneginf(scores)
    scores /= softcap
    xp.tanh(scores, out=scores)
    scores *= softcap
    if removed.any():
        scores[removed] = -xp.inf


def add_alibi(scores: Any, slopes: Any, q_idx: Any, kv_idx: Any, shift: int, last: int, xp: Any) -> None:
    """Add -slope · |i + shift - j| to `scores` (Press, Smith, Lewis 2022).

    `slopes` (float32) broadcasts against the scores.  `last` bounds |i + shift| and j: where the scores' dtype holds
    such integers exactly, the distance is computed in it, which is quicker, else in float64 and rounded once.
    """
    exact = scores.dtype if last < 2**24 else np.float64
    distance = (q_idx + shift).astype(exact) - kv_idx.astype(exact)
    xp.abs(distance, out=distance)
    scores -= slopes * distance.astype(scores.dtype, copy=False)
