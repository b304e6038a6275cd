"""The rules of test_attention.py where they need dtypes and head dims that the GPU kernels have."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.backends.emulator import EmulatorError, guarded_array, guarded_copy
from cupyflash.testing import DTYPES, Case, MaskSpec, SinkSpec, assert_attention_close
from tests.cases import CAPABILITIES, CASES, KERNELS, heads, on_kernel_backends
from tests.ops.test_attention import every_second, named, operands, run, swapped_heads, transposed, unaligned

pytestmark = pytest.mark.runs_on_kernels  # a refusal is a failure here

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python 3.13; Linux alone has the emulator

on_kernel_dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@on_kernel_backends
def test_every_case_of_the_kernels_runs_on_them(backend: str) -> None:
    assert not [name for name, case in KERNELS.items() if CAPABILITIES[backend].refused_features(case)]
    assert KERNELS.keys() <= CASES.keys()


@on_kernel_backends
@on_kernel_dtypes
@pytest.mark.parametrize("layout", [np.empty, swapped_heads, every_second, transposed, unaligned])
def test_out_is_filled_and_returned(layout: Callable[..., np.ndarray], dtype: str, backend: str) -> None:
    shape = (2, 3, 70, 64)
    arguments = heads(2, 3, 70, 90, 64, dtype=dtype, is_causal=True).arguments()
    out = layout(shape, DTYPES[dtype]) if layout is not every_second else every_second(shape, DTYPES[dtype])[:2]
    out[...] = np.nan
    result, lse = run(arguments, backend, out=out)
    assert result is out
    fresh, fresh_lse = run(arguments, backend)
    assert (out.tobytes(), lse.tobytes()) == (fresh.tobytes(), fresh_lse.tobytes())


@on_kernel_backends
@on_kernel_dtypes
@pytest.mark.parametrize("seqlen_k", [7, 130])
def test_nan_in_a_query_spoils_its_row_only(seqlen_k: int, dtype: str, backend: str) -> None:
    arguments = heads(2, 2, 70, seqlen_k, 64, dtype=dtype).arguments()
    arguments["query"][1, 0, 35, 3] = np.nan
    out, lse = run(arguments, backend)
    assert np.argwhere(np.isnan(out.astype(np.float64)).all(axis=-1)).tolist() == [[1, 0, 35]]
    assert np.argwhere(np.isnan(lse)).tolist() == [[1, 0, 35]]


@on_kernel_backends
@on_kernel_dtypes
@pytest.mark.parametrize("scale", [None, -0.1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["query", "key", "value"])
def test_non_finite_operands(operand: str, bad: float, scale: float | None, dtype: str, backend: str) -> None:
    arguments = heads(1, 2, 6, 100, 64, dtype=dtype, magnitude=0.3).arguments()
    arguments[operand][0, 1, 4, 2] = bad
    run(arguments, backend, scale=scale)


@on_kernel_backends
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "removal",
    [{"is_causal": True, "align": 46}, {"window": (None, 0), "align": 46}, {"window": (0, None), "align": 51}],
)
def test_a_removed_key_does_not_leak(removal: dict[str, Any], bad: float, backend: str) -> None:
    arguments = heads(1, 2, 40, 150, 64, dtype="float16").arguments() | removal
    arguments["key"][..., 50, :] = bad
    out, lse = run(arguments, backend)
    assert np.isfinite(out[..., :4, :]).all()
    assert np.isfinite(lse[..., :4]).all()


@on_kernel_backends
@pytest.mark.parametrize("scale", [None, 0, -1])
def test_a_row_that_sees_nothing_is_zero_even_where_q_is_nan(scale: float | None, backend: str) -> None:
    arguments = heads(2, 3, 6, 9, 64, dtype="float16").arguments()
    arguments["query"][:, :, 1] = np.nan
    out, lse = run(arguments, backend, is_causal=True, align=-6, scale=scale)
    assert not out.any()
    assert (lse == -np.inf).all()


@on_kernel_backends
@on_kernel_dtypes
@pytest.mark.parametrize("scale", [1, -1])
def test_a_row_whose_computed_scores_are_all_minus_infinity_is_zero(scale: int, dtype: str, backend: str) -> None:
    query, key, value = operands((1, 3, 64), (1, 90, 64), (1, 90, 64), dtype=dtype)
    key[...] = -abs(key) - 1
    query[...] = 1
    query[0, 1] = scale * np.inf
    out, lse = run(named(query, key, value, return_lse=True, scale=scale), backend)
    assert not out[0, 1].any()
    assert lse[0, 1] == -np.inf


@on_kernel_backends
@on_kernel_dtypes
def test_inputs_are_not_written_and_results_share_no_memory_with_them(dtype: str, backend: str) -> None:
    arguments = heads(2, 3, 4, 5, 64, dtype=dtype, layouts=("contiguous", "strided", "unaligned")).arguments()
    given = [arguments[name] for name in ("query", "key", "value")]
    before = [x.tobytes() for x in given]
    results = cupyflash.attention(**arguments, backend=backend)
    assert [x.tobytes() for x in given] == before
    assert not any(np.may_share_memory(result, x) for result in results for x in given)


@on_kernel_backends
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_what_is_added_to_scores_may_lie_anywhere(dtype: str, backend: str) -> None:
    """An odd number of bytes after the start of memory, or a stride of elements and a half apart."""

    def misplaced(values: np.ndarray, step: int) -> np.ndarray:
        memory = np.zeros(values.size * (values.itemsize + step) + 1, np.uint8)
        strides = [n * (values.itemsize + step) // values.itemsize for n in values.strides]
        placed = np.ndarray(values.shape, values.dtype, memory, offset=1, strides=strides)
        placed[...] = values
        return placed

    arguments = heads(
        2,
        3,
        6,
        9,
        dtype=dtype,
        masks=(MaskSpec("float32", (3, 6, 9)), MaskSpec("bool", (2, 1, 1, 9))),
        alibi_shape=(2, 3),
        sinks=SinkSpec(dtype),
        dropout_p=0.3,
        seed=5,
    ).arguments()
    arguments["seed"] = np.array([5], np.uint64)
    expected = run(arguments, backend)
    for step in (0, 1):
        moved = {name: misplaced(arguments[name], step) for name in ("alibi_slopes", "sinks", "seed")}
        moved["attn_mask"] = tuple(misplaced(mask, step) for mask in arguments["attn_mask"])
        for one, other in zip(cupyflash.attention(**arguments | moved, backend=backend), expected, strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("device", ["emulator", "T4", "L4", "H200"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(130, 90), (3, 500)])
def test_what_is_dropped_is_what_dropout_mask_says(
    seqlen_q: int, seqlen_k: int, dtype: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are alike, and each column of V is 1 for one key: the output is 0 where its weight is dropped."""
    monkeypatch.setenv("CUPYFLASH_EMULATOR", f"device={device}")
    query = np.zeros((2, 2, seqlen_q, 8), DTYPES[dtype])
    key = np.zeros((2, 2, seqlen_k, 8), DTYPES[dtype])
    columns = np.broadcast_to(np.eye(seqlen_k, dtype=DTYPES[dtype]), (2, 2, seqlen_k, seqlen_k))
    expected = cupyflash.dropout_mask((2, 2, seqlen_q, seqlen_k), 0.3, seed=77)
    for begin in range(0, seqlen_k, 64):
        some = slice(begin, begin + 64)
        out = cupyflash.attention(query, key, columns[..., some], dropout_p=0.3, seed=77, backend="emulator")
        np.testing.assert_array_equal(out != 0, expected[..., some])


@pytest.mark.parametrize("flush", ["start", "end"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads_q", "shapes"),
    [
        (70, 90, 2, ((1, 2, 70, 90), (1, 1, 70, 90))),
        (70, 90, 2, ((90,), (70, 1))),
        (2, 700, 6, ((6, 2, 700), (1, 6, 1, 700))),
    ],
)
def test_nothing_beside_what_is_added_to_scores_is_touched(
    seqlen_q: int, seqlen_k: int, heads_q: int, shapes: tuple[tuple[int, ...], ...], dtype: str, flush: str
) -> None:
    """Of keys and queries that fill up a tile no mask, slope or sink is read."""
    case = Case(
        query_shape=(1, heads_q, seqlen_q, 32),
        key_shape=(1, 2, seqlen_k, 32),
        value_shape=(1, 2, seqlen_k, 32),
        enable_gqa=True,
        dtype=dtype,
        masks=(MaskSpec("float32", shapes[0]), MaskSpec("bool", shapes[1])),
        alibi_shape=(heads_q,),
        sinks=SinkSpec(dtype),
        dropout_p=0.2,
        seed=3,
    )
    arguments = case.arguments()
    for name in ("alibi_slopes", "sinks"):
        arguments[name] = guarded_copy(arguments[name], name, flush=flush)
    masks = zip(arguments["attn_mask"], ("float mask", "bool mask"), strict=True)
    arguments["attn_mask"] = tuple(guarded_copy(mask, name, flush=flush) for mask, name in masks)
    assert_attention_close(cupyflash.attention(**arguments, backend="emulator"), case, backend="emulator")
    arguments |= {"dropout_p": 0.0, "seed": None}  # heads may then share a tile
    run(arguments, "emulator")


@on_kernel_backends
def test_five_batch_axes_that_do_not_join_are_refused(backend: str) -> None:
    query, key, value = operands((2, 1, 2, 1, 2, 1, 5, 64), (1, 2, 1, 2, 1, 1, 7, 64), (7, 64), dtype="float16")
    with pytest.raises(cupyflash.Unsupported, match=r"kernels carry 4 batch axes, but the batch .* has 5") as refusal:
        cupyflash.attention(query, key, value, backend=backend)
    assert refusal.value.reasons[backend]
    run(named(query[:1], key, value), backend)


@on_kernel_backends
def test_offsets_of_64_bits(backend: str) -> None:
    """Rows, heads and batch entries that lie more than 2**31 elements apart, in memory that is never touched."""
    far = 2**32 + 2**10  # bytes
    shape, strides = (2, 2, 3, 64), (9 * far, 3 * far, far, 2)
    size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 2
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = [np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8) for _ in range(4)]
    query, key, value, out = (np.ndarray(shape, np.float16, buffer=m, strides=strides) for m in memory)
    near = operands(shape, shape, shape, dtype="float16")
    for array, values in zip((query, key, value), near, strict=True):
        array[...] = values
    expected = cupyflash.attention(*near, backend=backend)
    np.testing.assert_array_equal(cupyflash.attention(query, key, value, out=out, backend=backend), expected)


def test_nothing_beside_the_arrays_is_touched() -> None:
    """The arrays end where the next byte cannot be read: a kernel that goes further is reported."""
    arguments = heads(1, 2, 70, 90, 64, dtype="float16", is_causal=True).arguments()
    for flush in ("start", "end"):
        guarded = {name: guarded_copy(arguments[name], name, flush=flush) for name in ("query", "key", "value")}
        run(arguments | guarded, "emulator", out=guarded_array((1, 2, 70, 64), np.float16, "out", flush=flush))
    short = guarded["key"]
    beyond = np.lib.stride_tricks.as_strided(short, (1, 2, 100, 64), short.strides)
    with pytest.raises(EmulatorError, match=r"copy\.cuh:\d+: .*near array 'key'"):
        cupyflash.attention(guarded["query"], beyond, np.zeros((1, 2, 100, 64), np.float16), backend="emulator")


@pytest.mark.parametrize("options", ["schedule=random,seed=3", "schedule=priority,seed=9,late_landing=0", "workers=2"])
def test_how_the_emulator_runs_changes_no_bit(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = heads(2, 3, 100, 150, 64, dtype="float16", is_causal=True).arguments()
    expected = cupyflash.attention(**arguments, backend="emulator")
    monkeypatch.setenv("CUPYFLASH_EMULATOR", options)
    for one, other in zip(cupyflash.attention(**arguments, backend="emulator"), expected, strict=True):
        assert one.tobytes() == other.tobytes()
