"""D4RL's original MuJoCo files (Fu et al. 2020, arXiv 2004.07219) converted into Minari datasets.

    <env>_<tier>-v2.hdf5    observations, next_observations (N, O)  actions (N, A)  rewards, terminals, timeouts (N,)
      -> plain .npy files, made by a child process with limits of memory and time (d4rl_hdf5.py)
      -> split after each terminal or timeout; what follows the last one is dropped and counted
      -> the observation after the last action is the last of next_observations
    d4rl/<env>/<tier>-v2    named for evaluation in Gymnasium's v5, but not recorded there

Dimension key: N steps of the file, E episodes, T steps of one episode, O observation, A action.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from drl import disk, scores
from drl.data import guard, minari_files, minari_writer
from drl.data.d4rl_hdf5 import FLAGS, NUMBERS, ORIGIN, wrong
from drl.data.store import BOUND_TOLERANCE, Recorded, Spaces
from drl.errors import UserError, did_you_mean
from drl.progress import progress
from drl.versions import versions

BODIES = {
    name: Spaces(environment, O, -np.ones(A, np.float32), np.ones(A, np.float32))
    for name, environment, O, A in (
        ("hopper", "Hopper-v5", 11, 3), ("halfcheetah", "HalfCheetah-v5", 17, 6), ("walker2d", "Walker2d-v5", 17, 6)
    )
}
# SHA-256 of the originals; source: checksums.tsv of d4rl_mujoco_* in tensorflow/datasets
ORIGINALS = {
    "hopper/random": "63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054",
    "hopper/medium": "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0",
    "hopper/medium-replay": "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b",
    "hopper/full-replay": "56baf95963c51c1e964049a974566c50ba80f289390565523e60c0ba83e0982e",
    "hopper/medium-expert": "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26",
    "hopper/expert": "01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b",
    "halfcheetah/random": "25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba",
    "halfcheetah/medium": "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0",
    "halfcheetah/medium-replay": "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683",
    "halfcheetah/full-replay": "27fdf7ea86e5a2cbd24d611ae9e703c86ec2e8e52823abc69dd9af6afb3a36c0",
    "halfcheetah/medium-expert": "015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06",
    "halfcheetah/expert": "d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f",
    "walker2d/random": "4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa",
    "walker2d/medium": "cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda",
    "walker2d/medium-replay": "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db",
    "walker2d/full-replay": "f2720f9d27b2acef6ec9a7d9ad3b80b6c2078ad4467cee668a81e3b3c80bcf2a",
    "walker2d/medium-expert": "6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04",
    "walker2d/expert": "2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a",
}
MEMORY, SECONDS = 2 << 30, 600  # of the child, bytes and seconds
LARGEST_NUMBER = np.finfo(np.float32).max  # the arrays that are trained on are float32
ROUNDING = 1e-5  # relative; next_observations may have been rounded otherwise than observations


class Imported(NamedTuple):
    """What became of a file.

    Attributes:
        dataset, folder: where it is now.
        dropped: steps after the last end of an episode.
        gaps: steps of the file inside an episode whose next observation is not the one that follows.
        original: whether the file is D4RL's own, bit for bit.
    """

    dataset: str
    folder: Path
    dropped: int
    gaps: tuple[int, ...]
    original: bool


def convert(file: str, *, name: str = "", overwrite: bool = False) -> Imported:
    """Make the dataset d4rl/<env>/<tier>-v2 of a file in the layout of D4RL's.

    Args:
        file: its path.
        name: "<env>/<tier>-v2", for a file that is not named as D4RL's are.
        overwrite: replace a dataset of this id.

    Raises:
        UserError: the name is unknown, the dataset exists and may not be replaced, the disk has no room, or the file
            is damaged or not in this layout; names file, step and field.
    """
    name = _parse(name, file)
    dataset_id, spaces = f"d4rl/{name}-v2", BODIES[name.partition("/")[0]]
    if dataset_id in minari_files.local_ids() and not overwrite:
        raise UserError(f"dataset {dataset_id} exists already; add --overwrite to import it anew")
    digest = _digest(file)
    original = digest == ORIGINALS[name]
    root = minari_files.root()
    needed = 3 * Path(file).stat().st_size
    disk.require_space(root, needed, f"importing {file}")
    with disk.refusal_told(root, f"dataset {dataset_id}", needed=needed), disk.scratch(root) as folder:
        try:
            guard.call("drl.data.d4rl_hdf5:extract", file, str(folder), str(spaces.observation_dim),
                       str(spaces.action_dim), memory=MEMORY, seconds=SECONDS)
        except guard.Failure as failure:
            raise wrong(file, f"cannot be read ({failure})") from failure
        fields = {
            field: np.asarray(np.load(folder / f"{field}.npy", mmap_mode="r", allow_pickle=False))
            for field in (*NUMBERS, *FLAGS)
        }
        stops = _stops(fields, file)
        steps = int(stops[-1])
        dropped = len(fields["rewards"]) - steps
        gaps = _gaps(fields, stops)
        with progress(steps, "step", f"writing {dataset_id}") as bar:
            target = minari_writer.write(
                dataset_id,
                _episodes(fields, stops, spaces, file, bar),
                environment=spaces.environment,
                spaces=spaces,
                algorithm="uniform actions" if name.endswith("/random") else "SAC",
                reference=scores.reference(spaces.environment),
                description=("" if original else "Not D4RL's own file, by its SHA-256, but in the layout of: ")
                + f"D4RL's original {name} data, v2 (Fu et al. 2020, arXiv 2004.07219; CC BY 4.0). Recorded with "
                f"mujoco-py in the v2 environment, not in {spaces.environment}.",
                extra={
                    "reference_source": scores.REFERENCE_SOURCE,
                    "source": {"file": Path(file).name, "sha256": digest, "original": original,
                               "episodes": len(stops), "steps": steps, "dropped_tail_steps": dropped,
                               "gaps": len(gaps)},
                    "converted_with": versions(),  # not "versions": none of these recorded the data
                },
            )
    return Imported(dataset_id, target, dropped, gaps, original)


def _parse(name: str, file: str) -> str:
    """"<env>/<tier>" of hopper/medium-replay-v2, or of a file hopper_medium_replay-v2.hdf5."""
    text = name or Path(file).name.removesuffix(".hdf5").replace("_", "-").replace("-", "/", 1)
    found = re.fullmatch(r"(?P<body>\w+)/(?P<tier>[a-z-]+?)(-v(?P<version>\d+))?", text)
    body, tier, version = found.group("body", "tier", "version") if found else ("", "", "")
    if body == "ant":
        raise UserError("ant cannot be imported: D4RL's observations of 111 dimensions do not fit Ant-v5, which has "
                        "105; take Minari's: drl train --dataset mujoco/ant/medium-v0")
    if body in BODIES and version != "2":
        raise UserError(f"{name or file}: only v2 can be imported; v0 has no next_observations, and hopper's v0 and v1 "
                        f"data are faulty (D4RL issues 19, 76 and 86); v2 is at {ORIGIN}")
    if f"{body}/{tier}" in ORIGINALS:
        return f"{body}/{tier}"
    if name:
        raise UserError(f"unknown name {name!r}; {did_you_mean(name, (f'{known}-v2' for known in ORIGINALS))}")
    raise UserError(f"{file} is not named as D4RL's files are, such as hopper_medium_replay-v2.hdf5; say what it is, "
                    "such as --name hopper/medium-replay-v2")


def _digest(file: str) -> str:
    if not Path(file).is_file():
        raise UserError(f"no such file: {file}; D4RL's own files are at {ORIGIN}")
    try:
        return disk.sha256(Path(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _stops(fields: dict[str, np.ndarray], file: str) -> np.ndarray:
    """The step after the last one of each episode, (E,)."""
    for field in FLAGS:
        values = fields[field]
        if len(bad := np.flatnonzero((values != 0) & (values != 1))):
            raise wrong(file, f"must be 0 or 1, got {values[bad[0]]}", step=bad[0], field=field)
    stops = np.flatnonzero((fields["terminals"] != 0) | (fields["timeouts"] != 0)) + 1
    if not len(stops):
        raise wrong(file, "neither terminals nor timeouts marks the end of an episode; there is nothing to keep")
    return stops


def _gaps(fields: dict[str, np.ndarray], stops: np.ndarray) -> tuple[int, ...]:
    """Steps inside an episode whose next observation is not the observation of the next step: an end may be missing
    there. Told, not refused: what recorded a file may have left out steps on purpose."""
    found, start = [], 0
    for stop in stops.tolist():
        following, next_one = fields["next_observations"][start : stop - 1], fields["observations"][start + 1 : stop]
        with np.errstate(all="ignore"):  # numbers that are none are refused when their episode's turn comes
            apart = ~(np.abs(following - next_one) <= ROUNDING * (1 + np.abs(next_one))).all(axis=1)
        found += (start + np.flatnonzero(apart)).tolist()
        start = stop
    return tuple(found)


def _episodes(
    fields: dict[str, np.ndarray], stops: np.ndarray, spaces: Spaces, file: str, bar
) -> Iterator[Recorded]:
    start = 0
    for stop in stops.tolist():
        episode = {field: fields[field][start:stop] for field in NUMBERS}
        _validate(episode, start, spaces, file)
        observations = episode["observations"]
        after = episode["next_observations"][-1:].astype(observations.dtype)
        # where both flags are set the episode ended by itself: it would have, with time left or without
        yield Recorded(None, np.concatenate((observations, after)), episode["actions"].astype(np.float32),
                       episode["rewards"], bool(fields["terminals"][stop - 1]))
        bar.update(stop - start)
        start = stop


def _validate(episode: dict[str, np.ndarray], start: int, spaces: Spaces, file: str) -> None:
    """Numbers are finite, and actions in their box."""
    for field, values in episode.items():
        if not (finite := np.abs(values) <= LARGEST_NUMBER).all():
            raise wrong(file, "not finite", step=start + np.argwhere(~finite)[0, 0], field=field)
    actions, low, high = episode["actions"], spaces.action_low, spaces.action_high
    slack = BOUND_TOLERANCE * (high - low)
    if (outside := (actions < low - slack) | (actions > high + slack)).any():
        step, channel = np.argwhere(outside)[0]
        raise wrong(file, f"{actions[step, channel]} in channel {channel} is outside [{low[channel]}, {high[channel]}]",
                    step=start + step, field="actions")
