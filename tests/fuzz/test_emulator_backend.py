"""Random calls of attention on the emulated kernels, under the race detector, each with a schedule of its own."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cupyflash
from cupyflash.testing import DTYPES, Case, assert_attention_close, random_case
from tests.cases import KERNEL_BACKENDS, examples, resized

pytestmark = pytest.mark.usefixtures("cxx")

REFUSED: dict[str, Any] = dict.fromkeys(sorted(KERNEL_BACKENDS["emulator"].refuses))
OPTIONS = st.builds(
    "schedule={},seed={},late_landing={},workers={}{}".format,
    st.sampled_from(["fifo", "random", "priority"]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 1),
    st.integers(1, 2),
    # The emulator's own device has four SMs; the others divide more keys, and have tiles and kernels of their own.
    st.sampled_from(["", "", ",device=H200", ",device=L4", ",device=T4"]),
)
# E and Ev. All but the last are padded to the same: each (dtype, dims, features, ...) is compiled once, in a second.
HEAD_DIMS = [(32, 32), (16, 8), (0, 5), (31, 1), (7, 32), (20, 40)]
# Tiles of queries times tiles of keys, of 64: a call takes a second at most.
MOST_TILES = 60


@st.composite
def kernel_cases(draw: st.DrawFn) -> Case:
    """A case of any arguments that kernels do not refuse, with lengths around the ends of their tiles."""
    case = random_case(draw, dtype=draw(st.sampled_from(list(DTYPES))), **REFUSED)
    # Few queries and many keys are for heads that share a tile, and for blocks that share keys.
    few = st.tuples(st.integers(1, 4), st.integers(1, 700))
    around = st.one_of(st.integers(0, 12), st.integers(60, 68), st.integers(1, 200))
    seqlen_q, seqlen_k = draw(st.one_of(st.tuples(around, around), few))
    tiles = math.prod(case.batch_shape) * math.ceil(seqlen_q / 64)
    seqlen_k = min(seqlen_k, 64 * max(1, MOST_TILES // max(1, tiles)))
    if tiles > MOST_TILES:
        seqlen_q = min(seqlen_q, 5)
    return resized(case, seqlen_q, seqlen_k, *draw(st.sampled_from(HEAD_DIMS)))


@examples(8)
@given(case=kernel_cases(), options=OPTIONS)
def test_any_call_that_the_kernels_run(case: Case, options: str) -> None:
    assert not KERNEL_BACKENDS["emulator"].refused_features(case)
    shape = (*case.batch_shape, case.query_shape[-2], case.value_shape[-1])
    out = np.full(shape, np.nan, DTYPES[case.dtype])
    with mock.patch.dict("os.environ", CUPYFLASH_EMULATOR=options):
        result = cupyflash.attention(**case.arguments(), out=out, backend="emulator")
    assert_attention_close(result, case, backend=f"emulator, {options}")
