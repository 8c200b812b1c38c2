"""What ranks tell one another, when a sum over all of them is all that can be asked for.

`ranks` gathers through torch.distributed; here a function that sums is given, whoever it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over all ranks, in place."""


def ranks_of(num_rows: int, device: torch.device, all_reduce: AllReduce | None) -> tuple[int, int]:
    """How many ranks `all_reduce` sums over, and how many rows each has in the mean, rounded up; waits for them."""
    if all_reduce is None:
        return 1, num_rows
    sums = torch.tensor([1, num_rows], dtype=torch.float64, device=device)
    all_reduce(sums)
    ranks, rows = (int(value) for value in sums.tolist())
    return ranks, -(-rows // ranks)


def gathered(parts: list[Tensor], rank: int, ranks: int, all_reduce: AllReduce) -> list[Tensor]:
    """The rows of all `ranks`, in the ranks' order, in one collective; each gives parts of the same shapes and type.

    Raises:
        ValueError: ranks that are not numbered from 0, each with a number of its own; on all of them.
    """
    # A sum is all that can be asked for: of each place one rank alone gives what is not zero.
    parts = [*parts, parts[0].new_ones(1)]
    every = [torch.zeros(ranks, *rows.shape, dtype=rows.dtype, device=rows.device) for rows in parts]
    if 0 <= rank < ranks:
        for place, rows in zip(every, parts, strict=True):
            place[rank] = rows
    *every, filled = summed(every, all_reduce)
    if not bool((filled == 1).all()):
        raise ValueError(
            f"rank={rank} with an all_reduce over {ranks} ranks: they must be numbered from 0 to {ranks - 1}, each "
            "with a number of its own; give it to Selector or SelectionState.initial as rank="
        )
    return [place.flatten(0, 1) for place in every]


def evenly(num_rows: int, num: int, device: torch.device) -> Tensor:
    """Places of `num` of a number of rows, evenly spaced; some of them twice if there are fewer."""
    return torch.arange(num, device=device) * num_rows // num


def summed(parts: list[Tensor], all_reduce: AllReduce | None) -> list[Tensor]:
    """The parts, summed over ranks in one collective."""
    if all_reduce is None:
        return parts
    flat = torch.cat([part.reshape(-1) for part in parts])
    all_reduce(flat)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
