"""The chunked hypernetwork: task and chunk embeddings, trunk, basis; from a task's embedding to a target's weights."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper import checkpoint, nets
from fasthyper.activations import ACTIVATIONS
from fasthyper.generation import Generator
from fasthyper.init import INITS, hyperfan_, xavier
from fasthyper.layout import Block, Layout
from fasthyper.mixed import MixedBatch
from fasthyper.shared import HoldsTarget
from fasthyper.streams.batches import derived_seed
from fasthyper.target import Target
from fasthyper.trunk import run_trunk


class ChunkedHypernet(HoldsTarget):
    """Makes all P weights of ``target`` for a task, N chunks of S weights at a time (DESIGN E3).

    Chunk n of task t is ``basis @ [trunk([e_t, z_n]) | 1]``: a small MLP shared by all chunks, then one linear basis.

    Args:
        target: the network whose weights are generated; any module. Running batch-norm statistics are each task's own, other
            buffers are shared. The module is not changed.
        num_tasks: tasks to begin with; ``add_task`` makes more.
        chunk_size: S; ``None`` makes all weights at once (the full hypernetwork, N = 1, no chunk embedding).
        hidden: widths of the trunk's layers; empty for a linear hypernetwork. H is the last one, or E + Z.
        task_dim: E.  chunk_dim: Z, ignored when ``chunk_size`` is ``None``.
        activation: after each trunk layer; a key of ``activations.ACTIVATIONS``.
        outputs_per_task: size of each task's own output head, a slice of the target's last layer; ``None``: shared outputs.
        layout: how weights are laid over the chunks. ``"flat"``: end to end. ``"aligned"``: chunks hold whole rows of the
            weights of linear and convolutional layers, and linear layers run without their weight ever being stored, with
            fewer multiply-adds where H and the chunks of a layer are many. S is then at most ``chunk_size``, or the longest
            row where one is longer, and N about as many as when laid flat. The target's ``forward`` may read such a layer's
            ``weight``, which makes it; going through ``parameters()`` there raises.
        generate: which parameters are generated: a pattern of names or a sequence of them, read in order, the last that
            matches decides. ``"layer4.*"`` takes in, ``"!*.bias"`` takes out, ``"@*Norm*"`` goes by the class of the layer;
            so ``"!@*Norm*"`` is all but the norms. See ``patterns.choose``.
        rest: what becomes of the parameters that are not generated: all tasks share them, at first as in ``target``.
            ``"frozen"``: they stay, so nothing is forgotten. ``"trained"``: they learn from every task's loss, and NOTHING
            HOLDS THEM for past tasks: the output regularizer sees generated weights only. Those that require no gradient in
            ``target`` stay frozen.
        grow_heads: whether ``add_task`` beyond the output heads that the target was built with adds heads, of weights laid
            after all others; those of past tasks stay in place, bit for bit. A longer parameter then replaces one: make
            optimizers anew, one from before would go on with the old.
        init: how trunk and basis begin. ``"xavier"``: as in the papers' experiments. ``"hyperfan"``: so that the target's
            weights have the variances that keep the second moment of what passes through its layers, taken to be followed
            by ReLU; ``"hyperfan-out"``: that of gradients; ``"hyperfan-harmonic"``: the harmonic mean of both (DESIGN E6).
        embedding_std: of the normal distribution of task and chunk embeddings; with hyperfan, of the chunk embeddings whose
            weights are the smallest.
        seed: of the initial weights and of every task embedding, also of tasks added later; the global generator is not
            touched.
        dtype: ``torch.float32`` or ``torch.float64``.

    Raises:
        ValueError: a size below 1, an unknown option, a pattern that matches nothing, or a target that cannot be generated.
    """

    def __init__(
        self,
        target: nn.Module,
        num_tasks: int,
        *,
        chunk_size: int | None,
        hidden: Sequence[int] = (),
        task_dim: int = 32,
        chunk_dim: int = 32,
        activation: str = "relu",
        outputs_per_task: int | None = None,
        layout: str = "flat",
        generate: str | Sequence[str] = "*",
        rest: str = "frozen",
        grow_heads: bool = False,
        init: str = "xavier",
        embedding_std: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        if layout not in ("flat", "aligned"):
            raise ValueError(f"unknown layout {layout!r}; choose from flat, aligned")
        if init not in INITS or embedding_std <= 0:
            raise ValueError(f"init must be one of {', '.join(INITS)} and embedding_std positive, got {init!r}")
        if min([task_dim, *hidden, *([] if chunk_size is None else [chunk_size, chunk_dim])]) < 1 or num_tasks < 0:
            raise ValueError("chunk_size, hidden, task_dim and chunk_dim must be at least 1, num_tasks at least 0")
        if rest not in ("frozen", "trained"):
            raise ValueError(f"rest must be 'frozen' or 'trained', got {rest!r}")
        self.hold(Target(target, outputs_per_task, generate=generate, rest=rest, dtype=dtype))
        if grow_heads and not self.target.generates_heads:
            raise ValueError("grow_heads needs outputs_per_task, and a last layer that is generated")
        matrices = self.target.matrices() if layout == "aligned" else []
        self.layout = Layout(self.target.num_weights, chunk_size or self.target.num_weights, self.target.heads, matrices)
        self._generator = Generator(self.layout, self.target)
        self.config: dict[str, Any] = {
            "chunk_size": chunk_size,
            "hidden": list(hidden),
            "task_dim": task_dim,
            "chunk_dim": chunk_dim,
            "activation": activation,
            "outputs_per_task": outputs_per_task,
            "layout": layout,
            "generate": generate if isinstance(generate, str) else list(generate),
            "rest": rest,
            "grow_heads": grow_heads,
            "init": init,
            "embedding_std": embedding_std,
            "seed": seed,
            "dtype": str(dtype).removeprefix("torch."),
        }
        self.seed, self.task_dim, self.embedding_std = seed, task_dim, embedding_std
        self.activation = ACTIVATIONS[activation]

        generator = torch.Generator().manual_seed(seed)
        chunk_dim = chunk_dim if chunk_size is not None else 0
        widths = (task_dim + chunk_dim, *hidden)
        self.chunk_embeddings = nn.Parameter(
            embedding_std * torch.randn(self.layout.num_chunks, chunk_dim, generator=generator, dtype=dtype)
        )
        self.trunk_weights = nn.ParameterList(xavier(o, i, generator, dtype) for i, o in pairwise(widths))
        self.trunk_biases = nn.ParameterList(torch.zeros(o, dtype=dtype) for o in widths[1:])
        self.basis = nn.Parameter(_with_bias(xavier(self.layout.chunk_size, widths[-1], generator, dtype)))
        if init != "xavier":
            shapes = dict(zip(self.target.names, self.target.shapes, strict=True))
            module, settings = self.target.module, (self.activation, embedding_std, generator)
            hyperfan_(init, self.theta, self.layout, module, shapes, *settings)
        self.task_embeddings = nn.ParameterList()
        for _ in range(num_tasks):
            self.add_task()

    @property
    def num_tasks(self) -> int:
        """Tasks that have an embedding."""
        return len(self.task_embeddings)

    @property
    def width(self) -> int:
        """H: features per chunk."""
        return self.basis.shape[1] - 1

    @property
    def theta(self) -> list[nn.Parameter]:
        """What all tasks share: chunk embeddings, trunk weights and biases layer by layer, basis."""
        layers = zip(self.trunk_weights, self.trunk_biases, strict=True)
        return [self.chunk_embeddings, *(parameter for layer in layers for parameter in layer), self.basis]

    def add_task(self) -> int:
        """Gives a new task its embedding, statistics and, with ``grow_heads``, its output head; returns its index.

        Which embedding, and how a head starts, depends on ``seed`` and the index alone.

        Raises:
            ValueError: the target has no output head left for it.
        """
        index, heads = self.num_tasks, self.target.num_heads
        if heads is not None and index >= heads:
            if not self.config["grow_heads"]:
                raise ValueError(f"the target has {heads} output heads, no room for task {index}; grow_heads=True adds some")
            self._add_head(index)
        if self.statistics is not None:
            self.statistics.add_task()
        generator = torch.Generator().manual_seed(derived_seed(self.seed, index))
        embedding = self.embedding_std * torch.randn(self.task_dim, generator=generator, dtype=self.basis.dtype)
        self.task_embeddings.append(nn.Parameter(embedding.to(self.basis.device)))
        return index

    def features(self, embeddings: Tensor, theta: Sequence[Tensor] | None = None) -> Tensor:
        """Trunk features ``[T, N, H]`` of all chunks for task embeddings ``[T, E]``.

        ``theta`` stands in for ``self.theta``, in the same order.
        """
        return run_trunk(self.theta if theta is None else theta, embeddings, self.activation).features

    def generate(self, task: int | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """The target's generated weights, named and shaped as in its ``state_dict()``.

        Of one task they are views of one buffer. Of a sequence or int64 tensor of K tasks, in any order, they are
        ``[K, ...]``, one product for all; ``torch.func.vmap`` runs the target under them.

        Raises:
            IndexError: no such task.
        """
        if isinstance(task, Tensor):
            task = task.tolist()
        if isinstance(task, Sequence):
            if not task:
                raise ValueError("generate needs a task, or a sequence of at least one")
            return self._generator.stacked(self.features(self.embeddings(task)), self.basis)
        return self._weights(task, range(self._generator.num_base, len(self.layout.blocks)))[0]

    def task_state_dict(self, task: int) -> dict[str, Tensor]:
        """Copies of all that a module of the target's own class loads to be the target of ``task``, without fasthyper.

        They are its generated weights, the parameters and buffers that tasks share, and its batch-norm statistics.

        Raises:
            IndexError: no such task.
        """
        with torch.no_grad():
            return self.target.state_dict(self.generate(task), task)

    def embedding(self, task: int) -> nn.Parameter:
        """Task embedding ``[E]``.

        Raises:
            IndexError: no such task.
        """
        if not 0 <= task < self.num_tasks:
            raise IndexError(
                f"task index {task} out of range: the hypernetwork has {self.num_tasks} tasks; add_task() makes more"
            )
        return self.task_embeddings[task]

    def embeddings(self, tasks: Sequence[int]) -> Tensor:
        """Embeddings ``[T, E]`` of several tasks."""
        every = list(self.task_embeddings._parameters.values())  # a ParameterList looks each up by its name, 20 times slower
        for task in tasks and (min(tasks), max(tasks)):
            self.embedding(task)
        rows: list[Any] = [every[task] for task in tasks]
        return torch.stack(rows) if rows else self.basis.new_empty(0, self.task_dim)

    def forward(self, inputs: Tensor | tuple[Any, ...], task: int | Tensor, **options: Any) -> Any:
        """The target's outputs ``[B, num_classes]`` for ``inputs``, with the weights of ``task``.

        Args:
            inputs: ``[B, ...]``, or a tuple of all positional arguments of the target's ``forward``.
            task: one for all examples, or int64 ``[B]``, that of each example: outputs and gradients are those of a call for
                each task with its examples; the module's output must be one tensor ``[B, ...]``.
            options: keyword arguments of the target's ``forward``, the same for all tasks.

        Raises:
            IndexError: no such task.  ValueError, TypeError: tasks, inputs or outputs that cannot be told apart by example.
        """
        if isinstance(task, Tensor):
            if task.ndim:
                return self._mixed(inputs, task, options)
            task = int(task)
        heads, first = self._generator.own_head(task)
        weights, products = self._weights(task, heads, self._generator.fused)
        return self.target(weights, inputs, task, products, options=options, first_output=first)

    @torch.no_grad()
    def export(self, path: str | Path, task: int | None = None) -> None:
        """Writes one safetensors file: all that ``fh.load`` needs or, of one task, what the target's own class needs.

        Args:
            path: the file; one that is there is replaced, whole or not at all.
            task: ``None``: parameters and configuration. Else the weights of this task alone, without fasthyper of use as
                ``target.load_state_dict(safetensors.torch.load_file(path))``.

        Raises:
            CheckpointError: it cannot be written.  IndexError: no such task.
        """
        path = Path(path)
        if task is not None:
            return checkpoint.write(path, self.task_state_dict(task), "pt")
        checkpoint.write(path, self.state_dict(), checkpoint.HYPERNET_FORMAT, self.describe())

    def describe(self) -> dict[str, Any]:
        """All that ``fh.load`` needs beside the parameters, JSON-ready."""
        return {
            "hnet": self.config,
            "target": nets.describe(self.target.module),
            "target_shapes": self.target.named_shapes(),
            "layout": self.layout.to_json(),
        }

    def _mixed(self, inputs: Tensor | tuple[Any, ...], task: Tensor, options: dict[str, Any]) -> Tensor:
        batch, made = MixedBatch(inputs if isinstance(inputs, tuple) else (inputs,), task), self._generator
        features = self.features(self.embeddings(batch.tasks))
        h = features.unbind()

        def run_one(i: int, args: tuple[Any, ...]) -> Any:
            if len(self.layout.blocks) > made.num_base:
                return self.forward(args, batch.tasks[i], **options)
            weights, products = made.weights(h[i], self.basis, made.fused)
            return self.target(weights, args, batch.tasks[i], products, options=options)

        def generate(tasks: list[int]) -> dict[str, Tensor]:
            return made.stacked(features[tasks], self.basis)

        return batch.run(self.target, run_one, generate, options)

    def _features(self, task: int, block: Block | None = None) -> Tensor:
        """Features of the chunks that were there at first, or of those of one block, ``[N, H]``.

        Each set of chunks is always run through the trunk alone: as heads are added, those of old tasks keep every bit.
        """
        theta: Sequence[Tensor] = self.theta
        if block is not None:
            theta = [theta[0][block.chunk_lo : block.chunk_hi], *theta[1:]]
        elif self.layout.num_chunks > self._generator.num_base_chunks:
            theta = [theta[0][: self._generator.num_base_chunks], *theta[1:]]
        return run_trunk(theta, self.embedding(task)[None], self.activation).features[0]

    def _weights(self, task: int, heads: Iterable[int], fused: Container[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ``Generator.weights`` makes for ``task``, ``heads`` of later blocks with it."""
        own = [(number, self._features(task, self.layout.blocks[number])) for number in heads]
        return self._generator.weights(self._features(task), self.basis, fused, own)

    def _add_head(self, index: int) -> None:
        block = self.layout.add_head(self.target.add_head(), in_new_columns=self.config["chunk_size"] is None)
        self._generator.add_block(block)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, index, 1))
        name = "basis" if block.col_lo else "chunk_embeddings"
        old = self.get_parameter(name)
        if block.col_lo:
            more = _with_bias(xavier(block.size, self.width, generator, old.dtype))
        else:
            more = self.embedding_std * torch.randn(block.num_chunks, old.shape[1], generator=generator, dtype=old.dtype)
        setattr(self, name, nn.Parameter(torch.cat([old.detach(), more.to(old.device)]), old.requires_grad))


def _with_bias(weight: Tensor) -> Tensor:
    return torch.cat([weight, weight.new_zeros(len(weight), 1)], 1)
