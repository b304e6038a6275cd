"""Every kernel for every architecture that a plan may choose it for, compiled and checked.

    python -m tests.compile.all [TEXT]      only those with TEXT in their name, sm_75 say

Cubins stay in the cache; a second run only checks them.
"""

from __future__ import annotations

import collections
import sys
import time

from cupyflash.backends.pool import num_threads
from cupyflash.build.cache import default_cache
from cupyflash.build.nvrtc import nvrtc_version
from tests.compile.compiling import found_faults
from tests.compile.selection import every_pair


def main(match: str = "") -> int:
    """The exit status: 1 where something is wrong with a kernel, or there is none."""
    major, minor = nvrtc_version()
    pairs = [pair for pair in every_pair() if match in str(pair)]
    start, faulty, counts = time.monotonic(), 0, collections.Counter[str]()
    for pair, found in zip(pairs, found_faults(pairs, default_cache().folder, num_threads()), strict=True):
        counts[pair.arch] += 1
        faulty += bool(found)
        for fault in found:
            print(f"{pair}: {fault}", flush=True)
    for arch, count in counts.items():
        print(f"{arch:7} {count:5} kernels")
    seconds = time.monotonic() - start
    print(f"{len(pairs)} cubins by NVRTC {major}.{minor} in {seconds:.0f} s, {faulty} with something wrong")
    return 1 if faulty or not pairs else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
