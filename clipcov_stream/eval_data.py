"""Evaluation sets -> batches of the model, the same in training's Evaluators and in tools/evaluate.py."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from clipcov_stream.caption_sets import CaptionedImages
from clipcov_stream.image_sets import LabelledImages
from clipcov_stream.materialize import ImageTransform, Tokenizer, UndecodableImage, decode_image
from clipcov_stream.stream import PoolCollate
from clipcov_stream.workers import begin_worker, held_signals


class ImagesDataset(Dataset[dict[str, Any]]):
    """Images with a class, or with several captions each.

    A sample is a dict of `image` (3, s, s) uint8, `id` and `valid`; and of `label`, or of `text` (captions, context)
    and `text_valid` (captions,), which is False where others have more captions. An image that cannot be read becomes
    zeros with `valid` False, and counts as a miss.

    Args:
        images: the set.
        transform: of images.
        tokenizer: str -> (context,) token ids; read only where there are captions.
    """

    def __init__(
        self, images: LabelledImages | CaptionedImages, transform: ImageTransform, tokenizer: Tokenizer
    ) -> None:
        self.images = images
        self.crop, self.size = transform.crop(), transform.size
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.images.paths if isinstance(self.images, CaptionedImages) else self.images.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if isinstance(self.images, CaptionedImages):
            return {**self.pixels(self.images.paths[index], index), **self.texts(self.images.captions[index])}
        try:
            image, label = self.images.samples[index]
        except Exception:  # a file that is not there, or whatever Pillow says of one that is no image
            image, label = None, label_of(self.images.samples, index)
        return {**self.pixels(image, index), "label": label}

    def pixels(self, image: Any, index: int) -> dict[str, Any]:
        """`image`, `id` and `valid` of encoded bytes, a PIL image, a path, or None."""
        try:
            data = image.read_bytes() if isinstance(image, Path) else image
            return {"image": self.crop(decode_image(data)), "id": index, "valid": True}
        except (UndecodableImage, OSError):
            return {"image": torch.zeros(3, self.size, self.size, dtype=torch.uint8), "id": index, "valid": False}

    def texts(self, captions: tuple[str, ...]) -> dict[str, Any]:
        """`text` and `text_valid`, padded to the captions of the image that has most."""
        assert isinstance(self.images, CaptionedImages)
        tokens = torch.stack([self.tokenizer(caption) for caption in captions])
        text = tokens.new_zeros(self.images.most, tokens.shape[1])
        text[: len(tokens)] = tokens
        return {"text": text, "text_valid": torch.arange(self.images.most) < len(tokens)}


def label_of(samples: Any, index: int) -> int:
    """The class of an image that cannot be opened.

    Raises:
        RuntimeError: a data set that keeps its labels where nobody knows of.
    """
    for part in getattr(samples, "parts", [samples]):
        if index >= len(part):
            index -= len(part)
            continue
        for name in ("labels", "_labels"):
            if hasattr(part, name):
                return int(getattr(part, name)[index])
        if hasattr(part, "_samples"):
            return int(part._samples[index][1])
    raise RuntimeError(f"image {index} of {type(samples).__name__} cannot be opened, and its label is not known")


def stored_integers(shard: Any, name: str) -> np.ndarray | None:
    """(n,) a column of a shard, read without the rest of its samples; None unless it is of whole numbers, and the
    shard's file lies here uncompressed and is what the index says.

    Args:
        shard: Streaming's reader.
    """
    path = Path(shard.dirname, shard.split or "", shard.raw_data.basename)
    at = shard.column_names.index(name)
    dtype = "int64" if shard.column_encodings[at] == "int" else shard.column_encodings[at]
    if not re.fullmatch(r"u?int\d+", dtype) or not path.is_file() or path.stat().st_size != shard.raw_data.bytes:
        return None
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    pages.madvise(mmap.MADV_RANDOM)  # else the system would read the images along
    data = np.frombuffer(pages, np.uint8)
    try:
        begins = np.frombuffer(pages, "<u4", len(shard), 4).astype(np.int64)
        # A sample is the sizes of its columns of variable size, then its columns in the order of the index.
        heads = begins[:, None] + np.arange(4 * shard.column_sizes.count(None))
        told = iter(np.ascontiguousarray(data[heads]).view("<u4").astype(np.int64).T)
        offsets = begins + heads.shape[1]
        for size in shard.column_sizes[:at]:
            offsets = offsets + (next(told) if size is None else size)
        return data[offsets[:, None] + np.arange(np.dtype(dtype).itemsize)].view(dtype)[:, 0]
    except (ValueError, IndexError):  # bytes that are no shard: who reads its samples says so
        return None


class ImageLoader(DataLoader[Any]):
    """A DataLoader whose workers outlive a signal to their group from the first."""

    def _get_iterator(self) -> Any:
        with held_signals():
            return super()._get_iterator()


def image_loader(dataset: ImagesDataset, transform: ImageTransform, batch_size: int, num_workers: int) -> ImageLoader:
    """Its batches, normalized; shared out over ranks, which repeat some samples that metrics then count once."""
    return ImageLoader(
        dataset,
        batch_size=batch_size,
        sampler=dist.get_sampler(dataset, shuffle=False, drop_last=False),
        num_workers=num_workers,
        worker_init_fn=begin_worker,
        collate_fn=PoolCollate(transform),
        drop_last=False,
    )
