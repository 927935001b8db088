"""On a GPU: the graph that `act` replays is the step, row for row."""

import pytest
import torch
from toys import PLAIN

from drl.benchmark_model import checkpoint
from drl.config import ModelConfig
from drl.policy import RecurrentPolicy

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
