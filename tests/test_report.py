"""The report: every fact is on the page, nothing on it runs or loads, and a bad run directory is one clear line."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("matplotlib")

from synthetic_runs import results, results_of, write_embeddings, write_run, write_samples

from fasthyper.errors import FasthyperError
from fasthyper.metrics import Results
from fasthyper.recipes import RECIPES, settings
from fasthyper.report import figures, grouped, load_run, write_report
from fasthyper.report.runs import SCORES

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture
def make_run(tmp_path):
    def make(made, name="demo", directory="run", **changes):
        return write_run(tmp_path / directory, made, name, **changes)

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
        (1, "1 task: 90.0 % accuracy", ["90.00 %", "BWT n/a", "There was no past task to hold."]),
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
    assert page.tags["svg"] == (6 if size == 1 else 7)  # no embeddings, no samples; a single task has no drift
    assert (directory / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in directory.iterdir()) == [
        *("accuracy.csv", "report.html", "report.json", "report.png", "results.json")
    ]


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
    for part in ("2 runs compared", "run of 3 d3 3", "run of 30 d30 30", "3 tasks in a row", "30 tasks in a row"):
        assert part in text
    assert page.tags["svg"] == 4 + 7 + 7
    assert (tmp_path / "both" / "accuracy.csv").read_text().count("\n") == 4
    assert not (directories[0] / "report.html").exists()


def test_text_of_a_run_is_only_text(make_run, tmp_path):
    texts = ["<script>alert(1)</script>", "\" onload='x", "$title ${body} $x$ {0} \\alpha", "&amp;"]
    directories = [
        make_run(
            results(1),
            name=text,
            directory=f"d{i}",
            config={text: text, "about": text},
            environment={text: text, "date": text},
        )
        for i, text in enumerate(texts)
    ]
    _, shown = read(write_report(directories, tmp_path / "out"))
    assert all(shown.count(text) >= 9 for text in texts)
    title = read(write_report(directories[:1], tmp_path / "out"))[1]
    assert title.startswith(texts[0])


def test_command_makes_the_run_again(make_run):
    recipe = replace(RECIPES["demo"], num_tasks=3, hidden=(5, 6), lookahead=False, chunk_size=None)
    directory = make_run(results(3), config=settings(recipe), directory="a run")
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
    assert page.tags["svg"] == 1  # seconds


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
        ({"results": results(1).to_json() | {"baseline": ["x"]}}, "damaged"),
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


# Scores, worked out by hand

R = [[0.9], [0.8, 0.7], [0.85, 0.6, 0.95]]
BY_HAND = {
    "acc": (0.85 + 0.6 + 0.95) / 3,
    "aia": (0.9 + (0.8 + 0.7) / 2 + (0.85 + 0.6 + 0.95) / 3) / 3,
    "bwt": ((0.85 - 0.9) + (0.6 - 0.7)) / 2,
    "forgetting": ((0.9 - 0.85) + (0.7 - 0.6)) / 2,
    "largest_drop": 0.7 - 0.6,
    "fwt": math.nan,
    "anterograde": ((0.91 - 0.9) + (0.8 - 0.7) + (0.94 - 0.95)) / 3,
    "seconds_per_task": 2.0,
    "samples_per_second": 5.0,
    "peak_memory": 0,
}
ALONE = [0.91, 0.8, 0.94]


def near(expected):
    return pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


def numbers(scores):
    return {key: math.nan if value is None else value for key, value in scores.items()}


def test_json_has_every_score_of_every_run_with_its_definition(make_run, tmp_path):
    made = results_of(R)
    directories = [
        make_run(made, directory="a", config={"seed": 1}, measured={"baseline": ALONE}),
        make_run(made, name="other", directory="b", config={"seed": 1}),
    ]
    write_report(directories, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["format"] == "fasthyper-report-1"
    assert list(report["definitions"]) == list(BY_HAND) == [score.key for score in SCORES]
    assert all(said["definition"] and said["unit"] for said in report["definitions"].values())
    (first,), (second,) = (group["runs"] for group in report["groups"])
    assert first["scores"]["fwt"] is None
    assert numbers(first["scores"]) == near(BY_HAND)
    assert numbers(second["scores"]) == near(BY_HAND | {"anterograde": math.nan})
    assert first["just_after_learning"] == near([0.9, 0.7, 0.95]) and first["at_the_end"] == near(R[2])
    assert first["memory_lifetime"] == near([(0.9 + 0.7 + 0.95) / 3, (0.8 + 0.6) / 2, 0.85])
    assert first["average_so_far"] == near([0.9, 0.75, 0.8]) and first["seconds"] == [2.0] * 3
    assert (first["learned_alone"], second["learned_alone"]) == (ALONE, None)
    text = read(tmp_path / "report.html")[1]
    for shown in ("80.00", "81.67", "\N{MINUS SIGN}7.50", "7.50", "10.00", "3.33"):
        assert shown in text
    for score in SCORES:
        assert score.definition in text


def test_seeds_are_shown_as_mean_and_standard_error(make_run, tmp_path):
    finals = (0.80, 0.83, 0.92)
    directories = [
        make_run(results_of([[0.9], [x, x]]), directory=f"s{seed}", config={"lr": 0.1, "seed": seed})
        for seed, x in enumerate(finals)
    ]
    write_report(directories, tmp_path)
    (group,) = json.loads((tmp_path / "report.json").read_text())["groups"]
    mean = sum(finals) / 3
    sem = math.sqrt(sum((x - mean) ** 2 for x in finals) / 2) / math.sqrt(3)
    assert group["scores"]["acc"] == near({"mean": mean, "sem": sem})
    assert group["scores"]["bwt"] == near({"mean": mean - 0.9, "sem": sem})
    assert group["scores"]["seconds_per_task"] == near({"mean": 2, "sem": 0})
    assert group["scores"]["anterograde"] == {"mean": None, "sem": None}
    page, text = read(tmp_path / "report.html")
    for part in (
        "2 tasks in a row, 3 seeds: 85.00 ± 3.61 % mean accuracy",
        "± 3.61",
        "0 s0",
        "2 s2",
        "seed 0; 1; 2",
        "Seeds",
    ):
        assert part in text
    assert page.tags["section"] == 1


def test_what_is_a_group(make_run):
    def run(directory, size=2, measure="accuracy", name="demo", **config):
        return make_run(results(size), directory=directory, name=name, config=config, measured={"measure": measure})

    directories = [
        *(run("a", seed=1, lr=0.1), run("b", seed=2, lr=0.2), run("c", seed=2, lr=0.1), run("again", seed=1, lr=0.1)),
        *(
            run("short", size=1, seed=3, lr=0.1),
            run("mse", measure="mse", seed=3, lr=0.1),
            run("other", name="x", seed=3, lr=0.1),
        ),
        *(run("no seed", lr=0.1), run("none", lr=0.1)),
    ]
    groups = grouped([load_run(directory) for directory in [*directories, directories[0]]])
    names = [[run.directory.name for run in group.runs] for group in groups]
    assert names == [["a", "c"], ["b"], ["again"], ["short"], ["mse"], ["other"], ["no seed"], ["none"]]
    assert [group.settings for group in groups[:2]] == ["lr=0.1", "lr=0.2"] and groups[5].settings == ""


def test_errors_are_errors(make_run, tmp_path):
    errors = [[0.004], [0.006, 0.002], [0.005, 0.0025, 0.006]]
    alone = [0.003, 0.002, 0.005]
    run = load_run(make_run(results_of(errors), directory="a", measured={"measure": "mse", "baseline": alone}))
    final, rise = (0.005 + 0.0025 + 0.006) / 3, (0.001 + 0.0005) / 2
    found = {key: run.scores[key] for key in ("acc", "aia", "bwt", "forgetting", "largest_drop", "anterograde")}
    assert found == near(
        {"acc": final, "aia": (0.004 + 0.004 + final) / 3, "bwt": -rise, "forgetting": rise, "largest_drop": 0.001}
        | {"anterograde": (0.001 + 0 + 0.001) / 3}
    )
    page, text = read(write_report([run.directory], tmp_path / "out"))
    assert "3 tasks in a row: mean mse of 0.0045 at the end, worst task rose by 0.001" in text
    for part in ("Final error 0.0045 mse", "Error matrix", "R: minus the mse", "learned alone"):
        assert part in text
    for part in ("ACC", "in %", "Accuracy matrix", "points"):
        assert part not in text.partition("Made by")[0].partition("Final error")[2]
    both = [run.directory, make_run(results(3), directory="b"), make_run(results(2), directory="c")]
    page, text = read(write_report(both, tmp_path / "both"))
    assert page.tags["table"] == 2 + 2 * 3 and "Final error mse" in text and "ACC %" in text


def test_baseline_may_be_a_run(make_run, tmp_path):
    baseline = load_run(make_run(results_of([[0.95], [0.1, 0.9], [0.1, 0.1, 0.85]]), directory="alone"))
    run = load_run(make_run(results_of(R)), baseline)
    assert run.scores["anterograde"] == near((0.05 + 0.2 - 0.1) / 3)
    own = load_run(make_run(results_of(R), directory="own", measured={"baseline": ALONE}), baseline)
    assert own.scores["anterograde"] == near(BY_HAND["anterograde"])
    with pytest.raises(FasthyperError, match="has 4 tasks, its baseline 3"):
        load_run(make_run(results(4), directory="long"), baseline)
    with pytest.raises(FasthyperError, match="is in mse, the baseline .* in accuracy"):
        load_run(make_run(results(3), directory="mse", measured={"measure": "mse"}), baseline)
    write_report([run.directory], tmp_path / "out", baseline.directory)
    shown = json.loads((tmp_path / "out" / "report.json").read_text())["groups"][0]["scores"]["anterograde"]["mean"]
    assert shown == near((0.05 + 0.2 - 0.1) / 3)


# Figures


@pytest.fixture
def draw():
    from matplotlib.figure import Figure

    def drawn(figure, *directories):
        axes = Figure().add_subplot()
        return axes, figure(axes, grouped([load_run(directory) for directory in directories]))

    return drawn


def test_memory_lifetime_is_by_the_tasks_learned_since(make_run, draw):
    axes, _ = draw(figures._lifetime, make_run(results_of(R)))
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 1, 2]
    assert list(line.get_ydata()) == near([(90 + 70 + 95) / 3, (80 + 60) / 2, 85])
    corners = axes.collections[0].get_paths()[0].vertices
    assert {(x, round(y, 9)) for x, y in corners} >= {(0, 74), (0, 94), (1, 62), (1, 78), (2, 85)}


def test_map_keeps_distances_of_embeddings_in_a_plane(make_run, draw):
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0][:2]
    directory = make_run(results(6))
    write_embeddings(directory, flat @ turned + 3)
    axes, caption = draw(figures._embeddings, directory)
    points = torch.tensor(axes.collections[0].get_offsets().filled())
    assert torch.allclose(torch.cdist(points, points), torch.cdist(flat, flat))
    spread = torch.linalg.svdvals(flat - flat.mean(0)) ** 2
    assert axes.get_xlabel() == f"first component, {100 * spread[0] / spread.sum():.0f} %"
    assert list(axes.collections[0].get_array()) == list(range(6)) and "6 embeddings" in caption
    assert read(write_report([directory]))[0].tags["svg"] == 8


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file"])
def test_page_without_a_readable_checkpoint(make_run, content):
    directory = make_run(results(3))
    if content is not None:
        (directory / "checkpoint.safetensors").write_bytes(content)
    assert "which is not there or holds none" in read(write_report([directory]))[1]


def test_samples_are_a_row_for_each_task(make_run, draw):
    samples = torch.randint(256, (3, 4, 25), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    directory = make_run(results(3))
    write_samples(directory, samples)
    axes, _ = draw(figures._samples, directory)
    sheet = axes.images[0].get_array()
    assert sheet.shape == (3 * 7 - 2, 4 * 7 - 2)
    for task in range(3):
        for k in range(4):
            image = sheet[7 * task : 7 * task + 5, 7 * k : 7 * k + 5]
            assert not image.mask.any() and image.data.tolist() == samples[task, k].reshape(5, 5).tolist()
    assert sheet.mask.sum() == sheet.size - samples.numel()
    page, text = read(write_report([directory]))
    assert page.tags["svg"] == 8 and "Generated samples" in text
    many = make_run(results(3), directory="many")
    write_samples(many, samples[:1].expand(100, 4, 25).reshape(100, 4, 5, 5).contiguous())
    axes, caption = draw(figures._samples, many)
    assert axes.images[0].get_array().shape[0] == 20 * 7 - 2 and "20 of 100 tasks" in caption


@pytest.mark.parametrize(
    "samples",
    [
        torch.zeros(2, 3, 24, dtype=torch.uint8),
        torch.zeros(2, 3, 25),
        torch.zeros(25, dtype=torch.uint8),
        torch.zeros(0, 1, 25).byte(),
    ],
)
def test_other_samples_are_one_clear_line(make_run, samples):
    directory = make_run(results(2))
    write_samples(directory, samples)
    with pytest.raises(
        FasthyperError, match=r"samples.safetensors: `samples` must be uint8 of shape .* got torch"
    ) as caught:
        write_report([directory])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_groups_of_a_thousand_tasks_stay_small(make_run, tmp_path):
    runs = [
        make_run(results(1000), directory=f"{lr}-{seed}", config={"lr": lr, "seed": seed})
        for lr in (1, 2, 3)
        for seed in (1, 2)
    ]
    read(write_report(runs, tmp_path / "out"))  # which counts the bytes
