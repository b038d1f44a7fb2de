"""What affine maps see of held embeddings, their moments, and the drift of one such map (DESIGN, Without a trunk)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasthyper import ops
from fasthyper.planner import by_moments


def sigma_points(embeddings: Tensor) -> Tensor:
    """``[2 E, E]`` of the same mean and covariance as ``[T, E]``; those themselves if they are no more.

    ``m ± sqrt(E λ_j) u_j``, of the mean m and the covariance's eigenvalues and eigenvectors: whatever is quadratic in an
    embedding has the same mean over them.
    """
    num_tasks, dim = embeddings.shape
    if num_tasks <= 2 * dim:
        return embeddings
    exact = embeddings.double()
    mean = exact.mean(0)
    values, vectors = torch.linalg.eigh((exact - mean).T @ (exact - mean) / num_tasks)
    away = (vectors * (dim * values.clamp(min=0)).sqrt()).T
    return torch.cat([mean + away, mean - away]).to(embeddings.dtype)


class AffineDrift:
    """Of weights ``V [e_t | 1]`` of past tasks, with nothing but ``V`` moving.

    Args:
        basis0:     V ``[P, E+1]`` at the snapshot.
        embeddings: ``[T, E]`` of the past tasks.
    """

    def __init__(self, basis0: Tensor, embeddings: Tensor):
        self._basis0 = basis0
        self._all = self._factors(embeddings, None)

    def penalty(self, basis: Tensor, embeddings: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """As ``value_and_grad``, differentiable in the basis."""
        return _Given.apply(basis, *self.value_and_grad(basis, embeddings, weight))

    @torch.no_grad()
    def value_and_grad(
        self, basis: Tensor, embeddings: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of squared drifts, and its gradient for the basis ``[P, E+1]``.

        Args:
            basis: V now.
            embeddings: ``[k, E]`` of those past tasks that are taken; ``None``: of all, weighted alike.
            weight: ``[k]``; ``None``: 1/k.

        Both in the dtype of ``basis``, dimensionless; the value ``[]`` is never negative, 0 without tasks.
        """
        with torch.autocast(basis.device.type, enabled=False):
            rows, weight, moments = self._all if embeddings is None else self._factors(embeddings, weight)
            if moments is not None:  # sum w |D x|^2 = <D, D sum w x x'>
                return ops.affine_drift_value_and_grad(basis, self._basis0, moments)
            drift = (basis - self._basis0) @ rows.T
            grad = (drift * (2 * weight)) @ rows
            return (drift.square_() @ weight).sum(), grad

    @staticmethod
    def _factors(embeddings: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows x = [e | 1], their weights and, where a product with it is cheaper than two with the rows, 2 sum w x x'."""
        rows = torch.cat([embeddings, embeddings.new_ones(len(embeddings), 1)], 1)
        weight = rows.new_full((len(rows),), 1 / max(1, len(rows))) if weight is None else weight
        if not by_moments(len(rows), embeddings.shape[1]):
            return rows, weight, None
        exact = rows.double()
        return rows, weight, ((2 * weight.double() * exact.T) @ exact).to(rows.dtype)


class _Given(torch.autograd.Function):
    """A value whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, basis: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None
