"""The options of the command line: the only file that imports jsonargparse. What the verbs do stands in cli.py."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml
from jsonargparse import ArgumentParser

from drl import foreign, options_benchmark, options_report, options_suite, trees
from drl.bounds import MOST
from drl.config import Config, EvaluateConfig, ModelConfig, TrainConfig
from drl.config_files import read_options
from drl.errors import UserError, did_you_mean, shown

Mode = Literal["auto", "recurrent", "window"]
Format = Literal["safetensors", "pt2", "onnx"]
WINDOW_NOTE = "recurrent: the state goes on; window: the last K steps are recomputed; auto: what the attention allows"
LINE = 400  # characters of a message, at most
HIDDEN = {"help", "print_config", "print_shtab", "verb"}


class ConfigFile(jsonargparse.ActionConfigFile):
    """--config: what the file states become options. jsonargparse itself reads no file: it would import what a file
    names as a class."""

    def __call__(self, parser, options, value, option_string=None):
        if not os.path.exists(value):
            raise UserError(f"no such file: {value}; they are in configs/, e.g. configs/hopper/medium-replay.yaml")
        for key, stated in read_options(Path(value)).items():
            options[key] = stated


class Parser(ArgumentParser):
    """jsonargparse's, with messages of one line that say what to type."""

    def parse_args(self, args=None, *rest, **named):
        foreign.check_arguments(sys.argv[1:] if args is None else args)
        return super().parse_args(args, *rest, **named)

    def error(self, message: str, *_: Any, **__: Any):
        raise UserError(_cure(message, self))


def build() -> Parser:
    """The parser of `drl` with all its verbs; `verb` (and `<verb>.verb`) name the one chosen."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("yaml", foreign.parse_yaml, exceptions=(yaml.YAMLError,))
    parser = Parser(prog="drl", description="Decision transformers with linear attention: train in parallel, act "
                    "recurrently, one timestep at a time at constant cost.", version=None)
    verbs = parser.add_subcommands(dest="verb")

    verb = Parser(description="Train a policy on a Minari dataset; writes checkpoints, metrics.jsonl and TensorBoard "
                  "events into the run folder.")
    verb.add_argument("--config", action=ConfigFile, help="YAML file; options after it win")
    verb.add_argument("--run", type=str, default="", help="folder to write (default: runs/<env>/<tier>/seed-<n>); with "
                      "--seeds the folder of the seed-<n>")
    verb.add_argument("--seeds", type=int, nargs="+", default=[], help="train these seeds side by side, each into a "
                      "folder of its own and with the numbers it would have alone, on a GPU but for "
                      "the order of sums (default: --seed)")
    verb.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder; "
                      "with --run alone, with the config found there")
    _add_config(verb)
    verb.add_argument("--dataset", type=str, default="", help="Minari id, e.g. drl/hopper/medium-replay-v0; one that "
                      "is not local is downloaded")
    verbs.add_subcommand("train", verb, help="train a policy")

    verb = Parser(description="Play seeded episodes with a trained policy and print the normalised score; a run "
                  "folder gets evaluation.json and TensorBoard scalars.")
    verb.add_argument("run", type=str, help="run, checkpoint or exported policy")
    verb.add_argument("--mode", type=Mode, default="auto", help=WINDOW_NOTE)
    verb.add_argument("--episodes", type=int | None, default=None, help="episodes (default: the run's config)")
    verb.add_argument("--seed", type=int | None, default=None, help="of the first episode's environment; episode i has "
                      "seed + i (default: the run's config)")
    verb.add_argument("--target_return", type=float | None, default=None, help="return asked for, in the "
                      "environment's units (default: the run's config)")
    verb.add_argument("--environment", type=str, default="", help="Gymnasium id (default: the run's)")
    verb.add_argument("--environments", type=int | None, default=None, help="side by side; changes the speed only "
                      "(default: the run's config)")
    verb.add_argument("--patience", type=float | None, default=None, help="seconds that a step may take before "
                      "the evaluation is given up (default: the run's config)")
    verb.add_argument("--device", type=str, default="auto", help="cpu, cuda, ...; auto: cuda where there is one")
    verb.add_argument("--engine", type=str, default="auto", help="what steps a recurrent policy: cpu (compiled), "
                      "cpu-bfloat16 (faster, actions off by up to a few percent of their range) or torch; auto: cpu on "
                      "a CPU where it was built")
    verb.add_argument("--json", action="store_true", help="print JSON, every episode's return included")
    verbs.add_subcommand("evaluate", verb, help="score a trained policy")

    verb = Parser(description="Write a trained policy into a folder of its own that drl.RecurrentPolicy.load opens: "
                  "weights, config, scores, and a golden trace of 100 steps that is checked at every load.")
    verb.add_argument("run", type=str, help="run or checkpoint folder")
    verb.add_argument("folder", type=str, help="folder to write")
    verb.add_argument("--formats", type=Format, nargs="+", default=["safetensors"], help="safetensors is always "
                      "written; pt2: the step as a torch.export program, step.pt2; onnx: the same as step.onnx, needs "
                      "the extra drl[onnx]; both for any number of rows")
    verb.add_argument("--overwrite", action="store_true", help="replace an exported policy that is there already")
    verbs.add_subcommand("export", verb, help="write a policy that acts without its run")

    verb = Parser(description="Collect and look at datasets.")
    verbs.add_subcommand("data", verb, help="collect and look at datasets")
    data = verb.add_subcommands(dest="verb")
    verb = Parser(description="Roll the shipped behaviour policies out into the local Minari dataset "
                  "drl/<env>/<tier>-v0, on all cores. The same seed gives the same data, on any number of cores that "
                  "have AVX-512. One that was stopped or killed goes on when the same is typed again.")
    verb.add_argument("name", type=str, help="<env>/<tier>, e.g. hopper/medium-replay; tiers: random, medium, "
                      "medium-replay, medium-expert, expert")
    verb.add_argument("--steps", type=int | None, default=None, help="environment steps at least; whole episodes are "
                      "kept (default: D4RL's size, 200k to 2M)")
    verb.add_argument("--seed", type=int, default=0, help="of resets and actions")
    verb.add_argument("--overwrite", action="store_true", help="replace the dataset if it exists")
    data.add_subcommand("collect", verb, help="make a D4RL-style dataset")
    verb = Parser(description="Download a dataset through Minari. It stands in its place whole or not at all; one that "
                  "was cut short is replaced.")
    verb.add_argument("id", type=str, help="Minari id, e.g. mujoco/hopper/medium-v0")
    verb.add_argument("--overwrite", action="store_true", help="download it even if it is here")
    data.add_subcommand("download", verb, help="fetch a dataset from Minari's server")
    verb = Parser(description="Convert one of D4RL's original MuJoCo files (*-v2.hdf5; hopper, halfcheetah, walker2d) "
                  "into the local Minari dataset d4rl/<env>/<tier>-v2. Steps after the last end of an episode are "
                  "dropped.")
    verb.add_argument("file", type=str, help="e.g. hopper_medium_replay-v2.hdf5")
    verb.add_argument("--name", type=str, default="", help="what the file is, e.g. hopper/medium-replay-v2 (default: "
                      "as its name says)")
    verb.add_argument("--overwrite", action="store_true", help="replace the dataset if it exists")
    data.add_subcommand("import-d4rl", verb, help="convert an original D4RL file")
    verb = Parser(description="The card of a dataset: who made it, episodes, steps, returns in the environment's units "
                  "and normalised scores, lengths in steps with their histogram.")
    verb.add_argument("id", type=str, help="Minari id, e.g. drl/hopper/medium-v0")
    verb.add_argument("--plot", type=str | None, default=None, help="also draw histograms of returns and lengths into "
                      "this PNG file; needs the extra drl[report]")
    data.add_subcommand("show", verb, help="describe a dataset")
    verb = Parser(description="Datasets on this machine, and those that can be collected, downloaded or imported.")
    data.add_subcommand("list", verb, help="list datasets")

    verb = Parser(description=options_report.DESCRIPTION)
    options_report.add(verb)
    verbs.add_subcommand("report", verb, help="tables and figures of scores")

    verbs.add_subcommand("suite", options_suite.add(Parser), help="train and score many runs")
    verb = Parser(description="Measure speed on this machine; prints hardware, versions, median and spread.")
    verbs.add_subcommand("benchmark", verb, help="measure speed")
    options_benchmark.add(verb.add_subcommands(dest="verb"), Parser)
    return parser


def _add_config(verb: Parser) -> None:
    """An option for each key of a config, in groups; none for a group, whose value could name a file or a class."""
    nested = {"model": ModelConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
    for key, cls in {None: Config, **nested}.items():
        group = verb.add_argument_group(cls.__doc__.strip("."))
        group.add_class_arguments(cls, key, as_group=False, skip={"dataset", *nested})
        for action in group._group_actions:
            if action.dest in MOST:
                action.help += f", {MOST[action.dest]} at most"


def _cure(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message on one line, in words for a user, with the near miss named."""
    text = " ".join(message.split())
    if found := re.search(r"(?i)(?:unrecognized arguments|ambiguous option): -*([\w.]+)", text):
        known = {action.dest for action in parser._actions} - HIDDEN
        return f"unknown option or config key {shown(found[1])}; {did_you_mean(found[1], known or trees.keys(Config))}"
    if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*?)\)", text):
        choices = did_you_mean(found[1], re.findall(r"[\w-]+", found[2]))
        return f"unknown choice {shown(found[1])}; {choices}"
    if found := re.search(r'key "([\w.]+)"(?: element \d+)?: .*Literal\[(.*?)\].*?[Vv]alue: (.*)', text):
        choices = found[2].replace("'", "")
        return f"{found[1]} must be one of {choices}, got {shown(found[3])}"
    if found := re.search(r'key "([\w.]+)"(?: element \d+)?: .*?<class \'(\w+)\'>.*[Vv]alue: (.*)', text):
        return f"{found[1]} must be {found[2]}, got {shown(found[3])}"
    if found := re.search(r'key "([\w.]+)"(?: element \d+)?: line \d+: (.*)', text):
        return f"{found[1]}: {found[2]}"
    if found := re.search(r'expected "([\w.]+)" to be one of \{', text):
        *verb, _ = found[1].split(".")
        names = [" ".join(["drl", *verb, name]) for name in _verbs(verb)]
        return f"what to do is missing; type one of: {', '.join(names)}"
    if found := re.search(r"arguments are required: ([\w.]+)", text):
        *verb, name = found[1].split(".")
        return f"{name} is missing; type: drl {' '.join(verb)} --help"
    return text[:LINE]


def _verbs(path: list[str]) -> list[str]:
    """All verbs below a verb; jsonargparse's message stops after five."""
    parser, choices = build(), {}
    for name in [*path, ""]:
        choices = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = choices.get(name)
    return list(choices)
