// Matrix products, whole or summed, of packed factors where the machine has what multiplies those, by aten elsewhere and in
// float64.
//
// What becomes of a product is said by a function of its blocks: result(i, j, num_rows, num_cols, block, stride) gets what
// lies at (i, j). A product is then added, weighed or summed in float64 while it is in cache.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "memory.h"
#include "narrow.h"
#include "panels.h"
#include "tensor.h"

namespace fasthyper {

constexpr int64_t kWidestBesideTiles = 64;  // pairs multiplied in registers where there are tile units

// A view; one of the strides is 1
template <typename T>
struct Matrix {
  T* data;
  int64_t num_rows, num_cols, row_stride, col_stride = 1;

  operator Matrix<const T>() const { return {data, num_rows, num_cols, row_stride, col_stride}; }
  Matrix rows(int64_t start, int64_t length) const {
    return {data + start * row_stride, length, num_cols, row_stride, col_stride};
  }
  Matrix cols(int64_t start, int64_t length) const {
    return {data + start * col_stride, num_rows, length, row_stride, col_stride};
  }
  Matrix transposed() const { return {data, num_cols, num_rows, col_stride, row_stride}; }
};

// Rows that lie one after the other
template <typename T>
Matrix<T> dense(T* data, int64_t num_rows, int64_t num_cols) {
  return {data, num_rows, num_cols, num_cols};
}

template <typename scalar_t>
Matrix<const scalar_t> dense(const Tensor& t) {
  return dense(const_data<scalar_t>(t), t.size(0), t.size(1));
}

// [first | second], or [first | second - minus] where that is not null: columns of rows that lie ``stride`` apart
template <typename T>
struct Pair {
  const T *first, *second, *minus;
  int64_t num_rows, first_cols, second_cols, stride;

  int64_t num_cols() const { return first_cols + second_cols; }
  Pair rows(int64_t start, int64_t length) const {
    const int64_t at = start * stride;
    return {first + at, second + at, minus ? minus + at : nullptr, length, first_cols, second_cols, stride};
  }
};

template <typename T>
Tensor as_tensor(Matrix<T> m) {
  using scalar_t = std::remove_const_t<T>;
  const int64_t sizes[2] = {m.num_rows, m.num_cols}, strides[2] = {m.row_stride, m.col_stride};
  const int32_t dtype = std::is_same_v<scalar_t, float> ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<scalar_t*>(m.data), 2, sizes, strides, 0, dtype,
                                                            aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Parts that factors are packed in, of those that are asked for; 0: aten multiplies
template <typename scalar_t>
int64_t packed_parts(int64_t precision) {
  FASTHYPER_CHECK(1 <= precision && precision <= 3, "precision must be 1, 2 or 3, got ", precision);
  return std::is_same_v<scalar_t, float> ? panels::parts_for(precision) : 0;
}

// What a thread needs to multiply
struct Workspace {
  Memory left, product, pair;
  alignas(64) float block[panels::kSide * panels::kSide];
};

// A block to its place, in the type that is kept there; adds: onto what is there
template <bool adds, typename from_t, typename to_t>
FASTHYPER_VECTOR_CLONES void put_block(int64_t num_rows, int64_t num_cols, const from_t* __restrict__ block, int64_t stride,
                                       to_t* __restrict__ to, int64_t to_stride) {
  for (int64_t i = 0; i < num_rows; ++i, block += stride, to += to_stride)
    for (int64_t j = 0; j < num_cols; ++j) to[j] = (adds ? to[j] : to_t(0)) + block[j];
}

template <typename T>
FASTHYPER_VECTOR_CLONES void write_pair(Pair<T> pair, T* __restrict__ to) {
  for (int64_t i = 0; i < pair.num_rows; ++i, to += pair.num_cols()) {
    const T *first = pair.first + i * pair.stride, *second = pair.second + i * pair.stride;
    const T* minus = pair.minus ? pair.minus + i * pair.stride : nullptr;
    T* rest = to + pair.first_cols;
    for (int64_t j = 0; j < pair.first_cols; ++j) to[j] = first[j];
    for (int64_t j = 0; j < pair.second_cols; ++j) rest[j] = minus ? second[j] - minus[j] : second[j];
  }
}

// Whether pairs so wide are multiplied in registers as they are read, by right factors so wide
inline bool is_narrow(int64_t width, int64_t num_cols, int64_t parts) {
  const bool has_tiles = 0 < parts && parts < panels::kWhole;
  return width <= (has_tiles ? kWidestBesideTiles : narrow::kWidest) && num_cols <= narrow::kColumns && narrow::available();
}

inline narrow::Rows as_rows(Pair<float> x) {
  return {x.first, x.second, x.minus, x.num_rows, x.first_cols, x.second_cols, x.stride};
}

// As one matrix; in the memory if it is none yet
template <typename T>
Matrix<const T> as_matrix(Pair<T> pair, Memory& memory) {
  if (!pair.minus && pair.second == pair.first + pair.first_cols)
    return {pair.first, pair.num_rows, pair.num_cols(), pair.stride};
  T* to = memory.get<T>(pair.num_rows * pair.num_cols());
  write_pair(pair, to);
  return dense<const T>(to, pair.num_rows, pair.num_cols());
}

// A right factor, packed once for many left ones. It is a view where aten multiplies: what was packed must stay.
template <typename scalar_t>
class RightFactor {
 public:
  explicit RightFactor(int64_t parts) : parts_(parts) {}

  bool packs() const { return parts_ > 0; }

  // What is multiplied from the left by a matrix, or by a pair whose first columns meet the first ``split`` rows
  void pack(Matrix<const scalar_t> b, int64_t split = 0) {
    b_ = b;
    is_narrow_ = false;
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (split > 0 && is_narrow(b.num_rows, b.num_cols, parts_)) {
        is_narrow_ = true;
        float* to = memory_.get<float>(narrow::packed_size(b.num_rows, b.num_cols));
        return narrow::pack(b.data, b.row_stride, b.col_stride, b.num_rows, b.num_cols, split, to);
      }
      if (parts_ == 0) return;
      depth_ = padded(split) + b.num_rows - split;
      const Matrix<const float> rest = b.rows(split, b.num_rows - split);
      char* to = memory_.get<char>(panels::count(b.num_cols) * panel());
      pack_panels({b.data, b.col_stride, b.row_stride, b.num_cols, split}, to);
      pack_panels({rest.data, rest.col_stride, rest.row_stride, rest.num_cols, rest.num_rows}, to + part_bytes(split));
    }
  }

  // b + what lies ``plus`` further on; only where it packs
  void pack_sum(Matrix<const scalar_t> b, int64_t plus) {
    b_ = b;
    if constexpr (std::is_same_v<scalar_t, float>) {
      depth_ = b.num_rows;
      memory_.get<char>(panels::count(b.num_cols) * panel());
      pack_panels({b.data, b.col_stride, b.row_stride, b.num_cols, b.num_rows, b.data + plus}, memory_.data<char>());
    }
  }

  template <typename Result>
  void multiply(Matrix<const scalar_t> a, Workspace& space, const Result& result) const {
    if constexpr (std::is_same_v<scalar_t, float>)
      if (parts_)
        return by_panels(a.num_rows, space, result, [&](int64_t start, int64_t length, char* left) {
          const float* from = a.data + start * a.row_stride;
          panels::pack_left({from, a.row_stride, a.col_stride, length, depth_}, parts_, left, panel());
        });
    by_aten(a, space, result);
  }

  template <typename Result>
  void multiply(Pair<scalar_t> a, Workspace& space, const Result& result) const {
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (is_narrow_) {
        float* product = space.product.get<float>(a.num_rows * b_.num_cols);
        narrow::multiply(as_rows(a), {memory_.data<float>(), b_.num_cols, product, b_.num_cols});
        return result(0, 0, a.num_rows, b_.num_cols, product, b_.num_cols);
      }
      if (parts_)
        return by_panels(a.num_rows, space, result, [&](int64_t start, int64_t length, char* left) {
          const Pair<float> some = a.rows(start, length);
          panels::pack_left({some.first, a.stride, 1, length, a.first_cols}, parts_, left, panel());
          panels::pack_left({some.second, a.stride, 1, length, a.second_cols, some.minus, -1}, parts_,
                            left + part_bytes(a.first_cols), panel());
        });
    }
    by_aten(as_matrix(a, space.pair), space, result);
  }

  template <typename Left>
  void multiply_into(Left a, Workspace& space, Matrix<scalar_t> out) const {
    if constexpr (std::is_same_v<Left, Pair<float>>)
      if (is_narrow_) return narrow::multiply(as_rows(a), {memory_.data<float>(), b_.num_cols, out.data, out.row_stride});
    if constexpr (!std::is_same_v<Left, Pair<scalar_t>>)
      if (parts_ == 0) return mm_out(as_tensor(out), as_tensor(a), as_tensor(b_));
    multiply(a, space, [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
      put_block<false>(m, n, block, stride, out.data + i * out.row_stride + j, out.row_stride);
    });
  }

  // Where it was packed for narrow products, what they take; else null
  const float* narrow_data() const { return is_narrow_ ? memory_.data<float>() : nullptr; }

 private:
  int64_t padded(int64_t depth) const { return panels::padded(depth, parts_); }
  int64_t part_bytes(int64_t depth) const { return panels::bytes(depth, parts_); }
  int64_t panel() const { return part_bytes(depth_); }
  void pack_panels(const panels::Source& source, char* to) const { panels::pack_right(source, parts_, to, panel()); }

  // One panel of the left factor after the other meets all of the right one, which stays in the second-level cache
  template <typename Result, typename PackLeft>
  void by_panels(int64_t num_rows, Workspace& space, const Result& result, const PackLeft& pack_left) const {
    const panels::Units units(parts_);
    char* left = space.left.get<char>(panel());
    for (int64_t i = 0; i < num_rows; i += panels::kSide) {
      const int64_t m = std::min(panels::kSide, num_rows - i);
      pack_left(i, m, left);
      for (int64_t j = 0; j < b_.num_cols; j += panels::kSide) {
        const int64_t n = std::min(panels::kSide, b_.num_cols - j);
        panels::multiply(left, memory_.data<char>() + j / panels::kSide * panel(), depth_, parts_, m, n, space.block);
        result(i, j, m, n, space.block, panels::kSide);
      }
    }
  }

  template <typename Result>
  void by_aten(Matrix<const scalar_t> a, Workspace& space, const Result& result) const {
    const Matrix<scalar_t> product = dense(space.product.get<scalar_t>(a.num_rows * b_.num_cols), a.num_rows, b_.num_cols);
    mm_out(as_tensor(product), as_tensor(a), as_tensor(b_));
    result(0, 0, a.num_rows, b_.num_cols, product.data, b_.num_cols);
  }

  int64_t parts_, depth_ = 0;
  bool is_narrow_ = false;
  Matrix<const scalar_t> b_{};
  Memory memory_;
};

// out = a b, any strides; packed where the factors are wide enough to pay for it
template <typename scalar_t>
void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  constexpr int64_t kNarrow = 64, kColumns = 512;
  const auto view = [](const Tensor& t) {
    return Matrix<scalar_t>{data<scalar_t>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
  };
  const auto is_dense = [](const Tensor& t) { return t.stride(0) == 1 || t.stride(1) == 1; };
  const bool is_wide = std::min({a.size(0), a.size(1), b.size(1)}) >= kNarrow;
  const int64_t parts = is_wide && is_dense(a) && is_dense(b) && out.stride(1) == 1 ? packed_parts<scalar_t>(3) : 0;
  if (parts == 0) return mm_out(out, a, b);
  struct Worker {
    explicit Worker(int64_t parts) : by_b(parts) {}
    Workspace space;
    RightFactor<scalar_t> by_b;
  };
  const Matrix<scalar_t> to = view(out), left = view(a), right = view(b);
  const int64_t threads = torch::stable::get_num_threads(), share = (right.num_cols + threads - 1) / threads;
  const int64_t panels = panels::count(std::min(share, kColumns));
  for_tiles<Worker>(
      right.num_cols, panels * panels::kSide, [&] { return Worker(parts); },
      [&](Worker& worker, int64_t first, int64_t length) {
        worker.by_b.pack(right.cols(first, length));
        worker.by_b.multiply_into(left, worker.space, to.cols(first, length));
      });
}

// X'WX summed in float64, X = pairs of rows that are added a few hundred at a time and multiplied a thousand at a time. Of
// its rows those of the first columns are made, or all; and of them what is not below the diagonal.
template <typename scalar_t>
class GramSum {
 public:
  // known: of the first columns among each other nothing need be made
  GramSum(int64_t parts, int64_t first_cols, int64_t second_cols, bool only_first, bool known = false)
      : parts_(parts),
        first_(first_cols),
        width_(first_cols + second_cols),
        height_(only_first ? first_cols : width_),
        known_(known ? first_cols : 0) {}

  // weight of each row; null: 1
  void add(Pair<scalar_t> x, const scalar_t* weight, Workspace& space) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (!weight && is_narrow(width_, 0, parts_)) return add_narrow(x, nullptr, {});
      if (parts_) {
        for (int64_t i = 0; i < x.num_rows; i += kDepth)
          append(x.rows(i, std::min(kDepth, x.num_rows - i)), weight ? weight + i : nullptr, space);
        return;
      }
    }
    by_aten(as_matrix(x, space.pair), weight, space);
  }

  // Also out = X right, unless right is null
  void add_narrow(Pair<float> x, const float* right, Matrix<float> out) {
    const int64_t size = narrow::sum_size(width_);
    double* sum = narrow_.get<double>(size);
    if (!is_narrow_) std::fill_n(sum, size, 0.0);
    is_narrow_ = true;
    narrow::gram(as_rows(x), known_ > 0, sum, {right, out.num_cols, out.data, out.row_stride});
  }

  // A sum [width, width] that was made elsewhere
  void set(const std::vector<double>& sum) {
    std::copy(sum.begin(), sum.end(), gram_.get<double>(sum.size()));
    is_set_ = true;
  }

  // Makes what was added part of the sum
  void finish(Workspace& space) {
    if constexpr (std::is_same_v<scalar_t, float>)
      if (filled_) flush(space);
    if (!is_narrow_) return;
    narrow::finish(narrow_.data<double>(), first_, width_ - first_, known_ > 0, gram_.get<double>(width_ * width_));
    is_set_ = true;
  }

  // [width, or as many rows as are made, width], finished; null where nothing was added
  const double* sum() const { return is_set_ ? gram_.data<double>() : nullptr; }

 private:
  static constexpr int64_t kDepth = 1024;    // rows multiplied at a time: that many sums in float32 before one in float64
  static constexpr int64_t kLeftPanels = 4;  // held in the second-level cache while right panels pass
  static constexpr int64_t kAtenBlock = 88;  // narrowest block that is not computed twice

  // (|W|^1/2 X) is kept as a right factor; its transpose, with the signs of W, is the left one
  void append(Pair<float> x, const float* weight, Workspace& space) {
    const int64_t padded = panels::padded(x.num_rows, parts_);
    if (filled_ + padded > kDepth) flush(space);
    const int64_t stride = panels::bytes(kDepth, parts_);
    char* to = right_.template get<char>(num_panels() * stride) + panels::bytes(filled_, parts_);
    float root[kDepth];
    for (int64_t i = 0; i < padded; ++i) {
      const float w = i < x.num_rows && weight ? weight[i] : 1.0f;
      root[i] = std::sqrt(std::abs(w));
      negative_[filled_ + i] = w < 0;
    }
    const float* scale = weight ? root : nullptr;
    panels::pack_right({x.first, 1, x.stride, x.first_cols, x.num_rows, nullptr, 1, scale}, parts_, to, stride);
    panels::pack_right({x.second, 1, x.stride, x.second_cols, x.num_rows, x.minus, -1, scale}, parts_,
                       to + panels::count(first_) * stride, stride);
    filled_ += padded;
  }

  void flush(Workspace& space) {
    const panels::Units units(parts_);
    const int64_t stride = panels::bytes(kDepth, parts_);
    gram_.get<double>(height_ * width_);  // also where none of its rows are made
    const int64_t num_left = height_ == first_ ? panels::count(first_) : num_panels();
    const char* right = right_.data<char>();
    char* room = space.left.get<char>(kLeftPanels * stride);
    const char* left[kLeftPanels];
    for (int64_t first = 0; first < num_left; first += kLeftPanels) {
      const int64_t last = std::min(first + kLeftPanels, num_left);
      for (int64_t i = first; i < last; ++i)
        left[i - first] = panels::as_left(right + i * stride, filled_, parts_, negative_, room + (i - first) * stride);
      for (int64_t j = first; j < num_panels(); ++j)
        for (int64_t i = first; i < std::min(last, j + 1); ++i) {
          const auto [row, m] = columns_of(i);
          const auto [col, n] = columns_of(j);
          if (col < known_) continue;  // and so is the row
          panels::multiply(left[i - first], right + j * stride, filled_, parts_, m, n, space.block);
          put(m, n, space.block, panels::kSide, row, col);
        }
    }
    filled_ = 0;
    is_set_ = true;
  }

  void by_aten(Matrix<const scalar_t> x, const scalar_t* weight, Workspace& space) {
    Matrix<const scalar_t> left = x;
    if (weight) {
      scalar_t* weighed = space.left.get<scalar_t>(x.num_rows * height_);
      for (int64_t i = 0; i < x.num_rows; ++i) scale(height_, weight[i], x.data + i * x.row_stride, weighed + i * height_);
      left = dense<const scalar_t>(weighed, x.num_rows, height_);
    }
    if (known_) aten_block(left, x, 0, known_, known_, space);
    const int64_t height = height_ - known_, num_blocks = std::max<int64_t>(1, height / kAtenBlock);
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t start = known_ + height * block / num_blocks, stop = known_ + height * (block + 1) / num_blocks;
      aten_block(left, x, start, stop, start, space);
    }
    is_set_ = true;
  }

  // Rows [start, stop), from column ``col`` on
  void aten_block(Matrix<const scalar_t> left, Matrix<const scalar_t> x, int64_t start, int64_t stop, int64_t col,
                  Workspace& space) {
    const int64_t height = stop - start, width = width_ - col;
    const Matrix<scalar_t> product = dense(space.product.get<scalar_t>(height * width), height, width);
    mm_out(as_tensor(product), as_tensor(left.cols(start, height).transposed()), as_tensor(x.cols(col, width)));
    put(height, width, product.data, product.row_stride, start, col);
  }

  void put(int64_t num_rows, int64_t num_cols, const scalar_t* block, int64_t stride, int64_t row, int64_t col) {
    double* to = gram_.get<double>(height_ * width_) + row * width_ + col;
    (is_set_ ? put_block<true, scalar_t, double> : put_block<false, scalar_t, double>)(num_rows, num_cols, block, stride, to,
                                                                                       width_);
  }

  int64_t num_panels() const { return panels::count(first_) + panels::count(width_ - first_); }

  // (first column, number of columns) of a panel
  std::pair<int64_t, int64_t> columns_of(int64_t panel) const {
    const int64_t of_first = panels::count(first_), col = panel * panels::kSide;
    if (panel < of_first) return {col, std::min(panels::kSide, first_ - col)};
    const int64_t shifted = first_ + (panel - of_first) * panels::kSide;
    return {shifted, std::min(panels::kSide, width_ - shifted)};
  }

  int64_t parts_, first_, width_, height_, known_;
  Memory gram_, right_, narrow_;  // the last one the sum of what was added in registers
  bool is_set_ = false, is_narrow_ = false;
  int64_t filled_ = 0;  // rows, padded
  bool negative_[kDepth];
};

// X'X added to the sum and out = X b, X read once
template <typename scalar_t>
void add_and_multiply(Pair<scalar_t> x, GramSum<scalar_t>& sum, const RightFactor<scalar_t>& b, Workspace& space,
                      Matrix<scalar_t> out) {
  if constexpr (std::is_same_v<scalar_t, float>)
    if (b.narrow_data()) return sum.add_narrow(x, b.narrow_data(), out);
  if (!b.packs()) {  // one matrix for both
    const Matrix<const scalar_t> whole = as_matrix(x, space.pair);
    x = {whole.data, whole.data + x.first_cols, nullptr, x.num_rows, x.first_cols, x.second_cols, whole.row_stride};
  }
  sum.add(x, nullptr, space);
  b.multiply_into(x, space, out);
}

}  // namespace fasthyper
