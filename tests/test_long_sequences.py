"""What must not grow with the tasks of a long sequence: bench/soak.py shows that it does not, these say why."""

import math

import pytest
import report_soak
import soak
import torch
from hypothesis import given
from hypothesis import strategies as st

import fasthyper as fh
from fasthyper import metrics
from fasthyper.streams import Stream, Task, TaskData


def toy(num_tasks):
    options = {"chunk_size": 7, "hidden": (5, 4), "task_dim": 3, "chunk_dim": 2, "dtype": torch.float64}
    hnet = fh.ChunkedHypernet(fh.nets.MLP(3, (4,), 2), num_tasks, **options)

    def make_task(index):
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(index))
        data = TaskData(x, (x[:, index % 3] > 0).long())
        return Task(index, data, data, 2)

    return hnet, Stream("toy", num_tasks, make_task)


@pytest.mark.parametrize("sampled, is_made", [(None, True), (1, False), (2, True)])
def test_of_far_more_tasks_than_a_step_takes_no_features_are_made(monkeypatch, sampled, is_made):
    monkeypatch.setattr("fasthyper.regularizer._WORTH", 3)
    hnet, _ = toy(6)
    ahead = [p.detach() + 0.1 for p in hnet.theta]
    whole, held = fh.OutputRegularizer(hnet), fh.OutputRegularizer(hnet)
    whole.snapshot(5)
    held.snapshot(5, sampled=sampled)
    assert (bool(held._pre0), held._gram0 is not None) == (is_made, is_made)
    for tasks in ([4], [0, 3], None):
        wanted, found = (regularizer.value_and_grad(ahead, tasks=tasks) for regularizer in (whole, held))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_run_with_few_of_many_sampled_goes_on_bit_for_bit(monkeypatch, tmp_path):
    monkeypatch.setattr("fasthyper.regularizer._WORTH", 1)
    (hnet, stream), whole = toy(4), fh.Trainer(toy(4)[0], reg_tasks=1, progress=False)
    cut = fh.Trainer(hnet, reg_tasks=1, progress=False)
    for task in stream:
        whole.fit(task, steps=6, batch_size=5)
    for task in stream[:3]:
        cut.fit(task, steps=6, batch_size=5)
    cut.begin_task(steps=6)
    batches = fh.streams.batches.Batches(20, 5, seed=0, task=3)
    for step in range(3):
        cut.step(*stream[3].train.batch(batches.indices(step)))
    cut.save(tmp_path)
    resumed = fh.Trainer.load(tmp_path, progress=False)
    assert not resumed.regularizer._pre0
    resumed.fit(stream[3], steps=6, batch_size=5)
    for (name, found), wanted in zip(resumed.hnet.named_parameters(), whole.hnet.parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_a_task_leaves_its_embedding_and_its_record():
    hnet, stream = toy(3)
    trainer = fh.Trainer(hnet, progress=False)
    for task in stream:
        trainer.fit(task, steps=2, batch_size=5)
    assert all(embedding.grad is None for embedding in hnet.task_embeddings)


def test_a_stream_keeps_a_bounded_number_of_tasks(monkeypatch):
    monkeypatch.setattr("fasthyper.streams.stream._KEPT", 3)
    _, stream = toy(9)
    kept = [stream[index] for index in (0, 1, 2)]
    assert all(stream[index] is task for index, task in enumerate(kept))
    assert [task.index for task in stream] == list(range(9)) and len(stream._tasks) == 3
    assert stream[0] is not kept[0] and torch.equal(stream[0].train.inputs, kept[0].train.inputs)


@given(data=st.data(), size=st.integers(1, 6), is_error=st.booleans())
def test_scores_of_rows_with_gaps_are_those_of_the_whole_matrix(data, size, is_error):
    entries = st.dictionaries(st.integers(0, size - 1), st.floats(0, 1))
    accuracy = {i: data.draw(entries) for i in range(size)}
    forgotten = {task: size - 1 for task in data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))}
    measure = "mse" if is_error else "accuracy"
    tasks = [metrics.TaskRecord(i) for i in range(size)]
    results = fh.Results(tasks, accuracy, measure=measure, forgotten=forgotten)
    dense = [[accuracy[i].get(j, math.nan) for j in range(size)] for i in range(size)]
    assert str(results.matrix) == str(dense)
    held = [task for task in range(size) if task not in forgotten]
    matrix = [[dense[i][j] for j in held] for i in [*held[:-1], size - 1]]
    wanted = {metrics.MEASURES[measure].key: metrics.acc(matrix), "aia": metrics.aia(matrix)}
    if is_error:
        matrix = [[-x for x in row] for row in matrix]
    wanted |= {
        "bwt": metrics.bwt(matrix),
        "forgetting": metrics.forgetting(matrix),
        "largest_drop": metrics.largest_drop(matrix),
    }
    found = results.scores()
    for key, value in wanted.items():
        assert found[key] == value or (math.isnan(found[key]) and math.isnan(value)), key


def test_scores_of_a_long_sequence_never_hold_its_whole_matrix():
    size = 100_000  # squared, 80 GB
    accuracy = {i: {i: 0.5} for i in range(size)}
    results = fh.Results([metrics.TaskRecord(i) for i in range(size)], accuracy)
    results.accuracy[size - 1] = dict.fromkeys(range(size), 0.25)
    scores = results.scores()
    assert scores["acc"] == 0.25 and scores["bwt"] == -0.25 and math.isnan(scores["aia"])
    assert "tasks in the middle not shown" in results.summary()


def test_soak_records_what_a_report_shows(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    for name, value in {"WINDOW": 2, "SAVE_EVERY": 2, "EVALUATED": 1}.items():
        monkeypatch.setattr(soak, name, value)
    windows, saves = soak.soak(8, 2, tmp_path)
    assert [row["tasks"] for row in windows] == [row["tasks"] for row in saves] == [2, 4, 6, 8]
    assert all(row["step"] > 0 and row["task"] > row["step"] for row in windows)
    assert windows[-1]["records"] == pytest.approx(4 * windows[0]["records"], rel=0.2)
    assert len({row["handles"] for row in windows}) == 1
    settings = {"tasks": 8, "steps": 2, "reg_tasks": soak.REG_TASKS, "window": 2}
    found = {"environment": fh.environment.environment(), "settings": settings, "windows": windows, "saves": saves}
    lines = report_soak.text(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[3:8]] == ["| 2", "| 2", "| 4", "| 6", "| 8"]
    pytest.importorskip("matplotlib")
    assert len(report_soak.figure(found, "#000000").axes) == 2
