"""What checkpoints cost the training: the time it waits for a copy, and what writing beside it takes from its steps.

    python bench/checkpoint_cost.py      # into bench/results/checkpoint_cost.json

The state is that of PermutedMNIST-10's network in the middle of a task, with the records of 10 and of 1000 tasks. Times are
of the processor, of one thread, so that what else a machine does matters little. ``copy_ms``: the training thread in
``Saver.save``, which is all that it waits; ``write_ms``: the other thread, as if all of it were taken from the training.
Shares are of a run that saves every 300 s. ``check_ms``: what looking at the gradients adds to a step.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import fasthyper as fh
import fasthyper.trainer as training
from fasthyper import checkpoint
from fasthyper.environment import environment
from fasthyper.metrics import TaskRecord

SAVES, PAST = 7, 10
torch.set_num_threads(1)


def trained(tasks, directory):
    """A trainer in the middle of a task, with so many finished ones, and a batch for its steps."""
    hnet = fh.ChunkedHypernet(
        fh.nets.MLP(1024, (1000, 1000), 10),
        PAST + 1,
        chunk_size=78_000,
        hidden=(25, 25),
        task_dim=24,
        chunk_dim=8,
        activation="elu",
    )
    trainer = fh.Trainer(hnet, out=directory, progress=False)
    batch = torch.rand(128, 1024), torch.arange(128) % 10
    for _ in range(PAST):
        trainer.begin_task(steps=1)
        trainer.step(*batch)
        trainer.end_task()
    curve = [(step, 0.123456789 / (step + 1)) for step in range(20_000 // tasks if tasks > PAST else 200)]
    trainer.results.tasks[0] = TaskRecord(0, "task", loss=curve, drift=curve)
    trainer.begin_task(steps=1000)
    state = trainer.state

    def with_records():  # as many records as a run of so many tasks has, of the length that theirs have
        tensors, found = state()
        found["results"]["tasks"] = [trainer.results.tasks[0].to_json() for _ in range(tasks)]
        return tensors, found

    trainer.state = with_records
    for _ in range(3):
        trainer.step(*batch)
    trainer.flush()
    return trainer, batch


def measured(tasks):
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        trainer, batch = trained(tasks, Path(scratch) / "run")
        copies, writes, write = [], [], checkpoint._save

        def timed(*args):
            began = time.thread_time()
            write(*args)
            writes.append(time.thread_time() - began)

        checkpoint._save = timed
        try:
            for _ in range(SAVES):
                began = time.thread_time()
                trainer._saver.save()
                copies.append(time.thread_time() - began)
                trainer.step(*batch)
                trainer.flush()
            step, check = cost_of_check(trainer, batch)
        finally:
            checkpoint._save = write
        size = (Path(scratch) / "run" / checkpoint.CHECKPOINT).stat().st_size
    copy, written = statistics.median(copies), statistics.median(writes)
    return {
        "megabytes": round(size / 1e6, 1),
        "copy_ms": round(1000 * copy, 2),
        "write_ms": round(1000 * written, 1),
        "step_ms": round(1000 * step, 2),
        "check_ms": round(1000 * check, 2),
        "share_waiting": copy / checkpoint.SAVE_EVERY,
        "share_in_all": (copy + written) / checkpoint.SAVE_EVERY,
    }


def cost_of_check(trainer, batch, pairs=40):
    total, seconds = training.total, {}
    for _ in range(pairs):
        for name, look in (("with", total), ("without", lambda grads: grads[0].new_zeros(()))):
            training.total = look
            began = time.thread_time()
            trainer.step(*batch)
            seconds.setdefault(name, []).append(time.thread_time() - began)
    training.total = total
    step, unchecked = (statistics.median(found) for found in seconds.values())
    return step, step - unchecked


def main():
    found = {f"{tasks} tasks": measured(tasks) for tasks in (10, 1000)}
    content = {"every_s": checkpoint.SAVE_EVERY, "cases": found, "environment": environment()}
    (Path(__file__).parent / "results" / "checkpoint_cost.json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
