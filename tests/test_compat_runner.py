"""``python -m fasthyper.compat.hypnettorch SCRIPT``: what a script meets and leaves is what python gives it, only sooner."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fasthyper.compat.hypnettorch import accelerate, calls
from fasthyper.compat.hypnettorch import hnet_regularizer as fast
from fasthyper.compat.hypnettorch.__main__ import main

pytest.importorskip("hypnettorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, from numpy and matplotlib

LOOP = Path(__file__).parent.parent / "bench" / "split_loop.py"
SMALL = ["--tasks", "5", "--steps", "20", "--inputs", "50", "--hidden", "30,20", "--chunk-size", "400", "--emb-size", "8"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a script and runs it: its exit status."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(text, *args):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        calls.reset()
        return main([str(path), *args])

    return run


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_a_loop_has_the_losses_it_has_without(dtype, tolerance, tmp_path, script, monkeypatch, capsys):
    """``eps``: hypnettorch's look-ahead adds it before Adam's bias correction, Adam after it."""
    options = [*SMALL, "--dtype", dtype, "--eps", "1e-20", "--out"]
    monkeypatch.setattr(sys, "argv", [str(LOOP), *options, str(tmp_path / "plain")])
    import runpy

    runpy.run_path(str(LOOP), run_name="__main__")
    calls.reset()
    assert main([str(LOOP), *options, str(tmp_path / "fast")]) == 0
    plain, quick = (json.loads((tmp_path / name).read_text()) for name in ("plain", "fast"))
    for key in ("losses", "penalties", "accuracies"):
        have, want = torch.tensor(quick[key]), torch.tensor(plain[key])
        assert torch.allclose(have, want, rtol=tolerance, atol=tolerance), key
    assert max(plain["penalties"]) > 0.1
    ways = calls.summary()
    assert {way for _, way in ways} == {calls.FAST}
    assert ways["calc_fix_target_reg", calls.FAST].calls == ways["calc_delta_theta", calls.FAST].calls == 4 * 20
    report = capsys.readouterr().err
    assert report.startswith(
        f"fasthyper: {sum(count.calls for count in ways.values())} calls went the fast way, 0 the general"
    )
    assert all(name in report for name, _ in ways) and "ChunkedHMLP.backward" in report


def test_names_imported_before_are_replaced_too(script):
    from hypnettorch.hnets import HMLP
    from hypnettorch.utils.hnet_regularizer import calc_fix_target_reg

    globals()["imported_before"] = calc_fix_target_reg
    with accelerate():
        assert imported_before is fast.calc_fix_target_reg  # noqa: F821
    assert imported_before is calc_fix_target_reg is not fast.calc_fix_target_reg  # noqa: F821
    assert not hasattr(HMLP.forward, "__wrapped__")
    text = """
        from hypnettorch.hnets import HMLP
        from hypnettorch.utils.hnet_regularizer import calc_fix_target_reg
        from hypnettorch.utils.optim_step import calc_delta_theta
        print(calc_fix_target_reg.__module__, calc_delta_theta.__module__)
        HMLP([[2, 3]], verbose=False).forward(cond_id=0)
    """
    assert script(text) == 0


def test_general_calls_are_counted_as_such(script, capsys):
    text = """
        import torch
        from hypnettorch.hnets import HMLP
        from hypnettorch.utils import hnet_regularizer as hreg
        hnet = HMLP([[2, 3]], num_cond_embs=2, use_batch_norm=True, verbose=False).eval()
        targets = hreg.get_current_targets(1, hnet)
        hreg.calc_fix_target_reg(hnet, 1, targets=targets).backward()
        with torch.autocast("cpu"):
            hnet.forward(cond_id=0)
    """
    assert script(text) == 0
    report = capsys.readouterr().err
    rows = {
        line.split()[0]: line.split()[1:] for line in report.splitlines() if line.startswith("  ") and line[-1].isdigit()
    }
    assert rows["HMLP.forward"][::2] == ["2", "1"]
    assert rows["calc_fix_target_reg"][::2] == ["0", "1"] and rows["get_current_targets"][::2] == ["0", "1"]
    fast_ones, general_ones = (sum(int(cells[i]) for cells in rows.values()) for i in (0, 2))
    assert report.startswith(f"fasthyper: {fast_ones} calls went the fast way, {general_ones} the general one")


def test_nothing_called_is_said(script, capsys):
    assert script("print('hello')") == 0
    captured = capsys.readouterr()
    assert captured.out == "hello\n" and captured.err.count("\n") == 1 and "called nothing" in captured.err


def test_argv_path_and_name_are_those_of_python(tmp_path, script):
    (tmp_path / "neighbour.py").write_text("value = 7")
    text = """
        import json, sys
        import neighbour
        found = {"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "x": sys.modules["__main__"].x}
        json.dump(found, open(sys.argv[1], "w"))
    """
    text = "x = 3" + text.replace("\n        ", "\n")
    out = str(tmp_path / "found")
    assert script(text, out, "--flag", "-h") == 0
    path = str(tmp_path / "script.py")
    assert json.loads(Path(out).read_text()) == {
        "argv": [path, out, "--flag", "-h"],
        "path": os.path.realpath(tmp_path),
        "name": "__main__",
        "file": path,
        "x": 3,
    }


@pytest.mark.parametrize(("text", "status"), [("exit()", None), ("exit(0)", 0), ("exit(3)", 3), ("exit('words')", "words")])
def test_the_exit_status_is_the_scripts(text, status, script, capsys):
    with pytest.raises(SystemExit) as stop:
        script(f"import sys; sys.{text}")
    assert stop.value.code == status
    assert "fasthyper:" in capsys.readouterr().err


def test_a_traceback_begins_with_the_script(script, tmp_path, capsys):
    text = """
        def fail():
            raise RuntimeError("words")
        fail()
    """
    assert script(text) == 1
    path, report = str(tmp_path / "script.py"), capsys.readouterr().err
    lines = report.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[1] == f'  File "{path}", line 4, in <module>'
    assert "RuntimeError: words" in lines and "runpy" not in report and "__main__.py" not in report
    assert "fasthyper:" in lines[-1]


def test_a_syntax_error_and_an_interrupt(script, capsys):
    assert script("x = = 1") == 1
    report = capsys.readouterr().err
    assert "SyntaxError" in report and "runpy" not in report
    assert script("raise KeyboardInterrupt") == 130
    assert "KeyboardInterrupt" in capsys.readouterr().err


def test_hypnettorch_is_as_it_was_afterwards(script):
    from hypnettorch.hnets import HMLP

    before = HMLP.forward
    assert script("from hypnettorch.hnets import HMLP; assert hasattr(HMLP.forward, '__wrapped__')") == 0
    assert script("1 / 0") == 1
    assert HMLP.forward is before


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([], 2, "SCRIPT"),
        (["--help"], 0, "SCRIPT"),
        (["--wrong"], 2, "SCRIPT"),
        (["missing.py"], 2, "no such file: missing.py"),
    ],
)
def test_bad_usage_is_one_line(args, status, words, capsys):
    assert main(args) == status
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and words in captured.err


def test_without_hypnettorch_it_says_how_to_get_it(script, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "hypnettorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypnettorch", None)
    assert script("print('not run')") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "pip install" in captured.err and not captured.out


def test_as_a_command(tmp_path):
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "script.py"
    path.write_text("import sys; print(sys.argv[1:], sys.path[0]); sys.exit(5)")
    command = [sys.executable, "-m", "fasthyper.compat.hypnettorch", "inner/script.py", "a", "-b"]
    environment = os.environ | {"PYTHONPATH": str(Path(calls.__file__).parents[3])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, f"['a', '-b'] {os.path.realpath(path.parent)}\n")
    assert done.stderr.splitlines()[-1].startswith("fasthyper: ")
