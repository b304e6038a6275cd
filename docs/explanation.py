"""Draw the pictures of docs/explanation.md, and write its tables.

    python docs/explanation.py             draws docs/images/explanation-*.svg, rewrites the page between its markers
    python docs/explanation.py --check     says whether all are up to date: exit status 0 or 1
    python docs/explanation.py --measure   measures errors first, into docs/explanation.json: a minute, a C++ compiler

Pictures show what the code gives: bands from the call's own mask, sums from the recurrence, sizes from the plan.  They
are SVG, written here as text, so that a check can compare them letter by letter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # explain the checkout around this file

import cupyflash
from cupyflash.problem.masks import Band, band
from cupyflash.testing import DTYPES, ROUNDOFF, assert_attention_close, oracle

PAGE = Path(__file__).with_suffix(".md")
MEASURED = Path(__file__).with_suffix(".json")
IMAGES = Path(__file__).with_name("images")
MARKED = re.compile(r"(?P<start><!-- generated: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end: (?P=name) -->)", re.DOTALL)

INK, FAINT = "#222222", "#999999"
WHOLE, PARTIAL, SKIPPED = "#9ecae1", "#fdae6b", "#f2f2f2"
KEYS, VALUES, ROWS = "#c7e9c0", "#a1d99b", "#dadaeb"


class Drawing:
    """An SVG in the making; lengths are pixels, y grows downwards."""

    def __init__(self, width: int, height: int) -> None:
        self._size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        self._parts = [f'<rect width="{width}" height="{height}" fill="white"/>']

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = INK, thick: float = 1
    ) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self._parts.append(f'<rect {place} fill="{fill}" stroke="{stroke}" stroke-width="{thick}"/>')

    def line(self, points: Sequence[tuple[float, float]], stroke: str = INK, width: float = 1, more: str = "") -> None:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{places}" fill="none" stroke="{stroke}" stroke-width="{width}" {more}/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, stroke: str = INK) -> None:
        self.line([(x, y), (to_x, to_y)], stroke, 1.5, 'marker-end="url(#head)"')

    def dot(self, x: float, y: float, fill: str) -> None:
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{fill}"/>')

    def text(
        self, x: float, y: float, text: str, size: int = 13, anchor: str = "middle", fill: str = INK, more: str = ""
    ) -> None:
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
        self._parts.append(f"<text {place} {more}>{text}</text>")

    def __str__(self) -> str:
        head = '<path d="M 0 0 L 8 4 L 0 8 z" fill="context-stroke"/>'
        marker = f'<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{head}</marker>'
        parts = "\n".join(["<defs>" + marker + "</defs>", *self._parts]).replace(" />", "/>").replace(" >", ">")
        return f'<svg xmlns="http://www.w3.org/2000/svg" {self._size} font-family="sans-serif">\n{parts}\n</svg>\n'


# --- pictures ------------------------------------------------------------------------------------------------------


def visits(seen: Band, row: int, block_m: int, block_n: int, seqlen_k: int) -> Iterator[tuple[int, bool]]:
    """The tiles of keys that a tile of rows visits, from the last to the first, and whether each is kept whole."""
    rows = (row * block_m, (row + 1) * block_m)
    start, stop = seen.key_range(*rows, seqlen_k)
    for tile in reversed(range(start // block_n, -(-stop // block_n))):
        yield tile, seen.keeps_tile(*rows, tile * block_n, (tile + 1) * block_n)


def draw_walk() -> Drawing:
    """Which tiles of the scores of a causal call are visited, and in which order."""
    tiles_q, tiles_k, block, side = 6, 8, 16, 52
    seen, _ = band(True, None, "bottom_right", tiles_q * block, tiles_k * block)
    left, top, highlighted = 150, 96, 3
    drawing = Drawing(660, 525)
    drawing.text(left + tiles_k * side / 2, 24, "keys and values: each block of rows reads them tile by tile")
    for tile in range(tiles_k):
        drawing.box(left + tile * side, 36, side, 22, KEYS)
        drawing.text(left + (tile + 0.5) * side, 51, f"K{tile}", 12)
        drawing.box(left + tile * side, 60, side, 22, VALUES)
        drawing.text(left + (tile + 0.5) * side, 75, f"V{tile}", 12)
    for row in range(tiles_q):
        y = top + row * side
        drawing.box(84, y, 44, side, ROWS)
        drawing.text(106, y + side / 2 + 5, f"Q{row}", 12)
        drawing.box(left + tiles_k * side + 22, y, 44, side, ROWS)
        drawing.text(left + tiles_k * side + 44, y + side / 2 + 5, f"O{row}", 12)
        visited = {
            tile: (n, whole) for n, (tile, whole) in enumerate(visits(seen, row, block, block, tiles_k * block), 1)
        }
        for tile in range(tiles_k):
            x = left + tile * side
            if tile not in visited:
                drawing.box(x, y, side, side, SKIPPED, "#dddddd")
                continue
            number, whole = visited[tile]
            drawing.box(x, y, side, side, WHOLE if whole else PARTIAL)
            drawing.text(x + side / 2, y + side / 2 + 5, str(number))
    y = top + highlighted * side
    drawing.box(80, y - 3, left + tiles_k * side - 10, side + 6, "none", "#d62728", 2.5)
    drawing.text(42, y + side / 2 - 4, "one block", 12, fill="#d62728")
    drawing.text(42, y + side / 2 + 12, "of threads", 12, fill="#d62728")
    legend = top + tiles_q * side + 28
    for index, (fill, text) in enumerate(
        [
            (WHOLE, "visited, every row sees every key: no mask is looked at"),
            (PARTIAL, "visited, on the diagonal: scores that don't take part are set to −∞"),
            (SKIPPED, "not visited: neither read nor computed"),
        ]
    ):
        drawing.box(left, legend + 24 * index, 16, 16, fill, FAINT)
        drawing.text(left + 26, legend + 24 * index + 13, text, 12, "start")
    drawing.text(left, legend + 85, "Numbers are the order in which a block visits its tiles.", 12, "start")
    return drawing


def running(scores: Any, block_n: int) -> tuple[list[float], list[float], list[float]]:
    """After each tile: the maximum, the sum, and what the sum was times when the maximum rose (1: it did not)."""
    row_max, row_sum = -math.inf, 0.0
    maxima, sums, factors = [], [], []
    for start in range(0, len(scores), block_n):
        tile = scores[start : start + block_n]
        new_max = max(row_max, tile.max())
        factors.append(math.exp(row_max - new_max))
        row_sum = row_sum * factors[-1] + np.exp(tile - new_max).sum()
        row_max = new_max
        maxima.append(float(row_max))
        sums.append(float(row_sum))
    return maxima, sums, factors


def draw_running() -> Drawing:
    """The running maximum and sum of two rows: one meets its largest score early, the other late."""
    block_n, tiles = 8, 6
    noise = 0.8 * np.random.default_rng(7).standard_normal(block_n * tiles)
    rows = {
        "A row whose largest score comes early": noise + np.repeat([2.2, 0.5, -0.3, 0.8, 0.0, 0.4], block_n),
        "A row whose largest score comes late": noise + np.repeat([-1.5, -0.7, 0.8, 0.3, 2.3, 1.4], block_n),
    }
    drawing = Drawing(900, 480)
    width, score_top, score_low, sum_low, sum_height = 360, 70, 230, 420, 130
    for column, (title, scores) in enumerate(rows.items()):
        left = 62 + 440 * column
        maxima, sums, factors = running(scores, block_n)
        lse = maxima[-1] + math.log(sums[-1])
        one, all_keys = np.ones((1, 1)), scores[:, None]
        assert np.isclose(lse, cupyflash.attention(one, all_keys, all_keys, scale=1.0, return_lse=True)[1][0])

        def y_of(score: float) -> float:
            return score_low - (score + 3) / 7 * (score_low - score_top)

        drawing.text(left + width / 2, 28, title, 14, more='font-weight="bold"')
        drawing.text(
            left - 30, (score_top + score_low) / 2, "scores", 12, more=f'transform="rotate(-90 {left - 30} 150)"'
        )
        drawing.text(left - 30, sum_low - 60, "sum l", 12, more=f'transform="rotate(-90 {left - 30} {sum_low - 60})"')
        drawing.line([(left, score_low), (left + width, score_low)], FAINT)
        drawing.line([(left, sum_low), (left + width, sum_low)], FAINT)
        for tile in range(tiles):
            x, step = left + tile * width / tiles, width / tiles
            if tile:
                drawing.line([(x, score_top - 16), (x, sum_low)], "#dddddd")
            drawing.text(x + step / 2, sum_low + 18, f"tile {tile}", 11, fill=FAINT)
            for n, score in enumerate(scores[tile * block_n : (tile + 1) * block_n]):
                drawing.dot(x + (n + 0.5) * step / block_n, y_of(score), "#6baed6")
            before = maxima[tile - 1] if tile else maxima[0]
            drawing.line([(x, y_of(before)), (x, y_of(maxima[tile])), (x + step, y_of(maxima[tile]))], "#d62728", 2)
            scale = sum_height / 10
            kept = (sums[tile - 1] if tile else 0.0) * factors[tile]
            old = (sums[tile - 1] if tile else 0.0) * scale
            if factors[tile] < 1:
                drawing.box(x + 8, sum_low - old, step - 16, old, "none", FAINT)
            drawing.box(x + 8, sum_low - kept * scale, step - 16, kept * scale, "#bcbddc")
            drawing.box(x + 8, sum_low - sums[tile] * scale, step - 16, (sums[tile] - kept) * scale, "#756bb1")
            if tile and factors[tile] < 1:
                above = sum_low - max(old, sums[tile] * scale) - 6
                drawing.text(x + step / 2, above, f"× {factors[tile]:.2f}", 12, fill="#d62728")
        drawing.text(left + width, y_of(maxima[-1]) - 7, f"maximum m = {maxima[-1]:.2f}", 12, "end", "#d62728")
        drawing.text(
            left + width / 2, sum_low + 42, f"lse = m + log l = {maxima[-1]:.2f} + log {sums[-1]:.2f} = {lse:.2f}"
        )
    return drawing


def planned() -> Any:
    """The kernel of a prompt of 4096 tokens on an A100: its spec."""
    query, key = np.zeros((1, 32, 4096, 128), np.float16), np.zeros((1, 8, 4096, 128), np.float16)
    with contextlib.redirect_stdout(io.StringIO()):
        found = cupyflash.explain(query, key, key, is_causal=True, enable_gqa=True, device="A100")
    return found.plan.launches[0].spec


def draw_memory() -> Drawing:
    """What of that call lies where."""
    spec = planned()
    tile, threads = spec.tile, 32 * spec.tile.num_warps
    tile_k, tile_v = (tile.block_n * dim * 2 / 1024 for dim in (spec.head_dim, spec.head_dim_v))  # KiB
    assert tile.q_in_registers
    assert (2 * tile_k + tile_v) * 1024 == spec.shared_bytes
    whole = {"Q": 32, "K": 8, "V": 8, "O": 32}  # heads
    mebibytes = {name: heads * 4096 * 128 * 2 / 2**20 for name, heads in whole.items()}

    drawing = Drawing(900, 500)
    drawing.box(20, 40, 860, 110, "#f7f7f7")
    drawing.text(32, 62, "Memory of the GPU, an A100: 80 GB, 2 TB/s", 13, "start", more='font-weight="bold"')
    for index, (name, size) in enumerate(mebibytes.items()):
        x = 40 + 105 * index
        drawing.box(x, 76, 95, 58, KEYS if name == "K" else VALUES if name == "V" else ROWS)
        drawing.text(x + 47, 102, name, 15)
        drawing.text(x + 47, 122, f"{size:.0f} MiB", 12)
    drawing.box(480, 58, 380, 76, "none", FAINT)
    drawing.line([(480, 134), (860, 58)], "#fcbba1", 2)
    drawing.text(670, 84, "S and P, 4096 × 4096 for each of 32 heads", 13, fill=FAINT)
    drawing.text(670, 104, f"{2 * 32 * 4096 * 4096 * 2 / 2**30:.0f} GiB in float16", 13, fill=FAINT)
    drawing.text(670, 124, "never there", 13, fill="#d62728")

    drawing.box(20, 200, 860, 110, "#f7f7f7")
    shared = f"Shared memory of a block: {spec.shared_bytes // 1024} KiB, 20 TB/s on all SMs"
    drawing.text(535, 298, shared, 13, more='font-weight="bold"')
    for index, (name, what, size, fill) in enumerate(
        [
            ("K, tile j", "in use", tile_k, KEYS),
            ("K, tile j − 1", "on its way in", tile_k, KEYS),
            ("V, tile j", "on its way in, then in use", tile_v, VALUES),
        ]
    ):
        x = 130 + 248 * index
        drawing.box(x, 214, 234, 58, fill)
        drawing.text(x + 117, 238, f"{name}: {tile.block_n} × 128, {size:.0f} KiB", 13)
        drawing.text(x + 117, 258, what, 12)

    drawing.box(20, 360, 860, 120, "#f7f7f7")
    drawing.text(550, 382, f"Registers of its {threads} threads", 13, more='font-weight="bold"')
    rows = [
        ("Q", f"{tile.block_m} × 128, float16", tile.block_m * 128 * 2, "stays", ROWS),
        (
            "S, then P",
            f"{tile.block_m} × {tile.block_n}, float32",
            tile.block_m * tile.block_n * 4,
            "made and forgotten",
            WHOLE,
        ),
        ("m, l", f"{tile.block_m} + {tile.block_m}, float32", tile.block_m * 8, "updated", "#fcbba1"),
        ("O", f"{tile.block_m} × 128, float32", tile.block_m * 128 * 4, "added up, divided at the end", ROWS),
    ]
    for index, (name, shape, size, what, fill) in enumerate(rows):
        x = 40 + 210 * index
        drawing.box(x, 394, 198, 74, fill)
        drawing.text(x + 99, 416, name, 14)
        drawing.text(x + 99, 437, f"{shape}: {size / 1024:.0f} KiB", 12)
        drawing.text(x + 99, 457, what, 12)

    drawing.arrow(90, 134, 90, 392)
    drawing.text(98, 182, "once", 12, "start")
    drawing.arrow(190, 134, 470, 212)
    drawing.arrow(300, 134, 720, 212)
    drawing.text(560, 172, "tile by tile, in every block of rows", 12, "start")
    drawing.arrow(300, 274, 330, 392)
    drawing.text(330, 342, "S = Q Kᵀ", 12, "start")
    drawing.arrow(760, 274, 760, 392)
    drawing.text(768, 342, "O += P V", 12, "start")
    drawing.line([(868, 430), (892, 430), (892, 22), (402, 22)], INK, 1.5)
    drawing.arrow(402, 22, 402, 74)
    drawing.text(640, 17, "once, at the end", 12)
    return drawing


PICTURES = {"walk": draw_walk, "running": draw_running, "memory": draw_memory}


# --- numbers -------------------------------------------------------------------------------------------------------


def traffic_table() -> str:
    """Bytes that one head of the drawn call moves to and from GPU memory, and the operations on them."""
    spec = planned()
    length, dim = 4096, 128
    operand, matrix = length * dim * 2, length * length * 2
    tiles_q = length // spec.tile.block_m
    rows = [
        ("the formula, step by step", 4 * operand + 4 * matrix, "Q, K, V and O once; S and P written and read"),
        (
            f"tiles of {spec.tile.block_m} queries",
            2 * operand + 2 * operand * tiles_q,
            f"Q and O once; K and V once for each of {tiles_q} tiles",
        ),
    ]
    work = cupyflash.flops((length, dim), (length, dim))
    lines = [
        "| one head, 4096 queries and keys, E = 128, float16 | moved | operations per byte | what |",
        "|---|---:|---:|---|",
    ]
    lines += [f"| {name} | {size / 2**20:.0f} MiB | {work / size:.0f} | {what} |" for name, size, what in rows]
    return "\n".join(lines) + "\n"


MAGNITUDES = {"normal": 1.0, "4 × normal": 4.0}
LENGTHS = (128, 1024, 8192)
BACKENDS = ("numpy", "emulator")


def measure(dtype: str, magnitude: float, seqlen_k: int) -> dict[str, float]:
    """The largest errors of 2 heads of 64 queries, E = Ev = 64, in units of the rule of `cupyflash.testing`.

    For 16-bit dtypes the unit is u·Σ_j p_j|v_j| and the rule allows 3 (and the scores' own rounding); for others it is
    u·(8·Σ_j p_j|v_j| + moved) and the rule allows twice the plain formula's, plus 1.
    """
    rng = np.random.default_rng(seqlen_k)
    query, key, value = (
        (magnitude * rng.standard_normal((2, length, 64))).astype(DTYPES[dtype]) for length in (64, seqlen_k, seqlen_k)
    )
    call = {"query": query, "key": key, "value": value}
    truth = oracle(**call)
    unit = ROUNDOFF[dtype] * (truth.spread if DTYPES[dtype].itemsize == 2 else 8 * truth.spread + truth.moved)
    outs = {backend: cupyflash.attention(**call, backend=backend) for backend in BACKENDS}
    for backend, out in outs.items():
        assert_attention_close(out, call, backend=backend)
    outs["formula"] = oracle(**call, dtype="float64" if dtype == "float64" else "float32").out.astype(DTYPES[dtype])
    largest_score = float(np.abs(truth.scores["raw"]).max())
    errors = {name: float((np.abs(out.astype(truth.out.dtype) - truth.out) / unit).max()) for name, out in outs.items()}
    return {"largest score": largest_score, **errors}


def measure_all() -> dict[str, Any]:
    cases = [(dtype, data, length) for dtype in DTYPES for data in MAGNITUDES for length in LENGTHS]
    rows = []
    for dtype, data, length in cases:
        print(f"{dtype} {data} {length}", file=sys.stderr)
        rows.append({"dtype": dtype, "data": data, "keys": length, **measure(dtype, MAGNITUDES[data], length)})
    return {"numpy": np.__version__, "python": platform.python_version(), "machine": platform.machine(), "rows": rows}


def error_table(dtypes: Sequence[str]) -> str:
    """What was measured, for some dtypes."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    names = {"numpy": "`numpy`", "emulator": "the kernels", "formula": "the formula, materialised"}
    lines = [
        f"| dtype | data | keys | largest score | {' | '.join(names.values())} |",
        "|---|---|---:|---:" + "|---:" * 3 + "|",
    ]
    for row in measured["rows"]:
        if row["dtype"] in dtypes:
            errors = " | ".join(f"{row[name]:.2f}" for name in names)
            lines.append(f"| {row['dtype']} | {row['data']} | {row['keys']} | {row['largest score']:.0f} | {errors} |")
    lines += ["", f"Python {measured['python']}, NumPy {measured['numpy']}, {measured['machine']}; "]
    lines[-1] += "`python docs/explanation.py --measure`."
    return "\n".join(lines) + "\n"


TABLES = {
    "traffic": traffic_table,
    "errors-16": lambda: error_table(("float16", "bfloat16")),
    "errors-32": lambda: error_table(("float32", "float64")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/explanation.md, and write its tables.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="change nothing, fail if anything is not up to date")
    action.add_argument("--measure", action="store_true", help="measure errors anew, first")
    given = parser.parse_args(arguments)
    if given.measure:
        MEASURED.write_text(json.dumps(measure_all(), indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    names = [found["name"] for found in MARKED.finditer(page)]
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"{PAGE.name} marks {names}, expected each of {sorted(TABLES)} once")
    new = {PAGE: MARKED.sub(lambda found: f"{found['start']}\n{TABLES[found['name']]()}\n{found['end']}", page)}
    new |= {IMAGES / f"explanation-{name}.svg": str(draw()) for name, draw in PICTURES.items()}
    stale = [path for path, text in new.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if given.check:
        for path in stale:
            print(f"{path.name} is not up to date: run python docs/explanation.py", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(new[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
