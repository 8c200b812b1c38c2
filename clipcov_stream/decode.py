"""Encoded images that somebody else wrote -> RGB, or an error of one kind.

What an image claims is checked before it is believed: the format by name, the size by its header before a pixel is
decoded, and a JPEG's scans, each of which is a pass over all of them. Everything else that bytes can do to a decoder
ends in UndecodableImage, so that one file costs one sample, and never the run.
"""

from __future__ import annotations

import io
import re
import struct
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Raster formats alone: Pillow would hand an EPS found on the web to Ghostscript. Of animations the first frame."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit, beyond which it warns: 256 MiB of RGB."""
MOST_PIXELS = 2 * MAX_PIXELS
"""What Pillow opens at all."""
MAX_SCANS = 100
"""Of a JPEG; encoders write some ten. A megabyte can hold 50,000, each a pass over the whole image."""
MAX_SEGMENTS = 50_000
"""Of a JPEG in which scans have to be looked for; a segment holds up to 64 kB, and a file has some ten."""
MAX_ASPECT = 16
"""Longer by shorter side, beyond which only the middle of an image is kept: resized by its shorter side, an image of
1 x 60,000 pixels would be 9 GB."""

SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xdd\xe0-\xef\xfe]")
"""Of a JPEG: the markers that its decoder reads a length after, and the end. It passes over all others, or fails."""


class UndecodableImage(ValueError):
    """Bytes that no image comes out of; the message says why."""


class ImageTooLarge(UndecodableImage):
    """More pixels, or more passes over them, than are decoded."""


def decode_image(data: Any, at_least: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB image from encoded bytes or a PIL image; transparency is laid on white.

    Args:
        at_least: side in pixels; a JPEG that is at least twice as large is decoded at half, a quarter or an eighth of
            its size, which takes a fraction of the time. None: whole.
        max_pixels: an image whose header says more is not decoded.

    Raises:
        UndecodableImage: truncated, empty, not an image of FORMATS, or too large; 32-bit values without a contrast.

    A JPEG whose header promises more pixels than it has is grey where there are none, as libjpeg gives it.

    Costs: at most some 12 bytes of memory for each of `max_pixels`, for transparent images; 4 for a plain JPEG.
    """
    try:
        image = data if isinstance(data, Image.Image) else opened(data, max_pixels)
        check_size(image.width, image.height, max_pixels)
        if at_least is not None and isinstance(image, JpegImageFile):
            image.draft("RGB", (at_least, at_least))
        image = in_eight_bits(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image.load()
        # Of an RGB image `convert` would be one more copy.
        return middle(image if image.mode == "RGB" else image.convert("RGB"))
    except UndecodableImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on bad bytes
        text = str(error).split(" <_io")[0]  # what follows is the address of a buffer
        raise UndecodableImage(f"{type(error).__name__}: {text}") from error


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """An image of which nothing but the header was read."""
    if data[:4] == b"RIFF" and data[12:16] == b"VP8X":  # whose canvas libwebp takes memory for when it is opened
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        check_size(width, height, max_pixels)
    # The count is of video behind the end, and of previews, too; it is fast, and nearly always enough.
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_SCANS and (scans := scans_of(data)) > MAX_SCANS:
        raise ImageTooLarge(f"a JPEG of {scans} scans; at most {MAX_SCANS} are decoded")
    return Image.open(io.BytesIO(data), formats=FORMATS)


def scans_of(data: bytes) -> int:
    """Scans that a JPEG's decoder comes to: those before the end mark that are not within another segment.

    Raises:
        ImageTooLarge: more than MAX_SEGMENTS segments.

    Costs: one pass over the bytes, some 50 ms for as many segments.
    """
    scans, at = 0, 2
    for _ in range(MAX_SEGMENTS):
        found = SEGMENT.search(data, at)
        if found is None or (marker := found[0][1]) == 0xD9:
            return scans
        scans += marker == 0xDA
        # The length counts itself; libjpeg takes a smaller one for that.
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    raise ImageTooLarge(f"a JPEG of more than {MAX_SEGMENTS} segments")


def in_eight_bits(image: Image.Image) -> Image.Image:
    """The image; greys of 16 or 32 bits scaled to 8, where Pillow would clip them at 255.

    Values are of the range that their format gives them, and else, as integers of 32 bits and floats, of their own.

    Raises:
        UndecodableImage: all values are the same where the range is their own, or some are not finite.
    """
    if image.mode.startswith("I;16"):
        bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0] if isinstance(image, TiffImageFile) else 16
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise UndecodableImage("values that are not finite")
    if image.mode == "I" and image.format == "PPM":  # of whatever depth: Pillow has scaled it to 16 bits
        low, scale = 0.0, 1 / 256
    else:
        low, high = (float(value) for value in image.getextrema())  # pyright: ignore[reportArgumentType]
        if low == high:
            raise UndecodableImage(f"all values of an image without a range of its own are {low:g}")
        scale = 255 / (high - low)
    return image.point(lambda value: value * scale - low * scale).convert("L")


def raw_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A PIL image as Streaming's `pil` encoding stores it: width, height and mode, then the pixels.

    Raises:
        UndecodableImage: sizes that the pixels do not fill, or too large.
    """
    try:
        width, height, length = struct.unpack_from("<3I", data)
        check_size(width, height, max_pixels)
        mode, begin = data[12 : 12 + min(length, 16)].decode("ascii"), 12 + length
        # Before Pillow takes memory for what the header promises. A mode below 8 bits has at least one per pixel.
        if len(data) - begin < (width * height + 7) // 8:
            raise UndecodableImage(f"{len(data) - begin} bytes for {width} x {height} pixels")
        return Image.frombytes(mode, (width, height), data[begin:])
    except UndecodableImage:
        raise
    except Exception as error:  # whatever broken bytes make Pillow say
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise UndecodableImage for an image of no pixels, ImageTooLarge for one of more than `max_pixels`."""
    if width * height > max_pixels:
        raise ImageTooLarge(f"{width} x {height} pixels are more than {max_pixels} (stream.max_pixels)")
    if width < 1 or height < 1:
        raise UndecodableImage(f"{width} x {height} pixels")


def middle(image: Image.Image) -> Image.Image:
    """An image, or of one that is longer than MAX_ASPECT times its shorter side, the middle part that is not."""
    most = MAX_ASPECT * min(image.size)
    if max(image.size) <= most:
        return image
    width, height = (min(side, most) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
