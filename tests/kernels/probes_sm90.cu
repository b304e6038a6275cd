// As probes.cu, for the functions that need sm_90.
#include "isa.cuh"

// in: 4 words of each lane; rows: the row whose address each lane passes. Then all of shared memory, 1024
// bytes, goes out.
template <class Store>
__device__ __forceinline__ void store_and_dump(const u32* in, const u32* rows, u32* out, Store store) {
  u32 frag[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) frag[i] = isa::ldg_4(in + 4 * isa::thread_index() + i);
  for (int i = 0; i < 8; ++i) isa::st_shared_4(isa::shared_base() + 4 * (32 * i + isa::thread_index()), 0);
  isa::sync_threads();
  store(isa::shared_base() + 16 * isa::ldg_4(rows + isa::thread_index()), frag);
  isa::sync_threads();
  for (int i = 0; i < 8; ++i) {
    const int word = 32 * i + isa::thread_index();
    isa::stg_4(out + word, isa::ld_shared_4(isa::shared_base() + 4 * word));
  }
}

extern "C" __global__ void probe_stmatrix_x1(const u32* in, const u32* rows, u32* out) {
  store_and_dump(in, rows, out, [](u32 row, const u32(&frag)[4]) {
    const u32 first[1] = {frag[0]};
    isa::stmatrix_x1(row, first);
  });
}

extern "C" __global__ void probe_stmatrix_x2(const u32* in, const u32* rows, u32* out) {
  store_and_dump(in, rows, out, [](u32 row, const u32(&frag)[4]) {
    const u32 first[2] = {frag[0], frag[1]};
    isa::stmatrix_x2(row, first);
  });
}

extern "C" __global__ void probe_stmatrix_x4(const u32* in, const u32* rows, u32* out) {
  store_and_dump(in, rows, out, [](u32 row, const u32(&frag)[4]) { isa::stmatrix_x4(row, frag); });
}

extern "C" __global__ void probe_stmatrix_x1_trans(const u32* in, const u32* rows, u32* out) {
  store_and_dump(in, rows, out, [](u32 row, const u32(&frag)[4]) {
    const u32 first[1] = {frag[0]};
    isa::stmatrix_x1_trans(row, first);
  });
}

extern "C" __global__ void probe_stmatrix_x2_trans(const u32* in, const u32* rows, u32* out) {
  store_and_dump(in, rows, out, [](u32 row, const u32(&frag)[4]) {
    const u32 first[2] = {frag[0], frag[1]};
    isa::stmatrix_x2_trans(row, first);
  });
}

extern "C" __global__ void probe_stmatrix_x4_trans(const u32* in, const u32* rows, u32* out) {
  store_and_dump(in, rows, out, [](u32 row, const u32(&frag)[4]) { isa::stmatrix_x4_trans(row, frag); });
}

extern "C" __global__ void probe_elect_one(u32* out) { isa::stg_4(out + isa::thread_index(), isa::elect_one()); }

// Two warps pass a word to and fro, three times, by two mbarriers. Warp 0 writes and arrives with all its lanes; warp 1
// reads, adds and arrives with one lane.
extern "C" __global__ void probe_mbarrier(const u32* in, u32* out) {
  const u32 full = isa::shared_base();
  const u32 empty = full + 8;
  const u32 words = full + 128 + 4 * isa::lane_index();
  if (isa::thread_index() == 0) {
    isa::mbarrier_init(full, 32);
    isa::mbarrier_init(empty, 1);
  }
  isa::sync_threads();
  const u32 value = isa::ldg_4(in + isa::lane_index());
  u32 sum = 0;
  for (int round = 0; round < 3; ++round) {
    const u32 parity = static_cast<u32>(round % 2);
    if (isa::warp_index() == 0) {
      isa::mbarrier_wait(empty, parity ^ 1);
      isa::st_shared_4(words, value + static_cast<u32>(round));
      isa::mbarrier_arrive(full);
    } else {
      isa::mbarrier_wait(full, parity);
      sum = 3 * sum + isa::ld_shared_4(words);
      isa::sync_warp();
      if (isa::lane_index() == 0) isa::mbarrier_arrive(empty);
    }
  }
  if (isa::warp_index() == 1) isa::stg_4(out + isa::lane_index(), sum);
}

// Loads one tile and writes shared memory out as it lies there.
template <class Load>
__device__ __forceinline__ void load_and_dump(u32* out, int num_words, Load load) {
  const u32 barrier = isa::shared_base();
  const u32 tile = barrier + 1024;
  if (isa::thread_index() == 0) {
    isa::mbarrier_init(barrier, 1);
    isa::fence_mbarrier_init();
  }
  isa::sync_threads();
  if (isa::elect_one()) {
    isa::mbarrier_arrive_expect_tx(barrier, static_cast<u32>(4 * num_words));
    load(tile, barrier);
  }
  isa::mbarrier_wait(barrier, 0);
  for (int word = isa::thread_index(); word < num_words; word += 32) {
    isa::stg_4(out + word, isa::ld_shared_4(tile + 4 * static_cast<u32>(word)));
  }
}

extern "C" __global__ void probe_bulk_load_3(const __grid_constant__ TensorMap map, const int* at, u32* out,
                                             int num_words) {
  const int c0 = static_cast<int>(isa::ldg_4(at)), c1 = static_cast<int>(isa::ldg_4(at + 1));
  const int c2 = static_cast<int>(isa::ldg_4(at + 2));
  isa::prefetch_tensor_map(&map);
  load_and_dump(out, num_words,
                [&](u32 tile, u32 barrier) { isa::bulk_load(tile, &map, barrier, isa::l2_evict_first(), c0, c1, c2); });
}

extern "C" __global__ void probe_bulk_load_4(const __grid_constant__ TensorMap map, const int* at, u32* out,
                                             int num_words) {
  const int c0 = static_cast<int>(isa::ldg_4(at)), c1 = static_cast<int>(isa::ldg_4(at + 1));
  const int c2 = static_cast<int>(isa::ldg_4(at + 2)), c3 = static_cast<int>(isa::ldg_4(at + 3));
  load_and_dump(out, num_words, [&](u32 tile, u32 barrier) {
    isa::bulk_load(tile, &map, barrier, isa::l2_evict_normal(), c0, c1, c2, c3);
  });
}

extern "C" __global__ void probe_bulk_load_5(const __grid_constant__ TensorMap map, const int* at, u32* out,
                                             int num_words) {
  const int c0 = static_cast<int>(isa::ldg_4(at)), c1 = static_cast<int>(isa::ldg_4(at + 1));
  const int c2 = static_cast<int>(isa::ldg_4(at + 2)), c3 = static_cast<int>(isa::ldg_4(at + 3));
  const int c4 = static_cast<int>(isa::ldg_4(at + 4));
  load_and_dump(out, num_words, [&](u32 tile, u32 barrier) {
    isa::bulk_load(tile, &map, barrier, isa::l2_evict_last(), c0, c1, c2, c3, c4);
  });
}

// Puts words into shared memory as they are and stores them as one tile.
template <class Store>
__device__ __forceinline__ void fill_and_store(const u32* in, int num_words, Store store) {
  for (int word = isa::thread_index(); word < num_words; word += 32) {
    isa::st_shared_4(isa::shared_base() + 4 * static_cast<u32>(word), isa::ldg_4(in + word));
  }
  isa::fence_proxy_async();
  isa::sync_threads();
  if (isa::elect_one()) {
    store(isa::shared_base());
    isa::bulk_commit();
    isa::bulk_wait_read<0>();
    isa::bulk_wait<0>();
  }
}

extern "C" __global__ void probe_bulk_store_3(const __grid_constant__ TensorMap map, const int* at, const u32* in,
                                              int num_words) {
  const int c0 = static_cast<int>(isa::ldg_4(at)), c1 = static_cast<int>(isa::ldg_4(at + 1));
  const int c2 = static_cast<int>(isa::ldg_4(at + 2));
  fill_and_store(in, num_words, [&](u32 tile) { isa::bulk_store(&map, tile, c0, c1, c2); });
}

extern "C" __global__ void probe_bulk_store_4(const __grid_constant__ TensorMap map, const int* at, const u32* in,
                                              int num_words) {
  const int c0 = static_cast<int>(isa::ldg_4(at)), c1 = static_cast<int>(isa::ldg_4(at + 1));
  const int c2 = static_cast<int>(isa::ldg_4(at + 2)), c3 = static_cast<int>(isa::ldg_4(at + 3));
  fill_and_store(in, num_words, [&](u32 tile) { isa::bulk_store(&map, tile, c0, c1, c2, c3); });
}

extern "C" __global__ void probe_bulk_store_5(const __grid_constant__ TensorMap map, const int* at, const u32* in,
                                              int num_words) {
  const int c0 = static_cast<int>(isa::ldg_4(at)), c1 = static_cast<int>(isa::ldg_4(at + 1));
  const int c2 = static_cast<int>(isa::ldg_4(at + 2)), c3 = static_cast<int>(isa::ldg_4(at + 3));
  const int c4 = static_cast<int>(isa::ldg_4(at + 4));
  fill_and_store(in, num_words, [&](u32 tile) { isa::bulk_store(&map, tile, c0, c1, c2, c3, c4); });
}

extern "C" __global__ void probe_nanosleep(u32* out) {
  isa::nanosleep(1);
  isa::stg_4(out + isa::thread_index(), static_cast<u32>(isa::thread_index()));
}
