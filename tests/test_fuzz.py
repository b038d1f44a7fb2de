"""Every public op, bound against reference, over drawn shapes, layouts in memory, plans, upstream gradients and bad input.

``CALLS`` is the table: an op is added by a function that draws one call of it. ``pytest --hypothesis-profile=long`` looks
further, at other examples each time. Under ``make sanitize`` the same calls go through an instrumented extension.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from torch import Tensor

from fasthyper import ops, reference
from fasthyper.activations import ACTIVATIONS, BY_CODE

Tensors = dict[str, Tensor]
Draw = Callable[[Any], Any]
KEPT = {"gram0", "step", "steps"}  # never cast to the dtype under test
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5}  # error, over what the terms would sum to if none cancelled
GUARD = 8  # elements of canary on either side
small = st.integers(0, 5)
tall = st.one_of(small, small, small, st.sampled_from([33, 130, 1030]))  # then more than one tile
narrow = st.sampled_from([7, 16, 24, 25, 27, 31, 32, 50, 64, 71])  # pairs of so many columns fill registers, or nearly
wide = st.one_of(small, small, small, narrow, st.sampled_from([17, 90]))  # more than a block of a symmetric product


class Call(NamedTuple):
    """One drawn call. ``magnitudes``: one in which every term of every sum is positive and at least as large."""

    tensors: Tensors  # float64, made of numbers that float32 has
    run: Callable[[Tensors], list[Tensor]]
    differentiable: tuple[str, ...]
    magnitudes: Call | None = None
    changed: tuple[str, ...] = ()  # in place; contiguous


def values(draw: Draw, *size: int) -> Tensor:
    """Random numbers; sometimes the same along a dimension, which then has stride 0."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    constant = draw(st.sampled_from([None, None, None, *range(len(size))]))
    held = [min(n, 1) if dim == constant else n for dim, n in enumerate(size)]
    return torch.randn(held, generator=generator).double().expand(size)


def weights(draw: Draw, num_tasks: int) -> Tensor:
    """Of tasks; sometimes negative."""
    found = values(draw, num_tasks)
    return found if draw(small) == 5 else found.abs()


def lay(draw: Draw, clean: Tensor, dtype: torch.dtype, contiguous: bool = False) -> Tensor:
    """The same values amid canaries: at any offset, transposed, with steps, expanded, or with a pending negation."""
    held = clean
    for dim, (size, stride) in enumerate(zip(clean.shape, clean.stride(), strict=True)):
        held = held.narrow(dim, 0, 1) if size > 1 and stride == 0 else held
    held = held.to(dtype, copy=contiguous)
    kind = draw(st.sampled_from(["plain", "offset"] if contiguous else ["plain", "offset", "strided", "strided", "negated"]))
    if kind == "negated" and dtype.is_floating_point:
        held = torch.complex(torch.full_like(held, math.nan), -held).conj().imag
    elif kind != "plain":
        order = draw(st.permutations(range(held.dim()))) if kind == "strided" else range(held.dim())
        steps = [draw(st.integers(1, 3)) if kind == "strided" else 1 for _ in order]
        sizes = [held.shape[dim] * step for dim, step in zip(order, steps, strict=True)]
        canary = math.nan if dtype.is_floating_point else dtype == torch.bool or torch.iinfo(dtype).min
        start, length = GUARD + draw(st.integers(0, 17)), math.prod(sizes)
        buffer = torch.full((start + length + GUARD,), canary, dtype=dtype)
        view = buffer[start : start + length].view(sizes)[tuple(slice(None, None, step) for step in steps)]
        held = view.permute([list(order).index(dim) for dim in range(held.dim())]).copy_(held)
    return held.expand(clean.shape)


def draw_plan(draw: Draw, *grid: int) -> Tensor:
    """Up to four rectangles tasks x chunks x columns: empty, of one cell, overlapping, of either form."""
    plan = []
    for _ in range(draw(small.filter(lambda n: n < 5))):
        bounds = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in grid]
        if draw(st.booleans()):
            bounds = [[0, size] for size in grid]
        if bounds[0][1] == grid[0] and draw(st.booleans()):
            bounds[0][1] = -1
        plan.append([*bounds[0], *bounds[1], *bounds[2], draw(st.integers(0, 1))])
    return torch.tensor(plan, dtype=torch.int64).reshape(-1, 7)


def draw_step(draw: Draw) -> float:
    return draw(st.sampled_from([0.0, 2**-10, 0.125, 1.0]))


def stem(name: str) -> str:
    return name.split("[")[0]


def lists(tensors: Tensors, *names: str) -> dict[str, Any]:
    """``name[0]``, ``name[1]``, ... as a list ``name``; those of ``names`` also where there are none."""
    found: dict[str, Any] = {name: [] for name in names}
    for name, tensor in tensors.items():
        if name.endswith("]"):
            found.setdefault(stem(name), []).append(tensor)
        else:
            found[name] = tensor
    return found


def earlier(name: str) -> str:
    return name.replace("theta", "theta0").replace("embeddings", "embeddings0")


def output_drift(draw: Draw, public=ops.output_drift) -> Call:
    grid, width = (draw(small), draw(tall), draw(tall)), draw(wide)
    step, basis = draw_step(draw), values(draw, grid[2], width + 1)
    tensors = {
        "dh": step * values(draw, *grid[:2], width),
        "basis": basis,
        "h0": values(draw, *grid[:2], width),
        "basis0": (basis - step * values(draw, *basis.shape)).float().double(),
        "plan": draw_plan(draw, *grid),
    }
    if draw(st.booleans()):
        tensors["weight"] = weights(draw, grid[0])

    def run(t):
        found = public(**t)
        return [found] if isinstance(found, Tensor) else list(found)

    call = Call(tensors, run, ("dh", "basis") if public is ops.output_drift else ())
    return call._replace(magnitudes=call._replace(tensors=positive_output(tensors)))


def output_drift_value_and_grad(draw: Draw) -> Call:
    return output_drift(draw, ops.output_drift_value_and_grad)


def positive_output(tensors: Tensors) -> Tensors:
    positive = {name: t.abs() if t.is_floating_point() else t for name, t in tensors.items()}
    if "basis0" in tensors:
        positive["basis0"] = positive["basis"] - (tensors["basis"] - tensors["basis0"]).abs()
    return positive


def target_drift(draw: Draw) -> Call:
    grid, width = (draw(small), draw(tall), draw(tall)), draw(wide)
    tensors = {
        "h": values(draw, *grid[:2], width),
        "basis": values(draw, grid[2], width + 1),
        "plan": draw_plan(draw, *grid),
    }
    reached = max([(n - 1) * grid[2] + c for _, _, _, n, _, c, _ in tensors["plan"].tolist()], default=0)
    size = draw(st.integers(max(0, reached), grid[1] * grid[2] + 3))

    def per_weight(name: str) -> Tensors:
        if draw(st.booleans()):
            return {name: values(draw, grid[0], size)}
        return {f"{name}[{t}]": values(draw, size) for t in range(grid[0])}

    has_targets = draw(st.booleans())
    if has_targets:
        tensors |= per_weight("targets")
    else:
        tensors["h0"] = values(draw, *grid[:2], width)
        tensors["basis0"] = (tensors["basis"] - draw_step(draw) * values(draw, grid[2], width + 1)).float().double()
    if draw(st.booleans()):
        tensors |= {name: t.abs() for name, t in per_weight("importance").items()}
    if draw(st.booleans()):
        tensors["weight"] = weights(draw, grid[0])

    positive = positive_output(tensors)
    positive |= {name: -t for name, t in positive.items() if stem(name) == "targets"}
    names = ["targets"] if has_targets else []
    call = Call(tensors, lambda t: [ops.target_drift(**lists(t, *names))], ("h", "basis"))
    return call._replace(magnitudes=call._replace(tensors=positive))


def hypernet_drift(draw: Draw, public=ops.hypernet_drift) -> Call:
    grid = draw(small), draw(tall), draw(tall)
    dims, hidden = (draw(small), draw(small)), [draw(wide) for _ in range(draw(st.integers(0, 3)))]
    widths, step, code = (sum(dims), *hidden), draw_step(draw), draw(st.sampled_from(sorted(BY_CODE)))
    sizes = {"theta[0]": (grid[1], dims[1])}
    for layer, (i, o) in enumerate(pairwise(widths)):
        sizes |= {f"theta[{2 * layer + 1}]": (o, i), f"theta[{2 * layer + 2}]": (o,)}
    sizes |= {f"theta[{len(sizes)}]": (grid[2], widths[-1] + 1), "embeddings": (grid[0], dims[0])}
    tensors = {name: values(draw, *size) / math.sqrt(max(1, size[-1])) for name, size in sizes.items()}
    for name in sizes:
        then = earlier(name)
        tensors[name] = tensors[name].float().double()
        tensors[then] = (tensors[name] - step * values(draw, *sizes[name])).float().double()
    tensors |= {f"pre0[{i}]": values(draw, *grid[:2], o) for i, o in enumerate(hidden[1:])}
    tensors["plan"] = draw_plan(draw, *grid)
    made_again = draw(st.booleans())
    if made_again:
        tensors |= pre_activations(tensors, len(hidden), BY_CODE[code].value)
    if draw(st.booleans()):
        tensors["weight"] = weights(draw, grid[0])
        if draw(st.booleans()):
            h0 = reference.pairs(tensors["embeddings0"], tensors["theta0[0]"])
            for i in range(len(hidden)):
                a0 = tensors[f"pre0[{i - 1}]"] if i else F.linear(h0, tensors["theta0[1]"], tensors["theta0[2]"])
                h0 = BY_CODE[code].value(a0)
            tensors["gram0"] = reference.gram0(h0, tensors["weight"], tensors["plan"])

    absolute = {name: t.abs() for name, t in tensors.items()}
    if made_again:
        absolute |= pre_activations(absolute, len(hidden), lambda a: a + 1)
    positive = tensors | {f"pre0[{i}]": absolute[f"pre0[{i}]"] + 1 for i in range(len(hidden) - 1)}
    if "weight" in tensors:
        positive["weight"] = absolute["weight"]
    if made_again:
        tensors = {name: t for name, t in tensors.items() if stem(name) != "pre0"}
    for name in sizes:
        then = earlier(name)
        now, change = tensors[name].abs(), (tensors[name] - tensors[then]).abs()
        if name in ("theta[0]", "embeddings", *(["theta[1]", "theta[2]"] if hidden else [])):  # of which pre0 is made
            before = tensors[then].abs() + float(name == "theta[2]")
            positive |= {name: before + change, then: before}
        else:
            positive |= {name: now, then: now - change}

    def call(tensors, code):
        def run(t):
            found = public(**lists(t, "pre0"), activation=code)
            return [found] if isinstance(found, Tensor) else [found[0], *found[1], found[2]]

        return Call(tensors, run, tuple(sizes) if public is ops.hypernet_drift else ())

    # of what is positive relu is the identity, which no activation exceeds, nor is steeper than by a tenth
    return call(tensors, code)._replace(magnitudes=call(positive, ACTIVATIONS["relu"].code))


def pre_activations(tensors: Tensors, num_layers: int, value: Callable[[Tensor], Tensor]) -> Tensors:
    """Those of the snapshot, but for the first layer's."""
    found, x = {}, reference.pairs(tensors["embeddings0"], tensors["theta0[0]"])
    for i in range(num_layers):
        a0 = F.linear(x, tensors[f"theta0[{2 * i + 1}]"], tensors[f"theta0[{2 * i + 2}]"])
        found |= {f"pre0[{i - 1}]": a0} if i else {}
        x = value(a0)
    return found


def hypernet_drift_value_and_grad(draw: Draw) -> Call:
    return hypernet_drift(draw, ops.hypernet_drift_value_and_grad)


def draw_sides(draw: Draw, count: int) -> list[int]:
    """1 or more each; at times all wide enough for tile units."""
    side = st.sampled_from([64, 65, 90]) if draw(small) == 5 else wide.filter(bool)
    return [draw(side) for _ in range(count)]


def draw_shapes(draw: Draw, chunks: int, chunk_size: int) -> list[tuple[int, ...]]:
    """Of weights that need exactly these chunks, the last one often cut short."""
    total = draw(st.integers((chunks - 1) * chunk_size + 1, chunks * chunk_size)) if chunks else 0
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=3)))
    shapes = [draw(st.sampled_from([(n,), (1, n), (n, 1)])) for n in (b - a for a, b in pairwise([0, *cuts, total]))]
    return [() if math.prod(shape) == 1 else shape for shape in shapes]


def products(tensors: Tensors, run: Callable[[Tensors], list[Tensor]], differentiable: tuple[str, ...]) -> Call:
    """A call that only adds and multiplies."""
    call = Call(tensors, run, differentiable)
    return call._replace(magnitudes=call._replace(tensors={name: t.abs() for name, t in tensors.items()}))


def affine_drift_value_and_grad(draw: Draw) -> Call:
    num_weights, width = draw(tall), draw(wide)
    basis, step = values(draw, num_weights, width), draw_step(draw)
    basis0 = (basis - step * values(draw, num_weights, width)).float().double()
    tensors = {"basis": basis, "basis0": basis0, "moments": values(draw, width, width)}
    call = Call(tensors, lambda t: list(ops.affine_drift_value_and_grad(**t)), ())
    positive = {"basis": (basis - basis0).abs(), "basis0": torch.zeros_like(basis), "moments": tensors["moments"].abs()}
    return call._replace(magnitudes=call._replace(tensors=positive))


def generate(draw: Draw) -> Call:
    chunks, chunk_size, width = draw(tall), draw(tall.filter(bool)), draw(wide)
    shapes = draw_shapes(draw, chunks, chunk_size)
    tensors = {"h": values(draw, chunks, width), "basis": values(draw, chunk_size, width + 1)}
    return products(tensors, lambda t: list(ops.generate(**t, shapes=shapes)), ("h", "basis"))


def generate_blocks(draw: Draw) -> Call:
    """Blocks that overlap, meet, hold no chunks, or leave some of the grid out."""
    chunks, chunk_size, width = draw_sides(draw, 3)
    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        rows = sorted((draw(st.integers(0, chunks)), draw(st.integers(0, chunks))))
        start = draw(st.integers(0, chunk_size - 1))
        cols = start, draw(st.integers(start + 1, chunk_size))
        if draw(st.booleans()):
            rows, cols = [0, chunks], (0, chunk_size)
        blocks.append(((rows[0], rows[1]), cols, draw_shapes(draw, rows[1] - rows[0], cols[1] - cols[0])))
    tensors = {"h": values(draw, chunks, width), "basis": values(draw, chunk_size, width + 1)}
    return products(tensors, lambda t: list(ops.generate_blocks(**t, blocks=blocks)), ("h", "basis"))


def hyper_linear(draw: Draw) -> Call:
    batch, num_inputs, chunks, width = draw_sides(draw, 4)
    batch, width = (0 if draw(small) == 5 else n for n in (batch, width))
    rows = draw(st.integers(1, 5))
    order = {"rows": rows, "num_outputs": draw(st.integers((chunks - 1) * rows + 1, chunks * rows))}
    order["factorised"] = draw(st.booleans())
    tensors = {
        "x": values(draw, batch, num_inputs),
        "h": values(draw, chunks, width),
        "basis": values(draw, rows * num_inputs + draw(small), width + 1),
    }
    needed = ("x", "h", "basis") if draw(st.booleans()) else ("h", "basis")
    return products(tensors, lambda t: [ops.hyper_linear(**t, **order)], needed)


def adam_delta(draw: Draw) -> Call:
    tensors, settings = adam_state(draw), adam_settings(draw)
    return Call(tensors, lambda t: [ops.adam_delta(**t, **settings)], ("param", "grad"))


def adam_state(draw: Draw, step_dtypes=(torch.float32, torch.float64, torch.int64)) -> Tensors:
    size = [draw(small) for _ in range(draw(st.integers(0, 3)))]
    size = [draw(st.sampled_from([1 << 14, 40_000]))] if draw(small) == 5 else size
    param, grad, exp_avg = (values(draw, *size).abs() for _ in range(3))  # of one sign: where terms cancel digits go
    exp_avg_sq = (1 + values(draw, *size).abs()).float().double()
    step = torch.tensor(draw(st.integers(0, 100)), dtype=draw(st.sampled_from(step_dtypes)))
    return {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}


def adam_settings(draw: Draw) -> dict[str, Any]:
    return {
        "lr": draw(st.sampled_from([0.0, 1e-3, 1.0])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.5, 0.75), (0.0, 0.5)])),
        "eps": draw(st.sampled_from([1e-8, 1e-2])),
        "weight_decay": draw(st.sampled_from([0.0, 0.25])),
        "decoupled": draw(st.booleans()),
    }


def adam_states(draw: Draw, **kinds: Any) -> Tensors:
    """Of none to three parameters."""
    states = [adam_state(draw, **kinds) for _ in range(draw(st.integers(0, 3)))]
    return {f"{name}s[{i}]": t for i, state in enumerate(states) for name, t in state.items()}


def adam_ahead(draw: Draw) -> Call:
    tensors, settings = adam_states(draw), adam_settings(draw)
    return Call(tensors, lambda t: ops.adam_ahead(**lists(t, *ADAM_LISTS), **settings), ())


def adam_step_(draw: Draw) -> Call:
    tensors, settings = adam_states(draw, step_dtypes=(torch.float32, torch.float64)), adam_settings(draw)
    changed = tuple(name for name in tensors if stem(name) != "grads")
    tensors |= {name: tensors[name].contiguous() for name in changed}
    if draw(st.booleans()):
        more = {f"more_{name}": values(draw, *t.shape).abs() for name, t in tensors.items() if stem(name) == "grads"}
        tensors |= more
    scale = draw(st.sampled_from([0.0, 0.125, 1.0]))
    if draw(st.booleans()):
        tensors["healthy"] = torch.tensor(draw(st.booleans()))

    def run(t):
        ops.adam_step_(**lists(t, *ADAM_LISTS, "more_grads"), scale=scale, **settings)
        return [t[name].clone() for name in changed]

    return Call(tensors, run, (), changed=changed)


ADAM_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
CALLS = (
    *(output_drift, output_drift_value_and_grad, hypernet_drift, hypernet_drift_value_and_grad, target_drift),
    *(affine_drift_value_and_grad, generate, generate_blocks, hyper_linear, adam_delta, adam_ahead, adam_step_),
)
every_op = pytest.mark.parametrize("draw_call", CALLS, ids=lambda call: call.__name__)


def test_fuzz_covers_every_public_op():
    public = {name for name, f in vars(ops).items() if inspect.isfunction(f) and f.__module__ == ops.__name__}
    assert {call.__name__ for call in CALLS} == {name for name in public if not name.startswith("_")}


def evaluate(call: Call, tensors: Tensors, upstream: list[Tensor | None], bound: bool) -> list[Tensor]:
    """Outputs and, for those that ``upstream`` has a gradient for, gradients; by what is bound or by the reference."""
    with pytest.MonkeyPatch.context() as patch:
        for name in () if bound else ops.OPS:
            patch.setattr(ops, f"_{name}", getattr(reference, name))
        if not bound:
            tensors = tensors | {name: tensors[name].clone() for name in call.changed}
        leaves = {name: tensors[name].detach().requires_grad_() for name in call.differentiable}
        outputs = call.run(tensors | leaves)
        pairs = [(o, g) for o, g in zip(outputs, upstream, strict=False) if g is not None and o.requires_grad]
        detached = [o.detach() for o in outputs]
        if not pairs:
            return detached
        grads = torch.autograd.grad(
            [o for o, _ in pairs], [*leaves.values()], [g for _, g in pairs], allow_unused=True, materialize_grads=True
        )
        return [*detached, *grads]


def prepare(draw: Draw, call: Call, dtype: torch.dtype) -> tuple[Tensors, list[Tensor | None], list[Tensor | None]]:
    """The call's input laid in memory, and upstream gradients, some missing: clean, and laid."""
    laid = {
        name: lay(draw, t, t.dtype if stem(name) in KEPT or not t.is_floating_point() else dtype, name in call.changed)
        for name, t in call.tensors.items()
    }
    outputs = evaluate(call, call.tensors, [], bound=False)
    clean = [values(draw, *o.shape) if draw(small) else None for o in outputs] if call.differentiable else []
    return laid, clean, [None if g is None else lay(draw, g, dtype) for g in clean]


def memory(tensor: Tensor) -> Tensor:
    """All bytes of the tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@every_op
@hypothesis.given(data=st.data())
def test_fuzz_agrees_with_the_reference_and_leaves_input_alone(draw_call, dtype, data):
    call = draw_call(data.draw)
    laid, clean_upstream, upstream = prepare(data.draw, call, dtype)
    given = [*laid.values(), *(g for g in upstream if g is not None)]
    before = [memory(t).clone() for t in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=data.draw(st.booleans())):
        found = evaluate(call, laid, upstream, bound=True)
    for name in call.changed:
        laid[name].copy_(call.tensors[name])  # what lies around it must be as it was
    assert all(torch.equal(memory(t), was) for t, was in zip(given, before, strict=True))
    assert not {t.untyped_storage().data_ptr() for t in found if t.numel()} & {t.untyped_storage().data_ptr() for t in given}
    wanted = evaluate(call, call.tensors, clean_upstream, bound=False)
    scales = wanted
    if call.magnitudes:
        positive = [None if g is None else g.abs() for g in clean_upstream]
        scales = evaluate(call.magnitudes, call.magnitudes.tensors, positive, bound=False)
    for have, want, scale in zip(found, wanted, scales, strict=True):
        assert have.shape == want.shape and have.dtype in (dtype, want.dtype)
        assert relative_error(have, want, scale) < BOUND[dtype]


@every_op
@hypothesis.given(data=st.data(), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_fuzz_shows_what_is_not_finite(draw_call, dtype, data, bad):
    """What depends on the bad number, and is not finite by the reference, is not finite."""
    call = draw_call(data.draw)
    names = [name for name, t in call.tensors.items() if t.is_floating_point() and t.numel()]
    hypothesis.assume(names)
    name = data.draw(st.sampled_from(names))
    place = data.draw(st.integers(0, call.tensors[name].numel() - 1))
    bad, other = (
        call._replace(tensors=call.tensors | {name: call.tensors[name].flatten().index_fill(0, torch.tensor(place), x)})
        for x in (bad, 3.0)
    )
    for changed in (bad, other):
        changed.tensors[name] = changed.tensors[name].view(call.tensors[name].shape)
    laid, clean_upstream, upstream = prepare(data.draw, bad, dtype)
    found = evaluate(bad, laid, upstream, bound=True)
    wanted, before, after = (evaluate(c, c.tensors, clean_upstream, bound=False) for c in (bad, call, other))
    for have, want, was, becomes in zip(found, wanted, before, after, strict=True):
        assert not (have.isfinite() & ~want.isfinite() & (was != becomes)).any()


@every_op
@hypothesis.given(data=st.data())
def test_fuzz_refuses_wrong_shapes_and_dtypes(draw_call, data):
    call = draw_call(data.draw)
    laid, _, _ = prepare(data.draw, call, torch.float32)
    hypothesis.assume(laid)
    name = data.draw(st.sampled_from(sorted(laid)))
    tensor, wrong = laid[name], data.draw(st.sampled_from(["dtype", "dimension", "size"]))
    if wrong == "dtype":
        hypothesis.assume(not name.startswith("step"))  # any number will do
        others = {torch.float32, torch.float64, torch.int64, torch.int32} - {tensor.dtype}
        tensor = tensor.to(data.draw(st.sampled_from(sorted(others, key=str))))
    elif wrong == "dimension" or tensor.dim() == 0:
        hypothesis.assume(name not in ("targets[0]", "importance[0]") or f"{stem(name)}[1]" in laid)  # [1, P] will do
        tensor = tensor[None]
    else:
        hypothesis.assume(stem(name) not in ("targets", "importance", "x"))  # which may be longer
        tensor = torch.cat([tensor, tensor.new_zeros((*tensor.shape[:-1], 1))], -1)
    with pytest.raises(TypeError if wrong == "dtype" else ValueError, match=r"^\w+: .*\bmust\b|^\w+: .* is |^\w+: .* need "):
        call.run(laid | {name: tensor})


PLANNED = [call for call in CALLS if "plan" in inspect.signature(getattr(ops, call.__name__)).parameters]


@pytest.mark.parametrize("draw_call", PLANNED, ids=lambda call: call.__name__)
@hypothesis.given(data=st.data())
def test_fuzz_takes_or_refuses_any_plan_as_the_reference_does(draw_call, data):
    """Any seven integers are a rectangle inside the grid, or are refused."""
    call = draw_call(data.draw)
    bound = st.one_of(st.integers(-1, 6), st.sampled_from([-(2**63), -(2**32), 2**31, 2**32, 2**62, 2**63 - 1]))
    row = data.draw(st.lists(bound, min_size=7, max_size=7))
    tensors = {name: t for name, t in call.tensors.items() if name != "gram0"} | {"plan": torch.tensor([row])}
    try:
        wanted = evaluate(call, tensors, [], bound=False)
    except RuntimeError as error:
        found = re.search("leaves the grid|reaches", str(error))
        assert found
        with pytest.raises(RuntimeError, match=found[0]):
            call.run(tensors)
        return
    for have, want in zip(evaluate(call, tensors, [], bound=True), wanted, strict=True):
        assert relative_error(have, want, want + 1) < 1e-9
