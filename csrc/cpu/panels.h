// Packed factors and their products: as parts of bfloat16 on tile units, or whole in vector registers.
#pragma once

#include <algorithm>

#include "tiles.h"
#include "vectors.h"

namespace fasthyper::panels {

using tiles::count;
using tiles::kSide;
using tiles::Source;

constexpr int64_t kWhole = 4;  // in the place of a number of parts, 1 to 3

// Parts that factors are packed in here, of those that are asked for; 0: they are not packed, aten multiplies
inline int64_t parts_for(int64_t precision) { return tiles::available() ? precision : vectors::available() ? kWhole : 0; }

// Of a depth, what there is room for, and the bytes of a panel of it
inline int64_t padded(int64_t depth, int64_t parts) { return parts == kWhole ? depth : count(depth) * kSide; }
inline int64_t bytes(int64_t depth, int64_t parts) {
  return parts == kWhole ? depth * kSide * int64_t(sizeof(float)) : tiles::panel_bytes(depth, parts);
}

inline void pack_left(const Source& source, int64_t parts, char* to, int64_t panel_stride) {
  if (parts == kWhole) return vectors::pack(source, to, panel_stride);
  tiles::pack_left(source, parts, to, panel_stride);
}

inline void pack_right(const Source& source, int64_t parts, char* to, int64_t panel_stride) {
  if (parts == kWhole) return vectors::pack(source, to, panel_stride);
  tiles::pack_right(source, parts, to, panel_stride);
}

// A right factor's panel as that of its transpose as a left factor, whose elements of depth k change sign where negative[k]:
// the panel itself, or what is made of it in ``room``
inline const char* as_left(const char* panel, int64_t depth, int64_t parts, const bool* negative, char* room) {
  if (parts != kWhole)
    tiles::right_to_left(panel, depth, parts, negative, room);
  else if (std::find(negative, negative + depth, true) == negative + depth)
    return panel;
  else
    vectors::right_to_left(panel, depth, negative, room);
  return room;
}

// What multiplies is ready while one of these lives
class Units {
 public:
  explicit Units(int64_t parts) : are_tiles_(parts != kWhole) {
    if (are_tiles_) tiles::make_ready();
  }
  ~Units() {
    if (are_tiles_) tiles::release();
  }
  Units(const Units&) = delete;

 private:
  const bool are_tiles_;
};

inline void multiply(const char* left, const char* right, int64_t depth, int64_t parts, int64_t num_rows, int64_t num_cols,
                     float* out) {
  if (parts == kWhole) return vectors::multiply(left, right, depth, num_rows, num_cols, out);
  tiles::multiply(left, right, depth, parts, num_rows, num_cols, out);
}

}  // namespace fasthyper::panels
