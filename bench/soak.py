"""10,000 short tasks in one process: what grows, and what does not.

python bench/soak.py [--tasks N] [--steps N] [--out FILE]

Each task is permuted 8x8 digits under a tiny hypernetwork that holds ``REG_TASKS`` sampled past tasks a step, so that by the
mathematics a step costs the same at any time. Times are of the process's CPU, on one thread: a machine may do other work
beside. All is logged to CSV; every ``SAVE_EVERY`` tasks the state is saved and the scores are made.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fasthyper as fh
from fasthyper.checkpoint import CHECKPOINT, RESULTS
from fasthyper.environment import environment
from fasthyper.loggers import CSVLogger, Logger

REG_TASKS, WINDOW, SAVE_EVERY, EVALUATED = 16, 100, 500, 8
OUT = Path(__file__).parent / "results" / "soak.json"


class Clock(Logger):
    """CPU seconds of each step but a task's first, which the trainer begins before it."""

    def __init__(self) -> None:
        super().__init__(every=1)
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step(self, task: int, step: int, total: int, loss: float, drift: float) -> None:
        now = time.process_time()
        if step > 0:
            self.seconds.append(now - self._last)
        self._last = now


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=10_000, help=f"a multiple of {SAVE_EVERY}")
    parser.add_argument("--steps", type=int, default=4, help="per task")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        windows, saves = soak(args.tasks, args.steps, Path(folder))
    settings = {"tasks": args.tasks, "steps": args.steps, "reg_tasks": REG_TASKS, "window": WINDOW}
    found = {"environment": environment(), "settings": settings, "windows": windows, "saves": saves}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def soak(num_tasks: int, steps: int, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Trains; what each window of tasks took and left, and each save."""
    stream = fh.streams.permuted_digits(num_tasks, 42)
    target = fh.nets.MLP(64, (32,), 10)
    hnet = fh.ChunkedHypernet(target, num_tasks, chunk_size=300, hidden=(16,), task_dim=8, chunk_dim=4)
    clock, log = Clock(), CSVLogger(folder / "log.csv")
    trainer = fh.Trainer(hnet, lr=1e-3, beta=0.01, reg_tasks=REG_TASKS, progress=False, loggers=[clock, log])
    windows: list[dict[str, Any]] = []
    saves: list[dict[str, Any]] = []
    tasks: list[float] = []
    for task in stream:
        tasks.append(cpu_seconds(lambda task=task: trainer.fit(task, steps=steps, batch_size=32)))
        done = task.index + 1
        if done % WINDOW == 0:
            accuracies = trainer.evaluate(stream[done - EVALUATED : done])
            kept = deep_size([trainer.results.tasks[0], trainer.results.tasks[-1]]) // 2
            windows.append(
                {
                    "tasks": done,
                    "step": statistics.median(clock.seconds),
                    "task": statistics.median(tasks),
                    "resident": resident(),
                    "records": done * kept,
                    "handles": len(os.listdir("/proc/self/fd")),
                    "threads": len(os.listdir("/proc/self/task")),
                    "accuracy": statistics.mean(accuracies),
                }
            )
            clock.seconds.clear()
            tasks.clear()
        if done % SAVE_EVERY == 0:
            saved = cpu_seconds(lambda: trainer.save(folder / "run"))
            scored = cpu_seconds(lambda: trainer.results.summary())
            sizes = {name: (folder / "run" / name).stat().st_size for name in (CHECKPOINT, RESULTS)}
            saves.append({"tasks": done, "save": saved, "summary": scored, **sizes})
            print(windows[-1], saves[-1], flush=True)
    log.close()
    return windows, saves


def cpu_seconds(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def resident() -> int:
    """Bytes of the process that lie in memory, without what waits to be collected or lies free in malloc's pages."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def deep_size(thing: Any) -> int:
    """Bytes of plain Python objects and all they hold."""
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    return sys.getsizeof(thing) + sum(map(deep_size, inner)) + (deep_size(vars(thing)) if hasattr(thing, "__dict__") else 0)


if __name__ == "__main__":
    sys.exit(main())
