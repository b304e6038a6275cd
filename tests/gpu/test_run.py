"""The runner of `make gpu` with stages of its own: one's failure is not another's, and everything is written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.device import NO_GPU, find_gpu
from tests.gpu.run import ROOT, STAGES, TOTAL_SECONDS, Command, Stage, choose, main, python, run_stages


def stage(name: str, code: str, seconds: float = 60, results: tuple[str, ...] = ()) -> Stage:
    return Stage(name, (Command("run", python("-c", code), seconds),), results)


def summary(out: Path) -> list[tuple[str, str]]:
    return [(row["stage"], row["status"]) for row in json.loads((out / "summary.json").read_text(encoding="utf-8"))]


def test_stages_survive_one_another(tmp_path: Path) -> None:
    stages = [
        stage("fails", "print('so far'); raise SystemExit(3)"),
        stage("crashes", "import os; os.abort()"),
        stage("hangs", "import time; print('waiting', flush=True); time.sleep(600)", seconds=1),
        Stage("lacks", (Command("run", ("no-such-program", "--version"), 5),)),
        stage("works", "print('fine')"),
    ]
    outcomes = run_stages(stages, tmp_path)
    assert summary(tmp_path) == [(outcome.stage, outcome.status) for outcome in outcomes]
    assert summary(tmp_path) == [
        ("fails", "failed with status 3"),
        ("crashes", "failed with status -6"),
        ("hangs", "killed after 1 s"),
        ("lacks", "not started: no-such-program is neither on the path nor in /usr/local/cuda/bin"),
        ("works", "passed"),
    ]
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert logs["fails.log"] == "so far\n"
    assert logs["hangs.log"] == "waiting\n"
    assert logs["works.log"] == "fine\n"


def test_what_a_command_leaves_running_is_ended(tmp_path: Path) -> None:
    """Or it would hold the GPU, and the pipe that we read."""
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    code = f"import subprocess, sys; print(subprocess.Popen({sleeper}).pid)"
    started = time.monotonic()
    (outcome,) = run_stages([stage("leaves", code)], tmp_path)
    assert outcome.status == "passed"
    assert time.monotonic() - started < 60
    child = int((tmp_path / "leaves.log").read_text())
    for _ in range(100):  # it is dead at once, and gone when its new parent has noticed
        if has_ended(child):
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {child} still runs")


def has_ended(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_summary_is_there_after_every_command(tmp_path: Path) -> None:
    look = f"import json; print(len(json.load(open({str(tmp_path / 'summary.json')!r}))))"
    run_stages([stage("first", ""), stage("second", look)], tmp_path)
    assert (tmp_path / "second.log").read_text() == "1\n"


def test_all_commands_of_a_stage_run(tmp_path: Path) -> None:
    fails = python("-c", "print('a'); raise SystemExit(1)")
    commands = (Command("a", fails, 60), Command("b", python("-c", "print('b')"), 60))
    outcomes = run_stages([Stage("both", commands)], tmp_path)
    assert [(outcome.command, outcome.status) for outcome in outcomes] == [
        ("a", "failed with status 1"),
        ("b", "passed"),
    ]
    assert (tmp_path / "both.log").read_text() == "a\nb\n"


def test_the_whole_is_limited(tmp_path: Path) -> None:
    stages = [stage("long", "import time; time.sleep(600)"), stage("late", "")]
    outcomes = run_stages(stages, tmp_path, total_seconds=1)
    assert [outcome.status for outcome in outcomes] == ["killed after 1 s", "not started: no time is left"]


def test_results_are_copied_if_they_are_new(tmp_path: Path) -> None:
    folder = ROOT / "build" / f"test-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        (folder / "old.json").write_text("old")
        os.utime(folder / "old.json", (0, 0))
        code = f"import pathlib; pathlib.Path({str(folder / 'new.json')!r}).write_text('new')"
        run_stages([stage("writes", code, results=(f"build/{folder.name}/*.json",))], tmp_path)
        assert (tmp_path / "new.json").read_text() == "new"
        assert not (tmp_path / "old.json").exists()
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_stages_are_chosen_by_name() -> None:
    assert [stage.name for stage in choose("bench, conformance")] == ["conformance", "bench"]
    with pytest.raises(
        ValueError, match=r"'speed'; expected some of conformance, build, tests, fuzz, sanitizer, profile, bench"
    ):
        choose("bench,speed")


def test_the_limits_fit_into_the_whole() -> None:
    assert sum(command.seconds for stage in STAGES for command in stage.commands) <= TOTAL_SECONDS <= 9 * 60


def test_python_commands_name_what_there_is() -> None:
    for words in (command.words for stage in STAGES for command in stage.commands):
        words = words[words.index(sys.executable) + 1 :]
        if words[0] == "-m" and words[1] != "pytest":
            assert (ROOT / words[1].replace(".", "/")).with_suffix(".py").is_file(), words
        for word in words:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), words


def test_what_may_fail_fails_nothing(tmp_path: Path) -> None:
    fails = python("-c", "raise SystemExit(3)")
    commands = (Command("profiler", fails, 60, is_optional=True), Command("lacking", ("no-such-program",), 5, True))
    outcomes = run_stages([Stage("both", commands)], tmp_path)
    assert [(outcome.status.split(":")[0], outcome.is_failure) for outcome in outcomes] == [
        ("failed with status 3", False),
        ("not started", False),
    ]
    (outcome,) = run_stages([Stage("one", (Command("test", fails, 60),))], tmp_path)
    assert outcome.is_failure


def test_a_dry_run_needs_no_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--dry-run", "--out", str(tmp_path / "never")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")][:-1] == [stage.name for stage in STAGES]
    assert lines[-1] == "at most 540 s in all"
    assert "  memcheck, at most 30 s: compute-sanitizer --tool memcheck --error-exitcode 9 python -m" in "\n".join(
        lines
    )
    assert any(line.startswith("  ncu, at most 30 s, may fail: ncu --clock-control none ") for line in lines)
    assert "  keeps benchmarks/results/gpu-*" in lines
    assert not (tmp_path / "never").exists()
    assert main(["--dry-run", "--stages", "fuzz"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *("fuzz", "  random, at most 135 s: python -m tests.gpu.fuzz --seconds 120", "at most 135 s in all")
    ]


@pytest.mark.parametrize(
    "words",
    [(f"tests.gpu.{name}",) for name in ("run", "record", "device", "small_calls", "fuzz", "build", "main_kernels")],
)
def test_without_a_gpu(words: tuple[str, ...]) -> None:
    gpu, reason = find_gpu()
    if gpu is not None:
        pytest.skip(f"there is a GPU: {gpu.name}")
    answer = subprocess.run(python("-m", *words), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == NO_GPU, answer.stderr
    assert reason.split("(")[0] in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
