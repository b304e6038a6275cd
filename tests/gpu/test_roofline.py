"""The model of the GPU's pipes: what it reads off code, what it counts, and where it must agree with arithmetic."""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cupyflash.build.cache import default_cache
from cupyflash.build.nvrtc import compile_cubin
from cupyflash.build.rendering import entry_of, render_kernel
from cupyflash.plan.device import DEVICES
from cupyflash.plan.specs import Features, FwdSpec
from cupyflash.plan.tiles import TileConfig
from cupyflash.problem.normalize import normalize
from tests.conftest import Require

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("roofline")


@pytest.fixture
def disassembler(roofline: ModuleType, require: Require) -> str:
    return require("nvrtc", roofline.find_nvdisasm(), "nvdisasm is not installed")


# A step with a mask that most tiles pass over and an unlikely detour behind the end, as ptxas lays them out.
LISTING = """\
.text.flash_fwd_sm80:
        /*0000*/                   S2R R1, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   FSEL R8, R8, -INF , P1 ;
        /*0050*/                   FSEL R9, R9, -INF , P1 ;
.L_x_1:
        /*0060*/                   MUFU.EX2 R8, R8 ;
        /*0070*/               @P3 BRA P1, `(.L_x_2) ;
        /*0080*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
.L_x_2:
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
"""


def test_the_loop_and_its_shortest_way(roofline: ModuleType) -> None:
    code = roofline.parse(LISTING)
    assert [one.name for one in code][:3] == ["S2R", "LDSM", "HMMA"]
    ((begin, end),) = roofline.loops_of(code, "HMMA")
    assert (code[begin].name, code[end].opcode) == ("LDSM", "BRA")
    # The mask is left out; the branch around a product is not taken.
    way = [one.name for one in roofline.shortest_way(code, begin, end, "HMMA")]
    assert way == ["LDSM", "HMMA", "BRA", "MUFU", "BRA", "HMMA", "BRA"]


@pytest.mark.parametrize(
    ("opcode", "pipe", "size"),
    [
        ("LDSM.16.M88.4", "shared", 512),
        ("LDSM.16.MT88.2", "shared", 256),
        ("LDS.128", "shared", 512),
        ("LDS.U16", "shared", 128),
        ("LDGSTS.E.BYPASS.128", "shared", 512),
        ("SHFL.BFLY", "shared", 128),
        ("MUFU.EX2", "xu", None),
        ("FFMA", "fma", None),
        ("IMAD.WIDE", "fma", None),
        ("FMNMX", "alu", None),
        ("F2FP.BF16.F32.PACK_AB", "alu", None),
        ("DFMA", "fp64", None),
        ("HGMMA.64x128x16.F32.BF16", "tensor", None),
        ("UIADD3", None, None),
        ("BAR.SYNC", None, None),
    ],
)
def test_pipes(roofline: ModuleType, opcode: str, pipe: str | None, size: int | None) -> None:
    assert roofline.pipe_of(opcode.partition(".")[0]) == pipe
    if size is not None:
        assert roofline.bytes_of(opcode) == size


def wgmma_spec(head_dim: int, block_m: int, block_n: int) -> FwdSpec:
    return FwdSpec("fwd_sm80", "bfloat16", head_dim, head_dim, TileConfig(block_m, block_n, 8))


@pytest.mark.parametrize(
    ("head_dim", "block_m", "block_n", "tensor", "shared"),
    [(128, 128, 128, 2048, 1792), (128, 128, 176, 2816, 2368), (64, 192, 128, 1536, 1216), (256, 128, 80, 2560, 2432)],
)
def test_wgmma_by_hand(
    roofline: ModuleType, head_dim: int, block_m: int, block_n: int, tensor: int, shared: int
) -> None:
    """Two products of a tile; what they read of shared memory, P excepted, and what TMA writes there."""
    exps = block_m * block_n / (block_m / 16)  # of a warp
    step = roofline.Step("HGMMA", 400, {"xu": exps}, 0)
    cycles = roofline.cycles_of(wgmma_spec(head_dim, block_m, block_n), step, roofline.RATES["H200"])
    assert cycles["tensor"] == tensor
    assert cycles["shared"] == shared
    assert cycles["xu"] == block_m * block_n / 16
    assert cycles["issue"] == block_m / 16 * 100
    limit = roofline.limit_of(cycles)
    assert limit.pipe == ("xu" if head_dim == 64 else "tensor")
    assert limit.overlapped == max(cycles.values()) <= limit.in_turn


def asked(**options: Any) -> Any:
    query_shape, key_shape = options.pop("query"), options.pop("key")
    query, key = (np.broadcast_to(np.zeros((), np.float16), shape) for shape in (query_shape, key_shape))
    problem, _ = normalize(query, key, key, **options)
    return problem


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (70, 30)}, {"window": (None, -1)}])
@pytest.mark.parametrize("align", [0, 100, -150])
@pytest.mark.parametrize("pack", [1, 4])
def test_tiles_of_keys(roofline: ModuleType, options: dict[str, Any], align: int, pack: int) -> None:
    """Counted against the mask itself: from the first to the last key that any row of the tile sees."""
    problem = asked(query=(4, 200, 64), key=(1, 333, 64), enable_gqa=True, align=align, **options)
    spec = wgmma_spec(64, 64, 48)
    i, j = np.arange(200)[:, None], np.arange(333)
    lower, upper = problem.band.lower, problem.band.upper
    visible = (j - i >= (-(10**6) if lower is None else lower)) & (j - i <= (10**6 if upper is None else upper))
    expected = []
    for first in range(0, 200 * pack, 64):
        queries = sorted({row // pack for row in range(first, min(first + 64, 200 * pack))})
        keys = np.flatnonzero(visible[queries].any(axis=0))
        expected.append(keys[-1] // 48 - keys[0] // 48 + 1 if keys.size else 0)
    assert roofline.tiles_of_keys(problem, spec, pack) == expected


@pytest.mark.parametrize("block_n", [48, 64, 128])
@pytest.mark.parametrize("align", [0, 33, -70])
@pytest.mark.parametrize("ping_pong", [False, True])
def test_what_warpgroups_leave_out(roofline: ModuleType, block_n: int, align: int, ping_pong: bool) -> None:
    """Half tile by half tile, from each warpgroup's last row: above it nothing is multiplied, in turns half a tile."""
    problem = asked(query=(1, 384, 64), key=(1, 333, 64), is_causal=True, align=align)
    tile = replace(wgmma_spec(64, 128, block_n).tile, ping_pong=ping_pong)
    spec = replace(wgmma_spec(64, 128, block_n), family="fwd_sm90", tile=tile)
    causal = replace(spec, features=Features(has_upper=True))
    half = {48: 32, 64: 32, 128: 64}[block_n]
    expected = []
    for first in range(0, 384, 128):
        ends = [min(333, max(0, first + row + align)) for row in (64, 128)]
        taken = 0.0
        for end in ends:
            tiles = range(0, max(ends) if ping_pong else end, block_n)
            taken += len(tiles)
            if tiles and end <= tiles[-1] + half:
                taken -= 1 - half / block_n
        expected.append(taken / 2)
    np.testing.assert_allclose(roofline.tiles_multiplied(problem, causal, 1), expected)
    assert roofline.tiles_multiplied(problem, spec, 1) == roofline.tiles_of_keys(problem, spec, 1)


def test_blocks_are_dealt_out(roofline: ModuleType) -> None:
    assert roofline.longest_sm([5] * 8, 8) == 5
    assert roofline.longest_sm([5] * 9, 8) == 10
    assert roofline.longest_sm([4, 3, 2, 1], 2) == 5  # 4 + 1, 3 + 2
    assert roofline.longest_sm([1, 2, 3, 4], 2) == 6  # 1 + 3, 2 + 4: the longest last is worse
    assert roofline.longest_sm([], 8) == 0
    # Two blocks that take items 0 3 4 7 and 1 2 5 6.
    assert roofline.longest_sm([8, 7, 6, 5, 4, 3, 2, 1], 2, 2) == 18
    assert roofline.longest_sm([4, 3, 2], 8, 2) == 5


def test_the_order_is_that_of_the_kernels(roofline: ModuleType) -> None:
    assert roofline.in_order([1, 2, 3], 4, 2) == [1, 1, 2, 2, 3, 3, 3, 3, 2, 2, 1, 1]
    assert roofline.in_order([1, 2], 3, 2) == [1, 1, 2, 2, 2, 1]
    assert roofline.in_order([1, 2], 2, 2) == [2, 2, 1, 1]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_a_step_of_a_compiled_kernel(roofline: ModuleType, disassembler: str, arch: str) -> None:
    """The loop has all products of the kernel, and an exp2 for each score and little else."""
    tile = TileConfig(128, 64, 8)
    for features in (Features(), Features(has_upper=True)):
        spec = FwdSpec("fwd_sm80", "bfloat16", 128, 128, tile, features)
        binary = compile_cubin(render_kernel(spec), arch, default_cache())
        code = roofline.disassemble(binary.path)
        opcodes = binary.resources[entry_of(spec)].opcodes
        ((begin, end),) = roofline.loops_of(code, "HMMA")
        way = roofline.shortest_way(code, begin, end, "HMMA")
        assert sum(one.name == "HMMA" for one in way) == opcodes["HMMA"] == 128
        assert len(way) < end + 1 - begin
        step = roofline.step_of(spec, arch)
        assert step.instructions == len(way)
        scores = 16 * 64
        assert scores <= step.lanes["xu"] <= 1.1 * scores
        # ldmatrix of all K and V, and this warp's part of the copies of the next ones.
        assert step.shared_bytes >= 2 * 64 * 128 * 2 + 2 * 64 * 128 * 2 / 8


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_without_tensor_cores(roofline: ModuleType, disassembler: str, dtype: str) -> None:
    """Multiply-adds are those of the tile, however the loops over head dims were unrolled."""
    case = roofline.Case(1, (2, 2), 512, 512, 64, dtype=dtype)
    device = DEVICES["A100"]
    _, plan = roofline.planned(case, device)
    spec = plan.launches[0].spec
    step = roofline.step_of(spec, device.arch)
    pipe = {"float32": "fma", "float64": "fp64"}[dtype]
    products = spec.tile.block_m * spec.tile.block_n * (spec.head_dim + spec.head_dim_v) / spec.tile.num_warps
    assert products <= step.lanes[pipe] <= 1.1 * products
    assert step.lanes["xu"] == spec.tile.block_m * spec.tile.block_n / spec.tile.num_warps


@pytest.mark.parametrize("device", ["T4", "A100", "RTX 5090", "H200"])
def test_nothing_is_faster_than_the_data_sheet(roofline: ModuleType, disassembler: str, device: str) -> None:
    rates, spec = roofline.RATES[device], DEVICES[device]
    peak = 2 * max(rates.mma, rates.wgmma) * spec.sms * rates.clock * 1e9
    for case in (
        roofline.Case(4, (16, 16), 4096, 4096, 128, dtype="float16"),
        roofline.Case(4, (16, 16), 4096, 4096, 128, True, dtype="float16"),
        roofline.Case(8, (32, 8), 1, 8192, 128, dtype="float16", reads_once=True),
    ):
        found = roofline.predict(*roofline.planned(case, spec), spec, rates)
        assert case.operations / peak < found.seconds <= found.in_turn
        assert case.bytes / (rates.dram * 1e12) < found.seconds
        assert max(found.share.values()) <= 1
        assert found.limit in found.share
    assert found.limit == "DRAM"


def test_a_half_empty_wave_and_a_causal_tail_cost(roofline: ModuleType, disassembler: str) -> None:
    device, rates = DEVICES["A100"], roofline.RATES["A100"]

    def seconds(heads: int, is_causal: bool) -> float:
        case = roofline.Case(1, (heads, heads), 128 * 12, 128 * 12, 128, is_causal)
        found: float = roofline.predict(*roofline.planned(case, device), device, rates).seconds
        return found - roofline.LAUNCH_SECONDS

    assert seconds(10, False) == pytest.approx(2 * seconds(9, False))  # 120 blocks for 108 SMs
    # 13 of 24 tiles of keys on average. With tiles in the order of their lengths an SM gets no more; head by head, the
    # last ones would begin with long tiles.
    assert seconds(54, True) / seconds(54, False) == pytest.approx(13 / 24)


@pytest.mark.parametrize("feature", ["softcap as a score_mod", "document mask as a mask_mod"])
def test_a_function_counts(roofline: ModuleType, disassembler: str, feature: str) -> None:
    """The kernel is the one that computes it, so it has more to do than the same without."""
    device, rates = DEVICES["A100"], roofline.RATES["A100"]
    plain, case = (roofline.Case(1, (8, 8), 1024, 1024, 64, feature=feature) for feature in ("", feature))
    problem, plan = roofline.planned(case, device)
    assert plan.launches[0].spec.mods is not None
    without = roofline.predict(*roofline.planned(plain, device), device, rates)
    assert roofline.predict(problem, plan, device, rates).in_turn > without.in_turn


def test_measurements_are_set_beside_it(roofline: ModuleType, disassembler: str) -> None:
    case = next(case for case in roofline.CASES if case.name == "d128 full 4096")
    device = DEVICES["H200"]
    found = roofline.predict(*roofline.planned(case, device), device, roofline.RATES["H200"])
    row = {"name": case.name, "seconds": {"cupyflash": {"median": 2 * found.seconds}}, "clocks": {}}
    slow = {**row, "clocks": {"sm_mhz": roofline.RATES["H200"].clock * 500}}
    report = {
        "machine": {"name": "NVIDIA H200"},
        "results": [row, slow, {"name": "gone", "seconds": {}}, {**row, "seconds": {}}],
    }
    assert roofline.device_of_report(report) == device
    _, line, slower = roofline.compared_lines(report, device)
    assert line.startswith("d128 full 4096")
    assert "   50%  " in line
    part = float(slower.split("%")[0].split()[-1])  # at half the clock all but the launch takes twice the time
    assert 99 <= part <= 101
    with pytest.raises(ValueError, match="Voodoo is none of the GPUs"):
        roofline.device_of_report({"machine": {"name": "Voodoo"}})


def test_the_newest_results(roofline: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--results", str(tmp_path)]) == 1
    assert "has no results of a GPU" in capsys.readouterr().err
    for age, name in enumerate(("gpu-b.json", "gpu-a.json")):
        (tmp_path / name).write_text('{"machine": {"name": "NVIDIA H200"}, "results": []}')
        os.utime(tmp_path / name, (age, age))
    assert roofline.newest(tmp_path) == tmp_path / "gpu-a.json"
    assert roofline.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("case ")


def test_every_known_gpu_has_rates(roofline: ModuleType) -> None:
    assert set(roofline.RATES) == set(DEVICES)
    assert all(
        math.isfinite(value) and value >= 0 for rates in roofline.RATES.values() for value in vars(rates).values()
    )


def test_specs(roofline: ModuleType, disassembler: str, capsys: pytest.CaptureFixture[str]) -> None:
    match = "fwd_sm80-bf16-d64-m64n64w4-causal-packed"
    assert roofline.main(["--device", "A100", "--specs", "--match", match]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["kernel", "limit"]
    assert line.split()[:2] == [match, "shared"]
    assert roofline.main(["--specs", "--match", "no-such"]) == 1
    assert "no kernel with 'no-such'" in capsys.readouterr().err


def test_the_page_has_every_case(
    roofline: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert roofline.main(["--check"]) == 0
    text = roofline.PAGE.read_text(encoding="utf-8")
    assert "A model, not a measurement" in text
    page = tmp_path / "roofline.md"
    page.write_text(text.replace("| d64 full 2048 |", "| d64 full 2047 |"), encoding="utf-8")
    monkeypatch.setattr(roofline, "PAGE", page)
    assert roofline.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
