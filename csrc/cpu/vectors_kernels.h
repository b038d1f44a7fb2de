// vectors.h in registers of the kind that blocks.h was included for.
#pragma once

#include "vectors.h"

namespace fasthyper::simd {
namespace {
namespace vectors {

using tiles::kSide;
using tiles::Source;

inline Vec load(const Source& s, Mask mask, int64_t at) {
  const Vec x = load_some(mask, s.from + at);
  return s.other ? multiply_add(all(s.sign), load_some(mask, s.other + at), x) : x;
}

// Asks for memory of which the next panel will be made
inline void ask(const Source& s, int64_t at) {
  _mm_prefetch(reinterpret_cast<const char*>(s.from + at), _MM_HINT_T0);
  if (s.other) _mm_prefetch(reinterpret_cast<const char*>(s.other + at), _MM_HINT_T0);
}

// 32 vectors whose elements lie contiguously
void along(const Source& s, int64_t v, float* to) {
  for (int64_t part = 0; part < kSide; part += kLanes, v += kLanes)
    for (int64_t k = 0; k < s.depth; k += kLanes) {
      const Mask mask = first(s.depth - k), none = first(0);
      Vec rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        rows[i] = load(s, v + i < s.num_vectors ? mask : none, (v + i) * s.vector_stride + k);
        ask(s, (v + i + kSide) * s.vector_stride + k);
      }
      transpose(rows);
      for (int64_t i = 0; i < std::min(kLanes, s.depth - k); ++i) store(to + (k + i) * kSide + part, rows[i]);
    }
}

// 32 vectors that lie side by side
void across(const Source& s, int64_t v, float* to) {
  Mask mask[kSide / kLanes];
  for (int64_t z = 0; z < kSide / kLanes; ++z) mask[z] = first(s.num_vectors - v - kLanes * z);
  for (int64_t k = 0; k < s.depth; ++k, v += s.depth_stride, to += kSide) {
    const Vec scale = all(s.scale ? s.scale[k] : 1);
    for (int64_t z = 0; z < kSide / kLanes; ++z) store(to + kLanes * z, scale * load(s, mask[z], v + kLanes * z));
  }
}

void pack(const Source& source, char* to, int64_t panel_stride) {
  const auto run = source.depth_stride == 1 && !source.scale ? along : across;
  for (int64_t v = 0; v < source.num_vectors; v += kSide, to += panel_stride) run(source, v, reinterpret_cast<float*>(to));
}

void right_to_left(const char* panel, int64_t depth, const bool* negative, char* to) {
  const float* from = reinterpret_cast<const float*>(panel);
  float* out = reinterpret_cast<float*>(to);
  for (int64_t k = 0; k < depth; ++k) {
    const Vec sign = all(negative[k] ? -1.0f : 1.0f);
    for (int64_t z = 0; z < kSide; z += kLanes) store(out + k * kSide + z, sign * simd::load(from + k * kSide + z));
  }
}

void multiply(const char* left, const char* right, int64_t depth, int64_t num_rows, int64_t num_cols, float* out) {
  Nothing ahead;
  const auto* factors = reinterpret_cast<const float*>(left);
  const auto* others = reinterpret_cast<const float*>(right);
  for_blocks<true, Nothing>(num_rows, count(num_cols), [&](int64_t row, int64_t, int64_t z, int64_t vectors, auto block) {
    block(depth, factors + row, kSide, others + kLanes * z, kSide, kLanes * vectors, ahead, out + row * kSide + kLanes * z,
          kSide);
  });
}

}  // namespace vectors
}  // namespace
}  // namespace fasthyper::simd
