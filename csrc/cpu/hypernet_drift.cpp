// The drift from the parameters: tiles of (task, chunk) rows go trunk forward, drift, trunk backward in one go (DESIGN E5).
//
// A difference goes through the trunk: da = W dx + dW x0 + db, dx = act(a0 + da) - act(a0), so that a small step keeps its
// digits. The first layer separates into T + N products. Nothing of the size of all rows is made but what is given, a0.
#include "activation.h"
#include "drift.h"
#include "pair_drift.h"

namespace fasthyper {
namespace {

constexpr int64_t kRowTile = 1024;

// Between layers a tile of rows is x = [dx | x0 | 1], and the next da = x [W | W - W0 | b - b0]': one product.
struct Layer {
  Tensor weight;  // [o, i]
  Tensor step;    // [2 i + 1, o], what x is multiplied by
  Tensor a0;      // [T, N, o] pre-activations at the snapshot
  int64_t width;  // o
};

template <typename scalar_t>
class HypernetDrift {
 public:
  HypernetDrift(const std::vector<Tensor>& theta, const std::vector<Tensor>& theta0, const Tensor& embeddings,
                const Tensor& embeddings0, const std::vector<Tensor>& pre0, Activation activation, Drift<scalar_t>& drift)
      : embeddings_(embeddings),
        chunks_(theta[0]),
        num_tasks_(embeddings.size(0)),
        num_chunks_(chunks_.size(0)),
        task_dim_(embeddings.size(1)),
        chunk_dim_(chunks_.size(1)),
        width_(theta.back().size(1) - 1),
        widest_(width_),
        activation_(activation),
        drift_(drift),
        task_x_(pair(embeddings, embeddings0)),
        chunk_x_(pair(chunks_, theta0[0])) {
    for (size_t l = 0; l < pre0.size(); ++l) {
      const Tensor &weight = theta[2 * l + 1], &bias = theta[2 * l + 2];
      const Tensor step = make_step(weight, theta0[2 * l + 1], bias, theta0[2 * l + 2]);
      layers_.push_back({weight, step, pre0[l], weight.size(0)});
      widest_ = std::max(widest_, weight.size(0));
    }
    separate_first_layer();
  }

  // Sets the gradients, which are zero-filled, but for the basis's; returns the value.
  double run(const Tensor& grad_embeddings, const std::vector<Tensor>& grad_theta) {
    drift_.columns();
    const int64_t num_rows = num_tasks_ * num_chunks_, tile = std::min(kRowTile, num_rows);
    const std::vector<Worker> workers = for_tiles<Worker>(
        num_rows, tile, [&] { return Worker(*this, tile); },
        [&](Worker& worker, int64_t first, int64_t length) {
          forward(worker, first, length);
          drift_.rows(worker.drift, first, matrix(worker.x.back(), length, 2 * width_ + 1),
                      matrix(worker.grad, length, width_));
          backward(worker, first, length);
        });
    collect(workers, grad_embeddings, grad_theta);
    std::vector<const typename Drift<scalar_t>::Worker*> sums;
    for (const Worker& worker : workers) sums.push_back(&worker.drift);
    return drift_.finish(sums);
  }

 private:
  struct Worker {
    Worker(const HypernetDrift& h, int64_t tile)
        : drift(h.drift_, tile),
          da(h.make({tile * h.widest_})),
          grad(h.make({tile * h.widest_})),
          grad_in(h.make({tile * h.widest_})),
          scratch(h.make({h.widest_ * std::max(3 * tile, h.widest_)})) {
      for (const Layer& layer : h.layers_) {
        x.push_back(h.make({tile * (2 * layer.width + 1)}));
        slope.push_back(h.make({tile * layer.width}));
        grad_weight.push_back(torch::stable::new_zeros(layer.weight, layer.weight.sizes()));
        grad_bias.push_back(torch::stable::new_zeros(layer.weight, {layer.width}));
      }
      grad_task = torch::stable::new_zeros(h.chunks_, {h.num_tasks_, h.layers_[0].width});
      grad_chunk = torch::stable::new_zeros(h.chunks_, {h.num_chunks_, h.layers_[0].width});
    }

    typename Drift<scalar_t>::Worker drift;
    Tensor da, grad, grad_in, scratch;
    std::vector<Tensor> x, slope;                // of each layer, for the rows of a tile
    std::vector<Tensor> grad_weight, grad_bias;  // sums over tiles; the first layer's are made of those below
    Tensor grad_task, grad_chunk;                // of the first layer's two parts
  };

  void forward(Worker& worker, int64_t first, int64_t length) const {
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer& layer = layers_[l];
      scalar_t* da = data<scalar_t>(worker.da);
      if (l == 0) {
        for_rows(first, length, [&](int64_t i, int64_t task, int64_t chunk) {
          std::copy_n(const_data<scalar_t>(from_task_) + task * layer.width, layer.width, da + i * layer.width);
          add(layer.width, const_data<scalar_t>(from_chunk_) + chunk * layer.width, da + i * layer.width);
        });
      } else {
        const int64_t depth = layer.step.size(0);
        mm_out(matrix(worker.da, length, layer.width), matrix(worker.x[l - 1], length, depth), layer.step);
      }
      activation_drift(activation_, length, layer.width, const_data<scalar_t>(layer.a0) + first * layer.width, da,
                       data<scalar_t>(worker.x[l]), data<scalar_t>(worker.slope[l]), worker.scratch);
    }
  }

  // From the gradient of the tile's features, in worker.grad, to sums of the parameters' gradients
  void backward(Worker& worker, int64_t first, int64_t length) const {
    for (size_t l = layers_.size(); l-- > 0;) {
      const Layer& layer = layers_[l];
      scalar_t* grad = data<scalar_t>(worker.grad);
      multiply(length * layer.width, const_data<scalar_t>(worker.slope[l]), grad);
      if (l == 0) break;
      for (int64_t i = 0; i < length; ++i) add(layer.width, grad + i * layer.width, data<scalar_t>(worker.grad_bias[l]));
      const int64_t width_in = layers_[l - 1].width, stride = 2 * width_in + 1;
      scalar_t* x = data<scalar_t>(worker.x[l - 1]);
      for (int64_t i = 0; i < length; ++i, x += stride) add(width_in, x + width_in, x);  // x = x0 + dx, where dx was
      const Tensor x_now = cols(matrix(worker.x[l - 1], length, stride), 0, width_in);
      const Tensor grad_out = matrix(worker.grad, length, layer.width);
      const Tensor product = matrix(worker.scratch, layer.width, width_in);
      mm_out(product, transposed(grad_out), x_now);
      add(product.numel(), const_data<scalar_t>(product), data<scalar_t>(worker.grad_weight[l]));
      mm_out(matrix(worker.grad_in, length, width_in), grad_out, layer.weight);
      std::swap(worker.grad, worker.grad_in);
    }
    const int64_t width = layers_[0].width;
    const scalar_t* grad = const_data<scalar_t>(worker.grad);
    for_rows(first, length, [&](int64_t i, int64_t task, int64_t chunk) {
      add(width, grad + i * width, data<scalar_t>(worker.grad_task) + task * width);
      add(width, grad + i * width, data<scalar_t>(worker.grad_chunk) + chunk * width);
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

  // The first layer's da is a sum of a task's and a chunk's part, of which the task's has the bias
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

  template <typename Body>
  void for_rows(int64_t first, int64_t length, const Body& body) const {
    int64_t task = first / num_chunks_, chunk = first % num_chunks_;
    for (int64_t i = 0; i < length; ++i) {
      body(i, task, chunk);
      if (++chunk == num_chunks_) chunk = 0, ++task;
    }
  }

  static void add_tensor(const Tensor& from, const Tensor& to) {
    add(from.numel(), const_data<scalar_t>(from), data<scalar_t>(to));
  }

  Tensor make(std::initializer_list<int64_t> size) const { return torch::stable::new_empty(chunks_, size); }

  const Tensor embeddings_, chunks_;
  const int64_t num_tasks_, num_chunks_, task_dim_, chunk_dim_, width_;
  int64_t widest_;
  const Activation activation_;
  Drift<scalar_t>& drift_;
  const Tensor task_x_, chunk_x_;  // [de | e0 | 1], [dz | z0 | 1]
  std::vector<Layer> layers_;
  Tensor from_task_, from_chunk_;  // [T, o], [N, o]: their parts of the first layer's da
};

std::tuple<Tensor, Tensor, std::vector<Tensor>> hypernet_drift_fwd_cpu(std::vector<Tensor> theta, std::vector<Tensor> theta0,
                                                                       Tensor embeddings, Tensor embeddings0,
                                                                       std::vector<Tensor> pre0, Tensor gram0, Tensor weight,
                                                                       Tensor plan, int64_t activation) {
  NoGrad no_grad;
  for (std::vector<Tensor>* list : {&theta, &theta0, &pre0})
    for (Tensor& t : *list) t = torch::stable::contiguous(t);
  for (Tensor* t : {&embeddings, &embeddings0, &gram0, &weight, &plan}) *t = torch::stable::contiguous(*t);
  STD_TORCH_CHECK(0 <= activation && activation <= 4, "hypernet_drift: unknown activation code ", activation);
  Tensor value = torch::stable::new_zeros(embeddings, {});
  Tensor grad_embeddings = torch::stable::new_zeros(embeddings, embeddings.sizes());
  std::vector<Tensor> grad_theta;
  for (const Tensor& t : theta) grad_theta.push_back(torch::stable::new_zeros(t, t.sizes()));
  dispatch_floating(embeddings, "hypernet_drift", [&](auto zero) {
    using scalar_t = decltype(zero);
    Drift<scalar_t> drift(theta.back(), theta0.back(), weight, gram0, plan, embeddings.size(0), theta[0].size(0),
                          grad_theta.back());
    if (embeddings.size(0) == 0) return;
    if (pre0.empty()) {
      const DirectDrift<scalar_t> direct(theta.back(), theta0.back(), weight, grad_theta.back());
      PairDrift<scalar_t> pairs(drift, direct, embeddings, embeddings0, theta[0], theta0[0], weight);
      *data<scalar_t>(value) = static_cast<scalar_t>(pairs.run(grad_embeddings, grad_theta[0]));
      return;
    }
    HypernetDrift<scalar_t> hypernet(theta, theta0, embeddings, embeddings0, pre0, static_cast<Activation>(activation),
                                     drift);
    *data<scalar_t>(value) = static_cast<scalar_t>(hypernet.run(grad_embeddings, grad_theta));
  });
  return {value, grad_embeddings, grad_theta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) { m.impl("_hypernet_drift_fwd", TORCH_BOX(&hypernet_drift_fwd_cpu)); }

}  // namespace fasthyper
