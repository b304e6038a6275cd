"""`make compile-all` in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest

from cupyflash.plan.specs import COMPANIONS
from tests.compile import all as compile_all
from tests.compile.compiling import code_of
from tests.compile.selection import Pair, every_pair

PAIRS = [Pair(spec, "sm_80") for spec in COMPANIONS[:3]]


@pytest.mark.slow
def test_a_run_goes_on_where_another_stopped(
    nvrtc: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.jsonl"
    assert compile_all.check(PAIRS[:2], record, 1) == 0
    assert "2 cubins, 2 of them compiled" in capsys.readouterr().out
    with record.open("a", encoding="utf-8") as file:
        file.write('["stopped within a li\n')
    assert compile_all.check(PAIRS, record, 1) == 0
    assert "3 cubins, 1 of them compiled" in capsys.readouterr().out
    known = record.read_text(encoding="utf-8")
    assert compile_all.check(PAIRS, record, 1) == 0
    assert "3 cubins, 0 of them compiled" in capsys.readouterr().out
    assert record.read_text(encoding="utf-8") == known


@pytest.mark.slow
def test_what_is_wrong_is_told_every_time(
    nvrtc: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = Pair(COMPANIONS[0], "sm_1")
    for compiled in (1, 0):
        assert compile_all.check([refused], tmp_path / "record.jsonl", 1) == 1
        said = capsys.readouterr().out
        assert f"{refused}: NVRTC could not compile" in said
        assert f"1 cubins, {compiled} of them compiled" in said
        assert "1 with something wrong" in said


def test_other_words_are_no_other_kernel() -> None:
    text = '#line 1 "a.cuh"\nint f() { return 1; }  // one\n'
    explained = '#line 1 "a.cuh"\n// What f gives.\nint f() { return 1; }\n\n#line 7 "b.cu"\n'
    assert code_of(text) == code_of(explained)
    assert code_of(text) != code_of(text.replace("1;", "2;"))


def test_shards_share_all_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[list[Pair]] = []
    monkeypatch.setattr(compile_all, "check", lambda pairs, record, jobs: shares.append(pairs) or 0)
    monkeypatch.setenv("CUPYFLASH_CACHE", str(tmp_path))
    every = every_pair()
    monkeypatch.setattr(compile_all, "every_pair", lambda: every)
    for index in (1, 2, 3):
        assert compile_all.main(["--shard", f"{index}/3"]) == 0
    assert sorted(str(pair) for share in shares for pair in share) == sorted(map(str, every))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    compile_all.main(["--match", "for-sm_75"])
    assert {pair.arch for pair in shares[-1]} == {"sm_75"}


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b"])
def test_a_shard_that_is_not_there(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compile_all.main(["--shard", shard])
    assert shard in capsys.readouterr().err
