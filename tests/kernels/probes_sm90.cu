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
