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
// Not supported: head dims of values beyond kHeadDimV.
#include "isa.cuh"
#include "simt.cuh"

// `rows`, halved until they fit.
constexpr int rows_that_fit(int rows, int row_bytes, int bytes) {
  return rows * row_bytes <= bytes ? rows : rows_that_fit(rows / 2, row_bytes, bytes);
}

struct Traits : SimtTraits<Config> {
  static constexpr int kOutColumns = Config::kHeadDimV / 16;

  static constexpr int kPRowBytes = Config::kBlockN * kAccumulatorBytes + kPadding;
  // What one load from shared memory brings of a row of V.
  static constexpr int kVector = kOutColumns < kStep ? kOutColumns : kStep;
  static constexpr int kVRowBytes = Config::kHeadDimV * kAccumulatorBytes;
  static constexpr int kPanelKeys = rows_that_fit(Config::kBlockN, kVRowBytes, ScorePanels<Config>::kBytes);

  static_assert(Config::kHeadDimV % 16 == 0, "the 16 threads of a row have equal parts");
  static_assert(kOutColumns % kVector == 0 && kPanelKeys % kStep == 0, "loads are whole");
  static_assert(Config::kScaleFirst == false, "scores are scaled first anyway");
};

// Addresses in shared memory; the picture above says when each is in use.
struct SharedStorage {
  static constexpr int kBytes = ScorePanels<Config>::kBytes + Config::kBlockM * Traits::kPRowBytes;

  static __device__ __forceinline__ u32 v() { return isa::shared_base(); }
  static __device__ __forceinline__ u32 p() { return isa::shared_base() + ScorePanels<Config>::kBytes; }
};
static_assert(SharedStorage::kBytes == Config::kSharedBytes, "the launch asks for what the kernel uses");

struct Forward : ScoreTile<Config> {
  HeadRows<Traits::Storage> v;
  Accumulator o_frag[Traits::kRows][Traits::kOutColumns];
  SimtSoftmax<Config> softmax;

  __device__ __forceinline__ Forward(const FwdParams& params, const ModArgs& mods, const FwdWork& work)
      : ScoreTile<Config>(params, mods, work),
        v(head_rows<Traits::Storage>(params, params.v, work.batch, work.head / params.group_size_v)) {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Traits::kOutColumns; ++c) o_frag[r][c] = 0;
    }
  }

  // Turns the scores S into P in place, updates m and l, and rescales O for the new maximum.
  __device__ __forceinline__ void online_softmax() {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const Accumulator correction = softmax.update(s_frag[r], r);
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

  // One tile of keys. is_full: all keys take part for all rows, but for the bool mask and mask_mod; is_whole: those
  // remove none of them.
  __device__ __forceinline__ void kv_step(int tile, bool is_full, bool is_whole) {
    const int first_key = tile * Config::kBlockN;
    compute_scores(first_key);
    if constexpr (ScoreFeatures<Config>::kAny) change_scores(first_key, is_whole);
    if (!is_full) mask_scores(first_key);
    online_softmax();
    if constexpr (Config::kDropout) drop_weights(first_key);
    store_p();
#pragma unroll 1
    for (int begin = 0; begin < Config::kBlockN; begin += Traits::kPanelKeys) {
      load_panel<Config, Traits::kPanelKeys, Config::kHeadDimV, Traits::kVRowBytes>(
          SharedStorage::v(), v, first_key + begin, params.seqlen_k, 0, params.head_dim_v);
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
    auto* lse = static_cast<Accumulator*>(params.lse);
    auto* partial_lse = static_cast<Accumulator*>(params.partial_lse);
    auto* partial_out = static_cast<Accumulator*>(params.partial_out);
    const bool is_part = params.num_splits > 1;
    softmax.finish();
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int row = work.row_begin + row_begin + r;
      if (row < FwdWork::num_rows<Config>(params)) {
        const long long place = work.place_of<Config>(params, row);
        const int head = work.head_of<Config>(params, row);
        const auto end = end_row<Config>(softmax.row_max[r], softmax.row_sum[r], params, head, is_part);
        if (is_part) {
          store_row<Traits::AccumulatorElement>(r, end.factor, partial_out + place * params.head_dim_v);
          // One of the row's 16 threads writes.
          if (lane_x == 0) {
            Traits::AccumulatorElement::store(partial_lse + 2 * place, softmax.row_max[r]);
            Traits::AccumulatorElement::store(partial_lse + 2 * place + 1, softmax.row_sum[r]);
          }
        } else {
          store_row<Traits::Element>(r, end.factor, out.row(row));
          if (lse != nullptr && lane_x == 0) Traits::AccumulatorElement::store(lse + place, end.lse);
        }
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads, 1)
    flash_fwd_simt(const __grid_constant__ FwdParams params, const __grid_constant__ ModArgs mods) {
  const FwdWork work = FwdWork::of_block<Config>(params);
  Forward forward(params, mods, work);
  const KeyTiles tiles = key_tiles<Config>(params, work).share(work.split, params.num_splits);
  const TileMarks<Config> marks(params, work);
#pragma unroll 1
  for (int tile = marks.last_live(tiles.end - 1, tiles.begin); tile >= tiles.begin;
       tile = marks.last_live(tile - 1, tiles.begin)) {
    forward.kv_step(tile, tiles.full_begin <= tile && tile < tiles.full_end, marks.of(tile) == 2);
  }
  forward.finish();
}
