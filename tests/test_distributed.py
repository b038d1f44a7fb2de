"""Several processes against one: the same curves to rounding, the same bits on all ranks; ranks that stop or are gone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rank_jobs
import torch
import torch.multiprocessing
from networks import conv_with_norm

import fasthyper as fh
from fasthyper.bench.costs import Shapes, messages
from fasthyper.cli import main
from fasthyper.distributed import Ranks

COUNT = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As each of the ranks has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each of the ranks found, and where."""
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(rank_jobs.work, (COUNT, str(directory)), COUNT, start_method="spawn")
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(COUNT)], directory


def relative(found, expected):
    found, expected = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", rank_jobs.CASES)
def test_ranks_take_the_steps_of_one_process(case, reports):
    alone = rank_jobs.found(rank_jobs.train(case, rank_jobs.trainer_for(case)))
    assert len(alone["curves"]) == rank_jobs.TASKS * rank_jobs.STEPS + (rank_jobs.TASKS - 1) * rank_jobs.STEPS
    for size in rank_jobs.SIZES[case]:
        of_ranks = [report[f"{case} {size}"] for report in reports[0][:size]]
        assert relative(of_ranks[0]["curves"], alone["curves"]) < 1e-10
        assert relative(of_ranks[0]["state"], alone["state"]) < 1e-10
        assert of_ranks[0]["accuracy"] == alone["accuracy"]
        assert all(other == of_ranks[0] for other in of_ranks)  # bit for bit


def test_a_step_is_one_message_or_two_with_a_look_ahead(reports):
    """Their sizes are those that the scaling table counts."""
    hnet = rank_jobs.trainer_for("plain").hnet
    shapes = Shapes(3, 2, (5, 4), hnet.target.num_weights, 17)
    assert shapes.num_theta == sum(p.numel() for p in hnet.theta)
    first, both = messages(shapes, lookahead=True)
    steps, later = rank_jobs.STEPS, rank_jobs.TASKS - 1
    report = reports[0][0]
    end = [1]  # whether any rank was interrupted, once a task
    sizes = report["plain 4"]["messages"]
    assert sizes == [*[first] * steps, *end, "evaluate", 1 + 1, "go on"] + [
        size for task in range(1, later + 1) for size in [*[first, both] * steps, *end, task + 1 + 1]
    ]
    (whole,) = messages(shapes, lookahead=False, plastic=1)
    sizes = report["no look-ahead 4"]["messages"]
    assert sizes[sizes.index("go on") + 1 :][:steps] == [whole] * steps


def test_what_one_rank_finds_not_finite_stops_all(reports):
    for size in range(2, COUNT + 1):
        of_ranks = [report[f"spoiled {size}"] for report in reports[0][:size]]
        assert "loss is nan at task 1, step " in of_ranks[0]["error"] and of_ranks[0]["same"]
        assert all(other == of_ranks[0] for other in of_ranks)


def test_other_numbers_of_ranks_go_on_where_one_of_them_was_interrupted(reports):
    alone = rank_jobs.found(rank_jobs.train("plastic", rank_jobs.trainer_for("plastic")))
    reports, _ = reports
    assert reports[0]["interrupted"] == reports[1]["interrupted"]
    assert reports[0]["interrupted"][0] == 3 and reports[0]["interrupted alone"] == 1
    assert all(report["elastic"] == reports[0]["elastic"] for report in reports)
    assert relative(reports[0]["elastic"]["curves"], alone["curves"]) < 1e-10
    assert relative(reports[0]["elastic"]["state"], alone["state"]) < 1e-10
    assert [report["wrote"] for report in reports] == [True, False, False, False]


def test_where_a_rank_ends_the_first_saves_the_state_before_that_step(reports):
    reports, directory = reports
    found = reports[0]["lost"]
    assert found["step"] == 2 and found["error"].startswith("LostProcessError: process 0 of 2 lost the others")
    trainer = fh.Trainer.load(directory / "lost", target=conv_with_norm(momentum=None), progress=False)
    assert trainer.current_step == 2 and rank_jobs.digest(trainer) == found["digest"]
    rank_jobs.train("batch norm", trainer)
    alone = rank_jobs.train("batch norm", rank_jobs.trainer_for("batch norm"))
    assert relative(rank_jobs.found(trainer)["state"], rank_jobs.found(alone)["state"]) < 1e-10


SETTINGS = ["--num-tasks", "2", "--steps", "8", "--hidden", "6,5", "--chunk-size", "900", "--target-hidden", "10"]


def test_a_killed_rank_ends_torchrun_and_one_process_goes_on(tmp_path, capsys):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).parent / "rank_jobs.py")
    run = ["run", "permuted-digits", "--device", "cpu", *SETTINGS, "--out"]
    killed = subprocess.run([*command, script, *run, tmp_path / "run"], capture_output=True, text=True)
    assert killed.returncode == 1 and "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr
    assert killed.stdout.count("permuted-digits: ") == 1  # the first rank alone speaks
    there = fh.Trainer.load(tmp_path / "run")
    assert len(there.results.tasks) == 1 and there.ranks.count == 1
    assert main([*run, str(tmp_path / "run")]) == 0 and "going on in" in capsys.readouterr().out
    assert main([*run, str(tmp_path / "whole")]) == 0
    curves = [rank_jobs.found(fh.Trainer.load(tmp_path / name))["curves"] for name in ("run", "whole")]
    assert relative(*curves) < 1e-5  # float32


def test_alone_nothing_is_exchanged():
    ranks, tensor = Ranks(), torch.ones(3)
    ranks.sum_(([tensor], 0.5))
    ranks.copy_first_([tensor])
    assert torch.equal(tensor, torch.ones(3)) and ranks.share(7) == (slice(0, 7), 1.0)
    assert ranks.any(True) and not ranks.any(False) and ranks.stops(True) and not ranks.stops(False)
    assert ranks.spread([1, 2], lambda items: [2 * item for item in items]) == [2, 4]
    assert ranks.of_first(lambda: ({"t": tensor}, None))[0]["t"] is tensor and ranks.first_then_others(lambda: 5) == 5


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_cover_everything_once(count):
    for n in range(1, 20):
        taken, shares = [], []
        for rank in range(count):
            ranks = Ranks()
            ranks.rank, ranks.count = rank, count
            own, share = ranks.share(n)
            taken += list(range(n))[own] if share else []
            shares.append(share)
            assert len(range(n)[own]) >= 1 and share in ((len(range(n)[own])) / n, 0)
        assert taken == list(range(n)) and sum(shares) == pytest.approx(1)
        assert max(shares) * n - min(shares) * n <= 1 + 1e-9


def test_what_needs_one_process_refuses_several(tmp_path):
    ranks = Ranks()
    ranks.count = 2
    with pytest.raises(ValueError, match="graph must be False or None"):
        fh.Trainer(rank_jobs.trainer_for("plain").hnet, graph=True, ranks=ranks)
    for recipe in ("split-mnist-cl3-r", "split-mnist-cl3-tir"):
        with pytest.raises(ValueError, match="trains in one process, not in 2: run it without torchrun"):
            fh.recipes.run(fh.recipes.RECIPES[recipe], tmp_path / "run", ranks=ranks)
