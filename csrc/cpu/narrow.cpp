#include "narrow.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#pragma GCC target("avx512f")
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the compiler's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "avx512.h"

namespace fasthyper::narrow {
namespace {

using avx512::first;
using avx512::in_shares;
using avx512::kVectors;
using avx512::most_rows;

constexpr int64_t kRoom = 8192;    // floats of a tile, which stays in the first-level cache
constexpr int64_t kHighest = 120;  // rows of a tile: as many sums in float32 before one in float64
constexpr int64_t kEven = 24;      // and a multiple of this, of which the rows of all blocks are shares
constexpr int64_t kRest = 12;      // most columns behind whole vectors that are made as rows, of a Gram matrix
constexpr int64_t kLast = 3;       // or one by one, of a product

constexpr int64_t count(int64_t n) { return (n + 15) / 16; }

// Whole vectors of columns, and how many columns are left behind them
struct Split {
  int64_t vectors, rest;
  Split(int64_t num_cols, int64_t most_rest) : vectors(num_cols / 16), rest(num_cols % 16) {
    if (rest > most_rest || vectors == 0) vectors = count(num_cols), rest = 0;
  }
};

// What comes after a tile, in memory: asked for while the tile is multiplied, line by line, so that its reading is hidden
struct Ahead {
  const char *first = nullptr, *second = nullptr;
  int64_t num_bytes = 0, at = 0;

  Ahead(const Rows& x, int64_t start, int64_t length) {
    if (start >= x.num_rows) return;
    first = reinterpret_cast<const char*>(x.first + start * x.stride);
    second = reinterpret_cast<const char*>((x.minus ? x.minus : x.second) + start * x.stride);
    num_bytes = std::min(length, x.num_rows - start) * x.stride * int64_t(sizeof(float));
  }

  void ask() {
    if (at >= num_bytes) return;
    _mm_prefetch(first + at, _MM_HINT_T0);
    _mm_prefetch(second + at, _MM_HINT_T0);
    at += 64;
  }
};

// Rows of pairs, ``pitch`` apart, the second columns before the first ones, behind them zeros
struct Tile {
  const float* data;
  int64_t pitch, length, first_cols, second_cols;
  int64_t width() const { return first_cols + second_cols; }
};

class Writer {
 public:
  explicit Writer(const Rows& x)
      : x_(x),
        pitch_(16 * count(x.first_cols + x.second_cols)),
        height_(std::min(kHighest, kRoom / pitch_ / kEven * kEven)) {}

  int64_t height() const { return height_; }

  // A tile from row ``start`` on. ordered: the first columns come first, and all are second ones.
  Tile write(int64_t start, bool ordered = false) {
    const int64_t length = std::min(height_, x_.num_rows - start), width = x_.first_cols + x_.second_cols;
    const Part first{x_.first, nullptr, x_.first_cols, ordered ? 0 : x_.second_cols};
    const Part second{x_.second, x_.minus, x_.second_cols, ordered ? x_.first_cols : 0};
    put(ordered ? first : second, start, length, false);
    put(ordered ? second : first, start, length, true);
    return {data_, pitch_, length, ordered ? 0 : x_.first_cols, ordered ? width : x_.second_cols};
  }

 private:
  struct Part {
    const float *from, *minus;
    int64_t num_cols, to;
  };

  void put(const Part& part, int64_t start, int64_t num_rows, bool is_last) {
    const int64_t at = start * x_.stride;
    in_shares(count(part.num_cols), kVectors, [&](int64_t vector, int64_t vectors) {
      const int64_t j = 16 * vector;
      const float* minus = part.minus ? part.minus + at + j : nullptr;
      const auto run = vectors == 1 ? put_rows<1> : vectors == 2 ? put_rows<2> : vectors == 3 ? put_rows<3> : put_rows<4>;
      run(part.from + at + j, minus, x_.stride, part.num_cols - j, num_rows, is_last, data_ + part.to + j, pitch_);
    });
  }

  // Vectors are written whole if what is behind them is written later
  template <int vectors>
  static void put_rows(const float* from, const float* minus, int64_t stride, int64_t num_cols, int64_t num_rows,
                       bool is_last, float* to, int64_t pitch) {
    const __mmask16 read = first(num_cols - 16 * (vectors - 1)), written = is_last ? read : __mmask16(0xffff);
    const auto run = [&](auto has_minus) {
      for (int64_t i = 0; i < num_rows; ++i, from += stride, to += pitch) {
        __m512 value[vectors];
        for (int z = 0; z < vectors; ++z) {
          const __mmask16 mask = z == vectors - 1 ? read : __mmask16(0xffff);
          value[z] = _mm512_maskz_loadu_ps(mask, from + 16 * z);
          if constexpr (has_minus) value[z] = _mm512_sub_ps(value[z], _mm512_maskz_loadu_ps(mask, minus + 16 * z));
        }
        for (int z = 0; z < vectors - 1; ++z) _mm512_storeu_ps(to + 16 * z, value[z]);
        _mm512_mask_storeu_ps(to + 16 * (vectors - 1), written, value[vectors - 1]);
        if constexpr (has_minus) minus += stride;
      }
    };
    minus ? run(std::true_type()) : run(std::false_type());
  }

  const Rows& x_;
  const int64_t pitch_, height_;
  alignas(64) float data_[kRoom] = {};
};

// Of the second columns whole vectors, met by their own rows from the diagonal on and by those of the first columns; the few
// columns behind them as rows that meet all. Rows and columns of the sum are a tile's.
void gram_tile(const Tile& x, double* sum, Ahead& ahead) {
  const auto rows = [&](int64_t row, int64_t num_rows, int64_t lo, int64_t hi) {
    avx512::for_blocks<true, Ahead>(num_rows, hi - lo, [&](int64_t r, int64_t rows, int64_t z, int64_t vectors, auto block) {
      alignas(64) float made[most_rows(2) * 2 * 16];
      static_assert(most_rows(3) * 3 <= most_rows(2) * 2 && most_rows(4) * 4 <= most_rows(2) * 2);
      const int64_t first = row + r, col = 16 * (lo + z), length = 16 * vectors;
      block(x.length, x.data + first, x.pitch, x.data + col, x.pitch, length, ahead, made, length);
      for (int64_t i = 0; i < rows; ++i) {
        double* to = sum + (first + i) * x.pitch + col;
        for (int64_t j = 0; j < length; ++j) to[j] += made[i * length + j];
      }
    });
  };
  const Split split(x.second_cols, kRest);
  const int64_t height = x.second_cols - split.rest;
  for (int64_t z = 0; z < split.vectors; ++z) rows(16 * z, std::min<int64_t>(16, height - 16 * z), z, split.vectors);
  rows(x.second_cols, x.first_cols, 0, split.vectors);
  rows(height, split.rest, 0, x.pitch / 16);
}

// The last columns of a product, of which pack() has made rows
template <int cols>
void last_columns(const Tile& x, const float* right, float* out, int64_t stride) {
  const float* row = x.data;
  for (int64_t i = 0; i < x.length; ++i, row += x.pitch, out += stride) {
    __m512 acc[1][cols];
    avx512::clear(acc);
    for (int64_t k = 0; k < x.pitch; k += 16) {
      const __m512 value = _mm512_load_ps(row + k);
      for (int c = 0; c < cols; ++c) acc[0][c] = _mm512_fmadd_ps(value, _mm512_load_ps(right + c * x.pitch + k), acc[0][c]);
    }
    for (int c = 0; c < cols; ++c) out[c] = _mm512_reduce_add_ps(acc[0][c]);
  }
}

void product_tile(const Tile& x, int64_t start, const Product& product, Ahead& ahead) {
  const Split split(product.num_cols, kLast);
  const int64_t pitch = 16 * split.vectors, whole = product.num_cols - split.rest;
  float* out = product.out + start * product.stride;
  avx512::for_blocks<false, Ahead>(x.length, split.vectors, [&](int64_t r, int64_t, int64_t z, int64_t, auto block) {
    block(x.width(), x.data + r * x.pitch, x.pitch, product.right + 16 * z, pitch, whole - 16 * z, ahead,
          out + r * product.stride + 16 * z, product.stride);
  });
  constexpr decltype(&last_columns<1>) last[] = {last_columns<1>, last_columns<2>, last_columns<3>};
  if (split.rest) last[split.rest - 1](x, product.right + x.width() * pitch, out + whole, product.stride);
}

}  // namespace

bool available() {
  static const bool is_available = avx512::wish() != avx512::Wish::unwanted && __builtin_cpu_supports("avx512f");
  return is_available;
}

int64_t sum_size(int64_t width) { return width * 16 * count(width); }

void gram(const Rows& x, bool is_known, double* sum, const Product& product) {
  Writer writer(x);
  for (int64_t start = 0; start < x.num_rows; start += writer.height()) {
    Tile tile = writer.write(start, !is_known);
    Ahead ahead(x, start + tile.length, tile.length);
    Ahead nothing(x, x.num_rows, 0);  // what is asked for before the product, the product drives out again
    gram_tile(tile, sum, product.right ? nothing : ahead);
    if (!product.right) continue;
    if (!is_known) tile = writer.write(start);
    product_tile(tile, start, product, ahead);
  }
}

void finish(const double* sum, int64_t first_cols, int64_t second_cols, bool is_known, double* out) {
  const int64_t width = first_cols + second_cols, pitch = 16 * count(width);
  if (!is_known) first_cols = 0, second_cols = width;
  const int64_t height = second_cols - Split(second_cols, kRest).rest;
  const auto place = [&](int64_t col) { return col < second_cols ? first_cols + col : col - second_cols; };
  for (int64_t i = 0; i < width; ++i, sum += pitch) {
    if (height <= i && i < second_cols)
      for (int64_t j = 0; j < width; ++j) out[place(j) * width + place(i)] = sum[j];
    else
      std::copy(sum + (i < height ? i : 0), sum + height, out + place(i) * width + first_cols + (i < height ? i : 0));
  }
}

void multiply(const Rows& x, const Product& product) {
  Writer writer(x);
  for (int64_t start = 0; start < x.num_rows; start += writer.height()) {
    const Tile tile = writer.write(start);
    Ahead ahead(x, start + tile.length, tile.length);
    product_tile(tile, start, product, ahead);
  }
}

int64_t packed_size(int64_t num_rows, int64_t num_cols) {
  const Split split(num_cols, kLast);
  return num_rows * 16 * split.vectors + split.rest * 16 * count(num_rows);
}

// Rows as a tile's columns are, the last columns as rows behind them
void pack(const float* from, int64_t row_stride, int64_t col_stride, int64_t num_rows, int64_t num_cols, int64_t split,
          float* to) {
  const Split cols(num_cols, kLast);
  const int64_t pitch = 16 * cols.vectors, whole = num_cols - cols.rest, depth = 16 * count(num_rows);
  float* last = to + num_rows * pitch;
  std::fill_n(to, packed_size(num_rows, num_cols), 0.0f);
  for (int64_t i = 0; i < num_rows; ++i, from += row_stride) {
    const int64_t at = i < split ? num_rows - split + i : i - split;
    for (int64_t j = 0; j < whole; ++j) to[at * pitch + j] = from[j * col_stride];
    for (int64_t j = whole; j < num_cols; ++j) last[(j - whole) * depth + at] = from[j * col_stride];
  }
}

void generate_back(const Chunks& ha, const float* basis, int64_t num_cols, const float* grad, int64_t grad_stride,
                   float* grad_basis, double* grad_ha) {
  static_assert(kFeatures <= 16 * kVectors, "blocks are as wide as all features");
  const Rows all{basis, basis, nullptr, num_cols, 0, ha.width, ha.width};
  const int64_t vectors = count(ha.width);
  Writer writer(all);
  for (int64_t start = 0; start < num_cols; start += writer.height()) {
    const Tile tile = writer.write(start);
    Ahead ahead(all, start + tile.length, tile.length);
    avx512::for_blocks<false, Ahead>(ha.num_chunks, vectors, [&](int64_t n, int64_t rows, int64_t, int64_t, auto block) {
      alignas(64) float made[most_rows(1) * kFeatures];
      block(tile.length, grad + start + n * grad_stride, grad_stride, tile.data, tile.pitch, 16 * vectors, ahead, made,
            kFeatures);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < 16 * vectors; ++j) grad_ha[(n + i) * kFeatures + j] += made[i * kFeatures + j];
    });
    avx512::for_blocks<true, Ahead>(tile.length, vectors, [&](int64_t col, int64_t, int64_t, int64_t, auto block) {
      block(ha.num_chunks, grad + start + col, grad_stride, ha.data, kFeatures, ha.width, ahead,
            grad_basis + (start + col) * ha.width, ha.width);
    });
  }
}

}  // namespace fasthyper::narrow

#else

namespace fasthyper::narrow {

bool available() { return false; }
int64_t sum_size(int64_t) { return 0; }
void gram(const Rows&, bool, double*, const Product&) {}
void finish(const double*, int64_t, int64_t, bool, double*) {}
void multiply(const Rows&, const Product&) {}
int64_t packed_size(int64_t, int64_t) { return 0; }
void pack(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*) {}
void generate_back(const Chunks&, const float*, int64_t, const float*, int64_t, float*, double*) {}

}  // namespace fasthyper::narrow
#endif
