"""A table says what the runs' own JSON says, and nothing else."""

import builtins
import json
import re

import pytest
import yaml

from drl.config import Config, ModelConfig, TrainConfig
from drl.errors import UserError
from drl.evaluate import store_failure
from drl.faults import EvaluationFailed, Fault
from drl.report import report

DATASET = "drl/hopper/medium-v0"


def finished(root, variant, seed, score, mode="recurrent", step=8, mujoco="4.0.0", **model):
    """A run folder as `drl train` and `drl evaluate` leave it."""
    run = root / variant / f"seed-{seed}"
    run.mkdir(parents=True)
    sampling = "state_passing" if mode == "recurrent" else "windows"
    config = Config(dataset=DATASET, seed=seed, model=ModelConfig(**model), train=TrainConfig(sampling=sampling))
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    result = {
        "environment": "Hopper-v5", "seeds": [7, 8, 9],
        "dataset": DATASET, "seed": seed, "step": step, "mode": mode, "target_return": 3600.0, "episodes": 3,
        "normalized_score": score, "versions": {"mujoco": mujoco, "torch": "2.13.0"},
    }
    earlier = result | {"step": step - 1, "normalized_score": 99.0}
    (run / "evaluation.json").write_text(json.dumps({"format": 1, "results": [earlier, result]}))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "train/loss": 1 / i}) + "\n" for i in (1, 2, 4)))
    return run


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:5] == "| drl"]


def test_a_row_is_the_mean_over_seeds_of_the_final_checkpoint(tmp_path):
    for seed, score in enumerate((40.0, 50.0, 63.0)):
        finished(tmp_path, "linear", seed, score)
    finished(tmp_path, "softmax", 0, 30.0, mode="window", attention="softmax")

    best, other = cells(report(tmp_path))

    assert best == [DATASET, "linear, state passing", "recurrent", "8", "3600", "3 x 3", "**51.0**", "40.0 to 63.0",
                    "40.0, 50.0, 63.0"]
    assert other == [DATASET, "softmax, windows of 20", "window", "8", "3600", "1 x 3", "**30.0**", "30.0 to 30.0",
                     "30.0"]


def failed(run, step=8, finished=1):
    asked = {"environment": "Hopper-v5", "target_return": 3600.0, "episodes": 3, "seed": 7, "finished": finished}
    store_failure(EvaluationFailed(Fault("Hopper-v5 fell over"), **asked), run, step, "recurrent")


def test_an_evaluation_that_failed_is_counted_and_its_run_is_not_scored_by_an_earlier_step(tmp_path):
    finished(tmp_path, "linear", 0, 40.0)
    for seed in (1, 2):
        failed(finished(tmp_path, "linear", seed, 50.0), step=9, finished=seed)

    told = report(tmp_path)

    (row,) = cells(told)
    assert row[5:] == ["1 x 3", "**40.0**", "40.0 to 40.0", "40.0"]
    assert "Evaluations that failed and are in no cell, 2:\n" in told
    assert [re.sub(r", [-\dT:+]+: ", ", WHEN: ", line) for line in told.splitlines() if line.startswith("- ")] == [
        f"- {tmp_path}/linear/seed-{seed}: step 9, recurrent, target 3600, {seed} of 3 episodes finished, WHEN: "
        "Hopper-v5 fell over"
        for seed in (1, 2)
    ]


def test_where_every_evaluation_failed_there_is_no_table(tmp_path):
    failed(finished(tmp_path, "linear", 0, 40.0), step=9)
    with pytest.raises(UserError) as caught:
        report(tmp_path)
    assert re.fullmatch(rf"no scored run under {tmp_path}, and evaluations that failed, 1; {tmp_path}/linear/seed-0: "
                        r"step 9, recurrent, target 3600, 1 of 3 episodes finished, \S+: Hopper-v5 fell over",
                        str(caught.value))


def test_runs_that_differ_in_an_option_do_not_share_a_row(tmp_path):
    finished(tmp_path, "a", 0, 40.0)
    finished(tmp_path, "b", 0, 50.0, dropout=0.1)
    assert [row[1] for row in cells(report(tmp_path))] == [
        "linear, state passing, model.dropout 0.1", "linear, state passing"
    ]


def test_scores_of_different_physics_do_not_share_a_table(tmp_path):
    finished(tmp_path, "a", 0, 40.0)
    finished(tmp_path, "b", 1, 50.0, mujoco="3.4.0")
    with pytest.raises(UserError, match=r"scored with MuJoCo 3\.4\.0 and 4\.0\.0: different physics"):
        report(tmp_path)


def test_a_folder_without_scores_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"^no evaluated run under .*; type: drl evaluate runs/"):
        report(tmp_path)


def test_the_figure_is_a_picture(tmp_path):
    finished(tmp_path, "linear", 0, 40.0)
    finished(tmp_path, "linear", 1, 45.0)
    report(tmp_path, figure=tmp_path / "figures" / "scores.png")
    assert (tmp_path / "figures" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    finished(tmp_path, "linear", 0, 40.0)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"^--figure needs matplotlib; type: pip install 'drl\[report\]'$"):
        report(tmp_path, figure=tmp_path / "scores.png")
