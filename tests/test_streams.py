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
from fasthyper.streams.stream import SCENARIOS, permuted_stream, pixel_permutation, task_classes


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
        (torch.ones(3, 2), torch.ones(3, dtype=torch.bool), None, TypeError, "labels must be integers or, as targets"),
        (torch.ones(3, 2), torch.ones(3, 1, 1), None, ValueError, r"or targets \[n, O\], got"),
        (torch.ones(3, 2), torch.ones(3, 0), None, ValueError, r"labels \[3, 0\] hold no examples"),
        (torch.ones(3, 2, dtype=torch.int64), torch.ones(3, dtype=torch.int64), None, TypeError, "inputs must be uint8"),
        (torch.ones(3, 2), torch.ones(4, dtype=torch.int64), None, ValueError, r"got \[3, 2\] and \[4\]"),
        (torch.ones(3), torch.ones(3, dtype=torch.int64), None, ValueError, r"inputs must be \[n, ...\]"),
        (torch.ones(3, 2), torch.ones(3, 1, dtype=torch.int64), None, ValueError, r"labels \[n\], or targets"),
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
        ([(torch.ones(2), True)], TypeError, "labels must be integers"),
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


def use_as_mnist(folder, monkeypatch, base="mnist"):
    """Makes the files in ``folder`` the right ones."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.gz")}
    monkeypatch.setitem(fetch.DATASETS, base, fetch.Dataset(files, {}))


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


@given(
    num_classes=st.integers(1, 12),
    index=st.integers(0, 2000),
    seed=st.integers(0, 2**40),
    permute=st.booleans(),
    scenario=st.sampled_from(SCENARIOS),
)
def test_classes_of_a_task_are_a_bijection_onto_its_range(num_classes, index, seed, permute, scenario):
    classes = task_classes(num_classes, index, seed, permute, scenario)
    first, plain = index * num_classes if scenario == "class" else 0, torch.arange(num_classes)
    found = plain if classes is None else classes
    assert torch.equal(found.sort().values, plain + first)
    if not permute or index == 0:
        assert torch.equal(found, plain + first)
    again = task_classes(num_classes, index, seed, permute, scenario)
    assert again is None if classes is None else torch.equal(again, classes)


def test_label_permutations_are_even_and_stay_the_same_in_coming_versions():
    drawn = torch.stack([task_classes(3, index, 7, True, "task") for index in range(1, 601)])
    counts = (drawn @ torch.tensor([9, 3, 1])).unique(return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 70 and counts.max() < 130  # 100 on average, 9 either way
    assert task_classes(10, 3, 42, True, "class").tolist() == [38, 36, 37, 34, 39, 31, 35, 32, 30, 33]


@given(
    scenario=st.sampled_from(SCENARIOS),
    permute=st.booleans(),
    seed=st.integers(0, 1000),
    index=st.integers(0, 1999),
    explicit=st.booleans(),
)
def test_permuted_stream_scenarios_differ_in_labels_only(scenario, permute, seed, index, explicit):
    train, test = some_data(9), some_data(4)
    asked = []

    class Orders(list):
        def __getitem__(self, position):
            asked.append(position)
            return pixel_permutation(6, seed + 1, position)

    orders = Orders(range(2000)) if explicit else None
    stream = permuted_stream("p", 2000, seed, train, test, 3, permutations=orders, permute_labels=permute, scenario=scenario)
    assert asked == []
    task, plain = stream[index], permuted_stream("p", 2000, seed, train, test, 3)[index]
    assert asked == ([index] if explicit else [])
    order = orders[index] if explicit else torch.arange(6) if index == 0 else pixel_permutation(6, seed, index)
    expected = task_classes(3, index, seed, permute, scenario)
    first = 3 * index if scenario == "class" else 0
    for mine, bare, base in ((task.train, plain.train, train), (task.test, plain.test, test)):
        rows = torch.arange(len(base))
        (x, y), (x_bare, y_bare) = mine.batch(rows), bare.batch(rows)
        assert torch.equal(x.flatten(1) * 255, base.inputs.flatten(1)[:, order].float())
        assert explicit or torch.equal(x, x_bare)
        assert torch.equal(y, y_bare if expected is None else expected[y_bare]) and torch.equal(y, mine.labels)
        assert y.dtype == torch.int64 and first <= y.min() and y.max() < first + 3 <= task.num_classes
        assert mine.inputs is base.inputs and mine._numbers is base._numbers  # a task of its own holds orders only
        moved = mine.to("meta")
        assert moved.labels.shape == y.shape and (moved.classes is None) == (mine.classes is None)
    assert task.num_classes == first + 3


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ([torch.arange(6)], "must hold one for each of the 2 tasks, got 1"),
        (
            [torch.arange(6), torch.arange(5)],
            r"permutations\[1\] must be int64 \[6\], each of 0..5 once, got torch.int64 \[5\]",
        ),
        ([torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 4])], r"permutations\[1\] must be .* each of 0..5 once"),
        ([torch.arange(6), torch.arange(6).float()], r"permutations\[1\] must be int64 .*, got torch.float32 \[6\]"),
    ],
)
def test_permuted_stream_refuses_what_is_no_permutation(orders, words):
    with pytest.raises(ValueError, match=words) as caught:
        list(permuted_stream("p", 2, 0, some_data(), some_data(), 3, permutations=orders))
    assert "\n" not in str(caught.value)


def test_classes_of_task_data_are_checked():
    data = some_data()
    with pytest.raises(
        ValueError, match=r"classes must be int64 \[K\], .* above the largest label 2, got torch.int64 \[2\]"
    ):
        data.with_columns(None, torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="a regression have no classes"):
        TaskData(torch.ones(2, 1), torch.ones(2), classes=torch.tensor([0]))
    assert TaskData(data.inputs, data.labels, classes=torch.tensor([7, 5, 9])).labels.tolist() == [7, 5, 9] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3)], ids=str)
def test_floating_point_labels_are_targets(shape, dtype):
    targets = torch.linspace(-1, 2, torch.Size(shape).numel()).to(dtype).reshape(shape)
    data = TaskData(some_data().inputs, targets)
    x, y = data.batch(torch.tensor([4, 0]))
    assert data.is_regression and not some_data().is_regression and x.shape == (2, 2, 3)
    assert y.dtype == torch.float32 and torch.equal(y, targets[[4, 0]].float().reshape(2, -1))
    assert torch.equal(data.labels, targets.float().reshape(6, -1)) and data.to("meta").labels.shape == data.labels.shape
    assert torch.equal(as_task_data([(torch.ones(2), t) for t in targets]).labels, data.labels)


@pytest.mark.parametrize("base", ["mnist", "fashion", "kmnist"])
@pytest.mark.parametrize("pool", [1, 2, 7])
def test_bases_and_pooling(tiny_mnist, monkeypatch, base, pool):
    use_as_mnist(tiny_mnist, monkeypatch, base)
    images = read_idx(tiny_mnist / "train-images-idx3-ubyte.gz").double()
    means = torch.nn.functional.avg_pool2d(images[:, None], pool).add(0.5).floor().flatten(1)
    side, rows = 28 // pool, torch.arange(30)
    permuted = permuted_mnist(1000, base=base, pool=pool, padding=0, data_dir=tiny_mnist)
    assert torch.equal(permuted[0].train.inputs.double(), means) and permuted[0].train.inputs.dtype == torch.uint8
    x, _ = permuted[999].train.batch(rows)
    assert torch.equal((x * 255).round().double(), means[:, pixel_permutation(side**2, 42, 999)])
    assert permuted[999].name == f"permuted-{base}/999" and permuted[0].train.shape[1] == side**2
    default = permuted_mnist(1, base=base, pool=pool, data_dir=tiny_mnist)[0].train.shape[1]
    assert default == (1024 if pool == 1 else side**2)
    split = split_mnist(base=base, pool=pool, data_dir=tiny_mnist)
    assert split[4].name == f"split-{base}/8-9"
    assert torch.equal(split[4].train.inputs.double(), means[torch.arange(30) % 10 >= 8])


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_split_mnist_labels_by_scenario(tiny_mnist, scenario, permute):
    plain = split_mnist(data_dir=tiny_mnist)
    stream = split_mnist(seed=3, scenario=scenario, permute_labels=permute, data_dir=tiny_mnist)
    swapped = 0
    for task, bare in zip(stream, plain, strict=True):
        first = 2 * task.index if scenario == "class" else 0
        for mine, theirs in ((task.train, bare.train), (task.test, bare.test)):
            assert torch.equal(mine.inputs, theirs.inputs)
            flip = int(mine.labels[0] - first != theirs.labels[0])
            assert torch.equal(mine.labels, first + (theirs.labels ^ flip))
        swapped += flip
        assert task.num_classes == first + 2 and (task.index > 0 or not flip)
    assert (0 < swapped < 5) == permute


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base": "emnist"}, "unknown base 'emnist'; choose from mnist, fashion, kmnist"),
        ({"pool": 3}, "pool must be 1, 2, 4, 7, 14 or 28, got 3"),
        ({"pool": 0}, "pool must be 1, 2, 4, 7, 14 or 28, got 0"),
        ({"scenario": "cl3"}, "unknown scenario 'cl3'; choose from task, domain, class"),
    ],
)
@pytest.mark.parametrize("make", [permuted_mnist, split_mnist])
def test_mnist_streams_refuse(tiny_mnist, make, options, words):
    with pytest.raises(ValueError, match=words):
        make(2, data_dir=tiny_mnist, **options)


@pytest.mark.parametrize(("base", "name"), [("fashion", "Fashion-MNIST"), ("kmnist", "KMNIST")])
def test_other_bases_are_checked_and_named(tmp_path, tiny_mnist, monkeypatch, base, name):
    monkeypatch.setitem(fetch.DATASETS, base, fetch.DATASETS[base]._replace(sources={}))
    with pytest.raises(
        DataError, match=rf"{base} cannot be fetched .*put the files train-images.* into {tmp_path / 'none'}"
    ):
        permuted_mnist(base=base, data_dir=tmp_path / "none")
    write_idx(tiny_mnist / "train-labels-idx1-ubyte.gz", torch.full((30,), 10))
    use_as_mnist(tiny_mnist, monkeypatch, base)
    with pytest.raises(DataError, match=rf"train images .* are not {name}$"):
        split_mnist(base=base, data_dir=tiny_mnist)


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


def test_read_idx_takes_no_more_than_its_header_says(tmp_path, monkeypatch):
    path = tmp_path / "labels.gz"
    write_idx(path, torch.arange(10))
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(1 << 20)) * 2000)  # 2 GB in 2 MB
    with pytest.raises(DataError, match="its values are not as many as its header says, 10"):
        read_idx(path)
    write_idx(path, torch.arange(10), shape=(1 << 16, 1 << 16))
    with pytest.raises(DataError, match="65536 x 65536 values are too many"):
        read_idx(path)


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


@pytest.mark.parametrize(("base", "mean", "spread"), [("mnist", 0.1307, 0.3081), ("fashion", 0.2860, 0.3530)])
def test_real_images_have_the_known_mean_and_spread(base, mean, spread):
    if fetch.missing(base):
        pytest.skip(f"{base} was not fetched on this machine")
    train = permuted_mnist(1, base=base, padding=0)[0].train
    x, _ = train.batch(torch.arange(60_000))
    assert x.shape == (60_000, 784)
    assert x.double().mean().item() == pytest.approx(mean, abs=1e-4)
    assert x.double().std().item() == pytest.approx(spread, abs=1e-4)
