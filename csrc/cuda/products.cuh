// Products of small matrices in shared memory: each thread makes blocks of 4 x 4 in registers, operands are read four
// neighbours at a time.
#pragma once

#include "portable.cuh"

namespace fasthyper::gpu {

constexpr int kSide = 4;

__host__ __device__ constexpr int tiles(int n) { return (n + kSide - 1) / kSide; }
__host__ __device__ constexpr int padded(int n) { return tiles(n) * kSide; }
// Rows so far apart that the same four columns of eight rows in a row lie in different banks
__host__ __device__ constexpr int spread(int n) { return padded(n) + (tiles(n) % 2 ? 0 : kSide); }
// Blocks of a symmetric matrix on and above its diagonal, row by row
__host__ __device__ constexpr int gram_tiles(int n) { return tiles(n) * (tiles(n) + 1) / 2; }

template <typename T>
using Block = T[kSide][kSide];

// sum += a' b over rows that lie ``a_stride`` and ``b_stride`` apart, from, to, step
template <typename T>
__device__ void multiply_tall(const T* a, int a_stride, const T* b, int b_stride, int from, int to, int step,
                              Block<T>& sum) {
#pragma unroll 2
  for (int k = from; k < to; k += step) {
    T u[kSide], v[kSide];
    load4(a + k * a_stride, u);
    load4(b + k * b_stride, v);
#pragma unroll
    for (int i = 0; i < kSide; ++i)
#pragma unroll
      for (int j = 0; j < kSide; ++j) sum[i][j] += u[i] * v[j];
  }
}

// The same, each row of a times its weight
template <typename T>
__device__ void multiply_tall(const T* weight, const T* a, int a_stride, const T* b, int b_stride, int length,
                              Block<T>& sum) {
#pragma unroll 4
  for (int k = 0; k < length; ++k) {
    T u[kSide], v[kSide];
    load4(a + k * a_stride, u);
    load4(b + k * b_stride, v);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const T wu = weight[k] * u[i];
#pragma unroll
      for (int j = 0; j < kSide; ++j) sum[i][j] += wu * v[j];
    }
  }
}

// sum += a b: rows of a lie ``a_step`` apart; what lies between ``depth`` and its padding is 0 in both
template <typename T>
__device__ void multiply(const T* a, int a_step, const T* b, int b_stride, int depth, Block<T>& sum) {
  for (int k = 0; k < depth; k += kSide) {
    T u[kSide][kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) load4(a + i * a_step + k, u[i]);
#pragma unroll
    for (int q = 0; q < kSide; ++q) {
      T v[kSide];
      load4(b + (k + q) * b_stride, v);
#pragma unroll
      for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int j = 0; j < kSide; ++j) sum[i][j] += u[i][q] * v[j];
    }
  }
}

// da += dx w' + x0 (w - w0)' and, if asked for, a0 += x0 w0': rows of the left factors lie ``x_step`` apart, those of the
// weights ``w_step``
template <bool makes_a0, typename T>
__device__ void multiply_drift(const T* dx, const T* x0, int x_step, const T* w, const T* w0, int w_step, int depth,
                               Block<T>& da, Block<T>& a0) {
  for (int k = 0; k < depth; k += kSide) {
    T d[kSide][kSide], x[kSide][kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      load4(dx + i * x_step + k, d[i]);
      load4(x0 + i * x_step + k, x[i]);
    }
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      T now[kSide], then[kSide];
      load4(w + j * w_step + k, now);
      load4(w0 + j * w_step + k, then);
#pragma unroll
      for (int q = 0; q < kSide; ++q) {
        const T step = now[q] - then[q];
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
          da[i][j] += d[i][q] * now[q] + x[i][q] * step;
          if (makes_a0) a0[i][j] += x[i][q] * then[q];
        }
      }
    }
  }
}

// to *= factor, four elements
template <typename T>
__device__ void multiply_into(const T (&factor)[kSide], T* to) {
  T v[kSide];
  load4(to, v);
#pragma unroll
  for (int i = 0; i < kSide; ++i) v[i] *= factor[i];
  store4(v, to);
}

// Row and column of a tile of a symmetric matrix of ``side`` x ``side`` tiles
struct TileIndex {
  int i, j;
};
__device__ inline TileIndex gram_tile(int tile, int side) {
  int i = 0;
  for (; tile >= side - i; ++i) tile -= side - i;
  return {i, i + tile};
}

// Element (i, j) of a symmetric matrix stored as tiles, of which the same elements lie side by side
template <typename T>
__device__ T gram_at(const T* gram, int side, int i, int j) {
  if (i / kSide > j / kSide) {
    const int swap = i;
    i = j, j = swap;
  }
  const int row = i / kSide, tile = row * (2 * side - row + 1) / 2 + j / kSide - row;
  return gram[(i % kSide * kSide + j % kSide) * (side * (side + 1) / 2) + tile];
}

}  // namespace fasthyper::gpu
