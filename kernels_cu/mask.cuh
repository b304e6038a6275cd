// Which keys take part: the ends of the sequence and the band  lower <= j - i <= upper  of query i and key j.
//
// A causal mask is the band upper = shift, a sliding window both bounds, no mask neither; the alignment of
// unequal lengths is in the shift. Config says which bounds exist, params what they are.
#pragma once

#include "params.cuh"
#include "tile.cuh"

// The tiles of kBlockN keys that one tile of queries meets.
//
//     keys      begin     full_begin        full_end     end
//       . . . . | x x x x | # # # # # # # # | x x x x x | . . . .
//
// Outside [begin, end) no key takes part for any of the queries; in [full_begin, full_end) all do for all.
// What lies between needs the mask. All numbers count tiles.
struct KeyTiles {
  int begin;
  int end;
  int full_begin;
  int full_end;
};

__device__ __forceinline__ int at_least(int value, int bound) { return value < bound ? bound : value; }
__device__ __forceinline__ int at_most(int value, int bound) { return value > bound ? bound : value; }

template <class Config>
__device__ __forceinline__ KeyTiles key_tiles(const FwdParams& params, int row_begin) {
  constexpr int kN = Config::kBlockN;
  const int last_row = at_most(row_begin + Config::kBlockM, params.seqlen_q) - 1;
  int key_begin = 0;
  int key_end = params.seqlen_k;
  int full_begin = 0;
  int full_end = params.seqlen_k;
  if constexpr (Config::kHasUpper) {
    key_end = at_least(at_most(key_end, last_row + params.upper + 1), 0);
    full_end = at_least(at_most(full_end, row_begin + params.upper + 1), 0);
  }
  if constexpr (Config::kHasLower) {
    key_begin = at_least(row_begin + params.lower, 0);
    full_begin = at_least(last_row + params.lower, 0);
  }
  if (key_begin >= key_end) return {0, 0, 0, 0};
  return {key_begin / kN, (key_end + kN - 1) / kN, (full_begin + kN - 1) / kN, full_end / kN};
}

// Sets the scores of keys that do not take part to -inf. first_row and first_key are those of s_frag's
// element (0, 0). Each of a lane's two rows has a first key and an end, counted from the lane's first column, so
// that an element's test compares two registers with a constant.
template <class Config>
__device__ __forceinline__ void mask_scores(float (&s_frag)[Config::kBlockN / 8][4], const FwdParams& params,
                                            int first_row, int first_key) {
  const int lane = isa::lane_index();
  const int first_column = first_key + acc_column(lane, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + acc_row(lane, 2 * half);
    int begin = 0;
    int end = params.seqlen_k;
    if constexpr (Config::kHasLower) begin = row + params.lower;
    if constexpr (Config::kHasUpper) end = at_most(end, row + params.upper + 1);
#pragma unroll
    for (int n = 0; n < Config::kBlockN / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const int column = 8 * n + i % 2;
        bool takes_part = column < end - first_column;
        if constexpr (Config::kHasLower) takes_part = takes_part && column >= begin - first_column;
        if (!takes_part) s_frag[n][i] = isa::bits_float(kNegativeInfinityBits);
      }
    }
  }
}
