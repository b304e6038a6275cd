"""Philox4x32-10 against published answers, and the dropout mask against its contract in Python's integers."""

from __future__ import annotations

import doctest
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cupyflash.problem import philox
from cupyflash.problem.philox import check_dropout_p, check_seed, dropout_mask, keep_tile, philox4x32

# Random123 (D. E. Shaw Research), tests/kat_vectors, the rows "philox4x32 10": counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

words = st.integers(0, 2**32 - 1)
seeds = st.integers(0, 2**64 - 1)


def scalar_philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """The ten rounds as the paper writes them, on Python's integers."""
    left_0, right_0, left_1, right_1 = counter
    for round_index in range(10):
        key_0 = (key[0] + round_index * 0x9E3779B9) % 2**32
        key_1 = (key[1] + round_index * 0xBB67AE85) % 2**32
        high_0, low_0 = divmod(0xD2511F53 * left_0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * left_1, 2**32)
        left_0, right_0, left_1, right_1 = high_1 ^ right_0 ^ key_0, low_1, high_0 ^ right_1 ^ key_1, low_0
    return [left_0, right_0, left_1, right_1]


def is_kept(seed: int, dropout_p: float, head: int, row: int, column: int) -> bool:
    """The contract for one score."""
    counter = (column // 2, row // 16 * 8 + row % 8, head % 2**32, head // 2**32)
    word = scalar_philox(counter, (seed % 2**32, seed // 2**32))[row // 8 % 2 * 2 + column % 2]
    return word >= math.floor(dropout_p * 2**32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    c, k = ([int(word, 16) for word in text.split()] for text in (counter, key))
    assert " ".join(f"{word:08x}" for word in philox4x32(tuple(c), tuple(k))) == expected
    assert " ".join(f"{word:08x}" for word in scalar_philox(tuple(c), tuple(k))) == expected
    as_arrays = philox4x32(tuple(np.full(3, word, np.uint32) for word in c), tuple(np.uint32(word) for word in k))
    for word, text in zip(as_arrays, expected.split(), strict=True):
        assert word.dtype == np.uint32
        np.testing.assert_array_equal(word, np.full(3, int(text, 16)))


@given(st.tuples(*[st.lists(words, min_size=n, max_size=n) for n in (2, 3, 1, 1)]), st.tuples(words, words))
def test_philox_broadcasts_its_counters(lists: tuple[list[int], ...], key: tuple[int, int]) -> None:
    counter = [np.array(values, np.uint32) for values in lists]
    counter[0] = counter[0][:, None]
    before = [values.copy() for values in counter]
    drawn = philox4x32(tuple(counter), key)
    for index in np.ndindex(2, 3):
        expected = scalar_philox((lists[0][index[0]], lists[1][index[1]], lists[2][0], lists[3][0]), key)
        assert [int(word[index]) for word in drawn] == expected
    for values, copy in zip(counter, before, strict=True):
        np.testing.assert_array_equal(values, copy)


@given(
    seed=seeds,
    dropout_p=st.floats(0, 1),
    heads=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3),
    row=st.integers(0, 2**33 - 64),
    column=st.integers(0, 2**33 - 64),
    num_rows=st.integers(0, 40),
    num_columns=st.integers(0, 5),
)
@example(5, 0.5, [2**32 - 1, 2**32, 2**63 + 7], 0, 0, 32, 4)
@example(5, 0.5, [0], 2**32 - 3, 2**32 - 3, 20, 5)
def test_keep_tile_is_the_contract(
    seed: int, dropout_p: float, heads: list[int], row: int, column: int, num_rows: int, num_columns: int
) -> None:
    kept = keep_tile(seed, dropout_p, np.array(heads, np.uint64), (row, row + num_rows), (column, column + num_columns))
    assert kept.shape == (len(heads), num_rows, num_columns)
    assert kept.dtype == np.bool_
    assert kept.flags.c_contiguous
    for head, i, j in np.ndindex(kept.shape):
        assert kept[head, i, j] == is_kept(seed, dropout_p, heads[head], row + i, column + j)


@pytest.mark.parametrize("row", range(16))
@pytest.mark.parametrize("column", range(2))
@pytest.mark.parametrize("num_rows", [1, 9, 15, 16, 17, 33])
def test_tiles_may_start_anywhere(row: int, column: int, num_rows: int) -> None:
    whole = keep_tile(11, 0.5, 3, (0, 64), (0, 16))
    tile = keep_tile(11, 0.5, 3, (row, row + num_rows), (column, column + 7))
    np.testing.assert_array_equal(tile, whole[row : row + num_rows, column : column + 7])


@given(st.data())
def test_any_tiling_gives_the_same_mask(data: st.DataObject) -> None:
    seqlen_q, seqlen_k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    cuts = [sorted(data.draw(st.sets(st.integers(1, n)))) for n in (seqlen_q, seqlen_k)]
    ranges = [list(zip([0, *cut], [*cut, n], strict=True)) for cut, n in zip(cuts, (seqlen_q, seqlen_k), strict=True)]
    tiles = [[keep_tile(9, 0.3, 1, rows, columns) for columns in ranges[1]] for rows in ranges[0]]
    np.testing.assert_array_equal(np.block(tiles), keep_tile(9, 0.3, 1, (0, seqlen_q), (0, seqlen_k)))


@given(
    st.lists(st.integers(0, 99), max_size=30),
    st.lists(st.integers(0, 49), max_size=10),
    st.sampled_from([0, 2, 6]),
)
def test_rows_and_columns_may_be_index_vectors(rows: list[int], columns: list[int], head: int) -> None:
    whole = keep_tile(2**63 + 1, 0.4, head, (0, 100), (0, 50))
    tile = keep_tile(2**63 + 1, 0.4, head, np.array(rows, np.int64), np.array(columns, np.int64))
    np.testing.assert_array_equal(tile, whole[np.array(rows, int)][:, np.array(columns, int)])


@pytest.mark.parametrize("calls_per_block", [8, 50, 100, 300, 1000])
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, calls_per_block: int) -> None:
    heads, rows, columns = np.arange(6).reshape(2, 3), (3, 60), (1, 40)
    whole = keep_tile(1, 0.5, heads, rows, columns)
    monkeypatch.setattr(philox, "_CALLS_PER_BLOCK", calls_per_block)
    np.testing.assert_array_equal(keep_tile(1, 0.5, heads, rows, columns), whole)
    blocks = list(philox._blocks(6, 4, 8, 20, calls_per_block))
    calls = np.zeros((6, 4, 20), int)
    for block in blocks:
        assert 0 < 8 * calls[block].size <= calls_per_block
        calls[block] += 1
    assert (calls == 1).all()


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (2, 3, 4, 5), (2, 2, 3, 20, 3)])
def test_dropout_mask_flattens_batch_and_heads(shape: tuple[int, ...]) -> None:
    mask = dropout_mask(shape, 0.5, 77)
    assert mask.shape == shape
    flat = mask.reshape(-1, *shape[-2:])
    for head, i, j in np.ndindex(flat.shape):
        assert flat[head, i, j] == is_kept(77, 0.5, head, i, j)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 0)])
def test_dropout_mask_may_be_empty(shape: tuple[int, ...]) -> None:
    assert dropout_mask(shape, 0.5, 1).shape == shape


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_kept_fraction(dropout_p: float) -> None:
    shape = (4, 256, 256)
    mask = dropout_mask(shape, dropout_p, 2024)
    # Bounds of five standard deviations: over all scores, each row, each column, and each of the four words.
    for group in (mask.reshape(1, -1), mask.reshape(-1, 256), np.moveaxis(mask, 2, 0).reshape(256, -1)):
        bound = 5 * math.sqrt(dropout_p * (1 - dropout_p) / group.shape[1])
        assert np.abs(group.mean(axis=1) - (1 - dropout_p)).max() < bound
    words = mask.reshape(4, 16, 2, 8, 128, 2).transpose(2, 5, 0, 1, 3, 4).reshape(4, -1)
    bound = 5 * math.sqrt(dropout_p * (1 - dropout_p) / words.shape[1])
    assert np.abs(words.mean(axis=1) - (1 - dropout_p)).max() < bound
    # The words of a group, the heads and the seeds are independent.
    others = [
        mask[:, ::-1],
        mask[::-1],
        np.roll(mask, 8, 1),
        np.roll(mask, 1, 2),
        dropout_mask(shape, dropout_p, 2025),
    ]
    for other in others:
        correlation = np.corrcoef(mask.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(mask.size)


def test_probabilities_at_the_ends() -> None:
    assert dropout_mask((3, 50, 70), 0.0, 5).all()
    assert not dropout_mask((3, 50, 70), 1.0, 5).any()
    assert dropout_mask((3, 50, 70), 5e-324, 5).all()  # the threshold is floor(p·2³²) = 0


def test_threshold_is_exact() -> None:
    row, column = 21, 6
    word = scalar_philox((3, 13, 0, 0), (7, 0))[0]
    assert keep_tile(7, word / 2**32, 0, (row, row + 1), (column, column + 1)).all()
    assert not keep_tile(7, (word + 1) / 2**32, 0, (row, row + 1), (column, column + 1)).any()
    assert keep_tile(7, math.nextafter((word + 1) / 2**32, 0), 0, (row, row + 1), (column, column + 1)).all()


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_seed_may_be_an_array(seed: int) -> None:
    expected = dropout_mask((3, 20, 20), 0.5, seed)
    for array in (np.array(seed, np.uint64), np.array([seed], np.uint64), np.array([[seed]], np.uint64)):
        np.testing.assert_array_equal(dropout_mask((3, 20, 20), 0.5, array), expected)
        np.testing.assert_array_equal(keep_tile(array, 0.5, np.arange(3), (0, 20), (0, 20)), expected)
        assert check_seed(array) is array
    np.testing.assert_array_equal(dropout_mask((3, 20, 20), 0.5, np.uint64(seed)), expected)


def test_both_words_of_the_seed_count() -> None:
    masks = [dropout_mask((16, 16), 0.5, seed).tobytes() for seed in (1, 2, 2**32, 2**33, 2**32 + 1)]
    assert len(set(masks)) == 5


@pytest.mark.parametrize("dropout_p", [0, 1, 0.25, np.float32(0.25), np.float64(1.0), np.int32(1)])
def test_dropout_p_becomes_a_float(dropout_p: Any) -> None:
    assert check_dropout_p(dropout_p) == dropout_p
    assert type(check_dropout_p(dropout_p)) is float


@pytest.mark.parametrize(
    ("dropout_p", "error", "message"),
    [
        (1.5, ValueError, "dropout_p must be in [0, 1], but was 1.5"),
        (-1, ValueError, "dropout_p must be in [0, 1], but was -1.0"),
        (math.nan, ValueError, "dropout_p must be in [0, 1], but was nan"),
        (math.inf, ValueError, "dropout_p must be in [0, 1], but was inf"),
        ("0.5", TypeError, "dropout_p must be a number in [0, 1], but was '0.5'"),
        (None, TypeError, "dropout_p must be a number in [0, 1], but was None"),
        (True, TypeError, "dropout_p must be a number in [0, 1], but was True"),
        (0.5j, TypeError, "dropout_p must be a number in [0, 1], but was 0.5j"),
        (np.zeros(1), TypeError, "dropout_p must be a number in [0, 1], but was an array of float64"),
    ],
)
def test_bad_dropout_p(dropout_p: Any, error: type[Exception], message: str) -> None:
    for call in (lambda: check_dropout_p(dropout_p), lambda: dropout_mask((2, 2), dropout_p, 0)):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "seed must be in [0, 2**64), but was -1"),
        (2**64, ValueError, "seed must be in [0, 2**64), but was 18446744073709551616"),
        (np.int8(-1), ValueError, "seed must be in [0, 2**64), but was -1"),
        (True, TypeError, "seed must be an int or a uint64 array of one element, but was True"),
        (
            np.True_,
            TypeError,
            "seed must be an int or a uint64 array of one element, but was an array of bool",
        ),
        (1.0, TypeError, "seed must be an int or a uint64 array of one element, but was 1.0"),
        (None, TypeError, "seed must be an int or a uint64 array of one element, but was None"),
        ([1], TypeError, "seed must be an int or a uint64 array of one element, but was [1]"),
        (
            np.zeros(1, np.int64),
            TypeError,
            "seed must be an int or a uint64 array of one element, but was an array of int64",
        ),
        (
            np.zeros((2, 1), np.uint64),
            ValueError,
            "seed must be an int or a uint64 array of one element, but had shape (2, 1)",
        ),
        (
            np.zeros(0, np.uint64),
            ValueError,
            "seed must be an int or a uint64 array of one element, but had shape (0,)",
        ),
    ],
)
def test_bad_seed(seed: Any, error: type[Exception], message: str) -> None:
    for call in (lambda: check_seed(seed), lambda: dropout_mask((2, 2), 0.5, seed)):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        (5, TypeError, "shape must be a tuple of ints, but was 5"),
        ([2, 3], TypeError, "shape must be a tuple of ints, but was [2, 3]"),
        ((2, 3.0), TypeError, "shape must be a tuple of ints, but was (2, 3.0)"),
        ((2, True), TypeError, "shape must be a tuple of ints, but was (2, True)"),
        ((3,), ValueError, "shape must be a tuple of at least two ints ≥ 0, but was (3,)"),
        ((), ValueError, "shape must be a tuple of at least two ints ≥ 0, but was ()"),
        ((2, -3), ValueError, "shape must be a tuple of at least two ints ≥ 0, but was (2, -3)"),
    ],
)
def test_bad_shape(shape: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        dropout_mask(shape, 0.5, 0)
    assert str(caught.value) == message


def test_docstrings_are_true() -> None:
    result = doctest.testmod(philox)
    assert result.attempted >= 3
    assert result.failed == 0
