"""Small calls of every kernel, for compute-sanitizer, under which a call takes a hundred times its time.

    compute-sanitizer --tool racecheck python -m tests.gpu.small_calls

A draft: nobody has run it on a GPU yet.
"""

from __future__ import annotations

import sys

import cupyflash
from cupyflash.testing import assert_attention_close
from tests.gpu.calls import CLAIMED, on_device
from tests.gpu.device import NO_GPU, find_gpu

# Both head dims, both kinds of tiles, tails, rows without keys, strides.
NAMES = (
    "float16-d64-tails",
    "bfloat16-d128-tails",
    "float16-d128-causal",
    "bfloat16-d64-window",
    "float16-d64-empty-rows",
    "grouped-keys-and-values-differ",
    "swapped-heads",
)


def main() -> int:
    gpu, reason = find_gpu()
    if gpu is None:
        print(f"nothing can be called: {reason}", file=sys.stderr)
        return NO_GPU
    import cupy

    # Without CuPy's pool every array is an allocation of its own, so that an access past its end is one past all.
    cupy.cuda.set_allocator(None)
    for name in NAMES:
        case = CLAIMED[name]
        result = cupyflash.attention(**on_device(case.arguments(), cupy), backend="cuda")
        assert_attention_close(result, case, backend="cuda")
        print(f"{name}: right", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
