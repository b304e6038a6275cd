"""What the driver accepts, and how it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from cupyflash.backends.emulator import EmulatorError, Options, guarded_array, guarded_copy
from cupyflash.errors import KernelCompileError
from tests.kernels.harness import compiled, line_of, source_of

pytestmark = pytest.mark.usefixtures("cxx")

ECHO = r"""
#include "isa.cuh"
struct Pair {
  int first;
  float second;
};
extern "C" __global__ void echo(u32* out, const __grid_constant__ Pair pair, float number, long long wide,
                                double real, const u32* none, short narrow) {
  if (isa::thread_index() != 0) return;
  isa::stg_4(out, static_cast<u32>(pair.first));
  isa::stg_4(out + 1, isa::float_bits(pair.second));
  isa::stg_4(out + 2, isa::float_bits(number));
  isa::stg_4(out + 3, static_cast<u32>(wide >> 32));
  isa::stg_4(out + 4, isa::float_bits(static_cast<float>(real)));
  isa::stg_4(out + 5, none == nullptr);
  isa::stg_4(out + 6, static_cast<u32>(narrow));
}
extern "C" __global__ void nothing() {}
"""
PAIR = np.dtype([("first", np.int32), ("second", np.float32)])


def echo(*arguments, grid=(1,), block=(32,), **keywords):
    return compiled(ECHO).get_function("echo")(grid, block, arguments, **keywords)


def arguments(out):
    return [out, np.array((-3, 0.5), PAIR)[()], np.float32(1.25), 7 << 32, 2.5, None, np.int16(9)]


def test_arguments():
    out = guarded_array(7, np.uint32, "out")
    echo(*arguments(out))
    assert out.view(np.int32)[[0, 3, 5, 6]].tolist() == [-3, 7, 1, 9]
    assert out.view(np.float32)[[1, 2, 4]].tolist() == [0.5, 1.25, 2.5]


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (2, 1.25, ValueError, r"args\[2\] is 1\.25 of 8 bytes, the kernel's parameter has 4"),
        (1, np.float32(0), ValueError, r"args\[1\] is .* of 4 bytes, the kernel's parameter has 8"),
        (0, "text", TypeError, r"args\[0\] is a str; expected a NumPy array or scalar"),
    ],
)
def test_wrong_argument(position, value, error, message):
    values = arguments(guarded_array(7, np.uint32, "out"))
    values[position] = value
    with pytest.raises(error, match=message):
        echo(*values)


def test_wrong_launch():
    values = arguments(guarded_array(7, np.uint32, "out"))
    with pytest.raises(ValueError, match="takes 7 arguments, args has 6"):
        echo(*values[:6])
    with pytest.raises(ValueError, match=r"block=\(32, 2\): kernels run in one dimension"):
        echo(*values, block=(32, 2))
    with pytest.raises(ValueError, match=r"grid=\(1, 1, 1, 1\) has 4 dimensions"):
        echo(*values, grid=(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"grid=\(-1,\): every number of blocks is between 0 and"):
        echo(*values, grid=(-1,))
    with pytest.raises(EmulatorError, match="a multiple of 32, not 33"):
        echo(*values, block=(33,))
    with pytest.raises(EmulatorError, match="32 to 1024 threads, a multiple of 32, not 2048"):
        echo(*values, block=(2048,))
    with pytest.raises(EmulatorError, match="at most 232448 bytes of shared memory, not 232449"):
        echo(*values, shared_mem=232449)
    with pytest.raises(EmulatorError, match="the grid is empty"):
        echo(*values, grid=(0,))
    with pytest.raises(ValueError, match="name='other' is no entry of test; it has echo, nothing"):
        compiled(ECHO).get_function("other")
    with pytest.raises(ValueError, match="schedule must be one of fifo, random, priority, but was 'fair'"):
        Options(schedule="fair")
    with pytest.raises(ValueError, match="workers must be at least 1, but was 0"):
        Options(workers=0)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*64\), but was -1"):
        Options(seed=-1)


def test_no_arguments():
    assert compiled(ECHO).get_function("nothing")((2, 3), (64,), ()).blocks == 6


def test_compile_error_names_the_line():
    text = r"""
#include "isa.cuh"
extern "C" __global__ void broken(u32* out) {
  isa::stg_5(out, 1);  // here
}
"""
    with pytest.raises(KernelCompileError) as caught:
        compiled(text, "broken.cu")
    assert f"broken.cu:{line_of(text, '// here')}" in caught.value.log
    assert "stg_5" in str(caught.value)


def test_guarded_arrays():
    for flush in ("start", "end"):
        for dtype, count in (
            (np.uint8, 1),
            (np.float16, 3),
            (np.float32, 1024),
            (np.float64, 0),
            (np.float32, 7),
        ):
            array = guarded_array((count, 2), dtype, "a", flush=flush)
            assert array.shape == (count, 2)
            assert array.dtype == dtype
            assert not array.any()
            array[...] = 1
            assert array.ctypes.data % array.itemsize == 0
    source = np.arange(12.0).reshape(3, 4).T
    copy = guarded_copy(source, "copy")
    assert copy.flags.c_contiguous
    np.testing.assert_array_equal(copy, source)
    with pytest.raises(ValueError, match="flush='middle'"):
        guarded_array(1, np.uint8, "a", flush="middle")


def test_a_view_keeps_the_memory():
    view = guarded_array(1000, np.float32, "a")[10:20]
    view[...] = 3
    assert view.sum() == 30


def test_modules_do_not_share_symbols():
    """Two modules with an entry of one name, which is also a function of the C library."""
    text = r"""
#include "isa.cuh"
extern "C" __global__ void write(u32* out) { isa::stg_4(out + isa::lane_index(), %d); }
"""
    out = guarded_array(32, np.uint32, "out")
    for value in (1, 2):
        compiled(text % value).get_function("write")((1,), (32,), (out,))
        assert (out == value).all()


def test_portable_fibers_give_the_same(monkeypatch):
    """The ucontext switch, which machines other than x86-64 and AArch64 use, under the same kernel."""
    from cupyflash.backends.emulator import Module

    text = r"""
#include "isa.cuh"
extern "C" __global__ void ring(u32* out) {
  u32 value = static_cast<u32>(isa::thread_index());
  for (int i = 0; i < 5; ++i) {
    isa::st_shared_4(isa::shared_base() + 4 * isa::thread_index(), value);
    isa::sync_threads();
    value = 3 * isa::ld_shared_4(isa::shared_base() + 4 * ((isa::thread_index() + 33) % 96)) + 1;
    isa::sync_threads();
  }
  isa::stg_4(out + isa::thread_index(), value);
}
"""
    results = []
    for fibers in ("", "portable"):
        monkeypatch.setenv("CUPYFLASH_EMULATOR_FIBERS", fibers)
        out = guarded_array(96, np.uint32, "out")
        ring = Module(source_of(text)).get_function("ring")
        for options in (Options(), Options(schedule="priority", seed=2)):
            out[...] = 0
            ring((1,), (96,), (out,), shared_mem=384, options=options)
            results.append(out.copy())
        with pytest.raises(EmulatorError, match="illegal access to global memory"):
            ring((1,), (96,), (None,), shared_mem=384)
    for result in results:
        np.testing.assert_array_equal(result, results[0])
