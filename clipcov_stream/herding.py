"""Kernel herding: picks that together come close to an aim, beside what each is worth by itself.

Atoms are z_i = x_i y_i^T; their inner product is a product of two kernels, <z_i, z_j>_F = (x_i . x_j)(y_i . y_j), so no
d x d atom is ever built, and no table of all pairs either: picks are made in chunks, among the best of the pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipcov_stream import kernels
from clipcov_stream.fused import fused
from clipcov_stream.products import blocks, product
from clipcov_stream.scratch import LARGEST, scratch
from clipcov_stream.sketch import at_least, number, root, scalar, sync_is_free

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

CHUNK = 64
NEAR = 4
"""`Herding.picks` looks at the whole pool once per CHUNK picks, which it makes among the NEAR * CHUNK best; measured in
tools/LOG.md."""

LOOKS = 16
NEAR_OF_LOOKS = 2
"""On a GPU a look at the whole pool is a chain of launches, and a pick takes as long as reading a row does: at most so
many looks for all picks, then, and picks among NEAR_OF_LOOKS times as many (tools/LOG.md, 2026-11-27)."""


def top(score: Float[Tensor, " pool"], num: int) -> Int64[Tensor, " num"]:
    """Indices of the `num` highest scores, best first; of equal scores the earlier sample."""
    return torch.sort(score, descending=True, stable=True).indices[:num]


def row_dots(left: Float[Tensor, "n dim"], right: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
    """Inner product of every row of one with the same row of the other."""
    if left.is_cuda:
        return fused_dots(left, right)
    return by_blocks(lambda rows, others: (rows * others).sum(1), left, right)


@fused
def fused_dots(left: Tensor, right: Tensor) -> Tensor:
    """`row_dots` in one pass, once compiled."""
    return (left * right).sum(1)


def by_blocks(function: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    """What a function returns of rows, a number for each, block by block: what it copies stays in a CPU's cache, and in
    memory that the allocator has at hand."""
    parts = [function(left[part], right[part]) for part in blocks(len(left))]
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else function(left, right)


def along(
    image: Float[Tensor, "pool dim"], text: Float[Tensor, "pool dim"], matrix: Float[Tensor, "dim dim"]
) -> Float[Tensor, " pool"]:
    """<matrix, x_i y_i^T>_F of every row. Costs: 2 * pool * dim^2 flops."""
    if image.is_cuda:
        return fused_dots(image @ matrix, text)
    return by_blocks(lambda rows, others: product(rows, matrix.T).mul_(others).sum(1), image, text)


def row_squares(rows: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
    """Squared norm of every row, without a copy of them."""
    return torch.linalg.vector_norm(rows, dim=1).square()


def centred_squares(rows: Float[Tensor, "pool dim"], mean: Float[Tensor, " dim"]) -> Float[Tensor, " pool"]:
    """Squared distance of every row from the mean, without a copy of the rows."""
    if rows.is_cuda:
        return squares_about(rows, mean)
    return torch.addmv(row_squares(rows), rows, mean, alpha=-2).add_(mean.square().sum()).clamp_min_(0)


@fused
def squares_about(rows: Tensor, mean: Tensor) -> Tensor:
    """`centred_squares` in one pass, once compiled."""
    return (rows - mean).square().sum(1)


def overlaps(
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    x: Float[Tensor, "m dim"],
    y: Float[Tensor, "m dim"],
    name: str,
) -> Float[Tensor, "n m"]:
    """<z_i, z_j>_F of every atom of one side with every of the other's; on a CPU in `scratch` of that name."""
    if not (sync_is_free(image) and image.dtype == torch.float32):
        return (image @ x.T).mul_(text @ y.T)
    of_image, of_text = (scratch(f"{name}_{side}", len(image), len(x)) for side in ("image", "text"))
    return product(image, x, out=of_image).mul_(product(text, y, out=of_text))


@dataclass(frozen=True)
class Picks:
    """What `Herding.picks` chose.

    Args:
        index: in the order chosen; of equal gains the earlier sample. No repeats.
        gain: of each when it was picked.
        slack: 0-dim, by how much the mean gain of those left at most exceeded a pick's: 0 where every pick was exact.
    """

    index: Int64[Tensor, " survivors"]
    gain: Float[Tensor, " survivors"]
    slack: Float[Tensor, ""]


@dataclass(frozen=True)
class Herding:
    """Kernel herding of the atoms z_i = x_i y_i^T towards `aim`, beside what each sample is worth by itself.

    After m picks S, the next is the one of largest worth_i + coverage * ((m + 1) <A, z_i> - sum_{j in S} <z_j, z_i>)
    (Chen, Welling and Smola, UAI 2010, here without replacement). A duplicate of a pick loses its whole norm. With
    ||z_i||^2 / 2 taken off, a step would lower ||C_S - A|| as far as one pick can; it is left on, as a worth, because
    a long whitened atom is one that few others resemble. `bound` says how close C_S comes all the same.
    """

    image: Float[Tensor, "pool dim"]
    text: Float[Tensor, "pool dim"]
    worth: Float[Tensor, " pool"]
    aim: Float[Tensor, "dim dim"]
    coverage: float
    valid: Bool[Tensor, " pool"]
    num_survivors: int
    known_mean: Float[Tensor, "dim dim"] | None = None
    """`mean_atom`, where it is known already."""

    @cached_property
    def mean_atom(self) -> Float[Tensor, "dim dim"]:
        """The mean of the valid atoms. Costs: 2 * pool * dim^2 flops, unless it is known."""
        if self.known_mean is not None:
            return self.known_mean
        weight = self.valid.float() / self.valid.sum().clamp_min(1)
        return (self.image * weight[:, None]).T @ self.text

    @cached_property
    def along(self) -> Float[Tensor, " pool"]:
        """<A, z_i> of every atom."""
        return along(self.image, self.text, self.aim)

    @cached_property
    def squares(self) -> Float[Tensor, " pool"]:
        """||z_i||^2 of every atom."""
        return row_squares(self.image) * row_squares(self.text)

    def objective(self, index: Int64[Tensor, " survivors"]) -> Float[Tensor, ""]:
        """What greedy picks raise, of a finished choice S of K in any order; 0-dim.

            sum_S worth_i + coverage * (K <A, sum_S z_i> - sum_{i < j in S} <z_i, z_j>)

        The second part is a constant less half of ||sum_S z_i - K A||^2, with the norms left on as above.
        """
        x, y = self.image.index_select(0, index), self.text.index_select(0, index)
        overlap = (x @ x.T).mul_(y @ y.T)
        pull = len(index) * self.along.index_select(0, index).sum()
        push = 0.5 * (overlap.sum() - overlap.diagonal().sum())
        return self.worth.index_select(0, index).sum() + self.coverage * (pull - push)

    def picks(self, chunk: int | None = None, num: Float[Tensor, ""] | float | None = None) -> Picks:
        """Choose `num_survivors`.

        Args:
            chunk: picks between two looks at the whole pool, made among the `NEAR * chunk` of highest gain at the
                look before. 1 is exact; so is any chunk that finds no more than NEAR * chunk valid samples. None is
                CHUNK; on a CPU all, and exact, where the pool is so small that one table is the least work; and on a
                GPU, if that is more, as many as make LOOKS looks, among NEAR_OF_LOOKS * chunk.
            num: how many of the first picks the slack is of; None is all.

        Costs: 4 * pool * survivors * dim flops and no host sync but on a CPU, where it is free; a table of pool x
            chunk, or on a GPU, with Triton, half-precision copies of the rows and a table of (near * chunk)^2.
        """
        near, long = NEAR, -(-self.num_survivors // LOOKS)
        if chunk is None and not sync_is_free(self.worth) and long > CHUNK:
            chunk, near = long, NEAR_OF_LOOKS
        if chunk is None and sync_is_free(self.worth) and self._at_once():
            chunk = self.num_survivors
            near = -(-len(self.worth) // chunk)
        chunk = CHUNK if chunk is None else chunk
        if chunk > 1 and kernels.run_on(self.worth):
            parts = (self.image, self.text, self.worth, self.along, self.valid, self.coverage)
            index, gain = kernels.herd(*parts, self.num_survivors, chunk, near)
        else:
            index, gain = self._picks(chunk, near)
        exact = near * min(chunk, self.num_survivors) >= len(self.worth)
        return Picks(index, gain, gain.new_zeros(()) if exact else self.slack(index, gain, num))

    def _at_once(self) -> bool:
        """Whether one table of the whole pool is less work than a look at it every CHUNK picks: up to about twice the
        size of all looks' tables, and as long as it stays in the cache (tools/LOG.md, 2026-11-27)."""
        looks = -(-self.num_survivors // CHUNK)
        return len(self.worth) ** 2 <= min(2 * looks * (NEAR * CHUNK) ** 2, LARGEST)

    def _picks(
        self, chunk: int, near_of: int = NEAR
    ) -> tuple[Int64[Tensor, " survivors"], Float[Tensor, " survivors"]]:
        """The picks and their gains, by torch alone; what `kernels.herd` is tested against."""
        num, coverage, along = len(self.worth), self.coverage, self.along
        gain = self.worth + coverage * along
        gain = gain.masked_fill(~self.valid, -math.inf)
        picked, gains, done = [], [], 0
        while True:
            size = min(chunk, self.num_survivors - done)
            near, x, y, pull, left = None, self.image, self.text, along, gain
            if near_of * size < num:
                # In the pool's order, so that of equal gains the earlier sample is found first.
                near = top(gain, near_of * size).sort().values
                x, y, pull, left = (part.index_select(0, near) for part in (x, y, pull, left))
            change = overlaps(x, y, x, y, "table").mul_(-coverage).add_(coverage * pull)
            place, found = pick_among(left, change, size)
            picked.append(place if near is None else near.index_select(0, place))
            gains.append(found)
            done += size
            if done == self.num_survivors:
                return torch.cat(picked), torch.cat(gains)
            x, y = self.image.index_select(0, picked[-1]), self.text.index_select(0, picked[-1])
            overlap = overlaps(self.image, self.text, x, y, "update")
            gain = gain.add_(along, alpha=coverage * size).sub_(overlap.sum(1), alpha=coverage)
            gain.index_fill_(0, picked[-1], -math.inf)

    def slack(
        self,
        index: Int64[Tensor, " survivors"],
        gain: Float[Tensor, " survivors"],
        num: Float[Tensor, ""] | float | None = None,
    ) -> Float[Tensor, ""]:
        """By how much the mean gain of those left at most exceeds a pick's; 0-dim, 0 where every pick is exact.

        All from sums over the picks. Before pick t the gain of i is worth_i + coverage * ((t + 1) <A, z_i> - sum_{s <
        t} <z_s, z_i>). Of all valid atoms it sums to one number, since their sum is known; of those picked already too,
        since a pick's own gain tells its overlap with those before it.

        Args:
            index: valid atoms in the order picked.
            gain: of each when it was picked.
            num: of the first picks alone; None is all.
        """
        x, y = self.image.index_select(0, index), self.text.index_select(0, index)
        with_all = along(x, y, self.mean_atom)
        worth, pull, size = (of.index_select(0, index) for of in (self.worth, self.along, self.squares))
        every = (self.worth, self.valid, self.mean_atom, self.aim)
        num = float(len(index)) if num is None else num
        return slack_of(gain, with_all, worth, pull, size, *every, self.coverage, num)

    def bound(
        self, slack: Float[Tensor, ""] | float = 0.0, num: Float[Tensor, ""] | float | None = None
    ) -> Float[Tensor, ""]:
        """What ||C_S - A||_F of the picks cannot exceed, whatever the atoms, the worths and the aim.

            ||C_S - A|| <= ||C_N - A|| + sqrt((s^2 + 2 (D + slack) / coverage) (N - (K + 1) / 2) / (K (N - 1)))

        N the valid samples, C_N their mean atom, s^2 the mean of ||z_i - A||^2, D the range of worth_i + coverage *
        ||z_i||^2 / 2; ||C_N - A|| alone if K = N. The proof is in tools/LOG.md; with D = 0 and A = C_N it has the mean
        spread where the known bound for herding without replacement has the largest. 0-dim; inf where coverage is 0,
        which does not look at the atoms.

        Args:
            slack: of the picks.
            num: K, of the first picks alone; None is all of them.
        """
        num = float(self.num_survivors) if num is None else num
        parts = (self.squares, self.along, self.worth, self.valid, self.mean_atom, self.aim)
        return bound_of(*parts, slack, self.coverage, num)


@fused
def slack_of(
    gain: Tensor,
    with_all: Tensor,
    worth: Tensor,
    pull: Tensor,
    size: Tensor,
    all_worths: Tensor,
    valid: Tensor,
    mean_atom: Tensor,
    aim: Tensor,
    coverage: float,
    num: Tensor | float,
) -> Tensor:
    """`Herding.slack`, of what it needs of the picks and of all."""
    # In double: the sums are over all picks and differ by little.
    count = number(valid.sum())
    found, with_all, worth, pull, size = torch.stack([gain, with_all, worth, pull, size]).double()
    found = torch.nan_to_num(found, neginf=0.0)
    later = torch.arange(1, len(gain) + 1, dtype=torch.float64, device=gain.device)
    overlap = worth + coverage * later * pull - found  # coverage * sum_{s < t} <z_s, z_t>
    # What the picks before each take from the sum of all gains: a part that grows with t, and the rest; in one call.
    terms = torch.stack([pull, worth + coverage * (count * with_all - size) - 2 * overlap])
    pulls, rest = terms.cumsum(1) - terms
    every = number(torch.where(valid, all_worths, 0.0).sum(dtype=torch.float64))
    along_all = number((mean_atom * aim).sum()) * count
    mean = (every - rest + coverage * later * (along_all - pulls)) / at_least(count - later + 1, 1)
    found, mean = (part.masked_fill(later > num, 0.0) for part in (found, mean))
    # Rounding: sums over the pool, of gains that themselves are sums.
    noise = 1e-5 * (found.abs().amax() + mean.abs().amax())
    return (mean - found - noise).amax().clamp_min(0).to(all_worths)


@fused
def bound_of(
    squares: Tensor,
    along: Tensor,
    worth: Tensor,
    valid: Tensor,
    mean_atom: Tensor,
    aim: Tensor,
    slack: Tensor | float,
    coverage: float,
    num: Tensor | float,
) -> Tensor:
    """`Herding.bound`, of what it needs of the atoms."""
    count = number(valid.sum())
    apart = torch.add(squares, along, alpha=-2) + number(aim.square().sum())
    spread = at_least(number(torch.where(valid, apart, 0.0).sum()) / at_least(count, 1), 0)
    worth = torch.add(worth, squares, alpha=0.5 * coverage)
    most, least = torch.where(valid, worth, -torch.inf).amax(), torch.where(valid, worth, torch.inf).amin()
    worths = at_least(number(most) - number(least), 0) + (number(slack) if isinstance(slack, Tensor) else slack)
    price = 2 * worths / coverage if coverage > 0 else math.inf
    fall = (count - (num + 1) / 2) / (num * at_least(count - 1, 1))
    drift = root(at_least((spread + price) * fall, 0))
    drift = torch.where(count > num, drift, 0.0) if isinstance(count, Tensor) else drift if count > num else 0.0
    return scalar(number((mean_atom - aim).norm()) + drift, aim)


def pick_among(
    gain: Float[Tensor, " near"], change: Float[Tensor, "near near"], num: int
) -> tuple[Int64[Tensor, " num"], Float[Tensor, " num"]]:
    """`num` picks one by one, each the best, and their gains; picking j adds row j of `change` to the gains."""
    picks = torch.empty(num, dtype=torch.int64, device=gain.device)
    found = torch.empty(num, dtype=gain.dtype, device=gain.device)
    if sync_is_free(gain):
        # The same steps on the same numbers, in NumPy: a call takes a microsecond there and several in torch.
        gains, changes = gain.numpy().copy(), change.numpy()
        places, kept = picks.numpy(), found.numpy()
        for step in range(num):
            best = gains.argmax()
            places[step], kept[step] = best, gains[best]
            gains += changes[best]
            gains[best] = -math.inf
        return picks, found
    for step in range(num):
        # A one-element index instead of gain[best]: a 0-dim index is read back from the device.
        best = gain.argmax().view(1)
        picks[step : step + 1] = best
        found[step : step + 1] = gain.index_select(0, best)
        gain = (gain + change.index_select(0, best).squeeze(0)).index_fill_(0, best, -torch.inf)
    return picks, found
