"""What was trained on: recent survivors one by one, and how often each sample of the data set.

Written by `select` once there are survivors, and read by later pools: what resembles recent survivors is worth less
(`evidence.log_exposure`), and what was trained on often has less left to give (`evidence.Matching.opened`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipcov_stream.collectives import AllReduce, evenly, gathered, ranks_of
from clipcov_stream.copies import remembered
from clipcov_stream.objective import RECENT, RECENT_STEPS, SelectionState

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

MOST_TIMES = 255
"""That a count holds."""

UNKNOWN = -1
"""The place of a survivor whose number in the data set is not known."""


def updated_memory(
    state: SelectionState,
    image: Float[Tensor, "survivors dim"],
    text: Float[Tensor, "survivors dim"],
    counted: Bool[Tensor, " survivors"],
    places: Int64[Tensor, " survivors"] | None,
    all_reduce: AllReduce | None,
    thumbnail: Float[Tensor, "survivors thumbnail"] | None = None,
) -> dict[str, Tensor]:
    """RECENT, looks and times once a step's survivors are trained on, of all ranks, in one collective.

    Of ranks that have other numbers of survivors each gives as many, one that has fewer some of them twice, which is
    counted once; one that has more leaves some out.

    Args:
        places: the survivors' (`SelectionState.places`); None where this rank does not know which samples they are, and
            its survivors are not counted.
        thumbnail: the survivors'; None where the pool has none.
    """
    counts = state.counts_times and (places is not None or all_reduce is not None)
    remembers = len(state.looks) > 0 and (thumbnail is not None or all_reduce is not None)
    if state.settings.novelty == 0 and not counts and not remembers:
        return {}
    known: Tensor | None = None
    ranks, mean_rows = ranks_of(len(image), image.device, all_reduce)
    recent = recent_rows(state, image, text, counted, ranks, mean_rows) if state.settings.novelty > 0 else []
    looks: list[Tensor] = []
    if remembers:
        # Of a rank whose pool has none zeros, which look like nothing: others would wait for what it does not send.
        looks = [state.looks.new_zeros(len(image), state.looks.shape[1]) if thumbnail is None else thumbnail]
        looks = [looks[0] * counted[:, None]]
    if all_reduce is not None:
        # Whether this rank's pool has ids or not: one that sent less than the others would have them wait for ever.
        places = torch.full((len(image),), UNKNOWN, device=image.device) if places is None else places
        digits = in_digits(places[evenly(len(places), mean_rows, places.device)]) if counts else []
        looks = [rows[evenly(len(rows), mean_rows, rows.device)] for rows in looks]
        every = gathered([*recent, *looks, *digits], state.rank, ranks, all_reduce)
        recent, rest = every[: len(recent)], every[len(recent) :]
        looks, digits = rest[: len(looks)], rest[len(looks) :]
        if counts:
            # In the place of what is not known one that is, which is counted once all the same; without any, nothing.
            places = from_digits(*digits)
            known = places.amax()
            places = torch.where(places == UNKNOWN, known, places).clamp_min(0)
    updated = joined(state, recent, ranks) if recent else {}
    if looks:
        updated["looks"] = remembered(state.looks, looks[0])
    if counts and places is not None:
        times = state.times.index_select(0, places)
        more = times.clamp_max(MOST_TIMES - 1) + 1
        more = more if known is None else torch.where(known == UNKNOWN, times, more)
        updated["times"] = state.times.index_copy(0, places, more)
    return updated


def in_digits(numbers: Int64[Tensor, " n"]) -> list[Tensor]:
    """Numbers from -1 to 2^38 as two that float32 holds exactly, to travel with rows of that type."""
    return [(numbers >> 14).float(), (numbers & 16383).float()]


def from_digits(high: Tensor, low: Tensor) -> Int64[Tensor, " n"]:
    """Inverse of `in_digits`."""
    return (high.long() << 14) + low.long()


def recent_rows(
    state: SelectionState,
    image: Float[Tensor, "survivors dim"],
    text: Float[Tensor, "survivors dim"],
    counted: Bool[Tensor, " survivors"],
    ranks: int,
    mean_rows: int,
) -> list[Tensor]:
    """What a rank's survivors of a step add to RECENT.

    A step adds 1 / RECENT_STEPS of the places over all ranks, evenly spaced in the order chosen, each for as many
    survivors as it takes for them to stand for all; or all of them if there are no more. Of more ranks than that makes
    places for, some stand for all of them, others at the next step. Where ranks have other numbers of survivors each
    gives as many, one that has fewer some of them twice, for less.
    """
    num = min(mean_rows, max(1, len(state.recent_weight) // RECENT_STEPS // ranks))
    index = evenly(len(image), num, image.device)
    weight = counted.index_select(0, index).float() * (len(image) / num)
    return [image.index_select(0, index), text.index_select(0, index), weight]


def joined(state: SelectionState, new: list[Tensor], ranks: int) -> dict[str, Tensor]:
    """RECENT with all ranks' rows last; as many of the oldest leave."""
    num_places = len(state.recent_weight)
    of_step = num_places // RECENT_STEPS
    if ranks > of_step:
        some = (evenly(ranks, of_step, new[0].device) + state.step) % ranks
        new = [rows.index_select(0, some) for rows in new]
        new[2] = new[2] * (ranks / of_step)
    return {name: torch.cat([getattr(state, name), rows])[-num_places:] for name, rows in zip(RECENT, new, strict=True)}
