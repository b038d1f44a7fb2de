// The drift from the parameters: tiles of (task, chunk) rows go trunk forward, drift, trunk backward in one go (DESIGN E5).
//
// A difference goes through the trunk: da = W dx + dW x0 + db, dx = act(a0 + da) - act(a0), so that a small step keeps its
// digits. The first layer separates into T + N products. Nothing of the size of all rows is made but what is given, a0.
#include "activation.h"
#include "drift.h"
#include "pair_drift.h"

namespace fasthyper {
namespace {

// Between layers a tile of rows is x = [dx | x0 | 1], and the next da = x [W | W - W0 | b - b0]': one product. Where the
// snapshot's pre-activations a0 are not given they are made again, a0 = [x0 | 1] [W0 | b0]'.
template <typename scalar_t>
struct Layer {
  Tensor weight;       // [o, i]
  Tensor step;         // [2 i + 1, o], what x is multiplied by
  Tensor step0;        // [i + 1, o], what [x0 | 1] is multiplied by, where a0 is not given
  const scalar_t* a0;  // [T, N, o] or null, as of the first layer, and of those before others that have it
  int64_t width;       // o
  RightFactor<scalar_t> by_step, by_step0, by_weight;
};

template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void multiply_blocks(int64_t num_rows, int64_t num_cols, const scalar_t* __restrict__ block,
                                             int64_t stride, const scalar_t* __restrict__ factor, scalar_t* __restrict__ to,
                                             int64_t to_stride) {
  for (int64_t i = 0; i < num_rows; ++i, block += stride, factor += to_stride, to += to_stride)
    for (int64_t j = 0; j < num_cols; ++j) to[j] = block[j] * factor[j];
}

// In place of dx, x0 + dx
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void add_drift(int64_t num_rows, int64_t width, scalar_t* __restrict__ x) {
  for (int64_t i = 0; i < num_rows; ++i, x += 2 * width + 1)
    for (int64_t j = 0; j < width; ++j) x[j] += x[width + j];
}

// Each row of ``from`` plus one row
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void plus_row(int64_t num_rows, int64_t width, const scalar_t* __restrict__ from,
                                      const scalar_t* __restrict__ row, scalar_t* __restrict__ to) {
  for (int64_t i = 0; i < num_rows; ++i, from += width, to += width)
    for (int64_t j = 0; j < width; ++j) to[j] = from[j] + row[j];
}

// Adds the sum of the rows, four at a time: each pass waits for the one before
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void add_rows(int64_t num_rows, int64_t width, const scalar_t* __restrict__ from,
                                      scalar_t* __restrict__ to) {
  int64_t i = 0;
  for (; i + 4 <= num_rows; i += 4, from += 4 * width)
    for (int64_t j = 0; j < width; ++j) to[j] += (from[j] + from[width + j]) + (from[2 * width + j] + from[3 * width + j]);
  for (; i < num_rows; ++i, from += width)
    for (int64_t j = 0; j < width; ++j) to[j] += from[j];
}

template <typename scalar_t>
class HypernetDrift {
 public:
  HypernetDrift(const std::vector<Tensor>& theta, const std::vector<Tensor>& theta0, const Tensor& embeddings,
                const Tensor& embeddings0, const std::vector<Tensor>& pre0, Activation activation, Drift<scalar_t>& drift,
                int64_t parts)
      : embeddings_(embeddings),
        chunks_(theta[0]),
        num_tasks_(embeddings.size(0)),
        num_chunks_(chunks_.size(0)),
        task_dim_(embeddings.size(1)),
        chunk_dim_(chunks_.size(1)),
        width_(theta.back().size(1) - 1),
        parts_(parts),
        widest_(width_),
        activation_(activation),
        drift_(drift),
        task_x_(pair(embeddings, embeddings0)),
        chunk_x_(pair(chunks_, theta0[0])) {
    const size_t lacking = theta.size() / 2 - 1 - pre0.size();
    for (size_t l = 0; 2 * l + 2 < theta.size(); ++l) {
      const Tensor &weight = theta[2 * l + 1], &bias = theta[2 * l + 2];
      const Tensor &weight0 = theta0[2 * l + 1], &bias0 = theta0[2 * l + 2];
      Layer<scalar_t> layer{weight,
                            make_step(weight, weight0, bias, bias0),
                            Tensor(),
                            l < lacking ? nullptr : const_data<scalar_t>(pre0[l - lacking]),
                            weight.size(0),
                            RightFactor<scalar_t>(parts),
                            RightFactor<scalar_t>(parts),
                            RightFactor<scalar_t>(parts)};
      if (!layer.a0) layer.step0 = make_step0(weight0, bias0);
      if (l > 0) {
        layer.by_step.pack(dense<scalar_t>(layer.step));
        if (!layer.a0) layer.by_step0.pack(dense<scalar_t>(layer.step0));
        layer.by_weight.pack(dense<scalar_t>(layer.weight));
      }
      widest_ = std::max(widest_, layer.width);
      layers_.push_back(std::move(layer));
    }
    separate_first_layer();
  }

  // Sets the gradients, which are zero-filled, but for the basis's; returns the value.
  double run(const Tensor& grad_embeddings, const std::vector<Tensor>& grad_theta) {
    std::vector<Worker> workers = drift_.template pass_rows<Worker>(
        [&](int64_t tile) { return Worker(*this, tile); },
        [&](Worker& worker, int64_t first, int64_t length) { forward(worker, first, length); },
        [&](const Worker& worker, int64_t, int64_t length) -> typename Drift<scalar_t>::Rows {
          return {drift_.rows_of(data<scalar_t>(worker.x.back()), length), const_data<scalar_t>(worker.slope.back()),
                  data<scalar_t>(worker.grad)};
        },
        [&](Worker& worker, int64_t first, int64_t length) { backward(worker, first, length); });
    collect(workers, grad_embeddings, grad_theta);
    return drift_.finish(drift_.parts_of(workers));
  }

 private:
  struct Worker {
    Worker(const HypernetDrift& h, int64_t tile)
        : drift(h.drift_, tile),
          by_x(h.parts_),
          da(h.make({tile * h.widest_})),
          a0(h.make({tile * h.widest_})),
          grad(h.make({tile * h.widest_})),
          grad_in(h.make({tile * h.widest_})),
          scratch(h.make({fused<scalar_t>(h.activation_) ? 0 : 3 * tile * h.widest_})) {
      for (const Layer<scalar_t>& layer : h.layers_) {
        x.push_back(h.make({tile * (2 * layer.width + 1)}));
        slope.push_back(h.make({tile * layer.width}));
        grad_weight.push_back(torch::stable::new_zeros(layer.weight, layer.weight.sizes()));
        grad_bias.push_back(torch::stable::new_zeros(layer.weight, {layer.width}));
      }
      grad_task = torch::stable::new_zeros(h.chunks_, {h.num_tasks_, h.layers_[0].width});
      grad_chunk = torch::stable::new_zeros(h.chunks_, {h.num_chunks_, h.layers_[0].width});
    }

    typename Drift<scalar_t>::Worker drift;
    RightFactor<scalar_t> by_x;
    Tensor da, a0, grad, grad_in, scratch;
    std::vector<Tensor> x, slope;                // of each layer, for the rows of a tile
    std::vector<Tensor> grad_weight, grad_bias;  // sums over tiles; the first layer's are made of those below
    Tensor grad_task, grad_chunk;                // of the first layer's two parts
  };

  static Matrix<scalar_t> tile_of(const Tensor& t, int64_t length, int64_t width) {
    return dense(data<scalar_t>(t), length, width);
  }

  void forward(Worker& worker, int64_t first, int64_t length) const {
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer<scalar_t>& layer = layers_[l];
      const Matrix<scalar_t> da = tile_of(worker.da, length, layer.width);
      const scalar_t* a0 = layer.a0 ? layer.a0 + first * layer.width : data<scalar_t>(worker.a0);
      const Matrix<scalar_t> a0_out = tile_of(worker.a0, length, layer.width);
      scalar_t *x = data<scalar_t>(worker.x[l]), *slope = data<scalar_t>(worker.slope[l]);
      if (l == 0) {
        first_layer(from_task_, from_chunk_, first, da);
        first_layer(from_task0_, from_chunk0_, first, a0_out);
      } else {
        const int64_t width_in = layers_[l - 1].width;
        const Matrix<scalar_t> x_in = tile_of(worker.x[l - 1], length, 2 * width_in + 1);
        if (!layer.a0) layer.by_step0.multiply_into(x_in.cols(width_in, width_in + 1), worker.drift.space, a0_out);
        if (fused<scalar_t>(activation_)) {  // in cache, block by block
          for (int64_t r = 0; r < length; ++r) x[r * (2 * layer.width + 1) + 2 * layer.width] = 1;
          layer.by_step.multiply(x_in, worker.drift.space,
                                 [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
                                   fused_block(layer.width, i, j, m, n, block, stride, a0, x, slope);
                                 });
          continue;
        }
        layer.by_step.multiply_into(x_in, worker.drift.space, da);
      }
      activation_drift(activation_, length, layer.width, a0, da.data, x, slope, worker.scratch);
    }
  }

  void fused_block(int64_t width, int64_t i, int64_t j, int64_t num_rows, int64_t num_cols, const scalar_t* da,
                   int64_t da_stride, const scalar_t* a0, scalar_t* x, scalar_t* slope) const {
    const int64_t stride = 2 * width + 1, at = i * width + j;
    x += i * stride;
    fused_drift(activation_, {num_rows, num_cols, stride, da_stride, width}, a0 + at, da, x + width + j, x + j, slope + at);
  }

  void first_layer(const Tensor& from_task, const Tensor& from_chunk, int64_t first, Matrix<scalar_t> to) const {
    for_tasks(first, to.num_rows, [&](int64_t i, int64_t count, int64_t task, int64_t chunk) {
      plus_row(count, to.num_cols, const_data<scalar_t>(from_chunk) + chunk * to.num_cols,
               const_data<scalar_t>(from_task) + task * to.num_cols, to.data + i * to.num_cols);
    });
  }

  // From the gradient of the tile's last pre-activations, in worker.grad, to sums of the parameters' gradients
  void backward(Worker& worker, int64_t first, int64_t length) const {
    for (size_t l = layers_.size(); l-- > 1;) {
      const Layer<scalar_t>& layer = layers_[l];
      const int64_t width_in = layers_[l - 1].width;
      const Matrix<scalar_t> grad = tile_of(worker.grad, length, layer.width);
      add_rows(length, layer.width, grad.data, data<scalar_t>(worker.grad_bias[l]));
      const Matrix<scalar_t> x = tile_of(worker.x[l - 1], length, 2 * width_in + 1);
      if (worker.by_x.packs()) {
        worker.by_x.pack_sum(x.cols(0, width_in), width_in);
      } else {
        add_drift(length, width_in, x.data);
        worker.by_x.pack(x.cols(0, width_in));
      }
      scalar_t* grad_weight = data<scalar_t>(worker.grad_weight[l]);
      worker.by_x.multiply(grad.transposed(), worker.drift.space,
                           [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
                             put_block<true>(m, n, block, stride, grad_weight + i * width_in + j, width_in);
                           });
      scalar_t* grad_in = data<scalar_t>(worker.grad_in);
      const scalar_t* slope = const_data<scalar_t>(worker.slope[l - 1]);
      layer.by_weight.multiply(grad, worker.drift.space,
                               [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
                                 const int64_t at = i * width_in + j;
                                 multiply_blocks(m, n, block, stride, slope + at, grad_in + at, width_in);
                               });
      std::swap(worker.grad, worker.grad_in);
    }
    const int64_t width = layers_[0].width;
    const scalar_t* grad = const_data<scalar_t>(worker.grad);
    for_tasks(first, length, [&](int64_t i, int64_t count, int64_t task, int64_t chunk) {
      add_rows(count, width, grad + i * width, data<scalar_t>(worker.grad_task) + task * width);
      add(count * width, grad + i * width, data<scalar_t>(worker.grad_chunk) + chunk * width);
    });
  }

  void collect(const std::vector<Worker>& workers, const Tensor& grad_embeddings,
               const std::vector<Tensor>& grad_theta) const {
    const Tensor grad_task = torch::stable::new_zeros(chunks_, {num_tasks_, layers_[0].width});
    const Tensor grad_chunk = torch::stable::new_zeros(chunks_, {num_chunks_, layers_[0].width});
    for (const Worker& worker : workers) {
      add_tensor(worker.grad_task, grad_task);
      add_tensor(worker.grad_chunk, grad_chunk);
      for (size_t l = 1; l < layers_.size(); ++l) {
        add_tensor(worker.grad_weight[l], grad_theta[2 * l + 1]);
        add_tensor(worker.grad_bias[l], grad_theta[2 * l + 2]);
      }
    }
    const Tensor &weight = layers_[0].weight, &grad_weight = grad_theta[1];
    mm_out(grad_embeddings, grad_task, cols(weight, 0, task_dim_));
    mm_out(grad_theta[0], grad_chunk, cols(weight, task_dim_, chunk_dim_));
    mm_out(cols(grad_weight, 0, task_dim_), transposed(grad_task), embeddings_);
    mm_out(cols(grad_weight, task_dim_, chunk_dim_), transposed(grad_chunk), chunks_);
    for (int64_t t = 0; t < num_tasks_; ++t)
      add(layers_[0].width, const_data<scalar_t>(grad_task) + t * layers_[0].width, data<scalar_t>(grad_theta[2]));
  }

  // The first layer's da is a sum of a task's and a chunk's part, of which the task's has the bias; so is its a0
  void separate_first_layer() {
    const Tensor& step = layers_[0].step;
    const int64_t depth = task_dim_ + chunk_dim_, width = layers_[0].width;
    const auto part = [&](int64_t start, int64_t length, bool bias) {  // of [W | W - W0 | b - b0]', the inputs from start on
      const Tensor out = make({2 * length + 1, width});
      const scalar_t* from = const_data<scalar_t>(step);
      scalar_t* to = data<scalar_t>(out);
      std::copy_n(from + start * width, length * width, to);
      std::copy_n(from + (depth + start) * width, length * width, to + length * width);
      scale(width, scalar_t(bias), from + 2 * depth * width, to + 2 * length * width);
      return out;
    };
    from_task_ = make({num_tasks_, width});
    from_chunk_ = make({num_chunks_, width});
    mm_out(from_task_, task_x_, part(0, task_dim_, true));
    mm_out(from_chunk_, chunk_x_, part(task_dim_, chunk_dim_, false));
    const Tensor& step0 = layers_[0].step0;  // [W0 | b0]'
    from_task0_ = make({num_tasks_, width});
    from_chunk0_ = make({num_chunks_, width});
    mm_out(from_task0_, cols(task_x_, task_dim_, task_dim_), rows(step0, 0, task_dim_));
    mm_out(from_chunk0_, cols(chunk_x_, chunk_dim_, chunk_dim_), rows(step0, task_dim_, chunk_dim_));
    for (int64_t t = 0; t < num_tasks_; ++t)
      add(width, const_data<scalar_t>(step0) + depth * width, data<scalar_t>(from_task0_) + t * width);
  }

  // [W0 | b0]'
  Tensor make_step0(const Tensor& weight0, const Tensor& bias0) const {
    const int64_t width = weight0.size(0), depth = weight0.size(1);
    const Tensor step0 = make({depth + 1, width});
    const scalar_t* w0 = const_data<scalar_t>(weight0);
    scalar_t* to = data<scalar_t>(step0);
    for (int64_t o = 0; o < width; ++o)
      for (int64_t i = 0; i < depth; ++i, ++w0) to[i * width + o] = *w0;
    std::copy_n(const_data<scalar_t>(bias0), width, to + depth * width);
    return step0;
  }

  // [W | W - W0 | b - b0]'
  Tensor make_step(const Tensor& weight, const Tensor& weight0, const Tensor& bias, const Tensor& bias0) const {
    const int64_t width = weight.size(0), depth = weight.size(1);
    const Tensor step = make({2 * depth + 1, width});
    const scalar_t *w = const_data<scalar_t>(weight), *w0 = const_data<scalar_t>(weight0);
    scalar_t* to = data<scalar_t>(step);
    for (int64_t o = 0; o < width; ++o)
      for (int64_t i = 0; i < depth; ++i, ++w, ++w0) {
        to[i * width + o] = *w;
        to[(depth + i) * width + o] = *w - *w0;
      }
    for (int64_t o = 0; o < width; ++o)
      to[2 * depth * width + o] = const_data<scalar_t>(bias)[o] - const_data<scalar_t>(bias0)[o];
    return step;
  }

  // [now - then | then | 1], row by row
  Tensor pair(const Tensor& now, const Tensor& then) const {
    const int64_t num_rows = now.size(0), width = now.size(1);
    const Tensor x = torch::stable::new_empty(now, {num_rows, 2 * width + 1});
    const scalar_t *a = const_data<scalar_t>(now), *b = const_data<scalar_t>(then);
    scalar_t* to = data<scalar_t>(x);
    for (int64_t i = 0; i < num_rows; ++i, a += width, b += width, to += 2 * width + 1) {
      for (int64_t j = 0; j < width; ++j) to[j] = a[j] - b[j];
      std::copy_n(b, width, to + width);
      to[2 * width] = 1;
    }
    return x;
  }

  // body(i, count, task, chunk) for each task's ``count`` rows of a tile, from the tile's row i, the task's chunk ``chunk``,
  // on
  template <typename Body>
  void for_tasks(int64_t first, int64_t length, const Body& body) const {
    int64_t task = first / num_chunks_, chunk = first % num_chunks_;
    for (int64_t i = 0, count; i < length; i += count, chunk = 0, ++task) {
      count = std::min(num_chunks_ - chunk, length - i);
      body(i, count, task, chunk);
    }
  }

  static void add_tensor(const Tensor& from, const Tensor& to) {
    add(from.numel(), const_data<scalar_t>(from), data<scalar_t>(to));
  }

  Tensor make(std::initializer_list<int64_t> size) const { return kept_empty(chunks_, size); }

  const Tensor embeddings_, chunks_;
  const int64_t num_tasks_, num_chunks_, task_dim_, chunk_dim_, width_, parts_;
  int64_t widest_;
  const Activation activation_;
  Drift<scalar_t>& drift_;
  const Tensor task_x_, chunk_x_;  // [de | e0 | 1], [dz | z0 | 1]
  std::vector<Layer<scalar_t>> layers_;
  Tensor from_task_, from_chunk_;    // [T, o], [N, o]: their parts of the first layer's da
  Tensor from_task0_, from_chunk0_;  // of its a0
};

std::tuple<Tensor, Tensor, std::vector<Tensor>> hypernet_drift_fwd_cpu(std::vector<Tensor> theta, std::vector<Tensor> theta0,
                                                                       Tensor embeddings, Tensor embeddings0,
                                                                       std::vector<Tensor> pre0, Tensor gram0, Tensor weight,
                                                                       Tensor plan, int64_t activation, int64_t precision) {
  NoGrad no_grad;
  for (std::vector<Tensor>* list : {&theta, &theta0, &pre0})
    for (Tensor& t : *list) t = torch::stable::contiguous(t);
  for (Tensor* t : {&embeddings, &embeddings0, &gram0, &weight, &plan}) *t = torch::stable::contiguous(*t);
  FASTHYPER_CHECK(0 <= activation && activation <= 4, "hypernet_drift: unknown activation code ", activation);
  Tensor value = torch::stable::new_zeros(embeddings, {});
  Tensor grad_embeddings = torch::stable::new_zeros(embeddings, embeddings.sizes());
  std::vector<Tensor> grad_theta;
  for (size_t i = 0; i + 1 < theta.size(); ++i) grad_theta.push_back(torch::stable::new_zeros(theta[i], theta[i].sizes()));
  const Tensor& basis = theta.back();
  if (embeddings.size(0) == 0) {
    read_plan(plan, 0, theta[0].size(0), basis.size(0));  // is refused all the same
    grad_theta.push_back(torch::stable::new_zeros(basis, basis.sizes()));
    return {value, grad_embeddings, grad_theta};
  }
  grad_theta.push_back(kept_empty(basis, {basis.size(0), basis.size(1)}));  // all of it is set
  dispatch_floating(embeddings, "hypernet_drift", [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t parts = packed_parts<scalar_t>(precision);
    Drift<scalar_t> drift(theta.back(), theta0.back(), weight, gram0, plan, embeddings.size(0), theta[0].size(0),
                          grad_theta.back(), parts);
    if (theta.size() == 2) {
      const DirectDrift<scalar_t> direct(theta.back(), theta0.back(), weight, grad_theta.back());
      PairDrift<scalar_t> pairs(drift, direct, embeddings, embeddings0, theta[0], theta0[0], weight);
      *data<scalar_t>(value) = static_cast<scalar_t>(pairs.run(grad_embeddings, grad_theta[0]));
      return;
    }
    HypernetDrift<scalar_t> hypernet(theta, theta0, embeddings, embeddings0, pre0, static_cast<Activation>(activation),
                                     drift, parts);
    *data<scalar_t>(value) = static_cast<scalar_t>(hypernet.run(grad_embeddings, grad_theta));
  });
  return {value, grad_embeddings, grad_theta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) { m.impl("_hypernet_drift_fwd", TORCH_BOX(&hypernet_drift_fwd_cpu)); }

}  // namespace fasthyper
