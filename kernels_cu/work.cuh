// Which part of the problem a block works on.
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

// One tile of rows, and its share of the keys.
//
// A row is a query of the block's head or, if Config::kPacked, of one of `pack` heads that share their keys and
// values: few queries then fill a tile, and keys are read once for all the heads.
//
//     pack = 3:   row      0  1  2  3  4  5  6 ..
//                 query    0  0  0  1  1  1  2 ..        heads `head`, head + 1, head + 2, in turn
//
// If params.num_splits is not 1, so many blocks share the keys of a tile of rows. They are neighbours in the grid: what
// they leave to be joined is written at about the same time, and the order of the tiles stays that of the grid without
// splits.
//
// The grid has one axis, for CUDA's others end at 65535: splits within tiles of rows within (groups of) heads within
// batch entries.
struct FwdWork {
  int batch;
  int head;       // the first of its heads
  int row_begin;  // the first of its rows
  int split;

  template <class Config>
  static __device__ __forceinline__ FwdWork of_block(const FwdParams& params) {
    const int block = isa::block_index_x();
    return of_tile<Config>(params, block / params.num_splits, block % params.num_splits);
  }

  template <class Config>
  static __device__ __forceinline__ FwdWork of_tile(const FwdParams& params, int block, int split) {
    const int num_tiles = (num_rows<Config>(params) + Config::kBlockM - 1) / Config::kBlockM;
    const int entry = block / num_tiles;
    const int place = block % num_tiles;
    // With an upper bound the last tiles have the most keys: they start first, so that none of them finishes
    // alone.
    const int tile = Config::kHasUpper ? num_tiles - 1 - place : place;
    const int pack = heads_per_tile<Config>(params);
    const int num_groups = params.num_heads_q / pack;
    return {entry / num_groups, entry % num_groups * pack, tile * Config::kBlockM, split};
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
