// The drift with an importance of each weight, or to given targets: all rectangles in direct form (DESIGN, Rectangles).
#include "direct.h"

namespace fasthyper {
namespace {

std::tuple<Tensor, Tensor, Tensor> target_drift_fwd_cpu(Tensor h, Tensor basis, std::vector<Tensor> snapshot,
                                                        std::vector<Tensor> targets, std::vector<Tensor> importance,
                                                        Tensor weight, Tensor plan) {
  NoGrad no_grad;
  for (Tensor* t : {&h, &basis, &weight, &plan}) *t = torch::stable::contiguous(*t);
  for (Tensor& t : snapshot) t = torch::stable::contiguous(t);
  const int64_t num_tasks = h.size(0), num_chunks = h.size(1), width = h.size(2), chunk_size = basis.size(0);
  Tensor value = torch::stable::new_zeros(h, {});
  Tensor grad_h = torch::stable::new_zeros(h, h.sizes());
  Tensor grad_basis = torch::stable::new_zeros(basis, basis.sizes());
  const std::vector<Rectangle> rectangles = read_plan(plan, num_tasks, num_chunks, chunk_size);
  int64_t num_weights = 0;
  for (const Rectangle& r : rectangles)
    if (r.task_lo < r.task_hi && r.chunk_lo < r.chunk_hi && r.num_cols() > 0)
      num_weights = std::max(num_weights, (r.chunk_hi - 1) * chunk_size + r.col_hi);
  if (num_tasks == 0) return {value, grad_h, grad_basis};
  FASTHYPER_CHECK(snapshot.size() == (targets.empty() ? 2 : 0), "target_drift: needs a snapshot [h0, basis0] or targets");
  dispatch_floating(h, "target_drift", [&](auto zero) {
    using scalar_t = decltype(zero);
    const bool has_snapshot = !snapshot.empty();
    const DirectDrift<scalar_t> direct(basis, has_snapshot ? snapshot[1] : Tensor(), weight, grad_basis,
                                       read_cells<scalar_t>("targets", targets, num_tasks, num_weights),
                                       read_cells<scalar_t>("importance", importance, num_tasks, num_weights));
    double total = 0;
    for (const Rectangle& r : rectangles)
      total += direct.rectangle(
          r,
          [&](int64_t task, int64_t chunk, scalar_t* x) {
            const int64_t start = (task * num_chunks + chunk) * width;
            x = std::copy_n(const_data<scalar_t>(h) + start, width, x);
            if (has_snapshot) x = std::copy_n(const_data<scalar_t>(snapshot[0]) + start, width, x);
            *x = 1;
          },
          [&](int64_t task, int64_t chunk, const scalar_t* grad) {
            add(width, grad, data<scalar_t>(grad_h) + (task * num_chunks + chunk) * width);
          });
    *data<scalar_t>(value) = static_cast<scalar_t>(total);
  });
  return {value, grad_h, grad_basis};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasthyper, CPU, m) { m.impl("_target_drift_fwd", TORCH_BOX(&target_drift_fwd_cpu)); }

}  // namespace fasthyper
