// The scores of attention at one stage, or its weights: the L x S matrix that the other kernels never make.
//
//     raw      S = scale Q K^T
//     modded   score_mod(S)
//     capped   softcap tanh(S / softcap)
//     biased   + float mask, ALiBi; -inf where a mask, mask_mod or the band removes the key
//     softmax  P = exp(S - lse), with the lse of a forward pass that ran before: the sinks are in it
//     dropout  the same, with dropped weights 0 and the others times 1 / (1 - p), if Config::kDropout
//
// (A. Vaswani et al., 2017, arXiv 1706.03762, eq. 1.) Scores are written as accumulators (float, for double double),
// weights as the query's elements. All is computed here up to the stage: the matrix is written once and never read.
//
//             keys ->                         A block owns kBlockM rows of queries and some of the tiles of keys, which
//                x   x+16   x+32   x+48       it writes one after the other. 16 x 16 threads; thread (y, x) has the
//     kRows y  [ s    s      s      s  ]      kRows rows from kRows y on, and of each every 16th column from x on: the
//              [ s    s      s      s  ]      16 threads of a row write neighbours.
//
// A weight is off by as much of itself as its lse is by rounding: 2^-24 |lse|, and ln 9 makes no difference to -1e30, the
// lse of nine keys with a bias of -1e30 each. For tiles with an lse beyond kCoarseLse, or less than its negative, the
// block therefore walks over all keys first, for maximum and sum.
//
// simt.cuh computes the scores, by multiply-adds: that is for looking at weights, and exact in every dtype.
//
// Shared memory: a panel of Q and one of K, 18 KiB. Registers: kRows * kBlockN / 16 accumulators of S, four for each
// row, and an operand's step.
//
// Who waits for what:
//
//     event                   who waits              how           what it protects
//     Q, K panels arrived     multiplying Q K^T      sync_threads  reading the panels
//     Q, K panels were read   copying the next       sync_threads  overwriting them
//
// A tile that the band removes whole is written without being computed. A row without keys has lse -inf and weights 0.
#include "isa.cuh"
#include "simt.cuh"

// Config::kStage; weights are those of "softmax" and "dropout".
constexpr int kRaw = 0;
constexpr int kModded = 1;
constexpr int kCapped = 2;
constexpr int kBiased = 3;
constexpr int kWeights = 4;

struct Traits : SimtTraits<Config> {
  static constexpr bool kIsBiased = Config::kStage >= kBiased;
  static constexpr bool kIsWeights = Config::kStage == kWeights;
  using Written = ElementTraits<typename Config::Written>;

  // Up to here the rounding of an lse moves a weight by no more than four roundings do.
  static constexpr int kCoarseLse = 4;

  static_assert(Config::kStage != kRaw || !ScoreFeatures<Config>::kAny, "nothing changes a raw score");
  static_assert(kIsBiased || !(Config::kHasLower || Config::kHasUpper), "the band removes from the stage biased on");
  static_assert(kIsWeights || !Config::kDropout, "weights are dropped, scores are not");
};
static_assert(ScorePanels<Config>::kBytes == Config::kSharedBytes, "the launch asks for what the kernel uses");

struct Weights : ScoreTile<Config> {
  KeyTiles live;  // the others are removed whole
  // P = factor exp(S - offset)
  Accumulator offset[Traits::kRows];
  Accumulator factor[Traits::kRows];
  SimtSoftmax<Config> softmax;  // of the walk

  __device__ __forceinline__ Weights(const FwdParams& params, const ModArgs& mods, const FwdWork& work)
      : ScoreTile<Config>(params, mods, work), live(key_tiles<Config>(params, work)) {}

  // S of a tile of keys, as far as the stage goes.
  __device__ __forceinline__ void compute_tile(int tile) {
    const int first_key = tile * Config::kBlockN;
    compute_scores(first_key);
    if constexpr (Config::kStage == kModded || Config::kStage == kCapped) cap_scores(first_key);
    if constexpr (Traits::kIsBiased && ScoreFeatures<Config>::kAny) change_scores(first_key, false);
    if constexpr (Traits::kIsBiased) mask_scores(first_key);
  }

  // By score_mod and softcap, as far as there are any.
  __device__ __forceinline__ void cap_scores(int first_key) {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const ScoreRow<Config> row(params, mods, work.batch, work.head, work.row_begin + row_begin + r, false);
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        s_frag[r][c] = row.capped(row.modded(s_frag[r][c], first_key + lane_x + 16 * c));
      }
    }
  }

  __device__ __forceinline__ void remove_tile() {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) s_frag[r][c] = negative_infinity();
    }
  }

  // Rows beyond the last query are treated as the last.
  __device__ __forceinline__ Accumulator lse_of(int row) const {
    const long long place = work.place_of<Config>(params, at_most(row, params.seqlen_q - 1));
    return Traits::AccumulatorElement::load(static_cast<const Accumulator*>(params.lse) + place);
  }

  // The same answer in all threads of the block: each warp looks at all of the tile's rows.
  __device__ __forceinline__ bool is_lse_coarse() const {
    Accumulator largest = 0;
#pragma unroll
    for (int row = 0; row < Config::kBlockM; row += 32) {
      const Accumulator lse = lse_of(work.row_begin + row + isa::lane_index());
      if (lse != negative_infinity()) largest = larger(largest, lse < 0 ? -lse : lse);
    }
    return largest_of_lanes<32>(largest) > Traits::kCoarseLse;
  }

  __device__ __forceinline__ void use_lse() {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const Accumulator lse = lse_of(work.row_begin + row_begin + r);
      const Accumulator kept = Config::kDropout ? static_cast<Accumulator>(params.scores.dropout_scale) : 1;
      set_row(r, lse, kept);
    }
  }

  __device__ __forceinline__ void use_sums() {
    softmax.finish();
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      set_row(r, softmax.row_max[r],
              end_row<Config>(softmax.row_max[r], softmax.row_sum[r], params, work.head, false).factor);
    }
  }

  // Without keys it is all 0: -inf - -inf is not -inf.
  __device__ __forceinline__ void set_row(int r, Accumulator row_offset, Accumulator row_factor) {
    const bool has_keys = row_offset != negative_infinity();
    offset[r] = has_keys ? row_offset : Accumulator(0);
    factor[r] = has_keys ? row_factor : Accumulator(0);
  }

  // S to P in place, but for the factor.
  __device__ __forceinline__ void compute_weights() {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) s_frag[r][c] = exponential(s_frag[r][c] - offset[r]);
    }
  }

  __device__ __forceinline__ void store_tile(int tile) const {
    auto* written = static_cast<Traits::Written::Storage*>(params.weights);
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int row = work.row_begin + row_begin + r;
      if (row < params.seqlen_q) {
        auto* row_gmem = written + work.place_of<Config>(params, row) * params.seqlen_k;
#pragma unroll
        for (int c = 0; c < Traits::kColumns; ++c) {
          const int key = tile * Config::kBlockN + lane_x + 16 * c;
          const Accumulator value = Traits::kIsWeights ? factor[r] * s_frag[r][c] : s_frag[r][c];
          if (key < params.seqlen_k) Traits::Written::store(row_gmem + key, value);
        }
      }
    }
  }

  __device__ __forceinline__ void sum_tile() {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) softmax.update(s_frag[r], r);
  }

  // Writes tiles of keys, after a walk over all that are live if need be: one loop for both, so that the code that
  // computes scores is there once.
  __device__ __forceinline__ void run(int begin, int end) {
    int num_walked = 0;
    if constexpr (Traits::kIsWeights) {
      use_lse();
      if (is_lse_coarse()) num_walked = live.end - live.begin;
    }
#pragma unroll 1
    for (int step = 0; step < num_walked + end - begin; ++step) {
      const bool is_walk = step < num_walked;
      const int tile = is_walk ? live.begin + step : begin + step - num_walked;
      if (live.begin <= tile && tile < live.end) {
        compute_tile(tile);
      } else {
        remove_tile();
      }
      if (is_walk) {
        sum_tile();
        if (step == num_walked - 1) use_sums();
        continue;
      }
      if constexpr (Traits::kIsWeights) compute_weights();
      if constexpr (Config::kDropout) drop_weights(tile * Config::kBlockN);
      store_tile(tile);
    }
  }
};

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads, 1)
    flash_weights(const __grid_constant__ FwdParams params, const __grid_constant__ ModArgs mods) {
  // Here num_splits blocks share the keys of a tile of rows: equal parts, the last ones shorter or empty.
  const int block = isa::block_index_x();
  const FwdWork work = FwdWork::of_tile<Config>(params, block / params.num_splits, 0);
  const int num_tiles = (params.seqlen_k + Config::kBlockN - 1) / Config::kBlockN;
  const int share = (num_tiles + params.num_splits - 1) / params.num_splits;
  const int begin = block % params.num_splits * share;
  const int end = at_most(begin + share, num_tiles);
  Weights(params, mods, work).run(begin, end);
}
