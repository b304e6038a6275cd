// The parameter blocks of the kernels: plain data, passed by value.
//
// build/params.py holds the same structures as NumPy dtypes and appends a static_assert for every offset to
// each kernel, so a drift between the two is a compile error that names the field.
#pragma once

#include "types.cuh"

// Where an array (batch, head, row, element) lies. Strides count elements; the elements of a row are
// contiguous, and rows start at multiples of 16 bytes.
struct Tensor {
  const void* data;
  long long batch_stride;
  long long head_stride;
  long long row_stride;
};

// One forward pass. Query i and key j take part together iff  lower <= j - i <= upper.
struct FwdParams {
  Tensor q;    // [batch_size, num_heads_q, seqlen_q, head_dim]
  Tensor k;    // [batch_size, num_heads_kv, seqlen_k, head_dim]
  Tensor v;    // [batch_size, num_heads_kv, seqlen_k, head_dim]
  Tensor out;  // [batch_size, num_heads_q, seqlen_q, head_dim]
  float* lse;  // [batch_size, num_heads_q, seqlen_q], contiguous
  int num_heads_q;
  int group_size;  // num_heads_q / num_heads_kv: query head h uses key-value head h / group_size
  int seqlen_q;
  int seqlen_k;
  int lower;    // read if Config::kHasLower; |lower| < 2^30
  int upper;    // read if Config::kHasUpper; |upper| < 2^30
  float scale;  // > 0
};
