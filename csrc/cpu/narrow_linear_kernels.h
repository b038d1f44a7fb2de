// narrow_linear.h in registers of the kind that blocks.h was included for.
#pragma once

#include "narrow_kernels.h"
#include "narrow_linear.h"

namespace fasthyper::simd {
namespace {
namespace narrow_linear {

using fasthyper::narrow_linear::kInputs;
using fasthyper::narrow_linear::kRoom;
using fasthyper::narrow_linear::Layer;
using tiles::kSide;

// Asks for the same inputs of the next slot, which lie far away
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  void ask() {
    if (at >= end) return;
    _mm_prefetch(at, _MM_HINT_T0);
    _mm_prefetch(at + 64, _MM_HINT_T0);
    at += 128;
  }
};

constexpr int64_t kDepth = 128;  // outputs, of all slots together, that meet all the batch before the next ones

// Slots whose weights are made together for the gradient of inputs, and the floats from one input to the next
int64_t slots_at_once(const Layer& l) {
  return std::clamp<int64_t>(kDepth / std::max<int64_t>(1, l.ha.num_chunks), 1, l.num_slots);
}
int64_t input_stride(const Layer& l) { return padded(slots_at_once(l) * l.ha.num_chunks) + 16; }

// to(i, chunk) = weights of a slot's inputs [input, input + num_inputs) of chunks from ``chunk`` on, input by input
void make_weights(const Layer& l, int64_t slot, int64_t input, int64_t num_inputs, int64_t chunk, int64_t num_chunks,
                  float* to, int64_t stride) {
  const float* basis = l.basis + (slot * l.num_inputs + input) * l.ha.width;
  Ahead ahead;
  if (slot + 1 < l.num_slots) {
    ahead.at = reinterpret_cast<const char*>(basis + l.num_inputs * l.ha.width);
    ahead.end = ahead.at + num_inputs * l.ha.width * int64_t(sizeof(float));
  }
  for_blocks<false, Ahead>(num_inputs, count(num_chunks), [&](int64_t i, int64_t, int64_t z, int64_t, auto block) {
    block(l.ha.width, basis + i * l.ha.width, l.ha.width, l.features + chunk + kLanes * z, l.pitch, num_chunks - kLanes * z,
          ahead, to + i * stride + kLanes * z, stride);
  });
}

int64_t tile_inputs(const Layer& l) {
  const int64_t most = kRoom / std::max<int64_t>(1, l.ha.num_chunks) / kSide - 1;
  return std::max<int64_t>(1, most) * kSide;
}

int64_t room(const Layer& l) {
  const int64_t of_inputs = kInputs * (input_stride(l) + tiles::count(l.batch) * kSide);
  return std::max(
      {kRoom, of_inputs, l.ha.num_chunks * (std::min(narrow_linear::tile_inputs(l), l.num_inputs) + kSide + 16)});
}

void forward(const Layer& l, int64_t slot, int64_t chunk, int64_t num_chunks, const float* x, float* room, float* y) {
  Nothing ahead;
  const int64_t stride = padded(num_chunks), most = std::max<int64_t>(1, kRoom / stride);
  for (int64_t input = 0; input < l.num_inputs; input += most) {
    const int64_t num_inputs = std::min(most, l.num_inputs - input);
    make_weights(l, slot, input, num_inputs, chunk, num_chunks, room, stride);
    for (int64_t b = 0; b < l.batch; b += kSide) {
      const float* panel = x + (b * l.num_inputs + input * kSide);
      for_blocks<true, Nothing>(
          num_chunks, count(std::min(kSide, l.batch - b)),
          [&](int64_t n, int64_t rows, int64_t z, int64_t vectors, auto block) {
            alignas(64) float made[kBlock];
            const int64_t length = kLanes * vectors, first = b + kLanes * z, stop = std::min(length, l.batch - first);
            block(num_inputs, room + n, stride, panel + kLanes * z, kSide, length, ahead, made, length);
            for (int64_t i = 0; i < rows; ++i) {
              const int64_t output = (chunk + n + i) * l.num_slots + slot;
              if (output >= l.num_outputs) break;
              float* to = y + first * l.num_outputs + output;
              for (int64_t c = 0; c < stop; ++c, to += l.num_outputs) *to = (input > 0 ? *to : 0) + made[i * length + c];
            }
          });
    }
  }
}

void back(const Layer& l, int64_t slot, int64_t input, int64_t num_inputs, const float* grad, int64_t grad_stride,
          const float* x, float* room, float* grad_basis, double* grad_ha) {
  Nothing ahead;
  const int64_t num_chunks = l.ha.num_chunks, stride = padded(num_inputs) + 16;
  for (int64_t i = 0; i < num_inputs; i += kSide) {
    const float* panel = x + (input + i) * l.batch;
    for_blocks<true, Nothing>(num_chunks, count(std::min(kSide, num_inputs - i)),
                              [&](int64_t n, int64_t, int64_t z, int64_t vectors, auto block) {
                                block(l.batch, grad + slot * num_chunks + n, grad_stride, panel + kLanes * z, kSide,
                                      kLanes * vectors, ahead, room + n * stride + i + kLanes * z, stride);
                              });
  }
  const int64_t at = (slot * l.num_inputs + input) * l.ha.width;
  narrow::generate_back(l.ha, l.basis + at, num_inputs, room, stride, grad_basis + at, grad_ha);
}

void back_to_inputs(const Layer& l, int64_t input, int64_t num_inputs, const float* grad, float* room, float* grad_x) {
  Nothing ahead;
  const int64_t num_chunks = l.ha.num_chunks, num_rows = l.num_slots * num_chunks, stride = input_stride(l);
  const int64_t most = slots_at_once(l), sum_stride = tiles::count(l.batch) * kSide;
  float* sum = room + kInputs * stride;
  std::fill_n(sum, kInputs * sum_stride, 0.0f);
  for (int64_t slot = 0; slot < l.num_slots; slot += most) {
    const int64_t num_slots = std::min(most, l.num_slots - slot);
    for (int64_t j = 0; j < num_slots; ++j)
      make_weights(l, slot + j, input, num_inputs, 0, num_chunks, room + j * num_chunks, stride);
    for (int64_t b = 0; b < l.batch; b += kSide) {
      const float* panel = grad + (b * num_rows + slot * num_chunks * kSide);
      for_blocks<false, Nothing>(num_inputs, count(std::min(kSide, l.batch - b)),
                                 [&](int64_t i, int64_t rows, int64_t z, int64_t vectors, auto block) {
                                   alignas(64) float made[kBlock];
                                   const int64_t length = kLanes * vectors;
                                   block(num_slots * num_chunks, room + i * stride, stride, panel + kLanes * z, kSide,
                                         length, ahead, made, length);
                                   for (int64_t r = 0; r < rows; ++r) {
                                     float* to = sum + (i + r) * sum_stride + b + kLanes * z;
                                     for (int64_t c = 0; c < length; ++c) to[c] += made[r * length + c];
                                   }
                                 });
    }
  }
  for (int64_t b = 0; b < l.batch; ++b)
    for (int64_t i = 0; i < num_inputs; ++i) grad_x[b * l.num_inputs + input + i] = sum[i * sum_stride + b];
}

}  // namespace narrow_linear
}  // namespace
}  // namespace fasthyper::simd
