// What kernels are written in, and how they are launched. tests/cuda_emulator.h has the same names for a CPU.
#pragma once

#include "../check.h"

#ifdef FASTHYPER_EMULATED
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstddef>
#include <cstdint>

#define FASTHYPER_LIBRARY fasthyper
#define FASTHYPER_KEY CUDA

namespace fasthyper::gpu {

template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// Four elements that lie on a border of 16 bytes
__device__ inline void load4(const float* from, float (&to)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ inline void load4(const double* from, double (&to)[4]) {
  const double2 v = reinterpret_cast<const double2*>(from)[0], w = reinterpret_cast<const double2*>(from)[1];
  to[0] = v.x, to[1] = v.y, to[2] = w.x, to[3] = w.y;
}
__device__ inline void store4(const float (&from)[4], float* to) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ inline void store4(const double (&from)[4], double* to) {
  reinterpret_cast<double2*>(to)[0] = make_double2(from[0], from[1]);
  reinterpret_cast<double2*>(to)[1] = make_double2(from[2], from[3]);
}

// The device that a call runs on, and its current stream
class Device {
 public:
  explicit Device(int32_t index) : index_(index) {}

  // While what it returns lives, the device is current
  torch::stable::accelerator::DeviceGuard make_current() const { return torch::stable::accelerator::DeviceGuard(index_); }

  int num_processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int shared_memory_of_block() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int shared_memory_of_processor() const { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }

  template <typename Params>
  void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, const Params& params) const {
    const void* entry = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > (48 << 10))
      check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    void *stream = nullptr, *all[] = {const_cast<Params*>(&params)};
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    check(cudaLaunchKernel(entry, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), all,
                           shared_bytes, static_cast<cudaStream_t>(stream)));
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_));
    return value;
  }
  static void check(cudaError_t error) { FASTHYPER_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

  int32_t index_;
};

}  // namespace fasthyper::gpu
#endif
