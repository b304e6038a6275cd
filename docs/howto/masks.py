"""Write docs/howto/masks.md: every kind of mask as a 0/1 matrix, drawn from the weights that the call gives.

python docs/howto/masks.py            rewrites docs/howto/masks.md
python docs/howto/masks.py --check    says whether it is up to date: exit status 0 or 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # draw the checkout around this file

import cupyflash

PAGE = Path(__file__).with_suffix(".md")

INTRODUCTION = """\
# Masks and windows

Rows are queries, columns keys; 1 where the key takes part. Each matrix is where
`attention_weights(query, key, stage="biased", …)` is not -inf, for 4 queries and 6 keys, so it shows what the code does
and not what somebody meant. All the masks of a call apply at once.

This page is written by `python docs/howto/masks.py`, and a test keeps it true.
"""

SETUP = """\
import numpy as np
from cupyflash import attention, mods

lengths = np.array([6, 3])  # keys of each of two sequences, the rest is padding
padding = (np.arange(6) < lengths[:, None])[:, None, None, :]  # (batch, 1, 1, keys)
blocks = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], bool)
bias = np.where(blocks, 0.5, -np.inf).astype(np.float32)
document = np.array([0, 0, 1, 1, 1, 2])
"""

#: A title, what there is to say, and the calls that are drawn beside one another.
SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Causal",
        "With fewer queries than keys there are two causal masks. PyTorch's starts at the top left and is the default; "
        "FlashAttention's ends at the bottom right. An int is the shift of the diagonal itself, as for a cache that is "
        "not full.",
        ("is_causal=True", 'is_causal=True, align="bottom_right"', "is_causal=True, align=1"),
    ),
    (
        "Sliding windows",
        "`window=(left, right)` keeps `left` keys before the diagonal and `right` after it, both inclusive; None is "
        "unbounded. `align` shifts it as it shifts the causal mask.",
        ("window=(1, 0)", "window=(1, 1), align=1", "window=(None, 1)", "window=(0, None)"),
    ),
    (
        "Decoding",
        "One query against a cache of six keys. With `is_causal=True` alone it sees the first key only.",
        ("is_causal=True", 'is_causal=True, align="bottom_right"', 'window=(2, 0), align="bottom_right"'),
    ),
    (
        "Bool masks",
        "True takes part. Any form that broadcasts into the scores' shape; nothing is expanded.",
        ("attn_mask=blocks", "attn_mask=padding[0]", "attn_mask=padding[1]"),
    ),
    (
        "Float masks",
        "Added to the scores; -inf removes, exactly as False does. A tuple holds one of each kind.",
        ("attn_mask=bias", "attn_mask=(bias, padding[1])"),
    ),
    (
        "Several at once",
        "All apply.",
        (
            "attn_mask=blocks, is_causal=True, align=2",
            "attn_mask=padding[1], window=(1, 1)",
            "attn_mask=blocks, is_causal=True, window=(1, None)",
        ),
    ),
    (
        "Functions",
        "`mask_mod` is a function of the coordinates, true where the key takes part; `cupyflash.mods` has a gallery.",
        (
            "mask_mod=lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 2 == 0",
            "mask_mod=mods.prefix_lm(2)",
            "mask_mod=mods.document_mask(document)",
        ),
    ),
)


CONCLUSION = """\
## Which one to take

The first of these that says what you mean:

| mask | what it takes | what it saves |
|---|---|---|
| `is_causal`, `window`, `align` | two numbers | tiles that nobody sees are not visited, on every backend but `math` |
| `attn_mask`, bool | a byte for each element *as you give it*: padding (B, 1, 1, S) stays one row for each text \
| tiles in which no key takes part are skipped, by `numpy` and the kernels |
| `mask_mod` | no array; it is asked for tiles of positions \
| such tiles are skipped too ([how](score_mod.md#what-a-mask-saves)) |
| `attn_mask`, float | an addition for each score; −inf removes | nothing: it is read everywhere |

A query that is left without any key gives 0, weights of 0 and a log-sum-exp of −inf, not NaN.

## Missing data

NaN in a *key* that is masked out reaches nothing. In a *value* it may: a tile multiplies weights of 0 by it, and
0 · NaN is NaN. So one NaN at the end of a causal series may spoil the rows before it that are in the same tile, a few
hundred. Put numbers where data is missing, any will do, and mask them:

```python
series = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
series[700:710] = np.nan  # a gap

known = ~np.isnan(series).any(axis=-1)  # (1000,)
filled = np.where(known[:, None], series, np.float32(0))
out = attention(filled, filled, filled, attn_mask=known, is_causal=True)
bool(np.isfinite(out).all())  # -> True
```

Of a `numpy.ma` array these are `~np.ma.getmaskarray(series).any(axis=-1)` and `series.filled(0)`.
"""


def matrix(call: str, seqlen_q: int) -> list[str]:
    """The rows of what a call lets take part."""
    namespace: dict[str, Any] = {}
    exec(SETUP, namespace)
    arguments = eval(f"dict({call})", namespace)
    query, key = np.ones((1, seqlen_q, 4), np.float32), np.ones((1, 6, 4), np.float32)
    scores = cupyflash.attention_weights(query, key, stage="biased", **arguments)
    return [" ".join("01"[bool(x)] for x in row > -np.inf) for row in scores[0]]


def drawing(calls: Sequence[str], seqlen_q: int) -> str:
    """The matrices under their calls; side by side as far as 100 columns hold."""
    lines: list[str] = []
    beside: list[list[str]] = []

    def flush() -> None:
        widths = [max(map(len, block)) for block in beside]
        for row in zip(*beside, strict=True):
            lines.append("   ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
        beside.clear()

    for call in calls:
        block = [call, *matrix(call, seqlen_q)]
        if beside and sum(max(map(len, one)) + 3 for one in (*beside, block)) > 100:
            flush()
            lines.append("")
        beside.append(block)
    flush()
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, f"```python\n{SETUP}```\n"]
    for title, text, calls in SECTIONS:
        parts.append(f"## {title}\n\n{text}\n\n```text\n{drawing(calls, 1 if title == 'Decoding' else 4)}\n```\n")
    return "\n".join([*parts, CONCLUSION])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/howto/masks.md.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the page is not up to date")
    check = parser.parse_args(arguments).check
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    new = page()
    if check:
        if new != old:
            print("docs/howto/masks.md is not up to date: run python docs/howto/masks.py", file=sys.stderr)
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
