// Joins attention outputs over disjoint sets of keys into attention over their union.
//
//     lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i         (join.cuh)
//
// A warp makes one row of the output: its lanes stand side by side along the columns, so that rows which lie in one
// piece are read and written in one piece, and walk over the parts, which are separate arrays of any strides.
//
//              columns ->  lane 0  1  2 ..  31 | 0  1  2 ..  31 | ..          kColumns columns per lane, then the
//     part 0   row             o  o  o ..  o     o  o  o ..  o                 warp begins again
//     part 1   row             o  o  o ..  o     o  o  o ..  o
//     ..                       +  +  +     +     +  +  +     +     weights: the same in all lanes, from the row's
//     out      row             =  =  =     =     =  =  =     =     log-sum-exps, of which a lane reads one
//
// Shared memory: none. Registers: kColumns sums, and the row's place in each axis. The lanes of a warp exchange the
// largest log-sum-exp and the sum by shuffles: there are no barriers.
//
// The parts' places travel in the parameter block, which is what limits their number: a CUDA kernel's has 4096 bytes.
// More are joined in several launches, whose results in between are accumulators, Config::OutElement: nothing
// is rounded on the way.
//
// Not supported: more rows than an int counts.
#include "isa.cuh"
#include "join.cuh"
#include "params.cuh"

struct Traits {
  using Accumulator = ElementTraits<Config::Element>::Accumulator;
  using Storage = ElementTraits<Config::Element>::Storage;
  using OutStorage = ElementTraits<Config::OutElement>::Storage;
  static constexpr int kNumThreads = 32 * Config::kRowsPerBlock;
  static constexpr int kColumns = 32 / sizeof(Accumulator);  // 8 of double spill on sm_100

  static_assert(sizeof(MergeParams) <= 4096, "a kernel's parameters have 4096 bytes");
};

// The row's place in each axis; axes of length 1, which most are, cost nothing.
struct RowPlace {
  int index[kRowAxes];

  static __device__ __forceinline__ RowPlace of(int row, const int (&shape)[kRowAxes]) {
    RowPlace place;
#pragma unroll
    for (int axis = kRowAxes - 1; axis >= 0; --axis) {
      place.index[axis] = 0;
      if (shape[axis] != 1) {
        place.index[axis] = row % shape[axis];
        row /= shape[axis];
      }
    }
    return place;
  }

  __device__ __forceinline__ long long offset(const long long (&strides)[kRowAxes]) const {
    long long sum = 0;
#pragma unroll
    for (int axis = 0; axis < kRowAxes; ++axis) sum += index[axis] * strides[axis];
    return sum;
  }
};

using Sums = Traits::Accumulator[Traits::kColumns];

__device__ __forceinline__ ExpSum<Traits::Accumulator> load_lse(const Part& part, const RowPlace& place) {
  using Lse = ElementTraits<Traits::Accumulator>;
  return {Lse::load(static_cast<const Lse::Storage*>(part.lse) + place.offset(part.lse_strides)), 1};
}

// sums += weight * the lane's columns of the part's row, from column_begin on.
__device__ __forceinline__ void add_part(Sums& sums, const Part& part, const RowPlace& place,
                                         Traits::Accumulator weight, int column_begin, int num_columns) {
  const Traits::Storage* row = static_cast<const Traits::Storage*>(part.out) + place.offset(part.out_strides);
#pragma unroll
  for (int i = 0; i < Traits::kColumns; ++i) {
    const int column = column_begin + 32 * i;
    if (column < num_columns) {
      sums[i] += weight * ElementTraits<Config::Element>::load(row + column * part.out_column_stride);
    }
  }
}

__device__ __forceinline__ void store_row(Traits::OutStorage* row, const Sums& sums, int column_begin,
                                          int num_columns) {
#pragma unroll
  for (int i = 0; i < Traits::kColumns; ++i) {
    const int column = column_begin + 32 * i;
    if (column < num_columns) ElementTraits<Config::OutElement>::store(row + column, sums[i]);
  }
}

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads)
    flash_merge(const __grid_constant__ MergeParams params) {
  // In 64 bits: the last block's rows may lie beyond what an int counts.
  const long long row = static_cast<long long>(isa::block_index_x()) * Config::kRowsPerBlock + isa::warp_index();
  if (row >= params.num_rows) return;
  const RowPlace place = RowPlace::of(static_cast<int>(row), params.shape);
  const auto lse_of = [&](int part) { return load_lse(params.parts[part], place); };
  const auto whole = ExpSum<Traits::Accumulator>::over(params.num_parts, lse_of);
  const int lane = isa::lane_index();

  Traits::OutStorage* out = static_cast<Traits::OutStorage*>(params.out) + row * params.head_dim_v;
  for (int begin = lane; begin < params.head_dim_v; begin += 32 * Traits::kColumns) {
    Sums sums = {};
    for (int part = 0; part < params.num_parts; ++part) {
      add_part(sums, params.parts[part], place, whole.weight(lse_of(part)), begin, params.head_dim_v);
    }
    store_row(out, sums, begin, params.head_dim_v);
  }
  if (lane == 0) {
    ElementTraits<Traits::Accumulator>::store(static_cast<Traits::Accumulator*>(params.lse) + row, whole.lse());
  }
}
