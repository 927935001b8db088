"""An exported policy: a folder from which a trained model acts, here or in a program that has no drl.

    model.safetensors    weights, normaliser, action box, float32; metadata with all that a step needs to know
    config.json          format, step, config, spaces, dataset, versions, and the scores of the run
    trace.safetensors    the golden trace: 100 steps and what the policy did in float64
    manifest.json        SHA-256 of every file
    step.pt2, step.onnx  the step as a program, where it was asked for (portable.py)

The trace's observations are drawn around the normaliser's statistics and its rewards around an even pace to the target,
not played: whoever checks it, in whatever language, needs no environment and no physics of the same version.

Dimension key: S steps of the trace, O observation, A action.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from drl import checkpoint as checkpoints
from drl import foreign, intact
from drl.checkpoint import Checkpoint
from drl.checkpoint_files import read_acting, write_tensors
from drl.config_files import stored
from drl.data.store import Spaces
from drl.engine import ActionError
from drl.errors import UserError, shown
from drl.foreign_tensors import require_sound, read_tensors
from drl.intact import Damaged
from drl.policy_state import WindowState
from drl.versions import versions

FORMAT = 1
MEMORY = 2  # of MODEL alone, where it is not the plain model: compiled steps from before must refuse it
MODEL, CONFIG, TRACE = "model.safetensors", "config.json", "trace.safetensors"
PROTOCOL = ("normalized_score is 100 (return - random) / (expert - random) with the reference beside it, mean over "
            "episodes seeded from environment_seed on; weights of the last update, target return fixed beforehand")
STEPS = 100
TOLERANCE = 1e-4  # on actions, of the half width of the action box
TOLERANCES = {"cpu-bfloat16": 0.05}  # engines that round more than float32 does
CARD = {"step": int, "environment": str, "observation_dim": int, "action_dim": int, "dataset": dict, "versions": dict,
        "config": dict}
WHAT, CURE = "exported policy", "export it again: drl export RUN FOLDER --overwrite"


class Trace(NamedTuple):
    """One row's steps with an episode's start at the first and in the middle, and the actions of the float64 policy.

    Attributes:
        observations: raw, (S, O) float32.
        rewards: what the action before earned, in the environment's units, (S,) float32.
        episode_start: True where an episode begins, (S,) bool.
        target_return: (), float32.
        actions: in the environment's box, (S, A) float32.
    """

    observations: Tensor
    rewards: Tensor
    episode_start: Tensor
    target_return: Tensor
    actions: Tensor

    def fits(self, spaces: Spaces) -> bool:
        """Whether these are the shapes and dtypes of a trace in these spaces, and finite numbers."""
        shapes = (STEPS, spaces.observation_dim), (STEPS,), (STEPS,), (), (STEPS, spaces.action_dim)
        dtypes = torch.float32, torch.float32, torch.bool, torch.float32, torch.float32
        return all(x.shape == shape and x.dtype == dtype and x.isfinite().all()
                   for x, shape, dtype in zip(self, shapes, dtypes, strict=True))

    @classmethod
    def record(cls, policy, checkpoint: Checkpoint) -> Self:
        """What a float64 policy of the checkpoint does, from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        mean, std = map(torch.as_tensor, checkpoint.normaliser)
        observations = mean + std * torch.randn(STEPS, len(mean), generator=generator)
        target = policy.initial_state(1).target_return[0].float()
        rewards = target / checkpoint.config.model.max_timesteps * 2 * torch.rand(STEPS, generator=generator)
        starts = torch.arange(STEPS) % (STEPS // 2) == 0
        unplayed = cls(observations, rewards, starts, target, torch.empty(0))
        return unplayed._replace(actions=unplayed.play(policy).float())

    def play(self, policy) -> Tensor:
        """What `policy` does when it is led along the trace, (S, A) float64."""
        state, actions = policy.initial_state(1, float(self.target_return)), []
        for observation, reward, start in zip(*self[:3], strict=True):
            action, state = policy.step(observation[None].numpy(), float(reward), state, start[None].numpy())
            actions.append(action[0])
        return torch.as_tensor(np.stack(actions), dtype=torch.float64)


def write(folder: Path, checkpoint: Checkpoint, trace: Trace, evaluations: list[dict[str, Any]]) -> None:
    """Put the files of an exported policy into `folder`, all but the manifest.

    Args:
        evaluations: results of drl.evaluate for these weights.
    """
    config, spaces = checkpoint.config, checkpoint.spaces
    model = {name: getattr(config.model, name)
             for name in ("width", "layers", "heads", "feature_map", "max_timesteps", "return_scale")}
    plain = config.model.action_tokens and not (config.model.fading or config.model.return_quantile)
    facts = {"format": FORMAT if plain else MEMORY, "environment": spaces.environment,
             "observation_dim": spaces.observation_dim, "action_dim": spaces.action_dim, **model,
             "target_return": float(trace.target_return)}
    tensors = {name: tensor.float() for name, tensor in checkpoint.acting().items()}
    write_tensors(folder / MODEL, tensors, {name: str(value) for name, value in facts.items()})
    write_tensors(folder / TRACE, trace._asdict())
    dataset = {"id": config.dataset, "fingerprint": checkpoint.dataset_fingerprint,
               "mean_return": checkpoint.dataset_return}
    scores = [{name: value for name, value in result.items() if not isinstance(value, list)}
              | {"environment_seed": result["seeds"][0]} for result in evaluations if result["seeds"]]
    intact.write_json(folder / CONFIG, {
        "format": FORMAT,
        "step": checkpoint.step,
        "environment": spaces.environment,
        "observation_dim": spaces.observation_dim,
        "action_dim": spaces.action_dim,
        "dataset": dataset,
        "versions": {"trained": checkpoint.versions, "exported": versions()},
        "scores": {"protocol": PROTOCOL, "evaluations": scores},
        "config": config.to_dict(),
    })


def is_exported(folder: Path) -> bool:
    """Whether `folder` is an exported policy, or what is left of one."""
    return any(os.path.isfile(folder / name) for name in (CONFIG, TRACE))


def load(folder: Path | str) -> tuple[Checkpoint, Trace | None]:
    """Read an exported policy, a checkpoint or the newest checkpoint of a run; only the first has a trace.

    Raises:
        UserError: it is none of them, a file is damaged or missing, or it was written by a newer version.
    """
    folder = Path(folder)
    if not is_exported(folder):
        return checkpoints.load(folder), None
    with _cured():
        intact.require_intact(folder, [CONFIG], WHAT)
        card = intact.read_json(folder / CONFIG, WHAT)
    if card.get("format") != FORMAT:
        raise UserError(f"{WHAT} {folder} has format {shown(card.get('format'))}, this version reads {FORMAT}; install "
                        f"the version that wrote it: {json.dumps(card.get('versions'))[:400]}")
    with _cured():
        intact.require_whole(folder, [MODEL, TRACE, CONFIG], WHAT)
    try:
        checkpoint = _checkpoint(card, *read_acting(folder / MODEL))
        require_sound(checkpoint.config, checkpoint.weights, checkpoint.spaces, checkpoint.normaliser, MODEL)
        trace = Trace(**read_tensors(folder / TRACE, WHAT))
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{WHAT} {folder} is not what drl export writes: {' '.join(str(error).split())}; {CURE}"
                        ) from error
    if not trace.fits(checkpoint.spaces):
        raise UserError(f"{WHAT} {folder} is not what drl export writes: {TRACE} does not fit {CONFIG}; {CURE}")
    return checkpoint, trace


@contextlib.contextmanager
def _cured() -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        raise Damaged(f"{error}; {CURE}") from error


def _checkpoint(card: dict[str, Any], weights, normaliser, low, high) -> Checkpoint:
    """The checkpoint of which config.json and model.safetensors were written."""
    card = foreign.checked(card, CONFIG, CARD)
    dataset = foreign.checked(card["dataset"], CONFIG, {"fingerprint": str, "mean_return": float | None})
    versions = foreign.checked(card["versions"], CONFIG, {"trained": dict[str, str]})
    return Checkpoint(
        config=stored(card["config"]),
        step=card["step"],
        weights=weights,
        normaliser=normaliser,
        spaces=Spaces(card["environment"], card["observation_dim"], low, high),
        dataset_fingerprint=dataset["fingerprint"],
        versions=versions["trained"],
        training={},
        dataset_return=dataset["mean_return"],
    )


def check(policy, trace: Trace | None, folder: Path | str) -> None:
    """Hold a policy to the golden trace; a windowed one only where its window still holds the whole episode.

    Raises:
        UserError: an action is off by more than the engine's tolerance.
    """
    if trace is None:
        return
    step = np.arange(STEPS)
    since = step - np.maximum.accumulate(np.where(trace.episode_start, step, 0))
    windowed = isinstance(policy.initial_state(1, 0.0), WindowState)
    held = torch.as_tensor(since < policy.config.train.context if windowed else since >= 0)
    half = torch.as_tensor(policy.spaces.action_high - policy.spaces.action_low, dtype=torch.float64) / 2
    try:
        played = trace.play(policy)
    except ActionError:
        played = torch.full_like(trace.actions, torch.nan)
    off = ((played - trace.actions).abs() / half).amax(1)[held]
    allowed = TOLERANCES.get(policy.engine, TOLERANCE)
    if not (off <= allowed).all():
        raise UserError(f"the policy in {folder} does not do what its golden trace says: an action is off by "
                        f"{off.nan_to_num(torch.inf).max():.2g} of the action box's half width, allowed are "
                        f"{allowed:g}; {CURE}")
