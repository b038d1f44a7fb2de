// The drift of one affine map whose inputs are held (DESIGN, Without a trunk): <D, D C> / 2 and D C, D = V - V*, in one
// read.
#include "product.h"

namespace fasthyper {
namespace {

constexpr int64_t kRows = 256;  // of the basis at a time

// sum of x (now - then), x and the others in rows ``stride`` and ``width`` apart
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES double drift_dot(int64_t num_rows, int64_t num_cols, const scalar_t* __restrict__ x, int64_t stride,
                                         const scalar_t* __restrict__ now, const scalar_t* __restrict__ then,
                                         int64_t width) {
  constexpr int64_t kLanes = 8;  // a fixed order, whatever the vector width
  double sum[kLanes] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < num_rows; ++i, x += stride, now += width, then += width) {
    int64_t j = 0;
    for (; j + kLanes <= num_cols; j += kLanes)
      for (int64_t k = 0; k < kLanes; ++k) sum[k] += double(x[j + k]) * (now[j + k] - then[j + k]);
    for (; j < num_cols; ++j) sum[0] += double(x[j]) * (now[j] - then[j]);
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

std::tuple<Tensor, Tensor> affine_drift_fwd_cpu(Tensor basis, Tensor basis0, Tensor moments) {
  NoGrad no_grad;
  for (Tensor* t : {&basis, &basis0, &moments}) *t = torch::stable::contiguous(*t);
  const int64_t num_rows = basis.size(0), width = basis.size(1);
  const Tensor value = torch::stable::new_zeros(basis, {}), grad = kept_empty(basis, {num_rows, width});
  dispatch_floating(basis, "affine_drift", [&](auto zero) {
    using scalar_t = decltype(zero);
    struct Worker {
      Workspace space;
      double value = 0;
    };
    RightFactor<scalar_t> by_moments(packed_parts<scalar_t>(3));
    by_moments.pack(dense<scalar_t>(moments));
    const scalar_t *now = const_data<scalar_t>(basis), *then = const_data<scalar_t>(basis0);
    const auto make = [] { return Worker(); };
    const auto workers = for_tiles<Worker>(num_rows, kRows, make, [&](Worker& worker, int64_t first, int64_t length) {
      const int64_t start = first * width;
      const Pair<scalar_t> moved{now + start, now + start, then + start, length, 0, width, width};
      scalar_t* to = data<scalar_t>(grad) + start;
      by_moments.multiply(moved, worker.space,
                          [&](int64_t i, int64_t j, int64_t m, int64_t n, const scalar_t* block, int64_t stride) {
                            const int64_t at = i * width + j;
                            put_block<false>(m, n, block, stride, to + at, width);
                            worker.value += drift_dot(m, n, block, stride, now + start + at, then + start + at, width);
                          });
    });
    double sum = 0;
    for (const Worker& worker : workers) sum += worker.value;
    *data<scalar_t>(value) = static_cast<scalar_t>(std::max(sum / 2, 0.0));
  });
  return {value, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) { m.impl("_affine_drift_fwd", TORCH_BOX(&affine_drift_fwd_cpu)); }

}  // namespace fasthyper
