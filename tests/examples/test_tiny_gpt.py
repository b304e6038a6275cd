"""examples/tiny_gpt.py: what it generates is what its text has shown, with a cache, without, and on CuPy's arrays."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.examples.test_examples import EXAMPLES, find_number, run_example

TEXT = list(b"12345678A 12345678B 12345678")  # A and B have come next equally often


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("tiny_gpt")


def generate(example: ModuleType, pieces: list[list[int]], xp: Any, backend: str | None = None) -> Any:
    """The probabilities after every token, one call for each piece of the text."""
    layers = example.make_layers(xp)
    caches = [example.Cache(layer, sum(map(len, pieces)), xp) for layer in layers]
    return np.concatenate([example.forward(piece, layers, caches, backend, xp) for piece in pieces])


def test_the_rhyme_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    printed = run_example("tiny_gpt.py", "--tokens", "45", "--temperature", "0", folder=tmp_path)
    assert "and goes on\nThat worried the cat,\nThat " in printed
    assert find_number(r"prompt +(\d+) tokens", printed) == 443
    assert find_number(r"decode +(\d+) tokens", printed) == 44
    assert 0 <= find_number(r"difference +(\S+):", printed) < 1e-4


def test_a_prompt_of_the_reader(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("äöü and äöü and ä", encoding="utf-8")
    example.main(["--prompt", str(prompt), "--tokens", "6", "--backend", "math", "--temperature", "0"])
    assert "and goes on\nöü a\n" in capsys.readouterr().out


def test_probabilities_are_the_shares_of_what_came_next(example: ModuleType) -> None:
    probabilities = generate(example, [TEXT], np)
    assert probabilities.shape == (len(TEXT), 256)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    # Nowhere else do as many bytes agree, but bits do, by chance.
    assert probabilities[-1][list(b"AB")] == pytest.approx(0.5, abs=0.02)
    assert example.choose(probabilities[-2], 0, np.random.default_rng(0)) == ord("8")
    drawn = {example.choose(probabilities[-1], 1.0, np.random.default_rng(seed)) for seed in range(20)}
    assert drawn >= set(b"AB")


@pytest.mark.parametrize("pieces", [[28], [1] * 28, [20, 1, 5, 2]], ids=["whole", "steps", "pieces"])
def test_a_cache_changes_nothing(example: ModuleType, pieces: list[int]) -> None:
    stops = np.cumsum(pieces)
    cut = [TEXT[stop - size : stop] for stop, size in zip(stops, pieces, strict=True)]
    whole = example.forward(TEXT, example.make_layers(np), None, None, np)
    np.testing.assert_allclose(generate(example, cut, np), whole, rtol=0, atol=1e-5)


def test_cupy_arrays_give_the_same(example: ModuleType, cupy: Any) -> None:
    pieces = [TEXT[:20], TEXT[20:21], TEXT[21:]]
    found = generate(example, pieces, cupy, backend="math")
    np.testing.assert_allclose(found, generate(example, pieces, np, backend="math"), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("math_on_cuda")
def test_the_backend_cuda_takes_cupy_arrays(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--backend", "cuda", "--tokens", "12", "--temperature", "0"])
    assert "and goes on\nThat worried\n" in capsys.readouterr().out


def test_wrong_numbers_are_named(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--tokens", "0"], ["--temperature", "-1"], ["--temperature", "nan"]):
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert f"{arguments[0]}{':' if arguments[0] == '--tokens' else ''} {arguments[1]}" in capsys.readouterr().err
