// The squared drift of generated weights and its gradients, without the weights (DESIGN E2).
//
// In a rectangle of real weights (rows = tasks x chunks, columns) the residual is D = X Y', X = [dH | H* | 1] over rows,
// Y = [V_H | dV] over columns, both M = 2H + 1 wide. columns() makes Y'Y; rows(), called tile by tile by whoever makes the
// features, makes X'WX and d/dH = 2 WX (Y'V_H); finish() makes d/dV = 2 Y (X'W [H | 1]) and the value <X'WX, Y'Y>.
// Columns are cut where a rectangle begins or ends, so that each column is multiplied once however many rectangles it is in.
// Rectangles marked direct make tiles of D instead, and drop them.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "tensor.h"

namespace fasthyper {

constexpr int64_t kColumnTileElements = 1 << 18;  // packed elements of Y that one thread holds
constexpr int64_t kDirectColumns = 1024;          // columns of a tile of D
constexpr int64_t kGramGrain = 1 << 14;           // elements of a Gram matrix below which a second thread does not pay
constexpr int64_t kGramBlock = 88;                // narrowest block of a symmetric product that is not computed twice

struct Rectangle {
  int64_t task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi;
  bool direct;
  int64_t num_cols() const { return col_hi - col_lo; }
};

inline void check_interval(const char* what, int64_t lo, int64_t hi, int64_t size) {
  STD_TORCH_CHECK(0 <= lo && lo <= hi && hi <= size, "output_drift: a rectangle of the plan has ", what, " [", lo, ", ", hi,
                  "), which leaves the grid [0, ", size, ")");
}

inline std::vector<Rectangle> read_plan(const Tensor& plan, int64_t num_tasks, int64_t num_chunks, int64_t chunk_size) {
  std::vector<Rectangle> rectangles;
  const int64_t* row = const_data<int64_t>(plan);
  for (int64_t i = 0; i < plan.size(0); ++i, row += plan.size(1)) {
    const Rectangle r{row[0], row[1] < 0 ? num_tasks : row[1], row[2], row[3], row[4], row[5], row[6] != 0};
    check_interval("tasks", r.task_lo, r.task_hi, num_tasks);
    check_interval("chunks", r.chunk_lo, r.chunk_hi, num_chunks);
    check_interval("columns", r.col_lo, r.col_hi, chunk_size);
    rectangles.push_back(r);
  }
  return rectangles;
}

template <typename scalar_t>
class Drift {
 public:
  using Gram = std::vector<double>;  // M x M; small products are summed in float64

  // gram0: [B, K, K] float64, H*'WH* of each rectangle, or empty: then it is computed
  Drift(const Tensor& basis, const Tensor& basis0, const Tensor& weight, const Tensor& gram0, const Tensor& plan,
        int64_t num_tasks, int64_t num_chunks, const Tensor& grad_basis)
      : basis_tensor_(basis),
        grad_basis_tensor_(grad_basis),
        num_chunks_(num_chunks),
        width_(basis.size(1) - 1),
        full_(2 * width_ + 1),
        basis_(const_data<scalar_t>(basis)),
        basis0_(const_data<scalar_t>(basis0)),
        weight_(const_data<scalar_t>(weight)),
        gram0_(gram0.size(0) > 0 ? const_data<double>(gram0) : nullptr),
        rectangles_(read_plan(plan, num_tasks, num_chunks, basis.size(0))) {}

  // What one thread of the row pass needs.
  struct Worker {
    Worker(const Drift& drift, int64_t tile)
        : wx(drift.make({tile, drift.full_})),
          out(drift.make({tile, drift.width_})),
          product(drift.make({drift.full_ * drift.full_})),
          grams(drift.rectangles_.size()),
          picked(tile) {}

    Tensor wx, out, product;
    Tensor x, y, d, ha, out_basis, grad_basis;  // made when first needed
    std::vector<Gram> grams;
    std::vector<int64_t> picked;  // rows of the tile that lie in a rectangle
    double direct_value = 0;
  };

  const std::vector<Rectangle>& rectangles() const { return rectangles_; }
  const Tensor& to_h(size_t rectangle) const { return to_h_[rectangle]; }  // 2 Y'V_H, unless it is direct

  // First pass over the columns.
  void columns() {
    std::vector<int64_t> cuts;
    for (const Rectangle& r : rectangles_)
      if (!r.direct && r.num_cols() > 0) cuts.insert(cuts.end(), {r.col_lo, r.col_hi});
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    for (size_t i = 0; i + 1 < cuts.size(); ++i) segments_.push_back(make_segment(cuts[i], cuts[i + 1]));
    for (const Rectangle& r : rectangles_) {
      to_h_.push_back(r.direct ? Tensor() : make({full_, width_}));  // 2 Y'V_H
      if (r.direct) continue;
      scalar_t* to_h = data<scalar_t>(to_h_.back());
      for_gram_rows([&](int64_t i) {
        std::fill_n(to_h + i * width_, width_, scalar_t(0));
        for (const Segment& s : segments_)
          if (covers(r, s))
            for (int64_t j = 0; j < width_; ++j) to_h[i * width_ + j] += scalar_t(2 * s.gram[i * full_ + j]);
      });
    }
  }

  // A tile of rows first, first + 1, ..., row = task * num_chunks + chunk: adds to the worker's sums and sets the gradient
  // of their features, grad [rows, H]. x = [dH | H* | 1] of the rows.
  void rows(Worker& worker, int64_t first, const Tensor& x, const Tensor& grad) const {
    bool is_set = false;
    for (size_t b = 0; b < rectangles_.size(); ++b) {
      const Rectangle& r = rectangles_[b];
      const int64_t count = pick(r, first, x.size(0), worker.picked.data());
      if (count == 0 || r.num_cols() == 0) continue;
      if (!r.direct && 4 * count > 3 * x.size(0)) {  // most rows: the others get weight 0, and nothing is moved
        weigh(worker, first, x, count);
        add_gram(worker, b, fasthyper::rows(worker.wx, 0, x.size(0)), x);
        mm_out(is_set ? fasthyper::rows(worker.out, 0, x.size(0)) : grad, fasthyper::rows(worker.wx, 0, x.size(0)),
               to_h_[b]);
        if (is_set) add(grad.numel(), const_data<scalar_t>(worker.out), data<scalar_t>(grad));
        is_set = true;
        continue;
      }
      if (!is_set) std::fill_n(data<scalar_t>(grad), grad.numel(), scalar_t(0));
      is_set = true;
      gather(worker, first, x, count);
      const Tensor picked = fasthyper::rows(worker.x, 0, count), weighed = fasthyper::rows(worker.wx, 0, count);
      if (r.direct) {
        direct_rows(worker, r, first, picked, grad);
      } else {
        add_gram(worker, b, weighed, picked);
        mm_out(fasthyper::rows(worker.out, 0, count), weighed, to_h_[b]);
        scatter(worker, count, grad);
      }
    }
    if (!is_set) std::fill_n(data<scalar_t>(grad), grad.numel(), scalar_t(0));
  }

  // Second pass over the columns; returns the value.
  double finish(const std::vector<const Worker*>& workers) {
    double value = 0;
    std::vector<Gram> row_grams;
    for (size_t b = 0; b < rectangles_.size(); ++b) row_grams.push_back(total_gram(workers, b));
    const Tensor to_basis = make({full_, width_ + 1});  // 2 X'W Ha = 2 (X'W [H* | 1] + X'W [dH | 0]), over all rectangles
    std::vector<double> value_of_row(full_);
    for (const Segment& s : segments_) {
      for_gram_rows([&](int64_t i) {
        scalar_t* sum = data<scalar_t>(to_basis) + i * (width_ + 1);
        std::fill_n(sum, width_ + 1, scalar_t(0));
        value_of_row[i] = 0;
        for (size_t b = 0; b < rectangles_.size(); ++b) {
          if (row_grams[b].empty() || !covers(rectangles_[b], s)) continue;
          const double* gram = row_grams[b].data() + i * full_;
          for (int64_t j = 0; j < width_; ++j) sum[j] += scalar_t(2 * (gram[width_ + j] + gram[j]));
          sum[width_] += scalar_t(2 * gram[2 * width_]);
          value_of_row[i] += dot(full_, gram, s.gram.data() + i * full_);
        }
      });
      value = std::accumulate(value_of_row.begin(), value_of_row.end(), value);
      for_column_tiles(s.lo, s.hi, [&](Scratch& scratch, int64_t lo, int64_t length) {
        pack_columns(lo, length, data<scalar_t>(scratch.y));
        mm_out(fasthyper::rows(grad_basis_tensor_, lo, length), fasthyper::rows(scratch.y, 0, length), to_basis);
      });
    }
    for (const Worker* worker : workers) {
      value += worker->direct_value;
      if (!worker->grad_basis.defined()) continue;
      add(grad_basis_tensor_.numel(), const_data<scalar_t>(worker->grad_basis), data<scalar_t>(grad_basis_tensor_));
    }
    return std::max(value, 0.0);
  }

 private:
  struct Segment {
    int64_t lo, hi;
    Gram gram;
  };
  struct Scratch {
    Tensor y, product;
    Gram gram;
  };

  static bool covers(const Rectangle& r, const Segment& s) { return r.col_lo <= s.lo && s.hi <= r.col_hi; }

  Segment make_segment(int64_t lo, int64_t hi) {
    Segment segment{lo, hi, Gram(full_ * full_, 0.0)};
    for (const Scratch& scratch : for_column_tiles(lo, hi, [&](Scratch& scratch, int64_t start, int64_t length) {
           pack_columns(start, length, data<scalar_t>(scratch.y));
           const Tensor y = fasthyper::rows(scratch.y, 0, length);
           add_symmetric(scratch.gram, scratch.product, y, y, full_);
         }))
      accumulate(full_ * full_, scratch.gram.data(), segment.gram.data());
    mirror(segment.gram);
    return segment;
  }

  void add_gram(Worker& worker, size_t b, const Tensor& wx, const Tensor& x) const {
    if (worker.grams[b].empty()) worker.grams[b].assign(full_ * full_, 0.0);
    add_symmetric(worker.grams[b], worker.product, wx, x, gram0_ ? width_ : full_);
  }

  void direct_rows(Worker& worker, const Rectangle& r, int64_t first, const Tensor& x, const Tensor& grad) const {
    const int64_t with_bias = width_ + 1, count = x.size(0), tile = worker.wx.size(0);
    if (!worker.d.defined()) {
      worker.y = make({kDirectColumns, full_});
      worker.d = make({tile * kDirectColumns});
      worker.ha = make({tile, with_bias});
      worker.out_basis = make({kDirectColumns, with_bias});
      worker.grad_basis = torch::stable::new_zeros(basis_tensor_, basis_tensor_.sizes());
    }
    const scalar_t* x_row = const_data<scalar_t>(x);
    scalar_t* ha = data<scalar_t>(worker.ha);
    for (int64_t i = 0; i < count; ++i, x_row += full_, ha += with_bias) {
      for (int64_t j = 0; j < width_; ++j) ha[j] = x_row[j] + x_row[width_ + j];
      ha[width_] = 1;
    }
    for (int64_t lo = r.col_lo; lo < r.col_hi; lo += kDirectColumns) {
      const int64_t num_cols = std::min(kDirectColumns, r.col_hi - lo);
      const Tensor y = fasthyper::rows(worker.y, 0, num_cols);
      pack_columns(lo, num_cols, data<scalar_t>(y));
      const Tensor d = matrix(worker.d, count, num_cols);
      mm_out(d, x, transposed(y));
      scalar_t* residual = data<scalar_t>(d);
      for (int64_t i = 0; i < count; ++i, residual += num_cols) {
        const scalar_t w = task_weight(first + worker.picked[i]);
        double square = 0;
        for (int64_t j = 0; j < num_cols; ++j) square += double(residual[j]) * residual[j];
        for (int64_t j = 0; j < num_cols; ++j) residual[j] *= 2 * w;
        worker.direct_value += double(w) * square;
      }
      mm_out(fasthyper::rows(worker.out, 0, count), d, cols(y, 0, width_));
      scatter(worker, count, grad);
      mm_out(fasthyper::rows(worker.out_basis, 0, num_cols), transposed(d), fasthyper::rows(worker.ha, 0, count));
      add(num_cols * with_bias, const_data<scalar_t>(worker.out_basis), data<scalar_t>(worker.grad_basis) + lo * with_bias);
    }
  }

  // gram[:height, :] += (left'right)[:height, :] where left = W right, block row by block row: nothing below the diagonal
  void add_symmetric(Gram& gram, const Tensor& product, const Tensor& left, const Tensor& right, int64_t height) const {
    const int64_t num_blocks = std::max<int64_t>(1, height / kGramBlock);
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t start = height * block / num_blocks, stop = height * (block + 1) / num_blocks;
      const Tensor out = matrix(product, stop - start, full_ - start);
      mm_out(out, transposed(cols(left, start, stop - start)), cols(right, start, full_ - start));
      const scalar_t* from = const_data<scalar_t>(out);
      for (int64_t i = start; i < stop; ++i, from += full_ - start)
        accumulate(full_ - start, from, gram.data() + i * full_ + start);
    }
  }

  // What lies below the diagonal; within a diagonal block both triangles were computed, and are made the same
  void mirror(Gram& gram) const {
    constexpr int64_t kBlock = 32;  // both sides of the diagonal stay in cache
    for (int64_t lo = 0; lo < full_; lo += kBlock)
      for (int64_t j = 0; j < std::min(full_, lo + kBlock); ++j)
        for (int64_t i = std::max(lo, j + 1); i < std::min(full_, lo + kBlock); ++i)
          gram[i * full_ + j] = gram[j * full_ + i];
  }

  // Empty where no worker met the rectangle, or where it is direct
  Gram total_gram(const std::vector<const Worker*>& workers, size_t b) const {
    Gram total;
    const int64_t with_bias = width_ + 1;
    for (const Worker* worker : workers)
      if (!worker->grams[b].empty()) total.resize(full_ * full_);
    if (total.empty()) return total;
    for_gram_rows([&](int64_t i) {
      for (const Worker* worker : workers)
        if (!worker->grams[b].empty())
          accumulate(full_ - i, worker->grams[b].data() + i * full_ + i, total.data() + i * full_ + i);
      if (gram0_ && i >= width_)
        std::copy_n(gram0_ + (b * with_bias + i - width_) * with_bias + i - width_, full_ - i, total.data() + i * full_ + i);
    });
    mirror(total);
    return total;
  }

  template <typename Body>
  void for_gram_rows(const Body& body) const {
    torch::stable::parallel_for(0, full_, std::max<int64_t>(1, kGramGrain / full_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  // Local numbers of the tile's rows that lie in the rectangle
  int64_t pick(const Rectangle& r, int64_t first, int64_t length, int64_t* picked) const {
    int64_t count = 0, task = first / num_chunks_, chunk = first % num_chunks_;
    for (int64_t i = 0; i < length; ++i) {
      if (r.task_lo <= task && task < r.task_hi && r.chunk_lo <= chunk && chunk < r.chunk_hi) picked[count++] = i;
      if (++chunk == num_chunks_) chunk = 0, ++task;
    }
    return count;
  }

  // wx = W x, with weight 0 for rows that were not picked
  void weigh(Worker& worker, int64_t first, const Tensor& x, int64_t count) const {
    const scalar_t* from = const_data<scalar_t>(x);
    scalar_t* to = data<scalar_t>(worker.wx);
    const int64_t* next = worker.picked.data();
    const int64_t* const end = next + count;
    for (int64_t i = 0; i < x.size(0); ++i, from += full_, to += full_) {
      const bool is_picked = next != end && *next == i;
      if (is_picked) ++next;
      scale(full_, is_picked ? task_weight(first + i) : scalar_t(0), from, to);
    }
  }

  // x and wx of the picked rows, one after the other
  void gather(Worker& worker, int64_t first, const Tensor& x, int64_t count) const {
    if (!worker.x.defined()) worker.x = make({worker.wx.size(0), full_});
    for (int64_t i = 0; i < count; ++i) {
      const scalar_t* from = const_data<scalar_t>(x) + worker.picked[i] * full_;
      std::copy_n(from, full_, data<scalar_t>(worker.x) + i * full_);
      scale(full_, task_weight(first + worker.picked[i]), from, data<scalar_t>(worker.wx) + i * full_);
    }
  }

  void scatter(const Worker& worker, int64_t count, const Tensor& grad) const {
    for (int64_t i = 0; i < count; ++i)
      add(width_, const_data<scalar_t>(worker.out) + i * width_, data<scalar_t>(grad) + worker.picked[i] * width_);
  }

  // y = [V_H | dV] for columns [lo, lo + length)
  void pack_columns(int64_t lo, int64_t length, scalar_t* y) const {
    const int64_t with_bias = width_ + 1;
    const scalar_t *now = basis_ + lo * with_bias, *star = basis0_ + lo * with_bias;
    for (int64_t i = 0; i < length; ++i, y += full_, now += with_bias, star += with_bias) {
      std::copy(now, now + width_, y);
      for (int64_t j = 0; j < with_bias; ++j) y[width_ + j] = now[j] - star[j];
    }
  }

  template <typename Body>
  std::vector<Scratch> for_column_tiles(int64_t lo, int64_t hi, const Body& body) const {
    const int64_t tile = std::min(hi - lo, std::clamp<int64_t>(kColumnTileElements / full_, 1024, 4096));
    return for_tiles<Scratch>(
        hi - lo, tile, [&] { return Scratch{make({tile, full_}), make({full_ * full_}), Gram(full_ * full_, 0.0)}; },
        [&](Scratch& scratch, int64_t start, int64_t length) { body(scratch, lo + start, length); });
  }

  scalar_t task_weight(int64_t row) const { return weight_[row / num_chunks_]; }
  Tensor make(std::initializer_list<int64_t> size) const { return torch::stable::new_empty(basis_tensor_, size); }

  const Tensor basis_tensor_, grad_basis_tensor_;
  const int64_t num_chunks_, width_, full_;
  const scalar_t *basis_, *basis0_, *weight_;
  const double* gram0_;
  const std::vector<Rectangle> rectangles_;
  std::vector<Segment> segments_;
  std::vector<Tensor> to_h_;
};

}  // namespace fasthyper
