"""Folders that are whole or not there, whoever is killed."""

import errno
import os

import pytest

from drl import disk
from drl.errors import UserError


def folder(path, content):
    path.mkdir(parents=True)
    (path / content).touch()
    return path


@pytest.fixture(params=["exchange", "two steps"])
def exchange(request, monkeypatch):
    """Whether the file system lets folders change places at once."""
    if request.param == "two steps":
        monkeypatch.setattr(disk, "_exchange", lambda *_: False)


def test_a_folder_takes_the_place_of_another(exchange, tmp_path):
    new, old = (folder(tmp_path / name, content=name) for name in ("new", "old"))
    disk.replace(new, old)
    assert os.listdir(old) == ["new"]


def test_a_folder_takes_an_empty_place(exchange, tmp_path):
    disk.replace(folder(tmp_path / "new", content="new"), tmp_path / "place")
    assert os.listdir(tmp_path) == ["place"] and os.listdir(tmp_path / "place") == ["new"]


def test_where_folders_cannot_change_places_a_failure_leaves_the_earlier_one(tmp_path, monkeypatch):
    new, old = (folder(tmp_path / name, content=name) for name in ("new", "old"))
    monkeypatch.setattr(disk, "_exchange", lambda *_: False)
    replace, calls = os.replace, []

    def fail_the_second_time(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError("no such luck")
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail_the_second_time)
    with pytest.raises(OSError, match="no such luck"):
        disk.replace(new, old)
    assert os.listdir(old) == ["old"]


def test_a_scratch_folder_is_hidden_and_goes_at_the_end(tmp_path):
    with pytest.raises(KeyboardInterrupt), disk.scratch(tmp_path) as partial:
        assert partial.parent == tmp_path and partial.name.startswith(".")
        folder(partial / "deep", content="file")
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path):
    folder(tmp_path / ".partial-dead" / "deep", content="file")
    with disk.scratch(tmp_path) as alive:
        with disk.scratch(tmp_path) as other:
            assert {path.name for path in tmp_path.iterdir()} == {alive.name, other.name}


def test_a_lock_is_held_by_one_at_a_time_and_given_back(tmp_path):
    with disk.locked(tmp_path):
        with pytest.raises(BlockingIOError), disk.locked(tmp_path, wait=False):
            pass
    with disk.locked(tmp_path, wait=False):
        pass


def test_where_folders_cannot_be_locked_work_goes_on_and_nothing_of_others_is_removed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # NFS

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    folder(tmp_path / ".partial-alive", content="file")
    with disk.locked(tmp_path, wait=False) as held, disk.scratch(tmp_path) as partial:
        assert held is False and partial.is_dir()
    assert os.listdir(tmp_path) == [".partial-alive"]


def test_space_that_is_missing_is_told_in_bytes(tmp_path, monkeypatch):
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=disk.ROOM + 2_000_000))
    disk.require_space(tmp_path / "made", 2_000_000, "this")
    with pytest.raises(UserError, match=r"this needs 19 MB in .*made, 19 MB are free; make room, or name another"):
        disk.require_space(tmp_path / "made", 2_000_001, "this")


def test_an_error_that_is_not_the_disks_refusal_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), disk.refusal_told(tmp_path, "this"):
        (tmp_path / "missing").read_text()
