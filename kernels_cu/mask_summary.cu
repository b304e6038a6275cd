// Tells for each tile of a bool mask what a kernel need not look at: one byte for kBlockM queries by kBlockN keys.
//
//     0  no key of the tile takes part for any of its queries: not visited
//     1  some do: the mask is read
//     2  all do: visited without the mask
//
//     mask                     summary, tiles of 2 x 4
//     1 1 1 1  0 0 0 0  1 0
//     1 1 1 1  0 0 0 0  1 1         2 0 1           What lies beyond the mask's ends does not count: a tile that is
//     0 0 0 0  1 1 1 1  1 1         1 2 2           true wherever it exists is 2.
//     0 1 0 0  1 1 1 1  1 1
//
// A mask that broadcasts along an axis has one entry there, and so has its summary: it is read once, not once for
// every head, say. Its tiles are not known until run time, since forward kernels differ in theirs.
//
// One warp looks at one tile. Its lanes stand side by side along the columns, which are queries or keys, whichever
// lie closer in memory, and read words of four columns where these are aligned:
//
//     a tile of 16 columns, in words     row 0   lane 0    1    2    3       A step: kRows words for each lane. Then
//                                        row 1        4    5    6    7       the warp votes, and stops if it has seen
//                                        ..                                  both a true and a false.
//                                        row 8        0    1    2    3
//
// Shared memory: none. Registers: kRows words under way. Events: the votes, which all lanes of the warp reach
// together, since the loops' bounds are the tile's; there are no barriers.
//
// The mask's bytes are NumPy's: 0 is false, anything else is true.
#include "isa.cuh"
#include "params.cuh"

struct Traits {
  static constexpr int kNumThreads = 32 * Config::kTilesPerBlock;
  static constexpr int kRows = 8;
};

using Byte = unsigned char;

// A tile: where it begins, and what of it exists.
struct MaskTile {
  const Byte* data;
  int num_rows;
  int num_columns;

  // Tiles are counted in C order: batch, heads, tiles of rows, tiles of columns.
  static __device__ __forceinline__ MaskTile of(const SummaryParams& params, long long tile) {
    const Mask& mask = params.mask;
    const int row_tiles = (params.num_rows + params.block_rows - 1) / params.block_rows;
    const int column_tiles = (params.num_columns + params.block_columns - 1) / params.block_columns;
    const int column = static_cast<int>(tile % column_tiles) * params.block_columns;
    tile /= column_tiles;
    const int row = static_cast<int>(tile % row_tiles) * params.block_rows;
    tile /= row_tiles;
    long long offset = row * mask.row_stride + column * mask.column_stride;
    offset += tile % params.num_heads * mask.head_stride;
    tile /= params.num_heads;
#pragma unroll
    for (int axis = kBatchAxes - 1; axis >= 0; --axis) {
      offset += tile % params.batch_shape[axis] * mask.batch_strides[axis];
      tile /= params.batch_shape[axis];
    }
    const int rows = params.num_rows - row;
    const int columns = params.num_columns - column;
    return {static_cast<const Byte*>(mask.data) + offset, rows < params.block_rows ? rows : params.block_rows,
            columns < params.block_columns ? columns : params.block_columns};
  }
};

// What a lane reads at once, as four bytes.
struct Word {
  static constexpr int kColumns = 4;
  static __device__ __forceinline__ u32 load(const Byte* first) { return isa::ldg_4(first); }
};
struct Single {
  static constexpr int kColumns = 1;
  static __device__ __forceinline__ u32 load(const Byte* first) { return 0x01010101u * isa::ldg_1(first); }
};

struct Seen {
  bool some_true;
  bool some_false;

  // A byte is 0 iff subtracting 1 from each of the four makes it borrow: its highest bit, clear before, is set then.
  __device__ __forceinline__ void add(u32 bytes) {
    some_true = some_true || bytes != 0;
    some_false = some_false || ((bytes - 0x01010101u) & ~bytes & 0x80808080u) != 0;
  }

  // All lanes of the warp.
  __device__ __forceinline__ void vote() {
    some_true = isa::any(some_true);
    some_false = isa::any(some_false);
  }

  __device__ __forceinline__ bool both() const { return some_true && some_false; }
};

// The tile's columns are a multiple of Piece::kColumns. A lane that would leave the tile looks once more at what it or
// another has seen, which changes nothing: so all loads of a step are under way together.
template <class Piece>
__device__ __forceinline__ Seen look(const Mask& mask, const MaskTile& tile) {
  int lanes_per_row = 1;
  while (lanes_per_row < 32 && lanes_per_row * Piece::kColumns < tile.num_columns) lanes_per_row *= 2;
  const int row_step = 32 / lanes_per_row;
  const int column_step = lanes_per_row * Piece::kColumns;
  const int lane_row = isa::lane_index() / lanes_per_row;
  const int lane_column = isa::lane_index() % lanes_per_row * Piece::kColumns;

  Seen seen = {false, false};
  for (int row_begin = 0; row_begin < tile.num_rows && !seen.both(); row_begin += Traits::kRows * row_step) {
    for (int column_begin = 0; column_begin < tile.num_columns && !seen.both(); column_begin += column_step) {
      const int column = column_begin + lane_column < tile.num_columns ? column_begin + lane_column : 0;
      const Byte* first = tile.data + column * mask.column_stride;
      u32 bytes[Traits::kRows];
#pragma unroll
      for (int i = 0; i < Traits::kRows; ++i) {
        const int row = row_begin + lane_row + i * row_step;
        bytes[i] = Piece::load(first + (row < tile.num_rows ? row : 0) * mask.row_stride);
      }
#pragma unroll
      for (int i = 0; i < Traits::kRows; ++i) seen.add(bytes[i]);
      seen.vote();
    }
  }
  return seen;
}

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads)
    flash_mask_summary(const __grid_constant__ SummaryParams params) {
  const long long tile = static_cast<long long>(isa::block_index_x()) * Config::kTilesPerBlock + isa::warp_index();
  if (tile >= params.num_tiles) return;
  const MaskTile place = MaskTile::of(params, tile);
  const bool in_words = params.has_words && place.num_columns % Word::kColumns == 0;
  const Seen seen = in_words ? look<Word>(params.mask, place) : look<Single>(params.mask, place);
  if (isa::lane_index() == 0) {
    isa::stg_1(static_cast<Byte*>(params.summary) + tile, !seen.some_true ? 0 : seen.some_false ? 1 : 2);
  }
}
