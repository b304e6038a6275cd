// Moving tiles between global and shared memory.
#pragma once

#include "tile.cuh"
#include "work.cuh"

// Starts copying rows [row_begin, row_begin + Tile::kRows) of a head into a tile; rows from num_rows on
// become zeros. All kNumThreads threads of the block take part, neighbours with neighbouring chunks, so a row
// is read in one piece.
//
// A thread copies the same chunk of every kRowStep-th row. That is a multiple of 8 rows, the period of the
// swizzle, so the thread's places in the tile are one address plus constants.
template <class Tile, int kNumThreads, class Rows>
__device__ __forceinline__ void load_tile(u32 tile_smem, const Rows& rows, int row_begin, int num_rows) {
  constexpr int kRowStep = kNumThreads / Tile::kChunksPerRow;
  static_assert(kNumThreads % Tile::kChunksPerRow == 0 && kRowStep % 8 == 0, "a thread keeps its chunk and swizzle");
  static_assert(Tile::kRows % kRowStep == 0, "every thread copies the same number of chunks");
  const int row = isa::thread_index() / Tile::kChunksPerRow;
  const int chunk = isa::thread_index() % Tile::kChunksPerRow;
  const u32 chunk_smem = Tile::chunk(tile_smem, row, chunk);
#pragma unroll
  for (int i = 0; i < Tile::kRows / kRowStep; ++i) {
    const bool exists = row_begin + row + i * kRowStep < num_rows;
    const u16* chunk_gmem = rows.row(row_begin + row + i * kRowStep) + chunk * Tile::kChunkElements;
    isa::cp_async_16(chunk_smem + static_cast<u32>(i * kRowStep * Tile::kRowBytes), chunk_gmem, exists ? 16 : 0);
  }
}

// Writes a warp's 16 rows of a tile to rows [row_begin, row_begin + 16) of a head; rows from num_rows on are
// left out.
template <class Tile, class Rows>
__device__ __forceinline__ void store_warp_rows(const Rows& rows, u32 tile_smem, int tile_row, int row_begin,
                                                int num_rows) {
  constexpr int kChunks = 16 * Tile::kChunksPerRow;
  const int lane = isa::lane_index();
#pragma unroll
  for (int i = 0; i < kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / Tile::kChunksPerRow;
    const int chunk = (i * 32 + lane) % Tile::kChunksPerRow;
    if (row_begin + row < num_rows) {
      const uint4 value = isa::ld_shared_16(Tile::chunk(tile_smem, tile_row + row, chunk));
      isa::stg_16(rows.row(row_begin + row) + chunk * Tile::kChunkElements, value);
    }
  }
}
