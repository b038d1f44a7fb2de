// Adam and AdamW in one pass over each list of tensors (DESIGN E4): the step, parameters after it, and the step taken.
#include "../adam.h"

#include <cmath>
#include <optional>

#include "memory.h"

namespace fasthyper {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements below which a second thread does not pay

// out = (whole: param +) the step; param is read where it matters
template <typename scalar_t, bool whole, bool decays>
FASTHYPER_VECTOR_CLONES void ahead_range(int64_t length, const AdamRule<scalar_t> rule, const scalar_t* __restrict__ param,
                                         const scalar_t* __restrict__ grad, const scalar_t* __restrict__ exp_avg,
                                         const scalar_t* __restrict__ exp_avg_sq, scalar_t* __restrict__ out) {
  for (int64_t i = 0; i < length; ++i) {
    const scalar_t p = decays ? param[i] : 0, g = grad[i] + (decays ? rule.l2 * p : 0);
    out[i] = (whole ? param[i] : 0) + rule.change(p, rule.first(exp_avg[i], g), rule.second(exp_avg_sq[i], g));
  }
}

template <typename scalar_t, bool more, bool decays>
FASTHYPER_VECTOR_CLONES void step_range(int64_t length, const AdamRule<scalar_t> rule, scalar_t scale,
                                        const scalar_t* __restrict__ grad, const scalar_t* __restrict__ more_grad,
                                        scalar_t* __restrict__ param, scalar_t* __restrict__ exp_avg,
                                        scalar_t* __restrict__ exp_avg_sq) {
  for (int64_t i = 0; i < length; ++i) {
    const scalar_t g = grad[i] + (more ? scale * more_grad[i] : 0) + (decays ? rule.l2 * param[i] : 0);
    exp_avg[i] = rule.first(exp_avg[i], g);
    exp_avg_sq[i] = rule.second(exp_avg_sq[i], g);
    param[i] += rule.change(decays ? param[i] : 0, exp_avg[i], exp_avg_sq[i]);
  }
}

// Calls body(tensor, begin, end) for ranges that cover all elements of all tensors, each thread an equal share of the whole
template <typename Body>
void for_shares(const std::vector<Tensor>& tensors, const Body& body) {
  std::vector<int64_t> starts{0};
  for (const Tensor& t : tensors) starts.push_back(starts.back() + t.numel());
  torch::stable::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int64_t lo = std::max(begin, starts[i]), hi = std::min(end, starts[i + 1]);
      if (lo < hi) body(i, lo - starts[i], hi - starts[i]);
    }
  });
}

template <typename scalar_t>
std::vector<AdamRule<scalar_t>> rules(const std::vector<Tensor>& steps, const AdamSettings& settings) {
  std::vector<AdamRule<scalar_t>> out;
  for (const Tensor& step : steps) {
    const double after = host_number(step) + 1;
    out.emplace_back(settings, 1 - std::pow(settings.beta1, after), 1 - std::pow(settings.beta2, after));
  }
  return out;
}

template <bool whole>
std::vector<Tensor> ahead(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                          std::vector<Tensor> exp_avg_sqs, const std::vector<Tensor>& steps, const AdamSettings& settings) {
  NoGrad no_grad;
  std::vector<Tensor> outs;
  if (params.empty()) return outs;
  check_like(params, params, "params");
  check_like(params, grads, "grads");
  check_like(params, exp_avgs, "exp_avgs");
  check_like(params, exp_avg_sqs, "exp_avg_sqs");
  check_steps(params, steps);
  if (whole || settings.weight_decay != 0) make_contiguous(params);
  for (std::vector<Tensor>* list : {&grads, &exp_avgs, &exp_avg_sqs}) make_contiguous(*list);
  for (const Tensor& param : params) outs.push_back(kept_empty(param, param.sizes()));
  dispatch_floating(params[0], "adam", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto rule = rules<scalar_t>(steps, settings);
    for_shares(params, [&](size_t i, int64_t lo, int64_t hi) {
      const auto range =
          settings.weight_decay != 0 ? ahead_range<scalar_t, whole, true> : ahead_range<scalar_t, whole, false>;
      range(hi - lo, rule[i], const_data<scalar_t>(params[i]) + lo, const_data<scalar_t>(grads[i]) + lo,
            const_data<scalar_t>(exp_avgs[i]) + lo, const_data<scalar_t>(exp_avg_sqs[i]) + lo, data<scalar_t>(outs[i]) + lo);
    });
  });
  return outs;
}

std::vector<Tensor> adam_ahead_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                                   std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, double lr, double beta1,
                                   double beta2, double eps, double weight_decay, bool decoupled,
                                   std::optional<Tensor> rate) {
  if (rate) lr *= host_number(*rate);
  return ahead<true>(params, grads, exp_avgs, exp_avg_sqs, steps, {lr, beta1, beta2, eps, weight_decay, decoupled});
}

Tensor adam_delta_fwd_cpu(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, double lr, double beta1,
                          double beta2, double eps, double weight_decay, bool decoupled) {
  return ahead<false>({param}, {grad}, {exp_avg}, {exp_avg_sq}, {step}, {lr, beta1, beta2, eps, weight_decay, decoupled})[0];
}

void adam_step_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> more_grads, double scale,
                   std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, double lr,
                   double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                   std::optional<Tensor> healthy, std::optional<Tensor> rate) {
  NoGrad no_grad;
  if (params.empty() || (healthy && !*const_data<bool>(*healthy))) return;
  const bool more = !more_grads.empty();
  check_like(params, params, "params");
  check_like(params, grads, "grads");
  if (more) check_like(params, more_grads, "more_grads");
  check_like(params, exp_avgs, "exp_avgs");
  check_like(params, exp_avg_sqs, "exp_avg_sqs");
  check_steps(params, steps);
  for (const std::vector<Tensor>* list : {&params, &exp_avgs, &exp_avg_sqs}) check_in_place(*list);
  make_contiguous(grads);
  make_contiguous(more_grads);
  if (rate) lr *= host_number(*rate);
  const AdamSettings settings{lr, beta1, beta2, eps, weight_decay, decoupled};
  dispatch_floating(params[0], "adam", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto rule = rules<scalar_t>(steps, settings);
    for_shares(params, [&](size_t i, int64_t lo, int64_t hi) {
      const auto step = weight_decay != 0 ? (more ? step_range<scalar_t, true, true> : step_range<scalar_t, false, true>)
                                          : (more ? step_range<scalar_t, true, false> : step_range<scalar_t, false, false>);
      step(hi - lo, rule[i], scale, const_data<scalar_t>(grads[i]) + lo,
           more ? const_data<scalar_t>(more_grads[i]) + lo : nullptr, data<scalar_t>(params[i]) + lo,
           data<scalar_t>(exp_avgs[i]) + lo, data<scalar_t>(exp_avg_sqs[i]) + lo);
    });
  });
  for (const Tensor& step : steps) dispatch_floating(step, "adam", [&](auto zero) { *data<decltype(zero)>(step) += 1; });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) {
  m.impl("_adam_delta_fwd", TORCH_BOX(&adam_delta_fwd_cpu));
  m.impl("_adam_ahead", TORCH_BOX(&adam_ahead_cpu));
  m.impl("_adam_step_", TORCH_BOX(&adam_step_cpu));
}

}  // namespace fasthyper
