"""The YAML file of a suite: tasks x variants x seeds, read as plain values. docs/design.md shows one."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drl import evaluate as evaluation
from drl import foreign, trees
from drl.config import Config, EvaluateConfig
from drl.config_files import read_options
from drl.errors import UserError, did_you_mean, shown
from drl.names import task as task_name
from drl.suite_plan import Ask, Job, Run

NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # of a variant: a folder
ELSEWHERE = {"seed": "seeds", "dataset": "the task's file", "device": "--devices"}  # where else such a key stands
MODES = ("auto", *evaluation.MODES)
KEYS = ("tasks", "seeds", "settings", "variants", "curve")
EXAMPLE = "configs/suites/small.yaml shows how"


@dataclass(frozen=True)
class Wanted:
    """Which part of a suite is asked for; empty: all."""

    variants: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    part: tuple[int, int] = (1, 1)


def read(path: Path, out: Path, device: str, wanted: Wanted = Wanted()) -> list[Job]:
    """The jobs of a suite, those of one task after another.

    Args:
        path: the YAML file.
        out: folder of its runs.
        device: kind of device that trains: cpu or cuda.

    Raises:
        UserError: the file is not a suite, a file that it names is not there, or there is no such part.
    """
    tree = foreign.read_yaml(path, foreign.read_bytes(path, "suite", foreign.YAML, follow=True))
    try:
        return _jobs(tree, path.parent, out, device, wanted)
    except UserError as error:
        raise UserError(f"suite {path}: {error}") from error


def _jobs(tree: Any, home: Path, out: Path, device: str, wanted: Wanted) -> list[Job]:
    tree = {"settings": None, "curve": None} | _mapping({} if tree is None else tree, "the suite", KEYS)
    tasks, seeds = (_list(tree.get(name), name) for name in ("tasks", "seeds"))
    variants = _mapping(tree.get("variants") or {}, "variants")
    if not variants:
        raise UserError(f"variants is missing or empty; {EXAMPLE}")
    for name in variants:
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(f"a variant's name must be of letters, digits, '-', '_' and '.', got {shown(name)}")
    for seed in seeds:
        if type(seed) is not int:
            raise UserError(f"seeds must be int, got {shown(seed)}")
    files = {}
    for name in tasks:
        if not isinstance(name, str):
            raise UserError(f"tasks must be names of config files, got {shown(name)}")
        stated = read_options(home / name)
        if not stated.get("dataset"):
            raise UserError(f"{home / name} names no dataset; add one, e.g. dataset: drl/hopper/medium-replay-v0")
        task = task_name(stated["dataset"])
        if task in files:
            raise UserError(f"tasks names {task} twice; name each once")
        files[task] = stated
    common = _settings(tree["settings"], "settings")
    curve = _numbers(tree["curve"], "curve", {"points": int, "episodes": int}) if tree["curve"] is not None else None
    if curve is not None and "points" not in curve:
        raise UserError("curve.points is missing; it is how often each run is scored, the last time at its end, e.g. 4")
    _known(wanted.variants, variants, "variant")
    _known(wanted.tasks, files, "task")
    _known(wanted.seeds, seeds, "seed")
    jobs = []
    for task, stated in files.items():
        for name, variant in variants.items():
            where = f"variants.{name}"
            variant = {"settings": None, "evaluate": [{}]} | _mapping(variant or {}, where, ("settings", "evaluate"))
            values = stated | common | _settings(variant["settings"], f"{where}.settings") | {"device": device}
            asked = [_mapping(ask, f"{where}.evaluate", ("mode", "episodes", "target_scale", "seed"))
                     for ask in _list(variant["evaluate"], f"{where}.evaluate", once=False)]
            try:
                config, asks = _run(values, asked, curve, f"{where}.evaluate")
            except UserError as error:
                raise UserError(f"variant {name}, task {task}: {error}") from error
            if task in (wanted.tasks or files) and name in (wanted.variants or variants):
                jobs.append(Job(name, task, tuple(
                    Run(name, out / name / task / f"seed-{seed}", dataclasses.replace(config, seed=seed), asks)
                    for seed in seeds if seed in (wanted.seeds or seeds)
                )))
    part, parts = wanted.part
    return jobs[part - 1::parts]


def _run(values: dict[str, Any], asked: list[dict], curve: dict[str, int] | None, where: str
         ) -> tuple[Config, tuple[Ask, ...]]:
    """The config of a run, and its evaluations, those of the final checkpoint first."""
    if curve:
        if "train.checkpoint_every" in values or "train.keep_checkpoints" in values:
            raise UserError("curve says which checkpoints are kept; take train.checkpoint_every and "
                            "train.keep_checkpoints out of the settings")
        updates = values.get("train.updates", trees.build(Config, values).train.updates)
        values = values | {"train.checkpoint_every": -(-updates // curve["points"]),
                           "train.keep_checkpoints": curve["points"]}
    config = trees.build(Config, values)

    def ask(step: int, given: dict[str, Any]) -> Ask:
        mode = given.get("mode", config.evaluate.mode)
        if mode not in MODES:
            raise UserError(f"{where}.mode must be one of {', '.join(MODES)}, got {shown(mode)}")
        mode = evaluation.resolve_mode(mode, config.model.attention)
        if mode == "recurrent" and config.model.attention == "softmax":
            raise UserError(f"{where}: softmax attention acts in mode window alone; leave mode recurrent out")
        given = {"episodes": config.evaluate.episodes, "seed": config.evaluate.seed} | _numbers(
            {key: value for key, value in given.items() if key != "mode"}, where,
            {"episodes": int, "seed": int, "target_scale": float})
        EvaluateConfig(episodes=given["episodes"], seed=given["seed"])  # raises UserError where they are out of range
        return Ask(step, mode, **given)

    asks = [ask(config.train.updates, given) for given in asked]
    if len(set(asks)) < len(asks):
        raise UserError(f"{where} names an evaluation twice")
    every = config.train.checkpoint_every
    steps = range(every, config.train.updates, every) if curve else ()
    few = {"episodes": curve["episodes"]} if curve and "episodes" in curve else {}
    return config, (*asks, *(ask(step, few) for step in steps))


def _settings(tree: Any, where: str) -> dict[str, Any]:
    """Dotted keys of a config, each with a value of its type."""
    values = {}
    for key, value in _mapping({} if tree is None else tree, where).items():
        if key in ELSEWHERE:
            raise UserError(f"{where} sets {key}, which is said by {ELSEWHERE[key]}; take it out")
        if key not in trees.keys(Config):
            raise UserError(f"unknown config key {shown(key)} in {where}; {did_you_mean(str(key), trees.keys(Config))}")
        section, _, name = key.rpartition(".")
        values |= trees.stated(Config, {section: {name: value}} if section else {name: value})
    return values


def _mapping(tree: Any, where: str, known: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise UserError(f"{where} must be a mapping of keys to values, got {shown(tree)}")
    for key in tree:
        if known and key not in known:
            raise UserError(f"unknown key {shown(key)} in {where}; {did_you_mean(str(key), known)}")
    return tree


def _list(tree: Any, where: str, once: bool = True) -> list[Any]:
    if not isinstance(tree, list) or not tree:
        raise UserError(f"{where} must be a list, got {shown(tree)}" if tree else
                        f"{where} is missing or empty; {EXAMPLE}")
    for index, item in enumerate(tree):
        if once and item in tree[:index]:
            raise UserError(f"{where} names {shown(item)} twice; name each once")
    return tree


def _numbers(tree: Any, where: str, kinds: dict[str, type]) -> dict[str, Any]:
    """Positive numbers, and a seed, which may be 0."""
    for key, value in _mapping(tree, where, tuple(kinds)).items():
        if not foreign.fits(value, kinds[key]) or not (value > 0 or value == 0 and key == "seed"):
            raise UserError(f"{where}.{key} must be a positive {kinds[key].__name__}, got {shown(value)}")
    return {key: kinds[key](value) for key, value in tree.items()}


def _known(asked: tuple, known: Any, what: str) -> None:
    for name in asked:
        if name not in known:
            raise UserError(f"no {what} {shown(name)} in it; {did_you_mean(str(name), map(str, known))}")
