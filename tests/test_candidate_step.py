"""Candidate steps against the steps that torch's optimizers then really take; the Adam op against autograd."""

import oracle
import pytest
import torch
from conftest import TOL

import fasthyper as fh
from fasthyper import ops

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "adam-decay": (torch.optim.Adam, {"weight_decay": 0.3, "betas": (0.7, 0.95), "eps": 1e-3}),
    "adam-fused": (torch.optim.Adam, {"fused": True, "weight_decay": 0.3}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "adamw-fused": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.3}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.3}),
    "amsgrad-decoupled": (torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.3, "maximize": True}),
    "adam-maximize": (torch.optim.Adam, {"maximize": True, "weight_decay": 0.3}),
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd-fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"weight_decay": 0.1}),
    "sgd-maximize": (torch.optim.SGD, {"maximize": True, "weight_decay": 0.3}),
    "rmsprop-centered": (torch.optim.RMSprop, {"centered": True, "weight_decay": 0.1, "momentum": 0.9}),
    "rmsprop-momentum": (torch.optim.RMSprop, {"momentum": 0.9}),
}
SETTINGS = {
    "adam": (0.1, 0.9, 0.999, 1e-8, 0.0, False),
    "l2": (0.1, 0.7, 0.95, 1e-2, 0.3, False),
    "decoupled": (0.1, 0.9, 0.999, 1e-8, 0.3, True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_candidate_step_is_the_step_that_follows(name, dtype):
    optimizer_class, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    parameters = [torch.randn(3, 4, dtype=dtype).requires_grad_(), torch.randn(5, dtype=dtype).requires_grad_()]
    optimizer = optimizer_class(parameters, lr=0.05, **options)
    for _ in range(6):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.randn_like(p)
        delta = fh.candidate_step(optimizer)
        assert all(torch.equal(p.detach(), b) for p, b in zip(parameters, before, strict=True))
        optimizer.step()
        for p, b, d in zip(parameters, before, delta, strict=True):
            rounding = torch.finfo(dtype).eps * b.norm().item() / d.norm().item()
            assert oracle.relative_error(d, p.detach() - b) < 4 * rounding + TOL["adam_delta", dtype]


def test_candidate_step_of_a_parameter_without_gradient_is_zero():
    p = torch.ones(3, requires_grad=True)
    assert not fh.candidate_step(torch.optim.Adam([p]))[0].any()


def test_candidate_step_refuses_what_it_cannot_foresee():
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError, match="no candidate step for Adagrad; use one of Adam, SGD, RMSprop"):
        fh.candidate_step(torch.optim.Adagrad([p]))
    sparse = torch.nn.Embedding(3, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="no candidate step for a sparse gradient"):
        fh.candidate_step(torch.optim.SGD(sparse.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_differentiable_candidate_step_has_the_gradients_of_finite_differences(name):
    optimizer_class, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    p = torch.randn(5, dtype=torch.float64).requires_grad_()
    optimizer = optimizer_class([p], lr=0.05, **options)
    for _ in range(2):

        def change(gradient):
            p.grad = gradient
            return fh.candidate_step(optimizer, differentiable=True)[0]

        assert torch.autograd.gradcheck(change, torch.randn(5, dtype=torch.float64).requires_grad_())
        p.grad = p.grad.detach()
        optimizer.step()


def state(dtype, size=(3, 7)):
    generator = torch.Generator().manual_seed(3)
    param, grad, exp_avg, exp_avg_sq = torch.randn(4, *size, generator=generator, dtype=torch.float64).to(dtype)
    return param, grad, exp_avg, exp_avg_sq.square(), torch.tensor(4.0)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("size", [(3, 7), (0,), (), (40_000,)], ids=str)
def test_adam_delta_forward_backward(implementation, settings, size, dtype):
    inputs, grad = state(dtype, size), torch.ones(size, dtype=dtype)
    wanted = [t.double() for t in inputs]
    lr, beta1, beta2, eps, decay, decoupled = settings
    param, gradient = wanted[0].requires_grad_(), wanted[1].requires_grad_()
    g = gradient if decoupled else gradient + decay * param
    m = (beta1 * wanted[2] + (1 - beta1) * g) / (1 - beta1**5)
    v = (beta2 * wanted[3] + (1 - beta2) * g**2) / (1 - beta2**5)
    want = -lr * m / (v.sqrt() + eps) - (lr * decay * param if decoupled else 0)
    assert oracle.relative_error(implementation.adam_delta_fwd(*inputs, *settings), want.detach()) < TOL["adam_delta", dtype]
    want_grads = torch.autograd.grad(want.sum(), [param, gradient], allow_unused=True, materialize_grads=True)
    for have, wanted_grad in zip(implementation.adam_delta_bwd(grad, *inputs, *settings), want_grads, strict=True):
        assert oracle.relative_error(have, wanted_grad) < TOL["adam_delta", dtype]


def test_adam_delta_without_decay_does_not_read_the_parameter(implementation, dtype):
    param, *rest = state(dtype)
    settings = (0.1, 0.7, 0.95, 1e-2, 0.0, False)
    delta = implementation.adam_delta_fwd(torch.full_like(param, torch.nan), *rest, *settings)
    assert torch.equal(delta, implementation.adam_delta_fwd(param, *rest, *settings))


def public_adam_delta(settings):
    lr, beta1, beta2, eps, decay, decoupled = settings
    return lambda p, g, m, v, step: ops.adam_delta(
        p, g, m, v, step, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, decoupled=decoupled
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_adam_delta_gradcheck(settings):
    param, grad, *rest = state(torch.float64)
    function = public_adam_delta(settings)
    inputs = param.requires_grad_(), grad.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, g: function(p, g, *rest), inputs)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_adam_delta_opcheck(settings, dtype):
    inputs = state(dtype)
    torch.library.opcheck(torch.ops.fasthyper._adam_delta_fwd.default, (*inputs, *settings))
    torch.library.opcheck(torch.ops.fasthyper._adam_delta_bwd.default, (torch.ones(3, 7, dtype=dtype), *inputs, *settings))


def test_adam_delta_compiles_in_one_graph():
    function = public_adam_delta(SETTINGS["l2"])
    param, grad, *rest = state(torch.float64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = param.requires_grad_(), grad.requires_grad_()
    want = torch.autograd.grad(function(*inputs, *rest).sin().sum(), inputs)
    for have, wanted in zip(torch.autograd.grad(compiled(*inputs, *rest).sin().sum(), inputs), want, strict=True):
        assert oracle.relative_error(have, wanted) < 1e-12


def test_adam_delta_names_what_is_wrong():
    param, grad, exp_avg, exp_avg_sq, step = state(torch.float32)
    with pytest.raises(ValueError, match=r"adam_delta: grad must have shape \[3, 7\], got \[7\]"):
        ops.adam_delta(param, grad[0], exp_avg, exp_avg_sq, step, lr=0.1)
    with pytest.raises(TypeError, match="exp_avg is torch.float64, param is torch.float32"):
        ops.adam_delta(param, grad, exp_avg.double(), exp_avg_sq, step, lr=0.1)
    with pytest.raises(ValueError, match=r"step must have shape \[\], got \[1\]"):
        ops.adam_delta(param, grad, exp_avg, exp_avg_sq, step[None], lr=0.1)
