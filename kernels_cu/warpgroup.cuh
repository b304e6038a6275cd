// Tiles as bulk copies leave them and wgmma reads them, and the two products of attention for a warpgroup's 64 rows.
#pragma once

#include "copy.cuh"
#include "descriptor.cuh"

// A tile of kRows rows of kColumns 16-bit elements in shared memory, in panels of 64 columns, or of 32 where 64 do not
// divide the columns. A panel is what one bulk copy moves: all the rows, one behind the other, 128 or 64 bytes each.
// Within eight lines of 128 bytes the copy exchanges chunks of 16 bytes, so that whichever way a matrix is read its
// chunks lie in different banks: of a line's eight chunks, or of a half line's four, chunk c of line n lies at
// c ^ (n % 8), at c ^ (n % 4).
//
//     64 columns, a line is a row:            32 columns, a line is two rows:
//       row 0   0 1 2 3 4 5 6 7                 rows 0, 1   0 1 2 3  0 1 2 3
//       row 1   1 0 3 2 5 4 7 6                 rows 2, 3   1 0 3 2  1 0 3 2
//       row 2   2 3 0 1 6 7 4 5   ...           rows 4, 5   2 3 0 1  2 3 0 1   ...
//
// The tensor map says the same to the copy (build/bulk.py), the descriptor to wgmma.
template <int kRows_, int kColumns_>
struct PanelTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kChunkElements = 8;
  static constexpr int kChunksPerRow = kColumns / kChunkElements;
  static constexpr int kPanelColumns = kColumns % 64 == 0 ? 64 : 32;
  static constexpr int kPanelChunks = kPanelColumns / kChunkElements;
  static constexpr int kPanels = kColumns / kPanelColumns;
  static constexpr int kRowBytes = 2 * kPanelColumns;  // of one panel
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static constexpr int kPatternBytes = 8 * kRowBytes;
  static constexpr OperandSwizzle kSwizzle = kRowBytes == 128 ? OperandSwizzle::k128 : OperandSwizzle::k64;
  static_assert(kColumns % 32 == 0, "a row is whole panels");
  static_assert(kBytes % 1024 == 0, "the next tile begins where a pattern may");

  static __device__ __forceinline__ u32 chunk(u32 tile_smem, int row, int chunk) {
    const int line = kRowBytes == 128 ? row % 8 : row / 2 % 4;
    const int place = chunk % kPanelChunks ^ line;
    return tile_smem + static_cast<u32>(chunk / kPanelChunks * kPanelBytes + row * kRowBytes + 16 * place);
  }

  // The tile's rows as those of the left operand or as columns of the right one: the descriptor of columns 0 to 15, and
  // what leads from it to columns [16 kk, 16 kk + 16).
  static __device__ __forceinline__ u64 operand(u32 tile_smem) {
    return matrix_descriptor(tile_smem, 0, kPatternBytes, kSwizzle);
  }
  static __device__ __forceinline__ constexpr u64 operand_step(int kk) {
    return static_cast<u64>(16 * kk / kPanelColumns * kPanelBytes + 2 * (16 * kk % kPanelColumns)) >> 4;
  }

  // From a descriptor of the first of several tiles, one behind the other, to that of the n-th.
  static __device__ __forceinline__ u64 nth(u64 first, int n) {
    return first + static_cast<u64>(static_cast<u32>(n * (kBytes >> 4)));
  }

  // The tile's rows as those of the right operand: rows 0 to 15, all columns; and from there to rows [16 kk, 16 kk + 16).
  static __device__ __forceinline__ u64 operand_trans(u32 tile_smem) {
    return matrix_descriptor(tile_smem, kPanelBytes, kPatternBytes, kSwizzle);
  }
  static __device__ __forceinline__ constexpr u64 operand_trans_step(int kk) {
    return static_cast<u64>(16 * kk * kRowBytes) >> 4;
  }
};

// Which matrix of an array (*batch, head, row, element) the copies of a block are of. Where an array repeats its
// elements, its map has them once.
struct BulkPlace {
  int head;
  int batch;

  static __device__ __forceinline__ BulkPlace of(const Tensor& tensor, int head, int batch) {
    bool has_batches = false;
    // A loop is not computed once for all items and kept, as its steps would be: there are no registers for them.
#pragma unroll 1
    for (int axis = 0; axis < kBatchAxes; ++axis) has_batches = has_batches || tensor.batch_strides[axis] != 0;
    return {tensor.head_stride != 0 ? head : 0, has_batches ? batch : 0};
  }
};

// Starts copying rows [row, row + kRows) of an array. Rows and columns that do not exist become zeros. One thread; the
// barrier has been told of Tile::kBytes.
template <class Tile>
__device__ __forceinline__ void load_panels(u32 tile_smem, const TensorMap& map, const BulkPlace& place, int row,
                                            u32 barrier, u64 l2_policy) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    const u32 panel_smem = tile_smem + static_cast<u32>(panel * Tile::kPanelBytes);
    isa::bulk_load(panel_smem, &map, barrier, l2_policy, panel * Tile::kPanelColumns, row, place.head, place.batch);
  }
}

// Copies rows [row_begin, row_begin + kRows) into a tile for wgmma, without a map: all 128 threads of a warpgroup, each
// of which calls fence_proxy_async when its copies have arrived. Columns that do not exist become zeros; in place of rows
// that do not there is the last one, once more.
template <class Tile, class Rows>
__device__ __forceinline__ void copy_panels(u32 tile_smem, const Rows& rows, int row_begin, int num_rows,
                                            int num_columns) {
  constexpr int kChunks = Tile::kRows * Tile::kChunksPerRow;
  static_assert(kChunks % 128 == 0, "every thread copies the same number of chunks");
#pragma unroll 1
  for (int i = isa::thread_index() % 128; i < kChunks; i += 128) {
    // Panel by panel, so that neighbours write to neighbouring banks.
    const int row = i / Tile::kPanelChunks % Tile::kRows;
    const int chunk = i / (Tile::kPanelChunks * Tile::kRows) * Tile::kPanelChunks + i % Tile::kPanelChunks;
    const int column = chunk * Tile::kChunkElements;
    const int bytes = at_least(at_most(2 * (num_columns - column), 16), 0);
    const u16* source = rows.row(at_most(row_begin + row, num_rows - 1)) + column;
    isa::cp_async_16(Tile::chunk(tile_smem, row, chunk), source, static_cast<u32>(bytes));
  }
}

// The accumulators of a warp's 16 rows, tile by tile of 16 x 8 (acc_row, acc_column), are those of its part of a
// wgmma, one behind the other.
template <int kTiles>
__device__ __forceinline__ float (&accumulators(float (&frag)[kTiles][4]))[4 * kTiles] {
  return reinterpret_cast<float (&)[4 * kTiles]>(frag);
}

// S = Q K^T  [64, 8 kScoreTiles]: issued, to be committed and waited for.
template <class Config, class QTile, class KTile, int kScoreTiles>
__device__ __forceinline__ void start_q_k(float (&s_frag)[kScoreTiles][4], u64 q, u64 k) {
#pragma unroll
  for (int kk = 0; kk < Config::kHeadDim / 16; ++kk) {
    isa::wgmma_ss<0, 0>(typename Config::Element(), accumulators(s_frag), q + QTile::operand_step(kk),
                        k + KTile::operand_step(kk), kk > 0);
  }
}

// O += P V  [64, kHeadDimV], over a tile's first kKeys keys: issued, to be committed and waited for; until then P stays
// as it is.
template <class Config, class VTile, int kKeys>
__device__ __forceinline__ void start_p_v(float (&o_frag)[Config::kHeadDimV / 8][4],
                                          const u32 (&p_frag)[Config::kBlockN / 16][4], u64 v) {
#pragma unroll
  for (int kk = 0; kk < kKeys / 16; ++kk) {
    isa::wgmma_rs<1>(typename Config::Element(), accumulators(o_frag), p_frag[kk], v + VTile::operand_trans_step(kk),
                     true);
  }
}

// A warp's 16 rows of O, rounded, through its own rows of a tile in shared memory, by bulk copies: to rows [row, row +
// 16) of the map's array, but for what does not exist there. Nobody else may be using those rows of the tile.
template <class Config, class Tile>
__device__ __forceinline__ void store_out_panels(const TensorMap& map, const BulkPlace& place, int row, u32 tile_smem,
                                                 int tile_row, const float (&o_frag)[Config::kHeadDimV / 8][4]) {
  const int lane = isa::lane_index();
#pragma unroll
  for (int nn = 0; nn < Config::kHeadDimV / 16; ++nn) {
    u32 frag[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = o_frag[2 * nn + i / 2];
      frag[i] = pack_pair<Config>(pair[2 * (i % 2)], pair[2 * (i % 2) + 1]);
    }
    isa::stmatrix_x4(Tile::chunk(tile_smem, tile_row + lane % 16, 2 * nn + lane / 16), frag);
  }
  isa::fence_proxy_async();  // what this lane has written, to be read by a bulk copy,
  isa::sync_warp();          // and what the warp's others have
  if (isa::elect_one()) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const u32 rows_smem = tile_smem + static_cast<u32>(panel * Tile::kPanelBytes + tile_row * Tile::kRowBytes);
      isa::bulk_store(&map, rows_smem, panel * Tile::kPanelColumns, row, place.head, place.batch);
    }
    isa::bulk_commit();
    isa::bulk_wait_read<0>();  // others write there again, or shared memory ends with the block
  }
}

// P, rounded to the elements' format, as the left operand: its accumulators, packed, or the first of them.
template <class Config, int kScoreTiles>
__device__ __forceinline__ void pack_weights(u32 (&p_frag)[Config::kBlockN / 16][4],
                                             const float (&s_frag)[kScoreTiles][4]) {
#pragma unroll
  for (int kk = 0; kk < kScoreTiles / 2; ++kk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = s_frag[2 * kk + i / 2];
      p_frag[kk][i] = pack_pair<Config>(pair[2 * (i % 2)], pair[2 * (i % 2) + 1]);
    }
  }
}
