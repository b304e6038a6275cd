"""Backends by name: a third party's joins, a named one is obeyed or refused with reasons, never replaced."""

from __future__ import annotations

import numpy as np
import pytest

import cupyflash
from cupyflash.backends import registry
from cupyflash.problem.parts import Parts
from cupyflash.problem.problem import Buffers, Problem

X = np.ones((2, 3, 4), np.float32)


class Constant:
    """Fills the output with its number, and runs float32 without dropout only."""

    def __init__(self, number: float) -> None:
        self.number = number

    def reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.dtype != "float32":
            reasons.append(f"it has no {problem.dtype}")
        if problem.dropout_p:
            reasons.append("it has no dropout")
        return reasons

    def run(self, problem: Problem, buffers: Buffers) -> None:
        buffers.out[...] = self.number
        if buffers.lse is not None:
            buffers.lse[...] = problem.seqlen_k


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPYFLASH_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))


def test_a_registered_backend_runs_by_name_alone() -> None:
    cupyflash.register_backend("constant", Constant(7))
    assert "constant" in cupyflash.backends()
    out, lse = cupyflash.attention(X, X, X, return_lse=True, backend="constant")
    assert (out == 7).all()
    assert (lse == 3).all()
    assert (cupyflash.attention(X, X, X) == 1).all()


def test_a_backend_without_merge_says_so() -> None:
    cupyflash.register_backend("constant", Constant(7))
    parts = ([X, X], [X[..., 0], X[..., 0]])
    with pytest.raises(cupyflash.Unsupported, match="constant: it can't merge: it has no methods merge_reasons and"):
        cupyflash.merge_attention(*parts, backend="constant")

    class Merging(Constant):
        def merge_reasons(self, parts: Parts) -> list[str]:
            return [] if len(parts.outs) == 2 else ["it merges two parts"]

        def merge(self, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
            return parts.outs[1], parts.lses[1]

    cupyflash.register_backend("constant", Merging(7), overwrite=True)
    assert cupyflash.merge_attention(*parts, backend="constant")[0] is X
    with pytest.raises(cupyflash.Unsupported, match="constant: it merges two parts"):
        cupyflash.merge_attention([X], [X[..., 0]], backend="constant")


def test_overwrite() -> None:
    cupyflash.register_backend("constant", Constant(7))
    cupyflash.register_backend("constant", Constant(8), overwrite=True)
    assert (cupyflash.attention(X, X, X, backend="constant") == 8).all()


def test_a_class_is_no_backend() -> None:
    with pytest.raises(TypeError, match=r"backend must be an object .*, but was the class"):
        cupyflash.register_backend("constant", Constant)  # type: ignore[arg-type]


def test_the_environment_chooses_and_the_argument_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cupyflash.register_backend("constant", Constant(7))
    monkeypatch.setenv("CUPYFLASH_BACKEND", "constant")
    assert (cupyflash.attention(X, X, X) == 7).all()
    assert (cupyflash.attention(X, X, X, backend="numpy") == 1).all()
    monkeypatch.setenv("CUPYFLASH_BACKEND", "")
    assert (cupyflash.attention(X, X, X) == 1).all()


def test_an_unsupported_call_prints_the_problem_and_every_reason() -> None:
    cupyflash.register_backend("constant", Constant(7))
    half = X.astype(np.float16)
    with pytest.raises(cupyflash.Unsupported) as caught:
        cupyflash.attention(half, half, half, dropout_p=0.5, is_causal=True, backend="constant")
    assert caught.value.reasons.keys() == {"numpy", "math", "cuda", "emulator", "constant"}
    assert caught.value.reasons["numpy"] == caught.value.reasons["math"] == ()
    assert caught.value.reasons["constant"] == ("it has no float16", "it has no dropout")
    message = str(caught.value)
    for part in (
        "backend 'constant' can't run this call",
        "numpy float16",
        "L=3 S=3 E=4 Ev=4",
        "dropout_p=0.5",
        "j - i <= 0",
        "constant: it has no float16; it has no dropout",
        'numpy: it can run this: pass backend="numpy"',
    ):
        assert part in message
    assert isinstance(caught.value, NotImplementedError)
    assert isinstance(caught.value, cupyflash.CupyflashError)


def test_a_named_backend_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPYFLASH_BACKEND", "constant")
    cupyflash.register_backend("constant", Constant(7))
    double = X.astype(np.float64)
    with pytest.raises(cupyflash.Unsupported, match="constant: it has no float64"):
        cupyflash.attention(double, double, double)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_reduced_precision_is_refused_by_both_backends(precision: str) -> None:
    with pytest.raises(cupyflash.Unsupported) as caught:
        cupyflash.attention(X, X, X, precision=precision)
    reason = (f"it has no precision {precision!r}, only 'ieee'",)
    assert caught.value.reasons["numpy"] == caught.value.reasons["math"] == reason
