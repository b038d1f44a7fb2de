"""Run directories as training leaves them, with numbers that are known."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from fasthyper.metrics import Results, TaskRecord


def results(size, steps=200, points=20):
    """Task j is at 0.9 + j / 10,000 when learned, and loses 0.001 with every later task, up to 0.01."""
    made = Results(peak_memory=300 * 2**20)
    for i in range(size):
        curve = [(k * steps // points, 2.0 / (k + 1)) for k in range(points)]
        drift = [(step, 1e-4 * value) for step, value in curve] if i else []
        made.tasks.append(TaskRecord(i, f"task {i}", steps, steps * 64, 2.5, curve, drift))
        made.accuracy[i] = {j: 0.9 + j / 10_000 - 0.001 * min(i - j, 10) for j in range(i + 1)}
    return made


def results_of(matrix):
    """Lower triangle as given; 10 samples in 2 s per task."""
    made = Results([TaskRecord(i, steps=1, samples=10, seconds=2.0) for i in range(len(matrix))])
    made.accuracy = {i: dict(enumerate(row[: i + 1])) for i, row in enumerate(matrix)}
    return made


def write_run(path, made, name="demo", measured=(), **changes):
    """``measured``: more keys of the results. ``changes``: of the file's first level."""
    path.mkdir(parents=True)
    content = {
        "format": "fasthyper-results-1",
        "name": name,
        "config": {"lr": 0.001},
        "environment": {"torch": "2.13.0", "machine": "a machine", "date": "2026-01-01 00:00 UTC"},
        "results": made.to_json() | dict(measured),
    }
    (path / "results.json").write_text(json.dumps(content | changes))
    return path


def write_embeddings(path, embeddings):
    tensors = {f"hnet.task_embeddings.{j}": row.clone() for j, row in enumerate(embeddings)}
    save_file(tensors | {"hnet.basis": torch.ones(2)}, path / "checkpoint.safetensors", {"format": "fasthyper-checkpoint-1"})


def write_samples(path, samples):
    save_file({"samples": samples}, path / "samples.safetensors")
