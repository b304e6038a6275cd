"""Every kernel for every architecture that a plan may choose it for, compiled and checked.

    python -m tests.compile.all --shard 1/8     an eighth of them
    python -m tests.compile.all --match sm_75   only those with that text in their name

What was found is written down beside the cache of kernels, line by line: a run that was stopped goes on where it
stopped, and one with nothing new to check compiles nothing. Cubins are not kept.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cupyflash.backends.pool import num_threads
from cupyflash.build.cache import default_cache
from cupyflash.build.nvrtc import nvrtc_version
from tests.compile.compiling import verdicts
from tests.compile.selection import Pair, every_pair

SECONDS_BETWEEN_REPORTS = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where something is wrong with a kernel, or there is none."""
    parser = argparse.ArgumentParser(prog="python -m tests.compile.all", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N equal parts")
    parser.add_argument("--match", default="", metavar="TEXT", help="only kernels with TEXT in their name")
    parser.add_argument("--jobs", type=int, default=num_threads(), help="processes; as many as cores if not given")
    asked = parser.parse_args(arguments)
    index, count = asked.shard
    # Neighbours take about as long, so each shard gets one of them.
    pairs = [pair for pair in every_pair() if asked.match in str(pair)][index - 1 :: count]
    return check(pairs, default_cache().folder / "compile-all.jsonl", asked.jobs)


def check(pairs: Sequence[Pair], record: Path, jobs: int) -> int:
    """Compiles what `record` does not have, adds it there, and prints what is wrong and how many there were."""
    known = _read(record)
    start = reported = time.monotonic()
    counts = collections.Counter[str]()
    faulty = compiled = 0
    with record.open("a", encoding="utf-8") as file:
        for done, (pair, (key, found)) in enumerate(zip(pairs, verdicts(pairs, known, jobs), strict=True), 1):
            if found is None:
                found = known[key]
            else:
                compiled += 1
                # One write, for other shards may write at the same time.
                file.write(json.dumps([key, found]) + "\n")
                file.flush()
            counts[pair.arch] += 1
            faulty += bool(found)
            for fault in found:
                print(f"{pair}: {fault}", flush=True)
            if (now := time.monotonic()) > reported + SECONDS_BETWEEN_REPORTS:
                reported = now
                left = (now - start) / compiled * (len(pairs) - done) if compiled else 0.0
                print(
                    f"{done} of {len(pairs)}, {done - compiled} of them known before, {faulty} with something wrong; "
                    f"at most {left / 60:.0f} min left",
                    flush=True,
                )
    for arch, number in counts.items():
        print(f"{arch:7} {number:5} kernels")
    major, minor = nvrtc_version()
    seconds = time.monotonic() - start
    print(
        f"{len(pairs)} cubins, {compiled} of them compiled by NVRTC {major}.{minor} in {seconds:.0f} s and "
        f"{len(pairs) - compiled} known before, {faulty} with something wrong"
    )
    return 1 if faulty or not pairs else 0


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, as in 1/8") from None
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: there are shards 1 to {count}")
    return index, count


def _read(record: Path) -> dict[str, list[str]]:
    """What is known of kernels by their keys; a last line cut short is not."""
    known: dict[str, list[str]] = {}
    if record.exists():
        for line in record.read_text(encoding="utf-8").splitlines():
            try:
                key, found = json.loads(line)
            except ValueError:
                continue
            known[key] = found
    return known


if __name__ == "__main__":
    sys.exit(main())
