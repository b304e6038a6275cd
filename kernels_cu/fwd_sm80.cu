// Forward attention on tensor cores with mma.sync: float16 and bfloat16 from sm_80 on, float16 on sm_75.
//
//     S = scale Q K^T,  P = softmax over the keys that take part,  O = P V,  lse = log of the sum of exp(S)
//
// FlashAttention-2 (T. Dao, 2023, arXiv 2307.08691), Algorithm 1: a block keeps one tile of rows and walks over
// the keys from the last tile to the first, so that S and P never leave the registers. A row is a query, or one
// of the queries of several heads (work.cuh); with splits, blocks share the keys of a tile of rows and leave
// partial results, which another kernel joins.
//
//            keys ->   kBlockN   kBlockN             A warp owns 16 of the kBlockM rows, all columns of S
//                     +---------+---------+          and all columns of O: the softmax needs no other warp.
//     16 warp 0       |         |         |
//     16 warp 1       |    S    |    S    |   ...
//     ..              |         |         |
//                     +---------+---------+
//
// Head dims E and Ev are padded with zeros to kHeadDim and kHeadDimV on their way into shared memory.
//
// Shared memory, Q in registers:         Q read anew in every step (large head dims: O needs the registers):
//
//     K0 | K1 | V                            Q | K0 | K1 | V
//          ^^^^^^^^  Q on its way in
//     ^^^^^^^        O on its way out        ^^^^^^^^^^^  O on its way out
//
// K is double-buffered, V is not: its copy has the time of Q K^T and of the softmax. Q lies in the place of K1 and
// V until the warps have it in registers, before the first copy to either; O in that of Q and K, for after the last
// Q K^T nobody reads these.
//
// Registers per thread: O kHeadDimV / 2, S kBlockN / 2, Q kHeadDim / 4 or none, and P packed while O is updated.
//
// Who waits for what (j is the tile of keys in hand):
//
//     event                      who waits               how                          what it protects
//     Q arrived (in registers)   every warp              cp_async_wait, sync_threads  reading q_smem
//     K(j), Q arrived            every warp, step's top  cp_async_wait, sync_threads  reading k_smem, q_smem
//     V(j+1), K(j+1) were read   copying V(j), K(j-1)    the same sync_threads        overwriting them
//     Q was read (first step)    copying V(j), K(j-1)    the same sync_threads        overwriting q_smem
//     V(j) arrived               every warp, mid-step    cp_async_wait, sync_threads  reading v_smem
//     K(j), Q were read (last)   staging O               the same sync_threads        overwriting k_smem, q_smem
//     O staged                   the warp's own lanes    sync_warp                    reading o_smem
//
// sm_75 has no cp.async: its copies are done when load_tile returns, and the sync_threads remain.
//
// Not supported: rows that do not start at multiples of 16 bytes.
#include "isa.cuh"
#include "epilogue.cuh"
#include "gemm.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "work.cuh"

struct Traits {
  static constexpr bool kAsync = Config::kBaseline >= 80;
  static constexpr int kNumThreads = 32 * Config::kNumWarps;
  static constexpr int kScoreTiles = Config::kBlockN / 8;
  static constexpr int kOutTiles = Config::kHeadDimV / 8;
  using QTile = Tile<Config::kBlockM, Config::kHeadDim>;
  using KTile = Tile<Config::kBlockN, Config::kHeadDim>;
  using VTile = Tile<Config::kBlockN, Config::kHeadDimV>;
  using OutTile = Tile<Config::kBlockM, Config::kHeadDimV>;

  static_assert(Config::kBlockM == 16 * Config::kNumWarps, "a warp owns 16 rows of queries");
  static_assert(Config::kBlockN % 16 == 0, "P V goes over the keys in steps of 16");
  static_assert(Config::kScaleFirst || !ScoreFeatures<Config>::kAny, "what is added to scores is not scaled");
};

// Addresses in shared memory; the picture above says when each is in use. Where K is narrow and V wide, O needs
// more than the place of K, and where tiles of keys are small, Q more than that of K1 and V.
struct SharedStorage {
  static constexpr int kFirstK = Config::kQInRegisters ? 0 : Traits::QTile::kBytes;
  static constexpr int kQ = Config::kQInRegisters ? Traits::KTile::kBytes : 0;
  static constexpr int kV = at_least(kFirstK + 2 * Traits::KTile::kBytes, Traits::OutTile::kBytes);
  static constexpr int kBytes = at_least(kV + Traits::VTile::kBytes, kQ + Traits::QTile::kBytes);

  static __device__ __forceinline__ u32 k(int buffer) {
    return isa::shared_base() + static_cast<u32>(kFirstK + buffer * Traits::KTile::kBytes);
  }
  static __device__ __forceinline__ u32 v() { return isa::shared_base() + kV; }
  static __device__ __forceinline__ u32 q() { return isa::shared_base() + kQ; }
  static __device__ __forceinline__ u32 out() { return isa::shared_base(); }
};
static_assert(SharedStorage::kBytes == Config::kSharedBytes, "the launch asks for what the kernel uses");

struct Forward {
  const FwdParams& params;
  const ModArgs& mods;
  const FwdWork& work;
  int row_begin;  // the first of the block's rows
  int warp_row;   // the first of the warp's rows, in the tile
  HeadRows<u16> k;
  HeadRows<u16> v;
  float scale_log2;

  QRows<Config, Traits::QTile> q;
  float o_frag[Traits::kOutTiles][4];
  RowState state;

  __device__ __forceinline__ Forward(const FwdParams& params, const ModArgs& mods, const FwdWork& work)
      : params(params),
        mods(mods),
        work(work),
        row_begin(work.row_begin),
        warp_row(16 * isa::warp_index()),
        k(head_rows<u16>(params, params.k, work.batch, work.head / params.group_size_k)),
        v(head_rows<u16>(params, params.v, work.batch, work.head / params.group_size_v)),
        scale_log2(static_cast<float>(params.scale) * kLog2E),
        q{SharedStorage::q(), warp_row, {}},
        state(RowState::start()) {
#pragma unroll
    for (int n = 0; n < Traits::kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o_frag[n][i] = 0.0f;
    }
  }

  // One group of copies each: a tile of keys, a tile of values.
  __device__ __forceinline__ void copy_k(int buffer, int tile) {
    const int first_key = tile * Config::kBlockN;
    load_tile<Config, Traits::KTile>(SharedStorage::k(buffer), k, first_key, params.seqlen_k, params.head_dim);
    if constexpr (Traits::kAsync) isa::cp_async_commit();
  }

  __device__ __forceinline__ void copy_v(int tile) {
    const int first_key = tile * Config::kBlockN;
    load_tile<Config, Traits::VTile>(SharedStorage::v(), v, first_key, params.seqlen_k, params.head_dim_v);
    if constexpr (Traits::kAsync) isa::cp_async_commit();
  }

  // Q, and the first tile of K under way: to buffer 0, since Q may lie in buffer 1.
  __device__ __forceinline__ void load_q(const FwdWork& work, int first_tile) {
    const auto rows = work.rows_of<Config, u16>(params, params.q);
    const int num_rows = FwdWork::num_rows<Config>(params);
    load_tile<Config, Traits::QTile>(SharedStorage::q(), rows, row_begin, num_rows, params.head_dim);
    if constexpr (Traits::kAsync && Config::kQInRegisters) isa::cp_async_commit();  // else with K
    copy_k(0, first_tile);
    if constexpr (Config::kQInRegisters) {
      if constexpr (Traits::kAsync) isa::cp_async_wait<1>();  // all but K
      isa::sync_threads();                                    // Q has arrived, every thread's part of it
      q.load();
    }
  }

  // One tile of keys, and the copy of the one after it, if there is one. `step` counts from 0 and chooses K's buffer;
  // is_full: all keys take part for all rows, but for the bool mask and mask_mod; is_whole: those remove none of them.
  __device__ __forceinline__ void kv_step(int tile, int step, bool is_full, bool is_whole, bool has_next, int next) {
    observe("tile", tile, is_full, is_whole);
    if constexpr (Traits::kAsync) isa::cp_async_wait<0>();
    isa::sync_threads();  // K(tile) has arrived; K and V of the last step, and Q, have been read
    copy_v(tile);
    if (has_next) {
      copy_k((step + 1) % 2, next);
    } else {
      if constexpr (Traits::kAsync) isa::cp_async_commit();  // so that V's group is the last but one in every step
    }

    float s_frag[Traits::kScoreTiles][4];
    multiply_q_k<Config, Traits::QTile, Traits::KTile>(s_frag, q, SharedStorage::k(step % 2));
    const int row = row_begin + warp_row;
    const int first_key = tile * Config::kBlockN;
    if constexpr (Config::kScaleFirst) scale_scores(s_frag, static_cast<float>(params.scale));
    if constexpr (ScoreFeatures<Config>::kAny) {
      // Warps without rows have nothing to look up; and a branch keeps the loads, many registers, from being moved up
      // among the products.
      if (row < FwdWork::num_rows<Config>(params)) {
        change_scores<Config>(s_frag, params, mods, work, row, first_key, is_whole);
      }
    }
    if (!is_full) mask_scores<Config>(s_frag, params, row, first_key);
    online_softmax<Config::kScaleFirst>(s_frag, o_frag, state, scale_log2);
    if constexpr (Config::kDropout) drop_weights<Config>(s_frag, params, work, row, first_key);

    if constexpr (Traits::kAsync) isa::cp_async_wait<1>();
    isa::sync_threads();  // V(tile) has arrived; all warps are done with K(tile)
    accumulate_p_v<Config, Traits::VTile>(o_frag, s_frag, SharedStorage::v());
    observe("output", o_frag);
  }

  __device__ __forceinline__ void finish() {
    // Found again rather than kept: the loop needs the registers.
    const FwdWork work = FwdWork::of_block<Config>(params);
    const int row = row_begin + warp_row;
    float lse[2];
    normalize<Config>(o_frag, lse, state, params, work, row);
    if (params.num_splits > 1) {
      // An end of its own: what the two could share would be more than the registers hold.
      store_part<Config>(params, work, o_frag, state, row);
      return;
    }
    if (params.lse != nullptr) store_lse<Config>(params, work, lse, row);
    const auto out = work.rows_of<Config, u16>(params, params.out);
    const int num_rows = FwdWork::num_rows<Config>(params);
    store_out<Config, Traits::OutTile>(out, SharedStorage::out(), o_frag, warp_row, row, num_rows, params.head_dim_v);
  }
};

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads, 1)
    flash_fwd_sm80(const __grid_constant__ FwdParams params, const __grid_constant__ ModArgs mods) {
  const FwdWork work = FwdWork::of_block<Config>(params);
  Forward forward(params, mods, work);
  const KeyTiles tiles = key_tiles<Config>(params, work).share(work.split, params.num_splits);
  const TileMarks<Config> marks(params, work);
  observe("block", work, tiles);
  int tile = marks.last_live(tiles.end - 1, tiles.begin);
  if (tile >= tiles.begin) forward.load_q(work, tile);
  for (int step = 0; tile >= tiles.begin; ++step) {
    const int next = marks.last_live(tile - 1, tiles.begin);
    const bool is_whole = marks.of(tile) == 2;
    const bool is_full = tiles.full_begin <= tile && tile < tiles.full_end;
    forward.kv_step(tile, step, is_full, is_whole, next >= tiles.begin, next);
    tile = next;
  }
  forward.finish();
}
