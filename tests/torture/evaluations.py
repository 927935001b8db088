"""An environment that hangs, raises or loses its process ends its evaluation in bounded time, without a mean."""

import functools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import toys
from torture import toy
from torture.processes import Drl, drl
from torture.trial import Trial

from drl import checkpoint as checkpoints
from drl.config import EvaluateConfig

PROMISE = "an environment that hangs, raises or dies is a failure that is counted, in bounded time, without a mean"
TRIALS, SECONDS = (30, 6), (150, 20)
PATIENCE = 2.0  # seconds without a step until an evaluation gives up
BOUND = 15.0  # seconds beyond the patience in which it must have ended
WAYS = ("hangs", "raises", "dies", "gives NaN", "hangs in reset", "raises in reset")
ID = "Torture-v0"


def run(trials: int, folder: Path, rng: np.random.Generator, short: bool) -> Iterator[Trial]:
    """`drl evaluate` of a random policy where a random step of the first or second episode fails."""
    run = folder / "run"
    with toy.root(folder):
        toy.dataset()
        settings = {"patience": PATIENCE, "target_returns": [toys.TARGET], "episodes": 4, "environments": 2}
        known = {name: value for name, value in settings.items() if name in EvaluateConfig.__dataclass_fields__}
        checkpoints.save(toys.checkpoint(toys.ENVIRONMENT, **known), run, keep=1)
        for index in range(trials):
            way = WAYS[index % len(WAYS)]
            hook = functools.partial(register, way, int(rng.integers(1, 200)), int(rng.integers(1, 3)))
            (run / "evaluation.json").unlink(missing_ok=True)
            began = time.monotonic()
            with drl(["evaluate", str(run), "--environment", ID, "--device", "cpu"], folder / "said",
                     hook=hook) as process:
                process.wait(PATIENCE + BOUND)
            yield Trial("evaluations", way, *_judge(process, run), time.monotonic() - began)


def register(way: str, step: int, episode: int) -> None:
    """Have Gymnasium know the environment that fails in such a way, at a step of an episode."""
    gym.register(ID, entry_point=Failing, kwargs={"way": way, "step": step, "episode": episode}, max_episode_steps=200)


class Failing(gym.Wrapper):
    """The toy environment, until it fails; episodes are counted over all copies."""

    episodes = 0

    def __init__(self, way: str, step: int, episode: int):
        super().__init__(gym.make(toys.ENVIRONMENT).unwrapped)
        self._way, self._step, self._episode, self._steps = way, step, episode, 0

    def reset(self, **options):
        Failing.episodes += 1
        self._steps, self._doomed = 0, Failing.episodes == self._episode
        if self._doomed and self._way.endswith("in reset"):
            self._fail()
        return super().reset(**options)

    def step(self, action):
        self._steps += 1
        observation, reward, *rest = super().step(action)
        if self._doomed and self._steps == self._step:
            if self._way == "gives NaN":
                reward = float("nan")
            else:
                self._fail()
        return observation, reward, *rest

    def _fail(self) -> None:
        if self._way.startswith("hangs"):
            time.sleep(3600)
        if self._way == "dies":
            os.close(_gone())  # what a simulator in a process of its own leaves: a pipe without an other end
        raise RuntimeError("the simulator broke\nin two lines")


def _gone() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    os.write(writing, b"step")
    return writing


def _judge(process: Drl, run: Path) -> tuple[bool, str]:
    if process.status == -signal.SIGKILL:
        return False, f"still there after {PATIENCE + BOUND:g} s"
    if not process.refused:
        return False, process.outcome
    stored = (run / "evaluation.json").read_text() if (run / "evaluation.json").exists() else "{}"
    if any(result.get("return_mean") is not None for result in json.loads(stored).get("results", [])):
        return False, "a mean was stored"
    if "failures" not in stored:
        return False, f"no failure is counted in evaluation.json: {process.told[-1]}"
    return True, process.told[-1][:150]
