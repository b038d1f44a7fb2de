"""PermutedMNIST-100 with the hypernetwork of the paper, trained on one device in slices of time.

python bench/longseq.py --out DIR [--data DIR | --digits] [--tasks N] [--steps N] [--seconds S] [--device cuda] [--tf32]

A slice ends where the next task would not, or at the latest ``--seconds`` after it began; run again, it goes on from the
checkpoint in DIR. DIR/longseq.json says what was trained and evaluated (all tasks so far, after every tenth task and the
last), in how many seconds, and how well. ``--data`` is a folder with the four files of MNIST; ``--digits`` takes, in its
place, scikit-learn's digits, 8x8, each pixel made 16 of a 32x32 image. Exit status: 0, also while tasks are left; 1 failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fasthyper import ChunkedHypernet, Trainer, backends, nets, streams
from fasthyper.checkpoint import CHECKPOINT
from fasthyper.environment import environment
from fasthyper.errors import FasthyperError
from fasthyper.recipes import RECIPES
from fasthyper.streams.stream import Stream, TaskData, permuted_stream

EVERY = 10  # tasks between evaluations
RECIPE = RECIPES["permuted-mnist-100"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with MNIST's files; default: the cache")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits in place of MNIST")
    parser.add_argument("--tasks", type=int, default=RECIPE.num_tasks)
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="per task")
    parser.add_argument("--seconds", type=float, default=480.0, help="after which the slice ends")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layout", default="flat", choices=("flat", "aligned"))
    parser.add_argument("--tf32", action="store_true", help="allow TF32 in float32 products")
    parser.add_argument("--commit", help="what was measured, where the checkout has no .git")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    try:
        run = Run(args)
        timer = threading.Timer(max(0.01, run.seconds_left), os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        with contextlib.suppress(KeyboardInterrupt):  # fit has saved what it was doing
            timer.start()
            run.train()
            timer.cancel()
        run.write()
    except FasthyperError as error:
        print(error, file=sys.stderr)
        return 1
    record = run.record
    print(
        f"{record['tasks_done']} of {args.tasks} tasks, {record['total_steps']} steps; training "
        f"{record['training_seconds']:.1f} s, evaluation {record['evaluation_seconds']:.1f} s, "
        f"{'finished' if record['finished'] else 'run again to go on'}"
    )
    return 0


class Run:
    """One slice: the trainer, new or from the checkpoint, and the record of all slices.

    Raises:
        FasthyperError: no data, or a directory of another run.
    """

    def __init__(self, args: argparse.Namespace):
        self._began, self._until = time.perf_counter(), time.perf_counter() + args.seconds
        self.path, self.args = args.out / "longseq.json", args
        self.settings = {"tasks": args.tasks, "steps": args.steps, "layout": args.layout, "tf32": args.tf32}
        self.settings["data"] = "digits, 8x8 upscaled to 32x32, permuted" if args.digits else "MNIST, permuted"
        self.record: dict[str, Any] = {"format": "fasthyper-longseq-1", "settings": self.settings, "slices": []}
        self.record |= {"training_seconds": 0.0, "evaluation_seconds": 0.0, "evaluations": {}}
        if self.path.exists():
            self.record = json.loads(self.path.read_text())
            if self.record["settings"] != self.settings:
                raise FasthyperError(f"{self.path} is of a run with {self.record['settings']}, not {self.settings}")
        self._earlier = self.record["slices"]
        if args.digits:
            self.stream = upscaled_digits(args.tasks, args.device)
        else:
            self.stream = streams.permuted_mnist(args.tasks, RECIPE.seed, data_dir=args.data, device=args.device)
        self.trainer = self._trainer(args.out / "run")
        self._surroundings = environment() | {"backend": backends()[self.trainer.device.type]}
        self._surroundings |= {"commit": args.commit} if args.commit else {}

    @property
    def seconds_left(self) -> float:
        """Of the slice."""
        return self._until - time.perf_counter()

    def _trainer(self, out: Path) -> Trainer:
        if (out / CHECKPOINT).exists():
            return Trainer.load(out, device=self.args.device, out=out, progress=False)
        hnet = ChunkedHypernet(
            nets.MLP(1024, RECIPE.target_hidden, 10),
            self.args.tasks,
            chunk_size=RECIPE.chunk_size,
            hidden=RECIPE.hidden,
            task_dim=RECIPE.task_dim,
            chunk_dim=RECIPE.chunk_dim,
            activation=RECIPE.activation,
            layout=self.args.layout,
            seed=RECIPE.seed,
        )
        options: dict[str, Any] = {"lr": RECIPE.lr, "beta": RECIPE.beta, "seed": RECIPE.seed, "name": "longseq"}
        return Trainer(hnet, **options, settings=self.settings, device=self.args.device, out=out, progress=False)

    def train(self) -> None:
        """Until all is trained and evaluated, or the slice ends."""
        longest = 0.0  # of a task in this slice
        while True:
            done = len(self.trainer.results.tasks)
            due = done > 0 and (done % EVERY == 0 or done == self.args.tasks)
            if due and str(done) not in self.record["evaluations"]:
                with self._clock("evaluation_seconds"):
                    accuracies = self.trainer.evaluate(self.stream[:done])
                mean, lowest = sum(accuracies) / done, min(accuracies)
                self.record["evaluations"][str(done)] = {"mean": mean, "lowest": lowest, "accuracies": accuracies}
                self.write()
                print(f"after {done} tasks: mean accuracy {100 * mean:.2f} %, lowest {100 * lowest:.2f} %", flush=True)
            if done == self.args.tasks or longest > self.seconds_left:
                return
            with self._clock("training_seconds"):
                record = self.trainer.fit(self.stream[done], steps=self.args.steps, batch_size=RECIPE.batch_size)
            longest = max(longest, 1.2 * record.seconds)

    def write(self) -> None:
        """Replaces the record by what is known now."""
        tasks, device = self.trainer.results.tasks, self.trainer.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        now = {"seconds": time.perf_counter() - self._began, "peak_memory": memory, "environment": self._surroundings}
        self.record |= {
            "finished": str(self.args.tasks) in self.record["evaluations"],
            "tasks_done": len(tasks),
            "total_steps": sum(task.steps for task in tasks) + self.trainer.current_step,
            "task_seconds": [task.seconds for task in tasks],
            "slices": [*self._earlier, now],
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1) + "\n")
        temporary.replace(self.path)

    @contextlib.contextmanager
    def _clock(self, key: str) -> Iterator[None]:
        """Adds the seconds inside, interrupted or not."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.record[key] += time.perf_counter() - began


def upscaled_digits(num_tasks: int, device: str) -> Stream:
    """``permuted_digits`` with each pixel made 4x4, so that inputs are ``[n, 1024]`` as those of padded MNIST."""
    first = streams.permuted_digits(1)[0]

    def upscaled(data: TaskData) -> TaskData:
        images = data.inputs.view(-1, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return TaskData(images.flatten(1).to(device), data.labels.to(device))

    return permuted_stream(
        "permuted-upscaled-digits", num_tasks, RECIPE.seed, upscaled(first.train), upscaled(first.test), 10
    )


if __name__ == "__main__":
    sys.exit(main())
