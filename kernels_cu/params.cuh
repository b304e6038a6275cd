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

// Where an array over scores (*batch, head, query, key) lies: strides in elements, 0 where it broadcasts.
struct Mask {
  const void* data;
  long long batch_strides[kBatchAxes];
  long long head_stride;
  long long row_stride;
  long long column_stride;
};

// What is known of mask_mod, tile by tile: see mod_summary.cu. A row has a byte for each tile of keys.
struct ModMarks {
  const unsigned char* data;  // null: nothing is known
  // Bytes between entries of the batch, heads or groups of heads that share tiles, and tiles of rows; 0 where mask_mod
  // does not depend on them.
  long long batch_stride;
  long long group_stride;
  long long row_stride;
};

// What is done to scores between Q K^T and P V, beyond the band. score.cuh reads it, as far as Config says.
struct ScoreParams {
  Mask float_mask;  // of Config::FloatMask, added; -inf removes
  Mask bool_mask;   // bytes, not 0 where the key takes part
  Mask summary;     // bytes, one for each tile: see mask_summary.cu; data is null if there is none
  ModMarks mod_marks;
  const float* alibi_slopes;  // [batch_size or 1, num_heads_q]; null: no ALiBi
  const void* sinks;          // [num_heads_q]; null: no sinks
  const u64* seed_data;       // where the seed is read when the kernel runs; null: it is `seed`
  u64 seed;
  double softcap;          // 0: off
  double dropout_scale;    // 1 / (1 - p); 1 without dropout, 0 if p is 1
  u32 dropout_threshold;   // floor(2^32 p), if Config::kDropout
  int shift;               // of the diagonal, for ALiBi; |shift| <= 2^30
  int alibi_batch_stride;  // num_heads_q, or 0
  int sinks_are_float;     // 1: sinks are float; 0: of Config::Element
};

// One forward pass, and what joins its parts: combine.cu. Query i and key j take part together iff  lower <= j - i <= upper.
//
// Accumulators are float, double for elements of double.
struct FwdParams {
  Tensor q;           // [*batch_shape, num_heads_q, seqlen_q, head_dim]
  Tensor k;           // [*batch_shape, num_heads_k, seqlen_k, head_dim]
  Tensor v;           // [*batch_shape, num_heads_v, seqlen_k, head_dim_v]
  Tensor out;         // [*batch_shape, num_heads_q, seqlen_q, head_dim_v]; not written with splits
  void* lse;          // accumulators [batch_size, num_heads_q, seqlen_q], contiguous; null if nobody asks for it
  void* partial_out;  // with splits: accumulators [num_splits, batch_size, num_heads_q, seqlen_q, head_dim_v],
  void* partial_lse;  //   normalised within the split; and [num_splits, batch_size, num_heads_q, seqlen_q, 2]: m
                      //   and l of lse = m + ln l
  void* weights;      // [batch_size, num_heads_q, seqlen_q, seqlen_k], contiguous; for weights.cu alone, else null
  double scale;       // > 0 unless Config::kScaleFirst
  int batch_shape[kBatchAxes];
  int batch_size;  // the product of batch_shape
  int num_heads_q;
  int group_size_k;  // num_heads_q / num_heads_k: query head h uses key head h / group_size_k
  int group_size_v;  // num_heads_q / num_heads_v: and value head h / group_size_v
  int pack;          // if Config::kPacked: so many query heads share a tile; divides both group sizes
  int seqlen_q;
  int seqlen_k;
  int head_dim;    // at most Config::kHeadDim
  int head_dim_v;  // at most Config::kHeadDimV
  int num_splits;  // at least 1: parts into which the keys of a tile of queries are divided
  int section;     // at least 1: heads, or groups that are packed, whose tiles of queries are taken together
  int lower;       // read if Config::kHasLower; |lower| <= 2^30, as are the lengths
  int upper;       // read if Config::kHasUpper; |upper| <= 2^30
  ScoreParams scores;
};

// Tells for each tile of a bool mask whether none, some or all of its elements are true: see mask_summary.cu.
// "Columns" are the axis along which the mask is read, whichever of queries and keys that is.
struct SummaryParams {
  Mask mask;            // bytes [*batch_shape, num_heads, num_rows, num_columns]
  void* summary;        // bytes [*batch_shape, num_heads, tiles of rows, tiles of columns], contiguous
  long long num_tiles;  // all of them
  int batch_shape[kBatchAxes];
  int num_heads;
  int num_rows;
  int num_columns;
  int block_rows;
  int block_columns;
  int has_words;  // every fourth column of every row starts an aligned word, and columns are neighbours
};

// Tells for each tile of a forward kernel whether mask_mod keeps none, some or all of its keys: see mod_summary.cu.
struct ModSummaryParams {
  void* summary;        // bytes [batch entries, groups of heads, tiles of rows, tiles of keys], contiguous
  long long num_tiles;  // all of them
  int num_groups;
  int pack;      // row r of a tile is query r / pack of head r % pack of the group
  int num_rows;  // of a group
  int num_keys;
  int block_rows;
  int block_keys;
};

// How many parts one launch joins, and the axes of their rows: those of the batch, heads, queries.
constexpr int kMaxParts = 32;
constexpr int kRowAxes = kBatchAxes + 2;

// A part of an attention's output. Strides count elements and may be zero or negative.
struct Part {
  const void* out;  // [*shape, head_dim_v]
  const void* lse;  // accumulators [*shape]
  long long out_strides[kRowAxes];
  long long out_column_stride;
  long long lse_strides[kRowAxes];
};

// Joins attention over disjoint sets of keys: see merge.cu.
struct MergeParams {
  void* out;  // Config::OutElement [*shape, head_dim_v], contiguous
  void* lse;  // accumulators [*shape], contiguous
  int shape[kRowAxes];
  int num_rows;  // the product of shape
  int head_dim_v;
  int num_parts;
  Part parts[kMaxParts];
};
