// Products of float32 matrices on tile units for bfloat16 (AMX), at float32 precision (DESIGN 5).
//
// A float32 is the sum of three bfloat16, x = x1 + x2 + x3, exactly; of the nine products the six that reach a float32's
// last bit are made, the small ones first, and summed in float32. With two parts three products, with one part one.
//
// A factor is packed as panels of 32 vectors: for each 32 of their depth, each part, each half of the vectors, one tile.
// Vectors are rows of a left factor and columns of a right one; what is missing of a panel or of the depth is zero.
#pragma once

#include <cstdint>

namespace fasthyper::tiles {

constexpr int64_t kSide = 32;            // vectors in a panel; also the depth of a tile
constexpr int64_t kHalfBytes = 16 * 64;  // one tile

inline int64_t count(int64_t size) { return (size + kSide - 1) / kSide; }
inline int64_t panel_bytes(int64_t depth, int64_t parts) { return count(depth) * parts * 2 * kHalfBytes; }

// Whether this machine, this system and ATEN_CPU_CAPABILITY, where it is set, allow them
bool available();

// Element k of vector v is from[v * vector_stride + k * depth_stride], plus ``sign`` times that of ``other`` unless that is
// null; one of the strides is 1. Where vectors lie contiguous it is multiplied by scale[k] unless that is null. Panels lie
// panel_stride bytes apart. Whole tiles are written, and nothing else.
struct Source {
  const float* from;
  int64_t vector_stride, depth_stride, num_vectors, depth;
  const float* other = nullptr;
  float sign = 1;
  const float* scale = nullptr;
};
void pack_left(const Source& source, int64_t parts, char* to, int64_t panel_stride);
void pack_right(const Source& source, int64_t parts, char* to, int64_t panel_stride);

// From a right factor's panel to that of its transpose as a left factor; elements of depth k change sign where negative[k]
void right_to_left(const char* panel, int64_t depth, int64_t parts, const bool* negative, char* to);

// Of the calling thread's tile units
void make_ready();
void release();

// out [32, 32] = a panel of a left factor by a panel of a right one; num_rows and num_cols are those that matter
void multiply(const char* left, const char* right, int64_t depth, int64_t parts, int64_t num_rows, int64_t num_cols,
              float* out);

}  // namespace fasthyper::tiles
