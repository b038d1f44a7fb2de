// The step that Adam or AdamW would take, in one pass over (gradient, moments) instead of ten (DESIGN E4).
#include <cmath>

#include "tensor.h"

namespace fasthyper {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements below which a second thread does not pay

template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void adam_delta_range(scalar_t* __restrict__ delta, const scalar_t* __restrict__ param,
                                              const scalar_t* __restrict__ grad, const scalar_t* __restrict__ exp_avg,
                                              const scalar_t* __restrict__ exp_avg_sq, int64_t length, scalar_t l2,
                                              scalar_t decay, scalar_t beta1, scalar_t beta2, scalar_t rest1, scalar_t rest2,
                                              scalar_t step_size, scalar_t bias2, scalar_t eps) {
  for (int64_t i = 0; i < length; ++i) {
    const scalar_t g = grad[i] + l2 * param[i];
    const scalar_t m = beta1 * exp_avg[i] + rest1 * g, v = beta2 * exp_avg_sq[i] + rest2 * g * g;
    delta[i] = -step_size * m / (std::sqrt(v / bias2) + eps) - decay * param[i];
  }
}

Tensor adam_delta_fwd_cpu(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, double lr, double beta1,
                          double beta2, double eps, double weight_decay, bool decoupled) {
  NoGrad no_grad;
  for (Tensor* t : {&param, &grad, &exp_avg, &exp_avg_sq}) *t = torch::stable::contiguous(*t);
  const double after = 1 + *const_data<double>(torch::stable::to(step, ScalarType::Double));
  const double step_size = lr / (1 - std::pow(beta1, after)), bias2 = 1 - std::pow(beta2, after);
  Tensor delta = torch::stable::new_empty(param, param.sizes());
  dispatch_floating(param, "adam_delta", [&](auto zero) {
    using scalar_t = decltype(zero);
    torch::stable::parallel_for(0, param.numel(), kGrain, [&](int64_t begin, int64_t end) {
      adam_delta_range<scalar_t>(data<scalar_t>(delta) + begin, const_data<scalar_t>(param) + begin,
                                 const_data<scalar_t>(grad) + begin, const_data<scalar_t>(exp_avg) + begin,
                                 const_data<scalar_t>(exp_avg_sq) + begin, end - begin, decoupled ? 0 : weight_decay,
                                 decoupled ? lr * weight_decay : 0, beta1, beta2, 1 - beta1, 1 - beta2, step_size, bias2,
                                 eps);
    });
  });
  return delta;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) { m.impl("_adam_delta_fwd", TORCH_BOX(&adam_delta_fwd_cpu)); }

}  // namespace fasthyper
