// The table of the kind of register that this file is included for
#pragma once

#include "blocks.h"
#include "narrow_kernels.h"
#include "narrow_linear_kernels.h"
#include "registers.h"
#include "vectors_kernels.h"

namespace fasthyper::simd {

constexpr registers::Table kTable = {
    narrow::sum_size,       narrow::gram,           narrow::finish,
    narrow::multiply,       narrow::packed_size,    narrow::pack,
    narrow::generate_back,  narrow_linear::room,    narrow_linear::tile_inputs,
    narrow_linear::forward, narrow_linear::back,    narrow_linear::back_to_inputs,
    vectors::pack,          vectors::right_to_left, vectors::multiply,
};

}  // namespace fasthyper::simd
