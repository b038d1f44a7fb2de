// Products in vector registers, written once (narrow_kernels.h, narrow_linear_kernels.h, vectors_kernels.h) and compiled for
// each kind of register: a table for each, one of which is chosen at run time. They are called by narrow.h, narrow_linear.h
// and vectors.h.
#pragma once

#include "narrow.h"
#include "narrow_linear.h"
#include "vectors.h"

namespace fasthyper::registers {

enum class Kind { none, avx2, avx512 };

struct Table {
  decltype(&narrow::sum_size) sum_size;
  decltype(&narrow::gram) gram;
  decltype(&narrow::finish) finish;
  decltype(&narrow::multiply) multiply;
  decltype(&narrow::packed_size) packed_size;
  decltype(&narrow::pack) pack;
  decltype(&narrow::generate_back) generate_back;
  decltype(&narrow_linear::room) room;
  decltype(&narrow_linear::tile_inputs) tile_inputs;
  decltype(&narrow_linear::forward) forward;
  decltype(&narrow_linear::back) back;
  decltype(&narrow_linear::back_to_inputs) back_to_inputs;
  decltype(&vectors::pack) pack_panels;
  decltype(&vectors::right_to_left) right_to_left;
  decltype(&vectors::multiply) multiply_panels;
};

extern const Table of_avx2, of_avx512;

bool has(Kind kind);  // whether this machine does

// Whether ATEN_CPU_CAPABILITY, torch's own variable, asks for a kind: then all products are made in those; or for none
bool is_asked();

// What serves: what is asked for, where the machine has it, or else the widest that it has
Kind kind();

}  // namespace fasthyper::registers
