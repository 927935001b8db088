"""Whatever an environment does, an evaluation ends: with a mean of all episodes, or with one line and no mean."""

import contextlib
import errno
import functools
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import faulty
from drl import checkpoint as checkpoints
from drl import cli, engine, envs_process
from drl.envs import described
from drl.errors import UserError
from drl.evaluate import read, read_failures
from drl.faults import EvaluationFailed
from drl.policy import RecurrentPolicy
from drl.rollout import rollout
from drl.watched import THREAD
from toys import SEED, TARGET, checkpoint

EPISODES = 6
WHERE = ["here", "apart"]
ENGINES = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(engine.unavailable() is not None,
                                                                 reason="no compiled engine here"))]
BEST = "torch" if engine.unavailable() else "cpu"
LIMITLESS = 60.0  # seconds, for what does not hang


@pytest.fixture(autouse=True, scope="module")
def registered():
    """By the name of a class that any process can import, and, as scripts and notebooks do, by a function."""
    known = dict(gym.registry)
    for kind in faulty.KINDS:
        for where, entry in (("apart", "faulty:Faulty"), ("here", lambda kind: faulty.Faulty(kind))):
            gym.register(named(kind, where), entry, kwargs={"kind": kind}, disable_env_checker=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield
    gym.registry.clear()
    gym.registry.update(known)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = children()
    yield
    faulty.RELEASE.set()
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(timeout=60)
            assert not thread.is_alive()
    faulty.RELEASE.clear()
    assert children() <= before


def children() -> set[str]:
    """Processes that this one has started and not seen end; other tests leave some, such as helpers of torch."""
    found = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found |= set(file.read_text().split())
    return found


def named(kind, where):
    return f"Faulty-{kind}-{'here-' if where == 'here' else ''}v0"


@functools.cache
def made(engine):
    return RecurrentPolicy(checkpoint(named("good", "here")), engine=engine)


def play(kind, where="here", patience=LIMITLESS, engine=BEST, **settings):
    asked = {"target_return": TARGET, "episodes": EPISODES, "seed": SEED, "environments": 4, "threads": 2} | settings
    return rollout(made(engine), named(kind, where), patience=patience, **asked)


def failure_of(kind, where="here", patience=LIMITLESS, **settings):
    with pytest.raises(EvaluationFailed) as caught:
        play(kind, where, patience, **settings)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_of_its_own_changes_no_bit(engine, monkeypatch):
    children = []
    monkeypatch.setattr(envs_process.ProcessEnvs, "close", lambda self, close=envs_process.ProcessEnvs.close: (
        children.append(self), close(self)))
    here, apart = (play("good", where, engine=engine) for where in WHERE)
    assert len(children) == 2
    assert len(set(here.returns)) == EPISODES and (here.lengths == faulty.STEPS).all()
    for one, other in zip(here, apart, strict=True):
        np.testing.assert_array_equal(one, other)


AT = rf"in step {faulty.BAD_STEP} of episode 3 \(seed {faulty.BAD_SEED}\)"
FAULTS = {
    "raises": "raised RuntimeError: simulator  lost",
    "exits": "raised SystemExit: 3",
    "helper": r"raised BrokenPipeError: \[Errno 32\] Broken pipe",
    "shape": r"answered with an observation of shape \(2,\) instead of \(3,\)",
    "reward": r"answered with a reward of shape \(2,\) instead of \(\)",
    "nan": "answered with an observation that is not finite, nan,",
    "infinite": "answered with a reward that is not finite, inf,",
}


@pytest.mark.parametrize(("kind", "told"), FAULTS.items(), ids=FAULTS)
def test_a_fault_is_told_with_its_episode_and_there_is_no_score(kind, told):
    failure = failure_of(kind)
    assert re.fullmatch(rf"Faulty-{kind}-here-v0 {told} {AT}", failure.reason)
    assert 0 <= failure.finished < EPISODES
    assert str(failure) == (f"{failure.reason}; {failure.finished} of 6 episodes had been finished, and no score is "
                            "made of fewer than all; mend that and type the same again")
    assert (failure.environment, failure.target_return, failure.episodes, failure.seed, failure.results) == (
        f"Faulty-{kind}-here-v0", TARGET, EPISODES, SEED, [])


@pytest.mark.parametrize("engine", ENGINES)
def test_episodes_that_were_finished_before_a_fault_are_counted_and_not_averaged(engine):
    failure = failure_of("raises", engine=engine, environments=1, threads=1)
    assert failure.finished == 3  # one after the other, and the fourth failed


def test_a_last_reward_that_no_policy_sees_is_looked_at():
    reason = failure_of("last").reason
    assert re.search(rf"a reward that is not finite, nan, in step {faulty.STEPS} of episode 3 ", reason)


APART = {
    "raises": FAULTS["raises"],
    "killed": r"lost its process \(Killed\)",
    "segfault": r"lost its process \(Segmentation fault\)",
    "stopped": r"did not answer within 0\.3 s",
    "greedy": r"did not answer within 0\.3 s",
}


@pytest.mark.parametrize(("kind", "told"), APART.items(), ids=APART)
def test_a_process_that_dies_or_hangs_fails_the_evaluation_alone(kind, told):
    failure = failure_of(kind, "apart", 0.3 if "within" in told else LIMITLESS, threads=1)
    assert re.fullmatch(rf"Faulty-{kind}-v0 {told} {AT}", failure.reason)
    assert failure.finished < EPISODES


@pytest.mark.parametrize("engine", ENGINES)
def test_a_thread_that_hangs_is_given_up_after_the_patience(engine):
    failure = failure_of("hangs", patience=0.3, engine=engine)
    assert re.fullmatch(rf"Faulty-hangs-here-v0 did not answer within 0\.3 s {AT}", failure.reason)
    assert str(failure).endswith("give it longer: drl evaluate --patience SECONDS (drl train: --evaluate.patience)")


def test_a_policy_that_hangs_is_given_up_after_the_patience(monkeypatch):
    monkeypatch.setattr(RecurrentPolicy, "step", lambda *_: faulty.RELEASE.wait())
    failure = failure_of("good", engine="torch", patience=0.1, threads=1)
    assert failure.reason == "the policy did not answer within 0.1 s after step 0"


def test_patience_is_for_each_call_not_for_all_of_them():
    played = play("slow", patience=0.5, environments=1, threads=1)  # six episodes of five steps of 0.02 s
    np.testing.assert_array_equal(played.returns, play("good").returns)


@pytest.mark.parametrize("where", WHERE)
def test_an_environment_that_cannot_be_made_is_a_failure(where):
    failure = failure_of("unmade", where, threads=1)
    assert failure.reason == f"{named('unmade', where)} raised OSError: no simulator when it was made"
    assert failure.finished == 0


@pytest.mark.parametrize("entry", ["__main__:Faulty", "nowhere.to.be:Faulty", "faulty:Nothing", faulty.Faulty])
def test_what_another_process_cannot_import_is_stepped_in_this_one(entry, monkeypatch):
    made = object()
    monkeypatch.setattr(envs_process, "make_envs", lambda *_: made)
    gym.register("Faulty-elsewhere-v0", entry, kwargs={"kind": "good"})
    assert envs_process.make_apart("Faulty-elsewhere-v0", 1, 1, 1, LIMITLESS) == [made]
    del gym.registry["Faulty-elsewhere-v0"]


def test_arguments_that_json_would_change_stay_as_they_are():
    gym.register("Faulty-elsewhere-v0", "faulty:Faulty", kwargs={"kind": ("good", "bad")})
    assert described("Faulty-elsewhere-v0") is None and described("Faulty-good-v0")
    del gym.registry["Faulty-elsewhere-v0"]


def test_spaces_are_checked_across_processes():
    with pytest.raises(UserError, match=r"^environment CartPole-v1 has action_space Discrete\(2\); flat Box spaces"):
        envs_process.make_apart("CartPole-v1", 1, 1, 1, LIMITLESS)
    (made,) = envs_process.make_apart("Pendulum-v1", 1, 1, 1, LIMITLESS)
    env = gym.make("Pendulum-v1")
    assert (made.observation_space, made.action_space) == (env.observation_space, env.action_space)
    made.close()


def test_a_child_ends_with_a_parent_that_is_killed():
    code = """
import os
from drl.envs_process import make_apart
(made,) = make_apart("Pendulum-v1", 1, 1, 1, 60)
print(made._child.pid, flush=True)
os.kill(made._child.pid, 19)  # SIGSTOP: it cannot see the end of its pipe
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    try:
        handle = os.pidfd_open(int(killed.stdout))
    except ProcessLookupError:
        return
    assert select.select([handle], [], [], 60)[0]
    os.close(handle)


def test_a_process_ends_although_one_of_its_threads_hangs():
    code = "import test_evaluation_faults as t; next(t.registered.__wrapped__()); t.play('hangs', patience=0.1)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "EvaluationFailed: Faulty-hangs-here-v0 did not answer within 0.1 s in step 3 of episode 3" in ended.stderr


@pytest.fixture
def run(tmp_path):
    """A run folder whose policy fits the faulty environments."""
    checkpoints.save(checkpoint(named("good", "here"), episodes=EPISODES), tmp_path / "run", 1)
    return tmp_path / "run"


def test_a_failed_evaluation_exits_with_2_and_is_counted_in_the_run_folder(run, capsys):
    environment = named("raises", "here")
    assert cli.main(["evaluate", str(run), "--environment", environment]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[-1].startswith(f"drl: {environment} raised RuntimeError: simulator  lost in step")
    (told,) = read_failures(run)
    assert (told["environment"], told["step"], told["mode"], told["environment_seed"]) == (
        environment, 7, "recurrent", SEED)
    assert not read(run)


def test_a_result_that_cannot_be_stored_is_printed_all_the_same(run, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["evaluate", str(run), "--environment", named("good", "here"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert len(json.loads(out)["returns"]) == EPISODES and math.isfinite(json.loads(out)["return_mean"])
    assert re.search(r"\ndrl: the evaluation cannot be written: No space left on device in \S+; .*make room", err)
    assert not read(run)
