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

// acc[16 x 8] += a[16 x 16] b[16 x 8]
template <class Config>
__device__ __forceinline__ void multiply(float (&acc)[4], const u32 (&a_frag)[4], u32 b0, u32 b1) {
  using Element = typename Config::Element;
  if constexpr (Config::kBaseline >= 80) {
    isa::mma_m16n8k16(Element(), acc, a_frag, b0, b1);
  } else {
    isa::mma_m16n8k8(Element(), acc, a_frag[0], a_frag[1], b0);
    isa::mma_m16n8k8(Element(), acc, a_frag[2], a_frag[3], b1);
  }
}

// A warp's 16 rows of Q as the left operand: in registers all the time or, where these are needed for O, read
// from shared memory whenever they are multiplied.
template <class Config, class QTile>
struct QRows {
  u32 q_smem;
  int row;
  u32 frag[Config::kQInRegisters ? Config::kHeadDim / 16 : 1][4];

  // Once Q has arrived.
  __device__ __forceinline__ void load() {
    if constexpr (Config::kQInRegisters) {
#pragma unroll
      for (int kk = 0; kk < Config::kHeadDim / 16; ++kk) load_a<QTile>(frag[kk], q_smem, row, kk);
    }
  }

  // Columns [16 kk, 16 kk + 16).
  __device__ __forceinline__ const u32 (&step(int kk))[4] {
    if constexpr (Config::kQInRegisters) {
      return frag[kk];
    } else {
      load_a<QTile>(frag[0], q_smem, row, kk);
      return frag[0];
    }
  }
};

// S = Q K^T  [16, kBlockN]
template <class Config, class QTile, class KTile>
__device__ __forceinline__ void multiply_q_k(float (&s_frag)[Config::kBlockN / 8][4], QRows<Config, QTile>& q,
                                             u32 k_smem) {
#pragma unroll
  for (int n = 0; n < Config::kBlockN / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s_frag[n][i] = 0.0f;
  }
#pragma unroll
  for (int kk = 0; kk < Config::kHeadDim / 16; ++kk) {
    const u32(&q_frag)[4] = q.step(kk);
#pragma unroll
    for (int nn = 0; nn < Config::kBlockN / 16; ++nn) {
      u32 k_frag[4];
      load_b<KTile>(k_frag, k_smem, 16 * nn, kk);
      multiply<Config>(s_frag[2 * nn], q_frag, k_frag[0], k_frag[1]);
      multiply<Config>(s_frag[2 * nn + 1], q_frag, k_frag[2], k_frag[3]);
    }
  }
}

// O += P V  [16, kHeadDimV]. P is rounded to the elements' format; its accumulators, packed, are the left
// operand.
template <class Config, class VTile>
__device__ __forceinline__ void accumulate_p_v(float (&o_frag)[Config::kHeadDimV / 8][4],
                                               const float (&p_frag)[Config::kBlockN / 8][4], u32 v_smem) {
#pragma unroll
  for (int kk = 0; kk < Config::kBlockN / 16; ++kk) {
    const u32 a_frag[4] = {pack_pair<Config>(p_frag[2 * kk][0], p_frag[2 * kk][1]),
                           pack_pair<Config>(p_frag[2 * kk][2], p_frag[2 * kk][3]),
                           pack_pair<Config>(p_frag[2 * kk + 1][0], p_frag[2 * kk + 1][1]),
                           pack_pair<Config>(p_frag[2 * kk + 1][2], p_frag[2 * kk + 1][3])};
#pragma unroll
    for (int nn = 0; nn < Config::kHeadDimV / 16; ++nn) {
      u32 v_frag[4];
      load_b_trans<VTile>(v_frag, v_smem, kk, nn);
      multiply<Config>(o_frag[2 * nn], a_frag, v_frag[0], v_frag[1]);
      multiply<Config>(o_frag[2 * nn + 1], a_frag, v_frag[2], v_frag[3]);
    }
  }
}
