"""Errors that a person can mend. Each message is one clear line, fit to be shown without a traceback."""


def one_line(text: object, most: int = 300) -> str:
    """What a message quotes of a file or another's error: one line, not too long."""
    return " ".join(str(text).split())[:most]


class FasthyperError(Exception):
    """A mistake or a fault that a person can mend."""


class DataError(FasthyperError):
    """Data are missing, damaged, not what they should be, or cannot be had."""


class CheckpointError(FasthyperError):
    """A directory or a checkpoint that cannot be written, read, or gone on with."""


class RecipeError(FasthyperError):
    """A recipe's file is damaged, or names a setting or a value that cannot be."""


class NonFiniteLossError(FasthyperError):
    """The loss, the drift or a gradient became NaN or infinite.

    ``indices``: the examples of the batch, where ``fit`` chose them; with what augmentation drew for each beside it.
    """

    indices: list[int] | list[list[int]] | None = None


class LostProcessError(FasthyperError):
    """Another process of a job that trains together has ended, or does not answer."""


class MissingPackageError(FasthyperError, ImportError):
    """An optional package is not installed."""
