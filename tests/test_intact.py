"""Files that tell whether they are as they were written."""

import json
import math
import os
import random

import pytest

from drl import disk, intact
from drl.errors import UserError
from drl.intact import Damaged

FIELDS = {"format": 1, "score": 0.10000000149011612, "returns": [1.0, -2.5e-7], "name": "Größe", "none": None}


@pytest.fixture(params=["exchange", "two steps"])
def exchange(request, monkeypatch):
    """Whether the file system lets folders change places at once."""
    if request.param == "two steps":
        monkeypatch.setattr(disk, "_exchange", lambda *_: False)


def filled(path, **files):
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_text(content)


def test_a_whole_folder_takes_its_place_at_the_end_with_a_manifest(exchange, tmp_path):
    filled(tmp_path / "place", old="")
    filled(tmp_path / "place.partial" / "place", left="by a killed process")
    with intact.whole(tmp_path / "place") as new:
        (new / "file").write_text("text")
        assert os.listdir(tmp_path / "place") == ["old"]
    assert os.listdir(tmp_path) == ["place"]
    assert sorted(os.listdir(tmp_path / "place")) == ["file", "manifest.json"]
    intact.require_whole(tmp_path / "place", ["file"], "folder")


def test_filling_a_folder_that_fails_leaves_the_earlier_one_alone(tmp_path):
    filled(tmp_path / "place", old="")
    with pytest.raises(KeyboardInterrupt), intact.whole(tmp_path / "place") as new:
        (new / "file").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["place"] and os.listdir(tmp_path / "place") == ["old"]


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", ".."])
def test_a_manifest_that_names_what_is_not_in_its_folder_is_refused(name, tmp_path):
    (tmp_path / "outside").write_text("secret")
    with intact.whole(tmp_path / "place") as new:
        (new / "file").write_text("text")
    manifest = json.loads((tmp_path / "place" / "manifest.json").read_text())
    intact.write_json(tmp_path / "place" / "manifest.json", manifest | {name: disk.sha256(tmp_path / "outside")})
    with pytest.raises(Damaged, match="does not match manifest.json"):
        intact.require_whole(tmp_path / "place", ["file"], "folder")


def test_what_is_sealed_comes_back(tmp_path):
    intact.write_sealed(tmp_path / "file", FIELDS)
    assert intact.read_sealed(tmp_path / "file", "card") == FIELDS
    assert json.loads((tmp_path / "file").read_text()).keys() == {*FIELDS, "sha256"}, "it is ordinary JSON"


def test_every_flipped_bit_of_a_sealed_file_is_noticed(tmp_path):
    file = tmp_path / "file"
    intact.write_sealed(file, FIELDS)
    content, generator = file.read_bytes(), random.Random(0)
    for unsealed in (False, True):
        for _ in range(200):
            flipped = bytearray(content)
            flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            file.write_bytes(flipped)
            with pytest.raises(Damaged) as caught:
                intact.read_sealed(file, "card", unsealed)
            assert "\n" not in str(caught.value)


def test_a_file_from_before_there_were_seals_passes_only_where_it_may(tmp_path):
    (tmp_path / "file").write_text('{"format": 1, "results": []}\n')
    assert intact.read_sealed(tmp_path / "file", "scores", unsealed=True) == {"format": 1, "results": []}
    with pytest.raises(Damaged, match="does not match its own checksum"):
        intact.read_sealed(tmp_path / "file", "scores")


def test_a_number_that_is_not_finite_is_not_sealed_and_the_earlier_file_stays(tmp_path):
    intact.write_sealed(tmp_path / "file", FIELDS)
    with pytest.raises(ValueError):
        intact.write_sealed(tmp_path / "file", FIELDS | {"score": math.nan})
    assert intact.read_sealed(tmp_path / "file", "card") == FIELDS
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_object_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError) as caught:
        intact.read_json(tmp_path / "file", "card")
    assert "\n" not in str(caught.value) and str(tmp_path / "file") in str(caught.value)
