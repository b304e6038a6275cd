// ldmatrix, stmatrix and mma: the fragment layouts of the PTX ISA, written as loops over lanes.

#include <cstring>

#include "access.h"
#include "collective.h"
#include "numeric.h"

namespace emulator {

namespace {

struct MatrixOperands {
  std::uint32_t row;
  std::uint32_t frag[4];
};

constexpr const char* kLoadNames[2][5] = {
    {nullptr, "ldmatrix.x1", "ldmatrix.x2", nullptr, "ldmatrix.x4"},
    {nullptr, "ldmatrix.x1.trans", "ldmatrix.x2.trans", nullptr, "ldmatrix.x4.trans"},
};
constexpr const char* kStoreNames[2][5] = {
    {nullptr, "stmatrix.x1", "stmatrix.x2", nullptr, "stmatrix.x4"},
    {nullptr, "stmatrix.x1.trans", "stmatrix.x2.trans", nullptr, "stmatrix.x4.trans"},
};

constexpr std::uint32_t kRowBytes = 16;

using Matrix = std::uint16_t[8][8];

// The two elements of a matrix that a lane holds.
std::uint32_t take(const Matrix& matrix, int lane, bool transposed) {
  const int g = lane / 4;
  const int c = lane % 4;
  const std::uint32_t lower = transposed ? matrix[2 * c][g] : matrix[g][2 * c];
  const std::uint32_t upper = transposed ? matrix[2 * c + 1][g] : matrix[g][2 * c + 1];
  return lower | upper << 16;
}

void put(Matrix& matrix, int lane, bool transposed, std::uint32_t bits) {
  const int g = lane / 4;
  const int c = lane % 4;
  (transposed ? matrix[2 * c][g] : matrix[g][2 * c]) = static_cast<std::uint16_t>(bits);
  (transposed ? matrix[2 * c + 1][g] : matrix[g][2 * c + 1]) = static_cast<std::uint16_t>(bits >> 16);
}

}  // namespace

void load_matrices(std::uint32_t* frag, int count, bool transposed, std::uint32_t row, Site site) {
  const char* what = kLoadNames[transposed][count];
  maybe_preempt();
  if (current->lane_index < 8 * count) shared_bytes(what, row, kRowBytes, kRowBytes, site);
  MatrixOperands mine{row, {}};
  collective(what, site, &mine, [=](const auto& lanes) {
    Block& block = *current_thread().block;
    Traffic& traffic = block.counters.ldmatrix;
    ++traffic.instructions;
    for (int m = 0; m < count; ++m) {
      Matrix matrix;
      std::uint32_t rows[8];
      for (int r = 0; r < 8; ++r) {
        rows[r] = static_cast<const MatrixOperands*>(lanes[8 * m + r])->row;
        note_shared(AccessKind::kLoadMatrix, kWholeWarp, rows[r], kRowBytes, site);
        std::memcpy(matrix[r], block.shared + (rows[r] - kSharedBase), kRowBytes);
      }
      if (block.launch->options.counters != 0) count_matrix(traffic, rows);
      for (int lane = 0; lane < kWarpSize; ++lane) {
        static_cast<MatrixOperands*>(lanes[lane])->frag[m] = take(matrix, lane, transposed);
      }
    }
  });
  for (int m = 0; m < count; ++m) frag[m] = mine.frag[m];
}

void store_matrices(std::uint32_t row, const std::uint32_t* frag, int count, bool transposed, Site site) {
  const char* what = kStoreNames[transposed][count];
  maybe_preempt();
  if (current->lane_index < 8 * count) shared_bytes(what, row, kRowBytes, kRowBytes, site);
  MatrixOperands mine{row, {}};
  for (int m = 0; m < count; ++m) mine.frag[m] = frag[m];
  collective(what, site, &mine, [=](const auto& lanes) {
    Block& block = *current_thread().block;
    Traffic& traffic = block.counters.stmatrix;
    ++traffic.instructions;
    for (int m = 0; m < count; ++m) {
      Matrix matrix;
      for (int lane = 0; lane < kWarpSize; ++lane) {
        put(matrix, lane, transposed, static_cast<const MatrixOperands*>(lanes[lane])->frag[m]);
      }
      std::uint32_t rows[8];
      for (int r = 0; r < 8; ++r) {
        rows[r] = static_cast<const MatrixOperands*>(lanes[8 * m + r])->row;
        note_shared(AccessKind::kStoreMatrix, kWholeWarp, rows[r], kRowBytes, site);
        std::memcpy(block.shared + (rows[r] - kSharedBase), matrix[r], kRowBytes);
      }
      if (block.launch->options.counters != 0) count_matrix(traffic, rows);
    }
  });
}

namespace {

struct MultiplyOperands {
  float* acc;
  const std::uint32_t* a;
  std::uint32_t b0;
  std::uint32_t b1;
};

constexpr int kM = 16;
constexpr int kN = 8;
constexpr int kK = 16;

// The eight columns of a row as one vector. Left to themselves, compilers vectorise over k and spend their time adding up.
using Row = float __attribute__((vector_size(kN * sizeof(float))));

// A register of two elements into its place in a matrix.
void put_pair(std::uint16_t* place, std::uint32_t bits) { std::memcpy(place, &bits, sizeof bits); }

// 16 elements of the inner dimension.
void convert(Format format, const std::uint16_t (&bits)[16], float (&values)[16]) {
  if (format == Format::kFloat16) {
    floats_from_f16(bits, values);
  } else {
    floats_from_bf16(bits, values);
  }
}

// A chain of float additions in the order of k. Products of two 16-bit elements are exact in float. With kSteps = 8
// the fragments are those of m16n8k8: the first halves of those of m16n8k16.
template <int kSteps>
void multiply(Format format, const std::array<void*, kWarpSize>& lanes) {
  std::uint16_t a_bits[kM][kK] = {};
  std::uint16_t b_bits[kN][kK] = {};  // transposed: a register holds two neighbours in k
  Row acc[kM];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mine = *static_cast<const MultiplyOperands*>(lanes[lane]);
    const int g = lane / 4;
    const int c = 2 * (lane % 4);
    put_pair(&a_bits[g][c], mine.a[0]);
    put_pair(&a_bits[g + 8][c], mine.a[1]);
    put_pair(&b_bits[g][c], mine.b0);
    if constexpr (kSteps == kK) {
      put_pair(&a_bits[g][c + 8], mine.a[2]);
      put_pair(&a_bits[g + 8][c + 8], mine.a[3]);
      put_pair(&b_bits[g][c + 8], mine.b1);
    }
    acc[g][c] = mine.acc[0];
    acc[g][c + 1] = mine.acc[1];
    acc[g + 8][c] = mine.acc[2];
    acc[g + 8][c + 1] = mine.acc[3];
  }
  Row b[kK];
  for (int n = 0; n < kN; ++n) {
    float column[kK];
    convert(format, b_bits[n], column);
    for (int k = 0; k < kK; ++k) b[k][n] = column[k];
  }
  for (int m = 0; m < kM; ++m) {
    float a[kK];
    convert(format, a_bits[m], a);
    Row sum = acc[m];
    for (int k = 0; k < kSteps; ++k) sum += a[k] * b[k];
    acc[m] = sum;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* mine = static_cast<const MultiplyOperands*>(lanes[lane])->acc;
    const int g = lane / 4;
    const int c = 2 * (lane % 4);
    mine[0] = acc[g][c];
    mine[1] = acc[g][c + 1];
    mine[2] = acc[g + 8][c];
    mine[3] = acc[g + 8][c + 1];
  }
}

}  // namespace

void multiply_accumulate(Format format, float* acc, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1,
                         Site site) {
  static constexpr const char* kNames[] = {"mma.m16n8k16.f16", "mma.m16n8k16.bf16"};
  MultiplyOperands mine{acc, a, b0, b1};
  collective(kNames[static_cast<int>(format)], site, &mine, [format](const auto& lanes) {
    ++current_thread().block->counters.mma;
    multiply<kK>(format, lanes);
  });
}

void multiply_accumulate_k8(float* acc, const std::uint32_t* a, std::uint32_t b, Site site) {
  MultiplyOperands mine{acc, a, b, 0};
  collective("mma.m16n8k8.f16", site, &mine, [](const auto& lanes) {
    ++current_thread().block->counters.mma;
    multiply<8>(Format::kFloat16, lanes);
  });
}

}  // namespace emulator
