// The direct form of a few rows, a task's own head or a full hypernetwork's tasks: each column is read once, used for all of
// them, and nothing is packed.
#pragma once

#include "product.h"
#include "registers.h"

namespace fasthyper {

constexpr int64_t kFewRows = 32;    // that stay in a near cache with their gradients
constexpr int64_t kFewColumns = 8;  // that meet all rows before the next ones, at most
constexpr int64_t kLanes = 16;      // rows are padded to

inline int64_t padded_to_lanes(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// x: rows [dH | H* | 1]; ha: rows [H | 1]; grad: of their H, added to. All are padded to lanes, x and ha with zeros.
template <typename scalar_t>
struct FewRows {
  int64_t num_rows, width;
  const scalar_t *x, *ha, *weight;
  scalar_t* grad;
};

// Numbers in registers of some bytes, of which a block of rows and columns makes one whole
template <typename scalar_t, int64_t bytes>
struct Lanes {
  static constexpr int64_t count = bytes / int64_t(sizeof(scalar_t)), columns = std::min(kFewColumns, count),
                           rows = count / columns;
  using integer = std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t>;
  typedef scalar_t type __attribute__((vector_size(bytes), aligned(alignof(scalar_t)), may_alias));
  typedef scalar_t few __attribute__((vector_size(columns * sizeof(scalar_t)), aligned(alignof(scalar_t)), may_alias));
  typedef integer index __attribute__((vector_size(bytes)));
  typedef double doubles __attribute__((vector_size(columns * sizeof(double))));

  // to = neighbours in two vectors added
  static inline __attribute__((always_inline)) void fold(const type& a, const type& b, type& to) {
    index even;
    if constexpr (count == 16)
      even = index{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    else if constexpr (count == 8)
      even = index{0, 2, 4, 6, 8, 10, 12, 14};
    else
      even = index{0, 2, 4, 6};
    to = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
  }
};

// As direct_columns, in registers of so many bytes. In each of the three products what is loaded meets a block of sums, or
// of factors, in registers.
template <int64_t bytes, typename scalar_t>
inline __attribute__((always_inline)) double direct_columns_by(FewRows<scalar_t> rows, int64_t num_cols,
                                                               const scalar_t* __restrict__ now,
                                                               const scalar_t* __restrict__ then,
                                                               scalar_t* __restrict__ grad_basis, scalar_t* __restrict__ y,
                                                               bool adds) {
  using lanes = Lanes<scalar_t, bytes>;
  using lanes_t = typename lanes::type;
  using few_t = typename lanes::few;
  using doubles_t = typename lanes::doubles;
  constexpr int64_t kCount = lanes::count, kColumns = lanes::columns, kRows = lanes::rows;
  const int64_t width = rows.width, with_bias = width + 1, full = padded_to_lanes(width + with_bias);
  const int64_t ha_stride = padded_to_lanes(with_bias), grad_stride = padded_to_lanes(width);
  const auto up = [](int64_t size) { return (size + kCount - 1) / kCount * kCount; };
  alignas(64) scalar_t step[kFewRows + kRows - 1][kColumns];  // a last row may be written several times
  doubles_t squares = {};
  for (int64_t first = 0; first < num_cols; first += kColumns, grad_basis += kColumns * with_bias) {
    const int64_t count = std::min(kColumns, num_cols - first);
    // whole vectors may be read behind each column, and written, for what comes after it is set after it
    const bool whole = (num_cols - first - count) * with_bias >= kCount;
    if (whole)  // the gradient's lines are on their way while these columns are used
      for (int64_t i = 0; i < kColumns * with_bias; i += 64 / int64_t(sizeof(scalar_t)))
        __builtin_prefetch(grad_basis + i, 1);
    for (int64_t c = 0; c < count; ++c, now += with_bias, then += with_bias) {
      scalar_t *to = y + c * full, *rest = to + width;
      if (whole) {
        for (int64_t i = up(with_bias) - kCount; i >= 0;
             i -= kCount) {  // ends first: the rest covers what follows the column
          const lanes_t column = *(const lanes_t*)(now + i);
          *(lanes_t*)(to + i) = column;
          *(lanes_t*)(rest + i) = column - *(const lanes_t*)(then + i);
        }
      } else {
        for (int64_t i = 0; i < width; ++i) to[i] = now[i];
        for (int64_t i = 0; i < with_bias; ++i) rest[i] = now[i] - then[i];
      }
    }
    for (int64_t r = 0; r < rows.num_rows; r += kRows) {
      const scalar_t* x[kRows];
      lanes_t sums[kRows][kColumns];
#pragma GCC unroll 2
      for (int64_t p = 0; p < kRows; ++p) {
        x[p] = rows.x + std::min(r + p, rows.num_rows - 1) * full;
#pragma GCC unroll 8
        for (int64_t c = 0; c < kColumns; ++c) sums[p][c] = lanes_t{};
      }
      for (int64_t i = 0; i < full; i += kCount) {
        lanes_t row[kRows];
#pragma GCC unroll 2
        for (int64_t p = 0; p < kRows; ++p) row[p] = *(const lanes_t*)(x[p] + i);
#pragma GCC unroll 8
        for (int64_t c = 0; c < kColumns; ++c) {
          const lanes_t column = *(const lanes_t*)(y + c * full + i);
#pragma GCC unroll 2
          for (int64_t p = 0; p < kRows; ++p) sums[p][c] += row[p] * column;
        }
      }
#pragma GCC unroll 3
      for (int64_t n = kColumns / 2; n > 0; n /= 2)
#pragma GCC unroll 4
        for (int64_t c = 0; c < n; ++c)
#pragma GCC unroll 2
          for (int64_t p = 0; p < kRows; ++p) lanes::fold(sums[p][2 * c], sums[p][2 * c + 1], sums[p][c]);
      // one row's numbers, then the other's
      if constexpr (kRows == 2) lanes::fold(sums[0][0], sums[1][0], sums[0][0]);
      *(lanes_t*)step[r] = sums[0][0];
    }
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      for (int64_t c = count; c < kColumns; ++c) step[r][c] = 0;
      few_t* d = (few_t*)step[r];
      const doubles_t wide = __builtin_convertvector(*d, doubles_t);
      squares += double(rows.weight[r]) * wide * wide;
      *d *= 2 * rows.weight[r];
    }
    for (int64_t i = 0; i < up(width); i += kCount) {
      lanes_t columns[kColumns];
#pragma GCC unroll 8
      for (int64_t c = 0; c < kColumns; ++c) columns[c] = *(const lanes_t*)(y + c * full + i);
      for (int64_t r = 0; r < rows.num_rows; ++r) {
        lanes_t* grad = (lanes_t*)(rows.grad + r * grad_stride + i);
        lanes_t sum = *grad, more = lanes_t{};
#pragma GCC unroll 4
        for (int64_t c = 0; c < kColumns; c += 2) {
          sum += step[r][c] * columns[c];
          more += step[r][c + 1] * columns[c + 1];
        }
        *grad = sum + more;
      }
    }
    for (int64_t i = up(with_bias) - kCount; i >= 0; i -= kCount) {  // ends first
      lanes_t sums[kColumns];
#pragma GCC unroll 8
      for (int64_t c = 0; c < kColumns; ++c) sums[c] = lanes_t{};
      for (int64_t r = 0; r < rows.num_rows; ++r) {
        const lanes_t ha = *(const lanes_t*)(rows.ha + r * ha_stride + i);
#pragma GCC unroll 8
        for (int64_t c = 0; c < kColumns; ++c) sums[c] += step[r][c] * ha;
      }
      if (whole) {
#pragma GCC unroll 8
        for (int64_t c = 0; c < kColumns; ++c) {
          lanes_t* to = (lanes_t*)(grad_basis + c * with_bias + i);
          *to = adds ? *to + sums[c] : sums[c];
        }
      } else {
        for (int64_t c = 0; c < count; ++c)
          for (int64_t l = 0; l < std::min(kCount, with_bias - i); ++l) {
            scalar_t* to = grad_basis + c * with_bias + i + l;
            *to = (adds ? *to : 0) + sums[c][l];
          }
      }
    }
  }
  double value = 0;
  for (int64_t c = 0; c < kColumns; ++c) value += squares[c];
  return value;
}

#if defined(__x86_64__)
template <typename scalar_t>
__attribute__((target("avx512f"))) double direct_columns_avx512(FewRows<scalar_t> rows, int64_t num_cols,
                                                                const scalar_t* now, const scalar_t* then,
                                                                scalar_t* grad_basis, scalar_t* y, bool adds) {
  return direct_columns_by<64>(rows, num_cols, now, then, grad_basis, y, adds);
}

template <typename scalar_t>
__attribute__((target("avx2,fma"))) double direct_columns_avx2(FewRows<scalar_t> rows, int64_t num_cols, const scalar_t* now,
                                                               const scalar_t* then, scalar_t* grad_basis, scalar_t* y,
                                                               bool adds) {
  return direct_columns_by<32>(rows, num_cols, now, then, grad_basis, y, adds);
}
#endif

// For columns now [c, H + 1] of the basis, their snapshot and their gradient, which is set, or added to where ``adds``: d =
// x [V_H | dV]', d/dH and d/dV. y: scratch, kFewColumns padded rows and kLanes more, finite. Returns the sum of w d^2.
template <typename scalar_t>
double direct_columns(FewRows<scalar_t> rows, int64_t num_cols, const scalar_t* now, const scalar_t* then,
                      scalar_t* grad_basis, scalar_t* y, bool adds) {
#if defined(__x86_64__)
  using registers::Kind;
  if (registers::has(Kind::avx512)) return direct_columns_avx512(rows, num_cols, now, then, grad_basis, y, adds);
  if (registers::has(Kind::avx2)) return direct_columns_avx2(rows, num_cols, now, then, grad_basis, y, adds);
#endif
  return direct_columns_by<32>(rows, num_cols, now, then, grad_basis, y, adds);
}

}  // namespace fasthyper
