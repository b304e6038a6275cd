"""From a KernelSpec to its kernel's source: the constants, types and checks that stand before the file."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..plan.device import DeviceSpec
from ..plan.specs import CombineSpec, FwdSpec, KernelSpec, MaskSummarySpec, MergeSpec, Mods, ModSummarySpec, WeightsSpec
from ..plan.tiles import FAMILIES
from ..problem.dtypes import dtype_named
from ..problem.problem import STAGES
from .functor import mods_dtype, render_mods
from .params import (
    FWD_PARAMS,
    MASK,
    MERGE_PARAMS,
    MOD_MARKS,
    MOD_SUMMARY_PARAMS,
    PART,
    SCORE_PARAMS,
    SUMMARY_PARAMS,
    TENSOR,
    layout_checks,
)
from .source import ConfigValue, KernelSource, render

__all__ = ["arch_for", "entry_of", "render_kernel", "structures_of"]

_ELEMENTS = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "float", "float64": "double"}
_STRUCTURES = {
    "Tensor": TENSOR,
    "Mask": MASK,
    "ModMarks": MOD_MARKS,
    "ScoreParams": SCORE_PARAMS,
    "FwdParams": FWD_PARAMS,
    "SummaryParams": SUMMARY_PARAMS,
    "ModSummaryParams": MOD_SUMMARY_PARAMS,
    "Part": PART,
    "MergeParams": MERGE_PARAMS,
}


def entry_of(spec: KernelSpec) -> str:
    """The name of the kernel's entry."""
    return f"flash_{spec.family}"


def arch_for(spec: KernelSpec, device: DeviceSpec) -> str:
    """What the compiler calls the architecture for which it compiles the kernel for that GPU: "sm_90", "sm_90a"."""
    family = FAMILIES.get(spec.family)
    return device.arch if family is None else family.arch_for(device)


def structures_of(spec: KernelSpec) -> tuple[np.dtype[np.void], ...]:
    """What a kernel's parameter blocks hold, but for tensor maps."""
    if isinstance(spec, MaskSummarySpec):
        return (SUMMARY_PARAMS,)
    if isinstance(spec, MergeSpec):
        return (MERGE_PARAMS,)
    if isinstance(spec, CombineSpec):
        return (FWD_PARAMS,)
    mods = spec.mods or Mods()
    first = MOD_SUMMARY_PARAMS if isinstance(spec, ModSummarySpec) else FWD_PARAMS
    return first, mods_dtype(mods.score, mods.mask)


@lru_cache(maxsize=256)
def render_kernel(spec: KernelSpec) -> KernelSource:
    """The kernel's source over the constants of `spec`, with checks that it and build/params.py agree."""
    source = render(f"{spec.family}.cu", _constants(spec), [entry_of(spec)], str(spec), _types(spec))
    checks = "".join(layout_checks(name, dtype) for name, dtype in _STRUCTURES.items())
    return KernelSource(source.name, source.text + checks, source.entries)


def _types(spec: KernelSpec) -> str:
    """ScoreMod, MaskMod and ModArgs, for the kernels that apply mods."""
    if not isinstance(spec, FwdSpec | WeightsSpec | ModSummarySpec):
        return ""
    mods = spec.mods or Mods()
    return f'#include "mods.cuh"\n{render_mods(mods.score, mods.mask)}'


def _constants(spec: KernelSpec) -> dict[str, ConfigValue]:
    if isinstance(spec, MaskSummarySpec | ModSummarySpec):
        return {"kTilesPerBlock": spec.tiles_per_block}
    if isinstance(spec, MergeSpec):
        elements = {"Element": _ELEMENTS[spec.dtype], "OutElement": _ELEMENTS[spec.out_dtype]}
        return elements | {"kRowsPerBlock": spec.rows_per_block}
    if isinstance(spec, CombineSpec):
        return {"Element": _ELEMENTS[spec.dtype], "kNumThreads": spec.num_threads, "kRowsPerBlock": spec.rows_per_block}
    features = spec.features
    constants: dict[str, ConfigValue] = {
        "Element": _ELEMENTS[spec.dtype],
        "kBlockM": spec.tile.block_m,
        "kBlockN": spec.tile.block_n,
        "kNumWarps": spec.tile.num_warps,
        "kSharedBytes": spec.shared_bytes,
        "kHasLower": features.has_lower,
        "kHasUpper": features.has_upper,
        "FloatMask": _ELEMENTS[features.float_mask] if features.float_mask else "NoMask",
        "kHasBoolMask": features.bool_mask,
        "kChangesScores": features.changed,
        "kDropout": features.dropout,
    }
    if isinstance(spec, WeightsSpec):
        dtype = dtype_named(spec.dtype)
        written = spec.dtype if spec.stage == "softmax" else dtype.accumulator.name
        stage = STAGES.index(spec.stage)
        return constants | {"Written": _ELEMENTS[written], "kStage": stage, "kPacked": False}
    return constants | {
        "kBaseline": spec.baseline,
        "kHeadDim": spec.head_dim,
        "kHeadDimV": spec.head_dim_v,
        "kQInRegisters": spec.tile.q_in_registers,
        "kStages": spec.tile.stages,
        "kPingPong": spec.tile.ping_pong,
        "kExp2ByFma": spec.tile.exp2_by_fma,
        "kScaleFirst": features.scale_first,
        "kPacked": spec.packed,
    }
