"""What a pool says about its own pairs: which of them match, and how common each is.

No labels and no reference beyond the embedder. A pool of P pairs holds P (P - 1) pairs that are known to be mismatched,
an image with another's caption, and they show what chance looks like. A few hundred of the pool's samples stand for all
of them, so that time and memory grow with the pool and not with its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcov_stream.pool import Pool, valid_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

TABLE = 1 << 18
"""Numbers in the largest table, 1 MiB: a larger one leaves the cache and is slower, not faster."""

LEAST_DENSITY = 1e-4
"""Of `log_density`, per side: a sample at the very mean resembles nothing, and is not infinitely rare for it."""


@dataclass(frozen=True)
class Matching:
    """Which pairs of a pool match.

    Args:
        score: (pool,) the margin over what others would get; 0 where a sample is not valid.
        p_value: (pool,) share of mismatched pairs with the same image or the same caption that score at least as high;
            1 where a sample is not valid.
        share: 0-dim, the estimated share of valid pairs that match, in [0, 1].
    """

    score: Float[Tensor, " pool"]
    p_value: Float[Tensor, " pool"]
    share: Float[Tensor, ""]

    def opened(self, valid: Bool[Tensor, " pool"], gate: float, num_survivors: int) -> Bool[Tensor, " pool"]:
        """The valid samples of highest score: `gate` for each that is estimated to match, at least `num_survivors`."""
        count = valid.sum()
        num_open = (gate * self.share * count).clamp_min(num_survivors) if gate < float("inf") else count
        rank = torch.empty_like(self.score)
        order = torch.sort(self.score.masked_fill(~valid, -torch.inf), descending=True, stable=True).indices
        rank[order] = torch.arange(len(rank), dtype=rank.dtype, device=rank.device)
        return valid & (rank < num_open)


def references(among: Bool[Tensor, " pool"], most: int) -> tuple[Int64[Tensor, " refs"], Bool[Tensor, " refs"]]:
    """At most `most` of the samples `among`, evenly spaced in the pool's order, and which of these places are filled.

    All of them, in order, if there are no more; places left over repeat sample 0 and are not filled. No host sync.
    """
    num = min(most, len(among))
    count = among.sum()
    stride = (count / num).clamp_min(1.0)
    rank = (torch.arange(num, device=among.device, dtype=torch.float64) * stride).floor_().long()
    filled = rank < count
    # The rank-th sample `among`, counted from 0, is the first place with rank + 1 of them up to it.
    index = torch.searchsorted(among.cumsum(0), rank + 1).clamp_max_(len(among) - 1)
    return torch.where(filled, index, 0), filled


def blocks(num_rows: int, width: int) -> range:
    """Starts of row blocks, such that a float32 table of a block's rows and `width` columns stays in the cache."""
    return range(0, num_rows, block_rows(width))


def block_rows(width: int) -> int:
    return max(64, TABLE // max(width, 1))


def matching(pool: Pool, most: int) -> Matching:
    """Score every pair against mismatched ones of the pool, and estimate how many match.

    The score is the margin of a pair with itself, i = j,

        m_ij = s x_i.y_j - 1/2 log sum_{k != i} exp(s x_i.y_k) - 1/2 log sum_{k != j} exp(s x_k.y_j)

    (negCLIPLoss: Wang et al., NeurIPS 2024, arXiv 2405.19547, without a pair's own term), k over at most `most`
    references, evenly spaced in the pool; both sums are scaled to the pool's size. If a caption has nothing to do with
    its image, m_ii is one of the m_ij and m_ji but for what the normalizers leave out, so its p-value is nearly uniform
    (in pools below a hundred small ones are too frequent); those above 1/2 are half of the mismatched pairs (Storey,
    JRSS B 2002, with lambda = 1/2).

    A class that fills a share r of the pool makes r of its mismatched pairs match by accident, which this cannot see;
    and pairs that the embedder has not learned look mismatched: a weak embedder underestimates the share.

    Costs: 4 * pool * references * dim flops, in blocks of rows; no pool x pool table.
    """
    valid = valid_of(pool)
    index, filled = references(valid, most)
    ref_image, ref_text = pool.image.index_select(0, index), pool.text.index_select(0, index)
    scale, count = pool.logit_scale, valid.sum()

    def logits(rows: Tensor, refs: Tensor, numbers: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        """s times the rows' cosines with the references, -inf for a row's own place; log of the sum of exponentials."""
        table = (rows @ refs.T).mul_(scale)
        table.masked_fill_((numbers[:, None] == index) | ~filled, -torch.inf)
        others = filled.sum() - (usable & is_reference.index_select(0, numbers)).long()
        # A sample alone among invalid ones has no others; 0 leaves its own logit.
        total = table.logsumexp(1) + ((count - 1).clamp_min(1) / others.clamp_min(1)).log()
        return table, total.nan_to_num(neginf=0.0)

    is_reference = torch.zeros_like(valid)
    # Unfilled places all name sample 0, and must not unname it: the largest of all that is written stays.
    is_reference = is_reference.long().scatter_reduce(0, index, filled.long(), "amax").bool()
    every = torch.arange(len(valid), device=valid.device)
    # Of references: what any caption, any image gets beside theirs.
    _, ref_by_image = logits(ref_image, ref_text, index, filled)
    _, ref_by_text = logits(ref_text, ref_image, index, filled)
    rows = block_rows(len(index))
    scores, above = [], []
    for start in blocks(len(valid), len(index)):
        part = slice(start, start + rows)
        images, texts, numbers, usable = pool.image[part], pool.text[part], every[part], valid[part]
        with_texts, by_image = logits(images, ref_text, numbers, usable)
        with_images, by_text = logits(texts, ref_image, numbers, usable)
        own = (images * texts).sum(1) * scale
        scores.append(own - 0.5 * by_image - 0.5 * by_text)
        # m_ik >= m_ii and m_ki >= m_ii, without what both sides share.
        better = (with_texts.sub_(0.5 * ref_by_text) >= (own - 0.5 * by_text)[:, None]).sum(1)
        better += (with_images.sub_(0.5 * ref_by_image) >= (own - 0.5 * by_image)[:, None]).sum(1)
        above.append(better)
    score = torch.cat(scores).masked_fill(~valid, 0.0)
    others = filled.sum() - is_reference.long()
    p_value = (torch.cat(above) / (2 * others).clamp_min(1)).masked_fill(~valid, 1.0)
    by_chance = 2 * ((p_value > 0.5) & valid).sum() / count.clamp_min(1)
    return Matching(score, p_value, (1 - by_chance).clamp_min(0.0))


def log_density(
    image: Float[Tensor, "pool dim"],
    text: Float[Tensor, "pool dim"],
    among: Bool[Tensor, " pool"],
    most: int,
) -> Float[Tensor, " pool"]:
    """How common each pair is: the log density of its image plus that of its caption, among the samples `among`.

    A kernel density estimate on the sphere, of rows centred by their mean over `among`: the mean of max(cosine, 0) to
    the eighth power (tools/LOG.md has leads for 6, 12 and 24), over a sample itself and, for the others, at most `most`
    evenly spaced references. Near-duplicates and popular concepts are dense, the tail is not; but a concept that fills
    half of the pool draws the mean to itself, and what is left of its samples once centred looks rare. It plays the
    part of the concept counts that data curation balances by where there are tags or metadata (MetaCLIP: Xu et al.,
    ICLR 2024, arXiv 2309.16671; CABS, arXiv 2511.20643).

    Costs: 4 * pool * references * dim flops, in blocks of rows; no pool x pool table.
    """
    index, filled = references(among, most)
    return row_log_density(image, among, index, filled) + row_log_density(text, among, index, filled)


def row_log_density(
    rows: Float[Tensor, "pool dim"],
    among: Bool[Tensor, " pool"],
    index: Int64[Tensor, " refs"],
    filled: Bool[Tensor, " refs"],
) -> Float[Tensor, " pool"]:
    """`log_density` of one side."""
    count = among.sum()
    mean = (among / count.clamp_min(1)) @ rows
    centred_refs = F.normalize(rows.index_select(0, index) - mean, dim=1)
    every = torch.arange(len(rows), device=rows.device)
    block = block_rows(len(index))
    found = []
    for start in blocks(len(rows), len(index)):
        numbers = every[start : start + block]
        centred = F.normalize(rows[start : start + block] - mean, dim=1)
        # The eighth power, by squaring: a general power takes ten times as long.
        kernel = (centred @ centred_refs.T).clamp_min_(0.0).square_().square_().square_()
        other = filled & (numbers[:, None] != index)
        kernel.masked_fill_(~other, 0.0)
        itself = among[start : start + block]
        size = centred.square().sum(1).square().square().square()  # 1, or 0 at the very mean
        mean_other = kernel.sum(1) / other.sum(1).clamp_min(1)
        found.append((itself * size + (count - itself.long()) * mean_other) / count.clamp_min(1))
    return torch.cat(found).clamp_min(LEAST_DENSITY).log()
