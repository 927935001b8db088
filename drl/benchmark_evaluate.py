"""Evaluation measured: the rate of a roll-out beside that of its physics alone, and beside the loop of one environment
whose window is recomputed at every step. They take turns in one run, and their ratios travel between machines."""

import dataclasses
import functools
import time
from collections.abc import Callable

import numpy as np
import torch

from drl import exported
from drl.benchmark_device import machine, summary
from drl.checkpoint import Checkpoint
from drl.config import Config, ModelConfig, TrainConfig
from drl.data.store import Normaliser, Spaces
from drl.envs import GymnasiumEnvs, make_envs
from drl.model import make
from drl.players import Policy, groups, players
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.progress import progress
from drl.rollout import play, rollout
from drl.versions import versions

WARMUP = 30  # steps of the window loop: its window is full after 20


def evaluate(
    *, environment: str, run: str, episodes: int, environments: int, engine: str, window_steps: int, repeats: int
) -> str:
    """Environment steps per second of whole evaluations, as Markdown.

    Args:
        environment: Gymnasium id.
        run: folder of a run, a checkpoint or an exported policy; empty: random weights, whose episodes are short.
        window_steps: environment steps of the window loop in each repeat.

    Raises:
        UserError: `run` holds no recurrent policy, or the environment does not fit it.
    """
    torch.set_num_threads(1)
    checkpoint = exported.load(run)[0] if run else synthetic(environment, ModelConfig())
    config = checkpoint.config
    policy = RecurrentPolicy(checkpoint, "cpu", engine)
    asked = {"target_return": (config.evaluate.target_returns or [3600.0])[0], "seed": config.evaluate.seed}
    ours = functools.partial(rollout, policy, environment, episodes=episodes, environments=environments, **asked)
    played = ours(label="warming up")
    actions = recorded(policy, environment, episodes, **asked)
    softmax = synthetic(environment, dataclasses.replace(config.model, attention="softmax"))
    loop = window_loop(WindowPolicy(softmax), environment, **asked)
    for _ in range(WARMUP):
        next(loop)
    rates: dict[str, list[float]] = {"physics": [], "ours": [], "window": []}
    with progress(repeats, "repeat", "evaluating") as bar:
        for _ in range(repeats):
            rates["physics"].append(_rate(physics_alone(environment, actions, asked["seed"])))
            rates["ours"].append(_rate(lambda: ours(label="rolling out").lengths.sum()))
            rates["window"].append(_rate(lambda: sum(1 for _ in zip(range(window_steps), loop))))
            bar.update()
    weights = f"the policy of {run}" if run else "random weights, whose episodes are short"
    low, high = played.lengths.min(), played.lengths.max()
    return "\n".join([
        f"| {environment} | environment steps/s | 10% to 90% | ratio of ours to it | 10% to 90% |",
        "|---|---|---|---|---|",
        _row("physics alone, the same actions", rates["physics"], rates["ours"]),
        _row(f"policy and physics, engine {policy.engine}", rates["ours"], rates["ours"]),
        _row("one environment, softmax window of 20 recomputed by torch", rates["window"], rates["ours"]),
        "",
        f"{repeats} repeats of {episodes} episodes of {low} to {high} steps, mean {played.lengths.mean():.0f}: "
        f"{weights}; {window_steps} steps of the window. Model: width {config.model.width}, {config.model.layers} "
        f"layers, {config.model.heads} heads. {machine()}",
    ])


def synthetic(environment: str, model: ModelConfig) -> Checkpoint:
    """A policy of random weights that fits the environment."""
    envs = make_envs(environment, 1)
    observation_dim, box = envs.observation_space.shape[0], envs.action_space
    envs.close()
    sampling = "state_passing" if model.attention == "linear" else "windows"
    config = Config(dataset="synthetic", environment=environment, model=model, train=TrainConfig(sampling=sampling))
    weights = make(model, observation_dim, box.shape[0]).state_dict()
    normaliser = Normaliser(np.zeros(observation_dim, np.float32), np.ones(observation_dim, np.float32))
    spaces = Spaces(environment, observation_dim, box.low, box.high)
    return Checkpoint(config, 0, weights, normaliser, spaces, "", versions(), {})


def recorded(
    policy: Policy, environment: str, episodes: int, *, target_return: float, seed: int
) -> list[np.ndarray]:
    """The actions of each episode of a roll-out, (length, A)."""
    shared = groups(policy, episodes, environments=episodes, threads=1)
    envs = make_envs(environment, max(map(len, shared)))
    kept: list[list[np.ndarray]] = [[] for _ in range(episodes)]
    for group in shared:
        act = players(policy, group, target_return)

        def remembered(observations, rewards, rows, act=act, group=group):
            actions = act(observations, rewards, rows)
            for episode, action in zip(group[rows], actions, strict=True):
                kept[episode].append(action)
            return actions

        for _ in play(remembered, envs, group, seed):
            pass
    envs.close()
    return [np.stack(actions) for actions in kept]


def physics_alone(environment: str, actions: list[np.ndarray], seed: int) -> Callable[[], int]:
    """What steps the environments through recorded actions, open loop, on all cores, each as long as it lasted. It
    returns the number of steps."""
    lengths = np.array([len(each) for each in actions])
    ticks = []
    for t in range(lengths.max()):
        rows = np.flatnonzero(lengths > t)
        ticks.append((rows, np.stack([actions[row][t] for row in rows])))
    envs = make_envs(environment, len(actions))

    def replay() -> int:
        envs.reset(np.arange(len(actions)), [seed + i for i in range(len(actions))])
        for rows, chosen in ticks:
            envs.step(rows, chosen)
        return int(lengths.sum())

    return replay


def window_loop(policy: WindowPolicy, environment: str, *, target_return: float, seed: int):
    """One environment, one row, one step for each `next`; episode after episode."""
    envs, row = GymnasiumEnvs(environment, 1), np.array([0])
    while True:
        observation, reward = envs.reset(row, [seed]), np.zeros(1)
        state, over = policy.initial_state(1, target_return), False
        while not over:
            action, state = policy.step(observation, reward, state)
            observation, reward, terminated, truncated = envs.step(row, action)
            over = terminated[0] or truncated[0]
            yield
        seed += 1


def _rate(work: Callable[[], int]) -> float:
    """Steps per second of `work`, which returns how many it made."""
    start = time.perf_counter()
    steps = work()
    return steps / (time.perf_counter() - start)


def _row(label: str, rates: list[float], ours: list[float]) -> str:
    low, median, high = summary(rates)
    ratio_low, ratio, ratio_high = summary(np.array(ours) / rates)
    return (f"| {label} | {median:.0f} | {low:.0f} to {high:.0f} | {ratio:.2f} | {ratio_low:.2f} to "
            f"{ratio_high:.2f} |")
