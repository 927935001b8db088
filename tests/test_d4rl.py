"""D4RL's original files: what is imported is what was written in their layout, and whatever is not of it is refused
in one line. The files are made here; none of D4RL's is at hand."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import h5py
import minari
import numpy as np
import pytest

from drl import cli, disk
from drl.data import d4rl, d4rl_hdf5, guard, minari_files
from drl.errors import UserError

NAME = "hopper_medium_replay-v2.hdf5"
ID = "d4rl/hopper/medium-replay-v2"
ENDS = ["terminal", "timeout", "terminal", "timeout"]
LENGTHS = [2, 5, 1, 3]


def episodes(lengths=LENGTHS, ends=ENDS, dims=(11, 3), dtype=np.float32):
    """Episodes as they were played: observations (T+1, O), actions (T, A), rewards (T,), and how each ended."""
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(T + 1, dims[0])).astype(dtype),
         rng.uniform(-1, 1, (T, dims[1])).astype(np.float32).astype(dtype), rng.normal(size=T).astype(dtype), end)
        for T, end in zip(lengths, ends, strict=True)
    ]


def arrays(played, tail=0):
    """The same end to end, as D4RL's files have them; of the last `tail` steps the episode's end is not marked."""
    observations, actions, rewards, ends = zip(*played)
    last = [np.arange(len(part)) == len(part) - 1 for part in rewards]
    flags = {
        field: np.concatenate([mark & (end in (kind, "both")) for mark, end in zip(last, ends, strict=True)])
        for field, kind in (("terminals", "terminal"), ("timeouts", "timeout"))
    }
    return {
        "observations": np.concatenate([part[:-1] for part in observations]),
        "next_observations": np.concatenate([part[1:] for part in observations]),
        "actions": np.concatenate(actions),
        "rewards": np.concatenate(rewards),
    } | flags


def save(file, fields, **how):
    """Each field gzipped, as D4RL's own scripts do it, beside what else their files hold."""
    with h5py.File(file, "w") as content:
        for field, values in fields.items():
            content.create_dataset(field, data=values, **{"compression": "gzip"} | how)
        content["infos/qpos"] = np.zeros((len(fields["rewards"]), 6))
        content["metadata/algorithm"] = np.bytes_("SAC")
    return str(file)


@pytest.fixture
def in_process(monkeypatch):
    """What the guard does, without a process of its own."""
    def call(target, *arguments, memory, seconds):
        outcome = guard._outcome(target, arguments, memory)
        guard._raise_what(json.dumps(outcome).encode(), 0, seconds)

    monkeypatch.setattr(guard, "call", call)


@pytest.fixture
def file(tmp_path, in_process):
    """A well-formed file."""
    return save(tmp_path / NAME, arrays(episodes()))


def refusal(file, **options):
    """The one line with which a file is refused; nothing is left behind."""
    with pytest.raises(UserError) as caught:
        d4rl.convert(str(file), **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert not [left for left in minari_files.root().glob("*") if left.is_dir()]
    return message


# what is imported


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minari_itself_loads_the_episodes_that_were_played(in_process, tmp_path, dtype):
    played = episodes(dtype=dtype)  # D4RL's replay files hold float64, the others float32
    d4rl.convert(save(tmp_path / NAME, arrays(played)))

    dataset = minari.load_dataset(ID)

    assert (dataset.total_episodes, dataset.total_steps) == (4, 11)
    for found, (observations, actions, rewards, end) in zip(dataset.iterate_episodes(), played, strict=True):
        assert found.observations.dtype == found.rewards.dtype == dtype and found.actions.dtype == np.float32
        np.testing.assert_array_equal(found.observations, observations)  # all T+1
        np.testing.assert_array_equal(found.actions, actions)
        np.testing.assert_array_equal(found.rewards, rewards)
        last = np.arange(len(rewards)) == len(rewards) - 1
        np.testing.assert_array_equal(found.terminations, last & (end == "terminal"))
        np.testing.assert_array_equal(found.truncations, last & (end == "timeout"))


def test_our_own_reader_takes_them(file):
    imported = d4rl.convert(file)
    store = minari_files.read(ID)
    assert imported == (ID, minari_files.root() / ID, 0, (), False)
    np.testing.assert_array_equal(store.episode_lengths, LENGTHS)
    np.testing.assert_array_equal(store.observations, arrays(episodes())["observations"])
    np.testing.assert_array_equal(store.actions, arrays(episodes())["actions"])
    assert store.spaces.environment == "Hopper-v5"


def test_a_tail_without_an_end_is_dropped_and_counted(in_process, tmp_path):
    played = episodes([2, 5, 4], ["terminal", "timeout", "nothing"])
    imported = d4rl.convert(save(tmp_path / NAME, arrays(played)))
    assert imported.dropped == 4
    assert minari.load_dataset(ID).total_steps == 7
    assert minari.load_dataset(ID).storage.metadata["source"]["dropped_tail_steps"] == 4


def test_a_malformed_tail_does_not_matter_since_it_is_dropped(in_process, tmp_path):
    fields = arrays(episodes([2, 4], ["terminal", "nothing"]))
    fields["observations"][4] = np.nan
    assert d4rl.convert(save(tmp_path / NAME, fields)).dropped == 4


def test_where_both_flags_are_set_the_episode_was_terminated(in_process, tmp_path):
    d4rl.convert(save(tmp_path / NAME, arrays(episodes([3, 2], ["both", "timeout"]))))
    first, second = minari.load_dataset(ID).iterate_episodes()
    assert (first.terminations[-1], first.truncations[-1]) == (True, False)
    assert (second.terminations[-1], second.truncations[-1]) == (False, True)


def test_the_metadata_say_where_the_data_come_from(file):
    d4rl.convert(file)
    dataset = minari.load_dataset(ID)
    metadata = dataset.storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)
    np.testing.assert_allclose(minari.get_normalized_score(dataset, np.array([-20.272305, 3234.3])), [0, 1])
    sha256 = subprocess.run(["sha256sum", file], capture_output=True, text=True).stdout.split()[0]
    assert metadata["source"] == {"file": NAME, "sha256": sha256, "original": False, "episodes": 4, "steps": 11,
                                  "dropped_tail_steps": 0, "gaps": 0}
    assert metadata["reference_source"] == "D4RL infos.py" and "minari" in metadata["converted_with"]


def test_the_environment_is_named_for_evaluation_alone_since_the_data_were_not_recorded_in_it(file):
    d4rl.convert(file)
    dataset = minari.load_dataset(ID)
    assert dataset.env_spec is None and dataset.recover_environment(eval_env=True).spec.id == "Hopper-v5"


def test_only_a_file_with_the_checksum_of_d4rl_is_called_an_original(file, monkeypatch):
    d4rl.convert(file)
    assert minari.load_dataset(ID).storage.metadata["description"].startswith("Not D4RL's own file")

    monkeypatch.setitem(d4rl.ORIGINALS, "hopper/medium-replay", d4rl._digest(file))
    assert d4rl.convert(file, overwrite=True).original
    assert minari.load_dataset(ID).storage.metadata["description"].startswith("D4RL's original hopper/medium-replay")


@pytest.mark.parametrize("how", [{}, {"shuffle": True, "fletcher32": True}, {"compression": None},
                                 {"compression": None, "chunks": True}, {"chunks": (3, 2)}, {"chunks": (64, 64)}],
                         ids=str)
def test_every_plain_way_to_store_the_arrays_is_read(in_process, tmp_path, how, monkeypatch):
    monkeypatch.setattr(d4rl_hdf5, "SLICE", 100)  # bytes: several slices of each field, cut off the chunks
    fields = arrays(episodes(LENGTHS * 3, ENDS * 3))
    with h5py.File(tmp_path / NAME, "w") as content:
        for field, values in fields.items():
            chunks = how.get("chunks")
            own = {"chunks": chunks[: values.ndim]} if isinstance(chunks, tuple) else {}
            content.create_dataset(field, data=values, maxshape=(None,) * values.ndim if chunks else None,
                                   **{"compression": "gzip"} | how | own)
    d4rl.convert(str(tmp_path / NAME))
    store = minari_files.read(ID)
    for field in ("observations", "actions"):
        np.testing.assert_array_equal(getattr(store, field), fields[field])


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float64])
def test_flags_may_be_numbers(in_process, tmp_path, kind):
    fields = arrays(episodes())
    d4rl.convert(save(tmp_path / NAME, fields | {field: fields[field].astype(kind) for field in d4rl.FLAGS}))
    np.testing.assert_array_equal(minari_files.read(ID).episode_lengths, LENGTHS)


def test_rewards_and_flags_may_be_columns(in_process, tmp_path):
    fields = arrays(episodes())
    columns = {field: fields[field][:, None] for field in ("rewards", *d4rl.FLAGS)}
    d4rl.convert(save(tmp_path / NAME, fields | columns))
    np.testing.assert_array_equal(minari_files.read(ID).episode_lengths, LENGTHS)


def test_numbers_of_the_other_byte_order_are_read_into_that_of_this_machine(in_process, tmp_path):
    played = episodes()
    fields = arrays(played)
    turned = {field: fields[field].astype(fields[field].dtype.newbyteorder("S")) for field in d4rl.NUMBERS}
    d4rl.convert(save(tmp_path / NAME, fields | turned))
    episode = minari.load_dataset(ID)[0]
    for found, expected in zip((episode.observations, episode.actions, episode.rewards), played[0]):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.float32


def test_next_observations_may_be_rounded_otherwise(in_process, tmp_path):
    fields = arrays(episodes(dtype=np.float64))
    rounded = fields["next_observations"].astype(np.float32)
    d4rl.convert(save(tmp_path / NAME, fields | {"next_observations": rounded}))
    assert minari.load_dataset(ID)[0].observations.dtype == np.float64


# names


@pytest.mark.parametrize("body", ["hopper", "halfcheetah", "walker2d"])
@pytest.mark.parametrize("tier", ["random", "medium", "medium-replay", "full-replay", "medium-expert", "expert"])
def test_the_id_follows_from_the_name_of_the_file(body, tier):
    file = f"some/folder/{body}_{tier.replace('-', '_')}-v2.hdf5"
    assert d4rl._parse("", file) == d4rl._parse(f"{body}/{tier}-v2", "other.hdf5") == f"{body}/{tier}"
    assert re.fullmatch("[0-9a-f]{64}", d4rl.ORIGINALS[f"{body}/{tier}"])


def test_a_file_of_another_name_is_imported_by_name(in_process, tmp_path):
    file = save(tmp_path / "mine.h5", arrays(episodes(dims=(17, 6))))
    assert d4rl.convert(file, name="walker2d/expert-v2").dataset == "d4rl/walker2d/expert-v2"
    assert minari_files.read("d4rl/walker2d/expert-v2").spaces.environment == "Walker2d-v5"


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("mine.hdf5", {}, "mine.hdf5 is not named as D4RL's files are, such as hopper_medium_replay-v2.hdf5; say what "
         "it is, such as --name hopper/medium-replay-v2"),
        ("hopper_simple-v2.hdf5", {}, "hopper_simple-v2.hdf5 is not named as"),
        ("x.hdf5", {"name": "hopper/medum-v2"}, "unknown name 'hopper/medum-v2'; did you mean 'hopper/medium-v2'?"),
        ("x.hdf5", {"name": "../hopper/medium-v2"}, "unknown name '../hopper/medium-v2'; did you mean"),
        ("hopper_medium.hdf5", {}, "hopper_medium.hdf5: only v2 can be imported; v0 has no next_observations, and "
         "hopper's v0 and v1 data are faulty"),
        ("hopper_medium-v1.hdf5", {}, "hopper_medium-v1.hdf5: only v2 can be imported"),
        ("x.hdf5", {"name": "hopper/medium-v0"}, "hopper/medium-v0: only v2 can be imported"),
        ("ant_medium-v2.hdf5", {}, "ant cannot be imported: D4RL's observations of 111 dimensions do not fit Ant-v5, "
         "which has 105"),
        ("hopper_medium-v2.hdf5", {}, "no such file: hopper_medium-v2.hdf5; D4RL's own files are at http://"),
        (".", {"name": "hopper/medium-v2"}, "no such file: ."),
    ],
)
def test_a_name_that_cannot_be_imported_is_answered_with_the_reason(file, options, message):
    assert refusal(file, **options).startswith(message)


def test_a_dataset_that_exists_is_replaced_only_when_asked_for(file, tmp_path):
    d4rl.convert(file)
    with pytest.raises(UserError, match=f"dataset {ID} exists already; add --overwrite to import it anew"):
        d4rl.convert(file)
    d4rl.convert(save(file, arrays(episodes([7], ["timeout"]))), overwrite=True)
    np.testing.assert_array_equal(minari_files.read(ID).episode_lengths, [7])


# malformed structure: refused before anything is read


def refused(tmp_path, change, expected):
    """`change` edits an open well-formed file; the import of it is refused and names the file."""
    file = save(tmp_path / NAME, arrays(episodes()))
    with h5py.File(file, "r+") as content:
        change(content)
    message = refusal(file)
    assert message.startswith(file) and message.endswith(f"D4RL's own files are at {d4rl.ORIGIN}")
    assert re.search(expected, message), message


def exchange(content, field, *arguments, **how):
    del content[field]
    return content.create_dataset(field, *arguments, **how)


def virtual(content):
    layout = h5py.VirtualLayout((11,), np.float32)
    layout[:] = h5py.VirtualSource("elsewhere.hdf5", "rewards", (11,))
    del content["rewards"]
    content.create_virtual_dataset("rewards", layout)


def external(content):
    Path(content.filename).with_name("raw").write_bytes(bytes(44))
    exchange(content, "rewards", (11,), np.float32, external=[(str(Path(content.filename).with_name("raw")), 0, 44)])


def link(target):
    def change(content):
        with h5py.File(Path(content.filename).with_name("elsewhere.hdf5"), "w") as other:
            other["rewards"] = np.zeros(11, np.float32)
        content["copy"] = content["rewards"][:]
        del content["rewards"]
        content["rewards"] = target
    return change


STRUCTURES = {
    "a field missing": (lambda c: c.__delitem__("actions"), "has no actions;"),
    "two fields missing": (
        lambda c: (c.__delitem__("timeouts"), c.__delitem__("next_observations")),
        r"has no next_observations and no timeouts \(D4RL's v0 files are like that: take v2\)",
    ),
    "a group": (lambda c: (c.__delitem__("rewards"), c.create_group("rewards")), "field rewards: is a group, not an"),
    "an external link": (link(h5py.ExternalLink("elsewhere.hdf5", "/rewards")), "field rewards: is a link"),
    "a soft link": (link(h5py.SoftLink("/copy")), "field rewards: is a link"),
    "a link to nowhere": (link(h5py.SoftLink("/nowhere")), "field rewards: is a link"),
    "a virtual dataset": (virtual, "field rewards: its data lie in other files"),
    "external storage": (external, "field rewards: its data lie in other files"),
    "lzf": (lambda c: exchange(c, "rewards", data=np.zeros(11, np.float32), compression="lzf"),
            r"field rewards: is stored with filter 32000 .*; known are deflate, shuffle, fletcher32"),
    "scale-offset": (lambda c: exchange(c, "timeouts", data=np.zeros(11, np.int32), scaleoffset=True, chunks=True),
                     "field timeouts: is stored with filter 6"),
    "strings": (lambda c: exchange(c, "rewards", data=["1"] * 11),
                "field rewards: dtype must be float32 or float64, got object"),
    "ragged rows": (lambda c: exchange(c, "actions", (11,), h5py.vlen_dtype(np.float32)), "dtype must be .* object"),
    "compounds": (lambda c: exchange(c, "rewards", (11,), np.dtype([("a", "f4")])), r"dtype must be .* \[\('a'"),
    "opaque": (lambda c: exchange(c, "rewards", (11,), np.dtype("V8")), r"dtype must be .* \|V8"),
    "references": (lambda c: exchange(c, "rewards", (11,), h5py.ref_dtype), "dtype must be .* object"),
    "float16": (lambda c: exchange(c, "rewards", data=np.zeros(11, np.float16)), "dtype must be .* float16"),
    "integer actions": (lambda c: exchange(c, "actions", data=np.zeros((11, 3), int)), "dtype must be .* int64"),
    "boolean rewards": (lambda c: exchange(c, "rewards", data=np.zeros(11, bool)), "dtype must be .* bool"),
    "flags of strings": (lambda c: exchange(c, "terminals", data=["1"] * 11),
                         "field terminals: dtype must be bool, or numbers that are 0 or 1, got object"),
    "a scalar": (lambda c: exchange(c, "rewards", data=np.float32(1)), r"shape must be \(N,\), got \(\)"),
    "nothing at all": (lambda c: exchange(c, "rewards", data=h5py.Empty("f4")), r"shape must be \(N,\), got None"),
    "a vector of observations": (lambda c: exchange(c, "observations", data=np.zeros(11, np.float32)),
                                 r"field observations: shape must be \(N, 11\), got \(11,\)"),
    "a cube of rewards": (lambda c: exchange(c, "rewards", data=np.zeros((11, 1, 1), np.float32)),
                          r"shape must be \(N,\), got \(11, 1, 1\)"),
    "observations of another environment": (lambda c: exchange(c, "observations", data=np.zeros((11, 17), np.float32)),
                                            r"shape must be \(N, 11\), got \(11, 17\)"),
    "actions of another environment": (lambda c: exchange(c, "actions", data=np.zeros((11, 6), np.float32)),
                                       r"field actions: shape must be \(N, 3\), got \(11, 6\)"),
    "fields of different lengths": (lambda c: exchange(c, "actions", data=np.zeros((10, 3), np.float32)),
                                    "differ in length: observations 11, next_observations 11, actions 10"),
    "a terabyte declared and nothing stored": (
        lambda c: exchange(c, "observations", (10**12, 11), np.float32, chunks=(1000, 11), compression="gzip"),
        "field observations: declares 44000000000000 bytes, of which 0 are in the file",
    ),
    "more declared than 64 bits can count": (
        lambda c: exchange(c, "observations", (2**62, 11), np.float32, chunks=(1000, 11)),
        f"field observations: declares {2**62 * 44} bytes, of which 0 are in the file",
    ),
    "contiguous but never written": (lambda c: exchange(c, "rewards", (11,), np.float32),
                                     "field rewards: declares 44 bytes, of which 0 are in the file"),
    "a chunk missing": (
        lambda c: exchange(c, "rewards", (11,), np.float32, chunks=(4,), compression="gzip").__setitem__(slice(4), 1),
        "field rewards: has 3 chunks, of which 1 are in the file",
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_that_is_not_d4rls_is_refused(in_process, tmp_path, name):
    refused(tmp_path, *STRUCTURES[name])


def test_more_bytes_than_are_read_at_most_are_refused(file, monkeypatch):
    monkeypatch.setattr(d4rl_hdf5, "LARGEST", 1165)
    assert "declares 1166 bytes; at most 1165 are read" in refusal(file)  # 11 steps of 2 x 44 + 12 + 4 + 2


def test_a_chunk_that_would_fill_the_memory_is_refused(file, monkeypatch):
    monkeypatch.setattr(d4rl_hdf5, "LARGEST_CHUNK", 43)
    assert "field observations: has chunks of 484 bytes; at most 43 are read" in refusal(file)


def test_a_file_without_steps_is_refused(in_process, tmp_path):
    empty = {field: values[:0] for field, values in arrays(episodes()).items()}
    assert ": holds no steps;" in refusal(save(tmp_path / NAME, empty, compression=None))


def test_deflate_cannot_compress_further_than_is_allowed_for():
    zeros = bytes(100_000_000)
    assert len(zlib.compress(zeros, 9)) * d4rl_hdf5.DEFLATE > len(zeros)


@pytest.mark.parametrize("left", ["0", "1", "10", "512", "half", "all but one"])
def test_a_truncated_file_is_refused(file, left):
    content = Path(file).read_bytes()
    left = {"half": len(content) // 2, "all but one": len(content) - 1}.get(left) or int(left)
    Path(file).write_bytes(content[:left])
    assert refusal(file).startswith(f"{file}: cannot be read (OSError: ")


def test_a_text_file_is_refused(file):
    Path(file).write_text("<html>404 not found</html>\n" * 100)
    assert "cannot be read (OSError: Unable to synchronously open file (file signature not found))" in refusal(file)


def test_a_file_that_may_not_be_read_is_refused(file, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert refusal(file) == f"{file} cannot be read: Permission denied"


# malformed numbers: file, step and field


def wrong_numbers(**changes):
    """Fields with entries set: observations={(3, 2): nan}."""
    fields = arrays(episodes())
    for field, entries in changes.items():
        for index, value in entries.items():
            fields[field][index] = value
    return fields


NUMBERS = {
    "NaN observed": (wrong_numbers(observations={(3, 2): np.nan}, next_observations={(2, 2): np.nan}),
                     "step 3, field observations: not finite"),
    "NaN observed at the end": (wrong_numbers(next_observations={(6, 2): np.nan}),
                                "step 6, field next_observations: not finite"),
    "an infinite action": (wrong_numbers(actions={(9, 2): np.inf}), "step 9, field actions: not finite"),
    "an infinite reward": (wrong_numbers(rewards={7: -np.inf}), "step 7, field rewards: not finite"),
    "a reward beyond float32": (arrays(episodes()) | {"rewards": np.full(11, 1e39)},
                                "step 0, field rewards: not finite"),
    "an action out of its box": (wrong_numbers(actions={(4, 1): -1.001}),
                                 r"step 4, field actions: -1.00\d* in channel 1 is outside \[-1.0, 1.0\]"),
    "no end at all": (wrong_numbers(terminals={...: False}, timeouts={...: False}),
                      ": neither terminals nor timeouts marks the end of an episode; there is nothing to keep"),
    "a flag that is no flag": (arrays(episodes()) | {"terminals": np.arange(11)},
                               "step 2, field terminals: must be 0 or 1, got 2"),
    "a flag that is NaN": (arrays(episodes()) | {"timeouts": np.full(11, np.nan)},
                           "step 0, field timeouts: must be 0 or 1, got nan"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_cannot_be_trained_on_are_refused(in_process, tmp_path, name):
    fields, expected = NUMBERS[name]
    message = refusal(save(tmp_path / NAME, fields))
    assert message.startswith(str(tmp_path / NAME)) and re.search(expected, message), message


@pytest.mark.parametrize("step", range(11))
def test_every_missing_end_is_told_but_the_last(in_process, tmp_path, step):
    fields = arrays(episodes([1] * 11, ["timeout"] * 11))
    fields["timeouts"][step] = False
    imported = d4rl.convert(save(tmp_path / NAME, fields))
    if step == 10:
        assert imported.dropped == 1 and imported.gaps == ()
    else:
        assert imported.gaps == (step,) and imported.dropped == 0
        assert minari.load_dataset(imported.dataset).storage.metadata["source"]["gaps"] == 1


def test_a_missing_step_is_told(in_process, tmp_path):
    fields = {field: np.delete(values, 4, axis=0) for field, values in arrays(episodes()).items()}
    assert d4rl.convert(save(tmp_path / NAME, fields)).gaps == (3,)


def test_gaps_are_told_on_the_screen(in_process, tmp_path, capfd):
    fields = arrays(episodes([3, 1], ["timeout"] * 2))
    assert cli.main(["data", "import-d4rl", save(tmp_path / NAME, fields)]) == 0
    assert re.search("^gaps +none$", capfd.readouterr().out, re.M)
    fields["observations"] += np.arange(4)[:, None]
    assert cli.main(["data", "import-d4rl", save(tmp_path / NAME, fields), "--overwrite"]) == 0
    told = "gaps        2: next_observations of step 0 and others is not what follows; the end of an episode may be"
    assert told in capfd.readouterr().out


# the machine


def test_a_full_disk_is_told_before_anything_is_written(file, monkeypatch):
    size = 3 * Path(file).stat().st_size
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk.ROOM + size - 1))
    assert re.match(f"importing {file} needs 17 MB in .*, 17 MB are free; make room", refusal(file))


def test_a_small_file_that_unpacks_to_more_than_there_is_room_for_is_told(file, monkeypatch):
    free = iter([10**12, disk.ROOM + 1165])  # when the file is looked at, when its fields are known: 1166 bytes
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    assert refusal(file).startswith(f"the copy of {file} needs 17 MB in ")


def test_a_disk_that_fills_up_during_extraction_is_told(file, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(d4rl_hdf5, "open", lambda *_: Full(), raising=False)
    assert refusal(file).startswith("dataset d4rl/hopper/medium-replay-v2 cannot be written: No space left on device")


@pytest.mark.parametrize("event", [KeyboardInterrupt(), guard.Failure("crashed (SIGSEGV)"), OSError(28, "disk full")],
                         ids=["Ctrl-C", "crash", "full disk"])
@pytest.mark.parametrize("where", ["drl.data.guard.call", "drl.data.minari_writer.write"])
def test_an_interrupted_import_leaves_nothing_behind(file, monkeypatch, event, where):
    def interrupted(*_, **__):
        assert list(minari_files.root().glob(".*")), "the hidden folder is there meanwhile"
        raise event

    monkeypatch.setattr(where, interrupted)
    with pytest.raises((KeyboardInterrupt, UserError)):
        d4rl.convert(file)
    assert not list(minari_files.root().iterdir())


def test_a_crash_of_the_parser_is_one_line(file, monkeypatch):
    def crash(*_, **__):
        raise guard.Failure("crashed (SIGSEGV)")

    monkeypatch.setattr(guard, "call", crash)
    assert refusal(file) == f"{file}: cannot be read (crashed (SIGSEGV)); D4RL's own files are at {d4rl.ORIGIN}"


FUZZ = """
import json, os, random, resource, signal, sys
from pathlib import Path
import tqdm
tqdm.tqdm.monitor_interval = 0  # no threads beside a fork
from drl.data import d4rl, guard
from drl.errors import UserError

def call(target, *arguments, memory, seconds):
    '''guard.call with a fork in place of a fresh interpreter: sixty of those would take half a minute.'''
    read, write = os.pipe()
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(20)
        os.write(write, json.dumps(guard._outcome(target, arguments, memory)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as report:
        content = report.read()
    guard._raise_what(content, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seconds)

guard.call = call
file, trials = sys.argv[1], int(sys.argv[2])
sound = Path(file).read_bytes()
for trial in range(trials):
    rng, damaged = random.Random(trial), bytearray(sound)
    if trial % 3 == 0:  # bits
        for _ in range(rng.choice([1, 3, 10])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif trial % 3 == 1:  # a run of garbage
        start = rng.randrange(len(damaged))
        damaged[start : start + 16] = rng.randbytes(len(damaged[start : start + 16]))
    else:  # among the first structures, where sizes, offsets and versions are
        damaged[rng.randrange(2500)] = rng.randrange(256)
    Path(file).write_bytes(damaged)
    try:
        d4rl.convert(file, overwrite=True)
        print(json.dumps(None), flush=True)  # before the next fork, which would inherit it
    except UserError as error:
        print(json.dumps(str(error)), flush=True)
"""


def test_a_damaged_file_never_crashes_nor_hangs(tmp_path):
    """HDF5 has no checksums of its own: a bit that flips within a number, or in what nobody reads, is not found."""
    file = save(tmp_path / NAME, arrays(episodes(LENGTHS * 3, ENDS * 3)))
    result = subprocess.run([sys.executable, "-c", FUZZ, file, "60"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    messages = [message for message in outcomes if message is not None]
    assert len(outcomes) == 60 and len(messages) > 10, "the damage is real"
    assert all("\n" not in message and message.startswith(file) for message in messages)
    assert not [message for message in messages if "took longer" in message]


# the command line


def test_the_verb_imports_in_a_child_process_and_prints_what_to_type_next(tmp_path, capfd):
    file = save(tmp_path / NAME, arrays(episodes([2, 5, 4], ["terminal", "timeout", "nothing"])))
    rewards = [sum(rewards) for _, _, rewards, _ in episodes([2, 5, 4], [0] * 3)[:2]]

    assert cli.main(["data", "import-d4rl", file]) == 0

    out = capfd.readouterr().out
    score = 100 * (np.mean(rewards) + 20.272305) / (3234.3 + 20.272305)
    assert re.search(rf"^{ID} +7 steps +2 episodes .* mean score {score:.1f}$", out, re.M)
    assert re.search(r"^dropped +4 steps after the last end of an episode$", out, re.M)
    assert re.search(r"^source +not D4RL's own file, by its SHA-256$", out, re.M)
    assert re.search(rf"^train +drl train --dataset {ID}$", out, re.M)


def test_the_verb_answers_a_mistake_in_one_line(tmp_path, capfd):
    (tmp_path / NAME).write_bytes(b"no HDF5")
    assert cli.main(["data", "import-d4rl", str(tmp_path / NAME)]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith(f"drl: {tmp_path / NAME}: cannot be read (OSError: ")
