"""What is remembered from call to call changes nothing: a description that is known, and lengths that are new."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.backends.tensormap import emulated_map
from cupyflash.build import bulk as bulk_module
from cupyflash.build import strides as strides_module
from cupyflash.build.bulk import plan_of
from cupyflash.build.launch import launches
from cupyflash.build.modding import trace_mods
from cupyflash.build.operands import prepare
from cupyflash.plan import choose as choose_module
from cupyflash.plan.choose import refusals
from cupyflash.plan.device import DEVICES
from cupyflash.problem import normalize as module
from cupyflash.problem.masks import Band
from cupyflash.problem.normalize import normalize


def single(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def described(seqlen_q: int, seqlen_k: int, **options: Any) -> Any:
    return normalize(single(2, 4, seqlen_q, 8), single(2, 2, seqlen_k, 8), single(2, 2, seqlen_k, 5), **options)


def forget() -> None:
    module._KNOWN.clear()


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


# --- two calls that differ in anything share nothing that matters ----------------------------------------------------


def causal_bias(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score - (q_idx - kv_idx)


def even_keys(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx % 2 == 0


class Subclass(np.ndarray):
    pass


ONES = {dtype: np.ones((2, 4, 40, 16), dtype) for dtype in (np.float16, np.float32, np.float64)}
HALF = ONES[np.float16]
#: For each argument values of which many are equal and yet not the same, not hashable, or wrong.
VALUES: dict[str, list[Any]] = {
    "query": [
        *ONES.values(),
        HALF[:, :, :1],
        HALF[:, :, ::2],
        HALF[:1],
        HALF[0],
        HALF[0, 0],
        HALF[0, 0, 0],
        HALF[..., :8],
        HALF.view(Subclass),
        HALF.swapaxes(1, 2),
        HALF.tolist(),
        HALF.astype(">f2"),
        HALF[..., 1:9],
        HALF.view(np.int16),
    ],
    "key": [
        HALF,
        HALF[:, :2],
        HALF[:, :, :39],
        HALF[:, :, ::2],
        ONES[np.float32],
        HALF[0],
        HALF[0, 0, 0],
        HALF.tolist(),
    ],
    "value": [HALF, HALF[:, :2], HALF[:, :, :39], HALF[..., :8], HALF[..., 1:9], ONES[np.float32], HALF[0, 0, 0], None],
    "attn_mask": [
        None,
        np.ones((40, 40), bool),
        np.ones(40, bool),
        np.ones((40, 40), np.float16),
        np.ones(39, bool),
        np.ones(40, np.float32),
        np.ones((40, 1), np.float16),
        (np.ones(40, np.float16), np.ones(40, bool)),
        1,
        True,
    ],
    "dropout_p": [0.0, 0, False, None, 1, 1.0, True, 0.5, np.float32(0.5), -0.0, 2, [0.5], np.ones(2), "0.5"],
    "is_causal": [False, True, 0, 1, 1.0, np.True_, np.False_, None, "yes", [], np.ones(2)],
    "scale": [None, 1, 1.0, True, 0.25, np.float32(0.25), 0, -0.0, -1.0, 1e-30, float("nan"), "1", [1.0], np.ones(2)],
    "enable_gqa": [False, True, 0, 1, np.True_, None, {}],
    "window": [None, (None, None), (-1, -1), (3, 0), [3, 0], (3, False), (3.0, 0), (3,), 3, (0, 3), (3, None), "30"],
    "align": ["top_left", "bottom_right", 0, 1, True, False, 1.0, None, "left", -5, np.int8(1), [0], np.ones(2)],
    "softcap": [0.0, 0, False, None, 1, 1.0, True, -1.0, -0.0, 30, 30.0, float("inf"), "1", [1.0], np.ones(2)],
    "alibi_slopes": [None, np.ones(4, np.float32), np.ones((2, 4), np.float32), np.ones(4), np.ones(3, np.float32)],
    "sinks": [None, np.ones(4, np.float32), np.ones(4, np.float16), np.ones(4), np.ones(3, np.float32)],
    "score_mod": [None, causal_bias, 0, False, "mod"],
    "mask_mod": [None, even_keys, 0, False, "mod"],
    "seed": [0, 1, True, None, np.uint64(1), np.ones(1, np.uint64), -1, 1.0, "1"],
    "precision": ["ieee", np.str_("ieee"), "tf32", "tf64", None, 0, ["ieee"], b"ieee"],
    "return_lse": [False, True, 0, 1, np.True_, None],
    "return_weights": [False, True, 0, 1, np.True_, None],
    "out": [None, np.ones((2, 4, 40, 16), np.float16), np.ones((2, 4, 40, 32), np.float16)[..., ::2], HALF[0], 1],
    "stage": [None, "raw", "biased", "softmax"],
}
BASES: list[dict[str, Any]] = [
    {"query": HALF, "key": HALF, "value": HALF},
    {
        "query": HALF,
        "key": HALF[:, :2],
        "value": HALF[:, :2],
        "enable_gqa": True,
        "is_causal": True,
        "return_lse": True,
    },
    {
        "query": HALF[:, :, :1],
        "key": HALF,
        "value": HALF,
        "align": "bottom_right",
        "window": (30, 0),
        "sinks": single(4),
    },
    {"query": HALF, "key": HALF, "value": HALF, "dropout_p": 0.5, "seed": 1, "softcap": 1.0, "return_weights": True},
]


def forget_all() -> None:
    forget()
    for cached in (choose_module, strides_module, bulk_module):
        for member in vars(cached).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


def outcome(arguments: dict[str, Any]) -> Any:
    """All that a call comes to before it is run, or what is wrong with it."""
    np.random.seed(0)  # noqa: NPY002, for the seed of dropout
    try:
        problem, buffers = normalize(**arguments)
        if reasons := refusals(problem):
            return repr(problem), reasons
        mods = trace_mods(problem, buffers)
        plan = plan_of(problem, buffers, DEVICES["H200"], mods and mods.structure)
        operands = prepare(problem, plan, buffers, lambda array: 1 << 20, mods, emulated_map)
        found = [(launch, [block.tobytes() for block in args]) for launch, args in launches(problem, plan, operands)]
    except (TypeError, ValueError, cupyflash.Unsupported) as error:
        return type(error), str(error)
    return repr(problem), [(x.shape, x.dtype) if isinstance(x, np.ndarray) else x for x in buffers], found


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("base", BASES, ids=["plain", "gqa", "decode", "dropout"])
def test_what_a_call_comes_to_does_not_hang_on_the_calls_before(base: dict[str, Any], name: str) -> None:
    calls = [{**base, name: value} for value in VALUES[name]]
    fresh = []
    for call in calls:
        forget_all()
        fresh.append(outcome(call))
    for first, second in itertools.permutations(range(len(calls)), 2):
        forget_all()
        outcome(calls[first])
        assert outcome(calls[second]) == fresh[second], (VALUES[name][first], VALUES[name][second])
    for _ in range(2):  # all of them known
        assert [outcome(call) for call in calls] == fresh
