// Joining attention over disjoint sets of keys by its log-sum-exps: Z. Ye et al. (2025), "FlashInfer", eq. 1 to 3.
//
//     m = max_i lse_i,  l = sum_i exp(lse_i - m)
//     out = sum_i (exp(lse_i - m) / l) out_i,  lse = m + ln l
//
// A part without keys has lse_i = -inf and weighs nothing; without any part that has keys, out = 0 and lse = -inf.
// A NaN stays one. Sums are made in one order whatever runs when: results are repeatable to the bit.
#pragma once

#include "element.cuh"

template <class Accumulator>
struct Joint {
  Accumulator largest;  // 0 rather than -inf
  Accumulator total;

  // The same in every lane of a warp, which takes every 32nd part. lse_of(part) reads one, twice.
  template <class LseOf>
  static __device__ __forceinline__ Joint of(int num_parts, const LseOf& lse_of) {
    const int lane = isa::lane_index();
    Accumulator largest = negative_infinity();
    for (int part = lane; part < num_parts; part += 32) largest = larger(largest, lse_of(part));
    largest = largest_of_lanes<32>(largest);
    if (largest == negative_infinity()) largest = 0;  // lest it be subtracted from itself
    Accumulator total = 0;
    for (int part = lane; part < num_parts; part += 32) total += exponential(lse_of(part) - largest);
    return {largest, sum_of_lanes<32>(total)};
  }

  // Of a part's output in the whole's.
  __device__ __forceinline__ Accumulator weight(Accumulator lse) const {
    return exponential(lse - largest) / (total == 0 ? 1 : total);
  }

  __device__ __forceinline__ Accumulator lse() const {
    return total == 0 ? Accumulator(negative_infinity()) : largest + natural_log(total);
  }
};
