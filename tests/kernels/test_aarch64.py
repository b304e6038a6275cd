"""The whole emulator on AArch64, where a cross compiler and QEMU are at hand: the same bits and reports as here."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from cupyflash.build.source import flatten, kernels_folder
from tests.kernels.harness import HERE

MIX = r"""
#include "isa.cuh"
// Tiles of 1 KiB go through shared memory into mma, all of them into one sum per thread.
extern "C" __global__ void mix(const u32* x, u32* out, int num_tiles) {
  const int thread = isa::thread_index();
  const int lane = isa::lane_index();
  float acc[4] = {0, 0, 0, 0};
  for (int tile = 0; tile < num_tiles; ++tile) {
    if (thread < 64) {
      isa::cp_async_16(isa::shared_base() + 16 * thread, x + 256 * tile + 4 * thread, 16);
    }
    isa::cp_async_commit();
    isa::cp_async_wait<0>();
    isa::sync_threads();
    u32 a[4];
    u32 b[2];
    isa::ldmatrix_x4(a, isa::shared_base() + 16 * lane);
    isa::ldmatrix_x2_trans(b, isa::shared_base() + 512 + 16 * (lane % 16));
    isa::mma_m16n8k16(Float16(), acc, a, b[0], b[1]);
    isa::sync_threads();
  }
  const float sum = acc[0] + isa::shuffle_xor(acc[1], 5) + 2 * acc[2] + 3 * acc[3];
  isa::stg_4(out + thread, isa::float_bits(sum));
}
"""


def run(command, runner, tmp_path, *flags):
    text = flatten(MIX, "mix.cu") + (HERE / "standalone.cpp").read_text(encoding="utf-8").replace(
        "int main() {", "CUPYFLASH_EXPORT(mix);\n\nint main() {"
    )
    unit = tmp_path / "unit.cpp"
    unit.write_text(text, encoding="utf-8")
    program = tmp_path / command[0].rsplit("/", 1)[-1]
    flags = ("-std=c++17", "-O1", "-pthread", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", *flags)
    subprocess.run([*command, *flags, f"-I{kernels_folder()}", str(unit), "-o", str(program)], check=True)
    output = subprocess.run([*runner, str(program)], check=True, capture_output=True, text=True).stdout
    # Which thread of which block is the first to go too far depends on the two workers.
    return re.sub(r"\d+ bytes past", "... bytes past", output).splitlines()


@pytest.mark.slow
def test_same_bits_and_reports(cxx, tmp_path):
    here = run(cxx, [], tmp_path)
    assert len(here) == 6
    assert len(set(here[:3])) == 1, "the schedules differ"
    assert here[0].endswith(f" {3 * 4 * 6}")
    assert here[3:] == ["near array 'x': ... bytes past its end"] * 3
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("aarch64-linux-gnu-g++ and qemu-aarch64 are not both on PATH")
    for flags in ((), ("-DEMULATOR_PORTABLE_FIBERS=1",)):
        assert run([compiler], [emulator], tmp_path, "-static", *flags) == here
