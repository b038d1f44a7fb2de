// What follows each trunk layer: value at the snapshot, drift from it without loss of digits, slope now (DESIGN E5).
// The formulas are those of fasthyper/activations.py; transcendental functions are aten's, which are vectorised, but for elu
// in float32, where calls and scratch would cost more than the function.
#pragma once

#include <algorithm>
#include <type_traits>

#include "tensor.h"

namespace fasthyper {

enum class Activation : int64_t { kRelu = 0, kElu = 1, kTanh = 2, kSigmoid = 3, kSilu = 4 };

// out = op(in) for an aten function of one tensor; both dense
inline void unary_out(const char* op, const Tensor& in, const Tensor& out) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(in), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// x0 and dx of a row lie ``stride`` apart from those of the next: they are columns of [dx | x0 | 1]. All else is dense, but
// where passes are fused: there da may be a block of a product and a0 and slope the columns of theirs.
struct Shape {
  int64_t rows, width, stride, da_stride, a0_stride;
  int64_t size() const { return rows * width; }
};

// relu(a0 + da) - relu(a0): for a0 > 0 it is max(da, -a0), else max(a0 + da, 0)
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void relu_drift(Shape shape, const scalar_t* __restrict__ a0, const scalar_t* __restrict__ da,
                                        scalar_t* __restrict__ x0, scalar_t* __restrict__ dx, scalar_t* __restrict__ slope) {
  for (int64_t r = 0; r < shape.rows; ++r, x0 += shape.stride, dx += shape.stride) {
    for (int64_t i = 0; i < shape.width; ++i) {
      const scalar_t above = std::max(a0[i], scalar_t(0)), below = std::min(a0[i], scalar_t(0));
      const scalar_t d = std::max(da[i] + below, -above);
      x0[i] = above;
      dx[i] = d;
      slope[i] = d > -above ? scalar_t(1) : scalar_t(0);
    }
    a0 += shape.a0_stride, da += shape.da_stride, slope += shape.a0_stride;
  }
}

// What exp and expm1 of a number share: with x = k ln 2 + r, |r| <= ln 2 / 2, p = expm1(r) and scale = 2^k
struct Exp {
  float p, scale;
  float exp() const { return p * scale + scale; }
  float expm1() const { return p * scale + (scale - 1); }
};

// Within 2 ulp for x in [-80, 80], NaN for NaN. Without a branch, a call or a conversion: loops over it become vector code.
inline __attribute__((always_inline)) Exp exp_of(float x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound, k = shifted - kRound;
  const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;  // k times the first is exact
  float q = 1.3946646e-3f;                                      // of degree 4: (expm1(r) - r) / r^2, minimax
  q = q * r + 8.3666983e-3f;
  q = q * r + 4.1666280e-2f;
  q = q * r + 1.6666542e-1f;
  q = q * r + 0.5f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // 2^k: what kRound has set is shifted out
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return {r + (r * r) * q, scale};
}

// max and min without a branch that the compiler would grow: it then leaves the loop scalar
inline __attribute__((always_inline)) float select(bool first, float a, float b) {
  uint32_t x, y;
  __builtin_memcpy(&x, &a, sizeof x);
  __builtin_memcpy(&y, &b, sizeof y);
  y ^= (x ^ y) & -uint32_t(first);
  __builtin_memcpy(&a, &y, sizeof a);
  return a;
}
inline __attribute__((always_inline)) float larger(float a, float b) { return select(a < b, b, a); }
inline __attribute__((always_inline)) float smaller(float a, float b) { return select(b < a, b, a); }

// elu(a) = max(a, 0) + expm1(min(a, 0)), drift by drift. Below -80 elu is -1 in float32 and its slope 0: a starts no lower.
inline __attribute__((always_inline)) void elu_drift(float a0, float da, float& x0, float& dx, float& slope) {
  constexpr float kFloatLowest = -80;
  const float a = larger(a0, kFloatLowest), d = da + (a0 - a);
  const float above = larger(a, 0), below = smaller(a, 0), d_above = larger(d + below, -above);
  const float d_below = larger(smaller(d - d_above, -below), kFloatLowest);  // rounding may not carry it above 0
  const Exp then = exp_of(below);
  const float exp0 = then.exp(), drift = exp0 * exp_of(d_below).expm1();
  x0 = above + then.expm1();
  dx = d_above + drift;
  slope = select(d_above > -above, 1, exp0 + drift);
}

// A row goes in blocks of one vector or a few; the last block begins early enough to be full, and sets some of it again
inline FASTHYPER_VECTOR_CLONES void elu_drift(Shape shape, const float* __restrict__ a0, const float* __restrict__ da,
                                              float* __restrict__ x0, float* __restrict__ dx, float* __restrict__ slope) {
  constexpr int64_t kBlock = 16;
  for (int64_t r = 0; r < shape.rows; ++r, x0 += shape.stride, dx += shape.stride) {
    for (int64_t start = 0; shape.width >= kBlock && start < shape.width; start += kBlock) {
      const int64_t first = std::min(start, shape.width - kBlock);
      for (int64_t i = first; i < first + kBlock; ++i) elu_drift(a0[i], da[i], x0[i], dx[i], slope[i]);
    }
    if (shape.width < kBlock)
      for (int64_t i = 0; i < shape.width; ++i) elu_drift(a0[i], da[i], x0[i], dx[i], slope[i]);
    a0 += shape.a0_stride, da += shape.da_stride, slope += shape.a0_stride;
  }
}

// Where elu is -1 in float64 and its slope 0, and exp not yet: a starts no lower
constexpr double kLowest = -700;

// t = v = min(a, 0); u = min(a + d, 0) - t, the drift of what lies below 0, exact for every sign
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void elu_arguments(int64_t size, const scalar_t* __restrict__ a0, const scalar_t* __restrict__ da,
                                           scalar_t* __restrict__ t, scalar_t* __restrict__ u, scalar_t* __restrict__ v) {
  for (int64_t i = 0; i < size; ++i) {
    const scalar_t a = std::max(a0[i], scalar_t(kLowest)), d = da[i] + (a0[i] - a);
    const scalar_t above = std::max(a, scalar_t(0)), below = std::min(a, scalar_t(0));
    t[i] = v[i] = below;
    u[i] = std::min(d - std::max(d + below, -above), -below);  // rounding may not carry it above 0
  }
}

// from t = exp(min(a, 0)), u = expm1 of the drift below 0 and v = expm1(min(a, 0))
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void elu_drift(Shape shape, const scalar_t* __restrict__ a0, const scalar_t* __restrict__ da,
                                       const scalar_t* __restrict__ t, const scalar_t* __restrict__ u,
                                       const scalar_t* __restrict__ v, scalar_t* __restrict__ x0, scalar_t* __restrict__ dx,
                                       scalar_t* __restrict__ slope) {
  for (int64_t r = 0; r < shape.rows; ++r, x0 += shape.stride, dx += shape.stride) {
    for (int64_t i = 0; i < shape.width; ++i) {
      const scalar_t a = std::max(a0[i], scalar_t(kLowest)), d = da[i] + (a0[i] - a);
      const scalar_t above = std::max(a, scalar_t(0)), below = std::min(a, scalar_t(0));
      const scalar_t d_above = std::max(d + below, -above), d_below = t[i] * u[i];
      x0[i] = above + v[i];
      dx[i] = d_above + d_below;
      slope[i] = d_above > -above ? scalar_t(1) : t[i] + d_below;
    }
    a0 += shape.width, da += shape.width, t += shape.width, u += shape.width, v += shape.width, slope += shape.width;
  }
}

// t = scale * a0, u = scale * (a0 + da), v = scale * da
template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void tanh_arguments(int64_t size, scalar_t scale, const scalar_t* __restrict__ a0,
                                            const scalar_t* __restrict__ da, scalar_t* __restrict__ t,
                                            scalar_t* __restrict__ u, scalar_t* __restrict__ v) {
  for (int64_t i = 0; i < size; ++i) t[i] = scale * a0[i], u[i] = scale * (a0[i] + da[i]), v[i] = scale * da[i];
}

// from t, u, v = tanh of those: tanh(x + d) - tanh(x) = tanh(d) (1 - tanh(x + d) tanh(x)); sigmoid(a) = (1 + tanh(a/2)) / 2
template <typename scalar_t, Activation activation>
FASTHYPER_VECTOR_CLONES void tanh_drift(Shape shape, const scalar_t* __restrict__ a0, const scalar_t* __restrict__ da,
                                        const scalar_t* __restrict__ t, const scalar_t* __restrict__ u,
                                        const scalar_t* __restrict__ v, scalar_t* __restrict__ x0, scalar_t* __restrict__ dx,
                                        scalar_t* __restrict__ slope) {
  for (int64_t r = 0; r < shape.rows; ++r, x0 += shape.stride, dx += shape.stride) {
    for (int64_t i = 0; i < shape.width; ++i) {
      const scalar_t d = v[i] * (1 - u[i] * t[i]), s = 1 - u[i] * u[i];
      if (activation == Activation::kTanh) {
        x0[i] = t[i], dx[i] = d, slope[i] = s;
      } else if (activation == Activation::kSigmoid) {
        x0[i] = (1 + t[i]) / 2, dx[i] = d / 2, slope[i] = s / 4;
      } else {
        const scalar_t gate0 = (1 + t[i]) / 2, gate = (1 + u[i]) / 2;
        x0[i] = a0[i] * gate0, dx[i] = da[i] * gate + a0[i] * d / 2, slope[i] = gate + (a0[i] + da[i]) * s / 4;
      }
    }
    a0 += shape.width, da += shape.width, t += shape.width, u += shape.width, v += shape.width, slope += shape.width;
  }
}

// One pass without scratch, which then also takes blocks
template <typename scalar_t>
bool fused(Activation activation) {
  return activation == Activation::kRelu || (activation == Activation::kElu && std::is_same_v<scalar_t, float>);
}

template <typename scalar_t>
void fused_drift(Activation activation, Shape shape, const scalar_t* a0, const scalar_t* da, scalar_t* x0, scalar_t* dx,
                 scalar_t* slope) {
  if constexpr (std::is_same_v<scalar_t, float>)
    if (activation == Activation::kElu) return elu_drift(shape, a0, da, x0, dx, slope);
  relu_drift(shape, a0, da, x0, dx, slope);
}

// Sets x = [dx | x0 | 1] (``rows`` of it), and slope, from a0 and da; scratch holds at least 3 * rows * width
template <typename scalar_t>
void activation_drift(Activation activation, int64_t num_rows, int64_t width, const scalar_t* a0, const scalar_t* da,
                      scalar_t* x, scalar_t* slope, const Tensor& scratch) {
  const Shape shape{num_rows, width, 2 * width + 1, width, width};
  const int64_t size = shape.size();
  scalar_t *dx = x, *x0 = x + width, *t = data<scalar_t>(scratch), *u = t + size, *v = u + size;
  for (int64_t r = 0; r < num_rows; ++r) x[r * shape.stride + 2 * width] = 1;
  if (fused<scalar_t>(activation)) return fused_drift(activation, shape, a0, da, x0, dx, slope);
  if (activation == Activation::kElu) {
    elu_arguments(size, a0, da, t, u, v);
    const Tensor first = rows(scratch, 0, size), others = rows(scratch, size, 2 * size);
    unary_out("aten::exp", first, first);  // 1 + expm1 would lose the digits of what u brings back to 1
    unary_out("aten::expm1", others, others);
    return elu_drift(shape, a0, da, t, u, v, x0, dx, slope);
  }
  tanh_arguments<scalar_t>(size, activation == Activation::kTanh ? 1 : 0.5, a0, da, t, u, v);
  const Tensor all = rows(scratch, 0, 3 * size);
  unary_out("aten::tanh", all, all);
  if (activation == Activation::kTanh)
    tanh_drift<scalar_t, Activation::kTanh>(shape, a0, da, t, u, v, x0, dx, slope);
  else if (activation == Activation::kSigmoid)
    tanh_drift<scalar_t, Activation::kSigmoid>(shape, a0, da, t, u, v, x0, dx, slope);
  else
    tanh_drift<scalar_t, Activation::kSilu>(shape, a0, da, t, u, v, x0, dx, slope);
}

}  // namespace fasthyper
