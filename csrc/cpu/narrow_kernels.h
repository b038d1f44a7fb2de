// narrow.h in registers of the kind that blocks.h was included for.
#pragma once

#include "narrow.h"

namespace fasthyper::simd {
namespace {
namespace narrow {

using fasthyper::narrow::Chunks;
using fasthyper::narrow::kFeatures;
using fasthyper::narrow::Product;
using fasthyper::narrow::Rows;

constexpr int64_t kRoom = 8192;            // floats of a tile, which stays in the first-level cache
constexpr int64_t kHighest = 120;          // rows of a tile: as many sums in float32 before one in float64
constexpr int64_t kEven = 24;              // and a multiple of this, of which the rows of all blocks are shares
constexpr int64_t kRest = kLanes * 3 / 4;  // most columns behind whole vectors that are made as rows, of a Gram matrix
constexpr int64_t kLast = 3;               // or one by one, of a product

// Whole vectors of columns, and how many columns are left behind them
struct Split {
  int64_t vectors, rest;
  Split(int64_t num_cols, int64_t most_rest) : vectors(num_cols / kLanes), rest(num_cols % kLanes) {
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
      : x_(x), pitch_(padded(x.first_cols + x.second_cols)), height_(std::min(kHighest, kRoom / pitch_ / kEven * kEven)) {}

  int64_t height() const { return height_; }

  // A tile from row ``start`` on. ordered: the first columns come first, and all are second ones.
  Tile write(int64_t start, bool ordered = false) {
    const int64_t length = std::min(height_, x_.num_rows - start), at = start * x_.stride;
    const int64_t width = x_.first_cols + x_.second_cols;
    const Part first{x_.first + at, nullptr, x_.first_cols},
        second{x_.second + at, x_.minus ? x_.minus + at : nullptr, x_.second_cols};
    ordered ? put(first, second, length) : put(second, first, length);
    return {data_, pitch_, length, ordered ? 0 : x_.first_cols, ordered ? width : x_.second_cols};
  }

 private:
  struct Part {
    const float *from, *minus;
    int64_t num_cols;

    Vec load(int64_t at) const { return minus ? load_any(from + at) - load_any(minus + at) : load_any(from + at); }
    Vec load(Mask mask, int64_t at) const {
      return minus ? load_some(mask, from + at) - load_some(mask, minus + at) : load_some(mask, from + at);
    }
  };

  // Whole vectors, so that no store meets two cache lines; in one of them the left part may end and the right one begin
  void put(const Part& left, const Part& right, int64_t num_rows) {
    const int64_t whole = left.num_cols / kLanes * kLanes, left_rest = left.num_cols - whole;
    const int64_t width = left.num_cols + right.num_cols;
    const Mask left_mask = first(left_rest), right_mask = between(left_rest, width - whole);
    const Mask last_mask = first(width - pitch_ + kLanes);
    for (int64_t i = 0; i < num_rows; ++i) {
      float* to = data_ + i * pitch_;
      const int64_t at = i * x_.stride, right_at = at - left.num_cols;
      int64_t j = 0;
      for (; j < whole; j += kLanes) store(to + j, left.load(at + j));
      if (left_rest) store(to + j, left.load(left_mask, at + j) + right.load(right_mask, right_at + j)), j += kLanes;
      for (; j < pitch_ - kLanes; j += kLanes) store(to + j, right.load(right_at + j));
      if (j < pitch_) store(to + j, right.load(last_mask, right_at + j));
    }
  }

  const Rows& x_;
  const int64_t pitch_, height_;
  alignas(64) float data_[kRoom];
};

// Of the second columns whole vectors, met by their own rows from the diagonal on and by those of the first columns; the few
// columns behind them as rows that meet all. Rows and columns of the sum are a tile's.
void gram_tile(const Tile& x, double* sum, Ahead& ahead) {
  const auto rows = [&](int64_t row, int64_t num_rows, int64_t lo, int64_t hi) {
    for_blocks<true, Ahead>(num_rows, hi - lo, [&](int64_t r, int64_t rows, int64_t z, int64_t vectors, auto block) {
      alignas(64) float made[kBlock];
      const int64_t first = row + r, col = kLanes * (lo + z), length = kLanes * vectors;
      block(x.length, x.data + first, x.pitch, x.data + col, x.pitch, length, ahead, made, length);
      for (int64_t i = 0; i < rows; ++i) {
        double* to = sum + (first + i) * x.pitch + col;
        for (int64_t j = 0; j < length; ++j) to[j] += made[i * length + j];
      }
    });
  };
  const Split split(x.second_cols, kRest);
  const int64_t height = x.second_cols - split.rest;
  for (int64_t z = 0; z < split.vectors; ++z) rows(kLanes * z, std::min(kLanes, height - kLanes * z), z, split.vectors);
  rows(x.second_cols, x.first_cols, 0, split.vectors);
  rows(height, split.rest, 0, x.pitch / kLanes);
}

// The last columns of a product, of which pack() has made rows, for four rows at a time, the last of which may be one
template <int cols>
void last_columns(const Tile& x, const float* right, float* out, int64_t stride) {
  for (int64_t i = 0; i < x.length; i += 4) {
    const float* row[4];
    for (int64_t r = 0; r < 4; ++r) row[r] = x.data + std::min(i + r, x.length - 1) * x.pitch;
    Vec acc[cols][4];  // row by row
    clear(acc);
    for (int64_t k = 0; k < x.pitch; k += kLanes)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const Vec value = load(row[r] + k);
#pragma GCC unroll 3
        for (int c = 0; c < cols; ++c) {
          Vec& sum = acc[(r * cols + c) / 4][(r * cols + c) % 4];
          sum = multiply_add(value, load(right + c * x.pitch + k), sum);
        }
      }
    float made[4 * cols];
    for (int c = 0; c < cols; ++c) _mm_storeu_ps(made + 4 * c, sums(acc[c]));
    for (int64_t r = 0; r < 4; ++r) std::copy_n(made + r * cols, cols, out + std::min(i + r, x.length - 1) * stride);
  }
}

void product_tile(const Tile& x, int64_t start, const Product& product, Ahead& ahead) {
  const Split split(product.num_cols, kLast);
  const int64_t pitch = kLanes * split.vectors, whole = product.num_cols - split.rest;
  float* out = product.out + start * product.stride;
  for_blocks<false, Ahead>(x.length, split.vectors, [&](int64_t r, int64_t, int64_t z, int64_t, auto block) {
    block(x.width(), x.data + r * x.pitch, x.pitch, product.right + kLanes * z, pitch, whole - kLanes * z, ahead,
          out + r * product.stride + kLanes * z, product.stride);
  });
  constexpr decltype(&last_columns<1>) last[] = {last_columns<1>, last_columns<2>, last_columns<3>};
  if (split.rest) last[split.rest - 1](x, product.right + x.width() * pitch, out + whole, product.stride);
}

int64_t sum_size(int64_t width) { return width * padded(width); }

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
  const int64_t width = first_cols + second_cols, pitch = padded(width);
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
  return num_rows * kLanes * split.vectors + split.rest * padded(num_rows);
}

// Rows as a tile's columns are, the last columns as rows behind them
void pack(const float* from, int64_t row_stride, int64_t col_stride, int64_t num_rows, int64_t num_cols, int64_t split,
          float* to) {
  const Split cols(num_cols, kLast);
  const int64_t pitch = kLanes * cols.vectors, whole = num_cols - cols.rest, depth = padded(num_rows);
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
  const Rows all{basis, basis, nullptr, num_cols, 0, ha.width, ha.width};
  const int64_t vectors = count(ha.width);
  Writer writer(all);
  for (int64_t start = 0; start < num_cols; start += writer.height()) {
    const Tile tile = writer.write(start);
    Ahead ahead(all, start + tile.length, tile.length);
    for_blocks<false, Ahead>(ha.num_chunks, vectors, [&](int64_t n, int64_t rows, int64_t z, int64_t vectors, auto block) {
      alignas(64) float made[kBlock];
      const int64_t col = kLanes * z, length = kLanes * vectors;
      block(tile.length, grad + start + n * grad_stride, grad_stride, tile.data + col, tile.pitch, length, ahead, made,
            length);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < length; ++j) grad_ha[(n + i) * kFeatures + col + j] += made[i * length + j];
    });
    for_blocks<true, Ahead>(tile.length, vectors, [&](int64_t row, int64_t, int64_t z, int64_t, auto block) {
      block(ha.num_chunks, grad + start + row, grad_stride, ha.data + kLanes * z, kFeatures, ha.width - kLanes * z, ahead,
            grad_basis + (start + row) * ha.width + kLanes * z, ha.width);
    });
  }
}

}  // namespace narrow
}  // namespace
}  // namespace fasthyper::simd
