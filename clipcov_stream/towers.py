"""Towers for an online proxy: so small that to learn from every candidate costs next to nothing."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Integer

SIDES = (32, 64)
"""Pixels of an image's side, at least and at most."""

SMALLEST = 4
"""Side of what the last convolution makes of an image of `image_size`."""

WORDS = 49408
"""Rows of the table of word embeddings: OpenAI's tokens have one each."""

WORD_DIM, HIDDEN, EMBED_DIM = 64, 128, 64
"""Widths of a word, of the captions' hidden layer and of the embeddings."""


def side_for(image_size: int) -> int:
    """Side in pixels of the images that SmallTowers read where a learner reads `image_size`."""
    smallest, largest = SIDES
    return largest if image_size >= largest else smallest


class SmallTowers(nn.Module):
    """A few strided convolutions for images, the mean of word embeddings for captions.

    A judge must know early, and from few updates, which caption belongs to which image. These know it sooner than a
    small ResNet and a transformer, at a thirtieth of their multiply-adds (measured in tools/LOG.md). That captions
    without their order teach image-text models nearly as well: Tejankar et al., "A Fistful of Words", arXiv 2112.13884.

    They read images of any size, larger ones brought down to `image_size`, and token ids of any tokenizer (`counted`).

    Args:
        width: channels of the first convolution; each has twice those of the one before and half the side.
        image_size: side in pixels of the images, a power of two from 8 on: SMALLEST is what the last one makes of it.
        num_words: rows of the table of word embeddings; token ids beyond share them.

    Raises:
        ValueError: a width or a side that cannot be.
    """

    def __init__(self, width: int, image_size: int = SIDES[1], num_words: int = WORDS) -> None:
        super().__init__()
        if not (isinstance(width, int) and width >= 1):
            raise ValueError(f"selection.proxy.width={width} must be a whole number of channels, at least 1")
        num_halvings = math.log2(max(image_size, 1) / SMALLEST)
        if num_halvings < 1 or num_halvings % 1:
            raise ValueError(f"image_size={image_size} must be a power of two from {2 * SMALLEST} on")
        channels = (3, *(width * 2**i for i in range(int(num_halvings))))
        self.image_size = image_size
        self.convolutions = nn.Sequential(
            *(
                layer
                for inner, outer in itertools.pairwise(channels)
                for layer in (nn.Conv2d(inner, outer, 3, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())
            )
        )
        self.image_head = nn.Linear(channels[-1], EMBED_DIM)
        self.words = nn.Embedding(num_words, WORD_DIM)
        self.text_head = nn.Sequential(nn.Linear(WORD_DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBED_DIM))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.words.weight, std=0.1)

    def encode_image(self, image: Float[Tensor, "..."]) -> Float[Tensor, "n dim"]:
        """Of (n, 3, height, width) images; raises ValueError for others."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(
                f"the default online proxy reads images of shape (n, 3, height, width), not {tuple(image.shape)}: "
                "give ClipCov a proxy=MODEL of your own, or embed='teacher'"
            )
        image = image.to(self.image_head.weight.dtype)
        if max(image.shape[2:]) > self.image_size:
            image = F.interpolate(image, size=(self.image_size,) * 2, mode="bicubic", antialias=True)
        features = self.convolutions(image)
        return self.image_head(features.mean((2, 3)) + features.amax((2, 3)))

    def encode_text(self, text: Tensor) -> Float[Tensor, "n dim"]:
        """Of (n, context) token ids; raises ValueError for anything else."""
        if text.ndim != 2 or text.is_floating_point():
            raise ValueError(
                f"the default online proxy reads token ids of shape (n, context), not {tuple(text.shape)} of "
                f"{text.dtype}: give ClipCov a proxy=MODEL of your own, or embed='teacher'"
            )
        counts = counted(text)[..., None]
        words = self.words(text.long() % self.words.num_embeddings)
        return self.text_head((words * counts).sum(1) / counts.sum(1))


def counted(text: Integer[Tensor, "n context"]) -> Bool[Tensor, "n context"]:
    """Which tokens count as words: of those that a row begins with, all the same, the first, of those that it ends with
    the last, and all between. So padding is one word, whatever a tokenizer pads with and on whichever side."""
    begun = (text != text[:, :1]).cumsum(1) > 0
    to_come = (text != text[:, -1:]).flip(1).cumsum(1).flip(1) > 0
    inside = begun & to_come
    inside[:, 0] = inside[:, -1] = True
    return inside
