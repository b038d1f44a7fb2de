// The drift from given features: the row pass over tiles of dH and H* as they lie in memory (DESIGN E2).
#include "drift.h"
#include "registers.h"

namespace fasthyper {
namespace {

std::tuple<Tensor, Tensor, Tensor> output_drift_fwd_cpu(Tensor dh, Tensor basis, Tensor h0, Tensor basis0, Tensor weight,
                                                        Tensor plan, int64_t precision) {
  NoGrad no_grad;
  for (Tensor* t : {&dh, &basis, &h0, &basis0, &weight, &plan}) *t = torch::stable::contiguous(*t);
  const int64_t num_tasks = dh.size(0), num_chunks = dh.size(1), width = dh.size(2);
  Tensor value = torch::stable::new_zeros(dh, {});
  Tensor grad_h = torch::stable::new_zeros(dh, dh.sizes());
  Tensor grad_basis = num_tasks > 0 ? kept_empty(basis, {basis.size(0), basis.size(1)})  // all of it is set
                                    : torch::stable::new_zeros(basis, basis.sizes());
  const Tensor no_gram0 = torch::stable::new_empty(dh, {0, width + 1, width + 1});
  dispatch_floating(dh, "output_drift", [&](auto zero) {
    using scalar_t = decltype(zero);
    struct Worker {
      typename Drift<scalar_t>::Worker drift;
      Tensor x;  // [dH | H* | 1] of a tile
    };
    Drift<scalar_t> drift(basis, basis0, weight, no_gram0, plan, num_tasks, num_chunks, grad_basis,
                          packed_parts<scalar_t>(precision));
    if (num_tasks == 0) return;
    const int64_t full = 2 * width + 1;
    std::vector<Worker> workers = drift.template pass_rows<Worker>(
        [&](int64_t tile) { return Worker{{drift, tile}, torch::stable::new_empty(dh, {tile, full})}; },
        [&](Worker& worker, int64_t first, int64_t length) {
          scalar_t* x = data<scalar_t>(worker.x);
          for (int64_t row = first; row < first + length; ++row, x += full) {
            std::copy_n(const_data<scalar_t>(dh) + row * width, width, x);
            std::copy_n(const_data<scalar_t>(h0) + row * width, width, x + width);
            x[2 * width] = 1;
          }
        },
        [&](const Worker& worker, int64_t first, int64_t length) -> typename Drift<scalar_t>::Rows {
          return {drift.rows_of(data<scalar_t>(worker.x), length), nullptr, data<scalar_t>(grad_h) + first * width};
        },
        [](Worker&, int64_t, int64_t) {});
    *data<scalar_t>(value) = static_cast<scalar_t>(drift.finish(drift.parts_of(workers)));
  });
  return {value, grad_h, grad_basis};
}

int64_t packed_parts_cpu(Tensor) {
  const int64_t parts = panels::parts_for(3);
  return parts == panels::kWhole && registers::kind() == registers::Kind::avx2 ? panels::kWhole + 1 : parts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) {
  m.impl("_output_drift_fwd", TORCH_BOX(&output_drift_fwd_cpu));
  m.impl("_packed_parts", TORCH_BOX(&packed_parts_cpu));
}

}  // namespace fasthyper
