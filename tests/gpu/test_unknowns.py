"""What nobody had measured when the kernels were designed, each as a test that prints what it found.

A draft: compiled for sm_90, but nobody has run it on a GPU yet.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupyflash.build.cache import Cache
from cupyflash.build.nvrtc import compile_cubin
from tests.gpu.device import Gpu, load
from tests.kernels.harness import source_of

pytestmark = pytest.mark.gpu

Measured = Callable[[str, str], None]

EMPTY = r"""
#include "isa.cuh"
extern "C" __global__ void add_one(u32* x) {
  if (isa::thread_index() == 0) isa::stg_4(x, isa::ldg_4(x) + 1);
}
"""

# A box of 8 x 32 floats by the bulk tensor copy engine, from a tensor map that came by value.
TENSOR_MAP = r"""
#include "types.cuh"
extern "C" __global__ void copy_box(const __grid_constant__ TensorMap map, float* out, int column, int row) {
  __shared__ alignas(128) float box[8 * 32];
  __shared__ alignas(8) unsigned long long barrier;
  const u32 box_smem = static_cast<u32>(__cvta_generic_to_shared(box));
  const u32 barrier_smem = static_cast<u32>(__cvta_generic_to_shared(&barrier));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier_smem) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier_smem), "r"(1024) : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(box_smem), "l"(&map), "r"(column), "r"(row), "r"(barrier_smem) : "memory");
  }
  __syncthreads();
  asm volatile(
      "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra wait;\n}"
      ::"r"(barrier_smem) : "memory");
  for (int i = threadIdx.x; i < 8 * 32; i += blockDim.x) out[i] = box[i];
}
"""

# Each launch waits for the one before it only where it needs its result.
DEPENDENT = r"""
#include "types.cuh"
extern "C" __global__ void dependent(u32* x) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x == 0) *x += 1;
}
"""


def microseconds(run: Callable[[], None], cupy: Any, calls: int, rounds: int = 7) -> str:
    """Host time for a call of ``run`` with an idle queue before each round: median, least and largest of the rounds."""
    samples = []
    for _ in range(rounds + 1):  # the first warms up
        cupy.cuda.Device().synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append(1e6 * (time.perf_counter() - started) / calls)
    return spread(samples[1:])


def spread(samples: list[float]) -> str:
    return f"{statistics.median(samples):.2f} µs ({min(samples):.2f} to {max(samples):.2f})"


def device_microseconds(run: Callable[[], None], cupy: Any, calls: int, rounds: int = 7) -> str:
    """Time on the current stream for a call of ``run``."""
    samples = []
    for _ in range(rounds + 1):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        samples.append(1e3 * cupy.cuda.get_elapsed_time(start, end) / calls)
    return spread(samples[1:])


def test_load_of_a_cubin(gpu: Gpu, cupy: Any, measured: Measured, tmp_path: Path) -> None:
    """``RawModule(path=)`` takes our cubins; and what a load costs when nothing has cached it."""
    binary = compile_cubin(source_of(EMPTY), gpu.arch, Cache(tmp_path / "cache"))
    x = cupy.zeros(1, np.uint32)
    samples = []
    for number in range(9):
        path = tmp_path / f"{number}.cubin"
        shutil.copy(binary.path, path)
        started = time.perf_counter()
        kernel = cupy.RawModule(path=str(path)).get_function("add_one")
        kernel.kernel  # noqa: B018  the module is loaded when the kernel is first asked for
        samples.append(1e6 * (time.perf_counter() - started))
        kernel((1,), (32,), (x,))
    assert int(x[0]) == 9
    measured("RawModule(path=) load", spread(samples[1:]))
    # What runs here ran; a newer NVRTC than the driver's CUDA is the case that was in doubt.
    measured("cubin loads", f"NVRTC {gpu.nvrtc} on driver {gpu.driver}, which knows CUDA {gpu.cuda}")


def test_time_of_a_launch(gpu: Gpu, cupy: Any, measured: Measured) -> None:
    kernel = load(source_of(EMPTY), gpu).get_function("add_one")
    x = cupy.zeros(1, np.uint32)
    arguments = (x,)
    # 500 launches do not fill the queue, whose end a launch would wait for.
    measured("RawKernel launch, host", microseconds(lambda: kernel((1,), (32,), arguments), cupy, 500))
    measured("RawKernel launch, stream", device_microseconds(lambda: kernel((1,), (32,), arguments), cupy, 500))
    assert int(x[0]) == 2 * 8 * 500


def test_graph_replay(gpu: Gpu, cupy: Any, measured: Measured) -> None:
    kernel = load(source_of(EMPTY), gpu).get_function("add_one")
    x = cupy.zeros(1, np.uint32)
    kernel((1,), (32,), (x,))
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for _ in range(20):
            kernel((1,), (32,), (x,))
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        assert int(x[0]) == 21
        measured("graph replay of 20 launches, host", microseconds(lambda: graph.launch(stream), cupy, 20))
        measured("graph replay of 20 launches, stream", device_microseconds(lambda: graph.launch(stream), cupy, 20))


def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(status: int) -> None:
    assert status == 0, f"CUresult {status}"


# From cuda.h.
DATA_TYPE_FLOAT32 = 7
ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6


def encode_tiled(address: int, shape: tuple[int, int], box: tuple[int, int]) -> np.ndarray:
    """cuTensorMapEncodeTiled for a C-contiguous matrix of float32; 128 bytes, 64-byte aligned."""
    memory = np.zeros(256, np.uint8)
    start = -memory.ctypes.data % 64
    tensor_map = memory[start : start + 128]
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(tensor_map.ctypes.data),
        ctypes.c_int(DATA_TYPE_FLOAT32),
        ctypes.c_uint32(2),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(shape[1], shape[0]),  # the innermost axis first
        (ctypes.c_uint64 * 1)(4 * shape[1]),
        (ctypes.c_uint32 * 2)(box[1], box[0]),
        (ctypes.c_uint32 * 2)(1, 1),
        *(ctypes.c_int(0) for _ in range(4)),  # no interleave, swizzle, L2 promotion; zeros outside
    )
    check(status)
    return tensor_map


def test_tensor_map_by_value(gpu: Gpu, cupy: Any, measured: Measured) -> None:
    if gpu.capability < 90:
        pytest.skip(f"gpu: tensor maps need sm_90, this is {gpu.arch}")
    x = cupy.arange(64 * 128, dtype=np.float32).reshape(64, 128)
    out = cupy.full((8, 32), np.nan, np.float32)
    tensor_map = encode_tiled(x.data.ptr, x.shape, out.shape)
    kernel = load(source_of(TENSOR_MAP), gpu).get_function("copy_box")
    by_value = tensor_map.view("V128")  # CuPy passes an array of one structure by value
    for row, column in ((0, 0), (16, 96), (60, 112)):  # the last sticks out: zeros
        kernel((1,), (32,), (by_value, out, np.int32(column), np.int32(row)))
        expected = np.zeros((8, 32), np.float32)
        inside = x[row : row + 8, column : column + 32].get()
        expected[: inside.shape[0], : inside.shape[1]] = inside
        np.testing.assert_array_equal(out.get(), expected)
    measured("tensor map by value", "right, with 64-byte alignment on the host")
    encode = lambda: encode_tiled(x.data.ptr, x.shape, (8, 32))  # noqa: E731
    measured("tensor map, encoded by ctypes", microseconds(encode, cupy, 200))


class _AttributeValue(ctypes.Union):
    _fields_ = (("pad", ctypes.c_char * 64), ("programmatic_stream_serialization", ctypes.c_int))


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _AttributeValue))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


def test_programmatic_dependent_launch(gpu: Gpu, cupy: Any, measured: Measured) -> None:
    """cuLaunchKernelEx by ctypes, with and without the attribute: the same result, and the times of both."""
    if gpu.capability < 90:
        pytest.skip(f"gpu: programmatic dependent launch needs sm_90, this is {gpu.arch}")
    kernel = load(source_of(DEPENDENT), gpu).get_function("dependent")
    x = cupy.zeros(1, np.uint32)
    launch = driver().cuLaunchKernelEx
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    attribute = _Attribute(id=ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
    attribute.value.programmatic_stream_serialization = 1
    pointer = ctypes.c_uint64(x.data.ptr)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(pointer))
    function = ctypes.c_void_p(kernel.kernel.ptr)
    for name, count in (("without", 0), ("with", 1)):
        config = _Config((1, 1, 1), (32, 1, 1), 0, stream.ptr, ctypes.pointer(attribute), count)

        def run(config: _Config = config) -> None:
            check(launch(ctypes.byref(config), function, arguments, None))

        with stream:
            x.fill(0)
            measured(f"cuLaunchKernelEx {name} PDL, host", microseconds(run, cupy, 200))
            measured(f"cuLaunchKernelEx {name} PDL, stream", device_microseconds(run, cupy, 200))
            assert int(x[0]) == 2 * 8 * 200
