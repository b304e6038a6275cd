"""The kernel that joins the parts of a split forward pass, under the emulator."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from cupyflash.backends.emulator import Module, Options, guarded_array, guarded_copy
from cupyflash.build.params import FWD_PARAMS
from cupyflash.build.rendering import render_kernel
from cupyflash.merge import merge_attention
from cupyflash.plan.specs import CombineSpec
from cupyflash.problem.dtypes import dtype_named
from cupyflash.testing import DTYPES, ROUNDOFF, assert_attention_close, oracle
from tests.kernels.harness import ALL_OPTIONS

pytestmark = pytest.mark.usefixtures("cxx")


@functools.cache
def module(dtype):
    return Module(render_kernel(CombineSpec(dtype)))


def combine(dtype, outs, lses, *, sums=None, out=None, with_lse=True, options=None, kernel=None):
    """(out, lse) of parts [split, batch, head, query, element], on guarded arrays filled with NaN before.

    Their log-sum-exps are given as such or, as `sums`, in two parts.
    """
    if sums is None:
        sums = np.stack([lses, np.where(lses == -np.inf, 0, 1)], axis=-1).astype(lses.dtype)
    splits, *shape = outs.shape
    out = guarded_array(tuple(shape), DTYPES[dtype], "out") if out is None else out
    lse = guarded_array(tuple(shape[:3]), lses.dtype, "lse")
    out[...] = np.nan
    lse[...] = np.nan
    parts = guarded_copy(outs, "partial_out"), guarded_copy(sums, "partial_lse")
    batch, head, row = (stride // out.itemsize for stride in out.strides[:3])
    params = np.zeros((), FWD_PARAMS)
    params["out"] = (out.ctypes.data, (0, 0, 0, batch), head, row)
    params["lse"] = lse.ctypes.data if with_lse else 0
    params["partial_out"], params["partial_lse"] = (part.ctypes.data for part in parts)
    params["batch_shape"], params["batch_size"] = (1, 1, 1, shape[0]), shape[0]
    params["num_heads_q"], params["seqlen_q"], params["head_dim_v"] = shape[1:]
    params["num_splits"] = splits
    spec = CombineSpec(dtype)
    grid = (-(-int(np.prod(shape[:3])) // spec.rows_per_block),)
    kernel = kernel or module(dtype).get_function("flash_combine")
    kernel(grid, (spec.num_threads,), (params[()],), shared_mem=0, options=options)
    return out, lse


def parts(dtype, splits, shape=(2, 3, 5, 40), seed=0):
    """Seeded partial results, with parts and a row that saw no key."""
    rng = np.random.default_rng(seed)
    accumulator = dtype_named(dtype).accumulator
    outs = rng.standard_normal((splits, *shape)).astype(accumulator)
    lses = (10 * rng.standard_normal((splits, *shape[:3]))).astype(accumulator)
    lses[rng.random(lses.shape) < 0.2] = -np.inf
    lses[:, 1, 2, 3] = -np.inf
    outs[lses == -np.inf] = np.nan  # is not looked at
    return outs, lses


@pytest.mark.parametrize("splits", [1, 2, 7, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_merge_attention(dtype, splits):
    outs, lses = parts(dtype, splits)
    out, lse = combine(dtype, outs, lses)
    looked_at = np.where(np.isnan(outs), 0, outs).astype(np.longdouble)
    weights = np.exp(lses.astype(np.longdouble))
    total = weights.sum(axis=0)
    expected = (weights[..., None] * looked_at).sum(axis=0) / np.where(total == 0, 1, total)[..., None]
    spread = (weights[..., None] * abs(looked_at)).sum(axis=0) / np.where(total == 0, 1, total)[..., None]
    # The result's rounding, and that of the exponents: |lse| is at most 60, on which an accumulator errs by so much.
    u, u_acc = ROUNDOFF[dtype], 2.0**-53 if dtype == "float64" else 2.0**-24
    assert (abs(out - expected) <= (u + 64 * u_acc) * spread).all()
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(total).astype(lses.dtype), rtol=8 * u_acc, atol=64 * u_acc)
    assert not out[1, 2, 3].any()
    assert lse[1, 2, 3] == -np.inf
    merged, merged_lse = merge_attention(
        [part.astype(DTYPES[dtype]) for part in looked_at.astype(np.float64)], list(lses)
    )
    np.testing.assert_allclose(out.astype(float), merged.astype(float), atol=8 * u * np.abs(looked_at).max())
    np.testing.assert_allclose(lse, merged_lse, rtol=8 * u_acc, atol=64 * u_acc)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parts_of_attention_make_the_whole(dtype):
    rng = np.random.default_rng(1)
    shapes = [(1, 2, 6, 24), (1, 2, 50, 24), (1, 2, 50, 17)]
    q, k, v = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes)
    ends = [0, 3, 20, 20, 41, 50]  # one of the parts is empty
    found = [oracle(q, k[..., a:b, :], v[..., a:b, :]) for a, b in itertools.pairwise(ends)]
    accumulator = dtype_named(dtype).accumulator
    outs = np.stack([part.out for part in found]).astype(accumulator)
    lses = np.stack([part.lse for part in found]).astype(accumulator)
    result = combine(dtype, outs, lses)
    assert_attention_close(result, {"query": q, "key": k, "value": v, "return_lse": True}, backend="combine")


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_a_log_sum_exp_is_divided_changes_nothing_but_rounding(dtype):
    outs, lses = parts(dtype, 5)
    expected, expected_lse = combine(dtype, outs, lses)
    shift = np.random.default_rng(7).uniform(0, 5, lses.shape).astype(lses.dtype)
    total = np.where(lses == -np.inf, 0, np.exp(shift)).astype(lses.dtype)
    out, lse = combine(dtype, outs, lses, sums=np.stack([lses - shift, total], axis=-1))
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    np.testing.assert_allclose(lse, expected_lse, atol=64 * u)
    np.testing.assert_allclose(out.astype(float), expected.astype(float), atol=8 * ROUNDOFF[dtype] + 256 * u)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_keys_counts_however_large_the_scores(dtype):
    """Beside the lowest float the logarithm of a number of keys is nothing."""
    outs = np.ones((2, 1, 1, 1, 3), dtype_named(dtype).accumulator)
    outs[1] = 5
    lowest = np.finfo(outs.dtype).min
    sums = np.array([[lowest, 300], [lowest, 100]], outs.dtype).reshape(2, 1, 1, 1, 2)
    out, lse = combine(dtype, outs, sums[..., 0], sums=sums)
    assert (out == 2).all()
    assert (lse == lowest).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype):
    outs, lses = parts(dtype, 5)
    expected, expected_lse = (x.copy() for x in combine(dtype, outs, lses))
    lses[3, 0, 1, 2] = np.nan
    outs[2, 1, 0, 4] = np.nan
    lses[2, 1, 0, 4] = 3
    out, lse = combine(dtype, outs, lses)
    spoiled = np.zeros(lse.shape, bool)
    spoiled[0, 1, 2] = spoiled[1, 0, 4] = True
    assert np.isnan(out[spoiled].astype(float)).all()
    assert np.isnan(lse[0, 1, 2])
    assert out[~spoiled].tobytes() == expected[~spoiled].tobytes()
    assert lse[~spoiled].tobytes() == expected_lse[~spoiled].tobytes()


@pytest.mark.parametrize("head_dim_v", [0, 1, 31, 33, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length_and_place(dtype, head_dim_v):
    """(batch, row, head, element) storage that begins at an odd element, rows an odd number of elements apart."""
    shape = (2, 3, 5, head_dim_v)
    outs, lses = parts(dtype, 3, shape)
    expected, expected_lse = combine(dtype, outs, lses)
    stored = guarded_array((2, 5, 3, head_dim_v + 3), DTYPES[dtype], "out")
    stored[...] = 7
    view = stored[..., 1 : 1 + head_dim_v].transpose(0, 2, 1, 3)
    out, lse = combine(dtype, outs, lses, out=view)
    assert out.tobytes() == expected.tobytes()
    assert lse.tobytes() == expected_lse.tobytes()
    assert (stored[..., :1] == 7).all()
    assert (stored[..., 1 + head_dim_v :] == 7).all()


def test_lse_only_where_it_is_asked_for():
    outs, lses = parts("float32", 3)
    expected, _ = combine("float32", outs, lses)
    out, lse = combine("float32", outs, lses, with_lse=False)
    assert out.tobytes() == expected.tobytes()
    assert np.isnan(lse).all()


def test_bfloat16_is_rounded_to_nearest_even():
    """Two values in the middle of their neighbours, one beyond the largest, subnormal ones, and those around them."""
    bits = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F7F7FFF, 0x00018000, 0x00008000, 0x80008001], np.uint32)
    values = np.concatenate([bits, bits + 1, bits - 1]).view(np.float32)
    values = values[np.isfinite(values)]
    out, _ = combine("bfloat16", values.reshape(1, 1, 1, 1, -1), np.zeros((1, 1, 1, 1), np.float32))
    with np.errstate(over="ignore"):
        expected = values.astype(DTYPES["bfloat16"])
    np.testing.assert_array_equal(out.ravel().view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_no_option_changes_a_bit(options: Options):
    outs, lses = parts("float32", 9)
    expected, expected_lse = combine("float32", outs, lses)
    out, lse = combine("float32", outs, lses, options=options)
    assert (out.tobytes(), lse.tobytes()) == (expected.tobytes(), expected_lse.tobytes())
