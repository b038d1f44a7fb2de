"""Everything that is measured on a GPU, in one JSON: the workloads beside the peers, ``hyper_linear`` beside a weight that
is made and used, which implementation of an op is the fastest, and which kernels or gaps hold the time of a step.

python bench/gpu.py OUT.json [--device cuda] [--seconds S] [--quick] [--commit NAME]

``--device cpu --quick`` runs all of it on tiny shapes. OUT.json is written again after every row; where it is there already,
of the same GPU, what it holds is kept and the rest is measured. What cannot run says why; what no time was left for is named
under ``left_out``. The exit status is 1 where a peer computes something else than ours,
or ours fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from device import TOP_KERNELS, Call, Device, ceiling_seconds, matmul_precision, relative_error
from report_gpu import PARTS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasthyper import backends, ops, reference
from fasthyper.bench.costs import Shapes
from fasthyper.bench.measure import ParityError, check_parity, work_of
from fasthyper.bench.peers import LR, PEERS, SIDES, Ours, missing
from fasthyper.bench.workloads import WORKLOADS, Workload, mlp
from fasthyper.environment import environment
from fasthyper.metrics import TaskRecord
from fasthyper.planner import factorises
from fasthyper.streams import TaskData
from fasthyper.streams.batches import Batches
from fasthyper.trainer import Trainer

MOST_LOOPED = 100  # past tasks; a loop over more takes seconds a call
ROUNDS = (21, 50)  # of ours, fewest and most
STEPS_WARM = 8  # before a step is timed: those that a graph is captured after, and some of it
STEPS_COMPARED, GRAPH_BOUND = 8, 1e-3  # losses and drifts of the captured and of the plain path, relative
PROFILED_STEPS = 20
BATCHES = 100  # of data
HAS_GRAPH = "graph" in inspect.signature(Trainer).parameters


ALIGNED = WORKLOADS["p100"].with_layout("aligned")
TINY = Workload(
    "tiny",
    mlp(12, (8,), 4),
    {"chunk_size": 24, "hidden": (6, 5), "task_dim": 4, "chunk_dim": 3, "activation": "relu"},
    tasks=(2,),
    batch_size=8,
)


@dataclasses.dataclass(frozen=True)
class Cases:
    """What is measured: workloads at numbers of past tasks, the first ones first where time is short."""

    rows: Sequence[tuple[Workload, int]]
    profiled: Sequence[tuple[Workload, int]]
    compiled: tuple[str, int]  # where torch.compile is timed too: compiling takes a minute
    linear: Sequence[tuple[int, int, int, int]]  # outputs, inputs, H, batch
    rows_per_chunk: int
    precisions: Sequence[str]


def full_cases() -> Cases:
    named = {name: WORKLOADS[name] for name in ("p100", "p10", "small", "full", "resnet")} | {"aligned": ALIGNED}
    order = [("p100", 100), ("p100", 2), ("p100", 10), ("p100", 50), ("p10", 100), ("p10", 1000), ("small", 10), ("p10", 10)]
    order += [("small", 100), ("aligned", 100), ("aligned", 2), ("aligned", 10), ("aligned", 50), ("resnet", 6)]
    order += [("full", 10), ("full", 100), ("small", 1000)]
    sides = [(1024, 1024), (4096, 4096), (8192, 8192)]
    return Cases(
        rows=[(named[name], past) for name, past in order],
        profiled=[(named[name], past) for name, past in (("p100", 100), ("p10", 10), ("aligned", 100))],
        compiled=("p10", 10),
        linear=[(*side, width, batch) for side in sides for width in (32, 100, 350) for batch in (32, 128)],
        rows_per_chunk=8,
        precisions=("fp32", "tf32"),
    )


def quick_cases() -> Cases:
    rows = [(TINY, 2), (TINY.with_layout("aligned"), 2)]
    return Cases(rows, rows[:1], ("none", 0), [(16, 8, 5, 4)], 2, ("fp32",))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no row is begun")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--commit", help="what was measured, where the checkout has no .git")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    run = Run(Device(args.device, args.quick), args.out, args.seconds, args.commit)
    cases = quick_cases() if args.quick else full_cases()
    run.measure(cases)
    failures, left_out = run.record["failures"], run.record["left_out"]
    for line in (*(f"failed: {failure}" for failure in failures), *(f"no time left for {name}" for name in left_out)):
        print(line)
    print(f"{len(run.record['rows'])} rows, {len(failures)} failures, {len(left_out)} left out for lack of time")
    return 1 if failures else 0


class Run:
    """One run: its record, written as it grows, and its deadline."""

    def __init__(self, device: Device, out: Path, seconds: float, commit: str | None):
        self.device, self.out, self.deadline = device, out, time.monotonic() + seconds
        here = surroundings(device) | ({"commit": commit} if commit else {})
        self.record: dict[str, Any] = {"format": "fasthyper-gpu-2", "environment": here, "left_out": [], "failures": []}
        earlier = json.loads(out.read_text()) if out.exists() else {"environment": here}
        if earlier["environment"]["gpu"] != here["gpu"]:
            raise SystemExit(f"{out} was measured on {earlier['environment']['gpu']}, not {here['gpu']}; name another file")
        self.record |= {part: earlier.get(part, []) for part in PARTS}

    def measure(self, cases: Cases) -> None:
        self.record["rates"] = self.device.rates()
        print(f"{self.record['environment']['gpu']}: " + ", ".join(self._shown_rates()), flush=True)
        first, *others = cases.rows
        self._rows([first], cases)
        self._profiles(cases)
        self._rows(others[:3], cases)
        self._linear(cases)
        self._rows(others[3:], cases)
        self._alternatives(cases)
        self.write()

    def write(self) -> None:
        self.out.write_text(json.dumps(self.record, indent=1) + "\n")

    def _shown_rates(self) -> Iterator[str]:
        rates = self.record["rates"]
        for name in ("fp32", "tf32", "bf16"):
            yield f"{name} {1e-12 * rates[name]:.3g} TFLOP/s"
        yield f"copy {1e-9 * rates['copy']:.3g} GB/s"

    def _each(self, kind: str, name: str, measure: Callable[[], Any]) -> None:
        """Adds what ``measure`` finds to a part of the record, if it is not there; a failure ends neither run nor record."""
        if any(entry["name"] == name for entry in self.record[kind]):
            return
        if time.monotonic() > self.deadline:
            self.record["left_out"].append(name)
            return
        try:
            found = measure()
            known = {"name": name, "commit": self.record["environment"]["commit"]}
            self.record[kind] += [known | entry for entry in (found if isinstance(found, list) else [found])]
        except Exception as error:  # a failing kernel, a difference: the other results must not go with it
            self.record["failures"].append(f"{name}: {one_line(error)}")
            print(f"{name}: FAILED: {one_line(error)}", flush=True)
        self.write()

    def _rows(self, rows: Sequence[tuple[Workload, int]], cases: Cases) -> None:
        for workload, past in rows:
            for what in ("step", "regularizer"):
                name = f"{workload.name} at {past}, {what}"
                self._each("rows", name, lambda w=workload, p=past, what=what: self._row(w, p, what, cases))

    def _row(self, workload: Workload, past: int, what: str, cases: Cases) -> list[dict[str, Any]]:
        """The same case in each precision; parity with the peers first."""
        device = self.device.device
        skipped = {name: self._reason_not_to(workload, past, what, name, cases) for name in PEERS}
        for name in [name for name, reason in skipped.items() if reason is None]:
            try:
                with matmul_precision("fp32"):
                    check_parity(workload, past, what, name, device)
            except RuntimeError as error:  # out of memory, or no compiler
                skipped[name] = f"fails here: {one_line(error)}"
        work, rows = work_of(Shapes.of(workload), past, what), []
        for precision in cases.precisions:
            with matmul_precision(precision):
                row: dict[str, Any] = {"what": what, "workload": workload.name, "past": past, "precision": precision}
                row["ours"] = self._ours(workload, past, what)
                timed = [way for way in row["ours"].values() if "median" in way]
                if not timed:
                    raise RuntimeError(next(iter(row["ours"].values()))["skipped"])
                best = min(timed, key=lambda way: way["median"])
                floor = ceiling_seconds(work, self.record["rates"], precision)
                row |= {"macs": work.macs, "bytes": work.num_bytes, "ceiling_seconds": floor}
                row["ceiling_share"] = floor / best["median"]
                row["peers"] = {name: self._peer(workload, past, what, name, skipped[name], best) for name in PEERS}
                skipped = {name: reason or "timed in the first precision" for name, reason in skipped.items()}
                if what == "regularizer":
                    row["errors"] = self._errors(workload, past)
                elif len(self._step_ways) > 1:
                    row["graph_difference"] = self._graph_difference(workload, past)
            rows.append(row)
            print(shown(row), flush=True)
        return rows

    def _reason_not_to(self, workload: Workload, past: int, what: str, name: str, cases: Cases) -> str | None:
        if workload.hnet.get("layout", "flat") != "flat":
            return "it has no such layout; see the flat one"
        if name == "hypnettorch" and past > MOST_LOOPED:
            return f"a call loops over {past} tasks"
        if name == "compile" and (workload.name, past, what) != (*cases.compiled, "regularizer"):
            return f"compiling takes a minute: done for the regularizer of {cases.compiled[0]} at {cases.compiled[1]}"
        return missing(name)

    @property
    def _step_ways(self) -> tuple[str, ...]:
        return ("graph", "plain") if HAS_GRAPH and self.device.is_cuda else ("plain",)

    def _ours(self, workload: Workload, past: int, what: str) -> dict[str, Any]:
        ways = self._step_ways if what == "step" else ("graph", "plain")
        return {way: self._our_way(workload, past, what, way) for way in ways}

    def _our_way(self, workload: Workload, past: int, what: str, way: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        try:
            with self.device.peak_memory(found):
                if what == "step":
                    call: Call = Training(workload, past, way, self.device).warm()
                else:
                    call = Ours(workload, past, device=self.device.device).prepare(what)
                    call = self.device.captured(call) if way == "graph" else call
                found |= self.device.times(call, ROUNDS, 0.5)
                del call
        except RuntimeError as error:
            return {"skipped": one_line(error)}
        return found

    def _graph_difference(self, workload: Workload, past: int) -> float:
        """Of losses and drifts of the first steps, captured and plain; relative."""
        ways = [Training(workload, past, way, self.device).numbers(STEPS_COMPARED) for way in self._step_ways]
        difference = max(relative_error(found, ways[-1]) for found in ways)
        if not difference < GRAPH_BOUND:
            raise ParityError(f"captured steps have other losses or drifts than plain ones, by {difference:.1e}")
        return difference

    def _peer(
        self, workload: Workload, past: int, what: str, name: str, reason: str | None, ours: dict[str, Any]
    ) -> dict[str, Any]:
        if reason is not None:
            return {"skipped": reason}
        found: dict[str, Any] = {}
        try:
            with self.device.peak_memory(found):
                call = SIDES[name](workload, past, device=self.device.device).prepare(what)
                found |= self.device.times(call, (3, 21), 1.0)
                del call
        except RuntimeError as error:
            return {"skipped": f"fails here: {one_line(error)}"}
        found["ratio"] = found["median"] / ours["median"]
        found["ratio_range"] = [found["low"] / ours["high"], found["high"] / ours["low"]]
        return found

    def _errors(self, workload: Workload, past: int) -> dict[str, float]:
        """Of our value and gradient in this precision, against ours in float64."""
        sides = [Ours(workload, past, dtype, device=self.device.device) for dtype in (torch.float32, torch.float64)]
        (value, grads), (want_value, want_grads) = (side.prepare("regularizer")() for side in sides)
        gradient = relative_error(sides[0].comparable(grads), sides[1].comparable(want_grads))
        return {"value": relative_error(value, want_value), "gradient": gradient}

    def _linear(self, cases: Cases) -> None:
        for num_outputs, num_inputs, width, batch in cases.linear:
            for precision in cases.precisions:
                shape = (num_outputs, num_inputs, width, batch)
                name = f"hyper_linear {num_outputs}x{num_inputs}, H {width}, B {batch}, {precision}"
                self._each("hyper_linear", name, lambda s=shape, p=precision: self._linear_row(s, cases.rows_per_chunk, p))

    def _linear_row(self, shape: tuple[int, int, int, int], rows: int, precision: str) -> dict[str, Any]:
        """Forward and backward pass, all three gradients, each way in a graph of its own."""
        num_outputs, num_inputs, width, batch = shape
        generator = torch.Generator().manual_seed(0)
        sizes = [(batch, num_inputs), (num_outputs // rows, width), (rows * num_inputs, width + 1)]
        x, h, basis = (torch.randn(size, generator=generator).to(self.device.device).requires_grad_() for size in sizes)
        upstream = torch.randn(batch, num_outputs, generator=generator).to(self.device.device)

        def made_and_used() -> list[Tensor]:
            weight = torch.addmm(basis[:, -1], h, basis[:, :-1].T).view(num_outputs, num_inputs)
            return with_gradients(F.linear(x, weight))

        def ours(factorised: bool) -> list[Tensor]:
            return with_gradients(ops.hyper_linear(x, h, basis, rows=rows, num_outputs=num_outputs, factorised=factorised))

        def with_gradients(y: Tensor) -> list[Tensor]:
            return [y.detach(), *torch.autograd.grad(y, [x, h, basis], upstream)]

        picked = factorises(batch, num_inputs, rows, num_outputs // rows, width, True, True)
        ways: dict[str, Call] = {
            "generate then F.linear": made_and_used,
            "made tile by tile": lambda: ours(False),
            "factorised": lambda: ours(True),
        }
        with matmul_precision("fp32"):
            wanted = made_and_used()
        row: dict[str, Any] = {"outputs": num_outputs, "inputs": num_inputs, "width": width, "batch": batch, "rows": rows}
        row |= {"weights": num_outputs * num_inputs, "precision": precision, "ways": {}}
        row["pick"] = "factorised" if picked else "made tile by tile"
        with matmul_precision(precision):
            for name, call in ways.items():
                entry: dict[str, Any] = {}
                try:
                    found = call()
                    entry["error"] = max(relative_error(f, w) for f, w in zip(found, wanted, strict=True))
                    del found
                    with self.device.peak_memory(entry):
                        entry |= self.device.times(self.device.captured(call), ROUNDS, 0.2)
                except RuntimeError as error:
                    entry = {"skipped": one_line(error)}
                row["ways"][name] = entry
        base, ours_picked = row["ways"]["generate then F.linear"], row["ways"][row["pick"]]
        if "median" in base and "median" in ours_picked:
            row["ratio"] = base["median"] / ours_picked["median"]
        if not all(entry.get("error", 0) < 1e-2 for entry in row["ways"].values()):
            raise ParityError(f"the outputs or gradients differ: {row['ways']}")
        print(
            f"hyper_linear {1e-6 * row['weights']:.1f} M, H {width}, B {batch}, {precision}: "
            + ", ".join(f"{name} {micro(entry)}" for name, entry in row["ways"].items())
            + f"; the planner's pick {row.get('ratio', 0):.2f}x",
            flush=True,
        )
        return row

    def _alternatives(self, cases: Cases) -> None:
        for workload, past in cases.profiled:
            for precision in cases.precisions:
                name = f"alternatives, {workload.name} at {past}, {precision}"
                self._each("alternatives", name, lambda w=workload, t=past, p=precision: self._alternative_rows(w, t, p))

    def _alternative_rows(self, workload: Workload, past: int, precision: str) -> list[dict[str, Any]]:
        """Each op that a step calls, on its arguments there, by each implementation; each in a graph of its own."""
        rows = []
        with matmul_precision(precision):
            training = Training(workload, past, "plain", self.device)
            training()
            with OpCalls() as seen:
                training()
            for op, args in seen.calls:
                entry: dict[str, Any] = {"op": op, "workload": workload.name, "past": past, "precision": precision}
                entry |= {"shapes": [shapes_of(arg) for arg in args], "registered": registered(op), "seconds": {}}
                for name, implementation in implementations(op, self.device).items():
                    try:
                        call = self.device.captured(lambda run=implementation, args=args: run(*args))
                        entry["seconds"][name] = self.device.times(call, (9, 21), 0.1)
                    except Exception as error:  # whatever an implementation that does not serve here raises
                        entry["seconds"][name] = {"skipped": one_line(error)}
                rows.append(entry)
                timed = ", ".join(f"{name} {micro(found)}" for name, found in entry["seconds"].items())
                print(f"{op}, {workload.name} at {past}, {precision}: {timed}", flush=True)
        return rows

    def _profiles(self, cases: Cases) -> None:
        for workload, past in cases.profiled:
            for precision in cases.precisions:
                name = f"profile of {workload.name} at {past}, {precision}"
                self._each("profiles", name, lambda w=workload, t=past, p=precision: self._profile(w, t, p))

    def _profile(self, workload: Workload, past: int, precision: str) -> dict[str, Any]:
        """Kernels of a step in the middle of a run, and what of its time no kernel fills."""
        steps, way = 2 if self.device.quick else PROFILED_STEPS, self._step_ways[0]
        with matmul_precision(precision):
            step = Training(workload, past, way, self.device).warm()
            seconds = self.device.times(step, ROUNDS, 0.5)["median"]
            kernels = self.device.kernels(step, steps)
        busy = sum(kernel["seconds"] for kernel in kernels)
        row = {"workload": workload.name, "past": past, "precision": precision, "way": way, "seconds": seconds}
        row |= {"busy": busy, "launches": sum(k["launches"] for k in kernels), "kernels": kernels[:TOP_KERNELS]}
        row["gaps"] = max(0.0, seconds - busy)
        largest = max(
            [("gaps between kernels", row["gaps"]), *((k["name"], k["seconds"]) for k in kernels)], key=lambda p: p[1]
        )
        row["holds"] = (
            "not known, the profiler saw no kernel"
            if not kernels
            else f"{largest[0]}: {1e6 * largest[1]:.0f} of {1e6 * seconds:.0f} us"
        )
        print(f"profile, {workload.name} at {past}, {precision}, {way}: most of a step is {row['holds']}")
        for kernel in row["kernels"]:
            print(f"  {1e6 * kernel['seconds']:9.1f} us  {kernel['launches']:6.1f} x  {kernel['name']}", flush=True)
        return row


class Training:
    """Steps of ``Trainer.fit``, batches gathered, on the task after ``past`` others: as one launch each, or plain."""

    def __init__(self, workload: Workload, past: int, way: str, device: Device):
        options = {"graph": way == "graph"} if HAS_GRAPH else {}
        hnet, size = workload.build(past), BATCHES * workload.batch_size
        self.trainer = Trainer(hnet, lr=LR, beta=workload.beta, device=device.device, progress=False, **options)
        self.trainer.results.tasks = [TaskRecord(i, "") for i in range(past)]
        torch.manual_seed(0)
        x = torch.randint(256, (size, *workload.example_shape), dtype=torch.uint8, device=device.device)
        y = torch.randint(workload.target["config"]["num_outputs"], (size,), device=device.device)
        columns = torch.arange(x[0].numel()).flip(0) if x.dim() == 2 else None
        self.data = TaskData(x, y, None if columns is None else columns.to(device.device))
        self.batches = Batches(size, workload.batch_size, seed=0, task=past, device=device.device)
        self.step, self.graph = 0, way == "graph"
        self.trainer.begin_task(steps=BATCHES)
        self.current: Any = self.trainer._current

    def __call__(self) -> None:
        indices = self.batches.indices(self.step)
        if HAS_GRAPH:
            self.trainer._advance(self.current, self.data.batch, indices)
        else:
            self.trainer.step(*self.data.batch(indices))
        self.step += 1

    def warm(self) -> Training:
        """After its first steps.

        Raises:
            RuntimeError: they were to be captured, and were not.
        """
        for _ in range(STEPS_WARM):
            self()
        if self.graph and self.current.graph is None:
            raise RuntimeError("the steps were not captured, they ran as they are")
        return self

    def numbers(self, steps: int) -> Tensor:
        """Losses, then drifts, of the first steps."""
        for _ in range(steps):
            self()
        record = self.trainer.end_task()
        return torch.tensor([number for _, number in record.loss[:steps] + record.drift[:steps]])


class OpCalls(TorchDispatchMode):
    """Remembers the last step's calls of our ops, with copies of their arguments: one of each op and set of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[Any, tuple[str, list[Any]]] = {}

    @property
    def calls(self) -> list[tuple[str, list[Any]]]:
        return list(self._seen.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fasthyper":
            name = func._schema.name.partition("::_")[2]
            self._seen[name, repr([shapes_of(arg) for arg in args])] = name, [copied(arg) for arg in args]
        return func(*args, **(kwargs or {}))


def copied(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [copied(item) for item in arg]
    return arg.detach().clone() if isinstance(arg, Tensor) else arg


def shapes_of(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [shapes_of(item) for item in arg]
    return list(arg.shape) if isinstance(arg, Tensor) else arg


def implementations(op: str, device: Device) -> dict[str, Callable[..., Any]]:
    """What is bound, the reference, and Triton's where it is not what is bound."""
    found = {"bound": getattr(torch.ops.fasthyper, f"_{op}").default, "reference": getattr(reference, op)}
    if device.is_cuda and importlib.util.find_spec("triton") is not None:
        from fasthyper import kernels

        if op in kernels.IMPLEMENTATIONS:
            found["triton"] = kernels.IMPLEMENTATIONS[op]
    return {name: torch.no_grad()(run) for name, run in found.items()}


def registered(op: str) -> str:
    """Where what is bound for CUDA comes from: a C++ file, or ``/dev/null`` for Python."""
    lines = torch._C._dispatch_dump(f"fasthyper::_{op}").splitlines()
    found = next((line.strip() for line in lines if line.startswith("CUDA")), "CompositeExplicitAutograd: the reference")
    return found.replace(f"{Path(__file__).parents[1]}/", "")


def surroundings(device: Device) -> dict[str, str]:
    """What ``environment`` says, and of the device its name, driver and compilers."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    found = environment() | {name: installed(name) for name in ("triton", "hypnettorch", "numpy")}
    found |= {"gpu": "none", "cuda": str(torch.version.cuda), "backend": backends()[device.device.type]}
    if device.is_cuda:
        major, minor = torch.cuda.get_device_capability()
        found |= {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
        found["gpu_memory"] = f"{1e-9 * torch.cuda.get_device_properties(0).total_memory:.0f} GB"
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            found["driver"] = one_line(error)
    return found


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def micro(entry: dict[str, Any]) -> str:
    return f"{1e6 * entry['median']:.1f} us" if "median" in entry else f"({entry['skipped'][:80]})"


def shown(row: dict[str, Any]) -> str:
    ours = ", ".join(f"{way} {micro(found)}" for way, found in row["ours"].items())
    peers = [f"{name} {entry['ratio']:.1f}x" for name, entry in row["peers"].items() if "ratio" in entry]
    name = f"{row['workload']} at {row['past']}, {row['what']}, {row['precision']}"
    return f"{name}: {ours}; {100 * row['ceiling_share']:.0f} % of the ceiling; {', '.join(peers) or 'no peer'}"


if __name__ == "__main__":
    sys.exit(main())
