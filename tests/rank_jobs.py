"""What the processes of tests/test_distributed.py do: one job after the other, for it is their start that takes long.

As a program: the command line, where one rank is killed in a step.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from networks import conv_with_norm, make
from torch import nn

import fasthyper as fh
from fasthyper.distributed import Ranks
from fasthyper.streams import Stream, Task, TaskData

TASKS, STEPS = 4, 4


def stream(shape=(6,), spoiled=None):
    """Random examples of four classes; ``spoiled``: (task, example) that is infinite."""

    def make_task(index):
        generator = torch.Generator().manual_seed(index)
        x, y = torch.randn(30, *shape, generator=generator), torch.arange(30) % 4
        if spoiled is not None and index == spoiled[0]:
            x[spoiled[1]] = math.inf
        return Task(index, *[TaskData(x, y)] * 2, 4)

    return Stream("random", TASKS, make_task)


def norm_hnet(**options):
    return make(conv_with_norm(**options), TASKS)


def seeded(build):
    torch.manual_seed(0)
    return build()


CASES = {  # the hypernetwork, the trainer's options, the batch, the shape of an example
    "plain": (lambda: make(fh.nets.MLP(6, (5,), 4), TASKS), {}, 10, (6,)),
    "aligned, heads": (
        lambda: make(fh.nets.MLP(6, (5,), 4 * TASKS), TASKS, layout="aligned", outputs_per_task=4),
        {"optimizer": "adamw", "optimizer_options": {"weight_decay": 0.1}},
        8,
        (6,),
    ),
    "sampled": (lambda: make(fh.nets.MLP(6, (5,), 4 * TASKS), TASKS, outputs_per_task=4), {"reg_tasks": 2}, 9, (6,)),
    "plastic": (lambda: make(fh.nets.MLP(6, (5,), 4), TASKS), {"plastic": True, "schedule": "cosine"}, 7, (6,)),
    "plastic, sampled": (lambda: make(fh.nets.MLP(6, (5,), 4), TASKS), {"plastic": True, "reg_tasks": 2}, 7, (6,)),
    "sampled for each chunk": (
        lambda: make(fh.nets.MLP(6, (5,), 4 * TASKS), TASKS, outputs_per_task=4),
        {"reg_tasks": 2, "reg_per_chunk": True, "plastic": True},
        9,
        (6,),
    ),
    "no look-ahead": (lambda: make(fh.nets.MLP(6, (5,), 4), TASKS), {"lookahead": False, "plastic": True}, 10, (6,)),
    "fewer examples than ranks": (lambda: make(fh.nets.MLP(6, (5,), 4), TASKS), {"optimizer": "sgd"}, 2, (6,)),
    "partly generated": (
        lambda: make(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), TASKS, generate="2.*", rest="trained"),
        {},
        10,
        (6,),
    ),
    "batch norm": (lambda: norm_hnet(momentum=None), {}, 10, (1, 4, 4)),
    "batch norm of the batch": (lambda: norm_hnet(track_running_stats=False), {}, 10, (1, 4, 4)),
}
SIZES = {case: (2, 3, 4) if case in ("plain", "batch norm") else (2, 4) for case in CASES}


def trainer_for(case, ranks=None, **more):
    build, options, _, _ = CASES[case]
    return fh.Trainer(seeded(build), lr=0.01, beta=0.5, progress=False, ranks=ranks, **{**options, **more})


def train(case, trainer, tasks=range(TASKS), stop=None):
    """Goes on up to the last of ``tasks``; ``stop``: (task, step) in which this process is interrupted."""
    _, _, batch_size, shape = CASES[case]
    if stop is not None:
        original = trainer._note

        def note(now, *numbers):
            if (now.record.index, now.record.steps) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            original(now, *numbers)

        trainer._note = note
    for task in stream(shape)[len(trainer.results.tasks) : tasks[-1] + 1]:
        trainer.fit(task, steps=STEPS, batch_size=batch_size)
        trainer.evaluate(stream(shape)[: task.index + 1])
    return trainer


def digest(trainer):
    """Of every bit of the hypernetwork."""
    sha = hashlib.sha256()
    for tensor in trainer.hnet.state_dict().values():
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def found(trainer):
    """Curves, accuracies and parameters, JSON-ready."""
    return {
        "curves": [number for record in trainer.results.tasks for _, number in (*record.loss, *record.drift)],
        "accuracy": [value for row in trainer.results.accuracy.values() for value in row.values()],
        "state": torch.cat([t.detach().cpu().double().flatten() for t in trainer.hnet.state_dict().values()]).tolist(),
        "digest": digest(trainer),
    }


@contextmanager
def messages():
    """Sizes, in numbers, of all that is summed."""
    sizes, original = [], dist.all_reduce

    def counted(tensor, **options):
        sizes.append(tensor.numel())
        return original(tensor, **options)

    dist.all_reduce = counted
    yield sizes
    dist.all_reduce = original


def work(rank, count, directory):
    """All jobs of one process among ``count``; what it found goes to a file of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    directory, report = Path(directory), {}
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=count)
    groups = {size: dist.new_group(range(size)) for size in range(2, count + 1)}

    for size, group in groups.items():
        if rank >= size:
            continue
        for case in (case for case in CASES if size in SIZES[case]):
            with messages() as sizes:
                trainer = trainer_for(case, Ranks(group))
                trainer.fit(stream(CASES[case][3])[0], steps=STEPS, batch_size=CASES[case][2])
                sizes.append("evaluate")
                trainer.evaluate(stream(CASES[case][3])[:1])
                sizes.append("go on")
                train(case, trainer)
            report[f"{case} {size}"] = {**found(trainer), "messages": sizes}
        report[f"spoiled {size}"] = spoiled(Ranks(group))
    dist.barrier()
    elastic(rank, groups, directory, report)
    dist.barrier()
    if rank < 2:
        report["lost"] = lost(rank, groups[2], directory, report)
    (directory / f"{rank}.json").write_text(json.dumps(report))


ON_GPUS = "plain", "aligned, heads", "plastic", "sampled", "batch norm"


def work_on_gpus(rank, count, directory, backend="nccl"):
    """``ON_GPUS``, each rank on its own GPU or, as a host of its own, on the only one: NCCL then takes sockets."""
    os.environ |= {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    device = torch.device("cuda", rank % torch.cuda.device_count()) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=count)
    ranks = Ranks(dist.group.WORLD, device)
    report = {case: found(train(case, trainer_for(case, ranks, device=device))) for case in ON_GPUS}
    (Path(directory) / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def spoiled(ranks):
    """An infinite example, which one rank has: all must stop, at the same step, as they were before it."""
    trainer = trainer_for("batch norm", ranks)
    tasks = stream((1, 4, 4), spoiled=(1, 7))
    trainer.fit(tasks[0], steps=STEPS, batch_size=10)
    before, step = {}, trainer._step

    def noted(*args):
        before.update({name: tensor.clone() for name, tensor in trainer.hnet.state_dict().items()})
        return step(*args)

    trainer._step = noted
    try:
        trainer.fit(tasks[1], steps=STEPS, batch_size=10)
    except fh.NonFiniteLossError as error:
        same = all(torch.equal(tensor, before[name]) for name, tensor in trainer.hnet.state_dict().items())
        return {"error": str(error), "same": same, "digest": digest(trainer)}


def elastic(rank, groups, directory, report):
    """Two ranks, the second interrupted in task 2; then one, interrupted in task 3; then all. The first has the file."""
    ranks = Ranks(groups[2]) if rank < 2 else None
    out = directory / ("run" if rank == 0 else f"none-{rank}")
    if ranks is not None:
        trainer = trainer_for("plastic", ranks, out=out)
        try:
            train("plastic", trainer, stop=(2, 1) if rank == 1 else None)
        except KeyboardInterrupt:
            report["interrupted"] = [trainer.current_step, digest(trainer)]
    dist.barrier()
    if rank == 0:
        trainer = fh.Trainer.load(out, out=out, progress=False)
        try:
            train("plastic", trainer, stop=(3, 0))
        except KeyboardInterrupt:
            report["interrupted alone"] = trainer.current_step
    dist.barrier()
    trainer = fh.Trainer.load(out, out=out, progress=False, ranks=Ranks(groups[len(groups) + 1]))
    report["elastic"] = found(train("plastic", trainer))
    report["wrote"] = out.exists()


def lost(rank, group, directory, report):
    """Of two ranks the second ends in a step of task 1, between the gradient of the loss and the drift."""
    trainer = trainer_for("batch norm", Ranks(group), out=directory / "lost")
    trainer.fit(stream((1, 4, 4))[0], steps=STEPS, batch_size=10)
    drift = trainer._drift

    def end(*args):
        if trainer.current_step == 2:
            if rank == 1:
                (directory / f"{rank}.json").write_text(json.dumps(report))
                os._exit(0)
        else:
            trainer.before = digest(trainer)
        return drift(*args)

    trainer._drift = end
    try:
        trainer.fit(stream((1, 4, 4))[1], steps=STEPS, batch_size=10)
    except fh.FasthyperError as error:
        return {"error": f"{type(error).__name__}: {error}", "step": trainer.current_step, "digest": digest(trainer)}


if __name__ == "__main__":
    from fasthyper.cli import main

    def note(trainer, now, *args, original=fh.Trainer._note):
        original(trainer, now, *args)
        if os.environ.get("RANK") == "1" and (now.record.index, now.record.steps) == (1, 5):
            os.kill(os.getpid(), signal.SIGKILL)

    fh.Trainer._note = note
    sys.exit(main(sys.argv[1:]))
