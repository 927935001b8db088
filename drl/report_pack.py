"""What a report is made of, and the one small file that holds it: runs without what can be derived from the rest.

A page is always made from what such a file would say, so it is the same from the runs and from their pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drl import disk, intact, scores, trees
from drl.config import Config
from drl.config_files import differences, stored
from drl.errors import UserError, shown
from drl.foreign import checked, fits

FORMAT = 1
POINTS = 50  # of a loss curve
MOST = 10_000  # runs
KINDS = {"root": str, "options": list[dict], "versions": list[dict[str, str]], "grids": list[list[int]],
         "datasets": dict[str, float], "jobs": list[dict], "runs": list[dict]}
RUN = {"name": str, "options": int, "seed": int, "results": list, "failures": list, "losses": list}
JOB = {"name": str, "work": str, "seconds": float, "hardware": str}


@dataclass(frozen=True)
class Result:
    """One evaluation: after how many updates, how acted, asked for what return, of how many episodes from which
    environment seed on, with which versions; returns (N,) where they are kept, else none; their normalised score."""

    step: int
    mode: str
    target_return: float
    episodes: int
    first_seed: int
    versions: dict[str, str]
    returns: list[float]
    score: float


@dataclass(frozen=True)
class Run:
    """A run: its folder below the root, "/" between the names; failed evaluations, each with its step and
    told in a line; loss (points,) by updates."""

    name: str
    config: Config
    results: list[Result]
    failures: list[tuple[int, str]]
    steps: list[int]
    losses: list[float]

    def made(self) -> set[tuple]:
        """What there are results of: step, mode, target return, episodes and first environment seed of each."""
        return {(one.step, one.mode, one.target_return, one.episodes, one.first_seed) for one in self.results}


@dataclass(frozen=True)
class Pack:
    """All that a page says.

    Attributes:
        root: the folder of the runs, as it was typed.
        runs: by name.
        datasets: mean return of the episodes by dataset id, where it is known.
        jobs: name, work (training or scoring), seconds and hardware of what the suite did that made the runs, if any.
    """

    root: str
    runs: list[Run]
    datasets: dict[str, float]
    jobs: list[dict[str, Any]]


def fields(pack: Pack) -> dict[str, Any]:
    """The pack as JSON. What many runs share, options, versions and updates of a loss curve, stands once and is named
    by its place."""
    shared: dict[str, list] = {"options": [], "versions": [], "grids": []}

    def place(kind: str, value: Any) -> int:
        if value not in shared[kind]:
            shared[kind].append(value)
        return shared[kind].index(value)

    def options(config: Config) -> dict[str, Any]:  # all, because a later version may have other defaults
        return {key: value for key, value in trees.flat(config.to_dict()).items() if key != "seed"}

    runs = [
        {
            "name": run.name,
            "options": place("options", options(run.config)),
            "seed": run.config.seed,
            "results": [
                [r.step, r.mode, r.target_return, r.episodes, r.first_seed, place("versions", r.versions),
                 [round(value, 2) for value in r.returns] or round(r.score, 3)]
                for r in run.results
            ],
            "failures": [list(failure) for failure in run.failures],
            "losses": [place("grids", run.steps), [float(f"{loss:.4g}") for loss in run.losses]],
        }
        for run in pack.runs
    ]
    return {"format": FORMAT, "root": pack.root, **shared, "datasets": pack.datasets, "jobs": pack.jobs, "runs": runs}


def joined(packs: Sequence[Pack]) -> Pack:
    """What several machines made of one suite, as if one had; it goes by the name of the first. Of a run that was made
    again because it lacked a score, there is the one that has all scores of the others and more.

    Raises:
        UserError: two hold a run of the same name otherwise, or datasets of one name with other episodes.
    """
    datasets: dict[str, float] = {}
    for name, mean in (item for pack in packs for item in pack.datasets.items()):
        if datasets.setdefault(name, mean) != mean:
            raise UserError(f"the episodes of {name} have the mean return {datasets[name]:g} here and {mean:g} there: "
                            "these are not the same data; report them apart")
    runs: dict[str, list[Run]] = {}
    for run in (run for pack in packs for run in pack.runs):
        runs.setdefault(run.name, []).append(run)
    fullest = sorted(map(_fullest, runs.values()), key=lambda run: run.name.split("/"))
    return Pack(packs[0].root, fullest, datasets, [job for pack in packs for job in pack.jobs])


def _fullest(runs: list[Run]) -> Run:
    """The one, trained as the others, that has all that they have and more."""
    last = max(runs, key=lambda run: len(run.made()))
    others = [run for run in runs if run is not last]
    if not all(run.made() < last.made() and not differences(run.config, last.config, beside=False) for run in others):
        raise UserError(f"run {last.name} stands in more than one of what is to be reported; name each once")
    return last


def write(path: Path, content: dict[str, Any]) -> None:
    """Put `fields` into a file. Raises UserError where the disk refuses; what stood there is as it was."""
    size = len(intact.sealed(content))
    if path.exists() and not path.is_file():
        raise UserError(f"the pack cannot take the place of {path}, which is no file; name a file")
    with disk.refusal_told(path.parent, "the pack", "make room, or name another file", size):
        path.parent.mkdir(parents=True, exist_ok=True)
        intact.write_sealed(path, content)


def read(path: Path) -> Pack:
    """The pack in a file.

    Raises:
        UserError: it is not what `write` wrote.
    """
    return unpacked(intact.read_sealed(path, "pack"), f"pack {path}")


def unpacked(content: dict[str, Any], what: str) -> Pack:
    """The inverse of `fields`. Raises UserError, which names `what`, for anything else."""
    if content.get("format") != FORMAT:
        raise UserError(f"{what} has format {shown(content.get('format'))}, this version reads {FORMAT}; install the "
                        "version that wrote it, or pack the runs anew")
    told = checked(content, what, KINDS)
    if len(told["runs"]) > MOST:
        raise UserError(f"{what} is damaged: it holds {len(told['runs'])} runs, {MOST} are the most")
    jobs = [checked(job, f"{what} (one of its jobs)", JOB) for job in told["jobs"]]
    runs = [_run(checked(run, f"{what} (one of its runs)", RUN), told, what) for run in told["runs"]]
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f"{what} is damaged: a run stands there twice")
    return Pack(told["root"], runs, told["datasets"], jobs)


def _run(run: dict[str, Any], told: dict[str, Any], what: str) -> Run:
    what = f"{what} (its run {run['name']})"
    tree: dict[str, Any] = {"seed": run["seed"]}
    try:
        for key, value in _at(told["options"], run["options"], what).items():
            section, _, name = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = value
        config = stored(tree)
    except (UserError, TypeError) as error:  # TypeError: a section that is a number
        raise UserError(f"{what} is damaged: {shown(str(error))[1:-1]}") from error
    place, losses = _row(run["losses"], [int, list[float]], what)
    steps = _at(told["grids"], place, what)
    if len(steps) != len(losses):
        raise UserError(f"{what} is damaged: {len(losses)} losses stand at {len(steps)} updates")
    results = [_result(result, config, told["versions"], what) for result in run["results"]]
    failures = [tuple(_row(failure, [int, str], what)) for failure in run["failures"]]
    return Run(run["name"], config, results, failures, steps, losses)


def _result(row: Any, config: Config, versions: list[dict[str, str]], what: str) -> Result:
    *asked, place, scored = _row(row, [int, str, float, int, int, int, list[float] | float], what)
    reference = scores.reference(config.environment)
    if not isinstance(scored, list):
        returns, score = [], scored
    elif reference is None or not scored:
        raise UserError(f"{what} is damaged: returns of {config.environment} have no score")
    else:
        returns, score = scored, float(scores.normalized_score(np.array(scored, float), reference).mean())
    return Result(*asked, _at(versions, place, what), returns, score)


def _row(row: Any, kinds: list, what: str) -> list:
    if not isinstance(row, list) or len(row) != len(kinds) or not all(map(fits, row, kinds)):
        raise UserError(f"{what} is damaged: {shown(row)} stands where another row is expected")
    return row


def _at(values: list, place: int, what: str) -> Any:
    if place >= len(values):
        raise UserError(f"{what} is damaged: place {place} of {len(values)}")
    return values[place]


def thinned(steps: np.ndarray, losses: np.ndarray) -> tuple[list[int], list[float]]:
    """A loss curve (lines,) as means over at most POINTS stretches of lines, each at its last update."""
    parts = min(POINTS, len(steps))
    if not parts:
        return [], []
    return ([int(part[-1]) for part in np.array_split(steps, parts)],
            [float(part.mean()) for part in np.array_split(losses, parts)])
