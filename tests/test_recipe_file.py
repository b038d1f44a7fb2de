"""Recipes from TOML files: what they set, and in one line what is wrong with them."""

from dataclasses import replace

import pytest

from fasthyper.cli import main
from fasthyper.errors import RecipeError
from fasthyper.recipes import RECIPES, read
from fasthyper.recipes.recipe import Recipe


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "mine.toml").write_text(text)
        return tmp_path / "mine.toml"

    return write


def test_a_file_changes_a_recipe(file):
    path = file('recipe = "permuted-digits"\nbeta = 2\nhidden = [3, 4]\nchunk_size = "none"\nlookahead = false\n')
    changed = {"beta": 2.0, "hidden": (3, 4), "chunk_size": None, "lookahead": False, "published": ""}
    assert read(path) == replace(RECIPES["permuted-digits"], name="mine", **changed)


def test_a_file_of_its_own_begins_with_the_defaults(file):
    path = file('name = "other"\nabout = "a trial"\nstream = "permuted-digits"\n')
    assert read(path) == Recipe("other", "a trial", "", stream="permuted-digits")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_taks = 3", r"mine\.toml: unknown setting 'num_taks'; did you mean num_tasks"),
        ('recipe = "permuted-digit"', "unknown recipe 'permuted-digit'; did you mean permuted-digits"),
        ("recipe = [1]", "unknown recipe"),
        ("beta = '1'", "beta must be of type float, got '1'"),
        ("num_tasks = true", "num_tasks must be of type int, got True"),
        ("num_tasks = 1.0", "num_tasks must be of type int"),
        ("num_tasks = 99999999999999999999", "num_tasks must be of type int"),
        ("num_tasks = 'none'", "num_tasks must be of type int, got 'none'"),
        ("hidden = [1, 'x']", "hidden must be a list of integers"),
        ("lookahead = 1", "lookahead must be of type bool"),
        ("name = '../elsewhere'", "name must be of letters"),
        ("beta = ", r"cannot read .*mine\.toml \(Invalid value"),
        ("beta = " + 4000 * "[", "cannot read"),
        ("a" * (1 << 14), "too many for a recipe"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(file, text, words):
    with pytest.raises(RecipeError, match=words) as caught:
        read(file(text))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="No such file or directory"):
        read(tmp_path / "none.toml")


def test_the_command_runs_a_file_and_goes_on_with_it(file, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    path = file('recipe = "permuted-digits"\nnum_tasks = 1\nsteps = 2\n')
    for _ in range(2):
        assert main(["run", str(path), "--out", str(tmp_path / "run"), "--json", "--batch-size", "8"]) == 0
    assert "holds all 1 tasks already" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run")]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(file("bta = 1"))])
    assert "unknown setting 'bta'; did you mean beta" in capsys.readouterr().err
