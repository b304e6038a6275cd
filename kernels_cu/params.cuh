// The parameter blocks of the kernels: plain data, passed by value.
//
// build/params.py holds the same structures as NumPy dtypes and appends a static_assert for every offset to
// each kernel, so a drift between the two is a compile error that names the field.
#pragma once

#include "types.cuh"

// How many axes a batch may have; those that lie behind one another in every array have been joined to one.
constexpr int kBatchAxes = 4;

// Where an array (*batch, head, row, element) lies. Strides count elements and may be zero or negative; the
// elements of a row are contiguous, and rows start at multiples of 16 bytes.
struct Tensor {
  const void* data;
  long long batch_strides[kBatchAxes];
  long long head_stride;
  long long row_stride;
};

// One forward pass. Query i and key j take part together iff  lower <= j - i <= upper.
struct FwdParams {
  Tensor q;    // [*batch_shape, num_heads_q, seqlen_q, head_dim]
  Tensor k;    // [*batch_shape, num_heads_k, seqlen_k, head_dim]
  Tensor v;    // [*batch_shape, num_heads_v, seqlen_k, head_dim]
  Tensor out;  // [*batch_shape, num_heads_q, seqlen_q, head_dim]
  float* lse;  // [*batch_shape, num_heads_q, seqlen_q], contiguous; null if nobody asks for it
  int batch_shape[kBatchAxes];
  int num_heads_q;
  int group_size_k;  // num_heads_q / num_heads_k: query head h uses key head h / group_size_k
  int group_size_v;  // num_heads_q / num_heads_v: and value head h / group_size_v
  int seqlen_q;
  int seqlen_k;
  int lower;    // read if Config::kHasLower; |lower| <= 2^30, as are the lengths
  int upper;    // read if Config::kHasUpper; |upper| <= 2^30
  float scale;  // > 0 unless Config::kScaleFirst
};
