"""On a GPU: the captured update is the update, for one seed and for several, and a stopped run goes on.

Sums are taken in another order by other kernels, and atomically in the gradient of the timestep's embedding: numbers
are compared within tolerances, not bit for bit.
"""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import killed_at, make_config, make_store, training_lines
from toys import OWN

from drl import checkpoint as checkpoints
from drl.checkpoint_files import MODEL, TRAINING
from drl.captured import Captured
from drl.config import Config
from drl.train import train, train_together
from drl.trainer import Trainer, update

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
              pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")]
SINGLE = dict(rtol=1e-3, atol=1e-5)  # thirty updates let rounding grow
CASES = [("linear", "state_passing"), ("linear", "windows"), ("softmax", "windows"), ("none", "windows"),
         ("guided", "state_passing")]


@pytest.fixture(autouse=True)
def as_a_user_would(monkeypatch):
    """Deterministic algorithms, on which the other tests insist, are not there for all that a GPU does."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def on_gpu(attention="linear", seed=0, **settings) -> Config:
    """`attention`: as in a config, of the plain model; or "guided": what the default has of its own, with a critic."""
    guided = dict(value_weight=0.1) if attention == "guided" else {}
    settings = dict(updates=30, stream_groups=3) | guided | settings
    config = make_config("linear" if guided else attention, seed, **settings)
    model = dataclasses.replace(config.model, dropout=0.0, **OWN if guided else {})
    return dataclasses.replace(config, device="cuda", model=model)


def followed(trainer: Trainer) -> np.ndarray:
    """Loss and gradient norm of thirty updates, (30, 2)."""
    return np.array([[value.item() for value in trainer.update()] for _ in range(30)])


def uncaptured(config: Config) -> Trainer:
    trainer = Trainer(config, make_store())
    trainer.captured = None
    return trainer


def close_checkpoints(actual, expected, **tolerance) -> None:
    for file in (MODEL, TRAINING):
        one, other = (load_file(checkpoints.find(run) / file) for run in (actual, expected))
        assert one.keys() == other.keys()
        for name in one:
            if one[name].is_floating_point():
                torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text: f"{name}: {text}")
            else:
                assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("attention", "sampling"), CASES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_captured_update_is_the_update(attention, sampling, precision):
    config = on_gpu(attention, sampling=sampling, precision=precision)
    captured, eager = Trainer(config, make_store()), uncaptured(config)

    np.testing.assert_allclose(followed(captured), followed(eager), **SINGLE)

    assert len(captured.captured._graphs) == captured.sampler.groups
    torch.testing.assert_close(captured.sampler.state_dict(), eager.sampler.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(captured.states, eager.states, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("attention", "sampling"), CASES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_captured_update_is_the_update(attention, sampling, precision):
    compiled, plain = (
        Trainer(on_gpu(attention, sampling=sampling, precision=precision, compile=compile), make_store())
        for compile in ("on", "off")
    )
    actual, expected = followed(compiled), followed(plain)
    if precision == "float32":
        np.testing.assert_allclose(actual, expected, **SINGLE)
    else:
        # The two round at other places. Each of the first nine updates, the second replay of every graph among them, is
        # within 4e-3 of float32 in either form over ten seeds (a bfloat16's last bit is 8e-3). Then rounding grows: at
        # seed 0 the plain form is 10% off float32 at update 22, at seed 7 26%, so of the others only the median counts.
        np.testing.assert_allclose(actual[:9], expected[:9], rtol=1e-2)
        assert np.median(np.abs(actual - expected) / expected) < 1e-2


def test_bfloat16_stays_close_to_float32():
    trainers = (Trainer(on_gpu(precision=precision), make_store()) for precision in ("bfloat16", "float32"))
    half, single = map(followed, trainers)
    np.testing.assert_allclose(half, single, rtol=0.1, atol=1e-3)
    assert (half != single).any()


def test_a_gpu_trains_as_a_cpu_does_from_the_same_draws():
    """The generators of the two differ, so the draws of one are handed to the other."""
    gpu, cpu = uncaptured(on_gpu()), Trainer(dataclasses.replace(on_gpu(), device="cpu"), make_store())
    cpu.sampler.load_state_dict({name: value.cpu() for name, value in gpu.sampler.state_dict().items()
                                 if name != "generator"} | {"generator": cpu.sampler.generator.get_state()})
    drawn = []

    def draw(high, count, original=gpu.sampler._draw):
        drawn.append(original(high, count))
        return drawn[-1]

    gpu.sampler._draw, cpu.sampler._draw = draw, lambda high, count: drawn[-1].cpu()
    for _ in range(12):
        expected = [value.item() for value in gpu.update()]
        np.testing.assert_allclose([value.item() for value in cpu.update()], expected, rtol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("stop", [3, 8, 25])
def test_stopping_and_going_on_equals_never_stopping(tmp_path, monkeypatch, stop, dropout):
    """The checkpoints stand at every fifth update; a run stopped at 3 has none."""
    config = on_gpu()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=dropout))
    train(config, make_store(), tmp_path / "whole")
    with monkeypatch.context() as patch:  # a replay calls no Python that could be stopped
        patch.setattr(Captured, "WARMUP", 1000)
        with killed_at(patch, stop):
            train(config, make_store(), tmp_path / "stopped")
    train(config, make_store(), tmp_path / "stopped", resume=True)

    for one, other in zip(training_lines(tmp_path / "stopped"), training_lines(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    close_checkpoints(tmp_path / "stopped", tmp_path / "whole", rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("attention", ["linear", "guided"])
def test_five_seeds_in_one_graph_have_the_numbers_of_each_alone(attention, tmp_path):
    configs = [on_gpu(attention, seed) for seed in range(5)]
    train_together(configs, make_store(), [tmp_path / f"together-{seed}" for seed in range(5)])
    for seed, config in enumerate(configs):
        train(config, make_store(), tmp_path / f"alone-{seed}")
        one, other = (training_lines(tmp_path / f"{how}-{seed}") for how in ("together", "alone"))
        for line, expected in zip(one, other, strict=True):
            assert line == pytest.approx(expected, rel=1e-3)
        close_checkpoints(tmp_path / f"together-{seed}", tmp_path / f"alone-{seed}", rtol=1e-2, atol=1e-3)


def test_a_seed_that_is_behind_catches_up_in_graphs_of_its_own():
    trainers = [Trainer(on_gpu(seed=seed), make_store()) for seed in range(3)]
    for _ in range(9):
        update(trainers[:2])
    while trainers[2].step < 9:
        update(trainers[2:])
    for _ in range(9):
        results = update(trainers)
    for seed, (loss, norm) in enumerate(results):
        alone = Trainer(on_gpu(seed=seed), make_store())
        for _ in range(18):
            expected = alone.update()
        torch.testing.assert_close((loss, norm), expected, rtol=1e-3, atol=1e-5)


def test_the_host_copies_nothing_to_the_device_once_the_graphs_stand():
    trainer = Trainer(on_gpu(), make_store())
    for _ in range(9):
        trainer.update()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(6):
            trainer.update()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum(name == "cudaGraphLaunch" for name in names) == 6
    assert not [name for name in names if "Memcpy HtoD" in name or "Memcpy DtoH" in name]
