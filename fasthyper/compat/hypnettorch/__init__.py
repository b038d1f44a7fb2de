"""Stands in for hypnettorch 0.0.4: the same names, signatures and values, without the loop over past tasks.

    from fasthyper.compat.hypnettorch import hnet_regularizer as hreg
    from fasthyper.compat.hypnettorch import optim_step

hypnettorch itself is imported where a call needs it, never here. ``accelerate()`` puts these in the place of hypnettorch's,
with a faster forward pass of its hypernetworks, for code that is to stay as it is.
"""

from fasthyper.compat.hypnettorch.acceleration import accelerate

__all__ = ["accelerate"]
