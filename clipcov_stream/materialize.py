"""Samples -> tensors: decode, augment, tokenize.

Image transforms are torchvision's v2, composed as open_clip composes its own: RandomResizedCrop (or resize and centre
crop), RGB, float, normalize. Each is a plain function of the bytes and of a seed, so a sample's augmentation does not
depend on the worker or thread that drew it, a resumed run sees the same pixels, and so does one that decodes survivors
alone (`Materializer`).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from clipcov_stream.decode import MAX_PIXELS, UndecodableImage, decode_image
from clipcov_stream.device_decode import decoded_on

OPENAI_MEAN = open_clip.OPENAI_DATASET_MEAN
OPENAI_STD = open_clip.OPENAI_DATASET_STD
BICUBIC = v2.InterpolationMode.BICUBIC
ASPECTS = (3 / 4, 4 / 3)
"""Width by height of random crops, torchvision's default."""

Tokenizer = Callable[[str], Tensor]


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

    def augmented(self, image: Image.Image | Tensor, seed: int) -> Tensor:
        """One image, or its (3, height, width) uint8, -> (3, size, size) uint8 of a random crop, which the seed alone
        decides.

        The pixels that torchvision's RandomResizedCrop gives with this seed of the global generator; but that one is
        shared by all threads, and stays as it is here.
        """
        generator = torch.Generator().manual_seed(seed)
        height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
        box = crop_box(height, width, (self.min_scale, 1.0), generator)
        picture: Any = image  # torchvision's annotation names tensors alone
        crop = v2.functional.resized_crop(picture, *box, size=[self.size, self.size], interpolation=BICUBIC)
        return crop if isinstance(crop, Tensor) else v2.functional.pil_to_tensor(crop)

    def small(self, side: int) -> ImageTransform:
        """The same at another size, without augmentation."""
        return replace(self, size=side, min_scale=1.0)

    def normalize(self) -> Normalizer:
        """(..., 3, size, size) uint8 -> normalized float32; of many images at once, in a third of the time."""
        return Normalizer(self.mean, self.std)


class Normalizer:
    """(..., 3, height, width) uint8 -> normalized float32, on the device where it is, and without waiting for that:
    torchvision's `Normalize` brings mean and deviation there at every call."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._of_device = {torch.device("cpu"): tuple(torch.tensor(of).view(3, 1, 1) for of in (mean, std))}

    def __call__(self, image: Tensor) -> Tensor:
        if image.device not in self._of_device:
            here = self._of_device[torch.device("cpu")]
            self._of_device[image.device] = tuple(of.to(image.device) for of in here)
        mean, std = self._of_device[image.device]
        return v2.functional.to_dtype(image, torch.float32, scale=True).sub(mean).div_(std)


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


def bytes_of(encoded: Any) -> Any:
    """What an image is stored as, once it has come."""
    return encoded.result() if isinstance(encoded, Future) else encoded


def arrived(encoded: Any) -> Any:
    """`bytes_of`; None of what turned out to be no image."""
    try:
        return bytes_of(encoded)
    except UndecodableImage:
        return None


class Materializer:
    """Encoded rows of a pool -> tensors; images are decoded and cropped by threads, captions read one after another.

    Pillow lets go of the interpreter's lock while it decodes and resizes; tokenizers mostly do not, and some cannot be
    shared by threads, so this one is a copy.

    Args:
        transform: of images.
        tokenizer: str -> (context,) token ids; None reads no captions.
        num_threads: that decode; None is the number of CPUs, at most 8.
        fetch: gets the images that rows have only a mention of; each is decoded when it has come.
        max_pixels: of an image; see `decode_image`.
        device: that decodes and crops JPEGs, a GPU (`device_decode`); `image` is then there. None leaves them to the
            threads.

    Raises:
        ValueError: fewer than one thread.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: Tokenizer | None,
        num_threads: int | None = None,
        fetch: Fetch | None = None,
        max_pixels: int = MAX_PIXELS,
        device: torch.device | None = None,
    ) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"stream.decode_threads={num_threads} must be at least 1, or null")
        self.transform = transform
        self.crop = transform.crop()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.num_threads = num_threads or min(8, os.cpu_count() or 1)
        self.fetch = fetch
        self.max_pixels = max_pixels
        self.device = device
        self._threads: ThreadPoolExecutor | None = None

    def pixels(self, encoded: Any, seed: int) -> Tensor | None:
        """(3, size, size) uint8 of an encoded image, None if there is none in it; the seed decides its augmentation."""
        try:
            image = decode_image(bytes_of(encoded), max_pixels=self.max_pixels)
        except UndecodableImage:
            return None
        return self._cropped(image, seed)

    def _cropped(self, image: Any, seed: int) -> Tensor:
        return self.transform.augmented(image, seed) if self.transform.augments else self.crop(image)

    def _images(self, encoded: Sequence[Any], seeds: Sequence[int]) -> Iterable[Tensor | None]:
        """`pixels` of every image, on the device if there is one."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_threads, "decode")
        if self.device is None:
            return self._threads.map(self.pixels, encoded, seeds)
        images: list[Tensor | None] = [None] * len(encoded)
        # Cropped one by one as they come, so that but one batch of whole images is in memory.
        for place, image in decoded_on(self.device, [arrived(image) for image in encoded], self.max_pixels):
            images[place] = self._cropped(image, seeds[place])
        left = [place for place, image in enumerate(images) if image is None]
        others = self._threads.map(self.pixels, [encoded[place] for place in left], [seeds[place] for place in left])
        for place, found in zip(left, others, strict=True):
            images[place] = None if found is None else found.to(self.device)
        return images

    def __call__(self, rows: Mapping[str, Any], made: Made) -> tuple[dict[str, Tensor], Tensor]:
        """`image`, (n, 3, size, size) uint8, and, where there are captions, `text` as `PoolCollate` would make it; and
        which images were undecodable, and are zeros.

        Args:
            rows: `image`, a list of encoded images or of what `fetch` takes; `id` and `augmentation`, int64; `text`, a
                list of captions, or tokens, which are left as they are.
            made: what earlier calls of the same step made, by id; this call adds to it, so that nothing is made twice.
        """
        ids = rows["id"].tolist()
        new = [row for row, sample in enumerate(ids) if sample not in made]
        seeds = rows["augmentation"].tolist()
        encoded = [rows["image"][row] for row in new]
        encoded = encoded if self.fetch is None else self.fetch(encoded)
        images = self._images(encoded, [seeds[row] for row in new])
        captions = None if isinstance(rows.get("text"), Tensor) else rows.get("text")
        texts = [None if captions is None or self.tokenizer is None else self.tokenizer(captions[row]) for row in new]
        made.update(zip([ids[row] for row in new], zip(images, texts, strict=True), strict=True))
        blank = torch.zeros(3, self.transform.size, self.transform.size, dtype=torch.uint8, device=self.device)
        found = [made[sample] for sample in ids]
        failed = torch.tensor([image is None for image, _ in found], dtype=torch.bool)
        tensors = {"image": torch.stack([blank if image is None else image for image, _ in found])}
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
