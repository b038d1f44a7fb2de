// Vectors of 16 floats: what the files that make products in registers are written in, as in avx2.h. For files compiled for
// AVX-512, whose code is reached where the machine has it; each has its own copies, for they ask for more or less.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#pragma GCC push_options
#pragma GCC target("avx512f")

namespace fasthyper::simd {

using Vec = __m512;
using Mask = __mmask16;

constexpr int64_t kLanes = 16;
constexpr int64_t kVectors = 4;  // most of a block

// Rows of a block, whose sums are in registers
constexpr int most_rows(int64_t vectors) { return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6; }

// The first n lanes
static inline Mask first(int64_t n) { return Mask((1u << std::clamp<int64_t>(n, 0, kLanes)) - 1); }

// The lanes lo, lo + 1, ..., hi - 1
static inline Mask between(int64_t lo, int64_t hi) { return first(hi) & ~first(lo); }

static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec all(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float* from) { return _mm512_load_ps(from); }  // aligned to a vector
static inline Vec load_any(const float* from) { return _mm512_loadu_ps(from); }
static inline Vec load_some(Mask mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
static inline void store(float* to, Vec x) { _mm512_store_ps(to, x); }
static inline void store_any(float* to, Vec x) { _mm512_storeu_ps(to, x); }
static inline void store_first(float* to, int64_t n, Vec x) { _mm512_mask_storeu_ps(to, first(n), x); }
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// The sum of each
static inline __m128 sums(const Vec (&x)[4]) {
  const Vec low = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
  const Vec high = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
  const Vec four = _mm512_shuffle_ps(low, high, 0x44) + _mm512_shuffle_ps(low, high, 0xee);
  const __m128 a = _mm512_castps512_ps128(four), b = _mm512_extractf32x4_ps(four, 1);
  const __m128 c = _mm512_extractf32x4_ps(four, 2), d = _mm512_extractf32x4_ps(four, 3);
  return _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d));
}

// 16 x 16 numbers of 4 bytes
static inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2)
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

static inline void transpose(Vec (&r)[16]) {
  __m512i bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(r[i]);
  transpose(bits);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(bits[i]);
}

}  // namespace fasthyper::simd

#pragma GCC pop_options
