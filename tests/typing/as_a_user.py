"""Every public name as a user's program has it, for mypy in its strict mode (`make lint`); nothing here is run.

`tests/unit/test_typing.py` sees that no name is missing, and that what is wrong here is an error there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import cupyflash
import cupyflash.formulas
import cupyflash.integrations
import cupyflash.testing
from cupyflash import CupyflashError, Unsupported, mods
from cupyflash.backends.registry import Backend, Merger
from cupyflash.build.functor import TracedMod
from cupyflash.errors import KernelCompileError
from cupyflash.explain import Explanation
from cupyflash.problem.parts import Parts
from cupyflash.problem.problem import Buffers, Problem
from cupyflash.tune import Tuning

if TYPE_CHECKING:
    from typing_extensions import assert_type

Floats = npt.NDArray[np.float32]


def results(q: Floats, k: Floats, v: Floats, flag: bool, options: dict[str, Any]) -> None:
    assert_type(cupyflash.attention(q, k, v), Floats)
    assert_type(cupyflash.attention(q, k, v, is_causal=True, window=(3, None), align="bottom_right"), Floats)
    assert_type(cupyflash.attention(q, k, v, return_lse=True), tuple[Floats, Any])
    assert_type(cupyflash.attention(q, k, v, return_lse=True, return_weights=False), tuple[Floats, Any])
    assert_type(cupyflash.attention(q, k, v, return_weights=True), tuple[Floats, Floats])
    assert_type(cupyflash.attention(q, k, v, return_lse=True, return_weights=True), tuple[Floats, Any, Floats])
    # A flag known only when it runs, options that are, and the first eight by place as with PyTorch.
    assert_type(cupyflash.attention(q, k, v, return_lse=flag), Any)
    assert_type(cupyflash.attention(q, k, v, None, 0.1, True), Any)
    cupyflash.attention(q, k, v, **options)
    # Its own kind of array comes back.
    half: npt.NDArray[np.float16] = np.zeros((4, 8), np.float16)
    assert_type(cupyflash.attention(half, half, half), npt.NDArray[np.float16])


def arguments(q: Floats, mask: npt.NDArray[np.bool_]) -> None:
    cupyflash.attention(
        query=q,
        key=q,
        value=q,
        attn_mask=(q, mask),
        dropout_p=0.5,
        is_causal=True,
        scale=None,
        enable_gqa=True,
        window=[None, 3],
        align=2,
        softcap=None,
        alibi_slopes=q,
        sinks=q,
        score_mod=lambda score, b, h, q_idx, kv_idx: score,
        mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
        seed=3,
        precision="ieee",
        out=q,
        backend="numpy",
    )


def companions(q: Floats) -> None:
    out, lse = cupyflash.attention(q, q, q, return_lse=True)
    cupyflash.attention_weights(q, q, stage="raw")
    merged, _ = cupyflash.merge_attention([out, out], [lse, lse], backend=None)
    assert_type(merged, Floats)
    assert_type(cupyflash.dropout_mask((2, 3), 0.5, 1), npt.NDArray[np.bool_])
    assert_type(cupyflash.flops((2, 3), (2, 3), (2, 3)), int)
    assert_type(cupyflash.backends(), tuple[str, ...])
    assert_type(cupyflash.explain(q, q, q, device="H200"), Explanation)
    assert_type(cupyflash.tune(q, q, q), Tuning)
    assert_type(cupyflash.trace_mod(mods.tanh_softcap(2.0)), TracedMod)
    assert_type(cupyflash.__version__, str)
    with cupyflash.progress():
        pass
    with cupyflash.progress(lambda done, total: print(done / total)):
        pass
    assert_type(cupyflash.formulas.original_attention(q, q, q), npt.NDArray[Any])


def gallery(q: Floats) -> None:
    for score_mod in (
        mods.alibi(q),
        mods.relative_position_bias(q),
        mods.distance_decay(q),
        mods.tanh_softcap(1),
        mods.soft_clipping(1),
    ):
        cupyflash.attention(q, q, q, score_mod=score_mod)
    for mask_mod in (mods.document_mask(q), mods.prefix_lm(3), mods.sliding_window(1, 2), mods.dilated_window(2, 3)):
        cupyflash.attention(q, q, q, mask_mod=mask_mod)


class Mine:
    """A backend of the user's."""

    def reasons(self, problem: Problem) -> Sequence[str]:
        return [] if problem.library == "numpy" else ["it takes NumPy arrays only"]

    def run(self, problem: Problem, buffers: Buffers) -> None:
        buffers.out[...] = 0

    def merge_reasons(self, parts: Parts) -> Sequence[str]:
        return []

    def merge(self, parts: Parts) -> tuple[Any, Any]:
        return parts.outs[0], parts.lses[0]


def extended() -> None:
    backend: Backend = Mine()
    merger: Merger = Mine()
    cupyflash.register_backend("mine", backend, overwrite=True)
    assert isinstance(merger, Merger)


def errors(q: Floats) -> None:
    try:
        cupyflash.attention(q, q, q)
    except Unsupported as error:
        assert_type(error.reasons, dict[str, tuple[str, ...]])
    except KernelCompileError as error:
        assert_type(error.log, str)
    except CupyflashError as error:
        print(error)


def checked(q: Floats) -> None:
    cupyflash.testing.assert_attention_close(cupyflash.attention(q, q, q), {"query": q, "key": q, "value": q})


def wrong(q: Floats) -> None:
    """Each line is an error, and would be one here if it were none."""
    cupyflash.attention(q, q)  # type: ignore[call-overload]
    cupyflash.attention(q, q, q, causal=True)  # type: ignore[call-overload]
    cupyflash.attention(q, q, q, is_causal="yes")  # type: ignore[call-overload]
    cupyflash.attention(q, q, q, window=3)  # type: ignore[call-overload]
    cupyflash.flops((2, 3), (2, 3), "3")  # type: ignore[arg-type]
    cupyflash.register_backend("mine", q)  # type: ignore[arg-type]
    cupyflash.progress(3)  # type: ignore[arg-type]
