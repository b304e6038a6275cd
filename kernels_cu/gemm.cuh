// The two products of attention, for one warp's 16 rows.
//
// ldmatrix_x4 hands out four 8 x 8 matrices; which lane gives which row's address decides what they are:
//
//     A, 16 x 16 (load_a)          B, two n8 x k16 (load_b)        B, k16 x two n8, transposed (load_b_trans)
//       k 0-7    k 8-15              k 0-7    k 8-15                  n 0-7    n 8-15
//     m 0-7   [0]     [2]          n 0-7   [0]     [1]             k 0-7   [0]     [2]
//     m 8-15  [1]     [3]          n 8-15  [2]     [3]             k 8-15  [1]     [3]
#pragma once

#include "tile.cuh"

// Rows [row, row + 16), columns [16 kk, 16 kk + 16) of a tile, as the left operand.
template <class Tile>
__device__ __forceinline__ void load_a(u32 (&a_frag)[4], u32 tile_smem, int row, int kk) {
  const int lane = isa::lane_index();
  isa::ldmatrix_x4(a_frag, Tile::chunk(tile_smem, row + lane % 16, 2 * kk + lane / 16));
}

// The tile's rows are the right operand's columns: rows [row, row + 16), columns [16 kk, 16 kk + 16).
template <class Tile>
__device__ __forceinline__ void load_b(u32 (&b_frag)[4], u32 tile_smem, int row, int kk) {
  const int lane = isa::lane_index();
  isa::ldmatrix_x4(b_frag, Tile::chunk(tile_smem, row + 8 * (lane / 16) + lane % 8, 2 * kk + lane / 8 % 2));
}

// The tile's rows are the right operand's rows: rows [16 kk, 16 kk + 16), columns [16 nn, 16 nn + 16).
template <class Tile>
__device__ __forceinline__ void load_b_trans(u32 (&b_frag)[4], u32 tile_smem, int kk, int nn) {
  const int lane = isa::lane_index();
  isa::ldmatrix_x4_trans(b_frag, Tile::chunk(tile_smem, 16 * kk + lane % 16, 2 * nn + lane / 16));
}

// S = Q K^T  [16, kBlockN]
template <class Config, class KTile>
__device__ __forceinline__ void multiply_q_k(float (&s_frag)[Config::kBlockN / 8][4],
                                             const u32 (&q_frag)[Config::kHeadDim / 16][4], u32 k_smem) {
#pragma unroll
  for (int n = 0; n < Config::kBlockN / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s_frag[n][i] = 0.0f;
  }
#pragma unroll
  for (int kk = 0; kk < Config::kHeadDim / 16; ++kk) {
#pragma unroll
    for (int nn = 0; nn < Config::kBlockN / 16; ++nn) {
      u32 k_frag[4];
      load_b<KTile>(k_frag, k_smem, 16 * nn, kk);
      isa::mma_m16n8k16(typename Config::Element(), s_frag[2 * nn], q_frag[kk], k_frag[0], k_frag[1]);
      isa::mma_m16n8k16(typename Config::Element(), s_frag[2 * nn + 1], q_frag[kk], k_frag[2], k_frag[3]);
    }
  }
}

// O += P V  [16, kHeadDim]. P is rounded to the elements' format; its accumulators, packed, are the left
// operand.
template <class Config, class VTile>
__device__ __forceinline__ void accumulate_p_v(float (&o_frag)[Config::kHeadDim / 8][4],
                                               const float (&p_frag)[Config::kBlockN / 8][4], u32 v_smem) {
  using Element = typename Config::Element;
#pragma unroll
  for (int kk = 0; kk < Config::kBlockN / 16; ++kk) {
    const u32 a_frag[4] = {isa::pack(Element(), p_frag[2 * kk][0], p_frag[2 * kk][1]),
                           isa::pack(Element(), p_frag[2 * kk][2], p_frag[2 * kk][3]),
                           isa::pack(Element(), p_frag[2 * kk + 1][0], p_frag[2 * kk + 1][1]),
                           isa::pack(Element(), p_frag[2 * kk + 1][2], p_frag[2 * kk + 1][3])};
#pragma unroll
    for (int nn = 0; nn < Config::kHeadDim / 16; ++nn) {
      u32 v_frag[4];
      load_b_trans<VTile>(v_frag, v_smem, kk, nn);
      isa::mma_m16n8k16(Element(), o_frag[2 * nn], a_frag, v_frag[0], v_frag[1]);
      isa::mma_m16n8k16(Element(), o_frag[2 * nn + 1], a_frag, v_frag[2], v_frag[3]);
    }
  }
}
