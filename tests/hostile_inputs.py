"""Inputs that mean harm, as data: what each puts into a folder, and the command that then meets it.

    for name, make in inputs():
        command = make(folder)      # of `drl`, to be run in `folder` with MINARI_DATASETS_PATH=datasets

Every command must end with status 2 and one line on stderr, soon and in little memory, and no path whose name begins
with CANARY may ever appear.
"""

import functools
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import toys
from safetensors.torch import load_file, save_file

from drl import checkpoint as checkpoints
from drl.config_files import write_config

CANARY, TRAP = "canary", "trap_of_the_hostile"
COMMAND = f"touch {CANARY}"
Make = Callable[[Path], list[str]]
_kept = []

YAML = {
    "a tag that runs a command": f"train: !!python/object/apply:os.system [{COMMAND}]",
    "a tag that makes an object": f"dataset: !!python/object/new:{TRAP}.X []",
    "a tag that names a module": f"device: !!python/module:{TRAP}",
    "a tag of one's own": "device: !cpu cpu",
    "a tag of the standard": "device: !!str cpu",
    "a class to import": f"train: {{class_path: {TRAP}.X}}",
    "a class to import, in short": f"model: {TRAP}.X",
    "a class to import with arguments": f"evaluate: {{class_path: {TRAP}.X, init_args: {{seed: 1}}}}",
    "another file": "train: /etc/passwd",
    "another file by its path": "__path__: /etc/passwd",
    "an anchor": "device: &a cpu",
    "an alias": "seed: &a 1\nevaluate: {seed: *a}",
    "an alias of nothing": "seed: *a",
    "a merged mapping": "train: {<<: {updates: 3}}",
    "an alias bomb": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)),
    "an alias of itself": "train: &a {model: *a}",
    "a key twice": "seed: 1\nseed: 2",
    "a nested key twice": "train: {updates: 1, updates: 2}",
    "a second document": "seed: 1\n---\nseed: 2",
    "21 levels": "device: " + "[" * 21 + "]" * 21,
    "100,000 levels": "device: " + "[" * 100_000 + "]" * 100_000,
    "100,000 levels that do not end": "device: " + "{a: " * 100_000,
    "NUL": "device: cpu\0",
    "not UTF-8": b"device: cpu\xff",
    "no YAML": 'device: "',
    "a list": "- 1",
    "a list as a key": "? [seed]\n: 1",
    "an integer of 5000 digits": "seed: " + "9" * 5000,
    "an integer of 400 digits": "seed: 1" + "0" * 400,
    "a number to the base 60 of 500,000 digits": "seed: 1" + ":1" * 400_000,
    "a float that is huge": "train: {learning_rate: 1e999}",
    "a float that is none": "train: {weight_decay: .nan}",
    "a return that is infinite": "evaluate: {target_returns: [.inf]}",
    "a value of a million characters": "device: " + "x" * 900_000,
    "a key of a million characters": "x" * 900_000 + ": 1",
    "a megabyte": "#" * 1_000_001,
    "a wide model": "model: {width: 1000000000}",
    "a model of too many weights": "model: {width: 16384, layers: 256}",
    "too many updates": "train: {updates: 1000000000}",
    "a batch of too many steps": "train: {batch_size: 1000000, context: 1000000}",
    "too many streams": "train: {batch_size: 1000000, stream_groups: 65536}",
    "too many environments": "evaluate: {environments: 100000000}",
    "a traversing dataset": "dataset: ../../x-v0",
    "an absolute dataset": "dataset: /etc/x-v0",
    "an environment of a module": f"environment: {TRAP}:Env-v0",
    "os as an environment": f"environment: os:{CANARY}-v0",
}
OPTIONS = {
    "a command as a group": ["--train", f"!!python/object/apply:os.system [{COMMAND}]"],
    "a file as a group": ["--train", "/etc/passwd"],
    "a class as a group": ["--train", f"{TRAP}.X"],
    "a class as a group with =": [f"--model={TRAP}.X"],
    "a class path as an option": ["--train.class_path", f"{TRAP}.X"],
    "an alias": ["--evaluate.target_returns", "*a"],
    "an alias that would be known": ["--evaluate.target_returns", "[&a 1, *a]"],
    "a bomb": ["--model.width", "[&a [x, x], &b [*a, *a], &c [*b, *b], &d [*c, *c], &e [*d, *d], &f [*e, *e]]"],
    "a command as a number": ["--model.width", f"!!python/object/apply:os.system [{COMMAND}]"],
    "a command as a list": ["--evaluate.target_returns", f"[!!python/object/apply:os.system [{COMMAND}]]"],
    "9000 levels": ["--evaluate.target_returns", "[" * 9000],
    "90,000 levels": ["--evaluate.target_returns", "[" * 90_000],
    "a number of 36,000 bits": ["--model.width", "0x" + "f" * 9000],
    "a number of 5000 digits": ["--seed", "9" * 5000],
    "a number to the base 60": ["--model.layers", "1" + ":1" * 40_000],
    "a list for a number": ["--seed", "[" + "1, " * 1000 + "1]"],
    "two lines": ["--run", "one\ntwo"],
    "no file": ["--config", f"!!python/object/apply:os.system [{COMMAND}]"],
    "a device as the config": ["--config", "/dev/zero"],
    "a folder as the config": ["--config", "."],
    "a traversing dataset": ["--dataset", "../../x-v0"],
    "NUL in a dataset": ["--dataset", "a/b\0-v0"],
    "an environment of a module": ["--environment", f"{TRAP}:Env-v0"],
}
JSON = {  # in the place of a card
    "no JSON": b"{",
    "not UTF-8": b'{"format": "\xff"}',
    "a list": b"[1]",
    "deep": b'{"format": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a key twice": b'{"format": 1, "format": 1}',
    "NaN": b'{"format": NaN}',
    "an infinite number": b'{"format": 1e999}',
    "5000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "17 MB": b" " * 17_000_000,
    "a format of another type": b'{"format": [[1]], "versions": "\\ud800\\u001b[2J"}',
}
CARD = {  # what is changed in a card
    "a step that is a float": {"step": 1.5},
    "a step that is negative": {"step": -1},
    "a step that is a list": {"step": [1]},
    "a step that is huge": {"step": 10**400},
    "a dimension that is huge": {"observation_dim": 10**12},
    "a dimension that is another": {"observation_dim": 3},
    "a dimension that is true": {"observation_dim": True},
    "a config that is a list": {"config": []},
    "a config that is no more": {"config": {}},
    "an environment that is a number": {"environment": 3},
    "an environment of two lines": {"environment": "a\nb"},
}
SETTINGS = {  # what is changed in a card's config
    "an environment of a module": {"environment": f"{TRAP}:Env-v0"},
    "a traversing dataset": {"dataset": "../../x-v0"},
    "a wide model": {"model": {"width": 10**6}},
    "another model": {"model": {"width": 24}},
    "more layers": {"model": {"layers": 200}},
    "a model of too many weights": {"model": {"width": 16_384, "layers": 256}},
    "a key that is unknown": {"class_path": f"{TRAP}.X"},
}


def tensors(header: bytes | dict, content: bytes = b"", length: int | None = None) -> bytes:
    """A file as safetensors lays it out, whatever stands in it."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def entry(shape: list, begin: int = 0, end: int = 0, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TENSORS = {  # in the place of a file of tensors
    "a pickle": b"\x80\x04c" + f"os\nsystem\n(V{COMMAND}\ntR.".encode(),
    "nothing": b"",
    "a header that is longer than the file": tensors({}, length=1000),
    "a header of 2^63 bytes": tensors({}, length=2**63),
    "a header of 9 MB": tensors(b"{}" + b" " * 9_000_000),
    "a header that is deep": tensors(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a header that is no JSON": tensors(b"{"),
    "a header that is a list": tensors(b"[]"),
    "a name twice": tensors(b'{"a": %s, "a": %s}' % ((json.dumps(entry([0])).encode(),) * 2)),
    "a name of two lines": tensors({"a\nb": entry([0])}),
    "a dimension of 2^62": tensors({"a": entry([0, 2**62])}),
    "a tensor of 2^66 numbers": tensors({"a": entry([2**33, 2**33], 0, 4)}, b"0000"),
    "a million dimensions": tensors({"a": entry([1] * 1_000_000, 0, 4)}, b"0000"),
    "20,000 tensors": tensors({str(i): entry([0]) for i in range(20_000)}),
    "offsets beyond the file": tensors({"a": entry([100], 0, 400)}),
    "offsets that overlap": tensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"0000"),
    "offsets that go back": tensors({"a": entry([1], 4, 0)}, b"0000"),
    "bytes that nobody names": tensors({"a": entry([1], 0, 4)}, b"00000000"),
    "a dtype that is not ours": tensors({"a": entry([1], 0, 1, "F8_E4M3")}, b"0"),
    "a truth value of 7": tensors({"a": entry([1], 0, 1, "BOOL")}, b"\x07"),
    "tensors of something else": tensors({"a": entry([1], 0, 4)}, b"0000"),
}
WEIGHTS = {  # what is changed among the tensors of a model
    "a weight of another shape": lambda old: {"model.head.bias": torch.zeros(2)},
    "a weight of another dtype": lambda old: {"model.head.bias": old["model.head.bias"].double()},
    "a weight more": lambda old: {"model.more": torch.zeros(1)},
    "a mean that is not finite": lambda old: {"normaliser.mean": old["normaliser.mean"] * np.nan},
    "a std of 0": lambda old: {"normaliser.std": old["normaliser.std"] * 0},
    "a std of another shape": lambda old: {"normaliser.std": torch.ones(7)},
    "a box inside out": lambda old: {"action.low": old["action.high"] + 1},
    "a box without a dimension": lambda old: {"action.low": torch.tensor(-1.0), "action.high": torch.tensor(1.0)},
}
EVALUATION = {
    "no JSON": b"{", "a list": b"[]", "no results": b"{}", "results that are none": b'{"results": [1]}',
    "deep": b'{"results": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "results without a step": b'{"results": [{}]}',
    "a step that is a word": b'{"results": [{"dataset": "a", "seed": 1, "step": "x"}]}',
}


def inputs() -> Iterator[tuple[str, Make]]:
    """Name and maker of every input."""
    for name, text in YAML.items():
        content = text if isinstance(text, bytes) else text.encode()
        if not content.startswith(b"dataset"):
            content = f"dataset: {toys.ID}\n".encode() + content
        yield f"config file: {name}", functools.partial(_file, content, "config.yaml", ["train", "--config"])
        yield f"config of a run: {name}", functools.partial(_run_config, content)
    yield "config file: a pipe", functools.partial(_pipe, "pipe", ["train", "--config", "pipe"])
    yield "config of a run: a pipe", functools.partial(_pipe, "run/config.yaml", ["report", "run"])
    yield "config of a run: one bit", functools.partial(_flipped, "run/config.yaml", ["report", "run"])
    for name, options in OPTIONS.items():
        yield f"options: {name}", functools.partial(_options, ["train", "--dataset", toys.ID, *options])
    for name, content in EVALUATION.items():
        yield f"report: {name}", functools.partial(_into, "run/evaluation.json", content, ["report", "run"])
        yield f"export: {name}", functools.partial(_into, "run/evaluation.json", content, ["export", "run", "out"])
    yield "report: a pipe", functools.partial(_pipe, "run/evaluation.json", ["report", "run"])
    for place, command in {"run": ["evaluate", "run"], "policy": ["evaluate", "policy"]}.items():
        card = "checkpoint.json" if place == "run" else "config.json"
        for name, content in JSON.items():
            yield f"card of a {place}: {name}", functools.partial(_inside, place, card, content, command)
        for name, changes in CARD.items():
            yield f"card of a {place}: {name}", functools.partial(_card, place, card, changes, command)
        for name, changes in SETTINGS.items():
            yield f"config of a {place}'s card: {name}", functools.partial(_settings, place, card, changes, command)
        for name, content in TENSORS.items():
            yield f"tensors of a {place}: {name}", functools.partial(
                _inside, place, "model.safetensors", content, command)
        for name, change in WEIGHTS.items():
            yield f"weights of a {place}: {name}", functools.partial(_weights, place, change, command)
        for name in ("model.safetensors", card, "manifest.json"):
            yield f"a {place} whose {name} is a pipe", functools.partial(_piped, place, name, command)
            yield f"a {place} whose {name} is a link", functools.partial(_linked, place, name, command)
    yield "trace of a policy: a pickle", functools.partial(
        _inside, "policy", "trace.safetensors", TENSORS["a pickle"], ["evaluate", "policy"])
    yield "training of a run: a pickle", functools.partial(
        _inside, "run", "training.safetensors", TENSORS["a pickle"], ["evaluate", "run"])
    yield "export of a run: an environment of a module", functools.partial(
        _settings, "run", "checkpoint.json", SETTINGS["an environment of a module"], ["export", "run", "out"])
    for name in ("../../x-v0", "/etc/passwd", "a/b\0-v0", f"{TRAP}:X-v0", "-v0\n"):
        yield f"id of a dataset: {name!r}", functools.partial(_options, ["data", "show", name])
    for verb in (["data", "show"], ["train", "--dataset"]):
        yield f"{' '.join(verb)}: an entry point", functools.partial(
            _metadata, {"env_spec": json.dumps({"id": f"{TRAP}:X-v0", "entry_point": f"{TRAP}:X"}),
                        "action_space": None}, [*verb, toys.ID])
        yield f"{' '.join(verb)}: os.mkdir as an entry point", functools.partial(
            _metadata, {"env_spec": json.dumps({"id": "X-v0", "entry_point": "os:mkdir", "kwargs": {"path": CANARY}}),
                        "observation_space": None}, [*verb, toys.ID])
        yield f"{' '.join(verb)}: a space that is deep", functools.partial(
            _metadata, {"action_space": "[" * 200_000}, [*verb, toys.ID])
        yield f"{' '.join(verb)}: an integer that is huge", functools.partial(
            _metadata, {"total_steps": 10**400}, [*verb, toys.ID])
        yield f"{' '.join(verb)}: metadata that are a pipe", functools.partial(
            _pipe, f"datasets/{toys.ID}/data/metadata.json", [*verb, toys.ID])


@functools.cache
def _home() -> Path:
    _kept.append(tempfile.TemporaryDirectory())
    return Path(_kept[-1].name)


@functools.cache
def _template(place: str) -> Path:
    """A folder in which all is in order: run, policy (the run exported) or datasets."""
    folder = _home() / place
    if place == "datasets":
        from drl.data import minari_writer

        with mock.patch.dict(os.environ, {"MINARI_DATASETS_PATH": str(folder)}):
            minari_writer.write(toys.ID, toys.recorded([5, 6]), environment=toys.ENVIRONMENT, algorithm="-",
                                reference=None, description="", extra={})
    elif place == "policy":
        from drl.export import export

        export(_template("run"), folder)
    else:
        checkpoint = toys.checkpoint(toys.ENVIRONMENT)
        checkpoints.save(checkpoint, folder, keep=1)
        write_config(folder / "config.yaml", checkpoint.config)
        result = {"environment": toys.ENVIRONMENT, "dataset": toys.ID, "seed": 0, "step": 7, "mode": "recurrent",
                  "target_return": 1.0, "episodes": 1, "normalized_score": 50.0, "versions": {"mujoco": "3"},
                  "seeds": [1]}
        (folder / "evaluation.json").write_text(json.dumps({"format": 1, "results": [result]}))
    return folder


def _copied(folder: Path, place: str) -> Path:
    """A template in `folder`; returns where the files of tensors lie in it."""
    (folder / f"{TRAP}.py").write_text(f"open('{CANARY}', 'w')\nclass X: pass\n")
    if place:
        shutil.copytree(_template(place), folder / place)
    return next((folder / place / "checkpoints").glob("step-*")) if place == "run" else folder / place


def _options(command: list[str], folder: Path) -> list[str]:
    _copied(folder, "")
    return command


def _file(content: bytes, name: str, command: list[str], folder: Path) -> list[str]:
    _copied(folder, "")
    (folder / name).write_bytes(content)
    return [*command, name]


def _into(path: str, content: bytes, command: list[str], folder: Path) -> list[str]:
    _copied(folder, "run")
    (folder / path).write_bytes(content)
    return command


def _run_config(content: bytes, folder: Path) -> list[str]:
    return _into("run/config.yaml", content, ["train", "--resume", "--run", "run"], folder)


def _flipped(path: str, command: list[str], folder: Path) -> list[str]:
    _copied(folder, "run")
    content = bytearray((folder / path).read_bytes())
    content[100] ^= 1
    (folder / path).write_bytes(content)
    return command


def _pipe(path: str, command: list[str], folder: Path) -> list[str]:
    _copied(folder, path.partition("/")[0] if "/" in path else "")
    (folder / path).unlink(missing_ok=True)
    os.mkfifo(folder / path)
    return command


def _sign(inside: Path) -> None:
    """Make the manifest fit, as someone would who means harm."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in inside.iterdir()
               if path.is_file() and path.name != "manifest.json"}
    (inside / "manifest.json").write_text(json.dumps(digests))


def _inside(place: str, name: str, content: bytes, command: list[str], folder: Path) -> list[str]:
    inside = _copied(folder, place)
    (inside / name).write_bytes(content)
    _sign(inside)
    return command


def _card(place: str, name: str, changes: dict, command: list[str], folder: Path) -> list[str]:
    return _inside(place, name, json.dumps(_read(place, name) | changes).encode(), command, folder)


def _read(place: str, name: str) -> dict:
    """A card of the template."""
    return json.loads(next(_template(place).rglob(name)).read_text())


def _settings(place: str, name: str, changes: dict, command: list[str], folder: Path) -> list[str]:
    config = _read(place, name)["config"]
    merged = {key: config[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
    return _card(place, name, {"config": config | merged}, command, folder)


def _weights(place: str, change: Callable, command: list[str], folder: Path) -> list[str]:
    inside = _copied(folder, place)
    old = load_file(inside / "model.safetensors")
    save_file(old | change(old), inside / "model.safetensors")
    _sign(inside)
    return command


def _piped(place: str, name: str, command: list[str], folder: Path) -> list[str]:
    inside = _copied(folder, place)
    (inside / name).unlink()
    os.mkfifo(inside / name)
    return command


def _linked(place: str, name: str, command: list[str], folder: Path) -> list[str]:
    """The very file that belongs there, but elsewhere."""
    inside = _copied(folder, place)
    (inside / name).rename(folder / "elsewhere")
    (inside / name).symlink_to(folder / "elsewhere")
    return command


def _metadata(changes: dict, command: list[str], folder: Path) -> list[str]:
    _copied(folder, "datasets")
    file = folder / "datasets" / toys.ID / "data" / "metadata.json"
    metadata = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in metadata.items() if value is not None}))
    return command
