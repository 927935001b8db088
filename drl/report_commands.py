"""What to type to make the runs of a report again."""

import re
import shlex

from drl import trees
from drl.config import Config
from drl.config_files import unread
from drl.report_pack import Run
from drl.report_rows import Row

NOT_TYPED = {"dataset", "environment", "seed", "device", "evaluate.environments", "evaluate.patience"}  # as options
COLLECTED = re.compile(r"drl/([\w-]+/[\w-]+)-v0")
UNPLAIN = re.compile(r"[^\w.-]+")


def commands(root: str, rows: list[Row]) -> list[str]:
    """Lines of shell: datasets, then runs and scores of each variant, then the report. Datasets whose runs differ in
    nothing else share a loop; unfinished runs are left out."""
    runs: dict[tuple[str, str], tuple[Run, set[str]]] = {}
    for row in rows:
        for run, result in zip(row.runs, row.results, strict=True):
            if row.step == run.config.train.updates:
                _, scored = runs.setdefault((row.variant, run.name), (run, set()))
                scored.add(f"--mode {result.mode} --episodes {result.episodes} --seed {result.first_seed}")
    seeds: dict[tuple, list[int]] = {}
    for (variant, _), (run, scored) in runs.items():
        how = (variant, _options(run), run.config.model.dropout > 0, tuple(sorted(scored)))
        seeds.setdefault((run.config.dataset, *how), []).append(run.config.seed)
    loops: dict[tuple, list[str]] = {}
    for (dataset, *how), numbers in seeds.items():
        loops.setdefault((*how, tuple(sorted(set(numbers)))), []).append(dataset)
    collected = sorted({found[1] for run, _ in runs.values() if (found := COLLECTED.fullmatch(run.config.dataset))})
    lines = [f"for task in {' '.join(collected)}; do drl data collect $task; done"] * bool(collected)
    for how, datasets in loops.items():
        lines += _loop(root, datasets, *how)
    return [f"    {line}" for line in [*lines, f"drl report {shlex.quote(root)}"]]


def _loop(root: str, datasets: list[str], variant: str, options: str, dropout: bool, scored: tuple[str, ...],
          seeds: tuple[int, ...]) -> list[str]:
    folder = f"{shlex.quote(root)}/{UNPLAIN.sub('-', variant)}/$dataset"
    each = f"for seed in {' '.join(map(str, seeds))}; do"
    train = f"drl train --dataset $dataset {options}".rstrip()
    together = f"{train} --run {folder} --seeds {' '.join(map(str, seeds))}"
    alone = f"{each} {train} --run {folder}/seed-$seed --seed $seed; done"  # on a GPU dropout keeps seeds apart
    return [f"for dataset in {' '.join(map(shlex.quote, sorted(datasets)))}; do",
            f"    {alone if dropout else together}",
            *(f"    {each} drl evaluate {folder}/seed-$seed {how}; done" for how in scored),
            "done"]


def _options(run: Run) -> str:
    """What a run was trained with, as typed."""
    defaults = trees.flat(Config(dataset="").to_dict())
    given = {key: value for key, value in trees.flat(run.config.to_dict()).items()
             if value != defaults[key] and key not in NOT_TYPED and key not in unread(run.config)}
    if run.config.environment and not COLLECTED.fullmatch(run.config.dataset):
        given["environment"] = run.config.environment
    return " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in given.items())
