"""What a recipe is: all settings of an experiment under a name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One experiment. Every field but the first four can be set on the command line.

    ``published``: the source's figures.
    ``base``, ``pool``, ``padding``: of streams of the MNIST family, as ``fh.streams.permuted_mnist`` has them.
    ``heads``: each task has outputs of its own.
    ``scenario``: what is known of an example when it is tested: ``"task"`` (its task is told), ``"domain"`` (it is inferred,
    and the label must be right) or ``"class"`` (both must be).
    ``method``: how: ``"entropy"``, ``"gradient"`` (``fh.infer_tasks``, whose ``temperature`` it is), ``"tir"`` or
    ``"replay"`` (``fh.replay``).
    ``replay_...``: of the hypernetwork that makes the replay model's decoders; else as the other one's.
    ``epochs``: sets the steps of each task by its size; ``None``: ``steps``.
    ``evaluate_every``: after how many tasks all of them are evaluated; in between, the one just learned.
    """

    name: str
    about: str
    source: str
    published: str = ""
    stream: str = "permuted-mnist"
    base: str = "mnist"
    pool: int = 1
    padding: int | None = None
    augment: bool = True
    num_tasks: int = 10
    data_dir: str | None = None
    target: str = "mlp"
    target_hidden: tuple[int, ...] = (1000, 1000)
    target_activation: str = "relu"
    heads: bool = False
    scenario: str = "task"
    method: str = "entropy"
    temperature: float = 1.0
    chunk_size: int | None = 78_000
    hidden: tuple[int, ...] = (25, 25)
    task_dim: int = 24
    chunk_dim: int = 8
    activation: str = "elu"
    layout: str = "flat"
    init: str = "xavier"
    embedding_std: float = 1.0
    loss: str = "cross_entropy"
    steps: int = 5000
    epochs: int | None = None
    batch_size: int = 128
    lr: float = 1e-4
    lr_embedding: float | None = None
    schedule: str = "constant"
    beta: float = 0.1
    lookahead: bool = True
    reg_tasks: int | None = None
    reg_per_chunk: bool = False
    plastic: bool = False
    embedding_init: str = "normal"
    optimizer: str = "adam"
    adam_beta1: float = 0.9
    replay_hidden: tuple[int, ...] = (50, 150)
    replay_chunk_size: int = 50_000
    replay_beta: float = 0.01
    seed: int = 42
    evaluate_every: int = 1
