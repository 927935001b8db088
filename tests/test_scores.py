"""Scores small enough to redo by hand."""

import numpy as np
import pytest

from drl.scores import (REFERENCES, Reference, average, difference, improvement, interquartile_mean, normalized_score,
                        reference, stratified_interval)


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


RAGGED = [np.array([1.0, 3.0]), np.array([10.0, 20.0, 60.0])]


def test_the_average_counts_tasks_alike_whatever_their_runs():
    assert average(RAGGED) == 16.0  # 2 and 30


def test_the_interquartile_mean_counts_runs_alike_whatever_their_task():
    assert interquartile_mean(RAGGED) == 11.0  # of 1, 3, 10, 20, 60 all but the ends


def by_pairs(x, y) -> float:
    """P(X > Y), by the simple loop."""
    return sum((a > b) + (a == b) / 2 for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([5, 5], [5], 0.5), ([1, 3], [2], 0.5), ([1, 2, 3], [2, 9], 0.25)],
)
def test_the_probability_of_improvement_of_one_task_by_hand(x, y, expected):
    assert by_pairs(x, y) == improvement([np.array(x, float)], [np.array(y, float)]) == expected


def test_the_probability_of_improvement_is_the_mean_over_tasks_of_the_share_of_pairs_won():
    rng = np.random.default_rng(0)
    ours, theirs = ([rng.integers(9, size=runs).astype(float) for runs in sizes] for sizes in ((5, 3, 1), (4, 3, 7)))
    assert improvement(ours, theirs) == pytest.approx(np.mean([by_pairs(x, y) for x, y in zip(ours, theirs)]))
    assert improvement(ours, theirs) + improvement(theirs, ours) == pytest.approx(1)


def test_a_statistic_of_draws_is_that_of_each_draw():
    rng = np.random.default_rng(0)
    ours, theirs = ([rng.normal(size=(7, runs)) for runs in sizes] for sizes in ((5, 3), (4, 6)))
    for statistic, sides in ((average, [ours]), (interquartile_mean, [ours]), (improvement, [ours, theirs]),
                             (difference, [ours, theirs])):
        one_by_one = [statistic(*([task[draw] for task in side] for side in sides)) for draw in range(7)]
        np.testing.assert_allclose(statistic(*sides), one_by_one, rtol=1e-12)


def interval(*sides, seed=0, **settings):
    return stratified_interval(*sides, generator=np.random.default_rng(seed), **settings)


def test_the_interval_is_that_of_a_loop_over_draws():
    rng, draws = np.random.default_rng(0), 400
    picked = [[rng.integers(len(task), size=(draws, len(task))) for task in RAGGED] for _ in range(2)]
    values = [
        float(improvement(*([task[index[draw]] for task, index in zip(RAGGED, side)] for side in picked)))
        for draw in range(draws)
    ]
    assert interval(RAGGED, RAGGED, statistic=improvement, draws=draws) == pytest.approx(
        tuple(np.percentile(values, [2.5, 97.5])))


def test_the_interval_of_a_known_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        scores = rng.normal([10.0, 90.0], 5, size=(20, 2))
        low, high = stratified_interval(scores.T, generator=rng, draws=500)
        covered += low <= 50 <= high
    # 95% of 200 is 190, give or take 3; a percentile interval of twenty runs covers a little less: about 93%
    assert 175 <= covered < 200


def test_runs_are_resampled_within_their_task():
    # within a task all runs agree, so nothing can vary; across tasks it would
    assert interval(np.array([[0.0] * 3, [100.0] * 3]), draws=100) == (50.0, 50.0)


def test_tasks_are_resampled_each_on_its_own():
    # whoever drew both tasks of a run together would see a mean of 50 in every draw
    assert interval(np.array([[0.0, 100.0], [100.0, 0.0]]), draws=1000) == (0.0, 100.0)  # each once in 16 draws


def test_both_sides_are_resampled_each_on_its_own():
    # whoever drew the same runs of both sides would see no difference in any draw
    side = np.array([[0.0, 100.0]])
    assert interval(side, side, statistic=difference, draws=1000) == (-100.0, 100.0)  # each once in 16 draws


def test_one_run_has_an_interval_of_no_width():
    assert interval(np.array([[3.0], [5.0], [10.0]]), draws=100) == (6.0, 6.0)


def test_the_interval_is_of_the_statistic_that_is_asked_for():
    scores = np.array([[1.0, 2.0, 3.0, 1000.0]])
    # all four are 1000 once in 256, all above 2 once in 16
    assert interval(scores, statistic=lambda tasks: tasks[0].min(-1), draws=1000) == (1.0, 3.0)


def test_the_generator_decides_the_interval():
    scores = np.random.default_rng(0).normal(size=(3, 5))
    first, again, other = (interval(scores, seed=seed, draws=100) for seed in (1, 1, 2))
    assert first == again != other
