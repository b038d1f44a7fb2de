"""Saving and going on: bit for bit, at a task's end and in its middle; what is damaged or foreign is refused."""

import json
import os
import signal
import threading

import pytest
import torch
from test_trainer import toy_hnet, toy_stream
from torch import nn

import fasthyper as fh
from fasthyper.checkpoint import CHECKPOINT, RESULTS


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
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(fh.CheckpointError, match="cannot write to"):
        make(tmp_path / "run")


def test_results_file_says_what_the_run_was(tmp_path):
    make(tmp_path, name="toy").fit(toy_stream()[0], steps=2, batch_size=8)
    content = json.loads((tmp_path / RESULTS).read_text())
    assert content["format"] == "fasthyper-results-1" and content["name"] == "toy"
    assert content["config"]["lr"] == 0.01 and content["environment"]["torch"] == torch.__version__
    assert fh.Results.from_json(content["results"]).tasks[0].steps == 2
