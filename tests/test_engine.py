"""The compiled step is the policy: for every instruction set of this machine, from Python and from C.

The oracle is the policy in float64 on torch. What both must do alike at the doors stands in test_policy.py.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_policy import make_checkpoint
from toys import OWN

import drl.engine
from drl import exported
from drl.engine import ENGINES, ActionError, Engine
from drl.errors import UserError
from drl.kernels import cpu, instruction_sets
from drl.model import make
from drl.policy import RecurrentPolicy

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"the compiled step {cpu.unavailable()}")

ROOT = Path(__file__).parents[1]
SETS = [] if cpu.unavailable() else instruction_sets()
FORMS = list(itertools.product(ENGINES, SETS))
STEPS, ROWS = 3000, 2
LONG = 10_000
MEMORIES = [  # of two heads
    {}, {"half_lives": [0.25, 16.0]}, {"action_tokens": False}, {"half_lives": [1.0, 64.0], "action_tokens": False},
    {"half_lives": [0.01, 1e9]}, OWN,
]
MEMORY = pytest.mark.parametrize("memory", MEMORIES, ids=str)

# On |difference| of actions, of the box's half width, over 3000 steps. Worst over 8 seeds: 2.6e-6 and 2.6e-2; asked
# of float32: 1e-4.
BOUND = {"cpu": 1e-5, "cpu-bfloat16": 5e-2}


def engine(checkpoint, kind="cpu", instruction_set=None) -> Engine:
    return Engine(checkpoint.config.model, checkpoint.spaces, checkpoint.acting(), kind, instruction_set)


def recording(checkpoint, steps: int, rows: int, seed=0):
    """Observations (steps, rows, O), rewards and episode starts (steps, rows)."""
    rng = np.random.default_rng(seed)
    observations = rng.normal(0.5, 2, (steps, rows, checkpoint.spaces.observation_dim))
    return observations, rng.normal(0.02, 0.3, (steps, rows)), rng.random((steps, rows)) < 1 / 700


def play(policy, recorded, target=30.0) -> np.ndarray:
    observations, rewards, starts = recorded
    state, actions = start(policy, observations.shape[1], target), []
    for step in range(len(observations)):
        action, state = policy.step(observations[step], rewards[step], state, starts[step])
        actions.append(action)
    return np.stack(actions)


def start(policy, rows: int, target=30.0):
    targets = np.full(rows, target, np.float32)
    return policy.start(targets) if isinstance(policy, Engine) else policy.initial_state(rows, targets)


def off(actions, expected, spaces) -> float:
    return float((np.abs(actions - expected) / ((spaces.action_high - spaces.action_low) / 2)).max())


@functools.cache
def full_size():
    """A model of the size that is published, what it lived through and what float64 does."""
    checkpoint, threads = make_checkpoint(width=128, heads=4, layers=3, max_timesteps=1000), torch.get_num_threads()
    recorded = recording(checkpoint, STEPS, ROWS)
    torch.set_num_threads(1)  # of products so small, two are slower
    expected = play(RecurrentPolicy(checkpoint, engine="torch").double(), recorded)
    torch.set_num_threads(threads)
    return checkpoint, recorded, expected


# The numbers


@pytest.mark.parametrize("kind, instruction_set", FORMS)
def test_it_is_the_float64_policy_over_3000_steps_and_past_the_last_timestep_embedding(kind, instruction_set):
    checkpoint, recorded, expected = full_size()
    assert expected.std(axis=0).min() > 0.05, "actions that hardly differ would prove nothing"

    actions = play(engine(checkpoint, kind, instruction_set), recorded)

    assert off(actions, expected, checkpoint.spaces) < BOUND[kind]


@pytest.mark.parametrize("kind, instruction_set", FORMS)
@pytest.mark.parametrize("sizes", [
    {"width": 22, "heads": 2, "feature_map": "relu"},
    {"width": 21, "heads": 1, "layers": 1},
    {"width": 96, "heads": 6},
    {"width": 130, "heads": 2, "max_timesteps": 1},
    {"width": 256, "heads": 2, "layers": 1},
], ids=str)
def test_sizes_that_fill_no_vector_are_padded(kind, instruction_set, sizes):
    checkpoint = make_checkpoint(**sizes)
    recorded = recording(checkpoint, 12, 5)
    expected = play(RecurrentPolicy(checkpoint, engine="torch").double(), recorded)

    actions = play(engine(checkpoint, kind, instruction_set), recorded)

    assert off(actions, expected, checkpoint.spaces) < BOUND[kind]


@pytest.mark.parametrize("kind, instruction_set", FORMS)
@MEMORY
def test_memory_fades_and_actions_are_left_out_as_in_float64(kind, instruction_set, memory):
    checkpoint = make_checkpoint(width=74, **memory)
    recorded = recording(checkpoint, 40, 5)
    recorded[2][17, 2] = True
    expected = play(RecurrentPolicy(checkpoint, engine="torch").double(), recorded)

    actions = play(engine(checkpoint, kind, instruction_set), recorded)

    assert off(actions, expected, checkpoint.spaces) < BOUND[kind]


@MEMORY
def test_after_10000_steps_it_still_is_the_episode_read_at_once(memory):
    checkpoint = make_checkpoint(**memory)
    spaces, normaliser = checkpoint.spaces, checkpoint.normaliser
    observations, rewards, _ = recording(checkpoint, LONG, 1)
    rewards = np.round(64 * rewards) / 64  # their sums are exact in float32
    actions = play(engine(checkpoint), (observations, rewards, np.zeros((LONG, 1), bool)))[:, 0]

    model = make(checkpoint.config.model, spaces.observation_dim, len(spaces.action_low)).double()
    model.load_state_dict(checkpoint.weights)
    low, high = spaces.action_low.astype(float), spaces.action_high.astype(float)
    steps = (30.0 - np.cumsum(np.r_[0, rewards[1:, 0]]), (observations[:, 0] - normaliser.mean) / normaliser.std,
             (2 * actions - high - low) / (high - low), np.arange(LONG))
    with torch.no_grad():
        read = model(*(torch.as_tensor(part)[None] for part in steps))[0][0].numpy()
    assert off(actions, read * (high - low) / 2 + (high + low) / 2, spaces) < BOUND["cpu"]


@pytest.mark.parametrize("memory", MEMORIES[1:3], ids=str)
def test_what_an_engine_must_not_overlook_changes_what_it_does(memory):
    """The same weights without it act otherwise."""
    checkpoint = make_checkpoint(**memory)
    weights = {name: value for name, value in checkpoint.weights.items() if not name.endswith("decay")}
    if not checkpoint.config.model.action_tokens:
        weights |= {name: value for name, value in make_checkpoint().weights.items() if "embed_action" in name}
    recorded = recording(checkpoint, 12, 1)
    actions = play(engine(dataclasses.replace(checkpoint, weights=weights)), recorded)
    assert off(actions, play(engine(checkpoint), recorded), checkpoint.spaces) > 0.01


@pytest.mark.parametrize("kind, instruction_set", FORMS)
def test_without_a_feature_map_it_agrees_wherever_the_denominator_is_not_near_zero(kind, instruction_set):
    checkpoint = make_checkpoint(width=96, heads=6, feature_map="identity", layers=1)
    recorded = recording(checkpoint, 12, 5)
    expected = play(RecurrentPolicy(checkpoint, engine="torch").double(), recorded)

    actions = play(engine(checkpoint, kind, instruction_set), recorded)

    assert np.median(abs(actions - expected)) < BOUND[kind]


@pytest.mark.parametrize("kind, instruction_set", FORMS)
def test_a_row_has_the_same_bits_in_any_company_and_on_any_number_of_threads(kind, instruction_set):
    checkpoint = make_checkpoint(width=64, heads=2)
    compiled, rows = engine(checkpoint, kind, instruction_set), 133
    recorded = recording(checkpoint, 3, rows)
    together = play(compiled, recorded)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    shared = play(compiled, recorded)
    torch.set_num_threads(threads)

    np.testing.assert_array_equal(shared, together)
    for some in ([0], [132], [5, 4], range(16), range(1, 18), range(40, 75)):
        alone = play(compiled, tuple(part[:, list(some)] for part in recorded))
        np.testing.assert_array_equal(alone, together[:, list(some)])


# In place


def test_in_place_it_does_what_the_pure_step_does_and_leaves_other_rows_alone():
    checkpoint = make_checkpoint(width=64, heads=2)
    policy, rng = RecurrentPolicy(checkpoint, engine="cpu"), np.random.default_rng(0)
    act, states = policy.in_place(9, 30.0), [policy.initial_state(1, 30.0) for _ in range(9)]
    for count in (9, 1, 4, 0, 7, 9):
        rows = rng.permutation(9)[:count]
        observations, rewards = rng.normal(size=(count, 5)), rng.normal(size=count)
        expected = []
        for row, observation, reward in zip(rows, observations, rewards, strict=True):
            action, states[row] = policy.step(observation[None], reward, states[row])
            expected.append(action[0])

        actions = act(observations, rewards, rows)

        np.testing.assert_array_equal(actions, np.reshape(expected, (count, 7)))
    for row, state in enumerate(states):
        np.testing.assert_array_equal(act._state.array[row], state.array[0])


def in_turn(act, rng) -> np.ndarray:
    return np.stack([act(rng.normal(size=(len(act), 5)), 0.1, np.arange(len(act))) for _ in range(20)])


@pytest.mark.parametrize("rows", [2, 17, 100])
def test_callers_at_the_same_time_with_threads_to_share_get_the_bits_of_one_thread_alone(rows):
    policy = RecurrentPolicy(make_checkpoint(width=64, heads=2), engine="cpu")
    expected = [in_turn(policy.in_place(rows, 30.0, threads=1), np.random.default_rng(seed)) for seed in range(4)]
    found = [None] * 4

    def work(seed):
        found[seed] = in_turn(policy.in_place(rows, 30.0, threads=seed + 2), np.random.default_rng(seed))

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_acts_as_its_parent_whose_threads_it_does_not_have():
    policy = RecurrentPolicy(make_checkpoint(width=64, heads=2), engine="cpu")
    act = policy.in_place(100, 30.0, threads=2)
    expected = in_turn(policy.in_place(100, 30.0, threads=1), np.random.default_rng(0))
    in_turn(policy.in_place(100, 30.0, threads=2), np.random.default_rng(1))

    def child():
        sys.exit(not np.array_equal(in_turn(act, np.random.default_rng(0)), expected))

    forked = multiprocessing.get_context("fork").Process(target=child)
    forked.start()
    forked.join(60)
    if forked.is_alive():
        forked.kill()
    assert forked.exitcode == 0, "None: it waits for threads that are not there"


@pytest.mark.parametrize("rows, message", [([0, 3], "rows must be of 0 to 2"), ([-1], "rows must be of 0 to 2"),
                                           ([1, 1], "rows must be distinct"), ([[0]], "rows must be of 0 to 2")])
def test_rows_that_are_not_there_or_twice_are_refused(rows, message):
    act = RecurrentPolicy(make_checkpoint(), engine="cpu").in_place(3)
    with pytest.raises(ValueError, match=message):
        act(np.zeros((len(rows), 5)), 0.0, np.array(rows))


def test_memory_stays_as_it_is_over_a_long_episode():
    policy = RecurrentPolicy(make_checkpoint(width=64, heads=2), engine="cpu")
    state, observation = policy.initial_state(1), np.ones((1, 5), np.float32)

    def steps(count):
        nonlocal state
        for _ in range(count):
            _, state = policy.step(observation, 0.1, state)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = steps(1000)
    assert steps(20_000) - before < 256, "KiB: 20,000 states of 17 KiB would be 340 MiB"


def test_acting_takes_whatever_step_takes_and_gives_the_same_bits_with_and_without_the_short_way(monkeypatch):
    plain = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    mirrored = plain[:, ::-1].copy()[:, ::-1]
    forms = (plain, plain.astype(np.float64), np.asfortranarray(plain), np.repeat(plain, 2, 0)[::2], mirrored,
             plain.tolist(), torch.tensor(plain), plain.astype(">f4"))
    rewards = (0.5, np.float32(0.5), 0.5 * np.ones(3), torch.tensor(0.5), [0.5] * 3)
    expected = {}
    for short in (True, False):
        if not short:
            monkeypatch.setattr(cpu.CompiledPolicy, "caller", lambda self, *args, **kwargs: None)
        for form, reward in itertools.product(range(len(forms)), range(len(rewards))):
            policy = RecurrentPolicy(make_checkpoint(), engine="cpu")
            actions = [np.asarray(policy.act(forms[form], rewards[reward])) for _ in range(2)]
            np.testing.assert_array_equal(actions, expected.setdefault("first", actions))
    assert (expected["first"][0] != expected["first"][1]).any(), "the second step was the first again"


def test_what_acting_gives_away_is_the_callers_own():
    policy = RecurrentPolicy(make_checkpoint(), engine="cpu")
    first = policy.act(np.ones((3, 5)))
    kept = first.copy()
    policy.act(np.zeros((3, 5)))
    np.testing.assert_array_equal(first, kept)


def test_no_rows_are_no_error():
    policy = RecurrentPolicy(make_checkpoint(), engine="cpu")
    action, state = policy.step(np.zeros((0, 5)), np.zeros(0), policy.initial_state(0))
    assert action.shape == (0, 7) and len(state) == 0


# Faults


@pytest.mark.parametrize("kind", ["torch", *ENGINES])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_observation_that_is_not_finite_is_refused_by_row_and_channel_and_the_state_is_kept(kind, value):
    policy = RecurrentPolicy(make_checkpoint(), engine=kind)
    observation = np.ones((3, 5))
    _, state = policy.step(observation, 0.0, policy.initial_state(3))
    observation[1, 3] = value
    kept = state.tensors()

    with pytest.raises(ValueError, match=re.escape(f"observation of row 1 is not finite: channel 3 is {value}")):
        policy.step(observation, 0.0, state)
    policy.reset(3)
    with pytest.raises(ValueError, match="observation of row 1 is not finite"):
        policy.act(observation)

    torch.testing.assert_close(state.tensors(), kept, rtol=0, atol=0)
    np.testing.assert_array_equal(policy.act(np.ones((3, 5))), RecurrentPolicy(
        make_checkpoint(), engine=kind).act(np.ones((3, 5))), err_msg="a refused call must not have moved the state")


@pytest.mark.parametrize("kind", ["torch", *ENGINES])
def test_an_action_that_is_not_finite_is_never_given_and_the_state_is_kept(kind):
    policy = RecurrentPolicy(make_checkpoint(), engine=kind)
    observation = np.ones((20, 5))
    _, state = policy.step(observation, 0.0, policy.initial_state(20))
    kept = state.tensors()
    observation[17] = 3e38  # over a standard deviation below 1 it overflows

    for call in (policy.step, lambda x, reward, state: policy.predict(x, state, reward=reward)):
        with pytest.raises(ActionError) as caught:
            call(observation, np.zeros(20), state)
        assert caught.value.row == 17
        assert str(caught.value) == ("action of row 17 is not finite although its observation and reward are: a number "
                                     "overflowed; begin the episode anew")
    torch.testing.assert_close(state.tensors(), kept, rtol=0, atol=0)
    policy.reset(20)
    for form in (observation, observation.tolist(), torch.tensor(observation)):
        with pytest.raises(ActionError, match="action of row 17"):
            policy.act(form)
        policy.reset(20)
    if kind != "torch":
        with pytest.raises(ActionError, match="action of row 2 is"):
            policy.in_place(20)(observation[[3, 4, 17]], 0.0, np.array([3, 4, 17]))


def test_where_the_short_way_was_not_built_an_action_that_is_not_finite_is_not_given_either(monkeypatch):
    monkeypatch.setattr(cpu.CompiledPolicy, "caller", lambda self, *args, **kwargs: None)
    with pytest.raises(ActionError, match="action of row 0"):
        RecurrentPolicy(make_checkpoint(), engine="cpu").act(np.full((1, 5), 3e38))


@pytest.mark.parametrize("kind", ["torch", *ENGINES])
def test_a_target_that_is_not_finite_is_refused(kind):
    policy = RecurrentPolicy(make_checkpoint(), engine=kind)
    with pytest.raises(ValueError, match="target_return of row 1 is not finite: inf"):
        policy.initial_state(3, [1.0, np.inf, 1.0])


@pytest.mark.parametrize("kind", ["torch", *ENGINES])
def test_a_reward_that_is_not_finite_is_refused_unless_an_episode_begins(kind):
    policy = RecurrentPolicy(make_checkpoint(), engine=kind)
    reward = np.array([0, np.nan, 0])
    _, state = policy.step(np.ones((3, 5)), reward, policy.initial_state(3))

    with pytest.raises(ValueError, match="reward of row 1 is not finite: nan"):
        policy.step(np.ones((3, 5)), reward, state)
    action, _ = policy.step(np.ones((3, 5)), reward, state, [False, True, False])
    assert np.isfinite(action).all()


@pytest.mark.parametrize("kind", ENGINES)
def test_any_layout_and_float_of_the_input_gives_the_same_bits(kind):
    policy, rng = RecurrentPolicy(make_checkpoint(), engine=kind), np.random.default_rng(0)
    plain = rng.normal(size=(4, 5)).astype(np.float32)
    frozen = plain.copy()
    frozen.flags.writeable = False
    expected, _ = policy.step(plain, np.zeros(4), policy.initial_state(4))
    for form in (plain.astype(np.float64), np.asfortranarray(plain), np.repeat(plain, 2, 0)[::2], frozen,
                 plain[::-1].copy()[::-1], plain.tolist(), torch.tensor(plain), torch.tensor(plain.T.tolist()).T):
        action, _ = policy.step(form, 0.0, policy.initial_state(4))
        np.testing.assert_array_equal(action, expected)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("shape", [(3,), (1, 3), (4,), (3, 1)])
def test_a_reward_of_the_wrong_shape_is_refused(kind, shape):
    policy = RecurrentPolicy(make_checkpoint(), engine=kind)
    if shape == (3,):
        policy.step(np.zeros((3, 5)), np.zeros(shape), policy.initial_state(3))
        return
    with pytest.raises(ValueError, match=re.escape(f"reward must be one number or (B,) = (3,), got {shape}")):
        policy.step(np.zeros((3, 5)), np.zeros(shape), policy.initial_state(3))


@pytest.mark.parametrize("other", [{"seed": 1}, {"width": 44}, {"heads": 1}, {"layers": 1}], ids=str)
def test_the_state_of_another_model_is_refused(other):
    checkpoint, stranger = make_checkpoint(), make_checkpoint(**other)
    policy, observation = RecurrentPolicy(checkpoint, engine="cpu"), np.ones((1, 5))
    packed = RecurrentPolicy(stranger, engine="cpu").initial_state(1)
    with pytest.raises(ValueError, match="the state belongs to another model"):
        policy.step(observation, 0.0, packed)
    if "seed" not in other:  # tensors carry no mark: of the same shape, they are taken
        with pytest.raises(ValueError, match="the state belongs to another model"):
            policy.step(observation, 0.0, packed.unpacked())


def test_a_state_passes_between_engines_and_instruction_sets():
    checkpoint = make_checkpoint(width=40, heads=2)
    recorded = recording(checkpoint, 40, 3)
    expected = play(RecurrentPolicy(checkpoint, engine="torch").double(), recorded)
    engines = [engine(checkpoint, "cpu", name) for name in SETS] + [RecurrentPolicy(checkpoint, engine="torch")]
    state, actions = start(engines[0], 3), []
    for step, policy in enumerate(itertools.islice(itertools.cycle(engines), 40)):
        if isinstance(policy, RecurrentPolicy):
            state = state.to("cpu")
        action, state = policy.step(*(part[step] for part in recorded[:2]), state, recorded[2][step])
        actions.append(action)

    assert off(np.stack(actions), expected, checkpoint.spaces) < BOUND["cpu"]


def test_two_threads_may_step_from_one_state_and_both_get_what_one_would():
    policy = RecurrentPolicy(make_checkpoint(width=64, heads=2), engine="cpu")
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(2, 50, 200, 5))
    state = policy.initial_state(200)

    def run(part, results):
        after = state
        for observation in observations[part]:
            results[part], after = policy.step(observation, 0.1, after)

    expected, found = {}, {}
    for part in (0, 1):
        run(part, expected)
    threads = [threading.Thread(target=run, args=(part, found)) for part in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for part in (0, 1):
        np.testing.assert_array_equal(found[part], expected[part])


@pytest.mark.parametrize("kind", ["torch", *ENGINES])
def test_of_two_threads_that_act_on_one_remembered_state_one_is_refused(kind):
    policy = RecurrentPolicy(make_checkpoint(width=64, heads=2), engine=kind)
    policy.reset(batch=500)
    observation, refused, done = np.ones((500, 5)), [], []

    def run():
        while not refused and len(done) < 2000:
            try:
                policy.act(observation)
                done.append(1)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert refused and "two threads act on one remembered state" in refused[0]
    state = policy._remembered if kind == "torch" else policy._remembered._state
    assert set(state.timestep.tolist()) == {len(done)}, "a refused call must not move the state"


@pytest.mark.parametrize("kind", ENGINES)
def test_an_unknown_instruction_set_names_those_of_the_machine(kind):
    with pytest.raises(UserError, match=f"this machine has no instruction set mmx; it has {SETS[0]}"):
        engine(make_checkpoint(), kind, "mmx")


def test_weights_that_are_missing_of_another_size_or_not_finite_are_named():
    for change, message in ((lambda weights: weights.pop("blocks.1.mlp.2.bias"), "lack model.blocks.1.mlp.2.bias"),
                            (lambda weights: weights.update({"head.bias": torch.zeros(8)}),
                             "model.head.bias has 8 numbers, expected 7"),
                            (lambda weights: weights["blocks.0.mlp.0.bias"].fill_(torch.inf),
                             "model.blocks.0.mlp.0.bias is not finite"),
                            (lambda weights: weights.pop("embed_action.bias"), "lack model.embed_action.bias"),
                            (lambda weights: weights.update({"blocks.0.attention.gate": torch.zeros(2)}),
                             "this library does not know model.blocks.0.attention.gate; install drl again"),
                            *((lambda weights, g=g: weights.update({"blocks.1.attention.decay": torch.tensor([1, g])}),
                               r"model.blocks.1.attention.decay is not in \(0, 1\], or too small")
                              for g in (0.0, -0.5, 1.001, 1e-11))):
        checkpoint = make_checkpoint()
        change(checkpoint.weights)
        with pytest.raises(UserError, match=message):
            engine(checkpoint)


def test_where_the_library_was_not_built_auto_acts_by_torch_and_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setattr(drl.engine, "unavailable", lambda: "was not built: install a C++ compiler")
    monkeypatch.setattr("drl.policy.unavailable", drl.engine.unavailable)
    assert RecurrentPolicy(make_checkpoint()).engine == "torch"
    with pytest.raises(UserError, match="engine 'cpu' was not built: install a C.. compiler"):
        RecurrentPolicy(make_checkpoint(), engine="cpu")


def test_a_device_that_is_no_cpu_has_no_compiled_engine():
    with pytest.raises(UserError, match="engine 'cpu' runs on a CPU, not on cuda; use engine 'torch' there"):
        RecurrentPolicy(make_checkpoint(), "cuda", "cpu")


# From C


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    """docs/examples/act.c, compiled as its first lines say."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("docs/examples/act.c needs a C compiler named cc; type: apt install gcc")
    flags = subprocess.run([sys.executable, "-m", "drl.kernels.cpu"], capture_output=True, text=True, check=True).stdout
    built = tmp_path_factory.mktemp("c") / "act"
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *strict, ROOT / "docs/examples/act.c", *flags.split(), "-o", built], check=True)
    return built


@pytest.fixture
def weights(tmp_path) -> Path:
    return exported_weights(tmp_path)


def exported_weights(tmp_path, **memory) -> Path:
    """The model.safetensors of an exported policy."""
    checkpoint = make_checkpoint(**memory)
    trace = exported.Trace.record(RecurrentPolicy(checkpoint, engine="torch"), checkpoint)
    exported.write(tmp_path, checkpoint, trace, [])
    return tmp_path / "model.safetensors"


@MEMORY
def test_the_program_in_c_acts_as_the_policy_in_python(program, tmp_path, memory):
    policy, weights = RecurrentPolicy(make_checkpoint(**memory), engine="cpu"), exported_weights(tmp_path, **memory)
    observations, rewards, _ = recording(make_checkpoint(), 30, 1)
    policy.reset(1)
    expected = [policy.act(observation.astype(np.float32), float(reward))[0]
                for observation, reward in zip(observations.astype(np.float32), rewards[:, 0].astype(np.float32))]
    lines = "\n".join(" ".join(f"{x:.9g}" for x in (np.float32(reward[0]), *observation[0].astype(np.float32)))
                      for reward, observation in zip(rewards, observations))

    result = subprocess.run([program, weights], input=lines, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.array([line.split() for line in result.stdout.splitlines()], np.float32), expected)


@pytest.mark.parametrize(("reward", "observation", "message"), [
    ("0", "3e38", "an action is not finite"), ("0", "inf", "an observation is not finite"),
    ("nan", "1", "a reward is not finite"),
])
def test_what_is_not_finite_ends_the_program_in_c_with_its_name(program, weights, reward, observation, message):
    lines = "0 1 1 1 1 1\n" + " ".join([reward] + 5 * [observation])
    result = subprocess.run([program, weights], input=lines, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, message + "\n") and len(result.stdout.splitlines()) == 1


def damaged(weights: Path):
    """What else may lie under the name of a policy, and what is said of it."""
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    yield content[:-4], "truncated or damaged|does not lie"
    yield content[:-1], "truncated or damaged"
    yield content[:header // 2], "is no safetensors file"
    yield b"", "is no safetensors file"
    yield b"\xff" * 64, "is no safetensors file"
    yield content + b"\0" * 4, "truncated or damaged"
    yield content.replace(b'"width":"22"', b'"width":"24"'), "expected"
    yield content.replace(b'"width":"22"', b'"width":"-2"'), "width is no whole number: -2"
    yield content.replace(b'"heads":"2"', b'"heads":"0"'), "a size is not between"
    yield content.replace(b'"format":"1"', b'"format":"3"'), "has format 3, this library reads 1 and 2"
    yield content.replace(b"embed_action", b"embed_angles"), "this library does not know model.embed_angles"
    yield content.replace(b'"feature_map":"elu1"', b'"feature_map":"gelu"'), "unknown feature map"
    yield content.replace(b'"F32"', b'"I32"', 1), "expected F32"
    yield content.replace(b"head.bias", b"head.bios"), "the weights lack model.head.bias"
    yield content[:8] + b"{" * (header - 8) + content[header:], "header is damaged"
    yield content[:header] + b"\xff" * (len(content) - header), "is not finite"
    std = make_checkpoint().normaliser.std
    yield content.replace(std.tobytes(), np.float32([*std[:-1], 0]).tobytes()), "normaliser.std is not positive"


def test_a_damaged_file_is_refused_in_one_line_from_c(program, weights):
    original = weights.read_bytes()
    for content, message in damaged(weights):
        assert content != original, f"nothing was changed for: {message}"
        weights.write_bytes(content)
        result = subprocess.run([program, weights], input="", capture_output=True, text=True)
        assert result.returncode == 1 and re.search(message, result.stderr), (message, result)
        assert result.stderr.count("\n") == 1 and result.stderr.startswith(str(weights))
        weights.write_bytes(original)


def test_random_bytes_in_the_header_never_crash_the_reader(program, weights):
    original, rng = weights.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(original[:8], "little")
    for _ in range(60):
        content = bytearray(original)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            content[at] = rng.integers(256)
        weights.write_bytes(content)
        result = subprocess.run([program, weights], input="", capture_output=True, text=True, errors="replace")
        assert result.returncode in (0, 1) and result.stderr.count("\n") == result.returncode, result
