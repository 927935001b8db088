"""Evaluation: N seeded episodes in lockstep, one policy, one score.

Episode i resets with seed + i and plays in slot i % LANE of a lane of fixed width, whatever the number of
environments side by side: on the CPU every matrix product then has one shape, and returns are bit-equal for 1, 4
and 100 environments and for any number of threads. A lane whose episodes are over costs nothing.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from drl import scores
from drl.envs import check_fit, make_envs
from drl.errors import UserError
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.progress import progress
from drl.versions import versions

LANE = 16
MODES = {"recurrent": RecurrentPolicy, "window": WindowPolicy}
FILE = "evaluation.json"


class Rollouts(NamedTuple):
    """One entry per episode.

    Attributes:
        returns: undiscounted, in the environment's units, (N,) float64.
        lengths: steps, (N,).
        seeds: environment seeds, (N,).
    """

    returns: np.ndarray
    lengths: np.ndarray
    seeds: np.ndarray


def resolve_mode(mode: str, attention: str) -> str:
    """What "auto" means for this attention: recurrent where there is a state to carry."""
    return mode if mode != "auto" else ("recurrent" if attention == "linear" else "window")


def rollout(
    policy: RecurrentPolicy | WindowPolicy,
    environment: str,
    *,
    target_return: float,
    episodes: int,
    seed: int,
    environments: int = 100,
    threads: int | None = None,
    label: str = "evaluating",
) -> Rollouts:
    """Play `episodes` episodes, at most `environments` of them side by side.

    Raises:
        UserError: the environment does not fit the policy, or the policy produced an action that is not finite.
    """
    check_fit(environment, policy.spaces, "the checkpoint")
    count = min(environments, episodes)
    envs = make_envs(environment, count, threads)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, int)
    with _one_thread(), contextlib.closing(envs), progress(episodes, "episode", label) as bar:
        for first in range(0, episodes, count):
            batch = np.arange(first, min(first + count, episodes))
            for episode, result, length in _play(policy, envs, batch, seed, target_return):
                returns[episode], lengths[episode] = result, length
                bar.update()
    return Rollouts(returns, lengths, seed + np.arange(episodes))


def _play(policy, envs, episodes: np.ndarray, seed: int, target_return: float) -> Iterator[tuple[int, float, int]]:
    """Yield (episode, return, length) of each of `episodes` as it ends. Row r of `envs` plays episodes[r]."""
    n, low, high = len(episodes), envs.action_space.low, envs.action_space.high
    rows = np.arange(n)
    lane, slot, width, lanes = _seats(episodes, policy.device)
    observation = np.zeros((lanes, width, *envs.observation_space.shape))
    observation[lane, slot] = envs.reset(rows, list(seed + episodes))
    reward = np.zeros((lanes, width))
    states = [policy.initial_state(width, target_return) for _ in range(lanes)]
    action = np.zeros((lanes, width, len(low)), np.float32)
    total, steps = np.zeros(n), 0
    while len(rows):
        for i in np.unique(lane[rows]):
            action[i], states[i] = policy.step(observation[i], reward[i], states[i])
        chosen = action[lane[rows], slot[rows]]
        if not np.isfinite(chosen).all():
            bad = episodes[rows[~np.isfinite(chosen).all(1)][0]]
            raise UserError(f"the policy's action in episode {bad}, step {steps} is not finite; the weights or the "
                            "observation are damaged")
        result = envs.step(rows, np.clip(chosen, low, high))
        observation[lane[rows], slot[rows]] = result.observations
        reward[lane[rows], slot[rows]] = result.rewards
        total[rows] += result.rewards
        steps += 1
        over = result.terminated | result.truncated
        for row in rows[over]:
            yield int(episodes[row]), float(total[row]), steps
        rows = rows[~over]


def _seats(episodes: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(lane, slot) of each episode, the lanes' width and their number; a GPU takes all rows at once."""
    if torch.device(device).type != "cpu":
        return np.zeros(len(episodes), int), np.arange(len(episodes)), len(episodes), 1
    lane = episodes // LANE - episodes[0] // LANE
    return lane, episodes % LANE, LANE, int(lane[-1]) + 1


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small matrices are faster on one thread, and the bits do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evaluate(
    policy: RecurrentPolicy | WindowPolicy, *, mode: str, step: int, environment: str = "", label: str = "evaluating"
) -> list[dict[str, Any]]:
    """One result per target return of the policy's config: a dict of plain numbers, ready for JSON.

    `normalized_score` is None where D4RL has no reference for the environment.
    """
    config = policy.config.evaluate
    environment = environment or policy.config.environment
    reference = scores.reference(environment)
    results = []
    for target in config.target_returns:
        start = time.perf_counter()
        played = rollout(
            policy,
            environment,
            target_return=target,
            episodes=config.episodes,
            seed=config.seed,
            environments=config.environments,
            label=label,
        )
        seconds = time.perf_counter() - start
        score = None if reference is None else scores.normalized_score(played.returns, reference)
        results.append(
            {
                "environment": environment,
                "dataset": policy.config.dataset,
                "seed": policy.config.seed,
                "step": step,
                "mode": mode,
                "target_return": target,
                "episodes": config.episodes,
                "normalized_score": None if score is None else float(score.mean()),
                "normalized_score_std": None if score is None else float(score.std()),
                "return_mean": float(played.returns.mean()),
                "return_std": float(played.returns.std()),
                "episode_length": float(played.lengths.mean()),
                "env_steps_per_second": float(played.lengths.sum() / seconds),
                "reference": None if reference is None else reference._asdict() | {"source": scores.REFERENCE_SOURCE},
                "versions": versions(),
                "returns": played.returns.tolist(),
                "lengths": played.lengths.tolist(),
                "seeds": played.seeds.tolist(),
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """One line per result, under a header, for a terminal."""
    names = f"{'environment':<16}{'mode':<11}{'target':>8}{'episodes':>9}{'return':>10}{'+-':>8}"
    lines = [f"{names}{'length':>8}{'score':>8}"]
    for r in results:
        score = "-" if r["normalized_score"] is None else f"{r['normalized_score']:.1f}"
        lines.append(f"{r['environment']:<16}{r['mode']:<11}{r['target_return']:>8g}{r['episodes']:>9}"
                     f"{r['return_mean']:>10.1f}{r['return_std']:>8.1f}{r['episode_length']:>8.1f}{score:>8}")
    return "\n".join(lines)


def tags(results: list[dict[str, Any]]) -> dict[str, float]:
    """The eval/* values of an evaluation for drl.tracker; with several targets each gets its suffix."""
    names = ("normalized_score", "normalized_score_std", "return_mean", "return_std", "episode_length",
             "env_steps_per_second")
    return {
        f"eval/{name}" + (f"/target-{result['target_return']:g}" if len(results) > 1 else ""): result[name]
        for result in results
        for name in names
        if result[name] is not None
    }


def store(results: list[dict[str, Any]], run: Path) -> Path:
    """Put results into <run>/evaluation.json beside those of another step, mode, target, environment or seed."""
    path = run / FILE
    earlier = read(run)
    fresh = {_key(result) for result in results}
    kept = [result for result in earlier if _key(result) not in fresh]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"format": 1, "results": kept + results}) + "\n")
    os.replace(partial, path)
    return path


def _key(result: dict[str, Any]) -> tuple:
    names = ("environment", "step", "mode", "target_return", "episodes")
    return (*(result[name] for name in names), result["seeds"][0])


def read(run: Path) -> list[dict[str, Any]]:
    """The results in <run>/evaluation.json; none if there is no such file.

    Raises:
        UserError: the file is not what `store` writes.
    """
    path = run / FILE
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an evaluation ({error}); delete it and type: drl evaluate {run}") from error
