"""Signals that ask a process to end: raised, or noted until the work is whole; a second one ends it at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from drl import signals
from drl.signals import SIGNALS, Stopped, deferred, raised, status

EVERY = pytest.mark.parametrize("number", SIGNALS, ids=signals.name)
SECOND = """
import os, signal, sys
from drl.signals import deferred, raised
first, second, kind = map(int, sys.argv[1:])
with raised():
    with deferred("working"):
        try:
            if kind:
                with raised():
                    os.kill(os.getpid(), first)
            else:
                os.kill(os.getpid(), first)
        except KeyboardInterrupt:
            pass
        print("heard", flush=True)
        os.kill(os.getpid(), second)
        print("still here", flush=True)
"""


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@EVERY
def test_a_signal_is_raised_where_the_main_thread_is(number):
    with pytest.raises(Stopped) as caught, raised():
        send(number)
    assert caught.value.signal == number and isinstance(caught.value, KeyboardInterrupt)


@EVERY
def test_a_deferred_signal_is_noted_and_told(number, capfd):
    with deferred("training") as note:
        assert note.signal is None
        send(number)
        assert note.signal == number
    assert capfd.readouterr().err == f"\ndrl: {signals.name(number)} while training; a second one ends it at once\n"


@EVERY
@pytest.mark.parametrize("second", SIGNALS, ids=signals.name)
@pytest.mark.parametrize("kind", [0, 1], ids=["deferred", "raised within"])
def test_a_second_signal_ends_the_process_at_once(number, second, kind):
    arguments = [sys.executable, "-c", SECOND, *map(str, (int(number), int(second), kind))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=20)
    assert done.returncode == -second and done.stdout == "heard\n"


@EVERY
def test_the_status_of_a_stopped_process_is_the_shells(number, capsys):
    def work():
        send(number)
        return 0

    assert status(work) == 128 + number
    assert capsys.readouterr().err == f"drl: stopped by {signals.name(number)}\n"


def test_what_was_kept_is_told_and_a_bare_interrupt_is_ctrl_c(capsys):
    def stopped():
        raise Stopped(signal.SIGTERM, "all is saved")

    def interrupted():
        raise KeyboardInterrupt

    assert status(stopped) == 143 and status(interrupted) == 130 and status(lambda: 2) == 2
    assert capsys.readouterr().err == "drl: stopped by SIGTERM; all is saved\ndrl: stopped by SIGINT\n"


def test_what_a_signal_breaks_off_may_fail_with_an_error_of_its_own(capsys):
    """As the import of a C++ extension does."""
    def work():
        try:
            send(signal.SIGTERM)
        except Stopped as stopped:
            raise ImportError("initialization failed") from stopped

    assert status(work) == 143
    assert capsys.readouterr().err == "drl: stopped by SIGTERM\n"


@pytest.mark.parametrize("later", [False, True], ids=["nothing follows", "work that defers follows"])
def test_a_signal_that_a_library_swallows_is_not_forgotten(later, capsys):
    notes = []

    def work():
        try:
            send(signal.SIGTERM)
        except BaseException:
            pass
        if later:
            with deferred("working") as note:
                notes.append(note.signal)
        return 0

    assert status(work) == 143
    assert capsys.readouterr().err == "drl: stopped by SIGTERM\n" and notes == [signal.SIGTERM] * later


def test_an_error_without_a_signal_stays_an_error():
    def work():
        raise ImportError("no such module")

    with pytest.raises(ImportError, match="no such module"):
        status(work)


@pytest.mark.parametrize("context", [raised, lambda: deferred("working")], ids=["raised", "deferred"])
def test_afterwards_signals_are_the_callers_again(context):
    before = [signal.getsignal(number) for number in SIGNALS]
    for sent in (False, True):
        try:
            with context():
                assert [signal.getsignal(number) for number in SIGNALS] != before
                if sent:
                    send(signal.SIGTERM)
        except Stopped:
            pass
        assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_was_ignored_stays_ignored():
    """As SIGINT is in a process that a shell script put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with raised(), deferred("working") as note:
            send(signal.SIGINT)
            assert note.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_has_no_say_and_no_error():
    notes = []

    def work():
        with raised(), deferred("working") as note:
            notes.append(note.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert notes == [None]


def test_a_status_within_a_status_tells_it_once(capsys):
    assert status(lambda: status(lambda: send(signal.SIGTERM) or 0)) == 143
    assert capsys.readouterr().err == "drl: stopped by SIGTERM\n"


def test_a_child_that_leaves_signals_to_its_parent_hears_the_parents_alone():
    code = """
import os, signal
from drl import signals
signals.leave_to_parent(signal.SIGUSR2)
with signals.deferred("working") as note:
    for number in signals.SIGNALS * 2:
        os.kill(os.getpid(), number)
    assert note.signal is None
    os.kill(os.getpid(), signal.SIGUSR2)
    assert note.signal == signal.SIGUSR2
    for number in signals.SIGNALS:
        os.kill(os.getpid(), number)
print("whole")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n", "")
