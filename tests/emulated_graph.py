"""What a CUDA graph does, on the CPU: the operations of a run are recorded and replayed on the same tensors.

As on a GPU, a capture executes nothing, a replay runs no Python of the step, a tensor that is not the one of the capture is
not seen, and what waits for the device is refused. Numbers arrive when the test lets them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fasthyper.graph import Fetched

aten = torch.ops.aten
UNDECLARED = {(aten.native_batch_norm, "running_mean"), (aten.native_batch_norm, "running_var")}  # writes
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2}


class Recorder(TorchDispatchMode):
    """Notes each operation, with the tensors it took and gave, and the contents of what it was about to write to."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.waited, self.own = [], {}, False, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.waited |= function.overloadpacket in WAITS
        arguments = [*args, *(kwargs.get(a.name) for a in function._schema.arguments[len(args) :])]
        for argument, given in zip(function._schema.arguments, arguments, strict=True):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or (function.overloadpacket, argument.name) in UNDECLARED:
                for t in filter(torch.is_tensor, tree_leaves(given)):
                    storage = t.untyped_storage()._cdata
                    if storage not in self.own and storage not in self.before:
                        whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
                        self.before[storage] = whole, whole.clone()
        taken = tree_map_only(
            Tensor, Tensor.detach, (args, kwargs)
        )  # as shaped now: later operations may transpose in place
        result = function(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = []
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                self.own[t.untyped_storage()._cdata] = t  # kept, so that no other gets its place in memory
                fresh.append(t.detach())
            else:
                fresh.append(None)
        self.operations.append((function, *taken, fresh))
        return result


class EmulatedGraphs:
    """Counts what is asked of it; ``prompt``: numbers arrive at once, else when they are waited for."""

    prompt = True

    def __init__(self, device):
        self.warm_ups = self.captures = self.replays = self.fetches = self.waits = 0

    def warm_up(self, run):
        self.warm_ups += 1
        with Recorder() as recorder:
            run()
        return recorder.waited

    def capture(self, run):
        self.captures += 1
        with torch.random.fork_rng(devices=()), Recorder() as recorder:
            run()
        if recorder.waited:
            raise RuntimeError("the step waited for the device while it was captured")
        for whole, before in recorder.before.values():  # nothing was executed
            whole.copy_(before)
        for t in recorder.own.values():
            t.fill_(torch.nan if t.is_floating_point() else 0)
        return lambda: self._replay(recorder.operations)

    @torch.no_grad()
    def _replay(self, operations):
        self.replays += 1
        for function, args, kwargs, fresh in operations:
            args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            for mine, made in zip(fresh, tree_leaves(function(*args, **kwargs)), strict=True):
                if mine is not None:
                    mine.copy_(made)

    def fetch(self, numbers):
        self.fetches += 1
        return Fetched(numbers.clone(), lambda: self.prompt, self._wait)

    def _wait(self):
        self.waits += 1
