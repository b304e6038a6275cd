"""The problems of this file reach every line of score.cuh: with one of them made wrong, something is found.

What the right kernels give is compared with `math` all over tests/ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cupyflash.backends.emulator import EmulatorError, Module, guarded_copy
from cupyflash.build.launch import launches
from cupyflash.build.modding import trace_mods
from cupyflash.build.operands import prepare
from cupyflash.build.rendering import entry_of, render_kernel
from cupyflash.build.source import KernelSource
from cupyflash.plan.choose import choose
from cupyflash.plan.device import EMULATOR
from cupyflash.plan.specs import FwdSpec
from cupyflash.problem.normalize import normalize
from cupyflash.testing import MaskSpec, SinkSpec
from tests.cases import heads
from tests.kernels import simt

pytestmark = pytest.mark.usefixtures("cxx")

SEQLEN_Q, SEQLEN_K = 140, 90  # tiles that are not full, and more than one


def everything(dtype: str) -> dict[str, Any]:
    """All that changes scores and weights, at once; of the bool mask the first tile removes nothing."""
    arguments = heads(
        2,
        3,
        SEQLEN_Q,
        SEQLEN_K,
        8,
        dtype=dtype,
        masks=(MaskSpec("float32", (2, 1, 1, SEQLEN_K)), MaskSpec("bool", (3, SEQLEN_Q, SEQLEN_K))),
        align=11,
        softcap=2.0,
        alibi_shape=(2, 3),
        sinks=SinkSpec(dtype),
        dropout_p=0.3,
        seed=5,
    ).arguments()
    arguments["attn_mask"][1][:, :128, :64] = True
    return arguments


def with_infinities(dtype: str) -> dict[str, Any]:
    """A key of NaN that the float mask removes, a query whose scores are all -inf, and no softcap."""
    arguments = everything(dtype) | {"softcap": 0.0}
    arguments["key"][...] = -abs(arguments["key"])
    arguments["query"][:, :, 3] = np.inf
    arguments["key"][:, :, 7] = np.nan
    arguments["attn_mask"][0][..., 7] = -np.inf
    return arguments


def with_infinite_scores_capped(dtype: str) -> dict[str, Any]:
    return with_infinities(dtype) | {"softcap": 2.0}


def with_seed_in_memory(dtype: str) -> dict[str, Any]:
    return everything(dtype) | {"seed": np.array([2**63 + 5], np.uint64)}


def with_sinks_of_float32(dtype: str) -> dict[str, Any]:
    arguments = everything(dtype) | {"alibi_slopes": None}
    arguments["sinks"] = np.arange(3, dtype=np.float32)
    return arguments


BIAS = np.random.default_rng(2).standard_normal((2, 3, SEQLEN_Q, SEQLEN_K)).astype(np.float32)


def with_mods(dtype: str) -> dict[str, Any]:
    """Both read an array by every coordinate; the first head alone has tiles that are whole or empty.

    A key that score_mod removes stays removed under softcap and a mask of NaN.
    """
    keep = np.random.default_rng(3).random(BIAS.shape) < 0.7
    keep[0, 0, :128, :64], keep[0, 0, :128, 64:], keep[0, 0, 128:, :64] = True, False, True
    bias = np.where(np.arange(SEQLEN_K) == 9, -np.inf, BIAS).astype(np.float32)
    arguments = everything(dtype)
    arguments["attn_mask"][0][..., 9] = np.nan
    return arguments | {
        "score_mod": lambda score, b, h, q_idx, kv_idx: score + bias[b, h, q_idx, kv_idx],
        "mask_mod": lambda b, h, q_idx, kv_idx: keep[b, h, q_idx, kv_idx],
    }


PROBLEMS = (everything, with_infinities, with_infinite_scores_capped, with_seed_in_memory, with_sinks_of_float32)

WRONG = [
    ("const bool exists = key < params.seqlen_k;", "const bool exists = true;"),
    ("at_most(row_query, params.seqlen_q - 1)", "row_query"),
    ("removed = removed || bias == minus_infinity;", ""),
    ("score += bias;", ""),
    ("params.scores.softcap != 0.0 &&", ""),
    ("return softcap * hyperbolic_tangent(score / softcap);", ""),
    ("position = query + scores.shift;", "position = query;"),
    ("batch * scores.alibi_batch_stride + head", "head"),
    ("key < position ? position - key : key - position", "position - key"),
    ("isa::ldg_1(bool_mask + key * scores.bool_mask.column_stride) == 0", "false"),
    ("batch % params.batch_shape[axis] * mask.batch_strides[axis]", "0"),
    ("head * mask.head_stride", "0"),
    ("row * mask.row_stride", "0"),
    ("work.row_begin / Config::kBlockM;", "0;"),
    ("of(tile) == 0", "of(tile) != 2"),
    ("if (scores.sinks != nullptr && !is_part)", "if (false)"),
    ("end.factor *= static_cast<Real>(scores.dropout_scale);", ""),
    ("if (scores.seed_data == nullptr) return", "return"),
]
# Lines for mods: of the kernel that has them.
WRONG_WITH_MODS = [
    ("score = capped(modded(score, key));", "score = capped(score);"),
    (
        "Coord{batch, head, query, key}, mods);\n  }\n\n  // softcap",
        "Coord{0, head, query, key}, mods);\n  }\n\n  // softcap",
    ),
    ("removed = score == minus_infinity;", ""),
    ("work.batch * scores.mod_marks.batch_stride", "0"),
    ("group * scores.mod_marks.group_stride", "0"),
    ("tile_row * scores.mod_marks.row_stride", "0"),
    ("work.head / FwdWork::heads_per_tile<Config>(params)", "0"),
    ("mark = mod_mark < mark ? mod_mark : mark;", "mark = mod_mark;"),
    ("const u32 mod_mark = mod_marks == nullptr ? 1 : isa::ldg_1(mod_marks + tile);", "const u32 mod_mark = 2;"),
]
WRONG_WITH_MODS_OF = {
    "fwd_sm80": [
        ("if (!MaskMod::apply(at, mods)) removed |= 1u << i;", ""),
        ("if (bits >> (4 * n + i) & 1)", "if (bits >> n & 1)"),
        ("FwdWork::query_of<Config>(params, row),\n                        first_key", "row_begin,\n first_key"),
    ],
    "fwd_simt": [("return MaskMod::apply(Coord{batch, head, query, key}, mods);", "return true;")],
}
# Lines for one family.
WRONG_OF = {
    "fwd_sm80": [
        ("are_float ? Element", "true ? Element"),
        ("drawn.words[i] < scores.dropout_threshold", "drawn.words[i] > scores.dropout_threshold"),
        ("work.batch) * params.num_heads_q + work.head", "work.head)"),
    ],
    "fwd_simt": [
        ("if (!dropout_keep(seed, head, query, key, params.scores.dropout_threshold)) s_frag", "if (false) s_frag"),
        ("work.batch) * params.num_heads_q + work.template head_of", "0) + work.template head_of"),
    ],
}
FAMILIES = {"fwd_sm80": "float16", "fwd_simt": "float32"}


@functools.cache
def problem_of(make: Callable[[str], dict[str, Any]], dtype: str) -> tuple[FwdSpec, Callable[[Module], bytes]]:
    """The kernel that is planned for it, and how to run it with another; masks, slopes and sinks are guarded."""
    arguments = make(dtype) | {"return_lse": True}
    arguments["attn_mask"] = tuple(guarded_copy(mask, f"mask {i}") for i, mask in enumerate(arguments["attn_mask"]))
    for name in ("alibi_slopes", "sinks"):
        if arguments[name] is not None:
            arguments[name] = guarded_copy(arguments[name], name)
    problem, buffers = normalize(**arguments)
    mods = trace_mods(problem, buffers)
    plan = choose(problem, EMULATOR, mods and mods.structure)

    def run(kernel: Module) -> bytes:
        operands = prepare(problem, plan, buffers, lambda array: array.ctypes.data, mods)
        buffers.out[...] = buffers.lse[...] = np.nan
        for launch, args in launches(problem, plan, operands):
            compiled = kernel if isinstance(launch.spec, FwdSpec) else simt.module(launch.spec)
            function = compiled.get_function(entry_of(launch.spec))
            function(launch.grid, launch.block, args, shared_mem=launch.shared_bytes)
        return buffers.out.tobytes() + buffers.lse.tobytes()

    (spec,) = [launch.spec for launch in plan.launches if isinstance(launch.spec, FwdSpec)]
    return spec, run


@functools.cache
def right_results(dtype: str, problems: tuple[Any, ...]) -> list[bytes]:
    return [run(simt.module(spec)) for spec, run in (problem_of(make, dtype) for make in problems)]


@pytest.mark.parametrize(
    ("family", "code", "wrong"), [(name, *line) for name in FAMILIES for line in (*WRONG, *WRONG_OF[name])]
)
def test_problems_reach_every_line(family: str, code: str, wrong: str) -> None:
    assert_caught(family, code, wrong, PROBLEMS)


@pytest.mark.parametrize(
    ("family", "code", "wrong"),
    [(name, *line) for name in FAMILIES for line in (*WRONG_WITH_MODS, *WRONG_WITH_MODS_OF[name])],
)
def test_mods_reach_every_line_of_theirs(family: str, code: str, wrong: str) -> None:
    assert_caught(family, code, wrong, (with_mods,))


def assert_caught(family: str, code: str, wrong: str, problems: tuple[Any, ...]) -> None:
    dtype = FAMILIES[family]
    (spec,) = {problem_of(make, dtype)[0] for make in problems}
    assert spec.family == family
    source = render_kernel(spec)
    assert source.text.count(code) == 1
    kernel = Module(KernelSource("wrong", source.text.replace(code, wrong), source.entries))
    try:
        found = [problem_of(make, dtype)[1](kernel) for make in problems]
    except EmulatorError:
        return
    assert found != right_results(dtype, problems), "nothing is wrong with the kernel"
