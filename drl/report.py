"""Report: from the JSON of runs, or from files that pack it, to a page, its figures and a README's table."""

import os
from pathlib import Path

from drl import disk, figures, foreign, report_pack
from drl.errors import UserError
from drl.report_curves import draw_curves, draw_modes, draw_targets
from drl.report_figures import draw_scores, draw_summary
from drl.report_page import CLOSE, OPEN, between_marks, page, short
from drl.report_rows import Row, chosen_row, compared, rows_of, tasks_of
from drl.report_runs import gather

PAGE = "results.md"
README = 4_000_000  # bytes of one, at most
FIGURES = {
    "figures/scores.png": (draw_scores, "score of each task: mean and 95% interval of each row, a dot for each seed"),
    "figures/summary.png": (draw_summary, "average and interquartile mean of each row with 95% intervals"),
    "figures/curves.png": (draw_curves, "score and training loss against updates: mean and range of seeds"),
    "figures/targets.png": (draw_targets, "score against the target return asked for: mean and range of seeds"),
    "figures/modes.png": (draw_modes, "the same checkpoints acted recurrently and by window"),
}


def report(*sources: Path, figure: Path | None = None, folder: Path | None = None, pack: Path | None = None,
           readme: Path | None = None, against: str = "") -> str:
    """The page, in Markdown, without figures; where files are written, what they are instead.

    Args:
        sources: folders that hold runs at any depth, or files that `pack` was; together they are one report.
        figure: PNG file for the scores alone.
        folder: for the page and its figures.
        pack: file for all that a page needs.
        readme: file in which the short table and figure take the place of what stands between the marks.
        against: name of the row that the others are compared with (default: the best average).

    Raises:
        UserError: there is no scored run, runs of different MuJoCo versions would share a table, two runs are the same,
            a file is not what it should be, or matplotlib is missing for figures.
    """
    if readme and not folder:
        raise UserError("--readme shows a figure of the page's folder; add --write docs")
    if readme:
        _marked(readme, "")
    if folder or figure:
        figures.pyplot("--write" if folder else "--figure")  # missing: told before the reading
    named = " ".join(map(str, sources))
    content = report_pack.joined([report_pack.read(path) if path.is_file() else gather(path) for path in sources])
    content = report_pack.unpacked(fields := report_pack.fields(content), f"report of {named}")
    rows, tasks = rows_of(content.runs), tasks_of(content.runs)
    _require_comparable(rows, content, named)
    comparisons = compared(chosen_row(rows, against), rows)

    def whole(shown: dict[str, str]) -> str:
        return page(content, rows, tasks, comparisons, shown, picked=not against)

    written = []
    if pack:
        report_pack.write(pack, fields)
        written.append(("pack", pack))
    if figure:
        draw_scores(content, rows, tasks, figure, "--figure")
    if folder:
        shown = {name: shows for name, (draw, shows) in FIGURES.items()
                 if draw(content, rows, tasks, folder / name, "--write")}
        _write(folder / PAGE, whole(shown))
        written += [("page", folder / PAGE), *(("figure", folder / name) for name in shown)]
    if readme:
        place = Path(os.path.relpath(folder, readme.parent))
        drawn = next(name for name in ("figures/summary.png", "figures/scores.png") if name in shown)
        _write(readme, _marked(readme, short(content, rows, tasks, (place / drawn).as_posix(),
                                             (place / PAGE).as_posix(), shown[drawn])))
        written.append(("readme", readme))
    told = "" if folder else whole({})
    return told + "\n".join(f"{kind:<12}{path} ({path.stat().st_size:,} bytes)" for kind, path in written)


def _require_comparable(rows: list[Row], content: report_pack.Pack, named: str) -> None:
    failures = [f"{content.root}/{run.name}: {told}" for run in content.runs for _, told in run.failures]
    if failures and not rows:
        raise UserError(f"no scored run under {named}, and evaluations that failed, {len(failures)}; {failures[0]}")
    if not rows:
        raise UserError(f"no scored run under {named}: of {len(content.runs)} none has a score at its last "
                        "checkpoint and its config's target return; type: drl evaluate "
                        "runs/hopper/medium-replay/seed-0")
    mujoco = {result.versions.get("mujoco", "unknown") for row in rows for result in row.results}
    if len(mujoco) > 1:
        raise UserError(f"runs under {named} were scored with MuJoCo {' and '.join(sorted(mujoco))}: different "
                        "physics do not share a table; name a folder with one of them")


def _marked(readme: Path, new: str) -> str:
    try:
        text = foreign.read_bytes(readme, "README", README).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{readme} is not UTF-8: byte {error.start}") from error
    if (changed := between_marks(text, new)) is None:
        raise UserError(f"{readme} must hold the lines {OPEN} and {CLOSE} once each, in this order; write them where "
                        "the table and figure shall stand")
    return changed


def _write(path: Path, text: str) -> None:
    with disk.refusal_told(path.parent, path.name, "make room, or name another folder", len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(path, text)
