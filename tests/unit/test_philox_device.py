"""kernels_cu/philox.cuh, compiled by the host's C++ compiler, against published answers and dropout_mask."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest

import cupyflash
from cupyflash.build.source import kernels_folder

SHIM = """
#define __device__
#define __forceinline__ inline
#include "philox.cuh"

using u32 = unsigned int;
using u64 = unsigned long long;

extern "C" void philox(const u32* counter, const u32* key, u32* words) {
  const PhiloxWords drawn = philox4x32_10(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  for (int i = 0; i < 4; ++i) words[i] = drawn.words[i];
}

extern "C" u32 word_at(u64 seed, u64 bh, u32 row, u32 col) {
  return dropout_words(seed, bh, row, col).words[dropout_word_index(row, col)];
}

extern "C" bool keep_one(u64 seed, u64 bh, u32 row, u32 col, u32 threshold) {
  return dropout_keep(seed, bh, row, col, threshold);
}

extern "C" void keep_each(u64 seed, u64 bh, u32 rows, u32 cols, u32 threshold, unsigned char* kept) {
  for (u32 row = 0; row < rows; ++row)
    for (u32 col = 0; col < cols; ++col)
      kept[row * cols + col] = dropout_keep(seed, bh, row, col, threshold);
}

// As a kernel does it, one call for every lane's 2 x 2; rows and cols are multiples of 16 and 2.
extern "C" void keep_by_lanes(u64 seed, u64 bh, u32 rows, u32 cols, u32 threshold, unsigned char* kept) {
  for (u32 tile = 0; tile < rows; tile += 16)
    for (u32 row = tile; row < tile + 8; ++row)
      for (u32 col = 0; col < cols; col += 2) {
        const PhiloxWords drawn = dropout_words(seed, bh, row, col);
        kept[row * cols + col] = drawn.words[0] >= threshold;
        kept[row * cols + col + 1] = drawn.words[1] >= threshold;
        kept[(row + 8) * cols + col] = drawn.words[2] >= threshold;
        kept[(row + 8) * cols + col + 1] = drawn.words[3] >= threshold;
      }
}
"""

# Random123 (D. E. Shaw Research), tests/kat_vectors, the rows "philox4x32 10": counter, key, words. The third
# counter and key are the hexadecimal digits of pi.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.fixture(scope="module")
def device(cxx: list[str], tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The shim as a shared library. -nostdinc proves that the header needs no standard header."""
    folder = tmp_path_factory.mktemp("philox")
    source, library = folder / "shim.cpp", folder / "shim.so"
    source.write_text(SHIM, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-nostdinc", "-shared", "-fPIC"]
    command = [*cxx, *flags, f"-I{kernels_folder()}", str(source), "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    element = [ctypes.c_ulonglong, ctypes.c_ulonglong, ctypes.c_uint, ctypes.c_uint]
    loaded.keep_each.argtypes = loaded.keep_by_lanes.argtypes = [*element, ctypes.c_uint, ctypes.c_void_p]
    loaded.keep_one.argtypes = [*element, ctypes.c_uint]
    loaded.keep_one.restype = ctypes.c_bool
    loaded.word_at.argtypes = element
    loaded.word_at.restype = ctypes.c_uint
    return loaded


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, written from the paper's equations."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def contract_word(seed: int, bh: int, row: int, col: int) -> int:
    """The word of one element by the counter contract."""
    counter = [col >> 1, ((row >> 4) << 3) | (row & 7), bh % 2**32, bh >> 32]
    return philox_words(counter, [seed % 2**32, seed >> 32])[2 * ((row >> 3) & 1) + (col & 1)]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(device: ctypes.CDLL, counter: str, key: str, expected: str) -> None:
    inputs = [np.array([int(word, 16) for word in text.split()], np.uint32) for text in (counter, key)]
    words = np.zeros(4, np.uint32)
    device.philox(*(array.ctypes.data_as(ctypes.c_void_p) for array in (*inputs, words)))
    assert " ".join(f"{word:08x}" for word in words) == expected
    assert words.tolist() == philox_words(*(array.tolist() for array in inputs))


@pytest.mark.parametrize("seed", [0, 1, 0x0123_4567_89AB_CDEF, 2**64 - 1])
@pytest.mark.parametrize("bh", [0, 7, 2**32 + 5])
def test_counter_contract(device: ctypes.CDLL, seed: int, bh: int) -> None:
    for row, col in [
        (0, 0),
        (0, 1),
        (8, 0),
        (8, 1),
        (7, 6),
        (15, 9),
        (16, 2),
        (1000, 77),
        (2**31 + 9, 2**32 - 1),
    ]:
        expected = contract_word(seed, bh, row, col)
        assert device.word_at(seed, bh, row, col) == expected
        assert device.keep_one(seed, bh, row, col, expected)
        assert not device.keep_one(seed, bh, row, col, expected + 1)


@pytest.mark.parametrize("function", ["keep_each", "keep_by_lanes"])
@pytest.mark.parametrize("seed", [0, 42, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.999])
def test_same_mask_as_dropout_mask(device: ctypes.CDLL, function: str, seed: int, dropout_p: float) -> None:
    batch, heads, rows, cols = shape = (2, 3, 48, 34)
    kept = np.zeros(shape, np.bool_)
    threshold = int(dropout_p * 2**32)
    for bh in range(batch * heads):
        matrix = kept.reshape(-1, rows, cols)[bh]
        getattr(device, function)(seed, bh, rows, cols, threshold, matrix.ctypes.data)
    np.testing.assert_array_equal(kept, cupyflash.dropout_mask(shape, dropout_p, seed))
