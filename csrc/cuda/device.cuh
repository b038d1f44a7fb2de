// What the CUDA ops share. Kernels go to torch's current stream of their tensors' device, and nothing waits for them: a
// CUDA graph can capture them.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../stable.h"

namespace fasthyper {

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of a tensor current while it lives, and knows the stream for kernels there
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()), stream_(current_stream(t)) {}
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_cuda(cudaError_t error, const char* what) {
  FASTHYPER_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// To be called after each launch; an error of an earlier kernel may show here too
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// As many numbers as one load or store moves
template <typename scalar_t, int width>
struct alignas(sizeof(scalar_t) * width) Vector {
  scalar_t at[width];
};

template <typename scalar_t>
constexpr int kWidth = 16 / sizeof(scalar_t);

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace fasthyper
