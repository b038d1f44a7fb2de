// What Adam is on every device (DESIGN E4): the step of one element, and the checks of a call's lists.
#pragma once

#include <cmath>
#include <vector>

#include "stable.h"

#ifdef __CUDACC__
#define FASTHYPER_ANYWHERE __host__ __device__
#else
#define FASTHYPER_ANYWHERE
#endif

namespace fasthyper {

struct AdamSettings {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;
};

// What all elements of a tensor share
template <typename scalar_t>
struct AdamRule {
  scalar_t l2, decay, beta1, beta2, rest1, rest2, step_size, root_scale, eps;

  AdamRule() = default;
  // bias1, bias2: 1 - beta^(steps taken before + 1)
  FASTHYPER_ANYWHERE AdamRule(const AdamSettings& s, double bias1, double bias2)
      : l2(s.decoupled ? 0 : s.weight_decay),
        decay(s.decoupled ? s.lr * s.weight_decay : 0),
        beta1(s.beta1),
        beta2(s.beta2),
        rest1(1 - s.beta1),
        rest2(1 - s.beta2),
        step_size(s.lr / bias1),
        root_scale(1 / std::sqrt(bias2)),
        eps(s.eps) {}

  FASTHYPER_ANYWHERE scalar_t first(scalar_t m, scalar_t g) const { return beta1 * m + rest1 * g; }
  FASTHYPER_ANYWHERE scalar_t second(scalar_t v, scalar_t g) const { return beta2 * v + rest2 * g * g; }
  FASTHYPER_ANYWHERE scalar_t change(scalar_t p, scalar_t m, scalar_t v) const {
    return -step_size * m / (std::sqrt(v) * root_scale + eps) - decay * p;
  }
};

// A number in host memory
inline double host_number(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return *const_data<float>(t);
  return *const_data<double>(torch::stable::to(t, ScalarType::Double));
}

inline void make_contiguous(std::vector<Tensor>& tensors) {
  for (Tensor& t : tensors) t = torch::stable::contiguous(t);
}

// Pointers are taken from these without a look at what they point to
inline void check_like(const std::vector<Tensor>& params, const std::vector<Tensor>& others, const char* name) {
  FASTHYPER_CHECK(others.size() == params.size(), "adam: ", params.size(), " params, but ", others.size(), " ", name);
  for (size_t i = 0; i < params.size(); ++i)
    FASTHYPER_CHECK(others[i].numel() == params[i].numel() && others[i].scalar_type() == params[0].scalar_type() &&
                        others[i].get_device_index() == params[0].get_device_index(),
                    "adam: ", name, "[", i, "] differs from params[", i, "] in size, type or device");
}

inline void check_in_place(const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) FASTHYPER_CHECK(t.is_contiguous(), "adam: what is updated in place must be contiguous");
}

inline void check_steps(const std::vector<Tensor>& params, const std::vector<Tensor>& steps) {
  FASTHYPER_CHECK(steps.size() == params.size(), "adam: ", params.size(), " params, but ", steps.size(), " steps");
  for (size_t i = 0; i < steps.size(); ++i)
    FASTHYPER_CHECK(steps[i].is_cpu() || steps[i].get_device_index() == params[0].get_device_index(), "adam: steps[", i,
                    "] is neither on the CPU nor with the parameters");
}

}  // namespace fasthyper
