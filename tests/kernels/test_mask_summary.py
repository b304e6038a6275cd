"""The summary of a bool mask by tiles, under the emulator, against NumPy."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cupyflash.backends.emulator import Counters, EmulatorError, Function, Module, Options, guarded_array, guarded_copy
from cupyflash.build.mask_summary import summarize_mask
from cupyflash.build.params import SUMMARY_PARAMS, fields_of
from cupyflash.build.rendering import entry_of, render_kernel
from cupyflash.build.source import KernelSource
from cupyflash.errors import Unsupported
from cupyflash.plan.specs import MaskSummarySpec
from tests.cases import examples
from tests.kernels.harness import ALL_OPTIONS

SPEC = MaskSummarySpec()

pytestmark = pytest.mark.usefixtures("cxx")


@functools.cache
def kernel() -> Function:
    return Module(render_kernel(SPEC)).get_function(entry_of(SPEC))


class GuardedArrays:
    """A namespace whose new arrays end where the next byte cannot be read, and hold no valid summary."""

    @staticmethod
    def empty(shape, dtype):
        array = guarded_array(shape, dtype, "summary")
        array[...] = 0xEE
        return array


def summary_of(mask, block_m, block_n, *, function=None, options=None) -> tuple[np.ndarray, Counters | None]:
    array, launch, params = summarize_mask(mask, block_m, block_n, GuardedArrays, lambda array: array.ctypes.data)
    if launch is None:
        return array, None
    function = function or kernel()
    return array, function(launch.grid, launch.block, (params,), shared_mem=launch.shared_bytes, options=options)


def model(mask, block_m, block_n):
    """The definition, tile by tile, of the mask without what it repeats."""
    once = mask[tuple(slice(None, 1) if stride == 0 else slice(None) for stride in mask.strides)]
    *lead, num_rows, num_columns = once.shape
    rows, columns = math.ceil(num_rows / block_m), math.ceil(num_columns / block_n)
    summary = np.empty((*lead, rows, columns), np.uint8)
    for m in range(rows):
        for n in range(columns):
            tile = once[..., block_m * m : block_m * (m + 1), block_n * n : block_n * (n + 1)] != 0
            summary[..., m, n] = np.where(tile.all(axis=(-1, -2)), 2, tile.any(axis=(-1, -2)))
    return summary


def check(mask, block_m, block_n, **keywords):
    array, counters = summary_of(mask, block_m, block_n, **keywords)
    np.testing.assert_array_equal(array, model(mask, block_m, block_n))
    return counters


def random_mask(rng, shape, block_m, block_n):
    """Tiles of all three kinds, some of them with a single element that differs."""
    tiles = rng.integers(0, 2, (*shape[:-2], -(-shape[-2] // block_m), -(-shape[-1] // block_n)), dtype=np.uint8)
    mask = tiles.repeat(block_m, axis=-2).repeat(block_n, axis=-1)[..., : shape[-2], : shape[-1]].astype(bool)
    flat = mask.reshape(-1)
    if flat.size:
        flat[rng.integers(0, flat.size, 1 + tiles.size // 3)] ^= True
    return flat.reshape(shape)


LAYOUTS = {
    "contiguous": lambda mask: mask,
    "transposed": lambda mask: guarded_copy(mask.swapaxes(-1, -2), "mask").swapaxes(-1, -2),
    "reversed": lambda mask: guarded_copy(mask[..., ::-1, ::-1], "mask", flush="start")[..., ::-1, ::-1],
    "every other": lambda mask: guarded_copy(mask.repeat(2, axis=-1), "mask")[..., ::2],
    "rows of words": lambda mask: guarded_copy(
        np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % 4)]), "mask"
    )[..., : mask.shape[-1]],
}


@st.composite
def calls(draw):
    shape = [draw(st.integers(1, n)) for n in (2, 3, 3, 40, 70)]
    for axis in draw(st.sets(st.integers(0, 4))):
        shape[axis] = 1
    blocks = draw(st.integers(1, 40)), draw(st.integers(1, 80) | st.sampled_from([16, 32, 64]))
    mask = random_mask(np.random.default_rng(draw(st.integers(0, 2**32))), tuple(shape), *blocks)
    mask = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](guarded_copy(mask, "mask"))
    spread = [draw(st.sampled_from([1, 3])) if n == 1 else n for n in shape]
    return np.broadcast_to(mask, spread), *blocks


@given(calls())
@example((np.ones((1, 1, 1, 0, 5), bool), 16, 16))
@example((np.ones((2, 0, 1, 3, 5), bool), 16, 16))
@example((np.ones((1, 1, 130), bool), 64, 64))  # no batch axes
@examples(3)
def test_against_the_definition(call):
    check(*call)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_kernels(layout):
    rng = np.random.default_rng(0)
    for shape, blocks in (((2, 130, 200), (64, 64)), ((1, 200, 260), (128, 128)), ((2, 1, 300), (64, 128))):
        check(LAYOUTS[layout](random_mask(rng, shape, *blocks)), *blocks)


@pytest.mark.parametrize("words", [True, False])
def test_one_element_that_differs_is_seen_wherever_it_is(words):
    block_m, block_n = 9, 12
    for value in (True, False):
        for place in range(block_m * block_n):
            memory = guarded_array((2, 2 * block_m, 2 * block_n + (0 if words else 1)), bool, "mask")
            memory[...] = value
            mask = memory[..., : 2 * block_n]
            mask[1, block_m + place // block_n, place % block_n] = not value
            expected = np.full((2, 2, 2), 2 if value else 0)
            expected[1, 1, 0] = 1
            np.testing.assert_array_equal(summary_of(mask, block_m, block_n)[0], expected)


def test_any_byte_but_0_is_true():
    for value in (1, 2, 0x80, 0xFF):
        for shape in ((1, 4, 8), (1, 4, 7)):
            mask = np.full(shape, value, np.uint8).view(bool)
            assert summary_of(mask, 4, 8)[0].tolist() == [[[2]]]


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_schedules_give_the_same_bits(options):
    check(random_mask(np.random.default_rng(1), (3, 70, 130), 16, 64), 16, 64, options=options)


def test_a_mask_is_read_once_in_whole_sectors():
    """A mask that repeats itself is read once; words and lanes lie behind one another, along either axis."""
    memory = guarded_array((1, 128, 256), bool, "mask", alignment=32)
    memory[...] = True
    for mask in (memory, memory.swapaxes(-1, -2)):
        counters = check(np.broadcast_to(mask, (5, 8, *mask.shape[1:])), 64, 64, options=Options(counters=True))
        assert counters.ld_global.cost == counters.ld_global.ideal == mask.size // 32


def test_a_tile_of_both_kinds_is_left_early():
    mask = np.ones((1, 256, 64), bool)
    whole = check(mask, 256, 64).ld_global.instructions
    mask[0, 0, 0] = False
    assert 8 * check(mask, 256, 64).ld_global.instructions == whole


def test_params_and_shape():
    mask = np.broadcast_to(np.ones((2, 3, 1, 1, 100), bool), (2, 3, 8, 50, 100))
    array, launch, params = summarize_mask(mask, 64, 32, np, lambda array: array.ctypes.data)
    assert (array.shape, array.dtype, array.nbytes) == ((2, 3, 1, 1, 4), np.uint8, 24)
    assert launch.grid == (6,)
    params = fields_of(params, SUMMARY_PARAMS)
    assert params["batch_shape"].tolist() == [1, 1, 2, 3]
    assert params["mask"]["batch_strides"].tolist() == [0, 0, 300, 100]
    assert params["mask"]["head_stride"] == params["mask"]["row_stride"] == 0
    assert (params["num_rows"], params["num_columns"], params["num_heads"], params["has_words"]) == (1, 100, 1, 1)


def test_five_batch_axes_that_do_not_join_are_refused():
    mask = np.ones((4,) * 8, bool)[::2, ::2, ::2, ::2, ::2]
    with pytest.raises(Unsupported, match="kernels carry 4 batch axes"):
        summarize_mask(mask, 64, 64, np, lambda array: array.ctypes.data)


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("row < tile.num_rows ? row : 0", "row"),
        (
            "column_begin + lane_column < tile.num_columns ? column_begin + lane_column : 0",
            "column_begin + lane_column",
        ),
        ("if (tile >= params.num_tiles) return;", ""),
    ],
)
def test_nothing_beside_the_mask_is_read_or_written(code, wrong):
    source = render_kernel(SPEC)
    assert source.text.count(code) == 1
    broken = Module(KernelSource("wrong", source.text.replace(code, wrong), source.entries))
    mask = guarded_copy(np.ones((1, 5, 6), bool), "mask")

    def summarize_twice(function):
        return [summary_of(mask, *blocks, function=function)[0] for blocks in ((5, 6), (2, 3))]

    assert all((summary == 2).all() for summary in summarize_twice(kernel()))
    with pytest.raises(EmulatorError, match=r"mask_summary\.cu:\d+: .*near array '(mask|summary)'"):
        summarize_twice(broken.get_function(entry_of(SPEC)))
