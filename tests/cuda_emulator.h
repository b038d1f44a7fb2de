// Runs CUDA kernels on a CPU, for tests: the names of csrc/cuda/portable.cuh. The threads of a block are coroutines that
// take turns at each barrier; the order of turns can be reversed, which a missing barrier may not survive. Shared memory
// begins as NaN, and wide accesses must be aligned.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

// ops of the same names beside those of a GPU
#define FASTHYPER_LIBRARY fasthyper_emulated
#define FASTHYPER_KEY CPU

namespace fasthyper::gpu {

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulator {

inline int num_processors = 3, shared_memory = 232448;
inline bool is_reversed = false;
constexpr size_t kStack = 64 << 10;

struct Coroutine {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool is_done = false;
};
inline std::vector<Coroutine> coroutines;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<uint64_t> memory;  // of a block

inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulator: %s in block %u, thread %u\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void run_one() {
  body();
  coroutines[threadIdx.x].is_done = true;
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Coroutine& c = coroutines[i];
    getcontext(&c.context);
    c.context.uc_stack.ss_sp = c.stack.data();
    c.context.uc_stack.ss_size = kStack;
    c.context.uc_link = &scheduler;
    c.is_done = false;
    makecontext(&c.context, run_one, 0);
  }
  for (unsigned num_done = 0; num_done == 0;) {
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = is_reversed ? threads - 1 - i : i;
      Coroutine& c = coroutines[threadIdx.x];
      swapcontext(&scheduler, &c.context);
      num_done += c.is_done;
    }
    if (num_done != 0 && num_done != threads) fail("a barrier that some threads do not reach");
  }
}

}  // namespace emulator

inline void __syncthreads() { swapcontext(&emulator::coroutines[threadIdx.x].context, &emulator::scheduler); }

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::memory.data());
}

template <typename T>
void load4(const T* from, T (&to)[4]) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("a misaligned load");
  for (int i = 0; i < 4; ++i) to[i] = from[i];
}
template <typename T>
void store4(const T (&from)[4], T* to) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulator::fail("a misaligned store");
  for (int i = 0; i < 4; ++i) to[i] = from[i];
}

class Device {
 public:
  explicit Device(int32_t) {}
  int make_current() const { return 0; }
  int num_processors() const { return emulator::num_processors; }
  int shared_memory_of_block() const { return emulator::shared_memory; }
  int shared_memory_of_processor() const { return emulator::shared_memory + 1024; }

  template <typename Params>
  void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, const Params& params) const {
    if (threads > 1024 || blocks < 1 || shared_bytes > static_cast<size_t>(emulator::shared_memory))
      emulator::fail("a launch beyond the limits");
    blockDim.x = static_cast<unsigned>(threads);
    if (emulator::coroutines.size() < blockDim.x) emulator::coroutines.resize(blockDim.x);
    emulator::body = [&] { kernel(params); };
    for (int64_t block = 0; block < blocks; ++block) {
      blockIdx.x = static_cast<unsigned>(block);
      emulator::memory = std::vector<uint64_t>((shared_bytes + 7) / 8, ~uint64_t(0));
      emulator::run_block(blockDim.x);
    }
  }
};

}  // namespace fasthyper::gpu

extern "C" inline __attribute__((visibility("default"), used)) void emulate(int num_processors, int shared_memory,
                                                                            bool is_reversed) {
  fasthyper::gpu::emulator::num_processors = num_processors;
  fasthyper::gpu::emulator::shared_memory = shared_memory;
  fasthyper::gpu::emulator::is_reversed = is_reversed;
}
