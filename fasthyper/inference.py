"""Many tasks in one go: accuracies or errors of several, and which task an example is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.hypernet import ChunkedHypernet
from fasthyper.losses import targets_for
from fasthyper.mixed import MOST_WEIGHTS, may_vmap, remember_vmap, run_together
from fasthyper.streams.batches import to_device
from fasthyper.streams.stream import TaskData

BATCH = 2048  # examples of a task that are evaluated at once
INFERRED_AT_ONCE = 8 * BATCH  # examples for which the weights of all tasks are made once
MEMORY, CACHED = 1 << 30, 1 << 25  # bytes, about, that the tasks run at once may take on a GPU, and on a CPU

Pair = tuple[int, TaskData]


@torch.no_grad()
def infer_tasks(
    hnet: ChunkedHypernet,
    x: Tensor,
    tasks: Sequence[int] | None = None,
    *,
    method: str = "entropy",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The task of each example, without being told: ``task_b = argmin_k S_kb`` for one of two scores.

    ``"entropy"``: ``S_kb = H(p_kb)``, the entropy of ``p_kb = softmax(outputs of task k for example b / temperature)``: the
    task that leaves the target least in doubt. ``"gradient"``, the one-shot algorithm of SupSup (Wortsman et al. 2020, arXiv
    2006.14769) on generated weights: those of all tasks are superposed, ``W(a) = sum_k a_k h(e_k)`` at ``a = 1/K``, and
    ``S_kb = dH(p_b(a))/da_k``: the task towards which doubt falls fastest. Output heads of the tasks' own are superposed
    with the rest, so p has as many classes as a head.

    Each task's weights are made once; tasks are run together, as many as fit in memory, and the target as in evaluation,
    whatever its mode. Scores are compared by logarithms: where all but one output underflow, tasks still differ.

    Args:
        hnet: the hypernetwork.
        x: ``[B, ...]``, on its device.
        tasks: K different ones to choose from; ``None``: all that have an embedding.
        method: ``"entropy"`` or ``"gradient"``.
        temperature: above 0; divides the outputs.

    Returns:
        int64 ``[B]``, the tasks; ``[B, C]``, the outputs of each example's task (those of its own head, if it has one);
        ``[K, B]``, all scores, in nats.

    Raises:
        IndexError: no such task.  ValueError: no tasks, an unknown method, a temperature of 0 or below, or ``"gradient"``
            of a target with batch-norm statistics or with heads that are not generated, which are not superposed.
        NotImplementedError: ``"gradient"`` of a target that torch has no forward-mode derivative of.
    """
    tasks = list(range(hnet.num_tasks) if tasks is None else tasks)
    if not tasks:
        raise ValueError("infer_tasks needs at least one task to choose from")
    if method not in METHODS or temperature <= 0:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} and temperature above 0, got {method!r}, {temperature}"
        )
    x, was_training = x.to(hnet.basis.dtype), hnet.training
    hnet.eval()
    try:
        best, outputs, scores = METHODS[method](hnet, x, tasks, temperature)
    finally:
        hnet.train(was_training)
    return to_device(torch.tensor(tasks), x.device)[best], outputs, scores


def _by_entropy(hnet: ChunkedHypernet, x: Tensor, tasks: list[int], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which of ``tasks`` by the entropy of their outputs, its outputs, all entropies."""
    parts, example = x.split(BATCH), torch.arange(len(x), device=x.device).split(BATCH)
    best: list[tuple[Tensor, Tensor, Tensor]] = []  # of each part so far: log of the entropy, which task, its outputs
    entropies: list[Tensor] = []
    for lo, together in _by_group(hnet, tasks, min(BATCH, len(x)) * x.shape[1:].numel()):
        logs = []
        for i, part in enumerate(parts):
            y_KBC = together(part)
            log_KB = log_entropy(y_KBC / temperature)
            log, k = log_KB.min(0)
            found = log, k + lo, y_KBC[k, example[i] - i * BATCH]
            if lo == 0:
                best.append(found)
            else:
                is_better = log < best[i][0]
                best[i] = tuple(  # type: ignore[assignment]
                    torch.where(is_better.view(-1, *[1] * (new.ndim - 1)), new, old)
                    for new, old in zip(found, best[i], strict=True)
                )
            logs.append(log_KB)
        entropies.append(torch.cat(logs, 1).exp())
    _, k, outputs = (torch.cat(which) for which in zip(*best, strict=True))
    return k, outputs, torch.cat(entropies)


def _by_gradient(hnet: ChunkedHypernet, x: Tensor, tasks: list[int], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which of ``tasks`` by the entropy's derivative towards their weights, its outputs, all derivatives."""
    target, parts = hnet.target, x.split(BATCH)
    if target.statistics is not None or (target.num_heads is not None and not target.generates_heads):
        raise ValueError(
            "method='gradient' superposes generated weights; batch-norm statistics and output heads that are not generated "
            "cannot be: use method='entropy'"
        )

    def weights_of(task: int) -> dict[str, Tensor]:
        return target.with_own_head_first(hnet.generate(task), task)

    mean = {name: weight / len(tasks) for name, weight in weights_of(tasks[0]).items()}
    for task in tasks[1:]:
        for name, weight in weights_of(task).items():
            mean[name] += weight / len(tasks)

    def log_at(part: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        def of(weights: dict[str, Tensor]) -> Tensor:
            y = torch.func.functional_call(target.module, weights, (part,))
            return log_entropy(y[:, : target.outputs_per_task] / temperature)

        return of

    entropy, slopes = torch.cat([log_at(part)(mean) for part in parts]).exp(), []
    for task in tasks:
        towards = weights_of(task)
        slopes.append(torch.cat([torch.func.jvp(log_at(part), (mean,), (towards,))[1] for part in parts]))
    slope_KB = torch.stack(slopes)
    best = slope_KB.argmin(0)
    found = to_device(torch.tensor(tasks), x.device)[best]
    outputs = [hnet(part, of.clone()) for part, of in zip(parts, found.split(BATCH), strict=True)]
    return best, torch.cat(outputs), slope_KB * entropy  # dH = H dlogH


METHODS = {"entropy": _by_entropy, "gradient": _by_gradient}


def log_entropy(y: Tensor) -> Tensor:
    """``log H(softmax(y))`` over the last dimension ``[..., C]``, in nats: finite, also where all outputs but one underflow.

    With ``g_c = y_c - max y``, ``s = logsumexp of g but the largest`` and ``Z = 1 + e^s``: ``p_c = e^g_c / Z`` and
    ``H = sum_c p_c (log Z - g_c)``, whose terms are added as logarithms. Infinite outputs count as the largest finite ones.
    """
    lowest = torch.finfo(y.dtype).min / 4
    y = y.clamp(lowest, -lowest)
    top, which = y.max(-1, keepdim=True)
    rest = (y - top).scatter(-1, which, lowest)
    s = rest.logsumexp(-1, keepdim=True)
    log_z = F.softplus(s)
    log_log_z = torch.where(s < -40, s, log_z.log())  # log log(1 + e^s) is s where e^s is lost in 1
    return torch.cat([log_log_z, rest + (log_z - rest).log()], -1).logsumexp(-1) - log_z.squeeze(-1)


@torch.no_grad()
def accuracies_on(
    hnet: ChunkedHypernet,
    pairs: Sequence[Pair],
    among: Sequence[int] | None = None,
    method: str = "entropy",
    temperature: float = 1.0,
) -> list[float]:
    """Accuracy, a fraction, on the data of each (task, data); the device is read once. Leaves ``hnet`` in evaluation mode.

    ``among``: the task of each example is inferred among these, as ``infer_tasks`` does by ``method`` and ``temperature``;
    where tasks have heads it must be right, too.
    """
    hnet.eval()
    if among is None:
        hits = _sums(hnet, pairs, _hits)
    else:
        how = {"method": method, "temperature": temperature}
        hits = [_inferred_hits(hnet, task, data.to(hnet.basis.device), among, **how) for task, data in pairs]
    return _means(hits, pairs)


@torch.no_grad()
def errors_on(hnet: ChunkedHypernet, pairs: Sequence[Pair]) -> list[float]:
    """Mean squared error on the data of each (task, data), summed in float64; otherwise as ``accuracies_on``.

    Raises:
        ValueError: there are not as many targets as outputs.
    """
    hnet.eval()
    return _means(_sums(hnet, pairs, _squares), pairs)


def _hits(outputs_KBC: Tensor, labels_KB: Tensor) -> Tensor:
    """How many examples of each task are right, int64 ``[K]``."""
    return (outputs_KBC.argmax(2) == labels_KB).sum(1)


def _squares(outputs_KBO: Tensor, targets_KBO: Tensor) -> Tensor:
    """Squared errors, means over outputs, summed over the examples of each task, float64 ``[K]``."""
    return (outputs_KBO - targets_for(outputs_KBO, targets_KBO)).double().square().flatten(2).mean(2).sum(1)


def _means(sums: Sequence[Tensor], pairs: Sequence[Pair]) -> list[float]:
    numbers = torch.stack(list(sums)).tolist() if sums else []
    return [number / len(data) for number, (_, data) in zip(numbers, pairs, strict=True)]


def _groups(hnet: ChunkedHypernet, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Neighbours that are run at once: as many examples of as many features, moved to where ``hnet`` is."""
    group: list[Pair] = []
    for task, data in pairs:
        alike = group and group[0][1].shape == data.shape
        if group and not (alike and len(group) < _tasks_at_once(hnet, min(len(data), BATCH) * data.shape[1:].numel())):
            yield group
            group = []
        group.append((task, data.to(hnet.basis.device)))
    if group:
        yield group


def _sums(hnet: ChunkedHypernet, pairs: Sequence[Pair], add: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """``add`` of outputs and labels of each task, ``[]``, summed over batches."""
    sums: list[Tensor] = []
    for group in _groups(hnet, pairs):
        together = _Together(hnet, [task for task, _ in group])
        parts = []
        for indices in torch.arange(len(group[0][1]), device=hnet.basis.device).split(BATCH):
            x, labels = zip(*(data.batch(indices) for _, data in group), strict=True)
            own = [hnet.target.own_labels(of, task) for of, (task, _) in zip(labels, group, strict=True)]
            parts.append(add(together([part.to(hnet.basis.dtype) for part in x]), torch.stack(own)))
        sums += torch.stack(parts).sum(0).unbind()
    return sums


def _inferred_hits(hnet: ChunkedHypernet, task: int, data: TaskData, among: Sequence[int], **how: Any) -> Tensor:
    hits = torch.zeros((), dtype=torch.int64, device=data.device)
    for indices in torch.arange(len(data), device=data.device).split(INFERRED_AT_ONCE):
        x, labels = data.batch(indices)
        found, outputs, _ = infer_tasks(hnet, x, among, **how)
        right = outputs.argmax(1) == hnet.target.own_labels(labels, task)
        hits += (right if hnet.target.outputs_per_task is None else right & (found == task)).sum()
    return hits


def _by_group(hnet: ChunkedHypernet, tasks: Sequence[int], numbers: int) -> Iterator[tuple[int, _Together]]:
    """Tasks that are run at once with inputs of so many numbers, and the place of their first."""
    size = _tasks_at_once(hnet, numbers)
    return ((lo, _Together(hnet, tasks[lo : lo + size])) for lo in range(0, len(tasks), size))


class _Together:
    """The target under the weights of K tasks: of all at once where it can be, else of one after the other."""

    def __init__(self, hnet: ChunkedHypernet, tasks: Sequence[int]):
        self.target, self.tasks = hnet.target, tasks
        if len(tasks) > 1:
            self.stacked = hnet.generate(tasks)
        else:
            self.stacked = {name: weight[None] for name, weight in hnet.generate(tasks[0]).items()}

    def __call__(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Outputs ``[K, B, C]`` for inputs ``[B, ...]``, the same or each task's own."""
        tried = len(self.tasks) > 1 and may_vmap(self.target)
        if tried:
            args, dims = ((x,), (None,)) if isinstance(x, Tensor) else ((torch.stack(list(x)),), (0,))
            y = run_together(self.target, self.stacked, self.tasks, args, dims)
            if y is not None:
                return self.target.own_outputs(y, self.tasks)
        xs = [x] * len(self.tasks) if isinstance(x, Tensor) else x
        weights = ({name: weight[k] for name, weight in self.stacked.items()} for k in range(len(self.tasks)))
        outputs = torch.stack([self.target(*given) for given in zip(weights, xs, self.tasks, strict=True)])
        if tried:
            remember_vmap(self.target)
        return outputs


def _tasks_at_once(hnet: ChunkedHypernet, numbers: int) -> int:
    """How many tasks with inputs of so many numbers each; one where all weights would be moved for nothing."""
    weights = hnet.target.num_weights
    if not may_vmap(hnet.target) or (hnet.basis.is_cpu and weights > MOST_WEIGHTS):
        return 1
    memory = CACHED if hnet.basis.is_cpu else MEMORY
    return max(1, memory // (hnet.basis.element_size() * (3 * weights + 4 * numbers)))  # with copies and activations
