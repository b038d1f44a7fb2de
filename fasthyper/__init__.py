"""fasthyper: fast training of task-conditioned chunked hypernetworks for continual learning.

    import fasthyper as fh

``fh.streams`` are sequences of tasks, ``fh.nets`` target networks; ``fh.ChunkedHypernet`` generates a target's weights and
``fh.Trainer`` trains it; ``fh.OutputRegularizer`` and ``fh.candidate_step`` are its parts for a loop of one's own.
"""

from fasthyper.version import __version__  # isort: skip  (checks torch before anything else needs it)

from fasthyper import loggers, metrics, nets, ops, streams
from fasthyper._backend import backends
from fasthyper.errors import CheckpointError, DataError, FasthyperError, MissingPackageError, NonFiniteLossError
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.lookahead import candidate_step
from fasthyper.metrics import Results
from fasthyper.regularizer import OutputRegularizer
from fasthyper.trainer import Trainer

__all__ = [
    "CheckpointError",
    "ChunkedHypernet",
    "DataError",
    "FasthyperError",
    "MissingPackageError",
    "NonFiniteLossError",
    "OutputRegularizer",
    "Results",
    "Trainer",
    "__version__",
    "backends",
    "candidate_step",
    "loggers",
    "metrics",
    "nets",
    "ops",
    "streams",
]
