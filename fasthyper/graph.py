"""Training steps as one CUDA graph: launched one after the other without waiting, their numbers read as they arrive."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CAPACITY = 1024  # steps whose numbers the device keeps until they are read
WARM_UP = 2  # steps that are run as they are before one is captured
MOST_GRAPHS = 4  # of batches of different shapes; more of them are run as they are
READ_EVERY = 0.1  # seconds
NUMBERS = 3  # of a step, at most

Step = Callable[..., Tensor]


class Fetched(NamedTuple):
    """A tensor on its way to the host."""

    host: Tensor
    arrived: Callable[[], bool]
    wait: Callable[[], None]


class Runtime(Protocol):
    """What a device must be able to do. Tests put one in that needs no GPU."""

    def __init__(self, device: torch.device): ...

    def warm_up(self, run: Callable[[], object]) -> bool:
        """Runs it; whether it waited for the device, which a capture forbids."""

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """What launches all of it at once. Nothing is executed yet.

        Raises:
            RuntimeError: something in it cannot be captured.
        """

    def fetch(self, numbers: Tensor) -> Fetched:
        """Copies to the host what all launched so far will have written, without waiting."""


class Cuda:
    """Warms up and captures on a stream of its own, in memory that all captures share."""

    def __init__(self, device: torch.device):
        self._device, self._stream, self._pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        scratch = torch.zeros((), device=device)
        self._keeps_pool = self.capture(scratch.zero_)  # once its last graph is gone, a pool cannot be captured into again

    def warm_up(self, run: Callable[[], object]) -> bool:
        here, mode = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(here)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(self._stream):
                    run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        here.wait_stream(self._stream)
        of_syncs = ["ynchroniz" in str(warning.message) for warning in caught]
        for warning, of_sync in zip(caught, of_syncs, strict=True):
            if not of_sync:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return any("called a synchronizing" in str(warning.message) for warning in caught)

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        capturing = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")
        with torch.cuda.stream(self._stream), capturing:  # the outer one ends also where the capture fails
            run()
        return graph.replay

    def fetch(self, numbers: Tensor) -> Fetched:
        host, event = numbers.to("cpu", non_blocking=True), torch.cuda.Event()  # torch pins the copy's memory
        event.record(torch.cuda.current_stream(self._device))
        return Fetched(host, event.query, event.synchronize)


RUNTIMES: dict[str, type[Runtime]] = {"cuda": Cuda}  # by type of device


class StepGraph:
    """Launches steps, and reads later what they returned.

    A step is ``run(failed, *inputs)``: it returns at most ``NUMBERS`` of them, ``[k]``, and reads nothing from the device.
    ``failed``, int64 ``[]``, is the trainer's count of steps in a row that were not finite and changed nothing. It must find
    all it uses but ``inputs`` where it was when it was captured.

    Args:
        runtime: of the device.
        device, dtype: of the numbers.
    """

    def __init__(self, runtime: Runtime, device: torch.device, dtype: torch.dtype):
        self._runtime = runtime
        self._failed = torch.zeros((), dtype=torch.int64, device=device)
        self._numbers = torch.zeros(CAPACITY, NUMBERS, dtype=dtype, device=device)  # a ring
        self._place = torch.zeros(1, dtype=torch.int64, device=device)  # of the next step in it
        self._steps: dict[Hashable, _Captured] = {}
        self.restart()

    def restart(self) -> None:
        """Forgets the steps that were not read; none failed."""
        self._failed.zero_()
        self._place.zero_()
        self._launched = self._asked = self._read = 0
        self._fetched: Fetched | None = None
        self._asked_at = time.perf_counter()

    def launch(self, key: Hashable, run: Step, inputs: Sequence[Tensor]) -> str | None:
        """One step; why it cannot be captured, or ``None``: it was, or can be.

        Args:
            key: what the step depends on beside numbers in tensors; keeps alive what is captured.
            run: the step; of one key always the same.
            inputs: copied to where the captured step reads them.
        """
        key = key, *((t.shape, t.dtype) for t in inputs)
        if key not in self._steps and len(self._steps) < MOST_GRAPHS:
            self._steps[key] = _Captured(self._runtime, self._returning(run), inputs)
        obstacle = None
        if key in self._steps:
            obstacle = self._steps[key](inputs)
        else:
            self._returning(run)(*inputs)
        self._launched += 1
        return obstacle

    def read(self, wait: bool = False) -> list[list[float]]:
        """What further steps returned, in order, as far as it has arrived: [k numbers, and others to fill up] each.

        ``wait``: for all steps launched so far. Else numbers are asked for 10 times a second and taken when they are there.
        """
        found: list[list[float]] = []
        while self._read < self._launched:
            unread, fetched = self._launched - self._read, self._fetched
            if fetched is None:
                due = unread >= CAPACITY // 2 or time.perf_counter() - self._asked_at > READ_EVERY
                if not (wait or due):
                    break
                self._fetched, self._asked = self._runtime.fetch(self._numbers), self._launched
                self._asked_at = time.perf_counter()
            elif wait or unread >= CAPACITY or fetched.arrived():
                fetched.wait()
                rows = fetched.host.tolist()
                found += [rows[i % CAPACITY] for i in range(self._read, self._asked)]
                self._read, self._fetched = self._asked, None
            else:
                break
        return found

    def _returning(self, run: Step) -> Callable[..., None]:
        """``run`` with what it returns put into the ring."""

        def step(*inputs: Tensor) -> None:
            values = run(self._failed, *inputs)
            row = torch.nn.functional.pad(values, (0, NUMBERS - len(values))).to(self._numbers.dtype)
            self._numbers.index_copy_(0, self._place, row[None])
            self._place.add_(1).remainder_(CAPACITY)

        return step


class _Captured:
    """A step with inputs of one shape."""

    def __init__(self, runtime: Runtime, step: Callable[..., None], inputs: Sequence[Tensor]):
        self._runtime, self._inputs = runtime, [t.clone() for t in inputs]
        self._run: Callable[[], object] = lambda: step(*self._inputs)
        self._runs, self._captured = 0, False

    def __call__(self, inputs: Sequence[Tensor]) -> str | None:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._runs += 1
        if self._runs <= WARM_UP:
            waits = self._runtime.warm_up(self._run)
            return "it waits for the device" if waits and self._runs == WARM_UP else None  # the first makes what then stays
        obstacle = None
        if not self._captured:
            try:
                self._run, self._captured = self._runtime.capture(self._run), True
            except RuntimeError as error:  # one that is not of capturing alone comes again
                obstacle = str(error).partition("\n")[0]
        self._run()
        return obstacle
