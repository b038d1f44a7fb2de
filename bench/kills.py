"""Kills a run with SIGKILL at random moments, also within a save, goes on with it, and compares its end bit for bit.

    python bench/kills.py                # 50 kills, into bench/results/kills.json

Three small runs: a recipe, a loop of one's own whose target has dropout (which draws from torch's generator), and HNET+R.
Each is once left alone, and then killed and gone on with until it ends, over and over. What must be equal is all that a
checkpoint holds but times and memory: weights, optimizers, generators, the place in the data, curves, the accuracy matrix.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # forked children have no thread but the one that forked

import safetensors.torch
import sklearn.datasets  # noqa: F401
import torch
from torch import nn

import fasthyper as fh
from fasthyper import checkpoint
from fasthyper.environment import environment
from fasthyper.recipes import RECIPES, run

STEPS = 40
SMALL = {"num_tasks": 3, "steps": STEPS, "hidden": (6, 5), "chunk_size": 900, "target_hidden": (10,), "batch_size": 16}
REPLAY = {"method": "replay", "scenario": "class", "replay_hidden": (8,), "replay_chunk_size": 200, "steps": STEPS // 2}
EVERY = {"save_every": 1e-6}


def recipe(directory):
    run(dataclasses.replace(RECIPES["permuted-digits"], **SMALL), directory, False, lambda _: None, device="cpu", **EVERY)


def replay(directory):
    settings = dataclasses.replace(RECIPES["permuted-digits"], **{**SMALL, **REPLAY})
    run(settings, directory, False, lambda _: None, device="cpu", **EVERY)


def dropout(directory):
    stream = fh.streams.permuted_digits(3, 1)
    torch.manual_seed(7)
    target = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 10))
    if checkpoint.holds_run(directory):
        trainer = fh.Trainer.load(directory, target=target, out=directory, progress=False, **EVERY)
    else:
        hnet = fh.ChunkedHypernet(target, 3, chunk_size=300, hidden=(6,))
        trainer = fh.Trainer(hnet, out=directory, optimizer="sgd", lr=0.05, reg_tasks=1, progress=False, **EVERY)
    done = len(trainer.results.tasks)
    if done and done - 1 not in trainer.results.accuracy:
        trainer.evaluate(stream[:done])
    for task in stream[done:]:
        trainer.fit(task, steps=STEPS, batch_size=16)
        trainer.evaluate(stream[: task.index + 1])
    trainer.flush()


CASES = {"recipe": recipe, "dropout": dropout, "replay": replay}


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_save(at):
    """From now on the call number ``at`` of what makes up a save is the last: it is half done, not begun, or just done."""
    calls = 0

    def deadly(function, half=None):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                (half or die)(*args)
                die()
            result = function(*args, **kwargs)
            calls += 1
            if calls == at:
                die()
            return result

        return call

    def half_a_file(tensors, path):
        path.write_bytes(safetensors.torch.save(tensors)[:-1000])

    for name in ("fsync", "link", "replace"):
        setattr(os, name, deadly(getattr(os, name)))
    safetensors.torch.save_file = deadly(safetensors.torch.save_file, half_a_file)


def start(function, *args):
    """In a forked child: its process id."""
    child = os.fork()
    if child:
        return child
    try:
        checkpoint.SHARE = 1.0  # saves follow on one another
        function(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def end(child):
    """Waits for it: whether it was killed; raises where it failed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        sys.exit(f"a run failed with status {os.waitstatus_to_exitcode(status)}")
    return False


def fingerprint(directory):
    """SHA-256 of all that a checkpoint holds but times and memory."""
    tensors, state = checkpoint.load(directory)

    def without_times(value):
        if isinstance(value, dict):
            return {key: without_times(v) for key, v in value.items() if key not in ("seconds", "peak_memory")}
        return [without_times(v) for v in value] if isinstance(value, list) else value

    digest = hashlib.sha256(json.dumps(without_times(state), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kill(case, kills, scratch, draw):
    """Kills it so often, and says how; ends with an error where a run ends otherwise than one left alone."""
    began = time.monotonic()
    end(start(CASES[case], scratch / f"{case}-whole"))
    seconds, want = time.monotonic() - began, fingerprint(scratch / f"{case}-whole")
    counts = Counter()
    while counts["kills"] < kills or counts["open"]:
        directory, last = scratch / f"{case}-{counts['runs']}", counts["kills"] >= kills
        had_one = (directory / checkpoint.CHECKPOINT).exists()
        in_a_save = draw.random() < 0.6
        if last:
            child = start(CASES[case], directory)
        elif in_a_save:
            at = draw.randint(1, 60)
            child = start(lambda at=at, directory=directory: (die_in_a_save(at), CASES[case](directory)))
        else:
            child = start(CASES[case], directory)
            time.sleep(draw.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        if end(child):
            counts["kills"] += 1
            counts["in a save"] += in_a_save
            counts["open"] = 1
            if had_one or (directory / checkpoint.CHECKPOINT).exists():
                checkpoint.load(directory)  # whole, whenever it was
                counts["left a state"] += 1
            continue
        counts["runs"], counts["open"] = counts["runs"] + 1, 0
        if fingerprint(directory) != want:
            sys.exit(f"{case}: a run that was killed and gone on with ended otherwise than one left alone")
        left = {path.name for path in directory.iterdir()} - {checkpoint.SAMPLES}
        if left != {checkpoint.CHECKPOINT, checkpoint.PREVIOUS, checkpoint.RESULTS}:
            sys.exit(f"{case}: {left} lie in the directory")
    del counts["open"]
    return dict(counts)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kills.json")
    args = parser.parse_args()
    draw, found = random.Random(args.seed), {}
    machine = environment()  # asks git once, for all children
    for i, case in enumerate(args.cases):
        share = args.kills * (i + 1) // len(args.cases) - args.kills * i // len(args.cases)
        with tempfile.TemporaryDirectory() as scratch:
            found[case] = kill(case, share, Path(scratch), draw)
        print(case, found[case], flush=True)
    content = {"cases": found, "equal": True, "seed": args.seed, "environment": machine}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
