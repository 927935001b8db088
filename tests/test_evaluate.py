"""An evaluation is what was played, told in numbers; they go into a file and to TensorBoard."""

import datetime
import json
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from drl import evaluate as evaluation
from drl.errors import UserError
from drl.evaluate import FILE, evaluate, read, read_failures, resolve_mode, store, store_failure, tags
from drl.faults import EvaluationFailed, Fault
from drl.policy import RecurrentPolicy
from drl.rollout import Rollouts, rollout
from drl.tracker import Tracker
from toys import SEED, TARGET, checkpoint

RESULTS = Path(__file__).parents[1] / "docs" / "paper-model"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo may leave MUJOCO_LOG.TXT


def test_an_evaluation_is_the_rollout_that_the_config_asks_for():
    policy = RecurrentPolicy(checkpoint(episodes=5, seed=SEED, target_returns=[TARGET]))
    (result,) = evaluate(policy, mode="recurrent", step=7)

    played = rollout(policy, "Hopper-v5", target_return=TARGET, episodes=5, seed=SEED)
    assert result["returns"] == played.returns.tolist()
    assert result["lengths"] == played.lengths.tolist()
    assert result["seeds"] == [SEED, SEED + 1, SEED + 2, SEED + 3, SEED + 4]
    assert (result["environment"], result["dataset"]) == ("Hopper-v5", "drl/toy/random-v0")
    assert (result["step"], result["mode"], result["target_return"], result["episodes"]) == (7, "recurrent", TARGET, 5)
    assert json.loads(json.dumps(result)) == result


@pytest.fixture
def three_returns(monkeypatch):
    """Every rollout gives D4RL's random and expert return for Hopper, and what lies between."""
    returns = np.array([-20.272305, 3234.3, (3234.3 - 20.272305) / 2])
    played = Rollouts(returns, np.array([10, 20, 60]), np.arange(3))
    monkeypatch.setattr(evaluation, "rollout", lambda *_, **__: played)
    return returns


def test_a_normalised_score_by_hand(three_returns):
    (result,) = evaluate(RecurrentPolicy(checkpoint()), mode="recurrent", step=7)
    # 0, 100 and 50; the tolerance is float64's rounding
    assert result["normalized_score"] == pytest.approx(50, rel=1e-12)
    assert result["normalized_score_std"] == pytest.approx((5000 / 3) ** 0.5, rel=1e-12)
    assert result["return_mean"] == three_returns.mean()
    assert result["return_std"] == three_returns.std()
    assert result["episode_length"] == 30
    assert result["env_steps_per_second"] > 0
    assert result["reference"] == {"random": -20.272305, "expert": 3234.3, "source": "D4RL infos.py"}
    assert {"mujoco", "gymnasium"} <= result["versions"].keys()


def test_an_environment_that_d4rl_has_no_reference_for_has_no_score():
    policy = RecurrentPolicy(checkpoint("InvertedPendulum-v5"))
    (result,) = evaluate(policy, mode="recurrent", step=7)
    assert (result["normalized_score"], result["normalized_score_std"], result["reference"]) == (None, None, None)
    assert result["return_mean"] > 0 and result["episodes"] == len(result["returns"]) == 3
    assert tags([result]).keys() == {
        "eval/return_mean", "eval/return_std", "eval/episode_length", "eval/env_steps_per_second"
    }


SIX = ["normalized_score", "normalized_score_std", "return_mean", "return_std", "episode_length",
       "env_steps_per_second"]


def test_one_target_has_plain_tags(three_returns, tmp_path):
    results = evaluate(RecurrentPolicy(checkpoint()), mode="recurrent", step=7)
    assert tags(results) == {f"eval/{name}": results[0][name] for name in SIX}
    with Tracker(tmp_path) as tracker:
        tracker.log(7, tags(results))


def test_several_targets_each_have_their_suffix(three_returns, tmp_path):
    results = evaluate(RecurrentPolicy(checkpoint(target_returns=[3600.0, 1800.5])), mode="recurrent", step=7)
    assert [result["target_return"] for result in results] == [3600.0, 1800.5]
    assert tags(results).keys() == {f"eval/{name}/target-{target}" for name in SIX for target in ("3600", "1800.5")}
    with Tracker(tmp_path) as tracker:
        tracker.log(7, tags(results))


def test_auto_is_recurrent_where_there_is_a_state_to_carry():
    assert resolve_mode("auto", "linear") == "recurrent"
    assert resolve_mode("auto", "softmax") == "window"
    assert resolve_mode("window", "linear") == "window"


def result(**changed):
    same = {"environment": "Hopper-v5", "step": 7, "mode": "recurrent", "target_return": TARGET, "episodes": 3}
    return same | {"seeds": [7, 8, 9], "return_mean": 1.0} | changed


def test_storing_keeps_other_results_and_replaces_the_same(tmp_path):
    others = [
        result(environment="Walker2d-v5"), result(step=8), result(mode="window"), result(target_return=1.0),
        result(episodes=4), result(seeds=[11, 12]),
    ]
    assert read(tmp_path) == []
    store([result(), *others], tmp_path)
    assert store([result(return_mean=2.0)], tmp_path) == tmp_path / FILE

    assert read(tmp_path) == [*others, result(return_mean=2.0)]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_every_changed_byte_of_a_stored_evaluation_is_noticed(tmp_path):
    path = store([result()], tmp_path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match=f"evaluation file {path} .*; move it away and type: drl evaluate"):
            read(tmp_path)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob(FILE)), ids=lambda path: "-".join(path.parts[-4:-1]))
def test_results_from_before_there_were_checksums_are_read_and_get_one(path, tmp_path):
    earlier = json.loads(path.read_text())["results"]
    assert read(path.parent) == earlier
    (tmp_path / FILE).write_bytes(path.read_bytes())
    store([result()], tmp_path)
    assert read(tmp_path) == [*earlier, result()]
    assert "sha256" in json.loads((tmp_path / FILE).read_text())


def failure(**changed):
    asked = {"environment": "Hopper-v5", "target_return": TARGET, "episodes": 3, "seed": 7, "finished": 2}
    return EvaluationFailed(Fault("Hopper-v5 fell over"), **asked | changed)


def test_a_failure_is_counted_until_the_same_evaluation_succeeds(tmp_path):
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    store([result(step=6)], tmp_path)
    for finished in (1, 2):
        store_failure(failure(finished=finished), tmp_path, 7, "recurrent")
    store_failure(failure(seed=8), tmp_path, 7, "recurrent")

    told, other = read_failures(tmp_path)
    assert before <= datetime.datetime.fromisoformat(told.pop("time")) <= datetime.datetime.now(datetime.UTC)
    assert told == {
        "environment": "Hopper-v5", "step": 7, "mode": "recurrent", "target_return": TARGET, "episodes": 3,
        "environment_seed": 7, "finished": 2, "reason": "Hopper-v5 fell over",
    }
    assert read(tmp_path) == [result(step=6)]

    store([result()], tmp_path)
    assert read_failures(tmp_path) == [other] and read(tmp_path) == [result(step=6), result()]


def test_targets_that_were_scored_before_one_failed_are_kept(tmp_path, monkeypatch):
    played = Rollouts(np.array([1.0, 2.0, 3.0]), np.array([10, 20, 60]), np.arange(3))

    def rollout(*_, target_return, **asked):
        if target_return == 1800.5:
            raise failure(target_return=target_return)
        return played

    monkeypatch.setattr(evaluation, "rollout", rollout)
    with pytest.raises(EvaluationFailed) as caught:
        evaluate(RecurrentPolicy(checkpoint(target_returns=[3600.0, 1800.5])), mode="recurrent", step=7)
    store_failure(caught.value, tmp_path, 7, "recurrent")
    assert [kept["target_return"] for kept in read(tmp_path)] == [3600.0]
    assert [failed["target_return"] for failed in read_failures(tmp_path)] == [1800.5]


def test_of_what_is_stored_at_once_nothing_is_lost(tmp_path):
    both = threading.Barrier(2)

    def work(number):  # the lock is the system's, of two files opened: it keeps threads apart as it does processes
        both.wait(timeout=60)
        for step in range(20):
            store([result(step=step, seeds=[number])], tmp_path)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted((told["seeds"][0], told["step"]) for told in read(tmp_path)) == [
        (number, step) for number in range(2) for step in range(20)
    ]


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_not_stored(number, tmp_path):
    content = store([result()], tmp_path).read_bytes()
    with pytest.raises(UserError, match="a number of it is not finite"):
        store([result(step=8, return_std=float(number))], tmp_path)
    assert (tmp_path / FILE).read_bytes() == content and list(tmp_path.iterdir()) == [tmp_path / FILE]


def test_a_full_disk_is_one_line_and_leaves_the_file_as_it_was(tmp_path):
    store([result()], tmp_path)
    content = (tmp_path / FILE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content), hard))
    try:
        with pytest.raises(UserError, match="the evaluation cannot be written: File too large in .*; make room"):
            store([result(step=8)], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / FILE).read_bytes() == content and list(tmp_path.iterdir()) == [tmp_path / FILE]


@pytest.mark.parametrize("content", ["", '{"format": 1, "results": [', "[]", '{"format": 1}', "null", "\0\xff",
                                     '{"results": 1}', '{"results": [1]}', '{"results": [{"step": 1}]}'])
def test_a_damaged_file_is_one_line_that_names_it(content, tmp_path):
    (tmp_path / FILE).write_text(content, encoding="latin-1")
    for ask in (lambda: read(tmp_path), lambda: store([result()], tmp_path)):
        with pytest.raises(UserError) as caught:
            ask()
        message = str(caught.value)
        assert message.startswith(f"evaluation file {tmp_path / FILE} ") and "\n" not in message
        assert message.endswith(f"; move it away and type: drl evaluate {tmp_path}")
    assert (tmp_path / FILE).read_text(encoding="latin-1") == content
