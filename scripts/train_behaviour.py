"""Train the behaviour policies that `drl data collect` rolls out, and pack the snapshots that the tiers need.

    python scripts/train_behaviour.py train --env Hopper-v5 --steps 400000 --seed 0 --out snapshots
    python scripts/train_behaviour.py pack snapshots

`train` runs soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905) with SBX and writes the actor every
--every steps. `pack` measures each snapshot by stochastic roll-outs, picks the tiers by score (docs/design.md,
section 6) and writes drl/behaviour/<env>.{safetensors,json}. A maintainers' verb: users get the packed files.
Needs `pip install sbx-rl` beside the package.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ACTOR_WIDTH = 128  # half of SAC's usual 256 keeps sixteen snapshots of three environments within a few MB
CRITIC_WIDTH = 256
RANDOM_STEPS = 10_000  # uniform actions before the first update
MEASURE_SEED = 50_000
EXPERT_SCORE, MEDIUM_SCORE, MEDIUM_RANGE = 90.0, 44.0, (35.0, 55.0)  # D4RL's hopper-medium has mean 44.3
REPLAY_SNAPSHOTS = 20
ENVIRONMENTS = 8  # collected side by side; one gradient step for each environment step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train", help="train SAC and write actor snapshots")
    verb.add_argument("--env", default="Hopper-v5", help="Gymnasium id (default: %(default)s)")
    verb.add_argument("--steps", type=int, default=400_000, help="environment steps (default: %(default)s)")
    verb.add_argument("--every", type=int, default=5_000, help="steps between snapshots (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--out", type=Path, required=True, help="folder of the snapshots")
    verb = verbs.add_parser("pack", help="measure snapshots, pick the tiers, write the package data")
    verb.add_argument("snapshots", type=Path, help="folder that `train` wrote")
    verb.add_argument("--episodes", type=int, default=64, help="stochastic episodes each (default: %(default)s)")
    verb.add_argument("--until", type=int, default=None, help="ignore snapshots after this step")
    arguments = parser.parse_args()
    if arguments.verb == "train":
        train(arguments.env, arguments.steps, arguments.every, arguments.seed, arguments.out)
    else:
        pack(arguments.snapshots, arguments.episodes, arguments.until)


def train(env_id: str, steps: int, every: int, seed: int, out: Path) -> None:
    from sbx import SAC
    from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Snapshots(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % every == 0:
                save_file(actor_weights(self.model), out / f"step-{self.num_timesteps:08d}.safetensors")
            return True

    if every % ENVIRONMENTS:
        raise SystemExit(f"--every must be a multiple of {ENVIRONMENTS}, got {every}")
    out.mkdir(parents=True, exist_ok=True)
    agent = SAC(
        "MlpPolicy",
        make_vec_env(env_id, ENVIRONMENTS, seed=seed, monitor_dir=str(out)),
        learning_starts=RANDOM_STEPS,
        train_freq=1,
        gradient_steps=ENVIRONMENTS,
        buffer_size=steps,
        policy_kwargs={"net_arch": {"pi": [ACTOR_WIDTH] * 2, "qf": [CRITIC_WIDTH] * 2}},
        seed=seed,
    )
    packages = ("sbx-rl", "stable-baselines3", "jax", "gymnasium", "mujoco", "numpy")
    card = {
        "environment": env_id,
        "algorithm": "SAC (SBX)",
        "steps": steps,
        "seed": seed,
        "random_steps": RANDOM_STEPS,
        "environments": ENVIRONMENTS,
        "actor": [ACTOR_WIDTH] * 2,
        "critic": [CRITIC_WIDTH] * 2,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    agent.learn(steps, callback=CallbackList([Snapshots(), ProgressBarCallback()]))


def actor_weights(agent) -> dict[str, np.ndarray]:
    """The actor as (in, out) matrices: two hidden ReLU layers, then the mean and the log standard deviation."""
    layers = agent.policy.actor_state.params["params"]
    names = {"Dense_0": "hidden_0", "Dense_1": "hidden_1", "Dense_2": "mean", "Dense_3": "log_std"}
    return {
        f"{ours}.{part}": np.ascontiguousarray(layers[theirs][key], dtype=np.float32)
        for theirs, ours in names.items()
        for key, part in (("kernel", "weight"), ("bias", "bias"))
    }


def pack(folder: Path, episodes: int, until: int | None) -> None:
    from tqdm import tqdm

    from drl import behaviour, scores

    card = json.loads((folder / "card.json").read_text())
    name = card["environment"].partition("-")[0].lower()
    reference = scores.reference(card["environment"])
    paths = [path for path in sorted(folder.glob("step-*.safetensors")) if until is None or step_of(path) <= until]
    measured = {}
    for path in tqdm(paths, desc="measuring", unit=" snapshot"):
        returns, lengths = measure(load_file(path), card["environment"], episodes)
        measured[path.stem] = {
            "step": step_of(path),
            "return_mean": round(float(returns.mean()), 2),
            "return_std": round(float(returns.std()), 2),
            "length_mean": round(float(lengths.mean()), 1),
            "normalized_score": round(float(scores.normalized_score(returns, reference).mean()), 2),
        }
    tiers = choose(measured)
    used = sorted({entry["snapshot"] for entries in tiers.values() for entry in entries} - {"random"})
    card |= {
        "measured": f"{episodes} stochastic episodes per snapshot, seeds {MEASURE_SEED} and up",
        "reference_source": scores.REFERENCE_SOURCE,
        "tiers": tiers,
        "snapshots": {snapshot: measured[snapshot] for snapshot in used},
        "learning_curve": [[m["step"], m["normalized_score"]] for m in measured.values()],
    }
    weights = {
        f"{snapshot}/{layer}": value
        for snapshot in used
        for layer, value in load_file(folder / f"{snapshot}.safetensors").items()
    }
    home = Path(behaviour.__file__).parent
    save_file(weights, home / f"{name}.safetensors")
    (home / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
    for snapshot in used:
        print(snapshot, measured[snapshot])
    print({tier: [entry["snapshot"] for entry in entries] for tier, entries in tiers.items()})


def choose(measured: dict[str, dict]) -> dict[str, list[dict]]:
    """Tiers by score: expert is the best snapshot; medium the one nearest to D4RL's hopper-medium of those that the
    agent passed before it first did better than medium.

    medium-replay: random steps, then snapshots evenly spaced up to medium, each for the steps it stands for.
    """
    expert = max(measured, key=lambda snapshot: measured[snapshot]["normalized_score"])
    if measured[expert]["normalized_score"] < EXPERT_SCORE:
        raise SystemExit(f"the best snapshot scores {measured[expert]['normalized_score']}, below {EXPERT_SCORE}")
    low, high = MEDIUM_RANGE
    beyond = next(m["step"] for m in measured.values() if m["normalized_score"] > high)
    inside = [s for s, m in measured.items() if m["step"] < beyond and low <= m["normalized_score"] <= high]
    if not inside:
        raise SystemExit(f"no snapshot on the way to step {beyond} scores within {MEDIUM_RANGE}")
    medium = min(inside, key=lambda snapshot: abs(measured[snapshot]["normalized_score"] - MEDIUM_SCORE))
    last = measured[medium]["step"]
    way = [s for s, m in measured.items() if RANDOM_STEPS < m["step"] <= last]
    stride = -(-len(way) // REPLAY_SNAPSHOTS)
    way = way[::-1][::stride][::-1]  # counted back from medium, which is the last of them
    steps = [RANDOM_STEPS, *(measured[snapshot]["step"] for snapshot in way)]
    replay = [{"snapshot": "random", "share": RANDOM_STEPS}]
    replay += [{"snapshot": s, "share": now - then} for s, then, now in zip(way, steps, steps[1:])]
    single = {"medium": [{"snapshot": medium, "share": 1}], "expert": [{"snapshot": expert, "share": 1}]}
    return single | {"medium-replay": replay, "medium-expert": single["medium"] + single["expert"]}


def measure(weights: dict[str, np.ndarray], env_id: str, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of `episodes` stochastic episodes, side by side."""
    from drl.behaviour.actor import Actor
    from drl.envs import make_envs

    policy, envs = Actor(weights), make_envs(env_id, episodes)
    generator = np.random.default_rng(MEASURE_SEED)
    rows = np.arange(episodes)
    observations = envs.reset(rows, list(MEASURE_SEED + rows))
    returns, lengths = np.zeros(episodes), np.zeros(episodes, int)
    while len(rows):
        actions = policy.act(observations, generator.standard_normal((len(rows), *envs.action_space.shape)))
        result = envs.step(rows, actions)  # the three environments of the tiers take actions in [-1, 1]
        returns[rows] += result.rewards
        lengths[rows] += 1
        going = ~(result.terminated | result.truncated)
        rows, observations = rows[going], result.observations[going]
    return returns, lengths


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


if __name__ == "__main__":
    main()
