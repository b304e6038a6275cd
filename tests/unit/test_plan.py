"""Plans: which kernel, how large a grid, and why not; for GPUs that are not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.plan.choose import choose, choose_spec, every_spec, refusals
from cupyflash.plan.device import DEVICES, EMULATOR, DeviceSpec
from cupyflash.plan.specs import Plan
from cupyflash.plan.tiles import TILES, TileConfig, TileRow, rows_for
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
    with pytest.raises(cupyflash.Unsupported, match=r"no kernel runs on T4: .* 8\.0 .* T4 has 7\.5.*backend=\"math\""):
        choose(problem(), DEVICES["T4"])
    tiny = DeviceSpec("tiny", (8, 0), 1, 32 << 10, 32 << 10, 1 << 20)
    with pytest.raises(cupyflash.Unsupported) as caught:
        choose(problem(), tiny)
    assert [reason.split(" takes")[0] for reason in caught.value.reasons["cuda"]] == ["tile m128n64w8", "tile m64n64w4"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "it has no float32, only bfloat16, float16"),
        ({"head_dim": 300}, "it has the head dims 64, 128, but E was 300 and Ev was 300"),
        ({"head_dim_v": 257}, "it has the head dims 64, 128, but E was 128 and Ev was 257"),
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
    assert len(refusals(problem(dtype="float64", softcap=1.0, dropout_p=0.1))) == 3


def test_every_tile_in_the_table_is_legal_where_its_row_begins_and_later() -> None:
    for row in TILES:
        for device in DEVICES.values():
            if device.cc >= row.since:
                assert [row.reasons(tile, 2, device) for tile in row.tiles] == [[] for _ in row.tiles]


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (TileConfig(64, 64, 8), "8 warps need m128"),
        (TileConfig(128, 32, 8), "at least half of m"),
        (TileConfig(64, 40, 4), "a multiple of 16"),
        (TileConfig(128, 512, 8), "takes 393216 bytes of shared memory at head dims 128 and 128, H200 has 232448"),
    ],
)
def test_illegal_tiles(tile: TileConfig, reason: str) -> None:
    (found,) = TILES[1].reasons(tile, 2, H200)
    assert reason in found


def test_the_latest_row_that_a_gpu_reaches_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    later = TileRow("fwd_sm80", ("float16",), 64, 64, (9, 0), (TileConfig(64, 32, 4),))
    monkeypatch.setattr("cupyflash.plan.tiles.TILES", (later, *TILES))
    assert rows_for("float16", 64, 64, (8, 9))[0] == TILES[0]
    assert rows_for("float16", 64, 64, (12, 0))[0] == later
    assert rows_for("bfloat16", 64, 64, (12, 0))[0] == TILES[0]
    assert rows_for("float16", 64, 64, (7, 5)) == []


def test_every_spec_has_a_name_of_its_own_and_is_what_choose_gives() -> None:
    specs = list(every_spec())
    assert len({str(spec) for spec in specs}) == len(specs)
    chosen = {
        choose(problem(dtype=dtype, head_dim=head_dim, seqlen_q=seqlen_q, **changes), H200).launches[0].spec
        for dtype in ("float16", "bfloat16")
        for head_dim in (64, 128)
        for seqlen_q in (1, 4096)
        for changes in ({}, {"band": Band(None, 0)}, {"band": Band(-1, 0)}, {"scale": -1.0})
    }
    assert chosen == set(specs)
