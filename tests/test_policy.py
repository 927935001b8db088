"""The promise of the package: acting step by step is the same model that was trained in parallel.

Recorded episodes are replayed through a policy that is made to follow the recorded actions; what it would have done
must be what `DecisionTransformer.forward` predicts for the whole episode at once. One path crosses normaliser, return
to go, timestep, embeddings, kernels, state and action box, so an error of one step anywhere shows.

Every dimension is a different prime, the width heads times a prime.
"""

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from toys import PLAIN

import drl
from drl import checkpoint as checkpoints
from drl.checkpoint import Checkpoint
from drl.config import Config, EvaluateConfig, ModelConfig, TrainConfig
from drl.data.store import Normaliser, Spaces
from drl.engine import ActionError, unavailable
from drl.errors import UserError
from drl.model import make
from drl.policy import PolicyState, RecurrentPolicy, WindowPolicy

B, O, A, HEADS, DIM, K, LAYERS = 3, 5, 7, 2, 11, 13, 2  # noqa: E741
CONFIG_TARGET, CAP = 40.0, 20.0  # asked for by default; the height of a cap that goes up and down
TARGETS = (30.0, -20.0, 11.0)

# 1000 ticks in which rows begin their episodes at different times; forward reads these in chunks of 64 tokens
LENGTHS = ((1000,), (131, 1, 2, 43, 823), (313, 687))

# On |difference| / (1 + |expected|) after 1000 steps. Worst over 8 seeds: 7.7e-7 in float32, 1.5e-15 in float64.
REPLAY = {torch.float32: 1e-5, torch.float64: 1e-12}

# The same between one window and another form of it: worst over 8 seeds 1.2e-15 against forward in float64, 4.7e-7
# against the recurrent policy in float32.
WINDOW = {torch.float32: 1e-5, torch.float64: 1e-12}


class Recording(NamedTuple):
    """What B rows went through in S ticks, episode after episode.

    Attributes:
        observations: raw, (S, B, O); rewards: earned by the action before, NaN where an episode begins, (S, B);
        actions: in [-1, 1], (S, B, A); starts: True where an episode begins, (S, B); episodes: per row (first, end).
    """

    observations: np.ndarray
    rewards: np.ndarray
    actions: np.ndarray
    starts: np.ndarray
    episodes: list[list[tuple[int, int]]]


def make_checkpoint(attention="linear", seed=0, **changes) -> Checkpoint:
    """A small model, plain but for `changes`, with weights so large that actions differ from step to step, in odd units
    throughout."""
    rng = np.random.default_rng(seed)
    settings = {"width": HEADS * DIM, "heads": HEADS, "layers": LAYERS, "return_scale": 10.0}
    config = Config(
        dataset="-",
        model=ModelConfig(attention=attention, **PLAIN | settings | changes),
        train=TrainConfig(context=K, sampling="windows", value_weight=0.0),
        evaluate=EvaluateConfig(target_returns=[CONFIG_TARGET, 1.0]),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(config.model, O, A)
        for weight in model.parameters():
            weight.data.add_(0.1 * torch.randn(weight.shape))
        if config.model.return_quantile:
            model.return_cap.copy_(CAP * torch.arange(len(model.return_cap)).sin())
    low = rng.uniform(-3, -1, A).astype(np.float32)
    return Checkpoint(
        config=config,
        step=0,
        weights=model.state_dict(),
        normaliser=Normaliser(rng.normal(size=O).astype(np.float32), rng.uniform(0.3, 3, O).astype(np.float32)),
        spaces=Spaces("-", O, low, low + rng.uniform(1, 5, A).astype(np.float32)),
        dataset_fingerprint="-",
        versions={},
        training={},
    )


BY_TORCH = functools.partial(RecurrentPolicy, engine="torch")
COMPILED = [] if unavailable() else [functools.partial(RecurrentPolicy, engine="cpu")]


def make_policy(kind=RecurrentPolicy, dtype=torch.float32, **options):
    policy = kind(make_checkpoint(**options))
    return policy.double() if dtype == torch.float64 else policy


def record(lengths, seed=0) -> Recording:
    rng, S = np.random.default_rng(seed), sum(lengths[0])
    assert all(sum(row) == S for row in lengths)
    ends = [np.cumsum(row) for row in lengths]
    episodes = [list(zip([0, *end[:-1]], end, strict=True)) for end in ends]
    starts = np.zeros((S, len(lengths)), bool)
    for row, spans in enumerate(episodes):
        starts[[first for first, _ in spans], row] = True
    rewards = rng.normal(0.02, 0.3, size=(S, len(lengths)))
    rewards[starts] = np.nan  # of no episode's making: must not be read
    observations = rng.normal(0.5, 2, size=(S, len(lengths), O))
    return Recording(observations, rewards, rng.uniform(-1, 1, size=(S, len(lengths), A)), starts, episodes)


def follow(state, actions_BA: np.ndarray):
    """The same state as if the policy had taken `actions_BA`."""
    actions_BA = torch.as_tensor(actions_BA).to(state.return_to_go.dtype)
    if hasattr(state, "previous_action"):
        return state._replace(previous_action=actions_BA)
    history = state.actions.clone()
    history[torch.arange(len(actions_BA)), (state.timestep - 1).clamp(max=K - 1)] = actions_BA
    return state._replace(actions=history)


def replay(policy, recording: Recording) -> np.ndarray:
    """What the policy would have done at each tick of the recording, (S, B, A)."""
    state, actions = policy.initial_state(len(recording.episodes), TARGETS[:len(recording.episodes)]), []
    for observation, reward, recorded, starts in zip(*recording[:4], strict=True):
        action, state = policy.step(observation, reward, state, episode_start=starts)
        state = follow(state, recorded)
        actions.append(action)
    return np.stack(actions)


@torch.no_grad()
def parallel(policy, recording: Recording, row: int, first: int, start: int, end: int) -> np.ndarray:
    """Actions in the environment's box for steps `start` to `end` of the episode that began at tick `first`."""
    spaces, dtype = policy.spaces, policy.model.head.weight.dtype
    mean, std = (x.numpy() for x in (policy._mean, policy._std))
    earned = np.cumsum(np.concatenate([[0.0], recording.rewards[first + 1:end, row]]))
    arrays = (
        (TARGETS[row] - earned)[start - first:],
        (recording.observations[start:end, row] - mean) / std,
        recording.actions[start:end, row],
    )
    returns, observations, actions = (torch.as_tensor(array).to(dtype)[None] for array in arrays)
    predicted, _ = policy.model(returns, observations, actions, torch.arange(start - first, end - first)[None])
    low, high = spaces.action_low.astype(float), spaces.action_high.astype(float)
    return low + (predicted[0].double().numpy() + 1) / 2 * (high - low)


def parallel_episodes(policy, recording: Recording) -> np.ndarray:
    """What `forward` predicts when it reads each episode of the recording in one piece, (S, B, A)."""
    return np.stack(
        [
            np.concatenate([parallel(policy, recording, row, first, first, end) for first, end in spans])
            for row, spans in enumerate(recording.episodes)
        ],
        axis=1,
    )


def observe(batch=B, seed=0, count=1) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(size=(count, batch, O)).astype(np.float32))


def midway(policy, ticks=5, batch=B):
    """A state some steps into the episodes of all rows."""
    state = policy.initial_state(batch, TARGETS[:batch])
    for observation in observe(batch, seed=7, count=ticks):
        _, state = policy.step(observation, np.full(batch, 0.5), state)
    return state


def parts(state) -> list[torch.Tensor]:
    return list(state.tensors().values()) if hasattr(state, "tensors") else list(state)


def clone(state) -> list[torch.Tensor]:
    return [x.clone() for x in parts(state)]


def assert_near(actual, expected, tolerance) -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


POLICIES = pytest.mark.parametrize("kind", [BY_TORCH, *COMPILED, WindowPolicy], ids=lambda kind: (
    "window" if kind is WindowPolicy else kind.keywords["engine"]
))


# The promise


@pytest.mark.parametrize("kind, dtype", [(BY_TORCH, torch.float32), (BY_TORCH, torch.float64)]
                         + [(kind, torch.float32) for kind in COMPILED])
def test_stepping_through_episodes_is_reading_each_at_once(kind, dtype):
    policy, recording = make_policy(kind, dtype), record(LENGTHS)
    expected = parallel_episodes(policy, recording)

    actual = replay(policy, recording)

    assert expected.std(axis=0).min() > 0.05, "actions that hardly differ would prove nothing"
    assert_near(actual, expected, REPLAY[dtype])


@POLICIES
def test_left_to_itself_a_policy_hears_the_actions_it_took(kind):
    policy, recording = make_policy(kind, torch.float64), record(((K,), (5, 8)))
    state, own = policy.initial_state(2, TARGETS[:2]), np.empty((K, 2, A))
    for tick, (observation, reward, _, starts) in enumerate(zip(*recording[:4], strict=True)):
        own[tick], state = policy.step(observation, reward, state, episode_start=starts)

    low, high = policy.spaces.action_low.astype(float), policy.spaces.action_high.astype(float)
    followed = recording._replace(actions=2 * (own - low) / (high - low) - 1)

    assert_near(own, parallel_episodes(policy, followed), REPLAY[torch.float64])


@pytest.mark.parametrize("length", [1, 2, 42, 43, 67])  # forward's 128 tokens end between steps 42 and 43
def test_episodes_of_any_length_are_replayed(length):
    policy, recording = make_policy(dtype=torch.float64), record(((length,),))
    assert_near(replay(policy, recording), parallel_episodes(policy, recording), REPLAY[torch.float64])


def test_acting_goes_on_past_the_last_timestep_embedding():
    policy, recording = make_policy(dtype=torch.float64, max_timesteps=17), record(((61,), (19, 42)))
    assert_near(replay(policy, recording), parallel_episodes(policy, recording), REPLAY[torch.float64])


@pytest.mark.parametrize("attention", ["linear", "softmax", "none"])
def test_a_window_is_the_forward_of_the_last_steps(attention):
    policy = make_policy(WindowPolicy, torch.float64, attention=attention, max_timesteps=31)
    recording = record(((43,), (19, 1, 23), (5, 13, 25)))  # within, at and beyond a window of 13

    actual = replay(policy, recording)

    for row, spans in enumerate(recording.episodes):
        for first, end in spans:
            for tick in range(first, end):
                expected = parallel(policy, recording, row, first, max(first, tick + 1 - K), tick + 1)[-1]
                assert_near(actual[tick, row], expected, WINDOW[torch.float64])


def test_both_policies_agree_until_the_window_is_full_and_not_after():
    recording = record(((2 * K,), (K, K), (2 * K,)))
    recurrent, window = (replay(make_policy(kind), recording) for kind in (RecurrentPolicy, WindowPolicy))

    assert_near(recurrent[:K], window[:K], WINDOW[torch.float32])
    assert_near(recurrent[:, 1], window[:, 1], WINDOW[torch.float32])
    assert (abs(recurrent[K:, 0] - window[K:, 0]).max(-1) > 1e-3).all()


# The doors


@POLICIES
def test_actions_are_of_the_observations_kind(kind):
    policy = make_policy(kind)
    (observation,) = observe()

    from_numpy, _ = policy.step(observation, np.zeros(B), policy.initial_state(B))
    from_tensor, _ = policy.step(torch.tensor(observation), torch.zeros(B), policy.initial_state(B))

    assert isinstance(from_numpy, np.ndarray) and from_numpy.dtype == np.float32 and from_numpy.shape == (B, A)
    assert isinstance(from_tensor, torch.Tensor) and not from_tensor.requires_grad
    assert_same(torch.tensor(from_numpy), from_tensor)


@POLICIES
def test_actions_lie_in_the_environments_box(kind):
    policy = make_policy(kind)
    actions = np.stack([policy.act(100 * observation) for observation in observe(count=20)])
    assert (actions >= policy.spaces.action_low - 1e-5).all() and (actions <= policy.spaces.action_high + 1e-5).all()


@POLICIES
def test_a_step_leaves_the_old_state_as_it_was(kind):
    policy = make_policy(kind)
    state = midway(policy, ticks=K + 3)
    kept = clone(state)

    for starts in (None, np.array([True, False, False])):
        _, after = policy.step(*observe(), np.ones(B), state, starts)
        policy.step(*observe(), np.ones(B), after)

    assert_same(parts(state), kept)


@POLICIES
def test_rows_do_not_hear_each_other(kind):
    policy = make_policy(kind)
    expected, other = policy.initial_state(B), policy.initial_state(B)
    for tick, observation in enumerate(observe(count=K + 3)):
        changed, rewards, starts = observation.copy(), np.ones(B), np.zeros(B, bool)
        changed[1] += 1
        action, expected = policy.step(observation, rewards, expected)
        rewards[1], starts[1] = 9.0, tick == 4
        changed_action, other = policy.step(changed, rewards, other, starts)

        np.testing.assert_array_equal(changed_action[[0, 2]], action[[0, 2]])
        assert (changed_action[1] != action[1]).any()
        assert_same([x[[0, 2]] for x in parts(other)], [x[[0, 2]] for x in parts(expected)])


@POLICIES
def test_an_episode_start_restores_the_rows_own_target_and_clock(kind):
    policy = make_policy(kind)
    state = midway(policy, ticks=5)
    before = state.return_to_go.clone()

    (observation,) = observe()
    action, state = policy.step(observation, np.full(B, 2.0), state, episode_start=[False, True, False])

    assert state.timestep.tolist() == [6, 1, 6]
    assert state.return_to_go.tolist() == [before[0] - 2, TARGETS[1], before[2] - 2]
    assert state.target_return.tolist() == list(TARGETS)
    fresh, _ = policy.step(observation, np.zeros(B), policy.initial_state(B, TARGETS))
    assert_near(action[1], fresh[1], WINDOW[torch.float32])
    assert abs(action[0] - fresh[0]).max() > 1e-3


@POLICIES
def test_the_return_to_go_is_what_the_target_leaves_after_each_reward(kind):
    policy = make_policy(kind)
    state = policy.initial_state(B, np.array(TARGETS))
    for reward, left in ((99.0, 30.0), (4.0, 26.0), (-1.0, 27.0)):  # the first is not read
        _, state = policy.step(*observe(), np.full(B, reward), state)
        assert state.return_to_go[0] == left
    assert state.target_return.tolist() == list(TARGETS) and state.timestep.tolist() == [3] * B


@POLICIES
def test_targets_are_one_number_one_per_row_or_the_configs_first(kind):
    policy = make_policy(kind)
    assert policy.initial_state(B).target_return.tolist() == [CONFIG_TARGET] * B
    assert policy.initial_state(B, 5).target_return.tolist() == [5.0] * B
    assert policy.initial_state(B, torch.tensor(TARGETS)).target_return.tolist() == list(TARGETS)

    same = np.repeat(observe(batch=1)[0], B, axis=0)
    actions, _ = policy.step(same, np.zeros(B), policy.initial_state(B, TARGETS))
    assert abs(actions[0] - actions[1]).max() > 1e-3 and abs(actions[0] - actions[2]).max() > 1e-3


@POLICIES
def test_acting_is_stepping_with_the_state_remembered(kind):
    policy = make_policy(kind)
    for target in (None, 5.0):  # the second reset forgets the first episode
        state = policy.initial_state(B, target)
        policy.reset(batch=B, target_return=target)
        for observation, reward in zip(observe(count=4), (0.0, 0.5, np.arange(3.0), -1.0), strict=True):
            expected, state = policy.step(observation, np.zeros(B) + reward, state)
            np.testing.assert_array_equal(policy.act(observation, reward), expected)


def test_acting_without_a_reset_begins_at_the_configs_target():
    policy, other = make_policy(), make_policy()
    other.reset(batch=B, target_return=CONFIG_TARGET)
    for observation in observe(count=2):
        np.testing.assert_array_equal(policy.act(observation), other.act(observation))


# stable-baselines3's convention


@POLICIES
def test_predict_with_the_reward_is_step(kind):
    policy = make_policy(kind)
    state, predicted_state = policy.initial_state(B), None
    for tick, observation in enumerate(observe(count=4)):
        reward, starts = np.arange(3.0), np.array([tick == 0, tick in (0, 2), tick == 0])
        expected, state = policy.step(observation, reward, state, starts)

        action, predicted_state = policy.predict(
            observation, state=predicted_state, episode_start=starts, deterministic=True, reward=reward
        )

        np.testing.assert_array_equal(action, expected)
        assert_same(parts(predicted_state), parts(state))


@POLICIES
def test_predict_without_a_reward_holds_the_return_to_go_at_its_target(kind):
    policy = make_policy(kind)
    expected, state = policy.initial_state(B), None
    for observation in observe(count=4):
        expected_action, expected = policy.step(observation, np.zeros(B), expected)
        action, state = policy.predict(observation, state)
        np.testing.assert_array_equal(action, expected_action)
        assert state.return_to_go.tolist() == [CONFIG_TARGET] * B


@POLICIES
def test_predict_takes_a_single_observation_and_gives_a_single_action(kind):
    policy = make_policy(kind)
    state, batched = None, None
    for tick, (observation,) in enumerate(observe(batch=1, count=3)):
        start = np.array([tick == 0])
        expected, batched = policy.predict(observation[None], batched, start)
        action, after = policy.predict(observation, state, start)
        tensor_action, _ = policy.predict(torch.tensor(observation), state, start)
        state = after

        assert action.shape == (A,) and isinstance(action, np.ndarray)
        np.testing.assert_array_equal(action, expected[0])
        assert_same(tensor_action, torch.tensor(action))


def test_predict_is_deterministic_whatever_is_asked():
    policy = make_policy()
    (observation,) = observe()
    first, again = (policy.predict(observation, deterministic=False)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, policy.predict(observation, deterministic=True)[0])


# The state as an object


def test_a_state_is_flat_and_named():
    state = midway(make_policy())
    shapes = {name: tuple(x.shape) for name, x in state.tensors().items()}
    assert shapes == {
        "attention.0.kv": (B, HEADS, DIM, DIM),
        "attention.0.z": (B, HEADS, DIM),
        "attention.1.kv": (B, HEADS, DIM, DIM),
        "attention.1.z": (B, HEADS, DIM),
        "target_return": (B,),
        "return_to_go": (B,),
        "timestep": (B,),
        "previous_action": (B, A),
    }
    assert state.timestep.dtype == torch.int64


@pytest.mark.parametrize("ticks", [0, 1, 37])
def test_a_state_goes_through_safetensors_and_acts_on_bit_for_bit(ticks):
    policy = make_policy()
    state = midway(policy, ticks)

    restored = PolicyState.from_tensors(load(save(state.tensors())))

    assert_same(parts(restored), parts(state))
    for observation in observe(count=5):
        expected, state = policy.step(observation, np.ones(B), state)
        action, restored = policy.step(observation, np.ones(B), restored)
        np.testing.assert_array_equal(action, expected)


def test_from_tensors_is_the_inverse_of_tensors():
    state = midway(make_policy())
    assert_same(parts(PolicyState.from_tensors(state.tensors())), parts(state))


def test_a_state_moves_as_a_whole():
    state = midway(make_policy()).to("meta")
    assert {x.device.type for x in state.tensors().values()} == {"meta"}


def test_the_state_is_as_large_after_2000_steps_as_after_5():
    policy = make_policy()
    (observation,) = observe(batch=1)

    state, sizes = policy.initial_state(1), {}
    for tick in range(1, 2001):
        action, state = policy.step(observation, [0.5], state)
        if tick in (5, 2000):
            sizes[tick] = {name: (x.shape, x.untyped_storage().nbytes()) for name, x in state.tensors().items()}

    assert sizes[5] == sizes[2000]
    assert np.isfinite(action).all() and state.timestep.item() == 2000


# Mistakes


@pytest.mark.parametrize("attention", ["softmax", "none"])
def test_a_recurrent_policy_refuses_a_model_without_a_state(attention):
    with pytest.raises(UserError) as caught:
        RecurrentPolicy(make_checkpoint(attention=attention))
    assert str(caught.value) == (
        f"model.attention {attention} has no recurrent step; use --mode window (WindowPolicy)"
    )


@POLICIES
def test_an_unknown_engine_names_the_known_ones(kind):
    with pytest.raises(UserError, match="unknown engine 'turbo'; known: auto, torch"):
        kind(make_checkpoint(), engine="turbo")


@POLICIES
@pytest.mark.parametrize("shape", [(B + 1, O), (B, O + 1), (B, O, 1), (O,)])
def test_an_observation_of_the_wrong_shape_is_refused(kind, shape):
    policy = make_policy(kind)
    with pytest.raises(ValueError) as caught:
        policy.step(np.zeros(shape), np.zeros(B), policy.initial_state(B))
    assert str(caught.value) == f"observation must be (B, O) = (3, 5), got {shape}"


def test_weights_that_do_not_fit_the_config_are_refused():
    checkpoint = make_checkpoint()
    del checkpoint.weights["head.bias"]
    with pytest.raises(UserError, match="the policy is not sound: the weight 'head.bias' is missing"):
        RecurrentPolicy(checkpoint)


# From disk


@pytest.mark.parametrize("name", ["RecurrentPolicy", "WindowPolicy"])
def test_a_policy_loaded_from_a_run_acts_as_the_one_that_was_saved(name, tmp_path):
    checkpoint, kind = make_checkpoint(), getattr(drl, name)
    folder = checkpoints.save(checkpoint, tmp_path, keep=1)

    expected, from_run, from_folder = kind(checkpoint), kind.load(tmp_path), kind.load(str(folder))

    for observation in observe(count=3):
        action = expected.act(observation, 0.5)
        np.testing.assert_array_equal(from_run.act(observation, 0.5), action)
        np.testing.assert_array_equal(from_folder.act(observation, 0.5), action)


@pytest.mark.parametrize("kind", [BY_TORCH, WindowPolicy, *COMPILED])
@pytest.mark.parametrize(("name", "value", "message"), [
    ("mean", np.nan, "normaliser.mean is not finite"),
    ("std", np.inf, "normaliser.std is not finite"),
    ("std", 0.0, "normaliser.std is not positive"),
    ("std", -1.0, "normaliser.std is not positive"),
    ("blocks.1.mlp.0.weight", np.nan, "the weight blocks.1.mlp.0.weight is not finite"),
])
def test_a_policy_whose_numbers_are_not_finite_is_not_made(kind, name, value, message):
    damaged = make_checkpoint()
    (getattr(damaged.normaliser, name) if name in ("mean", "std") else damaged.weights[name])[-1] = value
    with pytest.raises(UserError) as caught:
        kind(damaged)
    assert str(caught.value) == f"the policy is not sound: {message}"


def test_a_window_whose_action_is_not_finite_gives_none():
    policy = WindowPolicy(make_checkpoint())
    with pytest.raises(ActionError) as caught:
        policy.step(np.array([[1.0] * O, [3e38] * O]), 0.0, policy.initial_state(2))
    assert caught.value.row == 1
