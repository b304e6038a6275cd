"""Tensor maps: what is refused, what the emulator's struct holds, and the call that the driver gets."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cupyflash.backends import tensormap
from cupyflash.backends.tensormap import driver_map, emulated_map
from cupyflash.build.host import find_compiler
from cupyflash.build.source import kernels_folder
from cupyflash.errors import CupyflashError, Unsupported

# Stands for the driver: checks what it can, and writes its arguments into the map.
DRIVER = r"""
#include <cstdint>
#include <cstring>
struct Call {
  uint64_t address, dims[3], strides[2];
  uint32_t box[3], element_strides[3];
  int32_t type, rank, interleave, swizzle, promotion, fill;
};
static_assert(sizeof(Call) <= 128, "");
extern "C" int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                                      const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                      int interleave, int swizzle, int promotion, int fill) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || rank != 3) return 1;
  Call call{};
  call.address = reinterpret_cast<uint64_t>(address);
  std::memcpy(call.dims, dims, sizeof call.dims);
  std::memcpy(call.strides, strides, sizeof call.strides);
  std::memcpy(call.box, box, sizeof call.box);
  std::memcpy(call.element_strides, element_strides, sizeof call.element_strides);
  call.type = type, call.rank = static_cast<int32_t>(rank), call.interleave = interleave, call.swizzle = swizzle;
  call.promotion = promotion, call.fill = fill;
  std::memcpy(map, &call, sizeof call);
  return 0;
}
"""
CALL = np.dtype(
    [
        ("address", np.uint64),
        ("dims", np.uint64, 3),
        ("strides", np.uint64, 2),
        ("box", np.uint32, 3),
        ("element_strides", np.uint32, 3),
        *((name, np.int32) for name in ("type", "rank", "interleave", "swizzle", "promotion", "fill")),
    ]
)


@pytest.fixture
def driver(cxx: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    source, library = tmp_path / "driver.cpp", tmp_path / "libcuda.so"
    source.write_text(DRIVER, encoding="utf-8")
    subprocess.run([*find_compiler().command, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    encoder = tensormap._encoder
    monkeypatch.setattr(tensormap, "_encoder", lambda name: encoder(str(library)))
    driver_map.cache_clear()
    yield
    driver_map.cache_clear()
    encoder.cache_clear()


ADDRESS, SHAPE, STRIDES, BOX = 0x7F0000001000, (6, 200, 96), (51200, 256, 2), (1, 128, 64)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("dtype", "number"), [("float16", 6), ("bfloat16", 9)])
@pytest.mark.parametrize(("swizzle", "columns", "mode"), [(128, 64, 3), (64, 32, 2), (32, 16, 1), (0, 8, 0)])
def test_call_of_the_driver(dtype: str, number: int, swizzle: int, columns: int, mode: int) -> None:
    tensor_map = driver_map(ADDRESS, SHAPE, STRIDES, dtype, (1, 128, columns), swizzle)
    assert tensor_map.dtype == np.dtype("V128")
    call = np.frombuffer(tensor_map.tobytes(), CALL, 1)[0]
    assert call["address"] == ADDRESS
    np.testing.assert_array_equal(call["dims"], [96, 200, 6])
    np.testing.assert_array_equal(call["strides"], [256, 51200])
    np.testing.assert_array_equal(call["box"], [columns, 128, 1])
    np.testing.assert_array_equal(call["element_strides"], [1, 1, 1])
    assert (call["type"], call["rank"], call["interleave"], call["swizzle"]) == (number, 3, 0, mode)
    assert (call["promotion"], call["fill"]) == (3, 0)


@pytest.mark.usefixtures("driver")
def test_the_driver_refuses() -> None:
    with pytest.raises(CupyflashError, match=r"cuTensorMapEncodeTiled returned 1 for address=0x7f.*shape=\(1, 6, 200"):
        driver_map(ADDRESS, (1, *SHAPE), (0, *STRIDES), "float16", (1, *BOX))


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tensormap._encoder
    monkeypatch.setattr(tensormap, "_encoder", lambda name: encoder("libnothing-of-this-name.so.1"))
    with pytest.raises(Unsupported, match=r"need the CUDA driver, 12\.0 or later: libnothing"):
        driver_map(ADDRESS, SHAPE, STRIDES, "float16", (2, 128, 64))


def test_struct_of_the_emulator() -> None:
    layout = np.frombuffer(emulated_map(ADDRESS, SHAPE, STRIDES, "bfloat16", BOX).tobytes(), tensormap._LAYOUT)[0]
    assert (layout["address"], layout["rank"], layout["element_bytes"], layout["swizzle"]) == (ADDRESS, 3, 2, 3)
    np.testing.assert_array_equal(layout["extents"], [96, 200, 6, 0, 0])
    np.testing.assert_array_equal(layout["strides"], [256, 51200, 0, 0])
    np.testing.assert_array_equal(layout["box"], [64, 128, 1, 0, 0])


@pytest.mark.parametrize("stride", [0, 51200])
def test_axes_that_repeat_have_one_element(stride: int) -> None:
    shape = (6 if stride == 0 else 1, 200, 96)
    layout = np.frombuffer(emulated_map(ADDRESS, shape, (stride, 256, 2), "float16", BOX).tobytes(), tensormap._LAYOUT)
    np.testing.assert_array_equal(layout[0]["extents"], [96, 200, 1, 0, 0])


def test_a_tile_may_be_larger_than_an_axis() -> None:
    """Where there is one row its stride may be anything."""
    layout = emulated_map(ADDRESS, (6, 1, 96), (51200, 7, 2), "float16", BOX).tobytes()
    found = np.frombuffer(layout, tensormap._LAYOUT)[0]
    np.testing.assert_array_equal(found["extents"], [96, 1, 6, 0, 0])
    np.testing.assert_array_equal(found["box"], [64, 128, 1, 0, 0])


def test_maps_are_remembered() -> None:
    assert emulated_map(ADDRESS, SHAPE, STRIDES, "float16", BOX) is emulated_map(
        ADDRESS, SHAPE, STRIDES, "float16", BOX
    )
    assert emulated_map.cache_info().maxsize == driver_map.cache_info().maxsize == 1024


WRONG = {
    "dtype='float8' has no tensor map": {"dtype": "float8"},
    "swizzle=16; expected": {"swizzle": 16},
    "expected 3 to 5 axes": {"shape": SHAPE[1:], "strides": STRIDES[1:], "box": BOX[1:]},
    "is not a multiple of 16": {"address": ADDRESS + 8},
    "elements of the last axis must lie 2 bytes apart": {"strides": (51200, 256, 4)},
    r"a row has 256 bytes; expected a multiple of 16, at most the swizzle's 128": {"box": (1, 128, 128)},
    "a row has 4 bytes": {"box": (1, 128, 2)},
    "below 2\\*\\*40; copy the array first": {"strides": (51200, -256, 2)},
    "expected multiples of 16 above 0": {"strides": (51200, 264, 2)},
    "strides=.1099511627776": {"strides": (2**40, 256, 2)},
    "along an axis of stride 0 a tile has the size 1": {"strides": (0, 256, 2), "box": (2, 128, 64)},
    r"shape=\(6, 0, 96\): expected 1 to": {"shape": (6, 0, 96)},
    "expected 1 to 256 elements": {"box": (1, 257, 64)},
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("encode", [emulated_map, driver_map])
def test_what_tma_cannot_read_is_refused(message: str, encode: object) -> None:
    right = {"address": ADDRESS, "shape": SHAPE, "strides": STRIDES, "dtype": "float16", "box": BOX, "swizzle": 128}
    assert callable(encode)
    with pytest.raises(ValueError, match=message):
        encode(**{**right, **WRONG[message]})


def test_struct_is_that_of_the_emulator_s_header() -> None:
    """Names and order; the sizes are a static_assert there."""
    header = (kernels_folder() / "emulator/bulk.h").read_text(encoding="utf-8")
    struct = header[header.index("struct TensorLayout {") :].split("};")[0]
    assert tensormap._LAYOUT.names == tuple(re.findall(r"^  \S+ (\w+)(?:\[.*\])?;", struct, re.MULTILINE))
    assert tensormap._LAYOUT.itemsize == ctypes.sizeof(ctypes.c_uint64) * 16
    assert f"0x{tensormap._MARK:X}" in header
