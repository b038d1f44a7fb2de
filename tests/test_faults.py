"""Faults in training: numbers that are not finite, signals, no memory. Nothing is lost, and one line says what to do."""

import copy
import math
import os
import signal
import time
import weakref

import pytest
import torch
from emulated_graph import EmulatedGraphs
from test_checkpoint import make, same_state
from test_cli import SMALL, cli, one_line
from test_replay import make_r
from test_trainer import toy_stream
from torch import nn

import fasthyper as fh
from fasthyper import graph, interrupt
from fasthyper.errors import DataError
from fasthyper.streams.batches import Batches

BAD = 5  # the example with a gradient that is not finite


class Length(nn.Module):
    """Adds the length of the outputs times the first input: the loss is finite where that is 0, its gradient is not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        y = self.layer(x)
        return y + (y * x[:, :1]).square().sum(1, keepdim=True).sqrt()


@pytest.fixture(params=["plain", "graph"])
def way(request, monkeypatch):
    """Steps run as they are, and launched as a graph whose numbers arrive late."""
    if request.param == "graph":
        monkeypatch.setitem(graph.RUNTIMES, "cpu", EmulatedGraphs)
        monkeypatch.setattr(EmulatedGraphs, "prompt", False)


def data(bad=(BAD,)):
    inputs = torch.rand(24, 6, generator=torch.Generator().manual_seed(3)) + 0.5
    inputs[list(bad), 0] = 0
    return inputs, torch.arange(24) % 4


def trainer_of(**options):
    hnet = fh.ChunkedHypernet(Length(), 2, chunk_size=11, hidden=(5,), dtype=torch.float64)
    return fh.Trainer(hnet, **{"lr": 0.01, "beta": 0.2, "progress": False, **options})


@pytest.mark.parametrize("steps_before", [0, 9])
def test_a_gradient_that_is_not_finite_stops_before_anything_changes(way, steps_before, tmp_path):
    trainer = trainer_of(out=tmp_path)
    trainer.fit(data(bad=()), steps=4, batch_size=4)
    trainer.begin_task(steps=20)
    for _ in range(steps_before):
        trainer.step(*data(bad=()))
    before = copy.deepcopy(list(trainer.hnet.parameters()))
    with pytest.raises(fh.NonFiniteLossError, match=rf"^gradient is nan at task 1, step {steps_before}: lower lr") as caught:
        trainer.fit(data(bad=range(24)), steps=20, batch_size=4)
    assert all(torch.equal(p, kept) for p, kept in zip(trainer.hnet.parameters(), before, strict=True))
    assert caught.value.indices == Batches(24, 4, seed=0, task=1).indices(steps_before).tolist()
    saved = fh.Trainer.load(tmp_path, target=Length(), progress=False)
    assert saved.current_step == steps_before and same_state(saved, trainer)
    assert all(torch.equal(saved._current.tensors()[name], t) for name, t in trainer._current.tensors().items())


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}}], ids=["adam", "sgd"])
def test_skipping_leaves_out_those_updates_alone(way, options):
    skipping, other = trainer_of(on_nonfinite="skip", **options), trainer_of(graph=False, **options)
    other.hnet.load_state_dict(skipping.hnet.state_dict())
    for task in range(2):
        record, batches, kept = skipping.fit(data(), steps=40, batch_size=4), Batches(24, 4, seed=0, task=task), 0
        other.begin_task(steps=40)
        for step in range(40):
            indices = batches.indices(step)
            if BAD not in indices:
                kept += 1
                other.step(*(part[indices] for part in data()))
        other.end_task()
        assert (record.steps, record.skipped, record.samples) == (40, 40 - kept, 160) and kept < 40
        assert same_state(skipping, other)
    again = fh.metrics.TaskRecord.from_json(record.to_json())
    assert again == record and len(record.loss) == kept


def test_ten_in_a_row_stop_all_the_same(way, tmp_path):
    trainer = trainer_of(on_nonfinite="skip", out=tmp_path)
    trainer.begin_task(steps=40)
    for _ in range(7):
        trainer.step(*data(bad=()))
    before = copy.deepcopy(list(trainer.hnet.parameters()))
    for _ in range(2):  # tried again it counts anew
        with pytest.raises(fh.NonFiniteLossError, match="gradient is nan at task 0, step"):
            trainer.fit(data(bad=range(24)), steps=40, batch_size=4)
        assert all(torch.equal(p, kept) for p, kept in zip(trainer.hnet.parameters(), before, strict=True))
    assert trainer.current_step == 7 + 2 * 9 and trainer._current.record.skipped == 2 * 9
    trainer.fit(data(bad=()), steps=40, batch_size=4)
    assert not torch.equal(next(trainer.hnet.parameters()), before[0])


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_plain_classifier_that_replays_does_the_same(what, mode, monkeypatch, tmp_path):
    method, taken = make_r(on_nonfinite=mode, out=tmp_path), []
    loss_of = method._loss

    def spoiled(logits, *args):
        taken.append(1)
        loss = loss_of(logits, *args)
        if 3 < len(taken) < 6:
            loss = loss * math.nan if what == "loss" else loss + (logits * 0).square().sum().sqrt()
        return loss

    monkeypatch.setattr(method, "_loss", spoiled)
    if mode == "skip":
        assert method.fit(toy_replay_task(), steps=9, batch_size=4).skipped == 2
        return
    with pytest.raises(fh.NonFiniteLossError, match=f"classifier's {what} is .* at task 0, step 3: .*its batch: "):
        method.fit(toy_replay_task(), steps=9, batch_size=4)
    assert fh.HnetR.load(tmp_path)._now.record.steps == 3


def toy_replay_task():
    from test_replay import toy_stream

    return toy_stream()[0]


def test_names_what_can_be_done_about_what_is_not_finite():
    for call in (make, make_r):
        with pytest.raises(ValueError, match="on_nonfinite must be one of stop, skip, got 'ignore'"):
            call(on_nonfinite="ignore")


SHORTAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB\nof which 1 is free."


def test_a_gpu_out_of_memory_names_the_two_options_that_help(monkeypatch, tmp_path, capsys):
    def shortage(*args):
        raise torch.OutOfMemoryError(SHORTAGE)

    trainer = make(memory_budget=0)
    assert trainer.regularizer.memory_budget == 0
    trainer.fit(toy_stream()[0], steps=2, batch_size=8)
    monkeypatch.setattr(fh.Trainer, "_drift", shortage)
    with pytest.raises(fh.FasthyperError, match="^CUDA out of memory: .*memory_budget.*reg_tasks") as caught:
        trainer.fit(toy_stream()[1], steps=2, batch_size=8)
    assert "\n" not in str(caught.value)
    with pytest.raises(fh.FasthyperError, match="--memory-budget 0.*--reg-tasks 10"):
        trainer.step(*toy_stream()[1].train.batch(torch.arange(8)))
    pytest.importorskip("sklearn")
    assert cli("run", "permuted-digits", "--out", tmp_path / "run", "--json", *SMALL) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("fasthyper: CUDA out of memory: ") and "Traceback" not in "".join(errors)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_end(signum, tmp_path, foreground):
    trainer, step = make(tmp_path), []
    advance = trainer._advance

    def signalled(*args):
        advance(*args)
        step.append(1)
        if len(step) == 4:
            os.kill(os.getpid(), signum)

    trainer._advance = signalled
    with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit) as caught:
        trainer.fit(toy_stream()[0], steps=9, batch_size=8)
    assert signum == signal.SIGINT or caught.value.code == 143
    assert fh.Trainer.load(tmp_path).current_step == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(signum, foreground, monkeypatch):
    ended = []

    def twice():
        with interrupt.deferred_interrupt() as interrupted:
            os.kill(os.getpid(), signum)
            assert interrupted() == signum
            os.kill(os.getpid(), signum)
            ended.append("not at once")

    with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit):
        twice()
    monkeypatch.setattr(interrupt.os, "_exit", ended.append)
    with interrupt.whole_process(), pytest.raises((KeyboardInterrupt, SystemExit)):
        twice()
    assert ended == [128 + signum]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_an_import_swallows_stops_the_next_loop(signum, foreground, monkeypatch):
    """Python writes off what is raised in a callback of its import locks."""

    class Held:
        pass

    lost = []
    monkeypatch.setattr("sys.unraisablehook", lambda raised: lost.append(raised.exc_type))
    with interrupt.whole_process():
        held = Held()
        watch = weakref.ref(held, lambda dead: os.kill(os.getpid(), signum))
        del held
        assert watch() is None and lost == [KeyboardInterrupt if signum == signal.SIGINT else SystemExit]
        for _ in range(2):
            with interrupt.deferred_interrupt() as interrupted:
                assert interrupted() == signum
    with interrupt.deferred_interrupt() as interrupted:
        assert not interrupted()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_import_error_that_was_a_signal_ends_as_the_signal_does(signum, foreground):
    """Extension modules make one of whatever stops the imports they make."""

    def broken(error, *, interrupted):
        with interrupt.whole_process():
            try:
                if interrupted:
                    os.kill(os.getpid(), signum)
                    time.sleep(60)
            except BaseException:
                pass
            raise error from (ImportError("failed to import") if isinstance(error, DataError) else None)

    stopped = KeyboardInterrupt if signum == signal.SIGINT else SystemExit
    for error in (ImportError("failed to import"), DataError("it is not installed")):
        with pytest.raises(stopped):
            broken(error, interrupted=True)
        with pytest.raises(type(error)):
            broken(error, interrupted=False)
    with pytest.raises(OSError, match="disk"):
        broken(OSError("disk full"), interrupted=True)


def test_a_handler_of_ones_own_stays(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *args: heard.append(1))
    try:
        with interrupt.whole_process(), interrupt.deferred_interrupt() as interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [1] and not interrupted()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_settings_of_a_run_that_skips(tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    assert cli("run", "permuted-digits", "--out", out, "--json", "--on-nonfinite", "skip", "--save-every", "9", *SMALL) == 0
    assert fh.Trainer.load(out, on_nonfinite="skip", save_every=7).on_nonfinite == "skip"
    capsys.readouterr()
    assert cli("run", "permuted-digits", "--on-nonfinite", "ignore") == 2
    one_line(capsys, "invalid choice: 'ignore'")
