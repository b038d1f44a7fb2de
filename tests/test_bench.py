"""``fasthyper bench`` and ``fasthyper compare``, and the counts behind them."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_cli import cli

import fasthyper as fh
from fasthyper import ops, reference
from fasthyper.bench import machine, measure, peers, predict
from fasthyper.bench.costs import FLOAT, Shapes, drift_work, messages, step_work, target_macs
from fasthyper.bench.machine import Link, Machine
from fasthyper.bench.memory import STATUS, peak_memory
from fasthyper.bench.predict import seconds_on_ranks
from fasthyper.bench.workloads import CASES, WORKLOADS, Workload, mlp
from fasthyper.planner import default_budget

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own

TINY = Workload(
    "tiny",
    mlp(6, (7,), 4),
    {"chunk_size": 20, "hidden": (6, 5), "task_dim": 4, "chunk_dim": 3, "activation": "elu"},
    tasks=(2, 3),
    batch_size=8,
)
FULL = replace(TINY, name="full", hnet={**TINY.hnet, "chunk_size": None})
LINEAR = replace(
    TINY, name="linear", hnet={"chunk_size": 20, "hidden": (), "task_dim": 4, "chunk_dim": 3, "activation": "relu"}
)
AFFINE = replace(LINEAR, name="affine", hnet={**LINEAR.hnet, "chunk_size": None})
RATES = Machine(gemm=1e11, copy=1e10)
HAVE = [name for name in ("hypnettorch", "eager") if peers.missing(name) is None]


def test_a_ring_passes_on_a_message_twice():
    """Latency and rate of two ranks give their own times back; of many, two rounds of all but one part."""
    link = Link.of_two({8: 2e-4, 8_000_008: 2e-4 + 8e-3})
    assert link.latency == pytest.approx(1e-4) and link.rate == pytest.approx(1.000001e9)
    assert link.seconds(8_000_008, 2) == pytest.approx(2e-4 + 8e-3)
    assert link.seconds(8_000_008, 5) == pytest.approx(2 * 4 * (1e-4 + 1.6e-3))
    assert link.seconds(8_000_008, 1) == 0


def test_ranks_share_what_grows_with_tasks_and_examples():
    shapes, alone, drift = Shapes.of(TINY), 1.0, {2: 0.2, 10: 0.36, 100: 0.9}
    free = Link(0.0, math.inf)

    def seconds(ranks, past=100, link=free):
        return seconds_on_ranks(shapes, past, ranks, alone, drift, RATES, link)

    assert seconds(1) == alone
    work = {past: drift_work(shapes, past).macs for past in (10, 50, 100)}
    part = (work[50] - work[10]) / (work[100] - work[10])
    moved = 6 * FLOAT * sum(messages(shapes)) / RATES.copy
    target = shapes.target_macs / RATES.gemm  # half of two flops each
    assert seconds(2) == pytest.approx(alone - 0.9 + 0.36 + part * (0.9 - 0.36) - target + moved)
    assert seconds(10) == pytest.approx(alone - 0.9 + 0.36 - 2 * target * 0.9 + moved)
    assert seconds(64) == pytest.approx(alone - 0.9 + 0.2 - 2 * target * 63 / 64 + moved)  # two past tasks
    assert seconds(8, past=2) == pytest.approx(alone - 2 * target * 7 / 8 + moved)  # no less than the fewest measured
    assert seconds(4, link=Link(0.1, math.inf)) == pytest.approx(seconds(4) + 2 * 2 * 3 * 0.1)  # two messages


@pytest.fixture
def quick(monkeypatch):
    """The tiny workload by name, and rates that need no measuring."""
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    monkeypatch.setattr(Machine, "measure", staticmethod(lambda: RATES))
    for module in (machine, predict):
        monkeypatch.setattr(module, "timed", lambda function, pick=min, seconds=0: 1e-4)
    monkeypatch.setattr(predict, "peak_memory", lambda *_: {"kept": 1_000_000, "step": 2_000_000})


def test_bench_prints_a_table_and_keeps_figure_and_json(quick, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measure, "peak_memory", lambda *_: {"kept": 1_000_000, "step": 2_000_000})
    args = ["--workload", "tiny", "--against", "eager", "--seconds", "0.01", "--threads", "1", "--out", tmp_path]
    before = torch.get_num_threads()
    assert cli("bench", *args) == 0 and torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert "tiny step, 3 past tasks" in out and "eager: " in out and "1.0 MB kept, 2.0 MB a call" in out
    assert all((tmp_path / f"bench.{kind}").stat().st_size > 100 for kind in ("json", "png", "svg"))


def test_bench_json_has_the_promised_fields(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "peak_memory", lambda *_: {"kept": 1_000_000, "step": 2_000_000})
    args = ["--tasks", "2", "--what", "regularizer", "--seconds", "0.01", "--threads", "1", "--out", tmp_path]
    assert cli("bench", "--workload", "tiny", "--against", ",".join(HAVE), "--json", *args) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["machine"]["gemm"] == 1e11 and "larger of" in record["machine"]["ceiling"]
    assert record["environment"]["threads"] == "1"
    (row,) = record["rows"]
    assert (row["what"], row["workload"], row["past"]) == ("regularizer", "tiny", 2)
    assert row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"]
    assert row["macs"] == drift_work(Shapes.of(TINY), 2).macs and row["gflops"] > 0
    assert 0 < row["ceiling_share"] == pytest.approx(row["ceiling_seconds"] / row["ours"]["median"])
    for entry in (row, *row["peers"].values()):
        assert entry["memory"] == {"kept": 1_000_000, "step": 2_000_000}
    for name in HAVE:
        assert row["peers"][name]["ratio"] == pytest.approx(row["peers"][name]["median"] / row["ours"]["median"])
        assert len(row["peers"][name]["ratio_quartiles"]) == 2


def test_a_peer_that_computes_something_else_is_not_timed(quick, tmp_path, capsys, monkeypatch):
    right = peers.Eager._penalty
    monkeypatch.setattr(peers.Eager, "_penalty", lambda self, theta: 1.001 * right(self, theta))
    args = ["--workload", "tiny", "--tasks", "2", "--against", "eager", "--seconds", "0.01", "--out", tmp_path, "--json"]
    assert cli("bench", *args) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 2, captured.err
    assert "eager disagrees on tiny, 2 past tasks, regularizer: the value in float64 differs by 1.0e-03" in captured.err
    assert "step: the drift" in captured.err
    assert all("ours" not in row and "error" in row for row in json.loads(captured.out)["rows"])


@pytest.mark.parametrize(
    "args, words",
    [
        (["bench", "--workload", "p1O"], ["unknown workload 'p1O'; did you mean p10"]),
        (["bench", "--workload", "p10,xyz"], ["unknown workload 'xyz'; choose from split, small"]),
        (["bench", "--against", "hypernettorch"], ["unknown peer 'hypernettorch'; did you mean hypnettorch"]),
        (["bench", "--what", "steps"], ["unknown what 'steps'; did you mean step"]),
        (["bench", "--tasks", "0"], ["'0' is not int,int,... from 1"]),
        (["compare", "--workload", "smal"], ["unknown workload 'smal'; did you mean small"]),
        (["compare", "--target-layers", "10;2"], ["'10;2' is not int,int,..."]),
    ],
    ids=str,
)
def test_bad_usage_is_one_line_and_status_2(args, words, capsys):
    assert cli(*args) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and all(word in captured.err for word in words), captured.err


def test_failures_are_one_line_and_status_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    for args, words in (
        (["bench", "--against", "hypnettorch"], "hypnettorch is not installed: pip install 'fasthyper[bench]'"),
        (["bench", "--threads", "0"], "--threads must be at least 1"),
        (["compare"], "compare needs --workload NAME, or --target-layers"),
        (["compare", "--target-layers", "6,4", "--chunk-size", "0"], "chunk_size"),
    ):
        assert cli(*args, "--out", tmp_path) == 1
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and words in captured.err, captured.err


def test_a_peer_that_cannot_run_is_named_with_the_reason(monkeypatch):
    predictor = predict.Predictor(TINY)
    monkeypatch.setattr(predict.Predictor, "seconds", lambda *_: 100.0)
    assert "a call would take about" in measure.reason_not_to(predictor, 100, "step", "hypnettorch")
    monkeypatch.setattr(machine, "available_memory", lambda: 10_000)
    assert "GB are free" in measure.reason_not_to(predictor, 100, "step", "eager")
    assert measure.reason_not_to(predictor, 100, "step", "fasthyper") is None
    monkeypatch.setattr(measure, "missing", lambda name: "it is not installed")
    row = measure.measure(TINY, 2, "step", against=["eager"], seconds=0.01, machine=RATES, memory=False)
    assert row["peers"] == {"eager": {"skipped": "it is not installed"}} and row["ours"]["median"] > 0


def test_our_weights_may_be_timed_laid_aligned(monkeypatch):
    built = []
    monkeypatch.setattr(Workload, "build", lambda self, past, build=Workload.build: built.append(self) or build(self, past))
    row = measure.measure(TINY, 2, "step", against=["eager"], seconds=0.01, machine=RATES, layout="aligned", memory=False)
    assert row["workload"] == "tiny-aligned" and row["peers"]["eager"]["median"] > 0
    assert {workload.hnet.get("layout", "flat") for workload in built} == {"flat", "aligned"}
    assert TINY.with_layout("flat") is TINY and TINY.with_layout("aligned").with_layout("aligned").name == "tiny-aligned"


@pytest.mark.parametrize("workload", [TINY, FULL, LINEAR], ids=lambda w: w.name)
@pytest.mark.parametrize("what", ["regularizer", "step"])
@pytest.mark.parametrize("name", HAVE)
def test_every_side_computes_the_same(workload, what, name):
    measure.check_parity(workload, 3, what, name)


def test_compare_predicts_and_measures(quick, tmp_path, capsys):
    args = ["--tasks", "3,2", "--seconds", "0.01", "--threads", "1", "--out", tmp_path]
    assert cli("compare", "--workload", "tiny", "--no-measure", *args) == 0
    assert "2 past tasks" in (out := capsys.readouterr().out) and "measured" not in out
    assert cli("compare", "--target-layers", "6,7,4", "--chunk-size", "20", "--hidden", "6,5", "--json", *args) == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert (first["past"], second["past"]) == (2, 3)
    for side in ("fasthyper", "hypnettorch"):
        assert first[side]["predicted"]["seconds"] > 0 and ("measured" in first[side] or "skipped" in first[side])


def test_compare_shows_the_error_of_a_prediction(quick, monkeypatch):
    from fasthyper.bench import compare

    monkeypatch.setattr(compare, "peak_memory", lambda *_: {"kept": 1_000_000, "step": 0})
    monkeypatch.setattr(predict.Predictor, "seconds", lambda *_: 1e-3)
    row = compare.compare(TINY, 2, predict.Predictor(TINY), seconds=0.02, say=lambda text: None)
    measured = row["fasthyper"]["measured"]
    assert measured["error"] == pytest.approx(1e-3 / measured["seconds"] - 1) and measured["memory"] == 1_000_000
    assert f"{100 * measured['error']:+.0f} % off" in compare.cells(row)[1]


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda w: w.name)
def test_predictions_continue_what_was_measured(quick, monkeypatch, workload):
    def law(self, side, past, what):
        return 1e-3 + (1e-12 * drift_work(self.shapes, past).macs if side == "fasthyper" else 2e-3 * past)

    monkeypatch.setattr(predict.Predictor, "_time", law)
    predictor = predict.Predictor(workload)
    for side in ("fasthyper", "hypnettorch"):
        for past in (1, 2, 10, 100, 1000):
            assert predictor.seconds(side, past, "step") == pytest.approx(law(predictor, side, past, "step"))
        sizes = [predictor.memory(side, past) for past in (2, 10, 100, 1000)]
        assert sizes[0] == 3_000_000
        if side == "hypnettorch":
            assert all(before < after for before, after in pairwise(sizes))
        else:  # what is stored fits a budget, or is not
            assert all(size - sizes[0] <= default_budget(torch.device("cpu")) for size in sizes)


def test_nothing_is_predicted_for_a_peer_that_is_missing(quick, monkeypatch):
    from fasthyper.bench import compare, figure

    monkeypatch.setattr(compare, "missing", lambda side: "it is not installed" if side == "hypnettorch" else None)
    row = compare.compare(TINY, 2, predict.Predictor(TINY), seconds=None, say=lambda text: None)
    assert row["hypnettorch"] == {"skipped": "it is not installed"} and "ratio" not in row
    assert compare.cells(row)[3:] == ["it is not installed", "", ""]
    if pytest.importorskip("matplotlib"):
        figure.costs_figure([row], "tiny", "a machine")


@pytest.mark.parametrize("workload", [TINY, FULL, LINEAR], ids=lambda w: w.name)
@pytest.mark.parametrize("past", [1, 4])
@pytest.mark.parametrize("form", ["gram", "direct"])
def test_drift_work_counts_every_multiply_add(workload, past, form, monkeypatch):
    from fasthyper.bench import costs
    from fasthyper.planner import drift_plan

    monkeypatch.setattr(costs, "drift_plan", lambda *a, trunk: drift_plan(*a, form, trunk=trunk))
    shapes = Shapes.of(workload)
    assert drift_work(shapes, past).macs == sum(1 for _ in multiply_adds(shapes, past, form))


@pytest.mark.parametrize("past", [1, 2, 3, 30])
def test_drift_work_of_one_affine_map_is_that_of_its_products(past, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(ops, "_affine_drift_fwd", reference.affine_drift_fwd)  # whose products can be counted
    hnet = AFFINE.build(past)
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(past)
    with FlopCounterMode(display=False) as counter:
        regularizer.value_and_grad()
    assert drift_work(Shapes.of(AFFINE), past).macs == counter.get_total_flops() // 2


def multiply_adds(shapes, past, form):
    """One item for each product that is added to something."""
    num_chunks, width = shapes.num_chunks, shapes.width
    full = 2 * width + 1  # [dH | H* | 1], [V_H | dV]
    for layer, (inputs, outputs) in enumerate(pairwise((shapes.task_dim + shapes.chunk_dim, *shapes.hidden))):
        if layer == 0:
            for num_rows, size in ((past, shapes.task_dim), (num_chunks, shapes.chunk_dim)):
                for _ in range(num_rows * outputs * size):
                    yield from ("W dx", "dW x0", "gradient of W", "gradient of x")
            continue
        for _ in range(past * num_chunks * outputs):
            yield "db"
            for _ in range(inputs):
                yield from ("W dx", "dW x0", "gradient of W", "gradient of x")
    if form == "direct":
        for _ in range(past):
            for _ in range(shapes.num_weights):
                yield from range(full)  # D
                yield from range(width)  # d/dH
                yield from range(width + 1)  # d/dV
        return
    for count, size in ((past, shapes.task_dim), (num_chunks, shapes.chunk_dim)) if not shapes.hidden else ():
        for _ in range(count * (2 * size + 1)):
            yield from range(2 * size + 1)  # [x | 1]'[x | 1], x = [dx | x0]
            yield from range(size)  # the gradient
    for _ in range(past * num_chunks if shapes.hidden else 0):
        for i in range(width):
            yield from range(i, full)  # dH'W [dH | H* | 1], at and above the diagonal
        yield from range(full * width)  # WX (Y'V_H)
    for _ in range(shapes.chunk_size):
        for i in range(full):
            yield from range(max(i, width) if shapes.hidden else i, full)  # Y'Y, of it V'V is known where there is a trunk
        yield from range(full * (width + 1))  # Y (X'W [H | 1])


def test_work_of_a_step():
    shapes = Shapes.of(TINY)
    assert shapes.num_weights == sum(p.numel() for p in TINY.build_target().parameters())
    assert shapes.num_theta == sum(p.numel() for p in TINY.build(2).theta)
    assert shapes.target_macs == 8 * (2 * 6 * 7 + 3 * 7 * 4)  # the first layer passes no gradient on
    assert target_macs(WORKLOADS["resnet"].build_target(), (2, 3, 32, 32)) > 2 * 3 * 68e6
    assert step_work(shapes, 2).macs > drift_work(shapes, 2).macs + shapes.target_macs
    ceiling = RATES.ceiling_seconds(step_work(shapes, 2))
    assert ceiling == max(2 * step_work(shapes, 2).macs / 1e11, step_work(shapes, 2).num_bytes / 1e10)


def test_workloads_are_those_of_the_design():
    assert [(w.name, *w.tasks) for w in WORKLOADS.values()] == [
        ("split", 5),
        ("small", 10, 100, 1000),
        ("p10", 10, 100, 1000),
        ("p100", 2, 10, 50, 100),
        ("resnet", 6),
        ("full", 10, 100),
    ]
    assert [past for workload, past in CASES["regularizer"] if workload.name == "resnet"] == [6, 600, 6000]
    for workload in WORKLOADS.values():
        again = Workload.from_json(workload.to_json())
        assert again.to_json() == workload.to_json()
    assert Workload.from_json(TINY.to_json()).build(1).num_tasks == 2


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell")
def test_memory_is_that_of_what_is_stored_and_made():
    workload, past = WORKLOADS["small"], 50
    weights = 4 * past * Shapes.of(workload).num_weights
    memory = peak_memory(workload, past, "regularizer", "eager", 1)
    assert 0.9 * weights < memory["kept"] < 1.5 * weights and weights < memory["step"] < 5 * weights


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell")
def test_memory_that_fails_says_why():
    with pytest.raises(measure.FasthyperError, match="measuring the memory of eager on tiny failed: .*chunk_size"):
        peak_memory(replace(TINY, hnet={**TINY.hnet, "chunk_size": 0}), 2, "step", "eager", 1)
