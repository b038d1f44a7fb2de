#include "registers.h"

#include <cstdlib>
#include <cstring>

namespace fasthyper {
namespace registers {
namespace {

const char* wish() {
  const char* text = std::getenv("ATEN_CPU_CAPABILITY");
  return text == nullptr ? "" : text;
}

#if defined(__x86_64__)
bool is_of_amd() { return __builtin_cpu_is("amd"); }
#else
bool is_of_amd() { return false; }
#endif

const Table& table() {
  static const Table& chosen = kind() == Kind::avx512 ? of_avx512 : of_avx2;
  return chosen;
}

}  // namespace

#if defined(__x86_64__)
bool has(Kind kind) {
  if (kind == Kind::avx512) return __builtin_cpu_supports("avx512f");
  return kind == Kind::none || (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
}
#else
bool has(Kind kind) { return kind == Kind::none; }
#endif

bool is_asked() { return *wish() != '\0'; }

Kind kind() {
  static const Kind chosen = [] {
    const bool is_wide = !is_asked() || std::strncmp(wish(), "avx512", 6) == 0;
    if (is_wide && has(Kind::avx512)) return Kind::avx512;
    return (is_wide || std::strcmp(wish(), "avx2") == 0) && has(Kind::avx2) ? Kind::avx2 : Kind::none;
  }();
  return chosen;
}

}  // namespace registers

using registers::is_of_amd;
using registers::table;

namespace narrow {

bool available() { return registers::kind() != registers::Kind::none; }
int64_t sum_size(int64_t width) { return table().sum_size(width); }
void gram(const Rows& x, bool is_known, double* sum, const Product& product) { table().gram(x, is_known, sum, product); }
void finish(const double* sum, int64_t first_cols, int64_t second_cols, bool is_known, double* out) {
  table().finish(sum, first_cols, second_cols, is_known, out);
}
void multiply(const Rows& x, const Product& product) { table().multiply(x, product); }
int64_t packed_size(int64_t num_rows, int64_t num_cols) { return table().packed_size(num_rows, num_cols); }
void pack(const float* from, int64_t row_stride, int64_t col_stride, int64_t num_rows, int64_t num_cols, int64_t split,
          float* to) {
  table().pack(from, row_stride, col_stride, num_rows, num_cols, split, to);
}
void generate_back(const Chunks& ha, const float* basis, int64_t num_cols, const float* grad, int64_t grad_stride,
                   float* grad_basis, double* grad_ha) {
  table().generate_back(ha, basis, num_cols, grad, grad_stride, grad_basis, grad_ha);
}

}  // namespace narrow

namespace narrow_linear {

int64_t room(const Layer& layer) { return table().room(layer); }
int64_t tile_inputs(const Layer& layer) { return table().tile_inputs(layer); }
void forward(const Layer& layer, int64_t slot, int64_t chunk, int64_t num_chunks, const float* x, float* room, float* y) {
  table().forward(layer, slot, chunk, num_chunks, x, room, y);
}
void back(const Layer& layer, int64_t slot, int64_t input, int64_t num_inputs, const float* grad, int64_t grad_stride,
          const float* x, float* room, float* grad_basis, double* grad_ha) {
  table().back(layer, slot, input, num_inputs, grad, grad_stride, x, room, grad_basis, grad_ha);
}
void back_to_inputs(const Layer& layer, int64_t input, int64_t num_inputs, const float* grad, float* room, float* grad_x) {
  table().back_to_inputs(layer, input, num_inputs, grad, room, grad_x);
}

}  // namespace narrow_linear

namespace vectors {

bool available() {
  static const bool is_available = [] {
    if (registers::is_asked()) return narrow::available();
    return registers::kind() == registers::Kind::avx512 && is_of_amd();
  }();
  return is_available;
}
void pack(const tiles::Source& source, char* to, int64_t panel_stride) { table().pack_panels(source, to, panel_stride); }
void right_to_left(const char* panel, int64_t depth, const bool* negative, char* to) {
  table().right_to_left(panel, depth, negative, to);
}
void multiply(const char* left, const char* right, int64_t depth, int64_t num_rows, int64_t num_cols, float* out) {
  table().multiply_panels(left, right, depth, num_rows, num_cols, out);
}

}  // namespace vectors
}  // namespace fasthyper
