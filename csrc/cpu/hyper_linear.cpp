// A linear layer whose weight W is generated row by row and never stored, forward and backward (DESIGN E3).
//
// Row n r + j of W [O, I] is slot j of chunk n: W_j = Ha V_j' for all chunks at once, V_j = rows [j I, (j + 1) I) of the
// basis. Generated: tiles of W (whole slots, or some inputs of one slot where a slot is large) are made, used and dropped.
// Factorised: y = u Ha' with u_j = x V_j, and no weight at all.
#include <algorithm>

#include "narrow_linear.h"
#include "product.h"

namespace fasthyper {
namespace {

constexpr int64_t kTileElements = 1 << 18;  // of the weight, or of its gradient, that one thread holds
constexpr int64_t kSmallestPart = 32;       // rows of a product that are worth a call

// Inputs [input, input + num_inputs) of slots [slot, slot + num_slots); more than one slot has all inputs
struct Tile {
  int64_t slot, num_slots, input, num_inputs;
  int64_t size() const { return num_slots * num_inputs; }
};

// The generated order where few features make the weight: all products in vector registers
class NarrowLinear {
 public:
  static bool serves(const Tensor& ha) {
    const int64_t parts = packed_parts<float>(3);
    return ha.size(1) <= narrow::kFeatures && (parts == 0 || parts == panels::kWhole) && narrow::available();
  }

  NarrowLinear(const Tensor& x, const Tensor& ha, const Tensor& basis, int64_t num_slots, int64_t num_outputs)
      : x_(const_data<float>(x)), num_rows_(num_slots * ha.size(0)) {
    const int64_t num_chunks = ha.size(0), width = ha.size(1), pitch = (num_chunks + 15) / 16 * 16;
    float* rows = rows_.get<float>(num_chunks * narrow::kFeatures);
    float* features = features_.get<float>(width * pitch);
    std::fill_n(rows, num_chunks * narrow::kFeatures, 0.0f);
    std::fill_n(features, width * pitch, 0.0f);
    const float* from = const_data<float>(ha);
    for (int64_t n = 0; n < num_chunks; ++n)
      for (int64_t k = 0; k < width; ++k, ++from) rows[n * narrow::kFeatures + k] = features[k * pitch + n] = *from;
    layer_ = {
        {rows, num_chunks, width}, features, pitch, const_data<float>(basis), num_slots, x.size(1), num_outputs, x.size(0)};
  }

  void forward(float* y) const {
    constexpr int64_t kVectors = 3;  // of chunks at a time
    Memory x;
    pack({x_, layer_.num_inputs, 1, layer_.batch, layer_.num_inputs}, x);
    const int64_t vectors = layer_.pitch / 16, shares = (vectors + kVectors - 1) / kVectors;
    for_parts(layer_.num_slots * shares, 0, [&](Worker& worker, int64_t part) {
      const int64_t slot = part / shares, share = part % shares;
      const int64_t chunk = 16 * (vectors * share / shares), stop = 16 * (vectors * (share + 1) / shares);
      narrow_linear::forward(layer_, slot, chunk, std::min(stop, layer_.ha.num_chunks) - chunk, x.data<float>(),
                             worker.room.data<float>(), y);
    });
  }

  // grad_x may be null
  void backward(const float* grad, float* grad_x, float* grad_ha, float* grad_basis) const {
    const int64_t num_chunks = layer_.ha.num_chunks, num_inputs = layer_.num_inputs;
    const int64_t stride = (num_rows_ + 15) / 16 * 16 + 16;  // rows a power of two apart would meet in the same lines
    Memory by_slot, x;
    float* ordered = by_slot.get<float>(layer_.batch * stride);
    torch::stable::parallel_for(0, layer_.batch, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) order(grad + b * layer_.num_outputs, ordered + b * stride);
    });
    pack({x_, 1, num_inputs, num_inputs, layer_.batch}, x);
    const int64_t tile = narrow_linear::tile_inputs(layer_), shares = (num_inputs + tile - 1) / tile;
    const int64_t num_sums = num_chunks * narrow::kFeatures;
    const auto workers = for_parts(layer_.num_slots * shares, num_sums, [&](Worker& worker, int64_t part) {
      const int64_t slot = part / shares, input = part % shares * tile, length = std::min(tile, num_inputs - input);
      narrow_linear::back(layer_, slot, input, length, ordered, stride, x.data<float>(), worker.room.data<float>(),
                          grad_basis, worker.sum.data<double>());
    });
    for (const Worker& worker : workers)
      put_block<true>(num_chunks, layer_.ha.width, worker.sum.data<double>(), narrow::kFeatures, grad_ha, layer_.ha.width);
    if (grad_x == nullptr) return;
    Memory panels;
    pack({ordered, stride, 1, layer_.batch, num_rows_}, panels);
    constexpr int64_t kInputs = narrow_linear::kInputs;
    for_parts((num_inputs + kInputs - 1) / kInputs, 0, [&](Worker& worker, int64_t part) {
      const int64_t input = part * kInputs;
      narrow_linear::back_to_inputs(layer_, input, std::min(kInputs, num_inputs - input), panels.data<float>(),
                                    worker.room.data<float>(), grad_x);
    });
  }

 private:
  struct Worker {
    Memory room, sum;
  };

  template <typename Body>
  std::vector<Worker> for_parts(int64_t num_parts, int64_t num_sums, const Body& body) const {
    const auto make = [&] {
      Worker worker;
      worker.room.get<float>(narrow_linear::room(layer_));
      std::fill_n(worker.sum.get<double>(num_sums), num_sums, 0.0);
      return worker;
    };
    return for_tiles<Worker>(num_parts, 1, make, [&](Worker& worker, int64_t part, int64_t) { body(worker, part); });
  }

  static void pack(const tiles::Source& source, Memory& to) {
    const int64_t panel = tiles::kSide * source.depth, num_panels = tiles::count(source.num_vectors);
    float* data = to.get<float>(num_panels * panel);
    torch::stable::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
      tiles::Source some = source;
      some.from += begin * tiles::kSide * source.vector_stride;
      some.num_vectors = std::min(end * tiles::kSide, source.num_vectors) - begin * tiles::kSide;
      vectors::pack(some, reinterpret_cast<char*>(data + begin * panel), panel * int64_t(sizeof(float)));
    });
  }

  // From outputs in their order to all chunks of one slot after the other, 0 where there is no output
  void order(const float* from, float* to) const {
    const int64_t num_chunks = layer_.ha.num_chunks;
    for (int64_t n = 0, o = 0; n < num_chunks; ++n)
      for (int64_t j = 0; j < layer_.num_slots; ++j, ++o) to[j * num_chunks + n] = o < layer_.num_outputs ? from[o] : 0.0f;
  }

  const float* x_;
  const int64_t num_rows_;
  Memory rows_, features_;
  narrow_linear::Layer layer_;
};

template <typename scalar_t>
class HyperLinear {
 public:
  HyperLinear(const Tensor& x, const Tensor& h, const Tensor& basis, int64_t num_slots, int64_t num_outputs)
      : x_(x),
        basis_(basis),
        batch_(x.size(0)),
        num_inputs_(x.size(1)),
        num_chunks_(h.size(0)),
        k_(basis.size(1)),
        num_slots_(num_slots),
        num_outputs_(num_outputs),
        ha_(make({num_chunks_, k_})) {
    const scalar_t* from = const_data<scalar_t>(h);
    scalar_t* to = data<scalar_t>(ha_);
    for (int64_t n = 0; n < num_chunks_; ++n, from += k_ - 1, to += k_) {
      std::copy_n(from, k_ - 1, to);
      to[k_ - 1] = 1;
    }
  }

  Tensor make_u(bool factorised) const { return make({factorised ? batch_ : 0, num_slots_, k_}); }

  // y = u Ha', u_j = x V_j
  void factorised(const Tensor& y, const Tensor& u) const {
    for_parts(batch_, [&](int64_t slot, int64_t first, int64_t length) {
      multiply<scalar_t>(rows(of_u(u, slot), first, length), rows(x_, first, length),
                         rows(basis_, slot * num_inputs_, num_inputs_));
    });
    const Tensor product = make({batch_ * num_slots_, num_chunks_});
    multiply<scalar_t>(product, torch::stable::view(u, {batch_ * num_slots_, k_}), transposed(ha_));
    const scalar_t* from = const_data<scalar_t>(product);
    for_batch([&](int64_t b) { transpose(from + b * num_slots_ * num_chunks_, data<scalar_t>(y) + b * num_outputs_); });
  }

  // du = dy Ha, dHa = dy' u, dV_j = x' du_j, dx = sum_j du_j V_j'
  void factorised_backward(const Tensor& grad, const Tensor& u, const Tensor& grad_x, const Tensor& grad_ha,
                           const Tensor& grad_basis) const {
    const int64_t num_rows = batch_ * num_slots_;
    const Tensor by_slot = make({num_rows, num_chunks_}), du = make({batch_, num_slots_, k_});
    for_batch([&](int64_t b) {
      transpose_back(const_data<scalar_t>(grad) + b * num_outputs_, data<scalar_t>(by_slot) + b * num_slots_ * num_chunks_);
    });
    multiply<scalar_t>(torch::stable::view(du, {num_rows, k_}), by_slot, ha_);
    multiply<scalar_t>(grad_ha, transposed(by_slot), torch::stable::view(u, {num_rows, k_}));
    for_parts(num_inputs_, [&](int64_t slot, int64_t first, int64_t length) {
      multiply<scalar_t>(rows(grad_basis, slot * num_inputs_ + first, length), transposed(cols(x_, first, length)),
                         of_u(du, slot));
    });
    if (grad_x.size(0) == 0) return;
    const int64_t tile = (num_inputs_ + num_threads() - 1) / num_threads();
    for_tiles<Tensor>(
        num_inputs_, tile, [&] { return make({batch_ * tile}); },
        [&](const Tensor& part, int64_t first, int64_t length) {
          for (int64_t slot = 0; slot < num_slots_; ++slot) {
            const Tensor v = rows(basis_, slot * num_inputs_ + first, length);
            multiply<scalar_t>(slot == 0 ? cols(grad_x, first, length) : matrix(part, batch_, length), of_u(du, slot),
                               transposed(v));
            if (slot > 0) add_cols(matrix(part, batch_, length), first, grad_x);
          }
        });
  }

  // y_j = x W_j'
  void generated(const Tensor& y) const {
    if constexpr (std::is_same_v<scalar_t, float>)
      if (NarrowLinear::serves(ha_)) return NarrowLinear(x_, ha_, basis_, num_slots_, num_outputs_).forward(data<float>(y));
    struct Worker {
      Tensor w, y;
    };
    for_weight_tiles<Worker>(
        [&](int64_t size) { return Worker{make({num_chunks_ * size}), make({batch_ * num_chunks_ * max_slots()})}; },
        [&](Worker& worker, const Tile& tile) {
          const Tensor w = weight(worker.w, tile), part = matrix(worker.y, batch_, num_chunks_ * tile.num_slots);
          multiply<scalar_t>(part, cols(x_, tile.input, tile.num_inputs), transposed(w));
          scatter(tile, const_data<scalar_t>(part), data<scalar_t>(y));
        });
  }

  // dW_j = dy_j' x, dHa = sum_j dW_j V_j, dV_j = dW_j' Ha, dx = sum_j dy_j W_j
  void generated_backward(const Tensor& grad, const Tensor& grad_x, const Tensor& grad_ha, const Tensor& grad_basis) const {
    std::fill_n(data<scalar_t>(grad_ha), grad_ha.numel(), scalar_t(0));
    if constexpr (std::is_same_v<scalar_t, float>)
      if (NarrowLinear::serves(ha_))
        return NarrowLinear(x_, ha_, basis_, num_slots_, num_outputs_)
            .backward(const_data<float>(grad), grad_x.size(0) > 0 ? data<float>(grad_x) : nullptr, data<float>(grad_ha),
                      data<float>(grad_basis));
    struct Worker {
      Tensor w, grad, ha, grad_ha, x, grad_x;
    };
    const bool needs_x = grad_x.size(0) > 0;
    const std::vector<Worker> workers = for_weight_tiles<Worker>(
        [&](int64_t size) {
          return Worker{make({num_chunks_ * size}),
                        make({batch_ * num_chunks_ * max_slots()}),
                        make({num_chunks_, k_}),
                        torch::stable::new_zeros(ha_, {num_chunks_, k_}),
                        make({needs_x ? batch_ * num_inputs_ : 0}),
                        torch::stable::new_zeros(x_, {needs_x ? batch_ : 0, num_inputs_})};
        },
        [&](Worker& worker, const Tile& tile) {
          const Tensor dy = matrix(worker.grad, batch_, num_chunks_ * tile.num_slots);
          gather(tile, const_data<scalar_t>(grad), data<scalar_t>(dy));
          const int64_t first = tile.slot * num_inputs_ + tile.input;
          if (needs_x) {
            const Tensor part = matrix(worker.x, batch_, tile.num_inputs);
            multiply<scalar_t>(part, dy, weight(worker.w, tile));
            add_cols(part, tile.input, worker.grad_x);
          }
          multiply<scalar_t>(matrix(worker.w, num_chunks_ * tile.num_slots, tile.num_inputs), transposed(dy),
                             cols(x_, tile.input, tile.num_inputs));
          const Tensor dw = matrix(worker.w, num_chunks_, tile.size());
          multiply<scalar_t>(worker.ha, dw, rows(basis_, first, tile.size()));
          add(worker.ha.numel(), const_data<scalar_t>(worker.ha), data<scalar_t>(worker.grad_ha));
          multiply<scalar_t>(rows(grad_basis, first, tile.size()), transposed(dw), ha_);
        });
    std::fill_n(data<scalar_t>(grad_x), grad_x.numel(), scalar_t(0));
    for (const Worker& worker : workers) {
      add(grad_ha.numel(), const_data<scalar_t>(worker.grad_ha), data<scalar_t>(grad_ha));
      add(grad_x.numel(), const_data<scalar_t>(worker.grad_x), data<scalar_t>(grad_x));
    }
  }

  Tensor make(std::initializer_list<int64_t> size) const { return kept_empty(basis_, size); }

 private:
  static int64_t num_threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

  // [B, K] of u or du [B, r, K]
  Tensor of_u(const Tensor& u, int64_t slot) const {
    return cols(torch::stable::view(u, {batch_, num_slots_ * k_}), slot * k_, k_);
  }

  // The tile of W, row (n, slot) after row, in ``storage``
  Tensor weight(const Tensor& storage, const Tile& tile) const {
    const int64_t first = tile.slot * num_inputs_ + tile.input;
    multiply<scalar_t>(matrix(storage, num_chunks_, tile.size()), ha_, transposed(rows(basis_, first, tile.size())));
    return matrix(storage, num_chunks_ * tile.num_slots, tile.num_inputs);
  }

  // Slots of a tile, if whole slots fit; else 0
  int64_t whole_slots() const {
    return std::min(num_slots_, kTileElements / std::max<int64_t>(1, num_chunks_ * num_inputs_));
  }
  int64_t max_slots() const { return std::max<int64_t>(1, whole_slots()); }

  // Tiles of whole slots go to threads. Parts of slots are large: one after the other, each product by all threads.
  template <typename Worker, typename Make, typename Body>
  std::vector<Worker> for_weight_tiles(const Make& make_worker, const Body& body) const {
    const int64_t num_whole = whole_slots();
    if (num_whole > 0)
      return for_tiles<Worker>(
          num_slots_, num_whole, [&] { return make_worker(num_whole * num_inputs_); },
          [&](Worker& worker, int64_t slot, int64_t count) { body(worker, {slot, count, 0, num_inputs_}); });
    const int64_t width = std::clamp<int64_t>(kTileElements / num_chunks_, 1, num_inputs_);
    std::vector<Worker> workers{make_worker(width)};
    for (int64_t slot = 0; slot < num_slots_; ++slot)
      for (int64_t input = 0; input < num_inputs_; input += width)
        body(workers[0], {slot, 1, input, std::min(width, num_inputs_ - input)});
    return workers;
  }

  // Slots, one by one; where they are few, each in parts of ``length``, so that threads have equal shares
  template <typename Body>
  void for_parts(int64_t length, const Body& body) const {
    const int64_t most = std::clamp<int64_t>(length / kSmallestPart, 1, num_threads());
    const int64_t num_parts = num_slots_ < 4 * num_threads() ? most : 1;
    torch::stable::parallel_for(0, num_slots_ * num_parts, 1, [&](int64_t begin, int64_t end) {
      NoGrad no_grad;
      for (int64_t i = begin; i < end;) {
        const int64_t slot = i / num_parts, part = i % num_parts, stop = std::min(num_parts, part + end - i);
        body(slot, length * part / num_parts, length * stop / num_parts - length * part / num_parts);
        i += stop - part;
      }
    });
  }

  template <typename Body>
  void for_batch(const Body& body) const {
    torch::stable::parallel_for(0, batch_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) body(b);
    });
  }

  // y row [N, r], cut short, from [r, N]; and back, 0 where there is no output
  void transpose(const scalar_t* from, scalar_t* to) const {
    for (int64_t o = 0, n = 0; o < num_outputs_; ++n)
      for (int64_t j = 0; j < num_slots_ && o < num_outputs_; ++j, ++o) to[o] = from[j * num_chunks_ + n];
  }
  void transpose_back(const scalar_t* from, scalar_t* to) const {
    for (int64_t n = 0, o = 0; n < num_chunks_; ++n)
      for (int64_t j = 0; j < num_slots_; ++j, ++o) to[j * num_chunks_ + n] = o < num_outputs_ ? from[o] : scalar_t(0);
  }

  // Outputs of a tile, [B, N, num_slots], to and from their place in [B, O]
  void scatter(const Tile& tile, const scalar_t* part, scalar_t* y) const {
    for (int64_t b = 0; b < batch_; ++b, y += num_outputs_)
      for (int64_t n = 0; n < num_chunks_; ++n, part += tile.num_slots) {
        const int64_t first = n * num_slots_ + tile.slot, count = std::min(tile.num_slots, num_outputs_ - first);
        for (int64_t j = 0; j < count; ++j) y[first + j] = part[j] + (tile.input > 0 ? y[first + j] : scalar_t(0));
      }
  }
  void gather(const Tile& tile, const scalar_t* grad, scalar_t* part) const {
    for (int64_t b = 0; b < batch_; ++b, grad += num_outputs_)
      for (int64_t n = 0; n < num_chunks_; ++n, part += tile.num_slots) {
        const int64_t first = n * num_slots_ + tile.slot;
        for (int64_t j = 0; j < tile.num_slots; ++j) part[j] = first + j < num_outputs_ ? grad[first + j] : scalar_t(0);
      }
  }

  void add_cols(const Tensor& part, int64_t first, const Tensor& to) const {
    const int64_t width = part.size(1);
    for (int64_t b = 0; b < batch_; ++b)
      add(width, const_data<scalar_t>(part) + b * width, data<scalar_t>(to) + b * num_inputs_ + first);
  }

  const Tensor x_, basis_;
  const int64_t batch_, num_inputs_, num_chunks_, k_, num_slots_, num_outputs_;
  const Tensor ha_;  // [h | 1]
};

std::tuple<Tensor, Tensor> hyper_linear_fwd_cpu(Tensor x, Tensor h, Tensor basis, int64_t num_slots, int64_t num_outputs,
                                                bool factorised) {
  NoGrad no_grad;
  for (Tensor* t : {&x, &h, &basis}) *t = torch::stable::contiguous(*t);
  Tensor y = torch::stable::new_empty(x, {x.size(0), num_outputs}), u;
  dispatch_floating(x, "hyper_linear", [&](auto zero) {
    const HyperLinear<decltype(zero)> layer(x, h, basis, num_slots, num_outputs);
    u = layer.make_u(factorised);
    if (factorised)
      layer.factorised(y, u);
    else
      layer.generated(y);
  });
  return {y, u};
}

std::tuple<Tensor, Tensor, Tensor> hyper_linear_bwd_cpu(Tensor grad, Tensor x, Tensor h, Tensor basis, Tensor u,
                                                        int64_t num_slots, bool factorised, bool needs_x) {
  NoGrad no_grad;
  for (Tensor* t : {&grad, &x, &h, &basis, &u}) *t = torch::stable::contiguous(*t);
  Tensor grad_x = torch::stable::new_empty(x, {needs_x ? x.size(0) : 0, x.size(1)});
  Tensor grad_basis = kept_empty(basis, {basis.size(0), basis.size(1)}), grad_h;
  dispatch_floating(x, "hyper_linear", [&](auto zero) {
    const HyperLinear<decltype(zero)> layer(x, h, basis, num_slots, grad.size(1));
    const int64_t used = num_slots * x.size(1) * basis.size(1);
    std::fill_n(data<decltype(zero)>(grad_basis) + used, grad_basis.numel() - used, decltype(zero)(0));
    const Tensor grad_ha = layer.make({h.size(0), basis.size(1)});
    if (factorised)
      layer.factorised_backward(grad, u, grad_x, grad_ha, grad_basis);
    else
      layer.generated_backward(grad, grad_x, grad_ha, grad_basis);
    grad_h = torch::stable::contiguous(cols(grad_ha, 0, h.size(1)));
  });
  return {grad_x, grad_h, grad_basis};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) {
  m.impl("_hyper_linear_fwd", TORCH_BOX(&hyper_linear_fwd_cpu));
  m.impl("_hyper_linear_bwd", TORCH_BOX(&hyper_linear_bwd_cpu));
}

}  // namespace fasthyper
