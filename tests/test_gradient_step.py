"""Several seeds as rows of the same tensors: what each would have learned alone, but for the order of sums."""

import dataclasses

import pytest
import torch
from test_train import make_config, make_store

from drl import trainer as training
from drl.gradient_step import SideBySide
from drl.trainer import Trainer, update

SEEDS = (0, 1, 2)
CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32; the worst seen is 8e-6 of a sum over the past
CASES = {
    "windows": dict(sampling="windows"),
    "state passing": dict(sampling="state_passing"),
    "a critic": dict(value_weight=0.1),
    "a critic, capped": dict(value_weight=0.1, value_cap=True),
    "a critic by its slope": dict(value_weight=1.0, value_measure="slope"),
    "a critic by its value": dict(value_weight=1.0, value_measure="value"),
    "a critic, a memory that fades, two tokens, a cap": dict(
        value_weight=0.1, model=dict(half_lives=[0.5, 4.0], action_tokens=False, return_quantile=0.9)),
    "softmax": dict(attention="softmax", sampling="windows"),
    "no attention": dict(attention="none", sampling="windows"),
    "bfloat16": dict(precision="bfloat16", value_weight=0.1),
}


def trainers(model=None, **settings) -> list[Trainer]:
    """One for each seed, without dropout, of three groups of streams."""
    made = []
    for seed in SEEDS:
        config = make_config(seed=seed, **dict(stream_groups=3, updates=20) | settings)
        plain = dict(dropout=0.0, backend="chunked") | (model or {})
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **plain))
        made.append(Trainer(config, make_store()))
    return made


def advance(step, updates: int, start: int = 0) -> list:
    """Loss and norm of each update of a trainer, or of several: (updates, 2) or (updates, 2, S)."""
    groups = step.sampler.groups
    return torch.stack([torch.stack(step.descend((start + turn) % groups)) for turn in range(updates)])


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, as it is now."""
    made = trainer.checkpoint()
    return {name: value.clone() for name, value in (made.weights | made.training).items()}


@pytest.fixture(autouse=True)
def no_more_updates_than_a_checkpoint_expects(monkeypatch):
    monkeypatch.setattr(Trainer, "require_finite", lambda self: None)  # it counts updates, which tests make by hand


@pytest.mark.parametrize("case", CASES)
def test_seeds_side_by_side_learn_what_each_learns_alone(case):
    apart, together = trainers(**CASES[case]), trainers(**CASES[case])

    seen = advance(SideBySide(together), 9)  # after more, rounding may have grown
    expected = torch.stack([advance(trainer, 9) for trainer in apart], -1)

    # sums that are rounded to bfloat16 in another order differ in its last bit, and updates let that grow
    close = dict(rtol=2e-2, atol=1e-3) if case == "bfloat16" else CLOSE
    torch.testing.assert_close(seen, expected, **close)
    assert (expected[:, 0, 0] != expected[:, 0, 1]).all(), "the seeds are not different ones"
    if case != "bfloat16":
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(everything(one), everything(other), **CLOSE)


def test_a_row_is_a_trainer_that_goes_on_alone_and_joins_others_again():
    made, apart = trainers(value_weight=0.1), trainers(value_weight=0.1)
    advance(SideBySide(made), 6)
    advance(made[1], 6, start=6)
    advance(SideBySide([made[0], made[2]]), 6, start=6)
    advance(SideBySide(made), 3, start=12)

    for one, other in zip(made, apart, strict=True):
        advance(other, 15)
        torch.testing.assert_close(everything(one), everything(other), **CLOSE)


def test_what_is_loaded_into_a_row_is_seen_by_all(tmp_path):
    made, apart = trainers(value_weight=0.1), trainers(value_weight=0.1)
    for trainer in apart:
        advance(trainer, 6)
    whole = SideBySide(made)
    for one, other in zip(made, apart, strict=True):
        one.load(dataclasses.replace(other.checkpoint(), step=6))
    torch.testing.assert_close(advance(whole, 3), torch.stack([advance(one, 3) for one in apart], -1), **CLOSE)


def test_one_seed_whose_loss_is_not_finite_leaves_the_others_alone():
    made, apart = trainers(), trainers()
    whole = SideBySide(made)
    advance(whole, 3)
    with torch.no_grad():
        made[1].model.head.weight.fill_(torch.nan)
    before = [everything(trainer) for trainer in made]
    seen = advance(whole, 6, start=3)

    assert seen[:, 0, 1].isnan().all()
    expected = [advance(trainer, 9)[3:] for trainer in apart]
    for row in (0, 2):
        torch.testing.assert_close(seen[..., row], expected[row], **CLOSE)
    assert torch.equal(everything(made[1])["optimizer.0.exp_avg"], before[1]["optimizer.0.exp_avg"])


def test_dropout_is_another_for_each_seed():
    model = dict(dropout=0.5)
    first, *_ = made = trainers(model=model)
    for other in made[1:]:  # three times the same seed
        other.load(first.checkpoint())
    losses = advance(SideBySide(made), 1)[0, 0]
    assert len(set(losses.tolist())) == 3


class Uncaptured:
    """As drl.captured.Captured, without a GPU: counts for how many keys a graph would be captured."""

    made = []

    def __init__(self, device):
        self.keys = set()
        self.made.append(self)

    def __call__(self, key, function, generators):
        self.keys.add((key, len(generators)))
        return function()


def test_seeds_that_come_and_go_have_the_numbers_of_each_alone(monkeypatch):
    """As a GPU does it: what trains beside others in one call, and alone or beside others in the next."""
    monkeypatch.setattr(training, "Captured", Uncaptured)
    made, apart = trainers(value_weight=0.1), trainers(value_weight=0.1)
    for one in made:
        one.captured = Uncaptured(None)
    for rows, updates in [((0, 1), 6), ((2,), 6), ((0, 1, 2), 3), ((1, 2), 3), ((0,), 3), ((0, 1, 2), 2)]:
        for _ in range(updates):
            results = update([made[row] for row in rows])
        assert len(results) == len(rows) and all(value.shape == () for pair in results for value in pair)
        captured = made[rows[0]].captured
        assert {key for key, _ in captured.keys} >= {(group, len(rows)) for group in range(min(3, updates))}

    assert [one.step for one in made] == [14, 14, 14]
    for row, other in enumerate(apart):
        seen = advance(other, 14)
        torch.testing.assert_close(torch.stack(results[row]), seen[-1], **CLOSE)
        torch.testing.assert_close(everything(made[row]), everything(other), **CLOSE)
