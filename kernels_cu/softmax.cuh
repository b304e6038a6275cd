// Softmax over keys that come tile by tile: FlashAttention-2 (T. Dao, 2023), Algorithm 1, lines 8 to 10 and
// 12 to 13.
//
//     m'  = max(m, rowmax(S))          the running maximum
//     P   = exp(S - m')
//     l'  = exp(m - m') l + rowsum(P)  the running sum
//     O'  = exp(m - m') O + P V
//
// Exponentials are powers of two: exp(scale s - scale m) = 2^(s c - m c) with c = scale log2(e), one
// multiply-add and one ex2. The maximum is that of the raw scores, which is right if scale > 0, and -inf stays
// -inf if c is neither 0 nor infinite. For any other scale the scores are scaled first, and 2^((s - m) log2(e))
// is taken: one instruction more, and s log2(e) cannot overflow.
#pragma once

#include "isa.cuh"

// A lane's two rows, g and g + 8. The maximum is the same in the four lanes of a row; the sum is each lane's
// own part, added up once at the end.
struct RowState {
  float row_max[2];
  float row_sum[2];

  static __device__ __forceinline__ RowState start() {
    const float minus_infinity = isa::bits_float(kNegativeInfinityBits);
    return {{minus_infinity, minus_infinity}, {0.0f, 0.0f}};
  }
};

// 2^(exponent) of a score; `offset` is the maximum, scaled unless scores were.
template <bool kScaledFirst>
__device__ __forceinline__ float weight(float score, float offset, float scale_log2) {
  return isa::ex2(kScaledFirst ? (score - offset) * kLog2E : score * scale_log2 - offset);
}

template <int kScoreTiles>
__device__ __forceinline__ void scale_scores(float (&s_frag)[kScoreTiles][4], float scale) {
#pragma unroll
  for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s_frag[n][i] *= scale;
  }
}

// Any m will do that is the same for all of a row, and near enough to the maximum for no weight to overflow. With kLazy
// one that has grown by a factor of at most 2^kLazyGrowth is kept, so that in most tiles O need not be multiplied by
// anything (FlashAttention-4): float16 holds 2^16, and l is a sum of floats.
constexpr float kLazyGrowth = 8.0f;

// Turns the scores S into P in place, and updates m and l; `correction` is what O has to be multiplied by.
template <bool kScaledFirst, bool kLazy, int kScoreTiles>
__device__ __forceinline__ void next_weights(float (&s_frag)[kScoreTiles][4], RowState& state, float (&correction)[2],
                                             float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float row_max = state.row_max[half];
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      row_max = fmaxf(row_max, fmaxf(s_frag[n][2 * half], s_frag[n][2 * half + 1]));
    }
    row_max = fmaxf(row_max, isa::shuffle_xor(row_max, 1));
    row_max = fmaxf(row_max, isa::shuffle_xor(row_max, 2));

    const float last_max = state.row_max[half];
    if constexpr (kLazy) {
      if ((row_max - last_max) * (kScaledFirst ? kLog2E : scale_log2) <= kLazyGrowth) row_max = last_max;
    }

    // No key has taken part yet: every exponent is -inf whatever is subtracted, but -inf - -inf is not.
    const bool is_empty = row_max == isa::bits_float(kNegativeInfinityBits);
    const float offset = is_empty ? 0.0f : kScaledFirst ? row_max : row_max * scale_log2;
    // From what was subtracted before to what is now, both as rounded: 1 where they are the same, and nothing that a row
    // of many tiles could gather.
    correction[half] =
        kScaledFirst ? weight<true>(last_max, offset, 1.0f) : isa::ex2(isa::mul_rn(last_max, scale_log2) - offset);
    state.row_max[half] = row_max;

    float row_sum = state.row_sum[half] * correction[half];
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s_frag[n][i] = weight<kScaledFirst>(s_frag[n][i], offset, scale_log2);
        row_sum += s_frag[n][i];
      }
    }
    state.row_sum[half] = row_sum;
  }
}

// O' = exp(m - m') O
template <int kOutTiles>
__device__ __forceinline__ void rescale(float (&o_frag)[kOutTiles][4], const float (&correction)[2]) {
#pragma unroll
  for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) o_frag[n][i] *= correction[i / 2];
  }
}

template <bool kScaledFirst, int kScoreTiles, int kOutTiles>
__device__ __forceinline__ void online_softmax(float (&s_frag)[kScoreTiles][4], float (&o_frag)[kOutTiles][4],
                                               RowState& state, float scale_log2) {
  float correction[2];
  observe("scores", s_frag);
  next_weights<kScaledFirst, false>(s_frag, state, correction, scale_log2);
  observe("softmax", state, correction);
  rescale(o_frag, correction);
}
