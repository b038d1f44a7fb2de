"""Tasks, streams, and the data sets they are made of."""

import gzip
import hashlib
import struct
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from fasthyper.errors import DataError
from fasthyper.streams import Stream, Task, TaskData, as_task_data, fetch, permuted_digits, permuted_mnist, split_mnist
from fasthyper.streams.mnist import read_idx
from fasthyper.streams.stream import permuted_stream, pixel_permutation


def some_data(n=6, shape=(2, 3), dtype=torch.uint8):
    generator = torch.Generator().manual_seed(n)
    inputs = torch.randint(0, 256, (n, *shape), generator=generator).to(dtype)
    return TaskData(inputs, torch.arange(n) % 3)


def some_stream(num_tasks=10, made=None):
    def make_task(index):
        if made is not None:
            made.append(index)
        return Task(index, some_data(), some_data(), 3, f"task {index}")

    return Stream("some-stream", num_tasks, make_task)


class MapStyle(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
def test_batch_holds_the_chosen_examples_as_float32(dtype):
    data = some_data(dtype=dtype)
    before = data.inputs.clone()
    x, y = data.batch(torch.tensor([4, 0, 4]))
    expected = before[[4, 0, 4]].double() / (255 if dtype == torch.uint8 else 1)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    torch.testing.assert_close(x, expected.float(), rtol=0, atol=0)
    assert y.tolist() == [1, 0, 1]
    assert torch.equal(data.inputs, before)


@given(
    columns=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    rows=st.lists(st.integers(0, 5), max_size=8),
    floating=st.booleans(),
)
def test_batch_with_columns_equals_plain_indexing(columns, rows, floating):
    base = some_data(dtype=torch.float32 if floating else torch.uint8)
    columns, rows = torch.tensor(columns), torch.tensor(rows, dtype=torch.int64)
    expected = base.inputs.flatten(1)[rows][:, columns].float() / (1 if floating else 255)
    for data in (base.with_columns(columns), TaskData(base.inputs, base.labels, columns)):
        x, y = data.batch(rows)
        assert torch.equal(x, expected) and torch.equal(y, base.labels[rows])


def test_batch_reads_inputs_that_are_a_strided_view():
    inputs = torch.arange(24, dtype=torch.uint8).reshape(6, 4).t()
    x, _ = TaskData(inputs, torch.zeros(4, dtype=torch.int64), torch.tensor([5, 0])).batch(torch.tensor([3, 1]))
    assert torch.equal(x * 255, torch.tensor([[23.0, 3.0], [21.0, 1.0]]))


@pytest.mark.parametrize(
    ("inputs", "labels", "columns", "error", "words"),
    [
        (torch.ones(3, 2), torch.ones(3), None, TypeError, "labels must be integers, got torch.float32"),
        (torch.ones(3, 2), torch.ones(3, dtype=torch.bool), None, TypeError, "labels must be integers"),
        (torch.ones(3, 2, dtype=torch.int64), torch.ones(3, dtype=torch.int64), None, TypeError, "inputs must be uint8"),
        (torch.ones(3, 2), torch.ones(4, dtype=torch.int64), None, ValueError, r"got \[3, 2\] and \[4\]"),
        (torch.ones(3), torch.ones(3, dtype=torch.int64), None, ValueError, r"inputs must be \[n, ...\]"),
        (torch.ones(3, 2), torch.ones(3, 1, dtype=torch.int64), None, ValueError, r"labels \[n\], got"),
        (torch.ones(3, 2), torch.tensor([0, -1, 2]), None, ValueError, "must not be negative, got -1"),
        (torch.ones(0, 2), torch.ones(0, dtype=torch.int64), None, ValueError, "hold no examples"),
        (torch.ones(3, 2), torch.tensor([0, 1, 2]), torch.tensor([0, 2]), ValueError, r"lie in 0..1, got 0..2"),
        (torch.ones(3, 2), torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0]), ValueError, "columns must be int64"),
    ],
)
def test_task_data_refuses(inputs, labels, columns, error, words):
    with pytest.raises(error, match=words) as caught:
        TaskData(inputs, labels, columns)
    assert "\n" not in str(caught.value)


def test_task_data_keeps_small_integer_labels_as_int64():
    assert TaskData(torch.ones(2, 2), torch.tensor([1, 0], dtype=torch.uint8)).labels.dtype == torch.int64


def test_to_keeps_what_is_there_and_shares_copies_between_permuted_tasks():
    first = some_data()
    second = first.with_columns(torch.tensor([1, 0]))
    assert first.to("cpu") is first
    moved, again = first.to("meta"), second.to("meta")
    assert moved.device.type == again.device.type == again.columns.device.type == "meta"
    assert moved.inputs is again.inputs and moved.columns is None
    assert moved.to("cpu").inputs is first.inputs
    assert first.device.type == "cpu"


def test_data_and_permutations_of_a_permuted_stream_are_moved_once():
    train, test = some_data(), some_data()
    stream = permuted_stream("p", 3, 0, train, test, 2)
    moved = [stream[0].train.to("meta")]  # before there is another task
    moved += [stream[index].train.to("meta") for index in (1, 2)]
    assert len({id(data.inputs) for data in moved}) == 1
    for task, data in zip(stream, moved, strict=True):
        assert task.train.to("meta") is data and data.to("cpu") is task.train


def test_to_does_not_hold_on_to_copies_of_data_that_nobody_shares():
    data = some_data()
    assert data.to("meta").inputs is not data.to("meta").inputs


PAIRS = [(torch.full((2,), float(i)), i % 2) for i in range(3)]


@pytest.mark.parametrize(
    "data",
    [
        TaskData(torch.stack([x for x, _ in PAIRS]), torch.tensor([0, 1, 0])),
        (torch.stack([x for x, _ in PAIRS]), torch.tensor([0, 1, 0])),
        [torch.stack([x for x, _ in PAIRS]), torch.tensor([0, 1, 0])],
        TensorDataset(torch.stack([x for x, _ in PAIRS]), torch.tensor([0, 1, 0])),
        MapStyle(PAIRS),
        MapStyle([(x.numpy(), torch.tensor(y)) for x, y in PAIRS]),
        PAIRS,
    ],
    ids=["TaskData", "tuple", "list", "TensorDataset", "map-style", "numpy items", "list of items"],
)
def test_as_task_data_accepts(data):
    x, y = as_task_data(data).batch(torch.tensor([2, 1]))
    assert x.tolist() == [[2.0, 2.0], [1.0, 1.0]] and y.tolist() == [0, 1]


def test_as_task_data_returns_task_data_as_it_is():
    data = some_data()
    assert as_task_data(data) is data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "got a int"),
        (None, "got a NoneType"),
        ("mnist", "got a str"),
        ({"x": 1}, "got a dict"),
        (torch.ones(2, 3), "got a Tensor"),
        ((torch.ones(2, 3), [0, 1]), "got a tuple of Tensor, list"),
        ((torch.ones(2, 3),) * 3, "got a tuple of Tensor, Tensor, Tensor"),
        (TensorDataset(torch.ones(2, 3)), r"got a TensorDataset of 1 tensor\(s\)"),
        (iter(PAIRS), "got a list_iterator"),
        (MapStyle([3, 4]), "item 0 of a MapStyle is no pair"),
        (MapStyle([PAIRS[0], (object(), 1)]), "item 1 of a MapStyle is no pair"),
    ],
)
def test_as_task_data_says_what_it_got_and_what_it_accepts(data, words):
    with pytest.raises(TypeError, match=words) as caught:
        as_task_data(data)
    assert "accepted are a TaskData, a pair of tensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("items", "error", "words"),
    [
        ([], ValueError, "holds no examples"),
        ([(torch.ones(2), 0), (torch.ones(3), 1)], ValueError, "cannot be stacked"),
        ([(torch.ones(2), 0.5)], TypeError, "labels must be integers"),
    ],
)
def test_as_task_data_refuses_datasets(items, error, words):
    with pytest.raises(error, match=words):
        as_task_data(MapStyle(items))


def test_as_task_data_lets_a_dataset_s_own_errors_through():
    class Broken(MapStyle):
        def __getitem__(self, index):
            raise FileNotFoundError("image 0")

    with pytest.raises(FileNotFoundError, match="image 0"):
        as_task_data(Broken(PAIRS))


def test_stream_makes_each_task_once_and_only_when_asked():
    made = []
    stream = some_stream(4, made)
    assert len(stream) == 4 and made == []
    assert stream[-1] is stream[3] and made == [3]
    assert [task.index for task in stream] == [0, 1, 2, 3] == sorted(made)
    assert stream[:2][0] is stream[0] and len(made) == 4


@given(st.integers(1, 12), st.slices(12), st.slices(12))
def test_stream_slices_like_a_list_and_tasks_keep_their_index(num_tasks, first, second):
    stream, indices = some_stream(num_tasks), list(range(num_tasks))
    part = stream[first][second]
    assert isinstance(part, Stream) and len(part) == len(indices[first][second])
    assert [task.index for task in part] == indices[first][second]


@pytest.mark.parametrize("position", [10, -11, 12])
def test_stream_index_out_of_range(position):
    message = f"^task index {position} out of range: the stream 'some-stream' has 10 tasks$"
    with pytest.raises(IndexError, match=message):
        some_stream()[position]


def test_stream_refuses_other_indices_and_sizes():
    with pytest.raises(TypeError):
        some_stream()["2"]
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        some_stream(0)


def test_stream_does_not_swallow_an_index_error_of_its_own_making():
    def make_task(index):
        raise IndexError("inside")

    with pytest.raises(IndexError, match="inside"):
        list(Stream("broken", 2, make_task))


@given(st.integers(1, 200), st.integers(-(2**40), 2**40), st.integers(1, 10_000))
def test_pixel_permutation_is_a_permutation_that_repeats(size, seed, index):
    permutation = pixel_permutation(size, seed, index)
    assert torch.equal(permutation.sort().values, torch.arange(size))
    assert torch.equal(permutation, pixel_permutation(size, seed, index))


def test_pixel_permutations_of_neighbouring_seeds_and_tasks_have_nothing_in_common():
    permutations = torch.stack([pixel_permutation(1024, seed, index) for seed in range(5) for index in range(1, 21)])
    agreements = (permutations[:, None] == permutations).sum(2).float()
    agreements = agreements[~torch.eye(100, dtype=torch.bool)]
    assert agreements.max() < 12  # a random pair agrees in one pixel on average
    assert 0.9 < agreements.mean() < 1.1


def test_pixel_permutation_stays_the_same_in_coming_versions():
    assert pixel_permutation(1024, 42, 1)[:5].tolist() == [603, 743, 491, 778, 772]


def test_permuted_stream_does_not_depend_on_the_number_of_tasks_and_copies_nothing():
    train, test = some_data(8), some_data(5)
    short, long = (permuted_stream("p", n, 3, train, test, 3) for n in (3, 30))
    assert torch.equal(short[2].train.columns, long[2].train.columns)
    assert not torch.equal(short[2].train.columns, short[1].train.columns)
    assert short[0].train.columns is None
    assert all(task.train.inputs is train.inputs and task.test.inputs is test.inputs for task in long)
    assert long[4].test.columns is long[4].train.columns
    assert (long[4].index, long[4].num_classes, long[4].name) == (4, 3, "p/4")


def test_permuted_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    stream = permuted_digits(3)
    (x, y), (permuted, _) = (task.train.batch(torch.arange(1437)) for task in stream[:2])
    assert x.shape == (1437, 64) and len(stream[0].test) == 360
    assert torch.equal(x * 16, (x * 16).round()) and x.min() == 0 and x.max() == 1
    assert torch.equal(permuted, x[:, pixel_permutation(64, 42, 1)])
    for labels in (y, stream[0].test.labels):
        share = labels.bincount(minlength=10) / len(labels)
        assert share.min() > 0.06 and share.max() < 0.14


def test_permuted_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"^scikit-learn is not installed: pip install 'fasthyper\[digits\]'$"):
        permuted_digits()


def write_idx(path, values, *, shape=None, magic=None):
    shape = values.shape if shape is None else shape
    header = struct.pack(f">4B{len(shape)}I", *(magic or (0, 0, 8, len(shape))), *shape)
    path.write_bytes(gzip.compress(header + bytes(values.byte().flatten().tolist()), mtime=0))


def use_as_mnist(folder, monkeypatch):
    """Makes the files in ``folder`` the right ones."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.gz")}
    monkeypatch.setitem(fetch.DATASETS, "mnist", fetch.Dataset(files, {}))


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for prefix, n in (("train", 30), ("t10k", 20)):
        images = torch.randint(0, 256, (n, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", torch.arange(n) % 10)
    use_as_mnist(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("padding", [0, 2, 3])
def test_permuted_mnist_pads_and_permutes(tiny_mnist, padding):
    size = 28 + 2 * padding
    stream = permuted_mnist(3, seed=5, padding=padding, data_dir=tiny_mnist)
    images = read_idx(tiny_mnist / "train-images-idx3-ubyte.gz")
    rows = torch.arange(30)
    x, y = stream[0].train.batch(rows)
    assert x.shape == (30, size**2) and y.tolist() == [i % 10 for i in range(30)]
    x = x.reshape(30, size, size)
    inner = slice(padding, padding + 28)
    assert torch.equal((x[:, inner, inner] * 255).round().byte(), images)
    assert torch.isclose(x.double().sum() * 255, images.sum().double())  # the border is zero
    permuted, _ = stream[2].train.batch(rows)
    assert torch.equal(permuted, x.flatten(1)[:, pixel_permutation(size**2, 5, 2)])
    assert len(stream[2].test) == 20 and stream[2].num_classes == 10
    assert stream[2].train.inputs is stream[0].train.inputs and stream[0].train.inputs.dtype == torch.uint8


def test_permuted_mnist_refuses_negative_padding(tiny_mnist):
    with pytest.raises(ValueError, match="padding must not be negative, got -1"):
        permuted_mnist(padding=-1, data_dir=tiny_mnist)


def test_split_mnist_relabels_two_digits_per_task(tiny_mnist):
    stream = split_mnist(data_dir=str(tiny_mnist))
    images = read_idx(tiny_mnist / "train-images-idx3-ubyte.gz").flatten(1)
    assert [task.name for task in stream] == [f"split-mnist/{2 * t}-{2 * t + 1}" for t in range(5)]
    for task in stream:
        assert task.num_classes == 2 and len(task.test) == 4
        assert task.train.labels.tolist() == [0, 1] * 3
        assert torch.equal(task.train.inputs, images[[i for i in range(30) if i % 10 // 2 == task.index]])


@pytest.mark.parametrize("num_tasks", [0, 6])
def test_split_mnist_has_one_to_five_tasks(num_tasks):
    with pytest.raises(ValueError, match=f"split MNIST has 1 to 5 tasks, got num_tasks={num_tasks}"):
        split_mnist(num_tasks)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b"<html>not found</html>"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(gzip.compress(b"\0\0")),
        lambda path: path.write_bytes(gzip.compress(b"\0\0\x08\x03\0\0\0\x01")),
        lambda path: write_idx(path, torch.zeros(9), shape=(10,)),
        lambda path: write_idx(path, torch.zeros(11), shape=(10,)),
        lambda path: write_idx(path, torch.zeros(0), shape=(0,)),
        lambda path: write_idx(path, torch.zeros(10), magic=(0, 0, 13, 1)),
        lambda path: write_idx(path, torch.zeros(10), magic=(0, 1, 8, 1)),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "html", "empty", "headerless", "half-a-header", "short", "long", "void", "floats", "magic", "gone"],
)
def test_read_idx_names_a_damaged_file(tmp_path, damage):
    path = tmp_path / "labels.gz"
    write_idx(path, torch.arange(10))
    assert read_idx(path).tolist() == list(range(10))
    damage(path)
    with pytest.raises(DataError, match=r"cannot read .*labels\.gz .*: delete it and fetch it again") as caught:
        read_idx(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [torch.arange(29) % 10, torch.full((30,), 10)], ids=["fewer", "ten"])
def test_mnist_refuses_labels_that_do_not_fit_the_images(tiny_mnist, monkeypatch, labels):
    write_idx(tiny_mnist / "train-labels-idx1-ubyte.gz", labels)
    use_as_mnist(tiny_mnist, monkeypatch)
    with pytest.raises(DataError, match=r"train images .* are not MNIST"):
        permuted_mnist(data_dir=tiny_mnist)


def test_mnist_names_a_file_that_was_damaged_on_disk(tiny_mnist):
    path = tiny_mnist / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is not the right file"):
        permuted_mnist(data_dir=tiny_mnist)


@pytest.mark.skipif(
    not all((fetch.data_home() / "mnist" / file).is_file() for file in fetch.DATASETS["mnist"].files),
    reason="MNIST was not fetched on this machine",
)
def test_real_mnist_has_the_known_mean_and_spread():
    train = permuted_mnist(1, padding=0)[0].train
    x, _ = train.batch(torch.arange(60_000))
    assert x.shape == (60_000, 784)
    assert x.double().mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert x.double().std().item() == pytest.approx(0.3081, abs=5e-5)
