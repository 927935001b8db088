"""On a GPU: the graph that `act` replays is the step, row for row."""

import threading

import numpy as np
import pytest
import torch
from toys import PLAIN

from drl.benchmark_model import checkpoint
from drl.config import ModelConfig
from drl.policy import RecurrentPolicy, WindowPolicy

pytestmark = pytest.mark.cuda

B, STEPS = 5, 40


def observations() -> torch.Tensor:
    return torch.randn(STEPS, B, 11, device="cuda")


@pytest.mark.parametrize("model", [ModelConfig(), ModelConfig(**PLAIN)], ids=["the default", "plain"])
def test_acting_by_graph_is_stepping(model):
    stepped, acting = (RecurrentPolicy(checkpoint("linear", model), "cuda") for _ in range(2))
    acting.model.load_state_dict(stepped.model.state_dict())
    reward = torch.rand(B, device="cuda")
    state = stepped.initial_state(B, 3600.0)
    acting.reset(B, 3600.0)

    for observation in observations():
        expected, state = stepped.step(observation, reward, state)
        torch.testing.assert_close(acting.act(observation, reward), expected, rtol=1e-6, atol=1e-6)


def test_an_action_stays_what_it_was_when_the_next_one_is_taken():
    policy = RecurrentPolicy(checkpoint("linear"), "cuda")
    policy.reset(B, 3600.0)
    taken = [policy.act(observation) for observation in observations()[:8]]
    kept = [action.clone() for action in taken]
    policy.act(observations()[0])
    assert all(torch.equal(*pair) for pair in zip(taken, kept, strict=True))


def test_a_reset_begins_anew():
    policy = RecurrentPolicy(checkpoint("linear"), "cuda")
    seen = observations()

    def play():
        policy.reset(B, 3600.0)
        return torch.stack([policy.act(observation, 1.0) for observation in seen])

    assert torch.equal(play(), play())


def test_a_wrong_shape_is_refused_before_the_graph_runs():
    policy = RecurrentPolicy(checkpoint("linear"), "cuda")
    policy.reset(B, 3600.0)
    with pytest.raises(ValueError, match="observation must be"):
        policy.act(torch.zeros(B, 12, device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", [RecurrentPolicy, WindowPolicy])
def test_a_policy_of_the_second_gpu_acts_there_in_a_thread_of_its_own(kind):
    """A thread begins on the first GPU, wherever the one that began it was."""
    whole = checkpoint("linear")
    seen = np.random.default_rng(0).standard_normal((STEPS, B, 11))

    def play(policy) -> np.ndarray:
        policy.reset(B, 3600.0)
        return np.stack([policy.act(observation, 1.0) for observation in seen])

    with torch.cuda.device(1):
        policy = kind(whole, "cuda")
    acted = []
    thread = threading.Thread(target=lambda: acted.append(play(policy)))
    thread.start()
    thread.join()

    assert policy.device == "cuda:1"
    np.testing.assert_allclose(acted[0], play(kind(whole, "cpu", "torch")), rtol=1e-4, atol=1e-4)
