"""fasthyper: fast training of task-conditioned chunked hypernetworks for continual learning.

    import fasthyper as fh

``fh.streams`` are sequences of tasks, ``fh.nets`` target networks; ``fh.ChunkedHypernet`` generates a target's weights and
``fh.Trainer`` trains it; ``fh.OutputRegularizer`` and ``fh.candidate_step`` are its parts for a loop of one's own.
``fh.load`` reads what ``hnet.export`` wrote; ``fh.from_hypnettorch``, ``fh.to_hypnettorch`` and the like convert.
"""

from fasthyper.version import __version__  # isort: skip  (checks torch before anything else needs it)

from fasthyper import distributed, loggers, metrics, nets, ops, streams
from fasthyper._backend import backends
from fasthyper.compat.convert import from_hypercl, from_hypnettorch, to_hypercl, to_hypnettorch
from fasthyper.errors import (
    CheckpointError,
    DataError,
    FasthyperError,
    LostProcessError,
    MissingPackageError,
    NonFiniteLossError,
    RecipeError,
)
from fasthyper.export import load
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.inference import infer_tasks
from fasthyper.lookahead import candidate_step
from fasthyper.metrics import Results
from fasthyper.regularizer import OutputRegularizer
from fasthyper.replay import HnetR, HnetTIR
from fasthyper.replay_model import ReplayModel
from fasthyper.trainer import Trainer

__all__ = [
    "CheckpointError",
    "ChunkedHypernet",
    "DataError",
    "FasthyperError",
    "HnetR",
    "HnetTIR",
    "LostProcessError",
    "MissingPackageError",
    "NonFiniteLossError",
    "OutputRegularizer",
    "RecipeError",
    "ReplayModel",
    "Results",
    "Trainer",
    "__version__",
    "backends",
    "candidate_step",
    "distributed",
    "from_hypercl",
    "from_hypnettorch",
    "infer_tasks",
    "load",
    "loggers",
    "metrics",
    "nets",
    "ops",
    "streams",
    "to_hypercl",
    "to_hypnettorch",
]
