"""Denoise a photo with one call of attention: non-local means *is* attention.

Non-local means (Buades, Coll and Morel, CVPR 2005) replaces each pixel by an average of all pixels, weighted
by how alike the patches p around them are:

    out_i = Σ_j w_ij · pixel_j / Σ_j w_ij,      w_ij = exp(−|p_i − p_j|² / h²)

The softmax of a row does not change when a constant is added to the row, so −|p_i|² may be dropped from
−|p_i − p_j|² = 2 p_i·p_j − |p_j|² − |p_i|².  What is left is a dot product of vectors with one more feature,

    q_i = [2 p_i / h², 1],      k_j = [p_j, −|p_j|² / h²],      v_j = pixel_j,      scale = 1

and the whole filter is `cupyflash.attention(q, k, v, scale=1)`.  Every pixel looks at every other one:
160 × 160 pixels are a sequence of 25,600 tokens.  Their weights would take 2.4 GiB; they are never stored.

Run it:  python examples/denoise_photo.py [photo] [--size 160] [--sigma 0.1] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from tqdm.auto import tqdm  # as cupyflash.progress does, so that its memory is not taken for that of the call

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout works without an install

import cupyflash

Array = npt.NDArray[np.float32]

# Found by trying sigma 0.05, 0.1 and 0.2 on this photo.  Two patches of d numbers that differ by noise alone
# lie 2·d·sigma² apart, so h² goes with d·sigma².  Below 0.4·d·sigma² a pixel sees little but itself, and the
# noise stays; from 0.8·d·sigma² on unlike patches mix, and edges blur.  Larger patches lost up to 2 dB.
PATCH_RADIUS = 1
H2_FACTOR = 0.55

# Up to ONE_CALL tokens take a second or two.  Above, the queries go in blocks, only so that a progress bar
# can move: a block is work enough for all threads, so this costs no time, and it saves no memory, for
# attention needs the same few MiB for any number of queries.
ONE_CALL = 32_768
BLOCK = 8_192


def load_photo(path: str | None, size: int) -> Array:
    """Return a (size, size, 3) crop with values in [0, 1]: centred across, a third of the way down."""
    source = path or get_sample_data("grace_hopper.jpg", asfileobj=False)
    photo = np.atleast_3d(matplotlib.image.imread(source))
    photo = photo / np.float32(255) if photo.dtype == np.uint8 else photo.astype(np.float32)
    photo = np.broadcast_to(photo, (*photo.shape[:2], 3)) if photo.shape[2] == 1 else photo[..., :3]
    height, width = photo.shape[:2]
    if not 1 <= size <= min(height, width):
        raise SystemExit(f"--size {size}: the photo is {height} × {width}, expected 1 to {min(height, width)}")
    top = min(max(height // 3 - size // 2, 0), height - size)
    left = (width - size) // 2
    return photo[top : top + size, left : left + size]


def extract_patches(image: Array, radius: int) -> Array:
    """Return (height·width, 3·(2·radius + 1)²): the patch around each pixel of a (height, width, 3) image."""
    side = 2 * radius + 1
    padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    patches = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1))
    return patches.reshape(-1, 3 * side * side)


def make_operands(noisy: Array, sigma: float) -> tuple[Array, Array, Array]:
    """Return query, key (tokens, features + 1) and value (tokens, 3) of non-local means."""
    # A shift of all pixels leaves the distances as they are, and makes |p|², which float32 rounds, small.
    patches = extract_patches(noisy - noisy.mean(axis=(0, 1)), PATCH_RADIUS)
    tokens, features = patches.shape
    h2 = np.float32(H2_FACTOR * features * sigma**2)
    query = np.concatenate([2 * patches / h2, np.ones((tokens, 1), np.float32)], axis=1)
    key = np.concatenate([patches, -np.vecdot(patches, patches)[:, None] / h2], axis=1)
    return query, key, noisy.reshape(tokens, 3)


def denoise(query: Array, key: Array, value: Array) -> Array:
    """Return the filtered (tokens, 3) pixels."""
    if len(query) <= ONE_CALL:
        with cupyflash.progress():  # a bar if it takes more than half a second
            return cupyflash.attention(query, key, value, scale=1.0)
    out = np.empty_like(value)
    with tqdm(total=len(query), unit=" pixels", unit_scale=True) as progress:
        for start in range(0, len(query), BLOCK):
            rows = slice(start, start + BLOCK)
            cupyflash.attention(query[rows], key, value, scale=1.0, out=out[rows])
            progress.update(len(query[rows]))
    return out


def psnr(image: Array, clean: Array) -> float:
    """Peak signal-to-noise ratio in dB, for values in [0, 1]."""
    return float(-10 * np.log10(np.mean((image - clean) ** 2, dtype=np.float64)))


def save_figure(panels: dict[str, Array], path: Path) -> None:
    """Write the images side by side as a PNG."""
    figure = Figure(figsize=(4 * len(panels), 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, image) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(image.clip(0, 1), interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Denoise a photo with one call of attention.")
    parser.add_argument("photo", nargs="?", help="any image; the default comes with matplotlib")
    parser.add_argument("--size", type=int, default=160, help="side of the crop in pixels (160)")
    parser.add_argument("--sigma", type=float, default=0.1, help="noise to add; the photo is 0 to 1 (0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder of the PNG (examples/output)",
    )
    given = parser.parse_args(arguments)
    if given.sigma <= 0:
        parser.error(f"--sigma {given.sigma}: expected more than 0")

    clean = load_photo(given.photo, given.size)
    noise = np.random.default_rng(given.seed).standard_normal(clean.shape, dtype=np.float32)
    noisy = clean + np.float32(given.sigma) * noise
    query, key, value = make_operands(noisy, given.sigma)

    tracemalloc.start()
    started = time.perf_counter()
    denoised = denoise(query, key, value).reshape(clean.shape)
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    before, after = psnr(noisy, clean), psnr(denoised, clean)
    tokens = len(query)
    path = given.output / f"denoised-{given.size}.png"
    panels = {"clean": clean, f"noisy, {before:.1f} dB": noisy, f"denoised, {after:.1f} dB": denoised}
    save_figure(panels, path)
    print(f"PSNR    {before:.2f} dB -> {after:.2f} dB")
    print(f"tokens  {tokens:,}")
    print(f"time    {seconds:.2f} s")
    print(f"memory  {peak / 2**20:.1f} MiB at most; the weights would take {tokens**2 / 2**28:,.2f} GiB")
    print(f"picture {path}")


if __name__ == "__main__":
    main()
