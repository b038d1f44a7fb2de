// The drift of a hypernetwork without a trunk: features are pairs [e_t, z_n], and no row is made (DESIGN, Without a trunk).
//
// X = [dH | H* | 1] of row (t, n) is [a_t | c_n | 1], a_t = [de | e0] and c_n = [dz | z0], up to the order of its columns.
// So X'WX of a rectangle is made of moments of its tasks, sum w [a | 1]'[a | 1], and of its chunks, sum [c | 1]'[c | 1]; and
// the gradient of e_t sums its rows' 2 w x (Y'V_H) over the chunks, which leaves w [a | 1] times one matrix. Sums are
// float64.
#pragma once

#include <map>
#include <utility>

#include "direct.h"

namespace fasthyper {

// The tasks, or the chunks: what their vectors were and are, moments over runs of them, and their gradients
class PairSide {
 public:
  struct Run {
    Tensor moments;  // [2 d + 1, 2 d + 1], sum of w [x | 1]'[x | 1]
    Tensor to_grad;  // [2 d + 1, d], what w [x | 1] is multiplied by
  };

  template <typename scalar_t>
  PairSide(const Tensor& now, const Tensor& then, const scalar_t* weight)
      : dim_(now.size(1)),
        depth_(2 * dim_ + 1),
        x_(make(now, {now.size(0), depth_})),
        wx_(make(now, {now.size(0), depth_})) {
    const scalar_t *a = const_data<scalar_t>(now), *b = const_data<scalar_t>(then);
    double *x = data<double>(x_), *wx = data<double>(wx_);
    for (int64_t i = 0; i < now.size(0); ++i, a += dim_, b += dim_, x += depth_, wx += depth_) {
      for (int64_t j = 0; j < dim_; ++j) {
        x[j] = double(a[j]) - b[j];
        x[dim_ + j] = b[j];
      }
      x[2 * dim_] = 1;
      scale(depth_, weight ? double(weight[i]) : 1.0, x, wx);
    }
  }

  int64_t dim() const { return dim_; }
  const double* row(int64_t i) const { return const_data<double>(x_) + i * depth_; }

  Run& run(int64_t lo, int64_t hi) {
    const auto [found, is_new] = runs_.try_emplace({lo, hi});
    if (is_new) {
      found->second = {make(x_, {depth_, depth_}), torch::stable::new_zeros(x_, {depth_, dim_})};
      mm_out(found->second.moments, transposed(rows(wx_, lo, hi - lo)), rows(x_, lo, hi - lo));
    }
    return found->second;
  }

  // [n, d] float64: the gradients that the runs give
  Tensor grad() const {
    const Tensor total = torch::stable::new_zeros(x_, {x_.size(0), dim_});
    for (const auto& [bounds, run] : runs_) {
      const Tensor part = make(x_, {bounds.second - bounds.first, dim_});
      mm_out(part, rows(wx_, bounds.first, part.size(0)), run.to_grad);
      add(part.numel(), const_data<double>(part), data<double>(total) + bounds.first * dim_);
    }
    return total;
  }

 private:
  static Tensor make(const Tensor& like, std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(like, size, ScalarType::Double);
  }

  const int64_t dim_, depth_;
  const Tensor x_, wx_;  // [now - then | then | 1], and the same times its weight
  std::map<std::pair<int64_t, int64_t>, Run> runs_;
};

template <typename scalar_t>
class PairDrift {
 public:
  PairDrift(Drift<scalar_t>& drift, const DirectDrift<scalar_t>& direct, const Tensor& embeddings, const Tensor& embeddings0,
            const Tensor& chunks, const Tensor& chunks0, const Tensor& weight)
      : drift_(drift),
        direct_(direct),
        tasks_(embeddings, embeddings0, const_data<scalar_t>(weight)),
        chunks_(chunks, chunks0, static_cast<const scalar_t*>(nullptr)) {
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t j = 0; j < tasks_.dim(); ++j) places_.push_back({false, half * tasks_.dim() + j});
      for (int64_t j = 0; j < chunks_.dim(); ++j) places_.push_back({true, half * chunks_.dim() + j});
    }
    places_.push_back({false, 2 * tasks_.dim()});
  }

  // Sets the gradients but for the basis's, which is added to; returns the value.
  double run(const Tensor& grad_embeddings, const Tensor& grad_chunks) {
    typename Drift<scalar_t>::Worker sums(drift_, 1);
    const std::vector<Rectangle>& rectangles = drift_.rectangles();
    for (size_t b = 0; b < rectangles.size(); ++b)
      if (!rectangles[b].direct) sums.grams[b].set(gram(rectangles[b]));
    drift_.sum_rows({&sums}, true);
    drift_.columns();
    for (size_t b = 0; b < rectangles.size(); ++b)
      if (!rectangles[b].direct) add_to_grads(rectangles[b], const_data<scalar_t>(drift_.to_h(b)));
    double value = drift_.finish({&sums});
    const Tensor grad_task = tasks_.grad(), grad_chunk = chunks_.grad();
    for (const Rectangle& r : rectangles)
      if (r.direct) value += direct_rectangle(r, data<double>(grad_task), data<double>(grad_chunk));
    std::copy_n(const_data<double>(grad_task), grad_task.numel(), data<scalar_t>(grad_embeddings));
    std::copy_n(const_data<double>(grad_chunk), grad_chunk.numel(), data<scalar_t>(grad_chunks));
    return value;
  }

 private:
  struct Place {  // of a column of X
    bool of_chunk;
    int64_t index;
  };

  // X'WX of a rectangle
  std::vector<double> gram(const Rectangle& r) {
    const Tensor of_task = tasks_.run(r.task_lo, r.task_hi).moments, of_chunk = chunks_.run(r.chunk_lo, r.chunk_hi).moments;
    const double *task = const_data<double>(of_task), *chunk = const_data<double>(of_chunk);
    const double *task_sum = last_row(of_task), *chunk_sum = last_row(of_chunk);
    const int64_t task_depth = of_task.size(0), chunk_depth = of_chunk.size(0);
    std::vector<double> gram;
    gram.reserve(places_.size() * places_.size());
    for (const Place& i : places_)
      for (const Place& j : places_) {
        if (i.of_chunk != j.of_chunk) {
          gram.push_back(task_sum[i.of_chunk ? j.index : i.index] * chunk_sum[i.of_chunk ? i.index : j.index]);
        } else if (i.of_chunk) {
          gram.push_back(task_sum[task_depth - 1] * chunk[i.index * chunk_depth + j.index]);
        } else {
          gram.push_back(chunk_sum[chunk_depth - 1] * task[i.index * task_depth + j.index]);
        }
      }
    return gram;
  }

  // What the gradients of the rectangle's tasks and chunks are made of; to_h is 2 Y'V_H
  void add_to_grads(const Rectangle& r, const scalar_t* to_h) {
    PairSide::Run &task = tasks_.run(r.task_lo, r.task_hi), &chunk = chunks_.run(r.chunk_lo, r.chunk_hi);
    add_to_grad(false, last_row(chunk.moments), tasks_.dim(), chunks_.dim(), to_h, data<double>(task.to_grad));
    add_to_grad(true, last_row(task.moments), chunks_.dim(), tasks_.dim(), to_h + tasks_.dim(), data<double>(chunk.to_grad));
  }

  static const double* last_row(const Tensor& moments) {  // sum of w [x | 1]
    return const_data<double>(moments) + (moments.size(0) - 1) * moments.size(1);
  }

  // A row's own columns of X are counted as often as there are rows of the other side, whose columns are summed into its 1
  void add_to_grad(bool of_chunk, const double* other_sum, int64_t dim, int64_t other_dim, const scalar_t* to_h,
                   double* to_grad) const {
    for (const Place& place : places_) {
      const bool is_one = &place == &places_.back(), is_own = is_one || place.of_chunk == of_chunk;
      const double factor = other_sum[is_own ? 2 * other_dim : place.index];
      double* to = to_grad + (is_own && !is_one ? place.index : 2 * dim) * dim;
      for (int64_t j = 0; j < dim; ++j) to[j] += factor * to_h[j];
      to_h += tasks_.dim() + chunks_.dim();
    }
  }

  // Rows of this rectangle alone, a tile at a time
  double direct_rectangle(const Rectangle& r, double* grad_task, double* grad_chunk) const {
    const int64_t task_dim = tasks_.dim(), chunk_dim = chunks_.dim();
    return direct_.rectangle(
        r,
        [&](int64_t task, int64_t chunk, scalar_t* x) {
          for (const Place& place : places_)
            *x++ = scalar_t((place.of_chunk ? chunks_.row(chunk) : tasks_.row(task))[place.index]);
        },
        [&](int64_t task, int64_t chunk, const scalar_t* grad) {
          accumulate(task_dim, grad, grad_task + task * task_dim);
          accumulate(chunk_dim, grad + task_dim, grad_chunk + chunk * chunk_dim);
        });
  }

  Drift<scalar_t>& drift_;
  const DirectDrift<scalar_t>& direct_;
  PairSide tasks_, chunks_;
  std::vector<Place> places_;
};

}  // namespace fasthyper
