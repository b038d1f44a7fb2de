"""Scores against the definitions, worked out by hand."""

import json
import math
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fasthyper as fh
from fasthyper import metrics

R = [[0.9, 0.2, 0.1], [0.8, 0.7, 0.3], [0.85, 0.6, 0.95]]


def test_scores_by_hand():
    assert metrics.acc(R) == pytest.approx((0.85 + 0.6 + 0.95) / 3)
    assert metrics.average_so_far(R) == pytest.approx([0.9, (0.8 + 0.7) / 2, (0.85 + 0.6 + 0.95) / 3])
    assert metrics.aia(R) == pytest.approx((0.9 + 0.75 + 0.8) / 3)
    assert metrics.anterograde_forgetting(R, [0.92, 0.8, 0.94]) == pytest.approx((0.02 + 0.1 - 0.01) / 3)
    assert metrics.memory_lifetime(R) == [[0.9, 0.7, 0.95], [0.8, 0.6], [0.85]]
    assert metrics.bwt(R) == pytest.approx(((0.85 - 0.9) + (0.6 - 0.7)) / 2)
    assert metrics.bwt(R, "pairs") == pytest.approx(((0.8 - 0.9) + (0.85 - 0.9) + (0.6 - 0.7)) / 3)
    assert metrics.forgetting(R) == pytest.approx(-metrics.bwt(R))
    assert metrics.forgetting(R, "chaudhry") == pytest.approx(((0.9 - 0.85) + (0.7 - 0.6)) / 2)
    assert metrics.fwt(R, [0.1, 0.1, 0.1]) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert metrics.largest_drop(R) == pytest.approx(0.1)
    gap = [[0.9, 0.1], [math.nan, 0.8]]
    assert math.isnan(metrics.largest_drop(gap)) and math.isnan(metrics.aia(gap))
    assert metrics.memory_lifetime(gap) == [[0.9, 0.8], []]
    with pytest.raises(ValueError, match="baseline has 1 tasks, the run 2"):
        metrics.anterograde_forgetting(gap, [0.9])


def test_scores_of_short_and_empty_runs():
    assert math.isnan(metrics.acc([])) and math.isnan(metrics.bwt([[0.9]])) and metrics.largest_drop([[0.9]]) == 0
    assert fh.Results().summary()


@pytest.mark.parametrize(("forgotten", "held"), [(1, [0, 2]), (2, [0, 1])])
def test_scores_leave_out_what_was_forgotten_on_purpose(forgotten, held):
    results = fh.Results([metrics.TaskRecord(i) for i in range(3)], {i: dict(enumerate(R[i])) for i in range(3)})
    results.forgotten[forgotten] = 2
    scores, (first, last) = results.scores(), held
    assert scores["acc"] == pytest.approx((R[2][first] + R[2][last]) / 2)
    assert scores["bwt"] == pytest.approx(R[2][first] - R[first][first])
    assert f"forgotten on purpose, not in the scores: {forgotten}" in results.summary()
    assert fh.Results.from_json(json.loads(json.dumps(results.to_json()))) == results
    results.forgotten |= {0: 2, 1: 2, 2: 2}
    assert math.isnan(results.scores()["acc"]) and results.summary()


def test_unknown_conventions_are_named():
    for score in (metrics.bwt, metrics.forgetting):
        with pytest.raises(ValueError, match="convention 'mine'; choose from"):
            score(R, "mine")


def test_results_survive_json():
    task = metrics.TaskRecord(0, "first", 5, 80, 1.5, [(0, 2.5), (4, 0.5)], [(4, 1e-3)])
    results = fh.Results([task], {0: {0: 0.9}}, 123, baseline=[0.95])
    assert fh.Results.from_json(json.loads(json.dumps(results.to_json()))) == results


def test_summary_of_a_long_run_stays_readable():
    tasks = [metrics.TaskRecord(i) for i in range(300)]
    accuracy = {i: {j: 0.9 for j in range(i + 1)} for i in range(300)}
    lines = fh.Results(tasks, accuracy).summary().splitlines()
    assert max(map(len, lines)) < 180 and len(lines) < 40 and any("280 tasks in the middle" in line for line in lines)


@pytest.mark.parametrize(
    ("correct", "total", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605))],
)
def test_accuracy_interval_has_the_ends_of_newcombe_s_table(correct, total, expected):
    assert metrics.accuracy_interval(correct, total) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0.5, 0.999))
def test_ends_of_the_accuracy_interval_solve_its_equation(total, share, confidence):
    correct = round(share * total)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = metrics.accuracy_interval(correct, total, confidence)
    assert low <= correct / total <= high
    for p in (low, high):
        assert abs(correct / total - p) == pytest.approx(z * math.sqrt(p * (1 - p) / total), abs=1e-7)


@pytest.mark.parametrize("numbers", [(-1, 5), (6, 5), (0, 0), (1, 2, 1.0)])
def test_accuracy_interval_refuses(numbers):
    with pytest.raises(ValueError, match="need 0 <= correct <= total >= 1 and a confidence within"):
        metrics.accuracy_interval(*numbers)


@pytest.mark.parametrize("steps, num_tasks, most", [(5000, 10, 200), (150, 1000, 20), (1, 3, 1), (7, 10**6, 10)])
def test_curves_of_long_sequences_stay_short(steps, num_tasks, most):
    kept = [step for step in range(steps) if metrics.is_sampled(step, steps, num_tasks)]
    assert kept[0] == 0 and kept[-1] == steps - 1 and min(most, steps) // 2 <= len(kept) <= most + 1
