#include "tiles.h"

#include "registers.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,amx-tile,amx-bf16")
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the compiler's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "avx512.h"

namespace fasthyper::tiles {
namespace {

using simd::first;

constexpr int64_t kHalf = 16;  // vectors of a tile

bool machine_has_them() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool amx = (edx >> 22 & 1) && (edx >> 24 & 1), avx512 = (ebx >> 16 & 1) && (ebx >> 30 & 1) && (ebx >> 31 & 1);
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return amx && avx512 && __builtin_cpu_supports("avx512bw") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// x as bfloat16s in the upper halves of its elements: each the rounded rest of what the ones before left
template <int parts>
inline void split(__m512 x, __m512i* part) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
  for (int p = 0; p < parts; ++p) {
    const __m512i bits = _mm512_castps_si512(x);
    part[p] = p == 2 ? bits : _mm512_and_si512(_mm512_add_epi32(bits, half), upper);  // the third is exact
    if (p + 1 < parts) x = _mm512_sub_ps(x, _mm512_castsi512_ps(part[p]));
  }
}

inline __m512 load(const Source& s, __mmask16 mask, int64_t at) {
  const __m512 x = _mm512_maskz_loadu_ps(mask, s.from + at);
  return s.other ? _mm512_fmadd_ps(_mm512_set1_ps(s.sign), _mm512_maskz_loadu_ps(mask, s.other + at), x) : x;
}

// One tile of each part with a vector in a row: depth lies contiguous
template <int parts>
inline void along(const Source& s, int64_t v0, int64_t k, char* to) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i odd = _mm512_load_si512(kOdd);
  const __mmask16 mask0 = first(s.depth - k), mask1 = first(s.depth - k - 16);
  for (int64_t v = 0; v < kHalf; ++v) {
    __m512i a[parts], b[parts];
    const bool is_there = v0 + v < s.num_vectors;
    const int64_t at = (v0 + v) * s.vector_stride + k;
    split<parts>(load(s, is_there ? mask0 : 0, at), a);
    split<parts>(load(s, is_there ? mask1 : 0, at + 16), b);
    for (int p = 0; p < parts; ++p)
      _mm512_store_si512(to + p * 2 * kHalfBytes + v * 64, _mm512_permutex2var_epi16(a[p], odd, b[p]));
  }
}

// One tile of each part with two of the depth in a row, interleaved: vectors lie contiguous
template <int parts>
inline void across(const Source& s, int64_t v, int64_t k0, char* to) {
  const __mmask16 mask = first(s.num_vectors - v);
  const auto row = [&](int64_t k, __m512i* part) __attribute__((always_inline)) {
    __m512 x = load(s, k < s.depth ? mask : 0, v + k * s.depth_stride);
    if (s.scale && k < s.depth) x = _mm512_mul_ps(x, _mm512_set1_ps(s.scale[k]));
    split<parts>(x, part);
  };
  for (int64_t k = 0; k < kSide; k += 2) {
    __m512i a[parts], b[parts];
    row(k0 + k, a);
    row(k0 + k + 1, b);
    for (int p = 0; p < parts; ++p)
      _mm512_store_si512(to + p * 2 * kHalfBytes + k * 32, _mm512_or_si512(_mm512_srli_epi32(a[p], 16), b[p]));
  }
}

// 16 x 16 pairs, transposed; flips the signs where sign has its bits
inline void transpose(const char* from, __m512i sign, char* to) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(from + i * 64);
  simd::transpose(rows);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, _mm512_xor_si512(sign, rows[i]));
}

template <int parts>
void pack(const Source& s, bool left, char* to, int64_t panel_stride) {
  alignas(64) char turned[parts * 2 * kHalfBytes];
  const bool is_along = s.depth_stride == 1 && !s.scale;
  for (int64_t v = 0; v < count(s.num_vectors) * kSide; v += kHalf) {
    char* tile = to + v / kSide * panel_stride + (v % kSide ? kHalfBytes : 0);
    for (int64_t k = 0; k < s.depth; k += kSide, tile += parts * 2 * kHalfBytes) {
      char* const target = is_along == left ? tile : turned;
      if (is_along)
        along<parts>(s, v, k, target);
      else
        across<parts>(s, v, k, target);
      if (target == turned)
        for (int p = 0; p < parts; ++p)
          transpose(turned + p * 2 * kHalfBytes, _mm512_setzero_si512(), tile + p * 2 * kHalfBytes);
    }
  }
}

// The products of parts i of the left factor and j of the right one, for the 2 x 2 tiles of a block
template <int rows, int cols>
struct Block {
  const char *left, *right;

  void load_left(int part) const {
    _tile_loadd(4, left + part * 2 * kHalfBytes, 64);
    if constexpr (rows == 2) _tile_loadd(5, left + (part * 2 + 1) * kHalfBytes, 64);
  }
  void load_right(int part) const {
    _tile_loadd(6, right + part * 2 * kHalfBytes, 64);
    if constexpr (cols == 2) _tile_loadd(7, right + (part * 2 + 1) * kHalfBytes, 64);
  }
  void multiply() const {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (cols == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (rows == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (rows == 2 && cols == 2) _tile_dpbf16ps(3, 5, 7);
  }
};

// Of each depth the small products come first; each next one loads one factor only.
template <int parts, int rows, int cols>
void multiply_block(const char* left, const char* right, int64_t num_tiles, float* out) {
  constexpr int64_t kStep = parts * 2 * kHalfBytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < num_tiles; ++k) {
    const Block<rows, cols> block{left + k * kStep, right + k * kStep};
    if constexpr (parts == 3) {
      block.load_left(2), block.load_right(0), block.multiply();
      block.load_left(1), block.multiply();
      block.load_right(1), block.multiply();
      block.load_left(0), block.multiply();
      block.load_right(2), block.multiply();
    } else if constexpr (parts == 2) {
      block.load_left(1), block.load_right(0), block.multiply();
      block.load_left(0), block.load_right(1), block.multiply();
    } else {
      block.load_left(0);
    }
    block.load_right(0), block.multiply();
  }
  _tile_stored(0, out, kSide * 4);
  if (cols == 2) _tile_stored(1, out + 16, kSide * 4);
  if (rows == 2) _tile_stored(2, out + 16 * kSide, kSide * 4);
  if (rows == 2 && cols == 2) _tile_stored(3, out + 16 * kSide + 16, kSide * 4);
}

template <int parts>
void multiply_parts(const char* left, const char* right, int64_t num_tiles, bool two_rows, bool two_cols, float* out) {
  if (two_rows && two_cols) return multiply_block<parts, 2, 2>(left, right, num_tiles, out);
  if (two_rows) return multiply_block<parts, 2, 1>(left, right, num_tiles, out);
  if (two_cols) return multiply_block<parts, 1, 2>(left, right, num_tiles, out);
  multiply_block<parts, 1, 1>(left, right, num_tiles, out);
}

}  // namespace

bool available() {
  static const bool is_available = !registers::is_asked() && machine_has_them();
  return is_available;
}

void pack_left(const Source& source, int64_t parts, char* to, int64_t panel_stride) {
  (parts == 3 ? pack<3> : parts == 2 ? pack<2> : pack<1>)(source, true, to, panel_stride);
}

void pack_right(const Source& source, int64_t parts, char* to, int64_t panel_stride) {
  (parts == 3 ? pack<3> : parts == 2 ? pack<2> : pack<1>)(source, false, to, panel_stride);
}

void right_to_left(const char* panel, int64_t depth, int64_t parts, const bool* negative, char* to) {
  for (int64_t k = 0; k < count(depth); ++k) {
    alignas(64) uint32_t signs[16] = {};
    for (int64_t i = 0; i < std::min(kSide, depth - k * kSide); ++i)
      if (negative[k * kSide + i]) signs[i / 2] |= i % 2 ? 0x80000000u : 0x8000u;
    const __m512i sign = _mm512_load_si512(signs);
    for (int64_t i = 0; i < 2 * parts; ++i, panel += kHalfBytes, to += kHalfBytes) transpose(panel, sign, to);
  }
}

void make_ready() {
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t num_rows[16];
  };
  alignas(64) static const Config kEightWholeTiles = {
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  _tile_loadconfig(&kEightWholeTiles);
}

void release() { _tile_release(); }

void multiply(const char* left, const char* right, int64_t depth, int64_t parts, int64_t num_rows, int64_t num_cols,
              float* out) {
  const auto run = parts == 3 ? multiply_parts<3> : parts == 2 ? multiply_parts<2> : multiply_parts<1>;
  run(left, right, count(depth), num_rows > kHalf, num_cols > kHalf, out);
}

}  // namespace fasthyper::tiles

#else  // no such units: nothing below is reached

namespace fasthyper::tiles {

bool available() { return false; }
void pack_left(const Source&, int64_t, char*, int64_t) {}
void pack_right(const Source&, int64_t, char*, int64_t) {}
void right_to_left(const char*, int64_t, int64_t, const bool*, char*) {}
void make_ready() {}
void release() {}
void multiply(const char*, const char*, int64_t, int64_t, int64_t, int64_t, float*) {}

}  // namespace fasthyper::tiles
#endif
