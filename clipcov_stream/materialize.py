"""Samples -> tensors: decode, augment, tokenize.

Image transforms are torchvision's v2, composed as open_clip composes its own: RandomResizedCrop (or resize and centre
crop), RGB, float, normalize. Each is a plain function of the bytes and of a seed, so a sample's augmentation does not
depend on the worker that drew it, and a resumed run sees the same pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

OPENAI_MEAN = open_clip.OPENAI_DATASET_MEAN
OPENAI_STD = open_clip.OPENAI_DATASET_STD


class UndecodableImage(ValueError):
    """Bytes that no image comes out of; the message says why."""


def decode_image(data: Any) -> Image.Image:
    """RGB image from encoded bytes or a PIL image; transparency is laid on white.

    Raises:
        UndecodableImage: truncated, empty, not an image, or larger than Pillow's decompression-bomb limit.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its pixel limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
            if image.mode.startswith("I;16"):
                # Pillow would clip 16-bit greys at 255 instead of scaling them.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on bad bytes
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class ImageTransform:
    """Normalized (3, size, size) float32 tensors from RGB images.

    Args:
        size: side of the square, in pixels.
        mean, std: per channel, in [0, 1] pixel units.
        min_scale: smallest share of the image's area that a random crop keeps (open_clip trains with 0.9); 1 turns
            augmentation off: resize the shorter side, then centre crop.
    """

    size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    min_scale: float = 1.0

    def crop(self) -> Callable[[Image.Image], Tensor]:
        """One image -> (3, size, size) uint8; the part that is random under augmentation."""
        bicubic = v2.InterpolationMode.BICUBIC
        if self.min_scale < 1:
            steps: list[Any] = [v2.RandomResizedCrop(self.size, scale=(self.min_scale, 1.0), interpolation=bicubic)]
        else:
            steps = [v2.Resize(self.size, interpolation=bicubic), v2.CenterCrop(self.size)]
        return v2.Compose([*steps, v2.PILToTensor()])

    def normalize(self) -> Callable[[Tensor], Tensor]:
        """(..., 3, size, size) uint8 -> normalized float32; once per pool, not once per image: a third of the time."""
        return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)])


def augmented(transform: Callable[[Image.Image], Tensor], image: Image.Image, seed: int) -> Tensor:
    """The transform of an image under its own seed; the global generator is left as it was."""
    # Not torch.manual_seed: it also queues a call for CUDA, with a formatted stack trace, for every image.
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        return transform(image)
    finally:
        generator.set_state(state)
