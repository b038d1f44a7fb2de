// All target weights of one task, flat, and the way back (DESIGN E3): W = [h | 1] V', chunk by chunk, end to end.
#include <algorithm>

#include "tensor.h"

namespace fasthyper {
namespace {

constexpr int64_t kTile = 1 << 17;  // elements of the gradient that are gathered at a time

// [h | 1]: the bias column of the basis then needs no pass of its own
Tensor with_bias(const Tensor& h) {
  const int64_t num_chunks = h.size(0), width = h.size(1);
  Tensor out = torch::stable::new_empty(h, {num_chunks, width + 1});
  dispatch_floating(h, "generate", [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* from = const_data<scalar_t>(h);
    scalar_t* to = data<scalar_t>(out);
    for (int64_t n = 0; n < num_chunks; ++n, from += width, to += width + 1) {
      std::copy(from, from + width, to);
      to[width] = 1;
    }
  });
  return out;
}

Tensor generate_fwd_cpu(Tensor h, Tensor basis, int64_t num_weights) {
  NoGrad no_grad;
  const int64_t num_chunks = h.size(0), chunk_size = basis.size(0);
  Tensor out = torch::stable::new_empty(h, {num_chunks, chunk_size});
  mm_out(out, with_bias(torch::stable::contiguous(h)), transposed(basis));
  return rows(torch::stable::view(out, {num_chunks * chunk_size}), 0, num_weights);
}

// The flat gradient is never laid out: it is gathered from its parts a range of columns of all chunks at a time, which stays
// in cache for both products.
template <typename scalar_t>
class Gather {
 public:
  explicit Gather(const std::vector<Tensor>& parts) {
    for (const Tensor& part : parts) {
      data_.push_back(const_data<scalar_t>(part));
      starts_.push_back(starts_.back() + part.numel());
    }
  }

  // Elements [begin, end) of the parts laid end to end; 0 behind the last
  void operator()(int64_t begin, int64_t end, scalar_t* to) const {
    size_t i = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
    for (; i < data_.size() && begin < end; ++i) {
      const int64_t stop = std::min(end, starts_[i + 1]);
      to = std::copy(data_[i] + (begin - starts_[i]), data_[i] + (stop - starts_[i]), to);
      begin = stop;
    }
    std::fill_n(to, end - begin, 0);
  }

 private:
  std::vector<const scalar_t*> data_;
  std::vector<int64_t> starts_{0};
};

std::tuple<Tensor, Tensor> generate_bwd_cpu(std::vector<Tensor> grads, Tensor h, Tensor basis) {
  NoGrad no_grad;
  for (Tensor& grad : grads) grad = torch::stable::contiguous(grad);
  basis = torch::stable::contiguous(basis);
  const int64_t num_chunks = h.size(0), width = h.size(1), chunk_size = basis.size(0);
  const int64_t tile = kTile / std::clamp<int64_t>(num_chunks, 1, kTile / 64);
  const Tensor ha = with_bias(torch::stable::contiguous(h));
  Tensor grad_ha = torch::stable::new_zeros(ha, ha.sizes()), grad_basis = torch::stable::new_empty(basis, basis.sizes());
  struct Worker {
    Tensor grad, product, sum;
  };
  dispatch_floating(h, "generate", [&](auto zero) {
    using scalar_t = decltype(zero);
    const Gather<scalar_t> gather(grads);
    const auto make = [&] {
      return Worker{torch::stable::new_empty(ha, {num_chunks * tile}), torch::stable::new_empty(ha, ha.sizes()),
                    torch::stable::new_zeros(ha, ha.sizes())};
    };
    const auto workers = for_tiles<Worker>(chunk_size, tile, make, [&](Worker& worker, int64_t first, int64_t length) {
      const Tensor grad = matrix(worker.grad, num_chunks, length);
      for (int64_t n = 0; n < num_chunks; ++n)
        gather(n * chunk_size + first, n * chunk_size + first + length, data<scalar_t>(grad) + n * length);
      mm_out(worker.product, grad, rows(basis, first, length));
      add(ha.numel(), const_data<scalar_t>(worker.product), data<scalar_t>(worker.sum));
      mm_out(rows(grad_basis, first, length), transposed(grad), ha);
    });
    for (const Worker& worker : workers) add(ha.numel(), const_data<scalar_t>(worker.sum), data<scalar_t>(grad_ha));
  });
  return {torch::stable::contiguous(cols(grad_ha, 0, width)), grad_basis};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) {
  m.impl("_generate_fwd", TORCH_BOX(&generate_fwd_cpu));
  m.impl("_generate_bwd", TORCH_BOX(&generate_bwd_cpu));
}

}  // namespace fasthyper
