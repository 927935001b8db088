"""An exported policy in stable-baselines3's evaluate_policy, on several environments side by side.

    pip install stable-baselines3
    drl export runs/hopper/medium-replay/seed-0 policy
    python docs/examples/stable_baselines3_evaluate.py policy --environments 4 --episodes 20

`policy.predict` follows stable-baselines3's convention for recurrent policies and could be passed as it is. But that
convention has no reward, and without rewards the return-to-go stays at its target, which no episode of the training
data did. So the environments remember the last rewards and an adapter of a few lines passes them on.
"""

import argparse

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnvWrapper

import drl
from drl import scores


class LastRewards(VecEnvWrapper):
    """Remembers what the last actions earned, in `rewards`, (B,)."""

    def reset(self):
        self.rewards = np.zeros(self.num_envs)
        return self.venv.reset()

    def step_wait(self):
        observations, self.rewards, dones, infos = self.venv.step_wait()
        return observations, self.rewards, dones, infos


class WithRewards:
    """A drl policy as evaluate_policy wants a model, with the rewards that its convention leaves out."""

    def __init__(self, policy: drl.RecurrentPolicy, environments: LastRewards):
        self.policy, self.environments = policy, environments

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return self.policy.predict(
            observation, state, episode_start, deterministic, reward=self.environments.rewards
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Score an exported policy with stable-baselines3.")
    parser.add_argument("policy", help="folder that drl export wrote")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--environments", type=int, default=4, help="side by side")
    parser.add_argument("--seed", type=int, default=10_000, help="of the environments")
    options = parser.parse_args()

    policy = drl.RecurrentPolicy.load(options.policy)
    name = policy.spaces.environment
    environments = LastRewards(make_vec_env(name, n_envs=options.environments, seed=options.seed))
    returns, lengths = evaluate_policy(
        WithRewards(policy, environments), environments, n_eval_episodes=options.episodes, return_episode_rewards=True
    )
    environments.close()
    print(f"{len(returns)} episodes: mean return {np.mean(returns):.1f} +- {np.std(returns):.1f}, mean length "
          f"{np.mean(lengths):.1f}")
    if reference := scores.reference(name):
        print(f"normalised score {scores.normalized_score(returns, reference).mean():.1f}")


if __name__ == "__main__":
    main()
