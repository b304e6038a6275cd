// Tiles in shared memory and fragments in registers: who is where.
#pragma once

#include "isa.cuh"

// A tile of kRows rows of kColumns 16-bit elements in shared memory, row-major, in chunks of 16 bytes. Chunk
// c of row r lies at place c ^ (r % 8) of its row (the low three bits are exchanged), because ldmatrix reads
// one chunk of eight consecutive rows, and rows are multiples of 128 bytes: unswizzled, those eight would all
// begin in bank 0.
//
//     row 0   0 1 2 3 4 5 6 7        row 2   2 3 0 1 6 7 4 5
//     row 1   1 0 3 2 5 4 7 6        row 3   3 2 1 0 7 6 5 4   ...
template <int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kChunkElements = 8;
  static constexpr int kChunksPerRow = kColumns / kChunkElements;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kRowBytes % 128 == 0, "a row is a multiple of 128 bytes, all 32 banks");
  static_assert(kRows % 8 == 0, "the swizzle repeats every 8 rows");

  static __device__ __forceinline__ u32 chunk(u32 tile_smem, int row, int chunk) {
    return tile_smem + static_cast<u32>(row * kRowBytes + ((chunk ^ (row % 8)) << 4));
  }
};

// The accumulators of mma_m16n8k16: lane l holds four of the 16 x 8 elements.
//
//                 column  2c      2c + 1          g = l / 4
//     row g             acc[0]    acc[1]          c = l % 4
//     row g + 8         acc[2]    acc[3]
__device__ __forceinline__ constexpr int acc_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
__device__ __forceinline__ constexpr int acc_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }
