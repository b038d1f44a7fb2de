#include "registers.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the compiler's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "avx2.h"
#include "registers_table.h"

namespace fasthyper::registers {
const Table of_avx2 = simd::kTable;
}
#else
namespace fasthyper::registers {
const Table of_avx2 = {};
}
#endif
