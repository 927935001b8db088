"""The packed copy gives the same store as packing in memory, once for all processes, or it is made anew: whatever
happens to its files, no wrong number comes out of them."""

import errno
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from drl import foreign, intact
from drl.data import columns, packed
from drl.data import store as stores
from drl.data.columns import Extent
from drl.data.store import EpisodeStore, Spaces
from drl.errors import UserError

ID = "other/toy/packed-v0"
SPACES = Spaces("Toy-v0", 3, np.float32([-2, 0.1]), np.float32([2, 1 / 3]))
LENGTHS = (7, 1, 13, 5)
FILES = ("observations.npy", "actions.npy", "returns_to_go.npy", "episode_starts.npy", "terminated.npy", "card.json")


def episodes(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    for length in lengths:
        yield SimpleNamespace(
            observations=rng.normal(5, 2, (length + 1, 3)),
            actions=rng.uniform(SPACES.action_low, SPACES.action_high, (length, 2)).astype(np.float32),
            rewards=rng.normal(size=length),
            terminations=(np.arange(length) == length - 1) & (length % 2 > 0),
            truncations=(np.arange(length) == length - 1) & (length % 2 == 0),
        )


class Build:
    """Packs the episodes that it is given, and counts how often it was asked to."""

    def __init__(self, lengths=LENGTHS, seed=0):
        self.lengths, self.seed, self.count = lengths, seed, 0

    def __call__(self, target):
        self.count += 1
        columns.write(episodes(self.lengths, self.seed), SPACES, ID, target)

    def measure(self):
        return Extent(sum(self.lengths), len(self.lengths), SPACES)


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "toy" / "data"
    data.mkdir(parents=True)
    (data / "metadata.json").write_text('{"total_steps": 26}')
    (data / "main_data.hdf5").write_bytes(b"as recorded")
    return data.parent


def read(folder, *arguments):
    """The store, and how often it was built."""
    build = Build(*arguments)
    return packed.read(ID, folder, build.measure, build), build.count


def assert_same(store, expected):
    for name in columns.ARRAYS:
        actual, wanted = getattr(store, name), getattr(expected, name)
        assert actual.dtype == wanted.dtype
        np.testing.assert_array_equal(actual, wanted)
    np.testing.assert_array_equal(store.normaliser, expected.normaliser)
    assert store.normaliser.mean.dtype == store.normaliser.std.dtype == np.float32
    assert (store.dataset, store.fingerprint) == (expected.dataset, expected.fingerprint)
    assert store.spaces[:2] == expected.spaces[:2]
    np.testing.assert_array_equal(store.spaces[2:], expected.spaces[2:])


def in_memory(*arguments):
    return EpisodeStore.from_episodes(episodes(*arguments), SPACES, ID)


@pytest.mark.parametrize("lengths", [(1,), LENGTHS, [40] * 100], ids=["one step", "few", "many"])
def test_the_packed_copy_is_the_store_that_memory_would_hold(lengths, folder, monkeypatch):
    monkeypatch.setattr(stores, "CHUNK", 7)
    first, second = read(folder, lengths), read(folder, lengths)
    assert_same(first[0], in_memory(lengths))
    assert_same(second[0], in_memory(lengths))
    assert (first[1], second[1]) == (1, 0)
    assert sorted(os.listdir(folder)) == ["data", "packed"]


def test_the_arrays_are_ordinary_npy_files(folder):
    store, _ = read(folder)
    for name in columns.ARRAYS:
        np.testing.assert_array_equal(np.load(folder / "packed" / f"{name}.npy"), getattr(store, name))


def test_the_arrays_are_pages_of_the_files_and_cannot_be_written(folder):
    store, _ = read(folder)
    files = {os.path.basename(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()
             if str(folder) in line and line.split()[1] == "r--s"}  # shared: the pages of one process are all others'
    assert files == set(FILES) - {"card.json"}
    with pytest.raises(ValueError, match="read-only"):
        store.actions[0] = 0


def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path):
    rows = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    with columns._Column(tmp_path / "sparse.npy", (), "<f4") as column:
        column._rows = rows
    os.truncate(tmp_path / "sparse.npy", 128 + 4 * rows)
    assert columns._mapped(tmp_path / "sparse.npy", (rows,), "<f4")[-1] == 0


def test_packing_holds_one_episode_at_a_time(tmp_path):
    class Recorded(SimpleNamespace):
        """Can be referred to weakly."""

    references, alive = [], []

    def watched():
        for episode in map(vars, episodes([5] * 20)):
            recorded = Recorded(**episode)
            references.append(weakref.ref(recorded))
            yield recorded
            del recorded, episode
            alive.append(sum(reference() is not None for reference in references))

    columns.write(watched(), SPACES, ID, tmp_path)
    assert alive == [1] * 20  # the one that `write` is done with only when it is given the next


def said(capsys):
    return capsys.readouterr().err


DAMAGED = f"the packed copy of dataset {ID} is damaged"


@pytest.fixture
def whole(folder, monkeypatch):
    """The files of a packed copy that has just been made, by name."""
    monkeypatch.setattr(packed.disk, "sync", lambda _: None)  # slow, and no power is cut here
    read(folder)
    return {name: (folder / "packed" / name).read_bytes() for name in FILES}


def refused(folder, source=None):
    """Why the copy is of no use."""
    with pytest.raises(packed.Unusable) as caught:
        packed.load(folder / "packed", ID, source or packed.source_of(folder))
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_every_bit_flip_is_detected(name, folder, whole):
    source, rng = packed.source_of(folder), np.random.default_rng(0)
    for place in rng.choice(8 * len(whole[name]), 200, replace=False).tolist():
        content = bytearray(whole[name])
        content[place // 8] ^= 1 << place % 8
        (folder / "packed" / name).write_bytes(content)

        assert refused(folder, source) in [f"{DAMAGED} ({what})" for what in (name, "a checksum differs")], place


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("count", [1, 64, 4096])
def test_a_tail_of_zeros_is_detected_in_the_place_of_what_was_there_and_after_it(name, count, folder, whole):
    kept = max(0, len(whole[name]) - count)
    for content in (whole[name][:kept].ljust(len(whole[name]), b"\0"), whole[name] + bytes(count)):
        if content != whole[name]:  # the last byte of episode_starts is a zero
            (folder / "packed" / name).write_bytes(content)
            assert refused(folder).startswith(DAMAGED)


def test_a_file_that_does_not_belong_there_is_detected_and_goes(folder, whole, capsys):
    (folder / "packed" / ".of-a-file-manager").touch()
    assert read(folder)[1] == 0
    (folder / "packed" / "more\n.npy").write_bytes(whole["actions.npy"])

    store, built = read(folder)

    assert_same(store, in_memory())
    assert built == 1 and sorted(os.listdir(folder / "packed")) == sorted(FILES)
    assert said(capsys) == f"{DAMAGED} ('more\\n.npy' does not belong there); packing it anew\n"


@pytest.mark.parametrize("name", [*FILES, "."])
@pytest.mark.parametrize("other", ["pipe", "link", "broken link", "folder"])
def test_what_is_no_plain_file_is_neither_followed_nor_waited_for(other, name, folder, whole, tmp_path, capsys):
    file = folder / "packed" / name
    elsewhere = file.rename(tmp_path / "elsewhere")
    if other == "pipe":
        os.mkfifo(file)
    elif other == "folder":
        file.mkdir()
    else:
        file.symlink_to(elsewhere if other == "link" else tmp_path / "nowhere")

    store, built = read(folder)

    assert_same(store, in_memory())
    assert built == 1 and said(capsys).startswith(DAMAGED)
    assert read(folder)[1] == 0
    assert not file.is_symlink() and elsewhere.exists()


@pytest.mark.parametrize("fields", [
    {"steps": -1}, {"steps": 26.0}, {"steps": "26"}, {"episodes": 10**400}, {"mean": 1}, {"std": [10**400]},
    {"action_low": None}, {"mean": None},
])
def test_a_forged_card_is_no_more_than_damaged(fields, folder, whole):
    file = folder / "packed" / "card.json"
    intact.write_sealed(file, intact.read_sealed(file, "packed") | fields)
    assert refused(folder).startswith(DAMAGED)


def test_forged_episodes_are_no_more_than_damaged(folder, whole):
    file = folder / "packed" / "card.json"
    for starts in ([0, 7, 8, 21, 2**40], [1, 7, 8, 21, 26], [0, 7, 7, 21, 26], [0, 8, 7, 21, 26]):
        content = whole["episode_starts.npy"][:-40] + np.int64(starts).tobytes()
        (folder / "packed" / "episode_starts.npy").write_bytes(content)
        *arrays, _ = columns.mapped(folder / "packed", Build().measure())
        intact.write_sealed(file, intact.read_sealed(file, "packed") | {"fingerprint": stores.fingerprint(arrays)})
        assert refused(folder) == f"{DAMAGED} (episode_starts.npy)"


def test_a_card_that_is_too_large_is_not_parsed(folder, whole, monkeypatch):
    parsed = []
    monkeypatch.setattr(foreign, "parse_json", parsed.append)
    os.truncate(folder / "packed" / "card.json", foreign.JSON + 1)
    assert refused(folder) == f"{DAMAGED} (card.json)" and not parsed


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [None, 0, 1, 60, 0.5, -1], ids=lambda left: "missing" if left is None else f"{left}")
def test_a_file_cut_short_is_detected(name, left, folder, capsys):
    read(folder)
    file = folder / "packed" / name
    content = file.read_bytes()
    if left is None:
        file.unlink()
    else:
        file.write_bytes(content[: int(left * len(content)) if left == 0.5 else left])

    store, built = read(folder)

    assert_same(store, in_memory())
    assert built == 1
    assert said(capsys) == f"{DAMAGED} ({name}); packing it anew\n"


@pytest.mark.parametrize(
    "other",
    [
        lambda array: array.astype(np.float64),
        lambda array: array.astype(">f4"),
        lambda array: array[:-1],
        lambda array: array[:, :2],
        lambda array: np.asfortranarray(array),
        lambda array: array.reshape(-1, 1, 3),
        lambda array: array.astype(object),
        lambda array: np.zeros_like(array),
    ],
    ids=["float64", "big endian", "a step less", "a channel less", "by columns", "three axes", "pickled", "zeros"],
)
def test_another_array_is_detected(other, folder, capsys):
    store, _ = read(folder)
    array = other(store.observations.copy())
    np.save(folder / "packed" / "observations.npy", array, allow_pickle=array.dtype == object)
    store, built = read(folder)
    assert_same(store, in_memory())
    assert built == 1 and said(capsys).startswith(DAMAGED)


def test_a_copy_of_another_format_is_made_anew(folder, capsys):
    read(folder)
    file = folder / "packed" / "card.json"
    card = intact.read_sealed(file, "packed") | {"format": 99}
    del card["mean"]
    intact.write_sealed(file, card)

    store, built = read(folder)

    assert_same(store, in_memory())
    assert built == 1
    assert said(capsys) == f"dataset {ID} was packed in format 99, this is format 3; packing it anew\n"


def rewrite(file):
    """Other bytes, as long as before, and the time that a clock a nanosecond later would give."""
    status = file.stat()
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: rewrite(data / "main_data.hdf5"),
        lambda data: (data / "main_data.hdf5").write_bytes(b"as recorded, and more"),
        lambda data: (data / "more").write_bytes(b""),
        lambda data: (data / "main_data.hdf5").rename(data / "other_data.hdf5"),
        lambda data: (data / "metadata.json").write_text('{"total_steps": 27}'),
    ],
    ids=["bytes", "size", "another file", "name", "metadata"],
)
def test_a_dataset_that_changed_is_packed_anew(change, folder, capsys):
    read(folder)
    change(folder / "data")

    store, built = read(folder, LENGTHS, 1)

    assert_same(store, in_memory(LENGTHS, 1))
    assert built == 1
    assert said(capsys) == f"dataset {ID} changed since it was packed; packing it anew\n"
    assert read(folder)[1] == 0


def test_metadata_of_the_same_size_and_time_that_differ_are_a_change(folder, capsys):
    read(folder)
    file = folder / "data" / "metadata.json"
    status = file.stat()
    file.write_text('{"total_steps": 25}')
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read(folder)[1] == 1


def test_a_copy_under_another_id_is_made_anew(folder):
    read(folder)
    build = Build()
    packed.read("other/toy/renamed-v0", folder, build.measure, build)
    assert build.count == 1


def test_a_failed_packing_leaves_the_earlier_copy_and_nothing_else(folder):
    def fail(target):
        columns.write(episodes(), SPACES, ID, target)
        raise UserError("episode 4 is malformed")

    with pytest.raises(UserError, match="malformed"):
        packed.read(ID, folder, Build().measure, fail)
    assert os.listdir(folder) == ["data"]

    read(folder)
    before = [(folder / "packed" / name).read_bytes() for name in FILES]
    (folder / "data" / "more").write_bytes(b"")
    with pytest.raises(UserError, match="malformed"):
        packed.read(ID, folder, Build().measure, fail)
    assert sorted(os.listdir(folder)) == ["data", "packed"]
    assert [(folder / "packed" / name).read_bytes() for name in FILES] == before


PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_packed import ID, Build, packed

def build(target):
    Build()(target)
    print("building", flush=True)
    while not Path({go!r}).exists():
        time.sleep(0.01)

print(packed.read(ID, Path({folder!r}), Build().measure, build).fingerprint)
"""
WAITING = f"waiting for another process that packs dataset {ID}\n"


def start(folder):
    """A process of its own that packs the dataset, if it comes to that, until there is a file called go."""
    code = PROCESS.format(tests=str(Path(__file__).parent), folder=str(folder), go=str(folder.with_name("go")))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_processes_that_start_together_one_packs_and_the_others_wait_and_say_so(folder):
    processes = [start(folder) for _ in range(4)]
    deadline = time.monotonic() + 60
    while "packed" not in os.listdir(folder) and time.monotonic() < deadline:
        waiting = [process for process in processes if select.select([process.stderr], [], [], 0.05)[0]]
        if len(waiting) == 3:
            folder.with_name("go").touch()

    outputs = [process.communicate(timeout=60) for process in processes]

    fingerprint = in_memory().fingerprint + "\n"
    assert sorted(outputs) == sorted([("building\n" + fingerprint, ""), *[(fingerprint, WAITING)] * 3])
    assert sorted(os.listdir(folder)) == ["data", "packed"]


def test_what_a_killed_process_left_is_removed_by_the_next(folder):
    killed = start(folder)
    assert killed.stdout.readline() == "building\n"
    assert sorted(os.listdir(folder)) != ["data"]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()

    store, built = read(folder)

    assert_same(store, in_memory())
    assert built == 1
    assert sorted(os.listdir(folder)) == ["data", "packed"]


def test_where_nothing_can_be_locked_it_is_packed_all_the_same(folder, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(packed.disk.fcntl, "flock", refuse)
    store, built = read(folder)
    assert_same(store, in_memory())
    assert (built, read(folder)[1]) == (1, 0)
    assert said(capsys) == ""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary copies go."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(packed.tempfile, "tempdir", str(place))
    return place


def test_a_folder_that_cannot_be_written_is_packed_for_this_run_only(folder, temporary, monkeypatch, capsys):
    def refuse(_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(packed.disk, "scratch", refuse)
    store, built = read(folder)

    assert said(capsys) == (
        f"{folder} cannot be written (Read-only file system): dataset {ID} is packed for this run only\n"
    )
    assert os.listdir(folder) == ["data"] and os.listdir(temporary) == []  # the pages outlive the name
    assert_same(store, in_memory())
    assert built == 1


def test_a_disk_that_fills_up_is_packed_elsewhere(folder, temporary, capsys):
    def fill_up(target):
        Build()(target)
        if target.is_relative_to(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert_same(packed.read(ID, folder, Build().measure, fill_up), in_memory())
    assert said(capsys).startswith(f"{folder} cannot be written (No space left on device): ")
    assert os.listdir(folder) == ["data"] and os.listdir(temporary) == []


def test_where_nothing_can_be_written_one_line_says_so(folder, temporary, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # a write beyond it fails: Python ignores the signal
    try:
        with pytest.raises(UserError) as caught:
            read(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(
        rf"{folder} cannot be written \(File too large\); a copy of dataset {ID} for this run cannot be written: File "
        rf"too large in {temporary}; it needs 0.0 MB, \d+.\d MB are free; what stood there before is as it was; make "
        "room, or name a folder for temporary files: export TMPDIR=FOLDER",
        str(caught.value),
    )
    assert said(capsys) == ""
    assert os.listdir(folder) == ["data"] and os.listdir(temporary) == []


def test_where_python_knows_no_folder_for_temporary_files_one_line_says_so(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(packed.disk, "scratch", refuse)
    monkeypatch.setattr(packed.tempfile, "tempdir", None)
    monkeypatch.setattr(packed.tempfile, "_get_default_tempdir", no_folder)
    with pytest.raises(UserError, match=r"^\S+ cannot be written \(Read-only file system\), nor can any folder for "
                       rf"temporary files: dataset {ID} cannot be packed; make room, or .* TMPDIR=FOLDER$"):
        read(folder)


def no_folder():
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")


def test_a_disk_that_does_not_give_back_what_was_written_is_not_trusted(folder, temporary, monkeypatch, capsys):
    written = intact.write_sealed

    def lose_a_bit(path, fields):
        written(path, fields)
        if path.is_relative_to(folder):
            rewrite(path)

    monkeypatch.setattr(intact, "write_sealed", lose_a_bit)
    assert_same(read(folder)[0], in_memory())
    assert said(capsys) == (
        f"{folder} cannot be written (it does not give back what was written: {DAMAGED} (card.json)): dataset {ID} is "
        "packed for this run only\n"
    )
    assert os.listdir(folder) == ["data"]
