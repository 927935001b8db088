"""One writer per run folder, and the others are told who it is."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from drl import disk, lock
from drl.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from drl import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes into tmp_path / "run"."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_the_second_is_told_which_process_is_first(holder, tmp_path):
    with pytest.raises(lock.Held) as caught, lock.held(tmp_path / "run"):
        pass
    told = rf"process {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00;"
    assert re.search(told, str(caught.value)) and "\n" not in str(caught.value)


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "run" / "run.lock").read_text())["pid"] == holder.pid
    with lock.held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "null", "{}", '{"pid": 1e999}', "\0", '{"pid": -5, "host": []}'])
def test_a_holder_that_has_not_written_who_it_is_is_another_process(content, holder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    (tmp_path / "run" / "run.lock").write_text(content)
    with pytest.raises(lock.Held, match="is being written by another process;"), lock.held(tmp_path / "run"):
        pass


def test_what_a_dead_process_left_is_not_taken_for_the_holder(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "run" / "run.lock").write_text(json.dumps({"pid": dead.pid, "host": socket.gethostname(), "since": ""}))
    with pytest.raises(lock.Held, match="another process"), lock.held(tmp_path / "run"):
        pass


def test_where_files_cannot_be_locked_one_line_says_so_and_work_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with lock.held(tmp_path / "run"):
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"), lock.held(tmp_path / "file" / "run"):
        pass
