// The one loop of all products in registers: a block of sums, some rows by some vectors, over a depth. Included behind
// avx512.h or avx2.h.
#pragma once

#include <array>
#include <utility>

namespace fasthyper::simd {

constexpr int64_t count(int64_t n) { return (n + kLanes - 1) / kLanes; }
constexpr int64_t padded(int64_t n) { return kLanes * count(n); }

constexpr int64_t kBlock =
    std::max({most_rows(1), 2 * most_rows(2), 3 * most_rows(3), 4 * most_rows(4)}) * kLanes;  // floats

// body(first, count) for as few shares of ``size`` as leave none longer than ``most``, of equal length or one less
template <typename Body>
static inline void in_shares(int64_t size, int64_t most, const Body& body) {
  if (size == 0) return;
  const int64_t shares = (size + most - 1) / most, least = size / shares, longer = size - least * shares;
  for (int64_t i = 0, first = 0; i < shares; ++i) {
    const int64_t length = least + (i < longer);
    body(first, length);
    first += length;
  }
}

template <int rows, int vectors>
static inline void clear(Vec (&acc)[rows][vectors]) {
  for (auto& line : acc)
    for (auto& a : line) a = zero();
}

// Adds ``depth`` vectors, ``stride`` apart, each times a factor of each row. Factors of one row lie factor_stride apart,
// those of the next row row_stride on. Every second time around it asks for memory.
template <int rows, int vectors, typename Ahead>
static inline void multiply_block(int64_t depth, const float* factor, int64_t row_stride, int64_t factor_stride,
                                  const float* vector, int64_t stride, Ahead& ahead, Vec (&acc)[rows][vectors]) {
  for (int64_t i = 0; i < depth; ++i, factor += factor_stride, vector += stride) {
    if (i % 2 == 0) ahead.ask();
    Vec v[vectors];
    for (int z = 0; z < vectors; ++z) v[z] = load(vector + kLanes * z);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec f = all(factor[r * row_stride]);
      for (int z = 0; z < vectors; ++z) acc[r][z] = multiply_add(f, v[z], acc[r][z]);
    }
  }
}

// In the place of what asks for memory
struct Nothing {
  void ask() {}
};

// out [rows, num_cols] of sums over a depth of vectors, ``stride`` apart, times a factor of each row. across: factors of one
// depth lie side by side, those of the next ``step`` on; else it is the other way around.
template <bool across, typename Ahead, int rows, int vectors>
static void block(int64_t depth, const float* factor, int64_t step, const float* vector, int64_t stride, int64_t num_cols,
                  Ahead& ahead, float* out, int64_t out_stride) {
  Vec acc[rows][vectors];
  clear(acc);
  multiply_block(depth, factor, across ? 1 : step, across ? step : 1, vector, stride, ahead, acc);
  const bool is_whole = num_cols >= kLanes * vectors;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r, out += out_stride) {
#pragma GCC unroll 4
    for (int z = 0; z < vectors; ++z) {
      if (is_whole)
        store_any(out + kLanes * z, acc[r][z]);
      else
        store_first(out + kLanes * z, num_cols - kLanes * z, acc[r][z]);
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

}  // namespace fasthyper::simd
