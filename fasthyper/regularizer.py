"""The output regularizer: old tasks' weights held where they were when the current task began (DESIGN E1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fasthyper import ops, reference
from fasthyper.affine import AffineDrift, sigma_points
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.planner import default_budget, drift_plan, is_affine, stored_bytes
from fasthyper.trunk import full_precision, run_trunk, trunk_drift

_BYTES_AT_ONCE = 1 << 24  # of pre-activations, where they are not stored
_WORTH = 64  # what is made of T tasks saves steps over k of them a part: so much work as is done again in T / k steps


class OutputRegularizer:
    """Holds the weights generated for past tasks at a snapshot.

    Args:
        hnet: the hypernetwork.
        form: of the drift, ``"auto"``, ``"gram"`` or ``"direct"``; see ``planner.drift_plan``.
        precision: of products of float32 matrices in the drift, ``"highest"``, ``"high"`` or ``"medium"``; see
            ``ops.output_drift``.
        memory_budget: bytes that a snapshot may take for pre-activations of the trunk; ``None``: 48 MiB on a CPU, 256 MiB on
            a GPU. Those of T tasks are stored layer by layer, the last first, while they fit; the others are made again in
            each step, and all that grows with T beside them are embeddings.

    Raises:
        ValueError: unknown ``form`` or ``precision``, or a negative budget.

    Example::

        regularizer = fh.OutputRegularizer(hnet)
        regularizer.snapshot(num_past)                      # once, when a new task begins
        loss = task_loss + beta * regularizer.penalty()     # every step, with any optimizer
    """

    def __init__(
        self, hnet: ChunkedHypernet, form: str = "auto", *, precision: str = "highest", memory_budget: int | None = None
    ):
        if precision not in ops.PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(ops.PRECISIONS)}, got {precision!r}")
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"memory_budget must not be negative, got {memory_budget}")
        self.hnet = hnet
        self.form, self.precision, self.memory_budget = form, precision, memory_budget
        self.num_past = 0

    @torch.no_grad()
    def snapshot(
        self,
        past: int | Sequence[int],
        theta: Sequence[Tensor] | None = None,
        embeddings: Tensor | None = None,
        *,
        sampled: int | None = None,
    ) -> None:
        """Remembers what past tasks generate now: the basis and their features, never their weights.

        Args:
            past: T, for tasks ``0 .. T-1``; or T tasks, which are then tasks ``0 .. T-1`` to all other methods.
            theta: stands in for ``hnet.theta``, in the same order.
            embeddings: ``[T, E]``, stands in for the past tasks' embeddings.
            sampled: how many of them each step will take; ``None``: all. Of far more than that no features are made now, and
                those that a step takes are made in it: the cost of neither grows with T then, but for the embeddings.

        Raises:
            ValueError: fewer tasks than that.  IndexError: no such task.
        """
        if isinstance(past, int) and past > self.hnet.num_tasks:
            raise ValueError(f"snapshot of {past} past tasks, but the hypernetwork has {self.hnet.num_tasks}")
        self._tasks = range(past) if isinstance(past, int) else list(past)
        self.num_past, self._num_heads = len(self._tasks), self.hnet.target.num_heads
        self.theta0 = [p.detach().clone() for p in (self.hnet.theta if theta is None else theta)]
        self.embeddings0 = (self.hnet.embeddings(self._tasks) if embeddings is None else embeddings).detach().clone()
        self._all = self._plan(range(self.num_past))
        self._pre0: list[Tensor] = []
        self._gram0: Tensor | None = None
        is_worth_it = sampled is None or self.num_past <= _WORTH * sampled
        one_map = is_affine(self.hnet.layout, self.theta0[0].shape[1], self.theta0[1:-1]) and self.form == "auto"
        self._affine = AffineDrift(self.theta0[-1], self.embeddings0) if one_map else None
        self._held: dict[str, Any] = {}  # what stands in for all past tasks, of the arguments, while they are held
        if len(self.theta0) > 2:
            if is_worth_it:
                self._pre0, self._gram0 = self._run_trunk0(self.num_past)
        elif self._affine is None and self.form == "auto" and not self.hnet.layout.heads:
            points, basis0 = sigma_points(self.embeddings0), self.theta0[-1]  # without a trunk no features are made
            plan, width = self._plan(range(len(points))), basis0.shape[1]
            unread = basis0.new_zeros(len(plan), width, width, dtype=torch.float64)
            gram0 = reference.with_basis_gram0(unread, basis0, plan)
            self._held = {"embeddings": points, "embeddings0": points, "plan": plan, "gram0": gram0}

    def _run_trunk0(self, num_past: int) -> tuple[list[Tensor], Tensor]:
        """The snapshot's pre-activations, of as many layers as fit the budget, and its Gram matrices.

        The first layer's, sums of T + N rows, are not worth their bytes.
        """
        z, widths = self.theta0[0], [len(bias) for bias in self.theta0[2:-1:2]]
        budget = default_budget(z.device) if self.memory_budget is None else self.memory_budget
        num_stored = len(stored_bytes(num_past, len(z), widths, z.element_size(), budget))
        stored = [_pre_activations(z, num_past, width) for width in widths[len(widths) - num_stored :]]
        tasks_at_once = max(1, _BYTES_AT_ONCE // (len(z) * sum(widths) * z.element_size()))
        grams = reference.gram0(z.new_empty(0, len(z), self.hnet.width), z.new_empty(0), _some_tasks(self._all, 0, 0))
        with full_precision():  # a task's steps differ from what is made here by little
            for lo in range(0, num_past, tasks_at_once):
                some = self.embeddings0[lo : lo + tasks_at_once]
                pre, h0 = run_trunk(self.theta0, some, self.hnet.activation)
                for kept, made in zip(stored, pre[len(pre) - num_stored :], strict=True):
                    kept[lo : lo + len(some)] = made
                plan = _some_tasks(self._all, lo, lo + len(some))
                with torch.autocast(h0.device.type, enabled=False):
                    grams += reference.gram0(h0, h0.new_full((len(some),), 1 / num_past), plan)
        return stored, reference.with_basis_gram0(grams, self.theta0[-1], self._all)

    def draw(self, count: int, *, per_chunk: bool = False, generator: torch.Generator | None = None) -> Tensor | None:
        """Past tasks for ``penalty`` to take, drawn uniformly, so that it is an unbiased estimate of that of all.

        Args:
            count: k, how many of them, at least 1.
            per_chunk: whether each chunk has k of its own. That costs the same, but the errors of N draws average out, where
                one draw for all chunks makes one error N times over (DESIGN, The step). Permutations are dealt out, k to a
                chunk, so that all tasks are drawn about equally often in one call.
            generator: on the CPU.

        Returns:
            int64 ``[k]``, or ``[k, N]``, where the tasks of each chunk are distinct; ``None`` where T is at most k: all.

        Raises:
            ValueError: fewer than one.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        num_chunks = self.hnet.layout.num_chunks
        if count >= self.num_past:
            return None
        if not per_chunk or num_chunks == 1:
            return torch.randperm(self.num_past, generator=generator)[:count]
        hands = self.num_past // count  # of k tasks in one permutation
        permutations = torch.rand(-(-num_chunks // hands), self.num_past, generator=generator).argsort(1)
        return permutations[:, : hands * count].reshape(-1, count)[:num_chunks].T.contiguous()

    def penalty(
        self,
        theta: Sequence[Tensor] | None = None,
        embeddings: Tensor | None = None,
        *,
        tasks: Sequence[int] | Tensor | None = None,
        scaling: Tensor | None = None,
        targets: Tensor | Sequence[Tensor] | None = None,
        importance: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Mean over past tasks of the squared drift of their weights since the snapshot (E1 without beta).

        Args:
            theta: stands in for ``hnet.theta`` (a looked-ahead one, say), in the same order.
            embeddings: ``[T, E]``, stands in for the past tasks' embeddings; by default those of the snapshot, held fixed.
            tasks: distinct past tasks to take, the mean is over them; ``None`` takes all. An int64 tensor ``[k]`` on the
                device is taken as it is, unchecked, and read only where tasks have heads (a compiled graph breaks there). So
                is ``[k, N]``: of chunk n tasks ``[:, n]`` are taken, as ``draw`` has them.
            scaling: ``[T]`` factor of each past task; ``None`` means 1.
            targets: ``[T, P]``, or one tensor ``[P]`` per past task: weights to hold to in place of the snapshot's, end to
                end in the order of ``hnet.generate``; not differentiated.
            importance: of the same shape, factor of each weight's squared drift (its Fisher information, say), 0 or more;
                ``None`` means 1; not differentiated.

        Returns:
            Scalar, never negative, differentiable in ``theta`` and ``embeddings``; 0 without past tasks.

        Raises:
            IndexError: not a past task.  ValueError: a task given twice, targets or importance of another
                shape or in an aligned layout, ``[k, N]`` tasks of another N or with scaling, targets or importance.
            TypeError: their dtype is not the hypernetwork's.  RuntimeError: no snapshot, or heads added since.

        With ``targets`` or ``importance`` the features of all tasks are made and the cost is that of generating the weights
        (``ops.target_drift``); the weights are not stored, but what is given is read.
        """
        arguments = self._arguments(theta, embeddings, tasks, scaling)
        if _is_per_chunk(tasks):
            if targets is not None or importance is not None:
                raise ValueError("targets and importance are of whole tasks: tasks must be [k], not [k, N]")
            dh, h0 = self._feature_drift(arguments)
            return ops.output_drift(dh, arguments["theta"][-1], h0, **self._of_rows(arguments))
        if targets is None and importance is None:
            if self._affine is not None and embeddings is None:
                return self._affine.penalty(*self._of_affine(arguments))
            return ops.hypernet_drift(**(self._of_held(arguments) if embeddings is None else arguments))
        theta, plan, options = arguments["theta"], arguments["plan"], {"weight": arguments["weight"]}
        options["importance"] = self._rows("importance", importance, tasks)
        if targets is not None:
            h = self.hnet.features(arguments["embeddings"], theta)
            return ops.target_drift(h, theta[-1], plan, targets=self._rows("targets", targets, tasks), **options)
        dh, h0 = self._feature_drift(arguments)
        return ops.target_drift(dh, theta[-1], plan, h0=h0, basis0=self.theta0[-1], **options)

    def value_and_grad(
        self,
        theta: Sequence[Tensor] | None = None,
        embeddings: Tensor | None = None,
        *,
        tasks: Sequence[int] | Tensor | None = None,
        scaling: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """``penalty`` and its gradients without a graph: value, gradients of ``theta``, gradient of ``embeddings``.

        Arguments and errors are those of ``penalty``; with ``tasks`` ``[k]``, the gradient of ``embeddings`` is ``[k, E]``,
        else ``[T, E]``; it is ``None`` where ``embeddings`` are not given: those of the snapshot are held.
        """
        if _is_per_chunk(tasks):
            return self._value_and_grad_of_rows(theta, embeddings, tasks, scaling)
        arguments = self._arguments(theta, embeddings, tasks, scaling)
        if embeddings is not None:
            return ops.hypernet_drift_value_and_grad(**arguments)
        if self._affine is None:
            return (*ops.hypernet_drift_value_and_grad(**self._of_held(arguments))[:2], None)
        value, grad = self._affine.value_and_grad(*self._of_affine(arguments))
        return value, [torch.zeros_like(arguments["theta"][0]), grad], None

    def _value_and_grad_of_rows(
        self, theta: Sequence[Tensor] | None, embeddings: Tensor | None, tasks: Tensor, scaling: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The same for tasks ``[k, N]``: so few rows that their features are made; gradients of all past embeddings."""
        *rest, basis = self.hnet.theta if theta is None else theta
        leaves = [p.detach().requires_grad_() for p in (*rest, *([] if embeddings is None else [embeddings]))]
        given = None if embeddings is None else leaves[-1]
        with torch.enable_grad():
            arguments = self._arguments([*leaves[: len(rest)], basis], given, tasks, scaling)
            dh, h0 = self._feature_drift(arguments)
        value, grad_dh, grad_basis = ops.output_drift_value_and_grad(dh, basis, h0, **self._of_rows(arguments))
        grads = torch.autograd.grad(dh, leaves, grad_dh, allow_unused=True, materialize_grads=True)
        return value, [*grads[: len(rest)], grad_basis], None if given is None else grads[-1]

    def _of_rows(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What ``ops.output_drift`` takes of those of ``ops.hypernet_drift``, beside features and basis."""
        return {"basis0": self.theta0[-1], "plan": arguments["plan"], "precision": self.precision}

    def _feature_drift(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Drift ``[T, N, H]`` of the features, and what they were."""
        trunk = {key: arguments[key] for key in ("theta", "theta0", "embeddings", "embeddings0", "pre0")}
        return trunk_drift(**trunk, activation=self.hnet.activation)

    def _of_held(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same with what stands in for all past tasks, if it is all of them, weighted alike."""
        if arguments["embeddings"] is not self.embeddings0 or arguments["weight"] is not None:
            return arguments
        return arguments | self._held

    def _of_affine(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What ``AffineDrift`` takes of those of ``ops.hypernet_drift``."""
        embeddings, weight = arguments["embeddings0"], arguments["weight"]
        is_all = embeddings is self.embeddings0 and weight is None
        return arguments["theta"][-1], None if is_all else embeddings, weight

    def _arguments(
        self,
        theta: Sequence[Tensor] | None,
        embeddings: Tensor | None,
        tasks: Sequence[int] | Tensor | None,
        scaling: Tensor | None,
    ) -> dict[str, Any]:
        if not hasattr(self, "theta0"):
            raise RuntimeError("no snapshot to hold to: call snapshot(num_past) when a task begins")
        if self._num_heads != self.hnet.target.num_heads:
            raise RuntimeError("the hypernetwork has grown since the snapshot: call snapshot(num_past) again")
        theta = self.hnet.theta if theta is None else theta
        embeddings = self.embeddings0 if embeddings is None else embeddings
        embeddings0, pre0, plan, gram0 = self.embeddings0, self._pre0, self._all, self._gram0
        chunks: list[Tensor] = []  # beside its task, what tells a row of stored features
        if isinstance(tasks, Tensor):
            if _is_per_chunk(tasks):
                num_chunks = self.hnet.layout.num_chunks
                if tasks.shape[1] != num_chunks or scaling is not None:
                    wanted = f"tasks [k, N] need N = {num_chunks} chunks and no scaling"
                    raise ValueError(f"{wanted}, got {list(tasks.shape)}{' and scaling' * (scaling is not None)}")
                chunks = [torch.arange(num_chunks, device=embeddings.device)]
            index, plan = tasks, self._plan_of_drawn(tasks) if self.hnet.layout.heads else self._plan(range(len(tasks)))
        elif tasks is not None:
            if len(set(tasks)) != len(tasks):
                raise ValueError(f"tasks to regularize must be distinct, got {list(tasks)}")
            if not all(0 <= task < self.num_past for task in tasks):
                raise IndexError(f"tasks to regularize must be in 0 .. {self.num_past - 1}, got {list(tasks)}")
            index, plan = torch.as_tensor(tasks, dtype=torch.int64, device=embeddings.device), self._plan(tasks)
        if tasks is not None:
            rows = (index, *chunks)
            embeddings, embeddings0, pre0 = embeddings[index], embeddings0[index], [a[rows] for a in pre0]
            scaling = None if scaling is None else scaling[index]
        return {
            "theta": theta,
            "theta0": self.theta0,
            "embeddings": embeddings,
            "embeddings0": embeddings0,
            "pre0": pre0,
            "plan": plan,
            "activation": self.hnet.activation.code,
            "weight": None if scaling is None else scaling.to(embeddings.dtype) / max(1, len(embeddings)),
            "gram0": gram0 if tasks is None and scaling is None else None,
            "precision": self.precision,
        }

    def state(self) -> list[Tensor]:
        """What ``restore`` needs: the snapshot's theta, then its embeddings."""
        return [*self.theta0, self.embeddings0]

    def restore(self, past: int | Sequence[int], state: Sequence[Tensor], *, sampled: int | None = None) -> None:
        """Takes over a snapshot of ``past`` that ``state`` gave; ``sampled`` as in ``snapshot``."""
        device = self.hnet.basis.device
        *theta, embeddings = (tensor.to(device) for tensor in state)
        self.snapshot(past, theta, embeddings, sampled=sampled)

    def _rows(
        self, name: str, given: Tensor | Sequence[Tensor] | None, tasks: Sequence[int] | Tensor | None
    ) -> Tensor | Sequence[Tensor] | None:
        """``given``, one row of P numbers per past task, or of it the rows of ``tasks``; nothing is copied."""
        if given is None:
            return None
        wanted = self.hnet.layout.num_weights
        if len(self.hnet.layout.blocks) > 1:
            raise ValueError(
                f"{name} lie end to end as the weights of layout='flat' do; those of this hypernetwork are laid aligned, or "
                "heads were added"
            )
        rows = [given] if isinstance(given, Tensor) else given
        shape = [self.num_past, wanted] if isinstance(given, Tensor) else [wanted]
        for row in rows:
            if list(row.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {list(row.shape)}")
        if len(given) != self.num_past:
            raise ValueError(f"{name} must hold {self.num_past} tensors, one per past task, got {len(given)}")
        return given if tasks is None else [given[int(task)] for task in tasks]

    def _plan(self, tasks: Sequence[int | Sequence[int]] | Tensor) -> Tensor:
        if isinstance(tasks, Tensor):
            tasks = tasks.tolist()
        if self.hnet.layout.heads:  # else only their number counts
            of = self._tasks
            tasks = [of[task] if isinstance(task, int) else [of[one] for one in task] for task in tasks]
        return drift_plan(self.hnet.layout, tasks, self.hnet.width, self.form, trunk=len(self.hnet.trunk_weights) > 0)

    def _plan_of_drawn(self, tasks: Tensor) -> Tensor:
        # which rectangles it has depends on which tasks were drawn; a decorator would import the compiler with the package
        plan = torch.compiler.disable(self._plan) if torch.compiler.is_compiling() else self._plan
        return plan(tasks)


def _is_per_chunk(tasks: Sequence[int] | Tensor | None) -> TypeGuard[Tensor]:
    return isinstance(tasks, Tensor) and tasks.dim() == 2


def _pre_activations(z_NZ: Tensor, num_tasks: int, width: int) -> Tensor:
    """Room for ``[T, N, width]``: of a wide layer on a GPU as kernels read it, chunk by chunk, in rows of whole 64 bytes."""
    if not z_NZ.is_cuda or width <= 128:
        return z_NZ.new_empty(num_tasks, len(z_NZ), width)
    return z_NZ.new_empty(len(z_NZ), num_tasks, -(-width // 16) * 16).transpose(0, 1)[..., :width]


def _some_tasks(plan: Tensor, lo: int, hi: int) -> Tensor:
    """The rectangles of a plan, cut to tasks ``lo .. hi-1``, which become its tasks 0, 1, ..."""
    plan = plan.clone()
    stop = torch.where(plan[:, 1] < 0, hi, plan[:, 1])
    plan[:, 0], plan[:, 1] = (plan[:, 0] - lo).clamp(0, hi - lo), (stop - lo).clamp(0, hi - lo)
    return plan
