"""Whatever a stranger's file holds: nothing of it runs, memory and time stay bounded, one clear line says why."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
import yaml
from hostile_inputs import CANARY, TRAP, entry, inputs, tensors
from safetensors.torch import load_file, save_file

from drl import cli, foreign
from drl import options as command_line
from drl.config import Config, ModelConfig, TrainConfig
from drl.config_files import read_config, write_config
from drl.data.store import EpisodeStore, Recorded, Spaces
from drl.errors import UserError, shown
from drl.foreign_tensors import read_tensors
from drl.report_runs import losses
from drl.trainer import Trainer

INPUTS = dict(inputs())
AGAIN = ("config of a run: ", "card of a policy: ", "config of a policy's card: ", "tensors of a policy: ",
         "weights of a policy: ", "export: ")  # what is met elsewhere too; of these one in five is quick
GROWING = ("bomb", "levels", "deep", "digits", "2^", "million", "MB", "megabyte", "20,000", "huge", "pipe", "too many",
           "/dev/zero", "bits", "base 60")
SECONDS = 5  # of one command, on a machine that is busy
ROOM = 512 << 20  # bytes of memory beside the libraries
MAIN = f"""
import contextlib, io, json, os, resource, sys, time
from pathlib import Path
from hostile_inputs import inputs
from drl import cli, exported, options

chosen, outcomes, build = json.load(sys.stdin), {{}}, options.build()
options.build = lambda: build
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for number, (name, make) in enumerate((name, make) for name, make in inputs() if name in chosen):
    os.makedirs(str(number))
    os.chdir(str(number))
    command = make(Path.cwd())
    if number == 0:
        cli.main(command)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + {ROOM}, used + {ROOM}))
    began = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = cli.main(command)
    outcomes[name] = [status, said.getvalue(), time.monotonic() - began]
    os.chdir("..")
json.dump(outcomes, sys.stdout)
"""


def quick(names: list[str]) -> list:
    """All names as parameters; those of AGAIN are slow, but for one in five."""
    again = [name for name in names if name.startswith(AGAIN)]
    return [pytest.param(name, marks=pytest.mark.slow) if name in again and again.index(name) % 5 else name
            for name in names]


@pytest.fixture(scope="module")
def parser():
    """One parser for all commands: building it takes longer than most of them."""
    return functools.cache(command_line.build)


@pytest.mark.parametrize("name", quick(list(INPUTS)))
def test_what_means_harm_is_refused_in_one_line_and_nothing_of_it_runs(name, parser, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", "datasets")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(command_line, "build", parser)
    command = INPUTS[name](tmp_path)
    began = time.monotonic()

    status = cli.main(command)

    took, said = time.monotonic() - began, capfd.readouterr().err
    assert status == 2
    assert said.startswith("drl: ") and said.count("\n") == 1 and said[:-1].isprintable() and len(said) < 1000
    assert "is not on this machine" not in said, "that would be said of the dataset, had nothing been refused before"
    assert not list(tmp_path.rglob(f"{CANARY}*")) and TRAP not in sys.modules
    assert took < SECONDS


def test_what_would_grow_without_bound_takes_little_memory_and_time(tmp_path):
    chosen = [name for name in INPUTS if any(word in name for word in GROWING) and not name.startswith(AGAIN)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "MINARI_DATASETS_PATH": "datasets",
                                "OMP_NUM_THREADS": "1"}

    child = subprocess.run([sys.executable, "-c", MAIN], input=json.dumps(chosen), cwd=tmp_path, env=environment,
                           capture_output=True, text=True, timeout=300)

    assert child.returncode == 0, child.stderr[-2000:]
    outcomes = json.loads(child.stdout)
    assert outcomes.keys() == set(chosen) and len(chosen) > 40
    assert all(status == 2 and said.count("\n") == 1 for status, said, _ in outcomes.values())
    assert max(took for *_, took in outcomes.values()) < SECONDS
    assert not list(tmp_path.rglob(f"{CANARY}*"))


def test_every_input_would_be_found_by_the_canary_or_the_status(tmp_path, monkeypatch):
    """The trap works: imported, it leaves the canary; and the folders that the inputs spoil are in order without it."""
    monkeypatch.chdir(tmp_path)
    INPUTS["options: two lines"](tmp_path)
    subprocess.run([sys.executable, "-c", f"import {TRAP}"], cwd=tmp_path, check=True)
    assert (tmp_path / CANARY).exists()


SPACES = Spaces(toys.ENVIRONMENT, 2, np.float32([-1]), np.float32([1]))


def episode_of(recorded: Recorded) -> SimpleNamespace:
    """As Minari gives it."""
    ends = np.arange(len(recorded.rewards)) == len(recorded.rewards) - 1
    return SimpleNamespace(observations=recorded.observations, actions=recorded.actions, rewards=recorded.rewards,
                           terminations=ends & recorded.terminated, truncations=ends & (not recorded.terminated))


# A run's config and its checksum


@pytest.fixture
def config(tmp_path) -> Path:
    write_config(tmp_path / "config.yaml", Config(dataset="a/b-v0", seed=3))
    return tmp_path / "config.yaml"


def test_a_config_comes_back_and_ends_with_its_checksum(config):
    assert read_config(config).seed == 3 and os.listdir(config.parent) == ["config.yaml"]
    assert yaml.safe_load(config.read_text())["seed"] == 3
    assert config.read_text().splitlines()[-1].startswith("# sha256: ")


def test_any_flipped_bit_of_a_config_is_noticed(config):
    """Every bit around the mark of the checksum, which could make it none, and 200 others."""
    whole = config.read_bytes()
    mark = whole.rindex(b"\n# sha256: ")
    flips = [*range(8 * mark, 8 * (mark + 12)), *np.random.default_rng(0).choice(8 * len(whole), 200, replace=False)]
    for bit in flips:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        config.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            read_config(config)
        assert str(caught.value).startswith(str(config)) and str(caught.value).isprintable()


def test_a_changed_config_says_how_to_keep_the_change_and_one_without_the_line_is_read(config):
    config.write_text(config.read_text().replace("seed: 3", "seed: 4"))
    with pytest.raises(UserError, match="config.yaml is damaged: .* on purpose, take the last line out$"):
        read_config(config)
    config.write_text("\n".join(config.read_text().splitlines()[:-1]))
    assert read_config(config).seed == 4


def test_writing_a_config_replaces_links_and_follows_none(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("config.yaml", "config.yaml.partial"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_config(tmp_path / "config.yaml", Config(dataset="a/b-v0"))
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "config.yaml").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "precious"]


# Parsers


@pytest.mark.parametrize("text", [
    "on", "1e-4", "1.0e-05", "-3", "+7", "1_000", "010", "0x10", "1:30", "2001-01-01", "~", "true", "'1'", "yes", ".5",
    "-.inf", "1e3", "=", "<<",
])
def test_plain_values_are_those_of_yaml_1_2(text):
    """Against the rules of its core schema, written down here; 1_000 is of 1.1 and kept."""
    words = {"on", "010", "0x10", "1:30", "2001-01-01", "yes", "=", "<<"}
    others = {"~": None, "true": True, "'1'": "1", "1_000": 1000, "-3": -3, "+7": 7, "1e3": 1000.0, "-.inf": -np.inf}
    expected = text if text in words else others[text] if text in others else float(text)
    found = foreign.parse_yaml(text)
    assert found == expected and type(found) is type(expected)


def test_a_tensor_file_that_is_in_order_comes_back_bit_for_bit(tmp_path):
    saved = {"a": torch.randn(3, 4), "b": torch.tensor([True, False]), "c": torch.zeros(0, 3), "d": torch.tensor(2**40),
             "e": torch.randn(2, dtype=torch.float64), "f": torch.randn(2).bfloat16(), "g": torch.arange(3).byte()}
    save_file(saved, tmp_path / "file", {"format": "1"})
    torch.testing.assert_close(read_tensors(tmp_path / "file", "toy"), saved, rtol=0, atol=0)
    assert read_tensors(tmp_path / "file", "toy", most=10_000).keys() == saved.keys()
    with pytest.raises(UserError, match="larger than 100 bytes"):
        read_tensors(tmp_path / "file", "toy", most=100)


@pytest.mark.parametrize(
    ("header", "content"),
    [
        ({"a": entry([0, 2**62])}, b""), ({"a\nb": entry([0])}, b""), ({"a": entry([1] * 100, 0, 4)}, b"0000"),
        ({"a": entry([1], 0, 1, "BOOL")}, b"\x07"), ({"a": entry([1], 0, 1, "F8_E4M3")}, b"0"),
        ({str(number): entry([0]) for number in range(10_001)}, b""),
        (b'{"a": %s, "a": %s}' % ((json.dumps(entry([0])).encode(),) * 2), b""),
        (b"{}" + b" " * 8_000_000, b""),
    ],
    ids=["2^62", "two lines", "100 dimensions", "truth", "dtype", "10,001 tensors", "a name twice", "header"],
)
def test_what_the_library_alone_would_take_is_refused(tmp_path, header, content):
    (tmp_path / "file").write_bytes(tensors(header, content))
    load_file(tmp_path / "file")
    with pytest.raises(UserError):
        read_tensors(tmp_path / "file", "toy")


@pytest.mark.parametrize(
    "text", ["{", '{"a": 1, "a": 1}', "NaN", "[-Infinity]", "1e999", "9" * 5000, "[" * 100_000, "\xff"],
    ids=lambda text: text[:12],
)
def test_json_that_python_reads_or_trips_over_is_a_value_error(text):
    with pytest.raises(ValueError):
        foreign.parse_json(text.encode("latin-1"))


@pytest.mark.parametrize(
    "value", ["x" * 10**6, list(range(10**6)), {i: i for i in range(10**5)}, 2**10**6, "a\nb\x1b[2J"],
    ids=["word", "list", "dict", "integer", "control"],
)
def test_a_value_is_shown_short_and_on_one_line(value):
    assert len(shown(value)) <= 66 and shown(value).isprintable()


@pytest.mark.parametrize("name, change", [
    ("sampler.episode", lambda old: old + 10**9), ("sampler.episode", lambda old: old - 10**9),
    ("sampler.position", lambda old: old + 10**9), ("sampler.position", lambda old: -1 - old),
    ("sampler.position", lambda old: old[:-1]), ("sampler.restart", lambda old: old.byte()),
    ("sampler.generator", lambda old: old[:16]), ("optimizer.0.exp_avg", lambda old: old.flatten()[:1]),
    ("optimizer.1.exp_avg_sq", lambda old: old.double()), ("state.0.kv", lambda old: old[:1]),
    ("state.1.z", lambda old: old[..., :1]), ("state.1.z", lambda old: None),
])
def test_a_training_state_that_cannot_be_is_refused(name, change):
    store = EpisodeStore.from_episodes(map(episode_of, toys.recorded([5, 6])), SPACES, toys.ID)
    model = ModelConfig(**toys.PLAIN, width=16, layers=2, heads=2)
    config = Config(dataset=toys.ID, environment=toys.ENVIRONMENT, device="cpu", model=model,
                    train=TrainConfig(batch_size=3, stream_groups=2, context=2, precision="float32", compile="off"))
    past = Trainer(config, store).checkpoint()
    Trainer(config, store).load(past)
    changed = {name: change(past.training[name])}
    training = {key: value for key, value in (past.training | changed).items() if value is not None}

    with pytest.raises(UserError) as caught:
        Trainer(config, store).load(dataclasses.replace(past, training=training))

    assert str(caught.value).isprintable()


def test_a_log_that_is_none_is_one_line_and_a_torn_last_line_no_flaw(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "tra')
    assert [list(column) for column in losses(tmp_path)] == [[1], [2.5]]
    for text in ("{\n", "1\n", '{"train/loss": 1}\n', '{"step": "x", "train/loss": 1}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match="is not what drl train logs"):
            losses(tmp_path)
