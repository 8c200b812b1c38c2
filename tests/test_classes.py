"""Folders and tables of labelled images become classes with names and templates."""

import json
from collections import Counter

import classes
import pytest
from sources import IMAGES, ROWS, make, picture, read, rejected, table, write_files, write_tar


def test_folders_are_classes(tmp_path, capsys):
    files = {f"{label}/{i}.jpg": picture(i) for label in ("polar_bear", "Ant", "zebra") for i in range(4)}
    write_files(tmp_path / "in", files | {"zebra/Thumbs.db": b"?", "zebra/deep/cut.jpg": picture(1)[:-200]})
    make("classes", tmp_path / "in", tmp_path / "out")
    samples = read(tmp_path / "out")
    names = ["Ant", "polar bear", "zebra"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {
        "classnames": names,
        "templates": list(classes.TEMPLATES),
    }
    assert {s["uid"]: (names[s["label"]].replace(" ", "_"), s["image"], s["caption"]) for s in samples} == {
        name: (name.split("/")[0], data, "") for name, data in files.items()
    }
    assert {(e["image"], e["reason"]) for e in rejected(tmp_path / "out")} == {
        ("zebra/Thumbs.db", "not_an_image"),
        ("zebra/deep/cut.jpg", "not_an_image"),
    }
    assert "3 classes: Ant, polar bear, zebra" in capsys.readouterr().out


def test_a_table_tells_the_labels(tmp_path, capsys):
    rows = [(name, ("Track Pants", "Tshirts", "")[i % 3], caption) for i, (name, caption) in enumerate(ROWS)]
    captions = table("csv", rows, ("file", "articleType", "caption"))
    tar = write_tar(tmp_path / "x.tar.gz", IMAGES)
    write_files(
        tmp_path, {"captions.csv": captions, "names.json": b'{"Tshirts": "T-shirt", "Track Pants": "trousers"}'}
    )
    write_files(tmp_path, {"templates.txt": b"a {} on sale\n\nthe {}\n"})
    names = ["--classnames", tmp_path / "names.json", "--templates", tmp_path / "templates.txt"]
    make("classes", tar, tmp_path / "out", "--label-column", "articleType", *names)
    expected = [(i % 3, caption, name) for i, (name, caption) in enumerate(ROWS) if i % 3 < 2]
    assert [(s["label"], s["caption"], s["uid"]) for s in read(tmp_path / "out")] == expected
    assert [entry["reason"] for entry in rejected(tmp_path / "out")] == ["label_empty"] * 2
    about = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert about == {"classnames": ["trousers", "T-shirt"], "templates": ["a {} on sale", "the {}"]}
    assert "label from 'articleType'" in capsys.readouterr().out


def test_per_class_is_balanced_and_seeded(tmp_path):
    files = {f"{label}/{i}.jpg": picture(i) for label, n in (("a", 9), ("b", 5), ("c", 1)) for i in range(n)}
    write_files(tmp_path / "in", files)
    chosen = []
    for number, seed in enumerate((1, 1, 2)):
        make("classes", tmp_path / "in", tmp_path / str(number), "--per-class", 3, "--seed", seed)
        samples = read(tmp_path / str(number))
        assert Counter(s["label"] for s in samples) == {0: 3, 1: 3, 2: 1}
        assert all(files[s["uid"]] == s["image"] for s in samples)
        chosen.append([s["uid"] for s in samples])
    assert chosen[0] == chosen[1] != chosen[2]


def test_labels_meet_their_names():
    name = classes.name_classes
    assert name(["10", "2", "2"]) == ({"2": 0, "10": 1}, ["2", "10"])
    assert name(["0", "2"], ["x", "y", "z"]) == ({"0": 0, "2": 2}, ["x", "y", "z"])
    assert name(["1", "2"], ["x", "y"]) == ({"1": 0, "2": 1}, ["x", "y"])
    assert name(["b_b", "a"], ["b b", "c", "a"]) == ({"a": 2, "b_b": 0}, ["b b", "c", "a"])
    assert name(["n1", "n0"], {"n0": "cat", "n1": "dog", "n2": "cow"}) == ({"n0": 0, "n1": 1}, ["cat", "dog"])
    with pytest.raises(ValueError, match=r"no name for 1 of 2 labels: \['n1'\]"):
        name(["n0", "n1"], {"n0": "cat"})
    with pytest.raises(ValueError, match="has 3 names, the source has 2 labels"):
        name(["n0", "n1"], ["a", "b", "c"])


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "a {colour} {}", "{0}"])
def test_a_template_has_one_place_for_the_name(tmp_path, template):
    with pytest.raises(ValueError, match="exactly once"):
        classes.write_classes_json(tmp_path, ["a"], [template])
    with pytest.raises(ValueError, match=r"\['crane'\] are given to several labels"):
        classes.write_classes_json(tmp_path, ["crane", "crane"], ["{}"])
    assert list(tmp_path.iterdir()) == []
