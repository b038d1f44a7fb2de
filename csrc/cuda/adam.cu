// Adam and AdamW in one pass over each list of tensors (DESIGN E4): the step, parameters after it, and the step taken. One
// launch serves up to kMost tensors; memory bounds it: the step ahead reads 4 numbers an element and writes 1, the step
// taken reads 5 and writes 3.
#include <algorithm>
#include <cmath>
#include <optional>

#include "../adam.h"
#include "device.cuh"

namespace fasthyper {
namespace {

constexpr int kMost = 40;
constexpr int kThreads = 256;
constexpr int64_t kShare = 4096;  // elements of a block: enough blocks for all multiprocessors at 10^6, one rule for many
template <typename scalar_t>
constexpr int kResident = 16 / sizeof(scalar_t);  // blocks on a multiprocessor: no more than 64 registers in float32

// Pointers of one tensor's share in the call; what is not used is null
template <typename scalar_t>
struct Item {
  const scalar_t *grad, *more;
  scalar_t *param, *exp_avg, *exp_avg_sq, *out;
  void* step;     // on the device; null: ``before`` holds its number
  double before;  // steps taken
  int64_t size;
  bool wide_step;  // float64, not float32
  bool aligned;    // to 16 bytes, all of them
};

// The argument of a launch, passed by value
template <typename scalar_t>
struct Call {
  AdamSettings settings;
  double log_beta1, log_beta2;
  scalar_t scale;
  bool whole, decays;
  const bool* healthy;  // null: it is
  const double* rate;   // what multiplies lr; null: nothing
  int num_items;
  int first_block[kMost];
  Item<scalar_t> items[kMost];
};
static_assert(sizeof(Call<double>) <= 4096, "the limit of kernel arguments of all architectures and drivers");

template <typename scalar_t>
__device__ double steps_before(const Item<scalar_t>& item) {
  if (item.step == nullptr) return item.before;
  return item.wide_step ? *static_cast<const double*>(item.step) : *static_cast<const float*>(item.step);
}

// out = (whole: param +) the step; param is read where it matters
template <int width, typename scalar_t>
__device__ void ahead_range(const Call<scalar_t>& call, const Item<scalar_t>& item, const AdamRule<scalar_t>& rule,
                            int64_t begin, int64_t end) {
  using Numbers = Vector<scalar_t, width>;
  for (int64_t i = begin + threadIdx.x * width; i < end; i += kThreads * width) {
    const Numbers grad = *reinterpret_cast<const Numbers*>(item.grad + i);
    const Numbers m = *reinterpret_cast<const Numbers*>(item.exp_avg + i);
    const Numbers v = *reinterpret_cast<const Numbers*>(item.exp_avg_sq + i);
    Numbers param{}, out;
    if (call.whole || call.decays) param = *reinterpret_cast<const Numbers*>(item.param + i);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const scalar_t p = call.decays ? param.at[k] : 0, g = grad.at[k] + rule.l2 * p;
      const scalar_t change = rule.change(p, rule.first(m.at[k], g), rule.second(v.at[k], g));
      out.at[k] = call.whole ? param.at[k] + change : change;
    }
    *reinterpret_cast<Numbers*>(item.out + i) = out;
  }
}

template <int width, typename scalar_t>
__device__ void step_range(const Call<scalar_t>& call, const Item<scalar_t>& item, const AdamRule<scalar_t>& rule,
                           int64_t begin, int64_t end) {
  using Numbers = Vector<scalar_t, width>;
  for (int64_t i = begin + threadIdx.x * width; i < end; i += kThreads * width) {
    const Numbers grad = *reinterpret_cast<const Numbers*>(item.grad + i);
    Numbers param = *reinterpret_cast<const Numbers*>(item.param + i);
    Numbers m = *reinterpret_cast<const Numbers*>(item.exp_avg + i);
    Numbers v = *reinterpret_cast<const Numbers*>(item.exp_avg_sq + i);
    Numbers more{};
    if (item.more != nullptr) more = *reinterpret_cast<const Numbers*>(item.more + i);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const scalar_t p = call.decays ? param.at[k] : 0;
      const scalar_t g = grad.at[k] + (item.more != nullptr ? call.scale * more.at[k] : 0) + rule.l2 * p;
      m.at[k] = rule.first(m.at[k], g);
      v.at[k] = rule.second(v.at[k], g);
      param.at[k] += rule.change(p, m.at[k], v.at[k]);
    }
    *reinterpret_cast<Numbers*>(item.exp_avg + i) = m;
    *reinterpret_cast<Numbers*>(item.exp_avg_sq + i) = v;
    *reinterpret_cast<Numbers*>(item.param + i) = param;
  }
}

// One block computes one share of one tensor
template <typename scalar_t, bool take>
__global__ void __launch_bounds__(kThreads, kResident<scalar_t>) adam_kernel(const __grid_constant__ Call<scalar_t> call) {
  if (call.healthy != nullptr && !*call.healthy) return;
  const int block = blockIdx.x;
  int found = 0;  // the last item whose blocks begin here or before: one without elements has none
  for (int end = call.num_items; end - found > 1;) {
    const int middle = (found + end) / 2;
    (call.first_block[middle] <= block ? found : end) = middle;
  }
  const Item<scalar_t>& item = call.items[found];
  __shared__ AdamRule<scalar_t> rule;
  if (threadIdx.x == 0) {
    const double after = steps_before(item) + 1;
    AdamSettings settings = call.settings;
    if (call.rate != nullptr) settings.lr *= *call.rate;
    rule = AdamRule<scalar_t>(settings, -expm1(after * call.log_beta1), -expm1(after * call.log_beta2));
  }
  __syncthreads();
  const int64_t begin = (block - call.first_block[found]) * kShare, end = min(begin + kShare, item.size);
  const int64_t whole = item.aligned ? end - (end - begin) % kWidth<scalar_t> : begin;  // begin is a multiple of the width
  const auto range = [&](auto width, int64_t from, int64_t to) {
    if constexpr (take) {
      step_range<width>(call, item, rule, from, to);
    } else {
      ahead_range<width>(call, item, rule, from, to);
    }
  };
  range(std::integral_constant<int, kWidth<scalar_t>>{}, begin, whole);
  range(std::integral_constant<int, 1>{}, whole, end);
}

// After the step, which reads the counts in all of its blocks
template <typename scalar_t>
__global__ void adam_count_kernel(const __grid_constant__ Call<scalar_t> call) {
  if (call.healthy != nullptr && !*call.healthy) return;
  const Item<scalar_t>& item = call.items[threadIdx.x];
  if (item.step == nullptr) return;
  if (item.wide_step) {
    *static_cast<double*>(item.step) += 1;
  } else {
    *static_cast<float*>(item.step) += 1;
  }
}

template <typename scalar_t, bool take>
void launch(Call<scalar_t>& call, int num_blocks, cudaStream_t stream) {
  if (num_blocks > 0) adam_kernel<scalar_t, take><<<num_blocks, kThreads, 0, stream>>>(call);
  check_launch("adam_kernel");
  if constexpr (take) {
    adam_count_kernel<<<1, call.num_items, 0, stream>>>(call);
    check_launch("adam_count_kernel");
  }
}

// Runs over all tensors, kMost at a time. take: the step is taken, else outs are written
template <typename scalar_t, bool take>
void run(const AdamSettings& settings, bool whole, double scale, const std::vector<Tensor>& params,
         const std::vector<Tensor>& grads, const std::vector<Tensor>& more_grads, const std::vector<Tensor>& exp_avgs,
         const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& steps, const std::vector<Tensor>& outs,
         const bool* healthy, const std::optional<Tensor>& rate, cudaStream_t stream) {
  Call<scalar_t> call{};
  call.settings = settings;
  call.log_beta1 = std::log(settings.beta1);
  call.log_beta2 = std::log(settings.beta2);
  call.scale = scale;
  call.whole = whole;
  call.decays = settings.weight_decay != 0;
  call.healthy = healthy;
  if (rate) {
    FASTHYPER_CHECK(rate->scalar_type() == ScalarType::Double && rate->get_device_index() == params[0].get_device_index(),
                    "adam: rate must be float64 and on the parameters' device");
    call.rate = const_data<double>(*rate);
  }
  for (size_t start = 0; start < params.size(); start += kMost) {
    call.num_items = std::min<size_t>(kMost, params.size() - start);
    int64_t num_blocks = 0;
    for (int i = 0; i < call.num_items; ++i) {
      const size_t t = start + i;
      Item<scalar_t>& item = call.items[i];
      item = {};
      item.grad = const_data<scalar_t>(grads[t]);
      if (!more_grads.empty()) item.more = const_data<scalar_t>(more_grads[t]);
      item.param = const_cast<scalar_t*>(const_data<scalar_t>(params[t]));
      item.exp_avg = const_cast<scalar_t*>(const_data<scalar_t>(exp_avgs[t]));
      item.exp_avg_sq = const_cast<scalar_t*>(const_data<scalar_t>(exp_avg_sqs[t]));
      if (!outs.empty()) item.out = data<scalar_t>(outs[t]);
      if (steps[t].is_cpu()) {
        item.before = host_number(steps[t]);
      } else {
        item.step = const_cast<void*>(steps[t].const_data_ptr());
        item.wide_step = steps[t].scalar_type() == ScalarType::Double;
      }
      item.size = params[t].numel();
      item.aligned = is_aligned(item.grad) && is_aligned(item.more) && is_aligned(item.param) && is_aligned(item.exp_avg) &&
                     is_aligned(item.exp_avg_sq) && is_aligned(item.out);
      call.first_block[i] = num_blocks;
      num_blocks += (item.size + kShare - 1) / kShare;
    }
    FASTHYPER_CHECK(num_blocks <= INT32_MAX, "adam: too many elements");
    launch<scalar_t, take>(call, num_blocks, stream);
  }
}

std::vector<Tensor> ahead(bool whole, std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                          std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, const AdamSettings& settings,
                          const std::optional<Tensor>& rate = {}) {
  NoGrad no_grad;
  std::vector<Tensor> outs;
  if (params.empty()) return outs;
  check_like(params, params, "params");
  check_like(params, grads, "grads");
  check_like(params, exp_avgs, "exp_avgs");
  check_like(params, exp_avg_sqs, "exp_avg_sqs");
  check_steps(params, steps);
  const OnDevice device(params[0]);
  if (whole || settings.weight_decay != 0) make_contiguous(params);
  for (std::vector<Tensor>* list : {&grads, &exp_avgs, &exp_avg_sqs}) make_contiguous(*list);
  for (Tensor& step : steps)
    if (step.scalar_type() != ScalarType::Float) step = torch::stable::to(step, ScalarType::Double);
  for (const Tensor& param : params) outs.push_back(torch::stable::new_empty(param, param.sizes()));
  dispatch_floating(params[0], "adam", [&](auto zero) {
    run<decltype(zero), false>(settings, whole, 0, params, grads, {}, exp_avgs, exp_avg_sqs, steps, outs, nullptr, rate,
                               device.stream());
  });
  return outs;
}

std::vector<Tensor> adam_ahead_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                                    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, double lr, double beta1,
                                    double beta2, double eps, double weight_decay, bool decoupled,
                                    std::optional<Tensor> rate) {
  return ahead(true, params, grads, exp_avgs, exp_avg_sqs, steps, {lr, beta1, beta2, eps, weight_decay, decoupled}, rate);
}

Tensor adam_delta_fwd_cuda(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, double lr,
                           double beta1, double beta2, double eps, double weight_decay, bool decoupled) {
  return ahead(false, {param}, {grad}, {exp_avg}, {exp_avg_sq}, {step}, {lr, beta1, beta2, eps, weight_decay, decoupled})[0];
}

void adam_step_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> more_grads, double scale,
                    std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, double lr,
                    double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                    std::optional<Tensor> healthy, std::optional<Tensor> rate) {
  NoGrad no_grad;
  if (params.empty()) return;
  check_like(params, params, "params");
  check_like(params, grads, "grads");
  if (!more_grads.empty()) check_like(params, more_grads, "more_grads");
  check_like(params, exp_avgs, "exp_avgs");
  check_like(params, exp_avg_sqs, "exp_avg_sqs");
  check_steps(params, steps);
  for (const std::vector<Tensor>* list : {&params, &exp_avgs, &exp_avg_sqs}) check_in_place(*list);
  if (healthy)
    FASTHYPER_CHECK(
        healthy->scalar_type() == ScalarType::Bool && healthy->get_device_index() == params[0].get_device_index(),
        "adam: healthy must be bool and on the parameters' device");
  const OnDevice device(params[0]);
  make_contiguous(grads);
  make_contiguous(more_grads);
  dispatch_floating(params[0], "adam", [&](auto zero) {
    run<decltype(zero), true>({lr, beta1, beta2, eps, weight_decay, decoupled}, true, scale, params, grads, more_grads,
                              exp_avgs, exp_avg_sqs, steps, {}, healthy ? const_data<bool>(*healthy) : nullptr, rate,
                              device.stream());
  });
  for (const Tensor& step : steps)
    if (step.is_cpu()) dispatch_floating(step, "adam", [&](auto zero) { *data<decltype(zero)>(step) += 1; });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CUDA, m) {
  m.impl("_adam_delta_fwd", TORCH_BOX(&adam_delta_fwd_cuda));
  m.impl("_adam_ahead", TORCH_BOX(&adam_ahead_cuda));
  m.impl("_adam_step_", TORCH_BOX(&adam_step_cuda));
}

}  // namespace fasthyper
