"""JPEGs decoded by a GPU: torchvision's nvJPEG decoder, a batch at a time.

Only what every decoder reads alike goes there: whole baseline or progressive JPEGs in RGB or grey. Everything else, and
what the device's decoder refuses, is left to Pillow, which alone decides whether an image can be decoded at all; so the
same samples are undecodable with and without a GPU. Their pixels differ by rounding (the inverse cosine transform and
the resize are other ones), so weights are not those of decoding on CPUs, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from clipcov_stream.decode import MAX_ASPECT, MAX_PIXELS, opened

BATCH_PIXELS = 2**26
"""Decoded at once, at most, unless one image has more: 200 MB."""
END = b"\xff\xd9"
"""Of a JPEG that is not truncated. Files with bytes after it are Pillow's."""


def pixels_of(data: Any, max_pixels: int = MAX_PIXELS) -> int | None:
    """Pixels of an image that the device may decode, from its header; None for all others."""
    if not (isinstance(data, bytes) and data.startswith(b"\xff\xd8\xff") and data.endswith(END)):
        return None
    try:
        with opened(data, max_pixels) as image:
            width, height, mode = *image.size, image.mode
    except Exception:  # Pillow raises nearly anything on bad bytes, and will say what when it is asked to decode them
        return None
    alike = mode in ("RGB", "L") and max(width, height) <= MAX_ASPECT * min(width, height)
    return width * height if alike and width * height <= max_pixels else None


def decode_on(device: torch.device, encoded: Sequence[Any], max_pixels: int = MAX_PIXELS) -> list[Tensor | None]:
    """(3, height, width) uint8 of every image on the device; None for those that are left to Pillow.

    Args:
        device: a CUDA device; on a CPU, libjpeg decodes.
        encoded: bytes of images of any kind, or anything else.
        max_pixels: as in `decode_image`.

    Costs: 3 bytes a pixel, on the device.
    """
    found: list[Tensor | None] = [None] * len(encoded)
    sizes = [pixels_of(data, max_pixels) for data in encoded]
    batch: list[int] = []
    total = 0
    for place, size in enumerate(sizes):
        if size is None:
            continue
        if batch and total + size > BATCH_PIXELS:
            _decode_into(found, batch, device, encoded)
            batch, total = [], 0
        batch.append(place)
        total += size
    if batch:
        _decode_into(found, batch, device, encoded)
    return found


def _decode_into(
    found: list[Tensor | None], batch: Sequence[int], device: torch.device, encoded: Sequence[Any]
) -> None:
    """Decode the images of these places; of those that make the decoder fail, all but the culprits."""
    try:
        # A copy: torch warns of memory that it may not write to.
        data = [torch.from_numpy(np.frombuffer(encoded[place], np.uint8).copy()) for place in batch]
        images = decode_jpeg(data, ImageReadMode.RGB, device)
    except RuntimeError:
        # It gives no partial results, and does not say which.
        if len(batch) > 1:
            half = len(batch) // 2
            _decode_into(found, batch[:half], device, encoded)
            _decode_into(found, batch[half:], device, encoded)
        return
    for place, image in zip(batch, images, strict=True):
        found[place] = image
