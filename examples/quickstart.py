"""First contact: attention over NumPy arrays, beside the same attention with its weights materialised.

Run it:  python examples/quickstart.py [length]
It needs nothing but cupyflash, so no bar: it takes a second or two.
"""

import argparse
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout works without an install

import cupyflash

parser = argparse.ArgumentParser(description="Attention over NumPy arrays, beside the formula with its weights.")
parser.add_argument("length", nargs="?", type=int, default=2048, help="queries and keys (2048); more takes seconds")
length = parser.parse_args().length
rng = np.random.default_rng(0)
query = rng.standard_normal((1, 8, length, 64), dtype=np.float32)  # (batch, heads, length, head_dim)
key = rng.standard_normal((1, 8, length, 64), dtype=np.float32)
value = rng.standard_normal((1, 8, length, 64), dtype=np.float32)

out = cupyflash.attention(query, key, value, is_causal=True)  # that is all there is to it
exact = cupyflash.attention(query, key, value, is_causal=True, backend="math")  # the formula, step by step
print(f"query {query.shape}, key {key.shape}, value {value.shape} -> out {out.shape} {out.dtype}")
print(f'largest difference from backend="math": {np.abs(out - exact).max():.1e}')


def measure(backend: str) -> tuple[float, float]:
    """Seconds of one call, and the most MiB that another one had allocated at once (its result included)."""
    started = time.perf_counter()
    cupyflash.attention(query, key, value, is_causal=True, backend=backend)
    seconds = time.perf_counter() - started
    tracemalloc.start()  # slows allocations down, so it does not watch the call that is timed
    cupyflash.attention(query, key, value, is_causal=True, backend=backend)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak / 2**20


for backend in ("numpy", "math"):
    seconds, mebibytes = measure(backend)
    print(f'backend="{backend}": {1e3 * seconds:7.1f} ms, {mebibytes:7.1f} MiB')
