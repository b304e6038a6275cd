// The end of a forward pass: O / l and the log-sum-exp. FlashAttention-2, Algorithm 1, lines 12 and 13.
#pragma once

#include "copy.cuh"
#include "score.cuh"
#include "softmax.cuh"

// Divides O by the row sums, which it adds up over the lanes of a row, and gives the rows' log-sum-exps. The maximum is
// that of raw scores, or of what came of them if Config::kScaleFirst; afterwards it is scaled.
template <class Config, int kOutTiles>
__device__ __forceinline__ void normalize(float (&o_frag)[kOutTiles][4], float (&lse)[2], RowState& state,
                                          const FwdParams& params, const FwdWork& work, int row_begin) {
  const int lane = isa::lane_index();
  const float max_scale = Config::kScaleFirst ? 1.0f : static_cast<float>(params.scale);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.row_sum[half] = sum_of_lanes<4>(state.row_sum[half]);
    state.row_max[half] *= max_scale;
    const int head = work.head_of<Config>(params, row_begin + acc_row(lane, 2 * half));
    const auto end = end_row<Config>(state.row_max[half], state.row_sum[half], params, head, params.num_splits > 1);
    lse[half] = end.lse;
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
      o_frag[n][2 * half] *= end.factor;
      o_frag[n][2 * half + 1] *= end.factor;
    }
  }
}

template <class Config>
__device__ __forceinline__ void store_lse(const FwdParams& params, const FwdWork& work, const float (&lse)[2],
                                          int row_begin) {
  const int lane = isa::lane_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_begin + acc_row(lane, 2 * half);
    // One of the row's four lanes writes.
    if (lane % 4 == 0 && row < FwdWork::num_rows<Config>(params)) {
      isa::stg_4(static_cast<float*>(params.lse) + work.place_of<Config>(params, row), isa::float_bits(lse[half]));
    }
  }
}

// The warp's rows of O, rounded, through its own rows of a tile in shared memory, so that they leave in
// pieces of 16 bytes. Nobody else may be using those rows of the tile.
template <class Config, class Tile, class Rows>
__device__ __forceinline__ void store_out(const Rows& out, u32 tile_smem,
                                          const float (&o_frag)[Config::kHeadDimV / 8][4], int tile_row, int row_begin,
                                          int num_rows, int num_columns) {
  const int lane = isa::lane_index();
#pragma unroll
  for (int n = 0; n < Config::kHeadDimV / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 chunk_smem = Tile::chunk(tile_smem, tile_row + acc_row(lane, 2 * half), n);
      const u32 pair = pack_pair<Config>(o_frag[n][2 * half], o_frag[n][2 * half + 1]);
      isa::st_shared_4(chunk_smem + 2 * acc_column(lane, 0), pair);
    }
  }
  isa::sync_warp();  // the warp's other lanes have written what this one reads
  store_warp_rows<Tile>(out, tile_smem, tile_row, row_begin, num_rows, num_columns);
}

// The warp's rows of a split: O as it is in the registers, and the two halves of the log-sum-exps.
template <class Config>
__device__ __forceinline__ void store_part(const FwdParams& params, const FwdWork& work,
                                           const float (&o_frag)[Config::kHeadDimV / 8][4], const RowState& state,
                                           int row_begin) {
  const int lane = isa::lane_index();
  const bool rows_are_even = params.head_dim_v % 2 == 0;  // so that pairs lie at multiples of 8 bytes
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_begin + acc_row(lane, 2 * half);
    if (row >= FwdWork::num_rows<Config>(params)) continue;
    const long long place = work.place_of<Config>(params, row);
    if (lane % 4 == 0) {
      const uint2 sums = {isa::float_bits(state.row_max[half]), isa::float_bits(state.row_sum[half])};
      isa::stg_8(static_cast<float*>(params.partial_lse) + 2 * place, sums);
    }
    float* row_gmem = static_cast<float*>(params.partial_out) + place * params.head_dim_v;
#pragma unroll
    for (int n = 0; n < Config::kHeadDimV / 8; ++n) {
      const int column = 8 * n + acc_column(lane, 0);
      const uint2 pair = {isa::float_bits(o_frag[n][2 * half]), isa::float_bits(o_frag[n][2 * half + 1])};
      if (rows_are_even) {
        if (column < params.head_dim_v) isa::stg_8(row_gmem + column, pair);
      } else {
        if (column < params.head_dim_v) isa::stg_4(row_gmem + column, pair.x);
        if (column + 1 < params.head_dim_v) isa::stg_4(row_gmem + column + 1, pair.y);
      }
    }
  }
}
