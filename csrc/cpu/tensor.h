// What the CPU ops share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../stable.h"

// Vector code is chosen at run time: a build must also run where AVX-512 does not exist.
#define FASTHYPER_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))

namespace fasthyper {

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
  if (num_workers == 1) {  // threads are left for what it does
    for (int64_t t = 0; t < num_tiles; ++t) body(workers[0], t * tile, std::min(tile, length - t * tile));
    return workers;
  }
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    NoGrad no_grad;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t t = i * num_tiles / num_workers; t < (i + 1) * num_tiles / num_workers; ++t)
        body(workers[i], t * tile, std::min(tile, length - t * tile));
  });
  return workers;
}

}  // namespace fasthyper
