// What all ops share: shorthands over the LibTorch stable ABI. No at:: symbol, so one build serves several versions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>

#include "check.h"

namespace fasthyper {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// aten ops called from a kernel must not record a graph, also when the raw op is called with gradients enabled
class NoGrad {
 public:
  NoGrad() : was_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(was_); }

 private:
  bool was_;
};

// out = a b; any strides
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the returned reference is owned here
}

inline Tensor rows(const Tensor& t, int64_t start, int64_t length) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 0, start, length);
}

inline Tensor cols(const Tensor& t, int64_t start, int64_t length) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 1, start, length);
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// The first num_rows * num_cols elements of a flat tensor, as a matrix
inline Tensor matrix(const Tensor& flat, int64_t num_rows, int64_t num_cols) {
  return torch::stable::view(rows(flat, 0, num_rows * num_cols), {num_rows, num_cols});
}

template <typename scalar_t>
scalar_t* data(const Tensor& t) {
  return static_cast<scalar_t*>(t.mutable_data_ptr());
}

template <typename scalar_t>
const scalar_t* const_data(const Tensor& t) {
  return static_cast<const scalar_t*>(t.const_data_ptr());
}

// Calls f with a value of the tensor's type; float32 and float64 only, half types are promoted before they get here
template <typename F>
void dispatch_floating(const Tensor& t, const char* op, const F& f) {
  if (t.scalar_type() == ScalarType::Float) {
    f(float{});
  } else {
    FASTHYPER_CHECK(t.scalar_type() == ScalarType::Double, op, ": computes in float32 and float64 only");
    f(double{});
  }
}

}  // namespace fasthyper
