"""One file for a hypernetwork, one for a task's plain weights; what is damaged, foreign or newer is refused in one line."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_trainer import toy_hnet, toy_stream
from torch import nn

import fasthyper as fh
from fasthyper.cli import main

DOCUMENT = Path(__file__).parent.parent / "docs" / "checkpoints.md"
SMALL = {"chunk_size": 30, "hidden": (6, 5), "task_dim": 4, "chunk_dim": 3}


class Tied(nn.Module):
    """A buffer, and one parameter that two layers share."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return self.second(self.scale * self.first(x).relu())


def make(target=None, **options):
    return fh.ChunkedHypernet(target or fh.nets.MLP(6, (5,), 4), 3, **{**SMALL, **options})


def assert_same(a, b):
    assert a.config == b.config and list(a.state_dict()) == list(b.state_dict())
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@settings(max_examples=30)
@given(
    st.fixed_dictionaries(
        {
            "chunk_size": st.none() | st.integers(1, 80),
            "hidden": st.lists(st.integers(1, 6), max_size=3),
            "activation": st.sampled_from(["relu", "elu", "tanh", "sigmoid", "silu"]),
            "outputs_per_task": st.sampled_from([None, 1]),
            "layout": st.sampled_from(["flat", "aligned"]),
            "seed": st.integers(0, 5),
            "dtype": st.sampled_from([torch.float32, torch.float64]),
        }
    )
)
@example({"chunk_size": None, "hidden": []})
def test_a_file_holds_all(tmp_path, options):
    hnet = make(**options)
    hnet.export(tmp_path / "hypernet.safetensors")
    again = fh.load(tmp_path / "hypernet.safetensors")
    assert_same(hnet, again)
    x = torch.rand(2, 6, dtype=hnet.basis.dtype)
    assert torch.equal(hnet(x, 2), again(x, 2))
    if not options.get("outputs_per_task"):
        hnet.add_task(), again.add_task()
        assert_same(hnet, again)


class Normed(nn.Module):
    """Batch norm, whose parameters are not generated, and an output layer of heads."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def test_a_part_generated_target_with_statistics_and_added_heads(tmp_path):
    options = {"generate": ["*", "!@*Norm*"], "rest": "trained", "outputs_per_task": 2, "grow_heads": True}
    hnet, x = make(Normed(), **options), torch.rand(4, 6)
    hnet.train()
    for task in range(3):
        hnet(x + task, task)
    with torch.no_grad():
        for parameter in hnet.rest:
            parameter.add_(0.5)
    hnet.export(tmp_path / "hypernet.safetensors")
    again = fh.load(tmp_path / "hypernet.safetensors", target=Normed())
    assert_same(hnet, again)
    hnet.export(tmp_path / "task.safetensors", task=2)
    for each in (hnet, again):
        each.eval()
        assert torch.equal(hnet(x, 2), each(x, 2))
    weights = load_file(tmp_path / "task.safetensors")
    assert weights["norm.running_mean"].ne(0).all() and weights["norm.num_batches_tracked"] == 1


def test_other_targets_must_be_given_and_fit(tmp_path):
    path = tmp_path / "hypernet.safetensors"
    make(Tied()).export(path)
    assert torch.equal(fh.load(str(path), target=Tied())(torch.ones(1, 6), 1), make(Tied())(torch.ones(1, 6), 1))
    with pytest.raises(fh.CheckpointError, match="Tied is not one of fasthyper.nets: pass it as target="):
        fh.load(path)
    with pytest.raises(fh.CheckpointError, match="the target's parameters differ from those of the saved Tied"):
        fh.load(path, target=fh.nets.MLP(6, (6,), 6))


@pytest.mark.parametrize("layout", ["flat", "aligned"])
@pytest.mark.parametrize("target", [fh.nets.MLP(6, (8, 5), 4), Tied()], ids=["mlp", "tied"])
def test_a_tasks_weights_fit_the_plain_module(tmp_path, target, layout):
    hnet, path = make(target, layout=layout), tmp_path / "task.safetensors"
    hnet.export(path, task=1)
    weights = load_file(path)
    assert list(weights) == sorted(target.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in hnet.generate(1).items())
    target.load_state_dict(weights)
    x = torch.rand(3, 6)
    assert torch.allclose(target(x), hnet(x, 1), rtol=1e-5, atol=1e-6)
    with pytest.raises(IndexError, match="task index 3 out of range"):
        hnet.export(tmp_path / "none.safetensors", task=3)
    with pytest.raises(fh.CheckpointError, match=re.escape("is not a fasthyper-hypernet-1 file (format: pt)")):
        fh.load(path)
    assert not (tmp_path / "none.safetensors").exists()


def test_a_tasks_weights_need_no_fasthyper(tmp_path):
    hnet = make(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))
    hnet.export(tmp_path / "task.safetensors", task=2)
    code = """if True:
        import sys; sys.modules["fasthyper"] = None
        import torch
        from safetensors.torch import load_file
        plain = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
        plain.load_state_dict(load_file(sys.argv[1]))
        print(plain(torch.ones(1, 6)).tolist())
    """
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "task.safetensors"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert torch.allclose(torch.tensor(json.loads(ran.stdout)), hnet(torch.ones(1, 6), 2), rtol=1e-5, atol=1e-6)


def test_a_run_directory_loads_also_in_the_middle_of_a_task(tmp_path):
    stream, trainer = toy_stream(), fh.Trainer(toy_hnet(3, dtype=torch.float32), progress=False)
    trainer.fit(stream[0], steps=3, batch_size=8)
    trainer._current = trainer._begin(1, "")
    trainer.save(tmp_path / "run")
    assert_same(fh.load(tmp_path / "run"), trainer.hnet)


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path, tensors=None, **state):
    """The same file with other contents and their digest, as one might write who wants to be believed."""
    header = header_of(path)
    header["state"] = json.dumps({**json.loads(header["state"]), **state})
    tensors = {**load_file(path), **(tensors or {})}
    header["sha256"] = fh.checkpoint._digest(tensors, header["state"])
    save_file(tensors, path, metadata=header)


def one_line(path, match):
    with pytest.raises(fh.CheckpointError, match=match) as caught:
        fh.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_damaged_foreign_and_newer_files_are_refused(tmp_path):
    path = tmp_path / "hypernet.safetensors"
    one_line(path, "no file at")
    one_line(tmp_path, "no checkpoint at")
    make().export(path)
    whole = path.read_bytes()
    for damaged in (b"", b"\0" * 100, b"PK\3\4", whole[:7], whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        path.write_bytes(damaged)
        one_line(path, "is damaged or not a fasthyper-hypernet-1 file")
    path.write_bytes(whole.replace(b"fasthyper-hypernet-1", b"fasthyper-hypernet-2"))
    one_line(path, re.escape("(fasthyper-hypernet-2, of another version of fasthyper: upgrade)"))
    torch.save({"a": torch.ones(2)}, path)
    one_line(path, "is damaged or not a fasthyper-hypernet-1 file")
    save_file({"a": torch.ones(2)}, path)
    one_line(path, re.escape("is not a fasthyper-hypernet-1 file (format: None)"))
    save_file({"a": torch.ones(2)}, path, metadata={"format": "fasthyper-hypernet-1"})
    one_line(path, "is damaged")
    save_file({"a": torch.ones(2)}, path, metadata={"format": "fasthyper-hypernet-1", "state": "[" * 100_000})
    one_line(path, "is damaged")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hnet": {}}, "it lacks 'dtype'"),
        ({"hnet": {"dtype": "compile"}}, "it lacks 'compile'"),
        ({"hnet": {"dtype": "float32", "chunk_size": 30, "surprise": 1}}, "unexpected keyword argument 'surprise'"),
        ({"hnet": {"dtype": "float32", "chunk_size": 31}}, "does not fit"),
        ({"hnet": {"dtype": "float32", "chunk_size": -1}}, "must be at least 1"),
        ({"hnet": {"dtype": "float32", "chunk_size": 10**18}}, "does not fit"),
        ({"hnet": []}, "does not fit"),
        ({"target": {"class": "os.system", "config": {}}}, "it lacks 'os.system'"),
        ({"target": {"class": "MLP", "config": {"num_inputs": 6}}}, "missing 2 required positional arguments"),
        ({"target": {"class": "MLP", "config": {"num_inputs": 6, "hidden": [], "num_outputs": 4}}}, "parameters differ"),
        ({"target_shapes": None}, "parameters differ"),
        ({"layout": [[0, 2, 0, 30, 5, [[0, 54]]]]}, "lie otherwise in the chunks"),
        ({"tensors": {"basis": torch.ones(30, 6, dtype=torch.int32)}}, "basis is torch.int32"),
        ({"tensors": {"basis": torch.ones(29, 6)}}, re.escape("basis is torch.float32 [29, 6] in it")),
        ({"tensors": {"more": torch.ones(1)}}, "Unexpected key"),
        ({"tensors": {"task_embeddings.7": torch.ones(4)}}, "does not fit"),
    ],
    ids=str,
)
def test_what_was_changed_by_hand_does_not_fit(tmp_path, change, match):
    path = tmp_path / "hypernet.safetensors"
    make().export(path)
    rewrite(path, **change)
    one_line(path, match)


@settings(max_examples=150)
@given(st.data())
def test_no_changed_byte_goes_unseen(tmp_path, data):
    path = tmp_path / "hypernet.safetensors"
    make().export(path)
    whole = bytearray(path.read_bytes())
    in_header = data.draw(st.booleans())
    first = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.integers(*((0, first - 1) if in_header else (first, len(whole) - 1))))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        loaded = fh.load(path)
    except fh.CheckpointError as error:
        assert "\n" not in str(error)
    else:  # white space of the header, or the name of an entry that is not needed
        assert in_header
        assert_same(loaded, make())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    import safetensors.torch

    path = tmp_path / "hypernet.safetensors"
    make().export(path)
    before = path.read_bytes()

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(fh.CheckpointError, match="No space left on device; what was there before is unchanged"):
        make().export(path, task=0)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    with pytest.raises(fh.CheckpointError, match="is what a run goes on from; name another file"):
        make().export(tmp_path / "checkpoint.safetensors")
    with pytest.raises(fh.CheckpointError, match="cannot write"):
        make().export(tmp_path / "nowhere" / "x.safetensors")
    with pytest.raises(fh.CheckpointError, match="cannot write"):
        make().export(tmp_path)


def test_the_verb(tmp_path, capsys):
    trainer = fh.Trainer(toy_hnet(3, dtype=torch.float32), progress=False, out=tmp_path / "run")
    trainer.fit(toy_stream()[0], steps=2, batch_size=8)
    whole, task = tmp_path / "hypernet.safetensors", tmp_path / "task.safetensors"
    assert main(["export", str(tmp_path / "run"), str(whole)]) == 0
    assert capsys.readouterr().out.split() == [str(whole)]
    assert main(["export", str(tmp_path / "run"), str(task), "--task", "1"]) == 0
    assert_same(fh.load(whole), trainer.hnet)
    assert all(torch.equal(load_file(task)[name], weight) for name, weight in trainer.hnet.generate(1).items())
    capsys.readouterr()
    for args, line in (
        (["run", task, "--task", "9"], "task index 9 out of range"),
        (["nowhere", task], "is damaged or not|no file at"),
        (["run", "run/checkpoint.safetensors"], "is what a run goes on from"),
    ):
        assert main(["export", *(str(tmp_path / a) if i < 2 else a for i, a in enumerate(args))]) == 1
        error = capsys.readouterr().err
        assert re.search(line, error) and error.count("\n") == 1


def test_the_page_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert DOCUMENT.read_text().startswith("```python\n")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks[0], names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, from numpy and matplotlib
        pytest.importorskip("hypnettorch.hnets")
        for block in blocks[1:]:
            exec(block, names)


def test_what_a_file_claims_takes_no_memory(tmp_path):
    """A network of terabytes, of a million layers or of a billion heads is refused before any of it is made."""
    path = tmp_path / "hypernet.safetensors"
    make().export(path)
    whole, state = path.read_bytes(), json.loads(header_of(path)["state"])
    huge = {"num_inputs": 1 << 20, "hidden": [1 << 20], "num_outputs": 1 << 20}
    for changed, match in (
        ({"target": {"class": "MLP", "config": huge}}, "parameters differ"),
        ({"hnet": {**state["hnet"], "hidden": [1 << 40, 5]}}, "trunk_weights.0 is"),
        ({"target": {"class": "ResNet", "config": {"num_outputs": 4, "n": 1 << 30}}}, "of that many layers"),
        ({"target": {"class": "MLP", "config": huge}, "hnet": {**state["hnet"], "outputs_per_task": 1}}, "output heads"),
    ):
        path.write_bytes(whole)
        rewrite(path, **changed)
        one_line(path, match)


def test_a_state_cannot_choose_where_a_trainer_writes(tmp_path):
    trainer = fh.Trainer(toy_hnet(3, dtype=torch.float32), progress=False)
    trainer.save(tmp_path / "run")
    tensors, state = fh.checkpoint.load(tmp_path / "run")
    state["trainer"]["out"] = str(tmp_path / "elsewhere")
    fh.checkpoint.save(tmp_path / "run", tensors, state, {})
    with pytest.raises(fh.CheckpointError, match="multiple values for keyword argument 'out'"):
        fh.Trainer.load(tmp_path / "run", progress=False)
    with pytest.raises(TypeError, match="'out'"):
        fh.Trainer.from_state(tensors, state)
    assert not (tmp_path / "elsewhere").exists()
