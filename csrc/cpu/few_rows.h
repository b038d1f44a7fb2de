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
// x [V_H | dV]', d/dH and d/dV. y: scratch, kFewColumns padded rows and kLanes more, finite. Returns the sum of w d^2.
// In each of the three products what is loaded meets a block of sums, or of factors, in registers.
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
  alignas(64) scalar_t step[kFewRows + 1][kFewColumns];  // an odd row is written twice
  doubles_t squares = {};
  for (int64_t first = 0; first < num_cols; first += kFewColumns, grad_basis += kFewColumns * with_bias) {
    const int64_t count = std::min(kFewColumns, num_cols - first);
    // whole vectors may be read behind each column, and written, for what comes after it is set after it
    const bool whole = (num_cols - first - count) * with_bias >= kLanes;
    if (whole)  // the gradient's lines are on their way while these columns are used
      for (int64_t i = 0; i < kFewColumns * with_bias; i += 64 / int64_t(sizeof(scalar_t)))
        __builtin_prefetch(grad_basis + i, 1);
    for (int64_t c = 0; c < count; ++c, now += with_bias, then += with_bias) {
      scalar_t *to = y + c * full, *rest = to + width;
      if (whole) {
        for (int64_t i = ha_stride - kLanes; i >= 0; i -= kLanes) {  // ends first: the rest covers what follows the column
          const lanes_t column = *(const lanes_t*)(now + i);
          *(lanes_t*)(to + i) = column;
          *(lanes_t*)(rest + i) = column - *(const lanes_t*)(then + i);
        }
      } else {
        for (int64_t i = 0; i < width; ++i) to[i] = now[i];
        for (int64_t i = 0; i < with_bias; ++i) rest[i] = now[i] - then[i];
      }
    }
    for (int64_t r = 0; r < rows.num_rows; r += 2) {
      const int64_t other = std::min(r + 1, rows.num_rows - 1);
      lanes_t sums[2][kFewColumns];
#pragma GCC unroll 8
      for (int64_t c = 0; c < kFewColumns; ++c) sums[0][c] = sums[1][c] = lanes_t{};
      for (int64_t i = 0; i < full; i += kLanes) {
        const lanes_t x0 = *(const lanes_t*)(rows.x + r * full + i), x1 = *(const lanes_t*)(rows.x + other * full + i);
#pragma GCC unroll 8
        for (int64_t c = 0; c < kFewColumns; ++c) {
          const lanes_t column = *(const lanes_t*)(y + c * full + i);
          sums[0][c] += x0 * column;
          sums[1][c] += x1 * column;
        }
      }
#pragma GCC unroll 3
      for (int64_t n = kFewColumns / 2; n > 0; n /= 2)  // neighbours added, of two vectors at a time
#pragma GCC unroll 4
        for (int64_t c = 0; c < n; ++c)
#pragma GCC unroll 2
          for (int64_t p = 0; p < 2; ++p)
            sums[p][c] = __builtin_shuffle(sums[p][2 * c], sums[p][2 * c + 1], even) +
                         __builtin_shuffle(sums[p][2 * c], sums[p][2 * c + 1], odd);
      // one row's numbers, then the other's
      *(lanes_t*)step[r] = __builtin_shuffle(sums[0][0], sums[1][0], even) + __builtin_shuffle(sums[0][0], sums[1][0], odd);
    }
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      for (int64_t c = count; c < kFewColumns; ++c) step[r][c] = 0;
      few_t* d = (few_t*)step[r];
      const doubles_t wide = __builtin_convertvector(*d, doubles_t);
      squares += double(rows.weight[r]) * wide * wide;
      *d *= 2 * rows.weight[r];
    }
    for (int64_t i = 0; i < grad_stride; i += kLanes) {
      lanes_t columns[kFewColumns];
#pragma GCC unroll 8
      for (int64_t c = 0; c < kFewColumns; ++c) columns[c] = *(const lanes_t*)(y + c * full + i);
      for (int64_t r = 0; r < rows.num_rows; ++r) {
        lanes_t* grad = (lanes_t*)(rows.grad + r * grad_stride + i);
        lanes_t sum = *grad, more = lanes_t{};
#pragma GCC unroll 4
        for (int64_t c = 0; c < kFewColumns; c += 2) {
          sum += step[r][c] * columns[c];
          more += step[r][c + 1] * columns[c + 1];
        }
        *grad = sum + more;
      }
    }
    for (int64_t i = padded_to_lanes(with_bias) - kLanes; i >= 0; i -= kLanes) {  // ends first
      lanes_t sums[kFewColumns];
#pragma GCC unroll 8
      for (int64_t c = 0; c < kFewColumns; ++c) sums[c] = lanes_t{};
      for (int64_t r = 0; r < rows.num_rows; ++r) {
        const lanes_t ha = *(const lanes_t*)(rows.ha + r * ha_stride + i);
#pragma GCC unroll 8
        for (int64_t c = 0; c < kFewColumns; ++c) sums[c] += step[r][c] * ha;
      }
      if (whole) {
#pragma GCC unroll 8
        for (int64_t c = 0; c < kFewColumns; ++c) {
          lanes_t* to = (lanes_t*)(grad_basis + c * with_bias + i);
          *to = adds ? *to + sums[c] : sums[c];
        }
      } else {
        for (int64_t c = 0; c < count; ++c)
          for (int64_t l = 0; l < std::min(kLanes, with_bias - i); ++l) {
            scalar_t* to = grad_basis + c * with_bias + i + l;
            *to = (adds ? *to : 0) + sums[c][l];
          }
      }
    }
  }
  double value = 0;
  for (int64_t c = 0; c < kFewColumns; ++c) value += squares[c];
  return value;
}

}  // namespace fasthyper
