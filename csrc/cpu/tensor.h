// What the CPU ops share: shorthands over the LibTorch stable ABI. No at:: symbol, so one build serves several versions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

// Vector code is chosen at run time: a build must also run where AVX-512 does not exist.
#define FASTHYPER_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))

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
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
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

template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void add(int64_t size, const scalar_t* __restrict__ from, scalar_t* __restrict__ to) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void accumulate(int64_t size, const scalar_t* __restrict__ from, double* __restrict__ to) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

inline double dot(int64_t size, const double* a, const double* b) {
  double sum[4] = {0, 0, 0, 0};  // a fixed order, whatever the vector width
  int64_t i = 0;
  for (; i + 4 <= size; i += 4)
    for (int64_t k = 0; k < 4; ++k) sum[k] += a[i + k] * b[i + k];
  for (; i < size; ++i) sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <typename scalar_t>
FASTHYPER_VECTOR_CLONES void scale(int64_t size, scalar_t factor, const scalar_t* __restrict__ from,
                                   scalar_t* __restrict__ to) {
  for (int64_t i = 0; i < size; ++i) to[i] = factor * from[i];
}

// Runs body(worker, start, length) over tiles of [0, length), each thread with a worker of its own; returns the workers.
// Tiles go to threads in contiguous runs, so that a run repeats bit for bit at a given number of threads.
template <typename Worker, typename Make, typename Body>
std::vector<Worker> for_tiles(int64_t length, int64_t tile, const Make& make, const Body& body) {
  const int64_t num_tiles = length > 0 ? (length + tile - 1) / tile : 0;
  const int64_t num_workers = std::min<int64_t>(num_tiles, torch::stable::get_num_threads());
  std::vector<Worker> workers;
  for (int64_t i = 0; i < num_workers; ++i) workers.push_back(make());
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    NoGrad no_grad;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t t = i * num_tiles / num_workers; t < (i + 1) * num_tiles / num_workers; ++t)
        body(workers[i], t * tile, std::min(tile, length - t * tile));
  });
  return workers;
}

// Calls f with a value of the tensor's type; float32 and float64 only, half types are promoted before they get here
template <typename F>
void dispatch_floating(const Tensor& t, const char* op, const F& f) {
  if (t.scalar_type() == ScalarType::Float) {
    f(float{});
  } else {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, op, ": only float32 and float64 on the CPU");
    f(double{});
  }
}

}  // namespace fasthyper
