// Tiles of scores without tensor cores: S = scale Q K^T by multiply-adds of single elements, what score.cuh makes of
// it, and the band. For fwd_simt.cu, which has the picture of who owns what, and weights.cu.
//
// Q and K go through shared memory in panels, kBlockM rows of Q before kBlockN rows of K:
//
//     Q panel | K panel      128 bytes of each row as accumulators, and 16 of padding, so that neighbouring rows begin
//                            four banks apart
//
// The head dim is walked over panel by panel, so it may be any.
#pragma once

#include "element.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "work.cuh"

template <class Config>
struct SimtTraits {
  using Element = ElementTraits<typename Config::Element>;
  using Storage = typename Element::Storage;
  using Accumulator = typename Element::Accumulator;
  using AccumulatorElement = ElementTraits<Accumulator>;

  static constexpr int kNumThreads = 32 * Config::kNumWarps;
  static constexpr int kRows = 16 * Config::kBlockM / kNumThreads;
  static constexpr int kColumns = Config::kBlockN / 16;

  static constexpr int kAccumulatorBytes = sizeof(Accumulator);
  static constexpr int kPadding = 16;
  // What one load from shared memory brings of a row of Q, K or P.
  static constexpr int kStep = 16 / kAccumulatorBytes;

  static_assert(Config::kBlockM % (kNumThreads / 16) == 0, "every thread has as many rows");
  static_assert(Config::kBlockN % 16 == 0, "the 16 threads of a row have equal parts");
};

// Where the panels of Q and K are, from the beginning of shared memory on.
template <class Config>
struct ScorePanels {
  using Simt = SimtTraits<Config>;

  static constexpr int kElements = 128 / Simt::kAccumulatorBytes;
  static constexpr int kRowBytes = 128 + Simt::kPadding;
  static constexpr int kBytes = (Config::kBlockM + Config::kBlockN) * kRowBytes;

  static __device__ __forceinline__ u32 q() { return isa::shared_base(); }
  static __device__ __forceinline__ u32 k() { return q() + Config::kBlockM * kRowBytes; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Accumulators in shared memory

__device__ __forceinline__ void store_shared(u32 destination, float value) {
  isa::st_shared_4(destination, isa::float_bits(value));
}
__device__ __forceinline__ void store_shared(u32 destination, double value) {
  isa::st_shared_8(destination, isa::double_bits(value));
}

__device__ __forceinline__ void load_shared(float (&values)[4], u32 source) {
  const uint4 bits = isa::ld_shared_16(source);
  values[0] = isa::bits_float(bits.x);
  values[1] = isa::bits_float(bits.y);
  values[2] = isa::bits_float(bits.z);
  values[3] = isa::bits_float(bits.w);
}
__device__ __forceinline__ void load_shared(float (&values)[2], u32 source) {
  const uint2 bits = isa::ld_shared_8(source);
  values[0] = isa::bits_float(bits.x);
  values[1] = isa::bits_float(bits.y);
}
__device__ __forceinline__ void load_shared(double (&values)[2], u32 source) {
  const uint4 bits = isa::ld_shared_16(source);
  values[0] = isa::bits_double({bits.x, bits.y});
  values[1] = isa::bits_double({bits.z, bits.w});
}

// Copies columns [column_begin, column_begin + kColumns) of kRows rows from row_begin on into a panel; what lies
// beyond num_rows and num_columns becomes zeros. All threads of the block take part, neighbours with neighbouring
// columns.
template <class Config, int kRows, int kColumns, int kRowBytes, class Rows>
__device__ __forceinline__ void load_panel(u32 panel_smem, const Rows& rows, int row_begin, int num_rows,
                                           int column_begin, int num_columns) {
  using Simt = SimtTraits<Config>;
  static_assert(kRows * kColumns % Simt::kNumThreads == 0, "every thread copies as many elements");
#pragma unroll 4
  for (int i = 0; i < kRows * kColumns / Simt::kNumThreads; ++i) {
    const int index = i * Simt::kNumThreads + isa::thread_index();
    const int row = index / kColumns;
    const int column = index % kColumns;
    typename Simt::Accumulator value = 0;
    if (row_begin + row < num_rows && column_begin + column < num_columns) {
      value = Simt::Element::load(rows.row(row_begin + row) + column_begin + column);
    }
    store_shared(panel_smem + static_cast<u32>(row * kRowBytes + column * Simt::kAccumulatorBytes), value);
  }
}

// One tile of scores after the other, and a thread's patch of it: kRows rows from row_begin on, and every 16th column
// from lane_x on.
template <class Config>
struct ScoreTile {
  using Simt = SimtTraits<Config>;
  using Panels = ScorePanels<Config>;
  using Accumulator = typename Simt::Accumulator;
  using Storage = typename Simt::Storage;

  const FwdParams& params;
  const ModArgs& mods;
  const FwdWork& work;
  int row_begin;  // the first of the thread's rows, in the tile
  int lane_x;     // which of the 16 threads of a row this is
  HeadRows<Storage> k;
  Accumulator scale;

  Accumulator s_frag[Simt::kRows][Simt::kColumns];

  __device__ __forceinline__ ScoreTile(const FwdParams& params, const ModArgs& mods, const FwdWork& work)
      : params(params),
        mods(mods),
        work(work),
        row_begin(isa::thread_index() / 16 * Simt::kRows),
        lane_x(isa::thread_index() % 16),
        k(head_rows<Storage>(params, params.k, work.batch, work.head / params.group_size_k)),
        scale(static_cast<Accumulator>(params.scale)) {}

  // S += Q K^T over the first `num_elements` of a panel, and zeros that fill up the last step.
  __device__ __forceinline__ void multiply_q_k(int num_elements) {
    const u32 q_smem = Panels::q() + static_cast<u32>(row_begin * Panels::kRowBytes);
    const u32 k_smem = Panels::k() + static_cast<u32>(lane_x * Panels::kRowBytes);
#pragma unroll 2
    for (int e = 0; e < num_elements; e += Simt::kStep) {
      Accumulator k_frag[Simt::kColumns][Simt::kStep];
#pragma unroll
      for (int c = 0; c < Simt::kColumns; ++c) {
        load_shared(k_frag[c], k_smem + static_cast<u32>(16 * c * Panels::kRowBytes + e * sizeof(Accumulator)));
      }
#pragma unroll
      for (int r = 0; r < Simt::kRows; ++r) {
        Accumulator q_frag[Simt::kStep];
        load_shared(q_frag, q_smem + static_cast<u32>(r * Panels::kRowBytes + e * sizeof(Accumulator)));
#pragma unroll
        for (int c = 0; c < Simt::kColumns; ++c) {
#pragma unroll
          for (int i = 0; i < Simt::kStep; ++i) s_frag[r][c] += q_frag[i] * k_frag[c][i];
        }
      }
    }
  }

  // S of a tile of keys, scaled.
  __device__ __forceinline__ void compute_scores(int first_key) {
#pragma unroll
    for (int r = 0; r < Simt::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Simt::kColumns; ++c) s_frag[r][c] = 0;
    }
    const auto q = work.template rows_of<Config, Storage>(params, params.q);
    for (int column = 0; column < params.head_dim; column += Panels::kElements) {
      load_panel<Config, Config::kBlockM, Panels::kElements, Panels::kRowBytes>(
          Panels::q(), q, work.row_begin, FwdWork::template num_rows<Config>(params), column, params.head_dim);
      load_panel<Config, Config::kBlockN, Panels::kElements, Panels::kRowBytes>(
          Panels::k(), k, first_key, params.seqlen_k, column, params.head_dim);
      isa::sync_threads();  // Q and K panels have arrived
      multiply_q_k(at_most(params.head_dim - column, Panels::kElements));
      isa::sync_threads();  // they have been read
    }
#pragma unroll
    for (int r = 0; r < Simt::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Simt::kColumns; ++c) s_frag[r][c] *= scale;
    }
  }

  // From scale q k to what the softmax is taken of, but for the band.
  __device__ __forceinline__ void change_scores(int first_key, bool is_whole) {
#pragma unroll
    for (int r = 0; r < Simt::kRows; ++r) {
      const int row = work.row_begin + row_begin + r;
      const int head = work.template head_of<Config>(params, row);
      const ScoreRow<Config> scores(params, mods, work.batch, head, FwdWork::template query_of<Config>(params, row),
                                    is_whole);
#pragma unroll
      for (int c = 0; c < Simt::kColumns; ++c) s_frag[r][c] = scores(s_frag[r][c], first_key + lane_x + 16 * c);
      if constexpr (!MaskMod::kIdentity) {
        if (!is_whole) {
#pragma unroll
          for (int c = 0; c < Simt::kColumns; ++c) {
            if (!scores.keeps(first_key + lane_x + 16 * c)) s_frag[r][c] = negative_infinity();
          }
        }
      }
    }
  }

  // Sets weights that dropout drops to 0; what is kept is scaled at the row's end.
  __device__ __forceinline__ void drop_weights(int first_key) {
    const u64 seed = dropout_seed(params.scores);
#pragma unroll
    for (int r = 0; r < Simt::kRows; ++r) {
      const int row = work.row_begin + row_begin + r;
      const u64 head = static_cast<u64>(work.batch) * params.num_heads_q + work.template head_of<Config>(params, row);
      const int query = FwdWork::template query_of<Config>(params, row);
#pragma unroll
      for (int c = 0; c < Simt::kColumns; ++c) {
        const int key = first_key + lane_x + 16 * c;
        if (!dropout_keep(seed, head, query, key, params.scores.dropout_threshold)) s_frag[r][c] = 0;
      }
    }
  }

  // Sets the scores of keys that do not take part to -inf.
  __device__ __forceinline__ void mask_scores(int first_key) {
#pragma unroll
    for (int r = 0; r < Simt::kRows; ++r) {
      const int query = FwdWork::template query_of<Config>(params, work.row_begin + row_begin + r);
      int begin = 0;
      int end = params.seqlen_k;
      if constexpr (Config::kHasLower) begin = query + params.lower;
      if constexpr (Config::kHasUpper) end = at_most(end, query + params.upper + 1);
#pragma unroll
      for (int c = 0; c < Simt::kColumns; ++c) {
        const int key = first_key + lane_x + 16 * c;
        if (key < begin || key >= end) s_frag[r][c] = negative_infinity();
      }
    }
  }
};

// Maximum and sum of each of a thread's rows over the tiles so far: softmax.cuh has the formulas.
template <class Config>
struct SimtSoftmax {
  using Simt = SimtTraits<Config>;
  using Accumulator = typename Simt::Accumulator;

  Accumulator row_max[Simt::kRows];
  Accumulator row_sum[Simt::kRows];  // each thread's own part; `finish` adds them up

  __device__ __forceinline__ SimtSoftmax() {
#pragma unroll
    for (int r = 0; r < Simt::kRows; ++r) {
      row_max[r] = negative_infinity();
      row_sum[r] = 0;
    }
  }

  // Turns the scores of row r in a tile into P in place, and gives the factor that takes what was summed up with the
  // old maximum to the new one.
  __device__ __forceinline__ Accumulator update(Accumulator (&s_row)[Simt::kColumns], int r) {
    Accumulator new_max = row_max[r];
#pragma unroll
    for (int c = 0; c < Simt::kColumns; ++c) new_max = larger(new_max, s_row[c]);
    new_max = largest_of_lanes<16>(new_max);
    // No key has taken part yet: every exponent is -inf whatever is subtracted, but -inf - -inf is not.
    const Accumulator offset = new_max == negative_infinity() ? Accumulator(0) : new_max;
    const Accumulator correction = exponential(row_max[r] - offset);
    row_max[r] = new_max;
    row_sum[r] *= correction;
#pragma unroll
    for (int c = 0; c < Simt::kColumns; ++c) {
      s_row[c] = exponential(s_row[c] - offset);
      row_sum[r] += s_row[c];
    }
    return correction;
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < Simt::kRows; ++r) row_sum[r] = sum_of_lanes<16>(row_sum[r]);
  }
};
