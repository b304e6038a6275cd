"""Random problems and random schedules for the kernels, under the emulator."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupyflash.backends.emulator import Options
from cupyflash.testing import assert_attention_close
from tests.cases import examples
from tests.kernels.forward import Spec, forward

pytestmark = pytest.mark.usefixtures("cxx")

options = st.builds(
    Options,
    schedule=st.sampled_from(["fifo", "random", "priority"]),
    seed=st.integers(0, 2**32),
    late_landing=st.booleans(),
    workers=st.integers(1, 2),
)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A problem that the sm_80 kernel takes, and how to run it."""
    lower, upper = draw(st.sampled_from([(False, False), (False, True), (True, False), (True, True)]))
    spec = Spec(
        dtype=draw(st.sampled_from(["float16", "bfloat16"])),
        head_dim=draw(st.sampled_from([64, 128])),
        has_lower=lower,
        has_upper=upper,
    )
    return {
        "spec": spec,
        "seqlen_q": draw(st.integers(1, 140)),
        "seqlen_k": draw(st.integers(0, 200)),
        "heads": draw(st.sampled_from([(1, 1), (2, 1), (3, 3)])),
        "window": (
            draw(st.integers(0, 150)) if lower else None,
            draw(st.sampled_from([0, 0, 1, 63, 64, 100])) if upper else None,
        ),
        "align": draw(st.sampled_from(["top_left", "bottom_right"])),
        "magnitude": draw(st.sampled_from([0.0, 1.0, 10.0])),
        "options": draw(options),
        "seed": draw(st.integers(0, 2**32)),
    }


# An example takes 30 ms under the emulator, and as long for the oracle.
@examples(15)
@given(problems())
def test_forward(problem: dict[str, Any]) -> None:
    spec, (heads_q, heads_kv) = problem["spec"], problem["heads"]
    dtype = np.dtype(np.float16 if spec.dtype == "float16" else ml_dtypes.bfloat16)
    rng = np.random.default_rng(problem["seed"])
    lengths = ((heads_q, problem["seqlen_q"]), (heads_kv, problem["seqlen_k"]), (heads_kv, problem["seqlen_k"]))
    q, k, v = (
        (problem["magnitude"] * rng.standard_normal((1, heads, length, spec.head_dim))).astype(dtype)
        for heads, length in lengths
    )
    shift = 0 if problem["align"] == "top_left" else problem["seqlen_k"] - problem["seqlen_q"]
    left, right = problem["window"]
    bounds = {"lower": shift - (left or 0), "upper": shift + (right or 0)}
    out, lse, _ = forward(spec, q, k, v, options=problem["options"], **bounds)
    case = {
        "query": q,
        "key": k,
        "value": v,
        "enable_gqa": True,
        "window": problem["window"],
        "align": problem["align"],
        "return_lse": True,
    }
    assert_attention_close((out, lse), case, backend=f"emulator, {spec}, {problem['options']}")
