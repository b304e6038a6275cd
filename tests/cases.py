"""The backends under test, what each can do, and the calls that every one of them must answer rightly.

A backend joins by a row in BACKENDS; a rule of the contract, by a row in CASES.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings

from cupyflash.testing import DTYPES, LAYOUTS, Case, MaskSpec, SinkSpec


@dataclass(frozen=True)
class Capabilities:
    """What a backend answers; it must refuse the rest with `cupyflash.Unsupported`."""

    dtypes: tuple[str, ...] = tuple(DTYPES)
    refuses: frozenset[str] = frozenset()
    max_head_dim: int | None = None

    def refused_features(self, case: Case) -> set[str]:
        features = {name for name in self.refuses if getattr(case, name)} | ({case.dtype} - set(self.dtypes))
        head_dim, head_dim_v = case.query_shape[-1], case.value_shape[-1]
        if self.max_head_dim is not None and max(head_dim, head_dim_v) > self.max_head_dim:
            features.add(f"head dims {head_dim} and {head_dim_v}")
        return features


#: Backends that run any call.
BACKENDS: dict[str, Capabilities] = {
    "math": Capabilities(),
    "numpy": Capabilities(),
}

#: Backends that run the GPU kernels. Calls are refused all over the op body; tests/ops/conftest.py lets a refusal pass.
KERNEL_BACKENDS: dict[str, Capabilities] = {
    "emulator": Capabilities(
        max_head_dim=256,
    ),
}

CAPABILITIES = BACKENDS | KERNEL_BACKENDS

on_general_backends = pytest.mark.parametrize("backend", BACKENDS)
on_every_backend = pytest.mark.parametrize("backend", CAPABILITIES)
on_kernel_backends = pytest.mark.parametrize("backend", KERNEL_BACKENDS)


def examples(share: float) -> settings:
    """So many times the examples that the hypothesis profile asks for."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)))


def heads(
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    **arguments: object,
) -> Case:
    """(B, H, L, E) against (B, H, S, E)."""
    lead = (batch, num_heads)
    return Case(
        query_shape=(*lead, seqlen_q, head_dim),
        key_shape=(*lead, seqlen_k, head_dim),
        value_shape=(*lead, seqlen_k, head_dim if head_dim_v is None else head_dim_v),
        **arguments,  # type: ignore[arg-type]
    )


def single(seqlen_q: int, seqlen_k: int, head_dim: int = 16, **arguments: object) -> Case:
    """(1, L, E) against (1, S, E)."""
    return Case(
        query_shape=(1, seqlen_q, head_dim),
        key_shape=(1, seqlen_k, head_dim),
        value_shape=(1, seqlen_k, head_dim),
        **arguments,  # type: ignore[arg-type]
    )


def shapes(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], **arguments: object) -> Case:
    return Case(query_shape=query, key_shape=key, value_shape=value, **arguments)  # type: ignore[arg-type]


def resized(case: Case, seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int) -> Case:
    """The case with other lengths and head dims; masks broadcast along the axes along which they did."""
    lengths = (seqlen_q, seqlen_k)

    def mask_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
        rank = min(2, len(shape))
        ends = [1 if n == 1 else new for n, new in zip(shape[-2:], lengths[2 - rank :], strict=True)]
        return (*shape[:-2], *ends)

    return replace(
        case,
        query_shape=(*case.query_shape[:-2], seqlen_q, head_dim),
        key_shape=(*case.key_shape[:-2], seqlen_k, head_dim),
        value_shape=(*case.value_shape[:-2], seqlen_k, head_dim_v),
        masks=tuple(spec._replace(shape=mask_shape(spec.shape)) for spec in case.masks),
    )


def numbered(name: str, cases: Iterable[tuple[object, Case]]) -> dict[str, Case]:
    return {f"{name}-{what}".replace(" ", ""): case for what, case in cases}


SHAPES = {
    "2-D": shapes((5, 8), (7, 8), (7, 8)),
    "3-D": shapes((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "4-D": heads(2, 3, 5, 7, 8),
    "5-D": shapes((2, 1, 3, 5, 8), (2, 1, 3, 7, 8), (2, 1, 3, 7, 8)),
    "7-D": shapes((1, 2, 1, 2, 3, 5, 8), (1, 2, 1, 2, 3, 7, 8), (1, 2, 1, 2, 3, 7, 8)),
    "query-without-leading-dims": shapes((5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "key-without-leading-dims": shapes((2, 3, 5, 8), (7, 8), (2, 3, 7, 8)),
    "value-without-leading-dims": shapes((2, 3, 5, 8), (2, 3, 7, 8), (7, 8)),
    "each-operand-broadcasts-along-another-dim": shapes((2, 1, 1, 5, 8), (1, 3, 1, 7, 8), (1, 1, 4, 7, 8)),
    "value-alone-has-a-batch": shapes((5, 8), (7, 8), (4, 7, 8)),
    "value-alone-has-batch-and-head": shapes((1, 5, 8), (7, 8), (2, 4, 7, 8)),
    "value-alone-has-a-batch-and-masks": shapes(
        (3, 5, 8),
        (3, 7, 8),
        (2, 3, 7, 4),
        masks=(MaskSpec("float32", (3, 1, 7)), MaskSpec("bool", (5, 7))),
        score_mod="per_head",
        mask_mod="checkers",
        dropout_p=0.3,
        seed=5,
        return_weights=True,
    ),
    "one-head-of-keys-for-all-without-the-flag": shapes((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "value-wider-than-key": heads(2, 2, 5, 7, 8, 24),
    "value-narrower-than-key": heads(2, 2, 5, 7, 24, 3),
    "odd-head-dims": heads(1, 2, 5, 7, 13, 29),
    "head-dim-1": heads(1, 2, 5, 7, 1, 1),
    "head-dim-300": heads(1, 2, 5, 7, 300, 300),
    "head-dim-0-gives-the-mean-of-v": heads(2, 2, 5, 7, 0, 8),
    # Fifty-five equal terms, whose roundings are equal too.
    "head-dim-0-and-one-value-for-all": shapes(
        (1, 4, 0), (1, 55, 0), (1, 55, 5), layouts=("contiguous", "contiguous", "repeated_rows")
    ),
    "head-dim-0-with-bias": heads(2, 2, 5, 7, 0, 8, masks=(MaskSpec("float32", (5, 7)),)),
    "value-dim-0": heads(2, 2, 5, 7, 8, 0, return_weights=True),
    "no-keys": heads(2, 2, 5, 0, return_weights=True),
    "no-keys-with-sinks": heads(2, 2, 5, 0, sinks=SinkSpec(), return_weights=True),
    "no-keys-causal": heads(2, 2, 5, 0, is_causal=True, align="bottom_right", window=(3, 3)),
    "no-keys-no-head-dim": heads(2, 2, 5, 0, 0, 8),
    "no-queries": heads(2, 2, 0, 7, return_weights=True),
    "no-queries-no-keys": heads(2, 2, 0, 0, return_weights=True),
    "no-batch": heads(0, 2, 5, 7, return_weights=True),
    "no-heads": heads(2, 0, 5, 7, return_weights=True),
    "one-query-one-key": heads(1, 1, 1, 1, 8),
    "one-query": heads(2, 3, 1, 33),
    "one-key": heads(2, 3, 33, 1),
}

# Around the sizes at which a tile ends, with the diagonal of causal crossing tiles.
TILES = {
    **numbered(
        "causal",
        (
            ((n, m), single(n, m, 8, is_causal=True, align="bottom_right"))
            for n, m in ((255, 257), (257, 511), (512, 512), (513, 255), (511, 1025), (1023, 513))
        ),
    ),
    **numbered("dense", (((n, m), single(n, m, 8)) for n, m in ((256, 1024), (513, 513), (3, 1537), (1025, 3)))),
    **numbered(
        "masked",
        (
            ((n, m), single(n, m, 8, masks=(MaskSpec("float32", (m,)), MaskSpec("bool", (n, m)))))
            for n, m in ((257, 513), (511, 1023))
        ),
    ),
    "left-padding-hides-whole-tiles": single(40, 1700, 8, masks=(MaskSpec("bool", (1700,), values="left_padding"),)),
    "right-padding-hides-whole-tiles": single(40, 1700, 8, masks=(MaskSpec("bool", (1700,), values="padding"),)),
    "window-leaves-whole-tiles": single(1300, 1300, 8, window=(100, 50)),
    "window-far-from-the-diagonal": single(600, 1500, 8, window=(-1, 0), align=700),
    "rows-that-see-nothing-beside-rows-that-do": single(700, 700, 8, is_causal=True, align=-300),
    "dropout-over-tiles": single(530, 1040, 8, dropout_p=0.4, seed=11, return_weights=True),
    "all-at-once-over-tiles": heads(
        1,
        2,
        300,
        1100,
        8,
        5,
        masks=(MaskSpec("float32", (2, 1, 1100)), MaskSpec("bool", (300, 1100))),
        is_causal=True,
        align="bottom_right",
        window=(700, None),
        softcap=20.0,
        alibi_shape=(2,),
        sinks=SinkSpec(),
        score_mod="look_up",
        mask_mod="document",
        dropout_p=0.1,
        seed=3,
    ),
    "decode": Case(
        query_shape=(2, 32, 1, 64), key_shape=(2, 8, 4099, 64), value_shape=(2, 8, 4099, 64), enable_gqa=True
    ),
    "decode-8192": Case(
        query_shape=(1, 32, 1, 32),
        key_shape=(1, 8, 8192, 32),
        value_shape=(1, 8, 8192, 32),
        enable_gqa=True,
        is_causal=True,
        align="bottom_right",
    ),
    "decode-static-cache": Case(
        query_shape=(2, 8, 1, 16),
        key_shape=(2, 2, 3000, 16),
        value_shape=(2, 2, 3000, 16),
        enable_gqa=True,
        is_causal=True,
        align=1999,
    ),
    "decode-float16": Case(
        query_shape=(2, 8, 1, 32),
        key_shape=(2, 2, 2050, 32),
        value_shape=(2, 2, 2050, 32),
        enable_gqa=True,
        dtype="float16",
        masks=(MaskSpec("bool", (2, 1, 1, 2050), values="padding"),),
    ),
    "few-queries": Case(
        query_shape=(1, 8, 5, 32),
        key_shape=(1, 4, 2500, 32),
        value_shape=(1, 2, 2500, 32),
        enable_gqa=True,
        is_causal=True,
        align="bottom_right",
        sinks=SinkSpec(),
    ),
    "many-tiny-heads": heads(64, 8, 16, 16, 8),
    "many-tiny-heads-with-everything": heads(
        16,
        8,
        16,
        16,
        8,
        is_causal=True,
        alibi_shape=(16, 8),
        sinks=SinkSpec(),
        masks=(MaskSpec("bool", (16, 1, 1, 16), values="padding"),),
        dropout_p=0.2,
        seed=1,
        return_weights=True,
    ),
}

# The largest score moves while the keys go by: what an online softmax lives by.
MOVING_SCORES = {
    f"{values}-{what}": single(37, 1700, 8, values=values, **arguments)
    for values in ("rising", "falling", "jumping")
    for what, arguments in {
        "plain": {},
        "causal": {"is_causal": True, "align": "bottom_right"},
        "bool-mask": {"masks": (MaskSpec("bool", (37, 1700)),)},
        "float-mask": {"masks": (MaskSpec("float32", (1700,), values="large"),)},
        "sinks": {"sinks": SinkSpec(offset=60.0)},
        "float64": {"dtype": "float64"},
        "bfloat16": {"dtype": "bfloat16"},
    }.items()
} | {
    # Small q and k bound q·k, but not what is added to it.
    "small-scores-large-bias": single(
        30, 1500, 8, magnitude=0.1, masks=(MaskSpec("float32", (30, 1500), values="large"),)
    ),
    "small-scores-rising-alibi": single(30, 1500, 8, magnitude=0.1, alibi_shape=(1,), alibi_factor=-1.0),
    "small-scores-falling-alibi": single(30, 1500, 8, magnitude=0.1, alibi_shape=(1,), alibi_factor=4.0),
    "small-scores-large-sink": single(30, 1500, 8, magnitude=0.1, sinks=SinkSpec(offset=200.0)),
    "small-scores-very-negative-sink": single(30, 1500, 8, magnitude=0.1, sinks=SinkSpec(offset=-300.0)),
    "large-scores": single(30, 1100, 8, magnitude=20.0),
    "large-negative-scale": single(30, 1100, 8, scale=-30),
}

LAYOUT_CASES = {
    f"{layout}-{which}": heads(2, 3, 6, 9, 8, 5, layouts=layouts, dtype=dtype, is_causal=True)
    for layout in (
        "fortran",
        "swapped_heads",
        "transposed",
        "strided",
        "reversed",
        "repeated_rows",
        "repeated_columns",
        "overlapping",
        "unaligned",
        "read_only",
    )
    for which, layouts, dtype in (
        ("query", (layout, "contiguous", "contiguous"), "float32"),
        ("key", ("contiguous", layout, "contiguous"), "float32"),
        ("value", ("contiguous", "contiguous", layout), "float32"),
        ("all-float16", (layout, layout, layout), "float16"),
        ("all-bfloat16", (layout, layout, layout), "bfloat16"),
        ("all-float64", (layout, layout, layout), "float64"),
    )
} | {
    f"{layout}-over-tiles": heads(1, 2, 300, 700, 8, 5, layouts=(layout, layout, layout), is_causal=True)
    for layout in ("swapped_heads", "transposed", "reversed", "overlapping")
}

GQA = {
    f"{hq}-query-{hk}-key-{hv}-value-heads": Case(
        query_shape=(2, hq, 5, 8),
        key_shape=(2, hk, 7, 8),
        value_shape=(2, hv, 7, 4),
        enable_gqa=True,
        **arguments,
    )
    for hq, hk, hv, arguments in (
        (4, 2, 2, {}),
        (8, 1, 1, {"is_causal": True}),
        (8, 8, 8, {}),
        (4, 4, 2, {"masks": (MaskSpec("bool", (4, 5, 7)),)}),
        (4, 1, 4, {"masks": (MaskSpec("float32", (2, 1, 1, 7)),)}),
        (6, 2, 3, {"alibi_shape": (6,)}),
        (12, 4, 6, {"sinks": SinkSpec(), "alibi_shape": (2, 12)}),
        (12, 6, 4, {"score_mod": "per_head", "mask_mod": "checkers"}),
        (12, 3, 2, {"dropout_p": 0.5, "seed": 9, "return_weights": True}),
    )
} | {
    "gqa-3-D": shapes((6, 5, 8), (2, 7, 8), (3, 7, 8), enable_gqa=True),
    "gqa-batches-broadcast": shapes((1, 3, 6, 5, 8), (2, 1, 2, 7, 8), (3, 7, 8), enable_gqa=True),
    "gqa-over-tiles": shapes(
        (6, 300, 8),
        (2, 700, 8),
        (3, 700, 8),
        enable_gqa=True,
        is_causal=True,
        align="bottom_right",
        sinks=SinkSpec(),
        masks=(MaskSpec("float32", (6, 1, 700)),),
    ),
    "gqa-float16-swapped": shapes(
        (2, 6, 40, 8),
        (2, 2, 70, 8),
        (2, 2, 70, 8),
        enable_gqa=True,
        dtype="float16",
        layouts=("swapped_heads", "swapped_heads", "swapped_heads"),
    ),
}

DTYPE_CASES = {
    f"{dtype}-{what}": heads(2, 2, 20, 30, 16, 8, dtype=dtype, return_weights=True, **arguments)
    for dtype in DTYPES
    for what, arguments in {
        "plain": {},
        "causal-window-softcap": {"is_causal": True, "window": (6, 0), "softcap": 3.0},
        "mask-of-its-dtype": {"masks": (MaskSpec(dtype, (20, 30)),)},
        "mask-of-float32": {"masks": (MaskSpec("float32", (2, 1, 30)),)},
        "sinks-of-its-dtype": {"sinks": SinkSpec(dtype)},
        "alibi": {"alibi_shape": (2,)},
        "dropout": {"dropout_p": 0.25, "seed": 4},
        "score-mod": {"score_mod": "look_up"},
    }.items()
} | {
    # 300·300·√64 = 720,000: far beyond float16's 65504.
    "float16-scores-beyond-its-range": heads(1, 2, 20, 30, 64, dtype="float16", magnitude=300.0),
    "float16-large-values": heads(
        1, 2, 20, 30, 16, dtype="float16", layouts=("contiguous",) * 3, scale=1e-4, magnitude=8000.0
    ),
    "float16-lowest-bias-is-an-ordinary-one": heads(
        1, 2, 21, 30, 16, dtype="float16", masks=(MaskSpec("float16", (21, 30), values="minimum"),)
    ),
}

_SCORES = (2, 3, 6, 9)
MASKS = (
    {
        f"{dtype}-{'x'.join(map(str, shape)) or '0-d'}": heads(
            2, 3, 6, 9, masks=(MaskSpec(dtype, shape),), return_weights=True
        )
        for dtype in ("bool", "float32")
        for shape in (
            (),
            (1,),
            (9,),
            (6, 9),
            (6, 1),
            (1, 9),
            (1, 1),
            (3, 6, 9),
            (3, 1, 9),
            (1, 6, 9),
            (3, 1, 1),
            (2, 3, 6, 9),
            (2, 1, 1, 9),
            (1, 3, 6, 1),
            (2, 3, 1, 1),
            (1, 1, 1, 1),
        )
    }
    | {
        f"{dtype}-{layout}": heads(2, 3, 6, 9, masks=(MaskSpec(dtype, _SCORES, layout),))
        for dtype in ("bool", "float32")
        for layout in (
            "fortran",
            "swapped_heads",
            "transposed",
            "strided",
            "reversed",
            "repeated_rows",
            "repeated_columns",
            "overlapping",
            "unaligned",
            "read_only",
        )
    }
    | {
        f"{dtype}-{values}": heads(
            2,
            3,
            6,
            9,
            dtype=of,
            masks=(MaskSpec(dtype, (2, 3, 6, 9), values=values),),
            return_weights=True,
            **arguments,
        )
        for dtype, values, of, arguments in (
            *((("bool", values, "float32", {})) for values in ("padding", "left_padding", "dead_rows", "all", "none")),
            *((("float32", values, "float32", {})) for values in ("finite", "large", "minimum", "dead_rows")),
        )
    }
    | {
        "dead-rows-with-sinks": heads(
            2,
            3,
            6,
            9,
            masks=(MaskSpec("bool", (6, 9), values="dead_rows"),),
            sinks=SinkSpec(),
            return_weights=True,
        ),
        "float-dead-rows-with-sinks": heads(
            2, 3, 6, 9, masks=(MaskSpec("float32", (6, 9), values="dead_rows"),), sinks=SinkSpec(holes=True)
        ),
        "dead-rows-over-tiles": single(300, 1100, 8, masks=(MaskSpec("bool", (300, 1100), values="dead_rows"),)),
        "lowest-float-over-tiles": single(300, 1100, 8, masks=(MaskSpec("float32", (300, 1100), values="minimum"),)),
        "tuple-of-both": heads(2, 3, 6, 9, masks=(MaskSpec("float32", (3, 6, 9)), MaskSpec("bool", (2, 1, 1, 9)))),
        "tuple-with-minus-infinities": heads(
            2,
            3,
            6,
            9,
            masks=(MaskSpec("float32", (6, 9), values="dead_rows"), MaskSpec("bool", (9,), values="padding")),
        ),
        "float32-mask-for-float16": heads(
            2, 3, 6, 9, dtype="float16", masks=(MaskSpec("float32", (9,), values="minimum"),)
        ),
        "float32-mask-for-float64": heads(2, 3, 6, 9, dtype="float64", masks=(MaskSpec("float32", (6, 9)),)),
    }
)

_BANDS = ((6, 6), (4, 9), (9, 4), (1, 9), (9, 1))
BANDS = {
    f"{n}x{m}-{align}-{'causal' if is_causal else 'free'}-{window}".replace(" ", ""): heads(
        1, 2, n, m, 8, is_causal=is_causal, window=window, align=align, return_weights=True
    )
    for n, m in _BANDS
    for align in ("top_left", "bottom_right", 2, -2)
    for is_causal, window in (
        (True, None),
        (False, (2, 1)),
        (True, (2, None)),
        (False, (None, 0)),
        (False, (0, 0)),
        (True, (3, 3)),
        (False, (-1, 2)),
    )
} | {
    "window-of-both-unbounded": heads(1, 2, 6, 9, window=(None, -1)),
    "window-beyond-int32": heads(1, 2, 6, 9, window=(2**40, 2**70), is_causal=True),
    "shift-far-right": heads(1, 2, 6, 9, is_causal=True, align=10**6),
    "shift-far-left": heads(1, 2, 6, 9, is_causal=True, align=-(10**6)),
    "largest-shift": heads(1, 2, 6, 9, is_causal=True, align=2**31 - 1, window=(2**31 - 1, 2**31 - 1)),
    "lowest-shift": heads(1, 2, 6, 9, is_causal=True, align=-(2**31), window=(2**31 - 1, 2**31 - 1)),
    "window-with-far-shift": heads(1, 2, 6, 9, window=(2, 2), align=-(2**30)),
    "causal-and-bool-mask": heads(2, 2, 6, 9, is_causal=True, masks=(MaskSpec("bool", (6, 9)),)),
    "causal-and-float-mask": heads(2, 2, 6, 9, is_causal=True, masks=(MaskSpec("float32", (2, 1, 6, 9)),)),
    "causal-window-tuple-mask-and-mask-mod": heads(
        2,
        2,
        16,
        19,
        is_causal=True,
        window=(7, 3),
        align="bottom_right",
        mask_mod="checkers",
        masks=(MaskSpec("float32", (2, 1, 19)), MaskSpec("bool", (2, 1, 1, 19))),
    ),
}

SCORE_ARGUMENTS = {
    **numbered("scale", ((x, heads(1, 2, 6, 9, scale=x)) for x in (0, 0.0, 1, -0.7, 2, 1e-3))),
    **numbered("softcap", ((x, heads(1, 2, 6, 9, softcap=x, magnitude=4.0)) for x in (None, 0, 0.5, 5, 50.0))),
    "softcap-with-removal": heads(1, 2, 6, 9, softcap=2.0, score_mod="remove_far", return_weights=True),
    "softcap-before-float-mask": heads(1, 2, 6, 9, softcap=1.0, masks=(MaskSpec("float32", (6, 9)),)),
    "softcap-before-alibi": heads(1, 2, 6, 9, softcap=1.0, alibi_shape=(2,), alibi_factor=5.0),
    "alibi-per-head": heads(2, 4, 6, 9, alibi_shape=(4,)),
    "alibi-per-batch-and-head": heads(2, 4, 6, 9, alibi_shape=(2, 4)),
    "alibi-over-a-flattened-batch": shapes((2, 3, 4, 6, 8), (2, 3, 4, 9, 8), (9, 8), alibi_shape=(6, 4)),
    "alibi-bottom-right": heads(2, 4, 6, 9, alibi_shape=(4,), align="bottom_right", is_causal=True),
    "alibi-shifted": heads(2, 4, 6, 9, alibi_shape=(4,), align=-3),
    "sinks": heads(2, 4, 6, 9, sinks=SinkSpec(), return_weights=True),
    "sinks-with-holes": heads(2, 4, 6, 9, sinks=SinkSpec(holes=True), return_weights=True),
    "sinks-that-swallow-all": heads(2, 4, 6, 9, sinks=SinkSpec(offset=200.0), return_weights=True),
    "sinks-are-not-scaled": heads(2, 4, 6, 9, sinks=SinkSpec(offset=2.0), scale=0.01, softcap=0.5),
    **numbered(
        "score-mod",
        (
            (x, shapes((2, 2, 3, 6, 8), (2, 1, 3, 9, 8), (3, 9, 8), score_mod=x))
            for x in ("distance", "per_head", "look_up", "remove_far", "constant")
        ),
    ),
    **numbered(
        "mask-mod",
        (
            (x, shapes((2, 2, 3, 6, 8), (2, 1, 3, 9, 8), (3, 9, 8), mask_mod=x, return_weights=True))
            for x in ("document", "checkers", "prefix", "nothing", "first_keys")
        ),
    ),
    "mods-ignore-align": heads(1, 2, 6, 9, score_mod="distance", mask_mod="prefix", align=3, window=(4, 4)),
    "score-mod-over-tiles": heads(1, 2, 300, 1100, 8, score_mod="look_up"),
    "mods-over-tiles-causal": heads(1, 2, 600, 1100, 8, score_mod="remove_far", mask_mod="document", is_causal=True),
    "score-mod-2-D": shapes((6, 8), (9, 8), (9, 8), score_mod="per_head", mask_mod="checkers"),
}

DROPOUT = {
    **numbered(
        "p",
        ((p, heads(2, 3, 6, 9, dropout_p=p, seed=1, return_weights=True)) for p in (0, 0.1, 0.5, 0.99, 1)),
    ),
    **numbered(
        "seed",
        (
            (s, heads(2, 3, 6, 9, dropout_p=0.5, seed=s, return_weights=True))
            for s in (0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
        ),
    ),
    "dropout-2-D": shapes((6, 8), (9, 8), (9, 8), dropout_p=0.5, seed=7, return_weights=True),
    "dropout-over-a-flattened-batch": shapes((2, 3, 2, 6, 8), (2, 1, 2, 9, 8), (9, 8), dropout_p=0.5, seed=7),
    "dropout-with-dead-rows": heads(
        2,
        3,
        6,
        9,
        dropout_p=0.5,
        seed=7,
        masks=(MaskSpec("bool", (6, 9), values="dead_rows"),),
        sinks=SinkSpec(),
        return_weights=True,
    ),
    "dropout-in-float16-scales-beyond-one": heads(
        2, 3, 6, 9, dropout_p=0.9, seed=7, dtype="float16", return_weights=True
    ),
}

# What the GPU kernels run: head dims and dtypes that they have, lengths around the ends of their tiles.
KERNELS = (
    {
        f"kernel-{dtype}-d{head_dim}-{what}": heads(1, 2, *lengths, head_dim, dtype=dtype, **arguments)
        for dtype in ("float16", "bfloat16")
        for head_dim in (64, 128)
        for what, lengths, arguments in (
            ("full", (65, 130), {}),
            ("one-row", (1, 190), {}),
            ("causal", (130, 130), {"is_causal": True}),
            ("causal-bottom-right", (70, 200), {"is_causal": True, "align": "bottom_right"}),
            ("causal-rows-without-keys", (200, 70), {"is_causal": True, "align": "bottom_right"}),
            ("window", (140, 150), {"window": (20, 70)}),
            ("window-open-to-the-right", (140, 150), {"window": (20, None)}),
            ("window-open-to-the-left", (140, 150), {"window": (None, 5), "align": -7}),
            ("window-far-off", (140, 150), {"window": (2, 2), "align": 120}),
            ("scale-0", (20, 70), {"scale": 0, "is_causal": True}),
            ("negative-scale", (70, 140), {"scale": -0.3, "is_causal": True}),
            ("tiny-scale", (20, 70), {"scale": 1e-30, "is_causal": True}),
            ("huge-scale", (20, 70), {"scale": 1e22, "magnitude": 1e-9 if dtype == "bfloat16" else 1e-3}),
        )
    }
    | {
        f"kernel-{dtype}-{values}-scores": heads(1, 1, 37, 300, 64, dtype=dtype, values=values, is_causal=is_causal)
        for dtype in ("float16", "bfloat16")
        for values, is_causal in (("rising", False), ("falling", False), ("jumping", False), ("rising", True))
    }
    | {
        f"kernel-{dtype}-E-{head_dim}-Ev-{head_dim_v}": heads(
            1, 2, 20, 70, head_dim, head_dim_v, dtype=dtype, is_causal=True, align="bottom_right"
        )
        for dtype, dims in (
            ("float16", ((1, 1), (8, 3), (33, 32), (64, 129), (100, 40), (192, 128), (256, 256), (0, 5), (5, 0))),
            ("bfloat16", ((7, 50), (96, 96), (160, 160), (190, 192), (200, 224), (128, 250), (240, 100))),
        )
        for head_dim, head_dim_v in dims
    }
    | {
        # Few queries and many keys: heads share tiles, and blocks share keys.
        f"kernel-decoding-{hq}-query-{hk}-key-{hv}-value-heads-{seqlen_q}-by-{seqlen_k}": Case(
            query_shape=(2, hq, seqlen_q, 64),
            key_shape=(2, hk, seqlen_k, 64),
            value_shape=(2, hv, seqlen_k, 40),
            enable_gqa=True,
            dtype="float16",
            **arguments,
        )
        for hq, hk, hv, seqlen_q, seqlen_k, arguments in (
            (1, 1, 1, 1, 400, {}),
            (6, 1, 1, 1, 700, {}),
            (6, 1, 1, 3, 500, {"is_causal": True, "align": "bottom_right"}),
            (4, 2, 1, 2, 600, {"window": (200, 100), "align": 300}),
            (4, 2, 1, 2, 350, {"scale": -0.2}),
        )
    }
    | {
        f"kernel-{dtype}-{what}": heads(1, 2, *lengths, dtype=dtype, **arguments)
        for dtype in ("float32", "float64")
        for what, lengths, arguments in (
            ("full", (65, 130, 64), {}),
            ("wide", (20, 70, 200, 256), {}),
            ("causal", (130, 130, 40, 72), {"is_causal": True}),
            ("window", (140, 150, 16), {"window": (20, 70)}),
            ("window-open-to-the-right", (40, 150, 16), {"window": (20, None)}),
            ("rows-without-keys", (100, 40, 16), {"is_causal": True, "align": "bottom_right"}),
            ("few-queries", (3, 700, 24), {"is_causal": True, "align": "bottom_right"}),
            ("rising-scores", (10, 300, 24), {"values": "rising"}),
            ("negative-scale", (20, 70, 24), {"scale": -0.3}),
            ("huge-scale", (20, 70, 24), {"scale": 1e22, "magnitude": 1e-9}),
        )
    }
    | {
        f"kernel-{layout}": heads(2, 3, 6, 9, 64, dtype="float16", layouts=(layout,) * 3, is_causal=True)
        for layout in LAYOUTS
    }
    | {
        f"kernel-{hq}-query-{hk}-key-{hv}-value-heads": Case(
            query_shape=(2, hq, 5, 64),
            key_shape=(2, hk, 70, 64),
            value_shape=(2, hv, 70, 64),
            enable_gqa=True,
            dtype="float16",
        )
        for hq, hk, hv in ((4, 2, 2), (4, 1, 1), (4, 1, 4), (12, 4, 6), (6, 3, 2))
    }
    | {
        f"kernel-{name}": Case(
            query_shape=(*query, 5, 64), key_shape=(*key, 7, 64), value_shape=(*value, 7, 64), dtype="bfloat16"
        )
        for name, query, key, value in (
            ("2-D", (), (), ()),
            ("3-D", (3,), (3,), (3,)),
            ("7-D", (1, 2, 1, 2, 3), (1, 2, 1, 2, 3), (1, 2, 1, 2, 3)),
            ("four-batch-axes", (2, 1, 2, 1, 2), (1, 3, 1, 2, 2), (2, 3, 1, 1, 2)),
            ("query-without-leading-dims", (), (2, 3), (2, 3)),
            ("each-operand-broadcasts-along-another-dim", (2, 1, 1), (1, 3, 1), (1, 1, 4)),
            ("value-alone-has-a-batch", (), (), (4,)),
            ("one-head-for-all", (2, 4), (2, 1), (2, 1)),
            ("no-batch", (0, 2), (0, 2), (0, 2)),
            ("no-heads", (2, 0), (2, 0), (2, 0)),
        )
    }
    | {
        f"kernel-{dtype}-mods-{what}": Case(
            query_shape=(2, hq, seqlen_q, 40),
            key_shape=(2, 2, seqlen_k, 40),
            value_shape=(2, 2, seqlen_k, 24),
            enable_gqa=True,
            dtype=dtype,
            **arguments,
        )
        for dtype in DTYPES
        for what, hq, seqlen_q, seqlen_k, arguments in (
            ("over-tiles", 2, 130, 200, {"score_mod": "look_up", "mask_mod": "document"}),
            # Heads share tiles, and blocks share keys.
            ("decoding", 6, 2, 700, {"score_mod": "per_head", "mask_mod": "checkers"}),
            ("removals-capped", 2, 70, 90, {"score_mod": "remove_far", "softcap": 3.0, "return_weights": True}),
            (
                "with-all-else",
                4,
                70,
                150,
                {
                    "score_mod": "distance",
                    "mask_mod": "first_keys",
                    "masks": (MaskSpec("float32", (2, 1, 1, 150)), MaskSpec("bool", (4, 70, 150))),
                    "window": (100, 30),
                    "softcap": 3.0,
                    "alibi_shape": (2, 4),
                    "sinks": SinkSpec(),
                    "dropout_p": 0.2,
                    "seed": 3,
                    "return_weights": True,
                },
            ),
        )
    }
    | {
        "kernel-no-keys": heads(2, 2, 5, 0, 64, dtype="float16"),
        "kernel-no-keys-causal": heads(2, 2, 5, 0, 64, dtype="float16", is_causal=True, window=(3, 3)),
        "kernel-no-queries": heads(2, 2, 0, 7, 64, dtype="float16"),
        "kernel-float16-scores-beyond-its-range": heads(1, 2, 20, 30, 64, dtype="float16", magnitude=300.0),
        "kernel-without-lse": heads(1, 2, 20, 30, 64, dtype="float16", return_lse=False),
        "kernel-many-tiles": heads(2, 3, 300, 300, 64, dtype="float16", is_causal=True),
        "kernel-shift-far-right": heads(1, 1, 6, 9, 64, dtype="float16", is_causal=True, align=2**31 - 1),
        "kernel-shift-far-left": heads(1, 1, 6, 9, 64, dtype="float16", is_causal=True, align=-(2**31)),
    }
)

CASES: dict[str, Case] = {}
for table in (
    SHAPES,
    TILES,
    MOVING_SCORES,
    LAYOUT_CASES,
    GQA,
    DTYPE_CASES,
    MASKS,
    BANDS,
    SCORE_ARGUMENTS,
    DROPOUT,
    KERNELS,
):
    assert not CASES.keys() & table.keys(), CASES.keys() & table.keys()
    CASES |= table
