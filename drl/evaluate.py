"""Evaluation: N seeded episodes, one policy, one score; results as the world sees them, and their file.

An evaluation of which an episode could not be played has no score; the file counts it among the failures.
"""

import datetime
import time
from pathlib import Path
from typing import Any

from drl import disk, intact, scores
from drl.config import Config
from drl.errors import UserError
from drl.faults import EvaluationFailed
from drl.foreign import checked
from drl.policy import RecurrentPolicy, WindowPolicy
from drl.rollout import rollout
from drl.versions import versions

MODES = {"recurrent": RecurrentPolicy, "window": WindowPolicy}
FILE = "evaluation.json"
SIZE = 1 << 28  # bytes of it, at most
ONE = {"environment": str, "step": int, "mode": str, "target_return": float, "episodes": int}
RESULT = ONE | {"seeds": list[int]}
SCORED = {"dataset": str, "seed": int, "normalized_score": float | None, "versions": dict[str, str]}  # for a table
FAILURE = ONE | {"environment_seed": int, "finished": int, "reason": str}


def resolve_mode(mode: str, attention: str) -> str:
    """What "auto" means for this attention: recurrent where there is a state to carry."""
    return mode if mode != "auto" else ("recurrent" if attention == "linear" else "window")


def evaluate(
    policy: RecurrentPolicy | WindowPolicy, *, mode: str, step: int, environment: str = "", label: str = "evaluating"
) -> list[dict[str, Any]]:
    """One result per target return of the policy's config: a dict of plain numbers, ready for JSON.

    `normalized_score` is None where D4RL has no reference for the environment.

    Raises:
        EvaluationFailed: of one target return, not all episodes could be played; `results` has those before it.
    """
    config = policy.config.evaluate
    environment = environment or policy.config.environment
    reference = scores.reference(environment)
    results = []
    for target in config.target_returns:
        start = time.perf_counter()
        try:
            played = rollout(
                policy,
                environment,
                target_return=target,
                episodes=config.episodes,
                seed=config.seed,
                environments=config.environments,
                patience=config.patience,
                label=label,
            )
        except EvaluationFailed as failure:
            failure.results = results
            raise
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
    """One line per result, under a header, and what the score means, for a terminal."""
    names = f"{'environment':<16}{'mode':<11}{'target':>8}{'episodes':>9}{'return':>10}{'+-':>8}"
    lines = [f"{names}{'length':>8}{'score':>8}"]
    for r in results:
        score = "-" if r["normalized_score"] is None else f"{r['normalized_score']:.1f}"
        lines.append(f"{r['environment']:<16}{r['mode']:<11}{r['target_return']:>8g}{r['episodes']:>9}"
                     f"{r['return_mean']:>10.1f}{r['return_std']:>8.1f}{r['episode_length']:>8.1f}{score:>8}")
    return "\n".join([*lines, "score: 0 is random, 100 expert, by D4RL's reference returns"])


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
    """Put results into <run>/evaluation.json beside those of another step, mode, target, environment or seed; that the
    same evaluation failed before is forgotten.

    Raises:
        UserError: the file there is damaged, a number is not finite, or the disk refuses; the file is as it was.
    """
    return _put(results, [], run)


def store_failure(failure: EvaluationFailed, run: Path, step: int, mode: str) -> Path:
    """Count a failed evaluation in <run>/evaluation.json, and put there what it scored before.

    Raises:
        UserError: as `store`.
    """
    told = {
        "environment": failure.environment,
        "step": step,
        "mode": mode,
        "target_return": failure.target_return,
        "episodes": failure.episodes,
        "environment_seed": failure.seed,
        "finished": failure.finished,
        "reason": failure.reason,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return _put(failure.results, [told], run)


def _put(results: list[dict[str, Any]], failures: list[dict[str, Any]], run: Path) -> Path:
    path, done = run / FILE, set(map(_key, results))
    cure = "make room, or have the folder writable, then type the same again"
    with disk.refusal_told(run, "the evaluation", cure), disk.locked(run):
        before, replaced = _read(run), done | set(map(_key, failures))
        fields = {
            "format": 1,
            "results": [result for result in before["results"] if _key(result) not in done] + results,
            "failures": [failure for failure in before["failures"] if _key(failure) not in replaced] + failures,
        }
        try:
            needed = len(intact.sealed(fields))
        except ValueError as error:
            raise UserError(f"the evaluation is not put into {path}: a number of it is not finite; look at its returns "
                            "with: drl evaluate --json") from error
        with disk.refusal_told(run, "the evaluation", cure, needed):
            intact.write_sealed(path, fields)
    return path


def _key(told: dict[str, Any]) -> tuple:
    """What tells evaluations apart, successes and failures alike."""
    return (*(told[name] for name in ONE), *(told["seeds"][:1] if "seeds" in told else [told["environment_seed"]]))


def is_stored(run: Path, config: Config, step: int) -> bool:
    """Whether the results that `evaluate` gives for a config after `step` updates are in <run>/evaluation.json."""
    asked, mode = config.evaluate, resolve_mode(config.evaluate.mode, config.model.attention)
    keys = {(config.environment, step, mode, target, asked.episodes, asked.seed) for target in asked.target_returns}
    return keys <= set(map(_key, read(run)))


def read(run: Path, kinds: dict[str, Any] = {}) -> list[dict[str, Any]]:
    """The results in <run>/evaluation.json; none if there is no such file.

    Args:
        kinds: what each result must have beyond what tells it from others, as `foreign.checked` takes it.

    Raises:
        UserError: the file is not what `store` writes.
    """
    return _read(run, kinds)["results"]


def read_failures(run: Path) -> list[dict[str, Any]]:
    """The evaluations that failed and did not succeed since, the last failure of each. Raises UserError as `read`."""
    return _read(run)["failures"]


def _read(run: Path, kinds: dict[str, Any] = {}) -> dict[str, list[dict[str, Any]]]:
    path, cure = run / FILE, f"move it away and type: drl evaluate {run}"
    if not path.exists():
        return {"results": [], "failures": []}
    what = f"evaluation file {path}"
    try:
        fields = intact.read_sealed(path, "evaluation", unsealed=True, most=SIZE)
        told = checked({"failures": []} | fields, what, {"results": list[dict], "failures": list[dict]})
        for name, needed in (("results", RESULT | kinds), ("failures", FAILURE)):
            for one in told[name]:
                checked(one, f"{what} (one of its {name})", needed)
    except UserError as error:
        raise UserError(f"{error}; {cure}") from error
    return told
