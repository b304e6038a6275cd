"""What `cupyflash.tools.trace` found, as one HTML page that needs nothing else, and as a few lines of text."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .trace import REASONS, Step, Trace, Walk

__all__ = ["as_html", "as_text"]

_TEMPLATE = Path(__file__).with_name("trace.html")
_LARGEST_HALF = 65504


def as_text(found: Trace) -> Iterator[str]:
    """A summary, line by line."""
    yield _call(found)
    yield f"{found.spec}, the choice for device {found.device}: {found.launches[-1].blocks} blocks"
    for kind, why, count in _fates(found):
        yield f"  {count:5} tile{'s' * (count > 1)} {_KINDS[kind]}: {_because(kind, why)}"
    conflicts = sum(launch.bank_conflicts for launch in found.launches)
    moved, formula = _size(found.bytes_moved), _size(found.bytes_of_formula)
    yield f"  {moved} moved, {formula} by the formula; {conflicts} bank conflicts"
    units = f"{found.error_units:.2f} units of rounding, 3 are allowed"
    yield f"  largest error against math in float64: {found.error:.2g}, {units}"


def as_html(found: Trace, command: str = "") -> str:
    """The page; `command` is what made it, to be shown."""
    problem, tile = found.problem, found.spec.tile
    heads = problem.batch_size * problem.num_heads_q
    parts = {
        "title": "A walk over the keys",
        "facts": _facts(found, command),
        "block_m": str(tile.block_m),
        "block_n": str(tile.block_n),
        "warps": str(tile.num_warps),
        "fates": _fate_table(found),
        "launches": _launches(found),
        "bars": _bars(found),
        "matrix": f"{problem.seqlen_q:,} × {problem.seqlen_k:,} for each of {heads} heads",
        "matrix_size": _size(found.matrix_bytes),
        "error": _power(found.error),
        "lse_error": _power(found.lse_error),
        "error_units": f"{found.error_units:.2f}",
        "dtype": problem.dtype,
        "device": escape(found.device),
        "data": json.dumps(_data(found), separators=(",", ":")).replace("</", "<\\/"),
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


# --- numbers for the script ----------------------------------------------------------------------------------------


def _data(found: Trace) -> dict[str, Any]:
    problem, tile = found.problem, found.spec.tile
    finite = [step.scores[np.isfinite(step.scores)] for walk in found.walks for step in walk.steps]
    scores = np.concatenate(finite) if finite else np.zeros(1, np.float32)
    return {
        "keys": problem.seqlen_k,
        "rows": problem.seqlen_q * found.pack,
        "block_m": tile.block_m,
        "block_n": tile.block_n,
        "pack": found.pack,
        "low": float(scores.min(initial=0)),
        "high": float(scores.max(initial=0)),
        "reasons": REASONS,
        "groups": [
            {"name": name, "head": walks[0].head, "walks": [_walk(walk) for walk in walks]}
            for name, walks in _groups(found).items()
        ],
    }


def _groups(found: Trace) -> dict[str, list[Walk]]:
    """The walks of each head, or of heads that share tiles, by name."""
    groups: dict[str, list[Walk]] = {}
    for walk in found.walks:
        heads = f"heads {walk.head}–{walk.head + found.pack - 1}, packed" if found.pack > 1 else f"head {walk.head}"
        name = f"batch {walk.batch}, {heads}" if found.problem.batch_size > 1 else heads
        groups.setdefault(name, []).append(walk)
    return groups


def _walk(walk: Walk) -> dict[str, Any]:
    return {
        "row_begin": walk.row_begin,
        "num_rows": walk.num_rows,
        "fates": [(fate.kind, fate.why) for fate in walk.fates],
        "steps": [_step(step) for step in walk.steps],
    }


def _step(step: Step) -> dict[str, Any]:
    scores = np.where(np.isneginf(step.scores), step.scores, np.clip(step.scores, -_LARGEST_HALF, _LARGEST_HALF))
    first = np.divide(step.output[:, 0], step.row_sum, out=np.zeros_like(step.row_sum), where=step.row_sum > 0)
    return {
        "tile": step.tile,
        "scores": _base64(scores, "<f2"),
        "largest": _base64(step.scores.max(axis=1), "<f4"),
        "max": _base64(step.row_max, "<f4"),
        "sum": _base64(step.row_sum, "<f4"),
        "factor": _base64(step.correction, "<f4"),
        "norm": _base64(np.sqrt((step.output**2).sum(axis=1)), "<f4"),
        "first": _base64(first, "<f4"),
    }


def _base64(array: Any, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


# --- words ---------------------------------------------------------------------------------------------------------

_KINDS = {"whole": "visited whole", "cut": "visited, cut", "skipped": "not visited"}
_SWATCHES = {"upper": "›", "lower": "‹", "mask": "∅", "mask_mod": "ƒ"}


def _fates(found: Trace) -> list[tuple[str, tuple[str, ...], int]]:
    """(kind, why, how many tiles), whole ones first."""
    counts = Counter((fate.kind, fate.why) for walk in found.walks for fate in walk.fates)
    order = list(_KINDS)
    return [(*fate, counts[fate]) for fate in sorted(counts, key=lambda fate: (order.index(fate[0]), fate[1]))]


def _because(kind: str, why: tuple[str, ...]) -> str:
    if not why:
        return "every key takes part for every row: no mask is looked at"
    return f"{'all' if kind == 'skipped' else 'some'} keys are {' or '.join(REASONS[name] for name in why)}"


def _call(found: Trace) -> str:
    problem = found.problem
    heads = f"{problem.num_heads_q} head{'s' * (problem.num_heads_q > 1)}"
    if problem.num_heads_k != problem.num_heads_q:
        heads += f" over {problem.num_heads_k} of keys"
    batch = f"batch of {problem.batch_size}, " if problem.batch_size > 1 else ""
    shape = f"{problem.seqlen_q} queries, {problem.seqlen_k} keys, head dim {problem.head_dim}"
    return f"{problem.dtype}, {batch}{heads}, {shape}"


def _facts(found: Trace, command: str) -> str:
    features = str(replace(found.problem, return_lse=False)).splitlines()[1].strip()
    facts = {
        "Call": f"{escape(_call(found))}; {escape(features)}",
        "Kernel": f"<code>{escape(str(found.spec))}</code>, the choice for device {escape(found.device)}, emulated",
    }
    if command:
        facts["Made by"] = f"<code>{escape(command)}</code>"
    return "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items())


def _fate_table(found: Trace) -> str:
    rows = []
    for kind, why, count in _fates(found):
        sign = "".join(_SWATCHES.get(name, "") for name in why[:1]) if kind == "skipped" else ""
        swatch = f'<span class="swatch {kind}" aria-hidden="true">{sign}</span>'
        rows.append(
            f'<tr><td>{swatch}{_KINDS[kind]}</td><td class="number">{count}</td><td>{_because(kind, why)}</td></tr>'
        )
    head = '<tr><th>tiles</th><th class="number">how many</th><th>why</th></tr>'
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _launches(found: Trace) -> str:
    rows = []
    for launch in found.launches:
        numbers = (
            f"{launch.blocks}&thinsp;×&thinsp;{launch.threads}",
            _size(launch.bytes_read),
            _size(launch.bytes_written),
            f"{launch.wavefronts:,} wavefronts",
            f"{launch.bank_conflicts:,}",
        )
        cells = "".join(f'<td class="number">{text}</td>' for text in numbers)
        rows.append(f"<tr><td><code>{escape(launch.name)}</code></td>{cells}</tr>")
    return "".join(rows)


def _bars(found: Trace) -> str:
    most = max(found.bytes_moved, found.bytes_of_formula)
    return "".join(
        f'<div class="bar"><span>{name}</span><span><i class="{kind}" style="width:{70 * size / most:.1f}%"></i>'
        f"{_size(size)}</span></div>"
        for name, size, kind in (
            ("These launches", found.bytes_moved, "ours"),
            ("The formula, step by step", found.bytes_of_formula, "other"),
        )
    )


def _power(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}&thinsp;·&thinsp;10<sup>{int(exponent)}</sup>".replace("-", "−")


def _size(nbytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} bytes"
