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

void unpack(Format format, std::uint32_t bits, float* lower, float* upper) {
  const auto low = static_cast<std::uint16_t>(bits);
  const auto high = static_cast<std::uint16_t>(bits >> 16);
  *lower = format == Format::kFloat16 ? float_from_f16(low) : float_from_bf16(low);
  *upper = format == Format::kFloat16 ? float_from_f16(high) : float_from_bf16(high);
}

// A chain of float additions in the order of k. Products of two 16-bit elements are exact in float.
void multiply(Format format, const std::array<void*, kWarpSize>& lanes) {
  alignas(32) float a[kM][kK];
  alignas(32) float b[kK][kN];
  alignas(32) float acc[kM][kN];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mine = *static_cast<const MultiplyOperands*>(lanes[lane]);
    const int g = lane / 4;
    const int c = 2 * (lane % 4);
    unpack(format, mine.a[0], &a[g][c], &a[g][c + 1]);
    unpack(format, mine.a[1], &a[g + 8][c], &a[g + 8][c + 1]);
    unpack(format, mine.a[2], &a[g][c + 8], &a[g][c + 9]);
    unpack(format, mine.a[3], &a[g + 8][c + 8], &a[g + 8][c + 9]);
    unpack(format, mine.b0, &b[c][g], &b[c + 1][g]);
    unpack(format, mine.b1, &b[c + 8][g], &b[c + 9][g]);
    acc[g][c] = mine.acc[0];
    acc[g][c + 1] = mine.acc[1];
    acc[g + 8][c] = mine.acc[2];
    acc[g + 8][c + 1] = mine.acc[3];
  }
  for (int m = 0; m < kM; ++m) {
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < kN; ++n) acc[m][n] += a[m][k] * b[k][n];
    }
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
    multiply(format, lanes);
  });
}

}  // namespace emulator
