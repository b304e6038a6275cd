"""Each function of the ISA layer, run by the emulator, against a NumPy model written from the tables of the
PTX ISA.

The models are stated the way the PTX ISA states them (element i of a fragment is at row ..., column ...), not
the way the emulator computes them (lane by lane).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cupyflash.backends.emulator import guarded_array, guarded_copy
from tests.kernels.conformance import gather_mma
from tests.kernels.harness import ALL_OPTIONS, probes

pytestmark = pytest.mark.usefixtures("cxx")

LANES = 32


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def run(file, name, *arrays, out, threads=LANES, shared_mem=0, grid=(1,), options=None):
    """Launches a probe over guarded copies of ``arrays``; returns the output, prefilled with ones."""
    result = guarded_array(out, np.uint32, "out")
    result[...] = 0xFFFFFFFF
    inputs = [guarded_copy(np.ascontiguousarray(array), f"input {i}") for i, array in enumerate(arrays)]
    probes(file).get_function(name)(grid, (threads,), (*inputs, result), shared_mem=shared_mem, options=options)
    return result


def words(*columns):
    """Columns of 32-bit values of any type, one row per lane, as words."""
    return np.stack([np.ascontiguousarray(column).view(np.uint32) for column in columns], axis=1)


def test_identity():
    grid = (3, 2, 2)
    out = run("probes.cu", "probe_identity", out=(12, 64, 9), threads=64, grid=grid)
    for block in range(12):
        thread = np.arange(64)
        index = (block % 3, block // 3 % 2, block // 6)
        expected = np.stack(
            [thread, thread // 32, thread % 32, *(np.full(64, value) for value in (*index, *grid))], axis=1
        )
        np.testing.assert_array_equal(out[block], expected)


SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    65504.0,
    65519.99,
    65520.0,
    2.0**-14,
    2.0**-24,
    2.0**-25,
    1e-40,
    -130.0,
]


def test_convert(rng):
    lower = rng.standard_normal(LANES).astype(np.float32) * np.float32(2.0) ** rng.integers(-24, 15, LANES)
    lower[: len(SPECIAL)] = SPECIAL
    # Halfway between two neighbours in each format, to see ties go to even.
    lower[13:17] = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8]
    lower = lower.astype(np.float32)
    upper = lower[::-1].copy()
    out = run("probes.cu", "probe_convert", words(lower, upper), out=(LANES, 4))

    with np.errstate(over="ignore"):
        expected = np.exp2(lower.astype(np.float64))
        expected = np.where(expected < 2.0**-126, 0.0, expected)
        np.testing.assert_allclose(out[:, 0].view(np.float32), expected.astype(np.float32), rtol=2.0**-22)
        for column, dtype in ((1, np.float16), (2, ml_dtypes.bfloat16), (3, np.float16)):
            bits = [np.where(np.isnan(x), 0x7FFF, x.astype(dtype).view(np.uint16)) for x in (lower, upper)]
            np.testing.assert_array_equal(out[:, column], bits[0].astype(np.uint32) | bits[1].astype(np.uint32) << 16)


def test_max():
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, -1.5, 1e-40], np.float32)
    for shift in range(len(special)):
        a, b = np.tile(special, 4), np.tile(np.roll(special, shift), 4)
        out = run("probes.cu", "probe_max", words(a, b), out=LANES)
        expected = np.where(a == b, np.where(np.signbit(a), b, a), np.maximum(a, b))  # of zeros the positive one
        expected = np.where(np.isnan(expected), 0x7FFFFFFF, expected.view(np.uint32))
        np.testing.assert_array_equal(out, expected.astype(np.uint32))


def test_unpack_all_values():
    """All 65536 patterns of both formats, 1024 in one block."""
    patterns = np.arange(65536, dtype=np.uint16)
    for chunk in np.split(patterns, 65536 // 1024):
        out = run("probes.cu", "probe_unpack", chunk.astype(np.uint32), out=(1024, 2), threads=1024)
        for column, dtype in ((0, np.float16), (1, ml_dtypes.bfloat16)):
            expected = chunk.view(dtype).astype(np.float32)
            found = out[:, column].view(np.float32)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_shuffle(rng):
    value = rng.integers(0, 2**32, LANES, dtype=np.uint32)
    value = np.where((value & 0x7F800000) == 0x7F800000, value & 0xBFFFFFFF, value)  # NaNs would not compare
    lane = np.arange(LANES)
    for operand in (
        rng.integers(0, 32, LANES).astype(np.uint32),
        *(np.full(LANES, n, np.uint32) for n in (0, 1, 16, 31)),
    ):
        out = run("probes.cu", "probe_shuffle", words(value, operand), out=(LANES, 6))
        n = operand.astype(np.int64)
        down = np.where(lane + n < LANES, lane + n, lane)
        expected = np.stack([value[lane ^ n], value[n], value[down]], axis=1)
        np.testing.assert_array_equal(out[:, :3], expected)
        np.testing.assert_array_equal(out[:, 3:], expected)


def test_shuffle_of_doubles(rng):
    value = rng.standard_normal(LANES)
    lane = np.arange(LANES)
    for operand in (rng.integers(0, 32, LANES).astype(np.uint32), *(np.full(LANES, n, np.uint32) for n in (0, 8, 31))):
        inputs = np.concatenate([value[:, None].view(np.uint32), operand[:, None]], axis=1)
        out = run("probes.cu", "probe_shuffle_double", inputs, out=(LANES, 2))
        np.testing.assert_array_equal(out.view(np.float64)[:, 0], value[lane ^ operand.astype(np.int64)])


@pytest.mark.parametrize("bits", [0, 1, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x12345678])
def test_vote(bits):
    predicate = (np.uint32(bits) >> np.arange(LANES, dtype=np.uint32)) & np.uint32(1)
    out = run("probes.cu", "probe_vote", predicate, out=(LANES, 3))
    np.testing.assert_array_equal(out, np.tile([bits, bits != 0, bits == 0xFFFFFFFF], (LANES, 1)))


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_memory(rng, options):
    data = rng.integers(0, 2**32, (LANES, 8), dtype=np.uint32)
    out = run("probes.cu", "probe_memory", data, out=(LANES, 8), shared_mem=1024, options=options)
    np.testing.assert_array_equal(out[:, :7], data[::-1, :7])
    assert (out[:, 7] == 0xFFFFFFFF).all()


def test_bytes(rng):
    data = rng.integers(0, 2**8, (LANES, 8), dtype=np.uint8)
    out = run("probes.cu", "probe_bytes", data, out=(LANES, 2)).view(np.uint8)
    np.testing.assert_array_equal(out[:, :7], data[:, :7])
    assert (out[:, 7] == 0xFF).all()


def test_halves(rng):
    data = rng.integers(0, 2**16, (LANES, 4), dtype=np.uint16)
    out = run("probes.cu", "probe_halves", data, out=(LANES, 2)).view(np.uint16)
    np.testing.assert_array_equal(out[:, :3], data[:, :3])
    assert (out[:, 3] == 0xFFFF).all()


def test_multiply_add(rng):
    a, b, c = rng.standard_normal((3, LANES)).astype(np.float32)
    c[: LANES // 2] = -(a * b)[: LANES // 2]  # a fused operation would leave the product's rounding error
    out = run("probes.cu", "probe_multiply_add", words(a, b, c), out=(LANES, 1)).view(np.float32)
    np.testing.assert_array_equal(out[:, 0], a * b + c)
    assert (out[: LANES // 2] == 0).all()


def test_atomics(rng):
    integers = rng.integers(0, 1000, LANES).astype(np.uint32)
    numbers = (-1 - rng.integers(0, 100, LANES)).astype(np.float32)
    for sign in (1, -1):  # a maximum of negative numbers, then of positive ones
        totals = guarded_copy(np.array([5, 0, 3, 0], np.uint32), "totals")
        totals[3] = np.float32(-np.inf).view(np.uint32)
        out = guarded_array(LANES, np.uint32, "out")
        operands = guarded_copy(words(integers, sign * numbers), "operands")
        probes("probes.cu").get_function("probe_atomics")((1,), (LANES,), (operands, totals, out))
        assert totals[0] == 5 + integers.sum()
        assert totals[1:2].view(np.float32)[0] == (sign * numbers).sum()  # small integers: exact in any order
        assert totals[2] == integers.max()
        assert totals[3:].view(np.float32)[0] == (sign * numbers).max()
        # Each lane saw a different partial sum.
        order = np.argsort(out)
        np.testing.assert_array_equal(out[order], 5 + np.concatenate([[0], np.cumsum(integers[order])[:-1]]))


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_cp_async(rng, options):
    data = rng.integers(0, 256, (LANES, 16), dtype=np.uint8)
    sizes = np.arange(LANES, dtype=np.uint32) % 17
    out = run("probes.cu", "probe_cp_async", data, sizes, out=(LANES, 4), shared_mem=512, options=options)
    expected = np.where(np.arange(16) < sizes[:, None], data, 0)
    np.testing.assert_array_equal(out.view(np.uint8), expected)


def matrix_fragment(matrices, transposed):
    """PTX ISA, ldmatrix: of each matrix, thread T gets the elements (T / 4, 2 (T % 4)) and its neighbour."""
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    return matrices.reshape(-1, LANES, 2).swapaxes(0, 1)  # lane, matrix, element


def test_ldmatrix(rng):
    data = rng.integers(0, 2**16, (64, 8), dtype=np.uint16)
    rows = rng.permutation(64)[:LANES].astype(np.uint32)
    out = run("probes.cu", "probe_ldmatrix", data, rows, out=(LANES, 14), shared_mem=1024)
    matrices = data[rows].reshape(4, 8, 8)
    for first, transposed in ((0, False), (7, True)):
        expected = np.ascontiguousarray(matrix_fragment(matrices, transposed)).view(np.uint32)[..., 0]
        np.testing.assert_array_equal(out[:, first], expected[:, 0])
        np.testing.assert_array_equal(out[:, first + 1 : first + 3], expected[:, :2])
        np.testing.assert_array_equal(out[:, first + 3 : first + 7], expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(rng, count, transposed):
    frag = rng.integers(0, 2**32, (LANES, 4), dtype=np.uint32)
    rows = rng.permutation(64)[:LANES].astype(np.uint32)
    name = f"probe_stmatrix_x{count}{'_trans' if transposed else ''}"
    out = run("probes_sm90.cu", name, frag, rows, out=256, shared_mem=1024).view(np.uint16).reshape(64, 8)
    elements = frag[:, :count].copy().view(np.uint16).reshape(LANES, count, 2)
    matrices = elements.swapaxes(0, 1).reshape(count, 8, 8)
    expected = np.zeros((64, 8), np.uint16)
    expected[rows[: 8 * count]] = (matrices.swapaxes(1, 2) if transposed else matrices).reshape(-1, 8)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_mma(rng, name):
    dtype = np.float16 if name == "f16" else ml_dtypes.bfloat16
    a = rng.standard_normal((LANES, 8)).astype(dtype)
    b = rng.standard_normal((LANES, 4)).astype(dtype)
    acc = rng.standard_normal((LANES, 4)).astype(np.float32)
    operands = np.concatenate([a.view(np.uint32), b.view(np.uint32), acc.view(np.uint32)], axis=1)
    out = run("probes.cu", f"probe_mma_{name}", operands, out=(LANES, 4)).view(np.float32)
    wide = (x.astype(np.float64) for x in (a, b, acc))
    matrix_a, matrix_b, matrix_c, place_c = gather_mma(*wide)
    expected = (matrix_c + matrix_a @ matrix_b)[place_c]
    # 17 additions in float: at most 17 half-ulps of the sum of magnitudes.
    bound = 17 * 2.0**-24 * (np.abs(matrix_c) + np.abs(matrix_a) @ np.abs(matrix_b))[place_c]
    assert (np.abs(out - expected) <= bound).all()


def test_mma_k8(rng):
    """PTX ISA, mma.m16n8k8: a0, a1 at row T / 4, a2, a3 at T / 4 + 8; b0, b1 at rows 2 (T % 4) and + 1."""
    a, b = (rng.standard_normal((LANES, n)).astype(np.float16) for n in (4, 2))
    acc = rng.standard_normal((LANES, 4)).astype(np.float32)
    operands = np.concatenate([a.view(np.uint32), b.view(np.uint32), acc.view(np.uint32)], axis=1)
    out = run("probes.cu", "probe_mma_k8", operands, out=(LANES, 4)).view(np.float32)
    # The fragments of m16n8k16 with nothing in the second half of k.
    wide_a, wide_b = np.zeros((LANES, 8)), np.zeros((LANES, 4))
    wide_a[:, :4], wide_b[:, :2] = a, b
    matrix_a, matrix_b, matrix_c, place_c = gather_mma(wide_a, wide_b, acc.astype(np.float64))
    expected = (matrix_c + matrix_a @ matrix_b)[place_c]
    bound = 9 * 2.0**-24 * (np.abs(matrix_c) + np.abs(matrix_a) @ np.abs(matrix_b))[place_c]
    assert (np.abs(out - expected) <= bound).all()


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_named_barrier(options):
    out = run("probes.cu", "probe_named_barrier", out=(2, LANES), threads=128, shared_mem=512, options=options)
    thread = np.arange(32, 128).reshape(3, LANES)
    np.testing.assert_array_equal(out, [thread.sum(0), (thread + 1000).sum(0)])


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_sync_warp(options):
    out = run("probes.cu", "probe_sync_warp", out=LANES, shared_mem=128, options=options)
    np.testing.assert_array_equal(out, (np.arange(LANES) + 3) % LANES)
