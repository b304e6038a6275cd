// Moving tiles between global and shared memory.
#pragma once

#include "tile.cuh"
#include "work.cuh"

// The first `bytes` bytes of a chunk in global memory, zeros after them. The rest is not read: behind a row's last
// element may lie the end of the array.
__device__ __forceinline__ uint4 load_chunk(const u16* chunk_gmem, u32 bytes) {
  if (bytes == 16) return isa::ldg_16(chunk_gmem);
  u32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (bytes >= 4 * i + 4) {
      words[i] = isa::ldg_4(chunk_gmem + 2 * i);
    } else if (bytes == 4 * i + 2) {
      words[i] = isa::ldg_2(chunk_gmem + 2 * i);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Copies rows [row_begin, row_begin + Tile::kRows) into a tile; rows from num_rows on and columns from num_columns
// on become zeros. All threads of the block take part, neighbours with neighbouring chunks, so a row is read in
// one piece.
//
// With cp.async the copies are only started. GPUs that lack it copy at once, through registers.
//
// A thread copies the same chunk of every panel of every kRowStep-th row. That is a multiple of 8 rows, the
// period of the swizzle, so the thread's places in the tile are one address plus constants.
template <class Config, class Tile, class Rows>
__device__ __forceinline__ void load_tile(u32 tile_smem, const Rows& rows, int row_begin, int num_rows,
                                          int num_columns) {
  constexpr int kNumThreads = 32 * Config::kNumWarps;
  constexpr int kRowStep = kNumThreads / Tile::kPanelChunks;
  constexpr int kPasses = Tile::kRows / kRowStep;
  constexpr int kPanels = Tile::kChunksPerRow / Tile::kPanelChunks;
  static_assert(kRowStep % 8 == 0, "a thread keeps its chunk and swizzle");
  static_assert(Tile::kRows % kRowStep == 0, "every thread copies the same number of chunks");
  const int row = isa::thread_index() / Tile::kPanelChunks;
  const int chunk = isa::thread_index() % Tile::kPanelChunks;
  const u32 chunk_smem = Tile::chunk(tile_smem, row, chunk);
  u32 panel_bytes[kPanels];
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const int column = (panel * Tile::kPanelChunks + chunk) * Tile::kChunkElements;
    panel_bytes[panel] = static_cast<u32>(at_least(at_most(2 * (num_columns - column), 16), 0));
  }
  const u16* chunk_gmem = rows.row(row_begin + row) + chunk * Tile::kChunkElements;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const bool exists = row_begin + row + i * kRowStep < num_rows;
    uint4 values[kPanels];
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const u32 bytes = exists ? panel_bytes[panel] : 0;
      const u16* source = chunk_gmem + panel * Tile::kPanelChunks * Tile::kChunkElements;
      const u32 place = static_cast<u32>(i * kRowStep * Tile::kRowBytes + panel * Tile::kPanelChunks * 16);
      if constexpr (Config::kBaseline >= 80) {
        isa::cp_async_16(chunk_smem + place, source, bytes);
      } else {
        values[panel] = load_chunk(source, bytes);
      }
    }
    if constexpr (Config::kBaseline < 80) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const u32 place = static_cast<u32>(i * kRowStep * Tile::kRowBytes + panel * Tile::kPanelChunks * 16);
        isa::st_shared_16(chunk_smem + place, values[panel]);
      }
    }
    chunk_gmem = rows.advance(chunk_gmem, row_begin + row + i * kRowStep, kRowStep);
  }
}

// Writes a warp's 16 rows of a tile to rows [row_begin, row_begin + 16); rows from num_rows on and columns from
// num_columns on are left out.
template <class Tile, class Rows>
__device__ __forceinline__ void store_warp_rows(const Rows& rows, u32 tile_smem, int tile_row, int row_begin,
                                                int num_rows, int num_columns) {
  constexpr int kChunks = 16 * Tile::kChunksPerRow;
  const int lane = isa::lane_index();
  const int whole_chunks = num_columns / Tile::kChunkElements;
#pragma unroll
  for (int i = 0; i < kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / Tile::kChunksPerRow;
    const int chunk = (i * 32 + lane) % Tile::kChunksPerRow;
    if (row_begin + row < num_rows && chunk < whole_chunks) {
      const uint4 value = isa::ld_shared_16(Tile::chunk(tile_smem, tile_row + row, chunk));
      isa::stg_16(rows.row(row_begin + row) + chunk * Tile::kChunkElements, value);
    }
  }
  // What is left of each row, less than a chunk: two lanes share it, pair by pair.
  const int row = lane % 16;
  if (row_begin + row >= num_rows) return;
  const u32 chunk_smem = Tile::chunk(tile_smem, tile_row + row, whole_chunks);
  u16* chunk_gmem = rows.row(row_begin + row) + whole_chunks * Tile::kChunkElements;
  const int rest = num_columns % Tile::kChunkElements;
#pragma unroll 1
  for (int column = 2 * (lane / 16); column < rest; column += 4) {
    const u32 pair = isa::ld_shared_4(chunk_smem + 2 * column);
    if (column + 1 < rest) {
      isa::stg_4(chunk_gmem + column, pair);
    } else {
      isa::stg_2(chunk_gmem + column, pair);
    }
  }
}
