// Forward attention for sm_80 and later: float16 and bfloat16, mma.sync and cp.async.
//
//     S = scale Q K^T,  P = softmax over the keys that take part,  O = P V,  lse = log of the sum of exp(S)
//
// FlashAttention-2 (T. Dao, 2023, arXiv 2307.08691), Algorithm 1: a block keeps one tile of queries and walks
// over the keys from the last tile to the first, so that S and P never leave the registers.
//
//            keys ->   kBlockN   kBlockN             A warp owns 16 of the kBlockM rows, all columns of S
//                     +---------+---------+          and all columns of O: the softmax needs no other warp.
//     16 warp 0       |         |         |
//     16 warp 1       |    S    |    S    |   ...
//     ..              |         |         |
//                     +---------+---------+
//
// Shared memory, in tiles of kBlockN rows of kHeadDim elements:
//
//     K0 | K1 | V        K is double-buffered, V is not: its copy has the time of Q K^T and of the softmax
//          ^^^^^^^^      Q lies here until the warps have it in registers, before the first copy to K1 or V
//     ^^^^^^^            O is staged here on its way out: after the last Q K^T nobody reads K
//
// Registers per thread: O kHeadDim / 2, S kBlockN / 2, Q kHeadDim / 4, and P packed while O is updated.
//
// Who waits for what (j is the tile of keys in hand):
//
//     event                      who waits               how                          what it protects
//     Q arrived                  every warp              cp_async_wait, sync_threads  reading q_smem
//     K(j) arrived               every warp, step's top  cp_async_wait, sync_threads  reading k_smem
//     V(j+1), K(j+1) were read   copying V(j), K(j-1)    the same sync_threads        overwriting them
//     Q was read (first step)    copying V(j), K(j-1)    the same sync_threads        overwriting q_smem
//     V(j) arrived               every warp, mid-step    cp_async_wait, sync_threads  reading v_smem
//     K(j) was read (last step)  staging O               the same sync_threads        overwriting k_smem
//     O staged                   the warp's own lanes    sync_warp                    reading o_smem
//
// Not supported: rows that do not start at multiples of 16 bytes; other head dims than 64 and 128 (any multiple
// of 64 compiles); float masks, score modifications, dropout.
#include "isa.cuh"
#include "epilogue.cuh"
#include "gemm.cuh"
#include "mask.cuh"
#include "softmax.cuh"
#include "work.cuh"

struct Traits {
  static constexpr int kNumThreads = 32 * Config::kNumWarps;
  static constexpr int kScoreTiles = Config::kBlockN / 8;
  static constexpr int kOutTiles = Config::kHeadDim / 8;
  using QTile = Tile<Config::kBlockM, Config::kHeadDim>;
  using KTile = Tile<Config::kBlockN, Config::kHeadDim>;

  static_assert(Config::kBlockM == 16 * Config::kNumWarps, "a warp owns 16 rows of queries");
  static_assert(Config::kBlockN % 16 == 0, "P V goes over the keys in steps of 16");
  static_assert(Config::kHeadDim % 64 == 0, "a row fills whole lines of 128 bytes");
  static_assert(Config::kBlockM <= 2 * Config::kBlockN, "Q fits where K1 and V will be, O where K0 and K1 were");
};

// Addresses in shared memory; the picture above says when each is in use.
struct SharedStorage {
  static constexpr int kBytes = 3 * Traits::KTile::kBytes;

  static __device__ __forceinline__ u32 k(int buffer) {
    return isa::shared_base() + static_cast<u32>(buffer * Traits::KTile::kBytes);
  }
  static __device__ __forceinline__ u32 v() { return k(2); }
  static __device__ __forceinline__ u32 q() { return k(1); }
  static __device__ __forceinline__ u32 out() { return k(0); }
};
static_assert(SharedStorage::kBytes == Config::kSharedBytes, "the launch asks for what the kernel uses");

struct Forward {
  const FwdParams& params;
  int row_begin;  // the first of the block's rows, in the sequence
  int warp_row;   // the first of the warp's rows, in the tile
  HeadRows<u16> k;
  HeadRows<u16> v;
  float scale_log2;

  u32 q_frag[Config::kHeadDim / 16][4];
  float o_frag[Traits::kOutTiles][4];
  RowState state;

  __device__ __forceinline__ Forward(const FwdParams& params, const FwdWork& work)
      : params(params),
        row_begin(work.row_begin),
        warp_row(16 * isa::warp_index()),
        k(head_rows<u16>(params, params.k, work.batch, work.head / params.group_size_k)),
        v(head_rows<u16>(params, params.v, work.batch, work.head / params.group_size_v)),
        scale_log2(static_cast<float>(params.scale) * kLog2E),
        state(RowState::start()) {
#pragma unroll
    for (int n = 0; n < Traits::kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o_frag[n][i] = 0.0f;
    }
  }

  // One group of copies: a tile of keys, or of values, into shared memory.
  __device__ __forceinline__ void copy_tile(u32 tile_smem, const HeadRows<u16>& rows, int tile) {
    load_tile<Traits::KTile, Traits::kNumThreads>(tile_smem, rows, tile * Config::kBlockN, params.seqlen_k);
    isa::cp_async_commit();
  }

  // Q into registers, and the first tile of K under way: to buffer 0, since Q lies in buffer 1.
  __device__ __forceinline__ void load_q(const FwdWork& work, int first_tile) {
    const auto q = work.rows_of<Config, u16>(params, params.q);
    load_tile<Traits::QTile, Traits::kNumThreads>(SharedStorage::q(), q, row_begin, params.seqlen_q);
    isa::cp_async_commit();
    copy_tile(SharedStorage::k(0), k, first_tile);
    isa::cp_async_wait<1>();
    isa::sync_threads();  // Q has arrived, every thread's part of it
#pragma unroll
    for (int kk = 0; kk < Config::kHeadDim / 16; ++kk) {
      load_a<Traits::QTile>(q_frag[kk], SharedStorage::q(), warp_row, kk);
    }
  }

  // One tile of keys. `step` counts from 0 and chooses K's buffer; the next tile is the one before this.
  template <bool kMasked>
  __device__ __forceinline__ void kv_step(int tile, int step, bool has_next) {
    isa::cp_async_wait<0>();
    isa::sync_threads();  // K(tile) has arrived; K and V of the last step, and Q, have been read
    copy_tile(SharedStorage::v(), v, tile);
    if (has_next) {
      copy_tile(SharedStorage::k((step + 1) % 2), k, tile - 1);
    } else {
      isa::cp_async_commit();  // an empty group, so that V's is the last but one in every step
    }

    float s_frag[Traits::kScoreTiles][4];
    multiply_q_k<Config, Traits::KTile>(s_frag, q_frag, SharedStorage::k(step % 2));
    if constexpr (Config::kScaleFirst) scale_scores(s_frag, static_cast<float>(params.scale));
    if constexpr (kMasked) {
      mask_scores<Config>(s_frag, params, row_begin + warp_row, tile * Config::kBlockN);
    }
    online_softmax<Config::kScaleFirst>(s_frag, o_frag, state, scale_log2);

    isa::cp_async_wait<1>();
    isa::sync_threads();  // V(tile) has arrived; all warps are done with K(tile)
    accumulate_p_v<Config, Traits::KTile>(o_frag, s_frag, SharedStorage::v());
  }

  __device__ __forceinline__ void finish() {
    // Found again rather than kept: the loop needs the registers.
    const FwdWork work = FwdWork::of_block<Config>(params);
    normalize(o_frag, state);
    const int row = row_begin + warp_row;
    if (params.lse != nullptr) {
      const long long head = static_cast<long long>(work.batch) * params.num_heads_q + work.head;
      const float max_scale = Config::kScaleFirst ? 1.0f : static_cast<float>(params.scale);
      store_lse(static_cast<float*>(params.lse) + head * params.seqlen_q, state, max_scale, row, params.seqlen_q);
    }
    const auto out = work.rows_of<Config, u16>(params, params.out);
    store_out<Config, Traits::QTile>(out, SharedStorage::out(), o_frag, warp_row, row, params.seqlen_q);
  }
};

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads)
    flash_fwd_sm80(const __grid_constant__ FwdParams params) {
  const FwdWork work = FwdWork::of_block<Config>(params);
  Forward forward(params, work);
  const KeyTiles tiles = key_tiles<Config>(params, work);
  if (tiles.begin < tiles.end) {
    forward.load_q(work, tiles.end - 1);
    for (int tile = tiles.end - 1, step = 0; tile >= tiles.begin; --tile, ++step) {
      const bool has_next = tile > tiles.begin;
      if (tiles.full_begin <= tile && tile < tiles.full_end) {
        forward.kv_step<false>(tile, step, has_next);
      } else {
        forward.kv_step<true>(tile, step, has_next);
      }
    }
  }
  forward.finish();
}
