"""What is remembered from call to call changes nothing: a description that is known, and lengths that are new."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupyflash.problem import normalize as module
from cupyflash.problem.masks import Band
from cupyflash.problem.normalize import normalize


def single(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def described(seqlen_q: int, seqlen_k: int, **options: Any) -> Any:
    return normalize(single(2, 4, seqlen_q, 8), single(2, 2, seqlen_k, 8), single(2, 2, seqlen_k, 5), **options)


def forget() -> None:
    module._KNOWN.clear()
    module._with_lengths.cache_clear()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "align": "bottom_right"},
        {"window": (3, None), "align": -2, "scale": 0.5},
        {"return_lse": True, "return_weights": True, "sinks": single(4), "alibi_slopes": single(2, 4)},
    ],
)
def test_other_lengths_are_described_as_if_they_were_the_first(options: dict[str, Any]) -> None:
    forget()
    fresh = {}
    for lengths in ((1, 7), (1, 8), (6, 8), (9, 3)):
        forget()
        problem, buffers = described(*lengths, enable_gqa=True, **options)
        fresh[lengths] = problem, [getattr(array, "shape", None) for array in buffers]
    forget()
    for lengths, (problem, shapes) in [*fresh.items(), *fresh.items()]:
        found, buffers = described(*lengths, enable_gqa=True, **options)
        assert found == problem
        assert hash(found) == hash(problem) == hash(replace(problem))
        assert found.batch_size == 2
        assert [getattr(array, "shape", None) for array in buffers] == shapes
    assert len(module._KNOWN) == 1


def test_with_lengths_is_replace() -> None:
    problem, _ = described(3, 7, enable_gqa=True)
    hash(problem)  # kept, and not to be taken over
    found = problem.with_lengths(5, 9, Band(None, 2), 1)
    expected = replace(problem, seqlen_q=5, seqlen_k=9, band=Band(None, 2), shift=1)
    assert found == expected
    assert hash(found) == hash(expected)
    assert problem.seqlen_q == 3


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 3, 8), (2, 4, 7, 8), (2, 4, 6, 8)), "value must have key's length 7 as its axis -2, but had shape"),
        (((8,), (7, 8), (7, 8)), r"query must have at least 2 dimensions .* but had shape \(8,\)"),
        (((3, 8), (7, 8), (8,)), r"value must have at least 2 dimensions .* but had shape \(8,\)"),
    ],
)
def test_wrong_lengths_are_seen_where_the_rest_is_known(shapes: tuple[Any, ...], message: str) -> None:
    normalize(single(2, 4, 3, 8), single(2, 4, 7, 8), single(2, 4, 7, 8))
    normalize(single(3, 8), single(7, 8), single(7, 8))
    with pytest.raises(ValueError, match=message):
        normalize(*[single(*shape) for shape in shapes])


def test_a_wrong_mask_is_seen_where_the_rest_is_known() -> None:
    arrays = single(2, 4, 3, 8), single(2, 4, 7, 8), single(2, 4, 7, 8)
    normalize(*arrays, np.ones((3, 7), bool))
    with pytest.raises(ValueError, match=r"attn_mask must broadcast into the scores' shape \(2, 4, 3, 7\)"):
        normalize(*arrays, np.ones((3, 6), bool))


def test_what_is_known_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(module, "_MOST_KNOWN", 3)
    for head_dim in range(1, 10):
        normalize(single(3, head_dim), single(7, head_dim), single(7, head_dim))
        assert len(module._KNOWN) <= 3


def test_true_is_not_one() -> None:
    """Equal keys of a dict must not let a wrong kind through."""
    described(3, 7, enable_gqa=True, is_causal=True)
    with pytest.raises(TypeError, match="is_causal must be a bool, but was 1"):
        described(3, 7, enable_gqa=True, is_causal=1)
