"""Train the behaviour policies that `drl data collect` rolls out, and pack the snapshots that the tiers need.

    python scripts/train_behaviour.py train --env Hopper-v5 --steps 400000 --seed 0 --out snapshots
    python scripts/train_behaviour.py pack snapshots

`train` runs soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905) with SBX. Its folder gets:

    step-<n>.safetensors   the actor, every --every steps
    episodes.csv           end_step,return,length of each finished episode, as the agent trained
    replay.jsonl           a line per snapshot: mean and std of the observations in the replay buffer so far
    card.json              how it was trained
    state.zip, state.pkl   agent and replay buffer, from which the same command goes on where it stopped

`pack` measures each snapshot by stochastic roll-outs, picks the tiers by score (docs/design.md, section 6) and writes
drl/behaviour/<env>.{safetensors,json}. It packs whatever snapshots the folder has: a copy may be thinned.
A maintainers' tool: users get the packed files. `train` needs `pip install sbx-rl`, and does without this package.
"""

import argparse
import importlib.metadata
import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ACTOR_WIDTH = 128  # half of SAC's usual 256 keeps about twenty snapshots of three environments within a few MB
CRITIC_WIDTH = 256
RANDOM_STEPS = 10_000  # uniform actions before the first update
ENVIRONMENTS = 8  # collected side by side; one gradient step for each environment step
EVERY = f"a multiple of {ENVIRONMENTS} that divides --steps"
STATE_STEPS = 50_000  # between two states
MEASURE_SEED = 50_000
EXPERT_SCORE = {"Hopper": 90.0, "HalfCheetah": 70.0, "Walker2d": 85.0}  # at least
MEDIUM_SCORE = {"Hopper": 44.0, "HalfCheetah": 41.0, "Walker2d": 50.0}  # D4RL's means, walker2d's 62 drawn into range
MEDIUM_RANGE = (35.0, 55.0)
REPLAY_SNAPSHOTS, FEWEST_REPLAY_SNAPSHOTS = 20, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train", help="train SAC and write actor snapshots; go on if the folder has a state")
    verb.add_argument("--env", default="Hopper-v5", help="Gymnasium id (default: %(default)s)")
    verb.add_argument("--steps", type=int, default=400_000, help="environment steps in all (default: %(default)s)")
    verb.add_argument("--every", type=int, default=5_000, help=f"steps per snapshot, {EVERY} (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    verb.add_argument("--out", type=Path, required=True, help="folder of the snapshots")
    verb.add_argument("--piece-seconds", type=float, default=math.inf, help="stop after so many seconds, state saved")
    verb = verbs.add_parser("pack", help="measure snapshots, pick the tiers, write the package data")
    verb.add_argument("snapshots", type=Path, help="folder that `train` wrote")
    verb.add_argument("--episodes", type=int, default=64, help="stochastic episodes each (default: %(default)s)")
    verb.add_argument("--until", type=int, default=None, help="ignore snapshots after this step (default: none)")
    arguments = vars(parser.parse_args())
    {"train": train, "pack": pack}[arguments.pop("verb")](**arguments)


def train(env: str, steps: int, every: int, seed: int, out: Path, piece_seconds: float) -> None:
    """Train up to `steps`, or for `piece_seconds`; from the folder's state, if it has one."""
    deadline = time.monotonic() + piece_seconds
    from sbx import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import Logger
    from tqdm import tqdm

    class Recorder(BaseCallback):
        def _on_step(self) -> bool:
            ended = [info["episode"] for info in self.locals["infos"] if "episode" in info]
            if ended:
                with (out / "episodes.csv").open("a") as file:
                    file.writelines(f"{self.num_timesteps},{episode['r']},{episode['l']}\n" for episode in ended)
            if self.num_timesteps % every == 0:
                with (out / "replay.jsonl").open("a") as file:
                    file.write(json.dumps({"step": self.num_timesteps} | held(self.model.replay_buffer)) + "\n")
                save_file(actor_weights(self.model), out / f"step-{self.num_timesteps:08d}.safetensors")
            bar.update(ENVIRONMENTS)
            return True

    if every % ENVIRONMENTS or steps % every:
        raise SystemExit(f"--every must be {EVERY}, got {every}")
    out.mkdir(parents=True, exist_ok=True)
    envs = make_vec_env(env, ENVIRONMENTS, seed=seed)
    packages = ("sbx-rl", "stable-baselines3", "jax", "gymnasium", "mujoco", "numpy")
    card = {
        "environment": env,
        "algorithm": "SAC (SBX)",
        "steps": steps,
        "seed": seed,
        "random_steps": RANDOM_STEPS,
        "environments": ENVIRONMENTS,
        "actor": [ACTOR_WIDTH] * 2,
        "critic": [CRITIC_WIDTH] * 2,
        "resumed_at": [],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    if (out / "state.zip").exists():
        begun = json.loads((out / "card.json").read_text())
        if any(begun[key] != card[key] for key in ("environment", "steps", "seed")):
            raise SystemExit(f"{out} holds a run of another environment, seed or number of steps")
        agent = SAC.load(out / "state.zip", env=envs)
        agent.load_replay_buffer(out / "state.pkl")
        agent.replay_buffer.pos = agent.num_timesteps // ENVIRONMENTS  # the buffer may be the newer of the two
        agent.set_random_seed(seed + agent.num_timesteps)
        rewind(out, agent.num_timesteps)
        card = begun | {"resumed_at": [*begun["resumed_at"], agent.num_timesteps]}
    elif (out / "card.json").exists():
        raise SystemExit(f"{out} holds a run without a state to go on from; name another folder")
    else:
        agent = SAC(
            "MlpPolicy",
            envs,
            learning_starts=RANDOM_STEPS,
            train_freq=1,
            gradient_steps=ENVIRONMENTS,
            buffer_size=steps,
            policy_kwargs={"net_arch": {"pi": [ACTOR_WIDTH] * 2, "qf": [CRITIC_WIDTH] * 2}},
            seed=seed,
        )
    if agent.num_timesteps == steps:
        return print(f"{out} has all {steps} steps already")
    (out / "card.json").write_text(compact_json(card))
    agent.set_logger(Logger(None, []))
    with tqdm(total=steps, initial=agent.num_timesteps, desc=f"{env} seed {seed}", unit=" step") as bar:
        while agent.num_timesteps < steps and time.monotonic() < deadline:
            agent.learn(min(every, steps - agent.num_timesteps), callback=Recorder(), reset_num_timesteps=False)
            if agent.num_timesteps % STATE_STEPS < every:
                save_state(agent, out)
    save_state(agent, out)
    print(f"{agent.num_timesteps} of {steps} steps are done")


def save_state(agent, out: Path) -> None:
    """Write what `train` goes on from. The buffer comes first: it only grows, so a newer one serves an older agent."""
    agent.save_replay_buffer(out / "state.pkl.partial")
    os.replace(out / "state.pkl.partial", out / "state.pkl")
    agent.save(out / "state.zip.partial")
    os.replace(out / "state.zip.partial", out / "state.zip")


def rewind(out: Path, step: int) -> None:
    """Drop the records and snapshots of steps after `step`."""
    for path in (out / "episodes.csv", out / "replay.jsonl"):
        path.touch()
        lines = re.finditer(r"\D*?(\d+).*\n", path.read_text())  # 136,13.03,17 or {"step": 136, ...}
        path.write_text("".join(line[0] for line in lines if int(line[1]) <= step))
    for path in out.glob("step-*.safetensors"):
        if step_of(path) > step:
            path.unlink()


def held(buffer) -> dict:
    """Count, mean and standard deviation, in float64, of the observations in a replay buffer that never was full."""
    seen = buffer.observations[: buffer.pos].reshape(-1, buffer.observations.shape[-1])
    mean, std = seen.mean(0, dtype=np.float64), seen.std(0, dtype=np.float64)
    return {"count": len(seen), "state_mean": mean.tolist(), "state_std": std.tolist()}


def actor_weights(agent) -> dict[str, np.ndarray]:
    """The actor as (in, out) matrices: two hidden ReLU layers, then the mean and the log standard deviation."""
    layers = agent.policy.actor_state.params["params"]
    names = {"Dense_0": "hidden_0", "Dense_1": "hidden_1", "Dense_2": "mean", "Dense_3": "log_std"}
    return {
        f"{ours}.{part}": np.ascontiguousarray(layers[theirs][key], dtype=np.float32)
        for theirs, ours in names.items()
        for key, part in (("kernel", "weight"), ("bias", "bias"))
    }


def pack(snapshots: Path, episodes: int, until: int | None) -> None:
    """Measure the snapshots of a folder, choose the tiers, and write the package data of its environment."""
    from tqdm import tqdm

    from drl import behaviour, scores

    card = json.loads((snapshots / "card.json").read_text())
    task = card["environment"].partition("-")[0]
    paths = [path for path in sorted(snapshots.glob("step-*.safetensors")) if until is None or step_of(path) <= until]
    measured = {}
    for path in tqdm(paths, desc="measuring", unit=" snapshot"):
        measured[path.stem] = {"step": step_of(path)} | measure(load_file(path), card["environment"], episodes)
    tiers = choose(measured, task)
    used = sorted({entry["snapshot"] for entries in tiers.values() for entry in entries} - {"random"})
    card |= {
        "steps": step_of(paths[-1]),
        "measured": f"{episodes} stochastic episodes per snapshot, seeds {MEASURE_SEED} and up",
        "reference_source": scores.REFERENCE_SOURCE,
        "tiers": tiers,
        "replay_buffer": replay_buffer(snapshots, measured[tiers["medium"][0]["snapshot"]]["step"]),
        "snapshots": {"random": {"step": 0} | measure(None, card["environment"], episodes)}
        | {snapshot: measured[snapshot] for snapshot in used},
        "learning_curve": [[m["step"], m["normalized_score"]] for m in measured.values()],
    }
    layers = {snapshot: load_file(snapshots / f"{snapshot}.safetensors") for snapshot in used}
    weights = {f"{snapshot}/{name}": value for snapshot in used for name, value in layers[snapshot].items()}
    home = Path(behaviour.__file__).parent
    save_file(weights, home / f"{task.lower()}.safetensors")
    (home / f"{task.lower()}.json").write_text(compact_json(card))
    for snapshot in used:
        print(snapshot, measured[snapshot])
    print({tier: [entry["snapshot"] for entry in entries] for tier, entries in tiers.items()})


def choose(measured: dict[str, dict], task: str) -> dict[str, list[dict]]:
    """Tiers by score: expert is the best snapshot; medium the one nearest to D4RL's medium of those that the agent
    passed before it first did better than medium.

    medium-replay: random steps, then snapshots evenly spaced up to medium, each for the steps it stands for.
    """
    expert = max(measured, key=lambda snapshot: measured[snapshot]["normalized_score"])
    if measured[expert]["normalized_score"] < EXPERT_SCORE[task]:
        raise SystemExit(f"the best snapshot scores {measured[expert]['normalized_score']}, below {EXPERT_SCORE[task]}")
    low, high = MEDIUM_RANGE
    beyond = next(m["step"] for m in measured.values() if m["normalized_score"] > high)
    inside = [s for s, m in measured.items() if m["step"] < beyond and low <= m["normalized_score"] <= high]
    if not inside:
        raise SystemExit(f"no snapshot on the way to step {beyond} scores within {MEDIUM_RANGE}")
    medium = min(inside, key=lambda snapshot: abs(measured[snapshot]["normalized_score"] - MEDIUM_SCORE[task]))
    last = measured[medium]["step"]
    way = [s for s, m in measured.items() if RANDOM_STEPS < m["step"] <= last]
    stride = max(1, round(len(way) / REPLAY_SNAPSHOTS))
    way = way[::-1][::stride][::-1]  # counted back from medium, which is the last of them
    if len(way) < FEWEST_REPLAY_SNAPSHOTS:
        raise SystemExit(f"only {len(way)} snapshots up to medium at step {last}: train with a smaller --every")
    steps = [RANDOM_STEPS, *(measured[snapshot]["step"] for snapshot in way)]
    replay = [{"snapshot": "random", "share": RANDOM_STEPS}]
    replay += [{"snapshot": s, "share": now - then} for s, then, now in zip(way, steps, steps[1:])]
    single = {"medium": [{"snapshot": medium, "share": 1}], "expert": [{"snapshot": expert, "share": 1}]}
    return single | {"medium-replay": replay, "medium-expert": single["medium"] + single["expert"]}


def replay_buffer(folder: Path, step: int) -> dict:
    """What the run's own replay buffer held at a snapshot's step, from the records of `train`."""
    lines = (json.loads(line) for line in (folder / "replay.jsonl").read_text().splitlines())
    states = next(line for line in lines if line["step"] == step)
    ended, *columns = np.loadtxt(folder / "episodes.csv", delimiter=",", ndmin=2).T
    summary = {"steps": states["count"], "episodes": int(np.sum(ended <= step))}
    for name, column in zip(("return", "length"), columns):
        values = column[ended <= step]
        counts, edges = np.histogram(values, bins=20)
        summary |= {f"{name}_mean": round(float(values.mean()), 2), f"{name}_std": round(float(values.std()), 2)}
        summary[f"{name}_histogram"] = {"edges": edges.round(2).tolist(), "counts": counts.tolist()}
    return summary | {key: np.round(states[key], 6).tolist() for key in ("state_mean", "state_std")}


def compact_json(value: dict) -> str:
    """Indented JSON, each innermost list or object on one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"[\[{][^][{}]+[\]}]", lambda match: re.sub(r"\n *", " ", match[0]), text) + "\n"


def measure(weights: dict[str, np.ndarray] | None, env_id: str, episodes: int) -> dict[str, float]:
    """Returns and lengths of `episodes` stochastic episodes, side by side; without weights, of uniform actions."""
    from drl import scores
    from drl.behaviour.actor import Actor
    from drl.envs import make_envs

    envs = make_envs(env_id, episodes)
    generator = np.random.default_rng(MEASURE_SEED)
    rows = np.arange(episodes)
    observations = envs.reset(rows, list(MEASURE_SEED + rows))
    returns, lengths = np.zeros(episodes), np.zeros(episodes, int)
    while len(rows):  # the three environments of the tiers take actions in [-1, 1]
        shape = (len(rows), *envs.action_space.shape)
        if weights is None:
            actions = generator.uniform(-1, 1, shape)
        else:
            actions = Actor(weights).act(observations, generator.standard_normal(shape))
        result = envs.step(rows, actions)
        returns[rows] += result.rewards
        lengths[rows] += 1
        going = ~(result.terminated | result.truncated)
        rows, observations = rows[going], result.observations[going]
    return {
        "return_mean": round(float(returns.mean()), 2),
        "return_std": round(float(returns.std()), 2),
        "length_mean": round(float(lengths.mean()), 1),
        "normalized_score": round(float(scores.normalized_score(returns, scores.reference(env_id)).mean()), 2),
    }


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


if __name__ == "__main__":
    main()
