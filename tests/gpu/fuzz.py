"""Random calls on the GPU for as long as one likes, each judged by the rule of `cupyflash.testing`.

    python -m tests.gpu.fuzz [--seconds 120] [--seed N] [--backend cuda]

A case is drawn with any arguments at once and lengths around the ends of tiles; a call may be refused, with a reason.
What is wrong is printed with the line that repeats it, and the exit status is 1.  Another backend, "numpy" say, needs
no GPU.

A draft: nobody has run it on a GPU yet.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import cupyflash
from cupyflash.testing import Case, assert_attention_close, random_case
from tests.cases import resized
from tests.gpu.calls import on_device
from tests.gpu.device import NO_GPU, find_gpu

# E and Ev; most kernels are for a few of them, and each is compiled once.
HEAD_DIMS = [(64, 64), (128, 128), (128, 128), (256, 256), (40, 40), (192, 128), (7, 32)]
MOST_SCORES = 4_000_000  # of a case: the judge takes a second for these
MOST_SHOWN = 5


@dataclass
class Tally:
    """What became of the cases."""

    right: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


def cases(seed: int) -> Iterator[Case]:
    """Always the same ones for a seed, without end."""
    rng = np.random.default_rng(seed)
    while True:
        case = random_case(rng)
        few = rng.integers(2) == 0
        seqlen_q = int(rng.integers(1, 5) if few else rng.choice([rng.integers(60, 68), rng.integers(1, 400)]))
        seqlen_k = int(rng.choice([rng.integers(0, 130), rng.integers(1, 4000 if few else 700)]))
        heads = max(1, math.prod(case.batch_shape))
        seqlen_k = min(seqlen_k, MOST_SCORES // (heads * seqlen_q))
        yield resized(case, seqlen_q, seqlen_k, *HEAD_DIMS[rng.integers(len(HEAD_DIMS))])


def fuzz(
    drawn: Iterator[Case],
    run: Callable[[Case], Any],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    backend: str = "cuda",
) -> Tally:
    """Runs and judges cases until the time is over; a case that has begun is finished."""
    tally, until = Tally(), clock() + seconds
    while clock() < until:
        case = next(drawn)
        try:
            assert_attention_close(run(case), case, backend=backend)
        except cupyflash.Unsupported as refusal:
            if refusal.reasons.get(backend):
                tally.refused += 1
            else:
                tally.wrong.append(f"{case!r}: refused without a reason")
        except Exception as error:  # noqa: BLE001  whatever it is, it is a finding, and the next case may run
            tally.wrong.append(f"{case!r}: {type(error).__name__}: {error}")
        else:
            tally.right += 1
        if tally.wrong and len(tally.wrong) <= MOST_SHOWN:
            print(tally.wrong[-1], flush=True)
        if len(tally.wrong) == MOST_SHOWN:
            break
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random calls, judged.")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, help="default: drawn from the clock, and printed")
    parser.add_argument("--backend", default="cuda")
    given = parser.parse_args(arguments)
    seed = given.seed if given.seed is not None else time.time_ns() % 2**32
    if given.backend == "cuda":
        gpu, reason = find_gpu()
        if gpu is None:
            print(f"nothing can be called: {reason}", file=sys.stderr)
            return NO_GPU
        import cupy

    def run(case: Case) -> Any:
        called = case.arguments()
        if given.backend == "cuda":
            called = on_device(called, cupy)
        return cupyflash.attention(**called, backend=given.backend)

    print(f"seed {seed}", flush=True)
    tally = fuzz(cases(seed), run, given.seconds, backend=given.backend)
    print(f"{tally.right} right, {tally.refused} refused, {len(tally.wrong)} wrong (seed {seed})")
    return 1 if tally.wrong or not tally.right else 0


if __name__ == "__main__":
    raise SystemExit(main())
