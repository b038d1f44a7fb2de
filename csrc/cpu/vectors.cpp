#include "vectors.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f")
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the compiler's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "avx512.h"

namespace fasthyper::vectors {
namespace {

using avx512::first;
using avx512::Nothing;
using tiles::kSide;
using tiles::Source;

inline __m512 load(const Source& s, __mmask16 mask, int64_t at) {
  const __m512 x = _mm512_maskz_loadu_ps(mask, s.from + at);
  return s.other ? _mm512_fmadd_ps(_mm512_set1_ps(s.sign), _mm512_maskz_loadu_ps(mask, s.other + at), x) : x;
}

// Asks for memory of which the next panel will be made
inline void ask(const Source& s, int64_t at) {
  _mm_prefetch(reinterpret_cast<const char*>(s.from + at), _MM_HINT_T0);
  if (s.other) _mm_prefetch(reinterpret_cast<const char*>(s.other + at), _MM_HINT_T0);
}

// 32 vectors whose elements lie contiguously
void along(const Source& s, int64_t v, float* to) {
  for (int64_t half = 0; half < kSide; half += 16, v += 16)
    for (int64_t k = 0; k < s.depth; k += 16) {
      const __mmask16 mask = first(s.depth - k);
      __m512i rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        rows[i] = _mm512_castps_si512(load(s, v + i < s.num_vectors ? mask : 0, (v + i) * s.vector_stride + k));
        ask(s, (v + i + kSide) * s.vector_stride + k);
      }
      avx512::transpose(rows);
      for (int64_t i = 0; i < std::min<int64_t>(16, s.depth - k); ++i)
        _mm512_store_si512(to + (k + i) * kSide + half, rows[i]);
    }
}

// 32 vectors that lie side by side
void across(const Source& s, int64_t v, float* to) {
  const __mmask16 mask0 = first(s.num_vectors - v), mask1 = first(s.num_vectors - v - 16);
  for (int64_t k = 0; k < s.depth; ++k, v += s.depth_stride, to += kSide) {
    const __m512 scale = _mm512_set1_ps(s.scale ? s.scale[k] : 1);
    _mm512_store_ps(to, _mm512_mul_ps(scale, load(s, mask0, v)));
    _mm512_store_ps(to + 16, _mm512_mul_ps(scale, load(s, mask1, v + 16)));
  }
}

}  // namespace

bool available() {
  static const bool is_available = [] {
    __builtin_cpu_init();
    const bool is_better = avx512::wish() == avx512::Wish::none && __builtin_cpu_is("amd");
    return __builtin_cpu_supports("avx512f") && (is_better || avx512::wish() == avx512::Wish::wanted);
  }();
  return is_available;
}

void pack(const Source& source, char* to, int64_t panel_stride) {
  const auto run = source.depth_stride == 1 && !source.scale ? along : across;
  for (int64_t v = 0; v < source.num_vectors; v += kSide, to += panel_stride) run(source, v, reinterpret_cast<float*>(to));
}

void right_to_left(const char* panel, int64_t depth, const bool* negative, char* to) {
  for (int64_t k = 0; k < depth; ++k) {
    const __m512i sign = _mm512_set1_epi32(negative[k] ? int(0x80000000) : 0);
    for (int64_t z = 0; z < 2; ++z, panel += 64, to += 64)
      _mm512_store_si512(to, _mm512_xor_si512(sign, _mm512_load_si512(panel)));
  }
}

void multiply(const char* left, const char* right, int64_t depth, int64_t num_rows, int64_t num_cols, float* out) {
  Nothing ahead;
  avx512::for_blocks<true, Nothing>(
      num_rows, num_cols > 16 ? 2 : 1, [&](int64_t row, int64_t, int64_t, int64_t vectors, auto block) {
        block(depth, reinterpret_cast<const float*>(left) + row, kSide, reinterpret_cast<const float*>(right), kSide,
              16 * vectors, ahead, out + row * kSide, kSide);
      });
}

}  // namespace fasthyper::vectors

#else

namespace fasthyper::vectors {

bool available() { return false; }
void pack(const tiles::Source&, char*, int64_t) {}
void right_to_left(const char*, int64_t, const bool*, char*) {}
void multiply(const char*, const char*, int64_t, int64_t, int64_t, float*) {}

}  // namespace fasthyper::vectors
#endif
