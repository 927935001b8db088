"""A Minari dataset becomes the store of what was recorded, or one line that says what is wrong with it and what to
type; nothing that a dataset names is ever run."""

import http.server
import io
import json
import os
import shutil
import socket
import sys
import threading
import time
import urllib.error

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from drl import disk, intact
from drl.data import columns, guard, minari_files, minari_metadata, minari_remote, minari_writer, packed
from drl.errors import UserError
from toys import ENVIRONMENT, ID, recorded

FOREIGN = "other/toy/spring-v0"
AGAIN = "type: drl data collect toy/spring --overwrite"


def write(episodes, dataset_id=ID, **metadata):
    """A dataset whose metadata are then changed; what is None is removed."""
    folder = minari_writer.write(
        dataset_id, episodes, environment=ENVIRONMENT, algorithm="by hand", reference=None, description="", extra={},
    )
    change_metadata(folder, **metadata)
    return folder


def change_metadata(folder, **changed):
    file = folder / "data" / "metadata.json"
    metadata = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({name: value for name, value in metadata.items() if value is not None}))


def refusal(dataset_id):
    with pytest.raises(UserError) as caught:
        minari_files.read(dataset_id)
    message = str(caught.value)
    assert message.isprintable()  # one line, and nothing that a terminal would obey
    return message


@pytest.fixture
def calls(monkeypatch):
    """What runs in a guarded child process; it runs in this one, which is quicker."""
    calls = []

    def call(target, *arguments, memory, seconds):
        calls.append((target, memory, seconds))
        minari_files.pack(*arguments)

    monkeypatch.setattr(guard, "call", call)
    return calls


def test_reading_gives_the_store_of_what_was_written():
    episodes = recorded([2, 5, 3])
    write(episodes)
    for _ in range(2):  # packed, then from the packed copy
        store = minari_files.read(ID)
        assert (store.dataset, store.spaces.environment) == (ID, ENVIRONMENT)
        np.testing.assert_array_equal(store.episode_starts, [0, 2, 7, 10])
        np.testing.assert_array_equal(store.actions, np.concatenate([episode.actions for episode in episodes]))


def test_a_dataset_of_others_is_read_in_a_child_process_with_the_same_result(capfd):
    episodes = recorded([2, 5, 3])
    write(episodes)
    write(episodes, FOREIGN)
    assert minari_files.read(FOREIGN).fingerprint == minari_files.read(ID).fingerprint
    assert f"packing {FOREIGN}" in capfd.readouterr().err


def test_only_datasets_of_others_need_the_child_process_and_only_to_be_packed(calls):
    write(recorded([2]))
    folder = write(recorded([2]), FOREIGN)
    minari_files.read(ID)
    assert calls == []
    minari_files.read(FOREIGN)
    minari_files.read(FOREIGN)
    (target, memory, seconds), = calls
    assert target == "drl.data.minari_files:pack"
    assert memory >= 4 << 30
    assert 600 <= seconds <= 601 + (folder / "data" / "main_data.hdf5").stat().st_size / 1e6


def test_what_the_child_process_refuses_is_the_message():
    episodes = recorded([2, 3])
    episodes[1].observations[3, 0] = np.nan
    write(episodes, FOREIGN)
    assert refusal(FOREIGN) == f"dataset {FOREIGN}, episode 1, step 3, field observations: not finite"


def test_what_the_child_process_breaks_on_names_the_dataset(monkeypatch):
    def crash(*_, **__):
        raise guard.Failure("crashed (SIGSEGV)")

    write(recorded([2]), FOREIGN)
    monkeypatch.setattr(guard, "call", crash)
    assert refusal(FOREIGN) == (
        f"dataset {FOREIGN} cannot be read (the reader crashed (SIGSEGV)); make it anew, or type: "
        f"drl data download {FOREIGN} --overwrite"
    )


def test_a_disk_without_room_is_found_out_before_packing(monkeypatch, capsys, tmp_path):
    folder = write(recorded([2, 5]))
    usage = shutil.disk_usage(folder)
    needed = 4 * 7 * (2 + 1 + 1) + 8 * 3 + 2  # bytes of the arrays

    def nearly_full(place):
        return usage._replace(free=needed - str(place).startswith(str(folder)))

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    assert len(minari_files.read(ID).actions) == 7
    assert f"\n{folder} cannot be written (No space left on device): " in capsys.readouterr().err
    assert os.listdir(folder) == ["data"]


@pytest.mark.parametrize(("module", "name", "before"), [
    (minari_metadata, "read", "never packed"), (minari_metadata, "flaw", "packed"), (packed, "load", "packed"),
    (intact, "read_sealed", "packed"), (columns, "mapped", "packed"), (disk, "scratch", "never packed"),
    (disk, "sha256", "never packed"), (columns, "write", "never packed"), (columns, "mapped", "never packed"),
    (intact, "write_sealed", "never packed"), (disk, "replace", "never packed"),
])
def test_a_dataset_replaced_while_it_is_read_is_the_old_one_or_the_new_one_whole(module, name, before, monkeypatch):
    write(recorded([4], seed=1))
    new = minari_files.read(ID).fingerprint
    write(recorded([2, 5]))
    old = minari_files.read(ID).fingerprint
    if before == "never packed":
        shutil.rmtree(minari_files.path(ID) / "packed")
    function = getattr(module, name)

    def replaced_just_before(*arguments, **options):
        monkeypatch.setattr(module, name, function)
        write(recorded([4], seed=1))
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, replaced_just_before)
    assert minari_files.read(ID).fingerprint in (old, new)
    monkeypatch.setattr(module, name, function)
    assert minari_files.read(ID).fingerprint in (old, new)
    assert sorted(os.listdir(minari_files.path(ID))) == ["data", "packed"]


def test_local_ids_are_sorted_and_hold_nothing_else():
    assert minari_files.local_ids() == []
    write(recorded([2]), "drl/toy/summer-v0")
    write(recorded([2]), "alone-v3")
    write(recorded([2]), ID)
    minari_files.read(ID)
    assert minari_files.local_ids() == ["alone-v3", "drl/toy/spring-v0", "drl/toy/summer-v0"]


def test_local_ids_leave_out_what_has_damaged_metadata():
    write(recorded([2]), "alone-v3")
    (write(recorded([2])) / "data" / "metadata.json").write_text("{")
    assert minari_files.local_ids() == ["alone-v3"]


def test_a_dataset_of_ours_that_is_not_here_names_the_command_that_makes_it(monkeypatch):
    monkeypatch.setattr(minari_remote, "fetch", None)  # nothing is asked of the network
    assert refusal("drl/hopper/medium-replay-v0") == (
        "dataset drl/hopper/medium-replay-v0 is not on this machine; type: drl data collect hopper/medium-replay"
    )
    assert refusal("d4rl/hopper/medium-v2") == (
        "dataset d4rl/hopper/medium-v2 is not on this machine; type: drl data import-d4rl FILE"
    )


@pytest.mark.parametrize(
    ("misspelt", "cure"),
    [
        ("drl/hoper/medium-v0", "did you mean 'drl/hopper/medium-v0'? type: drl data collect hopper/medium"),
        ("drl/hopper/medium-v2", "did you mean 'drl/hopper/medium-v0'? type: drl data collect hopper/medium"),
        ("drl/toy/sprin-v0", "did you mean 'drl/toy/spring-v0'?"),  # it is here
        ("drl/zzz-v0", "to see which there are, type: drl data list"),
    ],
)
def test_a_misspelt_dataset_of_ours_names_the_right_one_at_once(misspelt, cure):
    write(recorded([2]))
    assert refusal(misspelt) == f"dataset {misspelt} is not on this machine; {cure}"


MALFORMED = [
    "hopper medium", "drl/toy/spring", "drl//spring-v0", "../spring-v0", "", "/etc/spring-v0", "drl/../../spring-v0",
    "drl/toy/spring-v0\0", "drl/toy/spring-v0\n", "t/spring-v0", "hf://drl/toy/spring-v0", ".", "drl/toy/.spring-v0",
]


@pytest.mark.parametrize("malformed", MALFORMED)
def test_a_malformed_id_shows_a_well_formed_one(malformed, monkeypatch):
    monkeypatch.setattr(minari_remote, "fetch", None)
    message = f"{malformed!r} is not a Minari id such as drl/hopper/medium-v0; known: none"
    assert refusal(malformed) == message
    for function in (minari_files.path, minari_files.download):
        with pytest.raises(UserError) as caught:
            function(malformed)
        assert str(caught.value) == message


@pytest.mark.parametrize("link", ["drl", "drl/toy", ID, f"{ID}/data", f"{ID}/data/main_data.hdf5"])
def test_a_link_may_not_lead_out_of_the_datasets(link, tmp_path):
    write(recorded([2]))
    outside = tmp_path / "outside"
    place = minari_files.root() / link
    place.rename(outside)
    place.symlink_to(outside)
    message = refusal(ID)
    assert message.startswith(f"dataset {ID} leads to {outside}") and "is not in" in message


def test_a_root_that_is_a_link_is_no_way_out(tmp_path, monkeypatch):
    write(recorded([2]))
    (tmp_path / "link").symlink_to(minari_files.root())
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "link"))
    assert len(minari_files.read(ID).actions) == 2


def test_a_near_miss_names_the_dataset_that_is_here(monkeypatch):
    write(recorded([2]))
    monkeypatch.setattr(minari_remote, "fetch", None)
    assert refusal("drl/toy/sprin v0").endswith("; did you mean 'drl/toy/spring-v0'?")


def cut(file, left):
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (lambda data: cut(data / "main_data.hdf5", 0), "main_data.hdf5 is no HDF5 file"),
        (lambda data: cut(data / "main_data.hdf5", 0.5), "main_data.hdf5 is truncated"),
        (lambda data: cut(data / "main_data.hdf5", 0.99), "main_data.hdf5 is truncated"),
        (lambda data: (data / "main_data.hdf5").unlink(), "main_data.hdf5 is missing"),
        (lambda data: cut(data / "metadata.json", 0.5), "metadata.json: JSONDecodeError: "),
        (lambda data: (data / "metadata.json").write_bytes(b""), "metadata.json: JSONDecodeError: "),
        (lambda data: (data / "metadata.json").write_text("[1]"), "metadata.json: TypeError: "),
        (lambda data: (data / "metadata.json").write_bytes(b"\x80"), "metadata.json: UnicodeDecodeError: "),
        (lambda data: (data / "metadata.json").unlink(), "metadata "),
        (lambda data: change_metadata(data.parent, total_steps="5"), "metadata.json: ValueError: total_steps is '5'"),
        (lambda data: change_metadata(data.parent, total_episodes=-1), "metadata.json: ValueError: total_episodes is "),
    ],
)
def test_a_broken_dataset_of_ours_says_how_to_make_it_anew(damage, flaw, monkeypatch):
    monkeypatch.setattr(minari_remote, "fetch", None)
    folder = write(recorded([200, 300]))
    damage(folder / "data")
    message = refusal(ID)
    assert message.startswith(f"dataset {ID} is broken ({flaw}") and message.endswith(f"; {AGAIN}")


def test_a_bit_flip_in_the_dataset_is_detected():
    file = write(recorded([20, 30])) / "data" / "main_data.hdf5"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(64, len(whole), 20):
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        assert refusal(ID) == (
            f"dataset {ID}: main_data.hdf5 is not as it was written (its SHA-256 is not the one in metadata.json); "
            f'{AGAIN}; if you changed it on purpose, take "sha256" out of {file.parent}/metadata.json'
        )
    change_metadata(file.parent.parent, sha256=None)
    file.write_bytes(whole)
    assert len(minari_files.read(ID).actions) == 50


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"total_steps": 6}, f": metadata.json says total_steps 6, 5 were found; {AGAIN}"),
        ({"total_episodes": 1}, f": metadata.json says total_steps 5, 2 were found; {AGAIN}"),
        ({"total_episodes": 3}, " cannot be read (KeyError: "),
        ({"total_episodes": 0, "total_steps": 0}, " holds no episodes"),
        ({"minari_version": "9.0"}, f" is of Minari '9.0', which is not one that Minari {minari.__version__} reads; "),
        ({"minari_version": ["0.5.4"]}, " is of Minari \"['0.5.4']\", which is not one that "),
        ({"data_format": "\x1b[2J"}, " is broken (episode 0 is missing)"),
    ],
)
def test_metadata_that_contradict_the_data_are_refused(changed, message):
    write(recorded([2, 3]), **changed)
    assert refusal(ID).startswith(f"dataset {ID}{message}")


def test_episodes_that_the_metadata_do_not_mention_are_found():
    write(recorded([2, 3]), sha256=None, total_episodes=1, total_steps=2)
    assert refusal(ID) == f"dataset {ID}: metadata.json says total_episodes 1, 2 were found"


def test_damage_in_the_middle_of_a_file_is_one_line_that_names_the_dataset():
    folder = write(recorded([200, 300]), sha256=None)
    file = folder / "data" / "main_data.hdf5"
    content = file.read_bytes()
    start = content.index(b"TREE")  # the index of the groups
    file.write_bytes(content[:start] + b"tree" + content[start + 4 :])
    message = refusal(ID)
    assert message.startswith(f"dataset {ID} cannot be read (") and message.endswith(f"; {AGAIN}")


def test_a_malformed_episode_on_disk_keeps_its_own_message():
    episodes = recorded([2, 3])
    episodes[1].observations[3, 0] = np.nan
    write(episodes)
    assert refusal(ID) == f"dataset {ID}, episode 1, step 3, field observations: not finite"


NEEDED = "finite bounds, the lower below the upper, are needed"
BOX = gym.spaces.Box(-1, 1, (2,), np.float32)
minari_asks = pytest.mark.filterwarnings(  # for what a dataset of no environment cannot give
    "ignore:`(code_permalink|eval_env)` is set:UserWarning", "ignore:env_spec is None:UserWarning"
)


def create_for_no_environment(observation_space, action_space):
    flags = np.array([False, True])
    observations, actions = (
        np.array([space.sample() for _ in range(count)]) for space, count in ((observation_space, 3), (action_space, 2))
    )
    buffer = EpisodeBuffer(
        id=0, observations=observations, actions=actions, rewards=np.zeros(2), terminations=flags, truncations=flags
    )
    minari.create_dataset_from_buffers(
        ID, [buffer], observation_space=observation_space, action_space=action_space, algorithm_name="by hand",
        author="nobody", author_email="nobody", description="for no environment", data_format="hdf5",
    )


@minari_asks
def test_a_dataset_that_names_no_environment_can_be_read(capsys):
    create_for_no_environment(BOX, BOX)
    spaces = minari_files.read(ID).spaces
    assert (spaces.environment, spaces.observation_dim) == ("", 2)
    np.testing.assert_array_equal([spaces.action_low, spaces.action_high], [BOX.low, BOX.high])
    assert "environment" not in capsys.readouterr().err


@minari_asks
@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (gym.spaces.Discrete(3), BOX, "has an observation space 'Discrete'; flat Box spaces are needed"),
        (BOX, gym.spaces.Discrete(3), "has an action space 'Discrete'; flat Box spaces are needed"),
        (gym.spaces.Box(0, 1, (2, 3)), BOX,
         "has an observation space 'Box' of shape [2, 3]; flat Box spaces are needed"),
        (BOX, gym.spaces.Box(-np.inf, np.inf, (2,)), f"has an action space from [-inf -inf] to [inf inf]; {NEEDED}"),
        (BOX, gym.spaces.Box(0, np.inf, (2,)), f"has an action space from [0. 0.] to [inf inf]; {NEEDED}"),
        (BOX, gym.spaces.Box(np.float32([-1, 2]), np.float32([1, 2])),
         f"has an action space from [-1.  2.] to [1. 2.]; {NEEDED}"),
    ],
    ids=["discrete observations", "discrete actions", "matrices", "unbounded", "half bounded", "flat as a board"],
)
def test_spaces_that_a_decision_transformer_cannot_use_are_refused(observation_space, action_space, message):
    create_for_no_environment(observation_space, action_space)
    assert refusal(ID) == f"dataset {ID} {message}"


@pytest.mark.parametrize(
    "space",
    [
        "null", "{", "[]", "{}", '{"type": "Box"}', '{"type": "Box", "shape": [2], "low": [0], "high": [1, 1]}',
        '{"type": "Box", "shape": [1000000000000], "low": [0], "high": [1]}',
        '{"type": "Box", "shape": [0], "low": [], "high": []}', '{"type": "Box", "shape": [1], "low": 0, "high": 1}',
        '{"type": "Box", "shape": [1], "low": ["os"], "high": [1]}', 7,
    ],
)
def test_a_malformed_space_is_one_line(space):
    write(recorded([2]), observation_space=space)
    assert refusal(ID).startswith(f"dataset {ID} has a malformed observation space (")


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that leaves a file behind when it is imported, where Python finds it, and its name."""
    name = "canary_in_the_mine"
    (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'song')!r}, 'w')\ndef make(**_): open('song')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    yield name
    assert not (tmp_path / "song").exists() and name not in sys.modules


def specification(environment_id, entry_point):
    return json.dumps(json.loads(gym.spec(ENVIRONMENT).to_json()) | {
        "id": environment_id, "entry_point": entry_point, "vector_entry_point": entry_point, "kwargs": {"a": 1},
        "additional_wrappers": [{"name": "Wrapper", "entry_point": entry_point, "kwargs": None}],
    })


@pytest.mark.parametrize("missing", ["observation", "action"])
def test_no_environment_is_built_to_find_out_a_space(missing, canary):
    write(recorded([2]), FOREIGN, env_spec=specification("Toy-v0", f"{canary}:make"), **{f"{missing}_space": None})
    assert refusal(FOREIGN) == (
        f"dataset {FOREIGN} does not say its {missing} space, and the environment that it names is not built to find "
        "out; make the dataset anew with a newer Minari"
    )


def test_an_entry_point_is_not_used_and_the_environment_is_known_by_its_id(canary):
    first, second = (specification(name, f"{canary}:make") for name in ("Pendulum-v1", "Toy-v0"))
    write(recorded([2]), FOREIGN, env_spec=first, eval_env_spec=second)
    assert minari_files.read(FOREIGN).spaces.environment == "Pendulum-v1"


@pytest.mark.parametrize(
    "name", ["canary_in_the_mine:Toy-v0", "phys2d/CartPole-v1", "\x1b[2J-v0", "Toy", "", "Toy-v0\n"]
)
def test_an_environment_id_that_could_name_a_module_is_not_taken(name, canary, calls, capsys):
    write(recorded([2]), FOREIGN, env_spec=specification(name, "os:mkdir"))
    assert minari_files.read(FOREIGN).spaces.environment == ""
    line = (
        f"dataset {FOREIGN} names the environment {name!r}; only plain ids are taken from a dataset, name it yourself: "
        "--environment ID\n"
    )
    assert (line in capsys.readouterr().err) == bool(name)


@pytest.mark.parametrize("specification", ["{", "[]", "null", 7, '{"name": "Toy-v0"}'])
def test_a_malformed_specification_names_no_environment(specification):
    write(recorded([2]), env_spec=specification, eval_env_spec=None)
    assert minari_files.read(ID).spaces.environment == ""


def test_the_environment_for_evaluation_is_named_where_no_other_is():
    write(recorded([2]), env_spec=None, eval_env_spec=gym.spec("Pendulum-v1").to_json())
    assert minari_files.read(ID).spaces.environment == "Pendulum-v1"


REMOTE = "mujoco/toy/medium-v0"
COULD_NOT = f"dataset {REMOTE} is not on this machine and could not be downloaded"


@pytest.fixture
def server(monkeypatch, tmp_path, calls):
    """Minari's download, from a folder instead of a server: gives what `serve` put there; counts its calls."""

    class Server:
        folder, downloads, error = tmp_path / "server", 0, None

        def serve(self, episodes, damage=lambda data: None, **metadata):
            shutil.rmtree(self.folder, ignore_errors=True)
            with minari_remote.datasets_path(self.folder):
                damage(write(episodes, REMOTE, **metadata) / "data")

        def download(self, dataset_id):
            self.downloads += 1
            print("Downloading from Farama servers ...")
            if self.error:
                raise self.error
            shutil.copytree(self.folder / dataset_id, minari_files.root() / dataset_id)

    server = Server()
    monkeypatch.setattr(minari, "download_dataset", server.download)
    monkeypatch.setattr(minari_remote.urllib.request, "urlopen", lambda *_, **__: io.BytesIO())
    return server


def test_a_download_is_read_like_any_other_dataset(server, capsys):
    server.serve(recorded([2, 3]))
    for _ in range(2):
        np.testing.assert_array_equal(minari_files.read(REMOTE).episode_lengths, [2, 3])
    out, err = capsys.readouterr()
    assert out == ""  # kept for what drl itself says
    assert err.startswith("Downloading from Farama servers ...\n")
    assert server.downloads == 1
    assert [path.name for path in minari_files.root().glob(".partial-*")] == []


def test_a_whole_dataset_is_downloaded_anew_only_on_demand(server):
    server.serve(recorded([2, 3]))
    assert minari_files.download(REMOTE) is True
    server.serve(recorded([4]))
    assert minari_files.download(REMOTE) is False
    np.testing.assert_array_equal(minari_files.read(REMOTE).episode_lengths, [2, 3])
    assert minari_files.download(REMOTE, overwrite=True) is True
    np.testing.assert_array_equal(minari_files.read(REMOTE).episode_lengths, [4])


PARTIAL = [
    lambda data: cut(data / "main_data.hdf5", 0.9),
    lambda data: (data / "main_data.hdf5").unlink(),
    lambda data: cut(data / "metadata.json", 0.5),
    lambda data: (data / "metadata.json").unlink(),
    lambda data: shutil.rmtree(data),
]
partial = pytest.mark.parametrize(
    "damage", PARTIAL, ids=["data cut short", "no data", "metadata cut short", "no metadata", "empty"]
)


@partial
def test_a_partial_download_is_repaired(damage, server):
    server.serve(recorded([2, 3]))
    damage(write(recorded([9]), REMOTE) / "data")
    np.testing.assert_array_equal(minari_files.read(REMOTE).episode_lengths, [2, 3])


@partial
def test_a_download_that_is_not_whole_never_stands_in_its_place(damage, server):
    server.serve(recorded([2, 3]), damage)
    with pytest.raises(UserError, match=rf"^dataset {REMOTE}, as it was downloaded, is .*; type the same again$"):
        minari_files.download(REMOTE)
    assert not minari_files.path(REMOTE).exists()

    write(recorded([9]), REMOTE)
    with pytest.raises(UserError):
        minari_files.download(REMOTE, overwrite=True)
    np.testing.assert_array_equal(minari_files.read(REMOTE).episode_lengths, [9])


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), ConnectionError("reset by peer")])
def test_an_interrupted_download_leaves_what_was_there(interruption, server):
    write(recorded([9]), REMOTE)
    server.error = interruption
    with pytest.raises((KeyboardInterrupt, UserError)):
        minari_files.download(REMOTE, overwrite=True)
    np.testing.assert_array_equal(minari_files.read(REMOTE).episode_lengths, [9])
    assert not list(minari_files.root().glob(".partial-*"))


@pytest.mark.parametrize("what", ["is not on this machine and ", "is broken (main_data.hdf5 is missing) and ", ""])
def test_a_download_that_fails_says_why_it_was_tried(what, server):
    if "not on" not in what:
        data = write(recorded([9]), REMOTE) / "data"
    if "missing" in what:
        (data / "main_data.hdf5").unlink()
    server.error = ValueError("no such dataset")
    with pytest.raises(UserError) as caught:
        minari_files.download(REMOTE, overwrite=True)
    assert str(caught.value) == (
        f"dataset {REMOTE} {what}could not be downloaded (ValueError: no such dataset); {minari_remote.CURE}"
    )


def test_a_dataset_in_another_format_lacks_an_episode(server):
    server.serve(recorded([2, 3]))
    folder = write(recorded([2, 3]), REMOTE, data_format="arrow")
    (folder / "data" / "0").mkdir()
    minari_files.read(REMOTE)
    assert server.downloads == 1


def test_ours_are_not_downloaded(server):
    write(recorded([2]))
    assert minari_files.download(ID) is False
    with pytest.raises(UserError) as caught:
        minari_files.download(ID, overwrite=True)
    assert str(caught.value) == f"dataset {ID} is made here, not downloaded; {AGAIN}"
    assert server.downloads == 0


def test_a_download_without_its_extra_names_the_extra(server):
    server.error = ImportError("no module named huggingface_hub")
    assert refusal(REMOTE) == f"downloading {REMOTE} needs an extra; type: pip install 'drl[download]'"


def test_a_failed_download_is_one_line_with_the_near_miss(server):
    write(recorded([2]), "mujoco/toy/medium-v1")
    server.error = ConnectionError("no route to host\n  while resolving\n" + "x" * 5000)
    message = refusal(REMOTE)
    assert message.startswith(f"{COULD_NOT} (ConnectionError: no route to host while resolving xx")
    assert len(message) < 600 and message.endswith("; did you mean 'mujoco/toy/medium-v1'?")


@pytest.fixture
def no_minari(monkeypatch):
    """A server that is out of reach is found out before Minari, which would retry."""
    monkeypatch.setattr(minari, "download_dataset", None)


def test_without_a_network_one_line_says_so_and_what_to_type(monkeypatch, no_minari):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert refusal(REMOTE) == (
            f"{COULD_NOT}: {url} cannot be reached ([Errno 111] Connection refused); make a dataset here (drl data "
            "collect --help), or name the folder of one that you have (export MINARI_DATASETS_PATH=FOLDER) or another "
            "server (export MINARI_REMOTE=...)"
        )


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch, no_minari):
    monkeypatch.setattr(minari_remote, "PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        before = time.monotonic()
        assert "cannot be reached (timed out); " in refusal(REMOTE)
        assert time.monotonic() - before < 5


def test_any_answer_of_a_server_leaves_the_rest_to_minari(monkeypatch, server):
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    monkeypatch.undo()
    monkeypatch.setattr(minari, "download_dataset", lambda _: (_ for _ in ()).throw(ValueError("from Minari")))
    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as refusing:
        threading.Thread(target=refusing.handle_request).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{refusing.server_port}")
        assert refusal(REMOTE).startswith(f"{COULD_NOT} (ValueError: from Minari); ")


@pytest.mark.parametrize(
    ("remote", "url"),
    [(None, "https://huggingface.co"), ("hf://farama-minari", "https://huggingface.co"),
     ("gcp://minari-remote", "https://storage.googleapis.com"), ("ours://anywhere", None)],
)
def test_the_server_that_is_asked_is_the_one_that_minari_would_ask(remote, url, server, monkeypatch):
    asked = []

    def ask(request, timeout):
        asked.append((request.full_url, request.get_method()))
        raise urllib.error.URLError("nobody there")

    monkeypatch.setattr(minari_remote.urllib.request, "urlopen", ask)
    if remote:
        monkeypatch.setenv("MINARI_REMOTE", remote)
    server.serve(recorded([2]))
    if url:
        assert refusal(REMOTE).startswith(f"{COULD_NOT}: {url} cannot be reached (nobody there); ")
        assert asked == [(url, "HEAD")]
    else:  # unknown here: Minari knows
        minari_files.read(REMOTE)
        assert asked == []
