"""Copies: images that were trained on already, told by what they look like.

A picture that is copied a hundred times, with small changes and one caption, is to an embedder one more sample of its
concept; and if its caption is wrong, whatever was trained on it takes the pair for a match. Coarse pixels know better,
from the first step on and whatever the embedder has learned. It is deduplication as a stream can do it: nothing is
dropped beforehand, and what has not been trained on yet is as good as new.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcov_stream.collectives import evenly
from clipcov_stream.products import product
from clipcov_stream.scratch import LARGEST, scratch
from clipcov_stream.sketch import sync_is_free

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

SIDE = 6
"""Of a thumbnail, in cells."""

THUMBNAIL = 3 * SIDE * SIDE

MEMORY = 4096
"""Survivors that are remembered by their thumbnails."""

PIXELS = 1 << 24
"""Numbers that a pass over images makes of bytes at a time: 64 MiB."""

LIKE = 0.98
"""Cosine of thumbnails above which one begins to pass for the other's copy. Measured in tools/LOG.md."""


def thumbnails(image: Shaped[Tensor, "pool 3 height width"]) -> Float[Tensor, "pool thumbnail"]:
    """What images look like from afar: mean colours of SIDE x SIDE cells, less the image's mean, of unit length.

    The same up to brightness and contrast. An image of one grey, as bytes, looks like nothing: zeros.

    Args:
        image: bytes, or numbers as a model reads them; the same kind throughout a run.

    Costs: a pass over the pixels.
    """
    # By parts: a pool of bytes may be a gigabyte of numbers.
    parts = image.split(max(1, PIXELS // max(1, image[0].numel())))
    cells = torch.cat([F.adaptive_avg_pool2d(part.float(), SIDE) for part in parts]).flatten(1)
    centred = cells - cells.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    # What is left of a grey by rounding has no direction.
    return (centred / norm.clamp_min(1e-12)).masked_fill(norm < 1e-5 * cells.norm(dim=1, keepdim=True), 0.0)


def log_copies(
    thumbnail: Float[Tensor, "pool thumbnail"], seen: Float[Tensor, "memory thumbnail"]
) -> Float[Tensor, " pool"]:
    """How often each candidate's picture was trained on lately: log(1 + how many survivors look like it).

    One that looks the same counts 1, one at a cosine c counts max(c - LIKE, 0) / (1 - LIKE). As in
    `evidence.log_exposure`, if n were trained on another adds 1 / (1 + n).

    Args:
        seen: thumbnails of survivors; rows of zeros are places not filled yet.

    Costs: 2 * pool * memory * THUMBNAIL flops, in blocks of rows; no pool x memory table.
    """
    offset = torch.full_like(seen[:, 0], -LIKE)
    ones = torch.ones_like(offset)
    parts = []
    numbers = LARGEST if sync_is_free(thumbnail) else LARGEST << 8
    step = max(64, numbers // max(1, len(seen)))
    for rows in thumbnail.split(step):
        out = scratch("copies", len(rows), len(seen)) if sync_is_free(rows) else None
        parts.append(product(rows, seen, offset, positive=True, out=out) @ ones)
    return torch.cat(parts).div_(1 - LIKE).log1p_()


def remembered(
    seen: Float[Tensor, "memory thumbnail"], shown: Float[Tensor, "new thumbnail"]
) -> Float[Tensor, "memory thumbnail"]:
    """The memory with new thumbnails at its end, in the place of its oldest; of more than it holds, evenly spaced ones:
    they may come rank after rank, or in the order of their ids."""
    num = len(seen)
    if len(shown) > num:
        shown = shown.index_select(0, evenly(len(shown), num, shown.device))
    return torch.cat([seen, shown.to(seen)])[-num:]
