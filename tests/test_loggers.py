"""What loggers are told, and what they write."""

import csv
import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import fasthyper as fh
from fasthyper.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 6, generator=generator), torch.arange(24) % 4


def trained(loggers, tasks=2, steps=5, **options):
    hnet = fh.ChunkedHypernet(fh.nets.MLP(6, (5,), 4), tasks, chunk_size=9, hidden=(4,))
    trainer = fh.Trainer(hnet, progress=False, loggers=loggers, **options)
    for task in range(tasks):
        trainer.fit(data(), steps=steps, batch_size=8)
        trainer.evaluate([data()] * (task + 1))
    return trainer


class Memory(Logger):
    def __init__(self, every=1):
        super().__init__(every)
        self.steps, self.tasks, self.rows = [], [], []

    def on_step(self, task, step, total, loss, drift):
        self.steps.append((task, step, total, loss, drift))

    def on_task_end(self, record, total):
        self.tasks.append((record.index, record.steps, total))

    def on_evaluate(self, trained, accuracies, total):
        self.rows.append((trained, accuracies, total))


def test_loggers_are_told_what_the_results_hold():
    memory, sparse = Memory(), Memory(every=3)
    results = trained([memory, sparse]).results
    assert [(task, step, total) for task, step, total, *_ in memory.steps] == [
        (task, step, 5 * task + step + 1) for task in range(2) for step in range(5)
    ]
    for record in results.tasks:  # every step is a sample of so short a curve
        mine = [entry for entry in memory.steps if entry[0] == record.index]
        assert [(step, loss) for _, step, _, loss, _ in mine] == record.loss
        assert [(step, drift) for _, step, _, _, drift in mine if not math.isnan(drift)] == record.drift
    assert memory.tasks == [(0, 5, 5), (1, 5, 10)]
    assert memory.rows == [(0, results.accuracy[0], 5), (1, results.accuracy[1], 10)]
    assert [entry[:2] for entry in sparse.steps] == [(0, 0), (0, 3), (1, 0), (1, 3)]
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Logger(every=0)


def test_a_run_that_goes_on_logs_on(tmp_path):
    first, second = Memory(), Memory()
    trainer = trained([first], tasks=1, steps=4)
    trainer.save(tmp_path / "run")
    trainer = fh.Trainer.load(tmp_path / "run", progress=False, loggers=[second])
    trainer.hnet.add_task()
    trainer.fit(data(), steps=2, batch_size=8)
    assert [entry[:3] for entry in second.steps] == [(1, 0, 5), (1, 1, 6)]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_every_event(tmp_path):
    path = tmp_path / "logs" / "run.csv"
    logger = CSVLogger(path, every=2)
    results = trained([logger]).results
    rows = rows_of(path)  # before it is closed
    logger.close()
    steps = [row for row in rows if row["event"] == "step"]
    assert [(row["task"], row["step"], row["total_step"]) for row in steps] == [
        (str(task), str(step), str(5 * task + step + 1)) for task in range(2) for step in (0, 2, 4)
    ]
    assert [float(row["loss"]) for row in steps[:3]] == [results.tasks[0].loss[i][1] for i in (0, 2, 4)]
    assert [row["drift"] for row in steps[:3]] == [""] * 3
    assert [float(row["drift"]) for row in steps[3:]] == [results.tasks[1].drift[i][1] for i in (0, 2, 4)]
    ends = [row for row in rows if row["event"] == "task_end"]
    assert [(float(row["seconds"]), int(row["samples"])) for row in ends] == [(r.seconds, r.samples) for r in results.tasks]
    accuracies = [(int(row["task"]), int(row["evaluated"]), float(row["accuracy"])) for row in rows if row["accuracy"]]
    assert accuracies == [(i, j, x) for i, row in results.accuracy.items() for j, x in row.items()]


def test_csv_appends_to_its_own_file_and_to_no_other(tmp_path):
    path = tmp_path / "log.csv"
    for _ in range(2):
        logger = CSVLogger(path)
        logger.on_step(0, 0, 1, 0.5, math.nan)
        logger.close()
    assert [row["loss"] for row in rows_of(path)] == ["0.5", "0.5"]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns than event,task,step"):
        CSVLogger(tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_files_hold_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, every=1)
    results = trained([logger]).results
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {
        *("train/loss", "train/drift", "task/seconds", "accuracy/mean", "accuracy/task_000", "accuracy/task_001")
    }
    losses = [loss for record in results.tasks for _, loss in record.loss]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("train/drift")] == [6, 7, 8, 9, 10]
    assert [event.value for event in events.Scalars("accuracy/task_000")] == pytest.approx(
        [results.accuracy[0][0], results.accuracy[1][0]]
    )


def test_wandb_is_given_the_same_names(monkeypatch):
    """A stand-in with the two calls that are used; the real package starts a service and wants a network."""
    logged, made = [], {}
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: made.update(options) or run))
    logger = WandbLogger("mine", every=5, name="first", config={"lr": 1})
    results = trained([logger]).results
    logger.close()
    assert made == {"project": "mine", "name": "first", "config": {"lr": 1}}
    assert [entry[0] for entry in logged[:-1]] == [1, 5, 5, 6, 10, 10] and logged[-1] == "finished"
    assert logged[0][1] == {"train/loss": results.tasks[0].loss[0][1]}
    assert logged[3][1].keys() == {"train/loss", "train/drift"}
    assert logged[5][1] == {
        "accuracy/mean": sum(results.accuracy[1].values()) / 2,
        "accuracy/task_000": results.accuracy[1][0],
        "accuracy/task_001": results.accuracy[1][1],
    }


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_itself_takes_the_calls(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("mine", mode="disabled", dir=str(tmp_path))
    trained([logger])
    logger.close()


@pytest.mark.parametrize(
    "module, make, extra",
    [("torch.utils.tensorboard", lambda: TensorBoardLogger("nowhere"), "tb"), ("wandb", WandbLogger, "wandb")],
    ids=["tensorboard", "wandb"],
)
def test_a_missing_package_is_named_with_its_extra(module, make, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(fh.MissingPackageError, match=rf"is not installed: pip install 'fasthyper\[{extra}\]'"):
        make()
