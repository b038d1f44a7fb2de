"""``trainable`` under Ray Tune itself, in processes of its own; what Ray is told, ``test_sweep`` shows without it."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fasthyper.recipes import RECIPES, run
from fasthyper.sweep import trainable

ray = pytest.importorskip("ray")
pytest.importorskip("sklearn")

RECIPE = replace(
    RECIPES["permuted-digits"], num_tasks=3, steps=4000, hidden=(4,), chunk_size=900, target_hidden=(8,), batch_size=16
)


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    from ray import tune

    yield tune
    ray.shutdown()


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(tune, tmp_path):
    train = trainable(RECIPE)

    def once_killed(config):
        """As ``trainable``; the first process of each trial is killed within its second task."""
        mark = tmp_path / f"killed-{config['seed']}"

        def kill():
            while not list(tmp_path.glob(f"ray/*/*seed={config['seed']}*/checkpoint_*/results.json")):
                time.sleep(0.01)
            time.sleep(0.5)  # until Ray knows of it
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

        if not mark.exists():
            threading.Thread(target=kill, daemon=True).start()
        else:
            mark.write_text("none" if tune.get_checkpoint() is None else "a checkpoint")
        train(config)

    found = tune.Tuner(
        tune.with_resources(once_killed, {"cpu": 1}),
        param_space={"seed": tune.grid_search([1, 2])},
        tune_config=tune.TuneConfig(metric="accuracy", mode="max"),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "ray"), verbose=0, failure_config=tune.FailureConfig(max_failures=1)
        ),
    ).fit()
    assert not found.errors and [(tmp_path / f"killed-{seed}").read_text() for seed in (1, 2)] == 2 * ["a checkpoint"]
    for result in found:
        alone = tmp_path / f"alone-{result.config['seed']}"
        run(replace(RECIPE, seed=result.config["seed"]), alone, progress=False, log=lambda line: None)
        kept, whole = (
            json.loads((Path(directory) / "results.json").read_text())["results"]["accuracy"]
            for directory in (result.checkpoint.path, alone)
        )
        assert kept == whole and result.metrics["tasks"] == 3 and result.metrics["accuracy"] == sum(whole["2"].values()) / 3
