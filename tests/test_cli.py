"""The command line as a person meets it: what it prints, what it leaves, how it ends."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fasthyper.cli import main
from fasthyper.recipes import RECIPES
from fasthyper.streams import fetch

SMALL = ["--num-tasks", "2", "--steps", "12", "--hidden", "6,5", "--chunk_size", "900", "--target-hidden", "10"]


def cli(*args):
    """Runs the command in this process: its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def one_line(capsys, *words):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert all(word in captured.err for word in words), captured.err


def test_list_shows_every_recipe(capsys):
    assert cli("list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)
    assert cli("list", "--json") == 0
    assert [recipe["name"] for recipe in json.loads(capsys.readouterr().out)] == list(RECIPES)


def test_a_reader_that_leaves_ends_the_command_quietly():
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "fasthyper", "list"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_doctor_says_what_serves(capsys, monkeypatch):
    monkeypatch.setattr("fasthyper.vision.trouble", lambda: "built for another torch")
    assert cli("doctor") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("torch ", "ops on cpu ", "data mnist ", "data cifar-100 "))
    assert "built for another torch" in out or importlib.util.find_spec("torchvision") is None
    assert cli("doctor", "--json") == 0
    assert "torch" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", [["data"], ["data", "list"]])
def test_data_says_what_is_here_and_what_belongs_where(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("train.bin", "test.bin"):
        (tmp_path / "fasthyper" / "cifar-100").mkdir(parents=True, exist_ok=True)
        (tmp_path / "fasthyper" / "cifar-100" / name).write_bytes(b"")
    assert cli(*command) == 0
    lines = capsys.readouterr().out.splitlines()
    states = dict(line.split(": ", 1) for line in lines[::2])
    assert list(states) == list(fetch.DATASETS) and all(line.startswith("    ") for line in lines[1::2])
    assert states["cifar-100"] == f"there, checked when used, in {tmp_path}/fasthyper/cifar-100"
    assert states["cifar-10"].startswith("not here: `fasthyper data fetch cifar-10`, or put the files data_batch_1.bin, ")
    assert f"{fetch.CELEBA_IMAGES} into {tmp_path}/fasthyper/f-celeba, or name another folder" in states["f-celeba"]
    for name, dataset in fetch.DATASETS.items():
        assert dataset.about in lines[2 * list(states).index(name) + 1]


@pytest.mark.parametrize("layout", ["flat", "aligned"])
def test_run_trains_resumes_and_reports(tmp_path, capsys, layout):
    pytest.importorskip("sklearn")
    out, settings = tmp_path / "run", [*SMALL, "--layout", layout]
    assert cli("run", "permuted-digits", "--out", out, *settings) == 0
    printed = capsys.readouterr().out
    assert "task 2/2  step 12/12  loss" in printed and "ACC" in printed and "largest drop" in printed
    assert (out / "checkpoint.safetensors").exists() and (out / "results.json").exists()
    assert cli("run", "permuted-digits", "--out", out, *settings) == 0
    assert "holds all 2 tasks already; nothing to train" in capsys.readouterr().out
    assert cli("run", "permuted-digits", "--out", out, "--json", *settings) == 0
    assert json.loads(capsys.readouterr().out)["acc"] > 0


def test_several_seeds_are_runs_of_their_own_and_one_report(tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "runs"
    assert cli("run", "permuted-digits", "--seeds", "2", "--seed", "5", "--out", out, "--device", "cpu", *SMALL) == 0
    printed = capsys.readouterr().out
    assert "seed 5" in printed and "seed 6" in printed and "2 seeds: " in printed and " ± " in printed
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["seed-5", "seed-6"]
    assert (out / "report.html").exists()
    assert cli("run", "permuted-digits", "--seeds", "2", "--seed", "5", "--out", out, "--json", *SMALL) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert cli("eval", out / "seed-5") == 0
    last = json.loads((out / "seed-5" / "results.json").read_text())["results"]["accuracy"]["1"]
    assert f"{100 * sum(last.values()) / 2:.2f} %" in capsys.readouterr().out.splitlines()[-1]
    assert cli("eval", out / "seed-5", "--infer", "entropy", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["permuted-digits/0", "permuted-digits/1"]
    assert cli("eval", out / "seed-5", "--infer", "entropy", "--temperature", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == found
    assert cli("eval", out / "seed-5", "--infer", "entropy", "--temperature", "0") == 1
    assert "temperature above 0, got 'entropy', 0.0" in capsys.readouterr().err


def test_run_refuses_other_settings_and_foreign_directories(tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    assert cli("run", "permuted-digits", "--out", out, "--json", *SMALL) == 0
    capsys.readouterr()
    saved = (out / "checkpoint.safetensors").read_bytes()
    assert cli("run", "permuted-digits", "--out", out, "--lr", "0.5", *SMALL) == 1
    assert "holds a run with other settings (lr is 0.001 there, 0.5 here)" in capsys.readouterr().err
    assert cli("run", "demo", "--out", out) == 1
    assert "holds a run of 'permuted-digits', not of 'demo'" in capsys.readouterr().err
    assert (out / "checkpoint.safetensors").read_bytes() == saved
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    assert cli("run", "permuted-digits", "--out", tmp_path / "foreign") == 1
    assert "is not empty and holds no fasthyper run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli("run", "permuted-digits", "--out", tmp_path / "file") == 1
    assert "is a file; name a directory" in capsys.readouterr().err
    assert cli("run", "permuted-digits", "--out", tmp_path / "file" / "run") == 1
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, words",
    [
        (["run", "permuted-mnist-1O"], ["unknown recipe 'permuted-mnist-1O'; did you mean permuted-mnist-10"]),
        (["run", "xyz"], ["unknown recipe 'xyz'", "`fasthyper list` shows them"]),
        (["run", "demo", "--steps", "many"], ["'many' is not int"]),
        (["run", "demo", "--hidden", "25;25"], ["'25;25' is not int,int,..."]),
        (["run", "demo", "--lookahead", "maybe"], ["'maybe' is not true|false"]),
        (["run", "demo", "--no-such-setting", "1"], ["unrecognized arguments"]),
        (["run", "demo", "--device", "tpu"], ["no device 'tpu' here; there is cpu"]),
        (["run", "demo", "--seeds", "0"], ["'0' is not a number from 1 on"]),
        (["eval", "runs", "--infer", "guess"], ["invalid choice: 'guess'"]),
        (["report"], ["required: DIR"]),
        (["dance"], ["invalid choice: 'dance'"]),
        ([], ["required: COMMAND"]),
    ],
    ids=str,
)
def test_bad_usage_is_one_line_and_status_2(args, words, capsys):
    assert cli(*args) == 2
    one_line(capsys, *words)


@pytest.mark.parametrize(
    "args, words",
    [
        (["run", "demo", "--data-dir", "nowhere/at/all", "--stream", "imagenet"], ["unknown stream 'imagenet'"]),
        (["run", "permuted-digits", "--chunk-size", "0"], ["must be at least 1"]),
        (["run", "permuted-digits", "--optimizer", "lion"], ["unknown optimizer 'lion'"]),
        (["run", "permuted-digits", "--num-tasks", "0"], ["num_tasks must be at least 1"]),
        (["report", "nowhere"], ["nowhere"]),
        (["eval", "nowhere"], ["no results.json in nowhere"]),
        (["data", "fetch", "imagenet"], ["unknown data set 'imagenet'; known: mnist"]),
    ],
    ids=str,
)
def test_failures_are_one_line_and_status_1(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(*args) == 1
    one_line(capsys, *words)


def test_damaged_data_is_named(tmp_path, capsys):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(b"not an image")
    assert cli("run", "demo", "--data-dir", tmp_path, "--out", tmp_path / "run") == 1
    one_line(capsys, "is not the right file", "SHA-256")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_the_same_command_goes_on(tmp_path, signum):
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "fasthyper", "run", "permuted-digits", "--out", str(tmp_path / "run"), *SMALL]
    command[command.index("12")], command[command.index("2")] = "500", "20"

    def start():
        def foreground():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job starts with it ignored

        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=env, preexec_fn=foreground, **pipes)

    process = start()
    assert "permuted-digits" in process.stdout.readline()
    checkpoint, until = tmp_path / "run" / "checkpoint.safetensors", time.monotonic() + 240
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)  # until the first task of twenty is kept
    process.send_signal(signum)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + signum, errors
    what = "interrupted" if signum == signal.SIGINT else "terminated"
    assert f"{what}; state saved in" in errors and "the same command goes on" in errors
    assert checkpoint.exists()
    process = start()
    process.stdout.readline()
    assert "going on in" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=240)


def test_a_damaged_checkpoint_is_one_line_and_the_one_before_is_offered(tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    assert cli("run", "permuted-digits", "--out", out, "--json", *SMALL) == 0
    (out / "checkpoint.safetensors").write_bytes(b"not it")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert cli("run", "permuted-digits", "--out", out, "--json", *SMALL) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "is damaged" in errors[1] and f"`mv {out}/previous.safetensors" in errors[1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "checkpoint.safetensors").unlink()  # neither does a run begin anew over it
    assert cli("run", "permuted-digits", "--out", out, "--json", *SMALL) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    (out / "previous.safetensors").rename(out / "checkpoint.safetensors")
    assert cli("run", "permuted-digits", "--out", out, "--json", *SMALL) == 0


def test_run_logs_into_its_directory(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    assert cli("run", "permuted-digits", "--out", out, "--json", "--log", "csv", *SMALL) == 0
    rows = (out / "log.csv").read_text().splitlines()
    assert rows[0].startswith("event,task,step") and sum(row.startswith("evaluate") for row in rows) == 3
    assert cli("run", "permuted-digits", "--out", out, "--json", "--log", "csv", *SMALL) == 0  # nothing left to train
    assert (out / "log.csv").read_text().splitlines() == rows
    capsys.readouterr()
    assert cli("run", "permuted-digits", "--log", "csv,tensorbord") == 2
    one_line(capsys, "unknown logger 'tensorbord'; choose from csv, tensorboard, wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli("run", "permuted-digits", "--out", tmp_path / "other", "--json", "--log", "wandb", *SMALL) == 1
    assert "pip install 'fasthyper[wandb]'" in capsys.readouterr().err
