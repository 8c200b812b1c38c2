"""Images with several captions each, from the annotation files that Flickr30k and COCO are published with.

open_captions     Karpathy's JSON, COCO's captions_*.json, or a table of images and captions
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

IMAGE_NAMES = ("image", "filepath", "file_name", "filename", "file", "path")
CAPTION_NAMES = ("caption", "text", "title", "sentence", "comment")


@dataclass(frozen=True)
class CaptionedImages:
    """Image files, and of each the captions that are its own.

    Args:
        paths: of the images, which need not be readable.
        captions: as many tuples, none empty.
        note: what was left out.
    """

    paths: tuple[Path, ...]
    captions: tuple[tuple[str, ...], ...]
    note: str = ""

    @cached_property
    def most(self) -> int:
        """Captions of the image that has most."""
        return max(map(len, self.captions))


def open_captions(annotations: Path, images: Path | None = None, split: str = "test") -> CaptionedImages:
    """What an annotation file says, in its order.

    Args:
        annotations: `.json`, Karpathy's (`images` with `sentences` and `split`) or COCO's (`images`, `annotations`);
            `.csv` or `.tsv`, with a column of image paths and one of captions, a row per caption.
        images: the folder that paths are relative to; the annotation file's own unless given.
        split: of a Karpathy file; the others have one.

    Raises:
        ValueError: a file that is none of these, or has no captioned image.
    """
    folder = annotations.parent if images is None else images
    try:
        if annotations.suffix.lower() in (".csv", ".tsv"):
            found = table_rows(annotations)
        else:
            tree = json.loads(annotations.read_text(encoding="utf-8"))
            found = coco_rows(tree) if "annotations" in tree else karpathy_rows(tree, split)
        rows = list(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{annotations} cannot be read as captions ({type(error).__name__}: {error}); give Karpathy's or COCO's "
            "JSON, or a .csv or .tsv whose header names an image and a caption column"
        ) from error
    by_image: dict[str, list[str]] = {}
    for image, caption in rows:
        own = by_image.setdefault(image, [])
        if caption.strip():
            own.append(caption.strip())
    kept = {image: captions for image, captions in by_image.items() if captions}
    if not kept:
        raise ValueError(f"{annotations} has no captioned images (if it is Karpathy's, of split {split!r})")
    left_out = len(by_image) - len(kept)
    note = f"{left_out} images without a caption left out" if left_out else ""
    return CaptionedImages(tuple(folder / image for image in kept), tuple(map(tuple, kept.values())), note)


def karpathy_rows(tree: Any, split: str) -> Iterable[tuple[str, str]]:
    """(image, caption) of a split; an image without sentences gives an empty caption."""
    for image in tree["images"]:
        if image["split"] != split:
            continue
        path = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
        yield path, ""
        for sentence in image["sentences"]:
            yield path, sentence["raw"]


def coco_rows(tree: Any) -> Iterable[tuple[str, str]]:
    """(image, caption) of COCO's captions file."""
    names = {image["id"]: image["file_name"] for image in tree["images"]}
    for name in names.values():
        yield name, ""
    for annotation in tree["annotations"]:
        yield names[annotation["image_id"]], annotation["caption"]


def table_rows(path: Path) -> Iterable[tuple[str, str]]:
    """(image, caption) of a table with a header.

    Raises:
        ValueError: no such columns.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header = list(reader.fieldnames or ())
        columns = [next((name for name in names if name in header), None) for names in (IMAGE_NAMES, CAPTION_NAMES)]
        if None in columns:
            raise ValueError(f"of its columns {header} none is in {IMAGE_NAMES}, or none in {CAPTION_NAMES}")
        for row in reader:
            yield str(row[str(columns[0])]), str(row[str(columns[1])] or "")
