"""A checkpoint is whole or it is not there, and whatever happened to it since is noticed."""

import ast
import dataclasses
import errno
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from toys import PLAIN

from drl import checkpoint as checkpoints
from drl import checkpoint_files, disk, intact
from drl.checkpoint import Checkpoint
from drl.config import Config, EvaluateConfig, ModelConfig
from drl.data.store import Normaliser, Spaces
from drl.errors import UserError
from drl.model import DecisionTransformer
from drl.policy import RecurrentPolicy, WindowPolicy

O, A = 5, 3  # noqa: E741
FILES = ["model.safetensors", "training.safetensors", "checkpoint.json", "manifest.json"]
SOURCES = sorted((Path(__file__).parents[1] / "drl").rglob("*.py"))


def checkpoint(step: int = 7) -> Checkpoint:
    """One with a value of its own for each step, and training tensors of every kind that a trainer keeps."""
    generator = torch.Generator().manual_seed(step)
    config = Config(
        dataset="a/b-v0",
        environment="Pendulum-v1",
        device="cpu",
        model=ModelConfig(**PLAIN, width=16, heads=2, layers=2, max_timesteps=11),
        evaluate=EvaluateConfig(target_returns=[3600.0, -1e-3]),
    )
    weights = DecisionTransformer(config.model, O, A).state_dict()
    rng = np.random.default_rng(step)
    return Checkpoint(
        config=config,
        step=step,
        weights={name: torch.randn(value.shape, generator=generator) for name, value in weights.items()},
        normaliser=Normaliser(rng.normal(size=O).astype(np.float32), rng.uniform(1, 2, O).astype(np.float32)),
        spaces=Spaces("Pendulum-v1", O, np.array([-1, -2, -3], np.float32), np.array([1, 2, 4], np.float32)),
        dataset_fingerprint="f" * 64,
        versions={"drl": "0.1.0", "torch": "2"},
        training={
            "optimizer.0.step": torch.tensor(float(step)),
            "optimizer.0.exp_avg": torch.randn(3, 4, generator=generator).T,
            "state.0.kv": torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64),
            "sampler.restart": torch.tensor([True, False]),
            "sampler.episode": torch.tensor([2**40, 1]),
            "rng.cpu": torch.get_rng_state(),
            "nothing": torch.zeros(0, 3),
        },
        dataset_return=415.5,
    )


def assert_same(actual: Checkpoint, expected: Checkpoint) -> None:
    """Bit for bit, dtypes included."""
    arrays = ("weights", "training", "normaliser", "spaces")
    for field in dataclasses.fields(Checkpoint):
        if field.name not in arrays:
            assert getattr(actual, field.name) == getattr(expected, field.name)
    for name in ("weights", "training"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0)
    for name in ("normaliser", "spaces"):
        for one, other in zip(getattr(actual, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(one, other, strict=isinstance(other, np.ndarray))


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != "latest")


def refusal(folder: Path) -> str:
    """The message with which `load` refuses, which must be one line."""
    with pytest.raises(UserError) as caught:
        checkpoints.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sign(folder: Path) -> None:
    """Make the manifest fit the files again, as someone would who edits them on purpose."""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES[:3]}
    (folder / "manifest.json").write_text(json.dumps(digests))


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    saved = checkpoint()
    folder = checkpoints.save(saved, tmp_path, keep=1)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for place in (folder, tmp_path, str(tmp_path)):
        assert_same(checkpoints.load(place), saved)


def test_a_checkpoint_may_hold_no_training_state(tmp_path):
    checkpoints.save(dataclasses.replace(checkpoint(), training={}), tmp_path, keep=1)
    assert checkpoints.load(tmp_path).training == {}


def test_saving_leaves_the_tensors_of_the_caller_alone(tmp_path):
    saved, expected = checkpoint(), checkpoint()
    expected.training["rng.cpu"] = saved.training["rng.cpu"].clone()
    checkpoints.save(saved, tmp_path, keep=1)
    assert_same(saved, expected)


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    shared = torch.arange(6.0)
    saved = dataclasses.replace(checkpoint(), training={"a": shared, "b": shared, "c": shared[2:]})
    checkpoints.save(saved, tmp_path, keep=1)
    assert_same(checkpoints.load(tmp_path), saved)


def test_a_run_is_its_newest_checkpoint(tmp_path):
    for step in (900, 10_000, 2_000):
        checkpoints.save(checkpoint(step), tmp_path, keep=9)
    (tmp_path / "checkpoints" / "step-99999999.partial").mkdir()
    (tmp_path / "checkpoints" / "step-best").mkdir()
    assert checkpoints.find(tmp_path).name == "step-00010000"
    assert checkpoints.load(tmp_path).step == 10_000
    assert checkpoints.load(tmp_path / "checkpoints" / "step-00000900").step == 900


def test_a_run_exists_once_it_has_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "step-00000001.partial").mkdir(parents=True)
    assert not checkpoints.exists(tmp_path) and not checkpoints.exists(tmp_path / "nowhere")
    checkpoints.save(checkpoint(), tmp_path, keep=1)
    assert checkpoints.exists(tmp_path)


def test_a_folder_without_a_checkpoint_is_answered_with_what_to_type(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"no checkpoint in {tmp_path / 'nowhere'}; ")
    assert "drl train --config" in message


def test_only_the_newest_are_kept(tmp_path):
    kept = []
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(checkpoint(step), tmp_path, keep=2)
        kept.append(steps(tmp_path))
    assert kept[0] == ["step-00000001"]
    assert kept[-1] == ["step-00000004", "step-00000005"]


def test_the_older_go_only_once_the_new_one_is_there(tmp_path, monkeypatch):
    """Look at the disk whenever a folder is removed or renamed."""
    checkpoints.save(checkpoint(1), tmp_path, keep=1)
    seen = []

    def remove(path, **options):
        seen.append((Path(path).name, checkpoints.load(tmp_path).step))
        real_remove(path, **options)

    real_remove = shutil.rmtree
    monkeypatch.setattr(checkpoints.shutil, "rmtree", remove)
    checkpoints.save(checkpoint(2), tmp_path, keep=1)

    assert seen == [("step-00000002.partial", 2), ("step-00000001.partial", 2)]


@pytest.mark.parametrize("again", [False, True], ids=["a later step", "the same step"])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(
    ("function", "calls"),
    [("checkpoint_files.write_tensors", 0), ("checkpoint_files.write_tensors", 1),
     ("intact.write_json", 0), ("disk.sha256", 1), ("disk.sync", 2),
     ("disk.replace", 0)],
)
def test_a_save_that_dies_midway_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, function, calls, keep, again):
    """`function` dies after `calls` calls that went well; so may the process at any other point."""
    step = 7 if again else 8
    checkpoints.save(checkpoint(7), tmp_path, keep)
    module, _, name = function.rpartition(".")
    owner = {"checkpoint_files": checkpoint_files, "disk": disk, "intact": intact}[module]
    real, done = getattr(owner, name), []

    def dies(*arguments, **options):
        if len(done) == calls:
            raise OSError("No space left on device")
        done.append(0)
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(owner, name, dies)
        checkpoints.save(checkpoint(step), tmp_path, keep)

    survivor = checkpoints.load(tmp_path)
    assert survivor.step == 7
    torch.testing.assert_close(survivor.weights, checkpoint(7).weights, rtol=0, atol=0)

    checkpoints.save(checkpoint(9), tmp_path, keep=1)
    assert steps(tmp_path) == ["step-00000009"], "the leftover must be gone"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(tmp_path, name):
    folder = checkpoints.save(checkpoint(), tmp_path, keep=1)
    whole = (folder / name).read_bytes()
    positions = sorted({0, len(whole) - 1, *np.linspace(0, len(whole) - 1, 30, dtype=int).tolist()})
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (folder / name).write_bytes(damaged)
        message = refusal(tmp_path)
        assert str(folder) in message and ("is damaged" in message or "cannot be read" in message)
    (folder / name).write_bytes(whole)
    checkpoints.load(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_noticed(tmp_path, name):
    folder = checkpoints.save(checkpoint(), tmp_path, keep=1)
    whole = (folder / name).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 3):
        (folder / name).write_bytes(whole[:size])
        assert str(folder) in refusal(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(tmp_path, name):
    folder = checkpoints.save(checkpoint(), tmp_path, keep=1)
    (folder / name).unlink()
    assert name in refusal(tmp_path)
    assert str(folder) in refusal(folder)


def test_files_of_another_checkpoint_are_noticed(tmp_path):
    one, other = (checkpoints.save(checkpoint(step), tmp_path, keep=2) for step in (1, 2))
    shutil.copy(one / "model.safetensors", other)
    assert "model.safetensors does not match manifest.json" in refusal(other)


@pytest.mark.parametrize("manifest", ["{}", "[]", "null", '"a"'])
def test_a_manifest_of_something_else_is_noticed(tmp_path, manifest):
    folder = checkpoints.save(checkpoint(), tmp_path, keep=1)
    (folder / "manifest.json").write_text(manifest)
    assert str(folder) in refusal(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["a bit flipped", "cut short", "its end zeroed", "missing", "a folder", "a link"])
def test_the_newest_sound_checkpoint_is_taken_and_a_damaged_newer_one_told_loudly(tmp_path, capsys, harm, name):
    saved = {step: checkpoint(step) for step in (1, 2, 3)}
    folders = {step: checkpoints.save(saved[step], tmp_path, keep=3) for step in saved}
    damage(folders[3] / name, harm)

    assert_same(checkpoints.load(tmp_path), saved[2])

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"drl: WARNING: checkpoint {'file ' * (str(folders[3] / name) in line)}{folders[3]}")
    assert name in line and line.endswith("; going on with step-00000002 instead")
    assert "use an older one" in refusal(folders[3]), "named itself, it is refused"


def damage(file: Path, harm: str) -> None:
    content = bytearray(file.read_bytes())
    if harm == "a bit flipped":
        content[len(content) // 3] ^= 16
        file.write_bytes(content)
    elif harm == "cut short":
        file.write_bytes(content[:-1])
    elif harm == "its end zeroed":
        file.write_bytes(content[:len(content) // 2] + bytes(len(content) - len(content) // 2))
    else:
        moved = file.rename(file.parents[3] / f"moved-{file.name}")
        if harm == "a folder":
            file.mkdir()
        elif harm == "a link":
            file.symlink_to(moved)


def test_where_no_checkpoint_is_sound_the_newest_is_named(tmp_path):
    folders = [checkpoints.save(checkpoint(step), tmp_path, keep=2) for step in (1, 2)]
    for folder in folders:
        damage(folder / "model.safetensors", "cut short")
    message = refusal(tmp_path)
    assert str(folders[1]) in message and "no sound one is left" in message


def test_a_file_that_was_added_is_told_and_no_checkpoint_given_up_for_it(tmp_path):
    for step in (1, 2):
        folder = checkpoints.save(checkpoint(step), tmp_path, keep=2)
    (folder / "notes.txt").write_text("the best one")
    assert refusal(tmp_path) == f"checkpoint {folder} holds notes.txt, which is not of it; move that away"
    (folder / "notes.txt").rename(folder / ".notes")
    assert checkpoints.load(tmp_path).step == 2


def test_going_on_puts_damaged_newer_checkpoints_aside(tmp_path, capsys):
    for step in (1, 2, 3):
        folder = checkpoints.save(checkpoint(step), tmp_path, keep=3)
        if step > 1:
            damage(folder / "model.safetensors", "cut short")

    assert checkpoints.resume(tmp_path).step == 1

    assert steps(tmp_path) == ["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]
    assert len(capsys.readouterr().err.splitlines()) == 2
    checkpoints.save(checkpoint(2), tmp_path, keep=1)
    assert checkpoints.load(tmp_path).step == 2 and "step-00000002.damaged" in steps(tmp_path)


def test_a_run_without_a_checkpoint_has_nothing_to_go_on_from(tmp_path):
    assert checkpoints.resume(tmp_path) is None


def test_a_checkpoint_that_is_removed_while_it_is_read_is_no_damage(tmp_path, monkeypatch, capsys):
    """As when somebody evaluates a run that is being trained."""
    checkpoints.save(checkpoint(1), tmp_path, keep=1)
    read = checkpoint_files.read_acting

    def overtaken(path):
        if checkpoints.find(tmp_path).name == "step-00000001":
            checkpoints.save(checkpoint(2), tmp_path, keep=1)
        return read(path)

    monkeypatch.setattr(checkpoint_files, "read_acting", overtaken)
    assert checkpoints.load(tmp_path).step == 2
    assert capsys.readouterr().err == ""


def test_latest_names_the_newest_and_is_set_after_it_and_before_older_ones_go(tmp_path, monkeypatch):
    seen = []
    remove = checkpoints.shutil.rmtree

    def latest():
        return (tmp_path / "checkpoints" / "latest").read_text().strip()

    def removing(path, **options):
        if (tmp_path / "checkpoints" / "latest").exists():
            seen.append((path.name, latest()))
        remove(path, **options)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", removing)

    for step in (1, 2, 3):
        checkpoints.save(checkpoint(step), tmp_path, keep=1)
        assert latest() == f"step-{step:08d}"
    assert seen[-1] == ("step-00000002.partial", "step-00000003")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    folder = checkpoints.save(checkpoint(1), tmp_path, keep=1)
    shutil.copytree(folder, folder.with_name("step-00000002.partial") / "step-00000002")
    (tmp_path / "checkpoints" / "latest.partial").write_text("step-0000")

    checkpoints.tidy(tmp_path)

    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("function", ["write_bytes", "mkdir", "open"])
def test_a_disk_that_refuses_is_told_in_bytes_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, function, code):
    earlier = checkpoint(1)
    checkpoints.save(earlier, tmp_path, keep=1)

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(Path, function, refuse)
        checkpoints.save(checkpoint(2), tmp_path, keep=1)

    message = str(caught.value)
    assert re.search(r"checkpoint of update 2 cannot be written: .*; it needs 0.0 MB, [0-9.]+ MB are free; what stood "
                     r"there before is as it was; make room, then type: drl train --resume --run ", message)
    assert os.strerror(code) in message and "\n" not in message
    assert_same(checkpoints.load(tmp_path / "checkpoints" / "step-00000001"), earlier)


def test_a_file_that_may_not_grow_so_large_leaves_the_earlier_checkpoint(tmp_path):
    """A quota, as the system itself enforces it."""
    earlier = checkpoint(1)
    checkpoints.save(earlier, tmp_path, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match="checkpoint of update 2 cannot be written: File too large"):
            checkpoints.save(checkpoint(2), tmp_path, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(tmp_path) == ["step-00000001"]
    assert_same(checkpoints.load(tmp_path), earlier)


@pytest.mark.parametrize("where", ["weights", "training"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_checkpoint_with_a_number_that_is_not_finite_is_never_written(tmp_path, where, value):
    broken = checkpoint()
    name = {"weights": "head.bias", "training": "state.0.kv"}[where]
    getattr(broken, where)[name].view(-1)[1] = value
    with pytest.raises(UserError, match=rf"at update 7 the .* {name} is not finite and nothing is saved"):
        checkpoints.save(broken, tmp_path, keep=1)
    assert not (tmp_path / "checkpoints").exists()


def test_a_format_of_the_future_is_refused_with_the_versions_that_wrote_it(tmp_path):
    folder = checkpoints.save(checkpoint(), tmp_path, keep=1)
    card = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(card | {"format": 2}))
    sign(folder)
    message = refusal(tmp_path)
    assert "has format 2, this version reads 1; install the version that wrote it" in message
    assert '"torch": "2"' in message


def test_a_config_of_the_future_is_refused(tmp_path):
    folder = checkpoints.save(checkpoint(), tmp_path, keep=1)
    card = json.loads((folder / "checkpoint.json").read_text())
    card["config"]["model"]["experts"] = 8
    (folder / "checkpoint.json").write_text(json.dumps(card))
    sign(folder)
    assert "unknown config key 'model.experts'" in refusal(tmp_path)


class Trap:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", FILES[:2])
def test_a_pickle_in_the_place_of_tensors_is_not_opened(tmp_path, name):
    folder = checkpoints.save(checkpoint(), tmp_path, keep=1)
    torch.save(Trap(tmp_path / "sprung"), folder / name)
    sign(folder)
    with pytest.raises((SafetensorError, UserError)):
        checkpoints.load(tmp_path)
    pickle.loads(pickle.dumps(Trap(tmp_path / "control")))
    assert (tmp_path / "control").exists() and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_ever_unpickled(path):
    """Neither directly nor by a loader that may."""
    unsafe_modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    unsafe_loaders = {"torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    tree = ast.parse(path.read_text())
    safe = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)
            and "allow_pickle=False" in map(ast.unparse, node.keywords)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named = {(node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             for alias in node.names}
    called = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node not in safe}
    assert not (imported | {module for module, _ in named}) & unsafe_modules
    assert not (called | {f"{module}.{name}" for module, name in named}) & unsafe_loaders


@pytest.mark.parametrize("policy", [RecurrentPolicy, WindowPolicy])
@pytest.mark.parametrize(
    "change",
    [{"width": 24}, {"layers": 1}, {"layers": 3}, {"max_timesteps": 12}],
    ids=str,
)
def test_weights_of_another_config_are_refused_in_one_line(policy, change):
    saved = checkpoint()
    model = dataclasses.replace(saved.config.model, **change)
    other = dataclasses.replace(saved, config=dataclasses.replace(saved.config, model=model))
    with pytest.raises(UserError, match="^the policy is not sound: .+$") as caught:
        policy(other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", [RecurrentPolicy, WindowPolicy])
def test_weights_of_other_spaces_are_refused_in_one_line(policy):
    saved = checkpoint()
    other = dataclasses.replace(saved, spaces=saved.spaces._replace(observation_dim=O + 1))
    with pytest.raises(UserError, match="^the policy is not sound: .+$") as caught:
        policy(other)
    assert "\n" not in str(caught.value)


def test_softmax_weights_are_refused_by_the_recurrent_policy():
    saved = checkpoint()
    train = dataclasses.replace(saved.config.train, sampling="windows")
    model = dataclasses.replace(saved.config.model, attention="softmax")
    other = dataclasses.replace(saved, config=dataclasses.replace(saved.config, model=model, train=train))
    with pytest.raises(UserError, match="use --mode window"):
        RecurrentPolicy(other)
    WindowPolicy(other)
