// The squared drift of old tasks' weights and its gradients, without the weights (DESIGN E2).
//
// In a rectangle of real weights the residual is D = X Y', X = [dH | H* | 1] (tasks x chunks), Y = [V_H | dV] (columns),
// both M = 2H + 1 wide. One pass over the columns makes Y'Y; one over the rows makes X'WX and d/dH = 2 WX (Y'V_H); one more
// over the columns makes d/dV = 2 Y (X'W [H | 1]). Tiles of X and Y are packed on the fly and stay in cache.
#include <algorithm>
#include <vector>

#include "tensor.h"

namespace fasthyper {
namespace {

constexpr int64_t kTileElements = 1 << 18;    // packed elements of X or Y that one thread holds
constexpr int64_t kDirectElements = 1 << 19;  // elements of the residual that the direct form holds

struct Rectangle {
  int64_t task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi;
  bool direct;

  int64_t num_chunks() const { return chunk_hi - chunk_lo; }
  int64_t num_rows() const { return (task_hi - task_lo) * num_chunks(); }
  int64_t num_cols() const { return col_hi - col_lo; }
};

template <typename scalar_t>
class Drift {
 public:
  Drift(const Tensor& dh, const Tensor& basis, const Tensor& h0, const Tensor& basis0, const Tensor& weight,
        const Tensor& grad_h, const Tensor& grad_basis)
      : like_(dh),
        num_chunks_(dh.size(1)),
        width_(dh.size(2)),
        full_(2 * width_ + 1),
        tile_(std::clamp<int64_t>(kTileElements / full_, 64, 4096)),
        dh_(const_data<scalar_t>(dh)),
        basis_(const_data<scalar_t>(basis)),
        h0_(const_data<scalar_t>(h0)),
        basis0_(const_data<scalar_t>(basis0)),
        weight_(const_data<scalar_t>(weight)),
        grad_h_(data<scalar_t>(grad_h)),
        grad_basis_(data<scalar_t>(grad_basis)) {}

  double add(const Rectangle& r) { return r.direct ? add_direct(r) : add_gram(r); }

 private:
  double add_gram(const Rectangle& r) {
    const int64_t width = width_, full = full_;
    std::vector<double> col_gram = sum_over_tiles(r.num_cols(), [&](Worker& worker, int64_t start, int64_t length) {
      pack_cols(r, start, length, data<scalar_t>(worker.x));
      worker.add_gram(rows(worker.x, 0, length), rows(worker.x, 0, length));
    });
    const Tensor to_h = make({full, width});  // 2 Y'V_H
    for (int64_t i = 0; i < full; ++i)
      for (int64_t j = 0; j < width; ++j)
        data<scalar_t>(to_h)[i * width + j] = static_cast<scalar_t>(2 * col_gram[i * full + j]);

    std::vector<double> row_gram = sum_over_tiles(r.num_rows(), [&](Worker& worker, int64_t start, int64_t length) {
      pack_rows(r, start, length, data<scalar_t>(worker.x), data<scalar_t>(worker.wx));
      const Tensor x = rows(worker.x, 0, length), wx = rows(worker.wx, 0, length);
      worker.add_gram(wx, x);
      const Tensor out = rows(worker.out_h, 0, length);
      mm_out(out, wx, to_h);
      add_to_grad_h(r, start, length, const_data<scalar_t>(out));
    });
    const Tensor to_basis = make({full, width + 1});  // 2 X'W Ha = 2 (X'W [H* | 1] + X'W [dH | 0])
    for (int64_t i = 0; i < full; ++i)
      for (int64_t j = 0; j <= width; ++j)
        data<scalar_t>(to_basis)[i * (width + 1) + j] =
            static_cast<scalar_t>(2 * (row_gram[i * full + width + j] + (j < width ? row_gram[i * full + j] : 0)));

    for_tiles(r.num_cols(), [&](Worker& worker, int64_t start, int64_t length) {
      pack_cols(r, start, length, data<scalar_t>(worker.x));
      const Tensor out = rows(worker.out_basis, 0, length);
      mm_out(out, rows(worker.x, 0, length), to_basis);
      add_to_grad_basis(r.col_lo + start, length, const_data<scalar_t>(out));
    });
    double value = 0;
    for (int64_t i = 0; i < full * full; ++i) value += row_gram[i] * col_gram[i];
    return value;
  }

  double add_direct(const Rectangle& r) {
    const int64_t width = width_, num_cols = r.num_cols();
    const int64_t tile = std::clamp<int64_t>(kDirectElements / num_cols, 1, r.num_rows());
    const Tensor y = make({num_cols, full_}), x = make({tile, full_}), wx = make({tile, full_});
    const Tensor d = make({tile, num_cols}), ha = make({tile, width + 1});
    const Tensor out_h = make({tile, width}), out_basis = make({num_cols, width + 1});
    pack_cols(r, 0, num_cols, data<scalar_t>(y));
    double value = 0;
    for (int64_t start = 0; start < r.num_rows(); start += tile) {
      const int64_t length = std::min(tile, r.num_rows() - start);
      const scalar_t* xs = data<scalar_t>(x);
      pack_rows(r, start, length, data<scalar_t>(x), data<scalar_t>(wx));
      const Tensor d_now = rows(d, 0, length);
      mm_out(d_now, rows(x, 0, length), transposed(y));
      for (int64_t i = 0; i < length; ++i) {
        const scalar_t w = task_weight(r, start + i);
        scalar_t* d_row = data<scalar_t>(d_now) + i * num_cols;
        double square = 0;
        for (int64_t j = 0; j < num_cols; ++j) square += static_cast<double>(d_row[j]) * d_row[j];
        for (int64_t j = 0; j < num_cols; ++j) d_row[j] *= 2 * w;
        value += static_cast<double>(w) * square;
        scalar_t* ha_row = data<scalar_t>(ha) + i * (width + 1);
        for (int64_t j = 0; j < width; ++j) ha_row[j] = xs[i * full_ + j] + xs[i * full_ + width + j];
        ha_row[width] = 1;
      }
      mm_out(rows(out_h, 0, length), d_now, cols(y, 0, width));
      add_to_grad_h(r, start, length, const_data<scalar_t>(out_h));
      mm_out(out_basis, transposed(d_now), rows(ha, 0, length));
      add_to_grad_basis(r.col_lo, num_cols, const_data<scalar_t>(out_basis));
    }
    return value;
  }

  // What one thread needs: packed tiles, products, and its own float64 sum of Gram matrices.
  struct Worker {
    Worker(const Drift& drift, int64_t tile)
        : width(drift.width_),
          full(drift.full_),
          x(drift.make({tile, full})),
          wx(drift.make({tile, full})),
          out_h(drift.make({tile, width})),
          out_basis(drift.make({tile, width + 1})),
          upper(drift.make({width, full})),
          lower(drift.make({width + 1, width + 1})),
          gram(full * full, 0.0) {}

    // gram += left'right for left = W right: symmetric, so the block below the first H rows is not multiplied
    void add_gram(const Tensor& left, const Tensor& right) {
      mm_out(upper, transposed(cols(left, 0, width)), right);
      mm_out(lower, transposed(cols(left, width, width + 1)), cols(right, width, width + 1));
      for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j < full; ++j) gram[i * full + j] += data<scalar_t>(upper)[i * full + j];
      for (int64_t i = 0; i <= width; ++i)
        for (int64_t j = 0; j <= width; ++j)
          gram[(width + i) * full + width + j] += data<scalar_t>(lower)[i * (width + 1) + j];
    }

    int64_t width, full;
    Tensor x, wx, out_h, out_basis, upper, lower;
    std::vector<double> gram;
  };

  // Tiles go to threads in contiguous runs, so that a run repeats bit for bit at a given number of threads.
  template <typename Body>
  std::vector<Worker> for_tiles(int64_t length, const Body& body) const {
    const int64_t num_tiles = (length + tile_ - 1) / tile_;
    const int64_t num_workers = std::min<int64_t>(num_tiles, torch::stable::get_num_threads());
    std::vector<Worker> workers;
    for (int64_t i = 0; i < num_workers; ++i) workers.emplace_back(*this, std::min(tile_, length));
    torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
      NoGrad no_grad;
      for (int64_t i = begin; i < end; ++i)
        for (int64_t tile = i * num_tiles / num_workers; tile < (i + 1) * num_tiles / num_workers; ++tile)
          body(workers[i], tile * tile_, std::min(tile_, length - tile * tile_));
    });
    return workers;
  }

  template <typename Body>
  std::vector<double> sum_over_tiles(int64_t length, const Body& body) const {
    std::vector<double> total(full_ * full_, 0.0);
    for (const Worker& worker : for_tiles(length, body))
      for (size_t i = 0; i < total.size(); ++i) total[i] += worker.gram[i];
    for (int64_t i = width_; i < full_; ++i)
      for (int64_t j = 0; j < width_; ++j) total[i * full_ + j] = total[j * full_ + i];
    return total;
  }

  // x = [dH | H* | 1], wx = W x, for rows [start, start + length) of the rectangle
  void pack_rows(const Rectangle& r, int64_t start, int64_t length, scalar_t* x, scalar_t* wx) const {
    for (int64_t i = 0; i < length; ++i, x += full_, wx += full_) {
      const scalar_t *drift = dh_ + row_offset(r, start + i), *star = h0_ + row_offset(r, start + i);
      std::copy(drift, drift + width_, x);
      std::copy(star, star + width_, x + width_);
      x[2 * width_] = 1;
      const scalar_t w = task_weight(r, start + i);
      for (int64_t j = 0; j < full_; ++j) wx[j] = w * x[j];
    }
  }

  // y = [V_H | dV], for columns [start, start + length) of the rectangle
  void pack_cols(const Rectangle& r, int64_t start, int64_t length, scalar_t* y) const {
    const int64_t with_bias = width_ + 1;
    for (int64_t i = 0; i < length; ++i, y += full_) {
      const scalar_t* now = basis_ + (r.col_lo + start + i) * with_bias;
      const scalar_t* star = basis0_ + (r.col_lo + start + i) * with_bias;
      std::copy(now, now + width_, y);
      for (int64_t j = 0; j < with_bias; ++j) y[width_ + j] = now[j] - star[j];
    }
  }

  void add_to_grad_h(const Rectangle& r, int64_t start, int64_t length, const scalar_t* out) const {
    for (int64_t i = 0; i < length; ++i, out += width_) {
      scalar_t* grad = grad_h_ + row_offset(r, start + i);
      for (int64_t j = 0; j < width_; ++j) grad[j] += out[j];
    }
  }

  void add_to_grad_basis(int64_t first, int64_t length, const scalar_t* out) const {
    scalar_t* grad = grad_basis_ + first * (width_ + 1);
    for (int64_t j = 0; j < length * (width_ + 1); ++j) grad[j] += out[j];
  }

  int64_t row_offset(const Rectangle& r, int64_t row) const {
    const int64_t task = r.task_lo + row / r.num_chunks(), chunk = r.chunk_lo + row % r.num_chunks();
    return (task * num_chunks_ + chunk) * width_;
  }

  scalar_t task_weight(const Rectangle& r, int64_t row) const { return weight_[r.task_lo + row / r.num_chunks()]; }

  Tensor make(std::initializer_list<int64_t> size) const {
    return torch::stable::new_empty(like_, torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()));
  }

  const Tensor& like_;
  const int64_t num_chunks_, width_, full_, tile_;
  const scalar_t *dh_, *basis_, *h0_, *basis0_, *weight_;
  scalar_t *grad_h_, *grad_basis_;
};

void check_interval(const char* what, int64_t lo, int64_t hi, int64_t size) {
  STD_TORCH_CHECK(0 <= lo && lo <= hi && hi <= size, "output_drift: a rectangle of the plan has ", what, " [", lo, ", ", hi,
                  "), which leaves the grid [0, ", size, ")");
}

Rectangle read_rectangle(const int64_t* row, int64_t num_tasks, int64_t num_chunks, int64_t chunk_size) {
  const Rectangle r{row[0], row[1] < 0 ? num_tasks : row[1], row[2], row[3], row[4], row[5], row[6] != 0};
  check_interval("tasks", r.task_lo, r.task_hi, num_tasks);
  check_interval("chunks", r.chunk_lo, r.chunk_hi, num_chunks);
  check_interval("columns", r.col_lo, r.col_hi, chunk_size);
  return r;
}

std::tuple<Tensor, Tensor, Tensor> output_drift_fwd_cpu(Tensor dh, Tensor basis, Tensor h0, Tensor basis0, Tensor weight,
                                                        Tensor plan) {
  NoGrad no_grad;
  for (Tensor* t : {&dh, &basis, &h0, &basis0, &weight, &plan}) *t = torch::stable::contiguous(*t);
  Tensor value = torch::stable::new_zeros(dh, {});
  Tensor grad_h = torch::stable::new_zeros(dh, dh.sizes());
  Tensor grad_basis = torch::stable::new_zeros(basis, basis.sizes());
  const int64_t* row = const_data<int64_t>(plan);
  dispatch_floating(dh, "output_drift", [&](auto zero) {
    using scalar_t = decltype(zero);
    Drift<scalar_t> drift(dh, basis, h0, basis0, weight, grad_h, grad_basis);
    double total = 0;
    for (int64_t i = 0; i < plan.size(0); ++i, row += plan.size(1)) {
      const Rectangle r = read_rectangle(row, dh.size(0), dh.size(1), basis.size(0));
      if (r.num_rows() > 0 && r.num_cols() > 0) total += drift.add(r);
    }
    *data<scalar_t>(value) = static_cast<scalar_t>(std::max(total, 0.0));
  });
  return {value, grad_h, grad_basis};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) { m.impl("_output_drift_fwd", TORCH_BOX(&output_drift_fwd_cpu)); }

}  // namespace fasthyper
