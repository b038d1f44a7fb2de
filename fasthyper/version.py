"""The version, and which torch it runs with."""

import re

import torch

__version__ = "0.1.0"
LOWEST_TORCH = (2, 11)


def check_torch(version: str) -> None:
    """Raises ImportError, with what to do, where ``version`` of torch is too old."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < LOWEST_TORCH:
        lowest = ".".join(map(str, LOWEST_TORCH))
        raise ImportError(
            f"fasthyper {__version__} needs torch {lowest} or later, found {version}: pip install torch==2.13.0"
        )


check_torch(torch.__version__)
