"""Whatever happens in the child process, the caller gets a return or one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drl.data import guard
from drl.errors import UserError

TARGETS = '''
import ctypes, os, resource, signal, sys, time
from pathlib import Path
from drl.errors import UserError

def write(path, text): Path(path).write_text(text)
def environment(path, name): Path(path).write_text(os.environ[name])
def limits(path): Path(path).write_text(repr([resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0]
                                              for name in ("AS", "CPU", "CORE")]))
def talk(): print("to stdout"); print("to stderr", file=sys.stderr)
def refuse(): raise UserError("no such field; add --field 1")
def fail(): raise ZeroDivisionError("first line\\nsecond line")
def allocate(): bytearray(2**32)
def crash(): ctypes.string_at(0)
def crash_in_c(): os.abort()
def crash_at_exit(): import atexit; atexit.register(os.abort)
def leave(): os._exit(3)
def spin():
    while True: pass
def sleep(path): Path(path).write_text(str(os.getpid())); time.sleep(600)
'''
GIB = 2**30


@pytest.fixture(autouse=True)
def targets(tmp_path, monkeypatch):
    """A module of functions to call, found by the child alone."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "guarded.py").write_text(TARGETS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)


def call(function, *arguments, memory=GIB, seconds=60):
    guard.call(f"guarded:{function}", *map(str, arguments), memory=memory, seconds=seconds)


def message_of(function, *arguments, error=guard.Failure, **limits):
    with pytest.raises(UserError) as caught:
        call(function, *arguments, **limits)
    assert type(caught.value) is error
    return str(caught.value)


def test_the_function_is_called_with_its_arguments(tmp_path):
    call("write", tmp_path / "written", "two words, 'quotes' and ünicode\n")
    assert (tmp_path / "written").read_text() == "two words, 'quotes' and ünicode\n"


def test_the_environment_is_inherited(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", "some where")
    call("environment", tmp_path / "written", "MINARI_DATASETS_PATH")
    assert (tmp_path / "written").read_text() == "some where"


def test_limits_of_memory_time_and_core_files_hold_in_the_child_alone(tmp_path):
    call("limits", tmp_path / "written", memory=GIB + 4096, seconds=6.5)
    assert (tmp_path / "written").read_text() == repr([GIB + 4096, 7, 0])


def test_what_the_function_prints_goes_to_stderr(capfd):
    call("talk")
    out, err = capfd.readouterr()
    assert out == "" and sorted(err.split("\n")) == ["", "to stderr", "to stdout"]


def test_a_user_error_keeps_its_message():
    assert message_of("refuse", error=UserError) == "no such field; add --field 1"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fail", "ZeroDivisionError: first line second line"),
        ("allocate", "needed more than 1.0 GiB of memory"),
        ("crash", "crashed (SIGSEGV)"),
        ("crash_in_c", "crashed (SIGABRT)"),
        ("crash_at_exit", "crashed (SIGABRT)"),
        ("leave", "crashed (exit status 3)"),
        ("nowhere", "AttributeError: module 'guarded' has no attribute 'nowhere'"),
    ],
)
def test_what_goes_wrong_is_one_line_and_no_traceback(function, message, capfd):
    assert message_of(function) == message
    assert "Traceback" not in capfd.readouterr().err


def test_a_child_that_sleeps_is_killed_by_the_clock(tmp_path):
    assert message_of("sleep", tmp_path / "pid", seconds=0.7) == "took longer than 0.7 s"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(("function", "end"), [("spin", signal.SIGXCPU), ("sleep", signal.SIGALRM)])
def test_a_child_without_a_parent_ends_by_itself(tmp_path, function, end):
    """The parent's clock does not run here: what stops a child whose parent was killed?"""
    arguments = [str(tmp_path / "pid")] if function == "sleep" else []
    command = [sys.executable, "-P", "-m", "drl.data.guard", f"guarded:{function}", str(GIB), "1", *arguments]
    assert subprocess.run(command, timeout=60).returncode == -end


def test_running_out_of_cpu_time_is_said_in_the_same_words(monkeypatch):
    monkeypatch.setattr(subprocess.Popen, "communicate", lambda self, timeout: (self.stdout.read(), None))
    assert message_of("spin", seconds=1) == "took longer than 1 s"


def test_an_interrupt_kills_the_child(tmp_path):
    pid = tmp_path / "pid"
    # a shell that starts the tests in the background has them ignore SIGINT, and children inherit that
    caller = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from drl.data import guard; "
              f"guard.call('guarded:sleep', {str(pid)!r}, memory=2**30, seconds=99)")
    with subprocess.Popen([sys.executable, "-c", caller], stderr=subprocess.PIPE, process_group=0) as process:
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: both processes get it
        _, err = process.communicate(timeout=20)
    assert err.decode().rstrip().endswith("KeyboardInterrupt") and err.count(b"Traceback") == 1, "only the parent's"
    wait_for_the_end(int(pid.read_text()))


def wait_for_the_end(pid):
    """A process that was killed may take a moment to go, and stay as a zombie where nobody waits for orphans."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} is still there")


def test_modules_in_the_current_folder_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('found')")
    monkeypatch.chdir(tmp_path)
    call("write", tmp_path / "written", "well")
    assert (tmp_path / "written").read_text() == "well"
