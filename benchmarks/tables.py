"""Write the tables of the README and the docs: performance from benchmarks/results, kernels from the plan's tiles.

    python benchmarks/tables.py            rewrites the pages between their markers
    python benchmarks/tables.py --check    says whether they are up to date: exit status 0 or 1

A table stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; the names are keys of `TABLES`, and each has
a place on one of `PAGES`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Report: TypeAlias = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the kernels of the checkout around this file
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/performance.md", "docs/kernels.md")
MARKED = re.compile(r"(?P<start><!-- generated: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end: (?P=name) -->)", re.DOTALL)
MARKER = re.compile(r"<!-- (?:generated|end): ([\w-]+) -->")
NOT_MEASURED = "Not measured yet.\n"
OTHERS = {"numpy": "vs materialising NumPy", "torch": "vs PyTorch"}
#: Of all cases, those that the README shows.
HIGHLIGHTS = (
    "dense 2×8×2048×64",
    "causal 2×8×2048×64",
    "bool mask 1×1×16384×64",
    "sliding window 512 1×8×4096×64",
    "GQA decode 8×32/8×1×128, S = 8192",
)
GPU_OTHERS = {"cudnn": "vs cuDNN", "flash": "vs FlashAttention-2", "efficient": "vs memory-efficient"}
HOST_COLUMNS = {
    "cupyflash": "cupyflash",
    "cupyflash, out=": "with out=",
    "torch": "PyTorch's SDPA",
    "graph replay": "graph replay",
}


def load_reports(kind: str, folder: Path = RESULTS) -> list[Report]:
    """The reports of one kind, "cpu", "overhead" or "gpu", by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{kind}-*.json"))]


def performance_table(reports: Sequence[Report], only: Sequence[str] = ()) -> str:
    """Case, time, ratio to each of the others, extra memory of ours and of materialising; of some cases, or of all."""
    if only:
        known = {row["name"] for report in reports for row in report["results"]}
        if reports and not known.issuperset(only):
            raise ValueError(f"no result has the name of {sorted(set(only) - known)}")
        kept = [[row for row in report["results"] if row["name"] in only] for report in reports]
        reports = [{**report, "results": rows} for report, rows in zip(reports, kept, strict=True)]

    def cells(row: Report) -> list[str]:
        return [
            f"{row['name']} ({row['note']})" if row["note"] else row["name"],
            format_seconds(row["seconds"]["cupyflash"]["min"]),
            *(format_ratio(row["ratios"].get(name)) for name in OTHERS),
            format_bytes(row["extra_bytes"]["cupyflash"]),
            format_bytes(row["extra_bytes"].get("numpy")),
        ]

    columns = ["case", "time", *OTHERS.values(), "extra memory", "NumPy's"]
    return join_machines(reports, columns, cells, ("speed",), cpu_caption)


def feature_table(reports: Sequence[Report]) -> str:
    """What a feature costs beside the call without it, and the smallest call beside NumPy's bare calls."""

    def cells(row: Report) -> list[str]:
        ours = row["seconds"]["cupyflash"]["min"]
        floor = next(row["seconds"][name]["min"] for name in ("plain", "bare") if name in row["seconds"])
        return [row["name"], format_seconds(ours), format_seconds(floor), f"{ours / floor:.2f}×"]

    columns = ["call", "time", "without it; for the small call, NumPy's bare calls", "ratio"]
    return join_machines(reports, columns, cells, ("feature", "small"), cpu_caption)


def gpu_table(reports: Sequence[Report]) -> str:
    """Case, our rate, its part of the yardstick's, and the ratio to each of PyTorch's backends with its quartiles."""

    def ratio(row: Report, name: str) -> str:
        found = row["ratios"].get(name)
        return "–" if found is None else f"{found['median']:.2f}× ({found['low']:.2f} to {found['high']:.2f})"

    def cells(row: Report) -> list[str]:
        ours, part = row[row["unit"]].get("cupyflash"), row["of_yardstick"].get("cupyflash")
        rate = "–" if ours is None else f"{ours:.0f} {row['unit']}"
        share = "–" if part is None else f"{100 * part:.0f} %"
        return [row["name"], rate, share, *(ratio(row, name) for name in GPU_OTHERS)]

    columns = ["case", "cupyflash", "of GEMM or copy", *GPU_OTHERS.values()]
    return join_machines(reports, columns, cells, ("speed",), gpu_caption)


def host_table(reports: Sequence[Report]) -> str:
    """The time until a call returns to Python, on a GPU that is done sooner."""

    def cells(row: Report) -> list[str]:
        taken = (row["seconds"].get(name) for name in HOST_COLUMNS)
        return [row["name"], *("–" if told is None else format_seconds(told["median"]) for told in taken)]

    columns = ["call", *HOST_COLUMNS.values()]
    return join_machines(reports, columns, cells, ("host",), lambda report: f"{report['machine']['name']}, as above.")


def overhead_table(reports: Sequence[Report]) -> str:
    """Python time of a call by case."""

    def cells(row: Report) -> list[str]:
        target = row["target_seconds"]
        return [row["name"], format_seconds(row["seconds"]["min"]), "–" if target is None else format_seconds(target)]

    return join_machines(reports, ["call", "time", "target"], cells, ("overhead",), overhead_caption)


def join_machines(
    reports: Sequence[Report],
    columns: Sequence[str],
    cells: Callable[[Report], Sequence[str]],
    sections: Sequence[str],
    caption: Callable[[Report], str],
) -> str:
    """A Markdown table for each report, and the caption under it."""
    tables = []
    for report in reports:
        rows = [cells(row) for row in report["results"] if row["section"] in sections]
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        tables.append(f"{table}\n\n{caption(report)}\n")
    return "\n".join(tables) or NOT_MEASURED


def kernel_table() -> str:
    """For each family, its padded head dims and each architecture, the dtypes that have kernels."""
    from cupyflash.plan.specs import FwdSpec
    from cupyflash.plan.tiles import FAMILIES
    from cupyflash.tools.kernels import ARCHITECTURES, device_of, specs_of

    found: dict[tuple[str, int, int], dict[str, set[str]]] = {}
    for arch in ARCHITECTURES:
        for spec in specs_of(device_of(arch)):
            if isinstance(spec, FwdSpec):
                row = found.setdefault((spec.family, spec.head_dim, spec.head_dim_v), {})
                row.setdefault(arch, set()).add(spec.dtype)

    def cell(kernel: tuple[str, int, int], arch: str) -> str:
        family, head_dim, head_dim_v = kernel
        if arch in found[kernel]:
            return ", ".join(sorted(found[kernel][arch]))
        wider = [
            other[1:]
            for other in found
            if other[0] == family and arch in found[other] and other[1] >= head_dim and other[2] >= head_dim_v
        ]
        if wider:
            return "padded to {}, {}".format(*min(wider, key=sum))
        since = next(iter(found[kernel]))
        return f"none, from {since} on" if FAMILIES[family].only is None else f"none, {since} alone"

    lines = [["kernel", "E, Ev up to", *ARCHITECTURES], ["---"] * (2 + len(ARCHITECTURES))]
    families = list(FAMILIES)
    for kernel in sorted(found, key=lambda kernel: (families.index(kernel[0]), kernel[1] != kernel[2], kernel)):
        lines.append([f"`{kernel[0]}`", f"{kernel[1]}, {kernel[2]}", *(cell(kernel, arch) for arch in ARCHITECTURES)])
    # Neighbours that say the same become one column.
    columns = list(zip(*lines, strict=True))
    merged: list[list[str]] = []
    for column in columns:
        if merged and merged[-1][1:] == list(column[1:]):
            merged[-1][0] += f", {column[0]}"
        else:
            merged.append(list(column))
    table = "\n".join(f"| {' | '.join(line)} |" for line in zip(*merged, strict=True))
    return f"{table}\n\nOther head dims are padded to these. A dtype that a cell lacks has no kernels there.\n"


def refusal_table() -> str:
    """What the kernels answer to each argument of `attention`, asked one by one."""
    from dataclasses import replace

    import numpy as np

    from cupyflash.build.operands import batch_refusals
    from cupyflash.plan.choose import refusals
    from cupyflash.problem.normalize import normalize

    def half(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float16)

    def refused(problem: Any, buffers: Any) -> list[str]:
        return batch_refusals(problem, buffers, 16, lambda array: array.ctypes.data)

    query, key = half(2, 4, 5, 64), half(2, 2, 7, 64)
    keep, bias = np.ones((5, 7), bool), np.zeros((4, 5, 7), np.float32)
    spread = half(4, 2, 4, 2, 4, 2, 4, 2, 4, 5, 64)[::2, :, ::2, :, ::2, :, ::2, :, ::2].swapaxes(0, 1).swapaxes(2, 3)
    slopes = np.zeros(4, np.float32)
    arguments: dict[str, dict[str, Any]] = {
        "`attn_mask` bool, of any broadcast form and strides": {"attn_mask": keep},
        "`attn_mask` float, in the query's dtype or float32": {"attn_mask": bias},
        "`attn_mask` a pair of both, causal and window with it": {
            "attn_mask": (bias, keep),
            "is_causal": True,
            "window": (3, 3),
        },
        "`is_causal`, `window`, `align`": {"is_causal": True, "window": (3, None), "align": "bottom_right"},
        "`scale`, any": {"scale": -2.0},
        "`enable_gqa`": {},
        "`softcap`": {"softcap": 30.0},
        "`alibi_slopes`": {"alibi_slopes": slopes},
        "`alibi_slopes` with an `align` beyond 2³⁰": {"alibi_slopes": slopes, "align": 2**31 - 1},
        "`sinks`": {"sinks": slopes},
        "`dropout_p`, `seed`": {"dropout_p": 0.1, "seed": 1},
        "`score_mod`": {"score_mod": lambda score, b, h, q_idx, kv_idx: score},
        "`mask_mod`": {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx <= q_idx},
        "`return_lse`, `out`": {"return_lse": True, "out": half(2, 4, 5, 64)},
        "`return_weights`, `attention_weights`": {"return_weights": True},
        '`precision="tf32"`': {"precision": "tf32"},
    }
    answers = {}
    for name, asked in arguments.items():
        problem, buffers = normalize(query, key, key, enable_gqa=True, **asked)
        answers[name] = [*refusals(problem), *refused(problem, buffers)]
    plain, _ = normalize(query, key, key, enable_gqa=True)
    answers["E or Ev above 256"] = refusals(replace(plain, head_dim=257))
    answers["L or S of 2³⁰"] = refusals(replace(plain, seqlen_k=2**30))
    answers["more than four batch axes that don't lie behind one another"] = refused(*normalize(spread, spread, spread))
    lines = ["| asked of a kernel | answer |", "| --- | --- |"]
    lines += [
        f"| {name} | {'; '.join(f'no: {reason}' for reason in found) or 'yes'} |" for name, found in answers.items()
    ]
    return "\n".join(lines) + "\n"


def cpu_caption(report: Report) -> str:
    """The machine, the versions, the commit and the command."""
    machine = report["machine"]
    versions = [f"Python {machine['python']}", f"NumPy {machine['numpy']} with {machine['blas']}"]
    if machine["torch"]:
        versions.append(f"PyTorch {machine['torch']}")
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['os']}; {', '.join(versions)}; {origin(report)}. "
        "Times are the least of all samples; ratios are the other's time over ours in the same run."
    )


def overhead_caption(report: Report) -> str:
    """The machine, what is not in the figures, the commit and the command."""
    machine = report["machine"]
    return (
        f"{machine['cpu']}, Python {machine['python']}, NumPy {machine['numpy']}; {origin(report)}. Kernels that do "
        f"nothing, on a stand-in for CuPy: {report['not_in_it']}. Times are the least of all samples, taken at a load "
        f"average of {machine['load_average'] or 0:.1f}."
    )


def gpu_caption(report: Report) -> str:
    """The GPU, its clock, the versions, the commit and the command."""
    machine = report["machine"]
    told = [row.get("clocks") or {} for row in report["results"]]
    means = {name: [one[name] for one in told if name in one] for name in ("sm_mhz", "watts")}
    under_load = " and ".join(
        f"{statistics.median(means[name]):.0f} {unit}"
        for name, unit in (("sm_mhz", "MHz"), ("watts", "W"))
        if means[name]
    )
    return (
        f"{machine['name']}{under_load and f' at {under_load}'}, driver {machine['driver']}, NVRTC {machine['nvrtc']}, "
        f"CuPy {machine['cupy']}; PyTorch {machine['torch']} with cuDNN {machine['cudnn']}; {origin(report)}. "
        "Normal random inputs; beside our rate stands its part of that of a large "
        "product or copy which took turns with it. Ratios are the other's time over ours in the same round: median and "
        "quartiles."
    )


def origin(report: Report) -> str:
    """Commit, date and command."""
    commit = f"commit {report['commit'][:10]}" if report["commit"] else "no commit"
    if report["dirty"]:
        commit += " with changes"
    return f"{commit}, {report['date'][:10]}; `{report['command']}`"


def format_seconds(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


def format_ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.{0 if ratio >= 10 else 1 if ratio >= 2 else 2}f}×"


def format_bytes(size: int | None) -> str:
    if size is None:
        return "–"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


TABLES: dict[str, Callable[[], str]] = {
    "cpu-performance": lambda: performance_table(load_reports("cpu")),
    "cpu-highlights": lambda: performance_table(load_reports("cpu"), HIGHLIGHTS),
    "cpu-features": lambda: feature_table(load_reports("cpu")),
    "overhead": lambda: overhead_table(load_reports("overhead")),
    "gpu-performance": lambda: gpu_table(load_reports("gpu")),
    "gpu-host": lambda: host_table(load_reports("gpu")),
    "kernels": kernel_table,
    "kernel-answers": refusal_table,
}


def rewrite(text: str, page: str = "README.md") -> str:
    """A page's text with every table as it should be.

    Raises ValueError where a marker has an unknown name or lacks its other half.
    """
    names = marked(text)
    if sorted(MARKER.findall(text)) != sorted(names * 2):
        raise ValueError(f"{page}: markers {MARKER.findall(text)} are not pairs of a start and an end")
    if unknown := set(names) - set(TABLES):
        raise ValueError(f"{page}: markers name {sorted(unknown)}, expected some of {sorted(TABLES)}")
    return MARKED.sub(lambda place: f"{place['start']}\n{TABLES[place['name']]()}\n{place['end']}", text)


def marked(text: str) -> list[str]:
    """The names of the tables that a page has."""
    return [found["name"] for found in MARKED.finditer(text)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of the README and the docs.")
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    texts = {page: (given.root / page).read_text(encoding="utf-8") for page in PAGES}
    names = sorted(name for text in texts.values() for name in marked(text))
    if names != sorted(TABLES):
        raise ValueError(f"{', '.join(PAGES)} mark {names}, expected each of {sorted(TABLES)} once")
    wanted = {page: rewrite(text, page) for page, text in texts.items()}
    stale = [page for page in PAGES if wanted[page] != texts[page]]
    for page in stale:
        if given.check:
            print(f"{page} is out of date: run `python benchmarks/tables.py`", file=sys.stderr)
        else:
            (given.root / page).write_text(wanted[page], encoding="utf-8")
    return int(bool(stale) and given.check)


if __name__ == "__main__":
    raise SystemExit(main())
