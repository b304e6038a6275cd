"""Nine variants of attention, each a plain NumPy function: what they compute, what they cost and what they look like.

A score_mod changes the score of query i and key j before the softmax, a mask_mod says whether the key takes part:

    out_i = Σ_j softmax_j(score_mod(scale · q_i·k_j, b, h, i, j)) · v_j      over the j that mask_mod(b, h, i, j) keeps

On NumPy arrays the functions are called on tiles of scores.  On CuPy arrays they are traced and become part of the
kernel, which runs at its own speed and leaves out the tiles that a mask leaves empty.  `cupyflash.mods` has all of
them; yours is written the same way: docs/howto/score_mod.md.

Each result is compared with the formula in float64, whose weights are all stored: 8 heads × 1024 × 1024 take 64 MiB.

Run it:  python examples/score_mod.py [--length 1024] [--heads 8] [--emulate]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout works without an install

import cupyflash
from cupyflash import mods

HEAD_DIM = 64
REPEATS = 5  # a time is the least of so many
DRAWN = 48  # queries and keys of a drawing


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes
    ----------
    formula : what is done to a score s, or which keys take part
    argument : "score_mod" or "mask_mod"
    make : the function for arrays of a library (numpy or cupy), so many heads and tokens
    """

    formula: str
    argument: str
    make: Callable[[Any, int, int], Any]


def slopes(xp: Any, heads: int) -> Any:
    """ALiBi's: a geometric sequence down to 2⁻⁸."""
    return xp.asarray(2.0 ** (-8 * np.arange(1, heads + 1) / heads), dtype=np.float32)


def bias_table(xp: Any, heads: int) -> Any:
    """As a model might have learnt it: heads that look near, others far."""
    distance = np.abs(np.arange(-16, 17))
    return xp.asarray(np.cos(np.linspace(0, 3, heads)[:, None]) * (2 - np.sqrt(distance)), dtype=np.float32)


def documents(xp: Any, length: int) -> Any:
    """The document of each token: four of them, of unequal lengths."""
    return xp.asarray(np.searchsorted([0.15, 0.5, 0.8], np.arange(length) / length, side="right"))


VARIANTS = {
    "alibi": Variant("s - m|i - j|", "score_mod", lambda xp, heads, n: mods.alibi(slopes(xp, heads))),
    "relative_position_bias": Variant(
        "s + t[i - j]", "score_mod", lambda xp, heads, n: mods.relative_position_bias(bias_table(xp, heads))
    ),
    "distance_decay": Variant(
        "s + |i - j| log d", "score_mod", lambda xp, heads, n: mods.distance_decay(1 - slopes(xp, heads) / 4)
    ),
    "tanh_softcap": Variant("2 tanh(s / 2)", "score_mod", lambda xp, heads, n: mods.tanh_softcap(2.0)),
    "soft_clipping": Variant("s / (1 + |s| / 2)", "score_mod", lambda xp, heads, n: mods.soft_clipping(2.0)),
    "document_mask": Variant("same document", "mask_mod", lambda xp, heads, n: mods.document_mask(documents(xp, n))),
    "prefix_lm": Variant("j <= i or j < n/4", "mask_mod", lambda xp, heads, n: mods.prefix_lm(n // 4)),
    "sliding_window": Variant("i - n/8 <= j <= i", "mask_mod", lambda xp, heads, n: mods.sliding_window(n // 8)),
    "dilated_window": Variant("j = i + 3k, |k| <= 5", "mask_mod", lambda xp, heads, n: mods.dilated_window(5, 3)),
}


def usable_cupy() -> Any:
    """CuPy, if it is installed and a GPU is there; else None."""
    try:
        import cupy
    except ImportError:
        return None
    return cupy if cupy.cuda.is_available() else None


def time_call(call: Callable[[], Any], synchronize: Callable[[], None], repeats: int) -> float:
    """Seconds of a call that has been made before."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def run_gallery(
    variants: dict[str, Variant], xp: Any, arrays: tuple[Any, ...], backend: str, repeats: int
) -> list[str]:
    """Lines of the table: each variant's largest error, its time, and that relative to the plain call."""
    synchronize = (lambda: None) if xp is np else xp.cuda.get_current_stream().synchronize
    to_numpy = (lambda x: x) if xp is np else xp.asnumpy
    _, heads, length, _ = arrays[0].shape
    on_device = [xp.asarray(array) for array in arrays]
    exact = [array.astype(np.float64) for array in arrays]

    def measured(named: dict[str, Any], on_numpy: dict[str, Any]) -> tuple[float, float]:
        def call() -> Any:
            return cupyflash.attention(*on_device, **named, backend=backend)

        error = np.abs(to_numpy(call()) - cupyflash.attention(*exact, **on_numpy, backend="math")).max()
        return time_call(call, synchronize, repeats), float(error)

    plain, error = measured({}, {})
    lines = [f"  {'plain':<24}{'s':<22}{error:10.1e}{1e3 * plain:10.2f} ms{1:9.2f}×"]
    for name, variant in tqdm(variants.items(), desc=backend, unit=" variants", leave=False):
        function, same = variant.make(xp, heads, length), variant.make(np, heads, length)
        seconds, error = measured({variant.argument: function}, {variant.argument: same})
        lines.append(f"  {name:<24}{variant.formula:<22}{error:10.1e}{1e3 * seconds:10.2f} ms{seconds / plain:9.2f}×")
    return lines


def draw(path: Path, heads: int) -> None:
    """Write what each variant does as a PNG: masks as 0 and 1, biases as what is added, caps as curves."""
    figure = Figure(figsize=(15, 6.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 5).ravel()
    i, j = np.arange(DRAWN)[:, None], np.arange(DRAWN)[None, :]
    for axes, (name, variant) in zip(grid, VARIANTS.items(), strict=False):
        function = variant.make(np, heads, DRAWN)
        axes.set_title(f"{name}\n{variant.formula}", fontsize=10)
        if name in ("tanh_softcap", "soft_clipping"):
            score = np.linspace(-8, 8, 200)
            axes.plot(score, function(score, 0, 0, 0, 0))
            axes.set_xlabel("score")
            continue
        is_mask = variant.argument == "mask_mod"
        seen = function(0, 0, i, j) if is_mask else function(np.zeros((DRAWN, DRAWN)), 0, 0, i, j)
        how = {"cmap": "Greys", "vmin": 0, "vmax": 1} if is_mask else {"cmap": "viridis"}
        axes.imshow(np.broadcast_to(seen, (DRAWN, DRAWN)), **how)
        axes.set_xlabel("key j")
        axes.set_ylabel("query i")
    grid[-1].set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Nine score and mask functions, run, compared and drawn.")
    parser.add_argument("--length", type=int, default=1024, help="queries and keys (1024)")
    parser.add_argument("--heads", type=int, default=8, help="(8)")
    parser.add_argument("--cases", default="*", metavar="GLOB", help="variants whose name matches")
    parser.add_argument(
        "--emulate", action="store_true", help="run the GPU's kernels too, on an emulator: use --length 128"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the PNG")
    given = parser.parse_args(arguments)
    for name in ("length", "heads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: expected at least 1")

    variants = {name: variant for name, variant in VARIANTS.items() if fnmatch(name, given.cases)}
    if not variants:
        parser.error(f"--cases {given.cases}: matches none of {', '.join(VARIANTS)}")

    rng = np.random.default_rng(0)
    shape = (1, given.heads, given.length, HEAD_DIM)
    query, key, value = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    backends: list[tuple[str, Any, int]] = [("numpy", np, REPEATS)]
    cupy = usable_cupy()
    if cupy is not None:
        backends.append(("cuda", cupy, REPEATS))
    if given.emulate:
        backends.append(("emulator", np, 1))
    for backend, xp, repeats in backends:
        print(f'{shape} float32, backend="{backend}"')
        print(f"  {'variant':<24}{'formula':<22}{'error':>10}{'time':>13}{'of plain':>10}")
        print("\n".join(run_gallery(variants, xp, (query, key, value), backend, repeats)))
    if cupy is None:
        print('backend="cuda" is not usable here: there is no CuPy, or no GPU')

    path = given.output / "score_mods.png"
    draw(path, given.heads)
    print(f"picture {path}")


if __name__ == "__main__":
    main()
