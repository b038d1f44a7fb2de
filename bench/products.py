"""What products in vector registers gain over those of torch's library, on this processor (DESIGN, Products of float32).

    python bench/products.py             # into bench/results/products.json, of AVX2 registers products_avx2.json

Each way in processes of its own, in turn, told by ATEN_CPU_CAPABILITY: torch's own elementwise code follows it too, its
matrix library does not. Regularizers, drifts of affine maps, and steps whose layers make their weights.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from fasthyper import ops
from fasthyper.bench.machine import gemm_rate, timed
from fasthyper.bench.measure import quartiles
from fasthyper.bench.peers import OURS, SIDES
from fasthyper.bench.workloads import WORKLOADS
from fasthyper.environment import environment
from fasthyper.recipes import RECIPES

KIND = torch.backends.cpu.get_cpu_capability().lower()  # of registers: avx512 or avx2
FILE = Path(__file__).parent / "results" / ("products_avx2.json" if KIND == "avx2" else "products.json")
WAYS = {"registers": KIND, "torch": "default"}
CASES = (("p10", 10), ("split", 5), ("p100", 100), ("p100", 10), ("small", 100), ("small", 10), ("resnet", 6))
ALIGNED = (("p10", 10), ("split", 5), ("small", 10))
AFFINE = ("permuted-mnist-1000", "permuted-mnist-100-hour")
ROUNDS, SIZE = 5, 2048


def seconds() -> dict[str, float]:
    """Median of each case, in this process."""
    found = {}
    for name, past in CASES:
        found[f"regularizer `{name}` at {past}"] = _median(SIDES[OURS](WORKLOADS[name], past).prepare("regularizer"))
    for name in AFFINE:
        sizes = ((28 // RECIPES[name].pool) ** 2, *RECIPES[name].target_hidden, 10)
        weights, width = sum((i + 1) * o for i, o in pairwise(sizes)), RECIPES[name].task_dim + 1
        basis, basis0, rows = torch.rand(weights, width), torch.rand(weights, width), torch.rand(width, width)
        moments = rows.T @ rows
        found[f"affine drift `{name}`"] = _median(functools.partial(ops.affine_drift_value_and_grad, basis, basis0, moments))
    for name, past in ALIGNED:
        aligned = WORKLOADS[name].with_layout("aligned")
        found[f"step `{aligned.name}` at {past}"] = _median(SIDES[OURS](aligned, past).prepare("step"))
    h, basis = torch.rand(SIZE, SIZE - 1), torch.rand(SIZE, SIZE)
    found["product"] = timed(lambda: ops.generate(h, basis, [(SIZE * SIZE,)]), seconds=2.0)
    return found


def _median(call: Callable[[], object]) -> float:
    return timed(call, pick=statistics.median, seconds=2.0)


def main() -> None:
    if sys.argv[1:] == ["--child"]:
        print(json.dumps(seconds()))
        return
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, capability in WAYS.items():
            env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
            done = subprocess.run([sys.executable, __file__, "--child"], env=env, check=True, capture_output=True, text=True)
            rounds[way].append(json.loads(done.stdout))
    rows = {}
    for case in rounds["torch"][0]:
        times = {way: [found[case] for found in taken] for way, taken in rounds.items()}
        ratios = [other / ours for ours, other in zip(times["registers"], times["torch"], strict=True)]
        rows[case] = {way: quartiles(taken) for way, taken in times.items()} | {"ratio": quartiles(ratios)}
        print(case, json.dumps(rows[case]["ratio"]))
    rates = {"registers": 2 * SIZE**3 / rows["product"]["registers"]["median"], "torch": gemm_rate(SIZE, SIZE, SIZE)}
    FILE.write_text(json.dumps({"environment": environment(), "flops_per_second": rates, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
