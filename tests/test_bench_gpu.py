"""The GPU benchmark, all of it on the CPU and on tiny shapes; long sequences in slices; the text made from its record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import report_gpu
import torch
from device import Device
from gpu import TINY, Training

from fasthyper.bench import peers

ROOT = Path(__file__).parent.parent
QUARTILES = ("low", "median", "high")


def run(script, *args, status=0):
    done = subprocess.run([sys.executable, ROOT / "bench" / script, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = run("gpu.py", out, "--device", "cpu", "--quick", "--commit", "abc")
    return json.loads(out.read_text()), done.stdout


def assert_times(entry):
    low, median, high = (entry[key] for key in QUARTILES)
    assert 0 < low <= median <= high and entry["rounds"] >= 2


def test_every_part_is_measured_and_nothing_failed(record):
    found, shown = record
    assert found["format"] == "fasthyper-gpu-2" and found["failures"] == found["left_out"] == []
    assert found["environment"]["commit"] == "abc" and found["environment"]["gpu"] == "none"
    assert all(found["rates"][name] > 0 for name in ("fp32", "tf32", "bf16", "copy"))
    assert {(row["workload"], row["what"]) for row in found["rows"]} == {
        (workload, what) for workload in ("tiny", "tiny-aligned") for what in ("regularizer", "step")
    }
    assert "FAILED" not in shown and "the planner's pick" in shown and "most of a step is" in shown


def test_rows_hold_times_ratios_and_counted_work(record):
    for row in record[0]["rows"]:
        best = min(way["median"] for way in row["ours"].values())
        for way in row["ours"].values():
            assert_times(way)
        assert row["ceiling_share"] == pytest.approx(row["ceiling_seconds"] / best) and row["macs"] > 0 < row["bytes"]
        assert ("errors" in row) == (row["what"] == "regularizer")
        for name, entry in row["peers"].items():
            if row["workload"] == "tiny" and name != "compile" and peers.missing(name) is None:
                assert_times(entry)
                assert entry["ratio"] == pytest.approx(entry["median"] / best)
                assert entry["ratio_range"][0] <= entry["ratio"] <= entry["ratio_range"][1]
            else:
                assert entry["skipped"]


def test_linear_ways_agree_and_implementations_of_each_op_of_a_step_are_timed(record):
    (row,) = record[0]["hyper_linear"]
    assert row["weights"] == 16 * 8 and row["pick"] in row["ways"] and row["ratio"] > 0
    for way in row["ways"].values():
        assert_times(way)
        assert way["error"] < 1e-5
    ops = [entry["op"] for entry in record[0]["alternatives"]]
    assert {"generate_fwd", "generate_bwd", "hypernet_drift_fwd", "adam_step_"} <= set(ops)
    for entry in record[0]["alternatives"]:
        assert_times(entry["seconds"]["reference"])


def test_a_profile_says_what_holds_the_time(record):
    (profile,) = record[0]["profiles"]
    kernels = profile["kernels"]
    assert kernels and all(kernel["seconds"] > 0 and kernel["launches"] > 0 and kernel["name"] for kernel in kernels)
    assert [k["seconds"] for k in kernels] == sorted((k["seconds"] for k in kernels), reverse=True)
    assert profile["busy"] >= kernels[0]["seconds"] and " of " in profile["holds"]


def test_what_is_timed_is_what_fit_does():
    training = Training(TINY, 2, "plain", Device("cpu", quick=True)).warm()
    other = Training(TINY, 2, "plain", Device("cpu", quick=True))
    other.trainer._current = None
    other.trainer.fit(other.data, steps=training.step, batch_size=TINY.batch_size)
    for mine, theirs in zip(training.trainer.hnet.theta, other.trainer.hnet.theta, strict=True):
        assert torch.equal(mine, theirs)


def test_a_long_sequence_goes_on_where_its_slice_ended(tmp_path):
    pytest.importorskip("sklearn")
    size = ["--tasks", 2, "--steps", 3, "--digits", "--device", "cpu", "--out", tmp_path]
    first = run("longseq.py", *size, "--seconds", 0)
    assert "run again to go on" in first.stdout
    run("longseq.py", *size, "--seconds", 600)
    found = json.loads((tmp_path / "longseq.json").read_text())
    assert found["finished"] and found["tasks_done"] == 2 and found["total_steps"] == 6 and len(found["slices"]) == 2
    assert found["training_seconds"] > 0 and found["evaluation_seconds"] > 0
    assert len(found["evaluations"]["2"]["accuracies"]) == 2
    assert "digits" in found["settings"]["data"] and "MNIST" not in found["settings"]["data"]
    other = run("longseq.py", *size[:2], "--steps", 4, *size[4:], status=1)
    assert "is of a run with" in other.stderr and other.stderr.count("\n") == 1


def as_goals(found):
    """The record of the tiny workload under the names and numbers of tasks that the goals are about."""
    cases = {"tiny": [("p100", 2), ("p100", 100)], "tiny-aligned": [("p100-aligned", 100)]}
    rows = [
        {**row, "workload": workload, "past": past, "precision": precision}
        for row in found["rows"]
        for workload, past in cases[row["workload"]]
        for precision in ("fp32", "tf32")
    ]
    linear = [{**row, "weights": 20_000_000} for row in found["hyper_linear"]]
    return {**found, "rows": rows, "hyper_linear": linear}


def test_text_says_what_was_asked_and_found(record):
    gpu = as_goals(record[0])
    longseq = {
        "finished": True,
        "settings": {"data": "MNIST, permuted", "tf32": False, "layout": "flat", "steps": 5, "tasks": 10},
        "training_seconds": 300.4,
        "evaluation_seconds": 20.0,
        "evaluations": {"9": {"mean": 0.5, "lowest": 0.1}, "10": {"mean": 0.9, "lowest": 0.8}},
        "slices": [{"environment": {"gpu": "a GPU", "commit": "abc"}}],
    }
    readme, design = report_gpu.readme_text(gpu, longseq), report_gpu.design_text(gpu, longseq)
    assert readme.count("| `p100` |") == 2 and readme.count("| `p100-aligned` |") == 1
    assert "after 10 of 10 tasks 90.00 % mean accuracy, the lowest 80.00 %" in readme and "commit abc" in readme
    found = {what: text for what, _, text in report_gpu.goals(gpu, longseq)}
    assert found["PermutedMNIST-100, evaluation included, fp32, s"] == "320"
    assert found["step `p100-aligned` at 2, fp32, against hypnettorch"] == "not measured"
    assert found["step `p100` at 100, TF32, ms"].count(" to ") == 1
    assert "`hypernet_drift_fwd`" in design and "us a step" in design
    for text in (readme, design):
        assert text.startswith("\n") and text.endswith("\n")
        tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        assert len(set(tables)) <= 2
    digits = {**longseq, "settings": longseq["settings"] | {"data": "digits"}}
    assert dict((w, f) for w, _, f in report_gpu.goals(gpu, digits))[next(reversed(found))] == "not measured"


def test_without_a_result_it_is_said_so(tmp_path):
    assert report_gpu.load(tmp_path) == (None, None)
    for text in (report_gpu.readme_text(None, None), report_gpu.design_text(None, None)):
        assert "Nothing was measured on a GPU yet" in text
