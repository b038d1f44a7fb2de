"""F-CelebA from a generated split in the layout of the published one, whole and damaged."""

import hashlib
import io
import json
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cifar import mutated

import fasthyper as fh
from fasthyper import vision
from fasthyper.errors import DataError, MissingPackageError
from fasthyper.streams import Stream, Task, TaskData, celeba, constant_baseline, f_celeba, fetch
from fasthyper.streams.fetch import CELEBA_IMAGES, CELEBA_TEST, CELEBA_TRAIN

USERS = sorted(map(str, range(93)))
LARGER = set(USERS[30:])  # 63 of the 93 users have one image more to train on


def generated():
    """The two files: 93 users with 96 or 97 images to train on and 11 to test on, about half of them smiling."""
    number, files = 0, []
    for count in (lambda user: 96 + (user in LARGER), lambda user: 11):
        users, data = [str(user) for user in range(93)], {}
        for user in users:
            names = [f"{number + i + 1:06}.jpg" for i in range(count(user))]
            number += len(names)
            data[user] = {"x": names, "y": [float((int(name[:6]) * 7) % 16 < 7) for name in names]}
        files.append({"users": users, "num_samples": [len(data[user]["y"]) for user in users], "user_data": data})
    return files


@pytest.fixture(scope="module")
def split():
    return generated()


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Writes split files into a folder, as the right ones, with links to some images for each name of the first 20 users."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    folder = tmp_path / "celeba"

    def write(train, test, *, link=True):
        for path, data in ((CELEBA_TRAIN, train), (CELEBA_TEST, test)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(json.dumps(data))
        sha256 = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in (CELEBA_TRAIN, CELEBA_TEST)}
        files = {**sha256, CELEBA_IMAGES: ""}
        monkeypatch.setitem(fetch.DATASETS, "f-celeba", fetch.DATASETS["f-celeba"]._replace(files=files))
        images = folder / CELEBA_IMAGES
        images.mkdir(parents=True, exist_ok=True)
        if not link:
            return folder
        for kind in range(5):
            pixels = torch.randint(0, 256, (7, 6, 3), generator=torch.Generator().manual_seed(kind), dtype=torch.uint8)
            small = image.frombytes("RGB", (6, 7), bytes(pixels.flatten().tolist()))
            small.resize((178, 218)).save(tmp_path / f"{kind}.jpg", "JPEG")
        for data in (train, test):
            for user in USERS[:20]:
                for name in data["user_data"][user]["x"]:
                    os.link(tmp_path / f"{int(name[:6]) % 5}.jpg", images / name)
        return folder

    return write


def test_f_celeba_has_the_published_counts(use, split):
    stream = f_celeba(data_dir=use(*split))
    assert [task.name for task in stream] == [f"f-celeba/{user}" for user in USERS[:10]] and USERS[:3] == ["0", "1", "10"]
    for task in stream:
        assert (len(task.train), len(task.validation), len(task.test), task.num_classes) == (87, 9, 11, 2)
        train, test = (data["user_data"][USERS[task.index]]["y"] for data in split)
        assert sorted([*task.train.labels.tolist(), *task.validation.labels.tolist()]) == sorted(train)
        assert task.test.labels.tolist() == test


def test_twenty_tasks(use, split):
    stream = f_celeba(20, data_dir=use(*split))
    assert [task.name for task in stream[10:13]] == ["f-celeba/18", "f-celeba/19", "f-celeba/2"]
    assert stream[-1].name == "f-celeba/26" and len(stream[-1].train) == 87


@pytest.mark.parametrize("seed", [0, 3])
def test_validation_images_are_those_that_scikit_learn_s_shuffle_chooses(use, split, seed):
    sklearn = pytest.importorskip("sklearn.utils", reason="scikit-learn is not installed")
    task = f_celeba(seed=seed, data_dir=use(*split))[4]
    order = sklearn.shuffle(list(range(96)), random_state=seed)
    assert celeba.shuffle(96, seed).tolist() == order
    pixels = task.train.inputs.float().flatten(1)
    for data, rows in ((task.validation, order[:9]), (task.train, order[9:])):
        labels = split[0]["user_data"][USERS[4]]["y"]
        assert data.labels.tolist() == [labels[row] for row in rows]
        assert torch.equal(data._rows, torch.tensor(rows)) and len(pixels) == 96
        assert data.inputs is task.train.inputs


def test_shuffle_stays_that_of_scikit_learn():
    assert celeba.shuffle(10, 0).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]  # shuffle(range(10), random_state=0)


def test_images_are_resized_and_normalised_as_torchvision_does(use, split):
    image = pytest.importorskip("PIL.Image")
    try:
        transforms = vision.torchvision().transforms
    except ImportError:
        pytest.skip("torchvision is not installed")
    folder = use(*split)
    task = f_celeba(data_dir=folder)[0]
    steps = transforms.Resize(size=(32, 32)), transforms.ToTensor()
    numbers = ([x / 255 for x in values] for values in ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]))
    published = transforms.Compose([*steps, transforms.Normalize(*numbers)])
    x, _ = task.test.batch(torch.arange(11))
    for name, found in zip(split[1]["user_data"]["0"]["x"], x, strict=True):
        with image.open(folder / CELEBA_IMAGES / name) as picture:
            torch.testing.assert_close(found, published(picture), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", range(5))
def test_published_orders(use, split, order):
    stream = f_celeba(order=order, data_dir=use(*split))
    assert sorted(celeba.ORDERS[order]) == list(range(10))
    assert [task.name for task in stream[:2]] == [f"f-celeba/{USERS[k]}" for k in celeba.ORDERS[order][:2]]


def test_f_celeba_refuses():
    with pytest.raises(ValueError, match="F-CelebA has 1 to 93 tasks, got num_tasks=94"):
        f_celeba(94)
    for num_tasks, order in ((10, 5), (20, 0)):
        with pytest.raises(
            ValueError, match=rf"order must be None, or for ten tasks 0\.\.4, got {order} for {num_tasks} tasks"
        ):
            f_celeba(num_tasks, order=order)


def test_missing_files_are_named_with_where_they_belong(tmp_path, use, split):
    with pytest.raises(DataError) as caught:
        f_celeba(data_dir=tmp_path / "empty")
    message = str(caught.value)
    assert "f-celeba cannot be fetched" in message and "\n" not in message and "non-commercial" in message
    assert f"put the files {CELEBA_TRAIN}, {CELEBA_TEST}, {CELEBA_IMAGES} into {tmp_path / 'empty'}" in message
    folder = use(*split)
    absent = split[0]["user_data"]["0"]["x"][5]
    (folder / CELEBA_IMAGES / absent).unlink()
    with pytest.raises(
        DataError, match=rf"1 of 1070 images are not in .*img_align_celeba, such as {absent}: put them there"
    ):
        f_celeba(data_dir=folder)


def test_another_version_of_the_split_is_refused(use, split):
    folder = use(*split, link=False)
    (folder / CELEBA_TEST).write_text(json.dumps(split[1], indent=1))
    with pytest.raises(DataError, match=r"test_9\.json is not the right file \(SHA-256 .*\): replace it"):
        f_celeba(data_dir=folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data["users"].pop(), "92 users"),
        (lambda data: data["user_data"]["7"]["y"].append(0.0), "98 labels"),
        (lambda data: data["user_data"]["7"]["y"].__setitem__(3, 2.0), "each of which should be 0 or 1"),
        (lambda data: data["user_data"]["7"]["x"].__setitem__(3, "../../etc/passwd"), "no file name such as 000001.jpg"),
        (lambda data: data["num_samples"].__setitem__(0, 5), "93 users with 8991 images"),
        (lambda data: data.pop("users"), "KeyError 'users'"),
    ],
    ids=["user", "labels", "label", "path", "count", "key"],
)
def test_damaged_splits_are_named(use, damage, words):
    train, test = generated()
    damage(train)
    with pytest.raises(DataError, match=r"cannot read .*train_9\.json") as caught:
        f_celeba(data_dir=use(train, test, link=False))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_in_two_tasks_is_refused(use):
    train, test = generated()
    train["user_data"]["1"]["x"][0] = test["user_data"]["0"]["x"][0]
    with pytest.raises(DataError, match="holds another split: .* images more than once"):
        f_celeba(data_dir=use(train, test, link=False))


def test_damaged_images_are_named(use, split):
    image = pytest.importorskip("PIL.Image")
    folder = use(*split)
    path = folder / CELEBA_IMAGES / split[0]["user_data"]["0"]["x"][1]
    good, small, other = path.read_bytes(), io.BytesIO(), io.BytesIO()
    image.new("RGB", (10, 12)).save(small, "JPEG")
    image.new("RGB", (178, 218)).save(other, "PNG")
    for content, words in (
        (good[:200], "cannot"),
        (b"", "cannot"),
        (small.getvalue(), "10x12 pixels, CelebA's aligned images have 178x218"),
        (other.getvalue(), "cannot identify image file"),  # decoders of other formats are not tried
    ):
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"cannot read .*{path.name} \(") as caught:
            f_celeba(data_dir=folder)[0]
        assert words in str(caught.value)


def test_without_pillow(use, split, monkeypatch):
    stream = f_celeba(data_dir=use(*split))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingPackageError, match=r"^Pillow is not installed: pip install 'fasthyper\[vision\]'$"):
        stream[0]


@given(st.data())
def test_mutated_splits_are_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(mutated(data.draw, json.dumps(generated()[1]).encode()))
    try:
        users = celeba.read_split(path, celeba.TEST)
    except DataError as error:
        assert str(path) in str(error)
        return
    assert len(users) == 93 and sum(len(labels) for _, labels in users.values()) == celeba.TEST


@given(st.data())
def test_mutated_images_are_refused_or_read(tmp_path_factory, data):
    image, stored = pytest.importorskip("PIL.Image", reason="Pillow is not installed"), io.BytesIO()
    image.linear_gradient("L").convert("RGB").resize((178, 218)).save(stored, "JPEG")
    folder = tmp_path_factory.getbasetemp()
    (folder / "000001.jpg").write_bytes(mutated(data.draw, stored.getvalue()))
    try:
        pixels = celeba._decoded(folder, ["000001.jpg"])
    except DataError as error:
        assert "000001.jpg" in str(error)
        return
    assert pixels.shape == (1, 3, 32, 32)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "y", "users", "0"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.fixed_dictionaries({"users": JSON, "num_samples": JSON, "user_data": JSON}) | JSON)
def test_any_json_is_refused(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="it is not the published split"):
        celeba.read_split(path, celeba.TEST)


def test_the_constant_baseline_and_its_interval():
    """The counts of the published split: 440 of 960 training and 43 of 110 test images smile."""
    smiles = [49, 38, 45, 42, 46, 47, 45, 41, 41, 46], [6, 2, 7, 2, 5, 5, 3, 2, 8, 3]

    def task(index):
        of = [(torch.arange(n) < part[index]).long() for n, part in zip((96, 11), smiles, strict=True)]
        return Task(index, *(TaskData(torch.zeros(len(y), 1), y) for y in of), 2)

    correct, total = constant_baseline(Stream("counts", 10, task))
    assert (correct, total) == (67, 110) and round(correct / total, 4) == 0.6091
    low, high = fh.metrics.accuracy_interval(correct, total)
    assert low < 0.6036 < high  # the published hypernetwork's
