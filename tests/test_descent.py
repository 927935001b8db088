"""A step of AdamW in few launches is the step that torch's own clipping and AdamW would make."""

import math

import pytest
import torch
from torch import nn

from drl.config import TrainConfig
from drl.descent import Descent, schedule

STEPS = 6
SHAPES = [(3, 4), (), (5,), (2, 1, 3)]


def descent_of(weights, settings) -> Descent:
    """Neither compiled nor shared."""
    return Descent(weights, settings, wrap=lambda function: function, combine=lambda tensor: None)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Of a sum of errors; those of odd steps are a thousand times as large."""
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(shape, generator=generator) * 1000 ** (step % 2)).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("max_norm", [1e-2, 2.0, 1e6], ids=["always clipped", "at times", "never"])
@pytest.mark.parametrize("decay", ["cosine", "none"])
def test_a_step_is_that_of_clip_grad_norm_and_adamw_along_the_mean(max_norm, decay):
    settings = TrainConfig(updates=STEPS, warmup_updates=2, learning_rate=0.1, decay=decay, weight_decay=0.3,
                           max_grad_norm=max_norm)
    mine, theirs = parameters(), parameters()
    descent = descent_of(mine, settings)
    adamw = torch.optim.AdamW(theirs, weight_decay=0.3)
    for step in range(STEPS):
        count = 7.0 + step
        loss, norm = descent.step(gradients(step), torch.tensor(21.0), torch.tensor(count))

        for parameter, gradient in zip(theirs, gradients(step), strict=True):
            parameter.grad = gradient / count
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        adamw.param_groups[0]["lr"] = schedule(step, settings)
        adamw.step()

        assert loss.item() == pytest.approx(21 / count)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close([p.grad for p in mine], [p.grad for p in theirs], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_of_two_dtypes_meet_in_float32():
    settings = TrainConfig(updates=1, learning_rate=0.1, warmup_updates=0)
    mixed, exact = parameters(), parameters()
    one, count = torch.tensor(1.0), torch.tensor(2.0)
    half = [gradient.bfloat16() if i % 2 else gradient for i, gradient in enumerate(gradients(0))]

    result = descent_of(mixed, settings).step(half, one, count)

    assert result[1].dtype == torch.float32
    expected = descent_of(exact, settings).step([gradient.float() for gradient in half], one, count)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(mixed, exact, rtol=0, atol=0)


def test_a_step_that_goes_on_from_a_state_dict_is_the_same():
    settings = TrainConfig(updates=STEPS, warmup_updates=2, learning_rate=0.1)
    one, count = torch.tensor(1.0), torch.tensor(2.0)
    whole = parameters()
    descent = descent_of(whole, settings)
    for step in range(STEPS):
        if step == 3:
            saved = {name: value.clone() for name, value in descent.state_dict().items()}
            resumed = [nn.Parameter(parameter.detach().clone()) for parameter in whole]
        descent.step(gradients(step), one, count)

    again = descent_of(resumed, settings)
    again.load_state_dict(saved, done=3)
    for step in range(3, STEPS):
        again.step(gradients(step), one, count)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad):
    weights = parameters()
    spoilt = [gradient.fill_(bad) for gradient in gradients(0)]
    descent = descent_of(weights, TrainConfig(updates=1))
    _, norm = descent.step(spoilt, torch.tensor(1.0), torch.tensor(1.0))
    assert not norm.isfinite()
    assert not any(weight.isfinite().any() for weight in weights)


# the learning rate


def test_the_learning_rate_by_hand():
    settings = TrainConfig(updates=10, warmup_updates=4, learning_rate=8.0, decay="cosine")
    rates = [schedule(step, settings) for step in range(11)]
    assert rates[:4] == [2.0, 4.0, 6.0, 8.0]
    expected = [4 * (1 + math.cos(math.pi * done / 6)) for done in range(7)]
    assert rates[4:] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert rates[4] == 8.0 and rates[7] == pytest.approx(4.0) and rates[10] == 0.0


def test_without_decay_the_learning_rate_stays():
    settings = TrainConfig(updates=10, warmup_updates=2, learning_rate=8.0, decay="none")
    assert [schedule(step, settings) for step in range(5)] == [4.0, 8.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize("decay", ["cosine", "none"])
def test_without_warm_up_the_learning_rate_begins_at_its_peak(decay):
    settings = TrainConfig(updates=10, warmup_updates=0, learning_rate=8.0, decay=decay)
    assert schedule(0, settings) == 8.0
