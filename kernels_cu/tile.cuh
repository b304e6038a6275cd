// Tiles in shared memory and fragments in registers: who is where.
#pragma once

#include "isa.cuh"

// A tile of kRows rows of kColumns 16-bit elements in shared memory, row-major, in chunks of 16 bytes. ldmatrix
// reads one chunk of eight consecutive rows: these have to lie in different banks, that is, in different eighths
// of a line of 128 bytes. So the chunks of a row are exchanged, depending on the row, within panels.
//
// Rows of whole lines would all begin in bank 0: panels are of 8 chunks, chunk c of row r lies at c ^ (r % 8).
//
//     row 0   0 1 2 3 4 5 6 7        row 2   2 3 0 1 6 7 4 5
//     row 1   1 0 3 2 5 4 7 6        row 3   3 2 1 0 7 6 5 4   ...
//
// Rows that end in the middle of a line (kColumns = 32, 96, ...) begin in bank 0 and bank 16 in turn: panels are
// of 4 chunks, chunk c of row r lies at c ^ (r / 2 % 4).
//
//     row 0   0 1 2 3                row 4           2 3 0 1
//     row 1           0 1 2 3        row 5                   2 3 0 1
//     row 2   1 0 3 2                row 6           3 2 1 0
//     row 3           1 0 3 2        row 7                   3 2 1 0
template <int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kChunkElements = 8;
  static constexpr int kChunksPerRow = kColumns / kChunkElements;
  static constexpr int kPanelChunks = kColumns % 64 == 0 ? 8 : 4;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kColumns % 32 == 0, "a row is a multiple of 64 bytes, 16 banks");
  static_assert(kRows % 8 == 0, "the swizzle repeats every 8 rows");

  static __device__ __forceinline__ int swizzle(int row) { return kPanelChunks == 8 ? row % 8 : row / 2 % 4; }

  static __device__ __forceinline__ u32 chunk(u32 tile_smem, int row, int chunk) {
    const int panel = chunk / kPanelChunks;
    const int place = chunk % kPanelChunks ^ swizzle(row);
    return tile_smem + static_cast<u32>(row * kRowBytes + 16 * (panel * kPanelChunks + place));
  }
};

// The accumulators of mma_m16n8k16: lane l holds four of the 16 x 8 elements.
//
//                 column  2c      2c + 1          g = l / 4
//     row g             acc[0]    acc[1]          c = l % 4
//     row g + 8         acc[2]    acc[3]
__device__ __forceinline__ constexpr int acc_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
__device__ __forceinline__ constexpr int acc_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// Two elements, rounded. Config::kBaseline says what the GPU has.
template <class Config>
__device__ __forceinline__ u32 pack_pair(float lower, float upper) {
  if constexpr (Config::kBaseline >= 80) {
    return isa::pack(typename Config::Element(), lower, upper);
  } else {
    return isa::pack_f16x2_sm75(lower, upper);
  }
}
