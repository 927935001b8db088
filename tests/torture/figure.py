"""The figure of the storms: every kill where it struck, and trials and failures of every kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torture.trial import Trial, failures

from drl import figures

PHASES = {  # Okabe and Ito's colours, which the colour-blind tell apart
    "starting": "#999999", "resuming": "#F0E442", "training": "#0072B2", "evaluating": "#009E73",
    "saving: writing": "#E69F00", "saving: syncing": "#CC79A7", "saving: renamed": "#56B4E9",
    "saving: purging": "#000000",
}
KEPT, BROKEN, MISSED = "#56B4E9", "#D00000", "#DDDDDD"
KINDS = 8  # of a storm, at most, to be shown apart


def draw(storms: Mapping[str, Sequence[Trial]], file: Path) -> None:
    """Write a PNG of the trials of each storm.

    Raises:
        UserError: matplotlib is missing.
    """
    kinds = [(storm, kind, some) for storm, trials in storms.items() for kind, some in _by_kind(trials).items()]
    kills = [trial for trial in storms.get("kills", []) if trial.kind in PHASES]
    half = (len(kinds) + 1) // 2
    height = 0.27 * half + 1
    canvas = figures.pyplot("--figure").figure(figsize=(12, height + 3.2 * bool(kills)), layout="constrained")
    grid = canvas.add_gridspec(2, 2, height_ratios=[3.2 if kills else 1e-3, height])
    tried = [trial for trials in storms.values() for trial in trials if trial.ok is not None]
    canvas.suptitle(f"{len(tried):,} trials of the promises about reliability, {len(failures(tried)):,} failures",
                    fontsize=15, weight="bold")
    if kills:
        _strip(canvas.add_subplot(grid[0, :]), kills)
    most = max((len(trials) for *_, trials in kinds), default=1)
    for column, some in enumerate((kinds[:half], kinds[half:])):
        if some:
            _bars(canvas.add_subplot(grid[1, column]), some, half, most)
    figures.save(canvas, file)


def _strip(axes, kills: Sequence[Trial]) -> None:
    """Each kill over the update that its run had reached, as high as the updates that were lost."""
    for phase, colour in PHASES.items():
        hit = [kill for kill in kills if kill.kind == phase]
        if hit:
            reached, lost = ([kill.numbers[name] for kill in hit] for name in ("update", "lost"))
            axes.vlines(reached, 0, lost, color=colour, linewidth=1, alpha=0.5)
            axes.scatter(reached, lost, s=42, color=colour, edgecolor="white", linewidth=0.6, zorder=3,
                         label=f"{phase} ({len(hit)})")
    if broken := failures(kills):
        reached, lost = ([kill.numbers[name] for kill in broken] for name in ("update", "lost"))
        axes.scatter(reached, lost, s=140, facecolor="none", edgecolor=BROKEN, linewidth=2,
                     label=f"failed ({len(broken)})")
    axes.set(xlabel="update that the run had reached when it was killed", ylabel="updates lost", ylim=(-1, None),
             title=f"{len(kills)} kills of training runs, by what they struck")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes, kinds: Sequence[tuple[str, str, Sequence[Trial]]], rows: int, most: int) -> None:
    """A bar of trials for every kind, the failures in red at its beginning; `rows` fit, the longest has `most`."""
    labels, shown = [], ""
    for place, (storm, kind, trials) in enumerate(kinds):
        broken, missed = len(failures(trials)), sum(trial.ok is None for trial in trials)
        tried = len(trials) - missed
        for left, width, colour in ((0, broken, BROKEN), (broken, tried - broken, KEPT), (tried, missed, MISSED)):
            axes.barh(place, width, left=left, color=colour, height=0.72)
        text = f"{tried:,}" + f", {broken:,} failed" * bool(broken) + f", {missed:,} not run" * bool(missed)
        axes.annotate(text, (len(trials), place), (4, 0), textcoords="offset points", va="center", fontsize=9,
                      color=BROKEN if broken else "black")
        labels.append(f"$\\bf{{{storm}}}$   {kind}" if storm != shown else kind)
        if storm != shown and place:
            axes.axhline(place - 0.5, color="#DDDDDD", linewidth=0.8)
        shown = storm
    axes.set_yticks(range(len(kinds)), labels, fontsize=9)
    axes.set(xlabel="trials", xscale="symlog", xlim=(0, 4 * most), ylim=(rows - 0.4, -0.6))
    axes.spines[["top", "right"]].set_visible(False)


def _by_kind(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """In the order in which they came; all in one where there are too many kinds to show."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.group, []).append(trial)
    return found if len(found) <= KINDS else {"all": list(trials)}
