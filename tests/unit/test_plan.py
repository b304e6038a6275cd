"""Plans: which kernel, how large a grid, and why not; for GPUs that are not there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.plan import choose as choosing
from cupyflash.plan.choose import (
    blocks_per_sm,
    candidates,
    choose,
    choose_spec,
    every_spec,
    num_splits,
    pack_of,
    refusals,
    section_of,
    selector_of,
)
from cupyflash.plan.device import DEVICES, EMULATOR, DeviceSpec
from cupyflash.plan.specs import CombineSpec, FwdSpec, Plan
from cupyflash.plan.tiles import FAMILIES, TILES, TileConfig, TileRow, rows_for
from cupyflash.problem.masks import Band
from cupyflash.problem.normalize import normalize
from cupyflash.problem.problem import STAGES, Problem

A100, H200 = DEVICES["A100"], DEVICES["H200"]


def problem(
    *, batch: int = 2, heads: int = 16, seqlen_q: int = 4096, seqlen_k: int = 4096, head_dim: int = 128, **changes: Any
) -> Problem:
    """The problem of float16 arrays of these lengths, which need not exist."""
    small = np.zeros((1, 1, 1, 1), np.float16)
    described, _ = normalize(small, small, small)
    lengths = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim, "head_dim_v": head_dim}
    counts = {"batch_shape": (batch,), "num_heads_q": heads, "num_heads_k": heads, "num_heads_v": heads}
    return replace(described, **{**lengths, **counts, "scale": head_dim**-0.5, **changes})


def test_a_plan_reads_like_this() -> None:
    (launch,) = choose(problem(dtype="bfloat16", band=Band(None, 0)), A100).launches
    assert str(launch) == "fwd_sm80-bf16-d128-m128n64w8-causal grid=1024 block=256 shared=49152"
    (launch,) = choose(problem(dtype="bfloat16", band=Band(None, 0)), H200).launches
    assert str(launch) == "fwd_sm90-bf16-d128-m128n128w12qs2-causal grid=132 items=1024 block=384 shared=163936"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, ""),
        ({"band": Band(None, 5)}, "-causal"),
        ({"band": Band(-3, 5)}, "-window"),
        ({"band": Band(-3, None)}, "-window"),
        ({"scale": 0.0}, "-window+scalefirst"),
        ({"scale": -1.0, "band": Band(None, 5)}, "-window+scalefirst"),
        ({"scale": 1e-30}, "-window+scalefirst"),
        ({"scale": 1e30}, "-window+scalefirst"),
        ({"scale": 1e3}, ""),
    ],
)
def test_features_that_select_a_kernel(changes: dict[str, Any], name: str) -> None:
    for device, kernel in ((A100, "fwd_sm80-f16-d128-m128n64w8"), (H200, "fwd_sm90-f16-d128-m128n128w12qs2")):
        (launch,) = choose(problem(**changes), device).launches
        assert str(launch.spec) == f"{kernel}{name}"


def test_a_problem_that_leaves_sms_idle_gets_the_narrow_tile() -> None:
    (launch,) = choose(
        problem(batch=1, heads=8, seqlen_q=512, seqlen_k=256), A100
    ).launches  # 32 wide blocks for 108 SMs
    assert str(launch) == "fwd_sm80-f16-d128-m64n64w4 grid=64 block=128 shared=49152"
    (launch,) = choose(problem(batch=1, heads=8, seqlen_q=512, seqlen_k=256), EMULATOR).launches
    assert str(launch.spec.tile) == "m128n64w8"


@pytest.mark.parametrize("empty", [{"batch": 0}, {"heads": 0}, {"seqlen_q": 0}])
def test_nothing_to_compute_is_no_launch(empty: dict[str, int]) -> None:
    assert choose(problem(**empty), H200) == Plan(())
    assert len(choose(problem(seqlen_k=0), H200).launches) == 1  # zeros have to be written


def test_a_loop_over_growing_keys_chooses_once() -> None:
    choose_spec.cache_clear()
    plans = {id(choose(problem(seqlen_q=1, seqlen_k=seqlen_k), H200)) for seqlen_k in range(1000, 1100)}
    assert choose_spec.cache_info().misses == 1
    assert len(plans) == 2  # the same object until another tile of keys makes it another number of parts
    for seqlen_q in range(1000, 1100):
        choose(problem(seqlen_q=seqlen_q, seqlen_k=seqlen_q), H200)
    assert choose_spec.cache_info().misses == 2


@pytest.mark.parametrize(("seqlen_q", "height"), [(1, 64), (64, 64), (65, 128), (100, 128), (128, 128), (1000, 128)])
def test_a_tile_is_no_taller_than_its_rows_need(seqlen_q: int, height: int) -> None:
    (launch,) = choose(problem(batch=64, seqlen_q=seqlen_q), H200).launches
    assert launch.spec.tile.block_m == height


def test_candidates_say_why_not() -> None:
    def why(device: DeviceSpec = A100, **changes: Any) -> list[tuple[str, tuple[str, ...], str]]:
        found = candidates(selector_of(problem(**changes), device), device)
        return [(str(candidate.spec.tile), candidate.reasons, candidate.behind) for candidate in found]

    assert why()[:2] == [
        ("m128n64w8", (), ""),
        ("m64n64w4", (), "tile m64n64w4 would read keys and values more often than m128n64w8"),
    ]
    assert why()[2][2] == "it pads the head dims to 160 and 160, 128 and 128 hold them too"
    on_l4 = why(DEVICES["L4"], head_dim=192)
    assert on_l4[0][1] == (
        "tile m128n64w8q takes 122880 bytes of shared memory at head dims 192 and 192, L4 has 101376 per block",
    )
    assert on_l4[1] == ("m128n32w8q", (), "")
    assert (
        why(batch=1, heads=8, seqlen_q=512)[1][2] == "tile m128n64w8 would leave SMs idle, m64n64w4 makes more blocks"
    )
    assert why(seqlen_q=1)[1][2] == "tile m128n64w8 pads the rows to 128, m64n64w4 to 64"
    tiny = replace(A100, name="tiny", smem_per_block=32 << 10)
    assert {behind for _, _, behind in why(tiny)} == {""}
    assert all("tiny has 32768 per block" in reasons[0] for _, reasons, _ in why(tiny))


def test_a_row_of_another_family_or_of_more_padding_stands_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows_for("float16", 128, 128, A100.cc)[0]
    wider = TileRow("fwd_sm80", ("float16",), 128, 256, (8, 0), (TileConfig(64, 64, 4),))
    slower = replace(wider, family="slow", head_dim_v=128)
    monkeypatch.setitem(FAMILIES, "slow", FAMILIES["fwd_sm80"])
    monkeypatch.setattr("cupyflash.plan.choose.rows_for", lambda *_: [first, wider, slower])
    found = candidates(selector_of(problem(), A100), A100)
    assert [candidate.behind for candidate in found[2:]] == [
        "it pads the head dims to 128 and 256, 128 and 128 hold them too",
        "fwd_sm80 is preferred to slow",
    ]


# --- packing and splits: as if the family had them -----------------------------------------------------------------


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fwd_sm80 packs and splits."""
    monkeypatch.setitem(FAMILIES, "fwd_sm80", replace(FAMILIES["fwd_sm80"], packs=True, splits=True))
    clear_caches()
    yield
    monkeypatch.undo()
    clear_caches()


def clear_caches() -> None:
    for function in vars(choosing).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def decode(batch: int, seqlen_k: int, **changes: Any) -> Problem:
    """One token of 32 query heads that share 8 key heads."""
    return problem(batch=batch, heads=32, seqlen_q=1, seqlen_k=seqlen_k, num_heads_k=8, num_heads_v=8, **changes)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("device", ["H200", "A100", "L4", "T4"])
@pytest.mark.parametrize(("batch", "seqlen_k"), [(1, 4096), (1, 16384), (1, 65536), (1, 262144), (32, 4096), (8, 8192)])
def test_decoding_fills_the_device(device: str, batch: int, seqlen_k: int) -> None:
    spec = DEVICES[device]
    plan = choose(decode(batch, seqlen_k), spec)
    first = plan.launches[0]
    assert isinstance(first.spec, FwdSpec)
    assert (plan.pack, first.spec.packed) == (4, True)
    assert first.grid == (8 * batch * plan.num_splits,)
    slots = spec.sms * blocks_per_sm(first.spec, spec)
    assert first.grid[0] >= 0.75 * slots
    assert plan.num_splits <= seqlen_k / 64
    assert plan == choose(decode(batch, seqlen_k), spec)
    assert (plan.num_splits > 1) == (len(plan.launches) == 2)


@pytest.mark.usefixtures("splits")
def test_a_short_cache_is_divided_to_the_last_tile() -> None:
    """8 tiles of queries and 16 of keys can't make more than 128 blocks."""
    plan = choose(decode(1, 1024), H200)
    assert (plan.num_splits, plan.launches[0].grid) == (16, (128,))
    combine = plan.launches[1]
    assert isinstance(combine.spec, CombineSpec)
    assert combine.grid[0] * combine.spec.rows_per_block == 32


@pytest.mark.usefixtures("splits")
def test_a_window_limits_the_splits() -> None:
    """The band of a decoding step with window=(255, 0) has no upper bound: it would remove nothing."""
    for seqlen_k in (1000, 100_000):
        plan = choose(decode(1, seqlen_k, band=Band(seqlen_k - 256, None)), H200)
        assert plan.num_splits == 1  # four tiles of keys
        plan = choose(decode(1, seqlen_k, band=Band(seqlen_k - 512, None)), H200)
        assert plan.num_splits == 8
    assert choose(decode(1, 100_000, band=Band(None, 63)), H200).num_splits == 1
    assert choose(decode(1, 100_000, band=Band(-600, 600)), H200).num_splits <= 20


@pytest.mark.usefixtures("splits")
def test_a_band_bounds_the_keys_of_a_tile() -> None:
    """Against every tile of rows there is."""
    for lower, upper, seqlen_q, seqlen_k in itertools.product(
        (None, -30, 0, 7), (None, -5, 0, 20), (1, 9, 40), (1, 13, 50)
    ):
        band = Band(lower, upper)
        one = problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, band=band)
        for queries in (1, 4, 64):
            widest = 0
            for row in range(0, seqlen_q, queries):
                start, stop = band.key_range(row, min(row + queries, seqlen_q), seqlen_k)
                widest = max(widest, stop - start)
            assert choosing._keys_of_a_tile(one, queries) >= widest


@pytest.mark.usefixtures("splits")
def test_a_prompt_is_neither_packed_nor_split() -> None:
    plan = choose(problem(heads=32, num_heads_k=8, num_heads_v=8), H200)
    assert (plan.pack, plan.num_splits, len(plan.launches)) == (1, 1, 1)


@pytest.mark.usefixtures("splits")
def test_a_growing_cache_is_divided_into_few_different_numbers_of_parts() -> None:
    choose_spec.cache_clear()
    found = [choose(decode(1, seqlen_k), H200).num_splits for seqlen_k in range(4000, 5000)]
    assert choose_spec.cache_info().misses == 1
    assert len(set(found)) < 20


@pytest.mark.parametrize(
    ("num_heads", "seqlen_q", "pack"),
    [
        ((32, 8, 8), 1, 4),
        ((32, 8, 16), 1, 2),  # two query heads share both
        ((32, 1, 1), 1, 32),
        ((32, 32, 32), 1, 1),
        ((32, 8, 8), 64, 1),  # a tile is full already
        ((32, 8, 8), 4096, 1),
        ((32, 8, 8), 33, 4),
        ((2**25, 1, 1), 1, 2**25),
        ((2**25, 1, 1), 33, 1),  # rows are counted by int32
    ],
)
def test_heads_in_a_tile(num_heads: tuple[int, int, int], seqlen_q: int, pack: int) -> None:
    assert pack_of(num_heads, seqlen_q) == pack


@pytest.mark.parametrize(
    ("num_tiles", "num_key_tiles", "slots", "splits"),
    [
        (264, 1000, 264, 1),
        (212, 1000, 264, 1),  # four fifths of the device
        (1, 4, 264, 1),  # few keys
        (1, 5, 264, 5),
        (1, 0, 264, 1),
        (8, 11, 80, 6),  # 11 tiles in parts of 2; 7 to 10 parts would leave some empty
        (1, 4096, 264, 111),  # of at most 128: 4096 tiles in parts of 37
        (132, 1000, 264, 2),
    ],
)
def test_numbers_of_parts(num_tiles: int, num_key_tiles: int, slots: int, splits: int) -> None:
    assert num_splits(num_tiles, num_key_tiles, slots) == splits


def test_no_part_is_empty_and_none_is_without_a_key() -> None:
    for num_tiles, num_key_tiles, slots in itertools.product((1, 3, 8, 50), range(1, 200), (40, 116, 264)):
        parts = num_splits(num_tiles, num_key_tiles, slots)
        assert 1 <= parts <= num_key_tiles
        assert math.ceil(num_key_tiles / math.ceil(num_key_tiles / parts)) == parts


@pytest.mark.parametrize(
    ("num_families", "num_tiles", "num_bytes", "section"),
    [
        (16, 16, 1 << 20, 16),  # all of them fit
        (16, 32, 2 << 20, 8),  # 12 would, but then 4 were left
        (16, 128, 8 << 20, 2),  # 3 would
        (8, 256, 16 << 20, 2),  # two make two waves of 132
        (7, 128, 8 << 20, 3),  # no number but 1 divides 7: 3, 3 and 1
        (64, 1, 4 << 20, 64),  # too few tiles for two waves
        (3, 5, 0, 3),  # no keys
    ],
)
def test_sections(num_families: int, num_tiles: int, num_bytes: int, section: int) -> None:
    assert section_of(num_families, num_tiles, num_bytes, 132, 50 << 20) == section


def test_heads_that_share_keys_are_of_one_section() -> None:
    causal = {"band": Band(None, 0), "seqlen_q": 8192, "seqlen_k": 8192}
    # 64 heads on 8 of keys, of 4 MiB each: two sections of four.
    grouped = problem(batch=1, heads=64, num_heads_k=8, num_heads_v=8, **causal)
    assert choose(grouped, H200).section == 32
    # Values of their own for each head are 2 MiB more for 7 of 8.
    assert choose(problem(batch=1, heads=64, num_heads_k=8, num_heads_v=64, **causal), H200).section == 8
    # A window's keys alone are in use.
    assert choose(replace(grouped, band=Band(-1023, 0)), H200).section == 64
    # Where all tiles see the same keys their order is that of the heads.
    assert choose(replace(grouped, band=Band(None, None)), H200).section == 1
    # Tiles of packed heads: a section of groups.
    packed = problem(batch=16, heads=64, num_heads_k=8, num_heads_v=8, band=Band(None, 0), seqlen_q=33, seqlen_k=33)
    assert (choose(packed, H200).pack, choose(packed, H200).section) == (8, 128)


@pytest.mark.usefixtures("splits")
def test_blocks_that_take_one_item_after_another() -> None:
    """Where there are more items than the device runs blocks, and the kernel can; splits are items of their own."""
    for changes, blocks, items in (
        ({"heads": 32}, 132, 2 * 32 * 32),
        ({"batch": 1, "heads": 4}, 128, 0),
        ({"batch": 3, "heads": 1, "seqlen_q": 128, "seqlen_k": 16384}, 129, 0),  # 43 parts
        ({"heads": 32, "softcap": 30.0}, 2 * 32 * 32, 0),
    ):
        launch = choose(problem(**changes), H200).launches[0]
        assert isinstance(launch.spec, FwdSpec)
        assert launch.spec.family == "fwd_sm90"
        assert (launch.grid, launch.items) == ((blocks,), items)
    launch = choose(problem(), A100).launches[0]
    assert (launch.grid, launch.items) == ((2 * 16 * 32,), 0)


def test_a_gpu_without_kernels_is_named_with_the_way_out() -> None:
    with pytest.raises(
        cupyflash.Unsupported, match=r"no kernel runs on V100: .* 7\.5 .* V100 has 7\.0.*backend=\"math\""
    ):
        choose(problem(dtype="bfloat16"), DeviceSpec("V100", (7, 0), 80, 96 << 10, 96 << 10, 6 << 20))
    tiny = DeviceSpec("tiny", (8, 0), 1, 32 << 10, 32 << 10, 1 << 20)
    with pytest.raises(cupyflash.Unsupported) as caught:
        choose(problem(), tiny)
    reasons = [reason.split(" takes")[0] for reason in caught.value.reasons["cuda"]]
    assert reasons[:2] == ["tile m128n64w8", "tile m64n64w4"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "int8"}, "it has no int8, only bfloat16, float16, float32, float64"),
        ({"head_dim": 300}, "it has the head dims 32, 64, 96, 128, 160, 192, 224, 256, but E was 300 and Ev was 300"),
        ({"head_dim_v": 257}, "it has the head dims 32, 64, 96, 128, 160, 192, 224, 256, but E was 128 and Ev was 257"),
        (
            {"seqlen_k": 2**27 + 1, "has_mask_mod": True},
            f"it takes lengths up to {2**27} with mods, but B, Hq, L, S were (2, 16, 4096, {2**27 + 1})",
        ),
        ({"precision": "tf32"}, "it has no precision 'tf32'"),
        ({"seqlen_k": 2**30}, f"it takes lengths up to {2**30 - 256}, but S was {2**30}"),
        ({"heads": 2**31}, f"it takes up to {2**31 - 1} tiles of queries, and these are more"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    assert refusals(problem(**changes)) == [reason]


def test_no_refusal_of_what_there_is_and_all_of_what_is_not() -> None:
    assert refusals(problem()) == []
    everything = {"float_mask_dtype": "float32", "has_bool_mask": True, "softcap": 1.0, "has_alibi": True}
    everything |= {"has_sinks": True, "dropout_p": 0.1, "has_score_mod": True, "has_mask_mod": True}
    assert refusals(problem(**everything)) == []
    assert len(refusals(problem(**everything, head_dim=300, precision="tf32"))) == 2


@pytest.mark.parametrize(
    ("stage", "changes", "names"),
    [
        ("raw", {"softcap": 3.0, "has_bool_mask": True}, ["weights-f16-raw"]),
        ("modded", {"softcap": 3.0}, ["weights-f16-raw"]),
        ("capped", {}, ["weights-f16-raw"]),
        ("capped", {"softcap": 3.0, "has_bool_mask": True}, ["weights-f16-capped-changed"]),
        ("biased", {}, ["weights-f16-biased-window"]),
        ("biased", {"has_bool_mask": True, "dropout_p": 0.5}, ["weights-f16-biased-window+mask+changed"]),
        ("softmax", {"band": Band(None, 0)}, ["fwd_sm80-f16-d128-m128n64w8-causal", "weights-f16-softmax-window"]),
        ("dropout", {}, ["fwd_sm80-f16-d128-m128n64w8", "weights-f16-softmax-window"]),
    ],
)
def test_plans_of_weights(stage: str, changes: dict[str, Any], names: list[str]) -> None:
    plan = choose(problem(weights_stage=stage, **changes), A100)
    assert [str(launch.spec) for launch in plan.launches] == names
    assert plan.launches[-1].grid == (2 * 16 * 4096 // 64,)
    assert plan.weights_parts == 1


def test_few_queries_share_the_keys_of_their_weights_among_blocks() -> None:
    plan = choose(problem(batch=1, heads=4, seqlen_q=1, seqlen_k=10_000, weights_stage="dropout"), H200)
    assert 1 < plan.weights_parts <= math.ceil(10_000 / 64)
    assert plan.launches[-1].grid == (4 * plan.weights_parts,)
    assert choose(problem(weights_stage="biased", seqlen_q=0), H200).launches == ()
    assert choose(problem(weights_stage="biased", seqlen_k=0), H200).launches == ()
    assert len(choose(problem(weights_stage="softmax", seqlen_k=0), H200).launches) == 1


def test_scores_are_refused_where_attention_is() -> None:
    old = DeviceSpec("V100", (7, 0), 80, 96 << 10, 96 << 10, 6 << 20)
    with pytest.raises(cupyflash.Unsupported, match="no kernel runs on V100"):
        choose(problem(weights_stage="raw"), old)


def test_every_row_has_a_legal_tile_where_it_begins_and_later() -> None:
    for row in TILES:
        for tile in row.tiles:
            assert FAMILIES[row.family].rules(tile) == []
        for device in DEVICES.values():
            if device.cc >= row.since and FAMILIES[row.family].only in (None, device.cc[0]):
                assert [] in [row.reasons(tile, 2, device) for tile in row.tiles], (row, device.name)


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (TileConfig(64, 64, 8), "8 warps need m128"),
        (TileConfig(64, 40, 4), "copies 16 keys at a time"),
        (TileConfig(128, 16, 8), "copies 32 keys at a time"),
        (TileConfig(128, 512, 8), "takes 393216 bytes of shared memory at head dims 128 and 128, H200 has 232448"),
    ],
)
def test_illegal_tiles(tile: TileConfig, reason: str) -> None:
    row = rows_for("float16", 128, 128, A100.cc)[0]
    (found,) = row.reasons(tile, 2, H200)
    assert reason in found


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (TileConfig(256, 64, 20, False, 2), "m is 64, 128 or 192"),
        (TileConfig(128, 64, 8, False, 2), "with four warps that copy"),
        (TileConfig(128, 72, 12, False, 2), "16 to 256 keys, in steps of 16"),
        (TileConfig(128, 64, 12, False, 1), "the ring has two stages or more"),
        (TileConfig(128, 64, 12, True, 2), "queries are read from shared memory"),
        (TileConfig(128, 128, 12, False, 4), "takes 295072 bytes of shared memory at head dims 128 and 128, H200 has"),
    ],
)
def test_illegal_tiles_of_hopper(tile: TileConfig, reason: str) -> None:
    row = rows_for("float16", 128, 128, H200.cc)[0]
    assert row.family == "fwd_sm90"
    (found,) = row.reasons(tile, 2, H200)
    assert reason in found


def test_hopper_has_a_family_of_its_own() -> None:
    for device in DEVICES.values():
        families = {candidate.spec.family for candidate in candidates(selector_of(problem(), device), device)}
        assert ("fwd_sm90" in families) == (device.cc == (9, 0))
    assert [FAMILIES[name].arch_for(H200) for name in FAMILIES] == ["sm_90a", "sm_90", "sm_90"]
    # Padding is less than another family.
    (launch,) = choose(problem(head_dim=40), H200).launches
    assert str(launch.spec) == "fwd_sm90-f16-d64-m128n128w12qs2e8"
    (launch,) = choose(problem(dtype="float32"), H200).launches
    assert launch.spec.family == "fwd_simt"


def test_exponentials_by_multiply_adds_are_of_kernels_that_change_no_scores() -> None:
    """Elsewhere the two tiles of head dim 64 would be the same kernel twice."""
    for changes, expected in (({}, [8, 0]), ({"band": Band(None, 0)}, [8, 0]), ({"softcap": 3.0}, [0])):
        found = candidates(selector_of(problem(head_dim=64, **changes), H200), H200)
        specs = [one.spec for one in found if (one.spec.family, one.spec.head_dim) == ("fwd_sm90", 64)]
        assert [spec.tile.exp2_by_fma for spec in specs] == expected


def test_few_rows_and_arrays_without_maps_are_not_for_hopper_s_family() -> None:
    first = candidates(selector_of(problem(seqlen_q=64), H200), H200)[0]
    assert first.reasons == ("fwd_sm90 is for 65 rows of queries or more, here are fewer",)
    assert choose(problem(seqlen_q=64), H200).launches[0].spec.family == "fwd_sm80"
    assert choose(problem(seqlen_q=65), H200).launches[0].spec.family == "fwd_sm90"
    packed = choose(problem(batch=64, seqlen_q=30, num_heads_k=8, num_heads_v=4), H200)
    assert (packed.launches[0].spec.family, packed.pack) == ("fwd_sm80", 2)  # type: ignore[union-attr]
    packed = choose(problem(batch=64, seqlen_q=33, num_heads_k=4, num_heads_v=4), H200)
    assert (packed.launches[0].spec.family, packed.launches[0].spec.packed) == ("fwd_sm90", True)  # type: ignore[union-attr]
    reasons = ("bulk copies can't move key: it is upside down",)
    found = candidates(selector_of(problem(), H200, unmapped=reasons), H200)
    assert (found[0].reasons, found[0].spec.family) == (reasons, "fwd_sm90")
    assert choose(problem(), H200, unmapped=reasons).launches[0].spec.family == "fwd_sm80"


def test_the_latest_row_that_a_gpu_reaches_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    later = TileRow("fwd_sm80", ("float16",), 64, 64, (9, 0), (TileConfig(64, 32, 4),))
    monkeypatch.setattr("cupyflash.plan.tiles.TILES", (later, *TILES))
    assert rows_for("float16", 64, 64, (8, 9))[0].since == (8, 0)
    assert rows_for("float16", 64, 64, (12, 0))[0] == later
    assert rows_for("bfloat16", 64, 64, (12, 0))[0].since == (8, 0)
    assert rows_for("float16", 64, 64, (7, 5))[0].since == (7, 5)
    assert [row.family for row in rows_for("bfloat16", 64, 64, (7, 5))] == ["fwd_simt"] * 3
    assert rows_for("float16", 64, 64, (7, 0)) == []


@pytest.mark.parametrize(
    ("head_dims", "padded"),
    [
        ((0, 0), (32, 32)),
        ((32, 33), (64, 64)),
        ((65, 3), (96, 96)),
        ((100, 64), (128, 64)),
        ((40, 128), (64, 128)),
        ((192, 128), (192, 128)),
        ((161, 129), (192, 192)),
        ((5, 256), (128, 256)),
        ((256, 200), (256, 256)),
    ],
)
def test_head_dims_are_padded_as_little_as_possible(head_dims: tuple[int, int], padded: tuple[int, int]) -> None:
    rows = rows_for("bfloat16", *head_dims, A100.cc)
    assert (rows[0].head_dim, rows[0].head_dim_v) == padded


@pytest.mark.parametrize(
    ("device", "tile"), [("A100", "m128n64w8q"), ("L4", "m128n32w8q"), ("H200", "m128n112w12qs2"), ("T4", "m64n32w4q")]
)
def test_the_first_tile_that_fits_is_chosen(device: str, tile: str) -> None:
    (launch,) = choose(problem(head_dim=192), DEVICES[device]).launches
    assert str(launch.spec.tile) == tile


def changes_of_scores(dtype: str) -> list[dict[str, Any]]:
    """Every set of what is done to scores and weights, as changes of a problem."""
    choices = ((None, dtype, "float32"), (False, True), (0.0, 3.0), (0.0, 0.5))
    names = ("float_mask_dtype", "has_bool_mask", "softcap", "dropout_p")
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*choices) if any(chosen)]


def test_every_spec_has_a_name_of_its_own_and_is_what_choose_gives_or_tune_may() -> None:
    specs = list(every_spec())
    assert len({str(spec) for spec in specs}) == len(specs)
    asked = [
        (problem(dtype=dtype, head_dim=row.head_dim, head_dim_v=row.head_dim_v, **{**size, **changes}), device)
        for row in TILES
        for dtype in row.dtypes
        for device in map(DEVICES.__getitem__, ("T4", "A100", "L4", "H200"))
        if device.cc >= row.since
        for size in (
            {},
            {"batch": 1, "heads": 1, "seqlen_q": 1},
            {"batch": 1, "seqlen_q": 3, "num_heads_k": 2, "num_heads_v": 4},
            {"batch": 500, "seqlen_q": 33, "num_heads_k": 2, "num_heads_v": 4},
            {"batch": 500, "seqlen_q": 3, "seqlen_k": 100, "num_heads_k": 2, "num_heads_v": 4},
            {"batch": 500, "seqlen_q": 33, "seqlen_k": 100},
        )
        for changes in ({}, {"band": Band(None, 0)}, {"band": Band(-1, 0)}, {"scale": -1.0}, *changes_of_scores(dtype))
    ]
    chosen = {launch.spec for one in asked for launch in choose(*one).launches}
    # On Hopper tiles of one size differ in how they are computed, which `tune` may find to be better.
    chosen |= {
        candidate.spec
        for one in asked
        for candidate in candidates(selector_of(*one), one[1])
        if candidate.behind.endswith("in the table")
    }
    chosen |= {
        choose(problem(dtype=dtype, weights_stage=stage, **changes), H200).launches[-1].spec
        for dtype in {dtype for row in TILES for dtype in row.dtypes}
        for stage in (*STAGES, "dropout")
        for changes in ({}, *changes_of_scores(dtype))
    }
    assert chosen <= set(specs)
    assert set(specs) <= chosen
    assert CombineSpec("float16") in chosen


def test_kernels_are_few_enough_to_compile_them_all() -> None:
    specs = [spec for spec in every_spec() if isinstance(spec, FwdSpec)]
    for family, dtype in {(spec.family, spec.dtype) for spec in specs}:
        features = {spec.features for spec in specs if (spec.family, spec.dtype) == (family, dtype)}
        assert len(features) <= 15, (family, dtype)
    assert len(specs) <= 4500


def test_dropout_is_neither_packed_nor_split() -> None:
    assert choose(decode(1, 100_000), H200).num_splits > 1
    plan = choose(decode(1, 100_000, dropout_p=0.5), H200)
    assert (plan.pack, plan.num_splits) == (1, 1)
    assert not any(spec.features.dropout and spec.packed for spec in every_spec() if isinstance(spec, FwdSpec))


def test_the_name_says_the_baseline_where_there_are_several() -> None:
    t4 = DEVICES["T4"]
    assert str(choose(problem(), t4).launches[0].spec).endswith("-sm75")
    assert "sm75" not in str(choose(problem(dtype="float32"), t4).launches[0].spec)
    assert "sm75" not in str(choose(problem(), H200).launches[0].spec)
