"""A step of AdamW in few launches is the step that torch's own clipping and AdamW would make."""

import math

import pytest
import torch
from torch import nn

from drl.config import TrainConfig
from drl.descent import Descent, schedule

STEPS = 20
SHAPES = [(3, 4), (), (5,), (2, 1, 3)]


def descent_of(weights, settings, working=None) -> Descent:
    """Neither compiled nor shared."""
    return Descent(weights, working or weights, settings, wrap=lambda function: function, combine=lambda tensor: None)


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Of a sum of errors; those of odd steps are a thousand times as large."""
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(shape, generator=generator) * 1000 ** (step % 2)).to(dtype) for shape in SHAPES]


def descend(descent: Descent, weights, gradients, errors=1.0, count=2.0):
    """A step of `descent`, which has its own order of `weights`."""
    place = {id(weight): gradient for weight, gradient in zip(weights, gradients, strict=True)}
    ordered = [place[id(leaf)] for leaf in descent.leaves]
    return descent.step(ordered, torch.tensor(errors), torch.tensor(count))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("max_norm", [1e-2, 2.0, 1e6], ids=["always clipped", "at times", "never"])
@pytest.mark.parametrize("decay", ["cosine", "none"])
def test_a_step_is_that_of_clip_grad_norm_and_adamw_along_the_mean(max_norm, decay, dtype, tolerance):
    settings = TrainConfig(updates=STEPS, warmup_updates=2, learning_rate=0.1, decay=decay, weight_decay=0.3,
                           max_grad_norm=max_norm)
    mine, theirs = parameters(dtype), parameters(dtype)
    descent = descent_of(mine, settings)
    adamw = torch.optim.AdamW(theirs, weight_decay=0.3)
    for step in range(STEPS):
        count = 7.0 + step
        loss, norm = descend(descent, mine, gradients(step, dtype), 21.0, count)

        for parameter, gradient in zip(theirs, gradients(step, dtype), strict=True):
            parameter.grad = gradient / count
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        adamw.param_groups[0]["lr"] = schedule(step, settings)
        adamw.step()

        assert loss.item() == pytest.approx(21 / count)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close([weight.grad for weight in mine], gradients(step, dtype), rtol=0, atol=0)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance / 10)
        state = descent.state_dict()
        for index, weight in enumerate(theirs):
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(state[f"{index}.{name}"], adamw.state[weight][name], rtol=tolerance,
                                           atol=tolerance * 1e-4)


def halved(weights) -> list[nn.Parameter]:
    """The first and the third have copies in bfloat16; the third is no multiple of what a GPU reads at once."""
    return [nn.Parameter(weight.detach().bfloat16()) if index % 2 == 0 else weight
            for index, weight in enumerate(weights)]


def test_gradients_of_two_dtypes_meet_in_float32_and_the_copies_are_the_new_weights():
    settings = TrainConfig(updates=STEPS, learning_rate=0.1, warmup_updates=0)
    mixed, exact = parameters(), parameters()
    working = halved(mixed)
    descent, other = descent_of(mixed, settings, working), descent_of(exact, settings)
    for step in range(STEPS):
        half = [gradient.to(leaf.dtype) for gradient, leaf in zip(gradients(step), working, strict=True)]
        result = descend(descent, working, half)
        expected = descend(other, exact, [gradient.float() for gradient in half])

        assert result[1].dtype == torch.float32
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(mixed, exact)
        torch.testing.assert_close(working, [w.to(leaf.dtype) for w, leaf in zip(mixed, working)], rtol=0, atol=0)
    assert [leaf.dtype for leaf in descent.leaves] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("copies", [lambda weights: weights, halved], ids=["float32", "with bfloat16"])
def test_a_step_that_goes_on_from_a_state_dict_is_the_same(copies):
    settings = TrainConfig(updates=STEPS, warmup_updates=2, learning_rate=0.1)
    whole = parameters()
    working = copies(whole)
    descent = descent_of(whole, settings, working)
    for step in range(STEPS):
        if step == 3:
            saved = {name: value.clone() for name, value in descent.state_dict().items()}
            weights = [weight.detach().clone() for weight in whole]
        descend(descent, working, gradients(step))

    resumed = parameters()
    again_working = copies(resumed)
    again = descent_of(resumed, settings, again_working)
    for weight, value in zip(resumed, weights, strict=True):
        weight.data.copy_(value)
    again.load_state_dict(saved, done=3)
    for step in range(3, STEPS):
        descend(again, again_working, gradients(step))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    torch.testing.assert_close(again_working, working, rtol=0, atol=0)


def test_it_goes_on_from_the_tensors_of_torchs_adamw():
    """Which is what checkpoints held, and hold: exp_avg and exp_avg_sq by the number of the parameter."""
    settings = TrainConfig(updates=STEPS, warmup_updates=0, decay="none", learning_rate=0.1, max_grad_norm=1e9)
    theirs = parameters()
    adamw = torch.optim.AdamW(theirs, lr=0.1, weight_decay=settings.weight_decay)
    for step in range(STEPS):
        if step == 7:
            mine = [nn.Parameter(weight.detach().clone()) for weight in theirs]
            descent = descent_of(mine, settings)
            saved = adamw.state_dict()["state"]
            descent.load_state_dict({f"{i}.{name}": x for i in saved for name, x in saved[i].items()}, done=7)
        if step >= 7:
            descend(descent, mine, gradients(step), count=1.0)
        for weight, gradient in zip(theirs, gradients(step), strict=True):
            weight.grad = gradient
        adamw.step()
    torch.testing.assert_close(mine, theirs)


def test_parameters_lie_end_to_end_and_those_of_bfloat16_begin_where_a_gpu_likes_it():
    weights = [nn.Parameter(torch.full(shape, float(i))) for i, shape in enumerate([(5,), (3, 4), (8, 3), (16,)])]
    working = [nn.Parameter(weight.detach().bfloat16()) if i != 3 else weight for i, weight in enumerate(weights)]
    descent_of(weights, TrainConfig(updates=1), working)
    for tensors in (weights, working[:3]):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert [weight.storage_offset() for weight in weights] == [24, 29, 0, 48]  # 24 + 5 + 12, then up to 8 again
    for i, (weight, leaf) in enumerate(zip(weights, working)):
        assert weight.eq(i).all() and leaf.eq(i).all()


SPOILT = {  # the gradients of a step, and its errors
    "a gradient is nan": (lambda given: [*given[:2], given[2].index_fill(0, torch.tensor(3), math.nan), given[3]], 1.0),
    "a gradient is infinite": (lambda given: [given[0].fill_(-math.inf), *given[1:]], 1.0),
    "the norm overflows": (lambda given: [given[0].fill_(3e38), *given[1:]], 1.0),
    "the error is nan": (lambda given: given, math.nan),
    "the error is infinite": (lambda given: given, math.inf),
}


@pytest.mark.parametrize("copies", [lambda weights: weights, halved], ids=["float32", "with bfloat16"])
@pytest.mark.parametrize(("spoil", "errors"), SPOILT.values(), ids=SPOILT)
def test_a_step_that_is_not_finite_is_not_made_nor_is_any_after_it(spoil, errors, copies):
    weights = parameters()
    working = copies(weights)
    descent = descent_of(weights, TrainConfig(updates=STEPS, learning_rate=0.1, warmup_updates=0), working)

    def given(step):
        return [gradient.to(leaf.dtype) for gradient, leaf in zip(gradients(step), working, strict=True)]

    for step in range(3):
        assert all(number.isfinite() for number in descend(descent, working, given(step)))
    kept = [x.clone() for x in (*weights, *working, *descent.state_dict().values())]

    first = descend(descent, working, spoil(given(3)), errors)
    later = [descend(descent, working, given(step)) for step in range(4, 7)]

    assert not torch.stack(first).isfinite().all() and descent.done == 3
    torch.testing.assert_close([first] * 3, later, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close([*weights, *working, *descent.state_dict().values()], kept, rtol=0, atol=0)


def test_the_gradients_that_are_not_finite_are_known_by_their_parameters():
    weights = parameters()
    working = halved(weights)
    descent = descent_of(weights, TrainConfig(updates=1), working)
    spoilt = [gradient.to(leaf.dtype) for gradient, leaf in zip(gradients(0), working, strict=True)]
    for index in (1, 3):  # of four, of which the first and the third come before
        spoilt[index].view(-1)[-1] = math.nan
    descend(descent, working, spoilt)
    assert descent.not_finite() == [1, 3]


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
