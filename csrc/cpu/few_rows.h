// The direct form of a few rows, a task's own head mostly: each column is read once, used for all of them, and nothing
// packed.
#pragma once

#include "product.h"

namespace fasthyper {

constexpr int64_t kFewRows = 16;   // that stay in the first-level cache with their gradients
constexpr int64_t kDotLanes = 32;  // sums of a dot product, a fixed order whatever the vector width

inline int64_t padded_to_lanes(int64_t size) { return (size + kDotLanes - 1) / kDotLanes * kDotLanes; }

// x: rows [dH | H* | 1], each padded with zeros; ha: rows [H | 1]; grad: of their H, added to
template <typename scalar_t>
struct FewRows {
  int64_t num_rows, width;
  const scalar_t *x, *ha, *weight;
  scalar_t* grad;
};

// For columns now [c, H + 1] of the basis, their snapshot and their gradient, which is added to: d = x [V_H | dV]', d/dH and
// d/dV. y: scratch, one padded row of zeros. Returns the sum of w d^2.
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES double direct_columns(FewRows<scalar_t> rows, int64_t num_cols, const scalar_t* __restrict__ now,
                                              const scalar_t* __restrict__ then, scalar_t* __restrict__ grad_basis,
                                              scalar_t* __restrict__ y) {
  const int64_t width = rows.width, with_bias = width + 1, padded = padded_to_lanes(2 * width + 1);
  double value = 0;
  for (int64_t c = 0; c < num_cols; ++c, now += with_bias, then += with_bias, grad_basis += with_bias) {
    for (int64_t i = 0; i < width; ++i) y[i] = now[i];
    for (int64_t i = 0; i < with_bias; ++i) y[width + i] = now[i] - then[i];
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      const scalar_t* __restrict__ x = rows.x + r * padded, * __restrict__ ha = rows.ha + r * with_bias;
      scalar_t* __restrict__ grad = rows.grad + r * width;
      scalar_t sum[kDotLanes] = {};
      for (int64_t i = 0; i < padded; i += kDotLanes)
        for (int64_t k = 0; k < kDotLanes; ++k) sum[k] += x[i + k] * y[i + k];
      for (int64_t half = kDotLanes / 2; half > 0; half /= 2)
        for (int64_t k = 0; k < half; ++k) sum[k] += sum[k + half];
      const scalar_t d = sum[0], step = 2 * rows.weight[r] * d;
      value += double(rows.weight[r]) * d * d;
      for (int64_t i = 0; i < width; ++i) grad[i] += step * y[i];
      for (int64_t i = 0; i < with_bias; ++i) grad_basis[i] += step * ha[i];
    }
  }
  return value;
}

}  // namespace fasthyper
