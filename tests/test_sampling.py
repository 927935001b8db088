"""Two ways to draw a batch. In the store below R_t is the step's own number: a batch shows which steps it holds.

Dimension key: B rows, L steps, O observation, A action, S steps of all episodes.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from drl.config import TrainConfig
from drl.data.sampling import Batch, Steps, StreamSampler, WindowSampler, make_sampler, to_box
from drl.data.store import EpisodeStore, Spaces
from drl.errors import UserError

B, L, O, A = 5, 3, 7, 2  # noqa: E741
LENGTHS = (7, 1, 13, 5, 3)  # at, below and above the edges of chunks of 3
STARTS = np.cumsum([0, *LENGTHS])
S = STARTS[-1]
SPACES = Spaces("", O, np.float32([-2, 0.5]), np.float32([6, 0.75]))
SAMPLERS = [WindowSampler, StreamSampler]


@pytest.fixture(scope="module")
def store():
    rng = np.random.default_rng(0)

    def episode(start, length):
        # the last step earns its own number, every other one less: returns-to-go count upwards
        rewards = np.full(length, -1.0)
        rewards[-1] = start + length - 1
        flags = np.arange(length) == length - 1
        return SimpleNamespace(
            observations=rng.normal(3, 2, (length + 1, O)), rewards=rewards, truncations=flags,
            terminations=flags & (start % 2 > 0),
            actions=rng.uniform(SPACES.action_low, SPACES.action_high, (length, A)),
        )

    store = EpisodeStore.from_episodes(map(episode, STARTS, LENGTHS), SPACES, "drl/toy/numbered-v0")
    np.testing.assert_array_equal(store.returns_to_go, np.arange(S))
    return store


def steps_of(batch: Batch) -> np.ndarray:
    """Which step of the store stands at each place, (B, L)."""
    return batch.returns_to_go.numpy().astype(int)


def episode_of(step):
    return np.searchsorted(STARTS, step, side="right") - 1


@pytest.fixture(scope="module")
def steps(store):
    return Steps(store, "cpu")


def batches(sampler, count, turn=0):
    return [sampler.next(turn + i) for i in range(count)]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_is_consecutive_steps_of_one_episode(sampler, steps):
    for batch in batches(sampler(steps, B, L, 0), 200):
        step_BL, mask_BL = steps_of(batch), batch.mask.numpy()
        first_B = step_BL[:, 0]
        end_B = STARTS[episode_of(first_B) + 1]

        np.testing.assert_array_equal(mask_BL.sum(1), np.minimum(L, end_B - first_B))
        assert mask_BL[:, 0].all() and (np.diff(mask_BL.astype(int), axis=1) <= 0).all()
        np.testing.assert_array_equal(step_BL[mask_BL], (first_B[:, None] + np.arange(L))[mask_BL])
        assert (step_BL < end_B[:, None]).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_everything_in_one_place_of_a_batch_belongs_to_one_step(sampler, store, steps):
    observations = torch.as_tensor((store.observations - store.normaliser.mean) / store.normaliser.std)
    for batch in batches(sampler(steps, B, L, 0), 50):
        step_BL = steps_of(batch)

        assert (batch.observations.shape, batch.actions.shape) == ((B, L, O), (B, L, A))
        torch.testing.assert_close(batch.observations, observations[step_BL], rtol=0, atol=0)
        # float32 and a division: a few units in the last place of numbers up to 6
        torch.testing.assert_close(
            torch.as_tensor(to_box(batch.actions.numpy(), SPACES.action_low, SPACES.action_high)),
            torch.as_tensor(store.actions[step_BL]), rtol=0, atol=1e-6,
        )
        np.testing.assert_array_equal(batch.timesteps, step_BL - STARTS[episode_of(step_BL)])
        dtypes = [array.dtype for array in batch[:-1]]
        assert dtypes == [torch.float32] * 3 + [torch.int64, torch.bool, torch.bool] and batch.terminal is None


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_that_is_asked_says_after_which_steps_an_episode_terminates(sampler, store, steps):
    drawing = sampler(steps, B, L, 0)
    drawing.terminals = True
    some = 0
    for batch in batches(drawing, 100):
        step_BL = steps_of(batch)
        episode_BL = episode_of(step_BL)
        terminal_BL = (step_BL == STARTS[episode_BL + 1] - 1) & (STARTS[episode_BL] % 2 > 0) & batch.mask.numpy()
        np.testing.assert_array_equal(batch.terminal, terminal_BL)
        some += terminal_BL.sum()
    assert some


def test_on_a_cpu_the_stores_own_pages_are_read_even_those_of_a_file_that_cannot_be_written(store):
    arrays = store.observations, store.actions, store.returns_to_go
    for array in arrays:
        array.flags.writeable = False  # warnings are errors here: torch has one for such arrays
    steps = Steps(store, "cpu")
    kept = steps.observations, steps.actions, steps.returns_to_go
    assert [tensor.data_ptr() for tensor in kept] == [array.ctypes.data for array in arrays]


def test_a_dataset_that_does_not_fit_on_the_device_is_told_in_one_line(store, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(torch, "as_tensor", refuse)
    with pytest.raises(UserError) as caught:
        Steps(store, "cuda")
    assert str(caught.value) == (
        "dataset drl/toy/numbered-v0 does not fit into the memory of cuda; use --device cpu, which trains from the disk"
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_padding_repeats_the_last_real_step_and_is_masked(sampler, steps):
    seen = 0
    for batch in batches(sampler(steps, B, L, 0), 50):
        for row in range(B):
            real = int(batch.mask[row].sum())
            assert batch.mask[row].tolist() == [True] * real + [False] * (L - real)
            for array in (batch.returns_to_go, batch.observations, batch.actions, batch.timesteps):
                expected = array[row, real - 1].expand(L - real, *array.shape[2:])
                torch.testing.assert_close(array[row, real:], expected, rtol=0, atol=0)
            seen += L - real
    assert seen > 0


def test_a_window_begins_at_every_step_equally_often_and_always_anew(steps):
    drawn = batches(WindowSampler(steps, 1000, L, 0), 58)
    counts = np.bincount(np.concatenate([steps_of(batch)[:, 0] for batch in drawn]), minlength=S)

    # chi-square of S - 1 = 28 degrees of freedom: mean 28, standard deviation sqrt(56); five of them above
    assert (np.square(counts - 58_000 / S) / (58_000 / S)).sum() < 28 + 5 * 56**0.5
    assert all(batch.restart.all() for batch in drawn)


def walk(drawn: list[Batch], groups: int) -> list[list[list[np.ndarray]]]:
    """What each stream saw: a list of visits to episodes, each a list of chunks of real steps. Groups take turns."""
    rows = len(drawn[0].mask)
    streams = [[] for _ in range(groups * rows)]
    for turn, batch in enumerate(drawn):
        for row in range(rows):
            stream = turn % groups * rows + row
            if batch.restart[row]:
                streams[stream].append([])
            streams[stream][-1].append(steps_of(batch)[row][batch.mask[row].numpy()])
    return streams


@pytest.mark.parametrize("groups", [1, 3])
def test_a_stream_walks_each_episode_from_beginning_to_end(groups, steps):
    streams = walk(batches(StreamSampler(steps, B, L, 0, groups), groups * 100), groups)
    for visits in streams:
        assert sum(map(len, visits)) == 100  # chunks
        for chunks in visits[1:-1]:  # the first visit begins midway, the last is cut off
            steps = np.concatenate(chunks)
            episode = episode_of(steps[0])
            np.testing.assert_array_equal(steps, np.arange(STARTS[episode], STARTS[episode + 1]))
            assert all(len(chunk) == L for chunk in chunks[:-1])


def test_a_stream_enters_its_first_episode_at_a_chunk_and_walks_to_its_end(steps):
    midway = 0
    for visits in walk(batches(StreamSampler(steps, 100, L, 0), 10), 1):
        steps = np.concatenate(visits[0])
        episode = episode_of(steps[0])
        np.testing.assert_array_equal(steps, np.arange(steps[0], STARTS[episode + 1]))
        assert (steps[0] - STARTS[episode]) % L == 0
        midway += steps[0] > STARTS[episode]
    assert midway > 0


@pytest.mark.parametrize("groups", [1, 3])
def test_a_stream_restarts_at_the_first_chunk_of_an_episode_and_only_there(groups, steps):
    drawn = batches(StreamSampler(steps, B, L, 0, groups), 100)
    for batch in drawn[:groups]:
        assert batch.restart.all()
    for batch in drawn[groups:]:
        torch.testing.assert_close(batch.restart, batch.timesteps[:, 0] == 0, rtol=0, atol=0)


def test_the_group_whose_turn_it_is_goes_on_and_no_other(steps):
    sampler = StreamSampler(steps, 2, L, 0, 3)
    for turn in (0, 1, 2, 0, 4):
        before = [getattr(sampler, name).clone() for name in StreamSampler.STREAMS]
        batch = sampler.next(turn)
        group, others = turn % 3, [other for other in range(3) if other != turn % 3]
        episode, position, restart = (value[group] for value in before)
        np.testing.assert_array_equal(steps_of(batch)[:, 0], steps.starts[episode] + position)
        assert_same([batch.restart], [restart])
        for name, value in zip(StreamSampler.STREAMS, before, strict=True):
            assert_same([getattr(sampler, name)[others]], [value[others]])


def test_streams_see_every_step_equally_often_in_the_long_run(steps):
    counts = np.zeros(S)
    for batch in batches(StreamSampler(steps, 100, L, 0), 400):
        counts += np.bincount(steps_of(batch)[batch.mask.numpy()], minlength=S)

    # 12 chunks in 5 episodes: 40,000 chunks are about 3,300 visits to each, give or take 52; five times that is 8%.
    # Episodes drawn by their length, not uniformly, would be visited 13 times as often as others
    np.testing.assert_allclose(counts / counts.mean(), 1, rtol=0, atol=0.08)


def test_actions_reach_from_minus_one_to_one():
    corners = np.float32([[-2, 0.5], [6, 0.75], [2, 0.625]])
    flags = np.array([False, False, True])
    episode = SimpleNamespace(
        observations=np.zeros((4, O)), actions=corners, rewards=np.zeros(3), terminations=flags, truncations=flags
    )
    steps = Steps(EpisodeStore.from_episodes([episode], SPACES, "drl/toy/corners-v0"), "cpu")

    actions = StreamSampler(steps, 1, L, 0).next(0).actions[0]

    torch.testing.assert_close(actions, torch.tensor([[-1.0, -1], [1, 1], [0, 0]]), rtol=0, atol=0)
    np.testing.assert_array_equal(to_box(actions.numpy(), SPACES.action_low, SPACES.action_high), corners)
    boxed = to_box(actions, torch.as_tensor(SPACES.action_low), torch.as_tensor(SPACES.action_high))
    torch.testing.assert_close(boxed, torch.as_tensor(corners), rtol=0, atol=0)


def streams_in_turns(*arguments):
    return StreamSampler(*arguments, groups=3)


@pytest.mark.parametrize("sampler", [*SAMPLERS, streams_in_turns])
def test_a_loaded_sampler_goes_on_with_the_same_batches(sampler, steps, tmp_path):
    first = sampler(steps, B, L, 0)
    batches(first, 11)
    save_file(first.state_dict(), tmp_path / "sampler.safetensors")
    expected = batches(first, 20, turn=11)

    second = sampler(steps, B, L, 1)  # another seed: everything must come from the file
    batches(second, 3)
    second.load_state_dict(load_file(tmp_path / "sampler.safetensors"))

    for actual, wanted in zip(batches(second, 20, turn=11), expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_state_taken_earlier_is_not_changed_by_later_batches(sampler, steps):
    drawing = sampler(steps, B, L, 0)
    state = drawing.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    batches(drawing, 11)
    assert state.keys() == kept.keys()
    assert_same(state.values(), kept.values())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_alone_decides_the_batches(sampler, steps):
    def drawn(seed):
        return [steps_of(batch).tolist() for batch in batches(sampler(steps, B, L, seed), 20)]

    before = torch.get_rng_state()
    first = drawn(0)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    torch.manual_seed(12345)
    assert drawn(0) == first
    assert drawn(1) != first


def test_the_config_names_the_sampler(steps):
    settings = {"batch_size": B, "context": L}
    windows = make_sampler(TrainConfig(sampling="windows", **settings), steps, 0)
    streams = make_sampler(TrainConfig(sampling="state_passing", stream_groups=2, **settings), steps, 0)
    assert (type(windows), type(streams)) == (WindowSampler, StreamSampler)
    assert_same(windows.next(0), WindowSampler(steps, B, L, 0).next(0))
    assert_same(streams.next(0), StreamSampler(steps, B, L, 0, 2).next(0))
