"""The public functions.  They read keywords and pass them on; the work is done in `problem` and `backends`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

from .backends.registry import select
from .interop import NATIVE, call, is_foreign
from .problem.checks import check_stage, device_of
from .problem.mods import MaskMod, ScoreMod
from .problem.normalize import normalize, restore

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention", "attention_weights"]

Array = TypeVar("Array")


class _Options(TypedDict, total=False):
    """What does not change the type of the result; for type checkers."""

    attn_mask: Any
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    window: Sequence[int | None] | None
    align: str | int
    softcap: float | None
    alibi_slopes: Any
    sinks: Any
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    seed: Any
    precision: str
    out: Any
    backend: str | None


# The results by return_lse and return_weights, then the first eight arguments by place, as with PyTorch.
@overload
def attention(
    query: Array,
    key: Any,
    value: Any,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@overload
def attention(
    query: Array,
    key: Any,
    value: Any,
    *,
    return_lse: Literal[True],
    return_weights: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[Array, Any]: ...
@overload
def attention(
    query: Array,
    key: Any,
    value: Any,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Array, Array]: ...
@overload
def attention(
    query: Array,
    key: Any,
    value: Any,
    *,
    return_lse: Literal[True],
    return_weights: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Array, Any, Array]: ...
@overload
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Sequence[int | None] | None = None,
    align: str | int = "top_left",
    softcap: float | None = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    seed: Any = None,
    precision: str = "ieee",
    return_lse: bool = False,
    return_weights: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any: ...
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Sequence[int | None] | None = None,
    align: str | int = "top_left",
    softcap: float | None = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    seed: Any = None,
    precision: str = "ieee",
    return_lse: bool = False,
    return_weights: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    r"""Scaled-dot-product attention: softmax(scale · Q Kᵀ) V, without ever holding the L×S matrix.

    Arrays are of NumPy, CuPy, PyTorch, JAX or any library with DLPack, all of one; so are the results.  The first eight
    arguments are those of ``torch.nn.functional.scaled_dot_product_attention``.  The order of operations is fixed::

        s = scale · q·kᵀ  →  score_mod  →  softcap · tanh(s / softcap)  →  + float mask, + ALiBi
          →  removal by bool mask, mask_mod, causal, window  →  softmax (sinks in its denominator)  →  dropout  →  · v

    Parameters
    ----------
    query : array (…, [Hq,] L, E)
        float16, bfloat16 (``ml_dtypes.bfloat16``), float32 or float64.  Leading axes broadcast against those of key and
        value, missing ones included.  Any strides.  Axis -3 of the output is the head axis.
    key : array (…, [Hk,] S, E)
        In query's dtype.
    value : array (…, [Hv,] S, Ev)
        In query's dtype; Ev may differ from E.
    attn_mask : array, or tuple (float array, bool array), optional
        bool: True takes part.  Float (query's dtype or float32): added to the scores; -inf removes.  Broadcasts into
        the scores' shape (…, [Hq,] L, S), and is never expanded to it.
    dropout_p : float, default 0
        Probability in [0, 1] that a weight is dropped; kept ones are scaled by 1 / (1 - dropout_p).
    is_causal : bool, default False
        Query i sees the keys j <= i + shift, with the shift of `align`.
    scale : float, default 1/√E
    enable_gqa : bool, default False
        Grouped-query attention: query head h reads key head h // (Hq/Hk) and value head h // (Hq/Hv).
    window : (left, right), optional
        Query i sees the keys i + shift - left <= j <= i + shift + right.  None or -1 leaves a side unbounded.
    align : {"top_left", "bottom_right"} or int, default "top_left"
        Which diagonal is the main one: shift = 0, S - L, or the int itself.  Decoding one token against S cached keys
        with is_causal wants "bottom_right"; with "top_left" it sees key 0 only.
    softcap : float, default 0 (off)
    alibi_slopes : float32 array (Hq,) or (b, Hq), optional
        Adds -slope · |i + shift - j|.  b counts the flattened batch.
    sinks : array (Hq,), optional
        In query's dtype or float32, natural-log units, not scaled: one more term exp(sink) in each softmax denominator.
    score_mod : callable, optional
        ``score_mod(score, b, h, q_idx, kv_idx)`` returns new scores.  score is a float array (the accumulation dtype);
        the coordinates are integer arrays that broadcast to it.  -inf removes.  It is called tile by tile, on several
        threads.
    mask_mod : callable, optional
        ``mask_mod(b, h, q_idx, kv_idx)`` returns a bool array, True where the key takes part.
    seed : int in [0, 2**64) or uint64 array of size 1, optional
        Seed of dropout.  The mask is a pure function of the seed and the position: see `dropout_mask`.  Without one it
        is drawn from NumPy's global generator.
    precision : {"ieee", "tf32", "tf32x3"}, default "ieee"
        How float32 products are computed.  No backend has the other two so far.
    return_lse : bool, default False
        Also return the log-sum-exp of each row: natural log, after masks and sinks, before dropout.
    return_weights : bool, default False
        Also return the weights (…, [Hq,] L, S) after dropout, in query's dtype: the one L×S array that is then made.
    out : array (…, [Hq,] L, Ev), optional
        Where to write the output: query's dtype, any strides that do not overlap, no memory shared with an input.
    backend : str, optional
        Name of a backend, obeyed or refused.  Default: the environment variable CUPYFLASH_BACKEND, else the arrays
        decide: "numpy" for NumPy arrays, "cuda" for CuPy arrays.

    Returns
    -------
    out : array (…, [Hq,] L, Ev)
        In query's dtype, accumulated in float32 (float64 for float64).  A row with every key removed is 0.
    lse : array (…, [Hq,] L), with return_lse
        float32 (float64 for float64); -inf for a row with every key removed.
    weights : array (…, [Hq,] L, S), with return_weights

    Raises
    ------
    TypeError
        An argument of the wrong kind: no array, a dtype that is not accepted, mixed dtypes or libraries.
    ValueError
        An argument of the wrong value: shapes that don't fit, a probability above 1, an `out` that shares memory.
    Unsupported
        The backend can't run the call; the message holds the reasons of every backend.

    Notes
    -----
    NaN or inf in a removed key does not reach the output.  In a removed *value* row it may (0 · NaN is NaN).

    References
    ----------
    Vaswani et al. 2017, "Attention is all you need", eq. 1.  Dao 2023, "FlashAttention-2", Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyflash import attention
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 2, 8, 1024, 64), dtype=np.float32)  # batch, heads, length, dim
    >>> attention(query, key, value, is_causal=True).shape
    (2, 8, 1024, 64)

    Eight query heads share two key heads, and only the last 100 keys are seen:

    >>> out, lse = attention(query, key[:, :2], value[:, :2], enable_gqa=True, window=(99, 0), return_lse=True)
    >>> out.shape, lse.shape
    ((2, 8, 1024, 64), (2, 8, 1024))

    A score function is plain NumPy:

    >>> def decay(score, b, h, q_idx, kv_idx):
    ...     return score - 0.1 * np.abs(q_idx - kv_idx)
    >>> out = attention(query, key, value, score_mod=decay)
    """
    if type(query) not in NATIVE and is_foreign(query):
        return call(attention, locals())
    with device_of(query):
        # By place, which takes an eighth of the time that names do.
        problem, buffers = normalize(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            window,
            align,
            softcap,
            alibi_slopes,
            sinks,
            score_mod,
            mask_mod,
            seed,
            precision,
            return_lse,
            return_weights,
            out,
        )
        select(problem, backend).run(problem, buffers)
        return restore(problem, buffers)


def attention_weights(
    query: Any,
    key: Any,
    attn_mask: Any = None,
    *,
    stage: str,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Sequence[int | None] | None = None,
    align: str | int = "top_left",
    softcap: float | None = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    precision: str = "ieee",
    backend: str | None = None,
) -> Any:
    """The scores or weights of `attention` at one stage, as one L×S array per head.

    For looking at attention maps and for checking other implementations; `attention` itself never makes this array.

    Parameters
    ----------
    stage : {"raw", "modded", "capped", "biased", "softmax"}
        How far to compute: scale · q·kᵀ; after score_mod; after softcap; after masks and ALiBi, removed entries -inf;
        the weights.
    query, key, attn_mask, … : as for `attention`

    Returns
    -------
    array (…, [Hq,] L, S)
        "softmax" in query's dtype.  The other stages in the accumulation dtype, float32 (float64 for float64), since
        scores of float16 inputs may exceed its range.

    Raises
    ------
    TypeError, ValueError, Unsupported
        As `attention`; ValueError for a stage that is not known.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyflash import attention_weights
    >>> query = key = np.eye(3, dtype=np.float32)
    >>> attention_weights(query, key, stage="biased", scale=1.0, is_causal=True)
    array([[  1., -inf, -inf],
           [  0.,   1., -inf],
           [  0.,   0.,   1.]], dtype=float32)
    """
    if type(query) not in NATIVE and is_foreign(query):
        return call(attention_weights, locals())
    with device_of(query):
        problem, buffers = normalize(
            query,
            key,
            None,
            attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            align=align,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            score_mod=score_mod,
            mask_mod=mask_mod,
            precision=precision,
            stage=check_stage(stage),
        )
        select(problem, backend).run(problem, buffers)
        return buffers.weights if problem.has_head_axis else buffers.weights[0]
