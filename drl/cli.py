"""The command line: verbs, options, and a mistake answered with its cure in one line.

Imports of the heavy parts stand inside the verbs, so that `drl --help` answers at once.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonargparse
from jsonargparse import ArgumentParser

from drl.config import Config, config_keys
from drl.errors import UserError, did_you_mean

MODES = ("auto", "recurrent", "window")
WINDOW_NOTE = "recurrent: the state goes on; window: the last K steps are recomputed; auto: what the attention allows"


def main(arguments: list[str] | None = None) -> int:
    """Run `drl`; returns the exit status: 0, 1 (interrupted) or 2 (the user's mistake, told in one line)."""
    try:
        parser = _parser()
        options = parser.parse_args(arguments)
        VERBS[options.verb](options[options.verb])
    except UserError as error:
        print(f"drl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("drl: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `drl ... | head`
        return 1
    return 0


def train(options) -> None:
    import yaml

    from drl.data import minari_files
    from drl.train import CONFIG_FILE, resolve
    from drl.train import train as run_training

    fields = _plain(options)
    run, resume = fields.pop("run"), fields.pop("resume")
    fields.pop("config")
    if not fields["dataset"]:
        if not (resume and run and (Path(run) / CONFIG_FILE).is_file()):
            raise UserError("no dataset; add --config configs/hopper/medium-replay.yaml, or --dataset ID")
        fields = yaml.safe_load((Path(run) / CONFIG_FILE).read_text())
    config = Config.from_dict(fields)
    store = minari_files.read(config.dataset)
    config = resolve(config, store)
    run = Path(run or default_run(config))
    steps = len(store.actions)
    print(f"{config.dataset}: {len(store.episode_lengths)} episodes, {steps} steps, mean return "
          f"{store.episode_returns.mean():.1f}{_scored(store.episode_returns, config.environment)}")
    print(f"training {config.train.updates} updates on {config.device} into {run}")
    folder = run_training(config, store, run, resume=resume)
    print(f"checkpoint  {folder}\nevaluate    drl evaluate {run}\nwatch       tensorboard --logdir {run}")


def evaluate(options) -> None:
    import dataclasses

    from drl import checkpoint as checkpoints
    from drl import evaluate as evaluation
    from drl.tracker import Tracker
    from drl.train import resolve_device

    run = Path(options.run)
    checkpoint = checkpoints.load(run)
    config = checkpoint.config
    given = {name: options[name] for name in ("episodes", "seed", "environments") if options[name] is not None}
    if options.target_return is not None:
        given["target_returns"] = [options.target_return]
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **given))
    mode = evaluation.resolve_mode(options.mode if options.mode != "auto" else config.evaluate.mode,
                                   config.model.attention)
    policy = evaluation.MODES[mode](dataclasses.replace(checkpoint, config=config), resolve_device(options.device))
    results = evaluation.evaluate(policy, mode=mode, step=checkpoint.step, environment=options.environment)
    if not (run / checkpoints.MANIFEST).exists():  # a run folder: keep the result beside the run
        evaluation.store(results, run)
        with Tracker(run, start=None) as tracker:
            tracker.log(checkpoint.step, evaluation.tags(results))
    if options.json:
        print(json.dumps(results if len(results) > 1 else results[0]))
        return
    print(f"{'environment':<16}{'mode':<11}{'target':>8}{'episodes':>9}{'return':>10}{'+-':>8}{'length':>8}"
          f"{'score':>8}")
    for r in results:
        score = "-" if r["normalized_score"] is None else f"{r['normalized_score']:.1f}"
        print(f"{r['environment']:<16}{r['mode']:<11}{r['target_return']:>8g}{r['episodes']:>9}"
              f"{r['return_mean']:>10.1f}{r['return_std']:>8.1f}{r['episode_length']:>8.1f}{score:>8}")
    mean = checkpoint.dataset_return
    print(f"score: 0 is random, 100 expert, by D4RL's reference returns; the episodes of {config.dataset} have mean "
          f"return {mean:.1f}{_scored(mean, config.environment)}")


def data_collect(options) -> None:
    from drl import collect

    folder = collect.collect(options.name, steps=options.steps, seed=options.seed, overwrite=options.overwrite)
    _show(f"drl/{options.name}-v0")
    print(f"folder      {folder}\ntrain       drl train --dataset drl/{options.name}-v0")


def data_show(options) -> None:
    _show(options.id)


def data_list(options) -> None:
    from drl import collect
    from drl.data import minari_files

    local = minari_files.local_ids()
    for dataset in local:
        print(f"{dataset:<40} on this machine")
    for name in collect.names():
        if f"drl/{name}-v0" not in local:
            print(f"{f'drl/{name}-v0':<40} drl data collect {name}")


def report(options) -> None:
    from drl.report import report as make

    print(make(Path(options.runs), figure=options.figure and Path(options.figure)))


def benchmark_step(options) -> None:
    from drl.benchmark import step

    print(step(steps=options.steps, threads=options.threads))


def benchmark_update(options) -> None:
    from drl.benchmark import update

    print(update(updates=options.updates, threads=options.threads))


VERBS = {"train": train, "evaluate": evaluate, "report": report,
         "data": lambda options: DATA[options.verb](options[options.verb]),
         "benchmark": lambda options: BENCHMARKS[options.verb](options[options.verb])}
DATA = {"collect": data_collect, "show": data_show, "list": data_list}
BENCHMARKS = {"step": benchmark_step, "update": benchmark_update}


class Parser(ArgumentParser):
    """jsonargparse's, with messages of one line that say what to type."""

    def error(self, message: str, *_: Any, **__: Any):
        raise UserError(_cure(message, self))


def _parser() -> Parser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="drl", description="Decision transformers with linear attention: train in parallel, act "
                    "recurrently, one timestep at a time at constant cost.", version=None)
    verbs = parser.add_subcommands(dest="verb")

    verb = Parser(description="Train a policy on a Minari dataset; writes checkpoints, metrics.jsonl and TensorBoard "
                  "events into the run folder.")
    verb.add_argument("--config", action="config", help="YAML file; options after it win")
    verb.add_argument("--run", type=str, default="", help="folder to write (default: runs/<env>/<tier>/seed-<n>)")
    verb.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder; "
                      "with --run alone, with the config found there")
    verb.add_class_arguments(Config, skip={"dataset"})
    verb.add_argument("--dataset", type=str, default="", help="Minari id, e.g. drl/hopper/medium-replay-v0; one that "
                      "is not local is downloaded")
    verbs.add_subcommand("train", verb, help="train a policy")

    verb = Parser(description="Play seeded episodes with a trained policy and print the normalised score; a run "
                  "folder gets evaluation.json and TensorBoard scalars.")
    verb.add_argument("run", type=str, help="run or checkpoint folder")
    verb.add_argument("--mode", type=str, choices=MODES, default="auto", help=WINDOW_NOTE)
    verb.add_argument("--episodes", type=int | None, default=None, help="episodes (default: the run's config)")
    verb.add_argument("--seed", type=int | None, default=None, help="environment seed of the first episode; episode i "
                      "takes seed + i (default: the run's config)")
    verb.add_argument("--target_return", type=float | None, default=None, help="return asked for, in the "
                      "environment's units (default: the run's config)")
    verb.add_argument("--environment", type=str, default="", help="Gymnasium id (default: the run's)")
    verb.add_argument("--environments", type=int | None, default=None, help="environments side by side; changes the "
                      "speed only (default: the run's config)")
    verb.add_argument("--device", type=str, default="auto", help="cpu, cuda, ...; auto: cuda where there is one")
    verb.add_argument("--json", action="store_true", help="print JSON, every episode's return included")
    verbs.add_subcommand("evaluate", verb, help="score a trained policy")

    verb = Parser(description="Collect and look at datasets.")
    verbs.add_subcommand("data", verb, help="collect and look at datasets")
    data = verb.add_subcommands(dest="verb")
    verb = Parser(description="Roll the shipped behaviour policies out into the local Minari dataset "
                  "drl/<env>/<tier>-v0, on all cores. The same seed gives the same data.")
    verb.add_argument("name", type=str, help="<env>/<tier>, e.g. hopper/medium-replay; tiers: random, medium, "
                      "medium-replay, medium-expert, expert")
    verb.add_argument("--steps", type=int | None, default=None, help="environment steps at least; whole episodes are "
                      "kept (default: D4RL's size, 400k to 2M)")
    verb.add_argument("--seed", type=int, default=0, help="of resets and actions")
    verb.add_argument("--overwrite", action="store_true", help="replace the dataset if it exists")
    data.add_subcommand("collect", verb, help="make a D4RL-style dataset")
    verb = Parser(description="Episodes, steps, returns and normalised scores of a local dataset.")
    verb.add_argument("id", type=str, help="Minari id, e.g. drl/hopper/medium-v0")
    data.add_subcommand("show", verb, help="describe a dataset")
    data.add_subcommand("list", Parser(description="Datasets on this machine, and those that can be collected."),
                        help="list datasets")

    verb = Parser(description="Table of the scores under a folder of runs: one row per dataset, variant and acting "
                  "mode, mean over seeds with a 95% bootstrap interval. Prints Markdown.")
    verb.add_argument("runs", type=str, help="folder that holds runs at any depth")
    verb.add_argument("--figure", type=str | None, default=None, help="also draw scores and learning curves into this "
                      "PNG file; needs the extra drl[report]")
    verbs.add_subcommand("report", verb, help="table and figure of scores")

    verb = Parser(description="Measure speed on this machine; prints hardware, versions, median and spread.")
    verbs.add_subcommand("benchmark", verb, help="measure speed")
    benchmarks = verb.add_subcommands(dest="verb")
    verb = Parser(description="Microseconds per action of one environment: recurrent step and recomputed window.")
    verb.add_argument("--steps", type=int, default=3000, help="timed environment steps of each row")
    verb.add_argument("--threads", type=int, default=1, help="torch threads")
    benchmarks.add_subcommand("step", verb, help="microseconds per action")
    verb = Parser(description="Milliseconds per gradient update (width 128, 3 layers, context 20, batch 64).")
    verb.add_argument("--updates", type=int, default=50, help="timed updates of each row")
    verb.add_argument("--threads", type=int, default=0, help="torch threads (0: all cores)")
    benchmarks.add_subcommand("update", verb, help="milliseconds per update")
    return parser


def default_run(config: Config) -> str:
    """runs/<env>/<tier>/seed-<n> for drl/<env>/<tier>-v0; other ids keep their namespace."""
    name = re.sub(r"-v\d+$", "", config.dataset).removeprefix("drl/")
    return f"runs/{name}/seed-{config.seed}"


def _cure(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message on one line, with the near miss named."""
    text = " ".join(message.split())
    unknown = r"(?i)unrecognized arguments: -*([\w.]+)|key '([\w.]+)' is not expected|not accept option '([\w.]+)'"
    if found := re.search(unknown, text):
        name = found[1] or found[2] or found[3]
        known = {action.dest for action in parser._actions} - {"help", "print_config", "print_shtab", "verb"}
        return f"unknown option or config key {name!r}; {did_you_mean(name, known or config_keys())}"
    if wrong := re.search(r'key "([\w.]+)": Expected an? <class \'(\w+)\'>. Got value: (.*)', text):
        return f"{wrong[1]} must be {wrong[2]}, got {wrong[3]!r}"
    if invalid := re.search(r"invalid choice: '(.*?)' \(choose from (.*?)\)", text):
        choices = re.findall(r"[\w-]+", invalid[2])
        return f"unknown choice {invalid[1]!r}; {did_you_mean(invalid[1], choices)}"
    return text


def _plain(options) -> dict[str, Any]:
    return options.as_dict() if hasattr(options, "as_dict") else dict(options)


def _scored(returns, environment: str) -> str:
    from drl import scores

    reference = scores.reference(environment)
    return "" if reference is None else f", normalised score {scores.normalized_score(returns, reference).mean():.1f}"


def _show(dataset_id: str) -> None:
    from drl.data import minari_files

    store = minari_files.read(dataset_id)
    returns, lengths = store.episode_returns, store.episode_lengths
    print(f"dataset     {dataset_id}  (environment {store.spaces.environment or 'not named'})")
    print(f"size        {len(lengths)} episodes, {lengths.sum()} steps")
    print(f"return      mean {returns.mean():.1f}, standard deviation {returns.std():.1f}, "
          f"{returns.min():.1f} to {returns.max():.1f}{_scored(returns, store.spaces.environment)}")
    print(f"length      mean {lengths.mean():.1f}, {lengths.min()} to {lengths.max()}")


if __name__ == "__main__":
    sys.exit(main())
