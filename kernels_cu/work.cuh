// Which part of the problem a block works on: an item.
#pragma once

#include "isa.cuh"
#include "params.cuh"

__device__ __forceinline__ constexpr int at_least(int value, int bound) { return value < bound ? bound : value; }
__device__ __forceinline__ constexpr int at_most(int value, int bound) { return value > bound ? bound : value; }

// One head's rows; Storage is what an element takes in memory: u16, float, double.
template <class Storage>
struct HeadRows {
  Storage* data;  // row 0
  long long row_stride;

  __device__ __forceinline__ Storage* row(int row) const { return data + row * row_stride; }

  // From an element of a row to that of the row `steps` further.
  template <class Pointer>
  __device__ __forceinline__ Pointer advance(Pointer element, int /*row*/, int steps) const {
    return element + steps * row_stride;
  }
};

// The rows of `pack` neighbouring heads as one matrix, query by query: row r is query r / pack of head r % pack.
template <class Storage>
struct PackedRows {
  Storage* data;  // query 0 of the first head
  long long head_stride;
  long long row_stride;
  int pack;

  __device__ __forceinline__ Storage* row(int row) const {
    return data + row % pack * head_stride + row / pack * row_stride;
  }

  template <class Pointer>
  __device__ __forceinline__ Pointer advance(Pointer element, int from, int steps) const {
    return element + (row(from + steps) - row(from));
  }
};

// `batch` counts the entries of the batch in C order. Nothing is written through rows of operands.
template <class Storage, class Params>
__device__ __forceinline__ HeadRows<Storage> head_rows(const Params& params, const Tensor& tensor, int batch,
                                                       int head) {
  long long offset = head * tensor.head_stride;
#pragma unroll
  for (int axis = kBatchAxes - 1; axis >= 0; --axis) {
    offset += batch % params.batch_shape[axis] * tensor.batch_strides[axis];
    batch /= params.batch_shape[axis];
  }
  return {static_cast<Storage*>(const_cast<void*>(tensor.data)) + offset, tensor.row_stride};
}

// One item: a tile of rows, and its share of the keys.
//
// A row is a query of the block's head or, if Config::kPacked, of one of `pack` heads that share their keys and
// values: few queries then fill a tile, and keys are read once for all the heads.
//
//     pack = 3:   row      0  1  2  3  4  5  6 ..
//                 query    0  0  0  1  1  1  2 ..        heads `head`, head + 1, head + 2, in turn
//
// If params.num_splits is not 1, so many items share the keys of a tile of rows. They are neighbours in the order: what
// they leave to be joined is written at about the same time, and the order of the tiles stays that without splits.
//
// A grid has one axis, for CUDA's others end at 65535: splits within tiles of rows within (groups of) heads within
// batch entries. With an upper bound the last tiles of rows have the most keys. Were these spread over the order, some
// would begin when the others are through; so tiles are in the order of their lengths, over all heads. But then the
// keys of all heads are in use at once: sections of params.section heads, whose keys and values the L2 cache holds,
// come one after the other. From one to the next the order turns round, so that lengths never jump; the last one begins
// with the longest.
//
//     section = 2:    head          0  1  0  1  0  1    2  3  2  3  2  3
//                     tile of rows  0  0  1  1  2  2    2  2  1  1  0  0
struct FwdWork {
  int batch;
  int head;       // the first of its heads
  int row_begin;  // the first of its rows
  int split;

  template <class Config>
  static __device__ __forceinline__ FwdWork of_block(const FwdParams& params) {
    return of_item<Config>(params, isa::block_index_x());
  }

  template <class Config>
  static __device__ __forceinline__ FwdWork of_item(const FwdParams& params, int item) {
    return of_tile<Config>(params, item / params.num_splits, item % params.num_splits);
  }

  // By the tile's place in the order.
  template <class Config>
  static __device__ __forceinline__ FwdWork of_tile(const FwdParams& params, int place, int split) {
    const int num_tiles = tiles_per_head<Config>(params);
    const int pack = heads_per_tile<Config>(params);
    const int num_groups = params.num_heads_q / pack;
    int group = place / num_tiles;  // of all in the batch
    int tile = place % num_tiles;
    if constexpr (Config::kHasUpper) {
      const int num_all = params.batch_size * num_groups;
      const int section = place / (params.section * num_tiles);
      const int first = section * params.section;
      const int width = at_most(params.section, num_all - first);
      const int within = place - first * num_tiles;
      group = first + within % width;
      tile = within / width;
      const bool begins_with_longest = ((num_all - 1) / params.section - section) % 2 == 0;
      if (begins_with_longest) tile = num_tiles - 1 - tile;
    }
    return {group / num_groups, group % num_groups * pack, tile * Config::kBlockM, split};
  }

  template <class Config>
  static __device__ __forceinline__ int num_items(const FwdParams& params) {
    const int num_groups = params.num_heads_q / heads_per_tile<Config>(params);
    return params.batch_size * num_groups * tiles_per_head<Config>(params) * params.num_splits;
  }

  // Tiles of rows of a head, or of heads that are packed.
  template <class Config>
  static __device__ __forceinline__ int tiles_per_head(const FwdParams& params) {
    return (num_rows<Config>(params) + Config::kBlockM - 1) / Config::kBlockM;
  }

  template <class Config>
  static __device__ __forceinline__ int heads_per_tile(const FwdParams& params) {
    return Config::kPacked ? params.pack : 1;
  }

  // The rows of all tiles of a head, or of heads that are packed.
  template <class Config>
  static __device__ __forceinline__ int num_rows(const FwdParams& params) {
    return params.seqlen_q * heads_per_tile<Config>(params);
  }

  template <class Config>
  static __device__ __forceinline__ int query_of(const FwdParams& params, int row) {
    return row / heads_per_tile<Config>(params);
  }

  template <class Config>
  __device__ __forceinline__ int head_of(const FwdParams& params, int row) const {
    return head + row % heads_per_tile<Config>(params);
  }

  // An array of queries, or of what is there for each of them, by row.
  template <class Config, class Storage>
  __device__ __forceinline__ auto rows_of(const FwdParams& params, const Tensor& tensor) const {
    const HeadRows<Storage> first = head_rows<Storage>(params, tensor, batch, head);
    if constexpr (Config::kPacked) {
      return PackedRows<Storage>{first.data, tensor.head_stride, tensor.row_stride, params.pack};
    } else {
      return first;
    }
  }

  // The place of a row's query in a contiguous array [batch_size, num_heads_q, seqlen_q] such as lse; in one
  // of partial results [num_splits, batch_size, num_heads_q, seqlen_q].
  template <class Config>
  __device__ __forceinline__ long long place_of(const FwdParams& params, int row) const {
    const int pack = heads_per_tile<Config>(params);
    const long long entry = static_cast<long long>(split) * params.batch_size + batch;
    return (entry * params.num_heads_q + head + row % pack) * params.seqlen_q + row / pack;
  }
};

// The items of a block. A grid may be as large as their number, or smaller: then a block takes one item of every round
// over the order, and every other round goes backwards. Where lengths fall and do not jump, blocks get about the same.
//
//     grid = 3:   block 0   items 0 5 6 11 ..
//                 block 1         1 4 7 10 ..
//                 block 2         2 3 8  9 ..
struct Items {
  u32 round = 0;

  // Unsigned: the last round may lead far beyond the last item.
  __device__ __forceinline__ u32 place() const {
    const u32 grid = isa::grid_size_x();
    const u32 block = isa::block_index_x();
    return round * grid + (round % 2 == 0 ? block : grid - 1 - block);
  }

  __device__ __forceinline__ int item() const { return static_cast<int>(place()); }

  // Without kPersists the grid is as large as their number.
  template <class Config, bool kPersists>
  __device__ __forceinline__ bool are_left(const FwdParams& params) const {
    if constexpr (!kPersists) {
      return round == 0;
    } else {
      return place() < static_cast<u32>(FwdWork::num_items<Config>(params));
    }
  }

  __device__ __forceinline__ void advance() { ++round; }
};
