// The scores of attention at one stage, or its weights: the L x S matrix that the other kernels never make.
//
//     raw      S = scale Q K^T
//     capped   softcap tanh(S / softcap)
//     biased   + float mask, ALiBi; -inf where a mask or the band removes the key
//     softmax  P = exp(S - lse), with the lse of a forward pass that ran before: sinks are in it (A. Vaswani et al.,
//              2017, arXiv 1706.03762, eq. 1)
//     dropout  the same with dropped weights 0 and the others times 1 / (1 - p), if Config::kDropout
//
// Scores are written as accumulators (float, for double double), weights as the query's elements. Everything up to the
// stage is in this one kernel: the matrix is written once and not read.
//
//             keys ->                         A block owns one tile of kBlockM x kBlockN scores and nothing else, so
//                x   x+16   x+32   x+48       blocks are as many as there are tiles. 16 x 16 threads; thread (y, x) has
//     kRows y  [ s    s      s      s  ]      the kRows rows from kRows y on and of each every 16th column from x on:
//              [ s    s      s      s  ]      the 16 threads of a row write neighbours.
//
// simt.cuh computes the scores by multiply-adds: weights are looked at, not trained with, and writing them takes as
// long.
//
// Shared memory: a panel of Q and one of K, 18 KiB. Registers: kRows * kBlockN / 16 accumulators of S, and an operand's
// step.
//
// Who waits for what:
//
//     event                   who waits              how           what it protects
//     Q, K panels arrived     multiplying Q K^T      sync_threads  reading the panels
//     Q, K panels were read   copying the next       sync_threads  overwriting them
//
// A tile that the band removes whole is written without being computed. A row without keys has lse -inf and weights 0.
//
// Not supported: score_mod and mask_mod.
#include "isa.cuh"
#include "simt.cuh"

// Config::kStage; weights are those of "softmax" and "dropout".
constexpr int kRaw = 0;
constexpr int kCapped = 1;
constexpr int kBiased = 2;
constexpr int kWeights = 3;

struct Traits : SimtTraits<Config> {
  static constexpr bool kIsBiased = Config::kStage >= kBiased;
  static constexpr bool kIsWeights = Config::kStage == kWeights;
  using Written = ElementTraits<typename Config::Written>;

  static_assert(Config::kStage != kRaw || !ScoreFeatures<Config>::kAny, "nothing changes a raw score");
  static_assert(kIsBiased || !(Config::kHasLower || Config::kHasUpper), "the band removes from the stage biased on");
  static_assert(kIsWeights || !Config::kDropout, "weights are dropped, scores are not");
};
static_assert(ScorePanels<Config>::kBytes == Config::kSharedBytes, "the launch asks for what the kernel uses");

struct Weights : ScoreTile<Config> {
  int first_key;

  __device__ __forceinline__ Weights(const FwdParams& params, const FwdWork& work, int first_key)
      : ScoreTile<Config>(params, work), first_key(first_key) {}

  // A tile that no key of takes part for any query.
  __device__ __forceinline__ void remove_scores() {
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) s_frag[r][c] = negative_infinity();
    }
  }

  __device__ __forceinline__ void cap_scores() {
    const ScoreRow<Config> row(params, work.batch, work.head, work.row_begin, false);
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) s_frag[r][c] = row.capped(s_frag[r][c]);
    }
  }

  // S to P in place.
  __device__ __forceinline__ void compute_weights() {
    const auto* lse = static_cast<const Accumulator*>(params.lse);
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int row = at_most(work.row_begin + row_begin + r, params.seqlen_q - 1);
      const Accumulator row_lse = Traits::AccumulatorElement::load(lse + work.place_of<Config>(params, row));
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        const Accumulator weight = exponential(s_frag[r][c] - row_lse);
        s_frag[r][c] = row_lse == negative_infinity() ? Accumulator(0) : weight;
      }
    }
  }

  __device__ __forceinline__ void store() const {
    auto* weights = static_cast<Traits::Written::Storage*>(params.weights);
    const Accumulator factor = Config::kDropout ? static_cast<Accumulator>(params.scores.dropout_scale) : 1;
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int row = work.row_begin + row_begin + r;
      if (row < params.seqlen_q) {
        auto* row_gmem = weights + work.place_of<Config>(params, row) * params.seqlen_k;
#pragma unroll
        for (int c = 0; c < Traits::kColumns; ++c) {
          const int key = first_key + lane_x + 16 * c;
          if (key < params.seqlen_k) Traits::Written::store(row_gmem + key, s_frag[r][c] * factor);
        }
      }
    }
  }

  __device__ __forceinline__ void run(bool is_live) {
    if (is_live) {
      compute_scores(first_key);
      if constexpr (Config::kStage == kCapped) cap_scores();
      if constexpr (Traits::kIsBiased && ScoreFeatures<Config>::kAny) change_scores(first_key, false);
      if constexpr (Traits::kIsBiased) mask_scores(first_key);
    } else {
      remove_scores();
    }
    if constexpr (Traits::kIsWeights) compute_weights();
    if constexpr (Config::kDropout) drop_weights(first_key);
    store();
  }
};

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads, 1)
    flash_weights(const __grid_constant__ FwdParams params) {
  // Tiles of keys within tiles of queries within heads within batch entries.
  const int num_tiles = (params.seqlen_k + Config::kBlockN - 1) / Config::kBlockN;
  const int block = isa::block_index_x();
  const FwdWork work = FwdWork::of_block<Config>(params, block / num_tiles);
  const int tile = block % num_tiles;
  const KeyTiles live = key_tiles<Config>(params, work);
  Weights(params, work, tile * Config::kBlockN).run(live.begin <= tile && tile < live.end);
}
