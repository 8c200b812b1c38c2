"""Every other selector: one function each, of one signature, as its paper or released code has it.

They are here to be compared with and to be used. What a method needs beyond a pool's embeddings is declared in
`NEEDS_LEARNER` and `NEEDS_NO_EMBEDDING`, what it remembers between pools in `REMEMBER`. Where a published method works
on a whole data set, its docstring says what stands for that in a stream. Keyword arguments are the knobs:
`functools.partial(sem_dedup, eps=0.2)` is a selector too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipcov_stream.collectives import AllReduce, evenly, gathered, ranks_of
from clipcov_stream.fused import brought
from clipcov_stream.herding import top
from clipcov_stream.objective import (
    SelectionState,
    alignment,
    contrastive_margin,
    gated,
    margin,
    random_survivors,
)
from clipcov_stream.pool import Pool, log_sum_exp, valid_of
from clipcov_stream.products import product

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

SelectorFn = Callable[[Pool, int, SelectionState], Tensor]
"""(pool, num_survivors, state) -> LongTensor of num_survivors distinct indices into the pool.

The pool arrives normalized, with `valid` set and zeros in the rows that are not; the state's stream sketch already
holds this pool.
"""
Remember = Callable[[SelectionState, Pool, Tensor, AllReduce | None], dict[str, Tensor]]
"""(state, pool, survivors, all_reduce) -> what `state.own` is next; the same on all ranks."""

MEMORY = 4096
"""Survivors whose image embeddings `sem_dedup` keeps."""
MAX_CONCEPTS = 1 << 20
"""Of `concept_balance`: a pool's table has a number for each concept and sample."""
HISTORY_DECAY = 0.9
"""Weight of the old score in `dissect` (beta of the released code)."""


def random(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Survivors drawn uniformly without replacement: the baseline that streams as much and sees as much."""
    return random_survivors(valid_of(pool), num_survivors, state.generator())


def clip_score(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Highest cosine between image and caption (CLIPScore: Hessel et al., EMNLP 2021)."""
    return best(alignment(pool), pool, num_survivors)


def neg_clip_loss(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Highest margin: the cosine less what any caption or image would get (Wang et al., NeurIPS 2024, 2405.19547).

    The normalizer runs over the pool, the temperature is the embedder's own (the released code: batches of 32,768 and
    0.01, which is a trained CLIP's).
    """
    return best(margin(pool), pool, num_survivors)


def vas(
    pool: Pool, num_survivors: int, state: SelectionState, *, clip_gate: float = 0.5
) -> Int64[Tensor, " survivors"]:
    """Highest variance alignment x_i^T S x_i among the better half by CLIP score (Wang et al., 2402.02055).

    S is the image embeddings' second moment over the stream so far, VAS(Traindata) of the released code: one step of
    VAS-D, which would recompute S from what is kept, 168 times. As there it is neither centred nor whitened, and
    images alone count.

    Args:
        clip_gate: fraction of the pool with the lowest CLIP score that is dropped first.
    """
    score = alignment(pool)
    stream = state.stream
    moment = stream.image_cov + torch.outer(stream.image_mean, stream.image_mean)
    open_ = gated(score, valid_of(pool), clip_gate, num_survivors)
    return top(((pool.image @ moment) * pool.image).sum(1).masked_fill(~open_, -torch.inf), num_survivors)


def sem_dedup(
    pool: Pool, num_survivors: int, state: SelectionState, *, eps: float = 0.1
) -> Int64[Tensor, " survivors"]:
    """A uniform draw from what is no semantic duplicate (SemDeDup: Abbas et al., 2303.09540).

    A candidate is a duplicate if its image is closer than cosine 1 - eps to an earlier candidate's, or to one of the
    last `MEMORY` survivors'. The paper's clusters only make that search cheaper. If too few candidates remain, those
    least close to anything follow.

    Args:
        eps: as in the paper; larger drops more.
    """
    valid = valid_of(pool)
    closest = product(pool.image, pool.image).tril(-1).amax(1)
    recent = state.own.get("recent")
    if recent is not None and len(recent):
        closest = torch.maximum(closest, product(pool.image, recent).amax(1))
    keys = brought(torch.rand(len(pool), generator=state.generator(), dtype=torch.float32), closest.device)
    # Duplicates come after all others, the closest last.
    keys = torch.where(closest > 1 - eps, -closest, keys)
    return top(keys.masked_fill(~valid, -torch.inf), num_survivors)


def c_rho(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Largest gap between the reference's CLIP score and the learner's (C-RHO: Maini et al., T-MARS, ICLR 2024).

    RHO with similarities in place of losses: matched, as the reference sees it, and not learned yet.
    """
    return best(alignment(pool) - learner_alignment(pool), pool, num_survivors)


def rho(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Highest learnability of each sample by itself, loss_learner - loss_reference (RHO-LOSS: Mindermann et al., ICML
    2022), with the contrastive loss over the pool."""
    return best(margin(pool) - learner_margin(pool), pool, num_survivors)


def high_loss(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Drawn with probability CDF(loss)^beta, the learner's contrastive loss (Selective-Backprop: Jiang et al., 2019).

    beta = 1 / keep - 1 for a share `keep` of survivors, as Composer's SelectiveBackprop has it; but at every step,
    where Composer's default selects from 50% to 90% of training, and then at every other step.
    """
    valid = valid_of(pool)
    loss = (-learner_margin(pool)).masked_fill(~valid, -torch.inf)
    rank = torch.empty_like(loss)
    rank[loss.argsort(stable=True)] = torch.arange(len(pool), dtype=loss.dtype, device=loss.device)
    num_invalid = (~valid).sum()
    percentile = (rank - num_invalid + 0.5) / (len(pool) - num_invalid)
    beta = len(pool) / num_survivors - 1
    return sampled(beta * percentile.clamp_min(1e-12).log(), valid, num_survivors, state.generator())


def jest(
    pool: Pool, num_survivors: int, state: SelectionState, *, chunks: int = 16, temperature: float = 1.0
) -> Int64[Tensor, " survivors"]:
    """Joint example selection: chunks sampled by learnability given those already chosen (Evans et al., NeurIPS 2024).

    logit_i = loss_learner(i | S) - loss_reference(i | S), the softmax loss with the chosen S as negatives (the paper's
    main text has the sigmoid loss, which a softmax-trained CLIP has no bias for). Before there is an S, the pool is.

    Args:
        chunks: of the batch; the paper's 16.
        temperature: of the draw; the paper's 1.
    """
    return joint(pool, num_survivors, state, chunks, temperature)


def jest_topk(
    pool: Pool, num_survivors: int, state: SelectionState, *, chunks: int = 16
) -> Int64[Tensor, " survivors"]:
    """`jest` without the draw: each chunk is the best given those already chosen (as in DRRho-CLIP's code)."""
    return joint(pool, num_survivors, state, chunks, 0.0)


def dissect(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Largest fall of a sample's CLIP score below its own history (DISSect, ICCV 2025, 2507.12998).

    The history is a moving average of the learner's scores by sample id. A sample without one counts as the mean of
    those that have it. ClipCov's warm-up embeds nothing and so records nothing (the authors' does): until samples come
    a second time after it, the draw is random. In a pool without `ids` the embedder's score is the history, which with
    embed="teacher" is a moving average of the learner too.
    """
    history, known = history_of(state, pool)
    known = known & valid_of(pool)
    fall = (history - learner_alignment(pool)).masked_fill(~known, 0.0)
    fall = (fall - fall.sum() / known.sum().clamp_min(1)).masked_fill(~known, 0.0)
    # Ties, which all samples without history are, fall at random.
    order = brought(torch.rand(len(pool), generator=state.generator(), dtype=torch.float32).argsort(), fall.device)
    score = fall.masked_fill(~valid_of(pool), -torch.inf)
    return order[top(score[order], num_survivors)]


def concept_balance(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Greedy balance of concept counts (CABS-DM, CVPR 2026, 2511.20643).

    gain_i = mean over its concepts c of (t_c - n_c) / t_c + 1 / F_c while n_c < t_c, with n_c the count among those
    chosen, F_c the count in the stream so far, and t_c an equal share of all concept mentions among the survivors.

    Raises:
        ValueError: a pool without `concepts`.
    """
    concepts, valid = concepts_of(pool), valid_of(pool)
    tags = one_hot(concepts.masked_fill(~valid[:, None], -1), len(state.own.get("concept_count", ())))
    in_stream = tags.sum(0)
    if "concept_count" in state.own:
        in_stream[: len(state.own["concept_count"])] += state.own["concept_count"]
    per_sample = tags.sum(1).clamp_min(1)
    present = (tags.sum(0) > 0).sum().clamp_min(1)
    target = (num_survivors * tags.sum() / valid.sum().clamp_min(1) / present).clamp_min(1)
    count = torch.zeros_like(in_stream)
    picks = torch.empty(num_survivors, dtype=torch.int64, device=tags.device)
    left = valid.clone()
    for step in range(num_survivors):
        worth = torch.where(count < target, (target - count) / target + 1 / in_stream.clamp_min(1), 0.0)
        best_ = (tags @ worth / per_sample).masked_fill(~left, -torch.inf).argmax().view(1)
        picks[step : step + 1] = best_
        count = count + tags.index_select(0, best_)[0]
        left.index_fill_(0, best_, False)
    return picks


# What they share


def best(score: Float[Tensor, " pool"], pool: Pool, num_survivors: int) -> Int64[Tensor, " survivors"]:
    """The valid samples of highest score."""
    return top(score.masked_fill(~valid_of(pool), -torch.inf), num_survivors)


def gumbel(num: int, generator: torch.Generator) -> Float[Tensor, " num"]:
    """Noise that turns the largest of log weights into a draw by weight."""
    uniform = torch.rand(num, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return -(-uniform.log()).log()


def sampled(
    log_weight: Float[Tensor, " pool"], open_: Tensor, num: int, generator: torch.Generator
) -> Int64[Tensor, " num"]:
    """Draws without replacement with probability proportional to exp(log_weight), by the Gumbel top-k trick."""
    noise = gumbel(len(log_weight), generator)
    return top((log_weight.double() + brought(noise, log_weight.device)).masked_fill(~open_, -torch.inf), num)


def joint(
    pool: Pool, num_survivors: int, state: SelectionState, chunks: int, temperature: float
) -> Int64[Tensor, " survivors"]:
    """JEST's chunks; a temperature of 0 takes the best of each instead of drawing."""
    valid = valid_of(pool)
    learner_image, learner_text, learner_scale = learner_of(pool)
    logits = [product(learner_scale * learner_image, learner_text), product(pool.logit_scale * pool.image, pool.text)]
    generator = state.generator()
    left, chosen = valid.clone(), torch.empty(0, dtype=torch.int64, device=valid.device)
    sizes = [len(part) for part in torch.arange(num_survivors).tensor_split(min(chunks, num_survivors))]
    score = margin(pool) - learner_margin(pool)
    for size in sizes:
        if len(chosen):
            learner_loss, reference_loss = (loss_given(table, chosen) for table in logits)
            score = learner_loss - reference_loss
        if temperature > 0:
            new = sampled(score / temperature, left, size, generator)
        else:
            new = top(score.masked_fill(~left, -torch.inf), size)
        chosen = torch.cat([chosen, new])
        left.index_fill_(0, new, False)
    return chosen


def loss_given(logits: Float[Tensor, "pool pool"], chosen: Int64[Tensor, " m"]) -> Float[Tensor, " pool"]:
    """Contrastive loss of every sample with the chosen ones as its only negatives, both ways averaged."""
    own = logits.diagonal()
    by_image = log_sum_exp(torch.cat([own[:, None], logits[:, chosen]], 1), 1)
    by_text = log_sum_exp(torch.cat([own[None, :], logits[chosen]], 0), 0)
    return 0.5 * (by_image + by_text) - own


def learner_of(pool: Pool) -> tuple[Tensor, Tensor, float | Tensor]:
    """The learner's view of a pool.

    Raises:
        ValueError: the pool has none. The embedder cannot stand in here: learnability would be zero for every sample.
    """
    if pool.learner_image is None or pool.learner_text is None:
        raise ValueError(
            "this selector compares the embedder with the learner: the pool needs learner_image, learner_text and "
            "learner_logit_scale"
        )
    scale = pool.logit_scale if pool.learner_logit_scale is None else pool.learner_logit_scale
    return pool.learner_image, pool.learner_text, scale


def learner_alignment(pool: Pool) -> Float[Tensor, " pool"]:
    image, text, _ = learner_of(pool)
    return (image * text).sum(1)


def learner_margin(pool: Pool) -> Float[Tensor, " pool"]:
    return contrastive_margin(*learner_of(pool), valid_of(pool))


def concepts_of(pool: Pool) -> Int64[Tensor, "pool width"]:
    if pool.concepts is None:
        raise ValueError("concept_balance needs the pool's concepts: a tag column, stream.columns.concepts in a recipe")
    return pool.concepts


def history_of(state: SelectionState, pool: Pool) -> tuple[Tensor, Tensor]:
    """Past score of each sample, and whether it has one."""
    if pool.ids is None:
        return alignment(pool), valid_of(pool)
    table, known = state.own.get("history"), state.own.get("known")
    if table is None or known is None:
        return torch.zeros_like(pool.image[:, 0]), torch.zeros_like(valid_of(pool))
    inside = pool.ids < len(table)
    where = pool.ids.clamp_max(len(table) - 1)
    return table[where] * inside, known[where] & inside


def one_hot(concepts: Int64[Tensor, "pool width"], num_concepts: int) -> Float[Tensor, "pool concepts"]:
    """Rows of concept indices, padded with -1, as zeros and ones.

    Raises:
        ValueError: an index beyond MAX_CONCEPTS, whose table would not fit in memory.
    """
    size = max(num_concepts, int(concepts.max()) + 1, 1)
    if size > MAX_CONCEPTS:
        raise ValueError(f"concept {size - 1} is too large an index; number concepts from 0 to {MAX_CONCEPTS - 1}")
    tags = torch.zeros(len(concepts), size + 1, dtype=torch.float32, device=concepts.device)
    tags.scatter_(1, concepts.where(concepts >= 0, size), 1.0)
    return tags[:, :size]


# What they remember


def remember_images(
    state: SelectionState, pool: Pool, survivors: Tensor, all_reduce: AllReduce | None
) -> dict[str, Tensor]:
    """The last `MEMORY` survivors' image embeddings, over all ranks."""
    rows = pool.image.index_select(0, survivors)
    if all_reduce is not None:
        ranks, num = ranks_of(len(rows), rows.device, all_reduce)
        # As many of each, should they have other numbers of survivors.
        rows = rows.index_select(0, evenly(len(rows), num, rows.device))
        (rows,) = gathered([rows], state.rank, ranks, all_reduce)
    recent = state.own.get("recent", rows[:0])
    return {"recent": torch.cat([recent, rows])[-MEMORY:]}


def remember_scores(
    state: SelectionState, pool: Pool, survivors: Tensor, all_reduce: AllReduce | None
) -> dict[str, Tensor]:
    """The learner's CLIP scores by sample id, as moving averages, over all ranks."""
    ids, valid = pool.ids, valid_of(pool)
    if ids is None:
        return state.own
    longest = ids.max()[None].double()
    if all_reduce is not None:
        # A sum that bounds the maximum over ranks; the table is only longer than it has to be.
        all_reduce(longest)
    size = max(int(longest) + 1, len(state.own.get("history", ())))
    old = torch.zeros(size, dtype=torch.float32, device=ids.device)
    known = torch.zeros_like(old, dtype=torch.bool)
    if "history" in state.own:
        old[: len(state.own["history"])], known[: len(state.own["known"])] = state.own["history"], state.own["known"]
    total, count = torch.zeros_like(old), torch.zeros_like(old)
    total.index_add_(0, ids, learner_alignment(pool) * valid)
    count.index_add_(0, ids, valid.to(count))
    if all_reduce is not None:
        all_reduce(total)
        all_reduce(count)
    seen = count > 0
    now = total / count.clamp_min(1)
    history = torch.where(seen, torch.where(known, HISTORY_DECAY * old + (1 - HISTORY_DECAY) * now, now), old)
    return {"history": history, "known": known | seen}


def remember_concepts(
    state: SelectionState, pool: Pool, survivors: Tensor, all_reduce: AllReduce | None
) -> dict[str, Tensor]:
    """How often each concept has been streamed, over all ranks."""
    concepts = concepts_of(pool).masked_fill(~valid_of(pool)[:, None], -1)
    longest = concepts.max()[None].double().clamp_min(0)
    if all_reduce is not None:
        all_reduce(longest)
    old = state.own.get("concept_count", torch.zeros(0, dtype=torch.float32, device=concepts.device))
    new = one_hot(concepts, max(int(longest) + 1, len(old))).sum(0)
    if all_reduce is not None:
        all_reduce(new)
    new[: len(old)] += old
    return {"concept_count": new}


RIVALS: dict[str, SelectorFn] = {
    function.__name__: function
    for function in (
        random,
        clip_score,
        neg_clip_loss,
        vas,
        sem_dedup,
        c_rho,
        rho,
        jest,
        jest_topk,
        dissect,
        high_loss,
        concept_balance,
    )
}
NEEDS_NO_EMBEDDING: frozenset[Any] = frozenset({random})
"""Selectors for which the embedding pass can be left out."""
NEEDS_LEARNER: frozenset[Any] = frozenset({c_rho, rho, jest, jest_topk, dissect, high_loss})
"""Selectors that need the learner's own embeddings of the pool, beside the embedder's: one more pass."""
REMEMBER: dict[Any, Remember] = {
    sem_dedup: remember_images,
    dissect: remember_scores,
    concept_balance: remember_concepts,
}
"""What a selector keeps in `SelectionState.own`."""


def plain(selector: SelectorFn) -> Any:
    """The function under `functools.partial`."""
    return plain(selector.func) if isinstance(selector, functools.partial) else selector
