// Parts of a linear layer whose weight is made of few features, in vector registers: what takes such a weight tile by tile
// costs a matrix library more than the products themselves. A layer is as hyper_linear.cpp says.
#pragma once

#include "narrow.h"
#include "vectors.h"

namespace fasthyper::narrow_linear {

constexpr int64_t kRoom = 1 << 15;  // floats of a tile of the weight, or of its gradient, that stay in a near cache
constexpr int64_t kInputs = 24;     // whose gradient is made at a time: the rows of all blocks are shares of it

struct Layer {
  narrow::Chunks ha;      // [h | 1]
  const float* features;  // and its transpose, [width, pitch], behind it zeros
  int64_t pitch;
  const float* basis;
  int64_t num_slots, num_inputs, num_outputs, batch;
};

// Floats of room that forward, back and back_to_inputs need
int64_t room(const Layer& layer);

// Outputs of a slot of chunks [chunk, chunk + num_chunks), of which the first one's features begin a vector. x: panels of
// the batch, as deep as there are inputs.
void forward(const Layer& layer, int64_t slot, int64_t chunk, int64_t num_chunks, const float* x, float* room, float* y);

// Gradients of a slot's weights of inputs [input, input + num_inputs), which begin a panel: sets the basis's, adds to that
// of [h | 1]. grad: of outputs, slot by slot, rows grad_stride apart for each of the batch; x: panels of inputs, as deep as
// the batch.
void back(const Layer& layer, int64_t slot, int64_t input, int64_t num_inputs, const float* grad, int64_t grad_stride,
          const float* x, float* room, float* grad_basis, double* grad_ha);

// Sets the gradient of kInputs inputs, or fewer. grad: panels of the batch, as deep as there are outputs, slot by slot.
void back_to_inputs(const Layer& layer, int64_t input, int64_t num_inputs, const float* grad, float* room, float* grad_x);

// Inputs that back() should take at a time
int64_t tile_inputs(const Layer& layer);

}  // namespace fasthyper::narrow_linear
