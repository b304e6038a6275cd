// Forward attention on Hopper's tensor cores, sm_90a: float16 and bfloat16. A draft: no GPU has run it yet.
//
//     S = scale Q K^T,  P = softmax over the keys that take part,  O = P V,  lse = log of the sum of exp(S)
//
// FlashAttention-2 (T. Dao, 2023, arXiv 2307.08691), Algorithm 1, as FlashAttention-3 arranges it for Hopper (J. Shah
// et al., 2024, arXiv 2407.08608, Algorithms 1 and 2): one warp does nothing but start copies, warpgroups do nothing
// but compute, and a warpgroup's softmax has the time of its own products. Rows, packing and splits are those of
// work.cuh, tiles of keys those of mask.cuh; the last tile of keys comes first, as in fwd_sm80.cu.
//
//                           keys ->   kBlockN   kBlockN
//     warpgroup 0: copies            +---------+---------+     A warp of a warpgroup owns 16 of its 64 rows, all
//     warpgroup 1: 64 rows, warps    |         |         |     columns of S and of O. A lane has two rows of each tile
//                  of 16 rows each   |    S    |    S    |     of 16 x 8, as with mma.sync: what softmax.cuh, mask.cuh
//     warpgroup 2: 64 rows           |         |         |     and score.cuh do with fragments they do here.
//                                    +---------+---------+
//
// What overlaps, within a warpgroup, j being the tile in hand and j - 1 the one before:
//
//     tensor cores   S(j) = Q K(j)^T | O += P(j-1) V(j-1)     | S(j+1) ..
//     the rest                       | max, exp, sum of S(j)  | O's rescaling, P(j) packed
//
// O is rescaled only where some row's maximum has grown by much (softmax.cuh). As compiled, a whole tile of 128 keys
// takes a warp 465 instructions at head dim 128, 401 if O is not rescaled; 475 and 411 with a causal mask. All its
// exponentials stand where the picture has them: tests/compile/test_hopper.py.
//
// With kOverlap off (what changes scores takes the registers that overlapping does) both products are waited for before
// the scores are touched, and warpgroups alone overlap with one another.
//
// Under the diagonal the first of two warpgroups needs half as many of the last 128 keys as the second one, or none of
// the last 64. With kTrims a warpgroup skips the tiles that its rows do not need, and of the first that they do it
// takes half where that is enough; P of half a tile makes its product with V half as long, so the first two kinds of
// steps are there twice. Counted, not measured: 3 % at 2048 keys and 1.6 % at 4096 if products and softmax take turns;
// nothing if everything overlaps, for then the L2 cache is the limit.
//
// At head dim 64 the exponentials take longer than the products: kExp2ByFma says of how many one is computed with
// multiply-adds (softmax.cuh), ten instructions in place of one. Of eight, counted and not measured: 6 % if products
// and softmax take turns, 3 % if everything overlaps. Elsewhere they are not the limit.
//
// With kPingPong warpgroups take turns at starting their products, so that one's products come together while another's
// softmax runs. FlashAttention-3 has lost by it where a warpgroup overlaps with itself: up to 4 % on an H200 at 128.
//
// What overlaps from one item to the next: the copying warp runs ahead by as much as the ring holds, and the next
// item's first K is there while O leaves; a warpgroup that is through with its rows gets the next Q while others
// compute. The launch says how many blocks there are, as many as run at once or one for each item: Items (work.cuh)
// says which block takes which. With kPersists off there is one for each: what changes scores, or gathers packed rows,
// takes the registers that a loop of items does; and where masks leave out tiles nobody knows what an item takes before
// it is done, so that the hardware deals them out better.
//
// Shared memory, in panels of 64 or 32 columns (warpgroup.cuh): a ring of kStages tiles of K, another one of V.
//
//     Q or O of warpgroup 1 | of warpgroup 2 | K0 | K1 | .. | V0 | V1 | .. | barriers
//
// O leaves through the place of its own warpgroup's Q, which nobody reads after the last Q K^T. Registers: the launch
// gives every thread the same number; the copying warpgroup hands most of its own to the others, whose threads keep
// O kHeadDimV / 2, S kBlockN / 2, and P kBlockN / 4.
//
// Who waits for what (barriers of shared memory, a phase for every use of a place; all are carried from item to item):
//
//     event                    who waits           how                            what it protects
//     barriers initialised     every thread        fence_mbarrier_init,           their use by copies and threads
//                                                  sync_threads
//     the last O has left, and the copying warp    mbarrier q_empty of the        overwriting q_smem, where O was
//     Q is asked for                               warpgroup
//     Q arrived                the warpgroup       mbarrier q_full of the         reading q_smem
//                                                  warpgroup
//     Q arrived, packed        the warpgroup       cp_async_wait,                 reading q_smem: no map describes such
//                                                  fence_proxy_async, barrier     rows, so their warpgroup copies them
//     K(j) arrived             every warpgroup     mbarrier k_full of the stage   reading k_smem
//     V(j) arrived             every warpgroup     mbarrier v_full of the stage   reading v_smem
//     S(j) is there, K(j) read the warpgroup       wgmma_wait<1>                  reading s_frag; giving K's stage back
//     K(j) read by all         the copying warp    mbarrier k_empty of the stage  overwriting k_smem
//     O is there, V(j-1) read  the warpgroup       wgmma_wait<0>                  rescaling o_frag, overwriting p_frag;
//                                                                                 giving V's stage back; staging O
//     V(j-1) read by all       the copying warp    mbarrier v_empty of the stage  overwriting v_smem
//     K(j), V(j) arrived, and  the warpgroup       mbarriers k_full and v_full    giving back what is not filled; no
//     are skipped                                  of the stage, barrier          warp may miss a phase: parity cannot
//                                                                                 tell it from the one after the next
//     turn to start products   the warpgroup       barrier of the warpgroup       nothing: it saves time (kPingPong)
//     O staged                 the warp's lanes    fence_proxy_async, sync_warp   copying o_smem out, by map
//     O read                   the copying lane    bulk_wait_read                 asking for Q, staging the next O, the
//                                                                                 end of shared memory
//     O staged, packed         the warp's lanes    sync_warp                      reading o_smem, chunk by chunk
//
// Not supported: arrays that no tensor map describes (build/bulk.py says which).
#include "isa.cuh"
#include "epilogue.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "warpgroup.cuh"
#include "work.cuh"

struct Traits {
  static constexpr int kConsumers = Config::kBlockM / 64;  // warpgroups that compute
  static constexpr int kNumThreads = 32 * Config::kNumWarps;
  static constexpr int kStages = Config::kStages;
  static constexpr int kAllKeys = Config::kBlockN;
  static constexpr int kHalfTheKeys = (Config::kBlockN / 2 + 15) / 16 * 16;
  static constexpr int kOutTiles = Config::kHeadDimV / 8;
  static constexpr bool kChangesScores = ScoreFeatures<Config>::kAny;
  static constexpr bool kOverlap = !kChangesScores && !Config::kDropout;
  static constexpr int kOneByFma = kOverlap ? Config::kExp2ByFma : 0;  // elsewhere other instructions are the limit
  static constexpr bool kPingPong = Config::kPingPong && kConsumers > 1;
  static constexpr bool kTrims = kOverlap && Config::kHasUpper;
  static constexpr bool kPersists = kOverlap && !Config::kPacked;
  using QTile = PanelTile<64, Config::kHeadDim>;
  using KTile = PanelTile<Config::kBlockN, Config::kHeadDim>;
  using VTile = PanelTile<Config::kBlockN, Config::kHeadDimV>;
  using OutTile = PanelTile<64, Config::kHeadDimV>;

  // Of 65536 in steps of 8; what the copying warpgroup gives up the others get. One consumer has all it can have.
  static constexpr bool kMovesRegisters = kConsumers > 1;
  static constexpr int kCopyRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kComputeRegisters = kConsumers == 2 ? 240 : 160;

  static_assert(Config::kBlockM % 64 == 0 && kConsumers <= 3, "a warpgroup owns 64 rows, and registers are for three");
  static_assert(Config::kNumWarps == 4 * (kConsumers + 1), "one warpgroup copies");
  static_assert(kStages > 1, "K of the next tile is copied before V of this one, which who skips it waits for");
  static_assert(Config::kBlockN % 16 == 0 && Config::kBlockN <= 256, "wgmma goes over the keys in steps of 16");
  static_assert(Config::kScaleFirst || !kChangesScores, "what is added to scores is not scaled");
};

// Addresses in shared memory; the picture above says what lies where.
struct SharedStorage {
  static constexpr int kQBytes = at_least(Traits::QTile::kBytes, Traits::OutTile::kBytes);
  static constexpr int kK = Traits::kConsumers * kQBytes;
  static constexpr int kV = kK + Traits::kStages * Traits::KTile::kBytes;
  static constexpr int kBarriers = kV + Traits::kStages * Traits::VTile::kBytes;
  static constexpr int kBytes = kBarriers + 8 * (2 * Traits::kConsumers + 4 * Traits::kStages);

  static __device__ __forceinline__ u32 at(int offset) { return isa::shared_base() + static_cast<u32>(offset); }
  static __device__ __forceinline__ u32 q(int consumer) { return at(consumer * kQBytes); }
  static __device__ __forceinline__ u32 out(int consumer) { return q(consumer); }
  static __device__ __forceinline__ u32 k(int stage) { return at(kK + stage * Traits::KTile::kBytes); }
  static __device__ __forceinline__ u32 v(int stage) { return at(kV + stage * Traits::VTile::kBytes); }

  static __device__ __forceinline__ u32 k_full(int stage) { return at(kBarriers + 8 * stage); }
  static __device__ __forceinline__ u32 k_empty(int stage) { return k_full(stage + Traits::kStages); }
  static __device__ __forceinline__ u32 v_full(int stage) { return k_full(stage + 2 * Traits::kStages); }
  static __device__ __forceinline__ u32 v_empty(int stage) { return k_full(stage + 3 * Traits::kStages); }
  static __device__ __forceinline__ u32 q_full(int consumer) { return k_full(consumer + 4 * Traits::kStages); }
  static __device__ __forceinline__ u32 q_empty(int consumer) { return q_full(consumer + Traits::kConsumers); }
};
static_assert(SharedStorage::kBytes == Config::kSharedBytes, "the launch asks for what the kernel uses");

// A place in a ring of stages, and the parity of the phase in which it is used: 0 the first time round.
struct Stage {
  int index = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++index == Traits::kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The tiles of keys that take part, from the last to the first. The warp that copies and those that compute walk alike.
struct KeyWalk {
  KeyTiles tiles;
  TileMarks<Config> marks;
  int tile;

  __device__ __forceinline__ KeyWalk(const FwdParams& params, const FwdWork& work)
      : tiles(key_tiles<Config>(params, work).share(work.split, params.num_splits)),
        marks(params, work),
        tile(marks.last_live(tiles.end - 1, tiles.begin)) {}

  __device__ __forceinline__ bool is_over() const { return tile < tiles.begin; }
  __device__ __forceinline__ bool is_at_least(int bound) const { return tile >= at_least(bound, tiles.begin); }
  __device__ __forceinline__ void advance() { tile = marks.last_live(tile - 1, tiles.begin); }
};

// The tensor maps of a launch.
struct Maps {
  const TensorMap& q;
  const TensorMap& k;
  const TensorMap& v;
};

// -----------------------------------------------------------------------------------------------------------
// The thread that copies: K(0), Q, K(1), V(0), K(2), V(1), ... as their places become free, item after item, where
// there are keys. Q is read once, K and V by the blocks of all the other queries too.

__device__ __forceinline__ void copy_q(const FwdParams& params, const FwdWork& work, const TensorMap& map, u32 parity) {
  const BulkPlace place = BulkPlace::of(params.q, work.head, work.batch);
#pragma unroll
  for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
    isa::mbarrier_wait(SharedStorage::q_empty(consumer), parity);
    const u32 full = SharedStorage::q_full(consumer);
    isa::mbarrier_arrive_expect_tx(full, Traits::QTile::kBytes);
    const int row = work.row_begin + 64 * consumer;
    load_panels<Traits::QTile>(SharedStorage::q(consumer), map, place, row, full, isa::l2_evict_first());
  }
}

__device__ __forceinline__ void copy_k(const TensorMap& map, const BulkPlace& place, int tile, Stage stage) {
  isa::mbarrier_wait(SharedStorage::k_empty(stage.index), stage.parity ^ 1);
  const u32 full = SharedStorage::k_full(stage.index);
  isa::mbarrier_arrive_expect_tx(full, Traits::KTile::kBytes);
  load_panels<Traits::KTile>(SharedStorage::k(stage.index), map, place, tile * Config::kBlockN, full,
                             isa::l2_evict_last());
}

__device__ __forceinline__ void copy_v(const TensorMap& map, const BulkPlace& place, int tile, Stage stage) {
  isa::mbarrier_wait(SharedStorage::v_empty(stage.index), stage.parity ^ 1);
  const u32 full = SharedStorage::v_full(stage.index);
  isa::mbarrier_arrive_expect_tx(full, Traits::VTile::kBytes);
  load_panels<Traits::VTile>(SharedStorage::v(stage.index), map, place, tile * Config::kBlockN, full,
                             isa::l2_evict_last());
}

__device__ __forceinline__ void copy_items(const FwdParams& params, const Maps& maps) {
  Stage stage;
  u32 q_parity = 0;
  for (Items items; items.are_left<Config, Traits::kPersists>(params); items.advance()) {
    const FwdWork work = FwdWork::of_item<Config>(params, items.item());
    KeyWalk walk(params, work);
    if (walk.is_over()) continue;
    const BulkPlace k_place = BulkPlace::of(params.k, work.head / params.group_size_k, work.batch);
    const BulkPlace v_place = BulkPlace::of(params.v, work.head / params.group_size_v, work.batch);
    // Once each in the text: the copying warps have registers for no more.
    int values_of = -1;  // the tile whose keys are on their way, and its values not yet
    Stage values_stage;
    do {
      const bool has_keys = !walk.is_over();
      if (has_keys) copy_k(maps.k, k_place, walk.tile, stage);
      if (values_of >= 0) {
        copy_v(maps.v, v_place, values_of, values_stage);
      } else {
        if constexpr (!Config::kPacked) copy_q(params, work, maps.q, q_parity);
      }
      values_of = has_keys ? walk.tile : -1;
      values_stage = stage;
      if (has_keys) {
        walk.advance();
        stage.advance();
      }
    } while (values_of >= 0);
    q_parity ^= 1;
  }
}

// -----------------------------------------------------------------------------------------------------------
// A warpgroup that computes.

struct Forward {
  const FwdParams& params;
  const ModArgs& mods;
  float scale_log2;
  Stage stage;       // of the tile in hand
  Stage last_stage;  // of the one before, whose values are still to come
  u32 q_parity;

  // Of the item in hand.
  FwdWork work;
  int consumer;  // which warpgroup
  int row;       // the first of the warp's rows
  float o_frag[Traits::kOutTiles][4];
  u32 p_frag[Config::kBlockN / 16][4];
  RowState state;

  __device__ __forceinline__ Forward(const FwdParams& params, const ModArgs& mods)
      : params(params),
        mods(mods),
        scale_log2(static_cast<float>(params.scale) * kLog2E),
        q_parity(0),
        consumer(consumer_index()) {}

  // The compiler sees that all lanes have the same only of what came from one of them. Descriptors then stay in the
  // registers from which wgmma takes them; where it does not see it, after a loop around the loop, it has every product
  // waited for by itself.
  static __device__ __forceinline__ u32 of_all_lanes(u32 value) { return isa::shuffle_idx(value, 0); }
  static __device__ __forceinline__ int consumer_index() {
    return static_cast<int>(of_all_lanes(isa::warp_index() / 4 - 1));
  }
  static __device__ __forceinline__ int first_row(const FwdWork& work) {
    return work.row_begin + 16 * (isa::warp_index() - 4);
  }

  __device__ __forceinline__ void run(const TensorMap& out_map) {
    if (consumer == Traits::kConsumers - 1) pass_turn();  // the first one has the first turn
    for (Items items; items.are_left<Config, Traits::kPersists>(params); items.advance()) {
      begin(items.item());
      compute(KeyWalk(params, work));
      finish(items.item(), out_map);
    }
    if (consumer == 0) await_turn();  // the last one has passed on a turn that nobody takes
  }

  __device__ __forceinline__ void begin(int item) {
    if constexpr (Traits::kPersists) {
      consumer = consumer_index();
      stage = {static_cast<int>(of_all_lanes(stage.index)), of_all_lanes(stage.parity)};
    }
    work = FwdWork::of_item<Config>(params, item);
    row = first_row(work);
    state = RowState::start();
#pragma unroll
    for (int n = 0; n < Traits::kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o_frag[n][i] = 0.0f;
    }
  }

  // Packed rows are copied by the warpgroup that reads them.
  __device__ __forceinline__ void receive_q() {
    if constexpr (Config::kPacked) {
      const int num_rows = FwdWork::num_rows<Config>(params);
      copy_panels<Traits::QTile>(SharedStorage::q(consumer), work.rows_of<Config, u16>(params, params.q),
                                 work.row_begin + 64 * consumer, num_rows, params.head_dim);
      isa::cp_async_commit();
      isa::cp_async_wait<0>();
      isa::fence_proxy_async();              // what this thread has written, to be read by wgmma,
      isa::barrier_sync(1 + consumer, 128);  // and what the warpgroup's others have
    } else {
      if (isa::elect_one()) isa::mbarrier_arrive(SharedStorage::q_empty(consumer));  // this warp's O has left
      isa::mbarrier_wait(SharedStorage::q_full(consumer), q_parity);
      q_parity ^= 1;
    }
  }

  // S = Q K(j)^T
  template <int kScoreTiles>
  __device__ __forceinline__ void start_scores(float (&s_frag)[kScoreTiles][4]) {
    isa::mbarrier_wait(SharedStorage::k_full(stage.index), stage.parity);
    isa::wgmma_fence();
    const u64 k = Traits::KTile::nth(Traits::KTile::operand(SharedStorage::k(0)), stage.index);
    start_q_k<Config, Traits::QTile, Traits::KTile>(s_frag, Traits::QTile::operand(SharedStorage::q(consumer)), k);
    isa::wgmma_commit();
  }

  // O += P(j-1) V(j-1)
  template <int kKeys>
  __device__ __forceinline__ void start_out() {
    isa::mbarrier_wait(SharedStorage::v_full(last_stage.index), last_stage.parity);
    const u64 v = Traits::VTile::nth(Traits::VTile::operand_trans(SharedStorage::v(0)), last_stage.index);
    start_p_v<Config, Traits::VTile, kKeys>(o_frag, p_frag, v);
    isa::wgmma_commit();
  }

  // Barriers 1 to 3 are for packed rows and skipped tiles, 4 to 6 for turns: of a warpgroup and of the one before it.
  __device__ __forceinline__ void await_turn() {
    if constexpr (Traits::kPingPong) isa::barrier_sync(4 + consumer, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (Traits::kPingPong) isa::barrier_arrive(4 + (consumer + 1) % Traits::kConsumers, 256);
  }

  // After a wait for the products that read a tile; one thread speaks for the warpgroup.
  __device__ __forceinline__ void give_back(u32 empty) {
    if (isa::thread_index() % 128 == 0) isa::mbarrier_arrive(empty);
  }

  __device__ __forceinline__ void next_stage() {
    last_stage = stage;
    stage.advance();
  }

  // From Q K^T to P, not yet packed.
  template <int kScoreTiles>
  __device__ __forceinline__ void weigh(float (&s_frag)[kScoreTiles][4], float (&correction)[2], int tile, bool is_full,
                                        bool is_whole) {
    const int first_key = tile * Config::kBlockN;
    if constexpr (Config::kScaleFirst) scale_scores(s_frag, static_cast<float>(params.scale));
    if constexpr (Traits::kChangesScores) {
      if (row < FwdWork::num_rows<Config>(params)) {  // warps without rows have nothing to look up
        change_scores<Config>(s_frag, params, mods, work, row, first_key, is_whole);
      }
    }
    if (!is_full) mask_scores<Config>(s_frag, params, row, first_key);
    next_weights<Config::kScaleFirst, true, Traits::kOneByFma>(s_frag, state, correction, scale_log2);
    if constexpr (Config::kDropout) drop_weights<Config>(s_frag, params, work, row, first_key);
  }

  // The compiler may move a wait for products up, to before the exponentials that are to be computed meanwhile: no
  // exponential needs what is waited for. Where they decide a branch, it may not; their sum is never this number.
  __device__ __forceinline__ void finish_weights() {
    if (isa::any(state.row_sum[0] + state.row_sum[1] == -1.0f)) isa::nanosleep(1);
  }

  // The first tile, or the first kKeys keys of it.
  template <int kKeys>
  __device__ __forceinline__ void first_step(int tile, bool is_full, bool is_whole) {
    float s_frag[kKeys / 8][4];
    start_scores(s_frag);
    isa::wgmma_wait<0>();
    give_back(SharedStorage::k_empty(stage.index));
    float correction[2];  // of nothing
    weigh(s_frag, correction, tile, is_full, is_whole);
    pack_weights<Config>(p_frag, s_frag);
    next_stage();
  }

  // A tile of which no key takes part for the warpgroup's rows. Others read it, and it is given back by all.
  __device__ __forceinline__ void skip_step() {
    isa::mbarrier_wait(SharedStorage::k_full(stage.index), stage.parity);  // skipped
    isa::mbarrier_wait(SharedStorage::v_full(stage.index), stage.parity);  // skipped
    isa::barrier_sync(1 + consumer, 128);                                  // skipped
    give_back(SharedStorage::k_empty(stage.index));
    give_back(SharedStorage::v_empty(stage.index));
    next_stage();
  }

  // One tile of keys, and the values of the one before, of its first kKeys keys. is_full: all keys take part for all
  // rows, but for the bool mask and mask_mod; is_whole: those remove none of them.
  template <int kKeys>
  __device__ __forceinline__ void kv_step(int tile, bool is_full, bool is_whole) {
    float s_frag[Traits::kAllKeys / 8][4];
    await_turn();
    start_scores(s_frag);
    start_out<kKeys>();
    pass_turn();
    isa::wgmma_wait<Traits::kOverlap ? 1 : 0>();
    give_back(SharedStorage::k_empty(stage.index));
    float correction[2];
    weigh(s_frag, correction, tile, is_full, is_whole);
    if constexpr (Traits::kOverlap) {
      finish_weights();
      isa::wgmma_wait<0>();
    }
    give_back(SharedStorage::v_empty(last_stage.index));
    if (isa::any(correction[0] != 1.0f || correction[1] != 1.0f)) rescale(o_frag, correction);
    pack_weights<Config>(p_frag, s_frag);
    next_stage();
  }

  template <int kKeys>
  __device__ __forceinline__ void last_step() {
    isa::wgmma_fence();
    start_out<kKeys>();
    isa::wgmma_wait<0>();
    give_back(SharedStorage::v_empty(last_stage.index));
  }

  // From this key on none takes part for any of the warpgroup's rows.
  __device__ __forceinline__ int end_of_keys() const {
    const int last_row = at_most(work.row_begin + 64 * consumer + 63, FwdWork::num_rows<Config>(params) - 1);
    return key_end<Config>(params, FwdWork::query_of<Config>(params, last_row));
  }

  // Tiles to the right that the mask cuts, those that it leaves whole, those to the left that it cuts. Only with an
  // upper bound is any but the first of them cut on the right: by the end of the keys. Of half a tile's weights the
  // second step, or the last, makes half a product.
  __device__ __forceinline__ void compute(KeyWalk walk) {
    if (walk.is_over()) return;
    const KeyTiles tiles = walk.tiles;
    receive_q();
    bool has_begun = false;
    if constexpr (Traits::kTrims) {
      const int end = end_of_keys();
      if constexpr (!Traits::kPingPong) {  // turns are taken for every tile
        for (; !walk.is_over() && end <= walk.tile * Config::kBlockN; walk.advance()) skip_step();
        if (walk.is_over()) return;
      }
      has_begun = end <= walk.tile * Config::kBlockN + Traits::kHalfTheKeys;
      if (has_begun) {
        first_step<Traits::kHalfTheKeys>(walk.tile, false, true);
        walk.advance();
        if (walk.is_over()) return last_step<Traits::kHalfTheKeys>();
        kv_step<Traits::kHalfTheKeys>(walk.tile, false, true);
      }
    }
    if (!has_begun) {
      first_step<Traits::kAllKeys>(walk.tile, tiles.full_begin <= walk.tile && walk.tile < tiles.full_end,
                                   walk.marks.of(walk.tile) == 2);
    }
    walk.advance();
    if constexpr (Traits::kChangesScores) {
      for (; !walk.is_over(); walk.advance())
        kv_step<Traits::kAllKeys>(walk.tile, false, walk.marks.of(walk.tile) == 2);
    } else {
      if constexpr (Config::kHasUpper) {
        for (; walk.is_at_least(tiles.full_end); walk.advance()) kv_step<Traits::kAllKeys>(walk.tile, false, true);
      }
      for (; walk.is_at_least(tiles.full_begin); walk.advance()) kv_step<Traits::kAllKeys>(walk.tile, true, true);
      if constexpr (Config::kHasLower) {
        for (; !walk.is_over(); walk.advance()) kv_step<Traits::kAllKeys>(walk.tile, false, true);
      }
    }
    last_step<Traits::kAllKeys>();
  }

  __device__ __forceinline__ void finish(int item, const TensorMap& out_map) {
    // Found again rather than kept: the loop needs the registers.
    const FwdWork work = FwdWork::of_item<Config>(params, item);
    const int row = first_row(work);
    float lse[2];
    normalize<Config>(o_frag, lse, state, params, work, row);
    if (params.num_splits > 1) {
      store_part<Config>(params, work, o_frag, state, row);
      return;
    }
    if (params.lse != nullptr) store_lse<Config>(params, work, lse, row);
    if constexpr (Config::kPacked) {
      const auto out = work.rows_of<Config, u16>(params, params.out);
      const int num_rows = FwdWork::num_rows<Config>(params);
      store_out<Config, Traits::OutTile>(out, SharedStorage::out(consumer), o_frag, 16 * (isa::warp_index() % 4), row,
                                         num_rows, params.head_dim_v);
    } else {
      const BulkPlace place = BulkPlace::of(params.out, work.head, work.batch);
      store_out_panels<Config, Traits::OutTile>(out_map, place, row, SharedStorage::out(consumer),
                                                16 * (isa::warp_index() % 4), o_frag);
    }
  }
};

extern "C" __global__ void __launch_bounds__(Traits::kNumThreads, 1)
    flash_fwd_sm90(const __grid_constant__ FwdParams params, const __grid_constant__ ModArgs mods,
                   const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap out_map) {
  if (isa::thread_index() == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      isa::mbarrier_init(SharedStorage::k_full(stage), 1);
      isa::mbarrier_init(SharedStorage::v_full(stage), 1);
      isa::mbarrier_init(SharedStorage::k_empty(stage), Traits::kConsumers);
      isa::mbarrier_init(SharedStorage::v_empty(stage), Traits::kConsumers);
    }
    if constexpr (!Config::kPacked) {
      for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
        isa::mbarrier_init(SharedStorage::q_full(consumer), 1);
        isa::mbarrier_init(SharedStorage::q_empty(consumer), 4);  // its warps
      }
    }
    isa::fence_mbarrier_init();
  }
  isa::sync_threads();
  if (isa::warp_index() < 4) {
    if constexpr (Traits::kMovesRegisters) isa::setmaxnreg_dec<Traits::kCopyRegisters>();
    if (isa::warp_index() == 0) {
      if (isa::elect_one()) copy_items(params, {q_map, k_map, v_map});
    }
  } else {
    if constexpr (Traits::kMovesRegisters) isa::setmaxnreg_inc<Traits::kComputeRegisters>();
    Forward(params, mods).run(out_map);
  }
}
