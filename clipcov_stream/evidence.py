"""What a pool says about its own pairs: which of them match, and how common each is.

No labels and no reference beyond the embedder. A pool of P pairs holds P (P - 1) pairs that are known to be mismatched,
an image with another's caption, and they show what chance looks like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcov_stream.pool import Pool, valid_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

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


def matching(pool: Pool) -> Matching:
    """Score every pair against the pool's mismatched ones, and estimate how many match.

    The score is the margin of a pair with itself, i = j,

        m_ij = s x_i.y_j - 1/2 log sum_{k != i} exp(s x_i.y_k) - 1/2 log sum_{k != j} exp(s x_k.y_j)

    (negCLIPLoss: Wang et al., NeurIPS 2024, arXiv 2405.19547, without a pair's own term). If a caption has nothing to
    do with its image, m_ii is one of the m_ij and m_ji but for what the normalizers leave out, so its p-value is nearly
    uniform (in pools below a hundred small ones are too frequent); those above 1/2 are half of the mismatched pairs
    (Storey, JRSS B 2002, with lambda = 1/2).

    A class that fills a share r of the pool makes r of its mismatched pairs match by accident, which this cannot see;
    and pairs that the embedder has not learned look mismatched: a weak embedder underestimates the share.

    Costs: 2 * pool^2 * dim flops, a few pool x pool tables.
    """
    valid = valid_of(pool)
    both = valid[:, None] & valid[None, :]
    own = torch.eye(len(valid), dtype=torch.bool, device=valid.device)
    logits = pool.logit_scale * pool.image @ pool.text.T
    others = logits.masked_fill(~both | own, -torch.inf)
    # A sample alone among invalid ones has no others; 0 leaves its own logit.
    by_image = others.logsumexp(1).nan_to_num(neginf=0.0)
    by_text = others.logsumexp(0).nan_to_num(neginf=0.0)
    margins = logits - 0.5 * by_image[:, None] - 0.5 * by_text[None, :]
    score = margins.diagonal().masked_fill(~valid, 0.0)
    mismatched = both & ~own
    above = ((margins >= score[:, None]) & mismatched).sum(1) + ((margins >= score[None, :]) & mismatched).sum(0)
    count = valid.sum()
    p_value = (above / (2 * (count - 1)).clamp_min(1)).masked_fill(~valid, 1.0)
    by_chance = 2 * ((p_value > 0.5) & valid).sum() / count.clamp_min(1)
    return Matching(score, p_value, (1 - by_chance).clamp_min(0.0))


def log_density(pool: Pool, among: Bool[Tensor, " pool"]) -> Float[Tensor, " pool"]:
    """How common each pair is: the log density of its image plus that of its caption, among the samples `among`.

    A kernel density estimate on the sphere, of rows centred by their mean over `among`: the mean of max(cosine, 0) to
    the eighth power (tools/LOG.md has leads for 6, 12 and 24). Near-duplicates and popular concepts are dense, the tail
    is not; but a concept that fills half of the pool draws the mean to itself, and what is left of its samples once
    centred looks rare. It plays the part of the concept counts that data curation balances by where there are tags or
    metadata (MetaCLIP: Xu et al., ICLR 2024, arXiv 2309.16671; CABS, arXiv 2511.20643).

    Costs: 4 * pool^2 * dim flops.
    """
    return row_log_density(pool.image, among) + row_log_density(pool.text, among)


def row_log_density(rows: Float[Tensor, "pool dim"], among: Bool[Tensor, " pool"]) -> Float[Tensor, " pool"]:
    """`log_density` of one side."""
    share = among / among.sum().clamp_min(1)
    centred = F.normalize(rows - share @ rows, dim=1)
    # The eighth power, by squaring: a general power takes ten times as long.
    kernel = (centred @ centred.T).clamp_min_(0.0).square_().square_().square_()
    return (kernel @ share).clamp_min(LEAST_DENSITY).log()
