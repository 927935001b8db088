"""An exported policy in a plain Gymnasium loop.

    drl export runs/hopper/medium-replay/seed-0 policy
    python docs/examples/gymnasium_loop.py policy --episodes 5
"""

import argparse

import gymnasium

import drl
from drl import scores


def play(policy: drl.RecurrentPolicy, environment: gymnasium.Env, seed: int) -> tuple[float, int]:
    """One episode; its return and its length in steps."""
    observation, _ = environment.reset(seed=seed)
    policy.reset(batch=1)
    reward, total, steps, over = 0.0, 0.0, 0, False
    while not over:
        (action,) = policy.act(observation[None], reward)
        observation, reward, terminated, truncated, _ = environment.step(action)
        total, steps, over = total + float(reward), steps + 1, terminated or truncated
    return total, steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Play episodes with an exported policy.")
    parser.add_argument("policy", help="folder that drl export wrote")
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=10_000, help="of the first reset; episode i takes seed + i")
    options = parser.parse_args()

    policy = drl.RecurrentPolicy.load(options.policy)
    environment = gymnasium.make(policy.spaces.environment)
    reference = scores.reference(policy.spaces.environment)
    returns = []
    for episode in range(options.episodes):
        total, steps = play(policy, environment, options.seed + episode)
        returns.append(total)
        print(f"episode {episode}: return {total:.1f}, {steps} steps")
    print(f"mean return {sum(returns) / len(returns):.1f}")
    if reference:
        print(f"normalised score {scores.normalized_score(returns, reference).mean():.1f}")


if __name__ == "__main__":
    main()
