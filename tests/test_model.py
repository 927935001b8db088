"""The model reads an episode in order: nothing ahead, nothing padded, and chunk by chunk as well as in one piece.

Every dimension of a tensor is a different prime, the width heads times a prime.
"""

import pytest
import torch
from toys import PLAIN

from drl.config import ModelConfig
from drl.errors import UserError
from drl.kernels import available_backends
from drl.model import DecisionTransformer

B, O, A, HEADS, DIM, LAYERS = 3, 5, 7, 2, 11, 2  # noqa: E741
WIDTH = HEADS * DIM
MAX_TIMESTEPS = 211

# Between two orders of summation in float64, on |difference| / (1 + |expected|). Worst over 20 seeds: 7e-16 in
# actions, 1.6e-14 in the outgoing state (its largest entries are sums over 300 tokens), 2.5e-14 in gradients.
TOLERANCE = 1e-12


def config(**changes) -> ModelConfig:
    """Of the plain model, but for `changes`."""
    settings = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "max_timesteps": MAX_TIMESTEPS, "return_scale": 10.0}
    return ModelConfig(**PLAIN | settings | {"dropout": 0.0} | changes)


def lively_model(dtype=torch.float32, **changes) -> DecisionTransformer:
    """In eval mode, with weights so large that every token matters to the actions after it."""
    model = DecisionTransformer(config(**changes), O, A).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_steps(L: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {
        "returns_to_go": 10 * torch.randn(B, L, dtype=dtype),
        "observations": torch.randn(B, L, O, dtype=dtype),
        "actions": 2 * torch.rand(B, L, A, dtype=dtype) - 1,
        "timesteps": torch.arange(L).expand(B, L).clone(),
    }


def part(steps: dict[str, torch.Tensor], *bounds) -> dict[str, torch.Tensor]:
    return {name: x[:, slice(*bounds)] for name, x in steps.items()}


def assert_close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


MEMORIES = [{"half_lives": [0.25, 16.0]}, {"action_tokens": False}, {"half_lives": [1.0, 64.0], "action_tokens": False}]
MEMORY = pytest.mark.parametrize("memory", MEMORIES, ids=str)

# Order

ATTENTIONS = ["linear", "softmax"]


@pytest.mark.parametrize("spoil", ["timesteps", "returns_to_go", "observations", "actions", "all"])
@pytest.mark.parametrize("L", [13, 61])  # 39 tokens are one chunk, 183 are several
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nothing_after_an_observation_changes_its_action_or_an_earlier_one(attention, L, spoil):
    model, steps = lively_model(attention=attention), random_steps(L)
    before, _ = model(**steps)

    for t in (0, 3, 12, L - 1):
        future = {name: x.clone() for name, x in steps.items()}
        future["actions"][:, t] = 1e6  # action t comes after the observation that it answers
        for name in future if spoil == "all" else [spoil]:
            future[name][:, t + 1:] = MAX_TIMESTEPS if name == "timesteps" else 1e6
        after, _ = model(**future)
        assert_same(after[:, :t + 1], before[:, :t + 1])
        assert (after[:, t + 1:] != before[:, t + 1:]).any(-1).all(), "the change must matter to what follows"


@pytest.mark.parametrize("name", ["timesteps", "returns_to_go", "observations", "actions"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_everything_up_to_an_observation_changes_its_action(attention, name):
    model, steps = lively_model(torch.float64, attention=attention), random_steps(13, torch.float64)
    before, _ = model(**steps)

    for t in range(13):
        changed = {key: x.clone() for key, x in steps.items()}
        changed[name][:, t] += 1
        after, _ = model(**changed)
        heard_from = t + 1 if name == "actions" else t
        differs_BL = (after != before).any(-1)
        assert differs_BL[:, heard_from:].all() and not differs_BL[:, :heard_from].any()


@pytest.mark.parametrize("memory", [*MEMORIES[1:], {"action_tokens": False, "attention": "softmax"}], ids=str)
def test_without_action_tokens_an_action_hears_all_but_the_earlier_actions(memory):
    model, steps = lively_model(torch.float64, **memory), random_steps(13, torch.float64)
    before, _ = model(**steps)

    assert_same(model(**steps | {"actions": torch.full_like(steps["actions"], 1e6)})[0], before)
    for name in ("returns_to_go", "observations", "timesteps"):
        changed = {key: x.clone() for key, x in steps.items()}
        changed[name][:, 5] += 1
        differs_BL = (model(**changed)[0] != before).any(-1)
        assert differs_BL[:, 5:].all() and not differs_BL[:, :5].any()
    assert not any("embed_action" in key for key in model.state_dict())


@pytest.mark.parametrize("L", [13, 61])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_reaches_no_real_action_and_no_state(attention, L):
    model, steps = lively_model(attention=attention), random_steps(L)
    mask = torch.arange(L) < torch.tensor([[1], [4], [L]])
    before, state = model(**steps, mask=mask)

    for name, x in steps.items():
        x[~mask] = 10**6 if name == "timesteps" else 1e6
    after, other_state = model(**steps, mask=mask)

    assert_same(after[mask], before[mask])
    assert_same(other_state, state)


def test_padding_leaves_the_state_of_the_real_steps_alone():
    model, steps = lively_model(torch.float64), random_steps(13, torch.float64)
    mask = torch.arange(13).expand(B, 13) < 4

    expected, expected_state = model(**part(steps, 4))
    actual, state = model(**steps, mask=mask)

    assert_close(actual[:, :4], expected)
    assert_close(state, expected_state)


def test_a_mask_of_real_steps_changes_nothing():
    model, steps = lively_model(torch.float64), random_steps(13, torch.float64)
    assert_close(model(**steps, mask=torch.ones(B, 13, dtype=torch.bool)), model(**steps))


def test_padding_has_no_gradient():
    model, steps = lively_model(), random_steps(13)
    mask = torch.arange(13) < torch.tensor([[1], [4], [13]])
    steps["observations"].requires_grad_()

    predicted, _ = model(**steps, mask=mask)
    (predicted - steps["actions"])[mask].square().mean().backward()

    gradient = steps["observations"].grad
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any(-1).all()


# State passing


def loss_in_chunks(model, steps, size: int, cut: bool) -> tuple[torch.Tensor, tuple]:
    """Sum of squared errors of all steps, read `size` steps at a time; the gradient stops at chunks if `cut`."""
    L = steps["timesteps"].shape[1]
    loss, state = 0.0, model.initial_state(B)
    for start in range(0, L, size):
        chunk = part(steps, start, start + size)
        predicted, state = model(**chunk, state=state)
        loss = loss + (predicted - chunk["actions"]).square().sum()
        state = tuple(layer.detach() for layer in state) if cut else state
    return loss, state


def gradients(loss: torch.Tensor, model: DecisionTransformer) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))


@MEMORY
def test_what_fades_is_passed_on_too(memory):
    test_passing_the_state_gives_the_loss_and_the_gradients_of_one_long_forward(101, 20, **memory)


@pytest.mark.parametrize("size", [1, 7, 20, 50, 100])  # chunks of 3 to 300 tokens; most leave a shorter last one
@pytest.mark.parametrize("L", [23, 101])
def test_passing_the_state_gives_the_loss_and_the_gradients_of_one_long_forward(L, size, **memory):
    model, steps = lively_model(torch.float64, **memory), random_steps(L, torch.float64)
    expected, expected_state = loss_in_chunks(model, steps, L, cut=False)

    actual, state = loss_in_chunks(model, steps, size, cut=False)

    assert_close(actual, expected)
    assert_close(state, expected_state)
    assert_close(gradients(actual, model), gradients(expected, model))


def test_cutting_the_state_keeps_the_loss_and_changes_the_gradients():
    model, steps = lively_model(torch.float64), random_steps(101, torch.float64)
    expected, expected_state = loss_in_chunks(model, steps, 101, cut=False)

    actual, state = loss_in_chunks(model, steps, 20, cut=True)

    assert_close(actual, expected)
    assert_close(state, tuple(layer.detach() for layer in expected_state))
    whole, truncated = (torch.cat([x.flatten() for x in gradients(loss, model)]) for loss in (expected, actual))
    assert (truncated - whole).norm() > 0.01 * whole.norm()  # measured 0.06 to 0.14 over 20 seeds


def test_a_forward_leaves_the_state_it_was_given_as_it_was():
    model, steps = lively_model(), random_steps(13)
    _, state = model(**steps)
    kept = tuple(type(layer)(layer.kv.clone(), layer.z.clone()) for layer in state)

    model(**steps, state=state)

    assert_same(state, kept)


def test_no_state_is_the_initial_state():
    model, steps = lively_model(), random_steps(13)
    assert_same(model(**steps, state=model.initial_state(B)), model(**steps))


@pytest.mark.parametrize("backend", [name for name, reason in available_backends().items() if reason is None])
def test_every_backend_is_the_same_model(backend):
    dtype = torch.float32 if backend in ("triton", "cpu") else torch.float64
    model, steps = lively_model(dtype, backend="reference"), random_steps(61, dtype)
    other = DecisionTransformer(config(backend=backend), O, A).to(dtype).eval()
    other.load_state_dict(model.state_dict())
    tolerance = 2e-5 if backend in ("triton", "cpu") else TOLERANCE
    torch.testing.assert_close(other(**steps), model(**steps), rtol=tolerance, atol=tolerance)


# Stepping


@MEMORY
def test_stepping_is_the_forward_where_memory_fades(memory):
    test_stepping_is_the_forward("elu1", **memory)


@pytest.mark.parametrize("feature_map", ["elu1", "relu"])
def test_stepping_is_the_forward(feature_map, **memory):
    model, steps = lively_model(torch.float64, feature_map=feature_map, **memory), random_steps(61, torch.float64)
    expected, _ = model(**steps)

    state, previous, actions = model.initial_state(B), torch.full((B, A), 9.0, dtype=torch.float64), []
    for t in range(61):
        now = {name: x[:, t] for name, x in steps.items()}
        first = torch.full((B,), t == 0)
        action, state = model.step(
            previous, now["returns_to_go"], now["observations"], now["timesteps"], state, first
        )
        actions.append(action)
        previous = now["actions"]

    assert_close(torch.stack(actions, dim=1), expected)


def test_softmax_attention_cannot_step():
    model, steps = lively_model(attention="softmax"), {name: x[:, 0] for name, x in random_steps(1).items()}
    assert model.initial_state(B) == (None,) * LAYERS
    with pytest.raises(ValueError, match="softmax attention has no recurrent step; act by window"):
        model.step(steps["actions"], steps["returns_to_go"], steps["observations"], steps["timesteps"],
                   model.initial_state(B), torch.ones(B, dtype=torch.bool))


# Memory


@pytest.mark.parametrize("tokens", [3, 2])
def test_a_half_life_is_counted_in_environment_steps(tokens):
    model = DecisionTransformer(config(half_lives=[0.25, 16.0], action_tokens=tokens == 3), O, A)
    attention = model.blocks[1].attention
    torch.testing.assert_close(attention.decay ** (tokens * torch.tensor([0.25, 16.0])), torch.tensor([0.5, 0.5]))
    assert attention.fades == tuple(attention.decay.tolist()), "every engine has the same numbers, those of float32"


def test_the_decay_is_in_the_state_dict_only_where_memory_fades_and_no_optimizer_sees_it():
    fading, plain = (DecisionTransformer(config(half_lives=lives), O, A) for lives in ([1.0, 4.0], []))
    assert fading.state_dict().keys() - plain.state_dict().keys() == {
        f"blocks.{i}.attention.decay" for i in range(LAYERS)}
    assert len(list(fading.parameters())) == len(list(plain.parameters()))


def test_a_half_life_beyond_all_measure_is_the_papers_attention_bit_for_bit():
    plain, steps = lively_model(), random_steps(61)
    other = DecisionTransformer(config(half_lives=[1e9, 1e9]), O, A).eval()
    other.load_state_dict(plain.state_dict(), strict=False)
    assert_same(other(**steps), plain(**steps))


def test_an_early_step_is_forgotten_by_half_lives_and_remembered_without():
    steps = random_steps(41, torch.float64)
    changed = {key: x.clone() for key, x in steps.items()}
    changed["observations"][:, 0] += 1
    moved = []
    for lives in ([0.25, 0.25], [4.0, 4.0], []):
        model = lively_model(torch.float64, half_lives=lives)
        moved.append((model(**changed)[0] - model(**steps)[0])[:, -1].abs().max())
    assert moved[0] < 1e-12 < moved[1] < moved[2]


# Embeddings, heads, dropout, dtypes


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_timesteps_beyond_the_last_embedding_share_it(attention):
    model, steps = lively_model(attention=attention), random_steps(13)
    last, beyond, earlier = ({**steps, "timesteps": torch.full((B, 13), t)} for t in (
        MAX_TIMESTEPS - 1, 10**9, MAX_TIMESTEPS - 2
    ))

    assert model(**beyond)[0].isfinite().all()
    assert_same(model(**beyond), model(**last))
    assert (model(**earlier)[0] != model(**last)[0]).any(-1).all()


def test_actions_lie_between_minus_one_and_one_and_start_out_near_zero():
    steps = random_steps(13)
    fresh, lively = DecisionTransformer(config(), O, A).eval(), lively_model()
    assert fresh(**steps)[0].abs().max() < 0.5
    assert 0.05 < lively(**steps)[0].abs().max() <= 1


def test_the_return_scale_divides_the_return_to_go():
    ten, steps = lively_model(), random_steps(13)
    one = DecisionTransformer(config(return_scale=1.0), O, A).eval()
    one.load_state_dict(ten.state_dict())
    assert_same(one(**steps | {"returns_to_go": steps["returns_to_go"] / 10.0}), ten(**steps))


def test_both_attentions_have_the_same_parameters():
    def shapes(attention):
        model = DecisionTransformer(config(attention=attention), O, A)
        return {name: tuple(x.shape) for name, x in model.state_dict().items()}

    assert shapes("linear") == shapes("softmax")
    assert shapes("linear")["blocks.1.attention.qkv.weight"] == (3 * WIDTH, WIDTH)
    assert shapes("linear")["embed_timestep.weight"] == (MAX_TIMESTEPS, WIDTH)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dropout_acts_in_training_alone(attention):
    model, steps = lively_model(attention=attention, dropout=0.5), random_steps(13)
    silent = DecisionTransformer(config(attention=attention, dropout=0.0), O, A).eval()
    silent.load_state_dict(model.state_dict())

    assert_same(model(**steps), silent(**steps))
    assert_same(silent.train()(**steps), silent.eval()(**steps))

    model.train()
    assert (model(**steps)[0] != model(**steps)[0]).any()


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="model.heads must divide model.width, got heads=3, width=22"):
        config(heads=3)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_state_is_at_least_float32(dtype, expected):
    model, steps = lively_model(dtype), random_steps(13, dtype)

    predicted, state = model(**steps, state=model.initial_state(B))

    assert predicted.dtype == dtype and predicted.isfinite().all()
    for layers in (state, model.initial_state(B)):
        assert [(layer.kv.dtype, layer.z.dtype) for layer in layers] == [(expected, expected)] * LAYERS
        assert [layer.kv.shape for layer in layers] == [(B, HEADS, DIM, DIM)] * LAYERS


def test_a_step_in_bfloat16_keeps_a_float32_state():
    model = lively_model(torch.bfloat16)
    now = {name: x[:, 0] for name, x in random_steps(1, torch.bfloat16).items()}

    action, state = model.step(now["actions"], now["returns_to_go"], now["observations"], now["timesteps"],
                               model.initial_state(B), torch.zeros(B, dtype=torch.bool))

    assert action.dtype == torch.bfloat16
    assert all(layer.kv.dtype == layer.z.dtype == torch.float32 for layer in state)


def test_bfloat16_is_the_same_model_but_for_rounding():
    model, steps = lively_model(), random_steps(61)
    expected, _ = model(**steps)

    actual, _ = model.bfloat16()(**{name: x.bfloat16() if x.is_floating_point() else x for name, x in steps.items()})

    # 8 bits of mantissa through two blocks: measured 0.005 to 0.007 of the actions' own size over 20 seeds
    assert (actual.float() - expected).norm() < 0.02 * expected.norm()
