"""A soft start: while the embedder tells few matches from chance, some places stay random.

What is chosen by an embedder that knows little, and then trained on, is what it goes on to know: it favours the few
concepts that it happens to tell, and mismatched pairs that look like them. A warm-up of random survivors avoids that
for a number of steps that somebody has to guess. A pool itself says how far its embedder is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipcov_stream.evidence import Matching, marked
from clipcov_stream.sketch import sync_is_free

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

LIKELY = 2 / 3
"""A pair is told from chance if its chance to match, given its p-value, is higher: twice as likely as not. Measured in
tools/LOG.md."""


def num_places(
    match: Matching, valid: Bool[Tensor, " pool"], num_survivors: int, soft_start: float
) -> Float[Tensor, ""] | float:
    """How many survivors are chosen for what they are; the others are random. From 1 to `num_survivors`.

    In proportion to the share of the matching pairs that can be told from chance (`Matching.told`), up to `soft_start`
    of them: from there on, and with 0 always, all places. It depends on the embedder and neither on how many pairs
    match nor on how many survive. A number where it can be read for nothing.
    """
    if soft_start <= 0:
        return float(num_survivors)
    share = (match.told(valid, LIKELY) / soft_start).clamp_max(1.0)
    places = (share * num_survivors).ceil().clamp_min(1.0)
    return float(places) if sync_is_free(places) else places


def with_random(
    index: Int64[Tensor, " picks"],
    gain: Float[Tensor, " picks"],
    places: Float[Tensor, ""] | float,
    valid: Bool[Tensor, " pool"],
    num_survivors: int,
) -> tuple[Int64[Tensor, " survivors"], Float[Tensor, " survivors"]]:
    """The first `places` of the picks, and for the other places valid candidates, evenly spaced in the pool's order.

    A stream is shuffled, so its order is as good as a draw; where a pool is sorted, as with scope="global" by id, each
    of its stretches gives one, its middle. Equal pools give equal survivors. The gain of what nobody picked is NaN. No
    host sync; with fewer valid candidates than survivors the indices are worth nothing.
    """
    if isinstance(places, float):
        num = min(math.ceil(places), len(index))
        if num == num_survivors:
            return index, gain
        rest = valid.index_fill(0, index[:num], False).nonzero().squeeze(1)
        missing = num_survivors - num
        spaced = (2 * torch.arange(missing, device=index.device) + 1) * len(rest) // (2 * missing)
        rest = rest.index_select(0, spaced) if len(rest) else torch.zeros_like(spaced)
        return torch.cat([index[:num], rest]), torch.cat([gain[:num], gain.new_full((missing,), math.nan)])
    place = torch.arange(num_survivors, device=index.device, dtype=torch.float64)
    picked = place < places
    rest = valid & (marked(index, picked, valid) == 0)
    missing = torch.as_tensor(num_survivors - places).clamp_min(1)
    # In double, where whole numbers are exact.
    rank = (((place - places).clamp_min(0) + 0.5) * rest.sum() / missing).floor().long()
    others = torch.searchsorted(rest.cumsum(0), rank + 1).clamp_max(len(valid) - 1)
    return torch.where(picked, index, others), gain.masked_fill(~picked, math.nan)
