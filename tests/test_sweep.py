"""Sweeps: what is drawn, shared, gone on with and given up, and how the command ends."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace

import pytest

import fasthyper as fh
from fasthyper.cli import main
from fasthyper.errors import CheckpointError
from fasthyper.recipes import RECIPES, Recipe, run
from fasthyper.sweep import Parameter, Sweep, trainable

TINY = {"num_tasks": 2, "steps": 4, "hidden": (4,), "chunk_size": 900, "target_hidden": (8,)}
FLAGS = ["--num-tasks", "2", "--steps", "4", "--hidden", "4", "--chunk-size", "900", "--target-hidden", "8"]
DIGITS, TOY = RECIPES["permuted-digits"], RECIPES["toy-regression"]


@pytest.fixture
def optuna():
    pytest.importorskip("sklearn")
    return pytest.importorskip("optuna")


def cli(*args):
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def sweep_of(out, *parameters, recipe=DIGITS, prune=0, **overrides):
    return Sweep(recipe, out, [Parameter.parse(p) for p in parameters], {**TINY, **overrides}, prune=prune)


def trials_of(sweep):
    return {trial["number"]: trial for trial in sweep.to_json()["trials"]}


@pytest.mark.parametrize(
    "argument, words",
    [
        ("speed=1:2", "unknown setting 'speed' to try"),
        ("name=choice:a,b", "unknown setting 'name' to try"),
        ("beta", "'beta' is no range of numbers: give log:LOW:HIGH"),
        ("beta=log:1", "'beta=log:1' is no range of numbers"),
        ("beta=low:high", "is no range of numbers"),
        ("steps=1.5:3", "is no range of integers"),
        ("beta=2:1", "must go from a lower to a higher number"),
        ("beta=0:inf", "must go from a lower to a higher number"),
        ("beta=log:0:1", "must begin above 0"),
        ("hidden=1:9", "hidden is no number: give choices"),
        ("hidden=choice:25;25", "'25;25' is not int,int,..."),
        ("lookahead=choice:true,maybe", "'maybe' is not true|false"),
        ("beta=choice:", "names no choices"),
    ],
)
def test_bad_parameters_are_one_line_and_status_2(argument, words, capsys):
    assert cli("sweep", "permuted-digits", "--param", argument) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error, error


@pytest.mark.parametrize(
    "args, words",
    [
        (["--param", "beta=0:1", "--trials", "0"], "'0' is not a number from 1 on"),
        (["--param", "beta=0:1", "--prune", "100"], "'100' is not a percentage"),
        ([], "required: --param"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(args, words, capsys):
    assert cli("sweep", "permuted-digits", *args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error, error


def test_without_optuna_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli("sweep", "permuted-digits", "--param", "beta=0:1", "--out", tmp_path / "sweep") == 1
    assert capsys.readouterr().err == "fasthyper: optuna is not installed: pip install 'fasthyper[sweep]'\n"


def test_parameters_are_drawn_from_their_ranges(optuna):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    texts = ("beta=log:1e-3:1", "lr=0.5:2", "steps=10:20", "batch-size=log:4:64", "adam_beta1=int:2:5")
    choices = ("hidden=choice:5,6/7", "lookahead=choice:true,false", "reg_tasks=choice:none,3", "optimizer=choice:adam,sgd")
    parameters = [Parameter.parse(text) for text in (*texts, *choices)]
    drawn = []
    for _ in range(40):
        trial = study.ask()
        drawn.append({parameter.name: parameter.draw(trial) for parameter in parameters})
        assert drawn[-1] == {parameter.name: parameter.draw(trial) for parameter in parameters}
        replace(Recipe("", "", ""), **drawn[-1])
    assert all(1e-3 <= d["beta"] <= 1 and 0.5 <= d["lr"] <= 2 and d["beta"] == float(f"{d['beta']:.4g}") for d in drawn)
    assert sum(d["beta"] < 0.03 for d in drawn) > 10, "even in its logarithm"
    assert all(isinstance(d[key], int) for d in drawn for key in ("steps", "batch_size"))
    assert {d["adam_beta1"] for d in drawn} == {2.0, 3.0, 4.0, 5.0} and {d["hidden"] for d in drawn} == {(5, 6), (7,)}
    assert {d["lookahead"] for d in drawn} == {True, False} and {d["reg_tasks"] for d in drawn} == {None, 3}


def test_the_command_tries_goes_on_and_says_how_to_train_the_best(optuna, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, runs = tmp_path / "sweep", tmp_path / "best"
    parameters = ["--param", "lr=log:1e-4:1e-2", "--param", "hidden=choice:5,6/7"]
    shared = [word for pair in zip(FLAGS[::2], FLAGS[1::2], strict=True) if pair[0] != "--hidden" for word in pair]
    command = ["sweep", "permuted-digits", *parameters, "--workers", 1, "--out", out, "--device", "cpu", *shared]
    assert cli(*command, "--trials", 2) == 0
    printed = capsys.readouterr().out
    assert "0 of 2 trials are done" in printed and "trial 1: acc " in printed and "2 trained" in printed
    assert cli(*command, "--trials", 3, "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "2 of 3 trials are done" in captured.err and [trial["number"] for trial in found["trials"]] == [0, 1, 2]
    best = max(found["trials"], key=lambda trial: trial["value"])
    assert (found["best"]["trial"], found["best"]["value"]) == (best["number"], best["value"])
    assert cli(*found["best"]["command"].split()[1:], "--out", runs, "--json", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["acc"] == best["value"]
    assert cli("report", *(trial["directory"] for trial in found["trials"]), "--out", tmp_path / "report") == 0


def test_a_sweep_is_refused_elsewhere(optuna, tmp_path):
    out = tmp_path / "sweep"
    sweep_of(out, "beta=0:1")
    with pytest.raises(CheckpointError, match=r"holds another sweep \(steps is 4 there, 5 here\)"):
        sweep_of(out, "beta=0:1", steps=5)
    with pytest.raises(CheckpointError, match=r"holds another sweep \(parameters is "):
        sweep_of(out, "beta=0:2")
    with pytest.raises(ValueError, match="each setting can be given once"):
        sweep_of(out, "steps=1:2")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty and holds no sweep"):
        sweep_of(tmp_path, "beta=0:1")
    (out / "journal.log").write_text("{}\nnonsense\n{}\n")
    with pytest.raises(CheckpointError, match="is damaged"):
        sweep_of(out, "beta=0:1")


def test_the_objective_of_a_regression_is_the_negative_error(optuna, tmp_path):
    sweep = sweep_of(tmp_path, "lr=log:1e-4:1e-1", recipe=TOY)
    sweep.work(3)
    found = sweep.to_json()
    for trial in found["trials"]:
        results = fh.Trainer.load(trial["directory"], progress=False).results
        assert trial["value"] == -results.scores()["mse"] < 0
    assert found["measure"] == "mse" and found["best"]["value"] == max(trial["value"] for trial in found["trials"])


def test_the_worst_by_the_first_task_are_given_up(optuna, tmp_path):
    sweep = sweep_of(tmp_path, "lr=log:1e-6:1e-1", prune=50, steps=10)
    said = []
    sweep.work(12, said.append)
    trials = trials_of(sweep)
    given_up = [number for number, trial in trials.items() if trial["state"] == "pruned"]
    assert given_up and len(trials) == 12 and sum("given up after 1 of 2 tasks" in line for line in said) == len(given_up)
    first = {}
    for number, trial in trials.items():
        results = fh.Trainer.load(trial["directory"], progress=False).results
        assert len(results.tasks) == (1 if number in given_up else 2)
        first[number] = results.accuracy[0][0]
    for number in given_up:
        others = sorted(first[other] for other in range(number) if other not in given_up)
        assert len(others) >= 5 and first[number] < others[len(others) // 2]


def test_a_loss_that_is_not_finite_fails_one_trial_and_bad_settings_all(optuna, tmp_path, capsys):
    sweep = sweep_of(tmp_path / "a", "lr=choice:1e30,1e-3")
    sweep.work(6)
    states = {trial["parameters"]["lr"]: trial["state"] for trial in trials_of(sweep).values()}
    assert states == {1e30: "fail", 1e-3: "complete"} and "failed" in sweep.summary()
    bad = ["sweep", "permuted-digits", "--param", "optimizer=choice:lion,tiger", "--workers", 1, *FLAGS]
    capsys.readouterr()
    assert cli(*bad, "--out", tmp_path / "b") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown optimizer" in error


def start(*args):
    def foreground():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job starts with it ignored

    command = [sys.executable, "-m", "fasthyper", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, preexec_fn=foreground, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes)


def wait_for(process, *paths):
    while not all(path.exists() for path in paths):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_workers_share_a_sweep_and_a_killed_trial_is_gone_on_with(optuna, tmp_path):
    """The other worker is stopped, which leaves its lock held, then killed, which does not."""
    settings = {"num_tasks": 6, "steps": 20}
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", value)]
    other = start("sweep", "permuted-digits", "--param", "beta=log:1e-3:1", "--trials", 1, "--workers", 1, "--out",
                  tmp_path / "a", "--prune", 0, "--device", "cpu", *FLAGS, *flags)  # fmt: skip
    results = tmp_path / "a" / "trial-000" / "results.json"
    try:
        wait_for(other, results)
        other.send_signal(signal.SIGSTOP)
        before = json.loads(results.read_text())["results"]["tasks"]
        sweep, alone = (sweep_of(tmp_path / name, "beta=log:1e-3:1", **settings) for name in "ab")
        sweep.work(2)
        assert list(trials_of(sweep)) == [1]
    finally:
        other.kill()
        other.communicate()
    assert len(before) < 6
    sweep.work(2)
    alone.work(1)
    gone_on, whole = trials_of(sweep)[0], trials_of(alone)[0]
    assert (gone_on["value"], gone_on["parameters"]) == (whole["value"], whole["parameters"])
    after = json.loads(results.read_text())["results"]["tasks"]
    assert after[: len(before)] == before and len(after) == 6


def test_ctrl_c_ends_all_workers_and_the_same_command_goes_on(optuna, tmp_path):
    process = start("sweep", "permuted-digits", "--param", "beta=log:1e-3:1", "--trials", 2, "--workers", 2, "--out",
                    tmp_path / "a", *FLAGS, "--steps", 100_000)  # fmt: skip
    wait_for(process, tmp_path / "a" / "trial-000", tmp_path / "a" / "trial-001")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 130, error
    assert (
        "2 at once" in out
        and error == f"fasthyper: interrupted; state saved in {tmp_path / 'a'}, the same command goes on\n"
    )
    sweep = sweep_of(tmp_path / "a", "beta=log:1e-3:1", steps=100_000)
    assert sweep.done == 0 and all(sweep._locks.take(number + 1) for number in (0, 1)), "a worker is still there"


@pytest.fixture
def ray(monkeypatch, tmp_path):
    """What ``trainable`` uses of Ray, without it."""

    class Checkpoint:
        def __init__(self, path):
            self.path = path

        from_directory = classmethod(lambda cls, path: cls(path))

        def as_directory(self):
            import contextlib

            return contextlib.nullcontext(self.path)

    tune = types.SimpleNamespace(told=[], kept=None, Checkpoint=Checkpoint, place=tmp_path / "there")
    tune.get_context = lambda: types.SimpleNamespace(get_trial_dir=lambda: str(tune.place))
    tune.get_checkpoint = lambda: tune.kept
    tune.report = lambda metrics, checkpoint: tune.told.append((metrics, checkpoint))
    module = types.ModuleType("ray")
    module.tune = tune
    monkeypatch.setitem(sys.modules, "ray", module)
    return tune


def test_ray_is_told_of_each_task_and_a_trial_goes_on_elsewhere(ray, tmp_path):
    pytest.importorskip("sklearn")
    train = trainable(replace(DIGITS, **TINY))
    train({"lr": 3e-3})
    alone = run(replace(DIGITS, **TINY, lr=3e-3), tmp_path / "alone", progress=False, log=lambda line: None).results
    means = [sum(row.values()) / len(row) for row in alone.accuracy.values()]
    latest = [alone.accuracy[i][i] for i in range(2)]
    assert [told for told, _ in ray.told] == [
        {"accuracy": mean, "latest": last, "tasks": i + 1} for i, (mean, last) in enumerate(zip(means, latest, strict=True))
    ]
    ray.kept, ray.place = ray.told[-1][1], tmp_path / "elsewhere"
    train({"lr": 3e-3})
    assert len(ray.told) == 2, "nothing was left to train"
    assert fh.Trainer.load(tmp_path / "elsewhere" / "run", progress=False).results.accuracy == alone.accuracy
    with pytest.raises(ValueError, match="unknown recipe 'x'"):
        trainable("x")
