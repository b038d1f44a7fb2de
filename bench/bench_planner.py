"""The drift in either form, over workloads and random shapes, and what the planner's pick costs: a table, no verdict."""

import random
import statistics

import oracle
import pytest
import torch

import fasthyper as fh
from fasthyper import ops
from fasthyper.bench.measure import turn
from fasthyper.bench.workloads import CASES
from fasthyper.layout import Layout
from fasthyper.planner import direct_cost, drift_plan, gram_cost

FORMS, ROUNDS = ("gram", "direct"), 9
DEAREST, RANDOM_SHAPES = 4e9, 20  # multiply-adds of a form that is still timed


def costs(layout, tasks, width):
    """Counted cost of each form over the whole grid, in multiply-adds."""
    rows, cols = tasks * layout.num_chunks, layout.chunk_size
    return {"gram": gram_cost(rows, cols, width), "direct": direct_cost(rows * cols, rows, cols, width)}


def random_shapes():
    """(layout, past tasks, width), from a head's few rows to the wide trunks of many tasks."""
    draw, shapes = random.Random(0), []
    while len(shapes) < RANDOM_SHAPES:
        width, chunk, chunks, tasks = (round(2 ** draw.uniform(*bits)) for bits in ((3, 8.5), (7, 14), (0, 6), (0, 6)))
        layout = Layout(chunk * chunks - chunk // 3, chunk)
        if max(costs(layout, tasks, width).values()) < DEAREST:
            shapes.append((layout, tasks, width))
    return shapes


def row(layout, tasks, width, calls, *, trunk=True):
    """Checks that the forms agree, times them in turn, and says how far the planner's pick is from the faster one."""
    plans = {form: drift_plan(layout, range(tasks), width, form, trunk=trunk) for form in (*FORMS, "auto")}
    (pick,) = (form for form in FORMS if torch.equal(plans[form], plans["auto"]))
    assert oracle.relative_error(calls["gram"](), calls["direct"]()) < 1e-3
    seconds = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form in FORMS:
            seconds[form].append(turn(calls[form]))
    medians = {form: statistics.median(times) for form, times in seconds.items()}
    shape = {"tasks": tasks, "chunks": layout.num_chunks, "chunk_size": layout.chunk_size, "width": width}
    over_best = medians[pick] / min(medians.values())
    return {**shape, "counted": costs(layout, tasks, width), "seconds": medians, "pick": pick, "pick_over_best": over_best}


def on_shape(layout, tasks, width):
    generator = torch.Generator().manual_seed(0)
    h0 = torch.randn(tasks, layout.num_chunks, width, generator=generator)
    basis0 = torch.randn(layout.chunk_size, width + 1, generator=generator)
    dh, basis = 0.1 * torch.randn(h0.shape, generator=generator), basis0 + 0.1

    def call(form):
        plan = drift_plan(layout, range(tasks), width, form)
        return lambda: ops.output_drift(dh, basis, h0, basis0, plan)

    return row(layout, tasks, width, {form: call(form) for form in FORMS})


def on_workload(workload, past):
    hnet = workload.build(past)
    generator = torch.Generator().manual_seed(1)
    ahead = [p.detach() + 1e-3 * torch.randn(p.shape, generator=generator) for p in hnet.theta]

    def call(form):
        held = fh.OutputRegularizer(hnet, form)
        held.snapshot(past)
        return lambda: held.value_and_grad(ahead)[0]

    calls = {form: call(form) for form in FORMS}
    return {"workload": workload.name, **row(hnet.layout, past, hnet.width, calls, trunk=bool(hnet.trunk_weights))}


def is_timed(workload, past):
    hnet = workload.build(past)
    return max(costs(hnet.layout, past, hnet.width).values()) < DEAREST


@pytest.mark.parametrize("over", ["workloads", "random"])
def bench_planner(benchmark, over):
    def table():
        if over == "random":
            return [on_shape(*shape) for shape in random_shapes()]
        return [on_workload(*case) for case in CASES["regularizer"] if is_timed(*case)]

    benchmark.extra_info.update(what="planner", over=over, table=benchmark.pedantic(table, rounds=1))
