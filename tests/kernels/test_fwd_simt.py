"""The forward kernel without tensor cores, under the emulator: right, race-free, without bank conflicts."""

from __future__ import annotations

import numpy as np
import pytest

from cupyflash.backends.emulator import Options, guarded_array
from cupyflash.testing import Case, assert_attention_close
from tests.kernels import simt
from tests.kernels.harness import ALL_OPTIONS

pytestmark = pytest.mark.usefixtures("cxx")

on_every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])


def arguments(dtype, seqlen_q, seqlen_k, head_dim=20, head_dim_v=None, heads=(2, 2, 2), **keywords):
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    case = Case(
        query_shape=(1, heads[0], seqlen_q, head_dim),
        key_shape=(1, heads[1], seqlen_k, head_dim),
        value_shape=(1, heads[2], seqlen_k, head_dim_v),
        dtype=dtype,
        enable_gqa=True,
        **keywords,
    )
    return case.arguments()


def check(given, **how):
    out, lse, counters = simt.run(given, **how)
    assert_attention_close((out, lse), given, backend=f"emulator, {simt.forward_spec(given)} {how}")
    return out, lse, counters


@on_every_dtype
@pytest.mark.parametrize("band", [{}, {"is_causal": True, "align": "bottom_right"}, {"window": (20, 70)}], ids=str)
def test_against_the_definition(dtype, band):
    for lengths in ((64, 64), (1, 1), (65, 127), (130, 77), (1, 200)):
        check(arguments(dtype, *lengths, **band))


@on_every_dtype
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(1, 1), (0, 5), (5, 0), (13, 29), (33, 64), (64, 33), (96, 128), (256, 250)]
)
def test_head_dims(dtype, head_dim, head_dim_v):
    check(arguments(dtype, 67, 70, head_dim, head_dim_v))


@on_every_dtype
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits(dtype, splits):
    """The last parts are empty where there are fewer tiles than parts; causal leaves rows without keys."""
    for seqlen_k in (0, 30, 200):
        given = arguments(dtype, 70, seqlen_k, is_causal=True, align="bottom_right")
        check(given, splits=splits)
        check(arguments(dtype, 5, seqlen_k, window=(100, None), align=40), splits=splits)


@on_every_dtype
@pytest.mark.parametrize("heads", [(6, 2, 2), (4, 1, 2), (12, 4, 2)], ids=str)
def test_heads_in_one_tile(dtype, heads):
    pack = heads[0] // max(heads[1:])
    for splits in (1, 2):
        for band in ({}, {"is_causal": True, "align": "bottom_right"}, {"window": (9, 40)}):
            check(arguments(dtype, 23, 100, heads=heads, **band), pack=pack, splits=splits)


@on_every_dtype
@pytest.mark.parametrize("scale", [0, -0.3, 1e-30, 1e12])
def test_any_scale(dtype, scale):
    check(arguments(dtype, 20, 70, scale=scale, magnitude=1e-6 if scale == 1e12 else 1.0))


@on_every_dtype
@pytest.mark.parametrize("values", ["rising", "falling", "jumping"])
def test_scores_that_grow_and_shrink(dtype, values):
    check(arguments(dtype, 10, 300, 32, values=values))


@on_every_dtype
def test_nan_and_infinities_stay_in_their_rows(dtype):
    given = arguments(dtype, 70, 90)
    expected, expected_lse, _ = (np.array(x) if isinstance(x, np.ndarray) else x for x in simt.run(given))
    given["query"][0, 1, 5, 3] = np.nan
    given["query"][0, 0, 69, 0] = np.inf
    out, lse, _ = check(given)
    spoiled = np.zeros(lse.shape, bool)
    spoiled[0, 1, 5] = spoiled[0, 0, 69] = True
    assert out[~spoiled].tobytes() == expected[~spoiled].tobytes()
    assert lse[~spoiled].tobytes() == expected_lse[~spoiled].tobytes()


@on_every_dtype
def test_no_keys_and_no_tile_without_them(dtype):
    out, lse, counters = check(arguments(dtype, 70, 0))
    assert not out.any()
    assert (lse == -np.inf).all()
    assert counters.ld_shared.instructions == 0


@on_every_dtype
@pytest.mark.parametrize("how", [{}, {"splits": 2, "pack": 2}], ids=str)
def test_no_option_changes_a_bit(dtype, how):
    given = arguments(dtype, 70, 140, heads=(2, 1, 1), is_causal=True, align=30)
    expected, expected_lse, _ = simt.run(given, **how)
    for options in ALL_OPTIONS:
        out, lse, _ = simt.run(given, options=options, **how)
        assert (out.tobytes(), lse.tobytes()) == (expected.tobytes(), expected_lse.tobytes()), options


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_bank_conflicts(dtype, head_dim):
    given = arguments(dtype, 64, 64, head_dim, heads=(1, 1, 1))
    counters = simt.run(given, options=Options(counters=True))[2]
    for kind in ("ld_shared", "st_shared"):
        traffic = getattr(counters, kind)
        assert traffic.cost == traffic.ideal > 0, kind


@on_every_dtype
def test_rows_of_any_place(dtype):
    """(batch, row, head, element) storage, rows an odd number of elements apart."""
    given = arguments(dtype, 40, 50, 13, 13)
    expected, expected_lse, _ = simt.run(given)
    strided = {}
    for name in ("query", "key", "value"):
        x = given[name]
        wide = guarded_array((1, x.shape[2], 2, 15), x.dtype, name)
        wide[..., 1:14] = x.transpose(0, 2, 1, 3)
        strided[name] = wide[..., 1:14].transpose(0, 2, 1, 3)
    out, lse, _ = simt.run(given | strided)
    assert (out.tobytes(), lse.tobytes()) == (expected.tobytes(), expected_lse.tobytes())
