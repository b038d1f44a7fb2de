"""The ops: schemas, shape functions, autograd, and the validated public functions around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("fasthyper", "DEF")  # module level: must stay alive
LIBRARY.define(
    "_output_drift_fwd(Tensor dh, Tensor basis, Tensor h0, Tensor basis0, Tensor weight, Tensor plan)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("_generate_fwd(Tensor h, Tensor basis, int num_weights) -> Tensor")
LIBRARY.define("_generate_bwd(Tensor grad, Tensor h, Tensor basis) -> (Tensor, Tensor)")
_ADAM = "Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, float lr, float beta1, float beta2"
_ADAM += ", float eps, float weight_decay, bool decoupled"
LIBRARY.define(f"_adam_delta_fwd({_ADAM}) -> Tensor")
LIBRARY.define(f"_adam_delta_bwd(Tensor grad_delta, {_ADAM}) -> (Tensor, Tensor)")

HALF = (torch.float16, torch.bfloat16)  # computed and returned in float32
OPS = ("output_drift_fwd", "generate_fwd", "generate_bwd", "adam_delta_fwd", "adam_delta_bwd")


@torch.library.register_fake("fasthyper::_output_drift_fwd", lib=LIBRARY)
def _output_drift_fwd_fake(dh, basis, h0, basis0, weight, plan):
    return dh.new_empty(()), dh.new_empty(dh.shape), basis.new_empty(basis.shape)


@torch.library.register_fake("fasthyper::_generate_fwd", lib=LIBRARY)
def _generate_fwd_fake(h, basis, num_weights):
    return h.new_empty(num_weights)


@torch.library.register_fake("fasthyper::_generate_bwd", lib=LIBRARY)
def _generate_bwd_fake(grad, h, basis):
    return h.new_empty(h.shape), basis.new_empty(basis.shape)


@torch.library.register_fake("fasthyper::_adam_delta_fwd", lib=LIBRARY)
def _adam_delta_fwd_fake(param, *_):
    return param.new_empty(param.shape)


@torch.library.register_fake("fasthyper::_adam_delta_bwd", lib=LIBRARY)
def _adam_delta_bwd_fake(grad_delta, param, *_):
    return param.new_empty(param.shape), param.new_empty(param.shape)


_output_drift_fwd = torch.ops.fasthyper._output_drift_fwd.default
_generate_fwd = torch.ops.fasthyper._generate_fwd.default
_generate_bwd = torch.ops.fasthyper._generate_bwd.default
_adam_delta_fwd = torch.ops.fasthyper._adam_delta_fwd.default
_adam_delta_bwd = torch.ops.fasthyper._adam_delta_bwd.default


class _OutputDrift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dh, basis, h0, basis0, weight, plan):
        value, *gradients = _output_drift_fwd(dh, basis, h0, basis0, weight, plan)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_h, grad_basis = ctx.saved_tensors
        return grad * grad_h, grad * grad_basis, None, None, None, None


class _Generate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, basis, shapes):
        sizes = [shape.numel() for shape in shapes]
        flat = _generate_fwd(h, basis, sum(sizes))
        ctx.save_for_backward(h, basis)
        ctx.shapes = shapes
        ctx.set_materialize_grads(False)
        return tuple(part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        h, basis = ctx.saved_tensors
        parts = [
            h.new_zeros(shape.numel()) if grad is None else grad.reshape(-1)
            for grad, shape in zip(grads, ctx.shapes, strict=True)
        ]
        grad_h, grad_basis = _generate_bwd(torch.cat(parts), h, basis)
        return grad_h, grad_basis, None


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
    dh: Tensor, basis: Tensor, h0: Tensor, basis0: Tensor, plan: Tensor, *, weight: Tensor | None = None
) -> Tensor:
    """Weighted squared drift of the weights generated for past tasks, without generating them (DESIGN E2).

    Args:
        dh:     ``[T, N, H]`` drift of the past tasks' trunk features since the snapshot. Taken as such because the
                difference of two float32 features has lost the digits of a small step; see ``trunk.TrunkSnapshot``.
        basis:  ``[S, H+1]`` shared basis now; its last column is the bias.
        h0:     ``[T, N, H]`` the features at the snapshot; not differentiated.
        basis0: ``[S, H+1]`` the basis at the snapshot; not differentiated.
        plan:   ``[B, 7]`` int64 on the CPU, rectangles of real weights, from ``planner.drift_plan``.
        weight: ``[T]`` weight of each task; ``None`` means 1/T each, the mean over past tasks.

    Returns:
        Scalar ``[]``, never negative, dimensionless, in the dtype of ``dh`` (float32 for half types); 0 when ``T == 0``.

    Raises:
        ValueError: shapes disagree.  TypeError: dtypes differ or are not floating point.
        RuntimeError: a rectangle leaves the grid.

    Value and gradients are made in the same call. Products are taken in the dtype of ``dh`` and their Gram matrices summed
    in float64. The order of summation is fixed for a given number of threads. Second derivatives raise.
    """
    tensors = {"dh": dh, "basis": basis, "h0": h0, "basis0": basis0} | ({} if weight is None else {"weight": weight})
    _check_dtypes("output_drift", **tensors)
    _check_shape("output_drift", "dh", dh, ("T", "N", "H"))
    num_tasks, _, width = dh.shape
    _check_shape("output_drift", "basis", basis, ("S", width + 1))
    _check_shape("output_drift", "h0", h0, dh.shape)
    _check_shape("output_drift", "basis0", basis0, basis.shape)
    if weight is not None:
        _check_shape("output_drift", "weight", weight, (num_tasks,))
    _check_shape("output_drift", "plan", plan, ("B", 7))
    if plan.dtype != torch.int64 or plan.device.type != "cpu":
        raise TypeError(f"output_drift: plan must be int64 on the CPU, got {plan.dtype} on {plan.device}")
    if dh.dtype in HALF:
        dh, basis, h0, basis0 = (x.float() for x in (dh, basis, h0, basis0))
    if weight is None:
        weight = dh.new_ones(num_tasks)
        weight = weight / weight.sum().clamp(min=1)  # a number made from num_tasks would tie a compiled graph to it
    weight = weight.to(dh.dtype)
    return _OutputDrift.apply(dh, basis, h0.detach(), basis0.detach(), weight.detach(), plan)


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
    _check_dtypes("generate", h=h, basis=basis)
    _check_shape("generate", "h", h, ("N", "H"))
    _check_shape("generate", "basis", basis, ("S", h.shape[1] + 1))
    sizes = tuple(torch.Size(shape) for shape in shapes)
    total, chunk_size = sum(size.numel() for size in sizes), basis.shape[0]
    if not (h.shape[0] - 1) * chunk_size < total <= h.shape[0] * chunk_size:
        raise ValueError(
            f"generate: {total} target weights in chunks of {chunk_size} need {-(-total // chunk_size)} chunks, got "
            f"features of {h.shape[0]}"
        )
    if h.dtype in HALF:
        h, basis = h.float(), basis.float()
    return _Generate.apply(h, basis, sizes)


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
    settings = (lr, *betas, eps, weight_decay, decoupled)
    return _AdamDelta.apply(param, grad, exp_avg.detach(), exp_avg_sq.detach(), step, *settings)


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
