"""output_drift against the oracle: values, gradients, contracts of the op, bad input."""

import cases
import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from conftest import TOL

from fasthyper import ops
from fasthyper.layout import Layout
from fasthyper.planner import drift_plan

FORMS = ["auto", "gram", "direct"]
all_cases = pytest.mark.parametrize("case", cases.DRIFT_CASES, ids=lambda case: case.name)
all_forms = pytest.mark.parametrize("form", FORMS)


def plan_of(case, form="auto"):
    return drift_plan(case.layout, range(case.tasks), case.width, form)


def oracle_value_and_grads(case, tensors, weight=None):
    dh, basis, h0, basis0 = (t.double() for t in tensors)
    h, basis = (h0 + dh).requires_grad_(), basis.requires_grad_()
    value = oracle.drift(h, basis, h0, basis0, case.weights, heads=case.layout.heads, weight=weight)
    grads = torch.autograd.grad(value, [h, basis], allow_unused=True, materialize_grads=True)
    return [value.detach(), *grads]


@all_cases
@all_forms
def test_output_drift_forward_backward(implementation, case, form, dtype):
    tensors = case.tensors(dtype)
    weight = torch.linspace(0.5, 2, case.tasks, dtype=dtype)
    found = implementation.output_drift_fwd(*tensors, weight, plan_of(case, form))
    for have, want in zip(found, oracle_value_and_grads(case, tensors, weight.double()), strict=True):
        assert have.dtype == dtype
        assert oracle.relative_error(have, want) < TOL["drift", dtype]


@hypothesis.given(
    tasks=st.integers(0, 5),
    weights=st.integers(1, 60),
    chunk=st.integers(1, 70),
    width=st.integers(1, 9),
    form=st.sampled_from(FORMS),
    head=st.integers(0, 4),
)
def test_output_drift_random_shapes(implementation, tasks, weights, chunk, width, form, head):
    case = cases.DriftCase("random", tasks, weights, chunk, width, head if head * tasks <= weights else 0)
    tensors = case.tensors()
    weight = torch.full((tasks,), 1 / max(1, tasks), dtype=torch.float64)
    found = implementation.output_drift_fwd(*tensors, weight, plan_of(case, form))
    for have, want in zip(found, oracle_value_and_grads(case, tensors), strict=True):
        assert oracle.relative_error(have, want) < TOL["drift", torch.float64]


def test_output_drift_tiles(implementation):
    """Sizes beyond one tile of rows, of columns and of the direct form's residual."""
    case = cases.DriftCase("tiles", 30, 5000 * 300 - 17, 5000, 3)
    dh, basis, h0, basis0 = case.tensors()
    h = h0 + dh
    for form in ("gram", "direct"):
        weight = torch.ones(case.tasks, dtype=torch.float64)
        value, grad_h, grad_basis = implementation.output_drift_fwd(dh, basis, h0, basis0, weight, plan_of(case, form))
        one = torch.ones(*h.shape[:2], 1, dtype=torch.float64)
        ha, ha0 = torch.cat([h, one], -1), torch.cat([h0, one], -1)
        residual = (ha @ basis.T - ha0 @ basis0.T).flatten(1)
        residual[:, case.weights :] = 0
        residual = residual.view(case.tasks, -1, case.chunk)
        assert oracle.relative_error(value, (residual**2).sum()) < 1e-12
        assert oracle.relative_error(grad_h, 2 * residual @ basis[:, :-1]) < 1e-12
        assert oracle.relative_error(grad_basis, 2 * residual.flatten(0, 1).T @ ha.flatten(0, 1)) < 1e-12


@all_cases
def test_output_drift_autograd_scales_and_averages(case):
    """The public function's default is the mean over tasks, and backward multiplies by the incoming gradient."""
    tensors = case.tensors()
    dh, basis = tensors[0].clone().requires_grad_(), tensors[1].clone().requires_grad_()
    value = ops.output_drift(dh, basis, *tensors[2:], plan_of(case))
    (3 * value).backward()
    want_value, want_h, want_basis = oracle_value_and_grads(case, tensors)
    for have, want in ((value, want_value), (dh.grad, 3 * want_h), (basis.grad, 3 * want_basis)):
        assert oracle.relative_error(have.detach(), want) < TOL["drift", torch.float64]


@all_forms
def test_output_drift_gradcheck(form):
    case = cases.DriftCase("gradcheck", 3, 25, 6, 3)
    dh, basis, h0, basis0 = case.tensors()
    inputs = dh.requires_grad_(), basis.requires_grad_()
    assert torch.autograd.gradcheck(lambda dh, basis: ops.output_drift(dh, basis, h0, basis0, plan_of(case, form)), inputs)


@all_cases
def test_output_drift_opcheck(case, dtype):
    tensors = (*case.tensors(dtype), torch.ones(case.tasks, dtype=dtype), plan_of(case))
    torch.library.opcheck(torch.ops.fasthyper._output_drift_fwd.default, tensors)


def test_output_drift_compiles_in_one_graph_and_not_again_for_more_tasks():
    compiled_graphs = 0

    def backend(graph, inputs):
        nonlocal compiled_graphs
        compiled_graphs += 1
        return graph

    compiled = torch.compile(ops.output_drift, fullgraph=True, dynamic=True, backend=backend)
    for tasks in (8, 9, 13):  # none equal to another size, which would be taken for the same
        case = cases.DriftCase("compile", tasks, 25, 6, 3)
        tensors = case.tensors()
        found = compiled(tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:], plan_of(case))
        assert oracle.relative_error(found.detach(), oracle_value_and_grads(case, case.tensors())[0]) < 1e-12
        found.backward()
        assert oracle.relative_error(tensors[0].grad, oracle_value_and_grads(case, case.tensors())[1]) < 1e-12
    assert compiled_graphs == 1


def test_output_drift_strides_and_offsets(implementation):
    case = cases.DriftCase("strides", 3, 25, 6, 3)
    tensors, weight = case.tensors(), torch.ones(3, dtype=torch.float64)
    strided = [torch.stack([t, t], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 1] for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    plain = implementation.output_drift_fwd(*tensors, weight, plan_of(case))
    for have, want in zip(implementation.output_drift_fwd(*strided, weight, plan_of(case)), plain, strict=True):
        assert torch.equal(have, want)


def test_output_drift_repeats_bit_for_bit(implementation):
    case = cases.DriftCase("repeat", 5, 9000 * 12 - 5, 9000, 20)
    tensors, weight = case.tensors(torch.float32), torch.ones(5)
    first = implementation.output_drift_fwd(*tensors, weight, plan_of(case))
    second = implementation.output_drift_fwd(*tensors, weight, plan_of(case))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_output_drift_is_zero_without_drift(implementation):
    case = cases.DriftCase("still", 4, 53, 7, 5)
    _, _, h0, basis0 = case.tensors(torch.float32)
    for form in FORMS:
        found = implementation.output_drift_fwd(torch.zeros_like(h0), basis0, h0, basis0, torch.ones(4), plan_of(case, form))
        assert all(not t.any() for t in found)


def test_output_drift_promotes_half_types():
    case = cases.DriftCase("half", 3, 25, 6, 3)
    tensors = case.tensors(torch.bfloat16)
    value = ops.output_drift(*tensors, plan_of(case))
    assert value.dtype == torch.float32
    assert oracle.relative_error(value, oracle_value_and_grads(case, tensors)[0]) < 1e-5


def test_output_drift_second_derivative_raises():
    case = cases.DriftCase("twice", 3, 25, 6, 3)
    dh, basis, h0, basis0 = case.tensors()
    squared = ops.output_drift(dh.requires_grad_(), basis, h0, basis0, plan_of(case)) ** 2
    (grad,) = torch.autograd.grad(squared, dh, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_output_drift_names_what_is_wrong():
    case = cases.DriftCase("bad", 3, 25, 6, 3)
    dh, basis, h0, basis0 = case.tensors()
    plan = plan_of(case)
    with pytest.raises(ValueError, match=r"output_drift: basis must have shape \[S, 4\], got \[6, 3\]"):
        ops.output_drift(dh, basis[:, :3], h0, basis0, plan)
    with pytest.raises(ValueError, match=r"h0 must have shape \[3, 5, 3\], got \[2, 5, 3\]"):
        ops.output_drift(dh, basis, h0[:2], basis0, plan)
    with pytest.raises(TypeError, match=r"basis is torch.float32, dh is torch.float64"):
        ops.output_drift(dh, basis.float(), h0, basis0, plan)
    with pytest.raises(TypeError, match="dh must be a floating-point tensor, got torch.int64"):
        ops.output_drift(dh.long(), basis, h0, basis0, plan)
    with pytest.raises(ValueError, match=r"weight must have shape \[3\], got \[4\]"):
        ops.output_drift(dh, basis, h0, basis0, plan, weight=torch.ones(4, dtype=torch.float64))
    with pytest.raises(TypeError, match="plan must be int64 on the CPU"):
        ops.output_drift(dh, basis, h0, basis0, plan.float())


@pytest.mark.parametrize("column, value", [(1, 4), (0, 4), (3, 9), (3, -1), (5, 7), (5, -1), (4, -1), (2, 6)])
def test_output_drift_refuses_a_plan_that_leaves_the_grid(implementation, column, value):
    case = cases.DriftCase("bad", 3, 25, 6, 3)
    plan = drift_plan(Layout(24, 6), range(3), 3)
    plan[0, column] = value
    with pytest.raises(RuntimeError, match="leaves the grid"):
        implementation.output_drift_fwd(*case.tensors(), torch.ones(3, dtype=torch.float64), plan)
