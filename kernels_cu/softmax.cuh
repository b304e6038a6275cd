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

// Of 2, for the weight of a score; `offset` is the maximum, scaled unless scores were.
template <bool kScaledFirst>
__device__ __forceinline__ float exponent(float score, float offset, float scale_log2) {
  return kScaledFirst ? (score - offset) * kLog2E : score * scale_log2 - offset;
}

// 2^x with multiply-adds, of which there are eight in the time of one ex2 (FlashAttention-4); for x up to 127, and the
// exponents of weights are not much above kLazyGrowth:
//
//     x = n + f,  n whole,  |f| <= 1/2         2^x = 2^n 2^f,  2^f = 1 + f (c1 + f (c2 + f (c3 + f c4)))
//
// The coefficients make the largest relative error the least, 2^-18.4: P would do with one of them less, but l does
// for lse as well, which is float32. Whole powers are exact, and that of NaN is NaN. Below -126.5 n is -127, whose bits
// as an exponent are those of zero: keys that do not take part weigh nothing.
__device__ __forceinline__ float exp2_by_fma(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are a whole number, the nearest one
  const float bounded = isa::max_nan(x, -127.0f);
  const float shifted = bounded + kShift;
  const float f = bounded - (shifted - kShift);
  const float power = (((0.00958285f * f + 0.05590643f) * f + 0.24024099f) * f + 0.69312419f) * f + 1.0f;
  return power * isa::bits_float((isa::float_bits(shifted) + 127) << 23);
}

// 2^x of a row's weights; of each kOneByFma of them one with multiply-adds, where that is not 0.
template <int kOneByFma>
__device__ __forceinline__ float exp2_of(int place, float x) {
  if constexpr (kOneByFma > 0) {
    if (place % kOneByFma == kOneByFma - 1) return exp2_by_fma(x);
  }
  return isa::ex2(x);
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
template <bool kScaledFirst, bool kLazy, int kOneByFma, int kScoreTiles>
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
        isa::ex2(kScaledFirst ? exponent<true>(last_max, offset, 1.0f) : isa::mul_rn(last_max, scale_log2) - offset);
    state.row_max[half] = row_max;

    float row_sum = state.row_sum[half] * correction[half];
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s_frag[n][i] = exp2_of<kOneByFma>(2 * n + i % 2, exponent<kScaledFirst>(s_frag[n][i], offset, scale_log2));
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
  next_weights<kScaledFirst, false, 0>(s_frag, state, correction, scale_log2);
  observe("softmax", state, correction);
  rescale(o_frag, correction);
}
