"""A suite is its runs, each as if alone; however often it is killed, stopped or repeated, they are the same."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_resume import without_clocks
from test_train import assert_same_run
from toys import OWN, PLAIN

from drl import checkpoint as checkpoints
from drl import cli, lock, suite_times, suite_work
from drl import evaluate as evaluation
from drl.config import TrainConfig
from drl.config_files import read_config
from drl.data import minari_files
from drl.errors import UserError
from drl.policy import RecurrentPolicy
from drl.suite import scores_told
from drl.suite_file import Wanted, read
from drl.suite_screen import clock, duration
from drl.suite_worker import Worker, wait
from drl.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
CRITIC = {option: getattr(TrainConfig(), option) for option in (
    "value_weight", "value_measure", "value_cap", "value_trace", "discount")}
TASK = "hopper/medium-replay"
SETTINGS = {"model.width": 16, "model.layers": 1, "model.heads": 2, "train.batch_size": 4, "train.updates": 60,
            "train.checkpoint_every": 20, "train.log_every": 10, "train.warmup_updates": 5,
            "train.precision": "float32", "evaluate.episodes": 3}
TINY = {
    "tasks": ["hopper.yaml"],
    "seeds": [0, 1],
    "settings": SETTINGS,
    "variants": {"plain": {"evaluate": [{}, {"mode": "window", "episodes": 2}, {"target_scale": 0.5}]}},
}
ROW = {"variant": "plain", "task": TASK, "work": "training", "mode": "", "device": "a GPU", "cores": 2,
       "versions": {"drl": "0"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a dataset, the suite and its runs, never disturbed."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "hopper.yaml").write_text("dataset: drl/hopper/medium-replay-v0\nevaluate:\n  target_returns: [3600.0]\n")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "datasets"))
        patch.chdir(folder)
        assert cli.main(["data", "collect", TASK, "--steps", "2000"]) == 0
        assert cli.main(["suite", "tiny.yaml", "--devices", "cpu"]) == 0
    return folder


@pytest.fixture
def drl(made, tmp_path, monkeypatch, capfd):
    """`drl suite` in a folder of its own, with the dataset at hand."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made / "datasets"))
    monkeypatch.chdir(tmp_path)
    for name in ("hopper.yaml", "tiny.yaml"):
        shutil.copy(made / name, tmp_path)

    def run(*arguments: str, file: str = "tiny.yaml") -> SimpleNamespace:
        capfd.readouterr()
        status = cli.main(["suite", file, "--devices", "cpu", *arguments])
        return SimpleNamespace(status=status, **capfd.readouterr()._asdict())

    return run


def folder(root: Path, seed: int) -> Path:
    return root / "runs" / "tiny" / "plain" / TASK / f"seed-{seed}"


def assert_same_suite(actual: Path, expected: Path) -> None:
    for seed in TINY["seeds"]:
        one, other = folder(actual, seed), folder(expected, seed)
        assert_same_run(one, other)
        results = [sorted(map(repr, map(without_clocks, evaluation.read(run)))) for run in (one, other)]
        assert results[0] == results[1]
    assert not list(actual.rglob("*.partial*"))


def written(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


# what a file says


def suite_of(tmp_path: Path, **changes) -> Path:
    (tmp_path / "hopper.yaml").write_text("dataset: drl/hopper/medium-replay-v0\n")
    (tmp_path / "walker.yaml").write_text("dataset: drl/walker2d/medium-v0\ntrain:\n  context: 7\n  updates: 3\n")
    tree = {key: value for key, value in (TINY | changes).items() if value is not None}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "suite.yaml"


def test_a_suite_is_every_variant_of_every_task_with_every_seed(tmp_path):
    file = suite_of(tmp_path, tasks=["hopper.yaml", "walker.yaml"], seeds=[3, 5],
                    variants={"one": {}, "two": {"settings": {"train.updates": 9, "model.width": 8}}})
    jobs = read(file, Path("out"), "cpu")
    assert [(job.variant, job.task) for job in jobs] == [
        ("one", TASK), ("two", TASK), ("one", "walker2d/medium"), ("two", "walker2d/medium")
    ]
    assert [str(run.folder) for run in jobs[1].runs] == [f"out/two/{TASK}/seed-3", f"out/two/{TASK}/seed-5"]
    last = jobs[3].runs[1].config  # the variant wins over the suite, the suite over the task's file, that over defaults
    assert (last.seed, last.device, last.dataset) == (5, "cpu", "drl/walker2d/medium-v0")
    assert (last.train.updates, last.model.width, last.train.batch_size, last.train.context) == (9, 8, 4, 7)
    assert jobs[2].runs[0].config.train.updates == 60
    (ask,) = jobs[0].runs[0].asks
    assert (ask.step, ask.mode, ask.episodes, ask.seed, ask.target_scale) == (60, "recurrent", 3, 10_000, 1.0)


def test_parts_are_all_jobs_and_none_twice(tmp_path):
    file = suite_of(tmp_path, variants={name: {} for name in "abcde"})
    jobs = read(file, Path("out"), "cpu")
    parts = [read(file, Path("out"), "cpu", Wanted(part=(part, 3))) for part in (1, 2, 3)]
    assert sorted(job.variant for part in parts for job in part) == sorted(job.variant for job in jobs)
    assert [len(part) for part in parts] == [2, 2, 1]


@pytest.mark.parametrize(("points", "every", "on_the_way"), [(1, 60, []), (3, 20, [20, 40]), (4, 15, [15, 30, 45]),
                                                             (7, 9, [9, 18, 27, 36, 45, 54])])
def test_a_curve_keeps_and_scores_the_checkpoints_on_the_way(points, every, on_the_way, tmp_path):
    settings = {key: value for key, value in SETTINGS.items() if key != "train.checkpoint_every"}
    file = suite_of(tmp_path, settings=settings, curve={"points": points, "episodes": 1})
    (job,) = read(file, Path("out"), "cpu")
    train = job.runs[0].config.train
    assert (train.checkpoint_every, train.keep_checkpoints) == (every, points)
    assert [(ask.step, ask.episodes, ask.mode) for ask in job.runs[0].asks] == [
        (60, 3, "recurrent"), (60, 2, "window"), (60, 3, "recurrent"), *((step, 1, "recurrent") for step in on_the_way)
    ]


@pytest.mark.parametrize(("changes", "wanted", "message"), [
    ({"sedes": [1]}, {}, r"unknown key 'sedes' in the suite; did you mean 'seeds'\?"),
    ({"seeds": [1, 2, 1]}, {}, "seeds names 1 twice; name each once"),
    ({"seeds": []}, {}, "seeds is missing or empty; .*small.yaml shows how"),
    ({"seeds": None}, {}, "seeds is missing or empty"),
    ({"seeds": ["x"]}, {}, "seeds must be int, got 'x'"),
    ({"seeds": [-1]}, {}, "seed must .*-1"),
    ({"tasks": []}, {}, "tasks is missing or empty"),
    ({"tasks": ["nowhere.yaml"]}, {}, "nowhere.yaml cannot be read: No such file"),
    ({"tasks": ["hopper.yaml", "./hopper.yaml"]}, {}, "tasks names hopper/medium-replay twice"),
    ({"variants": {}}, {}, "variants is missing or empty"),
    ({"variants": {"../up": {}}}, {}, "a variant's name must be of letters"),
    ({"variants": {"a": {"setings": {}}}}, {}, r"unknown key 'setings' in variants.a; did you mean 'settings'\?"),
    ({"variants": {"a": {"settings": {"train.updats": 1}}}}, {}, r"unknown config key 'train.updats' in variants.a.sett"
     r"ings; did you mean 'train.updates'\?"),
    ({"variants": {"a": {"settings": {"train.updates": "many"}}}}, {}, "train.updates must be int, got 'many'"),
    ({"variants": {"a": {"settings": {"model.width": 15}}}}, {}, "variant a, task .*model.heads must divide"),
    ({"variants": {"a": {"settings": {"seed": 1}}}}, {}, "sets seed, which is said by seeds"),
    ({"variants": {"a": {"evaluate": [{"mode": "windw"}]}}}, {}, "mode must be one of auto, recurrent, window"),
    ({"variants": {"a": {"evaluate": [{"episodes": 0}]}}}, {}, "episodes must be a positive int, got 0"),
    ({"variants": {"a": {"evaluate": [{}, {"target_scale": 1}]}}}, {}, "names an evaluation twice"),
    ({"variants": {"a": {"settings": {"model.attention": "softmax", "train.sampling": "windows"},
                         "evaluate": [{"mode": "recurrent"}]}}}, {}, "softmax attention acts in mode window alone"),
    ({"curve": {"episodes": 3}}, {}, "curve.points is missing"),
    ({"curve": {"points": 3}}, {}, "take train.checkpoint_every and train.keep_checkpoints out"),
    ({}, {"variants": ("plan",)}, r"no variant 'plan' in it; did you mean 'plain'\?"),
    ({}, {"tasks": ("hopper/medium",)}, r"no task 'hopper/medium' in it; did you mean 'hopper/medium-replay'\?"),
    ({}, {"seeds": (7,)}, "no seed 7 in it; known: 0, 1"),
])
def test_a_mistake_in_a_suite_is_one_line_that_names_it(tmp_path, changes, wanted, message):
    file = suite_of(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        read(file, Path("out"), "cpu", Wanted(**wanted))
    assert str(caught.value).startswith(f"suite {file}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "- 1", "tasks: !!python/object:os.system [x]", "a: &x 1", "{"])
def test_a_file_that_is_no_suite_is_one_line(tmp_path, content):
    (tmp_path / "suite.yaml").write_text(content)
    with pytest.raises(UserError, match="suite.yaml"):
        read(tmp_path / "suite.yaml", Path("out"), "cpu")


@pytest.mark.parametrize("file", sorted((CONFIGS / "suites").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_suites_that_come_with_the_package_can_be_read(file):
    assert read(file, Path("out"), "cpu")


@pytest.mark.parametrize("name", ["gym9", "small", "medium-replay"])
def test_the_variants_of_such_a_suite_are_the_plain_model_but_for_those_that_say_more(name):
    """Whatever the defaults are; guided is to be these, unguided these without a critic."""
    weight = {"guided": {}, "unguided": {"value_weight": 0.0}}
    for job in read(CONFIGS / "suites" / f"{name}.yaml", Path("out"), "cpu"):
        model, train = job.runs[0].config.model, job.runs[0].config.train
        said = {option: getattr(model, option) for option in PLAIN}
        critic = {option: getattr(train, option) for option in CRITIC}
        if job.variant in weight:
            assert said == OWN
            assert critic == CRITIC | weight[job.variant]
        else:
            fading = {"half_lives": model.half_lives} if job.variant == "fading" else {}
            assert said == PLAIN | fading and not train.value_weight and bool(model.fading) == bool(fading)


# what another machine made


@pytest.fixture(scope="module")
def pack(made):
    """What a report packs of the suite's runs."""
    assert cli.main(["report", str(made / "runs" / "tiny"), "--pack", str(made / "pack.json")]) == 0
    return str(made / "pack.json")


def states(told: str) -> list[str]:
    """How far each job is, as a dry run shows it."""
    return [" ".join(line.split()) for line in told.splitlines() if TASK in line]


def test_runs_that_a_pack_holds_are_not_made_again(drl, pack, tmp_path):
    shown = drl("--packed", pack)
    assert (shown.status, shown.out) == (0, f"nothing is left to do: all of it is in {pack}\n")
    assert not (tmp_path / "runs").exists()
    file = suite_of(tmp_path, seeds=[0, 1, 2], variants=TINY["variants"] | {"other": {}})
    shutil.copy(Path(pack).parent / "hopper.yaml", tmp_path)
    shown = drl("--packed", pack, "--dry-run", file=file.name)
    assert sorted(states(shown.out)) == [f"other {TASK} 3 new", f"plain {TASK} 1 new"]


@pytest.mark.parametrize(("changes", "left"), [
    ({"variants": {"plain": {"evaluate": [{}, {"episodes": 1}]}}}, ["2 new"]),  # of which there is no score
    ({"variants": {"plain": {"evaluate": [{"mode": "window", "episodes": 2, "seed": 1}]}}}, ["2 new"]),
    ({"settings": SETTINGS | {"train.log_every": 3, "train.checkpoint_every": 30}}, []),  # changes no weight
    ({"settings": {key: value for key, value in SETTINGS.items() if key != "train.checkpoint_every"},
      "curve": {"points": 3, "episodes": 1}}, []),
], ids=["more episodes", "another seed", "other saving", "a curve"])
def test_a_packed_run_is_done_when_it_has_every_last_score_that_is_asked_for(changes, left, drl, pack, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | changes))
    shown = drl("--packed", pack, "--dry-run")
    assert shown.status == 0
    assert states(shown.out) == [f"plain {TASK} {state}" for state in left]


def test_a_packed_run_of_other_settings_is_refused_by_name(drl, pack, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"settings": SETTINGS | {"train.batch_size": 5}}))
    shown = drl("--packed", pack)
    assert (shown.status, shown.out) == (2, "")
    assert shown.err == (f"drl: plain/{TASK}/seed-0 in {pack} was trained with other settings than the suite says "
                         "(train.batch_size 4 -> 5); leave that file out, or name the variant otherwise\n")


# what becomes of it


def test_each_run_is_what_it_would_be_alone(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made / "datasets"))
    config, store = read_config(folder(made, 1) / "config.yaml"), minari_files.read("drl/hopper/medium-replay-v0")
    train(config, store, tmp_path / "alone")
    assert_same_run(folder(made, 1), tmp_path / "alone")

    results = {(told["mode"], told["target_return"]): told for told in evaluation.read(folder(made, 1))}
    assert results.keys() == {("recurrent", 3600.0), ("window", 3600.0), ("recurrent", 1800.0)}
    assert {key: told["episodes"] for key, told in results.items()} == {
        ("recurrent", 3600.0): 3, ("window", 3600.0): 2, ("recurrent", 1800.0): 3
    }
    (expected,) = evaluation.evaluate(RecurrentPolicy.load(tmp_path / "alone"), mode="recurrent", step=60)
    assert without_clocks(results["recurrent", 3600.0]) == without_clocks(expected)


def test_what_a_suite_took_stands_in_its_file(made):
    rows = suite_times.read(made / "runs" / "tiny")
    counts = {(row["variant"], row["task"], row["work"], row["mode"]): row["count"] for row in rows}
    assert counts == {("plain", TASK, "training", ""): 120, ("plain", TASK, "scoring", "recurrent"): 12,
                      ("plain", TASK, "scoring", "window"): 4}
    assert all(row["seconds"] > 0 and row["cores"] == len(os.sched_getaffinity(0)) and row["versions"] for row in rows)


def test_what_is_done_is_not_done_again_and_what_is_missing_is_made_up_for(made, drl, tmp_path):
    shutil.copytree(made / "runs", tmp_path / "runs")
    before = written(tmp_path)
    result = drl()
    assert result.status == 0 and "done 0, skipped 2, failed 0" in result.out
    assert written(tmp_path) == before

    (folder(tmp_path, 1) / evaluation.FILE).unlink()
    shown = drl("--dry-run")
    assert shown.status == 0 and "1 scored, 1 done, not scored" in shown.out
    assert "rates of suite.json" in shown.out and "0 updates" in shown.out
    result = drl()
    assert result.status == 0 and "done 1, skipped 1, failed 0" in result.out
    assert f"plain  {TASK}  seed 1  trained before  score " in result.out
    assert_same_suite(tmp_path, made)


def test_a_dry_run_measures_and_writes_nothing(drl, tmp_path):
    before = written(tmp_path)
    result = drl("--dry-run")
    assert result.status == 0 and f"plain  {TASK}  2 new" in result.out
    assert "120 updates" in result.out and "16 episodes" in result.out and "measured now" in result.out
    assert written(tmp_path) == before and not (tmp_path / "runs").exists()


def test_runs_of_other_settings_are_refused_before_anything_starts(made, drl, tmp_path):
    shutil.copytree(made / "runs", tmp_path / "runs")
    changed = TINY | {"settings": SETTINGS | {"train.learning_rate": 1e-2}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(changed))
    before = written(tmp_path)
    result = drl()
    assert result.status == 2 and result.err.count("\n") == 1
    assert "seed-0 and 1 more were trained with other settings" in result.err
    assert "train.learning_rate 0.0003 -> 0.01" in result.err and "--out" in result.err
    assert written(tmp_path) == before


def test_what_fails_or_is_held_by_another_is_told_and_the_rest_goes_on(made, drl, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"seeds": [0, 1, 2, 3]}))
    shutil.copytree(made / "runs", tmp_path / "runs")
    (folder(tmp_path, 0) / evaluation.FILE).write_text("{")  # damaged
    shutil.rmtree(folder(tmp_path, 1))

    def kill_the_worker():
        while not list(folder(tmp_path, 1).glob("checkpoints/step-*")):
            time.sleep(0.001)
        (worker,) = workers(os.getpid())
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_worker, daemon=True)
    with lock.held(folder(tmp_path, 2)):
        killer.start()
        result = drl()
    killer.join(timeout=1)
    assert result.status == 2 and "done 1, skipped 0, failed 2, left to other processes 1" in result.out
    assert "seed-0 failed: evaluation file" in result.err and "2 of 4 runs failed" in result.err
    assert "seed-1 failed: the process that was to train it was ended by SIGKILL (is the memory full?)" in result.err
    assert f"is being written by process {os.getpid()}" in result.out
    assert f"plain  {TASK}  seed 3  60 updates in" in result.out


def test_missing_datasets_are_told_before_anything_starts(drl, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))
    (tmp_path / "other.yaml").write_text("dataset: mujoco/hopper/simple-v0\n")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"tasks": ["hopper.yaml", "other.yaml"]}))
    result = drl()
    assert result.status == 2 and result.err == (
        "drl: 2 datasets are not here; type: drl data collect hopper/medium-replay && drl data download "
        "mujoco/hopper/simple-v0; or add --collect\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--part", "3/2"], "--part must be I/N"), (["--part", "0/2"], "--part must be I/N"),
    (["--devices", "cpu", "cpu"], "name cpu alone, or GPUs"),
])
def test_options_that_cannot_be_are_one_line(drl, arguments, message):
    result = drl(*arguments)
    assert result.status == 2 and message in result.err and result.err.count("\n") == 1


# kills


class Suite:
    """`drl suite` in a process of its own, and its workers."""

    def __init__(self, root: Path):
        command = [sys.executable, "-m", "drl.cli", "suite", "tiny.yaml", "--devices", "cpu"]
        self.process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def when(self, condition) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.process.communicate()
            time.sleep(0.002)

    def killed(self, number: int) -> int:
        """Its status; nothing of it lives on."""
        children = workers(self.process.pid)
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        end = time.monotonic() + 20
        while any(lives(child) for child in children):
            assert time.monotonic() < end, "a worker outlived its suite"
            time.sleep(0.01)
        return self.process.returncode


def workers(pid: int) -> list[int]:
    """The workers of a process that runs a suite."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"drl.suite_work" in Path(f"/proc/{child}/cmdline").read_bytes()]


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["killed", "stopped too"])
def test_a_suite_that_is_killed_and_stopped_ends_as_if_it_had_not_been(stopped, made, drl, tmp_path):
    def is_at(seed: int, name: str):
        return lambda: (folder(tmp_path, seed) / name).exists()

    suite = Suite(tmp_path)
    suite.when(is_at(0, "checkpoints/step-00000020"))
    assert suite.killed(signal.SIGKILL) == -signal.SIGKILL
    assert not (folder(tmp_path, 0) / evaluation.FILE).exists()

    if stopped:
        suite = Suite(tmp_path)
        suite.when(is_at(0, evaluation.FILE))  # the first of three evaluations
        suite.when(is_at(1, "checkpoints/step-00000020"))
        assert suite.killed(signal.SIGTERM) == 128 + signal.SIGTERM
        step = checkpoints.load(folder(tmp_path, 1)).step
        assert 20 <= step <= 60

    result = drl()
    assert result.status == 0 and "failed 0" in result.out
    assert_same_suite(tmp_path, made)


def test_a_process_that_scores_keeps_to_its_share_of_the_cores(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made / "datasets"))
    shutil.copytree(made / "runs", tmp_path / "runs")
    (folder(tmp_path, 0) / evaluation.FILE).unlink()
    job, = read(made / "tiny.yaml", tmp_path / "runs" / "tiny", "cpu")
    cores = sorted(os.sched_getaffinity(0))
    worker, played = Worker("scoring", "cpu", ["score"], cores[len(cores) // 2:]), []
    worker.give("score", job.runs[:1])
    while worker.doing:
        wait([worker], 1)
        played += [message["machine"]["cores"] for message in worker.messages() if "played" in message]
    worker.end()
    assert played == [len(cores) - len(cores) // 2] * 3


@pytest.mark.parametrize(("cores", "training", "expected"), [
    (1, 1, [1]), (2, 1, [1]), (2, 4, [1]), (9, 1, [8]), (16, 1, [5, 5, 5]), (32, 4, [4, 5, 5, 4, 5, 5]),
])
def test_each_gpu_that_trains_keeps_a_core_from_those_that_score(cores, training, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(100, 100 + cores)))
    given = suite_work.scoring_cores(training)
    assert [len(part) for part in given] == expected
    assert sorted(core for part in given for core in part) == list(range(100 + cores - sum(expected), 100 + cores))


def test_what_scores_on_some_cores_has_as_many_threads(monkeypatch):
    used, (_, theirs) = [], multiprocessing.Pipe()
    monkeypatch.setattr(suite_work.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: used.append(set(cores)))
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(suite_work, "_serve", lambda _: None)
    suite_work._child(str(os.dup(theirs.fileno())), str(os.getppid()), "cpu", "4", "5", "6")
    assert used == [{4, 5, 6}, 3]


# what is told


def test_times_of_the_same_machine_add_up_and_of_another_do_not(tmp_path):
    suite_times.add(tmp_path, **ROW, seconds=2.0, count=10)
    suite_times.add(tmp_path, **ROW, seconds=3.0, count=20)
    suite_times.add(tmp_path, **ROW | {"device": "another"}, seconds=1.0, count=1)
    assert [(row["seconds"], row["count"]) for row in suite_times.read(tmp_path)] == [(5.0, 30), (1.0, 1)]
    path = tmp_path / suite_times.FILE
    path.write_text(path.read_text().replace("5.0", "4.0"))
    with pytest.raises(UserError, match="suite.json is damaged"):
        suite_times.read(tmp_path)


def test_scores_are_told_with_what_tells_them_apart():
    assert scores_told([[87.34, 2800.0, "recurrent", 3600.0]]) == "score 87.3 (recurrent)"
    assert scores_told([[1.0, 5.0, "window", 2.0], [None, -7.25, "window", 4.0]]) == (
        "score 1.0 (window, target 2), return -7.2 (window, target 4)"
    )


def test_durations_are_for_people():
    assert [duration(seconds) for seconds in (0, 34.4, 720, 12000)] == ["0 s", "34 s", "12 min", "3 h 20 min"]
    assert [clock(seconds) for seconds in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
