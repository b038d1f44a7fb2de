// All target weights of one task, flat, and the way back (DESIGN E3): W = [h | 1] V', chunk by chunk, end to end.
#include <algorithm>

#include "product.h"

namespace fasthyper {
namespace {

constexpr int64_t kTile = 1 << 17;  // elements of the gradient that are gathered at a time
constexpr int64_t kColumns = 1024;  // of the basis, packed at a time
constexpr int64_t kLine = 16;       // numbers of a cache line
constexpr int64_t kNarrow = 64;     // features, and
constexpr int64_t kFew = 32;        // chunks below which packing factors for tile units costs more than it saves
constexpr int64_t kFewest = 4;      // chunks below which a matrix library is as fast, as with more features than kWidest

template <typename scalar_t>
int64_t parts_for(const Tensor& h) {
  return h.size(1) < kNarrow || h.size(0) < kFew ? 0 : packed_parts<scalar_t>(3);
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

// Calls body(worker, first, grad) for ranges of the basis's columns from ``first`` on, grad: of all chunks' weights made of
// them
template <typename Worker, typename scalar_t, typename Make, typename Body>
std::vector<Worker> for_gathered(const std::vector<Tensor>& grads, int64_t num_chunks, int64_t chunk_size, const Make& make,
                                 const Body& body) {
  const int64_t threads = torch::stable::get_num_threads(), share = (chunk_size + threads - 1) / threads;
  const int64_t tile = std::min(share, kTile / std::clamp<int64_t>(num_chunks, 1, kTile / 64));
  const int64_t stride = tile + kLine;  // rows a power of two apart would meet in the same lines of a cache
  const Gather<scalar_t> gather(grads);
  return for_tiles<Worker>(chunk_size, tile, make, [&](Worker& worker, int64_t first, int64_t length) {
    scalar_t* grad = worker.grad.template get<scalar_t>(num_chunks * stride);
    for (int64_t n = 0; n < num_chunks; ++n)
      gather(n * chunk_size + first, n * chunk_size + first + length, grad + n * stride);
    body(worker, first, Matrix<scalar_t>{grad, num_chunks, length, stride});
  });
}

template <typename scalar_t>
void backward(const std::vector<Tensor>& grads, const Tensor& ha, const Tensor& basis, int64_t parts, scalar_t* grad_ha,
              scalar_t* grad_basis) {
  const int64_t num_chunks = ha.size(0), chunk_size = basis.size(0), width = basis.size(1);
  struct Worker {
    explicit Worker(int64_t parts, const Tensor& ha) : by_basis(parts), sum(torch::stable::new_zeros(ha, ha.sizes())) {}
    Workspace space;
    Memory grad;
    RightFactor<scalar_t> by_basis;
    Tensor sum;
  };
  RightFactor<scalar_t> by_ha(parts);
  by_ha.pack(dense<scalar_t>(ha));
  const auto workers = for_gathered<Worker, scalar_t>(
      grads, num_chunks, chunk_size, [&] { return Worker(parts, ha); },
      [&](Worker& worker, int64_t first, Matrix<scalar_t> grad) {
        worker.by_basis.pack(dense<scalar_t>(basis).rows(first, grad.num_cols));
        scalar_t* sum = data<scalar_t>(worker.sum);
        worker.by_basis.multiply(grad, worker.space,
                                 [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
                                   put_block<true>(m, n, block, stride, sum + i * width + j, width);
                                 });
        by_ha.multiply_into(grad.transposed(), worker.space,
                            dense(grad_basis, chunk_size, width).rows(first, grad.num_cols));
      });
  for (const Worker& worker : workers) add(ha.numel(), const_data<scalar_t>(worker.sum), grad_ha);
}

void narrow_backward(const std::vector<Tensor>& grads, const Tensor& ha, const Tensor& basis, float* grad_ha,
                     float* grad_basis) {
  const int64_t num_chunks = ha.size(0), width = ha.size(1), size = num_chunks * narrow::kFeatures;
  struct Worker {
    Memory grad, sum;
  };
  Memory memory;
  float* padded = memory.get<float>(size);
  std::fill_n(padded, size, 0.0f);
  put_block<false>(num_chunks, width, const_data<float>(ha), width, padded, narrow::kFeatures);
  const auto make = [&] {
    Worker worker;
    std::fill_n(worker.sum.get<double>(size), size, 0.0);
    return worker;
  };
  const auto workers = for_gathered<Worker, float>(
      grads, num_chunks, basis.size(0), make, [&](Worker& worker, int64_t first, Matrix<float> grad) {
        narrow::generate_back({padded, num_chunks, width}, const_data<float>(basis) + first * width, grad.num_cols,
                              grad.data, grad.row_stride, grad_basis + first * width, worker.sum.data<double>());
      });
  for (const Worker& worker : workers)
    put_block<true>(num_chunks, width, worker.sum.data<double>(), narrow::kFeatures, grad_ha, width);
}

std::tuple<Tensor, Tensor> generate_bwd_cpu(std::vector<Tensor> grads, Tensor h, Tensor basis) {
  NoGrad no_grad;
  for (Tensor& grad : grads) grad = torch::stable::contiguous(grad);
  basis = torch::stable::contiguous(basis);
  const Tensor ha = with_bias(torch::stable::contiguous(h));
  Tensor grad_ha = torch::stable::new_zeros(ha, ha.sizes()), grad_basis = kept_empty(basis, {basis.size(0), ha.size(1)});
  dispatch_floating(h, "generate", [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t parts = parts_for<scalar_t>(h);
    if constexpr (std::is_same_v<scalar_t, float>)
      if (parts == 0 && ha.size(0) >= kFewest && ha.size(1) <= narrow::kFeatures && narrow::available())
        return narrow_backward(grads, ha, basis, data<float>(grad_ha), data<float>(grad_basis));
    backward(grads, ha, basis, parts, data<scalar_t>(grad_ha), data<scalar_t>(grad_basis));
  });
  return {torch::stable::contiguous(cols(grad_ha, 0, h.size(1))), grad_basis};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) {
  m.impl("_generate_fwd", TORCH_BOX(&generate_fwd_cpu));
  m.impl("_generate_bwd", TORCH_BOX(&generate_bwd_cpu));
}

}  // namespace fasthyper
