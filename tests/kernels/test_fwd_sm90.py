"""The forward kernel for sm_90a, under the emulator: right, race-free, without bank conflicts.

What it does with scores it does with the headers of fwd_sm80: here are its own loops, copies and products.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cupyflash.backends.emulator import EmulatorError, Module, Options, guarded_array
from cupyflash.build.functor import NO_MODS
from cupyflash.build.source import KernelSource
from tests.kernels import forward as harness
from tests.kernels.forward import Spec, forward, launch_arguments, maps, module, source
from tests.kernels.harness import ALL_OPTIONS
from tests.kernels.test_fwd_sm80 import check, operands

pytestmark = pytest.mark.usefixtures("cxx")

# Two warpgroups of 64 rows, and a ring of two small tiles, so that few keys go round it.
HOPPER = Spec(num_warps=8, block_n=32, q_in_registers=False, baseline=90, stages=2)


@pytest.mark.parametrize("window", [None, (None, 0), (20, 70)], ids=["full", "causal", "window"])
@pytest.mark.parametrize(
    "spec", [HOPPER, replace(HOPPER, dtype="bfloat16", head_dim=128, block_n=128)], ids=["f16-d64", "bf16-d128"]
)
def test_against_the_definition(spec, window):
    for number, (seqlen_q, seqlen_k) in enumerate([(128, 128), (1, 1), (65, 127), (77, 200), (200, 77), (1, 300)]):
        for align in ("top_left", "bottom_right") if window else ("top_left",):
            check(spec, *operands(spec, seqlen_q, seqlen_k, seed=number), window=window, align=align)


# Every structure of the kernel: one to three warpgroups that compute, two stages and more, panels of both widths, V
# wider and narrower than K, the widest product.
STRUCTURES = [
    replace(HOPPER, num_warps=4, stages=3),
    replace(HOPPER, num_warps=12, block_n=48),
    replace(HOPPER, num_warps=12, ping_pong=True),
    replace(HOPPER, ping_pong=True, head_dim=128),
    replace(HOPPER, exp2_by_fma=2),
    replace(HOPPER, head_dim=96, stages=4, dtype="bfloat16"),
    replace(HOPPER, head_dim=32, head_dim_v=128, block_n=256),
    replace(HOPPER, head_dim=192, head_dim_v=96, block_n=16),
    replace(HOPPER, head_dim=64, head_dim_v=256, dtype="bfloat16"),
]


@pytest.mark.parametrize("spec", STRUCTURES, ids=str)
def test_structures_and_narrow_heads(spec):
    """Guarded arrays: an access beyond the last element of the last row is caught."""
    head_dim, head_dim_v = spec.head_dim, spec.head_dim_v or spec.head_dim
    for dims in [(head_dim, head_dim_v), (head_dim - 5, head_dim_v - 8), (8, 3), (1, head_dim_v - 1)]:
        check(spec, *operands(spec, 70, 300, heads=(2, 1), dims=dims), window=(None, 0), align="bottom_right")


@pytest.mark.parametrize("window", [None, (None, 0), (3, 2)], ids=["full", "causal", "window"])
def test_packed_heads(window):
    """Queries of several heads come without a map: the warpgroup copies them."""
    spec = replace(HOPPER, num_warps=4, packed=True)
    for heads in ((6, 1, 1), (4, 2, 1)):
        for seqlen_q, seqlen_k in ((1, 70), (3, 20), (50, 130)):
            arrays = operands(spec, seqlen_q, seqlen_k, heads=heads, batch_size=2, dims=(30, 27))
            out, lse, _ = check(spec, *arrays, window=window, align="bottom_right")
            plain = check(replace(spec, packed=False), *arrays, window=window, align="bottom_right")
            if window is None:  # masks differ in which tiles they visit, and so in rounding
                np.testing.assert_array_equal(lse, plain[1])
                np.testing.assert_array_equal(out, plain[0])


@pytest.mark.parametrize("window", [None, (80, 30)], ids=["full", "window"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_splits(packed, window):
    """More parts than tiles of keys leave the last ones empty."""
    spec = replace(HOPPER, packed=packed)
    for num_splits, dims in ((1, (64, 64)), (3, (64, 9)), (9, (5, 50))):
        arrays = operands(spec, 70, 200, heads=(4, 2), batch_size=2, dims=dims)
        check(spec, *arrays, window=window, align="bottom_right", num_splits=num_splits)
    check(spec, *operands(spec, 5, 0), num_splits=3)


def test_grouped_heads_and_batches():
    for heads in ((4, 1), (6, 2), (4, 2, 1)):
        check(HOPPER, *operands(HOPPER, 70, 70, heads=heads, batch_size=2), window=(None, 0))


def test_rows_without_keys():
    q, k, v = operands(HOPPER, 300, 80)
    out, lse, _ = check(HOPPER, q, k, v, window=(None, 0), align="bottom_right")
    assert not out[:, :, :220].any()
    assert (lse[:, :, :220] == -np.inf).all()
    # No key for any query: nothing is copied in or multiplied, zeros are stored by eight warps for each head.
    out, lse, counters = check(HOPPER, q[:, :, :50], k[:, :, :0], v[:, :, :0])
    assert not out.any()
    assert (lse == -np.inf).all()
    assert (counters.wgmma, counters.bulk) == (0, 2 * 8)


def test_only_the_tiles_that_are_needed():
    """Two blocks of two warpgroups each; above the diagonal the second one alone multiplies."""
    q, k, v = operands(HOPPER, 256, 256, heads=(1, 1))
    per_tile = 4 * (64 // 16 + 32 // 16)  # warps, products of Q K^T and of P V
    found = [check(HOPPER, q, k, v, window=window)[2] for window in (None, (None, 0), (0, 0), (64, 0))]
    multiplied = [8 + 8 + 8 + 8, 2 + 4 + 6 + 8, 2 + 4 + 2 + 4, 2 + 4 + 4 + 6]
    copied = [8 + 8, 4 + 8, 4 + 4, 4 + 6]
    assert [counters.wgmma for counters in found] == [n * per_tile for n in multiplied]
    assert [counters.bulk for counters in found] == [2 * n + 2 * (2 + 8) for n in copied]  # K, V, Q; O by warps
    # In turns every warpgroup takes every tile, and knows of halves alone.
    counters = check(replace(HOPPER, ping_pong=True), q, k, v, window=(None, 0))[2]
    assert counters.wgmma == (4 + 4 + 8 + 8) * per_tile - 2 * 4 * (32 // 16 - 16 // 16)


@pytest.mark.parametrize("ping_pong", [False, True])
def test_half_of_the_last_tile(ping_pong):
    """A warpgroup multiplies up to the tile, or half tile, in which its last row's keys end; in turns it skips none."""
    spec = replace(HOPPER, block_n=128, ping_pong=ping_pong)
    q, k, v = operands(spec, 256, 300, heads=(1, 1))
    whole, half = 4 * (64 // 16 + 128 // 16), 4 * (64 // 16 + 64 // 16)
    for right in (0, 1, 64, -64, 100):
        ends = [min(300, last_row + right + 1) for last_row in (63, 127, 191, 255)]
        last_tiles = [(end - 1) // 128 for end in ends]
        if ping_pong:
            last_tiles = [max(last_tiles[i // 2 * 2 :][:2]) for i in range(4)]
        expected = sum(
            tile * whole + (half if end <= 128 * tile + 64 else whole)
            for end, tile in zip(ends, last_tiles, strict=True)
            if ping_pong or end > 0
        )
        assert check(spec, q, k, v, window=(None, right))[2].wgmma == expected, right


def test_scores_that_grow_and_shrink():
    """The running maximum moves in every tile, in none, by less and by more than what is put off; and far away."""
    for slope in (0.5, -0.5, 0.04):
        q, k, v = operands(HOPPER, 128, 300, heads=(1, 1))
        q[..., 0] = 8
        k[..., 0] = (slope * np.arange(300)).astype(k.dtype)
        for scale_first in (False, True):
            for exp2_by_fma in (0, 1):
                check(replace(HOPPER, scale_first=scale_first, exp2_by_fma=exp2_by_fma), q, k, v)
    check(HOPPER, *operands(HOPPER, 64, 130, magnitude=20.0))


@pytest.mark.parametrize("exp2_by_fma", [0, 1])
def test_nan_where_no_key_takes_part(exp2_by_fma):
    spec = replace(HOPPER, exp2_by_fma=exp2_by_fma)
    q, k, v = operands(spec, 130, 130)
    expected, expected_lse, _ = check(spec, q, k, v, window=(None, 0))
    k[:, :, 100:] = np.nan
    out, lse, _ = forward(replace(spec, has_upper=True), q, k, v, upper=0)
    np.testing.assert_array_equal(out[:, :, :100], expected[:, :, :100])
    np.testing.assert_array_equal(lse[:, :, :100], expected_lse[:, :, :100])
    assert np.isnan(out[:, :, 100:]).all()


def test_strides():
    """(batch, row, head, element) storage, rows of a wider array, and one head for all."""
    q, k, v = operands(HOPPER, 70, 90)
    wide = guarded_array((1, 70, 2, 72), np.float16, "q")
    wide[..., :64] = q.transpose(0, 2, 1, 3)
    keys = guarded_array((1, 90, 2, 64), np.float16, "k")
    keys[...] = k.transpose(0, 2, 1, 3)
    for values in (v, np.broadcast_to(v[:, :1], v.shape)):
        expected, expected_lse, _ = forward(HOPPER, q, k, values)
        stored = guarded_array(values.shape, np.float16, "v")
        stored[...] = values
        if values is not v:
            stored = np.broadcast_to(stored[:, :1], v.shape)
        out, lse = guarded_array((1, 70, 2, 64), np.float16, "out"), guarded_array((1, 2, 70), np.float32, "lse")
        views = (wide[..., :64].transpose(0, 2, 1, 3), keys.transpose(0, 2, 1, 3), stored, out.transpose(0, 2, 1, 3))
        params, grid = launch_arguments(HOPPER, *views, lse)
        arguments = (params, NO_MODS, *maps(HOPPER, *views))
        module(HOPPER).get_function(HOPPER.entry)(grid, (384,), arguments, shared_mem=HOPPER.shared_bytes)
        np.testing.assert_array_equal(views[3], expected)
        np.testing.assert_array_equal(lse, expected_lse)


# What a block carries from one item to the next: places in the ring, phases of barriers, turns; O still leaving where Q
# is to come. (spec, lengths, upper, lower, keywords)
SEVERAL_ITEMS = {
    "causal": (HOPPER, (300, 300), {"upper": 0}),
    "turns": (replace(HOPPER, ping_pong=True), (300, 300), {"upper": 0}),
    "turns of three": (replace(HOPPER, num_warps=12, ping_pong=True), (400, 200), {"upper": -100}),
    "one warpgroup": (replace(HOPPER, num_warps=4, stages=3), (200, 150), {"upper": 5}),
    "full": (HOPPER, (200, 100), {}),
    "items without keys between others": (HOPPER, (500, 70), {"lower": -300, "upper": -200}),
    "items of one tile": (replace(HOPPER, ping_pong=True), (300, 30), {}),
    "splits, some without keys": (HOPPER, (140, 200), {"upper": 20, "num_splits": 3}),
    "wide V": (replace(HOPPER, head_dim=32, head_dim_v=96), (200, 150), {"upper": 0}),
}


@pytest.mark.parametrize("name", SEVERAL_ITEMS)
def test_blocks_that_take_several_items(name):
    spec, lengths, keywords = SEVERAL_ITEMS[name]
    spec = replace(spec, has_lower="lower" in keywords, has_upper="upper" in keywords)
    arrays = operands(spec, *lengths, heads=(4, 2), batch_size=2)
    expected, expected_lse, alone = forward(spec, *arrays, **keywords)
    for number, blocks in enumerate((1, 2, 3, 5)):
        for options in ALL_OPTIONS[number::4] if blocks > 1 else ALL_OPTIONS:
            out, lse, counters = forward(spec, *arrays, blocks=blocks, options=options, **keywords)
            assert counters.blocks == blocks
            assert (counters.wgmma, counters.bulk) == (alone.wgmma, alone.bulk)
            np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
            np.testing.assert_array_equal(lse, expected_lse)


def test_bounds_of_arrays_hold_with_several_items():
    """Narrow heads, whose rows end before the tile does."""
    arrays = operands(HOPPER, 70, 90, heads=(2, 1), dims=(50, 20))
    np.testing.assert_array_equal(forward(HOPPER, *arrays, blocks=1)[0], forward(HOPPER, *arrays)[0])


@pytest.mark.parametrize(
    "spec",
    [
        replace(HOPPER, has_upper=True),
        replace(HOPPER, ping_pong=True),
        replace(HOPPER, head_dim=96, num_warps=12, packed=True, stages=3),
    ],
    ids=str,
)
def test_schedules_give_the_same_bits(spec):
    q, k, v = operands(spec, 100, 250, heads=(2, 1))
    results = [forward(spec, q, k, v, options=options, upper=150)[:2] for options in ALL_OPTIONS]
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out.view(np.uint16), results[0][0].view(np.uint16))
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize("head_dim", [64, 96])
def test_no_bank_conflicts(head_dim):
    """Of what the kernel itself writes and reads: O on its way out; packed Q on its way in."""
    for packed, kinds in ((False, ("stmatrix",)), (True, ("st_shared", "cp_async_shared"))):
        spec = replace(HOPPER, head_dim=head_dim, packed=packed)
        counters = forward(spec, *operands(spec, 64, 64, heads=(2, 1)), options=Options(counters=True))[2]
        for kind in kinds:
            traffic = getattr(counters, kind)
            assert traffic.cost == traffic.ideal > 0, kind


# ------------------------------------------------------------------------------------------------------------
# Broken kernels


def edited(spec, old, new):
    kernel = source(spec)
    assert kernel.text.count(old) == 1
    text = kernel.text.replace(old, new)
    return Module(KernelSource(kernel.name, text, kernel.entries)).get_function(spec.entry)


# Where chunks lie in a tile is said three times: to the copy by its map, to wgmma by its descriptor, and in PanelTile,
# for what the kernel copies itself.
SWIZZLES = {
    "wgmma": ("kRowBytes == 128 ? OperandSwizzle::k128 : OperandSwizzle::k64", "OperandSwizzle::k64"),
    "the next eight rows": ("kPatternBytes = 8 * kRowBytes", "kPatternBytes = 4 * kRowBytes"),
    "the next panel of V": ("tile_smem, kPanelBytes, kPatternBytes", "tile_smem, 2 * kPanelBytes, kPatternBytes"),
    "one row of the kernel's own copies": (
        "int line = kRowBytes == 128 ? row % 8",
        "int line = kRowBytes == 128 ? row % 8 % 7",
    ),
}


@pytest.mark.parametrize("wrong", SWIZZLES)
def test_a_wrong_place_in_a_tile_shows(wrong):
    spec = replace(HOPPER, head_dim=128, packed=True, num_warps=4)
    arrays = operands(spec, 30, 64, heads=(2, 1))
    expected = forward(spec, *arrays)[0]
    try:
        found = forward(spec, *arrays, kernel=edited(spec, *SWIZZLES[wrong]))[0]
    except EmulatorError:
        return  # beyond shared memory, say
    assert not np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("swizzle", [64, 32, 0])
def test_a_map_of_another_swizzle_shows(swizzle, monkeypatch):
    arrays = operands(HOPPER, 64, 64)
    expected = forward(HOPPER, *arrays)[0]
    make = harness.emulated_map

    def wrong(address, shape, strides, dtype, box, right):
        # Two panels of half the width where a panel is too wide for the swizzle: as many bytes, in the wrong places.
        box = (1, 1, 2 * box[2], box[3] // 2) if 0 < swizzle < right and box[2] <= 128 else box
        box = box if box[3] * 2 <= (swizzle or 256) else (1, 1, box[2] * box[3] * 2 // swizzle, swizzle // 2)
        return make(address, shape, strides, dtype, box, swizzle)

    monkeypatch.setattr(harness, "emulated_map", wrong)
    assert not np.array_equal(forward(HOPPER, *arrays)[0], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("code", "wrong", "report"),
    [
        (
            "isa::mbarrier_arrive_expect_tx(full, Traits::KTile::kBytes)",
            "isa::mbarrier_arrive_expect_tx(full, 2 * Traits::KTile::kBytes)",
            r"deadlock",
        ),
        ("k_place, walk.tile, stage);", "k_place, 0, stage);", ""),
        ("if (++index == Traits::kStages)", "if (++index == Traits::kStages + 1)", "."),
        ("k_empty(stage), Traits::kConsumers)", "k_empty(stage), 1)", "."),
        ("isa::any(correction[0] != 1.0f || correction[1] != 1.0f)", "false", ""),
    ],
)
def test_planted_bugs(code, wrong, report):
    """An empty report: the result is wrong."""
    q, k, v = operands(HOPPER, 128, 300, heads=(1, 1))
    q[..., 0], k[..., 0] = 8, np.arange(300, 0, -1) * 0.5
    kernel = edited(HOPPER, code, wrong)
    if report:
        with pytest.raises(EmulatorError, match=report):
            forward(HOPPER, q, k, v, kernel=kernel)
    else:
        assert not np.array_equal(forward(HOPPER, q, k, v, kernel=kernel)[0], forward(HOPPER, q, k, v)[0])
