"""Mutated files through every reader of files: each is read, or refused by one of the project's errors in one line.

``python tests/fuzz_files.py --count 100000 --seed 0 --out bench/results/fuzz_files.json`` tries so many inputs, equally many
of each reader, and exits with status 1 if any of them

- raised anything else, or an error of more than a line;
- took more than ``SECONDS`` of the CPU, or more than ``BYTES`` of address space;
- ran code or started a process, or wrote, moved or removed anything outside the scratch folder (an audit hook sees it).

Input i of a reader depends on the seed, the reader and i alone: ``--readers NAME --first i --count 1`` tries it again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fasthyper as fh
from fasthyper import checkpoint, cli, recipes
from fasthyper.environment import environment
from fasthyper.loggers import CSVLogger
from fasthyper.report.figures import read_samples
from fasthyper.report.runs import load_run
from fasthyper.streams import celeba, cifar, fetch, mnist

SECONDS, BYTES, LINE = 10, 1 << 28, 1000
NUMBERS = (0, 1, 2, 127, 255, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
BOMB, DIGITS = "@bomb@", "@digits@"  # in JSON they become very many brackets, and very many digits
VALUES = (
    *(None, True, False, -1, 0, 1, 3, 7, 1 << 20, 1 << 31, 1 << 40, 1 << 63, -(1 << 63), 10**30, DIGITS, 0.5, -2.5, 1e308),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "none",
        "x" * 9999,
        "../../x",
        "a\nb",
        "\ud800",
        "\0",
        BOMB,
        BOMB,
        [],
        {},
        [[]],
    ),
    *(
        [0] * 5000,
        [1 << 40] * 3,
        ["*"] * 50,
        "*" * 300,
        "*a" * 50,
        {"out": "/nowhere/x"},
        "cuda",
        "float64",
        [None],
        [-1, 1.5],
    ),
)


class Reader(NamedTuple):
    """``seeds``: whole files; ``mutate``: a change of one; ``file``: where it lies; ``read``: gets its path."""

    seeds: list[bytes]
    mutate: Callable[[random.Random, bytes], bytes]
    file: str
    read: Callable[[Path], object]


class Hang(BaseException):
    """So that no reader catches it."""


def in_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Bits flipped, parts cut out, copied or put in, numbers of 1 to 8 bytes set to extremes; one to a few times."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(len(changed), 600) if rng.random() < 0.5 and changed else len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            start = rng.randrange(len(raw) + 1)
            changed[at:at] = raw[start : start + rng.choice((1, 8, 60, 512, len(raw)))]
        elif kind == 3:
            del changed[at : at + rng.choice((1, 2, 8, 512))]
        elif kind == 4:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
            changed[at : at + size] = number.to_bytes(size, rng.choice(("big", "little")))
        else:
            changed[at : at + rng.choice((0, 4))] = rng.randbytes(rng.choice((1, 4, 64)))
    return bytes(changed)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of JSON."""
    found, left = [], [value]
    while left:
        inner = left.pop()
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        found += [(inner, key) for key in keys]
        left += [inner[key] for key in keys]
    return found


def in_tree(rng: random.Random, tree: Any) -> Any:
    """A value of a tree of JSON changed for another one, left out, renamed, doubled or wrapped; one to three times."""
    tree = [tree]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = places(tree)
        inner, key = rng.choice(spots)
        kind = rng.randrange(8)
        if kind == 0 and inner is not tree:
            del inner[key]
        elif kind == 1:
            other, at = rng.choice(spots)
            inner[key] = copy.deepcopy(other[at] if other is not tree else rng.choice(VALUES))
        elif kind == 2 and isinstance(inner, dict):
            inner[rng.choice(("surprise", "out", "device", "", key + "x"))] = inner.pop(key)
        elif kind == 3 and isinstance(inner, list) and inner is not tree:
            inner.extend([inner[key]] * rng.choice((1, 50)))
        elif kind == 4 and isinstance(inner[key], (int, float)):
            inner[key] = rng.choice((-1, 10, 1000, 1 << 20)) * inner[key] if abs(inner[key]) < 1e300 else 0
        elif kind == 5:
            inner[key] = [inner[key]]
        else:
            inner[key] = copy.deepcopy(rng.choice(VALUES))
    return tree[0]


def as_json(rng: random.Random, tree: Any) -> str:
    text = json.dumps(tree).replace(f'"{DIGITS}"', "9" * 5000, 1)
    return text.replace(f'"{BOMB}"', rng.choice(("[", '{"a":')) * rng.choice((200, 2000, 100_000)), 1)


def in_json(rng: random.Random, raw: bytes) -> bytes:
    """In the bytes, or in what they say."""
    return in_bytes(rng, raw) if rng.random() < 0.3 else as_json(rng, in_tree(rng, json.loads(raw))).encode()


TOML = (
    *(
        "1e999",
        "-1",
        "0",
        str(10**18),
        "9" * 5000,
        "nan",
        '"none"',
        '"x"',
        "true",
        "[]",
        "[1, 2.5]",
        "{a = 1}",
        "0x" + "f" * 400,
    ),
    *(
        "1979-05-27",
        "'''",
        '"""',
        "[" * 9000,
        "{a=" * 3000,
        '"\\u0000"',
        '"' + "x" * 9000 + '"',
        "[" + "1," * 5000 + "]",
        "\x00",
    ),
)


def in_toml(rng: random.Random, raw: bytes) -> bytes:
    """In the bytes, or lines changed, left out, doubled or put in."""
    if rng.random() < 0.3:
        return in_bytes(rng, raw)
    lines = raw.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        key = lines[at].partition("=")[0]
        lines[at : at + rng.randrange(2)] = [
            rng.choice(
                (
                    f"{key} = {rng.choice(TOML)}",
                    f"{rng.choice(list(recipes.read.__globals__['HINTS']))} = {rng.choice(TOML)}",
                    f"{key}{rng.choice('xyz_. ')} = 1",
                    f"[{key.strip()}]",
                    f"[[{key.strip()}]]",
                    ".".join("a" * rng.choice((3, 4000))) + " = 1",
                    lines[at],
                )
            )
        ]
    return "\n".join(lines).encode()


DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}


def in_safetensors(rng: random.Random, raw: bytes) -> bytes:
    """In the bytes, the header, or the state that the header carries, whose digest is then made anew."""
    if rng.random() < 0.3:
        return in_bytes(rng, raw)
    (size,) = struct.unpack_from("<Q", raw)
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    own = header.get("__metadata__", {})
    if "state" in own and rng.random() < 0.7:
        own["state"] = as_json(rng, in_tree(rng, json.loads(own["state"])))
        if rng.random() < 0.3:
            resize(rng, header, data)
    elif rng.random() < 0.5:
        data = resize(rng, header, data)
    else:
        header = in_tree(rng, header)
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict) and "sha256" in header["__metadata__"]:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            header["__metadata__"]["sha256"] = digest(header, data)
    text = as_json(rng, header).encode()
    length = len(text) if rng.random() < 0.95 else rng.choice((*NUMBERS, len(text) + 1))
    return struct.pack("<Q", length) + text + data


def resize(rng: random.Random, header: dict[str, Any], data: bytes) -> bytes:
    """A tensor of another shape or type, with or without the bytes for it, or one more, or one less."""
    names = [name for name in header if name != "__metadata__"]
    name, last = rng.choice(names), max(header[name]["data_offsets"][1] for name in names)
    kind = rng.randrange(5)
    if kind == 0:
        header[name]["dtype"] = rng.choice((*DTYPES, "BOOL", "F8_E4M3", "F4", "C64", "U16"))
    elif kind == 1:
        header[name]["shape"] = rng.choice(([], [0], [1, *header[name]["shape"]], [0, 1 << 62, 4], [1 << 40], [1] * 70))
    elif kind == 2:
        number = len([own for own in names if own.startswith("task_embeddings.") or ".task_embeddings." in own])
        header[f"{'hnet.' * rng.randrange(2)}task_embeddings.{rng.choice((number, 99, 'x'))}"] = {
            "dtype": "F32",
            "shape": [rng.choice((0, 1, 4))],
            "data_offsets": [last, last],
        }
    elif kind == 3:
        header[name + "x"] = header.pop(name)
    else:
        more = rng.choice((4, 4000))
        header[rng.choice(("optimizer.held.x.y", "net.x", "snapshot.99", "hnet.x"))] = {
            "dtype": "F32",
            "shape": [more // 4],
            "data_offsets": [last, last + more],
        }
        data += bytes(more)
    return data


def digest(header: dict[str, Any], data: bytes) -> str:
    """As ``checkpoint.write`` makes it."""
    found = hashlib.sha256(header["__metadata__"]["state"].encode())
    for name, tensor in sorted((name, tensor) for name, tensor in header.items() if name != "__metadata__"):
        start, stop = tensor["data_offsets"]
        found.update(f"{name} torch.{DTYPES.get(tensor['dtype'])} {tensor['shape']}".encode() + data[start:stop])
    return found.hexdigest()


def in_gzip(inner: Callable[[random.Random, bytes], bytes], rng: random.Random, raw: bytes) -> bytes:
    """In the compressed bytes, in what they hold, or very much more of it."""
    if rng.random() < 0.3:
        return in_bytes(rng, raw)
    held = gzip.decompress(raw)
    if rng.random() < 0.01:
        return raw + gzip.compress(bytes(1 << 20), mtime=0) * rng.choice((1, 1000))
    return gzip.compress(inner(rng, held), 1, mtime=0)


def in_idx(rng: random.Random, raw: bytes) -> bytes:
    """In the bytes, or in a size."""
    if rng.random() < 0.5:
        return in_bytes(rng, raw)
    return (
        raw[:3] + bytes([rng.choice((0, 1, 2, 3, 4, 255))]) + struct.pack(">I", rng.choice(NUMBERS) & 0xFFFFFFFF) + raw[8:]
    )


def in_tar(rng: random.Random, raw: bytes) -> bytes:
    """In the bytes, or headers of other kinds, sizes and names, with a right checksum."""
    if rng.random() < 0.3:
        return in_bytes(rng, raw)
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = 512 * rng.randrange(len(changed) // 512)
        header = bytearray(changed[at : at + 512])
        kind = rng.randrange(4)
        if kind == 0:
            huge = rng.choice((b"77777777777\0", b"00000000000\0", b"-0000001000\0", b"\xff" * 12, b"\x80" + b"\xff" * 11))
            header[124:136] = rng.choice((huge, b"\xff" * 10 + b"\xfe\0"))
        elif kind == 1:
            header[156:157] = rng.choice(
                (b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"\0", b"?")
            )
        elif kind == 2:
            header[0:20] = rng.choice(
                (b"../../../../etc/xyz\0", b"/etc/a.bin\0".ljust(20, b"\0"), b"a.bin".ljust(20, b"\0"), bytes(20))
            )
        else:
            header[345:500] = rng.randbytes(155)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        changed[at : at + 512] = header
        if rng.random() < 0.2:
            changed[at:at] = bytes(header) * rng.choice((1, 3, 1500))
    return bytes(changed)


def saved(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Checkpoint and results of a trainer in the middle of a task, of a replay model, and of both methods with one."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.rand(12, 6, generator=generator), torch.arange(12) % 2) for _ in range(2)]
    small = {"chunk_size": 20, "hidden": (3,), "task_dim": 2, "chunk_dim": 2}

    def hnet() -> fh.ChunkedHypernet:
        return fh.ChunkedHypernet(fh.nets.MLP(6, (4,), 4), 2, outputs_per_task=2, **small)

    def replay() -> fh.ReplayModel:
        vae = fh.nets.VAE(6, (3,), (3,), latent=2, conditions=2)
        return fh.ReplayModel(fh.ChunkedHypernet(vae, 1, generate="decoder.*", rest="trained", **small), progress=False)

    settings = recipes.settings(recipes.RECIPES["permuted-digits"])
    runs: dict[str, Any] = {
        "trainer": fh.Trainer(hnet(), progress=False, settings=settings),
        "replay model": replay(),
        "HNET+TIR": fh.HnetTIR(replay(), fh.nets.MLP(6, (3,), 2), fh.Trainer(hnet(), progress=False), progress=False),
        "HNET+R": fh.HnetR(replay(), fh.nets.MLP(6, (3,), 4), scenario="class", classes=2, progress=False),
    }
    for name, run in runs.items():
        run.fit(data[0], steps=2, batch_size=4)
        if name == "trainer":
            run.evaluate([data[0]])
            run._current = run._begin(1, "x")
            run.step(*data[1])
        run.save(folder / name)
        if name == "trainer":
            run.hnet.export(folder / "export.safetensors")
    return {
        name: tuple((folder / name / own).read_bytes() for own in (checkpoint.CHECKPOINT, checkpoint.RESULTS))
        for name in runs
    }


def tar_of(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def by_command(*arguments: object) -> None:
    """A command that exits with status 0 or, after one line, 1."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main([str(argument) for argument in arguments])
    if status:
        lines = said.getvalue().splitlines()
        raise fh.FasthyperError(lines[0] if len(lines) == 1 else said.getvalue())


def used(run: Any) -> None:
    """What is shown of a run that was loaded."""
    run.results.summary()
    if isinstance(run, fh.Trainer):
        _ = run.current_step, run.hnet.generate(0) if run.hnet.num_tasks else None


def readers(folder: Path) -> dict[str, Reader]:
    """By name; ``folder`` is theirs."""
    run = saved(folder / "seeds")
    (state, results), exported = run["trainer"], (folder / "seeds" / "export.safetensors").read_bytes()
    (folder / "run").mkdir()
    (folder / "run" / checkpoint.RESULTS).write_bytes(results)
    checkpoint.write(folder / "samples", {"samples": torch.zeros(2, 3, 4, dtype=torch.uint8)}, "fasthyper-samples-1")
    samples = (folder / "samples").read_bytes()
    leaf = {"users": [str(i) for i in range(93)], "num_samples": [1] * 93}
    leaf["user_data"] = {user: {"x": ["000001.jpg"], "y": [0.0]} for user in leaf["users"]}
    toml = 'recipe = "permuted-digits"\nnum_tasks = 2\nsteps = 3\nbeta = 0.5\n'
    toml += 'reg_tasks = "none"\nhidden = [3, 4]\nlookahead = true\n'
    idx = gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 5, 4, 4) + bytes(80), mtime=0)
    parts = {"folder/a.bin": bytes(700), "../../b.bin": b"b" * 20, "/etc/" + 40 * "long/" + "c.bin": b"c" * 600}
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.bin", "b.bin"):
            archive.writestr(f"data/{name}", bytes(700))
    deb = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("data.tar.xz", tar_of(parts, "w:xz"))):
        deb += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
        )
    table = (",".join(CSVLogger.COLUMNS) + "\nstep,0,1,1,0.5,,,,,\n").encode()
    names = ["a.bin", "b.bin", "c.bin"]

    def debian(path: Path) -> None:
        fetch.from_archive(io.BytesIO(fetch.ar_member(path.read_bytes(), "data.tar.xz")), names, path)

    def of_run(path: Path) -> None:
        checkpoint.claim(path.parent, "run")
        load_run(path.parent).results.summary()

    def records(num_classes: int) -> Callable[[Path], object]:
        return lambda path: cifar.read_records(path.read_bytes(), num_classes, str(path))

    def log(path: Path) -> None:
        try:
            CSVLogger(path).close()
        except ValueError as error:
            raise fh.FasthyperError(str(error)) from error

    def load(cls: Any) -> Callable[[Path], object]:
        return lambda path: used(cls.load(path.parent, progress=False))

    def archive_of(path: Path) -> object:
        return fetch.from_archive(path, names)

    classes = {"trainer": fh.Trainer, "replay model": fh.ReplayModel, "HNET+TIR": fh.HnetTIR, "HNET+R": fh.HnetR}
    saves, results_of, tensors = f"run/{checkpoint.CHECKPOINT}", f"run/{checkpoint.RESULTS}", in_safetensors
    found = {f"checkpoint of {name}": Reader([run[name][0]], tensors, saves, load(cls)) for name, cls in classes.items()}
    return found | {
        "export": Reader([exported], tensors, "hnet.safetensors", fh.load),
        "fasthyper export": Reader([state], tensors, saves, lambda path: by_command("export", path.parent, folder / "out")),
        "samples": Reader([samples], tensors, f"run/{checkpoint.SAMPLES}", lambda path: read_samples(load_run(path.parent))),
        "results": Reader([raw for _, raw in run.values()], in_json, results_of, of_run),
        "fasthyper eval": Reader([results], in_json, results_of, lambda path: by_command("eval", path.parent)),
        "recipe": Reader([toml.encode()], in_toml, "recipe.toml", recipes.read),
        "IDX": Reader([idx], functools.partial(in_gzip, in_idx), "images.gz", mnist.read_idx),
        "CIFAR-10": Reader([bytes(3073 * 3)], in_bytes, "test_batch.bin", records(10)),
        "CIFAR-100": Reader([bytes(3074 * 3)], in_bytes, "test.bin", records(100)),
        "tar": Reader([tar_of(parts, "w")], in_tar, "data.tar", archive_of),
        "tar.gz": Reader([tar_of(parts, "w:gz")], functools.partial(in_gzip, in_tar), "data.tar.gz", archive_of),
        "zip": Reader([wheel.getvalue()], in_bytes, "data.whl", lambda path: fetch.from_zip(path, "data", names[:2])),
        "deb": Reader([deb], in_bytes, "data.deb", debian),
        "LEAF": Reader([json.dumps(leaf).encode()], in_json, "split.json", lambda path: celeba.read_split(path, 93)),
        "JPEG": Reader([picture()], in_bytes, "000001.jpg", lambda path: celeba._decoded(path.parent, [path.name])),
        "log.csv": Reader([table], in_bytes, "log.csv", log),
    }


def picture() -> bytes:
    """A JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((178, 218), 60).convert("RGB").save(buffer, "JPEG", quality=20)
    return buffer.getvalue()


RUNS = {"exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "ctypes.dlopen"}
RUNS |= {"subprocess.Popen", "pickle.find_class", "marshal.load", "marshal.loads", "socket.connect", "socket.bind", "import"}
WRITES = {
    "open",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.truncate",
}


class Watch:
    """What a reader did that none may; there is one, since an audit hook stays."""

    def __init__(self) -> None:
        self.folder = ""  # where may be written; "": nothing is watched
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.folder or (event not in RUNS and event not in WRITES):
            return
        if event == "open" and not (
            re.search("[wax+]", given[1] or "") or (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            return
        if event in WRITES and str(given[0]).startswith(self.folder):
            return
        self.seen.append(f"{event} {str(given[:1])[:100]}")


WATCH = Watch()


def _hang(*_: object) -> None:
    raise Hang(f"more than {SECONDS} seconds of the CPU")


@contextlib.contextmanager
def limits() -> Any:
    """Of the CPU, set for each input; of address space, above what is in use; the largest files of archives scaled down.

    The parser of commands, which reads our own annotations, is made once.
    """
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, _hang)
    largest, parser = (fetch.LARGEST, fetch.WHOLE), cli._parser
    cli._parser = functools.cache(parser)
    cli._parser()
    fetch.LARGEST, fetch.WHOLE = 1 << 25, 1 << 26
    resource.setrlimit(resource.RLIMIT_AS, (_pages(0) + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)
        (fetch.LARGEST, fetch.WHOLE), cli._parser = largest, parser


def _pages(which: int) -> int:
    """Bytes of address space (0), or resident (1)."""
    return int(Path("/proc/self/statm").read_text().split()[which]) * resource.getpagesize()


def attempt(reader: Reader, path: Path) -> tuple[bool, str]:
    """Whether the file was read, and what was wrong about how it was read or refused ("": nothing)."""
    read, WATCH.seen = False, []
    WATCH.folder = str(path.parents[len(Path(reader.file).parts) - 1])
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader.read(path)
        read, wrong = True, ""
    except fh.FasthyperError as error:
        text = str(error)
        wrong = "no line of its own" if not text or len(text.splitlines()) != 1 or len(text) > LINE else ""
        wrong = f"{wrong}: {text[:200]!r}" if wrong or "allocate" in text else ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        wrong = "".join(traceback.format_exception(error)[-3:])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        WATCH.folder = ""
    return read, wrong or "; ".join(WATCH.seen)


def fuzz(
    name: str, reader: Reader, folder: Path, seed: int, count: int, first: int = 0, kept: Path | None = None
) -> dict[str, Any]:
    """Counts of inputs, of those read and refused, and what went wrong; ``kept``: where such inputs are written."""
    path = folder / reader.file
    path.parent.mkdir(exist_ok=True)
    before = path.read_bytes() if path.exists() else None
    for raw in reader.seeds:  # whole ones are read, which imports what there is to import
        path.write_bytes(raw)
        with contextlib.suppress(fh.FasthyperError):
            reader.read(path)
    read, failures, slowest, start = 0, [], 0.0, _pages(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    with limits():
        for i in range(first, first + count):
            rng = random.Random(f"{seed}/{name}/{i}")
            raw = reader.mutate(rng, rng.choice(reader.seeds))
            path.write_bytes(raw)
            began = time.process_time()
            was_read, wrong = attempt(reader, path)
            slowest = max(slowest, time.process_time() - began)
            read += was_read
            if wrong:
                failures.append({"input": i, "wrong": wrong})
                if kept is not None:
                    (kept / f"{name.replace(' ', '-')}-{i}").write_bytes(raw)
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 - start
    path.unlink(missing_ok=True)
    if before is not None:
        path.write_bytes(before)
    done = {"inputs": count, "read": read, "refused": count - read - len(failures), "failures": failures}
    return {**done, "slowest_cpu_seconds": round(slowest, 3), "peak_mib_above_start": round(max(peak, 0) / 2**20, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="inputs, of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each reader")
    parser.add_argument("--readers", help="comma-separated; all by default")
    parser.add_argument("--out", type=Path, help="JSON to which the counts are added")
    parser.add_argument("--keep", type=Path, help="folder for inputs that went wrong")
    args = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    folder, facts = Path(tempfile.mkdtemp()), environment()
    everything = readers(folder)
    chosen = args.readers.split(",") if args.readers else list(everything)
    wrong = 0
    try:
        for name in chosen:
            found = fuzz(name, everything[name], folder, args.seed, -(-args.count // len(chosen)), args.first, args.keep)
            wrong += len(found["failures"])
            counts = {key: len(value) if key == "failures" else value for key, value in found.items()}
            print(f"{name:<28}", *(f"{key} {value}" for key, value in counts.items()), flush=True)
            for failure in found["failures"][:3]:
                print(f"  input {failure['input']}: {failure['wrong']}")
            if args.out is not None:
                kept = json.loads(args.out.read_text()) if args.out.exists() else {"readers": {}}
                kept["environment"] = facts
                kept["readers"][name] = {"seed": args.seed, "first": args.first, "commit": facts["commit"], **found}
                kept["inputs"] = sum(own["inputs"] for own in kept["readers"].values())
                args.out.write_text(json.dumps(kept, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
