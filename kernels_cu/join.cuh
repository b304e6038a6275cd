// Joining attention over disjoint sets of keys by its log-sum-exps: Z. Ye et al. (2025), "FlashInfer", eq. 1 to 3.
//
//     m = max_i m_i,  l = sum_i exp(m_i - m) l_i                          where lse_i = m_i + ln l_i
//     out = sum_i (exp(m_i - m) l_i / l) out_i,  lse = m + ln l
//
// Where m_i is large ln l_i is lost in the sum, so those who have both keep them apart: all keys biased by the lowest
// float weigh alike, however many of them a part has. Of a log-sum-exp alone l_i is 1.
//
// A part without keys has l_i = 0 or lse_i = -inf and weighs nothing; without any part that has keys, out = 0 and
// lse = -inf. A NaN stays one. Sums are made in one order whatever runs when: results are repeatable to the bit.
#pragma once

#include "element.cuh"

// A sum of exponentials: total * exp(largest).
template <class Accumulator>
struct ExpSum {
  Accumulator largest;
  Accumulator total;

  // The same in every lane of a warp, which takes every 32nd part; `largest` is 0 rather than -inf. sum_of(part) reads
  // one, twice.
  template <class SumOf>
  static __device__ __forceinline__ ExpSum over(int num_parts, const SumOf& sum_of) {
    const int lane = isa::lane_index();
    ExpSum whole = {negative_infinity(), 0};
    for (int part = lane; part < num_parts; part += 32) whole.largest = larger(whole.largest, sum_of(part).largest);
    whole.largest = largest_of_lanes<32>(whole.largest);
    if (whole.largest == negative_infinity()) whole.largest = 0;  // lest it be subtracted from itself
    for (int part = lane; part < num_parts; part += 32) whole.total += whole.share(sum_of(part));
    whole.total = sum_of_lanes<32>(whole.total);
    return whole;
  }

  // What of `total` comes from a part.
  __device__ __forceinline__ Accumulator share(const ExpSum& part) const {
    return part.total * exponential(part.largest - largest);
  }

  // Of a part's output in the whole's.
  __device__ __forceinline__ Accumulator weight(const ExpSum& part) const {
    return share(part) / (total == 0 ? 1 : total);
  }

  __device__ __forceinline__ Accumulator lse() const {
    return total == 0 ? Accumulator(negative_infinity()) : largest + natural_log(total);
  }
};
