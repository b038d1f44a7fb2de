"""Adam's look-ahead and step in one pass each, against torch's optimizers; what they leave as the optimizer's state."""

import copy

import oracle
import pytest
import torch
from conftest import TOL

from fasthyper import ops
from fasthyper.lookahead import look_ahead, take_step

SIZES = [(3, 7), (0,), (), (40_001,), (2, 5)]
SCALE = 0.3
OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "adam-decay": (torch.optim.Adam, {"weight_decay": 0.3, "betas": (0.7, 0.95), "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "adamw-fused": (torch.optim.AdamW, {"weight_decay": 0.3, "fused": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {}),
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
SETTINGS = {"l2": (0.1, 0.7, 0.95, 1e-2, 0.3, False), "decoupled": (0.1, 0.9, 0.999, 1e-8, 0.3, True)}


def tensors(dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in SIZES]


def strided(tensors):
    """The same numbers, every other element of something larger."""
    return [torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for t in tensors]


def make(name, dtype=torch.float64, device="cpu"):
    """An optimizer over two groups of parameters."""
    optimizer_class, options = OPTIMIZERS[name]
    params = [t.requires_grad_() for t in tensors(dtype, device=device)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    return params, optimizer_class(groups, lr=0.05, **options)


def assert_close(found, wanted, tolerance):
    for have, want in zip(found, wanted, strict=True):
        assert have.shape == want.shape and oracle.relative_error(have.detach(), want.detach()) <= tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looks_ahead_and_steps_as_torch_does(name, device):
    (params, optimizer), (wanted, theirs) = make(name, device=device), make(name, device=device)
    for step in range(25):
        grads, more = (tensors(seed=2 * step + i, device=device) for i in (1, 2))
        for p, q, grad in zip(params, wanted, strided(grads), strict=True):
            p.grad, q.grad = grad, grad.clone(memory_format=torch.contiguous_format)  # torch's own fused steps want it so
        rehearsal = copy.deepcopy(theirs)
        for group, copied in zip(theirs.param_groups, rehearsal.param_groups, strict=True):
            for q, c in zip(group["params"], copied["params"], strict=True):
                c.grad = q.grad
        rehearsal.step()
        ahead = [p for group in rehearsal.param_groups for p in group["params"]]
        before = copy.deepcopy(params)
        assert_close(look_ahead(optimizer), ahead, 1e-12)
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        take_step(optimizer, strided(more), SCALE)
        for q, grad in zip(wanted, more, strict=True):
            q.grad += SCALE * grad
        theirs.step()
        assert_close(params, wanted, 1e-12)
    state, want = optimizer.state_dict()["state"], theirs.state_dict()["state"]
    assert state.keys() == want.keys()
    for i, entries in want.items():
        assert state[i].keys() == entries.keys()
        for key, value in entries.items():
            if value is not None:
                assert state[i][key].dtype == value.dtype
                assert_close([state[i][key].to(device)], [value.to(device)], 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
@pytest.mark.parametrize("first", [0, 1], ids=["after-torch", "before-torch"])
def test_torch_goes_on_from_the_state_that_is_left(name, first, dtype, device):
    (params, optimizer), (wanted, theirs) = make(name, dtype, device), make(name, dtype, device)
    for step in range(6):
        for p, q, grad in zip(params, wanted, tensors(dtype, step, device), strict=True):
            p.grad, q.grad = grad, grad.clone()
        take_step(optimizer) if (step + first) % 2 else optimizer.step()
        theirs.step()
    assert_close(params, wanted, TOL["adam_delta", dtype])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_parameter_without_gradient_stays(name):
    params, optimizer = make(name)
    for p, grad in zip(params[::2], tensors(seed=1)[::2], strict=True):
        p.grad = grad
    before, ahead = copy.deepcopy(params), look_ahead(optimizer)
    take_step(optimizer)
    assert_close(ahead, params, 1e-12)
    assert all(torch.equal(p, b) for p, b in zip(params[1::2], before[1::2], strict=True))
    assert not torch.equal(params[0], before[0])


def test_look_ahead_refuses_what_it_cannot_foresee():
    with pytest.raises(TypeError, match="no candidate step for Adagrad"):
        look_ahead(torch.optim.Adagrad([torch.ones(3, requires_grad=True)]))


def test_a_step_is_seen_by_graphs_made_before():
    params, optimizer = make("adam")
    loss = sum((p**2).sum() for p in params)
    loss.backward(retain_graph=True)
    take_step(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def arguments(dtype=torch.float64, device="cpu"):
    params, grads, more, exp_avgs = (tensors(dtype, seed, device) for seed in range(4))
    exp_avg_sqs = [t.square() for t in tensors(dtype, 4, device)]
    return params, grads, more, exp_avgs, exp_avg_sqs, [torch.tensor(float(i), device=device) for i in range(len(SIZES))]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("with_more", [True, False], ids=["more", "alone"])
def test_adam_ops_are_the_delta_applied(implementation, settings, with_more, dtype):
    params, grads, more, *state = arguments(dtype)
    total = [g + SCALE * m for g, m in zip(grads, more, strict=True)] if with_more else grads
    tolerance = TOL["adam_delta", dtype]
    want = [p + implementation.adam_delta_fwd(p, g, *s, *settings) for p, g, *s in zip(params, total, *state, strict=True)]
    assert_close(implementation.adam_ahead(params, strided(total), *state, *settings), want, tolerance)
    counts = [step.item() for step in state[2]]
    implementation.adam_step_(params, strided(grads), strided(more) if with_more else [], SCALE, *state, *settings)
    assert_close(params, want, tolerance)
    assert [step.item() for step in state[2]] == [count + 1 for count in counts]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_adam_ops_multiply_the_learning_rate_by_a_tensor(implementation, settings, dtype):
    rate, times = torch.tensor(0.37, dtype=torch.float64), (settings[0] * 0.37, *settings[1:])
    tolerance = 4 * torch.finfo(dtype).eps
    (*found, steps), (*wanted, wanted_steps) = arguments(dtype), arguments(dtype)
    ahead = implementation.adam_ahead(found[0], found[1], *found[3:], steps, *settings, rate)
    assert_close(ahead, implementation.adam_ahead(wanted[0], wanted[1], *wanted[3:], wanted_steps, *times), tolerance)
    implementation.adam_step_(*found[:3], SCALE, *found[3:], steps, *settings, None, rate)
    implementation.adam_step_(*wanted[:3], SCALE, *wanted[3:], wanted_steps, *times)
    assert_close(found[0], wanted[0], tolerance)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("healthy", [True, False])
def test_adam_step_changes_nothing_where_it_is_not_healthy(implementation, settings, healthy, dtype):
    params, grads, more, *state = arguments(dtype)
    if not healthy:
        grads[0][0] = torch.nan
    wanted = copy.deepcopy((params, *state))
    if healthy:
        implementation.adam_step_(wanted[0], grads, more, SCALE, *wanted[1:], *settings)
    implementation.adam_step_(params, grads, more, SCALE, *state, *settings, torch.tensor(healthy))
    for have, want in zip((params, *state), wanted, strict=True):
        assert all(torch.equal(t, w) for t, w in zip(have, want, strict=True))


def test_adam_ops_take_many_parameters(implementation, dtype):
    generator = torch.Generator().manual_seed(0)
    params, grads, exp_avgs, exp_avg_sqs = (
        [torch.rand(i % 7, generator=generator, dtype=torch.float64).to(dtype) for i in range(100)] for _ in range(4)
    )
    steps = [torch.tensor(float(i)) for i in range(100)]
    wanted = [
        p + implementation.adam_delta_fwd(p, *t, *SETTINGS["l2"])
        for p, *t in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ]
    state = exp_avgs, exp_avg_sqs, steps
    assert_close(implementation.adam_ahead(params, grads, *state, *SETTINGS["l2"]), wanted, TOL["adam_delta", dtype])
    implementation.adam_step_(params, grads, [], 1.0, *state, *SETTINGS["l2"])
    assert_close(params, wanted, TOL["adam_delta", dtype])
    assert [step.item() for step in steps] == [i + 1 for i in range(100)]


@pytest.mark.parametrize("device", [DEVICES[1]])
def test_adam_ops_repeat_in_a_graph(dtype, device):
    found, wanted, healthy = arguments(dtype, device), arguments(dtype, device), torch.tensor(True, device=device)

    def run(params, grads, more, *state):
        ahead = torch.ops.fasthyper._adam_ahead(params, grads, *state, *SETTINGS["l2"])
        torch.ops.fasthyper._adam_step_(params, grads, more, SCALE, *state, *SETTINGS["l2"], healthy)
        return ahead

    run(*arguments(dtype, device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ahead = run(*found)
    for is_healthy in (True, True, False, True):
        healthy.fill_(is_healthy)
        graph.replay()
        assert all(map(torch.equal, ahead, run(*wanted)))
        assert all(
            torch.equal(t, w) for have, want in zip(found, wanted, strict=True) for t, w in zip(have, want, strict=True)
        )


@pytest.mark.parametrize("device", [DEVICES[1]])
def test_adam_ops_take_counts_on_the_cpu_outside_graphs(dtype, device):
    (*found, steps), wanted = arguments(dtype, device), arguments(dtype, device)
    found.append([step.cpu() for step in steps])

    def run(params, grads, more, *state):
        ahead = torch.ops.fasthyper._adam_ahead(params, grads, *state, *SETTINGS["l2"])
        torch.ops.fasthyper._adam_step_(params, grads, more, SCALE, *state, *SETTINGS["l2"])
        return ahead

    assert all(map(torch.equal, run(*found), run(*wanted)))
    for have, want in zip(found, wanted, strict=True):
        assert all(torch.equal(t.cpu(), w.cpu()) for t, w in zip(have, want, strict=True))
    with pytest.raises(ValueError, match=r"steps\[0\] is on the CPU, a CUDA"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)  # torch warns of a graph that holds nothing
        ops.adam_ahead(found[0], found[1], *found[3:], lr=0.1)
    with pytest.raises(ValueError, match=r"steps\[0\] is on cpu, healthy on cuda"):
        ops.adam_step_(*found[:3], 1.0, *found[3:], lr=0.1, healthy=torch.tensor(True, device=device))


def test_adam_ops_take_no_parameters_at_all(implementation):
    assert implementation.adam_ahead([], [], [], [], [], *SETTINGS["l2"]) == []
    implementation.adam_step_([], [], [], 1.0, [], [], [], *SETTINGS["l2"])


def test_adam_ops_opcheck(dtype):
    params, grads, more, *state = arguments(dtype)
    torch.library.opcheck(torch.ops.fasthyper._adam_ahead.default, (params, grads, *state, *SETTINGS["l2"]))
    for more_or_none, *healthy in ((more,), ([],), (more, torch.tensor(True))):
        inputs = (params, grads, more_or_none, SCALE, *state, *SETTINGS["decoupled"], *healthy)
        torch.library.opcheck(torch.ops.fasthyper._adam_step_.default, inputs)


def test_adam_ops_compile_in_one_graph():
    def ahead_then_step(params, grads, more, *state):
        ahead = torch.ops.fasthyper._adam_ahead(params, grads, *state, *SETTINGS["l2"])
        torch.ops.fasthyper._adam_step_(params, grads, more, SCALE, *state, *SETTINGS["l2"])
        return ahead

    found, want = arguments(), arguments()
    torch._dynamo.reset()
    ahead = torch.compile(ahead_then_step, fullgraph=True, backend="aot_eager")(*found)
    assert_close(ahead, ahead_then_step(*want), 1e-12)
    for have, wanted in zip(found, want, strict=True):
        assert_close(have, wanted, 1e-12)


def test_adam_ops_name_what_is_wrong():
    params, grads, more, *state = arguments()
    with pytest.raises(ValueError, match="adam_ahead: 5 params, but 4 grads"):
        ops.adam_ahead(params, grads[1:], *state, lr=0.1)
    with pytest.raises(ValueError, match=r"adam_step_: more_grads\[0\] must have shape \[3, 7\], got \[7, 3\]"):
        ops.adam_step_(params, grads, [more[0].T, *more[1:]], 1.0, *state, lr=0.1)
    with pytest.raises(TypeError, match=r"grads\[3\] is torch.float32, params\[0\] is torch.float64"):
        ops.adam_ahead(params, [*grads[:3], grads[3].float(), grads[4]], *state, lr=0.1)
    with pytest.raises(TypeError, match="adam_ahead: computes in float32 or float64, got torch.bfloat16"):
        ops.adam_ahead([params[0].bfloat16()], [grads[0].bfloat16()], *([t[0].bfloat16()] for t in state), lr=0.1)
    with pytest.raises(
        ValueError, match="adam_ahead: lr, if a tensor, must be float64 and with the parameters, got torch.float32"
    ):
        ops.adam_ahead(params, grads, *state, lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"steps\[0\] must have shape \[\], got \[1\]"):
        ops.adam_ahead(params, grads, *state[:2], [state[2][0][None], *state[2][1:]], lr=0.1)
    with pytest.raises(ValueError, match=r"adam_ahead: steps\[1\] is on meta, params\[0\] on cpu; move one"):
        ops.adam_ahead(params, grads, *state[:2], [state[2][0], *(step.to("meta") for step in state[2][1:])], lr=0.1)
    with pytest.raises(TypeError, match=r"adam_step_: healthy must be bool, got torch.float32"):
        ops.adam_step_(params, grads, more, 1.0, *state, lr=0.1, healthy=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"adam_step_: healthy must have shape \[\], got \[1\]"):
        ops.adam_step_(params, grads, more, 1.0, *state, lr=0.1, healthy=torch.tensor([True]))
    with pytest.raises(ValueError, match=r"adam_step_: params\[0\] is on cpu, healthy on meta; move one"):
        ops.adam_step_(params, grads, more, 1.0, *state, lr=0.1, healthy=torch.tensor(True, device="meta"))
    with pytest.raises(ValueError, match=r"params\[0\] is updated in place and must be contiguous"):
        ops.adam_step_(strided(params), grads, more, 1.0, *state, lr=0.1)
