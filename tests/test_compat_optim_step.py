"""``compat.hypnettorch.optim_step``: hypnettorch's numbers where it is right, and the step that follows where it is not."""

import copy
import inspect

import oracle
import pytest
import torch
from conftest import TOL

from fasthyper.compat.hypnettorch import calls, optim_step

pytest.importorskip("hypnettorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, from numpy and matplotlib

from hypnettorch.utils import optim_step as original  # noqa: E402

RIGHT_THERE = {  # Adam's eps so small that it does not matter where it is added
    "adam": (torch.optim.Adam, {"eps": 1e-30, "betas": (0.8, 0.95)}),
    "amsgrad": (torch.optim.Adam, {"eps": 1e-30, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {}),
    "sgd-decay": (torch.optim.SGD, {"weight_decay": 0.2, "momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {"weight_decay": 0.2}),
    "rmsprop-all": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
}
WRONG_THERE = {
    "adam-decay": (torch.optim.Adam, {"weight_decay": 0.3}),
    "adam-eps": (torch.optim.Adam, {"eps": 0.1}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "maximize": (torch.optim.SGD, {"maximize": True}),
}


def make(optimizer_class, options, dtype=torch.float64):
    """Two groups with rates of their own, after three steps."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in ((3, 4), (5,), (2, 2))]
    optimizer = optimizer_class([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}], lr=0.05, **options)
    for step in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        if step < 3:
            optimizer.step()
    return params, optimizer


def assert_close(have, want, tolerance):
    assert len(have) == len(want)
    for h, w in zip(have, want, strict=True):
        assert not h.requires_grad and h.shape == w.shape and oracle.relative_error(h, w) < tolerance


@pytest.mark.parametrize("name", RIGHT_THERE)
def test_gives_the_originals_numbers(name, dtype):
    _, optimizer = make(*RIGHT_THERE[name], dtype)
    state = copy.deepcopy(optimizer.state_dict())
    tolerance = TOL["adam_delta", dtype]
    assert_close(optim_step.calc_delta_theta(optimizer, False), original.calc_delta_theta(optimizer, False), tolerance)
    function = {"adam": "adam_step", "amsgrad": "adam_step"}.get(name, f"{name.split('-')[0]}_step")
    assert_close(getattr(optim_step, function)(optimizer), getattr(original, function)(optimizer), tolerance)
    for i, entries in optimizer.state_dict()["state"].items():
        assert all(value is None or torch.equal(value, state["state"][i][key]) for key, value in entries.items())


@pytest.mark.parametrize("name", RIGHT_THERE | WRONG_THERE)
def test_gives_the_step_that_follows(name):
    params, optimizer = make(*(RIGHT_THERE | WRONG_THERE)[name])
    before, delta = copy.deepcopy(params), optim_step.calc_delta_theta(optimizer, use_sgd_change=False)
    optimizer.step()
    assert_close(delta, [p.detach() - b.detach() for p, b in zip(params, before, strict=True)], 1e-11)
    if name in WRONG_THERE:
        _, optimizer = make(*WRONG_THERE[name])
        theirs = original.calc_delta_theta(optimizer, False)
        assert any(oracle.relative_error(t.detach(), d) > 1e-2 for t, d in zip(theirs, delta, strict=True))


@pytest.mark.parametrize("name", RIGHT_THERE | WRONG_THERE)
def test_plain_sgd_in_place_of_any_optimizer(name):
    _, optimizer = make(*(RIGHT_THERE | WRONG_THERE)[name])
    have, want = (module.calc_delta_theta(optimizer, True, lr=0.3) for module in (optim_step, original))
    assert_close(have, want, 1e-15)


def test_a_parameter_without_gradient_keeps_its_place():
    for use_sgd_change in (False, True):
        params, optimizer = make(torch.optim.Adam, {})
        params[1].grad = None
        delta = optim_step.calc_delta_theta(optimizer, use_sgd_change, lr=0.1)
        assert [d.shape for d in delta] == [p.shape for p in params] and not delta[1].any() and delta[2].all()


@pytest.mark.parametrize("use_sgd_change", [False, True])
@pytest.mark.parametrize("name", sorted({*RIGHT_THERE} - {"amsgrad"}))
def test_can_be_differentiated_where_gradients_were(name, use_sgd_change):
    """The gradient of a function of the step, through the gradients of the task's loss."""
    found = []
    for module in (optim_step, original):
        params, optimizer = make(*RIGHT_THERE[name])
        loss = sum((p**4).sum() for p in params)
        for p, grad in zip(params, torch.autograd.grad(loss, params, create_graph=True), strict=True):
            p.grad = grad
        delta = module.calc_delta_theta(optimizer, use_sgd_change, lr=0.1, detach_dt=False)
        found.append(torch.autograd.grad(sum(d.sin().sum() for d in delta), params))
    for have, want in zip(*found, strict=True):
        assert oracle.relative_error(have, want) < 1e-10


def test_says_what_it_cannot_do():
    params, optimizer = make(torch.optim.SGD, {})
    with pytest.raises(ValueError, match="use_sgd_change needs lr"):
        optim_step.calc_delta_theta(optimizer, True)
    with pytest.raises(TypeError, match="no candidate step for Adagrad; use one of Adam, SGD, RMSprop"):
        optim_step.calc_delta_theta(torch.optim.Adagrad(params), False)
    with pytest.raises(TypeError, match="the optimizer must be Adam, got SGD"):
        optim_step.adam_step(optimizer)


def test_signatures_are_the_originals():
    for name in ("calc_delta_theta", "sgd_step", "adam_step", "rmsprop_step"):
        have, want = (inspect.signature(getattr(module, name)).parameters for module in (optim_step, original))
        assert [(p.name, p.default) for p in have.values()] == [(p.name, p.default) for p in want.values()]


def test_calls_are_counted():
    calls.reset()
    optim_step.calc_delta_theta(make(torch.optim.Adam, {})[1], False)
    assert calls.summary()["calc_delta_theta", "fast"].calls == 1
