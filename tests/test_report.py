"""The report: every fact is on the page, nothing on it runs or loads, and a bad run directory is one clear line."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from fasthyper.errors import FasthyperError
from fasthyper.metrics import Results, TaskRecord
from fasthyper.recipes import RECIPES
from fasthyper.report import load_run, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


def results(size, steps=200, points=20):
    """Task j is at 0.9 + j / 10,000 when learned, and loses 0.001 with every later task, up to 0.01."""
    made = Results(peak_memory=300 * 2**20)
    for i in range(size):
        curve = [(k * steps // points, 2.0 / (k + 1)) for k in range(points)]
        drift = [(step, 1e-4 * value) for step, value in curve] if i else []
        made.tasks.append(TaskRecord(i, f"task {i}", steps, steps * 64, 2.5, curve, drift))
        made.accuracy[i] = {j: 0.9 + j / 10_000 - 0.001 * min(i - j, 10) for j in range(i + 1)}
    return made


@pytest.fixture
def make_run(tmp_path):
    def make(made, name="demo", directory="run", **changes):
        path = tmp_path / directory
        path.mkdir()
        content = {
            "format": "fasthyper-results-1",
            "name": name,
            "config": {"lr": 0.001},
            "environment": {"torch": "2.13.0", "machine": "a machine", "date": "2026-01-01 00:00 UTC"},
            "results": made.to_json(),
        }
        (path / "results.json").write_text(json.dumps(content | changes))
        return path

    return make


class Page(HTMLParser):
    """Fails on unbalanced tags, scripts, and anything that is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], Counter(), Counter(), set(), []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attributes):
        self.check(tag, attributes)

    def handle_starttag(self, tag, attributes):
        self.check(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def check(self, tag, attributes):
        self.tags[tag] += 1
        assert tag not in {"script", "link", "iframe"}
        for key, value in attributes:
            assert not key.startswith("on")
            if key == "id":
                self.ids[value] += 1
            if key in {"src", "href", "xlink:href"} and not value.startswith("data:image/png;base64,"):
                assert value.startswith("#"), value
                self.links.add(value[1:])
        if tag == "svg":
            assert dict(attributes)["role"] == "img" and dict(attributes)["aria-label"]
        if tag == "th":
            assert dict(attributes)["scope"] in {"row", "col"}


def read(path):
    text = path.read_text()
    assert "http://" not in text and "https://" not in text
    assert len(text) < 5_000_000
    page = Page(text)
    assert max(page.ids.values()) == 1
    assert page.links <= set(page.ids)
    assert page.tags["h1"] == 1
    return page, " ".join(" ".join(page.text).split())


@pytest.mark.parametrize(
    ("size", "headline", "shown"),
    [
        (1, "1 task: 90.0 % accuracy", ["90.00 %", "n/a points", "There was no past task to hold."]),
        (2, "2 tasks in a row: 90.0 % mean accuracy at the end, worst task lost 0.10 points", ["\N{MINUS SIGN}0.10 points"]),
        (
            10,
            "10 tasks in a row: 89.6 % mean accuracy at the end, worst task lost 0.90 points",
            ["90.09", "\N{MINUS SIGN}0.50 points"],
        ),
        (20, "20 tasks in a row: 89.4 %", ["89.37 %", "90.2", "1.00 points"]),
        (100, "100 tasks in a row: ", ["89.55 %", "10 more tasks"]),
        pytest.param(1000, "1,000 tasks in a row: 94.0 %", ["94.00 %", "100 more tasks"], marks=pytest.mark.slow),
    ],
)
def test_page_says_what_was_measured(make_run, size, headline, shown):
    directory = make_run(results(size))
    path = write_report([directory])
    assert path == directory / "report.html"
    page, text = read(path)
    assert headline in text
    for part in [*shown, "2.5 s", "5,120 samples/s", "300 MiB", "2.13.0", "a machine", "mean over j<T of R[T,j] - R[j,j]"]:
        assert part in text
    assert page.tags["svg"] == (4 if size == 1 else 5)
    assert (directory / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in directory.iterdir()) == ["accuracy.csv", "report.html", "report.png", "results.json"]


def test_csv_is_the_matrix(make_run):
    made = results(12)
    directory = make_run(made)
    write_report([directory])
    header, *rows = csv.reader((directory / "accuracy.csv").read_text().splitlines())
    assert header == ["after_task", *map(str, range(12))]
    assert [row[0] for row in rows] == header[1:]
    read_back = [[float(cell) if cell else math.nan for cell in row[1:]] for row in rows]
    assert str(read_back) == str(made.matrix)


def test_same_run_gives_the_same_page(make_run, tmp_path):
    directory = make_run(results(3))
    pages = [write_report([directory], tmp_path / out).read_bytes() for out in ("a", "b/c")]
    assert pages[0] == pages[1]


def test_several_runs_are_compared(make_run, tmp_path):
    directories = [make_run(results(size), name=f"run of {size}", directory=f"d{size}") for size in (3, 30)]
    page, text = read(write_report(directories, tmp_path / "both"))
    assert {"run-1", "run-2"} <= page.links
    for part in ("2 runs compared", "run of 3 (d3)", "run of 30 (d30)", "3 tasks in a row", "30 tasks in a row"):
        assert part in text
    assert page.tags["svg"] == 10
    assert (tmp_path / "both" / "accuracy.csv").read_text().count("\n") == 4
    assert not (directories[0] / "report.html").exists()


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\" onload='x", "$title ${body} $x$ {0} \\alpha", "&amp;"])
def test_text_of_a_run_is_only_text(make_run, tmp_path, text):
    directory = make_run(results(2), name=text, config={text: text, "about": text}, environment={text: text, "date": text})
    _, shown = read(write_report([directory], tmp_path / "out"))
    assert shown.count(text) >= 7
    read(write_report([directory, directory], tmp_path / "out"))


def test_command_makes_the_run_again(make_run):
    recipe = replace(RECIPES["demo"], num_tasks=3, hidden=(5, 6), lookahead=False, chunk_size=None)
    directory = make_run(results(3), config=json.loads(json.dumps(asdict(recipe))), directory="a run")
    expected = "fasthyper run demo --out 'a run' --num-tasks 3 --chunk-size None --hidden 5,6 --lookahead False"
    assert load_run(directory).command == expected
    assert expected in read(write_report([directory]))[1]
    assert load_run(make_run(results(3))).command is None


def test_gaps_are_blank(make_run):
    made = results(30)
    made.accuracy = {i: made.accuracy[i] for i in (9, 19)}
    _, text = read(write_report([make_run(made)]))
    assert "30 tasks in a row: not evaluated after the last one" in text
    made.accuracy = {}
    for task in made.tasks:
        task.loss, task.drift = [(0, 0.0)], [(0, math.nan)]
    page, text = read(write_report([make_run(made, directory="empty")]))
    assert "No task was evaluated." in text and "Nothing was recorded." in text
    assert page.tags["svg"] == 1


def test_drop_of_nothing_is_said_so(make_run):
    made = results(4)
    made.accuracy = {i: dict.fromkeys(range(i + 1), 0.5) for i in range(4)}
    _, text = read(write_report([make_run(made)]))
    assert "50.0 % mean accuracy at the end, no task lost accuracy" in text
    assert "\N{MINUS SIGN}0.00" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "fasthyper run RECIPE --out"),
        ("", "damaged"),
        ("{", "damaged"),
        ("[1, 2]", "results.json"),
        (b"\xff\xfe\x00", "damaged"),
        ('{"format": "other-1"}', "not a fasthyper-results-1"),
        ('{"format": "fasthyper-results-1"}', "damaged"),
        ({"results": {"tasks": [{"index": "x"}], "accuracy": {}, "peak_memory": 0}}, "damaged"),
        ({"results": {"tasks": [], "accuracy": {"a": 1}, "peak_memory": 0}}, "damaged"),
        ({"config": None}, "damaged"),
        ({"results": Results().to_json()}, "no finished task"),
    ],
)
def test_bad_directory_is_one_clear_line(make_run, content, message):
    if isinstance(content, dict):
        directory = make_run(results(1), **content)
    else:
        directory = make_run(results(1))
        path = directory / "results.json"
        path.unlink() if content is None else path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(FasthyperError, match=message) as caught:
        write_report([directory])
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
    assert not (directory / "report.html").exists()


def test_missing_directory(tmp_path):
    with pytest.raises(FasthyperError, match="nowhere"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one"):
        write_report([])


def test_unwritable_place_keeps_what_was_there(make_run, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FasthyperError, match="cannot write"):
        write_report([make_run(results(1))], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_without_matplotlib_it_says_what_to_install(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FasthyperError, match="fasthyper\\[plot\\]"):
        write_report([make_run(results(1))])
