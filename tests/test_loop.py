"""The regularizer in a loop of one's own: optimizers, mixed precision, compilation, accumulation, clipping, look-ahead."""

import copy

import oracle
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from test_regularizer import slow_penalty

import fasthyper as fh

BETA = 0.5


def make(layout="flat", hidden=(12, 10), dtype=torch.float64, num_tasks=3, num_past=2, net=(6, (20, 15), 4), **options):
    """Hypernetwork, regularizer a step away from its snapshot, data, and a copy of the hypernetwork at the snapshot."""
    hnet = fh.ChunkedHypernet(
        fh.nets.MLP(*net), num_tasks, chunk_size=60, hidden=hidden, task_dim=8, chunk_dim=5, activation="elu", layout=layout,
        dtype=dtype, **options,
    )  # fmt: skip
    regularizer, hnet0 = fh.OutputRegularizer(hnet), copy.deepcopy(hnet)
    regularizer.snapshot(num_past)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in hnet.theta:
            p += 0.03 * torch.randn(p.shape, generator=generator, dtype=dtype)
    x = torch.randn(12, net[0], generator=generator, dtype=dtype)
    return hnet, regularizer, x, torch.arange(12) % net[2], hnet0


class Lion(torch.optim.Optimizer):
    """As third parties write them: own state, parameters without a gradient skipped."""

    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p -= group["lr"] * (group["beta"] * mean + (1 - group["beta"]) * p.grad).sign()
                    mean.lerp_(p.grad, 1 - group["beta"])
        return loss


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "third party": Lion,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_where_the_slow_penalty_takes_it(name):
    ends = []
    for slow in (False, True):
        hnet, regularizer, x, y, hnet0 = make()
        past = [e.detach().clone() for e in hnet.task_embeddings[:2]]
        optimizer = OPTIMIZERS[name](hnet.parameters())

        def closure(hnet=hnet, regularizer=regularizer, x=x, y=y, hnet0=hnet0, past=past, optimizer=optimizer, slow=slow):
            penalty = slow_penalty(hnet0, hnet.theta, past, range(2)) if slow else regularizer.penalty()
            optimizer.zero_grad()
            loss = F.cross_entropy(hnet(x, 2), y) + BETA * penalty
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(5)]
        assert losses[-1] < losses[0]
        assert all(torch.equal(now, then) for now, then in zip(hnet.task_embeddings, past, strict=False))  # they rest
        ends.append(torch.cat([p.detach().flatten() for p in hnet.theta]))
    assert oracle.relative_error(*ends) < 1e-8


@pytest.mark.parametrize("layout", ["flat", "aligned"])
def test_autocast_changes_no_digit_of_the_penalty(layout):
    hnet, regularizer, *_, hnet0 = make(layout, dtype=torch.float32)
    other = fh.OutputRegularizer(hnet)
    flat = layout == "flat"
    importance = torch.rand(2, hnet.target.num_weights) if flat else None
    calls = [
        {},
        {"tasks": [1]},
        {"scaling": torch.tensor([0.5, 2.0])},
        *([{"importance": importance}, {"targets": torch.zeros_like(importance)}] if flat else []),
    ]

    outside = [regularizer.penalty(**call) for call in calls]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [regularizer.penalty(**call) for call in calls]
        other.snapshot(2, hnet0.theta)
        again = [other.penalty(**call) for call in calls]
    for want, *found in zip(outside, inside, again, strict=True):
        grads = torch.autograd.grad(want, hnet.theta)  # outside of autocast, as torch asks for
        for have in found:
            assert have.dtype == torch.float32 and torch.equal(have, want)
            assert all(map(torch.equal, torch.autograd.grad(have, hnet.theta), grads))


@pytest.mark.parametrize("net", [(6, (20, 15), 4), (7, (9, 13), 5)], ids=["", "rows left over"])
@pytest.mark.parametrize("layout", ["flat", "aligned"])
def test_target_runs_under_autocast_with_weights_of_the_hypernetworks_dtype(layout, net):
    hnet, regularizer, x, y, _ = make(layout, dtype=torch.float32, net=net)
    weights = hnet.generate(2)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = hnet(x, 2)
            loss = F.cross_entropy(outputs, y) + BETA * regularizer.penalty()
            assert all(torch.equal(weight, weights[name]) for name, weight in hnet.generate(2).items())
        assert loss.dtype == torch.float32
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, hnet.theta)]))
    assert outputs.dtype == torch.bfloat16 or layout == "aligned"
    assert 0 < oracle.relative_error(grads[1], grads[0]) < 0.05


def test_grad_scaler_scales_the_penalty_and_skips_what_overflows():
    hnet, regularizer, x, y, _ = make(dtype=torch.float32)
    optimizer = torch.optim.SGD(hnet.parameters(), lr=0.1)

    def loss():
        return F.cross_entropy(hnet(x, 2), y) + BETA * regularizer.penalty()

    want = torch.autograd.grad(loss(), hnet.theta)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    for p, grad in zip(hnet.theta, want, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-7)
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in hnet.theta]
    optimizer.zero_grad()
    scaler.scale(loss() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, then) for p, then in zip(hnet.theta, before, strict=True)) and scaler.get_scale() == 2.0**11


@pytest.mark.parametrize(("layout", "hidden"), [("flat", (12, 10)), ("aligned", (12,)), ("flat", ())])
def test_compiled_step_has_the_loss_and_gradients_of_the_eager_one(layout, hidden):
    """One graph with hypernetwork, target and penalty, task after task, tasks added and parameters moved between them."""
    torch._dynamo.reset()
    hnet, regularizer, x, y, _ = make(layout, hidden, num_tasks=1, num_past=0)

    def loss(x, y, task):
        return F.cross_entropy(hnet(x, task), y) + BETA * regularizer.penalty()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for task in range(3):
        if task:
            hnet.add_task()
        regularizer.snapshot(task)
        for _ in range(2):
            have, want = compiled(x, y, task), loss(x, y, task)
            assert have.item() == pytest.approx(want.item(), rel=1e-12)
            wanted = torch.autograd.grad(want, hnet.theta)
            for found, grad in zip(torch.autograd.grad(have, hnet.theta), wanted, strict=True):
                assert oracle.relative_error(found, grad) < 1e-10
            with torch.no_grad():
                for p, grad in zip(hnet.theta, wanted, strict=True):
                    p -= 0.1 * grad


@pytest.mark.parametrize("hidden", [(12, 10), ()], ids=["trunk", "linear"])
def test_compiled_penalty_is_not_compiled_again_for_more_tasks(hidden):
    torch._dynamo.reset()
    hnet, regularizer, *_ = make(hidden=hidden, num_tasks=2)
    theta = [p.detach() + 0.01 for p in hnet.theta]
    compiled = torch.compile(lambda: regularizer.penalty(theta), fullgraph=True, backend="aot_eager")
    for num_past in range(1, 8):
        if num_past > hnet.num_tasks:
            hnet.add_task()
        regularizer.snapshot(num_past)
        with torch.compiler.set_stance("default" if num_past <= 2 else "fail_on_recompile"):
            assert compiled().item() == pytest.approx(regularizer.penalty(theta).item(), rel=1e-12)


@pytest.mark.parametrize("per_chunk", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_compiled_penalty_of_drawn_tasks(heads, per_chunk):
    """In one graph; with heads, whose plan is of the tasks drawn, in parts."""
    torch._dynamo.reset()
    outputs = {"net": (6, (20, 15), 10), "outputs_per_task": 2} if heads else {}
    hnet, regularizer, *_ = make(num_tasks=5, num_past=4, **outputs)
    theta = [p.detach() + 0.01 for p in hnet.theta]
    compiled = torch.compile(lambda tasks: regularizer.penalty(theta, tasks=tasks), fullgraph=not heads, backend="aot_eager")
    for seed in range(4):
        tasks = regularizer.draw(2, per_chunk=per_chunk, generator=torch.Generator().manual_seed(seed))
        assert compiled(tasks).item() == pytest.approx(regularizer.penalty(theta, tasks=tasks).item(), rel=1e-12)


def test_gradients_accumulate_over_parts_of_a_batch():
    hnet, regularizer, x, y, _ = make()
    whole = torch.autograd.grad(F.cross_entropy(hnet(x, 2), y) + BETA * regularizer.penalty(), hnet.theta)
    for part in (slice(0, 6), slice(6, 12)):
        (F.cross_entropy(hnet(x[part], 2), y[part]) / 2).backward()
    (BETA * regularizer.penalty()).backward()
    for p, grad in zip(hnet.theta, whole, strict=True):
        assert oracle.relative_error(p.grad, grad) < 1e-10


def test_gradients_are_clipped():
    hnet, regularizer, x, y, _ = make()
    (F.cross_entropy(hnet(x, 2), y) + BETA * regularizer.penalty()).backward()
    before = torch.nn.utils.clip_grad_norm_(hnet.parameters(), 0.01)
    assert before > 0.01 and hnet.embedding(0).grad is None
    after = torch.nn.utils.get_total_norm([p.grad for p in hnet.parameters() if p.grad is not None])
    assert after.item() == pytest.approx(0.01, rel=1e-3)


def test_look_ahead_by_hand_is_the_trainers_step():
    hnet, _, x, y, _ = make(num_past=0)
    trainer = fh.Trainer(copy.deepcopy(hnet), lr=0.01, beta=BETA, progress=False)
    for _ in range(2):
        trainer.fit((x, y), steps=4, batch_size=len(x))
    regularizer = fh.OutputRegularizer(hnet)
    for task in range(2):
        regularizer.snapshot(task)
        shared, own = torch.optim.Adam(hnet.theta, lr=0.01), torch.optim.Adam([hnet.embedding(task)], lr=0.01)
        for _ in range(4):
            shared.zero_grad(), own.zero_grad()
            F.cross_entropy(hnet(x, task), y).backward()
            ahead = [p + step for p, step in zip(hnet.theta, fh.candidate_step(shared), strict=True)]
            (BETA * regularizer.penalty(ahead)).backward()
            shared.step(), own.step()
    for have, want in zip(hnet.parameters(), trainer.hnet.parameters(), strict=True):
        assert oracle.relative_error(have.detach(), want.detach()) < 1e-7  # Adam divides by small numbers
