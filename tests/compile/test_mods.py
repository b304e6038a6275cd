"""Traced functions compiled for every architecture: no GPU needed, NVRTC is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupyflash import mods
from cupyflash.build.cache import Cache
from cupyflash.build.nvrtc import Resources, compile_cubin
from cupyflash.build.rendering import arch_for
from cupyflash.plan.choose import Rows, Selector, choose_spec
from cupyflash.plan.specs import Features, FwdSpec, KernelSpec, Mods, ModSummarySpec, WeightsSpec
from cupyflash.plan.tiles import TILES, TileConfig
from cupyflash.problem.trace import trace_mask_mod, trace_score_mod
from cupyflash.tools.kernels import ARCHITECTURES, device_of
from tests.compile.compiling import faults_of
from tests.compile.selection import Pair
from tests.kernels.mods import source_with

pytestmark = pytest.mark.usefixtures("nvrtc")

SLOPES = np.ones(8, np.float32)
SCORES = {
    "alibi": mods.alibi(SLOPES),
    "relative_position_bias": mods.relative_position_bias(np.ones((8, 65), np.float32)),
    "distance_decay": mods.distance_decay(SLOPES),
    "tanh_softcap": mods.tanh_softcap(30.0),
    "soft_clipping": mods.soft_clipping(30.0),
}
MASKS = {
    "document_mask": mods.document_mask(np.zeros(64, np.int32)),
    "prefix_lm": mods.prefix_lm(100),
    "sliding_window": mods.sliding_window(128),
    "dilated_window": mods.dilated_window(8, 4),
}


def resources(score: Any, mask: Any, real: str, arch: str, folder: Path) -> Resources:
    dtype = {"float": np.float32, "double": np.float64}[real]
    score = trace_score_mod(score, dtype).expression if score else None
    mask = trace_mask_mod(mask).expression if mask else None
    binary = compile_cubin(source_with(score, mask, real), arch, Cache(folder))
    assert binary.notices == ()
    return binary.resources["apply_mods"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gallery_in_registers(arch: str, tmp_path: Path) -> None:
    """All of it in one kernel, each function for another head."""

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = score
        for i, function in enumerate(gallery):
            result = np.where(h == i, function(score, b, h, q_idx, kv_idx), result)
        return result

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = b == 0
        for function in masks:
            result = result & function(b, h, q_idx, kv_idx)
        return result

    gallery, masks = tuple(SCORES.values()), tuple(MASKS.values())
    for real in ("float", "double"):
        found = resources(score_mod, mask_mod, real, arch, tmp_path)
        assert found.stack_bytes == found.spill_stores == found.spill_loads == 0


def test_products_are_not_fused(tmp_path: Path) -> None:
    opcodes = resources(mods.alibi(SLOPES), None, "float", "sm_90", tmp_path).opcodes
    assert opcodes.get("FMUL") == 1
    assert opcodes.get("FADD") == 1
    assert opcodes.get("FFMA", 0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCORES, *MASKS])
def test_no_function_of_the_gallery_needs_double_precision(name: str, tmp_path: Path) -> None:
    """Which is slow on most GPUs."""
    opcodes = resources(SCORES.get(name), MASKS.get(name), "float", "sm_90", tmp_path).opcodes
    assert not {"DMUL", "DADD", "DFMA"} & opcodes.keys()


# --- in the kernels that apply them ----------------------------------------------------------------------

BAND = Features(has_lower=True, has_upper=True, scale_first=True)


def mods_of(score: str | None, mask: str | None) -> Mods:
    return Mods(
        score and trace_score_mod(SCORES[score]).expression,
        mask and trace_mask_mod(MASKS[mask]).expression,
    )


def forward_specs(arch: str, mods: Mods, dims: Sequence[tuple[int, int]]) -> Iterator[FwdSpec]:
    """For each head dims what is chosen for long sequences, in which heads share a tile."""
    device = device_of(arch)
    rows = Rows(128, True)
    for head_dim, head_dim_v in dims:
        yield choose_spec(Selector("float16", head_dim, head_dim_v, replace(BAND, mods=mods), rows, rows), device)


def pairs() -> Iterator[Pair]:
    """Each function where registers are short, on one GPU; those that take most of them with each kernel on each."""
    for arch in ARCHITECTURES:
        most = mods_of("relative_position_bias", "document_mask")
        specs: list[KernelSpec] = [
            *forward_specs(arch, most, [(64, 64), (160, 160), (256, 256)]),
            FwdSpec("fwd_simt", "float32", 256, 128, simt_tile(128), replace(BAND, scale_first=False, mods=most)),
            WeightsSpec("float32", "biased", Features(True, True, mods=most)),
            ModSummarySpec(mods_of(None, "document_mask")),
        ]
        yield from (Pair(spec, arch_for(spec, device_of(arch))) for spec in specs)
    for score, mask in [*((name, None) for name in SCORES), *((None, name) for name in MASKS)]:
        yield from (Pair(spec, "sm_100") for spec in forward_specs("sm_100", mods_of(score, mask), [(256, 256)]))


def simt_tile(head_dim_v: int) -> TileConfig:
    return next(row.tiles[0] for row in TILES if row.family == "fwd_simt" and row.head_dim_v == head_dim_v)


PAIRS = list(pairs())


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_kernels_with_mods_need_registers_alone(pair: Pair, tmp_path: Path) -> None:
    assert faults_of(pair, tmp_path) == []


def test_each_kernel_that_applies_mods_is_compiled_for_each_architecture() -> None:
    expected = set(itertools.product(("fwd_simt", "weights", "mod_summary"), ARCHITECTURES))
    expected |= {("fwd_sm90" if arch == "sm_90" else "fwd_sm80", arch) for arch in ARCHITECTURES}
    assert {(pair.spec.family, pair.arch.removesuffix("a")) for pair in PAIRS} == expected
