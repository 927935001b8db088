"""The step's benchmark: wrong actions get no rank, what is missing is told, products are counted. No time is judged."""

import json
import re

import numpy as np
import pytest
import torch
from toys import PLAIN

from drl import benchmark_step, benchmark_step_peers, cli
from drl.benchmark_batches import batches, products
from drl.benchmark_figure import spread
from drl.benchmark_model import TARGET_RETURN, checkpoint
from drl.benchmark_step import Row, curve, lasting, measure, table
from drl.benchmark_step_memories import KeyValueCache, remembered
from drl.benchmark_step_peers import PEERS, Setting, peers, stepped
from drl.config import ModelConfig
from drl.engine import unavailable
from drl.errors import UserError
from drl.policy import RecurrentPolicy, WindowPolicy

SIZE = {"width": 16, "layers": 2, "heads": 2}
SMALL = ModelConfig(**PLAIN, **SIZE)
MODELS = pytest.mark.parametrize("model", [SMALL, ModelConfig(**SIZE | {"action_tokens": False}), ModelConfig(**SIZE)],
                                 ids=["plain", "two tokens", "the default"])
SETTING = Setting(SMALL, steps=12, threads=1, checked=12)
HERE = "torch,window,cache"
OBSERVATIONS = np.random.default_rng(0).standard_normal((12, 1, 11))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small products are faster on one
    yield
    torch.set_num_threads(before)


def play(begin, observations=OBSERVATIONS, reward=50.0) -> np.ndarray:
    act = begin()
    return np.array([act(observation, np.full(1, reward)) for observation in observations])


def test_rows_are_reported_with_error_steps_spread_ratio_and_the_machine():
    text = benchmark_step.step(steps=40, among=HERE, model=SMALL)
    rows = re.findall(r"^\| (.+?) \| (\S+) \| (\d+) \| (\S+) \| (\S+) to (\S+) \| \S+ \| \S+ \| ([\d.]+)x \|$",
                      text, re.M)
    assert [row[0] for row in rows] == [
        "torch, eager step", "softmax, window of 20 re-run", "softmax, keys and values cached"]
    for _, error, steps, median, low, high, _ in rows:
        assert float(error) < 1e-5 and int(steps) == 40 and 0 < float(low) <= float(median) <= float(high)
    assert float(rows[0][-1]) == 1
    assert "width 16" in text and "1 torch threads" in text and f"torch {torch.__version__}" in text


@pytest.mark.skipif(bool(unavailable()), reason=f"the compiled step {unavailable()}")
@MODELS
def test_every_way_to_call_ours_is_right(model):
    found, missing = peers("cpu,cpu-step,cpu-bfloat16,cpu-bfloat16-step", SETTING._replace(model=model))
    rows = measure(found, SETTING)
    assert len(rows) == 4 and not missing and not any(row.wrong for row in rows)
    assert [row.error < 1e-5 for row in rows] == [True, True, False, False], "bfloat16 weights are coarser"


def test_slow_rows_are_cut_short_and_no_step_goes_untimed(monkeypatch):
    monkeypatch.setattr(benchmark_step, "SLOW", 7)
    found, _ = peers(HERE, SETTING)
    assert [len(row.times) for row in measure(found, SETTING)] == [12, 7, 7]
    assert all((row.times > 0).all() for row in measure(found, SETTING)), "a step was not timed"


def test_who_forgets_the_episode_is_called_wrong_and_has_no_ratio():
    (right,), _ = peers("torch", SETTING)

    def forgetful():
        return lambda observation, reward: right.begin()(observation, reward)

    def broken():
        return lambda observation, reward: np.full((1, 3), np.nan)

    found = [right._replace(key="a", name="forgetful", begin=forgetful), right,
             right._replace(key="b", name="broken", begin=broken), right._replace(key="c", name="own", oracle=None)]
    lines = table(measure(found, SETTING)).splitlines()[2:]
    ends = [(line.split(" | ")[1], line.split(" | ")[-1]) for line in lines]
    assert ends[0][0].startswith("WRONG: ") and ends[0][1] == "- |"
    assert "WRONG" not in ends[1][0] and ends[1][1] == "1.00x |", "ratios are against the first who is right"
    assert ends[2] == ("WRONG: nan", "- |")
    assert ends[3][0] == "another model" and ends[3][1].endswith("x |")


def test_the_medians_early_and_late_are_those_of_their_steps():
    (peer,), _ = peers("torch", SETTING)
    row = Row(peer, 0.0, np.arange(1000.0))
    assert (row.early, row.late) == (99.5, 949.5)


@pytest.mark.parametrize("key", PEERS)
def test_what_cannot_be_measured_says_so_in_one_line_and_stops_no_one(key, monkeypatch):
    def fails(*_):
        raise RuntimeError("\n first line\nsecond line")

    monkeypatch.setitem(PEERS, key, fails)
    monkeypatch.setattr(benchmark_step_peers, "PEERS", {key: PEERS[key], "last": PEERS["window"]})
    found, missing = peers("", SETTING)
    assert [peer.key for peer in found] == (["last"] if key != "window" else [])
    assert missing[key] == "RuntimeError: first line"


@pytest.mark.parametrize("key, package", [("onnx", "onnxruntime"), ("fast-transformers", "fast_transformers.builders")])
def test_a_missing_package_is_named_with_what_to_type(key, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    text = benchmark_step.step(steps=2, among=f"torch,{key}", model=SMALL)
    assert re.search(rf"^not measured: {key}: needs .+; type: pip install .+$", text, re.M)
    assert "| torch, eager step |" in text


def test_an_unknown_row_is_refused_with_the_near_miss():
    with pytest.raises(UserError, match="nothing that acts is called 'windw'; did you mean 'window'"):
        peers("torch,windw", SETTING)


@MODELS
def test_the_cache_acts_as_one_forward_over_the_whole_episode(model):
    policy = WindowPolicy(checkpoint("softmax", model)).double()
    cached = play(remembered(policy, KeyValueCache(policy.model, 12)))

    steps = torch.arange(12)[None]
    observations = (torch.as_tensor(OBSERVATIONS[:, 0]) - policy._mean) / policy._std
    with torch.no_grad():  # the actions it took are what the model reads; a later one cannot move an earlier answer
        whole, _ = policy.model(TARGET_RETURN - 50.0 * steps.double(), observations[None],
                                torch.as_tensor(cached).transpose(0, 1), steps)
    np.testing.assert_allclose(cached[:, 0], whole[0].numpy(), rtol=0, atol=1e-12)
    assert np.abs(cached - play(stepped(WindowPolicy(checkpoint("softmax", model, context=2)).double()))).max() > 1e-3


def test_the_cache_begins_anew_and_refuses_more_steps_than_it_holds():
    policy = WindowPolicy(checkpoint("softmax", SMALL))
    begin = remembered(policy, KeyValueCache(policy.model, 12))
    np.testing.assert_array_equal(play(begin), play(begin))
    act = begin()
    for observation in OBSERVATIONS:
        act(observation, np.zeros(1))
    with pytest.raises(ValueError, match="the cache is full: 35 tokens of 36"):
        act(OBSERVATIONS[0], np.zeros(1))


def test_the_models_past_counts_in_the_actions_that_are_compared():
    episode = play(stepped(RecurrentPolicy(checkpoint("linear"), engine="torch")))
    alone = play(lambda: lambda *step: stepped(RecurrentPolicy(checkpoint("linear"), engine="torch"))()(*step))
    assert np.abs(episode - alone)[1:].max() > 1e-2


def test_a_long_episode_is_told_in_one_sentence_with_its_memory():
    lasted = lasting(SETTING, steps=200)
    text = benchmark_step._sentence(lasted)
    assert re.fullmatch(
        r"One episode of 200 steps: \S+ us a step from 198 on, in turns with steps 100 to 102 of another, \S+ us "
        r"\(medians\), ratio [\d.]+; resident memory [\d.]+ MB early, [\d.]+ MB at the end\.", text)
    assert all(value > 0 for value in (lasted["early_us"], lasted["late_us"])), "a step was not timed"
    assert all(time > 0 for _, time in lasted["curve"]) and lasted["resident_mb"][0] > 10


def test_a_curve_is_of_medians_over_spans_that_cover_every_step():
    times = np.arange(1, 1001.0)  # the time of a step is its number: a median is the middle of its span
    points = curve(times)
    np.testing.assert_allclose(*np.array(points).T)
    widths = np.diff(np.array(points)[:, 0])
    assert points[0][0] == 3 and points[-1][0] > 850 and (widths >= 5).all()
    assert curve(np.ones(2)) == [(1.5, 1.0)]


@MODELS
def test_products_count_what_a_step_multiplies_and_nothing_that_the_action_does_not_need(model):
    policy = RecurrentPolicy(checkpoint("linear", model), engine="torch")
    B, D, layers, tokens = 4, model.width, model.layers, 3 if model.action_tokens else 2
    counted = sum(m * k * n for m, k, n in products(model, B))
    weights = {name: weight.numel() for name, weight in policy.model.named_parameters() if weight.ndim == 2}
    once = sum(n for name, n in weights.items() if name.startswith(("embed_return", "embed_obs", "embed_act", "head")))
    blocks = sum(n for name, n in weights.items() if name.startswith("blocks"))
    spared = (tokens - 1) * (D * D + D * D + 8 * D * D)  # queries, output and MLP of the last layer's other tokens
    assert blocks == layers * 12 * D * D
    assert counted == B * (once + tokens * blocks - spared)


def test_batches_are_reported_on_one_thread_and_on_all_cores_beside_the_products():
    before = torch.get_num_threads()
    text, records = batches(SMALL, [3, 5], seconds=0)
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\S+) \| \d+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+x \|$", text, re.M)
    assert [(int(batch), int(threads)) for batch, threads, _ in rows] == [
        (record["batch"], record["threads"]) for record in records]
    assert {int(threads) for _, threads, _ in rows} >= {1} and torch.get_num_threads() == before
    assert [record["batch"] for record in records if record["threads"] == 1] == [3, 5]


@pytest.mark.parametrize("heights", [[0.5, 0.5, 0.5], [0.1, 0.9], [0.2, 0.21, 0.9, 0.19], []])
def test_labels_stand_apart_in_the_order_of_their_lines(heights):
    placed = spread(heights, 0.05)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.array(placed)[order]) >= 0.05 - 1e-12).all()
    assert np.isclose(np.sum(placed), np.sum(heights)), "labels moved further than they had to"


def test_the_verb_writes_the_figure_and_all_that_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_step, "lasting", lambda setting: lasting(setting, 200))
    figure, file = tmp_path / "step.png", tmp_path / "step.json"
    cli.main(["benchmark", "step", "--steps", "5", "--peers", "torch,window", "--long", "--figure", str(figure),
              "--json", str(file)])
    out = capsys.readouterr().out
    assert "| torch, eager step |" in out and "One episode of 200 steps" in out
    assert figure.read_bytes().startswith(b"\x89PNG")
    facts = json.loads(file.read_text())
    assert [row["key"] for row in facts["rows"]] == ["torch", "window"]
    assert facts["long"]["steps"] == 200 and facts["missing"] == {}
