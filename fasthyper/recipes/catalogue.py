"""The recipes by name. Each names its source, and what that published."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fasthyper.recipes.recipe import Recipe

_PAPER = "von Oswald et al., Continual learning with hypernetworks, ICLR 2020"
_POSTERIOR = "Henning et al., Posterior meta-replay for continual learning, NeurIPS 2021 (its code's README)"
_SCENARIOS = {"cl1": "task", "cl2": "domain", "cl3": "class"}
_METHODS = {"ent": "entropy", "tir": "tir", "r": "replay"}
_METHOD_NAMES = {"ent": "HNET+ENT", "tir": "HNET+TIR", "r": "HNET+R"}
_TABLE_1 = {  # of the paper: mean and standard error of the mean over 20 runs
    "permuted-mnist-10": {
        "cl1": {"ent": "97.57 ± 0.02", "tir": "97.57 ± 0.02", "r": "97.87 ± 0.01"},
        "cl2": {"ent": "92.80 ± 0.15", "tir": "97.58 ± 0.02", "r": "97.60 ± 0.01"},
        "cl3": {"ent": "91.75 ± 0.21", "tir": "97.59 ± 0.01", "r": "97.76 ± 0.01"},
    },
    "split-mnist": {
        "cl1": {"ent": "99.79 ± 0.01", "tir": "99.79 ± 0.01", "r": "99.83 ± 0.01"},
        "cl2": {"ent": "87.01 ± 0.47", "tir": "94.43 ± 0.28", "r": "98.00 ± 0.03"},
        "cl3": {"ent": "69.48 ± 0.80", "tir": "89.59 ± 0.59", "r": "95.30 ± 0.13"},
    },
}

_PERMUTED = Recipe(name="permuted-mnist-10", about="PermutedMNIST, 10 tasks", source=_PAPER, heads=True)
_SPLIT = Recipe(
    name="split-mnist",
    about="SplitMNIST, 5 tasks of 2 digits",
    source=_PAPER,
    stream="split-mnist",
    num_tasks=5,
    target_hidden=(400, 400),
    heads=True,
    chunk_size=42_000,
    hidden=(10, 10),
    task_dim=96,
    chunk_dim=96,
    activation="relu",
    steps=2000,
    lr=1e-3,
    beta=0.01,
)
_LONG = Recipe(
    name="permuted-mnist-100",
    about="PermutedMNIST, 100 tasks, the paper's settings",
    source=_PAPER,
    published="about 96.8",
    num_tasks=100,
    heads=True,
    chunk_size=7500,
    hidden=(200, 250, 350),
    task_dim=128,
    chunk_dim=12,
    activation="relu",
    beta=0.01,
    evaluate_every=10,
)
_NO_TRUNK = Recipe(
    name="permuted-mnist-100-hour",
    about="PermutedMNIST, 100 tasks within an hour on 2 cores: 784-80-10, no trunk, one shared output head",
    source="fasthyper",
    num_tasks=100,
    padding=0,
    target_hidden=(80,),
    chunk_size=None,
    hidden=(),
    task_dim=100,
    embedding_std=0.3,
    steps=400,
    lr=1e-3,
    lr_embedding=2e-2,
    schedule="warmup-cosine",
    beta=0.5,
    evaluate_every=10,
)
_CIFAR = Recipe(
    name="split-cifar-10-100",
    about="CIFAR-10, then five times ten classes of CIFAR-100, a head each",
    source=_PAPER,
    stream="split-cifar-10-100",
    num_tasks=6,
    heads=True,
)
_TOY = Recipe(
    name="toy-regression",
    about="three polynomials in a row, one shared output",
    source=f"{_PAPER} (its code's test)",
    published="mean squared errors .00419, .00239, .00607",
    stream="toy-regression",
    num_tasks=3,
    target_hidden=(10, 10),
    target_activation="sigmoid",
    chunk_size=None,
    hidden=(10, 10),
    task_dim=2,
    activation="sigmoid",
    loss="mse",
    steps=4001,
    batch_size=32,
    lr=1e-2,
    beta=0.005,
)
_REPLAY: dict[tuple[str, str], dict[str, Any]] = {  # decoders: hidden layers, chunks, weight of their drift
    ("split-mnist", "tir"): {"replay_hidden": (50, 150), "replay_chunk_size": 50_000, "replay_beta": 0.01},
    ("split-mnist", "r"): {"replay_hidden": (250, 350), "replay_chunk_size": 50_000, "replay_beta": 0.01},
    ("permuted-mnist-10", "tir"): {"replay_hidden": (1000, 1000), "replay_chunk_size": 85_000, "replay_beta": 0.1},
    ("permuted-mnist-10", "r"): {"replay_hidden": (400, 400), "replay_chunk_size": 85_000, "replay_beta": 0.1},
}


def _of_table_1(base: Recipe) -> list[Recipe]:
    """The scenarios and methods of the paper's Table 1 on one stream."""
    return [
        replace(
            base,
            name=f"{base.name}-{scenario}-{method}",
            about=f"{base.about}, {scenario.upper()}, {_METHOD_NAMES[method]}, the paper's settings",
            published=figure,
            scenario=_SCENARIOS[scenario],
            method=_METHODS[method],
            heads=scenario != "cl2",
            **_REPLAY.get((base.name, method), {}),
        )
        for scenario, figures in _TABLE_1[base.name].items()
        for method, figure in figures.items()
    ]


def _scheduled(recipe: Recipe, **options: Any) -> Recipe:
    """The same with learning rates that rise and fall within each task."""
    what = recipe.about.rsplit(", ", 1)[0]  # without "the paper's settings"
    more = "".join(f", {name} {value}" for name, value in options.items())
    return replace(
        recipe,
        name=f"{recipe.name}-cosine",
        about=f"{what}, learning rates that rise and fall within each task{more}",
        source="fasthyper",
        published="",
        schedule="warmup-cosine",
        **options,
    )


def _wide(recipe: Recipe, hidden: tuple[int, ...], **options: Any) -> Recipe:
    """The same with a wider trunk, and embeddings a third as long."""
    scheduled = _scheduled(recipe, **options)
    trunk = f"trunk {', '.join(map(str, hidden))}"
    name, about = f"{recipe.name}-wide", f"{scheduled.about}, {trunk}"
    return replace(scheduled, name=name, about=about, hidden=hidden, task_dim=32, chunk_dim=32)


_OF_TABLE_1 = {recipe.name: recipe for base in (_SPLIT, _PERMUTED) for recipe in _of_table_1(base)}
_ALL = (
    Recipe(
        name="demo",
        about="PermutedMNIST, 10 tasks, minutes on 2 cores",
        source="fasthyper",
        steps=800,
        lr=5e-4,
    ),
    Recipe(
        name="permuted-digits",
        about="permuted 8x8 digits, 10 tasks, nothing to download, seconds",
        source="fasthyper",
        stream="permuted-digits",
        target_hidden=(100, 100),
        chunk_size=2000,
        hidden=(50, 50),
        task_dim=32,
        chunk_dim=12,
        steps=400,
        batch_size=64,
        lr=1e-3,
        beta=0.1,
    ),
    *_OF_TABLE_1.values(),
    _scheduled(_OF_TABLE_1["split-mnist-cl2-tir"]),
    _scheduled(_OF_TABLE_1["split-mnist-cl2-r"]),
    # chosen on seeds 100 to 105, measured on others; smaller than their targets
    _wide(_OF_TABLE_1["split-mnist-cl2-ent"], (50, 50), chunk_size=8000, steps=1000),
    _wide(_OF_TABLE_1["split-mnist-cl3-ent"], (50, 50), chunk_size=8000, steps=500),
    # chosen by the images it replays, as a classifier of all digits sees them, seed 45; five times the decoder's size
    _wide(_OF_TABLE_1["split-mnist-cl3-r"], (100, 100), replay_chunk_size=20_000, lr_embedding=1e-2),
    _scheduled(_OF_TABLE_1["split-mnist-cl3-tir"]),
    # chosen on seed 100 of CL3: an eighth of the paper's steps; the longer it trains, the surer it is of other tasks' images
    _scheduled(_OF_TABLE_1["permuted-mnist-10-cl3-ent"], steps=600, lr=1e-3, beta=0.02, temperature=2.0),
    _scheduled(_OF_TABLE_1["permuted-mnist-10-cl2-ent"], steps=600, lr=1e-3, beta=0.02, temperature=2.0),
    _scheduled(_OF_TABLE_1["permuted-mnist-10-cl3-tir"], steps=2500, lr=5e-4, beta=0.02),
    replace(
        _PERMUTED,
        name="permuted-mnist-10-cl3-ent-temperature",
        about=f"{_PERMUTED.about}, CL3, HNET+ENT, trained with the paper's settings; entropies at temperature 4",
        source="fasthyper",
        scenario="class",
        temperature=4.0,  # by the first 500 training images of each task, among 1, 3, 4, 5, 7
    ),
    replace(
        _PERMUTED,
        name="permuted-mnist-10-cosine",
        about="PermutedMNIST, 10 tasks, one shared output head, learning rates that fall within each task",
        source="fasthyper",
        heads=False,
        lr=5e-4,
        schedule="cosine",
        beta=0.02,
    ),
    _LONG,
    replace(
        _LONG,
        name="permuted-mnist-250",
        about="PermutedMNIST, 250 tasks, the paper's settings: 32 of them held in each step",
        published="",
        num_tasks=250,
        chunk_size=12_000,
        reg_tasks=32,
        evaluate_every=10,
    ),
    Recipe(
        name="permuted-mnist-100-gahaalt",
        about="PermutedMNIST, 100 tasks, 784-300-10, 500 steps of 256, 30 chunks, each held for one past task a step",
        source="github.com/gahaalt/continual-learning-with-hypernets (its logs)",
        published="94.31, no task below 90.78",
        num_tasks=100,
        padding=0,
        target_hidden=(300,),
        chunk_size=7951,
        hidden=(100, 200),
        task_dim=64,
        chunk_dim=32,
        activation="relu",
        steps=500,
        batch_size=256,
        lr=1e-3,
        schedule="warmup-cosine",
        beta=0.03,
        lr_embedding=1e-2,
        embedding_std=0.3,
        reg_tasks=1,
        reg_per_chunk=True,
        evaluate_every=10,
    ),
    _NO_TRUNK,
    replace(
        _NO_TRUNK,
        name="permuted-mnist-1000",
        about="PermutedMNIST of 7x7 images, 1,000 tasks, all of them held in each step, one shared output head",
        num_tasks=1000,
        pool=4,
        padding=None,
        target_hidden=(100,),
        task_dim=512,
        steps=80,
        lr=5e-4,
        beta=4.0,
        evaluate_every=50,
    ),
    _TOY,
    replace(
        _TOY,
        name="toy-regression-cosine",
        about=f"{_TOY.about}: three times the steps, learning rates that fall within each task",
        source="fasthyper",
        published="",
        steps=12_000,
        lr=2e-2,
        schedule="cosine",
        beta=0.02,
    ),
    Recipe(
        name="split-cifar-10-resnet32",
        about="CIFAR-10, 5 tasks of 2 classes, ResNet-32 with batch norm of each task's own, a head each",
        source=_POSTERIOR,
        published="93.77",
        stream="split-cifar-10",
        num_tasks=5,
        target="resnet32",
        heads=True,
        chunk_size=7000,
        hidden=(),
        task_dim=16,
        chunk_dim=16,
        epochs=40,
        batch_size=32,
        lr=1e-3,
        schedule="cosine",
        beta=50.0,
    ),
    replace(
        _CIFAR,
        name="split-cifar-10-100-resnet32",
        about=f"{_CIFAR.about}, ResNet-32",
        target="resnet32",
        chunk_size=7000,
        hidden=(),
        task_dim=32,
        chunk_dim=32,
        epochs=200,
        batch_size=32,
        lr=1e-3,
        schedule="cosine",
        beta=0.05,
    ),
    replace(
        _CIFAR,
        name="split-cifar-10-100-zenke",
        about=f"{_CIFAR.about}, the network of Zenke et al.",
        target="zenkenet",
        augment=False,
        chunk_size=5500,
        hidden=(100, 150, 200),
        task_dim=48,
        chunk_dim=80,
        activation="relu",
        epochs=80,
        batch_size=256,
        lr=1e-4,
        adam_beta1=0.5,
        beta=0.01,
    ),
    Recipe(
        name="f-celeba",
        about="ten parts of CelebA, smiling or not, 87 images each",
        source="Ke et al., Continual learning of a mixed sequence of similar and dissimilar tasks, NeurIPS 2020",
        published="60.36; always saying no: 60.91",
        stream="f-celeba",
        target="zenkenet",
        chunk_size=5500,
        hidden=(100, 150, 200),
        task_dim=48,
        chunk_dim=80,
        activation="relu",
        epochs=100,
        batch_size=32,
        lr=1e-3,
        schedule="cosine",
        beta=0.05,
        embedding_init="previous",
    ),
)
RECIPES = {recipe.name: recipe for recipe in _ALL}
