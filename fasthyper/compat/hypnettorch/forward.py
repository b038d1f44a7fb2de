"""The forward pass of hypnettorch's ``HMLP`` and ``ChunkedHMLP``, and its way back without a copy of all weights per tensor.

All weights come from one product, as there, and are handed out as views; one backward lays the gradients of all views end to
end, once, for its two products. Autograd, which sees slices of that product in hypnettorch, makes a tensor of zeros of the
size of all weights for each of them, and adds them up. The products are plain aten: ``ops.generate`` would want weight and
bias of the output layer in one tensor, and copying them there and back costs more than it saves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fasthyper.compat.hypnettorch.calls import FAST, GENERAL, record

Forward = Callable[..., Any]


class _Views(torch.autograd.Function):
    """``linear(h, weight, bias)`` ``[B * N, S]`` as the tensors of B target networks, one network after another."""

    @staticmethod
    def forward(
        ctx: Any, name: str, shapes: Sequence[Sequence[int]], batch: int, h: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(h, weight)
        ctx.name, ctx.sizes, ctx.batch = name, [math.prod(shape) for shape in shapes], batch
        ctx.set_materialize_grads(False)
        return tuple(w for weights in _views(F.linear(h, weight, bias).view(batch, -1), shapes) for w in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # of aten's, so that it has a derivative itself
        with record(ctx.name, FAST):
            h, weight = ctx.saved_tensors
            count, rows, chunk_size = len(ctx.sizes), len(h), len(weight)
            padding = rows * chunk_size // ctx.batch - sum(ctx.sizes)
            tail = [h.new_zeros(padding)] if padding else []
            parts = []
            for b in range(ctx.batch):
                some = zip(ctx.sizes, grads[b * count : (b + 1) * count], strict=True)
                parts += [h.new_zeros(size) if grad is None else grad.flatten() for size, grad in some] + tail
            flat = torch.cat(parts).view(rows, chunk_size)
            _, _, _, needs_h, needs_weight, needs_bias = ctx.needs_input_grad
            return (
                *(None, None, None),
                flat @ weight if needs_h else None,
                flat.t() @ h if needs_weight else None,
                flat.sum(0) if needs_bias else None,
            )


def fast_hmlp(original: Forward) -> Forward:
    """``HMLP.forward``, accelerated; what it does not know goes to ``original``."""
    from hypnettorch.hnets import HyperNetInterface

    @functools.wraps(original)
    def forward(
        self: Any,
        uncond_input: Tensor | None = None,
        cond_input: Tensor | None = None,
        cond_id: int | list[int] | None = None,
        weights: Any = None,
        distilled_params: Any = None,
        condition: Any = None,
        ret_format: str = "squeezed",
    ) -> Any:
        given = {"uncond_input": uncond_input, "cond_input": cond_input, "cond_id": cond_id, "weights": weights}
        given |= {"distilled_params": distilled_params, "condition": condition, "ret_format": ret_format}
        if _general() or type(self)._flat_to_ret_format is not HyperNetInterface._flat_to_ret_format:
            with record("HMLP.forward", GENERAL):
                return original(self, **given)
        with record("HMLP.forward", FAST):
            uncond, cond, theta, _ = self._preprocess_forward_args(**given)
            parts = _checked([(uncond, self._uncond_in_size), (cond, self._cond_in_size)])
            if parts is None:
                return original(self, **given)  # which says what is wrong
            rows = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            return _generate("HMLP.backward", self, rows, theta, condition, len(rows), self.target_shapes, ret_format)

    return forward


def fast_chunked_hmlp(original: Forward) -> Forward:
    """``ChunkedHMLP.forward``, accelerated; what it does not know goes to ``original``."""
    from hypnettorch.hnets import HMLP, HyperNetInterface

    @functools.wraps(original)
    def forward(
        self: Any,
        uncond_input: Tensor | None = None,
        cond_input: Tensor | None = None,
        cond_id: int | list[int] | None = None,
        weights: Any = None,
        distilled_params: Any = None,
        condition: Any = None,
        ret_format: str = "squeezed",
    ) -> Any:
        given = {"uncond_input": uncond_input, "cond_input": cond_input, "cond_id": cond_id, "weights": weights}
        given |= {"distilled_params": distilled_params, "condition": condition, "ret_format": ret_format}
        own_format = type(self)._flat_to_ret_format is not HyperNetInterface._flat_to_ret_format
        if _general() or own_format or type(self._hnet) is not HMLP:
            with record("ChunkedHMLP.forward", GENERAL):
                return original(self, **given)
        with record("ChunkedHMLP.forward", FAST):
            found = _chunk_rows(self, given)
            if found is None:
                return original(self, **given)  # which says what is wrong
            rows, theta, batch = found
            return _generate(
                "ChunkedHMLP.backward", self._hnet, rows, theta, condition, batch, self.target_shapes, ret_format
            )

    return forward


def _general() -> bool:
    """Whether what runs now is more than autograd's plain recording, which is all that ``_Views`` knows."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def _checked(inputs: Sequence[tuple[Tensor | None, int]]) -> list[Tensor] | None:
    """The inputs that are given, where those wanted are, ``[B, size]`` each."""
    parts = [part for part, _ in inputs if part is not None]
    wanted = all(size == 0 if part is None else part.dim() == 2 and part.shape[1] == size for part, size in inputs)
    return parts if wanted and parts and all(len(part) == len(parts[0]) for part in parts) else None


def _chunk_rows(self: Any, given: dict[str, Any]) -> tuple[Tensor, Sequence[Tensor], int] | None:
    """Of a ``ChunkedHMLP``: inputs ``[B * N, ...]`` of its inner network, that network's parameters, and B.

    ``None`` where the arguments do not fit together.
    """
    weights, cond_id, chunk_embs = given["weights"], given["cond_id"], None
    if isinstance(weights, dict) and "chunk_embs" in weights:
        chunk_embs = weights["chunk_embs"]
        weights = {key: value for key, value in weights.items() if key != "chunk_embs"} or None  # the caller's stays whole
        if not self._cond_chunk_embs or cond_id is not None:
            return None
    if self._cond_chunk_embs and given["cond_input"] is not None and chunk_embs is None:
        return None
    uncond, cond, theta, cond_weights = self._preprocess_forward_args(
        _input_required=self._cond_in_size > 0 or self._uncond_in_size > 0,
        _parse_cond_id_fct=(lambda *_: None) if self._cond_chunk_embs else None,
        **{**given, "weights": weights},
    )
    if self._cond_chunk_embs:
        if cond_id is not None:
            ids, count = ([cond_id] if isinstance(cond_id, int) else cond_id), self._num_cond_embs
            if not ids or cond_weights is None or min(ids) < 0 or max(ids) >= count:
                return None
            chunk_embs = torch.stack([cond_weights[i - count] for i in ids])
            if self._cond_in_size > 0:
                cond = torch.stack([cond_weights[i] for i in ids])
    else:
        theta, chunk_embs = theta[:-1], theta[-1][None]
    num_chunks = -(-_num_weights(self.target_shapes) // self._chunk_size)
    if chunk_embs is None or chunk_embs.shape[1:] != (num_chunks, self._chunk_emb_size):
        return None
    inputs = [(uncond, self._uncond_in_size), (cond, self._cond_in_size)]
    inputs = [(part, size) for part, size in inputs if size or part is not None]
    if inputs and _checked(inputs) is None:
        return None
    batch = len(inputs[0][0]) if inputs else len(chunk_embs)
    if self._cond_chunk_embs and len(chunk_embs) != batch:
        return None
    parts = [None if part is None else part[:, None].expand(-1, num_chunks, -1) for part in (uncond, cond)]
    parts.insert(1, chunk_embs.expand(batch, -1, -1))
    return torch.cat([part for part in parts if part is not None], 2).view(batch * num_chunks, -1), theta, batch


def _generate(
    name: str,
    net: Any,
    h: Tensor,
    theta: Sequence[Tensor],
    condition: Any,
    batch: int,
    shapes: Sequence[Sequence[int]],
    ret_format: str,
) -> Any:
    """Through the ``HMLP`` ``net`` with parameters ``theta``, from inputs ``[B * N, ...]`` to what ``forward`` returns."""
    named: dict[str, list[Any]] = {"weight": [], "bias": [], "bn_scale": [], "bn_shift": []}
    meta = net.param_shapes_meta
    for index, parameter in zip(net.unconditional_param_shapes_ref, theta, strict=True):
        named[meta[index]["name"]].append(parameter)
    biases = named["bias"] if net.has_bias else [None] * len(named["weight"])
    for i, (weight, bias) in enumerate(zip(named["weight"][:-1], biases, strict=False)):
        h = F.linear(h, weight, bias)
        if net._use_batch_norm:
            scale, shift = named["bn_scale"][i], named["bn_shift"][i]
            h = net.batchnorm_layers[i].forward(h, weight=scale, bias=shift, stats_id=condition)
        if net._dropout_rate != -1:
            h = net._dropout(h)
        if net._act_fn is not None:
            h = net._act_fn(h)
    last = h, named["weight"][-1], biases[-1]
    if ret_format == "flattened":
        return F.linear(*last).view(batch, -1)[:, : _num_weights(shapes)]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in last):
        flat = _Views.apply(name, shapes, batch, *last)
        views = [list(flat[i : i + len(shapes)]) for i in range(0, len(flat), len(shapes))]
    else:
        views = _views(F.linear(*last).view(batch, -1), shapes)
    return views[0] if ret_format == "squeezed" and batch == 1 else views


def _views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """Rows of all weights, and maybe more behind them, as tensors of these shapes, row by row."""
    sizes = [math.prod(shape) for shape in shapes]
    sizes.append(flat.shape[1] - sum(sizes))
    return [[part.view(tuple(shape)) for part, shape in zip(row.split(sizes), shapes, strict=False)] for row in flat]


def _num_weights(shapes: Sequence[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def values(parameters: nn.ParameterList | list[Tensor]) -> list[Tensor]:
    """The list's members, without a look-up by name for each."""
    found: list[Any] = list(parameters._parameters.values()) if isinstance(parameters, nn.ParameterList) else []
    return found if len(found) == len(parameters) else list(parameters)


def unconditional_params(self: Any) -> list[Tensor] | None:
    """The property of that name of ``HyperNetInterface``, for lists of any length."""
    if self.unconditional_params_ref is None:
        return None
    found = values(self.internal_params)
    return [found[i] for i in self.unconditional_params_ref]


def conditional_params(self: Any) -> list[Tensor] | None:
    """The property of that name of ``HyperNetInterface``, whose own takes time with the square of the number of tasks."""
    if self.internal_params is None:
        return None
    others = set(self.unconditional_params_ref or ())
    return [value for i, value in enumerate(values(self.internal_params)) if i not in others]


def conditional_param_shapes_ref(self: Any) -> list[int]:
    """The property of that name of ``HyperNetInterface``, likewise."""
    others = set(self.unconditional_param_shapes_ref)
    return [i for i in range(len(self.param_shapes)) if i not in others]
