"""The command line: verbs, options, and a mistake answered with its cure in one line.

Imports of the heavy parts stand inside the verbs, so that `drl --help` answers at once.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from drl import cli_benchmark, cli_suite, lock, signals
from drl import options as command_line
from drl.config import Config
from drl.config_files import read_config
from drl.errors import UserError
from drl.names import task
from drl.trees import overlaid

GRACE = 5.0  # seconds


def main(arguments: list[str] | None = None) -> int:
    """Run `drl`; returns the exit status: 0; 1 (nobody reads the output); 2 (a mistake, or something that is broken or
    refused, told in one line); 128 + signal (stopped by it, signals.py)."""
    return signals.status(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        options = command_line.build().parse_args(arguments)
        VERBS[options.verb](options[options.verb])
    except UserError as error:
        _tell(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # how torch says it, on any device
            raise
        _tell(f"the memory does not suffice ({str(error)[:120]!r}); lower --train.batch_size or --model.width")
        return 2
    except BrokenPipeError:  # `drl ... | head`
        return 1
    except OSError as error:  # a name that is too long, a disk that fails while it is read
        _tell(f"{error.filename or 'the system'}: {error.strerror or error}")
        return 2
    return 0


def _tell(message: str) -> None:
    """One line on stderr, also where torchrun started several processes that fail alike."""
    rank = int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0
    if rank:
        time.sleep(GRACE)  # torchrun ends this process meanwhile if the first one failed, which then told why
        message = f"rank {rank}: {message}"
    print("drl:", "".join(c if c.isprintable() else " " for c in message), file=sys.stderr)


def train(options) -> None:
    from drl import parallel
    from drl.data import minari_files
    from drl.resolve import resolve
    from drl.train import CONFIG_FILE, train_together

    fields = options.as_dict()
    run, resume, seeds = fields.pop("run"), fields.pop("resume"), fields.pop("seeds")
    fields.pop("config")
    config = Config.from_dict(fields)
    _check_seeds(seeds, config, run)
    if not config.dataset:
        found = Path(run) / (f"seed-{seeds[0]}" if seeds else "") / CONFIG_FILE
        if not (resume and run and found.is_file()):
            raise UserError("no dataset; add --config configs/hopper/medium-replay.yaml, or --dataset ID")
        config = overlaid(read_config(found), config)
    store = minari_files.read(config.dataset)
    config = resolve(config, store, len(seeds or [config.seed]))
    configs = [dataclasses.replace(config, seed=seed) for seed in seeds or [config.seed]]
    best = store.best(config.train.best_episodes)
    part = f" of its best {len(best)} episodes" if len(best) < len(store.episode_lengths) else ""
    parent = Path(run or f"runs/{task(config.dataset)}")
    runs = [parent if run and not seeds else parent / f"seed-{config.seed}" for config in configs]
    with parallel.join(config.device) as share:
        if share.first:
            print(f"{config.dataset}: {len(store.episode_lengths)} episodes, {len(store.actions)} steps, mean return "
                  f"{store.episode_returns.mean():.1f}{_scored(store.episode_returns, config.environment)}")
            print(f"training {config.train.updates} updates{part} on {config.device} into {', '.join(map(str, runs))}")
        folders = train_together(configs, store, runs, resume=resume, share=share)
    if share.first:
        print("\n".join(f"checkpoint  {folder}" for folder in folders))
        print("\n".join(f"evaluate    drl evaluate {run}" for run in runs))
        print(f"watch       tensorboard --logdir {runs[0] if len(runs) == 1 else parent}")


def _check_seeds(seeds: list[int], config: Config, run: str) -> None:
    if not seeds:
        return
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds names a seed twice: {' '.join(map(str, seeds))}; name each once")
    if config.seed:
        raise UserError(f"--seed {config.seed} and --seeds {' '.join(map(str, seeds))} say different things; leave one "
                        "of them out")
    if (Path(run) / "checkpoints").exists() and run:
        raise UserError(f"{run} is itself a run, but with --seeds it would hold runs; name the folder above it")


def evaluate(options) -> None:
    from drl import checkpoint as checkpoints
    from drl import evaluate as evaluation
    from drl import exported
    from drl.faults import EvaluationFailed
    from drl.resolve import resolve_device
    from drl.tracker import Tracker

    run = Path(options.run)
    checkpoint, trace = exported.load(run)
    config = checkpoint.config
    names = ("episodes", "seed", "environments", "patience")
    given = {name: options[name] for name in names if options[name] is not None}
    if options.target_return is not None:
        given["target_returns"] = [options.target_return]
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **given))
    mode = evaluation.resolve_mode(options.mode if options.mode != "auto" else config.evaluate.mode,
                                   config.model.attention)
    device = resolve_device(options.device)
    policy = evaluation.MODES[mode](dataclasses.replace(checkpoint, config=config), device, options.engine)
    exported.check(policy, trace, run)
    try:
        results = evaluation.evaluate(policy, mode=mode, step=checkpoint.step, environment=options.environment)
    except EvaluationFailed as failure:
        if failure.results:
            _show(failure.results, checkpoint, options.json)
        if checkpoints.exists(run):
            try:
                evaluation.store_failure(failure, run, checkpoint.step, mode)
            except UserError as unkept:
                raise UserError(f"{failure}; moreover, {unkept}") from failure
        raise
    try:  # what was played for minutes is shown, whether it can be kept or not
        _show(results, checkpoint, options.json)
    finally:
        if checkpoints.exists(run):  # a run folder: keep the result beside the run
            evaluation.store(results, run)
            try:
                with lock.held(run), Tracker(run, start=None) as tracker:
                    tracker.log(checkpoint.step, evaluation.tags(results))
            except lock.Held as error:
                print(f"drl: {error}; the scores are in {evaluation.FILE}, not in TensorBoard", file=sys.stderr)


def _show(results: list[dict[str, Any]], checkpoint, as_json: bool) -> None:
    from drl import evaluate as evaluation

    if as_json:
        print(json.dumps(results if len(results) > 1 else results[0]))
        return
    print(evaluation.table(results))
    if (mean := checkpoint.dataset_return) is not None:
        config = checkpoint.config
        print(f"the episodes of {config.dataset}: mean return {mean:.1f}{_scored(mean, config.environment)}")


def export(options) -> None:
    from drl.export import export as write

    folder = Path(options.folder)
    write(Path(options.run), folder, formats=options.formats, overwrite=options.overwrite)
    for path in sorted(folder.iterdir()):
        print(f"{path.name:<20}{path.stat().st_size:>12,} bytes")
    print(f"folder      {folder}\nevaluate    drl evaluate {folder}\n"
          f'act         python -c "import drl; policy = drl.RecurrentPolicy.load({str(folder)!r})"')


def data_collect(options) -> None:
    from drl import card, collect

    folder = collect.collect(options.name, steps=options.steps, seed=options.seed, overwrite=options.overwrite)
    dataset = f"drl/{options.name}-v0"
    print(f"{card.line(dataset)}\nfolder      {folder}\nlook        drl data show {dataset}\n"
          f"train       drl train --dataset {dataset}")


def data_download(options) -> None:
    from drl.data import minari_files

    if not minari_files.download(options.id, overwrite=options.overwrite):
        print(f"{options.id} is here already; add --overwrite to download it anew")
    print(f"folder      {minari_files.path(options.id)}\nlook        drl data show {options.id}\n"
          f"train       drl train --dataset {options.id}")


def data_import_d4rl(options) -> None:
    from drl import card
    from drl.data import d4rl

    imported = d4rl.convert(options.file, name=options.name, overwrite=options.overwrite)
    print(f"{card.line(imported.dataset)}\n"
          f"dropped     {imported.dropped} steps after the last end of an episode\n"
          f"gaps        {_told(imported.gaps)}\n"
          f"source      {'' if imported.original else 'not '}D4RL's own file, by its SHA-256\n"
          f"folder      {imported.folder}\ntrain       drl train --dataset {imported.dataset}")


def _told(gaps: tuple[int, ...]) -> str:
    if not gaps:
        return "none"
    return (f"{len(gaps)}: next_observations of step {gaps[0]}{' and others' if len(gaps) > 1 else ''} is not what "
            "follows; the end of an episode may be unmarked there")


def data_show(options) -> None:
    from drl import card

    described = card.card(options.id)
    print(described.text())
    if options.plot:
        described.draw(Path(options.plot))
        print(f"{'figure':<12}{options.plot}")


def data_list(options) -> None:
    from drl import card

    print(card.listing())


def report(options) -> None:
    from drl.report import report as make

    paths = {name: options[name] and Path(options[name]) for name in ("pack", "readme", "figure")}
    paths["folder"] = options.write and Path(options.write)
    text = make(*map(Path, options.runs), against=options.against, **paths)
    known = sys.stdout.encoding or "utf-8"
    print(text.encode(known, "replace").decode(known))  # a terminal may know no plus-minus


VERBS = {"train": train, "evaluate": evaluate, "export": export, "report": report,
         "data": lambda options: DATA[options.verb](options[options.verb]),
         "suite": cli_suite.run, "benchmark": cli_benchmark.run}
DATA = {"collect": data_collect, "download": data_download, "import-d4rl": data_import_d4rl, "show": data_show,
        "list": data_list}


def _scored(returns, environment: str) -> str:
    from drl import scores

    reference = scores.reference(environment)
    return "" if reference is None else f", normalised score {scores.normalized_score(returns, reference).mean():.1f}"


if __name__ == "__main__":
    sys.exit(main())
