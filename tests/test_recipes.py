"""The recipes are the papers' configurations; measured results are told from the recipes' own settings."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fasthyper import HnetR, HnetTIR, Trainer
from fasthyper.metrics import Results, TaskRecord, accuracy_interval
from fasthyper.recipes import RECIPES, differences, evaluate, measured, run, settings, with_error
from fasthyper.recipes.measured import Measured
from fasthyper.recipes.run import _beside_the_baseline, build, build_replay
from fasthyper.streams import Task, TaskData, permuted_digits

# inputs, classes, generated weights, chunks, parameters of the hypernetwork with all task embeddings: as in the paper's code
SIZES = {
    "toy-regression": (1, 1, 141, 1, 1_697),
    "split-mnist-cl1-ent": (784, 2, 478_410, 12, 465_672),
    "split-mnist-cl2-tir": (784, 2, 475_202, 12, 465_672),
    "split-mnist-cl3-ent": (784, 2, 478_410, 12, 465_672),
    "permuted-mnist-10-cl1-ent": (1024, 10, 2_126_100, 28, 2_029_939),
    "permuted-mnist-10-cl2-ent": (1024, 10, 2_036_010, 27, 2_029_931),
    "permuted-mnist-100": (1024, 10, 3_027_000, 404, 2_816_448),
    "permuted-mnist-250": (1024, 10, 4_528_500, 378, 4_414_836),
    "split-cifar-10-100-resnet32": (3072, 10, 468_540, 67, 457_336),
    "split-cifar-10-100-zenke": (3072, 10, 1_276_508, 233, 1_182_678),
}
REPLAY_SIZES = {  # inputs, generated weights of a decoder, chunks
    "split-mnist-cl3-tir": (784, 136_084, 3),
    "split-mnist-cl3-r": (784, 413_284, 9),
    "permuted-mnist-10-cl3-tir": (1024, 2_227_024, 27),
    "permuted-mnist-10-cl3-r": (1024, 651_424, 8),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_papers_code(name):
    num_inputs, num_classes, num_weights, num_chunks, num_parameters = SIZES[name]
    hnet = build(RECIPES[name], num_inputs, num_classes)
    assert (hnet.target.num_weights, hnet.layout.num_chunks) == (num_weights, num_chunks)
    assert sum(p.numel() for p in hnet.parameters() if p.requires_grad) == num_parameters


@pytest.mark.parametrize("name", REPLAY_SIZES)
def test_decoders_are_those_of_the_papers_code(name):
    num_inputs, num_weights, num_chunks = REPLAY_SIZES[name]
    hnet = build_replay(RECIPES[name], num_inputs)
    assert (hnet.target.num_weights, hnet.layout.num_chunks) == (num_weights, num_chunks)
    assert hnet.num_tasks == RECIPES[name].num_tasks - 1


TINY = {"num_tasks": 2, "steps": 6, "batch_size": 8, "target_hidden": (6,), "chunk_size": 300, "hidden": (5,), "task_dim": 4}
TINY_REPLAY = {"replay_hidden": (5,), "replay_chunk_size": 200}


def tiny(name, **options):
    return replace(RECIPES[name], stream="permuted-digits", **{**TINY, **TINY_REPLAY, **options})


@pytest.mark.parametrize("scenario", ["cl1", "cl2", "cl3"])
@pytest.mark.parametrize("method", ["ent", "tir", "r"])
def test_every_scenario_and_method_runs_and_is_evaluated_in_its_own_way(tmp_path, scenario, method):
    pytest.importorskip("sklearn")
    recipe, lines = tiny(f"split-mnist-{scenario}-{method}"), []
    runner = run(recipe, tmp_path, progress=False, log=lines.append)
    kind = {"ent": Trainer, "tir": Trainer if scenario == "cl1" else HnetTIR, "r": HnetR}[method]
    assert type(runner) is kind and len(runner.results.tasks) == 2
    if kind is Trainer:
        assert runner.infer == (None if scenario == "cl1" else "entropy")
        tasks = permuted_digits(2, recipe.seed)
        assert runner.evaluate(tasks, infer=scenario != "cl1") == runner.results.matrix[1]
    assert (tmp_path / "samples.safetensors").exists() == (kind is not Trainer)
    again = run(recipe, tmp_path, progress=False, log=lines.append)
    assert again.results == runner.results and "nothing to train" in lines[-1]
    assert list(evaluate(tmp_path).values()) == runner.results.matrix[1]


@pytest.mark.parametrize("method", ["tir", "r"])
def test_settings_without_a_replay_of_their_own_hold_for_the_replay_model(tmp_path, method):
    pytest.importorskip("sklearn")
    options = {"lr_embedding": 0.5, "lookahead": False, "schedule": "cosine", "embedding_std": 0.1, "steps": 1}
    replay = run(tiny(f"split-mnist-cl3-{method}", **options), tmp_path, progress=False, log=lambda line: None).replay
    assert [replay.config[key] for key in ("lr_embedding", "lookahead", "schedule")] == [0.5, False, "cosine"]
    assert replay.hnet.config["embedding_std"] == 0.1


def test_steps_may_go_by_epochs_and_evaluation_by_tasks(tmp_path):
    pytest.importorskip("sklearn")
    recipe = tiny("permuted-mnist-1000", num_tasks=3, epochs=2, batch_size=500, evaluate_every=2)
    results = run(recipe, tmp_path, progress=False, log=lambda line: None).results
    assert [task.steps for task in results.tasks] == [4, 4, 4]  # twice 1347 // 500
    assert [sorted(results.accuracy[i]) for i in range(3)] == [[0], [0, 1], [0, 1, 2]]


def test_a_regression_is_measured_by_its_error(tmp_path):
    recipe, lines = replace(RECIPES["toy-regression"], steps=5, num_tasks=2), []
    results = run(recipe, tmp_path, progress=False, log=lines.append).results
    assert results.measure == "mse" and lines[-1].startswith("    mse ") and "mean over 2 tasks" in lines[-1]


def test_f_celeba_is_shown_beside_the_same_answer_for_all():
    tasks = [Task(i, TaskData(torch.rand(4, 2), torch.tensor([0, 0, 1, i])), TaskData(torch.rand(11, 2), y), 2) for i, y in
             enumerate([torch.arange(11) % 2, torch.ones(11).long()])]  # fmt: skip
    runner = SimpleNamespace(results=SimpleNamespace(matrix=[[1.0], [6 / 11, 9 / 11]]))
    text = _beside_the_baseline(runner, tasks)
    low, high = accuracy_interval(15, 22)
    interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} (Wilson)"
    assert text == f"68.18 % of 22 test images, {interval}; the same answer for all: 27.27 %"


def test_choices_are_named(tmp_path):
    for what in ("stream", "target", "scenario", "method"):
        with pytest.raises(ValueError, match=f"unknown {what} 'x'; choose from "):
            run(replace(RECIPES["demo"], **{what: "x"}), tmp_path)


def test_measured_results_are_gathered_from_finished_runs_of_the_recipes_own_settings(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    import recipes as gather

    recipe = replace(tiny("demo"), name="tiny")
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    for seed in (7, 8):
        run(replace(recipe, seed=seed), tmp_path / str(seed), progress=False, log=lambda line: None)
    entry = gather.entry("tiny", [tmp_path / "8", tmp_path / "7"])
    assert entry["seeds"] == [7, 8] and entry["measure"] == "accuracy" and entry["steps"] == 12
    assert Measured(**{key: entry[key] for key in Measured.__dataclass_fields__}).mean_and_error == with_error(
        entry["score"]
    )
    seven, eight = (gather.entry("tiny", [tmp_path / seed]) for seed in "78")
    assert gather.joined(eight, seven) == gather.joined(seven, eight) == gather.joined(entry, seven) == entry
    elsewhere = gather.joined(seven, eight | {"where": "another machine"})
    assert elsewhere["where"] == f"{seven['where']} and another machine"
    nine = eight | {"seeds": [9], "where": "another machine"}
    assert gather.joined(elsewhere, nine)["where"] == elsewhere["where"]  # each once
    older = {key: value for key, value in seven.items() if key != "slowdown"}
    assert gather.joined(older, eight)["slowdown"] is None and len(entry["slowdown"]) == 2
    tasks = [TaskRecord(i, "", seconds=float(seconds)) for i, seconds in enumerate([9, 1, 2, 3, *[4] * 23, 6, 7, 5])]
    assert gather.slowdown(Results(tasks=tasks)) == 6 / 2  # of 30 tasks three, as many from the second on
    run(replace(recipe, lr=0.5), tmp_path / "other", progress=False, log=lambda line: None)
    with pytest.raises(ValueError, match=r"other: lr is 0.5, in the recipe 0.0005"):
        gather.entry("tiny", [tmp_path / "other"])
    content = json.loads((tmp_path / "7" / "results.json").read_text())
    del content["results"]["tasks"][1], content["results"]["accuracy"]["1"]
    (tmp_path / "7" / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 of 2 tasks are trained"):
        gather.entry("tiny", [tmp_path / "7"])


def test_runs_are_evaluated_again_in_the_way_of_a_recipe_that_trains_the_same(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    import recipes as gather

    for name in ("split-mnist-cl1-ent", "split-mnist-cl3-ent", "split-mnist-cl2-ent", "split-mnist-cl3-tir"):
        monkeypatch.setitem(RECIPES, name, tiny(name, **({"temperature": 9.0} if name == "split-mnist-cl3-ent" else {})))
    trainer = run(RECIPES["split-mnist-cl1-ent"], tmp_path, progress=False, log=lambda line: None)
    entry = gather.entry("split-mnist-cl3-ent", [tmp_path], again=True)
    inferred = trainer.evaluate(permuted_digits(2, trainer.seed), infer="entropy", temperature=9.0)
    assert entry["score"] == [sum(inferred) / 2] != [trainer.results.scores()["acc"]] and entry["largest_drop"] is None
    with pytest.raises(ValueError, match="heads is True, in the recipe False"):
        gather.entry("split-mnist-cl2-ent", [tmp_path], again=True)
    with pytest.raises(ValueError, match="split-mnist-cl3-tir trains more than a hypernetwork: run it"):
        gather.entry("split-mnist-cl3-tir", [tmp_path], again=True)


def test_mean_and_standard_error():
    assert with_error([0.95]) == "95.00 %"
    assert with_error([0.94, 0.96, 0.95]) == "95.00 ± 0.58 %"
    assert with_error([0.004, 0.006], "mse") == "0.005 ± 0.001"


def test_what_is_kept_can_be_shown():
    assert all(name in RECIPES and len(runs.seeds) == len(runs.score) for name, runs in measured().items())


def test_a_run_of_before_a_setting_was_there_had_its_default():
    recipe = RECIPES["permuted-digits"]
    there = {key: value for key, value in settings(recipe).items() if key not in ("embedding_std", "replay_hidden")}
    assert differences(there, settings(recipe)) == ""
    other = replace(recipe, embedding_std=0.5, replay_hidden=(3,))
    assert differences(there, settings(other)) == (
        "embedding_std is 1.0 there, 0.5 here; replay_hidden is [50, 150] there, [3] here"
    )
    assert differences({}, settings(recipe)).startswith("name is None there, permuted-digits here")
