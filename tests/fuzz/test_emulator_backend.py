"""Random calls of attention on the emulated kernels, under the race detector, each with a schedule of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cupyflash
from cupyflash.testing import DTYPES, Case, assert_attention_close, random_case
from tests.cases import KERNEL_BACKENDS, examples

pytestmark = pytest.mark.usefixtures("cxx")

REFUSED: dict[str, Any] = {
    "masks": (),
    "dropout_p": 0.0,
    "seed": None,
    "softcap": 0.0,
    "alibi_shape": None,
    "sinks": None,
    "score_mod": None,
    "mask_mod": None,
}
SCHEDULES = st.builds(
    "schedule={},seed={},late_landing={},workers={}".format,
    st.sampled_from(["fifo", "random", "priority"]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 1),
    st.integers(1, 2),
)


@st.composite
def kernel_cases(draw: st.DrawFn) -> Case:
    """A case that the kernels run: random_case with their head dims, and lengths around the ends of their tiles."""
    case = random_case(draw, dtype=draw(st.sampled_from(list(DTYPES))), **REFUSED)
    head_dim = draw(st.sampled_from([64, 64, 128]))
    lengths = st.one_of(st.integers(0, 12), st.integers(60, 68), st.integers(1, 200))
    seqlen_q, seqlen_k = draw(lengths), draw(lengths)
    case = replace(
        case,
        query_shape=(*case.query_shape[:-2], seqlen_q, head_dim),
        key_shape=(*case.key_shape[:-2], seqlen_k, head_dim),
        value_shape=(*case.value_shape[:-2], seqlen_k, head_dim),
    )
    # Many heads need no long sequences: a call stays at some dozens of tiles.
    if np.prod(case.batch_shape) > 12:
        case = replace(
            case,
            query_shape=(*case.query_shape[:-2], min(seqlen_q, 5), head_dim),
            key_shape=(*case.key_shape[:-2], min(seqlen_k, 70), head_dim),
            value_shape=(*case.value_shape[:-2], min(seqlen_k, 70), head_dim),
        )
    return case


@examples(15)
@given(case=kernel_cases(), schedule=SCHEDULES)
def test_any_call_that_the_kernels_run(case: Case, schedule: str) -> None:
    assert not KERNEL_BACKENDS["emulator"].refused_features(case)
    arguments = case.arguments()
    shape = (*case.batch_shape, case.query_shape[-2], case.value_shape[-1])
    out = np.full(shape, np.nan, DTYPES[case.dtype])
    with mock.patch.dict("os.environ", CUPYFLASH_EMULATOR=schedule):
        result = cupyflash.attention(**arguments, out=out, backend="emulator")
    assert_attention_close(result, case, backend=f"emulator, {schedule}")
