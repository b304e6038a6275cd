"""As test_planted_bugs.py, for what sm_90 adds: a kernel in the manner of a Hopper forward pass, whole and broken.

A producer thread loads tiles of x and y into a ring of two stages by bulk copies; a warpgroup multiplies them, one
product under way while the next is issued, and stages each sum for a bulk store.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from cupyflash.backends.emulator import EmulatorError, Module, Options, guarded_array, guarded_copy
from cupyflash.build.cache import Cache
from cupyflash.build.nvrtc import compile_cubin
from tests.kernels.harness import ALL_OPTIONS, compiled, line_of, source_of
from tests.kernels.hopper import map_of
from tests.kernels.mutation import mutants

pytestmark = pytest.mark.usefixtures("cxx")

ROUNDS, TILES, SIZE = 2, 3, 64

# out[r] = sum over t of x[r, t] y[r, t]; all matrices are 64 x 64.
KERNEL = r"""
#include "isa.cuh"
#include "descriptor.cuh"

constexpr u32 kTile = 64 * 128;

extern "C" __global__ void __launch_bounds__(256, 1) pipeline(const __grid_constant__ TensorMap x_map,
                                                              const __grid_constant__ TensorMap y_map,
                                                              const __grid_constant__ TensorMap out_map, int rounds,
                                                              int tiles) {
  const u32 x_smem = isa::shared_base();
  const u32 y_smem = x_smem + 2 * kTile;
  const u32 out_smem = y_smem + 2 * kTile;
  const u32 full = out_smem + kTile;
  const u32 empty = full + 16;
  if (isa::thread_index() == 0) {
    for (u32 stage = 0; stage < 2; ++stage) {
      isa::mbarrier_init(full + 8 * stage, 1);  // init full
      isa::mbarrier_init(empty + 8 * stage, 1);  // init empty
    }
    isa::fence_mbarrier_init();  // fence inits
  }
  isa::sync_threads();  // initialised
  if (isa::warp_index() < 4) {
    isa::setmaxnreg_dec<24>();
    if (isa::warp_index() == 0) {
      const bool elected = isa::elect_one();
      const u64 policy = isa::l2_evict_first();
      if (elected) {
        for (int tile = 0; tile < rounds * tiles; ++tile) {
          const u32 stage = tile % 2;
          isa::mbarrier_wait(empty + 8 * stage, tile / 2 % 2 ^ 1);  // until empty
          isa::mbarrier_arrive_expect_tx(full + 8 * stage, 2 * kTile);  // expect
          isa::bulk_load(x_smem + stage * kTile, &x_map, full + 8 * stage, policy, 0, 0, tile);  // load x
          isa::bulk_load(y_smem + stage * kTile, &y_map, full + 8 * stage, policy, 0, 0, tile);  // load y
        }
      }
    }
  } else {
    isa::setmaxnreg_inc<256>();
    const int warp = isa::warp_index() - 4;
    const int lane = isa::lane_index();
    int tile = 0;
    for (int round = 0; round < rounds; ++round) {
      float acc[32];
      for (int t = 0; t < tiles; ++t, ++tile) {
        const u32 stage = tile % 2;
        isa::mbarrier_wait(full + 8 * stage, tile / 2 % 2);  // until full
        isa::wgmma_fence();  // registers
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
          const u64 a = matrix_descriptor(x_smem + stage * kTile + 32 * k, 16, 1024, OperandSwizzle::k128);
          const u64 b = matrix_descriptor(y_smem + stage * kTile + 2048 * k, kTile, 1024, OperandSwizzle::k128);
          isa::wgmma_ss<0, 1>(Float16(), acc, a, b, t > 0 || k > 0);  // multiply
        }
        isa::wgmma_commit();  // group
        if (t > 0) {
          isa::wgmma_wait<1>();  // until the last tile
          if (isa::thread_index() == 128) isa::mbarrier_arrive(empty + 8 * (stage ^ 1));  // release last
        }
      }
      isa::wgmma_wait<0>();  // until this tile
      if (isa::thread_index() == 128) isa::mbarrier_arrive(empty + 8 * ((tile - 1) % 2));  // release this
      if (isa::thread_index() == 128) isa::bulk_wait_read<0>();  // until read
      isa::barrier_sync(2, 128);  // staging is free
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 frag[4];
        for (int j = 0; j < 4; ++j) frag[j] = isa::pack_f16x2(acc[8 * i + 2 * j], acc[8 * i + 2 * j + 1]);
        const int row = 16 * warp + lane % 16;
        const int chunk = 2 * i + lane / 16;
        isa::stmatrix_x4(out_smem + static_cast<u32>(128 * row + ((chunk ^ row % 8) << 4)), frag);  // stage
      }
      isa::fence_proxy_async();  // show
      isa::barrier_sync(1, 128);  // staged
      if (isa::thread_index() == 128) {
        isa::bulk_store(&out_map, out_smem, 0, 0, round);  // store
        isa::bulk_commit();  // stored
      }
    }
    if (isa::thread_index() == 128) isa::bulk_wait_read<0>();  // before exit
  }
}
"""
SHARED_BYTES = 5 * 8192 + 32


def operands():
    """Small integers: sums are exact."""
    rng = np.random.default_rng(3)
    x, y = (rng.integers(-2, 3, (ROUNDS * TILES, SIZE, SIZE)).astype(np.float16) for _ in range(2))
    expected = (x.astype(np.float32) @ y.astype(np.float32)).reshape(ROUNDS, TILES, SIZE, SIZE).sum(1)
    return x, y, expected.astype(np.float16)


X, Y, EXPECTED = operands()


def launch(module, options):
    x, y = guarded_copy(X, "x"), guarded_copy(Y, "y")
    out = guarded_array(EXPECTED.shape, np.float16, "out")
    out[...] = np.nan
    maps = [map_of(array, (1, SIZE, SIZE)) for array in (x, y, out)]
    kernel = module.get_function("pipeline")
    counters = kernel(
        (1,), (256,), (*maps, np.int32(ROUNDS), np.int32(TILES)), shared_mem=SHARED_BYTES, options=options
    )
    return out.copy(), counters


def finding(module, options):
    """What a run finds wrong: a report, wrong results, or None."""
    try:
        out, _ = launch(module, options)
    except EmulatorError as error:
        return str(error)
    return None if np.array_equal(out, EXPECTED) else "wrong result"


def replaced(mark, new):
    """The kernel with the line that holds ``mark`` replaced; line numbers stay."""
    lines = KERNEL.splitlines()
    lines[line_of(KERNEL, mark) - 1] = new
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "options", [*ALL_OPTIONS, *(Options(schedule="random", seed=n) for n in range(5, 15))], ids=repr
)
def test_correct_kernel(options):
    out, counters = launch(compiled(KERNEL), options)
    np.testing.assert_array_equal(out, EXPECTED)
    assert counters.wgmma == ROUNDS * TILES * 4 * 4
    assert counters.bulk == ROUNDS * TILES * 2 + ROUNDS


MUTANTS = mutants(source_of(KERNEL))


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_every_synchronisation_is_missed(mutant):
    module = Module(mutant.source)
    hostile = [Options(), *(Options(schedule=s, seed=seed) for s in ("random", "priority") for seed in range(3))]
    assert any(finding(module, options) for options in hostile), mutant


BUGS = {
    # mark: (the line instead, what the report says)
    # Whichever of the two comes first in a schedule is the earlier one.
    "// until full": (
        ";",
        "bulk load of .* is not ordered after the wgmma|wgmma of .* is not ordered after the bulk load",
    ),
    "// until empty": (
        ";",
        "this is one too many|bulk load of .* is not ordered after the wgmma at .*missing wgmma wait",
    ),
    "// until this tile": (";", "bulk load of .* is not ordered after the wgmma at .*missing wgmma wait"),
    "// registers": (";", "has not executed wgmma_fence"),
    "// fence inits": (";", "not visible to it .missing fence_mbarrier_init"),
    "// init full": (";", r"there is no mbarrier at shared\+0xa000"),
    "// initialised": (";", "there is no mbarrier|mbarrier instruction of .* is not ordered after the mbarrier.init"),
    "// show": (";", "bulk store of .*the stmatrix by warp .* is not visible to it .missing fence_proxy_async"),
    "// staged": (
        ";",
        "bulk store of .* is not ordered after the stmatrix|stmatrix of .* is not ordered after the bulk store",
    ),
    "// staging is free": (";", r"stmatrix of .* is not ordered after the bulk store at .*missing bulk wait"),
    "// before exit": (";", "exits without having waited for it"),
    "// stored": (";", "exits without having waited|not ordered after the bulk store"),
    "// expect": (
        "isa::mbarrier_arrive_expect_tx(full + 8 * stage, kTile);",
        "is complete before this load is .too few bytes",
    ),
    "tile < rounds * tiles": (
        "for (int tile = 0; tile < rounds * tiles + 1; ++tile) {",
        "the block ended and no thread has waited for this bulk load",
    ),
    "// load y": (";", r"(?s)deadlock.*mbarrier shared\+0xa000 .*phase 0, 1 of 1 arrived, 8192 bytes still to come"),
    "// release this": (";", r"(?s)deadlock.*0 of 1 arrived, 0 bytes still to come"),
    "// group": (";", "exits without having waited for it|not ordered|was written before"),
    "// release last": (
        "isa::mbarrier_arrive(empty + 8 * (stage ^ 1));",
        "went two phases on|two ahead|not ordered|wrong result|deadlock|operand",
    ),
    "// multiply": (
        "isa::wgmma_ss<0, 1>(Float16(), acc, a + 8, b, t > 0 || k > 0);",
        "not in the first 128 bytes of a pattern of 1024",
    ),
}


@pytest.mark.parametrize("mark", BUGS)
def test_report(mark):
    line, report = BUGS[mark]
    found = finding(compiled(replaced(mark, line)), Options())
    assert found is not None
    assert re.search(report, found), found


@pytest.mark.parametrize("mark", ["// until full", "// until empty", "// until this tile"])
def test_late_landing_shows_missing_waits_without_the_detector(mark):
    module = compiled(replaced(mark, ";"))
    hostile = [Options(schedule="random", seed=seed, race_detector=False) for seed in range(6)]
    assert any(finding(module, options) for options in hostile)


# Statements of a kernel of one warpgroup, and what the report says.
BEFORE = r"""
#include "isa.cuh"
#include "descriptor.cuh"
extern "C" __global__ void __launch_bounds__(128) misuse(u32* out) {
  const u32 base = isa::shared_base();
  const int thread = isa::thread_index();
  const u64 operand = matrix_descriptor(base, 16, 1024, OperandSwizzle::k128);
  float acc[32];
  for (int i = 0; i < 64; ++i) isa::st_shared_4(base + 4 * (128 * i + thread), 0x3c003c00);
  isa::fence_proxy_async();
  isa::sync_threads();
"""
ONE_THREAD = "if (thread == 0) { isa::mbarrier_init(base, 1); %s }"
PRODUCT = "isa::wgmma_fence(); isa::wgmma_ss<0, 0>(Float16(), acc, operand, operand, false); "
OTHER_PRODUCT = "isa::wgmma_fence(); isa::wgmma_ss<0, 0>(Float16(), acc, operand + (%s), operand, false); "
OVERWRITTEN = PRODUCT + (
    "isa::wgmma_commit(); isa::sync_threads(); isa::st_shared_4(base + 4 * thread, 0); isa::wgmma_wait<0>();"
)
MISUSE = {
    "isa::mbarrier_arrive(base);": "there is no mbarrier at shared",
    ONE_THREAD % "isa::mbarrier_init(base, 1);": "is in use since",
    "isa::mbarrier_init(base + 4, 1);": "not a multiple of 8",
    "if (thread == 0) isa::mbarrier_init(base, 0);": "a count of 0",
    ONE_THREAD % "isa::st_shared_4(base + 4, 0);": r"overlap the mbarrier shared\+0x0",
    ONE_THREAD % "isa::mbarrier_wait(base, 2);": "a parity of 2",
    ONE_THREAD % "isa::mbarrier_arrive_expect_tx(base, 1 << 20);": "counts at most",
    ONE_THREAD % "isa::mbarrier_arrive_expect_tx(base, 16); isa::mbarrier_arrive(base);": (
        r"all 1 arrivals at mbarrier .* this is one too many \(16 bytes still to come"
    ),
    ONE_THREAD % "isa::mbarrier_arrive_expect_tx(base, 16);": "ended with 16 bytes still to come",
    ONE_THREAD
    % (
        "isa::mbarrier_wait(base, 1); for (int i = 0; i < 3; ++i) isa::mbarrier_arrive(base); "
        "isa::mbarrier_wait(base, 0);"
    ): "two ahead",
    ONE_THREAD % "isa::mbarrier_wait(base, 0);": r"(?s)deadlock.*mbarrier shared\+0x0 .*phase 0, 0 of 1 arrived",
    "isa::setmaxnreg_inc<100>();": "100 registers, not a multiple of 8",
    "isa::setmaxnreg_inc<128>();": "128 registers, but the warp has 256",
    "if (isa::warp_index() < 2) isa::setmaxnreg_dec<24>();": "warps of a warpgroup end with different",
    PRODUCT + "isa::wgmma_commit();": "exits without having waited for it",
    PRODUCT + "isa::wgmma_commit(); acc[3] = 1; isa::wgmma_wait<0>(); isa::stg_4(out, isa::float_bits(acc[3]));": (
        "accumulator 3 of lane 0 was written before"
    ),
    OTHER_PRODUCT % "isa::warp_index() == 3 ? 64 : 0" + "isa::wgmma_commit(); isa::wgmma_wait<0>();": (
        "the warps of a warpgroup issue different ones"
    ),
    OTHER_PRODUCT % "isa::lane_index() == 3 ? 64 : 0": "the lanes of one warp have different descriptors",
    OTHER_PRODUCT % "1ull << 49": "base offset is 1",
    OTHER_PRODUCT % "1ull << 14": "has bits that must be 0",
    OTHER_PRODUCT % "8": "not in the first 128 bytes of a pattern of 1024",
    OTHER_PRODUCT % "1 << 12": r"wgmma\.mma_async: 16 bytes at .* are outside",
    "isa::st_shared_4(base + 4 * thread, 0); isa::sync_threads(); " + PRODUCT: (
        r"wgmma of .*the st\.shared by warp .* is not visible to it \(missing fence_proxy_async"
    ),
    OVERWRITTEN: r"st\.shared of .* is not ordered after the wgmma at .*missing wgmma wait",
}


@pytest.mark.parametrize("statement", MISUSE)
def test_misuse(statement):
    text = BEFORE + statement + "\n}\n"
    out = guarded_array(1, np.uint32, "out")
    with pytest.raises(EmulatorError, match=MISUSE[statement]):
        compiled(text).get_function("misuse")((1,), (128,), (out,), shared_mem=32768)


def test_changed_operand_without_the_detector():
    out = guarded_array(1, np.uint32, "out")
    kernel = compiled(BEFORE + OVERWRITTEN + "\n}\n").get_function("misuse")
    with pytest.raises(EmulatorError, match=r"operand \w in shared memory has changed before it was complete"):
        kernel((1,), (128,), (out,), shared_mem=32768, options=Options(race_detector=False))


def test_registers_that_nobody_gives_back():
    # 256 threads have 256 registers each; of 384, with 168 each, some must give back what others take.
    text = KERNEL.replace("isa::setmaxnreg_dec<24>();", ";").replace("256, 1", "384, 1")
    kernel = compiled(text).get_function("pipeline")
    x, out = guarded_copy(X, "x"), guarded_array(EXPECTED.shape, np.float16, "out")
    maps = [map_of(array, (1, SIZE, SIZE)) for array in (x, x, out)]
    with pytest.raises(EmulatorError, match=r"(?s)deadlock.*has 168 registers for each thread, wants 256, 0 are free"):
        kernel((1,), (384,), (*maps, np.int32(ROUNDS), np.int32(TILES)), shared_mem=SHARED_BYTES)


@pytest.mark.usefixtures("nvrtc")
def test_the_kernel_compiles_for_the_device(tmp_path):
    """Products that go on by themselves: the compiler says so when it cannot keep them so."""
    binary = compile_cubin(source_of(KERNEL), "sm_90a", Cache(tmp_path))
    assert binary.notices == ()
    resources = binary.resources["pipeline"]
    assert resources.stack_bytes == resources.spill_stores == resources.spill_loads == 0
    assert {"HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "STSM"} <= set(resources.opcodes)
