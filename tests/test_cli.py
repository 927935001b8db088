"""The command line: what works, and every mistake answered with one line that says what to type instead."""

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from test_export import edit

from drl import __main__ as command
from drl import checkpoint as checkpoints
from drl import cli, options, trees
from drl.config import Config
from drl.data import minari_files

DATASET = "drl/hopper/medium-replay-v0"
TINY = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2", "--train.updates", "6",
        "--train.batch_size", "4", "--train.log_every", "2", "--evaluate.episodes", "2", "--device", "cpu"]
VERBS = [[], ["train"], ["evaluate"], ["export"], ["data"], ["data", "collect"], ["data", "download"],
         ["data", "import-d4rl"], ["data", "show"], ["data", "list"], ["report"], ["suite"], ["benchmark"],
         ["benchmark", "step"], ["benchmark", "update"], ["benchmark", "evaluate"],
         ["benchmark", "attention"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a collected dataset, a linear run and a softmax run; nobody writes into it afterwards."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "datasets"))
        patch.chdir(folder)
        assert cli.main(["data", "collect", "hopper/medium-replay", "--steps", "2000"]) == 0
        assert cli.main(["train", "--dataset", DATASET, "--run", "linear", *TINY]) == 0
        assert cli.main(["train", "--dataset", DATASET, "--run", "softmax", *TINY, "--model.attention", "softmax",
                         "--train.sampling", "windows"]) == 0
    return folder


@pytest.fixture
def drl(made, tmp_path, monkeypatch, capfd):
    """Run `drl` in a folder of its own that holds the runs linear/ and softmax/, with the dataset at hand."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made / "datasets"))
    monkeypatch.chdir(tmp_path)
    for run in ("linear", "softmax"):
        shutil.copytree(made / run, tmp_path / run)

    def run(*arguments: str) -> SimpleNamespace:
        capfd.readouterr()
        status = cli.main(list(arguments))
        return SimpleNamespace(status=status, **capfd.readouterr()._asdict())

    return run


def process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "drl.cli", *arguments], capture_output=True, text=True)


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# mistakes

MISTAKES = {
    "no dataset": (["train"], r"no dataset; add --config configs/hopper/medium-replay.yaml, or --dataset ID"),
    "a dataset of ours that was not collected": (
        ["train", "--dataset", "drl/hopper/medium-v0"],
        r"dataset drl/hopper/medium-v0 is not on this machine; type: drl data collect hopper/medium",
    ),
    "a dataset of ours, to look at": (
        ["data", "show", "drl/hopper/expert-v0"],
        r"dataset drl/hopper/expert-v0 is not on this machine; type: drl data collect hopper/expert",
    ),
    "a malformed dataset id": (
        ["train", "--dataset", "the best"],
        r"'the best' is not a Minari id such as drl/hopper/medium-v0; known: drl/hopper/medium-replay-v0",
    ),
    "a dataset id without its version": (
        ["data", "show", "drl/hopper/medium-replay"],
        r"'drl/hopper/medium-replay' is not a Minari id such as drl/hopper/medium-v0; did you mean "
        r"'drl/hopper/medium-replay-v0'\?",
    ),
    "a path for a dataset": (
        ["train", "--dataset", "../../elsewhere-v0"], r"'../../elsewhere-v0' is not a Minari id such as .*",
    ),
    "a misspelt dataset to collect": (
        ["data", "collect", "hopper/medium-reply"],
        r"unknown dataset 'hopper/medium-reply'; did you mean 'hopper/medium-replay'\?",
    ),
    "a dataset that exists": (
        ["data", "collect", "hopper/medium-replay"],
        r"dataset drl/hopper/medium-replay-v0 exists already; add --overwrite to collect it anew",
    ),
    "no steps": (
        ["data", "collect", "hopper/random", "--steps", "0"], r"--steps must be positive, got 0",
    ),
    "steps that are no number": (
        ["data", "collect", "hopper/random", "--steps", "many"], r".*\bsteps\b.*\bint\b.*\bmany\b.*",
    ),
    "an unknown config key": (
        ["train", "--dataset", DATASET, "--train.learnin_rate", "1"],
        r"unknown option or config key 'train.learnin_rate'; did you mean 'train.learning_rate'\?",
    ),
    "a config key without its group": (
        ["train", "--dataset", DATASET, "--learning_rate", "1"],
        r"unknown option or config key 'learning_rate'; did you mean 'train.learning_rate'\?",
    ),
    "an unknown config key in a file": (
        ["train", "--config", "unknown_key.yaml"],
        r"unknown_key.yaml: unknown config key 'train.learnin_rate'; did you mean 'train.learning_rate'\?",
    ),
    "an unknown group in a file": (
        ["train", "--config", "unknown_group.yaml"],
        r"unknown_group.yaml: unknown config key 'modle'; did you mean 'model'\?",
    ),
    "a config file that is no YAML": (["train", "--config", "broken.yaml"], r".*broken\.yaml.*"),
    "a config file that is not there": (
        ["train", "--config", "configs/hopper/nowhere.yaml"], r".*configs/hopper/nowhere\.yaml.*",
    ),
    "a wrong type": (
        ["train", "--dataset", DATASET, "--train.updates", "many"], r"train.updates must be int, got 'many'",
    ),
    "a wrong type in a file": (
        ["train", "--config", "wrong_type.yaml"], r"wrong_type.yaml: train.updates must be int, got 'many'",
    ),
    "a value out of range": (
        ["train", "--dataset", DATASET, "--train.updates", "0"], r"train.updates must be positive, got 0",
    ),
    "an unknown choice": (
        ["train", "--dataset", DATASET, "--train.sampling", "window"],
        r".*train\.sampling.*state_passing.*windows.*",
    ),
    "a misspelt environment": (
        ["train", "--dataset", DATASET, "--environment", "Hoper-v5"],
        r"unknown environment 'Hoper-v5'; did you mean 'Hopper-v5'\?",
    ),
    "an environment of other dimensions": (
        ["train", "--dataset", DATASET, "--environment", "Walker2d-v5"],
        r"dataset drl/hopper/medium-replay-v0 has observations of dimension 11 and actions of dimension 3, but "
        r"Walker2d-v5 has 17 and 6; use --environment Hopper-v5",
    ),
    "an environment of discrete actions": (
        ["train", "--dataset", DATASET, "--environment", "CartPole-v1"],
        r"environment CartPole-v1 has action_space Discrete\(2\); flat Box spaces are needed",
    ),
    "a device that is not there": (
        ["train", "--dataset", DATASET, "--device", "cuda:99"],
        r"device 'cuda:99' is not available \(.+\); use --device cpu",
    ),
    "a device that is unknown": (
        ["evaluate", "linear", "--device", "gpu"], r"device 'gpu' is not available \(.+\); use --device cpu",
    ),
    "softmax with state passing": (
        ["train", "--dataset", DATASET, "--model.attention", "softmax"],
        r"model.attention softmax has no state to pass; add --train.sampling windows, or use linear attention",
    ),
    "a run folder already there": (
        ["train", "--dataset", DATASET, "--run", "linear"],
        r"linear already holds a run; add --resume to go on with it, or name another folder with --run",
    ),
    "going on with another config": (
        ["train", "--dataset", DATASET, "--run", "linear", "--resume", *TINY, "--seed", "1"],
        r"linear was trained with another config \(seed 0 -> 1\); repeat the options of the first command, or type: "
        r"drl train --resume --run linear",
    ),
    "a seed and several": (
        ["train", "--dataset", DATASET, "--seed", "1", "--seeds", "2", "3"],
        r"--seed 1 and --seeds 2 3 say different things; leave one of them out",
    ),
    "a seed named twice": (
        ["train", "--dataset", DATASET, "--seeds", "2", "3", "2"], r"--seeds names a seed twice: 2 3 2; name each once",
    ),
    "a seed that is no number": (["train", "--dataset", DATASET, "--seeds", "a"], r"seeds must be int, got 'a'"),
    "seeds into a run": (
        ["train", "--dataset", DATASET, "--run", "linear", "--seeds", "2", "3"],
        r"linear is itself a run, but with --seeds it would hold runs; name the folder above it",
    ),
    "going on with nothing": (
        ["train", "--resume", "--run", "nowhere"],
        r"no dataset; add --config configs/hopper/medium-replay.yaml, or --dataset ID",
    ),
    "no checkpoint in the folder": (
        ["evaluate", "nowhere"],
        r"no checkpoint in nowhere; name a run such as .*, or type: drl train --config configs/hopper/\S+\.yaml",
    ),
    "a checkpoint in an environment of other dimensions": (
        ["evaluate", "linear", "--environment", "Walker2d-v5"],
        r"the checkpoint has observations of dimension 11 and actions of dimension 3, but Walker2d-v5 has 17 and 6; "
        r"use --environment Hopper-v5",
    ),
    "a misspelt environment to evaluate in": (
        ["evaluate", "linear", "--environment", "Hoper-v5"],
        r"unknown environment 'Hoper-v5'; did you mean 'Hopper-v5'\?",
    ),
    "softmax in recurrent mode": (
        ["evaluate", "softmax", "--mode", "recurrent"],
        r"model.attention softmax has no recurrent step; use --mode window \(WindowPolicy\)",
    ),
    "a misspelt mode": (
        ["evaluate", "linear", "--mode", "recurent"], r"mode must be one of auto, recurrent, window, got 'recurent'",
    ),
    "no episodes": (["evaluate", "linear", "--episodes", "0"], r"evaluate.episodes must be positive, got 0"),
    "a misspelt option": (
        ["evaluate", "linear", "--episods", "3"], r"unknown option or config key 'episods'; did you mean 'episodes'\?",
    ),
    "a run to export that is not there": (["export", "nowhere", "policy"], r"no checkpoint in nowhere; .*drl train .*"),
    "a softmax run to export": (
        ["export", "softmax", "policy"],
        r"model.attention softmax has no recurrent step to export; act with the run itself: drl evaluate softmax",
    ),
    "a run to export over": (
        ["export", "linear", "softmax", "--overwrite"],
        r"softmax is there already and is no exported policy; name another folder",
    ),
    "a misspelt format": (
        ["export", "linear", "policy", "--formats", "onx"],
        r"formats must be one of safetensors, pt2, onnx, got 'onx'",
    ),
    "no folder to export to": (["export", "linear"], r"folder is missing; type: drl export --help"),
    "no run to evaluate": (["evaluate"], r".*\brun\b.*"),
    "a misspelt verb": (["trian"], r"unknown choice 'trian'; did you mean 'train'\?"),
    "a misspelt verb of data": (["data", "colect"], r"unknown choice 'colect'; did you mean 'collect'\?"),
    "no verb": ([], r".*train.*evaluate.*export.*data.*report.*benchmark.*"),
    "no verb of data": (["data"], r".*collect.*show.*list.*"),
    "nothing to report": (["report", "nowhere"], r"no evaluated run under nowhere; type: drl evaluate runs/\S+"),
}
JARGON = ("Parser key", "Union subtypes", "<class", "typing.", "<unicode string>", "data.verb", "show.id")
FILES = {
    "unknown_key.yaml": f"dataset: {DATASET}\ntrain:\n  learnin_rate: 1e-4\n",
    "unknown_group.yaml": f"dataset: {DATASET}\nmodle:\n  width: 16\n",
    "wrong_type.yaml": f"dataset: {DATASET}\ntrain:\n  updates: many\n",
    "broken.yaml": f"dataset: {DATASET}\ntrain: [\n",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line(drl, tmp_path, name):
    arguments, expected = MISTAKES[name]
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    before = contents(tmp_path)

    result = drl(*arguments)

    assert result.status == 2
    assert len(result.err.splitlines()) == 1
    assert re.fullmatch(f"drl: {expected}", result.err.rstrip("\n")), result.err
    assert not [word for word in JARGON if word in result.err], "the parser's insides are no help"
    assert contents(tmp_path) == before


def contents(folder) -> dict:
    """All files but the locks, which name the last process that held them."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def one_line(result) -> str:
    assert result.status == 2
    (line,) = result.err.splitlines()
    return line


def test_downloading_without_the_extra_names_it(drl, monkeypatch):
    for library in ("huggingface_hub", "google.cloud", "google.cloud.storage"):
        monkeypatch.setitem(sys.modules, library, None)
    for module in [name for name in sys.modules if name.startswith("minari.storage.remotes.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr("drl.data.minari_remote._unreachable", lambda: "")
    line = one_line(drl("train", "--dataset", "mujoco/hopper/medium-v0"))
    assert line == "drl: downloading mujoco/hopper/medium-v0 needs an extra; type: pip install 'drl[download]'"


def test_a_download_that_fails_is_answered_in_one_line(drl, monkeypatch):
    def fails(dataset_id):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr("drl.data.minari_remote._unreachable", lambda: "")
    monkeypatch.setattr("minari.download_dataset", fails)
    for verb in (["data", "download"], ["data", "show"], ["train", "--dataset"]):
        line = one_line(drl(*verb, "mujoco/hopper/medium-replay-v0"))
        assert line == (
            "drl: dataset mujoco/hopper/medium-replay-v0 is not on this machine and could not be downloaded "
            "(ConnectionError: no route to host second line); make a dataset here (drl data collect --help), or name "
            "the folder of one that you have (export MINARI_DATASETS_PATH=FOLDER) or another server (export "
            "MINARI_REMOTE=...); did you mean 'drl/hopper/medium-replay-v0'?"
        )


def test_a_download_says_where_it_went_and_what_to_type_next(drl, made, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setattr("drl.data.minari_remote._unreachable", lambda: "")
    dataset = "mujoco/hopper/medium-replay-v0"
    monkeypatch.setattr("minari.download_dataset", lambda dataset: shutil.copytree(
        made / "datasets" / DATASET, minari_files.root() / dataset))
    where = [f"folder      {tmp_path}/datasets/{dataset}", f"look        drl data show {dataset}",
             f"train       drl train --dataset {dataset}"]
    assert drl("data", "download", dataset).out.splitlines() == where
    again = drl("data", "download", dataset)
    assert again.status == 0
    assert again.out.splitlines() == [f"{dataset} is here already; add --overwrite to download it anew", *where]
    assert drl("data", "download", dataset, "--overwrite").out.splitlines() == where


def test_a_figure_without_matplotlib_names_the_extra(drl, monkeypatch):
    assert drl("evaluate", "linear").status == 0
    for library in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, library, None)
    line = one_line(drl("report", "linear", "--figure", "scores.png"))
    assert line == "drl: --figure needs matplotlib; type: pip install 'drl[report]'"
    assert drl("report", "linear").status == 0, "a table alone needs none"


def test_a_damaged_checkpoint_is_answered_in_one_line(drl, tmp_path):
    (tmp_path / "linear" / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"")
    assert "model.safetensors does not match manifest.json" in one_line(drl("evaluate", "linear"))


@pytest.mark.parametrize("text", ["dataset: [", "seed: 3", "dataset: a/b-v0\nseed: many", "- 1", ""])
def test_a_damaged_config_of_a_run_is_answered_in_one_line(drl, tmp_path, text):
    (tmp_path / "linear" / "config.yaml").write_text(text)
    assert "drl: " in one_line(drl("train", "--resume", "--run", "linear"))


@pytest.mark.parametrize(
    "options", [["--train.updates", "9"], ["--seed", "1"], ["--model.dropout", "0.2"]], ids=" ".join
)
def test_options_are_not_ignored_when_a_run_goes_on(drl, options):
    """The config found in the run differs from what was typed: that is said, not passed over."""
    line = one_line(drl("train", "--resume", "--run", "linear", *options))
    assert options[0].removeprefix("--") in line


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["trian"], 2, r"drl: unknown choice 'trian'; did you mean 'train'\?\n"),
        (["evaluate", "nowhere"], 2, r"drl: no checkpoint in nowhere; .*\n"),
        (["data", "list"], 0, ""),
    ],
    ids=["a misspelt verb", "no checkpoint", "no mistake"],
)
def test_the_process_ends_with_the_status_and_no_traceback(arguments, status, expected):
    result = process(*arguments)
    assert result.returncode == status
    assert re.fullmatch(expected, result.stderr), result.stderr


def test_the_command_is_this_one():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="drl")
    assert entry.load() is command.main


def test_an_interrupt_is_no_traceback(drl, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "train", interrupted)
    result = drl("train", "--dataset", DATASET)
    assert (result.status, result.err) == (130, "drl: stopped by SIGINT\n")


# what works


def test_a_collected_dataset_is_listed_and_shown(drl):
    listed = drl("data", "list")
    assert listed.status == 0
    assert re.search(rf"^  {DATASET} +\d+ steps +\d+ episodes", listed.out, re.M)
    assert re.search(r"^  drl/hopper/expert-v0 +1000000 steps +drl data collect hopper/expert$", listed.out, re.M)

    shown = drl("data", "show", DATASET)
    assert shown.status == 0
    size = re.search(r"^size +(\d+) episodes, (\d+) steps, ", shown.out, re.M)
    assert int(size[1]) > 1 and 2000 <= int(size[2]) < 3000
    assert "environment Hopper-v5" in shown.out and re.search("^score +mean", shown.out, re.M)


def test_training_fills_the_run_folder(made):
    run = made / "linear"
    assert checkpoints.find(run).name == "step-00000006"
    assert [line["step"] for line in metrics(run)] == [2, 4, 6]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["dataset"], config["environment"], config["device"]) == (DATASET, "Hopper-v5", "cpu")
    assert (config["model"]["width"], config["train"]["updates"]) == (16, 6)
    assert len(config["evaluate"]["target_returns"]) == 1
    assert list(run.glob("events.out.tfevents.*"))


def test_the_run_folder_is_named_after_the_dataset_and_the_seed(drl, tmp_path):
    result = drl("train", "--dataset", DATASET, *TINY, "--train.updates", "1", "--seed", "3")
    assert result.status == 0
    assert checkpoints.load(tmp_path / "runs" / "hopper" / "medium-replay" / "seed-3").step == 1
    assert "drl evaluate runs/hopper/medium-replay/seed-3" in result.out


@pytest.mark.parametrize(("options", "parent"), [([], "runs/hopper/medium-replay"), (["--run", "here"], "here")])
def test_seeds_are_trained_into_a_folder_each_and_go_on(drl, tmp_path, options, parent):
    result = drl("train", "--dataset", DATASET, *TINY, "--train.updates", "2", "--seeds", "3", "5", *options)
    assert result.status == 0
    for seed in (3, 5):
        saved = checkpoints.load(tmp_path / parent / f"seed-{seed}")
        assert (saved.step, saved.config.seed) == (2, seed)
        assert f"drl evaluate {parent}/seed-{seed}\n" in result.out
    shutil.rmtree(tmp_path / parent / "seed-5" / "checkpoints")
    assert drl("train", "--resume", "--run", parent, "--seeds", "3", "5").status == 0
    assert checkpoints.load(tmp_path / parent / "seed-5").step == 2


def test_a_config_file_trains_and_the_command_line_wins(drl, tmp_path):
    (tmp_path / "a.yaml").write_text(f"dataset: {DATASET}\ntrain: {{updates: 1, learning_rate: 1e-5}}\n")
    assert drl("train", "--config", "a.yaml", *TINY, "--train.updates", "2", "--run", "a").status == 0
    config = checkpoints.load(tmp_path / "a").config
    assert (config.train.updates, config.train.learning_rate, config.model.width) == (2, 1e-5, 16)


def test_a_run_goes_on_by_its_folder_alone(drl, tmp_path):
    shutil.rmtree(tmp_path / "linear" / "checkpoints" / "step-00000006")
    result = drl("train", "--resume", "--run", "linear")
    assert result.status == 0
    assert checkpoints.load(tmp_path / "linear").step == 6
    assert [line["step"] for line in metrics(tmp_path / "linear")] == [2, 4, 6]


def test_a_run_goes_on_by_the_first_command(drl, tmp_path):
    before = checkpoints.load(tmp_path / "linear")
    assert drl("train", "--dataset", DATASET, "--run", "linear", *TINY, "--resume").status == 0
    assert checkpoints.load(tmp_path / "linear").config == before.config


def test_an_evaluation_is_json_with_every_episode(drl, tmp_path):
    result = drl("evaluate", "linear", "--json", "--episodes", "3", "--seed", "11")
    assert result.status == 0
    scored = json.loads(result.out)
    assert (scored["environment"], scored["dataset"], scored["step"]) == ("Hopper-v5", DATASET, 6)
    assert (scored["mode"], scored["episodes"], scored["seeds"]) == ("recurrent", 3, [11, 12, 13])
    assert len(scored["returns"]) == len(scored["lengths"]) == 3
    assert scored["return_mean"] == pytest.approx(sum(scored["returns"]) / 3)
    score = 100 * (scored["return_mean"] + 20.272305) / (3234.3 + 20.272305)
    assert scored["normalized_score"] == pytest.approx(score)
    assert scored["target_return"] == checkpoints.load(tmp_path / "linear").config.evaluate.target_returns[0]


def test_an_evaluation_is_kept_beside_the_run(drl, tmp_path):
    recurrent = json.loads(drl("evaluate", "linear", "--json").out)
    window = json.loads(drl("evaluate", "linear", "--json", "--mode", "window").out)

    assert (recurrent["mode"], window["mode"]) == ("recurrent", "window")
    stored = json.loads((tmp_path / "linear" / "evaluation.json").read_text())["results"]
    assert stored == [recurrent, window]
    logged = [line for line in metrics(tmp_path / "linear") if "eval/normalized_score" in line]
    assert [(line["step"], line["eval/normalized_score"]) for line in logged] == [
        (6, recurrent["normalized_score"]), (6, window["normalized_score"])
    ]


def test_the_same_evaluation_gives_the_same_returns_and_one_entry(drl, tmp_path):
    one, two = (json.loads(drl("evaluate", "linear", "--json").out) for _ in range(2))
    assert one["returns"] == two["returns"]
    assert len(json.loads((tmp_path / "linear" / "evaluation.json").read_text())["results"]) == 1


def test_a_checkpoint_is_evaluated_without_leaving_a_trace(drl, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = drl("evaluate", "linear/checkpoints/step-00000006", "--target_return", "100")
    assert result.status == 0
    assert re.search(r"^Hopper-v5 +recurrent +100 +2 ", result.out, re.M)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_exported_policy_scores_what_its_run_scores_and_is_left_alone(drl, tmp_path):
    expected = json.loads(drl("evaluate", "linear", "--json").out)
    result = drl("export", "linear", "policy")
    assert result.status == 0 and not result.err
    for path in (tmp_path / "policy").iterdir():
        assert re.search(rf"^{path.name} +{path.stat().st_size:,} bytes$", result.out, re.M)
    assert "drl evaluate policy\n" in result.out and "drl.RecurrentPolicy.load('policy')" in result.out
    before = {path: path.read_bytes() for path in (tmp_path / "policy").iterdir()}

    exported = json.loads(drl("evaluate", "policy", "--json").out)

    assert exported["returns"] == expected["returns"]
    assert {path: path.read_bytes() for path in (tmp_path / "policy").iterdir()} == before
    (stored,) = json.loads((tmp_path / "policy" / "config.json").read_text())["scores"]["evaluations"]
    assert stored["normalized_score"] == expected["normalized_score"]

    edit(tmp_path / "policy", "trace.safetensors", lambda tensors: tensors | {"actions": tensors["actions"] + 0.1})
    assert "the policy in policy does not do what its golden trace says" in one_line(drl("evaluate", "policy"))


def test_a_softmax_run_is_evaluated_by_window(drl):
    assert json.loads(drl("evaluate", "softmax", "--json").out)["mode"] == "window"


def test_evaluated_runs_are_reported(drl):
    for run in ("linear", "softmax"):
        assert drl("evaluate", run).status == 0
    result = drl("report", ".")
    assert result.status == 0
    rows = [line for line in result.out.splitlines() if re.match(r"\| (linear|softmax), ", line)]
    assert any("| recurrent |" in row for row in rows) and any("softmax" in row and "| window |" in row for row in rows)
    packed = drl("report", ".", "--pack", "pack.json", "--write", "page")
    assert packed.status == 0 and drl("report", "pack.json").out == result.out


# help


def help_of(verb: list[str], capfd) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*verb, "--help"])
    assert not end.value.code
    return " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help(verb, capfd):
    text = help_of(verb, capfd)
    assert text.startswith("usage: drl")
    assert not re.search(r" at 0x[0-9a-f]+|<function|<class", text), "an object's address is no help"


def parsers(parser=None, path=()):
    """Every (verb, parser) of the command line, asked from the parser itself."""
    parser = parser or options.build()
    yield list(path), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from parsers(child, (*path, name))


def test_no_verb_is_missing_from_these_tests():
    assert sorted(path for path, _ in parsers()) == sorted(VERBS)


def test_every_option_says_what_it_means_and_its_default(capfd):
    for verb, parser in parsers():
        with pytest.raises(SystemExit):
            cli.main([*verb, "--help"])
        entries = re.split(r"\n(?=  -)|\n\n", capfd.readouterr().out)
        for action in parser._actions:
            name = next((name for name in action.option_strings if name.startswith("--")), "")
            if name in ("", "--help", "--config", "--print_config"):
                continue
            entry = next((entry for entry in entries if entry.startswith(f"  {name}")), "")
            assert "default:" in entry and len(action.help) > 10, f"{' '.join(verb)} {name}"


def test_help_of_train_names_every_config_key_its_units_and_defaults(capfd):
    text = help_of(["train"], capfd)
    assert not [key for key in trees.keys(Config) if f"--{key}" not in text]
    for words in ("gradient updates, 100000000 at most (type: int, default: 20000)", "environment steps per chunk",
                  "in the environment's units", "updates between two checkpoints", "default: state_passing",
                  "type: float, default: 0.0003", "default: runs/<env>/<tier>/seed-<n>"):
        assert words in text


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (["evaluate"], ["episodes (default: the run's config)", "in the environment's units",
                        "seed + i (default: the run's config)", "default: auto"]),
        (["data", "collect"], ["environment steps at least", "default: D4RL's size, 200k to 2M", "default: 0"]),
        (["data", "show"], ["in the environment's units", "PNG", "drl[report]"]),
        (["export"], ["golden trace of 100 steps", "drl[onnx]", "default: ['safetensors']"]),
        (["report"], ["PNG", "drl[report]"]),
        (["benchmark", "step"], ["Microseconds per action", "default: 10000"]),
        (["benchmark", "update"], ["Milliseconds per gradient update", "default: 50"]),
        (["benchmark", "evaluate"], ["Environment steps per second", "default: Hopper-v5"]),
        (["benchmark", "attention"], ["microseconds per call", "10^6 bytes", "default: auto"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 3 else "",
)
def test_help_names_units_and_defaults(verb, words, capfd):
    text = help_of(verb, capfd)
    assert not [word for word in words if word not in text]
