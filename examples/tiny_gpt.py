"""Generate text with a key-value cache: a GPT in plain array code, on NumPy and CuPy arrays alike.

Nothing is trained.  The model's two layers are an *induction head* (Elhage et al., "A mathematical framework for
transformer circuits", 2021; Olsson et al., "In-context learning and induction heads", 2022) whose weights are written
down by hand, so that it says something: it looks up what followed, in the text so far, wherever the last few bytes were
the same.  Tokens are bytes, and each layer has eight query heads that share one head of keys and values:

    layer 1   head n looks n bytes back, whatever stands there: its query is rotated by n positions more than the keys
              are (rotary positions, Su et al. 2021).  Every token then knows the eight bytes before it.
    layer 2   head n compares the last n bytes with those before each earlier token, and reads that token: what came
              next.  Its weights are the text's own statistics of n + 1 bytes.  The output mixes the heads, the longer
              ones first (Jelinek and Mercer 1980).

What is worth copying is the cache.  Keys and values are written into arrays made once, for as many tokens as there will
ever be, and `attention` is given views of the part in use.  `align="bottom_right"` says that the last query stands at
the last key, so a piece of the prompt (many queries) and each new token (one query) are the same call:

    attention(q, keys[:, :stop], values[:, :stop], is_causal=True, align="bottom_right", enable_gqa=True)

The program then computes everything once more, in one call without a cache, and compares.

Run it:  python examples/tiny_gpt.py [--prompt FILE] [--tokens 200] [--temperature 0.5] [--seed 0] [--backend NAME]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout works without an install

from cupyflash import attention

PROMPT = """\
This is the house that Jack built.

This is the malt
That lay in the house that Jack built.

This is the rat,
That ate the malt
That lay in the house that Jack built.

This is the cat,
That killed the rat,
That ate the malt
That lay in the house that Jack built.

This is the dog,
That worried the cat,
That killed the rat,
That ate the malt
That lay in the house that Jack built.

This is the cow with the crumpled horn,
That tossed the dog,
"""

VOCABULARY = 256  # bytes
HEADS = 8  # query heads; they share one head of keys and values
HEAD_DIM = 64  # eight bytes of eight bits

# Where things lie in the residual stream: the byte as a one-hot vector, a constant, the bits (±1) of the eight bytes
# before it, and what the last layer adds up: the probabilities of the next byte.
BYTE = slice(0, 256)
ONE = 256
BEFORE = slice(257, 321)
NEXT = slice(321, 577)
MODEL_DIM = 577

# A head's scores are these times how far positions, or bits, agree.  At layer 1 the byte beside the one that is meant
# agrees to 82 %, and exp(−0.18 · 500) is nothing.  At layer 2 each wrong bit of a head of n bytes costs a factor of
# exp(−20 / n), so where no place agrees in all of many bytes, the head takes those that agree in most.
LOOK_BACK = 500.0
MATCH = 80.0

PIECE = 1024  # tokens of the prompt at a time


@dataclass(frozen=True)
class Layer:
    """Weights of one layer: x += attention(x @ query, x @ key, x @ value) @ out, with rotary positions or without."""

    query: Any  # (MODEL_DIM, HEADS · head dim)
    key: Any  # (MODEL_DIM, head dim)
    value: Any  # (MODEL_DIM, dim of values)
    out: Any  # (HEADS · dim of values, MODEL_DIM)
    rotary: bool


class Cache:
    """Keys and values of one layer: arrays for `capacity` tokens, of which the first `length` are in use."""

    def __init__(self, layer: Layer, capacity: int, xp: Any) -> None:
        self.keys = xp.zeros((1, capacity, layer.key.shape[1]), layer.key.dtype)
        self.values = xp.zeros((1, capacity, layer.value.shape[1]), layer.value.dtype)
        self.length = 0

    def append(self, key: Any, value: Any) -> tuple[Any, Any]:
        """Write those of new tokens; return views of all that are there."""
        start, self.length = self.length, self.length + key.shape[1]
        self.keys[:, start : self.length], self.values[:, start : self.length] = key, value
        return self.keys[:, : self.length], self.values[:, : self.length]


def make_layers(xp: Any) -> list[Layer]:
    """The weights, written down."""
    bits = np.where(np.arange(VOCABULARY)[:, None] >> np.arange(8) & 1, 1.0, -1.0)  # (256, 8)
    unit = np.ones(HEAD_DIM) / np.sqrt(HEAD_DIM)

    look_back = {
        "query": np.zeros((MODEL_DIM, HEADS, HEAD_DIM)),
        "key": np.zeros((MODEL_DIM, HEAD_DIM)),
        "value": np.zeros((MODEL_DIM, 8)),
        "out": np.zeros((HEADS, 8, MODEL_DIM)),
    }
    look_back["key"][ONE] = unit
    look_back["value"][BYTE] = bits
    for head in range(HEADS):
        look_back["query"][ONE, head] = LOOK_BACK * rotate(unit[None], np.array([-1.0 - head]), np)[0]
        look_back["out"][head, :, BEFORE][:, 8 * head : 8 * head + 8] = np.eye(8)

    match = {
        "query": np.zeros((MODEL_DIM, HEADS, HEAD_DIM)),
        "key": np.zeros((MODEL_DIM, HEAD_DIM)),
        "value": np.zeros((MODEL_DIM, VOCABULARY)),
        "out": np.zeros((HEADS, VOCABULARY, MODEL_DIM)),
    }
    match["key"][BEFORE] = np.eye(64)
    match["value"][BYTE] = np.eye(VOCABULARY)
    mixture = 4.0 ** np.arange(HEADS)
    for head in range(HEADS):
        known = 8 * (head + 1)
        match["query"][BYTE, head, :8] = MATCH / known * bits
        match["query"][BEFORE, head, 8:known] = MATCH / known * np.eye(64)[:, : known - 8]
        match["out"][head, :, NEXT] = np.eye(VOCABULARY) * mixture[head] / mixture.sum()

    def layer(weights: dict[str, Any], rotary: bool) -> Layer:
        weights["query"] = weights["query"].reshape(MODEL_DIM, -1)
        weights["out"] = weights["out"].reshape(-1, MODEL_DIM)
        return Layer(**{name: xp.asarray(array, dtype=np.float32) for name, array in weights.items()}, rotary=rotary)

    return [layer(look_back, rotary=True), layer(match, rotary=False)]


def rotate(x: Any, positions: Any, xp: Any) -> Any:
    """Rotary positions: turn the pairs (x_n, x_(n + D/2)) of (…, tokens, D) by position · frequency_n."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * xp.asarray(np.pi * 2.0 ** (-np.arange(half) / 2), dtype=np.float64)
    cos, sin = xp.cos(angles).astype(x.dtype), xp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return xp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def forward(
    tokens: list[int], layers: Iterable[Layer], caches: list[Cache] | None, backend: str | None, xp: Any
) -> npt.NDArray[np.float32]:
    """The probabilities (tokens, 256) of what comes after each of the tokens, which follow those in the caches."""
    start = caches[0].length if caches else 0
    positions = xp.arange(start, start + len(tokens))
    x = xp.zeros((len(tokens), MODEL_DIM), np.float32)
    x[xp.arange(len(tokens)), xp.asarray(tokens)] = 1
    x[:, ONE] = 1
    for index, layer in enumerate(layers):
        query = (x @ layer.query).reshape(len(tokens), HEADS, -1).swapaxes(0, 1)  # (HEADS, tokens, head dim)
        key, value = (x @ layer.key)[None], (x @ layer.value)[None]  # (1, tokens, …)
        if layer.rotary:
            query, key = rotate(query, positions, xp), rotate(key, positions, xp)
        if caches:
            key, value = caches[index].append(key, value)
        read = attention(
            *(query, key, value),
            is_causal=True,
            align="bottom_right",
            enable_gqa=True,
            scale=1.0,
            backend=backend,
        )
        x += read.swapaxes(0, 1).reshape(len(tokens), -1) @ layer.out
    return to_numpy(x[:, NEXT])


def choose(probabilities: Any, temperature: float, rng: np.random.Generator) -> int:
    """The likeliest byte at temperature 0; else one drawn, the likelier ones favoured the more the lower it is."""
    if temperature == 0:
        return int(probabilities.argmax())
    sharpened = np.maximum(probabilities.astype(np.float64), 0) ** (1 / temperature)
    return int(rng.choice(VOCABULARY, p=sharpened / sharpened.sum()))


def to_numpy(array: Any) -> Any:
    """A CuPy array comes from the GPU; a NumPy array is what it is."""
    return array.get() if hasattr(array, "get") else array


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Generate text with a key-value cache, and check it without one.")
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="a text to go on with (a nursery rhyme)")
    parser.add_argument("--tokens", type=int, metavar="N", default=200, help="how many bytes to generate (200)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", default=0.5, help="0 takes the likeliest byte each time (0.5)"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the choice (0)")
    parser.add_argument(
        "--backend", metavar="NAME", help='of attention; "cuda" puts the model on the GPU, as CuPy arrays'
    )
    given = parser.parse_args(arguments)
    prompt = (given.prompt.read_text(encoding="utf-8") if given.prompt else PROMPT).encode()
    for name, least, value in (("prompt", 1, len(prompt)), ("tokens", 1, given.tokens)):
        if value < least:
            parser.error(f"--{name}: {value} bytes, expected {least} or more")
    if not given.temperature >= 0:
        parser.error(f"--temperature {given.temperature}: expected 0 or more")
    if given.backend == "cuda":
        import cupy as xp
    else:
        xp = np

    rng = np.random.default_rng(given.seed)
    layers = make_layers(xp)
    caches = [Cache(layer, len(prompt) + given.tokens, xp) for layer in layers]
    text = np.frombuffer(prompt, np.uint8).tolist()
    steps = []

    # The prompt in pieces, then a call for each new byte.
    started = time.perf_counter()
    for start in tqdm(range(0, len(prompt), PIECE), desc="prompt", unit=" pieces", delay=1):
        steps.append(forward(text[start : start + PIECE], layers, caches, given.backend, xp))
    prefill = time.perf_counter() - started
    text.append(choose(steps[-1][-1], given.temperature, rng))
    started = time.perf_counter()
    for _ in tqdm(range(given.tokens - 1), desc="decode", unit=" tokens", delay=1):
        steps.append(forward(text[-1:], layers, caches, given.backend, xp))
        text.append(choose(steps[-1][-1], given.temperature, rng))
    decode = time.perf_counter() - started

    # The same without a cache, all of it at once.
    again = forward(text[:-1], tqdm(layers, desc="check", unit=" layers", delay=1), None, given.backend, xp)
    difference = np.abs(np.concatenate(steps) - again).max()

    print("\n".join(["the prompt ends", *prompt.decode().splitlines()[-5:]]))
    print()
    print("and goes on")
    print(bytes(text[len(prompt) :]).decode(errors="replace"))
    print()
    print(f"prompt      {len(prompt):,} tokens in {1e3 * prefill:.1f} ms")
    if given.tokens > 1:
        print(f"decode      {given.tokens - 1:,} tokens, {1e3 * decode / (given.tokens - 1):.2f} ms each")
    print(f"cache       {sum(c.keys.nbytes + c.values.nbytes for c in caches) / 2**20:.2f} MiB, written in place")
    print(f"difference  {difference:.1e}: the largest between a probability with the cache and without")
    if not difference < 1e-4:  # scores of 500 are rounded by 3e-5, and weights by that share
        raise SystemExit("With the cache the model says something else than without: expected less than 1e-4.")


if __name__ == "__main__":
    main()
