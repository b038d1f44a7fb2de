// What follows each trunk layer: value at the snapshot, drift from it without loss of digits, slope now (DESIGN E5). The
// formulas are those of fasthyper/activations.py.
#pragma once

#include <cmath>

#include "portable.cuh"

namespace fasthyper::gpu {

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
  // elu(a) = max(a, 0) + expm1(min(a, 0)), drift by drift. So far below 0 elu is -1: there a starts no lower.
  const bool is_elu = activation == Activation::kElu;
  const T lowest = sizeof(T) == 4 ? -80 : -700, a = is_elu ? larger(a0, lowest) : a0, d = is_elu ? da + (a0 - a) : da;
  const T above = larger(a, T(0)), below = a < 0 ? a : T(0);
  const T d_above = larger(d + below, -above);  // for a > 0 it is max(d, -a), else max(a + d, 0)
  const bool is_above = d_above > -above;
  if (!is_elu) return {above, d_above, T(is_above)};
  const T d_rest = d - d_above, d_below = d_rest > -below ? -below : d_rest;  // rounding may not carry it above 0
  const T exp0 = std::exp(below), drift = exp0 * std::expm1(d_below);
  return {above + std::expm1(below), d_above + drift, is_above ? T(1) : exp0 + drift};
}

}  // namespace fasthyper::gpu
