"""The card of a dataset says what is in it; the list says where others come from."""

import builtins
import os
import re

import numpy as np
import pytest

from drl import card, scores
from drl.data import minari_writer
from drl.data.store import Recorded
from drl.errors import UserError
from drl.names import names

ID = "drl/hopper/toy-v0"
LENGTHS = [3, 3, 4, 11]


def episodes():
    rng = np.random.default_rng(0)
    return [
        Recorded(None, rng.normal(size=(T + 1, 11)), np.zeros((T, 3), np.float32), rng.normal(100, 1, T), True)
        for T in LENGTHS
    ]


def write(dataset_id=ID, **more):
    settings = {"environment": "Hopper-v5", "algorithm": "by hand", "reference": None, "description": "a toy"}
    return minari_writer.write(dataset_id, episodes(), extra={"collection_seed": 7}, **settings | more)


def line(text, name):
    [found] = [line for line in text.splitlines() if line.startswith(name + " ")]
    return found


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d", text)]


def test_a_card_says_what_the_episodes_say():
    write()
    text = card.card(ID).text()
    returns = np.array([episode.rewards.sum() for episode in episodes()])

    for name, values in (("return", returns), ("length", np.array(LENGTHS))):
        expected = [values.mean(), values.std(), values.min(), values.max()]
        assert numbers(line(text, name)) == pytest.approx(expected, abs=0.06)
    score = scores.normalized_score(returns, scores.reference("Hopper-v5"))
    assert numbers(line(text, "score"))[:4] == pytest.approx(
        [score.mean(), score.std(), score.min(), score.max()], abs=0.06
    )
    assert "4 episodes, 21 steps" in line(text, "size")
    assert line(text, "made by") == "made by     drl, by hand, collection seed 7"
    assert "a toy" in text


def test_the_histogram_counts_every_episode_once():
    write()
    rows = re.findall(r"(\d+) to (\d+) +(#*) +(\d+)$", card.card(ID).text(), re.M)
    assert sum(int(count) for *_, count in rows) == len(LENGTHS)
    assert (rows[0][0], rows[-1][1]) == ("3", "11")
    longest = max(rows, key=lambda row: len(row[2]))
    assert (longest[0], longest[3]) == ("3", "2") and len(longest[2]) == card.BAR


def test_episodes_of_one_length_are_one_line():
    settings = {"environment": "HalfCheetah-v5", "algorithm": "", "reference": None, "description": "", "extra": {}}
    same = [Recorded(0, np.zeros((6, 17)), np.zeros((5, 6), np.float32), np.zeros(5), False)] * 3
    minari_writer.write(ID, same, **settings)
    assert re.findall(r"#+ +(\d+)$", card.card(ID).text(), re.M) == ["3"]


def test_without_a_reference_there_is_no_score():
    minari_writer.write(
        ID, [Recorded(0, np.zeros((6, 2)), np.zeros((5, 1), np.float32), np.zeros(5), False)],
        environment="MountainCarContinuous-v0", algorithm="", reference=None, description="", extra={},
    )
    assert "score" not in card.card(ID).text() and "score" not in card.line(ID)


def test_the_figure_is_a_picture(tmp_path):
    write()
    card.card(ID).draw(tmp_path / "figures" / "toy.png")
    assert (tmp_path / "figures" / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_takes_no_place_but_that_of_a_file(tmp_path):
    write()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"cannot take the place of {tmp_path}/pipe, which is no file; name a file"):
        card.card(ID).draw(tmp_path / "pipe")


def test_a_figure_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    write()
    described, imported = card.card(ID), builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"^--plot needs matplotlib; type: pip install 'drl\[report\]'$"):
        described.draw(tmp_path / "toy.png")


def test_the_list_names_what_is_here_and_where_the_rest_comes_from():
    assert "on this machine\n  none\n" in card.listing()
    write("drl/hopper/medium-v0")

    here, elsewhere = card.listing().split("to collect, without a network")

    score = scores.normalized_score(
        np.mean([episode.rewards.sum() for episode in episodes()]), scores.reference("Hopper-v5")
    )
    assert re.search(rf"drl/hopper/medium-v0 +21 steps +4 episodes .* mean score {score:.1f}$", here, re.M)
    for name in names():
        found = re.search(rf"drl/{name}-v0 +\d+ steps   drl data collect {name}$", elsewhere, re.M)
        assert bool(found) == (name != "hopper/medium")
    assert "drl data download mujoco/hopper/medium-v0\n" in elsewhere
    assert "drl data import-d4rl" in elsewhere
