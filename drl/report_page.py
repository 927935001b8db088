"""The page of a report: tables, comparison, figures, and what a reader needs to judge and redo them."""

from collections.abc import Iterable

from drl import scores
from drl.report_commands import commands
from drl.report_pack import Pack
from drl.report_rows import Comparison, Row
from drl.report_table import comparison, dataset_scores, most_seeds, seeds_table, table

OPEN, CLOSE = "<!-- scores -->", "<!-- end of scores -->"
REFERENCES = ("Score and reference returns: Fu et al. 2020, arXiv 2004.07219. Intervals, interquartile mean and "
              "probability of improvement: Agarwal et al. 2021, arXiv 2108.13264. Decision transformer: Chen et al. "
              "2021, arXiv 2106.01345. Linear attention: Katharopoulos et al. 2020, arXiv 2006.16236.")


def page(pack: Pack, rows: list[Row], tasks: dict[str, str], comparisons: list[Comparison], figures: dict[str, str],
         picked: bool) -> str:
    """The whole of it, in Markdown.

    Args:
        tasks: name by dataset, in order.
        comparisons: of one row with others.
        figures: what each shows, by the name of its file.
        picked: whether that row was picked because its average is the highest.
    """
    names, known = list(tasks.values()), dataset_scores(pack, tasks)
    lines = [f"# Scores of {pack.root}", "", *table(rows, names, known), "", *_notes(rows, names), ""]
    if comparisons:
        lines += [f"## {comparisons[0].row.name} against the others", "", *comparison(comparisons, names), "",
                  "P(better): that a seed of it scores above one of the other row, averaged over the tasks that both "
                  "have. Below on: tasks where its interval ends before the other's begins."
                  + " It was picked for its average, which is the highest here: that favours it." * picked, ""]
    for file, shows in figures.items():
        lines += [f"![{shows}]({file})", ""]
    lines += [*seeds_table(rows, names), ""]
    if failures := [f"- {pack.root}/{run.name}: {told}" for run in pack.runs for _, told in run.failures]:
        lines += [f"Evaluations that failed and are in no cell, {len(failures)}:", "", *failures, ""]
    lines += ["## How it was measured", "", _protocol(rows), "", *_hardware(pack),
              f"Versions: {_versions(rows)}.", "", REFERENCES, "",
              "<details><summary>To do it again</summary>", "", *commands(pack.root, rows), "", "</details>"]
    return "\n".join(lines) + "\n"


def short(pack: Pack, rows: list[Row], tasks: dict[str, str], figure: str, link: str, shows: str) -> str:
    """What a README shows of it: the table, a link to the page, a figure and what it shows."""
    names = list(tasks.values())
    return "\n".join([*table(rows, names, dataset_scores(pack, tasks), short=True), "",
                      f"Mean normalised score of {_count(len(names), 'task')}, {_count(most_seeds(rows), 'seed')} "
                      f"each, ± half the width of its 95% interval; each task, seed and command: [{link}]({link}).", "",
                      f"![{shows}]({figure})"])


def between_marks(text: str, new: str) -> str | None:
    """`text` with `new` between the marks; None where they do not stand there once each, in order."""
    begin, end = text.find(OPEN), text.find(CLOSE)
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or begin > end:
        return None
    return f"{text[:begin]}{OPEN}\n\n{new}\n\n{text[end:]}"


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def _notes(rows: list[Row], tasks: list[str]) -> list[str]:
    most = most_seeds(rows)
    told = ["Normalised score: 0 is random, 100 expert. Mean over "
            + (f"{most} seeds, where no other number is said, ± half the width of its 95% interval; bold: the best of "
               "a column." if most > 1 else "one seed, which has no interval; bold: the best of a column.")]
    if any(len(row.cells) < len(tasks) for row in rows):
        told.append("A dash: not all tasks are there.")
    for row in rows:
        if len(row.episodes) > 1:
            told.append(f"{row.name}: some seeds are scored by {' and some by '.join(map(str, sorted(row.episodes)))} "
                        "episodes.")
        if asked := {run.config.train.updates for run in row.runs} - {row.step}:
            told.append(f"{row.name}: scored after {row.step} updates of {_said(sorted(asked))}, unfinished.")
    if any(dataset.startswith("drl/") for row in rows for dataset in _datasets(row)):
        told.append("Datasets drl/ are regenerated, D4RL-style: their scores are not comparable with published ones.")
    return [" ".join(told)]


def _datasets(row: Row) -> set[str]:
    return {run.config.dataset for run in row.runs}


def _protocol(rows: list[Row]) -> str:
    """Three sentences."""
    steps, episodes = sorted({row.step for row in rows}), sorted(set().union(*(row.episodes for row in rows)))
    first = sorted({result.first_seed for row in rows for result in row.results})
    asked: dict[float, set[str]] = {}
    for row in rows:
        for run, result in zip(row.runs, row.results, strict=True):
            asked.setdefault(result.target_return, set()).add(run.config.environment or run.config.dataset)
    targets = ", ".join(f"{target:g} ({' and '.join(sorted(asked[target]))})" for target in sorted(asked))
    return (f"A run is scored at its last checkpoint, never its best (updates: {_said(steps)}; episodes: "
            f"{_said(episodes)}; environment seeds from {_said(first)}; target returns fixed beforehand: {targets}). "
            "The score of a return is 100 (return - random) / (expert - random) by the references of "
            f"{scores.REFERENCE_SOURCE}, and that of a run the mean over its episodes. Intervals are the 2.5% and "
            "97.5% quantiles of 10,000 bootstrap draws of the seeds within each task; the interquartile mean is that "
            "of the middle half of all seeds of all tasks.")


def _said(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))


def _hardware(pack: Pack) -> list[str]:
    if not pack.jobs:
        return []
    spent: dict[tuple[str, str], float] = {}
    for job in pack.jobs:
        key = job["work"], job["hardware"]
        spent[key] = spent.get(key, 0.0) + job["seconds"]
    times = "; ".join(f"{work} {_duration(seconds)} ({where})" for (work, where), seconds in sorted(spent.items()))
    jobs = len({job["name"] for job in pack.jobs})
    return [f"Hardware and wall time, added up over {_count(jobs, 'job')}: {times}.", ""]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else (
        f"{seconds / 3600:.1f} h")


def _versions(rows: list[Row]) -> str:
    found: dict[str, set[str]] = {}
    for result in (result for row in rows for result in row.results):
        for name, version in result.versions.items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(found[name]))}" for name in sorted(found))
