"""Plans: which kernel, how large a grid, and why not; for GPUs that are not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.plan.choose import choose, choose_spec, every_spec, refusals
from cupyflash.plan.device import DEVICES, EMULATOR, DeviceSpec
from cupyflash.plan.specs import FwdSpec, Plan
from cupyflash.plan.tiles import FAMILIES, TILES, TileConfig, TileRow, rows_for
from cupyflash.problem.masks import Band
from cupyflash.problem.normalize import normalize
from cupyflash.problem.problem import Problem

H200 = DEVICES["H200"]


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
    (launch,) = choose(problem(dtype="bfloat16", band=Band(None, 0)), H200).launches
    assert str(launch) == "fwd_sm80-bf16-d128-m128n64w8-causal grid=1024 block=256 shared=49152"


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
    (launch,) = choose(problem(**changes), H200).launches
    assert str(launch.spec) == f"fwd_sm80-f16-d128-m128n64w8{name}"


def test_a_problem_that_leaves_sms_idle_gets_the_narrow_tile() -> None:
    (launch,) = choose(problem(batch=1, heads=8, seqlen_q=512), H200).launches  # 32 wide blocks for 132 SMs
    assert str(launch) == "fwd_sm80-f16-d128-m64n64w4 grid=64 block=128 shared=49152"
    (launch,) = choose(problem(batch=1, heads=8, seqlen_q=512), EMULATOR).launches
    assert str(launch.spec.tile) == "m128n64w8"


@pytest.mark.parametrize("empty", [{"batch": 0}, {"heads": 0}, {"seqlen_q": 0}])
def test_nothing_to_compute_is_no_launch(empty: dict[str, int]) -> None:
    assert choose(problem(**empty), H200) == Plan(())
    assert len(choose(problem(seqlen_k=0), H200).launches) == 1  # zeros have to be written


def test_a_loop_over_growing_keys_chooses_once() -> None:
    choose_spec.cache_clear()
    for seqlen_k in range(1000, 1100):
        choose(problem(seqlen_q=1, seqlen_k=seqlen_k), H200)
    assert choose_spec.cache_info().misses == 1


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
        ({"float_mask_dtype": "float32"}, "it has no float mask"),
        ({"has_bool_mask": True}, "it has no bool mask"),
        ({"has_score_mod": True}, "it has no score_mod"),
        ({"has_mask_mod": True}, "it has no mask_mod"),
        ({"softcap": 3.0}, "it has no softcap"),
        ({"has_alibi": True}, "it has no alibi_slopes"),
        ({"has_sinks": True}, "it has no sinks"),
        ({"dropout_p": 0.5}, "it has no dropout"),
        ({"precision": "tf32"}, "it has no precision 'tf32'"),
        ({"weights_stage": "softmax"}, "it has no weights"),
        ({"seqlen_k": 2**30}, f"it takes lengths up to {2**30 - 256}, but S was {2**30}"),
        ({"heads": 2**31}, f"it takes up to {2**31 - 1} tiles of queries, and these are more"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    assert refusals(problem(**changes)) == [reason]


def test_no_refusal_of_what_there_is_and_all_of_what_is_not() -> None:
    assert refusals(problem()) == []
    assert len(refusals(problem(dtype="float64", softcap=1.0, dropout_p=0.1))) == 2


def test_every_row_has_a_legal_tile_where_it_begins_and_later() -> None:
    for row in TILES:
        for tile in row.tiles:
            assert FAMILIES[row.family].rules(tile) == []
        for device in DEVICES.values():
            if device.cc >= row.since:
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
    row = rows_for("float16", 128, 128, H200.cc)[0]
    (found,) = row.reasons(tile, 2, H200)
    assert reason in found


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
    rows = rows_for("bfloat16", *head_dims, H200.cc)
    assert (rows[0].head_dim, rows[0].head_dim_v) == padded


@pytest.mark.parametrize(
    ("device", "tile"), [("A100", "m128n64w8q"), ("L4", "m128n32w8q"), ("H200", "m128n64w8q"), ("T4", "m64n32w4q")]
)
def test_the_first_tile_that_fits_is_chosen(device: str, tile: str) -> None:
    (launch,) = choose(problem(head_dim=192), DEVICES[device]).launches
    assert str(launch.spec.tile) == tile


def test_every_spec_has_a_name_of_its_own_and_is_what_choose_gives() -> None:
    specs = list(every_spec())
    assert len({str(spec) for spec in specs}) == len(specs)
    chosen = {
        choose(problem(dtype=dtype, head_dim=row.head_dim, head_dim_v=row.head_dim_v, **size, **changes), device)
        .launches[0]
        .spec
        for row in TILES
        for dtype in row.dtypes
        for device in map(DEVICES.__getitem__, ("T4", "A100", "L4"))
        if device.cc >= row.since
        for size in (
            {},
            {"batch": 1, "heads": 1, "seqlen_q": 1},
            {"batch": 1, "seqlen_q": 3, "num_heads_k": 2, "num_heads_v": 4},
            {"batch": 500, "seqlen_q": 3, "num_heads_k": 2, "num_heads_v": 4},
        )
        for changes in ({}, {"band": Band(None, 0)}, {"band": Band(-1, 0)}, {"scale": -1.0})
    }
    assert {replace(spec, split=False) for spec in chosen} == {
        spec for spec in specs if isinstance(spec, FwdSpec) and not spec.split
    }
