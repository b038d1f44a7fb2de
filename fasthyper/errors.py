"""Errors that a person can mend. Each message is one clear line, fit to be shown without a traceback."""


class FasthyperError(Exception):
    """A mistake or a fault that a person can mend."""


class DataError(FasthyperError):
    """Data are missing, damaged, not what they should be, or cannot be had."""


class CheckpointError(FasthyperError):
    """A directory or a checkpoint that cannot be written, read, or gone on with."""


class NonFiniteLossError(FasthyperError):
    """The loss or the drift became NaN or infinite."""


class LostProcessError(FasthyperError):
    """Another process of a job that trains together has ended, or does not answer."""


class MissingPackageError(FasthyperError, ImportError):
    """An optional package is not installed."""
