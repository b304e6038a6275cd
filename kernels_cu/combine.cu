// Joins the partial results of a split forward pass: attention over disjoint sets of keys, by their log-sum-exps.
//
//     m = max_s m_s,  w_s = exp(m_s - m) l_s,  l = sum_s w_s              (join.cuh)
//     O = sum_s (w_s / l) O_s,  lse = m + ln l
//
// That is the recurrence of FlashAttention-2 (T. Dao, 2023, arXiv 2307.08691), Algorithm 1, over parts instead of
// tiles, with all maxima known beforehand; as a kernel of its own: "Flash-Decoding for long-context inference"
// (T. Dao et al., 2023).
//
//                 elements ->
//     split 0    o o o o o ..    m_0, l_0      One warp owns a row of the output, a query of a head: the same row of
//     split 1    o o o o o ..    m_1, l_1      every part. For the log-sum-exps a lane takes every 32nd part, for O
//     ..                                       every 32nd element.
//
//     O          o o o o o ..    lse
//
// No shared memory, no barrier: the lanes of a warp exchange maximum and sum by shuffles, in one order whatever runs
// when, so results are repeatable to the bit.
//
// A part whose l is 0 saw no key: its O is not looked at. Without keys in any part O is 0 and lse -inf.
// A NaN in a part stays in its row. Rows need only an element's own alignment.
#include "isa.cuh"
#include "join.cuh"
#include "sink.cuh"
#include "work.cuh"

struct Traits {
  using Element = ElementTraits<typename Config::Element>;
  using Accumulator = typename Element::Accumulator;
  using AccumulatorElement = ElementTraits<Accumulator>;

  static_assert(Config::kNumThreads == 32 * Config::kRowsPerBlock, "a warp owns one row");
};

// One row of the output: its place among all rows, which are those of [batch_size, num_heads_q, seqlen_q] in C order.
struct Combine {
  using Accumulator = Traits::Accumulator;

  const FwdParams& params;
  long long row;
  long long num_rows;
  ExpSum<Accumulator> whole;

  __device__ __forceinline__ Combine(const FwdParams& params, long long row, long long num_rows)
      : params(params), row(row), num_rows(num_rows), whole() {
    whole = ExpSum<Accumulator>::over(params.num_splits, [this](int split) { return part(split); });
  }

  __device__ __forceinline__ ExpSum<Accumulator> part(int split) const {
    using Element = Traits::AccumulatorElement;
    const Accumulator* pair = static_cast<const Accumulator*>(params.partial_lse) + 2 * (split * num_rows + row);
    return {Element::load(pair), Element::load(pair + 1)};
  }

  // The row's log-sum-exp, and what its joined parts are multiplied by: 1, but for the head's sink.
  __device__ __forceinline__ RowEnd<Accumulator> end() const {
    const RowEnd<Accumulator> end = {whole.lse(), 1};
    if (params.scores.sinks == nullptr) return end;
    return add_sink<typename Config::Element>(end, params.scores.sinks, params.scores.sinks_are_float != 0, head());
  }

  __device__ __forceinline__ int head() const { return static_cast<int>(row / params.seqlen_q % params.num_heads_q); }

  __device__ __forceinline__ void store_out(Accumulator factor) const {
    const int batch = static_cast<int>(row / params.seqlen_q / params.num_heads_q);
    const auto rows = head_rows<typename Traits::Element::Storage>(params, params.out, batch, head());
    auto* out = rows.row(static_cast<int>(row % params.seqlen_q));
    for (int column = isa::lane_index(); column < params.head_dim_v; column += 32) {
      Accumulator sum = 0;
      for (int split = 0; split < params.num_splits; ++split) {
        const ExpSum<Accumulator> keys = part(split);
        if (keys.total == 0) continue;
        const Accumulator* part_out =
            static_cast<const Accumulator*>(params.partial_out) + (split * num_rows + row) * params.head_dim_v;
        sum += whole.weight(keys) * Traits::AccumulatorElement::load(part_out + column);
      }
      Traits::Element::store(out + column, sum * factor);
    }
  }

  __device__ __forceinline__ void store_lse(Accumulator lse) const {
    if (params.lse == nullptr || isa::lane_index() != 0) return;
    Traits::AccumulatorElement::store(static_cast<Accumulator*>(params.lse) + row, lse);
  }
};

extern "C" __global__ void __launch_bounds__(Config::kNumThreads, 1)
    flash_combine(const __grid_constant__ FwdParams params) {
  const long long num_rows = static_cast<long long>(params.batch_size) * params.num_heads_q * params.seqlen_q;
  const long long row = static_cast<long long>(isa::block_index_x()) * Config::kRowsPerBlock + isa::warp_index();
  if (row < num_rows) {  // the same in all lanes of a warp
    Combine combine(params, row, num_rows);
    const RowEnd<Traits::Accumulator> end = combine.end();
    combine.store_out(end.factor);
    combine.store_lse(end.lse);
  }
}
