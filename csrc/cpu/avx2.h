// Vectors of 8 floats: what the files that make products in registers are written in, as in avx512.h. For files compiled for
// AVX2 and FMA, whose code is reached where the machine has them.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace fasthyper::simd {

using Vec = __m256;
using Mask = __m256i;

constexpr int64_t kLanes = 8;
constexpr int64_t kVectors = 3;  // most of a block

// Rows of a block, whose sums are in registers
constexpr int most_rows(int64_t vectors) { return vectors == 1 ? 12 : vectors == 2 ? 6 : 4; }

// The first n lanes
static inline Mask first(int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::clamp<int64_t>(n, 0, kLanes))), lanes);
}

// The lanes lo, lo + 1, ..., hi - 1
static inline Mask between(int64_t lo, int64_t hi) { return _mm256_andnot_si256(first(lo), first(hi)); }

static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec all(float x) { return _mm256_set1_ps(x); }
static inline Vec load(const float* from) { return _mm256_load_ps(from); }  // aligned to a vector
static inline Vec load_any(const float* from) { return _mm256_loadu_ps(from); }
static inline Vec load_some(Mask mask, const float* from) { return _mm256_maskload_ps(from, mask); }
static inline void store(float* to, Vec x) { _mm256_store_ps(to, x); }
static inline void store_any(float* to, Vec x) { _mm256_storeu_ps(to, x); }

// In parts, for a masked store takes AMD's processors longer than a product
static inline void store_first(float* to, int64_t n, Vec x) {
  if (n >= kLanes) return _mm256_storeu_ps(to, x);
  if (n <= 0) return;
  __m128 part = _mm256_castps256_ps128(x);
  if (n & 4) {
    _mm_storeu_ps(to, part);
    part = _mm256_extractf128_ps(x, 1), to += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), part);
    part = _mm_movehl_ps(part, part), to += 2;
  }
  if (n & 1) _mm_store_ss(to, part);
}

static inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

// The sum of each
static inline __m128 sums(const Vec (&x)[4]) {
  const Vec four = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}

// 8 x 8
static inline void transpose(Vec (&r)[8]) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

}  // namespace fasthyper::simd

#pragma GCC pop_options
