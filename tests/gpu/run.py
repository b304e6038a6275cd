"""Everything there is to do on a GPU, in one command: `make gpu`.

    python -m tests.gpu.run [--stages conformance,tests,sanitizer,bench] [--out build/gpu]

===========  ==========================================================================================================
conformance  records what the ISA layer's instructions give, into tests/kernels/recorded, and replays it
tests        ``pytest -m gpu``
sanitizer    compute-sanitizer's memcheck, racecheck and synccheck over small calls
bench        benchmarks/bench_gpu.py
===========  ==========================================================================================================

Every command runs in a process group of its own under a time limit, and a stage runs whatever became of the one before.
``--out`` gets each stage's log as it is written, copies of the results to commit, and ``summary.json``, rewritten after
every command.  The exit status is 0 if all went well, 1 if not, 2 if there is no GPU.

The order of stages and their limits are tested without a GPU; what the commands do on one nobody has seen yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from tests.gpu.device import NO_GPU

ROOT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 540.0
GPU_SECONDS = 60.0  # for the first contact with the driver
SANITIZER_FAILED = 9
TOOLKIT = "/usr/local/cuda/bin"  # where CUDA puts its tools unless told otherwise


@dataclass(frozen=True)
class Command:
    """``words``, as for subprocess; ``seconds`` after which it is killed."""

    name: str
    words: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Stage:
    """Commands that all run, and glob patterns, from the checkout's root, of the results they leave to be committed."""

    name: str
    commands: tuple[Command, ...]
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """``status``: "passed", or why not."""

    stage: str
    command: str
    status: str
    seconds: float


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def sanitizer(tool: str) -> Command:
    words = ("compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FAILED))
    return Command(tool, (*words, *python("-m", "tests.gpu.small_calls")), 45)


STAGES = (
    Stage(
        "conformance",
        (
            Command("record", python("-m", "tests.gpu.record"), 45),
            Command("replay", python("-m", "pytest", "-q", "--require-cxx", "tests/kernels/test_conformance.py"), 45),
        ),
        ("tests/kernels/recorded/*.npz",),
    ),
    Stage(
        "tests",
        (Command("pytest", python("-m", "pytest", "-m", "gpu", "--require-gpu", "--require-nvrtc", "tests"), 150),),
    ),
    Stage("sanitizer", (sanitizer("memcheck"), sanitizer("racecheck"), sanitizer("synccheck"))),
    Stage("bench", (Command("bench_gpu", python("benchmarks/bench_gpu.py"), 150),), ("benchmarks/results/gpu-*",)),
)


def run_stages(stages: Sequence[Stage], out: Path, total_seconds: float = TOTAL_SECONDS) -> list[Outcome]:
    """Runs all commands, one after the other, none longer than the time that is left.

    Parameters
    ----------
    out : Path
        A folder, made if it is not there: ``<stage>.log``, the stages' results, ``summary.json``.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    until = time.monotonic() + total_seconds
    outcomes: list[Outcome] = []
    for stage in stages:
        log = out / f"{stage.name}.log"
        log.write_bytes(b"")
        for command in stage.commands:
            print(f"== {stage.name}: {command.name}", flush=True)
            started = time.monotonic()
            status = run_command(command, log, min(command.seconds, until - started), out)
            outcomes.append(Outcome(stage.name, command.name, status, round(time.monotonic() - started, 1)))
            summary = json.dumps([asdict(outcome) for outcome in outcomes], indent=1)
            (out / "summary.json").write_text(summary, encoding="utf-8")
        for pattern in stage.results:
            for path in ROOT.glob(pattern):
                if path.stat().st_mtime >= began - 1:  # file systems round
                    shutil.copy2(path, out)
    return outcomes


def run_command(command: Command, log: Path, seconds: float, out: Path) -> str:
    """Runs it with its output at the end of ``log`` and on the terminal; returns the status of its `Outcome`."""
    if seconds <= 0:
        return "not started: no time is left"
    program = shutil.which(command.words[0]) or shutil.which(command.words[0], path=TOOLKIT)
    if program is None:
        return f"not started: {command.words[0]} is neither on the path nor in {TOOLKIT}"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUPYFLASH_MEASURED": str(out.resolve() / "measured.json")}
    with (
        log.open("ab") as file,
        subprocess.Popen(
            [program, *command.words[1:]],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        copier = threading.Thread(target=copy_output, args=(process.stdout, file))
        copier.start()
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # What the command started and left running would hold the pipe, and the GPU.
            kill_group(process.pid)
            copier.join()
    if code is None:
        return f"killed after {seconds:.0f} s"
    return "passed" if code == 0 else f"failed with status {code}"


def copy_output(source: IO[bytes], file: IO[bytes]) -> None:
    for line in source:
        file.write(line)
        file.flush()
        sys.stdout.write(line.decode(errors="replace"))
        sys.stdout.flush()


def kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return  # all have ended


def choose(names: str, stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """The stages of a comma-separated list, in our order.

    Raises
    ------
    ValueError
        There is no stage of that name.
    """
    wanted = [name.strip() for name in names.split(",")]
    known = [stage.name for stage in stages]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--stages names {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}")
    return [stage for stage in stages if stage.name in wanted]


def describe_gpu() -> str:
    """The GPU as JSON, found by a process of its own, so that none of ours holds the device.

    Raises
    ------
    RuntimeError
        There is none; the message says what is missing.
    """
    command = python("-m", "tests.gpu.device")
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=GPU_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the driver did not answer in {GPU_SECONDS:.0f} s") from None
    if answer.returncode != 0:
        raise RuntimeError(answer.stderr.strip() or f"{' '.join(command)} ended with status {answer.returncode}")
    return answer.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record, test, check and measure on a GPU.")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of logs and results")
    given = parser.parse_args(arguments)
    try:
        stages = choose(given.stages)
    except ValueError as error:
        parser.error(str(error))
    try:
        print(describe_gpu(), flush=True)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return NO_GPU
    outcomes = run_stages(stages, given.out)
    print()
    for outcome in outcomes:
        print(f"{outcome.stage:12} {outcome.command:10} {outcome.seconds:6.1f} s  {outcome.status}")
    print(f"logs and results: {given.out}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
