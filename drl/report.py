"""Report: from the JSON of finished runs to a table and a figure.

A variant is what distinguishes two runs besides their seed: dataset, how it was trained, acting mode, updates, target
return. A cell is the mean over seeds of each seed's mean score at its final checkpoint. An evaluation that failed is in
no cell, and told under the table.
"""

import dataclasses
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drl import evaluate as evaluation
from drl import figures, foreign, scores
from drl.config import Config, ModelConfig, TrainConfig, read_config
from drl.errors import UserError, shown

BOOTSTRAP_SEED = 0
SMOOTH = 5
METRICS = 1 << 30  # bytes of a log, at most
SAID = ("attention", "sampling", "updates", "compile", "log_every", "checkpoint_every", "keep_checkpoints",
        "evaluate_every")


@dataclass
class Row:
    """One variant: its name and what each seed scored."""

    dataset: str
    variant: str
    mode: str
    updates: int
    target_return: float
    episodes: int
    versions: dict[str, set[str]] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def values(self) -> np.ndarray:
        return np.array([self.scores[seed] for seed in sorted(self.scores)])

    @property
    def interval(self) -> tuple[float, float]:
        return scores.stratified_interval([self.values], generator=np.random.default_rng(BOOTSTRAP_SEED))


def report(runs: Path, figure: Path | None = None) -> str:
    """Markdown table of every finished run under `runs`; also draws `figure` (PNG) where asked.

    Raises:
        UserError: there is no evaluated run, runs of different MuJoCo versions would share a table, or matplotlib
            is missing for the figure.
    """
    found = [(path.parent, read_config(path.parent / "config.yaml")) for path in sorted(runs.rglob(evaluation.FILE))]
    rows = _rows(found)
    failures = [f"{run}: {_failed(failure)}" for run, _ in found for failure in evaluation.read_failures(run)]
    if failures and not rows:
        raise UserError(f"no scored run under {runs}, and evaluations that failed, {len(failures)}; {failures[0]}")
    if not rows:
        raise UserError(f"no evaluated run under {runs}; type: drl evaluate runs/hopper/medium-replay/seed-0")
    mujoco = set().union(*(row.versions.get("mujoco", {"unknown"}) for row in rows))
    if len(mujoco) > 1:
        raise UserError(f"runs under {runs} were scored with MuJoCo {' and '.join(sorted(mujoco))}: different physics "
                        "do not share a table; name a folder with one of them")
    if figure is not None:
        _draw(rows, found, figure)
    if not failures:
        return _table(rows)
    return "\n".join([_table(rows), "", f"Evaluations that failed and are in no cell, {len(failures)}:", "",
                      *(f"- {failure}" for failure in failures)])


def _failed(failure: dict[str, Any]) -> str:
    return (f"step {failure['step']}, {failure['mode']}, target {failure['target_return']:g}, {failure['finished']} of "
            f"{failure['episodes']} episodes finished, {failure['time']}: {failure['reason']}")


def _rows(found: list[tuple[Path, Config]]) -> list[Row]:
    rows: dict[tuple, Row] = {}
    for run, config in found:
        results = evaluation.read(run, evaluation.SCORED)
        final = max((told["step"] for told in [*results, *evaluation.read_failures(run)]), default=0)
        for result in results:
            if result["step"] != final or result["normalized_score"] is None:
                continue
            key = (result["dataset"], _variant(config), result["mode"], final, result["target_return"],
                   result["episodes"])
            row = rows.setdefault((*key, result["versions"].get("mujoco")), Row(*key))
            for name, version in result["versions"].items():
                row.versions.setdefault(name, set()).add(version)
            row.scores[result["seed"]] = result["normalized_score"]
    return sorted(rows.values(), key=lambda row: (row.dataset, -row.values.mean()))


def _variant(config: Config) -> str:
    """How it was trained: attention, sampling, and every option of model and training that is not the default, which
    for the precision is float32 here."""
    how = {"state_passing": "state passing", "windows": f"windows of {config.train.context}"}
    parts = [config.model.attention, how[config.train.sampling]]
    plain = TrainConfig(precision="float32")
    for section, given, default in (("model", config.model, ModelConfig()), ("train", config.train, plain)):
        parts += [
            f"{section}.{f.name} {getattr(given, f.name)}"
            for f in dataclasses.fields(given)
            if f.name not in SAID and getattr(given, f.name) != getattr(default, f.name)
        ]
    return ", ".join(parts)


def _table(rows: list[Row]) -> str:
    lines = [
        "| dataset | trained | acted | updates | target | seeds x episodes | score | 95% interval | each seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row.interval
        each = ", ".join(f"{value:.1f}" for value in row.values)
        lines.append(
            f"| {row.dataset} | {row.variant} | {row.mode} | {row.updates} | {row.target_return:g} "
            f"| {len(row.scores)} x {row.episodes} | **{row.values.mean():.1f}** | {low:.1f} to {high:.1f} | {each} |"
        )
    names = sorted(set().union(*(row.versions for row in rows)))
    versions = ", ".join(
        f"{name} {' and '.join(sorted(set().union(*(row.versions.get(name, ()) for row in rows))))}" for name in names
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Normalised score: 0 is random, 100 expert, by the reference returns of {scores.REFERENCE_SOURCE}. Final "
            "checkpoint, mean over seeds; the interval is a 95% bootstrap over seeds.",
            f"Versions: {versions}.",
        ]
    )


def _draw(rows: list[Row], found: list[tuple[Path, Config]], figure: Path) -> None:
    pyplot = figures.pyplot("--figure")
    colours = dict(zip(sorted({_variant(config) for _, config in found}), pyplot.cm.tab10.colors * 9, strict=False))
    several = len({row.dataset for row in rows}) > 1
    labels = ["\n".join([*([row.dataset] if several else []), *textwrap.wrap(row.variant, 44), f"acted {row.mode}"])
              for row in rows]
    canvas, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, max(3.6, 1.2 + 0.9 * len(rows))), layout="constrained", width_ratios=(3, 2)
    )
    position = np.arange(len(rows))[::-1]
    means = np.array([row.values.mean() for row in rows])
    spread = np.abs(np.array([row.interval for row in rows]).T - means)
    shades = [(*colours[row.variant], 0.55) for row in rows]
    left.barh(position, means, xerr=spread, height=0.6, color=shades, capsize=4)
    for y, row in zip(position, rows, strict=True):
        left.plot(row.values, [y] * len(row.values), "o", color="black", markersize=4)
    left.set_yticks(position, labels)
    left.set(xlabel="normalised score: 0 random, 100 expert; dots are seeds, whiskers 95% intervals",
             title=rows[0].dataset if not several else "")
    for run, config in found:
        right.plot(*_losses(run), color=colours[_variant(config)], linewidth=1)
    right.set(xlabel="gradient updates", ylabel=f"training loss, mean of {SMOOTH} lines of the log", yscale="log",
              title="colours as on the left")
    figures.save(canvas, figure)


def _losses(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Updates and training loss of a run, smoothed."""
    path = run / "metrics.jsonl"
    content = foreign.read_bytes(path, "log", METRICS) if path.exists() else b""
    try:
        lines = [foreign.parse_json(line) for line in content.split(b"\n")[:-1]]  # a last line may be torn
        kept = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
        kept = np.array(kept, float).reshape(-1, 2)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not what drl train logs ({shown(str(error))}); name a folder without it") from error
    width = min(SMOOTH, len(kept)) or 1
    steps, losses = (np.convolve(column, np.ones(width) / width, mode="valid") if len(kept) else column
                     for column in kept.T)
    return steps, losses
