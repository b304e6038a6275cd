"""Random score and mask functions, and what NumPy makes of them in the precision of kernels."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.kernels.mods import coordinates

COMPARISONS = [np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal]


class Narrow(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that computes in float32 what NumPy would in float64."""

    def __init__(self, values: Any) -> None:
        values = np.asarray(values)
        self.values = values.astype(np.float32) if values.dtype == np.float64 else values

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        operands = [x.values if isinstance(x, Narrow) else x for x in inputs]
        operands = [np.bool_(x) if isinstance(x, bool) else x for x in operands]
        types = [x.dtype if isinstance(x, np.ndarray | np.generic) else type(x) for x in operands]
        *loop, _ = ufunc.resolve_dtypes((*types, None))
        narrow = [np.float32 if dtype == np.float64 else dtype for dtype in loop]
        with np.errstate(all="ignore"):
            return Narrow(ufunc(*(np.asarray(x).astype(dtype) for x, dtype in zip(operands, narrow, strict=True))))

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        if function is np.clip:
            return np.minimum(np.maximum(args[0], args[1]), args[2])
        return Narrow(function(*(x.values if isinstance(x, Narrow) else x for x in args), **options))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.values, dtype)

    def astype(self, dtype: Any) -> Narrow:
        return Narrow(self.values.astype(dtype))

    def __abs__(self) -> Narrow:
        return np.absolute(self)

    def __pow__(self, exponent: int) -> Narrow:
        return Narrow(self.values**exponent)  # the operator has ways that np.power has not


def called_scores(function: Any, scores: np.ndarray) -> np.ndarray:
    """What NumPy gives, in the scores' precision."""
    wrap = Narrow if scores.dtype == np.float32 else np.asarray
    with np.errstate(all="ignore"):
        result = np.asarray(function(wrap(scores), *map(wrap, coordinates(scores.shape))))
    return np.broadcast_to(result.astype(scores.dtype), scores.shape)


# --- random expressions ----------------------------------------------------------------------------------

INTEGERS = np.random.default_rng(3).integers(-50, 50, (3, 5)).astype(np.int32)
BYTES = np.random.default_rng(4).integers(0, 255, 37).astype(np.uint8)
REALS = np.random.default_rng(5).standard_normal((5, 37)).astype(np.float32)

_integer_operators = st.sampled_from(
    [
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod),
        *(operator.and_, operator.or_, operator.xor, np.minimum, np.maximum, np.fmod),
    ]
)
# A zero's sign is not specified for minimum and maximum, and 1 / x would see it.
_real_operators = st.sampled_from(
    [
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
        *(lambda x, y: np.minimum(x, y) + 0, lambda x, y: np.maximum(x, y) + 0),
    ]
)
comparisons = st.sampled_from(COMPARISONS)


def read(array: Any, *index: Any) -> Any:
    """An element; NumPy's arrays do not give a `Narrow`."""
    value = array[index]
    return Narrow(value) if isinstance(index[-1], Narrow) else value


def _leaf_integers() -> st.SearchStrategy[Any]:
    def constant(value: int) -> Any:
        return lambda at: value + 0 * at["kv_idx"]

    return st.one_of(
        st.sampled_from(["b", "h", "q_idx", "kv_idx"]).map(lambda name: lambda at: at[name]),
        st.integers(-40, 40).map(constant),
        st.sampled_from([2**31 - 1, -(2**31), 2**40]).map(constant),
        st.just(lambda at: read(INTEGERS, at["h"], at["row"])),
        st.just(lambda at: read(BYTES, at["column"])),
        st.just(lambda at: read(INTEGERS, 0, at["kv_idx"] % 5)),
    )


def _binary(operators: st.SearchStrategy[Any], x: Any, y: Any) -> st.SearchStrategy[Any]:
    return st.tuples(operators, x, y).map(lambda t: lambda at: t[0](t[1](at), t[2](at)))


def _where(x: Any, y: Any) -> st.SearchStrategy[Any]:
    return st.tuples(comparisons, x, x, y, y).map(
        lambda t: lambda at: np.where(t[0](t[1](at), t[2](at)), t[3](at), t[4](at))
    )


integers = st.recursive(
    _leaf_integers(),
    lambda inner: st.one_of(
        _binary(_integer_operators, inner, inner),
        inner.map(lambda f: lambda at: abs(f(at))),
        inner.map(lambda f: lambda at: -f(at)),
        inner.map(lambda f: lambda at: ~f(at)),
        st.tuples(inner, st.integers(0, 9)).map(lambda t: lambda at: t[0](at) << t[1]),
        st.tuples(inner, st.integers(0, 70)).map(lambda t: lambda at: t[0](at) >> t[1]),
        _where(inner, inner),
        inner.map(lambda f: lambda at: read(INTEGERS, 1, np.clip(f(at).astype(np.int64), -5, 4))),
    ),
    max_leaves=12,
)
reals = st.recursive(
    st.one_of(
        integers.map(lambda f: lambda at: f(at) * np.float32(0.5)),
        st.just(lambda at: read(REALS, at["row"], at["column"])),
        st.just(lambda at: at["score"]),
        st.floats(-4, 4, width=32).map(lambda value: lambda at: at["score"] * 0 + value),
    ),
    lambda inner: st.one_of(
        _binary(_real_operators, inner, inner),
        inner.map(lambda f: lambda at: np.sqrt(abs(f(at)))),
        inner.map(lambda f: lambda at: np.floor(f(at))),
        inner.map(lambda f: lambda at: f(at) ** 2),
        _where(inner, inner),
        _where(integers, inner),
    ),
    max_leaves=10,
)
masks = st.one_of(_binary(comparisons, integers, integers), _binary(comparisons, reals, reals))


def _at(q_idx: Any, kv_idx: Any, **more: Any) -> dict[str, Any]:
    """By name, what a tree computes with; `row` and `column` are within the arrays."""
    return {"q_idx": q_idx, "kv_idx": kv_idx, "row": q_idx % 5, "column": kv_idx % 37, **more}


def score_mod_of(tree: Any) -> Any:
    """A tree as a score_mod."""
    return lambda score, b, h, q_idx, kv_idx: tree(_at(q_idx, kv_idx, score=score, b=b, h=h))


def mask_mod_of(tree: Any) -> Any:
    """A tree as a mask_mod: what it takes for the score is read from an array."""

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        score = REALS[q_idx % 5, kv_idx % 37].astype(np.float64)
        return tree(_at(q_idx, kv_idx, score=score, b=b, h=h))

    return mask_mod
