// What happens to a score between Q K^T and the softmax, and to a weight before P V.
//
//     s = scale q k  ->  score_mod  ->  softcap tanh(s / softcap)  ->  + float mask  ->  - slope |i + shift - j|
//       ->  -inf where the bool mask, mask_mod or the band removes the key
//
// The order is the contract's (problem/mods.py). A score of -inf is a removal at whatever step it appears: tanh
// would make a number of it, and a bias of +inf a NaN. A float mask of -inf removes even over a NaN.
//
// Masks are read where they lie, element by element, with whatever strides they have: an L x S array is never
// made of a smaller one. Config says what there is:
//
//     FloatMask           the float mask's elements: Float16, BFloat16, float, double, or NoMask
//     kHasBoolMask
//     kChangesScores      softcap and ALiBi, which are told apart at run time
//     kDropout
#pragma once

#include "element.cuh"
#include "mask.cuh"
#include "philox.cuh"

template <class FloatMask>
struct MaskTraits : ElementTraits<FloatMask> {
  static constexpr bool kExists = true;
};
template <>
struct MaskTraits<NoMask> {
  static constexpr bool kExists = false;
  using Storage = u8;
};

template <class Config>
struct ScoreFeatures {
  static constexpr bool kHasFloatMask = MaskTraits<typename Config::FloatMask>::kExists;
  // The scores are more than scale q k and the band.
  static constexpr bool kAny = kHasFloatMask || Config::kHasBoolMask || Config::kChangesScores;
  static_assert(Config::kScaleFirst || !kAny, "what is added to scores is not scaled");
};

// The first element of a query's row of an array over scores.
template <class Storage>
__device__ __forceinline__ const Storage* row_of_mask(const FwdParams& params, const Mask& mask, int batch, int head,
                                                   int row) {
  long long offset = head * mask.head_stride + row * mask.row_stride;
#pragma unroll
  for (int axis = kBatchAxes - 1; axis >= 0; --axis) {
    offset += batch % params.batch_shape[axis] * mask.batch_strides[axis];
    batch /= params.batch_shape[axis];
  }
  return static_cast<const Storage*>(mask.data) + offset;
}

// One query's scores. Keys beyond the sequence are not looked up; their scores are whatever they were.
template <class Config>
struct ScoreRow {
  using FloatMask = MaskTraits<typename Config::FloatMask>;
  using Real = typename ElementTraits<typename Config::Element>::Accumulator;

  const FwdParams& params;
  const typename FloatMask::Storage* float_mask;
  const u8* bool_mask;
  Real slope;
  int position;  // of the query on the axis of keys

  // Rows beyond the last query are treated as the last: they may be read, and are not written.
  __device__ __forceinline__ ScoreRow(const FwdParams& params, int batch, int head, int query) : params(params) {
    const ScoreParams& scores = params.scores;
    query = at_most(query, params.seqlen_q - 1);
    if constexpr (ScoreFeatures<Config>::kHasFloatMask) {
      float_mask = row_of_mask<typename FloatMask::Storage>(params, scores.float_mask, batch, head, query);
    }
    if constexpr (Config::kHasBoolMask) {
      bool_mask = row_of_mask<u8>(params, scores.bool_mask, batch, head, query);
    }
    if constexpr (Config::kChangesScores) {
      position = query + scores.shift;
      slope = 0;
      if (scores.alibi_slopes != nullptr) {
        slope = isa::bits_float(isa::ldg_4(scores.alibi_slopes + batch * scores.alibi_batch_stride + head));
      }
    }
  }

  // From q k to what the softmax is taken of.
  __device__ __forceinline__ Real operator()(Real score, int key) const {
    const ScoreParams& scores = params.scores;
    const Real minus_infinity = negative_infinity();
    const bool exists = key < params.seqlen_k;
    bool removed = false;
    if constexpr (Config::kChangesScores) {
      removed = score == minus_infinity;
      if (scores.softcap != 0.0) {
        const Real softcap = static_cast<Real>(scores.softcap);
        score = softcap * hyperbolic_tangent(score / softcap);
      }
    }
    if constexpr (ScoreFeatures<Config>::kHasFloatMask) {
      if (exists) {
        const Real bias = FloatMask::load(float_mask + key * scores.float_mask.column_stride);
        removed = removed || score == minus_infinity || bias == minus_infinity;
        score += bias;
      }
    }
    if constexpr (Config::kChangesScores) {
      const int distance = key < position ? position - key : key - position;
      if (scores.alibi_slopes != nullptr) score -= slope * static_cast<Real>(distance);
    }
    if constexpr (Config::kHasBoolMask) {
      if (exists) removed = removed || isa::ldg_1(bool_mask + key * scores.bool_mask.column_stride) == 0;
    }
    return removed ? minus_infinity : score;
  }
};

// A row's log-sum-exp with its head's sink, one more term in the denominator, and the factor that the output takes.
template <class Real>
struct WithSink {
  Real lse;
  Real factor;
};

template <class Real>
__device__ __forceinline__ WithSink<Real> add_sink(Real lse, Real sink) {
  const Real minus_infinity = negative_infinity();
  if (sink == minus_infinity) return {lse, 1};
  if (lse == minus_infinity) return {sink, 0};
  const Real shift = larger(lse, sink);
  const Real sum = exponential(lse - shift) + exponential(sink - shift);
  return {shift + natural_log(sum), exponential(lse - shift) / sum};
}

template <class Element, class Real>
__device__ __forceinline__ Real sink_of(const void* sinks, bool are_float, int head) {
  if (are_float) return ElementTraits<float>::load(static_cast<const float*>(sinks) + head);
  return ElementTraits<Element>::load(static_cast<const typename ElementTraits<Element>::Storage*>(sinks) + head);
}

__device__ __forceinline__ u64 dropout_seed(const ScoreParams& scores) {
  if (scores.seed_data == nullptr) return scores.seed;
  const uint2 words = isa::ldg_8(scores.seed_data);
  return static_cast<u64>(words.y) << 32 | words.x;
}
