"""Steps of one and of two ranks of a thread each, and how fast gloo sums between two of them.

python bench/scaling.py     writes bench/results/scaling.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from fasthyper.bench.costs import FLOAT, Shapes, messages
from fasthyper.bench.workloads import WORKLOADS
from fasthyper.distributed import Ranks
from fasthyper.environment import environment
from fasthyper.metrics import TaskRecord
from fasthyper.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "scaling.json"
CASES = (("p10", 10), ("p10", 100), ("p100", 10), ("p100", 100))
RANKS, CALLS, SHORT = 2, {"sum": 40, "step": 15}, 64  # bytes


def best(call: Callable[[], object], calls: int) -> float:
    """Seconds of the shortest of so many calls: like a machine's rates, what others do beside can only lengthen it."""
    call()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def work(rank: int, ranks: int, folder: str) -> None:
    """One rank: the first writes what it measured to ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    group = Ranks(dist.group.WORLD if ranks > 1 else None)
    found: dict[str, list[dict[str, object]]] = {"steps": [], "sums": []}
    for name in dict.fromkeys(name for name, _ in CASES) if ranks > 1 else ():
        for size in (SHORT, FLOAT * messages(Shapes.of(WORKLOADS[name]))[0]):
            tensor = torch.zeros(size // FLOAT)
            seconds = best(lambda tensor=tensor: dist.all_reduce(tensor), CALLS["sum"])
            found["sums"].append({"workload": name, "bytes": size, "seconds": seconds})
    for name, past in CASES:
        workload = WORKLOADS[name]
        trainer = Trainer(workload.build(past), beta=workload.beta, progress=False, ranks=group)
        trainer.results.tasks = [TaskRecord(task) for task in range(past)]
        now, batch = trainer._begin(past, ""), workload.batch()
        seconds = best(lambda trainer=trainer, now=now, batch=batch: trainer._step(now, *batch), CALLS["step"])
        found["steps"].append({"workload": name, "past": past, "ranks": ranks, "seconds": seconds})
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(found))


def main() -> int:
    record = {"environment": environment(), "threads": 1, "steps": [], "sums": []}
    for ranks in (1, RANKS):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(work, (ranks, folder), ranks, start_method="spawn")
            found = json.loads(Path(folder, f"{ranks}.json").read_text())
        record["steps"] += found["steps"]
        record["sums"] += found["sums"]
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
