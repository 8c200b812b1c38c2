"""What a pool says about its own pairs: which of them match, and how common each is.

No labels and no reference beyond the embedder. A pool of P pairs holds P (P - 1) pairs that are known to be mismatched,
an image with another's caption, and they show what chance looks like. A few hundred of the pool's samples stand for all
of them, so that time and memory grow with the pool and not with its square.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcov_stream.fused import fused
from clipcov_stream.herding import centred_squares, row_dots
from clipcov_stream.pool import Pool, exp_below, log_sum_exp, valid_of
from clipcov_stream.products import product
from clipcov_stream.scratch import scratch
from clipcov_stream.sketch import all_hold, sync_is_free

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

TABLE = 1 << 18
"""Numbers in the largest table, 1 MiB: a larger one leaves the cache and is slower, not faster."""

NORM = 1e-12
"""The least that a row is divided by, as in F.normalize."""

LEAST_SQUARE = 1e-6
"""Of a centred row of unit length before: what is closer to the mean is rounding, and resembles nothing."""

LEAST_P_VALUE = 2e-3
"""Of `Matching.posterior`: a few hundred references tell no smaller ones apart."""

EDGES = 16
"""Of `edge_of`: an edge is a whole number of EDGES-ths."""

LEAST_EDGE, STEEP, FEW = 3, 8, 2
"""Of `edge_of`, measured in tools/LOG.md: the least edge, in EDGES-ths; how much rarer pairs are beyond an edge than
they would be, and how many fewer at least."""

LEAST_LEFT, LEAST_SHARE = 0.1, 0.25
"""Of `edge_of`: by what an edge says, the share of the pool that is mismatched, at least, and the share of the stream
that matched before the filter, at least."""

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
        edge: 0-dim, the p-value beyond which somebody took pairs away before (`edge_of`); 1 where nobody did.
    """

    score: Float[Tensor, " pool"]
    p_value: Float[Tensor, " pool"]
    share: Float[Tensor, ""]
    edge: Float[Tensor, ""]

    def p_value_within(self, least: float = 0.0) -> Float[Tensor, " pool"]:
        """p-values, `least` at least, as they are among the mismatched pairs that were left: uniform up to 1 again."""
        return (self.p_value.clamp_min(least) / self.edge).clamp_max(1.0)

    def posterior(self, valid: Bool[Tensor, " pool"]) -> Float[Tensor, " pool"]:
        """How likely each pair is to match, given its p-value; in (0, 1), and 0 where a sample is not valid.

        One less the local false discovery rate (Efron et al., JASA 2001): of all valid pairs a share s matches, whose
        p-values have the density a p^(a - 1), and those of the others are uniform (Pounds and Morris, Bioinformatics
        2003), so that s a p^(a - 1) / (1 - s + s a p^(a - 1)) of those at p match. s is Storey's, a that of their mean,
        p up to the edge of 1. Where it errs it is too low in the middle, by .4 at most over tenths of a noisy corpus
        (tools/LOG.md).
        """
        share, power = self._mixture(valid)
        matched = share * power * self.p_value_within(LEAST_P_VALUE).pow(power - 1)
        return (matched / (1 - share + matched)).masked_fill(~valid, 0.0)

    def _mixture(self, valid: Bool[Tensor, " pool"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """s and a of `posterior`."""
        share = self.share.clamp(0.02, 0.98)
        mean = (self.p_value_within() * valid).sum() / valid.sum().clamp_min(1)
        # (1 - s) / 2 + s a / (1 + a) is the mean of the mixture.
        own = ((mean - (1 - share) / 2) / share).clamp(0.01, 0.49)
        return share, own / (1 - own)

    def told(self, valid: Bool[Tensor, " pool"], likely: float) -> Float[Tensor, ""]:
        """Share of the matching pairs that can be told from chance: those more likely to match than `likely`; 0-dim.

        By `posterior`, and for p-values too small to be told from one another, in which a good embedder's matches
        gather, by how many there are beside how many chance would have. A share below its own standard error, some
        1 / sqrt(pool), is taken as that: at chance the few that seem to match are all told, and mean nothing.
        """
        count = valid.sum().clamp_min(1)
        least = valid & (self.p_value <= LEAST_P_VALUE)
        # Of p-values that go by 1 / 512, or in a small pool by half of one of its pairs, 0 and what is next to it.
        by_chance = (2 * LEAST_P_VALUE * count / self.edge).clamp_min(0.5)
        least = least & (least.sum() * (1 - likely) > by_chance)
        num = (valid & (least | (self.posterior(valid) > likely))).sum()
        return num / (torch.maximum(self.share, count.float().rsqrt()) * count).clamp_min(1)

    def opened(
        self,
        valid: Bool[Tensor, " pool"],
        gate: float,
        least: Float[Tensor, ""] | float | int,
        wear: Float[Tensor, " pool"] | None = None,
    ) -> Bool[Tensor, " pool"]:
        """`gate` valid samples for each that is estimated to match, at least `least`: those of highest score.

        Args:
            wear: what each pair's log posterior has lost since it was new. If any valid pair has lost some, those are
                open that have most left, of equal ones those of highest score.
        """
        count = valid.sum()
        num_open = (gate * self.share * count).clamp_min(least) if gate < float("inf") else count
        score = self.score if all_hold(valid) else self.score.masked_fill(~valid, -torch.inf)
        order = torch.sort(score, descending=True, stable=True).indices
        if wear is not None:
            # By score alone while none is worn: a run of few passes is what it is where nothing is counted.
            worn = (wear * valid).any()
            if not sync_is_free(worn) or bool(worn):
                left = torch.where(worn, self.posterior(valid).log() - wear, 0.0).index_select(0, order)
                order = order.index_select(0, torch.sort(left, descending=True, stable=True).indices)
        if sync_is_free(order):
            return torch.zeros_like(valid).index_fill_(0, order[: math.ceil(num_open)], True).logical_and_(valid)
        rank = torch.empty_like(self.score)
        rank[order] = torch.arange(len(rank), dtype=rank.dtype, device=rank.device)
        return valid & (rank < num_open)


def references(among: Bool[Tensor, " pool"], most: int) -> tuple[Int64[Tensor, " refs"], Bool[Tensor, " refs"]]:
    """At most `most` of the samples `among`, evenly spaced in the pool's order, and which of these places are filled.

    All of them, in order, if there are no more; places left over repeat sample 0 and are not filled. No host sync.
    """
    num = min(most, len(among))
    count = among.sum()
    stride = (count.float() / num).clamp_min(1.0)
    rank = (torch.arange(num, device=among.device, dtype=torch.float64) * stride).floor_().long()
    if all_hold(among):
        return rank, torch.ones_like(rank, dtype=torch.bool)
    filled = rank < count
    # The rank-th sample `among`, counted from 0, is the first place with rank + 1 of them up to it.
    index = torch.searchsorted(among.cumsum(0), rank + 1).clamp_max_(len(among) - 1)
    return torch.where(filled, index, 0), filled


def marked(index: Tensor, filled: Tensor, among: Tensor) -> Int64[Tensor, " pool"]:
    """1 where a sample is one of the filled references, else 0."""
    found = torch.zeros_like(among, dtype=torch.int64)
    if all_hold(filled):
        return found.index_fill_(0, index, 1)
    # Unfilled places all name sample 0, and must not unname it: the largest of all that is written stays.
    return found.scatter_reduce(0, index, filled.long(), "amax")


def block_rows(rows: Tensor, width: int) -> int:
    """Rows of a block, such that its table of `width` columns stays in a CPU's cache, and does not fill a GPU."""
    numbers = TABLE << 8 if rows.is_cuda else TABLE
    return max(64, numbers // max(width, 1))


def hide_own(table: Tensor, start: int, index: Tensor, value: float) -> None:
    """Write `value` where a row of the block from `start` on meets itself among the references, in place."""
    if table.is_cuda:  # compiled together with what follows it
        hide_by_mask(table, start, index, value)
        return
    row = index - start
    inside = (row >= 0) & (row < len(table))
    row = row.clamp(0, len(table) - 1)
    column = torch.arange(len(index), device=index.device)
    table[row, column] = torch.where(inside, value, table[row, column])


def hide_by_mask(table: Tensor, start: int, index: Tensor, value: float) -> None:
    """`hide_own`, in a form that a compiler makes part of the next pass."""
    row = torch.arange(start, start + len(table), device=index.device)
    table.masked_fill_(row[:, None] == index, value)


@fused
def beside(
    rows: Tensor, refs: Tensor, closed: Tensor, half: Tensor, index: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """Logits of a block's rows with the references less `half` of the column's total, own places closed; and the log
    of the sum of the logits' exponentials, of every row."""
    table = product(rows, refs, closed - half)
    hide_own(table, start, index, -torch.inf)
    top_logit = table.amax(1, keepdim=True)
    shift = half.amax()
    # A product instead of a sum puts back what was taken off, without a pass over the table.
    total = exp_below(table, top_logit) @ (half - shift).exp()
    return table, (total.log() + top_logit.squeeze(1) + shift).nan_to_num(neginf=0.0)


def num_by_mask(table: Tensor, threshold: Tensor) -> Tensor:
    """`num_reaching`, as one pass that writes nothing but the numbers."""
    return (table >= threshold[:, None]).sum(1).to(table.dtype)


@fused
def num_reaching(table: Tensor, threshold: Tensor) -> Tensor:
    """How many of a row's numbers reach the row's threshold; overwrites the table on a CPU."""
    if table.is_cuda:
        return num_by_mask(table, threshold)
    # Counted in float, which is faster than bool.
    return torch.ge(table, threshold[:, None], out=table) @ torch.ones_like(table[0])


def matching(pool: Pool, most: int) -> Matching:
    """Score every pair against mismatched ones of the pool, and estimate how many match.

    The score is the margin of a pair with itself, i = j,

        m_ij = s x_i.y_j - 1/2 log sum_{k != i} exp(s x_i.y_k) - 1/2 log sum_{k != j} exp(s x_k.y_j)

    (negCLIPLoss: Wang et al., NeurIPS 2024, arXiv 2405.19547, without a pair's own term), k over at most `most`
    references, evenly spaced in the pool; both sums are scaled to the pool's size. If a caption has nothing to do with
    its image, m_ii is one of the m_ij and m_ji but for what the normalizers leave out, so its p-value is nearly uniform
    (in pools below a hundred small ones are too frequent); those above 1/2 are half of the mismatched pairs (Storey,
    JRSS B 2002, with lambda = 1/2), and where pairs were filtered before, those above half of what the filter left
    (`edge_of`).

    A class that fills a share r of the pool makes r of its mismatched pairs match by accident, which this cannot see;
    and pairs that the embedder has not learned look mismatched: a weak embedder underestimates the share.

    Costs: 4 * pool * references * dim flops, in blocks of rows; no pool x pool table.
    """
    valid = valid_of(pool)
    index, filled = references(valid, most)
    count = valid.sum()
    others = filled.sum() - marked(index, filled, valid)
    # A sample alone among invalid ones has no others; 0 leaves its own logit.
    to_pool = ((count - 1).clamp_min(1).float() / others.clamp_min(1)).log()
    own = row_dots(pool.image, pool.text) * pool.logit_scale
    compare = compared_at_once if fits(pool.image, index) else compared
    halves, above = compare(pool, index, filled, to_pool, own)
    score = (own - halves).masked_fill(~valid, 0.0)
    p_value = (above / (2 * others).clamp_min(1)).masked_fill(~valid, 1.0)
    edge = edge_of(p_value, valid)
    by_chance = 2 * ((p_value > 0.5 * edge) & valid).sum().float() / count.clamp_min(1)
    return Matching(score, p_value, (1 - by_chance).clamp_min(0.0), edge)


def edge_of(p_value: Float[Tensor, " pool"], valid: Bool[Tensor, " pool"]) -> Float[Tensor, ""]:
    """Where the p-values of mismatched pairs end because a filter took those that looked worst; 1 if none did. 0-dim.

    Web data come filtered: by a CLIP score, by another model's or by this one's. If what looked least like a match is
    gone, none is left to count by, and what is left of the mismatched pairs would pass for matches. But a filter leaves
    an edge. Of p-values whose density falls no faster than 1 / p, as a mixture of uniform ones and p^(a - 1), a > 0,
    does, at least log2(1 / c) times as many lie beyond c as between c / 2 and c. The edge is the least c, in EDGES-ths
    and from LEAST_EDGE of them on, with fewer than 1 / STEEP of these, less FEW: in a pool of a few hundred that does
    not happen by chance.

    Other things have edges too, and are let be. A good embedder's p-values of clean pairs may fall faster than 1 / p,
    but few of them are so large that they would pass for LEAST_LEFT of the pool. Where a concept fills a share r of the
    pool and pairs within it are not told apart, theirs are uniform up to r; if that were an edge, hardly any pair would
    have matched before the filter, less than LEAST_SHARE. Ten concepts of a tenth each are taken for an edge, and the
    share that matches is underestimated by a fifth; so are matches as rare as that, filtered, for no edge.

    Where a filter left the best few alone, or was of another model so that its edge is blurred, none may be found, and
    the share is overestimated as far as that.
    """
    edges, excess, mismatched = edges_on(p_value.device)
    places = (p_value * (2 * EDGES)).long()
    num = torch.zeros_like(excess[0]).index_add_(0, places, valid.double())
    first = torch.where(excess @ num <= -FEW, edges, 1.0).amin()
    left = mismatched @ num / num.sum().clamp_min(1)
    # Of a stream with LEAST_SHARE of matches a filter that takes all beyond the edge leaves this share mismatched.
    most = (1 - LEAST_SHARE) * edges / (LEAST_SHARE + (1 - LEAST_SHARE) * edges)
    believed = (edges == first) & (left >= LEAST_LEFT) & (left <= most)
    return torch.where(believed, edges, 1.0).amin()


@functools.cache
def edges_on(
    device: torch.device,
) -> tuple[Float[Tensor, " edges"], Float[Tensor, "edges places"], Float[Tensor, "edges places"]]:
    """The edges that `edge_of` tries; what a p-value adds, by its place in halves of EDGES-ths, to how many lie beyond
    each, less a STEEP-th of how many would; and to how many are mismatched by it. In double, which counts exactly."""
    place, step = torch.arange(2 * EDGES + 1, device=device), torch.arange(LEAST_EDGE, EDGES, device=device)[:, None]
    beyond, below = (place >= 2 * step).double(), ((place >= step) & (place < 2 * step)).double()
    edges = step.float() / EDGES
    return edges.squeeze(1), beyond + below * edges.double().log2() / STEEP, 2 * (beyond + below)


def compared(
    pool: Pool, index: Tensor, filled: Tensor, to_pool: Tensor, own: Tensor
) -> tuple[Float[Tensor, " pool"], Float[Tensor, " pool"]]:
    """`matching`'s work, in blocks of rows: half the sum of both normalizers, of every sample, and how many of the
    margins with references are at least its own.

    Args:
        index, filled: the references.
        to_pool: (pool,) log of the pool's size over the number of a sample's references.
        own: (pool,) logit of every pair.
    """
    ref_image, ref_text = (rows.index_select(0, index) * pool.logit_scale for rows in (pool.image, pool.text))
    closed = torch.where(filled, 0.0, -torch.inf).float()

    def totals(rows: Tensor, refs: Tensor) -> Tensor:
        """Of references: log of what the others' exponentials sum to."""
        table = product(rows.index_select(0, index), refs, closed)
        table.fill_diagonal_(-torch.inf)
        return (log_sum_exp(table, 1) + to_pool.index_select(0, index)).nan_to_num(neginf=0.0)

    # What any caption, any image gets beside the references'; half of it comes off every margin.
    half_by_image, half_by_text = 0.5 * totals(pool.image, ref_text), 0.5 * totals(pool.text, ref_image)
    block = block_rows(pool.image, len(index))
    totals_found, above = [], []
    for start in range(0, len(own), block):
        part = slice(start, start + block)
        with_texts, by_image = beside(pool.image[part], ref_text, closed, half_by_text, index, start)
        with_images, by_text = beside(pool.text[part], ref_image, closed, half_by_image, index, start)
        halves = 0.5 * (by_image + to_pool[part]), 0.5 * (by_text + to_pool[part])
        # m_ik >= m_ii and m_ki >= m_ii, without what both sides share.
        above.append(num_reaching(with_texts, own[part] - halves[1]) + num_reaching(with_images, own[part] - halves[0]))
        totals_found.append(halves[0] + halves[1])
    return torch.cat(totals_found), torch.cat(above)


def fits(rows: Tensor, index: Tensor) -> bool:
    """Whether all rows are one block, on a CPU: then steps are too short for the time it takes to begin one."""
    return sync_is_free(rows) and rows.dtype == torch.float32 and len(rows) <= block_rows(rows, len(index))


def own_places(index: Tensor) -> Tensor:
    """Where in the flat table of a whole pool and its references each of these meets itself."""
    return index * len(index) + torch.arange(len(index), device=index.device)


def compared_at_once(
    pool: Pool, index: Tensor, filled: Tensor, to_pool: Tensor, own: Tensor
) -> tuple[Float[Tensor, " pool"], Float[Tensor, " pool"]]:
    """`compared` where the whole pool is one block: its tables have the references' own rows too."""
    places, all_filled = own_places(index), all_hold(filled)
    tables, halves = [], []
    for name, rows, others in (("texts", pool.image, pool.text), ("images", pool.text, pool.image)):
        refs = others.index_select(0, index) * pool.logit_scale
        table = product(rows, refs, out=scratch(name, len(rows), len(index)))
        if not all_filled:
            table.masked_fill_(~filled, -torch.inf)
        table.view(-1).index_fill_(0, places, -torch.inf)
        tables.append(table)
        total = log_sum_exp(table, 1, scratch("exponentials", *table.shape))
        halves.append(total.nan_to_num_(neginf=0.0).add_(to_pool).mul_(0.5))
    above = [
        num_reaching(table.sub_(half.index_select(0, index)), own - half)
        for table, half in zip(tables, reversed(halves), strict=True)
    ]
    return halves[0] + halves[1], above[0] + above[1]


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
    if fits(image, index) and all_hold(among):
        return log_density_at_once(image, index) + log_density_at_once(text, index)
    return row_log_density(image, among, index, filled) + row_log_density(text, among, index, filled)


def log_density_at_once(rows: Float[Tensor, "pool dim"], index: Int64[Tensor, " refs"]) -> Float[Tensor, " pool"]:
    """`row_log_density` where all samples count and the whole pool is one block."""
    num = len(rows)
    centred = rows - rows.mean(0)
    norm = torch.linalg.vector_norm(centred, dim=1)
    floored = norm.clamp_min(NORM)
    centred.div_(floored[:, None])
    kernel = product(centred, centred.index_select(0, index), positive=True, out=scratch("kernel", num, len(index)))
    kernel.square_().square_()
    kernel.view(-1).index_fill_(0, own_places(index), 0.0)
    # Half of the eighth power, squared in the sum.
    found = torch.linalg.vector_norm(kernel, dim=1).square_()
    weight = torch.full_like(found, (num - 1) / (num * len(index)))
    weight.index_fill_(0, index, (num - 1) / (num * max(len(index) - 1, 1)))
    return found.mul_(weight).add_((norm / floored).square_(), alpha=1 / num).clamp_min_(LEAST_DENSITY).log_()


def row_log_density(
    rows: Float[Tensor, "pool dim"],
    among: Bool[Tensor, " pool"],
    index: Int64[Tensor, " refs"],
    filled: Bool[Tensor, " refs"],
) -> Float[Tensor, " pool"]:
    """`log_density` of one side."""
    count = among.sum()
    mean = (among.float() / count.clamp_min(1)) @ rows
    centred_refs = F.normalize(rows.index_select(0, index) - mean, dim=1)
    num_others = (filled.sum() - marked(index, filled, among)).clamp_min(1)
    weight = filled.to(rows.dtype)
    block = block_rows(rows, len(index))
    parts = [
        resemblance(rows[start : start + block], mean, centred_refs, weight, index, start)
        for start in range(0, len(rows), block)
    ]
    found, size = (torch.cat(part) for part in zip(*parts, strict=True))
    density = (among * size + (count - among.long()) * found / num_others) / count.clamp_min(1)
    return density.clamp_min(LEAST_DENSITY).log()


def log_exposure(
    image: Float[Tensor, "pool dim"],
    text: Float[Tensor, "pool dim"],
    image_centre: Float[Tensor, " dim"],
    text_centre: Float[Tensor, " dim"],
    recent_image: Float[Tensor, "recent dim"],
    recent_text: Float[Tensor, "recent dim"],
    weight: Float[Tensor, " recent"],
) -> Float[Tensor, " pool"]:
    """How often training has lately seen each pair's like: log(1 + how many recent survivors resemble it).

    A survivor resembles a pair by as much as its image does times as much as its caption does, each by max(cosine, 0)
    to the eighth power of rows about a centre, `log_density`'s kernel; 1 for the pair itself. If n like it have been
    trained on, another adds 1 / (1 + n) to log(1 + n): a return that diminishes, as in submodular cover of the log of
    counts, but for what was chosen before this pool, which no density within a pool knows of.

    Args:
        weight: for how many survivors each recent row stands; 0 where there is none.

    Costs: 4 * pool * recent * dim flops, in blocks of rows; no pool x recent table on a CPU.
    """
    # w a^8 = (w^(1/8) a)^8: the weights go into the fewest numbers there are.
    recent_image = F.normalize(recent_image - image_centre, dim=1) * weight.pow(1 / 8)[:, None]
    recent_text = F.normalize(recent_text - text_centre, dim=1)
    squares = [centred_squares(*side) for side in ((image, image_centre), (text, text_centre))]
    squares = squares[0].clamp_min(LEAST_SQUARE) * squares[1].clamp_min(LEAST_SQUARE)
    # (x - c) r = x r - c r, without a copy of the rows.
    offsets = recent_image @ image_centre, recent_text @ text_centre
    block = block_rows(image, len(weight))
    parts = [
        exposed(*rows, recent_image, recent_text, *offsets)
        for rows in zip(image.split(block), text.split(block), squares.split(block), strict=True)
    ]
    return torch.cat(parts).log1p_()


@fused
def exposed(
    image: Tensor,
    text: Tensor,
    squares: Tensor,
    recent_image: Tensor,
    recent_text: Tensor,
    by_image: Tensor,
    by_text: Tensor,
) -> Tensor:
    """How many recent survivors resemble each pair of a block.

    `squares` are the squared lengths of a pair's centred rows, multiplied; the recent rows are about their centres and
    of unit length, or weighted, and `by_image`, `by_text` the centres' products with them.
    """
    if not sync_is_free(image):
        kernel = (image @ recent_image.T - by_image).clamp_min(0.0) * (text @ recent_text.T - by_text).clamp_min(0.0)
        return (kernel.square() / squares[:, None]).square().square().sum(1)
    size = len(image), len(recent_image)
    kernel = product(image, recent_image, -by_image, True, scratch("exposure", *size))
    kernel.mul_(product(text, recent_text, -by_text, True, scratch("texts", *size)))
    # Half of the eighth power, squared in the sum; rows are divided by their lengths last, where there are fewest.
    found = torch.linalg.vector_norm(kernel.square_().square_(), dim=1)
    return found.div_(squares.square_()).square_()


def unevenness(
    image: Float[Tensor, "pool dim"],
    text: Float[Tensor, "pool dim"],
    among: Bool[Tensor, " pool"],
    most: int,
) -> Float[Tensor, ""]:
    """How unevenly concepts are represented `among` the samples: the variance of their log density; 0-dim.

    Rows are whitened, which takes the embedder's own geometry out: there every direction is as long as any other, and
    what is left of the spread is that some pairs have many look-alikes and others few. The density is `log_density`'s
    kernel of at most `most` samples, evenly spaced, with themselves and one another alone: beside all of a larger pool
    few look-alikes would be found, and chance would be taken for unevenness. Measured at 256 (tools/LOG.md), with a
    proxy 64 to 512 wide, in pools of 640 to 4,096: .01 for balanced classes, .01 to .03 for a long tail, .05 where a
    tenth of the pairs are copies of hot ones, .14 and more where a fifth are. An embedder that has learned little tells
    fewer samples apart and finds more.

    Costs: 4 * references^2 * dim flops.
    """
    index, filled = references(among, most)
    weight = filled.to(image.dtype)
    total = torch.zeros_like(weight)
    for rows in (image, text):
        unit = F.normalize(rows.index_select(0, index), dim=1)
        kernel = product(unit, unit, positive=True).square_().square_().square_().fill_diagonal_(1.0)
        total = total + (kernel @ weight).clamp_min(1.0).log()
    spread = (total - (total @ weight) / weight.sum().clamp_min(1)) * weight
    return spread.square().sum() / (weight.sum() - 1).clamp_min(1)


@fused
def resemblance(
    rows: Tensor, mean: Tensor, refs: Tensor, weight: Tensor, index: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """Sum of a block's kernels with the references, of every row and without its own; and with itself, which is 1, or 0
    at the very mean."""
    centred = F.normalize(rows - mean, dim=1)
    # The eighth power, by squaring: a general power takes ten times as long.
    kernel = product(centred, refs, positive=True).square_().square_().square_()
    hide_own(kernel, start, index, 0.0)
    return kernel @ weight, centred.square().sum(1)
