"""Powers of two by multiply-adds: how near they are, and where they stand in for those of the hardware."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.harness import compiled

pytestmark = pytest.mark.usefixtures("cxx")

TEXT = """
#include "softmax.cuh"
extern "C" __global__ void powers(const u32* in, u32* out, int count) {
  for (int i = isa::thread_index(); i < count; i += 256) {
    isa::stg_4(out + i, isa::float_bits(exp2_by_fma(isa::bits_float(isa::ldg_4(in + i)))));
  }
}

// A lane's two rows of 64 keys; what it keeps of them comes last.
extern "C" __global__ void weights(const u32* in, u32* out) {
  float s_frag[8][4];
  for (int i = 0; i < 32; ++i) s_frag[i / 4][i % 4] = isa::bits_float(isa::ldg_4(in + 32 * isa::lane_index() + i));
  RowState state = RowState::start();
  float correction[2];
  next_weights<false, true, ONE_IN>(s_frag, state, correction, 1.0f);
  for (int i = 0; i < 32; ++i) isa::stg_4(out + 34 * isa::lane_index() + i, isa::float_bits(s_frag[i / 4][i % 4]));
  for (int i = 0; i < 2; ++i) isa::stg_4(out + 34 * isa::lane_index() + 32 + i, isa::float_bits(state.row_sum[i]));
}
"""

# Of the polynomial, and its roundings.
ERROR = 2.0**-18.3


@pytest.fixture
def rng():
    return np.random.default_rng(31)


def powers(exponents):
    exponents = np.asarray(exponents, np.float32)
    out = np.zeros(len(exponents), np.uint32)
    arguments = (exponents.view(np.uint32), out, np.int32(len(exponents)))
    compiled(TEXT.replace("ONE_IN", "0")).get_function("powers")((1,), (256,), arguments)
    return out.view(np.float32)


def weights(scores, one_in):
    """(weights, sums) of 16 rows of 64 scores, each row in four lanes' hands."""
    lanes = scores.reshape(2, 8, 8, 4, 2).transpose(1, 3, 2, 0, 4).reshape(32, 32)
    out = np.zeros((32, 34), np.uint32)
    module = compiled(TEXT.replace("ONE_IN", str(one_in)))
    module.get_function("weights")((1,), (32,), (np.ascontiguousarray(lanes).view(np.uint32), out))
    found = out.view(np.float32)
    rows = found[:, :32].reshape(8, 4, 8, 2, 2).transpose(3, 0, 2, 1, 4).reshape(16, 64)
    return rows, found[:, 32:].reshape(8, 4, 2).sum(1).T.reshape(16)


def test_powers(rng):
    exponents = np.concatenate([np.linspace(-125.5, 8, 200_001), rng.uniform(-2, 0, 100_000)]).astype(np.float32)
    exact = np.exp2(exponents.astype(np.float64))
    error = np.abs(powers(exponents) / exact - 1).max()
    assert 0.9 * ERROR < error < ERROR


def test_whole_powers_are_exact():
    exponents = np.arange(-126, 9)
    np.testing.assert_array_equal(powers(exponents), np.exp2(exponents.astype(np.float32)))


def test_nothing_is_left_of_keys_that_do_not_take_part():
    np.testing.assert_array_equal(powers([-np.inf, -3e38, -1e6, -128, -127, -126.75]), 0)


def test_nan_stays():
    assert np.isnan(powers([np.nan, -np.nan])).all()


@pytest.mark.parametrize("one_in", [1, 3, 8])
def test_one_in_so_many(rng, one_in):
    scores = rng.standard_normal((16, 64)).astype(np.float32)
    scores[3, ::5] = -np.inf
    scores[5] = -np.inf
    scores[7, 11] = np.nan
    others, other_sums = weights(scores, 0)
    found, sums = weights(scores, one_in)
    place = np.arange(64) // 8 * 2 + np.arange(64) % 2  # of a lane's keys
    differs = found.view(np.uint32) != others.view(np.uint32)
    assert not differs[:, place % one_in != one_in - 1].any()
    assert differs[:3, place % one_in == one_in - 1].mean() > 0.9
    np.testing.assert_allclose(found, others, rtol=ERROR)
    np.testing.assert_allclose(sums, other_sums, rtol=ERROR)
    assert (found[5] == 0).all()
    assert sums[5] == 0
    assert np.isnan(found[7]).sum() == 1
