"""How fast gloo sums the messages of a step between two processes, each on a core.

python bench/scaling.py     writes bench/results/scaling.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from fasthyper.bench.costs import FLOAT, Shapes, messages
from fasthyper.bench.workloads import WORKLOADS
from fasthyper.environment import environment

RESULT = Path(__file__).parent / "results" / "scaling.json"
NAMES, CALLS, SHORT = ("p10", "p100"), 200, 64  # workloads, sums of a size, bytes of a short message


def work(rank: int, folder: str) -> None:
    """One of two processes. The shortest of many sums counts: what others do on the machine can only lengthen one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for name in NAMES:
        for num_bytes in (SHORT, FLOAT * messages(Shapes.of(WORKLOADS[name]))[0]):
            tensor, seconds = torch.zeros(num_bytes // FLOAT), []
            for _ in range(CALLS):
                began = time.perf_counter()
                dist.all_reduce(tensor)
                seconds.append(time.perf_counter() - began)
            found.append({"workload": name, "bytes": num_bytes, "seconds": min(seconds)})
    if rank == 0:
        Path(folder, "sums").write_text(json.dumps(found))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(work, (folder,), 2, start_method="spawn")
        sums = json.loads(Path(folder, "sums").read_text())
    record = {"environment": environment(), "sums": sums}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
