// All target weights of one task, flat, and the way back (DESIGN E3): W = [h | 1] V', chunk by chunk, end to end.
#include <algorithm>

#include "tensor.h"

namespace fasthyper {
namespace {

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

// The whole chunks of the flat gradient are read where they lie; only the last, partial one is handled apart.
std::tuple<Tensor, Tensor> generate_bwd_cpu(Tensor grad, Tensor h, Tensor basis) {
  NoGrad no_grad;
  grad = torch::stable::contiguous(grad);
  const int64_t width = h.size(1), chunk_size = basis.size(0);
  const int64_t whole = grad.numel() / chunk_size, tail = grad.numel() % chunk_size;
  const Tensor ha = with_bias(torch::stable::contiguous(h));
  const Tensor body = torch::stable::view(rows(grad, 0, whole * chunk_size), {whole, chunk_size});
  Tensor grad_ha = torch::stable::new_empty(h, {h.size(0), width + 1});
  Tensor grad_basis = torch::stable::new_empty(basis, {chunk_size, width + 1});
  mm_out(rows(grad_ha, 0, whole), body, basis);
  mm_out(grad_basis, transposed(body), rows(ha, 0, whole));  // zeros where there is no whole chunk
  if (tail > 0) {
    const Tensor last = torch::stable::view(rows(grad, whole * chunk_size, tail), {1, tail});
    mm_out(rows(grad_ha, whole, 1), last, rows(basis, 0, tail));
    dispatch_floating(h, "generate", [&](auto zero) {
      using scalar_t = decltype(zero);
      const scalar_t *g = const_data<scalar_t>(last), *ha_last = const_data<scalar_t>(ha) + whole * (width + 1);
      scalar_t* out = data<scalar_t>(grad_basis);
      for (int64_t s = 0; s < tail; ++s)
        for (int64_t k = 0; k <= width; ++k) out[s * (width + 1) + k] += g[s] * ha_last[k];
    });
  }
  return {torch::stable::contiguous(cols(grad_ha, 0, width)), grad_basis};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) {
  m.impl("_generate_fwd", TORCH_BOX(&generate_fwd_cpu));
  m.impl("_generate_bwd", TORCH_BOX(&generate_bwd_cpu));
}

}  // namespace fasthyper
