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

static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec all(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float* from) { return _mm512_load_ps(from); }  // aligned to a vector
static inline Vec load_any(const float* from) { return _mm512_loadu_ps(from); }
static inline Vec load_some(Mask mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
static inline void store(float* to, Vec x) { _mm512_store_ps(to, x); }
static inline void store_any(float* to, Vec x) { _mm512_storeu_ps(to, x); }
static inline void store_first(float* to, int64_t n, Vec x) { _mm512_mask_storeu_ps(to, first(n), x); }
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }

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
