"""The command line of the storms: scripts/torture."""

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torture import figure, trial

from drl.benchmark_device import machine
from drl.errors import UserError
from drl.progress import progress
from drl.versions import versions

STORMS = ("kills", "signals", "resume", "flips", "disk", "starts", "evaluations", "hostile")
AT_ONCE = 2  # storms, each of which is a process or two at a time, where there are cores for them


def main(arguments: list[str] | None = None) -> int:
    """Let storms loose; returns 0, 1 (a promise was broken) or 2 (a mistake)."""
    storms = {name: importlib.import_module(f"torture.{name}") for name in STORMS}
    options = _parser(storms).parse_args(arguments)
    if unknown := set(options.storms) - storms.keys():
        print(f"unknown storm {min(unknown)!r}; known: {', '.join(storms)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background ignores it, and so would children
    names = list(dict.fromkeys(options.storms)) or list(storms)
    if options.read:
        done = [_read(name, options.read) for name in names]
    elif options.short and (together := min(AT_ONCE, len(names), len(os.sched_getaffinity(0)))) > 1:
        with ProcessPoolExecutor(together, multiprocessing.get_context("fork")) as pool:
            done = list(pool.map(_run, names, itertools.repeat(options)))
    else:
        done = [_run(name, options) for name in names]
    trials = {name: (storms[name].PROMISE, tried) for name, tried in zip(names, done, strict=True)}
    print(trial.table(trials))
    failed = [broken for _, tried in trials.values() for broken in trial.failures(tried)]
    for broken in failed:
        print(f"\nfailed: {broken.storm}, {broken.kind}: {broken.detail} {dict(broken.numbers) or ''}")
    if options.figure:
        try:
            figure.draw({name: tried for name, (_, tried) in trials.items()}, options.figure)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
    return int(bool(failed))


def _read(name: str, folder: Path) -> list[trial.Trial]:
    """The trials that `_store` wrote."""
    return [trial.Trial.of_row(name, row) for row in json.loads((folder / f"{name}.json").read_text())["rows"]]


def _run(name: str, options: argparse.Namespace) -> list[trial.Trial]:
    """The trials of a storm, stored if asked for; its files are kept where it failed. Beside another storm it draws no
    bar but says in the end that it is done."""
    storm = importlib.import_module(f"torture.{name}")
    count = options.trials or storm.TRIALS[options.short]
    rng = np.random.default_rng([options.seed, STORMS.index(name)])
    folder = Path(tempfile.mkdtemp(prefix=f"torture-{name}-"))
    began, trials, beside = time.monotonic(), [], multiprocessing.parent_process() is not None
    with progress(count, "trial", name, silent=beside) as bar:
        for done in storm.run(count, folder, rng, options.short):
            trials.append(done)
            bar.update()
            bar.set_postfix_str(f"{len(trial.failures(trials))} failed")
    if trial.failures(trials):
        print(f"{name}: what it left is in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if beside:
        print(f"{name}: {len(trials)} trials in {time.monotonic() - began:.0f} s, {len(trial.failures(trials))} failed",
              file=sys.stderr)
    if options.json:
        _store(name, trials, time.monotonic() - began, options)
    return trials


def _store(name: str, trials: list[trial.Trial], seconds: float, options: argparse.Namespace) -> None:
    """Write <json>/<storm>.json: one trial a line."""
    head = {"storm": name, "date": date.today().isoformat(), "seed": options.seed, "short": options.short,
            "machine": machine(), "cores": len(os.sched_getaffinity(0)), "versions": versions(),
            "wall_seconds": round(seconds, 1), "trials": len(trials), "failures": len(trial.failures(trials)),
            "columns": ["kind", "ok", "seconds", "detail", "numbers"]}
    rows = ",\n".join(json.dumps(done.row(), separators=(",", ":")) for done in trials)
    options.json.mkdir(parents=True, exist_ok=True)
    (options.json / f"{name}.json").write_text(f"{json.dumps(head, indent=1)[:-2]},\n \"rows\": [\n{rows}\n]}}\n")


def _parser(storms: dict[str, ModuleType]) -> argparse.ArgumentParser:
    lines = [f"  {name:<12} {storm.PROMISE};\n{'':<15}{storm.TRIALS[0]} trials, about {storm.SECONDS[0]} s; --short: "
             f"{storm.TRIALS[1]}, {storm.SECONDS[1]} s" for name, storm in storms.items()]
    parser = argparse.ArgumentParser(
        prog="scripts/torture", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Try to break what drl promises about reliability, and count. Prints a table in Markdown; the "
        "status is 1 if a promise was broken.", epilog="storms:\n" + "\n".join(lines),
    )
    parser.add_argument("storms", nargs="*", metavar="STORM", help="which (default: all)")
    parser.add_argument("--short", action="store_true", help="few trials, processes that are forked rather than "
                        "started anew, and two storms at a time: for every change")
    parser.add_argument("--trials", type=int, help="of each storm")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write every trial there, a file per storm")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="try nothing: show what --json wrote there")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the trials; needs the extra drl[report]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
