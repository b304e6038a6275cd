"""Write docs/explain.md: what `cupyflash.explain` prints for some calls.

python docs/explain.py            rewrites docs/explain.md
python docs/explain.py --check    says whether it is up to date: exit status 0 or 1
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # explain the checkout around this file

PAGE = Path(__file__).with_suffix(".md")

INTRODUCTION = """\
# What a call would do

`cupyflash.explain` takes the arguments of `attention` and prints what the call would do, and why. It computes nothing
and needs no GPU: `device="H200"` explains what CuPy arrays of the same layout would meet there. It returns the same as
values, an `Explanation`.

This page is written by `python docs/explain.py`, and a test keeps it true.
"""

SETUP = """\
import numpy as np
from cupyflash import explain

query = np.zeros((1, 32, 2048, 128), np.float16)
key = value = np.zeros((1, 8, 2048, 128), np.float16)
"""

#: What is shown: a title, and the code.
EXAMPLES = (
    ("A prompt", 'explain(query, key, value, is_causal=True, enable_gqa=True, device="H200")'),
    (
        "One token, and keys that lie in one array with the values",
        "both = np.zeros((1, 8, 2048, 256), np.float16)\n"
        "keys, values = both[..., :128], both[..., 128:]\n"
        'explain(query[:, :, :1], keys, values, enable_gqa=True, device="L4")',
    ),
    (
        "Operands that are copied",
        "odd = np.zeros((1, 8, 2048, 129), np.float16)[..., 1:]\n"
        'explain(query[:, :8], odd, value.swapaxes(-1, -2).copy().swapaxes(-1, -2), device="A100")',
    ),
    (
        "A dtype that the GPU's tensor cores lack",
        "import ml_dtypes\n\n"
        "query, key, value = (array.astype(ml_dtypes.bfloat16) for array in (query, key, value))\n"
        'explain(query, key, value, enable_gqa=True, device="T4")',
    ),
    (
        "A padding mask, looked at by tiles first",
        "kept = np.arange(2048) < np.array([1500])[:, None, None, None]  # 1×1×1×2048\n"
        'explain(query, key, value, kept, enable_gqa=True, device="RTX 4090")',
    ),
    (
        "A score function, fused into the kernel",
        "def nearer(score, batch, head, i, j):\n    return score - abs(i - j)\n\n\n"
        'explain(query, key, value, enable_gqa=True, score_mod=nearer, device="H200")',
    ),
    (
        "What no kernel has",
        'wide = np.zeros((1, 8, 2048, 320), np.float16)\nexplain(wide, wide, wide, device="H200")',
    ),
    ("NumPy arrays without a device", "explain(query, key, value, enable_gqa=True)"),
)


def page() -> str:
    """The whole page."""
    namespace: dict[str, object] = {}
    exec(SETUP, namespace)
    parts = [INTRODUCTION, f"```python\n{SETUP}```\n"]
    for title, code in EXAMPLES:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        parts.append(f"## {title}\n\n```python\n{code}\n```\n\n```text\n{printed.getvalue()}```\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/explain.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    wanted = page()
    if given.check and (not given.page.exists() or given.page.read_text(encoding="utf-8") != wanted):
        print(f"{given.page.name} is out of date: run `python docs/explain.py`", file=sys.stderr)
        return 1
    if not given.check:
        given.page.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
