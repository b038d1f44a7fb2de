// What follows each trunk layer: value at the snapshot, drift from it without loss of digits, slope now (DESIGN E5). The
// formulas are those of fasthyper/activations.py.
#pragma once

#include <cmath>

#include "portable.cuh"

namespace fasthyper {

enum class Activation : int { kRelu = 0, kElu = 1, kTanh = 2, kSigmoid = 3, kSilu = 4 };

template <typename T>
struct Activated {
  T x0, dx, slope;
};

// Where one is NaN, it is ``a`` that counts
template <typename T>
__device__ T larger(T a, T b) {
  return a < b ? b : a;
}

// tanh(x + d) - tanh(x) = tanh(d) (1 - tanh(x + d) tanh(x))
template <typename T>
__device__ Activated<T> tanh_drift(T a0, T da) {
  const T then = std::tanh(a0), now = std::tanh(a0 + da);
  return {then, std::tanh(da) * (1 - now * then), 1 - now * now};
}

template <typename T>
__device__ Activated<T> activate(Activation activation, T a0, T da) {
  if (activation == Activation::kTanh) return tanh_drift(a0, da);
  if (activation == Activation::kSigmoid || activation == Activation::kSilu) {
    const Activated<T> t = tanh_drift(a0 / 2, da / 2);  // sigmoid(a) = (1 + tanh(a / 2)) / 2
    const Activated<T> gate{(1 + t.x0) / 2, t.dx / 2, t.slope / 4};
    if (activation == Activation::kSigmoid) return gate;
    const T now = (1 + std::tanh((a0 + da) / 2)) / 2;
    return {a0 * gate.x0, da * now + a0 * gate.dx, now + (a0 + da) * gate.slope};
  }
  // of what lies above 0: for a0 > 0 it is max(da, -a0), else max(a0 + da, 0)
  const T above = larger(a0, T(0)), below = a0 < 0 ? a0 : T(0), d_above = larger(da + below, -above);
  const bool is_above = d_above > -above;
  if (activation == Activation::kRelu) return {above, d_above, T(is_above)};
  const T exp0 = std::exp(below), d_below = exp0 * std::expm1(da - d_above);
  return {above + std::expm1(below), d_above + d_below, is_above ? T(1) : exp0 + d_below};
}

}  // namespace fasthyper
