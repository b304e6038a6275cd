"""Attention for the models of Hugging Face transformers: ``attn_implementation=register()``.

transformers looks up two functions by the name of an attention implementation.  The one for masks is called once in a
forward pass, the one for attention in every layer:

    make_mask   a mask function, lengths, offsets, padding  →  Mask: a window, a shift, a padding mask (B, S)
    attend      query, key, value, Mask, bias, sinks, …     →  `cupyflash.attention`

So a causal mask or a sliding window of L×S elements is never made: it reaches the kernels as two bounds.  A mask
function that is not known here (chunks, packed sequences, image tokens that see one another, a user's own) is written
out by transformers' own code, as a bool array (B, 1, L, S).

Which keys a query sees: with the position of query i being i + q_offset, that of key j being j + kv_offset, the shift
of the diagonal is q_offset - kv_offset.  It says where in a cache the queries stand, also in a static one, whose keys
reach beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from ..api import attention

__all__ = ["NAME", "Mask", "attend", "make_mask", "register"]

#: The name in ``attn_implementation=``.  With "flash" in it, transformers would look for a kernel to download.
NAME = "cupy_attention"

_Window = tuple[int | None, int | None]

# Arguments that some models pass to have their scores computed otherwise, and which there is nothing for here.
_REFUSED = {
    "cache": "a paged cache of continuous batching",
    "indices": "keys chosen for each query",
    "block_indices": "blocks of keys chosen for each query",
    "sinks": "sinks for each query",
}


def register(name: str = NAME, *, backend: str | None = None) -> str:
    """Make cupyflash known to transformers under `name`, and return the name.

    Parameters
    ----------
    name : str
        What is to be given as ``attn_implementation=``.
    backend : str, optional
        The backend of `cupyflash.attention`.  Default: as there.

    Raises
    ------
    TypeError
        name is not a str.
    ValueError
        "flash" is in name: transformers takes such names for kernels to be downloaded.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM  # doctest: +SKIP
    >>> model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=register())  # doctest: +SKIP
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, but was {name!r}")
    if "flash" in name:
        raise ValueError(
            f"name must not contain 'flash', which transformers takes for a kernel's name, but was {name!r}"
        )

    def attend_with_backend(*args: Any, **kwargs: Any) -> tuple[Any, None]:
        return attend(*args, backend=backend, **kwargs)

    # Neither is for torch.compile to trace: the first leaves torch, the second looks at the padding.
    AttentionInterface.register(name, torch.compiler.disable(attend_with_backend))
    AttentionMaskInterface.register(name, torch.compiler.disable(make_mask))
    return name


@dataclass(frozen=True)
class Mask:
    """Which keys take part, without an element for each query and key.

    Attributes
    ----------
    shape : (B, 1, L, S)
        That of the mask that is not made.
    window : (left, right)
        Query i sees the keys from i + shift - left to i + shift + right; None is unbounded.
    shift : int
    padding : bool tensor (B, S) or None
        True where the key takes part; None where all do.
    """

    shape: tuple[int, int, int, int]
    window: _Window
    shift: int
    padding: torch.Tensor | None

    ndim = 4  # what models ask of a mask before they pass it on

    def __getitem__(self, index: Any) -> Mask:
        """The mask itself for the slice ``[:, :, :, :S]``, which some models take of it."""
        if index == (slice(None), slice(None), slice(None), slice(None, self.shape[3])):
            return self
        raise NotImplementedError(_refusal(f"takes {index} of"))

    def contiguous(self) -> Mask:
        """The mask itself; `generate` asks for it."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Mask:
        """The mask itself: `attend` takes the padding to where the query is."""
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_refusal(f"asks for {name} of"))

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any) -> Any:
        # Not a TypeError, which torch's operators replace by one of their own
        raise NotImplementedError(_refusal(f"calls torch's {getattr(function, '__name__', function)} on"))


def _refusal(what: str) -> str:
    return (
        f"the model {what} its mask instead of passing it to its attention function: it does not run by "
        'AttentionInterface, or not on masks that are no tensors; choose attn_implementation="eager" for it'
    )


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Mask | torch.Tensor | None:
    """The mask of a forward pass, for `attend`; the arguments are those of transformers' mask functions.

    Returns
    -------
    Mask
        For causal and bidirectional masks and sliding windows of both kinds.
    bool tensor (B, 1, L, S)
        For any other `mask_function`.
    None
        Where all keys take part and the model allows it: some add a mask to a bias.
    """
    if isinstance(attention_mask, Mask):  # made by `generate`, ahead of the model
        return attention_mask
    window = _window_of(mask_function)
    if window is None:
        kwargs.update(allow_is_causal_skip=False)  # None would stand for a plain causal mask
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        missing = kv_length - padding.shape[1]  # the part of a static cache that is not filled yet
        if padding.all() and (not missing or window[1] == 0):
            padding = None
        elif missing:
            padding = torch.nn.functional.pad(padding, (0, missing))
    if allow_is_bidirectional_skip and window == (None, None) and padding is None:
        return None
    return Mask((batch_size, 1, q_length, kv_length), window, int(q_offset) - kv_offset, padding)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer; what models call, with transformers' names.

    Parameters
    ----------
    module : the layer; its `is_causal` counts where there is neither a mask nor the argument
    query : tensor (B, Hq, L, E)
    key, value : tensor (B, Hkv, S, E), (B, Hkv, S, Ev)
    attention_mask : Mask, bool or float tensor that broadcasts to (B, Hq, L, S), or None
        A Mask has the window in it.  With None, transformers' own functions are followed: a query of a causal layer
        sees the keys up to its own index, the last `sliding_window` of them; a single query sees all; one of another
        layer sees all, or sliding_window - 1 on each side.
    position_bias : float tensor that broadcasts to (B, Hq, L, S), optional
        Added to the scores beside the mask.
    s_aux : tensor (Hq,), optional
        Sinks.

    Returns
    -------
    out : tensor (B, L, Hq, Ev)
    None
        In place of weights, which transformers asks of "eager" alone.

    Raises
    ------
    TypeError, ValueError, Unsupported
        As `cupyflash.attention`; TypeError while gradients are asked for, since there is no backward pass.
    NotImplementedError
        The model asks for one of the things that there is nothing for here.
    """
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{NAME!r} has nothing for {what}, but the model passed {name}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise TypeError(
            f"{NAME!r} has no backward pass, but the model was called with gradients on: call it under "
            'torch.no_grad(), or train it after model.set_attn_implementation("sdpa")'
        )
    q_length = query.shape[2]
    options: dict[str, Any] = {}
    mask: torch.Tensor | None = None
    if isinstance(attention_mask, Mask):
        options.update(window=attention_mask.window, align=attention_mask.shift)
        if attention_mask.padding is not None:
            mask = attention_mask.padding.to(query.device)[:, None, None, :]
    elif attention_mask is not None:
        mask = attention_mask
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and q_length > 1:
            options.update(window=(None if sliding_window is None else sliding_window - 1, 0))
        elif sliding_window is not None and not causal:
            options.update(window=(sliding_window - 1, sliding_window - 1))
    if dropout:
        options.update(dropout_p=dropout, seed=int(torch.randint(2**62, ())))  # so that torch.manual_seed decides
    batch = torch.broadcast_shapes(query.shape[:1], key.shape[:1])
    out = query.new_empty(*batch, q_length, query.shape[1], value.shape[-1])
    attention(
        query,
        key,
        value,
        _joined(position_bias, mask),
        scale=scaling,
        enable_gqa=not query.shape[1] == key.shape[1] == value.shape[1],
        softcap=softcap,
        sinks=s_aux,
        out=out.transpose(1, 2),
        backend=backend,
        **options,
    )
    return out, None


def _joined(bias: torch.Tensor | None, mask: torch.Tensor | None) -> Any:
    """Both as `attn_mask`: side by side where the mask is bool, as their sum where it is float."""
    if bias is None:
        return mask
    if mask is None:
        return bias
    return (bias, mask) if mask.dtype is torch.bool else bias + mask


def _window_of(function: Callable[..., Any]) -> _Window | None:
    """The bounds of a mask function; None for one that is not known.  Unknown ones cost memory, not correctness."""
    if function is causal_mask_function:
        return None, 0
    if function is bidirectional_mask_function:
        return None, None
    code = getattr(function, "__code__", None)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if code is _CAUSAL_SIDE:
        return cells[0] - 1, None  # kv > q - sliding_window
    if code is _BOTH_SIDES:
        return cells[0], cells[0]  # |q - kv| <= sliding_window
    if code is _INTERSECTION:
        windows = [_window_of(one) for one in cells[0]]
        if None not in windows:
            lefts, rights = zip(*windows, strict=True)
            return _least(lefts), _least(rights)
    return None


def _least(bounds: tuple[int | None, ...]) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)


# The code of the functions that transformers makes: it tells them apart, whatever they close over.
_CAUSAL_SIDE = sliding_window_overlay(1).__code__
_BOTH_SIDES = sliding_window_bidirectional_overlay(1).__code__
_INTERSECTION = and_masks(causal_mask_function).__code__
