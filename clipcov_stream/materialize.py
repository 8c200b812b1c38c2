"""Samples -> tensors: decode, augment, tokenize.

Image transforms are torchvision's v2, composed as open_clip composes its own: RandomResizedCrop (or resize and centre
crop), RGB, float, normalize. Each is a plain function of the bytes and of a seed, so a sample's augmentation does not
depend on the worker or thread that drew it, a resumed run sees the same pixels, and so does one that decodes survivors
alone (`Materializer`).
"""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import open_clip
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms import v2

OPENAI_MEAN = open_clip.OPENAI_DATASET_MEAN
OPENAI_STD = open_clip.OPENAI_DATASET_STD
BICUBIC = v2.InterpolationMode.BICUBIC
ASPECTS = (3 / 4, 4 / 3)
"""Width by height of random crops, torchvision's default."""

Tokenizer = Callable[[str], Tensor]


class UndecodableImage(ValueError):
    """Bytes that no image comes out of; the message says why."""


def decode_image(data: Any, at_least: int | None = None) -> Image.Image:
    """RGB image from encoded bytes or a PIL image; transparency is laid on white.

    Args:
        at_least: side in pixels; a JPEG that is at least twice as large is decoded at half, a quarter or an eighth of
            its size, which takes a fraction of the time. None: whole.

    Raises:
        UndecodableImage: truncated, empty, not an image, or larger than Pillow's decompression-bomb limit.
    """
    try:
        image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            # Pillow itself only warns up to twice its limit. Nothing is decoded yet.
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are more than {limit}")
        if at_least is not None and isinstance(image, JpegImageFile):
            image.draft("RGB", (at_least, at_least))
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
        resize: "shortest", as above, or "squash", both sides to `size` whatever the aspect; of images that are not
            augmented.
        interpolation: "bicubic" or "bilinear", likewise.
    """

    size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    min_scale: float = 1.0
    resize: str = "shortest"
    interpolation: str = "bicubic"

    @property
    def augments(self) -> bool:
        return self.min_scale < 1

    def crop(self) -> Callable[[Image.Image], Tensor]:
        """One image -> (3, size, size) uint8, without augmentation."""
        how = v2.InterpolationMode(self.interpolation)
        if self.resize == "squash":
            return v2.Compose([v2.Resize([self.size, self.size], interpolation=how), v2.PILToTensor()])
        return v2.Compose([v2.Resize(self.size, interpolation=how), v2.CenterCrop(self.size), v2.PILToTensor()])

    def augmented(self, image: Image.Image, seed: int) -> Tensor:
        """One image -> (3, size, size) uint8 of a random crop, which the seed alone decides.

        The pixels that torchvision's RandomResizedCrop gives with this seed of the global generator; but that one is
        shared by all threads, and stays as it is here.
        """
        generator = torch.Generator().manual_seed(seed)
        box = crop_box(image.height, image.width, (self.min_scale, 1.0), generator)
        picture: Any = image  # torchvision's annotation names tensors alone
        return v2.functional.pil_to_tensor(
            v2.functional.resized_crop(picture, *box, size=[self.size, self.size], interpolation=BICUBIC)
        )

    def small(self, side: int) -> ImageTransform:
        """The same at another size, without augmentation."""
        return replace(self, size=side, min_scale=1.0)

    def normalize(self) -> Callable[[Tensor], Tensor]:
        """(..., 3, size, size) uint8 -> normalized float32; once per pool, not once per image: a third of the time."""
        return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)])


def crop_box(
    height: int, width: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop: draw for draw torchvision's RandomResizedCrop.

    Args:
        height, width: of the image, in pixels.
        scale: smallest and largest share of its area.
        generator: the only source of chance.
    """
    low, high = torch.log(torch.tensor(ASPECTS)).tolist()
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            return top, int(torch.randint(0, width - w + 1, (1,), generator=generator)), h, w
    # No crop of that shape fits: the largest in the middle that does.
    w, h = width, height
    if width / height < min(ASPECTS):
        h = round(w / min(ASPECTS))
    elif width / height > max(ASPECTS):
        w = round(h * max(ASPECTS))
    return (height - h) // 2, (width - w) // 2, h, w


Made = dict[int, "tuple[Tensor | None, Tensor | None]"]
"""Pixels (None if undecodable) and tokens of samples, by id."""


class Fetch(Protocol):
    """Encoded images from what a pool has in their place."""

    def __call__(self, images: Sequence[Any], /) -> Sequence[Future[Any]]: ...

    def close(self) -> None: ...


class Materializer:
    """Encoded rows of a pool -> tensors; images are decoded and cropped by threads, captions read one after another.

    Pillow lets go of the interpreter's lock while it decodes and resizes; tokenizers mostly do not, and some cannot be
    shared by threads, so this one is a copy.

    Args:
        transform: of images.
        tokenizer: str -> (context,) token ids; None reads no captions.
        num_threads: that decode; None is the number of CPUs, at most 8.
        fetch: gets the images that rows have only a mention of; each is decoded when it has come.

    Raises:
        ValueError: fewer than one thread.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: Tokenizer | None,
        num_threads: int | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"stream.decode_threads={num_threads} must be at least 1, or null")
        self.transform = transform
        self.crop, self.normalize = transform.crop(), transform.normalize()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.num_threads = num_threads or min(8, os.cpu_count() or 1)
        self.fetch = fetch
        self._threads: ThreadPoolExecutor | None = None

    def pixels(self, encoded: Any, seed: int) -> Tensor | None:
        """(3, size, size) uint8 of an encoded image, None if there is none in it; the seed decides its augmentation."""
        try:
            image = decode_image(encoded.result() if isinstance(encoded, Future) else encoded)
        except UndecodableImage:
            return None
        return self.transform.augmented(image, seed) if self.transform.augments else self.crop(image)

    def __call__(self, rows: Mapping[str, Any], made: Made) -> tuple[dict[str, Tensor], Tensor]:
        """`image` and, where there are captions, `text` as `PoolCollate` would make them, and which were undecodable.

        Args:
            rows: `image`, a list of encoded images or of what `fetch` takes; `id` and `augmentation`, int64; `text`, a
                list of captions, or tokens, which are left as they are.
            made: what earlier calls of the same step made, by id; this call adds to it, so that nothing is made twice.
        """
        ids = rows["id"].tolist()
        new = [row for row, sample in enumerate(ids) if sample not in made]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_threads, "decode")
        seeds = rows["augmentation"].tolist()
        encoded = [rows["image"][row] for row in new]
        encoded = encoded if self.fetch is None else self.fetch(encoded)
        images = self._threads.map(self.pixels, encoded, (seeds[row] for row in new))
        captions = None if isinstance(rows.get("text"), Tensor) else rows.get("text")
        texts = [None if captions is None or self.tokenizer is None else self.tokenizer(captions[row]) for row in new]
        made.update(zip([ids[row] for row in new], zip(images, texts, strict=True), strict=True))
        blank = torch.zeros(3, self.transform.size, self.transform.size, dtype=torch.uint8)
        found = [made[sample] for sample in ids]
        failed = torch.tensor([image is None for image, _ in found], dtype=torch.bool)
        stacked = torch.stack([blank if image is None else image for image, _ in found])
        tensors = {"image": self.normalize(stacked) * ~failed[:, None, None, None]}
        if captions is not None and self.tokenizer is not None:
            tensors["text"] = torch.stack([text for _, text in found if text is not None])
        return tensors, failed

    def close(self) -> None:
        """End the threads; the next call starts new ones."""
        if self.fetch is not None:
            self.fetch.close()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
