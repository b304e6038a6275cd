// Which keys take part: the ends of the sequence and the band  lower <= j - i <= upper  of query i and key j.
//
// A causal mask is the band upper = shift, a sliding window both bounds, no mask neither; the alignment of
// unequal lengths is in the shift. Config says which bounds exist, params what they are.
#pragma once

#include "tile.cuh"
#include "work.cuh"

// The tiles of kBlockN keys that a block meets.
//
//     keys      begin     full_begin        full_end     end
//       . . . . | x x x x | # # # # # # # # | x x x x x | . . . .
//
// Outside [begin, end) no key takes part for any of the tile's queries; in [full_begin, full_end) all do for
// all. What lies between needs the mask. All numbers count tiles.
//
struct KeyTiles {
  int begin;
  int end;
  int full_begin;
  int full_end;

  // One of so many equal shares of [begin, end), the last ones shorter or empty.
  __device__ __forceinline__ KeyTiles share(int index, int num_shares) const {
    // num_shares shares are fewer than num_shares tiles more than there are: no product overflows.
    const int length = (end - begin + num_shares - 1) / num_shares;
    const int first = at_most(begin + index * length, end);
    return {first, at_most(first + length, end), full_begin, full_end};
  }
};

// From this key on none takes part for a query; it may be less than 0.
template <class Config>
__device__ __forceinline__ int key_end(const FwdParams& params, int query) {
  if constexpr (Config::kHasUpper) return at_most(params.seqlen_k, query + params.upper + 1);
  return params.seqlen_k;
}

template <class Config>
__device__ __forceinline__ KeyTiles key_tiles(const FwdParams& params, const FwdWork& work) {
  constexpr int kN = Config::kBlockN;
  const int row_end = at_most(work.row_begin + Config::kBlockM, FwdWork::num_rows<Config>(params));
  const int first_query = FwdWork::query_of<Config>(params, work.row_begin);
  const int last_query = FwdWork::query_of<Config>(params, row_end - 1);
  const int end = at_least(key_end<Config>(params, last_query), 0);
  const int full_end = at_least(key_end<Config>(params, first_query), 0);
  int begin = 0;
  int full_begin = 0;
  if constexpr (Config::kHasLower) {
    begin = at_least(first_query + params.lower, 0);
    full_begin = at_least(last_query + params.lower, 0);
  }
  if (begin >= end) return {0, 0, 0, 0};
  return {begin / kN, (end + kN - 1) / kN, (full_begin + kN - 1) / kN, full_end / kN};
}

// Sets the scores of keys that do not take part to -inf. first_row and first_key are those of s_frag's
// element (0, 0). Each of a lane's two rows has, by its query, a first key and an end, counted from the lane's first
// column, so that an element's test compares two registers with a constant.
template <class Config, int kScoreTiles>
__device__ __forceinline__ void mask_scores(float (&s_frag)[kScoreTiles][4], const FwdParams& params, int first_row,
                                            int first_key) {
  const int lane = isa::lane_index();
  const int first_column = first_key + acc_column(lane, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = FwdWork::query_of<Config>(params, first_row + acc_row(lane, 2 * half));
    const int end = key_end<Config>(params, query);
    int begin = 0;
    if constexpr (Config::kHasLower) begin = query + params.lower;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
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
