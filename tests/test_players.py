"""A row of players answers as the policy does alone, and costs nothing where it is not named."""

import numpy as np
import pytest

from drl import engine
from drl.engine import ActionError
from drl.players import LANE, groups, players
from drl.policy import RecurrentPolicy, WindowPolicy
from toys import TARGET, checkpoint

COMPILED = pytest.param(
    RecurrentPolicy, "cpu", marks=pytest.mark.skipif(engine.unavailable() is not None, reason="no compiled engine here")
)


class Named:
    """A policy as far as `groups` looks at it."""

    def __init__(self, engine, device="cpu"):
        self.engine, self.device = engine, device


@pytest.mark.parametrize("policy", [Named("torch"), Named("torch", "cuda"), Named("cpu"), Named("cpu-bfloat16")],
                         ids=["torch", "GPU", "cpu", "cpu-bfloat16"])
@pytest.mark.parametrize("episodes", [1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize(("environments", "threads"), [(1, 1), (4, 1), (4, 3), (16, 1), (100, 2), (100, 16)])
def test_groups_hold_every_episode_once_and_no_more_than_may_play_at_once(policy, episodes, environments, threads):
    found = groups(policy, episodes, environments, threads)
    np.testing.assert_array_equal(np.concatenate(found), np.arange(episodes))
    sizes = [len(group) for group in found]
    assert min(sizes) > 0 and sum(sorted(sizes)[-threads:]) <= environments
    if policy.device == "cpu" and policy.engine == "torch":
        assert all(len(set(group % LANE)) == len(group) for group in found)  # every episode in the slot of its number


@pytest.mark.parametrize(("episodes", "environments", "threads", "sizes"), [
    (100, 100, 2, [50, 50]), (100, 100, 1, [100]), (100, 40, 2, [17, 17, 17, 17, 16, 16]), (3, 100, 2, [2, 1]),
    (1, 100, 1, [1]),
])
def test_the_compiled_engine_plays_groups_of_one_size_as_many_in_each_thread(episodes, environments, threads, sizes):
    assert [len(group) for group in groups(Named("cpu"), episodes, environments, threads)] == sizes


@pytest.mark.parametrize(("kind", "engine"), [(RecurrentPolicy, "torch"), (WindowPolicy, "torch"), COMPILED])
def test_a_row_answers_as_it_would_alone_while_others_drop_out(kind, engine, torch_threads):
    torch_threads(1)  # small matrices are faster so
    policy = kind(checkpoint(), engine=engine)
    episodes = np.arange(14, 19)  # the end of one lane and the beginning of the next
    rng, rows, seen = np.random.default_rng(0), np.arange(len(episodes)), [[] for _ in episodes]
    together = players(policy, episodes, TARGET)
    for step in range(10):
        observations, rewards = rng.normal(size=(len(rows), 11)), rng.normal(size=len(rows))
        for row, *told in zip(rows, observations, rewards, together(observations, rewards, rows), strict=True):
            seen[row].append(told)
        rows = np.setdiff1d(rows, [2 * step - 4])  # 0, 2 and 4 end after 3, 4 and 5 steps
    assert list(map(len, seen)) == [3, 10, 4, 10, 5]

    for row, steps in enumerate(seen):
        alone = players(policy, episodes[row : row + 1], TARGET)
        for observation, reward, action in steps:
            expected = alone(observation[None], np.array([reward]), np.array([0]))
            assert expected.dtype == np.float32 and expected.shape == (1, 3)
            np.testing.assert_array_equal(expected[0], action)


@pytest.mark.parametrize("policy, engine", [(RecurrentPolicy, "torch"), (WindowPolicy, "torch"), COMPILED])
def test_the_row_without_an_action_is_that_of_the_call(policy, engine):
    act = players(policy(checkpoint(), engine=engine), np.arange(20, 25), TARGET)
    observations = np.ones((3, 11))
    observations[1] = 3e38
    with pytest.raises(ActionError) as caught:
        act(observations, np.zeros(3), np.array([4, 3, 0]))
    assert caught.value.row == 1
