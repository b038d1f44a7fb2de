"""Saving and going on: bit for bit, at a task's end and in its middle; what is damaged or foreign is refused."""

import copy
import json
import os
import resource
import shlex
import signal
import subprocess
import threading

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from test_trainer import toy_hnet, toy_stream
from torch import nn

import fasthyper as fh
from fasthyper import checkpoint
from fasthyper.checkpoint import CHECKPOINT, PREVIOUS, RESULTS


def make(out=None, **options):
    options = {"lr": 0.01, "beta": 0.2, "progress": False, **options}
    return fh.Trainer(toy_hnet(3, dtype=torch.float32), out=out, **options)


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.hnet.parameters(), b.hnet.parameters(), strict=True))


def interrupt_at(trainer, step):
    """Ctrl-C arrives while this step is under way."""
    original = trainer._step

    def stepped(now, x, y):
        if now.record.steps == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(now, x, y)

    trainer._step = stepped


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"plastic": True},
        {"reg_tasks": 1, "lookahead": False},
        {"reg_tasks": 1, "reg_per_chunk": True},
        {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}},
        {"optimizer": "rmsprop"},
        {"schedule": "cosine", "embedding_init": "previous"},
    ],
    ids=str,
)
def test_goes_on_bit_for_bit_after_an_interrupt_in_a_task(tmp_path, foreground, options):
    stream, whole, cut = toy_stream(), make(**options), make(tmp_path, **options)
    for task in stream:
        whole.fit(task, steps=20, batch_size=16)
        whole.evaluate(stream[: task.index + 1])
    for task in stream[:2]:
        cut.fit(task, steps=20, batch_size=16)
        cut.evaluate(stream[: task.index + 1])
    interrupt_at(cut, 7)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(stream[2], steps=20, batch_size=16)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = fh.Trainer.load(tmp_path, progress=False)
    assert resumed.current_step == 8 and resumed.results.tasks == cut.results.tasks
    resumed.fit(stream[2], steps=20, batch_size=16)
    resumed.evaluate(stream)
    assert same_state(resumed, whole)
    assert resumed.results.matrix[2] == whole.results.matrix[2]
    assert resumed.results.tasks[2].loss == whole.results.tasks[2].loss


def test_goes_on_between_tasks_and_with_added_tasks(tmp_path):
    stream, whole = toy_stream(4), make()
    for task in stream[:3]:
        whole.fit(task, steps=5, batch_size=16)
    whole.save(tmp_path / "a" / "b")
    resumed = fh.Trainer.load(tmp_path / "a" / "b", progress=False)
    for trainer in (whole, resumed):
        trainer.hnet.add_task()
        trainer.fit(stream[3], steps=5, batch_size=16)
    assert same_state(resumed, whole)


def test_checkpoints_from_before_an_option_was_there_still_load(tmp_path):
    trainer = make(tmp_path)
    trainer.fit(toy_stream()[0], steps=2, batch_size=8)
    tensors, state = fh.checkpoint.load(tmp_path)
    del tensors["rng.cpu"]
    for key in ("schedule", "embedding_init"):
        del state["trainer"][key]
    del state["results"]["forgotten"]
    fh.checkpoint.save(tmp_path, tensors, state, {})
    loaded = fh.Trainer.load(tmp_path, progress=False)
    assert same_state(loaded, trainer) and loaded.results == trainer.results and loaded.config == trainer.config


def test_an_interrupt_that_is_ignored_stays_ignored(foreground):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = make()
    interrupt_at(trainer, 1)
    assert trainer.fit(toy_stream()[0], steps=4, batch_size=8).steps == 4


def test_interrupt_outside_the_main_thread_is_not_caught():
    trainer, done = make(), []
    thread = threading.Thread(target=lambda: done.append(trainer.fit(toy_stream()[0], steps=2, batch_size=8)))
    thread.start()
    thread.join()
    assert done[0].steps == 2


def test_a_target_of_ones_own_must_be_given_again(tmp_path):
    hnet = fh.ChunkedHypernet(nn.Linear(6, 4), 2, chunk_size=9)
    trainer = fh.Trainer(hnet, progress=False)
    trainer.fit(toy_stream()[0], steps=2, batch_size=8)
    trainer.save(tmp_path)
    with pytest.raises(fh.CheckpointError, match="the target Linear is not one of fasthyper.nets: pass it as target="):
        fh.Trainer.load(tmp_path)
    assert same_state(fh.Trainer.load(tmp_path, target=nn.Linear(6, 4)), trainer)
    with pytest.raises(fh.CheckpointError, match="does not fit"):
        fh.Trainer.load(tmp_path, target=nn.Linear(7, 4))


def test_foreign_and_damaged_directories_are_refused_and_left_alone(tmp_path):
    with pytest.raises(fh.CheckpointError, match="no checkpoint at"):
        fh.Trainer.load(tmp_path / "nowhere")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(fh.CheckpointError, match="is not empty and holds no fasthyper run; name another directory"):
        make(foreign)
    with pytest.raises(fh.CheckpointError, match="is not empty"):
        make().save(foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(fh.CheckpointError, match=r"thesis.tex is a file; name a directory"):
        make(foreign / "thesis.tex")

    make().save(tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        b"\x00" * 100,
        whole.replace(b"fasthyper-checkpoint-1", b"fasthyper-checkpoint-9"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(fh.CheckpointError, match="checkpoint"):
            fh.Trainer.load(tmp_path / "run")
    path.write_bytes(whole)
    fh.Trainer.load(tmp_path / "run")


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    import safetensors.torch

    trainer = make(tmp_path)
    trainer.fit(toy_stream()[0], steps=2, batch_size=8)
    trainer.flush()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {CHECKPOINT, RESULTS}

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half a check")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(fh.CheckpointError, match="No space left on device; what was there before is unchanged"):
        trainer.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    for mode in (0o755, 0o700):  # it may be read, or not even that
        tmp_path.parent.chmod(0o755)
        tmp_path.chmod(mode)
        (tmp_path / "run").chmod(0o500)
        if is_root := os.geteuid() == 0:  # who may write anywhere
            os.seteuid(65534)
        try:
            with pytest.raises(fh.CheckpointError, match="cannot write to .*: Permission denied"):
                make(tmp_path / "run")
        finally:
            if is_root:
                os.seteuid(0)


def test_results_file_says_what_the_run_was(tmp_path):
    trainer = make(tmp_path, name="toy")
    trainer.fit(toy_stream()[0], steps=2, batch_size=8)
    trainer.flush()
    content = json.loads((tmp_path / RESULTS).read_text())
    assert content["format"] == "fasthyper-results-1" and content["name"] == "toy"
    assert content["config"]["lr"] == 0.01 and content["environment"]["torch"] == torch.__version__
    assert fh.Results.from_json(content["results"]).tasks[0].steps == 2


def test_dropout_goes_on_with_the_masks_it_would_have_drawn(tmp_path, foreground):
    def start(out=None):
        torch.manual_seed(1)
        target = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 4))
        return target, fh.Trainer(fh.ChunkedHypernet(target, 2, chunk_size=50), out=out, progress=False)

    (_, whole), (target, cut), stream = start(), start(tmp_path), toy_stream(2)
    torch.manual_seed(2)
    for task in stream:
        whole.fit(task, steps=12, batch_size=8)
    torch.manual_seed(2)
    cut.fit(stream[0], steps=12, batch_size=8)
    for _ in range(2):
        interrupt_at(cut, 5 if cut.current_step == 0 else 8)
        with pytest.raises(KeyboardInterrupt):
            cut.fit(stream[1], steps=12, batch_size=8)
        cut = fh.Trainer.load(tmp_path, target=copy.deepcopy(target), out=tmp_path, progress=False)
        torch.manual_seed(3)
    cut.fit(stream[1], steps=12, batch_size=8)
    assert same_state(cut, whole)


def test_saves_by_time_within_a_task(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    often, seldom, stream = make(tmp_path / "a", save_every=1e-9), make(tmp_path / "b"), toy_stream()
    for trainer in (often, seldom):
        trainer.begin_task(steps=9)
        for step in range(4):
            trainer.step(*stream[0].train.batch(torch.arange(step, step + 8)))
            trainer.flush()
            if trainer is often:
                loaded = fh.Trainer.load(tmp_path / "a", progress=False)
                assert loaded.current_step == step + 1 and same_state(loaded, often)
    assert not (tmp_path / "b" / CHECKPOINT).exists()
    with pytest.raises(ValueError, match="seconds between two saves must be above 0, got 0"):
        make(save_every=0)


def test_training_goes_on_while_one_state_is_written_and_then_the_newest_is(tmp_path, monkeypatch):
    write, free, written = checkpoint._save, threading.Event(), []

    def slowly(directory, tensors, state, results):
        free.wait()
        written.append(state)
        write(directory, tensors, state, results)

    monkeypatch.setattr(checkpoint, "_save", slowly)
    trainer, stream = make(tmp_path), toy_stream()
    kept = []
    for task in stream:
        trainer.fit(task, steps=3, batch_size=8)
        kept.append(copy.deepcopy(list(trainer.hnet.parameters())))
    assert written == []
    free.set()
    loaded = fh.Trainer.load(tmp_path, progress=False)  # waits for it
    assert [len(state["results"]["tasks"]) for state in written] == [1, 3]
    assert all(torch.equal(a, b) for a, b in zip(loaded.hnet.parameters(), kept[2], strict=True))
    first = checkpoint.read(tmp_path / PREVIOUS, checkpoint.FORMAT)[0]  # as it was when it was left to be written
    assert all(
        torch.equal(first[f"hnet.{n}"], k) for (n, _), k in zip(trainer.hnet.named_parameters(), kept[0], strict=True)
    )


def test_what_could_not_be_written_stops_the_training(tmp_path, monkeypatch):
    import safetensors.torch

    def disk_full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    trainer, stream = make(tmp_path), toy_stream()
    trainer.fit(stream[0], steps=2, batch_size=8)
    trainer.flush()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    trainer.evaluate(stream[0])
    with pytest.raises(fh.CheckpointError, match="No space left on device; what was there before is unchanged"):
        trainer.flush()
    trainer.evaluate(stream[0])
    trainer._saver._wait()
    with pytest.raises(fh.CheckpointError, match="No space left on device"):
        trainer.fit(stream[1], steps=2, batch_size=8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    trainer.fit(stream[1], steps=2, batch_size=8)
    trainer.flush()
    assert len(fh.Trainer.load(tmp_path).results.tasks) == 2


def test_a_full_disk_keeps_what_was_there(tmp_path):
    trainer = make(tmp_path)
    trainer.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(fh.CheckpointError, match="cannot write .*; what was there before is unchanged"):
            trainer.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def saved_twice(directory):
    trainer = make(directory)
    for task in toy_stream()[:2]:
        trainer.fit(task, steps=2, batch_size=8)
        trainer.flush()
    return trainer


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "newer", "missing"])
def test_the_checkpoint_before_is_offered_where_the_newest_is_damaged(tmp_path, monkeypatch, damage, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: os.open("/proc/none", 0))  # an OSError, as without links
    directory = tmp_path / "my run"
    saved_twice(directory)
    path = directory / CHECKPOINT
    whole = path.read_bytes()
    newer = whole.replace(checkpoint.FORMAT.encode(), b"fasthyper-checkpoint-2")
    flipped = whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": whole[:-100], "flipped": flipped, "newer": newer}[damage])
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    word = {"truncated": "is damaged", "flipped": "is damaged", "newer": "upgrade", "missing": "no checkpoint"}[damage]
    with pytest.raises(fh.CheckpointError, match=f"{word}.*; the one before it is whole, and `mv .*` goes on") as caught:
        fh.Trainer.load(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    subprocess.run(shlex.split(str(caught.value).split("`")[1]), check=True)
    assert len(fh.Trainer.load(directory).results.tasks) == 1
    path.write_bytes(b"")
    with pytest.raises(fh.CheckpointError) as caught:
        fh.Trainer.load(directory)
    assert "mv" not in str(caught.value)  # there is none


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.data())
def test_no_flipped_bit_goes_unseen(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("run")
    make().save(directory)
    path = directory / CHECKPOINT
    content = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.one_of(st.integers(0, first - 1), st.integers(first, len(content) - 1)))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        loaded = fh.Trainer.load(directory, progress=False)
    except fh.CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert at < first and same_state(loaded, make()) and loaded.config == make().config


def test_what_a_killed_writer_left_is_removed_and_no_more(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = [tmp_path / f".{name}.{dead.pid}" for name in (CHECKPOINT, PREVIOUS, RESULTS)]
    others = [tmp_path / f".{CHECKPOINT}.{os.getpid()}", tmp_path / f".{CHECKPOINT}.1"]
    for path in (*left, *others):
        path.write_bytes(b"half")
    make(tmp_path)  # takes it for a directory that is empty
    assert sorted(tmp_path.iterdir()) == sorted(others)
    make().save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, RESULTS, others[1].name}
    (tmp_path / f".mine.{dead.pid}").write_bytes(b"")
    make(tmp_path)
    assert (tmp_path / f".mine.{dead.pid}").exists()


def test_a_kill_between_two_moves_leaves_no_name_too_many(tmp_path, monkeypatch):
    saved_twice(tmp_path)
    (tmp_path / PREVIOUS).unlink()
    os.link(tmp_path / CHECKPOINT, tmp_path / PREVIOUS)  # the second move was not made
    make().save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, PREVIOUS, RESULTS}
    assert fh.Trainer.load(tmp_path).results.tasks == []
