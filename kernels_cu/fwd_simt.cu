// Forward attention without tensor cores, for any GPU from sm_75 on: float32 and float64 in their own precision,
// float16 and bfloat16 accumulated in float.
//
//     S = scale Q K^T,  P = softmax over the keys that take part,  O = P V,  lse = log of the sum of exp(S)
//
// FlashAttention-2 (T. Dao, 2023, arXiv 2307.08691), Algorithm 1, by multiply-adds of single elements. What matters
// then is how often an operand is read from shared memory: a thread computes a patch of S and of O.
//
//             keys ->                            16 x 16 threads. Thread (y, x) owns the kRows rows from kRows y on;
//                x   x+16   x+32   x+48          of S every 16th column from x on, of O pieces of kVector elements,
//     kRows y  [ s    s      s      s  ]         16 kVector apart. The 16 threads of a row are half a warp: maximum
//              [ s    s      s      s  ]         and sum of a row need shuffles only, and P, which every one of them
//              [ s    s      s      s  ]         needs whole, goes through shared memory within its warp.
//
// Shared memory, all of it accumulators (float, for double double):
//
//     Q panel | K panel | P        kBlockM rows, kBlockN rows of one panel: 128 bytes of a row, and 16 of padding, so
//     ^^^^^^^^^^^^^^^^^            that neighbouring rows begin four banks apart
//     V panel                      kPanelKeys whole rows, between Q K^T of this tile and of the next
//
// Q is read again for every tile of keys, from a cache most likely: so shared memory does not grow with the head dim,
// which is bounded only by what the plan asks for.
//
// Registers per thread: O kRows * kHeadDimV / 16, S kRows * kBlockN / 16, in accumulators.
//
// Who waits for what:
//
//     event                   who waits                  how           what it protects
//     Q, K panels arrived     multiplying Q K^T          sync_threads  reading the panels
//     Q, K panels were read   copying the next, or V     sync_threads  overwriting them
//     V panel arrived         accumulating P V           sync_threads  reading it, and the other lanes' part of P
//     V panel was read        copying the next, or Q, K  sync_threads  overwriting it; P too, at the next tile
//
// Rows need only an element's own alignment, so elements are read one by one, neighbours by neighbouring threads.
// Scores are always scaled before the softmax: beside the products that costs nothing, and any scale is right.
//
// Not supported: head dims of values beyond kHeadDimV; score_mod and mask_mod.
#include "isa.cuh"
#include "element.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "work.cuh"

// `rows`, halved until they fit.
constexpr int rows_that_fit(int rows, int row_bytes, int bytes) {
  return rows * row_bytes <= bytes ? rows : rows_that_fit(rows / 2, row_bytes, bytes);
}

struct Traits {
  using Element = ElementTraits<typename Config::Element>;
  using Storage = Element::Storage;
  using Accumulator = Element::Accumulator;
  using AccumulatorElement = ElementTraits<Accumulator>;

  static constexpr int kNumThreads = 32 * Config::kNumWarps;
  static constexpr int kRows = 16 * Config::kBlockM / kNumThreads;
  static constexpr int kColumns = Config::kBlockN / 16;
  static constexpr int kOutColumns = Config::kHeadDimV / 16;

  static constexpr int kAccumulatorBytes = sizeof(Accumulator);
  static constexpr int kPadding = 16;
  static constexpr int kPanelElements = 128 / kAccumulatorBytes;
  static constexpr int kPanelRowBytes = 128 + kPadding;
  static constexpr int kPRowBytes = Config::kBlockN * kAccumulatorBytes + kPadding;

  // What one load from shared memory brings of a row of Q, K or P, and of V.
  static constexpr int kStep = 16 / kAccumulatorBytes;
  static constexpr int kVector = kOutColumns < kStep ? kOutColumns : kStep;

  static constexpr int kPanelsBytes = (Config::kBlockM + Config::kBlockN) * kPanelRowBytes;
  static constexpr int kVRowBytes = Config::kHeadDimV * kAccumulatorBytes;
  static constexpr int kPanelKeys = rows_that_fit(Config::kBlockN, kVRowBytes, kPanelsBytes);

  static_assert(Config::kBlockM % (kNumThreads / 16) == 0, "every thread has as many rows");
  static_assert(Config::kBlockN % 16 == 0 && Config::kHeadDimV % 16 == 0, "the 16 threads of a row have equal parts");
  static_assert(kOutColumns % kVector == 0 && kPanelKeys % kStep == 0, "loads are whole");
  static_assert(Config::kScaleFirst == false, "scores are scaled first anyway");
};

// Addresses in shared memory; the picture above says when each is in use.
struct SharedStorage {
  static constexpr int kBytes = Traits::kPanelsBytes + Config::kBlockM * Traits::kPRowBytes;

  static __device__ __forceinline__ u32 q() { return isa::shared_base(); }
  static __device__ __forceinline__ u32 k() { return q() + Config::kBlockM * Traits::kPanelRowBytes; }
  static __device__ __forceinline__ u32 v() { return q(); }
  static __device__ __forceinline__ u32 p() { return q() + Traits::kPanelsBytes; }
};
static_assert(SharedStorage::kBytes == Config::kSharedBytes, "the launch asks for what the kernel uses");

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
template <int kRows, int kColumns, int kRowBytes, class Rows>
__device__ __forceinline__ void load_panel(u32 panel_smem, const Rows& rows, int row_begin, int num_rows,
                                           int column_begin, int num_columns) {
  static_assert(kRows * kColumns % Traits::kNumThreads == 0, "every thread copies as many elements");
#pragma unroll 4
  for (int i = 0; i < kRows * kColumns / Traits::kNumThreads; ++i) {
    const int index = i * Traits::kNumThreads + isa::thread_index();
    const int row = index / kColumns;
    const int column = index % kColumns;
    Traits::Accumulator value = 0;
    if (row_begin + row < num_rows && column_begin + column < num_columns) {
      value = Traits::Element::load(rows.row(row_begin + row) + column_begin + column);
    }
    store_shared(panel_smem + static_cast<u32>(row * kRowBytes + column * Traits::kAccumulatorBytes), value);
  }
}

struct Forward {
  using Accumulator = Traits::Accumulator;
  using Rows = HeadRows<Traits::Storage>;

  const FwdParams& params;
  const FwdWork& work;
  int row_begin;  // the first of the thread's rows, in the tile
  int lane_x;     // which of the 16 threads of a row this is
  Rows k;
  Rows v;
  Accumulator scale;

  Accumulator s_frag[Traits::kRows][Traits::kColumns];
  Accumulator o_frag[Traits::kRows][Traits::kOutColumns];
  Accumulator row_max[Traits::kRows];
  Accumulator row_sum[Traits::kRows];  // each thread's own part, added up at the end

  __device__ __forceinline__ Forward(const FwdParams& params, const FwdWork& work)
      : params(params),
        work(work),
        row_begin(isa::thread_index() / 16 * Traits::kRows),
        lane_x(isa::thread_index() % 16),
        k(head_rows<Traits::Storage>(params, params.k, work.batch, work.head / params.group_size_k)),
        v(head_rows<Traits::Storage>(params, params.v, work.batch, work.head / params.group_size_v)),
        scale(static_cast<Accumulator>(params.scale)) {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      row_max[r] = negative_infinity();
      row_sum[r] = 0;
#pragma unroll
      for (int c = 0; c < Traits::kOutColumns; ++c) o_frag[r][c] = 0;
    }
  }

  // S += Q K^T over the first `num_elements` of a panel, and zeros that fill up the last step.
  __device__ __forceinline__ void multiply_q_k(int num_elements) {
    const u32 q_smem = SharedStorage::q() + static_cast<u32>(row_begin * Traits::kPanelRowBytes);
    const u32 k_smem = SharedStorage::k() + static_cast<u32>(lane_x * Traits::kPanelRowBytes);
#pragma unroll 2
    for (int e = 0; e < num_elements; e += Traits::kStep) {
      Accumulator k_frag[Traits::kColumns][Traits::kStep];
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        load_shared(k_frag[c], k_smem + static_cast<u32>(16 * c * Traits::kPanelRowBytes + e * sizeof(Accumulator)));
      }
#pragma unroll
      for (int r = 0; r < Traits::kRows; ++r) {
        Accumulator q_frag[Traits::kStep];
        load_shared(q_frag, q_smem + static_cast<u32>(r * Traits::kPanelRowBytes + e * sizeof(Accumulator)));
#pragma unroll
        for (int c = 0; c < Traits::kColumns; ++c) {
#pragma unroll
          for (int i = 0; i < Traits::kStep; ++i) s_frag[r][c] += q_frag[i] * k_frag[c][i];
        }
      }
    }
  }

  // S of a tile of keys, scaled.
  __device__ __forceinline__ void compute_scores(int first_key) {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) s_frag[r][c] = 0;
    }
    const auto q = work.rows_of<Config, Traits::Storage>(params, params.q);
    for (int column = 0; column < params.head_dim; column += Traits::kPanelElements) {
      load_panel<Config::kBlockM, Traits::kPanelElements, Traits::kPanelRowBytes>(
          SharedStorage::q(), q, work.row_begin, FwdWork::num_rows<Config>(params), column, params.head_dim);
      load_panel<Config::kBlockN, Traits::kPanelElements, Traits::kPanelRowBytes>(
          SharedStorage::k(), k, first_key, params.seqlen_k, column, params.head_dim);
      isa::sync_threads();  // Q and K panels have arrived
      multiply_q_k(at_most(params.head_dim - column, Traits::kPanelElements));
      isa::sync_threads();  // they have been read
    }
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) s_frag[r][c] *= scale;
    }
  }

  // From scale q k to what the softmax is taken of, but for the band.
  __device__ __forceinline__ void change_scores(int first_key, bool is_whole) {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int row = work.row_begin + row_begin + r;
      const int head = work.head_of<Config>(params, row);
      const ScoreRow<Config> scores(params, work.batch, head, FwdWork::query_of<Config>(params, row), is_whole);
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) s_frag[r][c] = scores(s_frag[r][c], first_key + lane_x + 16 * c);
    }
  }

  // Sets weights that dropout drops to 0; what is kept is scaled at the row's end.
  __device__ __forceinline__ void drop_weights(int first_key) {
    const u64 seed = dropout_seed(params.scores);
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int row = work.row_begin + row_begin + r;
      const u64 head = static_cast<u64>(work.batch) * params.num_heads_q + work.head_of<Config>(params, row);
      const int query = FwdWork::query_of<Config>(params, row);
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        const int key = first_key + lane_x + 16 * c;
        if (!dropout_keep(seed, head, query, key, params.scores.dropout_threshold)) s_frag[r][c] = 0;
      }
    }
  }

  // Sets the scores of keys that do not take part to -inf.
  __device__ __forceinline__ void mask_scores(int first_key) {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int query = FwdWork::query_of<Config>(params, work.row_begin + row_begin + r);
      int begin = 0;
      int end = params.seqlen_k;
      if constexpr (Config::kHasLower) begin = query + params.lower;
      if constexpr (Config::kHasUpper) end = at_most(end, query + params.upper + 1);
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        const int key = first_key + lane_x + 16 * c;
        if (key < begin || key >= end) s_frag[r][c] = negative_infinity();
      }
    }
  }

  // Turns the scores S into P in place, updates m and l, and rescales O for the new maximum: softmax.cuh has the
  // formulas.
  __device__ __forceinline__ void online_softmax() {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      Accumulator new_max = row_max[r];
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) new_max = larger(new_max, s_frag[r][c]);
      new_max = largest_of_lanes<16>(new_max);
      // No key has taken part yet: every exponent is -inf whatever is subtracted, but -inf - -inf is not.
      const Accumulator offset = new_max == negative_infinity() ? Accumulator(0) : new_max;
      const Accumulator correction = exponential(row_max[r] - offset);
      row_max[r] = new_max;
      row_sum[r] *= correction;
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        s_frag[r][c] = exponential(s_frag[r][c] - offset);
        row_sum[r] += s_frag[r][c];
      }
#pragma unroll
      for (int c = 0; c < Traits::kOutColumns; ++c) o_frag[r][c] *= correction;
    }
  }

  // P to where the other threads of its rows find it.
  __device__ __forceinline__ void store_p() const {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const u32 row_smem = SharedStorage::p() + static_cast<u32>((row_begin + r) * Traits::kPRowBytes);
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        store_shared(row_smem + static_cast<u32>((lane_x + 16 * c) * Traits::kAccumulatorBytes), s_frag[r][c]);
      }
    }
  }

  // O += P V over one panel, whose first key is the tile's key `begin`.
  __device__ __forceinline__ void accumulate_p_v(int begin) {
    constexpr int kVectorBytes = Traits::kVector * Traits::kAccumulatorBytes;
    const u32 p_smem =
        SharedStorage::p() + static_cast<u32>(row_begin * Traits::kPRowBytes + begin * Traits::kAccumulatorBytes);
    const u32 v_smem = SharedStorage::v() + static_cast<u32>(lane_x * kVectorBytes);
#pragma unroll 1
    for (int key = 0; key < Traits::kPanelKeys; key += Traits::kStep) {
      Accumulator p_frag[Traits::kRows][Traits::kStep];
#pragma unroll
      for (int r = 0; r < Traits::kRows; ++r) {
        load_shared(p_frag[r], p_smem + static_cast<u32>(r * Traits::kPRowBytes + key * Traits::kAccumulatorBytes));
      }
#pragma unroll
      for (int i = 0; i < Traits::kStep; ++i) {
#pragma unroll
        for (int c = 0; c < Traits::kOutColumns; c += Traits::kVector) {
          Accumulator v_frag[Traits::kVector];
          load_shared(v_frag,
                      v_smem + static_cast<u32>((key + i) * Traits::kVRowBytes + 16 * c * Traits::kAccumulatorBytes));
#pragma unroll
          for (int r = 0; r < Traits::kRows; ++r) {
#pragma unroll
            for (int j = 0; j < Traits::kVector; ++j) o_frag[r][c + j] += p_frag[r][i] * v_frag[j];
          }
        }
      }
    }
  }

  // One tile of keys.
  template <bool kMasked>
  __device__ __forceinline__ void kv_step(int tile, bool is_whole) {
    const int first_key = tile * Config::kBlockN;
    compute_scores(first_key);
    if constexpr (ScoreFeatures<Config>::kAny) change_scores(first_key, is_whole);
    if constexpr (kMasked) mask_scores(first_key);
    online_softmax();
    if constexpr (Config::kDropout) drop_weights(first_key);
    store_p();
#pragma unroll 1
    for (int begin = 0; begin < Config::kBlockN; begin += Traits::kPanelKeys) {
      load_panel<Traits::kPanelKeys, Config::kHeadDimV, Traits::kVRowBytes>(SharedStorage::v(), v, first_key + begin,
                                                                            params.seqlen_k, 0, params.head_dim_v);
      isa::sync_threads();  // the V panel has arrived, and P
      accumulate_p_v(begin);
      isa::sync_threads();  // the V panel has been read
    }
  }

  // One of the thread's rows of O, times `factor`, from `destination` on.
  template <class Element>
  __device__ __forceinline__ void store_row(int r, Accumulator factor, typename Element::Storage* destination) const {
#pragma unroll
    for (int c = 0; c < Traits::kOutColumns; ++c) {
      const int column = (c / Traits::kVector * 16 + lane_x) * Traits::kVector + c % Traits::kVector;
      if (column < params.head_dim_v) Element::store(destination + column, o_frag[r][c] * factor);
    }
  }

  __device__ __forceinline__ void finish() {
    const auto out = work.rows_of<Config, Traits::Storage>(params, params.out);
    auto* lse = static_cast<Accumulator*>(Config::kSplit ? params.partial_lse : params.lse);
    auto* partial_out = static_cast<Accumulator*>(params.partial_out);
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      row_sum[r] = sum_of_lanes<16>(row_sum[r]);
      const int row = work.row_begin + row_begin + r;
      if (row < FwdWork::num_rows<Config>(params)) {
        const long long place = work.place_of<Config>(params, row);
        const auto end = end_row<Config>(row_max[r], row_sum[r], params, work.head_of<Config>(params, row));
        if constexpr (Config::kSplit) {
          store_row<Traits::AccumulatorElement>(r, end.factor, partial_out + place * params.head_dim_v);
        } else {
          store_row<Traits::Element>(r, end.factor, out.row(row));
        }
        // One of the row's 16 threads writes.
        if (lse != nullptr && lane_x == 0) Traits::AccumulatorElement::store(lse + place, end.lse);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads, 1)
    flash_fwd_simt(const __grid_constant__ FwdParams params) {
  const FwdWork work = FwdWork::of_block<Config>(params);
  Forward forward(params, work);
  const KeyTiles tiles = key_tiles<Config>(params, work);
  const TileMarks<Config> marks(params, work);
  for (int tile = marks.last_live(tiles.end - 1, tiles.begin); tile >= tiles.begin;
       tile = marks.last_live(tile - 1, tiles.begin)) {
    const bool is_whole = marks.of(tile) == 2;
    if (tiles.full_begin <= tile && tile < tiles.full_end) {
      forward.kv_step<false>(tile, is_whole);
    } else {
      forward.kv_step<true>(tile, is_whole);
    }
  }
  forward.finish();
}
