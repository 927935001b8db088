"""A share of the episodes: those with the highest return are drawn, as if the dataset held no others."""

import dataclasses

import numpy as np
import pytest
import torch
from test_sampling import SPACES, A, B, L, O, assert_same, batches, walk
from test_train import assert_same_run, killed_at, make_config, make_store, training_lines

from drl import checkpoint as checkpoints
from drl.data.sampling import Steps, StreamSampler, WindowSampler
from drl.data.store import EpisodeStore, starts_of
from drl.errors import UserError
from drl.train import train, train_together
from drl.trainer import Trainer

SAMPLERS = [WindowSampler, StreamSampler]
EPISODES, SHARE, BEST = 41, 0.3, 12  # 12.3 of 41
LENGTHS = np.random.default_rng(0).integers(1, 17, EPISODES)


def store_of(lengths=LENGTHS, returns=None, seed=1) -> EpisodeStore:
    """Returns-to-go are the numbers of the steps, but for the first of each episode, where its return stands."""
    rng, starts = np.random.default_rng(seed), starts_of(lengths)
    to_go = np.arange(starts[-1], dtype=np.float32) + 1000
    to_go[starts[:-1]] = rng.permutation(len(lengths)) if returns is None else returns
    observations, ends = rng.normal(size=(len(to_go), O)).astype(np.float32), rng.random(len(lengths)) < 0.5
    actions = rng.uniform(SPACES.action_low, SPACES.action_high, (len(to_go), A)).astype(np.float32)
    return EpisodeStore.from_arrays(observations, actions, to_go, starts, ends, SPACES, "drl/toy/ranked-v0")


@pytest.fixture(scope="module")
def store():
    return store_of()


def best_of(store, count: int) -> list[int]:
    """The oracle: sort by return."""
    return sorted(sorted(range(len(store.episode_returns)), key=lambda e: -store.episode_returns[e])[:count])


def where(store, batch) -> np.ndarray:
    """Which step of the store stands at each place, (B, L): the one with these observations."""
    raw = batch.observations.numpy() * store.normaliser.std + store.normaliser.mean
    return np.abs(raw[..., None, 0] - store.observations[:, 0]).argmin(-1)


@pytest.mark.parametrize(("share", "episodes", "count"), [
    (1.0, 7, 7), (0.5, 7, 3), (0.1, 30, 3), (0.29, 100, 29), (0.1, 9, 1), (1e-9, 41, 1), (1.0, 1, 1), (0.3, 41, 12),
])
def test_a_share_is_rounded_down_but_never_to_none(share, episodes, count):
    store = store_of(np.full(episodes, 2))
    np.testing.assert_array_equal(store.best(share), best_of(store, count))


def test_of_equal_returns_the_earlier_episodes_are_the_best():
    store = store_of(np.full(6, 3), returns=[5, 7, 5, 1, 5, 7])
    for share, expected in ((1 / 6, [1]), (2 / 6, [1, 5]), (3 / 6, [0, 1, 5]), (4 / 6, [0, 1, 2, 5])):
        assert store.best(share).tolist() == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exactly_the_best_episodes_are_drawn_all_their_steps_equally_often(sampler, store):
    best = best_of(store, BEST)
    steps = np.concatenate([np.arange(*store.episode_starts[e: e + 2]) for e in best])
    drawing, counts = sampler(Steps(store, "cpu", SHARE), 200, L, 0), np.zeros(len(store.actions))
    for batch in batches(drawing, 300):
        step_BL = where(store, batch)
        rows = step_BL[:, :1] if sampler is WindowSampler else step_BL[batch.mask.numpy()]
        counts += np.bincount(rows.ravel(), minlength=len(counts))

    assert np.flatnonzero(counts).tolist() == steps.tolist()
    # windows: 60,000 draws of some hundred steps, 600 each, give or take 25. Streams: chunks of one episode are drawn
    # together, and each is visited some 1,500 times, give or take 40
    np.testing.assert_allclose(counts[steps] / counts[steps].mean(), 1, rtol=0, atol=0.2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_drawn_is_what_a_dataset_of_the_best_alone_would_give(sampler, store):
    best = best_of(store, BEST)
    keep = np.concatenate([np.arange(*store.episode_starts[e: e + 2]) for e in best])
    alone = EpisodeStore(store.observations[keep], store.actions[keep], store.returns_to_go[keep],
                         starts_of(LENGTHS[best]), store.terminated[best], store.normaliser, SPACES, "-", "-")
    one, other = sampler(Steps(store, "cpu", SHARE), B, L, 5), sampler(Steps(alone, "cpu"), B, L, 5)
    for actual, expected in zip(batches(one, 100), batches(other, 100), strict=True):
        assert_same(actual, expected)


def test_a_stream_walks_the_best_episodes_from_beginning_to_end(store):
    best, seen = set(best_of(store, BEST)), set()
    drawn = batches(StreamSampler(Steps(store, "cpu", SHARE), B, L, 0), 100)
    located = [batch._replace(returns_to_go=torch.as_tensor(where(store, batch))) for batch in drawn]
    for visits in walk(located, 1):
        for chunks in visits[1:-1]:  # the first visit begins midway, the last is cut off
            walked = np.concatenate(chunks)
            episode = np.searchsorted(store.episode_starts, walked[0], side="right") - 1
            np.testing.assert_array_equal(walked, np.arange(*store.episode_starts[episode: episode + 2]))
            seen.add(int(episode))
    assert seen == best


def test_the_whole_share_changes_nothing(store):
    for sampler in SAMPLERS:
        one, other = sampler(Steps(store, "cpu", 1.0), B, L, 0), sampler(Steps(store, "cpu"), B, L, 0)
        for actual, expected in zip(batches(one, 20), batches(other, 20), strict=True):
            assert_same(actual, expected)
    steps = Steps(store, "cpu")
    np.testing.assert_array_equal(steps.starts, store.episode_starts)
    np.testing.assert_array_equal(steps.first, store.episode_starts[:-1])


def test_of_a_mapped_dataset_nothing_is_copied_and_the_normaliser_stays_that_of_the_whole(store, tmp_path):
    arrays = {}
    for name in ("observations", "actions", "returns_to_go", "episode_starts"):
        np.save(tmp_path / name, getattr(store, name))
        arrays[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    mapped = dataclasses.replace(store, **arrays)
    steps = Steps(mapped, "cpu", SHARE)
    for name in ("observations", "actions", "returns_to_go"):
        assert getattr(steps, name).data_ptr() == arrays[name].ctypes.data
    assert_same((steps.mean, steps.std), map(torch.as_tensor, store.normaliser))
    one, other = WindowSampler(steps, B, L, 0), WindowSampler(Steps(store, "cpu", SHARE), B, L, 0)
    assert_same(one.next(), other.next())


def test_a_number_that_is_not_finite_is_found_by_its_place_in_the_store():
    store = store_of()
    episode = best_of(store, BEST)[-1]
    store.actions[store.episode_starts[episode], 0] = np.nan
    assert Steps(store, "cpu", SHARE).first_not_finite() == f"episode {episode}, step 0, field actions"


# runs


def best_config(sampling, seed=0, **settings):
    return make_config(sampling=sampling, seed=seed, best_episodes=0.5, **settings)


def test_a_trainer_and_a_run_draw_the_best_alone(tmp_path):
    config, store = best_config("windows", updates=3), make_store()
    trainer = Trainer(config, store)
    assert trainer.sampler.steps.first.tolist() == store.episode_starts[best_of(store, 3)].tolist()

    train(config, store, tmp_path)

    assert [line["train/loss"] for line in training_lines(tmp_path)] == [trainer.update()[0].item() for _ in range(3)]


@pytest.mark.parametrize("sampling", ["state_passing", "windows"])
def test_a_run_on_the_best_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch, sampling):
    train(best_config(sampling), make_store(), tmp_path / "whole")
    with killed_at(monkeypatch, 8):
        train(best_config(sampling), make_store(), tmp_path / "stopped")
    train(best_config(sampling), make_store(), tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")

    saved = checkpoints.load(tmp_path / "whole")
    store = make_store()
    assert saved.dataset_fingerprint == store.fingerprint
    assert_same(map(torch.as_tensor, saved.normaliser), map(torch.as_tensor, store.normaliser))


def test_a_run_on_the_best_is_not_gone_on_with_on_all(tmp_path):
    train(best_config("windows", updates=2), make_store(), tmp_path)
    with pytest.raises(UserError, match=r"another config \(train.best_episodes 0.5 -> 1.0\)"):
        train(make_config(sampling="windows", updates=2), make_store(), tmp_path, resume=True)


@pytest.mark.parametrize("sampling", ["state_passing", "windows"])
def test_seeds_together_draw_the_best_as_each_alone(tmp_path, sampling):
    configs = [best_config(sampling, seed, updates=6) for seed in (0, 1)]
    train_together(configs, make_store(), [tmp_path / f"together-{seed}" for seed in (0, 1)])
    for seed, config in enumerate(configs):
        train(config, make_store(), tmp_path / f"alone-{seed}")
        assert_same_run(tmp_path / f"together-{seed}", tmp_path / f"alone-{seed}")
