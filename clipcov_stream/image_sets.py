"""Labelled images of public evaluation sets, read from where their own archives put them.

torchvision's classes read what they know; ImageNet and its shifts are folders named by WordNet id or class number,
whose order timm knows. Nothing is downloaded and nothing is written.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from torchvision import datasets

from clipcov_stream import prompts
from clipcov_stream.materialize import decode_image

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
OBJECTNET_BORDER = 2
"""Pixels cut from each side: ObjectNet's images have a red border of one, and resizing would spread it."""
CALTECH_TRAIN_PER_CLASS = 30


class Samples(Protocol):
    """Images that `materialize.decode_image` reads, each with its class index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class LabelledImages:
    """A set, opened.

    Args:
        samples: images and class indices.
        names: what to call the classes; several names of one class are alternatives, of which the nearest counts.
        templates: sentences with {} for a name.
        owner: class index of each name; None where each class has one.
        note: what a reader of its figures should know.
    """

    samples: Samples
    names: tuple[str, ...]
    templates: tuple[str, ...]
    owner: tuple[int, ...] | None = None
    note: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.names) if self.owner is None else max(self.owner) + 1


@dataclass(frozen=True)
class Files:
    """Image files, read when they are asked for; `border` pixels are cut from each side."""

    paths: Sequence[Path]
    labels: Sequence[int]
    border: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        data = self.paths[index].read_bytes()
        if not self.border:
            return data, self.labels[index]
        image = decode_image(Image.open(io.BytesIO(data)))
        box = (self.border, self.border, image.width - self.border, image.height - self.border)
        return image.crop(box), self.labels[index]


def images_below(folder: Path) -> list[Path]:
    """Its image files at any depth, in order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones aside, in order."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def files_by_class(folder: Path, index: dict[str, int], border: int = 0) -> Files:
    """The images in those folders of `folder` that have a class index.

    Raises:
        ValueError: there are none.
    """
    names = [name for name in class_folders(folder) if name in index]
    found = [(path, index[name]) for name in names for path in images_below(folder / name)]
    if not found:
        raise ValueError(f"{folder} has no images in folders such as {', '.join(sorted(index)[:3])}")
    return Files([path for path, _ in found], [label for _, label in found], border)


def image_folder(folder: Path, templates: Sequence[str] = prompts.PHOTO) -> LabelledImages:
    """One folder per class, named after it.

    Raises:
        ValueError: no such folder, or no images in folders of it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that has a folder of images per class")
    names = class_folders(folder)
    samples = files_by_class(folder, {name: label for label, name in enumerate(names)})
    return LabelledImages(samples, tuple(map(prompts.spoken, names)), tuple(templates))


def synsets(file: str = "imagenet_synsets.txt") -> list[str]:
    """WordNet ids of ImageNet's classes, or of a shift's, in order of their indices; timm ships them."""
    return (resources.files("timm.data") / "_info" / file).read_text(encoding="utf-8").split()


def imagenet(folder: Path, subset: str | None = None) -> LabelledImages:
    """ImageNet's layout: a folder per WordNet id.

    Args:
        folder: of those folders.
        subset: timm's list of the WordNet ids of a set with fewer classes, which alone compete; None is all 1,000.
    """
    everything = synsets()
    wnids = everything if subset is None else synsets(subset)
    names = [IMAGENET_CLASSNAMES[everything.index(wnid)] for wnid in wnids]
    samples = files_by_class(folder, {wnid: label for label, wnid in enumerate(wnids)})
    return LabelledImages(samples, tuple(names), prompts.IMAGENET_TEMPLATES)


def imagenet_v2(folder: Path) -> LabelledImages:
    """ImageNet-V2's layout: folders 0 to 999, ImageNet's class indices."""
    samples = files_by_class(folder, {str(label): label for label in range(1000)})
    return LabelledImages(samples, tuple(IMAGENET_CLASSNAMES), prompts.IMAGENET_TEMPLATES)


def objectnet(folder: Path) -> LabelledImages:
    """ObjectNet's classes that ImageNet has too, by the mappings that come with it.

    An image is right if the nearest of the ImageNet names of all these classes is one of its own class' names.

    Raises:
        ValueError: mappings that do not fit ImageNet or one another.
    """

    def mapping(name: str) -> Any:
        return json.loads((folder / "mappings" / name).read_text(encoding="utf-8"))

    # ImageNet's 2012 ids by position in the list of labels, and torch's indices of the same.
    labels = (folder / "mappings" / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()
    try:
        torch_index = {int(number): int(index) for index, number in mapping("pytorch_to_imagenet_2012_id.json").items()}
        index_of = {label.strip(): torch_index[number] for number, label in enumerate(labels)}
        folder_of = {label: name for name, label in mapping("folder_to_objectnet_label.json").items()}
        classes = sorted(mapping("objectnet_to_imagenet_1k.json").items())
        members = [[index_of[name.strip()] for name in names.split(";")] for _, names in classes]
        index = {folder_of[label]: number for number, (label, _) in enumerate(classes)}
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'mappings'} are not ObjectNet's: {error!r}") from error
    samples = files_by_class(folder / "images", index, OBJECTNET_BORDER)
    return LabelledImages(
        samples,
        tuple(IMAGENET_CLASSNAMES[one] for several in members for one in several),
        prompts.IMAGENET_TEMPLATES,
        tuple(number for number, several in enumerate(members) for _ in several),
    )


def caltech101(root: Path, train: bool) -> LabelledImages:
    """30 images a class, drawn once and for all, to train on; the rest to evaluate on."""
    # torchvision's class would make the folder where there is none, and needs SciPy for outlines that nobody asks for.
    folder = root / "caltech101" / "101_ObjectCategories"
    names = [name for name in class_folders(folder) if name != "BACKGROUND_Google"]
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        images = images_below(folder / name)
        count = max(0, min(CALTECH_TRAIN_PER_CLASS, len(images) - 1))
        chosen = set(random.Random(name).sample(range(len(images)), count))
        own = [path for at, path in enumerate(images) if (at in chosen) == train]
        paths += own
        labels += [label] * len(own)
    spoken = tuple(prompts.CALTECH101.get(name, prompts.spoken(name)) for name in names)
    note = "30 images a class held out for training, a draw of this project's"
    return LabelledImages(Files(paths, labels), spoken, prompts.TEMPLATES["caltech101"], note=note)


def cifar(kind: type[datasets.CIFAR10], name: str, root: Path, train: bool) -> LabelledImages:
    data = kind(str(root), train=train)
    return LabelledImages(data, tuple(map(prompts.spoken, data.classes)), prompts.TEMPLATES[name])


class Joined:
    """Several data sets, one after another."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def from_torchvision(
    kind: Any, name: str, root: Path, splits: Sequence[str], classes: Sequence[str] | None = None
) -> LabelledImages:
    """Splits of one of torchvision's data sets, under the class names that it knows unless others are given."""
    parts = [kind(str(root), split=split) for split in splits]
    own = [list(getattr(part, "classes", ())) for part in parts]
    if classes is None and any(names != own[0] for names in own):
        raise ValueError(f"{name}: its splits {list(splits)} have different classes")
    names = own[0] if classes is None else classes
    return LabelledImages(Joined(parts), tuple(map(prompts.spoken, names)), prompts.TEMPLATES[name])
