// Which part of the problem a block works on.
#pragma once

#include "mask.cuh"
#include "params.cuh"

// The first element of one head's rows.
struct HeadRows {
  const u16* data;
  long long row_stride;
};

// `batch` counts the entries of the batch in C order.
__device__ __forceinline__ HeadRows head_rows(const FwdParams& params, const Tensor& tensor, int batch, int head) {
  long long offset = head * tensor.head_stride;
#pragma unroll
  for (int axis = kBatchAxes - 1; axis >= 0; --axis) {
    offset += batch % params.batch_shape[axis] * tensor.batch_strides[axis];
    batch /= params.batch_shape[axis];
  }
  return {static_cast<const u16*>(tensor.data) + offset, tensor.row_stride};
}

// One tile of queries of one head. The grid has one axis, for CUDA's others end at 65535: tiles of queries
// within heads within batch entries.
struct FwdWork {
  int batch;
  int head;
  int row_begin;  // of the tile, in the sequence

  template <class Config>
  static __device__ __forceinline__ FwdWork of_block(const FwdParams& params) {
    const int num_tiles = (params.seqlen_q + Config::kBlockM - 1) / Config::kBlockM;
    const int entry = isa::block_index_x() / num_tiles;
    const int place = isa::block_index_x() % num_tiles;
    // With an upper bound the last tiles have the most keys: they start first, so that none of them finishes
    // alone.
    const int tile = Config::kHasUpper ? num_tiles - 1 - place : place;
    return {entry / params.num_heads_q, entry % params.num_heads_q, tile * Config::kBlockM};
  }
};
