"""The paper's evaluation: which sets, where each lies below one root, what its figure is, and what is averaged.

The paper names no list for its "11 downstream datasets". `ELEVEN` are the thirteen of the code it trained with (CyCLIP)
without the two that ask for reading, RenderedSST2 and SVHN; both averages are reported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchvision import datasets

from clipcov_stream import image_sets, prompts
from clipcov_stream.caption_sets import CaptionedImages, open_captions
from clipcov_stream.image_sets import LabelledImages, from_torchvision

Opener = Callable[[Path, bool], "LabelledImages | CaptionedImages"]


@dataclass(frozen=True)
class EvalSet:
    """A set of the suite.

    Args:
        title: what people call it.
        needs: paths below the root without which it is missing.
        source: what to put there.
        open: root, and whether to open the training images instead -> the set.
        standard: the metric that papers give of it, the CLIP paper's (Radford et al., table 9).
        has_train: whether it has labelled images to train a probe on.
        modules: Python packages that reading it takes, beside those that are always there.
        train_needs: further paths that the training images lie in.
    """

    title: str
    needs: tuple[str, ...]
    source: str
    open: Opener
    standard: str = "top1"
    has_train: bool = False
    modules: tuple[str, ...] = ()
    train_needs: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        return "retrieval" if self.standard.startswith(("image_to", "text_to")) else "zeroshot"

    def missing(self, root: Path, train: bool = False) -> str | None:
        """What to do for it to be there; None if nothing."""
        lacking = [name for name in (*self.needs, *(self.train_needs if train else ())) if not (root / name).exists()]
        if lacking:
            return f"no {', '.join(lacking)} in {root}: {self.source}"
        absent = [name for name in self.modules if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(absent)}: pip install 'clipcov-stream[eval]'" if absent else None


def imagenet_like(folder: str, subset: str | None = None) -> Opener:
    return lambda root, train: image_sets.imagenet(root / folder, subset)


def splits_of(
    kind: Any, name: str, train: tuple[str, ...], classes: tuple[str, ...] | None = None, test: str = "test"
) -> Opener:
    def open_(root: Path, is_train: bool) -> LabelledImages:
        return from_torchvision(kind, name, root, train if is_train else (test,), classes)

    return open_


def captioned(annotations: str, images: str) -> Opener:
    return lambda root, train: open_captions(root / annotations, root / images)


IMAGENET: dict[str, EvalSet] = {
    "imagenet": EvalSet(
        "ImageNet-1k",
        ("imagenet/val",),
        "the validation images, a folder per WordNet id",
        imagenet_like("imagenet/val"),
    ),
    "imagenet_v2": EvalSet(
        "ImageNet-V2",
        ("imagenetv2-matched-frequency-format-val",),
        "imagenetv2-matched-frequency.tar.gz as it unpacks",
        lambda root, train: image_sets.imagenet_v2(root / "imagenetv2-matched-frequency-format-val"),
    ),
    "imagenet_sketch": EvalSet(
        "ImageNet-Sketch",
        ("sketch",),
        "ImageNet-Sketch.zip as it unpacks, a folder per WordNet id",
        imagenet_like("sketch"),
    ),
    "imagenet_a": EvalSet(
        "ImageNet-A",
        ("imagenet-a",),
        "imagenet-a.tar as it unpacks",
        imagenet_like("imagenet-a", "imagenet_a_synsets.txt"),
    ),
    "imagenet_r": EvalSet(
        "ImageNet-R",
        ("imagenet-r",),
        "imagenet-r.tar as it unpacks",
        imagenet_like("imagenet-r", "imagenet_r_synsets.txt"),
    ),
    "objectnet": EvalSet(
        "ObjectNet",
        ("objectnet-1.0/images", "objectnet-1.0/mappings"),
        "objectnet-1.0.zip as it unpacks, its mappings too",
        lambda root, train: image_sets.objectnet(root / "objectnet-1.0"),
    ),
}

DOWNSTREAM: dict[str, EvalSet] = {
    "caltech101": EvalSet(
        "Caltech101",
        ("caltech101/101_ObjectCategories",),
        "101_ObjectCategories.tar.gz, unpacked there",
        image_sets.caltech101,
        "mean_per_class",
        True,
    ),
    "cifar10": EvalSet(
        "CIFAR10",
        ("cifar-10-batches-py",),
        "cifar-10-python.tar.gz as it unpacks",
        partial(image_sets.cifar, datasets.CIFAR10, "cifar10"),
        has_train=True,
    ),
    "cifar100": EvalSet(
        "CIFAR100",
        ("cifar-100-python",),
        "cifar-100-python.tar.gz as it unpacks",
        partial(image_sets.cifar, datasets.CIFAR100, "cifar100"),
        has_train=True,
    ),
    "dtd": EvalSet(
        "DTD",
        ("dtd/dtd/labels", "dtd/dtd/images"),
        "dtd-r1.0.1.tar.gz, unpacked in dtd",
        splits_of(datasets.DTD, "dtd", ("train", "val")),
        has_train=True,
    ),
    "fgvc_aircraft": EvalSet(
        "FGVC-Aircraft",
        ("fgvc-aircraft-2013b/data",),
        "fgvc-aircraft-2013b.tar.gz as it unpacks",
        splits_of(datasets.FGVCAircraft, "fgvc_aircraft", ("trainval",)),
        "mean_per_class",
        True,
    ),
    "flowers102": EvalSet(
        "Flowers102",
        ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        "102flowers.tgz unpacked in flowers-102, imagelabels.mat and setid.mat beside it",
        splits_of(
            datasets.Flowers102,
            "flowers102",
            ("train", "val"),
            tuple(name.rstrip("?") for name in datasets.Flowers102.classes),
        ),
        "mean_per_class",
        True,
        ("scipy",),
    ),
    "food101": EvalSet(
        "Food101",
        ("food-101/meta", "food-101/images"),
        "food-101.tar.gz as it unpacks",
        splits_of(datasets.Food101, "food101", ("train",)),
        has_train=True,
    ),
    "gtsrb": EvalSet(
        "GTSRB",
        ("gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
        "GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip, and GTSRB-Training_fixed.zip for probes, unpacked in "
        "gtsrb",
        splits_of(datasets.GTSRB, "gtsrb", ("train",), prompts.GTSRB),
        has_train=True,
        train_needs=("gtsrb/GTSRB/Training",),
    ),
    "oxford_pets": EvalSet(
        "Oxford-IIIT Pet",
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"),
        "images.tar.gz and annotations.tar.gz, unpacked in oxford-iiit-pet",
        splits_of(datasets.OxfordIIITPet, "oxford_pets", ("trainval",)),
        "mean_per_class",
        True,
    ),
    "rendered_sst2": EvalSet(
        "RenderedSST2",
        ("rendered-sst2/test",),
        "rendered-sst2.tgz as it unpacks",
        splits_of(datasets.RenderedSST2, "rendered_sst2", ("train", "val")),
        has_train=True,
        train_needs=("rendered-sst2/train", "rendered-sst2/valid"),
    ),
    "stanford_cars": EvalSet(
        "Stanford Cars",
        ("stanford_cars/devkit", "stanford_cars/cars_test", "stanford_cars/cars_test_annos_withlabels.mat"),
        "cars_train, cars_test, devkit and cars_test_annos_withlabels.mat, in stanford_cars",
        splits_of(datasets.StanfordCars, "stanford_cars", ("train",)),
        has_train=True,
        modules=("scipy",),
        train_needs=("stanford_cars/cars_train",),
    ),
    "stl10": EvalSet(
        "STL10",
        ("stl10_binary",),
        "stl10_binary.tar.gz as it unpacks",
        splits_of(datasets.STL10, "stl10", ("train",)),
        has_train=True,
    ),
    "svhn": EvalSet(
        "SVHN",
        ("test_32x32.mat",),
        "test_32x32.mat, and train_32x32.mat for probes",
        splits_of(datasets.SVHN, "svhn", ("train",), prompts.DIGITS),
        has_train=True,
        modules=("scipy",),
        train_needs=("train_32x32.mat",),
    ),
}

RETRIEVAL: dict[str, EvalSet] = {
    "flickr30k": EvalSet(
        "Flickr30k",
        ("flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k-images"),
        "Karpathy's dataset_flickr30k.json, and the images in flickr30k-images, in flickr30k",
        captioned("flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k-images"),
        "image_to_text_r1",
    ),
    "coco": EvalSet(
        "COCO captions",
        ("coco/dataset_coco.json", "coco/val2014"),
        "Karpathy's dataset_coco.json and val2014, in coco; for another split eval.NAME.dataset=captions",
        captioned("coco/dataset_coco.json", "coco"),
        "image_to_text_r1",
    ),
}

SETS: Mapping[str, EvalSet] = {**IMAGENET, **DOWNSTREAM, **RETRIEVAL}

SHIFTS = tuple(name for name in IMAGENET if name != "imagenet")
ELEVEN = tuple(name for name in DOWNSTREAM if name not in ("rendered_sst2", "svhn"))
AVERAGES: Mapping[str, tuple[str, ...]] = {
    "ImageNet's shifts": SHIFTS,
    "downstream, 11 sets": ELEVEN,
    "downstream, 13 sets": tuple(DOWNSTREAM),
}
"""Title -> sets whose standard metrics are averaged, if all are there."""


def open_set(name: str, root: Path, train: bool = False) -> LabelledImages | CaptionedImages:
    """A set of the suite below a root.

    Raises:
        ValueError: an unknown name, a set that is missing, or files that are not what its archive has.
    """
    if name not in SETS:
        raise ValueError(f"{name!r} is not a set of the suite; its sets are {', '.join(SETS)}")
    chosen = SETS[name]
    if train and not chosen.has_train:
        raise ValueError(f"{name} has no training images here; a probe needs some")
    if reason := chosen.missing(root, train):
        raise ValueError(f"{name}: {reason}")
    try:
        opened = chosen.open(root, train)
    except (RuntimeError, OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{name}: {root} is not what its archive has ({type(error).__name__}: {error})") from error
    size = len(opened.paths) if isinstance(opened, CaptionedImages) else len(opened.samples)
    if size == 0:
        raise ValueError(f"{name}: {root} has no images of it")
    return opened


def average(figures: Mapping[str, float], names: tuple[str, ...]) -> tuple[float | None, list[str]]:
    """The mean over `names`, None where some are missing; and those that are."""
    holes = [name for name in names if name not in figures]
    return (None if holes else sum(figures[name] for name in names) / len(names)), holes
