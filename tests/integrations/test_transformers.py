"""Models of transformers with random weights: the same logits as with ``attn_implementation="eager"``.

The rule is that of `cupyflash.testing`, for want of anything better applied to a whole model: the error against the
model in float64 is at most twice the error of "eager", plus eight roundoffs of the largest logit.  "eager" itself takes
its softmax in float32 in many models, also in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cupyflash.testing import ROUNDOFF

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from cupyflash.integrations import transformers as ours  # noqa: E402

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "sliding_window": 4}
ENCODER_DECODER = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": WINDOW,
    "Mixtral": {**WINDOW, "num_local_experts": 4},
    "Qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Gemma2": {**WINDOW, "head_dim": 8},  # softcap
    "Gemma3Text": {**WINDOW, "head_dim": 8},
    "GptOss": {**WINDOW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "GPT2": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **{
        name: TEXT[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}},
    "GPTNeoX": TEXT,
    "Granite": {**GROUPED, "attention_multiplier": 0.5},  # a scale of its own
    "Olmo2": GROUPED,
    "Starcoder2": WINDOW,
    "OPT": {**TEXT, "ffn_dim": 40, "word_embed_proj_dim": 32},
    "Phi3": WINDOW,
    "Cohere2": WINDOW,
    "Llama4Text": {  # chunks, which are written out
        **GROUPED, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 4, "intermediate_size_mlp": 40},
    "DeepseekV3": {  # E != Ev
        **TEXT, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": TEXT,
    "Roberta": TEXT,
    "DistilBert": {"vocab_size": 99, "dim": 32, "hidden_dim": 40, "n_layers": 2, "n_heads": 4},
    "ModernBert": {  # windows on both sides
        **TEXT, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}  # fmt: skip
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "T5": T5,  # a bias for every pair
    "UMT5": T5,
    "Bart": ENCODER_DECODER,
    "Marian": ENCODER_DECODER,
}
WHISPER: dict[str, Any] = {
    **{name: value for name, value in ENCODER_DECODER.items() if name != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGES: dict[str, dict[str, Any]] = {
    "ViT": IMAGE,
    "DINOv3ViT": IMAGE,
    "CLIPVision": IMAGE,
    "Beit": {**IMAGE, "use_relative_position_bias": True},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUPYFLASH_BACKEND", raising=False)
    ours.register()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Models:
    """One model three times: ours, eager, and `exact` in float64."""

    def __init__(self, auto: str, name: str, arguments: dict[str, Any], exact: str = "eager") -> None:
        def make(implementation: str) -> Any:
            config = getattr(transformers, f"{name}Config")(**arguments)
            config._experts_implementation = "eager"  # torch's own product of experts has no float64
            model = getattr(transformers, auto).from_config(config, attn_implementation=implementation)
            return model.eval()

        self.ours, self.eager, self.exact = make(ours.NAME), make("eager"), make(exact).double()
        for parameter in self.eager.parameters():
            if (
                parameter.ndim > 1
            ):  # else scores are nearly 0, and their softmax nearly the same whatever was done to them
                parameter.detach().normal_(std=parameter.shape[-1] ** -0.5)
        self.ours.load_state_dict(self.eager.state_dict())
        self.exact.load_state_dict(self.eager.state_dict())

    def compare(self, run: Callable[[Any], Any], keep: Any = ...) -> None:
        """`run` of a model gives logits; those that `keep` chooses are compared."""
        found, eager, exact = (np.asarray(run(model).double())[keep] for model in (self.ours, self.eager, self.exact))
        assert np.isfinite(exact).all()
        error = np.abs(found - exact).max()
        limit = 2 * np.abs(eager - exact).max() + 8 * ROUNDOFF["float32"] * np.abs(exact).max()
        assert error <= limit, f"the error is {error:.3g}, more than {limit:.3g}"


def tokens(length: int = 12) -> Any:
    return torch.randint(3, 99, (2, length))


def generated(model: Any, inputs: Any, padding: Any, cache: str | None) -> Any:
    """The logits of three tokens, each chosen by the model."""
    answer = model.generate(
        inputs,
        attention_mask=padding,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(answer.logits)


# --- families --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str) -> None:
    models = Models("AutoModelForCausalLM", name, DECODERS[name])
    inputs = tokens()
    padding = torch.ones_like(inputs)
    padding[0, 1:4] = 0  # behind the first token: in float64 "eager" makes NaN of a query that sees no key
    models.compare(lambda model: model(inputs).logits)
    models.compare(lambda model: model(inputs, attention_mask=padding).logits, padding.bool())
    for cache in (None, "static"):
        models.compare(lambda model, cache=cache: generated(model, inputs, padding, cache))


def test_padding_on_the_left() -> None:
    """A padded query has nothing to see: eager gives it the mean of all values, we 0.  Nobody reads either."""
    models = Models("AutoModelForCausalLM", "Llama", GROUPED, exact="sdpa")
    inputs = tokens()
    padding = torch.ones_like(inputs)
    padding[0, :5] = 0
    models.compare(lambda model: model(inputs, attention_mask=padding).logits, padding.bool())
    for cache in (None, "static"):
        models.compare(lambda model, cache=cache: generated(model, inputs, padding, cache))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name: str) -> None:
    models = Models("AutoModel", name, ENCODERS[name])
    inputs = tokens()
    padding = torch.ones_like(inputs)
    padding[0, 7:] = 0
    models.compare(lambda model: model(inputs).last_hidden_state)
    models.compare(lambda model: model(inputs, attention_mask=padding).last_hidden_state, padding.bool())


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder(name: str) -> None:
    models = Models("AutoModelForSeq2SeqLM", name, ENCODER_DECODERS[name])
    inputs, answers = tokens(), tokens(6)
    padding = torch.ones_like(inputs)
    padding[0, 7:] = 0
    models.compare(lambda model: model(inputs, attention_mask=padding, decoder_input_ids=answers).logits)
    models.compare(lambda model: generated(model, inputs, padding, None))


@pytest.mark.slow
def test_speech() -> None:
    models = Models("AutoModelForSpeechSeq2Seq", "Whisper", WHISPER)
    sound, answers = torch.randn(2, 8, 40), tokens(6)
    models.compare(lambda model: model(input_features=sound.to(model.dtype), decoder_input_ids=answers).logits)


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    models = Models("AutoModel", name, IMAGES[name])
    pixels = torch.randn(2, 3, 32, 32)
    models.compare(lambda model: model(pixels.to(model.dtype)).last_hidden_state)


def test_an_image_among_tokens() -> None:
    """Tokens of an image see one another: a mask function that only transformers knows."""
    arguments = {
        "text_config": {**WINDOW, "head_dim": 8},
        "vision_config": IMAGE,
        "mm_tokens_per_image": 4,
        "image_token_index": 98,
        "boi_token_index": 97,
        "eoi_token_index": 96,
    }
    models = Models("AutoModelForImageTextToText", "Gemma3", arguments)
    inputs, pixels = tokens() % 90, torch.randn(2, 3, 32, 32)
    inputs[:, 3:7] = 98
    kinds = (inputs == 98).long()
    models.compare(lambda model: model(inputs, pixel_values=pixels.to(model.dtype), token_type_ids=kinds).logits)


def test_masks_that_the_caller_gives_and_packed_sequences() -> None:
    models = Models("AutoModelForCausalLM", "Llama", GROUPED)
    inputs = tokens()
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]).expand(2, -1)
    models.compare(lambda model: model(inputs, position_ids=packed, use_cache=False).logits)
    seen = (torch.rand(2, 1, 12, 12) < 0.6) | torch.eye(12, dtype=torch.bool)
    bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    models.compare(lambda model: model(inputs, attention_mask=bias.to(model.dtype)).logits)
    models.compare(lambda model: model(inputs, attention_mask=seen if model is models.ours else bias).logits)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision(name: str) -> None:
    models = Models("AutoModelForCausalLM", "Llama", GROUPED)
    for model in (models.ours, models.eager):
        model.to(getattr(torch, name))
    models.exact.load_state_dict(models.eager.state_dict())
    inputs = tokens()
    models.compare(lambda model: model(inputs).logits)


# --- masks -----------------------------------------------------------------------------------------------

FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "causal window": masking_utils.sliding_window_causal_mask_function(3),
    "symmetric window": masking_utils.sliding_window_bidirectional_mask_function(3),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_mask_is_what_transformers_would_write_out(function: str) -> None:
    for (q_length, q_offset), (kv_length, kv_offset), padded in itertools.product(
        ((5, 0), (1, 7), (3, 4)), ((5, 0), (8, 0), (8, 2), (16, 0)), (None, 8, 18)
    ):
        padding = None if padded is None else torch.rand(2, padded) < 0.7
        asked = {
            "batch_size": 2,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": torch.tensor(q_offset),  # as static caches give it
            "kv_offset": kv_offset,
            "mask_function": FUNCTIONS[function],
            "attention_mask": padding,
        }
        mask = ours.make_mask(**asked)
        assert isinstance(mask, ours.Mask)
        expected = masking_utils.sdpa_mask(**asked, allow_is_causal_skip=False)
        assert mask.shape == tuple(expected.shape)
        i, j = np.arange(q_length)[:, None] + mask.shift, np.arange(kv_length)
        left, right = (kv_length + 99 if side is None else side for side in mask.window)
        found = ((i - left <= j) & (j <= i + right))[None, None]
        if mask.padding is not None:
            found = found & np.asarray(mask.padding)[:, None, None]
        np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


def test_full_padding_is_no_padding() -> None:
    full = torch.ones(2, 8, dtype=torch.bool)
    assert ours.make_mask(2, 8, 8, attention_mask=full).padding is None
    # The unfilled part of a static cache lies behind the diagonal of a causal mask, and of no other
    assert ours.make_mask(2, 1, 16, q_offset=7, attention_mask=full).padding is None
    both = masking_utils.bidirectional_mask_function
    assert ours.make_mask(2, 8, 16, mask_function=both, attention_mask=full).padding.shape == (2, 16)
    assert ours.make_mask(2, 8, 8, mask_function=both, allow_is_bidirectional_skip=True) is None


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
        masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, i, j: j < 2),
        lambda b, h, i, j: (i + j) % 2 == 0,
    ],
    ids=["chunks", "prefix", "lambda"],
)
def test_an_unknown_mask_is_written_out(function: Any) -> None:
    mask = ours.make_mask(2, 8, 8, mask_function=function)
    assert mask.dtype is torch.bool
    assert torch.equal(mask, masking_utils.sdpa_mask(2, 8, 8, mask_function=function, allow_is_causal_skip=False))


def test_models_that_compute_with_masks_are_refused() -> None:
    models = Models("AutoModelForCausalLM", "Mpt", {"vocab_size": 99, "d_model": 32, "n_layers": 1, "n_heads": 4})
    with pytest.raises(
        NotImplementedError, match=r'calls torch.s masked_fill on its mask .*attn_implementation="eager"'
    ):
        models.ours(tokens())
    mask = ours.make_mask(2, 8, 8)
    assert mask[:, :, :, :8] is mask
    with pytest.raises(NotImplementedError, match="the model takes"):
        mask[:, :, -1:]
    with pytest.raises(NotImplementedError, match=r"calls torch's add on"):
        torch.zeros(8) + mask
    with pytest.raises(AttributeError, match="asks for size of its mask"):
        mask.size()


# --- the function that layers call -----------------------------------------------------------------------


def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `attention` is called with last."""
    seen: dict[str, Any] = {}
    plain = ours.attention

    def spy(*args: Any, **options: Any) -> Any:
        seen.clear()
        seen.update(options, attn_mask=args[3])
        return plain(*args, **options)

    monkeypatch.setattr(ours, "attention", spy)
    return seen


def test_features_reach_the_call_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)
    padding = torch.arange(9) < torch.tensor([[9], [7]])
    mask = ours.make_mask(2, 5, 9, q_offset=4, mask_function=FUNCTIONS["causal window"], attention_mask=padding)
    bias, sinks = torch.randn(1, 4, 5, 9), torch.randn(4)
    out, weights = ours.attend(
        ModuleType("layer"), query, key, value, mask, scaling=0.3, softcap=9.0, position_bias=bias, s_aux=sinks
    )
    assert out.shape == (2, 5, 4, 6)
    assert out.is_contiguous()
    assert weights is None
    assert seen["window"] == (2, 0)
    assert seen["align"] == 4
    assert seen["attn_mask"][0] is bias
    assert seen["attn_mask"][1].shape == (2, 1, 1, 9)
    assert seen["attn_mask"][1].data_ptr() == padding.data_ptr()
    assert (seen["scale"], seen["softcap"], seen["enable_gqa"]) == (0.3, 9.0, True)
    assert seen["sinks"] is sinks


@pytest.mark.parametrize(
    ("q_length", "options", "window"),
    [
        (5, {"is_causal": True}, (None, 0)),
        (5, {"is_causal": False}, None),
        (5, {}, (None, 0)),  # the module's
        (1, {"is_causal": True}, None),
        (5, {"is_causal": True, "sliding_window": 3}, (2, 0)),
        (5, {"is_causal": False, "sliding_window": 3}, (2, 2)),
    ],
)
def test_without_a_mask_the_layer_decides(
    monkeypatch: pytest.MonkeyPatch, q_length: int, options: dict[str, Any], window: Any
) -> None:
    seen = spied(monkeypatch)
    layer = ModuleType("layer")
    layer.is_causal = True  # type: ignore[attr-defined]
    ours.attend(layer, torch.randn(1, 2, q_length, 8), *torch.randn(2, 1, 2, 5, 8), None, **options)
    assert seen.get("window") == window


def test_dropout_follows_torchs_seed() -> None:
    arrays = torch.randn(3, 1, 2, 9, 8)
    layer = ModuleType("layer")
    first, second = (ours.attend(layer, *arrays, None, dropout=0.5)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    first = ours.attend(layer, *arrays, None, dropout=0.5)[0]
    torch.manual_seed(3)
    assert torch.equal(first, ours.attend(layer, *arrays, None, dropout=0.5)[0])


def test_what_there_is_nothing_for_is_refused() -> None:
    arrays = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=r"nothing for blocks of keys .* but the model passed block_indices"):
        ours.attend(ModuleType("layer"), *arrays, None, block_indices=torch.zeros(1))
    with (
        torch.enable_grad(),
        pytest.raises(TypeError, match=r"no backward pass.*torch\.no_grad\(\).*set_attn_implementation\(\"sdpa\"\)"),
    ):
        Models("AutoModelForCausalLM", "Llama", GROUPED).ours(tokens())


def test_names_and_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name must not contain 'flash'"):
        ours.register("cupyflash")
    with pytest.raises(TypeError, match="name must be a str, but was 3"):
        ours.register(3)  # type: ignore[arg-type]
    seen = spied(monkeypatch)
    assert ours.register("by_formula", backend="math") == "by_formula"
    config = transformers.LlamaConfig(**GROUPED)
    transformers.AutoModelForCausalLM.from_config(config, attn_implementation="by_formula")(tokens())
    assert seen["backend"] == "math"


def test_a_model_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `set_attn_implementation`; and two models of one config share the name, as the how-to says."""
    seen = spied(monkeypatch)
    config = transformers.LlamaConfig(**GROUPED)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ours.NAME)
    model(tokens())
    assert seen.pop("window") == (None, 0)
    model.set_attn_implementation("eager")
    model(tokens())
    assert "window" not in seen
    transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ours.NAME)
    model(tokens())
    assert seen["window"] == (None, 0)


def test_a_compiled_model() -> None:
    models = Models("AutoModelForCausalLM", "Llama", GROUPED)
    inputs = tokens()
    models.ours.compile(backend="eager")
    models.compare(lambda model: model(inputs, attention_mask=torch.ones_like(inputs)).logits)
