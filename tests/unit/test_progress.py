"""`cupyflash.progress`: what is shown of a call, and by whom."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import numpy as np
import pytest

import cupyflash
from tests.cases import CASES, heads

LONG = ("causal-(513,255)", "all-at-once-over-tiles", "decode-float16", "gqa-over-tiles", "jumping-bool-mask")


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("name", LONG)
def test_it_goes_from_nothing_to_all_of_it(name: str, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPYFLASH_NUM_THREADS", threads)
    arguments = CASES[name].arguments()
    expected = cupyflash.attention(**arguments, backend="numpy")
    seen: list[tuple[int, int]] = []
    with cupyflash.progress(lambda done, total: seen.append((done, total))):
        result = cupyflash.attention(**arguments, backend="numpy")
    for part, right in zip(result, expected, strict=True):
        assert part.tobytes() == right.tobytes(), "looking does not change it"
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert done[0] == 0
    assert done[-1] == totals[0]
    assert list(done) == sorted(done)
    assert done.count(totals[0]) == 1, "the end comes once"
    seen.clear()
    cupyflash.attention(**arguments, backend="numpy")
    assert seen == [], "it is over with the context"


@pytest.mark.parametrize("is_causal", [False, True])
def test_scores_are_counted_exactly_on_one_thread(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPYFLASH_NUM_THREADS", "1")
    x = np.zeros((2, 3, 1500, 8), np.float32)
    seen: list[tuple[int, int]] = []
    with cupyflash.progress(lambda done, total: seen.append((done, total))):
        cupyflash.attention(x, x, x, is_causal=is_causal)
    rows = 1500 * 1500 * 6
    assert seen[-1] == (rows, rows) if not is_causal else rows / 2 < seen[-1][0] < rows * 0.7
    assert len(seen) > 10
    steps = np.diff([done for done, _ in seen])
    assert (steps > 0).all()
    assert steps.sum() == seen[-1][1], "nothing is missed, and nothing is made up for at the end"
    assert steps[-1] <= steps.max()


def test_weights_and_second_passes_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPYFLASH_NUM_THREADS", "1")
    arguments = heads(2, 2, 600, 1100, 16).arguments() | {"return_weights": True}
    arguments["value"] = arguments["value"].copy()
    arguments["value"][0, 0, 5] = np.nan  # the exact pass
    seen: list[tuple[int, int]] = []
    with cupyflash.progress(lambda done, total: seen.append((done, total))):
        cupyflash.attention(**arguments)
    assert seen[-1][0] == seen[-1][1] == 2 * 2 * 600 * 1100
    assert max(done for done, _ in seen[:-1]) < seen[-1][1]


def test_the_calling_thread_shows_and_calls_within_do_not() -> None:
    arguments = heads(1, 2, 600, 1100, 8).arguments() | {"return_lse": False}
    shown = set()

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        cupyflash.attention(np.ones((4, 8), np.float32), np.ones((4, 8), np.float32), np.ones((4, 8), np.float32))
        return score

    def show(done: int, total: int) -> None:
        shown.add((threading.get_ident(), total))

    with cupyflash.progress(show):
        cupyflash.attention(**arguments | {"score_mod": score_mod})
    assert shown == {(threading.get_ident(), 2 * 600 * 1100)}


def test_other_threads_are_not_shown() -> None:
    seen: list[int] = []
    x = np.ones((600, 8), np.float32)
    with cupyflash.progress(lambda done, total: seen.append(done)):
        thread = threading.Thread(target=lambda: cupyflash.attention(x, x, x))
        thread.start()
        thread.join()
    assert seen == []


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty_calls(shape: tuple[int, ...]) -> None:
    empty, x = np.ones(shape, np.float32), np.ones((2, 4, 8), np.float32)
    seen: list[tuple[int, int]] = []
    with cupyflash.progress(lambda done, total: seen.append((done, total))):
        cupyflash.attention(x if shape[0] else empty, empty, empty)
    assert seen == []


def test_what_show_raises_ends_the_call() -> None:
    arguments = heads(2, 4, 600, 1100, 16).arguments()

    def show(done: int, total: int) -> None:
        if done:
            raise TimeoutError("long enough")

    with pytest.raises(TimeoutError, match="long enough"), cupyflash.progress(show):
        cupyflash.attention(**arguments)
    assert cupyflash.attention(**arguments)[0].shape == (2, 4, 600, 16)


def test_a_show_that_cannot_be_called() -> None:
    with (
        pytest.raises(TypeError, match=r"show must be a callable show\(done, total\) or None, but was 3"),
        cupyflash.progress(3),  # type: ignore[arg-type]
    ):
        raise AssertionError


# ------------------------------------------------------------------------------------------------------------
# The bar
# ------------------------------------------------------------------------------------------------------------


class FakeBar:
    """In place of tqdm's: keeps what it is told."""

    made: list[FakeBar]

    def __init__(self, **options: Any) -> None:
        self.options, self.n, self.closed = options, 0, 0
        self.made.append(self)

    def update(self, n: int) -> None:
        assert not self.closed
        self.n += n

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[FakeBar]:
    FakeBar.made = []
    module = types.ModuleType("tqdm.auto")
    module.tqdm = FakeBar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    return FakeBar.made


def test_each_call_has_a_bar(bars: list[FakeBar]) -> None:
    arguments = heads(1, 2, 600, 1100, 8).arguments()
    with cupyflash.progress():
        for _ in range(2):
            cupyflash.attention(**arguments)
    assert [(bar.options["total"], bar.n, bar.closed) for bar in bars] == [(2 * 600 * 1100, 2 * 600 * 1100, 1)] * 2


def test_a_bar_is_closed_after_an_error(bars: list[FakeBar]) -> None:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"), cupyflash.progress():
        cupyflash.attention(**heads(1, 2, 600, 1100, 8).arguments() | {"score_mod": score_mod})
    assert [bar.closed for bar in bars] == [1]


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm, or pass a callable"), cupyflash.progress():
        raise AssertionError


def test_a_real_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm", reason="the bar is tqdm's, which is not installed")
    monkeypatch.setattr(sys.modules["cupyflash.progress"], "_SECONDS_BEFORE_A_BAR", 0)
    with cupyflash.progress():
        cupyflash.attention(**heads(2, 2, 600, 1100, 8).arguments())
    assert "attention:" in capsys.readouterr().err
