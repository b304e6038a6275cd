// Tells for each tile of scores what a kernel need not look at: one byte for kBlockM rows by kBlockN keys, as
// mask_summary.cu does, but of a mask_mod, which is asked rather than read.
//
//     0  no key of the tile takes part for any of its rows: not visited
//     1  some do: mask_mod is asked again
//     2  all do: visited without mask_mod
//
// Rows are those of the forward kernel (work.cuh): where several heads share a tile, row r is query r / pack of head
// r % pack of the group. What lies beyond the last row or key does not count.
//
// An axis that mask_mod does not depend on has one entry here, so a mask that is the same for all heads is asked for one
// of them. Tiles are counted in C order: batch, groups of heads, tiles of rows, tiles of keys.
//
// One warp looks at one tile, whose elements follow one another row by row:
//
//     lane   0  1  2 .. 31 | 0  1 ..        A step: kElements for each lane. Then the warp votes, and stops if it has
//     row 0  x  x  x ..  x   x  x ..        seen both a true and a false.
//
// Shared memory: none. Registers: what mask_mod takes. Events: the votes, which all lanes of the warp reach together,
// since the loop's bound is the tile's; there are no barriers.
#include "isa.cuh"
#include "mods.cuh"
#include "params.cuh"

struct Traits {
  static constexpr int kNumThreads = 32 * Config::kTilesPerBlock;
  static constexpr int kElements = 4;
};

// A tile: where it begins, and what of it exists.
struct ModTile {
  int batch;
  int first_head;
  int first_row;
  int first_key;
  int num_rows;
  int num_keys;

  static __device__ __forceinline__ ModTile of(const ModSummaryParams& params, long long tile) {
    const int row_tiles = (params.num_rows + params.block_rows - 1) / params.block_rows;
    const int key_tiles = (params.num_keys + params.block_keys - 1) / params.block_keys;
    const int key = static_cast<int>(tile % key_tiles) * params.block_keys;
    tile /= key_tiles;
    const int row = static_cast<int>(tile % row_tiles) * params.block_rows;
    tile /= row_tiles;
    const int rows = params.num_rows - row;
    const int keys = params.num_keys - key;
    return {static_cast<int>(tile / params.num_groups),
            static_cast<int>(tile % params.num_groups) * params.pack,
            row,
            key,
            rows < params.block_rows ? rows : params.block_rows,
            keys < params.block_keys ? keys : params.block_keys};
  }

  // Where element `index` lies, row by row.
  __device__ __forceinline__ Coord at(const ModSummaryParams& params, int index) const {
    const int row = first_row + index / num_keys;
    return {batch, first_head + row % params.pack, row / params.pack, first_key + index % num_keys};
  }
};

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads)
    flash_mod_summary(const __grid_constant__ ModSummaryParams params, const __grid_constant__ ModArgs mods) {
  const long long place = static_cast<long long>(isa::block_index_x()) * Config::kTilesPerBlock + isa::warp_index();
  if (place >= params.num_tiles) return;
  const ModTile tile = ModTile::of(params, place);
  const int num_elements = tile.num_rows * tile.num_keys;
  bool some_true = false;
  bool some_false = false;
#pragma unroll 1
  for (int begin = 0; begin < num_elements && !(some_true && some_false); begin += 32 * Traits::kElements) {
#pragma unroll
    for (int i = 0; i < Traits::kElements; ++i) {
      // A lane that would leave the tile looks at its last element, which changes nothing.
      const int index = begin + 32 * i + isa::lane_index();
      const bool keeps = MaskMod::apply(tile.at(params, index < num_elements ? index : num_elements - 1), mods);
      some_true = some_true || keeps;
      some_false = some_false || !keeps;
    }
    some_true = isa::any(some_true);
    some_false = isa::any(some_false);
  }
  if (isa::lane_index() == 0) {
    isa::stg_1(static_cast<unsigned char*>(params.summary) + place, !some_true ? 0 : some_false ? 1 : 2);
  }
}
