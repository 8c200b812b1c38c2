"""JPEGs decoded by a GPU: torchvision's nvJPEG decoder, a batch at a time.

Only plain files go there: whole JPEGs, grey or in the usual colour space. Everything else, and what the device's
decoder refuses, is left to Pillow, which alone says that an image cannot be decoded. Pixels differ by rounding (the
inverse cosine transform and the resize are other ones), so weights are not those of decoding on CPUs, bit for bit; of
a damaged file, what two decoders make may differ more.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from clipcov_stream.decode import MAX_ASPECT, MAX_PIXELS, MAX_SCANS, opened

BATCH_PIXELS = 2**26
"""Decoded at once, at most, unless one image has more: 200 MB."""
END = b"\xff\xd9"
"""Of a JPEG that is not truncated. Files with bytes after it are Pillow's."""
SCAN = b"\xff\xda"
"""What a scan begins with."""


def pixels_of(data: Any, max_pixels: int = MAX_PIXELS) -> int | None:
    """Pixels of an image that the device may decode, from its header; None for all others."""
    if not (isinstance(data, bytes) and data.startswith(b"\xff\xd8\xff") and data.endswith(END)):
        return None
    if data.count(SCAN) > MAX_SCANS:  # whether within them or behind the end, nobody knows how nvJPEG sees it
        return None
    try:
        with opened(data, max_pixels) as image:
            width, height = image.size
            is_plain = isinstance(image, JpegImageFile) and has_usual_colours(image)
    except Exception:  # Pillow raises nearly anything on bad bytes, and will say what when it is asked to decode them
        return None
    is_plain &= max(width, height) <= MAX_ASPECT * min(width, height)
    return width * height if is_plain and width * height <= max_pixels else None


def has_usual_colours(image: JpegImageFile) -> bool:
    """Whether a JPEG is grey, or YCbCr by all that tells decoders so; of others they make different colours."""
    components = [layer[0] for layer in image.layer]
    if image.mode == "L":
        return len(components) == 1
    return image.mode == "RGB" and components == [1, 2, 3] and image.info.get("adobe_transform", 1) == 1


def decoded_on(
    device: torch.device, encoded: Sequence[Any], max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[int, Tensor]]:
    """Place and (3, height, width) uint8, on the device, of every image that it decodes; the others are Pillow's.

    Args:
        device: a CUDA device; on a CPU, libjpeg decodes.
        encoded: bytes of images of any kind, or anything else.
        max_pixels: as in `decode_image`.

    Raises:
        RuntimeError: the device's own, such as that its memory is full.

    Costs: 3 bytes on the device for each pixel of a batch, BATCH_PIXELS; the next is decoded once the caller has gone
    through the last.
    """
    batch: list[int] = []
    total = 0
    for place, data in enumerate(encoded):
        size = pixels_of(data, max_pixels)
        if size is None:
            continue
        if batch and total + size > BATCH_PIXELS:
            yield from _decoded(device, encoded, batch)
            batch, total = [], 0
        batch.append(place)
        total += size
    if batch:
        yield from _decoded(device, encoded, batch)


def _decoded(device: torch.device, encoded: Sequence[Any], batch: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """The images of these places; of those that make the decoder fail, all but the culprits."""
    try:
        images = decode(device, [encoded[place] for place in batch])
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        # It gives no partial results, and does not say which.
        if len(batch) > 1:
            half = len(batch) // 2
            yield from _decoded(device, encoded, batch[:half])
            yield from _decoded(device, encoded, batch[half:])
        return
    yield from zip(batch, images, strict=True)


def decode(device: torch.device, encoded: Sequence[bytes]) -> list[Tensor]:
    """(3, height, width) uint8 of JPEGs; RuntimeError if one of them cannot be decoded."""
    # Copies: torch warns of memory that it may not write to.
    data = [torch.from_numpy(np.frombuffer(one, np.uint8).copy()) for one in encoded]
    return [*decode_jpeg(data, ImageReadMode.RGB, device)]


def check_decoder(device: torch.device) -> None:
    """Raise RuntimeError unless a device decodes a JPEG that has nothing wrong with it."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 90)).save(buffer, "JPEG")
    (image,) = decode(device, [buffer.getvalue()])
    if tuple(image.shape) != (3, 16, 16):
        raise RuntimeError(f"a picture of 16 x 16 came out as {tuple(image.shape)}")
