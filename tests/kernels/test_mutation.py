"""No synchronisation of a kernel is for show, and none of the emulator's checks sleeps.

Every statement that only orders something is deleted in turn, and every wait for copies made one copy too short.
Each of these kernels must be caught: by a report of the emulator, or by a result that is not the right one's bits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from cupyflash import mods
from cupyflash.backends.emulator import EmulatorError, Module, Options
from cupyflash.build.mask_summary import summarize_mask
from cupyflash.build.merging import merge_parts
from cupyflash.build.params import Block
from cupyflash.build.rendering import render_kernel
from cupyflash.build.source import KernelSource, kernels_folder, read_kernel
from cupyflash.plan.specs import CombineSpec, Launch, MaskSummarySpec, MergeSpec
from cupyflash.problem.parts import check_parts
from cupyflash.testing import Case
from tests.cases import heads
from tests.kernels import forward, simt, test_combine, weights
from tests.kernels.harness import source_of
from tests.kernels.mutation import SYNCHRONISATION, Exemption, Mutant, assert_exemptions_hold, exempt, mutants
from tests.kernels.test_mod_summary import summarized, summary_of

DOCUMENT_MASK = mods.document_mask(np.arange(400) // 90)

# A sign of trouble is enough, so the kinds of runs come in the order in which they find most; the last three are those
# that find what late landing and the race detector themselves might hide.
HOSTILE = [
    Options(),
    *(Options(schedule="random", seed=seed) for seed in range(3)),
    *(Options(schedule="priority", seed=seed) for seed in range(3)),
    Options(schedule="random", seed=3, late_landing=False),
    Options(schedule="priority", seed=2, late_landing=False),
    Options(schedule="priority", seed=4, race_detector=False),
]

# Mutants that nothing can catch because nothing is wrong with them. None so far.
EXEMPTIONS: list[Exemption] = []


@dataclass(frozen=True)
class Subject:
    """A kernel file in one configuration, and the problems that reach all of it.

    ``problems`` each run a compiled kernel and return all it wrote, as bytes.  ``left_out`` are lines of code that are
    compiled away in this configuration; another subject has them.
    """

    source: KernelSource
    problems: Sequence[Callable[[Module, Options], bytes]]
    left_out: tuple[str, ...] = ()


def forward_problem(spec, seqlen_q, seqlen_k, lower=0, upper=0, heads=(2, 1), **keywords):
    """Seeded operands once, so that all mutants get the same."""
    rng = np.random.default_rng(seqlen_q * 1000 + seqlen_k)
    shapes = [(1, heads[0], seqlen_q, spec.head_dim), *[(1, heads[1], seqlen_k, spec.head_dim)] * 2]
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)

    def run(module: Module, options: Options) -> bytes:
        kernel = module.get_function(spec.entry)
        out, lse, _ = forward.forward(
            spec, q, k, v, kernel=kernel, options=options, lower=lower, upper=upper, **keywords
        )
        return out.tobytes() + lse.tobytes()

    return run


def combine_problem(seed):
    outs, lses = test_combine.parts("float32", 3 + seed, seed=seed)

    def run(module: Module, options: Options) -> bytes:
        kernel = module.get_function("flash_combine")
        out, lse = test_combine.combine("float32", outs, lses, kernel=kernel, options=options)
        return out.tobytes() + lse.tobytes()

    return run


def simt_arguments(seqlen_q, seqlen_k, lower, upper):
    return heads(1, 2, seqlen_q, seqlen_k, 40, dtype="float32", window=(-lower, upper), align=0).arguments()


def simt_problem(given, **how):
    def run(module: Module, options: Options) -> bytes:
        out, lse, _ = simt.run(given, kernel=module, options=options, **how)
        return out.tobytes() + lse.tobytes()

    return run


def summary_problem(shape, block_m, block_n):
    """Stretches of elements that make tiles of all three kinds."""
    mask = np.arange(np.prod(shape)).reshape(shape) // 2500 % 3 != 0

    def run(module: Module, options: Options) -> bytes:
        array, launch, params = summarize_mask(mask, block_m, block_n, np, lambda array: array.ctypes.data)
        array[...] = 0xEE
        kernel = module.get_function("flash_mask_summary")
        kernel(launch.grid, launch.block, (params,), shared_mem=launch.shared_bytes, options=options)
        return array.tobytes()

    return run


def mod_summary_problem(lengths, block, pack):
    """Documents whose ends make tiles of all three kinds."""

    def run(module: Module, options: Options) -> bytes:
        function = module.get_function("flash_mod_summary")
        return summary_of(DOCUMENT_MASK, lengths, block, pack, function=function, options=options).tobytes()

    return run


def merge_problem(dtype, num_parts, shape):
    """Parts of one float type, the last of them dead."""
    rng = np.random.default_rng(num_parts)
    outs, lses = rng.standard_normal((num_parts, *shape)).astype(dtype), rng.standard_normal((num_parts, *shape[:-1]))
    lses[-1] = -np.inf
    lses[:, ..., 0] = -np.inf
    parts = check_parts(list(outs.swapaxes(1, 2)), list(lses.astype(np.float32).swapaxes(1, 2)))

    def run(module: Module, options: Options) -> bytes:
        kernel = module.get_function("flash_merge")

        def launch_it(launch: Launch, args: tuple[Block, ...]) -> None:
            kernel(launch.grid, launch.block, args, shared_mem=launch.shared_bytes, options=options)

        joined = merge_parts(parts, lambda array: array.ctypes.data, launch_it)
        return b"".join(array.tobytes() for array in joined)

    return run


def weights_problem(given, **how):
    def run(module: Module, options: Options) -> bytes:
        return weights.run(given, kernel=module, options=options, **how)[0].tobytes()

    return run


# Two panels of Q and K; the keys that the window leaves a tile of queries end with its last tile or before it.
WEIGHTS = heads(1, 2, 70, 330, 40, dtype="float32", window=(40, 60), softcap=3.0, dropout_p=0.3, seed=1).arguments()
WEIGHTS |= {"stage": "dropout", "attn_mask": np.where(np.arange(330) < 20, -np.inf, 0).astype(np.float32)}
# The log-sum-exps are coarse, so that a walk over the keys comes first.
COARSE_WEIGHTS = WEIGHTS | {"attn_mask": np.full(330, -(2.0**20), np.float32)}
# Two panels of Q and K, the second one in part, and a head of keys for two of queries.
SIMT_PACKED_SPLIT = Case(
    query_shape=(1, 4, 20, 40),
    key_shape=(1, 2, 170, 40),
    value_shape=(1, 2, 170, 72),
    enable_gqa=True,
    window=(150, 100),
).arguments()
# The same with a score_mod and a mask_mod, which leaves out whole tiles of keys.
MODDED = heads(1, 2, 70, 330, 40, dtype="float32", score_mod="look_up").arguments() | {"mask_mod": DOCUMENT_MASK}
# Both ends of the band: masked tiles on the left, whole ones, masked ones on the right.
BAND = forward.Spec(has_lower=True, has_upper=True)
# Q stays in shared memory; with splits the last step of one block is not the last of the keys.
PACKED_SPLIT = forward.Spec(head_dim=32, block_n=32, has_upper=True, q_in_registers=False, packed=True)
SM75 = forward.Spec(has_upper=True, baseline=75)
# Rings of two small tiles. Rows of several heads are copied by the warpgroup that multiplies them, others by maps.
HOPPER = forward.Spec(
    num_warps=8, block_n=32, q_in_registers=False, baseline=90, stages=2, has_lower=True, has_upper=True
)
HOPPER_PACKED = replace(HOPPER, has_lower=False, has_upper=False, packed=True, ping_pong=True)
Q_ARRIVED = (
    "if constexpr (Traits::kAsync && Config::kQInRegisters) isa::cp_async_commit();  // else with K",
    "if constexpr (Traits::kAsync) isa::cp_async_wait<1>();  // all but K",
    "isa::sync_threads();                                    // Q has arrived, every thread's part of it",
)
TURNS = (
    "if constexpr (Traits::kPingPong) isa::barrier_sync(4 + consumer, 256);",
    "if constexpr (Traits::kPingPong) isa::barrier_arrive(4 + (consumer + 1) % Traits::kConsumers, 256);",
)
SKIPS = (
    "isa::mbarrier_wait(SharedStorage::k_full(stage.index), stage.parity);  // skipped",
    "isa::mbarrier_wait(SharedStorage::v_full(stage.index), stage.parity);  // skipped",
    "isa::barrier_sync(1 + consumer, 128);                                  // skipped",
)
OUT_BY_ROWS = ("isa::sync_warp();  // the warp's other lanes have written what this one reads",)
Q_BY_ROWS = (
    "isa::cp_async_commit();",
    "isa::cp_async_wait<0>();",
    "isa::fence_proxy_async();              // what this thread has written, to be read by wgmma,",
    "isa::barrier_sync(1 + consumer, 128);  // and what the warpgroup's others have",
)
Q_AND_OUT_BY_MAPS = (
    "isa::mbarrier_wait(SharedStorage::q_empty(consumer), parity);",
    "isa::mbarrier_arrive_expect_tx(full, Traits::QTile::kBytes);",
    "if (isa::elect_one()) isa::mbarrier_arrive(SharedStorage::q_empty(consumer));  // this warp's O has left",
    "isa::mbarrier_wait(SharedStorage::q_full(consumer), q_parity);",
    "isa::mbarrier_init(SharedStorage::q_full(consumer), 1);",
    "isa::mbarrier_init(SharedStorage::q_empty(consumer), 4);  // its warps",
    "isa::fence_proxy_async();  // what this lane has written, to be read by a bulk copy,",
    "isa::sync_warp();          // and what the warp's others have",
    "isa::bulk_commit();",
    "isa::bulk_wait_read<0>();  // others write there again, or shared memory ends with the block",
)
SUBJECTS = {
    "fwd_sm80.cu": Subject(
        forward.source(BAND),
        [
            forward_problem(BAND, 64, 200, lower=-200, upper=0),  # one masked tile
            forward_problem(BAND, 130, 200, lower=-70, upper=60),  # several tiles of both kinds, tails in both lengths
            forward_problem(BAND, 70, 330, lower=-10, upper=300),  # five tiles, three of them whole
        ],
    ),
    "fwd_simt.cu": Subject(
        render_kernel(simt.forward_spec(simt_arguments(1, 1, 0, 0))),
        [
            simt_problem(simt_arguments(64, 200, -200, 0)),
            simt_problem(simt_arguments(70, 330, -10, 300)),
        ],
    ),
    "fwd_simt.cu, mods": Subject(render_kernel(simt.forward_spec(MODDED)), [simt_problem(MODDED)]),
    "fwd_simt.cu, packed, split": Subject(
        render_kernel(simt.forward_spec(SIMT_PACKED_SPLIT, pack=2, splits=2)),
        [simt_problem(SIMT_PACKED_SPLIT, pack=2, splits=2)],
    ),
    "weights.cu": Subject(
        render_kernel(weights.weights_spec(WEIGHTS)),
        [
            weights_problem(WEIGHTS),
            weights_problem(WEIGHTS, parts=4),
            weights_problem(COARSE_WEIGHTS),
            weights_problem(COARSE_WEIGHTS, parts=4),
        ],
    ),
    "combine.cu": Subject(render_kernel(CombineSpec("float32")), [combine_problem(0), combine_problem(40)]),
    "fwd_sm80.cu, packed, split": Subject(
        forward.source(PACKED_SPLIT),
        [
            forward_problem(PACKED_SPLIT, 5, 40, upper=20, heads=(4, 1), num_splits=2),
            forward_problem(PACKED_SPLIT, 50, 260, upper=150, heads=(3, 1), num_splits=2),
        ],
        (*Q_ARRIVED, *OUT_BY_ROWS),
    ),
    "fwd_sm80.cu, sm_75": Subject(
        forward.source(SM75), [forward_problem(SM75, 64, 100, upper=0), forward_problem(SM75, 70, 260, upper=200)]
    ),
    "fwd_sm90.cu": Subject(
        forward.source(HOPPER),
        [
            forward_problem(HOPPER, 64, 40, lower=-200, upper=0),
            forward_problem(HOPPER, 130, 140, lower=-70, upper=60),  # several tiles of all kinds
            forward_problem(HOPPER, 130, 140, lower=-70, upper=40, blocks=1),  # one item after another
            forward_problem(HOPPER, 140, 40, lower=-200, upper=-130, heads=(4, 1), blocks=2),  # some without keys
            forward_problem(HOPPER, 128, 80, lower=-200, upper=-48),  # a warpgroup takes half a tile alone,
            forward_problem(HOPPER, 128, 80, lower=-200, upper=0, heads=(4, 1), blocks=1),  # skips one and takes two,
            forward_problem(HOPPER, 128, 80, lower=-200, upper=-70, heads=(2, 1), blocks=1),  # skips all
        ],
        (*Q_BY_ROWS, *OUT_BY_ROWS, *TURNS),
    ),
    "fwd_sm90.cu, packed": Subject(
        forward.source(HOPPER_PACKED),
        [
            forward_problem(HOPPER_PACKED, 50, 100, heads=(2, 1)),
        ],
        (*Q_AND_OUT_BY_MAPS, *SKIPS),
    ),
    "merge.cu": Subject(
        render_kernel(MergeSpec("float16", "float16")),
        [merge_problem(np.float16, 3, (2, 5, 300)), merge_problem(np.float16, 5, (2, 3, 7))],
    ),
    "mask_summary.cu": Subject(
        render_kernel(MaskSummarySpec()),
        [summary_problem((2, 3, 70, 100), 16, 32), summary_problem((1, 3, 70, 99), 16, 32)],  # in words; one by one
    ),
    "mod_summary.cu": Subject(
        render_kernel(summarized(DOCUMENT_MASK, (2, 4, 70, 200))[0].launch.spec),
        [mod_summary_problem((2, 4, 70, 200), (64, 64), 1), mod_summary_problem((1, 4, 20, 99), (16, 32), 2)],
    ),
}


def mutants_of(name: str) -> list[Mutant]:
    subject = SUBJECTS[name]
    found = mutants(subject.source)
    assert {mutant.code for mutant in found} >= set(subject.left_out)
    without_async = "kBaseline = 75" in subject.source.text
    return [
        mutant
        for mutant in found
        if mutant.code not in subject.left_out and not (without_async and "cp_async" in mutant.change)
    ]


ALL = [(name, mutant) for name in SUBJECTS for mutant in mutants_of(name)]


@pytest.fixture(autouse=True)
def new_memory_is_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No new array holds what a kernel should have written, left there by the run before."""
    empty = np.empty

    def dirty(*args: Any, **keywords: Any) -> np.ndarray:
        array = empty(*args, **keywords)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(np, "empty", dirty)


def finding(subject: Subject, module: Module) -> str | None:
    """What the first run that finds something finds."""
    for options in HOSTILE:
        for number, problem in enumerate(subject.problems):
            try:
                result = problem(module, options)
            except (EmulatorError, AssertionError) as error:
                return str(error)
            if result != right_result(subject.source, number):
                return f"problem {number}: wrong result under {options}"
    return None


@functools.cache
def right_result(source: KernelSource, number: int) -> bytes:
    subject = next(subject for subject in SUBJECTS.values() if subject.source == source)
    return subject.problems[number](Module(source), Options())


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize(("file", "mutant"), ALL, ids=[f"{name}-{mutant}" for name, mutant in ALL])
def test_mutant_is_caught(file: str, mutant: Mutant) -> None:
    found = finding(SUBJECTS[file], Module(mutant.source))
    if exempt(mutant, EXEMPTIONS):
        assert found is None, f"{mutant} is exempt, and yet: {found}"
    else:
        assert found is not None, f"nothing is wrong with the kernel after: {mutant}\n    {mutant.code}"


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("file", SUBJECTS)
def test_the_kernel_itself_passes(file: str) -> None:
    assert finding(SUBJECTS[file], Module(SUBJECTS[file].source)) is None


def test_every_kernel_is_a_subject() -> None:
    files = {name.split(",")[0] for name in SUBJECTS}
    assert sorted(files) == sorted(path.name for path in kernels_folder().glob("*.cu"))


def test_exemptions() -> None:
    assert_exemptions_hold([mutant for _, mutant in ALL], EXEMPTIONS)


def test_no_synchronisation_of_the_isa_is_forgotten() -> None:
    """A function that returns nothing moves data, orders something or saves time; a new one must be put on a side."""
    moves_data = re.compile(
        r"stg_\d+|st_shared_\d+|cp_async_16|(?:ld|st)matrix_\w+|mma_\w+|bulk_(?:load|store)|wgmma_[sr]s"
    )
    # Without them the result is the same, only later.
    hastens = re.compile(r"prefetch_\w+|nanosleep|setmaxnreg_\w+")
    for header in ("isa_sm80.cuh", "isa_sm90.cuh", "isa_sm90a.cuh"):
        names = set(re.findall(r"\b__forceinline__ void (\w+)\(", read_kernel(header)))
        assert names
        for name in sorted(names):
            sides = [bool(pattern.fullmatch(name)) for pattern in (SYNCHRONISATION, moves_data, hastens)]
            assert sum(sides) == 1, f"{header}: is {name} a synchronisation, or does it move data, or save time?"


def test_every_synchronisation_of_the_kernel_is_found() -> None:
    """Counted another way: words in the files, not statements in the flattened text."""
    used = {mutant.file for _, mutant in ALL}
    word = re.compile(rf"isa::(?:{SYNCHRONISATION.pattern})\b")
    for path in sorted(kernels_folder().glob("*.cu*")):
        lines = [line.split("//")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        count = sum(len(word.findall(line)) for line in lines)
        assert count == len({m.line for _, m in ALL if m.file == path.name}), path.name
        assert (path.name in used) == (count > 0)


# ------------------------------------------------------------------------------------------------------------
# The mutator itself

KERNEL = r"""
#include "isa.cuh"
extern "C" __global__ void exchange(u32* out, int turn) {  // isa::sync_threads(); in a comment is none
  const u32 mine = isa::shared_base() + 4 * isa::thread_index();
  const u32 other = isa::shared_base() + 4 * (isa::thread_index() ^ 32);
  isa::st_shared_4(mine, 7 + isa::thread_index());
  if (turn == 0)
    isa::barrier_sync(1 + (turn % 2),
                      64);  // spread over lines
  else
    isa::sync_threads(); /* isa::sync_warp(); */
  isa::stg_4(out + isa::thread_index(), isa::ld_shared_4(other));
}
"""


def exchanged(source: KernelSource, turn: int) -> np.ndarray:
    out = np.zeros(64, np.uint32)
    Module(source).get_function("exchange")((1,), (64,), (out, np.int32(turn)), shared_mem=256)
    return out


@pytest.mark.usefixtures("cxx")
def test_planted_statements_are_found_and_only_they() -> None:
    original = source_of(KERNEL)
    found = mutants(original)
    assert [(m.file, m.line, m.change) for m in found] == [
        ("test.cu", 8, "delete barrier_sync"),
        ("test.cu", 11, "delete sync_threads"),
    ]
    assert found[0].code == "isa::barrier_sync(1 + (turn % 2),"
    for mutant in found:
        assert mutant.source.text.count("\n") == original.text.count("\n")
    for turn, broken in enumerate(found):
        expected = 7 + (np.arange(64) ^ 32)
        np.testing.assert_array_equal(exchanged(original, turn), expected)
        np.testing.assert_array_equal(exchanged(broken.source, 1 - turn), expected)
        with pytest.raises(EmulatorError, match="shared-memory race") as report:
            exchanged(broken.source, turn)
        assert set(re.findall(r"test\.cu:(\d+)", str(report.value))) == {"6", "12"}, "the lines keep their numbers"


def test_waits_are_weakened_by_one() -> None:
    text = '#include "isa.cuh"\nextern "C" __global__ void wait() {\n  isa::cp_async_wait<2>();\n}\n'
    deleted, weakened = mutants(source_of(text))
    assert (deleted.change, weakened.change) == ("delete cp_async_wait", "weaken cp_async_wait<2>")
    assert "  ;\n}" in deleted.source.text
    assert "isa::cp_async_wait<(2) + 1>();" in weakened.source.text


@pytest.mark.parametrize("code", ["bool b = x && isa::barrier_sync(1, 64);", "f(isa::barrier_sync(1, 64));"])
def test_what_cannot_be_deleted_is_refused(code: str) -> None:
    text = f'#include "isa.cuh"\nextern "C" __global__ void refused() {{\n  {code}\n}}\n'
    with pytest.raises(ValueError, match=r"test\.cu:3: isa::barrier_sync is not a statement of its own"):
        mutants(source_of(text))


def test_bad_exemptions_are_refused() -> None:
    _, mutant = ALL[0]
    good = Exemption(mutant.file, mutant.code, mutant.change, "the next barrier orders the same")
    many = [Mutant("x.cu", n, f"line {n}", "delete sync_warp", mutant.source) for n in range(11)]
    assert_exemptions_hold([mutant, *many], [good])
    assert exempt(mutant, [good])
    assert not exempt(many[0], [good])
    with pytest.raises(AssertionError, match="names 0 mutants"):
        assert_exemptions_hold(many, [good])
    with pytest.raises(AssertionError, match="does not say why"):
        assert_exemptions_hold([mutant, *many], [Exemption(mutant.file, mutant.code, mutant.change, "harmless")])
    with pytest.raises(AssertionError, match="1 of 10 mutants are exempt"):
        assert_exemptions_hold([mutant, *many[:9]], [good])


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize(
    ("file", "code", "wrong"),
    [
        ("fwd_sm80.cu", "tiles.full_begin <= tile && tile < tiles.full_end", "true"),
        ("fwd_sm80.cu", "copy_k((step + 1) % 2, next);", ";"),
        ("fwd_sm80.cu", "exists ? panel_bytes[panel] : 0", "panel_bytes[panel]"),
        ("fwd_sm80.cu", "row_begin + row < num_rows && chunk < whole_chunks", "chunk < whole_chunks"),
        ("fwd_sm80.cu", "lane % 4 == 0 && row < FwdWork::num_rows<Config>(params)", "lane % 4 == 0"),
        ("fwd_sm80.cu, packed, split", "if (row >= FwdWork::num_rows<Config>(params)) continue;", ""),
        ("fwd_sm80.cu, packed, split", "tiles.full_begin <= tile && tile < tiles.full_end", "true"),
        ("fwd_sm80.cu, packed, split", "num_heads_q + head + row % pack)", "num_heads_q + head)"),
        ("fwd_sm80.cu, packed, split", "at_most(first + length, end)", "end"),
        ("fwd_sm80.cu, sm_75", "isa::mma_m16n8k8(Element(), acc, a_frag[2], a_frag[3], b1);", ";"),
        ("fwd_sm80.cu, sm_75", "isa::st_shared_16(chunk_smem + place, values[panel]);", ";"),
        (
            "fwd_sm80.cu",
            "scale_log2(static_cast<float>(params.scale) * kLog2E)",
            "scale_log2(static_cast<float>(params.scale))",
        ),
        ("fwd_sm90.cu", "if (!is_full) mask_scores", "if (false) mask_scores"),
        ("fwd_sm90.cu", "walk.is_at_least(tiles.full_end)", "walk.is_at_least(tiles.end)"),
        ("fwd_sm90.cu", "walk.is_at_least(tiles.full_begin)", "!walk.is_over()"),
        (
            "fwd_sm90.cu",
            "stage.parity ^ 1);\n  const u32 full = SharedStorage::k_full",
            "stage.parity);\n  const u32 full = SharedStorage::k_full",
        ),
        ("fwd_sm90.cu", "work.row_begin + 64 * consumer;\n    load_panels", "work.row_begin;\n    load_panels"),
        # What is carried from one item to the next.
        ("fwd_sm90.cu", "if (walk.is_over()) continue;\n", ""),
        ("fwd_sm90.cu", "q_parity ^= 1;\n  }\n}", "}\n}"),
        ("fwd_sm90.cu", "q_parity ^= 1;\n    }\n  }", "}\n  }"),
        ("fwd_sm90.cu", "    state = RowState::start();", ""),
        (
            "fwd_sm90.cu",
            "stage = {static_cast<int>(of_all_lanes(stage.index)), of_all_lanes(stage.parity)};",
            "stage = {};",
        ),
        ("fwd_sm90.cu", "for (int i = 0; i < 4; ++i) o_frag[n][i] = 0.0f;", ""),
        ("fwd_sm90.cu", "give_back(SharedStorage::v_empty(last_stage.index));\n  }\n", "}\n"),
        ("fwd_sm90.cu", "q_empty(consumer), 4)", "q_empty(consumer), 1)"),
        ("fwd_sm90.cu", "grid - 1 - block", "grid - 2 - block"),
        (
            "fwd_sm90.cu, packed",
            "if (consumer == 0) await_turn();",
            "if (consumer == Traits::kConsumers) await_turn();",
        ),
        ("fwd_sm90.cu", "tensor.head_stride != 0 ? head : 0", "0"),
        # What a warpgroup leaves out.
        ("fwd_sm90.cu", "end <= walk.tile * Config::kBlockN;", "end <= (walk.tile + 1) * Config::kBlockN;"),
        ("fwd_sm90.cu", "Config::kBlockN + Traits::kHalfTheKeys;", "Config::kBlockN + Traits::kAllKeys;"),
        ("fwd_sm90.cu", "kv_step<Traits::kHalfTheKeys>", "kv_step<Traits::kAllKeys>"),
        ("fwd_sm90.cu", "return last_step<Traits::kHalfTheKeys>", "return last_step<Traits::kAllKeys>"),
        ("fwd_sm90.cu", "        if (walk.is_over()) return;\n      }", "      }"),
        ("fwd_sm90.cu", "64 * consumer + 63, ", "63, "),
        ("fwd_sm90.cu, packed", "rows.row(at_most(row_begin + row, num_rows - 1))", "rows.row(row_begin + row)"),
        ("fwd_simt.cu", "tiles.full_begin <= tile && tile < tiles.full_end", "true"),
        ("fwd_simt.cu", "if (!is_full) mask_scores(first_key);", ""),
        ("fwd_simt.cu", "row_begin + row < num_rows && column_begin", "column_begin"),
        (
            "fwd_simt.cu",
            "if (row < FwdWork::num_rows<Config>(params))",
            "if (row <= FwdWork::num_rows<Config>(params))",
        ),
        ("fwd_simt.cu", "if (column < params.head_dim_v)", ""),
        ("fwd_simt.cu", "lse != nullptr && lane_x == 0", "lse != nullptr && lane_x == 0 && r != 3"),
        ("fwd_simt.cu, packed, split", "tile < tiles.full_end", "true"),
        ("fwd_simt.cu, packed, split", "column_begin + column < num_columns", "true"),
        ("fwd_simt.cu, packed, split", "at_most(first + length, end)", "end"),
        ("weights.cu", "compute_tile(tile);", "remove_tile();"),
        ("weights.cu", "if (is_lse_coarse())", "if (false)"),
        ("weights.cu", "if (row < params.seqlen_q)", "if (row <= params.seqlen_q)"),
        ("weights.cu", "if (key < params.seqlen_k) Traits", "if (key <= params.seqlen_k) Traits"),
        ("weights.cu", "params.num_splits * share;", "params.num_splits * num_tiles;"),
        ("weights.cu", "if (step == num_walked - 1) use_sums();", "use_sums();"),
        ("weights.cu", "drop_weights(tile * Config::kBlockN)", "drop_weights(0)"),
        ("combine.cu", "if (keys.total == 0) continue;", ""),
        ("combine.cu", "if (whole.largest == negative_infinity()) whole.largest = 0;", ""),
        ("combine.cu", "part += 32) whole.largest =", "part += 64) whole.largest ="),
        ("combine.cu", "if (row < num_rows)", "if (row <= num_rows)"),
        ("merge.cu", "begin += 32 * Traits::kColumns", "begin += 64 * Traits::kColumns"),
        (
            "merge.cu",
            "const int column = column_begin + 32 * i;\n    if (column < num_columns) {",
            "const int column = 0; {",
        ),
        ("merge.cu", "if (whole.largest == negative_infinity()) whole.largest = 0;", ""),
        ("merge.cu", "total == 0 ? 1 : total", "total"),
        ("merge.cu", "row /= shape[axis];", ""),
        ("mask_summary.cu", "const Byte* first) { return isa::ldg_4(first); }", "const Byte* first) { return 1; }"),
        ("mask_summary.cu", "return 0x01010101u * isa::ldg_1(first);", "return isa::ldg_1(first);"),
        ("mask_summary.cu", "some_false = isa::any(some_false);", ";"),
        ("mask_summary.cu", "some_true = isa::any(some_true);", ";"),
        ("mask_summary.cu", "offset += tile % params.num_heads * mask.head_stride;", ""),
    ],
)
def test_problems_reach_every_branch(file: str, code: str, wrong: str) -> None:
    """What they do not reach they cannot find: with one branch made wrong, something must be found."""
    subject = SUBJECTS[file]
    assert subject.source.text.count(code) == 1
    text = subject.source.text.replace(code, wrong)
    assert finding(subject, Module(KernelSource("wrong", text, subject.source.entries))) is not None


@pytest.mark.usefixtures("cxx")
def test_a_wrong_result_is_a_finding() -> None:
    subject = SUBJECTS["fwd_sm80.cu"]
    text = subject.source.text.replace(
        "scale_log2(static_cast<float>(params.scale) * kLog2E)", "scale_log2(static_cast<float>(params.scale))"
    )
    found = finding(subject, Module(KernelSource("wrong", text, subject.source.entries)))
    assert found == f"problem 0: wrong result under {Options()}"
