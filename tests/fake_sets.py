"""Small roots in the real layouts of the public evaluation sets: the annotation files' own formats, tiny noise images.

torchvision checks the MD5 of CIFAR's, STL10's, SVHN's and Flowers102's files, which no other files can have: tests
replace the check (`unchecked`), because the layout is what they are about, and one test sees it refuse these files.
"""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from clipcov_stream.image_sets import synsets

SIDE = 20


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take files whose MD5 is not the published one."""
    for module in ("cifar", "stl10", "svhn", "flowers102"):
        check = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(check, lambda path, md5=None: Path(path).is_file())


def noise(rng: np.random.Generator, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(rng: np.random.Generator, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(rng, SIDE, SIDE + 4)).save(path)


def caltech101(root: Path, rng: np.random.Generator) -> None:
    for name in ("BACKGROUND_Google", "Faces", "water_lilly", "yin_yang"):
        for number in range(1, 5):
            picture(rng, root / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg")


def cifar(root: Path, rng: np.random.Generator, folder: str, files: dict[str, int], key: str) -> None:
    (root / folder).mkdir(parents=True)
    for name, rows in files.items():
        entry = {"data": rng.integers(0, 256, (rows, 3072), dtype=np.uint8), key: [row % 3 for row in range(rows)]}
        (root / folder / name).write_bytes(pickle.dumps(entry))


def cifar10(root: Path, rng: np.random.Generator) -> None:
    files = {**{f"data_batch_{number}": 3 for number in range(1, 6)}, "test_batch": 7}
    cifar(root, rng, "cifar-10-batches-py", files, "labels")
    names = {"label_names": ["airplane", "automobile", "bird"]}
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(names))


def cifar100(root: Path, rng: np.random.Generator) -> None:
    cifar(root, rng, "cifar-100-python", {"train": 9, "test": 6}, "fine_labels")
    names = {"fine_label_names": ["apple", "aquarium_fish", "baby"]}
    (root / "cifar-100-python" / "meta").write_bytes(pickle.dumps(names))


def dtd(root: Path, rng: np.random.Generator) -> None:
    for split, numbers in {"train1": (1, 2), "val1": (3,), "test1": (4, 5)}.items():
        names = [f"{kind}/{kind}_{number:04d}.jpg" for kind in ("banded", "dotted") for number in numbers]
        for name in names:
            picture(rng, root / "dtd" / "dtd" / "images" / name)
        labels = root / "dtd" / "dtd" / "labels" / f"{split}.txt"
        labels.parent.mkdir(exist_ok=True)
        labels.write_text("\n".join(names) + "\n")


def fgvc_aircraft(root: Path, rng: np.random.Generator) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    variants = ("707-320", "Boeing 717", "Spitfire")
    for split, first in {"trainval": 0, "test": 100}.items():
        lines = [f"{first + at:07d} {variants[at % 3]}" for at in range(6)]
        for line in lines:
            picture(rng, data / "images" / f"{line.split(' ')[0]}.jpg")
        (data / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    (data / "variants.txt").write_text("\n".join(variants) + "\n")


def flowers102(root: Path, rng: np.random.Generator) -> None:
    folder = root / "flowers-102"
    for number in range(1, 13):
        picture(rng, folder / "jpg" / f"image_{number:05d}.jpg")
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.arange(12)[None] % 4 + 99})
    splits = {"trnid": [1, 2, 3, 4], "valid": [5, 6, 7, 8], "tstid": [9, 10, 11, 12]}
    scipy.io.savemat(folder / "setid.mat", {name: np.array([ids]) for name, ids in splits.items()})


def food101(root: Path, rng: np.random.Generator) -> None:
    folder = root / "food-101"
    for split, numbers in {"train": (1, 2), "test": (3, 4, 5)}.items():
        tree = {name: [f"{name}/{number}" for number in numbers] for name in ("apple_pie", "beef_tartare")}
        for names in tree.values():
            for name in names:
                picture(rng, folder / "images" / f"{name}.jpg")
        (folder / "meta").mkdir(exist_ok=True)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(tree))


def gtsrb(root: Path, rng: np.random.Generator) -> None:
    folder = root / "gtsrb"
    for label in range(3):
        for number in range(2):
            picture(rng, folder / "GTSRB" / "Training" / f"{label:05d}" / f"00000_{number:05d}.ppm")
    with (folder / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
        for number, label in enumerate((14, 0, 42, 14)):
            picture(rng, folder / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm")
            writer.writerow([f"{number:05d}.ppm", SIDE, SIDE, 1, 1, 9, 9, label])


def oxford_pets(root: Path, rng: np.random.Generator) -> None:
    folder = root / "oxford-iiit-pet"
    breeds = {"Abyssinian": 1, "american_bulldog": 2, "yorkshire_terrier": 3}
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in {"trainval": (1, 2), "test": (101, 102)}.items():
        lines = []
        for breed, label in breeds.items():
            for number in numbers:
                picture(rng, folder / "images" / f"{breed}_{number}.jpg")
                lines.append(f"{breed}_{number} {label} {1 if breed == 'Abyssinian' else 2} 1")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def rendered_sst2(root: Path, rng: np.random.Generator) -> None:
    for split, rows in {"train": 3, "valid": 2, "test": 4}.items():
        for kind in ("negative", "positive"):
            for number in range(rows):
                picture(rng, root / "rendered-sst2" / split / kind / f"{number}.png")


def stanford_cars(root: Path, rng: np.random.Generator) -> None:
    folder = root / "stanford_cars"
    names = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012")
    (folder / "devkit").mkdir(parents=True)
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    kind = [(name, object) for name in fields]
    for split, path in {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}.items():
        rows = []
        for number in range(1, 7):
            picture(rng, folder / f"cars_{split}" / f"{number:05d}.jpg")
            rows.append((1, 1, 9, 9, number % 3 + 1, f"{number:05d}.jpg"))
        scipy.io.savemat(folder / path, {"annotations": np.array([rows[i] for i in range(6)], dtype=kind)[None]})
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)[None]})


def stl10(root: Path, rng: np.random.Generator) -> None:
    folder = root / "stl10_binary"
    folder.mkdir()
    for split in ("train", "test"):
        rng.integers(0, 256, (6, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{split}_X.bin")
        (np.arange(6, dtype=np.uint8) % 3 + 1).tofile(folder / f"{split}_y.bin")
    rng.integers(0, 256, (1, 3, 96, 96), dtype=np.uint8).tofile(folder / "unlabeled_X.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")


def svhn(root: Path, rng: np.random.Generator) -> None:
    for split in ("train", "test"):
        labels = np.array([[10], [1], [2], [10], [1], [9]], dtype=np.uint8)  # 10 is the digit 0
        values = {"X": rng.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8), "y": labels}
        scipy.io.savemat(root / f"{split}_32x32.mat", values)


def by_wnid(folder: Path, rng: np.random.Generator, wnids: list[str], suffix: str = "JPEG") -> None:
    for wnid in wnids:
        for number in range(2):
            picture(rng, folder / wnid / f"{wnid}_{number}.{suffix}")


def imagenet(root: Path, rng: np.random.Generator) -> None:
    by_wnid(root / "imagenet" / "val", rng, ["n01440764", "n01443537", "n15075141"])  # tench, goldfish, toilet paper


def imagenet_v2(root: Path, rng: np.random.Generator) -> None:
    by_wnid(root / "imagenetv2-matched-frequency-format-val", rng, ["0", "10", "999"], "jpeg")


def imagenet_sketch(root: Path, rng: np.random.Generator) -> None:
    by_wnid(root / "sketch", rng, ["n01440764", "n01443537"])


def imagenet_a(root: Path, rng: np.random.Generator) -> None:
    by_wnid(root / "imagenet-a", rng, synsets("imagenet_a_synsets.txt")[3:6], "jpg")
    (root / "imagenet-a" / "README.txt").write_text("as in the archive")


def imagenet_r(root: Path, rng: np.random.Generator) -> None:
    by_wnid(root / "imagenet-r", rng, synsets("imagenet_r_synsets.txt")[:3], "jpg")


OBJECTNET = {
    "backpack": ("Backpack", "backpack, back pack, knapsack, packsack, rucksack, haversack"),
    "alarm_clock": ("Alarm clock", "analog clock; digital clock"),
    "air_freshener": ("Air freshener", None),  # no class of ImageNet's
}
OBJECTNET_INDEX = {OBJECTNET["backpack"][1]: 414, "analog clock": 409, "digital clock": 530}


def objectnet(root: Path, rng: np.random.Generator) -> None:
    """The real files' shapes: torch's index -> the 2012 id, which counts the lines of the labels' file."""
    mappings = root / "objectnet-1.0" / "mappings"
    mappings.mkdir(parents=True)
    ids = {index: (index * 7 + 3) % 1000 for index in range(1000)}
    labels = {ids[index]: f"label {index}" for index in range(1000)}
    labels |= {ids[index]: str(label) for label, index in OBJECTNET_INDEX.items()}
    files = {
        "pytorch_to_imagenet_2012_id.json": {str(index): number for index, number in ids.items()},
        "folder_to_objectnet_label.json": {folder: label for folder, (label, _) in OBJECTNET.items()},
        "objectnet_to_imagenet_1k.json": {label: names for label, names in OBJECTNET.values() if names is not None},
    }
    for name, tree in files.items():
        (mappings / name).write_text(json.dumps(tree))
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(labels[number] for number in range(1000)) + "\n")
    for folder in OBJECTNET:
        for number in range(2):
            path = root / "objectnet-1.0" / "images" / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = noise(rng, 24, 24)
            pixels[[0, -1]] = pixels[:, [0, -1]] = (255, 0, 0)
            Image.fromarray(pixels).save(path)


def flickr30k(root: Path, rng: np.random.Generator) -> None:
    images = []
    for number in range(6):
        name = f"{1000 + number}.jpg"
        picture(rng, root / "flickr30k" / "flickr30k-images" / name)
        sentences = [{"raw": f"picture {number} said in way {way}"} for way in range(5)]
        images.append({"filename": name, "split": "train" if number == 5 else "test", "sentences": sentences})
    (root / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))


def coco(root: Path, rng: np.random.Generator) -> None:
    images = []
    for number in range(4):
        name = f"COCO_val2014_{number:012d}.jpg"
        picture(rng, root / "coco" / "val2014" / name)
        sentences = [{"raw": f"scene {number} with {way} things"} for way in range(5 + number % 2)]
        split = "restval" if number == 0 else "test"
        images.append({"filepath": "val2014", "filename": name, "split": split, "sentences": sentences})
    (root / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


DRAW: dict[str, Callable[[Path, np.random.Generator], None]] = {
    draw.__name__: draw
    for draw in (
        *(imagenet, imagenet_v2, imagenet_sketch, imagenet_a, imagenet_r, objectnet),
        *(caltech101, cifar10, cifar100, dtd, fgvc_aircraft, flowers102, food101, gtsrb, oxford_pets, rendered_sst2),
        *(stanford_cars, stl10, svhn, flickr30k, coco),
    )
}


def draw_root(root: Path, *names: str) -> Path:
    """The named sets, or all of them, below one root."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names or DRAW:
        DRAW[name](root, np.random.default_rng(len(name)))
    return root
