#include "narrow.h"

#include <algorithm>
#include <array>
#include <utility>

#if defined(__x86_64__)
#pragma GCC target("avx512f")
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the compiler's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "avx512.h"

namespace fasthyper::narrow {
namespace {

using avx512::clear;
using avx512::first;
using avx512::multiply_block;

constexpr int64_t kTile = 128;   // rows that stay in the first-level cache: as many sums in float32 before one in float64
constexpr int kRest = 6;         // columns behind whole vectors that are made as rows
constexpr int kProductRows = 8;  // rows of a block of a product

// One pair; behind it anything
inline void write_row(const float* first_row, const float* second_row, const float* minus_row, int64_t first_cols,
                      int64_t second_cols, float* to) {
  for (int64_t j = 0; j < first_cols; j += 16) {
    const __mmask16 mask = first(first_cols - j);
    _mm512_mask_storeu_ps(to + j, mask, _mm512_maskz_loadu_ps(mask, first_row + j));
  }
  for (int64_t j = 0; j < second_cols; j += 16) {
    const __mmask16 mask = first(second_cols - j);
    __m512 value = _mm512_maskz_loadu_ps(mask, second_row + j);
    if (minus_row) value = _mm512_sub_ps(value, _mm512_maskz_loadu_ps(mask, minus_row + j));
    _mm512_mask_storeu_ps(to + first_cols + j, mask, value);
  }
}

// Pairs with minus, of vectors that are read and written whole: not for the last rows, behind which nothing may be read
template <int vectors>
void write_whole(const float* p, const float* q, const float* minus, int64_t stride, int64_t first_cols, int64_t length,
                 float* to) {
  for (int64_t i = 0; i < length; ++i, p += stride, q += stride, minus += stride, to += kWidest) {
    __m512 a[vectors], b[vectors];
    for (int z = 0; z < vectors; ++z) {
      a[z] = _mm512_loadu_ps(p + 16 * z);
      b[z] = _mm512_sub_ps(_mm512_loadu_ps(q + 16 * z), _mm512_loadu_ps(minus + 16 * z));
    }
    for (int z = 0; z < vectors; ++z) _mm512_storeu_ps(to + 16 * z, a[z]);
    for (int z = 0; z < vectors; ++z) _mm512_storeu_ps(to + first_cols + 16 * z, b[z]);
  }
}

// Up to kTile pairs, kWidest apart; behind each anything
void write(const Rows& x, int64_t start, int64_t length, float* to) {
  const float *p = x.first + start * x.stride, *q = x.second + start * x.stride;
  const float* minus = x.minus ? x.minus + start * x.stride : nullptr;
  int64_t i = 0;
  const int64_t reach = 32 - std::min(x.first_cols, x.second_cols);  // read behind a row
  if (minus && x.first_cols > 16 && x.second_cols > 16 && x.second_cols <= 32 && x.first_cols + 32 <= kWidest) {
    const int64_t safe = start + length == x.num_rows ? length - reach / x.stride - 1 : length;
    i = std::max<int64_t>(0, std::min(safe, length));
    write_whole<2>(p, q, minus, x.stride, x.first_cols, i, to);
  }
  for (; i < length; ++i)
    write_row(p + i * x.stride, q + i * x.stride, minus ? minus + i * x.stride : nullptr, x.first_cols, x.second_cols,
              to + i * kWidest);
}

// What comes after a tile, in memory: asked for while the tile is multiplied, line by line, so that its reading is hidden
struct Ahead {
  const char *first = nullptr, *second = nullptr;
  int64_t num_bytes = 0, at = 0;

  Ahead(const Rows& x, int64_t start) {
    if (start >= x.num_rows) return;
    first = reinterpret_cast<const char*>(x.first + start * x.stride);
    second = reinterpret_cast<const char*>((x.minus ? x.minus : x.second) + start * x.stride);
    num_bytes = std::min(kTile, x.num_rows - start) * x.stride * int64_t(sizeof(float));
  }

  void ask() {
    if (at >= num_bytes) return;
    _mm_prefetch(first + at, _MM_HINT_T0);
    _mm_prefetch(second + at, _MM_HINT_T0);
    at += 64;
  }
};

// rows x 16 vectors of X'X, from a row and a vector of columns on; of them num_rows and the columns before num_cols count.
// Turned, they go to their place above the diagonal.
template <int rows, int vectors>
void gram_block(const float* x, int64_t length, int64_t row, int64_t vector, int64_t num_rows, int64_t num_cols,
                int64_t width, bool turned, bool adds, Ahead& ahead, double* sum) {
  __m512 acc[rows][vectors];
  clear(acc);
  multiply_block(length, x + row, 1, kWidest, x + 16 * vector, kWidest, ahead, acc);
  for (int r = 0; r < num_rows; ++r) {
    alignas(64) float line[16 * vectors];
    for (int z = 0; z < vectors; ++z) _mm512_store_ps(line + 16 * z, acc[r][z]);
    const int64_t count = std::min<int64_t>(16 * vectors, num_cols - 16 * vector);
    if (turned) {
      double* to = sum + 16 * vector * width + row + r;
      for (int64_t j = 0; j < count; ++j) to[j * width] = (adds ? to[j * width] : 0) + line[j];
    } else if (adds) {
      double* to = sum + (row + r) * width + 16 * vector;
      for (int64_t j = 0; j < count; ++j) to[j] += line[j];
    } else {
      std::copy_n(line, count, sum + (row + r) * width + 16 * vector);
    }
  }
}

// Whole vectors of columns, block row by block row from the diagonal on; the few columns behind them as rows
void gram_tile(const float* x, int64_t length, int64_t width, int64_t known, bool adds, Ahead& ahead, double* sum) {
  int64_t vectors = width / 16, rest = width % 16;
  if (rest > kRest) ++vectors, rest = 0;
  const int64_t height = width - rest;
  for (int64_t row = 0; row < height;) {
    const int64_t from = std::max(row, row < known ? known : 0) / 16, rows = vectors - from == 4 ? 4 : 8;
    const auto run = vectors - from == 4   ? gram_block<4, 4>
                     : vectors - from == 3 ? gram_block<8, 3>
                     : vectors - from == 2 ? gram_block<8, 2>
                                           : gram_block<8, 1>;
    run(x, length, row, from, std::min(rows, height - row), height, width, false, adds, ahead, sum);
    row += rows;
  }
  if (rest)
    (rest <= kRest / 2 ? gram_block<kRest / 2, 4> : gram_block<kRest, 4>)(x, length, height, 0, rest, width, width, true,
                                                                          adds, ahead, sum);
}

// The columns of out that there are
template <int rows, int vectors>
inline void put(const __m512 (&acc)[rows][vectors], int64_t num_cols, float* out, int64_t stride) {
  for (int z = 0; z < vectors; ++z) {
    const __mmask16 mask = first(num_cols - 16 * z);
    if (!mask) break;
    for (int r = 0; r < rows; ++r) _mm512_mask_storeu_ps(out + r * stride + 16 * z, mask, acc[r][z]);
  }
}

template <int rows>
inline void product_rows(const float* x, const float* right, int64_t depth, int64_t num_cols, Ahead& ahead, float* out,
                         int64_t stride) {
  __m512 acc[rows][kColumns / 16];
  clear(acc);
  multiply_block(depth, x, kWidest, 1, right, kColumns, ahead, acc);
  put(acc, num_cols, out, stride);
}

void product_tile(const float* tile, int64_t start, int64_t length, int64_t depth, const Product& product, Ahead& ahead) {
  float* out = product.out + start * product.stride;
  int64_t i = 0;
  for (; i + kProductRows <= length; i += kProductRows)
    product_rows<kProductRows>(tile + i * kWidest, product.right, depth, product.num_cols, ahead, out + i * product.stride,
                               product.stride);
  for (; i < length; ++i)
    product_rows<1>(tile + i * kWidest, product.right, depth, product.num_cols, ahead, out + i * product.stride,
                    product.stride);
}

// A tile's gradient of the basis, ``rows`` of its columns at a time
template <int rows, int vectors>
int64_t basis_block(const Chunks& ha, int64_t start, int64_t num_cols, const float* grad, int64_t grad_stride, Ahead& ahead,
                    float* grad_basis) {
  for (; start + rows <= num_cols; start += rows) {
    __m512 acc[rows][vectors];
    clear(acc);
    multiply_block(ha.num_chunks, grad + start, 1, grad_stride, ha.data, kWidest, ahead, acc);
    put(acc, ha.width, grad_basis + start * ha.width, ha.width);
  }
  return start;
}

// A tile's part of some chunks' gradient of [h | 1], added to the sum
template <int rows, int vectors>
void features_block(const float* tile, int64_t num_cols, const float* grad, int64_t grad_stride, Ahead& ahead, double* sum) {
  __m512 acc[rows][vectors];
  clear(acc);
  multiply_block(num_cols, grad, grad_stride, 1, tile, kWidest, ahead, acc);
  for (int r = 0; r < rows; ++r)
    for (int z = 0; z < vectors; ++z) {
      alignas(64) float line[16];
      _mm512_store_ps(line, acc[r][z]);
      for (int j = 0; j < 16; ++j) sum[r * kWidest + 16 * z + j] += line[j];
    }
}

// Of a block, whose sums are in registers
constexpr int most_rows(int vectors) { return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6; }

using FeaturesBlock = decltype(&features_block<1, 1>);

template <int vectors, int... rows>
constexpr std::array<FeaturesBlock, sizeof...(rows)> features_blocks(std::integer_sequence<int, rows...>) {
  return {features_block<rows + 1, vectors>...};
}

template <int vectors>
void back_tile(const Chunks& ha, const float* tile, int64_t num_cols, const float* grad, int64_t grad_stride, Ahead& ahead,
               float* grad_basis, double* grad_ha) {
  constexpr auto blocks = features_blocks<vectors>(std::make_integer_sequence<int, most_rows(vectors)>());
  avx512::in_shares(ha.num_chunks, most_rows(vectors), [&](int64_t n, int64_t count) {
    blocks[count - 1](tile, num_cols, grad + n * grad_stride, grad_stride, ahead, grad_ha + n * kWidest);
  });
  const int64_t done = basis_block<vectors == 4 ? 4 : 8, vectors>(ha, 0, num_cols, grad, grad_stride, ahead, grad_basis);
  basis_block<1, vectors>(ha, done, num_cols, grad, grad_stride, ahead, grad_basis);
}

}  // namespace

bool available() {
  static const bool is_available = avx512::wish() != avx512::Wish::unwanted && __builtin_cpu_supports("avx512f");
  return is_available;
}

void gram(const Rows& x, int64_t known, bool adds, double* sum, const Product& product) {
  alignas(64) float tile[kTile * kWidest] = {};
  const int64_t width = x.first_cols + x.second_cols;
  for (int64_t start = 0; start < x.num_rows; start += kTile, adds = true) {
    const int64_t length = std::min(kTile, x.num_rows - start);
    write(x, start, length, tile);
    Ahead ahead(x, start + length);
    gram_tile(tile, length, width, known, adds, ahead, sum);
    if (product.right) product_tile(tile, start, length, width, product, ahead);
  }
}

void multiply(const Rows& x, const Product& product) {
  alignas(64) float tile[kTile * kWidest];
  for (int64_t start = 0; start < x.num_rows; start += kTile) {
    const int64_t length = std::min(kTile, x.num_rows - start);
    write(x, start, length, tile);
    Ahead ahead(x, start + length);
    product_tile(tile, start, length, x.first_cols + x.second_cols, product, ahead);
  }
}

void generate_back(const Chunks& ha, const float* basis, int64_t num_cols, const float* grad, int64_t grad_stride,
                   float* grad_basis, double* grad_ha) {
  alignas(64) float tile[kTile * kWidest] = {};
  const Rows all{basis, basis, nullptr, num_cols, ha.width, 0, ha.width};
  const int64_t vectors = (ha.width + 15) / 16;
  const auto back = vectors == 1 ? back_tile<1> : vectors == 2 ? back_tile<2> : vectors == 3 ? back_tile<3> : back_tile<4>;
  for (int64_t start = 0; start < num_cols; start += kTile) {
    const int64_t length = std::min(kTile, num_cols - start);
    write(all, start, length, tile);
    Ahead ahead(all, start + length);
    back(ha, tile, length, grad + start, grad_stride, ahead, grad_basis + start * ha.width, grad_ha);
  }
}

}  // namespace fasthyper::narrow

#else

namespace fasthyper::narrow {

bool available() { return false; }
void gram(const Rows&, int64_t, bool, double*, const Product&) {}
void multiply(const Rows&, const Product&) {}
void generate_back(const Chunks&, const float*, int64_t, const float*, int64_t, float*, double*) {}

}  // namespace fasthyper::narrow
#endif
