"""A page says what the runs' own JSON says, and nothing else; numbers small enough to redo by hand."""

import builtins
import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from toys import OWN, PLAIN

from drl import figures, intact, options, report_pack, scores
from drl.config import Config, EvaluateConfig, ModelConfig, TrainConfig
from drl.config_files import BEFORE, read_config, write_config
from drl.errors import UserError
from drl.evaluate import store, store_failure
from drl.faults import EvaluationFailed, Fault
from drl.report import report
from drl.report_pack import thinned
from drl.report_runs import gather

ROOT = Path(__file__).parents[1]
TARGETS = {"hopper": ("Hopper-v5", 3600.0), "walker2d": ("Walker2d-v5", 5000.0),
           "halfcheetah": ("HalfCheetah-v5", 12000.0)}


def finished(root, place, score, task="hopper/medium", mode="recurrent", updates=8, train={}, **model):
    """A run folder `root`/`place`/seed-<n> for each score, as `drl train` and `drl evaluate` leave it; the last one.
    Of the plain model, but for what `train` and `model` say."""
    environment, target = TARGETS[task.partition("/")[0]]
    for seed, one in enumerate(score if isinstance(score, list) else [score]):
        run = root / place / f"seed-{seed}"
        run.mkdir(parents=True)
        sampling = "windows" if model.get("attention") == "softmax" else "state_passing"
        write_config(run / "config.yaml", Config(
            dataset=f"drl/{task}-v0", environment=environment, seed=seed, model=ModelConfig(**PLAIN | model),
            train=TrainConfig(precision="float32", updates=updates,
                              **{"sampling": sampling, "value_weight": 0.0} | train),
            evaluate=EvaluateConfig(target_returns=[target], episodes=3)))
        scored(run, one, mode=mode, step=updates)
        lines = ({"step": step, "train/loss": 1 / step} for step in (1, 2, 4))
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def scored(run, score, mode="recurrent", step=8, target=None, episodes=3, first=7, mujoco="4.0.0", spread=1.0):
    """Put a result into a run: episodes that score `score` in the mean."""
    config = read_config(run / "config.yaml")
    reference = scores.reference(config.environment)
    each = score + spread * np.linspace(-1, 1, episodes)
    returns = reference.random + each / 100 * (reference.expert - reference.random)
    store([{
        "environment": config.environment, "dataset": config.dataset, "seed": config.seed, "step": step, "mode": mode,
        "target_return": target or config.evaluate.target_returns[0], "episodes": episodes,
        "normalized_score": float(scores.normalized_score(returns, reference).mean()), "returns": returns.tolist(),
        "versions": {"mujoco": mujoco, "torch": "2.13.0"}, "seeds": list(range(first, first + episodes)),
    }], run)


def failed(run, step=8, finished=1):
    asked = {"environment": "Hopper-v5", "target_return": 3600.0, "episodes": 3, "seed": 7, "finished": finished}
    store_failure(EvaluationFailed(Fault("Hopper-v5 fell over"), **asked), run, step, "recurrent")


def tables(page: str) -> list[list[list[str]]]:
    """The cells of each table of a page, header first, rules left out."""
    found = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[row for row in table if set(row[0]) != {"-"}] for table in found if table]


def cells(page: str) -> list[list[str]]:
    """The rows of the first table."""
    return tables(page)[0][1:]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two variants of three seeds on three tasks, with all that figures can show."""
    root, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for variant, model in {"recurrent": OWN, "softmax": {"attention": "softmax", "dropout": 0.1}}.items():
        main = "window" if variant == "softmax" else "recurrent"
        for task in ("walker2d/medium", "hopper/medium-expert", "halfcheetah/medium-replay"):
            last = finished(root, f"{variant}/{task}", rng.uniform(20, 90, 3).tolist(), task, main, **model)
            for run in sorted(last.parent.iterdir()):
                scored(run, rng.uniform(20, 90), mode=main, step=4, episodes=2)
                scored(run, rng.uniform(20, 90), mode=main, target=1000.0, episodes=2)
                if variant == "recurrent":
                    scored(run, rng.uniform(20, 90), mode="window")
    gpu, cpu = {"work": "training", "device": "H200", "cores": 16}, {"work": "scoring", "device": "EPYC", "cores": 16}
    rows = [{"variant": "recurrent", "task": "hopper/medium", "seconds": 3000.0} | gpu,
            {"variant": "softmax", "task": "hopper/medium", "seconds": 5000.0} | gpu,
            {"variant": "softmax", "task": "hopper/medium", "seconds": 60.5} | cpu]
    intact.write_sealed(root / "suite.json", {"format": 1, "rows": rows})
    return root


# the table


def test_a_cell_is_the_mean_over_seeds_of_the_final_checkpoint_with_half_its_interval(tmp_path):
    scored(finished(tmp_path, "ours", [40.0, 60.0]), 99.0, step=7)
    finished(tmp_path, "softmax", 30.0, mode="window", attention="softmax")

    header, best, other = tables(report(tmp_path))[0]

    assert header == ["variant", "acted", "hopper<br>medium", "interquartile mean"]
    # of four draws of two seeds one is 40 and one is 60, so the interval reaches from 40 to 60
    assert best == ["ours", "recurrent", "**50.0 ± 10.0**", "**50.0 ± 10.0**"]
    assert other == ["softmax", "window", "30.0 (1 seed)", "30.0"], "one seed has no interval"


def test_tasks_stand_in_d4rls_order_others_after_then_average_and_interquartile_mean(tmp_path):
    for task, score in {"hopper/random": 1.0, "walker2d/medium": 5.0, "hopper/medium-expert": 8.0,
                        "hopper/medium-replay": 9.0, "halfcheetah/medium-expert": 77.0}.items():
        finished(tmp_path, f"a/{task}", [score, score], task)

    header, row = tables(report(tmp_path))[0]

    assert [name.replace("<br>", "/") for name in header] == [
        "variant", "acted", "halfcheetah/medium-expert", "hopper/medium-replay", "hopper/medium-expert",
        "walker2d/medium", "hopper/random", "average", "interquartile mean"]
    assert row[2:] == ["77.0 ± 0.0", "9.0 ± 0.0", "8.0 ± 0.0", "5.0 ± 0.0", "1.0 ± 0.0", "20.0 ± 0.0", "7.3 ± 0.0"]


def test_missing_cells_and_fewer_seeds_are_said_and_an_average_needs_all_tasks(tmp_path):
    finished(tmp_path, "a/hopper/medium", [40.0, 60.0])
    finished(tmp_path, "a/walker2d/medium", [20.0], "walker2d/medium")
    finished(tmp_path, "b/hopper/medium", [90.0, 90.0], dropout=0.1)

    page = report(tmp_path)

    assert cells(page) == [
        ["a", "recurrent", "50.0 ± 10.0", "**20.0** (1 seed)", "**35.0 ± 5.0**", "**40.0 ± 6.7**"],
        ["b", "recurrent", "**90.0 ± 0.0**", "none", "–", "–"],
    ]
    assert "A dash: not all tasks are there." in page


def test_the_average_and_its_interval_are_those_of_the_simple_loop(grid):
    values = {}
    for path in (grid / "softmax").rglob("evaluation.json"):
        told = json.loads(path.read_text())["results"]
        (final,) = (r["normalized_score"] for r in told if r["step"] == 8 and r["target_return"] > 2000)
        values.setdefault(path.parent.parent, []).append(final)
    rng = np.random.default_rng(1)
    draws = [np.mean([np.mean(rng.choice(seeds, 3)) for seeds in values.values()]) for _ in range(4000)]

    (average,) = (row[-2].strip("*") for row in cells(report(grid)) if row[0] == "softmax")
    mean, half = map(float, average.split(" ± "))

    assert mean == round(np.mean(list(values.values())), 1)
    assert half == pytest.approx(np.ptp(np.percentile(draws, [2.5, 97.5])) / 2, rel=0.06)  # 4000 draws: 2% either side


def test_both_acting_modes_of_a_checkpoint_are_rows(tmp_path):
    scored(finished(tmp_path, "ours", 40.0), 30.0, mode="window")
    assert [row[1:3] for row in cells(report(tmp_path))] == [["recurrent", "**40.0**"], ["window", "30.0"]]


def test_other_targets_and_fewer_episodes_are_in_no_cell(tmp_path):
    run = finished(tmp_path, "ours", 40.0)
    scored(run, 80.0, target=1800.0, episodes=9)
    scored(run, 90.0, episodes=2)
    scored(run, 50.0, episodes=4)
    assert [row[2] for row in cells(report(tmp_path))] == ["50.0"]


def test_a_run_that_is_not_finished_takes_no_finished_ones_place(tmp_path):
    run = finished(tmp_path, "ours", [40.0, 60.0])
    (run / "evaluation.json").unlink()
    scored(run, 20.0, step=4)

    page = report(tmp_path)

    assert [row[:3] for row in cells(page)] == [
        ["ours, 8 updates", "recurrent", "**40.0**"], ["ours, 4 updates", "recurrent", "20.0"]]
    assert "ours, 4 updates: scored after 4 updates of 8, unfinished." in page


def test_seeds_scored_by_different_numbers_of_episodes_are_told(tmp_path):
    scored(finished(tmp_path, "ours", [40.0, 60.0]), 60.0, episodes=9)
    assert "ours: some seeds are scored by 3 and some by 9 episodes." in report(tmp_path)


def test_a_folder_of_one_kind_gives_its_name_one_of_several_kinds_none(tmp_path):
    finished(tmp_path, "mixed/one", 40.0)
    finished(tmp_path, "mixed/two", 50.0, dropout=0.1)
    finished(tmp_path, "pure", 60.0, heads=2)
    assert [row[0] for row in cells(report(tmp_path))] == [
        "pure", "linear, state passing, model.dropout 0.1", "linear, state passing"]


@pytest.mark.parametrize("below", ["hopper/medium", "."])
def test_runs_that_lie_in_no_folder_of_a_variant_are_described(tmp_path, below):
    finished(tmp_path, below, [40.0, 60.0])
    assert [row[0] for row in cells(report(tmp_path))] == ["linear, state passing"]


@pytest.mark.parametrize(("changes", "told"), [
    ({"half_lives": [1.0, 4.0], "action_tokens": False},
     "linear, state passing, model.half_lives [1.0, 4.0], model.action_tokens False"),
    ({"return_quantile": 0.9, "train": {"value_weight": 0.5, "value_measure": "value", "value_cap": True,
                                        "discount": 0.99}},
     "linear, state passing, model.return_quantile 0.9, train.value_weight 0.5, train.value_cap True"),
    ({"train": {"value_weight": 0.5, "value_measure": "slope", "discount": 0.99}},
     "linear, state passing, train.value_weight 0.5, train.value_measure slope"),
    ({"train": {"value_cap": True, "discount": 0.5}}, "linear, state passing"),
    ({"attention": "softmax", "half_lives": [1.0, 4.0]}, "softmax, windows of 20"),
    ({"attention": "none", "half_lives": [1.0, 4.0], "action_tokens": False, "return_quantile": 0.9,
      "train": {"sampling": "windows"}}, "none, windows of 20"),
], ids=str)
def test_a_run_is_described_by_what_it_is_beyond_the_plain_model_whatever_the_defaults_are(tmp_path, changes, told):
    finished(tmp_path, ".", 40.0, **changes)
    assert [row[0] for row in cells(report(tmp_path))] == [told]


def test_two_runs_of_one_kind_task_and_seed_are_refused(tmp_path):
    finished(tmp_path, "ours/a", 40.0)
    finished(tmp_path, "ours/b", 50.0)
    with pytest.raises(UserError, match=r"^ours/a/seed-0 and ours/b/seed-0 are runs of the same kind, task and seed; "):
        report(tmp_path)


def test_each_seeds_score_stands_in_a_table_of_its_own(tmp_path):
    finished(tmp_path, "ours", [40.0, 60.25])
    page = report(tmp_path)
    assert "Each seed's score (seeds 0, 1, in this order)" in page and tables(page)[-1][1][2] == "40.0, 60.2"


def test_the_mean_score_of_a_datasets_episodes_is_a_row_where_a_checkpoint_tells_it(tmp_path):
    run = finished(tmp_path, "ours/hopper/medium", [40.0, 60.0])
    finished(tmp_path, "ours/walker2d/medium", [40.0, 60.0], "walker2d/medium")
    folder = run / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    intact.write_json(folder / "checkpoint.json", {"dataset_return": (3234.3 - 20.272305) / 2})
    assert cells(report(tmp_path))[0] == ["the episodes of the dataset", "", "50.0", "–", "–", "–"]


# what cannot be scored


def test_an_evaluation_that_failed_is_counted_and_its_run_is_not_scored_by_an_earlier_step(tmp_path):
    finished(tmp_path, "linear", [40.0, 50.0, 50.0])
    for seed in (1, 2):
        failed(tmp_path / "linear" / f"seed-{seed}", step=9, finished=seed)

    page = report(tmp_path)

    (row,) = cells(page)
    assert row[2:] == ["40.0", "40.0"]
    assert "Evaluations that failed and are in no cell, 2:\n" in page
    assert [re.sub(r", [-\dT:+]+: ", ", WHEN: ", line) for line in page.splitlines() if line.startswith("- ")] == [
        f"- {tmp_path.name}/linear/seed-{seed}: step 9, recurrent, target 3600, {seed} of 3 episodes finished, WHEN: "
        "Hopper-v5 fell over"
        for seed in (1, 2)
    ]


def test_where_every_evaluation_failed_there_is_no_table(tmp_path):
    failed(finished(tmp_path, "linear", 40.0), step=9)
    with pytest.raises(UserError) as caught:
        report(tmp_path)
    assert re.fullmatch(rf"no scored run under {tmp_path}, and evaluations that failed, 1; \S+/linear/seed-0: "
                        r"step 9, recurrent, target 3600, 1 of 3 episodes finished, \S+: Hopper-v5 fell over",
                        str(caught.value))


def test_scores_of_different_physics_do_not_share_a_table(tmp_path):
    finished(tmp_path, "a", 40.0)
    scored(finished(tmp_path, "b", 50.0, dropout=0.1), 50.0, mujoco="3.4.0")
    with pytest.raises(UserError, match=r"scored with MuJoCo 3\.4\.0 and 4\.0\.0: different physics"):
        report(tmp_path)


def test_a_folder_without_scores_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"^no evaluated run under .*; type: drl evaluate runs/"):
        report(tmp_path)


# one row against the others


def test_a_row_is_held_against_the_others_by_pairs_and_by_averages(tmp_path):
    finished(tmp_path, "a", [60.0, 60.0])
    finished(tmp_path, "b", [40.0, 60.0], dropout=0.1)

    page = report(tmp_path)

    # a wins the pairs against 40 and is level in those against 60: (2 + 2/2)/4; b's average is 40, 50 or 60
    assert tables(page)[1][1:] == [["b", "1 of 1", "0.75 (0.50 to 1.00)", "+10.0 (+0.0 to +20.0)", "no task"]]
    assert "picked for its average" in page


def test_tasks_on_which_it_is_below_by_more_than_the_intervals_are_named(tmp_path):
    for place, values in {"a": ([10.0, 12.0], [50.0, 52.0]), "b": ([13.0, 14.0], [51.0, 53.0])}.items():
        for task, value in zip(("hopper/medium", "walker2d/medium"), values, strict=True):
            finished(tmp_path, f"{place}/{task}", value, task, dropout=0.1 * (place == "b"))
    page = report(tmp_path, against="a")
    assert [row[-1] for row in tables(page)[1][1:]] == ["hopper/medium"]
    assert "picked for its average" not in page


@pytest.mark.parametrize(
    ("name", "told"),
    [("softmx", "--against: no row is called 'softmx'; type one of: softmax; recurrent, recurrent; recurrent, window"),
     ("recurrent",
      "--against: several rows are called 'recurrent'; type one of: recurrent, recurrent; recurrent, window")],
)
def test_a_row_that_is_none_or_several_is_answered_with_names(grid, name, told):
    with pytest.raises(UserError) as caught:
        report(grid, against=name)
    assert str(caught.value) == told


# the pack, the page, the README


def test_a_page_from_the_pack_is_that_of_the_runs_byte_for_byte_figures_too(grid, tmp_path):
    file = tmp_path / "packed" / "runs.json"
    told = report(grid, folder=tmp_path / "one", pack=file)
    assert report(file, folder=tmp_path / "two", pack=tmp_path / "again.json")
    ours, theirs = ({path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
                     for path in (tmp_path / name).rglob("*.*")} for name in ("one", "two"))
    assert ours == theirs and report(grid) == report(file)
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    drawn = [f"figures/{name}.png" for name in ("curves", "modes", "scores", "summary", "targets")]
    assert sorted(ours) == [*drawn, "results.md"]
    assert all(f"({name})" in ours["results.md"].decode() for name in ours if name.endswith("png"))
    assert all(name in told for name in [*ours, "runs.json"])
    for name, content in ours.items():
        if name.endswith("png"):
            assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") == 1000, "a README's width"


def test_figures_that_would_show_nothing_are_not_drawn(tmp_path):
    run = finished(tmp_path / "runs", "ours", 40.0)
    (run / "metrics.jsonl").unlink()
    report(tmp_path / "runs", folder=tmp_path / "page")
    assert sorted(path.name for path in (tmp_path / "page").rglob("*.*")) == ["results.md", "scores.png", "summary.png"]


def test_a_pack_of_360_runs_stays_under_a_megabyte(tmp_path):
    rng = np.random.default_rng(0)
    for variant in range(2):
        for task in ("halfcheetah/medium", "halfcheetah/medium-expert"):
            last = finished(tmp_path, f"{variant}/{task}", [40.0, 60.0], task, dropout=variant / 10)
            for run in last.parent.iterdir():
                for mode in ("recurrent", "window"):
                    scored(run, rng.uniform(40, 90), mode=mode, episodes=100, spread=30 * rng.random())
                for number in range(3):
                    scored(run, rng.uniform(40, 90), target=1000.0 * (number + 1), episodes=20)
                    scored(run, rng.uniform(40, 90), step=number + 1, episodes=10)
                lines = ({"step": step, "train/loss": rng.random()} for step in range(100, 20100, 100))
                (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(tmp_path, pack=tmp_path / "pack.json")
    assert (tmp_path / "pack.json").stat().st_size * 360 / 8 < 1_000_000


def test_digits_from_a_pack_are_those_of_the_runs(grid):
    content = report_pack.fields(gather(grid))
    for run in report_pack.unpacked(content, "pack").runs:
        told = json.loads((grid / run.name / "evaluation.json").read_text())["results"]
        expected = [result["normalized_score"] for result in told]
        assert [result.score for result in run.results] == pytest.approx(expected, abs=1e-3)
        assert sum(bool(result.returns) for result in run.results) == 1, "those of the final checkpoint, acted its way"
        assert run.config == read_config(grid / run.name / "config.yaml")


def test_a_pack_of_before_an_option_was_one_gives_the_page_that_it_gave(tmp_path):
    """Such a pack said of a run's options those that were not the default of its version."""
    finished(tmp_path, "plain", [40.0, 60.0], train={"compile": "off"})
    file, content = tmp_path / "pack.json", report_pack.fields(gather(tmp_path))
    (stated,) = content["options"]
    content["options"] = [{key: stated[key] for key in stated if key not in BEFORE}]
    report_pack.write(file, content)
    assert report(file) == report(tmp_path)


def test_a_loss_curve_is_thinned_to_means_of_stretches():
    losses = np.random.default_rng(0).random(1000)
    steps, means = thinned(np.arange(1, 1001) * 100, losses)
    assert steps == list(range(2000, 100_001, 2000))
    np.testing.assert_allclose(means, losses.reshape(50, 20).mean(1))
    assert thinned(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == ([1, 2], [3.0, 4.0])
    assert thinned(np.empty(0), np.empty(0)) == ([], [])


BAD = {
    "another format": {"format": 2},
    "no runs": {"runs": None},
    "a run that is none": {"runs": [1]},
    "options that are not there": {"options": []},
    "a key that is none": {"options": [{"dataset": "a", "model.wdth": 3}]},
    "a section that is a number": {"options": [{"dataset": "a", "model": 3, "model.width": 4}]},
    "a width that is huge": {"options": [{"dataset": "a", "model.width": 10**9}]},
    "versions that are not there": {"versions": []},
    "updates that are not there": {"grids": []},
    "other updates than losses": {"grids": [[1]]},
    "a job that is none": {"jobs": [{"name": "a"}]},
    "a return that is a word": {"datasets": {"a": "b"}},
}


@pytest.mark.parametrize("changed", BAD.values(), ids=BAD)
def test_a_pack_that_is_none_is_answered_in_one_line(tmp_path, changed):
    finished(tmp_path, "ours", 40.0)
    file = tmp_path / "pack.json"
    report_pack.write(file, report_pack.fields(gather(tmp_path)) | changed)
    with pytest.raises(UserError, match=r"pack .*(is damaged|has format 2)") as caught:
        report(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "row", [[], 1, [8, "recurrent", 3600.0, 3, 7, 0, []], [8, "recurrent", 3600.0, 3, 7, 5, 40.0], ["8"] * 7, [8] * 7])
def test_a_result_of_a_pack_that_is_none_is_answered_in_one_line(tmp_path, row):
    finished(tmp_path, "ours", 40.0)
    content = report_pack.fields(gather(tmp_path))
    content["runs"][0]["results"] = [row]
    with pytest.raises(UserError, match=r"its run ours/seed-0\) is damaged: "):
        report_pack.unpacked(content, "pack")


def test_a_changed_byte_of_a_pack_is_found(tmp_path):
    finished(tmp_path, "ours", 40.0)
    file = tmp_path / "pack.json"
    report(tmp_path, pack=file)
    file.write_text(file.read_text().replace("3600.0", "3601.0"))
    with pytest.raises(UserError, match="does not match its own checksum"):
        report(file)


def test_the_readme_changes_between_its_marks_alone(tmp_path):
    finished(tmp_path / "runs", "ours", [40.0, 60.0])
    readme = tmp_path / "README.md"
    readme.write_text("# x\n\n<!-- scores -->\nold\n<!-- end of scores -->\n\nend\n")
    for _ in range(2):  # the second time changes nothing
        report(tmp_path / "runs", folder=tmp_path / "docs", readme=readme)
        text = readme.read_text()
        assert text.startswith("# x\n\n<!-- scores -->\n\n| variant | acted | ")
        assert text.endswith("(docs/figures/summary.png)\n\n<!-- end of scores -->\n\nend\n") and "old" not in text
    assert "[docs/results.md](docs/results.md)" in text
    assert [row[0] for row in tables(text)[0]] == ["variant", "ours"]


def test_a_readme_shows_of_many_tasks_the_average_of_those_that_have_one(tmp_path):
    for task in ("hopper/medium", "hopper/expert", "walker2d/medium", "walker2d/expert"):
        finished(tmp_path / "runs", f"a/{task}", [40.0, 40.0], task)
    finished(tmp_path / "runs", "b/hopper/medium", 50.0, dropout=0.1)
    (tmp_path / "README.md").write_text("<!-- scores --> <!-- end of scores -->")
    report(tmp_path / "runs", folder=tmp_path / "page", readme=tmp_path / "README.md")
    assert tables((tmp_path / "README.md").read_text()) == [[["variant", "acted", "average", "interquartile mean"],
                                                             ["a", "recurrent", "40.0 ± 0.0", "40.0 ± 0.0"]]]


@pytest.mark.parametrize("text", ["", "<!-- scores -->", "<!-- end of scores --> <!-- scores -->",
                                  "<!-- scores --> <!-- scores --> <!-- end of scores -->"])
def test_a_readme_without_marks_is_left_as_it_is(grid, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match="must hold the lines <!-- scores --> and <!-- end of scores --> once each"):
        report(grid, folder=tmp_path / "page", readme=readme)
    assert readme.read_text() == text and not (tmp_path / "page").exists()


def test_a_readme_needs_the_folder_of_its_figure(grid, tmp_path):
    with pytest.raises(UserError, match="add --write docs"):
        report(grid, readme=tmp_path / "README.md")


def test_hardware_and_wall_time_are_those_of_the_suite(grid):
    assert ("Hardware and wall time, added up over 2 jobs: scoring 60 s (EPYC, 16 CPU cores); training 2.2 h (H200, 16 "
            "CPU cores).\n" in report(grid))


@pytest.mark.parametrize("content", [{}, {"rows": [{}]}, {"rows": 1}])
def test_a_suites_file_that_is_none_is_answered_in_one_line(tmp_path, content):
    finished(tmp_path, "ours", 40.0)
    intact.write_sealed(tmp_path / "suite.json", content)
    with pytest.raises(UserError, match=r"^suite file .*suite\.json.* is damaged: 'r?[a-z]+' is "):
        report(tmp_path)


def test_what_several_machines_made_is_one_report(grid, tmp_path):
    rows = intact.read_sealed(grid / "suite.json", "suite")["rows"]
    one, other = (tmp_path / part / grid.name for part in ("one", "other"))
    for root, variant in {one: "softmax", other: "recurrent"}.items():
        shutil.copytree(grid / variant, root / variant)
        told = {"format": 1, "rows": [row for row in rows if row["variant"] == variant]}
        intact.write_sealed(root / "suite.json", told)
    report(other, pack=tmp_path / "other.json")
    assert report(one, tmp_path / "other.json") == report(grid)
    with pytest.raises(UserError, match="^run recurrent/.* stands in more than one of what is to be reported"):
        report(grid, tmp_path / "other.json")


@pytest.fixture
def twice(tmp_path):
    """A run that was scored in one mode of two, and the one that was made again to have both."""
    scored(finished(tmp_path, "again/ours", 60.0), 20.0, mode="window")
    return finished(tmp_path, "before/ours", 40.0)


@pytest.mark.parametrize("parts", [("before", "again"), ("again", "before"), ("before", "again", "before")], ids=str)
def test_a_run_that_was_made_again_to_be_scored_in_full_stands_for_what_it_was_before(twice, tmp_path, parts):
    assert cells(report(*(tmp_path / part for part in parts))) == cells(report(tmp_path / "again"))


def test_two_runs_of_one_name_are_refused_where_neither_stands_for_the_other(twice, tmp_path):
    refused = pytest.raises(UserError, match="^run ours/seed-0 stands in more than one of what is to be reported")
    config = read_config(twice / "config.yaml")
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, context=9))
    write_config(twice / "config.yaml", other)
    with refused:
        report(tmp_path / "before", tmp_path / "again")
    write_config(twice / "config.yaml", config)
    scored(twice, 30.0, mode="window")  # as many scores: nobody can say which of the two counts
    with refused:
        report(tmp_path / "before", tmp_path / "again")


def test_scores_on_other_episodes_under_the_same_name_are_not_one_report(tmp_path):
    for name, mean in {"a": 1.0, "b": 2.0}.items():
        content = {"format": report_pack.FORMAT, "root": "runs", "options": [], "versions": [], "grids": [],
                   "datasets": {"drl/hopper/medium-v0": mean}, "jobs": [], "runs": []}
        report_pack.write(tmp_path / name, content)
    with pytest.raises(UserError, match="^the episodes of drl/hopper/medium-v0 have the mean return 1 here and 2 "):
        report(tmp_path / "a", tmp_path / "b")


def test_the_commands_are_ones_that_drl_takes_and_make_the_same_configs(grid):
    page, parser = report(grid), options.build()
    typed = [shlex.split(line.strip().replace("$dataset", "drl/walker2d/medium-v0").replace("$seed", "0"))
             for line in re.findall(r"drl (?:train|evaluate|report) [^;\n]*", page)]
    made = [parser.parse_args(words[1:]) for words in typed]
    trained = [taken.train for taken in made if taken.verb == "train"]
    configs = [read_config(grid / variant / task / "seed-0" / "config.yaml") for variant in ("recurrent", "softmax")
               for task in ("walker2d/medium", "hopper/medium-expert", "halfcheetah/medium-replay")]

    def settings(told) -> str:
        return str((told.model, told.train, told.evaluate.target_returns))

    fields = [taken.as_dict() for taken in trained]
    for one in fields:
        for key in ("run", "resume", "seeds", "config"):
            one.pop(key)
    assert {settings(Config.from_dict(one)) for one in fields} == {settings(config) for config in configs}
    assert {taken.evaluate.mode for taken in made if taken.verb == "evaluate"} == {"recurrent", "window"}


def test_the_results_in_the_docs_are_those_of_their_pack(tmp_path):
    report(ROOT / "docs" / "results" / "gym9.json", folder=tmp_path)
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()


def test_the_results_of_the_papers_model_are_those_of_their_runs():
    """Which were stored before today's options were, and are described as they were made."""
    page, docs = report(ROOT / "docs" / "paper-model"), (ROOT / "docs" / "paper-model.md").read_text()
    assert cells(page) == cells(docs)
    (row,) = (row for row in cells(page) if row[0] == "linear, state passing")
    assert row[2].startswith("35.6 ±") and row[3].endswith("48.3 ± 7.2 (3 seeds)")


def test_one_figure_alone_is_a_picture(tmp_path):
    finished(tmp_path, "linear", [40.0, 45.0])
    report(tmp_path, figure=tmp_path / "figures" / "scores.png")
    assert (tmp_path / "figures" / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("updates", "scale"), [(80, "log"), (10, "linear")])
def test_updates_are_drawn_by_magnitude_where_a_row_had_many_times_as_many(tmp_path, monkeypatch, updates, scale):
    drawn, save = {}, figures.save

    def saved(canvas, file):
        drawn[file.stem] = [axis.get_xscale() for axis in canvas.axes]
        save(canvas, file)

    monkeypatch.setattr(figures, "save", saved)
    for variant, last in (("short", 8), ("long", updates)):
        run = finished(tmp_path, variant, 40.0, updates=last)
        scored(run, 30.0, step=last // 2)
    report(tmp_path, folder=tmp_path / "page")
    assert drawn["curves"] == [scale] * 2


@pytest.mark.parametrize(("name", "option"), [("figure", "--figure"), ("folder", "--write")])
def test_a_figure_without_matplotlib_names_the_extra(tmp_path, monkeypatch, name, option):
    finished(tmp_path, "linear", 40.0)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"^{option} needs matplotlib; type: pip install 'drl\[report\]'$"):
        report(tmp_path, **{name: tmp_path / "place"})
