"""As test_isa.py, for sm_90: mbarriers, bulk copies of tiles, products of warpgroups."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cupyflash.backends import emulator
from cupyflash.backends.emulator import EmulatorError, Module, guarded_array, guarded_copy
from cupyflash.build.cache import default_cache
from cupyflash.build.host import build_runtime
from cupyflash.build.source import kernels_folder
from tests.kernels.harness import ALL_OPTIONS, HERE, probes, source_of
from tests.kernels.hopper import (
    a_fragments,
    accumulator_places,
    map_of,
    operand_offsets,
    place_operand,
    swizzled,
    tile_of,
    wgmma_operands,
)

pytestmark = pytest.mark.usefixtures("cxx")


@pytest.fixture
def rng():
    return np.random.default_rng(20)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_elect_one(options):
    out = guarded_array((2, 32), np.uint32, "out")
    probes("probes_sm90.cu").get_function("probe_elect_one")((1,), (64,), (out,), options=options)
    np.testing.assert_array_equal(out.sum(1), 1)
    np.testing.assert_array_equal(out[0], out[1])


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_mbarrier(rng, options):
    value = guarded_copy(rng.integers(0, 1000, 32, dtype=np.uint32), "in")
    out = guarded_array(32, np.uint32, "out")
    kernel = probes("probes_sm90.cu").get_function("probe_mbarrier")
    kernel((1,), (64,), (value, out), shared_mem=256, options=options)
    np.testing.assert_array_equal(out, (value * 3 + value + 1) * 3 + value + 2)


def test_nanosleep():
    out = guarded_array(64, np.uint32, "out")
    probes("probes_sm90.cu").get_function("probe_nanosleep")((1,), (64,), (out,))
    np.testing.assert_array_equal(out, np.arange(64))


# array's shape, box, first element, swizzle
TILES = [
    ((3, 20, 64), (1, 16, 64), (1, 0, 0), 128),
    ((3, 20, 64), (1, 16, 64), (2, 10, 0), 128),  # rows past the end
    ((3, 20, 64), (1, 16, 64), (0, -5, 0), 128),  # and before the start
    ((3, 20, 96), (1, 16, 64), (1, 3, 64), 128),  # columns past the end
    ((3, 20, 64), (1, 16, 64), (3, 0, 0), 128),  # nothing is there
    ((2, 3, 9, 128), (1, 1, 8, 64), (1, 2, 1, 64), 128),
    ((2, 3, 9, 128), (2, 3, 8, 32), (0, 0, 0, 16), 64),
    ((2, 2, 3, 9, 64), (1, 2, 1, 8, 64), (1, 0, 2, 4, 0), 128),
    ((2, 2, 3, 9, 64), (2, 1, 3, 8, 16), (0, 1, 0, -3, 8), 32),
    ((3, 20, 40), (2, 16, 24), (0, 1, 4), 0),
]


def run_load(module, array, box, at, swizzle, options=None):
    """Bytes of shared memory after a bulk load."""
    out = guarded_array(int(np.prod(box)) * array.itemsize, np.uint8, "out")
    coordinates = np.array(at[::-1], np.int32)
    arguments = (map_of(array, box, swizzle), coordinates, out, np.int32(out.size // 4))
    kernel = module.get_function(f"probe_bulk_load_{len(box)}")
    kernel((1,), (32,), arguments, shared_mem=1024 + out.size, options=options)
    return out


@pytest.mark.parametrize(("shape", "box", "at", "swizzle"), TILES)
@pytest.mark.parametrize("options", ALL_OPTIONS[:4], ids=repr)
def test_bulk_load(rng, shape, box, at, swizzle, options):
    array = guarded_copy(rng.integers(0, 2**16, shape, dtype=np.uint16).view(np.float16), "array")
    out = run_load(probes("probes_sm90.cu"), array, box, at, swizzle, options)
    expected = swizzled(tile_of(array, at, box).reshape(-1).view(np.uint8), swizzle)
    np.testing.assert_array_equal(out, expected)


def test_bulk_load_of_strides(rng):
    """Axes in another order, and one that repeats its elements: its coordinate is 0."""
    array = guarded_copy(rng.standard_normal((20, 3, 64)).astype(np.float32), "array")
    turned = array.transpose(1, 0, 2)
    out = run_load(probes("probes_sm90.cu"), turned, (1, 8, 32), (2, 5, 32), 128)
    np.testing.assert_array_equal(swizzled(out, 128), turned[2, 5:13, 32:].copy().reshape(-1).view(np.uint8))
    repeated = np.broadcast_to(array[:, 1], (7, 20, 64))
    out = run_load(probes("probes_sm90.cu"), repeated, (1, 8, 32), (0, 5, 32), 128)
    np.testing.assert_array_equal(swizzled(out, 128), array[5:13, 1, 32:].copy().reshape(-1).view(np.uint8))


@pytest.mark.parametrize(("shape", "box", "at", "swizzle"), TILES)
@pytest.mark.parametrize("options", ALL_OPTIONS[:4], ids=repr)
def test_bulk_store(rng, shape, box, at, swizzle, options):
    array = guarded_copy(rng.standard_normal(shape).astype(ml_dtypes.bfloat16).view(np.float16), "array")
    tile = rng.integers(0, 2**16, box, dtype=np.uint16)
    shared = guarded_copy(swizzled(tile.reshape(-1).view(np.uint8), swizzle), "in")
    expected = array.copy()
    index = tuple(np.indices(box)[axis] + begin for axis, begin in enumerate(at))
    inside = np.all([(i >= 0) & (i < extent) for i, extent in zip(index, shape, strict=True)], axis=0)
    expected.view(np.uint16)[tuple(i[inside] for i in index)] = tile[inside]
    arguments = (map_of(array, box, swizzle), np.array(at[::-1], np.int32), shared, np.int32(shared.size // 4))
    kernel = probes("probes_sm90.cu").get_function(f"probe_bulk_store_{len(box)}")
    kernel((1,), (32,), arguments, shared_mem=shared.size, options=options)
    np.testing.assert_array_equal(array.view(np.uint16), expected.view(np.uint16))


# ------------------------------------------------------------------------------------------------------------
# wgmma


def operands(rng, dtype, n, transpose_a, transpose_b, swizzle, gap=0):
    """Matrices a (64, 16) and b (n, 16), shared memory that holds them, and the numbers that the probes take."""
    a, b = (rng.standard_normal((rows, 16)).astype(dtype) for rows in (64, n))
    return a, b, *wgmma_operands(rng, a, b, transpose_a, transpose_b, swizzle, gap)


def run_ss(module, name, shared, numbers, acc, accumulate, options=None):
    out = guarded_array(acc.shape, np.float32, "out")
    inputs = [guarded_copy(x, label) for x, label in ((shared, "shared"), (numbers, "numbers"), (acc, "acc"))]
    arguments = (*inputs, out, np.int32(shared.size // 4), np.uint32(accumulate))
    module.get_function(name)((1,), (128,), arguments, shared_mem=shared.size, options=options)
    return out


def assert_product(out, a, b, n, *, acc=None, times=1):
    """``times`` products, one after the other, rounded 16 times each."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    start = np.zeros((64, n)) if acc is None else acc
    expected, magnitude = start + times * a @ b.T, np.abs(start) + times * np.abs(a) @ np.abs(b).T
    found = np.zeros((64, n))
    found[accumulator_places(n)] = out
    assert (np.abs(found - expected) <= (16 * times + 1) * 2.0**-24 * magnitude).all()


DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
SS = [("f16", 64, "nn"), ("f16", 64, "nt"), ("bf16", 64, "tn"), ("bf16", 64, "tt"), ("bf16", 16, "nn")]
SS += [("f16", 176, "nn"), ("f16", 256, "nt")]


# Transposed operands without swizzle are not modelled.
@pytest.mark.parametrize(
    ("name", "n", "transposed", "swizzle"),
    [(*case, swizzle) for case in SS for swizzle in (128, 64, 32, 0) if swizzle or case[2] == "nn"],
)
def test_wgmma_ss(rng, name, n, transposed, swizzle):
    for gap in (0, 1024):
        a, b, shared, numbers = operands(rng, DTYPES[name], n, transposed[0] == "t", transposed[1] == "t", swizzle, gap)
        acc = rng.standard_normal((128, n // 2)).astype(np.float32)
        matrix = np.zeros((64, n))
        matrix[accumulator_places(n)] = acc
        probe = f"probe_wgmma_ss_{name}_n{n}_{transposed}"
        out = run_ss(probes("probes_sm90a.cu"), probe, shared, numbers, acc, True)
        assert_product(out, a, b, n, acc=matrix, times=2)
        out = run_ss(probes("probes_sm90a.cu"), probe, shared, numbers, acc * np.nan, False)
        assert_product(out, a, b, n, times=2)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_wgmma_under_every_schedule(rng, options):
    a, b, shared, numbers = operands(rng, np.float16, 64, False, True, 128)
    acc = np.zeros((128, 32), np.float32)
    out = run_ss(probes("probes_sm90a.cu"), "probe_wgmma_ss_f16_n64_nt", shared, numbers, acc, False, options)
    assert_product(out, a, b, 64, times=2)


RS = [("f16", 64, "n"), ("f16", 128, "t"), ("bf16", 80, "n"), ("bf16", 64, "t")]


@pytest.mark.parametrize(("name", "n", "transposed"), RS)
def test_wgmma_rs(rng, name, n, transposed):
    a, b, shared, numbers = operands(rng, DTYPES[name], n, False, transposed == "t", 128)
    out = guarded_array((128, n // 2), np.float32, "out")
    inputs = [guarded_copy(x, str(i)) for i, x in enumerate((shared, numbers, a_fragments(a)))]
    kernel = probes("probes_sm90a.cu").get_function(f"probe_wgmma_rs_{name}_n{n}_{transposed}")
    kernel((1,), (128,), (*inputs, out, np.int32(shared.size // 4)), shared_mem=shared.size)
    assert_product(out, a, b, n)


def test_wgmma_reads_later_columns_of_a_swizzled_row(rng):
    """Four steps of 16 along k are 32 bytes apart in a row of 128."""
    whole_a, whole_b = (rng.standard_normal((64, 64)).astype(np.float16) for _ in range(2))
    shared = np.zeros(16384, np.uint8)
    place_operand(shared, whole_a, 0, 16, 1024, 128, False)
    place_operand(shared, whole_b, 8192, 16, 1024, 128, False)
    acc = np.zeros((128, 32), np.float32)
    for step in range(4):
        numbers = np.array([8192 + 32 * step, 16, 1024, 1, 16, 1024, 1], np.uint32)
        # The probe's a starts at 0; shift its columns there.
        moved = shared.copy()
        place_operand(moved, np.roll(whole_a, -16 * step, axis=1), 0, 16, 1024, 128, False)
        out = run_ss(probes("probes_sm90a.cu"), "probe_wgmma_ss_f16_n64_nn", moved, numbers, acc, False)
        columns = slice(16 * step, 16 * step + 16)
        assert_product(out, whole_a[:, columns], whole_b[:, columns], 64, times=2)


@pytest.mark.parametrize(
    ("swizzle", "transposed"),
    [(swizzle, turned) for swizzle in (128, 64, 32, 0) for turned in (False, True) if swizzle or not turned],
)
def test_operands_have_no_bank_conflicts(swizzle, transposed):
    """A core matrix, 8 x 8 elements, has its eight chunks of 16 bytes in different banks, whatever the strides."""
    offsets = operand_offsets(64, 0, 4096, 8 * max(swizzle, 16), swizzle, transposed)
    rows = offsets.reshape(8, 8, 2, 8).swapaxes(1, 2)  # (.., .., row, k) of each core matrix
    chunks = rows[..., 0, :] if transposed else rows[..., 0]
    assert all(len(set(eight)) == 8 for eight in (chunks // 16 % 8).reshape(-1, 8))


def test_setmaxnreg():
    out = guarded_array(384, np.uint32, "out")
    for options in ALL_OPTIONS:
        probes("probes_sm90a.cu").get_function("probe_setmaxnreg")((1,), (384,), (out,), options=options)
        np.testing.assert_array_equal(out, np.arange(384) // 32)


# ------------------------------------------------------------------------------------------------------------
# The writer and the reader of swizzled tiles are held to the tables each on its own.

PLANTED = {
    "the writer": (
        "bulk.cpp",
        "{5, 4, 7, 6, 1, 0, 3, 2},\n     {6, 7, 4, 5, 2, 3, 0, 1}",
        "{5, 4, 7, 6, 1, 0, 2, 3},\n     {6, 7, 4, 5, 2, 3, 0, 1}",
    ),
    "the reader": (
        "wgmma.cpp",
        "address ^ (address >> 3 & (span - 16))",
        "address ^ ((address >> 3 & (span - 16)) % 112)",  # line 7 is not exchanged
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("who", PLANTED)
def test_one_wrong_row_of_a_swizzle_is_noticed(rng, monkeypatch, tmp_path, who):
    file, right, wrong = PLANTED[who]
    for path in (kernels_folder() / "emulator").iterdir():
        text = path.read_text(encoding="utf-8")
        if path.name == file:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        target = tmp_path / "emulator" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")
    array = guarded_copy(rng.standard_normal((1, 16, 64)).astype(np.float16), "array")
    a, b, shared, numbers = operands(rng, np.float16, 64, False, False, 128)
    acc = np.zeros((128, 32), np.float32)
    runtime = emulator.ctypes.CDLL(str(broken := wrong_runtime(monkeypatch, tmp_path)))
    _, good = emulator._default_runtime()
    monkeypatch.setattr(emulator, "_default_runtime", lambda: (broken, runtime))
    for name in ("cupyflash_emulator_allocate", "cupyflash_emulator_free"):
        setattr(runtime, name, getattr(good, name))
    loads, products = (Module(source_of((HERE / f).read_text(), f)) for f in ("probes_sm90.cu", "probes_sm90a.cu"))
    written = run_load(loads, array, (1, 16, 64), (0, 0, 0), 128)
    right_bytes = np.array_equal(written, swizzled(array.reshape(-1).view(np.uint8), 128))
    assert right_bytes == (who != "the writer")
    out = run_ss(products, "probe_wgmma_ss_f16_n64_nn", shared, numbers, acc, False)
    if who == "the reader":
        with pytest.raises(AssertionError):
            assert_product(out, a, b, 64, times=2)
    else:
        assert_product(out, a, b, 64, times=2)


def wrong_runtime(monkeypatch, folder):
    with monkeypatch.context() as patch:
        patch.setattr("cupyflash.build.host.kernels_folder", lambda: folder)
        return build_runtime(default_cache())


def test_errors_of_other_kinds():
    """What is no tensor map, or not for this instruction."""
    out = guarded_array(256, np.uint8, "out")
    kernel = probes("probes_sm90.cu").get_function("probe_bulk_load_3")
    at = np.zeros(3, np.int32)
    with pytest.raises(EmulatorError, match="is not a tensor map"):
        kernel((1,), (32,), (np.zeros(1, "V128")[0], at, out, np.int32(64)), shared_mem=4096)
    array = guarded_copy(np.zeros((1, 1, 4, 64), np.float16), "array")
    with pytest.raises(EmulatorError, match="3 coordinates for a tensor map of 4 axes"):
        kernel((1,), (32,), (map_of(array, (1, 1, 4, 64)), at, out, np.int32(64)), shared_mem=4096)
