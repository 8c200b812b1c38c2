"""An image tower that looks at some of an image's patches alone: a pass over a pool costs that much less.

FLIP (Li et al., CVPR 2023, arXiv 2212.00794) leaves patches out at random while it trains; here, where candidates are
compared with one another, all lose the same ones, evenly spread over the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

SPREAD = (0.7548776662466927, 0.5698402909980532)
"""1 / p and 1 / p^2 for the plastic number p, p^3 = p + 1: multiples of both fill the unit square evenly, so that the
patches below any threshold are spread over the image (Roberts, "The unreasonable effectiveness of quasirandom
sequences", 2018)."""


def kept_patches(rows: int, columns: int, dropout: float) -> list[int]:
    """Numbers of the patches of a grid that are looked at, in order; at least one."""
    num = rows * columns
    place = [math.fmod(SPREAD[0] * row + SPREAD[1] * column, 1.0) for row in range(rows) for column in range(columns)]
    wanted = max(1, round(num * (1 - dropout)))
    return sorted(sorted(range(num), key=place.__getitem__)[:wanted])


def towers_with_patches(model: nn.Module, dropout: float | None) -> list[VisionTransformer]:
    """The open_clip transformers among a model's image towers.

    Raises:
        ValueError: there is none, and patches are to be left out.
    """
    towers = [part for part in model.modules() if isinstance(part, VisionTransformer)]
    if dropout and not towers:
        raise ValueError(
            f"selection.embed_patch_dropout={dropout}: {type(model).__name__} has no transformer of open_clip's as its "
            "image tower, whose patches could be left out"
        )
    return towers


@contextmanager
def fewer_patches(model: nn.Module, dropout: float) -> Iterator[None]:
    """Within, the open_clip transformers among a model's image towers leave out a share of the patches.

    Raises:
        ValueError: a share outside [0, 1), or a model without such a tower.
    """
    hooks: list[Any] = []
    try:
        for tower in towers_with_patches(model, dropout):
            hooks.append(tower.patch_dropout.register_forward_hook(partial(leave_out, tower, dropout)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def leave_out(tower: VisionTransformer, dropout: float, module: Any, args: Any, tokens: Tensor) -> Tensor:
    """The class token and the patches kept of (n, 1 + patches, width) tokens; a forward hook."""
    rows, columns = tower.grid_size
    num = tokens.shape[1] - 1
    if rows * columns != num:  # another resolution, which is square
        rows = columns = math.isqrt(num)
    kept = torch.tensor([0, *(1 + place for place in kept_patches(rows, columns, dropout))])
    return tokens.index_select(1, kept.to(tokens.device, non_blocking=True))
