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

// out = x right of rows x, num_cols wide, its rows ``stride`` apart; right [width, kColumns], aligned to a cache line
struct Product {
  const float* right;
  int64_t num_cols;
  float* out;
  int64_t stride;
};

// Whether this machine, and ATEN_CPU_CAPABILITY where it is set, allow them
bool available();

// sum [width, width] += X'X in float64, of it what is not below the diagonal, and some of what is; adds: otherwise it is
// set. Of the first ``known`` columns among each other anything. Also the product, unless its right factor is null: rows are
// read once for both.
void gram(const Rows& x, int64_t known, bool adds, double* sum, const Product& product);

void multiply(const Rows& x, const Product& product);

// Rows [h | 1] of chunks, kWidest apart, aligned to a cache line, behind them zeros
struct Chunks {
  const float* data;
  int64_t num_chunks, width;
};

// From gradients of the chunks' weights in some columns of the basis, rows grad_stride apart: sets these columns' gradient,
// [num_cols, width] as the basis is, and adds to that of [h | 1], [chunks, kWidest]
void generate_back(const Chunks& ha, const float* basis, int64_t num_cols, const float* grad, int64_t grad_stride,
                   float* grad_basis, double* grad_ha);

}  // namespace fasthyper::narrow
