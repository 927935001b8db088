"""The critic that guides the policy: what it learns, whom its gradients reach, and that a run goes on exactly."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import Recorded, assert_same_run, killed_at, lines, make_config, make_store

from drl import checkpoint as checkpoints
from drl.checkpoint_files import TRAINING
from drl.config import TrainConfig
from drl.data.sampling import Batch, Steps
from drl.data.store import EpisodeStore, Spaces
from drl.errors import UserError
from drl.guidance import Critic, Guidance, Judge, goals, guided, values
from drl.policy import RecurrentPolicy
from drl.train import train, train_together
from drl.trainer import Trainer, update

B, L, O, A = 5, 7, 3, 4
SPACES = Spaces("Toy-v0", O, np.full(A, -1, np.float32), np.full(A, 1, np.float32))


def chunks(seed=0) -> tuple[torch.Tensor, ...]:
    """Rewards, values, mask and terminal of chunks of every length, some of which end an episode."""
    generator = torch.Generator().manual_seed(seed)
    length_B = torch.tensor([7, 7, 4, 3, 1])
    ends_B = torch.tensor([False, True, True, False, True])
    mask = torch.arange(L) < length_B[:, None]
    terminal = (torch.arange(L) == length_B[:, None] - 1) & ends_B[:, None]
    return *(torch.randn(B, L, generator=generator, dtype=torch.float64) for _ in range(2)), mask, terminal


@pytest.mark.parametrize("trace", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("discount", [0.0, 0.9, 0.99])
def test_goals_are_what_the_recursion_gives(discount, trace):
    rewards, value, mask, terminal = chunks()

    goal, known = goals(rewards, value, mask, terminal, discount, trace)

    for b in range(B):
        last = int(mask[b].sum()) - 1
        expected = rewards[b, last] if terminal[b, last] else value[b, last]
        assert known[b].tolist() == [t < last or t == last and bool(terminal[b, t]) for t in range(L)]
        torch.testing.assert_close(goal[b, last], expected)
        for t in reversed(range(last)):
            expected = rewards[b, t] + discount * ((1 - trace) * value[b, t + 1] + trace * expected)
            torch.testing.assert_close(goal[b, t], expected, rtol=1e-12, atol=1e-12)


def test_what_stands_in_the_padding_is_not_read():
    rewards, value, mask, terminal = chunks()
    goal, known = goals(rewards, value, mask, terminal, 0.9, 0.5)
    spoiled = [part.masked_fill(~mask, 1e30) for part in (rewards, value)]
    other, _ = goals(*spoiled, mask, terminal, 0.9, 0.5)
    torch.testing.assert_close(other[known], goal[known], rtol=0, atol=0)


def test_the_critics_are_two_networks_that_share_nothing():
    torch.manual_seed(0)
    critic = Critic(O, A)
    observations, actions = torch.randn(B, L, O), torch.rand(B, L, A) * 2 - 1

    both = values(list(critic.parameters()), observations, actions)

    assert both.shape == (2, B, L)
    for n in range(2):
        x = torch.cat([observations, actions], -1)
        for layer in range(3):
            x = x @ getattr(critic, f"weight{layer}")[n] + getattr(critic, f"bias{layer}")[n]
            if layer < 2:
                x = torch.relu((x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt())
        torch.testing.assert_close(both[n], x[..., 0], rtol=1e-5, atol=1e-5)
    assert (both[0] - both[1]).abs().min() > 0


def a_batch() -> tuple[Batch, torch.Tensor]:
    torch.manual_seed(1)
    _, _, mask, terminal = chunks()
    batch = Batch(
        returns_to_go=torch.randn(B, L).cumsum(1), observations=torch.randn(B, L, O), actions=torch.rand(B, L, A),
        timesteps=torch.zeros(B, L, dtype=torch.long), mask=mask, restart=torch.ones(B, dtype=torch.bool),
        terminal=terminal,
    )
    return batch, (torch.rand(B, L, A) - 0.5).requires_grad_()


def judge(weight: float, **changes) -> Judge:
    torch.manual_seed(2)
    noise = torch.zeros(B, L, A)
    parameters = [list(Critic(O, A).parameters()) for _ in range(2)]
    settings = {"size": torch.tensor(0.25), "scale": torch.tensor(2.0), "weight": weight, "measure": "value",
                "cap": False, "discount": 0.9, "trace": 0.5}
    return Judge(noise, *parameters, **settings)._replace(**changes)


def test_the_policy_is_pulled_up_the_critics_mean_in_proportion_to_the_weight():
    batch, predicted = a_batch()
    judging = judge(0.7)
    errors = (predicted - batch.actions).square().mean(-1).where(batch.mask, 0).sum()

    pulled, _, _, (size, value, count) = guided(predicted, errors, batch, judging)
    gradient, = torch.autograd.grad(pulled, predicted, retain_graph=True)

    worth = values(judging.critic, batch.observations, predicted).mean(0)
    assert size == value
    torch.testing.assert_close(value / count, worth[batch.mask].abs().mean())
    expected = errors - 0.7 * worth[batch.mask].sum() / 0.25
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, predicted)[0])


def test_measured_by_the_slope_the_pull_is_the_weight_whatever_the_critics_promise():
    batch, predicted = a_batch()
    judging = judge(0.7, measure="slope")
    worth = values(judging.critic, batch.observations, predicted).mean(0)[batch.mask]
    slope, = torch.autograd.grad(worth.sum(), predicted)
    size = slope[batch.mask].abs().mean()

    for promise in (1, 1000):  # the last layer makes of each value so many times as much
        *inner, weight, bias = judging.critic
        critic = *inner, weight * promise, bias * promise
        _, _, _, (found, value, count) = guided(predicted, predicted.sum() * 0, batch, judging._replace(critic=critic))
        torch.testing.assert_close(found / count, promise * size)
        torch.testing.assert_close(value / count, promise * worth.abs().mean())
        pulled, *_ = guided(predicted, predicted.sum() * 0, batch, judging._replace(critic=critic, size=promise * size))
        pull, = torch.autograd.grad(pulled, predicted)
        torch.testing.assert_close(pull[batch.mask].abs().mean(), torch.tensor(0.7))
        torch.testing.assert_close(pull, -0.7 * slope / size)


@pytest.mark.parametrize("promise", [1, 1000])
def test_measured_by_distance_what_imitates_best_lies_the_weight_away_whatever_the_critics_promise(promise):
    batch, predicted = a_batch()
    judging = judge(0.07, measure="distance")
    *inner, weight, bias = judging.critic
    judging = judging._replace(critic=[*inner, weight * promise, bias * promise])
    worth = values(judging.critic, batch.observations, predicted).mean(0)[batch.mask]
    slope, = torch.autograd.grad(worth.sum(), predicted)
    _, _, _, (size, value, count) = guided(predicted, predicted.sum() * 0, batch, judging)
    torch.testing.assert_close(size / count, slope[batch.mask].square().mean())
    torch.testing.assert_close(value / count, worth.abs().mean())

    # the data lie this far behind what is predicted: exactly there is nothing left to gain by moving
    step = 0.07 * slope / slope[batch.mask].square().mean().sqrt()
    torch.testing.assert_close(step[batch.mask].square().mean().sqrt(), torch.tensor(0.07))
    errors = (predicted - (predicted - step).detach()).square().mean(-1).where(batch.mask, 0).sum()
    pulled, *_ = guided(predicted, errors, batch, judging._replace(size=size / count))
    left, = torch.autograd.grad(pulled, predicted, retain_graph=True)
    assert left.abs().max() < 1e-5 * torch.autograd.grad(errors, predicted)[0].abs().max()


@pytest.mark.parametrize(("measure", "sized", "told"), [
    ("slope", torch.abs, lambda pull: pull.abs().mean(-1)),
    ("distance", torch.square, lambda pull: (pull * A / 2).square().mean(-1).sqrt()),  # how far actions move
])
def test_capped_no_state_is_pulled_harder_than_the_weight_says(measure, sized, told):
    batch, predicted = a_batch()
    judging = judge(0.7, measure=measure, cap=True)
    slope, = torch.autograd.grad(values(judging.critic, batch.observations, predicted).mean(0).sum(), predicted)
    size = sized(slope).mean(-1)

    pulled, *_ = guided(predicted, predicted.sum() * 0, batch, judging._replace(size=size[batch.mask].mean()))
    pull = told(torch.autograd.grad(pulled, predicted)[0])

    hard = (size > size[batch.mask].mean()) & batch.mask
    assert 0 < hard.sum() < batch.mask.sum()
    torch.testing.assert_close(pull[hard], torch.full((int(hard.sum()),), 0.7))
    assert (pull[batch.mask & ~hard] < 0.7).all()


def test_with_a_cap_no_state_is_pulled_harder_than_one_of_mean_value():
    batch, predicted = a_batch()
    judging, errors = judge(0.7, cap=True), predicted.square().sum()

    pulled, *_ = guided(predicted, errors, batch, judging)
    gradient, = torch.autograd.grad(errors - pulled, predicted)

    worth_BL = values(judging.critic, batch.observations, predicted).mean(0)
    assert set((worth_BL.abs() > 0.25)[batch.mask].tolist()) == {False, True}  # some lie above the mean, some below
    slope_BLA, = torch.autograd.grad(worth_BL.sum(), predicted)
    for b, l in batch.mask.nonzero().tolist():
        size = max(0.25, abs(worth_BL[b, l].item()))
        torch.testing.assert_close(gradient[b, l], 0.7 / size * slope_BLA[b, l])
    assert not gradient[~batch.mask].any()


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("measure", ["value", "slope", "distance"])
def test_before_the_measure_is_known_nothing_pulls(measure, cap):
    batch, predicted = a_batch()
    judging = judge(0.7, size=torch.tensor(0.0), measure=measure, cap=cap)
    pulled, *_ = guided(predicted, predicted.square().sum(), batch, judging)
    torch.testing.assert_close(torch.autograd.grad(pulled, predicted)[0], 2 * predicted.detach())


def test_a_batch_of_which_nothing_is_known_teaches_the_critics_nothing():
    batch, predicted = a_batch()
    batch = batch._replace(mask=torch.arange(L) < torch.ones(B, 1), terminal=torch.zeros(B, L, dtype=torch.bool))
    _, judged, count, _ = guided(predicted, predicted.sum() * 0, batch, judge(0.7))
    assert judged == 0 and 0 < count < 1e-5


def test_the_critics_learn_of_the_recorded_actions_alone_and_nothing_of_the_policys_pull():
    batch, predicted = a_batch()
    judging = judge(0.7)

    pulled, judged, count, _ = guided(predicted, predicted.sum() * 0, batch, judging)
    found = torch.autograd.grad(pulled, judging.critic)

    value = values(judging.slow, batch.observations, predicted).amin(0).detach()
    later = torch.cat([batch.returns_to_go[:, 1:], torch.zeros(B, 1)], 1).masked_fill(batch.terminal, 0)
    goal, known = goals(2 * (batch.returns_to_go - later), value, batch.mask, batch.terminal, 0.9, 0.5)
    wrong = (values(judging.critic, batch.observations, batch.actions) - goal).square()[:, known]
    torch.testing.assert_close(judged, wrong.sum().detach())
    assert count == wrong.numel()
    for one, other in zip(found, torch.autograd.grad(wrong.sum(), judging.critic), strict=True):
        torch.testing.assert_close(one, other)


def test_the_slow_critics_judge_actions_with_noise_that_stay_in_the_box():
    batch, predicted = a_batch()
    loud = judge(0.7, noise=torch.full((B, L, A), 100.0))
    tried = (predicted + 0.5).clamp(-1, 1)
    one = guided(predicted, predicted.sum() * 0, batch, loud)[1]
    other = guided(tried.detach(), predicted.sum() * 0, batch, judge(0.7))[1]
    torch.testing.assert_close(one, other)


# training


def paying_store() -> EpisodeStore:
    """Actions are noise about 0; each earns itself, so that 1 is the best one everywhere."""
    rng = np.random.default_rng(0)

    def episode(length):
        actions = rng.uniform(-0.6, 0.6, (length, 1)).astype(np.float32)
        end = np.arange(length) == length - 1
        return Recorded(rng.normal(size=(length + 1, 3)), actions, actions[:, 0].astype(float), end, ~end & False)

    spaces = Spaces("Pendulum-v1", 3, np.array([-1], np.float32), np.array([1], np.float32))
    return EpisodeStore.from_episodes([episode(20) for _ in range(50)], spaces, "synthetic/paying-v0")


@pytest.fixture(scope="module")
def paid(tmp_path_factory):
    """Runs on such episodes without and with a critic, by its weight."""
    folder, store = tmp_path_factory.mktemp("paid"), paying_store()
    for weight in (0.0, 1.0):
        config = make_config(updates=200, batch_size=16, value_weight=weight, warmup_updates=10, checkpoint_every=200,
                             discount=0.5)
        train(config, store, folder / f"{weight:g}")
    return folder


def mean_action(run) -> float:
    policy = RecurrentPolicy(checkpoints.load(run), engine="torch")
    state, actions = policy.initial_state(8, 0.0), []
    for _ in range(5):
        action, state = policy.step(np.random.default_rng(0).normal(size=(8, 3)), np.zeros(8), state)
        actions.append(action.mean())
    return float(np.mean(actions))


def test_a_guided_policy_earns_more_than_what_it_imitates(paid):
    assert abs(mean_action(paid / "0")) < 0.1
    assert mean_action(paid / "1") > 0.3


def test_the_value_of_a_policy_is_learned_in_the_environments_units(paid):
    last = lines(paid / "1")[-1]
    assert 0.3 < last["train/value"] < 1.5  # an action of 0.5 and its successors at half: about 1
    assert 0 <= last["train/value_loss"] < 0.1


def test_without_a_weight_there_is_no_critic(tmp_path):
    train(make_config(updates=3), make_store(), tmp_path / "run")
    assert not any("value" in tag for line in lines(tmp_path / "run") for tag in line)
    assert not any("guidance" in name for name in load_file(checkpoints.find(tmp_path / "run") / TRAINING))


@pytest.mark.parametrize(("attention", "sampling"), [
    ("linear", "state_passing"), ("softmax", "windows"), ("none", "windows"),
])
def test_a_guided_run_goes_on_as_if_it_had_not_been_killed(attention, sampling, tmp_path, monkeypatch):
    config, store = make_config(attention, sampling=sampling, value_weight=0.1), make_store()
    train(config, store, tmp_path / "whole")
    with killed_at(monkeypatch, 7):
        train(config, store, tmp_path / "killed")

    train(config, store, tmp_path / "killed", resume=True)

    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert any(name.startswith("guidance.slow.") for name in load_file(checkpoints.find(tmp_path / "whole") / TRAINING))


def test_several_guided_seeds_learn_what_each_alone_learns(tmp_path):
    configs = [make_config(seed=seed, value_weight=0.1) for seed in (0, 1)]
    folders = [tmp_path / f"together-{config.seed}" for config in configs]
    train_together(configs, make_store(), folders)
    for config, folder in zip(configs, folders, strict=True):
        train(config, make_store(), tmp_path / f"alone-{config.seed}")
        assert_same_run(folder, tmp_path / f"alone-{config.seed}")


@pytest.mark.parametrize("tau", [0.25, 1.0])
@pytest.mark.parametrize("seeds", [1, 2])
def test_the_slow_critics_take_over_their_share_of_what_the_critics_have_become(tau, seeds):
    trainers = [Trainer(make_config(seed=seed, value_weight=0.1, value_tau=tau), make_store()) for seed in range(seeds)]
    before = [[part.clone() for part in trainer.guidance.slow] for trainer in trainers]
    update(trainers)
    for trainer, old in zip(trainers, before, strict=True):
        for part, slow, now in zip(old, trainer.guidance.slow, trainer.guidance.critic, strict=True):
            torch.testing.assert_close(slow, (1 - tau) * part + tau * now, rtol=1e-6, atol=1e-7)
            assert tau == 1 or not torch.equal(slow, now)


@pytest.mark.parametrize("part", ["_critic", "_slow"])
def test_a_critic_that_overflows_stops_the_run_and_says_so(part):
    config = make_config(value_weight=0.1)
    trainer = Trainer(config, make_store(), Steps(make_store(), "cpu"))
    update([trainer])
    with torch.no_grad():
        getattr(trainer.guidance, part).weight1.fill_(3e38)
    update([trainer])
    with pytest.raises(UserError, match=r"^at update 2 the critic.s loss is (inf|nan) .*--train.discount"):
        trainer.require_finite()


@pytest.mark.parametrize("name", ["size", "critic.weight0", "slow.bias1", "optimizer.0.exp_avg"])
def test_a_checkpoint_without_a_part_of_the_critic_is_refused(name):
    store = make_store()
    trainer = Trainer(make_config(value_weight=0.1), store)
    past = trainer.checkpoint()
    del past.training[f"guidance.{name}"]
    with pytest.raises(UserError, match=f"guidance.{name} is missing"):
        trainer.load(past)


def test_returns_that_are_all_alike_are_scaled_all_the_same():
    store = make_store()
    for returns in (0.0, 5.0):
        alike = dataclasses.replace(store, returns_to_go=np.full_like(store.returns_to_go, returns))
        guidance = Guidance(make_config(value_weight=0.1).train, alike, "cpu", lambda function: function)
        assert 0 < guidance.scale.item() < np.inf


@pytest.mark.parametrize(("changes", "message"), [
    ({"value_weight": -1.0}, "train.value_weight must not be negative, got -1.0"),
    ({"discount": 1.0}, "train.discount must be below 1 and train.value_trace at most 1, got 1 and 0.9"),
    ({"discount": 0.5, "value_trace": 1.1},
     "train.discount must be below 1 and train.value_trace at most 1, got 0.5 and 1.1"),
    ({"value_tau": 0.0}, "train.value_tau must be in (0, 1], got 0"),
    ({"value_tau": 1.5}, "train.value_tau must be in (0, 1], got 1.5"),
    ({"discount": -0.1}, "train.discount must not be negative, got -0.1"),
    ({"value_weight": 0.5, "context": 1}, "a critic learns from one step to the next, which a train.context of 1 does "
     "not hold; add --train.value_weight 0, or a longer --train.context"),
])
def test_numbers_that_make_no_value_are_refused(changes, message):
    with pytest.raises(UserError) as caught:
        TrainConfig(**changes)
    assert str(caught.value) == message
