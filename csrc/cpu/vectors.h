// Products of float32 matrices in vector registers, for processors with AVX-512 on which the matrix library multiplies with
// AVX2.
//
// A factor is packed as panels of 32 vectors, as in tiles.h, but whole: the 32 elements of each depth, one depth after the
// other. A left and a right factor's panels are alike.
#pragma once

#include "tiles.h"

namespace fasthyper::vectors {

// Whether this processor is such a one, AMD's; or ATEN_CPU_CAPABILITY names registers that the processor has
bool available();

// As tiles::pack_left; of the last panel the vectors that are missing are zero, and no other depth is written
void pack(const tiles::Source& source, char* to, int64_t panel_stride);

void right_to_left(const char* panel, int64_t depth, const bool* negative, char* to);

// out [32, 32]; of it num_rows and the vectors of 16 columns that hold num_cols are made
void multiply(const char* left, const char* right, int64_t depth, int64_t num_rows, int64_t num_cols, float* out);

}  // namespace fasthyper::vectors
