"""Every set of the suite on a small root of its real layout: images, labels, names, what is missing or held out.

What an image is, is known from the file that the test drew, read here by other means than the code under test.
"""

import json
import warnings
from pathlib import Path

import fake_sets
import numpy as np
import pytest
from fake_sets import DRAW, draw_root, unchecked
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

with warnings.catch_warnings():
    # Composer imports mcli, which imports what websockets has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from clipcov_stream import image_sets, prompts, suite
    from clipcov_stream.caption_sets import CaptionedImages, open_captions
    from clipcov_stream.image_sets import LabelledImages
    from clipcov_stream.materialize import decode_image

# Set -> names of classes, labels of the test images, number of training images (None: none to be had).
EXPECTED: dict[str, tuple[list[str], list[int], int | None]] = {
    "caltech101": (["person seen from the shoulders up", "water lily", "yin and yang symbol"], [0, 1, 2], 9),
    "cifar10": (["airplane", "automobile", "bird"], [0, 1, 2, 0, 1, 2, 0], 15),
    "cifar100": (["apple", "aquarium fish", "baby"], [0, 1, 2, 0, 1, 2], 9),
    "dtd": (["banded", "dotted"], [0, 0, 1, 1], 6),
    "fgvc_aircraft": (["707-320", "Boeing 717", "Spitfire"], [0, 1, 2, 0, 1, 2], 6),
    "food101": (["apple pie", "beef tartare"], [0, 0, 0, 1, 1, 1], 4),
    "gtsrb": (list(prompts.GTSRB), [14, 0, 42, 14], 6),
    "oxford_pets": (["Abyssinian", "American Bulldog", "Yorkshire Terrier"], [0, 0, 1, 1, 2, 2], 6),
    "rendered_sst2": (["negative", "positive"], [0] * 4 + [1] * 4, 10),
    "stanford_cars": (
        ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"],
        [1, 2, 0, 1, 2, 0],
        6,
    ),
    "stl10": (["airplane", "bird", "car"], [0, 1, 2, 0, 1, 2], 6),
    "svhn": (list("0123456789"), [0, 1, 2, 0, 1, 9], 6),
    "imagenet": (list(IMAGENET_CLASSNAMES), [0, 0, 1, 1, 999, 999], None),
    "imagenet_v2": (list(IMAGENET_CLASSNAMES), [0, 0, 10, 10, 999, 999], None),
    "imagenet_sketch": (list(IMAGENET_CLASSNAMES), [0, 0, 1, 1], None),
}


def opened(name: str, root: Path, train: bool = False) -> LabelledImages:
    images = suite.open_set(name, root, train)
    assert isinstance(images, LabelledImages)
    return images


def labels_of(images: LabelledImages) -> list[int]:
    found = []
    for index in range(len(images.samples)):
        image, label = images.samples[index]
        assert min(decode_image(image).size) >= fake_sets.SIDE
        found.append(label)
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_a_set_of_the_real_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked(monkeypatch)
    names, labels, num_train = EXPECTED[name]
    root = draw_root(tmp_path, name)
    images = opened(name, root)
    assert (list(images.names), labels_of(images)) == (names, labels)
    assert images.num_classes == len(names)
    assert all(template.count("{}") == 1 for template in images.templates)
    assert suite.SETS[name].has_train == (num_train is not None)
    if num_train is None:
        with pytest.raises(ValueError, match="has no training images here"):
            suite.open_set(name, root, train=True)
    else:
        train = opened(name, root, train=True)
        assert train.names == images.names
        assert len(labels_of(train)) == num_train


def test_flowers_102(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked(monkeypatch)
    root = draw_root(tmp_path, "flowers102")
    images = opened("flowers102", root)
    # The archive's labels 99 to 102, from 1, of images 9 to 12.
    assert labels_of(images) == [98, 99, 100, 101]
    assert (images.num_classes, images.names[0], images.names[101]) == (102, "pink primrose", "blackberry lily")
    assert not any("?" in name for name in images.names)
    assert labels_of(opened("flowers102", root, train=True)) == [98, 99, 100, 101] * 2


def test_every_set_is_drawn() -> None:
    drawn = {*EXPECTED, "flowers102", "imagenet_a", "imagenet_r", "objectnet", "flickr30k", "coco"}
    assert drawn == set(DRAW) == set(suite.SETS)


@pytest.mark.parametrize(("name", "first"), [("imagenet_a", 3), ("imagenet_r", 0)])
def test_only_a_shifts_own_classes_compete(name: str, first: int, tmp_path: Path) -> None:
    images = opened(name, draw_root(tmp_path, name))
    wnids = image_sets.synsets(f"{name}_synsets.txt")
    everything = image_sets.synsets()
    assert len(images.names) == len(wnids) == 200
    assert list(images.names) == [IMAGENET_CLASSNAMES[everything.index(wnid)] for wnid in wnids]
    assert labels_of(images) == [first, first, first + 1, first + 1, first + 2, first + 2]


def test_synsets_are_in_the_order_of_the_class_names() -> None:
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n03792782": "mountain bike", "n15075141": "toilet paper"}
    assert {wnid: IMAGENET_CLASSNAMES[image_sets.synsets().index(wnid)] for wnid in known} == known


def test_objectnet_by_its_own_mappings(tmp_path: Path) -> None:
    images = opened("objectnet", draw_root(tmp_path, "objectnet"))
    # In order of ObjectNet's labels; of the alarm clock's two names in ImageNet the nearest counts.
    names = [IMAGENET_CLASSNAMES[index] for index in (409, 530, 414)]
    assert (list(images.names), images.owner, images.num_classes) == (names, (0, 0, 1), 2)
    found = [images.samples[index] for index in range(len(images.samples))]
    assert [label for _, label in found] == [0, 0, 1, 1]
    for image, _ in found:
        pixels = np.asarray(image)
        assert pixels.shape == (20, 20, 3)
        assert not (pixels == (255, 0, 0)).all(2).any()  # no border is left


def test_objectnets_mappings_must_fit(tmp_path: Path) -> None:
    root = draw_root(tmp_path, "objectnet")
    path = root / "objectnet-1.0" / "mappings" / "objectnet_to_imagenet_1k.json"
    path.write_text(json.dumps({"Backpack": "no such label"}))
    with pytest.raises(ValueError, match=r"mappings are not ObjectNet's: KeyError.*no such label"):
        suite.open_set("objectnet", root)


def test_caltechs_training_images_are_held_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("Faces", 40), ("yin_yang", 31)):
        for number in range(1, count + 1):
            fake_sets.picture(rng, tmp_path / "caltech101/101_ObjectCategories" / name / f"image_{number:04d}.jpg")
    train, test = (opened("caltech101", tmp_path, train).samples for train in (True, False))
    assert isinstance(train, image_sets.Files) and isinstance(test, image_sets.Files)
    assert [list(train.labels).count(label) for label in (0, 1)] == [30, 30]
    assert [list(test.labels).count(label) for label in (0, 1)] == [10, 1]
    assert not set(train.paths) & set(test.paths)
    again = opened("caltech101", tmp_path, True).samples
    assert isinstance(again, image_sets.Files) and again.paths == train.paths


@pytest.mark.parametrize("name", suite.SETS)
def test_what_is_missing_is_named(name: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    chosen = suite.SETS[name]
    with pytest.raises(ValueError, match=rf"^{name}: no .*{chosen.needs[0]}") as raised:
        suite.open_set(name, tmp_path)
    assert chosen.source in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before  # torchvision would make folders


@pytest.mark.parametrize("name", ["flowers102", "stanford_cars", "svhn"])
def test_without_scipy_a_set_says_how_to_get_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = draw_root(tmp_path, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    assert suite.SETS[name].missing(root) == "needs scipy: pip install 'clipcov-stream[eval]'"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn", "flowers102"])
def test_files_that_are_not_the_published_ones_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: .* is not what its archive has \(RuntimeError: Dataset not"):
        suite.open_set(name, draw_root(tmp_path, name))


def test_an_unknown_set_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cifar11' is not a set of the suite; its sets are imagenet, "):
        suite.open_set("cifar11", tmp_path)


def test_nothing_is_averaged_over_a_hole() -> None:
    figures = {name: 0.1 * number for number, name in enumerate(suite.ELEVEN)}
    assert len(suite.ELEVEN) == 11
    value, holes = suite.average(figures, suite.ELEVEN)
    assert value == pytest.approx(0.5) and holes == []
    assert suite.average(figures, suite.AVERAGES["downstream, 13 sets"]) == (None, ["rendered_sst2", "svhn"])


def captions_of(images: CaptionedImages | LabelledImages) -> dict[str, tuple[str, ...]]:
    assert isinstance(images, CaptionedImages)
    assert all(path.is_file() for path in images.paths)
    return {path.name: captions for path, captions in zip(images.paths, images.captions, strict=True)}


def test_karpathys_test_splits(tmp_path: Path) -> None:
    root = draw_root(tmp_path, "flickr30k", "coco")
    flickr = captions_of(suite.open_set("flickr30k", root))
    assert list(flickr) == [f"{1000 + number}.jpg" for number in range(5)]
    assert flickr["1002.jpg"] == tuple(f"picture 2 said in way {way}" for way in range(5))
    coco = captions_of(suite.open_set("coco", root))
    assert [len(captions) for captions in coco.values()] == [6, 5, 6]


def test_cocos_own_annotations(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        fake_sets.picture(rng, tmp_path / "val2017" / f"{number:012d}.jpg")
    tree = {
        "images": [{"id": 70 + number, "file_name": f"{number:012d}.jpg"} for number in range(3)],
        "annotations": [
            {"image_id": 71, "id": 1, "caption": "b"},
            {"image_id": 70, "id": 2, "caption": "a "},
            {"image_id": 71, "id": 3, "caption": "c"},
        ],
    }
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps(tree))
    images = open_captions(path, tmp_path / "val2017")
    assert captions_of(images) == {"000000000000.jpg": ("a",), "000000000001.jpg": ("b", "c")}
    assert images.note == "1 images without a caption left out"


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_table_of_captions(suffix: str, separator: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("x.png", "y.png"):
        fake_sets.picture(rng, tmp_path / name)
    rows = [("id", "filepath", "title"), ("1", "x.png", "one"), ("2", "y.png", "two"), ("3", "x.png", "three")]
    path = tmp_path / f"pairs.{suffix}"
    path.write_text("\n".join(separator.join(row) for row in rows))
    assert captions_of(open_captions(path)) == {"x.png": ("one", "three"), "y.png": ("two",)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "JSONDecodeError"),
        ("a.json", '{"images": [{}]}', "KeyError: 'split'"),
        ("a.json", '{"images": []}', r"has no captioned images \(if it is Karpathy's, of split 'test'\)"),
        ("a.csv", "picture,caption\n", r"of its columns \['picture', 'caption'\] none is in"),
        ("missing.json", None, "FileNotFoundError"),
    ],
)
def test_files_without_captions_are_refused(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_captions(tmp_path / name)
