// The end of a row of attention, and attention sinks (G. Xiao et al., 2023, arXiv 2309.17453; learned, one for each
// head: OpenAI, "gpt-oss", 2025): one more term exp(sink) in the softmax's denominator, without a value.
//
//     lse' = log(exp(lse) + exp(sink)),   O' = exp(lse - lse') O
#pragma once

#include "element.cuh"

// How a row ends: its log-sum-exp, and what its sum of weighted values is multiplied by.
template <class Real>
struct RowEnd {
  Real lse;
  Real factor;
};

// A head's sink is one more term in the denominator. Of a split's partial results it is left out: `combine` adds it.
template <class Element, class Real>
__device__ __forceinline__ RowEnd<Real> add_sink(RowEnd<Real> end, const void* sinks, bool are_float, int head) {
  using Traits = ElementTraits<Element>;
  const Real sink = are_float ? ElementTraits<float>::load(static_cast<const float*>(sinks) + head)
                              : Traits::load(static_cast<const typename Traits::Storage*>(sinks) + head);
  const Real shift = larger(end.lse, sink);
  if (shift == negative_infinity()) return end;
  const Real weight = exponential(end.lse - shift);
  const Real sum = weight + exponential(sink - shift);
  return {shift + natural_log(sum), end.factor * (weight / sum)};
}
