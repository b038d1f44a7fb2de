"""Streams out of other libraries' data: stand-ins with the looks of theirs."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

import fasthyper as fh
from fasthyper.streams import from_avalanche, from_continuum, from_datasets


class Items:
    """A map-style dataset of (input, label, task), with transforms by mode as Avalanche's have."""

    def __init__(self, labels, task=0, scale=1.0):
        self.labels, self.task, self.scale = labels, task, scale
        self.reads = 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.reads += 1
        return torch.full((2, 3), self.scale * index), self.labels[index], self.task

    def train(self):
        return Items(self.labels, self.task, 10.0)

    def eval(self):
        return Items(self.labels, self.task, 100.0)


def benchmark(num_tasks=3):
    def stream(size):
        labels = [[2 * t + i % 2 for i in range(size)] for t in range(num_tasks)]
        return [SimpleNamespace(dataset=Items(row, t)) for t, row in enumerate(labels)]

    return SimpleNamespace(train_stream=stream(6), test_stream=stream(4), valid_stream=stream(2))


def test_from_avalanche_makes_a_task_of_each_experience():
    stream = from_avalanche(benchmark())
    assert [(task.index, len(task.train), len(task.test)) for task in stream] == [(0, 6, 4), (1, 6, 4), (2, 6, 4)]
    assert [task.num_classes for task in stream] == [2, 4, 6] and stream[1].name == "avalanche/1"
    assert stream[1:][0] is stream[1] and len(stream[1:]) == 2
    assert stream[1].train.labels.tolist() == [2, 3, 2, 3, 2, 3]
    assert stream[2].train.inputs[3].eq(30).all() and stream[2].test.inputs[3].eq(300).all()  # the transforms of each mode
    assert len(from_avalanche(benchmark(), test="valid_stream")[0].test) == 2


def test_labels_can_be_made_to_start_from_zero():
    stream = from_avalanche(benchmark(), relabel=True)
    assert [task.num_classes for task in stream] == [2, 2, 2]
    assert stream[2].train.labels.tolist() == [0, 1] * 3 and stream[2].test.labels.tolist() == [0, 1] * 2
    only_in_test = from_datasets(
        [((torch.ones(2, 1), torch.tensor([7, 3])), (torch.ones(1, 1), torch.tensor([5])))], relabel=True
    )
    assert only_in_test[0].train.labels.tolist() == [2, 0] and only_in_test[0].test.labels.tolist() == [1]


def test_from_continuum_takes_a_scenario_of_each_kind():
    train, test = ([Items([t, t + 1, t], t) for t in range(2)] for _ in range(2))
    stream = from_continuum(train, test)
    assert [task.num_classes for task in stream] == [2, 3] and stream[1].test.labels.tolist() == [1, 2, 1]


def test_from_datasets_takes_what_fit_takes_and_reads_it_once():
    items, pair = Items([0, 1, 1]), (torch.rand(4, 6), torch.tensor([0, 1, 2, 0]))
    stream = from_datasets([(pair, TensorDataset(*pair)), (items, fh.streams.TaskData(*pair))], name="mine")
    assert items.reads == 0  # until it is asked for
    assert torch.equal(stream[0].train.inputs, pair[0]) and stream[0].num_classes == 3 and stream[1].name == "mine/1"
    assert items.reads == 0 + len(items) and stream[1].train is stream[1].train
    items_again = stream[1].train
    assert items.reads == len(items) and items_again.inputs.shape == (3, 2, 3)


def test_a_stream_of_other_data_trains():
    stream = from_avalanche(benchmark(2), relabel=True)
    hnet = fh.ChunkedHypernet(fh.nets.MLP(6, (4,), 2), 2, chunk_size=7, hidden=(3,))
    trainer = fh.Trainer(hnet, progress=False)
    for task in stream:
        trainer.fit(task, steps=2, batch_size=3)
        assert len(trainer.evaluate(stream[: task.index + 1])) == task.index + 1


def test_names_what_is_wrong():
    with pytest.raises(ValueError, match="num_tasks must be at least 1"):
        from_datasets([])
    short = benchmark()
    short.test_stream = short.test_stream[:2]
    with pytest.raises(ValueError, match="train_stream and test_stream must have the same length, got 3 and 2"):
        from_avalanche(short)
    with pytest.raises(ValueError, match="the scenarios must have the same length, got 1 and 2"):
        from_continuum([1], [1, 2])
    with pytest.raises(TypeError, match="got a str"):
        from_datasets([("mnist", "mnist")])[0]
