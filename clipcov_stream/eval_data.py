"""Evaluation sets -> batches of the model, the same in training's Evaluators and in tools/evaluate.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
