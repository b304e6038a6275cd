"""The forward kernel for sm_80, under the emulator: right, race-free, without bank conflicts."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cupyflash.backends.emulator import EmulatorError, Module, Options, guarded_array
from cupyflash.build.functor import NO_MODS
from cupyflash.build.params import FWD_PARAMS, layout_checks
from cupyflash.build.source import KernelSource
from cupyflash.errors import KernelCompileError
from cupyflash.testing import assert_attention_close
from tests.kernels.forward import Spec, forward, launch_arguments, module, source
from tests.kernels.harness import ALL_OPTIONS, compiled

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def operands(spec, seqlen_q, seqlen_k, heads=(2, 2), batch_size=1, seed=0, magnitude=1.0, dims=None):
    """Heads of queries and of keys, or of queries, keys and values; dims are E and Ev, if less than the spec's."""
    rng = np.random.default_rng(seed)
    heads_q, heads_k, heads_v = (*heads, heads[1])[:3]
    head_dim, head_dim_v = dims or (spec.head_dim, spec.head_dim_v or spec.head_dim)
    shapes = [
        (batch_size, heads_q, seqlen_q, head_dim),
        (batch_size, heads_k, seqlen_k, head_dim),
        (batch_size, heads_v, seqlen_k, head_dim_v),
    ]
    return [(magnitude * rng.standard_normal(shape)).astype(DTYPES[spec.dtype]) for shape in shapes]


def check(spec, q, k, v, *, window=None, align="top_left", options=None, num_splits=1):
    """Runs the kernel and holds out and lse to the one rule of cupyflash.testing."""
    shift = 0 if align == "top_left" else k.shape[2] - q.shape[2]
    left, right = window if window is not None else (None, None)
    spec = replace(spec, has_lower=left is not None, has_upper=right is not None)
    bounds = {"lower": shift - (left or 0), "upper": shift + (right or 0)}
    out, lse, counters = forward(spec, q, k, v, options=options, num_splits=num_splits, **bounds)
    case = {
        "query": q,
        "key": k,
        "value": v,
        "enable_gqa": True,
        "window": window,
        "align": align,
        "return_lse": True,
    }
    assert_attention_close((out, lse), case, backend=f"emulator, {spec}")
    return out, lse, counters


LENGTHS = [(64, 64), (1, 1), (65, 127), (77, 130), (130, 77), (1, 200), (129, 64)]


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("window", [None, (None, 0), (20, 70)], ids=["full", "causal", "window"])
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_definition(dtype, head_dim, align, window):
    if window is None and align == "bottom_right":
        return  # without a band there is nothing to align
    spec = Spec(dtype=dtype, head_dim=head_dim)
    for number, (seqlen_q, seqlen_k) in enumerate(LENGTHS):
        check(spec, *operands(spec, seqlen_q, seqlen_k, seed=number), window=window, align=align)


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("spec", [Spec(block_n=32), Spec(num_warps=8), Spec(head_dim=128, block_n=32)], ids=str)
def test_other_tiles(spec):
    for seqlen_q, seqlen_k in ((150, 150), (10, 70)):
        check(spec, *operands(spec, seqlen_q, seqlen_k), window=(None, 0))


# Every structure of the kernel: each width of rows in shared memory, Q in registers or not, V wider and narrower than
# K, and what sm_75 has instead of cp.async and m16n8k16.
STRUCTURES = [
    Spec(head_dim=32),
    Spec(head_dim=64, head_dim_v=128),
    Spec(head_dim=96, num_warps=8, dtype="bfloat16"),
    Spec(head_dim=128, head_dim_v=64, block_n=32),
    Spec(head_dim=64, head_dim_v=256, block_n=32, q_in_registers=False),
    Spec(head_dim=160, block_n=32, q_in_registers=False, dtype="bfloat16"),
    Spec(head_dim=256, head_dim_v=128, block_n=32, q_in_registers=False),
    Spec(head_dim=64, baseline=75),
    Spec(head_dim=96, block_n=32, q_in_registers=False, baseline=75),
]


def narrow_dims(spec):
    """Dims E and Ev that the spec holds: with whole chunks of 16 bytes and without, none at all."""
    head_dim, head_dim_v = spec.head_dim, spec.head_dim_v or spec.head_dim
    return [(head_dim, head_dim_v), (head_dim - 5, head_dim_v - 8), (8, 3), (1, head_dim_v - 1), (0, 6), (9, 0)]


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("spec", STRUCTURES, ids=str)
def test_structures_and_narrow_heads(spec):
    """Guarded arrays: an access beyond the last element of the last row is caught."""
    for dims in narrow_dims(spec):
        check(spec, *operands(spec, 70, 70, heads=(2, 1), dims=dims), window=(None, 0))


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("spec", [Spec(), Spec(head_dim=32, q_in_registers=False, baseline=75)], ids=str)
def test_nothing_is_touched_beyond_a_row(spec):
    """Rows of a wider array: what lies behind a row's elements is NaN, and stays what it was."""
    for dims in ((17, 22), (24, 9), (31, 0)):
        q, k, v = operands(spec, 70, 90, dims=dims)
        expected, expected_lse, _ = forward(spec, q, k, v)
        wide = []
        for name, array in (("q", q), ("k", k), ("v", v), ("out", expected)):
            stored = guarded_array((*array.shape[:3], 40), array.dtype, name)
            stored[...] = np.nan
            stored[..., : array.shape[3]] = array if name != "out" else 7
            wide.append(stored)
        lse = guarded_array(q.shape[:3], np.float32, "lse")
        views = [array[..., :n] for array, n in zip(wide, (dims[0], dims[0], dims[1], dims[1]), strict=True)]
        params, grid = launch_arguments(spec, *views, lse)
        module(spec).get_function("flash_fwd_sm80")(grid, (128,), (params, NO_MODS), shared_mem=spec.shared_bytes)
        np.testing.assert_array_equal(views[3], expected)
        np.testing.assert_array_equal(lse, expected_lse)
        assert np.isnan(wide[3][..., dims[1] :]).all()


# Heads of queries, keys and values; two of them are packed in the last two, six in the first.
GROUPS = [(6, 1, 1), (4, 2, 1), (12, 6, 2)]


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("window", [None, (None, 0), (3, 2)], ids=["full", "causal", "window"])
@pytest.mark.parametrize(
    "spec", [Spec(packed=True), Spec(packed=True, head_dim=96, q_in_registers=False, baseline=75)], ids=str
)
def test_packed_heads(spec, window):
    for heads in GROUPS:
        for seqlen_q, seqlen_k in ((1, 70), (3, 20), (50, 130)):
            arrays = operands(spec, seqlen_q, seqlen_k, heads=heads, batch_size=2, dims=(30, 27))
            out, lse, _ = check(spec, *arrays, window=window, align="bottom_right")
            plain = check(replace(spec, packed=False), *arrays, window=window, align="bottom_right")
            if window is None:  # masks differ in which tiles they visit, and so in rounding
                np.testing.assert_array_equal(out, plain[0])
                np.testing.assert_array_equal(lse, plain[1])


@pytest.mark.usefixtures("cxx")
def test_packed_tiles_are_fewer():
    spec = Spec(packed=True)
    arrays = operands(spec, 8, 64, heads=(8, 1))
    assert check(spec, *arrays)[2].mma == 4 * 64  # one tile of 64 rows
    assert check(replace(spec, packed=False), *arrays)[2].mma == 8 * 4 * 64


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("window", [None, (None, 0), (80, 30)], ids=["full", "causal", "window"])
@pytest.mark.parametrize(
    "spec",
    [
        Spec(block_n=32),
        Spec(packed=True, block_n=32, head_dim=128, head_dim_v=256, q_in_registers=False),
        Spec(packed=True, block_n=32, baseline=75),
    ],
    ids=str,
)
def test_splits(spec, window):
    """More parts than tiles of keys leave the last ones empty."""
    for num_splits, dims in ((1, (64, 64)), (2, (40, 31)), (3, (64, 9)), (9, (5, 50))):
        arrays = operands(spec, 70, 200, heads=(4, 2), batch_size=2, dims=dims)
        check(spec, *arrays, window=window, align="bottom_right", num_splits=num_splits)
    check(spec, *operands(spec, 5, 0), num_splits=3)


@pytest.mark.usefixtures("cxx")
def test_grouped_heads_and_batches():
    spec = Spec()
    for heads in ((4, 1), (6, 2), (3, 3)):
        check(spec, *operands(spec, 70, 70, heads=heads, batch_size=2), window=(None, 0))


@pytest.mark.usefixtures("cxx")
def test_rows_without_keys():
    spec = Spec()
    q, k, v = operands(spec, 200, 80)
    out, lse, _ = check(spec, q, k, v, window=(None, 0), align="bottom_right")
    assert not out[:, :, :120].any()
    assert (lse[:, :, :120] == -np.inf).all()
    # No key for any query: not one tile is visited.
    out, lse, counters = check(spec, q[:, :, :50], k[:, :, :0], v[:, :, :0])
    assert not out.any()
    assert (lse == -np.inf).all()
    assert counters.mma == 0


@pytest.mark.usefixtures("cxx")
def test_only_the_tiles_that_are_needed():
    spec = Spec()
    q, k, v = operands(spec, 256, 256, heads=(1, 1))
    per_tile = 4 * 64  # warps, mma of Q K^T and of P V
    assert check(spec, q, k, v)[2].mma == 16 * per_tile
    assert check(spec, q, k, v, window=(None, 0))[2].mma == (1 + 2 + 3 + 4) * per_tile
    assert check(spec, q, k, v, window=(0, 0))[2].mma == 4 * per_tile
    assert check(spec, q, k, v, window=(64, 0))[2].mma == (1 + 2 + 2 + 2) * per_tile


@pytest.mark.usefixtures("cxx")
def test_scores_that_grow_and_shrink():
    """The running maximum moves in every tile, or in none."""
    spec = Spec()
    for slope in (0.5, -0.5):
        q, k, v = operands(spec, 64, 300, heads=(1, 1))
        q[..., 0] = 8
        k[..., 0] = (slope * np.arange(300)).astype(k.dtype)
        check(spec, q, k, v)
    check(spec, *operands(spec, 64, 130, magnitude=20.0))


@pytest.mark.usefixtures("cxx")
def test_nan_where_no_key_takes_part():
    spec = Spec()
    q, k, v = operands(spec, 130, 130)
    expected, expected_lse, _ = check(spec, q, k, v, window=(None, 0))
    spec = replace(spec, has_upper=True)
    k[:, :, 100:] = np.nan
    out, lse, _ = forward(spec, q, k, v, upper=0)
    np.testing.assert_array_equal(out[:, :, :100], expected[:, :, :100])
    np.testing.assert_array_equal(lse[:, :, :100], expected_lse[:, :, :100])
    assert np.isnan(out[:, :, 100:]).all()


@pytest.mark.usefixtures("cxx")
def test_strides():
    """(batch, row, head, element) storage, rows of a wider array, and one head for all."""
    spec = Spec()
    q, k, v = operands(spec, 70, 90)
    expected, expected_lse, _ = forward(spec, q, k, v)
    wide = guarded_array((1, 70, 2, 72), np.float16, "q")
    wide[..., :64] = q.transpose(0, 2, 1, 3)
    keys = guarded_array((1, 90, 2, 64), np.float16, "k")
    keys[...] = k.transpose(0, 2, 1, 3)
    for values in (v, np.broadcast_to(v[:, :1], v.shape)):
        stored = guarded_array(values.shape, np.float16, "v")
        stored[...] = values
        if values is not v:
            stored = np.broadcast_to(stored[:, :1], v.shape)
            expected, expected_lse, _ = forward(spec, q, k, values)
        out, lse = (
            guarded_array((1, 70, 2, 64), np.float16, "out"),
            guarded_array((1, 2, 70), np.float32, "lse"),
        )
        views = (
            wide[..., :64].transpose(0, 2, 1, 3),
            keys.transpose(0, 2, 1, 3),
            stored,
            out.transpose(0, 2, 1, 3),
        )
        params, grid = launch_arguments(spec, *views, lse)
        kernel = module(spec).get_function("flash_fwd_sm80")
        kernel(grid, (128,), (params, NO_MODS), shared_mem=spec.shared_bytes)
        np.testing.assert_array_equal(views[3], expected)
        np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("spec", [Spec(has_upper=True), Spec(head_dim=128, dtype="bfloat16")], ids=str)
def test_schedules_give_the_same_bits(spec):
    q, k, v = operands(spec, 100, 150)
    results = [forward(spec, q, k, v, options=options, upper=50)[:2] for options in ALL_OPTIONS]
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out.view(np.uint16), results[0][0].view(np.uint16))
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 224, 256])
def test_no_bank_conflicts(head_dim):
    spec = Spec(head_dim=head_dim, q_in_registers=head_dim < 192, block_n=64 if head_dim < 192 else 32)
    counters = forward(spec, *operands(spec, 128, 128), options=Options(counters=True))[2]
    for kind in ("ldmatrix", "cp_async_shared", "st_shared", "ld_shared", "cp_async_global"):
        traffic = getattr(counters, kind)
        assert traffic.cost == traffic.ideal > 0, kind
    unswizzled = Module(edited(source(spec), "^ swizzle(row)", ""))
    kernel = unswizzled.get_function("flash_fwd_sm80")
    counters = forward(spec, *operands(spec, 128, 128), kernel=kernel, options=Options(counters=True))[2]
    assert counters.ldmatrix.cost == (8 if head_dim % 64 == 0 else 4) * counters.ldmatrix.ideal


def edited(kernel, old, new):
    assert old in kernel.text
    return KernelSource(kernel.name, kernel.text.replace(old, new), kernel.entries)


@pytest.mark.usefixtures("cxx")
def test_out_of_bounds_is_named():
    spec = Spec()
    q, k, v = operands(spec, 64, 64, heads=(1, 1))
    kernel = Module(edited(source(spec), "exists ? panel_bytes[panel] : 0", "panel_bytes[panel]")).get_function(
        "flash_fwd_sm80"
    )
    forward(spec, q, k, v, kernel=kernel)  # whole tiles need no tail
    pattern = r"^copy\.cuh:\d+: .*cp\.async: illegal access .* near array '[kv]': \d+ bytes past its end"
    with pytest.raises(EmulatorError, match=pattern):
        forward(spec, q, k[:, :, :40], v[:, :, :40], kernel=kernel)


@pytest.mark.usefixtures("cxx")
def test_accumulator_layout():
    """acc_row and acc_column against the PTX ISA's formulas for the C fragment of mma.m16n8k16."""
    text = r"""
#include "tile.cuh"
extern "C" __global__ void layout(u32* out) {
  for (int i = 0; i < 4; ++i) {
    isa::stg_4(out + 8 * isa::lane_index() + i, acc_row(isa::lane_index(), i));
    isa::stg_4(out + 8 * isa::lane_index() + 4 + i, acc_column(isa::lane_index(), i));
  }
}
"""
    out = guarded_array((32, 2, 4), np.uint32, "out")
    compiled(text).get_function("layout")((1,), (32,), (out,))
    lane, i = np.arange(32)[:, None], np.arange(4)
    np.testing.assert_array_equal(out[:, 0], np.where(i < 2, lane >> 2, (lane >> 2) + 8))
    np.testing.assert_array_equal(out[:, 1], (lane % 4) * 2 + (i & 1))


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize(("has_lower", "has_upper"), [(False, False), (True, False), (False, True), (True, True)])
def test_key_tiles(has_lower, has_upper):
    """The ranges of tiles against the mask itself, element by element."""
    block_m, block_n = 48, 32
    text = f"""
#include "types.cuh"
struct Config {{
  static constexpr int kBlockM = {block_m}, kBlockN = {block_n};
  static constexpr bool kHasLower = {str(has_lower).lower()}, kHasUpper = {str(has_upper).lower()};
  static constexpr bool kPacked = true;
}};
#include "mask.cuh"
extern "C" __global__ void ranges(FwdParams params, u32* out) {{
  const FwdWork work = {{0, 0, Config::kBlockM * (isa::block_index_x() / params.num_splits),
                         isa::block_index_x() % params.num_splits}};
  const KeyTiles tiles = key_tiles<Config>(params, work).share(work.split, params.num_splits);
  u32* mine = out + 4 * isa::block_index_x();
  isa::stg_4(mine, tiles.begin);
  isa::stg_4(mine + 1, tiles.end);
  isa::stg_4(mine + 2, tiles.full_begin);
  isa::stg_4(mine + 3, tiles.full_end);
}}
"""
    ranges = compiled(text).get_function("ranges")
    rng = np.random.default_rng(0)
    for _ in range(200):
        seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, 200, 2))
        lower, upper = sorted(int(n) for n in rng.integers(-250, 250, 2))
        pack, num_splits = (int(n) for n in rng.integers(1, 7, 2))
        params = np.zeros((), FWD_PARAMS)
        for name, value in (
            ("seqlen_q", seqlen_q),
            ("seqlen_k", seqlen_k),
            ("lower", lower),
            ("upper", upper),
            ("pack", pack),
            ("num_splits", num_splits),
        ):
            params[name] = value
        num_tiles = -(-seqlen_q * pack // block_m)
        out = guarded_array((num_tiles, num_splits, 4), np.int32, "out")
        ranges((num_tiles * num_splits,), (32,), (params[()], out))
        difference = np.arange(seqlen_k)[None] - np.arange(seqlen_q)[:, None]
        mask = np.ones(difference.shape, bool)
        if has_lower:
            mask &= difference >= lower
        if has_upper:
            mask &= difference <= upper
        mask = np.repeat(mask, pack, axis=0)
        for tile, splits in enumerate(out.tolist()):
            rows = mask[block_m * tile : block_m * (tile + 1)]
            visited = [n for begin, end, _, _ in splits for n in range(begin, end)]
            full = [n for begin, end, first, last in splits for n in range(begin, end) if first <= n < last]
            keys = np.flatnonzero(rows.any(axis=0))
            assert visited == ([] if keys.size == 0 else [*range(keys[0] // block_n, keys[-1] // block_n + 1)])
            lengths = [end - begin for begin, end, _, _ in splits]
            assert max(lengths) == -(-len(visited) // num_splits)
            assert lengths == sorted(lengths, reverse=True)
            for n in visited:
                part = rows[:, block_n * n : block_n * (n + 1)]
                assert (n in full) == (part.all() and part.shape[1] == block_n)


@pytest.mark.usefixtures("cxx")
def test_parameter_drift_does_not_compile():
    exchange = {"lower": "upper", "upper": "lower"}
    names = [exchange.get(name, name) for name in FWD_PARAMS.names]
    swapped = np.dtype([(name, FWD_PARAMS[name]) for name in names], align=True)
    kernel = source(Spec())
    with pytest.raises(KernelCompileError, match=r"FwdParams\.upper lies elsewhere in Python"):
        Module(KernelSource("drift", kernel.text + layout_checks("FwdParams", swapped), kernel.entries))
