// Which part of the problem a block works on.
#pragma once

#include "mask.cuh"
#include "params.cuh"

// The first element of one head's rows.
struct HeadRows {
  const u16* data;
  long long row_stride;
};

__device__ __forceinline__ HeadRows head_rows(const Tensor& tensor, int batch, int head) {
  const u16* data = static_cast<const u16*>(tensor.data);
  return {data + batch * tensor.batch_stride + head * tensor.head_stride, tensor.row_stride};
}

// One tile of queries of one head. The grid is (number of query tiles, num_heads_q, batch_size).
struct FwdWork {
  int batch;
  int head;
  int head_kv;
  int row_begin;  // of the tile, in the sequence

  template <class Config>
  static __device__ __forceinline__ FwdWork of_block(const FwdParams& params) {
    // With an upper bound the last tiles have the most keys: they start first, so that none of them finishes
    // alone.
    const int tile = Config::kHasUpper ? isa::grid_size_x() - 1 - isa::block_index_x() : isa::block_index_x();
    const int head = isa::block_index_y();
    return {isa::block_index_z(), head, head / params.group_size, tile * Config::kBlockM};
  }
};
