"""Selection: from a candidate pool to the survivors that training sees.

The core is a pure function, `select(state, pool, num_survivors) -> (state', survivors, report, gain)`. The state is the
sketches, the lag and the step counter; everything random derives from (seed, step, rank), never from a global
generator. That is what makes a resumed run equal a straight one. After the survivors' training pass `learn(state,
survivors) -> state'` notes what the model made of them; it comes before the next `select`.

The method, `clipcov`, has three parts, all from the pool's own embeddings, with no labels and no threshold to set for a
corpus:

1. What matches? A pool's own mismatched pairs show what chance looks like; the share of pairs that do better than that
   is estimated, also among what a filter left (`evidence.edge_of`), and `gate` times as many of the best stay open
   (`evidence.matching`). Where the data set is passed over many times, the best are those that have most left to give:
   a pair's chance to match counts a half, a third, a quarter and so on from the time on that it was trained on more
   than `repeats` times, until a doubtful one that is new is worth more.
2. What is common? An open pair is worth less the denser its image and its caption lie, and the more of its like were
   trained on lately, so that popular concepts and near-duplicates do not fill the batch again and again
   (`evidence.log_density`, `evidence.log_exposure`), as far as there are any (`evidence.unevenness`); less again if it
   shows a picture that was trained on lately (`copies.log_copies`); and more if it points where the learner does not
   yet reproduce what it was trained on (`objective.updated_lag`).
3. Survivors are picked one by one, for what they are worth and so that their whitened cross-covariance stays close to
   that of the open pairs (`herding.Herding`).

An embedder that is still in training chooses no more of them than it has learned to judge; the rest are random
(`start.num_places`).

That cross-covariance takes the place of the paper's sums per latent class (CLIPCov: Joshi, Jain, Payani,
Mirzasoleiman, AISTATS 2024, arXiv 2403.12267), which need a partition of the whole data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from clipcov_stream.arguments import whole_number
from clipcov_stream.collectives import AllReduce
from clipcov_stream.copies import log_copies
from clipcov_stream.evidence import log_density, log_exposure, matching, unevenness
from clipcov_stream.fused import aside
from clipcov_stream.herding import Herding, along
from clipcov_stream.objective import (
    Frame,
    SelectionState,
    Settings,
    certificate,
    standardize,
    updated_lag,
)
from clipcov_stream.pool import Pool, prepared, valid_of
from clipcov_stream.products import in_full
from clipcov_stream.rivals import REMEMBER, RIVALS, SelectorFn, plain
from clipcov_stream.sketch import CrossCovSketch, sync_is_free
from clipcov_stream.start import num_places, with_random
from clipcov_stream.trained import updated_memory

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


def clipcov(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Survivors that preserve the cross-covariance of what matches, the rare before the common.

    A pair is open if it is among the `gate * share` best matches of the pool: by score, or, once any of the pool was
    trained on more than `repeats` times, by posterior_i / (1 + max(times_i - repeats, 0)), times_i how often each was.
    If fewer are left than survivors are needed, the best matches are all that survives; with a `soft_start` some places
    are random until the embedder tells so much of the matches from chance (`start.num_places`). An open pair is worth

        w_i = -u * (balance * log density_i + novelty * log exposure_i + copies * log copies_i)
              + quality * margin_i + learnability * lag_i,

    margin and lag in standard deviations over the open pairs, density that of the pool and exposure what recent
    steps have trained on of a pair's like, u the square of the pool's unevenness over `unevenness`, at most 1, and
    1 where that is 0: where copies and popular concepts crowd the pool the rare outweigh them, and where nothing is
    popular the rare are outliers, worth no more than others; copies are recent survivors of whose image it is a
    copy, where the pool has thumbnails. Beside that, picks are herded towards A = overshoot * T + memory * (T - M),
    with weight `coverage` (`Herding`): T is the mean whitened atom of all pools' open pairs, M that of earlier
    survivors. Nothing is drawn: equal pools and states give equal survivors. Called by itself, rather than by
    `select`, it takes T from the state and this pool, and exposures from survivors that nobody notes: `select`
    notes those of clipcov alone.

    Costs, in flops: 8 * pool * references * dim for margins and densities, 4 * pool * recent * dim for exposures, 2
    * pool * memory * thumbnail for copies, 6 * pool * dim^2 for sketches, 8 * pool * dim^2 for whitening and what
    points along the aim and the lag, 4 * pool * survivors * dim for the picks; on a CPU all but the margins and the
    stream's sketch on the open candidates alone. Where repeats are counted, a copy of the data set's counts, a byte
    each: 5 ms for 12.8 million on a CPU.
    """
    return choose(pool, num_survivors, state).survivors


@dataclass(frozen=True)
class Choice:
    """What `clipcov` chose, what each gained when picked, the target it then knows, and figures of how; 0-dim."""

    survivors: Int64[Tensor, " survivors"]
    gain: Float[Tensor, " survivors"]
    opened: CrossCovSketch
    figures: dict[str, Tensor]


def choose(
    pool: Pool,
    num_survivors: int,
    state: SelectionState,
    all_reduce: AllReduce | None = None,
    elapsed: Tensor | None = None,
) -> Choice:
    """`clipcov`, with the target that it leaves behind; `all_reduce` and `elapsed` as in `CrossCovSketch.update`.

    figures: matched_share, the estimated share of pairs that match, and open_share, of those that the gate let through;
        filter_edge, below 1 where a filter was at work before (`evidence.edge_of`);
        unevenness, of those, where the settings ask for it (`evidence.unevenness`);
        random_share, of survivors, of a soft start (`start.num_places`), where the settings ask for one;
        copies, how many recent survivors show what one that is not random does, in the mean, where pools have
            thumbnails;
        repeats, how often survivors were trained on before, in the mean, where it is counted;
        aim_residual, ||C_S - A|| / ||T|| whitened, and aim_residual_bound, what it cannot exceed (`Herding.bound`),
            both of those survivors that are not random.
    """
    aimed = aim_of(pool, num_survivors, state, all_reduce, elapsed)
    herding, places = aimed.herding, aimed.places
    picks = herding.picks(num=places)
    image, text = (rows.index_select(0, picks.index) for rows in (herding.image, herding.text))
    if isinstance(places, Tensor):  # a GPU picks as many as survive, and the first have places
        text = text * (torch.arange(num_survivors, device=text.device) < places)[:, None]
    figures = {
        **aimed.figures,
        "aim_residual": (image.T @ text / places - herding.aim).norm() / aimed.size,
        "aim_residual_bound": herding.bound(picks.slack, places) / aimed.size,
    }
    if aimed.copies is not None:
        shown = aimed.copies.index_select(0, picks.index).expm1()
        if isinstance(places, Tensor):
            shown = shown.masked_fill(torch.arange(len(shown), device=shown.device) >= places, 0.0)
        figures["copies"] = shown.sum() / places
    survivors = picks.index if aimed.rows is None else aimed.rows.index_select(0, picks.index)
    survivors, gain = with_random(survivors, picks.gain, places, valid_of(pool), num_survivors)
    if aimed.times is not None:
        figures["repeats"] = aimed.times.index_select(0, survivors).mean()
    return Choice(survivors, gain, aimed.opened, figures)


@dataclass(frozen=True)
class Aimed:
    """A pool of which all is decided but the picks.

    Args:
        rows: (open,) numbers in the pool of the herding's samples; None if it holds the whole pool.
        herding: worths and aim of the open candidates.
        opened: the target's sketch, this pool included.
        size: 0-dim, norm of the whitened target.
        places: how many survivors the herding has the choice of; the others are random.
        times: (pool,) how often each candidate was trained on; None where that is not counted.
        copies: of the herding's samples, log of one more than recent survivors that show the same; None where pools
            have no thumbnails.
        figures: of the gate, 0-dim.
    """

    rows: Tensor | None
    herding: Herding
    opened: CrossCovSketch
    size: Tensor
    places: Tensor | float
    times: Tensor | None
    copies: Tensor | None
    figures: dict[str, Tensor]


def aim_of(
    pool: Pool,
    num_survivors: int,
    state: SelectionState,
    all_reduce: AllReduce | None = None,
    elapsed: Tensor | None = None,
) -> Aimed:
    """What matches, what it is worth and what to aim at; arguments as in `choose`."""
    settings, valid = state.settings, valid_of(pool)
    # Small matrices, a chain of short steps: beside the pool's large ones they take no time of their own on a GPU.
    framed = aside(lambda: Frame.of(state.stream, settings.ridge), pool.image.device)
    match = matching(pool, settings.references)
    times = state.times_of(pool.ids)
    wear = None if times is None else (times - settings.repeats).clamp_min(0).log1p()
    places = num_places(match, valid, num_survivors, settings.soft_start if settings.starts_softly else 0.0)
    num_picks = num_survivors if isinstance(places, Tensor) else int(places)
    open_ = match.opened(valid, settings.gate, places, wear)
    rows, image, text, among, score = narrowed(pool, open_, match.score, num_picks)
    common = settings.balance * log_density(image, text, among, settings.references)
    opened = state.opened.fork()
    counted = among if rows is None else None  # all of those that were copied count
    batch = opened.update(image, text, counted, all_reduce, valid.sum() if elapsed is None else elapsed)
    centres = (state.stream.image_mean, state.stream.text_mean)
    if settings.novelty > 0:
        recent = (state.recent_image, state.recent_text, state.recent_weight)
        common = common + settings.novelty * log_exposure(image, text, *centres, *recent)
    copies = None
    if settings.copies > 0 and pool.thumbnail is not None:
        copies = log_copies(pool.thumbnail if rows is None else pool.thumbnail.index_select(0, rows), state.looks)
        common = common + settings.copies * copies
    frame = framed()
    whitened = frame.rows(image, text, in_place=rows is not None)  # then they are our own copies, and needed no more
    target = frame.matrix(opened.cross_cov_about(*centres))
    # Before there are survivors nothing is missed of the target.
    memory = frame.matrix(state.kept.cross_cov_about(*centres))
    memory = torch.where(state.kept.weight > 0, memory, target)
    figures, crowding = {"matched_share": match.share, "filter_edge": match.edge}, 1.0
    if settings.starts_softly:
        figures["random_share"] = 1 - torch.as_tensor(
            places / num_survivors, dtype=torch.float32, device=match.share.device
        )
    if settings.unevenness > 0:
        figures["unevenness"] = unevenness(*whitened, among, settings.references)
        crowding = (figures["unevenness"] / settings.unevenness).clamp_max(1).square()
    worth = -crowding * common
    if settings.quality > 0:
        worth = worth + settings.quality * standardize(score, among)
    if settings.learnability > 0:
        lag = frame.matrix(state.lag / state.lag_weight.clamp_min(1e-12))
        worth = worth + settings.learnability * standardize(along(*whitened, lag), among)
    aim = settings.overshoot * target + settings.memory * (target - memory)
    mean_atom = frame.matrix(batch.cross_cov_about(*centres))
    herding = Herding(*whitened, worth, aim, settings.coverage, among, num_picks, mean_atom)
    figures["open_share"] = open_.sum().float() / valid.sum().clamp_min(1)
    return Aimed(rows, herding, opened, target.norm().clamp_min(1e-12), places, times, copies, figures)


def narrowed(
    pool: Pool, open_: Bool[Tensor, " pool"], score: Float[Tensor, " pool"], num_picks: int
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """The open candidates' numbers, image and text rows, a mask of which count, and scores.

    Where their number can be read for nothing they are copied together, and closed ones cost no more time. Elsewhere,
    and if fewer are open than are picked, everything stays and the numbers are None.
    """
    if sync_is_free(open_):
        rows = open_.nonzero().squeeze(1)
        if len(rows) >= num_picks:
            image, text, among = (part.index_select(0, rows) for part in (pool.image, pool.text, open_))
            return rows, image, text, among, score.index_select(0, rows)
    return None, pool.image, pool.text, open_, score


SELECTORS: dict[str, SelectorFn] = {"clipcov": clipcov, **RIVALS}
"""Every selector by name. To add one, add a function here or in `rivals`."""


class Selected(NamedTuple):
    """What `select` returns.

    Args:
        state: the next one.
        survivors: distinct indices into the pool, in the order chosen; those of a soft start that are random come last.
        report: the step's figures, 0-dim tensors.
        gain: of each survivor when it was picked, `clipcov`'s objective (`Herding`); NaN where it is random, and for
            every other selector, whose rules have no such figure.
    """

    state: SelectionState
    survivors: Int64[Tensor, " survivors"]
    report: dict[str, Tensor]
    gain: Float[Tensor, " survivors"]


@in_full
def select(
    state: SelectionState,
    pool: Pool,
    num_survivors: int,
    selector: SelectorFn = clipcov,
    all_reduce: AllReduce | None = None,
) -> Selected:
    """Choose the survivors of one pool and remember it.

    Args:
        state: from `SelectionState.initial` or the last call.
        pool: this rank's candidates.
        num_survivors: how many to choose, from 1 to the pool's size.
        selector: one of SELECTORS, or any function of that signature.
        all_reduce: sums over ranks in place, so that every rank's sketches hold every rank's pairs.

    Returns: see `Selected`. Samples with a non-finite embedding, or `valid` False, are never chosen and never enter a
        sketch; the report's `num_invalid` counts them. If fewer than num_survivors are left, the indices are worth
        nothing: `Selector` and `ClipCov` raise then.

    Raises:
        ValueError: num_survivors outside [1, pool], or widths that differ from the state's.
        RuntimeError: a selector that returned something else than num_survivors distinct indices.
    """
    num_survivors = checked_count(num_survivors, len(pool))
    if pool.image.shape[1] != state.stream.image_dim:
        raise ValueError(
            f"the pool's embeddings are {pool.image.shape[1]} wide, the sketch is {state.stream.image_dim} wide; "
            "one run needs one embedder"
        )
    if state.settings.copies == 0:
        pool = replace(pool, thumbnail=None)  # nobody looks at it
    elif pool.thumbnail is not None and pool.thumbnail.shape[1] != state.looks.shape[1]:
        raise ValueError(
            f"the pool's thumbnails are {pool.thumbnail.shape[1]} wide, they must be {state.looks.shape[1]}, as "
            "clipcov_stream.copies.thumbnails makes them"
        )
    pool = prepared(pool)
    valid = valid_of(pool)
    stream, kept = state.stream.fork(), state.kept.fork()
    streamed = stream.update(pool.image, pool.text, valid, all_reduce)
    seen, elapsed = replace(state, stream=stream), stream.num_samples - state.stream.num_samples
    figures: dict[str, Tensor] = {}
    if plain(selector) is clipcov:
        choice = choose(pool, num_survivors, seen, all_reduce, elapsed)
        survivors, gain, figures = choice.survivors, choice.gain, choice.figures
        seen = replace(seen, opened=choice.opened)
    else:
        survivors = selector(pool, num_survivors, seen)
        gain = torch.full((num_survivors,), math.nan, dtype=torch.float32, device=pool.image.device)
    check_survivors(survivors, valid, num_survivors, selector)
    image, text, counted = (rows.index_select(0, survivors) for rows in (pool.image, pool.text, valid))
    trained_on = kept.update(image, text, counted, all_reduce, elapsed)
    if plain(selector) is clipcov:
        places = state.places(pool.ids)
        places = None if places is None else places.index_select(0, survivors)
        thumbnail = None if pool.thumbnail is None else pool.thumbnail.index_select(0, survivors)
        seen = replace(seen, **updated_memory(seen, image, text, counted, places, all_reduce, thumbnail))
    remember = REMEMBER.get(plain(selector))
    own = state.own if remember is None else remember(seen, pool, survivors, all_reduce)
    after = replace(seen, step=state.step + 1, kept=kept, own=own)
    report = {**certificate(pool, survivors, after, streamed, trained_on), **figures}
    return Selected(after, survivors, report, gain)


@in_full
def learn(state: SelectionState, survivors: Pool, all_reduce: AllReduce | None = None) -> SelectionState:
    """Note what the learner makes of the survivors it trains on: the next state, with their lag.

    Args:
        state: from `select`.
        survivors: the embedder's rows of the survivors, and the learner's from its training pass (`learner_image`,
            `learner_text`, `learner_logit_scale`). Without the learner's rows the embedder stands in for it.
        all_reduce: sums over ranks in place.

    Only later pools read the lag: a batch must not vote for itself. A run that never calls this selects without a lag.
    Costs: 4 * survivors^2 * dim flops.
    """
    lag, lag_weight = updated_lag(state, prepared(survivors), all_reduce)
    return replace(state, lag=lag, lag_weight=lag_weight)


def reads_lag(selector: SelectorFn, settings: Settings) -> bool:
    """Whether the lag is kept up for `selector`, if learnability is above 0: for clipcov, and for a function of a
    user's own that has an attribute `reads_lag = True`."""
    function = plain(selector)
    return settings.learnability > 0 and (function is clipcov or bool(getattr(function, "reads_lag", False)))


def resolve(selector: str | SelectorFn) -> SelectorFn:
    """The function of a selector's name; functions pass through.

    Raises:
        ValueError: an unknown name.
    """
    if callable(selector):
        return selector
    if selector not in SELECTORS:
        raise ValueError(f"selection.selector={selector!r} is not one of {sorted(SELECTORS)}, nor a function")
    return SELECTORS[selector]


def checked_count(num_survivors: int, pool_size: int) -> int:
    """How many of a pool are to be chosen; raises ValueError for what cannot be."""
    must = f"from 1 to the pool's size, {pool_size}"
    return whole_number("num_survivors", num_survivors, must, lambda count: 1 <= count <= pool_size)


def check_survivors(survivors: Any, valid: Tensor, num_survivors: int, selector: SelectorFn) -> None:
    """Raise RuntimeError unless a selector returned what it must."""
    pool_size = len(valid)
    name = getattr(plain(selector), "__name__", repr(selector))
    if not isinstance(survivors, Tensor):
        raise RuntimeError(
            f"selector {name} returned a {type(survivors).__name__}; it must return a tensor, ({num_survivors},) of "
            "torch.int64, as torch.topk(...).indices is"
        )
    if survivors.dtype != torch.int64 or survivors.shape != (num_survivors,):
        raise RuntimeError(
            f"selector {name} returned {tuple(survivors.shape)} of {survivors.dtype}; it must return "
            f"({num_survivors},) of torch.int64"
        )
    if plain(selector) in SELECTORS.values():
        return  # ours are tested; reading values would stall a GPU
    distinct = torch.unique(survivors)
    if len(distinct) != num_survivors or int(distinct[0]) < 0 or int(distinct[-1]) >= pool_size:
        raise RuntimeError(f"selector {name} must return distinct indices from 0 to {pool_size - 1}")
    if not bool(valid[survivors].all()) and int(valid.sum()) >= num_survivors:
        raise RuntimeError(f"selector {name} returned samples that are not valid (pool.valid), though others are left")
