"""Two processes that share every batch train as one does: same numbers but for rounding, one folder, one voice."""

import dataclasses
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_train import Killed, killed_at, lines, make_config, make_store, training_lines
from torture.processes import Drl
from toys import OWN

from drl import checkpoint as checkpoints
from drl import signals
from drl.checkpoint_files import MODEL, TRAINING
from drl.config import Config, ModelConfig
from drl.data.sampling import Steps, StreamSampler, WindowSampler
from drl.errors import UserError
from drl.parallel import Share, join
from drl.train import train, train_together
from drl.trainer import Trainer

ATTENTIONS = ["linear", "softmax", "none", "guided"]


def config_of(attention: str) -> Config:
    """Ten updates on episodes of unequal lengths: the halves of a batch have unequally many real steps. guided: what
    the default has of its own, with a critic."""
    sampling, weight = ("windows" if attention in ("softmax", "none") else "state_passing"), attention == "guided"
    config = make_config(attention.replace("guided", "linear"), sampling=sampling, updates=10, stream_groups=3,
                         checkpoint_every=5, value_weight=float(weight))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0, **OWN if weight else {}))


def in_two(program: Callable[[Path], int | None], folder: Path) -> list[SimpleNamespace]:
    """Call a function of this module in two processes, as torchrun would start them, forked from one that has imported
    everything; status, out and err of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    try:
        for rank in "01":
            hook = functools.partial(call, program, folder, shared | {"RANK": rank, "LOCAL_RANK": rank})
            running.append(Drl([], folder / "said" / program.__name__, hook, real=False))
        for process in running:
            assert process.wait(90) is not None, process.said
    finally:
        for process in running:
            process.kill()
    return [SimpleNamespace(status=process.status, out=process.out, err=process.said) for process in running]


def call(program: Callable[[Path], int | None], folder: Path, variables: dict[str, str]) -> None:
    """All that the process does: `drl` itself is not called."""
    os.environ.update(variables)
    sys.exit(program(folder))


def train_all(folder: Path) -> None:
    with join("cpu") as share:
        for attention in ATTENTIONS:
            for name in ("shared", "handed-over"):
                run = folder / attention / name
                train_together([config_of(attention)], make_store(), [run], resume=name == "handed-over", share=share)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each attention: alone/ by one process, shared/ by two, handed-over/ by one until update 5, then by two."""
    folder = tmp_path_factory.mktemp("made")
    torch.use_deterministic_algorithms(True)
    for attention in ATTENTIONS:
        train(config_of(attention), make_store(), folder / attention / "alone")
        with pytest.MonkeyPatch.context() as patch, killed_at(patch, 7):
            train(config_of(attention), make_store(), folder / attention / "handed-over")
    processes = in_two(train_all, folder)
    assert [process.status for process in processes] == [0, 0], processes
    return SimpleNamespace(folder=folder, processes=processes)


def assert_close_run(actual: Path, expected: Path) -> None:
    """Metrics, weights, optimizer, stream states: equal but for the order of sums; sampler and steps exactly."""
    for line, other in zip(training_lines(actual), training_lines(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    one, other = checkpoints.find(actual), checkpoints.find(expected)
    for file in (MODEL, TRAINING):
        torch.testing.assert_close(load_file(one / file), load_file(other / file), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["shared", "handed-over"])
def test_two_processes_train_as_one_from_the_beginning_or_from_a_checkpoint_of_one(made, attention, name):
    runs = made.folder / attention
    assert_close_run(runs / name, runs / "alone")
    assert [line["step"] for line in lines(runs / name)] == list(range(1, 11))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_one_process_goes_on_where_two_stopped(made, attention, tmp_path):
    shutil.copytree(made.folder / attention / "shared", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    train(config_of(attention), make_store(), tmp_path / "run", resume=True)
    assert_close_run(tmp_path / "run", made.folder / attention / "alone")


def test_the_first_process_alone_writes_and_speaks(made):
    shared, alone = ((made.folder / "linear" / name) for name in ("shared", "alone"))
    files = [sorted(path.name.partition("events")[0] for path in run.iterdir()) for run in (shared, alone)]
    assert files[0] == files[1], "one events file, one of everything"
    assert (shared / "config.yaml").read_text() == (alone / "config.yaml").read_text()
    first, second = made.processes
    assert "10/10" in first.err
    assert (second.out, second.err) == ("", "")


def in_the_second(act: Callable[[], None]) -> None:
    """Have the second of two processes do something at the beginning of the update after three."""
    def descend(self, group, real=Trainer.descend):
        if self.step == 3 and self.share.rank == 1:
            act()
        return real(self, group)

    Trainer.descend = descend


def signalled(folder: Path) -> int:
    in_the_second(lambda: os.kill(os.getpid(), signal.SIGUSR1))

    def work():
        with join("cpu") as share:
            train_together([config_of("linear")], make_store(), [folder / "run"], resume=True, share=share)
        return 0

    return signals.status(work)


def test_a_signal_to_one_process_stops_all_after_the_same_update_and_one_goes_on_as_if_it_had_not_come(made, tmp_path):
    first, second = in_two(signalled, tmp_path)

    assert (first.status, second.status) == (128 + signal.SIGTERM, 128 + signal.SIGUSR1), (first, second)
    assert checkpoints.load(tmp_path / "run").step == 4
    told = [line for line in first.err.splitlines() if line.startswith("drl: ")]
    assert told == [f"drl: stopped by SIGTERM; {tmp_path / 'run'} is saved at update 4; to go on, add --resume to the "
                    "same command"]
    assert second.err == "\ndrl: SIGUSR1 while training, which is saved first; a second one ends it at once\n"

    train_together([config_of("linear")], make_store(), [tmp_path / "run"], resume=True)
    assert_close_run(tmp_path / "run", made.folder / "linear" / "alone")


def deserted(folder: Path) -> None:
    in_the_second(lambda: os._exit(3))
    try:
        with join("cpu") as share:
            train_together([config_of("linear")], make_store(), [folder / "run"], share=share)
    except UserError as error:
        sys.exit(str(error))


def test_a_process_that_dies_does_not_leave_the_other_waiting(tmp_path):
    start = time.monotonic()
    first, second = in_two(deserted, tmp_path)
    assert second.status == 3
    assert first.status == 1
    assert "the processes of this run lost each other" in first.err.splitlines()[-1]
    assert "Traceback" not in first.err
    assert time.monotonic() - start < 60


def test_a_mistake_under_torchrun_is_told_once(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m", "--",
         "drl", "train", "--dataset", "drl/hopper/medium-v0", "--device", "cpu", "--run", "run"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, timeout=120,
    )
    assert ended.returncode == 1
    told = [line for line in ended.stderr.splitlines() if line.startswith("drl: ")]
    assert told == ["drl: dataset drl/hopper/medium-v0 is not on this machine; type: drl data collect hopper/medium"]


# a share


def test_shares_make_up_the_batch():
    rows = [list(range(12))[Share(rank, 4).rows(12)] for rank in range(4)]
    assert rows == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert list(range(12))[Share().rows(12)] == list(range(12))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError) as caught:
        Share(0, 3).rows(64)
    assert str(caught.value) == "train.batch_size 64 cannot be shared by 3 processes; use a multiple of 3"


@pytest.mark.parametrize("kind", [WindowSampler, StreamSampler])
def test_samplers_that_share_a_batch_give_out_its_rows(kind):
    steps = Steps(make_store(), "cpu")
    whole = kind(steps, 6, 5, 0, 2)
    parts = [kind(steps, 6, 5, 0, 2, Share(rank, 3).rows(6)) for rank in range(3)]
    for sampler in (whole, *parts):
        sampler.terminals = True
    for turn in range(20):
        expected = whole.next(turn)
        drawn = [part.next(turn) for part in parts]
        torch.testing.assert_close([torch.cat(values) for values in zip(*drawn, strict=True)], list(expected),
                                   rtol=0, atol=0)


@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=["dropout", "several seeds"])
def test_what_processes_cannot_share_is_refused(tmp_path, seeds):
    configs = [Config(dataset="-", device="cpu", seed=seed, model=ModelConfig(dropout=0.1 * (len(seeds) == 1)))
               for seed in seeds]
    with pytest.raises(UserError) as caught:
        train_together(configs, make_store(), [tmp_path] * len(seeds), share=Share(1, 2))
    assert str(caught.value) == (
        "processes can share neither several seeds nor dropout; name one --seed, add --model.dropout 0"
    )


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "torchrun started 3 processes on 1 GPUs; use --nproc-per-node 1"),
     ("cuda:0", "torchrun gives each process a GPU of its own; use --device cuda, not cuda:0")],
)
def test_processes_without_a_gpu_each_are_refused(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught, join(device):
        raise Killed
    assert str(caught.value) == message


def test_without_torchrun_a_process_has_all_of_the_batch(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it
    with join("cpu") as share:
        assert share == Share(0, 1) and share.first
