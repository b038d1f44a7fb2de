// What is written in AVX-512 intrinsics shares: masks, a transpose, and the one loop of all products in registers. For files
// compiled for AVX-512, whose code is reached where the machine has it; each has its own copies, for they ask for more or
// less.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx512f")

namespace fasthyper::avx512 {

// What ATEN_CPU_CAPABILITY, torch's own variable, says of AVX-512
enum class Wish { none, wanted, unwanted };
static inline Wish wish() {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit == nullptr || *limit == '\0') return Wish::none;
  return std::strncmp(limit, "avx512", 6) == 0 ? Wish::wanted : Wish::unwanted;
}

// body(first, count) for as few shares of ``size`` as leave none longer than ``most``, of equal length, as near as can be
template <typename Body>
static inline void in_shares(int64_t size, int64_t most, const Body& body) {
  const int64_t shares = (size + most - 1) / most;
  for (int64_t i = 0; i < shares; ++i) body(size * i / shares, size * (i + 1) / shares - size * i / shares);
}

// The first n of 16
static inline __mmask16 first(int64_t n) { return __mmask16((1u << std::clamp<int64_t>(n, 0, 16)) - 1); }

template <int rows, int vectors>
static inline void clear(__m512 (&acc)[rows][vectors]) {
  for (auto& line : acc)
    for (auto& a : line) a = _mm512_setzero_ps();
}

// Adds ``depth`` vectors, ``stride`` apart, each times a factor of each row. Factors of one row lie factor_stride apart,
// those of the next row row_stride on. Every second time around it asks for memory.
template <int rows, int vectors, typename Ahead>
static inline void multiply_block(int64_t depth, const float* factor, int64_t row_stride, int64_t factor_stride,
                                  const float* vector, int64_t stride, Ahead& ahead, __m512 (&acc)[rows][vectors]) {
  for (int64_t i = 0; i < depth; ++i, factor += factor_stride, vector += stride) {
    if (i % 2 == 0) ahead.ask();
    __m512 v[vectors];
    for (int z = 0; z < vectors; ++z) v[z] = _mm512_load_ps(vector + 16 * z);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const __m512 f = _mm512_set1_ps(factor[r * row_stride]);
      for (int z = 0; z < vectors; ++z) acc[r][z] = _mm512_fmadd_ps(f, v[z], acc[r][z]);
    }
  }
}

constexpr int64_t kVectors = 4;  // most of a block

// In the place of what asks for memory
struct Nothing {
  void ask() {}
};

// Rows of a block, whose sums are in registers
constexpr int most_rows(int64_t vectors) { return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6; }

// out [rows, num_cols] of sums over a depth of vectors, ``stride`` apart, times a factor of each row. across: factors of one
// depth lie side by side, those of the next ``step`` on; else it is the other way around.
template <bool across, typename Ahead, int rows, int vectors>
static void block(int64_t depth, const float* factor, int64_t step, const float* vector, int64_t stride, int64_t num_cols,
                  Ahead& ahead, float* out, int64_t out_stride) {
  __m512 acc[rows][vectors];
  clear(acc);
  multiply_block(depth, factor, across ? 1 : step, across ? step : 1, vector, stride, ahead, acc);
  const bool is_whole = num_cols >= 16 * vectors;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r, out += out_stride) {
#pragma GCC unroll 4
    for (int z = 0; z < vectors; ++z) {
      if (is_whole)
        _mm512_storeu_ps(out + 16 * z, acc[r][z]);
      else
        _mm512_mask_storeu_ps(out + 16 * z, first(num_cols - 16 * z), acc[r][z]);
    }
  }
}

template <typename Ahead>
using Blocks = std::array<decltype(&block<true, Ahead, 1, 1>), most_rows(1)>;

template <bool across, typename Ahead, int vectors, int... rows>
constexpr Blocks<Ahead> blocks(std::integer_sequence<int, rows...>) {
  return {block<across, Ahead, rows + 1, vectors>...};
}

template <bool across, typename Ahead, int... vectors>
constexpr std::array<Blocks<Ahead>, kVectors> all_blocks(std::integer_sequence<int, vectors...>) {
  return {blocks<across, Ahead, vectors + 1>(std::make_integer_sequence<int, most_rows(vectors + 1)>())...};
}

// body(row, num_rows, vector, num_vectors, run) for the blocks of a product, which ``run`` makes
template <bool across, typename Ahead, typename Body>
static inline void for_blocks(int64_t num_rows, int64_t num_vectors, const Body& body) {
  static constexpr auto all = all_blocks<across, Ahead>(std::make_integer_sequence<int, kVectors>());
  in_shares(num_vectors, kVectors, [&](int64_t vector, int64_t vectors) {
    in_shares(num_rows, most_rows(vectors),
              [&](int64_t row, int64_t rows) { body(row, rows, vector, vectors, all[vectors - 1][rows - 1]); });
  });
}

// 16 x 16 numbers of 4 bytes, transposed
static inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2)
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace fasthyper::avx512

#pragma GCC pop_options
