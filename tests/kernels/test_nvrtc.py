"""Cubins without a GPU: compiling, caching, and what can be read from the result."""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cupyflash.build import nvrtc as nvrtc_module
from cupyflash.build.cache import Cache
from cupyflash.build.nvrtc import OPCODES, compile_cubin, read_cubin
from cupyflash.errors import KernelCompileError, Unsupported
from tests.kernels.harness import HERE, line_of, source_of

pytestmark = pytest.mark.usefixtures("nvrtc")

SPILL = r"""
#include "isa.cuh"
extern "C" __global__ void indexed(u32* out, int i) {
  u32 local[32];
  for (int j = 0; j < 32; ++j) local[j] = out[j];
  for (int j = 0; j < 9; ++j) local[(i * j) % 32] += local[out[j] % 32];
  out[0] = local[i];
}
// Loads stay before the barrier: 96 values must be held where 64 registers are.
extern "C" __global__ void __launch_bounds__(1024) spilled(u32* x) {
  u32 held[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) held[i] = isa::ldg_4(x + 32 * i);
  isa::sync_threads();
#pragma unroll
  for (int i = 0; i < 96; ++i) isa::stg_4(x + 32 * i, held[95 - i]);
}
"""

# What the probes lack: arithmetic in float64, maxima of three, loads and stores of every kind.
ARITHMETIC = r"""
extern "C" __global__ void arithmetic(float* floats, double* doubles, int n) {
  __shared__ float shared[256];
  const int i = threadIdx.x;
  float a = floats[i], b = floats[i + 32], c = floats[i + 64];
  double x = doubles[i], y = doubles[i + 32], z = doubles[i + 64];
  shared[i] = a;
  __syncthreads();
  for (int j = 0; j < n; ++j) {
    a = a * b + shared[j];
    b = fmaxf(fmaxf(a, b), c) + exp2f(c);
    c = (c + a) * b;
    x = x * y + z;
    y = x * y;
    z = z + y;
  }
  floats[i] = fminf(a, __shfl_xor_sync(~0u, c, 1));
  doubles[i] = x + y + z;
}
"""


def probes():
    return source_of((HERE / "probes.cu").read_text(encoding="utf-8"), "probes.cu")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_probes(tmp_path, arch):
    binary = compile_cubin(probes(), arch, Cache(tmp_path))
    assert set(binary.resources) == set(probes().entries)
    assert binary.notices == ()
    for name, resources in binary.resources.items():
        assert 4 <= resources.registers <= 64, name
        assert resources.stack_bytes == resources.spill_stores == resources.spill_loads == 0, name
    assert binary.resources["probe_mma_f16"].opcodes["HMMA"] == 1
    assert binary.resources["probe_ldmatrix"].opcodes["LDSM"] == 6
    assert binary.resources["probe_cp_async"].opcodes["LDGSTS"] == 1


def test_local_memory_is_seen(tmp_path):
    resources = compile_cubin(source_of(SPILL), "sm_80", Cache(tmp_path)).resources
    indexed, spilled = resources["indexed"], resources["spilled"]
    assert indexed.stack_bytes == 128
    assert indexed.spill_stores == 0  # an array indexed by a variable is no spill, and yet lies in slow memory
    assert indexed.opcodes["STL"] >= 8
    assert spilled.spill_stores > 0
    assert spilled.spill_loads > 0
    assert spilled.registers == 64


def test_cached(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    first = compile_cubin(probes(), "sm_80", cache)
    monkeypatch.setattr(nvrtc_module._Nvrtc, "compile", None)
    assert compile_cubin(probes(), "sm_80", cache) == first
    with pytest.raises(TypeError):
        compile_cubin(probes(), "sm_90", cache)


def test_compile_error_names_the_line(tmp_path):
    text = '#include "isa.cuh"\n\nextern "C" __global__ void broken(u32* out) { isa::stg_5(out); }  // here\n'
    with pytest.raises(KernelCompileError) as caught:
        compile_cubin(source_of(text, "broken.cu"), "sm_80", Cache(tmp_path))
    assert f"broken.cu({line_of(text, '// here')}): error" in caught.value.log


def test_missing_nvrtc(monkeypatch):
    nvrtc_module._nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(Unsupported, match=r"cuda-pathfinder is not installed; pip install 'cupyflash\[nvrtc\]'"):
        nvrtc_module.nvrtc_version()
    monkeypatch.undo()
    nvrtc_module._nvrtc.cache_clear()
    nvrtc_module.nvrtc_version()


def test_not_a_cubin():
    with pytest.raises(ValueError, match="not a cubin"):
        read_cubin(b"MZ")


def nvdisasm():
    found = shutil.which("nvdisasm")
    if found is None:
        import nvidia

        wheels = (path for folder in nvidia.__path__ for path in Path(folder).glob("*/bin/nvdisasm"))
        found = next((str(path) for path in wheels), None)
    return found


OF_SM90 = {"STSM", "HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"}  # in the probes for sm_90a
OF_SM80 = {"HMMA", "LDSM", "LDGSTS", "F2FP", "LDL", "STL"}  # in the probes, which sm_75 can't all run


def sources_for(arch):
    yield source_of(ARITHMETIC)
    if arch != "sm_75":
        yield probes()
        yield source_of(SPILL)
    if arch == "sm_90a":
        for file in ("probes_sm90.cu", "probes_sm90a.cu"):
            yield source_of((HERE / file).read_text(encoding="utf-8"), file)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_opcodes_agree_with_nvdisasm(tmp_path, arch, require):
    program = require("nvrtc", nvdisasm(), "nvdisasm is not installed")
    seen = set()
    for source in sources_for(arch):
        binary = compile_cubin(source, arch, Cache(tmp_path))
        run = subprocess.run([program, "-c", str(binary.path)], capture_output=True, text=True, check=True)
        for part in re.split(r"\n\s*\.section\s+\.text\.", run.stdout)[1:]:
            name = re.match(r"\w+", part)
            assert name is not None
            words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", part)
            counted = collections.Counter(word for word in words if word in OPCODES.values())
            assert len(words) > 4
            assert counted == binary.resources[name[0]].opcodes
            assert len(words) - words.count("NOP") == binary.resources[name[0]].instructions
            seen.update(counted)
    lacking = {"sm_75": OF_SM80 | OF_SM90 | {"FMNMX3"}, "sm_90a": {"FMNMX3"}, "sm_100": OF_SM90}
    assert set(OPCODES.values()) - seen == lacking.get(arch, OF_SM90 | {"FMNMX3"})
