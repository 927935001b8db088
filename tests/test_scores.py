"""Scores small enough to redo by hand."""

import numpy as np
import pytest

from drl.scores import REFERENCES, Reference, interquartile_mean, normalized_score, reference, stratified_interval


@pytest.mark.parametrize(
    ("name", "random", "expert"),
    [
        ("Hopper", -20.272305, 3234.3),
        ("HalfCheetah", -280.178953, 12135.0),
        ("Walker2d", 1.629008, 4592.3),
        ("Ant", -325.6, 3879.7),
    ],
)
def test_references_are_d4rls_for_every_version(name, random, expert):
    assert REFERENCES[name] == (random, expert)
    for version in ("v2", "v4", "v5"):
        assert reference(f"{name}-{version}") == Reference(random, expert)


@pytest.mark.parametrize("environment", ["Pendulum-v1", "InvertedPendulum-v5", "HopperStand-v5", "hopper-v5", ""])
def test_other_environments_have_no_reference(environment):
    assert reference(environment) is None


def test_random_is_0_and_expert_100():
    np.testing.assert_array_equal(
        normalized_score(np.array([[-20, 1190], [2400, 4820]]), Reference(-20.0, 2400.0)), [[0, 50], [100, 200]]
    )


def test_a_score_is_float64_whatever_the_returns():
    score = normalized_score(np.float32([0.1]), Reference(0.0, 100.0))
    assert score.dtype == np.float64
    np.testing.assert_array_equal(score, np.float64(np.float32(0.1)))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 700]], 3.5),  # of eight the middle four: 2, 3, 4, 5
        ([[700, 2], [5, 0], [3, 6], [1, 4]], 3.5),  # in any order
        ([[1, 2, 3, 4, 5]], 3.0),  # a quarter of five, rounded down: one off each end, of 2, 3, 4
        ([[-900, 1, 2, 4, 5, 900]], 3.0),  # one off each end of six: 1, 2, 4, 5
        ([[1, 2, 6]], 3.0),  # too few to cut
        ([[7]], 7.0),
    ],
)
def test_the_interquartile_mean_by_hand(entries, expected):
    entries = np.array(entries, float)
    kept = entries.copy()
    assert interquartile_mean(entries) == expected
    np.testing.assert_array_equal(entries, kept)  # not sorted under the caller's hands


def test_the_interval_of_a_known_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        scores = rng.normal([10.0, 90.0], 5, size=(20, 2))
        low, high = stratified_interval(scores, rng, draws=500)
        covered += low <= 50 <= high
    # 95% of 200 is 190, give or take 3; a percentile interval of twenty runs covers a little less: about 93%
    assert 175 <= covered < 200


def test_runs_are_resampled_within_their_task():
    # within a task all runs agree, so nothing can vary; across tasks it would
    scores = np.array([[0.0, 100.0]] * 3)
    assert stratified_interval(scores, np.random.default_rng(0), draws=100) == (50.0, 50.0)


def test_tasks_are_resampled_each_on_its_own():
    # whoever drew both tasks of a run together would see a mean of 50 in every draw
    low, high = stratified_interval(np.array([[0.0, 100.0], [100.0, 0.0]]), np.random.default_rng(0), draws=1000)
    assert (low, high) == (0.0, 100.0)  # each once in 16 draws


def test_one_run_has_an_interval_of_no_width():
    low, high = stratified_interval(np.array([[3.0, 5.0, 10.0]]), np.random.default_rng(0), draws=100)
    assert low == high == 6.0


def test_the_interval_is_of_the_statistic_that_is_asked_for():
    scores = np.array([[1.0], [2.0], [3.0], [1000.0]])
    low, high = stratified_interval(scores, np.random.default_rng(0), statistic=np.min, draws=1000)
    assert (low, high) == (1.0, 3.0)  # all four are 1000 once in 256, all above 2 once in 16


def test_the_generator_decides_the_interval():
    scores = np.random.default_rng(0).normal(size=(5, 3))
    first, again, other = (stratified_interval(scores, np.random.default_rng(s), draws=100) for s in (1, 1, 2))
    assert first == again != other
