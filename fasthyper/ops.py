"""The ops: schemas, shape functions, autograd, and the validated public functions around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("fasthyper", "DEF")  # module level: must stay alive
LIBRARY.define(
    "_output_drift_fwd(Tensor dh, Tensor basis, Tensor h0, Tensor basis0, Tensor weight, Tensor plan, int precision=3)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "_hypernet_drift_fwd(Tensor[] theta, Tensor[] theta0, Tensor embeddings, Tensor embeddings0, Tensor[] pre0,"
    " Tensor gram0, Tensor weight, Tensor plan, int activation, int precision=3) -> (Tensor, Tensor, Tensor[])"
)
LIBRARY.define(
    "_target_drift_fwd(Tensor h, Tensor basis, Tensor[] snapshot, Tensor[] targets, Tensor[] importance, Tensor weight,"
    " Tensor plan) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("_affine_drift_fwd(Tensor basis, Tensor basis0, Tensor moments) -> (Tensor, Tensor)")
LIBRARY.define("_generate_fwd(Tensor h, Tensor basis, int num_weights) -> Tensor")
LIBRARY.define("_generate_bwd(Tensor[] grads, Tensor h, Tensor basis) -> (Tensor, Tensor)")
LIBRARY.define(
    "_hyper_linear_fwd(Tensor x, Tensor h, Tensor basis, int rows, int num_outputs, bool factorised) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "_hyper_linear_bwd(Tensor grad, Tensor x, Tensor h, Tensor basis, Tensor u, int rows, bool factorised, bool needs_x)"
    " -> (Tensor, Tensor, Tensor)"
)
_SETTINGS = "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled"
_ADAM = f"Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, {_SETTINGS}"
LIBRARY.define(f"_adam_delta_fwd({_ADAM}) -> Tensor")
LIBRARY.define(f"_adam_delta_bwd(Tensor grad_delta, {_ADAM}) -> (Tensor, Tensor)")
LIBRARY.define(
    "_adam_ahead(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] steps,"
    f" {_SETTINGS}, Tensor? rate=None) -> Tensor[]"
)
LIBRARY.define(
    "_adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor[] more_grads, float scale, Tensor(b!)[] exp_avgs,"
    f" Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, {_SETTINGS}, Tensor? healthy=None, Tensor? rate=None) -> ()"
)
LIBRARY.define("_packed_parts(Tensor like) -> int")

HALF = (torch.float16, torch.bfloat16)  # computed and returned in float32
PRECISIONS = {"highest": 3, "high": 2, "medium": 1}  # bfloat16 parts that float32 factors are split in, on tile units
OPS = (
    *("output_drift_fwd", "hypernet_drift_fwd", "target_drift_fwd", "affine_drift_fwd", "generate_fwd", "generate_bwd"),
    *("hyper_linear_fwd", "hyper_linear_bwd", "adam_delta_fwd", "adam_delta_bwd", "adam_ahead", "adam_step_"),
    "packed_parts",
)


@torch.library.register_fake("fasthyper::_output_drift_fwd", lib=LIBRARY)
def _output_drift_fwd_fake(dh, basis, h0, basis0, weight, plan, precision=3):
    return dh.new_empty(()), dh.new_empty(dh.shape), basis.new_empty(basis.shape)


@torch.library.register_fake("fasthyper::_hypernet_drift_fwd", lib=LIBRARY)
def _hypernet_drift_fwd_fake(theta, theta0, embeddings, embeddings0, pre0, gram0, weight, plan, activation, precision=3):
    return embeddings.new_empty(()), embeddings.new_empty(embeddings.shape), [p.new_empty(p.shape) for p in theta]


@torch.library.register_fake("fasthyper::_target_drift_fwd", lib=LIBRARY)
def _target_drift_fwd_fake(h, basis, *_):
    return h.new_empty(()), h.new_empty(h.shape), basis.new_empty(basis.shape)


@torch.library.register_fake("fasthyper::_affine_drift_fwd", lib=LIBRARY)
def _affine_drift_fwd_fake(basis, *_):
    return basis.new_empty(()), basis.new_empty(basis.shape)


@torch.library.register_fake("fasthyper::_generate_fwd", lib=LIBRARY)
def _generate_fwd_fake(h, basis, num_weights):
    return h.new_empty(num_weights)


@torch.library.register_fake("fasthyper::_generate_bwd", lib=LIBRARY)
def _generate_bwd_fake(grads, h, basis):
    return h.new_empty(h.shape), basis.new_empty(basis.shape)


@torch.library.register_fake("fasthyper::_hyper_linear_fwd", lib=LIBRARY)
def _hyper_linear_fwd_fake(x, h, basis, rows, num_outputs, factorised):
    u = x.new_empty(x.shape[0] if factorised else 0, rows, basis.shape[1])
    return x.new_empty(x.shape[0], num_outputs), u


@torch.library.register_fake("fasthyper::_hyper_linear_bwd", lib=LIBRARY)
def _hyper_linear_bwd_fake(grad, x, h, basis, u, rows, factorised, needs_x):
    return x.new_empty(x.shape[0] if needs_x else 0, x.shape[1]), h.new_empty(h.shape), basis.new_empty(basis.shape)


@torch.library.register_fake("fasthyper::_adam_delta_fwd", lib=LIBRARY)
def _adam_delta_fwd_fake(param, *_):
    return param.new_empty(param.shape)


@torch.library.register_fake("fasthyper::_adam_delta_bwd", lib=LIBRARY)
def _adam_delta_bwd_fake(grad_delta, param, *_):
    return param.new_empty(param.shape), param.new_empty(param.shape)


@torch.library.register_fake("fasthyper::_adam_ahead", lib=LIBRARY)
def _adam_ahead_fake(params, *_):
    return [param.new_empty(param.shape) for param in params]


@torch.library.register_fake("fasthyper::_adam_step_", lib=LIBRARY)
def _adam_step_fake(*_):
    return None


_output_drift_fwd = torch.ops.fasthyper._output_drift_fwd.default
_hypernet_drift_fwd = torch.ops.fasthyper._hypernet_drift_fwd.default
_target_drift_fwd = torch.ops.fasthyper._target_drift_fwd.default
_affine_drift_fwd = torch.ops.fasthyper._affine_drift_fwd.default
_generate_fwd = torch.ops.fasthyper._generate_fwd.default
_generate_bwd = torch.ops.fasthyper._generate_bwd.default
_hyper_linear_fwd = torch.ops.fasthyper._hyper_linear_fwd.default
_hyper_linear_bwd = torch.ops.fasthyper._hyper_linear_bwd.default
_adam_delta_fwd = torch.ops.fasthyper._adam_delta_fwd.default
_adam_delta_bwd = torch.ops.fasthyper._adam_delta_bwd.default
_adam_ahead = torch.ops.fasthyper._adam_ahead.default
_adam_step_ = torch.ops.fasthyper._adam_step_.default
_packed_parts = torch.ops.fasthyper._packed_parts.default


class _OutputDrift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dh, basis, h0, basis0, weight, plan, precision=3):
        value, *gradients = _output_drift_fwd(dh, basis, h0, basis0, weight, plan, precision)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_h, grad_basis = ctx.saved_tensors
        return grad * grad_h, grad * grad_basis, *[None] * 5


class _HypernetDrift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, embeddings0, gram0, weight, plan, activation, precision, num_theta, *tensors):
        theta, theta0, pre0 = tensors[:num_theta], tensors[num_theta : 2 * num_theta], tensors[2 * num_theta :]
        value, grad_embeddings, grad_theta = _hypernet_drift_fwd(
            theta, theta0, embeddings, embeddings0, pre0, gram0, weight, plan, activation, precision
        )
        ctx.save_for_backward(grad_embeddings, *grad_theta)
        ctx.num_constants = num_theta + len(pre0)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_embeddings, *grad_theta = (grad * gradient for gradient in ctx.saved_tensors)
        return grad_embeddings, *[None] * 7, *grad_theta, *[None] * ctx.num_constants


class _TargetDrift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, basis, weight, plan, num_snapshot, num_targets, *constants):
        snapshot, rest = constants[:num_snapshot], constants[num_snapshot:]
        value, *gradients = _target_drift_fwd(h, basis, snapshot, rest[:num_targets], rest[num_targets:], weight, plan)
        ctx.save_for_backward(*gradients)
        ctx.num_constants = 4 + len(constants)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_h, grad_basis = ctx.saved_tensors
        return grad * grad_h, grad * grad_basis, *[None] * ctx.num_constants


class _Generate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, basis, blocks):
        ctx.save_for_backward(h, basis)
        ctx.blocks = blocks
        ctx.set_materialize_grads(False)
        parts = []
        for chunks, cols, shapes in blocks:
            sizes = [shape.numel() for shape in shapes]
            flat = _generate_fwd(h[slice(*chunks)], basis[slice(*cols)], sum(sizes))
            parts += [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (h, basis), remaining, found = ctx.saved_tensors, iter(grads), []
        for chunks, cols, shapes in ctx.blocks:
            parts = [h.new_zeros(shape) if grad is None else grad for shape, grad in zip(shapes, remaining, strict=False)]
            found.append((chunks, cols, *_generate_bwd(parts, h[slice(*chunks)], basis[slice(*cols)])))
        grad_h = _sum_of_rows(h, [(chunks, part) for chunks, _, part, _ in found])
        grad_basis = _sum_of_rows(basis, [(cols, part) for _, cols, _, part in found])
        return grad_h, grad_basis, None


def _sum_of_rows(like, parts):
    """Parts, each of some rows of ``like``, added up; nothing is copied where one has all rows, and the others none."""
    (rows, total), *others = sorted(parts, key=lambda part: -part[1].shape[0])
    if total.shape != like.shape:
        total, others = torch.zeros_like(like), parts
    for rows, part in others:
        total[slice(*rows)] += part
    return total


class _HyperLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, basis, rows, num_outputs, factorised):
        y, u = _hyper_linear_fwd(x, h, basis, rows, num_outputs, factorised)
        ctx.save_for_backward(x, h, basis, u)
        ctx.order = rows, factorised
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_h, grad_basis = _hyper_linear_bwd(grad, *ctx.saved_tensors, *ctx.order, needs_x)
        return grad_x if needs_x else None, grad_h, grad_basis, None, None, None


class _AdamDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, param, grad, exp_avg, exp_avg_sq, step, *settings):
        ctx.save_for_backward(param, grad, exp_avg, exp_avg_sq, step)
        ctx.settings = settings
        return _adam_delta_fwd(param, grad, exp_avg, exp_avg_sq, step, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_delta):
        grads = _adam_delta_bwd(grad_delta.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return *grads, *[None] * 9


def output_drift(
    dh: Tensor,
    basis: Tensor,
    h0: Tensor,
    basis0: Tensor,
    plan: Tensor,
    *,
    weight: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """Weighted squared drift of the weights generated for past tasks, without generating them (DESIGN E2).

    Args:
        dh:     ``[T, N, H]`` drift of the past tasks' trunk features since the snapshot. Taken as such because the
                difference of two float32 features has lost the digits of a small step.
        basis:  ``[S, H+1]`` shared basis now; its last column is the bias.
        h0:     ``[T, N, H]`` the features at the snapshot; not differentiated.
        basis0: ``[S, H+1]`` the basis at the snapshot; not differentiated.
        plan:   ``[B, 7]`` int64 on the CPU, rectangles of real weights, from ``planner.drift_plan``.
        weight: ``[T]`` weight of each task; ``None`` means 1/T each, the mean over past tasks.
        precision: of products of float32 matrices, ``"highest"``, ``"high"`` or ``"medium"``, as in
                ``torch.set_float32_matmul_precision``: what is allowed, used where the CPU has tile units for bfloat16.

    Returns:
        Scalar ``[]``, never negative, dimensionless, in the dtype of ``dh`` (float32 for half types); 0 when ``T == 0``.

    Raises:
        ValueError: shapes disagree, or unknown ``precision``.  TypeError: dtypes differ or are not floating point.
        RuntimeError: a rectangle leaves the grid.

    Value and gradients are made in the same call. Products are taken in the dtype of ``dh`` and their Gram matrices summed
    in float64. The order of summation is fixed for a given number of threads. Second derivatives raise.
    """
    return _OutputDrift.apply(*_checked_output_drift(dh, basis, h0, basis0, plan, weight, precision))


@torch.no_grad()
def output_drift_value_and_grad(
    dh: Tensor,
    basis: Tensor,
    h0: Tensor,
    basis0: Tensor,
    plan: Tensor,
    *,
    weight: Tensor | None = None,
    precision: str = "highest",
) -> tuple[Tensor, Tensor, Tensor]:
    """``output_drift`` without a graph: its value, its gradients for ``dh`` and for ``basis``, made in one call.

    Arguments and errors are those of ``output_drift``; for half types the gradients are float32, too.
    """
    return _output_drift_fwd(*_checked_output_drift(dh, basis, h0, basis0, plan, weight, precision))


def _checked_output_drift(
    dh: Tensor, basis: Tensor, h0: Tensor, basis0: Tensor, plan: Tensor, weight: Tensor | None, precision: str
) -> tuple[Any, ...]:
    """What the op takes, after the checks of ``output_drift``."""
    tensors = {"dh": dh, "basis": basis, "h0": h0, "basis0": basis0} | ({} if weight is None else {"weight": weight})
    _check_dtypes("output_drift", **tensors)
    _check_shape("output_drift", "dh", dh, ("T", "N", "H"))
    width = dh.shape[2]
    _check_shape("output_drift", "basis", basis, ("S", width + 1))
    _check_shape("output_drift", "h0", h0, dh.shape)
    _check_shape("output_drift", "basis0", basis0, basis.shape)
    _check_plan("output_drift", plan)
    if dh.dtype in HALF:
        dh, basis, h0, basis0 = (x.float() for x in (dh, basis, h0, basis0))
    weight = _task_weight("output_drift", weight, dh)
    return dh, basis, h0.detach(), basis0.detach(), weight, plan, _parts("output_drift", precision)


def hypernet_drift(
    theta: Sequence[Tensor],
    theta0: Sequence[Tensor],
    embeddings: Tensor,
    embeddings0: Tensor,
    pre0: Sequence[Tensor],
    plan: Tensor,
    *,
    activation: int,
    weight: Tensor | None = None,
    gram0: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """``output_drift`` with the trunk before it: nothing of the size of all features is made (DESIGN E5).

    Args:
        theta:       chunk embeddings ``[N, Z]``, weight ``[o, i]`` and bias ``[o]`` of each trunk layer, basis ``[S, H+1]``.
        theta0:      the same at the snapshot; not differentiated.
        embeddings:  ``[T, E]`` of the past tasks.
        embeddings0: ``[T, E]`` at the snapshot; not differentiated.
        pre0:        of the last trunk layers, the first one excepted, which separates into T + N rows: pre-activations
                     ``[T, N, o]`` at the snapshot. Those of layers that it lacks are made again each time.
        plan:        ``[B, 7]`` int64 on the CPU, rectangles of real weights, from ``planner.drift_plan``.
        activation:  code of an ``activations.Activation``.
        weight:      ``[T]`` weight of each task; ``None`` means 1/T each.
        gram0:       ``[B, H+1, H+1]`` float64, ``reference.gram0`` for this weight and plan, to spare its computation;
                     behind it, end to end, there may be ``reference.basis_gram0`` for this plan. Without a trunk only the
                     latter is read.
        precision:   as in ``output_drift``.

    Returns:
        Scalar ``[]``, never negative, dimensionless, in the dtype of ``embeddings``; 0 when ``T == 0``.

    Raises:
        ValueError: shapes disagree, or unknown ``precision``.
        TypeError: dtypes differ, or are other than float32 and float64.
        RuntimeError: a rectangle leaves the grid, or gram0 holds another number of matrices.

    The drift of the features is exact to rounding however small the step. Second derivatives raise.
    """
    checked = _check_hypernet_drift(theta, theta0, embeddings, embeddings0, pre0, plan, weight, gram0)
    constants = [t.detach() for t in (*theta0, *pre0)]
    settings = activation, _parts("hypernet_drift", precision), len(theta)
    return _HypernetDrift.apply(embeddings, embeddings0.detach(), *checked, plan, *settings, *theta, *constants)


@torch.no_grad()
def hypernet_drift_value_and_grad(
    theta: Sequence[Tensor],
    theta0: Sequence[Tensor],
    embeddings: Tensor,
    embeddings0: Tensor,
    pre0: Sequence[Tensor],
    plan: Tensor,
    *,
    activation: int,
    weight: Tensor | None = None,
    gram0: Tensor | None = None,
    precision: str = "highest",
) -> tuple[Tensor, list[Tensor], Tensor]:
    """``hypernet_drift`` without a graph: its value, its gradients for ``theta`` and for ``embeddings``, made in one call.

    Arguments and errors are those of ``hypernet_drift``.
    """
    gram0, weight = _check_hypernet_drift(theta, theta0, embeddings, embeddings0, pre0, plan, weight, gram0)
    value, grad_embeddings, grad_theta = _hypernet_drift_fwd(
        theta, theta0, embeddings, embeddings0, pre0, gram0, weight, plan, activation, _parts("hypernet_drift", precision)
    )
    return value, grad_theta, grad_embeddings


def target_drift(
    h: Tensor,
    basis: Tensor,
    plan: Tensor,
    *,
    h0: Tensor | None = None,
    basis0: Tensor | None = None,
    targets: Tensor | Sequence[Tensor] | None = None,
    importance: Tensor | Sequence[Tensor] | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Squared drift with a factor of its own for each generated weight, or from targets of one's own.

    ``sum_t weight_t sum_p importance_tp (w_tp - target_tp)^2`` over the weights p in the plan's rectangles; weight p of task
    t is row ``p % S`` of ``basis`` times ``[h[t, p // S] | 1]``.

    Args:
        h:          ``[T, N, H]`` features of the past tasks; where the target is the snapshot, their drift since (as ``dh``
                    of ``output_drift``).
        basis:      ``[S, H+1]`` shared basis now; its last column is the bias.
        plan:       ``[B, 7]`` int64 on the CPU, from ``planner.drift_plan``; the form it asks for does not matter here.
        h0, basis0: ``[T, N, H]`` and ``[S, H+1]``, the snapshot: its weights are the target. In place of ``targets``.
        targets:    ``[T, P]``, or T tensors ``[P]``, of any strides: read where they lie, never copied or changed.
        importance: the same, factors of 0 or more; ``None`` means 1.
        weight:     ``[T]`` weight of each task; ``None`` means 1/T each.

    Returns:
        Scalar ``[]`` in the dtype of ``h``, differentiable in ``h`` and ``basis``; 0 when ``T == 0``.

    Raises:
        ValueError: shapes disagree, or not exactly one of snapshot and targets is given.
        TypeError: dtypes differ, or are other than float32 and float64.
        RuntimeError: a rectangle leaves the grid, or reaches beyond P.

    Costs about 3 multiply-adds per weight and feature, as generating the weights and their backward do; memory is that of
    the features. The order of summation is fixed for a given number of threads. Second derivatives raise.
    """
    op = "target_drift"
    if (h0 is None) != (basis0 is None) or (h0 is None) == (targets is None):
        raise ValueError(f"{op}: give either targets, or both h0 and basis0")
    snapshot = [] if h0 is None or basis0 is None else [h0.detach(), basis0.detach()]
    named = {"h": h, "basis": basis} | dict(zip(("h0", "basis0"), snapshot, strict=False))
    rows = {"targets": _per_weight(targets), "importance": _per_weight(importance)}
    for name, given in rows.items():
        named |= {f"{name}[{i}]" if len(given) > 1 else name: row for i, row in enumerate(given)}
    _check_dtypes(op, **named, **({} if weight is None else {"weight": weight}))
    if h.dtype in HALF:
        raise TypeError(f"{op}: computes in float32 or float64, got {h.dtype}")
    _check_shape(op, "h", h, ("T", "N", "H"))
    _check_shape(op, "basis", basis, ("S", h.shape[2] + 1))
    for name, value, like in zip(("h0", "basis0"), snapshot, (h, basis), strict=False):
        _check_shape(op, name, value, like.shape)
    for name, given in rows.items():
        _check_per_weight(op, name, given, h.shape[0])
    _check_plan(op, plan)
    constants = (*snapshot, *rows["targets"], *rows["importance"])
    weight = _task_weight(op, weight, h)
    return _TargetDrift.apply(h, basis, weight, plan, len(snapshot), len(rows["targets"]), *constants)


def affine_drift_value_and_grad(basis: Tensor, basis0: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Squared drift of weights ``V x`` whose inputs are held, ``sum_t w_t |(V - V0) x_t|^2``, and its gradient for V.

    Args:
        basis, basis0: ``[P, K]``, V now and at the snapshot.
        moments:       ``[K, K]``, symmetric: ``2 sum_t w_t x_t x_t'``.

    Returns:
        ``<D, D moments> / 2`` ``[]``, never negative, and ``D moments`` ``[P, K]`` with ``D = V - V0``, without a graph; in
        the dtype of ``basis``, for half types in float32.

    Raises:
        ValueError: shapes disagree.  TypeError: dtypes differ.

    ``P K^2`` multiply-adds; each basis is read once, and the order of summation is fixed for a given number of threads.
    """
    op = "affine_drift_value_and_grad"
    _check_dtypes(op, basis=basis, basis0=basis0, moments=moments)
    _check_shape(op, "basis", basis, ("P", "K"))
    _check_shape(op, "basis0", basis0, basis.shape)
    _check_shape(op, "moments", moments, [basis.shape[1]] * 2)
    if basis.dtype in HALF:
        basis, basis0, moments = (x.float() for x in (basis, basis0, moments))
    return _affine_drift_fwd(basis, basis0, moments)


def generate(h: Tensor, basis: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """All weights of a target network for one task, as views of one buffer (DESIGN E3).

    Args:
        h:      ``[N, H]`` trunk features of the task's chunks.
        basis:  ``[S, H+1]`` shared basis; its last column is the bias.
        shapes: shape of each target parameter, in the order in which they lie in the flat vector; P weights in all.

    Returns:
        One tensor per shape, in the dtype of ``h`` (float32 for half types): weight p of the flat vector is row
        ``p % S`` of ``basis`` times ``[h[p // S] | 1]``. One backward gathers all their gradients into one flat gradient.

    Raises:
        ValueError: shapes disagree, or P does not need exactly N chunks.
        TypeError: dtypes differ or are not floating point.
    """
    return generate_blocks(h, basis, [((0, h.shape[0]), (0, basis.shape[0]), shapes)])


def generate_blocks(
    h: Tensor, basis: Tensor, blocks: Sequence[tuple[tuple[int, int], tuple[int, int], Sequence[Sequence[int]]]]
) -> tuple[Tensor, ...]:
    """``generate`` for several blocks of the grid, with one backward for all of them.

    Args:
        h, basis: as in ``generate``.
        blocks: per block ``[start, stop)`` of its chunks, ``[start, stop)`` of its columns, and the shapes that it holds.

    Returns:
        One tensor per shape, those of a block as views of one buffer.

    Raises:
        ValueError: shapes disagree, or a block's weights do not need exactly its chunks.
        TypeError: dtypes differ or are not floating point.
    """
    _check_dtypes("generate", h=h, basis=basis)
    _check_shape("generate", "h", h, ("N", "H"))
    _check_shape("generate", "basis", basis, ("S", h.shape[1] + 1))
    checked = []
    for chunks, cols, shapes in blocks:
        sizes = tuple(torch.Size(shape) for shape in shapes)
        total, chunk_size, num_chunks = sum(size.numel() for size in sizes), cols[1] - cols[0], chunks[1] - chunks[0]
        if chunk_size == 0:
            raise ValueError("generate: basis must have at least one row")
        if not (num_chunks - 1) * chunk_size < total <= num_chunks * chunk_size:
            raise ValueError(
                f"generate: {total} target weights in chunks of {chunk_size} need {-(-total // chunk_size)} chunks, got "
                f"features of {num_chunks}"
            )
        checked.append((chunks, cols, sizes))
    if h.dtype in HALF:
        h, basis = h.float(), basis.float()
    return _Generate.apply(h, basis, tuple(checked))


def hyper_linear(x: Tensor, h: Tensor, basis: Tensor, *, rows: int, num_outputs: int, factorised: bool = False) -> Tensor:
    """``F.linear`` with a weight that chunks generate row by row, and that is never stored (DESIGN E3).

    Args:
        x:      ``[B, I]``.
        h:      ``[N, H]`` trunk features of the weight's chunks.
        basis:  ``[S, H+1]`` shared basis; its last column is the bias. The first ``rows * I`` of its rows are used.
        rows:   r, rows of the weight in a chunk.
        num_outputs: O, rows of the weight; the last chunk may hold fewer than r.
        factorised: ``y = (x V) [h | 1]'``; otherwise tiles of the weight are made, used and dropped. The numbers are the
            same but for rounding; ``planner.factorises`` says which costs less.

    Returns:
        ``[B, O]`` in the dtype of ``x`` (float32 for half types; that of ``h`` under autocast): output ``n r + j`` is
        ``sum_i x[b, i] basis[j I + i] [h[n] | 1]``. No gradient of the weight is stored either; that of ``x`` is made only
        where it is needed. Second derivatives raise.

    Raises:
        ValueError: shapes disagree, or O does not need exactly N chunks.
        TypeError: dtypes differ or are not floating point.
    """
    op = "hyper_linear"
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(h.dtype)
    _check_dtypes(op, x=x, h=h, basis=basis)
    _check_shape(op, "h", h, ("N", "H"))
    _check_shape(op, "basis", basis, ("S", h.shape[1] + 1))
    _check_shape(op, "x", x, ("B", "I"))
    if x.shape[1] < 1 or rows * x.shape[1] > basis.shape[0]:
        raise ValueError(f"{op}: {rows} rows of {x.shape[1]} inputs do not fit a basis of {basis.shape[0]} columns")
    if num_outputs < 1 or not (h.shape[0] - 1) * rows < num_outputs <= h.shape[0] * rows:
        raise ValueError(f"{op}: {h.shape[0]} chunks of {rows} rows do not make exactly {num_outputs} outputs")
    if x.dtype in HALF:
        x, h, basis = x.float(), h.float(), basis.float()
    return _HyperLinear.apply(x, h, basis, rows, num_outputs, factorised)


def adam_delta(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> Tensor:
    """The step Adam would take, without taking it: moments and parameter stay as they are (DESIGN E4).

    Args:
        param, grad: any shape; ``param`` matters only with weight decay.
        exp_avg, exp_avg_sq: first and second moments before the step, of the same shape; not differentiated.
        step: scalar tensor, number of steps taken before (as in ``torch.optim``'s state).
        lr, betas, eps, weight_decay: as in ``torch.optim.Adam``.
        decoupled: weight decay as in AdamW.

    Returns:
        The change of ``param``, same shape and dtype; differentiable in ``param`` and ``grad``.

    Raises:
        ValueError: shapes disagree.  TypeError: dtypes differ or are not floating point.
    """
    _check_dtypes("adam_delta", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for name, value in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_shape("adam_delta", name, value, param.shape)
    _check_shape("adam_delta", "step", step, ())
    if step.device != param.device:
        _check_not_captured("adam_delta", "step")
    settings = (lr, *betas, eps, weight_decay, decoupled)
    return _AdamDelta.apply(param, grad, exp_avg.detach(), exp_avg_sq.detach(), step, *settings)


@torch.no_grad()
def adam_ahead(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> list[Tensor]:
    """``param + adam_delta(param, ...)`` for many parameters, in one pass over all (DESIGN E4); no graph is recorded.

    Args:
        params, grads: of any shapes, one dtype, on one device.
        exp_avgs, exp_avg_sqs: moments before the step, shaped like the parameters.
        steps: scalar tensors, number of steps taken before; with the parameters, or on the CPU and outside CUDA graphs.
        lr: as in ``adam_delta``, or a float64 ``[]`` on the parameters' device, which is read there, without a sync.
        betas, eps, weight_decay, decoupled: as in ``adam_delta``.

    Raises:
        ValueError: lengths, shapes or devices disagree.  TypeError: dtypes differ or are not float32 or float64.
    """
    _check_lists("adam_ahead", params, steps, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    lr, rate = _split_rate("adam_ahead", lr, params)
    return _adam_ahead(params, grads, exp_avgs, exp_avg_sqs, steps, lr, *betas, eps, weight_decay, decoupled, rate)


@torch.no_grad()
def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    more_grads: Sequence[Tensor],
    scale: float,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    healthy: Tensor | None = None,
) -> None:
    """Takes the step of Adam on ``grads + scale * more_grads`` in place, in one pass over all (DESIGN E4).

    Args:
        params, exp_avgs, exp_avg_sqs: contiguous, of any shapes, one dtype, on one device; updated.
        grads, more_grads: shaped like the parameters; ``more_grads`` may be empty.
        steps: as in ``adam_ahead``, of float32 or float64; one more afterwards.
        lr: as in ``adam_ahead``.
        betas, eps, weight_decay, decoupled: as in ``adam_delta``.
        healthy: bool ``[]`` on their device; where it is false nothing changes. It is read there, without a sync, and so
            needs ``steps`` there too.

    Raises:
        ValueError: lengths, shapes or devices disagree, or what is to be updated is not contiguous.
        TypeError: dtypes differ or are not float32 or float64.
    """
    more = {"more_grads": more_grads} if more_grads else {}
    _check_lists("adam_step_", params, steps, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, **more)
    for name, tensors in (("params", params), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        for i, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                raise ValueError(f"adam_step_: {name}[{i}] is updated in place and must be contiguous")
    for i, step in enumerate(steps):
        if step.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"adam_step_: steps[{i}] is updated in place and must be float32 or float64, got {step.dtype}")
    if healthy is not None:
        _check_shape("adam_step_", "healthy", healthy, ())
        if healthy.dtype != torch.bool:
            raise TypeError(f"adam_step_: healthy must be bool, got {healthy.dtype}")
        for name, tensor in [("params[0]", p) for p in params[:1]] + [(f"steps[{i}]", step) for i, step in enumerate(steps)]:
            if tensor.device != healthy.device:
                raise ValueError(f"adam_step_: {name} is on {tensor.device}, healthy on {healthy.device}; move one")
    lr, rate = _split_rate("adam_step_", lr, params)
    settings = (lr, *betas, eps, weight_decay, decoupled)
    _adam_step_(params, grads, more_grads, scale, exp_avgs, exp_avg_sqs, steps, *settings, healthy, rate)
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps])


def _check_not_captured(op: str, name: str) -> None:
    """A count of steps on the CPU is read once, at the capture."""
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{op}: {name} is on the CPU, a CUDA graph needs it with the parameters; move it")


def _split_rate(op: str, lr: float | Tensor, params: Sequence[Tensor]) -> tuple[float, Tensor | None]:
    """A number, and what multiplies it on the device."""
    if not isinstance(lr, Tensor):
        return lr, None
    _check_shape(op, "lr", lr, ())
    if lr.dtype != torch.float64 or (params and lr.device != params[0].device):
        raise ValueError(f"{op}: lr, if a tensor, must be float64 and with the parameters, got {lr.dtype} on {lr.device}")
    return 1.0, lr


def _check_lists(op: str, params: Sequence[Tensor], steps: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    for name, tensors in {"steps": steps, **lists}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {len(params)} params, but {len(tensors)} {name}")
    for i, param in enumerate(params):
        like, first = (param.shape, param.dtype, param.device), (params[0].dtype, params[0].device)
        if all((t[i].shape, t[i].dtype, t[i].device) == like for t in lists.values()) and like[1:] == first:
            continue  # what follows finds the words, which takes longer than a small step
        _check_dtypes(op, **{"params[0]": params[0], f"params[{i}]": param}, **{f"{k}[{i}]": t[i] for k, t in lists.items()})
        for name, tensors in lists.items():
            _check_shape(op, f"{name}[{i}]", tensors[i], param.shape)
    for i, step in enumerate(steps):
        if step.dim():
            _check_shape(op, f"steps[{i}]", step, ())
        if step.device != params[0].device:
            if not step.is_cpu:
                raise ValueError(f"{op}: steps[{i}] is on {step.device}, params[0] on {params[0].device}; move one")
            _check_not_captured(op, f"steps[{i}]")
    if params and params[0].dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: computes in float32 or float64, got {params[0].dtype}")


def _check_hypernet_drift(theta, theta0, embeddings, embeddings0, pre0, plan, weight, gram0):
    """Raises as ``hypernet_drift`` says; returns gram0, empty where none is given, and the tasks' weights."""
    op, num_layers = "hypernet_drift", len(theta) // 2 - 1
    if len(theta) < 2 or len(theta) % 2 or len(theta0) != len(theta):
        raise ValueError(f"{op}: theta and theta0 need 2 tensors and 2 per layer each, got {len(theta)} and {len(theta0)}")
    most = max(0, num_layers - 1)
    if len(pre0) > most:
        raise ValueError(f"{op}: pre0 may hold {most} pre-activations of {num_layers} layers, got {len(pre0)}")
    lacking = num_layers - len(pre0)
    named = {"embeddings": embeddings, "embeddings0": embeddings0}
    named |= {f"theta[{i}]": p for i, p in enumerate(theta)} | {f"theta0[{i}]": p for i, p in enumerate(theta0)}
    named |= {f"pre0[{i}]": a for i, a in enumerate(pre0)} | ({} if weight is None else {"weight": weight})
    _check_dtypes(op, **named)
    if embeddings.dtype in HALF:
        raise TypeError(f"{op}: computes in float32 or float64, got {embeddings.dtype}")
    _check_shape(op, "embeddings", embeddings, ("T", "E"))
    _check_shape(op, "embeddings0", embeddings0, embeddings.shape)
    _check_shape(op, "theta[0]", theta[0], ("N", "Z"))
    num_tasks, num_chunks = len(embeddings), len(theta[0])
    width = embeddings.shape[1] + theta[0].shape[1]
    for i in range(num_layers):
        _check_shape(op, f"theta[{2 * i + 1}]", theta[2 * i + 1], ("o", width))
        width = theta[2 * i + 1].shape[0]
        _check_shape(op, f"theta[{2 * i + 2}]", theta[2 * i + 2], (width,))
        if i >= lacking:
            _check_shape(op, f"pre0[{i - lacking}]", pre0[i - lacking], (num_tasks, num_chunks, width))
    _check_shape(op, f"theta[{len(theta) - 1}]", theta[-1], ("S", width + 1))
    for i, p in enumerate(theta0):
        _check_shape(op, f"theta0[{i}]", p, theta[i].shape)
    _check_plan(op, plan)
    if gram0 is None:
        gram0 = embeddings.new_empty((0, width + 1, width + 1), dtype=torch.float64)
    else:
        _check_shape(op, "gram0", gram0[: plan.shape[0]] if gram0.dim() else gram0, (plan.shape[0], width + 1, width + 1))
        if gram0.dtype != torch.float64 or gram0.device != embeddings.device:
            raise TypeError(f"{op}: gram0 must be float64 on {embeddings.device}, got {gram0.dtype} on {gram0.device}")
    return gram0, _task_weight(op, weight, embeddings)


def _parts(op: str, precision: str) -> int:
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return PRECISIONS[precision]


def _per_weight(given: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    rows = [] if given is None else [given] if isinstance(given, Tensor) else given
    return [row.detach() for row in rows]


def _check_per_weight(op: str, name: str, rows: Sequence[Tensor], num_tasks: int) -> None:
    """One tensor ``[T, P]``, or T tensors ``[P]``, or nothing."""
    if len(rows) == 1 and rows[0].dim() == 2:
        _check_shape(op, name, rows[0], (num_tasks, "P"))
    elif rows:
        if len(rows) != num_tasks:
            raise ValueError(f"{op}: {name} must be one tensor [T, P] or {num_tasks} tensors [P], got {len(rows)}")
        for i, row in enumerate(rows):
            _check_shape(op, f"{name}[{i}]", row, ("P",))


def _check_plan(op: str, plan: Tensor) -> None:
    _check_shape(op, "plan", plan, ("B", 7))
    if plan.dtype != torch.int64 or plan.device.type != "cpu":
        raise TypeError(f"{op}: plan must be int64 on the CPU, got {plan.dtype} on {plan.device}")


def _task_weight(op: str, weight: Tensor | None, rows: Tensor) -> Tensor:
    """``[T]`` in the dtype of ``rows`` ``[T, ...]``; 1/T each where ``weight`` is not given."""
    if weight is None:
        weight = rows.new_ones(rows.shape[0])
        return weight / weight.sum().clamp(min=1)  # a number made from T would tie a compiled graph to it
    _check_shape(op, "weight", weight, (rows.shape[0],))
    return weight.detach().to(rows.dtype)


def _check_dtypes(op: str, **tensors: Tensor) -> None:
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, {next(iter(tensors))} is {first.dtype}; cast one of them")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {next(iter(tensors))} on {first.device}; move one")


def _check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """``expected`` holds sizes, and letters where any size will do."""
    fits = tensor.dim() == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        want = ", ".join(str(size) for size in expected)
        raise ValueError(f"{op}: {name} must have shape [{want}], got {list(tensor.shape)}")
