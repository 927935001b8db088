"""Evaluation: N seeded episodes, one policy, one score; results as the world sees them, and their file."""

import json
import os
import time
from pathlib import Path
from typing import Any

from drl import scores
from drl.errors import UserError
from drl.foreign import checked, read_json
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.rollout import rollout
from drl.versions import versions

MODES = {"recurrent": RecurrentPolicy, "window": WindowPolicy}
FILE = "evaluation.json"
SIZE = 1 << 28  # bytes of it, at most
KINDS = {"environment": str, "dataset": str, "seed": int, "step": int, "mode": str, "target_return": float,
         "episodes": int, "normalized_score": float | None, "versions": dict[str, str], "seeds": list[int]}
KEY = ("environment", "step", "mode", "target_return", "episodes", "seeds")  # tells one result of a run from another


def resolve_mode(mode: str, attention: str) -> str:
    """What "auto" means for this attention: recurrent where there is a state to carry."""
    return mode if mode != "auto" else ("recurrent" if attention == "linear" else "window")


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
                "engine": policy.engine,
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
    earlier = read(run, *KEY)
    fresh = {_key(result) for result in results}
    kept = [result for result in earlier if _key(result) not in fresh]
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # it may be a link to another file
    partial.write_text(json.dumps({"format": 1, "results": kept + results}) + "\n")
    os.replace(partial, path)
    return path


def _key(result: dict[str, Any]) -> tuple:
    *names, seeds = KEY
    return (*(result[name] for name in names), *result[seeds][:1])


def read(run: Path, *needed: str) -> list[dict[str, Any]]:
    """The results in <run>/evaluation.json, each with what is `needed` of KINDS; none if there is no such file.

    Raises:
        UserError: the file is not what `store` writes.
    """
    path = run / FILE
    if not path.exists():
        return []
    try:
        results = checked(read_json(path, "evaluation", SIZE), "it", {"results": list[dict]})["results"]
        for result in results:
            checked(result, "a result", {name: KINDS[name] for name in needed})
    except UserError as error:
        raise UserError(f"{path} is not an evaluation ({error}); delete it and type: drl evaluate {run}") from error
    return results
