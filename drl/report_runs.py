"""Runs of a report, from their folders: what `drl train`, `drl evaluate` and `drl suite` wrote there."""

from pathlib import Path
from typing import Any

import numpy as np

from drl import checkpoint as checkpoints
from drl import evaluate as evaluation
from drl import foreign, intact, scores
from drl.checkpoint_files import CARD
from drl.config import Config
from drl.config_files import read_config
from drl.errors import UserError, shown
from drl.progress import progress
from drl.report_pack import Pack, Result, Run, thinned

LOG = 1 << 30  # bytes of metrics.jsonl, at most
MANY = 100  # runs from which on the reading shows its progress
SUITE = "suite.json"
TIMES = {"variant": str, "task": str, "work": str, "device": str, "cores": int, "seconds": float}  # of a row of it
TOLERANCE = 0.01  # of a score, within which returns are those that it was made of


def gather(root: Path) -> Pack:
    """Every evaluated run below a folder, of any layout. Returns are kept of the evaluations that a run is for: its
    last checkpoint, acted as its config says, asked for what it says, of the most episodes; of the others the score.

    Raises:
        UserError: there is none, or a file of one is not what this package wrote.
    """
    folders = sorted(path.parent for path in root.rglob(evaluation.FILE))
    if not folders:
        raise UserError(f"no evaluated run under {root}; type: drl evaluate runs/hopper/medium-replay/seed-0")
    runs, datasets = [], {}
    with progress(len(folders), "runs", "reading", silent=len(folders) < MANY) as bar:
        for folder in folders:
            run = _run(folder, root)
            if run.config.dataset not in datasets and (known := _dataset_return(folder)) is not None:
                datasets[run.config.dataset] = known
            runs.append(run)
            bar.update()
    return Pack(_typed(root), runs, datasets, _jobs(root / SUITE))


def _typed(root: Path) -> str:
    """The folder as someone else may type it: no path of this machine."""
    if root.is_absolute() and root.is_relative_to(Path.cwd()):
        root = root.relative_to(Path.cwd())
    return root.name if root.is_absolute() or ".." in root.parts else root.as_posix()


def _run(folder: Path, root: Path) -> Run:
    config = read_config(folder / "config.yaml")
    told = [result for result in evaluation.read(folder, evaluation.SCORED) if result["normalized_score"] is not None
            and config.environment in ("", result["environment"])]
    results = [_result(result, config, kept) for result, kept in zip(told, _kept(told, config), strict=True)]
    failures = [_failed(failure) for failure in evaluation.read_failures(folder)]
    return Run(folder.relative_to(root).as_posix(), config, results, failures, *thinned(*losses(folder)))


def _kept(told: list[dict[str, Any]], config: Config) -> list[bool]:
    mode = evaluation.resolve_mode(config.evaluate.mode, config.model.attention)
    order = [(result["mode"] == mode and result["target_return"] in config.evaluate.target_returns, result["step"],
              result["episodes"]) for result in told]
    return [each[0] and each == max(order) for each in order]


def _result(told: dict[str, Any], config: Config, keeps: bool) -> Result:
    score, returns = told["normalized_score"], told.get("returns")
    reference = scores.reference(config.environment)
    kept = keeps and reference and foreign.fits(returns, list[float]) and returns and abs(
        scores.normalized_score(np.array(returns, float), reference).mean() - score) < TOLERANCE
    return Result(told["step"], told["mode"], float(told["target_return"]), told["episodes"], min(told["seeds"] or [0]),
                  told["versions"], returns if kept else [], float(score))


def _failed(failure: dict[str, Any]) -> tuple[int, str]:
    when = failure.get("time") if foreign.fits(failure.get("time"), str) else "when is not known"
    told = (f"step {failure['step']}, {failure['mode']}, target {failure['target_return']:g}, {failure['finished']} of "
            f"{failure['episodes']} episodes finished, {when}: {failure['reason']}")
    return failure["step"], told[: foreign.TEXT]


def losses(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Updates and training loss of a run, (lines,) each; nothing where there is no log.

    Raises:
        UserError: a line of the log, but for a last one that is torn, is not what `drl train` writes.
    """
    path = folder / "metrics.jsonl"
    content = foreign.read_bytes(path, "log", LOG) if path.exists() else b""
    try:
        lines = [foreign.parse_json(line) for line in content.split(b"\n")[:-1]]
        kept = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
        kept = np.array(kept, float).reshape(-1, 2)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not what drl train logs ({shown(str(error))}); name a folder without it") from error
    return kept[:, 0], kept[:, 1]


def _dataset_return(folder: Path) -> float | None:
    """Mean return of the episodes of a run's dataset, as its newest checkpoint says it; None where there is none."""
    if not checkpoints.exists(folder):
        return None
    card = intact.read_json(checkpoints.find(folder) / CARD, "checkpoint")
    known = card.get("dataset_return")
    return round(float(known), 2) if foreign.fits(known, float) else None


def _jobs(path: Path) -> list[dict[str, Any]]:
    """What a suite's file says of the time that its jobs took."""
    if not path.exists():
        return []
    what = f"suite file {path}"
    told = foreign.checked(intact.read_sealed(path, "suite"), what, {"rows": list[dict]})["rows"]
    return [{"name": f"{row['variant']} {row['task']}", "work": row["work"], "seconds": round(row["seconds"], 1),
             "hardware": f"{row['device']}, {row['cores']} CPU cores"}
            for row in (foreign.checked(row, f"{what} (one of its rows)", TIMES) for row in told)]
