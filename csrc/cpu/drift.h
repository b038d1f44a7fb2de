// The squared drift of generated weights and its gradients, without the weights (DESIGN E2).
//
// In a rectangle of real weights (rows = tasks x chunks, columns) the residual is D = X Y', X = [dH | H* | 1] over rows,
// Y = [V_H | dV] over columns, both M = 2H + 1 wide. Of the columns Y'Y is made, of the rows X'WX, then of each the
// gradient, d/dH = 2 WX (Y'V_H) and d/dV = 2 Y (X'W [H | 1]), and of both the value <X'WX, Y'Y>. One side's sums must be
// there before the other's gradient: pass_rows() keeps few rows and reads the columns once, after their X'WX and before
// their gradient; many rows go through in one pass, tile by tile, between two reads of the columns. Columns are cut where a
// rectangle begins or ends, so that each column is multiplied once however many rectangles it is in. Rectangles marked
// direct make tiles of D instead, and drop them.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "few_rows.h"

namespace fasthyper {

constexpr int64_t kColumnTileElements = 1 << 18;           // packed elements of Y that one thread holds
constexpr int64_t kFewestNarrow = 240, kMostNarrow = 960;  // columns that a thread multiplies in registers at a time
constexpr int64_t kDirectColumns = 1024;                   // columns of a tile of D
constexpr int64_t kRowTile = 256;        // rows at a time: their part of the trunk lies in the second-level cache
constexpr int64_t kRowsKept = 4;         // rows are kept where there are so many times as many columns
constexpr int64_t kFewGrain = 1 << 18;   // multiply-adds of few rows below which a second thread does not pay
constexpr int64_t kGramGrain = 1 << 14;  // elements of a Gram matrix below which a second thread does not pay

struct Rectangle {
  int64_t task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi;
  bool direct;
  int64_t num_cols() const { return col_hi - col_lo; }
};

inline void check_interval(const char* what, int64_t lo, int64_t hi, int64_t size) {
  FASTHYPER_CHECK(0 <= lo && lo <= hi && hi <= size, "output_drift: a rectangle of the plan has ", what, " [", lo, ", ", hi,
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

// to = (adds: to +) weight of the row * slope * block; without a slope, 1 of it. The slopes lie as ``to`` does.
template <typename scalar_t, bool adds>
FASTHYPER_VECTOR_CLONES void put_weighed(int64_t num_rows, int64_t num_cols, const scalar_t* __restrict__ weight,
                                         const scalar_t* __restrict__ block, int64_t stride,
                                         const scalar_t* __restrict__ slope, scalar_t* __restrict__ to, int64_t to_stride) {
  for (int64_t i = 0; i < num_rows; ++i, block += stride, to += to_stride) {
    const scalar_t w = weight[i];
    if (slope) {
      for (int64_t j = 0; j < num_cols; ++j) to[j] = (adds ? to[j] : 0) + w * block[j] * slope[j];
      slope += to_stride;
    } else {
      for (int64_t j = 0; j < num_cols; ++j) to[j] = (adds ? to[j] : 0) + w * block[j];
    }
  }
}

// d = 2 w f d, returning sum w f d^2; f is 1 where has_importance is false
template <bool has_importance, typename scalar_t>
FASTHYPER_VECTOR_CLONES double weigh_residual(int64_t size, scalar_t w, const scalar_t* __restrict__ f,
                                              scalar_t* __restrict__ d) {
  constexpr int64_t kLanes = 8;  // a fixed order, whatever the vector width
  double sum[kLanes] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) {
      const scalar_t fd = has_importance ? f[j + k] * d[j + k] : d[j + k];
      sum[k] += double(fd) * d[j + k];
      d[j + k] = 2 * w * fd;
    }
  for (; j < size; ++j) {
    const scalar_t fd = has_importance ? f[j] * d[j] : d[j];
    sum[0] += double(fd) * d[j];
    d[j] = 2 * w * fd;
  }
  return double(w) * (((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
}

template <typename scalar_t>
class Drift {
 public:
  // gram0: [B, K, K] float64, H*'WH* of each rectangle, or empty: then it is computed; behind them there may be V*'V* of
  // each range of columns between cuts. parts: see packed_parts
  Drift(const Tensor& basis, const Tensor& basis0, const Tensor& weight, const Tensor& gram0, const Tensor& plan,
        int64_t num_tasks, int64_t num_chunks, const Tensor& grad_basis, int64_t parts)
      : basis_tensor_(basis),
        grad_basis_tensor_(grad_basis),
        num_chunks_(num_chunks),
        num_rows_(num_tasks * num_chunks),
        width_(basis.size(1) - 1),
        full_(2 * width_ + 1),
        parts_(parts),
        basis_(const_data<scalar_t>(basis)),
        basis0_(const_data<scalar_t>(basis0)),
        weight_(const_data<scalar_t>(weight)),
        gram0_(gram0.size(0) > 0 ? const_data<double>(gram0) : nullptr),
        rectangles_(read_plan(plan, num_tasks, num_chunks, basis.size(0))),
        all_cuts_(cuts_of(true)),
        row_grams_(rectangles_.size()) {
    const std::vector<int64_t> cuts = cuts_of(false);
    for (size_t i = 0; i + 1 < cuts.size(); ++i) segments_.push_back({cuts[i], cuts[i + 1], Memory()});
    const int64_t num_ranges = std::max<int64_t>(1, all_cuts_.size()) - 1, num_rectangles = rectangles_.size();
    const int64_t num_known = gram0.size(0) - num_rectangles;
    if (!gram0_ || num_known == 0) return;
    FASTHYPER_CHECK(num_known == num_ranges, "hypernet_drift: gram0 holds ", gram0.size(0), " matrices, neither ",
                    num_rectangles, " of rectangles nor these and ", num_ranges, " of columns");
    basis_gram0_ = gram0_ + num_rectangles * (width_ + 1) * (width_ + 1);
  }

  // What one thread of the row pass needs; tile: the most rows at a time.
  struct Worker {
    Worker(const Drift& drift, int64_t tile)
        : picked(tile),
          weight(tile),
          y_factor(drift.parts_),
          ha_factor(drift.parts_),
          is_alone(tile >= drift.num_rows_ && drift.segments_.empty()) {
      for (size_t b = 0; b < drift.rectangles_.size(); ++b)
        grams.emplace_back(drift.parts_, drift.width_, drift.width_ + 1, drift.gram0_ != nullptr);
    }

    Workspace space;
    std::vector<GramSum<scalar_t>> grams;  // X'WX of each rectangle
    std::vector<int64_t> picked;           // rows of the tile that lie in a rectangle
    std::vector<scalar_t> weight;          // of the rows, 0 where a row is not picked; or of the picked rows
    Memory x, y, d, ha;
    RightFactor<scalar_t> y_factor, ha_factor;
    Tensor grad_basis;       // of the direct form; made when first needed
    std::vector<bool> sets;  // whether a rectangle's columns of it are set by that one alone, not added to
    double direct_value = 0;
    bool is_alone;  // nobody else adds to the basis's gradient: that is grad_basis
  };

  // Rows of a tile x = [dH | H* | 1], where the gradient of their features goes, [rows, H], and what it is multiplied by,
  // [rows, H] too; or null
  struct Rows {
    Pair<scalar_t> x;
    const scalar_t* slope;
    scalar_t* grad;
  };

  // Rows [dH | H* | 1] that lie one after the other
  Pair<scalar_t> rows_of(const scalar_t* x, int64_t num_rows) const {
    return {x, x + width_, nullptr, num_rows, width_, width_ + 1, full_};
  }

  const std::vector<Rectangle>& rectangles() const { return rectangles_; }
  const Tensor& to_h(size_t rectangle) const { return to_h_data_[rectangle]; }  // 2 Y'V_H, unless it is direct

  // All rows, by workers that each thread has one of: make(tile) makes one for at most that many rows at a time,
  // forward(worker, first, length) their features, as at(worker, first, length) then says; backward(worker, first, length)
  // takes their gradient. A worker's ``drift`` is what is needed here.
  template <typename Item, typename Make, typename Forward, typename At, typename Backward>
  std::vector<Item> pass_rows(const Make& make, const Forward& forward, const At& at, const Backward& backward) {
    const int64_t threads = torch::stable::get_num_threads();
    const bool by_columns = segments_.empty() && num_rows_ <= kRowTile;  // threads share columns: one gradient of the basis
    const int64_t share = by_columns ? num_rows_ : panels::count((num_rows_ + threads - 1) / threads) * panels::kSide;
    const bool keeps = !segments_.empty() && kRowsKept * num_rows_ <= basis_tensor_.size(0);
    const int64_t tile = std::min({keeps ? share : kRowTile, share, num_rows_});
    if (!keeps) columns();
    std::vector<Item> workers = for_tiles<Item>(
        num_rows_, tile, [&] { return make(tile); },
        [&](Item& worker, int64_t first, int64_t length) {
          forward(worker, first, length);
          rows(worker.drift, first, at(worker, first, length), true, !keeps);
          if (!keeps) backward(worker, first, length);
        });
    sum_rows(parts_of(workers));
    if (!keeps) return workers;
    columns();
    for_each(workers, [&](Item& worker) {
      const int64_t first = (&worker - workers.data()) * tile, length = std::min(tile, num_rows_ - first);
      rows(worker.drift, first, at(worker, first, length), false, true);
      backward(worker, first, length);
    });
    return workers;
  }

  // What is ours of the workers of ``pass_rows``
  template <typename Item>
  static std::vector<Worker*> parts_of(std::vector<Item>& workers) {
    std::vector<Worker*> parts;
    for (Item& worker : workers) parts.push_back(&worker.drift);
    return parts;
  }

  // Of all rows X'WX, which the workers have added up; are_whole: H*'WH* too
  void sum_rows(const std::vector<Worker*>& workers, bool are_whole = false) {
    for_each(workers, [](Worker* worker) {
      for (GramSum<scalar_t>& gram : worker->grams) gram.finish(worker->space);
    });
    for (size_t b = 0; b < rectangles_.size(); ++b) {
      std::vector<const double*> sums;
      for (Worker* worker : workers) sums.push_back(worker->grams[b].sum());
      const bool is_given = gram0_ && !are_whole;
      total(sums, is_given ? gram0_ + b * (width_ + 1) * (width_ + 1) : nullptr, row_grams_[b], [](double*) {});
    }
    has_row_grams_ = true;
  }

  // Reads the columns: makes to_h and, where the sums of the rows are there, the basis's gradient.
  void columns() {
    for (Segment& segment : segments_) pass_columns(segment, true);
    for (const Rectangle& r : rectangles_) {
      to_h_.emplace_back(parts_);
      to_h_data_.push_back(r.direct ? Tensor() : make({full_, width_}));  // 2 Y'V_H
      if (r.direct) continue;
      scalar_t* to_h = data<scalar_t>(to_h_data_.back());
      for_gram_rows([&](int64_t i) {
        std::fill_n(to_h + i * width_, width_, scalar_t(0));
        for (const Segment& s : segments_)
          if (covers(r, s))
            for (int64_t j = 0; j < width_; ++j)
              to_h[i * width_ + j] += scalar_t(2 * s.gram.template data<double>()[i * full_ + j]);
      });
      to_h_.back().pack(dense<const scalar_t>(to_h, full_, width_), width_);
    }
    has_grad_ = has_row_grams_;
  }

  // Reads the columns again where their gradient is not there yet; returns the value.
  double finish(const std::vector<Worker*>& workers) {
    if (workers.empty() || !workers[0]->grad_basis.defined() || !workers[0]->is_alone) {
      std::vector<std::pair<int64_t, int64_t>> set;
      for (const Segment& s : segments_) set.push_back({s.lo, s.hi});
      zero_between(set);
    }
    if (!has_grad_)
      for (Segment& segment : segments_) pass_columns(segment, false);
    double value = 0;
    for (const Segment& segment : segments_) value += value_of(segment);
    for (const Worker* worker : workers) {
      value += worker->direct_value;
      if (!worker->grad_basis.defined() || worker->is_alone) continue;
      add(grad_basis_tensor_.numel(), const_data<scalar_t>(worker->grad_basis), data<scalar_t>(grad_basis_tensor_));
    }
    return std::max(value, 0.0);
  }

 private:
  struct Segment {
    int64_t lo, hi;
    Memory gram;  // Y'Y, [M, M] float64
  };
  struct ColumnWorker {
    explicit ColumnWorker(const Drift& drift)
        : gram(drift.parts_, drift.width_, drift.width_ + 1, false, drift.basis_gram0_ != nullptr) {}

    Workspace space;
    GramSum<scalar_t> gram;
  };

  static bool covers(const Rectangle& r, const Segment& s) { return r.col_lo <= s.lo && s.hi <= r.col_hi; }

  // Where rectangles begin or end among the columns
  std::vector<int64_t> cuts_of(bool with_direct) const {
    std::vector<int64_t> cuts;
    for (const Rectangle& r : rectangles_)
      if ((with_direct || !r.direct) && r.num_cols() > 0) cuts.insert(cuts.end(), {r.col_lo, r.col_hi});
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    return cuts;
  }

  // One read of a segment's columns, for Y'Y, for the basis's gradient, or for both
  void pass_columns(Segment& s, bool with_gram) {
    const Tensor of_rows = has_row_grams_ ? rows_to_basis(s) : Tensor();  // where nothing is packed, it is multiplied by
    RightFactor<scalar_t> to_basis(parts_);
    if (has_row_grams_) to_basis.pack(dense<scalar_t>(of_rows), width_);
    std::vector<ColumnWorker> workers =
        for_column_tiles(s.lo, s.hi, [&](ColumnWorker& worker, int64_t lo, Pair<scalar_t> y) {
          scalar_t* grad = data<scalar_t>(grad_basis_tensor_) + lo * (width_ + 1);
          if (!has_row_grams_) return worker.gram.add(y, nullptr, worker.space);
          const Matrix<scalar_t> out = dense(grad, y.num_rows, width_ + 1);
          if (!with_gram) return to_basis.multiply_into(y, worker.space, out);
          add_and_multiply(y, worker.gram, to_basis, worker.space, out);
        });
    if (!with_gram) return;
    const int64_t grain = are_narrow() ? workers.size() : 1;  // little is left to do
    for_each(workers, [](ColumnWorker& worker) { worker.gram.finish(worker.space); }, grain);
    std::vector<const double*> sums;
    for (const ColumnWorker& worker : workers) sums.push_back(worker.gram.sum());
    total(sums, nullptr, s.gram, [&](double* gram) {
      if (basis_gram0_) set_known(s, gram);
    });
  }

  // V'V of a segment by what is known: with C = V'dV it is V*'V* + C + C' - dV'dV
  void set_known(const Segment& s, double* gram) const {
    const int64_t first = std::lower_bound(all_cuts_.begin(), all_cuts_.end(), s.lo) - all_cuts_.begin();
    const int64_t last = std::lower_bound(all_cuts_.begin(), all_cuts_.end(), s.hi) - all_cuts_.begin();
    for_gram_rows([&](int64_t i) {
      if (i >= width_) return;
      double* to = gram + i * full_;
      for (int64_t j = i; j < width_; ++j)
        to[j] = to[width_ + j] + gram[j * full_ + width_ + i] - gram[(width_ + i) * full_ + width_ + j];
      for (int64_t range = first; range < last; ++range) {
        const double* known = basis_gram0_ + (range * (width_ + 1) + i) * (width_ + 1);
        for (int64_t j = i; j < width_; ++j) to[j] += known[j];
      }
    });
  }

  // 2 X'W [H | 1] = 2 (X'W [H* | 1] + X'W [dH | 0]) of all rows that a segment's columns meet
  Tensor rows_to_basis(const Segment& s) const {
    const Tensor to_basis = make({full_, width_ + 1});
    for_gram_rows([&](int64_t i) {
      scalar_t* sum = data<scalar_t>(to_basis) + i * (width_ + 1);
      std::fill_n(sum, width_ + 1, scalar_t(0));
      for_row_grams(s, [&](const double* gram) {
        gram += i * full_;
        for (int64_t j = 0; j < width_; ++j) sum[j] += scalar_t(2 * (gram[width_ + j] + gram[j]));
        sum[width_] += scalar_t(2 * gram[2 * width_]);
      });
    });
    return to_basis;
  }

  double value_of(const Segment& s) const {  // <X'WX, Y'Y>
    std::vector<double> of_row(full_);
    for_gram_rows([&](int64_t i) {
      for_row_grams(s, [&](const double* gram) {
        of_row[i] += dot(full_, gram + i * full_, s.gram.template data<double>() + i * full_);
      });
    });
    return std::accumulate(of_row.begin(), of_row.end(), 0.0);
  }

  // body(X'WX) of each rectangle that has rows and the segment's columns
  template <typename Body>
  void for_row_grams(const Segment& s, const Body& body) const {
    for (size_t b = 0; b < rectangles_.size(); ++b) {
      const double* gram = row_grams_[b].template data<double>();
      if (gram && covers(rectangles_[b], s)) body(gram);
    }
  }

  // The sum of the workers' sums, which hold what is not below the diagonal, and of gram0 in its corner; whole, once
  // finish(sum) has run. Of some it may be null; of all, then nothing is made.
  template <typename Finish>
  void total(const std::vector<const double*>& sums, const double* gram0, Memory& memory, const Finish& finish) const {
    if (std::all_of(sums.begin(), sums.end(), [](const double* sum) { return sum == nullptr; })) return;
    double* gram = memory.get<double>(full_ * full_);
    for_gram_rows([&](int64_t i) {
      double* to = gram + i * full_;
      if (gram0 && i >= width_) {
        std::copy_n(gram0 + (i - width_) * (width_ + 1) + i - width_, full_ - i, to + i);
        return;
      }
      bool is_set = false;
      for (const double* sum : sums) {
        if (!sum) continue;
        if (is_set)
          accumulate(full_ - i, sum + i * full_ + i, to + i);
        else
          std::copy_n(sum + i * full_ + i, full_ - i, to + i);
        is_set = true;
      }
    });
    finish(gram);
    constexpr int64_t kBlock = 32;  // both sides of the diagonal stay in cache
    const int64_t grain = std::max<int64_t>(1, kGramGrain / (kBlock * full_));
    torch::stable::parallel_for(0, (full_ + kBlock - 1) / kBlock, grain, [&](int64_t begin, int64_t end) {
      for (int64_t lo = begin * kBlock; lo < std::min(full_, end * kBlock); lo += kBlock)
        for (int64_t j = 0; j < std::min(full_, lo + kBlock); ++j)
          for (int64_t i = std::max(lo, j + 1); i < std::min(full_, lo + kBlock); ++i)
            gram[i * full_ + j] = gram[j * full_ + i];
    });
  }

  // Of the basis's gradient all columns but those that begin here and end there, in ascending order
  template <typename Ranges>
  void zero_between(const Ranges& ranges) const {
    scalar_t* grad = data<scalar_t>(grad_basis_tensor_);
    const int64_t with_bias = width_ + 1;
    int64_t reached = 0;
    for (const auto& [lo, hi] : ranges) {
      std::fill(grad + reached * with_bias, grad + lo * with_bias, scalar_t(0));
      reached = hi;
    }
    std::fill(grad + reached * with_bias, grad + grad_basis_tensor_.numel(), scalar_t(0));
  }

  // A tile of rows first, first + 1, ..., row = task * num_chunks + chunk: adds to the worker's sums, or sets the gradient
  void rows(Worker& worker, int64_t first, Rows tile, bool with_gram, bool with_grad) const {
    const Pair<scalar_t> x = tile.x;
    bool is_set = false;
    for (size_t b = 0; b < rectangles_.size(); ++b) {
      const Rectangle& r = rectangles_[b];
      if (r.num_cols() == 0 || (r.direct && !with_grad)) continue;
      const int64_t count = pick(r, first, x.num_rows, worker.picked.data());
      if (count == 0) continue;
      const bool most = !r.direct && 4 * count > 3 * x.num_rows;  // then the others get weight 0, and nothing is moved
      if (with_grad && !is_set && !most) std::fill_n(tile.grad, x.num_rows * width_, scalar_t(0));
      if (r.direct) {
        direct_rows(worker, b, first, gather(worker, x, count), tile.slope, tile.grad);
      } else {
        const Pair<scalar_t> picked = most ? x : gather(worker, x, count);
        weigh(worker, first, x.num_rows, count, most);
        if (with_gram) worker.grams[b].add(picked, worker.weight.data(), worker.space);
        if (with_grad) multiply_rows(worker, b, picked, most, is_set, tile.slope, tile.grad);
      }
      is_set = true;
    }
    if (with_grad && !is_set) std::fill_n(tile.grad, x.num_rows * width_, scalar_t(0));
  }

  // Weights of the tile's rows, 0 where one is not picked; or of the picked ones
  void weigh(Worker& worker, int64_t first, int64_t num_rows, int64_t count, bool most) const {
    scalar_t* weight = worker.weight.data();
    if (most) std::fill_n(weight, num_rows, scalar_t(0));
    for (int64_t i = 0; i < count; ++i) weight[most ? worker.picked[i] : i] = task_weight(first + worker.picked[i]);
  }

  void multiply_rows(Worker& worker, size_t b, Pair<scalar_t> x, bool most, bool adds, const scalar_t* slope,
                     scalar_t* grad) const {
    to_h_[b].multiply(x, worker.space,
                      [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
                        if (!most) return add_picked(worker, i, j, m, n, block, stride, slope, grad);
                        const auto put = adds ? put_weighed<scalar_t, true> : put_weighed<scalar_t, false>;
                        const int64_t at = i * width_ + j;
                        put(m, n, worker.weight.data() + i, block, stride, slope ? slope + at : nullptr, grad + at, width_);
                      });
  }

  void add_picked(const Worker& worker, int64_t i, int64_t j, int64_t num_rows, int64_t num_cols, const scalar_t* block,
                  int64_t stride, const scalar_t* slope, scalar_t* grad) const {
    for (int64_t k = i; k < i + num_rows; ++k, block += stride) {
      const int64_t at = worker.picked[k] * width_ + j;
      put_weighed<scalar_t, true>(1, num_cols, &worker.weight[k], block, stride, slope ? slope + at : nullptr, grad + at,
                                  width_);
    }
  }

  // Picked rows too: tiles of D are made, squared, contracted and dropped. Threads share the columns.
  void direct_rows(Worker& worker, size_t rectangle, int64_t first, Pair<scalar_t> x, const scalar_t* slope,
                   scalar_t* grad) const {
    if (!worker.grad_basis.defined()) make_grad_basis(worker);
    const Rectangle& r = rectangles_[rectangle];
    const int64_t with_bias = width_ + 1, count = x.num_rows;
    const bool adds = !worker.sets[rectangle];
    const Matrix<scalar_t> ha = dense(worker.ha.template get<scalar_t>(count * with_bias), count, with_bias);
    for (int64_t i = 0; i < count; ++i) {
      const scalar_t* row = x.first + i * full_;
      for (int64_t j = 0; j < width_; ++j) ha.data[i * with_bias + j] = row[j] + row[width_ + j];
      ha.data[i * with_bias + width_] = 1;
      worker.weight[i] = task_weight(first + worker.picked[i]);
    }
    if (count <= kFewRows)
      few_direct_rows(worker, r, x, ha.data, adds, slope, grad);
    else
      many_direct_rows(worker, r, x, ha, adds, slope, grad);
  }

  // What one worker adds to, or sets, where a rectangle's columns are in no other one
  void make_grad_basis(Worker& worker) const {
    worker.sets.assign(rectangles_.size(), false);
    if (!worker.is_alone) {
      worker.grad_basis = kept_empty(basis_tensor_, {basis_tensor_.size(0), width_ + 1});
      return zero(data<scalar_t>(worker.grad_basis), basis_tensor_.numel());
    }
    worker.grad_basis = grad_basis_tensor_;
    std::vector<size_t> order;
    for (size_t b = 0; b < rectangles_.size(); ++b) {
      const Rectangle& r = rectangles_[b];
      if (r.task_lo < r.task_hi && r.chunk_lo < r.chunk_hi && r.num_cols() > 0) order.push_back(b);
    }
    std::sort(order.begin(), order.end(), [&](size_t b, size_t c) { return rectangles_[b].col_lo < rectangles_[c].col_lo; });
    size_t widest = 0;  // of those before, the one that ends last
    for (size_t i = 0; i < order.size(); ++i) {
      const Rectangle &r = rectangles_[order[i]], &before = rectangles_[order[widest]];
      worker.sets[order[i]] = i == 0 || before.col_hi <= r.col_lo;
      if (!worker.sets[order[i]]) worker.sets[order[widest]] = false;
      if (r.col_hi > before.col_hi) widest = i;
    }
    std::vector<std::pair<int64_t, int64_t>> set;
    for (const size_t b : order)
      if (worker.sets[b]) set.push_back({rectangles_[b].col_lo, rectangles_[b].col_hi});
    zero_between(set);
  }

  void many_direct_rows(Worker& worker, const Rectangle& r, Pair<scalar_t> x, Matrix<scalar_t> ha, bool adds,
                        const scalar_t* slope, scalar_t* grad) const {
    struct Part {
      explicit Part(int64_t parts) : y_factor(parts) {}
      Workspace space;
      RightFactor<scalar_t> y_factor;
      Memory y, d, grad;  // the last one of the rows' features, of this part's columns
      double value = 0;
    };
    const int64_t with_bias = width_ + 1, count = x.num_rows, threads = torch::stable::get_num_threads();
    const int64_t share = std::min(kDirectColumns, (r.num_cols() + threads - 1) / threads);
    worker.ha_factor.pack(ha);
    const auto make = [&] {
      Part part(parts_);
      std::fill_n(part.grad.template get<scalar_t>(count * width_), count * width_, scalar_t(0));
      return part;
    };
    const std::vector<Part> parts =
        for_tiles<Part>(r.num_cols(), share, make, [&](Part& part, int64_t start, int64_t length) {
          const int64_t lo = r.col_lo + start;
          const Matrix<const scalar_t> y = as_matrix(columns_of(lo, length), part.y);
          const Matrix<scalar_t> d = dense(part.d.template get<scalar_t>(count * length), count, length);
          part.y_factor.pack(y.transposed());
          part.y_factor.multiply_into(as_matrix(x, part.space.pair), part.space, d);
          for (int64_t i = 0; i < count; ++i)
            part.value += weigh_residual<false, scalar_t>(length, worker.weight[i], nullptr, d.data + i * length);
          part.y_factor.pack(y.cols(0, width_));
          scalar_t* to_h = part.grad.template data<scalar_t>();
          part.y_factor.multiply(d, part.space,
                                 [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
                                   put_block<true>(m, n, block, stride, to_h + i * width_ + j, width_);
                                 });
          scalar_t* to_basis = data<scalar_t>(worker.grad_basis) + lo * with_bias;
          worker.ha_factor.multiply(d.transposed(), part.space,
                                    [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
                                      scalar_t* to = to_basis + i * with_bias + j;
                                      if (adds) return put_block<true>(m, n, block, stride, to, with_bias);
                                      put_block<false>(m, n, block, stride, to, with_bias);
                                    });
        });
    std::fill_n(worker.weight.data(), count, scalar_t(1));  // the gradients have it
    for (const Part& part : parts) {
      worker.direct_value += part.value;
      add_picked(worker, 0, 0, count, width_, part.grad.template data<scalar_t>(), width_, slope, grad);
    }
  }

  void few_direct_rows(Worker& worker, const Rectangle& r, Pair<scalar_t> x, const scalar_t* ha, bool adds,
                       const scalar_t* slope, scalar_t* grad) const {
    const int64_t count = x.num_rows, full = padded_to_lanes(full_), with_bias = width_ + 1;
    const int64_t ha_stride = padded_to_lanes(with_bias), grad_stride = padded_to_lanes(width_);
    scalar_t *rows = worker.d.template get<scalar_t>(count * (full + ha_stride)), *has = rows + count * full;
    std::fill_n(rows, count * (full + ha_stride), scalar_t(0));
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(x.first + i * full_, full_, rows + i * full);
      std::copy_n(ha + i * with_bias, with_bias, has + i * ha_stride);
    }
    struct Part {
      Memory scratch, sum;  // the rows' gradients over some columns, and columns; over all, in float64
      double value = 0;
    };
    const int64_t size = count * grad_stride, threads = torch::stable::get_num_threads();
    const int64_t share = std::max((r.num_cols() + threads - 1) / threads, kFewGrain / (count * full_) + 1);
    const auto make = [&] {
      Part part;
      const int64_t needed = size + kFewColumns * full + kLanes;
      std::fill_n(part.scratch.template get<scalar_t>(needed), needed, scalar_t(0));
      std::fill_n(part.sum.template get<double>(size), size, 0.0);
      return part;
    };
    const std::vector<Part> parts = for_tiles<Part>(r.num_cols(), share, make, [&](Part& part, int64_t lo, int64_t length) {
      scalar_t* grad_h = part.scratch.template data<scalar_t>();
      for (int64_t done = 0; done < length; done += kDirectColumns) {
        const int64_t start = (r.col_lo + lo + done) * with_bias, some = std::min(kDirectColumns, length - done);
        part.value +=
            direct_columns<scalar_t>({count, width_, rows, has, worker.weight.data(), grad_h}, some, basis_ + start,
                                     basis0_ + start, data<scalar_t>(worker.grad_basis) + start, grad_h + size, adds);
        accumulate(size, grad_h, part.sum.template data<double>());
        std::fill_n(grad_h, size, scalar_t(0));
      }
    });
    std::fill_n(worker.weight.data(), count, scalar_t(1));  // the gradients have it
    for (const Part& part : parts) {
      worker.direct_value += part.value;
      std::copy_n(part.sum.template data<double>(), size, part.scratch.template data<scalar_t>());
      add_picked(worker, 0, 0, count, width_, part.scratch.template data<scalar_t>(), grad_stride, slope, grad);
    }
  }

  static void zero(scalar_t* to, int64_t size) {
    torch::stable::parallel_for(0, size, int64_t(1) << 16,
                                [&](int64_t begin, int64_t end) { std::fill(to + begin, to + end, scalar_t(0)); });
  }

  template <typename Items, typename Body>
  static void for_each(Items& items, const Body& body, int64_t grain = 1) {
    torch::stable::parallel_for(0, items.size(), grain, [&](int64_t begin, int64_t end) {
      NoGrad no_grad;
      for (int64_t i = begin; i < end; ++i) body(items[i]);
    });
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
    if (r.task_hi <= task || (first + length - 1) / num_chunks_ < r.task_lo) return 0;  // of many heads most are elsewhere
    for (int64_t i = 0; i < length; ++i) {
      if (r.task_lo <= task && task < r.task_hi && r.chunk_lo <= chunk && chunk < r.chunk_hi) picked[count++] = i;
      if (++chunk == num_chunks_) chunk = 0, ++task;
    }
    return count;
  }

  Pair<scalar_t> gather(Worker& worker, Pair<scalar_t> x, int64_t count) const {
    scalar_t* to = worker.x.template get<scalar_t>(count * full_);
    for (int64_t i = 0; i < count; ++i) std::copy_n(x.first + worker.picked[i] * x.stride, full_, to + i * full_);
    return rows_of(to, count);
  }

  // y = [V_H | dV] for columns [lo, lo + length)
  Pair<scalar_t> columns_of(int64_t lo, int64_t length) const {
    const scalar_t* now = basis_ + lo * (width_ + 1);
    return {now, now, basis0_ + lo * (width_ + 1), length, width_, width_ + 1, width_ + 1};
  }

  // Runs body(worker, lo, y) over tiles of the columns [lo, hi)
  template <typename Body>
  std::vector<ColumnWorker> for_column_tiles(int64_t lo, int64_t hi, const Body& body) const {
    const int64_t threads = torch::stable::get_num_threads(), share = (hi - lo + threads - 1) / threads;
    const int64_t tile = are_narrow() ? std::clamp(share, kFewestNarrow, kMostNarrow)
                         : parts_     ? 256
                                      : std::clamp<int64_t>(kColumnTileElements / full_, 1024, 4096);
    return for_tiles<ColumnWorker>(
        hi - lo, tile, [&] { return ColumnWorker(*this); },
        [&](ColumnWorker& worker, int64_t start, int64_t length) {
          body(worker, lo + start, columns_of(lo + start, length));
        });
  }

  // Whether columns are multiplied in registers as they are read
  bool are_narrow() const { return std::is_same_v<scalar_t, float> && is_narrow(full_, width_ + 1, parts_); }

  scalar_t task_weight(int64_t row) const { return weight_[row / num_chunks_]; }
  Tensor make(std::initializer_list<int64_t> size) const { return torch::stable::new_empty(basis_tensor_, size); }

  const Tensor basis_tensor_, grad_basis_tensor_;
  const int64_t num_chunks_, num_rows_, width_, full_, parts_;
  const scalar_t *basis_, *basis0_, *weight_;
  const double* gram0_;
  const double* basis_gram0_ = nullptr;  // V*'V* of each range between all cuts, where it is given
  const std::vector<Rectangle> rectangles_;
  const std::vector<int64_t> all_cuts_;
  std::vector<Segment> segments_;
  std::vector<Memory> row_grams_;  // X'WX of each rectangle, float64; empty where no worker met it, or where it is direct
  bool has_row_grams_ = false, has_grad_ = false;
  std::vector<Tensor> to_h_data_;
  std::vector<RightFactor<scalar_t>> to_h_;
};

}  // namespace fasthyper
