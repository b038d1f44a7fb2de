// All target weights of one task, flat, and the way back (DESIGN E3): W = [h | 1] V', chunk by chunk, end to end.
#include <algorithm>

#include "product.h"

namespace fasthyper {
namespace {

constexpr int64_t kTile = 1 << 17;  // elements of the gradient that are gathered at a time
constexpr int64_t kColumns = 1024;  // of the basis, packed at a time
constexpr int64_t kNarrow = 64;     // features, and
constexpr int64_t kFew = 32;        // chunks below which packing factors for tile units costs more than it saves

template <typename scalar_t>
int64_t parts_for(const Tensor& h) {
  return h.size(1) < kNarrow || h.size(0) < kFew ? 0 : tile_parts<scalar_t>(3);
}

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
  const Tensor out = kept_empty(h, {num_chunks, chunk_size}), ha = with_bias(torch::stable::contiguous(h));
  basis = torch::stable::contiguous(basis);
  dispatch_floating(h, "generate", [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t parts = parts_for<scalar_t>(h);
    if (parts == 0) return mm_out(out, ha, transposed(basis));
    struct Worker {
      explicit Worker(int64_t parts) : by_basis(parts) {}
      Workspace space;
      RightFactor<scalar_t> by_basis;
    };
    const auto make = [&] { return Worker(parts); };
    for_tiles<Worker>(chunk_size, kColumns, make, [&](Worker& worker, int64_t first, int64_t length) {
      worker.by_basis.pack(dense<scalar_t>(basis).rows(first, length).transposed());
      worker.by_basis.multiply_into(dense<scalar_t>(ha), worker.space,
                                    dense(data<scalar_t>(out), num_chunks, chunk_size).cols(first, length));
    });
  });
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
  const int64_t threads = torch::stable::get_num_threads(), share = (chunk_size + threads - 1) / threads;
  const int64_t tile = std::min(share, kTile / std::clamp<int64_t>(num_chunks, 1, kTile / 64));
  const Tensor ha = with_bias(torch::stable::contiguous(h));
  Tensor grad_ha = torch::stable::new_zeros(ha, ha.sizes()), grad_basis = kept_empty(basis, {chunk_size, width + 1});
  dispatch_floating(h, "generate", [&](auto zero) {
    using scalar_t = decltype(zero);
    struct Worker {
      explicit Worker(int64_t parts, const Tensor& ha) : by_basis(parts), sum(torch::stable::new_zeros(ha, ha.sizes())) {}
      Workspace space;
      Memory grad;
      RightFactor<scalar_t> by_basis;
      Tensor sum;
    };
    const Gather<scalar_t> gather(grads);
    const int64_t parts = parts_for<scalar_t>(h);
    RightFactor<scalar_t> by_ha(parts);
    by_ha.pack(dense<scalar_t>(ha));
    const auto make = [&] { return Worker(parts, ha); };
    const auto workers = for_tiles<Worker>(chunk_size, tile, make, [&](Worker& worker, int64_t first, int64_t length) {
      const Matrix<scalar_t> grad = dense(worker.grad.template get<scalar_t>(num_chunks * tile), num_chunks, length);
      for (int64_t n = 0; n < num_chunks; ++n)
        gather(n * chunk_size + first, n * chunk_size + first + length, grad.data + n * length);
      worker.by_basis.pack(dense<scalar_t>(basis).rows(first, length));
      scalar_t* sum = data<scalar_t>(worker.sum);
      worker.by_basis.multiply(grad, worker.space,
                               [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
                                 put_block<true>(m, n, block, stride, sum + i * (width + 1) + j, width + 1);
                               });
      by_ha.multiply_into(grad.transposed(), worker.space,
                          dense(data<scalar_t>(grad_basis), chunk_size, width + 1).rows(first, length));
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
