"""Stands in for hypnettorch 0.0.4: the same names, signatures and values, without the loop over past tasks.

    from fasthyper.compat.hypnettorch import hnet_regularizer as hreg
    from fasthyper.compat.hypnettorch import optim_step

hypnettorch itself is imported where a call needs it, never here.
"""
