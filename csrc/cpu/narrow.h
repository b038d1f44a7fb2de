// Products with narrow factors in vector registers: where packing for tile units, or for a matrix library, costs more than
// the product itself. The left factor is pairs of rows [first | second - minus], read once.
#pragma once

#include <cstdint>

namespace fasthyper::narrow {

constexpr int64_t kWidest = 144;  // of the pairs
constexpr int64_t kColumns = 80;  // of a right factor

struct Rows {
  const float *first, *second, *minus;  // minus may be null
  int64_t num_rows, first_cols, second_cols, stride;
};

// out = x right of rows x, num_cols wide, its rows ``stride`` apart; right as pack() leaves it
struct Product {
  const float* right;
  int64_t num_cols;
  float* out;
  int64_t stride;
};

// Whether there are registers for them: registers::kind()
bool available();

// Adds X'X to a sum in float64 of sum_size(width), its own way of ordering. is_known: of the first columns among each other
// nothing is added. Also the product, unless its right factor is null: rows are read once for both.
int64_t sum_size(int64_t width);
void gram(const Rows& x, bool is_known, double* sum, const Product& product);

// out [width, width]: of the sum what is not below the diagonal, and some of what is
void finish(const double* sum, int64_t first_cols, int64_t second_cols, bool is_known, double* out);

void multiply(const Rows& x, const Product& product);

// Of a right factor of pairs whose first columns meet the first ``split`` of its rows; ``to`` is aligned to a cache line
int64_t packed_size(int64_t num_rows, int64_t num_cols);
void pack(const float* from, int64_t row_stride, int64_t col_stride, int64_t num_rows, int64_t num_cols, int64_t split,
          float* to);

constexpr int64_t kFeatures = 64;  // most of a chunk's [h | 1]

// Rows [h | 1] of chunks, kFeatures apart, aligned to a cache line, behind them zeros
struct Chunks {
  const float* data;
  int64_t num_chunks, width;
};

// From gradients of the chunks' weights in some columns of the basis, rows grad_stride apart: sets these columns' gradient,
// [num_cols, width] as the basis is, and adds to that of [h | 1], [chunks, kFeatures]
void generate_back(const Chunks& ha, const float* basis, int64_t num_cols, const float* grad, int64_t grad_stride,
                   float* grad_basis, double* grad_ha);

}  // namespace fasthyper::narrow
