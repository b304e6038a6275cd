"""Everything there is to do on a GPU, in one command: `make gpu`.

    python -m tests.gpu.run [--stages conformance,build,…] [--out build/gpu] [--dry-run]

===========  ==========================================================================================================
conformance  records what the ISA layer's instructions give, into tests/kernels/recorded, and replays it
build        compiles the kernels that the next stages will ask for, on all processors
tests        ``pytest -m gpu``, offsets beyond 2**31 elements among them
fuzz         random calls for two minutes
sanitizer    compute-sanitizer's memcheck, racecheck and synccheck over small calls
profile      Nsight Compute's summary of the main kernels; where it may not read the counters, no harm is done
bench        benchmarks/bench_gpu.py, and what it measured beside what the pipes would allow
===========  ==========================================================================================================

Every command runs in a process group of its own under a time limit, and a stage runs whatever became of the one before.
``--dry-run`` prints the commands with their limits and runs none; it needs no GPU.
``--out`` gets each stage's log as it is written, copies of the results to commit, and ``summary.json``, rewritten after
every command.  The exit status is 0 if all went well, 1 if not, 2 if there is no GPU.

The order of stages and their limits are tested without a GPU; what the commands do on one nobody has seen yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
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
    """``words``, as for subprocess; ``seconds`` after which it is killed; ``is_optional``: it may fail."""

    name: str
    words: tuple[str, ...]
    seconds: float
    is_optional: bool = False


@dataclass(frozen=True)
class Stage:
    """Commands that all run, and glob patterns, from the checkout's root, of the results they leave to be committed."""

    name: str
    commands: tuple[Command, ...]
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """``status``: "passed", or why not; ``is_failure``: the run is one."""

    stage: str
    command: str
    status: str
    seconds: float
    is_failure: bool


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def sanitizer(tool: str) -> Command:
    words = ("compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FAILED))
    return Command(tool, (*words, *python("-m", "tests.gpu.small_calls")), 30)


# Speed of light of compute and memory, what each pipe does, what warps wait for: not all counters, for each group of
# them is one more run of the kernel.  The clocks stay as they are: others may use the GPU after us.
NCU = (
    *("ncu", "--clock-control", "none", "--kernel-name", "regex:flash_", "--print-summary", "per-kernel"),
    *(
        word
        for section in ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats")
        for word in ("--section", section)
    ),
    *("--metrics", "l1tex__data_bank_conflicts_pipe_lsu.sum,sm__inst_executed.sum"),
)

STAGES = (
    Stage(
        "conformance",
        (
            Command("record", python("-m", "tests.gpu.record"), 30),
            Command("replay", python("-m", "pytest", "-q", "--require-cxx", "tests/kernels/test_conformance.py"), 30),
        ),
        ("tests/kernels/recorded/*.npz",),
    ),
    Stage("build", (Command("compile", python("-m", "tests.gpu.build"), 40),)),
    Stage(
        "tests",
        (Command("pytest", python("-m", "pytest", "-m", "gpu", "--require-gpu", "--require-nvrtc", "tests"), 85),),
    ),
    Stage("fuzz", (Command("random", python("-m", "tests.gpu.fuzz", "--seconds", "120"), 135),)),
    Stage("sanitizer", (sanitizer("memcheck"), sanitizer("racecheck"), sanitizer("synccheck"))),
    Stage("profile", (Command("ncu", (*NCU, *python("-m", "tests.gpu.main_kernels")), 30, is_optional=True),)),
    Stage(
        "bench",
        (
            Command("bench_gpu", python("benchmarks/bench_gpu.py", "--seconds", "80"), 90),
            Command("roofline", python("benchmarks/roofline.py", "--results"), 10, is_optional=True),
        ),
        ("benchmarks/results/gpu-*",),
    ),
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
            is_failure = status != "passed" and not command.is_optional
            outcomes.append(Outcome(stage.name, command.name, status, round(time.monotonic() - started, 1), is_failure))
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


def describe(stages: Sequence[Stage]) -> Iterator[str]:
    """What `run_stages` would do: each command with its limit, and the results that are kept."""
    for stage in stages:
        yield f"{stage.name}"
        for command in stage.commands:
            words = ["python" if word == sys.executable else word for word in command.words]
            optional = ", may fail" if command.is_optional else ""
            yield f"  {command.name}, at most {command.seconds:.0f} s{optional}: {shlex.join(words)}"
        yield from (f"  keeps {pattern}" for pattern in stage.results)
    total = sum(command.seconds for stage in stages for command in stage.commands)
    yield f"at most {min(total, TOTAL_SECONDS):.0f} s in all"


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
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    given = parser.parse_args(arguments)
    try:
        stages = choose(given.stages)
    except ValueError as error:
        parser.error(str(error))
    if given.dry_run:
        for line in describe(stages):
            print(line)
        return 0
    try:
        print(describe_gpu(), flush=True)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return NO_GPU
    outcomes = run_stages(stages, given.out)
    print()
    for outcome in outcomes:
        allowed = "" if outcome.status == "passed" or outcome.is_failure else ", as it may"
        print(f"{outcome.stage:12} {outcome.command:10} {outcome.seconds:6.1f} s  {outcome.status}{allowed}")
    print(f"logs and results: {given.out}")
    return 1 if any(outcome.is_failure for outcome in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
