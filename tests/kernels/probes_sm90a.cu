// As probes.cu, for the functions that need sm_90a.
#include "isa.cuh"
#include "descriptor.cuh"

// Puts `bytes` bytes into shared memory as they are, for wgmma to read.
__device__ __forceinline__ void fill_operands(const u32* in, int num_words) {
  for (int word = isa::thread_index(); word < num_words; word += 128) {
    isa::st_shared_4(isa::shared_base() + 4 * static_cast<u32>(word), isa::ldg_4(in + word));
  }
  isa::fence_proxy_async();
  isa::sync_threads();
}

// numbers: where b begins, then leading bytes, stride bytes and swizzle of a and of b.
__device__ __forceinline__ u64 descriptor_of(const u32* numbers, u32 start) {
  return matrix_descriptor(isa::shared_base() + start, isa::ldg_4(numbers), isa::ldg_4(numbers + 1),
                           static_cast<OperandSwizzle>(isa::ldg_4(numbers + 2)));
}

// out[128][kN / 2] = in[128][kN / 2] + a b, two steps along k of the same accumulators, the second one twice as long
// under way. The first ignores what the accumulators hold if `accumulate` is 0.
template <class Element, int kN, int kTransposeA, int kTransposeB>
__device__ __forceinline__ void multiply_ss(const u32* shared, int num_words, const u32* numbers, const u32* acc_in,
                                            u32 accumulate, u32* out) {
  fill_operands(shared, num_words);
  const u64 a = descriptor_of(numbers + 1, 0);
  const u64 b = descriptor_of(numbers + 4, isa::ldg_4(numbers));
  float acc[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[i] = isa::bits_float(isa::ldg_4(acc_in + isa::thread_index() * (kN / 2) + i));
  isa::wgmma_fence();
  isa::wgmma_ss<kTransposeA, kTransposeB>(Element(), acc, a, b, accumulate != 0);
  isa::wgmma_commit();
  isa::wgmma_ss<kTransposeA, kTransposeB>(Element(), acc, a, b, true);
  isa::wgmma_commit();
  isa::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) isa::stg_4(out + isa::thread_index() * (kN / 2) + i, isa::float_bits(acc[i]));
}

template <class Element, int kN, int kTransposeB>
__device__ __forceinline__ void multiply_rs(const u32* shared, int num_words, const u32* numbers, const u32* a_in,
                                            u32* out) {
  fill_operands(shared, num_words);
  const u64 b = descriptor_of(numbers + 4, isa::ldg_4(numbers));
  float acc[kN / 2];
  u32 a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = isa::ldg_4(a_in + 4 * isa::thread_index() + i);
  isa::wgmma_fence();
  isa::wgmma_rs<kTransposeB>(Element(), acc, a, b, false);
  isa::wgmma_commit();
  isa::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) isa::stg_4(out + isa::thread_index() * (kN / 2) + i, isa::float_bits(acc[i]));
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_ss_f16_n64_nn(const u32* shared, const u32* numbers, const u32* acc, u32* out, int num_words,
                              u32 accumulate) {
  multiply_ss<Float16, 64, 0, 0>(shared, num_words, numbers, acc, accumulate, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_ss_f16_n64_nt(const u32* shared, const u32* numbers, const u32* acc, u32* out, int num_words,
                              u32 accumulate) {
  multiply_ss<Float16, 64, 0, 1>(shared, num_words, numbers, acc, accumulate, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_ss_bf16_n64_tn(const u32* shared, const u32* numbers, const u32* acc, u32* out, int num_words,
                               u32 accumulate) {
  multiply_ss<BFloat16, 64, 1, 0>(shared, num_words, numbers, acc, accumulate, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_ss_bf16_n64_tt(const u32* shared, const u32* numbers, const u32* acc, u32* out, int num_words,
                               u32 accumulate) {
  multiply_ss<BFloat16, 64, 1, 1>(shared, num_words, numbers, acc, accumulate, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_ss_bf16_n16_nn(const u32* shared, const u32* numbers, const u32* acc, u32* out, int num_words,
                               u32 accumulate) {
  multiply_ss<BFloat16, 16, 0, 0>(shared, num_words, numbers, acc, accumulate, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_ss_f16_n176_nn(const u32* shared, const u32* numbers, const u32* acc, u32* out, int num_words,
                               u32 accumulate) {
  multiply_ss<Float16, 176, 0, 0>(shared, num_words, numbers, acc, accumulate, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_ss_f16_n256_nt(const u32* shared, const u32* numbers, const u32* acc, u32* out, int num_words,
                               u32 accumulate) {
  multiply_ss<Float16, 256, 0, 1>(shared, num_words, numbers, acc, accumulate, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_rs_f16_n64_n(const u32* shared, const u32* numbers, const u32* a, u32* out, int num_words) {
  multiply_rs<Float16, 64, 0>(shared, num_words, numbers, a, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_rs_f16_n128_t(const u32* shared, const u32* numbers, const u32* a, u32* out, int num_words) {
  multiply_rs<Float16, 128, 1>(shared, num_words, numbers, a, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_rs_bf16_n80_n(const u32* shared, const u32* numbers, const u32* a, u32* out, int num_words) {
  multiply_rs<BFloat16, 80, 0>(shared, num_words, numbers, a, out);
}

extern "C" __global__ void __launch_bounds__(128)
    probe_wgmma_rs_bf16_n64_t(const u32* shared, const u32* numbers, const u32* a, u32* out, int num_words) {
  multiply_rs<BFloat16, 64, 1>(shared, num_words, numbers, a, out);
}

// Three warpgroups: the first one gives registers back, the others take them.
extern "C" __global__ void __launch_bounds__(384, 1) probe_setmaxnreg(u32* out) {
  if (isa::warp_index() < 4) {
    isa::setmaxnreg_dec<24>();
  } else {
    isa::setmaxnreg_inc<240>();
  }
  isa::stg_4(out + isa::thread_index(), static_cast<u32>(isa::warp_index()));
}
