// Products with narrow factors in AVX-512 registers: where packing for tile units, or for a matrix library, costs more than
// the product itself. The left factor is pairs of rows [first | second - minus], at most 64 wide, read once.
#pragma once

#include <cstdint>

namespace fasthyper::narrow {

constexpr int64_t kWidest = 64;   // of the pairs
constexpr int64_t kColumns = 32;  // of a right factor

struct Rows {
  const float *first, *second, *minus;  // minus may be null
  int64_t num_rows, first_cols, second_cols, stride;
};

// Whether this machine, and ATEN_CPU_CAPABILITY where it is set, allow them
bool available();

// sum [width, width] += X'X in float64, of it what is not below the diagonal, and some of what is; adds: otherwise it is set
void gram(const Rows& x, bool adds, double* sum);

// out = X right, right [width, kColumns] with num_cols that count, aligned to a cache line
void multiply(const Rows& x, const float* right, int64_t num_cols, float* out, int64_t out_stride);

}  // namespace fasthyper::narrow
