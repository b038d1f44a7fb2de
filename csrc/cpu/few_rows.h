// The direct form of a few rows, a task's own head or a full hypernetwork's tasks: each column is read once, used for all of
// them, and nothing is packed.
#pragma once

#include "product.h"

namespace fasthyper {

constexpr int64_t kFewRows = 32;    // that stay in a near cache with their gradients
constexpr int64_t kFewColumns = 8;  // that meet all rows before the next ones
constexpr int64_t kLanes = 16;      // sums at a time, in a fixed order whatever the vector width

inline int64_t padded_to_lanes(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// x: rows [dH | H* | 1]; ha: rows [H | 1]; grad: of their H, added to. All are padded to lanes, x and ha with zeros.
template <typename scalar_t>
struct FewRows {
  int64_t num_rows, width;
  const scalar_t *x, *ha, *weight;
  scalar_t* grad;
};

// kLanes numbers in registers, however wide those are
template <typename scalar_t>
struct Lanes {
  using integer = std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t>;
  typedef scalar_t type __attribute__((vector_size(kLanes * sizeof(scalar_t)), aligned(alignof(scalar_t)), may_alias));
  typedef scalar_t few __attribute__((vector_size(kFewColumns * sizeof(scalar_t)), aligned(alignof(scalar_t)), may_alias));
  typedef integer index __attribute__((vector_size(kLanes * sizeof(scalar_t))));
};

// For columns now [c, H + 1] of the basis, their snapshot and their gradient, which is set, or added to where ``adds``: d =
// x [V_H | dV]', d/dH and d/dV. y: scratch, kFewColumns padded rows of zeros. Returns the sum of w d^2.
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES double direct_columns(FewRows<scalar_t> rows, int64_t num_cols, const scalar_t* __restrict__ now,
                                              const scalar_t* __restrict__ then, scalar_t* __restrict__ grad_basis,
                                              scalar_t* __restrict__ y, bool adds) {
  using lanes_t = typename Lanes<scalar_t>::type;
  using index_t = typename Lanes<scalar_t>::index;
  using few_t = typename Lanes<scalar_t>::few;
  typedef double doubles_t __attribute__((vector_size(kFewColumns * sizeof(double))));
  const index_t even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
  const int64_t width = rows.width, with_bias = width + 1, full = padded_to_lanes(width + with_bias);
  const int64_t ha_stride = padded_to_lanes(with_bias), grad_stride = padded_to_lanes(width);
  scalar_t step[kFewRows][kFewColumns];
  doubles_t squares = {};
  for (int64_t first = 0; first < num_cols; first += kFewColumns) {
    const int64_t count = std::min(kFewColumns, num_cols - first);
    for (int64_t c = 0; c < count; ++c, now += with_bias, then += with_bias) {
      for (int64_t i = 0; i < width; ++i) y[c * full + i] = now[i];
      for (int64_t i = 0; i < with_bias; ++i) y[c * full + width + i] = now[i] - then[i];
    }
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      lanes_t sums[kFewColumns] = {};
      for (int64_t i = 0; i < full; i += kLanes) {
        const lanes_t x = *(const lanes_t*)(rows.x + r * full + i);
        for (int64_t c = 0; c < kFewColumns; ++c) sums[c] += x * *(const lanes_t*)(y + c * full + i);
      }
      for (int64_t n = kFewColumns / 2; n > 0; n /= 2)  // neighbours added, of two vectors at a time
        for (int64_t c = 0; c < n; ++c)
          sums[c] =
              __builtin_shuffle(sums[2 * c], sums[2 * c + 1], even) + __builtin_shuffle(sums[2 * c], sums[2 * c + 1], odd);
      sums[0] = __builtin_shuffle(sums[0], sums[0], even) + __builtin_shuffle(sums[0], sums[0], odd);
      few_t d = *(const few_t*)sums;
      for (int64_t c = count; c < kFewColumns; ++c) d[c] = 0;
      *(few_t*)step[r] = 2 * rows.weight[r] * d;
      const doubles_t wide = __builtin_convertvector(d, doubles_t);
      squares += double(rows.weight[r]) * wide * wide;
      scalar_t* grad = rows.grad + r * grad_stride;
      for (int64_t i = 0; i < grad_stride; i += kLanes) {
        lanes_t sum = *(const lanes_t*)(grad + i);
        for (int64_t c = 0; c < count; ++c) sum += step[r][c] * *(const lanes_t*)(y + c * full + i);
        *(lanes_t*)(grad + i) = sum;
      }
    }
    for (int64_t c = 0; c < count; ++c, grad_basis += with_bias) {
      for (int64_t i = 0; i < with_bias; i += kLanes) {
        lanes_t sum = {};
        for (int64_t r = 0; r < rows.num_rows; ++r) sum += step[r][c] * *(const lanes_t*)(rows.ha + r * ha_stride + i);
        if (i + kLanes <= with_bias)
          *(lanes_t*)(grad_basis + i) = adds ? *(const lanes_t*)(grad_basis + i) + sum : sum;
        else
          for (int64_t l = 0; i + l < with_bias; ++l) grad_basis[i + l] = (adds ? grad_basis[i + l] : 0) + sum[l];
      }
    }
  }
  double value = 0;
  for (int64_t c = 0; c < kFewColumns; ++c) value += squares[c];
  return value;
}

}  // namespace fasthyper
