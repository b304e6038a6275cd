"""One call of each main kernel at a size that fills the GPU, for a profiler.

    ncu --clock-control none --kernel-name regex:flash_ python -m tests.gpu.main_kernels

A draft: nobody has run it on a GPU yet.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import cupyflash
from cupyflash.testing import DTYPES
from tests.gpu.device import NO_GPU, find_gpu

#: Shapes of query and key, dtype, is_causal.  Each is one launch, or two where blocks share keys.
CALLS: dict[str, tuple[tuple[int, ...], tuple[int, ...], str, bool]] = {
    **{
        f"d{head_dim} {'causal' if is_causal else 'full'}": (
            (2, 2048 // head_dim, 4096, head_dim),
            (2, 2048 // head_dim, 4096, head_dim),
            "bfloat16",
            is_causal,
        )
        for head_dim in (64, 128, 256)
        for is_causal in (False, True)
    },
    "decode": ((1, 32, 1, 128), (1, 8, 16384, 128), "bfloat16", False),
    "float32": ((1, 16, 2048, 64), (1, 16, 2048, 64), "float32", False),
}


def main() -> int:
    gpu, reason = find_gpu()
    if gpu is None:
        print(f"nothing can be called: {reason}", file=sys.stderr)
        return NO_GPU
    import cupy

    for name, call in CALLS.items():
        run(name, *call, cupy)
    return 0


def run(
    name: str, query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype: str, is_causal: bool, cupy: Any
) -> None:
    rng = np.random.default_rng(0)
    shapes = (query_shape, key_shape, key_shape)
    arrays = [cupy.asarray(rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])) for shape in shapes]
    cupyflash.attention(*arrays, is_causal=is_causal, enable_gqa=True, backend="cuda")
    cupy.cuda.Device().synchronize()
    print(f"{name}: done", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
