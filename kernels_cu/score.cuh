// What happens to a score between Q K^T and the softmax, and to a weight before P V.
//
//     s = scale q k  ->  score_mod  ->  softcap tanh(s / softcap)  ->  + float mask  ->  - slope |i + shift - j|
//       ->  -inf where the bool mask, mask_mod or the band removes the key
//
// The order is the contract's (problem/mods.py). A score of -inf is a removal at whatever step it appears: tanh
// would make a number of it, and a bias of +inf a NaN. A float mask of -inf removes even over a NaN.
//
// Masks are read where they lie, element by element, with whatever strides they have: an L x S array is never
// made of a smaller one. Config says what there is:
//
//     FloatMask           the float mask's elements: Float16, BFloat16, float, double, or NoMask
//     kHasBoolMask
//     kChangesScores      softcap and ALiBi, which are told apart at run time
//     kDropout
//
// ScoreMod, MaskMod and ModArgs stand before this file: see mods.cuh.
#pragma once

#include "element.cuh"
#include "mask.cuh"
#include "mods.cuh"
#include "philox.cuh"
#include "sink.cuh"

template <class FloatMask>
struct MaskTraits : ElementTraits<FloatMask> {
  static constexpr bool kExists = true;
};
template <>
struct MaskTraits<NoMask> {
  static constexpr bool kExists = false;
  using Storage = u8;
};

template <class Config>
struct ScoreFeatures {
  static constexpr bool kHasFloatMask = MaskTraits<typename Config::FloatMask>::kExists;
  // The scores are more than scale q k and the band.
  static constexpr bool kAny =
      kHasFloatMask || Config::kHasBoolMask || Config::kChangesScores || !ScoreMod::kIdentity || !MaskMod::kIdentity;
};

// The first element of a query's row of an array over scores.
template <class Storage>
__device__ __forceinline__ const Storage* row_of_mask(const FwdParams& params, const Mask& mask, int batch, int head,
                                                      int row) {
  long long offset = head * mask.head_stride + row * mask.row_stride;
#pragma unroll
  for (int axis = kBatchAxes - 1; axis >= 0; --axis) {
    offset += batch % params.batch_shape[axis] * mask.batch_strides[axis];
    batch /= params.batch_shape[axis];
  }
  return static_cast<const Storage*>(mask.data) + offset;
}

// What is known of the block's tiles of keys from the summaries of the bool mask and of mask_mod: see mask_summary.cu
// and mod_summary.cu.
template <class Config>
struct TileMarks {
  const ScoreParams& scores;
  // Null: nothing is known.
  const u8* mask_marks;
  const u8* mod_marks;

  __device__ __forceinline__ TileMarks(const FwdParams& params, const FwdWork& work)
      : scores(params.scores), mask_marks(nullptr), mod_marks(nullptr) {
    const int tile_row = work.row_begin / Config::kBlockM;
    if constexpr (Config::kHasBoolMask) {
      if (scores.summary.data != nullptr) {
        mask_marks = row_of_mask<u8>(params, scores.summary, work.batch, work.head, tile_row);
      }
    }
    if constexpr (!MaskMod::kIdentity) {
      if (scores.mod_marks.data != nullptr) {
        const int group = work.head / FwdWork::heads_per_tile<Config>(params);
        mod_marks = scores.mod_marks.data + work.batch * scores.mod_marks.batch_stride +
                    group * scores.mod_marks.group_stride + tile_row * scores.mod_marks.row_stride;
      }
    }
  }

  // 0: no key takes part for any row; 2: all do for all; 1: anything else.
  __device__ __forceinline__ u32 of(int tile) const {
    u32 mark = 2;
    if constexpr (Config::kHasBoolMask) {
      mark = mask_marks == nullptr ? 1 : isa::ldg_1(mask_marks + tile * scores.summary.column_stride);
    }
    if constexpr (!MaskMod::kIdentity) {
      const u32 mod_mark = mod_marks == nullptr ? 1 : isa::ldg_1(mod_marks + tile);
      mark = mod_mark < mark ? mod_mark : mark;
    }
    return mark;
  }

  // The last tile up to `tile` that any key of takes part; begin - 1 if there is none.
  __device__ __forceinline__ int last_live(int tile, int begin) const {
    if constexpr (Config::kHasBoolMask || !MaskMod::kIdentity) {
      while (tile >= begin && of(tile) == 0) --tile;
    }
    return tile;
  }
};

// One query's scores. Keys beyond the sequence are not looked up; their scores are whatever they were.
template <class Config>
struct ScoreRow {
  using FloatMask = MaskTraits<typename Config::FloatMask>;
  using Real = typename ElementTraits<typename Config::Element>::Accumulator;

  const FwdParams& params;
  const ModArgs& mods;
  int batch;
  int head;
  int query;
  const typename FloatMask::Storage* float_mask;
  const u8* bool_mask;  // null: every key of the tile takes part
  Real slope;
  int position;  // of the query on the axis of keys

  // Rows beyond the last query are treated as the last: they may be read, and are not written. is_whole: neither the
  // bool mask nor mask_mod removes any of the keys that will be asked for.
  __device__ __forceinline__ ScoreRow(const FwdParams& params, const ModArgs& mods, int batch, int head, int row_query,
                                      bool is_whole)
      : params(params), mods(mods), batch(batch), head(head), query(at_most(row_query, params.seqlen_q - 1)) {
    const ScoreParams& scores = params.scores;
    if constexpr (ScoreFeatures<Config>::kHasFloatMask) {
      float_mask = row_of_mask<typename FloatMask::Storage>(params, scores.float_mask, batch, head, query);
    }
    if constexpr (Config::kHasBoolMask) {
      bool_mask = is_whole ? nullptr : row_of_mask<u8>(params, scores.bool_mask, batch, head, query);
    }
    if constexpr (Config::kChangesScores) {
      position = query + scores.shift;
      slope = 0;
      if (scores.alibi_slopes != nullptr) {
        slope = isa::bits_float(isa::ldg_4(scores.alibi_slopes + batch * scores.alibi_batch_stride + head));
      }
    }
  }

  __device__ __forceinline__ Real modded(Real score, int key) const {
    return ScoreMod::apply(score, Coord{batch, head, query, key}, mods);
  }

  // softcap tanh(s / softcap), in which a removal stays one.
  __device__ __forceinline__ Real capped(Real score) const {
    if constexpr (Config::kChangesScores) {
      const Real softcap = static_cast<Real>(params.scores.softcap);
      if (params.scores.softcap != 0.0 && score != negative_infinity()) {
        return softcap * hyperbolic_tangent(score / softcap);
      }
    }
    return score;
  }

  // Whether mask_mod keeps a key; to be asked where the row is not whole.
  __device__ __forceinline__ bool keeps(int key) const { return MaskMod::apply(Coord{batch, head, query, key}, mods); }

  // From scale q k to what the softmax is taken of, but for mask_mod: that has a loop of its own, so that what it reads
  // for the row is read once.
  __device__ __forceinline__ Real operator()(Real score, int key) const {
    const ScoreParams& scores = params.scores;
    const Real minus_infinity = negative_infinity();
    const bool exists = key < params.seqlen_k;
    score = capped(modded(score, key));
    // Whatever is added to a removal.
    bool removed = false;
    if constexpr (Config::kChangesScores || ScoreFeatures<Config>::kHasFloatMask) removed = score == minus_infinity;
    if constexpr (ScoreFeatures<Config>::kHasFloatMask) {
      if (exists) {
        const Real bias = FloatMask::load(float_mask + key * scores.float_mask.column_stride);
        removed = removed || bias == minus_infinity;
        score += bias;
      }
    }
    if constexpr (Config::kChangesScores) {
      const int distance = key < position ? position - key : key - position;
      if (scores.alibi_slopes != nullptr) score -= slope * static_cast<Real>(distance);
    }
    if constexpr (Config::kHasBoolMask) {
      if (exists && bool_mask != nullptr)
        removed = removed || isa::ldg_1(bool_mask + key * scores.bool_mask.column_stride) == 0;
    }
    return removed ? minus_infinity : score;
  }
};

// From a row's maximum and sum of weights to its end. A row without keys has factor 0 and lse -inf. Of a part of its
// keys the sink is left out.
template <class Config, class Real>
__device__ __forceinline__ RowEnd<Real> end_row(Real row_max, Real row_sum, const FwdParams& params, int head,
                                                bool is_part) {
  RowEnd<Real> end = {negative_infinity(), 0};
  if (row_sum != 0) end = {row_max + natural_log(row_sum), 1 / row_sum};
  const ScoreParams& scores = params.scores;
  if (scores.sinks != nullptr && !is_part) {
    end = add_sink<typename Config::Element>(end, scores.sinks, scores.sinks_are_float != 0, head);
  }
  if constexpr (Config::kDropout) end.factor *= static_cast<Real>(scores.dropout_scale);
  return end;
}

__device__ __forceinline__ u64 dropout_seed(const ScoreParams& scores) {
  if (scores.seed_data == nullptr) return scores.seed;
  const uint2 words = isa::ldg_8(scores.seed_data);
  return static_cast<u64>(words.y) << 32 | words.x;
}

// -----------------------------------------------------------------------------------------------------------
// The same for the fragments of tensor cores. row_begin and first_key are those of element (0, 0).

// Sets elements to `value`: those of tile n for which which(n) has a bit set. Of each 64 keys it is asked first, for one
// bit an element: a loop that is not unrolled is short, and holds what the question takes once, but may not index
// elements in registers.
template <class Config, class Which>
__device__ __forceinline__ void set_where(float (&frag)[Config::kBlockN / 8][4], float value, const Which& which) {
  constexpr int kTiles = Config::kBlockN / 8;
  constexpr int kTilesAtOnce = 8;
#pragma unroll
  for (int first = 0; first < kTiles; first += kTilesAtOnce) {
    const int num_tiles = at_most(kTiles - first, kTilesAtOnce);
    u32 bits = 0;
#pragma unroll 1
    for (int n = 0; n < num_tiles; ++n) bits |= which(first + n) << (4 * n);
#pragma unroll
    for (int n = 0; n < num_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (bits >> (4 * n + i) & 1) frag[first + n][i] = value;
      }
    }
  }
}

// Sets scores of keys that mask_mod removes to -inf.
template <class Config>
__device__ __forceinline__ void remove_scores(float (&s_frag)[Config::kBlockN / 8][4], const FwdParams& params,
                                              const ModArgs& mods, const FwdWork& work, int row_begin, int first_key) {
  const int lane = isa::lane_index();
  set_where<Config>(s_frag, negative_infinity(), [&](int n) {
    u32 removed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row_begin + acc_row(lane, i);
      const Coord at = {work.batch, work.head_of<Config>(params, row), FwdWork::query_of<Config>(params, row),
                        first_key + 8 * n + acc_column(lane, i)};
      if (!MaskMod::apply(at, mods)) removed |= 1u << i;
    }
    return removed;
  });
}

// From scale q k to what the softmax is taken of, but for the band.
template <class Config>
__device__ __forceinline__ void change_scores(float (&s_frag)[Config::kBlockN / 8][4], const FwdParams& params,
                                              const ModArgs& mods, const FwdWork& work, int row_begin, int first_key,
                                              bool is_whole) {
  // Compilers would look up for all scores at once, which takes more registers than there are where a lane has many, or
  // half as many beside a wide O. A branch that is the same for all lanes keeps them from it.
  constexpr bool kIsCrowded = Config::kBlockN > 64 || (Config::kBlockN == 64 && Config::kHeadDimV > 192);
  constexpr bool kInTurn = ScoreMod::kLooksUpByKey || (ScoreFeatures<Config>::kHasFloatMask && kIsCrowded);
  const int lane = isa::lane_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_begin + acc_row(lane, 2 * half);
    const int head = work.head_of<Config>(params, row);
    const ScoreRow<Config> scores(params, mods, work.batch, head, FwdWork::query_of<Config>(params, row), is_whole);
#pragma unroll
    for (int n = 0; n < Config::kBlockN / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        if constexpr (kInTurn) {
          if (first_key + 8 * n + i % 2 >= params.seqlen_k) continue;
        }
        s_frag[n][i] = scores(s_frag[n][i], first_key + 8 * n + acc_column(lane, i));
      }
    }
  }
  if constexpr (!MaskMod::kIdentity) {
    if (!is_whole) remove_scores<Config>(s_frag, params, mods, work, row_begin, first_key);
  }
}

// Sets weights that dropout drops to 0; what is kept is scaled at the row's end. A lane's 2 x 2 elements of an
// m16n8 tile are the four words of one draw.
template <class Config>
__device__ __forceinline__ void drop_weights(float (&p_frag)[Config::kBlockN / 8][4], const FwdParams& params,
                                             const FwdWork& work, int row_begin, int first_key) {
  static_assert(!Config::kPacked, "a tile's rows are queries of one head");
  const ScoreParams& scores = params.scores;
  const int lane = isa::lane_index();
  const u64 seed = dropout_seed(scores);
  const u64 head = static_cast<u64>(work.batch) * params.num_heads_q + work.head;
  set_where<Config>(p_frag, 0.0f, [&](int n) {
    const PhiloxWords drawn =
        dropout_words(seed, head, row_begin + acc_row(lane, 0), first_key + 8 * n + acc_column(lane, 0));
    u32 dropped = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (drawn.words[i] < scores.dropout_threshold) dropped |= 1u << i;
    }
    return dropped;
  });
}
