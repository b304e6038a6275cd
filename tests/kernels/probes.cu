// One tiny kernel for each function of the ISA layer: a lane reads its operands from `in`, executes the
// function once and writes what it got to `out`. tests/kernels/test_isa.py holds the results to NumPy models
// written from the PTX ISA.
#include "isa.cuh"

// Row `lane` of an array with `width` words for each lane.
__device__ __forceinline__ const u32* operands(const u32* in, int width) { return in + width * isa::thread_index(); }
__device__ __forceinline__ u32* results(u32* out, int width) { return out + width * isa::thread_index(); }
__device__ __forceinline__ float load_float(const u32* address) { return isa::bits_float(isa::ldg_4(address)); }
__device__ __forceinline__ void store_float(u32* address, float value) { isa::stg_4(address, isa::float_bits(value)); }

extern "C" __global__ void probe_identity(u32* out) {
  const int num_threads = 64;
  const int block =
      (isa::block_index_z() * isa::grid_size_y() + isa::block_index_y()) * isa::grid_size_x() + isa::block_index_x();
  u32* mine = out + 9 * (block * num_threads + isa::thread_index());
  const int values[9] = {isa::thread_index(),  isa::warp_index(),    isa::lane_index(),
                         isa::block_index_x(), isa::block_index_y(), isa::block_index_z(),
                         isa::grid_size_x(),   isa::grid_size_y(),   isa::grid_size_z()};
#pragma unroll
  for (int i = 0; i < 9; ++i) isa::stg_4(mine + i, static_cast<u32>(values[i]));
}

// in: two floats. out: 2^x, both packed as f16, as bf16 and, as sm_75 does it, as f16.
extern "C" __global__ void probe_convert(const u32* in, u32* out) {
  const float lower = load_float(operands(in, 2));
  const float upper = load_float(operands(in, 2) + 1);
  store_float(results(out, 4), isa::ex2(lower));
  isa::stg_4(results(out, 4) + 1, isa::pack_f16x2(lower, upper));
  isa::stg_4(results(out, 4) + 2, isa::pack_bf16x2(lower, upper));
  isa::stg_4(results(out, 4) + 3, isa::pack_f16x2_sm75(lower, upper));
}

// in: two floats. out: the larger one, or NaN.
extern "C" __global__ void probe_max(const u32* in, u32* out) {
  store_float(results(out, 1), isa::max_nan(load_float(operands(in, 2)), load_float(operands(in, 2) + 1)));
}

// in: 16 bits. out: the float it is as f16 and as bf16.
extern "C" __global__ void probe_unpack(const u32* in, u32* out) {
  const u32 bits = isa::ldg_4(operands(in, 1));
  store_float(results(out, 2), isa::unpack_f16(bits));
  store_float(results(out, 2) + 1, isa::unpack_bf16(bits));
}

// in: a value and an operand.
extern "C" __global__ void probe_shuffle(const u32* in, u32* out) {
  const u32 value = isa::ldg_4(operands(in, 2));
  const int operand = static_cast<int>(isa::ldg_4(operands(in, 2) + 1));
  isa::stg_4(results(out, 6), isa::shuffle_xor(value, operand));
  isa::stg_4(results(out, 6) + 1, isa::shuffle_idx(value, operand));
  isa::stg_4(results(out, 6) + 2, isa::shuffle_down(value, operand));
  store_float(results(out, 6) + 3, isa::shuffle_xor(isa::bits_float(value), operand));
  store_float(results(out, 6) + 4, isa::shuffle_idx(isa::bits_float(value), operand));
  store_float(results(out, 6) + 5, isa::shuffle_down(isa::bits_float(value), operand));
}

// in: a double and an operand.
extern "C" __global__ void probe_shuffle_double(const u32* in, u32* out) {
  const u32* mine = operands(in, 3);
  const double value = isa::bits_double({isa::ldg_4(mine), isa::ldg_4(mine + 1)});
  const uint2 bits = isa::double_bits(isa::shuffle_xor(value, static_cast<int>(isa::ldg_4(mine + 2))));
  isa::stg_4(results(out, 2), bits.x);
  isa::stg_4(results(out, 2) + 1, bits.y);
}

extern "C" __global__ void probe_vote(const u32* in, u32* out) {
  const bool predicate = isa::ldg_4(operands(in, 1)) != 0;
  isa::stg_4(results(out, 3), isa::ballot(predicate));
  isa::stg_4(results(out, 3) + 1, isa::any(predicate));
  isa::stg_4(results(out, 3) + 2, isa::all(predicate));
}

// in: seven words; they go to global memory, to shared memory and back, in pieces of 4, 8 and 16 bytes (28 of
// 32 used).
extern "C" __global__ void probe_memory(const u32* in, u32* out) {
  const u32* source = operands(in, 8);
  const u32 shared = isa::shared_base() + 32 * isa::thread_index();
  isa::st_shared_16(shared, isa::ldg_16(source));
  isa::st_shared_8(shared + 16, isa::ldg_8(source + 4));
  isa::st_shared_4(shared + 24, isa::ldg_4(source + 6));
  isa::sync_threads();
  const u32 other = isa::shared_base() + 32 * (31 - isa::thread_index());
  u32* destination = results(out, 8);
  isa::stg_16(destination, isa::ld_shared_16(other));
  isa::stg_8(destination + 4, isa::ld_shared_8(other + 16));
  isa::stg_4(destination + 6, isa::ld_shared_4(other + 24));
}

// in: two words. Seven of the eight bytes go to `out`, the last stays as it was.
extern "C" __global__ void probe_bytes(const u32* in, u32* out) {
  const unsigned char* source = reinterpret_cast<const unsigned char*>(operands(in, 2));
  unsigned char* destination = reinterpret_cast<unsigned char*>(results(out, 2));
#pragma unroll
  for (int i = 0; i < 7; ++i) isa::stg_1(destination + i, isa::ldg_1(source + i) | 0xabcdef00u);
}

// in: two words. Three of the four halves go to `out`, the last stays as it was.
extern "C" __global__ void probe_halves(const u32* in, u32* out) {
  const u16* source = reinterpret_cast<const u16*>(operands(in, 2));
  u16* destination = reinterpret_cast<u16*>(results(out, 2));
#pragma unroll
  for (int i = 0; i < 3; ++i) isa::stg_2(destination + i, isa::ldg_2(source + i) | 0xabcd0000u);
}

// in: three floats. out: a b + c, rounded after the product and after the sum.
extern "C" __global__ void probe_multiply_add(const u32* in, u32* out) {
  const u32* mine = operands(in, 3);
  store_float(results(out, 1), isa::mul_rn(load_float(mine), load_float(mine + 1)) + load_float(mine + 2));
}

// totals: u32 sum, float sum, u32 maximum, float maximum. out: each lane's previous value of the first.
extern "C" __global__ void probe_atomics(const u32* in, u32* totals, u32* out) {
  const u32 integer = isa::ldg_4(operands(in, 2));
  const float number = load_float(operands(in, 2) + 1);
  isa::stg_4(results(out, 1), isa::atomic_add(totals, integer));
  isa::atomic_add(reinterpret_cast<float*>(totals + 1), number);
  isa::atomic_max(totals + 2, integer);
  isa::atomic_max(reinterpret_cast<float*>(totals + 3), number);
}

// in: 16 bytes; sizes: how many of them count.
extern "C" __global__ void probe_cp_async(const u32* in, const u32* sizes, u32* out) {
  const u32 shared = isa::shared_base() + 16 * isa::thread_index();
  isa::cp_async_16(shared, operands(in, 4), isa::ldg_4(operands(sizes, 1)));
  isa::cp_async_commit();
  isa::cp_async_wait<0>();
  isa::stg_16(results(out, 4), isa::ld_shared_16(shared));
}

// Copies `in`, 1024 bytes, to shared memory.
__device__ __forceinline__ void fill_shared(const u32* in) {
  for (int i = 0; i < 2; ++i) {
    const int chunk = i * 32 + isa::thread_index();
    isa::st_shared_16(isa::shared_base() + 16 * chunk, isa::ldg_16(in + 4 * chunk));
  }
  isa::sync_threads();
}

// in: 64 rows of 16 bytes; rows: the row whose address each lane passes. out: x1, x2, x4, plain and
// transposed.
extern "C" __global__ void probe_ldmatrix(const u32* in, const u32* rows, u32* out) {
  fill_shared(in);
  const u32 row = isa::shared_base() + 16 * isa::ldg_4(operands(rows, 1));
  u32 x1[1], x2[2], x4[4], t1[1], t2[2], t4[4];
  isa::ldmatrix_x1(x1, row);
  isa::ldmatrix_x2(x2, row);
  isa::ldmatrix_x4(x4, row);
  isa::ldmatrix_x1_trans(t1, row);
  isa::ldmatrix_x2_trans(t2, row);
  isa::ldmatrix_x4_trans(t4, row);
  u32* mine = results(out, 14);
  isa::stg_4(mine, x1[0]);
  isa::stg_4(mine + 7, t1[0]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    isa::stg_4(mine + 1 + i, x2[i]);
    isa::stg_4(mine + 8 + i, t2[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    isa::stg_4(mine + 3 + i, x4[i]);
    isa::stg_4(mine + 10 + i, t4[i]);
  }
}

// in: a (4 words), b (2), acc (4) of each lane.
template <class Element>
__device__ __forceinline__ void multiply(const u32* in, u32* out) {
  u32 a[4];
  float acc[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = isa::ldg_4(operands(in, 10) + i);
    acc[i] = load_float(operands(in, 10) + 6 + i);
  }
  isa::mma_m16n8k16(Element(), acc, a, isa::ldg_4(operands(in, 10) + 4), isa::ldg_4(operands(in, 10) + 5));
#pragma unroll
  for (int i = 0; i < 4; ++i) store_float(results(out, 4) + i, acc[i]);
}

extern "C" __global__ void probe_mma_f16(const u32* in, u32* out) { multiply<Float16>(in, out); }
extern "C" __global__ void probe_mma_k8(const u32* in, u32* out) {
  const u32* mine = operands(in, 7);
  float acc[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = load_float(mine + 3 + i);
  isa::mma_m16n8k8(Float16(), acc, isa::ldg_4(mine), isa::ldg_4(mine + 1), isa::ldg_4(mine + 2));
#pragma unroll
  for (int i = 0; i < 4; ++i) store_float(results(out, 4) + i, acc[i]);
}
extern "C" __global__ void probe_mma_bf16(const u32* in, u32* out) { multiply<BFloat16>(in, out); }

// Four warps. Warps 1 to 3 write a word each and arrive; warp 0 waits for the 128 threads and reads them all.
// Barrier 1 is used twice, to see that it starts over.
extern "C" __global__ void probe_named_barrier(u32* out) {
  for (int round = 0; round < 2; ++round) {
    if (isa::warp_index() == 0) {
      isa::barrier_sync(1, 128);
      u32 sum = 0;
      for (int w = 1; w < 4; ++w) sum += isa::ld_shared_4(isa::shared_base() + 128 * w + 4 * isa::lane_index());
      isa::stg_4(out + 32 * round + isa::lane_index(), sum);
      isa::barrier_arrive(2, 128);
    } else {
      isa::st_shared_4(isa::shared_base() + 4 * isa::thread_index(),
                       static_cast<u32>(isa::thread_index() + 1000 * round));
      isa::barrier_arrive(1, 128);
      isa::barrier_sync(2, 128);
    }
  }
}

// A value goes round the lanes of a warp through shared memory, ordered by sync_warp alone.
extern "C" __global__ void probe_sync_warp(u32* out) {
  const int lane = isa::lane_index();
  u32 value = static_cast<u32>(lane);
  for (int step = 0; step < 3; ++step) {
    isa::st_shared_4(isa::shared_base() + 4 * lane, value);
    isa::sync_warp();
    value = isa::ld_shared_4(isa::shared_base() + 4 * ((lane + 1) % 32));
    isa::sync_warp();
  }
  isa::stg_4(out + lane, value);
}
