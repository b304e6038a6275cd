"""What is known of a mask_mod by tiles, under the emulator, against NumPy; and that kernels visit live tiles alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cupyflash import mods
from cupyflash.backends.emulator import Counters, EmulatorError, Function, Module, Options, guarded_array
from cupyflash.build.launch import launches
from cupyflash.build.modding import CallMods, ModSummary, summarize_mods, trace_mods
from cupyflash.build.operands import prepare
from cupyflash.build.params import MOD_SUMMARY_PARAMS, fields_of
from cupyflash.build.rendering import entry_of, render_kernel
from cupyflash.build.source import KernelSource
from cupyflash.plan.choose import choose
from cupyflash.plan.device import EMULATOR
from cupyflash.plan.specs import FwdSpec, KernelSpec, Launch, Plan
from cupyflash.plan.tiles import TileConfig
from cupyflash.problem.normalize import normalize
from cupyflash.problem.trace import trace_mask_mod
from cupyflash.testing import Case, assert_attention_close
from tests.cases import examples, heads
from tests.kernels.harness import ALL_OPTIONS
from tests.kernels.mods import called_mask, guarded

pytestmark = pytest.mark.usefixtures("cxx")


@functools.cache
def kernel(spec: KernelSpec) -> Function:
    return Module(render_kernel(spec)).get_function(entry_of(spec))


class Guarded:
    """Addresses of copies of arrays that end where the next byte cannot be read."""

    def __init__(self) -> None:
        self.copies: dict[int, np.ndarray] = {}

    def __call__(self, array: np.ndarray) -> int:
        return self.copies.setdefault(id(array), guarded(array)).ctypes.data


def summarized(
    function: Any, lengths: tuple[int, int, int, int], block: tuple[int, int] = (64, 64), pack: int = 1
) -> tuple[ModSummary, np.ndarray, Guarded]:
    """The launch for a mask_mod over (B, Hq, L, S), and where it writes: full of what is no mark."""
    batch, num_heads, seqlen_q, seqlen_k = lengths
    query, key = (np.zeros((batch, num_heads, n, 8), np.float16) for n in (seqlen_q, seqlen_k))
    problem, buffers = normalize(query, key, key, mask_mod=function)
    spec = FwdSpec("fwd_sm80", "float16", 32, 32, TileConfig(*block, 4))
    address = Guarded()
    plan = Plan((Launch(spec, (1,)),), pack=pack)
    found = summarize_mods(CallMods(None, trace_mask_mod(function)), problem, plan, buffers, address)
    assert found is not None
    summary = guarded_array(found.array.shape, np.uint8, "summary")
    summary[...] = 0xEE
    fields_of(found.args[0], MOD_SUMMARY_PARAMS)["summary"] = summary.ctypes.data
    return found, summary, address


def summary_of(*asked: Any, function: Function | None = None, options: Options | None = None, **how: Any) -> np.ndarray:
    found, summary, _kept = summarized(*asked, **how)
    launch = found.launch
    (function or kernel(launch.spec))(
        launch.grid, launch.block, found.args, shared_mem=launch.shared_bytes, options=options
    )
    return summary


def model(
    function: Any, lengths: tuple[int, int, int, int], block: tuple[int, int] = (64, 64), pack: int = 1
) -> np.ndarray:
    """The definition, tile by tile, with an entry for every batch and group of heads."""
    batch, num_heads, seqlen_q, seqlen_k = lengths
    keep = called_mask(function, lengths).reshape(batch, num_heads // pack, pack, seqlen_q, seqlen_k)
    rows = keep.swapaxes(2, 3).reshape(batch, num_heads // pack, seqlen_q * pack, seqlen_k)
    counts = [math.ceil(n / size) for n, size in zip(rows.shape[-2:], block, strict=True)]
    summary = np.empty((*rows.shape[:2], *counts), np.uint8)
    for m in range(counts[0]):
        for n in range(counts[1]):
            tile = rows[..., block[0] * m : block[0] * (m + 1), block[1] * n : block[1] * (n + 1)]
            summary[..., m, n] = np.where(tile.all(axis=(-1, -2)), 2, tile.any(axis=(-1, -2)))
    return summary


def check(
    function: Any, lengths: tuple[int, int, int, int], block: tuple[int, int] = (64, 64), pack: int = 1, **how: Any
) -> np.ndarray:
    summary = summary_of(function, lengths, block, pack, **how)
    expected = model(function, lengths, block, pack)
    np.testing.assert_array_equal(np.broadcast_to(summary, expected.shape), expected)
    return summary


# By the coordinates that they depend on; each is a kernel, whatever is in the table.
READS: dict[str, Any] = {
    "": lambda t: lambda b, h, q, kv: t[()],
    "k": lambda t: lambda b, h, q, kv: t[kv],
    "q": lambda t: lambda b, h, q, kv: t[q],
    "qk": lambda t: lambda b, h, q, kv: t[q, kv],
    "h": lambda t: lambda b, h, q, kv: t[h],
    "hk": lambda t: lambda b, h, q, kv: t[h, kv],
    "hqk": lambda t: lambda b, h, q, kv: t[h, q, kv],
    "bk": lambda t: lambda b, h, q, kv: t[b, kv],
    "bqk": lambda t: lambda b, h, q, kv: t[b, q, kv],
    "bhqk": lambda t: lambda b, h, q, kv: t[b, h, q, kv],
}


def tabled(reads: str, lengths: tuple[int, int, int, int], block: tuple[int, int], seed: int) -> Any:
    """A mask_mod whose tiles are of all three kinds, some of them with a single element that differs."""
    rng = np.random.default_rng(seed)
    sizes = {"q": block[0], "k": block[1]}
    shape = {name: n for name, n in zip("bhqk", lengths, strict=True) if name in reads}
    table = rng.integers(0, 3, [-(-n // sizes.get(name, 1)) for name, n in shape.items()]) > 0
    for axis, name in enumerate(shape):
        table = table.repeat(sizes.get(name, 1), axis)
    table = table[tuple(slice(n) for n in shape.values())].copy()
    flat = table.reshape(-1)
    flat[rng.integers(0, flat.size, 1 + flat.size // 2000)] ^= True
    return READS[reads](table)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, ...]:
    pack = draw(st.sampled_from([1, 1, 2, 3]))
    lengths = (draw(st.integers(1, 3)), pack * draw(st.integers(1, 3)), draw(st.integers(1, 40)))
    block = draw(st.integers(1, 40)), draw(st.integers(1, 33) | st.sampled_from([16, 32, 64]))
    lengths = (*lengths, block[1] + draw(st.integers(1, 70)))
    return tabled(draw(st.sampled_from(list(READS))), lengths, block, draw(st.integers(0, 2**32))), lengths, block, pack


@given(calls())
@example((lambda b, h, q, kv: kv <= q, (1, 6, 33, 70), (16, 16), 3))
@examples(2)
def test_against_the_definition(call: Any) -> None:
    check(*call)


@pytest.mark.parametrize(
    ("reads", "pack", "shape"),
    [
        ("", 1, (1, 1, 1, 3)),
        ("k", 3, (1, 1, 1, 3)),
        ("q", 1, (1, 1, 2, 3)),
        ("h", 1, (1, 6, 1, 3)),
        ("h", 3, (1, 2, 4, 3)),  # heads of a tile differ
        ("hk", 1, (1, 6, 1, 3)),
        ("bk", 3, (2, 1, 1, 3)),
        ("bhqk", 3, (2, 2, 4, 3)),
    ],
)
def test_what_a_mask_does_not_depend_on_is_asked_once(reads: str, pack: int, shape: tuple[int, ...]) -> None:
    lengths = (2, 6, 70, 140)
    assert check(tabled(reads, lengths, (64, 64), 5), lengths, (64, 64), pack).shape == shape


def test_one_element_that_differs_is_seen_wherever_it_is() -> None:
    block, lengths = (5, 9), (1, 2, 10, 18)
    for value in (True, False):
        for place in range(45):
            table = np.full(lengths[1:], value)
            table[1, 5 + place // 9, 9 + place % 9] = not value
            expected = np.full((1, 2, 2, 2), 2 * value)
            expected[0, 1, 1, 1] = 1
            np.testing.assert_array_equal(summary_of(READS["hqk"](table), lengths, block), expected)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=repr)
def test_schedules_give_the_same_bits(options: Options) -> None:
    lengths = (2, 3, 130, 200)
    check(tabled("bhqk", lengths, (64, 64), 1), lengths, options=options)


def test_a_tile_of_both_kinds_is_left_early() -> None:
    table = np.ones((256, 128), bool)
    spent = []
    for _ in range(2):
        found, *_kept = summarized(READS["qk"](table), (1, 1, 256, 128), (256, 64))
        launch = found.launch
        counters = kernel(launch.spec)(launch.grid, launch.block, found.args, options=Options(counters=True))
        spent.append(counters.ld_global.instructions)
        table[0, [0, 64]] = False
    assert 8 * spent[1] <= spent[0] == 2 * 256 * 64 // 32


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("index < num_elements ? index : num_elements - 1", "index"),
        ("if (place >= params.num_tiles) return;", ""),
        ("first_head + row % params.pack", "first_head"),
        ("row / params.pack, first_key", "row, first_key"),
        ("static_cast<int>(tile % params.num_groups) * params.pack", "static_cast<int>(tile % params.num_groups)"),
        ("static_cast<int>(tile / params.num_groups)", "0"),
        ("rows < params.block_rows ? rows : params.block_rows", "params.block_rows"),
        ("keys < params.block_keys ? keys : params.block_keys", "params.block_keys"),
        ("!(some_true && some_false)", "!some_true"),
        ("some_true = isa::any(some_true);", ""),
        ("some_false = isa::any(some_false);", ""),
        ("!some_true ? 0 : some_false ? 1 : 2", "!some_true ? 0 : 1"),
    ],
)
def test_every_line_is_reached(code: str, wrong: str) -> None:
    lengths, block = (3, 6, 41, 70), (16, 32)

    def inside(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx < 41) & (kv_idx < 70)  # unlike an index, a coordinate alone is not kept inside

    problems = [(tabled("bhqk", lengths, block, pack), pack) for pack in (1, 2, 3)], [(inside, 1)]

    def wrong_source(source: KernelSource) -> KernelSource:
        assert source.text.count(code) == 1
        return KernelSource("wrong", source.text.replace(code, wrong), source.entries)

    for of_one_kernel in problems:
        right = [summary_of(function, lengths, block, pack).tobytes() for function, pack in of_one_kernel]
        spec = summarized(of_one_kernel[0][0], lengths, block)[0].launch.spec
        broken = Module(wrong_source(render_kernel(spec))).get_function(entry_of(spec))
        try:
            found = [summary_of(f, lengths, block, pack, function=broken).tobytes() for f, pack in of_one_kernel]
        except EmulatorError:
            return
        if found != right:
            return
    raise AssertionError("nothing is wrong with the kernel")


# --- the forward kernels go by it ------------------------------------------------------------------------


def run(
    arguments: dict[str, Any], between: Any = None, options: Options | None = None
) -> tuple[np.ndarray, Counters, FwdSpec, int]:
    """(out, counters of the forward kernel, its spec, heads in a tile); `between` is called before it runs."""
    problem, buffers = normalize(**arguments)
    traced = trace_mods(problem, buffers)
    plan = choose(problem, EMULATOR, traced and traced.structure)
    operands = prepare(problem, plan, buffers, lambda array: array.ctypes.data, traced)
    buffers.out[...] = np.nan
    counters = None
    for launch, args in launches(problem, plan, operands):
        is_forward = isinstance(launch.spec, FwdSpec)
        if is_forward and between is not None:
            between()
        done = kernel(launch.spec)(
            launch.grid, launch.block, args, shared_mem=launch.shared_bytes, options=options if is_forward else None
        )
        if is_forward:
            counters, spec = done, launch.spec
    assert counters is not None
    return buffers.out, counters, spec, plan.pack


def live_tiles(keep: np.ndarray, spec: FwdSpec, pack: int) -> int:
    """How many tiles have a key that takes part; `keep` is (B, Hq, L, S)."""
    tile = (spec.tile.block_m, spec.tile.block_n)
    return int((model(lambda b, h, q, kv: keep[b, h, q, kv], keep.shape, tile, pack) > 0).sum())


DOCUMENT = np.repeat(np.arange(7), [100, 30, 170, 64, 36, 200, 100])
TREE = np.random.default_rng(0).random((2, 4)) < 0.5
MASKS: dict[str, Any] = {
    "document": mods.document_mask(DOCUMENT),
    "prefix": mods.prefix_lm(100),
    "window": mods.sliding_window(130, 20),
    "dilated window": mods.dilated_window(10, 8),
    "another for each head": lambda b, h, q, kv: (q - kv) // 64 % 4 == h,
    "another for each batch": lambda b, h, q, kv: kv // 200 == b,
    "some heads": lambda b, h, q, kv: TREE[b, h],
    "queries alone": lambda b, h, q, kv: q % 300 < 100,
    "nothing": lambda b, h, q, kv: kv < 0,
    "everything": lambda b, h, q, kv: kv >= 0,
}
# Where the number of key heads is less, tiles hold several query heads; few queries share keys among blocks.
SHAPES = {
    "prefill": ((2, 4, 700, 64), (2, 4, 700, 64)),
    "packed": ((2, 4, 20, 64), (2, 2, 700, 64)),
    "split": ((2, 4, 3, 64), (2, 1, 700, 64)),
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, "prefill") for name in MASKS),
        *((name, shape) for name in ("document", "another for each head") for shape in ("packed", "split")),
    ],
)
def test_tensor_cores_see_live_tiles_alone(name: str, shape: str) -> None:
    """Every product is counted: those of Q Kᵀ and of P V, of tiles with a key that takes part."""
    query, key = SHAPES[shape]
    case = Case(query_shape=query, key_shape=key, value_shape=key, dtype="float16", enable_gqa=True, return_lse=False)
    arguments = case.arguments() | {"mask_mod": MASKS[name]}
    out, counters, spec, pack = run(arguments)
    assert spec.packed == (shape != "prefill")
    keep = called_mask(MASKS[name], (*query[:3], key[2]))
    per_tile = spec.tile.block_m // 16 * (spec.tile.block_n // 8 * 4 + 8 * spec.tile.block_n // 16)
    assert counters.mma == live_tiles(keep, spec, pack) * per_tile
    if shape != "split":
        assert_attention_close(out, arguments, backend="emulator")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["document", "another for each head", "nothing"])
def test_other_kernels_too(name: str, dtype: str) -> None:
    case = heads(2, 4, 200, 700, 16, dtype=dtype, return_lse=False)
    _, every, spec, _ = run(case.arguments())
    _, counters, masked, pack = run(case.arguments() | {"mask_mod": MASKS[name]})
    assert masked.tile == spec.tile
    keep = called_mask(MASKS[name], (2, 4, 200, 700))
    everything = live_tiles(np.ones_like(keep), spec, pack)
    assert every.ld_shared.instructions % everything == 0
    assert counters.ld_shared.instructions == every.ld_shared.instructions // everything * live_tiles(keep, spec, pack)


def test_band_and_bool_mask_and_mask_mod_leave_what_all_leave() -> None:
    mask = np.random.default_rng(1).random((2, 1, 1, 11)).repeat(64, -1)[..., :700] < 0.6
    case = heads(2, 4, 700, 700, 64, dtype="float16", is_causal=True, return_lse=False)
    arguments = case.arguments() | {"mask_mod": MASKS["document"], "attn_mask": mask}
    out, counters, spec, _ = run(arguments)
    tile = (spec.tile.block_m, spec.tile.block_n)
    marks = [
        model(function, (2, 4, 700, 700), tile)
        for function in (lambda b, h, q, kv: kv <= q, MASKS["document"], lambda b, h, q, kv: mask[b, 0, 0, kv])
    ]
    per_tile = tile[0] // 16 * (tile[1] // 8 * 4 + 8 * tile[1] // 16)
    assert counters.mma == (np.minimum.reduce(marks) > 0).sum() * per_tile
    assert_attention_close(out, arguments, backend="emulator")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_marks_are_believed(dtype: str) -> None:
    """A tile that is empty or whole is not asked again: the mask may change after the summary, and nothing does."""
    arguments = heads(1, 2, 130, 200, 16, dtype=dtype, return_lse=False).arguments()
    for kept in (True, False):
        table = np.full((130, 200), kept)
        arguments["mask_mod"] = READS["qk"](table)
        expected = run(arguments)[0].copy()
        assert expected.any() == kept
        out = run(arguments, lambda table=table: np.logical_not(table, out=table))[0]
        np.testing.assert_array_equal(out, expected)


def test_one_tile_of_keys_is_not_summarised() -> None:
    problem, buffers = normalize(**heads(1, 2, 130, 64, 16).arguments() | {"mask_mod": MASKS["window"]})
    traced = trace_mods(problem, buffers)
    plan = choose(problem, EMULATOR, traced and traced.structure)
    assert summarize_mods(traced, problem, plan, buffers, lambda array: array.ctypes.data) is None
