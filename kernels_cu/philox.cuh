// Philox4x32-10, the counter-based random numbers of dropout.
//
// Reference: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC'11, 2011, section 4.3. A counter-based generator has no state: the words are a function of (counter, key), so
// any thread may draw any element's number, in any order, in the forward pass and again in the backward pass.
//
// One round takes a counter (c0, c1, c2, c3) and a key (k0, k1), all of 32 bits, to
//
//     hi0:lo0 = M0 * c0        c0' = hi1 ^ c1 ^ k0        M0 = 0xD2511F53
//     hi1:lo1 = M1 * c2        c1' = lo1                  M1 = 0xCD9E8D57
//                              c2' = hi0 ^ c3 ^ k1
//                              c3' = lo0
//
// and between rounds the key moves on by k0 += W0, k1 += W1 (mod 2^32), W0 = 0x9E3779B9 and W1 = 0xBB67AE85 (the
// golden ratio and sqrt(3) - 1). Ten rounds give the four words.
//
// Dropout's contract, the same on every backend. For the element at query row i and key column j of the matrix
// bh = batch * num_heads_q + head:
//
//     key     = (low word, high word) of the 64-bit seed
//     counter = (j >> 1,  ((i >> 4) << 3) | (i & 7),  low word of bh,  high word of bh)
//     word    = 2 * ((i >> 3) & 1) + (j & 1)
//     kept    iff words[word] >= threshold,  threshold = floor(p * 2^32)
//
// Tensor cores leave the scores in this shape: a lane of mma.m16n8 owns the rows i and i + 8 and the columns j and
// j + 1 (i & 8 == 0, j even), and keeps them in the order of the words:
//
//                 j           j + 1
//       i      words[0]     words[1]        one call = one lane's 2 x 2 accumulators of one m16n8 tile,
//       i + 8  words[2]     words[3]        if the tile starts at a multiple of 16 rows and 2 columns
//
// Kernels therefore call dropout_words once per 2 x 2 and index the result with constants. Not for cryptography.
#pragma once

struct PhiloxWords {
  unsigned int words[4];
};

__device__ __forceinline__ PhiloxWords philox4x32_10(unsigned int c0, unsigned int c1, unsigned int c2, unsigned int c3,
                                                     unsigned int k0, unsigned int k1) {
  constexpr int kRounds = 10;
  // 64-bit products rather than __umulhi: one wide multiply on the device, and plain C++ everywhere else.
  constexpr unsigned long long kM0 = 0xD2511F53u;
  constexpr unsigned long long kM1 = 0xCD9E8D57u;
  constexpr unsigned int kW0 = 0x9E3779B9u;
  constexpr unsigned int kW1 = 0xBB67AE85u;
  for (int round = 0; round < kRounds; ++round) {
    const unsigned long long product0 = kM0 * c0;
    const unsigned long long product1 = kM1 * c2;
    c0 = static_cast<unsigned int>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<unsigned int>(product1);
    c2 = static_cast<unsigned int>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<unsigned int>(product0);
    k0 += kW0;
    k1 += kW1;
  }
  return {{c0, c1, c2, c3}};
}

// The words of the 2 x 2 elements that share (row, col)'s counter: rows i and i + 8, columns j and j + 1.
__device__ __forceinline__ PhiloxWords dropout_words(unsigned long long seed, unsigned long long bh, unsigned int row,
                                                     unsigned int col) {
  return philox4x32_10(col >> 1, ((row >> 4) << 3) | (row & 7u), static_cast<unsigned int>(bh),
                       static_cast<unsigned int>(bh >> 32), static_cast<unsigned int>(seed),
                       static_cast<unsigned int>(seed >> 32));
}

// Which of those four words is the element's own.
__device__ __forceinline__ unsigned int dropout_word_index(unsigned int row, unsigned int col) {
  return 2u * ((row >> 3) & 1u) + (col & 1u);
}

// One element by itself, for kernels whose lanes own single elements: a whole call for one of its words.
__device__ __forceinline__ bool dropout_keep(unsigned long long seed, unsigned long long bh, unsigned int row,
                                             unsigned int col, unsigned int threshold) {
  const PhiloxWords drawn = dropout_words(seed, bh, row, col);
  // Selected, not indexed: an index unknown to the compiler would put the words into local memory.
  const unsigned int even_col = (row & 8u) ? drawn.words[2] : drawn.words[0];
  const unsigned int odd_col = (row & 8u) ? drawn.words[3] : drawn.words[1];
  return ((col & 1u) ? odd_col : even_col) >= threshold;
}
