"""Environments that go wrong in step BAD_STEP of the episode with the seed BAD_SEED, and play on in all others."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np

BAD_SEED, BAD_STEP, STEPS = 303, 3, 5
RELEASE = threading.Event()  # set by nobody but who cleans up
KINDS = ("good", "raises", "exits", "helper", "hangs", "slow", "shape", "reward", "nan", "infinite", "last", "segfault",
         "killed", "stopped", "greedy", "unmade")


class Faulty(gym.Env):
    """O = 3, A = 1; what it observes and what it pays depend on the seed and on every action."""

    def __init__(self, kind: str):
        if kind == "unmade":
            raise OSError("no simulator\nfound")
        self.kind = kind
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._state = self.np_random.normal(size=3).astype(np.float32)
        self._kept, self._seed, self._step = None, seed, 0
        return self._state, {}

    def step(self, action):
        self._step += 1
        before, self._kept = self._kept, action  # the array itself, as environments do
        self._state = np.tanh(self._state + action).astype(np.float32)
        observation, reward = self._state, float(self._state.sum() + (0 if before is None else before.sum()))
        if self.kind == "slow":
            time.sleep(0.02)
        if self._seed == BAD_SEED and self._step == (STEPS if self.kind == "last" else BAD_STEP):
            observation, reward = self._wrong(observation, reward)
        return observation, reward, self._step == STEPS, False, {}

    def _wrong(self, observation, reward):
        if self.kind == "raises":
            raise RuntimeError("simulator \x1blost\nand more")
        if self.kind == "exits":
            sys.exit(3)
        if self.kind == "helper":
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as helper:
                os.kill(helper.pid, signal.SIGKILL)
                helper.wait()
                os.write(helper.stdin.fileno(), b"step")
        if self.kind == "hangs":
            RELEASE.wait()
        if self.kind == "segfault":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # faulthandler's, which pytest installs, would speak
            ctypes.string_at(0)
        if self.kind in ("killed", "stopped"):
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "killed" else signal.SIGSTOP)
        if self.kind == "greedy":
            ctypes.PyDLL(None).pause()  # holds the interpreter's lock
        wrong = {"shape": (observation[:2], reward), "reward": (observation, np.zeros(2)),
                 "nan": (observation * np.nan, reward), "infinite": (observation, np.inf),
                 "last": (observation, np.nan)}
        return wrong.get(self.kind, (observation, reward))
