"""One try at breaking a promise, and the tables of all tries."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SEEN = 10  # kinds that the table names


@dataclass(frozen=True)
class Trial:
    """What was done and what came of it.

    Attributes:
        storm: the module's name.
        kind: what was done, e.g. the phase that a kill hit, or the file that was damaged; what stands before a colon is
            what the figure and the table go by.
        ok: whether the promise was kept; None: it could not be tried on this machine.
        detail: what was seen, in a few words; of a failure, enough to know it again.
        seconds: that it took.
        numbers: what else was counted, e.g. the updates that were lost.
    """

    storm: str
    kind: str
    ok: bool | None
    detail: str = ""
    seconds: float = 0.0
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Its kind, in short."""
        return self.kind.partition(": ")[0]

    def row(self) -> list[Any]:
        """All but the storm, for JSON."""
        return [self.kind, self.ok, round(self.seconds, 3), self.detail, dict(self.numbers)]

    @classmethod
    def of_row(cls, storm: str, row: list[Any]) -> "Trial":
        """The inverse of `row`."""
        kind, ok, seconds, detail, numbers = row
        return cls(storm, kind, ok, detail, seconds, numbers)


def failures(trials: Iterable[Trial]) -> list[Trial]:
    """Those that broke the promise."""
    return [trial for trial in trials if trial.ok is False]


def table(storms: Mapping[str, tuple[str, list[Trial]]]) -> str:
    """Markdown: one row per storm, from its name to its promise and trials."""
    lines = ["| storm | promise | trials | failures | seen | median and worst |", "|---|---|--:|--:|---|---|"]
    for name, (promise, trials) in storms.items():
        tried = [trial for trial in trials if trial.ok is not None]
        missed = f", {len(trials) - len(tried)} not run" if len(tried) < len(trials) else ""
        kinds = Counter(trial.group for trial in tried).most_common()
        others = [("others", sum(count for _, count in kinds[SEEN:]))] if len(kinds) > SEEN else []
        seen = ", ".join(f"{kind} {count}" for kind, count in kinds[:SEEN] + others)
        lines.append(f"| {name} | {promise} | {len(tried)}{missed} | {len(failures(trials))} | {seen} | "
                     f"{_extent(tried)} |")
    return "\n".join(lines)


def _extent(trials: list[Trial]) -> str:
    """Median and worst of the updates lost, where these were counted, and of the seconds."""
    columns = {"s": [trial.seconds for trial in trials if trial.seconds],
               "updates lost": [trial.numbers["lost"] for trial in trials if "lost" in trial.numbers]}
    return ", ".join(f"{statistics.median(values):.3g} and {max(values):.3g} {unit}"
                     for unit, values in columns.items() if values) or "-"
