// Rectangles in direct form: a tile of the residual D is made, weighed, squared, contracted into the gradients and dropped.
//
// With the snapshot as target D = X Y' as in drift.h, X = [dH | H* | 1] and Y = [V_H | dV]; with given targets
// D = [H | 1] V' - targets. Each weight may have an importance F: then the value is sum w F D^2. Tiles of rows come one
// after the other; within one, threads share its columns, so that each gradient of the basis is written by one thread.
#pragma once

#include "drift.h"

namespace fasthyper {

constexpr int64_t kDirectRows = 512, kDirectCols = 512;  // of a tile of D, at most
constexpr int64_t kDirectGrain = 1 << 20;                // multiply-adds below which a second thread does not pay

// The numbers of one task's weights, where they lie in memory
template <typename scalar_t>
struct Cells {
  const scalar_t* first;
  int64_t stride;
};

// Of all tasks: list is empty, one tensor [T, P], or T tensors [P]. num_weights: those that a plan reaches.
template <typename scalar_t>
std::vector<Cells<scalar_t>> read_cells(const char* name, const std::vector<Tensor>& list, int64_t num_tasks,
                                        int64_t num_weights) {
  std::vector<Cells<scalar_t>> cells;
  const auto check_size = [&](int64_t size) {
    FASTHYPER_CHECK(num_weights <= size, "target_drift: the plan reaches ", num_weights, " weights of a task, ", name,
                    " has ", size);
  };
  if (list.size() == 1 && list[0].dim() == 2) {
    FASTHYPER_CHECK(list[0].size(0) == num_tasks, "target_drift: ", name, " must have ", num_tasks, " rows, got ",
                    list[0].size(0));
    check_size(list[0].size(1));
    for (int64_t t = 0; t < num_tasks; ++t)
      cells.push_back({const_data<scalar_t>(list[0]) + t * list[0].stride(0), list[0].stride(1)});
    return cells;
  }
  FASTHYPER_CHECK(list.empty() || int64_t(list.size()) == num_tasks, "target_drift: ", name, " must have ", num_tasks,
                  " tensors, got ", list.size());
  for (const Tensor& row : list) {
    FASTHYPER_CHECK(row.dim() == 1, "target_drift: ", name, " must be tensors [P]");
    check_size(row.size(0));
    cells.push_back({const_data<scalar_t>(row), row.stride(0)});
  }
  return cells;
}

template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void subtract(int64_t size, const scalar_t* __restrict__ from, scalar_t* __restrict__ to) {
  for (int64_t i = 0; i < size; ++i) to[i] -= from[i];
}

template <typename scalar_t>
class DirectDrift {
 public:
  // basis0 is undefined where targets are given; grad_basis is added to
  DirectDrift(const Tensor& basis, const Tensor& basis0, const Tensor& weight, const Tensor& grad_basis,
              std::vector<Cells<scalar_t>> targets = {}, std::vector<Cells<scalar_t>> importance = {})
      : basis_(basis),
        basis0_(basis0),
        grad_basis_(grad_basis),
        width_(basis.size(1) - 1),
        depth_(basis0.defined() ? 2 * width_ + 1 : width_ + 1),
        weight_(const_data<scalar_t>(weight)),
        targets_(std::move(targets)),
        importance_(std::move(importance)) {}

  // Returns the rectangle's value. fill(task, chunk, x) writes a row of X, [dH | H* | 1] or [H | 1]; take(task, chunk, grad)
  // is given the gradient of the row's features.
  template <typename Fill, typename Take>
  double rectangle(const Rectangle& r, const Fill& fill, const Take& take) const {
    const int64_t num_chunks = r.chunk_hi - r.chunk_lo, num_rows = (r.task_hi - r.task_lo) * num_chunks;
    if (num_rows == 0 || r.num_cols() == 0) return 0;
    const int64_t num_tiles = (num_rows - 1) / kDirectRows + 1, most = (num_rows - 1) / num_tiles + 1;
    const Tensor x = make({most, depth_}), grad = make({most, width_});
    std::vector<Row> rows(most);
    double value = 0;
    for (int64_t first = 0; first < num_rows; first += most) {
      const int64_t count = std::min(most, num_rows - first);
      const auto for_rows = [&](const auto& body) {
        for (int64_t i = 0; i < count; ++i)
          body(i, r.task_lo + (first + i) / num_chunks, r.chunk_lo + (first + i) % num_chunks);
      };
      for_rows([&](int64_t i, int64_t task, int64_t chunk) {
        fill(task, chunk, data<scalar_t>(x) + i * depth_);
        rows[i] = {task, chunk * basis_.size(0)};
      });
      value += tile(rows, fasthyper::rows(x, 0, count), r.col_lo, r.col_hi, fasthyper::rows(grad, 0, count));
      for_rows([&](int64_t i, int64_t task, int64_t chunk) { take(task, chunk, const_data<scalar_t>(grad) + i * width_); });
    }
    return value;
  }

 private:
  struct Row {
    int64_t task, first;  // flat position of its chunk's first weight
  };
  struct Worker {
    Tensor y, d, out, grad, grad_basis, cells;
    double value;
  };

  double tile(const std::vector<Row>& rows, const Tensor& x, int64_t col_lo, int64_t col_hi, const Tensor& grad) const {
    const int64_t num_rows = x.size(0), num_cols = tile_columns(num_rows, col_hi - col_lo), with_bias = width_ + 1;
    const Tensor ha = basis0_.defined() ? features_now(x) : x;
    const std::vector<Worker> workers = for_tiles<Worker>(
        col_hi - col_lo, num_cols,
        [&] {
          return Worker{make({num_cols, depth_}),
                        make({num_rows * num_cols}),
                        make({num_rows, width_}),
                        torch::stable::new_zeros(basis_, {num_rows, width_}),
                        make({num_cols, with_bias}),
                        make({num_cols}),
                        0};
        },
        [&](Worker& worker, int64_t start, int64_t length) {
          const Tensor now = fasthyper::rows(basis_, col_lo + start, length), d = matrix(worker.d, num_rows, length);
          mm_out(d, x, transposed(basis0_.defined() ? pack_columns(worker, col_lo + start, length) : now));
          for (int64_t i = 0; i < num_rows; ++i)
            worker.value += weigh(worker, rows[i], col_lo + start, length, data<scalar_t>(d) + i * length);
          mm_out(worker.out, d, cols(now, 0, width_));
          add(worker.out.numel(), const_data<scalar_t>(worker.out), data<scalar_t>(worker.grad));
          const Tensor grad_basis = fasthyper::rows(worker.grad_basis, 0, length);
          mm_out(grad_basis, transposed(d), ha);
          add(grad_basis.numel(), const_data<scalar_t>(grad_basis),
              data<scalar_t>(grad_basis_) + (col_lo + start) * with_bias);
        });
    double value = 0;
    std::fill_n(data<scalar_t>(grad), grad.numel(), scalar_t(0));
    for (const Worker& worker : workers) {
      value += worker.value;
      add(grad.numel(), const_data<scalar_t>(worker.grad), data<scalar_t>(grad));
    }
    return value;
  }

  double weigh(const Worker& worker, const Row& row, int64_t col, int64_t length, scalar_t* d) const {
    scalar_t* scratch = data<scalar_t>(worker.cells);
    const scalar_t w = weight_[row.task];
    if (!targets_.empty()) subtract(length, line(targets_[row.task], row.first + col, length, scratch), d);
    if (importance_.empty()) return weigh_residual<false, scalar_t>(length, w, nullptr, d);
    return weigh_residual<true, scalar_t>(length, w, line(importance_[row.task], row.first + col, length, scratch), d);
  }

  // Cells [start, start + length), one after the other: where they lie, or copied
  static const scalar_t* line(const Cells<scalar_t>& cells, int64_t start, int64_t length, scalar_t* scratch) {
    if (cells.stride == 1) return cells.first + start;
    for (int64_t j = 0; j < length; ++j) scratch[j] = cells.first[(start + j) * cells.stride];
    return scratch;
  }

  // As many tiles as give each thread the same number of them
  int64_t tile_columns(int64_t num_rows, int64_t num_cols) const {
    const int64_t threads = num_rows * num_cols * depth_ < kDirectGrain ? 1 : torch::stable::get_num_threads();
    const int64_t num_tiles = threads * ((num_cols - 1) / (threads * kDirectCols) + 1);
    return (num_cols - 1) / num_tiles + 1;
  }

  Tensor features_now(const Tensor& x) const {  // [H | 1] from [dH | H* | 1]
    const int64_t with_bias = width_ + 1;
    const Tensor ha = make({x.size(0), with_bias});
    const scalar_t* from = const_data<scalar_t>(x);
    scalar_t* to = data<scalar_t>(ha);
    for (int64_t i = 0; i < x.size(0); ++i, from += depth_, to += with_bias) {
      std::copy_n(from + width_, with_bias, to);
      add(width_, from, to);
    }
    return ha;
  }

  Tensor pack_columns(const Worker& worker, int64_t lo, int64_t length) const {  // [V_H | dV]
    const scalar_t* now = const_data<scalar_t>(basis_) + lo * (width_ + 1);
    const scalar_t* then = const_data<scalar_t>(basis0_) + lo * (width_ + 1);
    write_pair<scalar_t>({now, now, then, length, width_, width_ + 1, width_ + 1}, data<scalar_t>(worker.y));
    return rows(worker.y, 0, length);
  }

  Tensor make(std::initializer_list<int64_t> size) const { return torch::stable::new_empty(basis_, size); }

  const Tensor basis_, basis0_, grad_basis_;
  const int64_t width_, depth_;
  const scalar_t* weight_;
  const std::vector<Cells<scalar_t>> targets_, importance_;
};

}  // namespace fasthyper
