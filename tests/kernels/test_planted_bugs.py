"""A correct kernel passes under every schedule with the same bits; one wrong line in it is reported.

The kernel streams tiles of rows through a double buffer the way a forward pass does: cp.async into one half
while the other is read with ldmatrix by all warps, values exchanged within the warp, the result staged in
shared memory for another warp to write.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from cupyflash.backends.emulator import EmulatorError, Options, guarded_array, guarded_copy
from tests.kernels.harness import ALL_OPTIONS, compiled, line_of

pytestmark = pytest.mark.usefixtures("cxx")

NUM_TILES = 5
THREADS = 64  # two warps

# x: tiles of 16 rows of 8 elements, 16 bytes a row. Each warp adds up the words its lanes get from ldmatrix.
KERNEL = r"""
#include "isa.cuh"

constexpr int kTileBytes = 16 * 16;

__device__ __forceinline__ void load_tile(const u32* x, int tile, u32 x_smem) {
  const int row = isa::thread_index();
  const u32 row_smem = x_smem + (tile % 2) * kTileBytes + 16 * row;
  if (row < 16) isa::cp_async_16(row_smem, x + (16 * tile + row) * 4, 16);  // load
  isa::cp_async_commit();
}

extern "C" __global__ void stream(const u32* x, u32* out, int num_tiles) {
  const u32 x_smem = isa::shared_base();
  const u32 sum_smem = x_smem + 2 * kTileBytes;
  const int lane = isa::lane_index();
  u32 sum = 0;
  load_tile(x, 0, x_smem);
  for (int tile = 0; tile < num_tiles; ++tile) {
    if (tile + 1 < num_tiles) load_tile(x, tile + 1, x_smem);
    if (tile + 1 < num_tiles) {
      isa::cp_async_wait<1>();  // wait: this tile
    } else {
      isa::cp_async_wait<0>();  // wait: last tile
    }
    isa::sync_threads();  // full: every warp's rows have arrived
    u32 frag[2];
    isa::ldmatrix_x2(frag, x_smem + (tile % 2) * kTileBytes + 16 * (lane % 16));  // read
    sum += frag[0] + 3 * frag[1];
    sum += isa::shuffle_xor(sum, 1);  // exchange
    isa::sync_threads();  // empty: nobody reads what is loaded next
  }
  isa::st_shared_4(sum_smem + 4 * isa::thread_index(), sum);  // stage
  isa::barrier_sync(1, 64);  // staged
  const int other = isa::thread_index() ^ 32;
  isa::stg_4(out + other, isa::ld_shared_4(sum_smem + 4 * other));  // fetch
}
"""
SHARED_BYTES = 2 * 256 + 4 * THREADS


def launch(text, options, num_tiles=NUM_TILES):
    x = guarded_copy(np.arange(NUM_TILES * 64, dtype=np.uint32) ** 2, "x")
    out = guarded_array(THREADS, np.uint32, "out")
    arguments = (x, out, np.int32(num_tiles))
    compiled(text).get_function("stream")((1,), (THREADS,), arguments, shared_mem=SHARED_BYTES, options=options)
    return out.copy()


def expected():
    x = (np.arange(NUM_TILES * 64, dtype=np.uint32) ** 2).reshape(NUM_TILES, 16, 4)
    lane = np.arange(32)
    total = np.zeros(32, np.uint32)
    for tile in x:
        total += tile[lane // 4, lane % 4] + np.uint32(3) * tile[8 + lane // 4, lane % 4]
        total += total[lane ^ 1]
    return np.tile(total, 2)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_correct_kernel(options):
    np.testing.assert_array_equal(launch(KERNEL, options), expected())


def replaced(line_mark, new):
    """The kernel with the line that holds ``line_mark`` replaced; line numbers stay."""
    lines = KERNEL.splitlines()
    lines[line_of(KERNEL, line_mark) - 1] = new
    return "\n".join(lines) + "\n"


def finding(text, options):
    """What a run finds wrong: a report, wrong results, or None."""
    try:
        out = launch(text, options)
    except EmulatorError as error:
        return str(error)
    return None if np.array_equal(out, expected()) else "wrong result"


RACES = {
    # mark of the line to drop: (where the race shows, the earlier access, what the report says is missing)
    # The warp that loaded the row finds that not even its own lanes are ordered.
    "// full": ("// read", "// load", "(barrier|__syncwarp)"),
    "// empty": ("// load", "// read", "barrier"),
    "// wait: this tile": ("// read", "// load", "cp.async wait( or barrier)?"),
    "// wait: last tile": ("// read", "// load", "cp.async wait( or barrier)?"),
    "// staged": ("// fetch", "// stage", "barrier"),
}


@pytest.mark.parametrize("mark", RACES)
def test_race_detector_names_both_lines(mark):
    text = replaced(mark, "      ;")
    here, earlier, missing = RACES[mark]
    for options in (Options(), Options(late_landing=False), Options(schedule="priority", seed=1)):
        report = finding(text, options)
        assert report is not None
        assert "shared-memory race" in report
        assert re.search(rf"missing {missing}\?", report)
        # Whichever of the two comes first in a schedule is the earlier one.
        lines = {int(number) for number in re.findall(r"test\.cu:(\d+)", report)}
        assert lines == {line_of(KERNEL, here), line_of(KERNEL, earlier)}, report


@pytest.mark.parametrize(("reader", "missing"), [(0, "cp.async wait"), (1, "cp.async wait or barrier")])
def test_another_warp_may_lack_a_barrier_behind_the_wait(reader, missing):
    text = rf"""
#include "isa.cuh"
extern "C" __global__ void stream(const u32* x, u32* out, int num_tiles) {{
  const u32 place = isa::shared_base() + 16 * (isa::lane_index() % 8);
  if (isa::warp_index() == 0 && isa::lane_index() < 8) isa::cp_async_16(place, x, 16);
  isa::cp_async_commit();
  isa::sync_threads();
  if (isa::warp_index() == {reader}) isa::stg_4(out + isa::lane_index(), isa::ld_shared_4(place));
  isa::cp_async_wait<0>();
}}
"""
    report = finding(text, Options())
    assert report is not None
    assert f"(missing {missing}?)" in report


@pytest.mark.parametrize("mark", ["// wait: this tile", "// wait: last tile"])
def test_late_landing_shows_a_missing_wait_without_the_detector(mark):
    text = replaced(mark, "      ;")
    report = finding(text, Options(race_detector=False))
    assert report is not None
    assert report == "wrong result" or "has not waited for" in report
    if mark == "// wait: this tile":
        assert finding(text, Options(race_detector=False, late_landing=False)) is None, "early landing hides it"


@pytest.mark.parametrize("mark", ["// full", "// empty", "// staged"])
def test_schedules_show_a_missing_barrier_without_the_detector(mark):
    text = replaced(mark, "      ;")
    seeds = [Options(schedule="priority", seed=seed, race_detector=False) for seed in range(20)]
    assert any(finding(text, options) is not None for options in seeds)


def test_missing_sync_warp():
    text = r"""
#include "isa.cuh"
extern "C" __global__ void stream(const u32* x, u32* out, int num_tiles) {
  const u32 mine = isa::shared_base() + 4 * isa::thread_index();
  isa::st_shared_4(mine, 1);  // write
  isa::stg_4(out + isa::thread_index(), isa::ld_shared_4(mine ^ 4));  // read
}
"""
    report = finding(text, Options())
    assert report is not None
    # Lane 0 has read when lane 1 writes: the read is the earlier one.
    assert report.startswith(f"test.cu:{line_of(text, '// write')}: block (0,0,0) thread 1 ")
    read = line_of(text, "// read")
    assert f"ld.shared by warp 0 lane 0 at test.cu:{read} (missing __syncwarp?)" in report


def test_a_lane_that_reads_its_own_word_speaks_for_no_other():
    text = r"""
#include "isa.cuh"
extern "C" __global__ void stream(const u32* x, u32* out, int num_tiles) {
  if (isa::thread_index() == 0) isa::st_shared_4(isa::shared_base(), 1);  // write
  isa::stg_4(out + isa::thread_index(), isa::ld_shared_4(isa::shared_base()));  // read
}
"""
    report = finding(text, Options())
    assert report is not None
    assert report.startswith(f"test.cu:{line_of(text, '// read')}: block (0,0,0) thread 1 ")
    assert f"st.shared by warp 0 lane 0 at test.cu:{line_of(text, '// write')} (missing __syncwarp?)" in report


def test_divergent_shuffle():
    text = replaced("// exchange", "    if (lane < 16) sum += isa::shuffle_xor(sum, 1);  // exchange")
    for options in ALL_OPTIONS:
        report = finding(text, options)
        assert report is not None
        assert re.search(
            r"warp divergence: this lane executes (bar\.sync|shfl\.sync\.bfly) while lanes \S+ of its warp "
            r"wait at (bar\.sync|shfl\.sync\.bfly)",
            report,
        )
        lines = {int(number) for number in re.findall(r"test\.cu:(\d+)", report)}
        assert lines == {line_of(KERNEL, "// exchange"), line_of(KERNEL, "// empty")}


def test_exit_before_a_collective():
    text = replaced("// exchange", "    if (lane == 5) return;  isa::shuffle_xor(sum, 1);  // exchange")
    report = finding(text, Options())
    assert report is not None
    assert f"test.cu:{line_of(KERNEL, '// exchange')}: " in report
    assert "wait at shfl.sync.bfly" in report or "have exited" in report or "cp.async" in report


def test_deadlock_lists_who_waits_where():
    text = replaced("// staged", "  if (isa::warp_index() == 0) isa::barrier_sync(1, 64);  // staged")
    text = replaced(
        "// staged", "  if (isa::warp_index() == 0) isa::barrier_sync(1, 64); else isa::barrier_sync(2, 64);"
    )
    report = finding(text, Options())
    assert report is not None
    line = line_of(KERNEL, "// staged")
    assert report.splitlines() == [
        "deadlock in block (0,0,0): no thread can run",
        f"  warp 0 lanes 0-31: waiting at bar.sync at test.cu:{line}",
        f"  warp 1 lanes 0-31: waiting at bar.sync at test.cu:{line}",
        "  barrier 1: 32 of 64 threads arrived",
        "  barrier 2: 32 of 64 threads arrived",
    ]


BARRIER_MISUSE = {
    "isa::barrier_sync(1, 48);": "the thread count 48 is not a multiple of 32",
    "isa::barrier_sync(1, 96);": "the thread count 96 exceeds the block's 64 threads",
    "isa::barrier_sync(16, 64);": "there is no barrier 16, only 0 to 15",
    "isa::barrier_sync(1, 32 + 32 * isa::warp_index());": "the thread count is",
    "isa::barrier_sync(1 + isa::lane_index() / 16, 64);": "the lanes of one warp name different barriers",
    "isa::barrier_arrive(1, 64);": "is not ordered after the",
    "isa::barrier_arrive(1, 64); isa::barrier_arrive(1, 64); isa::barrier_sync(2, 64);": "second time",
}


@pytest.mark.parametrize("statement", BARRIER_MISUSE)
def test_barrier_misuse(statement):
    text = replaced("// staged", f"  {statement}")
    reports = [finding(text, options) for options in ALL_OPTIONS if options.race_detector]
    if statement == "isa::barrier_sync(1, 32 + 32 * isa::warp_index());":
        # One warp alone fills a barrier of 32, so whether the counts meet depends on the schedule.
        assert all(report is not None for report in reports)
        return
    for report in reports:
        assert report is not None
        assert BARRIER_MISUSE[statement] in report


def test_unfinished_barrier():
    text = replaced("// staged", "  isa::barrier_sync(1, 64); if (isa::warp_index() == 0) isa::barrier_arrive(3, 64);")
    report = finding(text, Options())
    assert report == (
        f"test.cu:{line_of(KERNEL, '// staged')}: block (0,0,0) ended with barrier 3 unfinished: "
        "32 of 64 threads arrived"
    )


def test_uncommitted_copy():
    text = KERNEL.replace("  isa::cp_async_commit();", "  if (tile == 0) isa::cp_async_commit();")
    assert text != KERNEL
    assert all(finding(text, options) is not None for options in ALL_OPTIONS if options.late_landing)


def test_global_read_past_the_end():
    with pytest.raises(EmulatorError) as caught:
        launch(KERNEL, Options(), num_tiles=NUM_TILES + 1)
    line = line_of(KERNEL, "// load")
    assert re.fullmatch(
        rf"test\.cu:{line}: block \(0,0,0\) thread 0 \(warp 0 lane 0\): "
        r"cp\.async: illegal access to global memory at 0x[0-9a-f]+, near array 'x': 0 bytes past its end",
        str(caught.value),
    )
    # The process goes on, and so does the runtime.
    np.testing.assert_array_equal(launch(KERNEL, Options()), expected())


ACCESSES = {
    # After a barrier the lane that completed it goes on first.
    "isa::stg_4(out + 64 + lane, 1);": r"st\.global: illegal .* near array 'out': 124 bytes past its end",
    "isa::stg_4(out - 100000, 1);": r"st\.global: illegal .* near array 'out': \d+ bytes before its start",
    "isa::stg_4(nullptr, 1);": r"st\.global: illegal access to global memory at \(nil\), near no array",
    "isa::stg_8(out + 1, uint2{1, 1});": r"st\.global: the global address 0x\w+ is not a multiple of 8",
    "isa::stg_4(out, isa::ld_shared_4(sum_smem + 256));": r"ld\.shared: 4 bytes at shared\+768 are outside",
    "isa::stg_4(out, isa::ld_shared_4(4));": r"ld\.shared: 4 bytes at shared-1020 are outside",
    "isa::stg_4(out, isa::ld_shared_8(sum_smem + 4).x);": r"ld\.shared: .* shared\+0x204 is not a",
    "u32 f[1]; isa::ldmatrix_x1(f, x_smem + 8 * lane);": r"ldmatrix\.x1: .* shared\+0x8 is not a",
    "isa::cp_async_16(x_smem, x, 17);": r"cp\.async: a source size of 17 bytes exceeds the copy's 16",
    "isa::cp_async_16(x_smem, x + 1, 16);": r"cp\.async: the global address 0x\w+ is not a multiple of 16",
    "isa::cp_async_16(x_smem + 4096, x, 16);": r"cp\.async: 16 bytes at shared\+4096 are outside",
    "volatile char big[100000]; for (int i = 0; i < 100000; i += 4096) big[i] = 1;": r"stack overflow: .* exceed 65536",
}


@pytest.mark.parametrize("statement", ACCESSES)
def test_bad_access(statement):
    text = replaced("// staged", f"  isa::barrier_sync(1, 64); {statement}")
    report = finding(text, Options())
    assert report is not None
    assert re.search(ACCESSES[statement], report), report
    if "stack overflow" not in report:
        assert report.startswith(f"test.cu:{line_of(KERNEL, '// staged')}: "), report


def test_overrun_within_the_page():
    """Five words, flush to the start of a page, leave room in it; what is written there is noticed."""
    text = r"""
#include "isa.cuh"
extern "C" __global__ void write(u32* out) { isa::stg_4(out + 5, isa::lane_index()); }
"""
    out = guarded_array(5, np.uint32, "five", flush="start")
    write = compiled(text).get_function("write")
    with pytest.raises(EmulatorError, match="the launch wrote past the end of array 'five'"):
        write((1,), (32,), (out,))
    with pytest.raises(EmulatorError, match="near array 'five': 0 bytes past its end"):
        write((1,), (32,), (guarded_array(5, np.uint32, "five"),))


def test_faults_outside_kernels_are_not_ours():
    """Between launches the process has its own handlers back."""
    import faulthandler
    import signal

    launch(KERNEL, Options())
    assert signal.getsignal(signal.SIGSEGV) in (signal.SIG_DFL, None) or faulthandler.is_enabled()


def test_exit_without_waiting():
    text = r"""
#include "isa.cuh"
extern "C" __global__ void leave(const u32* x) {
  isa::cp_async_16(isa::shared_base() + 16 * isa::thread_index(), x, 16);  // copy
  isa::cp_async_commit();
}
"""
    x = guarded_array(4, np.uint32, "x")
    for options in ALL_OPTIONS:
        with pytest.raises(EmulatorError, match=r"exits with 1 cp\.async operations it has not waited for") as caught:
            compiled(text).get_function("leave")((1,), (32,), (x,), shared_mem=512, options=options)
        assert str(caught.value).startswith(f"test.cu:{line_of(text, '// copy')}: ")


def test_preemption_loses_updates():
    """Adding without an atomic is right in every order of whole threads, and wrong once one is interrupted."""
    text = r"""
#include "isa.cuh"
extern "C" __global__ void count(u32* total) {
  for (int i = 0; i < 20; ++i) isa::stg_4(total, isa::ldg_4(total) + 1);
}
"""
    count = compiled(text).get_function("count")

    def total(options):
        array = guarded_array(1, np.uint32, "total")
        count((1,), (128,), (array,), options=options)
        return int(array[0])

    assert total(Options()) == 20 * 128
    for schedule in ("random", "priority"):
        assert min(total(Options(schedule=schedule, seed=seed)) for seed in range(5)) < 20 * 128


def test_blocks_do_not_race_in_shared_memory():
    """Each block has its own; the emulator reuses the bytes, and the shadow words, without clearing them."""
    text = r"""
#include "isa.cuh"
extern "C" __global__ void alternate(u32* out) {
  // In even blocks the first warp uses the words, in odd ones the second.
  if (isa::warp_index() == isa::block_index_x() % 2) {
    isa::st_shared_4(isa::shared_base() + 4 * isa::lane_index(), isa::lane_index());
    isa::stg_4(out + isa::lane_index(), isa::ld_shared_4(isa::shared_base() + 4 * isa::lane_index()));
  }
}
"""
    out = guarded_array(32, np.uint32, "out")
    compiled(text).get_function("alternate")((4,), (64,), (out,), shared_mem=128)
    np.testing.assert_array_equal(out, np.arange(32))
